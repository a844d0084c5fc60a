//! Which promise has which test? The rows of the reliability matrix, each with real servers.
//!
//! | row | what happens | test |
//! |---|---|---|
//! | S1 | Redis is killed | [`store_down`](crate::store_down)`::a_killed_redis_logs_nobody_out` |
//! | S2 | the same, public route | the same test; `store_down::a_public_route_and_a_malformed_cookie_cost_no_store_call` |
//! | S3 | Redis is frozen | `store_down::a_frozen_redis_logs_nobody_out`, `store_redis_faults::a_frozen_redis_is_unavailable_and_answers_nobody_late` |
//! | S4 | Redis is slow, bytes trickle | [`a_slow_redis_makes_slow_answers_and_no_wrong_ones`] |
//! | S5 | it comes back empty | `store_down::a_redis_that_comes_back_empty_sends_people_to_the_login_once` |
//! | S6 | it comes back with its data | `store_down::a_killed_redis_logs_nobody_out`, [`a_killed_redis_that_syncs_every_second_loses_nothing_that_is_older`] |
//! | S7 | Sentinel failover under traffic | [`a_failover_of_sentinels_logs_nobody_out`], and [`store_sentinel`](crate::store_sentinel) |
//! | S8 | alone with an old primary | [`a_logout_on_the_wrong_side_of_a_split_is_not_said_to_be_one`], `cache_coherence::a_primary_that_is_alone_with_us_is_not_believed_for_long` |
//! | S9 | Cluster: a node lost, slots on their way | [`a_lost_node_of_a_cluster_logs_nobody_out_and_others_notice_nothing`], [`a_slot_on_its_way_logs_nobody_out`], and [`store_cluster`](crate::store_cluster) |
//! | S10 | memory is full | [`a_full_redis_takes_no_logins_and_everything_else_goes_on`], `store_contract::a_full_redis_refuses_logins_and_still_knows_and_ends_sessions` |
//! | S11 | an eviction policy that logs users out | said at the start: `session::store::redis::inspect` |
//! | S12 | password, permission, certificate are wrong | `store_redis_faults::{a_wrong_password_is…, without_its_password…, a_missing_permission_is…, a_server_that_wants_a_certificate_gets_ours…}`, [`an_expired_certificate_lets_nobody_in`] |
//! | S13 | garbage, wrong types, damaged records | `store_redis_faults::nonsense_is_never_a_session_and_never_a_panic`, `store_contract::what_cannot_be_read_is_neither…`, `store_down::a_record_that_cannot_be_read_takes_nobodys_cookie` |
//! | S14 | back after an outage, many clients | [`five_hundred_clients_come_back_over_a_handful_of_connections`] |
//! | S15 | clocks differ | [`a_gateway_with_another_time_than_redis_logs_nobody_out`] |
//! | S16 | all gateways restart | [`sessions_outlive_all_gateways_at_once`] |
//! | C1 | fixation | [`a_planted_session_gains_nothing`], `login_journey::a_session_id_that_we_did_not_make_is_never_taken` |
//! | C2 | 50 logins at once, 3 allowed | [`of_fifty_logins_at_once_three_live`], also on a Cluster; `store_contract::fifty_logins_at_once…` on each store |
//! | C3 | a logout while 100 requests are on their way | [`a_logout_is_final_whatever_is_on_its_way`], `store_contract::no_load_after_a_logout_finds_the_session` |
//! | C4 | logout on one, a copy on another | `cache_coherence`, and there each way to fail |
//! | C8 | all sessions of a user revoked under load | [`revoked_sessions_end_on_all_gateways_under_load`], `cache_coherence::all_sessions_of_a_user_and_of_everybody…` |
//! | L9 | ids are guessed | `guessing::a_network_that_guesses_is_stopped_and_nobody_else`, `store_down::a_public_route_and_a_malformed_cookie…` |
//! | L10 | login pages are asked for | [`who_only_looks_at_the_login_page_leaves_nothing_in_redis`] |
//! | L11 | one session, many requests at once | [`a_busy_session_is_touched_once_in_a_while`] |

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cloakroom::session::id::SessionId;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{SessionStore, StoreOptions};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::Client;
use crate::harness::fault::{Fault, FaultProxy};
use crate::harness::gateway::{Gateway, PASSWORD, Setup, Store};
use crate::harness::redis::cluster::Cluster;
use crate::harness::redis::sentinels::Sentinels;
use crate::harness::redis::{KEEPS_ITS_DATA, REMEMBERS_ALL_COMMANDS, RedisServer};
use crate::harness::{Over, eventually, tell, wait_until};
use crate::store_contract::{LONG, PREFIX, id_of, session_of, settings, terms};
use crate::store_down::Traffic;

