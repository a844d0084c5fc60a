//! What if there are as many connections as there may be? Further ones wait in the kernel; or who has kept us waiting
//! longest gives way.
//!
//! Only who waits for its client can: a read or a write that would have to wait fails, as if the client had left. So nothing
//! that we are about is given up half-done, and a word that has come is heard.

use std::io;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Until another one is asked to give way, where the one before has been heard after all.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// How many connections may be open at a time, on all listeners that share this.
#[derive(Debug)]
pub struct Slots {
    free: Arc<Semaphore>,
    /// Those in use, where their connections give way.
    used: Option<Mutex<Vec<Weak<Turn>>>>,
}

/// For one connection.
#[derive(Debug)]
pub(super) struct Slot {
    permit: OwnedSemaphorePermit,
    pub(super) turn: Option<Arc<Turn>>,
}

/// Whose turn it is in a conversation that may be broken off.
#[derive(Debug)]
pub(super) struct Turn(Mutex<Whose>);

#[derive(Debug)]
enum Whose {
    Ours,
    /// The client's: to say something, or to take what we say.
    Theirs {
        since: Instant,
        waiting: Waker,
    },
    /// Somebody else needs the slot.
    Over,
}

impl Slots {
    pub fn new(most: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(most)), used: None }
    }

    /// Nobody has to wait for a slot because others are idle.
    #[must_use]
    pub fn giving_way(self) -> Self {
        Self { used: Some(Mutex::default()), ..self }
    }

    /// Waits for one.
    pub(super) async fn take(&self) -> Slot {
        loop {
            if let Some(slot) = self.try_take() {
                return slot;
            }
            let free = Arc::clone(&self.free).acquire_owned();
            let permit = match &self.used {
                None => free.await,
                Some(used) => {
                    end_longest_wait(&used.lock());
                    let Ok(permit) = timeout(ASK_AGAIN, free).await else { continue };
                    permit
                }
            };
            return self.slot(permit.expect("never closed"));
        }
    }

    pub(super) fn try_take(&self) -> Option<Slot> {
        Arc::clone(&self.free).try_acquire_owned().ok().map(|permit| self.slot(permit))
    }

    fn slot(&self, permit: OwnedSemaphorePermit) -> Slot {
        let turn = self.used.as_ref().map(|used| {
            let turn = Arc::new(Turn::theirs());
            let mut used = used.lock();
            used.retain(|turn| 0 < turn.strong_count());
            used.push(Arc::downgrade(&turn));
            turn
        });
        Slot { permit, turn }
    }
}

impl Slot {
    /// Where more of them come from.
    pub(super) fn free(&self) -> Arc<Semaphore> {
        Arc::clone(self.permit.semaphore())
    }
}

fn end_longest_wait(turns: &[Weak<Turn>]) {
    let turns = turns.iter().filter_map(Weak::upgrade);
    let waiting = turns.filter_map(|turn| Some((turn.waiting_since()?, turn)));
    if let Some((_, turn)) = waiting.min_by_key(|(since, _)| *since) {
        tracing::debug!("a connection gives way: all slots of its listener are in use");
        turn.end();
    }
}

impl Turn {
    fn theirs() -> Self {
        Self(Mutex::new(Whose::Theirs { since: Instant::now(), waiting: Waker::noop().clone() }))
    }

    fn waiting_since(&self) -> Option<Instant> {
        match &*self.0.lock() {
            Whose::Theirs { since, .. } => Some(*since),
            Whose::Ours | Whose::Over => None,
        }
    }

    fn end(&self) {
        let mut whose = self.0.lock();
        if let Whose::Theirs { waiting, .. } = std::mem::replace(&mut *whose, Whose::Over) {
            waiting.wake();
        }
    }

    /// What a read or a write gave, or an error in place of the wait of a connection that gives way.
    pub(super) fn noted<T>(&self, task: &Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let mut whose = self.0.lock();
        if result.is_ready() {
            *whose = Whose::Ours;
            return result;
        }
        let since = match &*whose {
            Whose::Over => return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
            Whose::Theirs { since, .. } => *since,
            Whose::Ours => Instant::now(),
        };
        *whose = Whose::Theirs { since, waiting: task.waker().clone() };
        result
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    fn context() -> Context<'static> {
        Context::from_waker(Waker::noop())
    }

    /// A read or a write that has to wait: whether the connection goes on.
    fn goes_on_waiting(slot: &Slot) -> bool {
        slot.turn.as_ref().unwrap().noted::<()>(&context(), Poll::Pending).is_pending()
    }

    fn is_heard(slot: &Slot) {
        assert!(matches!(slot.turn.as_ref().unwrap().noted(&context(), Poll::Ready(Ok(()))), Poll::Ready(Ok(()))));
    }

    #[tokio::test]
    async fn who_has_kept_us_waiting_longest_gives_way_and_nobody_whom_we_keep_waiting() {
        let slots = Slots::new(3).giving_way();
        let (served, first, second) = (slots.take().await, slots.take().await, slots.take().await);
        assert!([&served, &first, &second].into_iter().all(goes_on_waiting), "there is room for all");
        is_heard(&served);
        let mut next = pin!(slots.take());
        assert!(next.as_mut().poll(&mut context()).is_pending(), "the slot is taken until the connection has ended");
        assert!(!goes_on_waiting(&first));
        assert!(goes_on_waiting(&second));
        drop(first);
        let next = next.await;
        is_heard(&second);
        assert!(goes_on_waiting(&second), "its wait has begun anew");
        let mut last = pin!(slots.take());
        assert!(last.as_mut().poll(&mut context()).is_pending());
        assert!(goes_on_waiting(&second) && !goes_on_waiting(&next));
        assert!(goes_on_waiting(&served), "it waits for its client again, as the last of them");
    }

    #[tokio::test]
    async fn where_all_are_served_the_first_that_is_idle_again_gives_way() {
        let slots = Slots::new(2).giving_way();
        let (one, two) = (slots.take().await, slots.take().await);
        is_heard(&one);
        is_heard(&two);
        let mut next = pin!(slots.take());
        assert!(timeout(5 * ASK_AGAIN, next.as_mut()).await.is_err(), "nobody is idle");
        assert!(goes_on_waiting(&two));
        while goes_on_waiting(&two) {
            assert!(timeout(ASK_AGAIN, next.as_mut()).await.is_err());
        }
        is_heard(&two); // its word had been under way: it is answered
        assert!(matches!(*two.turn.as_ref().unwrap().0.lock(), Whose::Ours));
        drop(one);
        next.await;
    }

    #[tokio::test]
    async fn on_other_listeners_everybody_stays_and_the_next_waits() {
        let slots = Slots::new(1);
        let only = slots.take().await;
        assert!(only.turn.is_none());
        let mut next = pin!(slots.take());
        assert!(next.as_mut().poll(&mut context()).is_pending());
        assert!(slots.try_take().is_none());
        drop(only);
        next.await;
    }
}
