//! What does the operator see, and do? Health, metrics, reloads, the APIs of sessions, pools and splits, and a page about it
//! all, on a listener of their own, loopback by default.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use http::{HeaderValue, Method, Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::proxy::connection::Refusals;
use crate::proxy::context::{Connection, Request};
use crate::proxy::guard::Refusal;
use crate::proxy::rules::Rules;
use health::Readiness;
use problem::Problem;
use reload::RELOAD;
use status::STATUS;

mod hosts;
mod health;
mod token;
mod api;
mod problem;
mod reload;
mod sessions;
mod pools;
mod splits;
mod view;
mod status;
mod query;

pub use health::Health;
pub use hosts::Hosts;
pub use pools::PoolsApi;
pub use reload::ReloadApi;
pub use sessions::SessionsApi;
pub use splits::SplitsApi;
pub use status::{About, LastReload, StatusPage};
pub use token::Token;
pub use view::{BackendView, Setting};

/// The endpoints of the admin listener.
#[derive(Debug)]
pub struct Admin {
    pub hosts: Arc<ArcSwap<Hosts>>,
    pub metrics: Metrics,
    pub health: Arc<Health>,
    /// None without a token: then there is nothing under `/api/`.
    pub sessions: Option<SessionsApi>,
    pub rules: Arc<ArcSwap<Rules>>,
    pub pools: Option<PoolsApi>,
    pub splits: Option<SplitsApi>,
    pub status: Option<StatusPage>,
    /// None without a token, too: then there is no `/reload`.
    pub reload: Option<ReloadApi>,
    /// Whether this instance is about to end.
    pub leaving: watch::Receiver<bool>,
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, downstream: &mut ServerSession) -> Response<Vec<u8>> {
        let peer = peer(downstream);
        let request = downstream.req_header().as_owned_parts();
        self.answer(&request, peer, read_body(downstream)).await
    }
}

/// Who asks.
fn peer(downstream: &mut ServerSession) -> Option<IpAddr> {
    let request = downstream.take_connection_user_context()?.downcast::<Request>().ok()?;
    Some(request.connection.peer)
}

/// A body of JSON, whole, capped in size and in time. After one that is not whole, the connection closes.
async fn read_body(downstream: &mut ServerSession) -> Result<Vec<u8>, Problem> {
    let read = async {
        let mut body = Vec::new();
        while let Some(bytes) = downstream.read_request_body().await.map_err(|_| Problem::BodyTooSlow)? {
            if BODY_BYTES_MAX < body.len() + bytes.len() {
                return Err(Problem::BodyTooLarge);
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    };
    let body = tokio::time::timeout(BODY_TIMEOUT, read).await.unwrap_or(Err(Problem::BodyTooSlow));
    if body.is_err() {
        downstream.set_keepalive(None);
    }
    body
}

const BODY_BYTES_MAX: usize = 4 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

impl Admin {
    async fn answer(
        &self,
        request: &http::request::Parts,
        peer: Option<IpAddr>,
        body: impl Future<Output = Result<Vec<u8>, Problem>> + Send,
    ) -> Response<Vec<u8>> {
        let path = request.uri.path();
        let mut response = match self {
            Self { .. } if !self.may_be_asked(request, peer) => Problem::OtherHost.reply(),
            Self { pools: Some(pools), .. } if PoolsApi::has(path) => pools.answer(request, peer, body).await,
            Self { splits: Some(splits), .. } if SplitsApi::has(path) => splits.answer(request, peer, body).await,
            Self { sessions: Some(sessions), .. } if path.starts_with("/api/") => sessions.answer(request, peer).await,
            Self { reload: Some(reload), .. } if path == RELOAD => reload.answer(request).await,
            Self { status: Some(status), .. } if path == STATUS => status.answer(request, self.readiness()),
            Self { .. } => self.look(request),
        };
        if request.method == Method::HEAD {
            response.body_mut().clear();
        }
        response
    }

    /// Health is told under any name: who asks for it often writes one of its own, and it is of no use to a stranger.
    fn may_be_asked(&self, request: &http::request::Parts, peer: Option<IpAddr>) -> bool {
        if [LIVE, READY].contains(&request.uri.path()) {
            return true;
        }
        let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let is_admitted = host.is_some_and(|host| self.hosts.load().admit(host));
        if !is_admitted {
            tracing::debug!(peer = ?peer, host, "admin request refused: admin.hosts does not list this name");
        }
        is_admitted
    }

    fn readiness(&self) -> Readiness {
        self.health.readiness(*self.leaving.borrow())
    }

    fn look(&self, request: &http::request::Parts) -> Response<Vec<u8>> {
        let path = request.uri.path();
        if LOOKS.contains(&path) && ![Method::GET, Method::HEAD].contains(&request.method) {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, b"GET only\n".to_vec());
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            METRICS => {
                self.rules.load().tell(&self.metrics);
                reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.metrics.render())
            }
            LIVE => reply(StatusCode::OK, JSON, b"{\"state\":\"live\"}".to_vec()),
            READY => self.readiness().reply(),
            _ => reply(StatusCode::NOT_FOUND, TEXT, format!("try {}\n", LOOKS.join(", ")).into_bytes()),
        }
    }
}

const METRICS: &str = "/metrics";
const LIVE: &str = "/health/live";
const READY: &str = "/health/ready";
/// What everybody may look at who reaches the listener.
const LOOKS: [&str; 3] = [METRICS, LIVE, READY];

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

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
