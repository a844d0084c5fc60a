//! Whose turn is it? One look at each backend says who can take a request; among those, `balance` decides.
//!
//! | `balance` | goes to | shared by the workers |
//! |---|---|---|
//! | round robin, equal weights | the next in turn | one counter |
//! | round robin, weights | who is furthest behind its share | one lock |
//! | least requests | who has the fewest for its weight | a counter for ties |
//! | power of two | of two that are drawn, who has fewer | a counter to draw from |
//! | hash | who scores highest for this key, and is not over its bound | nothing |

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::config::model::Balance;

use super::{AdminState, Backend, Lease, Pool, Unavailable};

/// A request is offered to at most this many backends: the later failures are more likely ours than theirs.
pub const ATTEMPTS_MAX: usize = 8;

/// The backends that failed this request already.
#[derive(Debug, Default)]
pub struct Tried {
    ids: [u64; ATTEMPTS_MAX],
    len: usize,
}

/// What a backend can do for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Ready,
    /// Well, and busy with all that it may have.
    Full,
    /// Its checks or its requests fail.
    Out,
    /// Tried, drained, or without an address.
    Unfit,
}

/// Who may be chosen: each class only when there is nobody in the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Primary,
    Backup,
    Out,
}

/// A full share, in the unit that slow starts are counted in.
pub const WHOLE: u64 = 1_000;
/// What a backend begins with that comes back.
const FIRST_SHARE: u64 = WHOLE / 10;

/// With `balance = "hash"` no backend has more than this many hundredths of its share of the requests in flight: what
/// would be more goes to the next one for its key (Mirrokni et al., "Consistent Hashing with Bounded Loads", 2018).
const BOUND: u64 = 125;
/// So many are never too many: a browser sends six at a time, and they belong together.
const BOUND_MIN: u64 = 16;

impl Tried {
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn add(&mut self, backend: &Backend) {
        if let Some(slot) = self.ids.get_mut(self.len) {
            *slot = backend.id;
            self.len += 1;
        }
    }

    /// The last one did nothing wrong but close a connection that it had kept: it may be tried again.
    pub fn forget_last(&mut self) {
        self.len = self.len.saturating_sub(1);
    }

    fn contains(&self, backend: &Backend) -> bool {
        self.ids[..self.len].contains(&backend.id)
    }
}

impl Pool {
    /// The backend whose turn it is, of those that this request has not tried. Backups come when no other can; those
    /// that are out when nobody is well; those that are drained or unresolved never.
    ///
    /// `key` is what `balance = "hash"` goes by.
    pub fn pick(&self, key: u64, tried: &mut Tried) -> Result<Lease, Unavailable> {
        let backends = self.backends.load();
        if tried.len == ATTEMPTS_MAX {
            return Err(Unavailable::Nobody);
        }
        // Somebody else may take the last place at a backend between the look and the choice: then look again.
        for _ in 0..=backends.len() {
            let look = self.look(&backends, tried);
            if look.is_out
                && tried.is_empty()
                && let Some(lease) = self.trial(&backends)
            {
                tried.add(&lease);
                return Ok(lease);
            }
            let (class, seen) = match &look.ready {
                [Seen { count: 0, .. }, Seen { count: 0, .. }] => match look {
                    Look { is_full: true, .. } => return Err(Unavailable::Full),
                    Look { is_out: false, .. } => return Err(Unavailable::Nobody),
                    Look { .. } => (Class::Out, &Seen::default()),
                },
                [Seen { count: 0, .. }, backups] => (Class::Backup, backups),
                [primaries, _] => (Class::Primary, primaries),
            };
            let are_all = seen.count == backends.len();
            let are_equal = !seen.is_mixed;
            let among = Candidates { pool: self, backends: &backends, tried, class, are_all, are_equal };
            let Some(backend) = among.choose(key) else { continue };
            if let Some(lease) = backend.try_lease() {
                tried.add(&lease);
                return Ok(lease);
            }
            if class == Class::Out && backend.admin_state() == AdminState::Active {
                return Err(Unavailable::Full);
            }
        }
        Err(Unavailable::Full)
    }

