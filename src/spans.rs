//! How do spans get out? In the background, many at a time, by OTLP over HTTP in its JSON form; what the collector does not
//! take is dropped and counted, never waited for.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use serde_json::{Value, json};
use ureq::Agent;

use crate::metrics::Metrics;
use crate::outgoing;

/// Spans gather for this long before they are sent in one request.
const GATHER: Duration = Duration::from_millis(500);

/// Sent at once when there are so many.
const BATCH_SPANS_MAX: usize = 512;

/// Requests whose spans may wait while the collector does not answer; those of further ones are dropped.
const WAITING_REQUESTS_MAX: usize = 2048;

/// For one POST, from the look-up of the name to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// At the end, how long the last spans may take to be sent.
const LAST_SPANS: Duration = Duration::from_secs(1);

const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// One piece of work, of the request with this trace.
#[derive(Clone, Debug)]
pub struct Span {
    pub trace: u128,
    pub id: u64,
    pub parent: Option<u64>,
    pub kind: Kind,
    pub name: Cow<'static, str>,
    pub start: SystemTime,
    pub end: SystemTime,
    pub attributes: Vec<(&'static str, Attribute)>,
    pub has_failed: bool,
}

/// Whose work it is, with the numbers of OTLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours alone.
    Internal = 1,
    /// For who asked us.
    Server = 2,
    /// Of somebody whom we ask.
    Client = 3,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    Text(Cow<'static, str>),
    Number(i64),
}

/// Where spans are left; cheap to clone.
#[derive(Clone, Debug)]
pub struct Spans {
    queue: SyncSender<Vec<Span>>,
    metrics: Metrics,
    /// Traces with a lower number are recorded.
    sampled_below: u64,
}

/// Sends what is left in [`Spans`]; dropping it sends the rest.
#[derive(Debug)]
pub struct SpanSender {
    queue: SyncSender<Vec<Span>>,
    is_closed: Arc<AtomicBool>,
    done: parking_lot::Mutex<Receiver<()>>,
}

/// Where to, and as whom.
#[derive(Clone, Debug)]
pub struct Collector<'c> {
    /// Without the path `/v1/traces`.
    pub endpoint: &'c str,
    /// `service.name`
    pub service: &'c str,
    /// Sent along, to say who sends; what is secret in them is marked as sensitive.
    pub headers: HeaderMap,
}

impl Spans {
    /// `ratio`: of the traces that begin here, from 0 to 1. Also gives the sender, which has a thread of its own.
    pub fn to(collector: &Collector<'_>, ratio: f64, metrics: &Metrics) -> io::Result<(Self, SpanSender)> {
        let (queue, waiting) = mpsc::sync_channel(WAITING_REQUESTS_MAX);
        let (finished, done) = mpsc::channel();
        let is_closed = Arc::new(AtomicBool::new(false));
        let export = Export {
            agent: outgoing::agent(collector.endpoint.starts_with("https:"), TIMEOUT),
            url: format!("{}/v1/traces", collector.endpoint.trim_end_matches('/')),
            service: collector.service.to_owned(),
            headers: collector.headers.clone(),
            metrics: metrics.clone(),
            is_closed: Arc::clone(&is_closed),
        };
        std::thread::Builder::new().name("spans".to_owned()).spawn(move || {
            export.run(&waiting);
            let _ = finished.send(());
        })?;
        let sampled_below = (ratio.clamp(0.0, 1.0) * SAMPLES as f64) as u64;
        let sender = SpanSender { queue: queue.clone(), is_closed, done: parking_lot::Mutex::new(done) };
        Ok((Self { queue, metrics: metrics.clone(), sampled_below }, sender))
    }

    /// Whether a trace that begins here is recorded. Its id decides, so that all who go by it decide alike.
    pub fn samples(&self, trace: u128) -> bool {
        (trace as u64) >> 1 < self.sampled_below
    }

    /// Leaves the spans of one request.
    pub fn push(&self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        if self.queue.try_send(spans).is_err() {
            self.metrics.spans.with_label_values(&["dropped"]).inc_by(count);
        }
    }
}

/// As many as half of a trace's id has values, but for its last bit.
const SAMPLES: u64 = 1 << 63;

