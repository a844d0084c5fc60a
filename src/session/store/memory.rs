//! Sessions of one process, in its own memory: bounded, expiring, and gone with it.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use parking_lot::Mutex;

use super::{
    Count, Creation, Ending, Found, NewSession, SessionStore, StoreError, Stored, Terms, counter_hash, millis,
};
use crate::session::id::SessionKey;
use crate::session::record::Record;

/// A sharded map. What has expired is gone for every reader at once; its memory is freed by later writes.
pub struct MemoryStore {
    shards: Box<[Mutex<Shard>]>,
    sessions_max: usize,
    /// Sessions that take up memory, expired ones too.
    sessions: AtomicUsize,
    clock: Clock,
    sweep_due: AtomicU64,
    sweep_next: AtomicUsize,
}

/// Tells the Unix time in ms; must never go back.
pub type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

#[derive(Default)]
struct Shard {
    sessions: HashMap<SessionKey, Entry>,
    counters: HashMap<[u8; 24], Counter>,
}

struct Entry {
    record: Arc<Record>,
    expires: u64,
}

struct Counter {
    value: u64,
    expires: u64,
}

/// Far more than there are cores, so that two requests seldom meet.
const SHARDS: usize = 64;
/// An attacker makes counters with every login that fails. These are 16 MiB, and a quarter of a million failures.
const COUNTERS_PER_SHARD_MAX: usize = 4096;
/// One shard is swept at most this often, in ms: all of them in about a minute of writes.
const SWEEP_INTERVAL: u64 = 1000;

impl MemoryStore {
    /// Keeps at most `sessions_max` sessions, and refuses further ones.
    pub fn new(sessions_max: usize) -> Self {
        Self::with_clock(sessions_max, steady_clock())
    }

