//! Should this instance get traffic? Not before its store has answered, and not while it shuts down.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Response, StatusCode};

use super::{JSON, reply};
use crate::metrics::Metrics;
use crate::session::store::SessionStore;

/// Between two looks at the store.
const STORE_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Whether this instance should get traffic, and what it knows of its store.
#[derive(Debug, Default)]
pub struct Health {
    /// The store has answered once since the start.
    store_seen: AtomicBool,
    store_up: AtomicBool,
}

impl Health {
    /// Asks the store now and then, and says when the answer changes.
    pub async fn watch(&self, store: &dyn SessionStore, metrics: &Metrics) {
        loop {
            let up = match store.ping().await {
                Ok(()) => {
                    if !self.store_up.swap(true, Ordering::Relaxed) {
                        tracing::info!("session store answers");
                    }
                    self.store_seen.store(true, Ordering::Relaxed);
                    true
                }
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    if self.store_up.swap(false, Ordering::Relaxed) || !self.store_seen.load(Ordering::Relaxed) {
                        tracing::error!(%error, cause, "session store does not answer; protected routes give 503");
                    }
                    false
                }
            };
            metrics.store_up.set(i64::from(up));
            tokio::time::sleep(STORE_CHECK_INTERVAL).await;
        }
    }

    /// Ready: not shutting down, and the store has answered since the start. A store that fails later leaves us
    /// ready, because public routes go on working, and because all instances would turn unready at once.
    pub(super) fn ready(&self, leaving: bool) -> Response<Vec<u8>> {
        let seen = self.store_seen.load(Ordering::Relaxed);
        let store = if self.store_up.load(Ordering::Relaxed) { "up" } else { "down" };
        let (status, state) = match (leaving, seen) {
            (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
            (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
            (false, true) => (StatusCode::OK, "ready"),
        };
        let body = serde_json::json!({ "state": state, "store": store });
        reply(status, JSON, body.to_string().into_bytes())
    }
}
