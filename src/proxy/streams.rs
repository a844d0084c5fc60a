//! What has to end with its session? Every request that outlasts a moment: a WebSocket, an event stream, a download, a
//! long poll (invariant 5).
//!
//! A request that is still under way after [`MOMENT`] is listed under the session that it came with, and in every
//! `ROUND` the sessions of all that are listed are looked at: a copy that is known to be true will do, else the store
//! is asked. Where the store says that a session is gone, however it ended and on whichever instance, its requests are
//! cut; and so is one that would not be let in any more, where it wants to go, if it came now. There is no message that
//! could be lost, and a store that says nothing cuts nothing (invariant 4).
//!
//! A request without a session is nobody's, and is never cut.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::Poll;
use std::time::Duration;

use http::{HeaderValue, Uri};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::metrics::Metrics;
use crate::session::Sessions;
use crate::session::id::{KeyHashing, SessionKey};
use crate::session::record::Record;
use crate::session::store::{Found, StoreError, Stored};

/// What lasts less long is not listed, and costs nothing. With `ROUND`, and the time that the store takes to answer,
/// the longest for which a request goes on without its session.
pub const MOMENT: Duration = Duration::from_millis(500);

/// From one look at the sessions to the next; sooner when one of them is about to end by its own clock.
const ROUND: Duration = Duration::from_secs(1);

/// However many sessions end one after the other.
const ROUND_MIN: Duration = Duration::from_millis(50);

/// Questions to the store under way at a time.
const ASKED_AT_ONCE: usize = 512;

/// The requests that have lasted longer than a moment, by session. One for the process.
#[derive(Debug)]
pub struct Streams {
    listed: Mutex<HashMap<SessionKey, Vec<Arc<InFlight>>, KeyHashing>>,
    metrics: Metrics,
}

/// One request on its way. A connection that has one request at a time uses one of these for all of them.
#[derive(Debug, Default)]
pub struct InFlight {
    whose: Mutex<Whose>,
    /// For as long as it lasts, it is use of the session.
    touches: AtomicBool,
    fate: AtomicU8,
    /// The client has the beginning of a WebSocket frame, and not its end.
    is_amid_frame: AtomicBool,
    changed: Notify,
}

/// With which session a request came.
#[derive(Clone, Debug, Default)]
pub enum Whose {
    /// It has not been looked up yet.
    #[default]
    Unknown,
    Nobody,
    Session(SessionKey, Place),
}

/// Where a request wants to go: enough to find its route, also in rules that came later.
#[derive(Clone, Debug)]
pub struct Place {
    /// The `Host` field.
    pub host: HeaderValue,
    pub uri: Uri,
}

/// It goes on.
const OPEN: u8 = 0;
/// Its session has ended, and so must it.
const CUT: u8 = 1;
/// It ends by itself, and in order: whatever becomes of its session, it is left alone.
const LEAVING: u8 = 2;

impl Streams {
    pub fn new(metrics: Metrics) -> Self {
        Self { listed: Mutex::default(), metrics }
    }

    /// Completes when the session has ended. For as long as this is awaited, the request is listed.
    pub async fn until_cut(&self, session: &SessionKey, in_flight: &Arc<InFlight>) {
        let _listed = self.list(session, in_flight);
        while !in_flight.is_cut() {
            in_flight.changed.notified().await;
        }
    }

    /// Looks at the sessions in question, round after round; `admits` says who of those who have a session may still
    /// come in, and where.
    pub async fn watch(&self, sessions: &Sessions, admits: impl Fn(&Record, &Place) -> bool) {
        loop {
            let pause = self.look(sessions, &admits).await;
            tokio::time::sleep(pause.clamp(ROUND_MIN, ROUND)).await;
        }
    }

