//! What does a signed token say, and is it meant for us? The rules of ID tokens and of logout tokens.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256, Sha384, Sha512};
use subtle::ConstantTimeEq;

use super::jws::{Algorithm, Signed};

/// Whose token it must be, and whom it must be for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parties<'p> {
    pub(super) issuer: &'p str,
    pub(super) client_id: &'p str,
    /// Unix time in s.
    pub(super) now: u64,
}

/// What was asked of the login that an ID token is the answer to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    /// None for a token of a refresh, which answers no authorization request.
    pub(super) nonce: Option<&'a str>,
    pub(super) acr: &'a [String],
    /// In s.
    pub(super) max_age: Option<u64>,
    /// How long ago it was asked, in s: so much older than `max_age` may the login be by now.
    pub(super) waited: u64,
    pub(super) access_token: Option<&'a str>,
}

/// What an ID token says of the login; of the user, its claims do.
#[derive(Debug)]
pub(super) struct IdToken {
    pub(super) subject: String,
    pub(super) sid: Option<String>,
    /// When the user proved who they are, Unix time in s, by our clock: however wrong the provider's is, it knows how long
    /// before this token that was.
    pub(super) auth_time: Option<u64>,
    pub(super) acr: Option<String>,
    pub(super) claims: Map<String, Value>,
}

/// Whose sessions a provider ends.
#[derive(Debug)]
pub(super) struct LogoutToken {
    pub(super) subject: Option<String>,
    pub(super) sid: Option<String>,
    pub(super) id: String,
    /// Unix time in s.
    pub(super) expires: u64,
}

/// The rule that a token breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenError {
    /// A claim that must be there is missing, or of another type.
    Claim(&'static str),
    Issuer,
    Audience,
    /// It speaks of another user than the tokens before it.
    Subject,
    Expired,
    NotYetValid,
    Nonce,
    AccessTokenHash,
    /// The user logged in longer ago than was asked for.
    TooOld,
    /// The user logged in in another way than was asked for.
    Acr,
    Kind,
    Event,
}

/// How far the provider's clock may be from ours, in s.
const SKEW: u64 = 60;
/// OpenID Connect Core 1.0, section 2: `sub` is at most 255 ASCII characters.
const SUBJECT_BYTES_MAX: usize = 255;
const ID_BYTES_MAX: usize = 512;
/// A logout that is older is not carried out: its `jti` need not be remembered for longer. In s.
const LOGOUT_AGE_MAX: u64 = 600;
const LOGOUT_EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";

impl IdToken {
    /// OpenID Connect Core 1.0, section 3.1.3.7.
    pub(super) fn check(signed: Signed, parties: &Parties<'_>, asked: &Asked<'_>) -> Result<Self, TokenError> {
        let Signed { algorithm, kind, claims } = signed;
        // Another kind of token of the same provider, which has other rules (RFC 8725, section 3.11).
        if kind.is_some_and(|kind| kind != "jwt") {
            return Err(TokenError::Kind);
        }
        let issued = parties.check(&claims)?;
        if let Some(nonce) = asked.nonce {
            let given = text(&claims, "nonce")?.ok_or(TokenError::Nonce)?;
            if !bool::from(given.as_bytes().ct_eq(nonce.as_bytes())) {
                return Err(TokenError::Nonce);
            }
        }
        if let (Some(hash), Some(token)) = (text(&claims, "at_hash")?, asked.access_token)
            && hash != half_of_hash(algorithm, token)
        {
            return Err(TokenError::AccessTokenHash);
        }
        let age = number(&claims, "auth_time")?.map(|auth_time| issued.saturating_sub(auth_time));
        if let Some(max_age) = asked.max_age
            && max_age.saturating_add(asked.waited) < age.ok_or(TokenError::Claim("auth_time"))?
        {
            return Err(TokenError::TooOld);
        }
        let auth_time = age.map(|age| parties.now.saturating_sub(age));
        let acr = text(&claims, "acr")?.map(str::to_owned);
        if !asked.acr.is_empty() && !acr.as_ref().is_some_and(|acr| asked.acr.contains(acr)) {
            return Err(TokenError::Acr);
        }
        let subject = subject(&claims)?.ok_or(TokenError::Claim("sub"))?;
        Ok(Self { subject, sid: id(&claims, "sid")?, auth_time, acr, claims })
    }
}

