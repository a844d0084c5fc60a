//! What is wrong with a file: every problem with its line, its column, the line itself, a caret and a hint.
//!
//! A shown line may hold a password: `without_secrets` covers it before it is kept.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One mistake of the operator's, ready to print.
#[derive(Clone, Debug)]
pub struct Problem {
    file: PathBuf,
    place: Option<Place>,
    message: String,
    hint: Option<String>,
}

/// Everything that is wrong; never empty.
#[derive(Clone, Debug)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

/// Gathers the problems of one file, so that all are told at once.
pub struct Problems<'t> {
    file: &'t Path,
    text: &'t str,
    list: Vec<Problem>,
}

#[derive(Clone, Debug)]
struct Place {
    line: usize,
    column: usize,
    text: String,
    width: usize,
}

impl<'t> Problems<'t> {
    pub fn in_file(file: &'t Path, text: &'t str) -> Self {
        Self { file, text, list: Vec::new() }
    }

    /// `at`: bytes of the file, as `toml::Spanned::span` gives them; `0..0` means a default, and shows no line.
    pub fn add(&mut self, at: Range<usize>, message: impl Into<String>) -> &mut Problem {
        let place = (at != (0..0)).then(|| Place::of(self.text, &at));
        let message = without_secrets(&message.into());
        self.list.push(Problem { file: self.file.to_owned(), place, message, hint: None });
        self.list.last_mut().expect("just pushed")
    }

    /// What the TOML reader found: a slip of syntax, a wrong type, an unknown or a missing key.
    pub fn add_toml(&mut self, error: &toml::de::Error) {
        // An error at the very first byte must not be taken for a default.
        let at = error.span().map_or(0..0, |span| span.start..span.end.max(span.start + 1));
        let section = section_of(error);
        let mut message = in_words_of_the_file(error.message());
        if let Some(section) = section
            && (message.starts_with("missing key") || message.starts_with("unknown key") || at == (0..0))
        {
            let subject = message.find(',').unwrap_or(message.len());
            message.insert_str(subject, &format!(" in [{section}]"));
        }
        let written = error.span().and_then(|span| self.text.get(span)).unwrap_or_default();
        let hint = hint_for(error.message(), written);
        let problem = self.add(at, message);
        if let Some(hint) = hint {
            problem.hint(hint);
        }
    }

    /// `value`, when nothing is wrong.
    pub fn into_result<T>(mut self, value: T) -> Result<T, ConfigError> {
        self.list.sort_by_key(|problem| problem.place.as_ref().map_or((0, 0), |place| (place.line, place.column)));
        if self.list.is_empty() { Ok(value) } else { Err(ConfigError { problems: self.list }) }
    }

    /// The line on which a span begins, counted from 1, for a message that names a second place.
    pub(super) fn line_of(&self, at: &Range<usize>) -> usize {
        Place::of(self.text, at).line
    }
}

impl Problem {
    /// The next move.
    pub fn hint(&mut self, hint: impl Into<String>) {
        self.hint = Some(hint.into());
    }
}

impl ConfigError {
    /// A file that could not even be read.
    pub fn unreadable(file: &Path, error: &std::io::Error) -> Self {
        let message = format!("cannot be read: {error}");
        Self { problems: vec![Problem { file: file.to_owned(), place: None, message, hint: None }] }
    }

    /// One mistake that concerns a file as a whole.
    pub fn of_file(file: &Path, message: &str, hint: &str) -> Self {
        let (file, message, hint) = (file.to_owned(), message.to_owned(), Some(hint.to_owned()));
        Self { problems: vec![Problem { file, place: None, message, hint }] }
    }

    /// A file that is no TOML, or not of the type that was asked for.
    pub fn not_toml(file: &Path, text: &str, error: &toml::de::Error) -> Self {
        let mut problems = Problems::in_file(file, text);
        problems.add_toml(error);
        Self { problems: problems.list }
    }
}