    fn look(&self, backends: &[Arc<Backend>], tried: &Tried) -> Look {
        let mut look = Look::default();
        for backend in backends {
            match backend.standing(tried) {
                Standing::Ready => {
                    let seen = &mut look.ready[usize::from(backend.is_backup())];
                    let share = backend.share(self);
                    seen.is_mixed |= seen.count != 0 && seen.share != share;
                    seen.share = share;
                    seen.count += 1;
                }
                Standing::Full => look.is_full = true,
                Standing::Out => look.is_out = true,
                Standing::Unfit => {}
            }
        }
        look
    }

    /// A place at a backend that was ejected, when its time is over and this request is the one that tries it.
    fn trial(&self, backends: &[Arc<Backend>]) -> Option<Lease> {
        let is_candidate = |backend: &&Arc<Backend>| {
            // A backup is tried when it is needed, and not before.
            backend.ejection.is_out() && !backend.checked.is_down() && !backend.is_backup()
        };
        let (now, patience) = (self.ongoing.now(), self.trial_patience());
        let nothing = Tried::default();
        let candidates = backends.iter().filter(is_candidate);
        candidates.filter(|backend| backend.is_fit(&nothing)).find_map(|backend| {
            if !backend.ejection.may_be_tried(now, patience) {
                return None;
            }
            let mut lease = backend.try_lease()?;
            lease.trial = backend.ejection.claim_trial(now, patience);
            lease.trial.is_some().then_some(lease)
        })
    }
}

/// What one look at all backends finds.
#[derive(Default)]
struct Look {
    /// Primaries and backups.
    ready: [Seen; 2],
    is_full: bool,
    is_out: bool,
}

#[derive(Default)]
struct Seen {
    count: usize,
    /// Of the last one.
    share: u64,
    /// Shares differ.
    is_mixed: bool,
}

/// The backends of one class.
struct Candidates<'p> {
    pool: &'p Pool,
    backends: &'p [Arc<Backend>],
    tried: &'p Tried,
    class: Class,
    /// There are no others in the pool.
    are_all: bool,
    /// They have the same share.
    are_equal: bool,
}

