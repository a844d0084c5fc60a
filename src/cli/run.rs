//! `cloakroom run`: the gateway, from its file, until a signal ends it.

use std::path::Path;
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Interval;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};

use super::{FAILED, Terminal};
use crate::config::model::{Log, LogFormat, LogLevel};
use crate::log::{LineWriter, Lines};
use crate::server::{LogSwitch, ReloadStage, ReloadWitness, Running};
use crate::supervisor::notify::Notify;
use crate::supervisor::sockets::Inherited;
use crate::supervisor::successor::{NotReady, Successor, tell_ready};
use crate::{config, server};

pub fn run(file: &Path, terminal: &mut Terminal<'_>) -> ExitCode {
    // First of all: it takes variables out of the environment, which needs us to be the only thread.
    let inherited = match Inherited::take() {
        Ok(inherited) => inherited,
        Err(error) => return terminal.fail(&error, FAILED),
    };
    let notify = Arc::new(Notify::from_env());
    let config = match config::load(file) {
        Ok(config) => config,
        Err(error) => return terminal.refuse(&error),
    };
    let (log, log_switch) = match start_log(&config.log) {
        Ok(log) => log,
        Err(error) => return terminal.fail(&error, FAILED),
    };
    let prepared = match server::prepare(config) {
        Ok(prepared) => prepared
            .with_log_switch(log_switch)
            .with_reload_witness(told_to(Arc::clone(&notify)))
            .with_sockets(inherited.sockets),
        Err(error) => return terminal.refuse(&error),
    };
    log.count_dropped(prepared.metrics().log_lines_dropped.with_label_values(&["diagnostics"]));
    let started = Signals::install().and_then(|signals| Ok((signals, server::start(prepared)?)));
    let (mut signals, running) = match started {
        Ok(started) => started,
        Err(error) => return terminal.fail(&*error, FAILED),
    };
    for address in running.addresses() {
        tracing::info!(%address, "listening");
    }
    if let Some(address) = running.admin_address() {
        tracing::info!(%address, "admin listening");
    }
    match inherited.predecessor {
        // Which tells systemd of us, and only then are we heard.
        Some(predecessor) => tell_ready(predecessor),
        None => notify.ready(),
    }
    signals.serve(running, &notify);
    tracing::info!("ended");
    drop(log);
    ExitCode::SUCCESS
}

fn told_to(notify: Arc<Notify>) -> ReloadWitness {
    ReloadWitness::new(move |stage| match stage {
        ReloadStage::Begun => notify.reloading(),
        ReloadStage::Applied => notify.ready(),
        ReloadStage::Refused => notify.not_reloaded(),
    })
}

/// The signals that we answer, and the runtime that hears them.
pub(super) struct Signals {
    runtime: tokio::runtime::Runtime,
    ears: Ears,
}

struct Ears {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    user2: Signal,
}

/// What a signal asks for.
enum Heard {
    Reload,
    End,
    Upgrade,
    /// Make room for a successor.
    GiveWay,
}

type AnyError = Box<dyn std::error::Error>;

impl Signals {
    pub(super) fn install() -> Result<Self, AnyError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let installed = {
            let _entered = runtime.enter();
            [
                SignalKind::hangup(),
                SignalKind::terminate(),
                SignalKind::interrupt(),
                SignalKind::quit(),
                SignalKind::user_defined2(),
            ]
            .map(signal)
        };
        let [hangup, terminate, interrupt, quit, user2] = installed;
        let ears = Ears { hangup: hangup?, terminate: terminate?, interrupt: interrupt?, quit: quit?, user2: user2? };
        Ok(Self { runtime, ears })
    }

    /// Returns when a signal asks for the end; hears no other.
    pub(super) fn until_end(&mut self) {
        self.runtime.block_on(self.ears.end());
    }

    /// Does what the signals say, and returns when the gateway has ended.
    fn serve(&mut self, running: Running, notify: &Notify) {
        let ears = &mut self.ears;
        self.runtime.block_on(async {
            match reign(&running, ears, notify).await {
                End::Asked => leave(running, ears, notify).await,
                End::Succeeded(process) => {
                    tracing::info!(process, "a successor serves; this process answers what it has begun");
                    running.give_way();
                    notify.succeeded_by(process);
                    // Whoever ends both of us at once wants us to finish first.
                    let patience = async |ears: &mut Ears| {
                        ears.end().await;
                        ears.end().await;
                    };
                    drain(running, ears, patience).await;
                }
            }
        });
    }
}

