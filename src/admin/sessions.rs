//! The sessions API: who is logged in, and who no longer. For whoever has the token, and nobody else.
//!
//! A browser sends no bearer token by itself, so pages of other sites can do nothing here; there are no cookies and
//! no CORS. `docs/admin-api.json` describes it all, and a test keeps the two together.

use std::net::IpAddr;

use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde_json::json;

use super::problem::Problem;
use super::query::Query;
use super::token::Token;
use super::{JSON, reply};
use crate::audit::{self, Event, Revoker};
use crate::session::Sessions;
use crate::session::control::{Control, Handle};

/// What there is under `/api/`.
pub struct SessionsApi {
    control: Control,
    token: Token,
}

/// The description, as OpenAPI 3.1 has it.
const OPENAPI: &str = include_str!("../../docs/admin-api.json");

const COLLECTION: &str = "/api/sessions";
const COUNT: &str = "/api/sessions/count";
pub(super) const DESCRIPTION: &str = "/api/openapi.json";

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Collection,
    Count,
    Session(Handle),
    Description,
}

type Answer = Result<serde_json::Value, Problem>;

impl SessionsApi {
    pub fn new(sessions: Sessions, token: Token) -> Self {
        Self { control: Control::new(sessions), token }
    }

    /// `peer`: who asks, for the audit log.
    pub(super) async fn answer(&self, request: &Parts, peer: Option<IpAddr>) -> Response<Vec<u8>> {
        match self.route(request, peer).await {
            Ok(Routed::Json(answer)) => reply(StatusCode::OK, JSON, answer.to_string().into_bytes()),
            Ok(Routed::Description) => reply(StatusCode::OK, JSON, OPENAPI.as_bytes().to_vec()),
            Err(problem) => problem.reply(),
        }
    }

    async fn route(&self, request: &Parts, peer: Option<IpAddr>) -> Result<Routed, Problem> {
        let place = Place::of(request.uri.path());
        // The description is no secret: it is in the book.
        if place != Some(Place::Description) && !self.token.is_shown_by(request) {
            return Err(Problem::NoToken);
        }
        let place = place.ok_or(Problem::NoSuchPlace)?;
        let query = request.uri.query();
        let answer = match (Verb::of(&request.method), place) {
            (Some(Verb::Get), Place::Description) => return Ok(Routed::Description),
            (Some(Verb::Get), Place::Collection) => self.list(query).await,
            (Some(Verb::Get), Place::Count) => self.count(query).await,
            (Some(Verb::Get), Place::Session(handle)) => self.show(&handle, query).await,
            (Some(Verb::Delete), Place::Collection) => self.end_many(query, peer).await,
            (Some(Verb::Delete), Place::Session(handle)) => self.end_one(&handle, query, peer).await,
            (Some(Verb::Delete) | None, place) => Err(Problem::Method { allowed: place.allowed() }),
        };
        answer.map(Routed::Json)
    }

    async fn list(&self, query: Option<&str>) -> Answer {
        let query = Query::parse(query, &["user", "part"])?;
        match (query.get("user"), query.get("part")) {
            (Some(_), Some(_)) => Err(Problem::Query("either user or part".into())),
            (Some(user), None) => Ok(json!({ "sessions": self.control.of_user(user).await? })),
            (None, part) => {
                let digits = part.unwrap_or("0");
                let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
                let part = digits.parse().ok().filter(|_| is_number);
                let part = part.ok_or_else(|| Problem::Query("part is a number that `next` gave".into()))?;
                Ok(json!(self.control.page(part).await?))
            }
        }
    }

    async fn count(&self, query: Option<&str>) -> Answer {
        let query = Query::parse(query, &["user"])?;
        Ok(json!({ "count": self.control.count(query.get("user")).await? }))
    }

    async fn show(&self, handle: &Handle, query: Option<&str>) -> Answer {
        let query = Query::parse(query, &["user"])?;
        let details = self.control.details(required(&query, "user")?, handle).await?;
        Ok(json!(details.ok_or(Problem::NoSuchSession)?))
    }

    async fn end_one(&self, handle: &Handle, query: Option<&str>, peer: Option<IpAddr>) -> Answer {
        let query = Query::parse(query, &["user"])?;
        let user = required(&query, "user")?;
        if !self.control.end(user, handle).await? {
            return Err(Problem::NoSuchSession);
        }
        tell_audit(peer, Some(user), &handle.to_string(), 1);
        Ok(json!({ "ended": 1 }))
    }

