//! The cookie that carries the id: found strictly, set with every guard, never shown to a backend.
//!
//! Finding is strict, for a doubt about who somebody is means nobody. Stripping is generous, for a doubt about whose
//! cookie it is means ours.

use std::time::Duration;

use cookie::time::OffsetDateTime;
use cookie::{Cookie, CookieBuilder, SameSite};
use http::header::COOKIE;
use http::{HeaderMap, HeaderValue};

use super::id::SessionId;

/// One cookie of ours, as one listener uses it: `__Host-` and `Secure` on HTTPS, neither on plain HTTP.
#[derive(Clone, Debug)]
pub struct SessionCookie {
    name: String,
    fallback_name: String,
    secure: bool,
    same_site: SameSite,
}

/// The names that are ours, on whichever listener and in whichever spelling.
#[derive(Clone, Debug)]
pub struct ReservedCookies {
    /// Without prefix.
    names: Vec<String>,
    /// How names begin, without prefix, and how many characters follow.
    families: Vec<(String, usize)>,
}

/// What becomes of a request's `Cookie` fields on the way to a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stripped {
    /// Forward them as they are: none, or one field without a cookie of ours.
    Unchanged,
    /// This single field stands for all of them.
    Replaced(HeaderValue),
    /// Nothing is left: remove them all.
    Removed,
}

impl SessionCookie {
    /// `configured` is the name as configured, e.g. `__Host-session`; plain HTTP drops its prefix.
    pub fn new(configured: &str, secure: bool, same_site: SameSite) -> Self {
        let name = if secure { configured } else { without_prefix(configured) };
        // Browsers refuse `None` without `Secure`.
        let same_site = if secure || same_site != SameSite::None { same_site } else { SameSite::Lax };
        Self { name: name.to_owned(), fallback_name: fallback_cookie_name(name), secure, same_site }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the browser keeps it from requests that another site began.
    pub fn is_strict(&self) -> bool {
        self.same_site == SameSite::Strict
    }

    /// The id in the request's `Cookie` fields: none when absent, malformed, or there twice.
    pub fn find(&self, headers: &HeaderMap) -> Option<SessionId> {
        SessionId::parse_bytes(sole_value(headers, &self.name)?)
    }

    /// The `Set-Cookie` that hands the id to the browser, for its browser session.
    pub fn set(&self, id: &SessionId) -> HeaderValue {
        sensitive(&self.guarded(&self.name, id.to_cookie_value()).build())
    }

    /// The `Set-Cookie` that takes it back.
    pub fn clear(&self) -> HeaderValue {
        self.removal(&self.name)
    }

    /// What the browser holds of the fallback cookie: none when absent, or there twice.
    pub fn find_fallback<'h>(&self, headers: &'h HeaderMap) -> Option<&'h [u8]> {
        sole_value(headers, &self.fallback_name)
    }

    /// `value`: base64url. Browsers drop it by themselves after `life`.
    pub fn set_fallback(&self, value: String, life: Duration) -> HeaderValue {
        let life = cookie::time::Duration::seconds(i64::try_from(life.as_secs()).unwrap_or(i64::MAX));
        sensitive(&self.guarded(&self.fallback_name, value).max_age(life).build())
    }

    pub fn clear_fallback(&self) -> HeaderValue {
        self.removal(&self.fallback_name)
    }

    fn removal(&self, name: &str) -> HeaderValue {
        // Browsers drop a removal whose name, Path or Secure differ from the original, so all are repeated.
        let removal = self.guarded(name, String::new()).max_age(cookie::time::Duration::ZERO);
        sensitive(&removal.expires(OffsetDateTime::UNIX_EPOCH).build())
    }

    /// No Domain: the cookie belongs to this host alone (RFC 6265bis, section 4.1.3.2).
    fn guarded<'c>(&self, name: &'c str, value: String) -> CookieBuilder<'c> {
        Cookie::build((name, value)).path("/").secure(self.secure).http_only(true).same_site(self.same_site)
    }
}

