//! What becomes of an open WebSocket when its session ends? It ends, too, on every instance and however the session
//! ended; and so does whatever else outlasts it (invariants 4 and 5).

use std::time::{Duration, Instant};

use cloakroom::session::id::SessionId;

use crate::harness::backend::{Answer, Backend, WEBSOCKET_HEAD};
use crate::harness::client::{Client, Connection};
use crate::harness::fault::FaultProxy;
use crate::harness::gateway::{Form, Gateway, PASSWORD, Setup, Store};
use crate::harness::http2::Http2Client;
use crate::harness::redis::{KEEPS_ITS_DATA, RedisServer};
use crate::harness::{tls, wait_until};

const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";
/// RFC 6455, sections 5.5.1 and 7.4.1.
const CLOSE_1008: &[u8] = b"\x88\x0f\x03\xf0session ended";
/// Long enough for several looks at the sessions.
const SEVERAL_ROUNDS: Duration = Duration::from_secs(4);

fn setup(backend: &Backend) -> Setup {
    let admin = format!("[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\"");
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/optional", "access = \"optional\"")
        .route("/public", "access = \"public\"")
        .with(&admin)
}

fn stores(redis: &RedisServer) -> [Store; 3] {
    let Store::Redis(keys) = Store::of(redis) else { unreachable!("a store in Redis") };
    [Store::Memory, Store::Redis(keys.clone()), Store::Redis(format!("{keys}\ncache = \"off\""))]
}

fn handle(client: &Client) -> String {
    SessionId::parse(&client.cookie("session").unwrap()).unwrap().key().log_hash()
}

fn end_by_api(gateway: &Gateway, target: &str) {
    let admin = Client::of(gateway.admin_address());
    let response = admin.request("DELETE", target).header("Authorization", &format!("Bearer {TOKEN}")).send();
    assert_eq!(response.status, 200, "{}", response.text());
}

/// How a session of this client is ended.
type End<'a> = &'a dyn Fn(&Client);

/// It ends with the word that the session has ended, and with nothing else.
#[track_caller]
fn assert_says_goodbye(mut socket: Connection, why: &str) {
    let rest = socket.read_to_end().unwrap_or_else(|err| panic!("still open ({err}): {why}"));
    assert_eq!(rest, CLOSE_1008, "{why}");
}

#[track_caller]
fn assert_goes_on(socket: &mut Connection, why: &str) {
    // Echoed, it is a whole frame of the backend's.
    socket.write(b"\x82\x02hi");
    assert_eq!(socket.read_exactly(4).unwrap_or_else(|err| panic!("{why}: {err}")), b"\x82\x02hi", "{why}");
}

fn listed(gateway: &Gateway) -> f64 {
    gateway.metric("cloakroom_streams")
}

