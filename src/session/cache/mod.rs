//! What may be said of a session without asking the store? The copies that a worker keeps, while nobody can have
//! changed them, or for at most one `lease` longer.
//!
//! # The rule
//!
//! A store that *tracks* (Redis, `CLIENT TRACKING ON`) remembers what it answered to a connection, and pushes the name
//! of each key that changes afterwards into the same stream as the replies. Two things follow, and all correctness with
//! them:
//!
//! * **A copy is kept only if no push came since its read was sent.** A push may overtake the reply that it makes stale.
//!   So a [`Ticket`] notes, before the read is sent, how many pushes there were; if there is one more when the reply is
//!   here, the reply serves this one request and is not kept.
//! * **A copy is used only within `lease` of the sending of a heartbeat that was answered.** Replies and pushes are one
//!   queue: whoever has the reply to a command sent at `t` has all pushes of what was written before `t`. So at `t` each
//!   copy was true. Where nothing is answered (server frozen, cable cut, this process paused) the lease ends by itself,
//!   and requests go to the store.
//!
//! **The hard bound:** a session that ended on the authoritative primary is served from here less than one `lease`
//! longer, whatever fails. (Usually less than 1 ms: as long as the push takes.) That the primary is still the authority
//! is known from a second kind of heartbeat, a *write*, with a lease of its own: one that was demoted or cut off from
//! its replicas refuses it, while it goes on answering pings. With a split brain the bound is the time until such
//! a primary refuses writes, and `role_lease`.
//!
//! # Invariants, each a test
//!
//! * (I1) A copy is used only under both leases, in the epoch in which it was read, and before its session's idle or
//!   absolute end and its own age limit.
//! * (I2) A copy is kept only if epoch and shard version are what they were before its read was sent.
//! * (I3) Every change of connection and every flush begins a new epoch: all older copies are void, in O(1).
//! * (I4) A touch takes the copy back like any other write; the next request reads again.
//! * (I5) A session's life is counted from the sending of the read that told it, never from the reply.
//! * (I6) Who ends a session forgets it on all workers of this process, before the command is sent and again when it was
//!   answered.
//! * (I7) Pushes are applied in the order of the stream, before any later reply is seen: the link does that.
//!
//! The clock is `CLOCK_BOOTTIME`, not [`std::time::Instant`]: that stands still while the machine is suspended, and
//! a lease would outlive the night.
//!
//! # One connection, one cache; one process, all caches
//!
//! There is a cache for each connection, one per worker and primary, and the worker that drives the connection fills it.
//! All workers of the process ask it: whether a copy may be used is a matter of the leases of the connection that
//! read it, and not of who asks. So a session is read once per process, not once per worker, and everything that speaks
//! against one is looked for in all caches. Nothing here does I/O: whoever has the connection tells what happened on it.
//!
//! ```
//! # use std::time::Duration;
//! # use cloakroom::session::{cache::{Beat, LeaseCache, Limits}, id::SessionId, store::Stored};
//! # fn demo(stored: Stored) {
//! # let key = SessionId::generate("ann").unwrap().key();
//! let cache = LeaseCache::new(Limits { sessions_max: 100_000, bytes_max: 128 << 20, ..Limits::default() });
//!
//! // The link connects. Its push sender calls cache.invalidate(&key), cache.flush() and cache.disconnected(connection).
//! let connection = cache.connecting();
//! // ... HELLO 3, CLIENT TRACKING ON: both acknowledged
//! assert!(cache.connected(connection));
//!
//! // The link's heart beats, several times within a lease.
//! let heartbeat = cache.begin_heartbeat(Beat::Write);
//! // ... SET hb:{tag} n PX 60000: acknowledged
//! cache.finish_heartbeat(&heartbeat);
//!
//! // A request: a hit, or a read.
//! if cache.get(&key).is_none() {
//!     let ticket = cache.begin_read(&key);
//!     // ... GET, PTTL: answered
//!     cache.finish_read(&ticket, Some(&stored));
//! }
//! assert!(cache.get(&key).is_some());
//!
//! // A logout on this worker.
//! cache.forget_own(&key);
//! // ... the destroying command: answered, or failed
//! cache.forget_own(&key);
//! assert!(cache.get(&key).is_none());
//! # }
//! # let identity = cloakroom::identity::Identity::default();
//! # let client = cloakroom::session::record::ClientHints { address: None, user_agent: String::new() };
//! # let method = cloakroom::session::record::LoginMethod::Password;
//! # let record = cloakroom::session::record::Record {
//! #     identity, attributes: Default::default(), created: 0, ends: 1, method, client, secrets: None, login: None, known: Default::default() };
//! # demo(Stored { record: record.into(), time_to_live: Duration::from_secs(60) });
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Add;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use rustix::time::{ClockId, clock_gettime};

use super::id::{KeyHashing, SessionKey};
use super::record::{Attribute, ExternalLogin, Record};
use super::store::Stored;

pub mod single_flight;
mod doubts;
#[cfg(test)]
mod model;

use doubts::Doubts;

/// The coherent copies of one worker towards one primary.
pub struct LeaseCache {
    limits: Limits,
    clock: Box<dyn Fn() -> Moment + Send + Sync>,
    state: Mutex<State>,
}

