//! How is a password kept and checked? As argon2id, strong enough to keep and weak enough to compute, never more
//! than a few at a time.

use std::collections::TryReserveError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::phc::{Output, PasswordHash};
use argon2::{Algorithm, Argon2, Block, Params, PasswordHasher, Version};
use parking_lot::Mutex;
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;

/// A password as the users file keeps it: an argon2id PHC string whose strength was checked.
#[derive(Clone, PartialEq)]
pub struct StoredHash {
    phc: PasswordHash,
    params: Params,
}

/// Why a PHC string is refused. Tells what to do, and never the string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadHash {
    /// Not of the form `$argon2id$v=19$m=..,t=..,p=..$salt$hash`.
    Form,
    /// Another scheme, or an old version of argon2.
    Scheme,
    /// Parameters below the OWASP Password Storage Cheat Sheet, or a short salt or hash.
    Weak,
    /// Parameters that would take the machine.
    Heavy,
}

/// Computes hashes off the request threads, a bounded number at a time, with a bounded queue.
#[derive(Debug)]
pub struct Hashing {
    /// Those that compute.
    computing: Arc<Semaphore>,
    /// Those that compute or wait.
    admitted: Semaphore,
    wait_max: Duration,
    memory: Arc<MemoryPool>,
}

/// The memory of those that compute, kept for the next: to get 19 MiB from the system for each login, and to give them
/// back, costs time, and allocators keep more of it than was ever in use. There is one piece for each place at most.
#[derive(Default)]
struct MemoryPool(Mutex<Vec<Vec<Block>>>);

/// All hashing places are taken, and so is the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// Longer passwords are refused before anything is computed.
pub const PASSWORD_BYTES_MAX: usize = 1024;

/// Memory in KiB and passes that OWASP calls equally strong, each with one lane or more.
const STRONG_ENOUGH: [(u32, u32); 5] = [(47_104, 1), (19_456, 2), (12_288, 3), (9_216, 4), (7_168, 5)];

const MEMORY_KIB_MAX: u32 = 1024 * 1024;
const PASSES_MAX: u32 = 20;
const LANES_MAX: u32 = 16;
const SALT_BYTES_MIN: usize = 8;
const HASH_BYTES_MIN: usize = 16;

/// Waiting logins beyond those that compute: some seconds of work, not minutes.
const WAITING_MAX: usize = 64;
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What [`hash`] needs. The memory of a costlier hash goes back to the system.
const KEPT_KIB_MAX: usize = MEMORY_KIB as usize;
const MEMORY_KIB: u32 = 19_456;

/// A new PHC string for the users file: argon2id, 19 MiB, two passes, one lane, 16 bytes of salt.
pub fn hash(password: &str) -> Result<String, argon2::password_hash::Error> {
    let params = Params::new(MEMORY_KIB, 2, 1, None)?;
    let phc: PasswordHash = argon2id(params).hash_password(password.as_bytes())?;
    Ok(phc.to_string())
}

impl StoredHash {
    pub fn parse(text: &str) -> Result<Self, BadHash> {
        if !text.starts_with("$argon2id$") {
            return Err(if text.starts_with('$') { BadHash::Scheme } else { BadHash::Form });
        }
        let phc = PasswordHash::new(text).map_err(|_| BadHash::Form)?;
        // Absent parameters would be read as the library's defaults, which are not what made the hash.
        let named = ["m", "t", "p"].iter().all(|name| phc.params.get(*name).is_some());
        let (Some(salt), Some(output), true) = (&phc.salt, &phc.hash, named) else { return Err(BadHash::Form) };
        if phc.version != Some(Version::V0x13.into()) {
            return Err(BadHash::Scheme);
        }
        let params = Params::try_from(&phc).map_err(|_| BadHash::Form)?;
        let (memory, passes, lanes) = (params.m_cost(), params.t_cost(), params.p_cost());
        if MEMORY_KIB_MAX < memory || PASSES_MAX < passes || LANES_MAX < lanes {
            return Err(BadHash::Heavy);
        }
        let strong =
            STRONG_ENOUGH.iter().any(|(least_memory, least_passes)| *least_memory <= memory && *least_passes <= passes);
        if !strong || salt.len() < SALT_BYTES_MIN || output.len() < HASH_BYTES_MIN {
            return Err(BadHash::Weak);
        }
        Ok(Self { phc, params })
    }

