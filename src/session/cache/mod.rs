//! What may one worker say of a session without asking the store? The copies it keeps, while nobody can have changed
//! them, or for at most one `lease` longer.
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
//! * (I6) Who ends a session here forgets it before the command is sent and again when it was answered.
//! * (I7) Pushes are applied in the order of the stream, before any later reply is seen: the link does that.
//!
//! The clock is `CLOCK_BOOTTIME`, not [`std::time::Instant`]: that stands still while the machine is suspended, and
//! a lease would outlive the night.
//!
//! # One worker, one primary
//!
//! There is a cache for each connection of a worker, filled and asked by that worker's thread; the lock is never
//! waited for. Nothing here does I/O: whoever has the connection tells what happened on it.
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
//! #     identity, attributes: Default::default(), created: 0, ends: 1, method, client, secrets: None };
//! # demo(Stored { record: record.into(), time_to_live: Duration::from_secs(60) });
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Add;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use rustix::time::{ClockId, clock_gettime};

use super::id::SessionKey;
use super::record::Record;
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
    copies: Cache<SessionKey, Kept, ByWeight, BuildHasherDefault<KeyHasher>>,
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
    touch: Touched,
    weight: u64,
}

/// Our own touch of a session is a write, and takes our own copy back. It says nothing against the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touched {
    No,
    /// A touch was sent. The next push may be its echo.
    Sent(Moment),
    /// A push came, and the touch is not answered yet.
    Pushed(Moment),
    /// The touch that was sent then found the session alive. The store does not track it any more.
    Alive(Moment),
}

#[derive(Clone)]
struct ByWeight;

/// Session keys are hashes already.
#[derive(Default)]
struct KeyHasher(u64);

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
        let copies = Cache::with_options(options, ByWeight, BuildHasherDefault::default(), DefaultLifecycle::default());
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
        let now = (self.clock)();
        let state = self.state.lock();
        if state.lease_until() <= now {
            return None;
        }
        let copy = state.copies.get(key)?;
        let tracked = matches!(copy.touch, Touched::No | Touched::Sent(_));
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
        let known_true = match copy.touch {
            Touched::Pushed(_) => return None,
            Touched::Alive(touched) => touched,
            Touched::No | Touched::Sent(_) if copy.epoch == state.good.epoch => {
                state.good.until.min(copy.read + self.limits.age_max).max(copy.read)
            }
            Touched::No | Touched::Sent(_) => copy.read,
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
            touch: Touched::No,
            weight: (heap_bytes(stored) as u64).max(least),
        };
        state.copies.insert(ticket.key.clone(), copy);
    }

    /// The store says that it changed. Whether an answer on its way is older is not known, so it will not be kept (I2).
    pub fn invalidate(&self, key: &SessionKey) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let echo = state.copies.peek_mut(key).is_some_and(|mut copy| match copy.touch {
            Touched::Sent(touched) => {
                copy.touch = Touched::Pushed(touched);
                true
            }
            Touched::No | Touched::Pushed(_) | Touched::Alive(_) => false,
        });
        if echo {
            state.bump(key);
            state.doubts.note(key, now);
        } else {
            state.forget(key, now);
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

    /// This worker ends it: to be called before the command is sent and again when it was answered, or failed (I6).
    pub fn forget_own(&self, key: &SessionKey) {
        let now = (self.clock)();
        self.state.lock().forget(key, now);
    }

    /// Before a touch of ours is sent.
    pub fn begin_touch(&self, key: &SessionKey) -> Touch {
        let sent = (self.clock)();
        if let Some(mut copy) = self.state.lock().copies.peek_mut(key)
            && copy.touch == Touched::No
        {
            copy.touch = Touched::Sent(sent);
        }
        Touch { key: key.clone(), sent }
    }

    /// It was answered. A touch that failed is not finished: nobody knows.
    pub fn finish_touch(&self, touch: &Touch, lives: bool) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        if !lives {
            return state.forget(&touch.key, now);
        }
        let explained = state.copies.peek_mut(&touch.key).is_some_and(|mut copy| match copy.touch {
            Touched::Pushed(sent) if sent == touch.sent => {
                copy.touch = Touched::Alive(sent);
                true
            }
            // It was alive as long as it could be: nothing was written, no push comes.
            Touched::Sent(sent) if sent == touch.sent => {
                copy.touch = Touched::No;
                false
            }
            Touched::No | Touched::Sent(_) | Touched::Pushed(_) | Touched::Alive(_) => false,
        });
        if explained {
            state.doubts.clear(&touch.key);
        }
    }

    /// Whether this worker has reason to think that the session ended: it was taken back or ended here lately and not
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
    let Record { identity, attributes, created: _, ends: _, method: _, client, secrets } = &*stored.record;
    let identity_texts = [Some(&identity.user), identity.name.as_ref(), identity.email.as_ref()];
    let texts = identity_texts.into_iter().flatten().chain(&identity.groups).chain([&client.user_agent]);
    let groups = piece(identity.groups.capacity() * size_of::<String>());
    let secrets = secrets.as_ref().map_or(0, |sealed| piece(sealed.0.capacity()));
    PLACE_BYTES
        + piece(ARC_BYTES + size_of::<Record>())
        + texts.map(|text| piece(text.capacity())).sum::<usize>()
        + groups
        + map_bytes(&identity.claims)
        + map_bytes(attributes)
        + secrets
}

fn map_bytes(map: &BTreeMap<String, String>) -> usize {
    let texts: usize = map.iter().map(|(name, value)| piece(name.capacity()) + piece(value.capacity())).sum();
    texts + map.len().div_ceil(NODE_ENTRIES_USUAL) * piece(NODE_BYTES)
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

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(bytes) = bytes.first_chunk() {
            self.0 = u64::from_ne_bytes(*bytes);
        }
    }

    /// The bucket: known to be the same for all sessions of a user.
    fn write_u16(&mut self, _: u16) {}

    /// A length: the same for all.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Moment {
    /// `CLOCK_BOOTTIME`; the page before this says why.
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
