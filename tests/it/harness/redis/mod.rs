//! A real redis-server of a test's own, on free ports and a unix socket, that can be stopped in every way.
//!
//! Alone ([`RedisServer`]), watched by sentinels ([`sentinels::Sentinels`]), or as a cluster ([`cluster::Cluster`]).

pub(crate) mod sentinels;
pub(crate) mod cluster;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::{FromRedisValue, RedisResult};
use tempfile::TempDir;

use super::clock::Clock;
use super::tls::{Authority, Party};
use super::{DEADLINE, Port, wait_until};

/// For [`RedisServer::with`]: every write is on disk before it is answered, so that a kill loses nothing.
pub(crate) const KEEPS_ITS_DATA: &str = "appendonly yes";

/// For [`RedisServer::with`]: what clients ask can be counted, see [`RedisServer::look_ups`].
pub(crate) const REMEMBERS_ALL_COMMANDS: &str = "slowlog-log-slower-than 0\nslowlog-max-len 1000000";

/// How long a question of the harness may take; a server that is stopped answers none.
const PATIENCE: Duration = Duration::from_secs(1);

/// Ends with its value.
#[derive(Debug)]
pub(crate) struct RedisServer {
    directory: TempDir,
    program: Program,
    port: Port,
    tls_port: Option<Port>,
    /// Its clock, where that is wrong.
    clock: Option<Clock>,
    child: Option<Child>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Redis,
    Sentinel,
    Valkey,
}

/// What a server shows to those who come by TLS, and what it wants to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Off,
    /// Everybody may come.
    Open,
    /// Its certificate is of yesterday.
    Expired,
    /// Only who has a certificate of the same authority.
    Mutual,
}

impl RedisServer {
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// `conf`: further lines of redis.conf.
    pub(crate) fn with(conf: &str) -> Self {
        Self::begin(Program::Redis, conf, Tls::Off)
    }

    /// `user`: a line of an ACL without its first word, such as `ann on >secret ~* +get`. See [`Self::url_as`].
    pub(crate) fn with_user(user: &str) -> Self {
        Self::with(&format!("user {user}"))
    }

    /// Speaks TLS, too, as `localhost`; its authority is [`Self::authority`].
    pub(crate) fn with_tls() -> Self {
        Self::begin(Program::Redis, "", Tls::Open)
    }

    /// As [`Self::with_tls`], for those only who show [`Self::client_certificate`].
    pub(crate) fn with_mutual_tls() -> Self {
        Self::begin(Program::Redis, "", Tls::Mutual)
    }

    /// As [`Self::with_tls`], with a certificate that nobody should trust any more.
    pub(crate) fn with_expired_tls() -> Self {
        Self::begin(Program::Redis, "", Tls::Expired)
    }

    /// The other kind of server, which `scripts/setup valkey-server` brings.
    pub(crate) fn valkey() -> Self {
        Self::begin(Program::Valkey, "", Tls::Off)
    }

    /// Its clock is so many seconds ahead of everybody else's, or behind.
    pub(crate) fn with_clock_ahead(seconds: i64) -> Self {
        let mut server = Self::prepare(Program::Redis, "", Tls::Off);
        let clock = Clock::new();
        clock.set(seconds);
        server.clock = Some(clock);
        server.begun()
    }

    /// Alone, with these lines of sentinel.conf.
    pub(crate) fn sentinel(conf: &str) -> Self {
        Self::begin(Program::Sentinel, conf, Tls::Off)
    }

    fn begin(program: Program, conf: &str, tls: Tls) -> Self {
        Self::prepare(program, conf, tls).begun()
    }

