//! Who can read what is secret? Only who has the key that it is sealed under: the holder of the cookie, or our key ring.
//!
//! | what | sealed under | opened by |
//! |---|---|---|
//! | the secrets of a record | HKDF-SHA256 of the id's 256 bits, salted with a key of the ring if there is one | who brings the cookie |
//! | whole records (`session.seal_records`) | HKDF-SHA256 of a key of the ring | every instance with the ring |
//! | the fallback cookie | HKDF-SHA256 of a key of the ring | every instance with the ring |
//!
//! A dump of the store together with the ring therefore still reveals no secret of a record: the id is in the cookie
//! alone. Sealed bytes are one byte for the version of this layout (1), four for the id of the ring's key (0 0 0 0 = none),
//! 24 of random nonce, and the XChaCha20-Poly1305 ciphertext with its tag (RFC 8439, and the XChaCha draft for the
//! longer nonce, which may be random). The tag also covers version, key id, purpose and session: nothing sealed can be
//! moved to another session or passed off as something else.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use hkdf::Hkdf;
use rand::TryRng;
use rand::rngs::SysRng;
use sha2::{Digest, Sha256};

use super::id::{SessionId, SessionKey};
use super::record::Sealed;
use crate::config::error::{ConfigError, Problems};

/// The keys of `session.keys_file`: the first seals, all open. Can be read again while it is in use.
pub struct KeyRing {
    file: PathBuf,
    keys: ArcSwap<Vec<Key>>,
}

/// What has been read of a key ring's file, and is not in use yet.
#[derive(Debug)]
pub struct NewKeys(Vec<Key>);

/// Sealed bytes that cannot be opened, or bytes that cannot be sealed. Tells nothing of what is in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SealError {
    /// Sealed under a key that is not in the ring (any more).
    UnknownKey(KeyId),
    /// Damaged, moved from another place, forged, or of a layout that we do not know.
    Broken,
    /// The system gives no random bytes.
    NoRandom,
}

/// The first four bytes of a key's SHA-256: which key it was, and nothing else about it.
pub type KeyId = [u8; KEY_ID_BYTES];

/// Seals what only the holder of `id` may read, e.g. the tokens of an identity provider.
pub fn seal_secrets(
    id: &SessionId,
    ring: Option<&KeyRing>,
    secrets: &BTreeMap<String, String>,
) -> Result<Sealed, SealError> {
    let plain = rmp_serde::to_vec(secrets).map_err(|_| SealError::Broken)?;
    let keys = ring.map(|ring| ring.keys.load_full());
    let salt = keys.as_ref().and_then(|keys| keys.first());
    let cipher = cipher_of_secrets(id, salt);
    seal(&cipher, salt.map_or(NO_KEY, |key| key.id), Purpose::Secrets, &id.key(), &plain).map(Sealed)
}

/// Opens what [`seal_secrets`] sealed for this very id.
pub fn open_secrets(
    id: &SessionId,
    ring: Option<&KeyRing>,
    sealed: &Sealed,
) -> Result<BTreeMap<String, String>, SealError> {
    let envelope = Envelope::of(&sealed.0)?;
    let keys = ring.map(|ring| ring.keys.load_full());
    let salt = match envelope.key {
        NO_KEY => None,
        wanted => {
            let found = keys.as_ref().and_then(|keys| keys.iter().find(|key| key.id == wanted));
            Some(found.ok_or(SealError::UnknownKey(wanted))?)
        }
    };
    let plain = envelope.open(&cipher_of_secrets(id, salt), Purpose::Secrets, &id.key())?;
    rmp_serde::from_slice(&plain).map_err(|_| SealError::Broken)
}

/// What is sealed; each has keys of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// What is secret in a record.
    Secrets,
    /// A whole record.
    Record,
    /// The cookie that counts while the store is down.
    Fallback,
}

struct Key {
    id: KeyId,
    secret: [u8; KEY_BYTES],
    /// Made once, for they are needed on requests.
    record: XChaCha20Poly1305,
    fallback: XChaCha20Poly1305,
}

/// Sealed bytes, taken apart.
struct Envelope<'b> {
    key: KeyId,
    nonce: [u8; NONCE_BYTES],
    ciphertext: &'b [u8],
}

