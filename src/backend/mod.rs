//! Which server answers? A pool is a named set of interchangeable backends.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use prometheus::IntCounter;

use crate::config::model;

pub mod balance;
pub mod discover;

/// After a failed connect a backend is passed over for this long, unless no other is left. Long enough that a
/// dead one costs next to nothing, short enough that a restarted one is back at once.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(2);

/// A named set of backends that answer alike.
#[derive(Debug)]
pub struct Pool {
    name: String,
    backends: Vec<Arc<Backend>>,
    timeouts: Timeouts,
    turn: AtomicUsize,
}

/// How long a pool's backends may take; all are pauses, none a total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub read: Duration,
    pub write: Duration,
    pub idle: Duration,
    pub websocket: Duration,
}

/// One server: a name as configured, and where it is now.
#[derive(Debug)]
pub struct Backend {
    name: String,
    /// Empty while the name cannot be resolved.
    addresses: ArcSwap<Vec<SocketAddr>>,
    address_turn: AtomicUsize,
    started: Instant,
    /// Milliseconds after `started` until which it is passed over.
    rests_until: AtomicU64,
    /// Its `cloakroom_backend_requests_total`, looked up once: to find it takes longer than to count.
    pub attempts: OnceLock<IntCounter>,
}

impl Pool {
    pub fn new(name: &str, config: &model::Pool) -> Self {
        Self {
            name: name.to_owned(),
            backends: config.backends.iter().map(|backend| Arc::new(Backend::new(backend.get_ref()))).collect(),
            timeouts: Timeouts {
                connect: config.connect_timeout.get(),
                read: config.read_timeout.get(),
                write: config.write_timeout.get(),
                idle: config.idle_timeout.get(),
                websocket: config.websocket_timeout.get(),
            },
            turn: AtomicUsize::new(0),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    pub fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    /// Whether `other` asks for the same pool, so that a reload can keep this one with its turn and its rests.
    pub fn is_as_configured(&self, other: &Self) -> bool {
        self.timeouts == other.timeouts
            && self.backends.len() == other.backends.len()
            && self.backends.iter().zip(&other.backends).all(|(mine, theirs)| mine.name == theirs.name)
    }
}

impl Backend {
    fn new(name: &str) -> Self {
        let addresses = name.parse::<SocketAddr>().map(|address| vec![address]).unwrap_or_default();
        Self {
            name: name.to_owned(),
            addresses: ArcSwap::from_pointee(addresses),
            address_turn: AtomicUsize::new(0),
            started: Instant::now(),
            rests_until: AtomicU64::new(0),
            attempts: OnceLock::new(),
        }
    }

    /// `host:port` as configured; bounded, so it may be a metric label.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One of its addresses, in turn; none while its name cannot be resolved.
    pub fn address(&self) -> Option<SocketAddr> {
        let addresses = self.addresses.load();
        if addresses.len() < 2 {
            return addresses.first().copied();
        }
        let turn = self.address_turn.fetch_add(1, Ordering::Relaxed);
        addresses.get(turn % addresses.len()).copied()
    }

    /// A connect failed: pass it over for a while.
    pub fn rest(&self) {
        self.rests_until.store(self.millis() + REST_AFTER_FAILURE.as_millis() as u64, Ordering::Relaxed);
    }

    /// It answered: it is back.
    pub fn wake(&self) {
        if self.rests_until.load(Ordering::Relaxed) != 0 {
            self.rests_until.store(0, Ordering::Relaxed);
        }
    }

    pub fn is_resting(&self) -> bool {
        let until = self.rests_until.load(Ordering::Relaxed);
        until != 0 && self.millis() < until
    }

    fn millis(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}
