//! Where am I logged in? The user's own sessions: see them, end one, end all others; as a page and as JSON.
//!
//! To end another session takes a login of the last [`RECENT`]. Whoever finds a browser open, or steals its cookie, could
//! else shut its owner out everywhere.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::json;

use super::csrf::{FormKey, Purpose};
use super::device::device;
use super::navigation::Notice;
use super::oidc::Demand;
use super::pages::{self, SessionRow, SessionsPage, Told, page, redirect};
use super::{Failure, Login, LoginRequest, Visitor, unauthenticated};
use crate::audit::{self, Event, Revoker};
use crate::session::control::{Handle, Shown, Timestamp};

/// How old a login may be that ends other sessions.
pub(super) const RECENT: Duration = Duration::from_secs(600);

/// So many are listed; a user may have more (`session.max_per_user`).
const LISTED_MAX: usize = 100;

/// What is to end.
enum Target {
    One(Handle),
    Others,
}

const FORM_TOO_OLD: &str = "This page was open for too long. Please try again.";
const LOGIN_TOO_OLD: &str = "This takes a login of the last ten minutes. Log in once more and try again.";
const DONE: &str = "Done. These are left:";

impl Login {
    pub(super) fn sessions_path(&self) -> String {
        format!("{}sessions", self.prefix)
    }

    /// Changes nothing.
    pub(super) async fn list_sessions(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let Some(visitor) = self.visitor(request).await? else { return Ok(self.ask_to_log_in(request)) };
        let notice = (request.query == Some("done")).then_some(DONE);
        self.listed(request, &visitor, StatusCode::OK, None, notice).await
    }

    /// `end` is a session's handle, or `others`. A person is sent on to the list, a program learns how many have ended.
    pub(super) async fn end_sessions(&self, request: &LoginRequest<'_>) -> Result<Response<Bytes>, Failure> {
        let form = match self.own_form(request) {
            Ok(form) => form,
            Err(refusal) => return Ok(*refusal),
        };
        let Some(visitor) = self.visitor(request).await? else { return Ok(self.ask_to_log_in(request)) };
        let key = FormKey::of_session(&visitor.id);
        if !form.get("csrf").is_some_and(|token| key.accepts(Purpose::Sessions, token)) {
            if request.wants_page() {
                return self.listed(request, &visitor, StatusCode::FORBIDDEN, Some(FORM_TOO_OLD), None).await;
            }
            let refusal = pages::failure(StatusCode::FORBIDDEN, "stale_form", FORM_TOO_OLD, request.request_id);
            return Ok(refusal);
        }
        let own = visitor.session.key.log_hash();
        let target = match form.get("end") {
            Some("others") => Target::Others,
            // This one ends by the logout, which also takes the cookies back.
            Some(handle) if handle == own => return Ok(self.no_such_session(request)),
            Some(handle) => match Handle::parse(handle) {
                Some(handle) => Target::One(handle),
                None => return Ok(self.no_such_session(request)),
            },
            None => return Ok(self.no_such_session(request)),
        };
        if !is_recent(&visitor, Timestamp::now()) {
            return Ok(self.ask_to_log_in_again(request));
        }
        let user = visitor.session.record.identity.user.as_str();
        let ended = match &target {
            Target::One(handle) => u64::from(self.control.end(user, handle).await?),
            Target::Others => self.sessions.revoke_all(user, Some(&visitor.session.key)).await?,
        };
        let what = match &target {
            Target::One(handle) => handle.to_string(),
            Target::Others => format!("all but {own}"),
        };
        let (by, client, user) = (Revoker::User, Some(request.client), Some(user));
        audit::tell(Event::Revoked { by, client, user, what: &what, ended });
        if request.wants_page() {
            return Ok(redirect(StatusCode::SEE_OTHER, &format!("{}?done", self.sessions_path())));
        }
        Ok(pages::json(StatusCode::OK, &json!({ "ended": ended })))
    }

