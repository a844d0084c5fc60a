//! What does the gateway do with a provider that breaks a rule? Each case is named after the module of the OpenID
//! Foundation's conformance suite for relying parties that tests it (`oidcc-client-test-...` and its relatives); those in
//! brackets are ours. Every case runs against a gateway of its own, with a real login from the first redirect on.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::harness::backend::Backend;
use crate::harness::provider::{CLIENT_ID, Change, FakeProvider, Script, Signing, remove, set};
use crate::oidc::{LOGIN, browser, gateway, location, log_in, logged_in, own_path, say_logout};

/// What must become of the login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    LoggedIn,
    /// Refused at the callback.
    Refused,
    /// Refused before the provider's page.
    NotSent,
}
use Verdict::{LoggedIn, NotSent, Refused};

fn change(change: impl Fn(&mut Value) + Send + Sync + 'static) -> Option<Change> {
    Some(Arc::new(change))
}

/// An offset from the time that is there, in s.
fn moved(name: &'static str, seconds: i64) -> Option<Change> {
    change(move |claims| claims[name] = (claims[name].as_i64().unwrap() + seconds).into())
}

fn script() -> Script {
    Script::default()
}

/// The name has to be asked for, and comes in a token.
fn signed_userinfo(signing: Signing, userinfo: Option<Change>) -> Script {
    Script { claims: remove("name"), userinfo_signing: Some(signing), userinfo, ..script() }
}