const VERSION: u8 = 1;
const KEY_BYTES: usize = 32;
const KEY_ID_BYTES: usize = 4;
const NONCE_BYTES: usize = 24;
const NO_KEY: KeyId = [0; KEY_ID_BYTES];
/// What sealing adds to the length.
pub(super) const SEAL_BYTES: usize = 1 + KEY_ID_BYTES + NONCE_BYTES + 16;
/// More keys than this are a mistake, not a rotation.
const KEYS_MAX: usize = 16;

impl KeyRing {
    /// Reads the file: one key per line, 32 bytes in base64; empty lines and lines that begin with `#` are left out.
    ///
    /// # Errors
    /// Every line that is no such key, with its number and never with its text; a file that everybody may write.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let NewKeys(keys) = read(file)?;
        Ok(Self { file: file.to_owned(), keys: ArcSwap::from_pointee(keys) })
    }

    /// Reads the file again. The keys in use stay as they are until [`Self::replace`].
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn read_again(&self) -> Result<NewKeys, ConfigError> {
        read(&self.file)
    }

    /// Whether these keys, in this order, are those in use.
    pub fn is_of(&self, NewKeys(keys): &NewKeys) -> bool {
        self.keys.load().iter().map(|key| key.id).eq(keys.iter().map(|key| key.id))
    }

    pub fn replace(&self, NewKeys(keys): NewKeys) {
        self.keys.store(Arc::new(keys));
    }

    /// For what is sealed elsewhere: a key of its own for this purpose from each of the ring's, the one that seals first
    /// (RFC 5869).
    pub fn derived(&self, purpose: &[u8]) -> Vec<[u8; KEY_BYTES]> {
        let derived = |key: &Key| {
            let mut derived = [0; KEY_BYTES];
            let expanded = Hkdf::<Sha256>::new(None, &key.secret).expand(purpose, &mut derived);
            expanded.expect("32 bytes are one block of SHA-256, and up to 255 may be asked for");
            derived
        };
        self.keys.load().iter().map(derived).collect()
    }

    pub(super) fn seal(&self, purpose: Purpose, session: &SessionKey, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let keys = self.keys.load();
        let key = keys.first().ok_or(SealError::UnknownKey(NO_KEY))?;
        seal(key.cipher(purpose).ok_or(SealError::Broken)?, key.id, purpose, session, plain)
    }

    pub(super) fn open(&self, purpose: Purpose, session: &SessionKey, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let envelope = Envelope::of(sealed)?;
        let keys = self.keys.load();
        let key = keys.iter().find(|key| key.id == envelope.key).ok_or(SealError::UnknownKey(envelope.key))?;
        envelope.open(key.cipher(purpose).ok_or(SealError::Broken)?, purpose, session)
    }
}

/// Under which key something was sealed, for who has no ring at all.
pub(super) fn key_of(sealed: &[u8]) -> Result<KeyId, SealError> {
    Envelope::of(sealed).map(|envelope| envelope.key)
}

impl Purpose {
    /// Never changed: it is part of every key.
    fn label(self) -> &'static str {
        match self {
            Self::Secrets => "cloakroom secrets 1",
            Self::Record => "cloakroom record 1",
            Self::Fallback => "cloakroom fallback 1",
        }
    }
}

impl Key {
    fn new(secret: [u8; KEY_BYTES]) -> Self {
        let mut id = NO_KEY;
        id.copy_from_slice(&Sha256::digest(secret)[..KEY_ID_BYTES]);
        let cipher = |purpose| derive(None, &secret, purpose);
        Self { id, record: cipher(Purpose::Record), fallback: cipher(Purpose::Fallback), secret }
    }

    /// None for what needs the session's id, too.
    fn cipher(&self, purpose: Purpose) -> Option<&XChaCha20Poly1305> {
        match purpose {
            Purpose::Secrets => None,
            Purpose::Record => Some(&self.record),
            Purpose::Fallback => Some(&self.fallback),
        }
    }
}

