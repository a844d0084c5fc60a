//! What does a backend's response say of the session? Its directives are read, taken out of the response, and obeyed
//! where the route allows them, before the client has a byte of it.
//!
//! A backend that echoes what users type must not be able to make a session: on all other routes directives are refused,
//! and the log says so. What is allowed and cannot be understood is the backend's failure, 502; what the store does not
//! confirm is 503. So the client never has a response that tells of a login, or of a change of its session, that does not exist.

mod read;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use pingora::http::ResponseHeader;
use pingora::proxy::Session as HttpSession;
use pingora::{Error, ErrorType, Result};

use crate::audit::{self, Event, LogoutReason};
use crate::login::backend::Introduction;
use crate::session::attributes::Changes;
use crate::session::cookie::SessionCookie;
use crate::session::id::SessionId;
use crate::session::record::{ClientHints, LoginMethod};
use crate::session::store::{Found, StoreError};
use crate::session::{Anonymous, Noted, Started};

use super::Gateway;
use super::context::RequestContext;
use super::reply::Rejection;
use read::{Asked, Kind, SESSION_SET, is_allowed};
pub(super) use read::{is_directive, taken_out_of};

/// What backends are told of a session, on routes with `attributes`.
pub(super) const SESSION_ATTRIBUTES: HeaderName = HeaderName::from_static("session-attributes");

/// Of the fields that one response was refused, so many are named in the audit.
const NAMES_TOLD_MAX: usize = 8;

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
        let client = ClientHints::of(&downstream.req_header().headers, context.client);
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
            return match self.sessions.change_attributes(&session.key, changes).await {
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
        let client = ClientHints::of(&downstream.req_header().headers, context.client);
        match self.sessions.start_anonymous(client, changes).await {
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

/// The id that the client came with.
fn id(downstream: &HttpSession, context: &RequestContext) -> Option<SessionId> {
    context.connection.as_ref()?.listener.cookie.find(&downstream.req_header().headers)
}

fn cookies(context: &RequestContext, make: impl FnOnce(&SessionCookie) -> Vec<HeaderValue>) -> Vec<HeaderValue> {
    context.connection.as_ref().map(|connection| make(&connection.listener.cookie)).unwrap_or_default()
}

fn tell_refusal(context: &RequestContext, directive: &str, reason: &str) {
    let route = context.route.as_ref().map_or("-", |route| route.name.as_str());
    let backend = context.backend.as_ref().map_or("-", |backend| backend.name());
    let request_id = context.request_id.as_str();
    audit::tell(Event::DirectiveRefused { request_id, route, backend, directive, reason });
}
