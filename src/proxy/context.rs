//! What one request gathers on its way: a phase writes what a later one reads.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::{HeaderValue, Method, StatusCode, Uri};

use crate::backend::balance::Tried;
use crate::backend::{Lease, Pool};
use crate::identity::Known;
use crate::identity::certificate::Certificate;
use crate::login::navigation::Notice;
use crate::metrics::Metrics;
use crate::session::cookie::SessionCookie;
use crate::session::record::LoginMethod;
use crate::session::{Session, Source};
use crate::spans::Spans;

use super::access_log::{AccessLog, Entry, Timestamp};
use super::reply::{Outcome, Rejection};
use super::route::{Branch, Route};
use super::rules::Rules;
use super::split::Split;
use super::streams::InFlight;
use super::trace::{End, Trace};
use super::websocket::Frames;

/// An id from a trusted proxy is kept when it is no longer than this.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// One client connection, known to every request on it.
#[derive(Debug)]
pub struct Connection {
    pub peer: IpAddr,
    /// The peer as `X-Forwarded-For` says it.
    pub forwarded_for: HeaderValue,
    pub listener: Arc<ListenerFacts>,
    /// What the client has shown in the TLS handshake, and an authority of the listener has signed.
    pub certificate: Option<Certificate>,
}

impl Connection {
    pub fn new(peer: IpAddr, listener: Arc<ListenerFacts>) -> Self {
        let forwarded_for = HeaderValue::try_from(peer.to_string()).expect("an address is visible ASCII");
        Self { peer, forwarded_for, listener, certificate: None }
    }

    /// Of a client that has shown this one (DER), verified.
    pub fn with_certificate(self, der: Option<&[u8]>) -> Self {
        Self { certificate: der.and_then(Certificate::parse), ..self }
    }
}

/// What a request must know of the socket that it came through.
#[derive(Debug)]
pub struct ListenerFacts {
    /// As the browser sees it: "http" or "https".
    pub scheme: &'static str,
    /// Our session cookie in the form that fits the scheme.
    pub cookie: SessionCookie,
    /// `Strict-Transport-Security` of every response.
    pub hsts: Option<HeaderValue>,
    /// Every request is sent to https at this port.
    pub redirect_to_port: Option<u16>,
}

/// What a request is told of how it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub connection: Arc<Connection>,
    pub in_flight: Arc<InFlight>,
}

/// Where requests are told of; clones tell the same.
#[derive(Clone, Debug)]
pub struct Observer {
    pub metrics: Metrics,
    pub access_log: AccessLog,
    /// With `[tracing]`.
    pub spans: Option<Spans>,
}

/// What was asked for, kept for the log line.
#[derive(Debug)]
pub struct RequestLine {
    pub method: Method,
    pub uri: Uri,
    /// The `Host` field.
    pub host: HeaderValue,
}

