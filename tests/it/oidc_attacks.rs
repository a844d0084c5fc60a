//! Can somebody else's answer, an old one, or a link log a user in, log them out, or lead them away?

use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::harness::gateway::Gateway;
use crate::harness::provider::{FakeProvider, Script, set};
use crate::hostile_targets::HOSTILE;
use crate::oidc::{LOGIN, ORIGIN, browser, gateway, is_logged_in, location, log_in, logged_in, own_path, say_logout};

fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// A login that has begun, up to the answer of the provider: the address of the callback.
#[track_caller]
fn answered(client: &Client, provider: &FakeProvider, login: &str) -> String {
    provider.authorize(&location(&client.navigate(login).send()))
}

#[track_caller]
fn post(client: &Client, target: &str, fields: &[(&str, &str)], site: &str) -> u16 {
    client.post_form(target, fields).header("Sec-Fetch-Site", site).send().status
}

/// RFC 9700, section 4.4: each callback is one provider's, and a provider that names itself is held to its name.
#[test]
fn the_answer_of_one_provider_counts_at_its_own_callback_and_under_its_own_name() {
    let backend = Backend::echo();
    for names_itself in [false, true] {
        let (one, other) = (FakeProvider::start(), FakeProvider::start());
        if names_itself {
            let metadata = set("authorization_response_iss_parameter_supported", true);
            one.play(Script { metadata, ..Script::default() });
        }
        let gateway = gateway(&backend, &one, "").with(&other.table("other", "")).start();
        for callback_of in ["fake", "other"] {
            for name in [None, Some(one.issuer()), Some(other.issuer()), Some(format!("{}/", one.issuer()))] {
                let client = browser(&gateway);
                // Both are asked by this browser, so that each callback has an attempt that it could take.
                answered(&client, &other, "/.cloakroom/oidc/other/login");
                let mut callback = answered(&client, &one, LOGIN);
                callback = callback.replace("/oidc/fake/", &format!("/oidc/{callback_of}/"));
                if let Some(name) = &name {
                    callback = format!("{callback}&iss={}", encoded(name));
                }
                let answer = client.navigate(own_path(&callback)).send();
                let is_named = name.as_ref().map_or(!names_itself, |name| *name == one.issuer());
                let is_good = callback_of == "fake" && is_named;
                let what = format!("at {callback_of} as {name:?}, names itself: {names_itself}: {}", answer.text());
                assert_eq!(answer.status, if is_good { 303 } else { 400 }, "{what}");
                assert_eq!(is_logged_in(&client), is_good, "{what}");
            }
        }
        assert_eq!(other.count("/token"), 0, "no code of the one was shown to the other");
        assert_eq!(one.count("/token"), if names_itself { 1 } else { 2 }, "nor to its own, unless it was good");
    }
}

#[test]
fn what_was_good_once_is_never_good_again() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let kept: Arc<Mutex<Option<Value>>> = Arc::default();
    let keep = Arc::clone(&kept);
    let tokens = Some(Arc::new(move |answer: &mut Value| {
        keep.lock().unwrap().get_or_insert_with(|| answer["id_token"].clone());
    }) as _);
    provider.play(Script { tokens, ..Script::default() });
    let client = browser(&gateway);
    let first = answered(&client, &provider, LOGIN);
    assert_eq!(client.navigate(own_path(&first)).send().status, 303);
    let old_code = first.split_once("code=").unwrap().1.split('&').next().unwrap().to_owned();
    let old_token = kept.lock().unwrap().clone().unwrap();
    assert_eq!(say_logout(&gateway, old_token.as_str().unwrap()).status, 400, "an ID token is no logout token");
    assert!(is_logged_in(&client));

    let logout = provider.logout_token(|_| {});
    assert_eq!(say_logout(&gateway, &logout).status, 200);
    assert!(!is_logged_in(&client));
    assert_eq!(client.navigate(own_path(&first)).send().status, 400, "the whole answer, after the logout");
    assert!(!is_logged_in(&client), "and no session comes of it");

    provider.play(Script { callback: set("code", old_code), ..Script::default() });
    assert_eq!(log_in(&client, &provider, LOGIN).status, 400, "the code");

    let of_a_stranger = answered(&browser(&gateway), &provider, LOGIN);
    provider.play(Script::default());
    let stranger = browser(&gateway);
    let theirs = answered(&stranger, &provider, LOGIN);
    let code = theirs.split_once("code=").unwrap().1.split('&').next().unwrap().to_owned();
    provider.play(Script { callback: set("code", code), ..Script::default() });
    assert_eq!(log_in(&client, &provider, LOGIN).status, 400, "a fresh code of another browser: PKCE");
    assert_eq!(client.navigate(own_path(&of_a_stranger)).send().status, 400, "the answer to another browser");

    provider.play(Script { tokens: set("id_token", old_token), ..Script::default() });
    assert_eq!(log_in(&client, &provider, LOGIN).status, 502, "the ID token of another login");
    provider.play(Script { tokens: set("id_token", logout.clone()), ..Script::default() });
    assert_eq!(log_in(&client, &provider, LOGIN).status, 502, "a logout token is no ID token");
    assert!(!is_logged_in(&client));

    provider.play(Script::default());
    assert_eq!(log_in(&client, &provider, LOGIN).status, 303);
    assert_eq!(say_logout(&gateway, &logout).status, 400, "the logout token");
    assert!(is_logged_in(&client));
}

