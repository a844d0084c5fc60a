//! What does a hostile client cost in HTTP/2? Bounded memory, and nobody else their answer. (invariant 7)
//!
//! Each attack is made on a process of its own, from several connections, while somebody else goes on asking.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::backend::{Answer, Backend};
use crate::harness::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, Http2Client, PING, RST_STREAM, SETTINGS,
    fields, frame, get, text,
};
use crate::harness::{tell, tls, wait_until};
use crate::operation::{Daemon, deployment};

const ATTACKERS: usize = 4;

/// What an attack may add to the memory of the process. Far more than any of these needs, and far less than what the
/// attacks could take where nothing is bounded: hundreds of megabytes each.
const MEMORY_BYTES_MAX: u64 = 96 << 20;

const LARGE_BYTES: usize = 4 << 20;

/// Runs `attack` from several connections; each gives back what keeps its connection open.
fn under_attack(name: &str, attack: impl Fn(SocketAddr) -> Frames + Sync) {
    let backend = Backend::answering(|request| match request.target() {
        "/large" => Answer::response(200, &[], vec![b'x'; LARGE_BYTES]),
        _ => Answer::Echo,
    });
    // Takes every connection and never a request.
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    silent.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    silent.listen(4096).unwrap();
    let silent_address = silent.local_addr().unwrap().as_socket().unwrap();
    let rest = format!(
        "[pool.silent]\nbackends = [\"{silent_address}\"]\n\
         [[route]]\npath = \"/silent\"\npool = \"silent\"\naccess = \"public\"\n\
         [log]\naccess = false\nlevel = \"warn\""
    );
    let (folder, file, address) = deployment(&[&backend], &rest);
    tls::write_files(folder.path());
    let plain = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, plain.replacen("[admin]", "cert = \"cert.pem\"\nkey = \"key.pem\"\n[admin]", 1)).unwrap();
    let daemon = Daemon::run(&file);
    wait_until("it listens", || std::net::TcpStream::connect(address).is_ok());
    let bystander = Http2Client::connect(address, &tls::trust());
    for _ in 0..50 {
        assert_eq!(bystander.get("/", &[]).status, 200);
    }
    let before = daemon.resident_bytes();
    let is_over = AtomicBool::new(false);
    let (mut peak, mut answers) = (before, 0);
    std::thread::scope(|scope| {
        let attackers: Vec<_> = (0..ATTACKERS).map(|_| scope.spawn(|| attack(address))).collect();
        let held = scope.spawn(|| {
            let held: Vec<_> = attackers.into_iter().map(|attacker| attacker.join().unwrap()).collect();
            is_over.store(true, Ordering::SeqCst);
            held
        });
        while !is_over.load(Ordering::SeqCst) || answers < 20 {
            assert_eq!(bystander.get("/", &[]).status, 200, "{name}: others are served meanwhile");
            answers += 1;
            peak = peak.max(daemon.resident_bytes());
        }
        drop(held.join().unwrap());
    });
    let added = peak - before;
    tell(&format!("{name}: {} KiB more at the peak, {answers} answers to others", added >> 10));
    assert!(added < MEMORY_BYTES_MAX, "{name}: {added} bytes more");
    drop(folder);
}

fn open(address: SocketAddr) -> Frames {
    Frames::open(address, &tls::trust(), &[])
}

/// Sends these frames again and again, `rounds` times at most, until the other side has had enough.
fn flood(frames: &mut Frames, rounds: u32, mut round: impl FnMut(u32) -> Vec<u8>) -> bool {
    (0..rounds).any(|number| frames.write_raw(&round(number)).is_err())
}

/// Whether the connection is told to end, or has ended.
fn is_ended(frames: &mut Frames) -> bool {
    let is_patient = |error: &std::io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    frames.read_until(|frame| frame.kind == GOAWAY).map_or_else(|error| !is_patient(&error), |_| true)
}

#[test]
fn requests_that_are_taken_back_at_once_end_the_connection() {
    under_attack("rapid reset", |address| {
        let mut frames = open(address);
        let cancel = 8_u32.to_be_bytes();
        flood(&mut frames, 20_000, |number| {
            let stream = 1 + 2 * number;
            [get(stream, "/large"), frame(RST_STREAM, 0, stream, &cancel)].concat()
        });
        assert!(is_ended(&mut frames));
        frames
    });
}

