//! What is there, and what breaks? Real processes on loopback, killed by SIGKILL and started again on their ports.

use std::fmt;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cloakroom::session::id::SessionId;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{Found, SessionStore, StoreOptions};
use rand::RngExt;
use rand::rngs::StdRng;
use tempfile::TempDir;

use crate::harness::client::Client;
use crate::harness::gateway::PASSWORD;
use crate::harness::redis::RedisServer;
use crate::harness::{Port, wait_until};
use crate::tally::Tally;
use crate::{VISITORS, pause};

const CLOAKROOM: &str = env!("CARGO_BIN_EXE_cloakroom");

/// As most servers run: what was written in the last second may be lost.
const PERSISTENT: &str = "appendonly yes\nappendfsync everysec";

/// What Redis may lose when it is killed: a second, and two more while a sync is under way (redis.conf, `appendfsync`).
pub(crate) const LOSS_MAX: Duration = Duration::from_secs(3);

/// The gateway that nobody kills: memory and descriptors are judged by it. The other one is killed now and then.
const STEADY: usize = 0;
const DOOMED: usize = 1;

/// signal(7)
const SIGKILL: i32 = 9;

pub(crate) struct World {
    gateways: Vec<Process>,
    backends: Vec<Process>,
    redis: RedisServer,
    redis_kills: Arc<Mutex<Vec<Instant>>>,
    admins: Vec<SocketAddr>,
    ports: Vec<Port>,
    folder: TempDir,
}

/// What visitors know of the world.
pub(crate) struct Visits {
    pub(crate) gateways: Vec<SocketAddr>,
    redis_kills: Arc<Mutex<Vec<Instant>>>,
    desk: Mutex<(tokio::runtime::Runtime, RedisStore)>,
}

/// What a gateway holds.
#[derive(Clone, Copy)]
pub(crate) struct Footprint {
    pub(crate) memory_bytes: u64,
    pub(crate) files: usize,
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB, {} descriptors", self.memory_bytes >> 20, self.files)
    }
}

impl World {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ports: Vec<_> = (0..7).map(|_| Port::reserve()).collect();
        let [listeners, admins, backends] = [0..2, 2..4, 4..7].map(|some| {
            ports[some].iter().map(|port| SocketAddr::from(([127, 0, 0, 1], port.number()))).collect::<Vec<_>>()
        });
        let redis = RedisServer::with(PERSISTENT);
        let hash = hash_of_password();
        let users: String = (0..VISITORS).map(|n| format!("[visitor-{n}]\npassword = \"{hash}\"\n")).collect();
        std::fs::write(folder.path().join("users.toml"), users).unwrap();
        let me = std::env::current_exe().unwrap();
        let backend = |address: &SocketAddr| {
            let arguments = vec!["--backend".to_owned(), address.port().to_string()];
            let name = format!("backend-{}", address.port());
            Process::start(&me, arguments, folder.path().join(&name), name, *address)
        };
        let gateway = |number: usize| {
            let name = format!("gateway-{number}");
            let file = folder.path().join(&name).with_extension("toml");
            let text = config(listeners[number], admins[number], &backends, &redis.url());
            std::fs::write(&file, text).unwrap();
            let arguments = ["run", "--config", file.to_str().unwrap()].map(str::to_owned).to_vec();
            Process::start(Path::new(CLOAKROOM), arguments, file.with_extension("log"), name, listeners[number])
        };
        Self {
            backends: backends.iter().map(backend).collect(),
            gateways: (0..2).map(gateway).collect(),
            redis,
            redis_kills: Arc::default(),
            admins,
            ports,
            folder,
        }
    }

    pub(crate) fn visits(&self) -> Visits {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let keys = format!("url = \"{}\"\nconnect_timeout = \"10s\"\nresponse_timeout = \"10s\"", self.redis.url());
        let store = RedisStore::new(&toml::from_str(&keys).unwrap(), StoreOptions::default()).unwrap();
        Visits {
            gateways: self.gateways.iter().map(|gateway| gateway.address).collect(),
            redis_kills: Arc::clone(&self.redis_kills),
            desk: Mutex::new((runtime, store)),
        }
    }

    /// Kills one of all, and starts it again after a while, `time` at most.
    pub(crate) fn break_something(&mut self, dice: &mut StdRng, tally: &Tally, time: Duration) {
        let away = Duration::from_millis(dice.random_range(100..2_500)).min(time);
        match dice.random_range(0..4) {
            0 | 1 => {
                let number = dice.random_range(0..self.backends.len());
                tally.broke("a backend");
                self.backends[number].kill(tally);
                pause(away);
                self.backends[number].start_again();
            }
            2 => {
                tally.broke("a gateway");
                self.gateways[DOOMED].kill(tally);
                pause(away);
                self.gateways[DOOMED].start_again();
            }
            _ => {
                tally.broke("Redis");
                self.redis_kills.lock().unwrap().push(Instant::now());
                self.redis.kill();
                pause(away);
                self.redis.restart();
            }
        }
    }

    /// Everything is up, and the gateways know it.
    pub(crate) fn mend(&mut self, tally: &Tally) {
        for process in self.gateways.iter_mut().chain(&mut self.backends) {
            if process.has_ended_by_itself(tally) {
                process.start_again();
            }
        }
        for admin in &self.admins {
            // Ready is also who has seen the store once, and does not see it now.
            wait_until("the gateways are ready, and see the store", || {
                let answer = Client::of(*admin).get("/health/ready").try_send();
                answer.is_ok_and(|response| response.status == 200 && response.text().contains("\"store\":\"up\""))
            });
        }
    }

    pub(crate) fn footprints(&self) -> Vec<Footprint> {
        self.gateways.iter().map(Process::footprint).collect()
    }

    /// When nobody is there any more, and what was kept for a while is closed.
    pub(crate) fn settled_footprints(&self, early: &[Footprint]) -> Vec<Footprint> {
        let since = Instant::now();
        wait_until("descriptors are given back, or it is clear that they are not", || {
            let few = self.footprints().iter().zip(early).all(|(late, early)| late.files <= early.files);
            few || Duration::from_secs(10) < since.elapsed()
        });
        self.footprints()
    }

    pub(crate) fn was_restarted(&self, number: usize) -> bool {
        number != STEADY
    }

    /// Lines of what the gateways said on standard error.
    pub(crate) fn logs(&self) -> Vec<String> {
        let texts = self.gateways.iter().map(|gateway| std::fs::read_to_string(&gateway.log).unwrap_or_default());
        texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    /// Of processes that nobody killed, since all was mended.
    pub(crate) fn look_for_ends(&mut self, tally: &Tally) {
        for process in self.gateways.iter_mut().chain(&mut self.backends) {
            process.has_ended_by_itself(tally);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Before the ports are given back.
        self.gateways.clear();
        self.backends.clear();
        self.ports.clear();
        let _ = &self.folder;
    }
}

impl Visits {
    /// Whether Redis may have forgotten what was written at this time.
    pub(crate) fn may_be_forgotten(&self, written: Instant) -> bool {
        // It is killed a moment after it is noted.
        let is_near = |kill: &Instant| written < *kill + LOSS_MAX && *kill < written + LOSS_MAX;
        self.redis_kills.lock().unwrap().iter().any(is_near)
    }

    /// Whether Redis has the session of this cookie, as soon as it says.
    pub(crate) fn redis_has(&self, cookie: &str) -> bool {
        let key = SessionId::parse(cookie).expect("it was given by a gateway").key();
        let desk = self.desk.lock().unwrap();
        let mut found = None;
        wait_until("Redis is back, and says what it has", || {
            found = desk.0.block_on(desk.1.load(&key)).ok();
            found.is_some()
        });
        matches!(found, Some(Found::Live(_)))
    }
}

fn hash_of_password() -> String {
    let mut child = Command::new(CLOAKROOM);
    let mut child = child.arg("hash-password").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), PASSWORD.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap().trim_end().to_owned()
}

