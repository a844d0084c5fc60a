//! What does a session cost? One load through bare pingora, through Cloakroom and through its peers, in turns, side by
//! side.
//!
//! ```text
//! make bench      # builds pingora_defaults, installs the peers, runs this
//! cargo bench --bench side_by_side -- --rounds 5 --requests 100000 [--only NAME,NAME] [--scenario 0]
//! cargo bench --bench side_by_side -- --only public,cached --against PROGRAM --starts 5 --rounds 3
//! cargo bench --bench side_by_side -- scale --csv scale.csv && benches/scale/plot.py scale.csv > docs/images/scale.svg
//! ```
//!
//! PROGRAM is this bench as another commit has built it: has a change made requests dearer? Two starts of one program differ
//! by some percent, so that question needs several `--starts` of all.
//!
//! Each proxy is a process of its own; backends and load live in the first process. The number that counts is the
//! proxy's CPU time per request: on one machine throughput says as much of the load's appetite as of the proxy's.
//! Machines are shared and clocks vary, so each round gives one ratio to the bare proxy of the same round, and the
//! table shows the medians.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed, and says where")]
#![expect(clippy::print_stdout, reason = "the table is the result")]

mod load;
mod backend;
mod passthrough;
mod gateway;
mod peers;
mod process;
mod table;
mod scale;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use load::{Load, Report};
use process::{Proxy, Redis};

/// What one table is of.
#[derive(Clone, Copy)]
pub(crate) struct Scenario {
    /// The load picks from so many, at random.
    pub(crate) sessions: usize,
    /// Of a response.
    pub(crate) body_bytes: usize,
}

const SCENARIOS: [Scenario; 3] = [
    Scenario { sessions: SESSIONS, body_bytes: 1024 },
    Scenario { sessions: 100, body_bytes: 1024 },
    Scenario { sessions: SESSIONS, body_bytes: 64 * 1024 },
];

/// Sessions that there are.
const SESSIONS: usize = 10_000;
/// Keep-alive connections of the load.
const CONNECTIONS: usize = 64;
/// Worker threads of every proxy.
const THREADS: usize = 2;
/// Before the first round, of the requests of one turn: caches and connection pools fill.
const WARM_UP: f64 = 0.2;

/// As in the binary; for the bare proxy as well, so that the comparison is of the code.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["bare", ready, backends @ ..] => passthrough::run(Path::new(ready), &addresses(backends)),
        ["gateway", store, sessions, ready, backends @ ..] => {
            gateway::run(store, sessions.parse().unwrap(), Path::new(ready), &addresses(backends));
        }
        ["scale", options @ ..] => scale::measure(&Options::of(options)),
        options => measure(&Options::of(options)),
    }
}

struct Options {
    /// Of every proxy.
    starts: usize,
    /// Of each start.
    rounds: usize,
    requests: usize,
    /// Where the scale's figures go, for the plot.
    csv: Option<String>,
    /// Names of contestants; empty = all.
    only: Vec<String>,
    /// Another build of this program, whose gateways take part.
    against: Option<PathBuf>,
    scenarios: Vec<Scenario>,
}

/// What was seen of one of the proxies.
#[derive(Default)]
pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    pub(crate) turns: Vec<Turn>,
}

pub(crate) struct Turn {
    /// CPU seconds of the proxy per 100,000 requests.
    pub(crate) cpu: f64,
    /// CPU seconds of Redis per 100,000 requests.
    pub(crate) redis_cpu: f64,
    /// Commands that Redis was asked, per request.
    pub(crate) commands: f64,
    /// Of the proxy, at the end of the turn.
    pub(crate) resident_mib: f64,
    pub(crate) report: Report,
}

fn measure(options: &Options) {
    let mut tables: Vec<Vec<Contestant>> = options.scenarios.iter().map(|_| Vec::new()).collect();
    for start in 1..=options.starts {
        println!("start {start} of {}", options.starts);
        compare(options, &mut tables);
    }
    for (contestants, scenario) in tables.iter().zip(&options.scenarios) {
        table::print(contestants, *scenario, options.requests);
    }
}

