//! The splits API: how large a share of the users each split takes, and another share from now on. For whoever has the token.
//!
//! What is set here counts on this instance alone, until a restart, or until the file says something new: what is meant to last is in the
//! file.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::request::Parts;
use http::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::api::{self, Asked};
use super::problem::Problem;
use super::token::Token;
use super::view::Setting;
use super::{JSON, reply};
use crate::audit::{self, Event};
use crate::config::value::Percent;
use crate::proxy::route::{Branch, Route};
use crate::proxy::rules::Rules;
use crate::proxy::split::Split;

/// What there is under `/api/splits`.
pub struct SplitsApi {
    rules: Arc<ArcSwap<Rules>>,
    token: Token,
}

/// As OpenAPI has them.
#[cfg(test)]
pub(super) const TEMPLATES: [&str; 2] = ["/api/splits", "/api/splits/{name}"];

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Splits,
    Split(String),
}

/// What the body of a PATCH says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    percent: Percent,
}

/// A split, as it is told.
#[derive(Debug, Serialize)]
struct Shown<'r> {
    name: &'r str,
    groups: &'r [String],
    percent: Setting<Percent>,
    routes: Vec<Destination<'r>>,
}

/// Where a route sends those whom a split takes.
#[derive(Debug, Serialize)]
struct Destination<'r> {
    route: &'r str,
    pool: &'r str,
}

impl SplitsApi {
    pub fn new(rules: Arc<ArcSwap<Rules>>, token: Token) -> Self {
        Self { rules, token }
    }

    /// Whether this path is ours to answer.
    pub(super) fn has(path: &str) -> bool {
        api::has::<Place>(path)
    }

    /// `peer`: who asks, for the audit log. `body` is read only where it means something.
    pub(super) async fn answer(
        &self,
        request: &Parts,
        peer: Option<IpAddr>,
        body: impl Future<Output = Result<Vec<u8>, Problem>> + Send,
    ) -> Response<Vec<u8>> {
        match Asked::of(request, &self.token, body).await.and_then(|asked| self.do_it(asked, peer)) {
            Ok(answer) => reply(StatusCode::OK, JSON, answer.to_string().into_bytes()),
            Err(problem) => problem.reply(),
        }
    }

    fn do_it(&self, Asked { place, wanted }: Asked<Place>, peer: Option<IpAddr>) -> Result<Value, Problem> {
        // The rules of this moment: a reload may have come before the body.
        let rules = self.rules.load_full();
        match place {
            Place::Splits => {
                let splits: Vec<_> = rules.splits.values().map(|split| Shown::of(split, &rules)).collect();
                Ok(json!({ "splits": splits }))
            }
            Place::Split(name) => {
                let split = rules.splits.get(&name).ok_or_else(|| no_such_split(&rules))?;
                if let Some(wanted) = &wanted {
                    wanted.apply(split, peer);
                }
                Ok(json!(Shown::of(split, &rules)))
            }
        }
    }
}

impl api::Place for Place {
    const ROOT: &'static str = "/api/splits";
    type Wanted = Wanted;

    fn of(segments: &[&str]) -> Option<Self> {
        match *segments {
            [] => Some(Self::Splits),
            [name] if !name.is_empty() => Some(Self::Split(name.to_owned())),
            _ => None,
        }
    }

    fn can_be_set(&self) -> bool {
        matches!(self, Self::Split(_))
    }
}

impl api::Wanted for Wanted {
    const EXPECTED: &'static str = "an object with percent, as {\"percent\": 25}";
}

impl Wanted {
    /// What is so already is no event.
    fn apply(&self, split: &Split, peer: Option<IpAddr>) {
        let before = split.set(self.percent);
        if before != self.percent {
            let (before, after) = (before.to_string(), self.percent.to_string());
            audit::tell(Event::SplitSet { client: peer, split: split.name(), before: &before, after: &after });
        }
    }
}

impl<'r> Shown<'r> {
    fn of(split: &'r Split, rules: &'r Rules) -> Self {
        let is_to_it = |branch: &&Branch| branch.split.as_ref().is_some_and(|other| other.name() == split.name());
        let destination = |route: &'r Route| {
            let branch = route.branches.iter().find(is_to_it)?;
            Some(Destination { route: &route.name, pool: &branch.pool })
        };
        let mut routes: Vec<_> = rules.routes.all().filter_map(destination).collect();
        routes.sort_unstable_by_key(|destination| destination.route);
        Self {
            name: split.name(),
            groups: split.groups(),
            percent: Setting { configured: split.configured(), current: split.percent() },
            routes,
        }
    }
}

fn no_such_split(rules: &Rules) -> Problem {
    let names: Vec<_> = rules.splits.keys().map(String::as_str).collect();
    Problem::Absent(match names.join(", ") {
        names if names.is_empty() => "there is no such split: the file has none".to_owned(),
        names => format!("there is no such split: the splits are {names}"),
    })
}

impl fmt::Debug for SplitsApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SplitsApi")
    }
}
