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
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, timeout};

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
    accepted: SystemTime,
    digest: Arc<SocketDigest>,
    in_flight: Arc<InFlight>,
}

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
            accepted: SystemTime::now(),
            digest: Arc::new(digest),
            in_flight,
        }
    }

    /// What a write gave, or an error when writes have given nothing for too long.
    fn within_time<T>(&mut self, task: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
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
}

impl AsyncRead for ClientStream {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.in_flight.may_read())?;
        Pin::new(self.socket.get_mut()).poll_read(task, buffer)
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

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut_down = Pin::new(&mut self.socket).poll_shutdown(task);
        self.within_time(task, shut_down)
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
    /// Says that we are done, then reads on for a moment: closing on unread bytes resets the connection, and the
    /// reset can overtake our answer (RFC 9112, section 9.6).
    async fn shutdown(&mut self) {
        let farewell = async {
            AsyncWriteExt::shutdown(&mut self.socket).await?;
            let mut rest = [0; 4096];
            while 0 < self.socket.get_mut().read(&mut rest).await? {}
            io::Result::Ok(())
        };
        // The client may be gone or stuck: either way we are done.
        let _ = timeout(LINGER, farewell).await;
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
