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

use super::gateway::{Answer, Gateway, Unable};
use super::{FAILED, Terminal, plain};
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
    #[arg(value_name = "POOL")]
    pool: String,
    /// As the file has it: host:port.
    #[arg(value_name = "BACKEND")]
    backend: String,
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
    backends: Vec<Backend>,
    warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Backend {
    address: String,
    state: String,
    health: String,
    ejected_until: Option<String>,
    last_failure: Option<Failure>,
    drain: Setting<bool>,
    weight: Setting<u32>,
    share_percent: u32,
    in_flight: u32,
    max_requests: u32,
    requests: u64,
    failures: u64,
    /// After a change.
    #[serde(default)]
    warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Setting<T> {
    configured: T,
    current: T,
}

#[derive(Deserialize)]
struct Failure {
    at: String,
    what: String,
}

/// Why it was not done.
#[derive(Debug)]
enum Failed {
    Unable(Unable),
    /// The gateway's own words.
    Refused(String),
    /// What came is not what the API gives.
    Strange(serde_json::Error),
    StillBusy {
        in_flight: u32,
        timeout: value::Duration,
    },
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
                let answer = self.ask(Method::GET, "/api/pools", None)?;
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
        self.ask(Method::PATCH, &which.path(), Some(wanted))
    }

    fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Failed> {
        match self.gateway.ask(method, path, body).map_err(Failed::Unable)? {
            Answer::Done(answer) => Ok(answer),
            Answer::Refused(detail) => Err(Failed::Refused(plain(&detail))),
        }
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
            let backend: Backend = understood(answer.clone())?;
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
            answer = self.ask(Method::GET, &which.path(), None)?;
        }
    }

    fn tell_change(&self, answer: Value, terminal: &mut Terminal<'_>) -> Result<(), Failed> {
        if self.json {
            terminal.say(answer);
            return Ok(());
        }
        let backend: Backend = understood(answer)?;
        let Backend { address, in_flight, .. } = &backend;
        let (state, weight) = (backend.state_in_words(), backend.weight_in_words());
        terminal.say(format_args!("{}: {state}, weight {weight}, {in_flight} in flight", plain(address)));
        for warning in &backend.warnings {
            terminal.complain(format_args!("warning: {}", plain(warning)));
        }
        Ok(())
    }
}

fn understood<T: serde::de::DeserializeOwned>(answer: Value) -> Result<T, Failed> {
    serde_json::from_value(answer).map_err(Failed::Strange)
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
        rows.extend(backends.iter().map(|backend| backend.row(pool)));
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

impl Backend {
    fn row(&self, pool: &str) -> [String; 9] {
        let most = if self.max_requests == 0 { "any".to_owned() } else { self.max_requests.to_string() };
        let failure = self.last_failure.as_ref();
        [
            plain(pool),
            plain(&self.address),
            self.state_in_words(),
            self.in_flight.to_string(),
            most,
            self.weight_in_words(),
            self.requests.to_string(),
            self.failures.to_string(),
            failure.map_or_else(|| "-".to_owned(), |failure| plain(&format!("{} ({})", failure.what, failure.at))),
        ]
    }

    fn state_in_words(&self) -> String {
        let Self { state, health, ejected_until, drain, .. } = self;
        let mut text = state.replace('_', " ");
        if state == "draining" && health != "up" {
            text = format!("{text}, {health}");
        }
        if let Some(until) = ejected_until {
            text = format!("{text} until {until}");
        }
        if drain.current && !drain.configured {
            text.push_str(" by hand");
        }
        plain(&text)
    }

    fn weight_in_words(&self) -> String {
        let Self { weight, share_percent, .. } = self;
        let share = if *share_percent < 100 { format!(" at {share_percent}%") } else { String::new() };
        if weight.current == weight.configured {
            format!("{}{share}", weight.current)
        } else {
            format!("{}{share} (file: {})", weight.current, weight.configured)
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unable(unable) => write!(f, "{unable}"),
            Self::Refused(detail) => f.write_str(detail),
            Self::Strange(_) => f.write_str("the gateway is of another version: this command does not know its answer"),
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
            Self::Strange(error) => Some(error),
            Self::Refused(_) | Self::StillBusy { .. } | Self::Undrained => None,
        }
    }
}
