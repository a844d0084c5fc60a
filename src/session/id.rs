//! The ticket: 256 random bits and a bucket, made only here, never taken from a client.

use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRng;
use rand::rngs::{SysError, SysRng};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Identifies a session; holding it is being the user. Never logged, never stored: see [`SessionKey`].
///
/// As text, in the cookie, it is 45 characters of base64url: 2 for the bucket and 43 for the secret. The bucket is 12
/// bits of a hash of the user's name, the same for all sessions of a user. It is no secret and proves nothing.
#[derive(Clone)]
pub struct SessionId {
    bucket: u16,
    secret: [u8; SECRET_BYTES],
}

/// Under what a session is stored: a hash of its id, so that the store can make no cookie.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SessionKey {
    bucket: u16,
    hash: [u8; KEY_BYTES],
}

/// Under what a store keeps the list of a user's sessions: a hash of the name, in the bucket of all their sessions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserKey {
    bucket: u16,
    hash: [u8; KEY_BYTES],
}

/// For tables by [`SessionKey`], which is a hash already. Not where clients can bring keys of their own making.
pub type KeyHashing = BuildHasherDefault<KeyHasher>;

/// See [`KeyHashing`].
#[derive(Debug, Default)]
pub struct KeyHasher(u64);

/// How many buckets there are.
pub const BUCKETS: u16 = 4096;

const SECRET_BYTES: usize = 32;
/// 192 bits of SHA-256: nobody finds a second id for a key, and base64url needs no odd character.
const KEY_BYTES: usize = 24;
const BUCKET_BYTES: usize = 2;
/// A [`SessionKey`] as bytes.
pub(super) const KEY_STORED_BYTES: usize = BUCKET_BYTES + KEY_BYTES;
const SECRET_CHARS: usize = 43;
const BUCKET_CHARS: usize = 2;
const COOKIE_CHARS: usize = BUCKET_CHARS + SECRET_CHARS;
const KEY_CHARS: usize = 32;
const LOG_BYTES: usize = 5;

impl SessionId {
    /// A new id, straight from the operating system's generator. When that fails there is no login: nothing weaker
    /// takes its place.
    pub fn generate(user: &str) -> Result<Self, SysError> {
        let mut secret = [0; SECRET_BYTES];
        SysRng.try_fill_bytes(&mut secret)?;
        Ok(Self { bucket: bucket_of(user), secret })
    }

    /// The only door for text from outside: exactly what [`Self::to_cookie_value`] makes, or nothing.
    pub fn parse(text: &str) -> Option<Self> {
        Self::parse_bytes(text.as_bytes())
    }

    pub(super) fn parse_bytes(text: &[u8]) -> Option<Self> {
        if text.len() != COOKIE_CHARS {
            return None;
        }
        let (bucket, secret_text) = text.split_at(BUCKET_CHARS);
        let bucket = parse_bucket(bucket)?;
        let mut secret = [0; SECRET_BYTES];
        // This engine refuses padding and, in the last character, bits that belong to no byte: one text for each id.
        let length = URL_SAFE_NO_PAD.decode_slice(secret_text, &mut secret).ok()?;
        (length == SECRET_BYTES).then_some(Self { bucket, secret })
    }

    pub fn to_cookie_value(&self) -> String {
        let mut text = String::with_capacity(COOKIE_CHARS);
        push_bucket(&mut text, self.bucket);
        URL_SAFE_NO_PAD.encode_string(self.secret, &mut text);
        text
    }

    /// What keys are derived from; see [`super::seal`].
    pub(super) fn secret(&self) -> &[u8; SECRET_BYTES] {
        &self.secret
    }

    pub fn key(&self) -> SessionKey {
        let digest = Sha256::digest(self.secret);
        let mut hash = [0; KEY_BYTES];
        hash.copy_from_slice(&digest[..KEY_BYTES]);
        SessionKey { bucket: self.bucket, hash }
    }
}

impl SessionKey {
    /// Its name in a store: `<prefix>s:{<bucket>}:<hash>`. The braces are a Redis Cluster hash tag: all sessions of a
    /// user share a slot, so that one command can replace one by another.
    pub fn to_store_key(&self, prefix: &str) -> String {
        store_key(prefix, "s", self.bucket, &self.hash)
    }

