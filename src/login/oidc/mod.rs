//! How does somebody become known by the word of an OpenID Connect provider?
//!
//! ```text
//! oidc/NAME/login         GET   to the provider, with a fresh attempt in a sealed cookie
//! oidc/NAME/callback      GET   back from it: a session, and on to the page that was wanted
//! oidc/NAME/after-logout  GET   back from a logout at the provider
//! oidc/NAME/backchannel   POST  the provider says that somebody has logged out
//! oidc/NAME/frontchannel  GET   the same, through a frame in the browser; only where it is allowed
//! ```
//!
//! Authorization code with PKCE, and nothing else (RFC 9700). Each provider has a callback of its own, so that none can
//! answer in another's name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{ALLOW, REFRESH, SET_COOKIE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use rand::rngs::SysError;
use tracing::warn;

mod attempt;
mod provider;
mod fetch;
mod jws;
mod token;
mod claims;
mod logout;
mod crossing;
mod renew;

use super::csrf::referring_page;
use super::pages::{Link, Message, message_page, redirect};
use super::{Failure, Login, LoginRequest, Notice, note_displaced};
use crate::audit;
use crate::config::model::{self, ACR_VALUES_MAX};
use crate::session::attributes::Changes;
use crate::session::id::SessionId;
use crate::session::network::Network;
use crate::session::record::{ClientHints, ExternalLogin, LoginMethod, Record};
use crate::session::seal::KeyRing;
use crate::session::store::StoreError;
use crate::session::{Newcomer, Started};
use attempt::{Attempt, AttemptCookies, Purpose, Seal};
use claims::Unwelcome;
use fetch::Fetcher;
use jws::SignatureError;
use provider::{Authorization, Provider};
use renew::Renewals;
use token::{Asked, TokenError};

pub use attempt::{NAME_CHARS as ATTEMPT_NAME_CHARS, attempt_cookie_family, rounds_cookie_name};

/// What a route asks of the login itself, beyond that there was one (OpenID Connect Core 1.0, section 3.1.2.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// One of these ways to authenticate; empty = any.
    pub acr: Vec<String>,
    /// Not longer ago than this.
    pub max_age: Option<Duration>,
}

/// All providers of `[login.oidc]`.
#[derive(Debug)]
pub struct Providers {
    by_name: BTreeMap<String, Arc<Provider>>,
    origins: Vec<String>,
    renewals: Arc<Renewals>,
}

/// What can go wrong between us and a provider.
#[derive(Debug)]
pub enum ProviderError {
    /// It does not answer, or not now.
    Away(String),
    /// It answers what no provider should.
    Wrong(String),
    /// It says no, with this code (RFC 6749, section 5.2).
    Refused(String),
    #[expect(private_interfaces, reason = "outside it is only printed")]
    Token(TokenError),
    #[expect(private_interfaces, reason = "outside it is only printed")]
    Signature(SignatureError),
}

/// One address under `oidc/NAME/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Login,
    Callback,
    AfterLogout,
    BackChannel,
    FrontChannel,
}

/// Why a callback begins no session.
enum Refusal {
    /// Not one `state` with one `code` or one `error`.
    NotUnderstood,
    /// This browser has begun no such login, or too long ago, or it was answered already.
    NoSuchAttempt,
    /// The answer of another provider.
    OtherIssuer,
    /// The provider has sent the browser back without a code.
    Sent(String),
    Provider(ProviderError),
    Unwelcome(Unwelcome),
    /// From this network, which is to wait for so long.
    TooManyCodes(Duration),
    /// The user has so many sessions already.
    Full(u32),
    /// At the provider, while this login was under way.
    LoggedOut,
}

/// What the provider put into the address of the callback.
#[derive(Debug, Default)]
struct Returned {
    state: Option<String>,
    code: Option<String>,
    error: Option<String>,
    iss: Option<String>,
}

