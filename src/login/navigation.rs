//! Is there a person before this request? A page is sent on to the login; a program learns the truth from a status.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, Method, Response, StatusCode};

use super::Login;
use super::csrf::referring_page;
use super::pages::redirect;
use super::return_to::ReturnTo;
use crate::session::store::Ending;

/// Why a user is sent to the login page who had a session: what the page says about it. A closed set, for it comes back
/// to us in a query that anybody may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    Displaced,
    Revoked,
    Expired,
    /// The session lives, but what was asked for takes a fresh login.
    Confirm,
    /// A form was posted without a session.
    Unsent,
}

const NOTICES: [Notice; 5] = [Notice::Displaced, Notice::Revoked, Notice::Expired, Notice::Confirm, Notice::Unsent];

impl Login {
    /// Whether a person waits for the answer: it is a page, or leads to one. A program gets a status and JSON. The first
    /// rule that applies decides:
    ///
    /// 1. Not GET, HEAD or POST: no. Browsers go from page to page with these alone.
    /// 2. `Sec-Fetch-Mode` is sent: yes when it is `navigate`. The browser knows best.
    /// 3. `Sec-Fetch-Dest` is sent: yes when it is `document`.
    /// 4. `Sec-Fetch-Site`, `Sec-Fetch-User` or `X-Requested-With` is sent: no.
    /// 5. A POST whose body is not of a type that a form can send: no.
    /// 6. `Accept` names `text/html`: yes. `*/*` is no such name: it is what programs send.
    pub fn wants_page(method: &Method, headers: &HeaderMap) -> bool {
        if ![Method::GET, Method::HEAD, Method::POST].contains(method) {
            return false;
        }
        if let Some(mode) = headers.get("sec-fetch-mode") {
            return mode == "navigate";
        }
        if let Some(destination) = headers.get("sec-fetch-dest") {
            return destination == "document";
        }
        if ["sec-fetch-site", "sec-fetch-user", "x-requested-with"].iter().any(|name| headers.contains_key(*name)) {
            return false;
        }
        if method == Method::POST && !has_form(headers) {
            return false;
        }
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|field| field.to_str().ok());
        accepted.flat_map(|field| field.split(',')).any(|range| is_kind(range, &["text/html"]))
    }

    /// Sends a page navigation to the login page, which says why (`notice`), and leads back to `path_and_query` when that
    /// is safe to follow.
    pub fn login_redirect(&self, path_and_query: &str, notice: Option<Notice>) -> Response<Bytes> {
        redirect(StatusCode::FOUND, &self.login_address(self.own_page(path_and_query).as_ref(), notice))
    }

    /// As [`Self::login_redirect`], of a form that was posted: back to the page that held it, as far as the browser says
    /// which one that was (`Referer`, of our own `origin`). What was typed there is lost, and the login page says so.
    pub fn form_redirect(&self, headers: &HeaderMap, origin: &str) -> Response<Bytes> {
        let target = referring_page(headers, origin).and_then(|page| self.own_page(page));
        redirect(StatusCode::SEE_OTHER, &self.login_address(target.as_ref(), Some(Notice::Unsent)))
    }

    /// Of the login page that says why, and leads to `target`.
    pub(super) fn login_address(&self, target: Option<&ReturnTo>, notice: Option<Notice>) -> String {
        let target = target.map(|target| format!("return_to={}", target.escaped()));
        let reason = notice.map(|notice| format!("reason={}", notice.label()));
        let query = target.into_iter().chain(reason).collect::<Vec<_>>().join("&");
        let separator = if query.is_empty() { "" } else { "?" };
        format!("{}login{separator}{query}", self.prefix)
    }

    /// A target of this origin. Of our own endpoints only the list of sessions is one: a login that led to the login would
    /// go in circles.
    pub(super) fn own_page(&self, text: &str) -> Option<ReturnTo> {
        ReturnTo::parse(text).filter(|target| !self.owns(target.path()) || target.path() == self.sessions_path())
    }
}

/// What a form's `enctype` can say (HTML, 4.10.18.6).
fn has_form(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| is_kind(kind, &["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"]))
}

/// Whether a media type, whatever its parameters, is one of these.
fn is_kind(text: &str, kinds: &[&str]) -> bool {
    let kind = text.split(';').next().unwrap_or_default().trim();
    kinds.iter().any(|other| kind.eq_ignore_ascii_case(other))
}

impl Notice {
    /// `ending`: what the store remembers of the session; most that are gone were simply not used any more.
    pub fn of(ending: Option<Ending>) -> Option<Self> {
        match ending {
            Some(Ending::Displaced) => Some(Self::Displaced),
            Some(Ending::Revoked) => Some(Self::Revoked),
            Some(Ending::Expired) | None => Some(Self::Expired),
            // Who did it knows it.
            Some(Ending::LoggedOut | Ending::Replaced) => None,
        }
    }

