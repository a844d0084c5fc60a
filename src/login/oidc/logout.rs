//! How does a logout reach the provider, and one at the provider reach us?

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, REFRESH, SET_COOKIE};
use http::{HeaderValue, Response, StatusCode};
use serde_json::json;
use tracing::warn;

use super::attempt::{Attempt, AttemptCookies, Purpose};
use super::provider::{Provider, with_query};
use super::{ID_TOKEN, ProviderError, crossing, now, refresh_to};
use crate::audit::{self, Event, Revoker};
use crate::login::form::Form;
use crate::login::pages::{Link, json as json_page};
use crate::login::{Failure, Login, LoginRequest};
use crate::session::Session;
use crate::session::id::SessionId;
use crate::session::record::ExternalLogin;
use crate::session::store::StoreError;

/// A logout token is taken by one request for so long, and remembered when that has carried it out: what a store that
/// fails leaves behind is soon gone, and the provider's next try counts.
const CARRIED_OUT_WITHIN: Duration = Duration::from_secs(10);

impl Login {
    /// Where somebody goes on to whose session has just ended here: the provider's own logout (OpenID Connect
    /// RP-Initiated Logout 1.0, section 2). None where there is none, or it cannot be reached now.
    ///
    /// A page that leads on, and no redirect: browsers hold the redirects of a form to the page's `form-action`.
    pub(in crate::login) async fn log_out_at_provider(
        &self,
        request: &LoginRequest<'_>,
        id: &SessionId,
        session: &Session,
    ) -> Option<Response<Bytes>> {
        let login = session.record.login.as_ref()?;
        let provider = self.providers.by_name.get(&login.provider).filter(|provider| provider.logs_out)?;
        let known = provider.known().await.ok()?;
        let endpoint = known.metadata.end_session_endpoint.as_ref()?;
        let origin = self.providers.origins.iter().find(|origin| origin.eq_ignore_ascii_case(request.origin))?;
        let attempt = Attempt::begin(&provider.name, Purpose::Logout, origin, String::new(), now()).ok()?;
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("client_id", &provider.client_id);
        if let Some(id_token) =
            self.sessions.secrets(id, &session.record).ok().and_then(|mut kept| kept.remove(ID_TOKEN))
        {
            query.append_pair("id_token_hint", &id_token);
        }
        let back = format!("{origin}{}oidc/{}/after-logout", self.prefix, provider.name);
        query.append_pair("post_logout_redirect_uri", &back).append_pair("state", &attempt.state);
        let url = with_query(endpoint, &query.finish());

        let title = format!("Logging out at {}", provider.title);
        let text = "You are logged out here. The login service follows.";
        let next = Some(Link { href: &url, text: "Continue" });
        let mut response = self.page_with_next(request, StatusCode::OK, &title, text, next);
        response.headers_mut().insert(REFRESH, refresh_to(&url).ok()?);
        let cookies = AttemptCookies::beside(request.cookie, request.secure);
        for cookie in cookies.set(request.headers, &provider.seal, &attempt, now()).ok()? {
            response.headers_mut().append(SET_COOKIE, cookie);
        }
        Some(response)
    }

    /// Back from the provider's logout. Our session has ended before; the `state` says whether this is the answer to it
    /// (section 3).
    pub(super) fn after_logout(&self, provider: &Provider, request: &LoginRequest<'_>) -> Response<Bytes> {
        let cookies = AttemptCookies::beside(request.cookie, request.secure);
        let mut states = form_urlencoded::parse(request.query.unwrap_or_default().as_bytes())
            .filter_map(|(name, value)| (name == "state").then(|| value.into_owned()));
        let state = states.next().filter(|_| states.next().is_none());
        let attempt = state.and_then(|state| cookies.find(request.headers, &provider.seal, &provider.name, &state));
        let is_answer = |attempt: &Attempt| attempt.purpose == Purpose::Logout && !attempt.is_over(now());
        match attempt.filter(is_answer) {
            Some(attempt) => {
                let mut response = self.logged_out_page();
                if let Some(cookie) = cookies.clear(&attempt.state) {
                    response.headers_mut().append(SET_COOKIE, cookie);
                }
                response
            }
            None => {
                let text =
                    "This is not the answer to a logout of this browser. If you meant to log out, do it from here.";
                let href = format!("{}logout", self.prefix);
                let next = Some(Link { href: &href, text: "Log out" });
                self.page_with_next(request, StatusCode::BAD_REQUEST, "Logged out?", text, next)
            }
        }
    }

