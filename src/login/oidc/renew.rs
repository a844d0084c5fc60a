//! How do a session's tokens stay fresh? One instance renews them, shortly before they end; nobody waits for it who has
//! one that is still good.
//!
//! A session's renewal belongs to whoever has claimed it in the store, so that a refresh token is used once although 20
//! requests at two instances see that it is due. Whoever claims reads the record again: somebody may have just done it.
//! What is written must still find the tokens that it replaces. A provider that says no (`invalid_grant`), or speaks of
//! somebody else, has ended the session. Nothing else does: a refresh token may be good for once, so what came for it is
//! kept, and when we cannot tell what it says of the user, that stays as it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde_json::Map;
use tracing::{info, warn};

use super::claims::Unwelcome;
use super::provider::{Provider, Tokens};
use super::token::{Asked, TokenError};
use super::{ACCESS_TOKEN, ProviderError, REFRESH_TOKEN, kept_tokens, now};
use crate::audit::{self, Event, LogoutReason};
use crate::identity::Identity;
use crate::login::Login;
use crate::session::id::{SessionId, SessionKey};
use crate::session::record::{ExternalLogin, Record};
use crate::session::store::{Ending, Found, StoreError};

/// After the tokens of which sessions this process has looked lately.
#[derive(Debug, Default)]
pub(super) struct Renewals(Mutex<HashMap<SessionKey, Look>>);

#[derive(Clone, Copy, Debug)]
struct Look {
    /// Nobody looks again before.
    next: Instant,
    /// The last one came to nothing: until then nobody waits for another.
    in_vain: Option<Instant>,
}

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

/// Renewed so long before its end that a backend still has the use of it, and somebody else the time to do it when whoever
/// began is gone. In ms.
const AHEAD: u64 = 90_000;
/// One try takes no longer: 24 s for the metadata when nobody has asked for it before, 12 s for the tokens, then
/// [`IDENTITY_WAIT_MAX`], and [`WRITES`].
const CLAIM: Duration = Duration::from_secs(60);
/// After a failure nobody tries again, and nobody waits, for so long.
const PAUSE: Duration = Duration::from_secs(20);
/// In this process.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// For what new tokens say of the user. They are good without it.
const IDENTITY_WAIT_MAX: Duration = Duration::from_secs(5);
/// The pauses before each try to write new tokens: what they replace is used up.
const WRITES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];
/// A request does not wait for longer, and goes on with what there is.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// Between two looks of who waits.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const REMEMBERED_MAX: usize = 100_000;

impl Login {
    /// Whether somebody should [renew](Self::renew_tokens) the tokens of this session, and nobody here does already.
    pub fn are_tokens_due(&self, key: &SessionKey, record: &Record) -> bool {
        self.is_due(record) && self.providers.renewals.note(key, Instant::now())
    }

    /// The provider's access token in a session, for a backend.
    pub fn access_token(&self, id: &SessionId, record: &Record) -> Option<String> {
        record.login.as_ref()?;
        self.sessions.secrets(id, record).ok()?.remove(ACCESS_TOKEN)
    }

