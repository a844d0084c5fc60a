//! Where may a login lead back to? Only to a page of this origin, whatever a link claims.

use std::fmt;

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// A path (and query) of our own origin, safe in a `Location`: one `/` at its start, printable ASCII, and read
/// alike by every browser and server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReturnTo {
    path: String,
    query: Option<String>,
}

impl ReturnTo {
    /// Longer targets are forgotten: they come from a URL, and go into one.
    pub const BYTES_MAX: usize = 2 * 1024;

    /// The front page.
    pub fn root() -> Self {
        Self { path: "/".to_owned(), query: None }
    }

    /// `None` for everything that is not plainly a path of this origin. The fragment is cut off.
    pub fn parse(text: &str) -> Option<Self> {
        if Self::BYTES_MAX < text.len() || !text.bytes().all(may_stand_in_target) {
            return None;
        }
        let (target, _fragment) = text.split_once('#').unwrap_or((text, ""));
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        if !is_plain_path(path) || !query.is_none_or(is_plain_query) {
            return None;
        }
        Some(Self { path: path.to_owned(), query: query.map(str::to_owned) })
    }

    /// This page, told where to go on.
    pub fn leading_to(&self, target: &Self) -> String {
        let query =
            form_urlencoded::Serializer::new(String::new()).append_pair("return_to", &target.to_string()).finish();
        let separator = if self.query.is_some() { '&' } else { '?' };
        format!("{self}{separator}{query}")
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// As the value of a parameter in the query of another URL.
    pub fn escaped(&self) -> String {
        utf8_percent_encode(&self.to_string(), NON_ALPHANUMERIC).to_string()
    }
}

impl fmt::Display for ReturnTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        match &self.query {
            Some(query) => write!(f, "?{query}"),
            None => Ok(()),
        }
    }
}

/// Printable ASCII without what readers disagree on: browsers take `\` for `/` (WHATWG URL, 4.4), and quotes and
/// angle brackets never stand raw in a URL (RFC 3986, appendix A).
fn may_stand_in_target(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'\\' | b'"' | b'<' | b'>' | b'`')
}

/// Begins with exactly one `/`, and stays the same path however often a reader decodes it.
fn is_plain_path(path: &str) -> bool {
    if !path.starts_with('/') || !has_whole_escapes(path) {
        return false;
    }
    /// A name that holds a percent sign needs two; more is an attempt to be read twice.
    const DECODINGS_MAX: usize = 4;
    let separators = path.matches('/').count();
    let mut text = path.to_owned();
    for _ in 0..DECODINGS_MAX {
        let dots = text.split('/').any(|segment| matches!(segment, "." | ".."));
        let odd = text.contains("//") || text.contains('\\') || text.contains(char::is_control);
        if dots || odd || text.matches('/').count() != separators {
            return false;
        }
        match percent_decode_str(&text).decode_utf8() {
            Ok(decoded) if decoded == text => return true,
            Ok(decoded) => text = decoded.into_owned(),
            Err(_) => return false,
        }
    }
    false
}

/// A query is data, and slashes in it are common; control characters and backslashes are not.
fn is_plain_query(query: &str) -> bool {
    has_whole_escapes(query) && !percent_decode_str(query).any(|byte| byte.is_ascii_control() || byte == b'\\')
}

/// Every `%` is followed by two hexadecimal digits (RFC 3986, section 2.1).
fn has_whole_escapes(text: &str) -> bool {
    text.split('%').skip(1).all(|rest| {
        let digits = rest.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::super::hostile_targets::HOSTILE;
    use super::*;

    #[test]
    fn a_path_of_our_own_is_kept() {
        let cases = [
            ("/", "/"),
            ("/a", "/a"),
            ("/a/b/", "/a/b/"),
            ("/a?b=c", "/a?b=c"),
            ("/a?", "/a?"),
            ("/?q=1&r=2", "/?q=1&r=2"),
            ("/a#top", "/a"),
            ("/a?b#//evil.example", "/a?b"),
            ("/#", "/"),
            ("/My%20Files/report.pdf", "/My%20Files/report.pdf"),
            ("/100%25", "/100%25"),
            ("/caf%C3%A9", "/caf%C3%A9"),
            ("/@alice", "/@alice"),
            ("/a:b", "/a:b"),
            ("/a?next=/b", "/a?next=/b"),
            ("/a?next=%2Fb%2F%2Fc", "/a?next=%2Fb%2F%2Fc"),
            ("/a?url=https://other.example/", "/a?url=https://other.example/"),
            ("/a?//evil.example", "/a?//evil.example"),
            ("/.hidden/..x/x..", "/.hidden/..x/x.."),
            ("/a;b=c", "/a;b=c"),
            ("/a|b", "/a|b"),
            ("/~user/$x!*'(),=+&", "/~user/$x!*'(),=+&"),
        ];
        for (text, expected) in cases {
            assert_eq!(ReturnTo::parse(text).map(|target| target.to_string()).as_deref(), Some(expected), "{text:?}");
        }
    }

    #[test]
    fn whatever_could_leave_our_origin_is_refused() {
        for text in HOSTILE {
            assert_eq!(ReturnTo::parse(text), None, "{text:?} must not be followed");
        }
    }

    #[test]
    fn length_has_a_limit() {
        let longest = format!("/{}", "a".repeat(ReturnTo::BYTES_MAX - 1));
        assert!(ReturnTo::parse(&longest).is_some());
        assert_eq!(ReturnTo::parse(&format!("{longest}a")), None);
    }

    #[test]
    fn what_is_accepted_is_a_safe_location_and_reads_back_the_same() {
        const PIECES: &[&str] = &[
            "/",
            "\\",
            "a",
            "evil.example",
            "?",
            "#",
            "%",
            "%2f",
            "%5c",
            "%25",
            "%2e",
            ".",
            "..",
            "@",
            ":",
            "\t",
            "\n",
            "\0",
            "%0a",
            "%00",
            " ",
            "%20",
            "é",
            "／",
            "https:",
            "javascript:",
            ";",
            "&",
            "=",
            "%c3%a9",
            "<",
            "|",
        ];
        let mut random = StdRng::seed_from_u64(7);
        let mut accepted = 0;
        for _ in 0..100_000 {
            let mut text = if random.random() { "/" } else { "" }.to_owned();
            for _ in 0..random.random_range(0..8) {
                text += PIECES[random.random_range(0..PIECES.len())];
            }
            let Some(target) = ReturnTo::parse(&text) else { continue };
            accepted += 1;
            let location = target.to_string();
            assert!(location.starts_with('/'), "{text:?}");
            assert!(!matches!(location.as_bytes().get(1), Some(b'/' | b'\\')), "{text:?} would leave for another host");
            assert!(location.bytes().all(|byte| byte.is_ascii_graphic()), "{text:?} has no place in a field value");
            assert_eq!(ReturnTo::parse(&location), Some(target), "{text:?} must read back the same");
        }
        assert!(1_000 < accepted, "the property must meet real targets, not only refusals: {accepted}");
    }
}
