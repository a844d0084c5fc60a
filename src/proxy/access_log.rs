//! One line per request: who asked for what, what became of it, and who answered. Nothing secret: no query, no
//! cookie, no session id.

use std::cell::RefCell;
use std::io::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::config::model::LogFormat;

/// Lines gather for this long before they are written in one system call: a write and a wake-up for each would
/// cost more than the request.
const GATHER: Duration = Duration::from_millis(50);

/// When the reader of our output is stuck, lines beyond this are dropped and counted, never waited for.
const WAITING_BYTES_MAX: usize = 4 << 20;

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
    pub bytes_in: usize,
    pub bytes_out: usize,
    pub duration_ms: f64,
}

/// Where the lines go.
#[derive(Clone, Debug)]
pub struct AccessLog {
    sink: Option<Arc<Sink>>,
    format: LogFormat,
}

#[derive(Debug, Default)]
struct Sink {
    waiting: Mutex<Waiting>,
    something: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    dropped: u64,
    closed: bool,
}

/// Writes what waits until the log is closed; joining it is the flush.
#[derive(Debug)]
pub struct Writer {
    sink: Arc<Sink>,
    thread: Option<JoinHandle<()>>,
}

impl AccessLog {
    /// A log that says nothing.
    pub fn silent() -> Self {
        Self { sink: None, format: LogFormat::Text }
    }

    /// A log on `output`, and the thread that writes it.
    pub fn to(output: impl Write + Send + 'static, format: LogFormat) -> std::io::Result<(Self, Writer)> {
        let sink = Arc::new(Sink::default());
        let reader = Arc::clone(&sink);
        let thread = std::thread::Builder::new().name("access-log".into()).spawn(move || reader.drain(output))?;
        Ok((Self { sink: Some(Arc::clone(&sink)), format }, Writer { sink, thread: Some(thread) }))
    }

    /// Whether anybody reads: lets the caller save the work of making an entry.
    pub fn is_silent(&self) -> bool {
        self.sink.is_none()
    }

    pub fn write(&self, entry: &Entry<'_>) {
        let Some(sink) = &self.sink else { return };
        let mut waiting = sink.waiting.lock();
        if WAITING_BYTES_MAX < waiting.lines.len() {
            waiting.dropped += 1;
            return;
        }
        let was_empty = waiting.lines.is_empty();
        match self.format {
            LogFormat::Json => serde_json::to_writer(&mut waiting.lines, entry).expect("an entry is plain JSON"),
            LogFormat::Text => entry.write_text(&mut waiting.lines),
        }
        waiting.lines.push(b'\n');
        drop(waiting);
        if was_empty {
            sink.something.notify_one();
        }
    }
}

impl Sink {
    fn drain(&self, mut output: impl Write) {
        let mut lines = Vec::new();
        loop {
            let mut waiting = self.waiting.lock();
            while waiting.lines.is_empty() && !waiting.closed {
                self.something.wait(&mut waiting);
            }
            if !waiting.closed {
                self.something.wait_while_for(&mut waiting, |waiting| !waiting.closed, GATHER);
            }
            lines.clear();
            std::mem::swap(&mut lines, &mut waiting.lines);
            let (dropped, closed) = (std::mem::take(&mut waiting.dropped), waiting.closed);
            drop(waiting);
            if 0 < dropped {
                tracing::warn!(dropped, "access log lines dropped: standard output is not read");
            }
            // A closed or full output must not touch the traffic; there is nowhere left to say so.
            let _ = output.write_all(&lines).and_then(|()| output.flush());
            if closed {
                return;
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.sink.waiting.lock().closed = true;
        self.sink.something.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
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
        let (log, writer) = AccessLog::to(output.clone(), format).unwrap();
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
