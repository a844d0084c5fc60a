//! How does a new binary take over without a pause? It is started with our sockets, says when it serves, and only then
//! do we drain. As long as it has not said so, it is only a child that may fail.

use std::fmt;
use std::io;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;

use super::sockets::{FIRST, PREDECESSOR};

/// From its start until it says that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

const READY: &[u8; 6] = b"ready\n";

/// A process on its way to take our place; ended with this value, unless it got there.
#[derive(Debug)]
pub struct Successor {
    child: Option<Child>,
    says: tokio::net::UnixStream,
}

/// Why a successor is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReady {
    Ended,
    TooLate,
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("it ended before it was ready; it has said why in the log"),
            Self::TooLate => write!(f, "it was not ready within {} seconds", READY_WITHIN.as_secs()),
        }
    }
}

impl std::error::Error for NotReady {}

impl Successor {
    /// Starts what now lies where this process was started from, with the same arguments and these sockets. Needs a
    /// runtime.
    ///
    /// # Errors
    /// When there is nothing that starts.
    pub fn start(sockets: Vec<TcpListener>) -> io::Result<Self> {
        let mut arguments = std::env::args_os();
        // As it was typed: a link is followed again, to where it leads by now.
        let binary = arguments.next().ok_or(io::ErrorKind::NotFound)?;
        let (says, its_end) = UnixStream::pair()?;
        says.set_nonblocking(true)?;
        let names = vec!["inherited"; sockets.len()].into_iter().chain([PREDECESSOR]).collect::<Vec<_>>().join(":");
        let handed: Vec<OwnedFd> = sockets.into_iter().map(OwnedFd::from).chain([its_end.into()]).collect();
        let count = handed.len().to_string();
        let numbered = (FIRST..).zip(handed).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd });
        let child = Command::new(binary)
            .args(arguments)
            .env("LISTEN_FDS", count)
            .env("LISTEN_FDNAMES", names)
            // Its number is known to nobody before it runs; without one, what is named is meant for who reads it.
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDS_FIRST_FD")
            .env_remove("WATCHDOG_PID")
            .fd_mappings(numbered.collect())
            .map_err(io::Error::other)?
            .spawn()?;
        Ok(Self { child: Some(child), says: tokio::net::UnixStream::from_std(says)? })
    }

    /// Its process id, when it serves.
    ///
    /// # Errors
    /// When it does not, and is ended.
    pub async fn ready(mut self) -> Result<u32, NotReady> {
        let mut word = [0; READY.len()];
        match tokio::time::timeout(READY_WITHIN, self.says.read_exact(&mut word)).await {
            Ok(Ok(_)) if word == *READY => self.child.take().map(let_go).ok_or(NotReady::Ended),
            Ok(_) => Err(NotReady::Ended),
            Err(_) => Err(NotReady::TooLate),
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let Some(child) = self.child.take() else { return };
        // In order, because it may have begun to serve.
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let _ = id.map(|id| kill_process(id, Signal::TERM));
        let_go(child);
    }
}

/// Its process id. Not waited for here, it leaves no zombie, also where it ends long before us: who was upgraded in turn is
/// gone, while one of our connections lasts.
fn let_go(mut child: Child) -> u32 {
    let id = child.id();
    // Without a thread it is a zombie until we end, which harms nobody.
    let _ = std::thread::Builder::new().name("successor".into()).spawn(move || child.wait());
    id
}

/// Tells the process that started us that it may go.
pub fn tell_ready(mut predecessor: UnixStream) {
    if let Err(error) = predecessor.write_all(READY) {
        tracing::warn!(%error, "the process before this one cannot be told that it may go");
    }
}
