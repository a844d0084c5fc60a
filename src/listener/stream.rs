//! A client's socket, as pingora wants to see one.
//!
//! Pingora's own stream is written without a buffer unless pingora's own service made it, costs a clock reading for
//! every read and write, has no time limit on much of what it writes, and closes on bytes that it has not read, which
//! resets the connection and can destroy the answer on its way. This one gathers the head and the body of a small
//! response into one system call, gives up on a client that takes nothing, and closes in order.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::slots::{Slot, Turn};
use crate::proxy::reply::LINGER;
use crate::proxy::streams::InFlight;

/// Enough for the head and the body of most small responses; larger writes go past the buffer.
const WRITE_BUFFER_BYTES: usize = 4096;

/// An accepted connection. Writes wait for a flush, which pingora does whenever it has nothing more at hand.
#[derive(Debug)]
pub(super) struct ClientStream {
    socket: BufWriter<TcpStream>,
    write_timeout: Duration,
    /// Runs while the client takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// From the end of what we say on.
    farewell: Option<Farewell>,
    accepted: SystemTime,
    digest: Arc<SocketDigest>,
    in_flight: Arc<InFlight>,
    turn: Option<Arc<Turn>>,
}

/// Why a closing connection is still here.
#[derive(Debug)]
struct Farewell {
    pause: Pin<Box<Sleep>>,
    end: Instant,
}

/// What the kernel calls a connection of which the client has not acknowledged all that we said (`net/tcp_states.h`).
const TCP_FIN_WAIT1: u8 = 4;

impl ClientStream {
    /// `in_flight`: the request that the connection is busy with, where it has one at a time. When that is cut, reads and
    /// writes that have to wait fail.
    pub(super) fn new(
        socket: TcpStream,
        peer: std::net::SocketAddr,
        write_timeout: Duration,
        in_flight: Arc<InFlight>,
    ) -> Self {
        // Our own buffer gathers what belongs together; the kernel must not hold it back for an acknowledgement.
        let _ = socket.set_nodelay(true);
        let digest = SocketDigest::from_raw_fd(socket.as_raw_fd());
        let _ = digest.peer_addr.set(Some(peer.into()));
        Self {
            socket: BufWriter::with_capacity(WRITE_BUFFER_BYTES, socket),
            write_timeout,
            stalled: None,
            farewell: None,
            accepted: SystemTime::now(),
            digest: Arc::new(digest),
            in_flight,
            turn: None,
        }
    }

    /// Where the connections of its listener do.
    pub(super) fn giving_way(self, slot: &Slot) -> Self {
        Self { turn: slot.turn.clone(), ..self }
    }

    /// What a read or a write gave; every one that may have to wait for the client is told here.
    fn noted<T>(&self, task: &Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &self.turn {
            Some(turn) => turn.noted(task, result),
            None => result,
        }
    }

    /// What a write gave, or an error when writes have given nothing for too long.
    fn within_time<T>(&mut self, task: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let written = self.noted(task, written);
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        if self.in_flight.is_cut() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stalled.as_mut().poll(task));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Reads on, and forgets what it reads, until the client closes: for a moment, and for further ones while it has not
    /// got everything yet, but for no longer than it may take nothing of a response.
    fn part(&mut self, task: &mut Context<'_>) -> Poll<()> {
        let mut rest = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut rest);
            match Pin::new(self.socket.get_mut()).poll_read(task, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        let end = Instant::now() + self.write_timeout;
        let farewell = self.farewell.get_or_insert_with(|| Farewell { pause: Box::pin(sleep(LINGER)), end });
        loop {
            ready!(farewell.pause.as_mut().poll(task));
            let is_owed = self.digest.tcp_info().is_some_and(|tcp| tcp.tcpi_state == TCP_FIN_WAIT1);
            if !is_owed || farewell.end <= Instant::now() {
                return Poll::Ready(());
            }
            farewell.pause.as_mut().reset(Instant::now() + LINGER);
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.in_flight.may_read())?;
        let read = Pin::new(self.socket.get_mut()).poll_read(task, buffer);
        self.noted(task, read)
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(task, bytes);
        self.within_time(task, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.socket).poll_flush(task);
        self.within_time(task, flushed)
    }

    /// Says that we are done, then reads on: closing on unread bytes resets the connection, and the reset can overtake our
    /// answer (RFC 9112, section 9.6). In HTTP/2, clients speak for as long as they read.
    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.farewell.is_none() {
            let shut_down = Pin::new(&mut self.socket).poll_shutdown(task);
            ready!(self.within_time(task, shut_down))?;
        }
        let parted = self.part(task).map(Ok);
        self.noted(task, parted)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(task, slices);
        self.within_time(task, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        // The client may be gone or stuck: either way we are done.
        let _ = timeout(LINGER, AsyncWriteExt::shutdown(self)).await;
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.socket.get_ref().as_raw_fd()
    }
}

impl GetTimingDigest for ClientStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        vec![Some(TimingDigest { established_ts: self.accepted, ..TimingDigest::default() })]
    }

    fn get_read_pending_time(&self) -> Duration {
        Duration::ZERO
    }

    fn get_write_pending_time(&self) -> Duration {
        Duration::ZERO
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(Arc::clone(&self.digest))
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl Ssl for ClientStream {}

impl Peek for ClientStream {}
