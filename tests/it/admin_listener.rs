//! Who is answered on the admin listener?

use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::harness::gateway::{Gateway, Setup};
use crate::operation::ADMIN_TOKEN;

fn setup(backend: &Backend, host: &str) -> Setup {
    let admin = format!("address = \"127.0.0.1:0\"\ntoken = \"{ADMIN_TOKEN}\"\nhosts = [\"{host}\"]");
    Gateway::in_front_of(&[backend]).with(&format!("[admin]\n{admin}"))
}

/// A page that a stranger's name has brought to our address cannot read what it asks for, and so cannot the API's users.
#[test]
fn under_a_name_that_a_stranger_could_own_nothing_is_told_but_health() {
    let backend = Backend::echo();
    let gateway = setup(&backend, "gw1.example.org").start();
    let ask = |host: &str, method: &str, target: &str| {
        let client = Client::of(gateway.admin_address()).with_host(host);
        client.request(method, target).header("Authorization", &format!("Bearer {ADMIN_TOKEN}")).send()
    };
    let places = [
        ("GET", "/metrics", 200),
        ("GET", "/status", 200),
        ("GET", "/api/openapi.json", 200),
        ("GET", "/api/sessions/count", 200),
        ("GET", "/api/pools", 200),
        ("GET", "/api/splits", 200),
        ("POST", "/reload", 200),
        ("GET", "/nowhere", 404),
    ];
    for host in ["127.0.0.1", "[::1]:9900", "localhost:9900", "gateway", "gw1.internal", "GW1.example.org:1"] {
        for (method, target, status) in places {
            assert_eq!(ask(host, method, target).status, status, "{target} of {host}");
        }
    }
    for host in ["evil.test", "evil.test:9900", "127.0.0.1.evil.test", "gw1.example.org.evil.test", "gw2.example.org"] {
        for (method, target, _) in places {
            let answer = ask(host, method, target);
            assert_eq!(answer.status, 421, "{target} of {host}");
            assert!(answer.text().contains("list it in [admin] hosts"), "{}", answer.text());
            assert!(!answer.text().contains("evil"));
        }
        for target in ["/health/live", "/health/ready"] {
            assert_eq!(ask(host, "GET", target).status, 200, "{target} of {host}");
            assert_eq!(ask(host, "POST", target).status, 405, "{target} of {host}");
        }
        assert_eq!(ask(host, "GET", "/health/").status, 421);
    }
    let anonymous = Client::of(gateway.admin_address()).with_host("evil.test").get("/api/sessions").send();
    assert_eq!(anonymous.status, 421, "before it is asked for the token");
}

#[test]
fn a_reload_admits_the_names_that_the_file_lists_then() {
    let backend = Backend::echo();
    let gateway = setup(&backend, "gw1.example.org").start();
    let status = |gateway: &Gateway, host: &str| {
        Client::of(gateway.admin_address()).with_host(host).get("/metrics").send().status
    };
    assert_eq!((status(&gateway, "gw1.example.org"), status(&gateway, "gw2.example.org")), (200, 421));
    let changes = gateway.reload(|_| setup(&backend, "gw2.example.org")).unwrap();
    assert_eq!((changes.at_once, changes.at_restart), (vec!["admin: hosts".to_owned()], vec![]));
    assert_eq!((status(&gateway, "gw1.example.org"), status(&gateway, "gw2.example.org")), (421, 200));
}
