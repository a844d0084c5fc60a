//! Who waits for whose read? Requests of one worker that miss the same session at the same time share one.
//!
//! The read goes on in a task of its own: that its first asker hangs up is nothing to the others. A request joins only
//! a read that could be its own: nothing was taken back since it was sent ([`Ticket`]), and it is young. So a request
//! that comes after a logout was answered here never gets what was read before.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Moment, Stamp, Ticket};
use crate::session::id::SessionKey;

/// Reads under way, by key. What they find is shared by cloning: an error, too, so it is a class and not a cause.
pub struct SingleFlight<V> {
    flights: Arc<Flights<V>>,
    join_within: Duration,
}

type Flights<V> = Mutex<HashMap<SessionKey, Flight<V>>>;

struct Flight<V> {
    stamp: Stamp,
    sent: Moment,
    found: watch::Receiver<Option<V>>,
}

/// Takes a flight from the list, however it ends.
struct Landing<V> {
    flights: Arc<Flights<V>>,
    key: SessionKey,
    found: watch::Sender<Option<V>>,
}

impl<V: Clone + Send + Sync + 'static> SingleFlight<V> {
    /// `join_within`: a read that was sent longer ago than that is not waited for; at most the lease.
    pub fn new(join_within: Duration) -> Self {
        Self { flights: Arc::default(), join_within }
    }

    /// What `load` finds, or what another's `load` of the same key is about to find. `ticket` is from just before.
    /// Nothing when the read was abandoned: it panicked, or its runtime ended.
    ///
    /// # Panics
    /// Outside a tokio runtime, in which the read goes on.
    pub async fn read<F>(&self, ticket: Ticket, load: impl FnOnce(Ticket) -> F) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut found = self.join(&ticket).unwrap_or_else(|| self.start(ticket, load));
        found.wait_for(Option::is_some).await.ok()?.clone()
    }

    fn join(&self, ticket: &Ticket) -> Option<watch::Receiver<Option<V>>> {
        let flights = self.flights.lock();
        let flight = flights.get(&ticket.key)?;
        let same = flight.stamp == ticket.stamp && ticket.sent.since(flight.sent) < self.join_within;
        same.then(|| flight.found.clone())
    }

    fn start<F>(&self, ticket: Ticket, load: impl FnOnce(Ticket) -> F) -> watch::Receiver<Option<V>>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let (sender, found) = watch::channel(None);
        let flight = Flight { stamp: ticket.stamp, sent: ticket.sent, found: found.clone() };
        let landing = Landing { flights: Arc::clone(&self.flights), key: ticket.key.clone(), found: sender };
        self.flights.lock().insert(ticket.key.clone(), flight);
        let load = load(ticket);
        tokio::spawn(async move {
            let value = load.await;
            landing.found.send_replace(Some(value));
        });
        found
    }
}

impl<V> Drop for Landing<V> {
    fn drop(&mut self) {
        let mut flights = self.flights.lock();
        // A later read of the same key may have taken its place.
        if flights.get(&self.key).is_some_and(|flight| self.found.subscribe().same_channel(&flight.found)) {
            flights.remove(&self.key);
        }
    }
}

