//! Which requests are refused before anyone acts on them? All whose bytes two honest readers could take for two
//! different requests.
//!
//! The guard sees a request head exactly as it came from the socket, before pingora does, and decides yes or no: it
//! repairs nothing. What it lets pass, pingora and a backend read alike, so that a decision made here on a path, a
//! host or a body length still holds there. Stricter than the RFCs on purpose: where they let a server be generous,
//! servers differ. A request in HTTP/2 has no such bytes; its fields are held to the same rules.

use std::net::Ipv6Addr;

use http::{StatusCode, request};
use memchr::memchr;

/// What a head may hold at most; the reader of the socket limits its bytes as a whole.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Header fields; more are 431. Never above [`HEADERS_CEILING`].
    pub headers_max: usize,
    /// Bytes of the request target; more are 414. Never above [`TARGET_BYTES_CEILING`].
    pub target_bytes: usize,
}

/// pingora's parser holds no more fields than this, whatever the configuration says.
pub const HEADERS_CEILING: usize = 256;

/// `http::Uri` counts in 16 bits and keeps one value for itself.
pub const TARGET_BYTES_CEILING: usize = u16::MAX as usize - 1;

/// Why a request is answered at once, without a backend, on a connection that is closed afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    /// A short stable word for the log and for a metric label.
    pub reason: &'static str,
}

/// Where the head in `buf` ends (just past the empty line), once it is there.
///
/// `from` is how many bytes of `buf` an earlier call has seen, so that slow senders cost no second look. A head also
/// ends where it is certain to be refused: after a line feed without carriage return, or after an empty first line.
/// So nobody waits for the rest of a request that cannot become valid; [`inspect`] names the fault.
pub fn head_end(buf: &[u8], from: usize) -> Option<usize> {
    let mut from = from;
    while let Some(distance) = memchr(b'\n', buf.get(from..)?) {
        let line_feed = from + distance;
        let bare = !buf[..line_feed].ends_with(b"\r");
        let empty_line = matches!(&buf[..line_feed], b"\r" | [.., b'\n', b'\r']);
        if bare || empty_line {
            return Some(line_feed + 1);
        }
        from = line_feed + 1;
    }
    None
}

/// Whether one request head, up to and including its empty line, has exactly one meaning.
///
/// Every fault is 400 but: 405 for CONNECT and TRACE, 414, 417 (an `Expect` other than `100-continue`), 431, and 505
/// (not HTTP/1). No allocation; the time is in proportion to the bytes.
pub fn inspect(head: &[u8], limits: &HeadLimits) -> Result<(), Refusal> {
    whole_lines(head)?;
    let mut cursor = Cursor { rest: head };
    let request = request_line(&mut cursor, limits)?;

    let mut fields = Fields::default();
    let mut count = 0;
    while !cursor.rest.starts_with(b"\r\n") {
        count += 1;
        if limits.headers_max.min(HEADERS_CEILING) < count {
            return refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "too_many_headers");
        }
        let name = field_name(&mut cursor)?;
        let value = cursor.field_value()?;
        fields.note(name, value)?;
    }
    if cursor.rest != b"\r\n" {
        return bad("bytes_after_head"); // the reader's fault, not the client's; still nothing to pass on
    }
    fields.agree_with(&request)
}

/// As [`inspect`], of a request whose parts came one by one (RFC 9113, section 8.3), in the form that HTTP/1 would give
/// it: the authority is the `Host`, the target is in origin form, and cookies are one field.
///
/// That names are in lower case, that no value has a line end, and that the body is as long as its `Content-Length`,
/// the crate `h2` has made sure of.
pub fn inspect_parts(request: &request::Parts, limits: &HeadLimits) -> Result<(), Refusal> {
    let method = request.method.as_str().as_bytes();
    if METHOD_BYTES_MAX < method.len() || !method.iter().all(|&byte| is(METHOD, byte)) {
        return bad("method");
    }
    may_be_asked(method)?;
    let request_target = request.uri.path_and_query().map_or("", |target| target.as_str()).as_bytes();
    is_short_enough(request_target, limits)?;
    target(request_target)?;

    if limits.headers_max.min(HEADERS_CEILING) < request.headers.len() {
        return refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "too_many_headers");
    }
    let mut fields = Fields::default();
    for (name, value) in &request.headers {
        let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
        if NAME_BYTES_MAX < name.len() || !name.iter().all(|&byte| is(NAME, byte)) {
            return bad("field_name");
        }
        // RFC 9113, section 8.2.1: what another reader would trim is not there.
        if value.trim_ascii().len() != value.len() {
            return bad("field_value");
        }
        let is_trailers = |value: &[u8]| value.eq_ignore_ascii_case(b"trailers");
        if OF_ONE_CONNECTION.iter().any(|other| folds_to(name, other)) || (name == b"te" && !is_trailers(value)) {
            return bad("connection_field"); // RFC 9113, section 8.2.2
        }
        fields.note(name, value)?;
    }
    fields.agree_with(&Request { method, http_11: true })
}

/// Whether every reader of `path` (no query) sees the same segments in it; 400 if not.
///
/// Refused, because servers and frameworks differ in what they make of it:
/// - empty, `.` and `..` segments; `;` (a path parameter to some); `\` (a `/` to some);
/// - encoded `/`, `\`, `.`, `%`, `;` and control characters: some decode before they split, some decode twice;
/// - encoded letters, digits, `-` and `_`, which no client needs to encode (RFC 3986, section 2.3) and which would
///   only serve to walk around a rule. An encoded `~` passes: old encoders write it, and routes compare decoded;
/// - `%` without two hexadecimal digits, and encoded bytes that are not UTF-8 (an overlong `/` is among them);
/// - bytes that RFC 3986 does not know in a path, except `[` and `]`, which browsers leave as they are.
pub fn path(path: &str) -> Result<(), Refusal> {
    path_bytes(path.as_bytes())
}

/// CR and LF only as a pair (RFC 9112, section 2.2), and no other control character but HTAB (RFC 9110, section 5.5).
/// Bytes above 0x7F are left to the places that may have them: UTF-8 in a cookie is nothing rare.
fn whole_lines(head: &[u8]) -> Result<(), Refusal> {
    let control = |byte: u8| (byte < b' ') & (byte != b'\t') & (byte != b'\r') & (byte != b'\n') | (byte == 0x7F);
    // Without early exit, so that the compiler looks at many bytes at a time.
    let controls = head.iter().fold(false, |fault, &byte| fault | control(byte));
    let following = head.get(1..).unwrap_or_default();
    let half_pairs =
        head.iter().zip(following).fold(false, |fault, (&byte, &next)| fault | ((byte == b'\r') != (next == b'\n')));
    if !controls && !half_pairs && !head.starts_with(b"\n") {
        return Ok(());
    }
    for (index, &byte) in head.iter().enumerate() {
        match byte {
            b'\n' if !head[..index].ends_with(b"\r") => return bad("bare_lf"),
            b'\r' if following.get(index).is_some_and(|&next| next != b'\n') => return bad("bare_cr"),
            _ if control(byte) => return bad("control_byte"),
            _ => {}
        }
    }
    Ok(())
}

