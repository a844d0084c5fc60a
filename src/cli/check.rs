//! `cloakroom check FILE...`: every problem of every file; with `--online`, whether backends are found, and what is wrong
//! with the identity providers.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{BAD_CONFIG, FAILED, Terminal};
use crate::server::{Discovery, Prepared};
use crate::{config, server};

pub fn check(files: &[PathBuf], online: bool, terminal: &mut Terminal<'_>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in files {
        match config::load(file).and_then(server::prepare) {
            Ok(prepared) => {
                let is_well = !online || find_backends(&prepared, terminal) & ask_providers(&prepared, terminal);
                if is_well {
                    terminal.say(format_args!("{}: ok", file.display()));
                    continue;
                }
                terminal.say(format_args!("{}: the file is ok, what it names is not all there", file.display()));
                if code == ExitCode::SUCCESS {
                    code = ExitCode::from(FAILED);
                }
            }
            Err(error) => {
                terminal.refuse(&error);
                code = ExitCode::from(BAD_CONFIG);
            }
        }
    }
    code
}

/// Whether they are found, and where.
fn find_backends(prepared: &Prepared, terminal: &mut Terminal<'_>) -> bool {
    let mut all_found = true;
    for (pool, Discovery { source, found, failure }) in prepared.discover() {
        match failure {
            None if !found.is_empty() => {
                terminal.say(format_args!("[pool.{pool}] {source}: {}", found.join(", ")));
            }
            failure => {
                let cause = failure.as_deref().unwrap_or("no answer in time");
                terminal.say(format_args!("[pool.{pool}] {source}: failed: {cause}"));
                all_found = false;
            }
        }
    }
    all_found
}

/// Whether all of them are there, and what they say they are. What is only odd is told, and is no failure.
fn ask_providers(prepared: &Prepared, terminal: &mut Terminal<'_>) -> bool {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            terminal.fail(&error, FAILED);
            return false;
        }
    };
    let mut all_well = true;
    for (name, finding) in runtime.block_on(prepared.providers().inspect()) {
        match finding {
            Ok(remarks) => {
                terminal.say(format_args!("[login.oidc.{name}]: ok"));
                for remark in remarks {
                    terminal.say(format_args!("  note: {remark}"));
                }
            }
            Err(error) => {
                terminal.say(format_args!("[login.oidc.{name}]: failed: {error}"));
                all_well = false;
            }
        }
    }
    all_well
}
