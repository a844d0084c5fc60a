//! Is it no, or not now? What servers and connections say, as an answer for who asked.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::{ErrorKind, RedisError, ServerError, Value};

use crate::session::store::StoreError;

/// Why a server is not to be had, told to everybody who asks.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The server said no, rather than not now.
    pub(super) is_refusal: bool,
    pub(super) cause: Arc<str>,
}

impl Failure {
    pub(super) fn not_now(cause: impl fmt::Display) -> Self {
        Self { is_refusal: false, cause: cause.to_string().into() }
    }

    pub(super) fn of(error: &RedisError) -> Self {
        Self { is_refusal: is_refusal(error), cause: error.to_string().into() }
    }

    pub(super) fn no_answer_within(limit: Duration) -> Self {
        Self::not_now(format_args!("no answer within {limit:?}"))
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        let cause = failure.cause.to_string().into();
        if failure.is_refusal { Self::Refused(cause) } else { Self::Unavailable(cause) }
    }
}

pub(super) fn store_error(error: &RedisError) -> StoreError {
    Failure::of(error).into()
}

pub(super) fn senseless() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "the reply makes no sense").into()
}

/// Whether a connection that answered so is to be replaced: it is broken, out of step, or leads to a server that is
/// no longer the primary.
pub(super) fn ends_trust(error: &RedisError) -> bool {
    error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Io | ErrorKind::Parse | ErrorKind::UnexpectedReturnType)
        || code(error).is_some_and(|code| is_misplaced(&code))
}

/// As [`ends_trust`], of the reply to one command.
pub(super) fn reply_ends_trust(reply: &Value) -> bool {
    server_error(reply).is_some_and(|error| is_misplaced(error.code()))
}

pub(super) fn server_error(reply: &Value) -> Option<&ServerError> {
    match reply {
        Value::ServerError(error) => Some(error),
        _ => None,
    }
}

fn is_misplaced(code: &str) -> bool {
    matches!(code, "READONLY" | "NOAUTH")
}

fn is_refusal(error: &RedisError) -> bool {
    const NOT_NOW: [&str; 9] =
        ["LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "MOVED", "ASK"];
    match code(error) {
        Some(code) => !NOT_NOW.contains(&code.as_str()),
        None => error.kind() == ErrorKind::AuthenticationFailed,
    }
}

/// The server's own code; of several errors the first.
fn code(error: &RedisError) -> Option<String> {
    let errors = error.clone().into_server_errors()?;
    errors.first().map(|(_, error)| error.code().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_is_told_from_not_now() {
        let cases = [
            ("-LOADING Redis is loading", false),
            ("-READONLY You can't write", false),
            ("-CLUSTERDOWN down", false),
            ("-MASTERDOWN Link with MASTER is down", false),
            ("-TRYAGAIN Multiple keys", false),
            ("-NOREPLICAS Not enough", false),
            ("-BUSY Redis is busy", false),
            ("-OOM command not allowed", true),
            ("-NOPERM no permissions", true),
            ("-WRONGTYPE Operation", true),
            ("-NOAUTH Authentication required.", true),
            ("-WRONGPASS invalid", true),
            ("-MISCONF Redis is configured", true),
            ("-ERR anything", true),
        ];
        for (reply, refused) in cases {
            let reply = redis::parse_redis_value(format!("{reply}\r\n").as_bytes()).unwrap();
            let error = reply.extract_error().unwrap_err();
            assert_eq!(matches!(store_error(&error), StoreError::Refused(_)), refused, "{error}");
        }
        let io = RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        assert!(matches!(store_error(&io), StoreError::Unavailable(_)));
        assert!(matches!(store_error(&senseless()), StoreError::Unavailable(_)) && ends_trust(&senseless()));
    }

    #[test]
    fn a_connection_to_a_server_that_is_no_primary_any_more_is_replaced() {
        for (reply, ends) in [
            ("-READONLY You can't write", true),
            ("-NOAUTH Authentication required.", true),
            ("-NOPERM no permissions", false),
            ("-NOREPLICAS Not enough", false),
            ("+OK", false),
        ] {
            let reply = redis::parse_redis_value(format!("{reply}\r\n").as_bytes()).unwrap();
            assert_eq!(reply_ends_trust(&reply), ends, "{reply:?}");
            assert_eq!(reply.clone().extract_error().is_err_and(|error| ends_trust(&error)), ends, "{reply:?}");
        }
    }
}
