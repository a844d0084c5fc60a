//! One client connection: each request head is read and judged here, whole and raw, before pingora sees a byte.
//!
//! Pingora reads heads with a timer per read, up to 1 MiB, and repairs what it does not like; so we read them, under
//! one deadline and one limit, and hand over only what the guard accepts.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use http::StatusCode;
use pingora::apps::{HttpPersistentSettings, HttpServerApp};
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, Sleep, timeout, timeout_at};

use super::context::{Connection, Request};
use super::guard::{self, HeadLimits, Refusal};
use super::reply::{self, LINGER};
use super::streams::{InFlight, MOMENT, Streams, Whose};

/// Enough for most heads; grows up to `HeadRules::bytes_max`.
const FIRST_READ_BYTES: usize = 4096;

/// While we shut down, how long an idle connection may still bring a request: one that its client had begun to send
/// is answered (with `Connection: close`), not reset.
pub(super) const LAST_REQUEST: Duration = Duration::from_secs(1);

/// What is cut may so long finish a frame, and say that it is over; then it is dropped.
const PARTING: Duration = Duration::from_millis(750);
/// Who has said it waits for the client to close: for a moment, and behind TLS for another one.
const GOODBYE: Duration = Duration::from_secs(2 * LINGER.as_secs());

/// A client that is connected, and the request that it is busy with.
#[derive(Debug)]
pub struct Line {
    pub stream: Stream,
    pub connection: Arc<Connection>,
    pub in_flight: Arc<InFlight>,
}

/// What a request head may cost.
#[derive(Clone, Debug)]
pub struct HeadRules {
    pub bytes_max: usize,
    pub limits: HeadLimits,
    /// Requests at a time on one HTTP/2 connection.
    pub streams_max: u32,
    /// From the first byte to the last, in total; also from the accept to the first byte, and for the TLS handshake.
    pub timeout: Duration,
    /// From one response to the next request.
    pub keepalive: Duration,
    /// How long a client may take nothing of a response.
    pub write_timeout: Duration,
}

/// Why there is no head.
#[derive(Debug)]
enum NoHead {
    /// The client left, or had nothing to say for too long: nothing is owed.
    Over,
    Refused(Refusal),
}

/// Hears of each request that does not reach the application.
pub trait Refusals: Send + Sync {
    /// Says it in the log and the metrics; gives the id that the client is told.
    fn refused(&self, connection: &Connection, refusal: &Refusal) -> String;
}

/// Serves requests on one connection until either side ends it.
pub async fn serve<A>(
    line: Line,
    rules: Arc<HeadRules>,
    app: Arc<A>,
    refusals: Arc<dyn Refusals>,
    streams: Arc<Streams>,
    mut shutdown: ShutdownWatch,
) where
    A: HttpServerApp + Send + Sync + 'static,
{
    let Line { mut stream, connection, in_flight } = line;
    let mut settings: Option<HttpPersistentSettings> = None;
    let watched = shutdown.clone();
    // Both last as long as the connection: setting them up for every request would cost more than the guard does.
    let mut stopping = pin!(shutdown.wait_for(|shutting_down| *shutting_down));
    let mut is_stopping = false;
    let mut idle = Idle::new(rules.timeout);
    loop {
        let head = match read_head(&mut stream, &rules, &mut idle, stopping.as_mut(), &mut is_stopping).await {
            Ok(head) => head,
            Err(NoHead::Over) => return,
            Err(NoHead::Refused(refusal)) => {
                let request_id = refusals.refused(&connection, &refusal);
                refuse(stream, &refusal, &request_id).await;
                return;
            }
        };
        let mut session = ServerSession::new_http1(stream);
        let mut next = settings.take().unwrap_or_else(|| {
            session.set_keepalive(Some(rules.keepalive.as_secs()));
            HttpPersistentSettings::for_session(&session)
        });
        next.set_pipelined_prefix(head);
        in_flight.begin();
        let request = Request { connection: Arc::clone(&connection), in_flight: Arc::clone(&in_flight) };
        next.set_user_context(Box::new(request));
        next.apply_to_session(&mut session);
        idle.begin(MOMENT);
        let mut answering = pin!(app.process_new_http(session, &watched));
        let reused = tokio::select! {
            biased; // most answers are there before anybody looks at a clock
            reused = &mut answering => reused,
            () = outlasts_its_session(&streams, &in_flight, &mut idle) => part(answering, &in_flight).await,
        };
        let Some(reused) = reused else { return };
        (stream, settings) = reused.consume();
        if settings.is_none() {
            return;
        }
        idle.begin(if is_stopping { LAST_REQUEST } else { rules.keepalive });
    }
}

