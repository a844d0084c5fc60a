//! Is a request in HTTP/2 the same request? Sessions, identity, the guard, bodies and trailers, with either protocol in
//! front and either behind. (invariants 1, 2, 6)

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Seen};
use crate::harness::gateway::{Form, Gateway, PASSWORD, Setup};
use crate::harness::http2::{
    ACK, DATA, END_HEADERS, END_STREAM, Frame, Frames, GOAWAY, HEADERS, Http2Backend, Http2Client, Http2Response, PING,
    RST_STREAM, WINDOW_UPDATE, fields, frame, get,
};
use crate::harness::{tls, wait_until};

/// `/one` is answered in HTTP/1, `/echo` in HTTP/2; with `access` for both.
fn both(one: &Backend, two: &Http2Backend, access: &str) -> Setup {
    Gateway::in_front_of(&[one])
        .tls()
        .with(&format!("[pool.two]\nbackends = [\"{}\"]\nprotocol = \"http2\"", two.address()))
        .route("/one", access)
        .route("/", &format!("pool = \"two\"\n{access}"))
}

fn client(gateway: &Gateway) -> Http2Client {
    Http2Client::connect(gateway.address(), &tls::trust())
}

#[test]
fn a_session_counts_and_is_kept_from_backends_whatever_is_spoken() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"required\"").start();
    let browser = gateway.log_in("ann");
    let (name, id) = browser.cookies().into_iter().find(|(name, _)| name.contains("session")).unwrap();
    let cookie = format!("{name}={id}");
    let http2 = client(&gateway);
    for path in ["/one", "/echo"] {
        let in_one = browser.get(path).header("Cookie", "theme=dark").send().seen();
        // Crumbs, as browsers send them (RFC 9113, section 8.2.3).
        let crumbs = [("cookie", "theme=dark"), ("cookie", cookie.as_str()), ("cookie", "lang=en")];
        let in_two = http2.get(path, &crumbs).seen();
        for (seen, cookies) in [(&in_one, "theme=dark"), (&in_two, "theme=dark; lang=en")] {
            assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "{path}");
            assert_eq!(seen.headers("cookie"), [cookies], "{path}: one field, without ours");
            assert_eq!(seen.headers("x-forwarded-proto"), ["https"], "{path}");
        }
        assert_eq!(http2.get(path, &[]).status, 401, "{path}: nobody without a session");
        let twice = [("cookie", cookie.as_str()), ("cookie", cookie.as_str())];
        assert_eq!(http2.get(path, &twice).status, 401, "{path}: two sessions are none");
    }
}

#[test]
fn somebody_logs_in_and_out_in_http2() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"required\"").start();
    let http2 = client(&gateway);
    let mut cookies = Vec::<String>::new();
    // A page with a form, the form filled in, and the answer to that.
    let mut submit = |path: &str, values: &[(&str, &str)]| {
        let crumbs = cookies.clone();
        let page: Vec<_> = crumbs.iter().map(|cookie| ("cookie", cookie.as_str())).collect();
        let shown = http2.get(path, &page);
        keep(&mut cookies, &shown);
        let form = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(Form::on(&shown.text()).filled_in(values))
            .finish();
        let (crumbs, origin) = (cookies.clone(), format!("https://{}", http2.authority()));
        let mut fields: Vec<_> = crumbs.iter().map(|cookie| ("cookie", cookie.as_str())).collect();
        fields.extend([
            ("origin", origin.as_str()),
            ("sec-fetch-site", "same-origin"),
            ("content-type", "application/x-www-form-urlencoded"),
        ]);
        let answer = http2.send("POST", path, &fields, form.as_bytes());
        assert_eq!(answer.status, 303, "{path}: {}", answer.text());
        keep(&mut cookies, &answer);
        cookies.clone()
    };
    let login = submit("/.cloakroom/login", &[("username", "ann"), ("password", PASSWORD)]);
    let fields: Vec<_> = login.iter().map(|cookie| ("cookie", cookie.as_str())).collect();
    assert_eq!(http2.get("/echo", &fields).seen().headers("x-forwarded-user"), ["ann"]);
    submit("/.cloakroom/logout", &[]);
    assert_eq!(http2.get("/echo", &fields).status, 401, "the cookie is worth nothing any more");
}

