//! Can an operator see the backends, take one out and bring it back? Over the admin API, on the command line, on the status page.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection, Response};
use crate::harness::dns::{NameServer, Trouble};
use crate::harness::gateway::{Gateway, Setup, Store};
use crate::harness::http2::{Http2Backend, Http2Client};
use crate::harness::redis::RedisServer;
use crate::harness::{Over, Port, free_port, tls, wait_until};

const TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";
const PUBLIC: &str = "access = \"public\"";

fn setup(backends: &[(&Backend, &str)], keys: &str) -> Setup {
    with_token(Gateway::in_front_of(&[]).weighted_pool("app", backends, keys).route("/", PUBLIC))
}

fn with_token(setup: Setup) -> Setup {
    setup.with(&format!("[admin]\naddress = \"127.0.0.1:0\"\ntoken = \"{TOKEN}\""))
}

fn send(gateway: &Gateway, method: &str, target: &str, body: &str) -> Response {
    let bearer = format!("Bearer {TOKEN}");
    let admin = Client::of(gateway.admin_address());
    let request = admin.request(method, target).header("Authorization", &bearer);
    if body.is_empty() { request.send() } else { request.body(body).send() }
}

#[track_caller]
fn answer(gateway: &Gateway, method: &str, target: &str, body: &str) -> Value {
    let response = send(gateway, method, target, body);
    assert_eq!(response.status, 200, "{method} {target}: {}", response.text());
    serde_json::from_slice(&response.body).unwrap()
}

fn place(backend: &Backend) -> String {
    format!("/api/pools/app/backends/{}", backend.address())
}

/// How a backend of the pool `app` is.
#[track_caller]
fn look(gateway: &Gateway, backend: &Backend) -> Value {
    answer(gateway, "GET", &place(backend), "")
}

/// What the backend is after that.
#[track_caller]
fn set(gateway: &Gateway, backend: &Backend, body: &str) -> Value {
    answer(gateway, "PATCH", &place(backend), body)
}

fn in_flight(gateway: &Gateway, backend: &Backend) -> u64 {
    look(gateway, backend)["in_flight"].as_u64().unwrap()
}

/// Who answers how often.
fn shares(client: &Client, times: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..times {
        *shares.entry(client.get("/").send().seen().backend).or_default() += 1;
    }
    shares
}

fn of(shares: &BTreeMap<String, usize>, backend: &Backend) -> usize {
    shares.get(backend.name()).copied().unwrap_or_default()
}

fn echo_after_step() -> Backend {
    Backend::always(Answer::AfterStep(Box::new(Answer::Echo)))
}

