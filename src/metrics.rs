//! Every metric, named and helped once. Labels come from closed sets and from the configuration, never from a client.

use std::collections::HashMap;

use prometheus::core::Collector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// All metrics of one gateway.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// route, status, outcome
    pub requests: IntCounterVec,
    /// route
    pub request_seconds: HistogramVec,
    /// route, split, status; of routes with splits
    pub split_requests: IntCounterVec,
    /// split
    pub split_ratio: GaugeVec,
    /// result: copy, store, grace, fallback (live, and how that is known); none, unreadable, unavailable, refused
    session_resolve_seconds: HistogramVec,
    /// Of these, copy and store: looked up once, because to find them takes longer than to count.
    session_copy_seconds: Histogram,
    session_store_seconds: Histogram,
    /// result: unknown, refused
    pub session_guesses: IntCounterVec,
    /// operation
    pub store_errors: IntCounterVec,
    /// method, result
    pub logins: IntCounterVec,
    pub logouts: IntCounterVec,
    /// channel, result
    pub provider_logouts: IntCounterVec,
    /// result: renewed, not_ours, failed, ended
    pub token_renewals: IntCounterVec,
    /// ending
    pub session_ends: IntCounterVec,
    /// result: told, refused, away, given_up
    pub events_delivered: IntCounterVec,
    /// No labels; without a value except at the instance that leads.
    pub sessions: IntGaugeVec,
    pub connections: IntGauge,
    /// reason: stranger, late, malformed
    pub proxy_protocol_refused: IntCounterVec,
    /// Requests with a session that have lasted longer than a moment.
    pub streams: IntGauge,
    pub streams_cut: IntCounter,
    /// file
    pub certificate_expires: IntGaugeVec,
    /// 1 or 0
    pub store_up: IntGauge,
    /// pool, backend
    pub backend_requests: IntCounterVec,
    /// pool, backend, kind: connect, response, timeout, status
    pub backend_failures: IntCounterVec,
    /// pool, backend; without a value before the first look. 1 or 0: gets requests, as far as its own doing goes.
    pub backend_up: IntGaugeVec,
    /// pool, backend; 1 or 0
    pub backend_draining: IntGaugeVec,
    /// pool, backend
    pub backend_weight: IntGaugeVec,
    /// pool, backend
    pub backend_in_flight: IntGaugeVec,
    /// pool, source; 1 or 0: whether the last look brought an answer
    pub discovery_up: IntGaugeVec,
    /// pool, backend
    pub backend_ejections: IntCounterVec,
    /// pool, backend, result: passed, failed
    pub backend_checks: IntCounterVec,
    /// pool, result: sent, over_budget
    pub retries: IntCounterVec,
    /// pool
    pub queue_waiting: IntGaugeVec,
    /// pool, result: served, full, timeout
    pub queue_seconds: HistogramVec,
    /// directive: login, logout, attributes, alien; result: done, refused, failed, unavailable, no_session, gone, full
    pub directives: IntCounterVec,
    /// result: applied, refused
    pub reloads: IntCounterVec,
    /// result: sent, dropped
    pub spans: IntCounterVec,
    /// log: access, diagnostics
    pub log_lines_dropped: IntCounterVec,
}

