//! Whole answers of the endpoints, and the store that these tests can switch off.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::time::SystemTime;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::*;
use crate::config::model::WhenFull;
use crate::login::oidc::Demand;
use crate::session::id::SessionKey;
use crate::session::record::Record;
use crate::session::store::{
    Activity, Change, Count, Creation, EndEvent, Ending, Found, Limit, Listed, NewSession, SessionStore, Stored, Terms,
};
use crate::session::{Lifetime, Options};

/// Forgets nothing by time, and says nothing while it is down.
#[derive(Default)]
pub(super) struct FakeStore(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    sessions: HashMap<SessionKey, Record>,
    counters: BTreeMap<String, u64>,
    calls: usize,
    down: bool,
    /// The call with this number fails, and no other.
    fails_at: Option<usize>,
    unreadable: bool,
    /// Of each session that is not there.
    ending: Option<Ending>,
    touches: usize,
}

impl FakeStore {
    pub(super) fn set_down(&self, down: bool) {
        self.0.lock().down = down;
    }

    /// After so many further calls that succeed, one fails.
    pub(super) fn fail_once_after(&self, calls: usize) {
        let mut kept = self.0.lock();
        kept.fails_at = Some(kept.calls + calls + 1);
    }

    /// As if they were long ago.
    fn forget_known_networks(&self) {
        self.0.lock().counters.retain(|name, _| !name.starts_with("login:known-network:"));
    }

    fn set_ending(&self, ending: Ending) {
        self.0.lock().ending = Some(ending);
    }

    fn touches(&self) -> usize {
        self.0.lock().touches
    }

    fn set_unreadable(&self, unreadable: bool) {
        self.0.lock().unreadable = unreadable;
    }

    /// Logged in so much earlier.
    fn age(&self, time: Duration) {
        self.0.lock().sessions.values_mut().for_each(|record| record.created -= time.as_millis() as u64);
    }

    fn handles(&self) -> Vec<String> {
        self.0.lock().sessions.keys().map(SessionKey::log_hash).collect()
    }

    /// So many more sessions of alice.
    fn multiply(&self, sessions: usize) {
        let mut kept = self.0.lock();
        let record = kept.sessions.values().find(|record| record.identity.user == "alice").unwrap().clone();
        let more = (0..sessions).map(|_| (SessionId::generate("alice").unwrap().key(), record.clone()));
        kept.sessions.extend(more);
    }

    pub(super) fn counters(&self) -> Vec<String> {
        self.0.lock().counters.keys().cloned().collect()
    }

    fn sessions(&self) -> Vec<Record> {
        self.0.lock().sessions.values().cloned().collect()
    }

    fn calls(&self) -> usize {
        self.0.lock().calls
    }

    fn with<T>(&self, answer: impl FnOnce(&mut Kept) -> T) -> Result<T, StoreError> {
        let mut kept = self.0.lock();
        kept.calls += 1;
        let fails = kept.down || kept.fails_at == Some(kept.calls);
        if fails { Err(StoreError::Unavailable("switched off".into())) } else { Ok(answer(&mut kept)) }
    }
}

#[async_trait]
impl SessionStore for FakeStore {
    async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
        // Half of its idle time is over.
        let time_to_live = Duration::from_secs(30);
        self.with(|kept| match kept.sessions.get(key) {
            Some(_) if kept.unreadable => Err(StoreError::Unreadable),
            Some(record) => Ok(Found::Live(Stored { record: record.clone().into(), time_to_live })),
            None => Ok(kept.ending.map_or(Found::Nothing, Found::Ended)),
        })?
    }

    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        let NewSession { identity, method, client, secrets, attributes, login } = session;
        let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let [created, ends] = [created, created + terms.lifetime.absolute].map(|time| time.as_millis() as u64);
        let record =
            Record { identity, attributes, created, ends, method, client, secrets, login, known: Default::default() };
        self.with(|kept| {
            let is_replaced = |old: &SessionKey| terms.replaces.as_ref() == Some(old);
            let others = kept
                .sessions
                .iter()
                .filter(|(key, other)| other.identity.user == record.identity.user && !is_replaced(key));
            if terms.limit.is_some_and(|limit| limit.sessions as usize <= others.count()) {
                return Creation::Full;
            }
            kept.sessions.insert(key.clone(), record);
            terms.replaces.as_ref().map(|old| kept.sessions.remove(old));
            Creation::Begun { displaced: 0 }
        })
    }

    async fn touch(&self, key: &SessionKey, _: Duration, _: u64) -> Result<bool, StoreError> {
        self.with(|kept| {
            kept.touches += 1;
            kept.sessions.contains_key(key)
        })
    }

    async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
        self.with(|kept| {
            let record = kept.sessions.get_mut(key)?;
            *record = change(record).unwrap_or(record.clone());
            Some(Arc::new(record.clone()))
        })
    }

    async fn claim(&self, _: &str, _: &str, _: Duration) -> Result<bool, StoreError> {
        unreachable!("this room claims nothing")
    }

    async fn release(&self, _: &str, _: &str) -> Result<(), StoreError> {
        unreachable!("this room claims nothing")
    }

    async fn bind(&self, _: &str, _: &SessionKey, _: Duration) -> Result<Vec<SessionKey>, StoreError> {
        Ok(Vec::new())
    }

    async fn bound(&self, _: &str) -> Result<Vec<SessionKey>, StoreError> {
        Ok(Vec::new())
    }

    async fn destroy(&self, key: &SessionKey, _: Option<&str>, _: Ending) -> Result<bool, StoreError> {
        self.with(|kept| kept.sessions.remove(key).is_some())
    }

    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        self.with(|kept| {
            let value = kept.counters.entry(counter.to_owned()).or_default();
            *value += 1;
            Count { value: *value, resets_in: window }
        })
    }

    async fn decrement(&self, counter: &str) -> Result<(), StoreError> {
        self.with(|kept| {
            if let Some(value) = kept.counters.get_mut(counter) {
                *value = value.saturating_sub(1);
            }
        })
    }

    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        self.with(|kept| kept.counters.get(counter).copied().unwrap_or_default())
    }

    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        self.with(|kept| {
            kept.counters.remove(counter);
        })
    }

    async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError> {
        self.with(|kept| {
            let theirs = kept.sessions.iter().filter(|(_, record)| record.identity.user == user);
            let listed = theirs.map(|(key, record)| {
                let stored = Stored { record: record.clone().into(), time_to_live: Duration::from_secs(30) };
                Listed { key: key.clone(), stored }
            });
            listed.collect()
        })
    }

    async fn destroy_all(&self, user: &str, except: Option<&SessionKey>, _: Ending) -> Result<u64, StoreError> {
        self.with(|kept| {
            let before = kept.sessions.len();
            kept.sessions.retain(|key, record| record.identity.user != user || Some(key) == except);
            (before - kept.sessions.len()) as u64
        })
    }

    fn parts(&self) -> u16 {
        1
    }

    async fn list_part(&self, _: u16) -> Result<Vec<Listed>, StoreError> {
        self.with(|_| Vec::new())
    }

    async fn destroy_part(&self, _: u16, _: Ending) -> Result<u64, StoreError> {
        self.with(|_| 0)
    }

    async fn total(&self) -> Result<u64, StoreError> {
        self.with(|kept| kept.sessions.len() as u64)
    }

    async fn sweep(&self, _: u16) -> Result<Vec<EndEvent>, StoreError> {
        self.with(|_| Vec::new())
    }

    async fn forget_events(&self, _: u16, _: &[EndEvent]) -> Result<(), StoreError> {
        self.with(|_| ())
    }

    async fn lead(&self, _: &str, _: Duration) -> Result<bool, StoreError> {
        self.with(|_| true)
    }

    async fn add_activity(&self, _: &SessionKey, _: &[Activity], _: u16) -> Result<(), StoreError> {
        self.with(|_| ())
    }

    async fn activity(&self, _: &SessionKey) -> Result<Vec<Activity>, StoreError> {
        self.with(|_| Vec::new())
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.with(|_| ())
    }
}

