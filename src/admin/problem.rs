//! Why does a request to the admin listener get no answer of its own? Told as RFC 9457 says.

use http::{HeaderValue, Response, StatusCode, header};
use serde_json::json;

use super::query::BadQuery;
use super::reply;
use super::sessions::DESCRIPTION;
use crate::config::error::ConfigError;
use crate::session::control::Interrupted;
use crate::session::store::StoreError;

#[derive(Debug)]
pub(super) enum Problem {
    /// A name that could be a stranger's.
    OtherHost,
    NoToken,
    NoSuchPlace,
    NoSuchSession,
    Method {
        allowed: &'static str,
    },
    Query(String),
    /// What the path names, and there is not.
    Absent(String),
    /// A body that says nothing that can be done.
    Body(String),
    BodyTooLarge,
    BodyTooSlow,
    Store(StoreError),
    Interrupted(Interrupted),
    /// A file that is wrong, and was not applied.
    Refused(ConfigError),
    /// A mistake of ours.
    Failed,
}

/// Seconds after which it makes sense to ask a store again.
const RETRY_AFTER: &str = "2";

impl Problem {
    fn status(&self) -> StatusCode {
        match self {
            Self::OtherHost => StatusCode::MISDIRECTED_REQUEST,
            Self::NoToken => StatusCode::UNAUTHORIZED,
            Self::NoSuchPlace | Self::NoSuchSession | Self::Absent(_) => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Query(_) | Self::Body(_) => StatusCode::BAD_REQUEST,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Store(_) | Self::Interrupted(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::OtherHost => {
                "not asked for by a name that is known here: list it in [admin] hosts, or ask by IP address".into()
            }
            Self::NoToken => {
                "send admin.token as Authorization: Bearer; for /status it is the password, with any user name".into()
            }
            Self::NoSuchPlace => format!("there is nothing here: see {DESCRIPTION}"),
            Self::NoSuchSession => "the user has no such session, or no longer".into(),
            Self::Method { allowed } => format!("allowed here: {allowed}"),
            Self::Query(detail) | Self::Absent(detail) | Self::Body(detail) => detail.clone(),
            Self::BodyTooLarge => "no body that makes sense here is that long".into(),
            Self::BodyTooSlow => "the body did not come, or broke off".into(),
            Self::Store(error) => format!("{error}; nothing is known, try again"),
            Self::Interrupted(interrupted) => format!("{interrupted}; try again for the rest"),
            Self::Refused(error) => error.to_string(),
            Self::Failed => "a mistake of Cloakroom's: see its log".into(),
        }
    }

    pub(super) fn reply(&self) -> Response<Vec<u8>> {
        if let Self::Store(error) | Self::Interrupted(Interrupted { cause: error, .. }) = self {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(%error, cause, "sessions API has no answer from the store");
        }
        let status = self.status();
        // No `type`: these mean what their status means (RFC 9457, section 4.2.1).
        let body = json!({ "title": status.canonical_reason(), "status": status.as_u16(), "detail": self.detail() });
        let mut response = reply(status, "application/problem+json", body.to_string().into_bytes());
        let field = match self {
            Self::NoToken => (header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            Self::Method { allowed } => (header::ALLOW, HeaderValue::from_static(allowed)),
            Self::Store(_) | Self::Interrupted(_) => (header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER)),
            Self::OtherHost
            | Self::NoSuchPlace
            | Self::NoSuchSession
            | Self::Query(_)
            | Self::Absent(_)
            | Self::Body(_)
            | Self::BodyTooLarge
            | Self::BodyTooSlow
            | Self::Refused(_)
            | Self::Failed => return response,
        };
        response.headers_mut().insert(field.0, field.1);
        response
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<BadQuery> for Problem {
    fn from(bad: BadQuery) -> Self {
        Self::Query(bad.to_string())
    }
}
