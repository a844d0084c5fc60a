//! What do users see when a gateway itself has a bad night? Killed, out of descriptors, out of disk, out of time; and too
//! many clients who mean no good. Which test shows which row is in `docs/bad-nights.md`.
//!
//! With `CLOAKROOM_FULL_SIZE=1` in the environment, crowds are as large as the rows of that page say. (invariant 7)

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cloakroom::session::id::SessionKey;
use cloakroom::session::record::Record;
use cloakroom::session::store::memory::MemoryStore;
use cloakroom::session::store::{
    Activity, Change, Count, Creation, EndEvent, Ending, Found, Listed, NewSession, SessionStore, StoreError, Terms,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection, get};
use crate::harness::clock::Clock;
use crate::harness::gateway::{Gateway, Given, Store};
use crate::harness::http2::Http2Client;
use crate::harness::redis::RedisServer;
use crate::harness::{Over, tell, tls, wait_until};
use crate::memory_file::log_in;
use crate::operation::{CLOAKROOM, Daemon, admin_of, deployment, is_up};
use crate::store_contract::id_of;

/// How many: so many for every change, and as many as the row says for who has the time.
fn crowd(daily: usize, full: usize) -> usize {
    // Both sides of every connection are on this machine.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    if std::env::var_os("CLOAKROOM_FULL_SIZE").is_some() { full } else { daily }
}