impl<'p> Candidates<'p> {
    fn iter(&self) -> impl Iterator<Item = &'p Arc<Backend>> + Clone {
        self.backends.iter().filter(|backend| {
            if self.are_all {
                return true;
            }
            let standing = backend.standing(self.tried);
            match self.class {
                Class::Primary => standing == Standing::Ready && !backend.is_backup(),
                Class::Backup => standing == Standing::Ready && backend.is_backup(),
                Class::Out => standing == Standing::Out,
            }
        })
    }

    /// One of them; none when they have gone meanwhile.
    fn choose(&self, key: u64) -> Option<&'p Arc<Backend>> {
        match (self.class, self.pool.balance) {
            // To find out who is back, all get their turn.
            (Class::Out, _) => self.in_turn(self.iter()),
            (Class::Primary | Class::Backup, Balance::RoundRobin) => self.deal(self.iter()),
            (Class::Primary | Class::Backup, Balance::LeastRequests) => self.least_busy(),
            (Class::Primary | Class::Backup, Balance::PowerOfTwo) => self.less_busy_of_two(),
            (Class::Primary | Class::Backup, Balance::Hash) => self.by_hash(key),
        }
    }

    fn turn(&self) -> usize {
        self.pool.ongoing.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// By their weights, whatever they have to do.
    fn deal(&self, among: impl Iterator<Item = &'p Arc<Backend>> + Clone) -> Option<&'p Arc<Backend>> {
        if self.are_equal { self.in_turn(among) } else { self.furthest_behind(among) }
    }

    fn in_turn(&self, mut among: impl Iterator<Item = &'p Arc<Backend>> + Clone) -> Option<&'p Arc<Backend>> {
        let turn = self.turn().checked_rem(among.clone().count())?;
        among.clone().nth(turn).or_else(|| among.next())
    }

    /// Smooth weighted round robin, as nginx has it: each backend earns its share with every request, and who has earned
    /// most gets this one and pays for it what all have earned. Over a period each gets exactly its share, and between two
    /// turns of one as many others as possible.
    fn furthest_behind(&self, among: impl Iterator<Item = &'p Arc<Backend>>) -> Option<&'p Arc<Backend>> {
        let _dealing = self.pool.ongoing.dealing.lock();
        let mut all = 0;
        let mut chosen: Option<(&Arc<Backend>, i64)> = None;
        for backend in among {
            let share = backend.share(self.pool) as i64;
            let earned = backend.credit.load(Ordering::Relaxed) + share;
            backend.credit.store(earned, Ordering::Relaxed);
            all += share;
            if chosen.is_none_or(|(_, most)| most < earned) {
                chosen = Some((backend, earned));
            }
        }
        let (backend, earned) = chosen?;
        backend.credit.store(earned - all, Ordering::Relaxed);
        Some(backend)
    }

    /// Among equals by their weights: else the first of the list would get all while there is little to do.
    fn least_busy(&self) -> Option<&'p Arc<Backend>> {
        let least = self.iter().reduce(|least, other| if self.is_less_busy(other, least) { other } else { least })?;
        let equals = self.iter().filter(|backend| !self.is_less_busy(least, backend));
        self.deal(equals).or(Some(least))
    }

    /// Where many gateways each see only their own requests, the least busy backend would be the same for all, and they
    /// would run there together; two drawn at random are not (Mitzenmacher, "The Power of Two Choices", 2001).
    fn less_busy_of_two(&self) -> Option<&'p Arc<Backend>> {
        let all: u64 = self.iter().map(|backend| backend.share(self.pool)).sum();
        let drawn = mix(self.turn() as u64);
        let one = self.drawn(drawn, all)?;
        let rest = all.saturating_sub(one.share(self.pool));
        let others = || self.iter().filter(|backend| backend.id != one.id);
        let Some(other) = draw(others(), mix(drawn), rest, |backend| backend.share(self.pool)) else {
            return Some(one);
        };
        Some(if self.is_less_busy(other, one) { other } else { one })
    }

    fn drawn(&self, number: u64, all: u64) -> Option<&'p Arc<Backend>> {
        draw(self.iter(), number, all, |backend| backend.share(self.pool))
    }

    /// Weighted rendezvous hashing: each backend scores for the key, and the highest score has it. When one leaves, its keys
    /// alone move, and to each of the others in proportion.
    fn by_hash(&self, key: u64) -> Option<&'p Arc<Backend>> {
        let (shares, requests) = self.iter().fold((0, 1), |(shares, requests), backend| {
            (shares + backend.share(self.pool), requests + u64::from(backend.in_flight()))
        });
        let is_within_bound = |backend: &&Arc<Backend>| {
            // Rounded up, so that there is always room at one of them.
            let bound = (requests * backend.share(self.pool) * BOUND).div_ceil((shares * 100).max(1));
            u64::from(backend.in_flight()) < bound.max(BOUND_MIN)
        };
        let highest = |one: &'p Arc<Backend>, other: &'p Arc<Backend>| {
            if self.score(one, key) < self.score(other, key) { other } else { one }
        };
        self.iter().filter(is_within_bound).reduce(highest).or_else(|| self.iter().reduce(highest))
    }

    /// The highest of exponentially distributed numbers is each one's in proportion to its rate.
    fn score(&self, backend: &Backend, key: u64) -> f64 {
        let drawn = mix(key ^ backend.seed);
        // The upper 53 bits are the fraction of a double; in (0, 1), so that its logarithm is there and not 0.
        let uniform = ((drawn >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        backend.share(self.pool) as f64 / -uniform.ln()
    }

    fn is_less_busy(&self, one: &Backend, other: &Backend) -> bool {
        let requests = |backend: &Backend| u64::from(backend.in_flight());
        requests(one) * other.share(self.pool) < requests(other) * one.share(self.pool)
    }
}

/// One of these, with a chance in proportion to its share of `all`.
fn draw<'b>(
    backends: impl Iterator<Item = &'b Arc<Backend>>,
    number: u64,
    all: u64,
    share: impl Fn(&Backend) -> u64,
) -> Option<&'b Arc<Backend>> {
    let mut left = number.checked_rem(all)?;
    let mut last = None;
    for backend in backends {
        let share = share(backend);
        if left < share {
            return Some(backend);
        }
        left -= share;
        last = Some(backend);
    }
    last
}