    /// One look at each session; how long until the first of them ends by its own clock.
    async fn look(&self, sessions: &Sessions, admits: &impl Fn(&Record, &Place) -> bool) -> Duration {
        let mut next = ROUND;
        let mut judge = |session: &SessionKey, found: Result<Found, StoreError>| match found {
            Ok(Found::Live(Stored { record, time_to_live })) => {
                self.cut(session, |place| !admits(&record, place));
                if self.is_in_use(session) {
                    sessions.keep(session, record.ends, time_to_live);
                }
                next = next.min(time_to_live);
            }
            Ok(Found::Ended(_) | Found::Nothing) => self.cut(session, |_| true),
            // Nobody knows: another instance may read it, and the store may come back.
            Err(_) => {}
        };
        let store = sessions.store();
        let listed: Vec<_> = self.listed.lock().keys().cloned().collect();
        let mut asking = JoinSet::new();
        for session in listed {
            if let Some(stored) = store.recall(&session) {
                judge(&session, Ok(Found::Live(stored)));
                continue;
            }
            if ASKED_AT_ONCE <= asking.len()
                && let Some(Ok((session, found))) = asking.join_next().await
            {
                judge(&session, found);
            }
            let store = Arc::clone(store);
            asking.spawn(async move {
                let found = store.load(&session).await;
                (session, found)
            });
        }
        while let Some(answered) = asking.join_next().await {
            if let Ok((session, found)) = answered {
                judge(&session, found);
            }
        }
        next
    }

    /// Those of the session that want to go to such places. Under the lock, so that only what is still listed is cut, and
    /// not the next request of its connection.
    fn cut(&self, session: &SessionKey, is_out_of_bounds: impl Fn(&Place) -> bool) {
        for in_flight in self.listed.lock().get(session).into_iter().flatten() {
            let is_admitted = matches!(&*in_flight.whose.lock(), Whose::Session(_, place) if !is_out_of_bounds(place));
            if is_admitted {
                continue;
            }
            if in_flight.fate.compare_exchange(OPEN, CUT, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                self.metrics.streams_cut.inc();
                in_flight.changed.notify_one();
            }
        }
    }

    fn is_in_use(&self, session: &SessionKey) -> bool {
        let listed = self.listed.lock();
        listed.get(session).is_some_and(|requests| {
            requests.iter().any(|request| request.touches.load(Ordering::Relaxed) && !request.is_cut())
        })
    }

    fn list<'s>(&'s self, session: &'s SessionKey, in_flight: &'s Arc<InFlight>) -> Listed<'s> {
        self.listed.lock().entry(session.clone()).or_default().push(Arc::clone(in_flight));
        self.metrics.streams.inc();
        Listed { streams: self, session, in_flight }
    }
}

/// Takes it off the list when it is over, however it ends.
struct Listed<'s> {
    streams: &'s Streams,
    session: &'s SessionKey,
    in_flight: &'s Arc<InFlight>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.streams.metrics.streams.dec();
        let mut listed = self.streams.listed.lock();
        let Some(of_session) = listed.get_mut(self.session) else { return };
        of_session.retain(|other| !Arc::ptr_eq(other, self.in_flight));
        if of_session.is_empty() {
            listed.remove(self.session);
        }
        if listed.is_empty() {
            *listed = HashMap::default(); // after a rush of thousands, their memory is free again
        }
    }
}

impl InFlight {
    /// The next request begins.
    pub fn begin(&self) {
        *self.whose.lock() = Whose::Unknown;
        self.is_amid_frame.store(false, Ordering::Relaxed);
        self.fate.store(OPEN, Ordering::Release);
    }

    /// It goes to a backend; `touches`: and is use of its session for as long as it lasts.
    pub fn belongs_to(&self, whose: Whose, touches: bool) {
        self.touches.store(touches, Ordering::Relaxed);
        *self.whose.lock() = whose;
    }

    pub fn whose(&self) -> Whose {
        self.whose.lock().clone()
    }

    pub fn is_cut(&self) -> bool {
        self.fate.load(Ordering::Acquire) == CUT
    }

    /// From now on it is left alone: it is what ends the session, or says goodbye.
    pub fn leave(&self) {
        self.fate.store(LEAVING, Ordering::Release);
    }

