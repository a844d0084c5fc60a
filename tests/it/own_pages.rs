//! Do our own pages keep a user in control, and lead nobody astray? Sessions, forms that came too late, redirects.

use serde_json::{Value, json};

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Response};
use crate::harness::gateway::{Form, Gateway, Store};
use crate::harness::redis::RedisServer;

/// The user's own sessions, as a front end gets them.
#[track_caller]
fn listed(client: &Client) -> Value {
    let answer = client.get("/.cloakroom/sessions").header("Sec-Fetch-Site", "same-origin").send();
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_str(&answer.text()).unwrap()
}

/// Ends what a front end names.
fn end(client: &Client, csrf: &str, what: &str) -> Response {
    client
        .request("POST", "/.cloakroom/sessions")
        .header("Sec-Fetch-Site", "same-origin")
        .header("Sec-Fetch-Mode", "cors")
        .header("Content-Type", "application/x-www-form-urlencoded")
        .body(format!("csrf={csrf}&end={what}"))
        .send()
}

#[test]
fn what_a_user_ends_on_one_gateway_has_ended_on_the_other() {
    let (backend, redis) = (Backend::echo(), RedisServer::start());
    let setup = Gateway::in_front_of(&[&backend]).store(Store::of(&redis));
    let (one, two) = (setup.clone().start(), setup.start());
    let (laptop, phone, tablet, bob) = (one.log_in("ann"), two.log_in("ann"), two.log_in("ann"), two.log_in("bob"));
    assert_eq!([&phone, &tablet].map(|client| client.get("/").send().status), [200; 2], "both are known to the other");

    let list = listed(&laptop);
    let sessions = list["sessions"].as_array().unwrap();
    assert_eq!(sessions.len(), 3);
    let others: Vec<_> = sessions.iter().filter(|session| session["current"] == false).collect();
    assert_eq!(others.len(), 2);
    let csrf = list["csrf"].as_str().unwrap();
    assert_eq!(end(&laptop, csrf, others[0]["session"].as_str().unwrap()).text(), json!({ "ended": 1 }).to_string());
    let left = [&phone, &tablet].iter().filter(|client| client.get("/").send().status == 200).count();
    assert_eq!(left, 1, "a logout is seen by both, before anything is served from a copy");

    assert_eq!(end(&laptop, csrf, "others").text(), json!({ "ended": 1 }).to_string());
    assert_eq!([&phone, &tablet].map(|client| client.get("/").send().status), [401; 2]);
    assert_eq!([&laptop, &bob].map(|client| client.get("/").send().status), [200; 2], "these were not meant");
    let page = phone.navigate("/").send();
    assert!(page.header("location").unwrap().ends_with("reason=revoked"), "and it is said why: {page:?}");
}

#[test]
fn the_page_ends_sessions_without_any_script() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).start();
    let (laptop, phone) = (gateway.log_in("ann"), gateway.log_in("ann"));
    let page = laptop.navigate("/.cloakroom/sessions").send().text();
    let forms: Vec<_> = page.match_indices("<form").map(|(at, _)| Form::on(&page[at..])).collect();
    assert_eq!(forms.len(), 3, "log out here, end the other, end all others: {page}");
    let fields: Vec<_> = forms[1].fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let answer = laptop.post_form(forms[1].action.as_deref().unwrap(), &fields).send();
    assert_eq!((answer.status, answer.header("location")), (303, Some("/.cloakroom/sessions?done")));
    assert_eq!(phone.get("/").send().status, 401);
    assert!(laptop.navigate("/.cloakroom/sessions?done").send().text().contains("role=\"status\""));
}

#[test]
fn a_form_that_comes_too_late_is_not_lost_silently() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).start();
    let client = gateway.log_in("ann");
    let admin = gateway.log_in("ann");
    let csrf = listed(&admin)["csrf"].as_str().unwrap().to_owned();
    assert_eq!(client.get("/orders/new?for=bob").send().status, 200, "the page with the form");
    assert_eq!(end(&admin, &csrf, "others").status, 200, "and then the session ends");
    let asked = backend.bytes();

    let form = [("article", "7"), ("count", "1")];
    let referer = format!("{}/orders/new?for=bob", client.origin());
    let program = client
        .request("POST", "/orders")
        .header("Sec-Fetch-Mode", "cors")
        .header("Content-Type", "application/x-www-form-urlencoded")
        .header("Referer", &referer)
        .body("article=7")
        .send();
    assert_eq!(program.status, 401, "a fetch learns the truth");
    let sent = client.post_form("/orders", &form).header("Referer", &referer).send();
    assert_eq!(sent.status, 303, "a navigation goes on with GET");
    assert_eq!(backend.bytes(), asked, "and no backend saw either");
    let login = sent.header("location").unwrap().to_owned();

    let page = client.navigate(&login).send().text();
    assert!(page.contains("was not taken"), "it is said: {page}");
    let fields = Form::on(&page).filled_in(&[("username", "ann"), ("password", crate::harness::gateway::PASSWORD)]);
    let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let back = client.post_form("/.cloakroom/login", &fields).send();
    assert_eq!((back.status, back.header("location")), (303, Some("/orders/new?for=bob")), "back at the form");
}

#[test]
fn a_form_from_nowhere_leads_to_the_front_page() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).start();
    let client = gateway.client();
    for referer in ["https://evil.example/orders", "http://127.0.0.1/orders", "not a URL", ""] {
        let sent = client.post_form("/orders", &[("a", "b")]).header("Referer", referer).send();
        assert_eq!((sent.status, sent.header("location")), (303, Some("/.cloakroom/login?reason=unsent")), "{referer}");
    }
}