impl Backend {
    fn is_fit(&self, tried: &Tried) -> bool {
        !self.is_draining.load(Ordering::Relaxed)
            && self.has_address.load(Ordering::Relaxed)
            && (tried.is_empty() || !tried.contains(self))
    }

    /// A backup is back as soon as its time is over, for no request tries it before one needs it.
    pub(super) fn is_ejected(&self) -> bool {
        self.ejection.is_out() && !(self.is_backup() && self.ejection.is_over(self.ongoing.now()))
    }

    fn standing(&self, tried: &Tried) -> Standing {
        if !self.is_fit(tried) {
            return Standing::Unfit;
        }
        if self.checked.is_down() || self.is_ejected() {
            return Standing::Out;
        }
        let most = self.max_requests();
        // Ordered after the entry in the queue: see `Lease::end`.
        if most != 0 && most <= self.in_flight.0.load(Ordering::SeqCst) { Standing::Full } else { Standing::Ready }
    }

    /// Its weight, in thousandths; less while it starts slowly.
    fn share(&self, pool: &Pool) -> u64 {
        u64::from(self.weight()) * self.warmth(pool)
    }

    /// How much of its share it has, in thousandths: not all of it while it starts slowly.
    pub fn warmth(&self, pool: &Pool) -> u64 {
        let since = self.warm_since.load(Ordering::Relaxed);
        if since == 0 || pool.slow_start.is_zero() {
            return WHOLE;
        }
        let warmed = self.ongoing.now().saturating_sub(since);
        let whole = pool.slow_start.as_millis() as u64;
        if whole <= warmed {
            // Warm from now on, unless it has begun anew meanwhile.
            let _ = self.warm_since.compare_exchange(since, 0, Ordering::Relaxed, Ordering::Relaxed);
            return WHOLE;
        }
        (WHOLE * warmed / whole).max(FIRST_SHARE)
    }
}

/// The same in every process and version, so that all gateways agree: FNV-1a, and its bits mixed.
pub fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    mix(fnv)
}

