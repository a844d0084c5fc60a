//! What of a logout at the provider that comes while the same login is under way? There is no session yet that it could
//! end, so it leaves word in the store, and the login looks for that when its session is there.
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

/// How many logouts a provider had told of before a login asked for its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Before(u64);

/// To be said before the sessions of these names are looked for: of a login, either its session is found then, or this by
/// the login.
pub(super) async fn leave_word(sessions: &Sessions, issuer: &str, handles: &[String]) -> Result<(), StoreError> {
    for handle in handles {
        sessions.store().increment(&of_handle(handle), WORD_LASTS).await?;
    }
    sessions.store().increment(&of_issuer(issuer), WORD_LASTS).await.map(|_count| ())
}

/// To be asked before the provider is asked for tokens.
pub(super) async fn before(sessions: &Sessions, issuer: &str) -> Result<Before, StoreError> {
    sessions.store().count(&of_issuer(issuer)).await.map(Before)
}

/// Whether the provider has ended this login meanwhile. To be asked when its session is there.
///
/// A provider's session that has ended does not begin again; a user who has logged out does. So word of a user counts only
/// if this provider has told of a logout since: word from before alone would refuse who comes back within two minutes.
pub(super) async fn is_logged_out(
    sessions: &Sessions,
    login: &ExternalLogin,
    before: Before,
) -> Result<bool, StoreError> {
    if let Some(sid) = &login.sid
        && sessions.store().count(&of_handle(&ExternalLogin::handle_of_sid(&login.issuer, sid))).await? != 0
    {
        return Ok(true);
    }
    if sessions.store().count(&of_issuer(&login.issuer)).await? == before.0 {
        return Ok(false);
    }
    for handle in login.handles() {
        if sessions.store().count(&of_handle(&handle)).await? != 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

fn of_handle(handle: &str) -> String {
    format!("oidc logged out\0{handle}")
}

fn of_issuer(issuer: &str) -> String {
    format!("oidc logouts\0{issuer}")
}
