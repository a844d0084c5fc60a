//! Does a request get to a backend that can answer it, once, and as it was sent? (invariant 8)

use std::collections::BTreeMap;

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection};
use crate::harness::gateway::{Gateway, Setup};
use crate::harness::http2::Http2Backend;
use crate::harness::wait_until;

fn public(backends: &[&Backend]) -> Setup {
    Gateway::in_front_of(backends).route("/", "access = \"public\"")
}

fn who_answers(client: &Client, times: usize) -> Vec<String> {
    (0..times).map(|_| client.get("/").send().seen().backend).collect()
}

#[test]
fn backends_take_strict_turns_across_connections_and_workers() {
    let backends = [Backend::echo(), Backend::echo(), Backend::echo()];
    let gateway = public(&[&backends[0], &backends[1], &backends[2]]).start();
    let mut count = BTreeMap::<String, usize>::new();
    for _ in 0..10 {
        for name in who_answers(&gateway.client(), 3) {
            *count.entry(name).or_default() += 1;
        }
    }
    assert!(count.values().all(|&n| n == 10), "each third request: {count:?}");
    let turns = who_answers(&gateway.client(), 6);
    assert_eq!(turns[..3], turns[3..], "in the same order each time round");
}

#[test]
fn a_dead_backend_costs_no_request_whatever_its_method() {
    let (alive, dead) = (Backend::echo(), Backend::echo());
    let gateway = public(&[&dead, &alive]).start();
    let client = gateway.client();
    dead.kill();
    for method in ["GET", "POST", "PUT", "DELETE", "PATCH"] {
        for _ in 0..4 {
            let seen = client.request(method, "/").body("hello").send().seen();
            assert_eq!((seen.backend.as_str(), seen.body_bytes), (alive.name(), 5), "{method}");
        }
    }
    dead.revive();
    wait_until("the revived backend is back in turn", || client.get("/").send().seen().backend == dead.name());
    assert!(
        1.0 <= gateway.metric(&format!(
            "cloakroom_backend_failures_total{{backend=\"{}\",kind=\"connect\",pool=\"app\"}}",
            dead.address()
        ))
    );
}

#[test]
fn a_request_that_may_be_repeated_survives_a_backend_that_dies_on_it() {
    let (alive, dying) = (Backend::echo(), Backend::always(Answer::close()));
    let gateway = public(&[&dying, &alive]).start();
    let client = gateway.client();
    for method in ["GET", "PUT", "DELETE", "OPTIONS"] {
        for _ in 0..2 {
            assert_eq!(client.request(method, "/").body("hello").send().seen().backend, alive.name(), "{method}");
        }
    }
    assert!(!dying.requests().is_empty(), "it was asked");
}

#[test]
fn a_request_that_must_not_be_repeated_is_sent_once() {
    let (dying, other) = (Backend::always(Answer::close()), Backend::always(Answer::close()));
    let gateway = public(&[&dying, &other]).start();
    let client = gateway.client();
    for (sent, method) in ["POST", "PATCH"].into_iter().enumerate() {
        let response = client.request(method, "/").body("hello").send();
        assert_eq!(response.status, 502, "{method}");
        assert_eq!(dying.requests().len() + other.requests().len(), sent + 1, "{method}: never twice");
    }
}

#[test]
fn when_no_backend_can_be_reached_the_client_is_told_when_to_come_back() {
    let dead = Backend::echo();
    let gateway = public(&[&dead]).start();
    dead.kill();
    for _ in 0..3 {
        let response = gateway.client().get("/").send();
        assert_eq!((response.status, response.header("retry-after")), (503, Some("2")));
        assert!(!response.text().contains("127.0.0.1"), "no address of ours: {}", response.text());
    }
    dead.revive();
    assert_eq!(gateway.client().get("/").send().status, 200, "and no restart is needed");
}

