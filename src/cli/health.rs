//! `cloakroom health`: the probe of a container, without a client in the image.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use super::{FAILED, Terminal};

const TIMEOUT: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: u64 = 4096;

pub fn health(admin: SocketAddr, terminal: &mut Terminal<'_>) -> ExitCode {
    match ask(admin) {
        Ok(answer) => {
            terminal.say(answer.rsplit("\r\n").next().unwrap_or_default());
            if answer.starts_with("HTTP/1.1 200 ") { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
        }
        Err(error) => terminal.fail(&error, FAILED),
    }
}

fn ask(admin: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET /health/ready HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
