//! Where sessions are kept: one contract, kept alike by memory and by Redis.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Lifetime;
use super::id::SessionKey;
use super::record::{Attribute, ClientHints, Codec, ExternalLogin, LoginMethod, Memo, Record, RecordError, Sealed};
use crate::config::model::WhenFull;
use crate::identity::Identity;

pub mod memory;
pub mod redis;

/// What all stores are told alike.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    pub codec: Codec,
    /// Whether somebody wants to be told of ends; else they are not collected.
    pub events: bool,
    /// Whoever is known may be served for so long without the store: so long it is remembered who may have ended.
    pub bridged: Duration,
}

/// What a new record is made of; the store adds the times, by its own clock.
#[derive(Clone, Debug)]
pub struct NewSession {
    pub identity: Identity,
    pub method: LoginMethod,
    pub client: ClientHints,
    /// What only the holder of the id can open; see [`crate::session::seal`].
    pub secrets: Option<Sealed>,
    pub attributes: BTreeMap<String, Attribute>,
    pub login: Option<ExternalLogin>,
}

/// On what terms a session begins.
#[derive(Clone, Debug)]
pub struct Terms {
    pub lifetime: Lifetime,
    /// How many sessions its user may have, this one included; none = any number.
    pub limit: Option<Limit>,
    /// The session that ends in the same step.
    pub replaces: Option<SessionKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// At least 1.
    pub sessions: u32,
    pub when_full: WhenFull,
}

/// What became of a login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    Begun {
        /// So many older sessions of the user made room.
        displaced: u32,
    },
    /// The user has as many as they may have.
    Full,
}

/// What is at a session's key.
#[derive(Clone, Debug)]
pub enum Found {
    Live(Stored),
    /// It ended not long ago, and its user may want to know why.
    Ended(Ending),
    Nothing,
}

/// A live record and how long it lives if nobody uses it.
#[derive(Clone, Debug)]
pub struct Stored {
    pub record: Arc<Record>,
    pub time_to_live: Duration,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    LoggedOut,
    /// The same browser logged in again.
    Replaced,
    /// A newer session of the user took its place: remembered for a while.
    Displaced,
    /// An administrator, or the user from another session: remembered for a while.
    Revoked,
    /// Unused for too long, or at its absolute end.
    Expired,
}

/// One of a list.
#[derive(Clone, Debug)]
pub struct Listed {
    pub key: SessionKey,
    pub stored: Stored,
}

/// One use of a session, for its activity trail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Unix time in ms, by the clock of the instance that saw it.
    pub at: u64,
    pub address: IpAddr,
    pub route: String,
}

/// A session has ended, and whoever wanted to know has not been told yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndEvent {
    /// What the store knows it by, for [`SessionStore::forget_events`].
    pub token: Vec<u8>,
    /// [`SessionKey::log_hash`] of the session.
    pub session: String,
    pub user: String,
    pub ending: Ending,
    /// Unix time in ms, by the store's clock.
    pub at: u64,
}

