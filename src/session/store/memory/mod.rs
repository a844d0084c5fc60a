//! Sessions of one process: a sharded map that is the truth, and a file that follows it, where one is wanted.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};

use super::{
    Activity, BOUND_MAX, Change, Count, Creation, EndEvent, Ending, Found, Listed, Named, NewSession, SessionStore,
    StoreError, StoreOptions, Stored, Terms, changed, millis, name_hash,
};
use crate::config::model::WhenFull;
use crate::session::id::{KeyHashing, SessionKey, UserKey};
use crate::session::record::{LoginMethod, Record};

mod file;

pub use file::FileError;
use file::{Kept, Notes, SessionFile};

/// A sharded map. What has expired is gone for every reader at once; its memory is freed by later writes.
///
/// All sessions of a user, and the list of them, are in one shard, which their bucket names: what concerns one user
/// takes one lock, and happens at once.
pub struct MemoryStore {
    shards: Box<[Mutex<Shard>]>,
    sessions_max: usize,
    options: StoreOptions,
    clock: Clock,
    file: OnceLock<SessionFile>,
    /// Sessions that take up memory, expired ones too.
    sessions: AtomicUsize,
    sweep_due: AtomicU64,
    sweep_next: AtomicUsize,
    /// Numbers the ends of sessions.
    end_next: AtomicU64,
    ends_lost: AtomicU64,
    ends_lost_told: AtomicU64,
}

/// Tells the Unix time in ms; must never go back.
pub type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

/// What was found in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    pub sessions: u64,
    /// Ended while no process ran.
    pub expired: u64,
    /// Damaged, of a newer version, or sealed with a key that is gone. Who comes with such a session is nobody, and
    /// keeps the cookie.
    pub unreadable: u64,
}

#[derive(Default)]
struct Shard {
    sessions: HashMap<SessionKey, Entry, KeyHashing>,
    /// Each user's sessions, in the order in which they began.
    users: BTreeMap<(UserKey, u64), SessionKey>,
    /// Numbers the sessions, for that order.
    session_next: u64,
    remains: HashMap<SessionKey, Remains>,
    /// Ends that nobody was told of, the oldest first.
    ends: VecDeque<(u64, EndEvent)>,
    counters: HashMap<[u8; 24], Counter>,
    claims: HashMap<[u8; 24], Claim>,
    /// By handle: whom it can end, those that are forgotten first at the front.
    bindings: HashMap<[u8; 24], Vec<(u64, SessionKey)>>,
}

struct Entry {
    record: Arc<Record>,
    expires: u64,
    number: u64,
    /// The latest last.
    trail: Vec<Activity>,
}

/// What is known of a session that is not there.
struct Remains {
    what: What,
    expires: u64,
}

#[derive(Clone, Copy)]
enum What {
    Ended(Ending),
    Unreadable,
}

struct Counter {
    value: u64,
    expires: u64,
}

struct Claim {
    holder: String,
    expires: u64,
}

/// Far more than there are cores, so that two requests seldom meet.
const SHARDS: usize = 256;
/// An attacker makes counters with every login that fails. These are 16 MiB, and a quarter of a million failures.
const COUNTERS_PER_SHARD_MAX: usize = 1024;
/// As many names may be claimed at a time: for somebody who replays messages this is no way to fill the memory.
const CLAIMS_PER_SHARD_MAX: usize = 1024;
/// Why a session ended is a courtesy: 65,536 of them, then later ones are not told.
const REMAINS_PER_SHARD_MAX: usize = 256;
/// How long, in ms, the courtesy lasts.
const REMAINS_TIME_MAX: u64 = 60 * 60 * 1000;
/// Ends that wait to be told: 262,144 of them, then the oldest are lost.
const ENDS_PER_SHARD_MAX: usize = 1024;
/// A loss is one line in this time, in ms.
const LOSS_INTERVAL: u64 = 60 * 1000;
/// One shard is swept at most this often, in ms: all of them in about a minute of writes.
const SWEEP_INTERVAL: u64 = 250;

impl MemoryStore {
    /// Keeps at most `sessions_max` sessions, and refuses further ones.
    pub fn new(sessions_max: usize) -> Self {
        Self::with_clock(sessions_max, steady_clock())
    }