/// Starts them all, and adds their turns to those that there are.
fn compare(options: &Options, tables: &mut [Vec<Contestant>]) {
    let backends = [backend::start(), backend::start()];
    let redis = Redis::start();
    let gateway = |store: &str| Proxy::gateway(store, SESSIONS, &backends);
    // The cookies of this one go to the peers that ask Redis, and to those that know no sessions: all get the same.
    let uncached = gateway(&format!("{}#off", redis.url()));
    let cookies = Arc::clone(uncached.cookies());
    let before =
        |store: &str| options.against.as_ref().map(|program| Proxy::gateway_of(program, store, SESSIONS, &backends));
    let cached = format!("{}#coherent", redis.url());
    let is_named = |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    let wanted = |name: &str| is_named(name.strip_suffix("-before").unwrap_or(name));
    let mut contestants = vec![("redis", uncached)];
    type Start<'a> = (&'static str, Box<dyn Fn() -> Option<Proxy> + 'a>);
    let others: [Start<'_>; 8] = [
        ("bare", Box::new(|| Some(Proxy::start(&["bare"], &backends)))),
        ("pingora", Box::new(|| Proxy::start_defaults(&backends))),
        ("public", Box::new(|| Some(gateway("public")))),
        ("public-before", Box::new(|| before("public"))),
        ("memory", Box::new(|| Some(gateway("memory")))),
        ("memory-before", Box::new(|| before("memory"))),
        ("cached", Box::new(|| Some(gateway(&cached)))),
        ("cached-before", Box::new(|| before(&cached))),
    ];
    for (name, start) in others {
        if name == "bare" || wanted(name) {
            contestants.extend(start().map(|proxy| (name, proxy)));
        }
    }
    for peer in peers::ALL.iter().filter(|peer| wanted(peer.name)) {
        contestants.extend(peers::start(peer, &backends, redis.port()).map(|proxy| (peer.name, proxy)));
    }
    // The first is what the others are compared with.
    contestants.sort_by_key(|(name, _)| table::ORDER.iter().position(|known| known == name));
    contestants.retain(|(name, _)| *name == "bare" || wanted(name));

    for (table, scenario) in tables.iter_mut().zip(&options.scenarios) {
        table.resize_with(contestants.len(), Contestant::default);
        for round in 0..=options.rounds {
            for ((name, proxy), contestant) in contestants.iter().zip(&mut *table) {
                let own = proxy.cookies();
                let cookies = if own.is_empty() { &cookies } else { own };
                let cookies: Arc<[String]> = cookies[..scenario.sessions].into();
                let requests = if round == 0 { (options.requests as f64 * WARM_UP) as usize } else { options.requests };
                let load = Load {
                    addresses: vec![proxy.address()],
                    cookies,
                    connections: CONNECTIONS,
                    requests,
                    body_bytes: scenario.body_bytes,
                    seed: round as u64 + 1,
                };
                let turn = turn(name, proxy, load, &redis);
                assert!(["", *name].contains(&contestant.name), "the same contestants at each start");
                contestant.name = name;
                if round != 0 {
                    contestant.turns.push(turn);
                }
            }
            println!("round {round} of {}", options.rounds);
        }
    }
}

fn turn(name: &str, proxy: &Proxy, load: Load, redis: &Redis) -> Turn {
    let per_100_000 = 100_000.0 / load.requests as f64;
    let requests = load.requests as f64;
    let (cpu, (redis_cpu, commands)) = (proxy.cpu_seconds(), (redis.cpu_seconds(), redis.commands()));
    let report = load.run().unwrap_or_else(|problem| panic!("{name}: {problem}"));
    Turn {
        cpu: (proxy.cpu_seconds() - cpu) * per_100_000,
        redis_cpu: (redis.cpu_seconds() - redis_cpu) * per_100_000,
        commands: (redis.commands() - commands) as f64 / requests,
        resident_mib: proxy.resident_mib(),
        report,
    }
}

impl Options {
    fn of(words: &[&str]) -> Self {
        let value = |name: &str| {
            let place = words.iter().position(|word| *word == name)?;
            Some(*words.get(place + 1).unwrap_or_else(|| panic!("{name} takes a value")))
        };
        let number = |name: &str, default| {
            value(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} takes a number")))
        };
        Self {
            starts: number("--starts", 1).max(1),
            rounds: number("--rounds", 5).max(1),
            requests: number("--requests", 100_000).max(100),
            csv: value("--csv").map(ToOwned::to_owned),
            only: value("--only").map(|names| names.split(',').map(ToOwned::to_owned).collect()).unwrap_or_default(),
            against: value("--against").map(PathBuf::from),
            scenarios: match value("--scenario") {
                None => SCENARIOS.to_vec(),
                Some(_) => vec![SCENARIOS[number("--scenario", 0)]],
            },
        }
    }
}

fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}
