//! Does it fail those who ask? A backend at which requests fail is passed over for a while, longer each time.
//!
//! When the while is over, one request tries it, and the others wait for what becomes of that one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::config::model;

use super::{Backend, Lease, Pool};

/// `[pool.NAME.eject]`; times in milliseconds.
#[derive(Debug)]
pub(super) struct EjectionRules {
    failures: u32,
    time: u64,
    time_max: u64,
    share: u8,
    statuses: Vec<u16>,
}

/// What requests have found out about one backend. Times are of the pool's clock, in milliseconds; 0 = none.
#[derive(Debug, Default)]
pub(super) struct Ejection {
    /// In a row.
    failures: AtomicU32,
    /// It is out until then, and until one request has succeeded.
    until: AtomicU64,
    /// Since when a request is finding out, and nobody else shall wait for a backend that may hang; 0 = none is.
    on_trial_since: AtomicU64,
    history: Mutex<History>,
}

#[derive(Debug, Default)]
struct History {
    /// Ejections so far, forgotten after a good time.
    times: u32,
    returned: u64,
}

/// How a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There was no connection: nothing was sent.
    Connect,
    Timeout,
    /// No response, or a broken one.
    Response,
    /// A response that `eject.statuses` names.
    Status(u16),
}

impl Failure {
    /// As the metrics have it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Response => "response",
            Self::Status(_) => "status",
        }
    }
}

impl EjectionRules {
    pub(super) fn of(config: &model::Eject) -> Self {
        let model::Eject { failures, time, time_max, share, statuses } = config;
        let millis = |time: Duration| time.as_millis() as u64;
        let (time, time_max) = (millis(time.get()), millis(time_max.get()));
        Self { failures: *failures, time, time_max, share: *share, statuses: statuses.clone() }
    }
}

/// The claim of the request that finds out whether a backend is back.
#[derive(Debug)]
pub(super) struct Trial {
    /// On the pool's clock, in milliseconds.
    since: u64,
}

impl Ejection {
    pub(super) fn is_out(&self) -> bool {
        self.until() != 0
    }

    /// Which ejection is under way: its end, as it is known by now. 0 = none.
    pub(super) fn until(&self) -> u64 {
        self.until.load(Ordering::Relaxed)
    }

    /// Whether it was out, and may be tried again.
    pub(super) fn is_over(&self, now: u64) -> bool {
        (1..=now).contains(&self.until.load(Ordering::Relaxed))
    }

    /// How long it is still passed over.
    pub(super) fn rest(&self, now: u64) -> Option<Duration> {
        let until = self.until.load(Ordering::Relaxed);
        (until != 0).then(|| Duration::from_millis(until.saturating_sub(now)))
    }

    /// Whether a request may try it: its time is over, and none is finding out, or has been for longer than `patience`
    /// (both in milliseconds). A slow upload can take days, and says nothing until then.
    pub(super) fn may_be_tried(&self, now: u64, patience: u64) -> bool {
        let since = self.on_trial_since.load(Ordering::Relaxed);
        self.is_over(now) && (since == 0 || since.saturating_add(patience) <= now)
    }

    /// Whether this request shall try it: see [`Self::may_be_tried`].
    pub(super) fn claim_trial(&self, now: u64, patience: u64) -> Option<Trial> {
        let since = self.on_trial_since.load(Ordering::Relaxed);
        let may = || self.may_be_tried(now, patience);
        let claim = || self.on_trial_since.compare_exchange(since, now, Ordering::Relaxed, Ordering::Relaxed);
        (may() && claim().is_ok()).then_some(())?;
        let trial = Trial { since: now };
        if self.is_over(now) {
            return Some(trial);
        }
        // The trial before has succeeded between the two looks.
        self.release(&trial);
        None
    }