#[test]
fn a_backend_that_is_only_a_name_nobody_knows_ends_nothing() {
    let alive = Backend::echo();
    let gateway = public(&[&alive])
        .with("[pool.nowhere]\nbackends = [\"no-such-host.invalid:80\"]")
        .route("/nowhere", "access = \"public\"\npool = \"nowhere\"")
        .start();
    assert_eq!(gateway.client().get("/nowhere").send().status, 503);
    assert_eq!(gateway.client().get("/").send().status, 200);
}

#[test]
fn a_backend_by_name_is_found() {
    let alive = Backend::echo();
    let gateway = public(&[&alive])
        .with(&format!("[pool.named]\nbackends = [\"localhost:{}\"]", alive.address().port()))
        .route("/named", "access = \"public\"\npool = \"named\"")
        .start();
    wait_until("localhost has an address that answers", || gateway.client().get("/named").send().status == 200);
}

#[test]
fn a_silent_backend_is_given_up_in_time() {
    let silent = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let gateway = Gateway::in_front_of(&[])
        .pool("app", &[&silent], "read_timeout = \"200ms\"")
        .route("/", "access = \"public\"")
        .start();
    let response = gateway.client().get("/").send();
    assert_eq!(response.status, 504);
    assert_eq!(silent.requests().len(), 1, "a slow answer is not asked for twice");
}

#[test]
fn garbage_from_a_backend_is_a_502_and_nothing_of_it_is_passed_on() {
    for garbage in [
        "garbage\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ] {
        let backend = Backend::always(Answer::ExactlyThenClose(garbage.as_bytes().to_vec()));
        let gateway = public(&[&backend]).start();
        let response = gateway.client().request("POST", "/").body("x").send();
        assert_eq!(response.status, 502, "{garbage:?}");
        assert!(!response.text().contains("garbage"));
    }
}

