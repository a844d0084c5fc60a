//! Does the operator's day go well? Check, start, reload, stop, logs, metrics (invariants 9 and 10).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection};
use crate::harness::gateway::{Gateway, PASSWORD};
use crate::harness::{Over, free_port, wait_until};

pub(crate) const ADMIN_TOKEN: &str = "q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2q7Zp-Kw2";

/// Keys of a ring, made at random as is asked for.
const KEYS: [&str; 2] =
    ["E75zE0cHsrRztfXSw9WHaYqoJLAUYMi/ZKnOfyAcnQM=", "j7tJPkUicGC326WDpHJ/cJ6iSnynsFNhJR/Ut/oCals="];

pub(crate) const CLOAKROOM: &str = env!("CARGO_BIN_EXE_cloakroom");

pub(crate) fn cloakroom(arguments: &[&str]) -> Output {
    Command::new(CLOAKROOM).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// A process of the binary, which ends with this value.
pub(crate) struct Daemon(Child);

impl Daemon {
    pub(crate) fn run(config: &Path) -> Self {
        Self::of(Command::new(CLOAKROOM).args(["run", "--config", config.to_str().unwrap()]))
    }

    /// As `command` runs it.
    pub(crate) fn of(command: &mut Command) -> Self {
        Self::saying_to(command, Stdio::piped(), Stdio::piped())
    }

    /// As `command` runs it, with these for its outputs.
    pub(crate) fn saying_to(command: &mut Command, out: impl Into<Stdio>, err: impl Into<Stdio>) -> Self {
        Self(command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap())
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// What it says on standard error, and what its successors say there.
    pub(crate) fn log(&mut self) -> Log {
        let (lines, err) = (Log::default(), self.0.stderr.take().unwrap());
        let written = Arc::clone(&lines.0);
        std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                written.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        lines
    }

    /// Its exit code, when it has ended by itself.
    pub(crate) fn exit_code(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Ends it in an orderly way. Gives what it said on both of its outputs.
    pub(crate) fn stopped(mut self) -> (String, String) {
        let (out, err) = (self.0.stdout.take().unwrap(), self.0.stderr.take().unwrap());
        let noise = std::thread::spawn(move || std::io::read_to_string(err).unwrap());
        self.signal("TERM");
        let lines = std::io::read_to_string(out).unwrap();
        (lines, noise.join().unwrap())
    }

    /// The memory that it holds.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it runs");
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Its descriptors: files, sockets and whatever else it has open.
    pub(crate) fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.0.id())).unwrap().count()
    }

    /// The processor time that it has taken, in ticks of a hundredth of a second (proc_pid_stat(5), fields 14 and 15).
    pub(crate) fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields = stat.rsplit(") ").next().unwrap().split(' ');
        fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// Waits until it has ended by itself.
    pub(crate) fn ended(mut self) {
        let _ = self.0.wait();
    }
}

/// Lines that are still being written.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<String>>);

impl Log {
    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        wait_until(text, || self.text().contains(text));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder with a configuration on fixed ports, for a process of its own.
pub(crate) fn deployment(
    backends: &[&Backend],
    rest: &str,
) -> (tempfile::TempDir, std::path::PathBuf, std::net::SocketAddr) {
    let folder = tempfile::tempdir().unwrap();
    let (port, admin) = (free_port(), free_port());
    let addresses: Vec<_> = backends.iter().map(|backend| backend.address().to_string()).collect();
    let hash = Command::new(CLOAKROOM)
        .arg("hash-password")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            use std::io::Write;
            writeln!(child.stdin.take().unwrap(), "{PASSWORD}")?;
            child.wait_with_output()
        })
        .unwrap();
    let hash = String::from_utf8(hash.stdout).unwrap();
    std::fs::write(folder.path().join("users.toml"), format!("[ann]\npassword = \"{}\"\n", hash.trim_end())).unwrap();
    let text = format!(
        "[[listener]]\naddress = \"127.0.0.1:{port}\"\n[admin]\naddress = \"127.0.0.1:{admin}\"\n\
         [login.password]\nusers_file = \"users.toml\"\n[pool.app]\nbackends = {addresses:?}\n\
         [[route]]\npath = \"/\"\npool = \"app\"\naccess = \"public\"\n\
         [[route]]\npath = \"/private\"\npool = \"app\"\n{rest}"
    );
    let file = folder.path().join("cloakroom.toml");
    std::fs::write(&file, text).unwrap();
    (folder, file, ([127, 0, 0, 1], port).into())
}

