//! Does a trace go through us unbroken, and do our spans say what happened, and nothing of whom? W3C Trace Context, OTLP.

use serde_json::Value;

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::Connection;
use crate::harness::gateway::{Gateway, Setup};
use crate::harness::wait_until;
use crate::operation::cloakroom;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{PARENT}-{flags}")
}

fn collector() -> Backend {
    Backend::always(Answer::response(200, &[], "{}"))
}

fn traced(backends: &[&Backend], collector: &Backend, keys: &str) -> Setup {
    let tables = format!("[tracing]\nendpoint = \"http://{}\"\nservice = \"front\"\n{keys}", collector.address());
    Gateway::in_front_of(backends).route("/", "").route("/open", "access = \"public\"").with(&tables)
}

/// All spans that the collector has.
fn spans(collector: &Backend) -> Vec<Value> {
    let mut spans = Vec::new();
    for request in collector.requests() {
        assert_eq!((request.method(), request.target()), ("POST", "/v1/traces"));
        assert_eq!(request.head.value("content-type"), Some("application/json"));
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        for resource in body["resourceSpans"].as_array().unwrap() {
            assert_eq!(attribute(&resource["resource"], "service.name"), Some("front".into()));
            for scope in resource["scopeSpans"].as_array().unwrap() {
                spans.extend(scope["spans"].as_array().unwrap().iter().cloned());
            }
        }
    }
    spans
}

fn attribute(of: &Value, key: &str) -> Option<String> {
    let found = of["attributes"].as_array()?.iter().find(|attribute| attribute["key"] == key)?;
    let value = &found["value"];
    value["stringValue"].as_str().or(value["intValue"].as_str()).map(str::to_owned)
}

/// The spans of the trace, as soon as there are so many.
#[track_caller]
fn spans_of(collector: &Backend, trace: &str, count: usize) -> Vec<Value> {
    let mut found = Vec::new();
    wait_until("the collector has the spans", || {
        found = spans(collector).into_iter().filter(|span| span["traceId"] == trace).collect();
        count <= found.len()
    });
    assert_eq!(found.len(), count, "{found:#?}");
    found
}

fn named<'s>(spans: &'s [Value], name: &str) -> &'s Value {
    spans.iter().find(|span| span["name"] == name).unwrap_or_else(|| panic!("{name} in {spans:#?}"))
}

#[test]
fn without_tracing_a_valid_parent_passes_unchanged_and_an_invalid_one_not_at_all() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "access = \"public\"").start();
    let future = format!("01-{TRACE}-{PARENT}-01-more");
    let valid = [traceparent("01"), traceparent("00"), future];
    for parent in &valid {
        let request = gateway.client();
        let seen =
            request.get("/").header("traceparent", parent).header("tracestate", "a=1").header("tracestate", "b=2");
        let seen = seen.send().seen();
        assert_eq!(seen.headers("traceparent"), [parent]);
        assert_eq!(seen.headers("tracestate").join(","), "a=1,b=2");
    }
    for parent in [traceparent("0"), traceparent("01").to_uppercase(), traceparent("01") + "-x", "00".into()] {
        let client = gateway.client();
        let seen = client.get("/").header("traceparent", &parent).header("tracestate", "a=1").send().seen();
        assert_eq!(seen.headers("traceparent").len() + seen.headers("tracestate").len(), 0, "{parent}");
    }
    let client = gateway.client();
    let twice = client.get("/").header("traceparent", &valid[0]).header("traceparent", &valid[0]).send().seen();
    assert!(twice.headers("traceparent").is_empty(), "two are none");
    assert!(client.get("/").send().seen().headers("traceparent").is_empty(), "and nobody makes one");
}

