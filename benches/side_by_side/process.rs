//! Who runs beside this process? The proxies, started from this very program, and a Redis; all end with it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest start: ten thousand sessions are made before a gateway is ready.
const START_MAX: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// In /proc/PID/stat, time is counted in these (`USER_HZ`, the same on every Linux of today).
const TICKS_PER_SECOND: f64 = 100.0;

/// A proxy in a process of its own, or several.
pub(crate) struct Proxy {
    child: Child,
    address: SocketAddr,
    cookies: Arc<[String]>,
    _folder: TempDir,
}

impl Proxy {
    /// Starts this program again in the role that `arguments` name.
    pub(crate) fn start(arguments: &[&str], backends: &[SocketAddr]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(arguments);
        Self::start_own(command, backends)
    }

    /// As [`Self::gateway`], of another build of this program.
    pub(crate) fn gateway_of(program: &Path, store: &str, sessions: usize, backends: &[SocketAddr]) -> Self {
        let mut command = Command::new(program);
        command.args(["gateway", store, &sessions.to_string()]);
        Self::start_own(command, backends)
    }

    /// Starts Cloakroom on a store (see `gateway`).
    pub(crate) fn gateway(store: &str, sessions: usize, backends: &[SocketAddr]) -> Self {
        Self::start(&["gateway", store, &sessions.to_string()], backends)
    }

    /// Starts `pingora_defaults`, which `cargo bench --no-run` has built beside this program. Nothing when it has not.
    pub(crate) fn start_defaults(backends: &[SocketAddr]) -> Option<Self> {
        let this = std::env::current_exe().unwrap();
        let beside = std::fs::read_dir(this.parent().unwrap()).unwrap().map(|entry| entry.unwrap());
        let is_program = |name: &str| name.starts_with("pingora_defaults-") && !name.contains('.');
        let programs = beside.filter(|entry| entry.file_name().to_str().is_some_and(is_program));
        let newest = programs.max_by_key(|entry| entry.metadata().unwrap().modified().unwrap())?;
        Some(Self::start_own(Command::new(newest.path()), backends))
    }

    fn start_own(mut command: Command, backends: &[SocketAddr]) -> Self {
        let folder = TempDir::new().unwrap();
        let ready = folder.path().join("ready");
        command.arg(&ready).args(backends.iter().map(ToString::to_string));
        // Its standard input stays open as long as this process lives; its access log costs what it costs.
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        wait_until(&mut child, || ready.exists());
        let text = std::fs::read_to_string(&ready).unwrap();
        let mut lines = text.lines();
        let address: SocketAddr = lines.next().unwrap().parse().unwrap();
        let cookies = lines.map(ToOwned::to_owned).collect();
        wait_until(&mut child, || TcpStream::connect(address).is_ok());
        Self { child, address, cookies, _folder: folder }
    }

    /// A program of others, that will listen on `address`. Nothing when it is not installed.
    pub(crate) fn start_foreign(mut command: Command, address: SocketAddr, folder: TempDir) -> Option<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().ok()?;
        wait_until(&mut child, || TcpStream::connect(address).is_ok());
        Some(Self { child, address, cookies: Arc::default(), _folder: folder })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Of the sessions that it knows.
    pub(crate) fn cookies(&self) -> &Arc<[String]> {
        &self.cookies
    }

    /// User and system time so far, of the process and its children.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.family().map(cpu_seconds).sum()
    }

    /// Resident memory of the process and its children; what they share is counted for each.
    pub(crate) fn resident_mib(&self) -> f64 {
        let kib = |process: u32| -> Option<f64> {
            let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.trim().trim_end_matches(" kB").parse().ok()
        };
        self.family().filter_map(kib).sum::<f64>() / 1024.0
    }

    fn family(&self) -> impl Iterator<Item = u32> {
        let parent = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        let children: Vec<u32> = children.split_whitespace().map(|child| child.parse().unwrap()).collect();
        std::iter::once(parent).chain(children)
    }
}

