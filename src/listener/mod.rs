//! Sockets and TLS: bound before anything starts, accepted under a cap, with a deadline on every handshake.
//!
//! One task per socket accepts and hands each connection to the worker that has the fewest, where it stays. Workers
//! that accept for themselves take turns badly: the one that is awake takes all, and half the machine idles.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use pingora::apps::HttpServerApp;
use pingora::protocols::{ALPN, Stream};
use pingora::server::ShutdownWatch;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

mod proxy_protocol;
pub mod tls;
mod slots;
mod stream;

use crate::metrics::Metrics;
use crate::proxy::connection::{self, HeadRules, Line, Refusals};
use crate::proxy::context::{Connection, ListenerFacts};
use crate::proxy::http2;
use crate::proxy::streams::{InFlight, Streams};
use proxy_protocol::Refused;
use slots::Slot;
pub use slots::Slots;
use stream::ClientStream;
use tls::Tls;

/// Connections that the kernel holds for us while we are busy.
const BACKLOG: i32 = 4096;

/// After an accept that failed (out of file descriptors, mostly): time for connections to end.
const PAUSE_AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(100);

/// Between two log lines of failed accepts.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// A bound socket and what its connections are.
#[derive(Debug)]
pub struct Listener {
    socket: std::net::TcpListener,
    address: SocketAddr,
    balancers: Option<Balancers>,
    tls: Option<Arc<Tls>>,
    facts: Arc<ListenerFacts>,
}

/// Who announces the clients of a listener, see `proxy_protocol.rs`; nobody else may connect to it.
type Balancers = Arc<[IpNet]>;

/// The accepting side of a worker.
#[derive(Clone, Debug)]
pub struct Desk {
    accepted: mpsc::UnboundedSender<Accepted>,
    open: Arc<AtomicUsize>,
}

/// The worker's side: what it has been handed.
#[derive(Debug)]
pub struct Queue {
    accepted: mpsc::UnboundedReceiver<Accepted>,
    open: Arc<AtomicUsize>,
}

/// A connection on its way to a worker.
#[derive(Debug)]
struct Accepted {
    socket: std::net::TcpStream,
    peer: SocketAddr,
    balancers: Option<Balancers>,
    tls: Option<Arc<Tls>>,
    facts: Arc<ListenerFacts>,
    slot: Slot,
}

/// A worker's two sides. The queue ends when the last desk is gone.
pub fn desk() -> (Desk, Queue) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let open = Arc::new(AtomicUsize::new(0));
    (Desk { accepted: sender, open: Arc::clone(&open) }, Queue { accepted: receiver, open })
}

/// A socket that listens; nothing is accepted yet.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    // A restart must not wait for the connections of the process before it.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

impl Listener {
    /// On a socket that listens, see [`bind`].
    pub fn new(socket: std::net::TcpListener, tls: Option<Arc<Tls>>, facts: ListenerFacts) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address, balancers: None, tls, facts: Arc::new(facts) })
    }

    /// Connections come from these networks alone, and each begins with a header of the PROXY protocol.
    #[must_use]
    pub fn behind(self, balancers: impl IntoIterator<Item = IpNet>) -> Self {
        Self { balancers: Some(balancers.into_iter().collect()), ..self }
    }

    /// With the port that the system chose for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same socket once more.
    pub fn socket(&self) -> io::Result<std::net::TcpListener> {
        self.socket.try_clone()
    }

    /// Accepts until the shutdown, then what the kernel had accepted for us by then. Each needs one of
    /// `slots`; who has none yet waits in the kernel.
    pub async fn run(self, desks: Vec<Desk>, slots: Arc<Slots>, shutdown: ShutdownWatch) {
        let address = self.address;
        if let Err(error) = self.accept(&desks, &slots, shutdown).await {
            tracing::error!(%address, %error, "listener stopped");
        }
    }

    async fn accept(self, desks: &[Desk], slots: &Slots, mut shutdown: ShutdownWatch) -> io::Result<()> {
        let socket = tokio::net::TcpListener::from_std(self.socket.try_clone()?)?;
        let mut told: Option<Instant> = None;
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                _ = shutdown.wait_for(|shutting_down| *shutting_down) => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let slot = tokio::select! {
                        slot = slots.take() => slot,
                        _ = shutdown.wait_for(|shutting_down| *shutting_down) => break,
                    };
                    self.hand_over(desks, stream, peer, slot);
                }
                Err(error) => {
                    // At most this often: whoever brings us here must not fill the log as well.
                    if told.is_none_or(|told| TELL_AGAIN < told.elapsed()) {
                        told = Some(Instant::now());
                        tracing::error!(address = %self.address, %error, "accept failed");
                    }
                    tokio::time::sleep(PAUSE_AFTER_FAILED_ACCEPT).await;
                }
            }
        }
        while let (Some(slot), Some(Ok((stream, peer)))) = (slots.try_take(), accept_waiting(&socket).await) {
            self.hand_over(desks, stream, peer, slot);
        }
        Ok(())
    }

    fn hand_over(&self, desks: &[Desk], stream: TcpStream, peer: SocketAddr, slot: Slot) {
        let idlest = desks.iter().min_by_key(|desk| desk.open.load(Ordering::Relaxed));
        let (Some(desk), Ok(socket)) = (idlest, stream.into_std()) else { return };
        let (balancers, tls, facts) = (self.balancers.clone(), self.tls.clone(), Arc::clone(&self.facts));
        desk.open.fetch_add(1, Ordering::Relaxed);
        // A worker that is gone has no use for it.
        let _ = desk.accepted.send(Accepted { socket, peer, balancers, tls, facts, slot });
    }
}

