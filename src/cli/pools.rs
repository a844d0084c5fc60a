//! `cloakroom pools`: how the running gateway's backends do, and which of them it lets have requests.

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use http::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::gateway::{Gateway, Unable, understood};
use super::{FAILED, Terminal, name, plain};
use crate::admin::BackendView;
use crate::config::{model, value};

/// What one can ask of the pools. Without a command: how they are.
#[derive(Debug, Args)]
pub struct Arguments {
    #[arg(long, short, global = true, value_name = "FILE", default_value = "/etc/cloakroom/cloakroom.toml")]
    config: PathBuf,
    /// One JSON document in place of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Keep new requests from a backend; those that it has go on.
    Drain {
        #[command(flatten)]
        which: Which,
        /// Return when nothing is in flight there any more.
        #[arg(long)]
        wait: bool,
        /// For --wait: how long, then it fails; the backend stays drained.
        #[arg(long, value_name = "TIME", default_value = "5m", requires = "wait")]
        timeout: value::Duration,
    },
    /// Let a backend have requests again.
    Undrain {
        #[command(flatten)]
        which: Which,
    },
    /// Set a backend's share, compared with the others'.
    Weight {
        #[command(flatten)]
        which: Which,
        /// 1 to 1000.
        #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(model::Backend::WEIGHT_MAX)))]
        weight: u32,
    },
}

#[derive(Debug, Args)]
struct Which {
    #[arg(value_name = "POOL", value_parser = name)]
    pool: String,
    /// As `cloakroom pools` shows it: host:port.
    #[arg(value_name = "BACKEND", value_parser = address)]
    backend: String,
}

/// What no address has, and the gateway's guard refuses in a path.
fn address(text: &str) -> Result<String, &'static str> {
    let is_strange = |c: char| matches!(c, '/' | '\\' | '%') || c.is_whitespace() || c.is_control();
    if text.is_empty() || text.contains(is_strange) {
        return Err("expected host:port as `cloakroom pools` shows it, without http:// and without a path");
    }
    Ok(text.to_owned())
}

/// Of what the API gives, that which a table shows.
#[derive(Deserialize)]
struct Pools {
    pools: Vec<Pool>,
}

#[derive(Deserialize)]
struct Pool {
    pool: String,
    waiting: usize,
    backends: Vec<BackendView>,
    warnings: Vec<String>,
}

/// A backend after a change.
#[derive(Deserialize)]
struct Changed {
    #[serde(flatten)]
    backend: BackendView,
    warnings: Vec<String>,
}

/// Why it was not done.
#[derive(Debug)]
enum Failed {
    Unable(Unable),
    StillBusy { in_flight: u32, timeout: value::Duration },
    Undrained,
}

/// The guard refuses what is encoded without need.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_').remove(b':');

/// Between two looks at a backend that is drained.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

pub fn run(arguments: &Arguments, terminal: &mut Terminal<'_>) -> ExitCode {
    let gateway = match Gateway::of(&arguments.config) {
        Ok(gateway) => gateway,
        Err(error) => return terminal.refuse(&error),
    };
    match (Asked { gateway, json: arguments.json }).answer(arguments, terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => terminal.fail(&failed, FAILED),
    }
}

struct Asked {
    gateway: Gateway,
    json: bool,
}

impl Asked {
    fn answer(&self, arguments: &Arguments, terminal: &mut Terminal<'_>) -> Result<(), Failed> {
        match &arguments.what {
            None => {
                let answer = self.gateway.ask(Method::GET, "/api/pools", None)?;
                if self.json {
                    terminal.say(answer);
                } else {
                    tell(&understood(answer)?, terminal);
                }
                Ok(())
            }
            Some(What::Drain { which, wait, timeout }) => {
                let answer = self.set(which, &json!({ "drain": true }))?;
                let answer = if *wait { self.wait(which, answer, *timeout, terminal)? } else { answer };
                self.tell_change(answer, terminal)
            }
            Some(What::Undrain { which }) => {
                let answer = self.set(which, &json!({ "drain": false }))?;
                self.tell_change(answer, terminal)
            }
            Some(What::Weight { which, weight }) => {
                let answer = self.set(which, &json!({ "weight": weight }))?;
                self.tell_change(answer, terminal)
            }
        }
    }

