//! Where is the request now? Pingora's phases, each one short step of the journey that `lib.rs` tells.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::pin::pin;
use std::sync::Arc;
use std::task::{self, Waker};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Method, Response, header};
use ipnet::IpNet;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::protocols::Digest;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session as HttpSession};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};
use tokio::sync::watch;

use crate::backend::ejection::Failure;
use crate::backend::{Lease, Unavailable, balance};
use crate::config::model::{Access, Balance, HashBy};
use crate::identity::Known;
use crate::login::basic::Script;
use crate::login::navigation::Notice;
use crate::login::oidc::Demand;
use crate::login::pages::set_retry_after;
use crate::login::{Login, LoginRequest};
use crate::panics::survived;
use crate::session::cookie::ReservedCookies;
use crate::session::id::SessionId;
use crate::session::record::{LoginMethod, Record};
use crate::session::store::{Ending, StoreError};
use crate::session::{Resumed, Session, Sessions, Source, Use, unix_now};

pub mod context;
pub mod trace;
pub mod streams;
pub mod connection;
pub mod http2;
pub mod guard;
pub mod route;
pub mod split;
pub mod rules;
pub mod admit;
pub mod transport;
pub mod forward;
pub mod probe;
mod chunks;
mod directives;
mod websocket;
pub mod reply;
pub mod access_log;

use access_log::{Entry, Timestamp};
use admit::{Step, Who, admit};
use connection::Refusals;
use context::{Connection, Observer, Request, RequestContext, RequestId, RequestLine};
use forward::Notable;
use guard::Refusal;
use reply::{Outcome, Reader, Rejection};
use route::Route;
use rules::Rules;
use streams::{InFlight, Place, Whose};
use trace::{End, Trace};
use websocket::Frames;

/// Pingora's contract of `request_filter`: we have answered.
const REPLIED: bool = true;
/// Pingora's contract of `request_filter`: on to a backend.
const FORWARD: bool = false;

/// A request is sent once more when a backend failed on it.
const REPEATS_MAX: u8 = 1;
/// As [`REPEATS_MAX`], when a kept connection had ended: several may have gone stale at the same time.
const REPEATS_AFTER_KEPT_MAX: u8 = 3;

/// What the kernel calls a connection that was reset, and one that the other side has closed (`net/tcp_states.h`).
const TCP_CLOSE: u8 = 7;
const TCP_CLOSE_WAIT: u8 = 8;

/// Browsers leave it out of an address.
const HTTPS_PORT: u16 = 443;

/// The application that pingora drives. One for all workers; each worker has a pingora proxy around a clone.
#[derive(Clone, Debug)]
pub struct Gateway {
    pub rules: Arc<ArcSwap<Rules>>,
    pub sessions: Sessions,
    pub cookies: Arc<ReservedCookies>,
    /// A request that has it is nobody's use of the session.
    pub silent_header: Option<HeaderName>,
    pub trusted_proxies: Arc<[IpNet]>,
    pub body_timeout: Duration,
    /// Bytes per second that a body must arrive at, on average after the first `body_timeout`.
    pub body_rate_min: u64,
    pub write_timeout: Duration,
    pub observer: Arc<Observer>,
    /// Open as long as tokens are being renewed: a refresh token that is used up must not be lost with the end of us.
    pub renewals: watch::Sender<()>,
}

/// Where a request goes from the session to the backend, or our own answer.
enum Decision {
    Forward,
    Reply { response: Response<Bytes>, outcome: Outcome },
}

#[async_trait]
impl ProxyHttp for Gateway {
    /// Boxed, because pingora moves it from future to future.
    type CTX = Box<RequestContext>;

    fn new_ctx(&self) -> Self::CTX {
        Box::new(RequestContext::new(Arc::clone(&self.observer), self.rules.load_full()))
    }

    /// None: by default pingora sets up a compressor for every request, switched off.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    /// Called for every request in HTTP/1, with what [`connection::serve`] knows of the connection.
    fn on_connection_reuse(
        &self,
        downstream: &mut HttpSession,
        context: &mut Self::CTX,
        connection: Box<dyn std::any::Any + Send + Sync>,
    ) {
        if let Ok(request) = connection.downcast::<Request>() {
            self.open(downstream, context, *request);
        }
    }

    /// In HTTP/2, what [`http2::serve`] knows of the connection comes with the request.
    async fn early_request_filter(&self, downstream: &mut HttpSession, context: &mut Self::CTX) -> Result<()> {
        let request = downstream.req_header().extensions.get::<Request>().cloned();
        if let Some(request) = request {
            self.open(downstream, context, request);
        }
        Ok(())
    }

    async fn request_filter(&self, downstream: &mut HttpSession, context: &mut Self::CTX) -> Result<bool> {
        let decided = survived(self.decide(downstream, context)).await;
        match decided.unwrap_or_else(|| reject(downstream, context, Rejection::Internal)) {
            Decision::Forward => {
                if is_expecting_continue(downstream.req_header()) {
                    // Pingora leaves this to the backend, and a backend that does not know it stalls the upload.
                    say_continue(downstream).await?;
                    context.continued = true;
                }
                Ok(FORWARD)
            }
            Decision::Reply { mut response, outcome } => {
                context.outcome = Some(outcome);
                set_hsts(&mut response, context);
                let close = downstream.is_process_shutting_down();
                let sent = Box::pin(reply::send(downstream, response, context.request_id.as_str(), close)).await;
                sent.map_err(|error| {
                    context.outcome = None;
                    error.into_down()
                })?;
                Ok(REPLIED)
            }
        }
    }