#[test]
fn a_call_ends_with_its_session_and_the_others_of_its_connection_go_on() {
    let two = Http2Backend::start();
    let gateway = both(&Backend::echo(), &two, "access = \"optional\"").start();
    let browser = gateway.log_in("ann");
    let cookie = browser.cookie_field().unwrap();
    let http2 = client(&gateway);
    let talk = |fields: &[(&str, &str)]| {
        let mut call = http2.begin("POST", "/talk", fields, false).unwrap();
        assert_eq!(call.head().unwrap().0, 200);
        call.write(b"hello", false);
        assert_eq!(call.chunk().unwrap().unwrap(), &b"hello"[..]);
        call
    };
    let (mut of_ann, mut of_nobody) = (talk(&[("cookie", &cookie)]), talk(&[]));
    wait_until("it is listed", || gateway.metric("cloakroom_streams") == 1.0);
    gateway.log_out(&browser);
    assert!(of_ann.chunk().is_err(), "it breaks off");
    of_nobody.write(b"still here", false);
    assert_eq!(of_nobody.chunk().unwrap().unwrap(), &b"still here"[..], "it was in no session");
    assert_eq!(gateway.metric("cloakroom_streams_cut_total"), 1.0);
}

/// What a browser does with `Set-Cookie`.
fn keep(cookies: &mut Vec<String>, response: &Http2Response) {
    for line in response.headers.get_all("set-cookie") {
        let pair = line.to_str().unwrap().split(';').next().unwrap_or_default().to_owned();
        let name = pair.split('=').next().unwrap_or_default().to_owned();
        cookies.retain(|cookie| !cookie.starts_with(&format!("{name}=")));
        cookies.push(pair);
    }
}

#[test]
fn no_look_alike_reaches_a_backend_whatever_is_spoken() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"public\"").start();
    let http2 = client(&gateway);
    let names = ["x-forwarded-user", "x_forwarded_user", "remote-user", "remote_user", "x-forwarded-groups", "iv-user"];
    for path in ["/one", "/echo"] {
        for name in names {
            for seen in [
                http2.get(path, &[(name, "root")]).seen(),
                gateway.client().get(path).header(name, "root").send().seen(),
            ] {
                assert!(!seen.headers.iter().any(|(_, value)| value == "root"), "{path} {name}: {seen:?}");
            }
        }
    }
}

#[test]
fn what_is_sent_arrives_whatever_is_spoken() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"public\"").start();
    let http2 = client(&gateway);
    let check = |seen: Seen, path: &str, authority: &str, bytes: usize| {
        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("POST", format!("{path}?a=%2F").as_str()));
        assert_eq!(seen.body_bytes, bytes, "{path}");
        assert_eq!(seen.headers("x-custom"), ["1", "2"], "{path}");
        let host = if path == "/one" { "host" } else { ":authority" };
        assert_eq!(seen.headers(host), [authority], "{path}: the host that was asked for");
        assert_eq!(seen.headers("via").len(), 1, "{path}");
    };
    for path in ["/one", "/echo"] {
        let target = format!("{path}?a=%2F");
        for bytes in [0, 5, 300_000] {
            let body = vec![b'x'; bytes];
            let sent = http2.send("POST", &target, &[("x-custom", "1"), ("x-custom", "2")], &body);
            check(sent.seen(), path, http2.authority(), bytes);
            assert!(sent.headers.get("transfer-encoding").is_none() && sent.headers.get("connection").is_none());
            let browser = gateway.client();
            let sent =
                browser.request("POST", &target).header("X-Custom", "1").header("X-Custom", "2").body(body).send();
            let authority = browser.origin().split_off("https://".len());
            check(sent.seen(), path, &authority, bytes);
        }
        let head = http2.send("HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
}

#[test]
fn trailers_pass_where_both_sides_have_them_and_decide_nothing() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"public\"").start();
    let http2 = client(&gateway);
    let response = http2.send("POST", "/echo", &[("te", "trailers"), ("content-type", "application/grpc")], b"hello");
    assert_eq!(response.seen().headers("te"), ["trailers"], "gRPC servers insist on it");
    let trailers = response.trailers.as_ref().expect("trailers");
    assert_eq!(trailers.get("grpc-status").unwrap(), "0");
    assert!(trailers.get("set-cookie").is_none() && trailers.get("session-set").is_none(), "{trailers:?}");
    assert!(http2.get("/one", &[("te", "trailers")]).seen().headers("te").is_empty(), "of one hop");

    // Those of a request are dropped: no rule has looked at them.
    let mut exchange = http2.begin("POST", "/echo", &[], false).unwrap();
    exchange.sending.send_data("hello".into(), false).unwrap();
    exchange
        .sending
        .send_trailers(http::HeaderMap::from_iter([("x-forwarded-user".parse().unwrap(), "root".parse().unwrap())]))
        .unwrap();
    let seen = exchange.finish().unwrap().seen();
    assert_eq!(seen.body_bytes, 5);
    assert!(!seen.headers.iter().any(|(name, value)| name.contains("trailer-") || value == "root"), "{seen:?}");
}

