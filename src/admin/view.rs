//! How do pools and backends look to an operator? The same in the API, on the status page and on the command line.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backend::discover::Discovery;
use crate::backend::{AdminState, Backend, Health, LastFailure, Pool, balance};
use crate::config::model::{Balance, Protocol};
use crate::metrics::{Attempts, Metrics};
use crate::proxy::route::{Route, Share};
use crate::proxy::rules::Rules;
use crate::session::control::Timestamp;

/// A pool at this moment. The names of the fields are a contract, here and below.
#[derive(Debug, Serialize)]
pub(super) struct PoolView {
    pub(super) pool: String,
    /// `http1`, `http2` or `auto`.
    pub(super) protocol: &'static str,
    pub(super) tls: bool,
    pub(super) balance: &'static str,
    /// Requests that wait for a backend now, and how many may.
    pub(super) waiting: usize,
    pub(super) queue: usize,
    /// The routes whose requests come here.
    pub(super) routes: Vec<String>,
    pub(super) backends: Vec<BackendView>,
    /// What users notice of how things are.
    pub(super) warnings: Vec<String>,
}

/// A backend at this moment.
#[derive(Debug, Deserialize, Serialize)]
pub struct BackendView {
    /// As the file has it, or as discovery has found it.
    pub address: String,
    /// In one word: what matters most.
    pub state: State,
    /// How it does, whether it is drained or not.
    pub health: State,
    /// None also when that time is over, and nobody has asked it since.
    pub ejected_until: Option<Timestamp>,
    pub last_failure: Option<FailureView>,
    pub backup: bool,
    pub drain: Setting<bool>,
    pub weight: Setting<u32>,
    /// What it gets of its weight; less than 100 while it starts slowly.
    pub share_percent: u64,
    /// With open WebSockets.
    pub in_flight: u32,
    /// So many at a time; 0 = any number.
    pub max_requests: u32,
    /// Attempts since the start of the process, and how many of them failed.
    pub requests: u64,
    pub failures: u64,
}

/// As the file has it, and as it is.
#[derive(Debug, Deserialize, Serialize)]
pub struct Setting<T> {
    pub configured: T,
    pub current: T,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct FailureView {
    pub at: Timestamp,
    pub what: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Up,
    /// It is back, and gets requests slowly.
    SlowStart,
    /// It is well, and gets requests when no other can.
    Backup,
    /// Its name has never had an address.
    Unresolved,
    /// Its checks fail.
    Down,
    /// Its requests failed.
    Ejected,
    Draining,
}

impl PoolView {
    /// In the order of their names.
    pub(super) fn all(rules: &Rules, metrics: &Metrics) -> Vec<Self> {
        let attempts = metrics.attempts();
        let mut views: Vec<_> = rules.pools.values().map(|pool| Self::of(pool, rules, &attempts)).collect();
        views.sort_unstable_by(|one, other| one.pool.cmp(&other.pool));
        views
    }

