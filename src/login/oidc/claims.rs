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
    /// More is said of them than a session keeps.
    TooMuch,
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

const ADDRESS: &str = "email";
const VERIFIED: &str = "email_verified";
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
        let names_by_address = self.user == ADDRESS || self.user == self.email;
        let given =
            if names_by_address { self.address(claims, &self.user) } else { find(claims, &self.user).and_then(text) };
        let given = given.ok_or(Unwelcome::NoName)?;
        let is_name = !given.trim().is_empty() && given.len() <= USER_BYTES_MAX && !given.contains(char::is_control);
        if !is_name {
            return Err(Unwelcome::NoName);
        }
        self.admitted(
            self.said(claims, Identity { user: format!("{}{given}", self.user_prefix), ..Identity::default() }),
        )
    }

    /// Who this is now, if they may stay. A later token may say less than the first one did: what it leaves out stays as
    /// it was `before`, and so does the name, for a session does not change its user.
    pub(super) fn renewed(&self, claims: &Map<String, Value>, before: &Identity) -> Result<Identity, Unwelcome> {
        self.admitted(self.said(claims, before.clone()))
    }

    /// `before`, with what these claims say.
    fn said(&self, claims: &Map<String, Value>, before: Identity) -> Identity {
        let has = |path: &str| find(claims, path).is_some();
        let bounded = |path: &str| find(claims, path).and_then(text).filter(|text| text.len() <= TEXT_BYTES_MAX);
        let mut said = before;
        if has(&self.name) {
            said.name = bounded(&self.name);
        }
        if has(&self.email) {
            said.email = self.address(claims, &self.email);
        }
        if let Some(groups) = find(claims, &self.groups) {
            said.groups = texts(groups);
        }
        for (name, path) in self.claims.iter().filter(|(_, path)| has(path)) {
            match bounded(path) {
                Some(text) => said.claims.insert(name.clone(), text),
                None => said.claims.remove(name),
            };
        }
        said
    }

    fn admitted(&self, identity: Identity) -> Result<Identity, Unwelcome> {
        let Identity { user, email, groups, .. } = &identity;
        let given = user.strip_prefix(&self.user_prefix).unwrap_or(user);
        let named = |list: &[String], text: &str| list.is_empty() || list.iter().any(|other| other == text);
        let is_allowed = named(&self.allowed_users, given)
            && (self.allowed_groups.is_empty() || groups.iter().any(|group| self.allowed_groups.contains(group)))
            && (self.allowed_email_domains.is_empty()
                || email.as_deref().and_then(domain).is_some_and(|domain| named(&self.allowed_email_domains, &domain)));
        if !is_allowed {
            return Err(Unwelcome::NotAllowed);
        }
        if identity.is_too_large() {
            return Err(Unwelcome::TooMuch);
        }
        Ok(identity)
    }

    /// An address only when the provider says that it is the user's own, or the operator that all are. What the provider
    /// says is about the claim `email` and no other (OpenID Connect Core 1.0, section 5.1).
    fn address(&self, claims: &Map<String, Value>, path: &str) -> Option<String> {
        let address = find(claims, path).and_then(text)?;
        // Some providers write the truth as a text.
        let is_true = |said: &Value| *said == true || *said == "true";
        let is_verified = path == ADDRESS && claims.get(VERIFIED).is_some_and(is_true);
        let is_address = address.len() <= TEXT_BYTES_MAX && domain(&address).is_some();
        (is_address && (is_verified || self.trust_email)).then_some(address)
    }
}

/// Adds what the UserInfo endpoint says and the ID token does not. An address and whether it is verified are of one
/// source: else the one could vouch for the other's.
pub(super) fn add_userinfo(claims: &mut Map<String, Value>, mut further: Map<String, Value>) {
    if claims.contains_key(ADDRESS) {
        further.remove(VERIFIED);
    } else {
        claims.remove(VERIFIED);
    }
    for (name, value) in further {
        claims.entry(name).or_insert(value);
    }
}

