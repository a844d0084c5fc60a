//! What do users see in the night that Redis dies? (invariant 4) With a real server, under traffic.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Connection};
use crate::harness::gateway::{Gateway, PASSWORD, Setup, Store};
use crate::harness::redis::{KEEPS_ITS_DATA, REMEMBERS_ALL_COMMANDS, RedisServer};
use crate::harness::wait_until;

fn setup(backend: &Backend, redis: &RedisServer) -> Setup {
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/public", "access = \"public\"")
        .route("/optional", "access = \"optional\"")
        .store(Store::of(redis))
}

/// While the store cannot be asked: nobody is logged out, nobody is let in, and what needs no session works.
#[track_caller]
fn assert_it_is_a_bad_night(gateway: &Gateway, ann: &Client) {
    let cookie = ann.cookie("session");
    for target in ["/", "/optional"] {
        for request in [ann.get(target), ann.navigate(target)] {
            let response = request.send();
            assert_eq!(response.status, 503, "{target}: not a login page, not 401: {}", response.text());
            assert!(response.header("retry-after").is_some());
            assert!(response.headers("set-cookie").is_empty(), "the cookie stays");
            assert!(!response.text().to_lowercase().contains("redis"), "the class, not the cause");
        }
    }
    assert_eq!(ann.cookie("session"), cookie);
    assert_eq!(ann.get("/public").send().status, 200, "public routes work");
    assert_eq!(gateway.client().get("/optional").send().status, 200, "without a cookie there is nothing to ask");
    assert_eq!(gateway.client().get("/").send().status, 401, "nor here");
    let login = gateway.try_log_in(&gateway.client(), "ann", PASSWORD);
    assert_eq!(login.status, 503, "nobody is let in");
    assert!(login.headers("set-cookie").iter().all(|line| !line.starts_with("session=")));
}

/// Requests that go on all the while, in threads, and must each be right: the user's own page, or 503.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
    /// When the last request came that was.
    last_refused: Arc<Mutex<Option<Instant>>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Traffic {
    pub(crate) fn of(gateway: &Gateway, users: &[&str]) -> Self {
        let (stop, served, refused, last_refused) = Default::default();
        let mut traffic = Self { stop, served, refused, last_refused, threads: Vec::new() };
        for user in users {
            let (client, user) = (gateway.log_in(user), (*user).to_owned());
            let (stop, served, refused) =
                (Arc::clone(&traffic.stop), Arc::clone(&traffic.served), Arc::clone(&traffic.refused));
            let last_refused = Arc::clone(&traffic.last_refused);
            traffic.threads.push(std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let asked = Instant::now();
                    let response = client.get("/").send();
                    match response.status {
                        200 => {
                            assert_eq!(response.seen().headers("x-forwarded-user"), [user.as_str()], "one's own page");
                            served.fetch_add(1, Ordering::SeqCst);
                        }
                        503 => {
                            *last_refused.lock().unwrap() = Some(asked);
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                        status => panic!("{user} got {status}: {}", response.text()),
                    }
                }
            }));
        }
        traffic
    }

    #[track_caller]
    pub(crate) fn is_served(&self) {
        let before = self.served.load(Ordering::SeqCst);
        wait_until("users are served", || before + 20 < self.served.load(Ordering::SeqCst));
    }

    #[track_caller]
    pub(crate) fn is_refused(&self) {
        let before = self.refused.load(Ordering::SeqCst);
        wait_until("users are told to come back", || before + 5 < self.refused.load(Ordering::SeqCst));
    }

    /// When the last request came that was told to come back, if there was one.
    pub(crate) fn last_refused(&self) -> Option<Instant> {
        *self.last_refused.lock().unwrap()
    }

    #[track_caller]
    pub(crate) fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_killed_redis_logs_nobody_out() {
    let (backend, mut redis) = (Backend::echo(), RedisServer::with(KEEPS_ITS_DATA));
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.log_in("ann");
    let traffic = Traffic::of(&gateway, &["ann", "bob"]);
    traffic.is_served();
    redis.kill();
    traffic.is_refused();
    assert_it_is_a_bad_night(&gateway, &ann);
    redis.restart();
    traffic.is_served();
    traffic.end();
    wait_until("the gateway finds the store again", || ann.get("/").send().status == 200);
}

