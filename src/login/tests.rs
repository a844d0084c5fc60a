//! Whole answers of the endpoints, and the store that these tests can switch off.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::*;
use crate::config::model::WhenFull;
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

    async fn list(&self, _: &str) -> Result<Vec<Listed>, StoreError> {
        self.with(|_| Vec::new())
    }

    async fn destroy_all(&self, _: &str, _: Option<&SessionKey>, _: Ending) -> Result<u64, StoreError> {
        self.with(|_| 0)
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
        self.send(Method::GET, target, &[], "").await
    }

    async fn post(&mut self, target: &str, form: &[(&str, &str)]) -> Answered {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let site = self.site;
        let fields = [("content-type", "application/x-www-form-urlencoded"), ("sec-fetch-site", site)];
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