/// How much is kept, and for how long it is believed.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// So many copies at most; none with 0. Of twice as many sessions the keys are remembered besides, as doubted.
    pub sessions_max: usize,
    /// What the copies may take together, as [`heap_bytes`] estimates it.
    pub bytes_max: u64,
    /// The bound of staleness; must exceed the longest pause of a healthy server and of this thread.
    pub lease: Duration,
    /// How long a primary is believed to be one since the last write that it took.
    pub role_lease: Duration,
    /// No copy is used for longer, in case the store stops tracking and does not say so.
    pub age_max: Duration,
    /// How long an ending is remembered for [`LeaseCache::doubts`]; at least the life of a fallback cookie.
    pub doubt: Duration,
}

/// One connection of a link, from its first attempt to its loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection(u64);

/// What a heartbeat proves when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// Any command: that the pushes before it are here.
    Ping,
    /// A write to a key of this primary: besides, that it is the authority.
    Write,
}

/// A heartbeat that was sent.
#[derive(Clone, Copy, Debug)]
#[must_use = "a lease is extended by finish_heartbeat"]
pub struct Heartbeat {
    connection: Option<Connection>,
    beat: Beat,
    sent: Moment,
}

/// The state of things before a read was sent.
#[derive(Clone, Debug)]
#[must_use = "a copy is kept by finish_read"]
pub struct Ticket {
    key: SessionKey,
    stamp: Stamp,
    sent: Moment,
}

/// A touch that was sent.
#[derive(Clone, Debug)]
#[must_use = "what a touch proves is noted by finish_touch"]
pub struct Touch {
    key: SessionKey,
    sent: Moment,
}

/// What a touch found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// A live session, whose life is longer now.
    Extended,
    /// A live session, whose life could not grow; nothing was written. Also where that cannot be told apart.
    Unchanged,
    Gone,
}

/// Time since the machine was started, suspended or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

/// What must not have changed between a read and its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    epoch: u64,
    version: u64,
}

struct State {
    /// One more with each change of connection and each flush.
    epoch: u64,
    /// One more with each invalidation in the shard.
    versions: [u64; SHARDS],
    copies: Cache<SessionKey, Kept, ByWeight, KeyHashing>,
    connection: Option<Connection>,
    /// The last that was asked for, and the last that is known to be lost.
    attempted: Connection,
    lost: Connection,
    stream_until: Moment,
    role_until: Moment,
    good: Good,
    doubts: Doubts,
}

/// The last epoch that had both leases, for the time that the store is down.
#[derive(Clone, Copy, Debug, Default)]
struct Good {
    epoch: u64,
    until: Moment,
}

struct Kept {
    record: Arc<Record>,
    epoch: u64,
    /// When its read was sent.
    read: Moment,
    /// When its session ends if nobody uses it.
    deadline: Moment,
    echo: Echo,
    weight: u64,
}

/// Our own touch of a session is a write, and takes our own copy back. That echo says nothing against the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Echo {
    None,
    /// A touch was sent. The next push may be its echo.
    Sent(Moment),
    /// A push came, and the touch is not answered yet.
    Pushed(Moment),
    /// The touch that was sent then found the session alive. The store does not track it any more; where `is_due`, the
    /// push that says so is still to come, because this connection is not the one that touched.
    Alive {
        touched: Moment,
        is_due: bool,
    },
}

#[derive(Clone)]
struct ByWeight;

/// As many as [`SessionKey::spread`] tells apart: 1 in 256 reads is not kept for another key's sake.
const SHARDS: usize = 256;

impl LeaseCache {
    pub fn new(limits: Limits) -> Self {
        Self::with_clock(limits, Moment::now)
    }

    /// With time that a test makes.
    pub fn with_clock(limits: Limits, clock: impl Fn() -> Moment + Send + Sync + 'static) -> Self {
        let options = OptionsBuilder::new()
            .estimated_items_capacity(limits.sessions_max)
            .weight_capacity(if limits.sessions_max == 0 { 0 } else { limits.bytes_max })
            .build()
            .expect("both capacities are given");
        let copies = Cache::with_options(options, ByWeight, KeyHashing::default(), DefaultLifecycle::default());
        let state = State {
            epoch: 1,
            versions: [0; SHARDS],
            copies,
            connection: None,
            attempted: Connection(0),
            lost: Connection(0),
            stream_until: Moment::default(),
            role_until: Moment::default(),
            good: Good::default(),
            doubts: Doubts::new(limits.sessions_max, limits.doubt),
        };
        Self { limits, clock: Box::new(clock), state: Mutex::new(state) }
    }

    /// The copy, if it is known to be true now (I1). It has so long to live from now.
    pub fn get(&self, key: &SessionKey) -> Option<Stored> {
        let state = self.state.lock();
        let copy = state.copies.get(key)?;
        let now = (self.clock)();
        if state.lease_until() <= now {
            return None;
        }
        let tracked = matches!(copy.echo, Echo::None | Echo::Sent(_));
        let valid = copy.epoch == state.epoch && tracked && now < copy.read + self.limits.age_max;
        if valid { copy.stored(now) } else { None }
    }

    /// While the store is down: the copy, if it was known to be true not longer than `grace` ago, and lives by its own
    /// clock. Never one that was taken back, and none from before the last connection that worked.
    ///
    /// A copy that only our own touch took back counts as true when that touch was sent.
    pub fn get_within(&self, key: &SessionKey, grace: Duration) -> Option<Stored> {
        let now = (self.clock)();
        let state = self.state.lock();
        let copy = state.copies.get(key)?;
        if copy.epoch < state.good.epoch {
            return None;
        }
        let known_true = match copy.echo {
            Echo::Pushed(_) => return None,
            Echo::Alive { touched, .. } => touched,
            Echo::None | Echo::Sent(_) if copy.epoch == state.good.epoch => {
                state.good.until.min(copy.read + self.limits.age_max).max(copy.read)
            }
            Echo::None | Echo::Sent(_) => copy.read,
        };
        if now < known_true + grace { copy.stored(now) } else { None }
    }