/// A gateway that is a process of its own, on loopback.
struct Instance {
    daemon: Daemon,
    file: PathBuf,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Instance {
    fn start(backend: &Backend, rest: &str) -> Self {
        Self::start_by(&mut Command::new(CLOAKROOM), backend, rest)
    }

    /// `command` runs the binary with the arguments that it is given.
    fn start_by(command: &mut Command, backend: &Backend, rest: &str) -> Self {
        let (folder, file, address) = deployment(&[backend], rest);
        tls::write_files(folder.path());
        let daemon = Daemon::of(command.args(["run", "--config", file.to_str().unwrap()]));
        wait_until("the gateway listens", || is_up(address));
        Self { daemon, file, address, _folder: folder }
    }

    fn client(&self) -> Client {
        Client::of(self.address)
    }

    fn metric(&self, name: &str) -> f64 {
        metric(&self.file, name)
    }

    /// Besides `kept` ones, none is left.
    fn wait_for_connections(&self, kept: f64) {
        wait_until("the connections are closed", || self.metric("cloakroom_connections") <= kept);
    }

    /// A fact about its sockets is one a moment later: what has ended is taken down in the background.
    fn wait_for_open_files(&self, most: usize) {
        wait_until(&format!("there are at most {most} descriptors"), || self.daemon.open_files() <= most);
    }
}

fn metric(config: &Path, name: &str) -> f64 {
    let text = Client::of(admin_of(config)).get("/metrics").send().text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

fn redis_keys(redis: &RedisServer) -> String {
    format!("[store.redis]\nurl = \"{}\"\nresponse_timeout = \"10s\"\nconnect_timeout = \"10s\"\n", redis.url())
}

const NO_ACCESS_LOG: &str = "[log]\naccess = false\nlevel = \"warn\"\n";

/// X1
#[test]
fn a_gateway_that_is_killed_takes_what_it_was_at_and_no_session() {
    let redis = RedisServer::start();
    let backend = Backend::answering(|request| match request.target() {
        "/private/slow" => Answer::AfterStep(Box::new(Answer::Echo)),
        _ => Answer::Echo,
    });
    let rest = redis_keys(&redis) + NO_ACCESS_LOG;
    let (doomed, other) = (Instance::start(&backend, &rest), Instance::start(&backend, &rest));
    let (doomed_address, other_address) = (doomed.address, other.address);
    let ann = log_in(doomed_address);
    let session = ann.cookie("session").unwrap();
    let under_way = std::thread::spawn(move || ann.get("/private/slow").try_send());
    wait_until("a request is under way", || {
        backend.requests().iter().any(|request| request.target() == "/private/slow")
    });

    let (stop, answered, moved) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _over = Over(&stop);
        let load = |first: SocketAddr, second: SocketAddr| {
            let session = log_in(first).cookie("session").unwrap();
            let (stop, answered, moved) = (&stop, &answered, &moved);
            scope.spawn(move || {
                let both = [first, second].map(|address| {
                    let client = Client::of(address);
                    client.set_cookie("session", &session);
                    client
                });
                let mut at = 0;
                while !stop.load(Ordering::SeqCst) {
                    match both[at].get("/private").try_send() {
                        Ok(response) => {
                            assert_eq!(response.seen().headers("x-forwarded-user"), ["ann"]);
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        // As a balancer in front does. Only the one that was killed may fail anybody.
                        Err(_) => {
                            assert!(at == 0 && first == doomed_address, "the other gateway fails nobody");
                            moved.fetch_add(1, Ordering::SeqCst);
                            at = 1;
                        }
                    }
                }
            });
        };
        (0..2).for_each(|_| load(doomed_address, other_address));
        (0..2).for_each(|_| load(other_address, doomed_address));
        let more = |what: &str| {
            let before = answered.load(Ordering::SeqCst);
            wait_until(what, || before + 100 < answered.load(Ordering::SeqCst));
        };
        more("there is load");
        doomed.daemon.signal("KILL");
        wait_until("those who were there go to the other", || moved.load(Ordering::SeqCst) == 2);
        more("and are served");
    });
    assert!(under_way.join().unwrap().is_err(), "what was under way on it breaks off");
    let elsewhere = other.client();
    elsewhere.set_cookie("session", &session);
    assert_eq!(elsewhere.get("/private").send().status, 200, "and its session lives on");
}

/// X4
#[test]
fn a_file_that_is_gone_or_contradicts_itself_changes_nothing() {
    let backend = Backend::echo();
    let instance = Instance::start(&backend, NO_ACCESS_LOG);
    let good = std::fs::read_to_string(&instance.file).unwrap();
    let refused = "cloakroom_reloads_total{result=\"refused\"}";
    let broken = [
        good.replace("[pool.app]", "[pool.app]\nbackends = [\"127.0.0.1:1\"]"),
        good.replace("[pool.app]", "[pool.app]\nbackend = \"127.0.0.1:1\""),
        good.replace("[pool.app]", "[pool.app]\nbackends = [\"127.0.0.1:1\"]\n[pool.app]"),
        good.clone() + "[[route]]\npath = \"/\"\npool = \"app\"\n",
        String::from("\u{0}"),
        String::new(),
    ];
    for (number, text) in broken.iter().enumerate() {
        std::fs::write(&instance.file, text).unwrap();
        instance.daemon.signal("HUP");
        wait_for_reloads(&instance, &good, refused, 1 + number);
        assert_eq!(instance.client().get("/").send().seen().backend, backend.name(), "{text}");
    }
    std::fs::remove_file(&instance.file).unwrap();
    instance.daemon.signal("HUP");
    wait_for_reloads(&instance, &good, refused, 1 + broken.len());
    assert_eq!(instance.client().get("/").send().status, 200);

    let other = Backend::echo();
    std::fs::write(&instance.file, good.replace(&backend.address().to_string(), &other.address().to_string())).unwrap();
    instance.daemon.signal("HUP");
    wait_until("a good file is applied", || instance.metric("cloakroom_reloads_total{result=\"applied\"}") == 1.0);
    assert_eq!(instance.client().get("/").send().seen().backend, other.name());
}

/// As [`Instance::metric`], of whose file is broken: `good` says where to ask.
fn wait_for_reloads(instance: &Instance, good: &str, name: &str, count: usize) {
    let aside = instance.file.with_file_name("good.toml");
    std::fs::write(&aside, good).unwrap();
    wait_until("the file is refused", || metric(&aside, name) == count as f64);
}

/// X5
#[test]
fn logins_go_on_while_keys_users_and_routes_change() {
    const KEYS: [&str; 2] =
        ["E75zE0cHsrRztfXSw9WHaYqoJLAUYMi/ZKnOfyAcnQM=", "j7tJPkUicGC326WDpHJ/cJ6iSnynsFNhJR/Ut/oCals="];
    let ring = |first: usize| format!("{}\n{}\n", KEYS[first % 2], KEYS[(first + 1) % 2]);
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .file("session.keys", ring(0))
        .route("/", "")
        .with("[session]\nkeys_file = \"session.keys\"\nseal_records = \"on\"")
        .start();
    let kept = gateway.log_in("bob");
    let (stop, journeys) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _over = Over(&stop);
        for user in ["ann", "bob", "ann"] {
            let (gateway, stop, journeys) = (&gateway, &stop, &journeys);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    // Whatever changes between the form and its answer.
                    let client = gateway.log_in(user);
                    assert_eq!(client.get("/").send().seen().headers("x-forwarded-user"), [user]);
                    gateway.log_out(&client);
                    assert_eq!(client.get("/").send().status, 401);
                    journeys.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for round in 1..=12 {
            let before = journeys.load(Ordering::SeqCst);
            gateway
                .reload(|setup| {
                    let setup = setup.file("session.keys", ring(round)).without_users();
                    let setup = setup.user(&format!("guest-{round}"), "groups = [\"staff\"]");
                    setup.route(&format!("/round-{round}"), "access = \"public\"")
                })
                .unwrap();
            wait_until("somebody logs in and out", || before + 2 <= journeys.load(Ordering::SeqCst));
            assert_eq!(kept.get("/").send().status, 200, "who was in before stays in");
        }
    });
}

