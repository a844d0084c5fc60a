//! What of a logout at the provider that comes while the same login is under way? There is no session yet that it could
//! end, so it leaves word in the store, and the login looks for that when its session is there.
//!
//! The logouts of a provider are numbered, for a user who has logged out may come back at once, at some providers even with
//! the same `sid`: those words count that were left since the login asked for its tokens.
//!
//! This is for the back channel alone, whose tokens are signed: by the front channel anybody could fill the store with
//! words.

use std::time::Duration;

use crate::session::Sessions;
use crate::session::record::ExternalLogin;
use crate::session::store::StoreError;

/// Longer than a login takes from the provider's tokens to its session: several answers of the provider, each of which has
/// a time-out of seconds.
const WORD_LASTS: Duration = Duration::from_secs(120);

/// The numbers of a provider begin anew after this long. A login that meets just that does not know what it has missed.
const NUMBERS_LAST: Duration = Duration::from_secs(24 * 3600);

/// Among so many logouts a login looks for its own. That is dozens in each second that it takes.
const SINCE_MAX: u64 = 1000;

/// How many logouts a provider had told of before a login asked for its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Before(u64);

/// To be said before the sessions of these names are looked for: of a login, either its session is found then, or this by
/// the login.
pub(super) async fn leave_word(sessions: &Sessions, issuer: &str, handles: &[String]) -> Result<(), StoreError> {
    let store = sessions.store();
    let number = store.increment(&of_issuer(issuer), NUMBERS_LAST).await?.value;
    for handle in handles {
        store.increment(&of_logout(handle, number), WORD_LASTS).await?;
    }
    Ok(())
}

/// To be asked before the provider is asked for tokens.
pub(super) async fn before(sessions: &Sessions, issuer: &str) -> Result<Before, StoreError> {
    sessions.store().count(&of_issuer(issuer)).await.map(Before)
}

/// Whether the provider has ended this login meanwhile, or may have. To be asked when its session is there.
pub(super) async fn is_logged_out(
    sessions: &Sessions,
    login: &ExternalLogin,
    before: Before,
) -> Result<bool, StoreError> {
    let store = sessions.store();
    let now = store.count(&of_issuer(&login.issuer)).await?;
    if now.checked_sub(before.0).is_none_or(|since| SINCE_MAX < since) {
        // To be on the safe side: who is asked to log in once more loses less than who is not logged out.
        let (provider, before) = (&login.provider, before.0);
        tracing::warn!(provider, before, now, "login refused: too many logouts meanwhile to find its own");
        return Ok(true);
    }
    for handle in login.handles() {
        for number in before.0 + 1..=now {
            if store.count(&of_logout(&handle, number)).await? != 0 {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn of_logout(handle: &str, number: u64) -> String {
    format!("oidc logout\0{number}\0{handle}")
}

fn of_issuer(issuer: &str) -> String {
    format!("oidc logouts\0{issuer}")
}
