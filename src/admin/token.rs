//! Who may do more than look? Who shows the token.

use http::header;
use http::request::Parts;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// `admin.token`, as a hash: hashes are compared, so that its length does not show.
#[derive(Clone)]
pub struct Token([u8; 32]);

const BEARER: &[u8] = b"Bearer ";

impl Token {
    pub fn new(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// One `Authorization` field, of the scheme `Bearer` (RFC 6750, section 2.1), in constant time.
    pub(super) fn is_shown_by(&self, request: &Parts) -> bool {
        let mut fields = request.headers.get_all(header::AUTHORIZATION).iter();
        let (Some(field), None) = (fields.next(), fields.next()) else { return false };
        let Some((scheme, token)) = field.as_bytes().split_at_checked(BEARER.len()) else { return false };
        scheme.eq_ignore_ascii_case(BEARER) && bool::from(Sha256::digest(token).as_slice().ct_eq(&self.0))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}