pub(crate) fn is_up(address: std::net::SocketAddr) -> bool {
    std::net::TcpStream::connect(address).is_ok()
}

#[test]
fn check_says_all_that_is_wrong_and_the_next_move() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.toml");
    std::fs::write(&file, "[[listener]]\naddress = \"127.0.0.1:1\"\n\n[pool.app]\nbackends = [\"127.0.0.1:2\"]\n\n[[route]]\npath = \"/\"\npool = \"ap\"\naccess = \"public\"\n\n[[route]]\npath = \"/a//b\"\npool = \"app\"\naccess = \"public\"\n").unwrap();
    let output = cloakroom(&["check", file.to_str().unwrap()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    for part in ["bad.toml:9:8", "bad.toml:13:8", "^", "hint:"] {
        assert!(text.contains(part), "{part} in:\n{text}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn a_start_that_cannot_be_fails_at_once_and_says_why() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "");
    let _taken = std::net::TcpListener::bind(address).unwrap();
    let output = cloakroom(&["run", "--config", file.to_str().unwrap()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("cannot listen on {address}")) && text.contains("another process"), "{text}");

    let missing = cloakroom(&["run", "--config", "/nowhere/at/all.toml"]);
    let text = String::from_utf8(missing.stderr).unwrap();
    assert_eq!(missing.status.code(), Some(78), "{text}");
    assert!(text.contains("/nowhere/at/all.toml") && text.contains("cannot be read"), "{text}");
}

#[test]
fn a_password_hash_is_printed_alone() {
    let (_folder, file, _) = deployment(&[&Backend::echo()], "");
    let users = std::fs::read_to_string(file.with_file_name("users.toml")).unwrap();
    let hash = users.split('"').nth(1).unwrap();
    assert!(hash.starts_with("$argon2id$v=19$") && !hash.contains(char::is_whitespace), "{hash}");
    assert_eq!(cloakroom(&["check", file.to_str().unwrap()]).status.code(), Some(0), "and it passes the check");
}

#[test]
fn an_answer_that_nobody_has_is_a_failure() {
    let (_folder, file, _) = deployment(&[&Backend::echo()], "");
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for (arguments, input) in [(&["check", file.to_str().unwrap()][..], ""), (&["hash-password"], "secret\n")] {
        let mut child = Command::new(CLOAKROOM)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(full())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains("standard output"), "{arguments:?}: {text}");
    }
}

#[test]
fn a_reader_who_has_seen_enough_hears_no_complaint() {
    let (_folder, file, _) = deployment(&[&Backend::echo()], "");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output =
        Command::new(CLOAKROOM).args(["check", file.to_str().unwrap()]).stdout(writer).stderr(Stdio::piped()).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "the answer did not arrive");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn a_term_under_load_fails_no_request_that_had_begun() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "");
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut connection = Connection::open(address);
                loop {
                    // What is sent before the gateway said that it closes must be answered.
                    connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
                    let response = connection.read_response("GET").expect("a request that had begun is answered");
                    assert_eq!(response.status, 200);
                    answered.fetch_add(1, Ordering::SeqCst);
                    if response.closes {
                        return;
                    }
                }
            });
        }
        wait_until("there is load", || 200 < answered.load(Ordering::SeqCst));
        daemon.signal("TERM");
    });
    let status = daemon.0.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(!is_up(address), "and nothing listens any more");
}

#[test]
fn a_request_in_flight_at_the_term_gets_its_answer() {
    let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let (_folder, file, address) = deployment(&[&backend], "");
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let mut connection = Connection::open(address);
    connection.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    backend.after_requests(1);
    daemon.signal("TERM");
    wait_until("it accepts no more", || !is_up(address));
    backend.step();
    let response = connection.read_response("GET").unwrap();
    assert_eq!((response.status, response.closes), (200, true));
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0), "as soon as it is drained, long before the drain time-out");
}

