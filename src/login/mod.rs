//! How does someone become known? Our own endpoints under one prefix: login, logout, who am I, and their look.
//!
//! ```text
//! login      GET  the form, or for a live session: who you are, and where to go on     POST  303 to return_to
//! logout     GET  asks                                                                 POST  303 to the same page
//! session    GET  the user as JSON, or 401
//! sessions   GET  where the user is logged in                                          POST  ends one, or all others
//! style.css  GET
//! oidc/...   by the word of a provider: see `login/oidc/`
//! ```
//!
//! What holds here: (a) nothing changes by GET; (b) a form counts only when a page of ours sent it, in the same browser;
//! (c) every refused login gets the same answer, whatever the reason, but for `Retry-After`; (d) when the store cannot
//! say, nobody is let in and nobody is logged out: 503.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, SET_COOKIE, VARY, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use rand::rngs::SysError;
use tracing::warn;

pub mod users;
pub mod navigation;
pub mod return_to;
pub mod pages;
pub mod csrf;
pub mod hash;
mod form;
mod password;
pub mod backend;
pub mod basic;
mod throttle;
mod logout;
mod sessions;
mod device;
pub mod oidc;
#[cfg(test)]
mod tests;
#[cfg(test)]
#[path = "../../tests/it/hostile_targets.rs"]
mod hostile_targets;

use crate::audit::{self, Event, LoginAttempt};
use crate::config::error::{ConfigError, Problems};
use crate::config::model;
use crate::identity::{Identity, Known};
use crate::metrics::Metrics;
use crate::session::attributes::Changes;
use crate::session::control::{Control, Timestamp};
use crate::session::cookie::SessionCookie;
use crate::session::id::SessionId;
use crate::session::record::{ClientHints, LoginMethod, Record};
use crate::session::store::{Ending, StoreError};
use crate::session::{Newcomer, Resumed, Session, Sessions, Started, Use};
use basic::BasicLogin;
use csrf::{FormKey, LoginCookie, Purpose, is_same_origin};
use form::{BadForm, Form};
use hash::{Busy, PASSWORD_BYTES_MAX};
use navigation::Notice;
use oidc::{ProviderError, Providers};
use pages::{Link, LoggedInPage, LoginPage, Message, Stylesheet, failure, json, message_page, page, redirect};
use password::{Answer, PasswordLogin};
use return_to::ReturnTo;
use users::{UserName, Users};

/// Answers everything under the prefix. Replaced as a whole when the configuration is read again.
#[derive(Debug)]
pub struct Login {
    prefix: String,
    title: String,
    stylesheet: Stylesheet,
    default_return: ReturnTo,
    /// The same as text.
    front_page: String,
    users: Arc<Users>,
    password: Option<PasswordLogin>,
    backend_preset: model::BackendPreset,
    /// Where a backend has a login page of its own.
    backend_page: Option<ReturnTo>,
    basic: Option<BasicLogin>,
    providers: Providers,
    sessions: Sessions,
    control: Control,
    metrics: Metrics,
}

/// What an endpoint of ours learns of a request.
pub struct LoginRequest<'a> {
    pub method: &'a Method,
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub headers: &'a HeaderMap,
    /// Read in full for a POST, at most [`Login::FORM_BYTES_MAX`]; else empty.
    pub body: Bytes,
    pub client: IpAddr,
    /// It is nobody's use of the session: `session.silent_header`.
    pub is_silent: bool,
    /// Our own origin as the browser sees it, `https://host` or `https://host:port`.
    pub origin: &'a str,
    /// The listener's.
    pub cookie: &'a SessionCookie,
    /// Whether the browser came by HTTPS.
    pub secure: bool,
    /// Shown on pages that tell of a failure.
    pub request_id: &'a str,
}

/// Who is before us, when it is somebody.
struct Visitor {
    id: SessionId,
    identity: Arc<Known>,
    session: Session,
}

/// Why there is no answer now, whatever was asked.
#[derive(Debug)]
enum Failure {
    Store(StoreError),
    Busy,
    Random(SysError),
    /// From this network, which is to wait for so long.
    TooManyGuesses(Duration),
    Provider(ProviderError),
}