/// At one backend, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts {
    pub all: u64,
    pub failed: u64,
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let session_resolve_seconds = histogram(
            &registry,
            "cloakroom_session_resolve_seconds",
            "From the end of the request head to the session, or to knowing that there is none.",
            &["result"],
            &[0.00001, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0],
        );
        let reloads = counter(&registry, "cloakroom_reloads_total", "Configuration reloads.", &["result"]);
        // There from the start: a series that begins with 1 shows no increase, and the first refusal is to be seen.
        for result in ["applied", "refused"] {
            let _ = reloads.with_label_values(&[result]);
        }
        Self {
            requests: counter(
                &registry,
                "cloakroom_requests_total",
                "Requests answered.",
                &["route", "status", "outcome"],
            ),
            request_seconds: histogram(
                &registry,
                "cloakroom_request_seconds",
                "From the end of the request head to the end of the response.",
                &["route"],
                &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0],
            ),
            split_requests: counter(
                &registry,
                "cloakroom_split_requests_total",
                "Requests on routes with splits, by the split that took them.",
                &["route", "split", "status"],
            ),
            split_ratio: {
                let opts =
                    Opts::new("cloakroom_split_ratio", "The share of all users that a split takes now, from 0 to 1.");
                let ratio = GaugeVec::new(opts, &["split"]).expect("a valid name");
                registry.register(Box::new(ratio.clone())).expect("a name used once");
                ratio
            },
            session_copy_seconds: session_resolve_seconds.with_label_values(&["copy"]),
            session_store_seconds: session_resolve_seconds.with_label_values(&["store"]),
            session_resolve_seconds,
            session_guesses: counter(
                &registry,
                "cloakroom_session_guesses_total",
                "Requests with a well-formed session id that the store does not know, or that was not asked for.",
                &["result"],
            ),
            store_errors: counter(
                &registry,
                "cloakroom_store_errors_total",
                "Store operations that failed.",
                &["operation"],
            ),
            logins: counter(&registry, "cloakroom_logins_total", "Login attempts.", &["method", "result"]),
            provider_logouts: counter(
                &registry,
                "cloakroom_provider_logouts_total",
                "Logouts that a provider told of.",
                &["channel", "result"],
            ),
            token_renewals: counter(
                &registry,
                "cloakroom_token_renewals_total",
                "Sessions whose tokens were to be renewed at their provider.",
                &["result"],
            ),
            logouts: counter(&registry, "cloakroom_logouts_total", "Logouts.", &[]),
            session_ends: counter(
                &registry,
                "cloakroom_session_ends_total",
                "Ended sessions that were found, with [events] and at the instance that leads.",
                &["ending"],
            ),
            events_delivered: counter(
                &registry,
                "cloakroom_events_delivered_total",
                "Attempts to tell the webhook of an ended session.",
                &["result"],
            ),
            sessions: labelled_gauge(
                &registry,
                "cloakroom_sessions",
                "Sessions in the store, at the instance that leads.",
                &[],
            ),
            connections: gauge(&registry, "cloakroom_connections", "Open client connections."),
            proxy_protocol_refused: counter(
                &registry,
                "cloakroom_proxy_protocol_refused_total",
                "Connections to a listener with proxy_protocol that did not begin as they should.",
                &["reason"],
            ),
            streams: gauge(
                &registry,
                "cloakroom_streams",
                "WebSockets, event streams and other long requests that end with their session.",
            ),
            streams_cut: {
                let cut =
                    IntCounter::new("cloakroom_streams_cut_total", "Of these, cut because the session had ended.")
                        .expect("a valid name");
                registry.register(Box::new(cut.clone())).expect("a name used once");
                cut
            },
            certificate_expires: labelled_gauge(
                &registry,
                "cloakroom_certificate_expires_seconds",
                "When a listener's certificate ends, in seconds since 1970.",
                &["file"],
            ),
            store_up: gauge(&registry, "cloakroom_store_up", "Whether the session store answered when last asked."),
            backend_requests: counter(
                &registry,
                "cloakroom_backend_requests_total",
                "Attempts to forward.",
                &["pool", "backend"],
            ),
            backend_failures: counter(
                &registry,
                "cloakroom_backend_failures_total",
                "Attempts that failed.",
                &["pool", "backend", "kind"],
            ),
            backend_up: labelled_gauge(
                &registry,
                "cloakroom_backend_up",
                "Whether a backend gets requests, as far as its checks and its failures go.",
                &["pool", "backend"],
            ),
            backend_draining: labelled_gauge(
                &registry,
                "cloakroom_backend_draining",
                "Whether the operator keeps new requests from a backend.",
                &["pool", "backend"],
            ),
            backend_weight: labelled_gauge(
                &registry,
                "cloakroom_backend_weight",
                "The share of a backend, compared with the others'.",
                &["pool", "backend"],
            ),
            backend_in_flight: labelled_gauge(
                &registry,
                "cloakroom_backend_in_flight",
                "Requests that a backend has now, with open WebSockets.",
                &["pool", "backend"],
            ),
            discovery_up: labelled_gauge(
                &registry,
                "cloakroom_discovery_up",
                "1 when the last look for backends brought an answer; else those known before stay.",
                &["pool", "source"],
            ),
            backend_ejections: counter(
                &registry,
                "cloakroom_backend_ejections_total",
                "Times that a backend was passed over from then on, because requests failed.",
                &["pool", "backend"],
            ),
            backend_checks: counter(
                &registry,
                "cloakroom_backend_checks_total",
                "Health checks.",
                &["pool", "backend", "result"],
            ),
            retries: counter(
                &registry,
                "cloakroom_retries_total",
                "Further attempts after one that failed.",
                &["pool", "result"],
            ),
            queue_waiting: labelled_gauge(
                &registry,
                "cloakroom_queue_waiting",
                "Requests that wait for a backend now.",
                &["pool"],
            ),
            queue_seconds: histogram(
                &registry,
                "cloakroom_queue_seconds",
                "How long requests waited that found all backends full.",
                &["pool", "result"],
                &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
            ),
            directives: counter(
                &registry,
                "cloakroom_directives_total",
                "What backends asked for by fields of their responses.",
                &["directive", "result"],
            ),
            reloads,
            spans: counter(&registry, "cloakroom_spans_total", "Spans for the collector.", &["result"]),
            log_lines_dropped: counter(
                &registry,
                "cloakroom_log_lines_dropped_total",
                "Lines that nobody read in time, or that could not be written.",
                &["log"],
            ),
            registry,
        }
    }

    /// It took so long to know whose session it is, or that it is nobody's; `result` as the metric lists them.
    pub fn note_resolved(&self, result: &'static str, seconds: f64) {
        match result {
            "copy" => self.session_copy_seconds.observe(seconds),
            "store" => self.session_store_seconds.observe(seconds),
            _ => self.session_resolve_seconds.with_label_values(&[result]).observe(seconds),
        }
    }

    /// Nothing is counted of this backend any more.
    pub fn forget_backend(&self, pool: &str, backend: &str) {
        for metric in [&self.backend_requests, &self.backend_ejections] {
            let _ = metric.remove_label_values(&[pool, backend]);
        }
        for kind in ["connect", "response", "timeout", "status"] {
            let _ = self.backend_failures.remove_label_values(&[pool, backend, kind]);
        }
        for result in ["passed", "failed"] {
            let _ = self.backend_checks.remove_label_values(&[pool, backend, result]);
        }
    }

    /// Attempts at each backend, by pool and backend, and how many of them failed.
    pub fn attempts(&self) -> HashMap<(String, String), Attempts> {
        let mut attempts = HashMap::<_, Attempts>::new();
        for (counters, is_failure) in [(&self.backend_requests, false), (&self.backend_failures, true)] {
            for counter in counters.collect().iter().flat_map(|family| family.get_metric()) {
                let label = |name: &str| {
                    let label = counter.get_label().iter().find(|label| label.name() == name);
                    label.map(|label| label.value().to_owned()).unwrap_or_default()
                };
                let of_backend = attempts.entry((label("pool"), label("backend"))).or_default();
                let count = if is_failure { &mut of_backend.failed } else { &mut of_backend.all };
                *count += counter.get_counter().get_value() as u64;
            }
        }
        attempts
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let gauge = IntGauge::new(name, help).expect("a valid name");
    registry.register(Box::new(gauge.clone())).expect("a name used once");
    gauge
}