/// Names of what is sealed in a session.
const ID_TOKEN: &str = "id_token";
const ACCESS_TOKEN: &str = "access_token";
const REFRESH_TOKEN: &str = "refresh_token";
/// A record takes 64 KiB, and its tokens are not all that is in it.
const TOKEN_BYTES_KEPT: usize = 12 * 1024;
/// Codes from one network in [`CODES_WINDOW`] of which nothing came: each costs the provider a question, and us one of the
/// places to ask.
const CODES_MAX: u64 = 100;
const CODES_WINDOW: Duration = Duration::from_secs(60);
/// A code or a state that is longer is none that anybody gave out.
const PARAMETER_BYTES_MAX: usize = 4 * 1024;

impl Providers {
    /// Asks nobody yet.
    pub(super) fn new(config: &model::Login, ring: Option<&Arc<KeyRing>>) -> Result<Self, SysError> {
        let agent = Fetcher::agent(!config.oidc.is_empty());
        let build = |(name, provider): (&String, &model::OidcLogin)| {
            let secret = provider.client_secret.as_ref().map(|secret| secret.get_ref().expose());
            let seal = Seal::new(ring, secret)?;
            Ok((name.clone(), Arc::new(Provider::new(name, provider, seal, Fetcher::new(agent.clone())))))
        };
        Ok(Self {
            by_name: config.oidc.iter().map(build).collect::<Result<_, _>>()?,
            origins: config.origins.iter().map(|origin| origin.get_ref().clone()).collect(),
            renewals: Arc::default(),
        })
    }

    /// What is known of the providers whose tables are as they were, attempts at public clients among it, and whose tokens
    /// are looked after.
    pub(super) fn take_over(&mut self, previous: &Self) {
        for (name, provider) in &mut self.by_name {
            if let Some(same) = previous.by_name.get(name).filter(|older| older.config == provider.config) {
                *provider = Arc::clone(same);
            }
        }
        self.renewals = Arc::clone(&previous.renewals);
    }

    /// Name and title of each, for the login page.
    pub(super) fn titles(&self) -> impl Iterator<Item = (&str, &str)> {
        self.by_name.values().map(|provider| (&*provider.name, &*provider.title))
    }

    /// Asks each what it is: its name, and what was found odd about it.
    pub async fn inspect(&self) -> Vec<(&str, Result<Vec<String>, ProviderError>)> {
        let mut findings = Vec::new();
        for provider in self.by_name.values() {
            findings.push((provider.name.as_str(), provider.inspect().await));
        }
        findings
    }

    /// Whether a session that this login began still counts: its provider may have been removed since. The fallback cookie
    /// carries no login, and for its short life it is enough that there are providers.
    pub fn vouches_for(&self, login: Option<&ExternalLogin>) -> bool {
        match login {
            Some(login) => {
                let provider = self.by_name.get(&login.provider);
                provider.is_some_and(|provider| provider.issuer == login.issuer)
            }
            None => !self.by_name.is_empty(),
        }
    }

    /// The path of an endpoint: `NAME/callback`.
    fn endpoint(&self, path: &str) -> Option<(&Arc<Provider>, Step)> {
        let (name, step) = path.split_once('/')?;
        let step = match step {
            "login" => Step::Login,
            "callback" => Step::Callback,
            "after-logout" => Step::AfterLogout,
            "backchannel" => Step::BackChannel,
            "frontchannel" => Step::FrontChannel,
            _ => return None,
        };
        Some((self.by_name.get(name)?, step))
    }
}

impl Demand {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether this login, at this Unix time in s, is not enough.
    pub fn exceeds(&self, record: &Record, now: u64) -> bool {
        let login = record.login.as_ref();
        let acr = login.and_then(|login| login.acr.as_ref());
        let too_weak = !self.acr.is_empty() && !acr.is_some_and(|acr| self.acr.contains(acr));
        // When somebody proved something to a provider, only the provider knows; asked for it, it must say.
        let proved = login.map_or(Some(record.created / 1000), |login| login.auth_time);
        let is_too_old = |max_age: Duration| proved.is_none_or(|at| at.saturating_add(max_age.as_secs()) < now);
        too_weak || self.max_age.is_some_and(is_too_old)
    }
}

impl Login {
    pub fn providers(&self) -> &Providers {
        &self.providers
    }