/// One request.
#[derive(Debug)]
pub struct RequestContext {
    observer: Arc<Observer>,
    is_recorded: bool,
    pub started: Instant,
    pub line: Option<RequestLine>,
    /// What reload replaces, as it was when the request came: one request sees one configuration.
    pub rules: Arc<Rules>,
    pub connection: Option<Arc<Connection>>,
    pub in_flight: Option<Arc<InFlight>>,
    /// The address that the request came from: the peer's, or what a trusted proxy said.
    pub client: IpAddr,
    /// The peer is one of `server.trusted_proxies`.
    pub trusted_peer: bool,
    pub request_id: RequestId,
    /// Boxed, because without `[tracing]` nobody has one.
    pub trace: Option<Box<Trace>>,
    pub route: Option<Arc<Route>>,
    /// Of the route's, where it has some; none before that is decided.
    pub branch: Option<usize>,
    pub pool: Option<Arc<Pool>>,
    pub identity: Option<Arc<Known>>,
    /// That the client came with; also of who is not let in, for the log.
    pub session: Option<Session>,
    /// How the session was known.
    pub source: Option<Source>,
    /// The client sent a session id, and the store knows no such session.
    pub session_is_gone: bool,
    /// Why it is gone, to be told on the login page.
    pub notice: Option<Notice>,
    /// The provider's, for the backend of a route that asks for it.
    pub access_token: Option<HeaderValue>,
    /// A new fallback cookie for the browser.
    pub fallback_cookie: Option<HeaderValue>,
    /// `Authorization` was for us, and goes to no backend.
    pub keeps_authorization: bool,
    /// When what was refused is worth another try.
    pub retry_after: Option<Duration>,
    pub is_upgrade: bool,
    /// After the upgrade: what the backend says.
    pub(super) frames: Option<Frames>,
    /// We have answered `100 Continue`, so the backend must not be asked for it.
    pub continued: bool,
    pub body_bytes_max: u64,
    pub body_bytes: u64,
    pub tried: Tried,
    /// How often it was sent again after a backend failed on it.
    pub repeats: u8,
    /// The attempt under way, or the last one: for as long as it is here it counts as a request of its backend.
    pub backend: Option<Lease>,
    pub attempts: u8,
    /// Of the backend's response, as soon as there is one.
    pub status: u16,
    pub outcome: Option<Outcome>,
    /// Why an attempt failed, to be told if no other succeeds.
    pub failure: Option<Rejection>,
}

impl RequestContext {
    /// The session that backends are told of: of a user who is let in, or one that nobody has logged in to.
    pub fn told_session(&self) -> Option<&Session> {
        let is_anonymous = |session: &&Session| session.record.method == LoginMethod::Anonymous;
        self.session.as_ref().filter(|session| self.identity.is_some() || is_anonymous(session))
    }

    /// What every response over TLS says, if the operator wants it.
    pub fn hsts(&self) -> Option<HeaderValue> {
        self.connection.as_ref()?.listener.hsts.clone()
    }

    pub fn new(observer: Arc<Observer>, rules: Arc<Rules>) -> Self {
        Self {
            observer,
            is_recorded: false,
            started: Instant::now(),
            line: None,
            rules,
            connection: None,
            in_flight: None,
            client: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            trusted_peer: false,
            request_id: RequestId::none(),
            trace: None,
            route: None,
            branch: None,
            pool: None,
            identity: None,
            session: None,
            source: None,
            session_is_gone: false,
            notice: None,
            access_token: None,
            fallback_cookie: None,
            keeps_authorization: false,
            retry_after: None,
            is_upgrade: false,
            frames: None,
            continued: false,
            body_bytes_max: u64::MAX,
            body_bytes: 0,
            tried: Tried::default(),
            repeats: 0,
            backend: None,
            attempts: 0,
            status: 0,
            outcome: None,
            failure: None,
        }
    }

    pub fn branch(&self) -> Option<&Branch> {
        self.route.as_ref()?.branches.get(self.branch?)
    }

    /// Whether its session has ended, and it with it.
    pub fn is_cut(&self) -> bool {
        self.in_flight.as_ref().is_some_and(|in_flight| in_flight.is_cut())
    }

    /// It is left alone if its session ends now.
    pub fn leave(&self) {
        if let Some(in_flight) = &self.in_flight {
            in_flight.leave();
        }
    }

