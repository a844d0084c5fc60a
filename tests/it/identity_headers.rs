//! Can a client say who it is? Every identity name, in every spelling, on every kind of route (invariants 1 and 2).

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Seen};
use crate::harness::gateway::{Gateway, Setup};

/// What no client may ever say with effect. If it reaches a backend under any name of the table, it shows.
const FORGED: &str = "mallory-the-forger";

/// Names of every preset, the configured ones, and members of every reserved family. Written out here, not taken
/// from the code: the code is what is tested.
const NAMES: &[&str] = &[
    "X-Forwarded-User",
    "X-Forwarded-Email",
    "X-Forwarded-Groups",
    "X-Forwarded-Preferred-Username",
    "X-Forwarded-Access-Token",
    "Remote-User",
    "Remote-Name",
    "Remote-Email",
    "Remote-Groups",
    "X-Auth-Request-User",
    "X-Auth-Request-Email",
    "X-Auth-Request-Groups",
    "X-Auth-Request-Preferred-Username",
    "X-Auth-Request-Access-Token",
    "iv-user",
    "iv-groups",
    "iv-creds",
    "am-eai-user-id",
    "OIDC-Claim-Sub",
    "OIDC-Claim-Email",
    "OIDC-Claim-Anything-Else",
    "X-Authentik-Username",
    "X-Authentik-Groups",
    "X-Authentik-Email",
    "X-Authentik-Name",
    "X-Webauth-User",
    "X-Webauth-Email",
    "X-Webauth-Name",
    "X-Webauth-Groups",
    "X-Team",
    "X-Legacy-Login",
];

/// Forwarding names that an untrusted client may not fill in either.
const FORWARDING: &[&str] = &[
    "X-Forwarded-For",
    "X-Forwarded-Proto",
    "X-Forwarded-Host",
    "X-Forwarded-Port",
    "X-Forwarded-Prefix",
    "X-Forwarded-Uri",
    "X-Forwarded-Method",
    "X-Forwarded-Server",
    "X-Forwarded-Tls-Client-Cert",
    "X-Real-Ip",
    "X-Scheme",
    "Forwarded",
    "X-Original-Url",
    "X-Rewrite-Url",
];

/// The ways to write a name so that some backend reads it as that name.
fn spellings(name: &str) -> Vec<String> {
    let alternate = |lower_first: bool| -> String {
        let up = |index: usize| index.is_multiple_of(2) != lower_first;
        let letter =
            |(index, c): (usize, char)| if up(index) { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
        name.chars().enumerate().map(letter).collect()
    };
    let underscored = name.replace('-', "_");
    vec![
        name.to_owned(),
        name.to_ascii_lowercase(),
        name.to_ascii_uppercase(),
        underscored.clone(),
        underscored.to_ascii_lowercase(),
        underscored.to_ascii_uppercase(),
        name.replacen('-', "_", 1),
        name.rsplit_once('-').map_or_else(|| name.to_owned(), |(head, tail)| format!("{head}_{tail}")),
        alternate(false),
        alternate(true),
    ]
}

/// Spellings that no HTTP server needs and that the guard refuses whole.
fn odd_spellings(name: &str) -> Vec<String> {
    vec![name.replace('-', "."), name.replace('-', "~"), format!("{name}~"), name.replace('-', "+")]
}

fn setup(backend: &Backend) -> Setup {
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/public", "access = \"public\"")
        .route("/optional", "access = \"optional\"")
        .route("/required", "access = \"required\"")
        .route("/staff", "groups = [\"nobody-is-in-it\"]")
        .with("[identity]\nstrip = [\"X-Legacy-Login\"]\nheaders = { \"X-Team\" = \"{groups}\" }")
}

