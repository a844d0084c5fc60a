//! Who is this? A session cookie becomes a [`Session`], or nothing.
//!
//! The rules of life (idle, absolute) are here; where sessions are kept is behind [`store::SessionStore`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::identity::Identity;

pub mod id;
pub mod record;
pub mod seal;
pub mod cookie;
mod touch;
pub mod store;

use id::{SessionId, SessionKey};
use record::{ClientHints, LoginMethod, Record};
use store::{Ending, NewSession, SessionStore, StoreError, Terms};
use touch::Touches;

/// How long a session lives.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// Unused for this long, it ends.
    pub idle: Duration,
    /// However much it is used, it ends after this long.
    pub absolute: Duration,
}

/// A live session, as one request sees it.
#[derive(Clone, Debug)]
pub struct Session {
    /// What it is stored under; the id itself goes no further than the cookie.
    pub key: SessionKey,
    pub record: Arc<Record>,
}

/// Starts, resumes, touches and ends sessions.
#[derive(Clone)]
pub struct Sessions {
    store: Arc<dyn SessionStore>,
    lifetime: Lifetime,
    touches: Arc<Touches>,
}

/// However long the idle time, its clock is never further behind than this.
const TOUCH_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// What browsers send is about 120 bytes; the rest is a client's idea of free storage.
const USER_AGENT_BYTES_MAX: usize = 256;

impl Sessions {
    pub fn new(store: Arc<dyn SessionStore>, lifetime: Lifetime) -> Self {
        Self { store, lifetime, touches: Arc::default() }
    }

    /// The session of this id, if it lives; it counts as used now (written once per tenth of the idle time
    /// or per 60 s, whichever is shorter, in the background).
    ///
    /// # Errors
    /// When the store does not say, or what it holds cannot be read ([`StoreError::Unreadable`]): then nobody knows
    /// that the session is gone.
    pub async fn resume(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        let key = id.key();
        let Some(stored) = self.store.load(&key).await?.live() else { return Ok(None) };
        let interval = self.touch_interval();
        // The last touch gave it `idle` to live, or less near its absolute end, where `touches` knows better.
        let unused = self.lifetime.idle.saturating_sub(stored.time_to_live);
        if interval <= unused && self.touches.claim(&key, Instant::now(), interval) {
            self.touch_in_background(key.clone(), stored.record.ends);
        }
        Ok(Some(Session { key, record: stored.record }))
    }

    /// A new session under a new id; `replaces` (the id that the browser came with) is ended in the same step.
    pub async fn start(
        &self,
        identity: Identity,
        method: LoginMethod,
        mut client: ClientHints,
        replaces: Option<&SessionId>,
    ) -> Result<SessionId, StoreError> {
        let id = SessionId::generate(&identity.user).map_err(|error| StoreError::Unavailable(error.into()))?;
        let longest = USER_AGENT_BYTES_MAX.min(client.user_agent.len());
        let at = (0..=longest).rev().find(|at| client.user_agent.is_char_boundary(*at));
        client.user_agent.truncate(at.unwrap_or_default());
        let session = NewSession { identity, method, client, secrets: None };
        let terms = Terms { lifetime: self.lifetime, limit: None, replaces: replaces.map(SessionId::key) };
        self.store.create(&id.key(), session, &terms).await?;
        Ok(id)
    }

    /// Ends it; whether it lived.
    pub async fn end(&self, id: &SessionId) -> Result<bool, StoreError> {
        self.store.destroy(&id.key(), None, Ending::LoggedOut).await
    }

