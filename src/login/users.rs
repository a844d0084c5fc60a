//! Who may log in with a password? The users file: one table per user, all mistakes told at once.
//!
//! ```toml
//! [alice]
//! password = "$argon2id$..."   # from `cloakroom hash-password`
//! name = "Alice"
//! email = "alice@example.org"
//! groups = ["staff"]
//! disabled = false
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::hash::StoredHash;
use crate::config::error::{ConfigError, Problems};
use crate::identity::{Identity, Known};

/// Everybody in the file. Read again as a whole, never changed.
pub struct Users {
    by_name: HashMap<String, User>,
    /// What a password is checked against when nobody has the name.
    dummy: StoredHash,
    edition: u64,
}

/// A user name in the one form that look-ups and counters share: without white space around it, at most 256 bytes, no
/// control characters. Upper and lower case differ in a look-up, but never in a count ([`Self::folded`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName(String);

/// What the file knows of a name, in a shape that takes the same work for every name.
pub(super) struct Candidate<'u> {
    /// The user's own, or one that no password has.
    pub(super) hash: &'u StoredHash,
    pub(super) standing: Standing<'u>,
}

pub(super) enum Standing<'u> {
    Enabled(&'u Arc<Known>),
    Disabled,
    Unknown,
}

struct User {
    identity: Arc<Known>,
    hash: StoredHash,
    disabled: bool,
}

/// Any text of the file: it ends up in a header of a request.
const TEXT_BYTES_MAX: usize = 256;
const GROUPS_MAX: usize = 256;
const KEYS: &str = "`password`, `name`, `email`, `groups` or `disabled`";
const HOW_TO_HASH: &str = "make one with `cloakroom hash-password`";

impl Users {
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::unreadable(path, &error))?;
        Self::parse(path, &text)
    }

    /// `path` is only for the messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let printable = without_secrets(text);
        let mut problems = Problems::in_file(path, &printable);
        let (table, errors) = DeTable::parse_recoverable(text);
        let broken = !errors.is_empty();
        for error in errors {
            problems.add(error.span().unwrap_or(0..0), error.message());
        }
        // In a file that could only be read in part every further problem is a guess.
        let users = if broken { Vec::new() } else { Reader { problems: &mut problems }.users(table.get_ref()) };
        let dummy = StoredHash::dummy(users.iter().map(|user| &user.hash));
        let by_name = users.into_iter().map(|user| (user.identity.user.clone(), user)).collect();
        problems.into_result(Self { by_name, dummy, edition: next_edition() })
    }

    /// Which of all lists that this process has read.
    pub fn edition(&self) -> u64 {
        self.edition
    }

    /// The identity of an existing, enabled user, as the file says now.
    ///
    /// Asked at every request of a session that began with a password: a new group, a disabled or a removed user take
    /// effect when the file is read again, on every session, without touching the store.
    pub fn current(&self, user: &str) -> Option<&Arc<Known>> {
        self.by_name.get(user).filter(|user| !user.disabled).map(|user| &user.identity)
    }

    /// How many are new since `previous`, how many are gone, and of how many something is different; none when nothing is.
    pub(super) fn difference(&self, previous: &Self) -> Option<String> {
        let is_in = |users: &Self, user: &User| users.by_name.contains_key(&user.identity.user);
        let added = self.by_name.values().filter(|user| !is_in(previous, user)).count();
        let removed = previous.by_name.values().filter(|user| !is_in(self, user)).count();
        let old_and_new = self.by_name.iter().filter_map(|(name, user)| Some((previous.by_name.get(name)?, user)));
        let changed = old_and_new.filter(|(old, new)| !new.is_as(old)).count();
        let counts = [(added, "added"), (removed, "removed"), (changed, "changed")].into_iter();
        let told: Vec<_> =
            counts.filter(|(count, _)| *count != 0).map(|(count, what)| format!("{count} {what}")).collect();
        (!told.is_empty()).then(|| told.join(", "))
    }

    pub(super) fn knows(&self, name: &UserName) -> bool {
        self.by_name.contains_key(&name.0)
    }

    pub(super) fn candidate(&self, name: &UserName) -> Candidate<'_> {
        match self.by_name.get(&name.0) {
            Some(User { identity, hash, disabled: false }) => Candidate { hash, standing: Standing::Enabled(identity) },
            Some(User { disabled: true, .. }) => Candidate { hash: &self.dummy, standing: Standing::Disabled },
            None => Candidate { hash: &self.dummy, standing: Standing::Unknown },
        }
    }
}