    /// Answers what lies under `oidc/`.
    pub(super) async fn answer_for_provider(
        &self,
        path: &str,
        request: &LoginRequest<'_>,
    ) -> Option<Result<Response<Bytes>, Failure>> {
        let (provider, step) = self.providers.endpoint(path)?;
        let is_get = [&Method::GET, &Method::HEAD].contains(&request.method);
        Some(match step {
            Step::Login if is_get => self.begin(provider, request).await,
            Step::Callback if is_get => self.callback(provider, request).await,
            Step::AfterLogout if is_get => Ok(self.after_logout(provider, request)),
            Step::BackChannel if request.method == Method::POST => self.backchannel(provider, request).await,
            Step::FrontChannel if is_get => self.frontchannel(provider, request).await,
            Step::Login | Step::Callback | Step::AfterLogout | Step::FrontChannel => {
                Ok(self.wrong_method_for("GET, HEAD", request))
            }
            Step::BackChannel => Ok(self.wrong_method_for("POST", request)),
        })
    }

    /// Sends a page navigation whose login is not enough for a route to a better one.
    pub fn step_up(&self, path_and_query: &str, demand: &Demand, record: &Record) -> Response<Bytes> {
        let Some(address) = self.better_login(path_and_query, demand, record) else {
            return self.login_redirect(path_and_query, None);
        };
        if record.login.is_some() || demand.acr.is_empty() {
            return redirect(StatusCode::FOUND, &address);
        }
        // Perhaps the login form has led here, and browsers hold all redirects of a form to its page's `form-action`: a page
        // of our own ends that chain.
        let (title, text) = ("One more step", "This page takes a login at another place, which follows.");
        let mut response = self.leading_page(StatusCode::OK, title, text, &address);
        if let Ok(refresh) = refresh_to(&address) {
            response.headers_mut().insert(REFRESH, refresh);
        }
        response
    }

    /// As [`Self::step_up`], of a form that was posted: a page says that it was not taken, and leads to the login and from
    /// there to the page that held it, as far as the browser says which one that was (`Referer`, of our own `origin`).
    pub fn form_step_up(&self, headers: &HeaderMap, origin: &str, demand: &Demand, record: &Record) -> Response<Bytes> {
        let page = referring_page(headers, origin).unwrap_or_default();
        let Some(address) = self.better_login(page, demand, record) else {
            return self.form_redirect(headers, origin);
        };
        let text = "What you just sent was not taken: it takes another login than yours. After that, look at the page \
                    that you sent it from, and send it again.";
        self.leading_page(StatusCode::FORBIDDEN, "One more step", text, &address)
    }

    /// The address of a login as demanded, with the provider of this session, else the first one; or in any way, where
    /// none was asked and the login only has to be new. It leads to `target` where that is safe to follow.
    fn better_login(&self, target: &str, demand: &Demand, record: &Record) -> Option<String> {
        if demand.acr.is_empty() && record.login.is_none() {
            return Some(self.login_address(self.own_page(target).as_ref(), Some(Notice::Confirm)));
        }
        let current = record.login.as_ref().and_then(|login| self.providers.by_name.get(&login.provider));
        let provider = current.or_else(|| self.providers.by_name.values().next())?;
        Some(self.address_of_login(provider, target, &demand.acr, demand.max_age.map(|age| age.as_secs())))
    }