/// Where the admin listener of a deployment is, and what it says of readiness.
pub(crate) fn admin_of(config: &Path) -> std::net::SocketAddr {
    let text = std::fs::read_to_string(config).unwrap();
    let (_, admin) = text.split_once("[admin]\naddress = \"").unwrap();
    admin.split('"').next().unwrap().parse().unwrap()
}

fn readiness(admin: std::net::SocketAddr) -> (u16, String) {
    let response = Client::of(admin).get("/health/ready").send();
    (response.status, response.text())
}

#[test]
fn a_lame_duck_says_no_to_the_balancer_and_yes_to_everybody() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "[server]\nlame_duck = \"10m\"\n");
    let admin = admin_of(&file);
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway is ready", || is_up(admin) && readiness(admin).0 == 200);
    let mut kept = Connection::open(address);
    daemon.signal("TERM");
    wait_until("it is ready no more", || readiness(admin).0 == 503);
    assert!(readiness(admin).1.contains("draining"));
    for _ in 0..3 {
        assert_eq!(Client::of(address).get("/").send().status, 200, "new connections are served");
        kept.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let response = kept.read_response("GET").unwrap();
        assert_eq!((response.status, response.closes), (200, false), "and old ones are kept");
    }
    daemon.signal("TERM");
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0), "who asks twice need not wait");
}

#[test]
fn a_lame_duck_drains_when_its_time_is_over() {
    let (_folder, file, address) = deployment(&[&Backend::echo()], "[server]\nlame_duck = \"300ms\"\n");
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    daemon.signal("TERM");
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
}

/// A gateway with a request under way that its backend answers never.
fn busy(backend: &Backend, drain_timeout: &str) -> (tempfile::TempDir, Daemon, std::net::SocketAddr, Connection) {
    let more = format!("[log]\nformat = \"json\"\n[server]\ndrain_timeout = \"{drain_timeout}\"");
    let (folder, file, address) = deployment(&[backend], &more);
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let mut connection = Connection::open(address);
    connection.write("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n");
    backend.after_requests(1);
    (folder, daemon, address, connection)
}

/// It ends, and the request that was under way has its line.
#[track_caller]
fn assert_cut(mut daemon: Daemon) {
    let out = std::io::read_to_string(daemon.0.stdout.take().unwrap()).unwrap();
    let line: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&line["path"], &line["outcome"]), (&"/slow".into(), &"cut".into()), "{out}");
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_second_term_cuts_the_drain() {
    let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let (_folder, daemon, address, _connection) = busy(&backend, "1h");
    daemon.signal("TERM");
    wait_until("it accepts no more", || !is_up(address));
    daemon.signal("TERM");
    assert_cut(daemon);
}

#[test]
fn a_drain_that_takes_too_long_is_cut() {
    let backend = Backend::always(Answer::AfterStep(Box::new(Answer::Echo)));
    let (_folder, daemon, _address, _connection) = busy(&backend, "300ms");
    daemon.signal("TERM");
    assert_cut(daemon);
}

#[test]
fn a_quit_without_a_successor_is_refused() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "");
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let mut log = BufReader::new(daemon.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    daemon.signal("QUIT");
    assert!(log.any(|line| line.contains("SIGQUIT refused: there is no successor")));
    assert_eq!(Client::of(address).get("/").send().status, 200, "and it goes on");
    daemon.signal("TERM");
    assert!(log.any(|line| line.contains("shutting down")));
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
}