    /// The next request may, unless it does already.
    pub(super) fn release(&self, trial: &Trial) {
        let _ = self.on_trial_since.compare_exchange(trial.since, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn is_on_trial(&self) -> bool {
        self.on_trial_since.load(Ordering::Relaxed) != 0
    }

    /// Passed over from now on. None when it is already, and this was not the trial.
    fn eject(&self, now: u64, is_trial: bool, rules: &EjectionRules) -> Option<Duration> {
        let mut history = self.history.lock();
        let until = self.until.load(Ordering::Relaxed);
        if (now < until || self.is_on_trial()) && !is_trial {
            return None;
        }
        if until == 0 && rules.time_max <= now.saturating_sub(history.returned) {
            history.times = 0;
        }
        let doubled = rules.time.checked_shl(history.times).filter(|time| time >> history.times == rules.time);
        let time = doubled.unwrap_or(rules.time_max).min(rules.time_max);
        history.times = history.times.saturating_add(1).min(32);
        self.until.store(now + time, Ordering::Relaxed);
        Some(Duration::from_millis(time))
    }

    /// Whether it was out until now.
    fn end(&self, now: u64) -> bool {
        let mut history = self.history.lock();
        self.failures.store(0, Ordering::Relaxed);
        let was_out = self.until.swap(0, Ordering::Relaxed) != 0;
        if was_out {
            history.returned = now;
        }
        was_out
    }
}

impl Pool {
    /// A request failed at this backend. Gives how long it is passed over, when this is what ejects it.
    pub fn note_failure(&self, lease: &mut Lease, failure: Failure) -> Option<Duration> {
        lease.note_last_failure(failure.to_string());
        let (ejection, rules) = (&lease.backend.ejection, &self.ejection);
        let failures = ejection.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let ejects = match failure {
            _ if lease.trial.is_some() => true,
            // There is no doubt about it, so the share does not matter, and nobody else need find out.
            Failure::Connect => true,
            Failure::Timeout | Failure::Response | Failure::Status(_) => {
                rules.failures != 0 && rules.failures <= failures && self.may_eject()
            }
        };
        let time = if ejects { ejection.eject(self.ongoing.now(), lease.trial.is_some(), rules) } else { None };
        lease.end_trial();
        time
    }

    /// A response began as it should. Gives whether that ends an ejection: of a request that had begun before it, it says
    /// nothing of how the backend is now.
    pub fn note_success(&self, lease: &mut Lease) -> bool {
        let ejection = &lease.backend.ejection;
        let is_of_now = ejection.until() == lease.ejection;
        let is_as_usual = ejection.failures.load(Ordering::Relaxed) == 0 && !ejection.is_out();
        let is_back = is_of_now && !is_as_usual && lease.backend.end_ejection();
        // It has found out. What becomes of the rest of its response is like any other request's.
        lease.end_trial();
        is_back
    }

    /// Whether a response with this status is a failure of the backend.
    pub fn is_failure(&self, status: u16) -> bool {
        self.ejection.statuses.contains(&status)
    }

    /// A trial that has not said anything after so many milliseconds is not the only one any more: a backend that answers
    /// has done so by then.
    pub(super) fn trial_patience(&self) -> u64 {
        u64::try_from((self.timeouts.connect + self.timeouts.read).as_millis()).unwrap_or(u64::MAX)
    }

    /// At most a share of the pool is out for failures, but one of several always may be.
    fn may_eject(&self) -> bool {
        let backends = self.backends.load();
        // A backup, or a drained one, is tried by nobody when its time is over: it is out no longer.
        let now = self.ongoing.now();
        let is_out = |ejection: &Ejection| ejection.is_out() && (!ejection.is_over(now) || ejection.is_on_trial());
        let out = backends.iter().filter(|backend| is_out(&backend.ejection)).count();
        let share = usize::from(self.ejection.share);
        share != 0 && ((out + 1) * 100 <= share * backends.len() || out == 0 && 1 < backends.len())
    }
}

impl Backend {
    /// Requests come again. Gives whether it was out.
    pub(super) fn end_ejection(&self) -> bool {
        let was_out = self.ejection.end(self.ongoing.now());
        if was_out {
            self.begin_slowly();
        }
        was_out
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect => f.write_str("no connection"),
            Self::Timeout => f.write_str("too late"),
            Self::Response => f.write_str("no proper response"),
            Self::Status(status) => write!(f, "status {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::backend::balance::Tried;

    const PATIENCE: u64 = 60_000;
    const RULES: EjectionRules =
        EjectionRules { failures: 5, time: 2_000, time_max: 30_000, share: 50, statuses: Vec::new() };

    #[test]
    fn each_time_is_twice_as_long_up_to_the_longest() {
        let ejection = Ejection::default();
        let mut now = 1_000_000;
        let mut times = vec![ejection.eject(now, false, &RULES).unwrap().as_secs()];
        for _ in 0..6 {
            now += 100_000;
            let trial = ejection.claim_trial(now, PATIENCE).expect("its time is over");
            assert!(ejection.claim_trial(now, PATIENCE).is_none(), "one request finds out");
            times.push(ejection.eject(now, true, &RULES).unwrap().as_secs());
            ejection.release(&trial);
        }
        assert_eq!(times, [2, 4, 8, 16, 30, 30, 30]);
    }

    #[test]
    fn one_that_comes_and_goes_is_out_for_longer_and_a_good_time_forgives() {
        let ejection = Ejection::default();
        let mut now = 1_000_000;
        for expected in [2, 4, 8, 16] {
            assert_eq!(ejection.eject(now, false, &RULES).unwrap().as_secs(), expected);
            now += 20_000;
            assert!(ejection.end(now), "a request succeeded");
            now += 1_000;
        }
        now += 30_000;
        assert_eq!(
            ejection.eject(now, false, &RULES).unwrap().as_secs(),
            2,
            "it was well for as long as it can be out"
        );
    }

    #[test]
    fn what_fails_while_it_is_out_changes_nothing() {
        let ejection = Ejection::default();
        assert!(ejection.eject(1_000, false, &RULES).is_some());
        assert!(ejection.eject(1_500, false, &RULES).is_none(), "begun before");
        assert_eq!(ejection.rest(1_500), Some(Duration::from_millis(1_500)));
    }

    #[test]
    fn a_trial_that_hangs_is_the_only_one_for_as_long_as_an_answer_may_take() {
        let ejection = Ejection::default();
        ejection.eject(1_000, false, &RULES).unwrap();
        let (over, later) = (3_000, 3_000 + PATIENCE);
        let hangs = ejection.claim_trial(over, PATIENCE).unwrap();
        assert!(ejection.claim_trial(later - 1, PATIENCE).is_none(), "it hangs, and so would the next one");
        assert!(ejection.eject(later - 1, false, &RULES).is_none(), "begun before: the trial says how it is");
        let next = ejection.claim_trial(later, PATIENCE).expect("it may be a slow upload");
        ejection.release(&hangs);
        assert!(ejection.claim_trial(later + 1, PATIENCE).is_none(), "who ends late gives back no other's claim");
        ejection.release(&next);
        assert!(ejection.claim_trial(later + 1, PATIENCE).is_some());
        ejection.end(later + 2);
        assert!(ejection.claim_trial(later + 2 * PATIENCE, PATIENCE).is_none(), "it is back");
    }

    #[test]
    fn whatever_becomes_of_a_trial_its_end_lets_the_next_one_in() {
        let pool = pool(2, "eject.failures = 1\neject.time = \"1ms\"\neject.time_max = \"1ms\"");
        let ends: [fn(&Pool, &mut Lease); 3] = [
            |pool, lease| assert!(pool.note_failure(lease, Failure::Timeout).is_some()),
            |_, lease| lease.end(),
            |pool, lease| {
                pool.note_success(lease);
                assert!(fail(pool, 0, Failure::Connect), "out again, while the response goes on");
            },
        ];
        assert!(fail(&pool, 0, Failure::Connect));
        for (number, end) in ends.iter().enumerate() {
            let mut lease = trial(&pool);
            let other = (0..8).map(|_| pool.pick(0, &mut Tried::default()).unwrap()).all(|lease| lease.trial.is_none());
            assert!(other, "{number}: one at a time");
            end(&pool, &mut lease);
            drop(trial(&pool));
        }
    }

    /// The next one, as soon as the time is over.
    fn trial(pool: &Pool) -> Lease {
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end {
            let lease = pool.pick(0, &mut Tried::default()).unwrap();
            if lease.trial.is_some() {
                return lease;
            }
            std::thread::yield_now();
        }
        panic!("nobody tries it");
    }

    #[test]
    fn what_succeeds_late_says_nothing_of_how_a_backend_is_now() {
        let pool = pool(2, "");
        let mut early = pool.backends()[0].try_lease().unwrap();
        assert!(fail(&pool, 0, Failure::Connect));
        assert!(!pool.note_success(&mut early), "it had begun before");
        assert!(matches!(pool.backends()[0].health(), crate::backend::Health::Ejected(_)));
        let mut later = pool.backends()[0].try_lease().unwrap();
        assert!(pool.note_success(&mut later));
    }

    fn fail(pool: &Pool, number: usize, failure: Failure) -> bool {
        let mut lease = pool.backends()[number].try_lease().unwrap();
        pool.note_failure(&mut lease, failure).is_some()
    }

    fn pool(backends: usize, keys: &str) -> Pool {
        let list: Vec<_> = (1..=backends).map(|port| format!("127.0.0.1:{port}")).collect();
        Pool::new("app", &toml::from_str(&format!("backends = {list:?}\n{keys}")).unwrap(), None)
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_begins_the_row_anew() {
        let pool = pool(2, "eject.failures = 3");
        let fails = |times: usize| (0..times).map(|_| fail(&pool, 0, Failure::Timeout)).collect::<Vec<_>>();
        assert_eq!(fails(2), [false, false]);
        let mut lease = pool.backends()[0].try_lease().unwrap();
        assert!(!pool.note_success(&mut lease));
        assert_eq!(fails(3), [false, false, true]);
        assert!(matches!(pool.backends()[0].health(), crate::backend::Health::Ejected(_)));
        assert_eq!(pool.backends()[0].last_failure().unwrap().what, "too late");
    }

    #[test]
    fn failures_take_out_no_more_than_a_share_and_a_closed_port_is_beyond_doubt() {
        let pool = pool(5, "eject.failures = 1\neject.share = 40");
        let out: Vec<_> = (0..5).map(|number| fail(&pool, number, Failure::Response)).collect();
        assert_eq!(out, [true, true, false, false, false]);
        assert!(fail(&pool, 2, Failure::Connect), "nothing there: no share speaks for it");
    }

    #[test]
    fn one_of_few_may_be_out_and_the_only_one_never_for_failures() {
        let two = pool(2, "eject.failures = 1\neject.share = 10");
        assert!(fail(&two, 0, Failure::Response) && !fail(&two, 1, Failure::Response));
        let one = pool(1, "eject.failures = 1");
        assert!(!fail(&one, 0, Failure::Response));
        let none = pool(2, "eject.failures = 0");
        assert!((0..100).all(|_| !fail(&none, 0, Failure::Response)), "0 turns it off");
    }
}
