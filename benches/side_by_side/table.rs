//! How do the contestants compare? Medians of the rounds, and of the rounds' ratios to the bare proxy.

use super::{CONNECTIONS, Contestant, Scenario, Turn};

/// In which the rows stand; the first is what the others are compared with.
pub(crate) const ORDER: [&str; 14] = [
    "bare",
    "pingora",
    "public",
    "public-before",
    "memory",
    "memory-before",
    "cached",
    "cached-before",
    "redis",
    "nginx",
    "haproxy",
    "nginx-lua",
    "nginx-lua-cached",
    "nginx-auth-request",
];

pub(crate) fn print(contestants: &[Contestant], scenario: Scenario, requests: usize) {
    let Scenario { sessions, body_bytes } = scenario;
    let rounds = contestants[0].turns.len();
    println!(
        "\n{sessions} sessions, {body_bytes} B; medians of {rounds} rounds of {requests} requests over {CONNECTIONS} \
         connections; CPU in seconds per 100,000 requests\n"
    );
    println!("| proxy | CPU | to bare | CPU of Redis | commands per request | p50 ms | p99 ms | MiB |");
    println!("|---|---|---|---|---|---|---|---|");
    for contestant in contestants {
        let of = |number: fn(&Turn) -> f64| median(contestant.turns.iter().map(number));
        let ratio = median(contestant.turns.iter().zip(&contestants[0].turns).map(|(turn, bare)| turn.cpu / bare.cpu));
        println!(
            "| {} | {:.2} | {ratio:.2}x | {:.2} | {:.3} | {:.2} | {:.2} | {:.0} |",
            long_name(contestant.name),
            of(|turn| turn.cpu),
            of(|turn| turn.redis_cpu),
            of(|turn| turn.commands),
            of(|turn| turn.report.percentile(50.0)),
            of(|turn| turn.report.percentile(99.0)),
            of(|turn| turn.resident_mib),
        );
    }
    println!();
    for before in contestants {
        let is_after = |other: &&Contestant| before.name.strip_suffix("-before") == Some(other.name);
        if let Some(after) = contestants.iter().find(is_after) {
            let ratio = median(after.turns.iter().zip(&before.turns).map(|(after, before)| after.cpu / before.cpu));
            println!("{}: {ratio:.3}x of the CPU before, median of the rounds", long_name(after.name));
        }
    }
}

fn long_name(name: &str) -> &str {
    match name {
        "bare" => "bare pingora in our workers",
        "pingora" => "bare pingora as it comes",
        "public" => "Cloakroom, a public route",
        "public-before" => "Cloakroom, a public route, before",
        "memory" => "Cloakroom, memory",
        "memory-before" => "Cloakroom, memory, before",
        "cached" => "Cloakroom, Redis, cached",
        "cached-before" => "Cloakroom, Redis, cached, before",
        "redis" => "Cloakroom, Redis, uncached",
        "nginx" => "nginx, no sessions",
        "haproxy" => "HAProxy, no sessions",
        "nginx-lua" => "nginx + Lua + Redis",
        "nginx-lua-cached" => "nginx + Lua + Redis, cached 1 s",
        "nginx-auth-request" => "nginx + auth_request",
        other => other,
    }
}

pub(crate) fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[middle] } else { (numbers[middle - 1] + numbers[middle]) / 2.0 }
}
