//! Arguments in, a command done, an exit code out.

use std::process::ExitCode;

use clap::Parser;
use cloakroom::cli::{self, Arguments, Terminal};
use mimalloc::MiMalloc;

/// A request makes some hundred small allocations; with the system's allocator they cost a seventh of its CPU time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    cli::main(arguments, &mut Terminal::new(&mut std::io::stdout(), &mut std::io::stderr()))
}
