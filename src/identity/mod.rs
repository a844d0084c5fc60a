//! What may the backend know? Who a user is, and the header names and values that say so.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

pub mod headers;
pub mod presets;
pub mod attributes;
pub mod certificate;

use headers::{HeaderLines, IdentityHeaders};

/// What a backend may know of a user. Values are as the login gave them: any Unicode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub user: String,
    pub name: Option<String>,
    pub email: Option<String>,
    pub groups: Vec<String>,
    pub claims: BTreeMap<String, String>,
}

/// Texts of one identity together: it is in each record, and much of it goes with each request.
const BYTES_MAX: usize = 8 << 10;

impl Identity {
    /// Whether more is said of the user than a session keeps.
    pub fn is_too_large(&self) -> bool {
        let Self { user, name, email, groups, claims } = self;
        let claims = claims.iter().flat_map(|(name, value)| [name, value]);
        let texts = [user].into_iter().chain(name).chain(email).chain(groups).chain(claims);
        BYTES_MAX < texts.map(String::len).sum()
    }
}

/// A user, and the header lines that tell a backend who that is: they are made for the first request, and serve all.
#[derive(Debug)]
pub struct Known {
    lines: OnceLock<HeaderLines>,
    identity: Identity,
}

impl Known {
    pub fn new(identity: Identity) -> Self {
        Self { lines: OnceLock::new(), identity }
    }

    /// What [`IdentityHeaders::render`] gives.
    pub fn lines(&self, headers: &IdentityHeaders) -> Cow<'_, HeaderLines> {
        let lines = self.lines.get_or_init(|| headers.render(&self.identity));
        // Another configuration may name other headers.
        if lines.are_of(headers) { Cow::Borrowed(lines) } else { Cow::Owned(headers.render(&self.identity)) }
    }
}

impl Deref for Known {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.identity
    }
}

impl Eq for Known {}

impl PartialEq for Known {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::model::{self, Preset};

    #[test]
    fn lines_are_those_of_the_configuration_that_is_asked() {
        let headers = |preset| IdentityHeaders::compile(&model::Identity { preset, ..model::Identity::default() });
        let known = Known::new(Identity { user: "ann".into(), ..Identity::default() });
        for preset in [Preset::XForwarded, Preset::Remote, Preset::XForwarded] {
            let headers = headers(preset);
            for _ in 0..2 {
                let expected: Vec<_> = headers.render(&known).iter(&headers).collect();
                assert!(!expected.is_empty());
                assert_eq!(known.lines(&headers).iter(&headers).collect::<Vec<_>>(), expected);
            }
        }
    }
}