/// X6. Our own code does not panic on anything that comes over a wire, so the mistake is in a store of the test's.
#[test]
fn a_panic_is_a_500_for_its_request_and_nobody_else_notices() {
    let bad = id_of("eve");
    let store = Treacherous { store: MemoryStore::new(1_000), panics_at: bad.key() };
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).store(Store::Given(Given(Arc::new(store)))).tls().start();
    let ann = gateway.log_in("ann");
    let eve = gateway.client();
    eve.set_cookie("__Host-session", &bad.to_cookie_value());
    let streams = Http2Client::connect(gateway.address(), &tls::trust());
    let (ann_cookie, eve_cookie) = (ann.cookie_field().unwrap(), eve.cookie_field().unwrap());
    const TIMES: usize = 20;
    for _ in 0..TIMES {
        let response = eve.get("/").send();
        assert_eq!(response.status, 500, "{}", response.text());
        assert!(response.header("x-request-id").is_some());
        assert_eq!(eve.cookie_field(), Some(eve_cookie.clone()), "it is no logout");
        assert_eq!(ann.get("/").send().seen().headers("x-forwarded-user"), ["ann"]);
        let stream = streams.get("/", &[("cookie", &eve_cookie)]);
        assert_eq!(stream.status, 500);
        assert_eq!(streams.get("/", &[("cookie", &ann_cookie)]).status, 200, "another stream of the same connection");
    }
    let internal = "cloakroom_requests_total{outcome=\"internal\",route=\"/\",status=\"500\"}";
    assert_eq!(gateway.metric(internal), 2.0 * TIMES as f64, "each is counted");
    assert_eq!(gateway.admin("/health/ready").status, 200);
}

/// A store with a mistake in it.
struct Treacherous {
    store: MemoryStore,
    panics_at: SessionKey,
}

