//! Does a new binary take over without anybody noticing? Real processes under load, and successors that fail.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection};
use crate::harness::http2::Http2Client;
use crate::harness::redis::RedisServer;
use crate::harness::{Over, tls, wait_until};
use crate::memory_file::{log_in, logged_in};
use crate::operation::{Daemon, Log, admin_of, deployment, is_up};

/// A process that is nobody's child here; ended with this value.
struct Successor(u32);

impl Successor {
    /// The last that the log tells of.
    fn told_by(log: &Log) -> Self {
        let text = log.text();
        let (_, rest) = text.rsplit_once("process=").expect("a successor's process id");
        Self(rest.split_whitespace().next().unwrap().parse().unwrap())
    }

    fn signal(&self, name: &str) -> bool {
        Command::new("kill").args([&format!("-{name}"), &self.0.to_string()]).output().unwrap().status.success()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        self.signal("KILL");
    }
}

fn redis_keys(redis: &RedisServer) -> String {
    format!("[store.redis]\nurl = \"{}\"\nresponse_timeout = \"3s\"\nconnect_timeout = \"3s\"\n", redis.url())
}

fn successors(log: &Log) -> usize {
    log.text().matches("a successor serves").count()
}

/// Asks on one connection for as long as it is kept, and then on another, as clients do. A connection that was idle for a
/// second may be closed under a request (RFC 9112, section 9.3.1); any other request has to be answered.
fn ask_on_kept_connections(address: SocketAddr, cookie: &str, stop: &AtomicBool, answered: &AtomicUsize) {
    let request = format!("GET /private HTTP/1.1\r\nHost: a\r\nCookie: {cookie}\r\n\r\n");
    while !stop.load(Ordering::SeqCst) {
        let mut connection = Connection::open(address);
        let mut asked_last = Instant::now();
        while !stop.load(Ordering::SeqCst) {
            let idle = asked_last.elapsed();
            let response = connection.try_write(&request).and_then(|()| connection.read_response("GET"));
            let response = match response {
                Ok(response) => response,
                Err(_) if Duration::from_millis(500) < idle => break,
                Err(error) => panic!("a request on a kept connection failed: {error}"),
            };
            assert_eq!(response.status, 200, "{}", response.text());
            answered.fetch_add(1, Ordering::SeqCst);
            asked_last = Instant::now();
            if response.closes {
                break;
            }
        }
    }
}

fn ask_on_new_connections(client: &Client, stop: &AtomicBool, answered: &AtomicUsize) {
    while !stop.load(Ordering::SeqCst) {
        let response = client.get("/private").send();
        assert_eq!(response.status, 200, "{}", response.text());
        answered.fetch_add(1, Ordering::SeqCst);
    }
}

fn wait_for_answers(what: &str, answered: &AtomicUsize) {
    let before = answered.load(Ordering::SeqCst);
    wait_until(what, || before + 200 < answered.load(Ordering::SeqCst));
}

#[test]
fn an_upgrade_under_load_fails_no_request_and_logs_nobody_out() {
    let redis = RedisServer::start();
    let backend = Backend::echo();
    let rest = format!("{}[server]\ndrain_timeout = \"1h\"\n[log]\naccess = false\n", redis_keys(&redis));
    let (_folder, file, address) = deployment(&[&backend], &rest);
    let mut first = Daemon::run(&file);
    let log = first.log();
    wait_until("the gateway listens", || is_up(address));
    let ann = log_in(address);
    let mut socket = ann.web_socket("/private", &[]).unwrap();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut successor = None;
    std::thread::scope(|scope| {
        let _over = Over(&stop);
        let clients = [log_in(address), log_in(address)];
        for client in clients {
            let (stop, answered) = (&stop, &answered);
            let cookie = client.cookie_field().unwrap();
            scope.spawn(move || ask_on_kept_connections(address, &cookie, stop, answered));
            scope.spawn(move || ask_on_new_connections(&client, stop, answered));
        }
        let more_load = |what: &str| wait_for_answers(what, &answered);
        more_load("there is load");
        first.signal("USR2");
        wait_until("a successor serves", || successors(&log) == 1);
        let second = Successor::told_by(&log);
        assert_ne!(second.0, first.id());
        more_load("the load goes on");
        assert!(second.signal("USR2"), "what came by an upgrade can be upgraded");
        wait_until("another successor serves", || successors(&log) == 2);
        successor = Some(Successor::told_by(&log));
        more_load("and on");
    });

    assert_eq!(ann.get("/private").send().status, 200, "a login outlives two upgrades");
    assert_eq!(Client::of(admin_of(&file)).get("/health/ready").send().status, 200, "the one that serves tells it");
    socket.write([0x81, 0x82, 0, 0, 0, 0, b'h', b'i']);
    assert_eq!(socket.read_exactly(8).unwrap().len(), 8, "a WebSocket of the first process is kept");
    drop(socket);
    assert_eq!(first.exit_code(), Some(0), "its process ends with its last connection");
    assert!(is_up(address));
    let successor = successor.unwrap();
    assert!(successor.signal("TERM"));
    wait_until("the successor ends", || !is_up(address));
}

