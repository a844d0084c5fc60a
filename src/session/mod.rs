//! Who is this? A session cookie becomes a [`Session`], or nothing.
//!
//! The rules of life (idle, absolute) are here, and what holds while the store is down; where sessions are kept is behind
//! [`store::SessionStore`].

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use rand::TryRng;
use rand::rngs::SysRng;
use tokio::task::JoinSet;

use crate::config::model;
use crate::identity::Identity;

pub mod id;
pub mod record;
pub mod attributes;
pub mod seal;
pub mod cookie;
pub mod network;
mod guesses;
mod touch;
mod trail;
mod fallback;
mod ended;
pub mod cache;
pub mod store;
pub mod control;

use attributes::{Changes, Excess};
use ended::Ended;
use fallback::Fallback;
pub use fallback::unix_now;
use guesses::{Answer, Guesses};
use id::{SessionId, SessionKey};
use network::Network;
use record::{Attribute, ClientHints, ExternalLogin, LoginMethod, Record, Sealed};
use seal::{KeyRing, SealError};
use store::{
    Activity, Change, Creation, Ending, Found, Limit, Listed, NewSession, SessionStore, StoreError, Stored, Terms,
};
use touch::Touches;
use trail::Trail;

/// How long a session lives.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// Unused for this long, it ends.
    pub idle: Duration,
    /// However much it is used, it ends after this long.
    pub absolute: Duration,
}

/// What the operator may ask for beyond a lifetime; by default nothing.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Sessions of one user.
    pub limit: Option<Limit>,
    /// While the store is down, copies are good for so much longer.
    pub grace: Option<Duration>,
    /// Life of the fallback cookie. Needs `ring`.
    pub fallback: Option<Duration>,
    /// Entries of the activity trail; 0 = there is none.
    pub activity: u16,
    pub ring: Option<Arc<KeyRing>>,
}

/// A live session, as one request sees it.
#[derive(Clone, Debug)]
pub struct Session {
    /// What it is stored under; the id itself goes no further than the cookie.
    pub key: SessionKey,
    pub record: Arc<Record>,
    /// If nobody uses it; as it was before this use, which is written later.
    pub time_to_live: Duration,
}

/// How a request uses the session that it comes with.
#[derive(Clone, Copy, Debug)]
pub struct Use<'r> {
    pub client: IpAddr,
    /// It counts as use, for the idle clock and for the trail.
    pub touch: bool,
    /// Where, for the trail; none = nowhere that is written down.
    pub route: Option<&'r str>,
    /// The value of the fallback cookie, where it counts.
    pub fallback: Option<&'r [u8]>,
    /// It must see what was written a moment ago on another instance: the store is asked, whatever is known here.
    pub is_fresh: bool,
}

/// What became of an id.
#[derive(Clone, Debug)]
pub enum Resumed {
    Live(Session, Source),
    /// The store says that there is no such session (any more), and perhaps why.
    Gone(Option<Ending>),
    /// Not asked for: this network has brought too many unknown ids. Worth another try after this long.
    TooManyGuesses(Duration),
}

/// How a live session was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A local copy, known to be true now.
    Copy,
    Store,
    /// The store is down: a local copy that was true when it was last heard of.
    Grace,
    /// The store is down: the sealed cookie.
    Fallback,
}

/// Who logs in.
#[derive(Clone, Debug)]
pub struct Newcomer {
    pub identity: Identity,
    pub method: LoginMethod,
    pub client: ClientHints,
    /// What only the holder of the new id will be able to read.
    pub secrets: BTreeMap<String, String>,
    pub attributes: BTreeMap<String, Attribute>,
    /// Where somebody else said who this is: they can end the session, see [`Sessions::revoke_bound`].
    pub login: Option<ExternalLogin>,
}

/// What became of a change of attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    Done,
    /// The session has ended meanwhile.
    Gone,
    /// Nothing was changed.
    TooMuch(Excess),
}

/// What became of a login.
#[derive(Clone, Debug)]
pub enum Started {
    Begun {
        id: SessionId,
        /// So many older sessions of the user made room.
        displaced: u32,
    },
    /// The user has so many sessions already, and may not have more.
    Full(u32),
}

/// What became of a session of nobody.
#[derive(Clone, Debug)]
pub enum Anonymous {
    Begun(SessionId),
    /// This network has begun so many lately.
    TooMany,
}

/// Starts, resumes, touches and ends sessions.
#[derive(Clone)]
pub struct Sessions {
    store: Arc<dyn SessionStore>,
    lifetime: Lifetime,
    limit: Option<Limit>,
    grace: Option<Duration>,
    ring: Option<Arc<KeyRing>>,
    fallback: Option<Fallback>,
    trail: Option<Trail>,
    touches: Arc<Touches>,
    guesses: Arc<Guesses>,
    ended: Arc<Ended>,
}

/// However long the idle time, its clock is never further behind than this.
const TOUCH_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Sessions of nobody that one network may begin in [`ANONYMOUS_WINDOW`]: a crawler without cookies begins one with each
/// request.
const ANONYMOUS_MAX: u64 = 300;
const ANONYMOUS_WINDOW: Duration = Duration::from_secs(60);

impl Sessions {
    pub fn new(store: Arc<dyn SessionStore>, lifetime: Lifetime) -> Self {
        Self {
            store,
            lifetime,
            limit: None,
            grace: None,
            ring: None,
            fallback: None,
            trail: None,
            touches: Arc::default(),
            guesses: Arc::default(),
            ended: Arc::new(Ended::new(Duration::ZERO)),
        }
    }

    pub fn with(self, options: Options) -> Self {
        let bridged = options.bridged();
        let Options { limit, grace, fallback, activity, ring } = options;
        let fallback = ring.clone().zip(fallback).map(|(ring, lifetime)| Fallback::new(ring, lifetime));
        let trail = (0 < activity).then(|| Trail::new(activity, self.touch_interval()));
        Self { limit, grace, ring, fallback, trail, ended: Arc::new(Ended::new(bridged)), ..self }
    }