#[async_trait::async_trait]
impl SessionStore for Treacherous {
    async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
        assert!(*key != self.panics_at, "a mistake, made on purpose");
        self.store.load(key).await
    }
    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        self.store.create(key, session, terms).await
    }
    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
        self.store.touch(key, idle, ends).await
    }
    async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
        self.store.update(key, change).await
    }
    async fn destroy(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Result<bool, StoreError> {
        self.store.destroy(key, user, ending).await
    }
    async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError> {
        self.store.list(user).await
    }
    async fn destroy_all(&self, user: &str, except: Option<&SessionKey>, ending: Ending) -> Result<u64, StoreError> {
        self.store.destroy_all(user, except, ending).await
    }
    fn parts(&self) -> u16 {
        self.store.parts()
    }
    async fn list_part(&self, part: u16) -> Result<Vec<Listed>, StoreError> {
        self.store.list_part(part).await
    }
    async fn destroy_part(&self, part: u16, ending: Ending) -> Result<u64, StoreError> {
        self.store.destroy_part(part, ending).await
    }
    async fn total(&self) -> Result<u64, StoreError> {
        self.store.total().await
    }
    async fn sweep(&self, part: u16) -> Result<Vec<EndEvent>, StoreError> {
        self.store.sweep(part).await
    }
    async fn forget_events(&self, part: u16, events: &[EndEvent]) -> Result<(), StoreError> {
        self.store.forget_events(part, events).await
    }
    async fn lead(&self, instance: &str, time: Duration) -> Result<bool, StoreError> {
        self.store.lead(instance, time).await
    }
    async fn add_activity(&self, key: &SessionKey, seen: &[Activity], keep: u16) -> Result<(), StoreError> {
        self.store.add_activity(key, seen, keep).await
    }
    async fn activity(&self, key: &SessionKey) -> Result<Vec<Activity>, StoreError> {
        self.store.activity(key).await
    }
    async fn claim(&self, name: &str, holder: &str, time: Duration) -> Result<bool, StoreError> {
        self.store.claim(name, holder, time).await
    }
    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        self.store.release(name, holder).await
    }
    async fn bind(&self, handle: &str, key: &SessionKey, time: Duration) -> Result<Vec<SessionKey>, StoreError> {
        self.store.bind(handle, key, time).await
    }
    async fn bound(&self, handle: &str) -> Result<Vec<SessionKey>, StoreError> {
        self.store.bound(handle).await
    }
    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        self.store.increment(counter, window).await
    }
    async fn decrement(&self, counter: &str) -> Result<(), StoreError> {
        self.store.decrement(counter).await
    }
    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        self.store.count(counter).await
    }
    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        self.store.reset(counter).await
    }
    async fn ping(&self) -> Result<(), StoreError> {
        self.store.ping().await
    }
}

/// X7
#[test]
fn with_few_descriptors_the_many_wait_and_all_are_served_in_the_end() {
    const CLIENTS: usize = 300;
    crowd(0, 0);
    let backend = Backend::echo();
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 256 && exec \"$@\"", "sh", CLOAKROOM]);
    let instance = Instance::start_by(&mut limited, &backend, NO_ACCESS_LOG);
    let kept = instance.client();
    assert_eq!(kept.get("/").send().status, 200);
    let mut waiting: Vec<_> = (0..CLIENTS).map(|_| Connection::open(instance.address)).collect();
    waiting.iter_mut().for_each(|connection| connection.write(get("/")));
    wait_until("it takes as many as it can", || 50.0 < instance.metric("cloakroom_connections"));
    let before = instance.daemon.ticks();
    for _ in 0..50 {
        assert_eq!(kept.get("/").send().status, 200, "who is in is served");
    }
    assert!(instance.metric("cloakroom_connections") < 128.0, "a descriptor for each and one for its backend");
    tell(&format!("out of descriptors: {} ticks for 51 requests", instance.daemon.ticks() - before));
    for mut connection in waiting {
        // The next one is let in when this one leaves.
        assert_eq!(connection.read_response("GET").unwrap().status, 200, "each has its turn");
    }
}

