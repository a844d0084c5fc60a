//! Who is this, while the store is down? A second cookie, sealed by us, says it for some minutes.
//!
//! It is made for one session and counts only beside that session's cookie, only while the store is known to be down, and
//! not for longer than `session.fallback.lifetime` after it was issued. What it cannot know is a logout on another
//! instance within that time: that is what whoever switches it on accepts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::id::SessionKey;
use super::record::{ClientHints, LoginMethod, Record};
use super::seal::{KeyRing, Purpose};
use crate::identity::Identity;

/// Makes and reads the cookie's value.
#[derive(Clone, Debug)]
pub(super) struct Fallback {
    ring: Arc<KeyRing>,
    lifetime: Duration,
}

/// What is in it. The seal binds it to its session, which therefore is not named.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Carried {
    identity: Identity,
    method: LoginMethod,
    /// Unix time in ms, by the clock of the instance that issued it.
    issued: u64,
    expires: u64,
}

/// Browsers keep no more than 4096 bytes of a cookie, with its name and all (RFC 6265, section 6.1).
const VALUE_BYTES_MAX: usize = 3_800;
/// Clocks of instances may differ by so much.
const SKEW: Duration = Duration::from_secs(60);

impl Fallback {
    pub(super) fn new(ring: Arc<KeyRing>, lifetime: Duration) -> Self {
        Self { ring, lifetime }
    }

    pub(super) fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// A value for this session, which ends at `ends` (Unix time in ms) if nobody uses it, unless the browser's has more
    /// than half of its life before it. None also for an identity that fits into no cookie.
    pub(super) fn renewed(
        &self,
        key: &SessionKey,
        record: &Record,
        ends: u64,
        current: Option<&[u8]>,
        now: u64,
    ) -> Option<String> {
        let half = |carried: &Carried| self.lives_until(carried).saturating_sub(carried.issued) / 2;
        let is_fresh = |carried: &Carried| now < carried.issued.saturating_add(half(carried));
        if current.and_then(|value| self.carried(key, value, now)).is_some_and(|carried| is_fresh(&carried)) {
            return None;
        }
        let identity = match record.method {
            // The users file says the rest.
            LoginMethod::Password => Identity { user: record.identity.user.clone(), ..Identity::default() },
            LoginMethod::Oidc | LoginMethod::Backend => record.identity.clone(),
            // It has nobody to say anything of.
            LoginMethod::Anonymous => return None,
        };
        let expires = now.saturating_add(millis(self.lifetime)).min(ends);
        let plain = rmp_serde::to_vec(&Carried { identity, method: record.method, issued: now, expires }).ok()?;
        let sealed = self.ring.seal(Purpose::Fallback, key, &plain).ok()?;
        Some(URL_SAFE_NO_PAD.encode(sealed)).filter(|value| value.len() <= VALUE_BYTES_MAX)
    }

    /// What a value says of this session, as far as it says anything now.
    pub(super) fn open(&self, key: &SessionKey, value: &[u8], now: u64) -> Option<Record> {
        let Carried { identity, method, issued, expires } = self.carried(key, value, now)?;
        Some(Record {
            identity,
            attributes: BTreeMap::new(),
            created: issued,
            ends: expires,
            method,
            client: ClientHints { address: None, user_agent: String::new() },
            secrets: None,
            login: None,
            known: Default::default(),
        })
    }

    fn carried(&self, key: &SessionKey, value: &[u8], now: u64) -> Option<Carried> {
        if VALUE_BYTES_MAX < value.len() {
            return None;
        }
        let sealed = URL_SAFE_NO_PAD.decode(value).ok()?;
        let plain = self.ring.open(Purpose::Fallback, key, &sealed).ok()?;
        let carried: Carried = rmp_serde::from_slice(&plain).ok()?;
        let is_of_the_future = now.saturating_add(millis(SKEW)) < carried.issued;
        (now < self.lives_until(&carried) && !is_of_the_future).then_some(carried)
    }

    /// By the lifetime of now: when it was made shorter, that counts for what is out there, too.
    fn lives_until(&self, carried: &Carried) -> u64 {
        carried.expires.min(carried.issued.saturating_add(millis(self.lifetime)))
    }
}

