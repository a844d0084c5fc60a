//! Did a page of ours send this form, from this very browser?
//!
//! Two checks, both needed. The browser's own word: `Sec-Fetch-Site`, or `Origin` and `Referer` where a browser
//! does not send it. And a token: an HMAC under a key that only this browser holds in a cookie, so that any instance
//! can check it and no server keeps anything. Each response masks its token anew, which leaves a compressing proxy
//! in front nothing to measure (BREACH).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use http::header::{ORIGIN, REFERER};
use http::{HeaderMap, HeaderValue};
use rand::TryRng;
use rand::rngs::{SysError, SysRng};
use sha2::Sha256;

use crate::session::cookie::{SessionCookie, sole_value};
use crate::session::id::SessionId;

/// What a token is good for: one made for a login ends no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Login,
    Logout,
    /// To end sessions of one's own.
    Sessions,
}

/// The secret that binds forms to a browser.
pub struct FormKey([u8; KEY_BYTES]);

/// The cookie that holds a [`FormKey`] before there is a session.
#[derive(Debug)]
pub struct LoginCookie {
    name: String,
    secure: bool,
}

const KEY_BYTES: usize = 32;
const MASK_BYTES: usize = 16;

/// How long a login page may lie open, in seconds.
const LOGIN_COOKIE_SECONDS: u32 = 600;

/// Whether the browser says that a page of `origin` sent this request.
///
/// `Sec-Fetch-Site` decides where it is sent, and only `same-origin` will do: `none` is an address typed by hand, which
/// never posts a form (Fetch Metadata, section 2.3). Without it `Origin` decides, and without that `Referer`.
pub fn is_same_origin(headers: &HeaderMap, origin: &str) -> bool {
    if headers.contains_key("sec-fetch-site") {
        return only(headers, "sec-fetch-site") == Some("same-origin");
    }
    if headers.contains_key(ORIGIN) {
        return only(headers, ORIGIN.as_str()).is_some_and(|sent| sent.eq_ignore_ascii_case(origin));
    }
    referring_page(headers, origin).is_some()
}

/// Path and query of the page of `origin` that led here, as the browser says.
pub fn referring_page<'h>(headers: &'h HeaderMap, origin: &str) -> Option<&'h str> {
    let (sent, rest) = only(headers, REFERER.as_str())?.split_at_checked(origin.len())?;
    (sent.eq_ignore_ascii_case(origin) && rest.starts_with('/')).then_some(rest)
}

impl FormKey {
    pub fn generate() -> Result<Self, SysError> {
        random().map(Self)
    }

    /// The key of a logged-in browser: it follows from the session cookie, so it needs no cookie of its own.
    pub fn of_session(id: &SessionId) -> Self {
        let mac = keyed(id.to_cookie_value().as_bytes()).chain_update(b"cloakroom form key");
        Self(mac.finalize().into_bytes().into())
    }

    /// A token for one form, different each time: `base64url(mask || HMAC(key, length(purpose) || purpose || mask))`.
    pub fn token(&self, purpose: Purpose) -> Result<String, SysError> {
        let mask: [u8; MASK_BYTES] = random()?;
        let mac = self.mac(purpose, &mask).finalize().into_bytes();
        Ok(URL_SAFE_NO_PAD.encode([&mask[..], &mac[..]].concat()))
    }

    /// Whether [`Self::token`] made it for `purpose`, in constant time.
    pub fn accepts(&self, purpose: Purpose, token: &str) -> bool {
        let Ok(bytes) = URL_SAFE_NO_PAD.decode(token) else { return false };
        let Some((mask, mac)) = bytes.split_first_chunk::<MASK_BYTES>() else { return false };
        self.mac(purpose, mask).verify_slice(mac).is_ok()
    }