/// With patience, so that only a server that is gone is seen to be down, and no machine that has too much to do.
fn at(url: &str) -> Store {
    Store::Redis(format!("url = \"{url}\"\nresponse_timeout = \"10s\""))
}

fn setup(backend: &Backend, url: &str) -> Setup {
    Gateway::in_front_of(&[backend]).route("/", "").route("/public", "access = \"public\"").store(at(url))
}

/// Who comes to this gateway with the session of another client.
fn with_cookie(gateway: &Gateway, cookie: &str) -> Client {
    let client = gateway.client();
    client.set_cookie("session", cookie);
    client
}

/// Sessions begun beside the gateways, without the price of a password each.
struct Desk {
    runtime: tokio::runtime::Runtime,
    store: RedisStore,
}

impl Desk {
    fn at(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { runtime, store: RedisStore::new(&settings(url), StoreOptions::default()).unwrap() }
    }

    /// The cookie.
    fn begin(&self, user: &str) -> String {
        let id = id_of(user);
        self.runtime.block_on(self.store.create(&id.key(), session_of(user), &terms(LONG, None))).unwrap();
        id.to_cookie_value()
    }

    fn sessions_of(&self, user: &str) -> usize {
        let listed = eventually("the store answers", async || self.store.list(user).await.ok());
        self.runtime.block_on(listed).len()
    }
}

/// So often a script was run for this session. Those that look after all sessions do not name one.
fn writes(redis: &RedisServer, cookie: &str) -> usize {
    let member = SessionId::parse(cookie).unwrap().key().member().into_bytes();
    redis.commands().iter().filter(|words| words[0].starts_with(b"EVAL") && words.contains(&member)).count()
}

#[test]
fn a_slow_redis_makes_slow_answers_and_no_wrong_ones() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let proxy = FaultProxy::to(redis.port());
    let uncached = Store::Redis(format!("url = \"{}\"\ncache = \"off\"\nresponse_timeout = \"2s\"", proxy.url()));
    let gateway = setup(&backend, &proxy.url()).store(uncached).start();
    let clients = ["ann", "bob", "ann", "bob"].map(|user| (user, gateway.log_in(user)));
    let ask_all = |refusals: bool| {
        std::thread::scope(|scope| {
            for (user, client) in &clients {
                scope.spawn(move || {
                    for _ in 0..5 {
                        let response = client.get("/").send();
                        if !(refusals && response.status == 503) {
                            assert_eq!(response.seen().headers("x-forwarded-user"), [*user]);
                        }
                    }
                });
            }
        });
    };
    ask_all(false);
    let before = proxy.connections();
    proxy.set(Fault::slow(Duration::from_millis(100)));
    ask_all(false);
    assert_eq!(proxy.connections(), before, "the same connections, and no more");
    proxy.set(Fault::trickle(Duration::from_millis(1)));
    ask_all(true);
    proxy.heal();
    wait_until("all is well again", || clients.iter().all(|(_, client)| client.get("/").send().status == 200));
}

/// What was answered in the last two seconds at most may be lost: so long a write waits for a sync that is under way.
#[test]
fn a_killed_redis_that_syncs_every_second_loses_nothing_that_is_older() {
    let mut redis = RedisServer::with("appendonly yes\nappendfsync everysec");
    let desk = Desk::at(&redis.url());
    let older = (0..250).inspect(|_| drop(desk.begin("ann"))).count();
    wait_until("the file has it", || {
        let state: String = redis.ask("INFO persistence");
        ["aof_buffer_length:0\r", "aof_pending_bio_fsync:0\r"].iter().all(|fact| state.contains(fact))
    });
    let younger = (0..250).inspect(|_| drop(desk.begin("bob"))).count();
    redis.kill();
    redis.restart();
    assert_eq!(desk.sessions_of("ann"), older, "nobody is logged out");
    tell(&format!(
        "killed with appendfsync everysec: {} of {younger} new logins lost",
        younger - desk.sessions_of("bob")
    ));
}

/// Logins that go on all the while, each of a user of its own.
struct Logins<'g> {
    gateway: &'g Gateway,
    begun: AtomicUsize,
    stop: AtomicBool,
}

/// What became of one.
struct Login {
    user: String,
    /// When it was answered.
    at: Instant,
    cookie: Option<String>,
}