    async fn request_body_filter(
        &self,
        downstream: &mut HttpSession,
        body: &mut Option<Bytes>,
        is_whole: bool,
        context: &mut Self::CTX,
    ) -> Result<()> {
        if context.is_upgrade {
            return Ok(()); // after the upgrade these are messages without end, not a body
        }
        context.body_bytes += body.as_ref().map_or(0, |bytes| bytes.len() as u64);
        if context.body_bytes_max < context.body_bytes {
            return Err(Error::explain(ErrorType::HTTPStatus(413), "request body over the limit").into_down());
        }
        // A body that is here, or that is sent again to another backend, has no rate any more.
        if is_whole {
            return Ok(());
        }
        // On an HTTP/2 stream both sides may speak while the other does (gRPC), and need not say much.
        if downstream.as_downstream().is_custom() && has_begun(downstream) {
            return Ok(());
        }
        let late = context.started.elapsed().saturating_sub(self.body_timeout).as_millis() as u64;
        if context.body_bytes < self.body_rate_min.saturating_mul(late) / 1000 {
            return Err(Error::explain(ErrorType::ReadTimedout, "request body under the least rate").into_down());
        }
        Ok(())
    }

    async fn upstream_peer(&self, downstream: &mut HttpSession, context: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        let Some(found) = survived(self.lease(downstream, context)).await else { return Err(our_mistake(context)) };
        let found = found?;
        let transport = context.pool.as_ref().and_then(|pool| context.rules.transports.get(pool.name()));
        let (Some(pool), Some(transport), Some((lease, address))) = (&context.pool, transport, found) else {
            let why = *context.failure.get_or_insert(Rejection::NoBackend);
            return Err(
                Error::explain(ErrorType::HTTPStatus(why.status().as_u16()), "no backend left to try").into_up()
            );
        };
        let metrics = &self.observer.metrics;
        let attempts = || metrics.backend_requests.with_label_values(&[pool.name(), lease.name()]);
        lease.attempts.get_or_init(attempts).inc();
        let timeouts = pool.timeouts();
        let mut peer = transport.peer(&lease, address, context.is_upgrade);
        // Where a backend's word counts, it comes over no connection on which another route may have left something.
        peer.group_key ^= context.route.as_ref().map_or(0, |route| route.directives.number());
        let options = &mut peer.options;
        let pause = if context.is_upgrade { timeouts.websocket } else { timeouts.read };
        options.connection_timeout = Some(timeouts.connect);
        options.total_connection_timeout = Some(timeouts.connect);
        options.read_timeout = Some(pause);
        options.write_timeout = Some(timeouts.write);
        options.idle_timeout = Some(timeouts.idle);
        if let Some(trace) = &mut context.trace {
            trace.note_attempt(lease.name());
        }
        context.backend = Some(lease);
        context.attempts = context.attempts.saturating_add(1);
        Ok(Box::new(peer))
    }

    /// Nothing was sent yet, so another backend may be tried whatever the method.
    fn fail_to_connect(
        &self,
        _: &mut HttpSession,
        _: &HttpPeer,
        context: &mut Self::CTX,
        mut error: Box<Error>,
    ) -> Box<Error> {
        if transport::is_our_own_want(&error) {
            // Nobody was asked, so no backend is the worse for it.
            if let Some(lease) = &mut context.backend {
                lease.end();
            }
        } else {
            self.note_failure(context, Failure::Connect, &error);
        }
        if let Some(trace) = &mut context.trace {
            trace.end_attempt();
        }
        context.failure = Some(Rejection::NoBackend);
        error.set_retry(true);
        error
    }

    async fn connected_to_upstream(
        &self,
        _: &mut HttpSession,
        _reused: bool,
        _: &HttpPeer,
        _: std::os::unix::io::RawFd,
        _: Option<&Digest>,
        context: &mut Self::CTX,
    ) -> Result<()> {
        context.failure = None;
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        downstream: &mut HttpSession,
        upstream: &mut RequestHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        // What of the body was sent to an earlier attempt comes by once more.
        context.body_bytes = 0;
        let written = survived(async {
            forward::request(upstream, context, &self.cookies);
            forward::ask_for_trailers(upstream, downstream.req_header())
        });
        written.await.unwrap_or_else(|| Err(our_mistake(context)))
    }

    async fn response_filter(
        &self,
        downstream: &mut HttpSession,
        response: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        let notable = Notable::of(&response.headers);
        if let Some(problem) = forward::problem(response, &notable, context.is_upgrade) {
            context.failure = Some(Rejection::BackendFailed);
            return Err(Error::explain(ErrorType::InvalidHTTPHeader, problem).into_up());
        }
        if !response.status.is_informational() || is_upgraded(response) {
            self.note_response(context, response.status.as_u16());
            if let Some(trace) = &mut context.trace {
                trace.note_answer(response.status.as_u16());
            }
        }
        context.status = response.status.as_u16();
        // For a client of HTTP/1.0 the end of the connection ends what has no length.
        let ends_with_connection = downstream.req_header().version == http::Version::HTTP_10
            && !response.headers.contains_key(header::CONTENT_LENGTH);
        if ends_with_connection || downstream.is_process_shutting_down() {
            downstream.set_keepalive(None);
        }
        if response.status == http::StatusCode::SWITCHING_PROTOCOLS
            && let Some(pool) = &context.pool
        {
            downstream.set_read_timeout(Some(pool.timeouts().websocket));
            context.frames = Some(Frames::default());
        }
        let mut cookies = Vec::new();
        if notable.directives {
            let fields = directives::taken_out_of(response);
            // Boxed, because every response would carry along what only these need.
            match survived(Box::pin(self.obey(fields, downstream, response, context))).await {
                Some(obeyed) => cookies = obeyed?,
                None => return Err(our_mistake(context)),
            }
        }
        forward::response(response, &notable, context, &self.cookies)?;
        directives::add_cookies(response, cookies)
    }