const PASSWORD: &str = "correct horse";
const ORIGIN: &str = "https://app.example";

/// A browser before the endpoints: it keeps cookies and sends what browsers send.
struct Browser {
    login: Login,
    store: Arc<FakeStore>,
    cookie: SessionCookie,
    cookies: BTreeMap<String, String>,
    client: IpAddr,
    site: &'static str,
}

fn users(text: &str) -> Arc<Users> {
    static HASH: OnceLock<String> = OnceLock::new();
    let text = text.replace("HASH", HASH.get_or_init(|| hash::hash(PASSWORD).unwrap()));
    Arc::new(Users::parse(Path::new("users.toml"), &text).unwrap())
}

impl Browser {
    fn new() -> Self {
        Self::with_config("")
    }

    /// `config`: further keys of `[login]`.
    fn with_config(config: &str) -> Self {
        Self::with(config, Options::default())
    }

    fn with(config: &str, options: Options) -> Self {
        let config = format!("{config}\n[password]\nusers_file = \"users.toml\"\nhashes_max = 2\n");
        let config: model::Login = toml::from_str(&config).unwrap();
        let store = Arc::new(FakeStore::default());
        let lifetime = Lifetime { idle: Duration::from_secs(60), absolute: Duration::from_secs(3600) };
        let sessions = Sessions::new(Arc::clone(&store) as Arc<dyn SessionStore>, lifetime).with(options);
        let users = users(
            "[alice]\npassword = \"HASH\"\nname = \"Alice\"\ngroups = [\"staff\"]\n\
             [bob]\npassword = \"HASH\"\n[carol]\npassword = \"HASH\"\ndisabled = true\n",
        );
        Self {
            login: Login::new(&config, users, sessions, Metrics::new()).unwrap(),
            store,
            cookie: SessionCookie::new("__Host-session", true, cookie::SameSite::Lax),
            cookies: BTreeMap::new(),
            client: "192.0.2.1".parse().unwrap(),
            site: "same-origin",
        }
    }

    async fn send(&mut self, method: Method, target: &str, fields: &[(&'static str, &str)], body: &str) -> Answered {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, value.parse().unwrap());
        }
        for (name, value) in &self.cookies {
            headers.append("cookie", format!("{name}={value}").parse().unwrap());
        }
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let request = LoginRequest {
            method: &method,
            path,
            query,
            headers: &headers,
            body: Bytes::copy_from_slice(body.as_bytes()),
            client: self.client,
            is_silent: headers.contains_key("x-silent"),
            origin: ORIGIN,
            cookie: &self.cookie,
            secure: true,
            request_id: "4711",
        };
        let response = self.login.answer(request).await;
        for cookie in response.headers().get_all(SET_COOKIE) {
            let cookie = cookie::Cookie::parse(cookie.to_str().unwrap().to_owned()).unwrap();
            if cookie.value().is_empty() {
                self.cookies.remove(cookie.name());
            } else {
                self.cookies.insert(cookie.name().to_owned(), cookie.value().to_owned());
            }
        }
        Answered(response)
    }

    async fn get(&mut self, target: &str) -> Answered {
        self.send(Method::GET, target, &[("sec-fetch-mode", "navigate")], "").await
    }

    async fn post(&mut self, target: &str, form: &[(&str, &str)]) -> Answered {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let fields = [
            ("content-type", "application/x-www-form-urlencoded"),
            ("sec-fetch-site", self.site),
            ("sec-fetch-mode", "navigate"),
        ];
        self.send(Method::POST, target, &fields, &body).await
    }

    async fn log_in(&mut self, username: &str, password: &str) -> Answered {
        let csrf = self.get("/.cloakroom/login").await.csrf();
        let form =
            [("csrf", csrf.as_str()), ("return_to", "/inbox?new"), ("username", username), ("password", password)];
        self.post("/.cloakroom/login", &form).await
    }

    fn has_session(&self) -> bool {
        self.cookies.contains_key(self.cookie.name())
    }
}

#[derive(Debug)]
struct Answered(Response<Bytes>);

impl Answered {
    fn status(&self) -> u16 {
        self.0.status().as_u16()
    }

    fn header(&self, name: &str) -> &str {
        self.0.headers().get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn html(&self) -> &str {
        std::str::from_utf8(self.0.body()).unwrap()
    }

    /// The hidden token of the page's form.
    fn csrf(&self) -> String {
        let (_, rest) = self.html().split_once("name=\"csrf\" value=\"").expect("a form with a token");
        rest.split_once('"').unwrap().0.to_owned()
    }

    /// All of the answer but what differs by chance.
    fn masked(&self) -> String {
        let mut fields: Vec<String> =
            self.0.headers().iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        fields.sort();
        let text = format!("{}\n{}\n\n{}", self.status(), fields.join("\n"), self.html());
        text.replace(&self.csrf(), "TOKEN")
    }
}

#[tokio::test]
async fn a_right_password_starts_a_session_and_leads_back() {
    let mut browser = Browser::new();
    let answer = browser.log_in("alice", PASSWORD).await;

    assert_eq!((answer.status(), answer.header("location")), (303, "/inbox?new"));
    assert_eq!(answer.header("cache-control"), "no-store");
    assert!(browser.has_session());
    assert!(!browser.cookies.contains_key("__Host-session-login"), "the key of the login forms has served");
    let sessions = browser.store.sessions();
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].identity.groups, ["staff"]);
    assert_eq!(sessions[0].client.address, Some(browser.client));
}

