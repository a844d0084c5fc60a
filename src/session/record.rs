//! What the store keeps of a session: versioned MessagePack that other services may read.
//!
//! The first byte is the version of the layout. The rest is one MessagePack array, in this order:
//!
//! | # | field        | type                                                                             |
//! |---|--------------|----------------------------------------------------------------------------------|
//! | 0 | `identity`   | array of 5: user str, name str or nil, email str or nil, groups array of str, claims map of str to str |
//! | 1 | `attributes` | map of str to str; in version 3 to array of 2: value str, its end as Unix time in ms or nil |
//! | 2 | `created`    | uint, Unix time in ms, by the store's clock                                      |
//! | 3 | `ends`       | uint, Unix time in ms: the absolute end, however much the session is used        |
//! | 4 | `method`     | str: `"Password"`; from version 3 on also `"Oidc"`, `"Backend"`, `"Anonymous"`   |
//! | 5 | `client`     | array of 2: address nil or map of one (`"V4"` or `"V6"` to an array of 4 or 16 bytes), user agent str |
//! | 6 | `secrets`    | from version 2 on: bin, [sealed](super::seal) under a key that the session's id opens; in version 3 or nil |
//! | 7 | `login`      | only in version 3: nil or array of 7: provider str, issuer str, subject str, sid str or nil, auth_time uint (s) or nil, acr str or nil, access_ends uint (ms) or nil |
//!
//! Version 1 has six fields, version 2 has seven, version 3 has eight. A record is written in the lowest version that
//! can say what is in it, so that older Cloakrooms and other readers go on reading it. A first byte of 129 says that
//! the rest is a whole record of one of these versions, sealed under the key ring (`session.seal_records`). Byte 0 is
//! never a record: stores keep there why a session ended.
//!
//! A session lives as long as its key does: a reader has to look at nothing but whether the key is there.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;
use http::header::USER_AGENT;
use parking_lot::Mutex;
use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::SessionKey;
use super::seal::{KeyRing, Purpose, SEAL_BYTES, SealError, key_of};
use super::store::StoreError;
use crate::config::model::SealRecords;
use crate::identity::{Identity, Known};

/// One session at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Of an anonymous session the user is a random name, which nobody has: see [`LoginMethod::Anonymous`].
    pub identity: Identity,
    /// What backends noted; for reading see [`Record::attributes_at`].
    pub attributes: BTreeMap<String, Attribute>,
    /// Unix time in ms, by the store's clock.
    pub created: u64,
    /// The absolute end, Unix time in ms, by the store's clock.
    pub ends: u64,
    pub method: LoginMethod,
    pub client: ClientHints,
    /// What only the holder of the id can open.
    pub secrets: Option<Sealed>,
    /// Where somebody else said who this is.
    pub login: Option<ExternalLogin>,
    pub known: Memo,
}

/// What a backend noted in a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute {
    pub value: String,
    /// Unix time in ms; without, it ends with its session.
    pub ends: Option<u64>,
}

/// A login at an identity provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalLogin {
    /// Its name in our configuration.
    pub provider: String,
    pub issuer: String,
    pub subject: String,
    /// What the provider calls its own session.
    pub sid: Option<String>,
    /// When the user proved who they are, Unix time in s.
    pub auth_time: Option<u64>,
    /// How well they proved it.
    pub acr: Option<String>,
    /// When the access token among the secrets ends, Unix time in ms.
    pub access_ends: Option<u64>,
}

/// Who the session's user is now, worked out once per copy of a record and configuration. No part of the record.
#[derive(Default)]
pub struct Memo(Mutex<Option<(u64, Option<Arc<Known>>)>>);

/// Encrypted bytes: see [`super::seal`].
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed(pub Vec<u8>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoginMethod {
    /// Against the users file, which says at each request what the user is called and may do.
    Password,
    /// An identity provider said who this is.
    Oidc,
    /// A backend said who this is.
    Backend,
    /// Nobody has logged in: the session has attributes and no user.
    Anonymous,
}

/// For the user's own list of devices; from the request that logged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientHints {
    pub address: Option<IpAddr>,
    pub user_agent: String,
}

