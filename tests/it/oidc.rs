//! Does a login at a provider keep its promises, from the first redirect to the last logout?

use std::time::Duration;

use crate::basic::basic;
use crate::harness::backend::Backend;
use crate::harness::client::{Client, Response};
use crate::harness::fault::{Fault, FaultProxy};
use crate::harness::gateway::{Gateway, PASSWORD, Setup, Store};
use crate::harness::provider::{FakeProvider, Script, Signing, remove, set};
use crate::harness::redis::RedisServer;
use crate::harness::wait_until;

pub(crate) const ORIGIN: &str = "http://app.test";
pub(crate) const LOGIN: &str = "/.cloakroom/oidc/fake/login";

/// Known to browsers as [`ORIGIN`]; `keys` are lines of the provider's table.
pub(crate) fn gateway(backend: &Backend, provider: &FakeProvider, keys: &str) -> Setup {
    let login = format!("[login]\norigins = [\"{ORIGIN}\"]\n");
    Gateway::in_front_of(&[backend]).without_passwords().with(&format!("{login}{}", provider.table("fake", keys)))
}

/// A browser that comes to the gateway by its name.
pub(crate) fn browser(gateway: &Gateway) -> Client {
    gateway.client().with_host("app.test").allowing("refresh")
}

pub(crate) fn location(response: &Response) -> String {
    response.header("location").unwrap_or_else(|| panic!("a redirect: {response:?}")).to_owned()
}

/// The path of a URL of ours.
#[track_caller]
pub(crate) fn own_path(url: &str) -> &str {
    url.strip_prefix(ORIGIN).unwrap_or_else(|| panic!("an address of ours: {url}"))
}

/// From a page of ours to the provider and back: the answer of the callback.
#[track_caller]
pub(crate) fn log_in(client: &Client, provider: &FakeProvider, page: &str) -> Response {
    let sent = client.navigate(page).send();
    assert!([302, 303].contains(&sent.status), "sent to the provider: {} {}", sent.status, sent.text());
    let target = location(&sent);
    if target.starts_with('/') {
        return log_in(client, provider, &target);
    }
    let callback = provider.authorize(&target);
    client.navigate(own_path(&callback)).send()
}

/// Somebody who is logged in.
#[track_caller]
pub(crate) fn logged_in(gateway: &Gateway, provider: &FakeProvider) -> Client {
    let client = browser(gateway);
    let response = log_in(&client, provider, LOGIN);
    assert_eq!(response.status, 303, "logged in: {}", response.text());
    client
}

pub(crate) fn is_logged_in(client: &Client) -> bool {
    client.get("/.cloakroom/session").send().status == 200
}

#[test]
fn a_page_leads_to_the_provider_and_back_to_itself_with_the_identity_at_the_backend() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);

    let response = log_in(&client, &provider, "/report?year=2026");
    assert_eq!((response.status, location(&response).as_str()), (303, "/report?year=2026"), "{}", response.text());
    assert_eq!(response.header("cache-control"), Some("no-store"));

    let seen = client.get("/report?year=2026").send().seen();
    assert_eq!(seen.headers("x-forwarded-user"), ["ann"]);
    assert_eq!(seen.headers("x-forwarded-email"), ["ann@example.org"]);
    assert_eq!(seen.headers("x-forwarded-groups"), ["staff"]);
    assert_eq!(seen.headers("cookie"), Vec::<&str>::new(), "no cookie of ours reaches a backend");
    let names: Vec<_> = client.cookies().into_iter().map(|(name, _)| name).collect();
    assert!(!names.iter().any(|name| name.contains("attempt")), "the attempt is over: {names:?}");
}

#[test]
fn the_provider_is_asked_for_nothing_before_somebody_logs_in_and_may_be_away() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    provider.go_away();
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);

    let refused = client.navigate(LOGIN).send();
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.header("retry-after").is_some() && refused.text().contains("login service"), "{}", refused.text());
    assert!(refused.text().contains("href=\"/.cloakroom/login\""), "the next try is a new one: {}", refused.text());

    provider.come_back();
    wait_until("the provider is found again", || client.navigate(LOGIN).send().status == 303);
    let ann = logged_in(&gateway, &provider);
    provider.go_away();
    assert_eq!(ann.get("/").send().seen().headers("x-forwarded-user"), ["ann"], "who is logged in stays so");
}

#[test]
fn several_tabs_log_in_at_once_and_a_late_one_just_goes_on() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);
    let begin = |page: &str| {
        let to_login = location(&client.navigate(page).send());
        let to_method = location(&client.navigate(&to_login).send());
        location(&client.navigate(&to_method).send())
    };
    let tabs = ["/one", "/two", "/three"].map(|page| (page, begin(page)));
    let callbacks = tabs.map(|(page, target)| (page, provider.authorize(&target)));
    for (page, callback) in &callbacks {
        let response = client.navigate(own_path(callback)).send();
        assert_eq!((response.status, location(&response).as_str()), (303, *page), "{}", response.text());
    }
    let again = client.navigate(own_path(&callbacks[0].1)).send();
    assert_eq!((again.status, location(&again).as_str()), (303, "/"), "back in the history, with a good session");

    let stranger = browser(&gateway);
    let foreign = stranger.navigate(own_path(&callbacks[1].1)).send();
    assert_eq!(foreign.status, 400, "an answer is good in the browser that asked, and nowhere else");
    assert!(stranger.cookie("session").is_none());
}

