//! One client connection in HTTP/2: each of its streams becomes a request like any other.
//!
//! Pingora would drive the connection by itself; but then nobody hears of what it refuses, a body may take for ever,
//! `Expect: 100-continue` is not answered, and a client that takes its requests back costs it nothing. So the
//! connection is ours, the guard judges each request before pingora sees it, and what it accepts is handed to pingora's
//! `HttpProxy` as a session of its own (`stream.rs`).
//!
//! What one connection may hold: `limits.streams_max` requests, each with a head of `limits.head_bytes`, one window of
//! unread body (`STREAM_WINDOW_BYTES`) and one buffer of unsent response (`SEND_BUFFER_BYTES`). Floods of frames that are no requests
//! (`PING`, `SETTINGS`, empty `DATA`, `CONTINUATION`) the crate `h2` answers one at a time or ends.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderValue, Request, Response, StatusCode, Uri, header, request};
use pingora::apps::HttpServerApp;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::connection::{HeadRules, Idle, LAST_REQUEST, Line, Refusals, outlasts_its_session, part};
use super::guard::{self, Refusal};
use super::reply;
use super::streams::{MOMENT, Streams};
use stream::Stream;

mod stream;

/// What a client may send of one body before we have read it.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// RFC 9113, section 6.9.1.
const WINDOW_BYTES_MAX: u32 = (1 << 31) - 1;
/// What we keep of one response while the client does not take it.
const SEND_BUFFER_BYTES: usize = 32 << 10;

/// There are as many connections and requests as there may be.
const BUSY: Refusal = Refusal { status: StatusCode::SERVICE_UNAVAILABLE, reason: "busy" };

/// A connection on which so many more requests came to nothing than were answered ends.
const WASTED_MAX: u64 = 200;
/// So much waste is forgiven with time: a page that takes one back now and then does so for days.
const FORGIVEN_PER_SECOND: u64 = 1;