    pub fn is_leaving(&self) -> bool {
        self.fate.load(Ordering::Acquire) == LEAVING
    }

    pub fn note_amid_frame(&self, is_amid_frame: bool) {
        self.is_amid_frame.store(is_amid_frame, Ordering::Release);
    }

    /// Whether more of the client is read. A request is cut by failing what all requests wait for: a word of the client.
    /// Not within a frame: then the client's next word has to wait until the backend has finished its own. Whoever
    /// waits is woken by what the backend sends, or not at all.
    pub fn may_read(&self) -> Poll<io::Result<()>> {
        if !self.is_cut() {
            return Poll::Ready(Ok(()));
        }
        if self.is_amid_frame.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        Poll::Ready(Err(io::Error::other("the session has ended")))
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;
    use crate::session::id::SessionId;

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    fn poll(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> Poll<()> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn only_what_is_listed_under_the_session_is_cut_and_the_list_ends_empty() {
        let streams = Streams::new(Metrics::new());
        let (ann, bob) = (key(), key());
        let requests: [Arc<InFlight>; 3] = Default::default();
        {
            let mut first = pin!(streams.until_cut(&ann, &requests[0]));
            let mut second = pin!(streams.until_cut(&ann, &requests[1]));
            let mut other = pin!(streams.until_cut(&bob, &requests[2]));
            assert!(poll(first.as_mut()).is_pending() && poll(second.as_mut()).is_pending());
            assert!(poll(other.as_mut()).is_pending());
            assert_eq!(streams.metrics.streams.get(), 3);
            streams.cut(&ann, |_| true);
            assert!(poll(first).is_ready() && poll(second).is_ready(), "both of the session");
            assert!(poll(other).is_pending());
        }
        assert!(streams.listed.lock().is_empty());
        assert_eq!((streams.metrics.streams.get(), streams.metrics.streams_cut.get()), (0, 2));
        streams.cut(&bob, |_| true);
        assert!(!requests[2].is_cut(), "what is over is not cut");
    }

    #[test]
    fn the_next_request_of_a_connection_knows_nothing_of_the_last() {
        let streams = Streams::new(Metrics::new());
        let (ann, request) = (key(), Arc::<InFlight>::default());
        {
            let mut first = pin!(streams.until_cut(&ann, &request));
            assert!(poll(first.as_mut()).is_pending());
            request.note_amid_frame(true);
            streams.cut(&ann, |_| true); // and the request ends before it hears of it
        }
        request.begin();
        assert!(matches!(request.whose(), Whose::Unknown));
        assert!(matches!(request.may_read(), Poll::Ready(Ok(()))));
        let mut next = pin!(streams.until_cut(&ann, &request));
        assert!(poll(next.as_mut()).is_pending());
        assert!(poll(next).is_pending(), "a word for the last one does not count");
    }

    #[test]
    fn a_cut_request_reads_no_more_and_within_a_frame_it_waits() {
        let streams = Streams::new(Metrics::new());
        let (ann, request) = (key(), Arc::<InFlight>::default());
        let mut waiting = pin!(streams.until_cut(&ann, &request));
        assert!(poll(waiting.as_mut()).is_pending());
        request.note_amid_frame(true);
        assert!(matches!(request.may_read(), Poll::Ready(Ok(()))));
        streams.cut(&ann, |_| true);
        assert!(request.may_read().is_pending());
        request.note_amid_frame(false);
        assert!(matches!(request.may_read(), Poll::Ready(Err(_))));
    }

    #[test]
    fn what_ends_its_own_session_is_left_alone() {
        let streams = Streams::new(Metrics::new());
        let (ann, request) = (key(), Arc::<InFlight>::default());
        let mut waiting = pin!(streams.until_cut(&ann, &request));
        assert!(poll(waiting.as_mut()).is_pending());
        request.leave();
        streams.cut(&ann, |_| true);
        assert!(poll(waiting).is_pending());
        assert!(matches!(request.may_read(), Poll::Ready(Ok(()))));
    }
}