    /// One line, one count (invariant 9). Bytes are those of the bodies.
    pub fn record(&mut self, status: u16, outcome: Outcome, bytes_in: usize, bytes_out: usize) {
        self.is_recorded = true;
        let now = Instant::now();
        let duration = now.saturating_duration_since(self.started);
        let Observer { metrics, access_log, spans } = &*self.observer;
        let route = self.route.as_ref().map(|route| route.name.as_str());
        match &self.route {
            Some(route) => {
                let seconds = || metrics.request_seconds.with_label_values(&[&route.name]);
                route.seconds.get_or_init(seconds).observe(duration.as_secs_f64());
            }
            None => metrics.request_seconds.with_label_values(&["-"]).observe(duration.as_secs_f64()),
        }
        let status_code = StatusCode::from_u16(status);
        let status_label = status_code.as_ref().map_or("0", StatusCode::as_str);
        let count = || metrics.requests.with_label_values(&[route.unwrap_or("-"), status_label, outcome.label()]);
        match &self.route {
            Some(route) if (status, outcome) == (200, Outcome::Forwarded) => route.forwarded.get_or_init(count).inc(),
            Some(_) | None => count().inc(),
        }
        if let (Some(branch), Some(route)) = (self.branch(), route) {
            let count = || metrics.split_requests.with_label_values(&[route, branch.label(), status_label]);
            if status == 200 { branch.succeeded.get_or_init(count).inc() } else { count().inc() }
        }
        if let (Some(trace), Some(spans), Some(line)) = (self.trace.take(), spans, &self.line) {
            let pool = self.pool.as_ref().map(|pool| pool.name());
            let (method, outcome) = (Some(&line.method), outcome.label());
            let end = End { at: now, method, route, pool, status, outcome, reason: None };
            if let Some(recorded) = trace.finish(&end) {
                spans.push(recorded);
            }
        }
        if access_log.is_silent() {
            return;
        }
        let session = self.session.as_ref().map(|session| session.key.log_hash());
        let session_source = match self.source {
            Some(source @ (Source::Grace | Source::Fallback)) => Some(source.label()),
            Some(Source::Copy | Source::Store) | None => None,
        };
        let line = self.line.as_ref();
        let peer = self.connection.as_ref().filter(|connection| connection.peer == self.client);
        let client = match peer.and_then(|connection| connection.forwarded_for.to_str().ok()) {
            Some(text) => Cow::Borrowed(text),
            None => Cow::Owned(self.client.to_string()),
        };
        access_log.write(&Entry {
            time: Timestamp::at(now),
            request_id: self.request_id.as_str(),
            client: &client,
            method: line.map_or("-", |line| line.method.as_str()),
            host: line.and_then(|line| line.host.to_str().ok()).unwrap_or("-"),
            path: line.map_or("", |line| line.uri.path()),
            status,
            outcome: outcome.label(),
            reason: None,
            route,
            split: self.branch().and_then(|branch| branch.split.as_deref()).map(Split::name),
            backend: self.backend.as_ref().map(|backend| backend.name()),
            user: self.identity.as_ref().map(|identity| identity.user.as_str()),
            session: session.as_deref(),
            session_source,
            bytes_in,
            bytes_out,
            duration,
        });
    }
}

/// A request that was dropped on its way (cut at the end of a shutdown, or by a panic) is told of all the same.
impl Drop for RequestContext {
    fn drop(&mut self) {
        if !self.is_recorded && self.line.is_some() {
            let outcome = if self.is_cut() { Outcome::EndedWithSession } else { Outcome::Cut };
            self.record(self.status, outcome, 0, 0);
        }
    }
}

/// What a request is called in the log, and to the backend and the client. Kept as the field value that it becomes.
#[derive(Clone, Debug)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// 32 hexadecimal digits: random per process, then counted, so that one costs no system call.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        static PROCESS: std::sync::LazyLock<u64> = std::sync::LazyLock::new(rand::random);
        let number = (u128::from(*PROCESS) << 64) | u128::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let digit = |place: usize| b"0123456789abcdef"[(number >> (4 * (31 - place))) as usize & 0xf];
        let text: [u8; 32] = std::array::from_fn(digit);
        Self(HeaderValue::from_bytes(&text).expect("digits are visible ASCII"))
    }

    /// Before it is known.
    fn none() -> Self {
        Self(HeaderValue::from_static(""))
    }

    /// One that a trusted proxy gave; none when it is unusual.
    pub fn given(value: &HeaderValue) -> Option<Self> {
        let bytes = value.as_bytes();
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
        let is_usual = (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(is_plain);
        is_usual.then(|| Self(value.clone()))
    }

    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub fn value(&self) -> HeaderValue {
        self.0.clone()
    }
}