const NEWCOMERS: usize = 300;

impl<'g> Logins<'g> {
    fn known(mut setup: Setup) -> Setup {
        for number in 0..NEWCOMERS {
            setup = setup.user(&format!("newcomer{number}"), "");
        }
        setup
    }

    fn at(gateway: &'g Gateway) -> Self {
        Self { gateway, begun: AtomicUsize::new(0), stop: AtomicBool::new(false) }
    }

    /// Until some more have been let in.
    fn flow(&self) {
        let before = self.begun.load(Ordering::SeqCst);
        wait_until("people are let in", || before + 5 < self.begun.load(Ordering::SeqCst));
    }

    fn run(&self) -> Vec<Login> {
        let mut logins = Vec::new();
        for number in 0..NEWCOMERS {
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            let (client, user) = (self.gateway.client(), format!("newcomer{number}"));
            let answer = self.gateway.try_log_in(&client, &user, PASSWORD);
            assert!([303, 503].contains(&answer.status), "in, or come back: {}", answer.status);
            let cookie = client.cookie("session");
            assert_eq!(cookie.is_some(), answer.status == 303);
            match cookie {
                Some(_) => self.begun.fetch_add(1, Ordering::SeqCst),
                // The pace of somebody who is told to come back.
                None => {
                    std::thread::park_timeout(Duration::from_millis(20));
                    0
                }
            };
            logins.push(Login { user, at: Instant::now(), cookie });
        }
        logins
    }
}

/// Nobody is there twice, and who was let in by the new primary is in. How many were let in, and how many of them by
/// the old primary, which did not live to tell.
#[track_caller]
fn assert_logins_are_kept(logins: &[Login], gateway: &Gateway, desk: &Desk, promoted: Instant) -> (usize, usize) {
    let (mut begun, mut lost) = (0, 0);
    for Login { user, at, cookie } in logins {
        let kept = desk.sessions_of(user);
        assert!(kept <= 1, "{user} logged in once and has {kept} sessions");
        let Some(cookie) = cookie else { continue };
        begun += 1;
        let is_in = with_cookie(gateway, cookie).get("/").send().status == 200;
        assert_eq!(kept, usize::from(is_in), "{user}");
        if !is_in {
            lost += 1;
            assert!(*at < promoted, "{user} was let in by the new primary, and is gone");
        }
    }
    (begun, lost)
}

fn runs() -> usize {
    std::env::var("CLOAKROOM_FAILOVERS").map_or(1, |number| number.parse().unwrap())
}

fn after(moment: Option<Instant>, event: Instant) -> String {
    match moment {
        None => "never".to_owned(),
        Some(moment) => match moment.checked_duration_since(event) {
            Some(late) => format!("{late:?} after it"),
            None => format!("{:?} before it", event - moment),
        },
    }
}

#[test]
fn a_failover_of_sentinels_logs_nobody_out() {
    for _ in 0..runs() {
        let (backend, mut world) = (Backend::echo(), Sentinels::start());
        let gateway = Logins::known(setup(&backend, &world.url())).start();
        let desk = Desk::at(&world.url());
        let traffic = Traffic::of(&gateway, &["ann", "bob", "ann", "bob"]);
        traffic.is_served();
        world.servers[0].ask_with_replicas("SET everything-before-this-is-there 1", 2);
        let logins = Logins::at(&gateway);
        let (promoted, logins, killed) = std::thread::scope(|scope| {
            let _over = Over(&logins.stop);
            let running = scope.spawn(|| logins.run());
            logins.flow();
            world.servers[0].kill();
            let killed = Instant::now();
            let (_, promoted) = world.until_promoted(0);
            traffic.is_served();
            logins.flow();
            logins.stop.store(true, Ordering::SeqCst);
            (promoted, running.join().unwrap(), killed)
        });
        let last_refused = traffic.last_refused();
        traffic.end();
        let (begun, lost) = assert_logins_are_kept(&logins, &gateway, &desk, promoted);
        tell(&format!(
            "sentinels: promoted {:?} after the kill, the last 503 {}; {begun} of {} logins let in, {lost} lost by redis",
            promoted - killed,
            after(last_refused, promoted),
            logins.len()
        ));
        world.servers[0].restart();
        world.until_settled();
        let ann = gateway.log_in("ann");
        assert_eq!(ann.get("/").send().status, 200);
    }
}

