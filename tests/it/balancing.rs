//! Who gets the next request? By weight, load or hash; never who is down, drained or full.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection};
use crate::harness::gateway::{Gateway, Setup};
use crate::harness::http2::{Http2Backend, Http2Client};
use crate::harness::{tls, wait_until};

const PUBLIC: &str = "access = \"public\"";

fn public(backends: &[(&Backend, &str)], keys: &str) -> Setup {
    Gateway::in_front_of(&[]).weighted_pool("app", backends, keys).route("/", PUBLIC)
}

/// Who answers how often.
fn shares(client: &Client, times: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..times {
        *shares.entry(client.get("/").send().seen().backend).or_default() += 1;
    }
    shares
}

fn of(shares: &BTreeMap<String, usize>, backend: &Backend) -> usize {
    shares.get(backend.name()).copied().unwrap_or_default()
}

/// The value of a metric of one backend of the pool `app`.
fn metric(gateway: &Gateway, name: &str, backend: &Backend) -> f64 {
    gateway.metric(&format!("cloakroom_backend_{name}{{backend=\"{}\",pool=\"app\"}}", backend.address()))
}

fn echo_after_step() -> Backend {
    Backend::always(Answer::AfterStep(Box::new(Answer::Echo)))
}

/// Asks for `/` and does not wait for the answer.
fn ask(gateway: &Gateway) -> Connection {
    let mut connection = Connection::open(gateway.address());
    connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    connection
}

/// A backend whose `/health` has the status that the number says, while `/` echoes.
fn checked_backend() -> (Backend, Arc<AtomicU16>) {
    let health = Arc::new(AtomicU16::new(200));
    let status = Arc::clone(&health);
    let backend = Backend::answering(move |request| match request.target() {
        "/health" => Answer::response(status.load(Ordering::SeqCst), &[], "all is well here"),
        _ => Answer::Echo,
    });
    (backend, health)
}

#[test]
fn weights_are_exact_over_a_period_across_connections_and_workers() {
    let (large, small) = (Backend::echo(), Backend::echo());
    let gateway = public(&[(&large, "weight = 3"), (&small, "")], "").start();
    for _ in 0..5 {
        let shares = shares(&gateway.client(), 8);
        assert_eq!((of(&shares, &large), of(&shares, &small)), (6, 2));
    }
    assert_eq!(metric(&gateway, "weight", &large), 3.0);
}

#[test]
fn a_backup_answers_when_nobody_else_can() {
    let (usual, backup) = (Backend::echo(), Backend::echo());
    let gateway = public(&[(&usual, ""), (&backup, "backup = true")], "").start();
    let client = gateway.client();
    assert_eq!(of(&shares(&client, 6), &usual), 6);
    usual.kill();
    assert_eq!(of(&shares(&client, 6), &backup), 6);
    usual.revive();
    wait_until("the usual one answers again", || of(&shares(&client, 1), &usual) == 1);
}

#[test]
fn a_drained_backend_finishes_what_it_has_and_gets_nothing_new() {
    let (leaving, staying) = (echo_after_step(), Backend::echo());
    let gateway = public(&[(&leaving, "")], "").start();
    let mut begun = ask(&gateway);
    leaving.after_requests(1);
    let draining = |setup: Setup| setup.weighted_pool("app", &[(&leaving, "drain = true"), (&staying, "")], "");
    gateway.reload(draining).unwrap();
    assert_eq!(of(&shares(&gateway.client(), 6), &staying), 6);
    assert_eq!((metric(&gateway, "draining", &leaving), metric(&gateway, "in_flight", &leaving)), (1.0, 1.0));
    leaving.step();
    assert_eq!(begun.read_response("GET").unwrap().seen().backend, leaving.name());
    wait_until("it can be switched off", || metric(&gateway, "in_flight", &leaving) == 0.0);

    gateway.reload(|setup| setup.weighted_pool("app", &[(&leaving, "drain = true")], "")).unwrap();
    let response = gateway.client().get("/").send();
    assert_eq!((response.status, response.header("retry-after")), (503, Some("2")), "not even when there is no other");
}