    fn mac(&self, purpose: Purpose, mask: &[u8; MASK_BYTES]) -> Hmac<Sha256> {
        let purpose = match purpose {
            Purpose::Login => "login",
            Purpose::Logout => "logout",
            Purpose::Sessions => "sessions",
        };
        // The length keeps purpose and mask apart: no two pairs give the same message.
        let length = u8::try_from(purpose.len()).expect("every purpose is short");
        keyed(&self.0).chain_update([length]).chain_update(purpose).chain_update(mask)
    }
}

impl std::fmt::Debug for FormKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FormKey(..)")
    }
}

/// The name of the login's own cookie beside a session cookie of this name: as secret from backends as that one.
pub fn login_cookie_name(session: &str) -> String {
    format!("{session}-login")
}

impl LoginCookie {
    /// Named after the session cookie, prefix included: `__Host-session-login`, on plain HTTP `session-login`.
    pub fn beside(session: &SessionCookie, secure: bool) -> Self {
        Self { name: login_cookie_name(session.name()), secure }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key in the request's `Cookie` fields: none when absent, malformed, or there twice.
    pub fn find(&self, headers: &HeaderMap) -> Option<FormKey> {
        let value = sole_value(headers, &self.name)?;
        URL_SAFE_NO_PAD.decode(value).ok()?.try_into().ok().map(FormKey)
    }

    /// `Lax`, not `Strict`: a link from another site to a protected page ends at the login page, and must find there
    /// the cookie of the login pages that are already open, or it would replace it.
    pub fn set(&self, key: &FormKey) -> HeaderValue {
        self.field(&URL_SAFE_NO_PAD.encode(key.0), LOGIN_COOKIE_SECONDS)
    }

    pub fn clear(&self) -> HeaderValue {
        self.field("", 0)
    }

    fn field(&self, value: &str, max_age: u32) -> HeaderValue {
        let secure = if self.secure { "; Secure" } else { "" };
        let field = format!("{}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Lax{secure}", self.name);
        let mut field = HeaderValue::try_from(field).expect("a cookie name that the configuration check let pass");
        field.set_sensitive(true);
        field
    }
}

/// The field's value, when it is there once and readable.
fn only<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let mut values = headers.get_all(name).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    value.to_str().ok()
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes a key of any length")
}