/// What the login page says above its form.
#[derive(Default)]
struct Say {
    /// What went wrong.
    alert: Option<Cow<'static, str>>,
    /// Why one is here.
    notice: Option<Notice>,
}

#[derive(Clone, Copy)]
enum Endpoint {
    Login,
    Logout,
    Session,
    Sessions,
    Style,
}

/// One text for every reason. It must not tell whether the name exists.
const REFUSED: &str =
    "That did not work. Check the user name and the password. After several failures, wait some minutes.";
const FORM_TOO_OLD: &str = "This page was open for too long. Please log in again.";
/// Of the backend's own page, in a list of methods.
const BACKEND_PAGE: &str = "Log in with the account of this application";
const TRY_AGAIN: &str = "Please try again in a few seconds.";
const RETRY_AFTER: Duration = Duration::from_secs(5);

impl Login {
    /// A larger body gets 413 before it comes here.
    pub const FORM_BYTES_MAX: usize = Form::BYTES_MAX;

    /// Reads the stylesheet. `users` are those of the file that `config` names, or nobody.
    pub fn new(
        config: &model::Login,
        users: Arc<Users>,
        sessions: Sessions,
        metrics: Metrics,
    ) -> Result<Self, ConfigError> {
        let prefix = config.prefix.get_ref();
        let is_prefix = prefix.ends_with('/') && ReturnTo::parse(prefix).is_some_and(|read| read.path() == *prefix);
        let mut problems = Problems::in_file(Path::new("login"), "");
        if !is_prefix {
            problems.add(0..0, format!("prefix {prefix:?} is not a plain path that begins and ends with `/`"));
        }
        let target = ReturnTo::parse(config.default_return.get_ref());
        if target.is_none() {
            problems.add(0..0, format!("default_return {:?} is not a plain path", config.default_return.get_ref()));
        }
        let default_return = problems.into_result(target.unwrap_or_else(ReturnTo::root))?;
        let backend_page = config.backend.as_ref().and_then(|backend| backend.page.as_ref());
        let stylesheet = config.stylesheet.as_ref().map(|path| path.get_ref().as_path());
        let store = Arc::clone(sessions.store());
        let providers = Providers::new(config, sessions.ring()).map_err(|error| {
            ConfigError::of_file(Path::new("login"), &format!("the system gives no random bytes: {error}"), "try again")
        })?;
        Ok(Self {
            prefix: prefix.clone(),
            title: config.title.clone(),
            stylesheet: Stylesheet::load(stylesheet)?,
            front_page: default_return.to_string(),
            default_return,
            users,
            password: config.password.as_ref().map(|password| PasswordLogin::new(password, store)),
            backend_preset: config.backend.as_ref().map(|backend| backend.preset).unwrap_or_default(),
            backend_page: backend_page.and_then(|page| ReturnTo::parse(page.get_ref())),
            basic: config.basic.as_ref().map(|basic| BasicLogin::new(basic.get_ref())),
            control: Control::new(sessions.clone()),
            providers,
            sessions,
            metrics,
        })
    }

    /// With what `previous` knows of providers that both have.
    pub fn taking_over(mut self, previous: &Self) -> Self {
        self.providers.take_over(&previous.providers);
        self
    }

    /// Of the files that the configuration names, those whose content is another than in `previous`: a line each.
    pub fn changed_files(&self, previous: &Self) -> Vec<String> {
        let users = self.users.difference(&previous.users).map(|difference| format!("users: {difference}"));
        let stylesheet = (self.stylesheet != previous.stylesheet).then(|| "stylesheet: content".to_owned());
        users.into_iter().chain(stylesheet).collect()
    }

    /// Whether a path is ours to answer; no route ever sees it.
    pub fn owns(&self, path: &str) -> bool {
        path.starts_with(&self.prefix)
    }

    /// Under which our endpoints live; begins and ends with `/`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where a login goes that came from nowhere.
    pub fn front_page(&self) -> &str {
        &self.front_page
    }

    /// For asking, at each request, who a user is now.
    pub fn users(&self) -> &Arc<Users> {
        &self.users
    }