#[test]
fn however_a_session_ends_its_web_sockets_are_closed_and_nobody_elses() {
    let redis = RedisServer::start();
    for store in stores(&redis) {
        let backend = Backend::echo();
        let gateway = setup(&backend).store(store.clone()).user("carol", "").start();
        let bob = gateway.log_in("bob");
        let mut of_bob = bob.web_socket("/", &[]).unwrap();
        let mut of_nobody = gateway.client().web_socket("/optional", &[]).unwrap();
        let public = gateway.log_in("ann");
        let mut of_public = public.web_socket("/public", &[]).unwrap();
        let ways: [(&str, End<'_>); 6] = [
            ("logout", &|ann| gateway.log_out(ann)),
            ("revoked by an operator", &|ann| {
                end_by_api(&gateway, &format!("/api/sessions/{}?user=ann", handle(ann)));
            }),
            ("all of the user", &|_| end_by_api(&gateway, "/api/sessions?user=ann")),
            ("another login of the same browser", &|ann| {
                // From a page that was open in another tab.
                let browser = gateway.client();
                let form = Form::on(&browser.navigate("/.cloakroom/login").send().text());
                let fields = form.filled_in(&[("username", "ann"), ("password", PASSWORD)]);
                let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                browser.set_cookie("session", &ann.cookie("session").unwrap());
                assert_eq!(browser.post_form("/.cloakroom/login", &fields).send().status, 303);
            }),
            ("removed from the users file, in effect", &|_| {
                gateway.reload(|setup| setup.user("ann", "disabled = true")).unwrap();
            }),
            ("back in the users file", &|ann| {
                gateway.reload(|setup| setup.without_users().user("carol", "")).unwrap();
                gateway.log_out(ann);
            }),
        ];
        for (way, end) in ways {
            if way.starts_with("back") {
                gateway.reload(|setup| setup.without_users().user("carol", "")).unwrap();
            }
            let ann = gateway.log_in("ann");
            let (one, other) = (ann.web_socket("/", &[]).unwrap(), ann.web_socket("/optional", &[]).unwrap());
            end(&ann);
            assert_says_goodbye(one, &format!("{way}, {store:?}"));
            assert_says_goodbye(other, &format!("{way} on an optional route, {store:?}"));
        }
        assert_goes_on(&mut of_bob, "another user's");
        assert_goes_on(&mut of_nobody, "nobody's");
        assert_goes_on(&mut of_public, "on a public route nobody has a session");
        let cut = "cloakroom_requests_total{outcome=\"ended_with_session\",route=\"/\",status=\"101\"}";
        wait_until("each is in the log as what it is", || gateway.metric(cut) == 6.0);
        assert_eq!(gateway.metric("cloakroom_streams_cut_total"), 12.0);
        end_by_api(&gateway, "/api/sessions?everyone=true");
        assert_says_goodbye(of_bob, "everybody's");
        assert_goes_on(&mut of_nobody, "nobody's");
        wait_until("nothing of them is left", || listed(&gateway) == 0.0);
        drop((of_nobody, of_public));
        wait_until("backends hear of it", || backend.open_connections() == 0);
    }
}

#[test]
fn what_would_not_be_let_in_any_more_is_closed_and_the_rest_of_the_session_goes_on() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .user("carol", "groups = [\"staff\"]")
        .route("/", "")
        .route("/staff", "groups = [\"staff\"]")
        .start();
    let carol = gateway.log_in("carol");
    let mut anywhere = carol.web_socket("/", &[]).unwrap();
    let staff = carol.web_socket("/staff/room", &[]).unwrap();
    gateway.reload(|setup| setup.without_users().user("carol", "groups = [\"guests\"]")).unwrap();
    assert_says_goodbye(staff, "she is no longer in the group");
    assert_goes_on(&mut anywhere, "the session is as it was");
    assert_eq!(carol.get("/staff").send().status, 403);

    let room = carol.web_socket("/room", &[]).unwrap();
    gateway.reload(|setup| setup.route("/room", "groups = [\"staff\"]")).unwrap();
    assert_says_goodbye(room, "there is a stricter route now");
    assert_goes_on(&mut anywhere, "which is not for this place");
    assert_eq!(gateway.metric("cloakroom_streams_cut_total"), 2.0);
}

#[test]
fn whose_session_is_displaced_or_expires_is_cut() {
    let redis = RedisServer::start();
    for store in stores(&redis) {
        let backend = Backend::echo();
        let displaced = setup(&backend).store(store.clone()).with("[session]\nmax_per_user = 1").start();
        let socket = displaced.log_in("ann").web_socket("/", &[]).unwrap();
        let _newer = displaced.log_in("ann");
        assert_says_goodbye(socket, &format!("displaced, {store:?}"));

        let idle = setup(&backend)
            .store(store.clone())
            .with("[session]\nidle_timeout = \"2s\"\nabsolute_timeout = \"1h\"")
            .start();
        let ann = idle.log_in("ann");
        let mut socket = ann.web_socket("/", &[]).unwrap();
        assert_goes_on(&mut socket, "what is said on it is no use of the session");
        assert_says_goodbye(socket, &format!("idle, {store:?}"));

        let absolute = setup(&backend)
            .store(store.clone())
            .with("[session]\nidle_timeout = \"4s\"\nabsolute_timeout = \"4s\"")
            .start();
        let socket = absolute.log_in("ann").web_socket("/", &[]).unwrap();
        assert_says_goodbye(socket, &format!("absolute end, {store:?}"));
    }
}