/// X7, when descriptors are gone all the same: a neighbour in the process, or a limit that somebody lowers.
#[test]
fn without_a_descriptor_left_it_waits_without_spinning_and_recovers() {
    /// The kernel gives out no descriptor with a number that is not below the limit; those that are open stay.
    const STANDARD_STREAMS: u64 = 3;
    let backend = Backend::echo();
    let instance = Instance::start(&backend, "[log]\naccess = false\n");
    let set_limit = |descriptors: Option<u64>| {
        let limit = Rlimit { current: descriptors, maximum: None };
        let limit = Rlimit { maximum: prlimit(None, Resource::Nofile, limit_of_this()).unwrap().maximum, ..limit };
        prlimit(Pid::from_raw(instance.daemon.id() as i32), Resource::Nofile, limit).unwrap();
    };
    let kept = instance.client();
    assert_eq!(kept.get("/").send().status, 200);
    instance.wait_for_connections(1.0);
    // They are in, and have no connection to a backend.
    let mut without_backend: Vec<_> = (0..8).map(|_| Connection::open(instance.address)).collect();
    wait_until("they are in", || 9.0 <= instance.metric("cloakroom_connections"));
    set_limit(Some(STANDARD_STREAMS));
    let out_of_them_since = Instant::now();
    let mut shut_out: Vec<_> = (0..20).map(|_| Connection::open(instance.address)).collect();
    shut_out.iter_mut().for_each(|connection| connection.write(get("/")));
    for _ in 0..50 {
        assert_eq!(kept.get("/").send().status, 200, "who is in is served");
    }
    without_backend.iter_mut().for_each(|connection| connection.write(get("/")));
    let statuses = without_backend.iter_mut().map(|connection| connection.read_response("GET").unwrap().status);
    let statuses: Vec<_> = statuses.collect();
    assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
    assert!(statuses.contains(&503), "there is no descriptor for a backend: {statuses:?}");
    // A loop that does not wait takes all of a core: a hundred ticks in each second.
    let (before, since) = (instance.daemon.ticks(), Instant::now());
    wait_until("there was time to spin", || Duration::from_secs(1) < since.elapsed());
    let (ticks, time) = (instance.daemon.ticks() - before, since.elapsed());
    assert!(u128::from(ticks) < time.as_millis() / 20, "{ticks} ticks in {time:?} while nobody can be let in");
    set_limit(Some(1024));
    let out_of_them = out_of_them_since.elapsed();
    for mut connection in shut_out {
        assert_eq!(connection.read_response("GET").unwrap().status, 200, "each has its turn");
    }
    let ejections = format!("cloakroom_backend_ejections_total{{backend=\"{}\",pool=\"app\"}}", backend.address());
    assert_eq!(instance.metric(&ejections), 0.0, "it is no fault of the backend's");
    for _ in 0..20 {
        assert_eq!(instance.client().get("/").send().status, 200, "all is as before");
    }
    let (_, said) = instance.daemon.stopped();
    let told = said.matches("accept failed").count() as u64;
    assert!((1..=1 + out_of_them.as_secs() / 10).contains(&told), "told, and not more than each ten seconds: {said}");
}

fn limit_of_this() -> Rlimit {
    rustix::process::getrlimit(Resource::Nofile)
}

/// X8
#[test]
fn lines_that_nobody_can_write_cost_no_request_and_are_counted() {
    const REQUESTS: usize = 200;
    let backend = Backend::echo();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let closed = || std::io::pipe().unwrap().1;
    let rest = "[log]\nlevel = \"info\"\n";
    for way in ["full", "closed"] {
        let (_folder, file, address) = deployment(&[&backend], rest);
        let mut command = Command::new(CLOAKROOM);
        command.args(["run", "--config", file.to_str().unwrap()]);
        let daemon = match way {
            "full" => Daemon::saying_to(&mut command, full(), full()),
            _ => Daemon::saying_to(&mut command, closed(), closed()),
        };
        wait_until("the gateway listens", || is_up(address));
        let client = log_in(address);
        for _ in 0..REQUESTS {
            assert_eq!(client.get("/private").send().status, 200, "{way}");
        }
        let dropped = |log: &str| metric(&file, &format!("cloakroom_log_lines_dropped_total{{log=\"{log}\"}}"));
        wait_until("lines are counted", || REQUESTS as f64 <= dropped("access") && 0.0 < dropped("diagnostics"));
        daemon.signal("TERM");
        assert_eq!(daemon.exit_code(), Some(0), "{way}: the end is in order");
    }
}

/// X10
#[test]
fn a_clock_that_jumps_logs_nobody_out() {
    const HOUR: i64 = 3_600;
    const YEAR: i64 = 365 * 24 * HOUR;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let past_2038 = (1 << 31) - now + 24 * HOUR;
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    for (name, store) in [("memory", String::new()), ("redis", redis_keys(&redis))] {
        let clock = Clock::new();
        let mut command = Command::new(CLOAKROOM);
        clock.given_to(&mut command);
        let instance = Instance::start_by(&mut command, &backend, &(store + NO_ACCESS_LOG));
        let ann = log_in(instance.address);
        for ahead in [HOUR, -HOUR, 10 * YEAR, -10 * YEAR, past_2038, 0] {
            clock.set(ahead);
            let date = instance.client().get("/.cloakroom/session").send().header("date").unwrap().to_owned();
            let told = httpdate::parse_http_date(&date).unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
            assert!((told.as_secs() as i64 - now - ahead).abs() < HOUR / 2, "the clock is set: {date}");
            for _ in 0..3 {
                assert_eq!(ann.get("/private").send().seen().headers("x-forwarded-user"), ["ann"], "{name} {ahead}");
            }
            let other = log_in(instance.address);
            assert_eq!(other.get("/private").send().status, 200, "{name} {ahead}: logins work");
            let form = crate::harness::gateway::Form::on(&other.navigate("/.cloakroom/logout").send().text());
            let fields: Vec<_> = form.fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            assert_eq!(other.post_form("/.cloakroom/logout", &fields).send().status, 303, "{name} {ahead}");
            assert_eq!(other.get("/private").send().status, 401, "{name} {ahead}: and logouts");
        }
    }
}

