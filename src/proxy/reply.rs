//! Every response that we write ourselves. The client learns the class of a failure; the log has the cause.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::proxy::Session as HttpSession;
use serde::Serialize;

use crate::login::Login;
use crate::login::pages::{Link, Message, message_page};
use crate::login::return_to::ReturnTo;

/// After this many seconds a client may try again what failed for want of a store or a backend.
const RETRY_AFTER: &str = "2";

/// Why a request is answered by us and not by a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// No session, and the route requires one.
    Unauthenticated,
    /// A user name and a password that are not right, or were not looked at.
    BadCredentials,
    /// A session, but not in one of the route's groups.
    MissingGroup,
    /// A session whose login is too weak or too old for the route.
    StepUp,
    /// A WebSocket from a page of another origin.
    ForeignOrigin,
    /// A backend noted something in a session that ended meanwhile.
    SessionEnded,
    /// A login on a backend's word, of a user who has as many sessions as allowed.
    TooManySessions,
    NoRoute,
    BodyTooLarge,
    /// The client did not send what it announced in time.
    BodyTooSlow,
    BodyMalformed,
    /// The store could not say whether there is a session.
    StoreUnavailable,
    /// Too many unknown sessions from this network; see `session/guesses.rs`.
    TooManyGuesses,
    /// No backend could be connected.
    NoBackend,
    /// All backends have as many requests as they may have.
    Overloaded,
    /// A backend took the request and failed.
    BackendFailed,
    BackendTimeout,
    /// Our own mistake.
    Internal,
}

/// Who reads a rejection, and where they could go on.
#[derive(Debug)]
pub struct Reader<'a> {
    /// It is a person.
    wants_page: bool,
    /// Of our own endpoints, which have the style of the page.
    prefix: &'a str,
    /// Our page that logs in, or says who one is.
    login: String,
    front_page: &'a str,
    /// What was asked for, where a link can ask for it once more.
    again: Option<String>,
    request_id: &'a str,
}

/// What became of a request, for the log and the metrics; a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A backend's response went to the client, whatever its status.
    Forwarded,
    /// One of our own endpoints answered.
    Answered,
    /// Sent to the login page.
    LoginRedirect,
    /// The guard did not let it in.
    Refused,
    /// The client left before it had its response.
    ClientGone,
    /// The backend's response broke off after it had begun.
    Truncated,
    /// A WebSocket on which nothing was said for too long.
    IdleSocket,
    /// It was cut, because its session had ended.
    EndedWithSession,
    /// Dropped on its way: the shutdown had no more time for it, or a panic of ours ended it.
    Cut,
    Rejected(Rejection),
}

impl Rejection {
    pub const fn status(self) -> StatusCode {
        match self {
            Self::Unauthenticated | Self::BadCredentials | Self::StepUp => StatusCode::UNAUTHORIZED,
            Self::MissingGroup | Self::ForeignOrigin | Self::TooManySessions => StatusCode::FORBIDDEN,
            Self::SessionEnded => StatusCode::CONFLICT,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::BodyMalformed => StatusCode::BAD_REQUEST,
            Self::StoreUnavailable | Self::NoBackend | Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Self::TooManyGuesses => StatusCode::TOO_MANY_REQUESTS,
            Self::BackendFailed => StatusCode::BAD_GATEWAY,
            Self::BackendTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// For the log, the metrics and the `error` of a JSON reply.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unauthenticated => "unauthenticated",
            Self::BadCredentials => "bad_credentials",
            Self::MissingGroup => "missing_group",
            // The name of RFC 9470, section 3.
            Self::StepUp => "insufficient_user_authentication",
            Self::ForeignOrigin => "foreign_origin",
            Self::SessionEnded => "session_ended",
            Self::TooManySessions => "too_many_sessions",
            Self::NoRoute => "no_route",
            Self::BodyTooLarge => "body_too_large",
            Self::BodyTooSlow => "body_too_slow",
            Self::BodyMalformed => "body_malformed",
            Self::StoreUnavailable => "store_unavailable",
            Self::TooManyGuesses => "too_many_guesses",
            Self::NoBackend => "no_backend",
            Self::Overloaded => "overloaded",
            Self::BackendFailed => "backend_failed",
            Self::BackendTimeout => "backend_timeout",
            Self::Internal => "internal",
        }
    }