/// Something that will hurt one day, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Risk {
    pub gravity: Gravity,
    pub what: String,
    pub remedy: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gravity {
    /// It does not work with this.
    Unusable,
    Risk,
    /// Good to know.
    Hint,
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
    /// What is known here without asking anybody, if it is known to be true now; see [`crate::session::cache`].
    fn recall(&self, _key: &SessionKey) -> Option<Stored> {
        None
    }

    /// While the store is down: what was known here to be true not longer than `grace` ago, and by its own clocks lives.
    fn recall_within(&self, _grace: Duration, _key: &SessionKey) -> Option<Stored> {
        None
    }

    /// Sessions of which something is kept here, about: copies, or all where this process is the store.
    fn kept(&self) -> usize {
        0
    }

    /// Whether the place of this session cannot be reached, as was found before this request came.
    fn is_down(&self, _key: &SessionKey) -> bool {
        false
    }

    /// Whether this session may have ended without a word of the store: it was revoked here, or something that could not
    /// be explained was heard of it. Such a one is not served while the store is down.
    fn doubts(&self, _key: &SessionKey) -> bool {
        false
    }

    /// What is at this key. A record that cannot be read is [`StoreError::Unreadable`], see
    /// [`Codec::unreadable`].
    async fn load(&self, key: &SessionKey) -> Result<Found, StoreError>;

    /// As [`Self::load`], by a read that begins now: it sees all that was written before by whichever instance.
    async fn load_now(&self, key: &SessionKey) -> Result<Found, StoreError> {
        self.load(key).await
    }

    /// Writes a new session, ends what it replaces or displaces, in one step.
    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError>;

    /// Sets the idle clock back, never past `ends` (the record's absolute end), never re-creating an ended
    /// session, never shortening its life; whether it lives.
    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError>;

    /// Changes a live record, and gives what it is then; none where there is no such session. Its life stays as it is.
    ///
    /// `change` makes the new record of the current one, or nothing where all is well as it is. It may be called several
    /// times: whoever else changes the record at the same time is never overwritten. The user stays the same.
    async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError>;

    /// Ends it; whether it lived. `user`, where known, spares the user's list a member that is gone.
    async fn destroy(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Result<bool, StoreError>;

    /// The live sessions of a user, the oldest first.
    async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError>;

    /// Ends all sessions of a user but one, if one is named; how many.
    async fn destroy_all(&self, user: &str, except: Option<&SessionKey>, ending: Ending) -> Result<u64, StoreError>;

    /// Into so many parts the sessions are divided, for what goes through all of them.
    fn parts(&self) -> u16;

    /// The live sessions in one part.
    async fn list_part(&self, part: u16) -> Result<Vec<Listed>, StoreError>;

    /// Ends all sessions in one part; how many.
    async fn destroy_part(&self, part: u16, ending: Ending) -> Result<u64, StoreError>;

    /// How many sessions live in all, without looking at each: those that expired since the last sweep may be among them.
    async fn total(&self) -> Result<u64, StoreError>;

    /// Notes the expired sessions of one part as ended, and gives the ends of which nobody was told, the oldest first.
    async fn sweep(&self, part: u16) -> Result<Vec<EndEvent>, StoreError>;

    /// These have been told.
    async fn forget_events(&self, part: u16, events: &[EndEvent]) -> Result<(), StoreError>;

    /// Whether this instance is the one that sweeps, for so long from now. Ask again well before.
    async fn lead(&self, instance: &str, time: Duration) -> Result<bool, StoreError>;

    /// Adds to a session's trail, of which the last `keep` stay, as long as the session.
    async fn add_activity(&self, key: &SessionKey, seen: &[Activity], keep: u16) -> Result<(), StoreError>;

    /// A session's trail, the latest first.
    async fn activity(&self, key: &SessionKey) -> Result<Vec<Activity>, StoreError>;

    /// Takes a name for `holder`, for so long at most; whether it was free. Whoever has it does not get it again either.
    async fn claim(&self, name: &str, holder: &str, time: Duration) -> Result<bool, StoreError>;

    /// Gives a name back before its time, if `holder` still has it.
    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError>;

    /// Notes that whoever knows this name may end the session, for so long. Of more than [`BOUND_MAX`] sessions of one
    /// name those that are to be forgotten first are given back: nobody can end them by that name any more.
    async fn bind(&self, handle: &str, key: &SessionKey, time: Duration) -> Result<Vec<SessionKey>, StoreError>;

    /// The sessions bound to a name. Some of them may have ended.
    async fn bound(&self, handle: &str) -> Result<Vec<SessionKey>, StoreError>;

    /// Adds one to a counter that forgets `window` after its first count.
    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError>;

    /// Takes one back from a counter; one that has forgotten stays at zero.
    async fn decrement(&self, counter: &str) -> Result<(), StoreError>;

    /// A counter's value, without counting; 0 when there is none.
    async fn count(&self, counter: &str) -> Result<u64, StoreError>;

    /// Forgets a counter.
    async fn reset(&self, counter: &str) -> Result<(), StoreError>;

    /// What the operator should know of the place where sessions are kept: for the log, once, when it first answers.
    async fn inspect(&self) -> Vec<Risk> {
        Vec::new()
    }

    /// Whether it answers: for readiness.
    async fn ping(&self) -> Result<(), StoreError>;
}

/// How [`SessionStore::update`] makes a record of the one that is there.
pub type Change<'c> = &'c (dyn Fn(&Record) -> Option<Record> + Send + Sync);

/// Sessions that one name can end. A person has fewer; a program that logs in all the time has more.
pub const BOUND_MAX: usize = 1000;

impl Found {
    pub fn live(self) -> Option<Stored> {
        match self {
            Self::Live(stored) => Some(stored),
            Self::Ended(_) | Self::Nothing => None,
        }
    }
}

impl Ending {
    /// For logs, events and what is kept in the place of a session.
    pub fn label(self) -> &'static str {
        match self {
            Self::LoggedOut => "logged_out",
            Self::Replaced => "replaced",
            Self::Displaced => "displaced",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
        }
    }

    pub fn of_label(label: &str) -> Option<Self> {
        let all = [Self::LoggedOut, Self::Replaced, Self::Displaced, Self::Revoked, Self::Expired];
        all.into_iter().find(|ending| ending.label() == label)
    }
}