#[test]
fn no_more_than_five_attempts_lie_in_a_browser() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);
    for _ in 0..8 {
        assert_eq!(client.navigate(LOGIN).send().status, 303);
    }
    let attempts = client.cookies().iter().filter(|(name, _)| name.contains("attempt")).count();
    assert_eq!(attempts, 5);
}

#[test]
fn a_circle_ends_with_a_page() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);
    let statuses: Vec<_> = (0..12).map(|_| client.navigate(LOGIN).send().status).collect();
    assert_eq!(statuses[..10], [303; 10]);
    assert_eq!(statuses[10..], [429; 2], "a browser that comes again and again is told so");
}

#[test]
fn a_login_gives_a_new_id_and_ends_the_old_session() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = logged_in(&gateway, &provider);
    let before = client.cookie("session").unwrap();
    assert_eq!(log_in(&client, &provider, LOGIN).status, 303);
    let after = client.cookie("session").unwrap();
    assert_ne!(before, after);
    let thief = browser(&gateway);
    thief.set_cookie("session", &before);
    assert!(!is_logged_in(&thief), "the old id is worth nothing");
}

#[test]
fn the_provider_must_be_asked_from_an_address_that_is_ours() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = gateway.client().with_host("evil.test");
    assert_eq!(client.navigate(LOGIN).send().status, 400);
    assert_eq!(provider.count("/"), 0, "nobody is asked for it");
}

#[test]
fn only_allowed_users_come_in() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "allowed_groups = [\"ops\"]").start();
    let client = browser(&gateway);
    let refused = log_in(&client, &provider, LOGIN);
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert!(!is_logged_in(&client));
    provider.with_user(|user| user["groups"] = serde_json::json!(["staff", "ops"]));
    assert_eq!(log_in(&client, &provider, LOGIN).status, 303);
}

#[test]
fn what_the_id_token_lacks_comes_from_userinfo() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    provider.play(Script { claims: remove("preferred_username"), ..Script::default() });
    let client = logged_in(&gateway, &provider);
    assert_eq!(client.get("/").send().seen().headers("x-forwarded-user"), ["ann"]);
    assert_eq!(provider.count("/userinfo"), 1);
}

#[test]
fn two_providers_are_never_mixed_up() {
    let (backend, one, other) = (Backend::echo(), FakeProvider::start(), FakeProvider::start());
    other.with_user(|user| user["preferred_username"] = "bob".into());
    let setup = gateway(&backend, &one, "title = \"The one\"");
    let gateway = setup.with(&other.table("other", "user_prefix = \"other:\"")).start();
    let client = browser(&gateway);

    let page = client.navigate("/.cloakroom/login?return_to=/x").send().text();
    assert!(page.contains("The one") && page.contains("/oidc/other/login?return_to=%2Fx"), "both are offered: {page}");

    // The answer of the one, sent to the callback of the other.
    let target = location(&client.navigate(LOGIN).send());
    let callback = one.authorize(&target).replace("/oidc/fake/", "/oidc/other/");
    assert_eq!(client.navigate(own_path(&callback)).send().status, 400);
    assert_eq!((one.count("/token"), other.count("/token")), (0, 0), "no code goes to somebody else");

    assert_eq!(log_in(&client, &other, "/.cloakroom/oidc/other/login").status, 303);
    assert_eq!(client.get("/").send().seen().headers("x-forwarded-user"), ["other:bob"]);
}

#[test]
fn a_route_asks_for_a_stronger_or_a_younger_login() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "")
        .route("/", "")
        .route("/gold", "acr = [\"gold\"]")
        .route("/fresh", "max_age = \"10m\"")
        .start();
    provider.play(Script { claims: set("auth_time", 1_700_000_000), ..Script::default() });
    let client = logged_in(&gateway, &provider);
    assert_eq!(client.get("/").send().status, 200);
    for page in ["/gold", "/fresh"] {
        let refused = client.get(page).send();
        assert_eq!(refused.status, 401, "{page} is more than this login is good for: {}", refused.text());
        assert!(refused.header("www-authenticate").unwrap().contains("insufficient_user_authentication"));
    }
    let before = client.cookie("session").unwrap();
    let refused = log_in(&client, &provider, "/fresh");
    assert_eq!(refused.status, 403, "a provider that does not do it leads to no circle: {}", refused.text());
    assert!(refused.text().contains("max_age=600"), "the next try asks for the same: {}", refused.text());

    provider.play(Script::default());
    let response = log_in(&client, &provider, "/gold?x=1");
    assert_eq!((response.status, location(&response).as_str()), (303, "/gold?x=1"), "{}", response.text());
    assert_ne!(client.cookie("session").unwrap(), before, "the id changes with the login");
    assert_eq!(client.get("/gold").send().status, 200);
    assert_eq!(client.get("/fresh").send().status, 200);
}

#[test]
fn a_login_of_which_nobody_says_when_it_was_is_not_young() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").route("/", "").route("/fresh", "max_age = \"10m\"").start();
    // A silent login: the provider knew the user, and asked for nothing.
    provider.play(Script { claims: remove("auth_time"), ..Script::default() });
    let client = logged_in(&gateway, &provider);
    assert_eq!(client.get("/").send().status, 200);
    assert_eq!(client.get("/fresh").send().status, 401, "the session is new, and that says nothing of the login");
    assert!(client.get("/.cloakroom/sessions").send().text().contains("\"may_end_others\":false"));

    provider.play(Script::default());
    let asked = client.navigate("/.cloakroom/login?reason=confirm").send().text();
    assert!(asked.contains("max_age=600"), "who confirms a login is asked by the provider again: {asked}");
    let response = log_in(&client, &provider, "/.cloakroom/oidc/fake/login?max_age=600");
    assert_eq!(response.status, 303, "{}", response.text());
    assert_eq!(client.get("/fresh").send().status, 200);
    assert!(client.get("/.cloakroom/sessions").send().text().contains("\"may_end_others\":true"));
}

