//! Is it well? Backends of a pool with `[pool.NAME.check]` are asked, in the background and once per process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::config::model::Check;
use crate::metrics::Metrics;
use crate::panics::survived;

use super::{Backend, Pool};

/// How one backend is asked.
#[async_trait]
pub trait Probe: Send + Sync {
    /// Whether the answer of the backend, of this pool and at this address, is what `check` asks for.
    ///
    /// It may take as long as it likes: who asks gives up after `check.timeout`.
    async fn ask(&self, pool: &Pool, backend: &Backend, address: SocketAddr, check: &Check) -> Result<(), CheckError>;
}

/// Why a check did not pass, in few words.
#[derive(Debug)]
pub enum CheckError {
    Failed(String),
    /// Nobody was asked, for a reason of our own: nothing is known.
    Unasked(String),
}

impl From<String> for CheckError {
    fn from(cause: String) -> Self {
        Self::Failed(cause)
    }
}

/// Checks under way at a time. Those of dead backends take the longest.
const CHECKS_MAX: usize = 256;

/// A reload may have brought others.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What checks have found out about one backend. It is up until they say otherwise.
#[derive(Debug, Default)]
pub(super) struct Checked {
    is_down: AtomicBool,
    course: Mutex<Course>,
}

#[derive(Debug, Default)]
struct Course {
    due: Option<Instant>,
    is_under_way: bool,
    /// That said the same, of late.
    in_a_row: u32,
    passed: bool,
    is_known: bool,
    /// How often it was forgotten: what was asked before says nothing any more.
    forgotten: u64,
}

/// One check under way.
#[derive(Clone, Copy)]
struct Asked(u64);

impl Checked {
    /// As one check that failed.
    #[cfg(test)]
    pub(super) fn fail(&self) {
        self.is_down.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.course.lock().is_under_way
    }

    /// Nobody asks any more.
    pub(super) fn forget(&self) {
        let mut course = self.course.lock();
        *course = Course { forgotten: course.forgotten + 1, ..Course::default() };
        self.is_down.store(false, Ordering::Relaxed);
    }

    /// Whether it is to be asked now; what comes has to be given to [`Checked::note`].
    fn begin(&self, now: Instant) -> Option<Asked> {
        let mut course = self.course.lock();
        let is_due = course.due.is_none_or(|due| due <= now) && !course.is_under_way;
        course.is_under_way |= is_due;
        is_due.then_some(Asked(course.forgotten))
    }

    /// What was to be asked was not: again at `due`.
    fn put_off(&self, asked: Asked, due: Instant) {
        let mut course = self.course.lock();
        if asked.0 == course.forgotten {
            course.is_under_way = false;
            course.due = Some(due);
        }
    }

    /// What was `asked` has `passed`, or not; the next one comes at `due`. Whether that turned it up or down.
    fn note(&self, asked: Asked, passed: bool, due: Instant, check: &Check) -> bool {
        let mut course = self.course.lock();
        if asked.0 != course.forgotten {
            return false;
        }
        let is_first = !std::mem::replace(&mut course.is_known, true);
        course.in_a_row = if course.passed == passed && !is_first { course.in_a_row.saturating_add(1) } else { 1 };
        course.passed = passed;
        course.is_under_way = false;
        course.due = Some(due);
        let needed = if passed { check.rise } else { check.fall };
        // Nobody has seen it well yet: the first answer counts.
        let is_enough = is_first || needed <= course.in_a_row;
        is_enough && self.is_down.swap(!passed, Ordering::Relaxed) == passed
    }

    /// Nothing comes of what was `asked`, by a mistake of ours, which says nothing of the backend.
    fn give_up(&self, asked: Asked, due: Instant) {
        let mut course = self.course.lock();
        if asked.0 == course.forgotten {
            course.is_under_way = false;
            course.due = Some(due);
        }
    }
}