#[test]
fn both_sides_of_a_call_speak_in_turn() {
    let two = Http2Backend::start();
    let gateway = both(&Backend::echo(), &two, "access = \"public\"").start();
    let http2 = client(&gateway);
    let mut call = http2.begin("POST", "/talk", &[], false).unwrap();
    assert_eq!(call.head().unwrap().0, 200, "before the request has ended");
    for word in [&b"one"[..], b"two", b"three"] {
        call.write(word, false);
        assert_eq!(call.chunk().unwrap().unwrap(), word);
    }
    call.sending.send_data(bytes::Bytes::new(), true).unwrap();
    while let Some(rest) = call.chunk().unwrap() {
        assert!(rest.is_empty(), "{rest:?}");
    }
}

#[test]
fn events_arrive_as_they_are_made() {
    let one = Backend::always(Answer::Chunks(vec![b"data: one\n\n".to_vec(), b"data: two\n\n".to_vec()]));
    let gateway = both(&one, &Http2Backend::start(), "access = \"public\"").start();
    let http2 = client(&gateway);
    let mut events = http2.begin("GET", "/one", &[("accept", "text/event-stream")], true).unwrap();
    one.step();
    assert_eq!(events.head().unwrap().0, 200);
    assert_eq!(events.chunk().unwrap().unwrap(), &b"data: one\n\n"[..], "before the second one exists");
    one.step();
    assert_eq!(events.chunk().unwrap().unwrap(), &b"data: two\n\n"[..]);
}

#[test]
fn connections_are_not_counted_out_by_streams() {
    let silent = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let server = "[server]\nthreads = 1\nconnections_max = 4";
    let gateway = Gateway::in_front_of(&[&silent]).tls().route("/", "access = \"public\"").with(server).start();
    let http2 = client(&gateway);
    // The connection and the first request on it are one, three more make four.
    let waiting: Vec<_> = (0..4).map(|_| http2.begin("GET", "/", &[], true).unwrap()).collect();
    silent.after_requests(4);
    let refused = http2.try_send("GET", "/", &[], b"").expect_err("there is no room");
    assert_eq!(refused.reason(), Some(h2::Reason::REFUSED_STREAM), "and the client may ask again");
    waiting.iter().for_each(|_| silent.step());
    for waiting in waiting {
        assert_eq!(waiting.finish().unwrap().status, 200);
    }
    silent.step();
    wait_until("there is room again", || http2.try_send("GET", "/", &[], b"").is_ok());
}