    fn response_body_filter(
        &self,
        _: &mut HttpSession,
        body: &mut Option<Bytes>,
        _: bool,
        context: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        let is_cut = context.is_cut();
        match (&mut context.frames, &context.in_flight, body) {
            (None, ..) if is_cut => Err(session_ended()),
            (Some(frames), Some(in_flight), Some(bytes)) => {
                if is_cut {
                    bytes.truncate(frames.pass_rest(bytes));
                } else {
                    frames.pass(bytes);
                }
                in_flight.note_amid_frame(!frames.is_between());
                Ok(None)
            }
            (None, ..) | (Some(_), ..) => Ok(None),
        }
    }

    async fn response_trailer_filter(
        &self,
        _: &mut HttpSession,
        trailers: &mut http::HeaderMap,
        _: &mut Self::CTX,
    ) -> Result<Option<Bytes>> {
        forward::trailers(trailers);
        Ok(None)
    }

    /// The connection broke after it was made. Only what may be done twice is tried again, and only while neither
    /// the client has a byte of the response nor we have forgotten a byte of the request (invariant 8).
    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        downstream: &mut HttpSession,
        mut error: Box<Error>,
        context: &mut Self::CTX,
        was_kept: bool,
    ) -> Box<Error> {
        let timed_out = matches!(error.etype(), ErrorType::ReadTimedout | ErrorType::WriteTimedout);
        let backend_failed = *error.esource() == ErrorSource::Upstream;
        let is_unseen = backend_failed && was_refused_unseen(&error);
        // To close a connection that had been idle, or to have had enough of it, is a backend's right.
        let is_stale = is_unseen || backend_failed && was_kept && was_closed(&error) && !has_begun(downstream);
        if backend_failed {
            let failure = if timed_out { Failure::Timeout } else { Failure::Response };
            // Sockets end as they like.
            let is_socket = downstream.response_written().is_some_and(is_upgraded);
            if is_stale || is_socket {
                self.count_backend_failure(context, failure);
            } else {
                self.note_failure(context, failure, &error);
            }
            context.failure = Some(if timed_out { Rejection::BackendTimeout } else { Rejection::BackendFailed });
        }
        if let Some(lease) = &mut context.backend {
            lease.end();
        }
        if let Some(trace) = &mut context.trace {
            trace.end_attempt();
        }
        let may_repeat = backend_failed
            && !timed_out
            && !has_begun(downstream)
            && (downstream.req_header().method.is_idempotent() || is_unseen)
            && !downstream.as_ref().retry_buffer_truncated()
            && !context.is_upgrade;
        if is_stale {
            // It is no worse than the others.
            context.tried.forget_last();
        }
        // A request on which backends die may be what kills them: it does not meet all of them.
        let repeats_max = if is_stale { REPEATS_AFTER_KEPT_MAX } else { REPEATS_MAX };
        error.set_retry(may_repeat && context.repeats < repeats_max);
        context.repeats += 1;
        error
    }

    async fn fail_to_proxy(&self, downstream: &mut HttpSession, error: &Error, context: &mut Self::CTX) -> FailToProxy {
        let rejection = rejection(error, context);
        let is_socket = downstream.response_written().is_some_and(is_upgraded);
        let outcome = match rejection {
            _ if context.is_cut() && has_begun(downstream) => Outcome::EndedWithSession,
            _ if context.is_cut() => Outcome::Rejected(Rejection::Unauthenticated),
            Some(Rejection::BackendTimeout | Rejection::BodyTooSlow) if is_socket => Outcome::IdleSocket,
            None => Outcome::ClientGone,
            Some(_) if has_begun(downstream) => Outcome::Truncated,
            Some(rejection) => Outcome::Rejected(rejection),
        };
        context.outcome = Some(outcome);
        let backend = context.backend.as_ref().map_or("-", |lease| lease.name());
        let label = outcome.label();
        // What clients do is their business, and they could fill the log with it.
        if *error.esource() == ErrorSource::Downstream
            || [Outcome::IdleSocket, Outcome::EndedWithSession].contains(&outcome)
        {
            tracing::debug!(request_id = context.request_id.as_str(), outcome = label, cause = %error, "request ended early");
        } else {
            tracing::warn!(request_id = context.request_id.as_str(), outcome = label, backend, cause = %error, "request failed");
        }
        let mut error_code = 0;
        if let Outcome::Rejected(rejection) = outcome {
            error_code = rejection.status().as_u16();
            let rules = &context.rules;
            let reader = Reader::of(downstream.req_header(), &rules.login, context.request_id.as_str());
            let mut response = rejection.response(&reader);
            set_hsts(&mut response, context);
            if let Err(error) = reply::send(downstream, response, context.request_id.as_str(), true).await {
                tracing::debug!(request_id = context.request_id.as_str(), %error, "client left before its error page");
            }
        }
        if is_socket && outcome == Outcome::EndedWithSession && !is_stuck(error) {
            Box::pin(say_goodbye(downstream, context)).await;
        }
        FailToProxy { error_code, can_reuse_downstream: false }
    }

    async fn logging(&self, downstream: &mut HttpSession, error: Option<&Error>, context: &mut Self::CTX) {
        let status = downstream.response_written().map_or(0, |response| response.status.as_u16());
        let outcome = context.outcome.unwrap_or(match error {
            None => Outcome::Forwarded,
            Some(error) => rejection(error, context).map_or(Outcome::ClientGone, |_| Outcome::Truncated),
        });
        if let Some(lease) = &mut context.backend {
            lease.end();
        }
        context.record(status, outcome, downstream.body_bytes_read(), downstream.body_bytes_sent());
    }

    /// We log each failure once, in `fail_to_proxy`, without the request's query.
    fn suppress_error_log(&self, _: &HttpSession, _: &Self::CTX, _: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(&self, _: &HttpSession, _: &Self::CTX, _: &Error, _: ProxyWarnLogContext) -> bool {
        true
    }
}

