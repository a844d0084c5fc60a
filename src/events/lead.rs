//! May this instance act? One at a time may, for as long as its lease lasts, and it stops well before the end.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::TryRng;
use rand::rngs::SysRng;

use crate::session::store::SessionStore;

/// What this instance knows of its lease.
#[derive(Debug)]
pub(super) struct Lead {
    instance: String,
    /// Counted from before the question, so that no delay makes it too long.
    until: Mutex<Option<Instant>>,
}

impl Lead {
    pub(super) fn new() -> Self {
        let mut random = [0; 16];
        // Without a generator there is no login either; two instances of one name would both act.
        let named = SysRng.try_fill_bytes(&mut random).is_ok();
        let instance = if named { random.iter().map(|byte| format!("{byte:02x}")).collect() } else { String::new() };
        Self { instance, until: Mutex::new(None) }
    }

    /// Whether it may begin something that takes less than two fifths of the lease.
    pub(super) fn holds(&self) -> bool {
        self.until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Asks for the lease, and for more of it, again and again.
    pub(super) async fn keep(&self, store: &dyn SessionStore, lease: Duration) {
        while !self.instance.is_empty() {
            let asked = Instant::now();
            let led = self.holds();
            // Without an answer, what we had runs out by itself.
            if let Ok(is_ours) = store.lead(&self.instance, lease).await {
                *self.until.lock() = is_ours.then(|| asked + lease * 3 / 5);
                if is_ours && !led {
                    tracing::info!("this instance sweeps the store now, and tells of ended sessions");
                }
            }
            tokio::time::sleep(lease / 5).await;
        }
    }
}
