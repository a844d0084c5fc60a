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
    pub(super) fn readiness(&self, is_leaving: bool) -> Readiness {
        Readiness {
            is_leaving,
            is_store_seen: self.store_seen.load(Ordering::Relaxed),
            is_store_up: self.store_up.load(Ordering::Relaxed),
        }
    }
}

/// What readiness is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Readiness {
    pub(super) is_leaving: bool,
    /// It has answered since the start.
    pub(super) is_store_seen: bool,
    pub(super) is_store_up: bool,
}

impl Readiness {
    pub(super) fn label(self) -> &'static str {
        match (self.is_leaving, self.is_store_seen) {
            (true, _) => "draining",
            (false, false) => "starting",
            (false, true) => "ready",
        }
    }

    pub(super) fn reply(self) -> Response<Vec<u8>> {
        let is_ready = !self.is_leaving && self.is_store_seen;
        let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let store = if self.is_store_up { "up" } else { "down" };
        let body = serde_json::json!({ "state": self.label(), "store": store });
        reply(status, JSON, body.to_string().into_bytes())
    }
}