    /// What became of the session of this id; if it lives, it counts as used now (written once per tenth of the idle
    /// time or per 60 s, whichever is shorter, in the background).
    ///
    /// # Errors
    /// When the store does not say, or what it holds cannot be read ([`StoreError::Unreadable`]): then nobody knows
    /// that the session is gone.
    pub async fn resume(&self, id: &SessionId, usage: &Use<'_>) -> Result<Resumed, StoreError> {
        let key = id.key();
        match self.store.recall(&key).filter(|_| !usage.is_fresh) {
            Some(stored) => Ok(Resumed::Live(self.used(key, stored, usage), Source::Copy)),
            None => self.look_up(key, usage).await,
        }
    }

    /// A new session under a new id; `replaces` (the id that the browser came with) is ended in the same step. What was
    /// noted in the session that is replaced goes along, when nobody had logged in to it or the same user had; on top
    /// of it come `changes`.
    pub async fn start(
        &self,
        newcomer: Newcomer,
        replaces: Option<&SessionId>,
        changes: &Changes,
    ) -> Result<Started, StoreError> {
        let Newcomer { identity, method, client, secrets, attributes, login } = newcomer;
        let left = match replaces {
            Some(old) => self.left_behind(&old.key(), &identity.user).await?,
            None => BTreeMap::new(),
        };
        let all = left.into_iter().chain(attributes.clone()).collect();
        let attributes = changes.apply(&all, unix_now()).or_else(|excess| {
            tracing::warn!(%excess, "what was noted before a login did not fit beside what was noted with it");
            changes.apply(&attributes, unix_now())
        });
        let attributes = attributes.map_err(|excess| StoreError::Refused(excess.to_string().into()))?;
        let id = SessionId::generate(&identity.user).map_err(|error| StoreError::Unavailable(error.into()))?;
        let sealed = (!secrets.is_empty()).then(|| self.seal(&id, &secrets));
        let secrets = sealed.transpose().map_err(|error| StoreError::Unavailable(error.into()))?;
        // Before the session begins, lest there be one that its provider cannot end.
        let mut unbound = Vec::new();
        for handle in login.as_ref().map(ExternalLogin::handles).unwrap_or_default() {
            unbound.extend(self.store.bind(&handle, &id.key(), self.lifetime.absolute).await?);
        }
        let user = identity.user.clone();
        let session = NewSession { identity, method, client, secrets, attributes, login };
        let replaces = replaces.map(SessionId::key);
        let terms = Terms { lifetime: self.lifetime, limit: self.limit, replaces: replaces.clone() };
        match self.store.create(&id.key(), session, &terms).await? {
            Creation::Begun { displaced } => {
                let now = Instant::now();
                self.guesses.note_life(&id.key());
                replaces.inspect(|old| self.ended.note(old, now));
                if displaced != 0 {
                    // The store does not say which: to be on the safe side, any but this one.
                    self.ended.note_all_of(&user, Some(&id.key()), now);
                }
                // Nobody could end them by that name any more.
                let unbound = self.destroy_each(unbound, Ending::Displaced).await?;
                let displaced = displaced.saturating_add(u32::try_from(unbound).unwrap_or(u32::MAX));
                Ok(Started::Begun { id, displaced })
            }
            Creation::Full => Ok(Started::Full(self.limit.map_or(0, |limit| limit.sessions))),
        }
    }

    /// A session of nobody, for what is noted before a login.
    pub async fn start_anonymous(&self, client: ClientHints, changes: &Changes) -> Result<Anonymous, StoreError> {
        let network = client.address.map(|address| format!("anonymous {:?}", Network::of(address)));
        if let Some(network) = network
            && ANONYMOUS_MAX < self.store.increment(&network, ANONYMOUS_WINDOW).await?.value
        {
            return Ok(Anonymous::TooMany);
        }
        let mut name = [0; 16];
        SysRng.try_fill_bytes(&mut name).map_err(|error| StoreError::Unavailable(error.into()))?;
        // A user of its own for each, so that they are spread like users, and one is never the other's.
        let user = format!("anonymous {}", URL_SAFE_NO_PAD.encode(name));
        let (secrets, attributes) = (BTreeMap::new(), BTreeMap::new());
        let identity = Identity { user, ..Identity::default() };
        let newcomer = Newcomer { identity, method: LoginMethod::Anonymous, client, secrets, attributes, login: None };
        match self.start(newcomer, None, changes).await? {
            Started::Begun { id, displaced: _ } => Ok(Anonymous::Begun(id)),
            Started::Full(_) => Ok(Anonymous::TooMany),
        }
    }

    async fn left_behind(&self, old: &SessionKey, user: &str) -> Result<BTreeMap<String, Attribute>, StoreError> {
        let record = match self.store.load_now(old).await {
            Ok(Found::Live(stored)) => stored.record,
            Ok(Found::Ended(_) | Found::Nothing) | Err(StoreError::Unreadable) => return Ok(BTreeMap::new()),
            Err(error) => return Err(error),
        };
        let is_theirs = match record.method {
            LoginMethod::Anonymous => true,
            LoginMethod::Password | LoginMethod::Oidc | LoginMethod::Backend => record.identity.user == user,
        };
        Ok(if is_theirs { record.attributes.clone() } else { BTreeMap::new() })
    }

    /// What was sealed for the holder of this id at the login; empty when nothing was.
    pub fn secrets(&self, id: &SessionId, record: &Record) -> Result<BTreeMap<String, String>, SealError> {
        let Some(sealed) = &record.secrets else { return Ok(BTreeMap::new()) };
        seal::open_secrets(id, self.ring.as_deref(), sealed)
    }

