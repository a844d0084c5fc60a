//! Which server answers? A pool is a named set of interchangeable backends.
//!
//! What is configured is a [`Pool`], made anew by every reload. What has to outlive a reload is in the [`Backend`]s,
//! which are taken over by their names (requests in flight, health, weight), and in `Ongoing` (turn, queue, budget, and whose
//! turn it is to say what the backends do).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prometheus::IntCounter;

use crate::config::model::{self, Balance, HashBy, Place};
use crate::metrics::Metrics;

pub mod balance;
pub mod queue;
pub mod retry;
pub mod ejection;
pub mod health;
pub mod discover;
mod names;

use discover::{Schedule, Source};
use ejection::{Ejection, EjectionRules, Trial};
use health::Checked;
use queue::Queue;
use retry::RetryBudget;

/// A named set of backends that answer alike.
#[derive(Debug)]
pub struct Pool {
    name: String,
    backends: ArcSwap<Vec<Arc<Backend>>>,
    timeouts: Timeouts,
    balance: Balance,
    hash_by: HashBy,
    slow_start: Duration,
    queue_max: usize,
    queue_timeout: Duration,
    retry_percent: u8,
    ejection: EjectionRules,
    check: Option<model::Check>,
    /// As the file has them.
    sources: Vec<Arc<Source>>,
    /// What `backends` was made of.
    placed: Mutex<Vec<model::Backend>>,
    /// Later ones have higher numbers.
    edition: u64,
    ongoing: Arc<Ongoing>,
}

/// What a pool's backends have in common, and what goes on from one configuration to the next.
#[derive(Debug)]
struct Ongoing {
    started: Instant,
    turn: AtomicUsize,
    /// Held by who deals by weights: see [`balance`].
    dealing: Mutex<()>,
    placing: Mutex<Placing>,
    queue: Queue,
    budget: RetryBudget,
}

/// Whose backends are those of today. The backends of a pool that is being made, and may come to nothing, are also those of the
/// one that counts: only this one says what they are to do.
#[derive(Debug, Default)]
struct Placing {
    /// Of the pool that counts.
    edition: u64,
    listed: Vec<Arc<Backend>>,
    /// Not listed any more, but requests may still be there.
    gone: Vec<Arc<Backend>>,
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

/// One server: a name as configured, where it is now, how it does, and what it has to do.
#[derive(Debug)]
pub struct Backend {
    id: u64,
    name: String,
    /// Where DNS gave the address: see [`model::Backend::host`].
    host: Option<String>,
    /// Of its name: what a key is hashed with, for this backend.
    seed: u64,
    /// Empty while the name cannot be resolved.
    addresses: ArcSwap<Vec<SocketAddr>>,
    has_address: AtomicBool,
    address_turn: AtomicUsize,
    /// Where it has a name: when that is looked up.
    schedule: Schedule,
    weight: AtomicU32,
    /// 0 = any number.
    requests_max: AtomicU32,
    is_backup: AtomicBool,
    is_draining: AtomicBool,
    /// Milliseconds of the pool's clock from which on it is warming up; 0 = it is not.
    warm_since: AtomicU64,
    ejection: Ejection,
    checked: Checked,
    last_failure: Mutex<Option<LastFailure>>,
    /// What the file said last: a reload changes only what the file changes, and not what was set since.
    configured: Mutex<model::Backend>,
    /// Of smooth weighted round robin; written with `Ongoing::dealing` held.
    credit: AtomicI64,
    in_flight: OwnLine<AtomicU32>,
    ongoing: Arc<Ongoing>,
    /// Its `cloakroom_backend_requests_total`, looked up once: to find it takes longer than to count.
    pub attempts: OnceLock<IntCounter>,
}

/// Written with every request by every worker, so that what is only read beside it must not share its cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// A request's place at a backend: it counts as in flight for as long as this lives.
#[derive(Debug)]
pub struct Lease {
    backend: Arc<Backend>,
    has_ended: bool,
    /// The request that finds out whether an ejected backend is back.
    trial: Option<Trial>,
    /// The one under way when it began: only that one can its success end.
    ejection: u64,
    /// In the queue.
    pub waited: Duration,
}

/// Why there is no backend for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// None that it has not tried, that has an address and that is not drained.
    Nobody,
    /// All have their `max_requests`, and the queue is full, too.
    Full,
    /// As it did not change for so long.
    TimedOut(Duration),
    /// Nobody wants it any more, after so long.
    Left(Duration),
}

/// Whether a backend gets requests, as far as its own doing goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Up,
    /// Its checks fail.
    Down,
    /// Its requests failed; it is tried again after this long.
    Ejected(Duration),
}

/// Whether the operator lets a backend have new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminState {
    Active,
    Draining,
}