fn cases() -> Vec<(&'static str, Verdict, Script)> {
    let keys = |keep: fn(&Value) -> bool| change(move |set| set["keys"].as_array_mut().unwrap().retain(keep));
    vec![
        // Core.
        ("oidcc-client-test", LoggedIn, script()),
        (
            "oidcc-client-test-client-secret-basic",
            LoggedIn,
            Script {
                metadata: set("token_endpoint_auth_methods_supported", json!(["client_secret_basic"])),
                ..script()
            },
        ),
        (
            "(client-auth-method-unknown)",
            Refused,
            Script { metadata: set("token_endpoint_auth_methods_supported", json!(["private_key_jwt"])), ..script() },
        ),
        ("oidcc-client-test-idtoken-sig-rs256", LoggedIn, Script { signing: Signing::Rs256, ..script() }),
        ("oidcc-client-test-idtoken-sig-es256", LoggedIn, Script { signing: Signing::Es256, ..script() }),
        ("(idtoken-sig-eddsa)", LoggedIn, Script { signing: Signing::EdDsa, ..script() }),
        ("(idtoken-sig-rs384)", LoggedIn, Script { signing: Signing::Rs384, ..script() }),
        ("(idtoken-sig-rs512)", LoggedIn, Script { signing: Signing::Rs512, ..script() }),
        ("(idtoken-sig-ps256)", LoggedIn, Script { signing: Signing::Ps256, ..script() }),
        ("(idtoken-sig-ps384)", LoggedIn, Script { signing: Signing::Ps384, ..script() }),
        ("(idtoken-sig-ps512)", LoggedIn, Script { signing: Signing::Ps512, ..script() }),
        ("(idtoken-sig-es384)", LoggedIn, Script { signing: Signing::Es384, ..script() }),
        ("(invalid-sig-ps256)", Refused, Script { signing: Signing::Ps256, header: set("alg", "RS256"), ..script() }),
        ("oidcc-client-test-idtoken-sig-none", Refused, Script { signing: Signing::None, ..script() }),
        (
            "oidcc-client-test-invalid-sig-rs256",
            Refused,
            Script { signing: Signing::Rs256, header: set("kid", "es-0"), ..script() },
        ),
        ("oidcc-client-test-invalid-sig-es256", Refused, Script { signing: Signing::Damaged, ..script() }),
        ("oidcc-client-test-invalid-sig-hs256", Refused, Script { signing: Signing::Hs256, ..script() }),
        ("(sig-hs256-with-public-key)", Refused, Script { signing: Signing::Hs256OfPublicKey, ..script() }),
        ("(sig-by-unpublished-key)", Refused, Script { signing: Signing::Impostor, ..script() }),
        ("(sig-alg-swapped)", Refused, Script { header: set("alg", "RS256"), ..script() }),
        (
            "(sig-alg-none-in-capitals)",
            Refused,
            Script { signing: Signing::None, header: set("alg", "NONE"), ..script() },
        ),
        (
            "(jwk-in-header-of-impostor)",
            Refused,
            Script { signing: Signing::Impostor, header: set("jwk", json!({ "kty": "EC" })), ..script() },
        ),
        (
            "(jku-in-header-of-impostor)",
            Refused,
            Script { signing: Signing::Impostor, header: set("jku", "https://evil.example/jwks"), ..script() },
        ),
        ("(crit-in-header)", Refused, Script { header: set("crit", json!(["exp"])), ..script() }),
        ("(typ-of-access-token)", Refused, Script { header: set("typ", "at+jwt"), ..script() }),
        ("(typ-of-logout-token)", Refused, Script { header: set("typ", "logout+jwt"), ..script() }),
        (
            "oidcc-client-test-kid-absent-single-jwks",
            LoggedIn,
            Script { header: remove("kid"), keys: keys(|key| key["kty"] == "EC"), ..script() },
        ),
        (
            "oidcc-client-test-kid-absent-multiple-jwks",
            Refused,
            Script {
                header: remove("kid"),
                keys: change(|set| {
                    let mut twin = set["keys"][0].clone();
                    twin["kid"] = "twin".into();
                    set["keys"].as_array_mut().unwrap().push(twin);
                }),
                ..script()
            },
        ),
        ("(kid-unknown)", Refused, Script { header: set("kid", "nobody"), ..script() }),
        (
            "(key-for-encryption)",
            Refused,
            Script { keys: change(|set| set["keys"][0]["use"] = "enc".into()), ..script() },
        ),
        (
            "(key-of-another-algorithm)",
            Refused,
            Script { keys: change(|set| set["keys"][0]["alg"] = "ES384".into()), ..script() },
        ),
        ("oidcc-client-test-missing-iat", Refused, Script { claims: remove("iat"), ..script() }),
        ("oidcc-client-test-missing-sub", Refused, Script { claims: remove("sub"), ..script() }),
        ("oidcc-client-test-missing-aud", Refused, Script { claims: remove("aud"), ..script() }),
        ("(missing-iss)", Refused, Script { claims: remove("iss"), ..script() }),
        ("(missing-exp)", Refused, Script { claims: remove("exp"), ..script() }),
        ("(expired)", Refused, Script { claims: moved("exp", -400), ..script() }),
        ("(issued-in-the-future)", Refused, Script { claims: moved("iat", 600), ..script() }),
        (
            "(not-valid-yet)",
            Refused,
            Script {
                claims: change(|claims| claims["nbf"] = (claims["iat"].as_i64().unwrap() + 600).into()),
                ..script()
            },
        ),
        (
            "(clock-a-minute-slow)",
            LoggedIn,
            Script {
                claims: change(|claims| {
                    for name in ["iat", "exp", "auth_time"] {
                        claims[name] = (claims[name].as_i64().unwrap() - 50).into();
                    }
                }),
                ..script()
            },
        ),
        ("oidcc-client-test-invalid-iss", Refused, Script { claims: set("iss", "https://other.example"), ..script() }),
        (
            "(iss-with-final-slash)",
            Refused,
            Script {
                claims: change(|claims| claims["iss"] = format!("{}/", claims["iss"].as_str().unwrap()).into()),
                ..script()
            },
        ),
        ("oidcc-client-test-invalid-aud", Refused, Script { claims: set("aud", "somebody-else"), ..script() }),
        ("(aud-as-array)", LoggedIn, Script { claims: set("aud", json!([CLIENT_ID])), ..script() }),
        ("(aud-several-without-azp)", Refused, Script { claims: set("aud", json!([CLIENT_ID, "other"])), ..script() }),
        (
            "(aud-several-with-our-azp)",
            LoggedIn,
            Script {
                claims: change(|claims| {
                    claims["aud"] = json!([CLIENT_ID, "other"]);
                    claims["azp"] = CLIENT_ID.into();
                }),
                ..script()
            },
        ),
        ("(azp-of-somebody-else)", Refused, Script { claims: set("azp", "other"), ..script() }),
        ("oidcc-client-test-nonce-invalid", Refused, Script { claims: set("nonce", "another"), ..script() }),
        ("(nonce-missing)", Refused, Script { claims: remove("nonce"), ..script() }),
        (
            "oidcc-client-test-invalid-athash",
            Refused,
            Script { claims: set("at_hash", "AAAAAAAAAAAAAAAAAAAAAA"), ..script() },
        ),
        ("(athash-missing)", LoggedIn, Script { claims: remove("at_hash"), ..script() }),
        ("(sub-too-long)", Refused, Script { claims: set("sub", "s".repeat(256)), ..script() }),
        (
            "(user-with-line-break)",
            Refused,
            Script { claims: set("preferred_username", "ann\r\nX-Admin: yes"), ..script() },
        ),
        (
            "(user-missing-everywhere)",
            Refused,
            Script { claims: remove("preferred_username"), userinfo: remove("preferred_username"), ..script() },
        ),
        // UserInfo.
        ("oidcc-client-test-userinfo-bearer-header", LoggedIn, Script { claims: remove("name"), ..script() }),
        (
            "oidcc-client-test-userinfo-invalid-sub",
            Refused,
            Script { claims: remove("name"), userinfo: set("sub", "somebody else"), ..script() },
        ),
        ("(userinfo-without-sub)", Refused, Script { claims: remove("name"), userinfo: remove("sub"), ..script() }),
        (
            "(userinfo-fails)",
            Refused,
            Script { claims: remove("name"), failing: [("/userinfo", 500)].into(), ..script() },
        ),
        ("(userinfo-signed)", LoggedIn, signed_userinfo(Signing::Es256, None)),
        ("(userinfo-signed-with-none)", Refused, signed_userinfo(Signing::None, None)),
        ("(userinfo-signed-with-secret)", Refused, signed_userinfo(Signing::Hs256, None)),
        ("(userinfo-signed-by-impostor)", Refused, signed_userinfo(Signing::Impostor, None)),
        ("(userinfo-signed-and-damaged)", Refused, signed_userinfo(Signing::Damaged, None)),
        (
            "(userinfo-signed-by-another-issuer)",
            Refused,
            signed_userinfo(Signing::Es256, set("iss", "https://other.example")),
        ),
        ("(userinfo-signed-for-somebody-else)", Refused, signed_userinfo(Signing::Es256, set("aud", "other"))),
        ("(userinfo-signed-invalid-sub)", Refused, signed_userinfo(Signing::Es256, set("sub", "somebody else"))),
        ("oidcc-client-test-scope-userinfo-claims", LoggedIn, Script { claims: remove("email"), ..script() }),
        (
            "oidcc-client-test-aggregated-claims",
            LoggedIn,
            Script { claims: set("_claim_names", json!({ "x": "src1" })), ..script() },
        ),
        (
            "oidcc-client-test-distributed-claims",
            LoggedIn,
            Script {
                claims: set("_claim_sources", json!({ "src1": { "endpoint": "http://127.0.0.1:1/" } })),
                ..script()
            },
        ),
        // The token endpoint.
        ("(no-id-token)", Refused, Script { tokens: remove("id_token"), ..script() }),
        ("(id-token-is-no-jwt)", Refused, Script { tokens: set("id_token", "a.b"), ..script() }),
        (
            "(id-token-with-five-parts)",
            Refused,
            Script {
                tokens: change(|tokens| {
                    tokens["id_token"] = format!("{}.x.y", tokens["id_token"].as_str().unwrap()).into()
                }),
                ..script()
            },
        ),
        ("(token-type-mac)", Refused, Script { tokens: set("token_type", "mac"), ..script() }),
        ("(token-type-in-lower-case)", LoggedIn, Script { tokens: set("token_type", "bearer"), ..script() }),
        ("(expires-in-as-text)", LoggedIn, Script { tokens: set("expires_in", "3600"), ..script() }),
        ("(token-endpoint-says-no)", Refused, Script { failing: [("/token", 400)].into(), ..script() }),
        ("(token-endpoint-fails)", Refused, Script { failing: [("/token", 500)].into(), ..script() }),
        ("(token-endpoint-redirects)", Refused, Script { failing: [("/token", 302)].into(), ..script() }),
        ("(token-answer-too-large)", Refused, Script { tokens: set("padding", "x".repeat(2 << 20)), ..script() }),
        ("(id-token-too-large)", Refused, Script { claims: set("padding", "x".repeat(80 << 10)), ..script() }),
        // The callback.
        (
            "oidcc-client-test-invalid-state",
            Refused,
            Script { callback: set("state", "another-state-of-nobody"), ..script() },
        ),
        ("(state-missing)", Refused, Script { callback: remove("state"), ..script() }),
        (
            "(state-twice)",
            Refused,
            Script { callback: change(|query| query["state"] = json!([query["state"], query["state"]])), ..script() },
        ),
        (
            "(state-with-a-good-beginning)",
            Refused,
            Script {
                callback: change(|query| {
                    query["state"] = format!("{}AAAAAAAAAAAAAA", &query["state"].as_str().unwrap()[..8]).into()
                }),
                ..script()
            },
        ),
        ("(code-missing)", Refused, Script { callback: remove("code"), ..script() }),
        (
            "(code-twice)",
            Refused,
            Script { callback: change(|query| query["code"] = json!([query["code"], "other"])), ..script() },
        ),
        ("(code-of-somebody-else)", Refused, Script { callback: set("code", "stolen"), ..script() }),
        ("(code-and-error)", Refused, Script { callback: set("error", "access_denied"), ..script() }),
        (
            "(error-access-denied)",
            Refused,
            Script {
                callback: change(|query| {
                    query["error"] = "access_denied".into();
                    query.as_object_mut().unwrap().remove("code");
                }),
                ..script()
            },
        ),
        (
            "(error-with-markup)",
            Refused,
            Script {
                callback: change(|query| {
                    query["error"] = "<script>alert(1)</script>".into();
                    query["error_description"] = "<script>alert(1)</script>".into();
                    query.as_object_mut().unwrap().remove("code");
                }),
                ..script()
            },
        ),
        // Mix-up (RFC 9207).
        (
            "oidcc-client-test-iss-parameter-mismatch",
            Refused,
            Script { callback: set("iss", "https://other.example"), ..script() },
        ),
        (
            "(iss-parameter-promised-and-missing)",
            Refused,
            Script { metadata: set("authorization_response_iss_parameter_supported", true), ..script() },
        ),
        // Discovery.
        ("oidcc-client-test-discovery-openid-config", LoggedIn, script()),
        ("oidcc-client-test-discovery-jwks-uri-keys", LoggedIn, script()),
        (
            "oidcc-client-test-discovery-issuer-mismatch",
            NotSent,
            Script { metadata: set("issuer", "https://other.example"), ..script() },
        ),
        ("(discovery-without-token-endpoint)", NotSent, Script { metadata: remove("token_endpoint"), ..script() }),
        (
            "(discovery-plain-http-endpoint)",
            NotSent,
            Script { metadata: set("token_endpoint", "http://p.example/token"), ..script() },
        ),
        (
            "(discovery-endpoint-of-another-scheme)",
            NotSent,
            Script { metadata: set("jwks_uri", "file:///etc/passwd"), ..script() },
        ),
        (
            "(discovery-endpoint-with-line-break)",
            NotSent,
            Script { metadata: set("authorization_endpoint", "https://p.example/\r\nX: y"), ..script() },
        ),
        (
            "(discovery-fails)",
            NotSent,
            Script { failing: [("/.well-known/openid-configuration", 500)].into(), ..script() },
        ),
        (
            "(discovery-redirects)",
            NotSent,
            Script { failing: [("/.well-known/openid-configuration", 302)].into(), ..script() },
        ),
        ("(jwks-is-no-set)", NotSent, Script { keys: remove("keys"), ..script() }),
        ("(jwks-empty)", Refused, Script { keys: set("keys", json!([])), ..script() }),
    ]
}