/// In front of the sentinels, for who is to be parted from them.
fn parted_from_sentinels(world: &Sentinels) -> (Vec<FaultProxy>, String) {
    let proxies: Vec<_> = world.sentinels.iter().map(|sentinel| FaultProxy::to(sentinel.port())).collect();
    let hosts: Vec<_> = proxies.iter().map(|proxy| format!("127.0.0.1:{}", proxy.port())).collect();
    let url = format!("redis+sentinel://{}/mymaster", hosts.join(","));
    (proxies, url)
}

#[test]
fn a_logout_on_the_wrong_side_of_a_split_is_not_said_to_be_one() {
    let cases = [
        ("min-replicas-to-write 1\nmin-replicas-max-lag 1", "logout = \"fast\""),
        ("", "logout = \"durable\"\nlogout_timeout = \"300ms\""),
    ];
    for (conf, logout) in cases {
        let (backend, world) = (Backend::echo(), Sentinels::that_can_be_parted(conf));
        let (proxies, url) = parted_from_sentinels(&world);
        let here = Store::Redis(format!("url = \"{url}\"\n{logout}"));
        let gateway = setup(&backend, &url).store(here).start();
        let other_side = setup(&backend, &world.url()).start();
        let ann = gateway.log_in("ann");
        let form = gateway.log_out_form(&ann);
        let form: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        world.servers[0].ask_with_replicas("SET everything-before-this-is-there 1", 2);

        world.isolate(0);
        proxies.iter().for_each(FaultProxy::vanish);
        world.until_promoted(0);
        wait_until("the old primary knows that it is alone, where it was told to look", || {
            conf.is_empty() || world.servers[0].try_ask::<()>("SET a 1").is_err()
        });
        let answer = ann.post_form("/.cloakroom/logout", &form).send();
        assert_eq!(answer.status, 503, "{logout}: it would be undone");
        let cookie = ann.cookie("session").expect("a cookie that is still good is not taken back");

        proxies.iter().for_each(FaultProxy::heal);
        world.rejoin();
        world.until_settled();
        let elsewhere = with_cookie(&other_side, &cookie);
        wait_until("on the other side the session has lived on", || elsewhere.get("/").send().status == 200);
        wait_until("the logout is done", || ann.post_form("/.cloakroom/logout", &form).send().status == 303);
        wait_until("and is one everywhere", || elsewhere.get("/").send().status == 401);
        assert_eq!(with_cookie(&gateway, &cookie).get("/").send().status, 401);
    }
}

/// Users whose sessions are on a node, and on others.
fn users_of(world: &Cluster, node: usize) -> (Vec<String>, Vec<String>) {
    let is_there = |user: &String| world.owner_of(&id_of(user).key().to_store_key(PREFIX)) == node;
    let users = (0..40).map(|number| format!("user{number}"));
    let (mut on_it, mut elsewhere): (Vec<_>, Vec<_>) = users.partition(is_there);
    on_it.truncate(3);
    elsewhere.truncate(3);
    (on_it, elsewhere)
}

fn names(users: &[String]) -> Vec<&str> {
    users.iter().map(String::as_str).collect()
}

#[test]
fn a_lost_node_of_a_cluster_logs_nobody_out_and_others_notice_nothing() {
    for _ in 0..runs() {
        let (backend, mut world) = (Backend::echo(), Cluster::start());
        let node = 0;
        let (hit, spared) = users_of(&world, node);
        let mut setup = Logins::known(setup(&backend, &world.url()));
        for user in hit.iter().chain(&spared) {
            setup = setup.user(user, "");
        }
        let gateway = setup.start();
        let desk = Desk::at(&world.url());
        let (hit, spared) = (Traffic::of(&gateway, &names(&hit)), Traffic::of(&gateway, &names(&spared)));
        hit.is_served();
        spared.is_served();
        let name = (0..).map(|number| format!("key{number}")).find(|name| world.owner_of(name) == node).unwrap();
        world.nodes[node].ask_with_replicas(&format!("SET {name} 1"), 1);
        let logins = Logins::at(&gateway);
        let (promoted, logins, killed) = std::thread::scope(|scope| {
            let _over = Over(&logins.stop);
            let running = scope.spawn(|| logins.run());
            logins.flow();
            world.nodes[node].kill();
            let killed = Instant::now();
            hit.is_refused();
            spared.is_served();
            let (_, promoted) = world.until_promoted(&name, node);
            hit.is_served();
            logins.flow();
            logins.stop.store(true, Ordering::SeqCst);
            (promoted, running.join().unwrap(), killed)
        });
        tell(&format!(
            "cluster: promoted {:?} after the kill, the last 503 {}; who is on other nodes: the last 503 {}",
            promoted - killed,
            after(hit.last_refused(), promoted),
            after(spared.last_refused(), promoted)
        ));
        assert_eq!(spared.last_refused(), None, "whose session is elsewhere notices nothing");
        hit.end();
        spared.end();
        let (begun, lost) = assert_logins_are_kept(&logins, &gateway, &desk, promoted);
        tell(&format!("cluster: {begun} of {} logins let in, {lost} lost by redis", logins.len()));
    }
}