/// A connection that is already there; does not wait for one.
async fn accept_waiting(socket: &tokio::net::TcpListener) -> Option<io::Result<(TcpStream, SocketAddr)>> {
    std::future::poll_fn(|task| match socket.poll_accept(task) {
        std::task::Poll::Ready(accepted) => std::task::Poll::Ready(Some(accepted)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

/// What the connections of one worker need.
pub struct Worker<A> {
    pub app: Arc<A>,
    pub refusals: Arc<dyn Refusals>,
    pub head_rules: Arc<HeadRules>,
    /// Longest pause while a client takes what we write.
    pub write_timeout: Duration,
    pub metrics: Metrics,
    pub streams: Arc<Streams>,
    pub shutdown: ShutdownWatch,
}

impl<A> std::fmt::Debug for Worker<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<A> Worker<A>
where
    A: HttpServerApp + Send + Sync + 'static,
{
    /// Serves what comes through the queue; returns when the queue has ended and the last connection with it.
    pub async fn run(self, mut queue: Queue) {
        let worker = Arc::new(self);
        let (alive, mut all_gone) = mpsc::channel::<()>(1);
        while let Some(accepted) = queue.accepted.recv().await {
            let (worker, open, alive) = (Arc::clone(&worker), Arc::clone(&queue.open), alive.clone());
            tokio::spawn(async move {
                let count = ConnectionCount::of(&worker.metrics, open);
                worker.serve(accepted).await;
                drop((count, alive));
            });
        }
        drop(alive);
        let _ = all_gone.recv().await;
    }

    async fn serve(&self, accepted: Accepted) {
        let Accepted { socket, peer, balancers, tls, facts, slot } = accepted;
        let mut socket = match TcpStream::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::error!(%peer, %error, "connection not taken over");
                return;
            }
        };
        let peer = match balancers {
            None => peer,
            Some(balancers) => match self.announced(&mut socket, peer, &balancers).await {
                Ok(client) => client,
                Err(reason) => {
                    self.metrics.proxy_protocol_refused.with_label_values(&[reason.label()]).inc();
                    tracing::debug!(%peer, %reason, "connection refused by the PROXY protocol");
                    return;
                }
            },
        };
        let in_flight = Arc::<InFlight>::default();
        let Some(stream) = self.open(socket, peer, tls.as_ref(), &in_flight, &slot).await else { return };
        let certificate = stream.get_ssl().and_then(|tls| tls.peer_certificate_der());
        let connection = Arc::new(Connection::new(peer.ip().to_canonical(), facts).with_certificate(certificate));
        let (head_rules, app) = (Arc::clone(&self.head_rules), Arc::clone(&self.app));
        let is_http2 = matches!(stream.selected_alpn_proto(), Some(ALPN::H2));
        let line = Line { stream, connection, in_flight };
        let (refusals, streams) = (Arc::clone(&self.refusals), Arc::clone(&self.streams));
        let shutdown = self.shutdown.clone();
        if is_http2 {
            http2::serve(line, head_rules, app, refusals, streams, slot.free(), shutdown).await;
        } else {
            connection::serve(line, head_rules, app, refusals, streams, shutdown).await;
        }
        drop(slot);
    }

    /// The client that a balancer announces.
    async fn announced(
        &self,
        socket: &mut TcpStream,
        peer: SocketAddr,
        balancers: &[IpNet],
    ) -> Result<SocketAddr, Refused> {
        let address = peer.ip().to_canonical();
        if !balancers.iter().any(|network| network.contains(&address)) {
            return Err(Refused::Stranger);
        }
        let client = proxy_protocol::read(socket, self.head_rules.timeout).await?;
        Ok(client.unwrap_or(peer))
    }

    async fn open(
        &self,
        socket: TcpStream,
        peer: SocketAddr,
        tls: Option<&Arc<Tls>>,
        in_flight: &Arc<InFlight>,
        slot: &Slot,
    ) -> Option<Stream> {
        let stream = ClientStream::new(socket, peer, self.write_timeout, Arc::clone(in_flight)).giving_way(slot);
        let Some(tls) = tls else { return Some(Box::new(stream)) };
        match tokio::time::timeout(self.head_rules.timeout, tls.handshake(stream)).await {
            Ok(Ok(stream)) => Some(Box::new(stream)),
            Ok(Err(error)) => {
                tracing::debug!(%peer, %error, "TLS handshake failed");
                None
            }
            Err(_) => {
                tracing::debug!(%peer, "TLS handshake took too long");
                None
            }
        }
    }
}

/// Counts a connection for as long as it lives, also when its task panics.
struct ConnectionCount {
    gauge: prometheus::IntGauge,
    open: Arc<AtomicUsize>,
}

impl ConnectionCount {
    fn of(metrics: &Metrics, open: Arc<AtomicUsize>) -> Self {
        metrics.connections.inc();
        Self { gauge: metrics.connections.clone(), open }
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.gauge.dec();
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}