impl<V> fmt::Debug for SingleFlight<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SingleFlight").field("join_within", &self.join_within).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use tokio::sync::Semaphore;

    use super::super::tests::{key, stored};
    use super::super::{LeaseCache, Limits};
    use super::*;

    /// What the tests share: a store that answers when it is let.
    struct Bench {
        cache: LeaseCache,
        flights: SingleFlight<Result<usize, &'static str>>,
        loads: Arc<AtomicUsize>,
        answers: Arc<Semaphore>,
    }

    impl Bench {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                cache: LeaseCache::new(Limits::default()),
                flights: SingleFlight::new(Duration::from_secs(60)),
                loads: Arc::default(),
                answers: Arc::new(Semaphore::new(0)),
            })
        }

        /// The how-manieth load answered.
        async fn ask(self: Arc<Self>, key: SessionKey) -> Option<Result<usize, &'static str>> {
            let ticket = self.cache.begin_read(&key);
            let number = Arc::clone(&self.loads);
            let answers = Arc::clone(&self.answers);
            let load = |_| async move {
                let number = number.fetch_add(1, Relaxed);
                answers.acquire().await.map_err(|_| "closed")?.forget();
                Ok(number)
            };
            self.flights.read(ticket, load).await
        }

        fn spawn(self: &Arc<Self>, key: &SessionKey) -> tokio::task::JoinHandle<Option<Result<usize, &'static str>>> {
            tokio::spawn(Arc::clone(self).ask(key.clone()))
        }

        fn pending(&self) -> usize {
            self.flights.flights.lock().len()
        }
    }

    /// Until everything waits for an answer: there is one thread, and it takes turns.
    async fn all_wait() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_hundred_misses_of_one_session_are_one_read() {
        let (bench, key) = (Bench::new(), key());
        let askers: Vec<_> = (0..100).map(|_| bench.spawn(&key)).collect();
        let stranger = bench.spawn(&super::super::tests::key());
        all_wait().await;
        assert_eq!(bench.loads.load(Relaxed), 2, "one for each session");
        bench.answers.add_permits(2);
        for asker in askers {
            assert_eq!(asker.await.unwrap(), Some(Ok(0)));
        }
        assert_eq!(stranger.await.unwrap(), Some(Ok(1)));
        all_wait().await;
        assert_eq!(bench.pending(), 0);
        bench.answers.add_permits(1);
        assert_eq!(bench.spawn(&key).await.unwrap(), Some(Ok(2)), "later ones read again");
    }

    #[tokio::test]
    async fn a_first_asker_that_hangs_up_fails_nobody() {
        let (bench, key) = (Bench::new(), key());
        let first = bench.spawn(&key);
        all_wait().await;
        let second = bench.spawn(&key);
        all_wait().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        bench.answers.add_permits(1);
        assert_eq!(second.await.unwrap(), Some(Ok(0)), "the same read went on");
    }

    #[tokio::test]
    async fn an_error_is_shared_and_not_kept() {
        let (bench, key) = (Bench::new(), key());
        let askers = [bench.spawn(&key), bench.spawn(&key)];
        all_wait().await;
        bench.answers.close();
        for asker in askers {
            assert_eq!(asker.await.unwrap(), Some(Err("closed")));
        }
        all_wait().await;
        assert_eq!(bench.pending(), 0);
    }

    #[tokio::test]
    async fn nobody_joins_a_read_from_before_something_changed() {
        let (bench, key) = (Bench::new(), key());
        let before = bench.spawn(&key);
        all_wait().await;
        bench.cache.forget_own(&key);
        let after = bench.spawn(&key);
        all_wait().await;
        assert_eq!(bench.loads.load(Relaxed), 2, "a logout was answered between them");
        bench.answers.add_permits(1);
        assert_eq!(before.await.unwrap(), Some(Ok(0)));
        let joined = bench.spawn(&key);
        all_wait().await;
        assert_eq!(bench.loads.load(Relaxed), 2, "the end of the first leaves the second to be joined");
        bench.answers.add_permits(1);
        assert_eq!((after.await.unwrap(), joined.await.unwrap()), (Some(Ok(1)), Some(Ok(1))));
    }

    #[tokio::test]
    async fn nobody_waits_for_a_read_that_is_older_than_a_lease() {
        let bench =
            Arc::new(Bench { flights: SingleFlight::new(Duration::ZERO), ..Arc::into_inner(Bench::new()).unwrap() });
        let key = key();
        let askers = [bench.spawn(&key), bench.spawn(&key)];
        all_wait().await;
        assert_eq!(bench.loads.load(Relaxed), 2);
        bench.answers.add_permits(2);
        for asker in askers {
            assert!(asker.await.unwrap().is_some());
        }
        all_wait().await;
        assert_eq!(bench.pending(), 0);
    }

    #[tokio::test]
    async fn a_read_that_panics_is_told_and_forgotten() {
        let (cache, flights) = (LeaseCache::new(Limits::default()), SingleFlight::<u8>::new(Duration::from_secs(1)));
        let key = key();
        let found = flights.read(cache.begin_read(&key), |_| async { panic!("on purpose") }).await;
        assert_eq!(found, None);
        assert!(flights.flights.lock().is_empty());
    }

    #[tokio::test]
    async fn what_is_read_may_be_kept() {
        let cache = Arc::new(LeaseCache::new(Limits::default()));
        let (key, flights) = (key(), SingleFlight::new(Duration::from_secs(1)));
        let copies = Arc::clone(&cache);
        let load = |ticket: Ticket| async move { copies.finish_read(&ticket, Some(&stored())) };
        assert_eq!(flights.read(cache.begin_read(&key), load).await, Some(()));
        assert_eq!(cache.sessions(), 1);
    }
}