fn config(listener: SocketAddr, admin: SocketAddr, backends: &[SocketAddr], redis: &str) -> String {
    let backends: Vec<_> = backends.iter().map(SocketAddr::to_string).collect();
    format!(
        "[[listener]]\naddress = \"{listener}\"\n[admin]\naddress = \"{admin}\"\n\
         [log]\naccess = false\nlevel = \"warn\"\n\
         [store.redis]\nurl = \"{redis}\"\nresponse_timeout = \"2s\"\n\
         [login.password]\nusers_file = \"users.toml\"\n\
         [pool.app]\nbackends = {backends:?}\nidle_timeout = \"2s\"\n\
         [[route]]\npath = \"/\"\npool = \"app\"\naccess = \"public\"\n\
         [[route]]\npath = \"/private\"\npool = \"app\"\n"
    )
}

/// One that can be killed and started again; what it says on standard error is in `log`.
struct Process {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    name: String,
    address: SocketAddr,
    child: Child,
    /// Its end is the end of a backend.
    _stdin: Option<ChildStdin>,
}

impl Process {
    fn start(program: &Path, arguments: Vec<String>, log: PathBuf, name: String, address: SocketAddr) -> Self {
        let mut child = spawn(program, &arguments, &log);
        let stdin = child.stdin.take();
        let process = Self { program: program.to_owned(), arguments, log, name, address, child, _stdin: stdin };
        process.wait_for_port();
        process
    }

    /// One that is no more there to be killed, or dies of something else in that moment, is not ours to explain.
    fn kill(&mut self, tally: &Tally) {
        if self.has_ended_by_itself(tally) {
            return;
        }
        self.child.kill().unwrap();
        let end = self.child.wait().unwrap();
        if end.signal() != Some(SIGKILL) {
            self.report(end, tally);
        }
    }

    fn start_again(&mut self) {
        self.child = spawn(&self.program, &self.arguments, &self.log);
        self._stdin = self.child.stdin.take();
        self.wait_for_port();
    }

    fn wait_for_port(&self) {
        wait_until("it listens", || std::net::TcpStream::connect(self.address).is_ok());
    }

    /// Without having been killed by us: then that is wrong.
    fn has_ended_by_itself(&mut self, tally: &Tally) -> bool {
        let end = self.child.try_wait().unwrap();
        end.is_some_and(|end| {
            self.report(end, tally);
            true
        })
    }

    fn report(&self, end: ExitStatus, tally: &Tally) {
        tally.wrong(&format!("{} has ended by itself: {end}", self.name));
    }

    fn footprint(&self) -> Footprint {
        let of = |name: &str| format!("/proc/{}/{name}", self.child.id());
        let status = std::fs::read_to_string(of("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        let files = std::fs::read_dir(of("fd")).map_or(0, Iterator::count);
        Footprint { memory_bytes: kilobytes << 10, files }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, arguments: &[String], log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}
