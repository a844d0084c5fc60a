//! Is there a request that two servers would read differently, and that a backend gets to see? (invariants 6, 7)

use crate::harness::backend::Backend;
use crate::harness::client::Connection;
use crate::harness::gateway::Gateway;
use crate::harness::wait_until;

/// Whole requests, and the status of the answer. What is refused closes the connection.
fn cases() -> Vec<(Vec<u8>, u16)> {
    let mut cases: Vec<(Vec<u8>, u16)> = Vec::new();
    let mut add = |text: &str, status: u16| cases.push((text.as_bytes().to_vec(), status));

    // Host
    add("GET / HTTP/1.1\r\n\r\n", 400);
    add("GET / HTTP/1.0\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a?b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a#b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a:x\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: %61\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: h\u{e9}\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400);
    add("GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400);

    // Framing
    add("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400);
    add("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400);
    for coding in [
        "gzip, chunked",
        "chunked, chunked",
        "chunked, gzip",
        "gzip",
        "identity",
        "xchunked",
        "chunked;q=1",
        "\"chunked\"",
        "",
        "chunked,",
        ", chunked",
    ] {
        add(&format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {coding}\r\n\r\n0\r\n\r\n"), 400);
    }
    add("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400);
    add("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400);
    for length in
        ["+5", "-0", "05", "005", "5, 5", "5,5", "0x5", "5 5", "5.0", "five", "", "1e1", "99999999999999999999", "5;a"]
    {
        add(&format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\nhello"), 400);
    }
    add("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400);
    add("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400);
    add("POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400);

    // Lines
    add("GET / HTTP/1.1\nHost: a\n\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\n\r\n", 400);
    add("GET / HTTP/1.1\nHost: a\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n", 400);
    add("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nX: a\u{0}b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nX: a\u{7f}b\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nX(y): b\r\n\r\n", 400);

    // Request line
    add("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET /a HTTP/1.1 HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET / http/1.1\r\nHost: a\r\n\r\n", 400);
    add("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400);
    add("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505);
    add("GET /\r\nHost: a\r\n\r\n", 400);
    add("GET\r\nHost: a\r\n\r\n", 400);
    add("G{T / HTTP/1.1\r\nHost: a\r\n\r\n", 400);
    add("CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405);
    add("CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", 405);
    add("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405);
    for target in ["foo", "@evil/", "\\a", "*", "//", "", "/a\u{e9}", "/a\"b", "/a<b", "/a>b", "/a#b", "/\u{1}"] {
        add(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"), 400);
    }

    // Upgrade and Expect
    add(
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
        400,
    );
    add("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n", 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400);
    add(&web_socket("POST / HTTP/1.1", "Content-Length: 0\r\n"), 400);
    add(&web_socket("GET / HTTP/1.1", "Content-Length: 5\r\n"), 400);
    add(&web_socket("GET / HTTP/1.0", ""), 400);
    add("GET / HTTP/1.1\r\nHost: a\r\nExpect: something\r\n\r\n", 417);

    // Limits
    add(&format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(9000)), 414);
    add(&format!("GET /{}", "a".repeat(40_000)), 414);
    add(&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(40_000)), 431);
    add(&format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(100)), 431);
    add("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n", 413);

    cases.push((b"GET / HTTP/1.1\r\nHost: a\r\nX: \xff\xfe\r\n\r\n".to_vec(), 200));
    cases.push((b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n".to_vec(), 400));
    cases.push((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(), 400));
    cases
}

fn web_socket(line: &str, fields: &str) -> String {
    format!(
        "{line}\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{fields}\r\n"
    )
}

#[test]
fn an_ambiguous_request_is_refused_and_no_backend_sees_a_byte() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "access = \"public\"\nbody_bytes = \"1MiB\"").start();
    let cases = cases();
    assert!(60 <= cases.len(), "{} cases", cases.len());
    for (request, expected) in cases {
        let shown = request.escape_ascii().to_string();
        let shown = &shown[..shown.len().min(200)];
        let before = backend.bytes();
        let mut connection = Connection::open(gateway.address());
        let _ = connection.try_write(&request); // it may be answered before it is all sent
        let response = connection.read_response("GET").unwrap_or_else(|error| panic!("no answer ({error}): {shown}"));
        assert_eq!(response.status, expected, "{shown}");
        assert!(response.header("server").is_none_or(|server| !server.contains("ingora")), "{shown}");
        if expected != 200 {
            assert_eq!(backend.bytes(), before, "a byte reached the backend: {shown}");
            assert!(response.closes, "the connection must not be used again: {shown}");
            connection.assert_closed(shown);
        }
    }
}

#[test]
fn a_path_that_depends_on_its_reader_is_refused() {
    let bad = [
        "/a%2fb",
        "/a%2Fb",
        "/%2f",
        "/a%5cb",
        "/a%5Cb",
        "/a\\b",
        "/%2e",
        "/%2E%2e/",
        "/a/%2e%2e/b",
        "/..%2f",
        "/.%2e/a",
        "//",
        "//a",
        "/a//b",
        "/a//",
        "/./a",
        "/a/.",
        "/a/./b",
        "/../a",
        "/a/..",
        "/a/../b",
        "/..",
        "/.",
        "/a;b",
        "/;",
        "/a;jsessionid=1",
        "/a/..;/b",
        "/a%3bb",
        "/a%00b",
        "/a%00",
        "/%0a",
        "/%0d%0a",
        "/%09",
        "/%7f",
        "/a%",
        "/a%2",
        "/a%zz",
        "/a%2g",
        "/%u002f",
        "/%25",
        "/%252f",
        "/%c0%ae",
        "/%c0%af",
        "/%e0%80%af",
        "/%ff",
        "/%61dmin",
        "/%41",
    ];
    assert!(40 <= bad.len());
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "access = \"public\"")
        .route("/admin", "access = \"required\"")
        .start();
    let client = gateway.client();
    for path in bad {
        let response = client.get(path).send();
        assert_eq!((response.status, response.closes), (400, true), "{path}");
    }
    assert_eq!(backend.bytes(), 0, "nothing of it reached a backend");
}

#[test]
fn what_is_decided_on_is_what_is_forwarded() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "access = \"public\"").start();
    let client = gateway.client();
    for target in [
        "/",
        "/a",
        "/a/",
        "/a/b.c/d-e_f~g",
        "/a%20b",
        "/caf%C3%A9",
        "/a?b=c&d=%2f..%2f",
        "/a?x=//../;%00",
        "/a?",
        "/a?b?c",
        "/a:b@c!$&'()*+,=",
        "/...",
        "/.well-known/x",
        "/a?u=http://b/",
    ] {
        assert_eq!(client.get(target).send().seen().target, target, "the same bytes");
    }
}

#[test]
fn a_route_cannot_be_walked_around() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "access = \"public\"")
        .route("/admin", "access = \"required\"")
        .start();
    let client = gateway.client();
    for path in ["/admin", "/admin/", "/admin/x", "/admin?x", "/admin/?x", "/admin/%20"] {
        assert_eq!(client.get(path).send().status, 401, "{path} needs a session");
    }
    for path in ["/administrator", "/Admin", "/x/admin"] {
        assert_eq!(client.get(path).send().status, 200, "{path} is another path");
    }
    let user_agents = ["kube-probe/1.30", "GoogleHC/1.0", "ELB-HealthChecker/2.0"];
    for user_agent in user_agents {
        let response = client.get("/admin").header("User-Agent", user_agent).send();
        assert_eq!(response.status, 401, "a name in User-Agent opens nothing");
    }
    for (name, value) in [
        ("X-Original-URL", "/"),
        ("X-Rewrite-URL", "/"),
        ("X-Forwarded-Uri", "/"),
        ("X-HTTP-Method-Override", "OPTIONS"),
    ] {
        assert_eq!(client.get("/admin").header(name, value).send().status, 401, "{name}");
    }
}

#[test]
fn a_second_request_hidden_behind_the_first_is_not_served() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "access = \"public\"").start();
    let hidden = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n";
    for first in [
        "POST /.cloakroom/login HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "GET /.cloakroom/login HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        "POST /shown HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".to_owned(),
        format!("POST /.cloakroom/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", hidden.len()),
    ] {
        let mut connection = Connection::open(gateway.address());
        connection.write(format!("{first}{hidden}"));
        connection.read_response("POST").unwrap();
        let _ = connection.read_to_end();
    }
    assert!(!backend.has_received("/hidden"), "bytes after a request are not a request");
}

#[test]
fn a_head_that_never_ends_is_cut_at_the_deadline() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).with("[limits]\nhead_timeout = \"300ms\"").start();
    let mut drip = Connection::open(gateway.address());
    drip.write("GET / HTTP/1.1\r\nHost: a\r\nX: ");
    // A byte now and then would keep a timer per read alive for ever; ours is one for the whole head.
    let refused = "cloakroom_requests_total{outcome=\"refused\",route=\"-\",status=\"408\"}";
    wait_until("the head is given up", || {
        let _ = drip.try_write("x");
        gateway.metric(refused) == 1.0
    });

    let mut silent = Connection::open(gateway.address());
    silent.assert_closed("a connection that says nothing is not kept");
    assert_eq!(gateway.client().get("/").send().status, 401, "others are served all the while");
}

#[test]
fn an_idle_connection_is_closed() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "access = \"public\"")
        .with("[limits]\nkeepalive_timeout = \"1s\"")
        .start();
    let mut connection = Connection::open(gateway.address());
    connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(connection.read_response("GET").unwrap().status, 200);
    connection.assert_closed("nothing more was asked");
}

#[test]
fn connections_beyond_the_cap_wait_their_turn() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "access = \"public\"")
        .with("[server]\nconnections_max = 2\nthreads = 2\n[limits]\nkeepalive_timeout = \"60s\"")
        .start();
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut held: Vec<_> = (0..2)
        .map(|_| {
            let mut connection = Connection::open(gateway.address());
            connection.write(request);
            connection.read_response("GET").unwrap();
            connection
        })
        .collect();
    let mut third = Connection::open(gateway.address());
    third.write(request);
    for _ in 0..50 {
        held[0].write(request);
        held[0].read_response("GET").unwrap();
        assert_eq!(gateway.metric("cloakroom_connections"), 2.0, "the third is not served yet");
    }
    assert_eq!(backend.requests().len(), 52, "none of them is the third's");
    held.pop();
    assert_eq!(third.read_response("GET").unwrap().status, 200, "served as soon as there is room");
    wait_until("two are counted", || gateway.metric("cloakroom_connections") == 2.0);
}

