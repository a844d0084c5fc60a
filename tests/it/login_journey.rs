//! Can people log in and out, and can nobody else? Through the real pages, as a browser goes through them.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Response};
use crate::harness::gateway::{Form, Gateway, PASSWORD, Store};
use crate::harness::redis::RedisServer;

fn gateway(backend: &Backend) -> Gateway {
    Gateway::in_front_of(&[backend]).user("eve", "disabled = true").start()
}

#[test]
fn somebody_logs_in_stays_in_and_logs_out() {
    let (one, two) = (Backend::echo(), Backend::echo());
    let gateway = Gateway::in_front_of(&[&one, &two]).start();
    let client = gateway.client();

    let sent = client.navigate("/report?year=2026").send();
    assert_eq!(sent.status, 302);
    let login = sent.header("location").unwrap().to_owned();
    let page = client.navigate(&login).send();
    let form = Form::on(&page.text()).filled_in(&[("username", "ann"), ("password", PASSWORD)]);
    let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let response = client.post_form("/.cloakroom/login", &fields).send();
    assert_eq!(
        (response.status, response.header("location")),
        (303, Some("/report?year=2026")),
        "back to where it began"
    );

    let answered: Vec<_> = (0..4).map(|_| client.get("/").send().seen().backend).collect();
    assert_ne!(answered[0], answered[1], "any backend answers");

    let confirm = client.navigate("/.cloakroom/logout").send();
    assert_eq!(confirm.status, 200);
    assert_eq!(client.get("/").send().status, 200, "asking is not yet logging out");
    let old = client.cookie("session").unwrap();
    let form = Form::on(&confirm.text()).filled_in(&[]);
    let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let out = client.post_form("/.cloakroom/logout", &fields).send();
    assert!([200, 303].contains(&out.status), "{out:?}");
    assert_eq!(client.cookie("session"), None, "the cookie is taken back");
    client.set_cookie("session", &old);
    assert_eq!(client.get("/").send().status, 401, "and a copy of it is worth nothing");
}

#[test]
fn pages_are_sent_to_the_login_and_programs_are_told() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.client();
    let page = client.navigate("/a?b=%20c").send();
    assert_eq!(page.status, 302);
    assert!(page.header("location").unwrap().starts_with("/.cloakroom/login?return_to="));
    for request in [
        client.get("/a"),
        client.get("/a").header("Accept", "application/json"),
        client.get("/a").header("Accept", "text/html").header("X-Requested-With", "XMLHttpRequest"),
        client
            .get("/a")
            .header("Accept", "text/html")
            .header("Sec-Fetch-Mode", "cors")
            .header("Sec-Fetch-Dest", "empty"),
        client.request("POST", "/a").header("Accept", "text/html").body("x"),
    ] {
        assert_eq!(request.send().status, 401);
    }
    assert_eq!(backend.bytes(), 0, "and no backend is asked");
}

#[test]
fn every_failed_login_looks_alike() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let answer = |user: &str, password: &str| {
        let response = gateway.try_log_in(&gateway.client(), user, password);
        let mut fields: Vec<_> = response.head.fields.clone();
        fields.retain(|(name, _)| !["date", "x-request-id"].contains(&name.to_ascii_lowercase().as_str()));
        fields.iter_mut().filter(|(name, _)| name.eq_ignore_ascii_case("set-cookie")).for_each(|(_, value)| {
            *value = value.split_once(';').map_or(String::new(), |(_, attributes)| attributes.to_owned());
        });
        (response.status, fields, without_tokens(&response, user))
    };
    let wrong = answer("ann", "wrong");
    assert_eq!(wrong.0, 403);
    assert_eq!(answer("xyz", "wrong"), wrong, "an unknown user");
    assert_eq!(answer("eve", PASSWORD), wrong, "a disabled user with the right password");
    assert_eq!(answer("ann", ""), wrong, "no password");
}