    pub fn with_clock(sessions_max: usize, clock: Clock) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            sessions_max,
            sessions: AtomicUsize::new(0),
            clock,
            sweep_due: AtomicU64::new(0),
            sweep_next: AtomicUsize::new(0),
        }
    }

    fn shard(&self, key: &SessionKey) -> &Mutex<Shard> {
        &self.shards[key.spread() % SHARDS]
    }

    fn counter_shard(&self, hash: &[u8; 24]) -> &Mutex<Shard> {
        &self.shards[usize::from(hash[0]) % SHARDS]
    }

    /// Takes one of the places, if there is one.
    fn reserve(&self) -> bool {
        let one_more = |sessions| (sessions < self.sessions_max).then_some(sessions + 1);
        self.sessions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    fn release(&self, places: usize) {
        self.sessions.fetch_sub(places, Ordering::Relaxed);
    }

    fn sweep(&self, shard: &Mutex<Shard>, now: u64) {
        let mut shard = shard.lock();
        let before = shard.sessions.len();
        shard.sessions.retain(|_, entry| now < entry.expires);
        shard.counters.retain(|_, counter| now < counter.expires);
        self.release(before - shard.sessions.len());
    }

    fn sweep_all(&self, now: u64) {
        self.shards.iter().for_each(|shard| self.sweep(shard, now));
    }

    /// The share of one write in keeping the memory clean.
    fn sweep_some(&self, now: u64) {
        let due = self.sweep_due.load(Ordering::Relaxed);
        let is_mine = due <= now
            && self
                .sweep_due
                .compare_exchange(due, now.saturating_add(SWEEP_INTERVAL), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if is_mine {
            let next = self.sweep_next.fetch_add(1, Ordering::Relaxed);
            self.sweep(&self.shards[next % SHARDS], now);
        }
    }
}

#[async_trait]
impl SessionStore for MemoryStore {
    async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
        let now = (self.clock)();
        let shard = self.shard(key).lock();
        let live = shard.sessions.get(key).filter(|entry| now < entry.expires);
        Ok(live.map_or(Found::Nothing, |entry| {
            Found::Live(Stored {
                record: Arc::clone(&entry.record),
                time_to_live: Duration::from_millis(entry.expires - now),
            })
        }))
    }

    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        let (lifetime, replaces) = (terms.lifetime, terms.replaces.as_ref());
        let now = (self.clock)();
        self.sweep_some(now);
        let record = session.into_record(now, lifetime);
        // Only for its limit: what another store would refuse is refused here too.
        record.encode().map_err(|error| StoreError::Refused(error.into()))?;
        let entry =
            Entry { expires: now.saturating_add(millis(lifetime.idle)).min(record.ends), record: Arc::new(record) };

        let has_place = self.reserve() || {
            self.sweep_all(now);
            self.reserve()
        };
        // Nobody knows the new key before this returns: that the old session ends first is seen by nobody.
        let inherits_place = replaces.is_some_and(|old| self.shard(old).lock().sessions.remove(old).is_some());
        match (has_place, inherits_place) {
            (true, true) => self.release(1),
            (true, false) | (false, true) => {}
            (false, false) => return Err(StoreError::Refused("store.memory.sessions_max is reached".into())),
        }
        if self.shard(key).lock().sessions.insert(key.clone(), entry).is_some() {
            self.release(1);
        }
        Ok(Creation::Begun { displaced: 0 })
    }

    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
        let now = (self.clock)();
        let mut shard = self.shard(key).lock();
        let Some(entry) = shard.sessions.get_mut(key).filter(|entry| now < entry.expires) else { return Ok(false) };
        if ends <= now {
            shard.sessions.remove(key);
            self.release(1);
            return Ok(false);
        }
        entry.expires = now.saturating_add(millis(idle)).min(ends).max(entry.expires);
        Ok(true)
    }

    async fn destroy(&self, key: &SessionKey, _user: Option<&str>, _ending: Ending) -> Result<bool, StoreError> {
        let now = (self.clock)();
        let Some(entry) = self.shard(key).lock().sessions.remove(key) else { return Ok(false) };
        self.release(1);
        Ok(now < entry.expires)
    }

    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        let now = (self.clock)();
        self.sweep_some(now);
        let hash = counter_hash(counter);
        let mut shard = self.counter_shard(&hash).lock();
        if COUNTERS_PER_SHARD_MAX <= shard.counters.len() && !shard.counters.contains_key(&hash) {
            shard.counters.retain(|_, counter| now < counter.expires);
            if COUNTERS_PER_SHARD_MAX <= shard.counters.len() {
                // To forget a count instead would let attackers flush their own.
                return Err(StoreError::Refused("too many counters".into()));
            }
        }
        let fresh = || Counter { value: 0, expires: now.saturating_add(millis(window)) };
        let counter = shard.counters.entry(hash).or_insert_with(fresh);
        if counter.expires <= now {
            *counter = fresh();
        }
        counter.value += 1;
        Ok(Count { value: counter.value, resets_in: Duration::from_millis(counter.expires - now) })
    }

    async fn decrement(&self, counter: &str) -> Result<(), StoreError> {
        let now = (self.clock)();
        let hash = counter_hash(counter);
        let mut shard = self.counter_shard(&hash).lock();
        if let Some(counter) = shard.counters.get_mut(&hash).filter(|counter| now < counter.expires) {
            counter.value = counter.value.saturating_sub(1);
        }
        Ok(())
    }

    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        let now = (self.clock)();
        let hash = counter_hash(counter);
        let shard = self.counter_shard(&hash).lock();
        Ok(shard.counters.get(&hash).filter(|counter| now < counter.expires).map_or(0, |counter| counter.value))
    }

    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        let hash = counter_hash(counter);
        self.counter_shard(&hash).lock().counters.remove(&hash);
        Ok(())
    }

    async fn ping(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("sessions_max", &self.sessions_max).finish_non_exhaustive()
    }
}

/// Unix time that starts with the system's clock and then never jumps: setting the clock ends nobody's session.
fn steady_clock() -> Clock {
    let started = Instant::now();
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Box::new(move || millis(epoch + started.elapsed()))
}

#[cfg(test)]
mod tests {
    use crate::identity::Identity;
    use crate::session::id::SessionId;
    use crate::session::record::{ClientHints, LoginMethod};

    use crate::session::Lifetime;

    use super::*;

    const LIFETIME: Lifetime = Lifetime { idle: Duration::from_millis(100), absolute: Duration::from_millis(1_000) };

    fn store(sessions_max: usize) -> (MemoryStore, Arc<AtomicU64>) {
        let now = Arc::new(AtomicU64::new(1_000_000));
        let clock = Arc::clone(&now);
        (MemoryStore::with_clock(sessions_max, Box::new(move || clock.load(Ordering::Relaxed))), now)
    }