/// Asks in one way; whatever comes back, what counts is what the backend got.
type Way = (&'static str, fn(&Client, &[(String, String)]));

const WAYS: &[Way] = &[
    ("public", |client, fields| send(client, "GET", "/public/x", fields)),
    ("optional", |client, fields| send(client, "GET", "/optional/x", fields)),
    ("required", |client, fields| send(client, "GET", "/required/x", fields)),
    ("post", |client, fields| send(client, "POST", "/required/x", fields)),
    ("login", |client, fields| send(client, "GET", "/.cloakroom/login", fields)),
    ("login post", |client, fields| send(client, "POST", "/.cloakroom/login", fields)),
    ("error 403", |client, fields| send(client, "GET", "/staff", fields)),
    ("options", |client, fields| send(client, "OPTIONS", "/required/x", fields)),
    ("options public", |client, fields| send(client, "OPTIONS", "/public/x", fields)),
    ("websocket", |client, fields| {
        let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let _ = client.web_socket("/required/socket", &fields);
        let _ = client.web_socket("/public/socket", &fields);
    }),
];

fn send(client: &Client, method: &str, target: &str, fields: &[(String, String)]) {
    let mut request = client.request(method, target);
    if method == "POST" {
        request = request.header("Content-Type", "application/x-www-form-urlencoded").body("a=b");
    }
    for (name, value) in fields {
        request = request.header(name, value);
    }
    let _ = request.try_send();
}

#[test]
fn a_forged_identity_header_never_reaches_the_backend() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let (stranger, ann) = (gateway.client(), gateway.log_in("ann"));
    let spelled: Vec<Vec<String>> = NAMES.iter().chain(FORWARDING).map(|name| spellings(name)).collect();
    assert!(spelled.iter().all(|list| 8 <= list.len()), "eight spellings of each, at least");

    for (way, ask) in WAYS {
        for spelling in 0..spelled[0].len() {
            let fields: Vec<_> = spelled.iter().map(|list| (list[spelling].clone(), FORGED.to_owned())).collect();
            for client in [&stranger, &ann] {
                ask(client, &fields);
                assert!(!backend.has_received(FORGED), "{way}, spelled like {:?}: {:?}", fields[0].0, leaks(&backend));
            }
        }
    }
    assert!(50 < backend.requests().len(), "most of these were forwarded, without the forgery");
}

/// The lines in which the forgery arrived.
fn leaks(backend: &Backend) -> Vec<String> {
    let received = backend.received().into_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let lines = received.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    lines.filter(|line| line.contains(FORGED)).collect()
}

#[test]
fn a_forged_header_cannot_hide_behind_a_second_copy_or_a_nomination() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    for name in ["X-Forwarded-User", "x_forwarded_user", "X-Team", "Remote-User"] {
        for order in [[FORGED, "ann"], ["ann", FORGED], ["", FORGED]] {
            let request = ann.get("/required/x").header(name, order[0]).header(name, order[1]);
            let seen = request.send().seen();
            assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "{name} {order:?}");
        }
        let response = ann.get("/required/x").header("Connection", &format!("keep-alive, {name}")).send();
        if response.status != 400 {
            let seen = response.seen();
            assert_eq!(seen.headers("x-forwarded-user"), ["ann"], "Connection: {name} must not remove what we add");
            assert_eq!(seen.headers("x-team"), ["staff"], "Connection: {name} must not remove what we add");
        }
    }
    assert!(!backend.has_received(FORGED));
}

#[test]
fn a_name_that_only_some_servers_read_as_an_identity_is_refused() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let client = gateway.client();
    for name in ["X-Forwarded-User", "Remote-User", "iv-user"].into_iter().flat_map(odd_spellings) {
        let response = client.get("/public/x").header(&name, FORGED).send();
        assert_eq!(response.status, 400, "{name}");
    }
    assert_eq!(backend.bytes(), 0, "nothing of it reached a backend");
}

#[test]
fn the_session_alone_says_who_the_user_is() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let headers = |seen: &Seen, name: &str| seen.headers(name).join("|");
    for target in ["/optional/x", "/required/x"] {
        let seen = gateway.log_in("ann").get(target).send().seen();
        assert_eq!(headers(&seen, "x-forwarded-user"), "ann", "{target}");
        assert_eq!(headers(&seen, "x-forwarded-email"), "ann@example.org", "{target}");
        assert_eq!(headers(&seen, "x-forwarded-groups"), "staff", "{target}");
        assert_eq!(headers(&seen, "x-team"), "staff", "{target}");
    }
    for (client, target) in [(gateway.client(), "/optional/x"), (gateway.log_in("ann"), "/public/x")] {
        let seen = client.get(target).send().seen();
        for name in NAMES {
            assert!(seen.headers(name).is_empty(), "{target}: {name} says somebody is there");
        }
    }
    let seen = gateway.log_in("bob").get("/required/x").send().seen();
    assert!(seen.headers("x-forwarded-groups").is_empty(), "no group, no header");
}