    pub(super) fn of(pool: &Pool, rules: &Rules, attempts: &HashMap<(String, String), Attempts>) -> Self {
        let transport = rules.transports.get(pool.name());
        Self {
            pool: pool.name().to_owned(),
            protocol: match transport.map(|transport| transport.protocol()) {
                Some(Protocol::Http1) | None => "http1",
                Some(Protocol::Http2) => "http2",
                Some(Protocol::Auto) => "auto",
            },
            tls: transport.is_some_and(|transport| transport.is_tls()),
            balance: match pool.balance() {
                Balance::RoundRobin => "round_robin",
                Balance::LeastRequests => "least_requests",
                Balance::PowerOfTwo => "power_of_two",
                Balance::Hash => "hash",
            },
            waiting: pool.waiting(),
            queue: pool.queue_max(),
            routes: rules.routes.to_pool(pool.name()).into_iter().map(|route| route.name.clone()).collect(),
            backends: pool.backends().iter().map(|backend| BackendView::of(backend, pool, attempts)).collect(),
            warnings: warnings(pool, rules).into_iter().chain(unfound(pool)).collect(),
        }
    }
}

impl BackendView {
    pub(super) fn of(backend: &Backend, pool: &Pool, attempts: &HashMap<(String, String), Attempts>) -> Self {
        let (configured, share) = (backend.configured(), backend.warmth(pool));
        let is_drained = backend.admin_state() == AdminState::Draining;
        let (health, rest) = match backend.health() {
            _ if !backend.has_address() => (State::Unresolved, None),
            Health::Up => (State::Up, None),
            Health::Down => (State::Down, None),
            Health::Ejected(rest) => (State::Ejected, Some(rest)),
        };
        let state = match health {
            _ if is_drained => State::Draining,
            State::Up if backend.is_backup() => State::Backup,
            State::Up if share < balance::WHOLE => State::SlowStart,
            other => other,
        };
        let Attempts { all, failed } =
            attempts.get(&(pool.name().to_owned(), backend.name().to_owned())).copied().unwrap_or_default();
        let failure = |LastFailure { at, what }| FailureView { at: timestamp_of(at), what };
        Self {
            address: backend.name().to_owned(),
            state,
            health,
            ejected_until: rest
                .filter(|rest| !rest.is_zero())
                .map(|rest| Timestamp(Timestamp::now().0.saturating_add(millis(rest)))),
            last_failure: backend.last_failure().map(failure),
            backup: backend.is_backup(),
            drain: Setting { configured: configured.drain, current: is_drained },
            weight: Setting { configured: configured.weight, current: backend.weight() },
            share_percent: share * 100 / balance::WHOLE,
            in_flight: backend.in_flight(),
            max_requests: backend.max_requests(),
            requests: all,
            failures: failed,
        }
    }
}

/// In words, for people.
impl BackendView {
    /// With all that somebody has set otherwise than the file has it.
    pub fn state_in_words(&self) -> String {
        let Self { state, health, ejected_until, backup, drain, .. } = self;
        let mut text = state.words().to_owned();
        if drain.current && !drain.configured {
            text.push_str(" by hand");
        }
        if *state == State::Draining && *health != State::Up {
            text = format!("{text}; {}", health.words());
        }
        if let Some(until) = ejected_until {
            text = format!("{text}, until {until}");
        } else if *health == State::Ejected {
            text.push_str("; the next request tries it");
        }
        if *backup && *state != State::Backup {
            text.push_str(" (backup)");
        }
        if drain.configured && !drain.current {
            text.push_str(" (file: drain)");
        }
        text
    }

    pub fn weight_in_words(&self) -> String {
        let Self { weight, share_percent, .. } = self;
        let mut text = weight.current.to_string();
        if weight.current != weight.configured {
            text = format!("{text} (file: {})", weight.configured);
        }
        if *share_percent < 100 {
            text = format!("{text}, of that {share_percent} %");
        }
        text
    }
}

impl State {
    fn words(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::SlowStart => "up, starts slowly",
            Self::Backup => "backup, well",
            Self::Unresolved => "its name has no address",
            Self::Down => "down: its checks fail",
            Self::Ejected => "ejected: its requests failed",
            Self::Draining => "draining",
        }
    }
}

/// What users notice of how the backends of this pool are.
pub(super) fn warnings(pool: &Pool, rules: &Rules) -> Vec<String> {
    let (backends, name) = (pool.backends(), pool.name());
    let mut left = backends
        .iter()
        .filter(|backend| backend.admin_state() == AdminState::Active && backend.has_address())
        .peekable();
    if left.peek().is_none() {
        let who = who_gets_503(name, rules);
        return who.map(|who| format!("no backend of pool {name} takes requests: {who}")).into_iter().collect();
    }
    if left.all(|backend| backend.health() != Health::Up) {
        return vec![format!("no backend of pool {name} is well: those that are not drained are tried in turn")];
    }
    Vec::new()
}