impl Gateway {
    /// Whether somebody who has this session may still come in, and to this place. How strong and how recent a login is
    /// was asked when the request came, and a place without a route is nobody's to refuse.
    pub fn admits(&self, record: &Record, place: &Place) -> bool {
        let rules = self.rules.load();
        let who = user_of(record, &rules);
        if record.method != LoginMethod::Anonymous && !matches!(who, Who::User(_)) {
            return false;
        }
        let route = rules.routes.find(place.host.to_str().unwrap_or_default(), place.uri.path());
        route.is_none_or(|route| matches!(admit(route.access, &route.groups, who, true), Step::Forward(_)))
    }

    /// The first facts: whose connection, what address, which id.
    fn open(&self, downstream: &mut HttpSession, context: &mut RequestContext, request: Request) {
        let Request { connection, in_flight } = request;
        context.in_flight = Some(in_flight);
        forward::forget_case(downstream.req_header_mut());
        let request = downstream.req_header();
        let headers = &request.headers;
        context.line = Some(RequestLine {
            method: request.method.clone(),
            uri: request.uri.clone(),
            host: headers.get(header::HOST).cloned().unwrap_or(HeaderValue::from_static("-")),
        });
        context.trusted_peer = self.trusts(connection.peer);
        context.client = connection.peer;
        let mut given_id = None;
        if context.trusted_peer {
            context.client = self.client_address(headers, connection.peer);
            given_id = headers.get("x-request-id").and_then(RequestId::given);
        }
        context.request_id = given_id.unwrap_or_else(RequestId::next);
        let begin = |spans| Trace::begin(&downstream.req_header().headers, context.started, spans);
        context.trace = self.observer.spans.as_ref().and_then(begin).map(Box::new);
        context.connection = Some(connection);
        downstream.set_read_timeout(Some(self.body_timeout));
        downstream.set_write_timeout(Some(self.write_timeout));
        if downstream.req_header().version == http::Version::HTTP_10 {
            downstream.downstream_modules_ctx = chunks::taken_out();
        }
    }

    /// Route, session, admission: the way to a backend, or our own answer.
    async fn decide(&self, downstream: &mut HttpSession, context: &mut RequestContext) -> Decision {
        let rules = Arc::clone(&context.rules);
        let Some(connection) = context.connection.clone() else {
            return reject(downstream, context, Rejection::Internal);
        };
        if let Some(port) = connection.listener.redirect_to_port {
            return redirect(downstream.req_header(), port);
        }
        if rules.login.owns(downstream.req_header().uri.path()) {
            // Boxed, because every request would carry along what only these need.
            return Box::pin(self.log_in_or_out(downstream, context, &rules.login, &connection)).await;
        }
        let request = downstream.req_header();
        let Some(route) = rules.routes.find(host(request), request.uri.path()) else {
            return reject(downstream, context, Rejection::NoRoute);
        };
        context.route = Some(Arc::clone(route));
        context.pool = rules.pools.get(&route.pool).cloned();
        context.is_upgrade = request.headers.contains_key(header::UPGRADE);
        context.body_bytes_max = route.body_bytes_max;
        if content_length(request).is_some_and(|length| route.body_bytes_max < length) {
            return reject(downstream, context, Rejection::BodyTooLarge);
        }

        let who = match route.access {
            Access::Public => Who::Unasked,
            Access::Optional | Access::Required if route.basic && Login::is_basic(&request.headers) => {
                // Boxed, because every request would carry along what only scripts need.
                Box::pin(self.identify_script(request, context, route, &connection)).await
            }
            Access::Optional | Access::Required => self.resolve(request, context, route, &connection).await,
        };
        let is_enough = route.demand.is_none() || is_enough(&route.demand, context, &who);
        let identity = match admit(route.access, &route.groups, who, is_enough) {
            Step::Forward(identity) => identity,
            Step::Reply(Rejection::Unauthenticated) if wants_page(request) => {
                return send_to_login(request, context, &rules.login, &connection);
            }
            Step::Reply(Rejection::StepUp) if wants_page(request) => {
                return step_up(request, context, &rules.login, route, &connection);
            }
            Step::Reply(rejection) => return reject(downstream, context, rejection),
        };
        let asks_for_session = route.access != Access::Public;
        if context.is_upgrade && asks_for_session && !is_own_origin(request, &connection, &route.websocket_origins) {
            return reject(downstream, context, Rejection::ForeignOrigin);
        }
        context.identity = identity;
        context.branch = route.branch_for(context.identity.as_deref().map(Deref::deref));
        if let Some(branch) = context.branch() {
            context.pool = rules.pools.get(&branch.pool).cloned();
        }
        if let Some(in_flight) = &context.in_flight {
            let whose = match (context.told_session(), &context.line) {
                (Some(session), Some(RequestLine { host, uri, .. })) => {
                    Whose::Session(session.key.clone(), Place { host: host.clone(), uri: uri.clone() })
                }
                (None, _) | (_, None) => Whose::Nobody,
            };
            in_flight.belongs_to(whose, route.stream_touch);
        }
        Decision::Forward
    }

    /// Whose name and password are these? Of a browser they do not count: then the cookie does.
    async fn identify_script(
        &self,
        request: &RequestHeader,
        context: &mut RequestContext,
        route: &Route,
        connection: &Connection,
    ) -> Who {
        context.keeps_authorization = true;
        let rules = Arc::clone(&context.rules);
        match rules.login.script(&request.headers, context.client).await {
            Script::Nobody => self.resolve(request, context, route, connection).await,
            Script::User(user) => {
                context.identity = Some(Arc::clone(&user));
                Who::User(user)
            }
            Script::Refused(retry_after) => {
                context.retry_after = retry_after;
                Who::Impostor
            }
            Script::Unknown => Who::Unknown,
        }
    }

