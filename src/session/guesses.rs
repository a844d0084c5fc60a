//! Who asks for sessions that do not exist? Nobody guesses 256 bits; whoever tries must not make the store work for it.
//!
//! Only ids that the store did not know count, each once, per network (an IPv4 address, or an IPv6 /64: the least that
//! one subscriber holds). A browser that goes on asking with a session that ended guesses nothing. Sessions that are known
//! here without asking the store, and those that lived when it was last asked, are served whatever a network has spent:
//! who shares an address with a guesser is not locked out. An id that was just unknown is not asked for again for a
//! moment, and when it was unknown twice, not for a while: ids are made at random when somebody logs in, so it can only be
//! one that ended or that never was.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::id::{KeyHashing, SessionKey};
use super::network::Network;
use super::store::Ending;

/// Counts guesses and remembers the last ones; bounded in memory.
#[derive(Debug, Default)]
pub(super) struct Guesses(Mutex<Lately>);

/// What is to be done with an id that is not known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Ask,
    /// The store was asked a moment ago, and had nothing but perhaps a reason.
    Gone(Option<Ending>),
    /// This network has asked for too many; worth another try after this long.
    TooMany(Duration),
}

#[derive(Debug, Default)]
struct Lately {
    networks: HashMap<Network, Spent>,
    gone: HashMap<SessionKey, Gone>,
    lived: Lived,
}

/// Sessions that lived when the store was last asked. In two generations: of the older one, those that nobody comes with
/// are forgotten.
#[derive(Debug, Default)]
struct Lived {
    young: HashSet<SessionKey, KeyHashing>,
    old: HashSet<SessionKey, KeyHashing>,
}

/// Guesses that are not forgiven yet, as they were `at` this moment.
#[derive(Clone, Copy, Debug)]
struct Spent {
    guesses: f64,
    at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Gone {
    ending: Option<Ending>,
    until: Instant,
}

/// An office behind one address, whose sessions all ended over night, is not stopped by this.
const GUESSES_MAX: f64 = 200.0;
const FORGIVEN_PER_SECOND: f64 = 5.0;
const REMEMBERED_FOR: Duration = Duration::from_secs(2);
/// What was unknown twice stays so.
const REMEMBERED_LONGER: Duration = Duration::from_secs(60);
const NETWORKS_MAX: usize = 16 * 1024;
const GONE_MAX: usize = 16 * 1024;
/// In each of two generations.
const LIVED_MAX: usize = 32 * 1024;

impl Guesses {
    pub(super) fn answer(&self, key: &SessionKey, client: IpAddr, now: Instant) -> Answer {
        let lately = self.0.lock();
        if let Some(gone) = lately.gone.get(key).filter(|gone| now < gone.until) {
            return Answer::Gone(gone.ending);
        }
        if lately.lived.has(key) {
            return Answer::Ask;
        }
        let spent = lately.networks.get(&Network::of(client)).map_or(0.0, |spent| spent.left(now));
        if spent <= GUESSES_MAX - 1.0 {
            return Answer::Ask;
        }
        Answer::TooMany(Duration::from_secs_f64((spent - GUESSES_MAX + 1.0) / FORGIVEN_PER_SECOND))
    }

    /// The store has no such session. With a reason it had one, so this was no guess.
    pub(super) fn note(&self, key: &SessionKey, client: IpAddr, ending: Option<Ending>, now: Instant) {
        let mut lately = self.0.lock();
        let had_lived = lately.lived.forget(key);
        make_room(&mut lately.gone, GONE_MAX, |gone| now < gone.until);
        let was_gone = lately.gone.contains_key(key);
        let until = now + if was_gone { REMEMBERED_LONGER } else { REMEMBERED_FOR };
        lately.gone.insert(key.clone(), Gone { ending, until });
        if ending.is_none() && !was_gone && !had_lived {
            make_room(&mut lately.networks, NETWORKS_MAX, |spent| 0.0 < spent.left(now));
            let spent = lately.networks.entry(Network::of(client)).or_insert(Spent { guesses: 0.0, at: now });
            // Many may have been on their way at the same time: what is over the limit is not held against them.
            *spent = Spent { guesses: (spent.left(now) + 1.0).min(GUESSES_MAX), at: now };
        }
    }

    /// The store has this session: whoever comes with it has guessed nothing.
    pub(super) fn note_life(&self, key: &SessionKey) {
        self.0.lock().lived.note(key);
    }
}

impl Lived {
    fn note(&mut self, key: &SessionKey) {
        if self.young.contains(key) {
            return;
        }
        if LIVED_MAX <= self.young.len() {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key.clone());
    }

    fn has(&self, key: &SessionKey) -> bool {
        self.young.contains(key) || self.old.contains(key)
    }

