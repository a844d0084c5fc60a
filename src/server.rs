//! The composition root: a checked configuration in, a running gateway out; reload and shutdown.
//!
//! Each worker is one thread with a runtime of its own, a pingora proxy of its own (and so a pool of backend
//! connections of its own) and a store connection of its own: requests of different workers never wake each other.
//! A thread of its own accepts, and hands each connection to the worker that has the fewest.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use pingora::apps::HttpServerApp as _;
use pingora::proxy::http_proxy;
use pingora::server::configuration::ServerConf;
use pingora::time::fast_timeout::set_fast_timeout_to_tokio_threshold;
use tokio::sync::watch;
use tokio::task::JoinSet;
use toml::Spanned;

use crate::admin::{
    About, Admin, Health, Hosts, PoolsApi, Quiet, ReloadApi, SessionsApi, SplitsApi, StatusPage, Token,
};
use crate::backend::health::Probe;
use crate::backend::{balance, discover, health};
use crate::config::changes::Changes;
use crate::config::error::ConfigError;
use crate::config::model::{self, Config, Scheme};
use crate::events::{Events, Pace};
use crate::listener::tls::Tls;
use crate::listener::{self, Desk, Listener, Queue, Slots, Worker};
use crate::log::{LineWriter, Lines};
use crate::login::Login;
use crate::login::csrf::login_cookie_name;
use crate::login::oidc::{ATTEMPT_NAME_CHARS, Providers, attempt_cookie_family, rounds_cookie_name};
use crate::login::users::Users;
use crate::metrics::Metrics;
use crate::panics::survived;
use crate::proxy::Gateway;
use crate::proxy::access_log::AccessLog;
use crate::proxy::connection::HeadRules;
use crate::proxy::context::{ListenerFacts, Observer};
use crate::proxy::guard::HeadLimits;
use crate::proxy::probe::PingoraProbe;
use crate::proxy::rules::Rules;
use crate::proxy::streams::Streams;
use crate::session::cookie::{ReservedCookies, SessionCookie, fallback_cookie_name};
use crate::session::record::Codec;
use crate::session::seal::KeyRing;
use crate::session::store::memory::{FileError, Loaded, MemoryStore};
use crate::session::store::redis::RedisStore;
use crate::session::store::{Gravity, Risk, SessionStore, StoreOptions};
use crate::session::{Lifetime, Options, Sessions, unix_now};
use crate::spans::{Collector, SpanSender, Spans};

mod reload;

pub use crate::backend::discover::Discovery;
use reload::Reload;
pub use reload::{LogSwitch, ReloadStage, ReloadWitness};

/// Idle connections to backends that one worker keeps.
const BACKEND_CONNECTIONS_KEPT: usize = 512;

/// A store that does not answer yet is asked again after this long.
const INSPECTION_RETRY: Duration = Duration::from_secs(1);

/// Start-up waits this long for backends to be found; what is not known by then is found in the background.
const FIND_FIRST_MAX: Duration = Duration::from_secs(5);

/// For tokens that are being renewed when all requests are answered.
const RENEWALS_WAIT_MAX: Duration = Duration::from_secs(15);

/// Everything that a configuration names, read and checked; nothing bound, nothing connected.
#[derive(Debug)]
pub struct Prepared {
    config: Config,
    rules: Rules,
    sessions: Sessions,
    /// The store of `sessions`, where that has a file to open.
    memory: Option<Arc<MemoryStore>>,
    ring: Option<Arc<KeyRing>>,
    tls: Vec<Option<Arc<Tls>>>,
    metrics: Metrics,
    pace: Pace,
    log_switch: LogSwitch,
    witness: ReloadWitness,
    inherited: Vec<TcpListener>,
}

/// A gateway at work.
#[derive(Debug)]
pub struct Running {
    addresses: Vec<SocketAddr>,
    admin_address: Option<SocketAddr>,
    reload: Arc<Reload>,
    memory: Option<Arc<MemoryStore>>,
    /// For a successor: those of all listeners.
    sockets: Vec<TcpListener>,
    /// What readiness says.
    leaving: watch::Sender<bool>,
    admin_closed: watch::Sender<bool>,
    shutdown: watch::Sender<bool>,
    cut: watch::Sender<bool>,
    acceptor: Option<JoinHandle<()>>,
    workers: Vec<JoinHandle<()>>,
    background: Option<JoinHandle<()>>,
    ended: watch::Sender<bool>,
    access_log: Option<LineWriter>,
    spans: Option<SpanSender>,
}