    /// A hash that no password has, as costly to check as the costliest of `hashes`.
    ///
    /// An unknown user costs what a known one costs, as long as the file's hashes have equal parameters.
    pub fn dummy<'h>(hashes: impl Iterator<Item = &'h Self>) -> Self {
        let costliest = hashes.max_by_key(|hash| u64::from(hash.params.m_cost()) * u64::from(hash.params.t_cost()));
        let mut dummy = costliest.cloned().unwrap_or_else(|| {
            Self::parse(
                "$argon2id$v=19$m=19456,t=2,p=1$c2l4dGVlbiBvZiBzYWx0IQ$bm8gcGFzc3dvcmQgaGFzIHRoaXMgdmVyeSBoYXNoISE",
            )
            .expect("a constant in the right form")
        });
        // A fixed output of the right length: to find a password for it is to break argon2.
        let length = dummy.phc.hash.as_ref().map_or(HASH_BYTES_MIN, Output::len);
        dummy.phc.hash = Some(Output::new(&vec![0; length]).expect("the length of another output"));
        dummy
    }

    /// Blocks for as long as argon2 takes. The comparison takes constant time. `memory` may be of any length, and hold
    /// anything: argon2 writes a block before it reads it.
    ///
    /// # Errors
    /// When there is no memory.
    fn verify(&self, password: &str, memory: &mut Vec<Block>) -> Result<bool, TryReserveError> {
        let (Some(salt), Some(expected)) = (&self.phc.salt, &self.phc.hash) else { return Ok(false) };
        let blocks = self.params.block_count();
        memory.try_reserve_exact(blocks.saturating_sub(memory.len()))?;
        memory.resize(blocks.max(memory.len()), Block::new());
        let mut output = [0; Output::MAX_LENGTH];
        let output = &mut output[..expected.len()];
        let computed = argon2id(self.params.clone()).hash_password_into_with_memory(
            password.as_bytes(),
            salt,
            output,
            &mut memory[..blocks],
        );
        Ok(computed.is_ok() && bool::from(output.ct_eq(expected.as_bytes())))
    }
}

impl fmt::Debug for StoredHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoredHash(..)")
    }
}

impl fmt::Display for BadHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Form => "not a password hash of the form \"$argon2id$v=19$m=19456,t=2,p=1$salt$hash\"",
            Self::Scheme => "this password hash is not argon2id version 19, the only scheme that is accepted",
            Self::Weak => "this password hash is too weak: its parameters are below the least that OWASP recommends",
            Self::Heavy => "this password hash is too costly: at most m=1048576 (1 GiB), t=20, p=16",
        })
    }
}

impl std::error::Error for BadHash {}

impl Hashing {
    /// `hashes_max` at a time; 0 = one per core.
    pub fn new(hashes_max: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let computing = if hashes_max == 0 { cores() } else { hashes_max }.min(Semaphore::MAX_PERMITS - WAITING_MAX);
        Self {
            computing: Arc::new(Semaphore::new(computing)),
            admitted: Semaphore::new(computing + WAITING_MAX),
            wait_max: WAIT_MAX,
            memory: Arc::default(),
        }
    }

    /// Whether `password` has this hash. A caller that gives up leaves the place taken until its hash is done, so
    /// that no flood of broken-off logins computes more than the bound.
    pub async fn verify(&self, password: String, hash: StoredHash) -> Result<bool, Busy> {
        let _admitted = self.admitted.try_acquire().map_err(|_| Busy)?;
        let place = tokio::time::timeout(self.wait_max, Arc::clone(&self.computing).acquire_owned());
        let Ok(Ok(place)) = place.await else { return Err(Busy) };
        let pool = Arc::clone(&self.memory);
        let matches = tokio::task::spawn_blocking(move || {
            let _place = place;
            let mut memory = pool.take();
            let matches = hash.verify(&password, &mut memory);
            pool.keep(memory);
            matches.map_err(|_no_memory| Busy)
        });
        // A hash that panicked proves nothing.
        matches.await.unwrap_or(Ok(false))
    }
}

#[cfg(test)]
impl Hashing {
    /// Takes all places and the queue; how many that are.
    pub(super) fn fill(&self) -> usize {
        self.admitted.forget_permits(self.admitted.available_permits())
    }

    pub(super) fn free(&self, places: usize) {
        self.admitted.add_permits(places);
    }
}

impl MemoryPool {
    fn take(&self) -> Vec<Block> {
        self.0.lock().pop().unwrap_or_default()
    }

    /// Nothing of a password stays behind. To clear the memory is one pass over it; argon2 makes several, and mixes.
    fn keep(&self, mut memory: Vec<Block>) {
        memory.fill(Block::new());
        if memory.capacity() <= KEPT_KIB_MAX {
            self.0.lock().push(memory);
        }
    }
}