#[test]
fn a_slot_on_its_way_logs_nobody_out() {
    let (backend, world) = (Backend::echo(), Cluster::start());
    let gateway = setup(&backend, &world.url()).start();
    let traffic = Traffic::of(&gateway, &["ann", "bob", "ann"]);
    traffic.is_served();
    let ann = gateway.log_in("ann");
    let slot = world.slot_of(&SessionId::parse(&ann.cookie("session").unwrap()).unwrap().key().to_store_key(PREFIX));
    let from = world.owner_of_slot(slot).unwrap();
    let to = (from + 1) % 3;
    let migration = world.begin_migration(slot, to);
    traffic.is_served();
    let keys = migration.keys();
    let (first, rest) = keys.split_at(keys.len() / 2);
    first.iter().for_each(|key| migration.move_key(key));
    traffic.is_served();
    assert_eq!(ann.get("/").send().status, 200, "wherever it is, it is found");
    rest.iter().for_each(|key| migration.move_key(key));
    traffic.is_served();
    migration.move_all();
    migration.finish();
    traffic.is_served();
    assert_eq!(ann.get("/").send().status, 200);
    wait_until("and can be ended there", || {
        let form = gateway.log_out_form(&ann);
        let form: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        ann.post_form("/.cloakroom/logout", &form).send().status == 303
    });
    world.migrate_slot(slot, from);
    traffic.is_served();
    let last_refused = traffic.last_refused();
    traffic.end();
    assert_eq!(last_refused, None, "nobody had to wait");
}

#[test]
fn a_full_redis_takes_no_logins_and_everything_else_goes_on() {
    let (backend, redis) = (Backend::echo(), RedisServer::with(REMEMBERS_ALL_COMMANDS));
    let gateway = setup(&backend, &redis.url()).with("[session]\nidle_timeout = \"10s\"").start();
    let (ann, bob) = (gateway.log_in("ann"), gateway.log_in("bob"));
    let () = redis.ask("CONFIG SET maxmemory 1");
    let refused = gateway.try_log_in(&gateway.client(), "ann", PASSWORD);
    assert_eq!(refused.status, 503, "come back: {}", refused.text());
    assert!(refused.headers("set-cookie").iter().all(|line| !line.starts_with("session=")));
    let cookie = ann.cookie("session").unwrap();
    let begun = writes(&redis, &cookie);
    wait_until("sessions are read and touched", || {
        assert_eq!(ann.get("/").send().status, 200);
        begun < writes(&redis, &cookie)
    });
    gateway.log_out(&bob);
    assert_eq!(bob.get("/").send().status, 401);
    let () = redis.ask("CONFIG SET maxmemory 0");
    gateway.log_in("bob");
    assert_eq!(ann.get("/").send().status, 200);
}

#[test]
fn an_expired_certificate_lets_nobody_in() {
    // Another test may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = RedisServer::with_expired_tls();
    let backend = Backend::echo();
    let keys = format!("url = \"{}\"\nca = {:?}", server.tls_url(), server.authority());
    let gateway = setup(&backend, "").store(Store::Redis(keys)).start();
    assert_eq!(gateway.client().get("/public").send().status, 200);
    let somebody = with_cookie(&gateway, &id_of("ann").to_cookie_value());
    assert_eq!(somebody.get("/").send().status, 503);
    assert!(somebody.cookie("session").is_some());
    assert_eq!(gateway.admin("/health/ready").status, 503);
}

