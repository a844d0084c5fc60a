//! Which sessions does this instance know to have ended? For the time when the store cannot be asked.
//!
//! While the store answers, it alone decides. During an outage, grace and the fallback cookie serve who was known before,
//! and what is remembered here is refused. To forget is to let in, so whoever fills this memory makes it refuse more.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::id::{SessionKey, UserKey};

/// Remembers for as long as an outage may be bridged.
#[derive(Debug)]
pub(super) struct Ended {
    remember: Duration,
    lately: Mutex<Lately>,
}

#[derive(Debug, Default)]
struct Lately {
    sessions: HashMap<SessionKey, Instant>,
    /// With the one session that stayed.
    users: HashMap<UserKey, (Instant, Option<SessionKey>)>,
    /// Everybody's, or so many that it might be anybody's.
    all: Option<Instant>,
}

const REMEMBERED_MAX: usize = 64 * 1024;

impl Ended {
    /// `remember`: the longest time for which somebody may be served without the store; zero remembers nothing.
    pub(super) fn new(remember: Duration) -> Self {
        Self { remember, lately: Mutex::default() }
    }

    pub(super) fn note(&self, key: &SessionKey, now: Instant) {
        self.change(now, |lately| {
            lately.sessions.insert(key.clone(), now);
        });
    }

    pub(super) fn note_all_of(&self, user: &str, except: Option<&SessionKey>, now: Instant) {
        self.change(now, |lately| {
            lately.users.insert(UserKey::of(user), (now, except.cloned()));
        });
    }

    pub(super) fn note_all(&self, now: Instant) {
        self.change(now, |lately| lately.all = Some(now));
    }

    /// Whether a session may have ended. Of a user whose sessions were ended, those count that began since, too.
    pub(super) fn doubts(&self, key: &SessionKey, user: &str, now: Instant) -> bool {
        let lately = self.lately.lock();
        let counts = |at: &Instant| self.counts(*at, now);
        lately.all.as_ref().is_some_and(counts)
            || lately.sessions.get(key).is_some_and(counts)
            || lately
                .users
                .get(&UserKey::of(user))
                .is_some_and(|(at, stayed)| counts(at) && stayed.as_ref() != Some(key))
    }

    fn change(&self, now: Instant, change: impl FnOnce(&mut Lately)) {
        if self.remember.is_zero() {
            return;
        }
        let mut lately = self.lately.lock();
        let is_full = make_room(&mut lately.sessions, |at| self.counts(*at, now))
            | make_room(&mut lately.users, |(at, _)| self.counts(*at, now));
        if is_full {
            *lately = Lately { all: Some(now), ..Lately::default() };
        }
        change(&mut lately);
    }

    fn counts(&self, at: Instant, now: Instant) -> bool {
        now.saturating_duration_since(at) <= self.remember
    }
}

/// Whether there is none.
fn make_room<K: Eq + Hash, V>(map: &mut HashMap<K, V>, counts: impl Fn(&V) -> bool) -> bool {
    if map.len() < REMEMBERED_MAX {
        return false;
    }
    map.retain(|_, value| counts(value));
    // Almost full is full: else each of the next ones would look through all of it.
    REMEMBERED_MAX - REMEMBERED_MAX / 8 < map.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::id::SessionId;

    const REMEMBER: Duration = Duration::from_secs(300);

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    #[test]
    fn what_ended_here_is_doubted_for_as_long_as_it_could_be_served() {
        let (ended, start, gone, other) = (Ended::new(REMEMBER), Instant::now(), key(), key());
        ended.note(&gone, start);
        assert!(ended.doubts(&gone, "ann", start + REMEMBER));
        assert!(!ended.doubts(&other, "ann", start));
        assert!(!ended.doubts(&gone, "ann", start + REMEMBER + Duration::from_millis(1)));
    }

    #[test]
    fn all_sessions_of_a_user_but_one_are_doubted() {
        let (ended, start, stays, other) = (Ended::new(REMEMBER), Instant::now(), key(), key());
        ended.note_all_of("ann", Some(&stays), start);
        assert!(!ended.doubts(&stays, "ann", start));
        assert!(ended.doubts(&other, "ann", start));
        assert!(!ended.doubts(&other, "bob", start));
        ended.note_all(start);
        assert!(ended.doubts(&stays, "ann", start) && ended.doubts(&other, "bob", start));
    }

    #[test]
    fn a_flood_makes_it_doubt_more_and_never_less() {
        let (ended, start, first) = (Ended::new(REMEMBER), Instant::now(), key());
        ended.note(&first, start);
        for _ in 0..REMEMBERED_MAX + 10 {
            ended.note(&key(), start);
        }
        assert!(ended.lately.lock().sessions.len() <= REMEMBERED_MAX);
        assert!(ended.doubts(&first, "ann", start), "not forgotten");
    }

    #[test]
    fn where_nobody_is_served_without_the_store_nothing_is_remembered() {
        let (ended, start, gone) = (Ended::new(Duration::ZERO), Instant::now(), key());
        ended.note(&gone, start);
        assert!(ended.lately.lock().sessions.is_empty());
    }
}
