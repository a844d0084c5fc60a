//! How does a running gateway take up a changed file? Whole or not at all (invariant 10), whoever asks for it.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{FIND_FIRST_MAX, build_login, now_seconds};
use crate::admin::{Hosts, LastReload};
use crate::backend::discover;
use crate::config;
use crate::config::changes::Changes;
use crate::config::error::ConfigError;
use crate::config::model::{Config, LogLevel, Pool};
use crate::listener::tls::Tls;
use crate::metrics::Metrics;
use crate::proxy::rules::Rules;
use crate::session::Sessions;
use crate::session::seal::KeyRing;

/// What a reload replaces, and what it compares with.
#[derive(Debug)]
pub(super) struct Reload {
    pub(super) rules: Arc<ArcSwap<Rules>>,
    pub(super) tls: Vec<Option<Arc<Tls>>>,
    pub(super) sessions: Sessions,
    pub(super) ring: Option<Arc<KeyRing>>,
    pub(super) metrics: Metrics,
    pub(super) log_switch: LogSwitch,
    pub(super) witness: ReloadWitness,
    pub(super) admin_hosts: Arc<ArcSwap<Hosts>>,
    /// What only a restart applies is as it was then.
    pub(super) started: Arc<Config>,
    /// The last one that was applied. Whoever reloads holds it: reloads take turns.
    pub(super) applied: Mutex<Arc<Config>>,
    /// For the status page.
    pub(super) last: watch::Sender<Option<LastReload>>,
}

/// Says from now on which of our own lines are logged.
#[derive(Clone)]
pub struct LogSwitch(Arc<dyn Fn(LogLevel) + Send + Sync>);

impl LogSwitch {
    pub fn new(set: impl Fn(LogLevel) + Send + Sync + 'static) -> Self {
        Self(Arc::new(set))
    }
}

impl Default for LogSwitch {
    /// Nobody's: the log is not ours.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl fmt::Debug for LogSwitch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSwitch")
    }
}

/// How far a reload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadStage {
    Begun,
    Applied,
    /// The old configuration stays.
    Refused,
}

/// Hears of every reload, whoever asked for it.
#[derive(Clone)]
pub struct ReloadWitness(Arc<dyn Fn(ReloadStage) + Send + Sync>);

impl ReloadWitness {
    pub fn new(hear: impl Fn(ReloadStage) + Send + Sync + 'static) -> Self {
        Self(Arc::new(hear))
    }
}

impl Default for ReloadWitness {
    /// Nobody.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl fmt::Debug for ReloadWitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReloadWitness")
    }
}

impl Reload {
    /// Reads the file again with all that it names, and applies it all or nothing. What needs a restart is told until
    /// there has been one. Logs how it went.
    ///
    /// Reads files, and may wait for names to be resolved.
    pub(super) fn reload(&self) -> Result<Changes, ConfigError> {
        let mut applied = self.applied.lock();
        let ReloadWitness(hear) = &self.witness;
        hear(ReloadStage::Begun);
        let outcome = config::load(&self.started.file).and_then(|config| self.apply(config, &mut applied));
        hear(if outcome.is_ok() { ReloadStage::Applied } else { ReloadStage::Refused });
        drop(applied);
        let result = if outcome.is_ok() { "applied" } else { "refused" };
        self.metrics.reloads.with_label_values(&[result]).inc();
        self.last.send_replace(Some(LastReload::now(result, outcome.as_ref().is_ok_and(Changes::needs_restart))));
        match &outcome {
            Ok(changes) => {
                let Changes { at_once, at_restart, kept, dropped } = changes;
                let listed = |lines: &[String]| (!lines.is_empty()).then(|| lines.join(", "));
                let (applied, kept, dropped) = (at_once.join(", "), listed(kept), listed(dropped));
                if changes.needs_restart() {
                    let restart = at_restart.join(", ");
                    let what = "configuration reloaded; some of what has changed needs a restart";
                    tracing::warn!(applied, restart, kept, dropped, "{what}");
                } else {
                    tracing::info!(applied, kept, dropped, "configuration reloaded");
                }
            }
            Err(error) => tracing::error!("configuration not reloaded, the old one stays: {error}"),
        }
        outcome
    }

    fn apply(&self, config: Config, applied: &mut Arc<Config>) -> Result<Changes, ConfigError> {
        let tls = self.tls_of(&config)?;
        let login = build_login(&config, &self.sessions, &self.metrics)?;
        let keys = self.ring.as_ref().map(|ring| Ok((ring, ring.read_again()?))).transpose()?;
        let previous = self.rules.load_full();
        let rules = Rules::build(&config, login.taking_over(&previous.login), Some(&previous))?;
        let pools: Vec<_> = rules.pools.values().cloned().collect();
        discover::find_unknown(&pools, &rules.dns, FIND_FIRST_MAX);

        // From here on nothing fails.
        let mut changes = Changes {
            at_once: Changes::between(applied, &config).at_once,
            at_restart: Changes::between(&self.started, &config).at_restart,
            ..Changes::default()
        };
        changes.at_once.extend(rules.login.changed_files(&previous.login));
        changes.at_once.extend(renewed_pools(&config, applied, &rules, &previous));
        let rules = Arc::new(rules);
        let set_by_hand = previous.set_by_hand();
        self.rules.store(Arc::clone(&rules));
        rules.settle();
        changes.kept = rules.set_by_hand();
        changes.dropped = set_by_hand.into_iter().filter(|line| !changes.kept.contains(line)).collect();
        if let Some((ring, keys)) = keys {
            if !ring.is_of(&keys) {
                changes.at_once.push("session keys: content".to_owned());
            }
            ring.replace(keys);
        }
        self.metrics.certificate_expires.reset();
        for (current, new) in tls {
            if let Some(new) = new {
                changes.at_once.extend(new.renewed_since(current));
                current.replace(&new);
            }
            current.report(&self.metrics, now_seconds());
        }
        let LogSwitch(set_level) = &self.log_switch;
        set_level(config.log.level);
        self.admin_hosts.store(Arc::new(Hosts::of(&config.admin)));
        *applied = Arc::new(config);
        Ok(changes)
    }

    /// What each TLS listener is to be replaced by, if it still is one.
    #[expect(clippy::type_complexity, reason = "pairs of old and new")]
    fn tls_of(&self, config: &Config) -> Result<Vec<(&Arc<Tls>, Option<Arc<Tls>>)>, ConfigError> {
        let new = config.listeners.iter().map(Tls::of).collect::<Result<Vec<_>, _>>()?;
        let pairs = self.tls.iter().flatten().map(|current| {
            let new = new.iter().flatten().find(|new| new.is_same(current));
            new.map_or(Ok(()), |new| current.accepts(new, now_seconds()))?;
            Ok((current, new.cloned()))
        });
        pairs.collect()
    }
}

/// The pools whose files of `tls` are the same, and hold something else, a line each.
fn renewed_pools(config: &Config, applied: &Config, rules: &Rules, previous: &Rules) -> Vec<String> {
    let is_renewed = |name: &str, pool: &Pool| {
        let is_configured_alike =
            applied.pools.get(name).is_some_and(|old| old.tls == pool.tls && old.protocol == pool.protocol);
        let transports = rules.transports.get(name).zip(previous.transports.get(name));
        is_configured_alike && transports.is_some_and(|(new, old)| !new.is_same(old))
    };
    let renewed = config.pools.iter().filter(|(name, pool)| is_renewed(name, pool));
    renewed.map(|(name, _)| format!("pool.{name}.tls: content")).collect()
}