/// L1
#[test]
fn idle_connections_cost_little_and_are_closed_in_time() {
    let idle = crowd(1_000, 9_900);
    let backend = Backend::echo();
    let rest = |keepalive: &str| {
        format!("{NO_ACCESS_LOG}[limits]\nkeepalive_timeout = \"{keepalive}\"\n[server]\nconnections_max = 20000\n")
    };
    let open = |instance: &Instance| {
        (0..idle)
            .map(|_| {
                let mut connection = Connection::open(instance.address);
                connection.write(get("/.cloakroom/session"));
                assert_eq!(connection.read_response("GET").unwrap().status, 401);
                connection
            })
            .collect::<Vec<_>>()
    };
    let instance = Instance::start(&backend, &rest("10m"));
    let bystander = instance.client();
    assert_eq!(bystander.get("/").send().status, 200);
    let before = instance.daemon.resident_bytes();
    let held = open(&instance);
    wait_until("all are held", || instance.metric("cloakroom_connections") == 1.0 + idle as f64);
    let each = instance.daemon.resident_bytes().saturating_sub(before) / idle as u64;
    tell(&format!("{idle} idle connections: {each} bytes each"));
    assert!(each < 64 << 10, "{each} bytes for an idle connection");
    assert_eq!(bystander.get("/").send().status, 200);
    drop(held);
    instance.wait_for_connections(1.0);

    let hasty = Instance::start(&backend, &rest("3s"));
    let held = open(&hasty);
    hasty.wait_for_connections(0.0);
    drop(held);
}

/// While `attackers` hold their connections, somebody else is served; in the end all of them are closed. Each round,
/// `drip` does what an attacker does to keep its connection.
fn outlast(instance: &Instance, bystander: &Client, attackers: &mut [TcpStream], drip: impl Fn(&mut TcpStream)) {
    let (mut answers, mut most) = (0, 0.0);
    wait_until("all attackers are closed", || {
        attackers.iter_mut().for_each(&drip);
        assert_eq!(bystander.get("/").send().status, 200, "others are served");
        answers += 1;
        let open = instance.metric("cloakroom_connections");
        most = f64::max(most, open);
        open <= 1.0
    });
    tell(&format!("{} attackers, at most {most} connections: {answers} answers to somebody else", attackers.len()));
}

/// They are there when this returns. [`HASTY`] leaves them the time for it.
fn attackers(instance: &Instance, count: usize, first: &[u8]) -> Vec<TcpStream> {
    let open = |_| {
        let mut stream = TcpStream::connect(instance.address).unwrap();
        stream.set_nonblocking(true).unwrap();
        let _ = stream.write(first);
        stream
    };
    let streams = (0..count).map(open).collect();
    // The bystander is one.
    wait_until("the attackers are there", || 2.0 < instance.metric("cloakroom_connections"));
    streams
}

const HASTY: &str = "[log]\naccess = false\nlevel = \"warn\"\n[limits]\nhead_timeout = \"5s\"\nbody_timeout = \"5s\"\n\
    body_rate_min = \"1KiB\"\nwrite_timeout = \"5s\"\n";

/// L2
#[test]
fn heads_that_drip_are_cut_off_together_and_others_are_served() {
    let backend = Backend::echo();
    let instance = Instance::start(&backend, HASTY);
    let bystander = instance.client();
    bystander.get("/").send();
    let mut dripping = attackers(&instance, crowd(500, 2_000), b"GET / HTTP/1.1\r\nHost: a\r\nX: ");
    outlast(&instance, &bystander, &mut dripping, |stream| {
        let _ = stream.write(b"x");
    });
    assert_eq!(backend.requests().iter().filter(|request| !request.head.values("x").is_empty()).count(), 0);
}