#[test]
fn no_other_site_logs_anybody_in_or_out() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();

    // Into the attacker's account: their answer, in the victim's browser.
    let attacker = browser(&gateway);
    let callback = answered(&attacker, &provider, LOGIN);
    let victim = browser(&gateway);
    assert_eq!(victim.navigate(own_path(&callback)).send().status, 400, "who has asked for nothing");
    victim.navigate(LOGIN).send();
    assert_eq!(victim.navigate(own_path(&callback)).send().status, 400, "who is about to log in");
    assert!(!is_logged_in(&victim));

    let client = logged_in(&gateway, &provider);
    let before = client.cookie("session");
    let other = gateway.log_out_form(&logged_in(&gateway, &provider));
    let foreign: Vec<_> = other.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let own = gateway.log_out_form(&client);
    let own: Vec<_> = own.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let begun = answered(&client, &provider, LOGIN);
    let oidc = |step: &str| format!("/.cloakroom/oidc/fake/{step}");
    for (what, status, expected) in [
        ("a logout without a token", post(&client, "/.cloakroom/logout", &[], "same-origin"), 403),
        ("with another's token", post(&client, "/.cloakroom/logout", &foreign, "same-origin"), 403),
        ("from another site", post(&client, "/.cloakroom/logout", &own, "cross-site"), 403),
        ("a logout by a link", client.navigate("/.cloakroom/logout").send().status, 200),
        ("a login by a form", post(&client, &oidc("login"), &[], "cross-site"), 405),
        ("a callback by a form", post(&client, own_path(&begun), &[], "cross-site"), 405),
        ("an end of a logout by a form", post(&client, &oidc("after-logout"), &[], "cross-site"), 405),
        ("an end of a logout by a link", client.navigate(&oidc("after-logout")).send().status, 400),
        ("the front channel by a link", client.navigate(&oidc("frontchannel?sid=session-of-ann")).send().status, 404),
        ("the back channel by a link", client.navigate(&oidc("backchannel")).send().status, 405),
        (
            "the back channel by a form",
            post(&client, &oidc("backchannel"), &[("logout_token", "x")], "cross-site"),
            400,
        ),
        ("a callback of nothing, on to our page", client.navigate(&oidc("callback?code=c&state=s")).send().status, 303),
    ] {
        assert_eq!(status, expected, "{what}");
        assert!(is_logged_in(&client), "{what}");
        assert_eq!(client.cookie("session"), before, "{what}: the session is the same");
    }
}