#[test]
fn a_frozen_redis_logs_nobody_out() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.log_in("ann");
    let traffic = Traffic::of(&gateway, &["ann", "bob"]);
    traffic.is_served();
    redis.pause();
    traffic.is_refused();
    assert_it_is_a_bad_night(&gateway, &ann);
    redis.resume();
    traffic.is_served();
    traffic.end();
    wait_until("the gateway finds the store again", || ann.get("/").send().status == 200);
}

#[test]
fn a_redis_that_comes_back_empty_sends_people_to_the_login_once() {
    let (backend, mut redis) = (Backend::echo(), RedisServer::start());
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.log_in("ann");
    assert_eq!(ann.get("/").send().status, 200);
    redis.kill();
    redis.restart_empty();
    wait_until("the store is asked again", || ann.get("/").send().status != 503);
    assert_eq!(ann.get("/").send().status, 401, "the store says that there is no such session");
    let page = ann.navigate("/deep?x=1").send();
    assert_eq!(page.status, 302);
    assert!(page.header("location").unwrap().contains("return_to=%2Fdeep%3Fx%3D1"), "{page:?}");
    assert_eq!(ann.cookie("session"), None, "only now the cookie goes");
    log_in_again(&gateway);
}

/// Each worker has a store connection of its own, and finds the store again by itself.
fn log_in_again(gateway: &Gateway) -> Client {
    let client = gateway.client();
    wait_until("somebody can log in", || gateway.try_log_in(&client, "ann", PASSWORD).status == 303);
    client
}

#[test]
fn a_record_that_cannot_be_read_takes_nobodys_cookie() {
    let backend = Backend::echo();
    let redis = RedisServer::start();
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.log_in("ann");
    let cookie = ann.cookie("session");
    let mut client = redis.client();
    let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*s:{*").query(&mut client).unwrap();
    let [name] = &names[..] else { panic!("one session: {names:?}") };
    let mut write_version = |version: u8| {
        let _: u64 = redis::cmd("SETRANGE").arg(name).arg(0).arg(&[version][..]).query(&mut client).unwrap();
    };

    write_version(3);
    let page = ann.navigate("/").send();
    assert_eq!((page.status, page.headers("set-cookie")), (302, vec![]), "nobody here, and maybe somebody elsewhere");
    assert_eq!(ann.get("/").send().status, 401);
    assert_eq!(ann.get("/optional").send().seen().headers("x-forwarded-user"), [""; 0]);
    assert_eq!(ann.navigate("/.cloakroom/login").send().status, 200);
    assert_eq!(ann.cookie("session"), cookie);
    write_version(1);
    assert_eq!(ann.get("/").send().seen().headers("x-forwarded-user"), ["ann"], "as after an update");
}

#[test]
fn a_gateway_that_starts_before_its_redis_serves_when_it_comes() {
    let (backend, mut redis) = (Backend::echo(), RedisServer::start());
    redis.kill();
    let gateway = setup(&backend, &redis).start();
    assert_eq!(gateway.client().get("/public").send().status, 200);
    assert_eq!(gateway.admin("/health/ready").status, 503, "not ready before the store has answered once");
    redis.restart();
    wait_until("the gateway is ready", || gateway.admin("/health/ready").status == 200);
    let ann = log_in_again(&gateway);
    wait_until("every worker has found the store", || ann.get("/").send().status == 200);
}

#[test]
fn sessions_outlive_the_gateway() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let gateway = setup(&backend, &redis).start();
    let cookie = gateway.log_in("ann").cookie("session").unwrap();
    gateway.stop();
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.client();
    ann.set_cookie("session", &cookie);
    assert_eq!(ann.get("/").send().seen().headers("x-forwarded-user"), ["ann"]);
}

