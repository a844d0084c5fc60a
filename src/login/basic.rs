//! Which script is this? HTTP Basic (RFC 7617) against the users file, on routes that allow it; it makes no session.
//!
//! Credentials that were right are remembered for a minute, so that a script pays for a password hash once and not with
//! every request: under an HMAC whose key is this process's alone, so that memory holds no password, and nobody can choose
//! what collides. A reload forgets them with the rest of the [`Login`], so that who is disabled is out at once. Requests
//! that come with the same credentials at the same time take turns: the first one asks, the others find its answer.
//!
//! Browsers are left out: they send credentials that they once learned along with whatever another site makes them
//! ask for. What has `Sec-Fetch-Site` comes from a browser.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hmac::{Hmac, KeyInit, Mac};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use parking_lot::Mutex;
use sha2::Sha256;

use super::hash::PASSWORD_BYTES_MAX;
use super::password::Answer;
use super::users::UserName;
use super::{Failure, Login};
use crate::audit::LoginAttempt;
use crate::config::model;
use crate::identity::Known;

/// Who a request without a session is, by its credentials.
#[derive(Debug)]
pub enum Script {
    /// It brought none of this scheme, or is a browser's.
    Nobody,
    User(Arc<Known>),
    /// It brought some, and they are not right; perhaps not looked at, and worth another try after this long.
    Refused(Option<Duration>),
    /// Nobody can say now.
    Unknown,
}

/// Login by a field of each request.
pub(super) struct BasicLogin {
    challenge: HeaderValue,
    key: [u8; 32],
    remembered: Mutex<HashMap<Fingerprint, Remembered>>,
    /// Of credentials that are being looked at.
    turns: Mutex<HashMap<Fingerprint, Arc<tokio::sync::Mutex<()>>>>,
}

struct Remembered {
    user: Arc<Known>,
    until: Instant,
}

/// Names credentials, and tells nothing of them.
type Fingerprint = [u8; 32];

struct Credentials {
    name: UserName,
    password: String,
}

/// One of those who ask with the same credentials.
struct Turn<'b> {
    basic: &'b BasicLogin,
    fingerprint: Fingerprint,
    lock: Arc<tokio::sync::Mutex<()>>,
}

const REMEMBERED_FOR: Duration = Duration::from_secs(60);
const REMEMBERED_MAX: usize = 1_000;

impl Login {
    /// Whether the request names the scheme: then its `Authorization` is for us, and for no backend.
    pub fn is_basic(headers: &HeaderMap) -> bool {
        headers.get_all(AUTHORIZATION).iter().any(|value| after_scheme(value).is_some())
    }

    /// What a 401 says to a script (RFC 9110, section 11.6.1). None for a browser, which would open a dialog of its own.
    pub fn basic_challenge(&self, headers: &HeaderMap) -> Option<&HeaderValue> {
        let is_script = !is_browser(headers) && !headers.contains_key("x-requested-with");
        self.basic.as_ref().map(|basic| &basic.challenge).filter(|_| is_script)
    }

    /// Throttled as logins are. Right credentials count as an attempt once a minute, whoever sends them however often.
    pub async fn script(&self, headers: &HeaderMap, client: IpAddr) -> Script {
        if !Self::is_basic(headers) || is_browser(headers) {
            return Script::Nobody;
        }
        let (Some(basic), Some(password_login)) = (&self.basic, &self.password) else { return Script::Nobody };
        let Some(Credentials { name, password }) = Credentials::of(headers) else { return Script::Refused(None) };
        let fingerprint = basic.fingerprint(&name, &password);
        if let Some(user) = basic.recall(&fingerprint, Instant::now()) {
            return Script::User(user);
        }
        let turn = basic.turn(fingerprint);
        let _alone = turn.lock.lock().await;
        if let Some(user) = basic.recall(&fingerprint, Instant::now()) {
            return Script::User(user);
        }
        match password_login.check(&self.users, &name, password, client).await {
            Ok(answer) => {
                let attempt = LoginAttempt::without_session("basic", client, answer.label());
                self.note_attempt(LoginAttempt { user: self.known_name(&name), ..attempt });
                match answer {
                    Answer::Welcome(user) => {
                        basic.remember(fingerprint, Arc::clone(&user), Instant::now());
                        Script::User(user)
                    }
                    Answer::Wrong | Answer::Disabled | Answer::Unknown => Script::Refused(None),
                    Answer::Throttled(wait) => Script::Refused(Some(wait)),
                }
            }
            Err(failure) => {
                self.note(&failure);
                self.note_attempt(LoginAttempt::without_session("basic", client, failure.label()));
                match failure {
                    Failure::TooManyGuesses(wait) => Script::Refused(Some(wait)),
                    Failure::Store(_) | Failure::Busy | Failure::Random(_) | Failure::Provider(_) => Script::Unknown,
                }
            }
        }
    }
}

