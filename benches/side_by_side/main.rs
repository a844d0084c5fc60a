//! What does a session cost? One load through a bare pass-through and through Cloakroom, in turns, side by side.
//!
//! ```text
//! cargo bench --bench side_by_side -- --rounds 5 --requests 100000
//! ```
//!
//! Each proxy is a process of its own, started from this program; backends and load live in the first process. The
//! number that counts is the proxy's CPU time per request: on one machine throughput says as much of the load's
//! appetite as of the proxy's. Machines are shared and clocks vary, so each round gives one ratio to the
//! pass-through of the same round, and the table shows the medians.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed, and says where")]
#![expect(clippy::print_stdout, reason = "the table is the result")]

mod load;
mod backend;
mod passthrough;
mod gateway;
mod process;

use std::net::SocketAddr;
use std::path::Path;

use load::{Load, Report};
use process::{Proxy, Redis};

/// Sessions that the load picks from, at random.
const SESSIONS: usize = 10_000;
/// Keep-alive connections of the load.
const CONNECTIONS: usize = 64;
/// Worker threads of every proxy.
const THREADS: usize = 2;
/// Of a response.
const BODY_BYTES: usize = 1024;
/// Before the first round, of the requests of one turn: caches and connection pools fill.
const WARM_UP: f64 = 0.2;

/// As in the binary; for the pass-through as well, so that the comparison is of the code.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["passthrough", ready, backends @ ..] => passthrough::run(Path::new(ready), &addresses(backends)),
        ["gateway", store, ready, backends @ ..] => gateway::run(store, Path::new(ready), &addresses(backends)),
        options => measure(option(options, "--rounds", 5), option(options, "--requests", 100_000)),
    }
}

/// One of the proxies, and what was seen of it.
struct Contestant {
    name: &'static str,
    proxy: Proxy,
    turns: Vec<Turn>,
}

struct Turn {
    /// CPU seconds of the proxy per 100,000 requests.
    cpu: f64,
    report: Report,
}

fn measure(rounds: usize, requests: usize) {
    let backends = [backend::start(), backend::start()];
    let redis = Redis::start();
    let mut contestants = [
        ("(a) pass-through", Proxy::start(&["passthrough"], &backends)),
        ("(b) cloakroom, memory", Proxy::start(&["gateway", "memory"], &backends)),
        ("(c) cloakroom, redis", Proxy::start(&["gateway", &redis.url()], &backends)),
    ]
    .map(|(name, proxy)| Contestant { name, proxy, turns: Vec::new() });
    // The pass-through knows no sessions: it gets the cookies of another, so that the requests are the same.
    let foreign = contestants[1].proxy.cookies().to_vec();

    println!(
        "{rounds} rounds, {requests} requests a turn, {CONNECTIONS} connections, {SESSIONS} sessions, {BODY_BYTES} B"
    );
    for round in 0..=rounds {
        for contestant in &mut contestants {
            let own = contestant.proxy.cookies();
            let requests = if round == 0 { (requests as f64 * WARM_UP) as usize } else { requests };
            let load = Load {
                address: contestant.proxy.address(),
                cookies: if own.is_empty() { foreign.clone() } else { own.to_vec() },
                connections: CONNECTIONS,
                requests,
                body_bytes: BODY_BYTES,
                seed: round as u64 + 1,
            };
            let before = contestant.proxy.cpu_seconds();
            let report = load.run().unwrap_or_else(|problem| panic!("{}: {problem}", contestant.name));
            let cpu = (contestant.proxy.cpu_seconds() - before) * 100_000.0 / requests as f64;
            if round != 0 {
                println!(
                    "round {round}  {:22} {cpu:6.2} CPU s  {:7.0} requests/s",
                    contestant.name,
                    report.throughput()
                );
                contestant.turns.push(Turn { cpu, report });
            }
        }
    }
    print_table(&contestants);
}

fn print_table(contestants: &[Contestant]) {
    println!(
        "\nmedians of {} rounds; CPU seconds of the proxy process per 100,000 requests",
        contestants[0].turns.len()
    );
    println!("{:22} {:>8} {:>8} {:>11} {:>9} {:>9}", "", "CPU s", "to (a)", "requests/s", "p50 ms", "p99 ms");
    for contestant in contestants {
        let of = |number: fn(&Turn) -> f64| median(contestant.turns.iter().map(number));
        let ratio = median(contestant.turns.iter().zip(&contestants[0].turns).map(|(turn, bare)| turn.cpu / bare.cpu));
        println!(
            "{:22} {:8.2} {ratio:7.2}x {:11.0} {:9.2} {:9.2}",
            contestant.name,
            of(|turn| turn.cpu),
            of(|turn| turn.report.throughput()),
            of(|turn| turn.report.percentile(50.0)),
            of(|turn| turn.report.percentile(99.0)),
        );
    }
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[middle] } else { (numbers[middle - 1] + numbers[middle]) / 2.0 }
}

fn option(options: &[&str], name: &str, default: usize) -> usize {
    let place = options.iter().position(|option| *option == name);
    let value = place.and_then(|place| options.get(place + 1)?.parse().ok());
    assert!(place.is_none() || value.is_some_and(|value| 0 < value), "{name} takes a number");
    value.unwrap_or(default)
}

fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}