#[tokio::test]
async fn every_refusal_looks_alike() {
    let mut refusals = Vec::new();
    for (username, password) in
        [("alice", "wrong"), ("alice", ""), ("alice", "correct horse "), ("carol", PASSWORD), ("carla", PASSWORD)]
    {
        let mut browser = Browser::new();
        browser.cookies.insert("__Host-session-login".to_owned(), "A".repeat(43));
        let answer = browser.log_in(username, password).await;
        assert_eq!(answer.status(), 403, "{username} {password:?}");
        assert_eq!(answer.header("retry-after"), "");
        assert!(!browser.has_session() && browser.store.sessions().is_empty());
        refusals.push(answer.masked().replace(username, "USERNAME"));
    }
    refusals.dedup();
    assert_eq!(refusals.len(), 1, "no one learns which names exist:\n{}", refusals.join("\n--------\n"));

    let mut browser = Browser::with_config("[password.throttle]\nper_account_and_network = 1\n");
    browser.cookies.insert("__Host-session-login".to_owned(), "A".repeat(43));
    browser.log_in("alice", "wrong").await;
    let mut answer = browser.log_in("alice", PASSWORD).await;
    assert_eq!(answer.header("retry-after"), "900");
    answer.0.headers_mut().remove("retry-after");
    assert_eq!(answer.masked().replace("alice", "USERNAME"), refusals[0], "throttled differs in Retry-After alone");
    assert!(!browser.has_session(), "even with the right password");
}

#[tokio::test]
async fn who_has_all_the_sessions_that_one_may_have_is_told_what_to_do() {
    let limit = Some(Limit { sessions: 2, when_full: WhenFull::Refuse });
    let mut browser = Browser::with("", Options { limit, ..Options::default() });
    for _ in 0..2 {
        assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 303);
        browser.cookies.clear();
    }
    let answer = browser.log_in("alice", PASSWORD).await;
    assert_eq!(answer.status(), 403);
    assert!(answer.html().contains("logged in 2 times elsewhere") && answer.html().contains("Log out on another"));
    assert!(!browser.has_session());
    let full = browser.login.metrics.logins.with_label_values(&["password", "full"]).get();
    assert_eq!(full, 1);
    let answer = browser.log_in("alice", "wrong").await;
    assert!(!answer.html().contains("times"), "only who has the password learns of it");
    assert_eq!(browser.log_in("bob", PASSWORD).await.status(), 303, "another user has room");
}

#[tokio::test]
async fn the_login_page_says_why_one_is_there() {
    let mut browser = Browser::new();
    for (query, expected) in [
        ("reason=displaced", Some("because you logged in elsewhere")),
        ("return_to=%2Fa&reason=revoked", Some("from another device")),
        ("reason=expired", Some("has ended")),
        ("reason=<b>you+won</b>", None),
        ("", None),
    ] {
        let page = browser.get(&format!("/.cloakroom/login?{query}")).await;
        let said = page.html().split("role=\"status\">").nth(1).map(|rest| rest.split('<').next().unwrap());
        assert_eq!(said.is_some(), expected.is_some(), "{query}");
        assert!(expected.is_none_or(|text| said.unwrap().contains(text)), "{query}: {said:?}");
        assert!(!page.html().contains("won"), "the sentences are ours alone");
    }
}

#[tokio::test]
async fn who_comes_to_the_login_page_with_a_session_that_was_ended_is_told_why() {
    for (ending, expected) in
        [(Ending::Displaced, "because you logged in elsewhere"), (Ending::Revoked, "from another device")]
    {
        let mut browser = Browser::new();
        let id = crate::session::id::SessionId::generate("alice").unwrap();
        browser.cookies.insert("__Host-session".to_owned(), id.to_cookie_value());
        browser.store.set_ending(ending);
        let page = browser.get("/.cloakroom/login?return_to=%2Fa").await;
        assert!(page.html().contains(expected), "{}", page.html());
    }
}

#[tokio::test]
async fn a_page_that_asks_silently_who_is_there_is_no_use_of_the_session() {
    let mut browser = Browser::new();
    assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 303);
    for (fields, touches) in [(&[("x-silent", "1")][..], 0), (&[], 1)] {
        let answer = browser.send(Method::GET, "/.cloakroom/session", fields, "").await;
        assert_eq!(answer.status(), 200);
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(browser.store.touches(), touches, "{fields:?}");
    }
}

#[tokio::test]
async fn guesses_at_our_own_endpoints_are_stopped_and_the_form_is_there_for_everybody() {
    let mut browser = Browser::new();
    let guess = || crate::session::id::SessionId::generate("alice").unwrap().to_cookie_value();
    let mut refused = None;
    for _ in 0..1_000 {
        browser.cookies.insert("__Host-session".to_owned(), guess());
        refused = Some(browser.get("/.cloakroom/session").await).filter(|answer| answer.status() == 429);
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("a thousand are too many");
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(browser.get("/.cloakroom/logout").await.status(), 429, "nothing is said of a session nobody looked for");
    assert_eq!(browser.get("/.cloakroom/login").await.status(), 200);
    assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 303);
}

#[tokio::test]
async fn a_logout_takes_the_fallback_cookie_too() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    browser.cookies.insert("__Host-session-fallback".to_owned(), "sealed".to_owned());
    let csrf = browser.get("/.cloakroom/logout").await.csrf();
    assert_eq!(browser.post("/.cloakroom/logout", &[("csrf", &csrf)]).await.status(), 303);
    assert_eq!(browser.cookies.keys().collect::<Vec<_>>(), Vec::<&String>::new(), "nothing of the session stays");
}

#[tokio::test]
async fn a_form_without_our_token_logs_nobody_in_and_counts_for_nothing() {
    let mut browser = Browser::new();
    let token = browser.get("/.cloakroom/login").await.csrf();
    let stranger = Browser::new().get("/.cloakroom/login").await.csrf();
    for csrf in ["", "x", &stranger, &token[1..]] {
        let form = [("csrf", csrf), ("username", "alice"), ("password", PASSWORD)];
        let answer = browser.post("/.cloakroom/login", &form).await;
        assert_eq!(answer.status(), 403, "{csrf:?}");
        assert!(answer.html().contains("open for too long"), "a person may try again: {}", answer.html());
        assert!(!answer.csrf().is_empty(), "with a fresh form");
    }
    let answer = browser.post("/.cloakroom/login", &[("username", "alice"), ("password", PASSWORD)]).await;
    assert_eq!(answer.status(), 403, "no token at all");
    browser.cookies.clear();
    let form = [("csrf", token.as_str()), ("username", "alice"), ("password", PASSWORD)];
    assert_eq!(browser.post("/.cloakroom/login", &form).await.status(), 403, "no cookie");
    assert_eq!(browser.store.calls(), 0, "nothing was counted, nothing looked up");
    let stale = browser.login.metrics.logins.with_label_values(&["password", "stale_form"]).get();
    assert_eq!(stale, 6, "but the operator sees it");
}

#[tokio::test]
async fn a_form_of_another_site_is_refused_without_a_cookie() {
    for site in ["cross-site", "same-site", "none"] {
        let mut browser = Browser::new();
        let csrf = browser.get("/.cloakroom/login").await.csrf();
        browser.site = site;
        let form = [("csrf", csrf.as_str()), ("username", "alice"), ("password", PASSWORD)];
        for target in ["/.cloakroom/login", "/.cloakroom/logout"] {
            let answer = browser.post(target, &form).await;
            assert_eq!((answer.status(), answer.header("set-cookie")), (403, ""), "{site} {target}");
            assert_eq!(answer.header("vary"), "Sec-Fetch-Site, Origin");
        }
        assert_eq!(browser.store.calls(), 0, "{site}");
    }
}

