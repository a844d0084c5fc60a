//! Does a user meet one version, always the same? Groups and shares of users, on every instance, and as they are moved.

use std::process::Output;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection, Response};
use crate::harness::gateway::{Gateway, Setup, Store};
use crate::harness::http2::Http2Client;
use crate::harness::redis::RedisServer;
use crate::harness::{tls, wait_until};
use crate::operation::{Daemon, admin_of, cloakroom, deployment, is_up};

const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";
const USERS: usize = 2_000;

/// A version of the application: it says its name, and logs in whom `/login?USER` names.
fn version(name: &'static str) -> Backend {
    Backend::answering(move |request| match request.target().split_once('?') {
        Some(("/login", user)) => Answer::response(200, &[("Session-Login", &format!("user=\"{user}\""))], name),
        _ if request.target().starts_with("/ws") => Answer::Echo,
        _ => Answer::response(200, &[], name),
    })
}

/// `/` is of those who logged in, `/open` of everybody, `/public` of nobody; all of them have the split `next`, of which
/// these are the keys.
fn setup(blue: &Backend, green: &Backend, split: &str) -> Setup {
    let splits = "splits = [{ name = \"next\", pool = \"green\" }]";
    Gateway::in_front_of(&[blue])
        .pool("green", &[green], "")
        .route("/", splits)
        .route("/open", &format!("access = \"optional\"\n{splits}"))
        .route("/public", &format!("access = \"public\"\n{splits}"))
        .route("/login", "access = \"public\"\ndirectives = [\"login\"]")
        .with(&format!("[login.backend]\n[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\""))
        .with(&format!("[split.next]\n{split}"))
}

/// In the share by what the book says of it, computed by nothing of ours.
fn is_in(split: &str, user: &str, basis_points: u64) -> bool {
    let digest = Sha256::digest([split.as_bytes(), b"\0", user.as_bytes()].concat());
    u64::from_be_bytes(digest[..8].try_into().unwrap()) % 10_000 < basis_points
}

fn user(number: usize) -> String {
    format!("user-{number}")
}

fn expected(basis_points: u64) -> Vec<bool> {
    (0..USERS).map(|number| is_in("next", &user(number), basis_points)).collect()
}

/// Says only of whom it is not so: there are many.
#[track_caller]
fn assert_taken(found: &[bool], expected: &[bool], why: &str) {
    assert_eq!(found.len(), expected.len());
    let differ = (0..found.len()).filter(|&number| found[number] != expected[number]);
    let differ: Vec<_> = differ.map(|number| (user(number), found[number])).collect();
    assert!(differ.is_empty(), "{why}: otherwise for {} users, among them {:?}", differ.len(), differ.first());
}

/// All on one connection: what is asked for is who answers, and not how many can be answered at a time.
struct Asking(Connection);

impl Asking {
    fn of(gateway: &Gateway) -> Self {
        Self(gateway.client().connect().unwrap())
    }

    #[track_caller]
    fn get(&mut self, target: &str, cookie: &str) -> Response {
        self.0.write(format!("GET {target} HTTP/1.1\r\nHost: a\r\nCookie: {cookie}\r\n\r\n"));
        let response = self.0.read_response("GET").unwrap();
        assert_eq!(response.status, 200, "{target}: {}", response.text());
        response
    }

    /// The session of a new login.
    #[track_caller]
    fn log_in(&mut self, user: &str) -> String {
        let response = self.get(&format!("/login?{user}"), "a=b");
        response.header("set-cookie").unwrap().split(';').next().unwrap().to_owned()
    }

    /// Which of these sessions meet the green version.
    fn green(&mut self, cookies: &[String]) -> Vec<bool> {
        cookies.iter().map(|cookie| self.get("/", cookie).text() == "green").collect()
    }
}

fn ask(gateway: &Gateway, method: &str, target: &str, body: Option<&str>) -> (u16, Value) {
    let client = Client::of(gateway.admin_address());
    let mut request = client.request(method, target).header("Authorization", &format!("Bearer {TOKEN}"));
    if let Some(body) = body {
        request = request.body(body);
    }
    let response = request.send();
    (response.status, serde_json::from_slice(&response.body).unwrap())
}