impl ReservedCookies {
    /// `configured`: the names as configured. Each is reserved with and without its prefix.
    pub fn new<'n>(configured: impl IntoIterator<Item = &'n str>) -> Self {
        let names = configured.into_iter().map(|name| without_prefix(name).to_owned()).collect();
        Self { names, families: Vec::new() }
    }

    /// Also all names that begin so and have so many further characters, see [`named_like`].
    pub fn and_family(mut self, family: &str, chars: usize) -> Self {
        self.families.push((without_prefix(family).to_owned(), chars));
        self
    }

    /// The request's `Cookie` fields without the cookies of ours. All other bytes stay as they are, in their order;
    /// several fields become one, joined by `"; "` (RFC 9113, section 8.2.3).
    pub fn strip(&self, headers: &HeaderMap) -> Stripped {
        let mut fields = headers.get_all(COOKIE).iter();
        let Some(first) = fields.next() else { return Stripped::Unchanged };
        let is_single = fields.next().is_none();
        if is_single && !pairs(first.as_bytes()).any(|pair| self.has(pair)) {
            return Stripped::Unchanged;
        }

        let mut kept = Vec::new();
        for field in headers.get_all(COOKIE) {
            let mut separator: &[u8] = if kept.is_empty() { b"" } else { b"; " };
            for pair in pairs(field.as_bytes()).filter(|pair| !self.has(pair)) {
                let starts_field = separator != b";";
                let pair = if starts_field { pair.trim_ascii_start() } else { pair };
                if starts_field && pair.is_empty() {
                    continue;
                }
                kept.extend_from_slice(separator);
                kept.extend_from_slice(pair);
                separator = b";";
            }
        }
        match HeaderValue::from_bytes(&kept) {
            Ok(mut value) if !kept.is_empty() => {
                value.set_sensitive(true);
                Stripped::Replaced(value)
            }
            Ok(_) | Err(_) => Stripped::Removed,
        }
    }

    /// Whether a backend's `Set-Cookie` would plant a cookie of ours in the browser.
    pub fn is_set_by(&self, set_cookie: &[u8]) -> bool {
        // Browsers read it alike: what is behind the first `=` is the value.
        let pair = pairs(set_cookie).next().map(nameless).unwrap_or_default();
        self.ends_with_ours(pair.split(|byte| *byte == b'=').next().unwrap_or_default())
    }

    /// Whether any reader might take this `name=value` for one of ours, or for several cookies with one of ours among
    /// them: some end a cookie at a comma or a space, drop quotes, brackets, `$` or what is not ASCII.
    fn has(&self, pair: &[u8]) -> bool {
        let pair = nameless(pair);
        let mut ends = memchr::memchr_iter(b'=', pair).peekable();
        if ends.peek().is_none() {
            return self.ends_with_ours(pair);
        }
        ends.any(|end| self.ends_with_ours(&pair[..end]))
    }

    /// Whether the last name in this text, which ends before a `=`, is ours to somebody.
    fn ends_with_ours(&self, text: &[u8]) -> bool {
        let ends = text.iter().rposition(|byte| !may_follow_a_name(*byte)).map_or(0, |last| last + 1);
        let text = &text[..ends];
        let ends_with = |text: &[u8], ours: &str| {
            let Some(starts) = text.len().checked_sub(ours.len()) else { return false };
            let (before, name) = text.split_at(starts);
            name.eq_ignore_ascii_case(ours.as_bytes()) && begins_a_name(before)
        };
        let is_of = |(family, chars): &(String, usize)| {
            let Some(starts) = text.len().checked_sub(*chars) else { return false };
            let (start, own) = text.split_at(starts);
            own.iter().all(is_own_char) && ends_with(start, family)
        };
        self.names.iter().any(|ours| ends_with(text, ours)) || self.families.iter().any(is_of)
    }
}

/// The name of the fallback cookie beside a session cookie of this name: as secret from backends as that one.
pub fn fallback_cookie_name(session: &str) -> String {
    format!("{session}-fallback")
}

/// The value of the only cookie of exactly this name, in any of the `Cookie` fields; none when there are two, for
/// nothing says which of them is ours (RFC 6265bis, section 5.8.3).
pub fn sole_value<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    let mut values = headers.get_all(COOKIE).iter().flat_map(|field| pairs(field.as_bytes())).filter_map(|pair| {
        let pair = pair.trim_ascii_start();
        pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")
    });
    let value = values.next()?;
    values.next().is_none().then_some(value)
}