    /// A title and the next move, for people.
    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Unauthenticated => ("Not logged in", "Log in and try again."),
            Self::BadCredentials => {
                ("Not logged in", "Check the user name and the password. After several failures, wait some minutes.")
            }
            Self::MissingGroup => (
                "Not allowed",
                "Your account is not in a group that may see this. Log in with another one, or ask whoever runs this site.",
            ),
            Self::StepUp => {
                ("Log in again", "This needs a stronger or a more recent login. Open it as a page of its own.")
            }
            Self::ForeignOrigin => ("Not allowed", "A page of another site may not open this connection."),
            Self::SessionEnded => {
                ("Not saved", "You logged in or out at the same time, and what you did was not saved. Do it again.")
            }
            Self::TooManySessions => (
                "Not logged in",
                "You are logged in elsewhere as often as is allowed. Log out there, then log in here.",
            ),
            Self::NoRoute => ("Not found", "There is nothing at this address. Check it for a slip."),
            Self::BodyTooLarge => ("Too large", "What you sent is larger than this address takes."),
            Self::BodyTooSlow => ("Too slow", "Your request did not arrive in time. Try again."),
            Self::BodyMalformed => ("Not understood", "Your request was damaged on its way. Try again."),
            Self::StoreUnavailable => (
                "Back in a moment",
                "We cannot look up your login just now. You are still logged in: try again shortly.",
            ),
            Self::TooManyGuesses => (
                "Back in a moment",
                "Too many logins that do not exist were tried from your network. Try again shortly.",
            ),
            Self::NoBackend => ("Back in a moment", "The application cannot be reached just now. Try again shortly."),
            Self::Overloaded => ("Back in a moment", "The application has more to do than it can. Try again shortly."),
            Self::BackendFailed => ("Something went wrong", "The application did not answer properly. Try again."),
            Self::BackendTimeout => ("Something went wrong", "The application took too long to answer. Try again."),
            Self::Internal => {
                ("Something went wrong", "This is our mistake. Try again, or tell whoever runs this site.")
            }
        }
    }

    /// What a person can do but read: another try of what they asked for, where that may help; a look at who they are; or the
    /// front page.
    fn next<'r>(self, reader: &'r Reader<'_>) -> Option<Link<'r>> {
        match self {
            Self::StoreUnavailable
            | Self::SessionEnded
            | Self::TooManyGuesses
            | Self::NoBackend
            | Self::Overloaded
            | Self::BodyTooSlow
            | Self::BackendFailed
            | Self::BackendTimeout
            | Self::Internal => reader.again.as_deref().map(|href| Link { href, text: "Try again" }),
            Self::Unauthenticated | Self::BadCredentials | Self::StepUp => {
                Some(Link { href: &reader.login, text: "Log in" })
            }
            Self::MissingGroup => Some(Link { href: &reader.login, text: "Log in as somebody else" }),
            Self::NoRoute | Self::TooManySessions => Some(Link { href: reader.front_page, text: "Front page" }),
            // What the browser still shows is what has to be changed.
            Self::ForeignOrigin | Self::BodyTooLarge | Self::BodyMalformed => None,
        }
    }

    /// The response: a page for a person, JSON for a program.
    pub fn response(self, reader: &Reader<'_>) -> Response<Bytes> {
        let (title, text) = self.words();
        let request_id = reader.request_id;
        let mut response = if reader.wants_page {
            let next = self.next(reader);
            message_page(
                reader.prefix,
                &Message { status: self.status(), title, text, next, retry_after: None, request_id },
            )
        } else {
            json(self.status(), &Failure { error: self.label(), message: text, request_id })
        };
        let headers = response.headers_mut();
        match self {
            // RFC 9110, section 11.6.1 asks for a challenge with every 401; no registered scheme means "a cookie".
            Self::Unauthenticated | Self::BadCredentials => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Session"));
            }
            Self::StepUp => {
                let challenge = HeaderValue::from_static("Session error=\"insufficient_user_authentication\"");
                headers.insert(header::WWW_AUTHENTICATE, challenge);
            }
            Self::StoreUnavailable | Self::TooManyGuesses | Self::NoBackend | Self::Overloaded => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
            }
            Self::MissingGroup
            | Self::ForeignOrigin
            | Self::SessionEnded
            | Self::TooManySessions
            | Self::NoRoute
            | Self::BodyTooLarge
            | Self::BodyTooSlow
            | Self::BodyMalformed
            | Self::BackendFailed
            | Self::BackendTimeout
            | Self::Internal => {}
        }
        response
    }
}

impl<'a> Reader<'a> {
    pub fn of(request: &RequestHeader, login: &'a Login, request_id: &'a str) -> Self {
        let is_safe = request.method == http::Method::GET;
        let target = request.uri.path_and_query().filter(|_| is_safe);
        Self {
            wants_page: Login::wants_page(&request.method, &request.headers),
            prefix: login.prefix(),
            login: format!("{}login", login.prefix()),
            front_page: login.front_page(),
            again: target.and_then(|target| ReturnTo::parse(target.as_str())).map(|target| target.to_string()),
            request_id,
        }
    }
}

impl Outcome {
    pub const fn label(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Answered => "answered",
            Self::LoginRedirect => "login_redirect",
            Self::Refused => "refused",
            Self::ClientGone => "client_gone",
            Self::Truncated => "truncated",
            Self::IdleSocket => "idle_socket",
            Self::EndedWithSession => "ended_with_session",
            Self::Cut => "cut",
            Self::Rejected(rejection) => rejection.label(),
        }
    }
}