#[test]
fn five_hundred_clients_come_back_over_a_handful_of_connections() {
    const CLIENTS: usize = 500;
    const THREADS: usize = 50;
    let (backend, mut redis) =
        (Backend::echo(), RedisServer::with(&format!("{KEEPS_ITS_DATA}\n{REMEMBERS_ALL_COMMANDS}")));
    let proxy = FaultProxy::to(redis.port());
    let gateway = setup(&backend, &proxy.url()).start();
    let desk = Desk::at(&redis.url());
    let clients: Vec<_> = (0..CLIENTS).map(|_| with_cookie(&gateway, &desk.begin("ann"))).collect();
    let all_ask = |expected: u16| {
        std::thread::scope(|scope| {
            for clients in clients.chunks(CLIENTS / THREADS) {
                scope.spawn(move || {
                    for client in clients {
                        wait_until("it is as it should be for everybody", || {
                            let status = client.get("/").send().status;
                            assert!([200, 503].contains(&status), "{status}");
                            status == expected
                        });
                    }
                });
            }
        });
    };
    all_ask(200);
    let kept = proxy.open();
    let before = proxy.connections();
    redis.kill();
    let outage = Instant::now();
    all_ask(503);
    redis.restart();
    let back = Instant::now();
    all_ask(200);
    let in_all = back.elapsed();
    let attempts = proxy.connections() - before;
    // Pauses of 10 ms that double and of at most a second, none shorter than half of that.
    let allowed = kept as u64 * (10 + 2 * outage.elapsed().as_secs());
    assert!(attempts <= allowed, "{attempts} connections, {allowed} at most");
    assert!(proxy.open() <= kept, "as many as before: {} and {kept}", proxy.open());
    let asked = redis.look_ups();
    assert!(asked < 3 * CLIENTS, "one question each, and perhaps one more where it met a change: {asked}");
    tell(&format!(
        "back after an outage: all of {CLIENTS} clients in {in_all:?}, {attempts} connections made, {asked} reads"
    ));
}

/// Its clock is the store's: by a day, which is more than any session may live, it differs from the gateway's.
#[test]
fn a_gateway_with_another_time_than_redis_logs_nobody_out() {
    const DAY: i64 = 86_400;
    for ahead in [-DAY, DAY] {
        let (backend, redis) = (Backend::echo(), RedisServer::with_clock_ahead(ahead));
        let setup = setup(&backend, &redis.url()).with("[session]\nidle_timeout = \"2s\"\nabsolute_timeout = \"5s\"");
        let (one, other) = (setup.clone().start(), setup.start());
        let desk = Desk::at(&redis.url());
        let ann = one.log_in("ann");
        let elsewhere = with_cookie(&other, &ann.cookie("session").unwrap());
        for _ in 0..10 {
            assert_eq!(ann.get("/").send().status, 200, "{ahead}");
            assert_eq!(elsewhere.get("/").send().status, 200, "{ahead}: nor does the copy know better");
        }
        assert_eq!(desk.sessions_of("ann"), 1);
        let since = Instant::now();
        wait_until("it is touched: unused it would have ended", || {
            assert_eq!(elsewhere.get("/").send().status, 200);
            Duration::from_secs(3) < since.elapsed()
        });
        wait_until("and lives as long as it may", || elsewhere.get("/").send().status == 401);
        let bob = one.log_in("bob");
        one.log_out(&bob);
        assert_eq!(bob.get("/").send().status, 401);
    }
}

#[test]
fn sessions_outlive_all_gateways_at_once() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let start = || (setup(&backend, &redis.url()).start(), setup(&backend, &redis.url()).start());
    let (one, other) = start();
    let cookies = [one.log_in("ann"), other.log_in("bob")].map(|client| client.cookie("session").unwrap());
    one.stop();
    other.stop();
    let (one, other) = start();
    for gateway in [&one, &other] {
        for (cookie, user) in cookies.iter().zip(["ann", "bob"]) {
            let seen = with_cookie(gateway, cookie).get("/").send().seen();
            assert_eq!(seen.headers("x-forwarded-user"), [user]);
        }
    }
}

/// A session that lives, of somebody else: the one case in which a planted cookie is no nonsense.
#[test]
fn a_planted_session_gains_nothing() {
    let (backend, redis, world) = (Backend::echo(), RedisServer::start(), Cluster::start());
    for url in [redis.url(), world.url()] {
        let (one, other) = (setup(&backend, &url).start(), setup(&backend, &url).start());
        let attacker = one.log_in("bob");
        let planted = attacker.cookie("session").unwrap();
        let victim = other.client();
        let page = victim.navigate("/.cloakroom/login").send();
        let form = crate::harness::gateway::Form::on(&page.text());
        victim.set_cookie("session", &planted);
        let fields = form.filled_in(&[("username", "ann"), ("password", PASSWORD)]);
        let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(victim.post_form("/.cloakroom/login", &fields).send().status, 303);
        assert_ne!(victim.cookie("session").as_ref(), Some(&planted));
        assert_eq!(victim.get("/").send().seen().headers("x-forwarded-user"), ["ann"]);
        wait_until("the planted one is over, also for who planted it", || attacker.get("/").send().status == 401);
        assert_eq!(with_cookie(&other, &planted).get("/").send().status, 401);
    }
}

