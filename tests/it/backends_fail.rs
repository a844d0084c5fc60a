//! What does a user notice when a backend fails? Each way to fail, and what becomes of the request.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::Connection;
use crate::harness::gateway::{Gateway, Setup};
use crate::harness::wait_until;

fn public(backends: &[&Backend], keys: &str) -> Setup {
    Gateway::in_front_of(&[]).pool("app", backends, keys).route("/", "access = \"public\"")
}

fn in_flight(gateway: &Gateway, backend: &Backend) -> f64 {
    gateway.metric(&format!("cloakroom_backend_in_flight{{backend=\"{}\",pool=\"app\"}}", backend.address()))
}

fn requests(gateway: &Gateway, outcome: &str, status: u16) -> f64 {
    let labels = format!("outcome=\"{outcome}\",route=\"/\",status=\"{status}\"");
    gateway.metric(&format!("cloakroom_requests_total{{{labels}}}"))
}

/// A server that does with each connection what `serve` says, and with no more than a socket.
fn raw(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = Arc::clone(&serve);
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

fn in_front_of_raw(address: SocketAddr, keys: &str) -> Gateway {
    Gateway::in_front_of(&[&Backend::echo()])
        .with(&format!("[pool.raw]\nbackends = [\"{address}\"]\n{keys}"))
        .route("/", "access = \"public\"\npool = \"raw\"\nbody_bytes = \"4GiB\"")
        .start()
}

/// Up to the end of the head.
fn read_head(stream: &mut TcpStream) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        head.push(byte[0]);
    }
}

/// B1
#[test]
fn killed_before_it_is_connected_another_one_answers_whatever_the_method() {
    let (dead, alive) = (Backend::echo(), Backend::echo());
    let gateway = public(&[&dead, &alive], "eject.time = \"1h\"\neject.time_max = \"1h\"").start();
    dead.kill();
    for method in ["GET", "POST", "PATCH"] {
        for _ in 0..3 {
            let response = gateway.client().request(method, "/").body("hello").send();
            assert_eq!(response.seen().backend, alive.name(), "{method}");
        }
    }
    let sent = gateway.metric("cloakroom_retries_total{pool=\"app\",result=\"sent\"}");
    assert_eq!(sent, 1.0, "a dead one is met once");
}

/// B2, B3
#[test]
fn killed_on_a_request_another_one_answers_if_the_request_may_be_repeated_and_else_nobody() {
    for (method, expected) in [("GET", 200), ("PUT", 200), ("POST", 502), ("PATCH", 502)] {
        let (dying, alive) = (Backend::always(Answer::close()), Backend::echo());
        let gateway = public(&[&dying, &alive], "").start();
        let client = gateway.client();
        let mut statuses = Vec::new();
        while dying.requests().is_empty() {
            statuses.push(client.request(method, "/").body("hello").send().status);
        }
        assert_eq!(statuses.last(), Some(&expected), "{method}");
        assert_eq!(dying.requests().len() + alive.requests().len(), statuses.len() + usize::from(expected == 200));
    }
}

