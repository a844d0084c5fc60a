//! `cloakroom splits`: how large a share of the users each split takes, and another share from now on.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;
use serde::Deserialize;
use serde_json::json;

use super::gateway::{Gateway, Unable, understood};
use super::{FAILED, Terminal, name, plain};
use crate::admin::Setting;
use crate::config::value::Percent;

/// What one can ask of the splits of the running gateway. Without a command: all of them, with their percentage now and in the file.
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
    /// Give a split another percentage, on this instance, until a restart or until its file says something new.
    Set {
        #[arg(value_name = "SPLIT", value_parser = name)]
        name: String,
        /// 0 to 100, with two decimals at most.
        percent: Percent,
    },
}

#[derive(Debug, Deserialize)]
struct Splits {
    splits: Vec<Split>,
}

#[derive(Debug, Deserialize)]
struct Split {
    name: String,
    groups: Vec<String>,
    percent: Setting<Percent>,
    routes: Vec<Destination>,
}

#[derive(Debug, Deserialize)]
struct Destination {
    route: String,
    pool: String,
}

pub fn run(arguments: &Arguments, terminal: &mut Terminal<'_>) -> ExitCode {
    let gateway = match Gateway::of(&arguments.config) {
        Ok(gateway) => gateway,
        Err(error) => return terminal.refuse(&error),
    };
    match answer(&gateway, arguments, terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(unable) => terminal.fail(&unable, FAILED),
    }
}

fn answer(gateway: &Gateway, arguments: &Arguments, terminal: &mut Terminal<'_>) -> Result<(), Unable> {
    let answer = match &arguments.what {
        None => gateway.ask(Method::GET, "/api/splits", None)?,
        Some(What::Set { name, percent }) => {
            let place = format!("/api/splits/{name}");
            gateway.ask(Method::PATCH, &place, Some(&json!({ "percent": percent })))?
        }
    };
    match &arguments.what {
        _ if arguments.json => terminal.say(answer),
        None => terminal.say(table(&understood::<Splits>(answer)?.splits)),
        Some(What::Set { .. }) => terminal.say(table(&[understood(answer)?])),
    }
    Ok(())
}

/// A line for each route of a split; groups and shares stand in the first one.
fn table(splits: &[Split]) -> String {
    let mut text = format!("{:<16}  {:>7}  {:>7}  {:<24}  {}", "SPLIT", "NOW", "IN FILE", "ROUTE", "POOL");
    for Split { name, groups, percent: Setting { configured, current }, routes } in splits {
        let (name, now, configured) = (plain(name), format!("{current} %"), format!("{configured} %"));
        let mut first = format!("{name:<16}  {now:>7}  {configured:>7}");
        if routes.is_empty() {
            let _ = write!(text, "\n{first}");
        }
        for Destination { route, pool } in routes {
            let _ = write!(text, "\n{first:<34}  {:<24}  {}", plain(route), plain(pool));
            first.clear();
        }
        if !groups.is_empty() {
            let _ = write!(text, "\n{:<16}  and all of {}", "", plain(&groups.join(", ")));
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
            { "name": "next", "groups": ["beta", "staff"], "percent": { "configured": 0.25, "current": 25 }, "routes": [
                { "route": "/", "pool": "green" },
                { "route": "shop.example.org/cart", "pool": "cart-next" },
            ] },
            { "name": "idle", "groups": [], "percent": { "configured": 0, "current": 0 },
              "routes": [] },
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
