//! What may a backend say of the session, and where? Attributes, logins and logouts by fields of its responses.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::basic::basic;
use crate::harness::backend::{Answer, Backend, Request};
use crate::harness::client::{Client, Response};
use crate::harness::gateway::{Gateway, PASSWORD, Setup, Store};
use crate::harness::redis::RedisServer;
use crate::harness::wait_until;

/// A backend that says what it is asked to: `/say?Session-Set=a%3D%221%22` is answered with that field. Its body is what
/// it was told of the session.
pub(crate) fn obliging() -> Backend {
    Backend::answering(say)
}

fn say(request: &Request) -> Answer {
    let (path, query) = request.target().split_once('?').unwrap_or((request.target(), ""));
    let asked = if request.body.is_empty() { query.as_bytes() } else { &request.body };
    let fields: Vec<_> = form_urlencoded::parse(asked).collect();
    let fields: Vec<_> = fields.iter().map(|(name, value)| (&**name, &**value)).collect();
    let told = |name: &str| request.head.values(name).join(", ");
    let body = format!("{path}|{}|{}", told("session-attributes"), told("x-forwarded-user"));
    Answer::response(200, &fields, body)
}

fn saying(path: &str, fields: &[(&str, &str)]) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    format!("{path}?{query}")
}

pub(crate) fn say_to(client: &Client, path: &str, fields: &[(&str, &str)]) -> Response {
    if 1_000 < fields.iter().map(|(_, value)| value.len()).sum::<usize>() {
        return client.post_form(path, fields).send();
    }
    client.get(&saying(path, fields)).send()
}

/// What a backend is told of the attributes, and of the user.
pub(crate) fn told(client: &Client, path: &str) -> (String, String) {
    let response = client.get(path).send();
    assert_eq!(response.status, 200, "{}", response.text());
    let text = response.text();
    let (_, told) = text.split_once('|').unwrap();
    let (attributes, user) = told.rsplit_once('|').unwrap();
    (attributes.to_owned(), user.to_owned())
}

/// `/shop` may note attributes, `/open` begins sessions of nobody, `/login` and `/leave` log in and out, the rest may
/// nothing.
fn shop(backends: &[&Backend]) -> Setup {
    Gateway::in_front_of(backends)
        .route("/", "")
        .route("/plain", "access = \"optional\"")
        .route("/public", "access = \"public\"")
        .route("/shop", "directives = [\"attributes\"]")
        .route("/open", "access = \"optional\"\ndirectives = [\"attributes\"]\nanonymous = true")
        .route("/legacy", "access = \"public\"\ndirectives = [\"login\", \"logout\"]")
        .route("/all", "access = \"optional\"\ndirectives = [\"login\", \"logout\", \"attributes\"]")
        .with("[login.backend]")
}

#[test]
fn what_one_backend_notes_the_other_one_reads() {
    let backends = [obliging(), obliging()];
    let gateway = shop(&[&backends[0], &backends[1]]).start();
    let ann = gateway.log_in("ann");
    let answer = say_to(&ann, "/shop", &[("Session-Set", "cart_id=\"5678\", theme=\"dark\"")]);
    assert_eq!(answer.status, 200);
    assert!(answer.header("session-set").is_none(), "it is not for the browser");
    for _ in 0..4 {
        assert_eq!(told(&ann, "/shop").0, "cart_id=\"5678\", theme=\"dark\"", "whichever answers");
    }
    assert_eq!(told(&ann, "/").0, "", "a route that may note nothing is told nothing");
    say_to(&ann, "/shop", &[("Session-Unset", "theme"), ("Session-Set", "name=%\"Zo%c3%ab\"")]);
    assert_eq!(told(&ann, "/shop").0, "cart_id=\"5678\", name=%\"Zo%c3%ab\"");
    assert_eq!(told(&gateway.log_in("ann"), "/shop").0, "", "another session of hers has its own");
    assert_eq!(told(&gateway.log_in("bob"), "/shop").0, "");
}