#[test]
fn a_request_its_session_and_its_backend_are_three_spans_of_the_clients_trace() {
    let (backend, collector) = (Backend::echo(), collector());
    let gateway = traced(&[&backend], &collector, "").start();
    let ann = gateway.log_in("ann");
    let request = ann.get("/report/of/ann?secret=in-the-query").header("traceparent", &traceparent("01"));
    let seen = request.header("tracestate", "vendor=1").send().seen();
    let passed = seen.headers("traceparent")[0].to_owned();
    assert_eq!(seen.headers("tracestate"), ["vendor=1"]);

    let spans = spans_of(&collector, TRACE, 3);
    let (request, resolve, attempt) =
        (named(&spans, "GET /"), named(&spans, "resolve session"), named(&spans, "backend"));
    assert_eq!((&request["parentSpanId"], &request["kind"]), (&PARENT.into(), &2.into()));
    for (child, kind) in [(resolve, 1), (attempt, 3)] {
        assert_eq!((&child["parentSpanId"], &child["kind"]), (&request["spanId"], &kind.into()));
    }
    assert_eq!(
        passed,
        format!("00-{TRACE}-{}-01", attempt["spanId"].as_str().unwrap()),
        "the backend goes on from there"
    );
    let text = |span: &Value, key: &str| attribute(span, key).unwrap_or_default();
    assert_eq!(text(request, "http.request.method"), "GET");
    assert_eq!(text(request, "http.route"), "/");
    assert_eq!(text(request, "http.response.status_code"), "200");
    assert_eq!(text(request, "cloakroom.outcome"), "forwarded");
    assert_eq!(text(resolve, "cloakroom.session.result"), "copy");
    assert_eq!(text(attempt, "cloakroom.pool"), "app");
    assert_eq!(text(attempt, "cloakroom.backend"), backend.address().to_string());
    assert_eq!(text(attempt, "http.response.status_code"), "200");
    let time = |span: &Value, key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
    for span in &spans {
        assert!(time(span, "startTimeUnixNano") <= time(span, "endTimeUnixNano"), "{span}");
        assert!(time(request, "startTimeUnixNano") <= time(span, "startTimeUnixNano"), "{span}");
        assert!(time(span, "endTimeUnixNano") <= time(request, "endTimeUnixNano"), "{span}");
        assert_eq!(span["status"], serde_json::json!({}));
    }
    let everything: String =
        collector.requests().iter().map(|request| String::from_utf8_lossy(&request.body).into_owned()).collect();
    let cookie = ann.cookie("session").unwrap();
    for private in ["ann", "report", "in-the-query", &cookie] {
        assert!(!everything.contains(private), "{private} is in a span");
    }
}

#[test]
fn each_attempt_is_a_span_of_its_own_and_a_failure_shows() {
    let (dead, alive, collector) = (Backend::echo(), Backend::echo(), collector());
    dead.kill();
    let gateway = traced(&[&dead, &alive], &collector, "").start();
    let client = gateway.client();
    // It is the turn of the dead one first, which is then passed over.
    for _ in 0..2 {
        assert_eq!(client.get("/open").header("traceparent", &traceparent("01")).send().status, 200);
    }
    let spans = spans_of(&collector, TRACE, 5);
    let attempts: Vec<_> = spans.iter().filter(|span| span["name"] == "backend").collect();
    let to = |address: String| {
        let found = attempts.iter().find(|span| attribute(span, "cloakroom.backend").as_deref() == Some(&address));
        *found.unwrap_or_else(|| panic!("an attempt at {address}"))
    };
    assert_eq!(to(dead.address().to_string())["status"]["code"], 2, "an error");
    assert_eq!(attribute(to(dead.address().to_string()), "http.response.status_code"), None);
    let second: Vec<_> = attempts.iter().filter_map(|span| attribute(span, "http.request.resend_count")).collect();
    assert_eq!(second, ["1"]);
    assert_eq!(to(alive.address().to_string())["status"], serde_json::json!({}));
}

#[test]
fn what_the_guard_refuses_is_a_span_of_its_own() {
    let (backend, collector) = (Backend::echo(), collector());
    let gateway = traced(&[&backend], &collector, "").start();
    let mut connection = Connection::open(gateway.address());
    connection.write(format!("GET /open HTTP/1.1\r\nHost: a\r\nHost: b\r\ntraceparent: {}\r\n\r\n", traceparent("01")));
    assert_eq!(connection.read_response("GET").unwrap().status, 400);
    wait_until("the collector has it", || !spans(&collector).is_empty());
    let spans = spans(&collector);
    let refused = named(&spans, "_OTHER");
    assert_eq!(attribute(refused, "cloakroom.outcome"), Some("refused".into()));
    assert_eq!(attribute(refused, "http.response.status_code"), Some("400".into()));
    assert!(attribute(refused, "cloakroom.reason").is_some(), "{refused}");
    assert_ne!(refused["traceId"], TRACE, "what it says is not believed");
}