    /// The session's record with an access token that has not ended. Who would have nothing else waits for the renewal,
    /// whoever does it, at whichever instance; but not for long, and not when the last one has just failed.
    ///
    /// # Errors
    /// The session is gone, and perhaps why.
    pub async fn with_live_token(&self, key: &SessionKey, record: &Arc<Record>) -> Result<Arc<Record>, Option<Ending>> {
        let (mut latest, renewals) = (Arc::clone(record), &self.providers.renewals);
        let until = Instant::now() + WAIT_MAX;
        while ends_before(&latest, 0) && !renewals.is_in_vain(key, Instant::now()) {
            if until <= Instant::now() {
                renewals.note_failure(key, Instant::now());
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            let store = self.sessions.store();
            let found = match store.recall(key) {
                Some(stored) => Ok(Found::Live(stored)),
                None => store.load(key).await,
            };
            match found {
                Ok(Found::Live(stored)) => latest = stored.record,
                Ok(Found::Ended(ending)) => return Err(Some(ending)),
                Ok(Found::Nothing) => return Err(None),
                Err(_) => {} // nobody knows: perhaps with the next look
            }
        }
        Ok(latest)
    }

    /// Renews the tokens of a session, if nobody else does. Takes as long as the provider.
    pub async fn renew_tokens(&self, id: &SessionId) {
        let key = id.key();
        let session = key.log_hash();
        let renewals = &self.providers.renewals;
        match self.renew(id, &key).await {
            Ok(renewal) => {
                match renewal {
                    Renewal::Failed => renewals.note_failure(&key, Instant::now()),
                    Renewal::Renewed | Renewal::NotOurs | Renewal::Ended => {}
                }
                self.metrics.token_renewals.with_label_values(&[renewal.label()]).inc();
            }
            Err(error) => {
                renewals.note_failure(&key, Instant::now());
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
        store.release(&claim, &holder).await?;
        if renewal == Renewal::Failed {
            store.claim(&claim, &holder, PAUSE).await?;
        }
        Ok(renewal)
    }

    async fn renew_claimed(&self, id: &SessionId, key: &SessionKey) -> Result<Renewal, StoreError> {
        let Found::Live(stored) = self.sessions.store().load_now(key).await? else { return Ok(Renewal::NotOurs) };
        let record = &stored.record;
        let Some(login) = record.login.as_ref().filter(|_| self.is_due(record)) else { return Ok(Renewal::NotOurs) };
        let Some(provider) = self.providers.by_name.get(&login.provider) else { return Ok(Renewal::NotOurs) };
        let Ok(secrets) = self.sessions.secrets(id, record) else { return Ok(Renewal::Failed) };
        let Some(refresh_token) = secrets.get(REFRESH_TOKEN) else { return Ok(Renewal::Failed) };

        let mut tokens = match provider.refresh(refresh_token).await {
            Ok(tokens) => tokens,
            Err(ProviderError::Refused(code)) if code == "invalid_grant" => {
                // Somebody may have been faster, whose claim was lost with a store: then it is their token that counts.
                let is_as_read = match self.sessions.store().load_now(key).await? {
                    Found::Live(now) => is_same_login(&now.record, record),
                    Found::Ended(_) | Found::Nothing => false,
                };
                return if is_as_read {
                    self.end_by_provider(provider, key, record, "invalid_grant").await
                } else {
                    Ok(Renewal::NotOurs)
                };
            }
            Err(error) => {
                warn!(provider = provider.name, session = key.log_hash(), %error, "tokens were not renewed");
                return Ok(Renewal::Failed);
            }
        };
        let said = tokio::time::timeout(IDENTITY_WAIT_MAX, self.identity_now(provider, record, login, &tokens)).await;
        let said = said.unwrap_or_else(|_| Err(ProviderError::Away("it takes too long".to_owned())));
        let identity = match said {
            Ok(Ok(identity)) => identity,
            Ok(Err(Unwelcome::NotAllowed)) => return self.end_by_provider(provider, key, record, "not_allowed").await,
            Ok(Err(why @ (Unwelcome::NoName | Unwelcome::TooMuch))) => {
                warn!(
                    provider = provider.name,
                    session = key.log_hash(),
                    why = why.label(),
                    "new claims are not taken"
                );
                record.identity.clone()
            }
            // Somebody else's: nobody knows whose session this would become.
            Err(ProviderError::Token(error @ (TokenError::Subject | TokenError::Issuer | TokenError::Audience))) => {
                warn!(provider = provider.name, session = key.log_hash(), %error, "a refresh brought a foreign token");
                return self.end_by_provider(provider, key, record, "bad_token").await;
            }
            Err(error) => {
                warn!(provider = provider.name, session = key.log_hash(), %error, "new tokens say nothing of the user");
                tokens.id_token = None; // the older one stays, which is good
                record.identity.clone()
            }
        };
        let Ok(sealed) = self.sessions.seal(id, &kept_tokens(provider, &tokens, Some(secrets))) else {
            return Ok(Renewal::Failed);
        };
        let now = now();
        let access_ends = tokens.access_ends(now);
        let change = |current: &Record| {
            // Whatever else has changed meanwhile stays; but not over the tokens of somebody who was later than we.
            is_same_login(current, record).then(|| Record {
                identity: identity.clone(),
                secrets: Some(sealed.clone()),
                login: Some(ExternalLogin { access_ends, ..login.clone() }),
                ..current.clone()
            })
        };
        let written = self.write_renewed(key, &change).await?;
        // Tokens that live for hardly longer than `AHEAD` are not renewed with each request.
        let life = access_ends.map_or(0, |ends| ends.saturating_sub(now.saturating_mul(1000)));
        self.providers.renewals.note_success(key, Instant::now() + Duration::from_millis(life.min(2 * AHEAD) / 2));
        Ok(if written { Renewal::Renewed } else { Renewal::NotOurs })
    }

    /// Whether the session lives.
    async fn write_renewed(
        &self,
        key: &SessionKey,
        change: &(dyn Fn(&Record) -> Option<Record> + Send + Sync),
    ) -> Result<bool, StoreError> {
        let mut outcome = Ok(None);
        for pause in WRITES {
            tokio::time::sleep(pause).await;
            outcome = self.sessions.update(key, change).await;
            match &outcome {
                Err(StoreError::Unavailable(_)) => {}
                Ok(_) | Err(StoreError::Refused(_) | StoreError::Unreadable | StoreError::TooLarge) => break,
            }
        }
        Ok(outcome?.is_some())
    }

    /// What the new tokens say of the user.
    async fn identity_now(
        &self,
        provider: &Arc<Provider>,
        record: &Record,
        login: &ExternalLogin,
        tokens: &Tokens,
    ) -> Result<Result<Identity, Unwelcome>, ProviderError> {
        let access_token = tokens.access_token.as_deref();
        let said = match &tokens.id_token {
            Some(id_token) => {
                let asked = Asked { nonce: None, acr: &[], max_age: None, waited: 0, access_token };
                let token = provider.id_token(id_token, now(), &asked).await?;
                // OpenID Connect Core 1.0, section 12.2.
                if token.subject != login.subject {
                    return Err(ProviderError::Token(TokenError::Subject));
                }
                token.claims
            }
            None => Map::new(),
        };
        let claims = match provider.claims(&login.subject, &said, access_token, now()).await {
            Ok(claims) => claims,
            Err(error) => {
                warn!(provider = provider.name, %error, "UserInfo says nothing of the user now");
                said
            }
        };
        Ok(provider.mapping.renewed(&claims, &record.identity))
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
        let before = lately.get(key).copied();
        if before.is_some_and(|look| now < look.next) {
            return false;
        }
        if REMEMBERED_MAX <= lately.len() {
            lately.retain(|_, look| now < look.next);
        }
        if REMEMBERED_MAX <= lately.len() {
            return false;
        }
        let in_vain = before.and_then(|look| look.in_vain);
        lately.insert(key.clone(), Look { next: now + TRY_AGAIN, in_vain });
        true
    }

    fn note_success(&self, key: &SessionKey, next: Instant) {
        if let Some(look) = self.0.lock().get_mut(key) {
            *look = Look { next: next.max(look.next), in_vain: None };
        }
    }

    fn note_failure(&self, key: &SessionKey, now: Instant) {
        let mut lately = self.0.lock();
        if lately.len() < REMEMBERED_MAX || lately.contains_key(key) {
            lately.entry(key.clone()).or_insert(Look { next: now, in_vain: None }).in_vain = Some(now + PAUSE);
        }
    }

    fn is_in_vain(&self, key: &SessionKey, now: Instant) -> bool {
        self.0.lock().get(key).and_then(|look| look.in_vain).is_some_and(|until| now < until)
    }
}

/// Whether nobody has renewed the tokens since.
fn is_same_login(current: &Record, read: &Record) -> bool {
    current.login == read.login && current.secrets == read.secrets
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
