//! Where do tests keep sessions? A real `redis-server` per test, which can be killed, stopped and started again.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use tempfile::TempDir;

use super::{DEADLINE, eventually, free_port};

/// Between the choice of a free port and its use, another test may take it.
const PORTS_TRIED_MAX: usize = 5;

/// A Redis server on a port of its own, which ends with this value.
pub struct Redis {
    port: u16,
    folder: TempDir,
    arguments: Vec<String>,
    server: Mutex<Option<Child>>,
}

impl Redis {
    /// With every write on disk before it is answered, so that a kill loses nothing.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With further arguments of `redis-server`, e.g. `["--maxmemory", "3mb"]`.
    pub fn start_with(arguments: &[&str]) -> Self {
        let mut redis = Self {
            port: free_port(),
            folder: TempDir::new().unwrap(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            server: Mutex::new(None),
        };
        for _ in 0..PORTS_TRIED_MAX {
            if redis.spawn() {
                return redis;
            }
            redis.port = free_port();
        }
        panic!("redis-server does not start with {arguments:?}");
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Listens here too.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// Gone at once, as in a power cut.
    pub fn kill(&self) {
        if let Some(mut server) = self.server.lock().unwrap().take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    /// Starts again on the same port, with the data that it had.
    pub fn restart(&self) {
        self.kill();
        assert!(self.spawn(), "redis-server starts again on port {}", self.port);
    }
    /// Starts again on the same port, with nothing.
    pub fn restart_empty(&self) {
        self.kill();
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { std::fs::remove_dir_all(path).unwrap() } else { std::fs::remove_file(path).unwrap() }
        }
        self.restart();
    }

    /// Alive, and silent: connections open and nothing is answered, until [`Self::resume`].
    pub fn pause(&self) {
        self.signal("STOP");
        eventually("redis-server is stopped", || self.state() == Some('T'));
    }

    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// The reply to an inline command, raw: `"+PONG"`, `":3"`, `"$5"` (of a bulk reply the first line only).
    #[track_caller]
    pub fn command(&self, command: &str) -> String {
        self.try_command(command).unwrap_or_else(|| panic!("redis did not answer {command}"))
    }

    /// How many keys there are.
    #[track_caller]
    pub fn keys(&self) -> usize {
        self.command("DBSIZE").trim_start_matches(':').parse().unwrap()
    }

    /// Whether it came up; when not, its port was taken or its arguments are wrong.
    fn spawn(&self) -> bool {
        let mut server = Command::new("redis-server");
        server.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
        server.args(["--appendonly", "yes", "--appendfsync", "always"]);
        server.arg("--dir").arg(self.folder.path()).arg("--unixsocket").arg(self.socket());
        server.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = server.spawn().expect("redis-server is installed: see scripts/setup");
        let mut ended = false;
        eventually("redis-server answers or ends", || {
            ended = child.try_wait().unwrap().is_some();
            ended || self.try_command("PING").is_some_and(|reply| is_ready(&reply))
        });
        *self.server.lock().unwrap() = (!ended).then_some(child);
        !ended
    }

    fn try_command(&self, command: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        stream.write_all(format!("{command}\r\n").as_bytes()).ok()?;
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).ok()?;
        (!reply.is_empty()).then(|| reply.trim_end().to_owned())
    }

    /// As the kernel has it: `T` is stopped by a signal.
    fn state(&self) -> Option<char> {
        let process = self.server.lock().unwrap().as_ref()?.id();
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    }

    fn signal(&self, name: &str) {
        let server = self.server.lock().unwrap();
        let process = server.as_ref().expect("a running server").id().to_string();
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {process}")]).status().unwrap();
        assert!(status.success(), "signal {name} was not delivered");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A server that asks for a password first is up; one that is loading its data is not.
fn is_ready(reply: &str) -> bool {
    reply == "+PONG" || reply.starts_with("-NOAUTH")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_survives_a_kill_and_not_an_empty_restart() {
        let redis = Redis::start();
        assert_eq!(redis.command("SET a 1"), "+OK");

        redis.kill();
        assert!(TcpStream::connect(("127.0.0.1", redis.port())).is_err(), "a killed server has no port");
        redis.restart();
        assert_eq!(redis.keys(), 1, "every write was on disk");

        redis.restart_empty();
        assert_eq!(redis.keys(), 0);
    }

    #[test]
    fn a_paused_server_takes_connections_and_answers_when_it_is_resumed() {
        let redis = Redis::start();
        redis.pause();
        let mut asked = TcpStream::connect(("127.0.0.1", redis.port())).unwrap();
        asked.write_all(b"PING\r\n").unwrap();
        asked.set_nonblocking(true).unwrap();
        assert!(asked.peek(&mut [0]).is_err(), "nobody answers");
        asked.set_nonblocking(false).unwrap();

        redis.resume();
        let mut reply = String::new();
        BufReader::new(asked).read_line(&mut reply).unwrap();
        assert_eq!(reply, "+PONG\r\n");
    }
}