#[test]
fn a_login_of_no_age_is_asked_for_each_time_and_lets_in_whoever_has_just_made_it() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").route("/", "").start();
    let (client, login) = (browser(&gateway), format!("{LOGIN}?max_age=0&return_to=%2Fa"));
    for _ in 0..3 {
        let target = location(&client.navigate(&login).send());
        assert!(target.contains("&max_age=0"), "with a session as well as without one: {target}");
        let answer = client.navigate(own_path(&provider.authorize(&target))).send();
        assert_eq!((answer.status, location(&answer).as_str()), (303, "/a"), "{}", answer.text());
        assert_eq!(client.get("/a").send().status, 200, "and nobody asks once more");
    }
    let before = client.cookie("session");
    for (claims, status) in [(set("auth_time", 1_700_000_000), 403), (remove("auth_time"), 502)] {
        provider.play(Script { claims, ..Script::default() });
        let refused = log_in(&client, &provider, &login);
        assert_eq!((refused.status, refused.header("location")), (status, None), "and no circle: {}", refused.text());
        assert_eq!(client.cookie("session"), before, "an answer to another question changes nothing");
    }
}

#[test]
fn a_password_of_a_script_is_no_stronger_login() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let login = format!("[login]\norigins = [\"{ORIGIN}\"]\n[login.basic]\n{}", provider.table("fake", ""));
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/gold", "basic = true\nacr = [\"gold\"]")
        .route("/fresh", "basic = true\nmax_age = \"10m\"")
        .with(&login)
        .start();
    let answer = |page| gateway.client().get(page).header("Authorization", &basic("ann", PASSWORD)).send();
    let refused = answer("/gold");
    assert_eq!(refused.status, 401);
    let challenge = refused.header("www-authenticate").unwrap();
    assert!(challenge.contains("insufficient_user_authentication"), "not one more password: {challenge}");
    assert_eq!(answer("/fresh").status, 200, "it was proved just now");
}

#[test]
fn the_login_page_offers_every_way_that_there_is() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "")
        .route("/", "")
        .route("/legacy", "access = \"public\"\ndirectives = [\"login\"]")
        .with("[login.backend]\npage = \"/legacy\"")
        .start();
    let page = browser(&gateway).navigate("/.cloakroom/login?return_to=/a").send();
    assert_eq!(page.status, 200, "a choice: {}", page.text());
    for way in ["/legacy?return_to=%2Fa", "/.cloakroom/oidc/fake/login?return_to=%2Fa"] {
        assert!(page.text().contains(way), "{way}: {}", page.text());
    }
}

#[test]
fn the_access_token_goes_where_a_route_asks_for_it_and_nowhere_else() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "tokens = true")
        .route("/", "")
        .route("/api", "access_token = \"Authorization\"")
        .route("/named", "access_token = \"X-Access-Token\"")
        .start();
    let client = logged_in(&gateway, &provider);
    let seen = client.get("/api").header("Authorization", "Bearer forged").send().seen();
    let [token] = seen.headers("authorization")[..] else { panic!("one field: {seen:?}") };
    assert!(token.starts_with("Bearer access-"), "{token}");
    let seen = client.get("/named").header("X_Access_Token", "forged").send().seen();
    assert!(seen.headers("x-access-token")[0].starts_with("access-"), "{seen:?}");
    assert!(seen.headers("x_access_token").is_empty(), "{seen:?}");
    let seen = client.get("/").header("X-Access-Token", "forged").send().seen();
    assert!(seen.headers("x-access-token").is_empty() && seen.headers("authorization").is_empty(), "{seen:?}");
    let told = client.get("/.cloakroom/session").send().text();
    assert!(!told.contains("access-"), "no token for the browser: {told}");
}

#[test]
fn twenty_requests_at_two_gateways_renew_the_tokens_once() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let setup = |keys| gateway(&backend, &provider, keys).route("/", "access_token = \"X-Access-Token\"");
    let gateways = [(); 2].map(|()| setup("tokens = true").store(Store::of(&redis)).start());
    provider.play(Script { tokens: set("expires_in", 0), ..Script::default() });
    let client = logged_in(&gateways[0], &provider);
    let session = client.cookie("session").unwrap();
    let old = ["access-2"]; // the first token that this provider has given out
    provider.play(Script::default());
    std::thread::scope(|scope| {
        for n in 0..20 {
            let (gateway, session) = (&gateways[n % 2], &session);
            scope.spawn(move || {
                let client = browser(gateway);
                client.set_cookie("session", session);
                let seen = client.get("/").send().seen();
                assert_ne!(seen.headers("x-access-token"), old, "nobody goes on with a token that has ended");
            });
        }
    });
    assert_eq!(provider.count("grant_type=refresh_token"), 1, "a refresh token is used once");
}

