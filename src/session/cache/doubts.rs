//! Which sessions have ended, for all that is known here? A memory that forgets, and that doubts all when it is full.

use std::collections::HashMap;
use std::mem;
use std::time::Duration;

use super::Moment;
use crate::session::id::SessionKey;

/// Keys noted in the last `time` to twice `time`, in two generations.
#[derive(Debug)]
pub(super) struct Doubts {
    /// With the time of the last note.
    young: HashMap<SessionKey, Moment>,
    old: HashMap<SessionKey, Moment>,
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
        if self.keys_max <= self.young.len() && !self.young.contains_key(key) {
            self.note_all(now);
        } else {
            self.young.insert(key.clone(), now);
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

    /// It was seen alive by who began to look at this time: what was noted since may be the later truth.
    pub(super) fn clear_before(&mut self, key: &SessionKey, looked: Moment) {
        if self.young.get(key).or(self.old.get(key)).is_some_and(|noted| *noted < looked) {
            self.clear(key);
        }
    }

    pub(super) fn has(&mut self, key: &SessionKey, now: Moment) -> bool {
        self.age(now);
        now < self.all_until || self.young.contains_key(key) || self.old.contains_key(key)
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