    pub fn with_clock(sessions_max: usize, clock: Clock) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            sessions_max,
            options: StoreOptions::default(),
            clock,
            file: OnceLock::new(),
            sessions: AtomicUsize::new(0),
            sweep_due: AtomicU64::new(0),
            sweep_next: AtomicUsize::new(0),
            end_next: AtomicU64::new(0),
            ends_lost: AtomicU64::new(0),
            ends_lost_told: AtomicU64::new(0),
        }
    }

    #[must_use]
    pub fn with_options(self, options: StoreOptions) -> Self {
        Self { options, ..self }
    }

    /// Takes up the sessions that are in `path`, and keeps all of them there from now on. Once, and before any other
    /// use; a file that is not there is created. Blocks.
    ///
    /// The file's times are Unix times. When the system's clock was set back in between, sessions live longer by that
    /// step, but never longer than their absolute time from now on.
    pub fn open_file(&self, path: &Path) -> Result<Loaded, FileError> {
        let now = (self.clock)();
        let mut live = Vec::new();
        let mut remains = Vec::new();
        let mut expired = Vec::new();
        let mut ends = Vec::new();
        let file = SessionFile::open(path, |kept| match kept {
            Kept::Session { key, expires, record } => match self.options.codec.decode(record, &key) {
                Ok(record) => {
                    // From a clock that was ahead of ours: it begins now.
                    let ahead = record.created.saturating_sub(now);
                    let (created, ends) = (record.created - ahead, record.ends.saturating_sub(ahead));
                    let expires = expires.saturating_sub(ahead).min(ends);
                    let record = Record { created, ends, ..record };
                    if now < expires { live.push((key, record, expires)) } else { expired.push((key, Some(record))) }
                }
                Err(_) if now < expires => remains.push((key, expires)),
                Err(_) => expired.push((key, None)),
            },
            Kept::End { number, part, event } => ends.push((number, part, event)),
        })?;
        let loaded =
            Loaded { sessions: live.len() as u64, expired: expired.len() as u64, unreadable: remains.len() as u64 };
        // Only now is there something that could be noted.
        let file = self.file.get_or_init(|| file);

        let end_next = ends.iter().map(|(number, ..)| number + 1).max().unwrap_or_default();
        self.end_next.store(end_next, Ordering::Relaxed);
        for (number, part, event) in ends {
            if self.options.events {
                self.shards[usize::from(part) % SHARDS].lock().ends.push_back((number, event));
            } else {
                file.notes().told(number);
            }
        }
        for (key, record) in expired {
            let mut shard = self.shard(&key).lock();
            let mut notes = file.notes();
            notes.ended(&key);
            if let Some(record) = record
                && record.method != LoginMethod::Anonymous
            {
                self.tell(&mut shard, &mut notes, &key, &record.identity.user, Ending::Expired, now);
            }
        }
        for (key, expires) in remains {
            self.shard(&key).lock().leave(key, What::Unreadable, expires, now);
        }
        self.sessions.fetch_add(live.len(), Ordering::Relaxed);
        live.sort_by_key(|(_, record, _)| record.created);
        for (key, record, expires) in live {
            for handle in record.handles() {
                self.bind_until(&handle, &key, record.ends, now);
            }
            self.shard(&key).lock().insert(key, Arc::new(record), expires);
        }
        Ok(loaded)
    }

    /// Writes what is left into the file, and lets go of it. Without one, nothing.
    pub fn close(&self) {
        if let Some(file) = self.file.get() {
            file.close();
        }
    }

    fn part(key: &SessionKey) -> usize {
        usize::from(key.bucket()) % SHARDS
    }

    fn shard(&self, key: &SessionKey) -> &Mutex<Shard> {
        &self.shards[Self::part(key)]
    }

    fn user_shard(&self, user: &UserKey) -> &Mutex<Shard> {
        &self.shards[usize::from(user.bucket()) % SHARDS]
    }

    /// Where what has this name is.
    fn named_shard(&self, hash: &[u8; 24]) -> &Mutex<Shard> {
        &self.shards[usize::from(hash[0]) % SHARDS]
    }

    /// After the lock of the shard whose changes are noted, never before.
    fn notes(&self) -> Notes<'_> {
        self.file.get().map_or_else(Notes::nowhere, SessionFile::notes)
    }

    /// What has been noted so far outlives a crash from here on.
    async fn settle(&self) -> Result<(), StoreError> {
        match self.file.get() {
            Some(file) => file.settle().await,
            None => Ok(()),
        }
    }

    /// Takes one of the places, if there is one.
    fn reserve(&self) -> bool {
        let one_more = |sessions| (sessions < self.sessions_max).then_some(sessions + 1);
        self.sessions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    fn release(&self, places: usize) {
        self.sessions.fetch_sub(places, Ordering::Relaxed);
    }

    /// A creation, but for the file.
    fn begin(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        let now = (self.clock)();
        self.sweep_some(now);
        let user = UserKey::of(&session.identity.user);
        let record = session.into_record(now, terms.lifetime);
        // Also without a file: what another store would refuse is refused here too.
        let row = self.options.codec.encode(&record, key)?;
        let expires = now.saturating_add(millis(terms.lifetime.idle)).min(record.ends);
        let has_place = self.reserve() || {
            self.sweep_all(now);
            self.reserve()
        };

        let (mut shard, mut other) = self.lock_both(key, terms.replaces.as_ref());
        let mut notes = self.notes();
        let mut ended = 0;
        let mut displaced = Vec::new();
        if let Some(limit) = terms.limit {
            let (live, expired) = shard.members(&user, now);
            ended +=
                expired.iter().filter_map(|old| self.end(&mut shard, &mut notes, old, Ending::Expired, now)).count();
            let others: Vec<_> = live.into_iter().filter(|old| Some(old) != terms.replaces.as_ref()).collect();
            let surplus = (others.len() + 1).saturating_sub(limit.sessions.max(1) as usize);
            if surplus != 0 && limit.when_full == WhenFull::Refuse {
                self.release(ended + usize::from(has_place));
                return Ok(Creation::Full);
            }
            displaced.extend(others.into_iter().take(surplus));
        }
        if let Some(old) = &terms.replaces {
            let at_home = other.as_mut().unwrap_or(&mut shard);
            ended += usize::from(self.end(at_home, &mut notes, old, Ending::Replaced, now).is_some());
        }
        for old in &displaced {
            ended += usize::from(self.end(&mut shard, &mut notes, old, Ending::Displaced, now).is_some());
        }
        if !has_place && ended == 0 {
            return Err(StoreError::Refused("store.memory.sessions_max is reached".into()));
        }
        self.release((ended + usize::from(has_place)) - 1);
        notes.begun(key, expires, row);
        shard.insert(key.clone(), Arc::new(record), expires);
        let displaced = u32::try_from(displaced.len()).unwrap_or(u32::MAX);
        Ok(Creation::Begun { displaced })
    }

    /// The shard of `key`, and that of `other` if it is another one; always in the same order.
    fn lock_both(
        &self,
        key: &SessionKey,
        other: Option<&SessionKey>,
    ) -> (MutexGuard<'_, Shard>, Option<MutexGuard<'_, Shard>>) {
        let part = Self::part(key);
        match other.map(Self::part).filter(|other| *other != part) {
            None => (self.shards[part].lock(), None),
            Some(other) if part < other => {
                let first = self.shards[part].lock();
                (first, Some(self.shards[other].lock()))
            }
            Some(other) => {
                let first = self.shards[other].lock();
                (self.shards[part].lock(), Some(first))
            }
        }
    }

    /// Takes a session out of the map, the file and its user's list, and notes how it ended; whether it lived.
    /// None: there was none. Its place is for the caller to release.
    fn end(
        &self,
        shard: &mut Shard,
        notes: &mut Notes<'_>,
        key: &SessionKey,
        ending: Ending,
        now: u64,
    ) -> Option<bool> {
        let Some(entry) = shard.sessions.remove(key) else {
            if shard.remains.get(key).is_some_and(|remains| matches!(remains.what, What::Unreadable)) {
                shard.remains.remove(key);
                notes.ended(key);
            }
            return None;
        };
        let user = &entry.record.identity.user;
        shard.users.remove(&(UserKey::of(user), entry.number));
        notes.ended(key);
        let lived = now < entry.expires;
        let ending = if lived { ending } else { Ending::Expired };
        let told = match ending {
            Ending::Displaced | Ending::Revoked => Some(REMAINS_TIME_MAX),
            // Its browser has another one: only what was under way still comes with this.
            Ending::Replaced => Some(REMAINS_TIME_MAX / 60),
            Ending::LoggedOut | Ending::Expired => None,
        };
        if let Some(told) = told {
            let until = entry.expires.min(now.saturating_add(told));
            shard.leave(key.clone(), What::Ended(ending), until, now);
        }
        // Nobody wants to know that nobody left.
        if entry.record.method != LoginMethod::Anonymous {
            self.tell(shard, notes, key, user, ending, now);
        }
        Some(lived)
    }

    /// Puts an end among those that somebody is to be told of.
    fn tell(&self, shard: &mut Shard, notes: &mut Notes<'_>, key: &SessionKey, user: &str, ending: Ending, now: u64) {
        if !self.options.events {
            return;
        }
        if ENDS_PER_SHARD_MAX <= shard.ends.len()
            && let Some((oldest, _)) = shard.ends.pop_front()
        {
            notes.told(oldest);
            self.lose_end(now);
        }
        let number = self.end_next.fetch_add(1, Ordering::Relaxed);
        let token = number.to_be_bytes().to_vec();
        let event = EndEvent { token, session: key.log_hash(), user: user.to_owned(), ending, at: now };
        notes.end(number, Self::part(key) as u16, &event);
        shard.ends.push_back((number, event));
    }

    fn lose_end(&self, now: u64) {
        let lost = self.ends_lost.fetch_add(1, Ordering::Relaxed) + 1;
        let told = self.ends_lost_told.load(Ordering::Relaxed);
        let is_mine = told <= now
            && self
                .ends_lost_told
                .compare_exchange(told, now.saturating_add(LOSS_INTERVAL), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if is_mine {
            tracing::warn!(lost, "ends of sessions were told to nobody: too many wait");
        }
    }

    /// Bindings are in no file: a record says by which handles it can be ended.
    fn bind_until(&self, handle: &str, key: &SessionKey, expires: u64, now: u64) -> Vec<SessionKey> {
        let hash = name_hash(Named::Handle, handle);
        let mut shard = self.named_shard(&hash).lock();
        let bound = shard.bindings.entry(hash).or_default();
        bound.retain(|(expires, other)| now < *expires && other != key);
        // Room first: never this one's, which its login is about to begin.
        let surplus = (bound.len() + 1).saturating_sub(BOUND_MAX);
        let surplus = bound.drain(..surplus).map(|(_, key)| key).collect();
        let at = bound.partition_point(|(other, _)| *other <= expires);
        bound.insert(at, (expires, key.clone()));
        surplus
    }

    fn end_all(&self, part: usize, keys: impl FnOnce(&Shard) -> Vec<SessionKey>, ending: Ending) -> u64 {
        let now = (self.clock)();
        let mut shard = self.shards[part].lock();
        let mut notes = self.notes();
        let keys = keys(&shard);
        let ended: Vec<_> = keys.iter().filter_map(|key| self.end(&mut shard, &mut notes, key, ending, now)).collect();
        self.release(ended.len());
        ended.into_iter().filter(|lived| *lived).count() as u64
    }

    fn prune(&self, shard: &Mutex<Shard>, now: u64) {
        let mut shard = shard.lock();
        let expired = |entry: &Entry| entry.expires <= now;
        let keys: Vec<_> =
            shard.sessions.iter().filter(|(_, entry)| expired(entry)).map(|(key, _)| key.clone()).collect();
        if !keys.is_empty() {
            let mut notes = self.notes();
            for key in &keys {
                self.end(&mut shard, &mut notes, key, Ending::Expired, now);
            }
            self.release(keys.len());
        }
        shard.counters.retain(|_, counter| now < counter.expires);
        shard.remains.retain(|_, remains| now < remains.expires);
        shard.claims.retain(|_, claim| now < claim.expires);
        shard.bindings.retain(|_, bound| {
            bound.retain(|(expires, _)| now < *expires);
            !bound.is_empty()
        });
    }

    fn sweep_all(&self, now: u64) {
        self.shards.iter().for_each(|shard| self.prune(shard, now));
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
            self.prune(&self.shards[next % SHARDS], now);
        }
    }
}