#[test]
fn a_refused_refresh_ends_the_session_and_a_silent_provider_does_not() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "tokens = true").start();
    provider.play(Script { tokens: set("expires_in", 1), ..Script::default() });
    let (ann, later) = (logged_in(&gateway, &provider), logged_in(&gateway, &provider));

    provider.play(Script { failing: [("/token", 503)].into(), ..Script::default() });
    assert_eq!(ann.get("/").send().status, 200);
    wait_until("the provider was asked", || provider.count("grant_type=refresh_token") == 1);
    assert!(is_logged_in(&ann), "its failure is not the user's");

    provider.play(Script { failing: [("/token", 400)].into(), ..Script::default() });
    wait_until("the session has ended", || later.get("/").send().status == 401);
    assert!(is_logged_in(&ann), "another session is another matter");
}

#[test]
fn a_refresh_that_speaks_of_somebody_else_ends_the_session() {
    for change in [set("sub", "somebody else"), set("iss", "https://other.example"), set("aud", "other")] {
        let (backend, provider) = (Backend::echo(), FakeProvider::start());
        let gateway = gateway(&backend, &provider, "tokens = true").start();
        provider.play(Script { tokens: set("expires_in", 1), ..Script::default() });
        let client = logged_in(&gateway, &provider);
        provider.play(Script { claims: change, ..Script::default() });
        wait_until("the session has ended", || client.get("/").send().status == 401);
    }
}

#[test]
fn a_logout_goes_on_to_the_provider_and_comes_back() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = logged_in(&gateway, &provider);
    let fields = gateway.log_out_form(&client);
    let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let response = client.post_form("/.cloakroom/logout", &fields).send();
    assert_eq!(response.status, 200, "a page that leads on: {}", response.text());
    assert!(client.cookie("session").is_none(), "our own session has ended first");
    let refresh = response.header("refresh").unwrap();
    let target = refresh.strip_prefix("0; url=").unwrap();
    assert!(target.starts_with(&format!("{}/end-session?", provider.issuer())), "{target}");
    let query = target.split_once('?').unwrap().1;
    let asked: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let value = |name: &str| asked.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str()).unwrap();
    assert_eq!(value("id_token_hint").split('.').count(), 3, "the provider knows whom");
    let back = format!("{ORIGIN}/.cloakroom/oidc/fake/after-logout");
    assert_eq!(value("post_logout_redirect_uri"), back);

    let forged = client.navigate("/.cloakroom/oidc/fake/after-logout?state=another-state-of-nobody").send();
    assert_eq!(forged.status, 400, "another state is no answer");
    let without = client.navigate("/.cloakroom/oidc/fake/after-logout").send();
    assert_eq!(without.status, 400, "none is no answer either");
    let done = client.navigate(&format!("/.cloakroom/oidc/fake/after-logout?state={}", value("state"))).send();
    assert_eq!(done.status, 200);
    assert!(done.text().contains("logged out"), "{}", done.text());
}

#[test]
fn a_logout_works_while_the_provider_is_away() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "logout = false").start();
    let client = logged_in(&gateway, &provider);
    provider.go_away();
    gateway.log_out(&client);
    assert!(!is_logged_in(&client));
}

/// What the provider sends to our back channel.
#[track_caller]
pub(crate) fn say_logout(gateway: &Gateway, token: &str) -> Response {
    say_logout_as(&gateway.client(), token)
}

#[track_caller]
pub(crate) fn say_logout_as(provider: &Client, token: &str) -> Response {
    provider.post_form("/.cloakroom/oidc/fake/backchannel", &[("logout_token", token)]).send()
}

/// Where a login has come to its callback, the provider has made its tokens, and `meanwhile` happens before they arrive.
fn log_in_while(gateway: &Gateway, provider: &FakeProvider, meanwhile: impl FnOnce()) -> (Client, Response) {
    provider.play(Script { waiting: ["/token"].into(), ..Script::default() });
    let client = browser(gateway);
    let callback = provider.authorize(&location(&client.navigate(LOGIN).send()));
    let asked = provider.count("grant_type=authorization_code");
    let response = std::thread::scope(|scope| {
        let answered = scope.spawn(|| client.navigate(own_path(&callback)).send());
        wait_until("the tokens are on their way", || asked < provider.count("grant_type=authorization_code"));
        meanwhile();
        provider.step();
        answered.join().unwrap()
    });
    (client, response)
}

