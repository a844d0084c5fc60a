//! What does each way to balance do to the slowest requests, when servers or requests are uneven?
//!
//! The real choice, in a time that is counted and not measured: the same figures on every machine.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed, and says where")]
#![expect(clippy::print_stdout, reason = "it prints what it found")]

use std::collections::VecDeque;

use cloakroom::backend::balance::{Tried, hash};
use cloakroom::backend::{Lease, Pool};

/// Steps of time; a request comes in every second one.
const STEPS: u64 = 1_000_000;

/// A set-up: how many steps a request takes at each server, of which the `n`-th request is `long`er by a factor.
struct Case {
    name: &'static str,
    steps: [u64; 4],
    every: u64,
    longer: u64,
}

fn main() {
    let cases = [
        Case { name: "even servers and requests", steps: [6; 4], every: u64::MAX, longer: 1 },
        Case { name: "one server of four takes ten times as long", steps: [40, 4, 4, 4], every: u64::MAX, longer: 1 },
        Case { name: "one request of twenty takes twenty times as long", steps: [3; 4], every: 20, longer: 20 },
    ];
    println!("| | balance | p50 | p99 | longest |\n|---|---|---|---|---|");
    for case in &cases {
        for balance in ["round_robin", "least_requests", "power_of_two"] {
            let times = run(case, balance);
            let at = |percent: usize| times[times.len() * percent / 100];
            println!("| {} | `{balance}` | {} | {} | {} |", case.name, at(50), at(99), times.last().unwrap());
        }
    }
}

/// One request after the other at each server; how long each was there, sorted.
fn run(case: &Case, balance: &str) -> Vec<u64> {
    let backends: Vec<_> = (1..=case.steps.len()).map(|port| format!("127.0.0.1:{port}")).collect();
    let config = format!("backends = {backends:?}\nbalance = \"{balance}\"");
    let pool = Pool::new("app", &toml::from_str(&config).unwrap(), None);
    let mut times = Vec::new();
    let mut queues: [VecDeque<(u64, u64, Lease)>; 4] = Default::default();
    for now in 0..STEPS {
        for queue in &mut queues {
            let Some((came, left, _)) = queue.front_mut() else { continue };
            *left -= 1;
            if *left == 0 {
                times.push(now - *came);
                queue.pop_front();
            }
        }
        if now % 2 == 0 {
            let lease = pool.pick(0, &mut Tried::default()).unwrap();
            let server = backends.iter().position(|name| name == lease.name()).unwrap();
            // Which are the long ones does not keep step with whose turn it is.
            let is_long = hash(&now.to_le_bytes()).is_multiple_of(case.every);
            let takes = case.steps[server] * if is_long { case.longer } else { 1 };
            queues[server].push_back((now, takes, lease));
        }
    }
    times.sort_unstable();
    times
}
