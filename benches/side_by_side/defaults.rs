//! Bare pingora as it comes: its own service with two threads, and the allocator of the system. A program cannot change
//! its allocator, so this is one of its own; `side_by_side` starts it, and alone it does nothing.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed, and says where")]

#[expect(dead_code, reason = "the other program has the other half")]
mod process;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use pingora::proxy::{ProxyHttp, Session as HttpSession, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;

const THREADS: usize = 2;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [ready, backends @ ..] = arguments.as_slice() {
        run(Path::new(ready), backends.iter().map(|backend| backend.parse().unwrap()).collect());
    }
}

/// Two threads that share one pool of connections, and steal each other's work.
fn run(ready: &Path, backends: Vec<SocketAddr>) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let conf = ServerConf { threads: THREADS, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Passthrough { backends, next: AtomicUsize::new(0) });
    service.add_tcp(&address.to_string());
    server.add_service(service);
    process::end_with_parent();
    process::announce(ready, address, &[]);
    server.run_forever();
}

struct Passthrough {
    backends: Vec<SocketAddr>,
    next: AtomicUsize,
}

#[async_trait]
impl ProxyHttp for Passthrough {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    async fn upstream_peer(&self, _: &mut HttpSession, (): &mut Self::CTX) -> pingora::Result<Box<HttpPeer>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(HttpPeer::new(self.backends[turn % self.backends.len()], false, String::new())))
    }
}
