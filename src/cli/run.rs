//! `cloakroom run`: the gateway, from its file, until a signal ends it.

use std::path::Path;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};

use super::{FAILED, Terminal};
use crate::config::model::{Log, LogFormat, LogLevel};
use crate::log::{LineWriter, Lines};
use crate::server::LogSwitch;
use crate::{config, server};

pub fn run(file: &Path, terminal: &mut Terminal<'_>) -> ExitCode {
    let config = match config::load(file) {
        Ok(config) => config,
        Err(error) => return terminal.refuse(&error),
    };
    let (log, log_switch) = match start_log(&config.log) {
        Ok(log) => log,
        Err(error) => return terminal.fail(&error, FAILED),
    };
    let prepared = match server::prepare(config) {
        Ok(prepared) => prepared.with_log_switch(log_switch),
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
    signals.serve(|| {
        // It has logged how it went.
        let _ = running.reload();
    });
    tracing::info!("shutting down");
    running.stop();
    tracing::info!("ended");
    drop(log);
    ExitCode::SUCCESS
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

/// Diagnostics go to standard error, for as long as the writer lives; the access log has standard output for itself.
pub(super) fn start_log(config: &Log) -> std::io::Result<(LineWriter, LogSwitch)> {
    let (lines, writer) = Lines::to("log", std::io::stderr())?;
    let log = tracing_subscriber::fmt().with_env_filter(filter(config.level)).with_writer(move || lines.clone());
    // A second start in one process keeps the first log.
    let switch = match config.format {
        LogFormat::Text => {
            let log = log.with_ansi(false).with_filter_reloading();
            let switch = log_switch(log.reload_handle());
            let _ = log.finish().try_init();
            switch
        }
        LogFormat::Json => {
            let log = log.json().flatten_event(true).with_filter_reloading();
            let switch = log_switch(log.reload_handle());
            let _ = log.finish().try_init();
            switch
        }
    };
    Ok((writer, switch))
}

fn log_switch<S: 'static>(handle: reload::Handle<EnvFilter, S>) -> LogSwitch {
    // It fails only when there is no such log any more.
    LogSwitch::new(move |level| drop(handle.reload(filter(level))))
}

/// The level is for our own lines; what the audit asks for is always said. At the finer ones, libraries print whole
/// requests with their cookies.
fn filter(level: LogLevel) -> EnvFilter {
    let level = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    EnvFilter::new(format!("warn,pingora_core=error,pingora_proxy=error,cloakroom={level},audit=info"))
}