#[test]
fn every_state_of_a_backend_shows() {
    let sick = Backend::answering(|request| match request.target() {
        "/health" => Answer::response(500, &[], ""),
        _ => Answer::Echo,
    });
    let (well, spare, leaving) = (Backend::echo(), Backend::echo(), Backend::echo());
    let dead = Port::reserve();
    let dead = format!("127.0.0.1:{}", dead.number());
    let health = "[pool.app.check]\npath = \"/health\"\ninterval = \"100ms\"\ntimeout = \"20s\"";
    let ejecting = format!(
        "[pool.other]\nbackends = [\"{dead}\", \"{}\"]\neject = {{ time = \"1h\", time_max = \"1h\" }}",
        well.address()
    );
    let gateway = setup(
        &[(&sick, ""), (&well, "weight = 3, max_requests = 7"), (&spare, "backup = true"), (&leaving, "drain = true")],
        &format!("balance = \"least_requests\"\nqueue = 9\n{health}"),
    )
    .route("/other", "access = \"public\"\npool = \"other\"")
    .with(&ejecting)
    .start();
    wait_until("checks have found out", || look(&gateway, &sick)["state"] == "down");
    for _ in 0..4 {
        assert_eq!(gateway.client().get("/other").send().status, 200);
        assert_eq!(gateway.client().get("/").send().status, 200);
    }

    let list = || answer(&gateway, "GET", "/api/pools", "")["pools"].clone();
    // Until requests are counted out, and while no check fails between the two answers.
    let alone = || answer(&gateway, "GET", "/api/pools/app", "");
    wait_until("a pool is told alone as in the list", || in_flight(&gateway, &well) == 0 && list()[0] == alone());
    let pools = list();
    assert_eq!((&pools[0]["pool"], &pools[1]["pool"]), (&json!("app"), &json!("other")));
    let app = &pools[0];
    assert_eq!(
        (&app["protocol"], &app["tls"], &app["balance"]),
        (&json!("http1"), &json!(false), &json!("least_requests"))
    );
    assert_eq!((&app["waiting"], &app["queue"], &app["routes"]), (&json!(0), &json!(9), &json!(["/"])));
    assert_eq!(app["warnings"], json!([]));
    let states: Vec<_> = app["backends"].as_array().unwrap().iter().map(|backend| backend["state"].clone()).collect();
    assert_eq!(states, ["down", "up", "backup", "draining"]);
    let failure = look(&gateway, &sick)["last_failure"].clone();
    assert!(failure["what"].as_str().unwrap().contains("500") && failure["at"].is_string(), "{failure}");
    let busy = look(&gateway, &well);
    assert_eq!((&busy["max_requests"], &busy["requests"], &busy["failures"]), (&json!(7), &json!(4), &json!(0)));
    assert_eq!(busy["weight"], json!({ "configured": 3, "current": 3 }));
    assert_eq!(look(&gateway, &leaving)["drain"], json!({ "configured": true, "current": true }));
    assert_eq!((&look(&gateway, &spare)["backup"], &look(&gateway, &spare)["requests"]), (&json!(true), &json!(0)));

    let ejected = answer(&gateway, "GET", &format!("/api/pools/other/backends/{dead}"), "");
    assert_eq!((&ejected["state"], &ejected["failures"]), (&json!("ejected"), &json!(1)));
    let until = ejected["ejected_until"].as_str().unwrap();
    let at = ejected["last_failure"]["at"].as_str().unwrap();
    assert!(at < until, "an hour later: {at} {until}");
    let text = pools.to_string();
    assert!(!text.contains(TOKEN) && !text.contains("session"), "{text}");
}

#[test]
fn a_backend_whose_name_is_unknown_and_one_that_begins_slowly_show_as_such() {
    let (old, new) = (Backend::echo(), Backend::echo());
    let gateway = setup(&[(&old, "")], "slow_start = \"1h\"").start();
    gateway.reload(|setup| setup.weighted_pool("app", &[(&old, ""), (&new, "")], "slow_start = \"1h\"")).unwrap();
    let began = look(&gateway, &new);
    assert_eq!((&began["state"], &began["share_percent"]), (&json!("slow_start"), &json!(10)));
    assert_eq!(look(&gateway, &old)["share_percent"], 100);

    let table = "[pool.nowhere]\nbackends = [\"nowhere.invalid:80\"]";
    let gateway = with_token(Gateway::in_front_of(&[&old]).route("/lost", "pool = \"nowhere\"").with(table)).start();
    let nowhere = answer(&gateway, "GET", "/api/pools/nowhere", "");
    assert_eq!(nowhere["backends"][0]["state"], "unresolved");
    assert_eq!(nowhere["warnings"], json!(["no backend of pool nowhere takes requests: /lost get 503"]));
}

