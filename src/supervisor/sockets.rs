//! Which sockets were bound for us before we started? By systemd, or by the process that we succeed (`sd_listen_fds(3)`).

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use listenfd::ListenFd;
use socket2::SockRef;

/// The first descriptor that is handed over.
pub(super) const FIRST: i32 = 3;

/// In `LISTEN_FDNAMES`, the connection on which a predecessor waits.
pub(super) const PREDECESSOR: &str = "cloakroom-predecessor";

/// What this process was started with.
#[derive(Debug, Default)]
pub struct Inherited {
    /// They listen already.
    pub sockets: Vec<TcpListener>,
    /// The process that goes when we are ready, see [`super::successor::tell_ready`].
    pub predecessor: Option<UnixStream>,
}

/// Something was handed over that is no TCP socket that listens.
#[derive(Debug)]
pub struct Unusable {
    name: String,
    descriptor: usize,
    cause: io::Error,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, descriptor, .. } = self;
        write!(
            f,
            "the inherited descriptor {descriptor} ({name}) is no TCP socket that listens: use ListenStream= with an address, and Accept=no"
        )
    }
}

impl std::error::Error for Unusable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

impl Inherited {
    /// Takes what `LISTEN_FDS` names, where that is meant for this process, and the variable itself: call it before there
    /// is a second thread.
    ///
    /// # Errors
    /// When one of the descriptors is anything else than a TCP socket that listens.
    pub fn take() -> Result<Self, Unusable> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut descriptors = ListenFd::from_env();
        let mut inherited = Self::default();
        for index in 0..descriptors.len() {
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown");
            let taken = if name == PREDECESSOR {
                take_connection(&mut descriptors, index).map(|connection| inherited.predecessor = connection)
            } else {
                take_listening(&mut descriptors, index).map(|socket| inherited.sockets.extend(socket))
            };
            let descriptor = index + FIRST as usize;
            taken.map_err(|cause| Unusable { name: name.to_owned(), descriptor, cause })?;
        }
        Ok(inherited)
    }
}

fn take_listening(descriptors: &mut ListenFd, index: usize) -> io::Result<Option<TcpListener>> {
    let socket = descriptors.take_tcp_listener(index)?;
    match &socket {
        Some(socket) if !SockRef::from(socket).is_listener()? => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen"))
        }
        Some(_) | None => Ok(socket),
    }
}

fn take_connection(descriptors: &mut ListenFd, index: usize) -> io::Result<Option<UnixStream>> {
    // A stream of the right family, which is what is looked at; that it listens is only the type's word.
    let socket = descriptors.take_unix_listener(index)?;
    Ok(socket.map(|socket| UnixStream::from(OwnedFd::from(socket))))
}
