//! How does a backend's own login page log somebody in? It says who it is by fields of its response; this reads them.
//!
//! Whether a backend is believed at all is decided before: `proxy/directives.rs`.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName};
use sfv::{BareItem, Dictionary, InnerList, Item, ListEntry, Parser};

use super::Login;
use super::return_to::ReturnTo;
use crate::audit::LoginAttempt;
use crate::config::model::BackendPreset;
use crate::identity::Identity;
use crate::session::attributes::Changes;
use crate::session::id::SessionId;
use crate::session::record::{ClientHints, LoginMethod};
use crate::session::store::StoreError;
use crate::session::{Newcomer, Started};

/// Who a backend says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    pub identity: Identity,
    /// Where the browser is to go on, instead of reading the response.
    pub go_to: Option<ReturnTo>,
}

const USER_BYTES_MAX: usize = 256;

const USER_ID: HeaderName = HeaderName::from_static("am-eai-user-id");
const EXTERNAL_USER_ID: HeaderName = HeaderName::from_static("am-eai-ext-user-id");
const EXTERNAL_GROUPS: HeaderName = HeaderName::from_static("am-eai-ext-user-groups");
const EXTENDED_ATTRIBUTES: HeaderName = HeaderName::from_static("am-eai-xattrs");
const REDIRECT_URL: HeaderName = HeaderName::from_static("am-eai-redir-url");

impl Introduction {
    /// `Session-Login: user="alice", groups=("staff" "admin"), email="alice@example.org"`, a dictionary (RFC 9651,
    /// section 3.2). Besides `user`, `name`, `email` and `groups` every name is a claim.
    ///
    /// # Errors
    /// What is wrong with it, for the log.
    pub fn of_field(text: &[u8]) -> Result<Self, &'static str> {
        let said: Dictionary = Parser::new(text).parse().map_err(|_| "Session-Login is not a dictionary")?;
        let mut identity = Identity::default();
        for (name, entry) in said {
            match (name.as_str(), entry) {
                ("groups", ListEntry::InnerList(groups)) => identity.groups = texts(groups)?,
                ("groups", ListEntry::Item(_)) => return Err("groups is not a list in brackets"),
                (_, ListEntry::InnerList(_)) => return Err("only groups is a list"),
                ("user", ListEntry::Item(item)) => identity.user = text_of(item)?,
                ("name", ListEntry::Item(item)) => identity.name = Some(text_of(item)?),
                ("email", ListEntry::Item(item)) => identity.email = Some(text_of(item)?),
                (claim, ListEntry::Item(item)) => {
                    identity.claims.insert(claim.to_owned(), text_of(item)?);
                }
            }
        }
        Self { identity, go_to: None }.checked()
    }

    /// Whether these fields name a user in WebSEAL's words.
    pub fn is_of_eai(said: &HeaderMap) -> bool {
        said.contains_key(USER_ID) || said.contains_key(EXTERNAL_USER_ID)
    }

    /// What WebSEAL calls an external authentication interface: `am-eai-user-id` and others. The fields that
    /// `am-eai-xattrs` names are claims, and are taken out of `headers`.
    ///
    /// # Errors
    /// What is wrong with it, for the log.
    pub fn of_eai(said: &HeaderMap, headers: &mut HeaderMap) -> Result<Self, &'static str> {
        let mut identity = Identity::default();
        let user = sole(said, &USER_ID)?.or(sole(said, &EXTERNAL_USER_ID)?);
        user.ok_or("there is neither am-eai-user-id nor am-eai-ext-user-id")?.clone_into(&mut identity.user);
        if let Some(groups) = sole(said, &EXTERNAL_GROUPS)? {
            identity.groups = members(groups).map(str::to_owned).collect();
        }
        if let Some(names) = sole(said, &EXTENDED_ATTRIBUTES)? {
            for text in members(names) {
                let name = HeaderName::from_bytes(text.as_bytes()).map_err(|_| "am-eai-xattrs names no field")?;
                if !may_be_a_claim(&name) {
                    return Err("am-eai-xattrs names a field of the response itself");
                }
                let value = sole(headers, &name)?.map(str::to_owned).or(sole(said, &name)?.map(str::to_owned));
                headers.remove(&name);
                if let Some(value) = value {
                    identity.claims.insert(text.to_owned(), value);
                }
            }
        }
        let go_to = sole(said, &REDIRECT_URL)?;
        let go_to = go_to.map(|target| ReturnTo::parse(target).ok_or("am-eai-redir-url is not a path of this site"));
        Self { identity, go_to: go_to.transpose()? }.checked()
    }

    fn checked(self) -> Result<Self, &'static str> {
        let user = &self.identity.user;
        if user.is_empty() {
            return Err("there is no user");
        }
        if USER_BYTES_MAX < user.len() || user.chars().any(char::is_control) {
            return Err("the user is too long, or holds control characters");
        }
        if self.identity.is_too_large() {
            return Err("more is said of the user than a session keeps");
        }
        Ok(self)
    }
}

impl Login {
    /// What backends write when they log somebody in, where they may.
    pub fn backend_preset(&self) -> BackendPreset {
        self.backend_preset
    }

