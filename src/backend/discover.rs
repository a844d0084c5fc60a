//! Where are the backends now? Names are resolved in the background, so that no request waits for DNS.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Backend, Pool};

/// Between two looks at all names. The system's resolver keeps to the records' own time to live.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// One answer takes at most this long; the last good addresses stay meanwhile.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Resolves every backend of these pools that is configured by name. Failures keep the last good addresses.
pub async fn resolve(pools: &[Arc<Pool>]) {
    let mut lookups = tokio::task::JoinSet::new();
    for backend in backends_of(pools).filter(|backend| backend.is_named()) {
        lookups.spawn(async move { backend.resolve().await });
    }
    while lookups.join_next().await.is_some() {}
}

/// Resolves the names that have no address yet, before a start or a reload lets requests in; gives up waiting
/// after `limit`, and leaves the rest to the background.
pub fn resolve_unknown(pools: &[Arc<Pool>], limit: Duration) {
    let unknown = backends_of(pools).filter(|backend| backend.addresses.load().is_empty());
    let (done, finished) = std::sync::mpsc::channel();
    for backend in unknown {
        let done = done.clone();
        let lookup = move || {
            backend.learn(backend.name.to_socket_addrs().map(Vec::from_iter));
            let _ = done.send(());
        };
        // Without a thread the background looks it up a little later.
        let _ = std::thread::Builder::new().name("resolve".into()).spawn(lookup);
    }
    drop(done);
    let deadline = std::time::Instant::now() + limit;
    while finished.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now())).is_ok() {}
}

fn backends_of(pools: &[Arc<Pool>]) -> impl Iterator<Item = Arc<Backend>> {
    let of_pool = |pool: &Arc<Pool>| Vec::clone(&pool.backends());
    pools.iter().flat_map(of_pool)
}

impl Backend {
    fn is_named(&self) -> bool {
        self.name.parse::<SocketAddr>().is_err()
    }

    async fn resolve(&self) {
        let lookup = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(self.name.as_str())).await;
        self.learn(match lookup {
            Ok(found) => found.map(Vec::from_iter),
            Err(elapsed) => Err(elapsed.into()),
        });
    }

    fn learn(&self, found: std::io::Result<Vec<SocketAddr>>) {
        let known = self.addresses.load();
        match found {
            Ok(mut addresses) if !addresses.is_empty() => {
                addresses.sort();
                addresses.dedup();
                if addresses != **known {
                    tracing::info!(backend = self.name, ?addresses, "backend resolved");
                    self.addresses.store(Arc::new(addresses));
                    self.has_address.store(true, Ordering::Release);
                    self.ongoing.queue.look_again();
                }
            }
            Ok(_) => tracing::warn!(backend = self.name, ?known, "backend name has no address"),
            Err(error) => tracing::warn!(backend = self.name, ?known, %error, "backend name does not resolve"),
        }
    }
}
