//! Whose turn is it? Strict round robin, passing over the dead.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Backend, Pool};

/// A request is offered to at most this many backends: the later failures are more likely ours than theirs.
pub const ATTEMPTS_MAX: usize = 8;

/// The backends that failed this request already.
#[derive(Debug, Default)]
pub struct Tried {
    indexes: [usize; ATTEMPTS_MAX],
    len: usize,
}

impl Tried {
    fn add(&mut self, index: usize) {
        if let Some(slot) = self.indexes.get_mut(self.len) {
            *slot = index;
            self.len += 1;
        }
    }

    /// The last one did nothing wrong but close a connection that it had kept: it may be tried again.
    pub fn forget_last(&mut self) {
        self.len = self.len.saturating_sub(1);
    }

    fn contains(&self, index: usize) -> bool {
        self.indexes[..self.len].contains(&index)
    }
}

impl Pool {
    /// The next backend in turn that this request has not tried. Resting ones come last, unresolved ones never.
    pub fn next(&self, tried: &mut Tried) -> Option<&Arc<Backend>> {
        let backends = self.backends();
        if tried.len == ATTEMPTS_MAX || backends.is_empty() {
            return None;
        }
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..backends.len()).map(|step| first.wrapping_add(step) % backends.len());
        let mut resting = None;
        for index in in_turn {
            let backend = &backends[index];
            if tried.contains(index) || backend.addresses.load().is_empty() {
                continue;
            }
            if !backend.is_resting() {
                tried.add(index);
                return Some(backend);
            }
            resting = resting.or(Some(index));
        }
        let index = resting?;
        tried.add(index);
        Some(&backends[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(backends: &[&str]) -> Pool {
        let list = backends.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(",");
        Pool::new("app", &toml::from_str(&format!("backends = [{list}]")).unwrap())
    }

    fn next(pool: &Pool) -> Option<String> {
        pool.next(&mut Tried::default()).map(|backend| backend.name().to_owned())
    }

    const THREE: [&str; 3] = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"];

    #[test]
    fn backends_take_strict_turns() {
        let pool = pool(&THREE);
        let turns: Vec<_> = (0..6).filter_map(|_| next(&pool)).collect();
        assert_eq!(turns, [THREE, THREE].concat(), "each once before any twice");
    }

    #[test]
    fn one_request_never_tries_a_backend_twice() {
        let pool = pool(&THREE);
        let mut tried = Tried::default();
        let mut names: Vec<_> = std::iter::from_fn(|| pool.next(&mut tried)).map(|b| b.name().to_owned()).collect();
        names.sort();
        assert_eq!(names, THREE, "every backend once, then none");
    }

    #[test]
    fn a_resting_backend_is_passed_over_until_it_is_the_last() {
        let pool = pool(&THREE);
        pool.backends()[0].rest();
        let turns: Vec<_> = (0..4).filter_map(|_| next(&pool)).collect();
        assert!(!turns.contains(&THREE[0].to_owned()), "{turns:?}");
        pool.backends()[1].rest();
        pool.backends()[2].rest();
        assert!(next(&pool).is_some(), "when all rest, all are tried");
        pool.backends()[0].wake();
        assert_eq!(next(&pool).as_deref(), Some(THREE[0]), "one that answered is back");
    }

    #[test]
    fn an_unresolved_backend_gets_no_request() {
        let pool = pool(&["nowhere.invalid:80", "127.0.0.1:2"]);
        assert!((0..4).all(|_| next(&pool).as_deref() == Some("127.0.0.1:2")));
    }

    #[test]
    fn attempts_end() {
        let many: Vec<_> = (1..=20).map(|port| format!("127.0.0.1:{port}")).collect();
        let pool = pool(&many.iter().map(String::as_str).collect::<Vec<_>>());
        let mut tried = Tried::default();
        assert_eq!(std::iter::from_fn(|| pool.next(&mut tried)).count(), ATTEMPTS_MAX);
    }
}
