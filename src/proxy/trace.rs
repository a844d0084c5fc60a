//! Of which trace is a request a part, and what of it do we record? W3C Trace Context, level 1.

use std::time::{Instant, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::spans::{Attribute, Kind, Span, Spans};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Attempts that are recorded of one request.
const ATTEMPTS_MAX: usize = 16;

/// Of the flags: whoever sent this records the trace.
const SAMPLED: u8 = 1;

/// What a valid `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parent {
    trace: u128,
    span: u64,
    is_sampled: bool,
}

/// What is recorded of one request, where spans are made.
#[derive(Debug)]
pub struct Trace {
    id: u128,
    parent: Option<u64>,
    span: u64,
    is_sampled: bool,
    /// The clock of the spans: this is what the wall said when the request began.
    started: (Instant, SystemTime),
    resolved: Option<(Instant, Instant, &'static str)>,
    attempts: Vec<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    span: u64,
    backend: String,
    started: Instant,
    ended: Option<Instant>,
    status: Option<u16>,
}

/// What a request came to.
#[derive(Debug)]
pub struct End<'a> {
    pub at: Instant,
    /// None when the request was not understood.
    pub method: Option<&'a Method>,
    pub route: Option<&'a str>,
    pub pool: Option<&'a str>,
    pub status: u16,
    pub outcome: &'static str,
    /// Why the guard has refused it.
    pub reason: Option<&'static str>,
}

impl Parent {
    /// Section 3.2.2 and, for versions to come, section 4: exactly one field, lower case, nothing zero.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut fields = headers.get_all(TRACEPARENT).iter();
        let (Some(field), None) = (fields.next(), fields.next()) else { return None };
        Self::parse(field.as_bytes())
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let (known, further) = text.split_at_checked(KNOWN_BYTES)?;
        let &[v0, v1, b'-', ref rest @ ..] = known else { return None };
        let (trace, rest) = rest.split_at_checked(32)?;
        let (span, flags) = rest.strip_prefix(b"-")?.split_at_checked(16)?;
        let flags = flags.strip_prefix(b"-")?;
        let version = number(&[v0, v1])?;
        let is_whole = match version {
            0 => further.is_empty(),
            0xff => false,
            _ => further.is_empty() || further.starts_with(b"-"),
        };
        let parent =
            Self { trace: number(trace)?, span: number(span)? as u64, is_sampled: number(flags)? as u8 & SAMPLED != 0 };
        (is_whole && parent.trace != 0 && parent.span != 0).then_some(parent)
    }
}

/// `00-` and what follows in version 0.
const KNOWN_BYTES: usize = 2 + 1 + 32 + 1 + 16 + 1 + 2;

/// Of digits in lower case.
fn number(digits: &[u8]) -> Option<u128> {
    let is_digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let text = std::str::from_utf8(digits).ok().filter(|_| digits.iter().all(is_digit))?;
    u128::from_str_radix(text, 16).ok()
}

/// Whether this field tells of a trace.
pub fn is_of_a_trace(name: &HeaderName) -> bool {
    matches!(name.as_str(), "traceparent" | "tracestate")
}

/// What is not valid goes to no backend, and without it `tracestate` means nothing (section 3.3.1).
pub fn drop_invalid(headers: &mut HeaderMap) {
    if Parent::of(headers).is_none() {
        headers.remove(TRACEPARENT);
        headers.remove(TRACESTATE);
    }
}

impl Trace {
    /// None when who asks us has said that this is not recorded: then we do not, and pass on what they said.
    pub fn begin(headers: &HeaderMap, started: Instant, spans: &Spans) -> Option<Self> {
        let parent = Parent::of(headers);
        let (id, is_sampled) = match parent {
            Some(Parent { is_sampled: false, .. }) => return None,
            Some(parent) => (parent.trace, true),
            None => {
                let id = rand::random::<u128>().max(1);
                (id, spans.samples(id))
            }
        };
        Some(Self {
            id,
            parent: parent.map(|parent| parent.span),
            span: new_span(),
            is_sampled,
            started: (started, SystemTime::now()),
            resolved: None,
            attempts: Vec::new(),
        })
    }

    /// Whose session it is has been found out, with this result.
    pub fn note_resolved(&mut self, began: Instant, result: &'static str) {
        self.resolved = Some((began, Instant::now(), result));
    }

    pub fn note_attempt(&mut self, backend: &str) {
        self.end_attempt();
        if self.attempts.len() < ATTEMPTS_MAX {
            let backend = backend.to_owned();
            let started = Instant::now();
            self.attempts.push(Attempt { span: new_span(), backend, started, ended: None, status: None });
        }
    }

