//! What would it cost without sessions? The least that pingora can do: round robin, and nothing else.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use pingora::proxy::{ProxyHttp, Session as HttpSession, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;

use super::{THREADS, process};

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

/// Pingora as it comes, except for the number of threads.
pub(crate) fn run(ready: &Path, backends: &[SocketAddr]) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let conf = ServerConf { threads: THREADS, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let passthrough = Passthrough { backends: backends.to_vec(), next: AtomicUsize::new(0) };
    let mut service = http_proxy_service(&server.configuration, passthrough);
    service.add_tcp(&address.to_string());
    server.add_service(service);
    process::end_with_parent();
    process::announce(ready, address, &[]);
    server.run_forever();
}
