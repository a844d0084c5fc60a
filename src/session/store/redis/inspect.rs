//! What is risky about this server? Its own report, read with the eyes of somebody whose sessions are in it.

use std::collections::HashMap;

use redis::Value;

use super::link::Links;
use crate::session::store::{Gravity, Risk};

/// The first with all that the scripts need.
const REDIS_MIN: (u32, u32) = (7, 0);
/// Of the table in which the server notes who has read what; its own default.
const TRACKED_KEYS_DEFAULT: u64 = 1_000_000;

pub(super) async fn inspect(links: &Links, copies_max: usize) -> Vec<Risk> {
    let mut questions = redis::pipe();
    questions.cmd("INFO");
    questions.cmd("CONFIG").arg("GET").arg("tracking-table-max-keys").arg("cluster-require-full-coverage");
    let answers = match links.ask_each::<2>(&questions).await {
        Ok(answers) => answers,
        Err(error) => return vec![unseen(&format!("redis could not be asked: {error}"))],
    };
    let mut risks = Vec::new();
    for (address, answer) in answers {
        let found = match answer {
            Ok(replies) => risks_of(&replies, copies_max),
            Err(error) => vec![unseen(&format!("it could not be asked: {error}"))],
        };
        risks.extend(found.into_iter().map(|risk| Risk { what: format!("redis {address}: {}", risk.what), ..risk }));
    }
    risks
}

fn risks_of([about, settings]: &[Value; 2], copies_max: usize) -> Vec<Risk> {
    let mut risks = Vec::new();
    let mut add = |gravity, what: String, remedy| risks.push(Risk { gravity, what, remedy });
    match text(about) {
        Some(report) => report_risks(&facts(&report), &mut add),
        None => add(Gravity::Hint, "its state may not be looked at".to_owned(), "permit +info, or check it yourself"),
    }
    match settings {
        Value::Map(pairs) => {
            let setting = |name: &str| {
                let (_, value) = pairs.iter().find(|(key, _)| text(key).as_deref() == Some(name))?;
                text(value)
            };
            let tracked = setting("tracking-table-max-keys").and_then(|keys| keys.parse().ok());
            let tracked: u64 = tracked.unwrap_or(TRACKED_KEYS_DEFAULT);
            // 0 is any number.
            if 0 < tracked && tracked < copies_max as u64 {
                add(
                    Gravity::Risk,
                    format!("it remembers {tracked} keys that were read, and one instance keeps {copies_max} copies"),
                    "raise tracking-table-max-keys, or lower store.redis.cache_sessions_max: copies are lost early",
                );
            }
            if setting("cluster-require-full-coverage").as_deref() == Some("yes")
                && text(about).is_some_and(|report| report.contains("cluster_enabled:1"))
            {
                add(
                    Gravity::Risk,
                    "when one primary is gone, all others refuse".to_owned(),
                    "set cluster-require-full-coverage no: only the users of that one have to wait",
                );
            }
            add(
                Gravity::Hint,
                "Cloakroom may read and change its settings, and so perhaps do everything".to_owned(),
                "give it a user of its own: conf/redis-acl.conf",
            );
        }
        _ => add(
            Gravity::Hint,
            "tracking-table-max-keys and cluster-require-full-coverage may not be looked at, as it should be"
                .to_owned(),
            "check them yourself: docs/redis.md",
        ),
    }
    risks
}

