//! The cookie that carries the id: found strictly, set with every guard, never shown to a backend.

use http::{HeaderMap, HeaderValue};

use super::id::SessionId;

/// One cookie of ours, as one listener uses it: `__Host-` and `Secure` on HTTPS, neither on plain HTTP.
#[derive(Clone, Debug)]
pub struct SessionCookie {
    name: String,
    secure: bool,
    same_site: cookie::SameSite,
}

impl SessionCookie {
    /// `configured` is the name as configured, e.g. `__Host-session`; plain HTTP drops its prefix.
    pub fn new(configured: &str, secure: bool, same_site: cookie::SameSite) -> Self {
        let _ = configured;
        Self { name: String::new(), secure, same_site }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id in the request's `Cookie` fields: none when absent, malformed, or there twice.
    pub fn find(&self, headers: &HeaderMap) -> Option<SessionId> {
        let _ = (headers, self.secure, self.same_site);
        unimplemented!()
    }

    /// The `Set-Cookie` that hands the id to the browser, for its browser session.
    pub fn set(&self, id: &SessionId) -> HeaderValue {
        let _ = id;
        unimplemented!()
    }

    /// The `Set-Cookie` that takes it back.
    pub fn clear(&self) -> HeaderValue {
        unimplemented!()
    }
}
