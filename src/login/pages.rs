//! What does a person see of us? A few pages without any script, under a policy that allows none.
//!
//! The templates and the built-in look stand in `pages/`; every text put into them is escaped.

use std::path::Path;
use std::time::Duration;

use askama::Template;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use sha2::{Digest, Sha256};

use super::return_to::ReturnTo;
use crate::config::error::ConfigError;

/// A page that says what happened and what to do next: for refusals and failures, ours and the proxy's.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub status: StatusCode,
    pub title: &'a str,
    pub text: &'a str,
    /// The next move.
    pub next: Option<Link<'a>>,
    /// Sent as `Retry-After`, in whole seconds.
    pub retry_after: Option<Duration>,
    /// For the conversation with the operator; empty = none is shown.
    pub request_id: &'a str,
}

/// Where to go on, and what that is called.
#[derive(Clone, Copy, Debug)]
pub struct Link<'a> {
    /// A path of our own.
    pub href: &'a str,
    pub text: &'a str,
}

/// `prefix`: that of our own endpoints, which serve the style.
pub fn message_page(prefix: &str, message: &Message<'_>) -> Response<Bytes> {
    let Message { status, title, text, next, retry_after, request_id } = *message;
    let mut response = page(status, &MessagePage { prefix, title, text, next, request_id });
    if let Some(wait) = retry_after {
        set_retry_after(&mut response, wait);
    }
    response
}

#[derive(Template)]
#[template(path = "login.html")]
pub(super) struct LoginPage<'a> {
    pub(super) prefix: &'a str,
    pub(super) title: &'a str,
    pub(super) alert: Option<&'a str>,
    pub(super) notice: Option<&'a str>,
    pub(super) csrf: &'a str,
    pub(super) return_to: &'a ReturnTo,
    pub(super) username: &'a str,
    pub(super) methods: &'a [Method],
    /// Whether there is a form at all.
    pub(super) has_password: bool,
}

/// One way to log in besides a password.
#[derive(Debug)]
pub(super) struct Method {
    pub(super) name: String,
    pub(super) href: String,
}

/// Instead of the form, for who has a session.
#[derive(Template)]
#[template(path = "logged_in.html")]
pub(super) struct LoggedInPage<'a> {
    pub(super) prefix: &'a str,
    pub(super) title: &'a str,
    pub(super) name: &'a str,
    pub(super) notice: Option<&'a str>,
    pub(super) csrf: &'a str,
    pub(super) return_to: &'a ReturnTo,
}

#[derive(Template)]
#[template(path = "logout.html")]
pub(super) struct LogoutPage<'a> {
    pub(super) prefix: &'a str,
    pub(super) name: &'a str,
    pub(super) csrf: &'a str,
    pub(super) return_to: &'a ReturnTo,
}

/// Where the user is logged in.
#[derive(Template)]
#[template(path = "sessions.html")]
pub(super) struct SessionsPage<'a> {
    pub(super) prefix: &'a str,
    pub(super) name: &'a str,
    pub(super) alert: Option<&'a str>,
    pub(super) notice: Option<&'a str>,
    /// To end other sessions.
    pub(super) csrf: &'a str,
    /// To end this one.
    pub(super) logout_csrf: &'a str,
    /// This browser's first, then the latest used.
    pub(super) sessions: &'a [SessionRow<'a>],
    /// There are so many more.
    pub(super) unshown: usize,
    pub(super) return_to: &'a ReturnTo,
}

/// One session, in words.
pub(super) struct SessionRow<'a> {
    pub(super) handle: &'a str,
    pub(super) is_this: bool,
    pub(super) device: &'a str,
    pub(super) address: &'a str,
    pub(super) since: Told,
    pub(super) last_seen: Told,
}

/// A time, for a program (RFC 3339) and for a person ("2 hours ago").
pub(super) struct Told {
    pub(super) exact: String,
    pub(super) words: String,
}

#[derive(Template)]
#[template(path = "message.html")]
struct MessagePage<'a> {
    prefix: &'a str,
    title: &'a str,
    text: &'a str,
    next: Option<Link<'a>>,
    request_id: &'a str,
}

/// The look of all pages: the built-in one, or the operator's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stylesheet {
    css: Bytes,
    etag: HeaderValue,
}