struct Request<'h> {
    method: &'h [u8],
    http_11: bool,
}

/// `METHOD SP target SP HTTP/1.x CRLF` (RFC 9112, section 3), with nothing but these single spaces.
fn request_line<'h>(cursor: &mut Cursor<'h>, limits: &HeadLimits) -> Result<Request<'h>, Refusal> {
    if cursor.rest.starts_with(b"\r\n") {
        return bad("leading_empty_line");
    }
    // Methods are case-sensitive, but not to every backend: `get` would be GET to one and unknown to another.
    let method = cursor.take(METHOD);
    if method.is_empty() || METHOD_BYTES_MAX < method.len() {
        return cursor.unexpected("method");
    }
    cursor.space("method")?;
    may_be_asked(method)?;

    let request_target = cursor.take(VISIBLE);
    is_short_enough(request_target, limits)?;
    if request_target.is_empty() || cursor.rest.starts_with(b"\r\n") {
        return bad("request_line");
    }
    cursor.space("target_byte")?;

    let version = cursor.rest.get(..b"HTTP/1.1".len()).unwrap_or_default();
    let http_11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            let status = if *major == b'1' { StatusCode::BAD_REQUEST } else { StatusCode::HTTP_VERSION_NOT_SUPPORTED };
            return refuse(status, "version");
        }
        _ => return bad("version"),
    };
    cursor.rest = &cursor.rest[version.len()..];
    cursor.line_end("version")?;
    target(request_target)?;
    Ok(Request { method, http_11 })
}

/// Tunnels are for forward proxies, and `TRACE` would show a page the cookies that it must not see.
fn may_be_asked(method: &[u8]) -> Result<(), Refusal> {
    if matches!(method, b"CONNECT" | b"TRACE") {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed");
    }
    Ok(())
}

fn is_short_enough(target: &[u8], limits: &HeadLimits) -> Result<(), Refusal> {
    if limits.target_bytes.min(TARGET_BYTES_CEILING) < target.len() {
        return refuse(StatusCode::URI_TOO_LONG, "target_too_long");
    }
    Ok(())
}

/// Only origin-form (RFC 9112, section 3.2.1). The absolute form is for forward proxies, where it would give a request
/// a second host; `*` has no path that a route could match.
fn target(target: &[u8]) -> Result<(), Refusal> {
    let question_mark = target.iter().position(|&byte| byte == b'?').unwrap_or(target.len());
    let (path, query) = target.split_at(question_mark);
    path_bytes(path)?;
    // No rule looks at the query, so `%` and brackets in it are the backend's affair. Refused is what pingora would
    // encode or cut off, and `\`.
    if !query.iter().all(|&byte| is(QUERY, byte)) {
        return bad("query_byte");
    }
    Ok(())
}

fn path_bytes(path: &[u8]) -> Result<(), Refusal> {
    let [b'/', ..] = path else { return bad("target_form") };
    let mut segment = 1; // where it begins
    let mut at = 1;
    while let Some(&byte) = path.get(at) {
        at += 1;
        if is(PATH, byte) {
            continue;
        }
        match byte {
            b'/' if at - 1 == segment => return bad("path_empty_segment"),
            b'/' => {
                dot_segment(&path[segment..at - 1])?;
                segment = at;
            }
            b'%' => at = encoded_character(path, at - 1)?,
            b';' => return bad("path_parameter"),
            _ => return bad("path_byte"),
        }
    }
    dot_segment(&path[segment..])
}

fn dot_segment(segment: &[u8]) -> Result<(), Refusal> {
    if matches!(segment, b"." | b"..") { bad("path_dot_segment") } else { Ok(()) }
}

/// One percent-encoded character that begins at `at`; where it ends.
fn encoded_character(path: &[u8], at: usize) -> Result<usize, Refusal> {
    let first = encoded_byte(path, at)?;
    let width = match first {
        0x00..=0x7F if may_be_encoded(first) => return Ok(at + 3),
        0x00..=0x7F => return bad("path_encoded"),
        0x80..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xFF => 4,
    };
    let mut character = [first, 0, 0, 0];
    for (index, byte) in character[..width].iter_mut().enumerate().skip(1) {
        if path.get(at + 3 * index) != Some(&b'%') {
            return bad("path_utf8");
        }
        *byte = encoded_byte(path, at + 3 * index)?;
    }
    // Also refuses what is longer than it need be, surrogates, and everything beyond U+10FFFF.
    match std::str::from_utf8(&character[..width]) {
        Ok(_) => Ok(at + 3 * width),
        Err(_) => bad("path_utf8"),
    }
}

/// The byte that `%XX` at `at` stands for.
fn encoded_byte(path: &[u8], at: usize) -> Result<u8, Refusal> {
    let digit = |index| path.get(index).and_then(|&byte| char::from(byte).to_digit(16));
    match (digit(at + 1), digit(at + 2)) {
        (Some(high), Some(low)) => Ok((high * 16 + low) as u8),
        _ => bad("path_percent"),
    }
}

/// A name and its colon (RFC 9112, section 5). Of the characters that a name may have, only letters, digits, `-` and
/// `_` pass: the others have no use in practice, and CGI and its heirs turn some of them into `_`, so that one name
/// becomes another.
fn field_name<'h>(cursor: &mut Cursor<'h>) -> Result<&'h [u8], Refusal> {
    let name = cursor.take(NAME);
    match cursor.rest {
        [b':', rest @ ..] if !name.is_empty() && name.len() <= NAME_BYTES_MAX => {
            cursor.rest = rest;
            Ok(name)
        }
        [b' ' | b'\t', ..] if name.is_empty() => bad("folded_line"),
        [b' ' | b'\t', ..] => bad("space_before_colon"),
        _ => cursor.unexpected("field_name"),
    }
}

/// What the fields that decide about host, body and connection have said.
#[derive(Default)]
struct Fields<'h> {
    host: bool,
    content_length: Option<&'h [u8]>,
    chunked: bool,
    expect: bool,
    upgrade: bool,
    connection_options: usize,
    connection_upgrade: bool,
    websocket_key: bool,
    websocket_version: bool,
}