/// A failure, for a program.
#[derive(Serialize)]
struct Failure<'a> {
    error: &'a str,
    message: &'a str,
    request_id: &'a str,
}

fn json(status: StatusCode, failure: &Failure<'_>) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(serde_json::to_vec(failure).unwrap_or_default()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Sends a response of ours. `close` ends the connection after it.
pub async fn send(
    downstream: &mut HttpSession,
    response: Response<Bytes>,
    request_id: &str,
    close: bool,
) -> pingora::Result<()> {
    let (parts, body) = response.into_parts();
    let head_only = downstream.req_header().method == http::Method::HEAD;
    let mut head = ResponseHeader::build(parts.status, Some(parts.headers.len() + 2))?;
    for (name, value) in &parts.headers {
        head.append_header(name.clone(), value.clone())?;
    }
    // Without a length the body would be delimited by the end of the connection. These have none, whatever the length
    // of what they stand for (RFC 9110, section 8.6).
    if ![StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&parts.status) {
        head.insert_header(header::CONTENT_LENGTH, body.len())?;
    }
    head.insert_header("x-request-id", request_id)?;
    if close {
        downstream.set_keepalive(None);
    }
    let no_body = head_only || body.is_empty();
    downstream.write_response_header(Box::new(head), no_body).await?;
    if !no_body {
        downstream.write_response_body(Some(body), true).await?;
    }
    Ok(())
}

/// The answer to a request that we do not accept.
pub fn refusal(status: StatusCode, reason: &str, request_id: &str) -> Response<Bytes> {
    let body = format!("{{\"error\":\"{reason}\",\"request_id\":\"{request_id}\"}}\n");
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    let length = HeaderValue::from(response.body().len());
    let date = HeaderValue::try_from(httpdate::fmt_http_date(std::time::SystemTime::now()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Ok(id) = HeaderValue::try_from(request_id) {
        headers.insert("x-request-id", id);
    }
    if let Ok(date) = date {
        headers.insert(header::DATE, date);
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
    }
    response
}

/// As it goes over an HTTP/1 connection, which ends with it.
pub fn closing(response: &Response<Bytes>) -> Vec<u8> {
    let status = response.status();
    let reason = status.canonical_reason().unwrap_or("Error");
    let mut bytes = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16()).into_bytes();
    for (name, value) in response.headers() {
        bytes.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    bytes.extend_from_slice(b"connection: close\r\n\r\n");
    bytes.extend_from_slice(response.body());
    bytes
}

/// How long a closing connection goes on reading, so that the client sees our answer and not a reset
/// (RFC 9112, section 9.6).
pub const LINGER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(wants_page: bool) -> Reader<'static> {
        Reader {
            wants_page,
            prefix: "/.cloakroom/",
            login: "/.cloakroom/login".to_owned(),
            front_page: "/start",
            again: Some("/report?year=2026&month=1".to_owned()),
            request_id: "id",
        }
    }

    #[test]
    fn a_page_says_the_next_move() {
        for (rejection, href, text) in [
            (Rejection::MissingGroup, "/.cloakroom/login", "Log in as somebody else"),
            (Rejection::BadCredentials, "/.cloakroom/login", "Log in"),
            (Rejection::NoRoute, "/start", "Front page"),
            (Rejection::NoBackend, "/report?year=2026&#38;month=1", "Try again"),
            (Rejection::BackendTimeout, "/report?year=2026&#38;month=1", "Try again"),
        ] {
            let response = rejection.response(&reader(true));
            let html = std::str::from_utf8(response.body()).unwrap();
            assert!(html.contains(&format!("href=\"{href}\">{text}</a>")), "{rejection:?}: {html}");
        }
        let posted = Reader { again: None, ..reader(true) };
        let response = Rejection::NoBackend.response(&posted);
        assert!(!std::str::from_utf8(response.body()).unwrap().contains("class=\"button\""), "a link sends no form");
    }

    #[test]
    fn a_failure_that_passes_says_when_to_come_back() {
        let passing =
            [Rejection::StoreUnavailable, Rejection::TooManyGuesses, Rejection::NoBackend, Rejection::Overloaded];
        for rejection in passing {
            for wants_page in [true, false] {
                let response = rejection.response(&reader(wants_page));
                assert_eq!(response.headers()[header::RETRY_AFTER], RETRY_AFTER, "{rejection:?}");
            }
        }
    }

    #[test]
    fn a_program_gets_json_with_the_class_and_no_cause() {
        let response = Rejection::BackendFailed.response(&reader(false));
        let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!((&body["error"], &body["request_id"]), (&"backend_failed".into(), &"id".into()));
        assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
    }

    #[test]
    fn a_refusal_closes_and_states_its_length() {
        let text = String::from_utf8(closing(&refusal(StatusCode::BAD_REQUEST, "bare_lf", "id"))).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n") && head.ends_with("connection: close"), "{head}");
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
    }
}