#[tokio::test]
async fn two_open_login_pages_stay_good() {
    let mut browser = Browser::new();
    let first = browser.get("/.cloakroom/login").await.csrf();
    let second = browser.get("/.cloakroom/login").await.csrf();
    assert_ne!(first, second, "each response masks its token anew");
    let form = [("csrf", first.as_str()), ("username", "alice"), ("password", PASSWORD)];
    assert_eq!(browser.post("/.cloakroom/login", &form).await.status(), 303);
}

#[tokio::test]
async fn logging_in_again_gives_a_new_session_and_ends_the_old_one() {
    let mut browser = Browser::new();
    let csrf = browser.get("/.cloakroom/login").await.csrf();
    let key = browser.cookies.clone();
    browser.log_in("alice", PASSWORD).await;
    let old = browser.cookies["__Host-session"].clone();

    browser.cookies.extend(key);
    let form = [("csrf", csrf.as_str()), ("username", "bob"), ("password", PASSWORD)];
    assert_eq!(browser.post("/.cloakroom/login", &form).await.status(), 303);
    assert_ne!(browser.cookies["__Host-session"], old);
    let users: Vec<String> = browser.store.sessions().into_iter().map(|record| record.identity.user).collect();
    assert_eq!(users, ["bob"], "the session that the browser came with is ended");
}

#[tokio::test]
async fn bad_forms_are_refused_before_anything_is_counted() {
    let mut browser = Browser::new();
    let csrf = browser.get("/.cloakroom/login").await.csrf();
    let long_name = "a".repeat(257);
    let long_password = "a".repeat(PASSWORD_BYTES_MAX + 1);
    let cases: &[&[(&str, &str)]] = &[
        &[("csrf", &csrf), ("username", "alice"), ("password", PASSWORD), ("password", PASSWORD)],
        &[("csrf", &csrf), ("username", "alice"), ("username", "bob"), ("password", PASSWORD)],
        &[("csrf", &csrf), ("username", "alice")],
        &[("csrf", &csrf), ("password", PASSWORD)],
        &[("csrf", &csrf), ("username", ""), ("password", PASSWORD)],
        &[("csrf", &csrf), ("username", "a\nb"), ("password", PASSWORD)],
        &[("csrf", &csrf), ("username", &long_name), ("password", PASSWORD)],
        &[("csrf", &csrf), ("username", "alice"), ("password", &long_password)],
    ];
    for form in cases {
        assert_eq!(browser.post("/.cloakroom/login", form).await.status(), 400, "{form:?}");
    }
    let fields = [("content-type", "application/json"), ("sec-fetch-site", "same-origin")];
    assert_eq!(browser.send(Method::POST, "/.cloakroom/login", &fields, "{}").await.status(), 400);
    let fields = [("content-type", "application/x-www-form-urlencoded"), ("sec-fetch-site", "same-origin")];
    let body = "a".repeat(Login::FORM_BYTES_MAX + 1);
    assert_eq!(browser.send(Method::POST, "/.cloakroom/login", &fields, &body).await.status(), 413);
    assert_eq!(browser.store.calls(), 0);
}

#[tokio::test]
async fn credentials_in_a_query_log_nobody_in() {
    let mut browser = Browser::new();
    let csrf = browser.get("/.cloakroom/login").await.csrf();
    let target = format!("/.cloakroom/login?csrf={csrf}&username=alice&password=correct+horse");
    let answer = browser.get(&target).await;
    assert_eq!(answer.status(), 200);
    assert!(!browser.has_session() && !answer.html().contains("correct"));
}

#[tokio::test]
async fn a_login_leads_only_to_pages_of_ours() {
    let cases = [
        ("/inbox?new", "/inbox?new"),
        ("//evil.example", "/start"),
        ("https://evil.example/", "/start"),
        ("/.cloakroom/login", "/start"),
        ("/.cloakroom/logout", "/start"),
        ("/.cloakroom/sessions", "/.cloakroom/sessions"),
        ("/.cloakroom/sessions/", "/start"),
        ("", "/start"),
    ];
    for (asked, expected) in cases {
        let mut browser = Browser::with_config("default_return = \"/start\"");
        let query: String = form_urlencoded::byte_serialize(asked.as_bytes()).collect();
        let page = browser.get(&format!("/.cloakroom/login?return_to={query}")).await;
        assert!(
            page.html().contains(&format!("name=\"return_to\" value=\"{expected}\"")),
            "{asked:?}: {}",
            page.html()
        );
        let csrf = page.csrf();
        let form = [("csrf", csrf.as_str()), ("return_to", asked), ("username", "alice"), ("password", PASSWORD)];
        let answer = browser.post("/.cloakroom/login", &form).await;
        assert_eq!((answer.status(), answer.header("location")), (303, expected), "{asked:?}");
    }
}

#[tokio::test]
async fn no_target_from_outside_leads_off_this_site() {
    let hostile = hostile_targets::HOSTILE;
    assert!(60 <= hostile.len(), "{}", hostile.len());
    let config = "default_return = \"/start\"";
    let (mut stranger, mut browser) = (Browser::with_config(config), Browser::with_config(config));
    for (turn, asked) in hostile.iter().enumerate() {
        let escaped: String = form_urlencoded::byte_serialize(asked.as_bytes()).collect();
        let page = stranger.get(&format!("/.cloakroom/login?return_to={escaped}")).await;
        assert!(page.html().contains("name=\"return_to\" value=\"/start\""), "{asked:?}: the form");
        let page = stranger.post("/.cloakroom/login", &[("csrf", "old"), ("return_to", *asked)]).await;
        assert!(page.html().contains("name=\"return_to\" value=\"/start\""), "{asked:?}: the form, once more");
        // A login takes a while, and asks in the same way as the form.
        if turn % 4 == 0 {
            browser.cookies.clear();
            let csrf = browser.get("/.cloakroom/login").await.csrf();
            let form = [("csrf", csrf.as_str()), ("return_to", *asked), ("username", "alice"), ("password", PASSWORD)];
            let answer = browser.post("/.cloakroom/login", &form).await;
            assert_eq!((answer.status(), answer.header("location")), (303, "/start"), "{asked:?}: the login");
        }
        let page = browser.get(&format!("/.cloakroom/login?return_to={escaped}")).await;
        assert!(page.html().contains("class=\"button\" href=\"/start\""), "{asked:?}: who is logged in");
        let page = browser.get(&format!("/.cloakroom/logout?return_to={escaped}")).await;
        assert!(page.html().contains("<a href=\"/start\">Stay"), "{asked:?}: the logout page");
        let csrf = page.csrf();
        let target = format!("/.cloakroom/logout?return_to={escaped}&rd={escaped}");
        let page = browser.post(&target, &[("csrf", "old"), ("return_to", asked), ("rd", asked)]).await;
        assert!(page.html().contains("<a href=\"/start\">Stay"), "{asked:?}: the logout page, once more");
        if turn % 4 == 3 {
            let answer = browser.post(&target, &[("csrf", &csrf), ("return_to", asked), ("rd", asked)]).await;
            assert_eq!((answer.status(), answer.header("location")), (303, "/.cloakroom/logout"), "{asked:?}");
        }

        let answer = stranger.login.login_redirect(asked, None);
        assert_eq!(answer.headers()["location"], "/.cloakroom/login", "{asked:?}: the way to the login");
        let referer = format!("{ORIGIN}{asked}");
        if let Ok(referer) = referer.parse() {
            let mut headers = HeaderMap::new();
            headers.insert("referer", referer);
            let answer = stranger.login.form_redirect(&headers, ORIGIN);
            assert_eq!(answer.headers()["location"], "/.cloakroom/login?reason=unsent", "{asked:?}: a form's way");
        }
    }
}