#[test]
fn a_provider_that_breaks_a_rule_logs_nobody_in() {
    let backend = Backend::echo();
    let cases = cases();
    assert!(60 < cases.len(), "only {} cases", cases.len());
    // One gateway, and a provider for each case.
    let cases: Vec<_> = cases.into_iter().map(|case| (FakeProvider::start(), case)).collect();
    let first = FakeProvider::start();
    let mut setup = gateway(&backend, &first, "");
    for (index, (provider, _)) in cases.iter().enumerate() {
        setup = setup.with(&provider.table(&format!("case-{index}"), ""));
    }
    let gateway = setup.start();
    for (index, (provider, (name, expected, script))) in cases.into_iter().enumerate() {
        provider.play(script);
        let client = browser(&gateway);
        let sent = client.navigate(&format!("/.cloakroom/oidc/case-{index}/login")).send();
        let (verdict, answer) = if sent.status == 303 {
            let answer = client.navigate(own_path(&provider.authorize(&location(&sent)))).send();
            (if answer.status == 303 { LoggedIn } else { Refused }, answer)
        } else {
            (NotSent, sent)
        };
        assert_eq!(verdict, expected, "{name}: {} {}", answer.status, answer.text());
        let known = client.get("/.cloakroom/session").send().status == 200;
        assert_eq!(known, verdict == LoggedIn, "{name}: a session exactly when the login was good");
        assert_eq!(client.cookie("session").is_some(), verdict == LoggedIn, "{name}");
        assert!(!answer.text().contains("<script"), "{name}: nothing that the provider says stands in a page");
        if verdict != LoggedIn {
            assert!([400, 403, 502, 503].contains(&answer.status), "{name}: {}", answer.status);
            assert!(answer.text().contains("href="), "{name}: a page says the next move: {}", answer.text());
        }
    }
}

