//! How do a session's tokens stay fresh? One instance renews them, shortly before they end; nobody waits for it.
//!
//! A session's renewal belongs to whoever has claimed it in the store, so that a refresh token is used once although 20
//! requests at two instances see that it is due. Whoever claims reads the record again: somebody may have just done it.
//! What is written must still find the tokens that it replaces. A provider that says no (`invalid_grant`) has ended the
//! session; one that does not answer has not, and is asked again half a minute later.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tracing::{info, warn};

use super::claims::Unwelcome;
use super::provider::{Provider, Tokens};
use super::token::Asked;
use super::{ACCESS_TOKEN, ProviderError, REFRESH_TOKEN, kept_tokens, now};
use crate::audit::{self, Event, LogoutReason};
use crate::identity::Identity;
use crate::login::Login;
use crate::session::id::{SessionId, SessionKey};
use crate::session::record::{ExternalLogin, Record};
use crate::session::store::{Found, StoreError};

/// Of which sessions this process has looked after the tokens lately.
#[derive(Debug, Default)]
pub(super) struct Renewals(Mutex<HashMap<SessionKey, Instant>>);

/// What became of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renewal {
    Renewed,
    /// Somebody else does it, or has just done it.
    NotOurs,
    /// The provider did not answer, or nonsense.
    Failed,
    /// The provider, or what it says of the user now, has ended the session.
    Ended,
}

/// Renewed so long before its end that a backend still has the use of it. In ms.
const AHEAD: u64 = 30_000;
/// One try takes no longer, and after a failure nobody tries again for so long.
const CLAIM: Duration = Duration::from_secs(30);
/// In this process.
const TRY_AGAIN: Duration = Duration::from_secs(5);
const REMEMBERED_MAX: usize = 10_000;

impl Login {
    /// Whether somebody should [renew](Self::renew_tokens) the tokens of this session, and nobody here does already.
    pub fn are_tokens_due(&self, key: &SessionKey, record: &Record) -> bool {
        self.is_due(record) && self.providers.renewals.note(key, Instant::now())
    }

    /// Whether the access token of this session is of no use any more.
    pub fn has_token_ended(&self, record: &Record) -> bool {
        ends_before(record, 0)
    }

    /// The provider's access token in a session, for a backend.
    pub fn access_token(&self, id: &SessionId, record: &Record) -> Option<String> {
        record.login.as_ref()?;
        self.sessions.secrets(id, record).ok()?.remove(ACCESS_TOKEN)
    }

    /// Renews the tokens of a session, if nobody else does. Takes as long as the provider.
    pub async fn renew_tokens(&self, id: &SessionId) {
        let key = id.key();
        let session = key.log_hash();
        match self.renew(id, &key).await {
            Ok(renewal) => {
                self.metrics.token_renewals.with_label_values(&[renewal.label()]).inc();
            }
            Err(error) => {
                self.metrics.store_errors.with_label_values(&["renew"]).inc();
                warn!(session, %error, "tokens were not renewed");
            }
        }
    }

    fn is_due(&self, record: &Record) -> bool {
        record.secrets.is_some() && ends_before(record, AHEAD)
    }

    async fn renew(&self, id: &SessionId, key: &SessionKey) -> Result<Renewal, StoreError> {
        let store = self.sessions.store();
        let (claim, holder) = (format!("oidc renewal\0{}", key.log_hash()), format!("{:x}", rand::random::<u128>()));
        if !store.claim(&claim, &holder, CLAIM).await? {
            return Ok(Renewal::NotOurs);
        }
        let renewal = self.renew_claimed(id, key).await?;
        match renewal {
            Renewal::Renewed | Renewal::NotOurs | Renewal::Ended => store.release(&claim, &holder).await?,
            Renewal::Failed => {} // the claim runs out: that is the pause
        }
        Ok(renewal)
    }