/// What went wrong last at a backend.
#[derive(Clone, Debug)]
pub struct LastFailure {
    pub at: Instant,
    pub what: String,
}

impl Pool {
    /// Backends that `previous` has, too, are taken over as they are; what the file says of them anew counts after
    /// [`Pool::settle`].
    pub fn new(name: &str, config: &model::Pool, previous: Option<&Self>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let ongoing: Arc<Ongoing> = previous.map_or_else(Arc::default, |pool| Arc::clone(&pool.ongoing));
        let known_sources = previous.map(|pool| pool.sources.as_slice());
        let sources: Vec<_> = config.backends.iter().map(|entry| Source::new(entry.get_ref(), known_sources)).collect();
        let endpoints = servers(&sources);
        let edition = NEXT.fetch_add(1, Ordering::Relaxed);
        let backends = {
            let mut placing = ongoing.placing.lock();
            let backends = placing.backends(&endpoints, &[], &ongoing);
            if previous.is_none() {
                *placing = Placing { edition, listed: backends.clone(), gone: Vec::new() };
            }
            backends
        };
        Self {
            name: name.to_owned(),
            backends: ArcSwap::from_pointee(backends),
            sources,
            placed: Mutex::new(endpoints),
            edition,
            timeouts: Timeouts {
                connect: config.connect_timeout.get(),
                read: config.read_timeout.get(),
                write: config.write_timeout.get(),
                idle: config.idle_timeout.get(),
                websocket: config.websocket_timeout.get(),
            },
            balance: config.balance,
            hash_by: config.hash_by.clone(),
            slow_start: config.slow_start.map_or(Duration::ZERO, |time| time.get()),
            queue_max: config.queue as usize,
            queue_timeout: config.queue_timeout.get(),
            retry_percent: config.retry_budget,
            ejection: EjectionRules::of(&config.eject),
            check: config.check.as_ref().map(|check| check.get_ref().clone()),
            ongoing,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As they are now.
    pub fn backends(&self) -> Arc<Vec<Arc<Backend>>> {
        self.backends.load_full()
    }

    /// The backends are those that its sources know now.
    fn place(&self) {
        if self.sources.iter().all(|source| source.entry.place == Place::Address) {
            return;
        }
        let mut placing = self.ongoing.placing.lock();
        if self.edition < placing.edition {
            return; // a reload has come between
        }
        let mut placed = self.placed.lock();
        let endpoints = servers(&self.sources);
        if *placed != endpoints {
            self.replace(&endpoints, &mut placing);
            *placed = endpoints;
        }
    }

    /// This pool counts from now on: applies what the file says anew of backends that were taken over. What it says as
    /// before stays as it was set since then.
    pub fn settle(&self) {
        let mut placing = self.ongoing.placing.lock();
        placing.edition = self.edition;
        let mut placed = self.placed.lock();
        *placed = servers(&self.sources);
        self.replace(&placed, &mut placing);
    }

    /// The backends are these from now on. One that stays keeps its requests, its connections and its health; one that
    /// goes gets no new requests; one that comes begins slowly.
    fn replace(&self, endpoints: &[model::Backend], placing: &mut Placing) {
        let before = self.backends();
        let backends = placing.backends(endpoints, &before, &self.ongoing);
        let counts = placing.edition == self.edition;
        if counts {
            placing.list(&backends);
        }
        self.backends.store(Arc::new(backends));
        if counts {
            self.configure(endpoints);
        }
    }

    /// Of backends that have gone, and have no more requests, nothing is counted any more: else discovery could fill the
    /// memory with their names. Those of which something was set by hand are as many as somebody has set.
    fn forget_gone(&self, metrics: &Metrics) {
        let Placing { listed, gone, .. } = &mut *self.ongoing.placing.lock();
        gone.retain(|backend| {
            // A check under way would count once more. And who restarts a server that an operator has drained, or to which he
            // has given another weight, has said nothing of that: DNS and lists may leave it out meanwhile.
            let is_busy = backend.in_flight() != 0 || backend.checked.is_under_way();
            let is_done = !is_busy && backend.set_by_hand().next().is_none();
            if is_done && !listed.iter().any(|other| other.name == backend.name) {
                metrics.forget_backend(&self.name, &backend.name);
            }
            !is_done
        });
    }

    fn configure(&self, endpoints: &[model::Backend]) {
        for backend in self.backends.load().iter() {
            if let Some(endpoint) = endpoints.iter().find(|endpoint| backend.is_of(endpoint)) {
                backend.configure(endpoint);
            }
            if self.check.is_none() {
                backend.checked.forget();
            }
        }
        self.ongoing.queue.look_again();
    }

    /// What an operator has set otherwise than the file has it, a line each: `pool.app: weight of 10.0.0.7:8080`.
    pub fn set_by_hand(&self) -> Vec<String> {
        let backends = self.backends();
        let keys = backends.iter().flat_map(|backend| backend.set_by_hand().map(|key| (backend.name(), key)));
        keys.map(|(backend, key)| format!("pool.{}: {key} of {backend}", self.name)).collect()
    }

    pub fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    pub fn balance(&self) -> Balance {
        self.balance
    }

    pub fn hash_by(&self) -> &HashBy {
        &self.hash_by
    }

    /// How its backends are checked; none = they are not.
    pub fn check(&self) -> Option<&model::Check> {
        self.check.as_ref()
    }

    /// So many may wait for a backend.
    pub fn queue_max(&self) -> usize {
        self.queue_max
    }

    /// Requests that wait for a backend now.
    pub fn waiting(&self) -> usize {
        self.ongoing.queue.waiting()
    }

    /// Whether one more attempt is within the budget, which it is then taken from.
    pub fn may_retry(&self) -> bool {
        self.ongoing.budget.withdraw(self.retry_percent, self.ongoing.now())
    }
}

/// All servers of these sources; of two at the same address the first.
fn servers(sources: &[Arc<Source>]) -> Vec<model::Backend> {
    let mut addresses = HashSet::new();
    let all = sources.iter().flat_map(|source| source.servers());
    all.filter(|server| addresses.insert(server.address.to_ascii_lowercase())).collect()
}

impl Placing {
    /// The backends of these endpoints: those that are known as they are, who is not `before` among them; others new,
    /// slowly, unless there was nobody before.
    fn backends(
        &self,
        endpoints: &[model::Backend],
        before: &[Arc<Backend>],
        ongoing: &Arc<Ongoing>,
    ) -> Vec<Arc<Backend>> {
        let known = || self.listed.iter().chain(&self.gone).chain(before);
        let slowly = known().next().is_some();
        let backends = endpoints.iter().map(|endpoint| {
            let same = known().find(|backend| backend.is_of(endpoint));
            same.map_or_else(|| Arc::new(Backend::new(endpoint, ongoing, slowly)), Arc::clone)
        });
        backends.collect()
    }

    /// These are there now. Who comes back begins slowly, and has the requests that it had.
    fn list(&mut self, backends: &[Arc<Backend>]) {
        let is_in = |all: &[Arc<Backend>], one: &Arc<Backend>| all.iter().any(|other| Arc::ptr_eq(other, one));
        backends.iter().filter(|backend| is_in(&self.gone, backend)).for_each(|backend| backend.begin_slowly());
        self.gone.append(&mut self.listed);
        self.gone.retain(|backend| !is_in(backends, backend));
        self.listed = backends.to_vec();
    }
}

impl Backend {
    fn new(endpoint: &model::Backend, ongoing: &Arc<Ongoing>, slowly: bool) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let model::Backend { address, host, weight, max_requests, backup, drain } = endpoint;
        let known: Vec<_> = address.parse::<SocketAddr>().into_iter().collect();
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: address.clone(),
            host: host.clone(),
            seed: balance::hash(address.as_bytes()),
            has_address: AtomicBool::new(!known.is_empty()),
            addresses: ArcSwap::from_pointee(known),
            address_turn: AtomicUsize::new(0),
            schedule: Schedule::default(),
            weight: AtomicU32::new(*weight),
            requests_max: AtomicU32::new(*max_requests),
            is_backup: AtomicBool::new(*backup),
            is_draining: AtomicBool::new(*drain),
            warm_since: AtomicU64::new(if slowly { ongoing.now() } else { 0 }),
            ejection: Ejection::default(),
            checked: Checked::default(),
            last_failure: Mutex::new(None),
            configured: Mutex::new(endpoint.clone()),
            credit: AtomicI64::new(0),
            in_flight: OwnLine::default(),
            ongoing: Arc::clone(ongoing),
            attempts: OnceLock::new(),
        }
    }