impl Shard {
    fn live(&self, key: &SessionKey, now: u64) -> Option<Stored> {
        self.sessions.get(key)?.stored(now)
    }

    fn insert(&mut self, key: SessionKey, record: Arc<Record>, expires: u64) {
        let number = self.session_next;
        self.session_next += 1;
        self.users.insert((UserKey::of(&record.identity.user), number), key.clone());
        self.sessions.insert(key, Entry { record, expires, number, trail: Vec::new() });
    }

    /// A user's sessions, the oldest first: those that live, and those that have expired.
    fn members(&self, user: &UserKey, now: u64) -> (Vec<SessionKey>, Vec<SessionKey>) {
        let keys = self.users.range(all_of(user)).map(|(_, key)| key.clone());
        keys.partition(|key| self.sessions.get(key).is_some_and(|entry| now < entry.expires))
    }

    fn leave(&mut self, key: SessionKey, what: What, expires: u64, now: u64) {
        if REMAINS_PER_SHARD_MAX <= self.remains.len() {
            self.remains.retain(|_, remains| now < remains.expires);
        }
        if self.remains.len() < REMAINS_PER_SHARD_MAX {
            self.remains.insert(key, Remains { what, expires });
        }
    }

    fn unreadable(&self) -> impl Iterator<Item = &SessionKey> {
        let unreadable = |(key, remains)| match remains {
            &Remains { what: What::Unreadable, .. } => Some(key),
            Remains { what: What::Ended(_), .. } => None,
        };
        self.remains.iter().filter_map(unreadable)
    }

    /// Of these, those that live.
    fn list<'a>(&self, keys: impl Iterator<Item = &'a SessionKey>, now: u64) -> Vec<Listed> {
        keys.filter_map(|key| Some(Listed { key: key.clone(), stored: self.live(key, now)? })).collect()
    }
}

impl Entry {
    fn stored(&self, now: u64) -> Option<Stored> {
        let time_to_live = self.expires.checked_sub(now).filter(|left| *left != 0)?;
        Some(Stored { record: Arc::clone(&self.record), time_to_live: Duration::from_millis(time_to_live) })
    }
}

/// The place of a user's sessions in the list of all users.
fn all_of(user: &UserKey) -> RangeInclusive<(UserKey, u64)> {
    (user.clone(), 0)..=(user.clone(), u64::MAX)
}