fn report_risks(facts: &HashMap<&str, &str>, add: &mut impl FnMut(Gravity, String, &'static str)) {
    let is = |name: &str, value: &str| facts.get(name) == Some(&value);
    if let Some(version) = facts.get("redis_version")
        && version_of(version).is_some_and(|version| version < REDIS_MIN)
    {
        add(
            Gravity::Unusable,
            format!("its version is {version}"),
            "take Redis 7.0 or newer, or Valkey 7.2 or newer: logins and logouts fail on this one",
        );
    }
    if let Some(policy) = facts.get("maxmemory_policy").filter(|policy| **policy != "noeviction") {
        add(
            Gravity::Risk,
            format!(
                "maxmemory-policy is {policy}: when memory is short, users are logged out, and logouts are forgotten"
            ),
            "set maxmemory-policy noeviction",
        );
    }
    if is("aof_enabled", "0") {
        add(
            Gravity::Risk,
            "a restart loses the sessions, or brings back ended ones from the last snapshot".to_owned(),
            "set appendonly yes",
        );
    }
    let replicas = facts.get("connected_slaves").and_then(|count| count.parse().ok()).unwrap_or(0_u64);
    if is("role", "slave") {
        add(Gravity::Risk, "it is a replica, and takes no logins".to_owned(), "name the primary in store.redis.url");
    } else if 0 < replicas && !facts.contains_key("min_slaves_good_slaves") {
        add(
            Gravity::Risk,
            "cut off from its replicas, it goes on taking logins and logouts that will be lost".to_owned(),
            "set min-replicas-to-write 1 and min-replicas-max-lag 3",
        );
    }
}

fn unseen(what: &str) -> Risk {
    Risk { gravity: Gravity::Hint, what: what.to_owned(), remedy: "see whether it is reached: /health/ready" }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text.clone()),
        _ => None,
    }
}

/// `name:value`, one a line.
fn facts(report: &str) -> HashMap<&str, &str> {
    report.lines().filter_map(|line| line.trim_end().split_once(':')).collect()
}

fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn risks(report: &str, settings: &[(&str, &str)]) -> Vec<(Gravity, String)> {
        let settings = settings.iter().map(|(name, value)| (bulk(name), bulk(value))).collect();
        let risks = risks_of(&[bulk(report), Value::Map(settings)], 100_000);
        risks.into_iter().filter(|risk| risk.gravity != Gravity::Hint).map(|risk| (risk.gravity, risk.what)).collect()
    }

    #[test]
    fn what_is_risky_is_found_and_nothing_else() {
        let good =
            "# Server\r\nredis_version:7.0.15\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\nrole:master\r\n";
        assert_eq!(risks(&format!("{good}connected_slaves:0\r\n"), &[]), []);
        assert_eq!(risks(&format!("{good}connected_slaves:1\r\nmin_slaves_good_slaves:1\r\n"), &[]), []);
        let cases = [
            (good.replace("7.0.15", "6.2.7"), "its version is 6.2.7"),
            (good.replace("noeviction", "allkeys-lru"), "maxmemory-policy is allkeys-lru"),
            (good.replace("aof_enabled:1", "aof_enabled:0"), "a restart loses the sessions"),
            (good.replace("role:master", "role:slave"), "it is a replica"),
            (format!("{good}connected_slaves:2\r\n"), "cut off from its replicas"),
        ];
        for (report, expected) in cases {
            let found = risks(&report, &[]);
            assert!(found.len() == 1 && found[0].1.contains(expected), "{expected}: {found:?}");
        }
        assert_eq!(risks(&good.replace("7.0.15", "6.2.7"), &[])[0].0, Gravity::Unusable);
        let small = risks(good, &[("tracking-table-max-keys", "1000")]);
        assert!(small.len() == 1 && small[0].1.contains("1000"), "{small:?}");
        assert_eq!(risks(good, &[("tracking-table-max-keys", "0"), ("cluster-require-full-coverage", "yes")]), []);
        let cluster = risks(&format!("{good}cluster_enabled:1\r\n"), &[("cluster-require-full-coverage", "yes")]);
        assert!(cluster.len() == 1 && cluster[0].1.contains("all others refuse"), "{cluster:?}");
    }

    #[test]
    fn what_may_not_be_looked_at_is_said_and_is_no_risk() {
        let refused = redis::parse_redis_value(b"-NOPERM this user has no permissions\r\n").unwrap();
        let risks = risks_of(&[refused.clone(), refused], 1);
        assert!(risks.len() == 2 && risks.iter().all(|risk| risk.gravity == Gravity::Hint), "{risks:?}");
    }
}