/// Ends a drain before its time, see [`Running::cutter`].
#[derive(Clone, Debug)]
pub struct Cutter(watch::Sender<bool>);

impl Cutter {
    /// Cuts what is under way.
    pub fn cut(&self) {
        let _ = self.0.send(true);
    }
}

/// Why a gateway did not start.
#[derive(Debug)]
pub struct StartError {
    what: String,
    cause: io::Error,
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Reads and checks all that `config` names: what `cloakroom check` does, and every start and reload first.
pub fn prepare(config: Config) -> Result<Prepared, ConfigError> {
    let ring = read_ring(&config)?;
    let (store, memory) = open_store(&config, ring.clone())?;
    Ok(Prepared { memory, ..prepare_all(config, store, ring)? })
}

/// As [`prepare`], on a store that is already there.
pub fn prepare_with_store(config: Config, store: Arc<dyn SessionStore>) -> Result<Prepared, ConfigError> {
    let ring = read_ring(&config)?;
    prepare_all(config, store, ring)
}

fn prepare_all(
    config: Config,
    store: Arc<dyn SessionStore>,
    ring: Option<Arc<KeyRing>>,
) -> Result<Prepared, ConfigError> {
    let options = Options::of(&config.session, &config.store, ring.clone());
    let sessions = Sessions::new(store, Lifetime::of(&config.session)).with(options);
    let metrics = Metrics::new();
    let tls = config.listeners.iter().map(Tls::of).collect::<Result<_, _>>()?;
    let login = build_login(&config, &sessions, &metrics)?;
    let rules = Rules::build(&config, login, None)?;
    Ok(Prepared {
        config,
        rules,
        sessions,
        memory: None,
        ring,
        tls,
        metrics,
        pace: Pace::default(),
        log_switch: LogSwitch::default(),
        witness: ReloadWitness::default(),
        inherited: Vec::new(),
    })
}

impl Prepared {
    /// What it will count.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What is found, at this moment, where its pools look for backends: the name of the pool, and each place.
    pub fn discover(&self) -> Vec<(String, Discovery)> {
        let pools: Vec<_> = self.rules.pools.values().cloned().collect();
        discover::find_unknown(&pools, &self.rules.dns, FIND_FIRST_MAX);
        let mut all: Vec<_> = pools
            .iter()
            .flat_map(|pool| pool.discoveries().into_iter().map(|discovery| (pool.name().to_owned(), discovery)))
            .collect();
        all.sort_by(|one, other| (&one.0, &one.1.source).cmp(&(&other.0, &other.1.source)));
        all
    }

    /// Who else may say who somebody is.
    pub fn providers(&self) -> &Providers {
        self.rules.login.providers()
    }

    /// A listener takes the one of these that has its address; the start fails when one is left over.
    pub fn with_sockets(mut self, inherited: Vec<TcpListener>) -> Self {
        self.inherited = inherited;
        self
    }

    /// Ended sessions are found and told of at another pace than the usual one.
    pub fn with_pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    /// A reload sets the level of the log by this.
    pub fn with_log_switch(mut self, log_switch: LogSwitch) -> Self {
        self.log_switch = log_switch;
        self
    }