#[track_caller]
fn set(gateway: &Gateway, percent: &str) {
    let (status, answer) = ask(gateway, "PATCH", "/api/splits/next", Some(&format!("{{\"percent\": {percent}}}")));
    assert_eq!((status, answer["percent"]["current"].to_string()), (200, percent.to_owned()), "{answer}");
}

#[test]
fn a_user_stays_in_their_share_across_requests_instances_and_restarts() {
    let (blue, green, redis) = (version("blue"), version("green"), RedisServer::start());
    let setup = setup(&blue, &green, "percent = 10").store(Store::of(&redis));
    let (one, other) = (setup.clone().start(), setup.clone().start());
    let mut asking = Asking::of(&one);
    let cookies: Vec<_> = (0..USERS).map(|number| asking.log_in(&user(number))).collect();

    let tenth = expected(1_000);
    assert_taken(&asking.green(&cookies), &tenth, "exactly those whose place is below ten percent");
    assert_taken(&asking.green(&cookies[..200]), &tenth[..200], "again and again");
    assert_taken(&Asking::of(&other).green(&cookies[..500]), &tenth[..500], "on every instance");
    let again = Asking::of(&other).log_in(&user(0));
    assert_taken(&Asking::of(&other).green(&[again]), &tenth[..1], "and with another session");

    drop(asking);
    one.stop();
    other.stop();
    let restarted = setup.start();
    assert_taken(&Asking::of(&restarted).green(&cookies[..500]), &tenth[..500], "and after a restart");

    set(&restarted, "25.5");
    let more = Asking::of(&restarted).green(&cookies);
    assert_taken(&more, &expected(2_550), "exactly those whose place is below 25.5 percent");
    assert!(tenth.iter().zip(&more).all(|(before, now)| *now || !*before), "who was in stays in");
    let count = |taken: &[bool]| taken.iter().filter(|taken| **taken).count() as f64;
    let counted = |label| restarted.metric(&format!("cloakroom_split_requests_total{{{label},status=\"200\"}}"));
    let seen = [count(&tenth[..500]) + count(&more), 2_500.0 - count(&tenth[..500]) - count(&more)];
    wait_until("all of them are counted", || {
        [counted("route=\"/\",split=\"next\""), counted("route=\"/\",split=\"-\"")] == seen
    });
}

#[test]
fn a_group_is_taken_whole_and_nobody_only_where_all_are() {
    let (blue, green) = (version("blue"), version("green"));
    let gateway = setup(&blue, &green, "groups = [\"staff\", \"beta\"]\npercent = 0")
        .route("/scripts", "basic = true\nsplits = [{ name = \"next\", pool = \"green\" }]")
        .with("[login.basic]")
        .start();
    let (ann, bob, nobody) = (gateway.log_in("ann"), gateway.log_in("bob"), gateway.client());
    let meets = |client: &Client, target: &str| client.get(target).send().text();
    let script = |name: &str| {
        use base64::Engine as _;
        let pair = format!("{name}:{}", crate::harness::gateway::PASSWORD);
        let credentials = base64::engine::general_purpose::STANDARD.encode(pair);
        gateway.client().get("/scripts").header("Authorization", &format!("Basic {credentials}")).send().text()
    };

    assert_eq!(
        [meets(&ann, "/"), meets(&ann, "/open"), meets(&bob, "/"), meets(&bob, "/open")],
        ["green", "green", "blue", "blue"]
    );
    assert_eq!([script("ann"), script("bob")], ["green", "blue"], "who has no session is the same user");
    for percent in ["0", "99.99"] {
        set(&gateway, percent);
        assert_eq!(meets(&nobody, "/open"), "blue", "nobody has no place, at {percent} %");
        assert_eq!([meets(&nobody, "/public"), meets(&ann, "/public")], ["blue", "blue"], "nobody looks who it is");
        assert_eq!(meets(&ann, "/"), "green", "the group is in at {percent} %");
    }
    set(&gateway, "100");
    for target in ["/open", "/public"] {
        assert_eq!([meets(&nobody, target), meets(&bob, target)], ["green", "green"], "{target}: 100 is everybody");
    }
    assert_eq!(nobody.get("/").send().status, 401, "a share lets nobody in");
    set(&gateway, "0");
    assert_eq!([meets(&bob, "/"), meets(&nobody, "/open"), meets(&ann, "/")], ["blue", "blue", "green"]);
}