    /// `max_age`: in s.
    fn address_of_login(&self, provider: &Provider, target: &str, acr: &[String], max_age: Option<u64>) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(target) = self.own_page(target) {
            query.append_pair("return_to", &target.to_string());
        }
        if !acr.is_empty() {
            query.append_pair("acr", &acr.join(" "));
        }
        if let Some(max_age) = max_age {
            query.append_pair("max_age", &max_age.to_string());
        }
        let query = query.finish();
        let separator = if query.is_empty() { "" } else { "?" };
        format!("{}oidc/{}/login{separator}{query}", self.prefix, provider.name)
    }

    fn leading_page(&self, status: StatusCode, title: &str, text: &str, address: &str) -> Response<Bytes> {
        let next = Some(Link { href: address, text: "Log in" });
        message_page(&self.prefix, &Message { status, title, text, next, retry_after: None, request_id: "" })
    }

    /// To the provider. What the address asks for (`acr`, `max_age`) can only make the login harder.
    async fn begin(&self, provider: &Arc<Provider>, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let asked = |wanted: &str| {
            let mut pairs = form_urlencoded::parse(request.query.unwrap_or_default().as_bytes());
            pairs.find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned())
        };
        let Some(origin) = self.providers.origins.iter().find(|origin| origin.eq_ignore_ascii_case(request.origin))
        else {
            warn!(
                provider = provider.name,
                origin = request.origin,
                "a login from an origin that is not in login.origins"
            );
            let text = "This site cannot be logged in to at this address. Use its usual address.";
            return Ok(self.message(request, StatusCode::BAD_REQUEST, "unknown_origin", ("Not at this address", text)));
        };
        // A login that another site begins (OpenID Connect Core 1.0, section 4) must mean this provider, and a page of ours.
        if asked("iss").is_some_and(|issuer| issuer != provider.issuer) {
            return Ok(self.refuse(provider, request, None, &Refusal::OtherIssuer));
        }
        let target = asked("return_to").or_else(|| {
            let target = asked("target_link_uri")?;
            target.strip_prefix(origin.as_str()).map(str::to_owned)
        });
        let return_to = self.return_to(target.as_deref());
        // A link on another site is no reason to give up a good session for what the provider says without asking anybody.
        let is_foreign = request.headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site");
        let asks_for_more = ["acr", "max_age"].iter().any(|name| asked(name).is_some());
        if is_foreign && !asks_for_more && self.visitor(request).await?.is_some() {
            return Ok(redirect(StatusCode::SEE_OTHER, &return_to.to_string()));
        }

        let now = now();
        let cookies = AttemptCookies::beside(request.cookie, request.secure);
        let Some(round) = cookies.count_round(request.headers, now) else {
            self.note_attempt(at_provider(provider, request, "circle"));
            let text = "You were sent to log in again and again. Your browser may not accept our cookies; or wait a \
                        minute, and try again.";
            return Ok(self.message(request, StatusCode::TOO_MANY_REQUESTS, "circle", ("Going in circles", text)));
        };
        let known = provider.known().await?;
        let mut attempt = Attempt::begin(&provider.name, Purpose::Login, origin, return_to.to_string(), now)?;
        let is_acr =
            |acr: &&str| !acr.is_empty() && acr.len() <= 128 && acr.bytes().all(|byte| byte.is_ascii_graphic());
        let values = asked("acr").unwrap_or_default();
        attempt.acr = values.split(' ').filter(is_acr).take(ACR_VALUES_MAX).map(str::to_owned).collect();
        attempt.max_age = asked("max_age").and_then(|seconds| seconds.parse().ok());
        // A `Strict` cookie does not come back with the answer.
        let replaces = request.cookie.find(request.headers).filter(|_| request.cookie.is_strict());
        attempt.replaces = replaces.map(|id| id.to_cookie_value());
        let authorization = Authorization {
            redirect_uri: &self.callback_url(provider, origin),
            state: &attempt.state,
            nonce: &attempt.nonce,
            code_challenge: &attempt.code_challenge(),
            acr: &attempt.acr,
            max_age: attempt.max_age,
        };
        let mut response = to_provider(&provider.authorization_url(&known, &authorization))?;
        for cookie in cookies.set(request.headers, &provider.seal, &attempt, now)? {
            response.headers_mut().append(SET_COOKIE, cookie);
        }
        response.headers_mut().append(SET_COOKIE, round);
        Ok(response)
    }

    /// Back from the provider. Whatever comes of it, the attempt is over.
    async fn callback(&self, provider: &Arc<Provider>, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let Some(returned) = Returned::parse(request.query.unwrap_or_default()) else {
            return Ok(self.refuse(provider, request, None, &Refusal::NotUnderstood));
        };
        let Some(state) = &returned.state else {
            return Ok(self.refuse(provider, request, None, &Refusal::NotUnderstood));
        };
        let cookies = AttemptCookies::beside(request.cookie, request.secure);
        let attempt = cookies.find(request.headers, &provider.seal, &provider.name, state);
        let attempt = attempt.filter(|attempt| attempt.purpose == Purpose::Login);
        let is_good =
            |attempt: &&Attempt| !attempt.is_over(now()) && attempt.origin.eq_ignore_ascii_case(request.origin);
        let Some(open) = attempt.as_ref().filter(is_good) else {
            return self.come_late(provider, request, attempt.as_ref(), &Refusal::NoSuchAttempt).await;
        };
        let mut response = match self.log_in_by(provider, request, open, &returned).await? {
            Ok(response) => response,
            // An answer that came before: its code is used up.
            Err(refusal @ (Refusal::NoSuchAttempt | Refusal::Provider(ProviderError::Refused(_)))) => {
                self.come_late(provider, request, attempt.as_ref(), &refusal).await?
            }
            Err(refusal) => self.refuse(provider, request, Some(open), &refusal),
        };
        if let Some(cookie) = cookies.clear(&open.state) {
            response.headers_mut().append(SET_COOKIE, cookie);
        }
        Ok(response)
    }

    /// The answer to no attempt of this browser. Somebody with a good session, who went back or logged in in another tab
    /// meanwhile, just goes on.
    async fn come_late(
        &self,
        provider: &Provider,
        request: &LoginRequest<'_>,
        attempt: Option<&Attempt>,
        refusal: &Refusal,
    ) -> Result<Response<Bytes>, Failure> {
        if self.visitor(request).await?.is_some() {
            let target = self.return_to(attempt.map(|attempt| attempt.return_to.as_str()));
            return Ok(redirect(StatusCode::SEE_OTHER, &target.to_string()));
        }
        Ok(self.refuse(provider, request, attempt, refusal))
    }

    async fn log_in_by(
        &self,
        provider: &Arc<Provider>,
        request: &LoginRequest<'_>,
        attempt: &Attempt,
        returned: &Returned,
    ) -> Result<Result<Response<Bytes>, Refusal>, Failure> {
        let known = match provider.known().await {
            Ok(known) => known,
            Err(error) => return Ok(Err(Refusal::Provider(error))),
        };
        // RFC 9207, section 2.4.
        let must_name_itself = known.metadata.authorization_response_iss_parameter_supported;
        let is_named = returned.iss.as_ref().map(|issuer| *issuer == provider.issuer);
        if is_named == Some(false) || (must_name_itself && is_named.is_none()) {
            return Ok(Err(Refusal::OtherIssuer));
        }
        let Some(code) = &returned.code else {
            return Ok(Err(Refusal::Sent(error_code(returned.error.as_deref().unwrap_or_default()))));
        };
        // Anybody can send us to the provider with a code, and only so often: a good one does not count.
        let (store, counter) = (self.sessions.store(), format!("oidc codes {:?}", Network::of(request.client)));
        let count = store.increment(&counter, CODES_WINDOW).await?;
        let resets = Instant::now() + count.resets_in;
        if CODES_MAX < count.value {
            return Ok(Err(Refusal::TooManyCodes(count.resets_in)));
        }
        let before = crossing::before(&self.sessions, &provider.issuer).await?;
        let newcomer = match self.newcomer(provider, request, attempt, code).await {
            Ok(newcomer) => newcomer,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if Instant::now() < resets {
            // When this fails, it is the time that must pass.
            let _: Result<(), StoreError> = store.decrement(&counter).await;
        }
        // The cookie goes with the answer, and a copy of it is good for nothing, whatever the provider does with a code
        // that comes twice.
        if !self.providers.first_use(self, provider, &attempt.state).await? {
            return Ok(Err(Refusal::NoSuchAttempt));
        }
        let (user, login) = (newcomer.identity.user.clone(), newcomer.login.clone());
        let of_attempt = || attempt.replaces.as_deref().and_then(SessionId::parse);
        let replaces = request.cookie.find(request.headers).or_else(of_attempt);
        let id = match self.sessions.start(newcomer, replaces.as_ref(), &Changes::default()).await? {
            Started::Begun { id, displaced } => {
                let is_logged_out = match &login {
                    Some(login) => crossing::is_logged_out(&self.sessions, login, before).await,
                    None => Ok(false),
                };
                if !matches!(is_logged_out, Ok(false)) {
                    // Nobody gets its cookie, also when the store does not say.
                    note_displaced(&user, displaced);
                    let revoked = self.sessions.revoke(&id.key(), Some(&user)).await;
                    is_logged_out?;
                    revoked?;
                    return Ok(Err(Refusal::LoggedOut));
                }
                self.note_begun(at_provider(provider, request, "success"), &user, &id, displaced);
                id
            }
            Started::Full(sessions) => return Ok(Err(Refusal::Full(sessions))),
        };
        let return_to = self.return_to(Some(&attempt.return_to)).to_string();
        let mut response = if request.cookie.is_strict() {
            // A `Strict` cookie does not travel with a redirect that another site began; it does with a page that loads
            // another.
            let next = Some(Link { href: &return_to, text: "Continue" });
            let (title, text) = ("You are logged in", "The page that you wanted follows.");
            let mut response = self.page_with_next(request, StatusCode::OK, title, text, next);
            response.headers_mut().insert(REFRESH, refresh_to(&return_to)?);
            response
        } else {
            redirect(StatusCode::SEE_OTHER, &return_to)
        };
        response.headers_mut().append(SET_COOKIE, request.cookie.set(&id));
        Ok(Ok(response))
    }

    /// Redeems the code: who the provider says this is.
    async fn newcomer(
        &self,
        provider: &Arc<Provider>,
        request: &LoginRequest<'_>,
        attempt: &Attempt,
        code: &str,
    ) -> Result<Newcomer, Refusal> {
        let redirect_uri = self.callback_url(provider, &attempt.origin);
        let tokens = provider.redeem(code, &redirect_uri, &attempt.verifier).await.map_err(Refusal::Provider)?;
        let now = now();
        let Some(id_token) = &tokens.id_token else {
            return Err(Refusal::Provider(ProviderError::Wrong("it gives no ID token".to_owned())));
        };
        let asked = Asked {
            nonce: Some(&attempt.nonce),
            acr: &attempt.acr,
            max_age: attempt.max_age,
            waited: now.saturating_sub(attempt.begun),
            access_token: tokens.access_token.as_deref(),
        };
        let token = provider.id_token(id_token, now, &asked).await.map_err(Refusal::Provider)?;
        let access_token = tokens.access_token.as_deref();
        let claims =
            provider.claims(&token.subject, &token.claims, access_token, now).await.map_err(Refusal::Provider)?;
        let identity = provider.mapping.identity(&claims).map_err(Refusal::Unwelcome)?;

        let secrets = kept_tokens(provider, &tokens, None);
        let may_refresh = secrets.contains_key(REFRESH_TOKEN);
        let login = ExternalLogin {
            provider: provider.name.clone(),
            issuer: provider.issuer.clone(),
            subject: token.subject,
            sid: token.sid,
            auth_time: token.auth_time,
            acr: token.acr,
            access_ends: tokens.access_ends(now).filter(|_| may_refresh),
        };
        let client = ClientHints::of(request.headers, request.client);
        let (method, login) = (LoginMethod::Oidc, Some(login));
        Ok(Newcomer { identity, method, client, secrets, login, attributes: BTreeMap::new() })
    }

    /// A page that says what to do next, and nothing that the provider or the address said.
    fn refuse(
        &self,
        provider: &Provider,
        request: &LoginRequest<'_>,
        attempt: Option<&Attempt>,
        refusal: &Refusal,
    ) -> Response<Bytes> {
        self.note_attempt(at_provider(provider, request, refusal.label()));
        if let Refusal::Provider(error) = refusal {
            warn!(provider = provider.name, request_id = request.request_id, %error, "login at the provider failed");
        }
        let (status, title, text) = refusal.words();
        let again = match attempt {
            Some(attempt) => self.address_of_login(provider, &attempt.return_to, &attempt.acr, attempt.max_age),
            None => self.address_of_login(provider, "", &[], None),
        };
        let next = Some(Link { href: &again, text: "Log in again" });
        let mut response = self.page_with_next(request, status, title, &text, next);
        if let Refusal::TooManyCodes(wait) = refusal {
            super::pages::set_retry_after(&mut response, *wait);
        } else if status == StatusCode::SERVICE_UNAVAILABLE {
            super::pages::set_retry_after(&mut response, super::RETRY_AFTER);
        }
        response
    }

    fn page_with_next(
        &self,
        request: &LoginRequest<'_>,
        status: StatusCode,
        title: &str,
        text: &str,
        next: Option<Link<'_>>,
    ) -> Response<Bytes> {
        let request_id = if status.is_success() { "" } else { request.request_id };
        message_page(&self.prefix, &Message { status, title, text, next, retry_after: None, request_id })
    }

    fn wrong_method_for(&self, methods: &'static str, request: &LoginRequest<'_>) -> Response<Bytes> {
        let text = "This address does not take that kind of request.";
        let mut response =
            self.message(request, StatusCode::METHOD_NOT_ALLOWED, "wrong_method", ("Not possible", text));
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
        response
    }

    fn callback_url(&self, provider: &Provider, origin: &str) -> String {
        format!("{origin}{}oidc/{}/callback", self.prefix, provider.name)
    }
}