    /// Who has this cookie?
    async fn resolve(
        &self,
        request: &RequestHeader,
        context: &mut RequestContext,
        route: &Route,
        connection: &Connection,
    ) -> Who {
        let cookie = &connection.listener.cookie;
        let Some(id) = cookie.find(&request.headers) else { return Who::Nobody };
        let has_fallback = route.fallback && self.sessions.has_fallback();
        let usage = Use {
            client: context.client,
            touch: route.touch && !self.is_silent(request),
            route: Some(&route.name),
            fallback: if has_fallback { cookie.find_fallback(&request.headers) } else { None },
            is_fresh: route.directives.attributes,
        };
        let Observer { metrics, .. } = &*self.observer;
        let began = context.trace.is_some().then(Instant::now);
        let (result, who) = match self.sessions.resume(&id, &usage).await {
            Ok(Resumed::Live(session, source)) => {
                let mut who = user_of(&session.record, &context.rules);
                if let Who::User(identity) = &who {
                    context.identity = Some(Arc::clone(identity)); // for the log, also of who is not let in
                }
                if has_fallback && matches!(source, Source::Copy | Source::Store) {
                    let renewed = self.sessions.renewed_fallback(&session, usage.fallback);
                    context.fallback_cookie = renewed.map(|(value, life)| cookie.set_fallback(value, life));
                }
                if matches!(who, Who::User(_)) && session.record.login.is_some() {
                    // Boxed, because every request would carry along what only these need.
                    if let Err(ending) = Box::pin(self.look_after_tokens(context, route, &id, &session)).await {
                        context.session_is_gone = ending != Some(Ending::Replaced);
                        context.notice = Notice::of(ending);
                        who = Who::Nobody;
                    }
                }
                context.session = Some(session);
                context.source = Some(source);
                (source.label(), who)
            }
            Ok(Resumed::Gone(ending)) => {
                // Where a login has replaced it, the browser has, or is about to have, a cookie that is none of ours to take.
                context.session_is_gone = ending != Some(Ending::Replaced);
                context.notice = Notice::of(ending);
                if ending.is_none() {
                    metrics.session_guesses.with_label_values(&["unknown"]).inc();
                }
                ("none", Who::Nobody)
            }
            Ok(Resumed::TooManyGuesses(_)) => {
                metrics.session_guesses.with_label_values(&["refused"]).inc();
                ("refused", Who::Guesser)
            }
            Err(StoreError::Unreadable) => ("unreadable", Who::Nobody),
            Err(error) => {
                metrics.store_errors.with_label_values(&["load"]).inc();
                tracing::debug!(
                    request_id = context.request_id.as_str(),
                    error = &error as &dyn std::error::Error,
                    "session not resolved"
                );
                ("unavailable", Who::Unknown)
            }
        };
        metrics.note_resolved(result, context.started.elapsed().as_secs_f64());
        if let (Some(trace), Some(began)) = (&mut context.trace, began) {
            trace.note_resolved(began, result);
        }
        who
    }

    /// The provider's tokens in this session: renewed when they are about to end, and one of them taken along where the
    /// route says so. Or the session is gone, and perhaps why.
    async fn look_after_tokens(
        &self,
        context: &mut RequestContext,
        route: &Route,
        id: &SessionId,
        session: &Session,
    ) -> Result<(), Option<Ending>> {
        if context.rules.login.are_tokens_due(&session.key, &session.record) {
            let (rules, id, under_way) = (Arc::clone(&context.rules), id.clone(), self.renewals.subscribe());
            tokio::spawn(async move {
                rules.login.renew_tokens(&id).await;
                drop(under_way);
            });
        }
        let Some(name) = &route.access_token else { return Ok(()) };
        let record = context.rules.login.with_live_token(&session.key, &session.record).await?;
        let Some(token) = context.rules.login.access_token(id, &record) else { return Ok(()) };
        let value = if *name == header::AUTHORIZATION { format!("Bearer {token}") } else { token };
        context.access_token = HeaderValue::try_from(value).ok().map(|mut value| {
            value.set_sensitive(true);
            value
        });
        Ok(())
    }

    /// One of our own endpoints.
    async fn log_in_or_out(
        &self,
        downstream: &mut HttpSession,
        context: &RequestContext,
        login: &Login,
        connection: &Connection,
    ) -> Decision {
        let body = if downstream.req_header().method == Method::POST {
            match self.read_form(downstream).await {
                Ok(body) => body,
                Err(rejection) => return reject(downstream, context, rejection),
            }
        } else {
            Bytes::new()
        };
        let request = downstream.req_header();
        let origin = origin(request, connection);
        let response = login
            .answer(LoginRequest {
                method: &request.method,
                path: request.uri.path(),
                query: request.uri.query(),
                headers: &request.headers,
                body,
                client: context.client,
                is_silent: self.is_silent(request),
                origin: &origin,
                cookie: &connection.listener.cookie,
                secure: connection.listener.scheme == "https",
                request_id: context.request_id.as_str(),
            })
            .await;
        Decision::Reply { response, outcome: Outcome::Answered }
    }

    /// Whether the page that asks says that nobody is there.
    fn is_silent(&self, request: &RequestHeader) -> bool {
        self.silent_header.as_ref().is_some_and(|name| request.headers.contains_key(name))
    }

    /// The body of a form, whole, capped in size and in time.
    async fn read_form(&self, downstream: &mut HttpSession) -> Result<Bytes, Rejection> {
        let bytes_max = Login::FORM_BYTES_MAX;
        if content_length(downstream.req_header()).is_some_and(|length| (bytes_max as u64) < length) {
            return Err(Rejection::BodyTooLarge);
        }
        if is_expecting_continue(downstream.req_header()) {
            say_continue(downstream).await.map_err(|_| Rejection::BodyTooSlow)?;
        }
        let unread = |error: Box<Error>| match error.etype() {
            ErrorType::ReadTimedout => Rejection::BodyTooSlow,
            _ => Rejection::BodyMalformed,
        };
        let read = async {
            let mut body = BytesMut::new();
            while let Some(chunk) = downstream.read_request_body().await.map_err(unread)? {
                if bytes_max < body.len() + chunk.len() {
                    return Err(Rejection::BodyTooLarge);
                }
                body.extend_from_slice(&chunk);
            }
            Ok(body.freeze())
        };
        tokio::time::timeout(self.body_timeout, read).await.unwrap_or(Err(Rejection::BodyTooSlow))
    }

    fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(&peer.to_canonical()))
    }

    /// The nearest address that no trusted proxy has: what is to the left of it anybody may have written.
    fn client_address(&self, headers: &http::HeaderMap, peer: IpAddr) -> IpAddr {
        let mut client = peer;
        // What cannot be read is a hop all the same: nothing behind it is believed.
        let fields = headers.get_all("x-forwarded-for").iter().map(|value| value.to_str().unwrap_or("unreadable"));
        let hops: Vec<_> = fields.flat_map(|field| field.split(',')).collect();
        for hop in hops.iter().rev() {
            let Ok(address) = hop.trim().parse::<IpAddr>() else { break };
            client = address.to_canonical();
            if !self.trusts(client) {
                break;
            }
        }
        client
    }

    /// A place at a backend for the next attempt. None when there is no backend, or no more attempts: then
    /// `context.failure` says why, unless nobody was there in the first place.
    ///
    /// # Errors
    /// When nobody waits for the answer any more.
    async fn lease(
        &self,
        downstream: &mut HttpSession,
        context: &mut RequestContext,
    ) -> Result<Option<(Lease, SocketAddr)>> {
        let key = hash_key(downstream.req_header(), context);
        let RequestContext { pool, tried, failure, attempts, in_flight, .. } = context;
        let Some(pool) = pool else { return Ok(None) };
        let metrics = &self.observer.metrics;
        let queued = |result, waited: Duration| {
            metrics.queue_seconds.with_label_values(&[pool.name(), result]).observe(waited.as_secs_f64());
        };
        let lease = match pool.take(key, tried, || has_left(downstream, in_flight.as_deref())).await {
            Ok(lease) => lease,
            Err(Unavailable::Nobody) => return Ok(None),
            Err(Unavailable::Full) => {
                queued("full", Duration::ZERO);
                failure.get_or_insert(Rejection::Overloaded);
                return Ok(None);
            }
            Err(Unavailable::Left(waited)) => {
                queued("left", waited);
                return Err(Error::explain(ErrorType::ConnectionClosed, "nobody waits any more").into_down());
            }
            Err(Unavailable::TimedOut(waited)) => {
                queued("timeout", waited);
                failure.get_or_insert(Rejection::Overloaded);
                return Ok(None);
            }
        };
        if !lease.waited.is_zero() {
            queued("served", lease.waited);
        }
        if *attempts != 0 {
            let is_within_budget = pool.may_retry();
            let result = if is_within_budget { "sent" } else { "over_budget" };
            metrics.retries.with_label_values(&[pool.name(), result]).inc();
            if !is_within_budget {
                return Ok(None);
            }
        }
        Ok(lease.address().map(|address| (lease, address)))
    }

    /// The backend failed the request: that is counted, and it may be passed over from now on.
    fn note_failure(&self, context: &mut RequestContext, failure: Failure, cause: &dyn std::fmt::Display) {
        self.count_backend_failure(context, failure);
        let (Some(pool), Some(lease)) = (&context.pool, &mut context.backend) else { return };
        if let Some(time) = pool.note_failure(lease, failure) {
            self.observer.metrics.backend_ejections.with_label_values(&[pool.name(), lease.name()]).inc();
            tracing::warn!(pool = pool.name(), backend = lease.name(), ?time, %cause, "backend fails, and is passed over");
        }
        if failure == Failure::Connect {
            lease.end();
        }
    }

    /// The head of a response has come that can be passed on.
    fn note_response(&self, context: &mut RequestContext, status: u16) {
        let (Some(pool), Some(lease)) = (&context.pool, &mut context.backend) else { return };
        if pool.is_failure(status) {
            self.note_failure(context, Failure::Status(status), &status);
        } else if pool.note_success(lease) {
            tracing::info!(pool = pool.name(), backend = lease.name(), "backend is back");
        }
    }

    fn count_backend_failure(&self, context: &RequestContext, failure: Failure) {
        if let (Some(pool), Some(lease)) = (&context.pool, &context.backend) {
            let labels = [pool.name(), lease.name(), failure.label()];
            self.observer.metrics.backend_failures.with_label_values(&labels).inc();
        }
    }
}

impl Refusals for Gateway {
    fn refused(&self, connection: &Connection, refusal: &Refusal) -> String {
        let (request_id, now) = (RequestId::next(), Instant::now());
        let outcome = Outcome::Refused.label();
        if let Some(spans) = &self.observer.spans {
            // What it says of its trace is no more to be relied on than the rest of it.
            let trace = Trace::begin(&http::HeaderMap::new(), now, spans);
            let (status, reason) = (refusal.status.as_u16(), Some(refusal.reason));
            let end = End { at: now, method: None, route: None, pool: None, status, outcome, reason };
            if let Some(recorded) = trace.and_then(|trace| trace.finish(&end)) {
                spans.push(recorded);
            }
        }
        self.observer.metrics.requests.with_label_values(&["-", refusal.status.as_str(), outcome]).inc();
        self.observer.access_log.write(&Entry {
            time: Timestamp::at(now),
            request_id: request_id.as_str(),
            client: connection.forwarded_for.to_str().unwrap_or("-"),
            method: "-",
            host: "-",
            path: "",
            status: refusal.status.as_u16(),
            outcome,
            reason: Some(refusal.reason),
            route: None,
            split: None,
            backend: None,
            user: None,
            session: None,
            session_source: None,
            bytes_in: 0,
            bytes_out: 0,
            duration: Duration::ZERO,
        });
        request_id.as_str().to_owned()
    }
}