#[test]
fn the_first_split_that_takes_a_user_counts() {
    let (blue, green, grey) = (version("blue"), version("green"), version("grey"));
    let splits = "splits = [{ name = \"stay\", pool = \"app\" }, { name = \"next\", pool = \"green\" }, \
                  { name = \"last\", pool = \"grey\" }]";
    let gateway = Gateway::in_front_of(&[&blue])
        .pool("green", &[&green], "")
        .pool("grey", &[&grey], "")
        .route("/", splits)
        .with("[split.stay]\ngroups = [\"staff\"]\n[split.next]\npercent = 50\n[split.last]\npercent = 100")
        .user("eve", "")
        .user("joe", "")
        .user("kim", "")
        .start();
    for user in ["ann", "bob", "eve", "joe", "kim"] {
        let expected = match user {
            "ann" => "blue",
            _ if is_in("next", user, 5_000) => "green",
            _ => "grey",
        };
        assert_eq!(gateway.log_in(user).get("/").send().text(), expected, "{user}");
    }
}

#[test]
fn web_sockets_and_requests_in_http2_go_where_all_of_the_user_go() {
    let (blue, green) = (Backend::echo(), Backend::echo());
    let gateway = setup(&blue, &green, "groups = [\"staff\"]\npercent = 0").tls().start();
    for (user, taken, other) in [("ann", &green, &blue), ("bob", &blue, &green)] {
        let client = gateway.log_in(user);
        let before = (taken.requests().len(), other.requests().len());
        drop(client.web_socket("/", &[]).unwrap_or_else(|refused| panic!("{refused:?}")));
        let http2 = Http2Client::connect(gateway.address(), &tls::trust());
        let cookie = client.cookie_field().unwrap();
        assert_eq!(http2.get("/", &[("cookie", &cookie)]).seen().headers("x-forwarded-user"), [user]);
        let after = (taken.requests().len(), other.requests().len());
        assert_eq!(after, (before.0 + 2, before.1), "{user}");
    }
}

#[test]
fn a_second_attempt_stays_within_the_pool() {
    let (blue, dead, alive) = (version("blue"), version("dead"), version("green"));
    dead.kill();
    let gateway = Gateway::in_front_of(&[&blue])
        .pool("green", &[&dead, &alive], "")
        .route("/", "access = \"public\"\nsplits = [{ name = \"next\", pool = \"green\" }]")
        .with("[split.next]\npercent = 100")
        .start();
    let client = gateway.client();
    for _ in 0..4 {
        assert_eq!(client.get("/").send().text(), "green", "another one of the same version");
    }
    alive.kill();
    assert_eq!(client.get("/").send().status, 503, "a version that is down is not replaced by another in silence");
    assert!(blue.requests().is_empty());
}

#[test]
fn what_is_set_at_run_time_counts_at_once_and_until_the_file_says_something_new() {
    let (blue, green) = (version("blue"), version("green"));
    let gateway = setup(&blue, &green, "percent = 0").start();
    let ann = gateway.log_in("ann");
    let meets = || ann.get("/").send().text();
    assert_eq!(meets(), "blue");
    set(&gateway, "100");
    assert_eq!(meets(), "green", "from the next request on");
    assert_eq!(gateway.metric("cloakroom_split_ratio{split=\"next\"}"), 1.0);
    let told = |percent: u32, configured: u32| {
        let routes = ["/", "/open", "/public"].map(|route| json!({ "route": route, "pool": "green" }));
        json!({ "name": "next", "groups": [], "percent": { "configured": configured, "current": percent }, "routes": routes })
    };
    assert_eq!(ask(&gateway, "GET", "/api/splits", None), (200, json!({ "splits": [told(100, 0)] })));
    assert_eq!(ask(&gateway, "GET", "/api/splits/next", None), (200, told(100, 0)));

    gateway.reload(|setup| setup.with("[split.broken]")).unwrap_err();
    assert_eq!(meets(), "green", "a broken file changes nothing");
    let changes = gateway.reload(|setup| setup).unwrap();
    assert_eq!((changes.kept, changes.dropped), (vec!["split.next: percent".to_owned()], vec![]));
    assert_eq!(meets(), "green", "who renews a certificate takes nothing back");
    set(&gateway, "0");
    assert_eq!(meets(), "blue", "and it can be set on");
    set(&gateway, "100");

    let (blue, green) = (&blue, &green);
    let moved = |percent: &'static str| move |_: Setup| setup(blue, green, percent);
    let changes = gateway.reload(moved("percent = 0.5")).unwrap();
    assert_eq!(
        (changes.at_once, changes.dropped),
        (vec!["split.next: percent".to_owned()], vec!["split.next: percent".to_owned()])
    );
    assert_eq!(ask(&gateway, "GET", "/api/splits/next", None).1["percent"]["current"], 0.5, "the file counts again");
    gateway.reload(moved("percent = 100")).unwrap();
    assert_eq!(meets(), "green", "a reload moves it, too");
    assert_eq!(ask(&gateway, "GET", "/api/splits/next", None).1, told(100, 100));
}