    /// The answer to a request that is ours. The answer to HEAD has the body that GET would have; it is not to be sent.
    pub async fn answer(&self, request: LoginRequest<'_>) -> Response<Bytes> {
        let name = request.path.strip_prefix(&self.prefix).unwrap_or_default();
        if let Some(path) = name.strip_prefix("oidc/") {
            let answer = self.answer_for_provider(path, &request).await;
            let answer = answer.unwrap_or_else(|| Ok(self.not_found(&request)));
            return answer.unwrap_or_else(|failure| self.unavailable(&failure, Endpoint::Login, &request));
        }
        let Some(endpoint) = Endpoint::named(name) else { return self.not_found(&request) };
        let answer = match (endpoint, request.method) {
            (Endpoint::Login, &Method::GET | &Method::HEAD) => self.login_page(&request).await,
            (Endpoint::Login, &Method::POST) => self.log_in(&request).await.map(by_fetch_metadata),
            (Endpoint::Logout, &Method::GET | &Method::HEAD) => self.logout_page(&request).await,
            (Endpoint::Logout, &Method::POST) => self.log_out(&request).await.map(by_fetch_metadata),
            (Endpoint::Session, &Method::GET | &Method::HEAD) => self.session(&request).await,
            (Endpoint::Sessions, &Method::GET | &Method::HEAD) => self.list_sessions(&request).await,
            (Endpoint::Sessions, &Method::POST) => self.end_sessions(&request).await.map(by_fetch_metadata),
            (Endpoint::Style, &Method::GET | &Method::HEAD) => Ok(self.stylesheet.answer(request.headers)),
            (Endpoint::Login | Endpoint::Logout | Endpoint::Session | Endpoint::Sessions | Endpoint::Style, _) => {
                Ok(self.wrong_method(endpoint, &request))
            }
        };
        answer.unwrap_or_else(|failure| self.unavailable(&failure, endpoint, &request))
    }

    /// The form. Who is logged in already sees that instead of being sent on: when a route does not accept the session,
    /// being sent on would lead back here, in a circle.
    async fn login_page(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        if !self.can_log_in() {
            return Ok(self.not_found(request));
        }
        let asked = |wanted: &str| {
            let mut pairs = form_urlencoded::parse(request.query.unwrap_or_default().as_bytes());
            pairs.find(|(name, _)| name == wanted).map(|(_, value)| value)
        };
        let return_to = self.return_to(asked("return_to").as_deref());
        let known = match self.known(request).await {
            // Whoever else guesses in this network, its users can log in.
            Err(Failure::TooManyGuesses(_)) => Err(None),
            known => known?,
        };
        let reason = asked("reason").and_then(|reason| Notice::of_label(&reason));
        let visitor = match known {
            Ok(visitor) if reason == Some(Notice::Confirm) => {
                let say = Say { notice: reason, ..Say::default() };
                return self.login_form(request, StatusCode::OK, &say, &return_to, &visitor.identity.user);
            }
            Ok(visitor) => visitor,
            Err(ending) => {
                // A page of the application may have led here by itself: then the cookie still says it.
                let notice = ending.and_then(|ending| Notice::of(Some(ending))).or(reason);
                return self.login_form(request, StatusCode::OK, &Say { notice, ..Say::default() }, &return_to, "");
            }
        };
        let csrf = FormKey::of_session(&visitor.id).token(Purpose::Logout)?;
        let (prefix, title, name) = (&self.prefix, &self.title, visitor.name());
        // The others are about a login that has ended.
        let notice = reason.filter(|reason| *reason == Notice::Unsent).map(Notice::text);
        let return_to = &return_to;
        Ok(page(StatusCode::OK, &LoggedInPage { prefix, title, name, notice, csrf: &csrf, return_to }))
    }