#[test]
fn of_fifty_logins_at_once_three_live() {
    const LOGINS: usize = 50;
    const ALLOWED: usize = 3;
    // So many attempts at one account are, elsewhere, somebody who guesses.
    const UNTHROTTLED: &str =
        "[login.password.throttle]\nper_account_and_network = 10000\nper_account = 10000\nper_network = 10000";
    let (backend, redis, world) = (Backend::echo(), RedisServer::start(), Cluster::start());
    for url in [redis.url(), world.url()] {
        let setup =
            setup(&backend, &url).with("[session]\nmax_per_user = 3").with(UNTHROTTLED).password("hashes_max = 50");
        let gateways = [setup.clone().start(), setup.start()];
        let clients: Vec<_> = std::thread::scope(|scope| {
            let logins = (0..LOGINS).map(|number| {
                let gateway = &gateways[number % 2];
                scope.spawn(move || {
                    let client = gateway.client();
                    // A machine that is too busy may say so.
                    wait_until("somebody is let in", || gateway.try_log_in(&client, "ann", PASSWORD).status == 303);
                    client
                })
            });
            let logins: Vec<_> = logins.collect();
            logins.into_iter().map(|login| login.join().unwrap()).collect()
        });
        let ids: HashSet<_> = clients.iter().map(|client| client.cookie("session").unwrap()).collect();
        assert_eq!(ids.len(), LOGINS);
        // Each on both gateways, and from the copies, too: whoever was displaced is out.
        wait_until("exactly three are in", || {
            let live: Vec<_> = clients.iter().filter(|client| client.get("/").send().status == 200).collect();
            assert!(ALLOWED <= live.len(), "{} are in", live.len());
            live.len() == ALLOWED
        });
        assert_eq!(Desk::at(&url).sessions_of("ann"), ALLOWED);
    }
}

#[test]
fn a_logout_is_final_whatever_is_on_its_way() {
    const REQUESTS: usize = 100;
    let backend = Backend::answering(|request| match request.target() {
        "/slow" => Answer::AfterStep(Box::new(Answer::Echo)),
        _ => Answer::Echo,
    });
    let redis = RedisServer::start();
    let gateway = setup(&backend, &redis.url()).with("[session]\nidle_timeout = \"2s\"").start();
    let ann = gateway.log_in("ann");
    let cookie = ann.cookie("session").unwrap();
    let is_answered = AtomicBool::new(false);
    let (late, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..REQUESTS {
            let client = with_cookie(&gateway, &cookie);
            // It was let in before; what is still without an answer when its session has ended goes without.
            scope.spawn(move || assert!([200, 401].contains(&client.get("/slow").send().status)));
        }
        backend.after_requests(REQUESTS);
        for _ in 0..8 {
            let (gateway, cookie) = (&gateway, &cookie);
            let (is_answered, late, refused) = (&is_answered, &late, &refused);
            scope.spawn(move || {
                // A client forgets a cookie that is taken back.
                let client = with_cookie(gateway, cookie);
                loop {
                    let came_after = is_answered.load(Ordering::SeqCst);
                    match client.get("/").send().status {
                        200 => late.fetch_add(usize::from(came_after), Ordering::SeqCst),
                        401 => break refused.fetch_add(1, Ordering::SeqCst),
                        status => panic!("{status}"),
                    };
                }
            });
        }
        gateway.log_out(&ann);
        is_answered.store(true, Ordering::SeqCst);
        wait_until("all are refused", || refused.load(Ordering::SeqCst) == 8);
        (0..REQUESTS).for_each(|_| backend.step());
    });
    tell(&format!("logout among {REQUESTS}: {} requests served that came after its answer", late.into_inner()));
    assert_eq!(with_cookie(&gateway, &cookie).get("/").send().status, 401);
    let names: Vec<String> = redis.ask("KEYS *s:{*");
    assert!(names.is_empty(), "no touch brings it back: {names:?}");
}