/// The cookies whose names begin with `family` and have `chars` further characters of base64url, whichever they are.
pub fn named_like<'h>(headers: &'h HeaderMap, family: &str, chars: usize) -> impl Iterator<Item = (&'h str, &'h [u8])> {
    let pairs = headers.get_all(COOKIE).iter().flat_map(|field| pairs(field.as_bytes()));
    pairs.filter_map(move |pair| {
        let pair = pair.trim_ascii_start();
        let end = pair.iter().position(|byte| *byte == b'=')?;
        let own = pair[..end].strip_prefix(family.as_bytes())?;
        let name = std::str::from_utf8(&pair[..end]).ok()?;
        (own.len() == chars && own.iter().all(is_own_char)).then_some((name, &pair[end + 1..]))
    })
}

fn is_own_char(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

const PREFIXES: [&str; 2] = ["__Host-", "__Secure-"];

fn without_prefix(name: &str) -> &str {
    let prefix = PREFIXES.iter().find(|prefix| starts_with(name.as_bytes(), prefix));
    prefix.and_then(|prefix| name.get(prefix.len()..)).unwrap_or(name)
}

fn starts_with(name: &[u8], prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
}

fn pairs(field: &[u8]) -> impl Iterator<Item = &[u8]> {
    field.split(|byte| *byte == b';')
}

/// A cookie without a name is sent without its `=`, or with, so that its value is what looks like a name (RFC 6265bis,
/// section 5.7).
fn nameless(pair: &[u8]) -> &[u8] {
    let starts = pair.iter().position(|byte| !is_filler(*byte) && *byte != b'=').unwrap_or(pair.len());
    &pair[starts..]
}

/// Whether a name may begin behind this text: behind nothing, or what some reader trims or ends a cookie at, and
/// possibly a prefix and the `$` of RFC 2965.
fn begins_a_name(before: &[u8]) -> bool {
    let without = |prefix: &&str| {
        let (start, end) = before.split_at_checked(before.len().checked_sub(prefix.len())?)?;
        end.eq_ignore_ascii_case(prefix.as_bytes()).then_some(start)
    };
    let before = PREFIXES.iter().find_map(without).unwrap_or(before);
    let dollars = before.iter().rev().take_while(|byte| **byte == b'$').count();
    let last = before[..before.len() - dollars].last();
    last.is_none_or(|byte| is_filler(*byte) || matches!(byte, b',' | b'"' | b'\'') || !byte.is_ascii())
}

/// What some reader trims from the end of a name: all that no name has (RFC 9110, section 5.6.2), and quotes.
fn may_follow_a_name(byte: u8) -> bool {
    let is_in_names = byte.is_ascii_alphanumeric() || b"!#$%&*+-.^_`|~".contains(&byte);
    !is_in_names && byte != b'='
}

/// What some reader or other trims from a name.
fn is_filler(byte: u8) -> bool {
    byte <= b' ' || byte == 0x7f
}

fn sensitive(cookie: &Cookie<'_>) -> HeaderValue {
    let mut value = HeaderValue::from_str(&cookie.to_string()).expect("a checked name and base64url are visible ASCII");
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const ID: &str = "AbAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

    fn cookies(fields: &[&[u8]]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(COOKIE, HeaderValue::from_bytes(field).unwrap());
        }
        headers
    }

    /// Cookie fields written with `ID` for a valid id.
    fn with_id(fields: &[&str]) -> HeaderMap {
        let fields: Vec<_> = fields.iter().map(|field| field.replace("ID", ID).into_bytes()).collect();
        cookies(&fields.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    #[test]
    fn only_one_exact_cookie_is_a_session() {
        let cookie = SessionCookie::new("__Host-session", true, SameSite::Lax);
        let cases: &[(bool, &str, &[&str])] = &[
            (true, "alone", &["__Host-session=ID"]),
            (true, "first", &["__Host-session=ID; a=1"]),
            (true, "last", &["a=1; __Host-session=ID"]),
            (true, "between", &["a=1; __Host-session=ID; b=2"]),
            (true, "without the usual space", &["a=1;__Host-session=ID;b=2"]),
            (true, "in the second field", &["a=1", "__Host-session=ID"]),
            (true, "beside a name that contains ours", &["x__Host-session=1; __Host-sessions=2; __Host-session=ID"]),
            (true, "beside our name in a value", &["a=__Host-session=ID; __Host-session=ID"]),
            (true, "beside garbage", &[";;=; =x; a; \"; a=\"b; __Host-session=ID; ,"]),
            (true, "beside another spelling of it", &["__HOST-SESSION=ID; __Host-session=ID"]),
            (true, "beside the plain-HTTP name", &["session=ID; __Host-session=ID"]),
            (true, "beside our name without a value", &["__Host-session; __Host-session=ID"]),
            (true, "after a tab", &["a=1;\t__Host-session=ID"]),
            (false, "no field", &[]),
            (false, "empty field", &[""]),
            (false, "another cookie", &["a=1"]),
            (false, "the name alone", &["__Host-session"]),
            (false, "empty value", &["__Host-session="]),
            (false, "twice, equal", &["__Host-session=ID; __Host-session=ID"]),
            (false, "twice, the second malformed", &["__Host-session=ID; __Host-session=x"]),
            (false, "twice, the first empty", &["__Host-session=; __Host-session=ID"]),
            (false, "twice, in two fields", &["__Host-session=ID", "__Host-session=ID"]),
            (false, "lower-case prefix", &["__host-session=ID"]),
            (false, "upper case", &["__HOST-SESSION=ID"]),
            (false, "without its prefix", &["session=ID"]),
            (false, "other prefix", &["__Secure-session=ID"]),
            (false, "quoted", &["__Host-session=\"ID\""]),
            (false, "truncated", &["__Host-session=AbAAA"]),
            (false, "extended", &["__Host-session=IDA"]),
            (false, "padded", &["__Host-session=ID="]),
            (false, "space before =", &["__Host-session =ID"]),
            (false, "space after =", &["__Host-session= ID"]),
            (false, "space behind", &["__Host-session=ID ; a=1"]),
            (false, "comma for a separator", &["__Host-session=ID,a=1"]),
            (false, "percent-encoded name", &["__%48ost-session=ID"]),
            (false, "nameless", &["=__Host-session=ID"]),
        ];
        for (found, what, fields) in cases {
            assert_eq!(cookie.find(&with_id(fields)).is_some(), *found, "{what}: {fields:?}");
        }
        let not_ascii = cookies(&[b"a=\xff; __Host-session=".as_slice(), b"\xe9"]);
        assert!(cookie.find(&not_ascii).is_none());
    }

    #[test]
    fn plain_http_knows_the_name_without_prefix_only() {
        let cookie = SessionCookie::new("__Host-session", false, SameSite::Lax);
        assert_eq!(cookie.name(), "session");
        assert!(cookie.find(&with_id(&["session=ID"])).is_some());
        assert!(cookie.find(&with_id(&["__Host-session=ID"])).is_none());
        assert_eq!(SessionCookie::new("sid", false, SameSite::Lax).name(), "sid");
        assert_eq!(SessionCookie::new("é-session-x", false, SameSite::Lax).name(), "é-session-x");
    }

    #[test]
    fn the_cookie_is_set_and_cleared_with_every_guard() {
        let id = SessionId::parse(ID).unwrap();
        let cases = [
            (true, SameSite::Lax, "__Host-session", "HttpOnly; SameSite=Lax; Secure; Path=/"),
            (true, SameSite::Strict, "__Host-session", "HttpOnly; SameSite=Strict; Secure; Path=/"),
            (true, SameSite::None, "__Host-session", "HttpOnly; SameSite=None; Secure; Path=/"),
            (false, SameSite::Lax, "session", "HttpOnly; SameSite=Lax; Path=/"),
            (false, SameSite::None, "session", "HttpOnly; SameSite=Lax; Path=/"),
        ];
        for (secure, same_site, name, guards) in cases {
            let cookie = SessionCookie::new("__Host-session", secure, same_site);
            let (set, clear) = (cookie.set(&id), cookie.clear());
            assert_eq!(set.to_str().unwrap(), format!("{name}={ID}; {guards}"));
            let past = "Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT";
            assert_eq!(clear.to_str().unwrap(), format!("{name}=; {guards}; {past}"));
            assert!(set.is_sensitive() && clear.is_sensitive(), "a header value of ours does not print itself");
            let (set, clear) = (cookie.set_fallback("abc".into(), Duration::from_secs(300)), cookie.clear_fallback());
            assert_eq!(set.to_str().unwrap(), format!("{name}-fallback=abc; {guards}; Max-Age=300"));
            assert_eq!(clear.to_str().unwrap(), format!("{name}-fallback=; {guards}; {past}"));
            assert!(set.is_sensitive() && clear.is_sensitive());
        }
    }

    #[test]
    fn no_cookie_of_ours_is_forwarded_and_the_rest_stays_as_it_is() {
        let ours = ReservedCookies::new(["__Host-session", "__Host-session-login"]);
        let unchanged: &[&[&[u8]]] = &[
            &[],
            &[b""],
            &[b"a=1"],
            &[b"a=1; b=2"],
            &[b"a=1;b=2;"],
            &[b" ; ;=;a"],
            &[b"sessions=1; xsession=2; __Host-sess=3"],
            &[b"a=session; b=__Host-session=x"],
            &[b"session-logins=1"],
            &[b"a=\"x y\"; b=\xff\xfe"],
            &[b"__Host-=1; __Host-other=2"],
            &[b"mysession=1; x-session=1; a$session=1; _session=1; session_=1; session.x=1"],
            &[b"a=x&session=1; q=session=5; q=/session=5; b=(session)=1"],
            &[b"a=b, sessions=1; a=b xsession=1; a=x__Host-session=1; a=session, b=1; a=b session"],
            &[b"session[a]=1; a=session\xff b=1; \"mysession\"=1; $$=1; \xff=1"],
        ];
        for fields in unchanged {
            assert_eq!(ours.strip(&cookies(fields)), Stripped::Unchanged, "{fields:?}");
        }
        let removed: &[&[&[u8]]] = &[
            &[b"session=x"],
            &[b"__Host-session=x"],
            &[b"__Host-session=x;"],
            &[b" ;session=x; "],
            &[b"__Host-session=x; __Host-session-login=y"],
            &[b"session=x", b"session=y"],
            &[b"", b""],
            &[b"session=x", b" "],
            &[b"a=b, session=x"],
            &[b"a=b,session=x"],
            &[b"a=b session=x"],
            &[b"a=b\tSESSION=x, c=d"],
            &[b"a=b, __Host-session=x"],
            &[b"a=b, $__hOsT-session-login =x"],
            &[b"\"session\"=x"],
            &[b"\"__Host-session\" = x"],
            &[b"a=\"b session=x\""],
            &[b"'session'=x"],
            &[b"$session=x"],
            &[b"$$Session=x"],
            &[b"$__Secure-session=x"],
            &[b"session[]=x"],
            &[b"session[=x"],
            &[b"session,=x"],
            &[b"session(x=1) session=x"],
            &[b"\xa0session=x"],
            &[b"\xc2\xa0__Host-session=x"],
            &[b"session\xc2\xa0=x"],
            &[b"session\x85 =x"],
            &[b"=a=b session=x"],
        ];
        for fields in removed {
            assert_eq!(ours.strip(&cookies(fields)), Stripped::Removed, "{fields:?}");
        }
        let replaced: &[(&[&[u8]], &[u8])] = &[
            (&[b"session=x; a=1"], b"a=1"),
            (&[b"a=1; session=x"], b"a=1"),
            (&[b"a=1; session=x; b=2"], b"a=1; b=2"),
            (&[b"a=1;session=x;b=2"], b"a=1;b=2"),
            (&[b"a=1 ; session=x ;  b=2"], b"a=1 ;  b=2"),
            (&[b"SESSION=x; a=1"], b"a=1"),
            (&[b"__host-SESSION=x; a=1"], b"a=1"),
            (&[b"__HOST-session-LOGIN=x; a=1"], b"a=1"),
            (&[b"__Secure-session=x; a=1"], b"a=1"),
            (&[b"session-login=x; a=1"], b"a=1"),
            (&[b"session; a=1"], b"a=1"),
            (&[b"=session=x; a=1"], b"a=1"),
            (&[b"session =x; a=1"], b"a=1"),
            (&[b"\tsession=x; a=1"], b"a=1"),
            (&[b"session=\"x\"; a=\"1; 2\""], b"a=\"1; 2\""),
            (&[b"a=\xff; session=x"], b"a=\xff"),
            (&[b"a=1;; session=x"], b"a=1;"),
            (&[b"a=1; a=1; session=x; a=2"], b"a=1; a=1; a=2"),
            (&[b"a=1", b"b=2"], b"a=1; b=2"),
            (&[b"a=1", b"b=2", b"c=3"], b"a=1; b=2; c=3"),
            (&[b"a=1", b"session=x", b"c=3"], b"a=1; c=3"),
            (&[b"session=x", b"b=2"], b"b=2"),
            (&[b"a=1", b"session=x"], b"a=1"),
            (&[b"a=1", b"b=2; session=x"], b"a=1; b=2"),
            (&[b"a=1", b""], b"a=1"),
        ];
        for (fields, expected) in replaced {
            let Stripped::Replaced(value) = ours.strip(&cookies(fields)) else { panic!("{fields:?} must be replaced") };
            assert_eq!(value.as_bytes(), *expected, "{fields:?}");
            assert!(value.is_sensitive());
        }
    }

    #[test]
    fn a_backend_cannot_plant_a_cookie_of_ours() {
        let ours = ReservedCookies::new(["__Host-session", "__Host-session-login"]);
        let dropped: &[&[u8]] = &[
            b"__Host-session=x",
            b"session=x; Path=/",
            b"SESSION=x",
            b"  __hOsT-session=x; Secure",
            b"\t__Secure-session=x",
            b"session",
            b"session; Path=/",
            b"session =x",
            b"=session=x",
            b" = session=x",
            b"__Host-session-login=x",
            b"session-login=; Max-Age=0",
            b"\"session\"=x",
            b"$session=x",
            b"session[]=x",
            b"\xc2\xa0session=x",
            b"session\xa0=x",
            b"a, __Host-session=x",
        ];
        for line in dropped {
            assert!(ours.is_set_by(line), "{:?}", String::from_utf8_lossy(line));
        }
        let kept: &[&[u8]] = &[
            b"",
            b";",
            b"a=1",
            b"a=session",
            b"a=1; session=x",
            b"sessions=1",
            b"PHPSESSID=session; Path=/session",
            b"mysession=1",
            b"a=b, session=x",
            b"a=\"session=x\"",
        ];
        for line in kept {
            assert!(!ours.is_set_by(line), "{:?}", String::from_utf8_lossy(line));
        }
    }

    /// Random fields made of pieces that matter, so that the interesting cases are frequent.
    fn random_fields(rng: &mut StdRng) -> Vec<Vec<u8>> {
        const PIECES: &[&[u8]] = &[
            b"__Host-",
            b"__secure-",
            b"session",
            b"SESSION",
            b"-login",
            b"=",
            b"=",
            b";",
            b"; ",
            b";",
            b" ",
            b"\t",
            b"\"",
            b"$",
            b"[]",
            b"a",
            b"b",
            b"1",
            b",",
            b"\xff",
            ID.as_bytes(),
        ];
        (0..rng.random_range(0..4))
            .map(|_| {
                (0..rng.random_range(0..14)).flat_map(|_| PIECES[rng.random_range(0..PIECES.len())]).copied().collect()
            })
            .collect()
    }

    #[test]
    fn nothing_of_ours_survives_in_any_header_and_nothing_else_is_lost() {
        let mut rng = StdRng::seed_from_u64(3);
        let ours = ReservedCookies::new(["__Host-session", "__Host-session-login"]);
        let finders = [true, false].map(|secure| SessionCookie::new("__Host-session", secure, SameSite::Lax));
        let others = |field: &[u8]| -> Vec<Vec<u8>> {
            let pairs = pairs(field).filter(|pair| !ours.has(pair)).map(|pair| pair.trim_ascii_start().to_vec());
            pairs.filter(|pair| !pair.is_empty()).collect()
        };
        let mut changed = 0;
        for _ in 0..20_000 {
            let fields = random_fields(&mut rng);
            let headers = cookies(&fields.iter().map(Vec::as_slice).collect::<Vec<_>>());
            for finder in &finders {
                if let Some(id) = finder.find(&headers) {
                    assert_eq!(id.to_cookie_value(), ID, "only the id that is there can be found");
                }
            }
            let before: Vec<_> = fields.iter().flat_map(|field| others(field)).collect();
            let after = match ours.strip(&headers) {
                Stripped::Unchanged => {
                    assert!(fields.len() < 2, "several fields are joined");
                    fields.concat()
                }
                Stripped::Replaced(value) => value.as_bytes().to_vec(),
                Stripped::Removed => Vec::new(),
            };
            changed += usize::from(after != fields.concat());
            assert!(!pairs(&after).any(|pair| ours.has(pair)), "one of ours is left in {after:?}");
            for name in ["session=", "SESSION=", "__Host-session=", "__secure-session-login=", "session-login="] {
                let found = pairs(&after).any(|pair| pair.trim_ascii_start().starts_with(name.as_bytes()));
                assert!(!found, "{name} is left in {after:?}");
            }
            assert_eq!(others(&after), before, "a cookie of others changed: {fields:?}");
        }
        assert!(1_000 < changed, "the generator must make cookies of ours");
    }
}
