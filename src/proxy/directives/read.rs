//! What does a response ask for? Its directives, taken out of it and read: no field of them reaches a client.

use std::collections::BTreeMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use pingora::http::ResponseHeader;
use sfv::{BareItem, Dictionary, Item, List, ListEntry, Parser};

use crate::config::model::BackendPreset;
use crate::login::backend::{Introduction, text_of};
use crate::proxy::route::Allowed;
use crate::session::attributes::{Changes, Setting};

const SESSION_LOGIN: HeaderName = HeaderName::from_static("session-login");
const SESSION_LOGOUT: HeaderName = HeaderName::from_static("session-logout");
pub(super) const SESSION_SET: HeaderName = HeaderName::from_static("session-set");
const SESSION_UNSET: HeaderName = HeaderName::from_static("session-unset");
const SERVER_TASK: HeaderName = HeaderName::from_static("am-eai-server-task");
const EAI: &str = "am-eai-";

/// An attribute that is to end later than this ends with its session anyway.
const TTL_SECONDS_MAX: i64 = 366 * 24 * 60 * 60;

/// All that one response asks for.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) login: Option<Introduction>,
    pub(super) logout: bool,
    pub(super) changes: Changes,
}

/// What kind of directive a field is, as the log and the metrics call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Login,
    Logout,
    Attributes,
    /// A login in WebSEAL's words.
    Eai,
    /// A field of requests.
    Alien,
}

impl Asked {
    /// Of the fields that are allowed. Those that a field of WebSEAL names are taken out of the response.
    pub(super) fn read(fields: &HeaderMap, response: &mut ResponseHeader) -> Result<Self, &'static str> {
        let mut asked = Self::default();
        if let Some(text) = joined(fields, &SESSION_LOGIN) {
            asked.login = Some(Introduction::of_field(&text)?);
        }
        // The others mean nothing without a user, such as the level of a login that failed.
        if Introduction::is_of_eai(fields) {
            let mut rest = response.headers.clone();
            asked.login = Some(Introduction::of_eai(fields, &mut rest)?);
            let named: Vec<_> = response.headers.keys().filter(|name| !rest.contains_key(*name)).cloned().collect();
            for name in named {
                response.remove_header(&name);
            }
        }
        if let Some(text) = joined(fields, &SESSION_LOGOUT) {
            let item: Item = Parser::new(&text).parse().map_err(|_| "Session-Logout is not a boolean")?;
            asked.logout = item.bare_item.as_boolean().ok_or("Session-Logout is not a boolean")?;
        }
        if let Some(task) = joined(fields, &SERVER_TASK) {
            asked.logout = task == b"terminate session";
            if !asked.logout {
                return Err("am-eai-server-task is not `terminate session`");
            }
        }
        if let Some(text) = joined(fields, &SESSION_UNSET) {
            asked.changes.unset = unset(&text)?;
        }
        if let Some(text) = joined(fields, &SESSION_SET) {
            asked.changes.set = set(&text)?;
        }
        if asked.logout && (asked.login.is_some() || !asked.changes.is_empty()) {
            return Err("a logout together with something else");
        }
        Ok(asked)
    }
}

impl Kind {
    pub(super) fn of(name: &HeaderName) -> Option<Self> {
        match name.as_str() {
            "session-login" => Some(Self::Login),
            "session-logout" => Some(Self::Logout),
            "session-set" | "session-unset" => Some(Self::Attributes),
            "session-attributes" => Some(Self::Alien),
            "am-eai-server-task" => Some(Self::Logout),
            name => name.starts_with(EAI).then_some(Self::Eai),
        }
    }

    /// What the audit calls one of its fields that cannot be obeyed.
    pub(super) const fn fields(self) -> &'static str {
        match self {
            Self::Login => "session-login",
            Self::Eai => "am-eai",
            Self::Logout => "session-logout",
            Self::Attributes => "session-set",
            Self::Alien => "session-attributes",
        }
    }

    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Login | Self::Eai => "login",
            Self::Logout => "logout",
            Self::Attributes => "attributes",
            Self::Alien => "alien",
        }
    }
}

pub(super) fn is_allowed(name: &HeaderName, allowed: Allowed, preset: BackendPreset) -> bool {
    let is_eai = preset == BackendPreset::Eai;
    match Kind::of(name) {
        Some(Kind::Login) => allowed.login && !is_eai,
        Some(Kind::Eai) => allowed.login && is_eai,
        Some(Kind::Logout) => allowed.logout && (is_eai || *name != SERVER_TASK),
        Some(Kind::Attributes) => allowed.attributes,
        Some(Kind::Alien) | None => false,
    }
}

/// Whether a field of a response is about the session, and so never for the client.
pub(in crate::proxy) fn is_directive(name: &HeaderName) -> bool {
    Kind::of(name).is_some()
}

/// All directives of a response, which has none of them any more.
pub(in crate::proxy) fn taken_out_of(response: &mut ResponseHeader) -> HeaderMap {
    let mut fields = HeaderMap::new();
    let names: Vec<_> = response.headers.keys().filter(|name| is_directive(name)).cloned().collect();
    for name in names {
        for value in response.headers.get_all(&name) {
            fields.append(name.clone(), value.clone());
        }
        response.remove_header(&name);
    }
    fields
}

/// Several lines of one field are one (RFC 9110, section 5.3).
fn joined(fields: &HeaderMap, name: &HeaderName) -> Option<Vec<u8>> {
    let lines: Vec<_> = fields.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    (!lines.is_empty()).then(|| lines.join(&b", "[..]))
}