impl<'h> Fields<'h> {
    fn note(&mut self, name: &[u8], value: &'h [u8]) -> Result<(), Refusal> {
        // Length and first letter tell the few names that matter here apart, and most others from them.
        let known: &[u8] = match (name.len(), name.first().map_or(0, u8::to_ascii_lowercase)) {
            (4, b'h') => b"host",
            (6, b'e') => b"expect",
            (7, b'u') => b"upgrade",
            (10, b'c') => b"connection",
            (14, b'c') => b"content-length",
            (14, b'h') => b"http2-settings",
            (17, b't') => b"transfer-encoding",
            (17, b's') => b"sec-websocket-key",
            (21, b's') => b"sec-websocket-version",
            _ => return Ok(()),
        };
        if !folds_to(name, known) {
            return Ok(());
        }
        if name.contains(&b'_') {
            return bad("underscore_twin"); // a backend that folds `_` to `-` would see a field that we did not
        }
        match known {
            b"host" => once(&mut self.host, is_host(value), "host"),
            b"expect" => {
                once(&mut self.expect, true, "expect")?;
                if value.eq_ignore_ascii_case(b"100-continue") {
                    return Ok(());
                }
                refuse(StatusCode::EXPECTATION_FAILED, "expect")
            }
            // Others, `h2c` among them, are offers to change the protocol under the rules that were checked here.
            b"upgrade" => once(&mut self.upgrade, value.eq_ignore_ascii_case(b"websocket"), "upgrade"),
            b"connection" => self.connection(value),
            b"content-length" if self.content_length.is_some() || !is_content_length(value) => bad("content_length"),
            b"content-length" => {
                self.content_length = Some(value);
                Ok(())
            }
            b"transfer-encoding" => {
                once(&mut self.chunked, value.eq_ignore_ascii_case(b"chunked"), "transfer_encoding")
            }
            b"sec-websocket-key" => once(&mut self.websocket_key, is_websocket_key(value), "websocket"),
            b"sec-websocket-version" => once(&mut self.websocket_version, value == b"13", "websocket"),
            _ => bad("http2_settings"), // only ever part of an h2c upgrade
        }
    }

    /// RFC 9110, section 7.6.1. The fields that an option names are removed on the way, so it may not name one that
    /// decides about anything.
    fn connection(&mut self, value: &[u8]) -> Result<(), Refusal> {
        let options = value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|option| !option.is_empty());
        for option in options {
            self.connection_options += 1;
            self.connection_upgrade |= option.eq_ignore_ascii_case(b"upgrade");
            let protected = PROTECTED.iter().any(|name| folds_to(option, name))
                || option.get(..FORWARDED_PREFIX.len()).is_some_and(|start| folds_to(start, FORWARDED_PREFIX));
            if protected
                || CONNECTION_OPTIONS_MAX < self.connection_options
                || !option.iter().all(|&byte| is(TOKEN, byte))
            {
                return bad("connection");
            }
        }
        Ok(())
    }

    /// The rules that need the whole head.
    fn agree_with(&self, request: &Request<'_>) -> Result<(), Refusal> {
        // HTTP/1.0 needs none by its RFC, but a route is chosen by it, and a backend behind us speaks 1.1.
        if !self.host {
            return bad("host_missing");
        }
        if self.chunked && self.content_length.is_some() {
            return bad("two_lengths");
        }
        if self.chunked && !request.http_11 {
            return bad("transfer_encoding");
        }
        if self.upgrade {
            // RFC 6455, section 4.1: a GET without body.
            let handshake = request.method == b"GET"
                && request.http_11
                && self.connection_upgrade
                && self.websocket_key
                && self.websocket_version
                && !self.chunked
                && self.content_length.is_none_or(|length| length == b"0");
            if !handshake {
                return bad("websocket");
            }
        }
        Ok(())
    }
}

/// RFC 9110, section 7.2: a name, an IPv4 address or a bracketed IPv6 address, with or without a port. The name may
/// end in the dot of a fully qualified one.
fn is_host(value: &[u8]) -> bool {
    let (name_is_valid, port) = match value {
        [b'[', rest @ ..] => {
            let Some(end) = rest.iter().position(|&byte| byte == b']') else { return false };
            let address = std::str::from_utf8(&rest[..end]).unwrap_or_default();
            (address.parse::<Ipv6Addr>().is_ok(), &rest[end + 1..])
        }
        _ => {
            let end = value.iter().position(|&byte| byte == b':').unwrap_or(value.len());
            let name = value[..end].strip_suffix(b".").unwrap_or(&value[..end]);
            let label = |label: &[u8]| !label.is_empty() && label.iter().all(|&byte| is(NAME, byte));
            (name.len() <= HOST_BYTES_MAX && name.split(|&byte| byte == b'.').all(label), &value[end..])
        }
    };
    name_is_valid && (port.is_empty() || port.strip_prefix(b":").is_some_and(is_port))
}

/// 1 to 65535, written without leading zeros.
fn is_port(digits: &[u8]) -> bool {
    let [b'1'..=b'9', ..] = digits else { return false };
    digits.len() <= 5
        && digits.iter().all(u8::is_ascii_digit)
        && digits.iter().fold(0, |port, digit| port * 10 + u32::from(digit - b'0')) <= u32::from(u16::MAX)
}

/// RFC 9110, section 8.6, in the one spelling that every reader takes for the same number: `010` is eight to some.
/// 18 digits fit into every 64-bit integer.
fn is_content_length(value: &[u8]) -> bool {
    let canonical = matches!(value, b"0" | [b'1'..=b'9', ..]);
    canonical && value.len() <= CONTENT_LENGTH_DIGITS_MAX && value.iter().all(u8::is_ascii_digit)
}

/// 16 bytes in base64 (RFC 6455, section 4.1).
fn is_websocket_key(value: &[u8]) -> bool {
    let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    value.len() == 24 && value.strip_suffix(b"==").is_some_and(|key| key.iter().all(base64))
}

/// Whether `name` is `folded` (lower case, with hyphens) to a reader that takes `_` for `-` and knows no case.
fn folds_to(name: &[u8], folded: &[u8]) -> bool {
    let fold = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == folded.len() && name.iter().map(fold).eq(folded.iter().copied())
}

/// A field that may come once, and then only with a valid value.
fn once(seen: &mut bool, valid: bool, reason: &'static str) -> Result<(), Refusal> {
    if *seen || !valid {
        return bad(reason);
    }
    *seen = true;
    Ok(())
}

fn bad<T>(reason: &'static str) -> Result<T, Refusal> {
    refuse(StatusCode::BAD_REQUEST, reason)
}

