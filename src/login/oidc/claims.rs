//! What do a provider's claims say of the user, and is that user let in?

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::config::model;
use crate::identity::Identity;

/// Why nobody is made of these claims. Not told to the user in more words than its [`Self::label`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unwelcome {
    /// The claim that names the user is missing, empty, too long, or holds control characters.
    NoName,
    /// A list of allowed users, groups or domains does not name them.
    NotAllowed,
}

/// The operator's words on claims.
#[derive(Debug)]
pub(super) struct Mapping {
    user: String,
    user_prefix: String,
    name: String,
    email: String,
    groups: String,
    claims: BTreeMap<String, String>,
    trust_email: bool,
    allowed_users: Vec<String>,
    allowed_groups: Vec<String>,
    /// In lower case.
    allowed_email_domains: Vec<String>,
}

const USER_BYTES_MAX: usize = 256;
const TEXT_BYTES_MAX: usize = 1024;
/// A user in more groups than this is a directory that leaks into a token.
const GROUPS_MAX: usize = 1000;

impl Mapping {
    pub(super) fn new(config: &model::OidcLogin) -> Self {
        let domains = config.allowed_email_domains.iter().map(|domain| domain.get_ref().to_ascii_lowercase());
        Self {
            user: config.user.get_ref().clone(),
            user_prefix: config.user_prefix.clone(),
            name: config.name.clone(),
            email: config.email.clone(),
            groups: config.groups.clone(),
            claims: config.claims.clone(),
            trust_email: config.trust_email,
            allowed_users: config.allowed_users.clone(),
            allowed_groups: config.allowed_groups.clone(),
            allowed_email_domains: domains.collect(),
        }
    }

    /// Whether a claim is missing that the UserInfo endpoint may know.
    pub(super) fn lacks(&self, claims: &Map<String, Value>) -> bool {
        // A user without groups has no such claim, so that one alone is no reason to ask unless somebody asks for it.
        let wants_groups = !self.allowed_groups.is_empty();
        let paths = [&self.user, &self.name, &self.email].into_iter().chain(self.claims.values());
        paths.chain(wants_groups.then_some(&self.groups)).any(|path| find(claims, path).is_none())
    }

    /// Who this is, if they may come in: every list that is not empty must name them.
    pub(super) fn identity(&self, claims: &Map<String, Value>) -> Result<Identity, Unwelcome> {
        let given = find(claims, &self.user).and_then(text).ok_or(Unwelcome::NoName)?;
        let is_name = !given.trim().is_empty() && given.len() <= USER_BYTES_MAX && !given.contains(char::is_control);
        if !is_name {
            return Err(Unwelcome::NoName);
        }
        let bounded = |path: &str| find(claims, path).and_then(text).filter(|text| text.len() <= TEXT_BYTES_MAX);
        let email = self.email(claims);
        let groups = find(claims, &self.groups).map(texts).unwrap_or_default();
        let claims = self.claims.iter().filter_map(|(name, path)| Some((name.clone(), bounded(path)?))).collect();

        let named = |list: &[String], text: &String| list.is_empty() || list.contains(text);
        let is_allowed = named(&self.allowed_users, &given)
            && (self.allowed_groups.is_empty() || groups.iter().any(|group| self.allowed_groups.contains(group)))
            && (self.allowed_email_domains.is_empty()
                || email.as_deref().and_then(domain).is_some_and(|domain| named(&self.allowed_email_domains, &domain)));
        if !is_allowed {
            return Err(Unwelcome::NotAllowed);
        }
        Ok(Identity { user: format!("{}{given}", self.user_prefix), name: bounded(&self.name), email, groups, claims })
    }

    /// An address only when the provider says that it is the user's own, or the operator that all are.
    fn email(&self, claims: &Map<String, Value>) -> Option<String> {
        let email = find(claims, &self.email).and_then(text)?;
        // Some providers write the truth as a text.
        let is_verified = claims.get("email_verified").is_some_and(|said| *said == true || *said == "true");
        let is_address = email.len() <= TEXT_BYTES_MAX && domain(&email).is_some();
        (is_address && (is_verified || self.trust_email)).then_some(email)
    }
}

impl Unwelcome {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NoName => "no_user_name",
            Self::NotAllowed => "not_allowed",
        }
    }
}

/// Exactly one `@`, with something plain on both sides of it; the domain in lower case.
fn domain(email: &str) -> Option<String> {
    let (name, domain) = email.split_once('@')?;
    let is_plain =
        |text: &str| !text.is_empty() && !text.contains(|c: char| c == '@' || c.is_whitespace() || c.is_control());
    (is_plain(name) && is_plain(domain)).then(|| domain.to_ascii_lowercase())
}

/// A claim by its name, or by a path through objects: `realm_access.roles`. The name goes first, for there are names
/// with dots: `https://example.org/groups`.
fn find<'c>(claims: &'c Map<String, Value>, path: &str) -> Option<&'c Value> {
    let found = match claims.get(path) {
        Some(value) => Some(value),
        // Each dot may end the first name.
        None => path.match_indices('.').find_map(|(at, _)| {
            let within = claims.get(&path[..at])?.as_object()?;
            find(within, &path[at + 1..])
        }),
    };
    found.filter(|value| !value.is_null())
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Array(several) => {
            let texts = several.iter().map(text).collect::<Option<Vec<_>>>()?;
            Some(texts.join(","))
        }
        Value::Null | Value::Object(_) => None,
    }
}