fn random<const N: usize>() -> Result<[u8; N], SysError> {
    let mut bytes = [0; N];
    SysRng.try_fill_bytes(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN_OF_OURS: &str = "https://app.example";

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn only_our_own_pages_count_as_same_origin() {
        let cases: &[(&[(&str, &str)], bool)] = &[
            (&[("sec-fetch-site", "same-origin")], true),
            (&[("sec-fetch-site", "same-origin"), ("origin", "null")], true),
            (&[("sec-fetch-site", "same-site")], false),
            (&[("sec-fetch-site", "cross-site")], false),
            (&[("sec-fetch-site", "none")], false),
            (&[("sec-fetch-site", "")], false),
            (&[("sec-fetch-site", "Same-Origin")], false),
            (&[("sec-fetch-site", "cross-site"), ("origin", "https://app.example")], false),
            (&[("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")], false),
            (&[("sec-fetch-site", "same-origin"), ("sec-fetch-site", "same-origin")], false),
            (&[("origin", "https://app.example")], true),
            (&[("origin", "HTTPS://App.Example")], true),
            (&[("origin", "https://app.example"), ("referer", "https://evil.example/")], true),
            (&[("origin", "null")], false),
            (&[("origin", "http://app.example")], false),
            (&[("origin", "https://app.example:8443")], false),
            (&[("origin", "https://app.example.evil.example")], false),
            (&[("origin", "https://evil.example"), ("referer", "https://app.example/")], false),
            (&[("origin", "https://app.example"), ("origin", "https://app.example")], false),
            (&[("origin", "")], false),
            (&[("referer", "https://app.example/.cloakroom/login?return_to=%2F")], true),
            (&[("referer", "https://app.example")], false),
            (&[("referer", "https://app.example.evil.example/")], false),
            (&[("referer", "https://app.example@evil.example/")], false),
            (&[("referer", "https://app.example:8443/")], false),
            (&[("referer", "https://evil.example/https://app.example/")], false),
            (&[("referer", "/login")], false),
            (&[], false),
        ];
        for (fields, expected) in cases {
            assert_eq!(is_same_origin(&headers(fields), ORIGIN_OF_OURS), *expected, "{fields:?}");
        }
    }

    #[test]
    fn a_token_holds_for_its_browser_and_its_purpose_alone() {
        let key = FormKey::generate().unwrap();
        let token = key.token(Purpose::Login).unwrap();

        assert!(key.accepts(Purpose::Login, &token));
        assert!(!key.accepts(Purpose::Logout, &token), "a login token ends no session");
        assert!(!FormKey::generate().unwrap().accepts(Purpose::Login, &token), "another browser's key");
        assert_ne!(key.token(Purpose::Login).unwrap(), token, "each response masks its token anew");
    }

    #[test]
    fn a_changed_token_is_refused() {
        let key = FormKey::generate().unwrap();
        let token = key.token(Purpose::Login).unwrap();
        for at in 0..token.len() {
            let changed = if token.as_bytes()[at] == b'A' { "B" } else { "A" };
            let forged = format!("{}{changed}{}", &token[..at], &token[at + 1..]);
            assert!(!key.accepts(Purpose::Login, &forged), "changed at {at}");
        }
        for forged in ["", "A", &token[1..], &token[..token.len() - 1], &format!("{token}A"), &format!("{token}="), "é"]
        {
            assert!(!key.accepts(Purpose::Login, forged), "{forged:?}");
        }
    }

    #[test]
    fn the_login_cookie_is_found_only_when_it_is_there_once_and_whole() {
        let cookie = LoginCookie { name: "__Host-session-login".to_owned(), secure: true };
        let key = FormKey::generate().unwrap();
        let token = key.token(Purpose::Login).unwrap();
        let value = URL_SAFE_NO_PAD.encode(key.0);
        let pair = format!("__Host-session-login={value}");
        let cases = [
            (vec![pair.clone()], true),
            (vec![format!("a=b; {pair}; c=d")], true),
            (vec!["a=b".to_owned(), pair.clone()], true),
            (vec![format!("{pair}; {pair}")], false),
            (vec![pair.clone(), pair.clone()], false),
            (vec![format!("__host-session-login={value}")], false),
            (vec![format!("session-login={value}")], false),
            (vec![format!("__Host-session={value}")], false),
            (vec![format!("{pair}A")], false),
            (vec![pair[..pair.len() - 1].to_owned()], false),
            (vec!["__Host-session-login=".to_owned()], false),
            (vec!["__Host-session-login".to_owned()], false),
            (vec![], false),
        ];
        for (fields, expected) in cases {
            let fields: Vec<(&str, &str)> = fields.iter().map(|field| ("cookie", field.as_str())).collect();
            let found = cookie.find(&headers(&fields));
            assert_eq!(found.is_some_and(|found| found.accepts(Purpose::Login, &token)), expected, "{fields:?}");
        }
    }

    #[test]
    fn the_login_cookie_has_every_guard() {
        let key = FormKey([0; KEY_BYTES]);
        let secure = LoginCookie { name: "__Host-session-login".to_owned(), secure: true };
        let value = "A".repeat(43);
        assert_eq!(
            secure.set(&key),
            format!("__Host-session-login={value}; Path=/; Max-Age=600; HttpOnly; SameSite=Lax; Secure").as_str()
        );
        assert_eq!(secure.clear(), "__Host-session-login=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax; Secure");
        let plain = LoginCookie { name: "session-login".to_owned(), secure: false };
        assert_eq!(plain.clear(), "session-login=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax");
        assert!(!format!("{key:?} {:?}", secure.set(&key)).contains("AAA"), "the key does not print itself");
    }
}
