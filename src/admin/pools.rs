//! The pools API: which backends there are and how they do, and what an operator lets them have. For whoever has the token.
//!
//! What is set here is a deviation from the file: it stays until the file changes at the same place, or the process ends.

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
use super::view::{BackendView, PoolView, warnings};
use super::{JSON, reply};
use crate::audit::{self, Event};
use crate::backend::{AdminState, Backend, Pool};
use crate::config::model;
use crate::metrics::Metrics;
use crate::proxy::rules::Rules;

/// What there is under `/api/pools`.
pub struct PoolsApi {
    rules: Arc<ArcSwap<Rules>>,
    metrics: Metrics,
    token: Token,
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Pools,
    Pool(String),
    Backend { pool: String, address: String },
}

/// What the body of a PATCH may say.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    drain: Option<bool>,
    weight: Option<u32>,
}

/// A backend as it is after a change.
#[derive(Serialize)]
struct Changed {
    #[serde(flatten)]
    backend: BackendView,
    /// What users will notice.
    warnings: Vec<String>,
}

impl PoolsApi {
    pub fn new(rules: Arc<ArcSwap<Rules>>, metrics: Metrics, token: Token) -> Self {
        Self { rules, metrics, token }
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
            Place::Pools => Ok(json!({ "pools": PoolView::all(&rules, &self.metrics) })),
            Place::Pool(name) => Ok(json!(PoolView::of(find_pool(&rules, &name)?, &rules, &self.metrics.attempts()))),
            Place::Backend { pool, address } => {
                let pool = find_pool(&rules, &pool)?;
                let backend = find_backend(pool, &address)?;
                if let Some(wanted) = &wanted {
                    wanted.apply(pool, &backend, peer);
                }
                let view = BackendView::of(&backend, pool, &self.metrics.attempts());
                Ok(if wanted.is_some() {
                    json!(Changed { backend: view, warnings: warnings(pool, &rules) })
                } else {
                    json!(view)
                })
            }
        }
    }
}

fn find_pool<'r>(rules: &'r Rules, name: &str) -> Result<&'r Arc<Pool>, Problem> {
    rules.pools.get(name).ok_or_else(|| {
        let names: Vec<_> = rules.pools.keys().map(String::as_str).collect();
        Problem::Absent(format!("there is no such pool: the pools are {}", names.join(", ")))
    })
}

/// By its address: as the file has it, or as discovery has found it.
fn find_backend(pool: &Pool, address: &str) -> Result<Arc<Backend>, Problem> {
    let backends = pool.backends();
    backends.iter().find(|backend| backend.name() == address).map(Arc::clone).ok_or_else(|| {
        let names: Vec<_> = backends.iter().map(|backend| backend.name()).collect();
        let (pool, names) = (pool.name(), names.join(", "));
        Problem::Absent(format!("pool {pool} has no such backend: its backends are {names}"))
    })
}

impl api::Place for Place {
    const ROOT: &'static str = "/api/pools";
    type Wanted = Wanted;

    fn of(segments: &[&str]) -> Option<Self> {
        match *segments {
            [] => Some(Self::Pools),
            [pool] if !pool.is_empty() => Some(Self::Pool(pool.to_owned())),
            [pool, "backends", address] => Some(Self::Backend { pool: pool.to_owned(), address: address.to_owned() }),
            _ => None,
        }
    }

    fn can_be_set(&self) -> bool {
        matches!(self, Self::Backend { .. })
    }
}

impl api::Wanted for Wanted {
    const EXPECTED: &'static str = "an object with drain, weight or both, as {\"drain\": true}";

    fn check(&self) -> Result<(), String> {
        const MOST: u32 = model::Backend::WEIGHT_MAX;
        match self {
            Self { drain: None, weight: None } => Err(format!("expected {}", Self::EXPECTED)),
            Self { weight: Some(weight), .. } if !(1..=MOST).contains(weight) => {
                Err(format!("weight is {weight}: must be between 1 and {MOST}; drain keeps requests away"))
            }
            Self { .. } => Ok(()),
        }
    }
}

impl Wanted {
    /// What is so already is no event.
    fn apply(&self, pool: &Pool, backend: &Backend, peer: Option<IpAddr>) {
        let tell = |key, before: &str, after: &str| {
            let (pool, backend) = (pool.name(), backend.name());
            audit::tell(Event::BackendSet { client: peer, pool, backend, key, before, after });
        };
        if let Some(weight) = self.weight
            && weight != backend.weight()
        {
            let before = backend.weight().to_string();
            backend.set_weight(weight);
            tell("weight", &before, &weight.to_string());
        }
        if let Some(drain) = self.drain
            && drain != (backend.admin_state() == AdminState::Draining)
        {
            if drain {
                backend.drain()
            } else {
                backend.undrain()
            }
            tell("drain", if drain { "false" } else { "true" }, if drain { "true" } else { "false" });
        }
    }
}

