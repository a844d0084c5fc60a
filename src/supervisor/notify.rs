//! What is systemd told of us? States, one datagram each, as `sd_notify(3)` says; to nobody where nobody asked.

use std::ffi::OsString;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The supervisor's ear.
#[derive(Debug)]
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// Where `NOTIFY_SOCKET` says. What is told is lost when that is no address that we can reach.
    pub fn from_env() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let socket = UnixDatagram::unbound().ok()?;
            // A supervisor that does not listen must hold up nobody.
            socket.set_nonblocking(true).ok()?;
            Some((socket, address(&name)?))
        });
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let is_ours = number("WATCHDOG_PID").is_none_or(|id| id == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| is_ours && 0 < *micros).map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// How often [`Self::alive`] has to be said, with room to be late: half of what `WATCHDOG_USEC` allows.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|allowed| allowed / 2)
    }

    pub fn ready(&self) {
        self.say("READY=1\nSTATUS=Serving");
    }

    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={micros}\nSTATUS=Reading the configuration again"));
    }

    /// A reload that was refused: the old configuration serves.
    pub fn not_reloaded(&self) {
        self.say("READY=1\nSTATUS=Serving; the last reload was refused, see the log");
    }

    pub fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=Answering what has begun");
    }

    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// The service is another process from now on.
    pub fn succeeded_by(&self, process: u32) {
        self.say(&format!("MAINPID={process}\nSTATUS=Serving, by a successor"));
    }

    fn say(&self, state: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(state.as_bytes(), address)
        {
            tracing::warn!(%error, "the supervisor behind NOTIFY_SOCKET cannot be told");
        }
    }
}

/// A path, or with `@` an abstract name.
fn address(name: &OsString) -> Option<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
        [b'/', ..] => SocketAddr::from_pathname(name).ok(),
        _ => None,
    }
}