/// A login there, for the audit.
fn at_provider<'a>(provider: &'a Provider, request: &LoginRequest<'_>, result: &'a str) -> audit::LoginAttempt<'a> {
    let attempt = audit::LoginAttempt::without_session("oidc", request.client, result);
    audit::LoginAttempt { provider: Some(&provider.name), ..attempt }
}

impl Providers {
    /// Whether nobody has answered the attempt with this state, at any instance.
    async fn first_use(&self, login: &Login, provider: &Provider, state: &str) -> Result<bool, Failure> {
        let name = format!("oidc state\0{}\0{state}", provider.name);
        let time = Duration::from_secs(attempt::LIFE + 60);
        Ok(login.sessions.store().claim(&name, "answered", time).await?)
    }
}

impl Returned {
    /// None when a parameter that counts is there twice, for nothing says which of them is meant.
    fn parse(query: &str) -> Option<Self> {
        let mut returned = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*name {
                "state" => &mut returned.state,
                "code" => &mut returned.code,
                "error" => &mut returned.error,
                "iss" => &mut returned.iss,
                _ => continue,
            };
            if place.is_some() || value.is_empty() || PARAMETER_BYTES_MAX < value.len() {
                return None;
            }
            *place = Some(value.into_owned());
        }
        (returned.code.is_some() != returned.error.is_some()).then_some(returned)
    }
}