    /// For the login throttle and readiness, which keep their counts where the sessions are.
    pub fn store(&self) -> &Arc<dyn SessionStore> {
        &self.store
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

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::mpsc;

    use super::store::memory::MemoryStore;
    use super::store::{Count, Creation, Found};
    use super::*;

    /// A memory store on a clock of the test's that tells of every touch, and can be made to fail.
    struct Watched {
        store: MemoryStore,
        now: Arc<AtomicU64>,
        touched: mpsc::UnboundedSender<u64>,
        is_down: std::sync::atomic::AtomicBool,
    }

    #[async_trait::async_trait]
    impl SessionStore for Watched {
        async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
            self.store.load(key).await
        }
        async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
            self.store.create(key, session, terms).await
        }
        async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
            let result = if self.is_down.load(Ordering::Relaxed) {
                Err(StoreError::Unavailable("down".into()))
            } else {
                self.store.touch(key, idle, ends).await
            };
            self.touched.send(self.now.load(Ordering::Relaxed)).unwrap();
            result
        }
        async fn destroy(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Result<bool, StoreError> {
            self.store.destroy(key, user, ending).await
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
        let store = MemoryStore::with_clock(100, Box::new(move || clock.load(Ordering::Relaxed)));
        let store = Arc::new(Watched { store, now, touched, is_down: false.into() });
        let lifetime = Lifetime { idle: Duration::from_millis(idle), absolute: Duration::from_millis(absolute) };
        (Sessions::new(Arc::clone(&store) as _, lifetime), store, touches)
    }

    async fn start(sessions: &Sessions) -> SessionId {
        let client = ClientHints { address: None, user_agent: "é".repeat(1_000) };
        let identity = Identity { user: "ann".into(), ..Identity::default() };
        sessions.start(identity, LoginMethod::Password, client, None).await.unwrap()
    }

    /// Lets the touches in the background run; the runtime of these tests has one thread.
    async fn settle() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_session_is_resumed_until_it_ends() {
        let (sessions, _, _) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        let session = sessions.resume(&id).await.unwrap().expect("it lives");
        assert_eq!(session.record.identity.user, "ann");
        assert_eq!(session.record.client.user_agent.len(), USER_AGENT_BYTES_MAX, "cut at a character");
        assert!(session.key == id.key());
        assert!(sessions.end(&id).await.unwrap());
        assert!(sessions.resume(&id).await.unwrap().is_none(), "ended is ended");
        assert!(!sessions.end(&id).await.unwrap());
    }

    #[tokio::test]
    async fn a_new_login_gives_a_new_id_and_ends_the_old_one() {
        let (sessions, _, _) = watched(30 * MINUTE, 720 * MINUTE);
        let old = start(&sessions).await;
        let client = ClientHints { address: None, user_agent: String::new() };
        let identity = Identity { user: "bob".into(), ..Identity::default() };
        let new = sessions.start(identity, LoginMethod::Password, client, Some(&old)).await.unwrap();
        assert!(old != new);
        assert!(sessions.resume(&old).await.unwrap().is_none());
        assert_eq!(sessions.resume(&new).await.unwrap().unwrap().record.identity.user, "bob");
    }

    #[tokio::test]
    async fn use_is_written_at_most_once_per_interval() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        for _ in 0..59 {
            store.now.fetch_add(1_000, Ordering::Relaxed);
            assert!(sessions.resume(&id).await.unwrap().is_some());
        }
        settle().await;
        assert!(touches.try_recv().is_err(), "59 s are not worth a write");
        store.now.fetch_add(1_000, Ordering::Relaxed);
        for _ in 0..100 {
            assert!(sessions.resume(&id).await.unwrap().is_some());
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
        sessions.resume(&id).await.unwrap();
        settle().await;
        assert!(touches.try_recv().is_err());
        store.now.fetch_add(1, Ordering::Relaxed);
        sessions.resume(&id).await.unwrap();
        settle().await;
        assert!(touches.try_recv().is_ok());
    }

    #[tokio::test]
    async fn near_the_absolute_end_a_session_is_not_touched_by_every_request() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 30 * MINUTE);
        let id = start(&sessions).await;
        store.now.fetch_add(20 * MINUTE, Ordering::Relaxed);
        for _ in 0..100 {
            assert!(sessions.resume(&id).await.unwrap().is_some());
        }
        settle().await;
        assert!(touches.try_recv().is_ok());
        assert!(touches.try_recv().is_err(), "its life cannot grow, and one try is enough");
        store.now.fetch_add(10 * MINUTE, Ordering::Relaxed);
        assert!(sessions.resume(&id).await.unwrap().is_none(), "however much it is used");
    }

    #[tokio::test]
    async fn a_touch_that_fails_is_tried_again_and_fails_no_request() {
        let (sessions, store, mut touches) = watched(30 * MINUTE, 720 * MINUTE);
        let id = start(&sessions).await;
        store.now.fetch_add(2 * MINUTE, Ordering::Relaxed);
        store.is_down.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            assert!(sessions.resume(&id).await.unwrap().is_some());
            settle().await;
            assert!(touches.try_recv().is_ok());
        }
        store.is_down.store(false, Ordering::Relaxed);
        sessions.resume(&id).await.unwrap();
        settle().await;
        let stored = store.load(&id.key()).await.unwrap().live().unwrap();
        assert_eq!(stored.time_to_live, Duration::from_millis(30 * MINUTE));
    }
}