    /// Every reload is told to it.
    pub fn with_reload_witness(mut self, witness: ReloadWitness) -> Self {
        self.witness = witness;
        self
    }
}

/// The sessions of this configuration, for somebody who serves nobody. Connects to nothing yet.
pub fn sessions_of(config: &Config) -> Result<Sessions, ConfigError> {
    let (store, _) = open_store(config, read_ring(config)?)?;
    Ok(Sessions::new(store, Lifetime::of(&config.session)))
}

fn read_ring(config: &Config) -> Result<Option<Arc<KeyRing>>, ConfigError> {
    let file = config.session.keys_file.as_ref();
    file.map(|file| KeyRing::load(file.get_ref()).map(Arc::new)).transpose()
}

/// Connects to nothing, and leaves the file of a memory store to [`start`], which takes it for itself.
#[expect(clippy::type_complexity, reason = "one store, seen from two sides")]
fn open_store(
    config: &Config,
    ring: Option<Arc<KeyRing>>,
) -> Result<(Arc<dyn SessionStore>, Option<Arc<MemoryStore>>), ConfigError> {
    let events = config.events.audit || config.events.webhook.is_some();
    let codec = Codec::new(ring, *config.session.seal_records.get_ref());
    let options = StoreOptions { codec, events, bridged: Options::of(&config.session, &config.store, None).bridged() };
    let refused = |message: &str, hint: &str| ConfigError::of_file(&config.file, message, hint);
    if let Some(redis) = &config.store.redis {
        return match RedisStore::new(redis.get_ref(), options) {
            Ok(store) => Ok((Arc::new(store), None)),
            Err(error) => Err(refused(&error.to_string(), "see [store.redis]")),
        };
    }
    let memory = config.store.memory.as_ref().map(|memory| memory.get_ref().clone()).unwrap_or_default();
    if let Some(file) = &memory.file {
        let file = file.get_ref();
        if !file.parent().is_some_and(Path::is_dir) {
            let message = format!("store.memory.file {}: its folder is not there", file.display());
            return Err(refused(&message, "make the folder, writable for the user that Cloakroom runs as"));
        }
        if file.exists() && !file.is_file() {
            let message = format!("store.memory.file {} is not a file", file.display());
            return Err(refused(&message, "name a file of its own, which is created when it is not there"));
        }
    }
    let store = Arc::new(MemoryStore::new(memory.sessions_max).with_options(options));
    Ok((Arc::clone(&store) as _, memory.file.is_some().then_some(store)))
}

/// Takes up the sessions that the last process left.
fn open_file(memory: &MemoryStore, config: &Config) -> Result<(), StartError> {
    let file = config.store.memory.as_ref().and_then(|memory| memory.get_ref().file.as_ref());
    let Some(file) = file.map(Spanned::get_ref) else { return Ok(()) };
    let cannot_open = |error: FileError| {
        let what = error.to_string();
        let cause = match error {
            FileError::Unreachable(_, cause) => cause,
            FileError::Taken(_) => io::ErrorKind::WouldBlock.into(),
            FileError::Damaged(..) | FileError::Newer(_) => io::ErrorKind::InvalidData.into(),
        };
        StartError { what, cause }
    };
    let Loaded { sessions, expired, unreadable } = memory.open_file(file).map_err(cannot_open)?;
    tracing::info!(file = %file.display(), sessions, expired, "sessions taken up");
    if unreadable != 0 {
        tracing::warn!(
            file = %file.display(),
            unreadable,
            "sessions cannot be read: damaged, of a newer version, or sealed with a key that is gone"
        );
    }
    Ok(())
}

fn build_login(config: &Config, sessions: &Sessions, metrics: &Metrics) -> Result<Login, ConfigError> {
    let users = match &config.login.password {
        Some(password) => Users::load(password.users_file.get_ref())?,
        None => Users::default(),
    };
    Login::new(&config.login, Arc::new(users), sessions.clone(), metrics.clone())
}

/// Binds every socket, then starts the workers. When this fails nothing runs and nothing stays bound.
pub fn start(prepared: Prepared) -> Result<Running, StartError> {
    // Redis over TLS and our listeners use one provider; the first to install it wins, and all install the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Of a second and more. Pingora's own timers suit threads that share a runtime: a slot for every 10 ms stays in a tree until
    // its time has come, whether somebody waits for it or not. Those of a runtime that has one thread go with whoever waits.
    set_fast_timeout_to_tokio_threshold(Some(Duration::ZERO));
    let Prepared { config, rules, sessions, memory, ring, tls, metrics, pace, log_switch, witness, mut inherited } =
        prepared;
    let bound = config.listeners.iter().zip(&tls).map(|(listener, tls)| bind(listener, tls, &config, &mut inherited));
    let listeners = bound.collect::<Result<Vec<_>, _>>()?;
    let admin = config.admin.enabled.then(|| bind_admin(&config, &mut inherited)).transpose()?;
    nobody_is_left(&inherited)?;
    let sockets = listeners.iter().chain(&admin).map(Listener::socket).collect::<Result<_, _>>();
    let sockets = sockets.map_err(|cause| StartError { what: "cannot keep the sockets".into(), cause })?;
    if let Some(memory) = &memory {
        open_file(memory, &config)?;
    }
    tls.iter().flatten().for_each(|tls| tls.report(&metrics, now_seconds()));
    let (access_log, log_writer) = open_access_log(&config.log, &metrics)?;
    let (spans, span_sender) = open_spans(&config.tracing, &metrics)?;
    let observer = Arc::new(Observer { metrics: metrics.clone(), access_log, spans });

    let events = Events::new(&config.events, Arc::clone(sessions.store()), metrics.clone(), pace);

    let (shutdown, shutting_down) = watch::channel(false);
    let (ended, _) = watch::channel(false);
    let leaving = watch::Sender::new(false);
    let admin_closed = watch::Sender::new(false);
    let cut = watch::Sender::new(false);
    let pools: Vec<_> = rules.pools.values().cloned().collect();
    discover::find_unknown(&pools, &rules.dns, FIND_FIRST_MAX);
    let rules = Arc::new(ArcSwap::from_pointee(rules));
    let gateway = Gateway {
        rules: Arc::clone(&rules),
        sessions: sessions.clone(),
        cookies: Arc::new(reserved_cookies(&config)),
        silent_header: silent_header(&config),
        trusted_proxies: config.server.trusted_proxies.iter().map(|network| network.0).collect(),
        body_timeout: config.limits.body_timeout.get(),
        body_rate_min: config.limits.body_rate_min.0,
        write_timeout: config.limits.write_timeout.get(),
        observer,
        renewals: watch::Sender::new(()),
    };
    let streams = Arc::new(Streams::new(metrics.clone()));
    let head_rules = Arc::new(HeadRules {
        bytes_max: config.limits.head_bytes.0 as usize,
        limits: HeadLimits {
            headers_max: config.limits.headers_max,
            target_bytes: config.limits.target_bytes.0 as usize,
        },
        streams_max: config.limits.streams_max,
        timeout: config.limits.head_timeout.get(),
        keepalive: config.limits.keepalive_timeout.get(),
        write_timeout: config.limits.write_timeout.get(),
    });
    let slots = Arc::new(Slots::new(connections_possible(config.server.connections_max)));
    let addresses: Vec<_> = listeners.iter().map(Listener::address).collect();
    let threads = match config.server.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };

    let drain_timeout = config.server.drain_timeout.get();
    let admin_address = admin.as_ref().map(Listener::address);
    let config = Arc::new(config);
    let reload = Arc::new(Reload {
        rules: Arc::clone(&rules),
        tls,
        sessions: sessions.clone(),
        ring,
        metrics: metrics.clone(),
        log_switch,
        witness,
        admin_hosts: Arc::new(ArcSwap::from_pointee(Hosts::of(&config.admin))),
        started: Arc::clone(&config),
        applied: Mutex::new(config),
        last: watch::Sender::new(None),
    });
    let token = reload.started.admin.token.as_ref().map(|token| Token::new(token.get_ref().expose()));
    let sessions_api = token.clone().map(|token| SessionsApi::new(sessions.clone(), token));
    let splits_api = token.clone().map(|token| SplitsApi::new(Arc::clone(&rules), token));
    let pools_api = token.clone().map(|token| PoolsApi::new(Arc::clone(&rules), metrics.clone(), token));
    let status = token.clone().map(|token| StatusPage {
        token,
        about: about(&reload.started, &addresses, admin_address),
        rules: Arc::clone(&rules),
        sessions: sessions.clone(),
        metrics: metrics.clone(),
        last_reload: reload.last.subscribe(),
    });
    let reload_api = token.map(|token| {
        let (file, reload) = (reload.started.file.clone(), Arc::clone(&reload));
        ReloadApi::new(token, file, move || reload.reload())
    });
    let mut running = Running {
        addresses,
        admin_address,
        memory,
        sockets,
        leaving,
        admin_closed,
        shutdown,
        cut,
        acceptor: None,
        workers: Vec::new(),
        background: None,
        ended,
        access_log: log_writer,
        spans: span_sender,
        reload,
    };
    let mut desks = Vec::new();
    for index in 0..threads {
        let (desk, queue) = listener::desk();
        desks.push(desk);
        let plan = WorkerPlan {
            queue,
            // A count of its own of who has the observer: workers would wait for each other's with every request.
            gateway: Gateway {
                observer: Arc::new(Observer::clone(&gateway.observer)),
                renewals: watch::Sender::new(()),
                ..gateway.clone()
            },
            head_rules: Arc::clone(&head_rules),
            streams: Arc::clone(&streams),
            shutdown: shutting_down.clone(),
            cut: running.cut.subscribe(),
            drain_timeout,
        };
        running.workers.push(thread(format!("worker-{index}"), move || plan.run())?);
    }
    let accept_shutdown = shutting_down.clone();
    let accept = move || on_own_runtime(accept(listeners, desks, slots, accept_shutdown));
    running.acceptor = Some(thread("accept".to_owned(), accept)?);
    let background = Background {
        gateway,
        streams,
        admin,
        admin_hosts: Arc::clone(&running.reload.admin_hosts),
        sessions_api,
        splits_api,
        pools_api,
        status,
        reload_api,
        events,
        metrics,
        leaving: running.leaving.subscribe(),
        admin_closed: running.admin_closed.subscribe(),
        ended: running.ended.subscribe(),
    };
    running.background = Some(thread("background".to_owned(), move || background.run())?);
    Ok(running)
}

