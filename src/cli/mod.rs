//! What can one ask of the binary? One file per command; each gives its exit code, and text for `main` to print.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod run;
pub mod gateway;
pub mod reload;
pub mod check;
pub mod sessions;
pub mod splits;
pub mod pools;
pub mod demo;
pub mod demo_backend;
pub mod hash_password;
pub mod health;

/// It ran, and failed.
pub const FAILED: u8 = 1;
/// The configuration is wrong (`EX_CONFIG` of sysexits.h). Wrong arguments are 2, as everywhere.
pub const BAD_CONFIG: u8 = 78;

/// Hand in your session, keep the ticket: a reverse proxy and load balancer that externalizes sessions.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the gateway until SIGTERM; SIGHUP reloads the file, SIGUSR2 starts a new binary that takes over.
    Run {
        #[arg(long, short, value_name = "FILE", default_value = "/etc/cloakroom/cloakroom.toml")]
        config: PathBuf,
    },
    /// Have the running gateway read its file again, and see what has changed; a broken file changes nothing.
    Reload {
        #[arg(long, short, value_name = "FILE", default_value = "/etc/cloakroom/cloakroom.toml")]
        config: PathBuf,
    },
    /// Say all that is wrong with these files, doing what start-up does short of listening and connecting.
    Check {
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Ask where backends are, too, and the identity providers what they are.
        #[arg(long)]
        online: bool,
    },
    /// See, count and end sessions.
    Sessions(sessions::Arguments),
    /// See and move the shares of users that meet another pool.
    Splits(splits::Arguments),
    /// See the running gateway's backends; drain one, undrain it, set its weight.
    Pools(pools::Arguments),
    /// Show it: two backends and a gateway with a user, on loopback.
    Demo {
        /// Keep the sessions in this Redis; a restart then keeps you logged in.
        #[arg(long, value_name = "URL")]
        redis: Option<String>,
        /// The first port to try.
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
    /// One of the demo's backends.
    #[command(hide = true)]
    DemoBackend { name: String },
    /// Make a password hash for users.toml: asks twice on a terminal, reads one line from a pipe.
    HashPassword,
    /// Ask a running gateway whether it is ready; exit code 0 means yes.
    Health {
        /// Its `[admin] address`.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9900")]
        admin: SocketAddr,
    },
}

/// What `main` prints with.
pub struct Terminal<'a> {
    out: &'a mut dyn io::Write,
    err: &'a mut dyn io::Write,
    /// Why something of the answer was not written: then the command has failed, whatever it did.
    unsaid: Option<io::Error>,
}

impl std::fmt::Debug for Terminal<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Terminal")
    }
}

impl<'a> Terminal<'a> {
    pub fn new(out: &'a mut dyn io::Write, err: &'a mut dyn io::Write) -> Self {
        Self { out, err, unsaid: None }
    }

    /// A line of the answer.
    pub fn say(&mut self, line: impl std::fmt::Display) {
        let said = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
        self.unsaid = self.unsaid.take().or(said.err());
    }

    /// A failure, with its causes.
    pub fn fail(&mut self, error: &dyn std::error::Error, code: u8) -> ExitCode {
        let _ = writeln!(self.err, "error: {error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            let _ = writeln!(self.err, "  caused by: {error}");
            cause = error.source();
        }
        ExitCode::from(code)
    }

    /// What words itself, on standard error.
    pub fn complain(&mut self, text: impl std::fmt::Display) {
        let _ = writeln!(self.err, "{text}");
    }

    /// What is wrong with the configuration; it words itself.
    pub fn refuse(&mut self, error: &crate::config::error::ConfigError) -> ExitCode {
        self.complain(error);
        ExitCode::from(BAD_CONFIG)
    }
}

pub fn main(arguments: Arguments, terminal: &mut Terminal<'_>) -> ExitCode {
    let code = run_command(arguments.command, terminal);
    match terminal.unsaid.take() {
        // Who reads has seen enough, as `head` does, and wants no words about it.
        Some(error) if code == ExitCode::SUCCESS && error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(FAILED),
        Some(error) if code == ExitCode::SUCCESS => terminal.fail(&Unsaid(error), FAILED),
        Some(_) | None => code,
    }
}

/// The command did its work, and nobody has its answer.
#[derive(Debug)]
struct Unsaid(io::Error);

impl std::fmt::Display for Unsaid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the answer cannot be written to standard output")
    }
}

impl std::error::Error for Unsaid {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// What came from elsewhere must not steer the terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || is_bidirectional_control(c) { '\u{fffd}' } else { c }).collect()
}

/// These turn a line around (Unicode Standard Annex 9, section 2).
fn is_bidirectional_control(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The name of a pool or of a split, as an argument.
fn name(text: &str) -> Result<String, &'static str> {
    crate::config::is_label(text).then(|| text.to_owned()).ok_or("a name has 1 to 64 letters, digits, `-` or `_`")
}

fn run_command(command: Command, terminal: &mut Terminal<'_>) -> ExitCode {
    match command {
        Command::Run { config } => run::run(&config, terminal),
        Command::Reload { config } => reload::reload(&config, terminal),
        Command::Check { files, online } => check::check(&files, online, terminal),
        Command::Sessions(arguments) => sessions::run(&arguments, terminal),
        Command::Splits(arguments) => splits::run(&arguments, terminal),
        Command::Pools(arguments) => pools::run(&arguments, terminal),
        Command::Demo { redis, port } => demo::demo(redis.as_deref(), port, terminal),
        Command::DemoBackend { name } => demo_backend::run(&name, terminal),
        Command::HashPassword => match hash_password::hash_password() {
            Ok(hash) => {
                terminal.say(hash);
                ExitCode::SUCCESS
            }
            Err(error) => terminal.fail(&error, FAILED),
        },
        Command::Health { admin } => health::health(admin, terminal),
    }
}