#[async_trait]
impl SessionStore for MemoryStore {
    fn kept(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    fn recall(&self, key: &SessionKey) -> Option<Stored> {
        let now = (self.clock)();
        self.shard(key).lock().live(key, now)
    }

    async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
        let now = (self.clock)();
        let shard = self.shard(key).lock();
        if let Some(stored) = shard.live(key, now) {
            return Ok(Found::Live(stored));
        }
        match shard.remains.get(key).filter(|remains| now < remains.expires).map(|remains| remains.what) {
            Some(What::Ended(ending)) => Ok(Found::Ended(ending)),
            Some(What::Unreadable) => Err(StoreError::Unreadable),
            None => Ok(Found::Nothing),
        }
    }

    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        let creation = self.begin(key, session, terms)?;
        let has_ended_others = terms.replaces.is_some() || matches!(creation, Creation::Begun { displaced: 1.. });
        // A disk that fails is in the log, and no reason to refuse a login.
        if has_ended_others {
            let _ = self.settle().await;
        }
        Ok(creation)
    }

    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
        let now = (self.clock)();
        let mut shard = self.shard(key).lock();
        let Some(entry) = shard.sessions.get_mut(key).filter(|entry| now < entry.expires) else { return Ok(false) };
        if ends <= now {
            self.end(&mut shard, &mut self.notes(), key, Ending::Expired, now);
            self.release(1);
            return Ok(false);
        }
        entry.expires = now.saturating_add(millis(idle)).min(ends).max(entry.expires);
        let expires = entry.expires;
        self.notes().touched(key, expires);
        Ok(true)
    }

    async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
        let now = (self.clock)();
        let mut shard = self.shard(key).lock();
        let Some(entry) = shard.sessions.get_mut(key).filter(|entry| now < entry.expires) else { return Ok(None) };
        if let Some(record) = changed(&entry.record, change)? {
            let row = self.options.codec.encode(&record, key)?;
            entry.record = Arc::new(record);
            let expires = entry.expires;
            self.notes().begun(key, expires, row);
        }
        Ok(Some(Arc::clone(&entry.record)))
    }

    async fn destroy(&self, key: &SessionKey, _user: Option<&str>, ending: Ending) -> Result<bool, StoreError> {
        let lived = self.end_all(Self::part(key), |_| vec![key.clone()], ending) != 0;
        self.settle().await?;
        Ok(lived)
    }

    async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError> {
        let now = (self.clock)();
        let user = UserKey::of(user);
        let shard = self.user_shard(&user).lock();
        Ok(shard.list(shard.users.range(all_of(&user)).map(|(_, key)| key), now))
    }

    async fn destroy_all(&self, user: &str, except: Option<&SessionKey>, ending: Ending) -> Result<u64, StoreError> {
        let user = UserKey::of(user);
        let part = usize::from(user.bucket()) % SHARDS;
        let others = |shard: &Shard| {
            let keys = shard.users.range(all_of(&user)).map(|(_, key)| key);
            keys.filter(|key| Some(*key) != except).cloned().collect()
        };
        let ended = self.end_all(part, others, ending);
        self.settle().await?;
        Ok(ended)
    }

    fn parts(&self) -> u16 {
        SHARDS as u16
    }

    async fn list_part(&self, part: u16) -> Result<Vec<Listed>, StoreError> {
        let now = (self.clock)();
        let Some(shard) = self.shards.get(usize::from(part)) else { return Ok(Vec::new()) };
        let shard = shard.lock();
        Ok(shard.list(shard.users.values(), now))
    }

    async fn destroy_part(&self, part: u16, ending: Ending) -> Result<u64, StoreError> {
        if SHARDS <= usize::from(part) {
            return Ok(0);
        }
        // Those that cannot be read as well, lest they come back with the key that opens them.
        let all = |shard: &Shard| shard.sessions.keys().chain(shard.unreadable()).cloned().collect();
        let ended = self.end_all(usize::from(part), all, ending);
        self.settle().await?;
        Ok(ended)
    }

    async fn total(&self) -> Result<u64, StoreError> {
        Ok(self.sessions.load(Ordering::Relaxed) as u64)
    }

    async fn sweep(&self, part: u16) -> Result<Vec<EndEvent>, StoreError> {
        let Some(shard) = self.shards.get(usize::from(part)) else { return Ok(Vec::new()) };
        self.prune(shard, (self.clock)());
        Ok(shard.lock().ends.iter().map(|(_, event)| event.clone()).collect())
    }

    async fn forget_events(&self, part: u16, events: &[EndEvent]) -> Result<(), StoreError> {
        let Some(shard) = self.shards.get(usize::from(part)) else { return Ok(()) };
        let told: HashSet<_> = events.iter().map(|event| event.token.as_slice()).collect();
        let mut shard = shard.lock();
        let mut notes = self.notes();
        shard.ends.retain(|(number, event)| {
            let is_told = told.contains(event.token.as_slice());
            if is_told {
                notes.told(*number);
            }
            !is_told
        });
        Ok(())
    }

    /// One process: always.
    async fn lead(&self, _instance: &str, _time: Duration) -> Result<bool, StoreError> {
        Ok(true)
    }

    async fn add_activity(&self, key: &SessionKey, seen: &[Activity], keep: u16) -> Result<(), StoreError> {
        let now = (self.clock)();
        let mut shard = self.shard(key).lock();
        if let Some(entry) = shard.sessions.get_mut(key).filter(|entry| now < entry.expires) {
            let keep = usize::from(keep);
            entry.trail.extend_from_slice(&seen[seen.len().saturating_sub(keep)..]);
            let surplus = entry.trail.len().saturating_sub(keep);
            entry.trail.drain(..surplus);
        }
        Ok(())
    }

    async fn activity(&self, key: &SessionKey) -> Result<Vec<Activity>, StoreError> {
        let now = (self.clock)();
        let shard = self.shard(key).lock();
        let live = shard.sessions.get(key).filter(|entry| now < entry.expires);
        Ok(live.map(|entry| entry.trail.iter().rev().cloned().collect()).unwrap_or_default())
    }

    async fn claim(&self, name: &str, holder: &str, time: Duration) -> Result<bool, StoreError> {
        let now = (self.clock)();
        self.sweep_some(now);
        let hash = name_hash(Named::Claim, name);
        let mut shard = self.named_shard(&hash).lock();
        if shard.claims.get(&hash).is_some_and(|claim| now < claim.expires) {
            return Ok(false);
        }
        if CLAIMS_PER_SHARD_MAX <= shard.claims.len() {
            shard.claims.retain(|_, claim| now < claim.expires);
            if CLAIMS_PER_SHARD_MAX <= shard.claims.len() {
                // To forget a claim instead would let somebody replay what it was made for.
                return Err(StoreError::Refused("too many claims".into()));
            }
        }
        shard.claims.insert(hash, Claim { holder: holder.to_owned(), expires: now.saturating_add(millis(time)) });
        Ok(true)
    }

    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        let hash = name_hash(Named::Claim, name);
        let mut shard = self.named_shard(&hash).lock();
        if shard.claims.get(&hash).is_some_and(|claim| claim.holder == holder) {
            shard.claims.remove(&hash);
        }
        Ok(())
    }

    async fn bind(&self, handle: &str, key: &SessionKey, time: Duration) -> Result<Vec<SessionKey>, StoreError> {
        let now = (self.clock)();
        self.sweep_some(now);
        Ok(self.bind_until(handle, key, now.saturating_add(millis(time)), now))
    }

    async fn bound(&self, handle: &str) -> Result<Vec<SessionKey>, StoreError> {
        let now = (self.clock)();
        let hash = name_hash(Named::Handle, handle);
        let shard = self.named_shard(&hash).lock();
        let bound = shard.bindings.get(&hash).into_iter().flatten();
        Ok(bound.filter(|(expires, _)| now < *expires).map(|(_, key)| key.clone()).collect())
    }

    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        let now = (self.clock)();
        self.sweep_some(now);
        let hash = name_hash(Named::Counter, counter);
        let mut shard = self.named_shard(&hash).lock();
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
        let hash = name_hash(Named::Counter, counter);
        let mut shard = self.named_shard(&hash).lock();
        if let Some(counter) = shard.counters.get_mut(&hash).filter(|counter| now < counter.expires) {
            counter.value = counter.value.saturating_sub(1);
        }
        Ok(())
    }

    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        let now = (self.clock)();
        let hash = name_hash(Named::Counter, counter);
        let shard = self.named_shard(&hash).lock();
        Ok(shard.counters.get(&hash).filter(|counter| now < counter.expires).map_or(0, |counter| counter.value))
    }

    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        let hash = name_hash(Named::Counter, counter);
        self.named_shard(&hash).lock().counters.remove(&hash);
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

