//! What came of it? Requests by kind, failures by cause, and whatever must not have happened.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use crate::harness::{distribution, tell};

/// Of what went wrong, so much is shown.
const WRONGS_SHOWN: usize = 20;

#[derive(Default)]
pub(crate) struct Tally(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    answered: BTreeMap<&'static str, Vec<Duration>>,
    /// By kind and cause.
    failed: BTreeMap<(&'static str, String), u64>,
    broken: BTreeMap<&'static str, u64>,
    lost_by_redis: u64,
    logouts_lost_by_redis: u64,
    wrong: Vec<String>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn answered(&self, kind: &'static str, time: Duration) {
        self.0.lock().unwrap().answered.entry(kind).or_default().push(time);
    }

    pub(crate) fn failed(&self, kind: &'static str, cause: &str) {
        *self.0.lock().unwrap().failed.entry((kind, cause.to_owned())).or_default() += 1;
    }

    pub(crate) fn broke(&self, what: &'static str) {
        *self.0.lock().unwrap().broken.entry(what).or_default() += 1;
    }

    /// A session that Redis had not written to its disk when it was killed.
    pub(crate) fn lost_by_redis(&self) {
        self.0.lock().unwrap().lost_by_redis += 1;
    }

    /// As above, of a logout.
    pub(crate) fn logout_lost_by_redis(&self) {
        self.0.lock().unwrap().logouts_lost_by_redis += 1;
    }

    /// Must not happen, whatever was killed.
    pub(crate) fn wrong(&self, what: &str) {
        self.0.lock().unwrap().wrong.push(what.to_owned());
    }

    pub(crate) fn is_good(&self) -> bool {
        let counts = self.0.lock().unwrap();
        counts.wrong.is_empty() && !counts.answered.is_empty()
    }

    pub(crate) fn print(&self, time: Duration, seed: u64) {
        let counts = self.0.lock().unwrap();
        let broken: Vec<_> = counts.broken.iter().map(|(what, times)| format!("{what} {times}")).collect();
        tell(&format!("killed and started again: {}", broken.join(", ")));
        tell(&format!("{:<12} {:>8}   times of those that were answered", "requests", "answered"));
        for (kind, times) in &counts.answered {
            tell(&format!("{kind:<12} {:>8}   {}", times.len(), distribution(times.clone())));
        }
        tell("failed:");
        for ((kind, cause), times) in &counts.failed {
            tell(&format!("{kind:<12} {times:>8}   {cause}"));
        }
        let all: usize = counts.answered.values().map(Vec::len).sum();
        let failed: u64 = counts.failed.values().sum();
        tell(&format!(
            "in {time:.1?} with seed {seed}: {all} answered, {failed} failed; sessions lost: {} by Redis when it was killed, \
             logouts: {}; wrong: {}",
            counts.lost_by_redis,
            counts.logouts_lost_by_redis,
            counts.wrong.len()
        ));
        for wrong in counts.wrong.iter().take(WRONGS_SHOWN) {
            tell(&format!("WRONG: {wrong}"));
        }
    }
}
