//! One line per request: who asked for what, what became of it, and who answered. Nothing secret: no query, no
//! cookie, no session id.

use std::cell::RefCell;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use time::OffsetDateTime;

use crate::config::model::LogFormat;
use crate::log::Lines;

/// What there is to say of one request.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    pub time: Timestamp,
    pub request_id: &'a str,
    pub client: &'a str,
    pub method: &'a str,
    pub host: &'a str,
    pub path: &'a str,
    pub status: u16,
    pub outcome: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<&'a str>,
    /// That took the request, where the route has some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<&'a str>,
    /// A hash of the session, good for finding its other lines and for nothing else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<&'a str>,
    /// `grace` or `fallback`, when the session was known without the store, which is down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_source: Option<&'a str>,
    pub bytes_in: usize,
    pub bytes_out: usize,
    #[serde(rename = "duration_ms", serialize_with = "as_millis")]
    pub duration: Duration,
}

/// A moment, as log lines say it: UTC, to the millisecond, `2026-01-02T03:04:05.678Z`.
#[derive(Clone, Copy, Debug)]
pub struct Timestamp([u8; TIMESTAMP_BYTES]);

const TIMESTAMP_BYTES: usize = "2026-01-02T03:04:05.678Z".len();

/// Takes the entries.
#[derive(Clone, Debug)]
pub struct AccessLog {
    lines: Option<Lines>,
    format: LogFormat,
}

impl AccessLog {
    /// A log that says nothing.
    pub fn silent() -> Self {
        Self { lines: None, format: LogFormat::Text }
    }

    pub fn to(lines: Lines, format: LogFormat) -> Self {
        Self { lines: Some(lines), format }
    }

    /// Whether nobody reads: saves the work of making an entry.
    pub fn is_silent(&self) -> bool {
        self.lines.is_none()
    }

    pub fn write(&self, entry: &Entry<'_>) {
        let Some(lines) = &self.lines else { return };
        thread_local! {
            /// Written here first: workers wait for each other only while a line is copied.
            static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        LINE.with_borrow_mut(|line| {
            line.clear();
            match self.format {
                LogFormat::Json => serde_json::to_writer(&mut *line, entry).expect("an entry is plain JSON"),
                LogFormat::Text => entry.write_text(line),
            }
            line.push(b'\n');
            lines.push(|lines| lines.extend_from_slice(line));
        });
    }
}

impl Entry<'_> {
    fn write_text(&self, line: &mut Vec<u8>) {
        for word in [self.time.as_str(), " ", self.client, " ", self.method, " ", self.host] {
            line.extend_from_slice(word.as_bytes());
        }
        push_word(line, self.path);
        line.push(b' ');
        push_number(line, u64::from(self.status));
        line.push(b' ');
        line.extend_from_slice(self.outcome.as_bytes());
        let fields = [
            (" reason=", self.reason),
            (" route=", self.route),
            (" split=", self.split),
            (" backend=", self.backend),
            (" user=", self.user),
            (" session=", self.session),
            (" session_source=", self.session_source),
            (" id=", Some(self.request_id)),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                line.extend_from_slice(name.as_bytes());
                push_word(line, value);
            }
        }
        line.extend_from_slice(b" in=");
        push_number(line, self.bytes_in as u64);
        line.extend_from_slice(b" out=");
        push_number(line, self.bytes_out as u64);
        line.extend_from_slice(b" ms=");
        let micros = self.duration.as_micros() as u64;
        push_number(line, micros / 1000);
        line.push(b'.');
        line.extend_from_slice(&digits::<3>(micros % 1000));
    }
}

/// A value as one word: what could end the word, the line or the terminal's patience is escaped.
fn push_word(line: &mut Vec<u8>, text: &str) {
    let is_plain = |byte: u8| byte.is_ascii_graphic() & (byte != b'"') & (byte != b'\\') & (byte != b'=');
    // Without an early end, so that many bytes are looked at at once.
    if text.bytes().fold(true, |all, byte| all & is_plain(byte)) {
        line.extend_from_slice(text.as_bytes());
        return;
    }
    for character in text.chars() {
        if character.is_control() || matches!(character, ' ' | '"' | '\\' | '=') {
            let _ = write!(line, "{}", character.escape_unicode());
        } else {
            let _ = write!(line, "{character}");
        }
    }
}

/// In decimal. The machinery of `write!` takes several times as long, and a line has many numbers.
fn push_number(line: &mut Vec<u8>, number: u64) {
    let mut digits = [0; 20];
    let mut rest = number;
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    line.extend_from_slice(&digits[first..]);
}

/// The last `N` decimal digits, zeros in front.
fn digits<const N: usize>(number: u64) -> [u8; N] {
    let mut digits = [b'0'; N];
    let mut rest = number;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    digits
}

fn as_millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_micros() as f64 / 1e3)
}