/// The places whose last look for backends brought nothing. A backend that has a name has a row that tells.
fn unfound(pool: &Pool) -> impl Iterator<Item = String> {
    let backends = pool.backends();
    let has_row = move |source: &str| backends.iter().any(|backend| backend.name() == source);
    pool.discoveries().into_iter().filter(move |place| !has_row(&place.source)).filter_map(|place| {
        let Discovery { source, found, failure } = place;
        let cause = failure?;
        let rest = if found.is_empty() { "nothing is known of it yet" } else { "what it was last stays" };
        Some(format!("{source} is not found: {cause}; {rest}"))
    })
}

/// Of a pool that takes no requests; none where its splits send nobody there.
fn who_gets_503(pool: &str, rules: &Rules) -> Option<String> {
    let routes = rules.routes.to_pool(pool);
    if routes.is_empty() {
        return Some("no route goes there".to_owned());
    }
    let on = |route: &Route, split: Option<&str>| match split {
        Some(split) => format!("those of split {split} on {}", route.name),
        None => format!("those of no split on {}", route.name),
    };
    let who = routes.into_iter().flat_map(|route| match route.share_of(pool) {
        Share::All => vec![route.name.clone()],
        Share::Nobody => Vec::new(),
        Share::Of(splits) => splits.into_iter().map(|split| on(route, split)).collect(),
    });
    let who: Vec<_> = who.collect();
    (!who.is_empty()).then(|| format!("{} get 503", who.join(", ")))
}

fn timestamp_of(at: Instant) -> Timestamp {
    Timestamp(Timestamp::now().0.saturating_sub(millis(at.elapsed())))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_names_those_who_get_503_and_nobody_else() {
        const NEXT: Option<&str> = Some("those of split next on /");
        const BOTH: Option<&str> = Some("those of split next on /, those of split last on /");
        const REST: Option<&str> = Some("those of no split on /");
        const ALL: Option<&str> = Some("/");
        for (access, next, last, of_green, of_app) in [
            ("required", "percent = 5", "percent = 0", NEXT, REST),
            ("required", "groups = [\"beta\"]", "percent = 0", NEXT, REST),
            ("required", "percent = 0", "percent = 0", None, ALL),
            ("required", "percent = 5", "percent = 5", BOTH, REST),
            ("required", "percent = 5", "percent = 100", ALL, None),
            ("required", "percent = 100", "percent = 5", ALL, None),
            ("public", "percent = 5", "percent = 5", None, ALL),
            ("public", "percent = 100", "percent = 0", ALL, None),
        ] {
            let rules = Rules::of_file(&format!(
                "[[listener]]\naddress = \"127.0.0.1:9\"\n[[route]]\npath = \"/\"\npool = \"app\"\naccess = \"{access}\"\n\
                 splits = [{{ name = \"next\", pool = \"green\" }}, {{ name = \"last\", pool = \"green\" }}]\n\
                 [split.next]\n{next}\n[split.last]\n{last}\n\
                 [login.backend]\n[[route]]\npath = \"/login\"\npool = \"spare\"\naccess = \"public\"\ndirectives = [\"login\"]\n\
                 [pool.spare]\nbackends = [\"127.0.0.1:3\"]\n\
                 [pool.app]\nbackends = [{{ address = \"127.0.0.1:1\", drain = true }}]\n\
                 [pool.green]\nbackends = [{{ address = \"127.0.0.1:2\", drain = true }}]\n"
            ));
            let case = format!("{access}, next {next}, last {last}");
            for (pool, who) in [("green", of_green), ("app", of_app)] {
                let expected = who.map(|who| format!("no backend of pool {pool} takes requests: {who} get 503"));
                assert_eq!(warnings(&rules.pools[pool], &rules), Vec::from_iter(expected), "{case}");
            }
        }
    }
}