impl<'b> Envelope<'b> {
    fn of(sealed: &'b [u8]) -> Result<Self, SealError> {
        let (&version, rest) = sealed.split_first().ok_or(SealError::Broken)?;
        let (&key, rest) = rest.split_first_chunk().ok_or(SealError::Broken)?;
        let (&nonce, ciphertext) = rest.split_first_chunk().ok_or(SealError::Broken)?;
        if version == VERSION { Ok(Self { key, nonce, ciphertext }) } else { Err(SealError::Broken) }
    }

    fn open(&self, cipher: &XChaCha20Poly1305, purpose: Purpose, session: &SessionKey) -> Result<Vec<u8>, SealError> {
        let aad = bound_to(self.key, purpose, session);
        let payload = Payload { msg: self.ciphertext, aad: &aad };
        cipher.decrypt(&XNonce::from(self.nonce), payload).map_err(|_| SealError::Broken)
    }
}

fn seal(
    cipher: &XChaCha20Poly1305,
    key: KeyId,
    purpose: Purpose,
    session: &SessionKey,
    plain: &[u8],
) -> Result<Vec<u8>, SealError> {
    let mut nonce = [0; NONCE_BYTES];
    SysRng.try_fill_bytes(&mut nonce).map_err(|_| SealError::NoRandom)?;
    let aad = bound_to(key, purpose, session);
    let payload = Payload { msg: plain, aad: &aad };
    let ciphertext = cipher.encrypt(&XNonce::from(nonce), payload).map_err(|_| SealError::Broken)?;
    Ok([&[VERSION][..], &key, &nonce, &ciphertext].concat())
}

/// What the tag covers besides the text. All parts but the label have a fixed length, so no two say the same.
fn bound_to(key: KeyId, purpose: Purpose, session: &SessionKey) -> Vec<u8> {
    [&[VERSION][..], &key, &session.to_bytes(), purpose.label().as_bytes()].concat()
}

fn cipher_of_secrets(id: &SessionId, salt: Option<&Key>) -> XChaCha20Poly1305 {
    derive(salt.map(|key| &key.secret), id.secret(), Purpose::Secrets)
}

/// RFC 5869.
fn derive(salt: Option<&[u8; KEY_BYTES]>, secret: &[u8; 32], purpose: Purpose) -> XChaCha20Poly1305 {
    let mut key = [0; KEY_BYTES];
    let expanded = Hkdf::<Sha256>::new(salt.map(|salt| &salt[..]), secret).expand(purpose.label().as_bytes(), &mut key);
    expanded.expect("32 bytes are one block of SHA-256, and up to 255 may be asked for");
    XChaCha20Poly1305::new(&key.into())
}

fn read(file: &Path) -> Result<NewKeys, ConfigError> {
    let unreadable = |error| ConfigError::unreadable(file, &error);
    let mode = std::fs::metadata(file).map_err(unreadable)?.permissions().mode();
    if mode & EVERYBODY_WRITES != 0 {
        let message = "everybody may write this file, and so add a key of their own";
        return Err(ConfigError::of_file(file, message, "chmod 600, and make new keys"));
    }
    if mode & EVERYBODY_READS != 0 {
        // Not refused: containers get their secrets like this, on a file system of their own.
        tracing::warn!(file = %file.display(), "everybody on this machine may read the session keys: chmod 600");
    }
    let text = std::fs::read_to_string(file).map_err(unreadable)?;
    parse(file, &text)
}

const EVERYBODY_READS: u32 = 0o004;
const EVERYBODY_WRITES: u32 = 0o002;

fn parse(file: &Path, text: &str) -> Result<NewKeys, ConfigError> {
    let covered = covered(text);
    let mut problems = Problems::in_file(file, &covered);
    let mut keys: Vec<Key> = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let at = start..start + line.trim_end().len();
        start += line.len();
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let decoded = STANDARD.decode(line).ok().and_then(|bytes| <[u8; KEY_BYTES]>::try_from(bytes).ok());
        let Some(secret) = decoded else {
            problems.add(at, "not a key: expected 32 bytes in base64, 44 characters").hint(HOW_TO_MAKE_ONE);
            continue;
        };
        if secret.iter().all(|byte| *byte == secret[0]) {
            problems.add(at, "not a key that anybody made at random").hint(HOW_TO_MAKE_ONE);
            continue;
        }
        let key = Key::new(secret);
        if keys.iter().any(|other| other.id == key.id) || key.id == NO_KEY {
            problems.add(at, "this key is there twice").hint("remove one of the two lines");
        }
        keys.push(key);
    }
    if keys.len() > KEYS_MAX {
        problems.add(0..0, format!("more than {KEYS_MAX} keys")).hint("remove those that no session needs any more");
    }
    let problems = problems.into_result(NewKeys(keys))?;
    if problems.0.is_empty() {
        return Err(ConfigError::of_file(file, "there is no key in this file", HOW_TO_MAKE_ONE));
    }
    Ok(problems)
}