#[test]
fn an_attribute_with_an_end_is_told_until_then() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let ann = gateway.log_in("ann");
    say_to(&ann, "/shop", &[("Session-Set", "a=\"1\";ttl=1, b=\"2\";ttl=600")]);
    wait_until("it ends", || told(&ann, "/shop").0 == "b=\"2\"");
}

/// Each directive, and a route that does not allow it.
#[test]
fn a_directive_is_refused_and_logged_where_its_route_does_not_allow_it() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let ann = gateway.log_in("ann");
    let before = ann.cookies();
    let login = ("Session-Login", "user=\"root\", groups=(\"admin\")");
    let set = ("Session-Set", "a=\"1\"");
    let cases = [
        ("/", login),
        ("/", ("session-login", "user=\"root\"")),
        ("/", ("SESSION-LOGIN", "user=\"root\"")),
        ("/", ("Session-Logout", "?1")),
        ("/", set),
        ("/", ("Session-Unset", "a")),
        ("/", ("Session-Attributes", "a=\"1\"")),
        ("/", ("am-eai-user-id", "root")),
        ("/", ("am-eai-server-task", "terminate session")),
        ("/plain", login),
        ("/public", login),
        ("/shop", login),
        ("/shop", ("Session-Logout", "?1")),
        ("/shop", ("Session-Attributes", "a=\"1\"")),
        ("/open", login),
        ("/legacy", set),
        ("/legacy", ("am-eai-user-id", "root")),
        ("/all", ("am-eai-user-id", "root")),
        ("/all", ("am-eai-server-task", "terminate session")),
    ];
    for (path, (name, value)) in cases {
        let response = say_to(&ann, path, &[(name, value)]);
        assert_eq!(response.status, 200, "{path} {name}: the response itself is good");
        assert!(response.header(name).is_none(), "{path} {name}: nothing of it reaches the browser");
        assert!(response.headers("set-cookie").is_empty(), "{path} {name}: it makes no session");
        assert_eq!(ann.cookies(), before);
        assert_eq!(told(&ann, "/shop"), (String::new(), "ann".to_owned()), "{path} {name}: and changes none");
    }
    let refused = ["login", "logout", "attributes", "alien"]
        .map(|kind| gateway.metric(&format!("cloakroom_directives_total{{directive=\"{kind}\",result=\"refused\"}}")));
    assert_eq!(refused.iter().sum::<f64>(), cases.len() as f64, "each is counted: {refused:?}");
}

#[test]
fn what_is_allowed_and_not_understood_is_the_backends_failure_and_changes_nothing() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let ann = gateway.log_in("ann");
    say_to(&ann, "/shop", &[("Session-Set", "kept=\"1\"")]);
    let cookies = ann.cookies();
    let long = format!("a=\"{}\"", "x".repeat(4097));
    let many = (0..65).map(|n| format!("n{n}=\"1\"")).collect::<Vec<_>>().join(", ");
    let much = (0..4).map(|n| format!("n{n}=\"{}\"", "x".repeat(4096))).collect::<Vec<_>>().join(", ");
    let cases: [(&str, &[(&str, &str)]); 10] = [
        ("/shop", &[("Session-Set", "a=1")]),
        ("/shop", &[("Session-Set", "a=\"1\""), ("Session-Set", "b=")]),
        ("/shop", &[("Session-Set", &long)]),
        ("/shop", &[("Session-Set", &many)]),
        ("/shop", &[("Session-Set", &much)]),
        ("/shop", &[("Session-Set", "a=\"1\""), ("Session-Unset", "\"kept\"")]),
        ("/all", &[("Session-Login", "user=")]),
        ("/all", &[("Session-Login", "groups=(\"a\")")]),
        ("/all", &[("Session-Login", "user=\"ann\""), ("Session-Logout", "?1")]),
        ("/all", &[("Session-Login", "user=\"ann\""), ("Session-Set", &long)]),
    ];
    for (path, fields) in cases {
        let response = say_to(&ann, path, fields);
        assert_eq!(response.status, 502, "{path} {}: {}", fields[0].0, response.text());
        assert_eq!(ann.cookies(), cookies);
        assert_eq!(told(&ann, "/shop"), ("kept=\"1\"".to_owned(), "ann".to_owned()), "{}", fields[0].1);
    }
}