#[test]
fn what_is_not_exactly_right_moves_nothing() {
    let (blue, green) = (version("blue"), version("green"));
    let gateway = setup(&blue, &green, "percent = 7.25").start();
    for (method, target, body, expected) in [
        ("PATCH", "/api/splits/other", Some("{\"percent\": 50}"), 404),
        ("PATCH", "/api/splits/", Some("{\"percent\": 50}"), 404),
        ("PATCH", "/api/splits/next/", Some("{\"percent\": 50}"), 404),
        ("GET", "/api/splits/other", None, 404),
        ("GET", "/api/splitsnext", None, 404),
        ("PATCH", "/api/splits", Some("{\"percent\": 50}"), 405),
        ("DELETE", "/api/splits/next", None, 405),
        ("PUT", "/api/splits/next", Some("{\"percent\": 50}"), 405),
        ("POST", "/api/splits", Some("{\"percent\": 50}"), 405),
        ("PATCH", "/api/splits/next?percent=50", Some("{\"percent\": 50}"), 400),
        ("PATCH", "/api/splits/next", None, 400),
        ("PATCH", "/api/splits/next", Some(""), 400),
        ("PATCH", "/api/splits/next", Some("{}"), 400),
        ("PATCH", "/api/splits/next", Some("50"), 400),
        ("PATCH", "/api/splits/next", Some("[25]"), 400),
        ("PATCH", "/api/splits/next", Some(" [25]"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": \"50\"}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": null}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 100.01}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": -1}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 0.005}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 50, \"pool\": \"app\"}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 50, \"percent\": 60}"), 400),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 50} "), 200),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 7.25}"), 200),
        ("PATCH", "/api/splits/next", Some("{\"percent\": 50}}"), 400),
    ] {
        let (status, answer) = ask(&gateway, method, target, body);
        assert_eq!(status, expected, "{method} {target} {body:?}: {answer}");
    }
    let long = format!("{{\"percent\": 50{}}}", " ".repeat(5_000));
    assert_eq!(ask(&gateway, "PATCH", "/api/splits/next", Some(&long)).0, 413);
    let named = ask(&gateway, "GET", "/api/splits/other", None).1;
    assert!(named["detail"].as_str().unwrap().contains("the splits are next"), "{named}");
    for authorization in ["", "Bearer wrong", &format!("Basic {TOKEN}")] {
        for target in ["/api/splits", "/api/splits/next", "/api/splits/other"] {
            let client = Client::of(gateway.admin_address());
            let request = client.request("PATCH", target).header("Authorization", authorization);
            assert_eq!(request.body("{\"percent\": 50}").send().status, 401, "{target} {authorization:?}");
        }
    }
    assert_eq!(
        ask(&gateway, "GET", "/api/splits/next", None).1["percent"]["current"],
        json!(7.25),
        "nothing has moved"
    );

    let document = ask(&gateway, "GET", "/api/openapi.json", None).1;
    for (place, target) in [("/api/splits", "/api/splits"), ("/api/splits/{name}", "/api/splits/next")] {
        for method in ["get", "put", "post", "delete", "options", "patch", "trace"] {
            let status = ask(&gateway, &method.to_uppercase(), &format!("{target}?unknown=1"), None).0;
            let is_described = document["paths"][place].get(method).is_some();
            assert_eq!(status != 405, is_described, "{method} {target}: {status}");
        }
    }
}