    /// A new session for whom a backend has introduced; the one that the browser came with ends, and what was noted
    /// in it goes along where it is the user's.
    pub async fn introduced(
        &self,
        identity: Identity,
        changes: &Changes,
        client: ClientHints,
        replaces: Option<&SessionId>,
    ) -> Result<Started, StoreError> {
        let (user, address) = (identity.user.clone(), client.address);
        let attempt = |result| LoginAttempt::without_session("backend", address, result);
        let (method, secrets, attributes) = (LoginMethod::Backend, BTreeMap::new(), BTreeMap::new());
        let newcomer = Newcomer { identity, method, client, secrets, attributes, login: None };
        let started = self.sessions.start(newcomer, replaces, changes).await;
        match &started {
            Ok(Started::Begun { id, displaced }) => self.note_begun(attempt("success"), &user, id, *displaced),
            Ok(Started::Full(_)) => self.note_attempt(LoginAttempt { user: Some(&user), ..attempt("full") }),
            Err(_) => self.note_attempt(LoginAttempt { user: Some(&user), ..attempt("store_unavailable") }),
        }
        started
    }
}

fn texts(list: InnerList) -> Result<Vec<String>, &'static str> {
    list.items.into_iter().map(text_of).collect()
}

/// A string, or a display string where it is more than ASCII.
pub(crate) fn text_of(item: Item) -> Result<String, &'static str> {
    match item.bare_item {
        BareItem::String(text) => Ok(text.into()),
        BareItem::DisplayString(text) => Ok(text),
        BareItem::Integer(_)
        | BareItem::Decimal(_)
        | BareItem::Token(_)
        | BareItem::ByteSequence(_)
        | BareItem::Boolean(_)
        | BareItem::Date(_) => Err("a value is not a text: write it in double quotes"),
    }
}

/// The only value of a field. Two would be read in two ways.
fn sole<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, &'static str> {
    let mut values = headers.get_all(name).iter();
    let (value, further) = (values.next(), values.next());
    if further.is_some() {
        return Err("a field is there twice");
    }
    value.map(|value| std::str::from_utf8(value.as_bytes()).map_err(|_| "a field is not UTF-8")).transpose()
}

fn members(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|member| !member.is_empty())
}

/// Not what frames the response, or what browsers go by.
fn may_be_a_claim(name: &HeaderName) -> bool {
    let name = name.as_str();
    let ours = ["connection", "transfer-encoding", "set-cookie", "location", "upgrade", "trailer", "date", "vary"];
    !ours.contains(&name) && !name.starts_with("content-") && !name.starts_with("session-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dictionary_says_who_it_is() {
        let text = r#"user="alice", groups=("staff" "admin"), email="a@example.org", name=%"Zo%c3%ab", team="north""#;
        let identity = Introduction::of_field(text.as_bytes()).unwrap().identity;
        assert_eq!((identity.user.as_str(), identity.email.as_deref()), ("alice", Some("a@example.org")));
        assert_eq!(
            (identity.groups, identity.name.as_deref()),
            (vec!["staff".into(), "admin".into()], Some("Zo\u{eb}"))
        );
        assert_eq!(identity.claims["team"], "north");
    }

    #[test]
    fn what_is_not_plainly_said_logs_nobody_in() {
        let long = format!("user=\"{}\"", "x".repeat(257));
        let much = format!("user=\"a\", team=\"{}\"", "x".repeat(8 << 10));
        let cases: [&[u8]; 14] = [
            b"",
            b"alice",
            b"user",
            b"user=alice",
            b"user=\"\"",
            b"user=7",
            b"user=(\"alice\")",
            b"user=\"alice",
            b"user=\"alice\" groups=(\"a\")",
            b"user=\"alice\", groups=\"a\"",
            b"user=\"alice\", groups=(a)",
            b"user=%\"a%00b\"",
            long.as_bytes(),
            much.as_bytes(),
        ];
        for text in cases {
            let told = Introduction::of_field(text);
            assert!(told.is_err(), "{:?} gave {told:?}", String::from_utf8_lossy(text));
        }
    }

    fn fields(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn the_fields_of_webseal_say_who_it_is() {
        let said = fields(&[
            ("am-eai-user-id", "alice"),
            ("am-eai-ext-user-groups", "staff, admin"),
            ("am-eai-xattrs", "mail, x-team,absent"),
            ("am-eai-redir-url", "/start?x=1"),
        ]);
        let mut rest = fields(&[("mail", "a@example.org"), ("x-team", "north"), ("x-other", "1")]);
        let Introduction { identity, go_to } = Introduction::of_eai(&said, &mut rest).unwrap();
        assert_eq!((identity.user.as_str(), identity.groups.join("|").as_str()), ("alice", "staff|admin"));
        assert_eq!(identity.claims.len(), 2);
        assert_eq!((identity.claims["mail"].as_str(), identity.claims["x-team"].as_str()), ("a@example.org", "north"));
        assert_eq!(go_to.unwrap().to_string(), "/start?x=1");
        assert_eq!(
            rest.keys().map(HeaderName::as_str).collect::<Vec<_>>(),
            ["x-other"],
            "they are not for the browser"
        );

        let cases: [&[(&'static str, &str)]; 8] = [
            &[("am-eai-auth-level", "1")],
            &[("am-eai-user-id", "")],
            &[("am-eai-user-id", "a"), ("am-eai-user-id", "b")],
            &[("am-eai-user-id", "a"), ("am-eai-redir-url", "https://evil.example/")],
            &[("am-eai-user-id", "a"), ("am-eai-redir-url", "//evil.example/")],
            &[("am-eai-user-id", "a"), ("am-eai-xattrs", "set-cookie")],
            &[("am-eai-user-id", "a"), ("am-eai-xattrs", "content-length")],
            &[("am-eai-user-id", "a"), ("am-eai-xattrs", "not a name")],
        ];
        for lines in cases {
            assert!(Introduction::of_eai(&fields(lines), &mut HeaderMap::new()).is_err(), "{lines:?}");
        }
    }
}