/// As above, but each request has been begun with: the crate `h2` counts only those that nobody has looked at.
#[test]
fn requests_that_are_taken_back_a_little_later_end_the_connection() {
    under_attack("late reset", |address| {
        let mut frames = open(address);
        let cancel = 8_u32.to_be_bytes();
        let has_ended = (0..40).any(|round| {
            let streams = (0..50).map(|number| 1 + 2 * (51 * round + number));
            let requests: Vec<u8> = streams.clone().flat_map(|stream| get(stream, "/silent")).collect();
            // This one is answered, so that those before it have been begun with.
            let last = 1 + 2 * (51 * round + 50);
            let resets: Vec<u8> = streams.flat_map(|stream| frame(RST_STREAM, 0, stream, &cancel)).collect();
            frames.write_raw(&[requests, get(last, "/")].concat()).is_err()
                || frames
                    .read_until(|frame| frame.kind == GOAWAY || frame.stream == last)
                    .map_or(true, |frame| frame.kind == GOAWAY)
                || frames.write_raw(&resets).is_err()
        });
        assert!(has_ended, "2000 requests that came to nothing are too many");
        frames
    });
}

#[test]
fn frames_that_are_no_requests_take_no_memory() {
    under_attack("pings", |address| {
        let mut frames = open(address);
        flood(&mut frames, 1_000, |_| frame(PING, 0, 0, &[0; 8]).repeat(100));
        frames
    });
    under_attack("settings", |address| {
        let mut frames = open(address);
        let setting = [&4_u16.to_be_bytes()[..], &65_535_u32.to_be_bytes()].concat();
        flood(&mut frames, 1_000, |_| frame(SETTINGS, 0, 0, &setting).repeat(100));
        frames
    });
    under_attack("empty data", |address| {
        let mut frames = open(address);
        let head = fields(&[(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", "/")]);
        frames.write(HEADERS, END_HEADERS, 1, &head).unwrap();
        flood(&mut frames, 1_000, |_| frame(DATA, 0, 1, &[]).repeat(100));
        frames
    });
}

#[test]
fn a_head_without_an_end_is_cut_off() {
    under_attack("continuation", |address| {
        let mut frames = open(address);
        let usual = fields(&[(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/")]);
        frames.write(HEADERS, END_STREAM, 1, &usual).unwrap();
        let more = fields(&[("x-a", &"a".repeat(16_000))]);
        let was_cut = flood(&mut frames, 4_000, |_| frame(CONTINUATION, 0, 1, &more));
        assert!(was_cut || is_ended(&mut frames), "64 MB of head are not taken");
        frames
    });
}

#[test]
fn a_small_head_does_not_become_a_large_one() {
    under_attack("HPACK bomb", |address| {
        let mut frames = open(address);
        let usual = fields(&[(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/")]);
        // Kept in the table of the connection (RFC 7541, section 6.2.1), as its newest entry: 62.
        let kept = [&[0x40][..], &text(b"x-bomb"), &text(&[b'a'; 3_900])].concat();
        let first = [&usual[..], &kept].concat();
        frames.write(HEADERS, END_STREAM | END_HEADERS, 1, &first).unwrap();
        let bomb = [&usual[..], &[0xbe; 12_000]].concat();
        flood(&mut frames, 200, |number| frame(HEADERS, END_STREAM | END_HEADERS, 3 + 2 * number, &bomb));
        frames
    });
}

/// No attack, but held to the same bound: each moves more than all together may hold.
#[test]
fn large_bodies_pass_through_and_are_not_kept() {
    const UPLOAD_BYTES: usize = 32 << 20;
    under_attack("large bodies", |address| {
        let client = Http2Client::connect(address, &tls::trust());
        for _ in 0..8 {
            assert_eq!(client.get("/large", &[]).body.len(), LARGE_BYTES);
        }
        let seen = client.send("POST", "/", &[], &vec![b'x'; UPLOAD_BYTES]).seen();
        assert_eq!(seen.body_bytes, UPLOAD_BYTES);
        open(address)
    });
}

#[test]
fn a_client_that_takes_nothing_holds_little() {
    under_attack("zero windows", |address| {
        const INITIAL_WINDOW_SIZE: u16 = 4;
        let mut frames = Frames::open(address, &tls::trust(), &[(INITIAL_WINDOW_SIZE, 0)]);
        let requests: Vec<u8> = (0..25).flat_map(|number| get(1 + 2 * number, "/large")).collect();
        frames.write_raw(&requests).unwrap();
        for _ in 0..25 {
            let head = frames.read_until(|frame| frame.kind == HEADERS || frame.kind == GOAWAY).unwrap();
            assert_eq!(head.kind, HEADERS, "each has an answer, of which it takes nothing");
        }
        frames
    });
}
