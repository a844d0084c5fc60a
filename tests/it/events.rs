//! Is somebody told when a session has ended? By exactly one instance, at least once, signed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cloakroom::session::id::SessionId;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;

use crate::harness::backend::{Answer, Backend, Request};
use crate::harness::client::Client;
use crate::harness::gateway::{Form, Gateway, PASSWORD, Setup, Store};
use crate::harness::redis::{KEEPS_ITS_DATA, RedisServer};
use crate::harness::wait_until;

const SECRET: &str = "a-secret-of-the-webhook-0123456789";
const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";

fn receiver() -> Backend {
    Backend::always(Answer::response(200, &[], "thanks"))
}

fn setup(backend: &Backend, receiver: &Backend) -> Setup {
    let tables = format!(
        "[events]\nwebhook = \"http://{}/ended\"\nwebhook_secret = \"{SECRET}\"\n\
         [admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\"",
        receiver.address()
    );
    Gateway::in_front_of(&[backend]).sweeping_quickly().with(&tables)
}

fn handle(client: &Client) -> String {
    SessionId::parse(&client.cookie("session").unwrap()).unwrap().key().log_hash()
}

fn revoke(gateway: &Gateway, client: &Client, user: &str) {
    let target = format!("/api/sessions/{}?user={user}", handle(client));
    let bearer = format!("Bearer {TOKEN}");
    let response =
        Client::of(gateway.admin_address()).request("DELETE", &target).header("Authorization", &bearer).send();
    assert_eq!(response.status, 200, "{}", response.text());
}

fn body(request: &Request) -> Value {
    serde_json::from_slice(&request.body).unwrap()
}

/// Session and ending of all that the receiver was told, each with how often.
fn told(receiver: &Backend) -> BTreeMap<(String, String), usize> {
    let mut told = BTreeMap::new();
    for request in receiver.requests() {
        let body = body(&request);
        let text = |name: &str| body[name].as_str().unwrap().to_owned();
        *told.entry((text("session"), text("ending"))).or_default() += 1;
    }
    told
}

#[track_caller]
fn assert_signed(request: &Request) {
    let signature = request.head.value("cloakroom-signature").expect("a signature");
    let (time, signed) = signature.strip_prefix("t=").unwrap().split_once(",v1=").unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
    mac.update(format!("{time}.").as_bytes());
    mac.update(&request.body);
    let expected: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(signed, expected, "of the time and of exactly these bytes");
}

fn each_end_is_told(store: Store) {
    let (backend, receiver) = (Backend::echo(), receiver());
    let gateway = setup(&backend, &receiver)
        .store(store)
        .with("[session]\nidle_timeout = \"3s\"\nabsolute_timeout = \"1h\"\nmax_per_user = 1")
        .start();
    let leaving = gateway.log_in("ann");
    let left = handle(&leaving);
    gateway.log_out(&leaving);
    let old = gateway.log_in("ann");
    let displaced = handle(&old);
    let new = gateway.log_in("ann");
    let revoked = handle(&new);
    revoke(&gateway, &new, "ann");
    let expired = handle(&gateway.log_in("bob"));

    receiver.after_requests(4);
    let expected = [(&left, "logged_out"), (&displaced, "displaced"), (&revoked, "revoked"), (&expired, "expired")];
    let expected = expected.map(|(session, ending)| ((session.clone(), ending.to_owned()), 1));
    assert_eq!(told(&receiver), BTreeMap::from(expected));
    let requests = receiver.requests();
    let ids: Vec<_> = requests.iter().map(|request| request.head.value("cloakroom-event-id").unwrap()).collect();
    for (request, id) in requests.iter().zip(&ids) {
        assert_eq!((request.method(), request.target()), ("POST", "/ended"));
        assert_eq!(request.head.value("content-type"), Some("application/json"));
        assert_eq!(body(request)["id"].as_str(), Some(*id));
        assert_eq!(ids.iter().filter(|other| *other == id).count(), 1, "each its own");
        assert_signed(request);
    }
    wait_until("all four are counted", || {
        ["logged_out", "displaced", "revoked", "expired"]
            .iter()
            .all(|ending| gateway.metric(&format!("cloakroom_session_ends_total{{ending=\"{ending}\"}}")) == 1.0)
    });
    assert_eq!(gateway.metric("cloakroom_events_delivered_total{result=\"told\"}"), 4.0);
}

#[test]
fn each_end_of_a_session_in_memory_is_told_with_its_reason() {
    each_end_is_told(Store::Memory);
}

#[test]
fn each_end_of_a_session_in_redis_is_told_with_its_reason() {
    let redis = RedisServer::start();
    each_end_is_told(Store::of(&redis));
}

#[test]
fn a_new_login_of_the_same_browser_is_a_replacement() {
    let (backend, receiver) = (Backend::echo(), receiver());
    let gateway = setup(&backend, &receiver).start();
    let ann = gateway.log_in("ann");
    let old = handle(&ann);
    // Who is logged in sees no form: this one was open before.
    let client = gateway.client();
    let form = Form::on(&client.navigate("/.cloakroom/login").send().text());
    client.set_cookie("session", &ann.cookie("session").unwrap());
    let fields = form.filled_in(&[("username", "bob"), ("password", PASSWORD)]);
    let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let response = client.post_form("/.cloakroom/login", &fields).send();
    assert_eq!(response.status, 303, "{}", response.text());
    let request = &receiver.after_requests(1)[0];
    assert_eq!(body(request)["session"], old);
    assert_eq!((&body(request)["user"], &body(request)["ending"]), (&"ann".into(), &"replaced".into()));
}