fn reloads(admin: std::net::SocketAddr, result: &str) -> String {
    let text = Client::of(admin).get("/metrics").send().text();
    let name = format!("cloakroom_reloads_total{{result=\"{result}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&name).map(str::to_owned)).unwrap_or_default()
}

#[test]
fn a_hangup_applies_the_file_and_a_broken_file_changes_nothing() {
    let (one, two) = (Backend::echo(), Backend::echo());
    let (_folder, file, address) = deployment(&[&one], "");
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let client = Client::of(address);
    assert_eq!(client.get("/").send().seen().backend, one.name());

    let good = std::fs::read_to_string(&file).unwrap();
    let admin = admin_of(&file);
    std::fs::write(&file, good.replace("[pool.app]", "[pool.app")).unwrap();
    daemon.signal("HUP");
    wait_until("the broken file is refused", || reloads(admin, "refused") == "1");
    assert_eq!(client.get("/").send().seen().backend, one.name(), "the old configuration works on");

    std::fs::write(&file, good.replace(&one.address().to_string(), &two.address().to_string())).unwrap();
    daemon.signal("HUP");
    wait_until("the good file is applied", || reloads(admin, "applied") == "1");
    assert_eq!(client.get("/").send().seen().backend, two.name());
}

/// What the command prints of a reload, without its first line.
fn report(output: &Output) -> Vec<String> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().skip(1).map(|line| line.trim().to_owned()).collect()
}

#[test]
fn a_reload_tells_what_has_changed_and_what_needs_a_restart() {
    let (one, two) = (Backend::echo(), Backend::echo());
    let (folder, file, address) = deployment(&[&one], "");
    let (certificate, key) = crate::harness::tls::write_files(folder.path());
    let ring = folder.path().join("session.keys");
    std::fs::write(&ring, KEYS[0]).unwrap();
    let spare = free_port();
    let good = std::fs::read_to_string(&file).unwrap()
        + &format!(
            "[session]\nkeys_file = \"session.keys\"\n[[listener]]\naddress = \"127.0.0.1:{spare}\"\n\
             cert = {certificate:?}\nkey = {key:?}\n"
        );
    let good = good.replace("[admin]", &format!("[admin]\ntoken = \"{ADMIN_TOKEN}\""));
    std::fs::write(&file, &good).unwrap();
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let path = file.to_str().unwrap();
    let reload = || cloakroom(&["reload", "--config", path]);
    let told = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let output = reload();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        report(&output)
    };

    assert_eq!(told(&good), ["nothing has changed"]);
    let first = String::from_utf8(reload().stdout).unwrap();
    assert!(first.starts_with(&format!("{path}: reloaded\n")), "{first}");

    let cases: &[(&str, &str, &str)] = &[
        ("[pool.app]", "[pool.other]\nbackends = [\"127.0.0.1:2\"]\n[pool.app]", "applied          pool.other: added"),
        (&one.address().to_string(), &two.address().to_string(), "applied          pool.app: backends"),
        ("access = \"public\"", "access = \"optional\"", "applied          route /: access"),
        ("[admin]", "[identity]\npreset = \"remote\"\n[admin]", "applied          identity: preset"),
        ("[admin]", "[login]\ntitle = \"Come in\"\n[admin]", "applied          login: title"),
        ("[admin]", "[log]\nlevel = \"debug\"\n[admin]", "applied          log: level"),
        ("[admin]", "[log]\nformat = \"json\"\n[admin]", "needs a restart  log: format"),
        ("[admin]", "[server]\nthreads = 7\n[admin]", "needs a restart  server: threads"),
        ("[admin]", "[store.memory]\nsessions_max = 7\n[admin]", "needs a restart  store.memory: added"),
    ];
    for (before, after, line) in cases {
        let changed = good.replacen(before, after, 1);
        assert_eq!(told(&changed), [*line]);
        if line.starts_with("applied") {
            assert_eq!(told(&changed), ["nothing has changed"], "a second time: {line}");
            assert_eq!(told(&good), [line.replace("added", "removed")], "and back: {line}");
        } else {
            assert_eq!(told(&changed), [*line], "until there is a restart");
            assert_eq!(told(&good), ["nothing has changed"], "which is not needed any more");
        }
    }
    assert_eq!(
        told(&good.replace(&format!(":{spare}"), ":1")),
        [
            "needs a restart  listener 127.0.0.1:1: added".to_owned(),
            format!("needs a restart  listener 127.0.0.1:{spare}: removed")
        ]
    );

    std::fs::write(&file, &good).unwrap();
    let users = file.with_file_name("users.toml");
    let hash = std::fs::read_to_string(&users).unwrap();
    std::fs::write(&users, format!("{hash}groups = [\"staff\"]\n{}", hash.replace("[ann]", "[bob]"))).unwrap();
    assert_eq!(report(&reload()), ["applied          users: 1 added, 1 changed"]);
    std::fs::write(
        &ring,
        KEYS.join(
            "
",
        ),
    )
    .unwrap();
    assert_eq!(report(&reload()), ["applied          session keys: content"]);
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&certificate, other.cert.pem()).unwrap();
    std::fs::write(&key, other.signing_key.serialize_pem()).unwrap();
    assert_eq!(report(&reload()), [format!("applied          certificate {}: content", certificate.display())]);

    let (_, said) = daemon.stopped();
    assert!(
        said.contains("configuration reloaded applied=\"users: 1 added, 1 changed\""),
        "and the log has it: {said}"
    );
    assert!(said.contains("restart=\"server: threads\""), "{said}");
}