    /// Whether it was there.
    fn forget(&mut self, key: &SessionKey) -> bool {
        self.young.remove(key) | self.old.remove(key)
    }
}

impl Spent {
    fn left(self, now: Instant) -> f64 {
        let forgiven = now.saturating_duration_since(self.at).as_secs_f64() * FORGIVEN_PER_SECOND;
        (self.guesses - forgiven).max(0.0)
    }
}

/// For one more. When all that is there still counts, all of it is forgotten: who has so many networks, or fills the
/// memory within seconds, is not stopped by counting.
fn make_room<K: Eq + Hash, V: Copy>(map: &mut HashMap<K, V>, most: usize, still_counts: impl Fn(V) -> bool) {
    if map.len() < most {
        return;
    }
    map.retain(|_, value| still_counts(*value));
    // Almost full again is cleared, too: else the next ones would each look through all of it.
    if most - most / 8 < map.len() {
        map.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::id::SessionId;

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_that_guesses_is_stopped_and_forgiven_slowly() {
        let (guesses, start) = (Guesses::default(), Instant::now());
        for n in 0..200 {
            let host = address(&format!("2001:db8::{n:x}"));
            let key = key();
            assert_eq!(guesses.answer(&key, host, start), Answer::Ask, "guess {n}");
            guesses.note(&key, host, None, start);
        }
        let neighbour = address("2001:db8::ffff:1");
        assert_eq!(guesses.answer(&key(), neighbour, start), Answer::TooMany(Duration::from_millis(200)));
        for other in ["2001:db8:0:1::1", "192.0.2.1"] {
            assert_eq!(guesses.answer(&key(), address(other), start), Answer::Ask, "{other} is another network");
        }
        let later = start + Duration::from_millis(200);
        assert_eq!(guesses.answer(&key(), neighbour, later), Answer::Ask);
        guesses.note(&key(), neighbour, None, later);
        assert!(matches!(guesses.answer(&key(), neighbour, later), Answer::TooMany(_)));
        assert_eq!(guesses.answer(&key(), neighbour, start + Duration::from_secs(60)), Answer::Ask);
    }

    #[test]
    fn the_same_address_in_ipv6_dress_is_the_same_network() {
        let (guesses, start) = (Guesses::default(), Instant::now());
        for _ in 0..200 {
            guesses.note(&key(), address("::ffff:192.0.2.1"), None, start);
        }
        assert!(matches!(guesses.answer(&key(), address("192.0.2.1"), start), Answer::TooMany(_)));
        assert_eq!(guesses.answer(&key(), address("192.0.2.2"), start), Answer::Ask);
    }

    #[test]
    fn what_was_just_unknown_is_not_asked_for_again_for_a_moment() {
        let (guesses, start, client) = (Guesses::default(), Instant::now(), address("192.0.2.1"));
        let (unknown, revoked) = (key(), key());
        guesses.note(&unknown, client, None, start);
        guesses.note(&revoked, client, Some(Ending::Revoked), start);
        let soon = start + Duration::from_millis(1_999);
        assert_eq!(guesses.answer(&unknown, client, soon), Answer::Gone(None));
        assert_eq!(guesses.answer(&revoked, client, soon), Answer::Gone(Some(Ending::Revoked)), "and is told why");
        assert_eq!(guesses.answer(&unknown, client, start + REMEMBERED_FOR), Answer::Ask, "in case we were told wrong");
    }

    #[test]
    fn a_browser_that_asks_on_with_a_session_that_ended_spends_nothing_of_its_network() {
        let (guesses, start, client) = (Guesses::default(), Instant::now(), address("192.0.2.1"));
        let stale: Vec<_> = (0..150).map(|_| key()).collect();
        let mut asked = 0;
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            for key in &stale {
                if guesses.answer(key, client, now) == Answer::Ask {
                    guesses.note(key, client, None, now);
                    asked += 1;
                }
            }
            assert_eq!(guesses.answer(&key(), client, now), Answer::Ask, "second {second}: who else is there may ask");
        }
        assert!(asked <= 150 * 12, "{asked} questions: what was unknown twice is asked for once a minute");
    }

    #[test]
    fn who_has_a_session_is_not_locked_out_by_a_guesser_in_the_same_network() {
        let (guesses, start, client) = (Guesses::default(), Instant::now(), address("192.0.2.1"));
        let mine = key();
        guesses.note_life(&mine);
        for _ in 0..200 {
            guesses.note(&key(), client, None, start);
        }
        assert!(matches!(guesses.answer(&key(), client, start), Answer::TooMany(_)));
        assert_eq!(guesses.answer(&mine, client, start), Answer::Ask, "although no copy of it is here at the moment");
        guesses.note(&mine, client, None, start);
        assert_eq!(guesses.answer(&mine, client, start), Answer::Gone(None), "until it ends");
        assert!(!guesses.0.lock().lived.has(&mine), "then it is an id like others");
    }

    #[test]
    fn sessions_that_ended_are_no_guesses() {
        let (guesses, start, client) = (Guesses::default(), Instant::now(), address("192.0.2.1"));
        for _ in 0..1_000 {
            guesses.note(&key(), client, Some(Ending::Displaced), start);
        }
        assert_eq!(guesses.answer(&key(), client, start), Answer::Ask);
    }

    #[test]
    fn the_memory_is_bounded() {
        let (guesses, start) = (Guesses::default(), Instant::now());
        let first = key();
        guesses.note_life(&first);
        for n in 0..100_000_u32 {
            guesses.note_life(&key());
            guesses.note(&key(), IpAddr::from(n.to_be_bytes()), None, start + Duration::from_micros(u64::from(n)));
        }
        let lately = guesses.0.lock();
        assert!(lately.networks.len() <= NETWORKS_MAX && lately.gone.len() <= GONE_MAX);
        assert!(lately.lived.young.len() <= LIVED_MAX && lately.lived.old.len() <= LIVED_MAX);
        assert!(!lately.lived.has(&first), "those that nobody comes with are forgotten");
    }
}