#[test]
fn a_logout_at_the_provider_ends_the_login_that_it_meets() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let gateways = [(); 2].map(|()| gateway(&backend, &provider, "").store(Store::of(&redis)).start());
    let of_sid = || provider.logout_token(|_| {});
    let of_user = || {
        provider.logout_token(|claims| {
            claims.as_object_mut().unwrap().remove("sid");
        })
    };
    let of_another = || {
        provider.logout_token(|claims| {
            claims["sub"] = "of bob".into();
            claims["sid"] = "session of bob".into();
        })
    };
    let session_of_ann = |number: u32| provider.with_user(|user| user["sid"] = format!("session {number}").into());

    session_of_ann(1);
    let (client, response) = log_in_while(&gateways[0], &provider, || {
        assert_eq!(say_logout(&gateways[1], &of_another()).status, 200);
    });
    assert_eq!(response.status, 303, "somebody else's changes nothing: {}", response.text());
    assert!(is_logged_in(&client));

    for (number, token) in [(2, &of_sid as &dyn Fn() -> String), (3, &of_user)] {
        session_of_ann(number);
        let (client, response) = log_in_while(&gateways[0], &provider, || {
            assert_eq!(say_logout(&gateways[1], &token()).status, 200);
        });
        assert_eq!(response.status, 403, "{}", response.text());
        assert!(client.cookie("session").is_none() && !is_logged_in(&client));
    }
    let comes_back = || {
        for others in [0, 1, 3] {
            let (client, response) = log_in_while(&gateways[0], &provider, || {
                (0..others).for_each(|_| assert_eq!(say_logout(&gateways[1], &of_another()).status, 200));
            });
            let text = response.text();
            assert_eq!(response.status, 303, "after a logout, {others} of others meanwhile: let in: {text}");
            assert!(is_logged_in(&client));
        }
    };
    session_of_ann(4);
    comes_back();

    // Of a login without a `sid`, any logout of its user may be meant.
    let lose_sid = |user: &mut serde_json::Value| user.as_object_mut().unwrap().remove("sid");
    let token_of_ann = of_sid();
    provider.with_user(|user| {
        lose_sid(user);
    });
    let (client, response) = log_in_while(&gateways[0], &provider, || {
        assert_eq!(say_logout(&gateways[1], &of_another()).status, 200);
        assert_eq!(say_logout(&gateways[1], &token_of_ann).status, 200);
        assert_eq!(say_logout(&gateways[1], &of_another()).status, 200);
    });
    assert_eq!(response.status, 403, "{}", response.text());
    assert!(!is_logged_in(&client));
    comes_back();
}

#[test]
fn a_logout_at_the_provider_ends_sessions_at_every_gateway() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let gateways = [(); 2].map(|()| gateway(&backend, &provider, "").store(Store::of(&redis)).start());
    let first = logged_in(&gateways[0], &provider);
    provider.with_user(|user| user["sid"] = "another session of ann".into());
    let second = logged_in(&gateways[1], &provider);
    provider.with_user(|user| {
        user["sub"] = "of bob".into();
        user["preferred_username"] = "bob".into();
        user["sid"] = "session of bob".into();
    });
    let bob = logged_in(&gateways[1], &provider);
    assert!(is_logged_in(&first) && is_logged_in(&second) && is_logged_in(&bob));

    let of_sid = provider.logout_token(|claims| {
        claims["sid"] = "session-of-ann".into();
        claims["sub"] = "248289761001".into();
    });
    let told = say_logout(&gateways[1], &of_sid);
    assert_eq!((told.status, told.header("cache-control")), (200, Some("no-store")), "{}", told.text());
    wait_until("the one session ends at the other gateway", || !is_logged_in(&first));
    assert!(is_logged_in(&second), "a sid means one session");

    let of_sub = provider.logout_token(|claims| {
        claims["sub"] = "248289761001".into();
        claims.as_object_mut().unwrap().remove("sid");
    });
    assert_eq!(say_logout(&gateways[0], &of_sub).status, 200);
    wait_until("all of the user's end", || !is_logged_in(&second));
    assert!(is_logged_in(&bob), "and nobody else's");

    for gateway in &gateways {
        assert_eq!(say_logout(gateway, &of_sub).status, 400, "a logout token is good for once, at any instance");
    }
}

#[test]
fn the_front_channel_is_closed_unless_it_is_opened() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let issuer = provider.issuer();
    let target = |issuer: &str, sid: &str| {
        let query =
            form_urlencoded::Serializer::new(String::new()).append_pair("iss", issuer).append_pair("sid", sid).finish();
        format!("/.cloakroom/oidc/fake/frontchannel?{query}")
    };
    let closed = gateway(&backend, &provider, "").start();
    let client = logged_in(&closed, &provider);
    assert_eq!(browser(&closed).get(&target(&issuer, "session-of-ann")).send().status, 404);
    assert!(is_logged_in(&client));

    let open = gateway(&backend, &provider, "frontchannel_logout = true").start();
    let client = logged_in(&open, &provider);
    let frame = browser(&open); // no cookie of ours travels into a frame of another site
    for (issuer, sid) in [("https://other.example", "session-of-ann"), (issuer.as_str(), "")] {
        assert_eq!(frame.get(&target(issuer, sid)).send().status, 400, "{issuer} {sid}");
    }
    assert_eq!(frame.get("/.cloakroom/oidc/fake/frontchannel").send().status, 400);
    assert_eq!(frame.get(&target(&issuer, "unknown")).send().status, 200);
    assert!(is_logged_in(&client));
    let done = frame.get(&target(&issuer, "session-of-ann")).send();
    assert_eq!(done.status, 200);
    let policy = done.header("content-security-policy").unwrap();
    assert!(
        policy.contains(&format!("frame-ancestors {issuer}")) && done.header("x-frame-options").is_none(),
        "{policy}"
    );
    assert!(!is_logged_in(&client));
}

fn check(arguments: &[&str]) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_cloakroom")).arg("check").args(arguments).output().unwrap()
}

#[test]
fn every_set_up_in_the_book_passes_the_check() {
    let book = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/oidc.md"));
    let blocks = book.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let mut checked = 0;
    for block in blocks {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("cloakroom.toml");
        let mut text =
            "[[listener]]\naddress = \"127.0.0.1:0\"\n[pool.app]\nbackends = [\"127.0.0.1:9001\"]\n".to_owned();
        text.push_str("[[route]]\npath = \"/\"\npool = \"app\"\n");
        text.push_str(block);
        if !block.contains("[login.oidc.") {
            text.push_str("[login]\norigins = [\"https://app.example.org\"]\n[login.oidc.any]\n");
            text.push_str("issuer = \"https://login.example.org\"\nclient_id = \"us\"\n");
        }
        std::fs::write(&file, &text).unwrap();
        std::fs::write(folder.path().join("client-secret"), "Zk3-a-secret-of-nobody-91Qp\n").unwrap();
        let output = check(&[file.to_str().unwrap()]);
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        checked += 1;
    }
    assert_eq!(checked, 5, "Keycloak, Entra, Google, Dex, and a route");
}