fn without_tokens(response: &Response, user: &str) -> String {
    let text = response.text();
    let form = Form::on(&text);
    let tokens = form.fields.iter().filter(|(name, _)| name.contains("csrf")).map(|(_, value)| value.clone());
    let id = response.header("x-request-id").unwrap_or("no id").to_owned();
    let text = tokens.chain([id]).fold(text, |text, token| text.replace(&token, ""));
    text.replace(&format!("value=\"{user}\""), "value=\"USER\"")
}

#[test]
fn a_login_gives_a_new_id_and_ends_the_old_session() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.log_in("ann");
    let first = client.cookie("session").unwrap();
    assert_eq!(relog(&gateway, &client, "bob").status, 303);
    let second = client.cookie("session").unwrap();
    assert_ne!(first, second);
    assert_eq!(client.get("/").send().seen().headers("x-forwarded-user"), ["bob"]);
    client.set_cookie("session", &first);
    assert_eq!(client.get("/").send().status, 401, "the session before it has ended");
}

/// Logs in where somebody is logged in: whatever the page then looks like, the form can be posted.
fn relog(gateway: &Gateway, client: &Client, user: &str) -> Response {
    let stranger = gateway.client();
    let page = stranger.navigate("/.cloakroom/login").send();
    for (name, value) in stranger.cookies() {
        client.set_cookie(&name, &value);
    }
    let form = Form::on(&page.text()).filled_in(&[("username", user), ("password", PASSWORD)]);
    let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    client.post_form("/.cloakroom/login", &fields).send()
}

#[test]
fn a_session_id_that_we_did_not_make_is_never_taken() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.client();
    let planted = "AA".to_owned() + &"A".repeat(43);
    client.set_cookie("session", &planted);
    assert_eq!(client.get("/").send().status, 401);
    assert_eq!(relog(&gateway, &client, "ann").status, 303);
    assert_ne!(client.cookie("session").unwrap(), planted, "fixation: the planted id gains nothing");
    let other = gateway.client();
    other.set_cookie("session", &planted);
    assert_eq!(other.get("/").send().status, 401);
}

#[test]
fn a_login_from_another_site_is_refused() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let post = |fields: &[(&str, &str)], headers: &[(&str, &str)], cookies: bool| {
        let client = gateway.client();
        let page = client.navigate("/.cloakroom/login").send();
        let mut form = Form::on(&page.text()).filled_in(&[("username", "ann"), ("password", PASSWORD)]);
        for (name, value) in fields {
            form.retain(|(n, _)| n != name);
            if !value.is_empty() {
                form.push(((*name).to_owned(), (*value).to_owned()));
            }
        }
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(&form).finish();
        let sender = if cookies { client } else { gateway.client() };
        let mut request =
            sender.request("POST", "/.cloakroom/login").header("Content-Type", "application/x-www-form-urlencoded");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let status = request.body(body).send().status;
        (status, sender.cookie("session").is_some())
    };
    let own = gateway.client().origin();
    let own = own.as_str();
    assert_eq!(post(&[], &[("Sec-Fetch-Site", "same-origin"), ("Origin", own)], true), (303, true));
    assert_eq!(post(&[], &[("Origin", own)], true), (303, true), "a browser without fetch metadata");
    for (fields, headers, cookies) in [
        (&[][..], &[("Sec-Fetch-Site", "cross-site"), ("Origin", own)][..], true),
        (&[], &[("Sec-Fetch-Site", "same-site"), ("Origin", own)], true),
        (&[], &[("Origin", "https://evil.example")], true),
        (&[], &[("Origin", "null")], true),
        (&[], &[], true),
        (&[], &[("Sec-Fetch-Site", "same-origin")], false),
        (&[("csrf", "")], &[("Sec-Fetch-Site", "same-origin")], true),
        (&[("csrf", "AAAA")], &[("Sec-Fetch-Site", "same-origin")], true),
    ] {
        let (status, logged_in) = post(fields, headers, cookies);
        assert!(!logged_in && (400..404).contains(&status), "{fields:?} {headers:?} cookies: {cookies}: {status}");
    }
    let client = gateway.client();
    let query = format!("/.cloakroom/login?username=ann&password={}", PASSWORD.replace(' ', "+"));
    client.navigate(&query).send();
    assert_eq!(client.cookie("session"), None, "credentials in a query are not looked at");
}

