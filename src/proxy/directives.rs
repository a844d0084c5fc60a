//! What does a backend's response say of the session? Its directives are read, taken out of the response, and obeyed
//! where the route allows them, before the client has a byte of it.
//!
//! A backend that echoes what users type must not be able to make a session: on all other routes directives are refused,
//! and the log says so. What is allowed and cannot be understood is the backend's failure, 502; what the store does not
//! confirm is 503. So the client never has a response that tells of a login, or of a change of its session, that does not exist.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use pingora::http::ResponseHeader;
use pingora::proxy::Session as HttpSession;
use pingora::{Error, ErrorType, Result};
use sfv::{BareItem, Dictionary, Item, List, ListEntry, Parser};

use crate::audit::{self, Event, LogoutReason};
use crate::config::model::BackendPreset;
use crate::login::backend::{Introduction, text_of};
use crate::session::attributes::{Changes, Setting};
use crate::session::id::SessionId;
use crate::session::record::{ClientHints, LoginMethod};
use crate::session::store::{Found, StoreError};
use crate::session::{Anonymous, Noted, Started};

use super::Gateway;
use super::context::RequestContext;
use super::reply::Rejection;
use super::route::Allowed;

/// What backends are told of a session, on routes with `attributes`.
pub(super) const SESSION_ATTRIBUTES: HeaderName = HeaderName::from_static("session-attributes");

const SESSION_LOGIN: HeaderName = HeaderName::from_static("session-login");
const SESSION_LOGOUT: HeaderName = HeaderName::from_static("session-logout");
const SESSION_SET: HeaderName = HeaderName::from_static("session-set");
const SESSION_UNSET: HeaderName = HeaderName::from_static("session-unset");
const SERVER_TASK: HeaderName = HeaderName::from_static("am-eai-server-task");
const EAI: &str = "am-eai-";

/// Of the fields that one response was refused, so many are named in the audit.
const NAMES_TOLD_MAX: usize = 8;

/// An attribute that is to end later than this ends with its session anyway.
const TTL_SECONDS_MAX: i64 = 366 * 24 * 60 * 60;

/// All that one response asks for.
#[derive(Debug, Default)]
struct Asked {
    login: Option<Introduction>,
    logout: bool,
    changes: Changes,
}

/// What kind of directive a field is, as the log and the metrics call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Login,
    Logout,
    Attributes,
    /// A login in WebSEAL's words.
    Eai,
    /// A field of requests.
    Alien,
}

