//! Does it hold for hours? Two gateways, one Redis and three backends, killed at random under mixed traffic.
//!
//! ```console
//! make soak TIME=10m            # or: cargo test --test soak -- --time 10m --seed 7
//! ```
//!
//! Each visitor knows what they must see: their own name on every page, what they uploaded, what they said on a socket, no
//! page after a logout, and their session until they log out. A server that was killed may fail requests, and each failure
//! is counted by its cause; it may not show anybody anything wrong. What is wrong ends this with exit code 1.

#![expect(clippy::unwrap_used, reason = "a set-up that fails should end the run, and say where")]

#[path = "../it/harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the harness serves the tests, too")]
mod harness;
mod backend;
mod world;
mod visitor;
mod tally;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt;

use harness::{DEADLINE, Over, tell};
use tally::Tally;
use visitor::Visitor;
use world::{Footprint, World};

const VISITORS: u64 = 16;

/// Before memory and descriptors are looked at for the first time: what is made once is made by then.
const WARM_UP: Duration = Duration::from_secs(10);

/// What a gateway may hold more of at the end than after the warm-up, when nobody is there any more.
const MEMORY_GROWTH_BYTES_MAX: u64 = 64 << 20;
const FILES_GROWTH_MAX: usize = 32;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("--backend", port)) = pair(&arguments) {
        return backend::run(port.parse().unwrap());
    }
    let (mut time, mut seed) = (Duration::from_secs(60), rand::random::<u32>().into());
    for pair in arguments.chunks(2) {
        match pair {
            [name, value] if name == "--time" => time = duration(value),
            [name, value] if name == "--seed" => seed = value.parse().expect("a number"),
            other => panic!("not understood: {other:?}; there are --time 10m and --seed NUMBER"),
        }
    }
    soak(time, seed)
}

fn pair(arguments: &[String]) -> Option<(&str, &str)> {
    let [name, value] = arguments else { return None };
    Some((name, value))
}

/// `90s`, `10m`, `8h`.
fn duration(text: &str) -> Duration {
    let (number, unit) = text.split_at(text.len().saturating_sub(1));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        _ => panic!("not a time: {text}; write 90s, 10m or 8h"),
    };
    Duration::from_secs(number.parse::<u64>().expect("a number before the unit") * seconds)
}

fn soak(time: Duration, seed: u64) -> ExitCode {
    tell(&format!("soak: {time:?} with {VISITORS} visitors, seed {seed}"));
    let mut world = World::start();
    let tally = Tally::new();
    let is_over = AtomicBool::new(false);
    let started = Instant::now();
    let mut early = Vec::new();
    let visits = world.visits();
    std::thread::scope(|scope| {
        let over = Over(&is_over);
        let visitors: Vec<_> = (0..VISITORS)
            .map(|number| {
                let (visits, tally, is_over) = (&visits, &tally, &is_over);
                scope.spawn(move || {
                    let mut visitor = Visitor::new(number, seed, visits, tally);
                    while !is_over.load(Ordering::SeqCst) {
                        visitor.do_something();
                    }
                    visitor
                })
            })
            .collect();
        pause(WARM_UP.min(time / 4));
        early = world.footprints();
        let mut dice = visitor::dice(seed, u64::MAX);
        while started.elapsed() < time {
            world.break_something(&mut dice, &tally, time.saturating_sub(started.elapsed()));
            pause(Duration::from_millis(dice.random_range(500..3_000)).min(time.saturating_sub(started.elapsed())));
        }
        world.mend(&tally);
        drop(over);
        let visitors: Vec<_> = visitors.into_iter().map(|visitor| visitor.join()).collect();
        let deadline = Instant::now() + DEADLINE;
        for visitor in visitors {
            // Everything is up again: whoever is still logged in has to be known at both gateways.
            match visitor {
                Ok(mut visitor) => visitor.look_around(deadline),
                Err(_) => tally.wrong("a visitor gave up: see above"),
            }
        }
    });
    let lasted = started.elapsed();
    let late = world.settled_footprints(&early);
    for (number, (early, late)) in early.iter().zip(&late).enumerate() {
        tell(&format!("gateway {number}: {early} after the warm-up, {late} at the end"));
        judge(number, early, late, world.was_restarted(number), &tally);
    }
    world.logs().iter().filter(|line| line.contains("panicked")).for_each(|line| tally.wrong(line));
    world.look_for_ends(&tally);
    tally.print(lasted, seed);
    if tally.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn judge(number: usize, early: &Footprint, late: &Footprint, was_restarted: bool, tally: &Tally) {
    // One that was restarted had no warm-up.
    if !was_restarted && early.memory_bytes + MEMORY_GROWTH_BYTES_MAX < late.memory_bytes {
        tally.wrong(&format!("gateway {number} has grown: {early}, then {late}"));
    }
    if early.files + FILES_GROWTH_MAX < late.files {
        tally.wrong(&format!("gateway {number} has lost descriptors: {early}, then {late}"));
    }
}

/// Passing the time is what this is for.
fn pause(time: Duration) {
    let since = Instant::now();
    if !time.is_zero() {
        std::thread::park_timeout(time.min(Duration::from_secs(3_600)));
    }
    // A park may end early.
    while since.elapsed() < time {
        std::thread::park_timeout(time - since.elapsed());
    }
}
