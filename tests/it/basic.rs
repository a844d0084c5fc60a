//! May a script come with a name and a password? Where a route allows it, without a session, and slowed down like anybody.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::harness::backend::Backend;
use crate::harness::gateway::{Gateway, PASSWORD, Setup};

fn setup(backend: &Backend) -> Setup {
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/api", "basic = true")
        .route("/open", "basic = true\naccess = \"optional\"")
        .route("/staff", "basic = true\ngroups = [\"staff\"]")
        .with("[login.basic]\nrealm = \"Builds\"")
}

pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

#[test]
fn a_script_is_known_without_a_session_and_its_password_goes_no_further() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let client = gateway.client();
    for path in ["/api/x", "/open", "/staff"] {
        let seen = client.get(path).header("Authorization", &basic("ann", PASSWORD)).send().seen();
        assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "{path}");
        assert_eq!(seen.headers("authorization"), [""; 0], "{path}: the backend learns no password");
    }
    assert_eq!(client.cookies(), [], "and no session begins");
    assert_eq!(client.get("/staff").header("Authorization", &basic("bob", PASSWORD)).send().status, 403);
    let logins = r#"cloakroom_logins_total{method="basic",result="success"}"#;
    assert!(gateway.metric(logins) <= 2.0, "ann's password was looked at once, and bob's");
}

#[test]
fn wrong_credentials_are_refused_everywhere_alike() {
    let backend = Backend::echo();
    let gateway = setup(&backend).user("eve", "disabled = true").start();
    let mut bodies = Vec::new();
    for (user, password) in [("ann", "wrong"), ("nobody", PASSWORD), ("eve", PASSWORD), ("ann", "")] {
        for path in ["/api", "/open"] {
            let answer = gateway.client().get(path).header("Authorization", &basic(user, password)).send();
            assert_eq!(answer.status, 401, "{user} {path}");
            assert_eq!(answer.header("www-authenticate"), Some("Basic realm=\"Builds\", charset=\"UTF-8\""));
            let id = answer.header("x-request-id").unwrap();
            bodies.push(answer.text().replace(id, "ID"));
        }
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "nobody learns which names exist: {bodies:?}");
    let client = gateway.log_in("ann");
    let answer = client.get("/api").header("Authorization", &basic("bob", "wrong")).send();
    assert_eq!(answer.status, 401, "a session does not make wrong credentials right");
    for field in ["Basic", "Basic !", "Basic QQ=="] {
        assert_eq!(gateway.client().get("/api").header("Authorization", field).send().status, 401, "{field}");
    }
    assert_eq!(backend.bytes(), 0, "no backend was asked");
}

#[test]
fn only_where_a_route_allows_it_and_only_this_scheme() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let right = basic("ann", PASSWORD);
    let answer = gateway.client().get("/").header("Authorization", &right).send();
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Session")), "not on this route");
    let client = gateway.log_in("bob");
    let seen = client.get("/").header("Authorization", &right).send().seen();
    assert_eq!(seen.headers("x-forwarded-user"), ["bob"]);
    assert_eq!(seen.headers("authorization"), [right.as_str()], "where it is not ours, it is the backend's");
    let seen = client.get("/api").header("Authorization", "Bearer token").send().seen();
    assert_eq!(seen.headers("authorization"), ["Bearer token"], "and so is another scheme");
    assert_eq!(seen.headers("x-forwarded-user"), ["bob"]);
}

#[test]
fn a_browser_is_neither_asked_for_it_nor_believed() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let right = basic("ann", PASSWORD);
    for site in ["cross-site", "same-site", "same-origin", "none"] {
        let request = gateway.client();
        let request = request.get("/api").header("Sec-Fetch-Site", site).header("Sec-Fetch-Mode", "cors");
        let answer = request.header("Authorization", &right).send();
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Session")), "{site}: no dialog");
    }
    let client = gateway.log_in("bob");
    let seen = client.get("/api").header("Sec-Fetch-Site", "none").header("Authorization", &right).send().seen();
    assert_eq!(seen.headers("x-forwarded-user"), ["bob"]);
    assert_eq!(seen.headers("authorization"), [""; 0], "a password is no backend's, whoever sent it");
    assert_eq!(gateway.client().navigate("/api").send().status, 302, "a person is sent to the login page");
}

#[test]
fn guessing_is_slowed_down_and_what_is_remembered_goes_on() {
    let backend = Backend::echo();
    let throttle = "[login.password.throttle]\nper_account_and_network = 3";
    let gateway = setup(&backend).with(throttle).start();
    let ask = |user: &str, password: &str| {
        gateway.client().get("/api").header("Authorization", &basic(user, password)).send()
    };
    assert_eq!(ask("ann", PASSWORD).status, 200);
    let waits: Vec<_> = (0..5).map(|_| ask("ann", "guess").header("retry-after").is_some()).collect();
    assert_eq!(waits, [false, false, false, true, true], "the fourth guess is not looked at");
    assert_eq!(ask("ann", PASSWORD).status, 200, "the script that is known already is not held up");
    assert_eq!(gateway.try_log_in(&gateway.client(), "ann", PASSWORD).status, 403, "one count for all ways in");
    assert_eq!(ask("bob", PASSWORD).status, 200, "another account is not concerned");
}

#[test]
fn many_requests_at_once_are_one_login() {
    let backend = Backend::echo();
    let throttle = "[login.password.throttle]\nper_account_and_network = 2";
    let gateway = setup(&backend).with(throttle).start();
    let statuses: Vec<_> = std::thread::scope(|scope| {
        let ask = || gateway.client().get("/api").header("Authorization", &basic("ann", PASSWORD)).send().status;
        let asked: Vec<_> = (0..20).map(|_| scope.spawn(ask)).collect();
        asked.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(statuses, [200; 20]);
    assert_eq!(gateway.metric(r#"cloakroom_logins_total{method="basic",result="success"}"#), 1.0);
}

#[test]
fn a_reload_forgets_what_was_right() {
    let backend = Backend::echo();
    let gateway = setup(&backend).user("eve", "").start();
    let ask = || gateway.client().get("/api").header("Authorization", &basic("eve", PASSWORD)).send().status;
    assert_eq!(ask(), 200);
    gateway.reload(|_| setup(&backend).user("eve", "disabled = true")).unwrap();
    assert_eq!(ask(), 401, "who is disabled is out at once");
}
