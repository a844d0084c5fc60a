//! Is it known afterwards who came in, and what ended? The audit of a process, as its operator reads it.

use serde_json::{Value, json};

use crate::directives::{obliging, say_to};
use crate::harness::client::Client;
use crate::harness::gateway::PASSWORD;
use crate::harness::provider::FakeProvider;
use crate::harness::wait_until;
use crate::oidc::{LOGIN, ORIGIN, log_in, say_logout_as};
use crate::operation::{Daemon, deployment};

/// What is said of each event but when, by whose request and in which session.
fn without_chance(mut event: Value) -> Value {
    let fields = event.as_object_mut().unwrap();
    for name in ["timestamp", "level", "target", "request_id", "backend"] {
        fields.remove(name);
    }
    if let Some(handle) = fields.get_mut("session") {
        assert_eq!(handle.as_str().unwrap().len(), 10, "a handle, no id: {handle}");
        *handle = "some".into();
    }
    event
}

#[test]
fn every_way_in_and_out_leaves_its_event_and_no_secret() {
    let (backend, provider) = (obliging(), FakeProvider::start());
    let rest = format!(
        "[[route]]\npath = \"/all\"\npool = \"app\"\naccess = \"optional\"\ndirectives = [\"login\", \"logout\"]\n\
         [[route]]\npath = \"/open\"\npool = \"app\"\naccess = \"optional\"\nanonymous = true\n\
         directives = [\"logout\", \"attributes\"]\n\
         [[route]]\npath = \"/leave\"\npool = \"app\"\naccess = \"public\"\ndirectives = [\"logout\"]\n\
         [login]\norigins = [\"{ORIGIN}\"]\n[login.backend]\n[session]\nmax_per_user = 1\n\
         [log]\nformat = \"json\"\n{}",
        provider.table("fake", "")
    );
    let (_folder, file, address) = deployment(&[&backend], &rest);
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || std::net::TcpStream::connect(address).is_ok());
    let client = || Client::of(address).with_host("app.test").allowing("refresh");

    let (first, second) = (client(), client());
    for browser in [&first, &second] {
        assert_eq!(log_in(browser, &provider, LOGIN).status, 303, "logged in");
    }
    let foreign = client();
    assert_eq!(foreign.navigate("/.cloakroom/oidc/fake/callback?state=none&code=none").send().status, 400);
    let token = provider.logout_token(|claims| {
        claims.as_object_mut().unwrap().remove("sid");
    });
    assert_eq!(say_logout_as(&client(), &token).status, 200);

    let legacy = client();
    assert_eq!(say_to(&legacy, "/all", &[("Session-Login", "user=\"bob\"")]).status, 200);
    assert_eq!(say_to(&legacy, "/leave", &[("Session-Logout", "?1")]).status, 200);
    assert_eq!(say_to(&legacy, "/open", &[("Session-Set", "cart=\"1\"")]).status, 200);
    assert_eq!(say_to(&legacy, "/open", &[("Session-Logout", "?1")]).status, 200);
    assert_eq!(say_to(&legacy, "/", &[("Session-Login", "user=\"eve\""), ("am-eai-user-id", "eve")]).status, 200);
    assert_eq!(say_to(&legacy, "/all", &[("Session-Login", "nobody")]).status, 502);

    let (_, noise) = daemon.stopped();
    let lines = noise.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let events: Vec<_> = lines.filter(|line| line["target"] == "audit").map(without_chance).collect();
    let login = json!({ "message": "login", "user": "ann", "client": "127.0.0.1", "method": "oidc", "provider": "fake",
                        "result": "success", "session": "some" });
    let expected = [
        login.clone(),
        login,
        json!({ "message": "sessions displaced", "user": "ann", "sessions": 1 }),
        json!({ "message": "login", "client": "127.0.0.1", "method": "oidc", "provider": "fake",
                "result": "no_such_attempt" }),
        json!({ "message": "sessions revoked", "by": "provider", "client": "127.0.0.1", "what": "backchannel fake",
                "ended": 1 }),
        json!({ "message": "login", "user": "bob", "client": "127.0.0.1", "method": "backend", "result": "success",
                "session": "some" }),
        json!({ "message": "logout", "user": "bob", "client": "127.0.0.1", "session": "some", "reason": "backend" }),
        // Of a session that nobody had logged in to.
        json!({ "message": "logout", "client": "127.0.0.1", "session": "some", "reason": "backend" }),
        json!({ "message": "directive refused", "route": "/", "directive": "session-login am-eai-user-id",
                "reason": "its route does not allow it" }),
        json!({ "message": "directive refused", "route": "/all", "directive": "session-login",
                "reason": "a value is not a text: write it in double quotes" }),
    ];
    assert_eq!(events, expected, "{noise}");
    for secret in [&second.cookie("session").unwrap(), &token, PASSWORD] {
        assert!(!noise.contains(secret), "{secret} is in the log");
    }
}