impl LogoutToken {
    /// OpenID Connect Back-Channel Logout 1.0, section 2.6.
    pub(super) fn check(signed: Signed, parties: &Parties<'_>) -> Result<Self, TokenError> {
        let Signed { algorithm: _, kind, claims } = signed;
        if kind.is_some_and(|kind| kind != "logout+jwt" && kind != "jwt") {
            return Err(TokenError::Kind);
        }
        let issued = parties.check(&claims)?;
        if issued.saturating_add(LOGOUT_AGE_MAX) < parties.now {
            return Err(TokenError::Expired);
        }
        let event = claims.get("events").and_then(Value::as_object).and_then(|events| events.get(LOGOUT_EVENT));
        if !event.is_some_and(Value::is_object) {
            return Err(TokenError::Event);
        }
        // So that an ID token is never taken for a logout.
        if claims.contains_key("nonce") {
            return Err(TokenError::Nonce);
        }
        let (subject, sid) = (subject(&claims)?, id(&claims, "sid")?);
        if subject.is_none() && sid.is_none() {
            return Err(TokenError::Claim("sub"));
        }
        let id = id(&claims, "jti")?.ok_or(TokenError::Claim("jti"))?;
        Ok(Self { subject, sid, id, expires: issued.saturating_add(LOGOUT_AGE_MAX + SKEW) })
    }
}

impl Parties<'_> {
    /// What both kinds have in common; when it was issued.
    fn check(&self, claims: &Map<String, Value>) -> Result<u64, TokenError> {
        self.check_names(claims)?;
        let latest = self.now.saturating_add(SKEW);
        if number(claims, "exp")?.ok_or(TokenError::Claim("exp"))?.saturating_add(SKEW) <= self.now {
            return Err(TokenError::Expired);
        }
        let issued = number(claims, "iat")?.ok_or(TokenError::Claim("iat"))?;
        if latest < issued || number(claims, "nbf")?.is_some_and(|begins| latest < begins) {
            return Err(TokenError::NotYetValid);
        }
        Ok(issued)
    }

    /// Also a signed answer of the UserInfo endpoint says whose it is, and whom for; it has no end, since nobody shows it
    /// around (OpenID Connect Core 1.0, section 5.3.2).
    pub(super) fn check_names(&self, claims: &Map<String, Value>) -> Result<(), TokenError> {
        if text(claims, "iss")?.ok_or(TokenError::Claim("iss"))? != self.issuer {
            return Err(TokenError::Issuer);
        }
        let audiences = match claims.get("aud").ok_or(TokenError::Claim("aud"))? {
            Value::String(audience) => vec![audience.as_str()],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => return Err(TokenError::Claim("aud")),
        };
        let presenter = text(claims, "azp")?;
        let is_ours = audiences.contains(&self.client_id);
        let is_for_others_too = 1 < audiences.len() && presenter.is_none();
        if !is_ours || is_for_others_too || presenter.is_some_and(|presenter| presenter != self.client_id) {
            return Err(TokenError::Audience);
        }
        Ok(())
    }
}

fn text<'c>(claims: &'c Map<String, Value>, name: &'static str) -> Result<Option<&'c str>, TokenError> {
    match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_str().map(Some).ok_or(TokenError::Claim(name)),
    }
}

/// Some providers write times with a fraction (RFC 7519, section 2: NumericDate).
fn number(claims: &Map<String, Value>, name: &'static str) -> Result<Option<u64>, TokenError> {
    match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let fraction =
                || value.as_f64().filter(|number| 0.0 <= *number && *number < 1e15).map(|number| number as u64);
            value.as_u64().or_else(fraction).map(Some).ok_or(TokenError::Claim(name))
        }
    }
}

fn subject(claims: &Map<String, Value>) -> Result<Option<String>, TokenError> {
    let subject = text(claims, "sub")?;
    if subject.is_some_and(|subject| subject.is_empty() || SUBJECT_BYTES_MAX < subject.len()) {
        return Err(TokenError::Claim("sub"));
    }
    Ok(subject.map(str::to_owned))
}

fn id(claims: &Map<String, Value>, name: &'static str) -> Result<Option<String>, TokenError> {
    let id = text(claims, name)?;
    if id.is_some_and(|id| id.is_empty() || ID_BYTES_MAX < id.len()) {
        return Err(TokenError::Claim(name));
    }
    Ok(id.map(str::to_owned))
}

