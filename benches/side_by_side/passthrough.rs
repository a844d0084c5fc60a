//! What would it cost without sessions? The least that pingora can do: round robin, and nothing else.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use cloakroom::listener::{self, Listener, Slots, Worker};
use cloakroom::metrics::Metrics;
use cloakroom::proxy::connection::{HeadRules, Refusals};
use cloakroom::proxy::context::{Connection, ListenerFacts};
use cloakroom::proxy::guard::{HeadLimits, Refusal};
use cloakroom::proxy::streams::Streams;
use cloakroom::session::cookie::SessionCookie;
use pingora::modules::http::HttpModules;
use pingora::proxy::{ProxyHttp, Session as HttpSession, http_proxy};
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;
use tokio::sync::watch;

use super::{THREADS, process};

/// An application that does nothing.
#[derive(Clone)]
struct Passthrough {
    backends: Arc<[SocketAddr]>,
    next: Arc<AtomicUsize>,
}

#[async_trait]
impl ProxyHttp for Passthrough {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    /// None: by default pingora sets up a compressor for every request, switched off.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn upstream_peer(&self, _: &mut HttpSession, (): &mut Self::CTX) -> pingora::Result<Box<HttpPeer>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(HttpPeer::new(self.backends[turn % self.backends.len()], false, String::new())))
    }
}

/// As Cloakroom runs pingora: its listener, its reader of heads with the guard, its workers; in them pingora's proxy
/// around the application.
pub(crate) fn run(ready: &Path, backends: &[SocketAddr]) {
    let cookie = SessionCookie::new("session", false, cookie::SameSite::Lax);
    let facts = ListenerFacts { scheme: "http", cookie, hsts: None, redirect_to_port: None };
    let socket = listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = Listener::new(socket, None, facts).unwrap();
    let address = listener.address();
    let (_running, shutdown) = watch::channel(false);
    let passthrough = Passthrough { backends: backends.into(), next: Arc::default() };
    let mut desks = Vec::new();
    for _ in 0..THREADS {
        let (desk, queue) = listener::desk();
        desks.push(desk);
        let (passthrough, shutdown) = (passthrough.clone(), shutdown.clone());
        std::thread::spawn(move || {
            let conf = Arc::new(ServerConf { threads: 1, upstream_keepalive_pool_size: 512, ..ServerConf::default() });
            let worker = Worker {
                app: Arc::new(http_proxy(&conf, passthrough)),
                refusals: Arc::new(Silent),
                head_rules: Arc::new(HeadRules {
                    bytes_max: 32 * 1024,
                    limits: HeadLimits { headers_max: 100, target_bytes: 8 * 1024 },
                    streams_max: 100,
                    timeout: Duration::from_secs(10),
                    keepalive: Duration::from_secs(60),
                    write_timeout: Duration::from_secs(60),
                }),
                write_timeout: Duration::from_secs(60),
                metrics: Metrics::new(),
                streams: Arc::new(Streams::new(Metrics::new())),
                shutdown,
            };
            runtime().block_on(worker.run(queue));
        });
    }
    process::announce(ready, address, &[]);
    process::end_with_parent();
    runtime().block_on(listener.run(desks, Arc::new(Slots::new(1024)), shutdown));
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The load sends nothing that is refused.
struct Silent;

impl Refusals for Silent {
    fn refused(&self, _: &Connection, _: &Refusal) -> String {
        String::new()
    }
}