    fn is_of(&self, endpoint: &model::Backend) -> bool {
        self.name == endpoint.address && self.host == endpoint.host
    }

    /// `host:port` as configured or found; bounded, so it may be a metric label.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whom its certificate must name, where that is not the host in its name.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
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

    /// Its share of the requests, compared with the others'.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// At least 1: a backend that shall have no requests is drained.
    pub fn set_weight(&self, weight: u32) {
        self.weight.store(weight.max(1), Ordering::Relaxed);
    }

    /// Requests that it gets at a time; 0 = any number.
    pub fn max_requests(&self) -> u32 {
        self.requests_max.load(Ordering::Relaxed)
    }

    pub fn set_max_requests(&self, most: u32) {
        self.requests_max.store(most, Ordering::Relaxed);
        self.ongoing.queue.look_again();
    }

    pub fn is_backup(&self) -> bool {
        self.is_backup.load(Ordering::Relaxed)
    }

    /// Requests that it has now, with open WebSockets. Once it is drained and has none, none will come.
    pub fn in_flight(&self) -> u32 {
        // Ordered after the look at who drains: see `try_lease`.
        self.in_flight.0.load(Ordering::SeqCst)
    }

    pub fn admin_state(&self) -> AdminState {
        if self.is_draining.load(Ordering::Relaxed) { AdminState::Draining } else { AdminState::Active }
    }