#[test]
fn a_logout_on_one_gateway_counts_on_the_other_at_once_where_nothing_is_copied() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let uncached =
        || setup(&backend, &redis).store(Store::Redis(format!("url = \"{}\"\ncache = \"off\"", redis.url())));
    let (one, two) = (uncached().start(), uncached().start());
    let ann = one.log_in("ann");
    let elsewhere = two.client();
    elsewhere.set_cookie("session", &ann.cookie("session").unwrap());
    assert_eq!(elsewhere.get("/").send().status, 200);
    one.log_out(&ann);
    assert_eq!(elsewhere.get("/").send().status, 401);
}

#[test]
fn a_logout_that_the_store_did_not_hear_is_not_said_to_be_one() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.log_in("ann");
    let form = gateway.log_out_form(&ann);
    redis.pause();
    let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let response = ann.post_form("/.cloakroom/logout", &fields).send();
    assert_eq!(response.status, 503);
    assert!(ann.cookie("session").is_some(), "a cookie that may still be good is not taken back");
    redis.resume();
}

#[test]
fn a_public_route_and_a_malformed_cookie_cost_no_store_call() {
    let (backend, redis) = (Backend::echo(), RedisServer::with(REMEMBERS_ALL_COMMANDS));
    let gateway = setup(&backend, &redis).start();
    let ann = gateway.log_in("ann");
    let before = redis.look_ups();
    for _ in 0..10 {
        assert_eq!(ann.get("/public").send().status, 200);
    }
    let stranger = gateway.client();
    for malformed in ["x", "", "AA", &"A".repeat(44), &"A".repeat(46), &format!("{}!", "A".repeat(44)), "../../etc"] {
        stranger.set_cookie("session", malformed);
        assert_eq!(stranger.get("/").send().status, 401, "{malformed}");
    }
    let good = ann.cookie("session").unwrap();
    let twice = gateway.client().get("/").header("Cookie", &format!("session={good}; session={good}")).send();
    assert_eq!(twice.status, 401, "two cookies of our name are none");
    assert_eq!(redis.look_ups(), before, "none of these asked the store");
    assert_eq!(ann.get("/").send().status, 200);
    assert_eq!(redis.look_ups(), before + 1, "one request, one look-up");
}

#[test]
fn ten_thousand_cancelled_requests_confuse_nobody() {
    const USERS: usize = 8;
    const REQUESTS: usize = 10_000;
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let mut setup = setup(&backend, &redis);
    let names: Vec<_> = (0..USERS).map(|n| format!("user{n}")).collect();
    for name in &names {
        setup = setup.user(name, "");
    }
    let gateway = setup.start();
    let cookies: Vec<_> = names.iter().map(|name| gateway.log_in(name).cookie("session").unwrap()).collect();
    let (completed, wrong) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let (names, cookies, gateway, completed, wrong) = (&names, &cookies, &gateway, &completed, &wrong);
            scope.spawn(move || {
                for n in 0..REQUESTS / 16 {
                    let user = (thread + n) % USERS;
                    let request = format!("GET /{n} HTTP/1.1\r\nHost: a\r\nCookie: session={}\r\n\r\n", cookies[user]);
                    let mut connection = Connection::open(gateway.address());
                    let _ = connection.try_write(&request);
                    // From "at once" to "after the answer": where the cut falls is up to the machine.
                    match n % 5 {
                        0 => connection.reset(),
                        1 => drop(connection),
                        2 => {
                            std::thread::yield_now();
                            connection.reset();
                        }
                        _ => {
                            let response = connection.read_response("GET").unwrap();
                            let seen = response.seen();
                            if seen.headers("x-forwarded-user") != [names[user].as_str()]
                                || seen.target != format!("/{n}")
                            {
                                wrong.fetch_add(1, Ordering::SeqCst);
                            }
                            completed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0, "every completed answer is its own user's");
    assert!(REQUESTS * 2 / 5 <= completed.into_inner(), "and most of the rest completed");
    wait_until("no connection is left behind", || gateway.metric("cloakroom_connections") == 0.0);
}