#[test]
fn a_broken_file_changes_nothing_and_the_command_says_what_is_wrong() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "");
    let good = std::fs::read_to_string(&file).unwrap();
    let good = good.replace("[admin]", &format!("[admin]\ntoken = \"{ADMIN_TOKEN}\""));
    std::fs::write(&file, &good).unwrap();
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let path = file.to_str().unwrap();
    let broken: &[(&str, &str, &[&str])] = &[
        ("pool = \"app\"", "pool = \"ap\"", &["cloakroom.toml:", "there is no pool", "^", "hint:"]),
        ("[pool.app]", "[pool.app", &["cloakroom.toml:", "^"]),
        ("[pool.app]", "[admn]\n[pool.app]", &["cloakroom.toml:", "admn", "^"]),
        ("users.toml", "nobody.toml", &["nobody.toml", "cannot be read"]),
    ];
    for (before, after, expected) in broken {
        std::fs::write(&file, good.replacen(before, after, 1)).unwrap();
        let output = cloakroom(&["reload", "--config", path]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{after}: {text}");
        assert!(output.stdout.is_empty());
        for part in *expected {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
        assert!(text.contains("nothing has changed"), "{text}");
        assert_eq!(
            Client::of(address).get("/").send().seen().backend,
            backend.name(),
            "the old configuration works on"
        );
    }
    let (_, said) = daemon.stopped();
    assert_eq!(said.matches("configuration not reloaded, the old one stays").count(), broken.len(), "{said}");
    assert!(said.contains("there is no pool") && said.contains('^'), "the log has them, too: {said}");
}

#[test]
fn only_the_token_reloads() {
    let backend = Backend::echo();
    let admin = |token: &str| format!("[admin]\naddress = \"127.0.0.1:0\"\n{token}");
    let open = Gateway::in_front_of(&[&backend]).with(&admin("")).start();
    let post = |gateway: &Gateway, token: &str| {
        let client = Client::of(gateway.admin_address());
        client.request("POST", "/reload").header("Authorization", &format!("Bearer {token}")).send().status
    };
    assert_eq!(post(&open, ADMIN_TOKEN), 404, "without a token there is no such thing");
    let gateway = Gateway::in_front_of(&[&backend]).with(&admin(&format!("token = \"{ADMIN_TOKEN}\""))).start();
    assert_eq!(post(&gateway, "wrong"), 401);
    assert_eq!(gateway.admin("/reload").status, 401);
    let client = Client::of(gateway.admin_address());
    let get = client.get("/reload").header("Authorization", &format!("Bearer {ADMIN_TOKEN}")).send();
    assert_eq!((get.status, get.header("allow")), (405, Some("POST")));
    assert_eq!(gateway.metric("cloakroom_reloads_total{result=\"applied\"}"), 0.0);
    assert_eq!(post(&gateway, ADMIN_TOKEN), 200);
    assert_eq!(gateway.metric("cloakroom_reloads_total{result=\"applied\"}"), 1.0);
}

#[test]
fn a_reload_that_cannot_be_asked_for_says_the_next_move() {
    let (_folder, file, _) = deployment(&[&Backend::echo()], "");
    let path = file.to_str().unwrap();
    let good = std::fs::read_to_string(&file).unwrap();
    for (text, expected) in [
        (good.clone(), "set admin.token"),
        (good.replace("[admin]", "[admin]\nenabled = false"), "set admin.enabled"),
        (good.replace("[admin]", &format!("[admin]\ntoken = \"{ADMIN_TOKEN}\"")), "no gateway answers on 127.0.0.1:"),
        (good.replace("[admin]", "[admin]\ntoken = { file = \"nowhere\" }"), "admin.token"),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = cloakroom(&["reload", "--config", path]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected), "{expected} in:\n{text}");
        assert!(!text.contains(ADMIN_TOKEN));
    }
}

