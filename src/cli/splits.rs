//! `cloakroom splits`: how large a share of the users each split takes, and another share from now on.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::gateway::{Answer, Gateway};
use super::{FAILED, Terminal};
use crate::config;
use crate::config::value::Percent;

/// What one can ask of the splits of the running gateway.
#[derive(Debug, Args)]
pub struct Arguments {
    #[arg(long, short, global = true, value_name = "FILE", default_value = "/etc/cloakroom/cloakroom.toml")]
    config: PathBuf,
    /// One JSON document in place of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// All splits, with their percentage now and in the file.
    List,
    /// Give a split another percentage, on this instance, until a restart or until its file says something new.
    Set {
        #[arg(value_name = "SPLIT", value_parser = name)]
        name: String,
        /// 0 to 100, with two decimals at most.
        percent: Percent,
    },
}

fn name(text: &str) -> Result<String, &'static str> {
    let is_name = config::is_label(text);
    is_name.then(|| text.to_owned()).ok_or("a split has 1 to 64 letters, digits, `-` or `_`")
}

#[derive(Debug, Serialize, Deserialize)]
struct Splits {
    splits: Vec<Split>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Split {
    name: String,
    groups: Vec<String>,
    percent: Percent,
    configured_percent: Percent,
    routes: Vec<Destination>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Destination {
    route: String,
    pool: String,
}

pub fn run(arguments: &Arguments, terminal: &mut Terminal<'_>) -> ExitCode {
    let gateway = match Gateway::of(&arguments.config) {
        Ok(gateway) => gateway,
        Err(error) => return terminal.refuse(&error),
    };
    let answer = match &arguments.what {
        What::List => gateway.ask(Method::GET, "/api/splits", None),
        What::Set { name, percent } => {
            let place = format!("/api/splits/{name}");
            let changed = gateway.ask(Method::PATCH, &place, Some(&json!({ "percent": percent })));
            changed.map(|answer| match answer {
                Answer::Done(split) => Answer::Done(Splits { splits: vec![split] }),
                Answer::Refused(problem) => Answer::Refused(problem),
            })
        }
    };
    match answer {
        Ok(Answer::Done(answer)) if arguments.json => {
            terminal.say(json!(answer));
            ExitCode::SUCCESS
        }
        Ok(Answer::Done(Splits { splits })) => {
            terminal.say(table(&splits));
            ExitCode::SUCCESS
        }
        Ok(Answer::Refused(problem)) => {
            terminal.complain(format_args!("error: {problem}"));
            ExitCode::from(FAILED)
        }
        Err(unable) => terminal.fail(&unable, FAILED),
    }
}

/// A line for each route of a split; groups and shares stand in the first one.
fn table(splits: &[Split]) -> String {
    let mut text = format!("{:<16}  {:>7}  {:>7}  {:<24}  {}", "SPLIT", "NOW", "IN FILE", "ROUTE", "POOL");
    for Split { name, groups, percent, configured_percent, routes } in splits {
        let now = format!("{percent} %");
        let configured = format!("{configured_percent} %");
        let mut first = format!("{name:<16}  {now:>7}  {configured:>7}");
        if routes.is_empty() {
            let _ = write!(text, "\n{first}");
        }
        for Destination { route, pool } in routes {
            let _ = write!(text, "\n{first:<34}  {route:<24}  {pool}");
            first.clear();
        }
        if !groups.is_empty() {
            let _ = write!(text, "\n{:<16}  and all of {}", "", groups.join(", "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_tells_the_share_of_now_and_that_of_the_file() {
        let splits = serde_json::from_value::<Splits>(json!({ "splits": [
            { "name": "next", "groups": ["beta", "staff"], "percent": 25, "configured_percent": 0.25, "routes": [
                { "route": "/", "pool": "green" },
                { "route": "shop.example.org/cart", "pool": "cart-next" },
            ] },
            { "name": "idle", "groups": [], "percent": 0, "configured_percent": 0, "routes": [] },
        ] }));
        let expected = "\
SPLIT                 NOW  IN FILE  ROUTE                     POOL
next                 25 %   0.25 %  /                         green
                                    shop.example.org/cart     cart-next
                  and all of beta, staff
idle                  0 %      0 %";
        assert_eq!(table(&splits.unwrap().splits), expected);
    }
}
