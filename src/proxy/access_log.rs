//! One line per request: who asked for what, what became of it, and who answered. Nothing secret: no query, no
//! cookie, no session id.

use std::cell::RefCell;
use std::io::Write;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::config::model::LogFormat;
use crate::log::Lines;

/// What there is to say of one request.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    pub time: String,
    pub request_id: &'a str,
    pub client: IpAddr,
    pub method: &'a str,
    pub host: &'a str,
    pub path: &'a str,
    pub status: u16,
    pub outcome: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<&'a str>,
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
    pub duration_ms: f64,
}

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
        lines.push(|line| {
            match self.format {
                LogFormat::Json => serde_json::to_writer(&mut *line, entry).expect("an entry is plain JSON"),
                LogFormat::Text => entry.write_text(line),
            }
            line.push(b'\n');
        });
    }
}

impl Entry<'_> {
    fn write_text(&self, line: &mut Vec<u8>) {
        let _ = write!(line, "{} {} {} {}", self.time, self.client, self.method, self.host);
        push_word(line, self.path);
        let _ = write!(line, " {} {}", self.status, self.outcome);
        let fields = [
            (" reason=", self.reason),
            (" route=", self.route),
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
        let _ = write!(line, " in={} out={} ms={:.3}", self.bytes_in, self.bytes_out, self.duration_ms);
    }
}

/// A value as one word: what could end the word, the line or the terminal's patience is escaped.
fn push_word(line: &mut Vec<u8>, text: &str) {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'=');
    if text.bytes().all(is_plain) {
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

/// Now, as log lines say it: `2026-01-02T03:04:05.678Z`.
pub fn timestamp() -> String {
    thread_local! {
        /// The text of a second, which many requests share.
        static SECOND: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != now.as_secs() || text.is_empty() {
            let time = OffsetDateTime::from_unix_timestamp(now.as_secs() as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH);
            *text = time.format(&Rfc3339).unwrap_or_default();
            *second = now.as_secs();
        }
        let date_and_time = text.strip_suffix('Z').unwrap_or(text);
        format!("{date_and_time}.{:03}Z", now.subsec_millis())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    fn entry(path: &str) -> Entry<'_> {
        Entry {
            time: "2026-01-02T03:04:05.678Z".to_owned(),
            request_id: "0a",
            client: IpAddr::from([192, 0, 2, 1]),
            method: "GET",
            host: "example.org",
            path,
            status: 200,
            outcome: "forwarded",
            reason: None,
            route: Some("/"),
            backend: Some("127.0.0.1:1"),
            user: Some("ann"),
            session: None,
            session_source: None,
            bytes_in: 0,
            bytes_out: 5,
            duration_ms: 1.25,
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
    fn a_value_cannot_forge_a_second_line_or_field() {
        let text = written(LogFormat::Text, &[entry("/a\nb user=root \x1b[31m")]);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        assert_eq!(text.matches("user=").count(), 1, "{text:?}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }

    #[test]
    fn the_time_is_utc_to_the_millisecond() {
        let text = timestamp();
        let shape = text.bytes().map(|byte| if byte.is_ascii_digit() { b'0' } else { byte }).collect::<Vec<_>>();
        assert_eq!(shape, b"0000-00-00T00:00:00.000Z", "{text}");
        let read = OffsetDateTime::parse(&text, &Rfc3339).unwrap();
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