#[test]
fn a_reload_sets_the_level_of_the_log() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "[log]\nlevel = \"error\"");
    let daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let admin = admin_of(&file);
    let set = |from: &str, to: &str, round: &str| {
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace(&format!("level = \"{from}\""), &format!("level = \"{to}\""))).unwrap();
        daemon.signal("HUP");
        wait_until("the file is applied", || reloads(admin, "applied") == round);
    };
    set("error", "info", "1");
    set("info", "error", "2");
    let (_, said) = daemon.stopped();
    assert!(said.contains("configuration reloaded"), "from the first one on: {said}");
    assert!(!said.contains("shutting down") && !said.contains("listening"), "not before, nor after the second: {said}");
}

#[test]
fn reloads_under_load_fail_no_request() {
    let backends = [Backend::echo(), Backend::echo()];
    let gateway = Gateway::in_front_of(&[&backends[0]]).route("/", "access = \"public\"").start();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _over = Over(&stop);
        for _ in 0..4 {
            scope.spawn(|| {
                let client = gateway.client();
                while !stop.load(Ordering::SeqCst) {
                    assert_eq!(client.get("/").send().status, 200);
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for round in 0..20 {
            let before = answered.load(Ordering::SeqCst);
            gateway.reload(|setup| setup.pool("app", &[&backends[round % 2]], "")).unwrap();
            let broken = gateway.reload(|setup| setup.route("/x", "pool = \"nowhere\""));
            assert!(broken.unwrap_err().contains("nowhere"));
            wait_until("requests go on", || before + 8 < answered.load(Ordering::SeqCst));
        }
    });
    assert_eq!(gateway.metric("cloakroom_reloads_total{result=\"applied\"}"), 20.0);
}

#[test]
fn every_request_leaves_one_line_and_nothing_secret() {
    let backend = Backend::echo();
    let (_folder, file, address) = deployment(&[&backend], "[log]\nformat = \"json\"\nlevel = \"trace\"");
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let client = Client::of(address);
    let page = client.navigate("/.cloakroom/login").send();
    let form =
        crate::harness::gateway::Form::on(&page.text()).filled_in(&[("username", "ann"), ("password", PASSWORD)]);
    let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(client.post_form("/.cloakroom/login", &fields).send().status, 303);
    let cookie = client.cookie("session").unwrap();
    client.get("/private?token=in-the-query").header("Authorization", "Bearer in-a-field").send();
    client.get("/a//b").send();
    let nobody = Client::of(address);
    nobody.get("/private").send();
    nobody.navigate("/private").send();
    backend.kill();
    nobody.get("/").send();
    daemon.signal("TERM");
    let (out, err) = (daemon.0.stdout.take().unwrap(), daemon.0.stderr.take().unwrap());
    let noise = std::thread::spawn(move || std::io::read_to_string(err).unwrap());
    let lines: Vec<String> = BufReader::new(out).lines().map(Result::unwrap).collect();
    let outcomes: Vec<String> = lines
        .iter()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .map(|line| format!("{} {}", line["status"], line["outcome"].as_str().unwrap()))
        .collect();
    let expected = [
        "200 answered",
        "303 answered",
        "200 forwarded",
        "400 refused",
        "401 unauthenticated",
        "302 login_redirect",
        "503 no_backend",
    ];
    assert_eq!(outcomes, expected, "each request one line, in order");
    assert!(lines[2].contains("\"user\":\"ann\"") && lines[2].contains("\"route\":\"/private\""), "{}", lines[2]);
    let everything = lines.join("\n") + &noise.join().unwrap();
    for secret in [cookie.as_str(), &cookie[2..], PASSWORD, "in-the-query", "in-a-field", "$argon2id"] {
        assert!(!everything.contains(secret), "{secret} is in the log, even at level trace");
    }
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_neither_traffic_nor_the_end() {
    let (_folder, file, address) = deployment(&[&Backend::echo()], "[log]\nformat = \"json\"");
    // Nobody reads what it writes; its pipes hold 64 KiB.
    let mut daemon = Daemon::run(&file);
    wait_until("the gateway listens", || is_up(address));
    let client = Client::of(address);
    for _ in 0..600 {
        assert_eq!(client.get("/.cloakroom/session").send().status, 401, "traffic goes on");
    }
    daemon.signal("TERM");
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0), "and the end is not held up");
}

#[test]
fn metrics_tell_what_happened_and_nothing_of_whom() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend]).start();
    let ann = gateway.log_in("ann");
    ann.get("/").send();
    gateway.try_log_in(&gateway.client(), "ann", "wrong");
    gateway.client().get("/").send();
    // A request is counted when it has ended, which its client may know first.
    for (name, expected) in [
        ("cloakroom_requests_total{outcome=\"forwarded\",route=\"/\",status=\"200\"}", 1.0),
        ("cloakroom_requests_total{outcome=\"unauthenticated\",route=\"/\",status=\"401\"}", 1.0),
        ("cloakroom_session_resolve_seconds_count{result=\"copy\"}", 1.0),
        ("cloakroom_request_seconds_count{route=\"/\"}", 2.0),
        ("cloakroom_store_up", 1.0),
    ] {
        wait_until(name, || gateway.metric(name) == expected);
    }
    let text = gateway.admin("/metrics").text();
    for family in ["cloakroom_logins_total", "cloakroom_connections", "cloakroom_backend_requests_total"] {
        assert!(text.contains(family), "{family}");
    }
    let cookie = ann.cookie("session").unwrap();
    assert!(!text.contains(&cookie) && !text.contains("ann"), "no label names a person or a session");
    assert_eq!(gateway.admin("/health/live").status, 200);
    assert_eq!(gateway.admin("/health/ready").status, 200);
    assert_eq!(gateway.admin("/else").status, 404);
    assert_eq!(gateway.client().get("/metrics").send().status, 401, "not on the public listener");
}