fn refuse<T>(status: StatusCode, reason: &'static str) -> Result<T, Refusal> {
    Err(Refusal { status, reason })
}

/// What of the head is still to be read.
struct Cursor<'h> {
    rest: &'h [u8],
}

impl<'h> Cursor<'h> {
    /// The bytes of this class that come next, as many as there are.
    fn take(&mut self, class: u8) -> &'h [u8] {
        let end = self.rest.iter().position(|&byte| !is(class, byte)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    /// Up to the end of the line, without the blanks around it. [`whole_lines`] has looked at the bytes.
    fn field_value(&mut self) -> Result<&'h [u8], Refusal> {
        let end = memchr(b'\r', self.rest).unwrap_or(self.rest.len());
        let (value, rest) = self.rest.split_at(end);
        self.rest = rest;
        self.line_end("incomplete")?;
        Ok(value.trim_ascii())
    }

    fn space(&mut self, otherwise: &'static str) -> Result<(), Refusal> {
        let [b' ', rest @ ..] = self.rest else { return self.unexpected(otherwise) };
        self.rest = rest;
        Ok(())
    }

    fn line_end(&mut self, otherwise: &'static str) -> Result<(), Refusal> {
        let [b'\r', b'\n', rest @ ..] = self.rest else { return self.unexpected(otherwise) };
        self.rest = rest;
        Ok(())
    }

    fn unexpected<T>(&self, otherwise: &'static str) -> Result<T, Refusal> {
        bad(if matches!(self.rest, b"" | b"\r") { "incomplete" } else { otherwise })
    }
}

/// The longest registered method has 17 letters.
const METHOD_BYTES_MAX: usize = 32;
/// Far beyond every field name in use; keeps the names that other rules copy or compare small.
const NAME_BYTES_MAX: usize = 128;
/// A name of the DNS without its last dot.
const HOST_BYTES_MAX: usize = 253;
const CONTENT_LENGTH_DIGITS_MAX: usize = 18;
/// One below pingora's own limit; browsers send two.
const CONNECTION_OPTIONS_MAX: usize = 8;

/// Fields that `Connection` may not name, and the start of some more.
const PROTECTED: [&[u8]; 6] =
    [b"host", b"content-length", b"transfer-encoding", b"cookie", b"authorization", b"forwarded"];
const FORWARDED_PREFIX: &[u8] = b"x-forwarded-";

/// Fields that have no place in HTTP/2.
const OF_ONE_CONNECTION: [&[u8]; 6] =
    [b"connection", b"transfer-encoding", b"upgrade", b"keep-alive", b"proxy-connection", b"http2-settings"];

/// Classes of bytes, one bit each.
const METHOD: u8 = 1; // upper case, as all registered methods are, and `-`
const NAME: u8 = 1 << 1;
const VISIBLE: u8 = 1 << 2;
const TOKEN: u8 = 1 << 3; // RFC 9110, section 5.6.2
const PATH: u8 = 1 << 4; // stands for itself in a segment
const QUERY: u8 = 1 << 5;

const fn is(class: u8, byte: u8) -> bool {
    CLASSES[byte as usize] & class != 0
}

static CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = classes_of(byte as u8);
        byte += 1;
    }
    classes
};

const fn classes_of(byte: u8) -> u8 {
    let visible = byte.is_ascii_graphic();
    let word = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let token = word || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'.' | b'^' | b'`' | b'|' | b'~');
    let path = word || matches!(byte, b'.' | b'~' | b'!' | b'$' | b'&'..=b',' | b'=' | b':' | b'@' | b'[' | b']');
    let query = visible && !matches!(byte, b'"' | b'#' | b'<' | b'>' | b'\\');
    let mut classes = 0;
    classes |= if byte.is_ascii_uppercase() || byte == b'-' { METHOD } else { 0 };
    classes |= if word { NAME } else { 0 };
    classes |= if visible { VISIBLE } else { 0 };
    classes |= if token { TOKEN } else { 0 };
    classes |= if path { PATH } else { 0 };
    classes |= if query { QUERY } else { 0 };
    classes
}