#[test]
fn a_backend_logs_in_under_a_new_id_and_out() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let client = gateway.client();
    let login = "user=\"alice\", groups=(\"staff\" \"admin\"), email=\"alice@example.org\"";
    let cached = [("Cache-Control", "public, max-age=600"), ("CDN-Cache-Control", "max-age=600"), ("Expires", "0")];
    let fields = [("Session-Login", login)].into_iter().chain(cached).collect::<Vec<_>>();
    let response = say_to(&client, "/legacy", &fields);
    assert_eq!(response.status, 200);
    assert_eq!(response.headers("cache-control"), ["no-store"], "no cache gives her cookie to another");
    assert!(response.header("cdn-cache-control").is_none() && response.header("expires").is_none());
    let first = client.cookie("session").expect("a session");
    assert_eq!(told(&client, "/"), (String::new(), "alice".to_owned()));

    say_to(&client, "/legacy", &[("Session-Login", login)]);
    let second = client.cookie("session").unwrap();
    assert_ne!(first, second, "a login gives a new id");
    let thief = gateway.client();
    thief.set_cookie("session", &first);
    assert_eq!(thief.get("/").send().status, 401, "and ends the old one");

    let response = say_to(&client, "/legacy", &[("Session-Logout", "?0")]);
    assert!(response.headers("set-cookie").is_empty(), "nothing was asked for");
    say_to(&client, "/legacy", &[("Session-Logout", "?1")]);
    assert_eq!(client.cookie("session"), None);
    let thief = gateway.client();
    thief.set_cookie("session", &second);
    assert_eq!(thief.get("/").send().status, 401, "ended in the store, too");
}

#[test]
fn a_session_fixed_before_a_backends_login_is_worth_nothing_after_it() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let attacker = gateway.client();
    say_to(&attacker, "/open", &[("Session-Set", "cart=\"1\"")]);
    let fixed = attacker.cookie("session").expect("a session of nobody");
    let victim = gateway.client();
    victim.set_cookie("session", &fixed);
    say_to(&victim, "/legacy", &[("Session-Login", "user=\"alice\"")]);
    assert_ne!(victim.cookie("session"), Some(fixed));
    assert_eq!(attacker.get("/").send().status, 401, "the attacker is not logged in");
    assert_eq!(told(&attacker, "/open"), (String::new(), String::new()));
}

#[test]
fn what_was_noted_before_a_login_moves_along() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let client = gateway.client();
    assert!(say_to(&client, "/plain", &[("Session-Set", "a=\"1\"")]).headers("set-cookie").is_empty());
    say_to(&client, "/open", &[("Session-Set", "cart=\"book\", old=\"1\"")]);
    let anonymous = client.cookie("session").expect("a session of nobody");
    say_to(&client, "/open", &[("Session-Set", "cart=\"book, pen\"")]);
    assert_eq!(client.cookie("session").as_ref(), Some(&anonymous), "one session");
    assert_eq!(told(&client, "/open"), ("cart=\"book, pen\", old=\"1\"".to_owned(), String::new()), "of nobody");
    assert_eq!(client.get("/").send().status, 401, "who has a cart is not logged in");
    assert_eq!(client.navigate("/").send().status, 302, "and is sent to the login, with the cookie kept");
    assert_eq!(client.cookie("session").as_ref(), Some(&anonymous));

    let login = [("Session-Login", "user=\"alice\""), ("Session-Unset", "old"), ("Session-Set", "seen=\"1\"")];
    say_to(&client, "/all", &login);
    assert_ne!(client.cookie("session"), Some(anonymous.clone()));
    assert_eq!(told(&client, "/shop"), ("cart=\"book, pen\", seen=\"1\"".to_owned(), "alice".to_owned()));
    let thief = gateway.client();
    thief.set_cookie("session", &anonymous);
    assert_eq!(told(&thief, "/open"), (String::new(), String::new()), "the cart has one owner");

    say_to(&client, "/all", &[("Session-Login", "user=\"alice\"")]);
    assert_eq!(told(&client, "/shop").0, "cart=\"book, pen\", seen=\"1\"", "the same user");
    say_to(&client, "/all", &[("Session-Login", "user=\"mallory\"")]);
    assert_eq!(told(&client, "/shop"), (String::new(), "mallory".to_owned()), "another user gets nothing of it");
}