impl Gateway {
    /// Does what these fields of the response ask for. Gives the cookies that it is to carry.
    pub(super) async fn obey(
        &self,
        mut fields: HeaderMap,
        downstream: &HttpSession,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<Vec<HeaderValue>> {
        let preset = context.rules.login.backend_preset();
        let is_final = !response.status.is_informational();
        let allowed = context.route.as_ref().map(|route| route.directives).filter(|_| is_final).unwrap_or_default();
        let why = if is_final { "its route does not allow it" } else { "only a final response counts" };
        let refused: Vec<_> = fields.keys().filter(|name| !is_allowed(name, allowed, preset)).cloned().collect();
        for name in &refused {
            fields.remove(name);
            self.count(Kind::of(name).unwrap_or(Kind::Alien), "refused");
        }
        if !refused.is_empty() {
            // One line however many they are: what an echoing backend repeats must not fill the log.
            let names = refused.iter().take(NAMES_TOLD_MAX).map(HeaderName::as_str).collect::<Vec<_>>().join(" ");
            tell_refusal(context, &names, why);
        }
        let asked = Asked::read(&fields, response).map_err(|fault| self.misunderstood(context, &fields, fault))?;
        let Asked { login, logout, changes } = asked;
        if logout || login.is_some() {
            context.leave(); // its session ends by this very response, which the client is to have
        }
        if logout {
            return self.log_out_by_directive(downstream, context).await;
        }
        match login {
            Some(introduction) => {
                if let Some(target) = &introduction.go_to {
                    response.set_status(StatusCode::SEE_OTHER)?;
                    response.insert_header(header::LOCATION, target.to_string())?;
                }
                self.log_in_by_directive(downstream, context, introduction, &changes).await
            }
            None if changes.is_empty() => Ok(Vec::new()),
            None => self.note_by_directive(downstream, context, &changes).await,
        }
    }

    async fn log_in_by_directive(
        &self,
        downstream: &HttpSession,
        context: &mut RequestContext,
        introduction: Introduction,
        changes: &Changes,
    ) -> Result<Vec<HeaderValue>> {
        if let Err(excess) = changes.apply(&BTreeMap::new(), 0) {
            return Err(self.failed(context, Kind::Attributes, &excess.to_string()));
        }
        let replaces = id(downstream, context);
        let client = hints(downstream, context);
        let login = &context.rules.login;
        match login.introduced(introduction.identity, changes, client, replaces.as_ref()).await {
            Ok(Started::Begun { id, displaced: _ }) => {
                self.count(Kind::Login, "done");
                context.fallback_cookie = None;
                Ok(cookies(context, |cookie| vec![cookie.set(&id)]))
            }
            Ok(Started::Full(_)) => {
                self.count(Kind::Login, "full");
                context.failure = Some(Rejection::TooManySessions);
                Err(Error::explain(ErrorType::InternalError, "the user has too many sessions").into_in())
            }
            Err(error) => Err(self.unavailable(context, Kind::Login, error)),
        }
    }

    async fn log_out_by_directive(
        &self,
        downstream: &HttpSession,
        context: &mut RequestContext,
    ) -> Result<Vec<HeaderValue>> {
        let Some(id) = id(downstream, context) else {
            self.count(Kind::Logout, "no_session");
            return Ok(Vec::new());
        };
        let user = match &context.session {
            Some(session) => Some(Arc::clone(&session.record)),
            // A public route does not ask who it is; the audit does. One that cannot be read is ended all the same.
            None => match self.sessions.store().load(&id.key()).await {
                Ok(Found::Live(stored)) => Some(stored.record),
                Ok(Found::Ended(_) | Found::Nothing) | Err(StoreError::Unreadable) => None,
                Err(error) => return Err(self.unavailable(context, Kind::Logout, error)),
            },
        };
        let user = user.map(|record| (record.identity.user.clone(), record.method));
        let of_user = user.as_ref().map(|(user, _)| user.as_str());
        match self.sessions.end(&id, of_user).await {
            Ok(ended) => {
                self.count(Kind::Logout, "done");
                if ended {
                    // The user of a session of nobody is a name of ours.
                    let user = user.as_ref().filter(|(_, method)| *method != LoginMethod::Anonymous);
                    let user = user.map(|(user, _)| user.as_str());
                    let (client, session) = (Some(context.client), id.key().log_hash());
                    audit::tell(Event::Logout { user, client, session: &session, reason: LogoutReason::Backend });
                    self.observer.metrics.logouts.with_label_values(&[] as &[&str]).inc();
                }
                context.fallback_cookie = None;
                let headers = &downstream.req_header().headers;
                Ok(cookies(context, |cookie| {
                    let fallback = cookie.find_fallback(headers).map(|_| cookie.clear_fallback());
                    [cookie.clear()].into_iter().chain(fallback).collect()
                }))
            }
            Err(error) => Err(self.unavailable(context, Kind::Logout, error)),
        }
    }

    async fn note_by_directive(
        &self,
        downstream: &HttpSession,
        context: &mut RequestContext,
        changes: &Changes,
    ) -> Result<Vec<HeaderValue>> {
        if let Some(session) = context.told_session() {
            return match self.sessions.note(&session.key, changes).await {
                Ok(Noted::Done) => {
                    self.count(Kind::Attributes, "done");
                    Ok(Vec::new())
                }
                // Its user left meanwhile, or logged in and has another one.
                Ok(Noted::Gone) => {
                    self.count(Kind::Attributes, "gone");
                    context.failure = Some(Rejection::SessionEnded);
                    Err(Error::explain(ErrorType::InternalError, "the session ended before it was noted").into_in())
                }
                Ok(Noted::TooMuch(excess)) => Err(self.failed(context, Kind::Attributes, &excess.to_string())),
                Err(error) => Err(self.unavailable(context, Kind::Attributes, error)),
            };
        }
        // A session that could not be read may be good on another instance: its cookie stays.
        let is_nobody = id(downstream, context).is_none() || context.session_is_gone;
        // Who is known without a session (a script) would not come back with it.
        let is_nobody = is_nobody && context.identity.is_none();
        let may_begin = is_nobody && context.route.as_ref().is_some_and(|route| route.anonymous);
        if changes.set.is_empty() || !may_begin {
            // What any visitor brings about is counted, and no line of the log.
            self.count(Kind::Attributes, "no_session");
            return Ok(Vec::new());
        }
        if let Err(excess) = changes.apply(&BTreeMap::new(), 0) {
            return Err(self.failed(context, Kind::Attributes, &excess.to_string()));
        }
        match self.sessions.begin_anonymous(hints(downstream, context), changes).await {
            Ok(Anonymous::Begun(id)) => {
                self.count(Kind::Attributes, "done");
                Ok(cookies(context, |cookie| vec![cookie.set(&id)]))
            }
            Ok(Anonymous::TooMany) => {
                self.count(Kind::Attributes, "refused");
                tell_refusal(context, SESSION_SET.as_str(), "this network has begun too many sessions");
                Ok(Vec::new())
            }
            Err(error) => Err(self.unavailable(context, Kind::Attributes, error)),
        }
    }

    fn misunderstood(&self, context: &mut RequestContext, fields: &HeaderMap, fault: &str) -> Box<Error> {
        let kind = fields.keys().find_map(Kind::of).unwrap_or(Kind::Alien);
        self.failed(context, kind, fault)
    }

    /// The backend asked for what cannot be done. Nothing of it was done.
    fn failed(&self, context: &mut RequestContext, kind: Kind, fault: &str) -> Box<Error> {
        self.count(kind, "failed");
        tell_refusal(context, kind.fields(), fault);
        context.failure = Some(Rejection::BackendFailed);
        Error::explain(ErrorType::InvalidHTTPHeader, format!("the backend's directive: {fault}")).into_in()
    }

    fn unavailable(&self, context: &mut RequestContext, kind: Kind, error: StoreError) -> Box<Error> {
        if matches!(error, StoreError::TooLarge) {
            return self.failed(context, kind, &error.to_string());
        }
        self.count(kind, "unavailable");
        self.observer.metrics.store_errors.with_label_values(&["directive"]).inc();
        context.failure = Some(Rejection::StoreUnavailable);
        Error::because(ErrorType::InternalError, "a directive was not carried out", error).into_in()
    }

    fn count(&self, kind: Kind, result: &str) {
        self.observer.metrics.directives.with_label_values(&[kind.label(), result]).inc();
    }
}

/// Puts our cookies into a response. No cache may give one user's to another, whatever the backend tells caches: of the
/// several fields for them, those for caches of one kind go first (RFC 9213).
pub(super) fn add_cookies(response: &mut ResponseHeader, cookies: Vec<HeaderValue>) -> Result<()> {
    if !cookies.is_empty() {
        let is_for_caches = |name: &&HeaderName| {
            let name = name.as_str();
            name.ends_with("-cache-control") || ["expires", "pragma", "surrogate-control"].contains(&name)
        };
        for name in response.headers.keys().filter(is_for_caches).cloned().collect::<Vec<_>>() {
            response.remove_header(&name);
        }
        response.insert_header(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))?;
    }
    for cookie in cookies {
        response.append_header(header::SET_COOKIE, cookie)?;
    }
    Ok(())
}

