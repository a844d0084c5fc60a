//! How does a command ask the running gateway? Over its admin listener; address and token are those of its file.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{Method, Request};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::plain;
use crate::config::error::ConfigError;
use crate::config::model::Admin;
use crate::{config, outgoing};

/// A reload may wait some seconds for the names of new backends, and for the one before it.
const TIMEOUT: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// The gateway that was started from a file, if it runs.
#[derive(Debug)]
pub struct Gateway {
    admin: Admin,
}

/// Why it was not done, as far as a command knows.
#[derive(Debug)]
pub enum Unable {
    NoAdmin,
    NoToken,
    /// Nobody answered as a gateway does.
    Unanswered(SocketAddr, ureq::Error),
    OtherToken(SocketAddr),
    Unexpected(SocketAddr, u16),
    /// The gateway's own words, harmless to a terminal; lines stay, because all that is wrong with a file takes several.
    Refused(String),
    /// What came is not what this command knows.
    Strange(serde_json::Error),
}

#[derive(Deserialize)]
struct Problem {
    detail: String,
}

impl Gateway {
    /// Reads only `[admin]`: the gateway says what is wrong with the rest.
    pub fn of(file: &Path) -> Result<Self, ConfigError> {
        Ok(Self { admin: config::load_admin(file)? })
    }

    /// `body`: of JSON. Gives what the gateway says, as it says it.
    pub fn ask(&self, method: Method, place: &str, body: Option<&Value>) -> Result<Value, Unable> {
        if !self.admin.enabled {
            return Err(Unable::NoAdmin);
        }
        let token = self.admin.token.as_ref().ok_or(Unable::NoToken)?.get_ref().expose();
        let address = reachable(*self.admin.address.get_ref());
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{address}{place}"))
            .header(AUTHORIZATION, format!("Bearer {token}"));
        let agent = outgoing::agent(false, TIMEOUT);
        let sent = match body {
            None => request.body(()).map_err(Into::into).and_then(|request| agent.run(request)),
            Some(body) => {
                let request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
                request.map_err(Into::into).and_then(|request| agent.run(request))
            }
        };
        let mut response = sent.map_err(|error| Unable::Unanswered(address, error))?;
        let status = response.status().as_u16();
        let mut body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).reader();
        let unexpected = |_| Unable::Unexpected(address, status);
        match status {
            200 => serde_json::from_reader(&mut body).map_err(unexpected),
            401 => Err(Unable::OtherToken(address)),
            400 | 404 | 422 => match serde_json::from_reader(&mut body) {
                Ok(Problem { detail }) => {
                    Err(Unable::Refused(detail.lines().map(plain).collect::<Vec<_>>().join("\n")))
                }
                // It was started without a token: then there is no such place.
                Err(_) if status == 404 => Err(Unable::NoToken),
                Err(error) => Err(unexpected(error)),
            },
            _ => Err(Unable::Unexpected(address, status)),
        }
    }
}

/// What a command needs of an answer.
pub fn understood<T: DeserializeOwned>(answer: Value) -> Result<T, Unable> {
    serde_json::from_value(answer).map_err(Unable::Strange)
}

/// Who listens on every address is found on loopback.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        SocketAddr::V4(_) | SocketAddr::V6(_) => {}
    }
    address
}

impl fmt::Display for Unable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAdmin => {
                f.write_str("the gateway cannot be asked: set admin.enabled and admin.token in its file (for another file: --config), and restart it")
            }
            Self::NoToken => f.write_str(
                "the gateway cannot be asked: set admin.token in its file (for another file: --config), and restart it",
            ),
            Self::Unanswered(address, _) => {
                write!(f, "no gateway answers on {address}: start it; when admin.address has changed, restart it")
            }
            Self::OtherToken(address) => {
                write!(f, "the gateway on {address} has another admin.token, that of its start: restart it")
            }
            Self::Unexpected(address, status) => {
                write!(f, "what answers on {address} is no gateway, or of another version: status {status}")
            }
            Self::Refused(detail) => f.write_str(detail),
            Self::Strange(_) => f.write_str("the gateway is of another version: this command does not know its answer"),
        }
    }
}

impl std::error::Error for Unable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unanswered(_, error) => Some(error),
            Self::Strange(error) => Some(error),
            Self::NoAdmin | Self::NoToken | Self::OtherToken(_) | Self::Unexpected(..) | Self::Refused(_) => None,
        }
    }
}
