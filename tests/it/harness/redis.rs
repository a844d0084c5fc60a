//! A real redis-server of a test's own, on free ports and a unix socket, that can be stopped in every way.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{DEADLINE, free_port, wait_until};

/// For [`RedisServer::with`]: every write is on disk before it is answered, so that a kill loses nothing.
pub(crate) const KEEPS_ITS_DATA: &str = "appendonly yes";

/// Ends with its value.
#[derive(Debug)]
pub(crate) struct RedisServer {
    directory: TempDir,
    port: u16,
    tls_port: Option<u16>,
    child: Option<Child>,
}

impl RedisServer {
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// `conf`: further lines of redis.conf.
    pub(crate) fn with(conf: &str) -> Self {
        Self::begin(conf, false)
    }

    /// Speaks TLS, too, as `localhost`; its authority is [`Self::authority`].
    pub(crate) fn with_tls() -> Self {
        Self::begin("", true)
    }

    fn begin(conf: &str, tls: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut server = Self { directory, port: 0, tls_port: None, child: None };
        if tls {
            let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            std::fs::write(server.path("cert.pem"), certified.cert.pem()).unwrap();
            std::fs::write(server.path("key.pem"), certified.signing_key.serialize_pem()).unwrap();
        }
        // A port that was free may be taken by the time that the server comes; then it leaves, and we take others.
        for _ in 0..10 {
            server.port = free_port();
            server.tls_port = tls.then(free_port);
            server.write_conf(conf);
            if server.try_start() {
                return server;
            }
        }
        panic!("redis-server does not start: {}", std::fs::read_to_string(server.path("log")).unwrap_or_default());
    }

    fn write_conf(&self, conf: &str) {
        let directory = self.directory.path().display();
        let mut text = format!(
            "bind 127.0.0.1\nport {}\nunixsocket {directory}/redis.sock\ndir {directory}\nlogfile {directory}/log\n\
             save \"\"\ndaemonize no\nappendfsync always\n{conf}\n",
            self.port
        );
        if let Some(port) = self.tls_port {
            text += &format!(
                "tls-port {port}\ntls-cert-file {directory}/cert.pem\ntls-key-file {directory}/key.pem\n\
                 tls-ca-cert-file {directory}/cert.pem\ntls-auth-clients no\n"
            );
        }
        std::fs::write(self.path("redis.conf"), text).unwrap();
    }

    /// Whether it came up and answers.
    fn try_start(&mut self) -> bool {
        let server = Command::new("redis-server").arg(self.path("redis.conf")).stdout(Stdio::null()).spawn();
        let mut child = server.expect("redis-server is installed: see scripts/setup");
        let mut has_left = false;
        wait_until("redis-server answers, or leaves", || {
            has_left = child.try_wait().unwrap().is_some();
            has_left || self.answers()
        });
        self.child = Some(child).filter(|_| !has_left);
        !has_left
    }

    /// Any answer but that it still loads its data; a wish for a password is one.
    fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut reply = [0; 8];
        stream.write_all(b"PING\r\n").is_ok()
            && stream.read_exact(&mut reply[..7]).is_ok()
            && !reply.starts_with(b"-LOADIN")
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn tls_url(&self) -> String {
        format!("rediss://localhost:{}", self.tls_port.expect("started with TLS"))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("redis.sock")
    }

    pub(crate) fn authority(&self) -> PathBuf {
        self.path("cert.pem")
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// SIGKILL: no farewell to anybody.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGSTOP: it keeps its connections, accepts new ones, and says nothing.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
        wait_until("redis-server is stopped", || self.state() == Some('T'));
    }

    /// SIGCONT.
    pub(crate) fn resume(&self) {
        self.signal("CONT");
    }

    /// On the same ports; with its data, if it was told to append them to a file.
    pub(crate) fn restart(&mut self) {
        self.kill();
        let started = Instant::now();
        while !self.try_start() {
            assert!(started.elapsed() < DEADLINE, "redis-server does not come back");
        }
    }

    pub(crate) fn restart_empty(&mut self) {
        self.kill();
        let files = self.path("appendonlydir");
        if files.exists() {
            std::fs::remove_dir_all(files).unwrap();
        }
        self.restart();
    }

    /// A connection of the test's own, behind the back of the store.
    pub(crate) fn client(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    /// As the kernel has it: `T` is stopped by a signal (proc_pid_stat(5), field 3).
    fn state(&self) -> Option<char> {
        let pid = self.child.as_ref()?.id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.as_ref().expect("it runs").id();
        let sent = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap();
        assert!(sent.success());
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.directory.path()).join(name)
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_survives_a_kill_when_it_is_appended_to_a_file_and_never_an_empty_restart() {
        let mut server = RedisServer::with(KEEPS_ITS_DATA);
        let () = redis::cmd("SET").arg("a").arg(1).exec(&mut server.client()).unwrap();
        let keys = |server: &RedisServer| redis::cmd("DBSIZE").query::<usize>(&mut server.client()).unwrap();

        server.kill();
        assert!(TcpStream::connect(("127.0.0.1", server.port())).is_err(), "a killed server has no port");
        server.restart();
        assert_eq!(keys(&server), 1, "every write was on disk");

        server.restart_empty();
        assert_eq!(keys(&server), 0);
    }

    #[test]
    fn a_paused_server_takes_connections_and_answers_when_it_is_resumed() {
        let server = RedisServer::start();
        server.pause();
        let mut asked = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        asked.write_all(b"PING\r\n").unwrap();
        asked.set_nonblocking(true).unwrap();
        assert!(asked.peek(&mut [0]).is_err(), "nobody answers");
        asked.set_nonblocking(false).unwrap();

        server.resume();
        let mut reply = [0; 7];
        asked.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"+PONG\r\n");
    }
}