impl ClientHints {
    /// `User-Agent` is kept up to 256 bytes.
    pub fn of(headers: &HeaderMap, address: IpAddr) -> Self {
        // `to_str` gives what is ASCII, and nothing else.
        let user_agent = headers.get(USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kept = user_agent.get(..USER_AGENT_BYTES_MAX).unwrap_or(user_agent);
        Self { address: Some(address), user_agent: kept.to_owned() }
    }
}

/// What browsers send is about 120 bytes; the rest is a client's idea of free storage.
const USER_AGENT_BYTES_MAX: usize = 256;

/// How records are written into a store and read from it. Clones share what they have said.
#[derive(Clone, Debug, Default)]
pub struct Codec {
    ring: Option<Arc<KeyRing>>,
    sealing: SealRecords,
    told: Arc<Mutex<BTreeSet<Cause>>>,
}

/// Why a record was not read, and the session, where this concerns one alone.
type Cause = (RecordError, Option<String>);

/// A record that cannot be written or read. Tells nothing of what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordError {
    /// Longer than [`RECORD_BYTES_MAX`].
    TooLarge,
    /// Written by a later Cloakroom than this one, with this layout.
    NewerVersion(u8),
    /// Not what [`Codec::encode`] writes.
    Malformed,
    /// Not sealed, where only sealed ones count (`session.seal_records = "only"`).
    Plain,
    Sealed(SealError),
}

/// A record is read on every request: one that is larger than this is a mistake.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;

const WITHOUT_SECRETS: u8 = 1;
const WITH_SECRETS: u8 = 2;
const WITH_ALL: u8 = 3;
/// Before a sealed record.
const SEALED: u8 = 129;
/// How MessagePack begins an array of so many.
const SIX_FIELDS: u8 = 0x96;
const SEVEN_FIELDS: u8 = 0x97;
const EIGHT_FIELDS: u8 = 0x98;
/// A record nests four deep; more is not a record.
const DEPTH_MAX: usize = 8;
/// Whoever can write into the store could invent keys without end.
const TOLD_MAX: usize = 512;

impl Codec {
    pub fn new(ring: Option<Arc<KeyRing>>, sealing: SealRecords) -> Self {
        Self { ring, sealing, told: Arc::default() }
    }

    /// `key`: under which it will be kept.
    pub fn encode(&self, record: &Record, key: &SessionKey) -> Result<Vec<u8>, RecordError> {
        let plain = record.encode()?;
        match (self.sealing, &self.ring) {
            (SealRecords::Off, _) => Ok(plain),
            (SealRecords::On | SealRecords::Only, None) => Err(RecordError::Sealed(SealError::UnknownKey([0; 4]))),
            (SealRecords::On | SealRecords::Only, Some(ring)) => {
                let mut bytes = ring.seal(Purpose::Record, key, &plain)?;
                bytes.insert(0, SEALED);
                Ok(bytes)
            }
        }
    }

    /// Sealed records are read whatever is written now. Of plain ones see [`SealRecords`].
    pub fn decode(&self, bytes: &[u8], key: &SessionKey) -> Result<Record, RecordError> {
        let Some((&SEALED, sealed)) = bytes.split_first() else {
            return match self.sealing {
                SealRecords::Off | SealRecords::On => Record::decode(bytes),
                // That it is newer is the better answer to what cannot be read anyway.
                SealRecords::Only => Record::decode(bytes).and(Err(RecordError::Plain)),
            };
        };
        if RECORD_BYTES_MAX + SEAL_BYTES < sealed.len() {
            return Err(RecordError::TooLarge);
        }
        match &self.ring {
            Some(ring) => Record::decode(&ring.open(Purpose::Record, key, sealed)?),
            None => Err(RecordError::Sealed(SealError::UnknownKey(key_of(sealed)?))),
        }
    }