    fn session() -> NewSession {
        NewSession {
            identity: Identity { user: "ann".into(), ..Identity::default() },
            method: LoginMethod::Password,
            client: ClientHints { address: None, user_agent: String::new() },
            secrets: None,
        }
    }

    fn terms(replaces: Option<&SessionKey>) -> Terms {
        Terms { lifetime: LIFETIME, limit: None, replaces: replaces.cloned() }
    }

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    #[tokio::test]
    async fn beyond_the_bound_a_session_is_refused_until_one_ends_or_expires() {
        let (store, now) = store(3);
        let keys = [key(), key(), key()];
        for key in &keys {
            store.create(key, session(), &terms(None)).await.unwrap();
        }
        let refused = store.create(&key(), session(), &terms(None)).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "the bound is the bound");
        assert!(store.load(&keys[0]).await.unwrap().live().is_some(), "who is in stays in");

        let replacing = key();
        store.create(&replacing, session(), &terms(Some(&keys[0]))).await.expect("a new login of the same browser");
        assert!(store.load(&keys[0]).await.unwrap().live().is_none());
        assert!(store.create(&key(), session(), &terms(None)).await.is_err(), "one for one");
        assert!(store.create(&key(), session(), &terms(Some(&keys[0]))).await.is_err(), "an ended one frees nothing");

        assert!(store.destroy(&keys[1], None, Ending::LoggedOut).await.unwrap());
        store.create(&key(), session(), &terms(None)).await.expect("a logout makes room");

        now.fetch_add(100, Ordering::Relaxed);
        for _ in 0..3 {
            store.create(&key(), session(), &terms(None)).await.expect("the expired make room");
        }
        assert!(store.create(&key(), session(), &terms(None)).await.is_err());
        assert_eq!(store.sessions.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn the_expired_are_swept_by_later_writes() {
        let (store, now) = store(10_000);
        for n in 0..1_000 {
            store.create(&key(), session(), &terms(None)).await.unwrap();
            store.increment(&n.to_string(), Duration::from_millis(50)).await.unwrap();
        }
        for _ in 0..=SHARDS {
            now.fetch_add(SWEEP_INTERVAL, Ordering::Relaxed);
            store.increment("other", Duration::from_millis(1)).await.unwrap();
        }
        let left: usize = store.shards.iter().map(|shard| shard.lock().sessions.len()).sum();
        let counters: usize = store.shards.iter().map(|shard| shard.lock().counters.len()).sum();
        assert_eq!((left, store.sessions.load(Ordering::Relaxed)), (0, 0), "expired sessions take no memory for long");
        assert!(counters <= 1, "{counters} counters are left");
    }

    #[tokio::test]
    async fn counters_are_bounded_and_the_known_ones_go_on_counting() {
        let (store, now) = store(1);
        let window = Duration::from_millis(100);
        store.increment("victim", window).await.unwrap();
        let mut refused = 0;
        for n in 0..SHARDS * COUNTERS_PER_SHARD_MAX + 20_000 {
            refused += usize::from(store.increment(&format!("flood{n}"), window).await.is_err());
        }
        assert!(0 < refused, "a flood of names must meet a bound");
        assert_eq!(store.increment("victim", window).await.unwrap().value, 2, "a flood must not make us forget");
        now.fetch_add(100, Ordering::Relaxed);
        for n in 0..1_000 {
            store.increment(&format!("later{n}"), window).await.expect("the forgotten make room");
        }
    }

    #[tokio::test]
    async fn many_at_once_keep_the_count_right() {
        let store = Arc::new(MemoryStore::new(64));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let store = Arc::clone(&store);
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(async {
                        let mut last: Option<SessionKey> = None;
                        for n in 0..2_000 {
                            let key = key();
                            if store.create(&key, session(), &terms(last.as_ref())).await.is_ok() {
                                last = Some(key);
                            }
                            if n % 3 == 0
                                && let Some(key) = last.take()
                            {
                                store.destroy(&key, None, Ending::LoggedOut).await.unwrap();
                            }
                        }
                    });
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let held: usize = store.shards.iter().map(|shard| shard.lock().sessions.len()).sum();
        assert_eq!(store.sessions.load(Ordering::Relaxed), held, "no place is lost or taken twice");
    }
}