    async fn listed(
        &self,
        request: &LoginRequest<'_>,
        visitor: &Visitor,
        status: StatusCode,
        alert: Option<&str>,
        notice: Option<&str>,
    ) -> Result<Response<Bytes>, Failure> {
        let mut sessions = self.control.of_user(&visitor.session.record.identity.user).await?;
        let own = visitor.session.key.log_hash();
        sessions.sort_by_key(|shown| (shown.session != own, Reverse(shown.last_seen)));
        let unshown = sessions.len().saturating_sub(LISTED_MAX);
        sessions.truncate(LISTED_MAX);
        let key = FormKey::of_session(&visitor.id);
        let csrf = key.token(Purpose::Sessions)?;
        let now = Timestamp::now();
        if !request.wants_page() {
            let sessions: Vec<_> = sessions.iter().map(|shown| for_a_program(shown, &own)).collect();
            let body = json!({
                "sessions": sessions, "unshown": unshown, "csrf": csrf, "may_end_others": is_recent(visitor, now),
            });
            return Ok(pages::json(StatusCode::OK, &body));
        }
        let words: Vec<_> = sessions.iter().map(|shown| (device(&shown.user_agent), address(shown))).collect();
        let rows: Vec<_> = sessions
            .iter()
            .zip(&words)
            .map(|(shown, (device, address))| SessionRow {
                handle: &shown.session,
                is_this: shown.session == own,
                device,
                address,
                since: told(shown.created, now),
                // It is in use, though this may not be written down yet.
                last_seen: told(if shown.session == own { now } else { shown.last_seen }, now),
            })
            .collect();
        Ok(page(
            status,
            &SessionsPage {
                prefix: &self.prefix,
                name: visitor.name(),
                alert,
                notice,
                csrf: &csrf,
                logout_csrf: &key.token(Purpose::Logout)?,
                sessions: &rows,
                unshown,
                return_to: &self.default_return,
            },
        ))
    }

    fn ask_to_log_in(&self, request: &LoginRequest<'_>) -> Response<Bytes> {
        if !request.wants_page() {
            return unauthenticated(request);
        }
        let here = self.own_page(&self.sessions_path());
        redirect(StatusCode::SEE_OTHER, &self.login_address(here.as_ref(), None))
    }

    fn ask_to_log_in_again(&self, request: &LoginRequest<'_>) -> Response<Bytes> {
        if !request.wants_page() {
            return pages::failure(StatusCode::FORBIDDEN, "login_too_old", LOGIN_TOO_OLD, request.request_id);
        }
        let here = self.own_page(&self.sessions_path());
        redirect(StatusCode::SEE_OTHER, &self.login_address(here.as_ref(), Some(Notice::Confirm)))
    }

    fn no_such_session(&self, request: &LoginRequest<'_>) -> Response<Bytes> {
        let words = ("That was not understood", "There is nothing of that name that you could end here.");
        self.message(request, StatusCode::BAD_REQUEST, "no_such_session", words)
    }
}

/// By our clock, and not the store's, which made the record: they differ by less than matters here.
fn is_recent(visitor: &Visitor, now: Timestamp) -> bool {
    let demand = Demand { max_age: Some(RECENT), ..Demand::default() };
    !demand.exceeds(&visitor.session.record, now.0 / 1000)
}

fn for_a_program(shown: &Shown, own: &str) -> serde_json::Value {
    let Shown { session, method, created, ends, last_seen, address, user_agent, user: _, idle_left_seconds: _ } = shown;
    json!({
        "session": session, "current": session == own, "device": device(user_agent), "user_agent": user_agent,
        "address": address, "method": method, "since": created, "last_seen": last_seen, "ends": ends,
    })
}

fn address(shown: &Shown) -> Cow<'static, str> {
    shown.address.map_or(Cow::Borrowed("unknown"), |address| address.to_string().into())
}

fn told(at: Timestamp, now: Timestamp) -> Told {
    Told { exact: at.to_string(), words: ago(Duration::from_millis(now.0.saturating_sub(at.0))) }
}

/// One unit is enough to tell two devices apart.
fn ago(time: Duration) -> String {
    let minutes = time.as_secs() / 60;
    let (count, unit) = match minutes {
        0 => return "just now".to_owned(),
        1..60 => (minutes, "minute"),
        60..1440 => (minutes / 60, "hour"),
        _ => (minutes / 1440, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_told_in_its_largest_unit() {
        let cases = [
            (0, "just now"),
            (59, "just now"),
            (60, "1 minute ago"),
            (3_599, "59 minutes ago"),
            (3_600, "1 hour ago"),
            (86_399, "23 hours ago"),
            (86_400, "1 day ago"),
            (1_000_000, "11 days ago"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(ago(Duration::from_secs(seconds)), expected, "{seconds}");
        }
    }
}
