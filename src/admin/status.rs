//! `GET /status`: how this instance does, on a page for people. It only shows, and needs no script.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use askama::Template;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderName};
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::health::Readiness;
use super::problem::Problem;
use super::query::Query;
use super::reply;
use super::token::Token;
use super::view::{BackendView, PoolView, State};
use crate::metrics::Metrics;
use crate::proxy::rules::Rules;
use crate::session::Sessions;
use crate::session::control::{Timestamp, span};

/// For whoever has the token; a browser shows it as the password of HTTP Basic.
pub struct StatusPage {
    pub token: Token,
    pub about: About,
    pub rules: Arc<ArcSwap<Rules>>,
    pub sessions: Sessions,
    pub metrics: Metrics,
    pub last_reload: watch::Receiver<Option<LastReload>>,
}

/// What stays as it was at the start.
#[derive(Debug)]
pub struct About {
    pub started: Instant,
    /// Of this machine.
    pub host: String,
    /// Addresses, and what is spoken there.
    pub listeners: Vec<(SocketAddr, &'static str)>,
    /// Where sessions are kept is this process itself.
    pub is_store: bool,
    /// So long a store that is down is bridged.
    pub grace: Option<Duration>,
}

/// When the configuration was last read anew, and how that went.
#[derive(Clone, Copy, Debug)]
pub struct LastReload {
    at: Timestamp,
    /// As the metrics have it.
    result: &'static str,
    needs_restart: bool,
}

pub(super) const STATUS: &str = "/status";

const REFRESH_SECONDS: u32 = 10;
const STYLE: &str = include_str!("pages/status.css");

/// Nothing but the style that stands in the page.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = STANDARD.encode(Sha256::digest(STYLE));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{hash}'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    );
    HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"Cloakroom\", charset=\"UTF-8\"");

#[derive(Template)]
#[template(path = "status.html")]
struct Page<'p> {
    refreshes: bool,
    now: Timestamp,
    host: &'p str,
    version: &'p str,
    uptime: String,
    readiness: &'static str,
    store: String,
    kept_label: &'static str,
    kept: usize,
    connections: i64,
    last_reload: String,
    listeners: &'p [(SocketAddr, &'static str)],
    pools: Vec<PoolView>,
}

impl StatusPage {
    pub(super) fn answer(&self, request: &Parts, readiness: Readiness) -> Response<Vec<u8>> {
        match self.look(request, readiness) {
            Ok(page) => page,
            Err(problem) => {
                let mut response = problem.reply();
                if matches!(problem, Problem::NoToken) {
                    response.headers_mut().insert(header::WWW_AUTHENTICATE, CHALLENGE);
                }
                response
            }
        }
    }

    fn look(&self, request: &Parts, readiness: Readiness) -> Result<Response<Vec<u8>>, Problem> {
        if !self.token.is_password_of(request) && !self.token.is_shown_by(request) {
            return Err(Problem::NoToken);
        }
        if ![Method::GET, Method::HEAD].contains(&request.method) {
            return Err(Problem::Method { allowed: "GET, HEAD" });
        }
        let query = Query::parse(request.uri.query(), &["refresh"])?;
        let refreshes = match query.get("refresh") {
            None => true,
            Some("off") => false,
            Some(_) => return Err(Problem::Query("refresh is off, or not there".into())),
        };
        let html = self.page(refreshes, readiness).render().map_err(|_| Problem::Failed)?;
        let mut response = reply(StatusCode::OK, "text/html; charset=utf-8", html.into_bytes());
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_SECURITY_POLICY, POLICY.clone());
        headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
        let opener = HeaderName::from_static("cross-origin-opener-policy");
        headers.insert(opener, HeaderValue::from_static("same-origin"));
        Ok(response)
    }

    fn page(&self, refreshes: bool, readiness: Readiness) -> Page<'_> {
        let About { started, host, listeners, is_store, grace } = &self.about;
        let store = match (is_store, readiness.is_store_up, grace) {
            (true, _, _) => "in the memory of this process".to_owned(),
            (false, true, _) => "up".to_owned(),
            (false, false, Some(grace)) => {
                format!("down; bridged for those who were known, for {} (grace)", span(grace.as_secs()))
            }
            (false, false, None) => "down".to_owned(),
        };
        Page {
            refreshes,
            now: Timestamp::now(),
            host,
            version: env!("CARGO_PKG_VERSION"),
            uptime: span(started.elapsed().as_secs()),
            readiness: readiness.label(),
            store,
            kept_label: if *is_store { "Sessions" } else { "Copies of sessions" },
            kept: self.sessions.store().kept(),
            connections: self.metrics.connections.get(),
            last_reload: self
                .last_reload
                .borrow()
                .map_or_else(|| "none since the start".to_owned(), |last| last.to_string()),
            listeners,
            pools: PoolView::all(&self.rules.load(), &self.metrics),
        }
    }
}

impl LastReload {
    /// It has just been tried. `result` as the metrics have it.
    pub fn now(result: &'static str, needs_restart: bool) -> Self {
        Self { at: Timestamp::now(), result, needs_restart }
    }
}

/// What was wrong with a file is for the log: it may quote a secret.
impl fmt::Display for LastReload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, result, needs_restart } = self;
        write!(f, "{at}: {result}")?;
        f.write_str(match (*result, needs_restart) {
            ("refused", _) => ", the configuration before it stays; the log says why",
            (_, true) => "; some of what has changed needs a restart",
            (_, false) => "",
        })
    }
}

/// In words, for the page.
impl PoolView {
    fn ways(&self) -> String {
        let version = match self.protocol {
            "http1" => "HTTP/1",
            "http2" => "HTTP/2",
            _ => "HTTP/1 or HTTP/2",
        };
        let tls = if self.tls { " over TLS" } else { "" };
        format!("{version}{tls}, {}", self.balance.replace('_', " "))
    }
}

impl BackendView {
    /// The class of the cell. Its colour says nothing that the words do not.
    fn tone(&self) -> &'static str {
        match self.state {
            State::Up | State::SlowStart | State::Backup => "good",
            State::Unresolved | State::Down | State::Ejected => "bad",
            State::Draining => "quiet",
        }
    }
}

impl fmt::Debug for StatusPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StatusPage")
    }
}