    /// What a store answers when [`Self::decode`] failed. The log is told once and not once per request: of what concerns
    /// all sessions of a version or of a key that is gone, once for all.
    pub fn unreadable(&self, key: &SessionKey, error: RecordError) -> StoreError {
        let session = key.log_hash();
        let cause = match error {
            RecordError::NewerVersion(_) | RecordError::Plain | RecordError::Sealed(SealError::UnknownKey(_)) => None,
            RecordError::TooLarge | RecordError::Malformed => Some(session.clone()),
            RecordError::Sealed(SealError::Broken | SealError::NoRandom) => Some(session.clone()),
        };
        let concerns_many = cause.is_none();
        let mut told = self.told.lock();
        if told.len() < TOLD_MAX && told.insert((error, cause)) {
            tracing::error!(session, concerns_many, cause = %error, "stored session cannot be read; said once");
        }
        StoreError::Unreadable
    }
}

impl Record {
    /// The attributes that have not ended at this Unix time in ms, by name.
    pub fn attributes_at(&self, now: u64) -> impl Iterator<Item = (&str, &Attribute)> {
        let lives = move |attribute: &Attribute| attribute.ends.is_none_or(|ends| now < ends);
        self.attributes.iter().filter(move |(_, attribute)| lives(attribute)).map(|(name, held)| (name.as_str(), held))
    }

    /// The names by which somebody else can end this session: see [`ExternalLogin::handles`].
    pub fn handles(&self) -> Vec<String> {
        self.login.as_ref().map(ExternalLogin::handles).unwrap_or_default()
    }

    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let version = self.version();
        let mut bytes = vec![version];
        let Self { identity, attributes, created, ends, method, client, secrets, login, known: _ } = self;
        let texts = || attributes.iter().map(|(name, held)| (name, &held.value)).collect::<BTreeMap<_, _>>();
        let written = match version {
            WITHOUT_SECRETS => {
                rmp_serde::encode::write(&mut bytes, &(identity, texts(), created, ends, method, client))
            }
            WITH_SECRETS => {
                rmp_serde::encode::write(&mut bytes, &(identity, texts(), created, ends, method, client, secrets))
            }
            _ => {
                let fields = (identity, attributes, created, ends, method, client, secrets, login);
                rmp_serde::encode::write(&mut bytes, &fields)
            }
        };
        written.map_err(|_| RecordError::Malformed)?;
        if RECORD_BYTES_MAX < bytes.len() {
            return Err(RecordError::TooLarge);
        }
        Ok(bytes)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if RECORD_BYTES_MAX < bytes.len() {
            return Err(RecordError::TooLarge);
        }
        let (&version, body) = bytes.split_first().ok_or(RecordError::Malformed)?;
        match (version, body.first()) {
            (WITHOUT_SECRETS, Some(&SIX_FIELDS)) => {
                read(body).map(|(identity, texts, created, ends, method, client)| {
                    Self::of_texts((identity, texts, created, ends, method, client), None)
                })
            }
            (WITH_SECRETS, Some(&SEVEN_FIELDS)) => {
                read(body).map(|(identity, texts, created, ends, method, client, secrets)| {
                    Self::of_texts((identity, texts, created, ends, method, client), Some(secrets))
                })
            }
            (WITH_ALL, Some(&EIGHT_FIELDS)) => {
                read(body).map(|(identity, attributes, created, ends, method, client, secrets, login)| Self {
                    identity,
                    attributes,
                    created,
                    ends,
                    method,
                    client,
                    secrets,
                    login,
                    known: Memo::default(),
                })
            }
            (version, _) if WITH_ALL < version => Err(RecordError::NewerVersion(version)),
            (_, _) => Err(RecordError::Malformed),
        }
    }

    /// The lowest that can say all of it.
    fn version(&self) -> u8 {
        let is_of_the_first = match self.method {
            LoginMethod::Password => true,
            LoginMethod::Oidc | LoginMethod::Backend | LoginMethod::Anonymous => false,
        };
        let has_ends = self.attributes.values().any(|attribute| attribute.ends.is_some());
        match (&self.login, &self.secrets) {
            (None, None) if is_of_the_first && !has_ends => WITHOUT_SECRETS,
            (None, Some(_)) if is_of_the_first && !has_ends => WITH_SECRETS,
            (_, _) => WITH_ALL,
        }
    }

    fn of_texts((identity, texts, created, ends, method, client): FirstFields, secrets: Option<Sealed>) -> Self {
        let attributes = texts.into_iter().map(|(name, value)| (name, Attribute { value, ends: None })).collect();
        Self { identity, attributes, created, ends, method, client, secrets, login: None, known: Memo::default() }
    }
}

