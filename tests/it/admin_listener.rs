//! Who is answered on the admin listener, and can strangers keep others from it?

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Connection};
use crate::harness::gateway::{Gateway, Setup};
use crate::operation::ADMIN_TOKEN;

/// More than there are slots on the listener.
const MANY: usize = 200;

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

#[test]
fn however_many_hold_it_open_a_probe_is_answered() {
    let backend = Backend::echo();
    let gateway = setup(&backend, "gw1.example.org").start();
    for (who, said) in
        [("who say nothing", ""), ("who begin a request and do not end it", "GET /health/live HTTP/1.1\r\nHost: a\r\n")]
    {
        let held = (0..MANY).map(|_| {
            let mut connection = Connection::open(gateway.admin_address());
            connection.write(said);
            connection
        });
        let mut held: Vec<_> = held.collect();
        for _ in 0..3 {
            let probe = Client::of(gateway.admin_address());
            assert_eq!(probe.get("/health/live").send().status, 200, "beside {MANY} {who}");
            assert_eq!(probe.get("/metrics").send().status, 200, "beside {MANY} {who}");
        }
        // Had it been ended by its own time, half a head would have been answered (408).
        held[0].assert_closed("it has given way");
    }
}

#[test]
fn of_many_that_are_idle_those_give_way_that_have_been_so_longest() {
    /// Fewer than there are slots.
    const LAST: usize = 32;
    let backend = Backend::echo();
    let gateway = setup(&backend, "gw1.example.org").start();
    let ask = |connection: &mut Connection| {
        connection.write("GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(connection.read_response("GET").unwrap().status, 200);
    };
    let asked = (0..MANY).map(|_| {
        let mut connection = Connection::open(gateway.admin_address());
        ask(&mut connection);
        connection
    });
    let mut held: Vec<_> = asked.collect();
    // Had the last one been let in because the time of others was over, that of the rest would be over after these.
    (0..500).for_each(|_| ask(held.last_mut().unwrap()));
    held.iter_mut().rev().take(LAST).for_each(ask);
    held[0].assert_closed("it was idle longest");
}