#[test]
fn without_a_token_there_is_nothing_to_move() {
    let backend = version("blue");
    let gateway = Gateway::in_front_of(&[&backend]).with("[split.next]\npercent = 5").start();
    for (method, target) in [("GET", "/api/splits"), ("PATCH", "/api/splits/next")] {
        let request = Client::of(gateway.admin_address());
        let response =
            request.request(method, target).header("Authorization", "Bearer ").body("{\"percent\": 50}").send();
        assert_eq!(response.status, 404, "{method} {target}");
    }
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn an_operator_sees_and_moves_it_and_the_log_tells() {
    let (blue, green) = (version("blue"), version("green"));
    let rest = format!(
        "splits = [{{ name = \"next\", pool = \"green\" }}]\n[pool.green]\nbackends = [\"{}\"]\n\
         [split.next]\ngroups = [\"staff\"]\npercent = 0.5\n[[route]]\npath = \"/all\"\npool = \"app\"\naccess = \"public\"\n\
         splits = [{{ name = \"next\", pool = \"green\" }}]\n[log]\nformat = \"json\"\nlevel = \"error\"\n",
        green.address()
    );
    let (_folder, file, address) = deployment(&[&blue], &rest);
    let admin = admin_of(&file);
    let written = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, written.replace("[admin]\naddress", &format!("[admin]\ntoken = \"{TOKEN}\"\naddress")))
        .unwrap();
    let splits = |arguments: &[&str]| cloakroom(&[&["splits", "--config", file.to_str().unwrap()], arguments].concat());

    let away = splits(&[]);
    assert_eq!(away.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&away.stderr).contains("no gateway answers on 127.0.0.1:"), "{away:?}");

    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    wait_until("its admin listener, too", || is_up(admin));
    let listed = splits(&[]);
    let expected = "\
SPLIT                 NOW  IN FILE  ROUTE                     POOL
next                0.5 %    0.5 %  /all                      green
                                    /private                  green
                  and all of staff
";
    assert_eq!((listed.status.code(), out(&listed)), (Some(0), expected.to_owned()), "{listed:?}");

    assert_eq!(Client::of(address).get("/all").send().text(), "blue");
    let set = splits(&["set", "next", "100"]);
    assert!(out(&set).contains("next                100 %    0.5 %  /all "), "{set:?}");
    assert_eq!(Client::of(address).get("/all").send().text(), "green");
    let document: Value = serde_json::from_str(&out(&splits(&["--json"]))).unwrap();
    assert_eq!(document["splits"][0]["percent"], json!({ "configured": 0.5, "current": 100 }));

    let told: Value = serde_json::from_str(&out(&splits(&["set", "next", "100", "--json"]))).unwrap();
    assert_eq!(told, document["splits"][0], "the gateway's own answer");

    for (arguments, code, message) in [
        (&["set", "other", "5"][..], 1, "there is no such split: the splits are next"),
        (&["set", "../sessions", "5"], 2, "1 to 64 letters"),
        (&["set", "next", "101"], 2, "expected 0 to 100"),
        (&["set", "next", "0.001"], 2, "two decimals"),
        (&["set", "next"], 2, "PERCENT"),
        (&["list"], 2, "Usage"),
    ] {
        let output = splits(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(message), "{arguments:?}: {text}");
    }

    let (lines, noise) = daemon.stopped();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = lines.iter().map(|line| (&line["route"], line.get("split"))).collect();
    assert_eq!(told, [(&json!("/all"), None), (&json!("/all"), Some(&json!("next")))], "{lines:?}");
    let audited = noise.lines().filter(|line| line.contains("split set")).collect::<Vec<_>>();
    assert_eq!(audited.len(), 1, "{noise}");
    let audited: Value = serde_json::from_str(audited[0]).unwrap();
    for (field, expected) in [("split", "next"), ("before", "0.5"), ("after", "100"), ("client", "127.0.0.1")] {
        assert_eq!(audited[field], expected, "{audited}");
    }
}