    async fn log_in(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let Some(password_login) = &self.password else { return Ok(self.not_found(request)) };
        let form = match self.own_form(request) {
            Ok(form) => form,
            Err(refusal) => return Ok(*refusal),
        };
        let return_to = self.return_to(form.get("return_to"));
        let login_cookie = LoginCookie::beside(request.cookie, request.secure);
        let key = login_cookie.find(request.headers);
        if !key.zip(form.get("csrf")).is_some_and(|(key, token)| key.accepts(Purpose::Login, token)) {
            self.log_attempt(request, None, "stale_form");
            return self.login_form(request, StatusCode::FORBIDDEN, &Say::alert(FORM_TOO_OLD), &return_to, "");
        }
        let name = form.get("username").and_then(UserName::parse);
        let password = form.get("password").filter(|password| password.len() <= PASSWORD_BYTES_MAX);
        let (Some(name), Some(password)) = (name, password) else {
            return Ok(self.bad_form(request, BadForm::Fields));
        };

        let answer = password_login.check(&self.users, &name, password.to_owned(), request.client).await;
        let answer = answer.inspect_err(|failure| self.log_attempt(request, None, failure.label()))?;
        match &answer {
            Answer::Welcome(identity) => {
                let started = self.start(request, identity).await;
                let started =
                    started.inspect_err(|failure| self.log_attempt(request, Some(&identity.user), failure.label()))?;
                let id = match started {
                    Started::Begun { id, displaced } => {
                        let attempt = LoginAttempt::without_session("password", request.client, "success");
                        self.note_begun(attempt, &identity.user, &id, displaced);
                        id
                    }
                    Started::Full(sessions) => {
                        self.log_attempt(request, Some(&identity.user), "full");
                        let say = Say::alert(full(sessions));
                        return self.login_form(request, StatusCode::FORBIDDEN, &say, &return_to, name.as_str());
                    }
                };
                let mut response = redirect(StatusCode::SEE_OTHER, &return_to.to_string());
                response.headers_mut().append(SET_COOKIE, request.cookie.set(&id));
                response.headers_mut().append(SET_COOKIE, login_cookie.clear());
                Ok(response)
            }
            Answer::Wrong | Answer::Disabled | Answer::Unknown | Answer::Throttled(_) => {
                self.log_attempt(request, self.known_name(&name), answer.label());
                // 403 and not 401, which would have to name a scheme for a browser's own password dialog
                // (RFC 9110, section 15.5.2).
                let say = Say::alert(REFUSED);
                let form = self.login_form(request, StatusCode::FORBIDDEN, &say, &return_to, name.as_str());
                let mut response = form?;
                if let Answer::Throttled(wait) = answer {
                    pages::set_retry_after(&mut response, wait);
                }
                Ok(response)
            }
        }
    }

    /// A login that succeeded, and what it cost older sessions.
    fn note_begun(&self, attempt: LoginAttempt<'_>, user: &str, id: &SessionId, displaced: u32) {
        let session = id.key().log_hash();
        self.note_attempt(LoginAttempt { user: Some(user), session: Some(&session), ..attempt });
        note_displaced(user, displaced);
    }

    /// A new session under a new id; the one that the browser came with is ended.
    async fn start(&self, request: &LoginRequest<'_>, identity: &Identity) -> Result<Started, Failure> {
        let client = ClientHints::of(request.headers, request.client);
        let replaces = request.cookie.find(request.headers);
        let (identity, method) = (identity.clone(), LoginMethod::Password);
        let (secrets, attributes) = (BTreeMap::new(), BTreeMap::new());
        let newcomer = Newcomer { identity, method, client, secrets, attributes, login: None };
        Ok(self.sessions.start(newcomer, replaces.as_ref(), &Changes::default()).await?)
    }

    /// The form, bound to this browser: with the key that it has, so that its other login pages stay good, or a new one.
    fn login_form(
        &self,
        request: &LoginRequest<'_>,
        status: StatusCode,
        say: &Say,
        return_to: &ReturnTo,
        username: &str,
    ) -> Result<Response<Bytes>, Failure> {
        let methods = self.methods(return_to, say.notice);
        if let (None, [only]) = (&self.password, &methods[..])
            && say.alert.is_none()
            && say.notice.is_none()
        {
            return Ok(redirect(StatusCode::SEE_OTHER, &only.href)); // nothing to choose, and nothing to read
        }
        let login_cookie = LoginCookie::beside(request.cookie, request.secure);
        let key = match login_cookie.find(request.headers) {
            Some(key) => key,
            None => FormKey::generate()?,
        };
        let csrf = key.token(Purpose::Login)?;
        let (prefix, title) = (&self.prefix, &self.title);
        let (alert, notice) = (say.alert.as_deref(), say.notice.map(Notice::text));
        let (methods, has_password) = (&methods[..], self.password.is_some());
        let page_of_form =
            LoginPage { prefix, title, alert, notice, csrf: &csrf, return_to, username, methods, has_password };
        let mut response = page(status, &page_of_form);
        response.headers_mut().append(SET_COOKIE, login_cookie.set(&key));
        Ok(response)
    }