    async fn end_many(&self, query: Option<&str>, peer: Option<IpAddr>) -> Answer {
        let query = Query::parse(query, &["user", "except", "everyone"])?;
        let names = query.names();
        if names == ["everyone"] && query.get("everyone") == Some("true") {
            return match self.control.end_everyone().await {
                Ok(ended) => {
                    tell_audit(peer, None, "everyone", ended);
                    Ok(json!({ "ended": ended }))
                }
                Err(interrupted) => {
                    tell_audit(peer, None, "everyone", interrupted.ended);
                    Err(Problem::Interrupted(interrupted))
                }
            };
        }
        if names.contains(&"everyone") {
            return Err(Problem::Query("everyone=true stands alone".into()));
        }
        let user = required(&query, "user")?;
        let malformed = || Problem::Query("except is ten hexadecimal digits, as `session` has them".into());
        let except = query.get("except").map(|text| Handle::parse(text).ok_or_else(malformed)).transpose()?;
        let ended = self.control.end_all_of(user, except.as_ref()).await?.ok_or(Problem::NoSuchSession)?;
        let what = except.map_or_else(|| "all".to_owned(), |handle| format!("all but {handle}"));
        tell_audit(peer, Some(user), &what, ended);
        Ok(json!({ "ended": ended }))
    }
}

enum Routed {
    Json(serde_json::Value),
    Description,
}

/// The methods that any place has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    /// HEAD as well, which is a GET whose body nobody sends.
    Get,
    Delete,
}

impl Verb {
    fn of(method: &Method) -> Option<Self> {
        match *method {
            Method::GET | Method::HEAD => Some(Self::Get),
            Method::DELETE => Some(Self::Delete),
            _ => None,
        }
    }
}

impl Place {
    fn of(path: &str) -> Option<Self> {
        match path {
            COLLECTION => Some(Self::Collection),
            COUNT => Some(Self::Count),
            DESCRIPTION => Some(Self::Description),
            _ => {
                let handle = path.strip_prefix(COLLECTION)?.strip_prefix('/')?;
                Handle::parse(handle).map(Self::Session)
            }
        }
    }

    fn allowed(&self) -> &'static str {
        match self {
            Self::Collection | Self::Session(_) => "GET, HEAD, DELETE",
            Self::Count | Self::Description => "GET, HEAD",
        }
    }
}

fn required<'q>(query: &'q Query<'_>, name: &str) -> Result<&'q str, Problem> {
    query.get(name).ok_or_else(|| Problem::Query(format!("the parameter {name} is missing")))
}

/// Who it was cannot be known: all have the same token.
fn tell_audit(client: Option<IpAddr>, user: Option<&str>, what: &str, ended: u64) {
    audit::tell(Event::Revoked { by: Revoker::Operator, client, user, what, ended });
}