impl Asked {
    /// Of the fields that are allowed. Those that a field of WebSEAL names are taken out of the response.
    fn read(fields: &HeaderMap, response: &mut ResponseHeader) -> std::result::Result<Self, &'static str> {
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
    fn of(name: &HeaderName) -> Option<Self> {
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
    const fn fields(self) -> &'static str {
        match self {
            Self::Login => "session-login",
            Self::Eai => "am-eai",
            Self::Logout => "session-logout",
            Self::Attributes => "session-set",
            Self::Alien => "session-attributes",
        }
    }

    const fn label(self) -> &'static str {
        match self {
            Self::Login | Self::Eai => "login",
            Self::Logout => "logout",
            Self::Attributes => "attributes",
            Self::Alien => "alien",
        }
    }
}

fn is_allowed(name: &HeaderName, allowed: Allowed, preset: BackendPreset) -> bool {
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
pub(super) fn is_directive(name: &HeaderName) -> bool {
    Kind::of(name).is_some()
}

/// All directives of a response, which has none of them any more; nothing where there are none.
pub(super) fn taken_out_of(response: &mut ResponseHeader) -> Option<HeaderMap> {
    if !response.headers.keys().any(|name| Kind::of(name).is_some()) {
        return None;
    }
    let mut fields = HeaderMap::new();
    let names: Vec<_> = response.headers.keys().filter(|name| Kind::of(name).is_some()).cloned().collect();
    for name in names {
        for value in response.headers.get_all(&name) {
            fields.append(name.clone(), value.clone());
        }
        response.remove_header(&name);
    }
    Some(fields)
}

/// Several lines of one field are one (RFC 9110, section 5.3).
fn joined(fields: &HeaderMap, name: &HeaderName) -> Option<Vec<u8>> {
    let lines: Vec<_> = fields.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    (!lines.is_empty()).then(|| lines.join(&b", "[..]))
}

/// `cart_id="5678", theme="dark";ttl=1800`
fn set(text: &[u8]) -> std::result::Result<BTreeMap<String, Setting>, &'static str> {
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
fn unset(text: &[u8]) -> std::result::Result<Vec<String>, &'static str> {
    let said: List = Parser::new(text).parse().map_err(|_| "Session-Unset is not a list")?;
    let name = |entry| match entry {
        ListEntry::Item(Item { bare_item: BareItem::Token(name), params: _ }) => Ok(name.into()),
        ListEntry::Item(_) | ListEntry::InnerList(_) => Err("Session-Unset is a list of names, without quotes"),
    };
    said.into_iter().map(name).collect()
}

