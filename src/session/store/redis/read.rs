//! How is a session read? From the copy that is known to be true, or by one read for all who miss it at the same time.

use std::sync::Arc;

use redis::Value;

use super::link::{Batch, Links, Place, key_slot};
use super::supervise::Copies;
use crate::session::cache::Ticket;
use crate::session::cache::single_flight::SingleFlight;
use crate::session::id::SessionKey;
use crate::session::store::{Found, StoreError};

/// Reads of one runtime towards one primary.
pub(super) type Flights = SingleFlight<Result<Found, Arc<StoreError>>>;

/// What is at `name`, the key's name in the store: its value and how long it lives, made sense of by `decode`.
///
/// `decode` gets the replies to `GET` and `PTTL`.
pub(super) async fn read_through<D>(
    links: &Arc<Links>,
    key: &SessionKey,
    name: String,
    decode: D,
) -> Result<Found, StoreError>
where
    D: FnOnce([Value; 2]) -> Result<Found, StoreError> + Send + 'static,
{
    let slot = key_slot(name.as_bytes());
    let Some(copies) = links.copies(slot).await? else {
        return links.ask(question(slot, &name)).await.and_then(pair).and_then(decode);
    };
    // Before a connection is chosen: what is read on one that is gone by then must not be kept.
    let ticket = copies.cache.begin_read(key);
    let found = copies.flights.read(ticket, |ticket| {
        let (links, copies) = (Arc::clone(links), Arc::clone(&copies));
        async move { ask_and_keep(&links, &copies, &ticket, &name, decode).await.map_err(Arc::new) }
    });
    match found.await {
        Some(Ok(found)) => Ok(found),
        Some(Err(error)) => Err(Arc::try_unwrap(error).unwrap_or_else(|shared| told_again(&shared))),
        None => Err(StoreError::Unavailable("the read was abandoned".into())),
    }
}

/// As [`read_through`], by a read of its own: what was written before this was called is seen.
pub(super) async fn read_now<D>(links: &Links, key: &SessionKey, name: String, decode: D) -> Result<Found, StoreError>
where
    D: FnOnce([Value; 2]) -> Result<Found, StoreError>,
{
    let slot = key_slot(name.as_bytes());
    let Some(copies) = links.copies(slot).await? else {
        return links.ask(question(slot, &name)).await.and_then(pair).and_then(decode);
    };
    let ticket = copies.cache.begin_read(key);
    ask_and_keep(links, &copies, &ticket, &name, decode).await
}

async fn ask_and_keep<D>(
    links: &Links,
    copies: &Copies,
    ticket: &Ticket,
    name: &str,
    decode: D,
) -> Result<Found, StoreError>
where
    D: FnOnce([Value; 2]) -> Result<Found, StoreError>,
{
    let slot = key_slot(name.as_bytes());
    let (replies, is_tracked) = links.read_for(copies, question(slot, name)).await?;
    let found = pair(replies).and_then(decode)?;
    match &found {
        Found::Live(stored) if is_tracked => {
            copies.cache.finish_read(ticket, Some(stored));
            links.each_cache(slot, |cache| cache.seen_alive(ticket));
        }
        Found::Live(_) => {}
        Found::Ended(_) | Found::Nothing => copies.cache.finish_read(ticket, None),
    }
    Ok(found)
}

fn question(slot: u16, name: &str) -> Batch {
    let mut value = redis::cmd("GET");
    value.arg(name);
    let mut time_to_live = redis::cmd("PTTL");
    time_to_live.arg(name);
    Batch { place: Place::Slot(slot), commands: vec![value, time_to_live] }
}

fn pair(replies: Vec<Value>) -> Result<[Value; 2], StoreError> {
    replies.try_into().map_err(|_| StoreError::Unavailable("the reply makes no sense".into()))
}

/// For each of those who shared a read.
fn told_again(error: &StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(cause) => StoreError::Unavailable(cause.to_string().into()),
        StoreError::Refused(cause) => StoreError::Refused(cause.to_string().into()),
        StoreError::TooLarge => StoreError::TooLarge,
        StoreError::Unreadable => StoreError::Unreadable,
    }
}