impl Running {
    /// In the order of the configuration; with the port that the system chose for port 0.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Reads the file again and replaces routes, pools, identity, login, users, session keys, certificates and the level of
    /// the log, all or nothing. Gives what has changed, and what of it needs a restart; logs it, too.
    pub fn reload(&self) -> Result<Changes, ConfigError> {
        self.reload.reload()
    }

    /// Readiness says no from now on, and gives how long that should be so before [`Running::stop`]; all else goes on.
    pub fn turn_unready(&self) -> Option<Duration> {
        self.leaving.send_replace(true);
        self.reload.started.server.lame_duck.map(|duration| duration.get())
    }

    /// Whether its sessions are in its own memory, so that no other process may serve beside it.
    pub fn is_alone(&self) -> bool {
        self.reload.started.store.redis.is_none()
    }

    /// The sockets of all listeners, for a successor.
    pub fn sockets(&self) -> io::Result<Vec<TcpListener>> {
        self.sockets.iter().map(TcpListener::try_clone).collect()
    }

    /// A successor serves: it tells health and metrics from now on. [`Running::stop`] is next.
    pub fn give_way(&self) {
        self.admin_closed.send_replace(true);
    }

    /// For somebody who loses patience with [`Running::stop`].
    pub fn cutter(&self) -> Cutter {
        Cutter(self.cut.clone())
    }

    /// Stops accepting, lets what has begun finish (up to `server.drain_timeout`), and returns as soon as it has.
    pub fn stop(mut self) {
        self.leaving.send_replace(true);
        // The last that holds a socket open closes it.
        self.sockets.clear();
        let _ = self.shutdown.send(true);
        for worker in self.acceptor.take().into_iter().chain(self.workers.drain(..)) {
            let _ = worker.join();
        }
        self.admin_closed.send_replace(true);
        let _ = self.ended.send(true);
        if let Some(background) = self.background.take() {
            let _ = background.join();
        }
        if let Some(memory) = &self.memory {
            memory.close();
        }
        drop(self.access_log.take());
        drop(self.spans.take());
    }
}

/// Accepts on all sockets until the shutdown. The workers' queues end with this.
async fn accept(listeners: Vec<Listener>, desks: Vec<Desk>, slots: Arc<Slots>, shutdown: watch::Receiver<bool>) {
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn(listener.run(desks.clone(), Arc::clone(&slots), shutdown.clone()));
    }
    while accepting.join_next().await.is_some() {}
}

/// One worker thread's share.
struct WorkerPlan {
    queue: Queue,
    gateway: Gateway,
    head_rules: Arc<HeadRules>,
    streams: Arc<Streams>,
    shutdown: watch::Receiver<bool>,
    cut: watch::Receiver<bool>,
    drain_timeout: Duration,
}

impl WorkerPlan {
    fn run(self) {
        let Self { queue, gateway, head_rules, streams, mut shutdown, mut cut, drain_timeout } = self;
        on_own_runtime(async move {
            let conf = Arc::new(ServerConf {
                threads: 1,
                // Each attempt is another backend, counted in `Tried`; this only has to be no lower.
                max_retries: balance::ATTEMPTS_MAX + 1,
                upstream_keepalive_pool_size: BACKEND_CONNECTIONS_KEPT,
                ..ServerConf::default()
            });
            // The store connection is there before the first user needs it.
            let store = Arc::clone(gateway.sessions.store());
            tokio::spawn(async move { store.ping().await });
            let renewals = gateway.renewals.clone();
            let worker = Worker {
                refusals: Arc::new(gateway.clone()),
                metrics: gateway.observer.metrics.clone(),
                write_timeout: gateway.write_timeout,
                app: Arc::new(http_proxy(&conf, gateway)),
                head_rules,
                streams,
                shutdown: shutdown.clone(),
            };
            let app = Arc::clone(&worker.app);
            let mut serving = pin!(worker.run(queue));
            let is_served = tokio::select! {
                () = &mut serving => true,
                _ = shutdown.wait_for(|shutting_down| *shutting_down) => false,
            };
            if !is_served {
                app.http_cleanup().await;
                tokio::select! {
                    () = serving => {}
                    () = tokio::time::sleep(drain_timeout) => {
                        tracing::warn!("connections cut: they took longer than server.drain_timeout");
                    }
                    _ = cut.wait_for(|cut| *cut) => tracing::warn!("connections cut: a second signal came"),
                }
            }
            if tokio::time::timeout(RENEWALS_WAIT_MAX, renewals.closed()).await.is_err() {
                tracing::warn!("tokens of sessions were being renewed, and may be lost: a provider did not answer");
            }
        });
    }
}