#[test]
fn a_web_socket_carries_the_identity() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    let mut socket = ann.web_socket("/required/socket", &[("X-Forwarded-User", FORGED)]).unwrap();
    socket.write("ping");
    assert_eq!(socket.read_exactly(4).unwrap(), b"ping", "messages pass");
    let request = backend.after_requests(1).remove(0);
    assert_eq!(request.head.values("x-forwarded-user"), ["ann"]);
    assert!(!request.head.values("cookie").concat().contains("session="), "the session cookie stays here");
}

#[test]
fn a_web_socket_needs_a_session_and_our_own_origin() {
    let backend = Backend::echo();
    let gateway = setup(&backend).route("/chat", "websocket_origins = [\"https://app.example.org\"]").start();
    let ann = gateway.log_in("ann");
    let status = |client: &Client, target: &str, origin: &str| match client.web_socket(target, &[("Origin", origin)]) {
        Ok(_) => 101,
        Err(response) => response.status,
    };
    let own = ann.origin();
    assert_eq!(status(&gateway.client(), "/required/socket", &own), 401, "no session, no socket");
    assert_eq!(status(&ann, "/required/socket", &own), 101);
    assert_eq!(status(&ann, "/chat", "https://app.example.org"), 101, "an origin of the route's list");
    for foreign in [
        "https://evil.example",
        "null",
        &format!("{own}.evil.example"),
        &own.replace("http://", "https://"),
        "http://127.0.0.1",
        "https://app.example.org",
    ] {
        assert_eq!(status(&ann, "/required/socket", foreign), 403, "{foreign}");
    }
    assert_eq!(backend.requests().len(), 2, "only what was allowed reached the backend");
}

#[test]
fn our_cookies_never_travel_to_a_backend() {
    let backend = Backend::echo();
    let gateway = setup(&backend).start();
    let ann = gateway.log_in("ann");
    let session = ann.cookie("session").expect("a session cookie");
    ann.set_cookie("theme", "dark");
    for target in ["/public/x", "/optional/x", "/required/x"] {
        for extra in [
            "",
            "SESSION=x",
            "__Host-session=x",
            "__HOST-SESSION=x",
            "session-login=x",
            "__Host-session-login=x",
            "Session-Login=x; a=b",
        ] {
            let mut request = ann.get(target);
            if !extra.is_empty() {
                request = request.header("Cookie", extra);
            }
            let seen = request.send().seen();
            let cookies = seen.headers("cookie");
            assert_eq!(cookies.len(), 1, "several Cookie lines are joined: {cookies:?}");
            assert!(cookies[0].contains("theme=dark"), "{cookies:?}");
            assert!(!cookies[0].to_ascii_lowercase().contains("session"), "{target} {extra:?}: {cookies:?}");
        }
    }
    assert!(!backend.has_received(&session), "not in any other field either");
}

#[test]
fn a_backend_cannot_set_our_cookies() {
    let fields = [
        ("Set-Cookie", "session=forged; Path=/"),
        ("Set-Cookie", "SESSION=forged"),
        ("set-cookie", " __Host-session=forged; Secure; Path=/"),
        ("Set-Cookie", "session-login=forged"),
        ("Set-Cookie", "session"),
        ("Set-Cookie", "theme=dark; Path=/"),
        ("Set-Cookie", "mysession=1"),
    ];
    let backend = Backend::always(Answer::response(200, &fields, ""));
    let gateway = setup(&backend).start();
    for client in [gateway.client(), gateway.log_in("ann")] {
        let before = client.cookie("session");
        let response = client.get("/public/x").send();
        assert_eq!(response.headers("set-cookie"), ["theme=dark; Path=/", "mysession=1"]);
        assert_eq!(client.cookie("session"), before);
    }
}
