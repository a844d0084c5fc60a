//! What do tests stand on? Backends, clients, gateways and Redis servers that are real, and end with their test.
//!
//! ```text
//! let backend = Backend::echo();
//! let gateway = Gateway::in_front_of(&[&backend]).start();
//! let seen = gateway.log_in("ann").get("/").header("X_User", "root").send().seen();
//! assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "the session alone says who the user is");
//! ```

pub(crate) mod backend;
pub(crate) mod client;
pub(crate) mod gateway;
pub(crate) mod dns;
pub(crate) mod provider;
pub(crate) mod wire;
pub(crate) mod clock;
pub(crate) mod redis;
pub(crate) mod fault;
pub(crate) mod tls;
pub(crate) mod http2;

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

/// How long anything in a test may take: far more than it needs on a busy machine, far less than a CI job.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks at a fact.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Waits until `fact` is one; fails the test with `what` after [`DEADLINE`].
///
/// This and [`eventually`] are the only waiting in the tests.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut fact: impl FnMut() -> bool) {
    let started = Instant::now();
    while !fact() {
        assert!(started.elapsed() < DEADLINE, "still not so after {DEADLINE:?}: {what}");
        std::thread::park_timeout(LOOK_AGAIN);
    }
}

/// As [`wait_until`], where the test runs on tokio: waits until `fact` gives something.
pub(crate) async fn eventually<T>(what: &str, mut fact: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = fact().await {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "still not so after {DEADLINE:?}: {what}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Ends what goes on beside a test when the test ends, however it does.
pub(crate) struct Over<'o>(pub(crate) &'o AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Figures that somebody wants to read when the test has passed, too. They are told, and nothing depends on them.
pub(crate) fn tell(figures: &str) {
    // Not captured, as what is printed is.
    let _ = writeln!(std::io::stderr(), "{figures}");
}

/// p50, p99 and the longest.
pub(crate) fn distribution(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: usize| times.get((times.len() * share / 100).min(times.len().saturating_sub(1))).copied();
    let [p50, p99, max] = [at(50), at(99), times.last().copied()].map(Option::unwrap_or_default);
    format!("p50 {p50:?}, p99 {p99:?}, max {max:?} of {}", times.len())
}

/// As [`Port::reserve`], for as long as the tests run: also one of the many clients beside this test would take a port
/// that is merely free.
pub(crate) fn free_port() -> u16 {
    static KEPT: Mutex<Vec<Port>> = Mutex::new(Vec::new());
    let port = Port::reserve();
    let number = port.number();
    KEPT.lock().unwrap().push(port);
    number
}

/// A port of loopback that is kept for one who asked, also while he is away: nobody else is given it, and until he
/// listens, connections are refused. To listen he must set `SO_REUSEADDR`, as servers do (socket(7)).
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    _bound: Socket,
}

impl Port {
    pub(crate) fn reserve() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        let number = socket.local_addr().unwrap().as_socket().expect("of IPv4").port();
        Self { number, _bound: socket }
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}