/// `oidcc-client-test-signing-key-rotation` and `-just-before-signing`.
#[test]
fn new_keys_are_fetched_when_they_are_met_and_not_without_end() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    logged_in(&gateway, &provider);
    assert_eq!(provider.count("/jwks"), 1);
    let client = browser(&gateway);
    let target = location(&client.navigate(LOGIN).send());
    provider.rotate_keys();
    let answer = client.navigate(own_path(&provider.authorize(&target))).send();
    assert_eq!(answer.status, 303, "the keys changed between the request and the answer: {}", answer.text());
    assert_eq!(provider.count("/jwks"), 2);

    provider.play(Script { header: set("kid", "nobody"), ..Script::default() });
    for _ in 0..5 {
        assert_eq!(log_in(&browser(&gateway), &provider, LOGIN).status, 503, "nobody has looked for this one");
    }
    assert_eq!(provider.count("/jwks"), 2, "whoever shows unknown keys makes us ask no more than once a minute");
}

/// `oidcc-client-test-refresh-token` and its invalid relatives are in `oidc.rs`, with the sessions that they end.
#[test]
fn an_answer_is_good_for_once() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);
    let target = location(&client.navigate(LOGIN).send());
    let kept: Vec<_> = client.cookies();
    let callback = provider.authorize(&target);
    assert_eq!(client.navigate(own_path(&callback)).send().status, 303);
    let thief = browser(&gateway);
    kept.iter().for_each(|(name, value)| thief.set_cookie(name, value));
    let again = thief.navigate(own_path(&callback)).send();
    assert_eq!(again.status, 400, "a copy of the cookie is worth nothing once it was used: {}", again.text());
}

