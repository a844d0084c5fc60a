//! Who is served while the store is down? Whom the operator wanted to serve, for as long as he said, and nobody else.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::directives::{obliging, say_to, told};
use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Response};
use crate::harness::gateway::{Gateway, PASSWORD, Setup, Store};
use crate::harness::provider::FakeProvider;
use crate::harness::redis::{KEEPS_ITS_DATA, RedisServer};
use crate::harness::wait_until;
use crate::oidc;

const ONE: &str = "T25lIGtleSBvZiB0aGUgdGVzdHMsIDMyIGJ5dGVzIDE=";
const TWO: &str = "VHdvIGtleXMgb2YgdGhlIHRlc3RzLCAzMiBieXRlIDI=";

/// A file of keys that ends with this value.
struct Keys(TempDir);

impl Keys {
    fn of(keys: &[&str]) -> Self {
        let folder = Self(TempDir::new().unwrap());
        folder.write(keys);
        folder
    }

    fn write(&self, keys: &[&str]) {
        std::fs::write(self.file(), keys.join("\n")).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("session.keys")
    }
}

/// One worker, so that what one request has found out is known to the next.
fn setup(backend: &Backend, redis: &RedisServer) -> Setup {
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/public", "access = \"public\"")
        .route("/strict", "fallback = false")
        .store(Store::of(redis))
        .with("[server]\nthreads = 1")
}

fn with_fallback(setup: Setup, keys: &Keys, lifetime: &str) -> Setup {
    let file = keys.file();
    setup.with(&format!("[session]\nkeys_file = {file:?}\n[session.fallback]\nlifetime = \"{lifetime}\""))
}

fn served(gateway: &Gateway, source: &str) -> f64 {
    gateway.metric(&format!("cloakroom_session_resolve_seconds_count{{result=\"{source}\"}}"))
}

#[track_caller]
fn is_served_as(response: &Response, user: &str) {
    assert_eq!(response.seen().headers("x-forwarded-user"), [user]);
}

/// A browser with these cookies and no others.
fn browser(gateway: &Gateway, session: &str, fallback: Option<&str>) -> Client {
    let client = gateway.client();
    client.set_cookie("session", session);
    fallback.inspect(|value| client.set_cookie("session-fallback", value));
    client
}