/// Whether a backend has said that it did not begin with the request (RFC 9113, sections 6.8 and 8.7).
fn was_refused_unseen(error: &Error) -> bool {
    let Some(cause) = error.root_cause().downcast_ref::<h2::Error>() else { return false };
    let is_refused = cause.is_reset() && cause.reason() == Some(h2::Reason::REFUSED_STREAM);
    let is_leaving = cause.is_go_away() && cause.reason() == Some(h2::Reason::NO_ERROR);
    cause.is_remote() && (is_refused || is_leaving)
}

/// Whether the connection to a backend has ended; and not the backend's patience, or its good manners.
fn was_closed(error: &Error) -> bool {
    let cause = error.root_cause();
    let of_socket = cause.downcast_ref::<h2::Error>().map_or_else(|| cause.downcast_ref(), h2::Error::get_io);
    let has_ended = |cause: &io::Error| {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof};
        // Timed out: by the kernel, as nobody acknowledged anything.
        matches!(
            cause.kind(),
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut | UnexpectedEof
        )
    };
    *error.etype() == ErrorType::ConnectionClosed || of_socket.is_some_and(has_ended)
}

/// What `balance = "hash"` goes by.
fn hash_key(request: &RequestHeader, context: &RequestContext) -> u64 {
    let Some(pool) = context.pool.as_ref().filter(|pool| pool.balance() == Balance::Hash) else { return 0 };
    let own = match pool.hash_by() {
        HashBy::User => context.identity.as_ref().map(|known| known.user.as_bytes()),
        HashBy::Header(name) => request.headers.get(name).map(HeaderValue::as_bytes),
        HashBy::Client => None,
    };
    match (own, context.client) {
        (Some(own), _) => balance::hash(own),
        (None, IpAddr::V4(address)) => balance::hash(&address.octets()),
        (None, IpAddr::V6(address)) => balance::hash(&address.octets()),
    }
}

/// Who a live session is now: of a user of the users file, what the file says today.
fn user_of(record: &Record, rules: &Rules) -> Who {
    match record.method {
        LoginMethod::Password => {
            let users = rules.login.users();
            let current = || users.current(&record.identity.user).cloned();
            // Nobody: removed or disabled since.
            record.known.get(users.edition(), current).map_or(Who::Nobody, Who::User)
        }
        LoginMethod::Oidc => {
            let vouched_for = || rules.login.vouched_for(record);
            record.known.get(rules.login.users().edition(), vouched_for).map_or(Who::Nobody, Who::User)
        }
        LoginMethod::Backend => {
            let known = || Some(Arc::new(Known::new(record.identity.clone())));
            record.known.get(rules.login.users().edition(), known).map_or(Who::Nobody, Who::User)
        }
        LoginMethod::Anonymous => Who::Nobody,
    }
}

/// Whether this login is what the route demands.
fn is_enough(demand: &Demand, context: &RequestContext, who: &Who) -> bool {
    match &context.session {
        Some(session) => !demand.exceeds(&session.record, unix_now() / 1000),
        // A script has proved who it is just now, and by nothing but a password.
        None => demand.acr.is_empty() || !matches!(who, Who::User(_)),
    }
}

/// To the same place over TLS; the method and the body go along (RFC 9110, section 15.4.9).
fn redirect(request: &RequestHeader, port: u16) -> Decision {
    let host = host(request);
    let name_end = host.rfind(']').map_or(0, |bracket| bracket + 1);
    let name = host[name_end..].find(':').map_or(host, |colon| &host[..name_end + colon]);
    let port = if port == HTTPS_PORT { String::new() } else { format!(":{port}") };
    let target = request.uri.path_and_query().map_or("/", |target| target.as_str());
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = http::StatusCode::PERMANENT_REDIRECT;
    if let Ok(location) = HeaderValue::try_from(format!("https://{name}{port}{target}")) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Decision::Reply { response, outcome: Outcome::Answered }
}

fn set_hsts(response: &mut Response<Bytes>, context: &RequestContext) {
    if let Some(hsts) = context.hsts() {
        response.headers_mut().insert(header::STRICT_TRANSPORT_SECURITY, hsts);
    }
}

/// To a better login at the provider, and back.
fn step_up(
    request: &RequestHeader,
    context: &RequestContext,
    login: &Login,
    route: &Route,
    connection: &Connection,
) -> Decision {
    let Some(session) = &context.session else { return send_to_login(request, context, login, connection) };
    let response = if request.method == Method::POST {
        login.form_step_up(&request.headers, &origin(request, connection), &route.demand, &session.record)
    } else {
        let target = request.uri.path_and_query().map_or("/", |target| target.as_str());
        login.step_up(target, &route.demand, &session.record)
    };
    Decision::Reply { response, outcome: Outcome::LoginRedirect }
}

/// To the login page and back. The cookie goes only when the store said that its session is gone (invariant 4).
fn send_to_login(
    request: &RequestHeader,
    context: &RequestContext,
    login: &Login,
    connection: &Connection,
) -> Decision {
    let cookie = &connection.listener.cookie;
    let mut response = if request.method == Method::POST {
        login.form_redirect(&request.headers, &origin(request, connection))
    } else {
        let target = request.uri.path_and_query().map_or("/", |target| target.as_str());
        login.login_redirect(target, context.notice)
    };
    if context.session_is_gone {
        response.headers_mut().append(header::SET_COOKIE, cookie.clear());
        if cookie.find_fallback(&request.headers).is_some() {
            response.headers_mut().append(header::SET_COOKIE, cookie.clear_fallback());
        }
    }
    Decision::Reply { response, outcome: Outcome::LoginRedirect }
}