#[test]
fn where_a_stream_counts_as_use_it_keeps_its_session_up_to_the_absolute_end() {
    let redis = RedisServer::start();
    let [memory, cached, _] = stores(&redis);
    for store in [memory, cached] {
        let backend = Backend::echo();
        let gateway = setup(&backend)
            .store(store.clone())
            .route("/live", "stream_touch = true")
            .with("[session]\nidle_timeout = \"4s\"\nabsolute_timeout = \"9s\"")
            .start();
        let before = Instant::now();
        let used = gateway.log_in("ann").web_socket("/live", &[]).unwrap();
        assert_says_goodbye(used, &format!("{store:?}"));
        assert!(Duration::from_secs(6) < before.elapsed(), "it lived longer than the idle time: {store:?}");
    }
}

#[test]
fn a_logout_on_one_instance_cuts_on_the_other_with_copies_and_without() {
    let redis = RedisServer::start();
    let [_, cached, uncached] = stores(&redis);
    for store in [cached, uncached] {
        let backend = Backend::echo();
        let setup = setup(&backend).store(store.clone());
        let (here, there) = (setup.clone().start(), setup.start());
        let ann = here.log_in("ann");
        let elsewhere = there.client();
        elsewhere.set_cookie("session", &ann.cookie("session").unwrap());
        let socket = elsewhere.web_socket("/", &[]).unwrap();
        wait_until("it has lasted a moment", || listed(&there) == 1.0);
        let before = Instant::now();
        here.log_out(&ann);
        assert_says_goodbye(socket, &format!("{store:?}"));
        crate::harness::tell(&format!("cut on the other instance {:?} after the logout began", before.elapsed()));
    }
}

#[test]
fn what_is_deleted_behind_our_back_is_cut() {
    let redis = RedisServer::start();
    let backend = Backend::echo();
    let gateway = setup(&backend).store(Store::of(&redis)).start();
    let socket = gateway.log_in("ann").web_socket("/", &[]).unwrap();
    redis.ask::<()>("FLUSHALL");
    assert_says_goodbye(socket, "the store says that there is no session");
}

#[test]
fn a_store_that_is_down_cuts_nothing_and_one_that_is_back_is_believed() {
    let mut redis = RedisServer::with(KEEPS_ITS_DATA);
    let backend = Backend::echo();
    let gateway = setup(&backend).store(Store::of(&redis)).start();
    let ann = gateway.log_in("ann");
    let mut socket = ann.web_socket("/", &[]).unwrap();
    wait_until("it has lasted a moment", || listed(&gateway) == 1.0);
    redis.kill();
    wait_until("the store is down", || gateway.metric("cloakroom_store_up") == 0.0);
    let since = Instant::now();
    while since.elapsed() < SEVERAL_ROUNDS {
        assert_goes_on(&mut socket, "a store that says nothing ends nothing (invariant 4)");
    }
    redis.restart();
    wait_until("the store is back", || gateway.metric("cloakroom_store_up") == 1.0);
    assert_goes_on(&mut socket, "the session lives");
    gateway.log_out(&ann);
    assert_says_goodbye(socket, "now it does not");
}

#[test]
fn a_store_that_hangs_cuts_nothing() {
    let redis = RedisServer::start();
    let proxy = FaultProxy::to(redis.port());
    let backend = Backend::echo();
    let gateway = setup(&backend).store(Store::Redis(format!("url = \"{}\"", proxy.url()))).start();
    let ann = gateway.log_in("ann");
    let mut socket = ann.web_socket("/", &[]).unwrap();
    wait_until("it has lasted a moment", || listed(&gateway) == 1.0);
    proxy.set(crate::harness::fault::Fault::SILENT);
    let since = Instant::now();
    while since.elapsed() < SEVERAL_ROUNDS {
        assert_goes_on(&mut socket, "silence is no answer");
    }
    proxy.heal();
}

