//! Who is the client behind a balancer that passes bytes on? Whom the balancer announces, if it is one of ours.

use std::net::Ipv4Addr;

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Connection};
use crate::harness::gateway::{Gateway, PASSWORD, Setup};
use crate::harness::wait_until;

const OURS: &str = "proxy_protocol = [\"127.0.0.0/8\"]";

fn setup(backend: &Backend, keys: &str) -> Setup {
    Gateway::in_front_of(&[backend]).route("/", "access = \"public\"").route("/in", "").listener(keys)
}

/// PROXY, TCP over IPv4, with an extension (the name of the ALPN protocol).
fn announcing(client: Ipv4Addr) -> Vec<u8> {
    let addresses = [&client.octets()[..], &[10, 0, 0, 1, 0x30, 0x39, 1, 187]].concat();
    [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x11"[..], &addresses, b"\x01\0\x02h2"].concat()
}

fn local() -> Vec<u8> {
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec()
}

fn behind_balancer(gateway: &Gateway, client: Ipv4Addr) -> Client {
    gateway.client().announced_by(&announcing(client))
}

fn refused(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metric(&format!("cloakroom_proxy_protocol_refused_total{{reason=\"{reason}\"}}"))
}

#[test]
fn the_announced_client_is_the_client_with_tls_and_without() {
    let backend = Backend::echo();
    for setup in [setup(&backend, OURS), setup(&backend, OURS).tls()] {
        let gateway = setup.start();
        let client = behind_balancer(&gateway, Ipv4Addr::new(192, 0, 2, 7));
        for _ in 0..2 {
            // The second on the same connection.
            assert_eq!(client.get("/").send().seen().headers("x-forwarded-for"), ["192.0.2.7"]);
        }
        let check = gateway.client().announced_by(&local());
        assert_eq!(check.get("/").send().seen().headers("x-forwarded-for"), ["127.0.0.1"], "the balancer's own");
    }
}

#[test]
fn a_client_has_no_more_rights_for_coming_through_a_balancer() {
    let backend = Backend::echo();
    let gateway = setup(&backend, OURS).with("[server]\nthreads = 1\ntrusted_proxies = [\"127.0.0.0/8\"]").start();
    let client = behind_balancer(&gateway, Ipv4Addr::new(192, 0, 2, 7));
    let seen = client.get("/").header("X-Forwarded-For", "203.0.113.9").send().seen();
    assert_eq!(seen.headers("x-forwarded-for"), ["192.0.2.7"], "the balancer is trusted, and not whom it announces");
    let proxy = behind_balancer(&gateway, Ipv4Addr::new(127, 0, 0, 9));
    let seen = proxy.get("/").header("X-Forwarded-For", "203.0.113.9").send().seen();
    assert_eq!(seen.headers("x-forwarded-for"), ["203.0.113.9, 127.0.0.9"]);
}

#[test]
fn the_throttle_counts_the_announced_client() {
    let backend = Backend::echo();
    let gateway = setup(&backend, OURS).with("[login.password.throttle]\nper_account_and_network = 3").start();
    let guess = |address: [u8; 4], password: &str| {
        gateway.try_log_in(&behind_balancer(&gateway, address.into()), "ann", password)
    };
    for _ in 0..3 {
        assert!(guess([192, 0, 2, 7], "wrong").header("retry-after").is_none());
    }
    assert!(guess([192, 0, 2, 7], PASSWORD).header("retry-after").is_some(), "this network has guessed enough");
    assert_eq!(guess([198, 51, 100, 7], PASSWORD).status, 303, "another one has not, behind the same balancer");
}

#[test]
fn a_connection_that_does_not_begin_with_a_header_is_closed_without_a_word() {
    let backend = Backend::echo();
    let gateway = setup(&backend, OURS).with("[limits]\nhead_timeout = \"1s\"").start();
    let mut plain = Connection::open(gateway.address());
    plain.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    plain.assert_closed("no header, no answer");
    let mut first = Connection::open(gateway.address());
    first.write("PROXY TCP4 192.0.2.7 10.0.0.1 12345 443\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    first.assert_closed("version 1");
    wait_until("both are counted", || refused(&gateway, "malformed") == 2.0);
    let mut slow = Connection::open(gateway.address());
    slow.write(&announcing(Ipv4Addr::new(192, 0, 2, 7))[..20]);
    slow.assert_closed("the rest does not come");
    assert_eq!(refused(&gateway, "late"), 1.0);
    wait_until("none is open", || gateway.metric("cloakroom_connections") == 0.0);
    assert_eq!(backend.connections(), 0);
}

#[test]
fn nobody_but_the_balancers_may_announce_or_connect() {
    let backend = Backend::echo();
    let gateway = setup(&backend, "proxy_protocol = [\"10.0.0.0/8\", \"2001:db8::/32\"]").start();
    for bytes in [announcing(Ipv4Addr::new(192, 0, 2, 7)), local(), Vec::new()] {
        let mut stranger = Connection::open(gateway.address());
        let _ = stranger.try_write([&bytes[..], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"].concat());
        stranger.assert_closed("not one of the networks");
    }
    wait_until("all are counted", || refused(&gateway, "stranger") == 3.0);
    assert_eq!(backend.connections(), 0);
}

#[test]
fn where_nobody_announces_a_header_is_no_request() {
    let backend = Backend::echo();
    let gateway = setup(&backend, "").start();
    let mut connection = Connection::open(gateway.address());
    let header = announcing(Ipv4Addr::new(192, 0, 2, 7));
    connection.write([&header[..], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"].concat());
    assert_eq!(connection.read_response("GET").unwrap().status, 400);
    assert_eq!(backend.connections(), 0);
}
