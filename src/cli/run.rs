//! `cloakroom run`: the gateway, from its file, until a signal ends it.

use std::path::Path;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use super::{FAILED, Terminal};
use crate::config::model::{Log, LogFormat, LogLevel};
use crate::log::{LineWriter, Lines};
use crate::server::Running;
use crate::{config, server};

pub fn run(file: &Path, terminal: &mut Terminal<'_>) -> ExitCode {
    let config = match config::load(file) {
        Ok(config) => config,
        Err(error) => return terminal.refuse(&error),
    };
    let log = match start_log(&config.log) {
        Ok(log) => log,
        Err(error) => return terminal.fail(&error, FAILED),
    };
    let prepared = match server::prepare(config) {
        Ok(prepared) => prepared,
        Err(error) => return terminal.refuse(&error),
    };
    let started = Signals::install().and_then(|signals| Ok((signals, server::start(prepared)?)));
    let (signals, running) = match started {
        Ok(started) => started,
        Err(error) => return terminal.fail(&*error, FAILED),
    };
    for address in running.addresses() {
        tracing::info!(%address, "listening");
    }
    if let Some(address) = running.admin_address() {
        tracing::info!(%address, "admin listening");
    }
    signals.serve(|| reload(&running, file));
    tracing::info!("shutting down");
    running.stop();
    tracing::info!("ended");
    drop(log);
    ExitCode::SUCCESS
}

/// A broken file changes nothing (invariant 10).
fn reload(running: &Running, file: &Path) {
    match running.reload(config::load(file)) {
        Ok(restart_needed) if restart_needed.is_empty() => tracing::info!("configuration reloaded"),
        Ok(restart_needed) => {
            let sections = restart_needed.join(", ");
            tracing::warn!(sections, "configuration reloaded; these sections have changed and need a restart");
        }
        Err(error) => tracing::error!("configuration not reloaded, the old one stays: {error}"),
    }
}

/// The signals that we answer, and the runtime that hears them.
pub(super) struct Signals {
    runtime: tokio::runtime::Runtime,
    reload: Signal,
    end: Signal,
    interrupt: Signal,
}

type AnyError = Box<dyn std::error::Error>;

impl Signals {
    pub(super) fn install() -> Result<Self, AnyError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let installed = {
            let _entered = runtime.enter();
            [SignalKind::hangup(), SignalKind::terminate(), SignalKind::interrupt()].map(signal)
        };
        let [reload, end, interrupt] = installed;
        Ok(Self { runtime, reload: reload?, end: end?, interrupt: interrupt? })
    }

    /// Returns on SIGTERM or SIGINT.
    pub(super) fn serve(self, mut on_reload: impl FnMut()) {
        let Self { runtime, mut reload, mut end, mut interrupt } = self;
        runtime.block_on(async {
            loop {
                tokio::select! {
                    Some(()) = reload.recv() => on_reload(),
                    _ = end.recv() => return,
                    _ = interrupt.recv() => return,
                }
            }
        });
    }
}

/// Diagnostics go to standard error, for as long as the result lives; the access log has standard output for itself.
pub(super) fn start_log(config: &Log) -> std::io::Result<LineWriter> {
    let level = match config.level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    // The level is for our own lines; what the audit asks for is always said. At the finer ones, libraries print whole requests with their cookies.
    let filter = EnvFilter::new(format!("warn,pingora_core=error,pingora_proxy=error,cloakroom={level},audit=info"));
    let (lines, writer) = Lines::to("log", std::io::stderr())?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || lines.clone());
    // A second start in one process keeps the first log.
    let _ = match config.format {
        LogFormat::Text => log.with_ansi(false).finish().try_init(),
        LogFormat::Json => log.json().flatten_event(true).finish().try_init(),
    };
    Ok(writer)
}