#[test]
fn the_check_asks_the_provider_when_it_is_told_to() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "scopes = [\"openid\", \"groups\"]").start();
    let file = gateway.config_file();
    let online = || {
        let output = check(&["--online", file.to_str().unwrap()]);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = online();
    assert!(said.contains("[login.oidc.fake]: ok") && said.contains("scope \"groups\""), "{said}");
    assert!(said.ends_with("cloakroom.toml: ok\n"), "the verdict comes last: {said}");
    assert_eq!(code, Some(0), "{said}");

    provider.play(Script { metadata: set("issuer", "https://other.example"), ..Script::default() });
    let (code, said) = online();
    assert!(said.contains("failed: it calls itself \"https://other.example\""), "{said}");
    assert_eq!(code, Some(1), "{said}");
    assert!(check(&[file.to_str().unwrap()]).status.success(), "offline, nobody is asked");

    provider.go_away();
    assert_eq!(online().0, Some(1));
}

/// A gateway whose backend gets the access token, and somebody there whose token has ended.
fn with_token_that_has_ended(
    backend: &Backend,
    provider: &FakeProvider,
    keys: &str,
    tables: &str,
) -> (Gateway, Client, Vec<String>) {
    let setup = gateway(backend, provider, &format!("tokens = true\n{keys}")).with(tables);
    let gateway = setup.route("/", "access_token = \"X-Access-Token\"").route("/plain", "").start();
    provider.play(Script { tokens: set("expires_in", 0), ..Script::default() });
    let client = logged_in(&gateway, provider);
    let old = (0..20).map(|number| format!("access-{number}")).collect();
    provider.play(Script::default());
    (gateway, client, old)
}

#[test]
fn what_is_wrong_with_a_new_id_token_ends_no_session_and_loses_no_token() {
    use serde_json::json;
    let moved = |name: &'static str, by: i64| -> Option<crate::harness::provider::Change> {
        Some(std::sync::Arc::new(move |claims: &mut serde_json::Value| {
            claims[name] = (claims[name].as_i64().unwrap() + by).into();
        }))
    };
    let default = Script::default;
    let cases = [
        ("signed by nobody", Script { signing: Signing::Damaged, ..default() }),
        ("under an unknown key", Script { header: set("kid", "nobody"), ..default() }),
        ("under a key that cannot be had", Script { failing: [("/jwks", 503)].into(), ..default() }),
        ("by a clock that is ahead", Script { claims: moved("iat", 600), ..default() }),
        ("over already", Script { claims: moved("exp", -900), ..default() }),
        ("without a sub", Script { claims: remove("sub"), ..default() }),
        ("with too many groups", Script { claims: set("groups", json!(vec!["g".repeat(100); 200])), ..default() }),
        ("not there", Script { tokens: remove("id_token"), ..default() }),
    ];
    for (what, script) in cases {
        let (backend, provider) = (Backend::echo(), FakeProvider::start());
        let (_gateway, client, old) = with_token_that_has_ended(&backend, &provider, "", "");
        if script.failing.contains_key("/jwks") {
            provider.rotate_keys();
        }
        provider.play(script);
        let mut seen = Vec::new();
        wait_until(&format!("the new token arrives, whose ID token is {what}"), || {
            let answer = client.get("/").send();
            assert_eq!(answer.status, 200, "{what}: {}", answer.text());
            seen = answer.seen().headers("x-access-token").iter().map(|token| (*token).to_owned()).collect();
            seen != ["access-2"]
        });
        assert!(old[3..].contains(&seen[0]), "{what}: {seen:?}");
        let seen = client.get("/").send().seen();
        assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "{what}");
        assert_eq!(seen.headers("x-forwarded-groups"), ["staff"], "{what}: as the login said it");
    }
}

#[test]
fn a_logout_whose_key_nobody_could_look_for_may_come_again() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = logged_in(&gateway, &provider);
    provider.rotate_keys();
    let token = provider.logout_token(|_| {});
    provider.play(Script { failing: [("/jwks", 503)].into(), ..Script::default() });
    assert_eq!(say_logout(&gateway, &token).status, 503, "the keys cannot be had now");
    assert!(is_logged_in(&client));
    provider.play(Script::default());
    wait_until("the same token is carried out", || say_logout(&gateway, &token).status == 200);
    assert!(!is_logged_in(&client));

    // Now the keys were renewed a moment ago, as anybody can have them by a token that names another key.
    provider.rotate_keys();
    assert_eq!(say_logout(&gateway, &provider.logout_token(|_| {})).status, 503, "nobody has looked for this one");
}

#[test]
fn a_logout_whose_store_answers_too_late_may_come_again() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let proxy = FaultProxy::to(redis.port());
    let store = Store::Redis(format!("url = \"{}\"\nresponse_timeout = \"2s\"", proxy.url()));
    let gateway = gateway(&backend, &provider, "").store(store).start();
    let client = logged_in(&gateway, &provider);
    let token = provider.logout_token(|_| {});
    proxy.set(Fault { back: Duration::from_secs(8), ..Fault::default() });
    assert_eq!(say_logout(&gateway, &token).status, 503, "nobody knows whether it was noted");
    proxy.heal();
    wait_until("the same token is carried out", || say_logout(&gateway, &token).status == 200);
    wait_until("the session has ended", || client.get("/.cloakroom/session").send().status == 401);
}

