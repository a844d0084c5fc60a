//! `cloakroom reload`: the running gateway reads its file again, and says what has changed.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;

use super::{FAILED, Terminal};
use crate::config::model::Admin;
use crate::{config, outgoing};

/// A reload may wait some seconds for the names of new backends, and for the one before it.
const TIMEOUT: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// Why nothing was reloaded, as far as this command knows.
#[derive(Debug)]
enum Unable {
    NoAdmin,
    NoToken,
    /// Nobody answered as a gateway does.
    Unanswered(SocketAddr, ureq::Error),
    OtherToken(SocketAddr),
    Unexpected(SocketAddr, u16),
}

/// What the gateway says.
enum Answer {
    Reloaded(Report),
    /// Its own words: all that is wrong with the file.
    Refused(String),
}

#[derive(Deserialize)]
struct Report {
    file: String,
    applied: Vec<String>,
    restart: Vec<String>,
}

#[derive(Deserialize)]
struct Problem {
    detail: String,
}

pub fn reload(file: &Path, terminal: &mut Terminal<'_>) -> ExitCode {
    // The gateway says what is wrong with the rest of it.
    let admin = match config::load_admin(file) {
        Ok(admin) => admin,
        Err(error) => {
            terminal.refuse(&error);
            return ExitCode::from(FAILED);
        }
    };
    match ask(&admin) {
        Ok(Answer::Reloaded(report)) => {
            tell(&report, terminal);
            ExitCode::SUCCESS
        }
        Ok(Answer::Refused(problems)) => {
            terminal.complain(problems);
            terminal.complain("nothing has changed: the old configuration stays");
            ExitCode::from(FAILED)
        }
        Err(unable) => terminal.fail(&unable, FAILED),
    }
}

fn ask(admin: &Admin) -> Result<Answer, Unable> {
    if !admin.enabled {
        return Err(Unable::NoAdmin);
    }
    let token = admin.token.as_ref().ok_or(Unable::NoToken)?.get_ref().expose();
    let address = reachable(*admin.address.get_ref());
    let unanswered = |error| Unable::Unanswered(address, error);
    let request = outgoing::agent(false, TIMEOUT)
        .post(format!("http://{address}/reload"))
        .header("authorization", format!("Bearer {token}"));
    let mut response = request.send_empty().map_err(unanswered)?;
    let status = response.status().as_u16();
    let mut body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).reader();
    let unexpected = |_| Unable::Unexpected(address, status);
    match status {
        200 => serde_json::from_reader(&mut body).map(Answer::Reloaded).map_err(unexpected),
        422 => {
            let Problem { detail } = serde_json::from_reader(&mut body).map_err(unexpected)?;
            Ok(Answer::Refused(detail))
        }
        401 => Err(Unable::OtherToken(address)),
        // It was started without a token.
        404 => Err(Unable::NoToken),
        _ => Err(Unable::Unexpected(address, status)),
    }
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

fn tell(Report { file, applied, restart }: &Report, terminal: &mut Terminal<'_>) {
    terminal.say(format_args!("{file}: reloaded"));
    if applied.is_empty() && restart.is_empty() {
        terminal.say("  nothing has changed");
    }
    for line in applied {
        terminal.say(format_args!("  applied          {line}"));
    }
    for line in restart {
        terminal.say(format_args!("  needs a restart  {line}"));
    }
}

impl fmt::Display for Unable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const OTHERWISE: &str = "or send it SIGHUP, and look at its log";
        match self {
            Self::NoAdmin => {
                write!(f, "the gateway cannot be asked: set admin.enabled and admin.token and restart it, {OTHERWISE}")
            }
            Self::NoToken => write!(f, "the gateway cannot be asked: set admin.token and restart it, {OTHERWISE}"),
            Self::Unanswered(address, _) => write!(
                f,
                "no gateway answers on {address}: start it; when admin.address has changed, restart it, {OTHERWISE}"
            ),
            Self::OtherToken(address) => write!(
                f,
                "the gateway on {address} has another admin.token, that of its start: restart it, {OTHERWISE}"
            ),
            Self::Unexpected(address, status) => {
                write!(f, "what answers on {address} is no gateway, or of another version: status {status}")
            }
        }
    }
}

impl std::error::Error for Unable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unanswered(_, error) => Some(error),
            Self::NoAdmin | Self::NoToken | Self::OtherToken(_) | Self::Unexpected(..) => None,
        }
    }
}