#[test]
fn frames_are_whole_up_to_the_close_frame_wherever_the_cut_falls() {
    const FRAME: &[u8] = b"\x82\x7e\x01\x00"; // and 256 bytes
    let mut pieces = vec![WEBSOCKET_HEAD.to_vec()];
    for number in 0..4000_usize {
        let frame = [FRAME, &[number as u8; 256]].concat();
        // Within the head, within the payload, and with the beginning of the next one.
        let (first, second) = frame.split_at(1 + number % 3);
        let (second, third) = second.split_at(100);
        pieces.extend([first.to_vec(), second.to_vec(), third.to_vec()]);
    }
    for tls in [false, true] {
        let backend = Backend::always(Answer::Pieces(pieces.clone()));
        let gateway = if tls { setup(&backend).tls().start() } else { setup(&backend).start() };
        for _ in 0..3 {
            let ann = gateway.log_in("ann");
            let mut socket = ann.web_socket("/", &[]).unwrap();
            let reading = std::thread::spawn(move || socket.read_to_end().unwrap());
            wait_until("it has lasted a moment", || {
                backend.step();
                listed(&gateway) == 1.0
            });
            gateway.log_out(&ann);
            wait_until("it is cut", || {
                backend.step();
                reading.is_finished()
            });
            let said = reading.join().unwrap();
            let frames = said.strip_suffix(CLOSE_1008).expect("a close frame at the end");
            assert_eq!(frames.len() % (FRAME.len() + 256), 0, "whole frames");
            assert!(frames.chunks(FRAME.len() + 256).all(|frame| frame.starts_with(FRAME)), "and nothing but frames");
        }
    }
}

#[test]
fn in_a_frame_that_the_backend_does_not_finish_nothing_is_said() {
    let half = [WEBSOCKET_HEAD, b"\x82\x10half"].concat();
    let backend = Backend::always(Answer::Pieces(vec![half, b"never".to_vec()]));
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    let mut socket = ann.web_socket("/", &[]).unwrap();
    gateway.log_out(&ann);
    assert_eq!(socket.read_to_end().unwrap(), b"\x82\x10half", "what would follow would be taken for the rest");
    let cut = "cloakroom_requests_total{outcome=\"ended_with_session\",route=\"/\",status=\"101\"}";
    wait_until("it is in the log all the same", || gateway.metric(cut) == 1.0);
}

#[test]
fn after_the_backends_own_close_frame_there_is_no_other() {
    let backend = Backend::always(Answer::Pieces(vec![[WEBSOCKET_HEAD, b"\x88\x02\x03\xe8"].concat(), Vec::new()]));
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    let mut socket = ann.web_socket("/", &[]).unwrap();
    gateway.log_out(&ann);
    assert_eq!(socket.read_to_end().unwrap(), b"\x88\x02\x03\xe8");
}