    fn can_log_in(&self) -> bool {
        self.password.is_some() || self.backend_page.is_some() || self.providers.titles().next().is_some()
    }

    /// The ways to log in besides a password of ours. Who is here to confirm who they are is to be asked again.
    fn methods(&self, return_to: &ReturnTo, notice: Option<Notice>) -> Vec<pages::Method> {
        let of_backend =
            |page: &ReturnTo| pages::Method { name: BACKEND_PAGE.to_owned(), href: page.leading_to(return_to) };
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("return_to", &return_to.to_string());
        if notice == Some(Notice::Confirm) {
            query.append_pair("max_age", &sessions::RECENT.as_secs().to_string());
        }
        let query = query.finish();
        let of_provider = |(name, title): (&str, &str)| pages::Method {
            name: title.to_owned(),
            href: format!("{}oidc/{name}/login?{query}", self.prefix),
        };
        self.backend_page.iter().map(of_backend).chain(self.providers.titles().map(of_provider)).collect()
    }

    /// The user as JSON, for a front end; never an id. `expires_in` is the time to the absolute end in seconds.
    async fn session(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let Some(visitor) = self.visitor(request).await? else { return Ok(unauthenticated(request)) };
        let Identity { user, name, email, groups, claims: _ } = &**visitor.identity;
        let left = visitor.session.record.ends.saturating_sub(Timestamp::now().0) / 1000;
        let body = serde_json::json!({
            "user": user, "name": name, "email": email, "groups": groups, "expires_in": left,
        });
        Ok(json(StatusCode::OK, &body))
    }

    /// Who has a live session and is still welcome.
    async fn visitor(&self, request: &LoginRequest<'_>) -> Result<Option<Visitor>, Failure> {
        Ok(self.known(request).await?.ok())
    }

    /// As [`Self::visitor`], or why there is none, where the store remembers it.
    async fn known(&self, request: &LoginRequest<'_>) -> Result<Result<Visitor, Option<Ending>>, Failure> {
        let Some(id) = request.cookie.find(request.headers) else { return Ok(Err(None)) };
        let session = match self.sessions.resume(&id, &Use::of_own_page(request.client, !request.is_silent)).await {
            Ok(Resumed::Live(session, _)) => session,
            Ok(Resumed::Gone(ending)) => return Ok(Err(ending)),
            // The cookie stays, since nobody said that the session is gone.
            Err(StoreError::Unreadable) => return Ok(Err(None)),
            Ok(Resumed::TooManyGuesses(wait)) => return Err(Failure::TooManyGuesses(wait)),
            Err(error) => return Err(error.into()),
        };
        let identity = match session.record.method {
            LoginMethod::Password => self.users.current(&session.record.identity.user).map(Arc::clone),
            LoginMethod::Oidc => self.vouched_for(&session.record),
            LoginMethod::Backend => Some(Arc::new(Known::new(session.record.identity.clone()))),
            LoginMethod::Anonymous => None,
        };
        Ok(identity.map(|identity| Visitor { id, identity, session }).ok_or(None))
    }

    /// Who a provider said this is, as long as it is one of ours.
    pub fn vouched_for(&self, record: &Record) -> Option<Arc<Known>> {
        let counts = self.providers.vouches_for(record.login.as_ref());
        counts.then(|| Arc::new(Known::new(record.identity.clone())))
    }

    /// Where a login leads: where the visitor came from, when that is a page of this origin, else the configured page.
    fn return_to(&self, asked: Option<&str>) -> ReturnTo {
        asked.and_then(|text| self.own_page(text)).unwrap_or_else(|| self.default_return.clone())
    }