impl User {
    fn is_as(&self, other: &Self) -> bool {
        let Self { identity, hash, disabled } = self;
        **identity == *other.identity && *hash == other.hash && *disabled == other.disabled
    }
}

fn next_edition() -> u64 {
    static EDITIONS: AtomicU64 = AtomicU64::new(0);
    EDITIONS.fetch_add(1, Ordering::Relaxed)
}

impl Default for Users {
    /// Nobody.
    fn default() -> Self {
        Self { by_name: HashMap::new(), dummy: StoredHash::dummy(std::iter::empty()), edition: next_edition() }
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Users").field("count", &self.by_name.len()).finish_non_exhaustive()
    }
}

impl UserName {
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.trim();
        let is_name = !name.is_empty() && name.len() <= TEXT_BYTES_MAX && !name.contains(char::is_control);
        is_name.then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// One text for all spellings that differ in case alone.
    pub fn folded(&self) -> String {
        self.0.to_lowercase()
    }
}

/// Walks the file and notes what is wrong on the way. What is wrong is left out; the problems keep the result back.
struct Reader<'p, 't> {
    problems: &'p mut Problems<'t>,
}

type Place = Range<usize>;

impl Reader<'_, '_> {
    fn users(&mut self, table: &DeTable<'_>) -> Vec<User> {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let mut folded = BTreeMap::new();
        let mut users = Vec::new();
        for (name, value) in entries {
            let parsed = UserName::parse(name.get_ref()).filter(|parsed| parsed.as_str() == name.get_ref());
            let Some(parsed) = parsed else {
                let message = "not a user name: 1 to 256 bytes, without control characters or white space around it";
                self.problems.add(name.span(), message);
                continue;
            };
            if let Some(other) = folded.insert(parsed.folded(), parsed.clone()) {
                let message = format!("user {:?} differs from {:?} in case alone", parsed.as_str(), other.as_str());
                self.problems.add(name.span(), message);
            }
            let DeValue::Table(fields) = value.get_ref() else {
                let message = format!("expected a table of a user, found {}", value.get_ref().type_str());
                self.problems.add(value.span(), message).hint("each user is a table, e.g. [alice]");
                continue;
            };
            users.extend(self.user(&parsed, name.span(), fields));
        }
        users
    }

    fn user(&mut self, name: &UserName, at: Place, fields: &DeTable<'_>) -> Option<User> {
        let mut identity = Identity { user: name.as_str().to_owned(), ..Identity::default() };
        let (mut password, mut disabled) = (None, false);
        for (key, value) in fields {
            match key.get_ref().as_ref() {
                "password" => password = Some(self.hash(value)),
                "name" => identity.name = self.text(value),
                "email" => identity.email = self.text(value),
                "groups" => identity.groups = self.groups(value),
                "disabled" => match value.get_ref().as_bool() {
                    Some(flag) => disabled = flag,
                    None => self.wrong_type(value, "true or false"),
                },
                unknown => {
                    self.problems.add(key.span(), format!("unknown key `{unknown}`, expected {KEYS}"));
                }
            }
        }
        let Some(password) = password else {
            self.problems.add(at, format!("user {:?} has no password", name.as_str())).hint(HOW_TO_HASH);
            return None;
        };
        Some(User { identity: Arc::new(Known::new(identity)), hash: password?, disabled })
    }

    fn hash(&mut self, value: &Spanned<DeValue<'_>>) -> Option<StoredHash> {
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(value, "a password hash");
            return None;
        };
        match StoredHash::parse(text) {
            Ok(hash) => Some(hash),
            Err(bad) => {
                self.problems.add(value.span(), bad.to_string()).hint(HOW_TO_HASH);
                None
            }
        }
    }

    fn text(&mut self, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(value, "a text");
            return None;
        };
        if text.trim().is_empty() || TEXT_BYTES_MAX < text.len() || text.contains(char::is_control) {
            self.problems.add(value.span(), "expected 1 to 256 bytes without control characters");
            return None;
        }
        Some(text.to_owned())
    }

    fn groups(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<String> {
        let Some(groups) = value.get_ref().as_array() else {
            self.wrong_type(value, "a list of groups, e.g. [\"staff\"]");
            return Vec::new();
        };
        if GROUPS_MAX < groups.len() {
            self.problems.add(value.span(), format!("more than {GROUPS_MAX} groups"));
        }
        groups.iter().filter_map(|group| self.text(group)).collect()
    }

    fn wrong_type(&mut self, value: &Spanned<DeValue<'_>>, expected: &str) {
        self.problems.add(value.span(), format!("expected {expected}, found {}", value.get_ref().type_str()));
    }
}