#[test]
fn who_asks_decides_what_is_recorded_and_else_the_ratio_does() {
    let (backend, collector) = (Backend::echo(), collector());
    let gateway = traced(&[&backend], &collector, "ratio = 0").start();
    let client = gateway.client();
    let unsampled = client.get("/open").header("traceparent", &traceparent("00")).send().seen();
    assert_eq!(unsampled.headers("traceparent"), [traceparent("00")], "what is not recorded passes unchanged");
    let own = client.get("/open").header("tracestate", "a=1").send().seen();
    let own_parent = own.headers("traceparent")[0].to_owned();
    assert!(own_parent.starts_with("00-") && own_parent.ends_with("-00"), "{own_parent}: nobody behind us records it");
    assert!(own.headers("tracestate").is_empty(), "a state of no trace");
    client.get("/open").header("traceparent", &traceparent("01")).send();
    let recorded = spans_of(&collector, TRACE, 2);
    assert_eq!(attribute(named(&recorded, "GET /open"), "cloakroom.outcome").as_deref(), Some("forwarded"));
    assert_eq!(spans(&collector).len(), 2, "and nothing else was");
}

#[test]
fn a_collector_that_hangs_or_is_away_costs_no_request() {
    let backend = Backend::echo();
    let hanging = Backend::always(Answer::AfterStep(Box::new(Answer::response(200, &[], "{}"))));
    let away = collector();
    away.kill();
    for collector in [&hanging, &away] {
        let gateway = traced(&[&backend], collector, "").start();
        let client = gateway.client();
        for _ in 0..50 {
            assert_eq!(client.get("/open").send().status, 200);
        }
        if std::ptr::eq(collector, &hanging) {
            hanging.after_requests(1);
        }
        wait_until("what nobody takes is counted", || {
            0.0 < gateway.metric("cloakroom_spans_total{result=\"dropped\"}")
        });
        gateway.stop();
    }
}

#[test]
fn a_collector_is_told_who_sends_and_nobody_else_is() {
    let (backend, collector) = (Backend::echo(), collector());
    let headers = "[tracing.headers]\nauthorization = { file = \"collector-key\" }\nX-Team = \"Vq83-nK2\"";
    let gateway = traced(&[&backend], &collector, headers).file("collector-key", "Bearer q7Zp-Kw\n").start();
    gateway.client().get("/open").header("traceparent", &traceparent("01")).send();
    spans_of(&collector, TRACE, 2);
    for request in collector.requests() {
        assert_eq!(request.head.values("authorization"), ["Bearer q7Zp-Kw"]);
        assert_eq!(request.head.values("x-team"), ["Vq83-nK2"]);
        assert_eq!(request.head.values("content-type"), ["application/json"]);
    }
    assert!(!backend.has_received("q7Zp-Kw") && !backend.has_received("Vq83-nK2"), "it is for the collector alone");

    let another = |setup: Setup| setup.file("collector-key", "Bearer z9-another");
    assert_eq!(gateway.reload(another).unwrap().at_restart, ["tracing: headers"], "without a value");
}

#[test]
fn a_wrong_header_for_a_collector_is_refused_with_its_place_and_without_its_value() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cloakroom.toml");
    for (endpoint, header, expected) in [
        ("http://127.0.0.1:4318", "Host = \"q7Zp-Kw\"", ":4:1: invalid header \"Host\": it frames or routes"),
        ("http://127.0.0.1:4318", "x-key = \"q7Zp-Kw\\n\"", ":4:9: invalid value of header \"x-key\""),
        ("http://192.0.2.1:4318", "x-key = \"q7Zp-Kw\"", ":2:12: tracing.endpoint: plain http:// would show"),
    ] {
        std::fs::write(&file, format!("[tracing]\nendpoint = \"{endpoint}\"\n[tracing.headers]\n{header}\n")).unwrap();
        let output = cloakroom(&["check", file.to_str().unwrap()]);
        let said = String::from_utf8(output.stderr).unwrap() + &String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert!(said.contains(expected) && !said.contains("q7Zp-Kw"), "{expected}: {said}");
    }
}

#[test]
fn the_last_spans_are_sent_at_the_end() {
    let (backend, collector) = (Backend::echo(), collector());
    let gateway = traced(&[&backend], &collector, "").start();
    let client = gateway.client();
    client.get("/open").header("traceparent", &traceparent("01")).send();
    drop(client);
    gateway.stop();
    assert_eq!(spans(&collector).len(), 2, "sent before the end, and not a moment later");
}