#[test]
fn a_client_that_only_listens_is_not_too_slow() {
    let two = Http2Backend::start();
    let limits = "[limits]\nbody_timeout = \"200ms\"\nbody_rate_min = \"100KiB\"";
    let gateway = both(&Backend::echo(), &two, "access = \"public\"").with(limits).start();
    let http2 = client(&gateway);
    let mut call = http2.begin("POST", "/talk", &[], false).unwrap();
    assert_eq!(call.head().unwrap().0, 200);
    // The pause itself is what is tested: nothing may happen in it.
    std::thread::park_timeout(std::time::Duration::from_millis(600));
    call.write(b"still here", false);
    assert_eq!(call.chunk().unwrap().unwrap(), &b"still here"[..]);
}

#[test]
fn an_upload_that_does_not_come_is_given_up() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"public\"").with("[limits]\nbody_timeout = \"200ms\"").start();
    let http2 = client(&gateway);
    for path in ["/one", "/echo"] {
        let mut upload = http2.begin("POST", path, &[], false).unwrap();
        upload.write(b"the beginning", false);
        assert_eq!(upload.finish().unwrap().status, 408, "{path}");
        assert_eq!(http2.get(path, &[]).status, 200, "{path}: the connection goes on");
    }
}

#[test]
fn a_client_that_waits_for_leave_gets_it() {
    let (one, two) = (Backend::echo(), Http2Backend::start());
    let gateway = both(&one, &two, "access = \"public\"\nbody_bytes = \"1KiB\"").start();
    let http2 = client(&gateway);
    for path in ["/one", "/echo"] {
        let mut upload = http2.begin("POST", path, &[("expect", "100-continue")], false).unwrap();
        assert_eq!(upload.informed().unwrap(), 100, "{path}");
        upload.write(b"hello", true);
        let seen = upload.finish().unwrap().seen();
        assert_eq!((seen.body_bytes, seen.headers("expect").len()), (5, 0), "{path}");

        let fields = [("expect", "100-continue"), ("content-length", "5000")];
        let too_much = http2.begin("POST", path, &fields, false).unwrap();
        assert_eq!(too_much.finish().unwrap().status, 413, "{path}: without a byte of the body");
    }
}

#[test]
fn an_answer_may_come_before_the_request_has_ended() {
    let one = Backend::always(Answer::ExactlyThenClose(
        b"HTTP/1.1 413 Too Large\r\ncontent-length: 8\r\nconnection: close\r\n\r\ntoo much".to_vec(),
    ));
    let two = Http2Backend::start();
    let gateway = both(&one, &two, "access = \"public\"").start();
    let http2 = client(&gateway);
    let mut upload = http2.begin("POST", "/early", &[], false).unwrap();
    upload.write(b"the beginning", false);
    assert_eq!(upload.head().unwrap().0, 413);
    assert_eq!(upload.chunk().unwrap().unwrap(), &b"too much"[..]);
    drop(upload);
    assert_eq!(http2.get("/echo", &[]).status, 200, "the connection goes on");
}