    /// The last part of its name in a store, 32 characters of base64url.
    pub fn member(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.hash)
    }

    /// Reads what [`Self::member`] wrote.
    pub fn of_member(bucket: u16, member: &[u8]) -> Option<Self> {
        let mut hash = [0; KEY_BYTES];
        let length = URL_SAFE_NO_PAD.decode_slice(member, &mut hash).ok()?;
        (length == KEY_BYTES && bucket < BUCKETS).then_some(Self { bucket, hash })
    }

    /// Reads what [`Self::to_store_key`] wrote, with the same prefix.
    pub fn of_store_key(prefix: &str, name: &[u8]) -> Option<Self> {
        let rest = name.strip_prefix(prefix.as_bytes())?.strip_prefix(b"s:{")?;
        let (bucket, rest) = rest.split_at_checked(BUCKET_CHARS)?;
        Self::of_member(parse_bucket(bucket)?, rest.strip_prefix(b"}:")?)
    }

    pub fn bucket(&self) -> u16 {
        self.bucket
    }

    /// What a log line may say of a session: enough to follow one, nothing to use it or to find it in the store.
    pub fn log_hash(&self) -> String {
        let digest = Sha256::new().chain_update(b"cloakroom log\0").chain_update(self.hash).finalize();
        let mut text = String::with_capacity(2 * LOG_BYTES);
        for byte in &digest[..LOG_BYTES] {
            text.extend([byte >> 4, byte & 0xf].map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])));
        }
        text
    }

    /// For a store that keeps bytes: the bucket, then the hash.
    pub(super) fn to_bytes(&self) -> [u8; KEY_STORED_BYTES] {
        let mut bytes = [0; KEY_STORED_BYTES];
        let (bucket, hash) = bytes.split_at_mut(BUCKET_BYTES);
        bucket.copy_from_slice(&self.bucket.to_be_bytes());
        hash.copy_from_slice(&self.hash);
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    pub(super) fn of_bytes(bytes: &[u8; KEY_STORED_BYTES]) -> Option<Self> {
        let (bucket, hash) = bytes.split_first_chunk::<BUCKET_BYTES>()?;
        let bucket = u16::from_be_bytes(*bucket);
        Some(Self { bucket, hash: hash.try_into().ok()? }).filter(|_| bucket < BUCKETS)
    }

    /// Evenly spread, as the hash is: for choosing a shard.
    pub(super) fn spread(&self) -> usize {
        usize::from(self.hash[0])
    }
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(bytes) = bytes.first_chunk() {
            self.0 = u64::from_ne_bytes(*bytes);
        }
    }

    /// The bucket: known to be the same for all sessions of a user.
    fn write_u16(&mut self, _: u16) {}

    /// A length: the same for all.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

impl UserKey {
    pub fn of(user: &str) -> Self {
        let digest = Sha256::new().chain_update(b"cloakroom user\0").chain_update(user).finalize();
        let mut hash = [0; KEY_BYTES];
        hash.copy_from_slice(&digest[..KEY_BYTES]);
        Self { bucket: bucket_of(user), hash }
    }

    /// `<prefix>u:{<bucket>}:<hash>`
    pub fn to_store_key(&self, prefix: &str) -> String {
        store_key(prefix, "u", self.bucket, &self.hash)
    }

    pub fn bucket(&self) -> u16 {
        self.bucket
    }
}

/// A bucket as it stands in a cookie and between the braces of a key: two characters of base64url.
pub fn bucket_text(bucket: u16) -> String {
    let mut text = String::with_capacity(BUCKET_CHARS);
    push_bucket(&mut text, bucket);
    text
}

fn store_key(prefix: &str, kind: &str, bucket: u16, hash: &[u8; KEY_BYTES]) -> String {
    let length = prefix.len() + kind.len() + ":{".len() + BUCKET_CHARS + "}:".len() + KEY_CHARS;
    let mut name = String::with_capacity(length);
    name.push_str(prefix);
    name.push_str(kind);
    name.push_str(":{");
    push_bucket(&mut name, bucket);
    name.push_str("}:");
    URL_SAFE_NO_PAD.encode_string(hash, &mut name);
    name
}

impl PartialEq for SessionId {
    /// In constant time, for it compares secrets.
    fn eq(&self, other: &Self) -> bool {
        (self.bucket.ct_eq(&other.bucket) & self.secret.ct_eq(&other.secret)).into()
    }
}

impl Eq for SessionId {}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(..)")
    }
}

impl fmt::Debug for UserKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UserKey(..)")
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// A hash alone, without a key of ours: 12 bits cannot name a user, and instances need nothing in common.
fn bucket_of(user: &str) -> u16 {
    let digest = Sha256::new().chain_update(b"cloakroom bucket\0").chain_update(user).finalize();
    u16::from_be_bytes([digest[0], digest[1]]) >> 4
}

const BASE64URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

fn push_bucket(text: &mut String, bucket: u16) {
    text.push(char::from(BASE64URL[usize::from(bucket >> 6 & 0x3f)]));
    text.push(char::from(BASE64URL[usize::from(bucket & 0x3f)]));
}