/// Asks all backends of all pools that have a check, each when it is due; never ends. `pools` gives those of today.
pub async fn watch(pools: impl Fn() -> Vec<Arc<Pool>>, probe: Arc<dyn Probe>, metrics: Metrics) {
    let places = Arc::new(Semaphore::new(CHECKS_MAX));
    loop {
        for pool in pools() {
            let Some(check) = pool.check() else { continue };
            for backend in pool.backends().iter() {
                let Some(asked) = backend.checked.begin(Instant::now()) else { continue };
                let (pool, backend, check) = (Arc::clone(&pool), Arc::clone(backend), check.clone());
                let (probe, metrics, places) = (Arc::clone(&probe), metrics.clone(), Arc::clone(&places));
                tokio::spawn(async move {
                    let Ok(_place) = places.acquire().await else { return };
                    let course = async {
                        let result = backend.ask(&*probe, &pool, &check).await;
                        backend.note_check(&pool, &check, asked, result, &metrics);
                    };
                    if survived(course).await.is_none() {
                        backend.checked.give_up(asked, next_check(&check));
                    }
                });
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

impl Backend {
    async fn ask(&self, probe: &dyn Probe, pool: &Pool, check: &Check) -> Result<(), CheckError> {
        let mut address = self.address().ok_or_else(|| "its name has no address".to_owned())?;
        if let Some(port) = check.port {
            address.set_port(port);
        }
        let timeout = check.timeout;
        let answer = tokio::time::timeout(timeout.get(), probe.ask(pool, self, address, check)).await;
        answer.unwrap_or_else(|_| Err(format!("no answer within {timeout}").into()))
    }

    fn note_check(&self, pool: &Pool, check: &Check, asked: Asked, result: Result<(), CheckError>, metrics: &Metrics) {
        let (pool, backend) = (pool.name(), self.name());
        let result = match result {
            Ok(()) => Ok(()),
            Err(CheckError::Failed(cause)) => Err(cause),
            Err(CheckError::Unasked(cause)) => {
                tracing::warn!(pool, backend, cause, "a check could not be made, and says nothing of the backend");
                return self.checked.put_off(asked, next_check(check));
            }
        };
        let label = if result.is_ok() { "passed" } else { "failed" };
        metrics.backend_checks.with_label_values(&[pool, backend, label]).inc();
        let has_turned = self.checked.note(asked, result.is_ok(), next_check(check), check);
        match result {
            Ok(()) if has_turned => {
                tracing::info!(pool, backend, "backend is up: its checks pass");
                if !self.end_ejection() {
                    self.begin_slowly();
                }
            }
            Ok(()) => {}
            Err(cause) => {
                if has_turned {
                    tracing::warn!(pool, backend, cause, "backend is down: its checks fail");
                } else {
                    tracing::debug!(pool, backend, cause, "a check failed");
                }
                self.note_last_failure(format!("check: {cause}"));
            }
        }
    }
}

/// An interval from now, a little earlier or later, so that neither the backends of one instance nor the instances of one
/// backend keep step.
fn next_check(check: &Check) -> Instant {
    let jitter = f64::from(check.jitter) / 100.0;
    Instant::now() + check.interval.get().mul_f64(1.0 + jitter * (2.0 * rand::random::<f64>() - 1.0))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// What turns, for answers one after the other: `u`p, `d`own or nothing.
    fn turns(answers: &str, rise: u32, fall: u32) -> String {
        let (checked, check) = (Checked::default(), Check { rise, fall, ..Check::default() });
        let turn = |answer: char| {
            let asked = checked.begin(Instant::now()).expect("it is due");
            assert!(checked.begin(Instant::now()).is_none(), "one at a time");
            let has_turned = checked.note(asked, answer == '+', Instant::now(), &check);
            if !has_turned {
                '.'
            } else if checked.is_down() {
                'd'
            } else {
                'u'
            }
        };
        answers.chars().map(turn).collect()
    }

    #[test]
    fn it_takes_several_answers_of_one_kind_to_turn_and_one_at_the_start() {
        for (answers, rise, fall, expected) in [
            ("+++", 2, 3, "..."),
            ("-", 2, 3, "d"),
            ("-++--+---", 2, 3, "d.u.....d"),
            ("+-+--+---", 2, 3, "........d"),
            ("+-+-", 1, 1, ".dud"),
            ("--+-+-+++", 3, 1, "d.......u"),
        ] {
            assert_eq!(turns(answers, rise, fall), expected, "{answers}");
        }
    }

    /// Has a mistake in it that shows the first time.
    #[derive(Default)]
    struct Mistaken {
        times: AtomicU32,
    }

    #[async_trait]
    impl Probe for Mistaken {
        async fn ask(&self, _: &Pool, _: &Backend, _: SocketAddr, _: &Check) -> Result<(), CheckError> {
            if self.times.fetch_add(1, Ordering::SeqCst) == 0 {
                std::panic::panic_any("on purpose")
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_check_that_panics_says_nothing_and_the_next_one_comes() {
        let config = toml::from_str("backends = [\"127.0.0.1:1\"]\n[check]\ninterval = \"100ms\"").unwrap();
        let pool = Arc::new(Pool::new("app", &config, None));
        let probe = Arc::new(Mistaken::default());
        let watched = watch(|| vec![Arc::clone(&pool)], Arc::clone(&probe) as Arc<dyn Probe>, Metrics::new());
        let comes = async {
            while probe.times.load(Ordering::SeqCst) < 3 {
                assert!(pool.backends().iter().all(|backend| !backend.checked.is_down()));
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = watched => unreachable!("it never ends"),
            come = tokio::time::timeout(Duration::from_secs(60), comes) => come.expect("it is asked again"),
        }
    }

    #[test]
    fn an_answer_that_comes_when_nobody_asks_any_more_says_nothing() {
        let (checked, check) = (Checked::default(), Check::default());
        let asked = checked.begin(Instant::now()).expect("it is due");
        checked.forget();
        assert!(!checked.note(asked, false, Instant::now(), &check) && !checked.is_down());
    }

    #[test]
    fn checks_come_about_as_often_as_asked_for_and_never_in_step() {
        let check = Check::default();
        let now = Instant::now();
        let waits: Vec<_> = (0..100).map(|_| (next_check(&check) - now).as_secs_f64()).collect();
        assert!(waits.iter().all(|wait| 4.5 <= *wait), "not more than a tenth earlier than 5 s: {waits:?}");
        assert!(waits.iter().any(|wait| (wait - waits[0]).abs() > 0.01), "{waits:?}");
    }
}
