//! Which sessions have ended, for all that is known here? A memory that forgets, and that doubts all when it is full.

use std::collections::HashSet;
use std::mem;
use std::time::Duration;

use super::Moment;
use crate::session::id::SessionKey;

/// Keys noted in the last `time` to twice `time`, in two generations.
#[derive(Debug)]
pub(super) struct Doubts {
    young: HashSet<SessionKey>,
    old: HashSet<SessionKey>,
    /// When the young generation began.
    began: Moment,
    keys_max: usize,
    time: Duration,
    all_until: Moment,
}

impl Doubts {
    /// At most `keys_max` in each generation.
    pub(super) fn new(keys_max: usize, time: Duration) -> Self {
        let (young, old, began, all_until) = Default::default();
        Self { young, old, began, keys_max, time, all_until }
    }

    pub(super) fn note(&mut self, key: &SessionKey, now: Moment) {
        self.age(now);
        if self.keys_max <= self.young.len() && !self.young.contains(key) {
            self.note_all(now);
        } else {
            self.young.insert(key.clone());
        }
    }

    pub(super) fn note_all(&mut self, now: Moment) {
        self.all_until = now + self.time;
        self.young.clear();
        self.old.clear();
    }

    /// It was seen alive.
    pub(super) fn clear(&mut self, key: &SessionKey) {
        self.young.remove(key);
        self.old.remove(key);
    }

    pub(super) fn has(&mut self, key: &SessionKey, now: Moment) -> bool {
        self.age(now);
        now < self.all_until || self.young.contains(key) || self.old.contains(key)
    }

    fn age(&mut self, now: Moment) {
        let age = now.since(self.began);
        if age < self.time {
            return;
        }
        self.old = mem::take(&mut self.young);
        if self.time * 2 <= age {
            self.old.clear();
        }
        self.began = now;
    }
}
