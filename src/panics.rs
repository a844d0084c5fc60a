//! What does a mistake of ours cost? One request its answer, and nobody else anything.
//!
//! Nothing that comes over a wire should make us panic. If something does all the same, the thread must not be lost, and the
//! client is owed an answer, so the places where our own rules decide are entered through [`survived`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// What `work` gives; nothing, if it panicked. The panic itself has been written to standard error by then.
///
/// Of what `work` has left half done nothing may be used but what is sound in every state.
pub async fn survived<T>(work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    std::future::poll_fn(move |task| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(task))) {
        Ok(Poll::Ready(done)) => Poll::Ready(Some(done)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(_) => Poll::Ready(None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_at_once_or_later_is_nothing_and_all_else_goes_through() {
        assert_eq!(survived(async { 7 }).await, Some(7));
        let later = async {
            tokio::task::yield_now().await;
            7
        };
        assert_eq!(survived(later).await, Some(7));
        assert_eq!(survived(async { std::panic::panic_any("on purpose") }).await, None::<()>);
        let late_panic = async {
            tokio::task::yield_now().await;
            std::panic::panic_any("on purpose")
        };
        assert_eq!(survived(late_panic).await, None::<()>);
    }
}