/// Of versions 1 and 2.
type FirstFields = (Identity, BTreeMap<String, String>, u64, u64, LoginMethod, ClientHints);

/// One array, and nothing after it.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, RecordError> {
    let mut cursor = std::io::Cursor::new(body);
    let mut reader = rmp_serde::Deserializer::new(&mut cursor);
    reader.set_max_depth(DEPTH_MAX);
    let fields = T::deserialize(&mut reader).map_err(|_| RecordError::Malformed)?;
    if usize::try_from(cursor.position()) != Ok(body.len()) {
        return Err(RecordError::Malformed);
    }
    Ok(fields)
}

impl ExternalLogin {
    /// The names by which the provider can end the session: its own session, or that it named none, and the user.
    pub fn handles(&self) -> Vec<String> {
        let narrow = match &self.sid {
            Some(sid) => Self::handle_of_sid(&self.issuer, sid),
            None => Self::handle_without_sid(&self.issuer, &self.subject),
        };
        vec![narrow, Self::handle_of_subject(&self.issuer, &self.subject)]
    }

    /// For [`super::Sessions::revoke_bound`]: `sid` of a logout token (OpenID Connect Back-Channel Logout 1.0, section 2.4).
    pub fn handle_of_sid(issuer: &str, sid: &str) -> String {
        format!("oidc sid\0{issuer}\0{sid}")
    }

    /// As [`Self::handle_of_subject`], of those sessions that began without a `sid`.
    pub fn handle_without_sid(issuer: &str, subject: &str) -> String {
        format!("oidc sub without sid\0{issuer}\0{subject}")
    }

    /// As [`Self::handle_of_sid`], of `sub`: all sessions of this user that this issuer began.
    pub fn handle_of_subject(issuer: &str, subject: &str) -> String {
        format!("oidc sub\0{issuer}\0{subject}")
    }
}

impl Memo {
    /// What `work_out` gives, or gave before for the same `edition` of the configuration.
    pub fn get(&self, edition: u64, work_out: impl FnOnce() -> Option<Arc<Known>>) -> Option<Arc<Known>> {
        let mut memo = self.0.lock();
        match &*memo {
            Some((of, known)) if *of == edition => known.clone(),
            Some(_) | None => {
                let known = work_out();
                *memo = Some((edition, known.clone()));
                known
            }
        }
    }
}

impl Clone for Memo {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for Memo {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Memo {}

impl fmt::Debug for Memo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memo")
    }
}

/// As MessagePack's bin, and not as an array of numbers.
impl Serialize for Sealed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Sealed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Sealed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("sealed bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Sealed, E> {
                Ok(Sealed(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.0.len())
    }
}

impl From<SealError> for RecordError {
    fn from(error: SealError) -> Self {
        Self::Sealed(error)
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge => write!(f, "session record is larger than {RECORD_BYTES_MAX} bytes"),
            Self::NewerVersion(version) => write!(f, "session record has version {version}, newer than {WITH_ALL}"),
            Self::Malformed => f.write_str("session record is malformed"),
            Self::Plain => f.write_str("session record is not sealed, and only sealed ones count"),
            Self::Sealed(error) => write!(f, "session record: {error}"),
        }
    }
}