impl Place {
    fn of(text: &str, at: &Range<usize>) -> Self {
        let start = char_boundary(text, at.start);
        let end = char_boundary(text, at.end).max(start);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let column = text[line_start..start].chars().count() + 1;
        let line = text[line_start..line_end].trim_end_matches('\r');
        let line = match secret_from(&text[..line_start], line).or_else(|| behind_secret_key(line)) {
            Some(from) => covered(line, |at| from <= at),
            None => without_secrets(line),
        };
        // The end of a line that is no line of a configuration helps nobody.
        let text_shown = line.chars().take(column.max(LINE_CHARACTERS_SHOWN)).collect();
        let width = text[start..end.min(line_end).max(start)].chars().count();
        Self {
            line: text[..start].matches('\n').count() + 1,
            column,
            text: text_shown,
            width: width.clamp(1, LINE_CHARACTERS_SHOWN),
        }
    }
}

const LINE_CHARACTERS_SHOWN: usize = 200;

/// The last boundary between characters that is not behind `index`.
fn char_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// Keys whose value is not to be shown, in whichever file: the store's URL, a user's password hash, and what else is a
/// secret in [`super::model`].
const SECRET_KEYS: [&str; 5] = ["url", "password", "token", "client_secret", "webhook_secret"];

/// `[tracing.headers]`: every value in it is secret, whatever it is called.
const SECRET_SECTION: [&str; 2] = ["tracing", "headers"];

/// `text` with secrets covered by `*`: the value of a secret key, and the password of any URL. The number of
/// characters stays, so that a caret still points where it should. Control characters go too: what a file holds must
/// not steer the reader's terminal.
fn without_secrets(text: &str) -> String {
    let hidden = secret_value(text).into_iter().chain(url_password(text)).collect::<Vec<_>>();
    covered(text, |at| hidden.iter().any(|range| range.contains(&at)))
}

fn covered(text: &str, is_secret: impl Fn(usize) -> bool) -> String {
    let cover = |(at, c): (usize, char)| match c {
        _ if is_secret(at) => '*',
        '\t' => '\t',
        _ if c.is_control() => char::REPLACEMENT_CHARACTER,
        _ => c,
    };
    text.char_indices().map(cover).collect()
}

/// Where a line of [`SECRET_SECTION`] may hold secrets, and all behind; `before` is the file up to the line. The section may
/// be written in any way, so what speaks of it since the last heading counts; too much is covered rather than too little.
fn secret_from(before: &str, line: &str) -> Option<usize> {
    let is_first_of_line =
        |at: &usize| before[..*at].trim_end_matches([' ', '\t']).bytes().last().is_none_or(|b| b == b'\n');
    let heading = before.match_indices('[').map(|(at, _)| at).rfind(is_first_of_line).unwrap_or(0);
    let is_within = SECRET_SECTION.iter().all(|word| before[heading..].contains(word) || line.contains(word));
    // Behind no key, it is a later line of a longer text, or the `=` is one of the secret's own.
    let is_key = |text: &str| text.trim().chars().all(|c| c.is_ascii_alphanumeric() || "-_.\"'".contains(c));
    let value = || line.find('=').filter(|at| is_key(&line[..*at])).map_or(0, |at| at + 1);
    (is_within && !line.trim_start().starts_with('[')).then(value)
}

/// Behind a secret key that begins this line of a file, where no `=` follows: it was forgotten, or is another sign.
fn behind_secret_key(line: &str) -> Option<usize> {
    let bare = line.trim_start().trim_start_matches(['"', '\'']);
    let rest = SECRET_KEYS.iter().find_map(|key| bare.strip_prefix(key))?;
    let rest = rest.trim_start_matches(['"', '\'']);
    let is_key = !rest.starts_with(|c: char| c.is_alphanumeric() || "_-.".contains(c));
    (is_key && !rest.trim_start().starts_with('=')).then_some(line.len() - rest.len())
}

