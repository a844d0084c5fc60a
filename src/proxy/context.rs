//! What one request gathers on its way: a phase writes what a later one reads.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::backend::balance::Tried;
use crate::backend::{Backend, Pool};
use crate::identity::Identity;
use crate::session::cookie::SessionCookie;

use super::reply::{Outcome, Rejection};
use super::route::Route;
use super::rules::Rules;

/// One client connection, known to every request on it.
#[derive(Debug)]
pub struct Connection {
    pub peer: IpAddr,
    pub listener: Arc<ListenerFacts>,
}

/// What a request must know of the socket that it came through.
#[derive(Debug)]
pub struct ListenerFacts {
    /// As the browser sees it: "http" or "https".
    pub scheme: &'static str,
    /// Our session cookie in the form that fits the scheme.
    pub cookie: SessionCookie,
}

/// One request.
#[derive(Debug)]
pub struct RequestContext {
    pub started: Instant,
    /// What reload replaces, as it was when the request came: one request sees one configuration.
    pub rules: Arc<Rules>,
    pub connection: Option<Arc<Connection>>,
    /// The address that the request came from: the peer's, or what a trusted proxy said.
    pub client: IpAddr,
    /// The peer is one of `server.trusted_proxies`.
    pub trusted_peer: bool,
    pub request_id: String,
    pub route: Option<Arc<Route>>,
    pub pool: Option<Arc<Pool>>,
    pub identity: Option<Arc<Identity>>,
    /// A hash for the log.
    pub session: Option<String>,
    /// The client sent a session id, and the store knows no such session.
    pub session_is_gone: bool,
    pub is_upgrade: bool,
    /// We have answered `100 Continue`, so the backend must not be asked for it.
    pub continued: bool,
    pub body_bytes_max: u64,
    pub body_bytes: u64,
    pub tried: Tried,
    pub backend: Option<Arc<Backend>>,
    pub outcome: Option<Outcome>,
    /// Why an attempt failed, to be told if no other succeeds.
    pub failure: Option<Rejection>,
}

impl RequestContext {
    pub fn new(rules: Arc<Rules>) -> Self {
        Self {
            started: Instant::now(),
            rules,
            connection: None,
            client: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            trusted_peer: false,
            request_id: String::new(),
            route: None,
            pool: None,
            identity: None,
            session: None,
            session_is_gone: false,
            is_upgrade: false,
            continued: false,
            body_bytes_max: u64::MAX,
            body_bytes: 0,
            tried: Tried::default(),
            backend: None,
            outcome: None,
            failure: None,
        }
    }
}

/// 32 hexadecimal digits: random per process, then counted, so that one costs no system call.
pub fn new_request_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static PROCESS: std::sync::LazyLock<u64> = std::sync::LazyLock::new(rand::random);
    format!("{:016x}{:016x}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed))
}
