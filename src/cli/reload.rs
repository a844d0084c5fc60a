//! `cloakroom reload`: the running gateway reads its file again, and says what has changed.

use std::path::Path;
use std::process::ExitCode;

use http::Method;
use serde::Deserialize;

use super::gateway::{Gateway, Unable, understood};
use super::{FAILED, Terminal, plain};

#[derive(Deserialize)]
struct Report {
    file: String,
    applied: Vec<String>,
    restart: Vec<String>,
    /// What was set at run time; a gateway of an older version says nothing of it.
    #[serde(default)]
    kept: Vec<String>,
    #[serde(default)]
    dropped: Vec<String>,
}

pub fn reload(file: &Path, terminal: &mut Terminal<'_>) -> ExitCode {
    let gateway = match Gateway::of(file) {
        Ok(gateway) => gateway,
        Err(error) => {
            terminal.refuse(&error);
            return ExitCode::from(FAILED);
        }
    };
    match gateway.ask(Method::POST, "/reload", None).and_then(understood) {
        Ok(report) => {
            tell(&report, terminal);
            ExitCode::SUCCESS
        }
        // All that is wrong with the file.
        Err(Unable::Refused(problems)) => {
            terminal.complain(problems);
            terminal.complain("nothing has changed: the old configuration stays");
            ExitCode::from(FAILED)
        }
        Err(unable) => {
            let code = terminal.fail(&unable, FAILED);
            terminal.complain("  or send it SIGHUP, and look at its log");
            code
        }
    }
}

fn tell(Report { file, applied, restart, kept, dropped }: &Report, terminal: &mut Terminal<'_>) {
    terminal.say(format_args!("{}: reloaded", plain(file)));
    if applied.is_empty() && restart.is_empty() {
        terminal.say("  nothing has changed");
    }
    for (what, lines) in [
        ("applied", applied),
        ("needs a restart", restart),
        // Set at run time, by `cloakroom pools` and `cloakroom splits`, or over the API.
        ("stays set", kept),
        ("no longer set", dropped),
    ] {
        for line in lines {
            terminal.say(format_args!("  {what:<15}  {}", plain(line)));
        }
    }
}
