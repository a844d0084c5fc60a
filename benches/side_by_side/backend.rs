//! What answers at the end? The least that a web server can do: for `GET /<number>`, a body of so many bytes.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Serves on a thread of its own until the process ends.
pub(crate) fn start() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        });
    });
    address
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = Vec::with_capacity(4 * 1024);
    let (mut answer, mut answered) = (Vec::new(), 0);
    while stream.read_buf(&mut head).await? != 0 {
        if head.ends_with(b"\r\n\r\n") {
            let body_bytes = body_bytes(&head);
            if answered != body_bytes {
                (answer, answered) = (response(body_bytes), body_bytes);
            }
            head.clear();
            stream.write_all(&answer).await?;
        }
    }
    Ok(())
}

/// What the path asks for; 1 for other paths.
fn body_bytes(head: &[u8]) -> usize {
    let digits = head.get(b"GET /".len()..).unwrap_or_default().split(|byte| *byte == b' ').next();
    digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(1)
}

fn response(body_bytes: usize) -> Vec<u8> {
    let body = "x".repeat(body_bytes);
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {body_bytes}\r\n\r\n{body}").into_bytes()
}