impl Error for RecordError {}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, RngExt, SeedableRng};

    use super::super::id::SessionId;
    use super::super::seal::tests::{ONE, TWO, ring};
    use super::*;

    fn attribute(value: &str, ends: Option<u64>) -> Attribute {
        Attribute { value: value.to_owned(), ends }
    }

    fn external() -> ExternalLogin {
        ExternalLogin {
            provider: "p".into(),
            issuer: "i".into(),
            subject: "s".into(),
            sid: None,
            auth_time: Some(5),
            acr: None,
            access_ends: None,
        }
    }

    fn full() -> Record {
        Record {
            identity: Identity {
                user: "ann".into(),
                name: Some("Änn".into()),
                email: None,
                groups: vec!["staff".into(), "ops".into()],
                claims: BTreeMap::from([("team".into(), "north".into())]),
            },
            attributes: BTreeMap::from([("theme".into(), attribute("dark", None))]),
            created: 1_800_000_000_000,
            ends: 1_800_043_200_000,
            method: LoginMethod::Password,
            client: ClientHints { address: Some("2001:db8::1".parse().unwrap()), user_agent: "Browser/1".into() },
            secrets: None,
            login: None,
            known: Default::default(),
        }
    }

    #[test]
    fn of_what_a_client_says_of_itself_so_much_is_kept() {
        for (said, kept) in [("Browser/1", 9), (&"x".repeat(1_000), USER_AGENT_BYTES_MAX), ("é", 0)] {
            let headers = HeaderMap::from_iter([(USER_AGENT, said.parse().unwrap())]);
            let address = [192, 0, 2, 7].into();
            let hints = ClientHints::of(&headers, address);
            assert_eq!((hints.address, hints.user_agent.len()), (Some(address), kept), "{said}");
        }
        assert_eq!(ClientHints::of(&HeaderMap::new(), [192, 0, 2, 7].into()).user_agent, "");
    }

    #[test]
    fn a_record_reads_back_as_itself() {
        let plain = Record {
            identity: Identity { user: String::new(), ..Identity::default() },
            attributes: BTreeMap::new(),
            created: 0,
            ends: u64::MAX,
            method: LoginMethod::Password,
            client: ClientHints { address: Some("192.0.2.7".parse().unwrap()), user_agent: String::new() },
            secrets: None,
            login: None,
            known: Default::default(),
        };
        let secret = Record { secrets: Some(Sealed(vec![1, 200, 3])), ..full() };
        let all = Record { login: Some(external()), ..secret.clone() };
        let limited = BTreeMap::from([("cart".into(), attribute("1", Some(7))), ("theme".into(), attribute("", None))]);
        let cases = [
            (full(), 1),
            (plain, 1),
            (secret.clone(), 2),
            (all, 3),
            (Record { method: LoginMethod::Oidc, ..full() }, 3),
            (Record { method: LoginMethod::Backend, ..secret.clone() }, 3),
            (Record { method: LoginMethod::Anonymous, ..full() }, 3),
            (Record { attributes: limited.clone(), ..full() }, 3),
            (Record { attributes: limited, ..secret }, 3),
        ];
        for (record, version) in cases {
            let bytes = record.encode().unwrap();
            assert_eq!(bytes[0], version);
            assert_eq!(Record::decode(&bytes), Ok(record));
        }
    }

    #[test]
    fn an_attribute_that_has_ended_is_never_given_out() {
        let attributes =
            [("a", attribute("1", None)), ("b", attribute("2", Some(10))), ("c", attribute("3", Some(11)))];
        let attributes = attributes.map(|(name, held)| (name.to_owned(), held)).into();
        let record = Record { attributes, ..full() };
        let names = |now| record.attributes_at(now).map(|(name, _)| name).collect::<String>();
        assert_eq!([names(9), names(10), names(11)], ["abc", "ac", "a"]);
    }

    fn codec(keys: &[&str], sealing: SealRecords) -> Codec {
        Codec::new((!keys.is_empty()).then(|| Arc::new(ring(keys))), sealing)
    }

    fn key() -> SessionKey {
        SessionId::generate("ann").unwrap().key()
    }

    #[test]
    fn a_sealed_record_is_read_with_the_ring_and_at_its_own_key_alone() {
        use SealRecords::{Off, On, Only};
        let (mine, other) = (key(), key());
        let sealed = codec(&[ONE], On).encode(&full(), &mine).unwrap();
        assert_eq!(sealed[0], SEALED);
        assert!(!sealed.windows(3).any(|bytes| bytes == b"ann"), "nothing of it is readable");
        assert!(matches!(Record::decode(&sealed), Err(RecordError::NewerVersion(SEALED))), "for who knows no sealing");
        for sealing in [Off, On, Only] {
            for keys in [&[ONE][..], &[ONE, TWO], &[TWO, ONE]] {
                assert_eq!(codec(keys, sealing).decode(&sealed, &mine), Ok(full()), "rotation, and switching it off");
            }
            let moved = codec(&[ONE], sealing).decode(&sealed, &other);
            assert_eq!(moved, Err(RecordError::Sealed(SealError::Broken)), "planted at another session's key");
            for keys in [&[TWO][..], &[]] {
                let gone = codec(keys, sealing).decode(&sealed, &mine);
                assert!(matches!(gone, Err(RecordError::Sealed(SealError::UnknownKey(_)))), "{gone:?}");
            }
        }
    }

    #[test]
    fn plain_records_stay_readable_until_only_sealed_ones_count() {
        use SealRecords::{Off, On, Only};
        let (mine, plain) = (key(), full().encode().unwrap());
        let cases = [(Off, Ok(full())), (On, Ok(full())), (Only, Err(RecordError::Plain))];
        for (sealing, expected) in cases {
            assert_eq!(codec(&[ONE], sealing).decode(&plain, &mine), expected, "{sealing:?}");
        }
        assert_eq!(codec(&[ONE], Off).encode(&full(), &mine).unwrap(), plain);
        assert!(codec(&[], On).encode(&full(), &mine).is_err(), "nothing that was to be sealed is written plain");
    }

    #[test]
    fn a_cause_is_told_once() {
        let codec = codec(&[ONE], SealRecords::On);
        let shared = codec.clone();
        for n in 0..100 {
            for codec in [&codec, &shared] {
                let answer = codec.unreadable(&key(), RecordError::NewerVersion(4 + n % 2));
                assert!(matches!(answer, StoreError::Unreadable));
            }
        }
        assert_eq!(codec.told.lock().len(), 2, "one line per version, not one per request");
    }

    /// The bytes are a contract with other services: a change here needs a new version.
    #[test]
    fn the_layout_is_the_documented_one() {
        let record = Record {
            identity: Identity { user: "ann".into(), groups: vec!["a".into()], ..Identity::default() },
            attributes: BTreeMap::new(),
            created: 1,
            ends: 2,
            method: LoginMethod::Password,
            client: ClientHints { address: Some("192.0.2.7".parse().unwrap()), user_agent: "x".into() },
            secrets: None,
            login: None,
            known: Default::default(),
        };
        let expected: Vec<u8> = [
            &[1, 0x96, 0x95][..],
            &[0xa3, b'a', b'n', b'n', 0xc0, 0xc0, 0x91, 0xa1, b'a', 0x80],
            &[0x80, 1, 2],
            &[0xa8, b'P', b'a', b's', b's', b'w', b'o', b'r', b'd'],
            &[0x92, 0x81, 0xa2, b'V', b'4', 0x94, 0xcc, 192, 0, 2, 7, 0xa1, b'x'],
        ]
        .concat();
        assert_eq!(record.encode().unwrap(), expected);
        let with_secrets = Record { secrets: Some(Sealed(vec![7, 8])), ..record };
        let expected = [&[2, 0x97][..], &expected[2..], &[0xc4, 2, 7, 8]].concat();
        assert_eq!(with_secrets.encode().unwrap(), expected);

        let attributes = BTreeMap::from([("k".into(), attribute("v", Some(9))), ("l".into(), attribute("w", None))]);
        let method = LoginMethod::Oidc;
        let all = Record { attributes, method, login: Some(external()), ..with_secrets };
        let expected: Vec<u8> = [
            &[3, 0x98, 0x95][..],
            &[0xa3, b'a', b'n', b'n', 0xc0, 0xc0, 0x91, 0xa1, b'a', 0x80],
            &[0x82, 0xa1, b'k', 0x92, 0xa1, b'v', 9, 0xa1, b'l', 0x92, 0xa1, b'w', 0xc0, 1, 2],
            &[0xa4, b'O', b'i', b'd', b'c'],
            &[0x92, 0x81, 0xa2, b'V', b'4', 0x94, 0xcc, 192, 0, 2, 7, 0xa1, b'x'],
            &[0xc4, 2, 7, 8],
            &[0x97, 0xa1, b'p', 0xa1, b'i', 0xa1, b's', 0xc0, 5, 0xc0, 0xc0],
        ]
        .concat();
        assert_eq!(all.encode().unwrap(), expected);
        let empty = Record { attributes: BTreeMap::new(), secrets: None, login: None, ..all };
        assert_eq!(empty.encode().unwrap()[empty.encode().unwrap().len() - 2..], [0xc0, 0xc0], "nil, and not left out");
    }

    #[test]
    fn what_is_no_record_has_its_own_error() {
        let good = full().encode().unwrap();
        let mut newer = good.clone();
        newer[0] = 4;
        let mut without_its_secrets = good.clone();
        without_its_secrets[0] = 2;
        let mut trailing = good.clone();
        trailing.push(0xc0);
        let mut older = good.clone();
        older[0] = 0;
        let cases: [(&str, &[u8], RecordError); 8] = [
            ("empty", b"", RecordError::Malformed),
            ("version alone", b"\x01", RecordError::Malformed),
            ("version 0", &older, RecordError::Malformed),
            ("newer", &newer, RecordError::NewerVersion(4)),
            ("version 2 with six fields", &without_its_secrets, RecordError::Malformed),
            ("trailing byte", &trailing, RecordError::Malformed),
            ("cut", &good[..good.len() - 1], RecordError::Malformed),
            ("oversize", &[1; RECORD_BYTES_MAX + 1], RecordError::TooLarge),
        ];
        for (what, bytes, expected) in cases {
            assert_eq!(Record::decode(bytes), Err(expected), "{what}");
        }
        let mut large = full();
        large.attributes.insert("k".into(), attribute(&"v".repeat(RECORD_BYTES_MAX), None));
        assert_eq!(large.encode(), Err(RecordError::TooLarge), "what could not be read is not written");
    }

    #[test]
    fn decode_never_panics() {
        let mut rng = StdRng::seed_from_u64(2);
        let secret = Record { secrets: Some(Sealed(vec![7; 9])), ..full() };
        let all = Record { login: Some(external()), ..secret.clone() };
        let goods = [full().encode().unwrap(), secret.encode().unwrap(), all.encode().unwrap()];
        for turn in 0..20_000 {
            let mut bytes = if rng.random() {
                let mut noise = vec![0; rng.random_range(0..200)];
                rng.fill_bytes(&mut noise);
                noise
            } else {
                goods[turn % 3].clone()
            };
            for _ in 0..rng.random_range(0..4) {
                if !bytes.is_empty() {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
            }
            if let Some(first) = bytes.first_mut() {
                *first = [WITHOUT_SECRETS, WITH_SECRETS, WITH_ALL][turn % 3];
            }
            if let Ok(record) = Record::decode(&bytes) {
                let again = record.encode().unwrap();
                assert_eq!(Record::decode(&again), Ok(record), "what was read can be written");
            }
        }
        let deep = [&[1][..], &[0x91; 4_000]].concat();
        assert_eq!(Record::decode(&deep), Err(RecordError::Malformed));
    }
}