const HOW_TO_MAKE_ONE: &str = "make one with: openssl rand -base64 32";

/// The text with its lines where they are and nothing to read in them, for messages that show the line.
fn covered(text: &str) -> String {
    text.bytes().map(|byte| if byte == b'\n' { '\n' } else { '*' }).collect()
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").field("file", &self.file).field("keys", &self.keys.load()).finish()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", hexadecimal(self.id))
    }
}

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey(NO_KEY) => f.write_str("there is no key ring"),
            Self::UnknownKey(id) => write!(f, "key {} is not in the key ring", hexadecimal(*id)),
            Self::Broken => f.write_str("sealed bytes do not open"),
            Self::NoRandom => f.write_str("the system gives no random bytes"),
        }
    }
}

impl Error for SealError {}

fn hexadecimal(id: KeyId) -> String {
    format!("{:08x}", u32::from_be_bytes(id))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::session) const ONE: &str = "T25lIGtleSBvZiB0aGUgdGVzdHMsIDMyIGJ5dGVzIDE=";
    pub(in crate::session) const TWO: &str = "VHdvIGtleXMgb2YgdGhlIHRlc3RzLCAzMiBieXRlIDI=";

    pub(in crate::session) fn ring(keys: &[&str]) -> KeyRing {
        let NewKeys(keys) = parse(Path::new("session.keys"), &keys.join("\n")).unwrap();
        KeyRing { file: "session.keys".into(), keys: ArcSwap::from_pointee(keys) }
    }

    fn secrets() -> BTreeMap<String, String> {
        BTreeMap::from([("refresh_token".into(), "r-4711".into()), ("id_token".into(), "i-4711".into())])
    }

    fn id() -> SessionId {
        SessionId::generate("ann").unwrap()
    }

    #[test]
    fn only_who_has_the_id_opens_the_secrets() {
        let (mine, other) = (id(), id());
        for ring in [None, Some(ring(&[ONE]))] {
            let sealed = seal_secrets(&mine, ring.as_ref(), &secrets()).unwrap();
            assert_eq!(open_secrets(&mine, ring.as_ref(), &sealed), Ok(secrets()));
            assert_eq!(open_secrets(&other, ring.as_ref(), &sealed), Err(SealError::Broken), "the ring is not enough");
            let again = seal_secrets(&mine, ring.as_ref(), &secrets()).unwrap();
            assert_ne!(sealed, again, "a nonce of its own each time");
            assert!(!sealed.0.windows(4).any(|bytes| bytes == b"4711"));
        }
        let sealed = seal_secrets(&mine, Some(&ring(&[ONE])), &secrets()).unwrap();
        let missing = open_secrets(&mine, None, &sealed);
        assert!(matches!(missing, Err(SealError::UnknownKey(_))), "with a ring the id is not enough either");
    }

    #[test]
    fn what_is_sealed_is_bound_to_its_session_and_its_purpose() {
        let (ring, mine, other) = (ring(&[ONE]), id().key(), id().key());
        let sealed = ring.seal(Purpose::Record, &mine, b"text").unwrap();
        assert_eq!(ring.open(Purpose::Record, &mine, &sealed).unwrap(), b"text");
        assert_eq!(sealed.len(), b"text".len() + SEAL_BYTES);
        assert_eq!(ring.open(Purpose::Record, &other, &sealed), Err(SealError::Broken), "moved to another session");
        assert_eq!(ring.open(Purpose::Fallback, &mine, &sealed), Err(SealError::Broken), "another purpose");
        assert_eq!(ring.open(Purpose::Secrets, &mine, &sealed), Err(SealError::Broken), "these need an id");
    }

    #[test]
    fn no_byte_of_it_can_be_changed_and_none_left_out() {
        let (ring, session) = (ring(&[ONE, TWO]), id().key());
        let sealed = ring.seal(Purpose::Fallback, &session, b"text").unwrap();
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut forged = sealed.clone();
                forged[at] ^= 1 << bit;
                assert!(ring.open(Purpose::Fallback, &session, &forged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(ring.open(Purpose::Fallback, &session, &sealed[..at]).is_err(), "cut at {at}");
        }
        // The right key under the name of another one of the ring: the name is covered, too.
        let mut renamed = sealed.clone();
        renamed[1..5].copy_from_slice(&self::ring(&[TWO]).keys.load()[0].id);
        assert_eq!(ring.open(Purpose::Fallback, &session, &renamed), Err(SealError::Broken));
    }

    #[test]
    fn a_rotation_closes_nothing_until_the_old_key_goes() {
        let (before, session, mine) = (ring(&[ONE]), id().key(), id());
        let old = before.seal(Purpose::Record, &session, b"old").unwrap();
        let old_secrets = seal_secrets(&mine, Some(&before), &secrets()).unwrap();
        for step in [ring(&[ONE, TWO]), ring(&[TWO, ONE])] {
            assert_eq!(step.open(Purpose::Record, &session, &old).unwrap(), b"old");
            assert_eq!(open_secrets(&mine, Some(&step), &old_secrets), Ok(secrets()));
        }
        let new = ring(&[TWO, ONE]).seal(Purpose::Record, &session, b"new").unwrap();
        assert_eq!(ring(&[ONE, TWO]).open(Purpose::Record, &session, &new).unwrap(), b"new", "on an instance behind");
        let after = ring(&[TWO]);
        let gone = SealError::UnknownKey(before.keys.load()[0].id);
        assert_eq!(after.open(Purpose::Record, &session, &old), Err(gone));
        assert_eq!(open_secrets(&mine, Some(&after), &old_secrets), Err(gone));
        assert_eq!(after.open(Purpose::Record, &session, &new).unwrap(), b"new");

        before.replace(NewKeys(vec![Key::new([7; 32])]));
        assert_eq!(before.open(Purpose::Record, &session, &old), Err(gone), "read again, the ring is another");
    }

    #[test]
    fn a_key_file_is_read_strictly_and_never_shown() {
        let read = |text: &str| parse(Path::new("session.keys"), text).map(|NewKeys(keys)| keys.len());
        assert_eq!(read(&format!("# the first\n{ONE}\n\n  {TWO}\r\n")).unwrap(), 2);
        let short = STANDARD.encode([1; 31]);
        let cases = [
            ("", "there is no key in this file"),
            ("# nothing yet\n", "there is no key in this file"),
            (&format!("{ONE}\nabc\n"), "session.keys:2:1: not a key"),
            (&short, "session.keys:1:1: not a key"),
            (&ONE[..43], "session.keys:1:1: not a key"),
            (&format!("{ONE} # mine"), "session.keys:1:1: not a key"),
            (&format!("\n\n{ONE}\n{ONE}\n"), "session.keys:4:1: this key is there twice"),
            ("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "not a key that anybody made at random"),
            ("schlüssel", "session.keys:1:1: not a key"),
        ];
        for (text, expected) in cases {
            let told = read(text).unwrap_err().to_string();
            assert!(told.contains(expected), "{text:?} should say {expected:?}, but says {told}");
            assert!(!told.contains(ONE) && !told.contains(&short) && !told.contains("abc"), "a key is told: {told}");
        }
    }

    #[test]
    fn a_file_that_everybody_may_write_is_no_key_ring() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("session.keys");
        std::fs::write(&file, ONE).unwrap();
        for (mode, is_good) in [(0o600, true), (0o640, true), (0o444, true), (0o602, false), (0o666, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(KeyRing::load(&file).is_ok(), is_good, "{mode:o}");
        }
        assert!(KeyRing::load(&folder.path().join("missing")).is_err());
    }

    #[test]
    fn nothing_of_a_key_is_in_debug() {
        let text = format!("{:?}", ring(&[ONE]));
        assert!(text.contains("Key(") && !text.contains(ONE) && !text.contains("One key") && text.len() < 80, "{text}");
    }
}