/// Serves requests on one connection until either side ends it. Each request beyond the first takes one of `slots`, as a
/// connection of its own would.
pub async fn serve<A>(
    line: Line,
    rules: Arc<HeadRules>,
    app: Arc<A>,
    refusals: Arc<dyn Refusals>,
    streams: Arc<Streams>,
    slots: Arc<Semaphore>,
    shutdown: ShutdownWatch,
) where
    A: HttpServerApp + Send + Sync + 'static,
{
    let Line { stream, connection, in_flight: _ } = line; // which is for one request at a time
    let socket = stream.get_socket_digest();
    let handshake = builder(&rules).handshake::<_, Bytes>(stream);
    let Ok(Ok(mut client)) = timeout(rules.timeout, handshake).await else { return };
    let watched = shutdown.clone();
    let mut shutdown = shutdown;
    let mut stopping = pin!(shutdown.wait_for(|shutting_down| *shutting_down));
    let mut idle = pin!(tokio::time::sleep(rules.keepalive));
    let (mut is_ending, mut was_cut_short) = (false, false);
    let mut requests = JoinSet::new();
    let mut waste = Waste::new(Instant::now());
    let mut answered = None;
    // It is the client who says when it has everything, and what was answered just now may still be on its way to it.
    let last_moment = |answered: Option<Instant>| {
        let usual = Instant::now() + LAST_REQUEST;
        answered.map_or(usual, |answered| usual.max(answered + rules.write_timeout))
    };
    // At a stop, others wait for who does not say it: only while there is something that it has not got.
    let is_owed = |unsent: bool| {
        let tcp = || socket.as_ref().and_then(|socket| socket.tcp_info());
        unsent || tcp().is_some_and(|tcp| tcp.tcpi_unacked != 0 || tcp.tcpi_notsent_bytes != 0)
    };
    let (mut end, mut was_owed) = (Instant::now(), false);
    loop {
        let mut is_over = false;
        tokio::select! {
            accepted = client.accept() => {
                let Some(Ok((request, mut respond))) = accepted else { break };
                // Of requests that were taken back, some are still at work.
                let has_room = requests.len() < 2 * rules.streams_max as usize;
                let slot = if requests.is_empty() { None } else { Arc::clone(&slots).try_acquire_owned().ok() };
                match judged(request, &rules) {
                    Ok(request) if has_room && (slot.is_some() || requests.is_empty()) => {
                        let stream = Stream::new(request, respond, &connection);
                        let (app, streams, watched) = (Arc::clone(&app), Arc::clone(&streams), watched.clone());
                        requests.spawn(async move {
                            let was_answered = answer(stream, &app, &streams, &watched).await;
                            drop(slot);
                            was_answered
                        });
                    }
                    Ok(_) => {
                        refusals.refused(&connection, &BUSY);
                        // The client may try again at once, whatever it asked for (RFC 9113, section 8.7).
                        respond.send_reset(Reason::REFUSED_STREAM);
                        is_over = !has_room && waste.one_more(Instant::now());
                    }
                    Err(refusal) => {
                        refuse(respond, &refusal, &refusals.refused(&connection, &refusal));
                        is_over = waste.one_more(Instant::now());
                    }
                }
            }
            Some(was_answered) = requests.join_next() => {
                if was_answered.unwrap_or(false) {
                    waste.make_good();
                } else {
                    is_over = waste.one_more(Instant::now());
                }
                answered = Some(Instant::now());
                if requests.is_empty() && !was_cut_short {
                    (end, was_owed) = (last_moment(answered), true);
                    let pause = if is_ending { LAST_REQUEST } else { rules.keepalive };
                    idle.as_mut().reset(Instant::now() + pause);
                }
            }
            () = &mut idle, if requests.is_empty() => {
                let now = Instant::now();
                if is_ending {
                    let owed = is_owed(client.has_streams());
                    // What has just reached it, it may still be reading.
                    let is_done = *watched.borrow() && !owed && !was_owed;
                    if was_cut_short || end <= now || is_done {
                        break;
                    }
                    was_owed = owed;
                } else {
                    is_ending = true;
                    (end, was_owed) = (last_moment(answered), is_owed(client.has_streams()));
                    client.graceful_shutdown();
                }
                idle.as_mut().reset(end.min(now + LAST_REQUEST));
            }
            _ = &mut stopping, if !is_ending => {
                is_ending = true;
                (end, was_owed) = (last_moment(answered), is_owed(client.has_streams()));
                client.graceful_shutdown();
                idle.as_mut().reset(Instant::now() + LAST_REQUEST);
            }
        }
        // Also of one that is ending in order: it is the client who says when that is done.
        if is_over && !was_cut_short {
            was_cut_short = true;
            tracing::debug!(peer = %connection.peer, "too many requests came to nothing: HTTP/2 connection ended");
            is_ending = true;
            client.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            idle.as_mut().reset(Instant::now() + LAST_REQUEST);
        }
    }
    drop(client);
    // They find out by themselves that nobody listens any more, and say so in the log.
    while requests.join_next().await.is_some() {}
}

fn builder(rules: &HeadRules) -> Builder {
    let mut builder = Builder::new();
    builder
        .max_header_list_size(u32::try_from(rules.bytes_max).unwrap_or(u32::MAX))
        .max_concurrent_streams(rules.streams_max)
        .initial_window_size(STREAM_WINDOW_BYTES)
        // All may be full at the same time: uploads that wait for their backends hold up nobody else's.
        .initial_connection_window_size(STREAM_WINDOW_BYTES.saturating_mul(rules.streams_max).min(WINDOW_BYTES_MAX))
        .max_send_buffer_size(SEND_BUFFER_BYTES);
    builder
}

/// Requests that were refused, or that the client took back before they were answered: each is work, and costs who
/// sends it next to nothing (CVE-2023-44487).
///
/// A leaky bucket: answers and time take out what waste puts in, so that neither a long life makes a connection
/// suspect, nor a good past pays for a flood.
struct Waste {
    level: u64,
    /// Up to when time has been paid in.
    paid: Instant,
}

impl Waste {
    fn new(now: Instant) -> Self {
        Self { level: 0, paid: now }
    }