#[test]
fn an_attempt_is_bound_to_its_cookie_and_cannot_be_made_or_moved() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = browser(&gateway);
    let callback = provider.authorize(&location(&client.navigate(LOGIN).send()));
    let (name, value) = client.cookies().into_iter().find(|(name, _)| name.contains("attempt")).unwrap();
    let (begun, sealed) = value.split_once('.').unwrap();
    let mut damaged = sealed.to_owned().into_bytes();
    damaged[40] = if damaged[40] == b'A' { b'B' } else { b'A' };
    let later = format!("{:x}", u64::from_str_radix(begun, 16).unwrap() + 1);
    for (what, forged) in [
        ("damaged", format!("{begun}.{}", String::from_utf8(damaged).unwrap())),
        ("prolonged", format!("{later}.{sealed}")),
        ("cut", format!("{begun}.{}", &sealed[..30])),
        ("empty", String::new()),
    ] {
        let other = browser(&gateway);
        other.set_cookie(&name, &forged);
        assert_eq!(other.navigate(own_path(&callback)).send().status, 400, "{what}");
    }
    assert_eq!(client.navigate(own_path(&callback)).send().status, 303, "the real one is good");
}

/// `oidcc-client-test-rp-backchannel-*`: each breaks one rule of a logout token.
#[test]
fn a_logout_token_that_breaks_a_rule_ends_nothing() {
    const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let client = logged_in(&gateway, &provider);
    let is_logged_in = || client.get("/.cloakroom/session").send().status == 200;
    let default = || Script::default();
    type Claims = fn(&mut Value);
    let unchanged: Claims = |_| {};
    let cases: Vec<(&str, Script, Claims)> = vec![
        ("oidcc-client-test-rp-backchannel-rpinitlogout-wrong-issuer", default(), |claims| {
            claims["iss"] = "https://other.example".into()
        }),
        ("oidcc-client-test-rp-backchannel-rpinitlogout-wrong-aud", default(), |claims| claims["aud"] = "other".into()),
        ("oidcc-client-test-rp-backchannel-rpinitlogout-with-nonce", default(), |claims| claims["nonce"] = "n".into()),
        ("oidcc-client-test-rp-backchannel-rpinitlogout-no-events", default(), |claims| {
            drop(claims.as_object_mut().unwrap().remove("events"))
        }),
        ("oidcc-client-test-rp-backchannel-rpinitlogout-wrong-event", default(), |claims| {
            claims["events"] = json!({ "http://other": {} })
        }),
        ("(event-is-no-object)", default(), |claims| claims["events"] = json!({ EVENT: 1 })),
        (
            "oidcc-client-test-rp-backchannel-rpinitlogout-alg-none",
            Script { signing: Signing::None, ..default() },
            unchanged,
        ),
        ("(alg-hs256)", Script { signing: Signing::Hs256, ..default() }, unchanged),
        ("(signature-damaged)", Script { signing: Signing::Damaged, ..default() }, unchanged),
        ("(signed-by-impostor)", Script { signing: Signing::Impostor, ..default() }, unchanged),
        ("(typ-of-access-token)", Script { header: set("typ", "at+jwt"), ..default() }, unchanged),
        ("(without-jti)", default(), |claims| drop(claims.as_object_mut().unwrap().remove("jti"))),
        ("(without-iat)", default(), |claims| drop(claims.as_object_mut().unwrap().remove("iat"))),
        ("(without-exp)", default(), |claims| drop(claims.as_object_mut().unwrap().remove("exp"))),
        ("(expired)", default(), |claims| claims["exp"] = 1_700_000_000.into()),
        ("(an-hour-old)", default(), |claims| claims["iat"] = (claims["iat"].as_i64().unwrap() - 3600).into()),
        ("(names-nobody)", default(), |claims| {
            claims.as_object_mut().unwrap().remove("sub");
            claims.as_object_mut().unwrap().remove("sid");
        }),
    ];
    for (name, script, claims) in cases {
        provider.play(script);
        let answer = say_logout(&gateway, &provider.logout_token(claims));
        assert_eq!(answer.status, 400, "{name}: {}", answer.text());
        assert!(is_logged_in(), "{name}");
    }
    provider.play(default());
    for (what, token) in [("nothing", ""), ("no token", "hello"), ("no claims", "e30.e30.")] {
        assert_eq!(say_logout(&gateway, token).status, 400, "{what}");
    }
    assert_eq!(gateway.client().get("/.cloakroom/oidc/fake/backchannel").send().status, 405, "POST only");
    assert!(is_logged_in());
    let of_nobody = provider.logout_token(|claims| claims["sid"] = "of nobody".into());
    assert_eq!(say_logout(&gateway, &of_nobody).status, 200, "a logout of nobody is done at once");
    assert!(is_logged_in());
    assert_eq!(say_logout(&gateway, &provider.logout_token(unchanged)).status, 200, "a good one ends it");
    assert!(!is_logged_in());
}