#[test]
fn a_cart_of_nobody_moves_into_a_session_with_a_password() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let client = gateway.client();
    say_to(&client, "/open", &[("Session-Set", "cart=\"book\"")]);
    assert_eq!(gateway.try_log_in(&client, "ann", PASSWORD).status, 303);
    assert_eq!(told(&client, "/shop"), ("cart=\"book\"".to_owned(), "ann".to_owned()));
}

#[test]
fn no_client_can_say_what_a_session_holds() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let ann = gateway.log_in("ann");
    for name in ["Session-Attributes", "session_attributes", "SESSION-ATTRIBUTES", "Session.Attributes"] {
        for path in ["/shop", "/plain", "/public", "/"] {
            let response = ann.get(path).header(name, "cart_id=\"666\"").send();
            assert!([200, 400].contains(&response.status), "{path} {name}: {}", response.status);
            assert!(!response.text().contains("666"), "{path} {name}: {}", response.text());
        }
    }
    for request in backend.requests() {
        assert!(!format!("{:?}", request.head).contains("666"), "in no spelling: {:?}", request.head);
    }
}

#[test]
fn own_headers_say_what_a_session_holds() {
    let backend = obliging();
    let gateway = shop(&[&backend])
        .with("[identity.headers]\nX-Cart = \"{attribute.cart}\"\nX-Both = \"{user}:{attribute.cart}\"")
        .start();
    let client = gateway.client();
    let seen = |client: &Client, path: &str| {
        client.get(path).header("X-Cart", "forged").header("x_cart", "forged").send();
        let head = backend.requests().pop().unwrap().head;
        [head.values("x-cart").join("|"), head.values("x-both").join("|")]
    };
    assert_eq!(seen(&client, "/plain"), ["", ""]);
    say_to(&client, "/open", &[("Session-Set", "cart=\"pen\"")]);
    assert_eq!(seen(&client, "/plain"), ["pen", ""], "of a session that nobody has logged in to, too");
    assert_eq!(seen(&client, "/public"), ["", ""], "where nobody looks for a session, nothing");
    gateway.try_log_in(&client, "ann", PASSWORD);
    wait_until("it is told on other routes", || seen(&client, "/") == ["pen", "ann:pen"]);
    say_to(&client, "/open", &[("Session-Set", "cart=\"a b\"")]);
    wait_until("its change, too", || seen(&client, "/") == ["a b", "ann:a b"]);
}