#[test]
fn groups_that_were_taken_away_go_with_the_next_tokens() {
    use serde_json::json;
    let (none, from_userinfo) = (json!([]), "userinfo = \"always\"\n");
    for (keys, script) in
        [("", Script::default()), (from_userinfo, Script { claims: remove("groups"), ..Script::default() })]
    {
        let (backend, provider) = (Backend::echo(), FakeProvider::start());
        let (_gateway, client, _) = with_token_that_has_ended(&backend, &provider, keys, "");
        provider.with_user(|user| user["groups"] = none.clone());
        provider.play(script.clone());
        let seen = client.get("/").send().seen();
        assert_eq!(seen.headers("x-forwarded-user"), ["ann"]);
        wait_until("the groups are gone", || client.get("/").send().seen().headers("x-forwarded-groups").is_empty());

        let (backend, provider) = (Backend::echo(), FakeProvider::start());
        let keys = format!("{keys}allowed_groups = [\"staff\"]");
        let (_gateway, client, _) = with_token_that_has_ended(&backend, &provider, &keys, "");
        provider.with_user(|user| user["groups"] = none.clone());
        provider.play(script);
        assert_eq!(client.get("/").send().status, 401, "who waits for the tokens of a session that ends is nobody");
    }

    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let (_gateway, client, _) = with_token_that_has_ended(&backend, &provider, from_userinfo, "");
    provider.play(Script { failing: [("/userinfo", 503)].into(), claims: remove("groups"), ..Script::default() });
    wait_until("the new token is there without UserInfo", || {
        client.get("/").send().seen().headers("x-access-token") != ["access-2"]
    });
    assert_eq!(client.get("/").send().seen().headers("x-forwarded-groups"), ["staff"]);
}

#[test]
fn a_login_ends_the_old_session_also_where_its_cookie_does_not_come_along() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").with("[session]\nsame_site = \"strict\"").start();
    let client = browser(&gateway);
    assert_eq!(log_in(&client, &provider, LOGIN).status, 200, "a page that leads on");
    let before = client.cookie("session").unwrap();
    let callback = provider.authorize(&location(&client.navigate(LOGIN).send()));
    let without = browser(&gateway); // as a browser that comes from another site
    client
        .cookies()
        .iter()
        .filter(|(name, _)| name != "session")
        .for_each(|(name, value)| without.set_cookie(name, value));
    assert_eq!(without.navigate(own_path(&callback)).send().status, 200);
    assert!(is_logged_in(&without));
    let thief = browser(&gateway);
    thief.set_cookie("session", &before);
    assert!(!is_logged_in(&thief), "the old id is worth nothing");
}

#[test]
fn a_refusal_of_tokens_that_somebody_has_renewed_meanwhile_ends_nothing() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let gateways = [(); 2].map(|()| gateway(&backend, &provider, "tokens = true").store(Store::of(&redis)).start());
    provider.play(Script { tokens: set("expires_in", 0), ..Script::default() });
    let client = logged_in(&gateways[0], &provider);
    provider.play(Script { failing: [("/token", 400)].into(), waiting: ["/token"].into(), ..Script::default() });
    assert_eq!(client.get("/").send().status, 200);
    wait_until("the provider is asked", || provider.count("grant_type=refresh_token") == 1);

    // Its claim is lost, as with a store that fails over.
    for claim in redis.ask::<Vec<String>>("KEYS *l:*") {
        let _: i64 = redis.ask(&format!("DEL {claim}"));
    }
    provider.play(Script::default());
    let other = browser(&gateways[1]);
    other.set_cookie("session", &client.cookie("session").unwrap());
    assert_eq!(other.get("/").send().status, 200);
    wait_until("the other gateway has renewed them", || {
        gateways[1].metric("cloakroom_token_renewals_total{result=\"renewed\"}") == 1.0
    });
    provider.step();
    wait_until("the first one is done", || {
        gateways[0].metric("cloakroom_token_renewals_total{result=\"not_ours\"}") == 1.0
    });
    assert!(is_logged_in(&client) && is_logged_in(&other));
}

#[test]
fn tokens_that_are_being_renewed_are_kept_by_a_gateway_that_ends() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let start = || gateway(&backend, &provider, "tokens = true").store(Store::of(&redis)).start();
    let first = start();
    provider.play(Script { tokens: set("expires_in", 0), ..Script::default() });
    let client = logged_in(&first, &provider);
    provider.play(Script { waiting: ["/token"].into(), ..Script::default() });
    assert_eq!(client.get("/").send().status, 200, "the answer does not wait");
    wait_until("the provider is asked", || provider.count("grant_type=refresh_token") == 1);
    let (address, session) = (first.address(), client.cookie("session").unwrap());
    drop(client);
    let (stopped, has_stopped) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            first.stop();
            stopped.send(()).unwrap();
        });
        wait_until("the gateway ends", || std::net::TcpStream::connect(address).is_err());
        // Idle connections would have it wait for a second.
        assert!(has_stopped.recv_timeout(Duration::from_secs(3)).is_err(), "it ends without the tokens");
        provider.step();
    });
    provider.play(Script::default());
    let second = start();
    let later = browser(&second);
    later.set_cookie("session", &session);
    assert!(is_logged_in(&later));
    assert_eq!(later.get("/").send().status, 200);
    assert_eq!(provider.count("grant_type=refresh_token"), 1, "the new tokens were written");
}