#[test]
fn the_health_command_asks_a_running_gateway() {
    let gateway = Gateway::in_front_of(&[&Backend::echo()]).start();
    let admin = gateway.admin_address().to_string();
    wait_until("the gateway is ready", || cloakroom(&["health", "--admin", &admin]).status.code() == Some(0));
    gateway.stop();
    assert_eq!(cloakroom(&["health", "--admin", &admin]).status.code(), Some(1));
}

#[test]
fn the_demo_starts_on_the_next_free_port_and_lets_its_user_in() {
    let first = free_port();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", first)).unwrap();
    let child = Command::new(CLOAKROOM)
        .args(["demo", "--port", &first.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut daemon = Daemon(child.unwrap());
    let mut said = BufReader::new(daemon.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut word = |name: &str| {
        let line = said.by_ref().find(|line| line.trim_start().starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().to_owned()
    };
    let url = word("open");
    let (user, password) = (word("user"), word("password"));
    let kill = said.find(|line| line.starts_with("Kill one of them")).unwrap();
    let address: std::net::SocketAddr = url.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
    assert_ne!(address.port(), first);
    let client = Client::of(address);
    let page = client.navigate("/.cloakroom/login").send();
    let form =
        crate::harness::gateway::Form::on(&page.text()).filled_in(&[("username", &user), ("password", &password)]);
    let fields: Vec<_> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(client.post_form("/.cloakroom/login", &fields).send().status, 303);
    let (one, two) = (client.navigate("/").send().text(), client.navigate("/").send().text());
    assert!(one.contains("demo@example.org") && one.to_lowercase().contains("x-forwarded-user"), "{one}");
    assert_ne!(one, two, "the other backend answers");

    let pid = kill.split(|c: char| !c.is_ascii_digit()).find(|word| !word.is_empty()).unwrap();
    assert!(Command::new("kill").args(["-9", pid]).status().unwrap().success());
    for _ in 0..6 {
        assert_eq!(client.navigate("/").send().status, 200, "killing a backend is not noticed");
    }
    daemon.signal("TERM");
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
}
