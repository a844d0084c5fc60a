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