/// One that can be without a value.
fn labelled_gauge(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let gauge = IntGaugeVec::new(Opts::new(name, help), labels).expect("a valid name");
    registry.register(Box::new(gauge.clone())).expect("a name used once");
    gauge
}

fn counter(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let counter = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
    registry.register(Box::new(counter.clone())).expect("a name used once");
    counter
}

fn histogram(registry: &Registry, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    let histogram = HistogramVec::new(opts, labels).expect("a valid name");
    registry.register(Box::new(histogram.clone())).expect("a name used once");
    histogram
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::Value;

    use super::*;

    const DASHBOARD: &str = include_str!("../conf/grafana/cloakroom.json");
    const ALERTS: &str = include_str!("../conf/prometheus/alerts.yml");
    const BOOK: &str = include_str!("../docs/operation.md");

    /// What Prometheus itself adds to every series, and what a histogram's buckets have.
    const OTHER_LABELS: [&str; 3] = ["instance", "job", "le"];

    /// All metrics by name, with their labels. A gathering leaves out those without a value: so they are named here.
    fn families() -> BTreeMap<String, Vec<String>> {
        let metrics = Metrics::new();
        let Metrics {
            registry: _,
            requests,
            request_seconds,
            split_requests,
            split_ratio,
            session_resolve_seconds,
            session_copy_seconds: _,
            session_store_seconds: _,
            session_guesses,
            store_errors,
            logins,
            logouts,
            provider_logouts,
            token_renewals,
            session_ends,
            events_delivered,
            sessions,
            connections,
            proxy_protocol_refused,
            streams,
            streams_cut,
            certificate_expires,
            store_up,
            backend_requests,
            backend_failures,
            backend_up,
            backend_draining,
            backend_weight,
            backend_in_flight,
            discovery_up,
            backend_ejections,
            backend_checks,
            retries,
            queue_waiting,
            queue_seconds,
            directives,
            reloads,
            spans,
            log_lines_dropped,
        } = &metrics;
        let all: [&dyn Collector; _] = [
            requests,
            request_seconds,
            split_requests,
            split_ratio,
            session_resolve_seconds,
            session_guesses,
            store_errors,
            logins,
            logouts,
            provider_logouts,
            token_renewals,
            session_ends,
            events_delivered,
            sessions,
            connections,
            proxy_protocol_refused,
            streams,
            streams_cut,
            certificate_expires,
            store_up,
            backend_requests,
            backend_failures,
            backend_up,
            backend_draining,
            backend_weight,
            backend_in_flight,
            discovery_up,
            backend_ejections,
            backend_checks,
            retries,
            queue_waiting,
            queue_seconds,
            directives,
            reloads,
            spans,
            log_lines_dropped,
        ];
        let described = all.iter().flat_map(|metric| metric.desc());
        described.map(|about| (about.fq_name.clone(), about.variable_labels.clone())).collect()
    }

    /// What is wrong with a query of Prometheus: names and labels that no metric of ours has.
    fn unknown(query: &str, families: &BTreeMap<String, Vec<String>>) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut labels: BTreeSet<&str> = OTHER_LABELS.into();
        for (at, _) in query.match_indices("cloakroom_") {
            let rest = &query[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            let name = &rest[..end];
            let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let Some(known) = families.get(name).or_else(|| families.get(histogram?)) else {
                wrong.push(name.to_owned());
                continue;
            };
            labels.extend(known.iter().map(String::as_str));
            let Some((matchers, _)) = rest[end..].strip_prefix('{').and_then(|rest| rest.split_once('}')) else {
                continue;
            };
            for matcher in matchers.split(',') {
                let label = matcher.trim().split(['=', '!']).next().unwrap();
                if !known.iter().any(|known| known == label) && !OTHER_LABELS.contains(&label) {
                    wrong.push(format!("{name} has no {label}"));
                }
            }
        }
        for rest in query.split("by (").skip(1) {
            let grouped = rest.split(')').next().unwrap().split(',').map(str::trim);
            wrong.extend(grouped.filter(|label| !labels.contains(label)).map(|label| format!("by ({label})")));
        }
        wrong
    }

    /// The keys of each alert, folded lines joined; only as much YAML as the file has.
    fn alerts() -> Vec<BTreeMap<&'static str, String>> {
        let mut alerts: Vec<BTreeMap<&str, String>> = Vec::new();
        let mut folded = None;
        for line in ALERTS.lines() {
            let line = line.trim();
            if let Some(name) = line.strip_prefix("- alert: ") {
                alerts.push([("alert", name.to_owned())].into());
                continue;
            }
            let Some(alert) = alerts.last_mut() else { continue };
            let keys = ["expr", "for", "labels", "severity", "annotations", "summary", "runbook"];
            match line.split_once(':').filter(|(key, _)| keys.contains(key)) {
                Some((key, value)) => {
                    folded = (value.trim() == ">-").then_some(key);
                    alert.insert(key, if folded.is_some() { String::new() } else { value.trim().to_owned() });
                }
                None => {
                    if let Some(value) = folded.and_then(|key| alert.get_mut(key)) {
                        value.push_str(line);
                        value.push(' ');
                    }
                }
            }
        }
        alerts
    }

    #[test]
    fn every_query_of_the_dashboard_asks_for_what_there_is() {
        let families = families();
        let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let mut shown = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for panel in panels {
            let title = panel["title"].as_str().unwrap();
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: an id of its own");
            let targets = panel["targets"].as_array();
            assert_eq!(targets.is_some(), panel["type"] != "row", "{title}");
            for target in targets.into_iter().flatten() {
                let query = target["expr"].as_str().unwrap();
                assert_eq!(unknown(query, &families), [""; 0], "{title}: {query}");
                let legend = target["legendFormat"].as_str().unwrap();
                for label in legend.split("{{").skip(1).map(|rest| rest.split("}}").next().unwrap()) {
                    let is_kept = query.contains(label);
                    assert!(is_kept || label == "instance", "{title}: {label} of the legend is not in {query}");
                }
                shown.extend(families.keys().filter(|name| query.contains(*name)));
            }
        }
        let rows = panels.iter().filter(|panel| panel["type"] == "row").map(|row| row["title"].as_str().unwrap());
        assert_eq!(rows.collect::<Vec<_>>(), ["Traffic", "Sessions", "Backends", "Redis connection", "Limits"]);
        let hidden: Vec<_> = families.keys().filter(|name| !shown.contains(name)).collect();
        assert!(hidden.is_empty(), "metrics that the dashboard does not show: {hidden:?}");
    }

    #[test]
    fn every_alert_asks_for_what_there_is_and_has_its_section_in_the_book() {
        let families = families();
        let alerts = alerts();
        assert_eq!(alerts.len(), ALERTS.matches("alert:").count());
        for alert in &alerts {
            let name = &alert["alert"];
            let query = &alert["expr"];
            assert!(query.contains("cloakroom"), "{name}: {query}");
            assert_eq!(unknown(query, &families), [""; 0], "{name}: {query}");
            assert!(["page", "ticket"].contains(&alert["severity"].as_str()), "{name}");
            assert!(!alert["summary"].is_empty(), "{name}");
            assert_eq!(alert["runbook"], format!("docs/operation.md#{}", name.to_lowercase()));
            let (_, section) =
                BOOK.split_once(&format!("\n### {name}\n")).unwrap_or_else(|| panic!("{name}: no section"));
            let section = section.split("\n#").next().unwrap();
            for part in ["**Users**", "**Look at**", "**Next**"] {
                assert!(section.contains(part), "{name}: the book does not say {part}");
            }
        }
        let written = BOOK.lines().filter_map(|line| line.strip_prefix("### Cloakroom"));
        assert_eq!(written.count(), alerts.len(), "a section for each, and none for what is no alert");
    }

    #[test]
    fn a_query_for_what_there_is_not_is_seen() {
        let families = families();
        for (query, expected) in [
            ("rate(cloakroom_logins_total{result=\"x\"}[5m])", &[][..]),
            ("sum by (le, route) (rate(cloakroom_request_seconds_bucket{instance=~\"a\"}[5m]))", &[]),
            ("cloakroom_login_total", &["cloakroom_login_total"]),
            ("cloakroom_logins_total{route=\"/\"}", &["cloakroom_logins_total has no route"]),
            ("sum by (pool) (cloakroom_logins_total)", &["by (pool)"]),
            ("cloakroom_connections_count{le!=\"1\"} / cloakroom_nothing", &["cloakroom_nothing"]),
        ] {
            assert_eq!(unknown(query, &families), expected, "{query}");
        }
    }

    #[test]
    fn the_book_lists_every_metric_with_its_labels() {
        for (name, labels) in families() {
            let line = BOOK.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
            let line = line.unwrap_or_else(|| panic!("{name} is not in docs/operation.md"));
            for label in labels {
                assert!(line.contains(&format!("`{label}`")), "{name}: {label}");
            }
        }
    }
}