    async fn renew_claimed(&self, id: &SessionId, key: &SessionKey) -> Result<Renewal, StoreError> {
        let Found::Live(stored) = self.sessions.store().load(key).await? else { return Ok(Renewal::NotOurs) };
        let record = &stored.record;
        let Some(login) = record.login.as_ref().filter(|_| self.is_due(record)) else { return Ok(Renewal::NotOurs) };
        let Some(provider) = self.providers.by_name.get(&login.provider) else { return Ok(Renewal::NotOurs) };
        let Ok(secrets) = self.sessions.secrets(id, record) else { return Ok(Renewal::Failed) };
        let Some(refresh_token) = secrets.get(REFRESH_TOKEN) else { return Ok(Renewal::Failed) };

        let renewed = match provider.refresh(refresh_token).await {
            Ok(tokens) => self.renewed(provider, record, login, &tokens).await.map(|fresh| fresh.zip(Some(tokens))),
            Err(error) => Err(error),
        };
        let (mut fresh, tokens) = match renewed {
            Ok(Some(renewed)) => renewed,
            Ok(None) => return self.end_by_provider(provider, key, record, "not_allowed").await,
            Err(ProviderError::Refused(code)) if code == "invalid_grant" => {
                return self.end_by_provider(provider, key, record, "invalid_grant").await;
            }
            // Perhaps somebody else's: nobody knows whose session this would become.
            Err(error @ (ProviderError::Token(_) | ProviderError::Signature(_))) => {
                warn!(provider = provider.name, session = key.log_hash(), %error, "a refresh brought a bad token");
                return self.end_by_provider(provider, key, record, "bad_token").await;
            }
            Err(error @ (ProviderError::Away(_) | ProviderError::Wrong(_) | ProviderError::Refused(_))) => {
                warn!(provider = provider.name, session = key.log_hash(), %error, "tokens were not renewed");
                return Ok(Renewal::Failed);
            }
        };
        let Ok(sealed) = self.sessions.seal(id, &kept_tokens(provider, &tokens, Some(secrets))) else {
            return Ok(Renewal::Failed);
        };
        fresh.secrets = Some(sealed);
        let change = |current: &Record| {
            // Whatever else has changed meanwhile stays; but not over the tokens of somebody who was later than we.
            let is_as_read = current.login == record.login && current.secrets == record.secrets;
            is_as_read.then(|| Record {
                identity: fresh.identity.clone(),
                secrets: fresh.secrets.clone(),
                login: fresh.login.clone(),
                ..current.clone()
            })
        };
        let written = self.sessions.update(key, &change).await?;
        Ok(if written.is_some() { Renewal::Renewed } else { Renewal::NotOurs })
    }

    /// The record with what the new tokens say; none when the user may not come in any more.
    async fn renewed(
        &self,
        provider: &Provider,
        record: &Record,
        login: &ExternalLogin,
        tokens: &Tokens,
    ) -> Result<Option<Record>, ProviderError> {
        let mut fresh = record.clone();
        let now = now();
        if let Some(id_token) = &tokens.id_token {
            let asked =
                Asked { nonce: None, acr: &[], max_age: None, waited: 0, access_token: tokens.access_token.as_deref() };
            let token = provider.id_token(id_token, now, &asked).await?;
            // OpenID Connect Core 1.0, section 12.2.
            if token.subject != login.subject {
                return Err(ProviderError::Token(super::TokenError::Claim("sub")));
            }
            match provider.mapping.identity(&token.claims) {
                // Such a token may say less than the first one did, and a session does not change its user.
                Ok(identity) if identity.user == record.identity.user => fresh.identity = fuller(identity, record),
                Ok(_) | Err(Unwelcome::NoName) => {}
                Err(Unwelcome::NotAllowed) if provider.mapping.lacks(&token.claims) => {}
                Err(Unwelcome::NotAllowed) => return Ok(None),
            }
        }
        fresh.login = Some(ExternalLogin { access_ends: tokens.access_ends(now), ..login.clone() });
        Ok(Some(fresh))
    }

    async fn end_by_provider(
        &self,
        provider: &Provider,
        key: &SessionKey,
        record: &Record,
        reason: &str,
    ) -> Result<Renewal, StoreError> {
        let user = record.identity.user.as_str();
        self.sessions.revoke(key, Some(user)).await?;
        let session = key.log_hash();
        info!(provider = provider.name, session, reason, "the provider renews a session no more");
        let (user, session) = (Some(user), session.as_str());
        audit::tell(Event::Logout { user, client: None, session, reason: LogoutReason::Provider });
        Ok(Renewal::Ended)
    }
}

impl Renewals {
    /// Whether this one was not looked after a moment ago.
    fn note(&self, key: &SessionKey, now: Instant) -> bool {
        let mut lately = self.0.lock();
        if lately.get(key).is_some_and(|noted| now.saturating_duration_since(*noted) < TRY_AGAIN) {
            return false;
        }
        if REMEMBERED_MAX <= lately.len() {
            lately.retain(|_, noted| now.saturating_duration_since(*noted) < TRY_AGAIN);
        }
        if REMEMBERED_MAX <= lately.len() {
            return false;
        }
        lately.insert(key.clone(), now);
        true
    }
}

impl Renewal {
    fn label(self) -> &'static str {
        match self {
            Self::Renewed => "renewed",
            Self::NotOurs => "not_ours",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }
}

/// Whether the access token ends within so many ms.
fn ends_before(record: &Record, ahead: u64) -> bool {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    let ends = record.login.as_ref().and_then(|login| login.access_ends);
    ends.is_some_and(|ends| u128::from(ends) < now + u128::from(ahead))
}

/// What a later ID token left out stays as the login said it.
fn fuller(fresh: crate::identity::Identity, record: &Record) -> Identity {
    let before = &record.identity;
    let mut claims = before.claims.clone();
    claims.extend(fresh.claims);
    let groups = if fresh.groups.is_empty() { before.groups.clone() } else { fresh.groups };
    let (name, email) = (fresh.name.or_else(|| before.name.clone()), fresh.email.or_else(|| before.email.clone()));
    Identity { user: fresh.user, name, email, groups, claims }
}
