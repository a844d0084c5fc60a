//! Which sessions did this process touch lately? So that each is written at most once per interval.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::id::SessionKey;

/// When each session was last touched here. Near its absolute end a session's life cannot grow any more, and looks
/// unused for ever: the store alone could not tell that it was touched.
#[derive(Debug, Default)]
pub(super) struct Touches {
    lately: Mutex<Lately>,
}

#[derive(Debug, Default)]
struct Lately {
    touched: HashMap<SessionKey, Instant>,
    /// Above this number the old ones are forgotten.
    crowded: usize,
    warned: Option<Instant>,
}

/// Below this many it is not worth looking.
const CROWDED_MIN: usize = 1024;
/// A store that is down is one line in ten seconds, not one for each session.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

impl Touches {
    /// Whether the caller is to touch it now: nobody did within `interval`.
    pub(super) fn claim(&self, key: &SessionKey, now: Instant, interval: Duration) -> bool {
        let mut lately = self.lately.lock();
        if lately.touched.get(key).is_some_and(|last| now.saturating_duration_since(*last) < interval) {
            return false;
        }
        if lately.crowded.max(CROWDED_MIN) <= lately.touched.len() {
            lately.touched.retain(|_, last| now.saturating_duration_since(*last) < interval);
            lately.crowded = lately.touched.len() * 2;
        }
        lately.touched.insert(key.clone(), now);
        true
    }

    /// It did not work: the next request may try again.
    pub(super) fn give_back(&self, key: &SessionKey) {
        self.lately.lock().touched.remove(key);
    }

    /// Whether a failure deserves a warning of its own.
    pub(super) fn may_warn(&self, now: Instant) -> bool {
        let mut lately = self.lately.lock();
        let may = lately.warned.is_none_or(|last| WARNING_INTERVAL <= now.saturating_duration_since(last));
        if may {
            lately.warned = Some(now);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use crate::session::id::SessionId;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(60);

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    #[test]
    fn a_session_is_claimed_once_per_interval() {
        let (touches, key, start) = (Touches::default(), key(), Instant::now());
        assert!(touches.claim(&key, start, INTERVAL));
        assert!(!touches.claim(&key, start + Duration::from_secs(59), INTERVAL));
        assert!(touches.claim(&key, start + Duration::from_secs(60), INTERVAL));
        assert!(touches.claim(&self::key(), start, INTERVAL), "each session has its own clock");
        touches.give_back(&key);
        assert!(touches.claim(&key, start, INTERVAL), "a touch that failed is tried again");
    }

    #[test]
    fn old_claims_are_forgotten() {
        let (touches, start) = (Touches::default(), Instant::now());
        for n in 0..100_u32 {
            for _ in 0..100 {
                touches.claim(&key(), start + INTERVAL * n, INTERVAL);
            }
        }
        let kept = touches.lately.lock().touched.len();
        assert!(kept <= CROWDED_MIN, "{kept} claims are kept");
    }

    #[test]
    fn a_failing_store_warns_seldom() {
        let (touches, start) = (Touches::default(), Instant::now());
        assert!(touches.may_warn(start));
        assert!(!touches.may_warn(start + Duration::from_secs(9)));
        assert!(touches.may_warn(start + Duration::from_secs(10)));
    }
}
