//! `cloakroom check FILE...`: every problem of every file; with `--online`, of the identity providers that they name.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{BAD_CONFIG, FAILED, Terminal};
use crate::server::Prepared;
use crate::{config, server};

pub fn check(files: &[PathBuf], online: bool, terminal: &mut Terminal<'_>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in files {
        match config::load(file).and_then(server::prepare) {
            Ok(prepared) => {
                terminal.say(format_args!("{}: ok", file.display()));
                if online && !ask_providers(&prepared, terminal) && code == ExitCode::SUCCESS {
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