impl Refusal {
    fn label(&self) -> &'static str {
        match self {
            Self::NotUnderstood => "not_understood",
            Self::NoSuchAttempt => "no_such_attempt",
            Self::OtherIssuer => "other_issuer",
            Self::Sent(_) => "provider_refused",
            Self::Provider(error) => error.label(),
            Self::Unwelcome(why) => why.label(),
            Self::TooManyCodes(_) => "too_many",
            Self::Full(_) => "full",
            Self::LoggedOut => "logged_out",
        }
    }

    /// Status, title, and the next move.
    fn words(&self) -> (StatusCode, &'static str, String) {
        let (status, title, text) = match self {
            Self::NotUnderstood => (
                StatusCode::BAD_REQUEST,
                "That was not understood",
                "The login service sent you back with nothing to go on.",
            ),
            Self::NoSuchAttempt => (
                StatusCode::BAD_REQUEST,
                "This login is over",
                "It was begun too long ago, in another browser, or is used up already. Please log in again.",
            ),
            Self::OtherIssuer => {
                (StatusCode::BAD_REQUEST, "Refused", "This answer does not come from the login service that was asked.")
            }
            Self::Sent(code) if code == "access_denied" => (
                StatusCode::FORBIDDEN,
                "Not logged in",
                "The login was cancelled, or the login service does not let you in.",
            ),
            Self::Sent(_) => {
                (StatusCode::BAD_GATEWAY, "Not logged in", "The login service could not log you in. Please try again.")
            }
            Self::Provider(ProviderError::Away(_)) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "Back in a moment",
                "The login service does not answer. Please try again shortly.",
            ),
            Self::Provider(ProviderError::Refused(_)) => (
                StatusCode::BAD_REQUEST,
                "Not logged in",
                "The login service did not confirm this login. Please log in again.",
            ),
            Self::Provider(ProviderError::Token(TokenError::Acr | TokenError::TooOld)) => (
                StatusCode::FORBIDDEN,
                "Not enough",
                "This page asks for another kind of login than the login service has made. Please log in again.",
            ),
            Self::Provider(ProviderError::Wrong(_) | ProviderError::Token(_) | ProviderError::Signature(_)) => (
                StatusCode::BAD_GATEWAY,
                "Not logged in",
                "The login service gave an answer that cannot be relied on. Please tell whoever runs this site.",
            ),
            Self::TooManyCodes(_) => (
                StatusCode::TOO_MANY_REQUESTS,
                "Too many logins",
                "Too many logins from your network have failed. Please try again in a minute.",
            ),
            Self::Unwelcome(Unwelcome::TooMuch) => (
                StatusCode::FORBIDDEN,
                "Not logged in",
                "The login service says more of you, of your groups perhaps, than this site can keep. Please tell whoever \
                 runs it.",
            ),
            Self::Unwelcome(Unwelcome::NoName | Unwelcome::NotAllowed) => (
                StatusCode::FORBIDDEN,
                "Not allowed",
                "The login service knows you, but your account may not use this site. Ask whoever runs it.",
            ),
            Self::LoggedOut => (
                StatusCode::FORBIDDEN,
                "Not logged in",
                "You have logged out at the login service meanwhile. Please log in again.",
            ),
            Self::Full(sessions) => return (StatusCode::FORBIDDEN, "Logged in elsewhere", super::full(*sessions)),
        };
        (status, title, text.to_owned())
    }
}

