//! Who has guessed too often? Counts in the session store, so that all instances share them.
//!
//! An attempt is counted before its hash is computed; guesses sent in parallel are all seen. An attempt that came to
//! nothing, because there was no place to compute its hash or the store failed, is taken back: only a look at the
//! password counts. Three counts stop an attempt:
//!
//! - one *network*, whatever the accounts: someone tries many names;
//! - one *account from one network*: someone tries many passwords;
//! - one *account from strange networks*: many machines share the work. A network from which the account has logged
//!   in within 30 days is not strange, so a user whose name is under attack from elsewhere still gets in.
//!
//! A network is an IPv4 address or an IPv6 /64, the least that one subscriber holds. Counts start at the first attempt
//! and are forgotten a `window` later: nobody is locked out for longer, and an attacker cannot prolong it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use super::users::UserName;
use crate::config::model;
use crate::session::network::Network;
use crate::session::store::{SessionStore, StoreError};

/// Counts login attempts.
pub(super) struct Throttle {
    store: Arc<dyn SessionStore>,
    config: model::Throttle,
}

/// What the counts say to an attempt.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Go on; with success, hand the attempt to [`Throttle::succeeded`], without an answer to [`Throttle::take_back`].
    Allowed(CountedAttempt),
    /// Too many; worth another try after this long.
    Throttled(Duration),
}

/// A counted attempt.
#[derive(Debug)]
pub(super) struct CountedAttempt {
    counters: Counters,
    /// Where it was counted, and until when.
    counted: Vec<(String, Instant)>,
}

/// The names of the counters that one account and one network share. Hashes: the store learns no user name from them.
#[derive(Clone, Debug)]
struct Counters {
    network: String,
    account_and_network: String,
    account: String,
    /// Whether the account has logged in from the network.
    known: String,
}

const KNOWN_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl Throttle {
    pub(super) fn new(store: Arc<dyn SessionStore>, config: model::Throttle) -> Self {
        Self { store, config }
    }

    /// Counts an attempt. What one count stops is not counted by the next: a single network cannot use up what an
    /// account has for all.
    pub(super) async fn attempt(&self, user: &UserName, client: IpAddr) -> Result<Verdict, StoreError> {
        let mut attempt = CountedAttempt { counters: Counters::of(user, client), counted: Vec::new() };
        match self.count_all(&mut attempt).await {
            Ok(None) => Ok(Verdict::Allowed(attempt)),
            Ok(Some(wait)) => Ok(Verdict::Throttled(wait)),
            Err(error) => {
                self.take_back(attempt).await;
                Err(error)
            }
        }
    }

    /// How long to wait, when a count stops the attempt.
    async fn count_all(&self, attempt: &mut CountedAttempt) -> Result<Option<Duration>, StoreError> {
        let Counters { network, account_and_network, account, known } = attempt.counters.clone();
        if let Some(wait) = self.count(attempt, network, self.config.per_network).await? {
            return Ok(Some(wait));
        }
        if let Some(wait) = self.count(attempt, account_and_network, self.config.per_account_and_network).await? {
            return Ok(Some(wait));
        }
        if self.store.count(&known).await? == 0 {
            return self.count(attempt, account, self.config.per_account).await;
        }
        Ok(None)
    }

    async fn count(
        &self,
        attempt: &mut CountedAttempt,
        counter: String,
        most: u32,
    ) -> Result<Option<Duration>, StoreError> {
        let count = self.store.increment(&counter, self.config.window.get()).await?;
        attempt.counted.push((counter, Instant::now() + count.resets_in));
        Ok((u64::from(most) < count.value).then_some(count.resets_in))
    }

    /// Takes a successful attempt back, and remembers the network for the account.
    ///
    /// The account's count of strange networks keeps this one attempt; from now on the network is not strange.
    pub(super) async fn succeeded(&self, attempt: CountedAttempt) -> Result<(), StoreError> {
        let noted = self.note_success(&attempt).await;
        if noted.is_err() {
            self.take_back(attempt).await;
        }
        noted
    }

    async fn note_success(&self, attempt: &CountedAttempt) -> Result<(), StoreError> {
        let CountedAttempt { counters, counted } = attempt;
        self.store.reset(&counters.account_and_network).await?;
        // Begun again, since a count is forgotten a fixed time after it began.
        self.store.reset(&counters.known).await?;
        self.store.increment(&counters.known, KNOWN_FOR).await?;
        for (network, resets) in counted.iter().filter(|(counter, _)| *counter == counters.network) {
            self.uncount(network, *resets).await?;
        }
        Ok(())
    }

    /// Nobody looked at the password: the attempt was none. A store that fails now keeps the counts, until they forget.
    pub(super) async fn take_back(&self, attempt: CountedAttempt) {
        for (counter, resets) in attempt.counted {
            if self.uncount(&counter, resets).await.is_err() {
                return;
            }
        }
    }

    /// Only while it is the same count. Otherwise an attacker with an account could begin attempts in one
    /// count, and take them back from the next.
    async fn uncount(&self, counter: &str, resets: Instant) -> Result<(), StoreError> {
        if Instant::now() < resets { self.store.decrement(counter).await } else { Ok(()) }
    }
}