struct Export {
    agent: Agent,
    url: String,
    service: String,
    headers: HeaderMap,
    metrics: Metrics,
    is_closed: Arc<AtomicBool>,
}

impl Export {
    fn run(self, waiting: &Receiver<Vec<Span>>) {
        let mut was_taken = true;
        let mut has_ended = false;
        while !has_ended {
            let Ok(mut batch) = waiting.recv() else { return };
            let deadline = Instant::now() + GATHER;
            while batch.len() < BATCH_SPANS_MAX {
                let patience = match self.is_closed.load(Ordering::Relaxed) {
                    true => Duration::ZERO,
                    false => deadline.saturating_duration_since(Instant::now()),
                };
                match waiting.recv_timeout(patience) {
                    Ok(spans) => batch.extend(spans),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                        has_ended = self.is_closed.load(Ordering::Relaxed);
                        break;
                    }
                }
            }
            if !batch.is_empty() {
                was_taken = self.send(&batch, was_taken);
            }
        }
    }

    /// Whether they were taken. Tells of a change, and not of each failure.
    fn send(&self, batch: &[Span], was_taken: bool) -> bool {
        let failure = match self.post(&body(&self.service, batch)) {
            Ok(200..=299) => None,
            Ok(status) => Some(format!("it answers {status}")),
            Err(error) => Some(error.to_string()),
        };
        let result = if failure.is_none() { "sent" } else { "dropped" };
        self.metrics.spans.with_label_values(&[result]).inc_by(batch.len() as u64);
        match &failure {
            Some(cause) if was_taken => tracing::warn!(cause, "the collector does not take spans: they are dropped"),
            None if !was_taken => tracing::info!("the collector takes spans again"),
            Some(_) | None => {}
        }
        failure.is_none()
    }

    fn post(&self, body: &Value) -> Result<u16, ureq::Error> {
        let mut request = self.agent.post(&self.url).header("content-type", "application/json");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let mut response = request.send(&body.to_string())?;
        // What it says does not matter; read, a short answer leaves the connection for the next batch.
        let _ = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        Ok(response.status().as_u16())
    }
}

impl Drop for SpanSender {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::Relaxed);
        // Wakes the thread; when the queue is full, it is awake.
        let _ = self.queue.try_send(Vec::new());
        // A collector that does not answer must not keep the process.
        let _ = self.done.get_mut().recv_timeout(LAST_SPANS);
    }
}

/// An `ExportTraceServiceRequest` in the JSON of OTLP 1: ids in hexadecimal, 64-bit numbers as text, names in camel case.
fn body(service: &str, spans: &[Span]) -> Value {
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    let resource = [("service.name", service), ("service.version", VERSION)]
        .map(|(key, value)| json!({ "key": key, "value": { "stringValue": value } }));
    json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{
            "scope": { "name": "cloakroom", "version": VERSION },
            "spans": spans.iter().map(encoded).collect::<Vec<_>>(),
        }],
    }] })
}

fn encoded(span: &Span) -> Value {
    let nanoseconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    let attributes = span.attributes.iter().map(|(key, value)| {
        let value = match value {
            Attribute::Text(text) => json!({ "stringValue": text }),
            Attribute::Number(number) => json!({ "intValue": number.to_string() }),
        };
        json!({ "key": key, "value": value })
    });
    let mut encoded = json!({
        "traceId": format!("{:032x}", span.trace),
        "spanId": format!("{:016x}", span.id),
        "kind": span.kind as u8,
        "name": span.name,
        "startTimeUnixNano": nanoseconds(span.start),
        "endTimeUnixNano": nanoseconds(span.end),
        "attributes": attributes.collect::<Vec<_>>(),
        "status": if span.has_failed { json!({ "code": STATUS_ERROR }) } else { json!({}) },
    });
    if let Some(parent) = span.parent {
        encoded["parentSpanId"] = format!("{parent:016x}").into();
    }
    encoded
}

const STATUS_ERROR: u8 = 2;