/// One group as a text, or several.
fn texts(value: &Value) -> Vec<String> {
    let is_group =
        |group: &&str| !group.is_empty() && group.len() <= TEXT_BYTES_MAX && !group.contains(char::is_control);
    let several = match value {
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        Value::String(one) => vec![one.as_str()],
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
    };
    several.into_iter().filter(is_group).take(GROUPS_MAX).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mapping(keys: &str) -> Mapping {
        let text = format!("issuer = \"https://p\"\nclient_id = \"us\"\n{keys}");
        Mapping::new(&toml::from_str(&text).unwrap())
    }

    fn read(keys: &str, claims: &Value) -> Result<Identity, Unwelcome> {
        mapping(keys).identity(claims.as_object().unwrap())
    }

    #[test]
    fn claims_are_found_by_name_and_by_path() {
        let claims = json!({
            "preferred_username": "ann", "name": "Ann", "realm_access": { "roles": ["staff", "", 7, "ops"] },
            "https://example.org/team": "north", "a.b": { "c": "deep" }, "level": 3, "list": ["x", "y"],
        });
        let keys = "groups = \"realm_access.roles\"\n[claims]\nteam = \"https://example.org/team\"\ndeep = \"a.b.c\"\n\
                    level = \"level\"\nlist = \"list\"\nnone = \"realm_access.nothing\"";
        let ann = read(keys, &claims).unwrap();
        assert_eq!((ann.user.as_str(), ann.name.as_deref()), ("ann", Some("Ann")));
        assert_eq!(ann.groups, ["staff", "ops"], "what is no text is no group");
        let expected = [("deep", "deep"), ("level", "3"), ("list", "x,y"), ("team", "north")];
        assert_eq!(ann.claims, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }

    #[test]
    fn without_a_plain_name_there_is_no_user() {
        for user in [json!(null), json!(""), json!("  "), json!("a\nb"), json!({}), json!("a".repeat(257))] {
            assert_eq!(read("", &json!({ "preferred_username": user })), Err(Unwelcome::NoName), "{user}");
        }
        assert_eq!(read("user_prefix = \"p:\"", &json!({ "preferred_username": "ann" })).unwrap().user, "p:ann");
        assert_eq!(read("user = \"sub\"", &json!({ "sub": "7" })).unwrap().user, "7");
    }

    #[test]
    fn only_a_verified_address_is_an_address() {
        let cases = [
            ("", json!("ann@example.org"), json!(true), true),
            ("", json!("ann@example.org"), json!("true"), true),
            ("", json!("ann@example.org"), json!(false), false),
            ("", json!("ann@example.org"), json!("false"), false),
            ("", json!("ann@example.org"), json!(1), false),
            ("", json!("ann@example.org"), json!(null), false),
            ("trust_email = true", json!("ann@example.org"), json!(null), true),
            ("trust_email = true", json!("ann@evil.example@example.org"), json!(true), false),
            ("trust_email = true", json!("ann"), json!(true), false),
            ("trust_email = true", json!("@example.org"), json!(true), false),
            ("trust_email = true", json!("ann@"), json!(true), false),
            ("trust_email = true", json!("ann @example.org"), json!(true), false),
        ];
        for (keys, email, verified, expected) in cases {
            let claims = json!({ "preferred_username": "ann", "email": email, "email_verified": verified });
            assert_eq!(read(keys, &claims).unwrap().email.is_some(), expected, "{keys} {claims}");
        }
    }

    #[test]
    fn every_list_that_is_there_must_name_the_user() {
        let ann = json!({
            "preferred_username": "ann", "email": "ann@Example.org", "email_verified": true, "groups": ["staff"],
        });
        let cases = [
            ("", true),
            ("allowed_users = [\"bob\", \"ann\"]", true),
            ("allowed_users = [\"Ann\"]", false),
            ("allowed_groups = [\"ops\", \"staff\"]", true),
            ("allowed_groups = [\"ops\"]", false),
            ("allowed_email_domains = [\"EXAMPLE.org\"]", true),
            ("allowed_email_domains = [\"ample.org\"]", false),
            ("allowed_email_domains = [\"org\"]", false),
            ("allowed_users = [\"ann\"]\nallowed_groups = [\"ops\"]", false),
            (
                "allowed_users = [\"ann\"]\nallowed_groups = [\"staff\"]\nallowed_email_domains = [\"example.org\"]",
                true,
            ),
        ];
        for (keys, expected) in cases {
            assert_eq!(read(keys, &ann).is_ok(), expected, "{keys}");
        }
        let unverified = json!({ "preferred_username": "ann", "email": "ann@example.org" });
        assert!(
            read("allowed_email_domains = [\"example.org\"]", &unverified).is_err(),
            "anybody may write an address"
        );
    }
}