#[tokio::test]
async fn who_is_logged_in_sees_that_instead_of_a_form() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    let answer = browser.get("/.cloakroom/login?return_to=/inbox").await;
    assert_eq!(answer.status(), 200, "not sent on: a route that does not accept the session would lead back here");
    assert!(answer.html().contains("<strong>Alice</strong>") && answer.html().contains("href=\"/inbox\""));
    assert!(!answer.html().contains("type=\"password\""));
}

#[tokio::test]
async fn a_logout_ends_the_session_in_the_store() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    let session = browser.cookies.clone();
    let asks = browser.get("/.cloakroom/logout").await;
    assert_eq!(asks.status(), 200);
    assert_eq!(browser.store.sessions().len(), 1, "GET only asks");

    let csrf = asks.csrf();
    let login_token = FormKey::generate().unwrap().token(Purpose::Login).unwrap();
    for forged in ["", "x", &login_token] {
        assert_eq!(browser.post("/.cloakroom/logout", &[("csrf", forged)]).await.status(), 403);
    }
    assert_eq!(browser.store.sessions().len(), 1, "a forged form ends nothing");

    let answer = browser.post("/.cloakroom/logout", &[("csrf", &csrf)]).await;
    assert_eq!((answer.status(), answer.header("location")), (303, "/.cloakroom/logout"));
    assert!(!browser.has_session());
    assert_eq!(browser.store.sessions().len(), 0);
    let page = browser.get("/.cloakroom/logout").await;
    assert!(page.html().contains("You are logged out"), "{}", page.html());

    browser.cookies = session;
    assert_eq!(browser.get("/.cloakroom/session").await.status(), 401, "the old cookie is worth nothing");
}

#[tokio::test]
async fn a_dead_store_lets_nobody_in_and_logs_nobody_out() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    let csrf = browser.get("/.cloakroom/logout").await.csrf();
    let cookies = browser.cookies.clone();
    browser.store.set_down(true);

    let answers = [
        browser.post("/.cloakroom/logout", &[("csrf", &csrf)]).await,
        browser.get("/.cloakroom/logout").await,
        browser.get("/.cloakroom/login").await,
        browser.get("/.cloakroom/session").await,
    ];
    for answer in answers {
        assert_eq!((answer.status(), answer.header("retry-after"), answer.header("set-cookie")), (503, "5", ""));
    }
    assert_eq!(browser.cookies, cookies, "the cookie stays, the session may live");

    browser.cookies.clear();
    let answer = browser.log_in("alice", PASSWORD).await;
    assert_eq!((answer.status(), browser.has_session()), (503, false));
}

#[tokio::test]
async fn the_session_endpoint_says_who_and_never_what_the_cookie_holds() {
    let mut browser = Browser::new();
    let nobody = browser.get("/.cloakroom/session").await;
    assert_eq!((nobody.status(), nobody.header("content-type")), (401, "application/json"));
    assert_eq!(nobody.header("www-authenticate"), "Session", "as on a route");
    let json: serde_json::Value = serde_json::from_str(nobody.html()).unwrap();
    assert_eq!((&json["error"], &json["request_id"]), (&"unauthenticated".into(), &"4711".into()), "{json}");
    assert!(json["message"].is_string(), "{json}");
    assert_eq!(nobody.header("cache-control"), "no-store");

    browser.log_in("alice", PASSWORD).await;
    let answer = browser.get("/.cloakroom/session").await;
    assert_eq!((answer.status(), answer.header("cache-control")), (200, "no-store"));
    let json: serde_json::Value = serde_json::from_str(answer.html()).unwrap();
    assert_eq!((&json["user"], &json["name"], &json["groups"][0]), (&"alice".into(), &"Alice".into(), &"staff".into()));
    assert!(json["email"].is_null());
    assert!((3_500..=3_600).contains(&json["expires_in"].as_u64().unwrap()), "{json}");
    assert!(!answer.html().contains(&browser.cookies["__Host-session"]));
}

#[tokio::test]
async fn who_is_disabled_meanwhile_is_nobody_here() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    browser.login.users = users("[alice]\npassword = \"HASH\"\ndisabled = true\n");
    assert_eq!(browser.get("/.cloakroom/session").await.status(), 401);
    assert!(browser.get("/.cloakroom/login").await.html().contains("type=\"password\""));
    browser.login.users = users("[alice]\npassword = \"HASH\"\ngroups = [\"new\"]\n");
    assert!(browser.get("/.cloakroom/session").await.html().contains("\"new\""), "groups are those of the file now");
}

#[tokio::test]
async fn paths_and_methods_that_we_do_not_have_are_refused() {
    let mut browser = Browser::new();
    let cases = [
        (Method::GET, "/.cloakroom/", 404, ""),
        (Method::GET, "/.cloakroom/Login", 404, ""),
        (Method::GET, "/.cloakroom/login/", 404, ""),
        (Method::POST, "/.cloakroom/nothing", 404, ""),
        (Method::DELETE, "/.cloakroom/login", 405, "GET, HEAD, POST"),
        (Method::OPTIONS, "/.cloakroom/logout", 405, "GET, HEAD, POST"),
        (Method::POST, "/.cloakroom/session", 405, "GET, HEAD"),
        (Method::PUT, "/.cloakroom/style.css", 405, "GET, HEAD"),
        (Method::HEAD, "/.cloakroom/login", 200, ""),
        (Method::HEAD, "/.cloakroom/style.css", 200, ""),
    ];
    for (method, target, status, allow) in cases {
        let answer = browser.send(method.clone(), target, &[], "").await;
        assert_eq!((answer.status(), answer.header("allow")), (status, allow), "{method} {target}");
        assert_eq!(answer.header("content-length"), answer.0.body().len().to_string(), "{method} {target}");
    }
}

#[tokio::test]
async fn who_is_logged_in_is_not_asked_to_log_in_by_a_page_that_is_not_there() {
    let mut browser = Browser::with_config("default_return = \"/start\"");
    let stranger = browser.get("/.cloakroom/nothing").await;
    assert!(stranger.html().contains("Log in"), "{}", stranger.html());
    browser.log_in("alice", PASSWORD).await;
    let calls = browser.store.calls();
    let known = browser.get("/.cloakroom/nothing").await;
    assert!(!known.html().contains("Log in") && known.html().contains("href=\"/start\""), "{}", known.html());
    assert_eq!(browser.store.calls(), calls, "a page that is not there is not worth a question to the store");
}