    pub(super) fn of_label(label: &str) -> Option<Self> {
        NOTICES.into_iter().find(|notice| notice.label() == label)
    }

    fn label(self) -> &'static str {
        match self {
            Self::Displaced => "displaced",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::Confirm => "confirm",
            Self::Unsent => "unsent",
        }
    }

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Displaced => {
                "You were logged out here because you logged in elsewhere, and the number of logins is limited."
            }
            Self::Revoked => "You were logged out here, by you from another device or by whoever runs this site.",
            Self::Expired => "Your last login has ended, as it does after some time. Log in to go on.",
            Self::Unsent => {
                "What you just sent was not taken, because you were not logged in any more. After the login, look at the \
                 page that you sent it from, and send it again."
            }
            Self::Confirm => "Please log in once more. What you are about to do takes a login of the last ten minutes.",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_told_from_a_program() {
        const BROWSER: (&str, &str) = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
        const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");
        type Fields = &'static [(&'static str, &'static str)];
        let cases: &[(Method, Fields, bool)] = &[
            (Method::GET, &[("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"), BROWSER], true),
            (Method::GET, &[("sec-fetch-mode", "navigate")], true),
            (Method::GET, &[("sec-fetch-dest", "document")], true),
            (Method::HEAD, &[("sec-fetch-mode", "navigate")], true),
            (Method::POST, &[("sec-fetch-mode", "navigate"), BROWSER], true),
            (
                Method::POST,
                &[("sec-fetch-mode", "navigate"), ("content-type", "multipart/form-data; boundary=x")],
                true,
            ),
            (Method::POST, &[("sec-fetch-mode", "cors"), FORM, BROWSER], false),
            (Method::POST, &[("x-requested-with", "XMLHttpRequest"), FORM, BROWSER], false),
            (Method::POST, &[FORM, BROWSER], true),
            (Method::POST, &[("content-type", "Multipart/Form-Data; boundary=x"), BROWSER], true),
            (Method::POST, &[FORM, ("accept", "*/*")], false),
            (Method::POST, &[("content-type", "application/json"), BROWSER], false),
            (Method::POST, &[BROWSER], false),
            (Method::PUT, &[("sec-fetch-mode", "navigate"), BROWSER], false),
            (Method::PUT, &[BROWSER], false),
            (Method::OPTIONS, &[BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "cors"), BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")], false),
            (Method::GET, &[("sec-fetch-mode", "same-origin"), BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "websocket"), BROWSER], false),
            (Method::GET, &[("sec-fetch-mode", "cors"), ("sec-fetch-dest", "document")], false),
            (Method::GET, &[("sec-fetch-dest", "empty"), BROWSER], false),
            (Method::GET, &[("sec-fetch-dest", "script")], false),
            (Method::GET, &[("sec-fetch-site", "same-origin"), BROWSER], false),
            (Method::GET, &[("sec-fetch-user", "?1"), BROWSER], false),
            (Method::GET, &[("x-requested-with", "XMLHttpRequest"), BROWSER], false),
            (Method::GET, &[BROWSER], true),
            (Method::GET, &[("accept", "TEXT/HTML")], true),
            (Method::GET, &[("accept", "application/json"), ("accept", "text/html;q=0.1")], true),
            (Method::GET, &[("accept", "application/json")], false),
            (Method::GET, &[("accept", "application/json, text/htmlx")], false),
            (Method::GET, &[("accept", "text/event-stream")], false),
            (Method::GET, &[("accept", "*/*")], false),
            (Method::GET, &[("accept", "text/*")], false),
            (Method::GET, &[], false),
        ];
        for (method, fields, expected) in cases {
            let mut headers = HeaderMap::new();
            for (name, value) in *fields {
                headers.append(*name, value.parse().unwrap());
            }
            assert_eq!(Login::wants_page(method, &headers), *expected, "{method} {fields:?}");
        }
    }

    #[test]
    fn what_is_said_of_an_end_is_one_of_our_own_sentences() {
        let endings = [Ending::LoggedOut, Ending::Replaced, Ending::Displaced, Ending::Revoked, Ending::Expired];
        for notice in endings.into_iter().map(Some).chain([None]).filter_map(Notice::of) {
            assert_eq!(Notice::of_label(notice.label()), Some(notice));
        }
        assert_eq!(Notice::of(Some(Ending::LoggedOut)), None, "who logged out knows it");
        for text in ["", "Displaced", "logged_out", "<b>"] {
            assert_eq!(Notice::of_label(text), None, "{text:?}");
        }
    }
}
