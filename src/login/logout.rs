//! How does someone leave? By POST from our own page; a link alone ends no session.

use bytes::Bytes;
use http::header::SET_COOKIE;
use http::{Response, StatusCode};

use super::csrf::{FormKey, Purpose};
use super::pages::{Link, LogoutPage, Message, message_page, page, redirect};
use super::{Failure, Login, LoginRequest};
use crate::audit::{self, Event, LogoutReason};
use crate::session::store::StoreError;
use crate::session::{Resumed, Use};

impl Login {
    /// Asks; changes nothing. Also where a logout ends, since then there is no session to ask about.
    pub(super) async fn logout_page(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        self.ask_to_log_out(request, StatusCode::OK).await
    }

    /// The session is ended in the store first. Only then does the browser lose its cookie: when the store cannot
    /// confirm, the session may live, and the user must be able to try again.
    pub(super) async fn log_out(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let form = match self.own_form(request) {
            Ok(form) => form,
            Err(refusal) => return Ok(*refusal),
        };
        let logged_out = || redirect(StatusCode::SEE_OTHER, &format!("{}logout", self.prefix));
        let Some(id) = request.cookie.find(request.headers) else { return Ok(logged_out()) };
        if !form.get("csrf").is_some_and(|token| FormKey::of_session(&id).accepts(Purpose::Logout, token)) {
            return self.ask_to_log_out(request, StatusCode::FORBIDDEN).await;
        }
        // Looked up for the log's sake, which should say who left. One that cannot be read is ended all the same.
        let session = match self.sessions.resume(&id, &Use::of_own_page(request.client, !request.is_silent)).await {
            Ok(Resumed::Live(session, _)) => Some(session),
            Ok(Resumed::Gone(_)) | Err(StoreError::Unreadable) => None,
            Ok(Resumed::TooManyGuesses(wait)) => return Err(Failure::TooManyGuesses(wait)),
            Err(error) => return Err(error.into()),
        };
        let user = session.as_ref().map(|session| session.record.identity.user.as_str());
        let ended = self.sessions.end(&id, user).await?;
        if ended {
            let (client, session) = (Some(request.client), id.key().log_hash());
            audit::tell(Event::Logout { user, client, session: &session, reason: LogoutReason::User });
            self.metrics.logouts.with_label_values(&[] as &[&str]).inc();
        }
        let at_provider = match &session {
            Some(session) => self.log_out_at_provider(request, &id, session).await,
            None => None,
        };
        let mut response = at_provider.unwrap_or_else(logged_out);
        response.headers_mut().append(SET_COOKIE, request.cookie.clear());
        if request.cookie.find_fallback(request.headers).is_some() {
            response.headers_mut().append(SET_COOKIE, request.cookie.clear_fallback());
        }
        Ok(response)
    }

    async fn ask_to_log_out(&self, request: &LoginRequest<'_>, status: StatusCode) -> Result<Response<Bytes>, Failure> {
        let Some(visitor) = self.visitor(request).await? else { return Ok(self.logged_out_page()) };
        let csrf = FormKey::of_session(&visitor.id).token(Purpose::Logout)?;
        let (name, return_to) = (visitor.name(), &self.default_return);
        Ok(page(status, &LogoutPage { prefix: &self.prefix, name, csrf: &csrf, return_to }))
    }

    pub(super) fn logged_out_page(&self) -> Response<Bytes> {
        let login = format!("{}login", self.prefix);
        let message = Message {
            status: StatusCode::OK,
            title: "You are logged out",
            text: "There is no session in this browser any more.",
            next: Some(Link { href: &login, text: "Log in" }),
            retry_after: None,
            request_id: "",
        };
        message_page(&self.prefix, &message)
    }
}
