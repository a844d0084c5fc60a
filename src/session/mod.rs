//! Who is this? A session cookie becomes a [`Session`], or nothing.
//!
//! The rules of life (idle, absolute) are here; where sessions are kept is behind [`store::SessionStore`].

use std::sync::Arc;
use std::time::Duration;

use crate::identity::Identity;

pub mod id;
pub mod record;
pub mod cookie;
pub mod store;

use id::SessionId;
use record::{ClientHints, LoginMethod, Record};
use store::{SessionStore, StoreError};

/// How long a session lives.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// Unused for this long, it ends.
    pub idle: Duration,
    /// However much it is used, it ends after this long.
    pub absolute: Duration,
}

/// A live session, as one request sees it.
#[derive(Clone, Debug)]
pub struct Session {
    pub id: SessionId,
    pub record: Record,
}

/// Starts, resumes, touches and ends sessions.
#[derive(Clone)]
pub struct Sessions {
    store: Arc<dyn SessionStore>,
    lifetime: Lifetime,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

impl Sessions {
    pub fn new(store: Arc<dyn SessionStore>, lifetime: Lifetime) -> Self {
        Self { store, lifetime }
    }

    /// The session of this id, if it lives; it counts as used now (written at most once per tenth of the idle
    /// time, and never more than 60 s late, in the background).
    pub async fn resume(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        let _ = id;
        unimplemented!()
    }

    /// A new session under a new id; `replaces` (the id that the browser came with) is ended in the same step.
    pub async fn start(
        &self,
        identity: Identity,
        method: LoginMethod,
        client: ClientHints,
        replaces: Option<&SessionId>,
    ) -> Result<SessionId, StoreError> {
        let _ = (identity, method, client, replaces);
        unimplemented!()
    }

    /// Ends it; whether it lived.
    pub async fn end(&self, id: &SessionId) -> Result<bool, StoreError> {
        let _ = id;
        unimplemented!()
    }

    /// For the login throttle and readiness, which keep their counts where the sessions are.
    pub fn store(&self) -> &Arc<dyn SessionStore> {
        &self.store
    }
}
