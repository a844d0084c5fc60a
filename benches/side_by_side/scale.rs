//! What does a request cost when there are many: sessions, gateways, Redis primaries?

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use super::load::Load;
use super::process::{Proxy, Redis};
use super::{CONNECTIONS, Options, WARM_UP, backend, table};

/// One point of the plot.
#[derive(Clone, Copy)]
struct Setup {
    /// Which of the three is on the axis.
    axis: &'static str,
    sessions: usize,
    gateways: usize,
    primaries: u16,
}

const USUAL: Setup = Setup { axis: "", sessions: 10_000, gateways: 1, primaries: 1 };

const SETUPS: [Setup; 9] = [
    Setup { axis: "sessions", sessions: 1, ..USUAL },
    Setup { axis: "sessions", ..USUAL },
    Setup { axis: "sessions", sessions: 1_000_000, ..USUAL },
    Setup { axis: "gateways", ..USUAL },
    Setup { axis: "gateways", gateways: 2, ..USUAL },
    Setup { axis: "gateways", gateways: 4, ..USUAL },
    Setup { axis: "primaries", ..USUAL },
    Setup { axis: "primaries", primaries: 3, ..USUAL },
    Setup { axis: "primaries", primaries: 6, ..USUAL },
];

/// Of a million sessions, so many are in use at a time.
const ACTIVE: usize = 10_000;
const BODY_BYTES: usize = 1024;

/// One point, standing.
struct World {
    setup: Setup,
    cache: &'static str,
    redis: Redis,
    gateways: Vec<Proxy>,
    turns: Vec<Cost>,
}

struct Cost {
    proxy: f64,
    redis: f64,
    commands: f64,
}

pub(crate) fn measure(options: &Options) {
    let backends = [backend::start(), backend::start()];
    let mut csv = String::from("axis,count,cache,proxy,redis,commands\n");
    println!("CPU in seconds per 100,000 requests; medians of {} rounds of {}\n", options.rounds, options.requests);
    println!("| sessions | gateways | primaries | cache | CPU | to the first | CPU of Redis | commands per request |");
    println!("|---|---|---|---|---|---|---|---|");
    for points in SETUPS.chunk_by(|one, next| one.axis == next.axis) {
        let points =
            points.iter().flat_map(|setup| ["off", "coherent"].map(|cache| World::new(*setup, cache, &backends)));
        let mut worlds: Vec<_> = points.collect();
        // In turns, so that what the machine does beside meets all points of an axis alike.
        for round in 0..=options.rounds {
            for world in &mut worlds {
                let cost = world.turn(round, options.requests);
                if round != 0 {
                    world.turns.push(cost);
                }
            }
        }
        for world in &worlds {
            let of = |number: fn(&Cost) -> f64| table::median(world.turns.iter().map(number));
            let (proxy, redis, commands) = (of(|cost| cost.proxy), of(|cost| cost.redis), of(|cost| cost.commands));
            let first = worlds.iter().find(|first| first.cache == world.cache).expect("at least itself");
            let ratios = world.turns.iter().zip(&first.turns).map(|(turn, first)| turn.proxy / first.proxy);
            let ratio = table::median(ratios);
            let (Setup { axis, sessions, gateways, primaries }, cache) = (world.setup, world.cache);
            println!(
                "| {sessions} | {gateways} | {primaries} | {cache} | {proxy:.2} | {ratio:.2}x | {redis:.2} | {commands:.3} |"
            );
            let count = match axis {
                "sessions" => sessions,
                "gateways" => gateways,
                _ => usize::from(primaries),
            };
            let _ = writeln!(csv, "{axis},{count},{cache},{proxy},{redis},{commands}");
        }
    }
    if let Some(file) = &options.csv {
        std::fs::write(file, csv).unwrap();
    }
}

impl World {
    fn new(setup: Setup, cache: &'static str, backends: &[SocketAddr]) -> Self {
        let redis = if setup.primaries == 1 { Redis::start() } else { Redis::cluster(setup.primaries) };
        let store = format!("{}#{cache}", redis.url());
        // The first one fills the store that all share.
        let gateways = (0..setup.gateways)
            .map(|n| Proxy::gateway(&store, if n == 0 { setup.sessions } else { 0 }, backends))
            .collect();
        Self { setup, cache, redis, gateways, turns: Vec::new() }
    }

    fn turn(&self, round: usize, requests: usize) -> Cost {
        let cookies = self.gateways[0].cookies();
        let active: Arc<[String]> = cookies[..cookies.len().min(ACTIVE)].into();
        // At first every session comes by, so that its first time does not count.
        let warm_up = ((requests as f64 * WARM_UP) as usize).max(ACTIVE * 4);
        let requests = if round == 0 { warm_up } else { requests };
        let load = Load {
            addresses: self.gateways.iter().map(Proxy::address).collect(),
            cookies: active,
            connections: CONNECTIONS,
            requests,
            body_bytes: BODY_BYTES,
            seed: round as u64 + 1,
        };
        let cpu = || self.gateways.iter().map(Proxy::cpu_seconds).sum::<f64>();
        let before = (cpu(), self.redis.cpu_seconds(), self.redis.commands());
        load.run().unwrap();
        let per_100_000 = 100_000.0 / requests as f64;
        Cost {
            proxy: (cpu() - before.0) * per_100_000,
            redis: (self.redis.cpu_seconds() - before.1) * per_100_000,
            commands: (self.redis.commands() - before.2) as f64 / requests as f64,
        }
    }
}