impl std::fmt::Debug for Throttle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Throttle").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Counters {
    fn of(user: &UserName, client: IpAddr) -> Self {
        let (account, network) = (user.folded(), Network::of(client));
        let (account, network) = (account.as_bytes(), network.as_bytes());
        Self {
            network: counter("network", &[network]),
            account_and_network: counter("account-network", &[account, network]),
            account: counter("account", &[account]),
            known: counter("known-network", &[account, network]),
        }
    }
}

fn counter(kind: &str, parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new_with_prefix(b"cloakroom login throttle");
    for part in [kind.as_bytes()].iter().chain(parts) {
        // Lengths keep the parts apart: no two lists of parts hash the same bytes.
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    format!("login:{kind}:{}", URL_SAFE_NO_PAD.encode(&hash.finalize()[..18]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::login::tests::FakeStore;

    fn limits(per_account_and_network: u32, per_account: u32, per_network: u32) -> model::Throttle {
        model::Throttle { per_account_and_network, per_account, per_network, ..model::Throttle::default() }
    }

    fn throttle(config: model::Throttle) -> (Throttle, Arc<FakeStore>) {
        let store = Arc::new(FakeStore::default());
        (Throttle::new(Arc::clone(&store) as Arc<dyn SessionStore>, config), store)
    }

    impl Throttle {
        /// `None` when throttled.
        async fn try_as(&self, user: &str, client: &str) -> Option<CountedAttempt> {
            let user = UserName::parse(user).unwrap();
            match self.attempt(&user, client.parse().unwrap()).await.unwrap() {
                Verdict::Allowed(attempt) => Some(attempt),
                Verdict::Throttled(wait) => {
                    assert!(wait <= self.config.window.get(), "nobody waits for longer than the window");
                    None
                }
            }
        }
    }

    #[tokio::test]
    async fn many_passwords_for_one_account_are_stopped() {
        let (throttle, _) = throttle(limits(3, 100, 100));
        for _ in 0..3 {
            assert!(throttle.try_as("alice", "192.0.2.1").await.is_some());
        }
        for spelling in ["alice", "Alice", "ALICE", " alice ", "alice\t"] {
            let answer = UserName::parse(spelling);
            if answer.is_some() {
                assert!(throttle.try_as(spelling, "192.0.2.1").await.is_none(), "{spelling:?} is the same account");
            }
        }
        assert!(throttle.try_as("alice", "::ffff:192.0.2.1").await.is_none(), "the same address in IPv6 dress");
        assert!(throttle.try_as("alice", "192.0.2.2").await.is_some(), "another network is not concerned");
        assert!(throttle.try_as("bob", "192.0.2.1").await.is_some(), "another account is not concerned");
    }

    #[tokio::test]
    async fn many_accounts_from_one_network_are_stopped_and_successes_do_not_count() {
        let (throttle, store) = throttle(limits(10, 100, 3));
        for turn in 0..20 {
            let attempt = throttle.try_as(&format!("user{turn}"), "2001:db8::1").await;
            throttle.succeeded(attempt.expect("an office may log in at nine o'clock")).await.unwrap();
        }
        for turn in 0..3 {
            assert!(throttle.try_as(&format!("name{turn}"), &format!("2001:db8::{turn}")).await.is_some());
        }
        let counters = store.counters();
        for turn in 0..20 {
            assert!(
                throttle.try_as(&format!("fresh{turn}"), "2001:db8::ffff").await.is_none(),
                "the /64 is one network"
            );
        }
        assert_eq!(store.counters(), counters, "throttled names leave nothing in the store");
        assert!(throttle.try_as("name", "2001:db8:0:1::1").await.is_some(), "the next /64 is another");
    }

    #[tokio::test]
    async fn a_user_under_attack_from_everywhere_gets_in_from_where_she_is_known() {
        let (throttle, _) = throttle(limits(2, 5, 100));
        let home = throttle.try_as("alice", "192.0.2.1").await.unwrap();
        throttle.succeeded(home).await.unwrap();

        let mut allowed = 0;
        for host in 0..50 {
            allowed += usize::from(throttle.try_as("alice", &format!("198.51.100.{host}")).await.is_some());
        }
        assert_eq!(allowed, 4, "five strange attempts, one of which was her own first");
        assert!(throttle.try_as("alice", "192.0.2.1").await.is_some(), "her own network stays open");
    }

    #[tokio::test]
    async fn one_network_cannot_use_up_what_an_account_has_for_all() {
        let (throttle, _) = throttle(limits(2, 5, 100));
        for _ in 0..50 {
            let _ = throttle.try_as("alice", "198.51.100.1").await;
        }
        assert!(throttle.try_as("alice", "192.0.2.1").await.is_some());
    }

    #[tokio::test]
    async fn a_success_gives_the_account_its_attempts_back() {
        let (throttle, _) = throttle(limits(3, 100, 100));
        for _ in 0..10 {
            let _ = throttle.try_as("alice", "192.0.2.1").await.expect("mistyped once, then right");
            let attempt = throttle.try_as("alice", "192.0.2.1").await.unwrap();
            throttle.succeeded(attempt).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_attempt_that_came_to_nothing_counts_for_nothing() {
        let (throttle, store) = throttle(limits(3, 3, 3));
        for _ in 0..20 {
            let attempt = throttle.try_as("alice", "192.0.2.1").await.expect("what was taken back was never counted");
            throttle.take_back(attempt).await;
        }
        let user = UserName::parse("alice").unwrap();
        let calls_of_an_attempt = 4;
        for turn in 0..20 {
            store.fail_once_after(turn % calls_of_an_attempt);
            let answer = throttle.attempt(&user, "192.0.2.1".parse().unwrap()).await;
            assert!(answer.is_err(), "the store failed midway");
        }
        let calls_of_a_success = 4;
        for turn in 0..calls_of_a_success {
            let attempt = throttle.try_as("alice", &format!("192.0.2.{turn}")).await.expect("nothing was counted");
            store.fail_once_after(turn);
            assert!(throttle.succeeded(attempt).await.is_err());
        }
        for _ in 0..3 {
            assert!(throttle.try_as("alice", "192.0.2.1").await.is_some(), "all attempts are left");
        }
        assert!(throttle.try_as("alice", "192.0.2.1").await.is_none());
    }

    #[tokio::test]
    async fn a_dead_store_lets_nobody_guess() {
        let (throttle, store) = throttle(limits(3, 100, 100));
        store.set_down(true);
        let user = UserName::parse("alice").unwrap();
        assert!(throttle.attempt(&user, "192.0.2.1".parse().unwrap()).await.is_err());
    }

    #[test]
    fn counters_are_apart_and_name_nobody() {
        let of = |user: &str, client: &str| Counters::of(&UserName::parse(user).unwrap(), client.parse().unwrap());
        let (one, other) = (of("alice", "192.0.2.1"), of("alice1", "92.0.2.1"));
        let names = [&one, &other].map(|counters| {
            let Counters { network, account_and_network, account, known } = counters;
            [network, account_and_network, account, known].map(String::clone)
        });
        let all: std::collections::BTreeSet<String> = names.concat().into_iter().collect();
        assert_eq!(all.len(), 8, "no two counters share a name");
        assert!(all.iter().all(|name| !name.contains("alice") && !name.contains("192")), "{all:?}");
    }
}