#[test]
fn a_response_that_breaks_off_is_not_made_to_look_whole() {
    let backend = Backend::answering(|_| {
        Answer::ExactlyThenClose(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this".to_vec())
    });
    let gateway = public(&[&backend]).start();
    let broken = gateway.client().get("/").try_send();
    assert!(broken.is_err(), "the client can tell: {broken:?}");
}

#[test]
fn a_response_streams_while_it_is_made() {
    let backend = Backend::always(Answer::Chunks(vec![b"one".to_vec(), b"two".to_vec()]));
    let gateway = public(&[&backend]).start();
    let mut connection = Connection::open(gateway.address());
    connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    backend.step();
    connection.read_head().unwrap().unwrap();
    assert_eq!(connection.read_chunk().unwrap(), b"one", "before the second chunk exists");
    backend.step();
    assert_eq!(connection.read_chunk().unwrap(), b"two");
}

#[test]
fn a_request_streams_while_it_is_sent() {
    let backend = Backend::echo();
    let gateway = public(&[&backend]).start();
    let mut connection = Connection::open(gateway.address());
    connection.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n");
    connection.write(vec![b'x'; 100_000]);
    wait_until("the first half is at the backend", || 100_000 <= backend.bytes());
    connection.write(vec![b'x'; 100_000]);
    assert_eq!(connection.read_response("POST").unwrap().seen().body_bytes, 200_000);
}

#[test]
fn a_request_arrives_as_it_was_sent_with_what_a_proxy_adds() {
    let backend = Backend::echo();
    let gateway = public(&[&backend]).start();
    let client = gateway.client();
    let seen = client
        .get("/a?b=c")
        .header("X-Custom", "1")
        .header("X-Custom", "2")
        .header("Authorization", "Basic eDp5")
        .header("Cookie", "a=1")
        .header("Cookie", "b=2")
        .header("Keep-Alive", "timeout=5")
        .header("Proxy-Authorization", "Basic eDp5")
        .header("TE", "trailers")
        .header("Connection", "X-Hop")
        .header("X-Hop", "1")
        .header("X-Forwarded-For", "203.0.113.9")
        .send()
        .seen();
    assert_eq!(seen.target, "/a?b=c");
    assert_eq!(seen.headers("x-custom"), ["1", "2"]);
    assert_eq!(seen.headers("authorization"), ["Basic eDp5"], "credentials for the backend are the backend's");
    assert_eq!(seen.headers("cookie"), ["a=1; b=2"], "one line");
    for hop in ["keep-alive", "proxy-authorization", "x-hop", "te"] {
        assert!(seen.headers(hop).is_empty(), "{hop} concerns one connection only");
    }
    assert_eq!(seen.headers("x-forwarded-for"), ["127.0.0.1"], "what an untrusted client says is not passed on");
    assert_eq!(seen.headers("x-forwarded-proto"), ["http"]);
    assert_eq!(seen.headers("x-forwarded-host"), seen.headers("host"));
    assert_eq!(seen.headers("via"), ["1.1 cloakroom"]);
    assert_eq!(seen.headers("x-request-id")[0].len(), 32);
}

#[test]
fn a_trusted_proxy_is_believed_and_nobody_else() {
    let backend = Backend::echo();
    for (trusted, expected) in [("[\"127.0.0.0/8\"]", "203.0.113.9, 127.0.0.1"), ("[]", "127.0.0.1")] {
        let gateway = public(&[&backend]).with(&format!("[server]\ntrusted_proxies = {trusted}")).start();
        let seen = gateway
            .client()
            .get("/")
            .header("X-Forwarded-For", "203.0.113.9")
            .header("X-Forwarded-Proto", "https")
            .header("X-Forwarded-Host", "shop.example.org")
            .header("X-Request-Id", "from-the-edge-1")
            .header("Forwarded", "for=192.0.2.1")
            .send()
            .seen();
        let believed = expected.contains("203");
        assert_eq!(seen.headers("x-forwarded-for"), [expected]);
        assert_eq!(seen.headers("x-forwarded-proto"), [if believed { "https" } else { "http" }]);
        assert_eq!(seen.headers("x-forwarded-host")[0] == "shop.example.org", believed);
        assert_eq!(seen.headers("x-request-id")[0] == "from-the-edge-1", believed);
        assert!(seen.headers("forwarded").is_empty(), "we speak X-Forwarded-*, and only one of the two");
    }
}

#[test]
fn fields_of_the_backend_connection_stay_behind_us() {
    let fields = [
        ("Connection", "X-Hop, keep-alive"),
        ("X-Hop", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Trailer", "X"),
        ("Upgrade", "h2c"),
    ];
    let backend = Backend::always(Answer::response(200, &fields, "hello"));
    let gateway = public(&[&backend]).start();
    let response = gateway.client().get("/").send();
    assert_eq!(response.text(), "hello");
    for (name, _) in &fields[1..] {
        assert!(response.headers(name).is_empty(), "{name}");
    }
}

#[test]
fn what_a_user_sees_is_kept_out_of_shared_caches() {
    let answers = [
        (vec![], Some("private, no-store")),
        (vec![("Cache-Control", "public, max-age=60")], Some("public, max-age=60")),
        (vec![("Expires", "Thu, 01 Jan 2037 00:00:00 GMT")], None),
    ];
    for (fields, expected) in answers {
        let backend = Backend::always(Answer::response(200, &fields, ""));
        let gateway = Gateway::in_front_of(&[&backend])
            .route("/", "")
            .route("/free", "cache_guard = false")
            .route("/public", "access = \"public\"")
            .start();
        let own = fields.iter().find(|(name, _)| *name == "Cache-Control").map(|(_, value)| *value);
        let ann = gateway.log_in("ann").allowing("expires");
        let cache_control = |target: &str| {
            let response = ann.get(target).header("Accept", "*/*").try_send();
            response.unwrap().header("cache-control").map(str::to_owned)
        };
        assert_eq!(cache_control("/").as_deref(), expected, "{fields:?}");
        assert_eq!(cache_control("/free").as_deref(), own, "{fields:?}");
        assert_eq!(cache_control("/public").as_deref(), own, "nobody is known here");
    }
}

#[test]
fn hosts_choose_their_routes_and_a_slip_of_spelling_changes_nothing() {
    let (exact, below, any) = (Backend::echo(), Backend::echo(), Backend::echo());
    let gateway = Gateway::in_front_of(&[&any])
        .pool("exact", &[&exact], "")
        .pool("below", &[&below], "")
        .route("/", "access = \"public\"")
        .route("/", "access = \"public\"\nhost = \"a.example.org\"\npool = \"exact\"")
        .route("/", "access = \"public\"\nhost = \"*.example.org\"\npool = \"below\"")
        .start();
    for (host, backend) in [
        ("a.example.org", &exact),
        ("A.EXAMPLE.ORG", &exact),
        ("a.example.org.", &exact),
        ("a.example.org:8080", &exact),
        ("b.example.org", &below),
        ("x.a.example.org", &below),
        ("example.org", &any),
        ("aexample.org", &any),
        ("127.0.0.1", &any),
    ] {
        let seen = gateway.client().with_host(host).get("/").send().seen();
        assert_eq!(seen.backend, backend.name(), "{host}");
    }
}

#[test]
fn head_and_empty_answers_leave_the_connection_usable() {
    let backend = Backend::answering(|request| match request.target() {
        "/204" => Answer::Exactly(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
        "/304" => Answer::Exactly(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n".to_vec()),
        "/head" => Answer::Exactly(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n".to_vec()),
        _ => Answer::Echo,
    });
    let gateway = public(&[&backend]).start();
    let client = gateway.client();
    for _ in 0..3 {
        assert_eq!(client.get("/204").send().status, 204);
        assert_eq!(client.get("/304").send().status, 304);
        assert_eq!(client.request("HEAD", "/head").send().status, 200);
        assert_eq!(client.get("/last").send().seen().target, "/last", "each answer belongs to its request");
    }
}

#[test]
fn tls_is_spoken_and_the_cookie_is_then_secure() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).tls().start();
    let ann = gateway.log_in("ann");
    let seen = ann.get("/").send().seen();
    assert_eq!(seen.headers("x-forwarded-user"), ["ann"]);
    assert_eq!(seen.headers("x-forwarded-proto"), ["https"]);
    assert!(ann.cookie("__Host-session").is_some() && ann.cookie("session").is_none());
    let plain = Client::of(gateway.address()).get("/").try_send();
    assert!(plain.is_err(), "plain HTTP is not spoken on a TLS port");
}

#[test]
fn a_kept_connection_that_the_backend_has_closed_costs_no_request() {
    // The only backend of its pool closes every connection when the second request comes, as servers do at their limit.
    let backend = Backend::answering(|request| if request.on_connection < 2 { Answer::Echo } else { Answer::close() });
    let gateway = public(&[&backend]).with("[server]\nthreads = 1").start();
    let client = gateway.client();
    for _ in 0..6 {
        assert_eq!(client.get("/").send().status, 200, "asked again on a new connection");
    }
    let posted = client.request("POST", "/").body("x").send().status;
    assert!([200, 502].contains(&posted), "what must not be repeated is not: {posted}");
}

#[test]
fn a_request_that_kills_backends_meets_only_one_more() {
    let backends: Vec<_> = (0..5).map(|_| Backend::always(Answer::close())).collect();
    let gateway = public(&backends.iter().collect::<Vec<_>>()).start();
    assert_eq!(gateway.client().get("/").send().status, 502);
    let met: usize = backends.iter().map(|backend| backend.requests().len()).sum();
    assert_eq!(met, 2, "once, and once more");
}

#[test]
fn an_upload_that_is_sent_again_is_counted_once() {
    let (dying, alive) = (Backend::always(Answer::close()), Backend::echo());
    let gateway =
        Gateway::in_front_of(&[&dying, &alive]).route("/", "access = \"public\"\nbody_bytes = \"64KiB\"").start();
    for _ in 0..2 {
        let seen = gateway.client().request("PUT", "/").body(vec![b'x'; 40_000]).send().seen();
        assert_eq!(seen.body_bytes, 40_000);
    }
}

#[test]
fn a_response_that_two_readers_could_end_differently_is_not_passed_on() {
    for response in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nab",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ] {
        let backend = Backend::always(Answer::ExactlyThenClose(response.as_bytes().to_vec()));
        let gateway = public(&[&backend]).start();
        assert_eq!(gateway.client().request("POST", "/").body("x").send().status, 502, "{response:?}");
    }
}

#[test]
fn what_concerns_the_connection_to_the_backend_does_not_reach_the_client() {
    let response = "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nConnection: x-other-hop, absent, ,\r\n\
                    Connection: X-Request-Id\r\nX-Request-Id: theirs\r\n\
                    Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authenticate: Basic\r\nTE: trailers\r\n\
                    Trailer: X-End\r\nUpgrade: h2c\r\nX-Hop: 1\r\nX-Other-Hop: 2\r\nX-Kept: 3\r\n\
                    Content-Length: 2\r\n\r\nab";
    let backend = Backend::always(Answer::Exactly(response.as_bytes().to_vec()));
    let gateway = public(&[&backend]).start();
    let answer = gateway.client().allowing("X-Kept").get("/").send();
    assert_eq!((answer.status, answer.body.as_slice()), (200, b"ab".as_slice()));
    for gone in
        ["keep-alive", "proxy-connection", "proxy-authenticate", "te", "trailer", "upgrade", "x-hop", "x-other-hop"]
    {
        assert_eq!(answer.header(gone), None, "{gone}");
    }
    assert!(answer.header("x-request-id").is_some_and(|id| id != "theirs"), "every response has one");
    assert_eq!(answer.header("x-kept"), Some("3"));
    assert_eq!(answer.header("content-length"), Some("2"));
}

#[test]
fn a_client_of_http_1_0_gets_a_body_without_chunks() {
    let backend = Backend::always(Answer::Exactly(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
    ));
    let gateway = public(&[&backend]).start();
    let mut connection = Connection::open(gateway.address());
    connection.write("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
    let all = String::from_utf8(connection.read_to_end().unwrap()).unwrap();
    assert!(!all.to_ascii_lowercase().contains("keep-alive"), "its end is the end of the body: {all}");
    assert!(!all.to_ascii_lowercase().contains("transfer-encoding"), "{all}");
    assert!(all.ends_with("\r\n\r\nhello"), "{all}");
}

#[test]
fn a_client_of_http_1_0_gets_a_body_without_chunks_from_http2_as_well() {
    let two = Http2Backend::start();
    let gateway = Gateway::in_front_of(&[&Backend::echo()])
        .with(&format!("[pool.two]\nbackends = [\"{}\"]\nprotocol = \"http2\"", two.address()))
        .route("/", "access = \"public\"\npool = \"two\"")
        .start();
    let mut connection = Connection::open(gateway.address());
    connection.write("GET /bytes/100000 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
    let all = String::from_utf8(connection.read_to_end().unwrap()).unwrap();
    let (head, body) = all.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(!head.contains("transfer-encoding") && !head.contains("keep-alive"), "{head}");
    assert_eq!(body.len(), 100_000);
    assert!(body.bytes().all(|byte| byte == b'x'));
}

#[test]
fn a_silent_web_socket_ends_without_a_word() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[])
        .pool("app", &[&backend], "websocket_timeout = \"300ms\"")
        .route("/", "access = \"public\"")
        .start();
    let mut socket = gateway.client().web_socket("/", &[]).unwrap();
    socket.write("ping");
    assert_eq!(socket.read_exactly(4).unwrap(), b"ping");
    socket.assert_closed("an error page is no message");
}

#[test]
fn a_client_that_reads_nothing_is_given_up() {
    // Answers without a body, which pingora writes without any time limit.
    let head = format!("HTTP/1.1 304 Not Modified\r\nX-Large: {}\r\n\r\n", "x".repeat(30_000));
    let backend = Backend::always(Answer::Exactly(head.into_bytes()));
    let gateway = public(&[&backend]).with("[limits]\nwrite_timeout = \"300ms\"").start();
    let mut deaf = Connection::open(gateway.address());
    let mut asked = 0;
    wait_until("the client that reads nothing is closed", || {
        asked += 1;
        let _ = deaf.try_write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        backend.after_requests(1);
        gateway.metric("cloakroom_connections") == 0.0
    });
    assert!(1 < asked);
}

#[test]
fn an_upload_that_trickles_is_given_up() {
    let backend = Backend::echo();
    let limits = "[limits]\nbody_timeout = \"1s\"\nbody_rate_min = \"1KiB\"";
    let gateway = public(&[&backend]).with(limits).start();
    let mut connection = Connection::open(gateway.address());
    connection.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n");
    wait_until("a byte now and then is not enough", || {
        connection.try_write("x").is_err() || gateway.metric("cloakroom_connections") == 0.0
    });
    let mut paused = Connection::open(gateway.address());
    paused.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nx");
    assert_eq!(paused.read_response("POST").unwrap().status, 408, "nor is nothing");
}

#[test]
fn a_request_that_is_sent_again_late_has_not_trickled() {
    // Each answer is held until the request is older than the time that its body may take.
    let dying = Backend::always(Answer::AfterStep(Box::new(Answer::close())));
    let alive = Backend::echo();
    let limits = "[limits]\nbody_timeout = \"50ms\"\nbody_rate_min = \"1GiB\"";
    let gateway = public(&[&dying, &alive]).with(limits).start();
    for (asked, method) in ["GET", "PUT"].into_iter().enumerate() {
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| {
                loop {
                    // Backends take turns: at the latest the second request meets the one that dies.
                    let response = gateway.client().request(method, "/").body("hello").send();
                    if asked < dying.requests().len() {
                        return response;
                    }
                }
            });
            dying.after_requests(asked + 1);
            let met = std::time::Instant::now();
            wait_until("the request is old", || 2 * 50 < met.elapsed().as_millis());
            dying.step();
            assert_eq!(answer.join().unwrap().seen().backend, alive.name(), "{method}");
        });
    }
}