#[tokio::test]
async fn a_login_for_which_there_is_no_place_counts_for_nothing() {
    let mut browser = Browser::with_config("[password.throttle]\nper_account_and_network = 1\nper_network = 1\n");
    for _ in 0..20 {
        let places = browser.login.password.as_ref().unwrap().fill();
        assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 503);
        browser.login.password.as_ref().unwrap().free(places);
    }
    assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 303, "nobody looked at a password before");
}

#[tokio::test]
async fn a_login_that_the_store_cuts_short_counts_for_nothing() {
    let mut browser = Browser::with_config("[password.throttle]\nper_account_and_network = 1\nper_network = 1\n");
    // Four calls for an attempt, four for its success, one for the session.
    for turn in 0..9 {
        browser.store.fail_once_after(turn);
        assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 503, "call {turn}");
        browser.store.forget_known_networks();
    }
    assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 303);
}

#[tokio::test]
async fn at_most_as_many_parallel_guesses_as_allowed_are_looked_at() {
    let mut browser = Browser::with_config("[password.throttle]\nper_account_and_network = 7\n");
    let login = &browser.login;
    let password = login.password.as_ref().unwrap();
    let name = UserName::parse("alice").unwrap();
    let guesses = (0..60).map(|_| password.check(&login.users, &name, "guess".to_owned(), browser.client));
    let mut checked = 0;
    let mut tasks: Vec<_> = guesses.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        tasks.retain_mut(|task| match task.as_mut().poll(context) {
            std::task::Poll::Ready(answer) => {
                checked += usize::from(matches!(answer, Ok(Answer::Wrong)));
                false
            }
            std::task::Poll::Pending => true,
        });
        if tasks.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    drop(tasks);
    assert_eq!(checked, 7);
    assert_eq!(browser.log_in("alice", PASSWORD).await.status(), 403, "the allowed guesses are used up");
}

#[tokio::test]
async fn a_session_that_cannot_be_read_is_nobodys_and_keeps_its_cookie() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    let csrf = browser.get("/.cloakroom/logout").await.csrf();
    let cookies = browser.cookies.clone();
    browser.store.set_unreadable(true);
    for (target, status) in
        [("/.cloakroom/session", 401), ("/.cloakroom/login", 200), ("/.cloakroom/logout", 200), ("/.cloakroom/x", 404)]
    {
        assert_eq!(browser.get(target).await.status(), status, "{target}");
        assert_eq!(browser.cookies.get("__Host-session"), cookies.get("__Host-session"), "{target}");
    }
    browser.store.set_unreadable(false);
    assert_eq!(browser.get("/.cloakroom/session").await.status(), 200, "a session that can be read again is as it was");

    browser.store.set_unreadable(true);
    assert_eq!(browser.post("/.cloakroom/logout", &[("csrf", &csrf)]).await.status(), 303);
    assert_eq!(browser.store.sessions().len(), 0, "a logout ends it unread");
    assert!(!browser.has_session());
}

#[tokio::test]
async fn a_navigation_is_sent_to_the_login_and_told_where_from() {
    let login = Browser::new().login;
    let cases = [
        ("/", None, "/.cloakroom/login?return_to=%2F"),
        ("/a b", None, "/.cloakroom/login"),
        ("/a b", Some(Notice::Revoked), "/.cloakroom/login?reason=revoked"),
        ("/a", Some(Notice::Displaced), "/.cloakroom/login?return_to=%2Fa&reason=displaced"),
        ("/a?b=c&d=%2F", None, "/.cloakroom/login?return_to=%2Fa%3Fb%3Dc%26d%3D%252F"),
        ("//evil.example", None, "/.cloakroom/login"),
        ("/.cloakroom/logout", None, "/.cloakroom/login"),
    ];
    for (target, notice, location) in cases {
        let response = login.login_redirect(target, notice);
        assert_eq!(
            (response.status(), &response.headers()["location"]),
            (StatusCode::FOUND, &location.parse().unwrap())
        );
        assert_eq!(response.headers()["cache-control"], "no-store", "{target}");
    }
    assert!(login.owns("/.cloakroom/login") && !login.owns("/.cloakroomy") && !login.owns("/.cloakroom"));
}

#[tokio::test]
async fn a_form_that_came_too_late_leads_back_to_the_page_that_held_it() {
    let login = Browser::new().login;
    let back = |referer: &[&str]| {
        let mut headers = HeaderMap::new();
        for value in referer {
            headers.append("referer", value.parse().unwrap());
        }
        let response = login.form_redirect(&headers, ORIGIN);
        assert_eq!(response.status(), StatusCode::SEE_OTHER, "RFC 9110, section 15.4.4: go on with GET");
        response.headers()["location"].to_str().unwrap().to_owned()
    };
    let plain = "/.cloakroom/login?reason=unsent";
    assert_eq!(back(&["https://app.example/a?b=c"]), "/.cloakroom/login?return_to=%2Fa%3Fb%3Dc&reason=unsent");
    assert_eq!(back(&["https://app.example/"]), "/.cloakroom/login?return_to=%2F&reason=unsent");
    for referer in [
        &[][..],
        &["https://app.example"],
        &["https://app.example.evil/a"],
        &["https://app.example:8443/a"],
        &["http://app.example/a"],
        &["https://evil.example/a"],
        &["https://app.example//evil.example"],
        &["https://app.example/\\evil.example"],
        &["https://app.example/.cloakroom/logout"],
        &["https://app.example/a", "https://app.example/b"],
        &["/a"],
    ] {
        assert_eq!(back(referer), plain, "{referer:?}");
    }
}

#[tokio::test]
async fn what_was_lost_on_the_way_is_said_whether_one_must_log_in_or_not() {
    let mut browser = Browser::new();
    let target = "/.cloakroom/login?return_to=%2Fform&reason=unsent";
    let page = browser.get(target).await;
    assert!(page.html().contains("was not taken") && page.html().contains("value=\"/form\""), "{}", page.html());
    browser.log_in("alice", PASSWORD).await;
    let page = browser.get(target).await;
    assert!(page.html().contains("was not taken") && page.html().contains("href=\"/form\""), "{}", page.html());
}

#[tokio::test]
async fn who_logged_in_with_a_password_too_long_ago_is_asked_in_every_way_that_there_is() {
    let mut browser = Browser::new();
    browser.log_in("alice", PASSWORD).await;
    let record = browser.store.with(|kept| kept.sessions.values().next().cloned()).unwrap().unwrap();
    let demand = Demand { max_age: Some(Duration::from_secs(600)), ..Demand::default() };
    let answer = browser.login.step_up("/a?b=1", &demand, &record);
    assert_eq!(answer.status(), StatusCode::FOUND);
    assert_eq!(answer.headers()["location"], "/.cloakroom/login?return_to=%2Fa%3Fb%3D1&reason=confirm");
}