/// Says what is risky about the place where sessions are kept, when it first answers.
async fn inspect(store: Arc<dyn SessionStore>) {
    while store.ping().await.is_err() {
        tokio::time::sleep(INSPECTION_RETRY).await;
    }
    for Risk { gravity, what, remedy } in store.inspect().await {
        match gravity {
            Gravity::Unusable => tracing::error!(what, remedy, "the session store is of no use"),
            Gravity::Risk => tracing::warn!(what, remedy, "a risk for sessions"),
            Gravity::Hint => tracing::info!(what, remedy, "about the session store"),
        }
    }
}

struct Background {
    gateway: Gateway,
    streams: Arc<Streams>,
    admin: Option<Listener>,
    admin_hosts: Arc<ArcSwap<Hosts>>,
    sessions_api: Option<SessionsApi>,
    splits_api: Option<SplitsApi>,
    pools_api: Option<PoolsApi>,
    status: Option<StatusPage>,
    reload_api: Option<ReloadApi>,
    events: Events,
    metrics: Metrics,
    leaving: watch::Receiver<bool>,
    admin_closed: watch::Receiver<bool>,
    ended: watch::Receiver<bool>,
}

impl Background {
    fn run(self) {
        let Self {
            gateway,
            streams,
            admin,
            admin_hosts,
            sessions_api,
            splits_api,
            pools_api,
            status,
            reload_api,
            events,
            metrics,
            leaving,
            admin_closed,
            mut ended,
        } = self;
        on_own_runtime(async move {
            let (sessions, rules) = (&gateway.sessions, &gateway.rules);
            let health = Arc::new(Health::default());
            if let Some(listener) = admin {
                let (desk, queue) = listener::desk();
                let worker = Worker {
                    app: Arc::new(Admin {
                        hosts: admin_hosts,
                        metrics: metrics.clone(),
                        health: Arc::clone(&health),
                        sessions: sessions_api,
                        splits: splits_api,
                        pools: pools_api,
                        status,
                        rules: Arc::clone(rules),
                        reload: reload_api,
                        leaving,
                    }),
                    refusals: Arc::new(Quiet),
                    head_rules: Arc::new(ADMIN_HEADS),
                    write_timeout: ADMIN_WRITE_TIMEOUT,
                    // Its own, which nobody reads: these connections are not the application's.
                    metrics: Metrics::new(),
                    streams: Arc::new(Streams::new(Metrics::new())),
                    // Health and metrics are told until the very end, unless a successor tells them: then this listener closes.
                    shutdown: admin_closed.clone(),
                };
                let slots = Arc::new(Slots::new(ADMIN_CONNECTIONS_MAX).giving_way());
                tokio::spawn(listener.run(vec![desk], slots, admin_closed));
                tokio::spawn(worker.run(queue));
            }
            tokio::spawn(inspect(Arc::clone(sessions.store())));
            let watched = async || health.watch(&**sessions.store(), &metrics).await;
            let pools = || rules.load().pools.values().cloned().collect::<Vec<_>>();
            let probe: Arc<dyn Probe> = Arc::new(PingoraProbe::new(Arc::clone(rules)));
            let checked = async || health::watch(pools, Arc::clone(&probe), metrics.clone()).await;
            let discovered = async || discover::watch(pools, || rules.load().dns.clone(), metrics.clone()).await;
            let streamed = async || streams.watch(sessions, |record, place| gateway.admits(record, place)).await;
            tokio::select! {
                () = lasting("health", watched) => {}
                () = lasting("discovery", discovered) => {}
                () = lasting("health checks", checked) => {}
                () = lasting("events", || events.run()) => {}
                () = lasting("streams", streamed) => {}
                _ = ended.wait_for(|ended| *ended) => {}
            }
        });
    }
}

/// Begins `work` again when it has panicked: nobody else does it.
async fn lasting(what: &'static str, work: impl AsyncFn()) {
    while survived(work()).await.is_none() {
        tracing::error!(what, "a mistake of ours ended this; it begins again, see standard error");
        tokio::time::sleep(AFTER_PANIC).await;
    }
}