    /// It gets no new requests; those that it has go on.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::SeqCst);
    }

    /// It gets requests again, slowly at first.
    pub fn undrain(&self) {
        if self.is_draining.swap(false, Ordering::Relaxed) {
            self.begin_slowly();
        }
    }

    /// What the file says of it.
    pub fn configured(&self) -> model::Backend {
        self.configured.lock().clone()
    }

    /// The keys that an operator has set otherwise than the file has them.
    fn set_by_hand(&self) -> impl Iterator<Item = &'static str> {
        let configured = self.configured();
        let keys = [
            ("weight", self.weight() != configured.weight),
            ("drain", (self.admin_state() == AdminState::Draining) != configured.drain),
        ];
        keys.into_iter().filter_map(|(key, is_other)| is_other.then_some(key))
    }

    /// Whether it is known where it is.
    pub fn has_address(&self) -> bool {
        self.has_address.load(Ordering::Relaxed)
    }

    pub fn health(&self) -> Health {
        if self.checked.is_down() {
            return Health::Down;
        }
        let rest = self.ejection.rest(self.ongoing.now()).filter(|_| self.is_ejected());
        rest.map_or(Health::Up, Health::Ejected)
    }

    pub fn last_failure(&self) -> Option<LastFailure> {
        self.last_failure.lock().clone()
    }

    fn note_last_failure(&self, what: String) {
        *self.last_failure.lock() = Some(LastFailure { at: Instant::now(), what });
    }

    /// It is back: requests come slowly at first, and who waits may look again.
    fn begin_slowly(&self) {
        self.warm_since.store(self.ongoing.now(), Ordering::Relaxed);
        self.ongoing.queue.look_again();
    }

    fn configure(&self, endpoint: &model::Backend) {
        let mut configured = self.configured.lock();
        let before = std::mem::replace(&mut *configured, endpoint.clone());
        if before.weight != endpoint.weight {
            self.set_weight(endpoint.weight);
        }
        if before.max_requests != endpoint.max_requests {
            self.set_max_requests(endpoint.max_requests);
        }
        if before.drain != endpoint.drain {
            if endpoint.drain { self.drain() } else { self.undrain() }
        }
        self.is_backup.store(endpoint.backup, Ordering::Relaxed);
    }

    /// Counts one more request, unless it has all that it may have, or is drained.
    fn try_lease(self: &Arc<Self>) -> Option<Lease> {
        let most = self.max_requests();
        let in_flight = &self.in_flight.0;
        if most == 0 {
            in_flight.fetch_add(1, Ordering::SeqCst);
        } else {
            let one_more = |count: u32| (count < most).then_some(count + 1);
            in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).ok()?;
        }
        let ejection = self.ejection.until();
        let lease =
            Lease { backend: Arc::clone(self), has_ended: false, trial: None, ejection, waited: Duration::ZERO };
        // Who drains it writes that down and then counts what is in flight; here it is the other way around. So one of both
        // sees the other, and what was counted as idle stays so.
        (!self.is_draining.load(Ordering::SeqCst)).then_some(lease)
    }
}

impl Deref for Lease {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.backend
    }
}

impl Lease {
    /// It has found out whether its backend is back, if that was what it was for.
    fn end_trial(&mut self) {
        if let Some(trial) = self.trial.take() {
            self.backend.ejection.release(&trial);
        }
    }

    /// Its backend has nothing more to do with it, though who tells of the request still wants to know which it was.
    pub fn end(&mut self) {
        self.end_trial();
        if !std::mem::replace(&mut self.has_ended, true) {
            // Ordered before the look at who waits, as they enter the queue before they look here: one of both sees the
            // other.
            self.in_flight.0.fetch_sub(1, Ordering::SeqCst);
            self.ongoing.queue.one_left();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.end();
    }
}

impl Ongoing {
    /// Milliseconds, never 0, on a clock of its own.
    fn now(&self) -> u64 {
        1 + self.started.elapsed().as_millis() as u64
    }
}

impl Default for Ongoing {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            turn: AtomicUsize::new(0),
            dealing: Mutex::new(()),
            placing: Mutex::default(),
            queue: Queue::default(),
            budget: RetryBudget::default(),
        }
    }
}