#[test]
fn a_network_sends_us_to_the_provider_with_so_many_bad_codes_and_leaves_nothing_in_the_store() {
    let (backend, provider, redis) = (Backend::echo(), FakeProvider::start(), RedisServer::start());
    let gateway = gateway(&backend, &provider, "").store(Store::of(&redis)).start();
    let client = browser(&gateway);
    let target = location(&client.navigate(LOGIN).send());
    let kept = client.cookies();
    let callback = provider.authorize(&target);
    let answer_with = |from: &str, to: &str| {
        kept.iter().for_each(|(name, value)| client.set_cookie(name, value));
        client.navigate(&own_path(&callback).replace(from, to)).send()
    };
    // Besides the one of the instance that sweeps, which comes when it likes.
    let keys = || redis.ask::<Vec<String>>("KEYS *").iter().filter(|name| !name.ends_with(":lead")).count();
    let before = keys();
    assert_eq!(answer_with("code=", "error=access_denied&was=").status, 403);
    assert_eq!(keys(), before, "who cancels leaves nothing");
    for number in 0..100 {
        assert_eq!(answer_with("code=", "code=bad-").status, 400, "{number}");
    }
    assert!(keys() <= before + 1, "one counter for the network");
    let refused = answer_with("code=", "code=bad-");
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert!(refused.header("retry-after").is_some());
    assert_eq!(provider.count("/token"), 100);
}

#[test]
fn a_reload_keeps_what_is_known_of_a_provider_whose_table_is_the_same() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);
    let callback = provider.authorize(&location(&client.navigate(LOGIN).send()));
    gateway.reload(|setup| setup.with("[identity]\npreset = \"remote\"")).unwrap();
    assert_eq!(client.navigate(own_path(&callback)).send().status, 303);
    assert_eq!(provider.count("/.well-known/openid-configuration"), 1, "nobody is asked again");
}

#[test]
fn a_step_up_follows_no_form() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let login = format!("[login]\norigins = [\"{ORIGIN}\"]\n{}", provider.table("fake", ""));
    let gateway =
        Gateway::in_front_of(&[&backend]).route("/", "").route("/gold", "acr = [\"gold\"]").with(&login).start();
    let client = browser(&gateway);
    assert_eq!(gateway.try_log_in(&client, "ann", PASSWORD).status, 303);
    let page = client.navigate("/gold").send();
    assert_eq!(page.status, 200, "browsers follow no redirect of a form to another site: {}", page.text());
    let next = page.header("refresh").unwrap().strip_prefix("0; url=").unwrap().to_owned();
    let answer = log_in(&client, &provider, &next);
    assert_eq!((answer.status, location(&answer).as_str()), (303, "/gold"), "{}", answer.text());
    assert_eq!(client.get("/gold").send().status, 200);

    let ann = logged_in(&gateway, &provider);
    let refused = ann.post_form("/gold", &[("a", "b")]).header("Referer", &format!("{ORIGIN}/page?of=form")).send();
    assert_eq!(refused.status, 403, "{}", refused.text());
    let text = refused.text();
    assert!(text.contains("not taken") && text.contains("return_to=%2Fpage%3Fof%3Dform"), "{text}");
    assert!(text.contains("acr=gold") && refused.header("refresh").is_none(), "{text}");
    assert!(!backend.has_received("a=b"));
}

#[test]
fn an_attempt_fits_into_a_cookie_that_browsers_keep() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let (path, values) = (format!("/{}", "x".repeat(2000)), ["y".repeat(120), "z".repeat(1000)].join("%20"));
    for (acr, expected) in [("gold", path.as_str()), (&values, &path), (&vec!["y".repeat(120); 8].join("%20"), "/")] {
        let client = browser(&gateway);
        let sent = client.navigate(&format!("{LOGIN}?return_to={path}&acr={acr}")).send();
        let longest = client.cookies().iter().map(|(name, value)| name.len() + value.len()).max().unwrap();
        assert!(longest <= 4096, "{longest} bytes");
        let answer = client.navigate(own_path(&provider.authorize(&location(&sent)))).send();
        assert_eq!((answer.status, location(&answer).as_str()), (303, expected));
    }
}

#[test]
fn a_link_on_another_site_changes_nobodys_session() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let login = format!("[login]\norigins = [\"{ORIGIN}\"]\n{}", provider.table("fake", ""));
    let gateway = Gateway::in_front_of(&[&backend]).route("/", "").with(&login).start();
    let from_elsewhere = |client: &Client| {
        let link = client.get(&format!("{LOGIN}?return_to=/page")).header("Accept", "text/html");
        link.header("Sec-Fetch-Mode", "navigate").header("Sec-Fetch-Site", "cross-site").send()
    };
    let client = browser(&gateway);
    assert_eq!(gateway.try_log_in(&client, "bob", PASSWORD).status, 303);
    let session = client.cookie("session");
    assert_eq!(location(&from_elsewhere(&client)), "/page", "who is logged in just goes on");
    assert_eq!(client.cookie("session"), session);
    let target = location(&from_elsewhere(&browser(&gateway)));
    assert!(target.starts_with(&provider.issuer()), "a login may begin elsewhere: {target}");
}
