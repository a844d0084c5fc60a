//! Sockets and TLS: bound before anything starts, accepted under a cap, with a deadline on every handshake.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora::apps::HttpServerApp;
use pingora::listeners::tls::Acceptor;
use pingora::protocols::Stream;
use pingora::protocols::l4::stream::Stream as TcpStream;
use pingora::protocols::{GetSocketDigest, SocketDigest};
use pingora::server::ShutdownWatch;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::{Semaphore, mpsc};

use crate::config::error::ConfigError;
use crate::config::model;
use crate::metrics::Metrics;
use crate::proxy::connection::{self, HeadRules, Refusals};
use crate::proxy::context::{Connection, ListenerFacts};

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
    use std::os::fd::AsRawFd;
    // Small answers must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
    let _ = digest.peer_addr.set(Some(peer.into()));
    let mut stream = TcpStream::from(stream);
    stream.set_socket_digest(digest);
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

/// A certificate with its key, which a reload replaces under the open socket.
#[derive(Debug)]
pub struct Certificate {
    current: ArcSwap<CertifiedKey>,
    cert: PathBuf,
    key: PathBuf,
}

impl Certificate {
    /// The listener's certificate; none when it speaks plain HTTP.
    pub fn of(listener: &model::Listener) -> Result<Option<Arc<Self>>, ConfigError> {
        let (Some(cert), Some(key)) = (&listener.cert, &listener.key) else { return Ok(None) };
        let (cert, key) = (cert.get_ref().clone(), key.get_ref().clone());
        let current = ArcSwap::from_pointee(read_certificate(&cert, &key)?);
        Ok(Some(Arc::new(Self { current, cert, key })))
    }

    /// Whether it is of the same files.
    pub fn is_same(&self, other: &Self) -> bool {
        (&self.cert, &self.key) == (&other.cert, &other.key)
    }

    /// From the next handshake on, this is `other`.
    pub fn replace(&self, other: &Self) {
        self.current.store(other.current.load_full());
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

fn read_certificate(cert: &std::path::Path, key: &std::path::Path) -> Result<CertifiedKey, ConfigError> {
    let pem = |file: &std::path::Path| std::fs::read(file).map_err(|error| ConfigError::unreadable(file, &error));
    let chain = CertificateDer::pem_slice_iter(&pem(cert)?)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| {
            ConfigError::of_file(cert, "is not a PEM certificate chain", "the server's certificate comes first")
        })?;
    let private = PrivateKeyDer::from_pem_slice(&pem(key)?)
        .map_err(|_| ConfigError::of_file(key, "is not a PEM private key", "expected PKCS#8, PKCS#1 or SEC1"))?;
    CertifiedKey::from_der(chain, private, &rustls::crypto::ring::default_provider()).map_err(|error| {
        ConfigError::of_file(
            key,
            &format!("does not fit the certificate: {error}"),
            "check that both files belong together",
        )
    })
}