#[test]
fn a_reload_keeps_what_is_known_of_a_backend() {
    let (slow, dead) = (echo_after_step(), Backend::echo());
    let gateway = public(&[(&slow, ""), (&dead, "")], "eject.time = \"1h\"\neject.time_max = \"1h\"").start();
    dead.kill();
    let mut begun = ask(&gateway);
    slow.after_requests(1);
    let mut second = ask(&gateway);
    slow.after_requests(2);
    wait_until("the dead one is known to be", || {
        metric(&gateway, "up", &dead) == 0.0 || {
            slow.step();
            drop(ask(&gateway));
            false
        }
    });
    let weights = [(&slow, "weight = 5"), (&dead, "weight = 7")];
    gateway.reload(|setup| setup.weighted_pool("app", &weights, "read_timeout = \"50s\"")).unwrap();
    assert_eq!((metric(&gateway, "weight", &slow), metric(&gateway, "weight", &dead)), (5.0, 7.0));
    assert_eq!(metric(&gateway, "up", &dead), 0.0, "it does not begin anew");
    assert!(1.0 <= metric(&gateway, "in_flight", &slow), "nor do the requests");
    for _ in 0..64 {
        slow.step();
    }
    for connection in [&mut begun, &mut second] {
        assert_eq!(connection.read_response("GET").unwrap().status, 200);
    }
    wait_until("all have ended", || metric(&gateway, "in_flight", &slow) == 0.0);
}

#[test]
fn a_request_is_in_flight_from_its_attempt_to_its_end_however_it_ends() {
    let (dying, slow) = (Backend::always(Answer::AfterStep(Box::new(Answer::close()))), echo_after_step());
    let gateway = public(&[(&dying, "weight = 2"), (&slow, "")], "").start();
    let flights = || (metric(&gateway, "in_flight", &dying), metric(&gateway, "in_flight", &slow));
    let mut moved_on = ask(&gateway);
    dying.after_requests(1);
    assert_eq!(flights(), (1.0, 0.0));
    dying.step();
    slow.after_requests(1);
    wait_until("the request has moved on", || flights() == (0.0, 1.0));
    slow.step();
    assert_eq!(moved_on.read_response("GET").unwrap().status, 200);
    wait_until("the request has ended", || flights() == (0.0, 0.0));

    let sockets = Backend::echo();
    gateway.reload(|setup| setup.pool("app", &[&sockets], "")).unwrap();
    let socket = gateway.client().web_socket("/", &[]).unwrap();
    wait_until("an open socket counts", || metric(&gateway, "in_flight", &sockets) == 1.0);
    drop(socket);
    wait_until("a closed one does not", || metric(&gateway, "in_flight", &sockets) == 0.0);

    let silent = echo_after_step();
    gateway.reload(|setup| setup.pool("app", &[&silent], "")).unwrap();
    let vanishing = ask(&gateway);
    silent.after_requests(1);
    assert_eq!(metric(&gateway, "in_flight", &silent), 1.0);
    vanishing.reset();
    wait_until("a client that has vanished waits for nothing", || metric(&gateway, "in_flight", &silent) == 0.0);
}

#[test]
fn when_all_are_full_a_request_is_told_when_to_come_back() {
    let (one, two) = (echo_after_step(), echo_after_step());
    let gateway = public(&[(&one, "max_requests = 1"), (&two, "max_requests = 1")], "").start();
    let mut begun = [ask(&gateway), ask(&gateway)];
    one.after_requests(1);
    two.after_requests(1);
    let response = gateway.client().get("/").send();
    assert_eq!((response.status, response.header("retry-after")), (503, Some("2")));
    assert!(response.text().contains("\"overloaded\""), "{}", response.text());
    one.step();
    two.step();
    for connection in &mut begun {
        assert_eq!(connection.read_response("GET").unwrap().status, 200);
    }
    assert_eq!(gateway.metric("cloakroom_queue_seconds_count{pool=\"app\",result=\"full\"}"), 1.0);
}

#[test]
fn who_waits_in_the_queue_is_served_as_soon_as_there_is_room() {
    let only = echo_after_step();
    let gateway = public(&[(&only, "max_requests = 1")], "queue = 2\nqueue_timeout = \"1h\"").start();
    let mut waiting = [ask(&gateway), ask(&gateway), ask(&gateway)];
    let queue = || gateway.metric("cloakroom_queue_waiting{pool=\"app\"}");
    wait_until("two wait", || queue() == 2.0);
    assert_eq!(gateway.client().get("/").send().status, 503, "there is no room for a third");
    assert_eq!(only.requests().len(), 1, "one at a time");
    for served in 1..=3 {
        only.after_requests(served);
        only.step();
    }
    for connection in &mut waiting {
        assert_eq!(connection.read_response("GET").unwrap().status, 200);
    }
    assert_eq!(queue(), 0.0);
    assert_eq!(gateway.metric("cloakroom_queue_seconds_count{pool=\"app\",result=\"served\"}"), 2.0);
}