/// `at_hash` of an access token (OpenID Connect Core 1.0, section 3.1.3.6).
fn half_of_hash(algorithm: Algorithm, token: &str) -> String {
    let hash = match algorithm {
        Algorithm::RS384 | Algorithm::PS384 | Algorithm::ES384 => Sha384::digest(token).to_vec(),
        // Ed25519 hashes with SHA-512.
        Algorithm::RS512 | Algorithm::PS512 | Algorithm::EdDSA => Sha512::digest(token).to_vec(),
        _ => Sha256::digest(token).to_vec(),
    };
    URL_SAFE_NO_PAD.encode(&hash[..hash.len() / 2])
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim(name) => write!(f, "its claim {name} is missing or not as it must be"),
            Self::Issuer => f.write_str("it is of another issuer"),
            Self::Audience => f.write_str("it is meant for somebody else"),
            Self::Subject => f.write_str("it speaks of somebody else"),
            Self::Expired => f.write_str("it has expired"),
            Self::NotYetValid => f.write_str("it is not valid yet"),
            Self::Nonce => f.write_str("its nonce is not the one of this login"),
            Self::AccessTokenHash => f.write_str("it came with another access token than its own"),
            Self::TooOld => f.write_str("the login is older than was asked for"),
            Self::Acr => f.write_str("the login is of another kind than was asked for"),
            Self::Kind => f.write_str("it is another kind of token"),
            Self::Event => f.write_str("it tells of another event than a logout"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_800_000_000;
    const PARTIES: Parties<'_> = Parties { issuer: "https://p", client_id: "us", now: NOW };
    const ASKED: Asked<'_> =
        Asked { nonce: Some("n"), acr: &[], max_age: None, waited: 0, access_token: Some("token") };

    fn signed(kind: Option<&str>, claims: &Value, change: &Value) -> Signed {
        let mut claims = claims.as_object().unwrap().clone();
        for (name, value) in change.as_object().unwrap() {
            if value == "absent" {
                claims.remove(name)
            } else {
                claims.insert(name.clone(), value.clone())
            };
        }
        Signed { algorithm: Algorithm::ES256, kind: kind.map(str::to_owned), claims }
    }

    #[test]
    fn an_id_token_keeps_every_rule_or_is_refused() {
        let good = json!({
            "iss": "https://p", "aud": "us", "sub": "s", "exp": NOW + 300, "iat": NOW, "nonce": "n",
            "auth_time": NOW - 60, "acr": "gold",
        });
        let acr = ["gold".to_owned()];
        let strict = Asked { acr: &acr, max_age: Some(60), ..ASKED };
        let cases = [
            (json!({}), ASKED, None),
            (json!({}), strict, None),
            (json!({ "aud": ["us"] }), ASKED, None),
            (json!({ "aud": ["us", "them"], "azp": "us" }), ASKED, None),
            (json!({ "exp": NOW - 59 }), ASKED, None),
            (json!({ "iat": NOW + 60 }), ASKED, None),
            (json!({ "iat": NOW as f64 + 0.5 }), ASKED, None),
            (json!({ "nonce": "absent" }), Asked { nonce: None, ..ASKED }, None),
            (json!({ "at_hash": half_of_hash(Algorithm::ES256, "token") }), ASKED, None),
            (json!({ "iss": "https://p/" }), ASKED, Some(TokenError::Issuer)),
            (json!({ "iss": "absent" }), ASKED, Some(TokenError::Claim("iss"))),
            (json!({ "iss": 1 }), ASKED, Some(TokenError::Claim("iss"))),
            (json!({ "aud": "absent" }), ASKED, Some(TokenError::Claim("aud"))),
            (json!({ "aud": "them" }), ASKED, Some(TokenError::Audience)),
            (json!({ "aud": [] }), ASKED, Some(TokenError::Audience)),
            (json!({ "aud": ["us", "them"] }), ASKED, Some(TokenError::Audience)),
            (json!({ "azp": "them" }), ASKED, Some(TokenError::Audience)),
            (json!({ "exp": "absent" }), ASKED, Some(TokenError::Claim("exp"))),
            (json!({ "exp": NOW - 60 }), ASKED, Some(TokenError::Expired)),
            (json!({ "exp": -1 }), ASKED, Some(TokenError::Claim("exp"))),
            (json!({ "exp": "1900000000" }), ASKED, Some(TokenError::Claim("exp"))),
            (json!({ "iat": "absent" }), ASKED, Some(TokenError::Claim("iat"))),
            (json!({ "iat": NOW + 61 }), ASKED, Some(TokenError::NotYetValid)),
            (json!({ "nbf": NOW + 61 }), ASKED, Some(TokenError::NotYetValid)),
            (json!({ "sub": "absent" }), ASKED, Some(TokenError::Claim("sub"))),
            (json!({ "sub": "" }), ASKED, Some(TokenError::Claim("sub"))),
            (json!({ "sub": 7 }), ASKED, Some(TokenError::Claim("sub"))),
            (json!({ "sub": "s".repeat(256) }), ASKED, Some(TokenError::Claim("sub"))),
            (json!({ "nonce": "absent" }), ASKED, Some(TokenError::Nonce)),
            (json!({ "nonce": "m" }), ASKED, Some(TokenError::Nonce)),
            (json!({ "at_hash": "x" }), ASKED, Some(TokenError::AccessTokenHash)),
            (json!({ "acr": "silver" }), strict, Some(TokenError::Acr)),
            (json!({ "acr": "absent" }), strict, Some(TokenError::Acr)),
            (json!({ "auth_time": NOW - 61 }), strict, Some(TokenError::TooOld)),
            (json!({ "auth_time": NOW - 110, "iat": NOW - 50 }), strict, None),
            (json!({ "auth_time": NOW - 20 }), Asked { max_age: Some(0), waited: 20, ..ASKED }, None),
            (
                json!({ "auth_time": NOW - 21 }),
                Asked { max_age: Some(0), waited: 20, ..ASKED },
                Some(TokenError::TooOld),
            ),
            (json!({ "auth_time": NOW - 61 }), Asked { max_age: Some(u64::MAX), waited: 20, ..ASKED }, None),
            (json!({ "auth_time": "absent" }), strict, Some(TokenError::Claim("auth_time"))),
        ];
        for (change, asked, expected) in cases {
            let checked = IdToken::check(signed(Some("jwt"), &good, &change), &PARTIES, &asked);
            assert_eq!(checked.err(), expected, "{change}");
        }
        for (kind, expected) in [(None, None), (Some("at+jwt"), Some(TokenError::Kind))] {
            let checked = IdToken::check(signed(kind, &good, &json!({})), &PARTIES, &ASKED);
            assert_eq!(checked.err(), expected, "{kind:?}");
        }
    }

    #[test]
    fn a_logout_token_keeps_every_rule_or_is_refused() {
        let good = json!({
            "iss": "https://p", "aud": "us", "sub": "s", "sid": "i", "exp": NOW + 300, "iat": NOW, "jti": "1",
            "events": { LOGOUT_EVENT: {} },
        });
        let cases = [
            (json!({}), None),
            (json!({ "sub": "absent" }), None),
            (json!({ "sid": "absent" }), None),
            (json!({ "sub": "absent", "sid": "absent" }), Some(TokenError::Claim("sub"))),
            (json!({ "events": "absent" }), Some(TokenError::Event)),
            (json!({ "events": {} }), Some(TokenError::Event)),
            (json!({ "events": { LOGOUT_EVENT: true } }), Some(TokenError::Event)),
            (json!({ "events": [LOGOUT_EVENT] }), Some(TokenError::Event)),
            (json!({ "nonce": "n" }), Some(TokenError::Nonce)),
            (json!({ "jti": "absent" }), Some(TokenError::Claim("jti"))),
            (json!({ "iat": NOW - 601 }), Some(TokenError::Expired)),
            (json!({ "exp": NOW - 60 }), Some(TokenError::Expired)),
            (json!({ "aud": "them" }), Some(TokenError::Audience)),
            (json!({ "iss": "https://q" }), Some(TokenError::Issuer)),
        ];
        for (change, expected) in cases {
            let checked = LogoutToken::check(signed(Some("logout+jwt"), &good, &change), &PARTIES);
            assert_eq!(checked.err(), expected, "{change}");
        }
        for (kind, expected) in [(None, None), (Some("jwt"), None), (Some("at+jwt"), Some(TokenError::Kind))] {
            assert_eq!(LogoutToken::check(signed(kind, &good, &json!({})), &PARTIES).err(), expected, "{kind:?}");
        }
    }
}