    /// The name when it is a user's. Other texts stay out of the log: some people type their password here.
    fn known_name<'n>(&self, name: &'n UserName) -> Option<&'n str> {
        self.users.knows(name).then(|| name.as_str())
    }

    fn log_attempt(&self, request: &LoginRequest<'_>, user: Option<&str>, result: &'static str) {
        self.note_attempt(LoginAttempt { user, ..LoginAttempt::without_session("password", request.client, result) });
    }

    /// Counts it and tells the audit.
    fn note_attempt(&self, attempt: LoginAttempt<'_>) {
        self.metrics.logins.with_label_values(&[attempt.method, attempt.result]).inc();
        audit::tell(Event::Login(attempt));
    }

    fn not_found(&self, request: &LoginRequest<'_>) -> Response<Bytes> {
        self.message(request, StatusCode::NOT_FOUND, "not_found", ("Not found", "There is no such page."))
    }

    fn wrong_method(&self, endpoint: Endpoint, request: &LoginRequest<'_>) -> Response<Bytes> {
        let words = ("Not possible", "This address does not take that kind of request.");
        let mut response = self.message(request, StatusCode::METHOD_NOT_ALLOWED, "wrong_method", words);
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(endpoint.methods()));
        response
    }

    /// The posted form, when a page of ours sent it, or the refusal of it.
    fn own_form(&self, request: &LoginRequest<'_>) -> Result<Form, Box<Response<Bytes>>> {
        let form = Form::parse(request.headers, &request.body).map_err(|bad| self.bad_form(request, bad))?;
        if !is_same_origin(request.headers, request.origin) {
            // Another site made this browser send it: no fresh form, and no cookie that could replace a good one.
            let words = ("Refused", "This request did not come from a page of this site.");
            return Err(self.message(request, StatusCode::FORBIDDEN, "foreign_origin", words).into());
        }
        Ok(form)
    }

    fn bad_form(&self, request: &LoginRequest<'_>, bad: BadForm) -> Response<Bytes> {
        let status = match bad {
            BadForm::Type | BadForm::Fields => StatusCode::BAD_REQUEST,
            BadForm::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        };
        let words = ("That was not understood", "The form did not arrive as this page sends it.");
        self.message(request, status, "bad_form", words)
    }

    fn unavailable(&self, failure: &Failure, endpoint: Endpoint, request: &LoginRequest<'_>) -> Response<Bytes> {
        self.note(failure);
        let (status, retry_after, request_id) = (failure.status(), failure.retry_after(), request.request_id);
        if endpoint.answers_in_json(request) {
            let mut response = pages::failure(status, failure.label(), failure.text(), request_id);
            pages::set_retry_after(&mut response, retry_after);
            return response;
        }
        let (title, retry_after) = ("Not available at the moment", Some(retry_after));
        // What a form held goes nowhere with a link: its page comes back empty.
        let query = request.query.filter(|_| request.method == Method::GET);
        let again =
            ReturnTo::parse(&query.map_or(request.path.to_owned(), |query| format!("{}?{query}", request.path)));
        // An answer of a provider counts once: it takes a new attempt.
        let is_of_provider = request.path.strip_prefix(&self.prefix).is_some_and(|name| name.starts_with("oidc/"));
        let again = if is_of_provider { Some(format!("{}login", self.prefix)) } else { again.map(|it| it.to_string()) };
        let next = again.as_deref().map(|href| Link { href, text: "Try again" });
        message_page(&self.prefix, &Message { status, title, text: failure.text(), next, retry_after, request_id })
    }

    /// A refusal: `words` are its title and its text, `error` is what programs call it.
    fn message(
        &self,
        request: &LoginRequest<'_>,
        status: StatusCode,
        error: &str,
        (title, text): (&str, &str),
    ) -> Response<Bytes> {
        let request_id = request.request_id;
        if !request.wants_page() {
            return failure(status, error, text, request_id);
        }
        let login = format!("{}login", self.prefix);
        // Who has a cookie is logged in, or is sent from there to the login; the store need not say which.
        let next = match request.cookie.find(request.headers) {
            Some(_) => Some(Link { href: &self.front_page, text: "Continue" }),
            None => self.can_log_in().then_some(Link { href: &login, text: "Log in" }),
        };
        message_page(&self.prefix, &Message { status, title, text, next, retry_after: None, request_id })
    }

    fn note(&self, failure: &Failure) {
        match failure {
            Failure::Store(error) => {
                self.metrics.store_errors.with_label_values(&["login"]).inc();
                let cause = std::error::Error::source(error).map(ToString::to_string);
                warn!(%error, cause, "login endpoints cannot answer");
            }
            Failure::Busy => warn!("all places for computing password hashes are taken, and so is the queue"),
            Failure::Random(error) => warn!(%error, "the system gives no random bytes"),
            Failure::TooManyGuesses(_) => self.metrics.session_guesses.with_label_values(&["refused"]).inc(),
            Failure::Provider(error) => warn!(%error, "a provider does not answer as it should"),
        }
    }
}