impl BasicLogin {
    /// `config` is valid: the realm fits into a field.
    pub(super) fn new(config: &model::BasicLogin) -> Self {
        let challenge = format!("Basic realm=\"{}\", charset=\"UTF-8\"", config.realm.get_ref());
        let challenge = HeaderValue::try_from(challenge).unwrap_or_else(|_| HeaderValue::from_static("Basic"));
        Self { challenge, key: rand::random(), remembered: Mutex::default(), turns: Mutex::default() }
    }

    fn fingerprint(&self, name: &UserName, password: &str) -> Fingerprint {
        let name = name.as_str().as_bytes();
        let mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes a key of any length");
        // The length keeps the two apart: no two pairs give the same message.
        let mac = mac.chain_update((name.len() as u64).to_be_bytes()).chain_update(name).chain_update(password);
        mac.finalize().into_bytes().into()
    }

    fn recall(&self, fingerprint: &Fingerprint, now: Instant) -> Option<Arc<Known>> {
        let remembered = self.remembered.lock();
        remembered.get(fingerprint).filter(|remembered| now < remembered.until).map(|found| Arc::clone(&found.user))
    }

    fn remember(&self, fingerprint: Fingerprint, user: Arc<Known>, now: Instant) {
        let mut remembered = self.remembered.lock();
        if REMEMBERED_MAX <= remembered.len() {
            remembered.retain(|_, remembered| now < remembered.until);
        }
        if REMEMBERED_MAX <= remembered.len() {
            let oldest = remembered.iter().min_by_key(|(_, remembered)| remembered.until).map(|(oldest, _)| *oldest);
            oldest.map(|oldest| remembered.remove(&oldest));
        }
        remembered.insert(fingerprint, Remembered { user, until: now + REMEMBERED_FOR });
    }

    fn turn(&self, fingerprint: Fingerprint) -> Turn<'_> {
        let lock = Arc::clone(self.turns.lock().entry(fingerprint).or_default());
        Turn { basic: self, fingerprint, lock }
    }
}

impl Drop for Turn<'_> {
    /// The last one leaves nothing behind.
    fn drop(&mut self) {
        let mut turns = self.basic.turns.lock();
        // Ours and that of the map; others are only made under its lock.
        if Arc::strong_count(&self.lock) <= 2 {
            turns.remove(&self.fingerprint);
        }
    }
}