/// What panics each time it begins must not fill the log.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// Probes and scrapes are a handful, and who is idle gives way.
const ADMIN_CONNECTIONS_MAX: usize = 64;
const ADMIN_WRITE_TIMEOUT: Duration = Duration::from_secs(10);

const ADMIN_HEADS: HeadRules = HeadRules {
    bytes_max: 16 << 10,
    limits: HeadLimits { headers_max: 64, target_bytes: 2 << 10 },
    streams_max: 0,
    timeout: Duration::from_secs(5),
    keepalive: Duration::from_secs(60),
    write_timeout: ADMIN_WRITE_TIMEOUT,
};

/// A client connection needs a descriptor, and often one more for its backend. Out of descriptors, connections that are
/// served already fail; so we take fewer in the first place.
fn connections_possible(wanted: usize) -> usize {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(DESCRIPTORS_USUAL);
    let possible = usize::try_from(descriptors.saturating_sub(DESCRIPTORS_RESERVED) / 2).unwrap_or(usize::MAX).max(1);
    if possible < wanted {
        tracing::warn!(
            descriptors,
            possible,
            wanted,
            "server.connections_max is lowered: raise the limit of open files"
        );
    }
    possible.min(wanted)
}

/// The limit where nobody has set one.
const DESCRIPTORS_USUAL: u64 = 1024;

/// For listeners, store, logs and runtimes, and for the operator: whoever is connected there takes none of the others'.
const DESCRIPTORS_RESERVED: u64 = 40 + ADMIN_CONNECTIONS_MAX as u64;

fn bind(
    listener: &model::Listener,
    tls: &Option<Arc<Tls>>,
    config: &Config,
    inherited: &mut Vec<TcpListener>,
) -> Result<Listener, StartError> {
    let is_https = tls.is_some() || listener.scheme.as_ref().is_some_and(|scheme| *scheme.get_ref() == Scheme::Https);
    let facts = ListenerFacts {
        scheme: if is_https { "https" } else { "http" },
        cookie: session_cookie(config, is_https),
        hsts: listener.hsts.as_ref().and_then(|hsts| hsts_value(hsts.get_ref())),
        redirect_to_port: listener.redirect_to_port.as_ref().map(|port| *port.get_ref()),
    };
    let address = *listener.address.get_ref();
    let bound = socket(address, inherited).and_then(|socket| Listener::new(socket, tls.clone(), facts));
    let bound = bound.map_err(|cause| cannot_listen(address, cause))?;
    Ok(match &listener.proxy_protocol {
        Some(balancers) => bound.behind(balancers.get_ref().iter().map(|network| network.0)),
        None => bound,
    })
}

fn bind_admin(config: &Config, inherited: &mut Vec<TcpListener>) -> Result<Listener, StartError> {
    let address = *config.admin.address.get_ref();
    let cookie = session_cookie(config, false);
    let facts = ListenerFacts { scheme: "http", cookie, hsts: None, redirect_to_port: None };
    let bound = socket(address, inherited).and_then(|socket| Listener::new(socket, None, facts));
    bound.map_err(|cause| cannot_listen(address, cause))
}

/// The inherited one with this address, or a new one.
fn socket(address: SocketAddr, inherited: &mut Vec<TcpListener>) -> io::Result<TcpListener> {
    let same = inherited.iter().position(|socket| socket.local_addr().is_ok_and(|bound| bound == address));
    same.map_or_else(|| listener::bind(address), |index| Ok(inherited.swap_remove(index)))
}

/// A socket that nobody accepts from would let its clients wait for nothing.
fn nobody_is_left(inherited: &[TcpListener]) -> Result<(), StartError> {
    if inherited.is_empty() {
        return Ok(());
    }
    let addresses = inherited.iter().filter_map(|socket| socket.local_addr().ok()).map(|address| address.to_string());
    let addresses = addresses.collect::<Vec<_>>().join(", ");
    let what = format!("inherited sockets that no [[listener]] and no [admin] has as its `address`: {addresses}");
    Err(StartError { what, cause: io::ErrorKind::InvalidInput.into() })
}

/// RFC 6797, section 6.1.
fn hsts_value(hsts: &model::Hsts) -> Option<HeaderValue> {
    let subdomains = if hsts.subdomains { "; includeSubDomains" } else { "" };
    let preload = if hsts.preload { "; preload" } else { "" };
    HeaderValue::try_from(format!("max-age={}{subdomains}{preload}", hsts.max_age.get().as_secs())).ok()
}

