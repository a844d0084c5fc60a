//! What the store keeps of a session: versioned MessagePack that other services may read.
//!
//! The first byte is the version of the layout, 1. The rest is one MessagePack array of six, in this order:
//!
//! | # | field        | type                                                                             |
//! |---|--------------|----------------------------------------------------------------------------------|
//! | 0 | `identity`   | array of 5: user str, name str or nil, email str or nil, groups array of str, claims map of str to str |
//! | 1 | `attributes` | map of str to str                                                                |
//! | 2 | `created`    | uint, Unix time in ms, by the store's clock                                      |
//! | 3 | `ends`       | uint, Unix time in ms: the absolute end, however much the session is used        |
//! | 4 | `method`     | str: `"Password"`                                                                |
//! | 5 | `client`     | array of 2: address nil or map of one (`"V4"` or `"V6"` to an array of 4 or 16 bytes), user agent str |
//!
//! A session lives as long as its key does: a reader has to look at nothing but whether the key is there.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::id::SessionKey;
use crate::identity::Identity;

/// One session at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub identity: Identity,
    pub attributes: BTreeMap<String, String>,
    /// Unix time in ms, by the store's clock.
    pub created: u64,
    /// The absolute end, Unix time in ms, by the store's clock.
    pub ends: u64,
    pub method: LoginMethod,
    pub client: ClientHints,
    /// What only the holder of the id can open.
    #[serde(skip)]
    pub secrets: Option<Sealed>,
}

/// Encrypted bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed(pub Vec<u8>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoginMethod {
    Password,
}

/// For the user's own list of devices; from the request that logged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientHints {
    pub address: Option<IpAddr>,
    pub user_agent: String,
}

/// A record that cannot be written or read. Tells nothing of what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordError {
    /// Longer than [`RECORD_BYTES_MAX`].
    TooLarge,
    /// Written by a later Cloakroom than this one, with this layout.
    NewerVersion(u8),
    /// Not what [`Record::encode`] writes.
    Malformed,
}

/// A record is read on every request: one that is larger than this is a mistake.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;

const VERSION: u8 = 1;
/// A record nests four deep; more is not a record.
const DEPTH_MAX: usize = 8;

impl Record {
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let mut bytes = vec![VERSION];
        rmp_serde::encode::write(&mut bytes, self).map_err(|_| RecordError::Malformed)?;
        if RECORD_BYTES_MAX < bytes.len() {
            return Err(RecordError::TooLarge);
        }
        Ok(bytes)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if RECORD_BYTES_MAX < bytes.len() {
            return Err(RecordError::TooLarge);
        }
        let body = match bytes.split_first() {
            Some((&VERSION, body)) => body,
            Some((&version, _)) if VERSION < version => return Err(RecordError::NewerVersion(version)),
            Some(_) | None => return Err(RecordError::Malformed),
        };
        let mut cursor = std::io::Cursor::new(body);
        let mut reader = rmp_serde::Deserializer::new(&mut cursor);
        reader.set_max_depth(DEPTH_MAX);
        let record = Self::deserialize(&mut reader).map_err(|_| RecordError::Malformed)?;
        if usize::try_from(cursor.position()) != Ok(body.len()) {
            return Err(RecordError::Malformed);
        }
        Ok(record)
    }
}

/// How records are written into a store and read from it.
#[derive(Clone, Debug, Default)]
pub struct Codec {}

impl Codec {
    /// `key`: under which it will be kept.
    pub fn encode(&self, record: &Record, _key: &SessionKey) -> Result<Vec<u8>, RecordError> {
        record.encode()
    }

    pub fn decode(&self, bytes: &[u8], _key: &SessionKey) -> Result<Record, RecordError> {
        Record::decode(bytes)
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge => write!(f, "session record is larger than {RECORD_BYTES_MAX} bytes"),
            Self::NewerVersion(version) => write!(f, "session record has version {version}, newer than {VERSION}"),
            Self::Malformed => f.write_str("session record is malformed"),
        }
    }
}

impl Error for RecordError {}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, RngExt, SeedableRng};

    use super::*;

    fn full() -> Record {
        Record {
            identity: Identity {
                user: "ann".into(),
                name: Some("Änn".into()),
                email: None,
                groups: vec!["staff".into(), "ops".into()],
                claims: BTreeMap::from([("team".into(), "north".into())]),
            },
            attributes: BTreeMap::from([("theme".into(), "dark".into())]),
            created: 1_800_000_000_000,
            ends: 1_800_043_200_000,
            method: LoginMethod::Password,
            client: ClientHints { address: Some("2001:db8::1".parse().unwrap()), user_agent: "Browser/1".into() },
            secrets: None,
        }
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
        };
        for record in [full(), plain] {
            let bytes = record.encode().unwrap();
            assert_eq!(bytes[0], VERSION);
            assert_eq!(Record::decode(&bytes), Ok(record));
        }
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
    }

    #[test]
    fn what_is_no_record_has_its_own_error() {
        let good = full().encode().unwrap();
        let mut newer = good.clone();
        newer[0] = 2;
        let mut trailing = good.clone();
        trailing.push(0xc0);
        let mut older = good.clone();
        older[0] = 0;
        let cases: [(&str, &[u8], RecordError); 7] = [
            ("empty", b"", RecordError::Malformed),
            ("version alone", b"\x01", RecordError::Malformed),
            ("version 0", &older, RecordError::Malformed),
            ("newer", &newer, RecordError::NewerVersion(2)),
            ("trailing byte", &trailing, RecordError::Malformed),
            ("cut", &good[..good.len() - 1], RecordError::Malformed),
            ("oversize", &[1; RECORD_BYTES_MAX + 1], RecordError::TooLarge),
        ];
        for (what, bytes, expected) in cases {
            assert_eq!(Record::decode(bytes), Err(expected), "{what}");
        }
        let mut large = full();
        large.attributes.insert("k".into(), "v".repeat(RECORD_BYTES_MAX));
        assert_eq!(large.encode(), Err(RecordError::TooLarge), "what could not be read is not written");
    }

    #[test]
    fn decode_never_panics() {
        let mut rng = StdRng::seed_from_u64(2);
        let good = full().encode().unwrap();
        for _ in 0..20_000 {
            let mut bytes = if rng.random() {
                let mut noise = vec![0; rng.random_range(0..200)];
                rng.fill_bytes(&mut noise);
                noise
            } else {
                good.clone()
            };
            for _ in 0..rng.random_range(0..4) {
                if !bytes.is_empty() {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
            }
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
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