#[test]
fn a_response_that_breaks_off_is_not_made_to_look_whole() {
    let one =
        Backend::always(Answer::ExactlyThenClose(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this".to_vec()));
    let two = Http2Backend::start();
    let gateway = both(&one, &two, "access = \"public\"").start();
    let http2 = client(&gateway);
    for path in ["/one", "/broken"] {
        // Where it breaks off before its head is sent on, it is 502.
        let broken = http2.try_send("GET", path, &[], b"").map(|response| response.status);
        assert!(matches!(broken, Err(_) | Ok(502)), "{path}: the client can tell: {broken:?}");
        let broken = gateway.client().get(path).try_send().map(|response| response.status);
        assert!(matches!(broken, Err(_) | Ok(502)), "{path}: in HTTP/1, too: {broken:?}");
    }
}

#[test]
fn what_a_backend_has_refused_unseen_is_sent_again_whatever_its_method() {
    let two = Http2Backend::start();
    let gateway = both(&Backend::echo(), &two, "access = \"public\"").start();
    let sent = client(&gateway).send("POST", "/refused-first", &[], b"hello");
    assert_eq!(sent.seen().body_bytes, 5);
    assert_eq!(two.requests(), ["POST /refused-first", "POST /refused-first"]);
}

#[test]
fn an_error_on_a_kept_connection_is_a_failure_and_the_end_of_the_connection_is_not() {
    for (path, status, attempts, ejected) in
        [("/reset", 502, 2, 1.0), ("/kept-closed", 200, 3, 0.0), ("/refused-first", 200, 3, 0.0)]
    {
        let (one, two) = (Http2Backend::start(), Http2Backend::start());
        let pool = format!(
            "[pool.pair]\nbackends = [\"{}\", \"{}\"]\nprotocol = \"http2\"\neject.failures = 1",
            one.address(),
            two.address()
        );
        let gateway = Gateway::in_front_of(&[&Backend::echo()])
            .with("[server]\nthreads = 1")
            .with(&pool)
            .route("/", "access = \"public\"\npool = \"pair\"")
            .start();
        let client = gateway.client();
        (0..2).for_each(|_| assert_eq!(client.get("/echo").send().status, 200, "both have a connection now"));
        assert_eq!(client.get(path).send().status, status, "{path}");
        let seen = [one.requests(), two.requests()].concat();
        assert_eq!(seen.iter().filter(|seen| seen.ends_with(path)).count(), attempts, "{path}: {seen:?}");
        let ejections: f64 = [&one, &two]
            .map(|backend| {
                let labels = format!("backend=\"{}\",pool=\"pair\"", backend.address());
                gateway.metric(&format!("cloakroom_backend_ejections_total{{{labels}}}"))
            })
            .iter()
            .sum();
        assert_eq!(ejections, ejected, "{path}");
    }
}

/// Fields of a request, raw, and the status of the answer; 0 = there is none: the stream is reset, or the connection ends.
fn refused() -> Vec<(Vec<(&'static str, &'static str)>, u16)> {
    const USUAL: [(&str, &str); 4] =
        [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/")];
    let with = |field| [&USUAL[..], &[field]].concat();
    let instead = |name: &str, value: &'static str| {
        USUAL.map(|(other, usual)| if other == name { (other, value) } else { (other, usual) }).to_vec()
    };
    let without = |name: &str| USUAL.into_iter().filter(|(other, _)| *other != name).collect::<Vec<_>>();
    vec![
        (with(("host", "other")), 400),
        (with(("host", "localhost")), 200),
        (without(":authority"), 400),
        ([&without(":authority")[..], &[("host", "localhost")]].concat(), 200),
        (instead(":authority", "user@localhost"), 400),
        (instead(":authority", "local_host..x"), 400),
        (instead(":path", "/a//b"), 400),
        (instead(":path", "/a/../b"), 400),
        (instead(":path", "/a%2Fb"), 400),
        (instead(":path", "/a;b"), 400),
        (instead(":path", "*"), 400),
        (instead(":method", "TRACE"), 405),
        (instead(":method", "get"), 400),
        (with(("x.y", "1")), 400),
        (with(("content_length", "1")), 400),
        (with(("transfer_encoding", "chunked")), 400),
        (with(("x-a", " 1")), 400),
        (with(("x-a", "1 ")), 400),
        (with(("expect", "something")), 417),
        (with(("connection", "close")), 0),
        (with(("transfer-encoding", "chunked")), 0),
        (with(("upgrade", "websocket")), 0),
        (with(("keep-alive", "1")), 0),
        (with(("proxy-connection", "close")), 0),
        (with(("te", "gzip")), 0),
        (with(("X-Upper", "1")), 0),
        (with(("x-a", "1\r\nx-b: 2")), 0),
        (with(("x-a", "1\0")), 0),
        (with(("content-length", "5")), 0),
        (without(":path"), 0),
        (without(":method"), 0),
        (with((":path", "/other")), 0),
        (vec![(":method", "GET"), (":scheme", "https"), ("x-a", "1"), (":path", "/")], 0),
    ]
}

#[test]
fn an_ambiguous_request_is_refused_and_the_others_of_its_connection_go_on() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).tls().route("/", "access = \"public\"").start();
    let mut frames = Frames::open(gateway.address(), &tls::trust(), &[]);
    let (mut reached, mut stream) = (0, 1);
    for (request, expected) in refused() {
        frames.write(HEADERS, END_STREAM | END_HEADERS, stream, &fields(&request)).unwrap();
        let answer = frames.read_until(|frame| frame.stream == stream || frame.kind == GOAWAY).unwrap();
        let status = match answer.kind {
            HEADERS => status(&answer.payload),
            RST_STREAM => 0,
            GOAWAY => {
                assert_eq!(expected, 0, "{request:?}");
                (frames, stream) = (Frames::open(gateway.address(), &tls::trust(), &[]), 1);
                continue;
            }
            other => panic!("frame {other} for {request:?}"),
        };
        assert_eq!(status, expected, "{request:?}");
        reached += usize::from(status == 200);
        frames.write_raw(&get(stream + 2, "/")).unwrap();
        let next = frames.read_until(|frame| frame.stream == stream + 2).unwrap();
        assert_eq!((next.kind, status_of(&next.payload)), (HEADERS, Some(200)), "after {request:?}");
        (reached, stream) = (reached + 1, stream + 4);
        assert_eq!(backend.requests().len(), reached, "no backend has seen {request:?}");
    }
}