impl fmt::Debug for PoolsApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PoolsApi")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use http::header;

    use super::*;
    use crate::audit::tests::Listener;

    const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";

    /// As OpenAPI has them.
    pub(in crate::admin) const TEMPLATES: [&str; 3] =
        ["/api/pools", "/api/pools/{pool}", "/api/pools/{pool}/backends/{address}"];

    fn api() -> PoolsApi {
        let text = "[[listener]]\naddress = \"127.0.0.1:9\"\n[[route]]\npath = \"/\"\npool = \"app\"\naccess = \"public\"\n\
                    [[route]]\nhost = \"shop.example\"\npath = \"/cart\"\npool = \"app\"\naccess = \"public\"\n\
                    [pool.app]\nbackends = [{ address = \"127.0.0.1:1\", weight = 2 }, { address = \"[::1]:2\", drain = true }]\n\
                    [pool.spare]\nbackends = [\"127.0.0.1:3\"]\n";
        let rules = Rules::of_file(text);
        PoolsApi::new(Arc::new(ArcSwap::from_pointee(rules)), Metrics::new(), Token::new(TOKEN))
    }

    fn request(method: &str, target: &str) -> Parts {
        let request = http::Request::builder().method(method).uri(target);
        request.header(header::AUTHORIZATION, format!("Bearer {TOKEN}")).body(()).unwrap().into_parts().0
    }

    async fn ask(api: &PoolsApi, method: &str, target: &str, body: &str) -> (u16, Value) {
        let peer = Some(IpAddr::from([192, 0, 2, 7]));
        let body = async { Ok(body.as_bytes().to_vec()) };
        let response = api.answer(&request(method, target), peer, body).await;
        let status = response.status().as_u16();
        let is_problem = response.headers()[header::CONTENT_TYPE] == "application/problem+json";
        assert_eq!(is_problem, status != 200, "{method} {target}: {status}");
        (status, serde_json::from_slice(response.body()).unwrap())
    }

    const ONE: &str = "/api/pools/app/backends/127.0.0.1:1";
    const TWO: &str = "/api/pools/app/backends/%5B::1%5D:2";

    #[tokio::test]
    async fn a_request_that_is_not_exactly_right_does_nothing() {
        let (api, drain) = (api(), "{\"drain\": true}");
        for (method, target, body, expected) in [
            ("GET", "/api/pools/", "", 404),
            ("GET", "/api/pools/nothing", "", 404),
            ("GET", "/api/pools/app/", "", 404),
            ("GET", "/api/pools/app/backends", "", 404),
            ("GET", "/api/pools/app/backends/", "", 404),
            ("GET", "/api/pools/app/backends/127.0.0.1:9", "", 404),
            ("GET", "/api/pools/app/backends/127.0.0.1%3A1/x", "", 404),
            ("PATCH", "/api/pools/spare/backends/127.0.0.1:1", drain, 404),
            ("PATCH", "/api/pools/nothing/backends/127.0.0.1:1", drain, 404),
            ("GET", "/api/pools?x=1", "", 400),
            ("PATCH", "/api/pools/app/backends/127.0.0.1:1?force=1", drain, 400),
            ("PATCH", "/api/pools/app", drain, 405),
            ("PATCH", "/api/pools", drain, 405),
            ("DELETE", ONE, "", 405),
            ("PUT", ONE, drain, 405),
            ("POST", ONE, drain, 405),
            ("PATCH", ONE, "", 400),
            ("PATCH", ONE, "{}", 400),
            ("PATCH", ONE, "[true, 3]", 400),
            ("PATCH", ONE, "null", 400),
            ("PATCH", ONE, "{\"drain\": null}", 400),
            ("PATCH", ONE, "{\"drain\": 1}", 400),
            ("PATCH", ONE, "{\"drain\": \"true\"}", 400),
            ("PATCH", ONE, "{\"drain\": true, \"drain\": true}", 400),
            ("PATCH", ONE, "{\"drain\": true, \"wait\": true}", 400),
            ("PATCH", ONE, "{\"drain\": true} {}", 400),
            ("PATCH", ONE, "{\"weight\": 0, \"drain\": true}", 400),
            ("PATCH", ONE, "{\"weight\": 1001, \"drain\": true}", 400),
            ("PATCH", ONE, "{\"weight\": -1, \"drain\": true}", 400),
            ("PATCH", ONE, "{\"weight\": 1.5, \"drain\": true}", 400),
        ] {
            let (status, problem) = ask(&api, method, target, body).await;
            assert_eq!(status, expected, "{method} {target} {body}: {problem}");
            assert_eq!(problem["status"], expected);
        }
        let (_, one) = ask(&api, "GET", ONE, "").await;
        assert_eq!((&one["drain"]["current"], &one["weight"]["current"]), (&json!(false), &json!(2)), "after all this");
    }

    #[tokio::test]
    async fn what_is_set_shows_beside_what_the_file_says_and_in_the_audit() {
        let (api, listener) = (api(), Listener::begin());
        let (status, one) = ask(&api, "PATCH", ONE, "{\"weight\": 5, \"drain\": false}").await;
        assert_eq!((status, &one["weight"]), (200, &json!({ "configured": 2, "current": 5 })));
        assert_eq!(one["warnings"], json!([]));
        let (_, one) = ask(&api, "PATCH", ONE, "{\"drain\": true}").await;
        assert_eq!((&one["state"], &one["health"]), (&json!("draining"), &json!("up")));
        let warning = "no backend of pool app takes requests: /, shop.example/cart get 503";
        assert_eq!(one["warnings"], json!([warning]), "it was the last");
        assert_eq!(ask(&api, "GET", "/api/pools/app", "").await.1["warnings"], json!([warning]));
        let (_, two) = ask(&api, "PATCH", TWO, "{\"drain\": false}").await;
        assert_eq!((&two["state"], &two["drain"]), (&json!("up"), &json!({ "configured": true, "current": false })));
        ask(&api, "PATCH", TWO, "{\"drain\": false}").await;
        let event = |key: &str, backend: &str, before: &str, after: &str| {
            json!({ "message": "backend set", "client": "192.0.2.7", "pool": "app", "backend": backend, "key": key,
                    "before": before, "after": after })
        };
        let expected = [
            event("weight", "127.0.0.1:1", "2", "5"),
            event("drain", "127.0.0.1:1", "false", "true"),
            event("drain", "[::1]:2", "true", "false"),
        ];
        assert_eq!(listener.events(), expected, "what is so already is no event");
        let set = ["pool.app: drain of 127.0.0.1:1", "pool.app: drain of [::1]:2", "pool.app: weight of 127.0.0.1:1"];
        assert_eq!(api.rules.load().set_by_hand(), set);
    }

    #[tokio::test]
    async fn the_description_names_exactly_what_can_be_done() {
        let api = api();
        let document: Value = serde_json::from_str(include_str!("../../docs/admin-api.json")).unwrap();
        for template in TEMPLATES {
            let path = template.replace("{pool}", "app").replace("{address}", "127.0.0.1:1");
            for method in ["get", "put", "post", "delete", "options", "patch", "trace"] {
                let (status, _) = ask(&api, &method.to_uppercase(), &path, "").await;
                let is_described = document["paths"][template].get(method).is_some();
                assert_eq!(status != 405, is_described, "{method} {path}: {status}");
            }
        }
        let keys = |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        let pool = ask(&api, "GET", "/api/pools/app", "").await.1;
        for (shown, schema) in [(&pool, "Pool"), (&pool["backends"][0], "Backend")] {
            let described = &document["components"]["schemas"][schema];
            assert_eq!(keys(shown), keys(&described["properties"]), "{schema}");
            let mut required: Vec<_> = described["required"].as_array().unwrap().iter().collect();
            required.sort_by_key(|name| name.as_str());
            assert_eq!(json!(required), json!(keys(shown)), "{schema}: all of it is always there");
        }
    }

    #[tokio::test]
    async fn who_asks_wrongly_is_told_so_before_a_body_is_waited_for() {
        let api = api();
        for (method, target, expected) in [
            ("PATCH", "/api/pools/app/backends/127.0.0.1:1?force=1", 400),
            ("PATCH", "/api/pools/app", 405),
            ("DELETE", ONE, 405),
            ("PATCH", "/api/pools/app/backends", 404),
        ] {
            let body = async { panic!("nobody reads this body") };
            let response = api.answer(&request(method, target), None, body).await;
            assert_eq!(response.status(), expected, "{method} {target}");
        }
    }

    #[tokio::test]
    async fn only_the_token_opens_it() {
        let api = api();
        for authorization in ["", "Bearer wrong", "Basic OnE3WnAtS3cycTdacC1LdzJxN1pwLUt3MnE3WnAtS3cy"] {
            let mut request = request("PATCH", ONE);
            request.headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
            let body = async { panic!("nobody reads the body of a stranger") };
            let response = api.answer(&request, None, body).await;
            assert_eq!(
                (response.status(), &response.headers()[header::WWW_AUTHENTICATE]),
                (StatusCode::UNAUTHORIZED, &"Bearer".parse().unwrap())
            );
        }
    }
}