/// One step of SplitMix64: of close numbers it makes distant ones.
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::Health;
    use crate::backend::ejection::Failure;
    use crate::config::model;

    fn config(backends: &str, keys: &str) -> model::Pool {
        toml::from_str(&format!("backends = [{backends}]\n{keys}")).unwrap()
    }

    fn pool(backends: &str, keys: &str) -> Pool {
        Pool::new("app", &config(backends, keys), None)
    }

    /// Backends `127.0.0.1:1` and so on, one for each of these further keys.
    fn backends(keys: &[&str]) -> String {
        let table = |(at, keys): (usize, &&str)| format!("{{ address = \"127.0.0.1:{}\"{keys} }}", at + 1);
        keys.iter().enumerate().map(table).collect::<Vec<_>>().join(", ")
    }

    fn three() -> Pool {
        pool(&backends(&["", "", ""]), "")
    }

    /// The number of the backend.
    fn number(lease: &Lease) -> usize {
        lease.name().rsplit(':').next().unwrap().parse().unwrap()
    }

    fn next(pool: &Pool) -> Option<usize> {
        pool.pick(0, &mut Tried::default()).ok().as_ref().map(number)
    }

    fn turns(pool: &Pool, count: usize) -> Vec<usize> {
        (0..count).filter_map(|_| next(pool)).collect()
    }

    fn shares(turns: &[usize]) -> BTreeMap<usize, usize> {
        let mut shares = BTreeMap::new();
        turns.iter().for_each(|turn| *shares.entry(*turn).or_default() += 1);
        shares
    }

    /// A request to this backend fails without a connection.
    fn kill(pool: &Pool, number: usize) {
        let mut lease = pool.backends()[number - 1].try_lease().unwrap();
        pool.note_failure(&mut lease, Failure::Connect);
    }

    fn succeed(pool: &Pool, number: usize) {
        let mut lease = pool.backends()[number - 1].try_lease().unwrap();
        pool.note_success(&mut lease);
    }

    fn take_out_by_check(pool: &Pool, number: usize) {
        pool.backends()[number - 1].checked.fail();
    }

    #[test]
    fn backends_take_strict_turns() {
        assert_eq!(turns(&three(), 6), [1, 2, 3, 1, 2, 3], "each once before any twice");
    }

    #[test]
    fn turns_are_strict_whoever_asks() {
        let pool = pool(&backends(&["", "", "", ""]), "");
        let all: Vec<_> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| turns(&pool, 1_000))).collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(shares(&all), [(1, 1_000), (2, 1_000), (3, 1_000), (4, 1_000)].into());
    }

    #[test]
    fn the_share_of_one_that_is_out_goes_to_all_others_alike() {
        let pool = pool(&backends(&["", "", "", ""]), "");
        kill(&pool, 2);
        assert_eq!(shares(&turns(&pool, 300)), [(1, 100), (3, 100), (4, 100)].into());
    }

    #[test]
    fn weights_are_smooth_and_exact_over_a_period() {
        // The order that nginx documents for these weights.
        let weighted = pool(&backends(&[", weight = 5", "", ""]), "");
        assert_eq!(turns(&weighted, 14), [1, 1, 2, 1, 3, 1, 1].repeat(2));
        for weights in [[3, 1, 1], [7, 5, 3], [1, 2, 1_000], [1_000, 999, 998]] {
            let tables = weights.map(|weight| format!(", weight = {weight}"));
            let weighted = pool(&backends(&tables.each_ref().map(String::as_str)), "");
            let period = weights.iter().sum();
            for _ in 0..2 {
                let expected = weights.iter().enumerate().map(|(at, weight)| (at + 1, *weight)).collect();
                assert_eq!(shares(&turns(&weighted, period)), expected, "{weights:?}");
            }
        }
    }

    #[test]
    fn weights_hold_among_many_workers() {
        let weighted = pool(&backends(&[", weight = 3", ", weight = 2", ""]), "");
        let all: Vec<_> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| turns(&weighted, 600))).collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(shares(&all), [(1, 1_200), (2, 800), (3, 400)].into());
    }

    #[test]
    fn a_weight_changes_while_it_runs() {
        let pool = three();
        pool.backends()[0].set_weight(4);
        assert_eq!(shares(&turns(&pool, 60)), [(1, 40), (2, 10), (3, 10)].into());
        pool.backends()[0].set_weight(1);
        assert_eq!(shares(&turns(&pool, 60)), [(1, 20), (2, 20), (3, 20)].into());
    }

    #[test]
    fn one_request_never_tries_a_backend_twice() {
        for balance in ["round_robin", "least_requests", "power_of_two", "hash"] {
            let pool = pool(&backends(&["", ", weight = 2", ""]), &format!("balance = \"{balance}\""));
            let mut tried = Tried::default();
            let mut met: Vec<_> =
                std::iter::from_fn(|| pool.pick(7, &mut tried).ok()).map(|lease| number(&lease)).collect();
            met.sort_unstable();
            assert_eq!(met, [1, 2, 3], "{balance}: every backend once, then none");
        }
    }

    #[test]
    fn one_that_is_out_is_passed_over_until_nobody_is_well() {
        let pool = pool(&backends(&["", "", ""]), "eject.time = \"1h\"\neject.time_max = \"1h\"");
        kill(&pool, 1);
        assert!(!turns(&pool, 8).contains(&1));
        take_out_by_check(&pool, 2);
        assert_eq!(turns(&pool, 4), [3, 3, 3, 3]);
        kill(&pool, 3);
        assert_eq!(shares(&turns(&pool, 6)), [(1, 2), (2, 2), (3, 2)].into(), "when all are out, all are tried");
        succeed(&pool, 1);
        assert_eq!(turns(&pool, 4), [1, 1, 1, 1], "one that answered is back");
    }

    #[test]
    fn a_backup_waits_until_no_other_can() {
        let pool = pool(&backends(&["", ", max_requests = 1", ", backup = true"]), "");
        assert_eq!(shares(&turns(&pool, 10)), [(1, 5), (2, 5)].into());
        kill(&pool, 1);
        let held = pool.pick(0, &mut Tried::default()).unwrap();
        assert_eq!((number(&held), next(&pool)), (2, Some(3)), "one is out, the other is full");
        drop(held);
        assert_eq!(next(&pool), Some(2));
    }

    /// Whoever waits for that switches it off.
    #[test]
    fn who_is_drained_and_has_nothing_in_flight_gets_nothing_any_more() {
        let pool = pool(&backends(&["", ""]), "");
        let (is_idle, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        let met = std::thread::scope(|scope| {
            let asking = || {
                let mut met = 0;
                while !is_over.load(Ordering::SeqCst) {
                    // None where it was drained and undrained several times meanwhile.
                    let Ok(lease) = pool.pick(0, &mut Tried::default()) else { continue };
                    met += usize::from(number(&lease) == 1 && is_idle.load(Ordering::SeqCst));
                }
                met
            };
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(asking)).collect();
            let leaving = &pool.backends()[0];
            for _ in 0..5_000 {
                leaving.drain();
                while leaving.in_flight() != 0 {
                    std::hint::spin_loop();
                }
                is_idle.store(true, Ordering::SeqCst);
                std::thread::yield_now();
                is_idle.store(false, Ordering::SeqCst);
                leaving.undrain();
            }
            is_over.store(true, Ordering::SeqCst);
            threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>()
        });
        assert_eq!(met, 0);
    }

    #[test]
    fn a_drained_or_unresolved_backend_gets_no_request() {
        let pool = pool("\"nowhere.invalid:80\", \"127.0.0.1:2\", { address = \"127.0.0.1:3\", drain = true }", "");
        assert_eq!(turns(&pool, 4), [2, 2, 2, 2]);
        pool.backends()[1].drain();
        assert_eq!(pool.pick(0, &mut Tried::default()).err(), Some(Unavailable::Nobody), "not even when all are");
        pool.backends()[2].undrain();
        assert_eq!(turns(&pool, 2), [3, 3]);
    }

    #[test]
    fn a_full_backend_gets_no_request_and_one_is_counted_exactly() {
        let pool = pool(&backends(&[", max_requests = 2", ", max_requests = 1"]), "");
        let mut held: Vec<_> = std::iter::from_fn(|| pool.pick(0, &mut Tried::default()).ok()).collect();
        assert_eq!(held.len(), 3);
        assert_eq!(pool.pick(0, &mut Tried::default()).err(), Some(Unavailable::Full));
        let in_flight = || pool.backends().iter().map(|backend| backend.in_flight()).collect::<Vec<_>>();
        assert_eq!(in_flight(), [2, 1]);
        held[0].end();
        held[0].end();
        assert_eq!(in_flight().iter().sum::<u32>(), 2, "ended once, however often it is said");
        drop(held);
        assert_eq!(in_flight(), [0, 0]);
    }

    #[test]
    fn attempts_end() {
        let many = pool(&backends(&[""; 20]), "");
        let mut tried = Tried::default();
        assert_eq!(std::iter::from_fn(|| many.pick(0, &mut tried).ok()).count(), ATTEMPTS_MAX);
    }

    #[test]
    fn least_requests_fills_up_evenly_for_their_weights() {
        let pool = pool(&backends(&[", weight = 3", "", ""]), "balance = \"least_requests\"");
        assert_eq!(shares(&turns(&pool, 50)), [(1, 30), (2, 10), (3, 10)].into(), "with nothing to do as in turn");
        let held: Vec<_> = (0..50).map(|_| pool.pick(0, &mut Tried::default()).unwrap()).collect();
        let numbers: Vec<_> = held.iter().map(number).collect();
        assert_eq!(shares(&numbers), [(1, 30), (2, 10), (3, 10)].into());
    }

    #[test]
    fn power_of_two_keeps_the_busy_one_quiet() {
        let pool = pool(&backends(&["", "", "", ""]), "balance = \"power_of_two\"");
        let busy: Vec<_> = (0..100).map(|_| pool.backends()[1].try_lease().unwrap()).collect();
        let shares = shares(&turns(&pool, 3_000));
        assert!(!shares.contains_key(&2), "there is always a better one of two: {shares:?}");
        assert!(shares.values().all(|share| (800..1_200).contains(share)), "{shares:?}");
        drop(busy);
    }

    fn owners(pool: &Pool, keys: u64) -> Vec<usize> {
        (0..keys).map(|key| number(&pool.pick(mix(key), &mut Tried::default()).unwrap())).collect()
    }

    #[test]
    fn what_hashes_alike_goes_to_the_same_backend_and_all_have_their_share() {
        let pool = pool(&backends(&["", "", ", weight = 2"]), "balance = \"hash\"");
        let first = owners(&pool, 8_000);
        assert_eq!(first, owners(&pool, 8_000));
        let shares = shares(&first);
        for (backend, expected) in [(1, 2_000), (2, 2_000), (3, 4_000)] {
            let share = shares[&backend];
            assert!((expected * 9 / 10..expected * 11 / 10).contains(&share), "{backend}: {share} of {expected}");
        }
    }

    #[test]
    fn when_a_backend_leaves_only_its_own_keys_move() {
        let pool = pool(&backends(&["", "", "", "", ""]), "balance = \"hash\"");
        let before = owners(&pool, 5_000);
        kill(&pool, 3);
        let after = owners(&pool, 5_000);
        let moved: Vec<_> = before.iter().zip(&after).filter(|(before, after)| before != after).collect();
        assert!(moved.iter().all(|(before, _)| **before == 3), "nobody else's");
        assert_eq!(moved.len(), before.iter().filter(|owner| **owner == 3).count());
        let new: Vec<_> = moved.iter().map(|(_, after)| **after).collect();
        assert!(shares(&new).values().all(|share| new.len() / 6 < *share), "to all others: {:?}", shares(&new));
    }

    #[test]
    fn a_key_that_everybody_has_overloads_nobody() {
        let pool = pool(&backends(&["", "", "", ""]), "balance = \"hash\"");
        let held: Vec<_> = (0..400).map(|_| pool.pick(7, &mut Tried::default()).unwrap()).collect();
        let most = pool.backends().iter().map(|backend| backend.in_flight()).max().unwrap();
        assert!(most <= 126, "a quarter more than its share of 100: {most}");
        drop(held);
    }

    #[test]
    fn a_hash_is_the_same_in_every_version() {
        assert_eq!((hash(b"ann"), hash(b"")), (0xb409_0a0b_a3f8_393c, 0xc381_7c01_6ba4_ff30));
    }

    #[test]
    fn one_that_comes_back_starts_slowly() {
        let pool = pool(&backends(&["", ""]), "slow_start = \"1h\"");
        assert_eq!(shares(&turns(&pool, 10)), [(1, 5), (2, 5)].into(), "at the start all are new");
        kill(&pool, 1);
        succeed(&pool, 1);
        assert_eq!(shares(&turns(&pool, 110)), [(1, 10), (2, 100)].into(), "a tenth");
    }

    #[test]
    fn one_of_the_requests_tries_whether_an_ejected_backend_is_back() {
        let pool = pool(&backends(&["", ""]), "eject.time = \"1ms\"\neject.time_max = \"1h\"");
        kill(&pool, 1);
        let over = Instant::now() + Duration::from_millis(2);
        while Instant::now() < over {
            std::hint::spin_loop();
        }
        let mut trial = pool.pick(0, &mut Tried::default()).unwrap();
        assert_eq!((number(&trial), trial.trial.is_some()), (1, true));
        pool.note_success(&mut trial);
        assert_eq!(pool.note_failure(&mut trial, Failure::Timeout), None, "from then on it is like any other request");
        assert_eq!(shares(&turns(&pool, 4)), [(1, 2), (2, 2)].into());
    }

    #[test]
    fn a_backup_that_failed_is_tried_when_it_is_needed_and_not_before() {
        let pool = pool(&backends(&["", ", backup = true"]), "eject.time = \"1ms\"\neject.time_max = \"1h\"");
        kill(&pool, 2);
        let is_up = || pool.backends()[1].health() == Health::Up;
        while !is_up() {
            std::hint::spin_loop();
        }
        assert_eq!(turns(&pool, 3), [1, 1, 1]);
        let mut begun: Vec<_> = (0..5).map(|_| pool.backends()[0].try_lease().unwrap()).collect();
        pool.backends()[0].drain();
        assert_eq!(next(&pool), Some(2));
        kill(&pool, 2);
        assert!(!is_up(), "its next failure counts");
        while !is_up() {
            std::hint::spin_loop();
        }
        let failures = begun.iter_mut().filter_map(|lease| pool.note_failure(lease, Failure::Timeout));
        assert_eq!(failures.count(), 1, "it takes nobody's share while nobody tries it");
    }

    #[test]
    fn replaced_backends_keep_what_they_know_when_they_stay() {
        let pool = three();
        let held = pool.backends()[1].try_lease().unwrap();
        kill(&pool, 3);
        let endpoints =
            config("\"127.0.0.1:2\", { address = \"127.0.0.1:3\", weight = 2 }, \"127.0.0.1:4\"", "").backends;
        let endpoints: Vec<_> = endpoints.into_iter().map(|entry| entry.into_inner().each).collect();
        pool.replace(&endpoints, &mut pool.ongoing.placing.lock());
        let now: Vec<_> =
            pool.backends().iter().map(|b| (b.in_flight(), b.health() == Health::Up, b.weight())).collect();
        assert_eq!(now, [(1, true, 1), (0, false, 2), (0, true, 1)]);
        drop(held);
        assert_eq!(pool.backends()[0].in_flight(), 0);
    }

    #[test]
    fn a_reload_changes_what_the_file_changes_and_nothing_else() {
        let old = pool(&backends(&["", "", ", weight = 3"]), "");
        old.backends()[0].set_weight(9);
        old.backends()[1].drain();
        let held = old.backends()[2].try_lease().unwrap();
        let new = Pool::new("app", &config(&backends(&["", "", ", weight = 4"]), ""), Some(&old));
        assert_eq!(new.backends()[2].weight(), 3, "not before the new rules count");
        new.settle();
        let weights: Vec<_> = new.backends().iter().map(|backend| backend.weight()).collect();
        assert_eq!(weights, [9, 1, 4], "what was set by hand stays, what the file changes changes");
        assert_eq!(new.backends()[1].admin_state(), AdminState::Draining);
        assert_eq!(new.backends()[2].in_flight(), 1);
        drop(held);
        assert_eq!(new.backends()[2].in_flight(), 0);
    }

    /// Backends of which one is ten times as slow, with as many requests as they can just answer. Every step of time is
    /// counted, none is measured.
    fn time_of_the_slowest_hundredth(balance: &str) -> u64 {
        let pool = pool(&backends(&["", "", "", ""]), &format!("balance = \"{balance}\""));
        let (mut times, mut busy) = (Vec::new(), [const { Vec::<(u64, Lease)>::new() }; 4]);
        for now in 0..40_000_u64 {
            for (server, queue) in busy.iter_mut().enumerate() {
                let takes = if server == 0 { 40 } else { 4 };
                if now % takes == 0 && !queue.is_empty() {
                    times.push(now - queue.remove(0).0);
                }
            }
            if now % 2 == 0 {
                let lease = pool.pick(0, &mut Tried::default()).unwrap();
                busy[number(&lease) - 1].push((now, lease));
            }
        }
        times.sort_unstable();
        times[times.len() * 99 / 100]
    }

    #[test]
    fn under_uneven_backends_least_requests_beats_round_robin() {
        let times = ["round_robin", "least_requests", "power_of_two"].map(time_of_the_slowest_hundredth);
        let [in_turn, least, of_two] = times;
        assert!(least * 10 < in_turn && of_two * 10 < in_turn, "{times:?}");
    }
}