/// A page of another site may begin a login (OpenID Connect Core 1.0, section 4), and lead it to no place but ours.
#[test]
fn a_login_leads_to_a_page_of_ours_whoever_began_it() {
    let (backend, provider) = (Backend::echo(), FakeProvider::start());
    let gateway = gateway(&backend, &provider, "").start();
    let issuer = provider.issuer();
    let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let cases = [
        ("return_to=%2Fa%3Fb%3Dc".to_owned(), "/a?b=c"),
        ("target_link_uri=http%3A%2F%2Fapp.test%2Fa".to_owned(), "/a"),
        (format!("iss={}&target_link_uri=http%3A%2F%2Fapp.test%2Fa", encoded(&issuer)), "/a"),
        ("target_link_uri=http%3A%2F%2Fapp.test.evil.example%2Fa".to_owned(), "/"),
        ("target_link_uri=http%3A%2F%2Fapp.test%40evil.example%2Fa".to_owned(), "/"),
        ("target_link_uri=https%3A%2F%2Fevil.example%2F".to_owned(), "/"),
        ("return_to=%2F%2Fevil.example".to_owned(), "/"),
        ("return_to=https%3A%2F%2Fevil.example".to_owned(), "/"),
        ("return_to=%2F%5Cevil.example".to_owned(), "/"),
        ("return_to=%2F.cloakroom%2Flogout".to_owned(), "/"),
    ];
    for (query, expected) in cases {
        let answer = log_in(&browser(&gateway), &provider, &format!("{LOGIN}?{query}"));
        assert_eq!((answer.status, location(&answer).as_str()), (303, expected), "{query}");
    }
    let other = browser(&gateway).navigate(&format!("{LOGIN}?iss=https%3A%2F%2Fother.example")).send();
    assert_eq!(other.status, 400, "a login that is meant for another provider is not begun here");
}