#[test]
fn webseals_words_work_where_they_are_the_preset() {
    let backend = obliging();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "")
        .route("/login", "access = \"public\"\ndirectives = [\"login\", \"logout\"]")
        .with("[login.backend]\npreset = \"eai\"\npage = \"/login\"\n[identity.headers]\nX-Mail = \"{claim.mail}\"")
        .start();
    let client = gateway.client();
    let fields = [
        ("am-eai-user-id", "alice"),
        ("am-eai-xattrs", "mail"),
        ("mail", "alice@example.org"),
        ("am-eai-auth-level", "1"),
        ("am-eai-redir-url", "/start"),
    ];
    let response = say_to(&client, "/login", &fields);
    assert_eq!((response.status, response.header("location")), (303, Some("/start")));
    for (name, _) in fields {
        assert!(response.header(name).is_none(), "{name} is not for the browser");
    }
    assert_eq!(told(&client, "/").1, "alice");
    let requests = backend.requests();
    assert_eq!(requests.last().unwrap().head.values("x-mail"), ["alice@example.org"]);

    let foreign = [("am-eai-user-id", "bob"), ("am-eai-redir-url", "https://evil.example/")];
    assert_eq!(say_to(&client, "/login", &foreign).status, 502, "a login leads to no other site");
    assert_eq!(told(&client, "/").1, "alice");
    say_to(&client, "/login", &[("Session-Login", "user=\"bob\"")]);
    assert_eq!(told(&client, "/").1, "alice", "one way to say it, not two");
    assert_eq!(say_to(&client, "/login", &[("am-eai-auth-level", "1")]).status, 200, "a login that failed");
    assert_eq!(told(&client, "/").1, "alice");
    let leaving = [("am-eai-server-task", "terminate session"), ("am-eai-redir-url", "/bye")];
    assert_eq!(say_to(&client, "/login", &leaving).status, 200);
    assert_eq!(client.get("/").send().status, 401);
}

/// What another route's response left on a connection, by whatever mistake of the backend, is not heard as its word.
#[test]
fn a_word_that_counts_comes_over_a_connection_of_its_own() {
    let backend = obliging();
    let gateway = shop(&[&backend]).with("[server]\nthreads = 1").start();
    let client = gateway.client();
    for (path, before) in [("/public", 1), ("/public", 2), ("/legacy", 1), ("/public", 3), ("/legacy", 2), ("/open", 1)]
    {
        client.get(path).send();
        let request = backend.requests().pop().unwrap();
        assert_eq!((request.target(), request.on_connection), (path, before));
    }
}

/// A request that was under way, with what the browser had before the login.
#[test]
fn what_comes_late_with_the_session_before_a_login_takes_nothing_from_the_one_after() {
    let redis = RedisServer::start();
    let backend = obliging();
    for setup in [shop(&[&backend]), shop(&[&backend]).store(Store::of(&redis))] {
        let gateway = setup.start();
        let client = gateway.client();
        say_to(&client, "/open", &[("Session-Set", "cart=\"1\"")]);
        let before = client.cookie("session").unwrap();
        assert_eq!(gateway.try_log_in(&client, "ann", PASSWORD).status, 303);
        let late = || {
            let late = gateway.client();
            late.set_cookie("session", &before);
            late
        };
        let page = late().navigate("/").send();
        assert_eq!((page.status, page.headers("set-cookie")), (302, vec![]), "the new cookie stays");
        let note = say_to(&late(), "/open", &[("Session-Set", "cart=\"2\"")]);
        assert!(note.headers("set-cookie").is_empty(), "and no session of nobody takes its place: {note:?}");
        assert_eq!(told(&client, "/shop"), ("cart=\"1\"".to_owned(), "ann".to_owned()));
    }
}

#[test]
fn a_page_made_of_what_was_noted_is_kept_out_of_shared_caches() {
    let backend = obliging();
    let gateway = shop(&[&backend]).start();
    let client = gateway.client();
    assert!(client.get("/open").send().header("cache-control").is_none(), "nothing in it is anybody's");
    say_to(&client, "/open", &[("Session-Set", "cart=\"book\"")]);
    assert_eq!(client.get("/open").send().header("cache-control"), Some("private, no-store"));
}