#[test]
fn an_early_answer_to_an_upload_arrives() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "body_bytes = \"1GiB\"").start();
    for _ in 0..10 {
        let mut connection = Connection::open(gateway.address());
        connection.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n");
        connection.write(vec![b'x'; 300_000]);
        assert_eq!(connection.read_response("POST").unwrap().status, 401, "and not a reset");
    }
}

#[test]
fn a_hop_that_cannot_be_read_ends_what_is_believed() {
    let backend = Backend::echo();
    let gateway = public(&[&backend]).with("[server]\ntrusted_proxies = [\"127.0.0.1\"]").start();
    let mut connection = Connection::open(gateway.address());
    for (fields, expected) in [
        (&b"X-Forwarded-For: 192.0.2.66\r\nX-Forwarded-For: 203.0.113.9\xff\r\n"[..], "127.0.0.1"),
        (b"X-Forwarded-For: 203.0.113.9\xff\r\nX-Forwarded-For: 192.0.2.66\r\n", "192.0.2.66, 127.0.0.1"),
    ] {
        connection.write([b"GET / HTTP/1.1\r\nHost: a\r\n", fields, b"\r\n"].concat());
        let seen = connection.read_response("GET").unwrap().seen();
        assert_eq!(seen.headers("x-forwarded-for"), [expected], "nothing before the unreadable hop");
    }
}

#[test]
fn connections_are_spread_evenly() {
    let backend = Backend::echo();
    let gateway = public(&[&backend]).with("[server]\nthreads = 4\nconnections_max = 100").start();
    let held: Vec<_> = (0..4)
        .map(|_| {
            let mut connection = Connection::open(gateway.address());
            connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
            connection.read_response("GET").unwrap();
            connection
        })
        .collect();
    // Each worker keeps its own connections to a backend.
    assert_eq!(backend.open_connections(), 4, "one client for each worker");
    drop(held);
}