/// What stands behind `url =`, when it is the secret itself and no `{ file = ... }`.
fn secret_value(line: &str) -> Option<Range<usize>> {
    let (key, value) = line.match_indices('=').map(|(at, _)| line.split_at(at)).find(|(before, _)| {
        let key = before.trim_end().trim_end_matches(['"', '\'']);
        SECRET_KEYS.iter().any(|secret| {
            key.strip_suffix(secret).is_some_and(|rest| !rest.ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        })
    })?;
    let value_start = key.len() + 1;
    let blank = value[1..].len() - value[1..].trim_start().len();
    let is_reference = value[1..].trim_start().strip_prefix('{').is_some_and(|table| {
        let key = table.trim_start().trim_start_matches(['"', '\'']);
        key.starts_with("file") || key.starts_with("env")
    });
    (!is_reference && value_start + blank < line.len()).then_some(value_start + blank..line.len())
}

/// From the colon behind the user to the last `@`, since a password may hold anything by mistake.
fn url_password(text: &str) -> Option<Range<usize>> {
    let authority = text.find("://")? + "://".len();
    let colon = authority + text[authority..].find(':')? + 1;
    let at_sign = text.rfind('@')?;
    (colon < at_sign).then_some(colon..at_sign)
}

/// `store.redis` for a mistake inside `[store.redis]`. `toml` knows it, but tells it only in the last line of an error
/// that has lost its text.
fn section_of(error: &toml::de::Error) -> Option<String> {
    let mut bare = error.clone();
    bare.set_input(None);
    let text = bare.to_string();
    let (_, section) = text.trim_end().rsplit_once("\nin `")?;
    section.strip_suffix('`').map(str::to_owned)
}

/// serde speaks of Rust's types; the reader of the message has a TOML file before them.
fn in_words_of_the_file(message: &str) -> String {
    const WORDS: [(&str, &str); 13] = [
        ("missing field", "missing key"),
        ("unknown field", "unknown key"),
        ("unknown variant", "unknown value"),
        ("invalid type: map", "invalid type: a table"),
        ("invalid type: sequence", "invalid type: an array"),
        ("expected a sequence", "expected an array"),
        ("expected a map", "expected a table"),
        ("expected f64", "expected a number"),
        ("expected u16", "expected a whole number up to 65535"),
        ("expected usize", "expected a whole number"),
        ("expected u32", "expected a whole number"),
        ("expected path string", "expected a path in quotes"),
        ("expected a string", "expected a text in quotes"),
    ];
    let mut message = message.to_owned();
    for (theirs, ours) in WORDS {
        message = message.replacen(theirs, ours, 1);
    }
    match message.find("expected struct ") {
        Some(at) => message[..at].to_owned() + "expected a table",
        None => message,
    }
}

/// `written`: the part of the file that it is about.
fn hint_for(message: &str, written: &str) -> Option<String> {
    let is = |found: &str, wanted: &str| {
        let found = message.strip_prefix("invalid type: ").and_then(|rest| rest.strip_prefix(found));
        found.is_some_and(|rest| rest.ends_with(&format!(", expected {wanted}")))
    };
    if let Some(name) = written.strip_prefix("[[").and_then(|rest| rest.strip_suffix("]]")).map(str::trim)
        && is("sequence", "a map")
    {
        return match name {
            "pool" | "split" | "login.oidc" => Some(format!("each has a name of its own: write [{name}.NAME]")),
            _ => Some("write its name in single brackets: it is there once".to_owned()),
        };
    }
    if is("map", "a sequence") && written.starts_with('{') {
        return Some("a list stands in brackets, also of one: [{ ... }]".to_owned());
    }
    if is("string", "a sequence") {
        return Some("a list stands in brackets, also of one: [\"...\"]".to_owned());
    }
    if is("sequence", "a string") {
        return Some("one text stands here, and no list: leave the brackets out".to_owned());
    }
    if message.starts_with("invalid type: string") && message.contains(", expected struct ") {
        return Some("a table stands in braces: { key = ... }".to_owned());
    }
    if is("string", "f64") && written.contains('%') {
        return Some("a share is a number from 0 to 1: 10 percent is 0.1".to_owned());
    }
    if message == "invalid socket address syntax" {
        return Some("expected an IP address and a port, e.g. \"10.0.0.53:53\" or \"[fd00::53]:53\"".to_owned());
    }
    if message == "invalid type: map, expected a sequence" {
        return Some("write it in double brackets, e.g. [[listener]]: there may be several".to_owned());
    }
    // serde fills a section from an array, one key after the other, so that [[server]] is a table in place of `threads`.
    if message.starts_with("invalid type: map") {
        return Some("only [[listener]] and [[route]] are written in double brackets".to_owned());
    }
    if !message.starts_with("unknown field") && !message.starts_with("unknown variant") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let written = quoted.next()?;
    let nearest = quoted.min_by_key(|known| edit_distance(written, known))?;
    (edit_distance(written, nearest) <= written.chars().count().div_ceil(3))
        .then(|| format!("did you mean `{nearest}`?"))
}

/// How many characters must be changed, added or dropped to come from one word to the other (Levenshtein).
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row = (0..=to.chars().count()).collect::<Vec<_>>();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.chars().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.chars().count()]
}