    /// Whether this is more than anybody does who means well.
    fn one_more(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.paid).as_secs();
        self.paid += Duration::from_secs(seconds);
        self.level = self.level.saturating_sub(FORGIVEN_PER_SECOND.saturating_mul(seconds)) + 1;
        WASTED_MAX <= self.level
    }

    /// A request was answered.
    fn make_good(&mut self) {
        self.level = self.level.saturating_sub(1);
    }
}

/// The request as HTTP/1 would say it, if the guard lets it in.
fn judged(request: Request<RecvStream>, rules: &HeadRules) -> Result<Request<RecvStream>, Refusal> {
    let (mut parts, body) = request.into_parts();
    unfold(&mut parts)?;
    guard::inspect_parts(&parts, &rules.limits)?;
    Ok(Request::from_parts(parts, body))
}

/// `:authority` becomes the `Host`, the target is left in origin form, and the crumbs of a cookie are put together
/// (RFC 9113, sections 8.2.3 and 8.3.1).
fn unfold(parts: &mut request::Parts) -> Result<(), Refusal> {
    let bad = |reason| Refusal { status: StatusCode::BAD_REQUEST, reason };
    if let Some(authority) = parts.uri.authority() {
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("host"))?;
        if parts.headers.get_all(header::HOST).iter().any(|other| *other != host) {
            return Err(bad("two_hosts"));
        }
        parts.headers.insert(header::HOST, host);
    }
    let target = parts.uri.path_and_query().cloned().ok_or(bad("target_form"))?;
    parts.uri = Uri::from(target);

    let mut crumbs = parts.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes);
    if let (Some(first), Some(second)) = (crumbs.next(), crumbs.next()) {
        let crumbs: Vec<_> = [first, second].into_iter().chain(crumbs).collect();
        let mut cookie = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])).map_err(|_| bad("cookie"))?;
        cookie.set_sensitive(true);
        parts.headers.insert(header::COOKIE, cookie);
    }
    Ok(())
}

/// Whether the client has the beginning of a response.
async fn answer<A>(stream: Stream, app: &Arc<A>, streams: &Streams, shutdown: &ShutdownWatch) -> bool
where
    A: HttpServerApp + Send + Sync + 'static,
{
    let (is_answered, in_flight) = (stream.is_answered(), stream.in_flight());
    let mut clock = Idle::new(MOMENT);
    let mut answering = pin!(app.process_new_http(ServerSession::new_custom(Box::new(stream)), shutdown));
    tokio::select! {
        biased; // as in HTTP/1
        _ = &mut answering => {}
        () = outlasts_its_session(streams, &in_flight, &mut clock) => {
            part(answering, &in_flight).await;
        }
    }
    is_answered.load(Ordering::Relaxed)
}

/// The other streams of the connection have nothing to do with it, and go on.
fn refuse(mut respond: SendResponse<Bytes>, refusal: &Refusal, request_id: &str) {
    let (parts, body) = reply::refusal(refusal.status, refusal.reason, request_id).into_parts();
    // The client may be gone.
    if let Ok(mut stream) = respond.send_response(Response::from_parts(parts, ()), false) {
        let _ = stream.send_data(body, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_life_is_no_offence_and_a_good_past_pays_for_no_flood() {
        let begun = Instant::now();
        let mut waste = Waste::new(begun);
        for minute in 1..10_000 {
            let now = begun + Duration::from_secs(60 * minute);
            assert!((0..20).all(|_| !waste.one_more(now)), "twenty a minute, for a week, and nothing but these");
        }
        let later = begun + Duration::from_secs(60 * 20_000);
        let flood = |waste: &mut Waste| (1..).find(|_| waste.one_more(later)).unwrap_or(0);
        let mut proven = Waste::new(begun);
        (0..1_000_000).for_each(|_| proven.make_good());
        assert_eq!((flood(&mut waste), flood(&mut proven)), (WASTED_MAX, WASTED_MAX));
    }

    #[test]
    fn who_takes_back_every_second_request_goes_on() {
        let now = Instant::now();
        let mut waste = Waste::new(now);
        for _ in 0..10_000 {
            assert!(!waste.one_more(now));
            waste.make_good();
        }
    }
}