fn parse_bucket(text: &[u8]) -> Option<u16> {
    text.iter().try_fold(0, |bucket, letter| {
        let bits = BASE64URL.iter().position(|known| known == letter)?;
        Some(bucket << 6 | u16::try_from(bits).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn every_id_reads_back_as_itself_and_no_two_are_alike() {
        let mut seen = HashSet::new();
        for _ in 0..2_000 {
            let id = SessionId::generate("ann").unwrap();
            let text = id.to_cookie_value();
            assert_eq!(text.len(), COOKIE_CHARS);
            assert!(text.bytes().all(|byte| BASE64URL.contains(&byte)), "the alphabet is base64url: {text}");
            assert!(SessionId::parse(&text) == Some(id), "what we hand out must come back");
            assert!(seen.insert(text), "two logins must never share an id");
        }
    }

    #[test]
    fn only_the_one_canonical_text_is_an_id() {
        let good = format!("Ab{}", "A".repeat(43));
        assert!(SessionId::parse(&good).is_some());
        let cases = [
            ("empty", String::new()),
            ("truncated", good[..44].to_owned()),
            ("extended", format!("{good}A")),
            ("padded", format!("{good}=")),
            ("padding inside the length", format!("{}=", &good[..44])),
            ("bits that belong to no byte", format!("{}B", &good[..44])),
            ("standard base64 plus", format!("+b{}", &good[2..])),
            ("standard base64 slash", format!("{}/{}", &good[..20], &good[21..])),
            ("space in front", format!(" {}", &good[..44])),
            ("space behind", format!("{} ", &good[..44])),
            ("quoted", format!("\"{}\"", &good[..43])),
            ("dot for a bucket", format!(".b{}", &good[2..])),
            ("line feed", format!("{}\n", &good[..44])),
            ("not ASCII, right length in bytes", format!("é{}", &good[2..])),
            ("NUL", format!("{}\0", &good[..44])),
        ];
        for (what, text) in cases {
            assert!(SessionId::parse(&text).is_none(), "{what} is not an id");
        }
    }

    #[test]
    fn parse_never_panics_and_accepts_only_what_it_would_write() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..20_000 {
            let mut text =
                SessionId { bucket: rng.random_range(0..4096), secret: rng.random() }.to_cookie_value().into_bytes();
            for _ in 0..rng.random_range(0..3) {
                let at = rng.random_range(0..text.len());
                text[at] = rng.random();
            }
            text.truncate(rng.random_range(text.len() - 1..=text.len()));
            if let Some(id) = SessionId::parse_bytes(&text) {
                assert_eq!(id.to_cookie_value().as_bytes(), text, "one text for each id");
            }
        }
    }

    #[test]
    fn a_key_names_the_session_without_its_secret() {
        let id = SessionId { bucket: 0xfff, secret: [7; 32] };
        let name = id.key().to_store_key("cloakroom:");
        assert_eq!(name.len(), "cloakroom:s:{__}:".len() + 32);
        assert!(name.starts_with("cloakroom:s:{__}:"), "the bucket is the hash tag: {name}");
        assert!(!name.contains(&id.to_cookie_value()[2..20]), "the store must not learn the cookie");
        assert_eq!(id.key().log_hash().len(), 10);
        assert_eq!(format!("{id:?} {:?}", id.key()), "SessionId(..) SessionKey(..)");
    }

    #[test]
    fn a_key_reads_back_from_its_text_and_from_its_bytes() {
        let key = SessionId::generate("ann").unwrap().key();
        assert!(SessionKey::of_bytes(&key.to_bytes()) == Some(key.clone()));
        assert!(SessionKey::of_member(key.bucket(), key.member().as_bytes()) == Some(key.clone()));
        let mut bytes = key.to_bytes();
        bytes[0] = 0x10;
        assert!(SessionKey::of_bytes(&bytes).is_none(), "there are 4096 buckets");
    }

    #[test]
    fn a_user_has_one_bucket_and_users_spread_over_many() {
        assert_eq!(bucket_of("ann"), bucket_of("ann"));
        let buckets: HashSet<_> = (0..1_000).map(|n| bucket_of(&format!("user{n}"))).collect();
        assert!(buckets.iter().all(|bucket| *bucket < 4096));
        assert!(800 < buckets.len(), "{} buckets for 1000 users", buckets.len());
    }

    #[test]
    fn ids_differ_by_any_bit() {
        let id = SessionId { bucket: 1, secret: [0; 32] };
        assert!(id == id.clone());
        for bit in 0..256 {
            let mut other = id.clone();
            other.secret[bit / 8] ^= 1 << (bit % 8);
            assert!(id != other);
        }
        assert!(id != SessionId { bucket: 2, secret: [0; 32] });
    }
}