/// User and system time of one process so far (proc_pid_stat(5), fields 14 and 15).
fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The second field is the program's name and may hold spaces; it ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..=12].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    ticks as f64 / TICKS_PER_SECOND
}

impl Drop for Proxy {
    /// nginx ends its workers when it is asked to end, and leaves them when it is killed.
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

/// A Redis that keeps nothing on disk; one server, or the primaries of a Cluster.
pub(crate) struct Redis {
    servers: Vec<Server>,
}

struct Server {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self { servers: vec![Server::start(&[])] }
    }

    /// A Cluster without replicas.
    pub(crate) fn cluster(primaries: u16) -> Self {
        let servers: Vec<_> = (0..primaries).map(|_| Server::start(&["--cluster-enabled", "yes"])).collect();
        let slots = |index: u16| u32::from(index) * 16_384 / u32::from(primaries);
        for (server, index) in servers.iter().zip(0..) {
            server.ask(&format!("CLUSTER ADDSLOTSRANGE {} {}", slots(index), slots(index + 1) - 1));
            server.ask(&format!("CLUSTER SET-CONFIG-EPOCH {}", index + 1));
            server.ask(&format!("CLUSTER MEET 127.0.0.1 {}", servers[0].port));
        }
        let known = format!("cluster_known_nodes:{primaries}\r");
        for server in &servers {
            let started = Instant::now();
            loop {
                let state = server.ask("CLUSTER INFO");
                if state.contains("cluster_state:ok") && state.contains(&known) {
                    break;
                }
                assert!(started.elapsed() < START_MAX, "no cluster after {START_MAX:?}: {state}");
                std::thread::park_timeout(LOOK_AGAIN);
            }
        }
        Self { servers }
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.servers.len() == 1 { "redis" } else { "redis+cluster" };
        format!("{scheme}://127.0.0.1:{}", self.port())
    }

    pub(crate) fn port(&self) -> u16 {
        self.servers[0].port
    }

    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.servers.iter().map(|server| cpu_seconds(server.child.id())).sum()
    }

    /// Commands that were asked so far, those of this question not counted.
    pub(crate) fn commands(&self) -> u64 {
        self.servers.iter().map(Server::commands).sum()
    }
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let port = free_port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.args(arguments).arg("--dir").arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.spawn().expect("redis-server is installed: see scripts/setup");
        wait_until(&mut child, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { child, port, _folder: folder }
    }

    fn commands(&self) -> u64 {
        let text = self.ask("INFO commandstats");
        let calls = text.lines().filter(|line| !line.starts_with("cmdstat_info") && !line.starts_with("cmdstat_quit"));
        calls.filter_map(|line| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok()).sum()
    }

    fn ask(&self, command: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(format!("{command}\r\nQUIT\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// A Cluster node listens on its port plus 10,000, too.
fn free_port() -> u16 {
    loop {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if port < u16::MAX - 10_000 {
            return port;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tells the first process where this one listens, and which cookies it knows.
pub(crate) fn announce(ready: &Path, address: SocketAddr, cookies: &[String]) {
    let unfinished = ready.with_extension("unfinished");
    std::fs::write(&unfinished, format!("{address}\n{}\n", cookies.join("\n")).trim_end()).unwrap();
    std::fs::rename(unfinished, ready).unwrap();
}

/// Returns when the first process is gone, however it went.
pub(crate) fn wait_for_end_of_parent() {
    let _ = std::io::stdin().read(&mut [0]);
}

/// Ends this process when the first one is gone.
pub(crate) fn end_with_parent() {
    std::thread::spawn(|| {
        wait_for_end_of_parent();
        std::process::exit(0);
    });
}

fn wait_until(child: &mut Child, mut fact: impl FnMut() -> bool) {
    let started = Instant::now();
    while !fact() {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("a process ended before it was ready: {status}");
        }
        assert!(started.elapsed() < START_MAX, "a process is not ready after {START_MAX:?}");
        std::thread::park_timeout(LOOK_AGAIN);
    }
}
