//! Who runs beside this process? The proxies, started from this very program, and a Redis; all end with it.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest start: ten thousand sessions are made before a gateway is ready.
const START_MAX: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// In /proc/PID/stat, time is counted in these (`USER_HZ`, the same on every Linux of today).
const TICKS_PER_SECOND: f64 = 100.0;

/// A proxy in a process of its own.
pub(crate) struct Proxy {
    child: Child,
    address: SocketAddr,
    cookies: Vec<String>,
}

impl Proxy {
    /// Starts this program again in the role that `arguments` name.
    pub(crate) fn start(arguments: &[&str], backends: &[SocketAddr]) -> Self {
        let folder = TempDir::new().unwrap();
        let ready = folder.path().join("ready");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(arguments).arg(&ready).args(backends.iter().map(ToString::to_string));
        // Its standard input stays open as long as this process lives; its access log costs what it costs.
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        wait_until(&mut child, || ready.exists());
        let text = std::fs::read_to_string(&ready).unwrap();
        let mut lines = text.lines();
        let address: SocketAddr = lines.next().unwrap().parse().unwrap();
        let cookies = lines.map(ToOwned::to_owned).collect();
        wait_until(&mut child, || TcpStream::connect(address).is_ok());
        Self { child, address, cookies }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Of the sessions that it knows.
    pub(crate) fn cookies(&self) -> &[String] {
        &self.cookies
    }

    /// User and system time of the whole process so far (proc_pid_stat(5), fields 14 and 15).
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The second field is the program's name and may hold spaces; it ends with the last parenthesis.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11..=12].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        ticks as f64 / TICKS_PER_SECOND
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A Redis that keeps nothing on disk.
pub(crate) struct Redis {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Redis {
    pub(crate) fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.spawn().expect("redis-server is installed: see scripts/setup");
        wait_until(&mut child, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { child, port, _folder: folder }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        end(&mut self.child);
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

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