/// Unix time in ms.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(millis).unwrap_or_default()
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::id::SessionId;
    use crate::session::seal::tests::{ONE, TWO, ring};

    const MINUTE: u64 = 60_000;
    const START: u64 = 1_800_000_000_000;

    fn fallback(keys: &[&str], minutes: u64) -> Fallback {
        Fallback::new(Arc::new(ring(keys)), Duration::from_millis(minutes * MINUTE))
    }

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    fn record() -> Record {
        Record {
            identity: Identity { user: "ann".into(), groups: vec!["staff".into()], ..Identity::default() },
            attributes: BTreeMap::new(),
            created: START,
            ends: u64::MAX,
            method: LoginMethod::Password,
            client: ClientHints { address: None, user_agent: String::new() },
            secrets: None,
            login: None,
            known: Default::default(),
        }
    }

    #[test]
    fn it_says_who_has_a_session_for_its_life_and_for_that_session_alone() {
        let (fallback, mine) = (fallback(&[ONE], 5), key());
        let value = fallback.renewed(&mine, &record(), u64::MAX, None, START).unwrap();
        let user = |fallback: &Fallback, key: &SessionKey, value: &str, now| {
            fallback.open(key, value.as_bytes(), now).map(|record| record.identity.user)
        };
        let ann = Some("ann".to_owned());
        let cases = [
            ("at once", &mine, value.clone(), START, ann.clone()),
            ("to its end", &mine, value.clone(), START + 5 * MINUTE - 1, ann.clone()),
            ("at its end", &mine, value.clone(), START + 5 * MINUTE, None),
            ("on a clock that is a little behind", &mine, value.clone(), START - MINUTE, ann.clone()),
            ("from the future", &mine, value.clone(), START - MINUTE - 1, None),
            ("beside another session", &key(), value.clone(), START, None),
            ("cut", &mine, value[1..].to_owned(), START, None),
            ("longer", &mine, format!("{value}A"), START, None),
            ("empty", &mine, String::new(), START, None),
            ("no base64", &mine, format!("{}=", &value[1..]), START, None),
            ("endless", &mine, "A".repeat(VALUE_BYTES_MAX + 1), START, None),
        ];
        for (what, key, value, now, expected) in cases {
            assert_eq!(user(&fallback, key, &value, now), expected, "{what}");
        }
        assert_eq!(user(&self::fallback(&[TWO], 5), &mine, &value, START), None, "sealed with a key of somebody else");
        assert_eq!(user(&self::fallback(&[TWO, ONE], 5), &mine, &value, START), ann, "rotated");
        assert_eq!(user(&self::fallback(&[ONE], 1), &mine, &value, START + MINUTE), None, "made shorter since");
        let opened = fallback.open(&mine, value.as_bytes(), START).unwrap();
        assert!(opened.identity.groups.is_empty(), "of a user of the users file it carries the name alone");
    }

    #[test]
    fn it_is_renewed_when_half_of_its_life_is_over() {
        let (fallback, mine, session) = (fallback(&[ONE], 5), key(), record());
        let value = fallback.renewed(&mine, &session, u64::MAX, None, START).unwrap();
        let due = |value: &str, now| fallback.renewed(&mine, &session, u64::MAX, Some(value.as_bytes()), now).is_some();
        assert!(!due(&value, START + 150_000 - 1));
        assert!(due(&value, START + 150_000));
        assert!(due(&value, START + 20 * MINUTE));
        assert!(due("nonsense", START));
        let short = fallback.renewed(&mine, &session, START + MINUTE, None, START).unwrap();
        assert!(!due(&short, START + MINUTE / 2 - 1) && due(&short, START + MINUTE / 2), "of its own life");
        let other = fallback.renewed(&key(), &session, u64::MAX, None, START).unwrap();
        assert!(due(&other, START), "another session's is none");
    }

    #[test]
    fn it_never_outlives_its_session_and_fits_into_a_cookie() {
        let (fallback, mine) = (fallback(&[ONE], 5), key());
        let value = fallback.renewed(&mine, &record(), START + MINUTE, None, START).unwrap();
        assert!(fallback.open(&mine, value.as_bytes(), START + MINUTE - 1).is_some());
        assert!(fallback.open(&mine, value.as_bytes(), START + MINUTE).is_none());
        let mut long = record();
        long.identity.user = "a".repeat(VALUE_BYTES_MAX);
        assert_eq!(fallback.renewed(&mine, &long, u64::MAX, None, START), None);
    }
}