/// L3
#[test]
fn bodies_that_drip_either_way_are_cut_off_and_others_are_served() {
    let backend = Backend::answering(|request| match request.target() {
        "/large" => Answer::response(200, &[], vec![b'x'; 16 << 20]),
        _ => Answer::Echo,
    });
    let instance = Instance::start(&backend, HASTY);
    let bystander = instance.client();
    bystander.get("/").send();
    let upload = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n";
    let mut uploads = attackers(&instance, crowd(200, 2_000), upload);
    outlast(&instance, &bystander, &mut uploads, |stream| {
        let _ = stream.write(b"x");
    });
    let mut downloads = attackers(&instance, crowd(20, 200), &get("/large"));
    outlast(&instance, &bystander, &mut downloads, |stream| {
        let _ = stream.read(&mut [0]);
    });
}

/// L4
#[test]
fn handshakes_that_stall_are_cut_off_and_others_are_served() {
    let backend = Backend::echo();
    let (folder, file, address) = deployment(&[&backend], HASTY);
    tls::write_files(folder.path());
    let plain = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, plain.replacen("[admin]", "cert = \"cert.pem\"\nkey = \"key.pem\"\n[admin]", 1)).unwrap();
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let instance = Instance { daemon, file, address, _folder: folder };
    let bystander = Client::of_tls(address, tls::trust());
    bystander.get("/").send();
    // Nothing; the beginning of a record; a record that announces more than comes.
    for first in [&b""[..], &[22], &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]] {
        let mut stalled = attackers(&instance, crowd(200, 2_000), first);
        outlast(&instance, &bystander, &mut stalled, |_| {});
    }
}