#[test]
fn the_sealed_cookie_says_who_it_is_while_redis_is_dead_and_only_then() {
    let (backend, mut redis, keys) = (Backend::echo(), RedisServer::with(KEEPS_ITS_DATA), Keys::of(&[ONE]));
    let gateway = with_fallback(setup(&backend, &redis), &keys, "5m").start();
    let (ann, bob) = (gateway.log_in("ann"), gateway.log_in("bob"));
    assert_eq!(ann.cookie("session-fallback"), None, "our own pages hand out none");
    let first = ann.get("/").send();
    assert_eq!(first.header("cache-control"), Some("private, no-store"));
    let field = first.headers("set-cookie").concat();
    assert!(field.contains("; HttpOnly") && field.contains("; Max-Age=300") && field.contains("; Path=/"), "{field}");
    let again = ann.get("/").send();
    assert_eq!((again.headers("set-cookie"), again.seen().headers("cookie")), (vec![], vec![]), "one is enough");
    let (ann_session, ann_sealed) = (ann.cookie("session").unwrap(), ann.cookie("session-fallback").unwrap());
    let bob_session = bob.cookie("session").unwrap();

    redis.kill();
    wait_until("the cookie counts", || ann.get("/").send().status == 200);
    is_served_as(&ann.get("/").send(), "ann");
    assert!(ann.get("/").send().seen().headers("cookie").is_empty(), "no backend sees it");
    assert!(0.0 < served(&gateway, "fallback"), "it is marked");
    assert_eq!(ann.get("/strict").send().status, 503, "not where the operator does not want it");
    assert_eq!(ann.get("/public").send().status, 200);
    assert_eq!(ann.get("/.cloakroom/session").send().status, 503, "our own endpoints do not believe it");
    assert_eq!(ann.navigate("/.cloakroom/logout").send().status, 503);
    assert!(ann.cookie("session").is_some() && ann.cookie("session-fallback").is_some());

    let mut forged = ann_sealed.clone().into_bytes();
    forged[40] = if forged[40] == b'A' { b'B' } else { b'A' };
    let cases = [
        ("without it", &*bob_session, None),
        ("moved to another session", &*bob_session, Some(&*ann_sealed)),
        ("forged", &*ann_session, Some(std::str::from_utf8(&forged).unwrap())),
        ("cut", &*ann_session, Some(&ann_sealed[..ann_sealed.len() - 1])),
        ("nonsense", &*ann_session, Some("nonsense")),
    ];
    for (what, session, sealed) in cases {
        let response = browser(&gateway, session, sealed).get("/").send();
        assert_eq!((response.status, response.headers("set-cookie")), (503, vec![]), "{what}");
    }
    let without_session = gateway.client();
    without_session.set_cookie("session-fallback", &ann_sealed);
    assert_eq!(without_session.get("/").send().status, 401, "alone it is nothing");
    let twice = format!("session={ann_session}; session-fallback={ann_sealed}; session-fallback={ann_sealed}");
    assert_eq!(gateway.client().get("/").header("Cookie", &twice).send().status, 503, "two are none");

    redis.restart();
    let before = served(&gateway, "fallback");
    wait_until("the store is asked again", || ann.get("/strict").send().status == 200);
    is_served_as(&browser(&gateway, &bob_session, Some(&ann_sealed)).get("/").send(), "bob");
    gateway.log_out(&ann);
    assert_eq!((ann.cookie("session"), ann.cookie("session-fallback")), (None, None), "a logout takes both");
    let thief = browser(&gateway, &ann_session, Some(&ann_sealed));
    assert_eq!(thief.get("/").send().status, 401);
    redis.kill();
    wait_until("the store is known to be down", || bob.get("/strict").send().status == 503);
    thief.set_cookie("session", &ann_session);
    thief.set_cookie("session-fallback", &ann_sealed);
    wait_until("the store's last word is forgotten", || {
        let status = thief.get("/").send().status;
        assert!([401, 503].contains(&status), "who logged out here stays logged out: {status}");
        status == 503
    });
    assert_eq!(served(&gateway, "fallback"), before);
}

/// It says who it is, and nothing of when and how they logged in.
#[test]
fn the_sealed_cookie_is_neither_a_strong_login_nor_a_young_one() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let (mut redis, keys) = (RedisServer::with(KEEPS_ITS_DATA), Keys::of(&[ONE]));
    let setup = oidc::gateway(&backend, &provider, "")
        .route("/", "")
        .route("/gold", "acr = [\"gold\"]")
        .route("/fresh", "max_age = \"10m\"")
        .store(Store::of(&redis))
        .with("[server]\nthreads = 1");
    let gateway = with_fallback(setup, &keys, "5m").start();
    let client = oidc::browser(&gateway);
    assert_eq!(oidc::log_in(&client, &provider, "/.cloakroom/oidc/fake/login?acr=gold").status, 303);
    for page in ["/gold", "/fresh"] {
        assert_eq!(client.get(page).send().status, 200, "{page}");
        assert_eq!(client.cookie("session-fallback"), None, "{page} has no use for it");
    }
    assert_eq!(client.get("/").send().status, 200);
    assert!(client.cookie("session-fallback").is_some());

    redis.kill();
    wait_until("the cookie counts", || client.get("/").send().status == 200);
    assert!(0.0 < served(&gateway, "fallback"));
    for page in ["/gold", "/fresh"] {
        for answer in [client.get(page).send(), client.navigate(page).send()] {
            assert_eq!(answer.status, 503, "{page}: the login is not too weak, nobody knows it: {}", answer.text());
            assert!(answer.header("retry-after").is_some() && answer.headers("set-cookie").is_empty(), "{page}");
        }
    }
    redis.restart();
    wait_until("it is known again", || client.get("/gold").send().status == 200);
    assert_eq!(client.get("/fresh").send().status, 200);
}

#[test]
fn the_sealed_cookie_counts_for_its_short_life() {
    let (backend, mut redis, keys) = (Backend::echo(), RedisServer::start(), Keys::of(&[ONE]));
    let gateway = with_fallback(setup(&backend, &redis), &keys, "3s").start();
    let ann = gateway.log_in("ann");
    ann.get("/").send();
    let cookies = (ann.cookie("session").unwrap(), ann.cookie("session-fallback").unwrap());
    redis.kill();
    let ann = browser(&gateway, &cookies.0, Some(&cookies.1));
    wait_until("it counts", || ann.get("/").send().status == 200);
    wait_until("it has ended", || ann.get("/").send().status == 503);
    for _ in 0..10 {
        assert_eq!(ann.get("/").send().status, 503, "and does not begin again");
    }
}