/// OWASP calls it session fixation: an id that the attacker knows becomes the victim's.
#[test]
fn no_cookie_that_was_there_before_a_login_is_good_after_it() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    provider.with_user(|user| user["preferred_username"] = "mallory".into());
    let mallory = logged_in(&gateway, &provider).cookie("session").unwrap();
    let ended = {
        let client = logged_in(&gateway, &provider);
        let value = client.cookie("session").unwrap();
        assert_eq!(log_in(&client, &provider, LOGIN).status, 303);
        value
    };
    provider.with_user(|user| user["preferred_username"] = "ann".into());
    let made_up: String = mallory.chars().rev().collect();
    for (what, planted) in [
        ("a session of the attacker", mallory.as_str()),
        ("a session that has ended", &ended),
        ("one of the right form", &made_up),
        ("a short one", "x"),
        ("a long one", &"A".repeat(3000)),
    ] {
        let victim = browser(&gateway);
        victim.set_cookie("session", planted);
        assert_eq!(log_in(&victim, &provider, LOGIN).status, 303, "{what}");
        assert_ne!(victim.cookie("session").unwrap(), planted, "{what}");
        assert_eq!(victim.get("/").send().seen().headers("x-forwarded-user"), ["ann"], "{what}");
        let attacker = browser(&gateway);
        attacker.set_cookie("session", planted);
        assert!(!is_logged_in(&attacker), "{what}: it is nobody's");
    }
}

/// What a page says when it sends the browser on by itself.
fn refresh(gateway: &Gateway, client: &Client, target: &str, hostile: &str) -> String {
    let mut fields = gateway.log_out_form(client);
    for name in ["return_to", "rd", "post_logout_redirect_uri", "state"] {
        fields.push((name.to_owned(), hostile.to_owned()));
    }
    let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let answer = client.post_form(target, &fields).send();
    assert_eq!(answer.status, 200, "{hostile:?}: {}", answer.text());
    answer.header("refresh").unwrap().to_owned()
}

#[test]
fn no_link_leads_off_this_site_by_a_login_or_a_logout_at_a_provider() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    assert!(60 <= HOSTILE.len());
    // By the name of the standard, whole URLs: of ours, nearly of ours, not of ours.
    let nearly = [
        ".evil.example/",
        "@evil.example/",
        ":80@evil.example/",
        ":81/",
        "evil/",
        "%2eevil.example/",
        "\\.evil.example/",
    ];
    let whole =
        ["http://evil.example/", "https://app.test/", "HTTP://APP.TEST/", "http:app.test/", "//app.test/", "app.test"];
    let logins = HOSTILE.iter().map(|target| format!("return_to={}", encoded(target)));
    let logins =
        logins.chain(HOSTILE.iter().map(|target| format!("target_link_uri={}", encoded(&format!("{ORIGIN}{target}")))));
    let logins =
        logins.chain(nearly.iter().map(|rest| format!("target_link_uri={}", encoded(&format!("{ORIGIN}{rest}")))));
    let logins = logins.chain(whole.iter().map(|target| format!("target_link_uri={}", encoded(target))));
    for query in logins {
        let client = browser(&gateway);
        let answer = log_in(&client, &provider, &format!("{LOGIN}?{query}"));
        assert_eq!((answer.status, location(&answer).as_str()), (303, "/"), "{query}");
    }

    for (turn, hostile) in HOSTILE.iter().enumerate() {
        let client = browser(&gateway);
        let escaped = encoded(hostile);
        let after =
            client.navigate(&format!("/.cloakroom/oidc/fake/after-logout?state={escaped}&return_to={escaped}")).send();
        assert_eq!((after.status, after.header("location"), after.header("refresh")), (400, None, None), "{hostile:?}");
        if turn % 8 != 0 {
            continue; // a session for each would take a while
        }
        assert_eq!(log_in(&client, &provider, LOGIN).status, 303);
        let target = format!("/.cloakroom/logout?return_to={escaped}&rd={escaped}&post_logout_redirect_uri={escaped}");
        let refresh = refresh(&gateway, &client, &target, hostile);
        let query = refresh.strip_prefix(&format!("0; url={}/end-session?", provider.issuer())).unwrap();
        let asked: Vec<_> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let values =
            |name: &str| asked.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str()).collect::<Vec<_>>();
        let back = format!("{ORIGIN}/.cloakroom/oidc/fake/after-logout");
        assert_eq!(values("post_logout_redirect_uri"), [back.as_str()], "{hostile:?}");
        let [state] = values("state")[..] else { panic!("one state: {asked:?}") };
        let target = format!("{}?state={state}&return_to={escaped}&rd={escaped}", own_path(&back));
        let done = client.navigate(&target).send();
        assert_eq!((done.status, done.header("location"), done.header("refresh")), (200, None, None), "{hostile:?}");
        assert!(!done.text().contains("evil"), "{hostile:?}: {}", done.text());
    }
}