impl LoginRequest<'_> {
    /// Whether a person is to read the answer.
    fn wants_page(&self) -> bool {
        Login::wants_page(self.method, self.headers)
    }
}

impl Visitor {
    fn name(&self) -> &str {
        self.identity.name.as_deref().unwrap_or(&self.identity.user)
    }
}

impl Endpoint {
    fn named(name: &str) -> Option<Self> {
        match name {
            "login" => Some(Self::Login),
            "logout" => Some(Self::Logout),
            "session" => Some(Self::Session),
            "sessions" => Some(Self::Sessions),
            "style.css" => Some(Self::Style),
            _ => None,
        }
    }

    fn methods(self) -> &'static str {
        match self {
            Self::Login | Self::Logout | Self::Sessions => "GET, HEAD, POST",
            Self::Session | Self::Style => "GET, HEAD",
        }
    }

    fn answers_in_json(self, request: &LoginRequest<'_>) -> bool {
        match self {
            Self::Login | Self::Logout | Self::Style => false,
            Self::Session => true,
            Self::Sessions => !request.wants_page(),
        }
    }
}

impl Failure {
    /// For the log and the metrics.
    fn label(&self) -> &'static str {
        match self {
            Self::Store(_) => "store_unavailable",
            Self::Busy => "busy",
            Self::Random(_) => "no_random",
            Self::TooManyGuesses(_) => "too_many_guesses",
            Self::Provider(error) => error.label(),
        }
    }

    /// For people.
    fn text(&self) -> &'static str {
        match self {
            Self::Store(_) | Self::Busy | Self::Random(_) | Self::TooManyGuesses(_) => TRY_AGAIN,
            Self::Provider(_) => {
                "The login service does not answer. Who is logged in stays so; please try again in a few seconds."
            }
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Store(_) | Self::Busy | Self::Random(_) | Self::Provider(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::TooManyGuesses(_) => StatusCode::TOO_MANY_REQUESTS,
        }
    }

    fn retry_after(&self) -> Duration {
        match self {
            Self::Store(_) | Self::Busy | Self::Random(_) | Self::Provider(_) => RETRY_AFTER,
            Self::TooManyGuesses(wait) => *wait,
        }
    }
}

impl Say {
    fn alert(text: impl Into<Cow<'static, str>>) -> Self {
        Self { alert: Some(text.into()), notice: None }
    }
}

fn note_displaced(user: &str, sessions: u32) {
    if sessions != 0 {
        audit::tell(Event::Displaced { user, sessions });
    }
}

/// The password was right, so this may be said.
fn full(sessions: u32) -> String {
    let times = if sessions == 1 { "once".to_owned() } else { format!("{sessions} times") };
    format!(
        "You are logged in {times} elsewhere, and more is not allowed. Log out on another device or in another browser, \
         then log in here."
    )
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Busy> for Failure {
    fn from(_: Busy) -> Self {
        Self::Busy
    }
}

impl From<SysError> for Failure {
    fn from(error: SysError) -> Self {
        Self::Random(error)
    }
}

impl From<ProviderError> for Failure {
    fn from(error: ProviderError) -> Self {
        Self::Provider(error)
    }
}

impl fmt::Debug for LoginRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoginRequest").field("method", self.method).field("path", &self.path).finish_non_exhaustive()
    }
}

/// For a program, as on a route.
fn unauthenticated(request: &LoginRequest<'_>) -> Response<Bytes> {
    let message = "Log in and try again.";
    let mut response = failure(StatusCode::UNAUTHORIZED, "unauthenticated", message, request.request_id);
    // 401 must name a scheme (RFC 9110, section 15.5.2); this one opens no dialog in a browser.
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Session"));
    response
}

/// The answer depended on these fields.
fn by_fetch_metadata(mut response: Response<Bytes>) -> Response<Bytes> {
    response.headers_mut().insert(VARY, HeaderValue::from_static("Sec-Fetch-Site, Origin"));
    response
}