#[test]
fn a_place_where_no_backend_is_found_is_told_with_the_cause() {
    let (server, backend, folder) = (NameServer::start(), Backend::echo(), tempfile::tempdir().unwrap());
    server.fail("api.test", Trouble::NoSuchName);
    let list = folder.path().join("api.toml");
    std::fs::write(&list, format!("backends = [\"{}\"]\n", backend.address())).unwrap();
    let setup = Gateway::in_front_of(&[])
        .pool_found("app", &[&format!("{{ file = {list:?} }}")], "")
        .pool_found("named", &["{ dns = \"api.test:80\" }"], "")
        .route("/", PUBLIC)
        .route("/lost", "access = \"public\"\npool = \"named\"")
        .with(&server.table());
    let gateway = with_token(setup).start();
    let warnings = |pool: &str| -> Vec<String> {
        let answer = answer(&gateway, "GET", &format!("/api/pools/{pool}"), "");
        answer["warnings"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    };

    assert_eq!(warnings("app"), [""; 0], "it is found");
    wait_until("DNS has answered", || warnings("named").len() == 2);
    let nothing = warnings("named");
    assert!(nothing[1].starts_with("dns:api.test:80 is not found: "), "{nothing:?}");
    assert!(nothing[1].ends_with("; nothing is known of it yet"), "{nothing:?}");

    std::fs::remove_file(&list).unwrap();
    wait_until("it is missed", || !warnings("app").is_empty());
    let kept = warnings("app").remove(0);
    assert!(kept.starts_with(&format!("file:{} is not found: ", list.display())), "{kept}");
    assert!(kept.ends_with("; what it was last stays"), "{kept}");
    let (code, _, told) = run(&command_file(&gateway, &folder), &[]);
    assert_eq!(code, Some(0));
    for warning in [&nothing[1], &kept] {
        assert!(told.contains(&format!("warning: {warning}\n")), "{told}");
    }
}

#[test]
fn draining_under_load_loses_no_request_and_moves_all_that_come_after() {
    let (leaving, staying) = (Backend::echo(), Backend::echo());
    let gateway = setup(&[(&leaving, ""), (&staying, "")], "").start();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let after = |count: usize| {
        let goal = answered.load(Ordering::SeqCst) + count;
        wait_until("there is load", || goal < answered.load(Ordering::SeqCst));
    };
    std::thread::scope(|scope| {
        let _over = Over(&stop);
        for _ in 0..4 {
            scope.spawn(|| {
                let client = gateway.client();
                while !stop.load(Ordering::SeqCst) {
                    let response = client.get("/").send();
                    assert_eq!(response.status, 200, "no request is lost");
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for _ in 0..5 {
            after(50);
            assert_eq!(set(&gateway, &leaving, "{\"drain\": true}")["warnings"], json!([]));
            wait_until("it has nothing any more", || in_flight(&gateway, &leaving) == 0);
            let before = leaving.requests().len();
            after(50);
            assert_eq!(leaving.requests().len(), before, "it gets nothing new");
            set(&gateway, &leaving, "{\"drain\": false}");
            wait_until("it gets requests again", || before < leaving.requests().len());
        }
    });
    for backend in [&leaving, &staying] {
        wait_until("all have ended", || in_flight(&gateway, backend) == 0);
        let seen = look(&gateway, backend);
        assert_eq!(
            (seen["requests"].as_u64().unwrap() as usize, &seen["failures"]),
            (backend.requests().len(), &json!(0))
        );
    }
}

#[test]
fn the_last_backend_can_be_drained_and_it_is_said_what_that_means() {
    let (one, two) = (Backend::echo(), Backend::echo());
    let gateway = setup(&[(&one, ""), (&two, "")], "").route("/shop", PUBLIC).start();
    assert_eq!(set(&gateway, &one, "{\"drain\": true}")["warnings"], json!([]));
    let last = set(&gateway, &two, "{\"drain\": true}");
    assert_eq!(last["warnings"], json!(["no backend of pool app takes requests: /, /shop get 503"]));
    let refused = gateway.client().get("/shop").send();
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("2")));
    assert_eq!(set(&gateway, &one, "{\"drain\": false}")["warnings"], json!([]));
    assert_eq!(gateway.client().get("/shop").send().seen().backend, one.name());
    one.kill();
    assert_eq!(gateway.client().get("/").send().status, 503);
    let warnings = answer(&gateway, "GET", "/api/pools/app", "")["warnings"].clone();
    assert_eq!(warnings, json!(["no backend of pool app is well: those that are not drained are tried in turn"]));
}

#[test]
fn a_weight_that_is_set_counts_exactly() {
    let (large, small) = (Backend::echo(), Backend::echo());
    let gateway = setup(&[(&large, ""), (&small, "")], "").start();
    let client = gateway.client();
    assert_eq!(of(&shares(&client, 8), &large), 4);
    for (weight, expected) in [(3, 12), (7, 14), (1, 8)] {
        let set = set(&gateway, &large, &format!("{{\"weight\": {weight}}}"));
        assert_eq!(set["weight"], json!({ "configured": 1, "current": weight }));
        let period = weight + 1;
        assert_eq!(of(&shares(&client, 16 / period * period), &large), expected, "weight {weight}");
    }
}

#[test]
fn what_is_set_outlives_a_reload_until_the_file_changes_there() {
    let (one, two, three) = (Backend::echo(), Backend::echo(), Backend::echo());
    let gateway = setup(&[(&one, "weight = 2"), (&two, ""), (&three, "")], "").start();
    set(&gateway, &one, "{\"weight\": 9, \"drain\": true}");
    set(&gateway, &two, "{\"drain\": true}");
    set(&gateway, &three, "{\"weight\": 4}");
    let line = |key: &str, backend: &Backend| format!("pool.app: {key} of {}", backend.address());
    let sorted = |mut lines: Vec<String>| {
        lines.sort();
        lines
    };

    let again = gateway.reload(|setup| setup).unwrap();
    let all = [line("weight", &one), line("drain", &one), line("drain", &two), line("weight", &three)];
    assert_eq!((again.kept, again.dropped), (sorted(all.to_vec()), vec![]), "whose file is as before");
    assert_eq!(look(&gateway, &one)["weight"], json!({ "configured": 2, "current": 9 }));

    let backends = [(&one, "weight = 3"), (&two, "drain = true")];
    let changed = gateway.reload(|setup| setup.weighted_pool("app", &backends, "")).unwrap();
    assert_eq!(changed.kept, [line("drain", &one)]);
    let gone = [line("weight", &one), line("drain", &two), line("weight", &three)];
    assert_eq!(changed.dropped, sorted(gone.to_vec()), "changed there, the same by now, gone");
    assert_eq!(look(&gateway, &one)["weight"], json!({ "configured": 3, "current": 3 }));
    assert_eq!(look(&gateway, &one)["drain"], json!({ "configured": false, "current": true }));
    assert_eq!(send(&gateway, "GET", &place(&three), "").status, 404);

    let told = answer(&gateway, "POST", "/reload", "");
    assert_eq!((&told["kept"], &told["dropped"]), (&json!([line("drain", &one)]), &json!([])));
}

#[test]
fn requests_in_flight_come_back_to_zero_however_they_end_and_whatever_is_spoken() {
    let (slow, two) = (echo_after_step(), Http2Backend::start());
    let gateway = setup(&[(&slow, "")], "")
        .tls()
        .with(&format!("[pool.two]\nbackends = [\"{}\"]\nprotocol = \"http2\"", two.address()))
        .route("/talk", "access = \"public\"\npool = \"two\"")
        .start();
    let of_two = || answer(&gateway, "GET", "/api/pools/two", "")["backends"][0]["in_flight"].as_u64().unwrap();

    let http2 = Http2Client::connect(gateway.address(), &tls::trust());
    let begin = |path: &str, is_whole: bool| http2.begin("POST", path, &[], is_whole).unwrap();
    let answered = begin("/", true);
    let given_up = begin("/", true);
    slow.after_requests(2);
    assert_eq!(in_flight(&gateway, &slow), 2, "of two workers or one, over one connection of HTTP/2");
    drop(given_up);
    wait_until("who gives up waits for nothing", || in_flight(&gateway, &slow) == 1);
    slow.step();
    slow.step();
    assert_eq!(answered.finish().unwrap().status, 200);
    wait_until("nor is there anything else", || in_flight(&gateway, &slow) == 0);

    let (mut talk, other) = (begin("/talk", false), begin("/talk", false));
    assert_eq!(talk.head().unwrap().0, 200);
    wait_until("both talk", || of_two() == 2);
    talk.write(b"bye", true);
    while let Ok(Some(_)) = talk.chunk() {}
    drop(talk);
    drop(other);
    wait_until("nobody talks", || of_two() == 0);

    let sockets = Backend::echo();
    gateway.reload(|setup| setup.weighted_pool("app", &[(&sockets, "")], "")).unwrap();
    let socket = gateway.client().web_socket("/", &[]).unwrap();
    wait_until("an open WebSocket counts", || in_flight(&gateway, &sockets) == 1);
    set(&gateway, &sockets, "{\"drain\": true}");
    assert_eq!(in_flight(&gateway, &sockets), 1, "it goes on");
    drop(socket);
    wait_until("a closed one does not", || in_flight(&gateway, &sockets) == 0);
}

#[test]
fn nothing_is_told_or_done_without_the_token() {
    let backend = Backend::echo();
    let gateway = setup(&[(&backend, "")], "").start();
    let admin = Client::of(gateway.admin_address());
    let password = |token: &str| format!("Basic {}", base64(&format!("admin:{token}")));
    for field in [None, Some("Bearer wrong".to_owned()), Some(password(TOKEN)), Some(TOKEN.to_owned())] {
        for (method, target) in [("GET", "/api/pools"), ("GET", "/api/pools/app"), ("PATCH", &*place(&backend))] {
            let mut request = admin.request(method, target);
            if let Some(field) = &field {
                request = request.header("Authorization", field);
            }
            let response = request.body("{\"drain\": true}").send();
            assert_eq!((response.status, response.header("www-authenticate")), (401, Some("Bearer")), "{field:?}");
            assert_eq!(response.header("content-type"), Some("application/problem+json"));
        }
    }
    let basic = "Basic realm=\"Cloakroom\", charset=\"UTF-8\"";
    for (field, status) in [
        (None, 401),
        (Some(password("wrong")), 401),
        (Some(password("")), 401),
        (Some(format!("Basic {}", base64(TOKEN))), 401),
        (Some("Basic %%%".to_owned()), 401),
        (Some("Bearer wrong".to_owned()), 401),
        (Some(password(TOKEN)), 200),
        (Some(format!("basic {}", base64(&format!(":{TOKEN}")))), 200),
        (Some(format!("Bearer {TOKEN}")), 200),
    ] {
        let mut request = admin.get("/status");
        if let Some(field) = &field {
            request = request.header("Authorization", field);
        }
        let response = request.send();
        assert_eq!(
            (response.status, response.header("www-authenticate")),
            (status, (status == 401).then_some(basic)),
            "{field:?}"
        );
    }
    assert_eq!(look(&gateway, &backend)["state"], "up", "and nothing was done");

    let open = Gateway::in_front_of(&[&backend]).start();
    for target in ["/api/pools", "/api/pools/app", "/status"] {
        assert_eq!(send(&open, "GET", target, "").status, 404, "without a token configured there is no {target}");
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

#[test]
fn who_asks_for_nonsense_is_told_so_and_who_sends_too_much_too() {
    let backend = Backend::echo();
    let gateway = setup(&[(&backend, "")], "").start();
    let long = format!("{{\"drain\": true{}}}", " ".repeat(5_000));
    for (method, target, body, status, part) in [
        ("GET", "/api/pools/none", "", 404, "the pools are app"),
        ("PATCH", "/api/pools/app/backends/h:1", "{\"drain\": true}", 404, &*backend.address().to_string()),
        ("PATCH", &*place(&backend), "{\"weight\": 1001}", 400, "between 1 and 1000"),
        ("PATCH", &*place(&backend), "drain", 400, "expected an object"),
        ("PATCH", &*place(&backend), "{\"drian\": true}", 400, "drian"),
        ("PATCH", &*place(&backend), &*long, 413, "that long"),
        ("DELETE", &*place(&backend), "", 405, "GET, HEAD, PATCH"),
    ] {
        let response = send(&gateway, method, target, body);
        assert_eq!(response.status, status, "{method} {target}: {}", response.text());
        let problem: Value = serde_json::from_slice(&response.body).unwrap();
        assert!(problem["detail"].as_str().unwrap().contains(part), "{problem}");
    }
    assert_eq!(look(&gateway, &backend)["drain"]["current"], false);
    let escaped = place(&backend).replace(':', "%3A");
    assert_eq!(answer(&gateway, "GET", &escaped, "")["state"], "up", "an address may be encoded");
    let mut slow = Connection::open(gateway.admin_address());
    slow.write(format!(
        "PATCH {} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 15\r\n\r\n{{",
        place(&backend)
    ));
    assert_eq!(slow.read_response("PATCH").unwrap().status, 408, "a body that does not come");
    assert_eq!(send(&gateway, "HEAD", "/api/pools", "").body.len(), 0);
}

/// `cloakroom pools` against this gateway: a file with its real address.
fn command_file(gateway: &Gateway, folder: &tempfile::TempDir) -> PathBuf {
    let file = folder.path().join("admin.toml");
    let address = gateway.admin_address();
    std::fs::write(&file, format!("[admin]\naddress = \"{address}\"\ntoken = \"{TOKEN}\"\n")).unwrap();
    file
}

fn pools(file: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cloakroom"));
    command.arg("pools").args(arguments).args(["--config", file.to_str().unwrap()]).stdin(Stdio::null());
    command
}

fn run(file: &std::path::Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = pools(file, arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_command_line_shows_and_sets_the_same() {
    let (one, two) = (Backend::echo(), Backend::echo());
    let gateway = setup(&[(&one, "weight = 2, max_requests = 50"), (&two, "")], "")
        .with("[pool.six]\nbackends = [\"[::1]:7\", \"some-name.invalid:80\", { address = \"127.0.0.1:9\", drain = true }]")
        .start();
    let folder = tempfile::tempdir().unwrap();
    let file = command_file(&gateway, &folder);
    let (first, second) = (one.address().to_string(), two.address().to_string());

    let (code, table, err) = run(&file, &[]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{table}");
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..4], ["POOL", "BACKEND", "STATE", "IN"]);
    assert_eq!(lines[1], ["app", &first, "up", "0", "50", "2", "0", "0", "-"]);
    assert_eq!(lines[2], ["app", &second, "up", "0", "any", "1", "0", "0", "-"]);
    let (_, json, _) = run(&file, &["--json"]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), answer(&gateway, "GET", "/api/pools", ""));

    let (code, out, err) = run(&file, &["weight", "app", &first, "5"]);
    assert_eq!((code, out, err.as_str()), (Some(0), format!("{first}: up, weight 5 (file: 2), 0 in flight\n"), ""));
    let (code, out, err) = run(&file, &["drain", "app", &second]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(out, format!("{second}: draining by hand, weight 1, 0 in flight\n"));
    let (code, _, err) = run(&file, &["drain", "app", &first]);
    assert_eq!((code, err.as_str()), (Some(0), "warning: no backend of pool app takes requests: / get 503\n"));
    for address in ["[::1]:7", "some-name.invalid:80"] {
        let (code, out, err) = run(&file, &["weight", "six", address, "3"]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.starts_with(address), "whatever the address: {out}");
    }
    let (_, out, err) = run(&file, &["undrain", "six", "127.0.0.1:9"]);
    assert_eq!((out.as_str(), err.as_str()), ("127.0.0.1:9: up (file: drain), weight 1, 0 in flight\n", ""));
    let (code, json, _) = run(&file, &["undrain", "app", &second, "--json"]);
    let undrained: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &undrained["state"], &undrained["warnings"]), (Some(0), &json!("up"), &json!([])));
    assert_eq!(gateway.client().get("/").send().seen().backend, two.name());

    for (arguments, code, part) in [
        (&["drain", "none", &*first][..], 1, "the pools are app"),
        (&["drain", "app", "127.0.0.1:1"], 1, &*first),
        (&["weight", "app", &*first, "0"], 2, "0 is not in 1..=1000"),
        (&["weight", "app", &*first, "1001"], 2, "1001 is not in 1..=1000"),
        (&["drain", "app", &*first, "--timeout", "1m"], 2, "--wait"),
        (&["drain", "app", &*first, "--wait", "--timeout", "1"], 2, "30m"),
        (&["drain", "app"], 2, "BACKEND"),
        (&["drain", "app", "http://10.0.0.7:80"], 2, "without http://"),
        (&["drain", "app", "10.0.0.7:80/"], 2, "without a path"),
        (&["undrain", "app", "10.0.0.7%3A80"], 2, "expected host:port"),
        (&["weight", "app", " 10.0.0.7:80", "1"], 2, "expected host:port"),
        (&["drain", "a/b", &*first], 2, "1 to 64 letters"),
    ] {
        let (got, _, err) = run(&file, arguments);
        assert_eq!(got, Some(code), "{arguments:?}: {err}");
        assert!(err.contains(part), "{arguments:?}: {err}");
    }
    let other = file.with_file_name("other.toml");
    for (text, part) in [
        (format!("[admin]\naddress = \"127.0.0.1:{}\"\ntoken = \"{TOKEN}\"", free_port()), "no gateway answers on"),
        (
            format!("[admin]\naddress = \"{}\"\ntoken = \"{}\"", gateway.admin_address(), "x".repeat(32)),
            "another admin.token",
        ),
        (format!("[admin]\naddress = \"{}\"", gateway.admin_address()), "set admin.token"),
    ] {
        std::fs::write(&other, text).unwrap();
        let (code, out, err) = run(&other, &[]);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.contains(part) && !err.contains(TOKEN), "{part} in: {err}");
    }
}

#[test]
fn a_drain_that_waits_returns_when_nothing_is_in_flight() {
    let slow = echo_after_step();
    let gateway = setup(&[(&slow, "")], "").start();
    let folder = tempfile::tempdir().unwrap();
    let (file, address) = (command_file(&gateway, &folder), slow.address().to_string());
    let ask = || {
        let mut connection = Connection::open(gateway.address());
        connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        connection
    };
    let mut begun = ask();
    slow.after_requests(1);

    let (code, _, err) = run(&file, &["drain", "app", &address, "--wait", "--timeout", "300ms"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.ends_with("error: 1 still in flight after 300ms; the backend stays drained\n"), "{err}");
    assert_eq!(look(&gateway, &slow)["state"], "draining");

    let wait =
        |command: &mut Command| -> Child { command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap() };
    let mut waiting = wait(&mut pools(&file, &["drain", "app", &address, "--wait"]));
    assert_eq!(read_line(waiting.stderr.as_mut().unwrap()), "1 in flight");
    assert!(waiting.try_wait().unwrap().is_none(), "it waits");
    slow.step();
    assert_eq!(begun.read_response("GET").unwrap().status, 200);
    let Output { status, stdout, .. } = waiting.wait_with_output().unwrap();
    assert_eq!(status.code(), Some(0));
    let out = String::from_utf8(stdout).unwrap();
    assert_eq!(out, format!("{address}: draining by hand, weight 1, 0 in flight\n"));

    set(&gateway, &slow, "{\"drain\": false}");
    let mut begun = ask();
    slow.after_requests(2);
    let mut waiting = wait(&mut pools(&file, &["drain", "app", &address, "--wait"]));
    assert_eq!(read_line(waiting.stderr.as_mut().unwrap()), "1 in flight");
    set(&gateway, &slow, "{\"drain\": false}");
    let Output { status, stderr, .. } = waiting.wait_with_output().unwrap();
    let err = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains("somebody has undrained it"), "{err}");
    slow.step();
    assert_eq!(begun.read_response("GET").unwrap().status, 200);
}

/// Without its end, and nothing of what comes after it.
fn read_line(from: &mut impl std::io::Read) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while from.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn page(gateway: &Gateway, target: &str) -> Response {
    let admin = Client::of(gateway.admin_address());
    admin.get(target).header("Authorization", &format!("Basic {}", base64(&format!("ann:{TOKEN}")))).send()
}

#[test]
fn the_status_page_shows_it_all_and_no_secret() {
    let mut redis = RedisServer::start();
    let (one, two, three) = (Backend::echo(), Backend::echo(), Backend::echo());
    let gateway = with_token(
        Gateway::in_front_of(&[])
            .weighted_pool("app", &[(&one, "weight = 2"), (&two, ""), (&three, "drain = true")], "")
            .store(Store::of(&redis))
            .with("[store]\ngrace = \"2m\""),
    )
    .start();
    let ann = gateway.log_in("ann");
    assert_eq!(ann.get("/").send().status, 200);
    wait_until("the store is seen", || page(&gateway, "/status").text().contains("<dd>up</dd>"));
    set(&gateway, &one, "{\"weight\": 5}");
    set(&gateway, &two, "{\"drain\": true}");
    set(&gateway, &three, "{\"drain\": false}");

    let shown = page(&gateway, "/status");
    let text = shown.text();
    let address = gateway.address().to_string();
    for part in [
        "<html lang=\"en\">",
        "<meta http-equiv=\"refresh\" content=\"10\">",
        "<h1>Cloakroom on ",
        env!("CARGO_PKG_VERSION"),
        "<dd>ready</dd>",
        "<dt>Copies of sessions</dt><dd>1</dd>",
        "<dt>Last reload</dt><dd>none since the start</dd>",
        &format!("<code>{address}</code> HTTP</li>"),
        &format!("<code>{}</code> admin</li>", gateway.admin_address()),
        "<caption id=\"pool-app-caption\">Backends of app</caption>",
        &format!("<th scope=\"row\">{}</th>", one.address()),
        "<td class=\"quiet\">draining by hand</td>",
        "<td class=\"good\">up (file: drain)</td>",
        "5 (file: 2)",
    ] {
        assert!(text.contains(part), "{part} in: {text}");
    }
    let policy = shown.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
    let expected = [
        ("content-type", "text/html; charset=utf-8"),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("x-frame-options", "DENY"),
    ];
    for (name, value) in expected {
        assert_eq!(shown.header(name), Some(value));
    }
    for forbidden in
        ["<script", "src=", "<form", TOKEN, redis.url().as_str(), "grace = ", &ann.cookie("session").unwrap()[2..]]
    {
        assert!(!text.contains(forbidden), "{forbidden} in: {text}");
    }
    let still = page(&gateway, "/status?refresh=off").text();
    assert!(!still.contains("http-equiv") && still.contains("<a href=\"/status\">"), "who reads may stop it");
    for (target, status) in [("/status?refresh=on", 400), ("/status?x=1", 400), ("/status/", 404)] {
        assert_eq!(page(&gateway, target).status, status, "{target}");
    }
    assert_eq!(send(&gateway, "POST", "/status", "").header("allow"), Some("GET, HEAD"));

    gateway.reload(|setup| setup).unwrap();
    assert!(page(&gateway, "/status").text().contains("Z: applied</dd>"));
    let broken = gateway.reload(|setup| setup.with("[pool.app.nonsense]")).unwrap_err();
    let text = page(&gateway, "/status").text();
    assert!(text.contains("Z: refused, the configuration before it stays") && !text.contains("nonsense"), "{broken}");
    redis.kill();
    wait_until("the store is down", || page(&gateway, "/status").text().contains("down; bridged"));
    let text = page(&gateway, "/status").text();
    assert!(text.contains("for 2 min (grace)") || text.contains("for 120 s (grace)"), "{text}");
}