#[test]
fn a_script_begins_no_session_and_a_visitor_without_one_has_nothing_to_forget() {
    let backend = obliging();
    let gateway = Gateway::in_front_of(&[&backend])
        .route("/", "")
        .route("/open", "access = \"optional\"\nbasic = true\ndirectives = [\"attributes\"]\nanonymous = true")
        .with("[login.basic]")
        .start();
    let set = saying("/open", &[("Session-Set", "a=\"1\"")]);
    let script = gateway.client();
    let response = script.get(&set).header("Authorization", &basic("ann", PASSWORD)).send();
    assert_eq!(response.status, 200);
    assert!(response.headers("set-cookie").is_empty(), "it would not come back with it: {response:?}");
    let visitor = gateway.client();
    assert_eq!(say_to(&visitor, "/open", &[("Session-Unset", "a")]).status, 200);
    let counted = |result: &str| {
        gateway.metric(&format!("cloakroom_directives_total{{directive=\"attributes\",result=\"{result}\"}}"))
    };
    assert_eq!((counted("no_session"), counted("refused")), (2.0, 0.0), "nobody did anything wrong");
}

#[test]
fn a_dead_store_makes_no_half_login_and_loses_no_write_silently() {
    let mut redis = RedisServer::start();
    let backend = obliging();
    let gateway = shop(&[&backend]).store(Store::of(&redis)).start();
    let client = gateway.client();
    say_to(&client, "/legacy", &[("Session-Login", "user=\"alice\"")]);
    let cookies = client.cookies();
    assert_eq!(say_to(&client, "/shop", &[("Session-Set", "a=\"1\"")]).status, 200);
    redis.kill();
    for fields in [("Session-Login", "user=\"bob\""), ("Session-Logout", "?1")] {
        let response = say_to(&client, "/legacy", &[fields]);
        assert_eq!(response.status, 503, "{fields:?}");
        assert!(response.header("retry-after").is_some());
        assert_eq!(client.cookies(), cookies, "{fields:?}: the browser keeps what it has");
    }
    assert_eq!(say_to(&client, "/shop", &[("Session-Set", "a=\"2\"")]).status, 503);
}

