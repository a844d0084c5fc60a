//! What does a user notice of their other sessions, and the store of their use? Only what the operator asked for.

use crate::harness::backend::Backend;
use crate::harness::gateway::{Gateway, PASSWORD, Setup, Store};
use crate::harness::redis::RedisServer;
use crate::harness::wait_until;

fn setup(backend: &Backend, store: Store, session: &str) -> Setup {
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/poll", "touch = false")
        .store(store)
        .with(&format!("[session]\n{session}"))
}

#[test]
fn who_was_displaced_is_told_why() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    for store in [Store::Memory, Store::of(&redis)] {
        let gateway = setup(&backend, store.clone(), "max_per_user = 1").start();
        let (first, bob) = (gateway.log_in("ann"), gateway.log_in("bob"));
        assert_eq!(first.get("/").send().status, 200);
        let second = gateway.log_in("ann");
        assert_eq!(second.get("/").send().status, 200);
        wait_until("the first one has ended", || first.get("/").send().status == 401);
        let sent = first.navigate("/a?b").send();
        let location = sent.header("location").unwrap().to_owned();
        assert!(location.ends_with("?return_to=%2Fa%3Fb&reason=displaced"), "{store:?}: {location}");
        assert_eq!(first.cookie("session"), None);
        let page = first.navigate(&location).send().text();
        assert!(page.contains("role=\"status\">You were logged out here because you logged in elsewhere"), "{page}");
        assert_eq!(bob.get("/").send().status, 200, "another user is not concerned");
    }
}

#[test]
fn who_has_as_many_sessions_as_one_may_have_is_told_what_to_do() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    for store in [Store::Memory, Store::of(&redis)] {
        let gateway = setup(&backend, store, "max_per_user = 2\nwhen_full = \"refuse\"").start();
        let (first, second) = (gateway.log_in("ann"), gateway.log_in("ann"));
        let refused = gateway.try_log_in(&gateway.client(), "ann", PASSWORD);
        assert_eq!(refused.status, 403);
        assert!(refused.text().contains("logged in 2 times elsewhere"), "{}", refused.text());
        assert!(refused.headers("set-cookie").iter().all(|line| !line.starts_with("session=")));
        assert_eq!(gateway.metric("cloakroom_logins_total{method=\"password\",result=\"full\"}"), 1.0);
        for client in [&first, &second] {
            assert_eq!(client.get("/").send().status, 200, "nobody made room");
        }
        gateway.log_out(&first);
        gateway.log_in("ann");
    }
}

#[test]
fn who_comes_with_a_session_of_yesterday_is_told_that_it_ended() {
    let backend = Backend::echo();
    let gateway = setup(&backend, Store::Memory, "").start();
    let stale = gateway.client();
    stale.set_cookie("session", &format!("AA{}", "A".repeat(43)));
    let sent = stale.navigate("/").send();
    assert_eq!(sent.header("location"), Some("/.cloakroom/login?return_to=%2F&reason=expired"));
    let fresh = gateway.client().navigate("/").send();
    assert_eq!(fresh.header("location"), Some("/.cloakroom/login?return_to=%2F"), "who had none is told nothing");
    let ann = gateway.log_in("ann");
    gateway.log_out(&ann);
    assert_eq!(ann.navigate("/").send().header("location"), Some("/.cloakroom/login?return_to=%2F"));
}

#[test]
fn polling_keeps_nobody_logged_in_and_use_does() {
    let backend = Backend::echo();
    let gateway = setup(&backend, Store::Memory, "idle_timeout = \"3s\"\nsilent_header = \"X-Session-Silent\"").start();
    let [busy, silent, poller] = ["ann", "ann", "ann"].map(|user| gateway.log_in(user));
    let seen = silent.get("/").header("X-Session-Silent", "1").send().seen();
    assert_eq!(seen.headers("x-session-silent"), ["1"], "it is the application's own");
    wait_until("those who only poll are gone", || {
        assert_eq!(busy.get("/").send().status, 200, "who uses the session keeps it");
        let silent = silent.get("/").header("X-Session-Silent", "1").send().status;
        let poller = poller.get("/poll").send().status;
        (silent, poller) == (401, 401)
    });
}

#[test]
fn the_trail_of_a_session_is_kept_beside_it_and_holds_no_path() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let gateway = setup(&backend, Store::of(&redis), "idle_timeout = \"10s\"\nactivity = 5").start();
    let ann = gateway.log_in("ann");
    for n in 0..10 {
        assert_eq!(ann.get(&format!("/secret-{n}")).send().status, 200);
    }
    let entries = || -> Vec<Vec<u8>> {
        let mut client = redis.client();
        let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*a:{*").query(&mut client).unwrap();
        names
            .iter()
            .flat_map(|name| -> Vec<Vec<u8>> {
                redis::cmd("LRANGE").arg(name).arg(0).arg(-1).query(&mut redis.client()).unwrap()
            })
            .collect()
    };
    wait_until("it is written", || !entries().is_empty());
    assert!(entries().len() <= 2, "one route, one address: one entry per worker and interval");
    assert!(entries().iter().all(|entry| !entry.windows(6).any(|bytes| bytes == b"secret")));
}
