//! May it be tried once more? A budget, so that a pool in trouble is not asked twice for everything.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// Attempts beyond the first, in hundredths. Requests pay in what the pool's `retry_budget` says, and time pays in
/// [`PER_MILLISECOND`], so that a pool with few requests can always afford one.
#[derive(Debug)]
pub(super) struct RetryBudget {
    saved: AtomicU64,
    /// When time paid in last, in milliseconds.
    paid: Mutex<u64>,
}

/// One attempt.
const PRICE: u64 = 100;
/// Enough for what is in flight at a backend that dies; with all dead, the storm is over after this many.
const SAVED_MAX: u64 = 500 * PRICE;
/// Ten attempts a second.
const PER_MILLISECOND: u64 = 1;

impl Default for RetryBudget {
    fn default() -> Self {
        Self { saved: AtomicU64::new(SAVED_MAX), paid: Mutex::new(0) }
    }
}

impl RetryBudget {
    /// A request has come.
    pub(super) fn deposit(&self, percent: u8) {
        // Most of the time the purse is full, and nobody writes.
        if self.saved.load(Ordering::Relaxed) < SAVED_MAX {
            self.saved.fetch_add(percent.into(), Ordering::Relaxed);
        }
    }

    /// `now` in milliseconds of a clock that never goes back.
    pub(super) fn withdraw(&self, percent: u8, now: u64) -> bool {
        if percent == 0 {
            return false;
        }
        let mut paid = self.paid.lock();
        let since = now.saturating_sub(*paid);
        *paid += since;
        drop(paid);
        let add = |saved: u64| Some(since.saturating_mul(PER_MILLISECOND).saturating_add(saved).min(SAVED_MAX));
        let _ = self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        let take = |saved: u64| saved.checked_sub(PRICE);
        self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn withdrawn(budget: &RetryBudget, now: u64) -> usize {
        std::iter::from_fn(|| budget.withdraw(20, now).then_some(())).count()
    }

    #[test]
    fn attempts_end_when_the_budget_does() {
        let budget = RetryBudget::default();
        assert_eq!(withdrawn(&budget, 0), 500, "what is in flight at a backend that dies");
        assert_eq!(withdrawn(&budget, 0), 0);
        for _ in 0..100 {
            budget.deposit(20);
        }
        assert_eq!(withdrawn(&budget, 0), 20, "a fifth of the requests");
    }

    #[test]
    fn time_pays_in_too() {
        let budget = RetryBudget::default();
        withdrawn(&budget, 0);
        assert_eq!(withdrawn(&budget, 1_000), 10, "ten a second");
        assert_eq!(withdrawn(&budget, 500), 0, "the clock of another thread may lag behind");
        assert_eq!(withdrawn(&budget, 1_000_000_000), 500, "and no more than fits");
    }

    #[test]
    fn no_budget_is_no_second_attempt() {
        assert!(!RetryBudget::default().withdraw(0, 1_000));
    }
}