/// The id that the client came with.
fn id(downstream: &HttpSession, context: &RequestContext) -> Option<SessionId> {
    context.connection.as_ref()?.listener.cookie.find(&downstream.req_header().headers)
}

fn cookies(
    context: &RequestContext,
    make: impl FnOnce(&crate::session::cookie::SessionCookie) -> Vec<HeaderValue>,
) -> Vec<HeaderValue> {
    context.connection.as_ref().map(|connection| make(&connection.listener.cookie)).unwrap_or_default()
}

/// For the user's list of devices.
fn hints(downstream: &HttpSession, context: &RequestContext) -> ClientHints {
    let agent = downstream.req_header().headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    ClientHints { address: Some(context.client), user_agent: agent.unwrap_or_default().to_owned() }
}

fn tell_refusal(context: &RequestContext, directive: &str, reason: &str) {
    let route = context.route.as_ref().map_or("-", |route| route.name.as_str());
    let backend = context.backend.as_ref().map_or("-", |backend| backend.name());
    let request_id = context.request_id.as_str();
    audit::tell(Event::DirectiveRefused { request_id, route, backend, directive, reason });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(lines: &[(&'static str, &str)]) -> std::result::Result<Asked, &'static str> {
        let mut response = ResponseHeader::build(200, None).unwrap();
        for (name, value) in lines {
            response.append_header(*name, *value).unwrap();
        }
        let fields = taken_out_of(&mut response).unwrap();
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
