//! Can an operator see who is logged in, and end it? Over the admin API and on the command line (invariant 5).

use std::process::{Command, Output, Stdio};

use cloakroom::session::id::SessionId;
use serde_json::{Value, json};

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Response};
use crate::harness::gateway::{Gateway, Setup, Store};
use crate::harness::redis::RedisServer;

const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";

fn setup(backend: &Backend) -> Setup {
    let admin = format!("[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\"");
    Gateway::in_front_of(&[backend]).route("/", "").with(&admin)
}

fn ask(gateway: &Gateway, method: &str, target: &str) -> Response {
    let bearer = format!("Bearer {TOKEN}");
    Client::of(gateway.admin_address()).request(method, target).header("Authorization", &bearer).send()
}

#[track_caller]
fn answer(gateway: &Gateway, method: &str, target: &str) -> Value {
    let response = ask(gateway, method, target);
    assert_eq!(response.status, 200, "{method} {target}: {}", response.text());
    serde_json::from_slice(&response.body).unwrap()
}

/// By what people know this client's session.
fn handle(client: &Client) -> String {
    SessionId::parse(&client.cookie("session").unwrap()).unwrap().key().log_hash()
}

fn handles(answer: &Value) -> Vec<&str> {
    answer["sessions"].as_array().unwrap().iter().map(|session| session["session"].as_str().unwrap()).collect()
}

#[track_caller]
fn assert_logged_out(client: &Client) {
    let page = client.navigate("/").send();
    assert_eq!(page.status, 302, "whose session was revoked is sent to the login page");
    assert!(page.header("location").unwrap().starts_with("/.cloakroom/login"));
}

#[track_caller]
fn assert_logged_in(client: &Client) {
    assert_eq!(client.get("/").send().status, 200, "the others go on");
}

fn sessions_are_seen_and_ended(setup: Setup) {
    let gateway = setup.start();
    let (first, second, third) = (gateway.log_in("ann"), gateway.log_in("ann"), gateway.log_in("ann"));
    let bob = gateway.log_in("bob");

    let listed = answer(&gateway, "GET", "/api/sessions?user=ann");
    assert_eq!(handles(&listed), [handle(&first), handle(&second), handle(&third)], "the oldest first");
    for client in [&first, &bob] {
        let cookie = client.cookie("session").unwrap();
        assert!(!listed.to_string().contains(&cookie[2..]), "and nothing that lets anybody in");
    }
    let shown = &listed["sessions"][0];
    assert_eq!(
        (&shown["user"], &shown["method"], &shown["address"]),
        (&json!("ann"), &json!("password"), &json!("127.0.0.1"))
    );
    assert!((1_700..=1_800).contains(&shown["idle_left_seconds"].as_u64().unwrap()), "{shown}");
    let details = answer(&gateway, "GET", &format!("/api/sessions/{}?user=ann", handle(&second)));
    assert_eq!((&details["name"], &details["groups"]), (&json!("Ann Archer"), &json!(["staff"])));
    assert_eq!(answer(&gateway, "GET", "/api/sessions/count"), json!({ "count": 4 }));
    assert_eq!(answer(&gateway, "GET", "/api/sessions/count?user=bob"), json!({ "count": 1 }));

    assert_logged_in(&first);
    let ended = answer(&gateway, "DELETE", &format!("/api/sessions/{}?user=ann", handle(&first)));
    assert_eq!(ended, json!({ "ended": 1 }));
    assert_logged_out(&first);
    assert_logged_in(&second);

    let kept = handle(&third);
    assert_eq!(answer(&gateway, "DELETE", &format!("/api/sessions?user=ann&except={kept}")), json!({ "ended": 1 }));
    assert_logged_out(&second);
    assert_logged_in(&third);
    assert_eq!(answer(&gateway, "DELETE", "/api/sessions?user=ann"), json!({ "ended": 1 }));
    assert_logged_out(&third);
    assert_logged_in(&bob);

    let ann = gateway.log_in("ann");
    let mut all = Vec::new();
    let mut next = json!(0);
    while !next.is_null() {
        let page = answer(&gateway, "GET", &format!("/api/sessions?part={next}"));
        all.extend(handles(&page).into_iter().map(str::to_owned));
        next = page["next"].clone();
    }
    all.sort();
    let mut expected = vec![handle(&ann), handle(&bob)];
    expected.sort();
    assert_eq!(all, expected);
    assert_eq!(answer(&gateway, "DELETE", "/api/sessions?everyone=true"), json!({ "ended": 2 }));
    assert_logged_out(&ann);
    assert_logged_out(&bob);
    assert_eq!(answer(&gateway, "GET", "/api/sessions/count"), json!({ "count": 0 }));
}

