//! Where was a session used lately? Gathered in memory, written now and then, never waited for.
//!
//! Uses of one route from one address are one entry until they are written. What is not written yet when the process
//! ends is lost: the trail helps a person to recognise a session, it is no audit.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::fallback::unix_now;
use super::id::SessionKey;
use super::store::{Activity, SessionStore};

/// What has been seen and is not written yet.
#[derive(Clone, Debug)]
pub(super) struct Trail {
    /// So many entries of a session are kept in the store.
    keep: u16,
    /// From the first use to the write.
    delay: Duration,
    unwritten: Arc<[Mutex<Seen>]>,
}

type Seen = HashMap<SessionKey, Vec<Activity>>;

/// Locks, so that workers seldom meet.
const SHARDS: usize = 16;
const SESSIONS_PER_SHARD_MAX: usize = 4096;
/// Between two writes of one session; further ones are not noted.
const ENTRIES_MAX: usize = 32;

impl Trail {
    pub(super) fn new(keep: u16, delay: Duration) -> Self {
        Self { keep, delay, unwritten: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Whoever notes the first use of a session is told to [write](Self::write) it.
    #[must_use]
    pub(super) fn note(&self, key: &SessionKey, address: IpAddr, route: &str) -> bool {
        let mut sessions = self.shard(key).lock();
        if let Some(seen) = sessions.get_mut(key) {
            let is_new = !seen.iter().any(|entry| entry.address == address && entry.route == route);
            if is_new && seen.len() < ENTRIES_MAX.min(usize::from(self.keep)) {
                seen.push(Activity { at: unix_now(), address, route: route.to_owned() });
            }
            return false;
        }
        if SESSIONS_PER_SHARD_MAX <= sessions.len() {
            return false;
        }
        sessions.insert(key.clone(), vec![Activity { at: unix_now(), address, route: route.to_owned() }]);
        true
    }

    /// Writes what comes together from now on until the delay is over.
    pub(super) async fn write(self, store: Arc<dyn SessionStore>, key: SessionKey) {
        tokio::time::sleep(self.delay).await;
        let Some(seen) = self.shard(&key).lock().remove(&key) else { return };
        if let Err(error) = store.add_activity(&key, &seen, self.keep).await {
            tracing::debug!(session = key.log_hash(), %error, "activity was not written");
        }
    }

    fn shard(&self, key: &SessionKey) -> &Mutex<Seen> {
        &self.unwritten[key.spread() % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::id::SessionId;

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn uses_of_one_route_from_one_address_are_one_entry() {
        let (trail, key) = (Trail::new(10, Duration::ZERO), key());
        assert!(trail.note(&key, address(1), "/"), "the first one writes");
        for _ in 0..100 {
            assert!(!trail.note(&key, address(1), "/"));
            assert!(!trail.note(&key, address(2), "/"));
            assert!(!trail.note(&key, address(1), "/shop"));
        }
        assert_eq!(trail.shard(&key).lock()[&key].len(), 3);
        assert!(trail.note(&self::key(), address(1), "/"), "each session has a trail of its own");
    }

    #[test]
    fn it_is_bounded_per_session_and_in_all() {
        let (trail, key) = (Trail::new(5, Duration::ZERO), key());
        for last in 0..=255 {
            let _ = trail.note(&key, address(last), "/");
        }
        assert_eq!(trail.shard(&key).lock()[&key].len(), 5, "more than is kept is not gathered");
        for _ in 0..SHARDS * SESSIONS_PER_SHARD_MAX * 2 {
            let _ = trail.note(&self::key(), address(1), "/");
        }
        assert!(trail.unwritten.iter().all(|shard| shard.lock().len() <= SESSIONS_PER_SHARD_MAX));
    }
}