impl Unwelcome {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NoName => "no_user_name",
            Self::NotAllowed => "not_allowed",
            Self::TooMuch => "too_much",
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
            ("email = \"upn\"", json!("ann@example.org"), json!(true), false),
            ("email = \"upn\"\ntrust_email = true", json!("ann@example.org"), json!(false), true),
        ];
        for (keys, email, verified, expected) in cases {
            let claims =
                json!({ "preferred_username": "ann", "email": email, "upn": email, "email_verified": verified });
            assert_eq!(read(keys, &claims).unwrap().email.is_some(), expected, "{keys} {claims}");
        }
    }

    #[test]
    fn an_address_names_a_user_only_when_it_is_verified() {
        let cases = [
            ("user = \"email\"", json!(true), true),
            ("user = \"email\"", json!(false), false),
            ("user = \"email\"", json!(null), false),
            ("user = \"email\"\nemail = \"upn\"", json!(false), false),
            ("user = \"email\"\ntrust_email = true", json!(false), true),
            ("user = \"upn\"\nemail = \"upn\"", json!(true), false),
            ("user = \"upn\"\nemail = \"upn\"\ntrust_email = true", json!(false), true),
            // No address to the operator, who knows the provider.
            ("user = \"upn\"", json!(false), true),
        ];
        for (keys, verified, expected) in cases {
            let claims = json!({ "email": "ann@example.org", "upn": "ann@example.org", "email_verified": verified });
            let expected = if expected { Ok("ann@example.org".to_owned()) } else { Err(Unwelcome::NoName) };
            assert_eq!(read(keys, &claims).map(|ann| ann.user), expected, "{keys} {verified}");
        }
    }

    #[test]
    fn what_is_said_of_an_address_in_one_place_says_nothing_of_another() {
        let email = |mut claims: Value, further: Value| {
            let claims = claims.as_object_mut().unwrap();
            claims.insert("preferred_username".into(), "ann".into());
            add_userinfo(claims, further.as_object().unwrap().clone());
            mapping("").identity(claims).unwrap().email
        };
        let (mine, other) = ("ann@example.org", "ann@evil.example");
        let verified = json!({ "email": mine, "email_verified": true });
        assert_eq!(email(json!({}), verified.clone()).as_deref(), Some(mine));
        assert_eq!(email(verified.clone(), json!({ "email": other })).as_deref(), Some(mine));
        assert_eq!(email(json!({ "email": other }), verified), None);
        assert_eq!(email(json!({ "email_verified": true }), json!({ "email": other })), None);
    }

    #[test]
    fn a_later_token_takes_away_what_it_names_and_leaves_what_it_does_not() {
        let keys = "[claims]\nteam = \"team\"";
        let login = json!({
            "preferred_username": "ann", "name": "Ann", "email": "ann@example.org", "email_verified": true,
            "groups": ["staff", "ops"], "team": "north",
        });
        let before = read(keys, &login).unwrap();
        let later = |keys: &str, claims: Value| mapping(keys).renewed(claims.as_object().unwrap(), &before);
        assert_eq!(later(keys, json!({})), Ok(before.clone()));
        assert_eq!(later(keys, json!({ "preferred_username": "eve" })).unwrap().user, "ann");
        for none in [json!([]), json!([7]), json!({})] {
            assert_eq!(later(keys, json!({ "groups": none })).unwrap().groups, Vec::<String>::new(), "{none}");
        }
        assert_eq!(later(keys, json!({ "email": "ann@example.org", "email_verified": false })).unwrap().email, None);
        assert_eq!(later(keys, json!({ "team": {} })).unwrap().claims, BTreeMap::new());

        for (list, claims, expected) in [
            ("allowed_groups = [\"ops\"]", json!({ "groups": ["staff"] }), Err(Unwelcome::NotAllowed)),
            ("allowed_groups = [\"ops\"]", json!({ "groups": [] }), Err(Unwelcome::NotAllowed)),
            ("allowed_groups = [\"ops\"]", json!({}), Ok(())),
            ("allowed_users = [\"ann\"]", json!({}), Ok(())),
            ("allowed_users = [\"bob\"]", json!({}), Err(Unwelcome::NotAllowed)),
            ("allowed_email_domains = [\"example.org\"]", json!({}), Ok(())),
            (
                "allowed_email_domains = [\"example.org\"]",
                json!({ "email": "ann@evil.example", "email_verified": true }),
                Err(Unwelcome::NotAllowed),
            ),
        ] {
            assert_eq!(later(list, claims.clone()).map(|_| ()), expected, "{list} {claims}");
        }
    }

    #[test]
    fn more_than_a_session_keeps_is_refused_and_not_cut() {
        let of = |groups: usize| json!({ "preferred_username": "ann", "groups": vec!["g".repeat(80); groups] });
        assert_eq!(read("", &of(100)).unwrap().groups.len(), 100);
        assert_eq!(read("", &of(200)), Err(Unwelcome::TooMuch));
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
