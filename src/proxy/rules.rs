//! What a reload replaces, as one piece: a request sees the old rules or the new ones, never a mixture.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::backend::{AdminState, Health, Pool};
use crate::config::error::ConfigError;
use crate::config::model::{Config, Dns};
use crate::config::value::Percent;
use crate::identity::headers::IdentityHeaders;
use crate::login::Login;
use crate::metrics::Metrics;

use super::route::Routes;
use super::split::Split;
use super::transport::Transport;

/// Routes, splits, pools, identity headers and the login with its users.
#[derive(Debug)]
pub struct Rules {
    pub routes: Routes,
    pub splits: BTreeMap<String, Arc<Split>>,
    /// Few: to compare some names is cheaper than to hash one.
    pub pools: BTreeMap<String, Arc<Pool>>,
    /// Who is asked where backends are.
    pub dns: Dns,
    /// Of each pool.
    pub transports: BTreeMap<String, Transport>,
    pub identity: IdentityHeaders,
    pub login: Login,
}

impl Rules {
    /// What pools of `previous` know of their backends, and whose turn it is, is taken over by those of the same name; so is
    /// what was set at run time.
    pub fn build(config: &Config, login: Login, previous: Option<&Self>) -> Result<Self, ConfigError> {
        let pools = config.pools.iter().map(|(name, pool)| {
            let previous = previous.and_then(|rules| rules.pools.get(name));
            let pool = Pool::new(name, pool, previous.map(Arc::as_ref));
            pool.read_files()?;
            Ok((name.clone(), Arc::new(pool)))
        });
        let transports = config.pools.iter().map(|(name, pool)| Ok((name.clone(), Transport::load(pool)?)));
        let splits = config.splits.iter().map(|(name, split)| {
            let previous = previous.and_then(|rules| rules.splits.get(name));
            (name.clone(), Arc::new(Split::new(name, split, previous.map(Arc::as_ref))))
        });
        let splits = splits.collect();
        Ok(Self {
            routes: Routes::build(&config.routes, &splits, config.limits.body_bytes),
            splits,
            pools: pools.collect::<Result<_, ConfigError>>()?,
            dns: config.dns.clone(),
            transports: transports.collect::<Result<_, ConfigError>>()?,
            identity: IdentityHeaders::compile(&config.identity).reserving(access_token_fields(config)),
            login,
        })
    }

    /// These rules count from now on.
    pub fn settle(&self) {
        self.pools.values().for_each(|pool| pool.settle());
    }

    /// What an operator has set otherwise than the file has it; see [`Pool::set_by_hand`].
    pub fn set_by_hand(&self) -> Vec<String> {
        let moved = self.splits.values().filter(|split| split.percent() != split.configured());
        let moved = moved.map(|split| format!("split.{}: percent", split.name()));
        let mut lines: Vec<_> = self.pools.values().flat_map(|pool| pool.set_by_hand()).chain(moved).collect();
        lines.sort_unstable();
        lines
    }

    /// How the backends and the splits do at this moment, for who looks at the metrics now. Those that are gone leave no trace.
    pub fn tell(&self, metrics: &Metrics) {
        let gauges =
            [&metrics.backend_up, &metrics.backend_draining, &metrics.backend_weight, &metrics.backend_in_flight];
        gauges.iter().for_each(|gauge| gauge.reset());
        metrics.queue_waiting.reset();
        metrics.split_ratio.reset();
        for split in self.splits.values() {
            let ratio = f64::from(split.percent().basis_points()) / f64::from(Percent::ALL.basis_points());
            metrics.split_ratio.with_label_values(&[split.name()]).set(ratio);
        }
        metrics.discovery_up.reset();
        for pool in self.pools.values() {
            for discovery in pool.discoveries() {
                let is_up = discovery.failure.is_none() && !discovery.found.is_empty();
                metrics.discovery_up.with_label_values(&[pool.name(), &discovery.source]).set(is_up.into());
            }
            metrics.queue_waiting.with_label_values(&[pool.name()]).set(pool.waiting() as i64);
            for backend in pool.backends().iter() {
                let values = [
                    i64::from(backend.health() == Health::Up),
                    i64::from(backend.admin_state() == AdminState::Draining),
                    i64::from(backend.weight()),
                    i64::from(backend.in_flight()),
                ];
                for (gauge, value) in gauges.iter().zip(values) {
                    gauge.with_label_values(&[pool.name(), backend.name()]).set(value);
                }
            }
        }
    }
}

#[cfg(test)]
impl Rules {
    /// Of a file with this text; nobody can log in.
    pub(crate) fn of_file(text: &str) -> Self {
        use crate::session::store::memory::MemoryStore;
        use crate::session::{Lifetime, Sessions};

        let config = crate::config::parse(text, std::path::Path::new("a.toml")).unwrap();
        let sessions = Sessions::new(Arc::new(MemoryStore::new(1)), Lifetime::of(&config.session));
        let login = Login::new(&config.login, Arc::default(), sessions, Metrics::new()).unwrap();
        Self::build(&config, login, None).unwrap()
    }
}

/// A field that carries an access token somewhere is nobody else's to send anywhere. `Authorization` is: where it carries
/// none it is the client's own.
fn access_token_fields(config: &Config) -> impl Iterator<Item = &str> {
    let fields = config.routes.iter().filter_map(|route| route.access_token.as_ref());
    fields.map(|name| name.get_ref().as_str()).filter(|name| !name.eq_ignore_ascii_case("authorization"))
}
