//! What may a backend note in a session? Texts under names: so many, so long, and some of them for a while only.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::fallback::millis;
use super::record::Attribute;

/// Attributes of one session.
pub const ATTRIBUTES_MAX: usize = 64;
/// One value.
pub const VALUE_BYTES_MAX: usize = 4 << 10;
/// One name.
pub const NAME_BYTES_MAX: usize = 64;
/// All names and values of one session.
pub const ATTRIBUTES_BYTES_MAX: usize = 16 << 10;

/// What is to become of a session's attributes. Others than those named stay as they are, so that two backends that
/// write at the same time do not undo each other's work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// These go, before the others come.
    pub unset: Vec<String>,
    pub set: BTreeMap<String, Setting>,
}

/// A new value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub value: String,
    /// It ends so long after it was set; without, with its session.
    pub time: Option<Duration>,
}

/// More than a session holds. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    Number,
    Name,
    Value,
    Total,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.unset.is_empty() && self.set.is_empty()
    }

    /// What a session with these attributes has afterwards. `now`: Unix time in ms; what has ended by then goes as well.
    pub fn apply(
        &self,
        attributes: &BTreeMap<String, Attribute>,
        now: u64,
    ) -> Result<BTreeMap<String, Attribute>, Excess> {
        let stays =
            |name: &String, held: &Attribute| !self.unset.contains(name) && held.ends.is_none_or(|end| now < end);
        let kept = attributes.iter().filter(|(name, held)| stays(name, held));
        let mut after: BTreeMap<_, _> = kept.map(|(name, held)| (name.clone(), held.clone())).collect();
        for (name, Setting { value, time }) in &self.set {
            if NAME_BYTES_MAX < name.len() {
                return Err(Excess::Name);
            }
            if VALUE_BYTES_MAX < value.len() {
                return Err(Excess::Value);
            }
            let ends = time.map(|time| now.saturating_add(millis(time)));
            after.insert(name.clone(), Attribute { value: value.clone(), ends });
        }
        if ATTRIBUTES_MAX < after.len() {
            return Err(Excess::Number);
        }
        let bytes: usize = after.iter().map(|(name, held)| name.len() + held.value.len()).sum();
        if ATTRIBUTES_BYTES_MAX < bytes { Err(Excess::Total) } else { Ok(after) }
    }
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number => write!(f, "more than {ATTRIBUTES_MAX} attributes"),
            Self::Name => write!(f, "a name of more than {NAME_BYTES_MAX} bytes"),
            Self::Value => write!(f, "a value of more than {VALUE_BYTES_MAX} bytes"),
            Self::Total => write!(f, "more than {ATTRIBUTES_BYTES_MAX} bytes of attributes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(unset: &[&str], set: &[(&str, &str, Option<u64>)]) -> Changes {
        let setting =
            |time: &Option<u64>, value: &str| Setting { value: value.into(), time: time.map(Duration::from_secs) };
        Changes {
            unset: unset.iter().map(|&name| name.to_owned()).collect(),
            set: set.iter().map(|(name, value, time)| ((*name).to_owned(), setting(time, value))).collect(),
        }
    }

    fn told(attributes: &BTreeMap<String, Attribute>) -> String {
        let each = attributes.iter().map(|(name, held)| format!("{name}={}{:?}", held.value, held.ends.unwrap_or(0)));
        each.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_is_not_named_stays_and_what_has_ended_goes() {
        let before = changes(&[], &[("a", "1", None), ("b", "2", Some(10)), ("c", "3", None)]);
        let before = before.apply(&BTreeMap::new(), 1_000).unwrap();
        assert_eq!(told(&before), "a=10 b=211000 c=30");
        let cases = [
            (changes(&[], &[]), 2_000, "a=10 b=211000 c=30"),
            (changes(&["a", "x"], &[]), 2_000, "b=211000 c=30"),
            (changes(&[], &[("a", "9", Some(1))]), 2_000, "a=93000 b=211000 c=30"),
            (changes(&[], &[("b", "9", None)]), 2_000, "a=10 b=90 c=30"),
            (changes(&["a"], &[("a", "9", None)]), 2_000, "a=90 b=211000 c=30"),
            (changes(&[], &[("d", "", None)]), 11_000, "a=10 c=30 d=0"),
        ];
        for (changes, now, expected) in cases {
            assert_eq!(told(&changes.apply(&before, now).unwrap()), expected, "{changes:?}");
        }
    }

    #[test]
    fn a_session_holds_so_much_and_no_more() {
        let names: Vec<_> = (0..65).map(|n| format!("n{n}")).collect();
        let many = |count: usize, bytes: usize| {
            let value = "x".repeat(bytes);
            changes(&[], &names[..count].iter().map(|name| (name.as_str(), value.as_str(), None)).collect::<Vec<_>>())
        };
        let long = |bytes: usize| changes(&[], &[(&*"n".repeat(bytes), "", None)]);
        let cases = [
            (many(64, 1), Ok(64)),
            (many(65, 1), Err(Excess::Number)),
            (many(1, 4096), Ok(1)),
            (many(1, 4097), Err(Excess::Value)),
            (many(3, 4096), Ok(3)),
            (many(4, 4096), Err(Excess::Total)),
            (long(64), Ok(1)),
            (long(65), Err(Excess::Name)),
        ];
        for (changes, expected) in cases {
            let after = changes.apply(&BTreeMap::new(), 0).map(|after| after.len());
            assert_eq!(after, expected, "{} of them", changes.set.len());
        }
        let full = many(64, 1).apply(&BTreeMap::new(), 0).unwrap();
        assert!(changes(&["n0"], &[("new", "1", None)]).apply(&full, 0).is_ok(), "what goes makes room");
        assert!(changes(&[], &[("n0", "2", None)]).apply(&full, 0).is_ok(), "a new value takes the old one's place");
    }
}