impl fmt::Debug for MemoryPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryPool").field("pieces", &self.0.lock().len()).finish()
    }
}

fn argon2id(params: Params) -> Argon2<'static> {
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: &str = "c2l4dGVlbiBvZiBzYWx0IQ";
    const HASH: &str = "bm8gcGFzc3dvcmQgaGFzIHRoaXMgdmVyeSBoYXNoISE";

    fn phc(params: &str) -> String {
        format!("$argon2id$v=19${params}${SALT}${HASH}")
    }

    #[test]
    fn what_we_hash_we_accept_and_nothing_else() {
        let text = hash("correct horse").unwrap();
        assert!(text.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{text}");
        assert_ne!(text, hash("correct horse").unwrap(), "each hash has a salt of its own");
        let stored = StoredHash::parse(&text).unwrap();
        let mut memory = Vec::new();
        let mut opens = |hash: &StoredHash, password: &str| hash.verify(password, &mut memory).unwrap();
        assert!(opens(&stored, "correct horse"));
        for wrong in ["", "Correct horse", "correct horse ", " correct horse", "correct"] {
            assert!(!opens(&stored, wrong), "{wrong:?}");
        }
        assert!(!opens(&StoredHash::dummy([&stored].into_iter()), "correct horse"), "no password opens the dummy");
    }

    #[test]
    fn only_hashes_between_weak_and_ruinous_are_accepted() {
        let cases: &[(String, Result<(), BadHash>)] = &[
            (phc("m=19456,t=2,p=1"), Ok(())),
            (phc("m=12288,t=3,p=1"), Ok(())),
            (phc("m=9216,t=4,p=1"), Ok(())),
            (phc("m=7168,t=5,p=1"), Ok(())),
            (phc("m=47104,t=1,p=1"), Ok(())),
            (phc("m=65536,t=3,p=4"), Ok(())),
            (phc("m=1048576,t=20,p=16"), Ok(())),
            (phc("m=19455,t=2,p=1"), Err(BadHash::Weak)),
            (phc("m=19456,t=1,p=1"), Err(BadHash::Weak)),
            (phc("m=7167,t=20,p=1"), Err(BadHash::Weak)),
            (phc("m=47103,t=1,p=1"), Err(BadHash::Weak)),
            (phc("m=8,t=1,p=1"), Err(BadHash::Weak)),
            (phc("m=1048577,t=2,p=1"), Err(BadHash::Heavy)),
            (phc("m=4294967295,t=4294967295,p=1"), Err(BadHash::Heavy)),
            (phc("m=19456,t=21,p=1"), Err(BadHash::Heavy)),
            (phc("m=19456,t=2,p=17"), Err(BadHash::Heavy)),
            (phc("m=19456,t=2,p=0"), Err(BadHash::Form)),
            (phc("m=19456,t=2"), Err(BadHash::Form)),
            (phc("t=2,p=1"), Err(BadHash::Form)),
            (phc("m=19456,t=two,p=1"), Err(BadHash::Form)),
            (phc("m=99999999999,t=2,p=1"), Err(BadHash::Form)),
            (phc("m=19456,t=2,p=1,x=1"), Err(BadHash::Form)),
            (format!("$argon2id$v=16$m=19456,t=2,p=1${SALT}${HASH}"), Err(BadHash::Scheme)),
            (format!("$argon2id$m=19456,t=2,p=1${SALT}${HASH}"), Err(BadHash::Scheme)),
            (format!("$argon2i$v=19$m=19456,t=2,p=1${SALT}${HASH}"), Err(BadHash::Scheme)),
            (format!("$argon2d$v=19$m=19456,t=2,p=1${SALT}${HASH}"), Err(BadHash::Scheme)),
            (format!("$argon2id$v=19$m=19456,t=2,p=1${SALT}$c2hvcnQgaGFzaCE"), Err(BadHash::Weak)),
            (format!("$argon2id$v=19$m=19456,t=2,p=1$c2FsdA${HASH}"), Err(BadHash::Form)),
            (format!("$argon2id$v=19$m=19456,t=2,p=1${SALT}"), Err(BadHash::Form)),
            (format!("{}$more", phc("m=19456,t=2,p=1")), Err(BadHash::Form)),
            (format!("{}=", phc("m=19456,t=2,p=1")), Err(BadHash::Form)),
            ("$2y$12$abcdefghijklmnopqrstuuabcdefghijklmnopqrstuvwxyzabcdefghi".to_owned(), Err(BadHash::Scheme)),
            ("$argon2id$...".to_owned(), Err(BadHash::Form)),
            ("secret".to_owned(), Err(BadHash::Form)),
            (String::new(), Err(BadHash::Form)),
        ];
        for (text, expected) in cases {
            assert_eq!(StoredHash::parse(text).map(|_| ()), *expected, "{text:?}");
        }
    }

    #[test]
    fn the_dummy_costs_what_the_costliest_costs() {
        let hashes = ["m=19456,t=2,p=1", "m=65536,t=3,p=4", "m=47104,t=1,p=1"]
            .map(|params| StoredHash::parse(&phc(params)).unwrap());
        let dummy = StoredHash::dummy(hashes.iter());
        assert_eq!((dummy.params.m_cost(), dummy.params.t_cost(), dummy.params.p_cost()), (65_536, 3, 4));
        let dummy = StoredHash::dummy(std::iter::empty());
        assert_eq!((dummy.params.m_cost(), dummy.params.t_cost()), (19_456, 2), "also when nobody is known");
        assert_eq!(format!("{dummy:?}"), "StoredHash(..)");
    }

    /// Hashes of the library's own making, as another program would have put them into the file.
    #[test]
    fn every_strength_is_checked_with_whatever_memory_is_at_hand() {
        let mut memory = vec![Block::new(); 3];
        memory.iter_mut().for_each(|block| block.as_mut().fill(u64::MAX));
        for (memory_kib, passes, lanes, length) in
            [(7_168, 5, 1, 32), (9_216, 4, 3, 16), (12_288, 3, 16, 64), (7_168, 5, 2, 24)]
        {
            let params = Params::new(memory_kib, passes, lanes, Some(length)).unwrap();
            let phc: PasswordHash = argon2id(params).hash_password(b"correct horse").unwrap();
            let stored = StoredHash::parse(&phc.to_string()).unwrap();
            assert_eq!(stored.verify("correct horse", &mut memory), Ok(true), "{phc}");
            assert_eq!(stored.verify("correct house", &mut memory), Ok(false), "{phc}");
        }
    }

    #[tokio::test]
    async fn memory_is_used_again_and_is_empty_meanwhile() {
        let hashing = Hashing::new(2);
        let usual = StoredHash::parse(&phc("m=19456,t=2,p=1")).unwrap();
        let costly = StoredHash::parse(&phc("m=32768,t=2,p=1")).unwrap();
        let kept = || hashing.memory.0.lock().iter().map(Vec::len).collect::<Vec<_>>();
        for _ in 0..3 {
            assert_eq!(hashing.verify("x".to_owned(), usual.clone()).await, Ok(false));
            assert_eq!(kept(), [19_456], "one at a time needs one piece");
        }
        let address = |hashing: &Hashing| hashing.memory.0.lock()[0].as_ptr().addr();
        let before = address(&hashing);
        assert_eq!(hashing.verify("x".to_owned(), usual.clone()).await, Ok(false));
        assert_eq!(address(&hashing), before, "the same piece");
        assert!(hashing.memory.0.lock().iter().flatten().all(|block| *block.as_ref() == *Block::new().as_ref()));

        let (one, other) =
            tokio::join!(hashing.verify("x".to_owned(), usual.clone()), hashing.verify("x".to_owned(), usual.clone()));
        assert_eq!((one, other), (Ok(false), Ok(false)));
        assert!(kept().len() <= 2, "no more pieces than places: {:?}", kept());
        for _ in 0..2 {
            assert_eq!(hashing.verify("x".to_owned(), costly.clone()).await, Ok(false));
        }
        assert!(kept().iter().all(|blocks| *blocks <= KEPT_KIB_MAX), "what a costly hash took is given back");
    }

    #[tokio::test]
    async fn beyond_the_queue_a_login_is_told_to_come_back() {
        let hashing = Hashing::new(1);
        let all = hashing.fill();
        let hash = StoredHash::dummy(std::iter::empty());
        assert_eq!(hashing.verify("x".to_owned(), hash.clone()).await, Err(Busy));
        hashing.free(all);
        assert_eq!(hashing.verify("x".to_owned(), hash).await, Ok(false), "with room again it is computed");
    }

    #[tokio::test]
    async fn waiting_has_an_end() {
        let hashing = Hashing { wait_max: Duration::ZERO, ..Hashing::new(1) };
        let _place = hashing.computing.try_acquire().unwrap();
        let hash = StoredHash::dummy(std::iter::empty());
        assert_eq!(hashing.verify("x".to_owned(), hash).await, Err(Busy));
    }
}
