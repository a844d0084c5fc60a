//! Does a new binary take over without anybody noticing? Real processes under load, and successors that fail.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection};
use crate::harness::redis::RedisServer;
use crate::harness::{Over, wait_until};
use crate::memory_file::log_in;
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
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let response = client.get("/private").send();
                    assert_eq!(response.status, 200, "{}", response.text());
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let more_load = |what: &str| {
            let before = answered.load(Ordering::SeqCst);
            wait_until(what, || before + 200 < answered.load(Ordering::SeqCst));
        };
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