impl ProviderError {
    pub fn label(&self) -> &'static str {
        match self {
            Self::Away(_) => "provider_away",
            Self::Wrong(_) => "provider_wrong",
            Self::Refused(_) => "code_refused",
            Self::Token(_) => "bad_token",
            Self::Signature(_) => "bad_signature",
        }
    }
}

impl fmt::Display for ProviderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(why) => write!(f, "it does not answer: {why}"),
            Self::Wrong(what) => f.write_str(what),
            Self::Refused(code) => write!(f, "it refuses: {code}"),
            Self::Token(error) => write!(f, "its token is refused: {error}"),
            Self::Signature(error) => write!(f, "its token is refused: {error}"),
        }
    }
}

impl std::error::Error for ProviderError {}

/// What a session keeps of the tokens. `older`: what it kept before, of which what was not renewed stays.
fn kept_tokens(
    provider: &Provider,
    tokens: &provider::Tokens,
    older: Option<BTreeMap<String, String>>,
) -> BTreeMap<String, String> {
    let mut kept = older.unwrap_or_default();
    let wanted = [
        (ID_TOKEN, &tokens.id_token, provider.logs_out),
        (ACCESS_TOKEN, &tokens.access_token, provider.keeps_tokens),
        (REFRESH_TOKEN, &tokens.refresh_token, provider.keeps_tokens),
    ];
    for (name, token, is_wanted) in wanted {
        let Some(token) = token.as_ref().filter(|_| is_wanted) else { continue };
        if TOKEN_BYTES_KEPT < token.len() {
            warn!(provider = provider.name, token = name, bytes = token.len(), "too large to be kept");
            kept.remove(name);
        } else {
            kept.insert(name.to_owned(), token.clone());
        }
    }
    kept
}

/// An `error` of OAuth when it looks like one, for the log (RFC 6749, section 4.1.2.1).
fn error_code(text: &str) -> String {
    let is_code = !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    if is_code { text.to_owned() } else { "unnamed".to_owned() }
}

/// `url`: of the provider's metadata, with a query that is encoded.
fn to_provider(url: &str) -> Result<Response<Bytes>, Failure> {
    let location = HeaderValue::try_from(url);
    let location = location.map_err(|_| ProviderError::Wrong("its endpoint is no printable URL".to_owned()))?;
    let mut response = redirect(StatusCode::SEE_OTHER, "/");
    response.headers_mut().insert(http::header::LOCATION, location);
    // The provider learns nothing of the page that one comes from.
    response.headers_mut().insert(http::header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Ok(response)
}

fn refresh_to(url: &str) -> Result<HeaderValue, Failure> {
    let value = HeaderValue::try_from(format!("0; url={url}"));
    Ok(value.map_err(|_| ProviderError::Wrong("its endpoint is no printable URL".to_owned()))?)
}

/// Unix time in s, by our own clock.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
