//! What does the operator see? Health and metrics, on a listener of their own, loopback by default.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use http::{HeaderValue, Method, Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;

use crate::metrics::Metrics;
use crate::proxy::connection::Refusals;
use crate::proxy::context::Connection;
use crate::proxy::guard::Refusal;
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

/// The endpoints of the admin listener.
#[derive(Debug)]
pub struct Admin {
    pub metrics: Metrics,
    pub health: Arc<Health>,
    pub shutdown: ShutdownWatch,
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
}

impl Admin {
    /// Ready: not shutting down, and the store has answered since the start. A store that fails later leaves us
    /// ready, because public routes go on working, and because all instances would turn unready at once.
    fn ready(&self) -> Response<Vec<u8>> {
        let draining = *self.shutdown.borrow();
        let seen = self.health.store_seen.load(Ordering::Relaxed);
        let store = if self.health.store_up.load(Ordering::Relaxed) { "up" } else { "down" };
        let (status, state) = match (draining, seen) {
            (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
            (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
            (false, true) => (StatusCode::OK, "ready"),
        };
        let body = serde_json::json!({ "state": state, "store": store });
        reply(status, "application/json", body.to_string().into_bytes())
    }
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, downstream: &mut ServerSession) -> Response<Vec<u8>> {
        let request = downstream.req_header();
        if ![Method::GET, Method::HEAD].contains(&request.method) {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, "text/plain", b"GET only\n".to_vec());
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let is_head = request.method == Method::HEAD;
        let mut response = match request.uri.path() {
            "/metrics" => reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.metrics.render()),
            "/health/live" => reply(StatusCode::OK, "application/json", b"{\"state\":\"live\"}".to_vec()),
            "/health/ready" => self.ready(),
            _ => reply(StatusCode::NOT_FOUND, "text/plain", b"try /metrics, /health/live, /health/ready\n".to_vec()),
        };
        if is_head {
            response.body_mut().clear();
        }
        response
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Vec<u8>> {
    let length = HeaderValue::from(body.len());
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// The admin listener keeps the same guard; its refusals are not the application's traffic.
#[derive(Debug)]
pub struct Quiet;

impl Refusals for Quiet {
    fn refused(&self, connection: &Connection, refusal: &Refusal) -> String {
        tracing::debug!(peer = %connection.peer, reason = refusal.reason, "admin request refused");
        String::from("-")
    }
}
