//! What stands behind the gateways? A small web server in a process of its own, so that it can be killed.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;

use sha2::{Digest, Sha256};

use crate::harness::wire::{Length, Reader};

/// The answer to [`crate::harness::client::WEBSOCKET_KEY`] (RFC 6455, section 1.3).
const WEBSOCKET_HEAD: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Serves until whoever started it closes our standard input, or is gone.
pub(crate) fn run(port: u16) -> ExitCode {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(&stream));
        }
    });
    let _ = io::stdin().read_to_end(&mut Vec::new());
    ExitCode::SUCCESS
}

/// An error only says that the other side went away.
fn serve(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut out) = (Reader::new(stream), stream);
    while let Some(head) = reader.head()? {
        if head.values("upgrade").iter().any(|value| value.eq_ignore_ascii_case("websocket")) {
            out.write_all(WEBSOCKET_HEAD)?;
            return echo(&mut reader, out);
        }
        let body = reader.body(head.length(Length::Exactly(0)))?;
        let user = head.values("x-forwarded-user").join(",");
        let text = answer(&user, &body);
        write!(out, "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{text}", text.len())?;
    }
    Ok(())
}

/// Who asked, and the checksum of what they sent.
pub(crate) fn answer(user: &str, body: &[u8]) -> String {
    let sum: String = Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{user} {sum}\n")
}

fn echo(reader: &mut Reader<&TcpStream>, mut out: &TcpStream) -> io::Result<()> {
    loop {
        let mut bytes = Vec::new();
        if reader.take_some(u64::MAX, &mut bytes)? == 0 {
            return Ok(());
        }
        out.write_all(&bytes)?;
    }
}