#[tokio::test]
async fn the_audit_says_who_did_what_and_nothing_that_lets_anybody_in() {
    let limit = Some(Limit { sessions: 2, when_full: WhenFull::EvictOldest });
    let throttle = "[password.throttle]\nper_account_and_network = 2\n";
    let listener = crate::audit::tests::Listener::begin();
    let mut browser = Browser::with(throttle, Options { limit, ..Options::default() });
    browser.log_in("alice", "wrong").await;
    browser.log_in("hunter2 typed here", "alice").await;
    browser.log_in("alice", PASSWORD).await;
    let mut secrets: Vec<String> = browser.cookies.values().cloned().collect();
    let first = browser.store.handles();
    browser.cookies.clear();
    browser.log_in("alice", PASSWORD).await;
    secrets.extend(browser.cookies.values().cloned());
    let csrf = listed(&mut browser).await["csrf"].as_str().unwrap().to_owned();
    browser.post("/.cloakroom/sessions", &[("csrf", &csrf), ("end", &first[0])]).await;
    let left = browser.store.handles();
    let csrf = browser.get("/.cloakroom/logout").await.csrf();
    browser.post("/.cloakroom/logout", &[("csrf", &csrf)]).await;
    for _ in 0..3 {
        browser.log_in("bob", "wrong").await;
    }

    let login = |user: Option<&str>, result: &str, session: Option<&String>| {
        let mut event =
            serde_json::json!({ "message": "login", "client": "192.0.2.1", "method": "password", "result": result });
        if let Some(user) = user {
            event["user"] = user.into();
        }
        if let Some(session) = session {
            event["session"] = session.as_str().into();
        }
        event
    };
    let expected = [
        login(Some("alice"), "wrong_password", None),
        login(None, "unknown_user", None),
        login(Some("alice"), "success", Some(&first[0])),
        login(Some("alice"), "success", Some(&left[0])),
        serde_json::json!({ "message": "sessions revoked", "by": "user", "client": "192.0.2.1", "user": "alice",
                            "what": first[0], "ended": 1 }),
        serde_json::json!({ "message": "logout", "client": "192.0.2.1", "user": "alice", "session": left[0],
                            "reason": "user" }),
        login(Some("bob"), "wrong_password", None),
        login(Some("bob"), "wrong_password", None),
        login(Some("bob"), "throttled", None),
    ];
    let events = listener.events();
    assert_eq!(events, expected);
    let told = serde_json::Value::from(events).to_string();
    assert!(secrets.iter().all(|secret| !told.contains(secret.as_str())), "{told}");
    assert!(!told.contains("hunter2") && !told.contains(PASSWORD), "{told}");
}

/// Of one user: a browser, and so many other sessions.
async fn browser_and_others(others: usize) -> Browser {
    let mut browser = Browser::new();
    for _ in 0..others {
        browser.log_in("alice", PASSWORD).await;
        browser.cookies.clear();
    }
    browser.log_in("bob", PASSWORD).await;
    browser.cookies.clear();
    browser.log_in("alice", PASSWORD).await;
    browser
}

/// As the page's JSON has it.
async fn listed(browser: &mut Browser) -> serde_json::Value {
    let answer = browser.send(Method::GET, "/.cloakroom/sessions", &[], "").await;
    assert_eq!((answer.status(), answer.header("cache-control")), (200, "no-store"));
    serde_json::from_str(answer.html()).unwrap()
}

#[tokio::test]
async fn a_user_sees_their_own_sessions_and_no_others() {
    let mut browser = browser_and_others(2).await;
    let page = browser.get("/.cloakroom/sessions").await;
    assert_eq!(page.status(), 200);
    let html = page.html();
    assert_eq!(html.matches("<li>").count(), 3, "bob's is not among them: {html}");
    assert_eq!(html.matches("This browser").count(), 1);
    assert_eq!(html.matches("name=\"end\" value=\"others\"").count(), 1);

    let json = listed(&mut browser).await;
    let sessions = json["sessions"].as_array().unwrap();
    assert_eq!((sessions.len(), json["unshown"].as_u64()), (3, Some(0)));
    assert_eq!((&sessions[0]["current"], &sessions[1]["current"]), (&true.into(), &false.into()));
    assert_eq!(sessions[0]["address"], "192.0.2.1");
    let id = &browser.cookies["__Host-session"];
    assert!(!html.contains(id.as_str()) && !json.to_string().contains(id.as_str()), "an id is never shown");
}

#[tokio::test]
async fn one_session_ends_then_all_others_and_this_one_stays() {
    let mut browser = browser_and_others(4).await;
    let json = listed(&mut browser).await;
    let (csrf, one) = (json["csrf"].as_str().unwrap(), json["sessions"][1]["session"].as_str().unwrap());
    let answer = browser.post("/.cloakroom/sessions", &[("csrf", csrf), ("end", one)]).await;
    assert_eq!((answer.status(), answer.header("location")), (303, "/.cloakroom/sessions?done"));
    assert_eq!(listed(&mut browser).await["sessions"].as_array().unwrap().len(), 4);

    let fields = [("content-type", "application/x-www-form-urlencoded"), ("sec-fetch-site", "same-origin")];
    let body = format!("csrf={csrf}&end=others");
    let answer = browser.send(Method::POST, "/.cloakroom/sessions", &fields, &body).await;
    assert_eq!((answer.status(), answer.html()), (200, "{\"ended\":3}"), "a program learns how many");
    let users: Vec<_> = browser.store.sessions().into_iter().map(|record| record.identity.user).collect();
    assert_eq!(users.len(), 2, "bob's and this one: {users:?}");
    assert_eq!(browser.get("/.cloakroom/session").await.status(), 200);
}

#[tokio::test]
async fn nothing_ends_without_a_token_of_this_page_from_this_site() {
    let mut browser = browser_and_others(1).await;
    let json = listed(&mut browser).await;
    let (csrf, other) = (json["csrf"].as_str().unwrap(), json["sessions"][1]["session"].as_str().unwrap());
    let logout = browser.get("/.cloakroom/logout").await.csrf();
    let foreign = listed(&mut browser_and_others(0).await).await["csrf"].as_str().unwrap().to_owned();
    for token in ["", "x", &logout, &foreign, &csrf[1..]] {
        for end in [other, "others"] {
            let answer = browser.post("/.cloakroom/sessions", &[("csrf", token), ("end", end)]).await;
            assert_eq!(answer.status(), 403, "{token} {end}");
            assert!(answer.html().contains("open for too long"), "a person may try again: {}", answer.html());
        }
    }
    let old = browser.cookies.clone();
    for site in ["cross-site", "same-site", "none"] {
        browser.site = site;
        let answer = browser.post("/.cloakroom/sessions", &[("csrf", csrf), ("end", "others")]).await;
        assert_eq!((answer.status(), answer.header("set-cookie")), (403, ""), "{site}");
    }
    browser.site = "same-origin";
    let own = json["sessions"][0]["session"].as_str().unwrap();
    for end in ["", "x", "OTHERS", own] {
        let answer = browser.post("/.cloakroom/sessions", &[("csrf", csrf), ("end", end)]).await;
        assert_eq!(answer.status(), 400, "{end:?}");
    }
    browser.get(&format!("/.cloakroom/sessions?csrf={csrf}&end=others")).await;
    assert_eq!(browser.store.sessions().len(), 3, "nothing has ended by all this");

    browser.cookies.clear();
    browser.log_in("bob", PASSWORD).await;
    let csrf = listed(&mut browser).await["csrf"].as_str().unwrap().to_owned();
    browser.post("/.cloakroom/sessions", &[("csrf", &csrf), ("end", other)]).await;
    browser.cookies = old;
    assert_eq!(listed(&mut browser).await["sessions"].as_array().unwrap().len(), 2, "bob ends none of alice's");
}