    /// The backend of the attempt under way has answered.
    pub fn note_answer(&mut self, status: u16) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.status = Some(status);
        }
    }

    pub fn end_attempt(&mut self) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.ended.get_or_insert_with(Instant::now);
        }
    }

    /// Tells a backend of the attempt that it is asked by.
    pub fn pass_on(&self, headers: &mut HeaderMap) {
        let span = self.attempts.last().map_or(self.span, |attempt| attempt.span);
        let flags = if self.is_sampled { SAMPLED } else { 0 };
        headers.remove(TRACEPARENT);
        if let Ok(value) = HeaderValue::try_from(format!("00-{:032x}-{span:016x}-{flags:02x}", self.id)) {
            headers.insert(TRACEPARENT, value);
        }
        if self.parent.is_none() {
            headers.remove(TRACESTATE);
        }
    }

    /// The spans, if this is recorded: the request, with the session and each attempt below it.
    pub fn finish(mut self, end: &End<'_>) -> Option<Vec<Span>> {
        if !self.is_sampled {
            return None;
        }
        let (began, wall) = self.started;
        let time = |at: Instant| wall + at.saturating_duration_since(began);
        let method = end.method.map_or(OTHER_METHOD, method_label);
        let mut attributes = vec![
            ("http.request.method", Attribute::from(method)),
            ("http.response.status_code", end.status.into()),
            ("cloakroom.outcome", end.outcome.into()),
        ];
        attributes.extend(end.route.map(|route| ("http.route", route.to_owned().into())));
        attributes.extend(end.reason.map(|reason| ("cloakroom.reason", reason.into())));
        let name = end.route.map_or_else(|| method.into(), |route| format!("{method} {route}").into());
        let request = Span {
            trace: self.id,
            id: self.span,
            parent: self.parent,
            kind: Kind::Server,
            name,
            start: wall,
            end: time(end.at),
            attributes,
            has_failed: 500 <= end.status,
        };
        let resolve = self.resolved.map(|(began, ended, result)| Span {
            id: new_span(),
            parent: Some(self.span),
            kind: Kind::Internal,
            name: "resolve session".into(),
            start: time(began),
            end: time(ended),
            attributes: vec![("cloakroom.session.result", result.into())],
            has_failed: result == "unavailable",
            ..request.clone()
        });
        let attempts = self.attempts.drain(..).enumerate().map(|(repeat, attempt)| {
            let mut attributes =
                vec![("http.request.method", Attribute::from(method)), ("cloakroom.backend", attempt.backend.into())];
            attributes.extend(end.pool.map(|pool| ("cloakroom.pool", pool.to_owned().into())));
            attributes.extend(attempt.status.map(|status| ("http.response.status_code", status.into())));
            if repeat != 0 {
                attributes.push(("http.request.resend_count", (repeat as u16).into()));
            }
            Span {
                id: attempt.span,
                parent: Some(self.span),
                kind: Kind::Client,
                name: "backend".into(),
                start: time(attempt.started),
                end: time(attempt.ended.unwrap_or(end.at)),
                attributes,
                has_failed: attempt.status.is_none_or(|status| 400 <= status),
                ..request.clone()
            }
        });
        let children: Vec<_> = resolve.into_iter().chain(attempts).collect();
        Some(std::iter::once(request).chain(children).collect())
    }
}

fn new_span() -> u64 {
    rand::random::<u64>().max(1)
}

/// Those that everybody knows; a client may send any.
fn method_label(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"];
    KNOWN.into_iter().find(|known| method == known).unwrap_or(OTHER_METHOD)
}

/// As the conventions of OpenTelemetry have it.
const OTHER_METHOD: &str = "_OTHER";

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn only_what_the_standard_says_is_a_parent() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        for (text, is_sampled) in [
            (VALID.to_owned(), true),
            (VALID.replace("-01", "-00"), false),
            (VALID.replace("-01", "-ff"), true),
            (VALID.replace("-01", "-02"), false),
            (VALID.replace("00-", "01-"), true),
            (VALID.replace("00-", "01-") + "-what-may-come", true),
            (VALID.replace("00-", "fe-") + "-", true),
        ] {
            let parent = Parent::parse(text.as_bytes());
            let trace = number(trace.as_bytes()).unwrap();
            assert_eq!(parent, Some(Parent { trace, span: 0xb7ad_6b71_6920_3331, is_sampled }), "{text}");
        }
        for text in [
            "",
            "00",
            "garbage",
            &VALID[..54],
            &format!("{VALID}-"),
            &format!("{VALID}0"),
            &format!("{VALID} "),
            &format!(" {VALID}"),
            &VALID.replace("00-", "ff-"),
            &VALID.replace("00-", "0-"),
            &VALID.replace("00-", "0x-"),
            &VALID.replace("00-", "+0-"),
            &(VALID.replace("00-", "01-") + "0"),
            &VALID.replace("af", "AF"),
            &VALID.replace("-01", "-0g"),
            &VALID.replace("-01", "-+1"),
            &VALID.replace(trace, &"0".repeat(32)),
            &VALID.replace("b7ad6b7169203331", &"0".repeat(16)),
            &VALID.replace('-', "_"),
            &VALID.replace("b7ad", "b7-d"),
            "00-0af7651916cd43dd8448eb211c80319é-b7ad6b7169203331-01",
        ] {
            assert_eq!(Parent::parse(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn what_is_invalid_is_dropped_with_its_state() {
        let cases: &[(&[(&HeaderName, &str)], bool)] = &[
            (&[(&TRACEPARENT, VALID), (&TRACESTATE, "a=1"), (&TRACESTATE, "b=2")], true),
            (&[(&TRACEPARENT, VALID)], true),
            (&[(&TRACEPARENT, "00-0-0-0"), (&TRACESTATE, "a=1")], false),
            (&[(&TRACEPARENT, VALID), (&TRACEPARENT, VALID)], false),
            (&[(&TRACESTATE, "a=1")], false),
        ];
        for (fields, stays) in cases {
            let mut headers = HeaderMap::new();
            for (name, value) in *fields {
                headers.append(*name, value.parse().unwrap());
            }
            let before = headers.clone();
            drop_invalid(&mut headers);
            assert_eq!(headers, if *stays { before } else { HeaderMap::new() }, "{fields:?}");
        }
    }
}