/// Completes when the request is cut.
pub(super) async fn outlasts_its_session(streams: &Streams, in_flight: &Arc<InFlight>, clock: &mut Idle) {
    loop {
        clock.over().await;
        match in_flight.whose() {
            Whose::Unknown => clock.begin(MOMENT),
            Whose::Nobody => std::future::pending().await,
            Whose::Session(session, _) => return streams.until_cut(&session, in_flight).await,
        }
    }
}

/// A request that is cut fails by itself, in order, because it cannot read any more; one that does not is dropped.
pub(super) async fn part<T>(
    mut answering: Pin<&mut impl Future<Output = Option<T>>>,
    in_flight: &InFlight,
) -> Option<T> {
    if let Ok(answered) = timeout(PARTING, answering.as_mut()).await {
        return answered;
    }
    if in_flight.is_leaving() { timeout(GOODBYE, answering).await.ok().flatten() } else { None }
}

/// How long nothing comes. One timer for all the pauses of a connection: when it fires too early, because the pause
/// began after it was set, it is set again.
pub(super) struct Idle {
    timer: Pin<Box<Sleep>>,
    deadline: Instant,
}

impl Idle {
    pub(super) fn new(limit: Duration) -> Self {
        Self { timer: Box::pin(tokio::time::sleep(limit)), deadline: Instant::now() + limit }
    }

    /// A pause begins, of at most `limit`.
    fn begin(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit;
        if self.deadline < self.timer.deadline() {
            self.timer.as_mut().reset(self.deadline);
        }
    }

    async fn over(&mut self) {
        loop {
            self.timer.as_mut().await;
            if self.deadline <= Instant::now() {
                return;
            }
            self.timer.as_mut().reset(self.deadline);
        }
    }
}

/// The next head, accepted, and what of the body came with it.
async fn read_head(
    stream: &mut Stream,
    rules: &HeadRules,
    idle: &mut Idle,
    mut stopping: Pin<&mut impl Future>,
    is_stopping: &mut bool,
) -> Result<BytesMut, NoHead> {
    let mut buffer = BytesMut::with_capacity(FIRST_READ_BYTES);
    let first = loop {
        tokio::select! {
            biased; // data that is there is served before a clock or a shutdown is looked at
            first = stream.read_buf(&mut buffer) => break first,
            () = idle.over() => return Err(NoHead::Over),
            _ = &mut stopping, if !*is_stopping => {
                *is_stopping = true;
                idle.begin(LAST_REQUEST);
            }
        }
    };
    let Ok(1..) = first else { return Err(NoHead::Over) };
    let mut deadline = None; // most heads come whole, and need no clock
    let mut searched = 0;
    loop {
        if let Some(end) = guard::head_end(&buffer, searched) {
            if rules.bytes_max < end {
                return Err(NoHead::Refused(TOO_LARGE));
            }
            return match guard::inspect(&buffer[..end], &rules.limits) {
                Ok(()) => Ok(buffer),
                Err(refusal) => Err(NoHead::Refused(refusal)),
            };
        }
        if rules.bytes_max <= buffer.len() {
            // Without a line end there is nothing but a target yet.
            return Err(NoHead::Refused(if buffer.contains(&b'\n') { TOO_LARGE } else { TARGET_TOO_LARGE }));
        }
        searched = buffer.len();
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + rules.timeout);
        match timeout_at(deadline, stream.read_buf(&mut buffer)).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0) | Err(_)) => return Err(NoHead::Over),
            Err(_) => return Err(NoHead::Refused(TOO_SLOW)),
        }
    }
}

const TOO_LARGE: Refusal = Refusal { status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, reason: "head_too_large" };
const TARGET_TOO_LARGE: Refusal = Refusal { status: StatusCode::URI_TOO_LONG, reason: "target_too_long" };
const TOO_SLOW: Refusal = Refusal { status: StatusCode::REQUEST_TIMEOUT, reason: "head_too_slow" };

/// Answers and closes. Goes on reading for a moment, because closing on unread bytes resets the connection, and the
/// reset can overtake the answer (RFC 9112, section 9.6).
async fn refuse(mut stream: Stream, refusal: &Refusal, request_id: &str) {
    let farewell = async {
        stream.write_all(&reply::closing(&reply::refusal(refusal.status, refusal.reason, request_id))).await?;
        stream.flush().await?;
        stream.shutdown().await?;
        let mut rest = [0; 4096];
        while 0 < stream.read(&mut rest).await? {}
        std::io::Result::Ok(())
    };
    // The client may be gone or stuck: either way we are done.
    let _ = timeout(LINGER, farewell).await;
}