    /// Secrets for a record that is changed by [`Self::update`], as [`Self::start`] seals those of a new one.
    pub fn seal(&self, id: &SessionId, secrets: &BTreeMap<String, String>) -> Result<Sealed, SealError> {
        seal::seal_secrets(id, self.ring.as_deref(), secrets)
    }

    /// Changes a live session's record; see [`SessionStore::update`].
    pub async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
        self.store.update(key, change).await
    }

    /// Changes a live session's attributes.
    pub async fn change_attributes(&self, key: &SessionKey, changes: &Changes) -> Result<Noted, StoreError> {
        let excess = Mutex::new(None);
        let change = |record: &Record| match changes.apply(&record.attributes, unix_now()) {
            Ok(attributes) => {
                *excess.lock() = None; // of an earlier try
                Some(Record { attributes, ..record.clone() })
            }
            Err(too_much) => {
                *excess.lock() = Some(too_much);
                None
            }
        };
        let is_live = self.store.update(key, &change).await?.is_some();
        Ok(match excess.into_inner() {
            _ if !is_live => Noted::Gone,
            Some(excess) => Noted::TooMuch(excess),
            None => Noted::Done,
        })
    }

    /// The user logs out; whether the session lived. `user` spares the store a search, where it is known.
    pub async fn end(&self, id: &SessionId, user: Option<&str>) -> Result<bool, StoreError> {
        self.destroy(&id.key(), user, Ending::LoggedOut).await
    }

    /// Ends somebody's session; whether it lived.
    pub async fn revoke(&self, key: &SessionKey, user: Option<&str>) -> Result<bool, StoreError> {
        self.destroy(key, user, Ending::Revoked).await
    }

    /// Ends all sessions of a user but one, if one is named; how many.
    pub async fn revoke_all(&self, user: &str, except: Option<&SessionKey>) -> Result<u64, StoreError> {
        self.ended.note_all_of(user, except, Instant::now());
        self.store.destroy_all(user, except, Ending::Revoked).await
    }

    /// Ends the sessions that were begun with a login of one of these handles, see [`ExternalLogin::handles`]; how many.
    ///
    /// # Errors
    /// When some of them may live on; all others have ended.
    pub async fn revoke_bound(&self, handles: &[String]) -> Result<u64, StoreError> {
        let mut bound = HashSet::new();
        for handle in handles {
            bound.extend(self.store.bound(handle).await?);
        }
        self.destroy_each(bound, Ending::Revoked).await
    }

    /// Ends everybody's sessions in one of the store's parts; how many.
    pub async fn revoke_part(&self, part: u16) -> Result<u64, StoreError> {
        self.ended.note_all(Instant::now());
        self.store.destroy_part(part, Ending::Revoked).await
    }

    /// The live sessions of a user, the oldest first.
    pub async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError> {
        self.store.list(user).await
    }

    /// A session's trail, the latest first.
    pub async fn activity(&self, key: &SessionKey) -> Result<Vec<Activity>, StoreError> {
        self.store.activity(key).await
    }

    /// The key ring, for who seals something else with it.
    pub fn ring(&self) -> Option<&Arc<KeyRing>> {
        self.ring.as_ref()
    }

    pub fn has_fallback(&self) -> bool {
        self.fallback.is_some()
    }

    /// A value for the browser's fallback cookie and the cookie's life, when there is such a cookie and the browser's
    /// `current` one is absent, another session's, or half over.
    pub fn renewed_fallback(&self, session: &Session, current: Option<&[u8]>) -> Option<(String, Duration)> {
        let fallback = self.fallback.as_ref()?;
        let now = unix_now();
        // It does not outlive the session: where polling counts as no use, the store has it end before.
        let ends = now.saturating_add(fallback::millis(session.time_to_live)).min(session.record.ends);
        let value = fallback.renewed(&session.key, &session.record, ends, current, now)?;
        Some((value, fallback.lifetime()))
    }

    /// For the login throttle and readiness, which keep their counts where the sessions are.
    pub fn store(&self) -> &Arc<dyn SessionStore> {
        &self.store
    }

    /// What is not known here.
    async fn look_up(&self, key: SessionKey, usage: &Use<'_>) -> Result<Resumed, StoreError> {
        let was_down = self.store.is_down(&key);
        match self.guesses.answer(&key, usage.client, Instant::now()) {
            Answer::Ask => {}
            Answer::Gone(ending) => return Ok(Resumed::Gone(ending)),
            // A store that is down is asked nothing, and who is known without it is no guesser.
            Answer::TooMany(_) if was_down => {}
            Answer::TooMany(wait) => return Ok(Resumed::TooManyGuesses(wait)),
        }
        let found = if usage.is_fresh { self.store.load_now(&key).await } else { self.store.load(&key).await };
        match found {
            Ok(Found::Live(stored)) => {
                self.guesses.note_life(&key);
                Ok(Resumed::Live(self.used(key, stored, usage), Source::Store))
            }
            Ok(Found::Ended(ending)) => Ok(self.gone(&key, usage, Some(ending))),
            Ok(Found::Nothing) => Ok(self.gone(&key, usage, None)),
            Err(error @ StoreError::Unavailable(_)) => {
                let known = self.known_without_store(key, usage, was_down);
                known.map(|(session, source)| Resumed::Live(session, source)).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    fn gone(&self, key: &SessionKey, usage: &Use<'_>, ending: Option<Ending>) -> Resumed {
        let now = Instant::now();
        self.guesses.note(key, usage.client, ending, now);
        self.ended.note(key, now);
        Resumed::Gone(ending)
    }

    /// The store did not answer. A single answer that is late is no outage: the store must be known to be down, and for
    /// the cookie, which anybody may bring at any time, it must have been known before this request came.
    fn known_without_store(&self, key: SessionKey, usage: &Use<'_>, was_down: bool) -> Option<(Session, Source)> {
        let copy = || {
            let stored = self.store.recall_within(self.grace?, &key).filter(|_| self.store.is_down(&key))?;
            Some((stored, Source::Grace))
        };
        let carried = || {
            let fallback = self.fallback.as_ref().filter(|_| was_down)?;
            let now = unix_now();
            let record = fallback.open(&key, usage.fallback?, now)?;
            let time_to_live = Duration::from_millis(record.ends.saturating_sub(now));
            Some((Stored { record: Arc::new(record), time_to_live }, Source::Fallback))
        };
        let (Stored { record, time_to_live }, source) = copy().or_else(carried)?;
        let is_doubtful = self.store.doubts(&key) || self.ended.doubts(&key, &record.identity.user, Instant::now());
        (!is_doubtful).then_some((Session { key, record, time_to_live }, source))
    }

    /// All at the same time: each may have to wait until every instance knows. How many lived, or the first failure,
    /// after which the others have ended all the same.
    async fn destroy_each(
        &self,
        keys: impl IntoIterator<Item = SessionKey>,
        ending: Ending,
    ) -> Result<u64, StoreError> {
        let mut ending_all = JoinSet::new();
        for key in keys {
            self.ended.note(&key, Instant::now());
            let store = Arc::clone(&self.store);
            ending_all.spawn(async move { store.destroy(&key, None, ending).await });
        }
        let mut ended = Ok(0);
        while let Some(one) = ending_all.join_next().await {
            let one = one.map_err(|error| StoreError::Unavailable(error.into())).and_then(|lived| lived);
            ended = match (ended, one) {
                (Ok(count), Ok(lived)) => Ok(count + u64::from(lived)),
                (Err(error), _) | (Ok(_), Err(error)) => Err(error),
            };
        }
        ended
    }

    async fn destroy(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Result<bool, StoreError> {
        // Noted before, and also when the store does not answer: then it may have ended.
        self.ended.note(key, Instant::now());
        self.store.destroy(key, user, ending).await
    }

    fn used(&self, key: SessionKey, stored: Stored, usage: &Use<'_>) -> Session {
        let Stored { record, time_to_live } = stored;
        if usage.touch {
            self.keep(&key, record.ends, time_to_live);
            if let (Some(trail), Some(route)) = (&self.trail, usage.route)
                && trail.note(&key, usage.client, route)
            {
                tokio::spawn(trail.clone().write(Arc::clone(&self.store), key.clone()));
            }
        }
        Session { key, record, time_to_live }
    }

    /// It is in use now: it lives on. `ends`, `time_to_live`: as the store has them.
    pub fn keep(&self, key: &SessionKey, ends: u64, time_to_live: Duration) {
        let interval = self.touch_interval();
        // The last touch gave it `idle` to live, or less near its absolute end, where `touches` knows better.
        let unused = self.lifetime.idle.saturating_sub(time_to_live);
        if interval <= unused && self.touches.claim(key, Instant::now(), interval) {
            self.touch_in_background(key.clone(), ends);
        }
    }

    fn touch_interval(&self) -> Duration {
        (self.lifetime.idle / 10).min(TOUCH_INTERVAL_MAX)
    }

    /// The request does not wait for it: when it fails, the session is only a little less fresh.
    fn touch_in_background(&self, key: SessionKey, ends: u64) {
        let sessions = self.clone();
        tokio::spawn(async move {
            let Err(error) = sessions.store.touch(&key, sessions.lifetime.idle, ends).await else { return };
            sessions.touches.give_back(&key);
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let session = key.log_hash();
            if sessions.touches.may_warn(Instant::now()) {
                tracing::warn!(session, cause, "session was not touched");
            } else {
                tracing::debug!(session, cause, "session was not touched");
            }
        });
    }
}

impl Lifetime {
    pub fn of(config: &model::Session) -> Self {
        Self { idle: config.idle_timeout.get_ref().get(), absolute: config.absolute_timeout.get_ref().get() }
    }
}

impl Options {
    /// `ring`: read from the file that `config` names.
    pub fn of(config: &model::Session, store: &model::Store, ring: Option<Arc<KeyRing>>) -> Self {
        let limit = Limit { sessions: config.max_per_user, when_full: config.when_full };
        Self {
            limit: (0 < config.max_per_user).then_some(limit),
            grace: store.grace.as_ref().map(|grace| grace.get_ref().get()),
            fallback: config.fallback.as_ref().map(|fallback| fallback.get_ref().lifetime.get_ref().get()),
            activity: config.activity,
            ring,
        }
    }

    /// The longest that anybody is served without a word of the store.
    pub fn bridged(&self) -> Duration {
        self.grace.max(self.fallback).unwrap_or_default()
    }
}

impl Use<'_> {
    /// On behalf of one of our own pages: the fallback cookie does not count there.
    pub fn of_own_page(client: IpAddr, touch: bool) -> Self {
        Self { client, touch, route: None, fallback: None, is_fresh: false }
    }
}

impl Resumed {
    pub fn live(self) -> Option<Session> {
        match self {
            Self::Live(session, _) => Some(session),
            Self::Gone(_) | Self::TooManyGuesses(_) => None,
        }
    }
}

impl Source {
    /// For the log and the metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Store => "store",
            Self::Grace => "grace",
            Self::Fallback => "fallback",
        }
    }
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use tokio::sync::mpsc;

    use super::store::memory::MemoryStore;
    use super::store::{Count, EndEvent};
    use super::*;
    use crate::config::model::WhenFull;

    /// A memory store on a clock of the test's that tells of every touch, can be made to fail, and has copies of what the
    /// test put there.
    struct Watched {
        store: MemoryStore,
        now: Arc<AtomicU64>,
        touched: mpsc::UnboundedSender<u64>,
        loads: AtomicU64,
        is_down: AtomicBool,
        touch_fails: AtomicBool,
        /// It does not answer, and nobody has noticed yet.
        is_late: AtomicBool,
        copy: Mutex<Option<(SessionKey, Stored)>>,
        copy_is_true: AtomicBool,
        doubts: AtomicBool,
        ending: Mutex<Option<Ending>>,
        activity: Mutex<Vec<Activity>>,
    }

    impl Watched {
        fn fails(&self) -> bool {
            self.is_down.load(Ordering::Relaxed) || self.is_late.load(Ordering::Relaxed)
        }

        fn copy_of(&self, key: &SessionKey) -> Option<Stored> {
            self.copy.lock().as_ref().filter(|(of, _)| of == key).map(|(_, stored)| stored.clone())
        }
    }

    #[async_trait::async_trait]
    impl SessionStore for Watched {
        fn recall(&self, key: &SessionKey) -> Option<Stored> {
            self.copy_of(key).filter(|_| self.copy_is_true.load(Ordering::Relaxed))
        }
        fn recall_within(&self, grace: Duration, key: &SessionKey) -> Option<Stored> {
            self.copy_of(key).filter(|_| !grace.is_zero())
        }
        fn is_down(&self, _: &SessionKey) -> bool {
            self.is_down.load(Ordering::Relaxed)
        }
        fn doubts(&self, _: &SessionKey) -> bool {
            self.doubts.load(Ordering::Relaxed)
        }
        async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
            self.loads.fetch_add(1, Ordering::Relaxed);
            if self.fails() {
                return Err(StoreError::Unavailable("down".into()));
            }
            let ending = *self.ending.lock();
            match ending {
                Some(ending) => Ok(Found::Ended(ending)),
                None => self.store.load(key).await,
            }
        }
        async fn add_activity(&self, _: &SessionKey, seen: &[Activity], _: u16) -> Result<(), StoreError> {
            self.activity.lock().extend_from_slice(seen);
            Ok(())
        }
        async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
            self.store.create(key, session, terms).await
        }
        async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
            let result = if self.touch_fails.load(Ordering::Relaxed) {
                Err(StoreError::Unavailable("down".into()))
            } else {
                self.store.touch(key, idle, ends).await
            };
            self.touched.send(self.now.load(Ordering::Relaxed)).unwrap();
            result
        }
        async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
            self.store.update(key, change).await
        }
        async fn claim(&self, name: &str, holder: &str, time: Duration) -> Result<bool, StoreError> {
            self.store.claim(name, holder, time).await
        }
        async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError> {
            self.store.release(name, holder).await
        }
        async fn bind(&self, handle: &str, key: &SessionKey, time: Duration) -> Result<Vec<SessionKey>, StoreError> {
            self.store.bind(handle, key, time).await
        }
        async fn bound(&self, handle: &str) -> Result<Vec<SessionKey>, StoreError> {
            self.store.bound(handle).await
        }
        async fn destroy(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Result<bool, StoreError> {
            if self.fails() {
                return Err(StoreError::Unavailable("down".into()));
            }
            self.store.destroy(key, user, ending).await
        }
        async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError> {
            self.store.list(user).await
        }
        async fn destroy_all(
            &self,
            user: &str,
            except: Option<&SessionKey>,
            ending: Ending,
        ) -> Result<u64, StoreError> {
            self.store.destroy_all(user, except, ending).await
        }
        fn parts(&self) -> u16 {
            self.store.parts()
        }
        async fn list_part(&self, part: u16) -> Result<Vec<Listed>, StoreError> {
            self.store.list_part(part).await
        }
        async fn destroy_part(&self, part: u16, ending: Ending) -> Result<u64, StoreError> {
            self.store.destroy_part(part, ending).await
        }
        async fn total(&self) -> Result<u64, StoreError> {
            self.store.total().await
        }
        async fn sweep(&self, part: u16) -> Result<Vec<EndEvent>, StoreError> {
            self.store.sweep(part).await
        }
        async fn forget_events(&self, part: u16, events: &[EndEvent]) -> Result<(), StoreError> {
            self.store.forget_events(part, events).await
        }
        async fn lead(&self, instance: &str, time: Duration) -> Result<bool, StoreError> {
            self.store.lead(instance, time).await
        }
        async fn activity(&self, key: &SessionKey) -> Result<Vec<Activity>, StoreError> {
            self.store.activity(key).await
        }
        async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
            self.store.increment(counter, window).await
        }
        async fn decrement(&self, counter: &str) -> Result<(), StoreError> {
            self.store.decrement(counter).await
        }
        async fn count(&self, counter: &str) -> Result<u64, StoreError> {
            self.store.count(counter).await
        }
        async fn reset(&self, counter: &str) -> Result<(), StoreError> {
            self.store.reset(counter).await
        }
        async fn ping(&self) -> Result<(), StoreError> {
            self.store.ping().await
        }
    }

    const MINUTE: u64 = 60_000;

    fn watched(idle: u64, absolute: u64) -> (Sessions, Arc<Watched>, mpsc::UnboundedReceiver<u64>) {
        let now = Arc::new(AtomicU64::new(1_000_000_000));
        let clock = Arc::clone(&now);
        let (touched, touches) = mpsc::unbounded_channel();
        let store = MemoryStore::with_clock(1_000, Box::new(move || clock.load(Ordering::Relaxed)));
        let store = Arc::new(Watched {
            store,
            now,
            touched,
            loads: 0.into(),
            is_down: false.into(),
            touch_fails: false.into(),
            is_late: false.into(),
            copy: Mutex::default(),
            copy_is_true: true.into(),
            doubts: false.into(),
            ending: Mutex::default(),
            activity: Mutex::default(),
        });
        let lifetime = Lifetime { idle: Duration::from_millis(idle), absolute: Duration::from_millis(absolute) };
        (Sessions::new(Arc::clone(&store) as _, lifetime), store, touches)
    }

    fn newcomer(user: &str) -> Newcomer {
        let client = ClientHints { address: None, user_agent: String::new() };
        let identity = Identity { user: user.into(), ..Identity::default() };
        let (secrets, attributes, method) = (BTreeMap::new(), BTreeMap::new(), LoginMethod::Password);
        Newcomer { identity, method, client, secrets, attributes, login: None }
    }

    async fn begin(sessions: &Sessions, newcomer: Newcomer, replaces: Option<&SessionId>) -> SessionId {
        match sessions.start(newcomer, replaces, &Changes::default()).await.unwrap() {
            Started::Begun { id, .. } => id,
            Started::Full(_) => panic!("there is room"),
        }
    }

    async fn start(sessions: &Sessions) -> SessionId {
        begin(sessions, newcomer("ann"), None).await
    }

    fn usage() -> Use<'static> {
        Use { client: [192, 0, 2, 1].into(), touch: true, route: Some("/"), fallback: None, is_fresh: false }
    }

    async fn resume(sessions: &Sessions, id: &SessionId) -> Option<Session> {
        sessions.resume(id, &usage()).await.unwrap().live()
    }

    /// Lets the touches in the background run; the runtime of these tests has one thread.
    async fn settle() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_network_begins_so_many_sessions_of_nobody_and_no_more() {
        let (sessions, store, _) = watched(30 * MINUTE, 720 * MINUTE);
        let setting = attributes::Setting { value: "1".into(), time: None };
        let changes = Changes { unset: Vec::new(), set: BTreeMap::from([("cart".to_owned(), setting)]) };
        let hints = |last| ClientHints { address: Some([192, 0, 2, last].into()), user_agent: String::new() };
        let mut users = std::collections::BTreeSet::new();
        for _ in 0..ANONYMOUS_MAX {
            let Anonymous::Begun(id) = sessions.start_anonymous(hints(7), &changes).await.unwrap() else {
                panic!("there is room")
            };
            let session = resume(&sessions, &id).await.expect("it lives");
            assert_eq!(session.record.method, LoginMethod::Anonymous);
            users.insert(session.record.identity.user.clone());
        }
        assert_eq!(users.len() as u64, ANONYMOUS_MAX, "none is another one's");
        let refused = sessions.start_anonymous(hints(7), &changes).await.unwrap();
        assert!(matches!(refused, Anonymous::TooMany), "{refused:?}");
        let other = sessions.start_anonymous(hints(8), &changes).await.unwrap();
        assert!(matches!(other, Anonymous::Begun(_)), "another network: {other:?}");
        store.now.fetch_add(MINUTE, Ordering::Relaxed);
        let later = sessions.start_anonymous(hints(7), &changes).await.unwrap();
        assert!(matches!(later, Anonymous::Begun(_)), "{later:?}");
    }

    #[tokio::test]
    async fn a_session_is_resumed_until_it_ends() {
        let (sessions, _, _) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        let session = resume(&sessions, &id).await.expect("it lives");
        assert_eq!(session.record.identity.user, "ann");
        assert!(session.key == id.key());
        assert!(sessions.end(&id, None).await.unwrap());
        assert!(resume(&sessions, &id).await.is_none(), "ended is ended");
        assert!(!sessions.end(&id, None).await.unwrap());
    }

    #[tokio::test]
    async fn a_new_login_gives_a_new_id_and_ends_the_old_one() {
        let (sessions, _, _) = watched(30 * MINUTE, 720 * MINUTE);
        let old = start(&sessions).await;
        let new = begin(&sessions, newcomer("bob"), Some(&old)).await;
        assert!(old != new);
        assert!(resume(&sessions, &old).await.is_none());
        assert_eq!(resume(&sessions, &new).await.unwrap().record.identity.user, "bob");
    }

    #[tokio::test]
    async fn use_is_written_at_most_once_per_interval() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        for _ in 0..59 {
            store.now.fetch_add(1_000, Ordering::Relaxed);
            assert!(resume(&sessions, &id).await.is_some());
        }
        settle().await;
        assert!(touches.try_recv().is_err(), "59 s are not worth a write");
        store.now.fetch_add(1_000, Ordering::Relaxed);
        for _ in 0..100 {
            assert!(resume(&sessions, &id).await.is_some());
        }
        settle().await;
        assert!(touches.try_recv().is_ok(), "after 60 s it is written");
        assert!(touches.try_recv().is_err(), "once, however many requests come together");
        let stored = store.load(&id.key()).await.unwrap().live().unwrap();
        assert_eq!(stored.time_to_live, Duration::from_millis(30 * MINUTE), "it counts as used now");
    }

    #[tokio::test]
    async fn a_short_idle_time_is_written_each_tenth_of_it() {
        let (sessions, store, mut touches) = watched(MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        store.now.fetch_add(5_999, Ordering::Relaxed);
        resume(&sessions, &id).await.unwrap();
        settle().await;
        assert!(touches.try_recv().is_err());
        store.now.fetch_add(1, Ordering::Relaxed);
        resume(&sessions, &id).await.unwrap();
        settle().await;
        assert!(touches.try_recv().is_ok());
    }

    #[tokio::test]
    async fn near_the_absolute_end_a_session_is_not_touched_by_every_request() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 30 * MINUTE);
        let id = start(&sessions).await;
        store.now.fetch_add(20 * MINUTE, Ordering::Relaxed);
        for _ in 0..100 {
            assert!(resume(&sessions, &id).await.is_some());
        }
        settle().await;
        assert!(touches.try_recv().is_ok());
        assert!(touches.try_recv().is_err(), "its life cannot grow, and one try is enough");
        store.now.fetch_add(10 * MINUTE, Ordering::Relaxed);
        assert!(resume(&sessions, &id).await.is_none(), "however much it is used");
    }

    #[tokio::test]
    async fn a_touch_that_fails_is_tried_again_and_fails_no_request() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        store.now.fetch_add(2 * MINUTE, Ordering::Relaxed);
        store.touch_fails.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            assert!(resume(&sessions, &id).await.is_some());
            settle().await;
            assert!(touches.try_recv().is_ok());
        }
        store.touch_fails.store(false, Ordering::Relaxed);
        resume(&sessions, &id).await.unwrap();
        settle().await;
        let stored = store.load(&id.key()).await.unwrap().live().unwrap();
        assert_eq!(stored.time_to_live, Duration::from_millis(30 * MINUTE));
    }
    #[tokio::test]
    async fn a_silent_request_is_no_use_of_a_session() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 720 * MINUTE);
        let sessions = sessions.with(Options { activity: 10, ..Options::default() });
        let id = start(&sessions).await;
        store.now.fetch_add(10 * MINUTE, Ordering::Relaxed);
        let silent = Use { touch: false, ..usage() };
        assert!(sessions.resume(&id, &silent).await.unwrap().live().is_some(), "it is served");
        settle().await;
        assert!(touches.try_recv().is_err());
        store.now.fetch_add(20 * MINUTE, Ordering::Relaxed);
        assert!(sessions.resume(&id, &silent).await.unwrap().live().is_none(), "and keeps nothing alive");
    }

    #[tokio::test]
    async fn a_copy_costs_no_question() {
        let (sessions, store, _) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        assert_eq!(source(&sessions, &id, &usage()).await, Some(Source::Store));
        let asked = store.loads.load(Ordering::Relaxed);
        *store.copy.lock() = Some((id.key(), store.store.load(&id.key()).await.unwrap().live().unwrap()));
        assert_eq!(source(&sessions, &id, &usage()).await, Some(Source::Copy));
        assert_eq!(store.loads.load(Ordering::Relaxed), asked);
    }

    /// How a live session was known; none while nobody can say.
    async fn source(sessions: &Sessions, id: &SessionId, usage: &Use<'_>) -> Option<Source> {
        match sessions.resume(id, usage).await {
            Ok(Resumed::Live(_, source)) => Some(source),
            Err(StoreError::Unavailable(_)) => None,
            other => panic!("{other:?}"),
        }
    }

    /// A session with a copy and a fallback cookie, and the store that can be taken down.
    async fn bridged(options: Options) -> (Sessions, Arc<Watched>, SessionId, String) {
        let (sessions, store, _) = watched(30 * MINUTE, 720 * MINUTE);
        let ring = Some(Arc::new(seal::tests::ring(&[seal::tests::ONE])));
        let sessions = sessions.with(Options { ring, ..options });
        let id = start(&sessions).await;
        let session = resume(&sessions, &id).await.unwrap();
        // The store's clock is the test's; the cookie lives by the real one.
        let record = Record { ends: u64::MAX, ..(*session.record).clone() };
        let session = Session { record: Arc::new(record), ..session };
        let cookie = sessions.renewed_fallback(&session, None).map(|(value, _)| value).unwrap_or_default();
        *store.copy.lock() = Some((id.key(), store.store.load(&id.key()).await.unwrap().live().unwrap()));
        store.copy_is_true.store(false, Ordering::Relaxed);
        (sessions, store, id, cookie)
    }

    const FIVE_MINUTES: Option<Duration> = Some(Duration::from_secs(300));

    #[tokio::test]
    async fn in_an_outage_a_copy_is_good_for_the_grace_and_for_no_other_reason() {
        let (sessions, store, id, _) = bridged(Options { grace: FIVE_MINUTES, ..Options::default() }).await;
        assert_eq!(source(&sessions, &id, &usage()).await, Some(Source::Store), "while the store answers, it decides");
        store.is_late.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &usage()).await, None, "one late answer is no outage");
        store.is_down.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &usage()).await, Some(Source::Grace));
        store.doubts.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &usage()).await, None, "what the store's copies doubt is not served");
        store.doubts.store(false, Ordering::Relaxed);
        *store.copy.lock() = None;
        assert_eq!(source(&sessions, &id, &usage()).await, None, "nobody knows this one");

        let (sessions, store, id, _) = bridged(Options::default()).await;
        store.is_down.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &usage()).await, None, "without grace there is none");
    }

    #[tokio::test]
    async fn in_an_outage_the_sealed_cookie_counts_for_its_own_session() {
        let (sessions, store, id, cookie) = bridged(Options { fallback: FIVE_MINUTES, ..Options::default() }).await;
        *store.copy.lock() = None;
        let with_cookie = Use { fallback: Some(cookie.as_bytes()), ..usage() };
        assert_eq!(
            source(&sessions, &id, &with_cookie).await,
            Some(Source::Store),
            "while the store answers, it decides"
        );
        store.is_late.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &with_cookie).await, None, "one late answer is no outage");
        store.is_down.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &with_cookie).await, Some(Source::Fallback));
        let session = sessions.resume(&id, &with_cookie).await.unwrap().live().unwrap();
        assert_eq!(session.record.identity.user, "ann");
        assert_eq!(source(&sessions, &id, &usage()).await, None, "the route does not let it count, or there is none");
        let other = SessionId::generate("ann").unwrap();
        assert_eq!(source(&sessions, &other, &with_cookie).await, None, "beside another session it says nothing");
        store.doubts.store(true, Ordering::Relaxed);
        assert_eq!(source(&sessions, &id, &with_cookie).await, None);
    }

    #[tokio::test]
    async fn the_sealed_cookie_does_not_outlive_the_idle_time_of_its_session() {
        let (sessions, store, id, _) = bridged(Options { fallback: FIVE_MINUTES, ..Options::default() }).await;
        let session = resume(&sessions, &id).await.unwrap();
        let record = Arc::new(Record { ends: u64::MAX, ..(*session.record).clone() });
        for (time_to_live, is_served) in [(Duration::ZERO, false), (Duration::from_secs(60), true)] {
            let session = Session { record: Arc::clone(&record), time_to_live, ..session.clone() };
            let (cookie, _) = sessions.renewed_fallback(&session, None).unwrap();
            *store.copy.lock() = None;
            store.is_down.store(true, Ordering::Relaxed);
            let with_cookie = Use { fallback: Some(cookie.as_bytes()), ..usage() };
            let source = source(&sessions, &id, &with_cookie).await;
            assert_eq!(source, is_served.then_some(Source::Fallback), "{time_to_live:?} were left of its idle time");
        }
    }

    #[tokio::test]
    async fn what_ended_here_is_not_served_in_an_outage() {
        let options = || Options { grace: FIVE_MINUTES, fallback: FIVE_MINUTES, ..Options::default() };
        let limit = Some(Limit { sessions: 1, when_full: WhenFull::EvictOldest });
        for case in
            ["logout", "failed logout", "revoked", "all revoked", "all but this", "gone", "replaced", "displaced"]
        {
            let (sessions, store, id, cookie) = bridged(Options { limit, ..options() }).await;
            let with_cookie = Use { fallback: Some(cookie.as_bytes()), ..usage() };
            match case {
                "logout" => assert!(sessions.end(&id, None).await.unwrap()),
                "failed logout" => {
                    store.is_down.store(true, Ordering::Relaxed);
                    sessions.end(&id, None).await.unwrap_err();
                }
                "revoked" => assert!(sessions.revoke(&id.key(), None).await.unwrap()),
                "all revoked" => _ = sessions.revoke_all("ann", None).await,
                "all but this" => _ = sessions.revoke_all("ann", Some(&id.key())).await,
                "gone" => {
                    *store.ending.lock() = Some(Ending::Displaced);
                    let resumed = sessions.resume(&id, &with_cookie).await.unwrap();
                    assert!(matches!(resumed, Resumed::Gone(Some(Ending::Displaced))));
                }
                "displaced" => _ = begin(&sessions, newcomer("ann"), None).await,
                _ => _ = begin(&sessions, newcomer("ann"), Some(&id)).await,
            }
            store.is_down.store(true, Ordering::Relaxed);
            let resumed = sessions.resume(&id, &with_cookie).await;
            let is_served = resumed.is_ok_and(|resumed| resumed.live().is_some());
            assert_eq!(is_served, case == "all but this", "{case}");
        }
    }

    #[tokio::test]
    async fn guesses_reach_the_store_a_limited_number_of_times_and_copies_are_served_all_the_same() {
        let (sessions, store, _) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        let mut refused = 0;
        for _ in 0..1_000 {
            let guess = SessionId::generate("ann").unwrap();
            let resumed = sessions.resume(&guess, &usage()).await.unwrap();
            refused += u32::from(matches!(resumed, Resumed::TooManyGuesses(_)));
        }
        assert!(store.loads.load(Ordering::Relaxed) < 400 && 600 < refused, "{refused} of 1000 were refused");
        assert!(sessions.resume(&id, &usage()).await.unwrap().live().is_some(), "nor who is known to have one");
        let elsewhere = Sessions::new(Arc::clone(&store) as _, sessions.lifetime);
        let unknown = start(&elsewhere).await;
        assert!(matches!(sessions.resume(&unknown, &usage()).await.unwrap(), Resumed::TooManyGuesses(_)));
        let elsewhere = Use { client: [192, 0, 2, 2].into(), ..usage() };
        assert!(sessions.resume(&unknown, &elsewhere).await.unwrap().live().is_some());
        *store.copy.lock() = Some((id.key(), store.store.load(&id.key()).await.unwrap().live().unwrap()));
        assert!(sessions.resume(&id, &usage()).await.unwrap().live().is_some(), "what is known here costs no question");
    }

    #[tokio::test]
    async fn the_same_unknown_id_is_asked_for_once() {
        let (sessions, store, _) = watched(30 * MINUTE, 720 * MINUTE);
        let guess = SessionId::generate("ann").unwrap();
        for _ in 0..100 {
            assert!(resume(&sessions, &guess).await.is_none());
        }
        assert_eq!(store.loads.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_trail_is_written_in_the_background_once_per_interval() {
        let (sessions, store, _) = watched(1_000, 720 * MINUTE);
        let sessions = sessions.with(Options { activity: 10, ..Options::default() });
        let id = start(&sessions).await;
        for _ in 0..50 {
            for route in ["/", "/shop"] {
                sessions.resume(&id, &Use { route: Some(route), ..usage() }).await.unwrap();
            }
        }
        assert!(store.activity.lock().is_empty(), "no request waits for it");
        let is_written = async {
            while store.activity.lock().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), is_written).await.expect("the delay is a tenth of a second");
        let routes: Vec<_> = store.activity.lock().iter().map(|seen| seen.route.clone()).collect();
        assert_eq!(routes, ["/", "/shop"], "the same route from the same address is one entry");
    }

    #[tokio::test]
    async fn secrets_are_for_the_holder_of_the_id() {
        let (sessions, _, _) = watched(30 * MINUTE, 720 * MINUTE);
        let secrets = BTreeMap::from([("refresh_token".to_owned(), "r".to_owned())]);
        let id = begin(&sessions, Newcomer { secrets: secrets.clone(), ..newcomer("ann") }, None).await;
        let session = resume(&sessions, &id).await.unwrap();
        assert_eq!(sessions.secrets(&id, &session.record), Ok(secrets));
        let other = SessionId::generate("ann").unwrap();
        assert_eq!(sessions.secrets(&other, &session.record), Err(SealError::Broken));
    }

    #[test]
    fn the_limit_of_the_configuration_is_none_at_zero() {
        let session = |max_per_user| model::Session { max_per_user, ..model::Session::default() };
        let limit = |max_per_user| Options::of(&session(max_per_user), &model::Store::default(), None).limit;
        assert_eq!(limit(0), None);
        assert_eq!(limit(3), Some(Limit { sessions: 3, when_full: WhenFull::EvictOldest }));
    }
}