/// The referrer policy is `same-origin`: under `no-referrer` browsers post our forms with `Origin: null`.
const PAGE_FIELDS: [(HeaderName, &str); 7] = [
    (header::CONTENT_TYPE, "text/html; charset=utf-8"),
    (header::CACHE_CONTROL, "no-store"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (header::X_FRAME_OPTIONS, "DENY"),
];

pub(super) fn page(status: StatusCode, template: &impl Template) -> Response<Bytes> {
    let html = template.render().expect("our values print without errors, and memory takes what is written");
    let mut response = with_body(status, html.into());
    for (name, value) in PAGE_FIELDS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

pub(super) fn json(status: StatusCode, value: &serde_json::Value) -> Response<Bytes> {
    let mut response = with_body(status, value.to_string().into());
    let fields = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    for (name, value) in fields {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// A failure, for a program: in the shape that every failure of ours has.
pub(super) fn failure(status: StatusCode, error: &str, message: &str, request_id: &str) -> Response<Bytes> {
    json(status, &serde_json::json!({ "error": error, "message": message, "request_id": request_id }))
}

/// `location`: a path of our own, printable ASCII.
pub(super) fn redirect(status: StatusCode, location: &str) -> Response<Bytes> {
    let mut response = with_body(status, Bytes::new());
    let location = HeaderValue::from_str(location).expect("a checked prefix or target is printable ASCII");
    response.headers_mut().insert(header::LOCATION, location);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.headers_mut().insert(header::REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    response
}

/// In whole seconds, never too early.
pub fn set_retry_after(response: &mut Response<Bytes>, wait: Duration) {
    let seconds = wait.as_secs().saturating_add(u64::from(0 < wait.subsec_nanos()));
    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
}

impl Stylesheet {
    pub(super) fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let css = match path {
            Some(path) => std::fs::read(path).map_err(|error| ConfigError::unreadable(path, &error))?.into(),
            None => Bytes::from_static(include_bytes!("pages/style.css")),
        };
        let etag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(&Sha256::digest(&css)[..12]));
        let etag = HeaderValue::try_from(etag).expect("base64 in quotes is printable ASCII");
        Ok(Self { css, etag })
    }

    /// 200, or 304 to a browser that has it (RFC 9110, section 13.1.2).
    pub(super) fn answer(&self, headers: &HeaderMap) -> Response<Bytes> {
        let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|field| field.to_str().ok());
        let mut tags = known.flat_map(|field| field.split(',')).map(|tag| tag.trim().trim_start_matches("W/"));
        let mut response = if tags.any(|tag| tag == "*" || self.etag == *tag) {
            let mut response = Response::default();
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            response
        } else {
            with_body(StatusCode::OK, self.css.clone())
        };
        let fields = [
            (header::CONTENT_TYPE, "text/css; charset=utf-8"),
            // Short, so that a new look is seen soon after a reload.
            (header::CACHE_CONTROL, "public, max-age=300"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ];
        for (name, value) in fields {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response.headers_mut().insert(header::ETAG, self.etag.clone());
        response
    }
}

fn with_body(status: StatusCode, body: Bytes) -> Response<Bytes> {
    let length = body.len();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(response: &Response<Bytes>) -> &str {
        std::str::from_utf8(response.body()).unwrap()
    }

    #[test]
    fn every_page_carries_every_guard_and_no_script() {
        let message = Message {
            status: StatusCode::BAD_GATEWAY,
            title: "Not reachable",
            text: "Try again.",
            next: Some(Link { href: "/", text: "Front page" }),
            retry_after: Some(Duration::from_millis(1_001)),
            request_id: "4711",
        };
        let response = message_page("/.cloakroom/", &message);

        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(response.headers()["retry-after"], "2", "never too early");
        assert_eq!(response.headers()["content-length"], response.body().len().to_string().as_str());
        for (name, value) in PAGE_FIELDS {
            assert_eq!(response.headers()[&name], value, "{name}");
        }
        let html = text(&response);
        for piece in ["<html lang=\"en\">", "name=\"viewport\"", "href=\"/.cloakroom/style.css\"", "4711", "href=\"/\""]
        {
            assert!(html.contains(piece), "{piece} is missing:\n{html}");
        }
        assert!(!html.contains("<script") && !html.contains("style="), "the policy would forbid it");
    }

    #[test]
    fn what_is_put_into_a_page_stays_text() {
        const HOSTILE: &str = "\"><script>alert('x')</script>&";
        let return_to = ReturnTo::parse("/a?b='c'&d").unwrap();
        let pages = [
            page(
                StatusCode::OK,
                &LoginPage {
                    prefix: "/p/",
                    title: HOSTILE,
                    alert: Some(HOSTILE),
                    notice: Some(HOSTILE),
                    csrf: HOSTILE,
                    return_to: &return_to,
                    username: HOSTILE,
                    methods: &[Method { name: HOSTILE.to_owned(), href: HOSTILE.to_owned() }],
                    has_password: true,
                },
            ),
            page(
                StatusCode::OK,
                &LoggedInPage {
                    prefix: "/p/",
                    title: HOSTILE,
                    name: HOSTILE,
                    notice: Some(HOSTILE),
                    csrf: HOSTILE,
                    return_to: &return_to,
                },
            ),
            page(
                StatusCode::OK,
                &SessionsPage {
                    prefix: "/p/",
                    name: HOSTILE,
                    alert: Some(HOSTILE),
                    notice: Some(HOSTILE),
                    csrf: HOSTILE,
                    logout_csrf: HOSTILE,
                    sessions: &[true, false].map(|is_this| SessionRow {
                        handle: HOSTILE,
                        is_this,
                        device: HOSTILE,
                        address: HOSTILE,
                        since: Told { exact: HOSTILE.to_owned(), words: HOSTILE.to_owned() },
                        last_seen: Told { exact: HOSTILE.to_owned(), words: HOSTILE.to_owned() },
                    }),
                    unshown: 1,
                    return_to: &return_to,
                },
            ),
            page(StatusCode::OK, &LogoutPage { prefix: "/p/", name: HOSTILE, csrf: HOSTILE, return_to: &return_to }),
            message_page(
                "/p/",
                &Message {
                    status: StatusCode::OK,
                    title: HOSTILE,
                    text: HOSTILE,
                    next: Some(Link { href: HOSTILE, text: HOSTILE }),
                    retry_after: None,
                    request_id: HOSTILE,
                },
            ),
        ];
        for response in pages {
            let html = text(&response);
            assert!(!html.contains("<script") && !html.contains("'x'") && !html.contains("'c'"), "{html}");
            assert!(html.contains("&#34;&#62;&#60;script&#62;"), "{html}");
        }
    }

    #[test]
    fn the_login_form_is_made_for_people_and_their_password_managers() {
        let return_to = ReturnTo::root();
        let form = |alert, username| {
            let page = page(
                StatusCode::OK,
                &LoginPage {
                    prefix: "/p/",
                    title: "Log in",
                    alert,
                    notice: None,
                    csrf: "t",
                    return_to: &return_to,
                    username,
                    methods: &[],
                    has_password: true,
                },
            );
            text(&page).to_owned()
        };
        let html = form(None, "");
        for piece in [
            "method=\"post\" action=\"/p/login\"",
            "<label for=\"username\">",
            "<label for=\"password\">",
            "autocomplete=\"username\"",
            "autocomplete=\"current-password\"",
            "type=\"password\"",
            "name=\"csrf\" value=\"t\"",
            "name=\"return_to\" value=\"/\"",
        ] {
            assert!(html.contains(piece), "{piece} is missing:\n{html}");
        }
        assert!(!html.contains("role=\"alert\""));
        assert!(form(Some("No."), "alice").contains("role=\"alert\" id=\"alert\">No.<"));
        assert_eq!(form(Some("No."), "alice").matches("autofocus").count(), 1);
    }

    #[test]
    fn the_style_is_sent_once_and_then_known() {
        let style = Stylesheet::load(None).unwrap();
        let first = style.answer(&HeaderMap::new());
        assert_eq!(first.status(), StatusCode::OK);
        assert!(first.headers()["etag"].to_str().unwrap().starts_with('"'), "a strong tag");
        for known in [first.headers()["etag"].to_str().unwrap(), "\"x\", *", "*"] {
            let mut headers = HeaderMap::new();
            headers.insert(header::IF_NONE_MATCH, known.parse().unwrap());
            let again = style.answer(&headers);
            assert_eq!((again.status(), again.body().len()), (StatusCode::NOT_MODIFIED, 0), "{known}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_NONE_MATCH, HeaderValue::from_static("\"other\""));
        assert_eq!(style.answer(&headers).status(), StatusCode::OK);
    }

    #[test]
    fn the_operators_style_replaces_ours() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("own.css");
        std::fs::write(&path, "body { color: red }").unwrap();
        let style = Stylesheet::load(Some(&path)).unwrap();
        assert_eq!(text(&style.answer(&HeaderMap::new())), "body { color: red }");
        assert!(Stylesheet::load(Some(&directory.path().join("missing.css"))).is_err());
    }
}