    /// Before a connection is attempted: a name for it.
    pub fn connecting(&self) -> Connection {
        let mut state = self.state.lock();
        state.attempted.0 += 1;
        state.attempted
    }

    /// It tracks: what is read from now on may be kept, what was read before is void (I3). Nothing is used before
    /// both kinds of heartbeat were answered. False when it was lost already, or a later one has taken its place.
    pub fn connected(&self, connection: Connection) -> bool {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let fresh = state.lost < connection && state.connection.is_none_or(|current| current < connection);
        if fresh {
            state.change_connection(Some(connection), now);
        }
        fresh
    }

    /// Nothing is used any more (I3). What was known true stays for [`Self::get_within`].
    pub fn disconnected(&self, connection: Connection) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        state.lost = state.lost.max(connection);
        if state.connection == Some(connection) {
            state.change_connection(None, now);
        }
    }

    /// Before a heartbeat is sent.
    pub fn begin_heartbeat(&self, beat: Beat) -> Heartbeat {
        let sent = (self.clock)();
        Heartbeat { connection: self.state.lock().connection, beat, sent }
    }

    /// It was answered, and not with an error: each copy was true when it was sent.
    pub fn finish_heartbeat(&self, heartbeat: &Heartbeat) {
        let mut state = self.state.lock();
        if state.connection.is_none() || state.connection != heartbeat.connection {
            return;
        }
        state.stream_until = state.stream_until.max(heartbeat.sent + self.limits.lease);
        if heartbeat.beat == Beat::Write {
            state.role_until = state.role_until.max(heartbeat.sent + self.limits.role_lease);
        }
        let until = state.lease_until();
        if Moment::default() < until {
            state.good = Good { epoch: state.epoch, until };
        }
    }

    /// Before a read is sent. Not when it is sent: it may wait in a queue.
    pub fn begin_read(&self, key: &SessionKey) -> Ticket {
        let sent = (self.clock)();
        Ticket { key: key.clone(), stamp: self.state.lock().stamp(key), sent }
    }

    /// What the read found: a live session, which is kept if nothing happened meanwhile (I2), or none.
    pub fn finish_read(&self, ticket: &Ticket, found: Option<&Stored>) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let Some(stored) = found else { return state.forget(&ticket.key, now) };
        if state.stamp(&ticket.key) != ticket.stamp {
            return;
        }
        state.doubts.clear(&ticket.key);
        let least = self.limits.bytes_max.div_ceil(self.limits.sessions_max.max(1) as u64);
        let copy = Kept {
            record: Arc::clone(&stored.record),
            epoch: ticket.stamp.epoch,
            read: ticket.sent,
            deadline: ticket.sent + stored.time_to_live,
            echo: Echo::None,
            weight: (heap_bytes(stored) as u64).max(least),
        };
        state.copies.insert(ticket.key.clone(), copy);
    }

    /// The store says that it changed. Whether an answer on its way is older is not known, so it will not be kept (I2).
    pub fn invalidate(&self, key: &SessionKey) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let epoch = state.epoch;
        let copy = state.copies.peek_mut(key).filter(|copy| copy.epoch == epoch);
        // A copy that this connection read is pushed once: from then on the store does not track it.
        let (is_echo, is_explained) = match copy {
            Some(mut copy) => match copy.echo {
                Echo::Sent(touched) => {
                    copy.echo = Echo::Pushed(touched);
                    (true, false)
                }
                Echo::Alive { touched, is_due: true } => {
                    copy.echo = Echo::Alive { touched, is_due: false };
                    (true, true)
                }
                Echo::None | Echo::Pushed(_) | Echo::Alive { is_due: false, .. } => (false, false),
            },
            None => (false, false),
        };
        if !is_echo {
            return state.forget(key, now);
        }
        state.bump(key);
        if !is_explained {
            state.doubts.note(key, now);
        }
    }

    /// The store says that everything is gone. Nothing is left, not even for the time that it is down.
    pub fn flush(&self) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        state.epoch += 1;
        state.good = Good { epoch: state.epoch, until: state.lease_until() };
        state.doubts.note_all(now);
    }

    /// This process ends it: to be called before the command is sent and again when it was answered, or failed (I6).
    pub fn forget_own(&self, key: &SessionKey) {
        let now = (self.clock)();
        self.state.lock().forget(key, now);
    }

    /// A read of another worker of this process, sent after everything that spoke against the session here, found it
    /// alive.
    pub fn seen_alive(&self, ticket: &Ticket) {
        self.state.lock().doubts.clear_before(&ticket.key, ticket.sent);
    }

    /// Before a touch is sent, by whichever worker of this process.
    pub fn begin_touch(&self, key: &SessionKey) -> Touch {
        let sent = (self.clock)();
        let mut state = self.state.lock();
        let epoch = state.epoch;
        if let Some(mut copy) = state.copies.peek_mut(key)
            && copy.echo == Echo::None
            && copy.epoch == epoch
        {
            copy.echo = Echo::Sent(sent);
        }
        Touch { key: key.clone(), sent }
    }

    /// It was answered. A touch that failed is not finished: nobody knows.
    pub fn finish_touch(&self, touch: &Touch, touched: Touched) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let echo = state.copies.peek(&touch.key).map_or(Echo::None, |copy| copy.echo);
        let echo = match (touched, echo) {
            (Touched::Extended, Echo::Pushed(sent)) if sent == touch.sent => {
                state.doubts.clear(&touch.key);
                Echo::Alive { touched: sent, is_due: false }
            }
            (Touched::Extended, Echo::Sent(sent)) if sent == touch.sent => Echo::Alive { touched: sent, is_due: true },
            // A push that comes now is somebody else's.
            (Touched::Unchanged, Echo::Sent(sent)) if sent == touch.sent => Echo::None,
            (Touched::Extended | Touched::Unchanged, Echo::None | Echo::Sent(_) | Echo::Alive { .. }) => return,
            // The push was no echo.
            (Touched::Unchanged | Touched::Extended, Echo::Pushed(_)) | (Touched::Gone, _) => {
                return state.forget(&touch.key, now);
            }
        };
        if let Some(mut copy) = state.copies.peek_mut(&touch.key) {
            copy.echo = echo;
        }
    }

    /// Whether there is reason to think that the session ended: it was taken back or ended here lately and not
    /// seen alive since. For who would believe a browser while the store is down. Remembered for at least
    /// [`Limits::doubt`]; when there are too many to remember, or everything was flushed, all are doubted.
    pub fn doubts(&self, key: &SessionKey) -> bool {
        let now = (self.clock)();
        self.state.lock().doubts.has(key, now)
    }

    /// How many copies there are, void ones included.
    pub fn sessions(&self) -> usize {
        self.state.lock().copies.len()
    }

    /// What they take, at least.
    pub fn bytes(&self) -> u64 {
        self.state.lock().copies.weight()
    }
}