#[tokio::test]
async fn what_was_captured_before_a_login_is_worth_nothing_after_it() {
    let mut browser = browser_and_others(1).await;
    let ended = browser.cookies.clone();
    let json = listed(&mut browser).await;
    let (ending, other) = (json["csrf"].as_str().unwrap(), json["sessions"][1]["session"].as_str().unwrap());
    let leaving = browser.get("/.cloakroom/logout").await.csrf();
    let page = browser.get("/.cloakroom/login?reason=confirm").await;
    let form = [("csrf", page.csrf()), ("username", "alice".to_owned()), ("password", PASSWORD.to_owned())];
    let form: Vec<_> = form.iter().map(|(name, value)| (*name, value.as_str())).collect();
    assert_eq!(browser.post("/.cloakroom/login", &form).await.status(), 303);

    let sessions = browser.store.sessions().len();
    for (target, fields) in [
        ("/.cloakroom/sessions", &[("csrf", ending), ("end", "others")][..]),
        ("/.cloakroom/sessions", &[("csrf", ending), ("end", other)]),
        ("/.cloakroom/logout", &[("csrf", &leaving)]),
        // The key of the login forms went with the login.
        ("/.cloakroom/login", &form),
    ] {
        assert_eq!(browser.post(target, fields).await.status(), 403, "{target}: a token of the session before");
    }
    assert_eq!(browser.store.sessions().len(), sessions, "nothing began and nothing ended");

    browser.cookies = ended;
    assert_eq!(browser.get("/.cloakroom/session").await.status(), 401, "the cookie of before is worth nothing");
    let answer = browser.post("/.cloakroom/sessions", &[("csrf", ending), ("end", "others")]).await;
    assert_eq!(answer.status(), 303, "it is asked to log in");
    assert!(answer.header("location").starts_with("/.cloakroom/login"));
    assert_eq!(browser.store.sessions().len(), sessions);
}

#[tokio::test]
async fn an_old_login_ends_no_other_session_until_one_logs_in_again() {
    let mut browser = browser_and_others(1).await;
    browser.store.age(Duration::from_secs(601));
    let json = listed(&mut browser).await;
    assert_eq!(json["may_end_others"], false);
    let (csrf, other) = (json["csrf"].as_str().unwrap(), json["sessions"][1]["session"].as_str().unwrap());
    let to_login = "/.cloakroom/login?return_to=%2F%2Ecloakroom%2Fsessions&reason=confirm";
    for end in [other, "others"] {
        let answer = browser.post("/.cloakroom/sessions", &[("csrf", csrf), ("end", end)]).await;
        assert_eq!((answer.status(), answer.header("location")), (303, to_login), "{end}");
        let fields = [("content-type", "application/x-www-form-urlencoded"), ("sec-fetch-site", "same-origin")];
        let body = format!("csrf={csrf}&end={end}");
        let answer = browser.send(Method::POST, "/.cloakroom/sessions", &fields, &body).await;
        assert!(answer.status() == 403 && answer.html().contains("login_too_old"), "{}", answer.html());
    }
    assert_eq!(browser.store.sessions().len(), 3, "nothing has ended");

    let page = browser.get(to_login).await;
    assert!(page.html().contains("value=\"alice\"") && page.html().contains("once more"), "{}", page.html());
    let old = browser.cookies["__Host-session"].clone();
    let csrf = page.csrf();
    let form =
        [("csrf", csrf.as_str()), ("return_to", "/.cloakroom/sessions"), ("username", "alice"), ("password", PASSWORD)];
    let answer = browser.post("/.cloakroom/login", &form).await;
    assert_eq!((answer.status(), answer.header("location")), (303, "/.cloakroom/sessions"));
    assert_ne!(browser.cookies["__Host-session"], old, "a new login is a new id");
    let csrf = listed(&mut browser).await["csrf"].as_str().unwrap().to_owned();
    let answer = browser.post("/.cloakroom/sessions", &[("csrf", &csrf), ("end", "others")]).await;
    assert_eq!((answer.status(), answer.header("location")), (303, "/.cloakroom/sessions?done"));
    assert_eq!(browser.store.sessions().len(), 2, "alice's one and bob's");
}

#[tokio::test]
async fn who_is_nobody_is_asked_to_log_in_and_comes_back_to_the_list() {
    let mut browser = Browser::new();
    let to_login = "/.cloakroom/login?return_to=%2F%2Ecloakroom%2Fsessions";
    let page = browser.get("/.cloakroom/sessions").await;
    assert_eq!((page.status(), page.header("location")), (303, to_login));
    assert!(browser.get(to_login).await.html().contains("value=\"/.cloakroom/sessions\""));
    let program = browser.send(Method::GET, "/.cloakroom/sessions", &[], "").await;
    assert_eq!((program.status(), program.header("www-authenticate")), (401, "Session"));
    let posted = browser.post("/.cloakroom/sessions", &[("end", "others")]).await;
    assert_eq!((posted.status(), posted.header("location")), (303, to_login));

    browser.log_in("alice", PASSWORD).await;
    browser.store.set_down(true);
    for fields in [&[("sec-fetch-mode", "navigate")][..], &[]] {
        let answer = browser.send(Method::GET, "/.cloakroom/sessions", fields, "").await;
        assert_eq!((answer.status(), answer.header("retry-after")), (503, "5"));
        let is_json = answer.header("content-type") == "application/json";
        assert_eq!(is_json, fields.is_empty());
    }
}

#[tokio::test]
async fn a_list_has_a_limit() {
    let mut browser = browser_and_others(0).await;
    browser.store.multiply(250);
    let json = listed(&mut browser).await;
    assert_eq!((json["sessions"].as_array().unwrap().len(), json["unshown"].as_u64()), (100, Some(151)));
    assert_eq!(json["sessions"][0]["current"], true, "this one is always among them");
    assert!(browser.get("/.cloakroom/sessions").await.html().contains("151 more"));
}

#[test]
fn a_broken_prefix_or_default_is_told_and_never_used() {
    let sessions = Browser::new().login.sessions;
    for config in ["prefix = \"login\"", "prefix = \"/a\"", "prefix = \"//a/\"", "default_return = \"//evil.example\""]
    {
        let config: model::Login = toml::from_str(config).unwrap();
        let login = Login::new(&config, Arc::default(), sessions.clone(), Metrics::new());
        assert!(login.is_err(), "{config:?}");
    }
}