/// B4
#[test]
fn killed_in_mid_response_the_client_can_tell_and_the_connection_is_not_kept() {
    let backend = Backend::answering(|request| match request.target() {
        "/broken" => Answer::ExactlyThenClose(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this".to_vec()),
        "/chunks" => {
            Answer::ExactlyThenClose(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec())
        }
        _ => Answer::Echo,
    });
    let gateway = public(&[&backend], "").with("[server]\nthreads = 1").start();
    for (cut, target) in ["/broken", "/chunks"].into_iter().enumerate() {
        assert!(gateway.client().get(target).try_send().is_err(), "{target}: no clean end");
        wait_until("it is told of", || requests(&gateway, "truncated", 200) == (cut + 1) as f64);
        assert_eq!(gateway.client().get("/").send().seen().target, "/", "nothing of it comes with the next response");
    }
    wait_until("nothing is left open", || in_flight(&gateway, &backend) == 0.0);
}

/// B5
#[test]
fn slow_to_begin_it_is_given_up_and_its_place_is_free() {
    let silent = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let gateway = Gateway::in_front_of(&[])
        .weighted_pool("app", &[(&silent, "max_requests = 1")], "read_timeout = \"200ms\"")
        .route("/", "access = \"public\"")
        .start();
    for _ in 0..2 {
        assert_eq!(gateway.client().get("/").send().status, 504);
        wait_until("its place is free", || in_flight(&gateway, &silent) == 0.0);
    }
    assert_eq!(silent.requests().len(), 2, "a slow answer is not asked for twice");
}

/// B6
#[test]
fn slow_to_go_on_it_streams_and_a_pause_that_is_too_long_ends_it() {
    let letters: Vec<_> = "slowly".bytes().map(|letter| vec![letter]).collect();
    let backend = Backend::always(Answer::Chunks(letters));
    let gateway = public(&[&backend], "read_timeout = \"2s\"").start();
    let mut connection = Connection::open(gateway.address());
    connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    backend.step();
    connection.read_head().unwrap().unwrap();
    let mut read = connection.read_chunk().unwrap();
    for _ in 0..3 {
        backend.step();
        read.extend(connection.read_chunk().unwrap());
    }
    assert_eq!(read, b"slow", "each letter before the next one exists");
    assert!(connection.read_chunk().is_err(), "no end that looks like one");
    wait_until("it is told of", || requests(&gateway, "truncated", 200) == 1.0);
}

/// B7
#[test]
fn a_kept_connection_that_it_has_closed_costs_nobody_a_request() {
    let backend = Backend::echo();
    let gateway = public(&[&backend], "").with("[server]\nthreads = 1").start();
    let client = gateway.client();
    for method in ["GET", "POST", "GET", "POST"] {
        assert_eq!(client.request(method, "/").body("x").send().status, 200);
        backend.kill();
        backend.revive();
        // The worker sees the end of a connection that it keeps; a request that is under way just then is repeated.
        wait_until("the next one is answered", || client.get("/").send().status == 200);
    }
    let half_closed = raw(|mut stream| {
        read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read(&mut [0; 64]);
    });
    let gateway = in_front_of_raw(half_closed, "");
    let client = gateway.client();
    for _ in 0..20 {
        assert_eq!(client.get("/").send().text(), "ok");
    }
}

/// What a backend says on a kept connection is its answer: garbage is as bad there as anywhere.
#[test]
fn garbage_on_a_kept_connection_is_a_failure() {
    let backend = Backend::answering(|request| match request.target() {
        "/garbage" => Answer::ExactlyThenClose(b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec()),
        _ => Answer::Echo,
    });
    let other = Backend::echo();
    let gateway = public(&[&backend, &other], "eject.failures = 1").with("[server]\nthreads = 1").start();
    let client = gateway.client();
    (0..4).for_each(|_| assert_eq!(client.get("/").send().status, 200));
    (0..2).for_each(|_| assert_eq!(client.get("/garbage").send().seen().backend, other.name()));
    assert_eq!(backend.requests().iter().filter(|request| request.target() == "/garbage").count(), 1);
    let labels = format!("backend=\"{}\",pool=\"app\"", backend.address());
    assert_eq!(gateway.metric(&format!("cloakroom_backend_ejections_total{{{labels}}}")), 1.0);
}

/// B8
#[test]
fn garbage_is_a_502_and_what_comes_after_a_response_is_nobodys() {
    let huge = format!("HTTP/1.1 200 OK\r\nX-Huge: {}\r\nContent-Length: 2\r\n\r\nok", "x".repeat(3 << 20));
    for garbage in ["\u{0}\u{1}\u{2}garbage\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n", &huge] {
        let backend = Backend::always(Answer::ExactlyThenClose(garbage.as_bytes().to_vec()));
        let gateway = public(&[&backend], "").start();
        assert_eq!(gateway.client().request("POST", "/").body("x").send().status, 502, "{:.20}", garbage);
    }
    let twice = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none";
    let stray = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
    let backend = Backend::answering(move |request| match request.target() {
        "/twice" => Answer::Exactly(format!("{twice}{stray}").into_bytes()),
        _ => Answer::Echo,
    });
    let gateway = public(&[&backend], "").with("[server]\nthreads = 1").start();
    let client = gateway.client();
    for _ in 0..5 {
        assert_eq!(client.get("/twice").send().text(), "one");
        assert_eq!(client.get("/own").send().seen().target, "/own", "each gets its own");
    }
}

/// B9
#[test]
fn all_dead_the_user_is_told_and_stays_logged_in_and_nobody_storms() {
    let backends = [Backend::echo(), Backend::echo(), Backend::echo()];
    let gateway = Gateway::in_front_of(&[&backends[0], &backends[1], &backends[2]]).start();
    let ann = gateway.log_in("ann");
    let cookie = ann.cookie("session");
    backends.iter().for_each(Backend::kill);
    for _ in 0..4 {
        let response = ann.get("/").send();
        assert_eq!((response.status, response.header("retry-after")), (503, Some("2")));
        assert!(response.headers("set-cookie").is_empty());
    }
    let sent = gateway.metric("cloakroom_retries_total{pool=\"app\",result=\"sent\"}");
    assert!(sent <= 8.0, "each backend once for each request: {sent}");
    backends[1].revive();
    wait_until("one is enough", || ann.get("/").send().status == 200);
    assert_eq!(ann.cookie("session"), cookie);
    assert_eq!(ann.get("/").send().seen().headers("x-forwarded-user"), ["ann"]);
}

/// B10
#[test]
fn coming_and_going_it_is_out_for_longer_each_time_and_the_others_share_alike() {
    let failing = Arc::new(AtomicUsize::new(0));
    let fails = Arc::clone(&failing);
    let flapping = Backend::answering(move |_| {
        // Two requests fail, one succeeds.
        if fails.fetch_add(1, Ordering::SeqCst) % 3 == 2 { Answer::Echo } else { Answer::response(500, &[], "") }
    });
    let others = [Backend::echo(), Backend::echo(), Backend::echo()];
    let keys = "eject.failures = 2\neject.statuses = [500]\neject.time = \"100ms\"\neject.time_max = \"1h\"";
    let gateway = public(&[&flapping, &others[0], &others[1], &others[2]], keys).start();
    let client = gateway.client();
    let ejections = || {
        gateway.metric(&format!("cloakroom_backend_ejections_total{{backend=\"{}\",pool=\"app\"}}", flapping.address()))
    };
    wait_until("it has come back, and gone again", || {
        client.get("/").send();
        2.0 <= ejections()
    });
    let met = |backend: &Backend| backend.requests().len();
    // Now and then a request tries whether it is back, less often each time; between two of those, turns are strict.
    wait_until("a round of turns without it", || {
        let (before, flapped): (Vec<_>, _) = (others.iter().map(met).collect(), met(&flapping));
        (0..30).for_each(|_| drop(client.get("/").send()));
        let shares: Vec<_> = others.iter().zip(&before).map(|(other, before)| met(other) - before).collect();
        let is_without_it = met(&flapping) == flapped;
        assert!(!is_without_it || shares == [10, 10, 10], "{shares:?}");
        is_without_it
    });
}

/// B11
#[test]
fn that_reads_nothing_an_upload_is_held_back_and_given_up() {
    let deaf = raw(|stream| {
        let _ = stream.peek(&mut [0]);
        std::thread::park_timeout(crate::harness::DEADLINE * 2);
        drop(stream);
    });
    let gateway = in_front_of_raw(deaf, "write_timeout = \"1s\"\nread_timeout = \"1s\"");
    let mut connection = Connection::open(gateway.address());
    connection.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\n\r\n");
    let chunk = vec![b'x'; 64 * 1024];
    let mut taken = 0_usize;
    while taken < 1 << 30 && connection.try_write(&chunk).is_ok() {
        taken += chunk.len();
    }
    assert!(taken < 64 << 20, "what nobody reads is not piled up: {taken} bytes");
    wait_until("the request is given up", || requests(&gateway, "backend_timeout", 504) == 1.0);
}

/// B12
#[test]
fn that_answers_before_the_upload_has_ended_is_passed_on() {
    for response in [
        "HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge",
        "HTTP/1.1 401 Unauthorized\r\nContent-Length: 5\r\n\r\nlarge",
    ] {
        let early = raw(move |mut stream| {
            read_head(&mut stream);
            let _ = stream.write_all(response.as_bytes());
            let mut bytes = [0; 64 * 1024];
            while stream.read(&mut bytes).is_ok_and(|count| count != 0) {}
        });
        let gateway = in_front_of_raw(early, "");
        let mut connection = Connection::open(gateway.address());
        connection.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n");
        connection.write(vec![b'x'; 100_000]);
        let got = connection.read_response("POST").unwrap();
        assert_eq!((got.status.to_string(), got.text()), (response[9..12].to_owned(), "large".to_owned()));
        let next = gateway.client().request("POST", "/").body("x").send();
        assert_eq!(next.text(), "large", "the next request is its own");
    }
}

/// B13
#[test]
fn dying_with_open_web_sockets_they_end_and_are_counted_no_more() {
    let backend = Backend::echo();
    let gateway = public(&[&backend], "").start();
    let client = gateway.client();
    let mut sockets: Vec<_> = (0..3).map(|_| client.web_socket("/", &[]).unwrap()).collect();
    for socket in &mut sockets {
        socket.write("ping");
        assert_eq!(socket.read_exactly(4).unwrap(), b"ping");
    }
    assert_eq!(in_flight(&gateway, &backend), 3.0);
    backend.kill();
    for socket in &mut sockets {
        socket.assert_closed("its backend is gone");
    }
    wait_until("none is left", || in_flight(&gateway, &backend) == 0.0);
    wait_until("nor a client connection", || gateway.metric("cloakroom_connections") == 0.0);
}