#[test]
fn limits_are_the_same_in_both() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).tls().route("/", "access = \"public\"").start();
    let http2 = client(&gateway);
    let many: Vec<_> = (0..101).map(|number| (format!("x-{number}"), "1")).collect();
    let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let crumbs = vec![("cookie", "a=1"); 200];
    assert_eq!(http2.get(&format!("/{}", "a".repeat(9000)), &[]).status, 414);
    assert_eq!(http2.get("/", &many).status, 431);
    assert_eq!(http2.get("/", &crumbs).status, 200, "crumbs are one field");
    assert_eq!(http2.get("/", &[("x-large", &"a".repeat(40_000))]).status, 431);
    assert_eq!(http2.get("/", &[]).status, 200, "the connection goes on");
}

#[test]
fn a_web_socket_goes_to_a_backend_in_http1_whatever_the_pool_speaks() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[])
        .pool("app", &[&backend], "protocol = \"http2\"")
        .tls()
        .route("/", "access = \"public\"")
        .start();
    let mut socket = gateway.client().web_socket("/", &[]).unwrap();
    socket.write("hello");
    assert_eq!(socket.read_exactly(5).unwrap(), b"hello");
}

/// One window for the whole connection, and each stream has a part of it.
#[test]
fn uploads_that_wait_hold_up_nobody_elses() {
    const UPLOADS: usize = 12;
    let (busy, free) = (Backend::always(Answer::AfterStep(Box::new(Answer::Echo))), Backend::echo());
    let gateway = Gateway::in_front_of(&[&free])
        .weighted_pool("busy", &[(&busy, "max_requests = 1")], "queue = 20\nqueue_timeout = \"1h\"")
        .tls()
        .route("/busy", "access = \"public\"\npool = \"busy\"")
        .route("/", "access = \"public\"")
        .start();
    let http2 = client(&gateway);
    assert_eq!(http2.get("/", &[]).status, 200, "the windows are agreed");
    let first = http2.begin("GET", "/busy", &[], true).unwrap();
    busy.after_requests(1);
    let window = vec![b'x'; 64 << 10];
    let stalled: Vec<_> = (0..UPLOADS)
        .map(|_| {
            let mut upload = http2.begin("POST", "/busy", &[], false).unwrap();
            upload.write(&window, false);
            upload
        })
        .collect();
    wait_until("they wait", || gateway.metric("cloakroom_queue_waiting{pool=\"busy\"}") == UPLOADS as f64);
    assert_eq!(http2.send("POST", "/", &[], b"hello").seen().body_bytes, 5);
    busy.step();
    assert_eq!(first.finish().unwrap().status, 200);
    drop(stalled);
}