impl Timestamp {
    /// Of a moment just read from the steady clock, which spares a look at the other one: a thread compares the two
    /// once per second.
    pub fn at(moment: Instant) -> Self {
        thread_local! {
            static SECOND: RefCell<Second> = RefCell::new(Second::now());
        }
        let (mut text, millis) = SECOND.with_borrow_mut(|second| {
            if second.millis_until(moment).is_none() {
                *second = Second::now();
            }
            (second.text, second.millis_until(moment).unwrap_or_default())
        });
        text.0[TIMESTAMP_BYTES - 4..TIMESTAMP_BYTES - 1].copy_from_slice(&digits::<3>(millis));
        text
    }

    /// The beginning of a second, Unix time.
    fn of_second(second: u64) -> Self {
        let time = i64::try_from(second).ok().and_then(|second| OffsetDateTime::from_unix_timestamp(second).ok());
        let time = time.unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let mut text = *b"0000-00-00T00:00:00.000Z";
        text[0..4].copy_from_slice(&digits::<4>(time.year().unsigned_abs().into()));
        text[5..7].copy_from_slice(&digits::<2>(u8::from(time.month()).into()));
        text[8..10].copy_from_slice(&digits::<2>(time.day().into()));
        text[11..13].copy_from_slice(&digits::<2>(time.hour().into()));
        text[14..16].copy_from_slice(&digits::<2>(time.minute().into()));
        text[17..19].copy_from_slice(&digits::<2>(time.second().into()));
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// A second of the wall clock, on the steady one.
struct Second {
    text: Timestamp,
    begins: Instant,
}

impl Second {
    fn now() -> Self {
        let (now, moment) = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), Instant::now());
        let into = Duration::from_nanos(now.subsec_nanos().into());
        Self { text: Timestamp::of_second(now.as_secs()), begins: moment.checked_sub(into).unwrap_or(moment) }
    }

    /// From its beginning; nothing when the moment lies outside.
    fn millis_until(&self, moment: Instant) -> Option<u64> {
        let millis = moment.checked_duration_since(self.begins)?.as_millis() as u64;
        (millis < 1000).then_some(millis)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use time::format_description::well_known::Rfc3339;

    use super::*;

    fn entry(path: &str) -> Entry<'_> {
        Entry {
            time: Timestamp(*b"2026-01-02T03:04:05.678Z"),
            request_id: "0a",
            client: "192.0.2.1",
            method: "GET",
            host: "example.org",
            path,
            status: 200,
            outcome: "forwarded",
            reason: None,
            route: Some("/"),
            split: None,
            backend: Some("127.0.0.1:1"),
            user: Some("ann"),
            session: None,
            session_source: None,
            bytes_in: 0,
            bytes_out: 5,
            duration: Duration::from_micros(1_250),
        }
    }

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written(format: LogFormat, entries: &[Entry<'_>]) -> String {
        let output = Output::default();
        let (lines, writer) = Lines::to("test", output.clone()).unwrap();
        let log = AccessLog::to(lines, format);
        entries.iter().for_each(|entry| log.write(entry));
        drop(writer);
        let bytes = output.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_line_is_written_before_the_writer_ends() {
        let text = written(LogFormat::Text, &[entry("/a")]);
        let expected = "2026-01-02T03:04:05.678Z 192.0.2.1 GET example.org/a 200 forwarded route=/ \
                        backend=127.0.0.1:1 user=ann id=0a in=0 out=5 ms=1.250\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn who_was_known_without_the_store_is_marked() {
        let marked = Entry { session: Some("ab"), session_source: Some("grace"), ..entry("/a") };
        let text = written(LogFormat::Text, &[marked]);
        assert!(text.contains(" session=ab session_source=grace id="), "{text}");
    }

    #[test]
    fn a_split_that_took_the_request_is_named() {
        let next = Entry { split: Some("next"), ..entry("/a") };
        let text = written(LogFormat::Text, &[next]);
        assert!(text.contains(" route=/ split=next backend=127.0.0.1:1 "), "{text}");
    }

    #[test]
    fn a_value_cannot_forge_a_second_line_or_field() {
        let text = written(LogFormat::Text, &[entry("/a\nb user=root \x1b[31m")]);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        assert_eq!(text.matches("user=").count(), 1, "{text:?}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }

    #[test]
    fn the_time_is_utc_to_the_millisecond() {
        let now = Timestamp::at(Instant::now());
        let text = now.as_str();
        let shape = text.bytes().map(|byte| if byte.is_ascii_digit() { b'0' } else { byte }).collect::<Vec<_>>();
        assert_eq!(shape, b"0000-00-00T00:00:00.000Z", "{text}");
        let read = OffsetDateTime::parse(text, &Rfc3339).unwrap();
        assert!((OffsetDateTime::now_utc() - read).abs() < time::Duration::MINUTE);
    }

    #[test]
    fn json_lines_are_json() {
        let text = written(LogFormat::Json, &[entry("/\"quoted\""), entry("/b")]);
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["path"], "/\"quoted\"");
        assert_eq!(lines[1]["duration_ms"], 1.25);
        assert_eq!(lines[1].get("session"), None, "absent is absent, not null");
    }
}