#[test]
fn who_is_taken_from_the_users_file_is_nobody_during_an_outage_too() {
    let (backend, mut redis, keys) = (Backend::echo(), RedisServer::start(), Keys::of(&[ONE]));
    let gateway = with_fallback(setup(&backend, &redis), &keys, "5m").user("eve", "").start();
    let eve = gateway.log_in("eve");
    eve.get("/").send();
    redis.kill();
    wait_until("the cookie counts", || eve.get("/").send().status == 200);
    gateway.reload(|setup| setup.without_users().user("eve", "disabled = true")).unwrap();
    assert_eq!(eve.get("/").send().status, 401, "the file is asked at each request");
}

#[test]
fn no_cache_is_given_somebodys_cookie() {
    let backend = Backend::answering(|request| match request.target() {
        "/public-page" => Answer::response(200, &[("cache-control", "public, max-age=60")], "x"),
        "/mine" => Answer::response(200, &[("cache-control", "max-age=60, Private")], "x"),
        "/fields" => Answer::response(200, &[("cache-control", "private=\"x-a\"")], "x"),
        "/expires" => Answer::response(200, &[("expires", "Thu, 01 Jan 2099 00:00:00 GMT")], "x"),
        "/unchanged" => Answer::response(304, &[("cache-control", "private")], ""),
        _ => Answer::response(200, &[], "x"),
    });
    let (redis, keys) = (RedisServer::start(), Keys::of(&[ONE]));
    let setup = setup(&backend, &redis).route("/unguarded", "cache_guard = false");
    let gateway = with_fallback(setup, &keys, "5m").start();
    for (target, hands_out) in [
        ("/public-page", false),
        ("/fields", false),
        ("/expires", false),
        ("/unchanged", false),
        ("/strict", false),
        ("/public", false),
        ("/mine", true),
        ("/unguarded", true),
        ("/", true),
    ] {
        let ann = gateway.log_in("ann").allowing("expires");
        let response = ann.get(target).send();
        assert_eq!(!response.headers("set-cookie").is_empty(), hands_out, "{target}");
        let says = response.header("cache-control").unwrap_or_default().to_lowercase();
        assert!(!hands_out || says.contains("private"), "{target}: {says}");
    }
}

/// What was noted changes the record, and a record that changed may have ended for all that anybody knows.
#[test]
fn who_was_seen_after_a_note_is_served_where_only_notes_are_read() {
    let (backend, mut redis, keys) = (obliging(), RedisServer::with(KEEPS_ITS_DATA), Keys::of(&[ONE]));
    let shop = setup(&backend, &redis).route("/shop", "directives = [\"attributes\"]");
    let gateway = with_fallback(shop, &keys, "5m").start();
    let ann = gateway.log_in("ann");
    assert_eq!(say_to(&ann, "/shop", &[("Session-Set", "cart=\"1\"")]).status, 200);
    assert_eq!(told(&ann, "/shop"), ("cart=\"1\"".to_owned(), "ann".to_owned()));
    redis.kill();
    wait_until("the cookie counts", || ann.get("/shop").send().status == 200);
    assert_eq!(told(&ann, "/shop").1, "ann");
}