/// The file with every value starred out that may be a password or a hash, byte for byte as long: problems show lines of
/// it, on a terminal and, after a reload, in the log.
fn without_secrets(text: &str) -> String {
    let is_open = |line: &str| {
        let key = line.split_once('=').map_or("", |(key, _)| key.trim());
        line.trim_start().starts_with('[') || matches!(key, "name" | "email" | "groups" | "disabled")
    };
    let starred = |line: &str| -> String {
        let value = line.find('=').map_or(0, |equals| equals + 1);
        let (key, value) = line.split_at(value);
        let is_shape = |c: char| c.is_whitespace() || matches!(c, '"' | '\'');
        let stars = value.chars().map(|c| if is_shape(c) { c.to_string() } else { "*".repeat(c.len_utf8()) });
        key.to_owned() + &stars.collect::<String>()
    };
    text.split_inclusive('\n').map(|line| if is_open(line) { line.to_owned() } else { starred(line) }).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::login) const HASH: &str =
        "$argon2id$v=19$m=19456,t=2,p=1$c2l4dGVlbiBvZiBzYWx0IQ$bm8gcGFzc3dvcmQgaGFzIHRoaXMgdmVyeSBoYXNoISE";

    fn parse(text: &str) -> Result<Users, String> {
        Users::parse(Path::new("users.toml"), &text.replace("HASH", HASH)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_of_users_is_read_whole() {
        let users = parse(
            "[alice]\npassword = \"HASH\"\nname = \"Alice\"\nemail = \"alice@example.org\"\ngroups = [\"staff\"]\n\
             [bob]\npassword = \"HASH\"\n[carol]\npassword = \"HASH\"\ndisabled = true\n[\"dörte k\"]\npassword = \"HASH\"",
        )
        .unwrap();

        let alice = users.current("alice").unwrap();
        assert_eq!(alice.name.as_deref(), Some("Alice"));
        assert_eq!(alice.email.as_deref(), Some("alice@example.org"));
        assert_eq!(alice.groups, ["staff"]);
        assert_eq!(users.current("bob").unwrap().groups, [""; 0]);
        assert_eq!(users.current("dörte k").unwrap().user, "dörte k");
        for nobody in ["carol", "Alice", "alice ", "", "mallory"] {
            assert!(users.current(nobody).is_none(), "{nobody:?} is nobody who may come in");
        }
    }

    #[test]
    fn an_empty_file_is_a_valid_one() {
        assert!(parse("").unwrap().current("alice").is_none());
        assert!(parse("# nobody yet\n").is_ok());
    }

    #[test]
    fn every_mistake_is_told_with_its_place() {
        let cases = [
            ("[a]", "1:2: user \"a\" has no password"),
            ("[a]\npassword = \"secret\"", "2:12: not a password hash of the form"),
            ("[a]\npassword = \"$2y$10$x\"", "2:12: this password hash is not argon2id"),
            (
                "[a]\npassword = \"$argon2id$v=19$m=4096,t=3,p=1$c2l4dGVlbiBvZiBzYWx0IQ$bm8gcGFzc3dvcmQgaGFzIHRoaXMgdmVyeSBoYXNoISE\"",
                "2:12: this password hash is too weak",
            ),
            ("[a]\npassword = 7", "2:12: expected a password hash, found integer"),
            ("[a]\npassword = \"HASH\"\npasword = \"x\"", "3:1: unknown key `pasword`, expected `password`, `name`"),
            ("[a]\npassword = \"HASH\"\ngroups = \"staff\"", "3:10: expected a list of groups"),
            ("[a]\npassword = \"HASH\"\ngroups = [\"staff\", \"\"]", "3:20: expected 1 to 256 bytes"),
            ("[a]\npassword = \"HASH\"\ngroups = [1]", "3:11: expected a text, found integer"),
            ("[a]\npassword = \"HASH\"\nname = \"a\\nb\"", "3:8: expected 1 to 256 bytes"),
            ("[a]\npassword = \"HASH\"\nemail = \"\"", "3:9: expected 1 to 256 bytes"),
            ("[a]\npassword = \"HASH\"\ndisabled = \"yes\"", "3:12: expected true or false, found string"),
            ("[\"\"]\npassword = \"HASH\"", "1:2: not a user name"),
            ("[\" a\"]\npassword = \"HASH\"", "1:2: not a user name"),
            ("[\"a\\u0007\"]\npassword = \"HASH\"", "1:2: not a user name"),
            ("[a]\npassword = \"HASH\"\n[A]\npassword = \"HASH\"", "differs from \"a\" in case alone"),
            ("a = 1", "1:5: expected a table of a user, found integer"),
            ("[a]\n[a]", "2:2: "),
            ("[a", "users.toml:1:"),
            ("[a]\npassword = \"HASH\"\n[a.b]\nc = 1", "3:4: unknown key `b`"),
        ];
        for (text, expected) in cases {
            let error = parse(text).map(|_| ()).unwrap_err();
            assert!(error.contains(expected), "{text:?} should say {expected:?}, says:\n{error}");
            assert!(error.contains('^'), "a caret shows the place:\n{error}");
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once_and_in_order() {
        let error =
            parse("[a]\npassword = \"x\"\ncolour = 1\n[b]\nname = \"\"\n[c]\npassword = \"HASH\"\n").unwrap_err();
        let places: Vec<&str> = error.lines().filter_map(|line| line.strip_prefix("error: users.toml:")).collect();
        let lines: Vec<&str> = places.iter().filter_map(|place| place.split(':').next()).collect();
        assert_eq!(lines, ["2", "3", "4", "5"], "{error}");
        assert!(error.contains("hint: make one with `cloakroom hash-password`"), "{error}");
    }

    #[test]
    fn no_message_shows_a_password_or_a_hash() {
        let cases = [
            "[a]\npassword = \"hunter2\"",
            "[a]\npassword = 'hunter2é'  ",
            "[a]\npasword = \"hunter2\"",
            "[a]\npassword = hunter2",
            "[a]\npassword = \"hunter2",
            "[a]\npassword = \"\"\"\nhunter2\"\"\"",
            "[a]\npassword hunter2",
            "a = { password = \"hunter2\" }",
            "a.password = \"hunter2\"",
            "a = \"hunter2\"",
        ];
        for text in cases {
            let error = parse(text).map(|_| ()).unwrap_err();
            assert!(!error.contains("hunter2"), "{text:?} tells on the terminal:\n{error}");
        }
        let error = parse("[a]\npassword = \"HASH\"\ngroups = [\"staff\", \"\"]").unwrap_err();
        assert!(error.contains("3 | groups = [\"staff\", \"\"]"), "what is no secret is shown:\n{error}");
    }

    #[test]
    fn a_missing_file_says_so() {
        let error = Users::load(Path::new("/nonexistent/users.toml")).unwrap_err().to_string();
        assert!(error.starts_with("error: /nonexistent/users.toml: cannot be read"), "{error}");
    }

    #[test]
    fn a_new_edition_tells_how_many_it_changes() {
        let old = parse("[a]\npassword = \"HASH\"\n[b]\npassword = \"HASH\"\n[c]\npassword = \"HASH\"").unwrap();
        for (text, expected) in [
            ("# a remark\n[c]\npassword = \"HASH\"\n[a]\npassword = \"HASH\"\n[b]\npassword = \"HASH\"", None),
            ("[a]\npassword = \"HASH\"\n[d]\npassword = \"HASH\"", Some("1 added, 2 removed")),
            (
                "[a]\npassword = \"HASH\"\ndisabled = true\n[b]\npassword = \"HASH\"\ngroups = [\"x\"]\n[c]\npassword = \"HASH\"",
                Some("2 changed"),
            ),
            ("", Some("3 removed")),
        ] {
            assert_eq!(parse(text).unwrap().difference(&old).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn users_print_no_hash() {
        let users = parse("[alice]\npassword = \"HASH\"").unwrap();
        assert!(!format!("{users:?}").contains("argon2id"));
    }

    #[test]
    fn a_name_has_one_form() {
        let cases =
            [("alice", Some("alice")), (" alice\t", Some("alice")), ("Alice", Some("Alice")), ("", None), (" ", None)];
        for (text, expected) in cases {
            assert_eq!(UserName::parse(text).as_ref().map(UserName::as_str), expected, "{text:?}");
        }
        assert!(UserName::parse(&"a".repeat(256)).is_some());
        assert!(UserName::parse(&"a".repeat(257)).is_none());
        assert!(UserName::parse("a\0b").is_none());
        assert_eq!(UserName::parse("ALICE").unwrap().folded(), UserName::parse("alice").unwrap().folded());
    }
}
