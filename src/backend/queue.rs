//! Who waits for a backend? Requests that found all of them full, for a limited time, in about the order they came.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::balance::Tried;
use super::{Lease, Pool, Unavailable};

/// Who waits looks this often without being told to, also whether the client still does.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The place where requests wait. It holds nothing of them but their number.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: AtomicUsize,
    changed: Notify,
}

/// Somebody who waits; given back when they no longer do.
struct Place<'q>(&'q Queue);

impl Queue {
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// A request has ended: the next one may look whether that was what it waits for.
    pub(super) fn one_left(&self) {
        if self.waiting.load(Ordering::SeqCst) != 0 {
            self.changed.notify_one();
        }
    }

    /// There may be room for any number.
    pub(super) fn look_again(&self) {
        self.changed.notify_waiters();
    }

    /// With how many wait already.
    fn enter(&self, most: usize) -> Option<(Place<'_>, usize)> {
        let one_more = |waiting: usize| (waiting < most).then_some(waiting + 1);
        let before = self.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).ok()?;
        Some((Place(self), before))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Pool {
    /// A backend for a request; `key` is what `balance = "hash"` goes by. Waits in the queue while all are full, for no
    /// longer than `queue_timeout`, and for nobody who `has_left`.
    pub async fn take(
        &self,
        key: u64,
        tried: &mut Tried,
        has_left: impl FnMut() -> bool,
    ) -> Result<Lease, Unavailable> {
        if tried.is_empty() {
            self.ongoing.budget.deposit(self.retry_percent);
        }
        // Who comes while others wait does not go before them.
        if self.queue_max == 0 || self.waiting() == 0 {
            match self.pick(key, tried) {
                Err(Unavailable::Full) if self.queue_max != 0 => {}
                done => return done,
            }
        }
        // Boxed, because every request would carry along what only these need.
        Box::pin(self.wait(key, tried, has_left)).await
    }

    async fn wait(
        &self,
        key: u64,
        tried: &mut Tried,
        mut has_left: impl FnMut() -> bool,
    ) -> Result<Lease, Unavailable> {
        let queue = &self.ongoing.queue;
        let entered = Instant::now();
        let (_place, before) = queue.enter(self.queue_max).ok_or(Unavailable::Full)?;
        let end = entered + self.queue_timeout;
        let mut is_first_look = before != 0;
        loop {
            let mut changed = std::pin::pin!(queue.changed.notified());
            changed.as_mut().enable();
            if has_left() {
                // It may just have been told of a place.
                queue.changed.notify_one();
                return Err(Unavailable::Left(entered.elapsed()));
            }
            // Room that came free before is for those who wait already, and they know of it.
            if !std::mem::take(&mut is_first_look) {
                match self.pick(key, tried) {
                    Err(Unavailable::Full) => {}
                    Err(unavailable) => return Err(unavailable),
                    Ok(mut lease) => {
                        lease.waited = entered.elapsed();
                        // Where there was room for one there may be room for the next.
                        queue.changed.notify_one();
                        return Ok(lease);
                    }
                }
            }
            // Who is told of a place may be somebody who cannot use it: a request that failed there, or one of before a reload.
            // So nobody relies on being told alone.
            let look = end.min(Instant::now() + LOOK_AGAIN);
            if tokio::time::timeout_at(look, changed).await.is_err() && end <= look {
                return Err(Unavailable::TimedOut(entered.elapsed()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    fn pool(keys: &str) -> Pool {
        let text = format!("backends = [{{ address = \"127.0.0.1:1\", max_requests = 1 }}]\n{keys}");
        Pool::new("app", &toml::from_str(&text).unwrap(), None)
    }

    async fn take(pool: &Pool) -> Result<Lease, Unavailable> {
        pool.take(0, &mut Tried::default(), || false).await
    }

    /// No multiple of [`LOOK_AGAIN`]: who is served just then was told of the place, and has not found it.
    const WHILE: Duration = Duration::from_millis(1_030);

    #[tokio::test(start_paused = true)]
    async fn who_waits_gets_the_place_that_comes_free() {
        let pool = pool("queue = 2\nqueue_timeout = \"1h\"");
        let first = take(&pool).await.unwrap();
        assert!(first.waited.is_zero());
        let (second, third) = tokio::join!(take(&pool), async {
            assert_eq!(pool.waiting(), 1);
            let (third, ()) = tokio::join!(take(&pool), async {
                assert_eq!(pool.waiting(), 2);
                assert_eq!(take(&pool).await.err(), Some(Unavailable::Full), "the queue has an end");
                tokio::time::sleep(WHILE).await;
                drop(first);
                tokio::time::sleep(WHILE).await;
                assert_eq!(pool.waiting(), 1, "one place, one of them");
                // What the second one does when its request is over: nobody has its lease yet.
                pool.backends()[0].set_max_requests(2);
            });
            third
        });
        assert_eq!(second.unwrap().waited, WHILE, "first come, first served");
        assert_eq!(third.unwrap().waited, 2 * WHILE);
        assert_eq!(pool.waiting(), 0);
    }

    /// Who is told first has failed at that backend, and waits for the other one.
    #[tokio::test(start_paused = true)]
    async fn a_place_that_is_nothing_for_one_goes_to_another() {
        let text = "backends = [{ address = \"127.0.0.1:1\", max_requests = 1 }, { address = \"127.0.0.1:2\", max_requests = 1 }]";
        let pool =
            Pool::new("app", &toml::from_str(&format!("{text}\nqueue = 2\nqueue_timeout = \"1h\"")).unwrap(), None);
        let mut tried = Tried::default();
        let failed = pool.take(0, &mut tried, || false).await.unwrap();
        let other = take(&pool).await.unwrap();
        let (retried, next) = tokio::join!(pool.take(0, &mut tried, || false), async {
            let (next, ()) = tokio::join!(take(&pool), async {
                drop(failed);
            });
            drop(other);
            next
        });
        assert!(next.unwrap().waited < WHILE, "though nothing else ends that could tell of it");
        assert!(retried.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_longer_than_allowed() {
        let pool = pool("queue = 1\nqueue_timeout = \"5s\"");
        let _busy = take(&pool).await.unwrap();
        assert_eq!(take(&pool).await.err(), Some(Unavailable::TimedOut(Duration::from_secs(5))));
        assert_eq!(pool.waiting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_gives_the_place_back_and_takes_none_at_a_backend() {
        let pool = pool("queue = 1\nqueue_timeout = \"1h\"");
        let busy = take(&pool).await.unwrap();
        let has_left = Cell::new(false);
        let mut tried = Tried::default();
        let (left, next) = tokio::join!(pool.take(0, &mut tried, || has_left.get()), async {
            tokio::time::sleep(WHILE).await;
            has_left.set(true);
            tokio::time::sleep(2 * LOOK_AGAIN).await;
            assert_eq!(pool.waiting(), 0);
            let (next, ()) = tokio::join!(take(&pool), async { drop(busy) });
            next
        });
        assert!(matches!(left, Err(Unavailable::Left(_))), "{left:?}");
        assert!(next.is_ok());
    }

    #[tokio::test]
    async fn without_a_queue_nobody_waits() {
        let pool = pool("");
        let _busy = take(&pool).await.unwrap();
        assert_eq!(take(&pool).await.err(), Some(Unavailable::Full));
    }

    /// Places come free and are taken on several threads at once: no wake-up gets lost.
    #[test]
    fn everybody_is_served_in_the_end() {
        let pool = pool("queue = 1000\nqueue_timeout = \"1h\"");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                    runtime.block_on(async {
                        let requests = (0..8).map(|_| async {
                            for _ in 0..100 {
                                let lease = take(&pool).await.unwrap();
                                tokio::task::yield_now().await;
                                drop(lease);
                            }
                        });
                        let mut all = Vec::from_iter(requests.map(Box::pin));
                        std::future::poll_fn(|context| {
                            all.retain_mut(|request| request.as_mut().poll(context).is_pending());
                            if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
                        })
                        .await;
                    });
                });
            }
        });
        assert_eq!((pool.waiting(), pool.backends()[0].in_flight()), (0, 0));
    }
}