#[test]
fn an_event_stream_breaks_off_and_a_download_is_seen_to_be_cut_short() {
    let stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
                   7\r\ndata: \n\r\n";
    let download = [&b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"[..], &[b'x'; 50_000]].concat();
    for begun in [stream.to_vec(), download] {
        let backend = Backend::always(Answer::Pieces(vec![begun, Vec::new()]));
        let gateway = setup(&backend).start();
        let ann = gateway.log_in("ann");
        let mut connection = ann.connect().unwrap();
        connection.write(ann.get("/").bytes());
        let head = connection.read_head().unwrap().unwrap();
        gateway.log_out(&ann);
        let rest = connection.read_to_end().unwrap();
        match head.value("content-length") {
            Some(_) => assert!(rest.len() <= 50_000, "not the full length"),
            None => assert_eq!(rest, b"7\r\ndata: \n\r\n", "no last chunk: nobody takes it for whole"),
        }
        assert_eq!(ann.get("/").send().status, 401, "and who asks once more learns why");
        let cut = "cloakroom_requests_total{outcome=\"ended_with_session\",route=\"/\",status=\"200\"}";
        wait_until("it is in the log", || gateway.metric(cut) == 1.0);
    }
}

#[test]
fn a_long_poll_that_has_no_answer_yet_is_answered_401() {
    let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    let mut connection = ann.connect().unwrap();
    connection.write(ann.get("/").bytes());
    backend.after_requests(1);
    gateway.log_out(&ann);
    let answer = connection.read_response("GET").unwrap();
    assert_eq!(answer.status, 401, "{}", answer.text());
    assert!(answer.text().contains("unauthenticated"), "{}", answer.text());
    connection.assert_closed("the rest of the exchange is unknown");
}

#[test]
fn a_request_that_waits_for_a_backend_is_answered_401_too() {
    let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let gateway = Gateway::in_front_of(&[])
        .weighted_pool("app", &[(&backend, "max_requests = 1")], "queue = 2\nqueue_timeout = \"1h\"")
        .tls()
        .route("/", "")
        .start();
    let (ann, bob) = (gateway.log_in("ann"), gateway.log_in("bob"));
    let mut of_bob = bob.connect().unwrap();
    of_bob.write(bob.get("/").bytes());
    backend.after_requests(1);
    let mut of_ann = ann.connect().unwrap();
    of_ann.write(ann.get("/").bytes());
    let http2 = Http2Client::connect(gateway.address(), &tls::trust());
    let cookie = ann.cookie_field().unwrap();
    let in_http2 = http2.begin("GET", "/", &[("cookie", &cookie)], true).unwrap();
    wait_until("both wait", || gateway.metric("cloakroom_queue_waiting{pool=\"app\"}") == 2.0);
    gateway.log_out(&ann);
    let answer = of_ann.read_response("GET").unwrap();
    assert_eq!(answer.status, 401, "{}", answer.text());
    assert_eq!(in_http2.finish().unwrap().status, 401);
    backend.step();
    assert_eq!(of_bob.read_response("GET").unwrap().status, 200);
    assert_eq!(backend.requests().len(), 1, "the backend has seen nothing of it");
}

#[test]
fn a_response_that_logs_out_is_not_cut_by_its_own_logout() {
    let head = b"HTTP/1.1 200 OK\r\nSession-Logout: ?1\r\ncontent-length: 8\r\n\r\ngood";
    let backend = Backend::answering(move |request| match request.target() {
        "/" => Answer::Echo,
        _ => Answer::Pieces(vec![head.to_vec(), b"bye!".to_vec()]),
    });
    let gateway = setup(&backend).route("/legacy", "directives = [\"logout\"]").start();
    let ann = gateway.log_in("ann");
    let socket = ann.web_socket("/", &[]).unwrap();
    let mut connection = ann.connect().unwrap();
    connection.write(ann.get("/legacy").bytes());
    assert_says_goodbye(socket, "the session has ended");
    let since = Instant::now();
    wait_until("several looks at the sessions", || SEVERAL_ROUNDS < since.elapsed());
    backend.step();
    assert_eq!(connection.read_response("GET").unwrap().body, b"goodbye!");
}

#[test]
fn a_client_that_takes_nothing_is_cut_as_well() {
    let endless = [&b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n"[..], &[b'x'; 16 << 20]].concat();
    let backend = Backend::always(Answer::Exactly(endless));
    let gateway = setup(&backend).with("[limits]\nwrite_timeout = \"10m\"").start();
    let ann = gateway.log_in("ann");
    let mut deaf = ann.connect().unwrap();
    deaf.write(ann.get("/").bytes());
    wait_until("it has lasted a moment", || listed(&gateway) == 1.0);
    gateway.log_out(&ann);
    wait_until("it is gone", || listed(&gateway) == 0.0);
    wait_until("and its backend knows", || backend.open_connections() == 0);
}

#[test]
fn two_hundred_streams_end_at_once_and_leave_nothing() {
    let redis = RedisServer::start();
    let backend = Backend::echo();
    let gateway = setup(&backend).store(Store::of(&redis)).start();
    let users: Vec<Client> = (0..4).map(|_| gateway.log_in("ann")).collect();
    let sockets: Vec<_> =
        users.iter().flat_map(|user| (0..50).map(|_| user.web_socket("/", &[]).unwrap()).collect::<Vec<_>>()).collect();
    wait_until("all have lasted a moment", || listed(&gateway) == 200.0);
    end_by_api(&gateway, "/api/sessions?user=ann");
    for socket in sockets {
        assert_says_goodbye(socket, "each of them");
    }
    wait_until("the list is empty", || listed(&gateway) == 0.0);
    assert_eq!(gateway.metric("cloakroom_streams_cut_total"), 200.0);
    wait_until("no backend connection is left", || backend.open_connections() == 0);
}

#[test]
fn over_tls_the_last_word_is_the_same() {
    let backend = Backend::echo();
    let gateway = setup(&backend).tls().start();
    let ann = gateway.log_in("ann");
    let mut socket = ann.web_socket("/", &[]).unwrap();
    assert_goes_on(&mut socket, "it is open");
    gateway.log_out(&ann);
    assert_says_goodbye(socket, "over TLS");
}
