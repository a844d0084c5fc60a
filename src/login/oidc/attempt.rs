//! Which login is this the answer to? What we asked is kept by the browser alone, sealed, in a cookie per attempt.
//!
//! So nothing is stored for somebody who is not known, several tabs can log in at once, and an answer that another
//! browser got is the answer to nothing. The cookie is named after its `state`, and is gone when the answer has come.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use hkdf::Hkdf;
use http::{HeaderMap, HeaderValue};
use rand::TryRng;
use rand::rngs::{SysError, SysRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::session::cookie::{SessionCookie, named_like, sole_value};
use crate::session::seal::KeyRing;

/// One login that has begun, or one logout at the provider.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Attempt {
    pub(super) provider: String,
    pub(super) purpose: Purpose,
    pub(super) state: String,
    pub(super) nonce: String,
    /// RFC 7636.
    pub(super) verifier: String,
    /// Our origin, to which the answer comes.
    pub(super) origin: String,
    pub(super) return_to: String,
    pub(super) acr: Vec<String>,
    /// In s.
    pub(super) max_age: Option<u64>,
    /// The session that the login is to replace, where its cookie does not come with the answer.
    pub(super) replaces: Option<String>,
    /// Unix time in s.
    pub(super) begun: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Purpose {
    Login,
    Logout,
}

/// Opens what any instance of this deployment has sealed.
pub(super) enum Seal {
    Ring(Arc<KeyRing>),
    Own([u8; 32]),
}

/// The cookies of one browser's attempts.
#[derive(Debug)]
pub(super) struct AttemptCookies {
    family: String,
    rounds: String,
    secure: bool,
}

/// How long somebody may sit before the provider's page, in s.
pub(super) const LIFE: u64 = 600;
/// More tabs than this do not log in at the same time; the oldest attempt makes room.
const ATTEMPTS_MAX: usize = 5;
/// So often a browser is sent to providers within [`ROUNDS_WINDOW`]: more is a circle.
const ROUNDS_MAX: u32 = 10;
/// In s.
const ROUNDS_WINDOW: u64 = 60;
const NONCE_BYTES: usize = 24;
/// Of name and value (RFC 6265bis, section 5.6).
const COOKIE_BYTES_MAX: usize = 4096;
/// Of a cookie's name: so much of its `state`.
pub const NAME_CHARS: usize = 8;
const LABEL: &[u8] = b"cloakroom login attempt 1";

/// What the names of the cookies begin with beside a session cookie of this name; [`NAME_CHARS`] characters follow.
pub fn attempt_cookie_family(session: &str) -> String {
    format!("{session}-attempt-")
}

/// The name of the cookie that counts how often a browser was sent to a provider.
pub fn rounds_cookie_name(session: &str) -> String {
    format!("{session}-rounds")
}

impl Attempt {
    pub(super) fn begin(
        provider: &str,
        purpose: Purpose,
        origin: &str,
        return_to: String,
        now: u64,
    ) -> Result<Self, SysError> {
        Ok(Self {
            provider: provider.to_owned(),
            purpose,
            state: random::<16>()?,
            nonce: random::<16>()?,
            verifier: random::<32>()?,
            origin: origin.to_owned(),
            return_to,
            acr: Vec::new(),
            max_age: None,
            replaces: None,
            begun: now,
        })
    }

    /// RFC 7636, section 4.2.
    pub(super) fn code_challenge(&self) -> String {
        URL_SAFE_NO_PAD.encode(Sha256::digest(&self.verifier))
    }

    pub(super) fn is_over(&self, now: u64) -> bool {
        self.begun.saturating_add(LIFE) < now
    }
}

impl Seal {
    /// With a key of the ring, else with one that follows from the client's secret, which all instances have as well;
    /// without either a key of this process alone.
    pub(super) fn new(ring: Option<&Arc<KeyRing>>, client_secret: Option<&str>) -> Result<Self, SysError> {
        let mut key = [0; 32];
        match (ring, client_secret) {
            (Some(ring), _) => return Ok(Self::Ring(Arc::clone(ring))),
            (None, Some(secret)) => {
                let expanded = Hkdf::<Sha256>::new(None, secret.as_bytes()).expand(LABEL, &mut key);
                expanded.expect("32 bytes are one block of SHA-256, and up to 255 may be asked for");
            }
            (None, None) => SysRng.try_fill_bytes(&mut key)?,
        }
        Ok(Self::Own(key))
    }

    /// The one that seals first; the ring may have been read again since the last time.
    fn ciphers(&self) -> Vec<XChaCha20Poly1305> {
        let keys = match self {
            Self::Ring(ring) => ring.derived(LABEL),
            Self::Own(key) => vec![*key],
        };
        keys.iter().map(|key| XChaCha20Poly1305::new(key.into())).collect()
    }

    fn seal(&self, name: &str, begun: u64, attempt: &Attempt) -> Result<Option<String>, SysError> {
        let mut nonce = [0; NONCE_BYTES];
        SysRng.try_fill_bytes(&mut nonce)?;
        let Ok(plain) = rmp_serde::to_vec(attempt) else { return Ok(None) };
        let payload = Payload { msg: &plain, aad: &bound_to(name, begun) };
        let sealed = self.ciphers().first().and_then(|key| key.encrypt(&XNonce::from(nonce), payload).ok());
        Ok(sealed.map(|sealed| format!("{begun:x}.{}", URL_SAFE_NO_PAD.encode([&nonce[..], &sealed].concat()))))
    }

    fn open(&self, name: &str, value: &[u8]) -> Option<Attempt> {
        let (begun, sealed) = std::str::from_utf8(value).ok()?.split_once('.')?;
        let begun = u64::from_str_radix(begun, 16).ok()?;
        let bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, ciphertext) = bytes.split_first_chunk::<NONCE_BYTES>()?;
        let aad = bound_to(name, begun);
        let plain = self
            .ciphers()
            .iter()
            .find_map(|key| key.decrypt(&XNonce::from(*nonce), Payload { msg: ciphertext, aad: &aad }).ok())?;
        rmp_serde::from_slice(&plain).ok()
    }
}