#[test]
fn guessing_is_slowed_down_and_the_victim_still_gets_in() {
    let backend = Backend::echo();
    let redis = RedisServer::start();
    let setup = Gateway::in_front_of(&[&backend]).store(Store::of(&redis)).with(
        "[server]\nthreads = 1\ntrusted_proxies = [\"127.0.0.1\"]\n\
         [login.password.throttle]\nper_account_and_network = 3\nper_account = 5\nper_network = 100",
    );
    let (one, two) = (setup.clone().start(), setup.start());
    let attempt = |gateway: &Gateway, address: &str, password: &str| {
        let client = gateway.client();
        let page = client.navigate("/.cloakroom/login").send();
        let form = Form::on(&page.text()).filled_in(&[("username", "ann"), ("password", password)]);
        let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        client.post_form("/.cloakroom/login", &fields).header("X-Forwarded-For", address).send()
    };
    assert_eq!(attempt(&one, "192.0.2.1", PASSWORD).status, 303, "the victim's own network is known from now on");

    let attacker: Vec<_> =
        (0..6).map(|n| attempt(if n % 2 == 0 { &one } else { &two }, "198.51.100.7", "guess")).collect();
    assert!(attacker[0].header("retry-after").is_none());
    assert!(attacker[5].header("retry-after").is_some(), "both gateways count together");
    let right = attempt(&one, "198.51.100.7", PASSWORD);
    assert_eq!(right.status, attacker[0].status, "even the right password does not help a network that guesses");
    for n in 0..5 {
        attempt(&two, &format!("198.51.100.{}", 20 + n), "guess");
    }
    assert!(attempt(&one, "203.0.113.5", PASSWORD).header("retry-after").is_some(), "the account is under attack");
    assert_eq!(attempt(&two, "192.0.2.1", PASSWORD).status, 303, "but its owner, from home, gets in");
}

#[test]
fn the_session_endpoint_tells_a_front_end_who_is_there() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let nobody = gateway.client().get("/.cloakroom/session").send();
    assert_eq!(nobody.status, 401);
    let ann = gateway.log_in("ann");
    let response = ann.get("/.cloakroom/session").send();
    let json: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!((&json["user"], &json["groups"][0]), (&"ann".into(), &"staff".into()));
    assert!(!response.text().contains(&ann.cookie("session").unwrap()), "never the id");
    assert!(response.header("cache-control").unwrap().contains("no-store"));
}

#[test]
fn the_login_page_needs_no_script_and_allows_none() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).with("[login]\ntitle = \"Ann's <shop>\"").start();
    let client = gateway.client();
    let page = client.navigate("/.cloakroom/login?return_to=%22%3E%3Cscript%3Ealert(1)%3C/script%3E").send();
    let text = page.text();
    assert!(!text.to_ascii_lowercase().contains("<script"), "{text}");
    assert!(!text.contains("<shop>") && text.contains("shop"), "the title is escaped");
    let policy = page.header("content-security-policy").unwrap();
    for directive in ["default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"] {
        assert!(policy.contains(directive), "{policy}");
    }
    assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(page.header("x-frame-options"), Some("DENY"));
    assert!(page.header("cache-control").unwrap().contains("no-store"));
    for part in ["lang=", "viewport", "<label", "autocomplete=\"username\"", "autocomplete=\"current-password\""] {
        assert!(text.contains(part), "{part}");
    }
}

#[test]
fn a_form_that_is_odd_or_large_is_refused() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.client();
    let post = |kind: &str, body: &str| {
        let request = client.request("POST", "/.cloakroom/login").header("Sec-Fetch-Site", "same-origin");
        request.header("Content-Type", kind).body(body).send().status
    };
    let form = "application/x-www-form-urlencoded";
    assert_eq!(post("application/json", "{}"), 400);
    assert_eq!(post(form, "username=a&username=b&password=c&csrf=d"), 400);
    assert_eq!(post(form, &format!("password={}", "a".repeat(9000))), 413);
    assert!([400, 403].contains(&post(form, "")));
    assert!([400, 403].contains(&post(form, "%zz%=&&&=")));
}