#[test]
fn a_body_over_the_limit_is_refused_however_it_is_framed() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "access = \"public\"\nbody_bytes = \"1KiB\"").start();
    let client = gateway.client();
    assert_eq!(client.request("POST", "/").body(vec![b'a'; 1024]).send().seen().body_bytes, 1024);
    assert_eq!(client.request("POST", "/").body(vec![b'a'; 1025]).send().status, 413);
    let mut connection = Connection::open(gateway.address());
    connection.write("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    for _ in 0..3 {
        let _ = connection.try_write(format!("200\r\n{}\r\n", "a".repeat(512)));
    }
    let response = connection.read_response("POST").unwrap();
    assert_eq!((response.status, response.closes), (413, true));
    assert_eq!(backend.requests().len(), 1, "no backend has the whole of it");
}

#[test]
fn a_hundred_is_answered_here_and_not_asked_of_the_backend() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "access = \"public\"").start();
    let mut connection = Connection::open(gateway.address());
    connection.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    let head = connection.read_head().unwrap().unwrap();
    assert!(head.start_line.contains(" 100"), "{}", head.start_line);
    connection.write("hello");
    let seen = connection.read_response("POST").unwrap().seen();
    assert_eq!(seen.body_bytes, 5);
    assert!(seen.headers("expect").is_empty());
}