/// It is the client who says when it has ended, by answering a ping; this one does not.
#[test]
fn a_flood_ends_a_connection_that_is_ending_already() {
    const ENHANCE_YOUR_CALM: u32 = 11;
    let silent = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let gateway = Gateway::in_front_of(&[&Backend::echo()])
        .pool("silent", &[&silent], "")
        .tls()
        .with("[limits]\nkeepalive_timeout = \"200ms\"")
        .route("/silent", "access = \"public\"\npool = \"silent\"")
        .route("/", "access = \"public\"")
        .start();
    let mut frames = Frames::open(gateway.address(), &tls::trust(), &[]);
    frames.write_raw(&get(1, "/silent")).unwrap();
    silent.after_requests(1);
    silent.step();
    let reason =
        |frame: &Frame| (frame.kind == GOAWAY).then(|| u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
    let farewell = frames.read_until(|frame| frame.kind == GOAWAY).unwrap();
    assert_eq!(reason(&farewell), Some(0), "nothing was asked for a while");
    let (cancel, mut stream, mut ended) = (8_u32.to_be_bytes(), 3, None);
    for _ in 0..40 {
        let streams = (stream..stream + 100).step_by(2);
        // This one is answered, so that those before it have been begun with.
        let last = stream + 100;
        stream = last + 2;
        let requests: Vec<u8> = streams.clone().flat_map(|stream| get(stream, "/silent")).collect();
        frames.write_raw(&[requests, get(last, "/")].concat()).unwrap();
        let next = frames.read_until(|frame| frame.kind == GOAWAY || frame.stream == last).unwrap();
        if next.kind == GOAWAY {
            ended = reason(&next);
            break;
        }
        let resets: Vec<u8> = streams.flat_map(|stream| frame(RST_STREAM, 0, stream, &cancel)).collect();
        frames.write_raw(&resets).unwrap();
    }
    assert_eq!(ended, Some(ENHANCE_YOUR_CALM), "2000 requests that came to nothing are too many");
}

#[test]
fn a_stop_lets_streams_end() {
    let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let gateway = Gateway::in_front_of(&[&backend]).tls().route("/", "access = \"public\"").start();
    let http2 = client(&gateway);
    let request = http2.begin("GET", "/", &[], true).unwrap();
    backend.after_requests(1);
    let address = gateway.address();
    let stopping = std::thread::spawn(move || gateway.stop());
    wait_until("the port is closed", || std::net::TcpStream::connect(address).is_err());
    backend.step();
    assert_eq!(request.finish().unwrap().status, 200);
    stopping.join().unwrap();
}

const LARGE_BYTES: usize = 200_000;

/// Windows in which nothing has to wait.
fn open_narrow(gateway: &Gateway) -> Frames {
    const INITIAL_WINDOW_SIZE: u16 = 4;
    let mut frames = Frames::open_narrow(gateway.address(), &tls::trust(), &[(INITIAL_WINDOW_SIZE, 1 << 20)]);
    frames.write(WINDOW_UPDATE, 0, 0, &(1_u32 << 20).to_be_bytes()).unwrap();
    frames
}

/// The bytes of the body up to the end of the connection, from a client that announces room while it reads.
fn read_to_end(frames: &mut Frames) -> usize {
    let mut bytes = 0;
    while let Ok(frame) = frames.read() {
        // Nobody has to hear it any more.
        let _ = match frame.kind {
            DATA => {
                bytes += frame.payload.len();
                frames.write(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes())
            }
            PING => frames.write(PING, ACK, 0, &frame.payload),
            _ => Ok(()),
        };
    }
    bytes
}

#[test]
fn a_stop_waits_for_who_takes_a_response_slowly() {
    let backend = Backend::always(Answer::response(200, &[], vec![b'x'; LARGE_BYTES]));
    let gateway = Gateway::in_front_of(&[&backend]).tls().route("/", "access = \"public\"").start();
    let mut frames = open_narrow(&gateway);
    frames.write_raw(&get(1, "/")).unwrap();
    let forwarded = "cloakroom_requests_total{outcome=\"forwarded\",route=\"/\",status=\"200\"}";
    wait_until("all of it is on its way", || gateway.metric(forwarded) == 1.0);
    let address = gateway.address();
    let stopping = std::thread::spawn(move || gateway.stop());
    wait_until("the port is closed", || std::net::TcpStream::connect(address).is_err());
    // The pause itself is what is tested: longer than an idle connection has for a last request.
    std::thread::park_timeout(std::time::Duration::from_millis(1_500));
    assert_eq!(read_to_end(&mut frames), LARGE_BYTES);
    stopping.join().unwrap();
}

#[test]
fn a_stop_does_not_wait_for_who_has_everything_and_does_not_say_so() {
    let gateway = Gateway::in_front_of(&[&Backend::echo()])
        .tls()
        .with("[limits]\nwrite_timeout = \"1h\"\n[server]\ndrain_timeout = \"1h\"")
        .route("/", "access = \"public\"")
        .start();
    let mut frames = Frames::open(gateway.address(), &tls::trust(), &[]);
    frames.write_raw(&get(1, "/")).unwrap();
    frames.read_until(|frame| frame.kind == DATA).unwrap();
    let stopping = std::thread::spawn(move || gateway.stop());
    frames.read_until(|frame| frame.kind == PING).unwrap();
    wait_until("the gateway has stopped", || stopping.is_finished());
    stopping.join().unwrap();
}

#[test]
fn what_a_client_says_while_it_reads_destroys_no_response() {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {LARGE_BYTES}\r\n\r\n");
    let (first, rest) = ([head.as_bytes(), b"x"].concat(), vec![b'x'; LARGE_BYTES - 1]);
    let backend = Backend::always(Answer::Pieces(vec![first, rest]));
    let gateway = Gateway::in_front_of(&[&backend]).tls().route("/", "access = \"public\"").start();
    let mut frames = open_narrow(&gateway);
    frames.write_raw(&get(1, "/")).unwrap();
    let first = frames.read_until(|frame| frame.kind == DATA).unwrap().payload.len();
    let admin = Client::of(gateway.admin_address());
    let stopping = std::thread::spawn(move || gateway.stop());
    // The connection is over as soon as the response is.
    let ping = frames.read_until(|frame| frame.kind == PING).unwrap();
    frames.write(PING, ACK, 0, &ping.payload).unwrap();
    frames.read_until(|frame| frame.kind == GOAWAY).unwrap();
    backend.step();
    let forwarded = "cloakroom_requests_total{outcome=\"forwarded\",route=\"/\",status=\"200\"} 1\n";
    let is_on_its_way = || admin.get("/metrics").try_send().map_or(true, |metrics| metrics.text().contains(forwarded));
    wait_until("all of it is on its way", is_on_its_way);
    assert_eq!(first + read_to_end(&mut frames), LARGE_BYTES);
    stopping.join().unwrap();
}

fn status(block: &[u8]) -> u16 {
    status_of(block).unwrap_or_else(|| panic!("no status in {block:?}"))
}

/// `:status`, which is the first field and one of the static table, or a literal with its name (RFC 7541).
fn status_of(block: &[u8]) -> Option<u16> {
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    // A change of the size of the table comes first.
    let block = if block.first()? & 0xe0 == 0x20 { &block[1..] } else { block };
    match *block.first()? {
        indexed @ 0x88..=0x8e => Some(STATIC[usize::from(indexed - 0x88)]),
        _ => {
            let length = usize::from(block.get(1)? & 0x7f);
            let value = block.get(2..2 + length)?;
            if block[1] & 0x80 == 0 { std::str::from_utf8(value).ok()?.parse().ok() } else { huffman(value) }
        }
    }
}

/// Three digits (RFC 7541, appendix B): five bits each for 0, 1 and 2, six for the others.
fn huffman(value: &[u8]) -> Option<u16> {
    let bits: String = value.iter().map(|byte| format!("{byte:08b}")).collect();
    let (mut rest, mut number) = (bits.as_str(), 0);
    for _ in 0..3 {
        let short = ["00000", "00001", "00010"].iter().position(|code| rest.starts_with(code));
        let (digit, length) = match short {
            Some(digit) => (digit, 5),
            None => (u8::from_str_radix(rest.get(..6)?, 2).ok()? as usize - 0b011001 + 3, 6),
        };
        number = number * 10 + digit as u16;
        rest = &rest[length..];
    }
    Some(number)
}