impl State {
    /// Copies are used before this: both leases.
    fn lease_until(&self) -> Moment {
        self.stream_until.min(self.role_until)
    }

    fn stamp(&self, key: &SessionKey) -> Stamp {
        Stamp { epoch: self.epoch, version: self.versions[key.spread() % SHARDS] }
    }

    fn bump(&mut self, key: &SessionKey) {
        self.versions[key.spread() % SHARDS] += 1;
    }

    fn forget(&mut self, key: &SessionKey, now: Moment) {
        self.bump(key);
        self.copies.remove(key);
        self.doubts.note(key, now);
    }

    fn change_connection(&mut self, connection: Option<Connection>, now: Moment) {
        self.good.until = self.good.until.min(now);
        self.connection = connection;
        self.epoch += 1;
        self.stream_until = Moment::default();
        self.role_until = Moment::default();
    }
}

impl Kept {
    fn stored(&self, now: Moment) -> Option<Stored> {
        let time_to_live = self.deadline.since(now);
        (!time_to_live.is_zero()).then(|| Stored { record: Arc::clone(&self.record), time_to_live })
    }
}

/// About what a copy takes of memory: its record, its place in the table, and what the allocator adds to each piece.
pub fn heap_bytes(stored: &Stored) -> usize {
    let Record { identity, attributes, created: _, ends: _, method: _, client, secrets, login, known: _ } =
        &*stored.record;
    let identity_texts = [Some(&identity.user), identity.name.as_ref(), identity.email.as_ref()];
    let texts = identity_texts.into_iter().flatten().chain(&identity.groups).chain([&client.user_agent]);
    let groups = piece(identity.groups.capacity() * size_of::<String>());
    let secrets = secrets.as_ref().map_or(0, |sealed| piece(sealed.0.capacity()));
    PLACE_BYTES
        + piece(ARC_BYTES + size_of::<Record>())
        + texts.map(|text| piece(text.capacity())).sum::<usize>()
        + groups
        + map_bytes(&identity.claims)
        + attribute_bytes(attributes)
        + login.as_ref().map_or(0, login_bytes)
        + secrets
}

fn map_bytes(map: &BTreeMap<String, String>) -> usize {
    let texts: usize = map.iter().map(|(name, value)| piece(name.capacity()) + piece(value.capacity())).sum();
    texts + map.len().div_ceil(NODE_ENTRIES_USUAL) * piece(NODE_BYTES)
}

fn attribute_bytes(map: &BTreeMap<String, Attribute>) -> usize {
    let texts: usize = map.iter().map(|(name, held)| piece(name.capacity()) + piece(held.value.capacity())).sum();
    texts + map.len().div_ceil(NODE_ENTRIES_USUAL) * piece(ATTRIBUTE_NODE_BYTES)
}

fn login_bytes(login: &ExternalLogin) -> usize {
    let ExternalLogin { provider, issuer, subject, sid, auth_time: _, acr, access_ends: _ } = login;
    let texts = [Some(provider), Some(issuer), Some(subject), sid.as_ref(), acr.as_ref()];
    texts.into_iter().flatten().map(|text| piece(text.capacity())).sum()
}

/// One allocation.
fn piece(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { bytes + ALLOCATION_BYTES }
}

/// The counts of an `Arc`.
const ARC_BYTES: usize = 2 * size_of::<usize>();
/// What an allocator adds, in the mean: rounding up, and its own notes.
const ALLOCATION_BYTES: usize = 12;
/// A node of a `BTreeMap<String, String>`: room for eleven, and links.
const NODE_BYTES: usize = 11 * 2 * size_of::<String>() + 16;
const ATTRIBUTE_NODE_BYTES: usize = 11 * (size_of::<String>() + size_of::<Attribute>()) + 16;
/// Nodes are between half full and full.
const NODE_ENTRIES_USUAL: usize = 8;
/// In the table: key, copy, links, and hash slots that are not all taken.
const PLACE_BYTES: usize = (size_of::<SessionKey>() + size_of::<Kept>() + 21) * 3 / 2;