#[test]
fn sessions_in_memory_are_seen_and_ended() {
    sessions_are_seen_and_ended(setup(&Backend::echo()));
}

#[test]
fn sessions_in_redis_are_seen_and_ended() {
    let redis = RedisServer::start();
    sessions_are_seen_and_ended(setup(&Backend::echo()).store(Store::of(&redis)));
}

#[test]
fn without_the_token_there_is_nothing_to_see() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    let admin = Client::of(gateway.admin_address());
    for field in [None, Some("Bearer wrong"), Some("Basic YW5uOmFubg==")] {
        for (method, target) in [("GET", "/api/sessions"), ("DELETE", "/api/sessions?everyone=true"), ("GET", "/api/x")]
        {
            let mut request = admin.request(method, target);
            if let Some(field) = field {
                request = request.header("Authorization", field);
            }
            let response = request.send();
            assert_eq!((response.status, response.header("www-authenticate")), (401, Some("Bearer")));
            assert_eq!(response.header("content-type"), Some("application/problem+json"));
        }
    }
    assert_logged_in(&ann);
    let cross_site = admin
        .request("DELETE", "/api/sessions?everyone=true")
        .header("Origin", "https://evil.example")
        .header("Cookie", &ann.cookie_field().unwrap())
        .send();
    assert_eq!(cross_site.status, 401, "a browser has no token to send along");
    assert_eq!(admin.request("OPTIONS", "/api/sessions").header("Origin", "https://evil.example").send().status, 401);
    assert_eq!(gateway.client().get("/api/sessions").send().status, 401, "and on the public listener it is a route");
    assert_eq!(admin.get("/api/openapi.json").send().status, 200);
    assert_eq!(admin.get("/metrics").send().status, 200);
}

#[test]
fn without_a_token_configured_there_is_no_such_api() {
    let gateway = Gateway::in_front_of(&[&Backend::echo()]).start();
    gateway.log_in("ann");
    for target in ["/api/sessions", "/api/sessions/count", "/api/openapi.json"] {
        assert_eq!(ask(&gateway, "GET", target).status, 404, "{target}");
    }
    assert_eq!(ask(&gateway, "DELETE", "/api/sessions?everyone=true").status, 404);
}