/// Unix time that starts with the system's clock and then never jumps: setting the clock ends nobody's session. It goes
/// on while the machine sleeps, where the system can tell.
fn steady_clock() -> Clock {
    let started = uptime();
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Box::new(move || millis(epoch + uptime().saturating_sub(started)))
}

fn uptime() -> Duration {
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    Duration::try_from(rustix::time::clock_gettime(clock)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::identity::Identity;
    use crate::session::Lifetime;
    use crate::session::id::SessionId;
    use crate::session::record::ClientHints;
    use crate::session::store::Limit;

    const LIFETIME: Lifetime = Lifetime { idle: Duration::from_millis(100), absolute: Duration::from_millis(1_000) };

    fn store(sessions_max: usize) -> (MemoryStore, Arc<AtomicU64>) {
        let now = Arc::new(AtomicU64::new(1_000_000));
        let clock = Arc::clone(&now);
        (MemoryStore::with_clock(sessions_max, Box::new(move || clock.load(Ordering::Relaxed))), now)
    }

    /// A store on a file, which tells of ends, at this time.
    fn on_file(path: &Path, now: u64) -> (MemoryStore, Arc<AtomicU64>) {
        let (store, clock) = store(10_000);
        clock.store(now, Ordering::Relaxed);
        let store = store.with_options(StoreOptions { events: true, ..StoreOptions::default() });
        store.open_file(path).unwrap();
        (store, clock)
    }

    fn session() -> NewSession {
        session_of("ann")
    }

    fn session_of(user: &str) -> NewSession {
        NewSession {
            identity: Identity { user: user.into(), ..Identity::default() },
            method: LoginMethod::Password,
            client: ClientHints { address: None, user_agent: String::new() },
            secrets: None,
            attributes: BTreeMap::new(),
            login: None,
        }
    }

    fn terms(replaces: Option<&SessionKey>) -> Terms {
        Terms { lifetime: LIFETIME, limit: None, replaces: replaces.cloned() }
    }

    fn limited(sessions: u32, when_full: WhenFull) -> Terms {
        Terms { limit: Some(Limit { sessions, when_full }), ..terms(None) }
    }

    fn key() -> SessionKey {
        key_of("ann")
    }

    fn key_of(user: &str) -> SessionKey {
        SessionId::generate(user).unwrap().key()
    }

    async fn begin(store: &MemoryStore, user: &str) -> SessionKey {
        let key = key_of(user);
        store.create(&key, session_of(user), &terms(None)).await.unwrap();
        key
    }

    async fn keys_of(store: &MemoryStore, user: &str) -> Vec<SessionKey> {
        store.list(user).await.unwrap().into_iter().map(|listed| listed.key).collect()
    }

    async fn lives(store: &MemoryStore, key: &SessionKey) -> bool {
        store.load(key).await.unwrap().live().is_some()
    }

    /// All ends that wait, from all parts.
    async fn ends(store: &MemoryStore) -> Vec<(u16, EndEvent)> {
        let mut all = Vec::new();
        for part in 0..store.parts() {
            all.extend(store.sweep(part).await.unwrap().into_iter().map(|event| (part, event)));
        }
        all
    }

    /// That every list of users names what is there, and every count is right.
    fn assert_consistent(store: &MemoryStore) {
        let mut held = 0;
        for shard in &store.shards {
            let shard = shard.lock();
            held += shard.sessions.len();
            assert_eq!(shard.users.len(), shard.sessions.len(), "each session is in one list");
            for ((user, number), key) in &shard.users {
                let entry = shard.sessions.get(key).expect("a list names what is there");
                assert!(entry.number == *number && UserKey::of(&entry.record.identity.user) == *user);
            }
        }
        assert_eq!(store.sessions.load(Ordering::Relaxed), held, "no place is lost or taken twice");
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
        assert_consistent(&store);
    }

    #[tokio::test]
    async fn the_oldest_sessions_make_room_and_their_users_learn_why() {
        let (store, now) = store(100);
        let mut keys = Vec::new();
        for expected in [0, 0, 1, 1] {
            now.fetch_add(1, Ordering::Relaxed);
            let key = key();
            let creation = store.create(&key, session(), &limited(2, WhenFull::EvictOldest)).await.unwrap();
            assert_eq!(creation, Creation::Begun { displaced: expected });
            keys.push(key);
        }
        assert!(keys_of(&store, "ann").await == keys[2..], "the newest stay");
        for key in &keys[..2] {
            assert!(matches!(store.load(key).await.unwrap(), Found::Ended(Ending::Displaced)));
        }
        let lowered = store.create(&key(), session(), &limited(1, WhenFull::EvictOldest)).await.unwrap();
        assert_eq!(lowered, Creation::Begun { displaced: 2 }, "a limit that was lowered counts from the next login");
        assert_consistent(&store);
    }

    #[tokio::test]
    async fn a_user_who_has_enough_is_refused_until_one_ends() {
        let (store, now) = store(100);
        let refuse = limited(2, WhenFull::Refuse);
        let (first, second) = (key(), key());
        for key in [&first, &second] {
            store.create(key, session(), &refuse).await.unwrap();
        }
        let bob = begin(&store, "bob").await;
        let replacing_bob = Terms { replaces: Some(bob.clone()), ..refuse.clone() };
        for terms in [&refuse, &replacing_bob] {
            assert_eq!(store.create(&key(), session(), terms).await.unwrap(), Creation::Full);
        }
        assert!(lives(&store, &bob).await && lives(&store, &first).await, "a refused login ends nothing");

        let same_browser = Terms { replaces: Some(first.clone()), ..refuse.clone() };
        let third = key();
        assert_eq!(store.create(&third, session(), &same_browser).await.unwrap(), Creation::Begun { displaced: 0 });
        assert!(keys_of(&store, "ann").await == [second, third], "one for one");

        now.fetch_add(100, Ordering::Relaxed);
        assert_eq!(store.create(&key(), session(), &refuse).await.unwrap(), Creation::Begun { displaced: 0 });
        assert_consistent(&store);
    }

    #[test]
    fn of_fifty_logins_at_once_exactly_as_many_live_as_may() {
        for when_full in [WhenFull::EvictOldest, WhenFull::Refuse] {
            let store = MemoryStore::new(1_000);
            let lifetime = Lifetime { idle: Duration::from_secs(600), absolute: Duration::from_secs(600) };
            let terms = Terms { lifetime, ..limited(3, when_full) };
            std::thread::scope(|scope| {
                for _ in 0..50 {
                    scope.spawn(|| {
                        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                        runtime.block_on(store.create(&key(), session(), &terms)).unwrap();
                    });
                }
            });
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            assert_eq!(runtime.block_on(store.list("ann")).unwrap().len(), 3, "{when_full:?}");
            assert_consistent(&store);
        }
    }

    #[tokio::test]
    async fn a_user_ends_all_sessions_but_this_one() {
        let (store, _) = store(100);
        let mut keys = Vec::new();
        for _ in 0..4 {
            keys.push(begin(&store, "ann").await);
        }
        let bob = begin(&store, "bob").await;
        assert!(keys_of(&store, "ann").await == keys, "the oldest first");
        assert!(keys_of(&store, "nobody").await.is_empty());

        assert_eq!(store.destroy_all("ann", Some(&keys[1]), Ending::Revoked).await.unwrap(), 3);
        assert!(keys_of(&store, "ann").await == keys[1..2]);
        assert!(matches!(store.load(&keys[0]).await.unwrap(), Found::Ended(Ending::Revoked)), "and they learn why");
        assert_eq!(store.destroy_all("ann", None, Ending::Revoked).await.unwrap(), 1);
        assert_eq!(store.destroy_all("ann", None, Ending::Revoked).await.unwrap(), 0);
        assert!(lives(&store, &bob).await, "nobody else is logged out");
        assert_consistent(&store);
    }

    #[tokio::test]
    async fn why_a_session_ended_is_told_for_the_rest_of_its_life_at_most() {
        let (store, now) = store(usize::MAX);
        for (ending, is_told) in [
            (Ending::LoggedOut, false),
            (Ending::Replaced, true),
            (Ending::Displaced, true),
            (Ending::Revoked, true),
            (Ending::Expired, false),
        ] {
            let key = begin(&store, "ann").await;
            assert!(store.destroy(&key, None, ending).await.unwrap());
            let found = store.load(&key).await.unwrap();
            assert_eq!(matches!(found, Found::Ended(told) if told == ending), is_told, "{ending:?}");
            assert!(store.recall(&key).is_none(), "what has ended is nobody's");
            now.fetch_add(100, Ordering::Relaxed);
            assert!(matches!(store.load(&key).await.unwrap(), Found::Nothing), "{ending:?}");
        }
        for _ in 0..2 * REMAINS_PER_SHARD_MAX {
            let key = begin(&store, "ann").await;
            store.destroy(&key, None, Ending::Revoked).await.unwrap();
        }
        let kept: usize = store.shards.iter().map(|shard| shard.lock().remains.len()).sum();
        assert_eq!(kept, REMAINS_PER_SHARD_MAX, "memory of what is gone has a bound");
    }

    #[tokio::test]
    async fn the_parts_together_are_all_sessions() {
        let (store, _) = store(10_000);
        let mut keys = HashSet::new();
        for n in 0..500 {
            keys.insert(begin(&store, &format!("user{n}")).await);
        }
        assert_eq!(store.total().await.unwrap(), 500);
        let mut listed = HashSet::new();
        for part in 0..store.parts() {
            listed.extend(store.list_part(part).await.unwrap().into_iter().map(|listed| listed.key));
        }
        assert!(listed == keys);
        assert!(store.list_part(store.parts()).await.unwrap().is_empty(), "there is no such part");
        assert_eq!(store.destroy_part(store.parts(), Ending::Revoked).await.unwrap(), 0);
        let mut ended = 0;
        for part in 0..store.parts() {
            ended += store.destroy_part(part, Ending::Revoked).await.unwrap();
        }
        assert_eq!((ended, store.total().await.unwrap()), (500, 0));
        assert_consistent(&store);
        assert!(store.lead("any", Duration::from_secs(1)).await.unwrap(), "one process leads itself");
    }

    #[tokio::test]
    async fn every_end_is_told_until_somebody_has_heard_it() {
        let (store, now) = store(100);
        let store = store.with_options(StoreOptions { events: true, ..StoreOptions::default() });
        let limit = limited(1, WhenFull::EvictOldest);
        let displaced = begin(&store, "ann").await;
        let replaced = key();
        store.create(&replaced, session(), &limit).await.unwrap();
        let logged_out = key();
        store.create(&logged_out, session(), &terms(Some(&replaced))).await.unwrap();
        store.destroy(&logged_out, None, Ending::LoggedOut).await.unwrap();
        let revoked = begin(&store, "ann").await;
        store.destroy_all("ann", None, Ending::Revoked).await.unwrap();
        let expired = begin(&store, "ann").await;
        now.fetch_add(100, Ordering::Relaxed);
        assert!(!store.destroy(&expired, None, Ending::LoggedOut).await.unwrap(), "it had ended before");
        let swept = begin(&store, "ann").await;
        now.fetch_add(100, Ordering::Relaxed);

        let expected = [
            (&displaced, Ending::Displaced),
            (&replaced, Ending::Replaced),
            (&logged_out, Ending::LoggedOut),
            (&revoked, Ending::Revoked),
            (&expired, Ending::Expired),
            (&swept, Ending::Expired),
        ];
        for _ in 0..2 {
            let told: Vec<_> =
                ends(&store).await.into_iter().map(|(_, end)| (end.session, end.user, end.ending)).collect();
            let expected: Vec<_> =
                expected.iter().map(|(key, ending)| (key.log_hash(), "ann".to_owned(), *ending)).collect();
            assert_eq!(told, expected, "each once, the oldest first, and again while nobody has heard");
        }
        let (part, first) = ends(&store).await.swap_remove(0);
        store.forget_events(part, &[first]).await.unwrap();
        assert_eq!(ends(&store).await.len(), expected.len() - 1);
        assert_consistent(&store);
    }

    #[tokio::test]
    async fn ends_that_nobody_wants_are_not_collected_and_those_that_nobody_takes_are_bounded() {
        let (quiet, _) = store(100);
        let key = begin(&quiet, "ann").await;
        quiet.destroy(&key, None, Ending::LoggedOut).await.unwrap();
        assert!(ends(&quiet).await.is_empty());

        let store = quiet.with_options(StoreOptions { events: true, ..StoreOptions::default() });
        for _ in 0..ENDS_PER_SHARD_MAX + 5 {
            let key = begin(&store, "ann").await;
            store.destroy(&key, None, Ending::LoggedOut).await.unwrap();
        }
        assert_eq!(ends(&store).await.len(), ENDS_PER_SHARD_MAX);
        assert_eq!(store.ends_lost.load(Ordering::Relaxed), 5, "a loss is counted");
    }

    #[tokio::test]
    async fn a_trail_keeps_the_last_and_ends_with_its_session() {
        let (store, now) = store(100);
        let seen = |at| Activity { at, address: [192, 0, 2, 7].into(), route: "/".to_owned() };
        let key = begin(&store, "ann").await;
        store.add_activity(&key, &[seen(1), seen(2)], 3).await.unwrap();
        store.add_activity(&key, &[seen(3), seen(4)], 3).await.unwrap();
        assert_eq!(store.activity(&key).await.unwrap(), [seen(4), seen(3), seen(2)], "the latest first");
        store.add_activity(&key, &[seen(5), seen(6), seen(7), seen(8)], 2).await.unwrap();
        assert_eq!(store.activity(&key).await.unwrap(), [seen(8), seen(7)]);
        now.fetch_add(100, Ordering::Relaxed);
        assert!(store.activity(&key).await.unwrap().is_empty());
        store.add_activity(&key, &[seen(9)], 3).await.expect("it may have ended meanwhile");
        assert!(store.activity(&self::key()).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_lives_survives_a_restart_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (store, now) = on_file(&path, 1_000_000);
        let mut keys = Vec::new();
        for _ in 0..5 {
            now.fetch_add(1, Ordering::Relaxed);
            keys.push(begin(&store, "ann").await);
        }
        let (record, ends_at) = {
            let record = store.recall(&keys[3]).unwrap().record;
            (Arc::clone(&record), record.ends)
        };
        now.fetch_add(50, Ordering::Relaxed);
        store.touch(&keys[3], LIFETIME.idle, ends_at).await.unwrap();
        store.destroy(&keys[4], None, Ending::LoggedOut).await.unwrap();
        drop(store);

        let (store, _) = on_file(&path, 1_000_102);
        assert!(keys_of(&store, "ann").await == keys[2..4], "who has expired or logged out is out: {}", keys.len());
        let stored = store.recall(&keys[3]).unwrap();
        assert_eq!((&stored.record, stored.time_to_live), (&record, Duration::from_millis(53)));
        assert_eq!(store.total().await.unwrap(), 2);
        assert_consistent(&store);
        let told: Vec<_> = ends(&store).await.into_iter().map(|(_, end)| end.ending).collect();
        assert_eq!(told, [Ending::LoggedOut, Ending::Expired, Ending::Expired], "no end is forgotten by a restart");

        let (part, first) = ends(&store).await.swap_remove(0);
        store.forget_events(part, &[first]).await.unwrap();
        drop(store);
        let (store, _) = on_file(&path, 1_000_102);
        assert_eq!(ends(&store).await.len(), 2, "what was told is not told again");
        store.destroy(&keys[3], None, Ending::LoggedOut).await.unwrap();
        let numbers: HashSet<_> = ends(&store).await.into_iter().map(|(_, end)| end.token).collect();
        assert_eq!(numbers.len(), 3, "no number is given twice");
    }

    /// What a crash leaves is what is in the file at that moment.
    #[tokio::test]
    async fn no_end_that_was_answered_is_undone_by_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (store, _) = on_file(&path, 1_000_000);
        // Each with an image of its own: the next answer would bring what this one left out.
        for (round, ending) in
            ["logged out", "revoked", "displaced", "replaced"].into_iter().cycle().take(20).enumerate()
        {
            let old = begin(&store, "ann").await;
            store.settle().await.unwrap();
            match ending {
                "logged out" => drop(store.destroy(&old, None, Ending::LoggedOut).await.unwrap()),
                "revoked" => drop(store.destroy_all("ann", None, Ending::Revoked).await.unwrap()),
                "displaced" => {
                    store.create(&key(), session(), &limited(1, WhenFull::EvictOldest)).await.unwrap();
                }
                _ => {
                    store.create(&key_of("bob"), session_of("bob"), &terms(Some(&old))).await.unwrap();
                }
            }
            let image = folder.path().join(format!("crash{round}.redb"));
            std::fs::copy(&path, &image).unwrap();
            let (after, _) = on_file(&image, 1_000_000);
            assert!(!lives(&after, &old).await, "{ending}, answered, and back after a crash");
            assert_eq!(keys_of(&after, "ann").await.len(), keys_of(&store, "ann").await.len(), "{ending}: in one step");
        }
    }

    #[tokio::test]
    async fn what_is_created_and_touched_is_soon_in_the_file_without_being_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (store, now) = on_file(&path, 1_000_000);
        let key = begin(&store, "ann").await;
        now.fetch_add(60, Ordering::Relaxed);
        store.touch(&key, LIFETIME.idle, 2_000_000).await.unwrap();
        let image = folder.path().join("crash.redb");
        let started = std::time::Instant::now();
        loop {
            std::fs::copy(&path, &image).unwrap();
            let (after, _) = on_file(&image, 1_000_150);
            if lives(&after, &key).await {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "nobody wrote it");
            drop(after);
            std::fs::remove_file(&image).unwrap();
        }
    }

    #[tokio::test]
    async fn a_clock_that_was_set_back_prolongs_no_life_by_more_than_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (store, _) = on_file(&path, 1_000_000);
        let key = begin(&store, "ann").await;
        drop(store);

        for (now, idle, absolute) in [(999_970, 100, 1_000), (10_000, 100, 1_000)] {
            let (store, clock) = on_file(&path, now);
            let stored = store.recall(&key).expect("it lives");
            assert_eq!(stored.time_to_live, Duration::from_millis(idle));
            assert_eq!(stored.record.ends - now, absolute, "never longer than from now on");
            clock.fetch_add(2_000, Ordering::Relaxed);
            store.touch(&key, Duration::from_secs(60), stored.record.ends).await.unwrap();
            assert!(store.recall(&key).is_none());
            drop(store);
            std::fs::remove_file(&path).unwrap();
            let (store, _) = on_file(&path, 1_000_000);
            store.create(&key, session(), &terms(None)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_is_for_one_process_and_for_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (first, _) = on_file(&path, 1_000_000);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = MemoryStore::new(1).open_file(&path).unwrap_err();
        assert!(matches!(error, FileError::Taken(_)), "{error}");
        for part in ["sessions.redb", "another process", "[store.redis]"] {
            assert!(error.to_string().contains(part), "{part} in: {error}");
        }
        first.close();
        MemoryStore::new(1).open_file(&path).expect("who closes it lets others have it");
        let error = first.destroy(&key(), None, Ending::LoggedOut).await;
        assert!(error.is_ok(), "nothing had to be written");
        let key = begin(&first, "ann").await;
        assert!(matches!(first.destroy(&key, None, Ending::LoggedOut).await, Err(StoreError::Unavailable(_))));

        let error = MemoryStore::new(1).open_file(&folder.path().join("none/sessions.redb")).unwrap_err();
        assert!(matches!(error, FileError::Unreachable(..)), "{error}");
    }

    #[tokio::test]
    async fn whose_record_cannot_be_read_is_nobody_and_keeps_the_cookie() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let (good, bad, long_gone) = (key(), key(), key());
        {
            let file = SessionFile::open(&path, |_| {}).unwrap();
            let record = session().into_record(1_000_000, LIFETIME);
            let mut notes = file.notes();
            notes.begun(&good, 1_000_100, record.encode().unwrap());
            notes.begun(&bad, 1_000_100, vec![255, 1, 2, 3]);
            notes.begun(&long_gone, 1_000, Vec::new());
        }
        let (store, _) = store(100);
        let loaded = store.open_file(&path);
        assert!(loaded.is_ok(), "{loaded:?}");
        drop(store);

        let (store, clock) = self::store(100);
        clock.store(1_000_000, Ordering::Relaxed);
        assert_eq!(store.open_file(&path).unwrap(), Loaded { sessions: 1, expired: 0, unreadable: 1 });
        assert!(lives(&store, &good).await);
        assert!(matches!(store.load(&bad).await, Err(StoreError::Unreadable)));
        assert!(!store.destroy(&bad, None, Ending::LoggedOut).await.unwrap());
        assert!(matches!(store.load(&bad).await, Ok(Found::Nothing)), "but it can be ended");
        drop(store);
        let (store, _) = self::store(100);
        assert_eq!(store.open_file(&path).unwrap(), Loaded { sessions: 1, expired: 0, unreadable: 0 });
    }

    #[tokio::test]
    async fn who_ends_everybodys_sessions_ends_those_that_cannot_be_read_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let bad = key();
        {
            let file = SessionFile::open(&path, |_| {}).unwrap();
            file.notes().begun(&bad, 1_000_100, vec![255, 1, 2, 3]);
        }
        let (store, _) = on_file(&path, 1_000_000);
        assert!(matches!(store.load(&bad).await, Err(StoreError::Unreadable)));
        for part in 0..store.parts() {
            store.destroy_part(part, Ending::Revoked).await.unwrap();
        }
        drop(store);
        let (store, clock) = self::store(100);
        clock.store(1_000_000, Ordering::Relaxed);
        assert_eq!(store.open_file(&path).unwrap(), Loaded::default(), "nothing is there for whoever could read it");
    }

    #[tokio::test]
    async fn after_any_day_the_file_says_what_the_map_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sessions.redb");
        let mut rng = StdRng::seed_from_u64(3);
        let mut time = 1_000_000;
        for _ in 0..8 {
            let (store, now) = on_file(&path, time);
            assert_consistent(&store);
            let users = ["ann", "bob", "eve"];
            for _ in 0..200 {
                now.fetch_add(rng.random_range(0..5), Ordering::Relaxed);
                let user = users[rng.random_range(0..users.len())];
                let keys = keys_of(&store, user).await;
                let some = (!keys.is_empty()).then(|| keys[rng.random_range(0..keys.len())].clone());
                match (rng.random_range(0..10), some) {
                    (0..4, some) => {
                        let limit = Limit { sessions: 6, when_full: WhenFull::EvictOldest };
                        let replaces = some.filter(|_| rng.random());
                        let terms = Terms { lifetime: LIFETIME, limit: Some(limit), replaces };
                        store.create(&key_of(user), session_of(user), &terms).await.unwrap();
                    }
                    (4..8, Some(key)) => {
                        let ends = store.recall(&key).unwrap().record.ends;
                        store.touch(&key, LIFETIME.idle, ends).await.unwrap();
                    }
                    (8, Some(key)) => {
                        store.destroy(&key, Some(user), Ending::LoggedOut).await.unwrap();
                    }
                    (9, some) if rng.random_range(0..10) == 0 => {
                        store.destroy_all(user, some.as_ref(), Ending::Revoked).await.unwrap();
                    }
                    _ => {}
                }
            }
            let mut before = Vec::new();
            for user in users {
                before.extend(store.list(user).await.unwrap());
            }
            time = now.load(Ordering::Relaxed);
            drop(store);
            let (store, _) = on_file(&path, time);
            let mut after = Vec::new();
            for user in users {
                after.extend(store.list(user).await.unwrap());
            }
            assert_eq!(after.len(), before.len());
            for listed in before {
                let kept = after.iter().find(|kept| kept.key == listed.key).expect("it was there");
                assert_eq!(kept.stored.record, listed.stored.record);
                assert_eq!(kept.stored.time_to_live, listed.stored.time_to_live);
            }
        }
    }
}