/// Answers what `status` says of the request with this number, from 0.
fn failing(status: impl Fn(usize) -> u16 + Send + Sync + 'static) -> Backend {
    let asked = AtomicUsize::new(0);
    Backend::answering(move |_| Answer::response(status(asked.fetch_add(1, Ordering::SeqCst)), &[], ""))
}

#[test]
fn a_receiver_that_fails_is_told_again_until_it_takes_it() {
    for status in [500, 503, 429, 404, 302] {
        let backend = Backend::echo();
        let receiver = failing(move |number| if number < 3 { status } else { 200 });
        let gateway = setup(&backend, &receiver).start();
        let client = gateway.log_in("ann");
        gateway.log_out(&client);
        let requests = receiver.after_requests(4);
        let ids: Vec<_> = requests.iter().map(|request| request.head.value("cloakroom-event-id").unwrap()).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "the same id each time: {ids:?}");
        wait_until("it is told", || gateway.metric("cloakroom_events_delivered_total{result=\"told\"}") == 1.0);
        let other = gateway.log_in("bob");
        gateway.log_out(&other);
        let next = receiver.after_requests(5).pop().unwrap();
        assert_eq!(body(&next)["user"], "bob", "{status}: what was taken is not told again");
    }
}

#[test]
fn a_receiver_that_is_gone_for_a_while_misses_nothing() {
    let (backend, receiver) = (Backend::echo(), receiver());
    let gateway = setup(&backend, &receiver).start();
    receiver.kill();
    let mut ended = Vec::new();
    for user in ["ann", "bob", "ann", "bob"] {
        let client = gateway.log_in(user);
        ended.push(((handle(&client), "logged_out".to_owned()), 1));
        gateway.log_out(&client);
    }
    wait_until("it was tried", || 0.0 < gateway.metric("cloakroom_events_delivered_total{result=\"away\"}"));
    receiver.revive();
    receiver.after_requests(4);
    assert_eq!(told(&receiver), ended.into_iter().collect());
}

#[test]
fn an_event_that_the_receiver_refuses_does_not_hold_up_those_of_other_users() {
    let backend = Backend::echo();
    let receiver = Backend::answering(|request| {
        let refused = String::from_utf8_lossy(&request.body).contains("\"user\":\"ann\"");
        Answer::response(if refused { 422 } else { 200 }, &[], "")
    });
    let mut setup = setup(&backend, &receiver);
    for n in 0..8 {
        setup = setup.user(&format!("user{n}"), "");
    }
    let gateway = setup.start();
    for user in ["ann", "user0", "user1", "user2", "user3", "user4", "user5", "user6", "user7"] {
        let client = gateway.log_in(user);
        gateway.log_out(&client);
    }
    // A user or two may be in the same part of the store, where order counts.
    wait_until("the others are told", || 5.0 < gateway.metric("cloakroom_events_delivered_total{result=\"told\"}"));
    wait_until("and ann's is tried again", || {
        1.0 < gateway.metric("cloakroom_events_delivered_total{result=\"refused\"}")
    });
}

#[test]
fn a_redirect_is_not_followed() {
    let (backend, elsewhere) = (Backend::echo(), receiver());
    let location = format!("http://{}/stolen", elsewhere.address());
    let receiver = Backend::always(Answer::response(307, &[("Location", &location)], ""));
    let gateway = setup(&backend, &receiver).start();
    let client = gateway.log_in("ann");
    gateway.log_out(&client);
    receiver.after_requests(2);
    assert_eq!(elsewhere.requests().len(), 0, "who has logged out is told to nobody but whom the file names");
}

#[test]
fn of_two_gateways_one_tells_and_the_other_takes_over() {
    let (redis, backend) = (RedisServer::with(KEEPS_ITS_DATA), Backend::echo());
    let receiver = Arc::new(receiver());
    let start = || setup(&backend, &receiver).store(Store::of(&redis)).start();
    let gateways = [start(), start()];
    let mut ended = Vec::new();
    for (number, user) in ["ann", "bob", "ann", "bob", "ann", "bob"].into_iter().enumerate() {
        let gateway = &gateways[number % 2];
        let client = gateway.log_in(user);
        ended.push(((handle(&client), "logged_out".to_owned()), 1));
        gateway.log_out(&client);
    }
    receiver.after_requests(6);
    assert_eq!(told(&receiver), ended.iter().cloned().collect(), "each once");

    let leads = |gateway: &Gateway| gateway.admin("/metrics").text().contains("\ncloakroom_sessions ");
    wait_until("one counts the sessions", || gateways.iter().any(leads));
    let [one, other] = gateways;
    let (leader, follower) = if leads(&one) { (one, other) } else { (other, one) };
    assert!(!leads(&follower), "and only one");
    leader.stop();
    let client = follower.log_in("ann");
    ended.push(((handle(&client), "logged_out".to_owned()), 1));
    follower.log_out(&client);
    receiver.after_requests(7);
    assert_eq!(told(&receiver), ended.into_iter().collect());
    wait_until("the follower leads", || leads(&follower));
}