/// Whether a path may have this ASCII character percent-encoded.
const fn may_be_encoded(character: u8) -> bool {
    let separator = matches!(character, b'/' | b'\\' | b'.' | b'%' | b';');
    let needless = character.is_ascii_alphanumeric() || matches!(character, b'-' | b'_');
    !character.is_ascii_control() && !separator && !needless
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use pingora::protocols::http::v1::server::HttpSession;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const LIMITS: HeadLimits = HeadLimits { headers_max: 20, target_bytes: 200 };
    const OK: (u16, &str) = (200, "");

    fn verdict(head: &[u8]) -> (u16, &'static str) {
        inspect(head, &LIMITS).map_or_else(|refusal| (refusal.status.as_u16(), refusal.reason), |()| OK)
    }

    /// A valid GET with this field after its Host.
    fn with_field(field: &[u8]) -> Vec<u8> {
        [b"GET / HTTP/1.1\r\nHost: a\r\n", field, b"\r\n\r\n"].concat()
    }

    #[rustfmt::skip]
    const HEADS: &[(&[u8], (u16, &str))] = &[
        // Line ends.
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"GET / HTTP/1.1\nHost: a\n\n", (400, "bare_lf")),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", (400, "bare_lf")),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\n", (400, "bare_lf")),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", (400, "bare_lf")),
        (b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", (400, "bare_lf")),
        (b"GET / HTTP/1.1\rHost: a\r\n\r\n", (400, "bare_cr")),
        (b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", (400, "bare_cr")),
        (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", (400, "bare_cr")),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\r\n", (400, "bare_cr")),
        (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "leading_empty_line")),
        (b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "bare_lf")),
        (b"\n\n", (400, "bare_lf")),
        (b"\r\n\r\n", (400, "leading_empty_line")),
        (b"", (400, "incomplete")),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", (400, "incomplete")),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r", (400, "incomplete")),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET ", (400, "bytes_after_head")),
        // Request line.
        (b"GET /\r\n\r\n", (400, "request_line")),
        (b"GET / \r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "request_line")),
        (b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", (400, "version")),
        (b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "method")),
        (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", (400, "method")),
        (b"GET /\tHTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_byte")),
        (b"GET /a HTTP/1.1 HTTP/1.1\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET / http/1.1\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET / HTTP/01.1\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET / HTTP/1\r\nHost: a\r\n\r\n", (400, "version")),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", (505, "version")),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", (505, "version")),
        (b"PRI * HTTP/2.0\r\n\r\n", (505, "version")),
        (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", OK),
        (b"GET / FTP/1.1\r\nHost: a\r\n\r\n", (400, "version")),
        // Methods.
        (b"POST / HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"PROPFIND / HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"M-SEARCH / HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "method")),
        (b"Get / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "method")),
        (b"G@T / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "method")),
        (b"G\0T / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "control_byte")),
        (b"ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFG / HTTP/1.1\r\nHost: a\r\n\r\n", (400, "method")),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", (405, "method_not_allowed")),
        (b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", (405, "method_not_allowed")),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", (405, "method_not_allowed")),
        (b"TRACER / HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400, "control_byte")),
        // Targets.
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET HTTP://b/ HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET foo HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET ?q HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET @evil/ HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET \\\\a HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_form")),
        (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", (400, "path_byte")),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_byte")),
        (b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", (400, "control_byte")),
        (b"GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", (400, "control_byte")),
        (b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", (400, "control_byte")),
        (b"GET /? HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"GET /a?b=c&d=/../%2e%2e//;x?y HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"GET /a?b[]={\"x\"} HTTP/1.1\r\nHost: a\r\n\r\n", (400, "query_byte")),
        (b"GET /a?b[]={x}|^`'%zz% HTTP/1.1\r\nHost: a\r\n\r\n", OK),
        (b"GET /a?b#c HTTP/1.1\r\nHost: a\r\n\r\n", (400, "query_byte")),
        (b"GET /a?<b> HTTP/1.1\r\nHost: a\r\n\r\n", (400, "query_byte")),
        (b"GET /a?b\\c HTTP/1.1\r\nHost: a\r\n\r\n", (400, "query_byte")),
        (b"GET /a?\xff HTTP/1.1\r\nHost: a\r\n\r\n", (400, "target_byte")),
        // Framing, where it takes two fields or a version.
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", (400, "two_lengths")),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", (400, "two_lengths")),
        (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", (400, "transfer_encoding")),
        (b"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\n", OK),
        // Host.
        (b"GET / HTTP/1.1\r\n\r\n", (400, "host_missing")),
        (b"GET / HTTP/1.0\r\n\r\n", (400, "host_missing")),
        (b"GET / HTTP/1.1\r\nX-Host: a\r\n\r\n", (400, "host_missing")),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", (400, "host")),
        (b"GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n", (400, "host")),
    ];

    #[test]
    fn a_head_with_two_meanings_is_refused() {
        for (head, expected) in HEADS {
            assert_eq!(verdict(head), *expected, "{}", head.escape_ascii());
        }
    }

    #[rustfmt::skip]
    const FIELDS: &[(&[u8], (u16, &str))] = &[
        // Syntax.
        (b"X: y", OK),
        (b"X:y", OK),
        (b"X:", OK),
        (b"X:   ", OK),
        (b"X: \t y \t", OK),
        (b"x-a_b-9: y", OK),
        (b"X : y", (400, "space_before_colon")),
        (b"X\t: y", (400, "space_before_colon")),
        (b" X: y", (400, "folded_line")),
        (b"X: y\r\n z", (400, "folded_line")),
        (b"X: y\r\n\tz", (400, "folded_line")),
        (b": y", (400, "field_name")),
        (b"X", (400, "field_name")),
        (b"X y", (400, "space_before_colon")),
        (b"X.Y: z", (400, "field_name")),
        (b"X!: z", (400, "field_name")),
        (b"X~: z", (400, "field_name")),
        (b"X\0: z", (400, "control_byte")),
        (b"X\xe9: z", (400, "field_name")),
        (b"X(: z", (400, "field_name")),
        (b"X: \0", (400, "control_byte")),
        (b"X: a\x01b", (400, "control_byte")),
        (b"X: a\x0bb", (400, "control_byte")),
        (b"X: a\x1bb", (400, "control_byte")),
        (b"X: a\x7f", (400, "control_byte")),
        (b"X: caf\xc3\xa9", OK),
        (b"Cookie: a=\xff", OK),
        // The fields by which a body is delimited.
        (b"Content-Length: 0", OK),
        (b"Content-Length: 5", OK),
        (b"Content-Length: 999999999999999999", OK),
        (b"Content-Length: 1000000000000000000", (400, "content_length")),
        (b"Content-Length: 18446744073709551617", (400, "content_length")),
        (b"Content-Length:", (400, "content_length")),
        (b"Content-Length: +5", (400, "content_length")),
        (b"Content-Length: -0", (400, "content_length")),
        (b"Content-Length: 010", (400, "content_length")),
        (b"Content-Length: 00", (400, "content_length")),
        (b"Content-Length: 0x5", (400, "content_length")),
        (b"Content-Length: 5 5", (400, "content_length")),
        (b"Content-Length: 5, 5", (400, "content_length")),
        (b"Content-Length: 5\r\nContent-Length: 5", (400, "content_length")),
        (b"Content-Length: 5\r\nCONTENT-LENGTH: 6", (400, "content_length")),
        (b"Content-Length: \xd9\xa5", (400, "content_length")),
        (b"Content_Length: 5", (400, "underscore_twin")),
        (b"content_length: nonsense", (400, "underscore_twin")),
        (b"Transfer-Encoding: chunked", OK),
        (b"transfer-encoding: CHUNKED", OK),
        (b"Transfer-Encoding: gzip, chunked", (400, "transfer_encoding")),
        (b"Transfer-Encoding: chunked, gzip", (400, "transfer_encoding")),
        (b"Transfer-Encoding: chunked, chunked", (400, "transfer_encoding")),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", (400, "transfer_encoding")),
        (b"Transfer-Encoding: chunked\r\nTransfer-encoding: x", (400, "transfer_encoding")),
        (b"Transfer-Encoding: identity", (400, "transfer_encoding")),
        (b"Transfer-Encoding: xchunked", (400, "transfer_encoding")),
        (b"Transfer-Encoding: chunked;q=1", (400, "transfer_encoding")),
        (b"Transfer-Encoding: \"chunked\"", (400, "transfer_encoding")),
        (b"Transfer-Encoding: \x0bchunked", (400, "control_byte")),
        (b"Transfer-Encoding: chunked\x80", (400, "transfer_encoding")),
        (b"Transfer-Encoding:", (400, "transfer_encoding")),
        (b"Transfer_Encoding: chunked", (400, "underscore_twin")),
        (b"Transfer-Encoding : chunked", (400, "space_before_colon")),
        (b"TE: trailers", OK),
        (b"Trailer: X-Sum", OK),
        // Expect.
        (b"Expect: 100-continue", OK),
        (b"Expect: 100-Continue", OK),
        (b"Expect: 200-ok", (417, "expect")),
        (b"Expect:", (417, "expect")),
        (b"Expect: 100-continue, x", (417, "expect")),
        (b"Expect: 100-continue\xa0", (417, "expect")),
        (b"Expect: 100-continue\r\nExpect: 100-continue", (400, "expect")),
        // Connection.
        (b"Connection: keep-alive", OK),
        (b"Connection: close, X-Thing,", OK),
        (b"Connection:", OK),
        (b"Connection: a,b,c,d,e,f,g,h", OK),
        (b"Connection: a,b,c,d,e,f,g,h,i", (400, "connection")),
        (b"Connection: a,b,c,d,e\r\nConnection: f,g,h,i", (400, "connection")),
        (b"Connection: close; x", (400, "connection")),
        (b"Connection: \"X-Forwarded-For\"", (400, "connection")),
        (b"Connection: :authority", (400, "connection")),
        (b"Connection: caf\xc3\xa9", (400, "connection")),
        (b"Connection: Host", (400, "connection")),
        (b"Connection: close, content-length", (400, "connection")),
        (b"Connection: Transfer-Encoding", (400, "connection")),
        (b"Connection: cookie", (400, "connection")),
        (b"Connection: Authorization", (400, "connection")),
        (b"Connection: forwarded", (400, "connection")),
        (b"Connection: X-Forwarded-For", (400, "connection")),
        (b"Connection: x_forwarded_user", (400, "connection")),
        // Upgrade.
        (b"Connection: upgrade", OK),
        (b"Upgrade-Insecure-Requests: 1", OK),
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__", (400, "upgrade")),
        (b"HTTP2-Settings: AAMAAABkAAQAAP__", (400, "http2_settings")),
        (b"Upgrade: TLS/1.0", (400, "upgrade")),
        (b"Upgrade: websocket, h2c", (400, "upgrade")),
        (b"Upgrade:", (400, "upgrade")),
        (b"Upgrade: \x80", (400, "upgrade")),
        (b"Upgrade: websocket", (400, "websocket")),
        (b"Connection: Upgrade\r\nUpgrade: websocket", (400, "websocket")),
        // Host.
        (b"Host_: a", OK),
    ];

    #[test]
    fn a_field_with_two_meanings_is_refused() {
        for (field, expected) in FIELDS {
            assert_eq!(verdict(&with_field(field)), *expected, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn a_host_has_one_spelling_that_all_understand() {
        let long_name = format!("{}.test", "a".repeat(248));
        #[rustfmt::skip]
        let cases = [
            ("a", true), ("example.org", true), ("EXAMPLE.org", true), ("example.org:1", true), ("a:8080", true),
            ("example.org.", true), ("example.org.:443", true), ("my_app.test", true), ("xn--caf-dma.test", true),
            ("192.0.2.7", true), ("192.0.2.7:65535", true), ("[::1]", true), ("[2001:DB8::1]:8080", true),
            ("[::ffff:192.0.2.7]", true), (&long_name[..253], true),
            ("", false), (".", false), ("a..b", false), (".a", false), ("a.:", false), ("a:", false), ("a:0", false),
            ("a:65536", false), ("a:99999", false), ("a:080", false), ("a:+80", false), ("a:80:80", false),
            ("a:8o", false), ("a:100000", false), ("a:-1", false), ("user@a", false), ("a@b:80", false), ("a,b", false),
            ("a b", false), ("a/b", false), ("a\\b", false), ("a?b", false), ("a#b", false), ("a%2eb", false),
            ("a;b", false), ("a*b", false), ("*", false), ("caf\u{e9}.test", false), ("::1", false), ("[::1", false),
            ("[]", false), ("[::1]x", false), ("[::1]:", false), ("[::1%25eth0]", false), ("[fe80::1%eth0]", false),
            ("[v1.x]", false), ("[192.0.2.7]", false), ("]", false), ("http://a", false), (&long_name, true),
            (&format!("{long_name}a"), false),
        ];
        for (host, valid) in cases {
            let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let expected = if valid { OK } else { (400, "host") };
            assert_eq!(verdict(head.as_bytes()), expected, "Host: {host:?}");
        }
    }

    #[test]
    fn only_a_complete_websocket_handshake_upgrades() {
        let handshake = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        assert_eq!(verdict(handshake.as_bytes()), OK);
        #[rustfmt::skip]
        let cases = [
            ("GET", "POST", "websocket"),
            ("GET", "HEAD", "websocket"),
            ("HTTP/1.1", "HTTP/1.0", "websocket"),
            ("keep-alive, Upgrade", "keep-alive", "websocket"),
            ("Connection: keep-alive, Upgrade\r\n", "", "websocket"),
            ("Version: 13", "Version: 8", "websocket"),
            ("Version: 13", "Version: 13, 8", "websocket"),
            ("Version: 13", "Version: 013", "websocket"),
            ("Sec-WebSocket-Version: 13\r\n", "", "websocket"),
            ("Sec-WebSocket-Version", "Sec_WebSocket_Version", "underscore_twin"),
            ("Sec-WebSocket-Key", "Sec-WebSocket_Key", "underscore_twin"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "", "websocket"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ=", "websocket"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQQQ", "websocket"),
            ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZ-==", "websocket"),
            ("Host: a\r\n", "Host: a\r\nContent-Length: 5\r\n", "websocket"),
            ("Host: a\r\n", "Host: a\r\nTransfer-Encoding: chunked\r\n", "websocket"),
            ("Host: a\r\n", "Host: a\r\nUpgrade: websocket\r\n", "upgrade"),
            ("Host: a\r\n", "Host: a\r\nSec-WebSocket-Version: 13\r\n", "websocket"),
            ("Upgrade: websocket", "Upgrade: h2c", "upgrade"),
        ];
        for (part, other, reason) in cases {
            let head = handshake.replacen(part, other, 1);
            assert_ne!(head, handshake, "{part:?} is in the handshake");
            assert_eq!(verdict(head.as_bytes()), (400, reason), "{part:?} -> {other:?}");
        }
        for (part, other) in [("websocket", "WebSocket"), ("Host: a\r\n", "Host: a\r\nContent-Length: 0\r\n")] {
            assert_eq!(verdict(handshake.replacen(part, other, 1).as_bytes()), OK, "{part:?} -> {other:?}");
        }
    }

    #[test]
    fn the_limits_hold_to_the_byte() {
        let target = |bytes: usize| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(bytes - 1));
        assert_eq!(verdict(target(LIMITS.target_bytes).as_bytes()), OK);
        assert_eq!(verdict(target(LIMITS.target_bytes + 1).as_bytes()), (414, "target_too_long"));

        let fields = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(count - 1));
        assert_eq!(verdict(fields(LIMITS.headers_max).as_bytes()), OK);
        assert_eq!(verdict(fields(LIMITS.headers_max + 1).as_bytes()), (431, "too_many_headers"));

        let name = |bytes: usize| with_field(format!("{}: y", "x".repeat(bytes)).as_bytes());
        assert_eq!(verdict(&name(NAME_BYTES_MAX)), OK);
        assert_eq!(verdict(&name(NAME_BYTES_MAX + 1)), (400, "field_name"));

        let boundless = HeadLimits { headers_max: usize::MAX, target_bytes: usize::MAX };
        let status = |head: String| inspect(head.as_bytes(), &boundless).err().map(|refusal| refusal.status.as_u16());
        assert_eq!(status(target(TARGET_BYTES_CEILING)), None);
        assert_eq!(status(target(TARGET_BYTES_CEILING + 1)), Some(414), "pingora can hold no more");
        assert_eq!(status(fields(HEADERS_CEILING)), None);
        assert_eq!(status(fields(HEADERS_CEILING + 1)), Some(431), "pingora can hold no more");
    }

    #[rustfmt::skip]
    const PATHS: &[(&str, &str)] = &[
        ("/", ""),
        ("/a", ""),
        ("/a/b/c.html", ""),
        ("/a/", ""),
        ("/.well-known/acme-challenge/x_Y-z~", ""),
        ("/...", ""),
        ("/.a/a./..a/a..", ""),
        ("/a!$&'()*+,=:@b", ""),
        ("/@scope/name", ""),
        ("/users/ann%40example.org", ""),
        ("/a%20b", ""),
        ("/caf%C3%A9", ""),
        ("/caf%c3%a9", ""),
        ("/%E2%82%AC/%F0%9F%98%80", ""),
        ("/%7Eann", ""),
        ("/what%3F%23%5B%5D%22%3C%3E%7B%7D%7C%5E%60", ""),
        ("/a%2Bb%26c%3Dd%3A%2C%24%21%27%28%29%2A", ""),
        ("/_next/pages/[slug].js", ""),
        ("", "target_form"),
        ("a", "target_form"),
        ("*", "target_form"),
        ("http://a/", "target_form"),
        ("//", "path_empty_segment"),
        ("//evil.test/", "path_empty_segment"),
        ("/a//b", "path_empty_segment"),
        ("/a//", "path_empty_segment"),
        ("/.", "path_dot_segment"),
        ("/..", "path_dot_segment"),
        ("/./a", "path_dot_segment"),
        ("/a/./b", "path_dot_segment"),
        ("/a/../b", "path_dot_segment"),
        ("/a/..", "path_dot_segment"),
        ("/a/.", "path_dot_segment"),
        ("/../a", "path_dot_segment"),
        ("/a/../", "path_dot_segment"),
        ("/a/%2e%2e/b", "path_encoded"),
        ("/a/.%2e/b", "path_encoded"),
        ("/a/%2E/b", "path_encoded"),
        ("/a%2fb", "path_encoded"),
        ("/a%2Fb", "path_encoded"),
        ("/a%5cb", "path_encoded"),
        ("/a%5Cb", "path_encoded"),
        ("/a%252fb", "path_encoded"),
        ("/100%25", "path_encoded"),
        ("/a%3bb", "path_encoded"),
        ("/a%3Bb", "path_encoded"),
        ("/a%00", "path_encoded"),
        ("/a%0d%0aX:y", "path_encoded"),
        ("/a%09", "path_encoded"),
        ("/a%1f", "path_encoded"),
        ("/a%7f", "path_encoded"),
        ("/%61dmin", "path_encoded"),
        ("/%41", "path_encoded"),
        ("/%30", "path_encoded"),
        ("/a%2Db", "path_encoded"),
        ("/a%5Fb", "path_encoded"),
        ("/a;b", "path_parameter"),
        ("/a;jsessionid=1/b", "path_parameter"),
        ("/..;/a", "path_parameter"),
        ("/;", "path_parameter"),
        ("/a\\b", "path_byte"),
        ("/\\evil.test", "path_byte"),
        ("/a|b", "path_byte"),
        ("/a^b", "path_byte"),
        ("/a`b", "path_byte"),
        ("/{a}", "path_byte"),
        ("/a\"b", "path_byte"),
        ("/<a>", "path_byte"),
        ("/a b", "path_byte"),
        ("/a\tb", "path_byte"),
        ("/a\0", "path_byte"),
        ("/a\r\n", "path_byte"),
        ("/a#b", "path_byte"),
        ("/a?b", "path_byte"),
        ("/caf\u{e9}", "path_byte"),
        ("/a\u{7f}", "path_byte"),
        ("/%", "path_percent"),
        ("/%4", "path_percent"),
        ("/%zz", "path_percent"),
        ("/%4g", "path_percent"),
        ("/%+1", "path_percent"),
        ("/%u002f", "path_percent"),
        ("/%%32%66", "path_percent"),
        ("/%C3%", "path_percent"),
        ("/%c0%ae", "path_utf8"),
        ("/%c0%af", "path_utf8"),
        ("/%e0%80%af", "path_utf8"),
        ("/%f0%80%80%af", "path_utf8"),
        ("/%ed%a0%80", "path_utf8"),
        ("/%f4%90%80%80", "path_utf8"),
        ("/%ff", "path_utf8"),
        ("/%80", "path_utf8"),
        ("/caf%E9", "path_utf8"),
        ("/%C3", "path_utf8"),
        ("/%C3/x", "path_utf8"),
        ("/%C3a9", "path_utf8"),
        ("/%C3%28", "path_utf8"),
        ("/%E2%82x", "path_utf8"),
    ];

    #[test]
    fn a_path_that_readers_split_differently_is_refused() {
        for (text, reason) in PATHS {
            let expected = if reason.is_empty() { None } else { Some((StatusCode::BAD_REQUEST, *reason)) };
            let got = path(text).err().map(|refusal| (refusal.status, refusal.reason));
            assert_eq!(got, expected, "{text:?}");
        }
    }

    #[test]
    fn an_accepted_path_keeps_its_segments_when_decoded_once_or_twice() {
        let mut rng = StdRng::seed_from_u64(114);
        let pieces = ["/", "a", ".", "%", "2", "f", "e", "5", "c", "%2f", "%C3", "%A9", "%20", "%40", ";", "\\", "~"];
        let mut accepted = 0;
        for _ in 0..100_000 {
            let length = rng.random_range(0..8);
            let text: String = (0..length).map(|_| pieces[rng.random_range(0..pieces.len())]).collect();
            let text = format!("/{text}");
            if path(&text).is_err() {
                continue;
            }
            accepted += 1;
            let once = percent_encoding::percent_decode_str(&text).decode_utf8().unwrap();
            let twice = percent_encoding::percent_decode_str(&once).decode_utf8().unwrap();
            assert_eq!(once, twice, "{text}: nothing is left to decode");
            assert_eq!(once.matches(['/', ';', '\\']).count(), text.matches('/').count(), "{text}: no new separators");
            let mut segments = once[1..].split('/').rev().skip_while(|last| last.is_empty());
            assert!(segments.all(|segment| !matches!(segment, "" | "." | "..")), "{text}: no segment disappears");
        }
        assert!(1000 < accepted, "the pieces make good paths too: {accepted}");
    }

    #[test]
    fn a_head_ends_at_its_empty_line_or_at_its_first_certain_fault() {
        #[rustfmt::skip]
        let cases: [(&[u8], Option<usize>); 14] = [
            (b"", None),
            (b"GET / HTTP/1.1\r\n", None),
            (b"GET / HTTP/1.1\r\nHost: a\r\n\r", None),
            (b"GET / HTTP/1.1\r\n\r\n", Some(18)),
            (b"GET / HTTP/1.1\r\n\r\nbody\r\n\r\n", Some(18)),
            (b"A\r\nB\r\n\r\nC", Some(8)),
            (b"\r\n", Some(2)),
            (b"\n", Some(1)),
            (b"\n\n", Some(1)),
            (b"GET /\n", Some(6)),
            (b"GET /\r\nA\nB", Some(9)),
            (b"GET /\r\n\n", Some(8)),
            (b"GET /\r\r\n", None),
            (b"GET /\r\n\r\r\n", None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(head_end(bytes, 0), expected, "{}", bytes.escape_ascii());
            for from in 0..bytes.len() {
                if head_end(&bytes[..from], 0).is_none() {
                    assert_eq!(head_end(bytes, from), expected, "{} resumed at {from}", bytes.escape_ascii());
                }
            }
        }
        assert_eq!(head_end(b"abc", 7), None, "nothing is there yet");
    }

    #[test]
    fn an_early_end_is_always_refused() {
        for head in [&b"\n\n"[..], b"\r\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: a\n", b"GET /\r\n\n"] {
            let end = head_end(head, 0).unwrap();
            assert_eq!(verdict(&head[..end]).0, 400, "{}", head.escape_ascii());
        }
    }

    /// What pingora makes of the same bytes: method, target, host and number of fields; `None` if it refuses.
    async fn as_pingora_reads(head: &[u8]) -> Option<(String, Vec<u8>, Vec<u8>, usize)> {
        let (_, server) = tokio::io::duplex(1);
        let mut session = HttpSession::new(Box::new(server));
        session.set_pipelined_prefix(BytesMut::from(head));
        let length = session.read_request().await.ok()??;
        assert_eq!(length, head.len(), "the head ends where the guard says: {}", head.escape_ascii());
        let request = session.req_header();
        let host = request.headers.get("host")?.as_bytes().to_vec();
        Some((request.method.to_string(), request.raw_path().to_vec(), host, request.headers.len()))
    }

    /// The same, by splitting at what must be the only separators.
    fn as_split(head: &[u8]) -> (String, Vec<u8>, Vec<u8>, usize) {
        let text = head.iter().map(|&byte| char::from(byte)).collect::<String>();
        let mut lines = text.strip_suffix("\r\n\r\n").unwrap().split("\r\n");
        let mut words = lines.next().unwrap().split(' ');
        let fields: Vec<_> = lines.map(|line| line.split_once(':').unwrap()).collect();
        let host = fields.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")).unwrap().1.trim();
        let (method, target) = (words.next().unwrap(), words.next().unwrap());
        (method.to_owned(), target.into(), host.into(), fields.len())
    }

    /// Every head of the tables; the good ones, of which there are fewer, several times.
    fn heads() -> Vec<Vec<u8>> {
        let heads = HEADS.iter().map(|(head, _)| head.to_vec());
        let heads = heads.chain(FIELDS.iter().map(|(field, _)| with_field(field)));
        heads
            .flat_map(|head| std::iter::repeat_n(head.clone(), if inspect(&head, &LIMITS).is_ok() { 5 } else { 1 }))
            .collect()
    }

    fn mutated(heads: &[Vec<u8>], rng: &mut StdRng) -> Vec<u8> {
        const BYTES: &[u8] = b"\0\t\n\r \"#%,-./0:;<?@AHa\\_{|\x7f\x80\xc3\xff";
        let mut head = heads[rng.random_range(0..heads.len())].clone();
        for _ in 0..rng.random_range(0..4) {
            let at = rng.random_range(0..=head.len());
            let byte = BYTES[rng.random_range(0..BYTES.len())];
            match rng.random_range(0..5) {
                0 => head.insert(at, byte),
                1 if at < head.len() => head[at] = byte,
                2 if at < head.len() => drop(head.remove(at)),
                3 => {
                    let from = rng.random_range(0..=at);
                    let piece = head[from..at].to_vec();
                    head.splice(at..at, piece);
                }
                _ => {
                    let field = FIELDS[rng.random_range(0..FIELDS.len())].0;
                    let at = head.windows(2).position(|pair| pair == b"\r\n").map_or(0, |end| end + 2);
                    head.splice(at..at, [field, b"\r\n"].concat());
                }
            }
        }
        head
    }

    #[tokio::test]
    async fn pingora_reads_an_accepted_head_as_the_guard_did() {
        let mut rng = StdRng::seed_from_u64(105);
        let heads = heads();
        let mut accepted = 0;
        for _ in 0..20_000 {
            let head = mutated(&heads, &mut rng);
            let end = head_end(&head, 0);
            if inspect(&head, &LIMITS).is_ok() {
                accepted += 1;
                assert_eq!(end, Some(head.len()), "{}", head.escape_ascii());
                assert_eq!(as_pingora_reads(&head).await, Some(as_split(&head)), "{}", head.escape_ascii());
            }
        }
        assert!(2000 < accepted, "the comparison has something to compare: {accepted}");
    }

    #[test]
    fn noise_never_passes_and_never_panics() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..20_000 {
            let noise: Vec<u8> = (0..rng.random_range(0..80)).map(|_| rng.random()).collect();
            assert!(inspect(&noise, &LIMITS).is_err(), "{}", noise.escape_ascii());
            let _ = head_end(&noise, rng.random_range(0..100));
            let _ = path(&String::from_utf8_lossy(&noise));
        }
    }
}