/// `{:#}` is one line, for a log.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        if f.alternate() {
            write!(f, "{file}:")?;
            if let Some(Place { line, column, .. }) = &self.place {
                write!(f, "{line}:{column}:")?;
            }
            write!(f, " {}", self.message)?;
            return self.hint.as_ref().map_or(Ok(()), |hint| write!(f, " ({hint})"));
        }
        let Some(Place { line, column, text, width }) = &self.place else {
            write!(f, "error: {file}: {}", self.message)?;
            return self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n  hint: {hint}"));
        };
        let gutter = " ".repeat(line.to_string().len());
        // A tab stays a tab, so that the caret stands under the same column in every terminal.
        let indent = text.chars().chain(std::iter::repeat(' ')).map(|c| if c == '\t' { '\t' } else { ' ' });
        writeln!(f, "error: {file}:{line}:{column}: {}", self.message)?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{line} | {text}")?;
        write!(f, "{gutter} | {}{}", indent.take(column - 1).collect::<String>(), "^".repeat(*width))?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n{gutter} hint: {hint}"))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if 0 < index {
                f.write_str(if f.alternate() { "; " } else { "\n" })?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// The text stays out: it may hold secrets.
impl fmt::Debug for Problems<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Problems").field("file", &self.file).field("list", &self.list).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_told_in_the_order_of_the_file() {
        let (file, text) = (Path::new("a.toml"), "x = 1\ny = 2\n");
        let mut problems = Problems::in_file(file, text);
        problems.add(10..11, "second").hint("try 3");
        problems.add(4..5, "first");
        problems.add(0..0, "no place");

        let error = problems.into_result(()).unwrap_err();
        let expected = "error: a.toml: no place\n\
                        error: a.toml:1:5: first\n  |\n1 | x = 1\n  |     ^\n\
                        error: a.toml:2:5: second\n  |\n2 | y = 2\n  |     ^\n  hint: try 3";
        assert_eq!(error.to_string(), expected);
        let in_a_log = "a.toml: no place; a.toml:1:5: first; a.toml:2:5: second (try 3)";
        assert_eq!(format!("{error:#}"), in_a_log);
    }

    #[test]
    fn a_caret_stands_right_behind_tabs_wide_characters_and_carriage_returns() {
        let text = "\tkey = \"ü\" # ö\r\n";
        let mut problems = Problems::in_file(Path::new("a.toml"), text);
        problems.add(7..11, "message");
        let shown = problems.into_result(()).unwrap_err().to_string();
        assert!(shown.ends_with("1 | \tkey = \"ü\" # ö\n  | \t      ^^^"), "{shown}");
    }

    #[test]
    fn no_span_is_too_wild_for_a_place() {
        let text = "ä\n";
        for start in 0..6 {
            for end in 0..6 {
                let place = Place::of(text, &(start..end));
                assert!(1 <= place.line && 1 <= place.column && 1 <= place.width);
            }
        }
    }

    #[test]
    fn a_shown_line_or_message_never_holds_a_secret() {
        let lines = [
            "url = \"redis://:hunter2@redis:6379\"",
            "url=\"hunter2\"",
            "  \"url\" = 'hunter2",
            "redis = { url = \"hunter2\" }",
            "store.redis.url = \"hunter2\" # why",
            "alice.password = \"hunter2\"",
            "token = \"hunter2\"",
            "client_secret = \"hunter2\"",
            "webhook_secret = \"hunter2\"",
            "token = { value = \"hunter2\" }",
            "token = { hunter2 }",
            "anything = \"rediss://user:hunter2@host\"",
            "invalid type: string \"redis://:hunter2@host\", expected a table",
            "url = \"redis://:hunt\\qer2hunter2@host",
        ];
        for line in lines {
            let shown = without_secrets(line);
            assert!(!shown.contains("hunter2"), "{shown}");
            assert_eq!(shown.chars().count(), line.chars().count(), "the caret must still fit: {shown}");
        }
        let sections = [
            "[tracing.headers]\nauthorization = \"Bearer hunter2\"",
            "[ tracing . \"headers\" ] # who sends\n\n# a key\n\"x-a\" = 'hunter2",
            "[tracing.headers]\nx-a = \"\"\"\nhunter2",
            "[tracing.headers]\nx-a = { hunter2",
            "[tracing.headers]\nauthorization \"Basic hunter2==\"",
            "[tracing.headers]\nauthorization: \"Basic hunter2==\"",
            "[admin]\ntoken \"hunter2\"",
            "[admin]\n  \"token\": \"hunter2=\"",
            "[ann]\npassword:hunter2",
            "[login.oidc.a]\nclient_secret hunter2",
            "[tracing]\nheaders = { x-a = \"hunter2\" }",
            "[tracing]\nheaders.x-a = \"hunter2\"",
            "[login]\n[tracing]\nheaders = {\n  x-a = \"hunter2\"",
            "tracing.headers.x-a = \"hunter2\"",
            "tracing = { headers = { x-a = \"hunter2\" } }",
        ];
        for text in sections {
            let at = text.find("hunter2").unwrap();
            let shown = Place::of(text, &(at..at + 1)).text;
            assert!(!shown.contains("hunter2") && shown.contains("**"), "{shown}");
        }
        for text in [
            "[tracing]\nratio = 1.1",
            "[admin]\ntoken_file x",
            "[admin]\ntokens = 1",
            "[tracing.headers]\n[login]",
            "[identity]\nheaders = { X-A = \"{user}\" }",
        ] {
            let line = text.lines().nth(1).unwrap();
            assert_eq!(Place::of(text, &(text.len() - 1..text.len())).text, line, "of another section");
        }
        let harmless = [
            "url = { env = \"REDIS_URL\" }",
            "curl = \"x\"",
            "url =",
            "a = \"http://h:1\"",
            "[login.password]",
            "access_token = \"X-Token\"",
        ];
        for line in harmless {
            assert_eq!(without_secrets(line), line);
        }
        assert_eq!(without_secrets("\u{1b}[2J"), "\u{fffd}[2J", "a file must not steer the terminal");
    }

    #[test]
    fn the_nearest_word_is_suggested_and_a_far_one_is_not() {
        let known = "expected one of `idle_timeout`, `absolute_timeout`, `cookie`";
        let cases = [
            ("idle_timeot", Some("idle_timeout")),
            ("cokie", Some("cookie")),
            ("Cookie", Some("cookie")),
            ("zzz", None),
        ];
        for (written, suggestion) in cases {
            let hint = hint_for(&format!("unknown field `{written}`, {known}"), "");
            assert_eq!(hint, suggestion.map(|word| format!("did you mean `{word}`?")), "{written}");
        }
    }

    #[test]
    fn who_writes_one_thing_for_another_is_told_the_right_one() {
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "only its type counts")]
        struct Table {
            key: String,
        }
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "only their types count")]
        struct Example {
            #[serde(default)]
            table: Vec<Table>,
            #[serde(default)]
            list: Vec<String>,
            #[serde(default)]
            split: std::collections::BTreeMap<String, std::collections::BTreeMap<String, String>>,
            #[serde(default)]
            texts: std::collections::BTreeMap<String, String>,
            #[serde(default)]
            text: String,
            ratio: Option<f64>,
            port: Option<u16>,
            server: Option<std::net::SocketAddr>,
        }
        for (text, message, hint) in [
            ("list = \"a\"", "expected an array", "[\"...\"]"),
            ("list = { a = 1 }", "a table, expected an array", "[{ ... }]"),
            ("[[split]]\na = \"b\"", "an array, expected a table", "write [split.NAME]"),
            ("[[texts]]\na = \"b\"", "an array, expected a table", "in single brackets"),
            ("split = [[\"redis://:hunter2@h\"]]", "an array, expected a table", "in single brackets"),
            ("text = [\"a\"]", "expected a text in quotes", "leave the brackets out"),
            ("table = [\"a\"]", "expected a table", "{ key = ... }"),
            ("ratio = \"10%\"", "expected a number", "10 percent is 0.1"),
            ("port = 70000", "expected a whole number up to 65535", ""),
            ("server = \"10.0.0.53\"", "invalid socket address", "\"10.0.0.53:53\""),
        ] {
            let error = toml::from_str::<Example>(text).unwrap_err();
            let shown = ConfigError::not_toml(Path::new("a.toml"), text, &error).to_string();
            let (said, hinted) = shown.split_once("hint:").unwrap_or((&shown, ""));
            assert!(said.contains(message) && hinted.contains(hint), "{shown}");
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }
}