impl Weighter<SessionKey, Kept> for ByWeight {
    /// Never less than a fair share of the bytes: so the bound on bytes is one on the number, too.
    fn weight(&self, _: &SessionKey, copy: &Kept) -> u64 {
        copy.weight
    }
}

impl Moment {
    /// `CLOCK_BOOTTIME`; the front page says why.
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Self(Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default()))
    }

    /// So long after the machine was started.
    pub const fn after_start(time: Duration) -> Self {
        Self(time)
    }

    /// Nothing when the other one is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions_max: 100_000,
            bytes_max: 128 * 1024 * 1024,
            lease: Duration::from_secs(1),
            role_lease: Duration::from_secs(3),
            age_max: Duration::from_secs(60),
            doubt: Duration::from_secs(5 * 60),
        }
    }
}

impl fmt::Debug for LeaseCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseCache").field("limits", &self.limits).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;
    use crate::identity::Identity;
    use crate::session::id::SessionId;
    use crate::session::record::{ClientHints, LoginMethod};

    const GRACE: Duration = Duration::from_secs(300);
    const LIFE: Duration = Duration::from_secs(30 * 60);

    /// A worker's cache whose time stands still unless it is told.
    struct Worker {
        cache: LeaseCache,
        now: Arc<AtomicU64>,
        key: SessionKey,
    }

    impl Worker {
        fn new(limits: Limits) -> Self {
            let now = Arc::new(AtomicU64::new(1_000_000));
            let clock = Arc::clone(&now);
            let moment = move || Moment::after_start(Duration::from_millis(clock.load(Relaxed)));
            Self { cache: LeaseCache::with_clock(limits, moment), now, key: key() }
        }

        /// Connected, its heart beats, and it has a copy of the session.
        fn with_copy() -> Self {
            let worker = Self::new(Limits::default());
            worker.connect();
            worker.beat(Beat::Write);
            worker.read();
            assert!(worker.hits(), "a copy that was read under a lease is a hit");
            worker
        }

        fn connect(&self) -> Connection {
            let connection = self.cache.connecting();
            assert!(self.cache.connected(connection));
            connection
        }

        fn lose(&self) {
            let connection = self.cache.state.lock().connection;
            self.cache.disconnected(connection.unwrap());
        }

        fn beat(&self, beat: Beat) {
            self.cache.finish_heartbeat(&self.cache.begin_heartbeat(beat));
        }

        fn read(&self) {
            self.cache.finish_read(&self.cache.begin_read(&self.key), Some(&stored()));
        }

        fn pass(&self, milliseconds: u64) {
            self.now.fetch_add(milliseconds, Relaxed);
        }

        /// Time passes, and the heart goes on beating.
        fn live(&self, milliseconds: u64) {
            for _ in 0..milliseconds / 250 {
                self.pass(250);
                self.beat(Beat::Write);
            }
        }

        fn hits(&self) -> bool {
            self.cache.get(&self.key).is_some()
        }

        fn in_grace(&self) -> bool {
            self.cache.get_within(&self.key, GRACE).is_some()
        }

        fn doubts(&self) -> bool {
            self.cache.doubts(&self.key)
        }
    }

    pub(super) fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    pub(super) fn stored() -> Stored {
        let record = Record {
            identity: Identity { user: "ann".into(), ..Identity::default() },
            attributes: BTreeMap::new(),
            created: 0,
            ends: u64::MAX,
            method: LoginMethod::Password,
            client: ClientHints { address: None, user_agent: String::new() },
            secrets: None,
            login: None,
            known: Default::default(),
        };
        Stored { record: Arc::new(record), time_to_live: LIFE }
    }

    #[test]
    fn invariant_1_a_hit_needs_the_lease_of_the_stream_and_of_the_role() {
        let worker = Worker::new(Limits::default());
        worker.connect();
        worker.read();
        assert!(!worker.hits(), "no heartbeat was answered yet");
        worker.beat(Beat::Ping);
        assert!(!worker.hits(), "a ping does not show that this is the primary");
        worker.beat(Beat::Write);
        assert!(worker.hits());
        worker.pass(999);
        assert!(worker.hits());
        worker.pass(1);
        assert!(!worker.hits(), "one lease after the last sign of life");
        worker.beat(Beat::Ping);
        assert!(worker.hits(), "the stream was never broken: the copy was true all the time");
        worker.pass(999);
        worker.beat(Beat::Ping);
        worker.pass(999);
        worker.beat(Beat::Ping);
        assert!(worker.hits(), "2998 ms after the last write");
        worker.pass(2);
        assert!(!worker.hits(), "the role lease is over");
    }

    #[test]
    fn invariant_1_a_copy_is_not_used_beyond_its_own_end_or_age() {
        let worker = Worker::with_copy();
        worker.live(59_750);
        assert!(worker.hits());
        worker.live(250);
        assert!(!worker.hits(), "a minute is the age limit, should the store have stopped to track");

        let short = Stored { time_to_live: Duration::from_millis(300), ..stored() };
        worker.cache.finish_read(&worker.cache.begin_read(&worker.key), Some(&short));
        worker.pass(299);
        assert_eq!(worker.cache.get(&worker.key).unwrap().time_to_live, Duration::from_millis(1));
        worker.pass(1);
        assert!(!worker.hits(), "the store would not have it any more");
        assert!(!worker.in_grace(), "in an outage it ends when it would have ended");
    }

    #[test]
    fn invariant_2_what_was_pushed_since_a_read_was_sent_keeps_its_reply_out() {
        type Meanwhile = fn(&Worker);
        let cases: [(&str, Meanwhile, bool); 6] = [
            ("nothing", |_| {}, true),
            ("the key was pushed", |worker| worker.cache.invalidate(&worker.key), false),
            ("everything was flushed", |worker| worker.cache.flush(), false),
            ("a logout here", |worker| worker.cache.forget_own(&worker.key), false),
            (
                "a new connection",
                |worker| {
                    worker.connect();
                    worker.beat(Beat::Write);
                },
                false,
            ),
            ("another read", |worker| worker.read(), true),
        ];
        for (what, meanwhile, kept) in cases {
            let worker = Worker::new(Limits::default());
            worker.connect();
            worker.beat(Beat::Write);
            let ticket = worker.cache.begin_read(&worker.key);
            meanwhile(&worker);
            worker.cache.finish_read(&ticket, Some(&stored()));
            assert_eq!(worker.hits(), kept, "{what}");
            worker.read();
            assert!(worker.hits(), "{what}: the next read is kept");
        }
    }

    #[test]
    fn a_push_after_the_reply_takes_the_copy_back() {
        let worker = Worker::with_copy();
        worker.cache.invalidate(&worker.key);
        assert!(!worker.hits());
        assert!(!worker.in_grace(), "what was taken back is not served in an outage either");
    }

    #[test]
    fn invariant_3_a_change_of_connection_voids_all_older_copies() {
        let worker = Worker::with_copy();
        let second = worker.connect();
        worker.beat(Beat::Write);
        assert!(!worker.hits(), "nobody pushed what changed in between");
        worker.read();
        assert!(worker.hits());
        worker.cache.disconnected(second);
        assert!(!worker.hits(), "a lost connection ends all hits at once");
        worker.beat(Beat::Write);
        assert!(!worker.hits(), "nothing can be answered while there is none");
    }

    #[test]
    fn what_an_old_connection_still_says_changes_nothing() {
        let worker = Worker::new(Limits::default());
        let first = worker.connect();
        let (ticket, heartbeat) = (worker.cache.begin_read(&worker.key), worker.cache.begin_heartbeat(Beat::Write));
        let second = worker.connect();
        worker.cache.finish_heartbeat(&heartbeat);
        worker.read();
        assert!(!worker.hits(), "the old one's heartbeat is no lease on the new one");
        worker.beat(Beat::Write);
        worker.cache.invalidate(&worker.key);
        worker.cache.finish_read(&ticket, Some(&stored()));
        assert!(!worker.hits(), "the old one's reply is not kept");
        worker.read();
        worker.cache.disconnected(first);
        assert!(worker.hits(), "its end does not end the new one");

        let third = worker.cache.connecting();
        worker.cache.disconnected(third);
        assert!(!worker.cache.connected(third), "lost before it was noted as connected");
        assert!(!worker.cache.connected(first), "superseded");
        assert!(worker.hits(), "the second goes on");
        worker.cache.disconnected(second);
        assert!(!worker.hits());
    }

    #[test]
    fn invariant_4_a_touch_takes_the_copy_back_and_the_next_read_is_kept() {
        let worker = Worker::with_copy();
        let touch = worker.cache.begin_touch(&worker.key);
        assert!(worker.hits(), "until the store says that it changed");
        worker.cache.invalidate(&worker.key);
        assert!(!worker.hits(), "the store does not track it any more");
        worker.cache.finish_touch(&touch, Touched::Extended);
        assert!(!worker.hits(), "still not");
        worker.read();
        assert!(worker.hits());
    }

    #[test]
    fn invariant_5_a_life_is_counted_from_the_sending_of_its_read() {
        let worker = Worker::new(Limits::default());
        worker.connect();
        let ticket = worker.cache.begin_read(&worker.key);
        worker.pass(700);
        worker.cache.finish_read(&ticket, Some(&stored()));
        worker.beat(Beat::Write);
        let left = worker.cache.get(&worker.key).unwrap().time_to_live;
        assert_eq!(left, LIFE - Duration::from_millis(700), "the store said it up to 700 ms ago");
    }

    #[test]
    fn invariant_6_who_ends_a_session_here_never_sees_it_again() {
        let worker = Worker::with_copy();
        let before = worker.cache.begin_read(&worker.key);
        worker.cache.forget_own(&worker.key);
        assert!(!worker.hits(), "before the command is sent");
        worker.cache.finish_read(&before, Some(&stored()));
        assert!(!worker.hits(), "a read from before it");

        let while_it_ran = worker.cache.begin_read(&worker.key);
        worker.read();
        assert!(worker.hits(), "the command has not been executed: it lives");
        worker.cache.forget_own(&worker.key);
        worker.cache.finish_read(&while_it_ran, Some(&stored()));
        assert!(!worker.hits() && !worker.in_grace(), "after the answer nothing brings it back");
        assert!(worker.doubts());
    }

    #[test]
    fn a_frozen_server_is_believed_for_one_lease_from_the_last_command_that_it_answered() {
        let worker = Worker::with_copy();
        let heartbeat = worker.cache.begin_heartbeat(Beat::Write);
        worker.pass(900);
        assert!(worker.hits());
        worker.cache.finish_heartbeat(&heartbeat);
        worker.pass(100);
        assert!(!worker.hits(), "the late answer proves nothing about the time after it was asked");
    }

    #[test]
    fn a_worker_that_was_paused_has_no_hits_when_it_wakes() {
        let worker = Worker::with_copy();
        let heartbeat = worker.cache.begin_heartbeat(Beat::Write);
        worker.pass(8 * 60 * 60 * 1000);
        assert!(!worker.hits());
        worker.cache.finish_heartbeat(&heartbeat);
        assert!(!worker.hits(), "nor by the answer to what it asked before");
        assert!(!worker.in_grace(), "eight hours are no grace");
    }

    #[test]
    fn a_demoted_or_isolated_primary_is_believed_for_one_role_lease() {
        let worker = Worker::with_copy();
        for _ in 0..11 {
            worker.pass(250);
            worker.beat(Beat::Ping);
        }
        assert!(worker.hits(), "2750 ms after it took a write");
        worker.pass(250);
        worker.beat(Beat::Ping);
        assert!(!worker.hits(), "it answers pings and refuses writes");
    }

    #[test]
    fn a_push_for_what_did_not_change_costs_one_read() {
        // The tracking table of the server is full: it takes back what it forgets.
        let worker = Worker::with_copy();
        worker.cache.invalidate(&worker.key);
        assert!(!worker.hits());
        worker.read();
        assert!(worker.hits() && !worker.doubts());
    }

    #[test]
    fn a_flush_leaves_nothing_and_doubts_all() {
        let worker = Worker::with_copy();
        worker.cache.flush();
        assert!(!worker.hits() && !worker.in_grace());
        assert!(worker.doubts() && worker.cache.doubts(&key()), "whoever had a session has none now");
        worker.read();
        assert!(worker.hits(), "the connection is as good as before");
        worker.live(300_000);
        assert!(!worker.cache.doubts(&key()), "doubts have a time");
    }

    #[test]
    fn in_an_outage_what_was_true_lately_is_served() {
        let worker = Worker::with_copy();
        worker.live(10_000);
        worker.lose();
        worker.pass(GRACE.as_millis() as u64 - 1);
        assert!(worker.in_grace() && !worker.hits());
        worker.pass(1);
        assert!(!worker.in_grace(), "grace is counted from when it was last known true");
    }

    #[test]
    fn grace_outlives_connections_that_come_to_nothing_and_ends_with_one_that_works() {
        let worker = Worker::with_copy();
        let other = key();
        worker.lose();
        for _ in 0..3 {
            let connection = worker.connect();
            worker.cache.finish_read(&worker.cache.begin_read(&other), Some(&stored()));
            worker.cache.disconnected(connection);
            assert!(worker.in_grace(), "a server that tracks but takes no write yet is still down");
            assert!(worker.cache.get_within(&other, GRACE).is_some(), "what it said meanwhile was true");
        }
        worker.connect();
        worker.beat(Beat::Write);
        assert!(!worker.in_grace(), "it can be asked");
        worker.cache.finish_read(&worker.cache.begin_read(&worker.key), None);
        assert!(!worker.in_grace() && worker.doubts(), "it was asked, and knows of no session");
    }

    #[test]
    fn grace_counts_from_the_age_limit_of_a_copy_that_nobody_read_again() {
        let worker = Worker::with_copy();
        worker.live(200_000);
        worker.lose();
        worker.pass(159_999);
        assert!(worker.in_grace());
        worker.pass(1);
        assert!(!worker.in_grace(), "60 s age and 300 s grace after the read");
    }

    #[test]
    fn the_echo_of_an_own_touch_says_nothing_against_the_session() {
        type Push = bool;
        type Reconnect = fn(&Worker) -> Touch;
        let cases: [(&str, &[Push], Option<Touched>, bool); 6] = [
            ("extended", &[true], Some(Touched::Extended), true),
            ("extended, and somebody else wrote", &[true, true], Some(Touched::Extended), false),
            ("nothing was written, yet a push came", &[true], Some(Touched::Unchanged), false),
            ("nothing was written", &[], Some(Touched::Unchanged), true),
            ("no answer", &[true], None, false),
            ("gone", &[], Some(Touched::Gone), false),
        ];
        for (what, pushes, touched, known) in cases {
            let worker = Worker::with_copy();
            let touch = worker.cache.begin_touch(&worker.key);
            worker.pass(1);
            pushes.iter().for_each(|_| worker.cache.invalidate(&worker.key));
            if let Some(touched) = touched {
                worker.cache.finish_touch(&touch, touched);
            }
            worker.lose();
            assert_eq!(worker.in_grace(), known, "{what}: served in an outage");
            assert_eq!(worker.doubts(), !known, "{what}: doubted");
        }
        let worker = Worker::with_copy();
        let touch = worker.cache.begin_touch(&worker.key);
        worker.cache.invalidate(&worker.key);
        worker.cache.finish_touch(&touch, Touched::Extended);
        worker.cache.invalidate(&worker.key);
        assert!(!worker.in_grace() && worker.doubts(), "the second push is no echo");

        let reconnects: [(&str, Reconnect); 2] = [
            ("before the touch", |worker| {
                worker.connect();
                worker.cache.begin_touch(&worker.key)
            }),
            ("after it", |worker| {
                let touch = worker.cache.begin_touch(&worker.key);
                worker.connect();
                touch
            }),
        ];
        for (when, reconnect) in reconnects {
            let worker = Worker::with_copy();
            let touch = reconnect(&worker);
            worker.cache.invalidate(&worker.key);
            worker.cache.finish_touch(&touch, Touched::Extended);
            let known = !worker.doubts() || worker.in_grace();
            assert!(!known, "a new connection {when}: the store has nothing to echo there");
        }
    }

    #[test]
    fn a_touch_over_another_connection_explains_the_one_push_that_it_causes_whichever_is_heard_of_first() {
        for push_comes_first in [true, false] {
            let worker = Worker::with_copy();
            let touch = worker.cache.begin_touch(&worker.key);
            worker.pass(1);
            if push_comes_first {
                worker.cache.invalidate(&worker.key);
            }
            worker.cache.finish_touch(&touch, Touched::Extended);
            assert!(!worker.hits(), "the store tracks it no more, or has said so already");
            if !push_comes_first {
                worker.cache.invalidate(&worker.key);
            }
            assert!(!worker.hits() && !worker.doubts());
            worker.cache.invalidate(&worker.key);
            assert!(worker.doubts(), "only the one");
        }
    }

    #[test]
    fn a_read_elsewhere_clears_what_was_held_against_a_session_before_and_nothing_since() {
        let worker = Worker::with_copy();
        worker.cache.invalidate(&worker.key);
        worker.pass(1);
        let read = worker.cache.begin_read(&worker.key);
        worker.cache.seen_alive(&read);
        assert!(!worker.doubts(), "seen alive since");
        worker.cache.invalidate(&worker.key);
        worker.cache.seen_alive(&read);
        assert!(worker.doubts(), "that may be the news of its end");
    }

    #[test]
    fn doubts_last_their_time_and_when_there_are_too_many_all_are_doubted() {
        let limits = Limits { sessions_max: 3, ..Limits::default() };
        let (worker, stranger) = (Worker::new(limits), key());
        assert!(!worker.doubts());
        worker.cache.invalidate(&worker.key);
        assert!(worker.doubts() && !worker.cache.doubts(&stranger));
        worker.pass(299_999);
        assert!(worker.doubts());
        worker.pass(300_001);
        assert!(!worker.doubts(), "after twice its time at the latest");

        for _ in 0..4 {
            worker.cache.invalidate(&key());
        }
        assert!(worker.cache.doubts(&stranger), "the fourth does not fit: nobody can say any more who is meant");
        worker.pass(300_000);
        assert!(!worker.cache.doubts(&stranger));
    }

    #[test]
    fn copies_are_bounded_in_number_and_in_bytes() {
        let one = heap_bytes(&stored()) as u64;
        for (sessions_max, bytes_max, kept) in
            [(10, 1_000_000, 8..=10), (1_000, 20 * one, 15..=20), (0, 1_000_000, 0..=0), (10, one / 2, 0..=0)]
        {
            let worker = Worker::new(Limits { sessions_max, bytes_max, ..Limits::default() });
            worker.connect();
            worker.beat(Beat::Write);
            for _ in 0..100 {
                worker.cache.finish_read(&worker.cache.begin_read(&key()), Some(&stored()));
                assert!(worker.cache.bytes() <= bytes_max);
            }
            assert!(kept.contains(&worker.cache.sessions()), "{} of {sessions_max}", worker.cache.sessions());
        }
    }

    /// In a process of its own, where nobody else allocates.
    #[test]
    fn the_estimate_of_a_copy_is_about_what_it_takes() {
        const ALONE: &str = "CLOAKROOM_TEST_ALONE";
        const COPIES: usize = 20_000;
        if std::env::var_os(ALONE).is_none() {
            let name = "session::cache::tests::the_estimate_of_a_copy_is_about_what_it_takes";
            let program = std::env::current_exe().unwrap();
            let run = Command::new(program).args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().unwrap();
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            return;
        }
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
        };
        let pairs = |count: usize| (0..count).map(|n| (format!("claim-{n}"), "x".repeat(20 + n))).collect();
        let full = || {
            let Stored { record, time_to_live } = stored();
            let mut record = Arc::unwrap_or_clone(record);
            record.identity.name = Some("Ann Archer".into());
            record.identity.email = Some("ann@example.org".into());
            record.identity.groups = vec!["staff".into(), "editors".into(), "a group with a long name".into()];
            record.identity.claims = pairs(20);
            let attribute = |(name, value)| (name, Attribute { value, ends: None });
            record.attributes = pairs(3).into_iter().map(attribute).collect();
            record.client.user_agent = "x".repeat(120);
            Stored { record: Arc::new(record), time_to_live }
        };
        for make in [&stored as &dyn Fn() -> Stored, &full] {
            let worker = Worker::new(Limits { sessions_max: COPIES * 2, bytes_max: 1 << 30, ..Limits::default() });
            let before = resident();
            for _ in 0..COPIES {
                worker.cache.finish_read(&worker.cache.begin_read(&key()), Some(&make()));
            }
            let (taken, estimate) = ((resident() - before) / COPIES, heap_bytes(&make()));
            assert!((taken / 2..=taken * 3 / 2).contains(&estimate), "{taken} are taken, {estimate} are estimated");
        }
    }

    #[test]
    fn time_goes_on_as_the_kernel_counts_it() {
        let (before, after) = (Moment::now(), Moment::now());
        assert!(Moment::default() < before && before <= after);
        assert_eq!((before + LIFE).since(before), LIFE);
        assert_eq!(before.since(before + LIFE), Duration::ZERO);
    }
}