    /// The provider tells us, without the browser, that somebody has logged out (OpenID Connect Back-Channel Logout 1.0).
    pub(super) async fn backchannel(
        &self,
        provider: &Arc<Provider>,
        request: &LoginRequest<'_>,
    ) -> Result<Response<Bytes>, Failure> {
        let refused = |why: &dyn std::fmt::Display, result| {
            warn!(provider = provider.name, client = %request.client, request_id = request.request_id, cause = %why, "logout by the provider refused");
            self.metrics.provider_logouts.with_label_values(&["backchannel", result]).inc();
            // Section 2.8.
            json_page(StatusCode::BAD_REQUEST, &json!({ "error": "invalid_request" }))
        };
        let Ok(form) = Form::parse(request.headers, &request.body) else {
            return Ok(refused(&"it is no form", "refused"));
        };
        let Some(token) = form.get("logout_token") else { return Ok(refused(&"no logout_token", "refused")) };
        let token = match provider.logout_token(token, now()).await {
            Ok(token) => token,
            // We could not look: the provider may try again.
            Err(error @ ProviderError::Away(_)) => return Err(error.into()),
            Err(error) => return Ok(refused(&error, error.label())),
        };
        let replay = format!("oidc logout\0{}\0{}", provider.issuer, token.id);
        let remembered = Duration::from_secs(token.expires.saturating_sub(now()).max(1));
        let store = self.sessions.store();
        // Not carried out, so that it may come again. When that fails as well, it is the time that must pass.
        let take_back = async || {
            let _: Result<(), StoreError> = store.release(&replay, request.request_id).await;
        };
        match store.claim(&replay, request.request_id, CARRIED_OUT_WITHIN).await {
            Ok(true) => {}
            Ok(false) => return Ok(refused(&"it came before", "replayed")),
            Err(error) => {
                // Perhaps it was noted, and only the answer was late.
                take_back().await;
                return Err(error.into());
            }
        }
        // With a `sid` it means that session of the provider alone (section 2.7).
        let issuer = &provider.issuer;
        let handles = match (&token.sid, &token.subject) {
            // And those that may be of it, for all that their ID tokens said.
            (Some(sid), Some(subject)) => {
                vec![ExternalLogin::handle_of_sid(issuer, sid), ExternalLogin::handle_without_sid(issuer, subject)]
            }
            (Some(sid), None) => vec![ExternalLogin::handle_of_sid(issuer, sid)],
            (None, Some(subject)) => vec![ExternalLogin::handle_of_subject(issuer, subject)],
            (None, None) => return Ok(refused(&"it names nobody", "refused")),
        };
        let carry_out = async || {
            crossing::leave_word(&self.sessions, issuer, &handles).await?;
            self.sessions.revoke_bound(&handles).await
        };
        let ended = match carry_out().await {
            Ok(ended) => ended,
            Err(error) => {
                take_back().await;
                return Err(error.into());
            }
        };
        // Between these two it could be carried out once more, which ends nothing new.
        take_back().await;
        store.claim(&replay, request.request_id, remembered).await?;
        self.note_provider_logout(provider, request, "backchannel", ended);
        let mut response = Response::default();
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }

    /// A frame on the provider's page says it (OpenID Connect Front-Channel Logout 1.0). Our cookie does not travel into
    /// a frame of another site, so the `sid` must be enough; only the provider and the user's browser know it.
    pub(super) async fn frontchannel(
        &self,
        provider: &Provider,
        request: &LoginRequest<'_>,
    ) -> Result<Response<Bytes>, Failure> {
        if !provider.frontchannel_logout {
            return Ok(self.not_found(request));
        }
        let (mut issuer, mut sid) = (Vec::new(), Vec::new());
        for (name, value) in form_urlencoded::parse(request.query.unwrap_or_default().as_bytes()) {
            match &*name {
                "iss" => issuer.push(value),
                "sid" => sid.push(value),
                _ => {}
            }
        }
        let named = match (&issuer[..], &sid[..]) {
            ([issuer], [sid]) if **issuer == *provider.issuer && !sid.is_empty() => Some((issuer, sid)),
            _ => None,
        };
        let Some((issuer, sid)) = named else {
            self.metrics.provider_logouts.with_label_values(&["frontchannel", "refused"]).inc();
            let words = ("Refused", "This ends no session.");
            return Ok(self.message(request, StatusCode::BAD_REQUEST, "no_such_session", words));
        };
        let ended = self.sessions.revoke_bound(&[ExternalLogin::handle_of_sid(issuer, sid)]).await?;
        self.note_provider_logout(provider, request, "frontchannel", ended);
        let mut response = self.logged_out_page();
        let headers = response.headers_mut();
        headers.remove(header::X_FRAME_OPTIONS);
        let policy = format!("default-src 'none'; frame-ancestors {}", origin_of(&provider.issuer));
        if let Ok(policy) = HeaderValue::try_from(policy) {
            headers.insert(header::CONTENT_SECURITY_POLICY, policy);
        }
        Ok(response)
    }

    fn note_provider_logout(&self, provider: &Provider, request: &LoginRequest<'_>, channel: &str, ended: u64) {
        self.metrics.provider_logouts.with_label_values(&[channel, "carried_out"]).inc();
        let (by, client, what) = (Revoker::Provider, Some(request.client), format!("{channel} {}", provider.name));
        audit::tell(Event::Revoked { by, client, user: None, what: &what, ended });
    }
}

/// Scheme and authority of a URL that was checked.
fn origin_of(url: &str) -> &str {
    let authority = url.find("://").map_or(0, |at| at + 3);
    url[authority..].find('/').map_or(url, |at| &url[..authority + at])
}

#[cfg(test)]
mod tests {
    use super::origin_of;

    #[test]
    fn an_origin_is_scheme_and_authority() {
        for (url, origin) in [
            ("https://p.example", "https://p.example"),
            ("https://p.example/", "https://p.example"),
            ("https://p.example:8443/realms/a", "https://p.example:8443"),
        ] {
            assert_eq!(origin_of(url), origin);
        }
    }
}
