//! Where sessions are kept: one contract, kept alike by memory and by Redis.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sha2::{Digest, Sha256};

use super::Lifetime;
use super::id::SessionKey;
use super::record::{ClientHints, LoginMethod, Record};
use crate::identity::Identity;

pub mod memory;
pub mod redis;

/// What a new record is made of; the store adds the times, by its own clock.
#[derive(Clone, Debug)]
pub struct NewSession {
    pub identity: Identity,
    pub method: LoginMethod,
    pub client: ClientHints,
}

/// A live record and how long it lives if nobody uses it.
#[derive(Clone, Debug)]
pub struct Stored {
    pub record: Arc<Record>,
    pub time_to_live: Duration,
}

/// A count that forgets: the login throttle's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    pub value: u64,
    /// Until it is zero again.
    pub resets_in: Duration,
}

/// Keeps sessions, by the hash of their id, on one clock of its own.
#[async_trait]
pub trait SessionStore: Send + Sync + 'static {
    /// The live session of this key. A record that cannot be read is [`StoreError::Unreadable`] and one line in the log.
    async fn load(&self, key: &SessionKey) -> Result<Option<Stored>, StoreError>;

    /// Writes a new session and ends `replaces`, in one step.
    async fn create(
        &self,
        key: &SessionKey,
        session: NewSession,
        lifetime: Lifetime,
        replaces: Option<&SessionKey>,
    ) -> Result<(), StoreError>;

    /// Sets the idle clock back, never past `ends` (the record's absolute end), never re-creating an ended
    /// session, never shortening its life; whether it lives.
    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError>;

    /// Ends it; whether it lived.
    async fn destroy(&self, key: &SessionKey) -> Result<bool, StoreError>;

    /// Adds one to a counter that forgets `window` after its first count.
    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError>;

    /// Takes one back from a counter; one that has forgotten stays at zero.
    async fn decrement(&self, counter: &str) -> Result<(), StoreError>;

    /// A counter's value, without counting; 0 when there is none.
    async fn count(&self, counter: &str) -> Result<u64, StoreError>;

    /// Forgets a counter.
    async fn reset(&self, counter: &str) -> Result<(), StoreError>;

    /// Whether it answers: for readiness.
    async fn ping(&self) -> Result<(), StoreError>;
}

/// The store could not say. Never a reason to log anybody out.
#[derive(Debug)]
pub enum StoreError {
    /// Not reached, or it did not answer in time.
    Unavailable(Box<dyn Error + Send + Sync>),
    /// It answered, and refused: full, no permission, wrong type.
    Refused(Box<dyn Error + Send + Sync>),
    /// Something is at the session's key, and it is no session that we can read: damaged, or of a newer version, which
    /// another instance may read. Whoever comes with it is nobody here, and keeps the cookie.
    Unreadable,
}

impl NewSession {
    /// `now`: Unix time in ms, by the store's clock.
    fn into_record(self, now: u64, lifetime: Lifetime) -> Record {
        Record {
            identity: self.identity,
            attributes: BTreeMap::new(),
            created: now,
            ends: now.saturating_add(millis(lifetime.absolute)),
            method: self.method,
            client: self.client,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable(_) => "session store is unavailable",
            Self::Refused(_) => "session store refused",
            Self::Unreadable => "session cannot be read",
        })
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unavailable(cause) | Self::Refused(cause) => Some(cause.as_ref()),
            Self::Unreadable => None,
        }
    }
}

/// A counter's key: a hash of its name. The name holds what somebody typed as a user, which may be a password by
/// mistake, and may be of any length.
fn counter_hash(counter: &str) -> [u8; 24] {
    let digest = Sha256::new().chain_update(b"cloakroom counter\0").chain_update(counter).finalize();
    let mut hash = [0; 24];
    hash.copy_from_slice(&digest[..24]);
    hash
}

/// At least one: no store knows a life of nothing.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}
