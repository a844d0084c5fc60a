//! What do tests stand on? Backends, clients, gateways and Redis servers that are real, and end with their test.
//!
//! ```text
//! let backend = Backend::echo();
//! let gateway = Gateway::in_front_of(&[&backend]).start();
//! let seen = gateway.log_in("ann").get("/").header("X_User", "root").send().seen();
//! assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "the session alone says who the user is");
//! ```

#![allow(dead_code, reason = "the harness offers more than the tests of the day ask for")]

pub mod backend;
pub mod client;
pub mod wire;
pub mod redis;
pub mod tls;

use std::time::{Duration, Instant};

/// How long anything in a test may take: far more than it needs on a busy machine, far less than a CI job.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Between two looks at a fact.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Waits until `fact` is one; fails the test with `what` after [`DEADLINE`].
///
/// This is the only waiting in the tests.
#[track_caller]
pub fn eventually(what: &str, mut fact: impl FnMut() -> bool) {
    let started = Instant::now();
    while !fact() {
        assert!(started.elapsed() < DEADLINE, "still not so after {DEADLINE:?}: {what}");
        std::thread::park_timeout(LOOK_AGAIN);
    }
}

/// A port of loopback that nothing listens on at this moment.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
