//! The splits API: how large a share of the users each split takes, and another share from now on. For whoever has the token.
//!
//! What is set here counts on this instance alone, until a restart, or until the file says something new: what is meant to last is in the
//! file.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::problem::Problem;
use super::query::Query;
use super::token::Token;
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

pub(super) const SPLITS: &str = "/api/splits";
/// As a template of OpenAPI.
#[cfg(test)]
pub(super) const ONE_SPLIT: &str = "/api/splits/{name}";

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
    /// Now.
    percent: Percent,
    /// In the file, and so again after a reload.
    configured_percent: Percent,
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
        path.strip_prefix(SPLITS).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// `peer`: who asks, for the audit log. `body` is read only where it means something.
    pub(super) async fn answer(
        &self,
        request: &Parts,
        peer: Option<IpAddr>,
        body: impl Future<Output = Result<Vec<u8>, Problem>> + Send,
    ) -> Response<Vec<u8>> {
        match self.route(request, peer, body).await {
            Ok(answer) => reply(StatusCode::OK, JSON, answer.to_string().into_bytes()),
            Err(problem) => problem.reply(),
        }
    }

    async fn route(
        &self,
        request: &Parts,
        peer: Option<IpAddr>,
        body: impl Future<Output = Result<Vec<u8>, Problem>> + Send,
    ) -> Result<Value, Problem> {
        if !self.token.is_shown_by(request) {
            return Err(Problem::NoToken);
        }
        let rest = request.uri.path().strip_prefix(SPLITS).ok_or(Problem::NoSuchPlace)?;
        let name = rest.strip_prefix('/');
        let is_get = [Method::GET, Method::HEAD].contains(&request.method);
        let wanted = match name {
            Some(_) if request.method == Method::PATCH => Some(Wanted::parse(&body.await?)?),
            _ if is_get => None,
            Some(_) => return Err(Problem::Method { allowed: "GET, HEAD, PATCH" }),
            None => return Err(Problem::Method { allowed: "GET, HEAD" }),
        };
        Query::parse(request.uri.query(), &[])?;
        // The rules of this moment: a reload may have come before the body.
        let rules = self.rules.load_full();
        let Some(name) = name else {
            let splits: Vec<_> = rules.splits.values().map(|split| Shown::of(split, &rules)).collect();
            return Ok(json!({ "splits": splits }));
        };
        let split = rules.splits.get(name).ok_or_else(|| no_such_split(&rules))?;
        if let Some(Wanted { percent }) = wanted {
            let before = split.set(percent).to_string();
            let after = percent.to_string();
            audit::tell(Event::SplitSet { client: peer, split: name, before: &before, after: &after });
        }
        Ok(json!(Shown::of(split, &rules)))
    }
}

impl Wanted {
    fn parse(body: &[u8]) -> Result<Self, Problem> {
        serde_json::from_slice(body)
            .map_err(|error| Problem::Body(format!("expected e.g. {{\"percent\": 25}}: {error}")))
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
            percent: split.percent(),
            configured_percent: split.configured(),
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
