//! Who may do more than look? Who shows the token.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header;
use http::request::Parts;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// `admin.token`, as a hash: hashes are compared, so that its length does not show.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    pub fn new(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// One `Authorization` field, of the scheme `Bearer` (RFC 6750, section 2.1), in constant time.
    pub(super) fn is_shown_by(&self, request: &Parts) -> bool {
        credentials(request, b"Bearer ").is_some_and(|token| self.is(token))
    }

    /// As the password of HTTP Basic (RFC 7617), whatever the user name: a browser asks its user for that. Only for what
    /// changes nothing, as a browser sends it again by itself.
    pub(super) fn is_password_of(&self, request: &Parts) -> bool {
        let decoded = credentials(request, b"Basic ").and_then(|encoded| STANDARD.decode(encoded).ok());
        let password = decoded.as_deref().and_then(|pair| pair.splitn(2, |byte| *byte == b':').nth(1));
        password.is_some_and(|token| self.is(token))
    }

    fn is(&self, token: &[u8]) -> bool {
        bool::from(Sha256::digest(token).as_slice().ct_eq(&self.0))
    }
}

/// What stands after the scheme in the only `Authorization` field.
fn credentials<'r>(request: &'r Parts, scheme: &[u8]) -> Option<&'r [u8]> {
    let mut fields = request.headers.get_all(header::AUTHORIZATION).iter();
    let (Some(field), None) = (fields.next(), fields.next()) else { return None };
    let (shown, credentials) = field.as_bytes().split_at_checked(scheme.len())?;
    shown.eq_ignore_ascii_case(scheme).then_some(credentials)
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}