/// The store could not say. Never a reason to log anybody out.
#[derive(Debug)]
pub enum StoreError {
    /// Not reached, or it did not answer in time.
    Unavailable(Box<dyn Error + Send + Sync>),
    /// It answered, and refused: full, no permission, wrong type.
    Refused(Box<dyn Error + Send + Sync>),
    /// The record would be larger than one may be. To try again is in vain.
    TooLarge,
    /// Something is at the session's key, and it is no session that we can read: damaged, or of a newer version, which
    /// another instance may read. Whoever comes with it is nobody here, and keeps the cookie.
    Unreadable,
}

impl NewSession {
    /// `now`: Unix time in ms, by the store's clock.
    fn into_record(self, now: u64, lifetime: Lifetime) -> Record {
        Record {
            identity: self.identity,
            attributes: self.attributes,
            created: now,
            ends: now.saturating_add(millis(lifetime.absolute)),
            method: self.method,
            client: self.client,
            secrets: self.secrets,
            login: self.login,
            known: Memo::default(),
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable(_) => "session store is unavailable",
            Self::Refused(_) => "session store refused",
            Self::TooLarge => "more than a session keeps",
            Self::Unreadable => "session cannot be read",
        })
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unavailable(cause) | Self::Refused(cause) => Some(cause.as_ref()),
            Self::TooLarge | Self::Unreadable => None,
        }
    }
}

/// Of what was to be written.
impl From<RecordError> for StoreError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::TooLarge => Self::TooLarge,
            RecordError::NewerVersion(_) | RecordError::Malformed | RecordError::Plain | RecordError::Sealed(_) => {
                Self::Refused(error.into())
            }
        }
    }
}

/// What has a name of its own choosing.
#[derive(Clone, Copy)]
enum Named {
    Counter,
    Claim,
    Handle,
}

/// A key of its own for each name: a hash. A name may be of any length, and holds what should not lie about: what
/// somebody typed as a user, which may be a password by mistake, or what an identity provider calls them.
fn name_hash(what: Named, name: &str) -> [u8; 24] {
    let label: &[u8] = match what {
        Named::Counter => b"cloakroom counter\0",
        Named::Claim => b"cloakroom claim\0",
        Named::Handle => b"cloakroom handle\0",
    };
    let digest = Sha256::new().chain_update(label).chain_update(name).finalize();
    let mut hash = [0; 24];
    hash.copy_from_slice(&digest[..24]);
    hash
}

/// The change of a record that a store makes, if there is one to make. A record stays in the list of its user.
fn changed(record: &Record, change: Change<'_>) -> Result<Option<Record>, StoreError> {
    let Some(new) = change(record).filter(|new| new != record) else { return Ok(None) };
    if new.identity.user != record.identity.user {
        return Err(StoreError::Refused("a session does not change its user".into()));
    }
    Ok(Some(new))
}

/// At least one: no store knows a life of nothing.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}
