//! `cloakroom check FILE...`: every problem of every file.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{BAD_CONFIG, Terminal};
use crate::{config, server};

pub fn check(files: &[PathBuf], terminal: &mut Terminal<'_>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in files {
        match config::load(file).and_then(server::prepare) {
            Ok(_) => terminal.say(format_args!("{}: ok", file.display())),
            Err(error) => {
                terminal.refuse(&error);
                code = ExitCode::from(BAD_CONFIG);
            }
        }
    }
    code
}
