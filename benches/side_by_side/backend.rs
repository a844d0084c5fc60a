//! What answers at the end? The least that a web server can do: a fixed response for each request without a body.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::BODY_BYTES;

/// Serves on a thread of its own until the process ends.
pub(crate) fn start() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            let body = "x".repeat(BODY_BYTES);
            let answer: &'static [u8] =
                format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {BODY_BYTES}\r\n\r\n{body}")
                    .into_bytes()
                    .leak();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, answer));
            }
        });
    });
    address
}

async fn serve(mut stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = Vec::with_capacity(4 * 1024);
    while stream.read_buf(&mut head).await? != 0 {
        if head.ends_with(b"\r\n\r\n") {
            head.clear();
            stream.write_all(answer).await?;
        }
    }
    Ok(())
}
