//! How is a session read? From the copy that is known to be true, or by one read for all who miss it at the same time.

use std::sync::Arc;

use redis::Value;

use super::link::{Batch, Links, Place, key_slot};
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
    let Some(copies) = links.copies(slot).await? else { return read(links, slot, name, decode).await };
    // Before a connection is chosen: what is read on one that is gone by then must not be kept.
    let ticket = copies.cache.begin_read(key);
    let found = copies.flights.read(ticket, |ticket| {
        let (links, cache) = (Arc::clone(links), Arc::clone(&copies.cache));
        async move {
            let found = read(&links, slot, name, decode).await.map_err(Arc::new)?;
            match &found {
                Found::Live(stored) => cache.finish_read(&ticket, Some(stored)),
                Found::Ended(_) | Found::Nothing => cache.finish_read(&ticket, None),
            }
            Ok(found)
        }
    });
    match found.await {
        Some(Ok(found)) => Ok(found),
        Some(Err(error)) => Err(Arc::try_unwrap(error).unwrap_or_else(|shared| told_again(&shared))),
        None => Err(StoreError::Unavailable("the read was abandoned".into())),
    }
}

async fn read(
    links: &Links,
    slot: u16,
    name: String,
    decode: impl FnOnce([Value; 2]) -> Result<Found, StoreError>,
) -> Result<Found, StoreError> {
    let mut value = redis::cmd("GET");
    value.arg(&name);
    let mut time_to_live = redis::cmd("PTTL");
    time_to_live.arg(&name);
    let replies = links.ask(Batch { place: Place::Slot(slot), commands: vec![value, time_to_live] }).await?;
    let replies = <[Value; 2]>::try_from(replies);
    decode(replies.map_err(|_| StoreError::Unavailable("the reply makes no sense".into()))?)
}

/// For each of those who shared a read.
fn told_again(error: &StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(cause) => StoreError::Unavailable(cause.to_string().into()),
        StoreError::Refused(cause) => StoreError::Refused(cause.to_string().into()),
        StoreError::Unreadable => StoreError::Unreadable,
    }
}