/// L5
#[test]
fn giants_are_refused_by_their_names_and_take_no_memory() {
    const GIANT: usize = 1 << 20;
    const ROUNDS: usize = 20;
    const TRIES: usize = 5;
    const MEMORY_BYTES_MAX: u64 = 48 << 20;
    let backend = Backend::echo();
    let instance = Instance::start(&backend, &format!("{NO_ACCESS_LOG}[limits]\nbody_bytes = \"1MiB\"\n"));
    let giant = "a".repeat(GIANT);
    let many: String = (0..20_000).map(|number| format!("x-{number}: {number}\r\n")).collect();
    let giants = [
        (431, format!("GET / HTTP/1.1\r\nHost: a\r\nX: {giant}\r\n\r\n")),
        (431, format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: session={giant}\r\n\r\n")),
        (431, format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")),
        (414, format!("GET /{giant} HTTP/1.1\r\nHost: a\r\n\r\n")),
        (413, format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{giant}{giant}", 64 * GIANT)),
        (413, format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n200001\r\n{giant}{giant}a\r\n")),
        (413, format!("POST /.cloakroom/login HTTP/1.1\r\nHost: a\r\nContent-Length: {GIANT}\r\n\r\n{giant}")),
    ];
    let ask = |status: u16, bytes: &str| {
        // It may be closed on what nobody wants to read; and who stops writing for longer than the gateway lingers
        // loses the answer with the rest (RFC 9112, section 9.6), and asks again.
        let answer = || {
            let mut connection = Connection::open(instance.address);
            let _ = connection.try_write(bytes);
            connection.read_response("GET").ok()
        };
        let response = (0..TRIES).find_map(|_| answer()).expect("an answer");
        assert_eq!((response.status, response.closes), (status, true), "{}", &bytes[..40]);
    };
    giants.iter().for_each(|(status, bytes)| ask(*status, bytes));
    let before = instance.daemon.resident_bytes();
    let peak = std::thread::scope(|scope| {
        for (status, bytes) in &giants {
            scope.spawn(|| (0..ROUNDS).for_each(|_| ask(*status, bytes)));
        }
        let mut peak = before;
        for _ in 0..100 {
            assert_eq!(instance.client().get("/").send().status, 200, "others are served");
            peak = peak.max(instance.daemon.resident_bytes());
        }
        peak
    });
    let added = peak.max(instance.daemon.resident_bytes()) - before;
    tell(&format!("{} giants: {} KiB more at the peak", ROUNDS * giants.len(), added >> 10));
    assert!(added < MEMORY_BYTES_MAX, "{added} bytes more");
}

/// L6
#[test]
fn clients_that_vanish_at_any_moment_leave_nothing_behind() {
    /// Connections to Redis are opened as they are needed. A leak would be of hundreds.
    const FILES_SLACK: usize = 16;
    let redis = RedisServer::start();
    let backend = Backend::answering(|request| match request.target() {
        "/private/slow" => Answer::AfterStep(Box::new(Answer::Echo)),
        "/private/large" => Answer::response(200, &[], vec![b'x'; 4 << 20]),
        _ => Answer::Echo,
    });
    let rest = redis_keys(&redis) + NO_ACCESS_LOG;
    let (folder, file, address) = deployment(&[&backend], &rest);
    let text = std::fs::read_to_string(&file).unwrap();
    // Connections to backends that are kept are no leak, and no subject of this test.
    std::fs::write(&file, text.replace("[pool.app]", "[pool.app]\nidle_timeout = \"1s\"")).unwrap();
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let instance = Instance { daemon, file, address, _folder: folder };
    let ann = log_in(address);
    let cookie = ann.cookie_field().unwrap();
    let whole = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\nCookie: {cookie}\r\n\r\n");
    let moments = [
        String::new(),
        "GET /private HTTP/1.1\r\nHost: a\r\nCook".to_owned(),
        whole("/private"),
        whole("/private/slow"),
        whole("/private/large"),
        format!("POST /private HTTP/1.1\r\nHost: a\r\nCookie: {cookie}\r\nContent-Length: 10\r\n\r\nabc"),
        "POST /.cloakroom/login HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nuser".to_owned(),
    ];
    let storm = |rounds: usize| {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let moments = &moments;
                scope.spawn(move || {
                    for number in 0..rounds / 4 {
                        let mut connection = Connection::open(address);
                        let _ = connection.try_write(&moments[(number + thread) % moments.len()]);
                        connection.reset();
                    }
                });
            }
        });
        instance.wait_for_connections(1.0);
        let in_flight = format!("cloakroom_backend_in_flight{{backend=\"{}\",pool=\"app\"}}", backend.address());
        wait_until("no request is left at the backend", || instance.metric(&in_flight) == 0.0);
    };
    storm(200); // what is made once is made
    let settled = || {
        wait_until("the backend has nothing left to do", || {
            backend.step();
            backend.open_connections() == 0
        });
    };
    settled();
    let (files, memory) = (instance.daemon.open_files(), instance.daemon.resident_bytes());
    let rounds = crowd(2_000, 20_000);
    storm(rounds);
    settled();
    instance.wait_for_open_files(files + FILES_SLACK);
    tell(&format!(
        "{rounds} clients vanished: {files} descriptors before, {} after; {} KiB more",
        instance.daemon.open_files(),
        instance.daemon.resident_bytes().saturating_sub(memory) >> 10
    ));
    assert_eq!(ann.get("/private").send().status, 200, "and the session of all of them is well");
}

/// The rows of the matrix, and how many of each letter there are.
const ROWS: [(char, usize); 5] = [('B', 13), ('S', 16), ('C', 13), ('X', 13), ('L', 11)];

#[test]
fn each_row_of_the_book_names_tests_that_exist() {
    const BOOK: &str = include_str!("../../docs/bad-nights.md");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut rows = Vec::new();
    for line in BOOK.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let Some((row, [.., tests, ""])) = cells.get(1).zip(cells.get(2..)) else { continue };
        if !row.ends_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        rows.push((*row).to_owned());
        let named: Vec<_> = tests.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
        assert!(!named.is_empty() || tests.starts_with("none"), "{row}: which test shows it?");
        for name in named {
            let (file, function) = name.rsplit_once("::").unwrap();
            let file = file.replace("::", "/");
            let texts = [format!("tests/it/{file}.rs"), format!("src/{file}.rs"), format!("src/{file}/mod.rs")];
            let text = texts.iter().find_map(|path| std::fs::read_to_string(root.join(path)).ok());
            let text = text.unwrap_or_else(|| panic!("{row}: there is no file for {name}"));
            assert!(text.contains(&format!("fn {function}(")), "{row}: there is no {name}");
        }
    }
    let expected = ROWS.iter().flat_map(|(letter, count)| (1..=*count).map(move |number| format!("{letter}{number}")));
    assert_eq!(rows, expected.collect::<Vec<_>>(), "each row once, in order");
}