#[test]
fn who_leaves_the_queue_gives_the_place_back() {
    let only = echo_after_step();
    let keys = "queue = 1\nqueue_timeout = \"1h\"";
    let gateway =
        public(&[(&only, "max_requests = 1")], keys).tls().with("[[listener]]\naddress = \"127.0.0.1:0\"").start();
    let queue = || gateway.metric("cloakroom_queue_waiting{pool=\"app\"}");
    let (plain, secure) = (gateway.further_address(1), gateway.address());
    let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let ask = |mut connection: Connection, request: &str| {
        connection.write(request);
        connection
    };
    let mut begun = ask(Connection::open(plain), get);
    only.after_requests(1);
    let http2 = Http2Client::connect(secure, &tls::trust());
    let waits = || wait_until("it waits", || queue() == 1.0);
    let upload = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nthe beginning";
    let ways: [(&str, &dyn Fn()); 6] = [
        ("closed", &|| {
            let _leaving = ask(Connection::open(plain), get);
            waits();
        }),
        ("reset", &|| {
            let leaving = ask(Connection::open(plain), get);
            waits();
            leaving.reset();
        }),
        ("closed amid an upload", &|| {
            let _leaving = ask(Connection::open(plain), upload);
            waits();
        }),
        ("closed in TLS", &|| {
            let _leaving = ask(Connection::open_as(secure, "localhost", &tls::trust()).unwrap(), get);
            waits();
        }),
        ("taken back in HTTP/2", &|| {
            let _leaving = http2.begin("GET", "/", &[], true).unwrap();
            waits();
        }),
        ("closed in HTTP/2", &|| {
            let http2 = Http2Client::connect(secure, &tls::trust());
            let _leaving = http2.begin("POST", "/", &[], false).unwrap();
            waits();
        }),
    ];
    for (left, (way, leave)) in ways.iter().enumerate() {
        leave();
        wait_until(&format!("the place is free: {way}"), || queue() == 0.0);
        let result = "cloakroom_queue_seconds_count{pool=\"app\",result=\"left\"}";
        wait_until(&format!("it is counted: {way}"), || gateway.metric(result) == (left + 1) as f64);
    }
    let gone = "cloakroom_requests_total{outcome=\"client_gone\",route=\"/\",status=\"0\"}";
    wait_until("each is in the log", || gateway.metric(gone) == ways.len() as f64);
    let mut patient = ask(Connection::open(plain), "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
    waits();
    only.step();
    assert_eq!(begun.read_response("GET").unwrap().status, 200);
    only.after_requests(2);
    only.step();
    let seen = patient.read_response("POST").unwrap().seen();
    assert_eq!((seen.method.as_str(), seen.body_bytes), ("POST", 5), "nothing was taken of who stays");
    assert_eq!(only.requests().len(), 2, "nobody who has left met the backend");
}

#[test]
fn nobody_waits_in_the_queue_for_longer_than_its_time() {
    let only = echo_after_step();
    let gateway = public(&[(&only, "max_requests = 1")], "queue = 2\nqueue_timeout = \"50ms\"").start();
    let _begun = ask(&gateway);
    only.after_requests(1);
    assert_eq!(gateway.client().get("/").send().status, 503);
    assert_eq!(gateway.metric("cloakroom_queue_seconds_count{pool=\"app\",result=\"timeout\"}"), 1.0);
}

#[test]
fn the_least_busy_backend_gets_the_next_request() {
    for balance in ["least_requests", "power_of_two"] {
        let (busy, free) = (echo_after_step(), Backend::echo());
        let gateway = public(&[(&busy, ""), (&free, "")], &format!("balance = \"{balance}\"")).start();
        let mut held = Vec::new();
        while busy.requests().is_empty() {
            held.push(ask(&gateway));
            wait_until("it has got somewhere", || held.len() <= busy.requests().len() + free.requests().len());
        }
        wait_until("the rest is done", || metric(&gateway, "in_flight", &free) == 0.0);
        assert_eq!(of(&shares(&gateway.client(), 20), &free), 20, "{balance}");
    }
}

#[test]
fn what_hashes_alike_meets_the_same_backend() {
    let backends: Vec<_> = (0..4).map(|_| Backend::echo()).collect();
    let pool: Vec<_> = backends.iter().collect();
    let gateway = Gateway::in_front_of(&[])
        .pool("app", &pool, "balance = \"hash\"\nhash_by = \"header:X-Tenant\"")
        .pool("users", &pool, "balance = \"hash\"")
        .pool("clients", &pool, "balance = \"hash\"\nhash_by = \"client\"")
        .route("/", PUBLIC)
        .route("/users", "pool = \"users\"")
        .route("/clients", "access = \"public\"\npool = \"clients\"")
        .with("[server]\nthreads = 2\ntrusted_proxies = [\"127.0.0.1\"]")
        .start();
    let tenant = |number: usize| {
        let client = gateway.client();
        client.get("/").header("X-Tenant", &format!("tenant {number}")).send().seen().backend
    };
    let first: Vec<_> = (0..20).map(tenant).collect();
    assert_eq!(first, (0..20).map(tenant).collect::<Vec<_>>(), "whatever the connection");
    assert!(first.iter().any(|backend| *backend != first[0]), "not all to one");

    let (ann, bob) = (gateway.log_in("ann"), gateway.log_in("bob"));
    for user in [&ann, &bob] {
        let backend = |_| user.get("/users").send().seen().backend;
        let met: Vec<_> = (0..6).map(backend).collect();
        assert!(met.iter().all(|backend| *backend == met[0]), "{met:?}");
    }
    let address = |number: usize| {
        let sending = gateway.client();
        sending.get("/clients").header("X-Forwarded-For", &format!("192.0.2.{number}")).send().seen().backend
    };
    let first: Vec<_> = (0..20).map(address).collect();
    assert_eq!(first, (0..20).map(address).collect::<Vec<_>>());
    assert!(first.iter().any(|backend| *backend != first[0]), "not all to one");
}

#[test]
fn a_backend_whose_checks_fail_gets_no_requests_until_they_pass() {
    let ((sick, health), well) = (checked_backend(), Backend::echo());
    let keys = "[pool.app.check]\npath = \"/health\"\ninterval = \"100ms\"\ntimeout = \"20s\"\nfall = 2";
    let gateway = public(&[(&sick, ""), (&well, "")], keys).start();
    let client = gateway.client();
    health.store(500, Ordering::SeqCst);
    wait_until("its checks say that it is down", || metric(&gateway, "up", &sick) == 0.0);
    assert_eq!(of(&shares(&client, 6), &well), 6);
    health.store(200, Ordering::SeqCst);
    wait_until("its checks say that it is up", || metric(&gateway, "up", &sick) == 1.0);
    assert_eq!(of(&shares(&client, 6), &sick), 3);
    let checks = |result: &str| {
        let labels = format!("backend=\"{}\",pool=\"app\",result=\"{result}\"", sick.address());
        gateway.metric(&format!("cloakroom_backend_checks_total{{{labels}}}"))
    };
    assert!(1.0 <= checks("failed") && 2.0 <= checks("passed"));
}

#[test]
fn a_check_asks_for_what_it_is_told_to() {
    for (keys, expected) in [
        ("check.path = \"/health\"", true),
        ("check.path = \"/elsewhere\"", true),
        ("check.path = \"/health\"\ncheck.body = \"all is well\"", true),
        ("check.path = \"/health\"\ncheck.body = \"all is lost\"", false),
        ("check.path = \"/health\"\ncheck.statuses = \"204\"", false),
        ("check.path = \"/health\"\ncheck.statuses = \"200-399\"\ncheck.host = \"app.example.org\"", true),
        ("check.path = \"/health\"\ncheck.tls = true", false),
        ("check.path = \"/health\"\ncheck.port = 1", false),
        ("[pool.app.check]", true),
    ] {
        let (backend, _) = checked_backend();
        let gateway = public(&[(&backend, "")], keys).start();
        let result = if expected { "passed" } else { "failed" };
        let labels = format!("backend=\"{}\",pool=\"app\",result=\"{result}\"", backend.address());
        wait_until("it has been asked", || {
            gateway.metric(&format!("cloakroom_backend_checks_total{{{labels}}}")) != 0.0
        });
        assert_eq!(metric(&gateway, "up", &backend), f64::from(u8::from(expected)), "{keys}: the first answer counts");
        if keys.contains("host") {
            assert_eq!(backend.requests()[0].head.values("host"), ["app.example.org"]);
        } else if keys.contains("path") && !keys.contains("tls") && !keys.contains("port") {
            assert_eq!(backend.requests()[0].head.values("host"), [backend.address().to_string()]);
        }
        assert_eq!(gateway.client().get("/").send().status, 200, "{keys}: the only one is tried all the same");
    }
}

#[test]
fn a_check_goes_as_requests_do_unless_it_is_told_otherwise() {
    // Another gateway is the backend: its certificate is nobody's that this machine trusts.
    let behind = Gateway::in_front_of(&[&Backend::echo()]).tls().start();
    let http2 = Http2Backend::start();
    let page = "path = \"/.cloakroom/login\"";
    for (address, pool, check, result) in [
        (behind.address(), "", page, "failed"),
        (behind.address(), "", &*format!("{page}\ntls = true"), "failed"),
        (behind.address(), "", &*format!("{page}\ntls = true\nverify = false"), "passed"),
        (behind.address(), "tls = {}", page, "failed"),
        (behind.address(), "tls = { verify = false }", page, "passed"),
        (behind.address(), "tls = { verify = false }", "", "passed"),
        (behind.address(), "tls = { verify = false }\nprotocol = \"auto\"", page, "passed"),
        (behind.address(), "tls = { verify = false }", &*format!("{page}\ntls = false"), "failed"),
        (http2.address(), "protocol = \"http2\"", "path = \"/health\"", "passed"),
        (http2.address(), "", "path = \"/health\"", "failed"),
    ] {
        let tables =
            format!("[pool.it]\nbackends = [\"{address}\"]\n{pool}\n[pool.it.check]\ntimeout = \"20s\"\n{check}");
        let gateway = Gateway::in_front_of(&[&Backend::echo()]).with(&tables).start();
        let count = |result: &str| {
            let labels = format!("backend=\"{address}\",pool=\"it\",result=\"{result}\"");
            gateway.metric(&format!("cloakroom_backend_checks_total{{{labels}}}"))
        };
        wait_until("it has been asked", || count("passed") + count("failed") != 0.0);
        assert_eq!(count(result), 1.0, "{pool} {check}");
    }
    assert_eq!(http2.requests(), ["GET /health"]);
}

#[test]
fn a_check_of_the_connection_alone_sees_a_closed_port() {
    let backend = Backend::echo();
    let keys = "[pool.app.check]\ninterval = \"100ms\"\ntimeout = \"20s\"\nfall = 2\nrise = 1";
    let gateway = public(&[(&backend, "")], keys).start();
    backend.kill();
    wait_until("it is down, with no request", || metric(&gateway, "up", &backend) == 0.0);
    backend.revive();
    wait_until("it is up", || metric(&gateway, "up", &backend) == 1.0);
    assert!(backend.requests().is_empty());
    backend.kill();
    wait_until("it is down again", || metric(&gateway, "up", &backend) == 0.0);
    gateway.reload(|setup| setup.pool("app", &[&backend], "")).unwrap();
    assert_eq!(metric(&gateway, "up", &backend), 1.0, "whom nobody checks, nobody calls down");
}

#[test]
fn a_status_that_counts_as_a_failure_ejects_and_the_others_answer() {
    let (failing, well) = (Backend::always(Answer::response(503, &[], "")), Backend::echo());
    let keys = "eject.failures = 2\neject.statuses = [503]\neject.time = \"1h\"\neject.time_max = \"1h\"";
    let gateway = public(&[(&failing, ""), (&well, "")], keys).start();
    let client = gateway.client();
    let statuses: Vec<_> = (0..10).map(|_| client.get("/").send().status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 503).count(), 2, "{statuses:?}");
    assert_eq!((metric(&gateway, "up", &failing), metric(&gateway, "ejections_total", &failing)), (0.0, 1.0));
}

#[test]
fn a_pool_that_fails_altogether_is_not_asked_twice_for_long() {
    let backends = [Backend::always(Answer::close()), Backend::always(Answer::close())];
    let gateway = Gateway::in_front_of(&[])
        .pool("app", &[&backends[0], &backends[1]], "retry_budget = 1\neject.failures = 0")
        .route("/", PUBLIC)
        .start();
    let client = gateway.client();
    let retries =
        |result: &str| gateway.metric(&format!("cloakroom_retries_total{{pool=\"app\",result=\"{result}\"}}"));
    wait_until("the budget is used up", || {
        for _ in 0..50 {
            assert_eq!(client.get("/").send().status, 502);
        }
        retries("over_budget") != 0.0
    });
    assert!(500.0 <= retries("sent"), "what is in flight when a backend dies");
}