    fn set(&self, which: &Which, wanted: &Value) -> Result<Value, Failed> {
        Ok(self.gateway.ask(Method::PATCH, &which.path(), Some(wanted))?)
    }

    /// Until nothing is in flight there. Gives how the backend is then, with what was said when it was drained.
    fn wait(
        &self,
        which: &Which,
        mut answer: Value,
        timeout: value::Duration,
        terminal: &mut Terminal<'_>,
    ) -> Result<Value, Failed> {
        let end = Instant::now() + timeout.get();
        let warnings = answer.get("warnings").cloned().unwrap_or_else(|| json!([]));
        let mut told = None;
        loop {
            let backend: BackendView = understood(answer.clone())?;
            if !backend.drain.current {
                return Err(Failed::Undrained);
            }
            let in_flight = backend.in_flight;
            if in_flight == 0 {
                if let Some(answer) = answer.as_object_mut() {
                    answer.insert("warnings".into(), warnings);
                }
                return Ok(answer);
            }
            if end <= Instant::now() {
                return Err(Failed::StillBusy { in_flight, timeout });
            }
            if !self.json && told.replace(in_flight) != Some(in_flight) {
                terminal.complain(format_args!("{in_flight} in flight"));
            }
            std::thread::sleep(LOOK_AGAIN);
            answer = self.gateway.ask(Method::GET, &which.path(), None)?;
        }
    }

    fn tell_change(&self, answer: Value, terminal: &mut Terminal<'_>) -> Result<(), Failed> {
        if self.json {
            terminal.say(answer);
            return Ok(());
        }
        let Changed { backend, warnings } = understood(answer)?;
        let BackendView { address, in_flight, .. } = &backend;
        let (state, weight) = (backend.state_in_words(), backend.weight_in_words());
        terminal.say(format_args!("{}: {state}, weight {weight}, {in_flight} in flight", plain(address)));
        for warning in &warnings {
            terminal.complain(format_args!("warning: {}", plain(warning)));
        }
        Ok(())
    }
}

impl Which {
    fn path(&self) -> String {
        let encoded = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
        format!("/api/pools/{}/backends/{}", encoded(&self.pool), encoded(&self.backend))
    }
}

/// A row for each backend; columns as wide as what is in them.
fn tell(Pools { pools }: &Pools, terminal: &mut Terminal<'_>) {
    let headings = ["POOL", "BACKEND", "STATE", "IN FLIGHT", "MOST", "WEIGHT", "REQUESTS", "FAILURES", "LAST FAILURE"];
    let mut rows = vec![headings.map(str::to_owned)];
    for Pool { pool, backends, .. } in pools {
        rows.extend(backends.iter().map(|backend| row(pool, backend)));
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 9] = std::array::from_fn(width);
    for row in &rows {
        let line: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        terminal.say(line.trim_end());
    }
    for Pool { pool, waiting, warnings, .. } in pools {
        if *waiting != 0 {
            terminal.say(format_args!("{}: {waiting} wait for a backend", plain(pool)));
        }
        for warning in warnings {
            terminal.complain(format_args!("warning: {}", plain(warning)));
        }
    }
}

fn row(pool: &str, backend: &BackendView) -> [String; 9] {
    let most = if backend.max_requests == 0 { "any".to_owned() } else { backend.max_requests.to_string() };
    let failure = backend.last_failure.as_ref();
    [
        plain(pool),
        plain(&backend.address),
        backend.state_in_words(),
        backend.in_flight.to_string(),
        most,
        backend.weight_in_words(),
        backend.requests.to_string(),
        backend.failures.to_string(),
        failure.map_or_else(|| "-".to_owned(), |failure| plain(&format!("{} ({})", failure.what, failure.at))),
    ]
}

impl From<Unable> for Failed {
    fn from(unable: Unable) -> Self {
        Self::Unable(unable)
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unable(unable) => write!(f, "{unable}"),
            Self::StillBusy { in_flight, timeout } => {
                write!(f, "{in_flight} still in flight after {timeout}; the backend stays drained")
            }
            Self::Undrained => f.write_str("somebody has undrained it meanwhile"),
        }
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unable(unable) => unable.source(),
            Self::StillBusy { .. } | Self::Undrained => None,
        }
    }
}