#[test]
fn a_user_who_is_disabled_or_removed_is_out_at_the_reload() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "")
        .route("/staff", "groups = [\"staff\"]")
        .user("carol", "groups = [\"staff\"]")
        .start();
    let carol = gateway.log_in("carol");
    assert_eq!(carol.get("/staff").send().status, 200);
    let edit = |keys: &'static str| gateway.reload(move |setup| setup.without_users().user("carol", keys)).unwrap();
    edit("groups = []");
    assert_eq!(carol.get("/staff").send().status, 403, "what the file says today counts");
    assert_eq!(carol.get("/").send().status, 200);
    edit("disabled = true");
    assert_eq!(carol.get("/").send().status, 401);
    edit("groups = [\"staff\"]");
    assert_eq!(carol.get("/staff").send().status, 200, "her session was kept: the cookie was never taken away");
}

#[test]
fn a_stylesheet_that_is_known_is_not_sent_again() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.client().allowing("etag");
    let style = client.get("/.cloakroom/style.css").send();
    let tag = style.header("etag").expect("a validator").to_owned();
    let again = client.get("/.cloakroom/style.css").header("If-None-Match", &tag).send();
    assert_eq!((again.status, again.header("content-length")), (304, None), "no length but that of the stylesheet");
    assert_eq!(client.get("/.cloakroom/session").send().status, 401, "and the connection goes on");
}

#[test]
fn nothing_outside_the_endpoints_answers_under_the_prefix() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.log_in("ann");
    for path in ["/.cloakroom/", "/.cloakroom/x", "/.cloakroom/login/x", "/.cloakroom/metrics"] {
        assert_eq!(client.get(path).send().status, 404, "{path}");
    }
    for (method, path) in [("PUT", "login"), ("DELETE", "session"), ("POST", "session"), ("PATCH", "logout")] {
        let response = client.request(method, &format!("/.cloakroom/{path}")).send();
        assert_eq!(response.status, 405, "{method} {path}");
        assert!(response.header("allow").is_some());
    }
    let forwarded = client.get("/.cloakroom-not").send();
    assert_eq!(forwarded.status, 200, "a name that only begins alike is the application's");
}

#[test]
fn the_cookies_of_other_applications_are_no_obstacle() {
    let backend = Backend::echo();
    let gateway = gateway(&backend);
    let client = gateway.client();
    let greeting = "gr\u{fc}\u{df} dich \u{1f511}";
    client.set_cookie("greeting", greeting);
    assert_eq!(gateway.try_log_in(&client, "ann", PASSWORD).status, 303, "not even one that is not ASCII");
    let seen = client.get("/").send().seen();
    assert_eq!(seen.headers("x-forwarded-user"), ["ann"]);
    let bytes: String = format!("greeting={greeting}").bytes().map(char::from).collect();
    assert_eq!(seen.headers("cookie"), [bytes], "and it arrives as it was, byte by byte");
}

#[test]
fn a_login_that_finds_no_place_is_not_held_against_anybody() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .password("hashes_max = 1")
        .with("[login.password.throttle]\nper_account_and_network = 1\nper_network = 1000000")
        .start();
    let log_in = |user: &str| gateway.try_log_in(&gateway.client(), user, PASSWORD).status;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // More than the queue takes, each as somebody else, so that the throttle stops none of them.
        for crowd in 0..90 {
            let (log_in, is_over) = (&log_in, &is_over);
            scope.spawn(move || {
                for turn in (0..1_000).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    log_in(&format!("nobody{crowd}-{turn}"));
                }
            });
        }
        let found_no_place = (0..100).any(|_| log_in("ann") == 503);
        is_over.store(true, Ordering::Relaxed);
        assert!(found_no_place, "the crowd must be large enough");
    });
    assert_eq!(log_in("ann"), 303, "nobody had looked at her password");
}
