//! Sockets and TLS: bound before anything starts, accepted under a cap, with a deadline on every handshake.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::HttpServerApp;
use pingora::listeners::tls::Acceptor;
use pingora::protocols::Stream;
use pingora::server::ShutdownWatch;
use tokio::sync::{Semaphore, mpsc};

pub mod certificate;
mod stream;

use crate::metrics::Metrics;
use crate::proxy::connection::{self, HeadRules, Refusals};
use crate::proxy::context::{Connection, ListenerFacts};
use certificate::Certificate;
use stream::ClientStream;

/// Connections that the kernel holds for us while we are busy.
const BACKLOG: i32 = 4096;

/// After an accept that failed (out of file descriptors, mostly): time for connections to end.
const PAUSE_AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(100);

/// A bound socket and what its connections are.
#[derive(Debug)]
pub struct Listener {
    socket: std::net::TcpListener,
    address: SocketAddr,
    tls: Option<Tls>,
    facts: Arc<ListenerFacts>,
}

/// What the connections of one worker need.
pub struct Worker<A> {
    pub app: Arc<A>,
    pub refusals: Arc<dyn Refusals>,
    pub head_rules: Arc<HeadRules>,
    /// Shared by all workers: open connections at a time.
    pub connections: Arc<Semaphore>,
    pub metrics: Metrics,
    pub shutdown: ShutdownWatch,
    /// Held by every connection; when the last is dropped, the worker is drained.
    pub alive: mpsc::Sender<()>,
}

impl<A> std::fmt::Debug for Worker<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<A> Clone for Worker<A> {
    fn clone(&self) -> Self {
        Self {
            app: Arc::clone(&self.app),
            refusals: Arc::clone(&self.refusals),
            head_rules: Arc::clone(&self.head_rules),
            connections: Arc::clone(&self.connections),
            metrics: self.metrics.clone(),
            shutdown: self.shutdown.clone(),
            alive: self.alive.clone(),
        }
    }
}

impl Listener {
    pub fn bind(address: SocketAddr, certificate: Option<Arc<Certificate>>, facts: ListenerFacts) -> io::Result<Self> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        // A restart must not wait for the connections of the process before it.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let socket = std::net::TcpListener::from(socket);
        let address = socket.local_addr()?;
        let tls = certificate.map(Tls::new);
        Ok(Self { socket, address, tls, facts: Arc::new(facts) })
    }

    /// With the port that the system chose for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Another handle on the same socket, for another worker.
    pub fn try_clone(&self) -> io::Result<Self> {
        let socket = self.socket.try_clone()?;
        Ok(Self { socket, address: self.address, tls: self.tls.clone(), facts: Arc::clone(&self.facts) })
    }

    /// Accepts until the shutdown, then what the kernel had accepted for us by then.
    pub async fn run<A>(self, worker: Worker<A>) -> io::Result<()>
    where
        A: HttpServerApp + Send + Sync + 'static,
    {
        let Self { socket, tls, facts, address } = self;
        let socket = tokio::net::TcpListener::from_std(socket)?;
        let mut shutdown = worker.shutdown.clone();
        loop {
            let permit = tokio::select! {
                permit = Arc::clone(&worker.connections).acquire_owned() => permit.expect("never closed"),
                _ = shutdown.wait_for(|shutting_down| *shutting_down) => break,
            };
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                _ = shutdown.wait_for(|shutting_down| *shutting_down) => break,
            };
            match accepted {
                Ok((stream, peer)) => spawn(stream, peer, tls.clone(), Arc::clone(&facts), worker.clone(), permit),
                Err(error) => {
                    tracing::error!(%address, %error, "accept failed");
                    drop(permit);
                    tokio::time::sleep(PAUSE_AFTER_FAILED_ACCEPT).await;
                }
            }
        }
        while let (Ok(permit), Some(Ok((stream, peer)))) =
            (Arc::clone(&worker.connections).try_acquire_owned(), accept_waiting(&socket).await)
        {
            spawn(stream, peer, tls.clone(), Arc::clone(&facts), worker.clone(), permit);
        }
        Ok(())
    }
}

/// A connection that is already there; does not wait for one.
async fn accept_waiting(socket: &tokio::net::TcpListener) -> Option<io::Result<(tokio::net::TcpStream, SocketAddr)>> {
    std::future::poll_fn(|task| match socket.poll_accept(task) {
        std::task::Poll::Ready(accepted) => std::task::Poll::Ready(Some(accepted)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

fn spawn<A>(
    stream: tokio::net::TcpStream,
    peer: SocketAddr,
    tls: Option<Tls>,
    facts: Arc<ListenerFacts>,
    worker: Worker<A>,
    permit: tokio::sync::OwnedSemaphorePermit,
) where
    A: HttpServerApp + Send + Sync + 'static,
{
    tokio::spawn(async move {
        let Worker { app, refusals, head_rules, metrics, shutdown, alive, .. } = worker;
        let count = ConnectionCount::of(&metrics);
        if let Some(stream) = open(stream, peer, tls.as_ref(), head_rules.timeout).await {
            let connection = Arc::new(Connection { peer: peer.ip().to_canonical(), listener: facts });
            connection::serve(stream, connection, head_rules, app, refusals, shutdown).await;
        }
        drop((count, permit, alive));
    });
}

async fn open(stream: tokio::net::TcpStream, peer: SocketAddr, tls: Option<&Tls>, timeout: Duration) -> Option<Stream> {
    let stream = ClientStream::new(stream, peer);
    let Some(tls) = tls else { return Some(Box::new(stream)) };
    match tokio::time::timeout(timeout, tls.acceptor.tls_handshake(stream)).await {
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

/// Counts a connection for as long as it lives, also when its task panics.
struct ConnectionCount(prometheus::IntGauge);

impl ConnectionCount {
    fn of(metrics: &Metrics) -> Self {
        metrics.connections.inc();
        Self(metrics.connections.clone())
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[derive(Clone)]
struct Tls {
    acceptor: Arc<Acceptor>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    fn new(certificate: Arc<Certificate>) -> Self {
        let mut config = rustls::ServerConfig::builder().with_no_client_auth().with_cert_resolver(certificate);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self { acceptor: Arc::new(Acceptor::from_server_config(Arc::new(config))) }
    }
}
