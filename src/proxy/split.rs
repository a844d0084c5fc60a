//! Whom does a split take? Users of some groups, and of all others a share that is always the same.
//!
//! A user's place in a split is a function of the two names and of nothing else (see [`place`]): so all instances agree,
//! before and after a restart, and nothing has to be kept. Who raises the percentage keeps who is in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use sha2::{Digest, Sha256};

use crate::config::model;
use crate::config::value::Percent;
use crate::identity::Identity;

/// `[split.NAME]`, with the percentage of this moment.
#[derive(Debug)]
pub struct Split {
    name: String,
    groups: Vec<String>,
    configured: Percent,
    /// In hundredths of a percent. The same across reloads, as long as the file says the same.
    current: Arc<AtomicU16>,
}

impl Split {
    /// What was set at run time stays, unless the file says something else than it did for `previous`.
    pub fn new(name: &str, config: &model::Split, previous: Option<&Self>) -> Self {
        let configured = config.percent.unwrap_or_default();
        let kept = previous.filter(|split| split.configured == configured).map(|split| Arc::clone(&split.current));
        let current = kept.unwrap_or_else(|| Arc::new(AtomicU16::new(configured.basis_points())));
        Self { name: name.to_owned(), groups: config.groups.clone(), configured, current }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// All users of these are in it.
    pub fn groups(&self) -> &[String] {
        &self.groups
    }

    /// As in the file.
    pub fn configured(&self) -> Percent {
        self.configured
    }

    pub fn percent(&self) -> Percent {
        Percent::of_basis_points(self.current.load(Ordering::Relaxed))
    }

    /// From now on, until the file says something new. Gives what it was before.
    pub fn set(&self, percent: Percent) -> Percent {
        Percent::of_basis_points(self.current.swap(percent.basis_points(), Ordering::Relaxed))
    }

    /// Whether there is anybody whom it may take: on a public route, where nobody looks who it is, only 100 % takes.
    pub fn takes_some(&self, is_public: bool) -> bool {
        let percent = self.percent();
        percent == Percent::ALL || (!is_public && (percent != Percent::default() || !self.groups.is_empty()))
    }

    pub fn takes_all(&self) -> bool {
        self.percent() == Percent::ALL
    }

    /// Nobody has no place, and is taken only where all are.
    pub fn takes(&self, user: Option<&Identity>) -> bool {
        let percent = self.percent();
        if percent == Percent::ALL {
            return true;
        }
        let Some(user) = user else { return false };
        user.groups.iter().any(|group| self.groups.contains(group))
            || (percent != Percent::default() && place(&self.name, &user.user) < percent.basis_points())
    }
}

/// A user's place in a split, from 0 to 9999; in it are those whose place is below its percentage, in hundredths of a
/// percent.
///
/// The first eight bytes of the SHA-256 of the split's name, a zero byte and the user's name, as a big-endian number, modulo
/// 10 000. The book tells it so that others can compute it, too: it must never change.
pub fn place(split: &str, user: &str) -> u16 {
    let digest = Sha256::new().chain_update(split).chain_update([0]).chain_update(user).finalize();
    let number = digest.iter().take(8).fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    (number % PLACES) as u16
}

const PLACES: u64 = Percent::ALL.basis_points() as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[rustfmt::skip]
    const PLACES_FOR_EVER: [(&str, &str, u16); 6] = [
        ("next", "ann", 6_650),
        ("next", "bob", 5_883),
        ("other", "ann", 5_249),
        ("next", "Zoë", 3_271),
        ("next", "https://idp.example/alice", 1_015),
        ("next", "", 1_122),
    ];
    const USERS: usize = 2_000;

    fn split(name: &str, keys: &str) -> Split {
        Split::new(name, &toml::from_str(keys).unwrap(), None)
    }

    fn users() -> impl Iterator<Item = Identity> {
        (0..USERS).map(|number| Identity { user: format!("user-{number}"), ..Identity::default() })
    }

    /// Which of the [`users`] are in it.
    fn taken(split: &Split) -> Vec<bool> {
        users().map(|user| split.takes(Some(&user))).collect()
    }

    /// Computed by `printf 'next\0ann' | sha256sum`, the first sixteen digits modulo 10 000.
    #[test]
    fn a_place_never_changes() {
        for (split, user, expected) in PLACES_FOR_EVER {
            assert_eq!(place(split, user), expected, "{split} {user}");
        }
    }

    #[test]
    fn every_percentage_keeps_who_was_in_a_smaller_one() {
        let next = split("next", "percent = 0");
        let mut before = taken(&next);
        assert!(!before.contains(&true), "0 is nobody");
        for percent in ["0.01", "0.5", "1", "5", "10", "33.33", "50", "99.99", "100"] {
            next.set(percent.parse().unwrap());
            let now = taken(&next);
            assert!(before.iter().zip(&now).all(|(before, now)| *now || !*before), "{percent} keeps all of them");
            before = now;
        }
        assert!(!before.contains(&false), "100 is everybody");
    }

    #[test]
    fn a_share_is_about_as_large_as_it_says() {
        for (percent, expected) in [(5, 64..=136), (50, 888..=1_112)] {
            // Four standard deviations; the hash is fixed, so that this is so for ever.
            let count = taken(&split("next", &format!("percent = {percent}"))).iter().filter(|taken| **taken).count();
            assert!(expected.contains(&count), "{percent} %: {count} of {USERS}");
        }
    }

    #[test]
    fn splits_of_other_names_take_others() {
        let [one, other] = ["next", "other"].map(|name| taken(&split(name, "percent = 50")));
        let both = one.iter().zip(&other).filter(|(one, other)| **one && **other).count();
        assert!((422..=578).contains(&both), "{both} of {USERS} are in both: a quarter, within four deviations");
    }

    #[test]
    fn groups_and_the_share_of_the_others_are_taken() {
        let beta = Identity { user: "ann".into(), groups: vec!["staff".into(), "beta".into()], ..Identity::default() };
        let staff = Identity { user: "ann".into(), groups: vec!["staff".into()], ..Identity::default() };
        for (keys, beta_is_in, staff_is_in, nobody_is_in) in [
            ("groups = [\"beta\"]", true, false, false),
            ("groups = [\"beta\"]\npercent = 0", true, false, false),
            ("groups = [\"Beta\", \"bet\"]", false, false, false),
            ("groups = [\"beta\"]\npercent = 100", true, true, true),
            ("percent = 0", false, false, false),
            ("percent = 99.99", true, true, false),
            ("percent = 100", true, true, true),
        ] {
            let split = split("next", keys);
            let taken = [Some(&beta), Some(&staff), None].map(|user| split.takes(user));
            assert_eq!(taken, [beta_is_in, staff_is_in, nobody_is_in], "{keys}");
        }
    }
}