    fn prepare(program: Program, conf: &str, tls: Tls) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tls_port = (tls != Tls::Off).then(Port::reserve);
        let server = Self { directory, program, port: Port::reserve(), tls_port, clock: None, child: None };
        server.write_conf(conf, tls);
        server
    }

    fn begun(mut self) -> Self {
        assert!(self.try_start(), "a server does not start: {}", self.log());
        self
    }

    fn write_conf(&self, conf: &str, tls: Tls) {
        let directory = self.directory.path().display();
        let mut text = format!(
            "bind 127.0.0.1\nport {}\nunixsocket {directory}/redis.sock\ndir {directory}\nlogfile {directory}/log\n\
             save \"\"\ndaemonize no\nappendfsync always\n",
            self.port.number()
        );
        if let Some(port) = &self.tls_port {
            let authority = Authority::new();
            let server = if tls == Tls::Expired { Party::ExpiredServer } else { Party::Server };
            authority.write(self.directory.path());
            authority.certify(server, self.directory.path(), "server");
            authority.certify(Party::Client, self.directory.path(), "client");
            text += &format!(
                "tls-port {}\ntls-cert-file {directory}/server.pem\ntls-key-file {directory}/server.key\n\
                 tls-ca-cert-file {directory}/authority.pem\ntls-auth-clients {}\n",
                port.number(),
                if tls == Tls::Mutual { "yes" } else { "no" }
            );
        }
        text += conf;
        text += "\n";
        std::fs::write(self.path("redis.conf"), text).unwrap();
    }

    /// Whether it came up and answers.
    fn try_start(&mut self) -> bool {
        let mut command = match self.program {
            Program::Redis | Program::Sentinel => Command::new("redis-server"),
            Program::Valkey => Command::new(valkey_program()),
        };
        command.arg(self.path("redis.conf"));
        if self.program == Program::Sentinel {
            command.arg("--sentinel");
        }
        if let Some(clock) = &self.clock {
            clock.given_to(&mut command);
        }
        let mut child = command.stdout(Stdio::null()).spawn().expect("redis-server is installed: see scripts/setup");
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
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port())) else { return false };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reply = [0; 8];
        stream.write_all(b"PING\r\n").is_ok()
            && stream.read_exact(&mut reply[..7]).is_ok()
            && !reply.starts_with(b"-LOADIN")
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    pub(crate) fn url_as(&self, user: &str, password: &str) -> String {
        format!("redis://{user}:{password}@127.0.0.1:{}", self.port())
    }

    pub(crate) fn tls_url(&self) -> String {
        format!("rediss://localhost:{}", self.tls_port.as_ref().expect("started with TLS").number())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("redis.sock")
    }

    pub(crate) fn authority(&self) -> PathBuf {
        self.path("authority.pem")
    }

    /// Certificate and key with which a client passes [`Self::with_mutual_tls`].
    pub(crate) fn client_certificate(&self) -> (PathBuf, PathBuf) {
        (self.path("client.pem"), self.path("client.key"))
    }

    pub(crate) fn port(&self) -> u16 {
        self.port.number()
    }

    /// What it wrote into its log, for the message of a test that fails.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
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
        wait_until("redis-server goes on", || self.runs());
    }

    /// Neither killed nor paused.
    pub(crate) fn runs(&self) -> bool {
        self.state().is_some_and(|state| state != 'T')
    }

    /// On the same ports; with its data, if it was told to append them to a file.
    pub(crate) fn restart(&mut self) {
        self.kill();
        let started = Instant::now();
        while !self.try_start() {
            assert!(started.elapsed() < DEADLINE, "redis-server does not come back: {}", self.log());
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

    /// One command, its words parted by spaces; panics where it fails.
    #[track_caller]
    pub(crate) fn ask<T: FromRedisValue>(&self, command: &str) -> T {
        self.try_ask(command).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// As [`Self::ask`]; when this returns, so many replicas have what was written.
    #[track_caller]
    pub(crate) fn ask_with_replicas(&self, command: &str, replicas: usize) {
        let mut connection = self.client();
        let () = command_of(command).query(&mut connection).unwrap();
        let wait = format!("WAIT {replicas} {}", DEADLINE.as_millis());
        let has_it: usize = command_of(&wait).query(&mut connection).unwrap();
        assert!(replicas <= has_it, "only {has_it} replicas have it");
    }

    /// So often a session was looked up, on a server [that remembers](REMEMBERS_ALL_COMMANDS). What scripts read, for
    /// themselves or for who leads, is not counted.
    pub(crate) fn look_ups(&self) -> usize {
        self.commands().iter().filter(|words| words[0] == b"GET" && words[1].starts_with(b"cloakroom:s:")).count()
    }

    /// What clients have said, word by word, to a server [that remembers](REMEMBERS_ALL_COMMANDS).
    pub(crate) fn commands(&self) -> Vec<Vec<Vec<u8>>> {
        type Entry = (u64, u64, u64, Vec<Vec<u8>>, String, String);
        let log: Vec<Entry> = self.ask("SLOWLOG GET 1000000");
        log.into_iter().map(|(_, _, _, words, ..)| words).collect()
    }

    pub(crate) fn try_ask<T: FromRedisValue>(&self, command: &str) -> RedisResult<T> {
        let mut connection = redis::Client::open(self.url())?.get_connection_with_timeout(PATIENCE)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        command_of(command).query(&mut connection)
    }

    /// Whether it runs and says that it is a primary.
    pub(crate) fn is_primary(&self) -> bool {
        self.role() == ["master"]
    }

    /// Whether it runs and copies the primary on `port`, with nothing left to fetch.
    fn follows(&self, port: u16) -> bool {
        self.role() == ["slave", &port.to_string(), "connected"]
    }

    /// Nothing where it does not run; for a replica with the port and the state of its link to the primary.
    fn role(&self) -> Vec<String> {
        let Some(Ok(redis::Value::Array(role))) = self.runs().then(|| self.try_ask("ROLE")) else { return Vec::new() };
        let word = |at: usize| role.get(at).and_then(|value| String::from_redis_value_ref(value).ok());
        let kind = word(0);
        let further = if kind.as_deref() == Some("slave") { [word(2), word(3)] } else { [None, None] };
        kind.into_iter().chain(further.into_iter().flatten()).collect()
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

fn command_of(words: &str) -> redis::Cmd {
    let mut command = redis::Cmd::new();
    words.split(' ').for_each(|word| {
        command.arg(word);
    });
    command
}

/// A missing one fails the test: what was not run has not passed.
fn valkey_program() -> PathBuf {
    let brought = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/valkey-server");
    let of_the_system = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
        .map(|folder| folder.join("valkey-server"));
    of_the_system.chain([brought]).find(|file| file.exists()).expect(
        "there is no valkey-server: `scripts/setup valkey-server` brings it where python3 and its registry can be \
         reached; the promise about Valkey is untested without",
    )
}

/// From which the server with this number connects to others, where faults are to know it. All of 127.0.0.0/8 is this
/// machine (RFC 1122 section 3.2.1.3), so that a proxy can tell by the address who comes; tests come from 127.0.0.1.
fn address_of(number: usize) -> IpAddr {
    Ipv4Addr::new(127, 0, 1, 1 + u8::try_from(number).expect("a handful of servers")).into()
}

/// Worlds of many servers run one after another: they would take each other's time, and vote each other down.
#[derive(Debug)]
struct Turn;

static TURN_IS_TAKEN: Mutex<bool> = Mutex::new(false);
static TURN_IS_FREE: Condvar = Condvar::new();

impl Turn {
    fn take() -> Self {
        let taken = TURN_IS_TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = TURN_IS_FREE.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner);
        *taken = true;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TURN_IS_TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = false;
        TURN_IS_FREE.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use redis::{Client, ClientTlsConfig, TlsCertificates};

    use super::*;
    use crate::harness::fault::FaultProxy;

    #[test]
    fn data_survives_a_kill_when_it_is_appended_to_a_file_and_never_an_empty_restart() {
        let mut server = RedisServer::with(KEEPS_ITS_DATA);
        let () = server.ask("SET a 1");

        server.kill();
        assert!(TcpStream::connect(("127.0.0.1", server.port())).is_err(), "a killed server has no port");
        server.restart();
        assert_eq!(server.ask::<usize>("DBSIZE"), 1, "every write was on disk");

        server.restart_empty();
        assert_eq!(server.ask::<usize>("DBSIZE"), 0);
    }

    #[test]
    fn a_paused_server_takes_connections_and_answers_when_it_is_resumed() {
        let server = RedisServer::start();
        server.pause();
        assert!(!server.runs());
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

    #[test]
    fn a_user_may_what_his_line_says_and_no_more() {
        let server = RedisServer::with_user("ann on >secret ~mine:* +get +set");
        let mut ann = Client::open(server.url_as("ann", "secret")).unwrap().get_connection().unwrap();
        let mut set = |key: &str| redis::cmd("SET").arg(key).arg(1).exec(&mut ann);
        set("mine:a").unwrap();
        assert!(set("yours:a").is_err());
        assert!(Client::open(server.url_as("ann", "wrong")).unwrap().get_connection().is_err());
    }

    #[test]
    fn with_tls_a_server_shows_what_it_was_told_and_wants_to_see_what_it_was_told() {
        let ping = |server: &RedisServer, authority: &Path, certificate: Option<(PathBuf, PathBuf)>| {
            let read = |path: &Path| std::fs::read(path).unwrap();
            let client_tls =
                certificate.map(|(cert, key)| ClientTlsConfig { client_cert: read(&cert), client_key: read(&key) });
            let certificates = TlsCertificates { client_tls, root_cert: Some(read(authority)) };
            let client = Client::build_with_tls(server.tls_url(), certificates).unwrap();
            redis::cmd("PING").query::<String>(&mut client.get_connection()?)
        };
        let open = RedisServer::with_tls();
        let mutual = RedisServer::with_mutual_tls();
        assert_eq!(ping(&open, &open.authority(), None).unwrap(), "PONG");
        assert!(ping(&open, &mutual.authority(), None).is_err(), "another authority");

        assert_eq!(ping(&mutual, &mutual.authority(), Some(mutual.client_certificate())).unwrap(), "PONG");
        assert!(ping(&mutual, &mutual.authority(), None).is_err(), "nothing was shown");
        assert!(ping(&mutual, &mutual.authority(), Some(open.client_certificate())).is_err(), "of a stranger");

        let expired = RedisServer::with_expired_tls();
        let error = ping(&expired, &expired.authority(), None).unwrap_err().to_string();
        assert!(error.to_ascii_lowercase().contains("expired"), "{error}");
    }

    #[test]
    fn a_server_is_reached_through_a_proxy() {
        let server = RedisServer::start();
        let proxy = FaultProxy::to(server.port());
        let mut client = Client::open(proxy.url()).unwrap().get_connection().unwrap();
        assert_eq!(redis::cmd("PING").query::<String>(&mut client).unwrap(), "PONG");
        proxy.inject(b"-ERR a lie\r\n");
        let replies: Vec<_> = (0..3).map(|_| redis::cmd("PING").query::<String>(&mut client)).collect();
        assert!(replies.iter().any(Result::is_err), "the lie takes the place of an answer: {replies:?}");
    }

    #[test]
    fn a_clock_can_be_wrong() {
        let server = RedisServer::with_clock_ahead(-86_400);
        let (seconds, _): (u64, u64) = server.ask("TIME");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!((now - 86_400 - 60..=now - 86_400).contains(&seconds), "{seconds} at {now}");
    }

    #[test]
    fn valkey_is_a_server_of_its_own_kind() {
        let server = RedisServer::valkey();
        assert!(server.ask::<String>("INFO server").contains("valkey_version:"));
    }

    #[test]
    fn one_world_at_a_time() {
        let (told, tells) = std::sync::mpsc::channel();
        let first = Turn::take();
        let second = std::thread::spawn(move || {
            let _turn = Turn::take();
            told.send(()).unwrap();
        });
        assert!(tells.try_recv().is_err(), "the second waits");
        drop(first);
        tells.recv_timeout(DEADLINE).expect("the second has its turn");
        second.join().unwrap();
    }
}