fn reject(downstream: &HttpSession, context: &RequestContext, rejection: Rejection) -> Decision {
    let (request, login) = (downstream.req_header(), &context.rules.login);
    let mut response = rejection.response(&Reader::of(request, login, context.request_id.as_str()));
    // To whom a password is not enough, it is no use to ask for one.
    if matches!(rejection, Rejection::Unauthenticated | Rejection::BadCredentials)
        && context.route.as_ref().is_some_and(|route| route.basic)
        && let Some(challenge) = login.basic_challenge(&request.headers)
    {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.clone());
    }
    if let Some(wait) = context.retry_after {
        set_retry_after(&mut response, wait);
    }
    Decision::Reply { response, outcome: Outcome::Rejected(rejection) }
}

/// What an error of pingora's means to the client; nothing when it is gone.
fn rejection(error: &Error, context: &RequestContext) -> Option<Rejection> {
    match error.esource() {
        ErrorSource::Downstream => match error.etype() {
            ErrorType::HTTPStatus(413) => Some(Rejection::BodyTooLarge),
            ErrorType::ReadTimedout => Some(Rejection::BodyTooSlow),
            _ => None,
        },
        ErrorSource::Upstream => Some(context.failure.unwrap_or(Rejection::BackendFailed)),
        ErrorSource::Internal | ErrorSource::Unset => Some(context.failure.unwrap_or(Rejection::Internal)),
    }
}

/// The guard has made sure that there is exactly one, and that it is ASCII.
fn host(request: &RequestHeader) -> &str {
    request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default()
}

/// Our own, as the browser sees it.
fn origin(request: &RequestHeader, connection: &Connection) -> String {
    format!("{}://{}", connection.listener.scheme, host(request))
}

/// Answers `100 Continue`. Pingora takes it for a sign that the connection ends.
async fn say_continue(downstream: &mut HttpSession) -> Result<()> {
    let keepalive = downstream.get_keepalive();
    downstream.write_continue_response().await.map_err(|error| error.into_down())?;
    downstream.set_keepalive(keepalive);
    Ok(())
}

/// Whether the client has the beginning of a final response: then it cannot have another.
fn has_begun(downstream: &HttpSession) -> bool {
    downstream.response_written().is_some_and(|response| !response.status.is_informational() || is_upgraded(response))
}

/// Whether nobody waits for the answer any more: the client has closed, or taken its request back, or its session has
/// ended. Looks without taking a byte of what the client may have sent already.
fn has_left(downstream: &mut HttpSession, in_flight: Option<&InFlight>) -> bool {
    if in_flight.is_some_and(InFlight::is_cut) {
        return true;
    }
    let downstream = downstream.as_downstream_mut();
    if downstream.is_custom() {
        let word = pin!(downstream.read_body_or_idle(true)); // as if there were no body: it is left where it is
        return word.poll(&mut task::Context::from_waker(Waker::noop())).is_ready();
    }
    let socket = downstream.digest().and_then(|digest| digest.socket_digest.as_ref());
    socket.and_then(|socket| socket.tcp_info()).is_some_and(|tcp| matches!(tcp.tcpi_state, TCP_CLOSE | TCP_CLOSE_WAIT))
}

/// For what [`survived`] gave nothing: no other backend is asked, and the client gets 500.
fn our_mistake(context: &mut RequestContext) -> Box<Error> {
    context.failure = Some(Rejection::Internal);
    Error::explain(ErrorType::InternalError, "a mistake of ours, see standard error")
}

fn session_ended() -> Box<Error> {
    Error::explain(ErrorType::ReadError, "the session has ended").into_down()
}

/// Whether the client has perhaps only a part of what was last written.
fn is_stuck(error: &Error) -> bool {
    matches!(error.etype(), ErrorType::WriteError | ErrorType::WriteTimedout)
}

/// Ends a WebSocket for good, and waits a moment for the client to do the same: closing on unread bytes resets the
/// connection, and the reset can overtake the close frame.
async fn say_goodbye(downstream: &mut HttpSession, context: &RequestContext) {
    if context.frames.as_ref().is_none_or(|frames| !frames.is_between()) {
        return;
    }
    context.leave();
    if context.frames.as_ref().is_some_and(|frames| !frames.is_closed()) {
        let frame = Bytes::from_static(websocket::SESSION_ENDED);
        if downstream.write_response_body(Some(frame), true).await.is_err() {
            return;
        }
    }
    downstream.as_downstream_mut().shutdown().await;
    let farewell = async { while let Ok(Some(_)) = downstream.read_request_body().await {} };
    let _ = tokio::time::timeout(reply::LINGER, farewell).await;
}

fn is_upgraded(response: &ResponseHeader) -> bool {
    response.status == http::StatusCode::SWITCHING_PROTOCOLS
}

fn content_length(request: &RequestHeader) -> Option<u64> {
    request.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn wants_page(request: &RequestHeader) -> bool {
    Login::wants_page(&request.method, &request.headers)
}

/// The guard has made sure that nothing else is expected.
fn is_expecting_continue(request: &RequestHeader) -> bool {
    request.version != http::Version::HTTP_10 && request.headers.contains_key(header::EXPECT)
}

/// Browsers always send `Origin` with a WebSocket handshake, and with it the user's cookie, whatever page asks
/// (RFC 6455, section 10.2). Who sends none is no browser.
fn is_own_origin(request: &RequestHeader, connection: &Connection, others: &[String]) -> bool {
    let mut origins = request.headers.get_all(header::ORIGIN).iter();
    let (origin, further) = (origins.next(), origins.next());
    let Some(origin) = origin else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let own = origin.strip_prefix(connection.listener.scheme).and_then(|rest| rest.strip_prefix("://"));
    let is_own = own.is_some_and(|authority| authority.eq_ignore_ascii_case(host(request)));
    further.is_none() && (is_own || others.iter().any(|other| other.eq_ignore_ascii_case(origin)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_request_carries_along_is_small() {
        fn bytes_of<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = bytes_of(
            |gateway: &'static Gateway, downstream: &'static mut HttpSession, context: &'static mut RequestContext| {
                gateway.decide(downstream, context)
            },
        );
        assert!(bytes < 1024, "{bytes} bytes are moved and allocated for each");
    }
}