impl std::fmt::Debug for SessionsApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionsApi")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::time::Duration;

    use http::header;

    use super::super::reload::RELOAD;
    use super::super::splits;
    use super::super::status::STATUS;
    use super::super::{LOOKS, pools};
    use super::*;
    use crate::session::Lifetime;
    use crate::session::id::SessionId;
    use crate::session::record::{ClientHints, LoginMethod};
    use crate::session::store::memory::MemoryStore;
    use crate::session::store::{NewSession, SessionStore, Terms};

    const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";
    const LIFETIME: Lifetime = Lifetime { idle: Duration::from_secs(3600), absolute: Duration::from_secs(3600) };

    /// An API with sessions of these users; their handles.
    async fn api(users: &[&str]) -> (SessionsApi, Vec<String>) {
        let store = Arc::new(MemoryStore::new(1_000));
        let mut handles = Vec::new();
        for user in users {
            let key = SessionId::generate(user).unwrap().key();
            let session = NewSession {
                identity: serde_json::from_value(json!({ "user": user, "groups": [], "claims": {} })).unwrap(),
                method: LoginMethod::Password,
                client: ClientHints { address: None, user_agent: "Browser/1".into() },
                secrets: None,
                attributes: Default::default(),
                login: None,
            };
            store.create(&key, session, &Terms { lifetime: LIFETIME, limit: None, replaces: None }).await.unwrap();
            handles.push(key.log_hash());
        }
        (SessionsApi::new(Sessions::new(store, LIFETIME), Token::new(TOKEN)), handles)
    }

    fn request(method: &str, target: &str, authorization: &[&str]) -> Parts {
        let mut request = http::Request::builder().method(method).uri(target);
        for value in authorization {
            request = request.header(header::AUTHORIZATION, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    async fn ask(api: &SessionsApi, method: &str, target: &str) -> (u16, serde_json::Value) {
        let response = api.answer(&request(method, target, &[&format!("Bearer {TOKEN}")]), None).await;
        let status = response.status().as_u16();
        let is_problem = response.headers()[header::CONTENT_TYPE] == "application/problem+json";
        assert_eq!(is_problem, status != 200, "{method} {target}: {status}");
        (status, serde_json::from_slice(response.body()).unwrap())
    }

    #[tokio::test]
    async fn only_the_token_opens_it() {
        let (api, _) = api(&["ann"]).await;
        let right = format!("Bearer {TOKEN}");
        let cases: &[(&[&str], u16)] = &[
            (&[&right], 200),
            (&[&format!("bearer {TOKEN}")], 200),
            (&[], 401),
            (&[&right, &right], 401),
            (&[&right[..right.len() - 1]], 401),
            (&[&format!("{right}x")], 401),
            (&[&format!("Bearer  {TOKEN}")], 401),
            (&[&format!("Basic {TOKEN}")], 401),
            (&[TOKEN], 401),
            (&["Bearer "], 401),
            (&["Bearer"], 401),
            (&[""], 401),
        ];
        for (fields, expected) in cases {
            let response = api.answer(&request("GET", COLLECTION, fields), None).await;
            assert_eq!(response.status().as_u16(), *expected, "{fields:?}");
            let challenge = response.headers().get(header::WWW_AUTHENTICATE);
            assert_eq!(challenge.is_some(), *expected == 401, "RFC 9110, section 15.5.2");
        }
        for (method, target) in
            [("GET", "/api/nothing"), ("POST", COLLECTION), ("DELETE", "/api/sessions?everyone=true")]
        {
            let response = api.answer(&request(method, target, &[]), None).await;
            assert_eq!(response.status(), 401, "without it, nothing is told of what there is: {method} {target}");
        }
    }

    #[tokio::test]
    async fn a_query_that_is_not_exactly_right_does_nothing() {
        let (api, handles) = api(&["ann", "ann", "bob"]).await;
        let one = &handles[0];
        for (method, target, expected) in [
            ("GET", "/api/sessions?user=ann&part=0", 400),
            ("GET", "/api/sessions?part=-1", 400),
            ("GET", "/api/sessions?part=%2B1", 400),
            ("GET", "/api/sessions?part=65536", 400),
            ("GET", "/api/sessions?usr=ann", 400),
            ("GET", "/api/sessions/count?part=0", 400),
            ("GET", &format!("/api/sessions/{one}"), 400),
            ("GET", &format!("/api/sessions/{one}?user=bob"), 404),
            ("GET", "/api/sessions/0123456789?user=ann", 404),
            ("GET", "/api/sessions/012345678?user=ann", 404),
            ("GET", "/api/sessions/", 404),
            ("GET", "/api/sessions/count/", 404),
            ("DELETE", "/api/sessions", 400),
            ("DELETE", "/api/sessions?everyone=1", 400),
            ("DELETE", "/api/sessions?everyone=true&user=ann", 400),
            ("DELETE", "/api/sessions?user=ann&everyone=true", 400),
            ("DELETE", "/api/sessions?user=ann&user=bob", 400),
            ("DELETE", "/api/sessions?user=ann+b", 400),
            ("DELETE", "/api/sessions?user=ann&except=xyz", 400),
            ("DELETE", "/api/sessions?user=ann&except=0123456789", 404),
            ("DELETE", &format!("/api/sessions?except={one}"), 400),
            ("DELETE", &format!("/api/sessions/{one}?user=bob"), 404),
            ("DELETE", &format!("/api/sessions/{one}?everyone=true"), 400),
            ("POST", "/api/sessions?user=ann", 405),
            ("DELETE", "/api/sessions/count", 405),
        ] {
            let (status, problem) = ask(&api, method, target).await;
            assert_eq!(status, expected, "{method} {target}: {problem}");
            assert_eq!(problem["status"], expected);
        }
        assert_eq!(ask(&api, "GET", COUNT).await.1, json!({ "count": 3 }), "nobody was logged out by all this");
    }

    #[tokio::test]
    async fn one_all_but_one_all_and_everyone() {
        let (api, handles) = api(&["ann", "ann", "ann", "bob", "eve"]).await;
        let listed = ask(&api, "GET", "/api/sessions?user=ann").await.1;
        let listed: Vec<_> = listed["sessions"].as_array().unwrap().iter().map(|s| s["session"].clone()).collect();
        assert_eq!(listed, handles[..3], "the oldest first");

        let ended = |sessions: u64| (200, json!({ "ended": sessions }));
        assert_eq!(ask(&api, "DELETE", &format!("/api/sessions/{}?user=ann", handles[0])).await, ended(1));
        assert_eq!(ask(&api, "DELETE", &format!("/api/sessions?user=ann&except={}", handles[1])).await, ended(1));
        let (status, details) = ask(&api, "GET", &format!("/api/sessions/{}?user=ann", handles[1])).await;
        assert_eq!((status, &details["user"], &details["activity"]), (200, &json!("ann"), &json!([])));
        assert_eq!(ask(&api, "DELETE", "/api/sessions?user=bob").await, ended(1));
        assert_eq!(ask(&api, "DELETE", "/api/sessions?user=bob").await, ended(0), "twice is no mistake");
        assert_eq!(ask(&api, "GET", "/api/sessions/count?user=bob").await.1, json!({ "count": 0 }));
        assert_eq!(ask(&api, "DELETE", "/api/sessions?everyone=true").await, ended(2));
        assert_eq!(ask(&api, "GET", COUNT).await.1, json!({ "count": 0 }));
    }

    #[tokio::test]
    async fn pages_hold_every_session_once() {
        let users: Vec<String> = (0..500).map(|n| format!("user{n}")).collect();
        let (api, handles) = api(&users.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let (mut found, mut next) = (Vec::new(), json!(0));
        while !next.is_null() {
            let page = ask(&api, "GET", &format!("/api/sessions?part={next}")).await.1;
            found
                .extend(page["sessions"].as_array().unwrap().iter().map(|s| s["session"].as_str().unwrap().to_owned()));
            next = page["next"].clone();
        }
        assert_eq!(found.len(), 500);
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), handles.into_iter().collect::<BTreeSet<_>>());
        assert_eq!(ask(&api, "GET", "/api/sessions?part=65535").await.1, json!({ "sessions": [], "next": null }));
    }

    /// As a template of OpenAPI; a new place must be looked at here.
    fn template(place: &Place) -> &'static str {
        match place {
            Place::Collection => COLLECTION,
            Place::Count => COUNT,
            Place::Session(_) => "/api/sessions/{handle}",
            Place::Description => DESCRIPTION,
        }
    }

    #[tokio::test]
    async fn the_description_names_exactly_what_there_is() {
        let (api, _) = api(&[]).await;
        let response = api.answer(&request("GET", DESCRIPTION, &[]), None).await;
        assert_eq!(response.status(), 200, "no token is needed to read what is in the book");
        let document: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));

        let handle = Handle::parse("0123456789").unwrap();
        let places = [Place::Collection, Place::Count, Place::Session(handle), Place::Description];
        let described = document["paths"].as_object().unwrap();
        let there_is = places.iter().map(template).chain(LOOKS).chain([RELOAD, STATUS]).chain(splits::TEMPLATES);
        let there_is = there_is.chain(pools::tests::TEMPLATES).collect();
        assert_eq!(described.keys().map(String::as_str).collect::<BTreeSet<_>>(), there_is);
        for place in &places {
            let path = template(place).replace("{handle}", "0123456789");
            assert_eq!(Place::of(&path).as_ref(), Some(place));
            for method in ["get", "put", "post", "delete", "options", "patch", "trace"] {
                let status = ask(&api, &method.to_uppercase(), &format!("{path}?unknown=1")).await.0;
                let is_described = described[template(place)].get(method).is_some();
                assert_eq!(status != 405, is_described, "{method} {path}: {status}");
            }
        }
    }

    #[test]
    fn the_token_does_not_print() {
        let api = SessionsApi::new(Sessions::new(Arc::new(MemoryStore::new(1)), LIFETIME), Token::new(TOKEN));
        assert_eq!(format!("{api:?}"), "SessionsApi");
    }
}