impl From<&'static str> for Attribute {
    fn from(text: &'static str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Attribute {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<u16> for Attribute {
    fn from(number: u16) -> Self {
        Self::Number(number.into())
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::tonic::common::v1::any_value;

    use super::*;

    /// Read by what OpenTelemetry itself reads it with.
    #[test]
    fn what_is_sent_is_otlp() {
        let start = UNIX_EPOCH + Duration::from_nanos(1_800_000_000_123_456_789);
        let span = Span {
            trace: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            id: 0x00f0_67aa_0ba9_02b7,
            parent: Some(0xb7ad_6b71_6920_3331),
            kind: Kind::Server,
            name: "GET /shop".into(),
            start,
            end: start + Duration::from_millis(2),
            attributes: vec![("http.route", "/shop".into()), ("http.response.status_code", 503.into())],
            has_failed: true,
        };
        let root = Span { parent: None, has_failed: false, kind: Kind::Internal, ..span.clone() };
        let text = body("front", &[span, root]).to_string();
        let read: ExportTraceServiceRequest = serde_json::from_str(&text).unwrap();
        let of_resource = &read.resource_spans[0];
        let text_of = |value: &any_value::Value| match value {
            any_value::Value::StringValue(text) => text.clone(),
            any_value::Value::IntValue(number) => number.to_string(),
            other => panic!("{other:?}"),
        };
        let service = &of_resource.resource.as_ref().unwrap().attributes[0];
        assert_eq!(service.key, "service.name");
        assert_eq!(text_of(service.value.as_ref().unwrap().value.as_ref().unwrap()), "front");
        let [span, root] = &of_resource.scope_spans[0].spans[..] else { panic!("{text}") };
        assert_eq!(span.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
        assert_eq!(span.span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
        assert_eq!(span.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
        assert_eq!((span.kind, span.name.as_str()), (2, "GET /shop"));
        assert_eq!(
            (span.start_time_unix_nano, span.end_time_unix_nano),
            (1_800_000_000_123_456_789, 1_800_000_000_125_456_789)
        );
        let attributes = span.attributes.iter().map(|attribute| {
            let value = attribute.value.as_ref().and_then(|value| value.value.as_ref()).unwrap();
            (attribute.key.as_str(), text_of(value))
        });
        let expected = [("http.route", "/shop".to_owned()), ("http.response.status_code", "503".to_owned())];
        assert_eq!(attributes.collect::<Vec<_>>(), expected);
        assert_eq!(span.status.as_ref().unwrap().code, 2);
        assert_eq!((root.parent_span_id.len(), root.status.as_ref().unwrap().code, root.kind), (0, 0, 1));
    }

    fn collector(endpoint: &str) -> Collector<'_> {
        Collector { endpoint, service: "test", headers: HeaderMap::new() }
    }

    #[test]
    fn what_waits_for_a_collector_that_hangs_is_bounded_and_the_rest_counted() {
        let hanging = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", hanging.local_addr().unwrap());
        let metrics = Metrics::new();
        let (spans, _sender) = Spans::to(&collector(&endpoint), 1.0, &metrics).unwrap();
        let span = Span {
            trace: 1,
            id: 1,
            parent: None,
            kind: Kind::Server,
            name: "GET".into(),
            start: UNIX_EPOCH,
            end: UNIX_EPOCH,
            attributes: Vec::new(),
            has_failed: false,
        };
        for _ in 0..2 * (WAITING_REQUESTS_MAX + BATCH_SPANS_MAX) {
            spans.push(vec![span.clone()]);
        }
        let dropped = metrics.spans.with_label_values(&["dropped"]).get();
        assert!((WAITING_REQUESTS_MAX as u64) < dropped, "{dropped}");
    }

    #[test]
    fn so_many_traces_are_recorded_as_asked_for() {
        let metrics = Metrics::new();
        let collector = collector("http://127.0.0.1:1");
        for ratio in [0.0, 0.1, 0.5, 1.0] {
            let (spans, _sender) = Spans::to(&collector, ratio, &metrics).unwrap();
            let sampled = (0..10_000).filter(|_| spans.samples(rand::random())).count() as f64 / 10_000.0;
            // Six standard deviations of the widest.
            assert!((sampled - ratio).abs() < 0.03, "{ratio}: {sampled}");
            assert!(ratio != 1.0 || spans.samples(u128::MAX), "all are all");
            assert!(ratio != 0.0 || !spans.samples(1 << 64), "none is none");
        }
    }
}