#[test]
fn revoked_sessions_end_on_all_gateways_under_load() {
    const SESSIONS: usize = 40;
    const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";
    let lease = Duration::from_secs(1);
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let admin = format!("[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\"");
    let setup = setup(&backend, &redis.url()).with(&admin);
    let gateways = [setup.clone().start(), setup.start()];
    let traffic = [Traffic::of(&gateways[0], &["bob"]), Traffic::of(&gateways[1], &["bob"])];
    let desk = Desk::at(&redis.url());
    let clients: Vec<_> = (0..SESSIONS).map(|number| with_cookie(&gateways[number % 2], &desk.begin("ann"))).collect();
    clients.iter().for_each(|client| assert_eq!(client.get("/").send().status, 200));
    let desk_client = Client::of(gateways[0].admin_address());
    let served: Vec<Option<Instant>> = std::thread::scope(|scope| {
        let looking: Vec<_> = clients
            .chunks(SESSIONS / 8)
            .map(|clients| {
                scope.spawn(move || {
                    let mut served = None;
                    let mut live: Vec<_> = clients.iter().collect();
                    while !live.is_empty() {
                        live.retain(|client| {
                            let asked = Instant::now();
                            let status = client.get("/").send().status;
                            assert!([200, 401].contains(&status), "{status}");
                            if status == 200 {
                                served = Some(asked);
                            }
                            status == 200
                        });
                    }
                    served
                })
            })
            .collect();
        traffic.iter().for_each(Traffic::is_served);
        let request = desk_client.request("DELETE", "/api/sessions?user=ann");
        let answer = request.header("Authorization", &format!("Bearer {TOKEN}")).send();
        let answered = Instant::now();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.text().contains(&SESSIONS.to_string()), "{}", answer.text());
        let served: Vec<_> = looking.into_iter().map(|thread| thread.join().unwrap()).collect();
        served
            .into_iter()
            .map(|served| {
                served.filter(|served| answered <= *served).inspect(|served| {
                    let late = *served - answered;
                    assert!(late < lease, "a revoked session is served {late:?} after the answer");
                    tell(&format!("revoked under load: served {late:?} after the answer"));
                })
            })
            .collect()
    });
    tell(&format!("revoked under load: {} of 8 clients were served once more", served.iter().flatten().count()));
    traffic.into_iter().for_each(Traffic::end);
}

#[test]
fn who_only_looks_at_the_login_page_leaves_nothing_in_redis() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let gateway = setup(&backend, &redis.url()).start();
    gateway.log_in("ann");
    // Besides the key of the instance that sweeps, which comes when it likes.
    let names = || {
        let names = redis.ask::<HashSet<String>>("KEYS *");
        names.into_iter().filter(|name| !name.ends_with(":lead")).collect::<HashSet<_>>()
    };
    let before = names();
    for number in 0..500 {
        let client = gateway.client();
        match number % 3 {
            0 => assert_eq!(client.navigate("/.cloakroom/login").send().status, 200),
            1 => assert_eq!(client.navigate("/deep?a=b").send().status, 302),
            _ => assert_eq!(client.get("/").send().status, 401),
        }
    }
    assert_eq!(names(), before, "who has not logged in is nowhere");
}

#[test]
fn a_busy_session_is_touched_once_in_a_while() {
    const REQUESTS: usize = 2_000;
    const THREADS: usize = 10;
    let (backend, redis) = (Backend::echo(), RedisServer::with(REMEMBERS_ALL_COMMANDS));
    let gateway = setup(&backend, &redis.url()).with("[session]\nidle_timeout = \"10s\"").start();
    let interval = Duration::from_secs(1);
    let cookie = gateway.log_in("ann").cookie("session").unwrap();
    let (begun, reads, started) = (writes(&redis, &cookie), redis.look_ups(), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let client = with_cookie(&gateway, &cookie);
            scope.spawn(move || {
                for _ in 0..REQUESTS / THREADS {
                    assert_eq!(client.get("/").send().status, 200);
                }
            });
        }
    });
    let intervals = started.elapsed().as_millis() / interval.as_millis() + 1;
    let (touches, reads) = (writes(&redis, &cookie) - begun, redis.look_ups() - reads);
    // The first one is sent twice, for the server does not know the script yet.
    assert!(touches as u128 <= intervals + 1, "{touches} touches in {intervals} intervals");
    // A touch reads in its script, and takes each worker's copy back; reads that meet it are not kept.
    assert!(reads < REQUESTS / 4, "{reads} reads for {REQUESTS} requests");
    tell(&format!(
        "a busy session: {touches} touches and {reads} reads for {REQUESTS} requests in {intervals} intervals"
    ));
}