#[test]
fn methods_are_guarded_and_head_has_no_body() {
    let gateway = setup(&Backend::echo()).start();
    for (method, target, allowed) in [
        ("POST", "/api/sessions", "GET, HEAD, DELETE"),
        ("PUT", "/api/sessions/0123456789", "GET, HEAD, DELETE"),
        ("DELETE", "/api/sessions/count", "GET, HEAD"),
        ("DELETE", "/api/openapi.json", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
    ] {
        let response = ask(&gateway, method, target);
        assert_eq!((response.status, response.header("allow")), (405, Some(allowed)), "{method} {target}");
    }
    let head = ask(&gateway, "HEAD", "/api/sessions/count");
    assert_eq!((head.status, head.body.len()), (200, 0));
}

#[test]
fn a_store_that_is_down_is_503_and_not_an_empty_list() {
    let mut redis = RedisServer::start();
    let gateway = setup(&Backend::echo()).store(Store::of(&redis)).start();
    gateway.log_in("ann");
    redis.kill();
    for (method, target) in [
        ("GET", "/api/sessions?user=ann"),
        ("GET", "/api/sessions"),
        ("GET", "/api/sessions/count"),
        ("DELETE", "/api/sessions?user=ann"),
        ("DELETE", "/api/sessions?everyone=true"),
    ] {
        let response = ask(&gateway, method, target);
        assert_eq!(response.status, 503, "{method} {target}: {}", response.text());
        assert!(response.header("retry-after").is_some());
        assert!(!response.text().to_lowercase().contains("redis"), "the class, not the cause: {}", response.text());
    }
}

fn cloakroom_sessions(file: &std::path::Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_cloakroom"))
        .arg("sessions")
        .args(arguments)
        .args(["--config", file.to_str().unwrap()])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_command_line_sees_and_ends_what_is_in_redis() {
    let redis = RedisServer::start();
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).store(Store::of(&redis)).start();
    let file = gateway.config_file();
    let run = |arguments: &[&str]| cloakroom_sessions(&file, arguments);
    let json = |arguments: &[&str]| {
        let (code, out, err) = run(&[arguments, &["--json"]].concat());
        assert_eq!(code, Some(0), "{arguments:?}: {err}");
        serde_json::from_str::<Value>(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {out}"))
    };
    let (code, _, err) = run(&["list", "--user", "ann"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("user ann has no session"), "{err}");

    let (first, second, bob) = (gateway.log_in("ann"), gateway.log_in("ann"), gateway.log_in("bob"));
    assert_eq!(handles(&json(&["list", "--user", "ann"])), [handle(&first), handle(&second)]);
    let mut all: Vec<_> = handles(&json(&["list"])).into_iter().map(str::to_owned).collect();
    let mut expected = vec![handle(&first), handle(&second), handle(&bob)];
    all.sort();
    expected.sort();
    assert_eq!(all, expected);
    assert_eq!(json(&["count"]), json!({ "count": 3 }));
    assert_eq!(json(&["show", "--user", "ann", &handle(&first)])["name"], "Ann Archer");
    let (_, table, _) = run(&["list"]);
    assert_eq!(table.lines().count(), 4, "headings and a line each: {table}");
    for client in [&first, &second, &bob] {
        assert!(!table.contains(&client.cookie("session").unwrap()[2..12]), "never an id");
    }

    let (code, _, err) = run(&["revoke", "--everyone"]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("--yes"), "{err}");
    let revoked = handle(&first);
    assert_eq!(json(&["revoke", "--user", "ann", &revoked]), json!({ "ended": 1 }));
    assert_logged_out(&first);
    assert_logged_in(&second);
    let (code, _, err) = run(&["revoke", "--user", "ann", &revoked]);
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(json(&["revoke", "--everyone", "--yes"]), json!({ "ended": 2 }));
    assert_logged_out(&second);
    assert_logged_out(&bob);
}

#[test]
fn the_command_line_says_why_it_cannot_and_what_to_do() {
    let gateway = setup(&Backend::echo()).start();
    let (code, out, err) = cloakroom_sessions(&gateway.config_file(), &["list", "--user", "ann"]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("curl -X GET -H \"Authorization: Bearer $TOKEN\"") && err.contains("user=ann"), "{err}");
    assert!(!err.contains(TOKEN), "the token is no text for a terminal");

    let mut redis = RedisServer::start();
    let gateway = Gateway::in_front_of(&[&Backend::echo()]).store(Store::of(&redis)).start();
    redis.kill();
    for arguments in [&["list"][..], &["count"], &["revoke", "--everyone", "--yes"]] {
        let (code, _, err) = cloakroom_sessions(&gateway.config_file(), arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {err}");
        assert!(err.contains("session store is unavailable") && err.contains("[store.redis]"), "{arguments:?}: {err}");
    }
}