/// Acceptance: of 200 updates at the same time, by two backends behind two gateways, none is lost.
#[test]
fn of_two_hundred_updates_over_two_gateways_none_is_lost() {
    const UPDATES: usize = 200;
    const WRITERS: usize = 8;
    let redis = RedisServer::start();
    let backends = [obliging(), obliging()];
    let setup = || shop(&[&backends[0], &backends[1]]).store(Store::of(&redis));
    let gateways = [setup().start(), setup().start()];
    let ann = gateways[0].log_in("ann");
    let cookie = ann.cookie("session").unwrap();
    let clients: Vec<_> = (0..WRITERS)
        .map(|n| {
            let client = gateways[n % 2].client();
            client.set_cookie("session", &cookie);
            client
        })
        .collect();
    // 64 names, each written by one writer, some several times: what counts is the last value of each.
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (writer, client) in clients.iter().enumerate() {
            let done = &done;
            scope.spawn(move || {
                for n in (writer..UPDATES).step_by(WRITERS) {
                    let set = format!("n{}=\"{n}\"", n % 64);
                    // A write that a dying backend did not answer may be said again: it says the same.
                    let answered = (0..50).any(|_| say_to(client, "/shop", &[("Session-Set", &set)]).status == 200);
                    assert!(answered, "{set}");
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for backend in &backends {
            let before = done.load(Ordering::SeqCst);
            wait_until("some are written", || before + 20 <= done.load(Ordering::SeqCst));
            backend.kill();
            wait_until("the other backend goes on", || before + 40 <= done.load(Ordering::SeqCst));
            backend.revive();
        }
    });
    assert_eq!(done.load(Ordering::SeqCst), UPDATES);
    let mut expected: Vec<_> =
        (0..64).map(|n| format!("n{n}=\"{}\"", (n..UPDATES).rev().find(|update| update % 64 == n).unwrap())).collect();
    expected.sort();
    for client in &clients {
        let told = told(client, "/shop").0;
        let mut told: Vec<_> = told.split(", ").map(str::to_owned).collect();
        told.sort();
        assert_eq!(told, expected, "every instance tells all of them");
    }
}

#[test]
fn a_write_is_seen_by_the_next_request_on_the_other_gateway() {
    let redis = RedisServer::start();
    let backend = obliging();
    let gateways = [(); 2].map(|()| shop(&[&backend]).store(Store::of(&redis)).start());
    let first = gateways[0].log_in("ann");
    let second = gateways[1].client();
    second.set_cookie("session", &first.cookie("session").unwrap());
    for n in 0..100 {
        let (writer, reader) = if n % 2 == 0 { (&first, &second) } else { (&second, &first) };
        let _ = told(reader, "/"); // it has a copy
        assert_eq!(say_to(writer, "/shop", &[("Session-Set", &format!("n=\"{n}\""))]).status, 200);
        assert_eq!(told(reader, "/shop").0, format!("n=\"{n}\""));
    }
}

/// One of the example's shops.
struct Shop {
    process: Child,
    address: String,
}

impl Shop {
    fn start(name: &str) -> Self {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/cart/shop.py");
        let mut process = Command::new("python3")
            .args([program, name, "0"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is a python3");
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().unwrap().to_owned();
        Self { process, address }
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_shop_of_the_example_keeps_its_carts_whoever_of_it_lives() {
    let shops = [Shop::start("left"), Shop::start("right")];
    let example = include_str!("../../examples/cart/cloakroom.toml");
    let example = example.replace("127.0.0.1:9001", &shops[0].address).replace("127.0.0.1:9002", &shops[1].address);
    let (_, tables) = example.split_once("address = \"127.0.0.1:8080\"").expect("the listener stands first");
    let unused = Backend::echo();
    let gateway = Gateway::in_front_of(&[&unused]).route("/unused", "").with(tables).start();
    let client = gateway.client().allowing("server");
    for item in ["book", "pen", "book"] {
        assert_eq!(client.post_form("/add", &[("item", item)]).send().status, 303);
    }
    assert!(client.get("/").send().text().contains("2 book, 1 pen"));
    assert_eq!(client.navigate("/checkout").send().status, 302, "who orders is known");

    let [left, right] = shops;
    drop(left);
    client.post_form("/add", &[("item", "lamp")]).send();
    let login = [("user", "alice"), ("password", "wonderland"), ("return_to", "/checkout")];
    let wrong = client.post_form("/login", &[("user", "alice"), ("password", "guess")]).send();
    assert_eq!((wrong.status, client.get("/checkout").send().status), (403, 401));
    let response = client.post_form("/login", &login).send();
    assert_eq!((response.status, response.header("location")), (303, Some("/checkout")));
    let order = client.get("/checkout").send().text();
    assert!(order.contains("alice takes: 2 book, 1 pen, 1 lamp"), "{order}");
    assert_eq!(client.post_form("/logout", &[]).send().status, 303);
    assert_eq!(client.get("/checkout").send().status, 401);
    drop(right);
}

/// The pages that tell of it show nothing that `cloakroom check` refuses.
#[test]
fn the_settings_of_the_book_are_valid() {
    let pages = [include_str!("../../docs/attributes.md"), include_str!("../../docs/backend-login.md")];
    let mut checked = 0;
    for block in pages.iter().flat_map(|page| page.split("```toml\n").skip(1)) {
        let (block, _) = block.split_once("```").unwrap();
        let mut text = "[[listener]]\naddress = \"127.0.0.1:8080\"\n".to_owned();
        let pools = ["shop", "legacy", "app"].map(|name| format!("[pool.{name}]\nbackends = [\"127.0.0.1:9001\"]\n"));
        text.extend(pools);
        if !block.contains("[login.backend]") {
            text.push_str("[login.password]\nusers_file = \"users.toml\"\n");
        }
        if !block.contains("[[route]]") {
            text.push_str("[[route]]\npath = \"/\"\npool = \"app\"\n");
        }
        text.push_str(block);
        let file = tempfile::tempdir().unwrap();
        let path = file.path().join("cloakroom.toml");
        std::fs::write(&path, &text).unwrap();
        cloakroom::config::load(&path).unwrap_or_else(|error| panic!("{error}"));
        checked += 1;
    }
    assert_eq!(checked, 4);
}