/// Asks on one connection for as long as it takes requests, and then on another, as clients of HTTP/2 do. Only who is told
/// that a request was not looked at may ask again: by the farewell of the connection (RFC 9113, sections 6.8 and 8.7).
fn ask_over_http2(
    address: SocketAddr,
    trust: &Arc<ClientConfig>,
    cookie: &str,
    stop: &AtomicBool,
    answered: &AtomicUsize,
) {
    while !stop.load(Ordering::SeqCst) {
        let client = Http2Client::connect(address, trust);
        while !stop.load(Ordering::SeqCst) {
            match client.try_send("POST", "/private", &[("cookie", cookie)], b"a body") {
                Ok(response) => assert_eq!(response.status, 200, "{}", response.text()),
                Err(error) if error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR) => break,
                Err(error) => panic!("a request over HTTP/2 failed: {error:?}"),
            }
            answered.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn an_upgrade_under_load_over_tls_and_http2_fails_no_request() {
    let redis = RedisServer::start();
    let backend = Backend::echo();
    // Patient with a request whose body comes when the upgrades are done.
    let limits = "[limits]\nbody_timeout = \"1h\"\n[server]\ndrain_timeout = \"1h\"\n[log]\naccess = false\n";
    let rest = format!("{}{limits}", redis_keys(&redis));
    let (folder, file, address) = deployment(&[&backend], &rest);
    let (cert, key) = tls::write_files(folder.path());
    let plain = std::fs::read_to_string(&file).unwrap();
    let listener = format!("[[listener]]\ncert = {cert:?}\nkey = {key:?}\n");
    let text =
        plain.replace("[[listener]]\n", &listener).replace("[pool.app]\n", "[pool.app]\nread_timeout = \"1h\"\n");
    std::fs::write(&file, text).unwrap();
    let trust = tls::trust();
    let mut first = Daemon::run(&file);
    let log = first.log();
    wait_until("the gateway listens", || is_up(address));
    let ann = logged_in(Client::of_tls(address, Arc::clone(&trust)));
    let cookie = ann.cookie_field().unwrap();
    let fields = [("cookie", cookie.as_str())];

    // A request that is on its way all the time, and a connection that has nothing to do.
    let (busy, idle) = (Http2Client::connect(address, &trust), Http2Client::connect(address, &trust));
    let mut upload = busy.begin("POST", "/private", &fields, false).unwrap();
    upload.write(b"the beginning, ", false);
    assert_eq!(idle.get("/private", &fields).status, 200);

    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut successor = None;
    std::thread::scope(|scope| {
        let _over = Over(&stop);
        for _ in 0..4 {
            let (stop, answered, trust, cookie) = (&stop, &answered, &trust, &cookie);
            scope.spawn(move || ask_over_http2(address, trust, cookie, stop, answered));
        }
        scope.spawn(|| ask_on_new_connections(&ann, &stop, &answered));
        let more_load = |what: &str| wait_for_answers(what, &answered);
        more_load("there is load");
        for round in 1..=2 {
            match &successor {
                None => first.signal("USR2"),
                Some(second) => assert!(Successor::signal(second, "USR2")),
            }
            wait_until("a successor serves", || successors(&log) == round);
            let next = Successor::told_by(&log);
            if let Some(before) = successor.replace(next) {
                wait_until("who was upgraded ends, as nothing holds it", || !before.signal("0"));
            }
            more_load("the load goes on");
        }
    });

    let error = idle.try_send("GET", "/private", &fields, b"").map(|response| response.status);
    assert!(error.is_err_and(|error| error.is_go_away() || error.is_io()), "who had nothing to do was told to go");
    upload.write(b"and the end", true);
    let response = upload.finish().unwrap();
    assert_eq!(response.status, 200, "a request of the first process is answered by it: {}", response.text());
    drop(busy);
    drop(idle);
    assert_eq!(first.exit_code(), Some(0), "which ends with its last request");
    let last = Http2Client::connect(address, &trust).get("/private", &fields);
    assert_eq!(last.status, 200, "the login outlives two upgrades: {}", last.text());
    assert!(successor.unwrap().signal("TERM"));
    wait_until("the successor ends", || !is_up(address));
}

#[test]
fn a_successor_with_a_broken_configuration_changes_nothing() {
    let redis = RedisServer::start();
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], &redis_keys(&redis));
    let mut daemon = Daemon::run(&file);
    let log = daemon.log();
    wait_until("the gateway listens", || is_up(address));
    let ann = log_in(address);
    let good = std::fs::read_to_string(&file).unwrap();
    let refused = |text: &str, times: usize| {
        std::fs::write(&file, text).unwrap();
        daemon.signal("USR2");
        wait_until("it is refused", || log.text().matches("no upgrade, this process goes on").count() == times);
        assert_eq!(ann.get("/private").send().status, 200, "the old process works on");
    };
    refused(&good.replace("[pool.app]", "[pool.app"), 1);
    assert!(log.text().contains("unclosed table"), "the successor has said why: {}", log.text());
    // The old address is handed over, and nobody takes it.
    refused(&good.replace(&address.to_string(), "127.0.0.1:0"), 2);
    assert!(log.text().contains(&format!("as its `address`: {address}")), "{}", log.text());
    assert_eq!(successors(&log), 0);
    daemon.signal("TERM");
    assert_eq!(daemon.exit_code(), Some(0));
}

#[test]
fn sessions_in_memory_are_not_shared_by_two_processes() {
    let backend = Backend::always(Answer::Echo);
    let (_folder, file, address) = deployment(&[&backend], "");
    let mut daemon = Daemon::run(&file);
    let log = daemon.log();
    wait_until("the gateway listens", || is_up(address));
    let ann = log_in(address);
    daemon.signal("USR2");
    log.wait_for("no upgrade, this process goes on reason=\"sessions are in memory");
    assert_eq!(ann.get("/private").send().status, 200);
    daemon.signal("TERM");
    assert_eq!(daemon.exit_code(), Some(0));
}