/// Why a process ends.
enum End {
    Asked,
    /// By the process with this id.
    Succeeded(u32),
}

/// Until this process is to end; a successor that is not ready by then is dismissed.
async fn reign(running: &Running, ears: &mut Ears, notify: &Notify) -> End {
    let mut upgrade = Upgrade(None);
    let mut watchdog = notify.watchdog_interval().map(tokio::time::interval);
    loop {
        let heard = tokio::select! {
            heard = ears.hear() => heard,
            process = upgrade.outcome() => match process {
                Ok(process) => return End::Succeeded(process),
                Err(error) => {
                    tracing::error!(%error, "no upgrade, this process goes on: the successor is not ready");
                    continue;
                }
            },
            () = tick(&mut watchdog) => {
                notify.alive();
                continue;
            }
        };
        match heard {
            // A broken file changes nothing (invariant 10); the log says how it went.
            Heard::Reload => drop(running.reload()),
            Heard::End => return End::Asked,
            Heard::Upgrade => upgrade.begin(running),
            Heard::GiveWay => {
                tracing::warn!(
                    "SIGQUIT refused: there is no successor yet; SIGUSR2 starts one, SIGTERM ends this process"
                );
            }
        }
    }
}

async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// A successor on its way, if there is one.
struct Upgrade(Option<Coming>);

type Coming = Pin<Box<dyn Future<Output = Result<u32, NotReady>>>>;

impl Upgrade {
    fn begin(&mut self, running: &Running) {
        let refused = if self.0.is_some() {
            Some("a successor is being started already")
        } else if running.is_alone() {
            Some("sessions are in memory, which two processes cannot share; keep them in [store.redis], or restart")
        } else if std::process::id() == 1 {
            Some("with process 1 the container ends; start another container, and end this one")
        } else {
            None
        };
        if let Some(reason) = refused {
            tracing::error!(reason, "no upgrade, this process goes on");
            return;
        }
        match running.sockets().and_then(Successor::start) {
            Ok(successor) => {
                tracing::info!("starting a successor");
                self.0 = Some(Box::pin(successor.ready()));
            }
            Err(error) => tracing::error!(%error, "no upgrade, this process goes on: the binary does not start"),
        }
    }

    /// The process id of the successor that serves.
    async fn outcome(&mut self) -> Result<u32, NotReady> {
        let Some(successor) = &mut self.0 else { return std::future::pending().await };
        let outcome = successor.await;
        self.0 = None;
        outcome
    }
}

impl Ears {
    async fn hear(&mut self) -> Heard {
        tokio::select! {
            _ = self.hangup.recv() => Heard::Reload,
            _ = self.terminate.recv() => Heard::End,
            _ = self.interrupt.recv() => Heard::End,
            _ = self.user2.recv() => Heard::Upgrade,
            _ = self.quit.recv() => Heard::GiveWay,
        }
    }

    async fn end(&mut self) {
        while !matches!(self.hear().await, Heard::End) {}
    }
}

/// Lame duck, then drain; who sends the signal again has waited enough.
async fn leave(running: Running, ears: &mut Ears, notify: &Notify) {
    notify.stopping();
    let lame_duck = running.turn_unready();
    if let Some(lame_duck) = lame_duck {
        tracing::info!(?lame_duck, "not ready any more; requests are served as ever for this long");
    }
    let is_urgent = tokio::select! {
        () = tokio::time::sleep(lame_duck.unwrap_or_default()) => false,
        () = ears.end() => true,
    };
    tracing::info!("shutting down");
    let patience = async |ears: &mut Ears| {
        if !is_urgent {
            ears.end().await
        }
    };
    drain(running, ears, patience).await;
}

/// Ends the gateway; what is under way when the patience is over is cut.
async fn drain(running: Running, ears: &mut Ears, patience: impl AsyncFnOnce(&mut Ears)) {
    let cutter = running.cutter();
    let mut drained = pin!(tokio::task::spawn_blocking(move || running.stop()));
    tokio::select! {
        _ = &mut drained => return,
        () = patience(ears) => cutter.cut(),
    }
    let _ = drained.await;
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