impl AttemptCookies {
    pub(super) fn beside(session: &SessionCookie, secure: bool) -> Self {
        let name = session.name();
        Self { family: attempt_cookie_family(name), rounds: rounds_cookie_name(name), secure }
    }

    /// The attempt with this state, if this browser has begun it at this provider, for this purpose.
    pub(super) fn find(&self, headers: &HeaderMap, seal: &Seal, provider: &str, state: &str) -> Option<Attempt> {
        let name = self.name(state)?;
        let attempt = seal.open(&name, sole_value(headers, &name)?)?;
        // The seal covers the name alone, which is a part of the state.
        (attempt.state == state && attempt.provider == provider).then_some(attempt)
    }

    /// The cookie of a new attempt, and the end of the oldest ones that it would be too many with.
    pub(super) fn set(
        &self,
        headers: &HeaderMap,
        seal: &Seal,
        attempt: &Attempt,
        now: u64,
    ) -> Result<Vec<HeaderValue>, SysError> {
        let name = self.name(&attempt.state).unwrap_or_default();
        let mut sealed = seal.seal(&name, attempt.begun, attempt)?;
        if sealed.as_ref().is_some_and(|value| COOKIE_BYTES_MAX < name.len() + value.len()) {
            // A browser would not keep it: rather a login that leads to the front page.
            sealed = seal.seal(&name, attempt.begun, &Attempt { return_to: String::new(), ..attempt.clone() })?;
        }
        let Some(value) = sealed else { return Ok(Vec::new()) };
        let begun = |value: &[u8]| {
            let (begun, _) = std::str::from_utf8(value).ok()?.split_once('.')?;
            u64::from_str_radix(begun, 16).ok().filter(|begun| *begun <= now)
        };
        let mut others: Vec<_> = named_like(headers, &self.family, NAME_CHARS)
            .map(|(name, value)| (begun(value).unwrap_or_default(), name.to_owned()))
            .collect();
        others.sort();
        let too_many = (others.len() + 1).saturating_sub(ATTEMPTS_MAX);
        let over = others.iter().filter(|(begun, _)| begun.saturating_add(LIFE) < now).count();
        let gone = others.iter().take(too_many.max(over)).map(|(_, name)| self.field(name, "", 0));
        Ok(gone.chain([self.field(&name, &value, LIFE)]).collect())
    }

    pub(super) fn clear(&self, state: &str) -> Option<HeaderValue> {
        Some(self.field(&self.name(state)?, "", 0))
    }

    /// Counts that this browser is sent to a provider once more; none when it goes in a circle.
    pub(super) fn count_round(&self, headers: &HeaderMap, now: u64) -> Option<HeaderValue> {
        let counted = sole_value(headers, &self.rounds).and_then(|value| {
            let (begun, rounds) = std::str::from_utf8(value).ok()?.split_once('.')?;
            let begun = begun.parse::<u64>().ok()?;
            (begun <= now && now < begun.saturating_add(ROUNDS_WINDOW)).then_some((begun, rounds.parse::<u32>().ok()?))
        });
        let (begun, rounds) = counted.unwrap_or((now, 0));
        (rounds < ROUNDS_MAX).then(|| self.field(&self.rounds, &format!("{begun}.{}", rounds + 1), ROUNDS_WINDOW))
    }

    fn name(&self, state: &str) -> Option<String> {
        let is_plain = |text: &&str| text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        let start = state.get(..NAME_CHARS).filter(is_plain)?;
        Some(format!("{}{start}", self.family))
    }

    /// `Lax`: the provider's redirect is a navigation from another site, and must bring it.
    fn field(&self, name: &str, value: &str, max_age: u64) -> HeaderValue {
        let secure = if self.secure { "; Secure" } else { "" };
        let field = format!("{name}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Lax{secure}");
        let mut field = HeaderValue::try_from(field).expect("a cookie name that the configuration check let pass");
        field.set_sensitive(true);
        field
    }
}

fn bound_to(name: &str, begun: u64) -> Vec<u8> {
    [name.as_bytes(), b"\0", &begun.to_be_bytes()].concat()
}

fn random<const BYTES: usize>() -> Result<String, SysError> {
    let mut bytes = [0; BYTES];
    SysRng.try_fill_bytes(&mut bytes)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal(..)")
    }
}

impl std::fmt::Debug for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attempt").field("provider", &self.provider).finish_non_exhaustive()
    }
}
