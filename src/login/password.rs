//! Does this password belong to this name? Asked in the same way, at the same cost, whoever is named.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Failure;
use super::hash::Hashing;
use super::throttle::{Throttle, Verdict};
use super::users::{Standing, UserName, Users};
use crate::config::model;
use crate::identity::Known;
use crate::session::store::SessionStore;

/// Login by a user name and a password of the users file.
#[derive(Debug)]
pub(super) struct PasswordLogin {
    hashing: Hashing,
    throttle: Throttle,
}

/// What became of an attempt. Only the log tells the refusals apart.
#[derive(Debug)]
pub(super) enum Answer {
    Welcome(Arc<Known>),
    Wrong,
    Disabled,
    Unknown,
    /// Not looked at; worth another try after this long.
    Throttled(Duration),
}

impl PasswordLogin {
    pub(super) fn new(config: &model::PasswordLogin, store: Arc<dyn SessionStore>) -> Self {
        Self { hashing: Hashing::new(config.hashes_max), throttle: Throttle::new(store, config.throttle.clone()) }
    }

    pub(super) async fn check(
        &self,
        users: &Users,
        name: &UserName,
        password: String,
        client: IpAddr,
    ) -> Result<Answer, Failure> {
        let attempt = match self.throttle.attempt(name, client).await? {
            Verdict::Allowed(attempt) => attempt,
            Verdict::Throttled(wait) => return Ok(Answer::Throttled(wait)),
        };
        let candidate = users.candidate(name);
        let matches = match self.hashing.verify(password, candidate.hash.clone()).await {
            Ok(matches) => matches,
            Err(busy) => {
                self.throttle.take_back(attempt).await;
                return Err(busy.into());
            }
        };
        match candidate.standing {
            Standing::Enabled(identity) if matches => {
                self.throttle.succeeded(attempt).await?;
                Ok(Answer::Welcome(Arc::clone(identity)))
            }
            Standing::Enabled(_) => Ok(Answer::Wrong),
            Standing::Disabled => Ok(Answer::Disabled),
            Standing::Unknown => Ok(Answer::Unknown),
        }
    }
}

#[cfg(test)]
impl PasswordLogin {
    pub(super) fn fill(&self) -> usize {
        self.hashing.fill()
    }

    pub(super) fn free(&self, places: usize) {
        self.hashing.free(places);
    }
}

impl Answer {
    /// For the log and the metrics.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Welcome(_) => "success",
            Self::Wrong => "wrong_password",
            Self::Disabled => "disabled",
            Self::Unknown => "unknown_user",
            Self::Throttled(_) => "throttled",
        }
    }
}