impl Credentials {
    /// One field, `Basic` and base64 of `name:password` in UTF-8; nothing else.
    fn of(headers: &HeaderMap) -> Option<Self> {
        /// Scripts forget the padding, and nothing depends on it.
        const BASE64: GeneralPurpose = GeneralPurpose::new(
            &STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        let mut fields = headers.get_all(AUTHORIZATION).iter();
        let (Some(field), None) = (fields.next(), fields.next()) else { return None };
        let text = String::from_utf8(BASE64.decode(after_scheme(field)?.trim_ascii()).ok()?).ok()?;
        let (name, password) = text.split_once(':')?;
        // RFC 7617, section 2: no control characters in either.
        if PASSWORD_BYTES_MAX < password.len() || text.contains(char::is_control) {
            return None;
        }
        Some(Self { name: UserName::parse(name)?, password: password.to_owned() })
    }
}

/// What follows `Basic`, in any case (RFC 9110, section 11.1).
fn after_scheme(field: &HeaderValue) -> Option<&[u8]> {
    let bytes = field.as_bytes().trim_ascii();
    let (scheme, rest) = bytes.split_at_checked("basic".len())?;
    let is_whole_word = rest.first().is_none_or(|byte| !byte.is_ascii_alphanumeric() && *byte != b'-');
    (scheme.eq_ignore_ascii_case(b"basic") && is_whole_word).then_some(rest)
}

fn is_browser(headers: &HeaderMap) -> bool {
    headers.contains_key("sec-fetch-site")
}

impl std::fmt::Debug for BasicLogin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BasicLogin")
    }
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose;

    use super::*;
    use crate::identity::Identity;

    fn headers(fields: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(AUTHORIZATION, HeaderValue::from_str(field).unwrap());
        }
        headers
    }

    fn basic() -> BasicLogin {
        BasicLogin::new(&model::BasicLogin::default())
    }

    fn user(name: &str) -> Arc<Known> {
        Arc::new(Known::new(Identity { user: name.to_owned(), ..Identity::default() }))
    }

    #[test]
    fn credentials_are_read_as_the_rfc_has_them_and_in_no_other_way() {
        let encoded = |text: &str| general_purpose::STANDARD.encode(text);
        let read = |fields: &[&str]| Credentials::of(&headers(fields)).map(|read| (read.name, read.password));
        // The examples of RFC 7617, sections 2 and 2.1.
        for (field, name, password) in [
            ("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", "Aladdin", "open sesame"),
            ("Basic dGVzdDoxMjPCow==", "test", "123\u{a3}"),
            ("basic dGVzdDoxMjPCow", "test", "123\u{a3}"),
            ("BASIC   dGVzdDoxMjPCow==", "test", "123\u{a3}"),
            (&format!("Basic {}", encoded("a:b:c")), "a", "b:c"),
            (&format!("Basic {}", encoded("a:")), "a", ""),
        ] {
            assert_eq!(read(&[field]), Some((UserName::parse(name).unwrap(), password.to_owned())), "{field}");
        }
        let right = format!("Basic {}", encoded("a:b"));
        let right = right.as_str();
        for fields in [
            &[][..],
            &[right, right],
            &[right, "Bearer x"],
            &["Bearer x"],
            &["Basic"],
            &["Basic "],
            &["Basic !!!"],
            &[&format!("Basic{}", encoded("a:b"))],
            &[&format!("Basic {}", encoded("ab"))],
            &[&format!("Basic {}", encoded(":b"))],
            &[&format!("Basic {}", encoded("a\n:b"))],
            &[&format!("Basic {}", encoded("a:b\0"))],
            &[&format!("Basic {}", encoded(&format!("a:{}", "b".repeat(PASSWORD_BYTES_MAX + 1))))],
            &[&format!("Basic {}", general_purpose::STANDARD.encode(b"a:\xff"))],
        ] {
            assert!(read(fields).is_none(), "{fields:?}");
        }
    }

    #[test]
    fn whose_field_it_is_shows_before_anything_is_read() {
        for (field, expected) in [
            ("Basic QQ==", true),
            ("bAsIc QQ==", true),
            ("Basic", true),
            ("Basic\tQQ==", true),
            ("  Basic QQ==", true),
            ("Basic:QQ==", true),
            ("Basics QQ==", false),
            ("Basic2 QQ==", false),
            ("Bearer Basic", false),
            ("", false),
        ] {
            assert_eq!(Login::is_basic(&headers(&[field])), expected, "{field:?}");
        }
        assert!(Login::is_basic(&headers(&["Bearer x", "Basic QQ=="])), "wherever it stands");
    }

    #[test]
    fn what_was_right_is_known_for_a_minute_and_no_longer() {
        let basic = basic();
        let fingerprint = |name, password| basic.fingerprint(&UserName::parse(name).unwrap(), password);
        let right = fingerprint("ann", "secret");
        let now = Instant::now();
        basic.remember(right, user("ann"), now);
        assert!(basic.recall(&right, now + Duration::from_secs(59)).is_some());
        assert!(basic.recall(&right, now + Duration::from_secs(60)).is_none());
        for other in [fingerprint("ann", "Secret"), fingerprint("anns", "ecret"), fingerprint("an", "nsecret")] {
            assert!(basic.recall(&other, now).is_none());
        }
        let another = self::basic().fingerprint(&UserName::parse("ann").unwrap(), "secret");
        assert_ne!(another, right, "each process has a key of its own");
    }

    #[test]
    fn memory_has_a_limit_and_the_oldest_go_first() {
        let basic = basic();
        let (now, known) = (Instant::now(), user("ann"));
        let fingerprint = |number: usize| {
            let mut fingerprint = [0; 32];
            fingerprint[..8].copy_from_slice(&number.to_be_bytes());
            fingerprint
        };
        for number in 0..REMEMBERED_MAX + 10 {
            basic.remember(fingerprint(number), Arc::clone(&known), now + Duration::from_millis(number as u64));
        }
        assert_eq!(basic.remembered.lock().len(), REMEMBERED_MAX);
        assert!(basic.recall(&fingerprint(9), now).is_none() && basic.recall(&fingerprint(10), now).is_some());
    }

    #[test]
    fn who_took_a_turn_leaves_nothing_behind() {
        let basic = basic();
        let (first, second) = (basic.turn([1; 32]), basic.turn([1; 32]));
        assert!(Arc::ptr_eq(&first.lock, &second.lock), "the same credentials wait for each other");
        drop(first);
        assert_eq!(basic.turns.lock().len(), 1);
        drop(second);
        assert_eq!(basic.turns.lock().len(), 0);
    }
}