#[test]
fn keys_are_rotated_without_a_logout_and_a_removed_key_ends_its_sessions() {
    let (backend, redis, keys) = (Backend::echo(), RedisServer::start(), Keys::of(&[ONE]));
    let file = keys.file();
    let session = format!("[session]\nkeys_file = {file:?}\nseal_records = \"on\"");
    let gateway = setup(&backend, &redis).with(&session).start();
    let ann = gateway.log_in("ann");
    is_served_as(&ann.get("/").send(), "ann");
    let rotate = |to: &[&str]| {
        keys.write(to);
        gateway.reload(|setup| setup)
    };
    for step in [&[ONE, TWO][..], &[TWO, ONE]] {
        rotate(step).unwrap();
        is_served_as(&ann.get("/").send(), "ann");
    }
    let told = rotate(&[TWO, "no key"]).unwrap_err();
    assert!(told.contains("session.keys:2:1: not a key") && !told.contains(TWO), "{told}");
    is_served_as(&ann.get("/").send(), "ann");
    let bob = gateway.log_in("bob");

    rotate(&[TWO]).unwrap();
    is_served_as(&bob.get("/").send(), "bob");
    // An instance that has read neither of the two before.
    let late = setup(&backend, &redis).with(&session).start();
    let [ann, bob] = [&ann, &bob].map(|client| browser(&late, &client.cookie("session").unwrap(), None));
    is_served_as(&bob.get("/").send(), "bob");
    let page = ann.navigate("/").send();
    assert_eq!((page.status, page.headers("set-cookie")), (302, vec![]), "nobody, who keeps the cookie");
    keys.write(&[TWO, ONE]);
    late.reload(|setup| setup).unwrap();
    is_served_as(&ann.get("/").send(), "ann");
}

#[test]
fn a_sealed_record_tells_nothing_and_a_planted_one_counts_for_nobody() {
    let (backend, redis, keys) = (Backend::echo(), RedisServer::start(), Keys::of(&[ONE]));
    let file = keys.file();
    let session = |sealing: &str| format!("[session]\nkeys_file = {file:?}\nseal_records = \"{sealing}\"");
    let sessions = || -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut client = redis.client();
        let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*s:{*").query(&mut client).unwrap();
        let value = |name: &Vec<u8>| redis::cmd("GET").arg(name).query(&mut redis.client()).unwrap();
        names.into_iter().map(|name| (name.clone(), value(&name))).collect()
    };
    let plain = setup(&backend, &redis).with(&session("off")).start();
    let before = plain.log_in("ann").cookie("session").unwrap();
    plain.stop();
    let open = setup(&backend, &redis).with(&session("on")).start();
    is_served_as(&browser(&open, &before, None).get("/").send(), "ann");
    let after = open.log_in("ann").cookie("session").unwrap();
    open.stop();
    let is_sealed = |value: &[u8]| value[0] == 129 && !value.windows(3).any(|bytes| bytes == b"ann");
    let sealed: Vec<_> = sessions().into_iter().filter(|(_, value)| is_sealed(value)).collect();
    assert_eq!((sessions().len(), sealed.len()), (2, 1), "the one of before is as it was");

    let strict = setup(&backend, &redis).with(&session("only")).start();
    is_served_as(&browser(&strict, &after, None).get("/").send(), "ann");
    assert_eq!(browser(&strict, &before, None).get("/").send().status, 401, "whoever wrote it");
    assert_eq!(strict.try_log_in(&strict.client(), "ann", PASSWORD).status, 303);
}

#[test]
fn grace_serves_who_was_just_here_for_a_while() {
    let (backend, mut redis) = (Backend::echo(), RedisServer::with(KEEPS_ITS_DATA));
    let gateway = setup(&backend, &redis).with("[store]\ngrace = \"3s\"").start();
    let (ann, bob) = (gateway.log_in("ann"), gateway.log_in("bob"));
    wait_until("there is a copy", || {
        ann.get("/").send();
        0.0 < served(&gateway, "copy")
    });
    let gone = gateway.log_in("bob");
    is_served_as(&gone.get("/").send(), "bob");
    let cookie = gone.cookie("session").unwrap();
    gateway.log_out(&gone);

    redis.kill();
    wait_until("the copy counts", || ann.get("/").send().status == 200 && 0.0 < served(&gateway, "grace"));
    is_served_as(&ann.get("/strict").send(), "ann");
    assert_eq!(bob.get("/").send().status, 503, "of whom nothing is known");
    assert_eq!(browser(&gateway, &cookie, None).get("/").send().status, 503, "who logged out stays logged out");
    assert_eq!(ann.get("/.cloakroom/session").send().status, 200, "known here, as on every route");
    wait_until("the grace is over", || ann.get("/").send().status == 503);
    for _ in 0..10 {
        assert_eq!(ann.get("/").send().status, 503, "and does not begin again");
    }
    assert!(ann.cookie("session").is_some());
    redis.restart();
    wait_until("the store is asked again", || ann.get("/").send().status == 200);
}