/// What the status page says of this instance. `addresses` are those of the listeners, in their order.
fn about(config: &Config, addresses: &[SocketAddr], admin: Option<SocketAddr>) -> About {
    let spoken = |listener: &model::Listener| match (listener.has_certificate(), &listener.scheme) {
        (true, _) => "HTTPS",
        (false, Some(scheme)) if *scheme.get_ref() == Scheme::Https => "HTTP, behind what terminates TLS",
        (false, _) => "HTTP",
    };
    let listeners = addresses.iter().zip(&config.listeners).map(|(address, listener)| (*address, spoken(listener)));
    About {
        started: std::time::Instant::now(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        listeners: listeners.chain(admin.map(|address| (address, "admin"))).collect(),
        is_store: config.store.redis.is_none(),
        grace: config.store.grace.as_ref().map(|grace| grace.get_ref().get()),
    }
}

fn now_seconds() -> i64 {
    (unix_now() / 1000) as i64
}

fn cannot_listen(address: SocketAddr, cause: io::Error) -> StartError {
    let hint = match cause.kind() {
        io::ErrorKind::AddrInUse => ": another process has this port; end it, or choose another `address`",
        io::ErrorKind::PermissionDenied => {
            ": ports below 1024 need CAP_NET_BIND_SERVICE; choose a higher one, or grant it"
        }
        io::ErrorKind::AddrNotAvailable => ": no interface of this machine has this address",
        _ => "",
    };
    StartError { what: format!("cannot listen on {address}{hint}"), cause }
}

fn session_cookie(config: &Config, secure: bool) -> SessionCookie {
    let same_site = match config.session.same_site {
        model::SameSite::Strict => ::cookie::SameSite::Strict,
        model::SameSite::Lax => ::cookie::SameSite::Lax,
    };
    SessionCookie::new(config.session.cookie.get_ref(), secure, same_site)
}

/// The session cookie and those beside it, which no backend may see or set.
fn reserved_cookies(config: &Config) -> ReservedCookies {
    let session = config.session.cookie.get_ref();
    let names = [login_cookie_name(session), fallback_cookie_name(session), rounds_cookie_name(session)];
    let names = names.iter().map(String::as_str).chain([session.as_str()]);
    ReservedCookies::new(names).and_family(&attempt_cookie_family(session), ATTEMPT_NAME_CHARS)
}

fn silent_header(config: &Config) -> Option<HeaderName> {
    config.session.silent_header.as_ref().and_then(|name| name.get_ref().parse().ok())
}

fn open_access_log(config: &model::Log, metrics: &Metrics) -> Result<(AccessLog, Option<LineWriter>), StartError> {
    if !config.access {
        return Ok((AccessLog::silent(), None));
    }
    let (lines, writer) = Lines::to("access-log", io::stdout())
        .map_err(|cause| StartError { what: "cannot start the access log".into(), cause })?;
    writer.count_dropped(metrics.log_lines_dropped.with_label_values(&["access"]));
    Ok((AccessLog::to(lines, config.format), Some(writer)))
}

fn open_spans(config: &model::Tracing, metrics: &Metrics) -> Result<(Option<Spans>, Option<SpanSender>), StartError> {
    let Some(endpoint) = &config.endpoint else { return Ok((None, None)) };
    let mut headers = HeaderMap::new();
    for (name, value) in &config.headers {
        let unfit = |_| StartError {
            what: format!("cannot send header {} to the collector", name.get_ref()),
            cause: io::ErrorKind::InvalidInput.into(),
        };
        let mut value = HeaderValue::from_str(value.get_ref().expose()).map_err(http::Error::from).map_err(unfit)?;
        // Nor is it printed by who sends it.
        value.set_sensitive(true);
        headers.insert(HeaderName::try_from(name.get_ref()).map_err(http::Error::from).map_err(unfit)?, value);
    }
    let collector = Collector { endpoint: endpoint.get_ref(), service: &config.service, headers };
    let (spans, sender) = Spans::to(&collector, *config.ratio.get_ref(), metrics)
        .map_err(|cause| StartError { what: "cannot start sending spans".into(), cause })?;
    Ok((Some(spans), Some(sender)))
}

fn thread(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    let what = format!("cannot start thread {name}");
    std::thread::Builder::new().name(name).spawn(run).map_err(|cause| StartError { what, cause })
}

fn on_own_runtime(work: impl Future<Output = ()>) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            runtime.block_on(work);
            // A name being resolved or a password being hashed must not hold up the end.
            runtime.shutdown_background();
        }
        Err(error) => tracing::error!(%error, "cannot start a runtime"),
    }
}