/// `cart_id="5678", theme="dark";ttl=1800`
fn set(text: &[u8]) -> Result<BTreeMap<String, Setting>, &'static str> {
    let said: Dictionary = Parser::new(text).parse().map_err(|_| "Session-Set is not a dictionary")?;
    let mut set = BTreeMap::new();
    for (name, entry) in said {
        let ListEntry::Item(item) = entry else { return Err("an attribute is one text, no list") };
        let mut time = None;
        for (parameter, value) in &item.params {
            if parameter.as_str() != "ttl" {
                return Err("an attribute has no other parameter than ttl");
            }
            let seconds = value.as_integer().map(i64::from).filter(|seconds| (1..=TTL_SECONDS_MAX).contains(seconds));
            let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
            time =
                Some(Duration::from_secs(seconds.ok_or("ttl is not a number of seconds from 1 to those of a year")?));
        }
        set.insert(name.as_str().to_owned(), Setting { value: text_of(item)?, time });
    }
    Ok(set)
}

/// `cart_id, theme`
fn unset(text: &[u8]) -> Result<Vec<String>, &'static str> {
    let said: List = Parser::new(text).parse().map_err(|_| "Session-Unset is not a list")?;
    let name = |entry| match entry {
        ListEntry::Item(Item { bare_item: BareItem::Token(name), params: _ }) => Ok(name.into()),
        ListEntry::Item(_) | ListEntry::InnerList(_) => Err("Session-Unset is a list of names, without quotes"),
    };
    said.into_iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(lines: &[(&'static str, &str)]) -> Result<Asked, &'static str> {
        let mut response = ResponseHeader::build(200, None).unwrap();
        for (name, value) in lines {
            response.append_header(*name, *value).unwrap();
        }
        let fields = taken_out_of(&mut response);
        assert!(response.headers.is_empty(), "nothing of it is left for the client");
        Asked::read(&fields, &mut response)
    }

    #[test]
    fn attributes_are_texts_with_or_without_an_end() {
        let asked = asked(&[
            ("session-set", "cart_id=\"5678\", theme=\"dark\";ttl=1800"),
            ("Session-Set", "name=%\"Zo%c3%ab\""),
            ("session-unset", "old, older"),
        ]);
        let Changes { unset, set } = asked.unwrap().changes;
        assert_eq!(unset, ["old", "older"]);
        let told = set.iter().map(|(name, set)| format!("{name}={}/{:?}", set.value, set.time.map(|t| t.as_secs())));
        assert_eq!(told.collect::<Vec<_>>(), ["cart_id=5678/None", "name=Zo\u{eb}/None", "theme=dark/Some(1800)"]);
    }

    #[test]
    fn what_is_not_plainly_said_is_not_done() {
        let cases: [&[(&'static str, &str)]; 17] = [
            &[("session-set", "cart")],
            &[("session-set", "cart=5")],
            &[("session-set", "cart=token")],
            &[("session-set", "cart=(\"a\" \"b\")")],
            &[("session-set", "cart=\"5")],
            &[("session-set", "Cart=\"5\"")],
            &[("session-set", "cart=\"5\";ttl=0")],
            &[("session-set", "cart=\"5\";ttl=-1")],
            &[("session-set", "cart=\"5\";ttl=\"9\"")],
            &[("session-set", "cart=\"5\";ttl=99999999999")],
            &[("session-set", "cart=\"5\";time=9")],
            &[("session-unset", "\"cart\"")],
            &[("session-unset", "(cart)")],
            &[("session-logout", "1")],
            &[("session-logout", "true")],
            &[("session-logout", "?1"), ("session-login", "user=\"ann\"")],
            &[("session-logout", "?1"), ("session-set", "a=\"1\"")],
        ];
        for lines in cases {
            assert!(asked(lines).is_err(), "{lines:?}");
        }
    }

    #[test]
    fn a_logout_is_said_in_one_way() {
        for (text, expected) in [("?1", true), ("?0", false)] {
            assert_eq!(asked(&[("session-logout", text)]).unwrap().logout, expected, "{text}");
        }
    }

    #[test]
    fn a_directive_counts_where_its_route_and_the_preset_allow_it() {
        let none = Allowed::default();
        let login = Allowed { login: true, ..none };
        let logout = Allowed { logout: true, ..none };
        let attributes = Allowed { attributes: true, ..none };
        let cases = [
            ("session-login", login, BackendPreset::Session),
            ("session-logout", logout, BackendPreset::Session),
            ("session-logout", logout, BackendPreset::Eai),
            ("session-set", attributes, BackendPreset::Session),
            ("session-unset", attributes, BackendPreset::Eai),
            ("am-eai-user-id", login, BackendPreset::Eai),
            ("am-eai-anything", login, BackendPreset::Eai),
            ("am-eai-server-task", logout, BackendPreset::Eai),
        ];
        let names = cases.map(|(name, ..)| name).into_iter().chain(["session-attributes"]);
        for name in names {
            for allowed in [none, login, logout, attributes] {
                for preset in [BackendPreset::Session, BackendPreset::Eai] {
                    let expected = cases.contains(&(name, allowed, preset));
                    let name = HeaderName::from_static(name);
                    let also = name == SESSION_SET || name == SESSION_UNSET;
                    if !(also && allowed == attributes) {
                        assert_eq!(is_allowed(&name, allowed, preset), expected, "{name} {allowed:?} {preset:?}");
                    }
                }
            }
        }
    }
}
