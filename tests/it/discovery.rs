//! Where are the backends now? DNS and files say it, and what they say anew costs no request and no good connection.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::harness::backend::{Answer, Backend};
use crate::harness::client::{Client, Connection};
use crate::harness::dns::{Kind, NameServer, Record, Trouble};
use crate::harness::gateway::{Gateway, Setup, Store};
use crate::harness::{DEADLINE, tell, wait_until};

const PUBLIC: &str = "access = \"public\"";

/// Answers are valid for a second, the least that there is.
const TTL: u32 = 1;

/// A pool `app` of what stands there, with name server, if there is one.
fn finding(backends: &[&str], server: Option<&NameServer>) -> Setup {
    let setup = Gateway::in_front_of(&[]).pool_found("app", backends, "").route("/", PUBLIC);
    server.map_or(setup.clone(), |server| setup.with(&server.table()))
}

fn addresses(backends: &[&Backend]) -> Vec<SocketAddr> {
    backends.iter().map(|backend| backend.address()).collect()
}

/// The entry for this host at the backends' port.
fn dns(host: &str, backend: &Backend) -> String {
    format!("{{ dns = \"{host}:{}\" }}", backend.address().port())
}

/// Who answers how often; all do with 200.
#[track_caller]
fn shares(client: &Client, times: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..times {
        let response = client.get("/").send();
        assert_eq!(response.status, 200, "{}", response.text());
        *shares.entry(response.seen().backend).or_default() += 1;
    }
    shares
}

#[track_caller]
fn wait_for_shares(what: &str, client: &Client, expected: &[(&Backend, usize)]) {
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(backend, count)| (backend.name().to_owned(), *count)).collect();
    let times = expected.values().sum();
    wait_until(what, || shares(client, times) == expected);
}

/// Whether the last look there brought an answer.
fn is_up(gateway: &Gateway, source: &str) -> bool {
    gateway.metric(&format!("cloakroom_discovery_up{{pool=\"app\",source=\"{source}\"}}")) == 1.0
}

fn metric(gateway: &Gateway, name: &str, backend: &str) -> f64 {
    gateway.metric(&format!("cloakroom_backend_{name}{{backend=\"{backend}\",pool=\"app\"}}"))
}

#[test]
fn addresses_that_change_under_load_cost_no_request_and_no_connection_of_those_that_stay() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(3, &Answer::Echo);
    let [leaving, staying, coming] = &backends[..] else { panic!("three") };
    server.set_addresses("api.test", TTL, &addresses(&[leaving, staying]));
    let gateway = finding(&[&dns("api.test", staying)], Some(&server)).start();

    let (is_over, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let client = gateway.client();
                while !is_over.load(Ordering::SeqCst) {
                    let response = client.get("/").send();
                    assert_eq!(response.status, 200, "no request fails: {}", response.text());
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        wait_until("both answer", || backends[..2].iter().all(|backend| 50 < backend.requests().len()));
        for round in 0..3 {
            let (here, there) = if round % 2 == 0 { (coming, leaving) } else { (leaving, coming) };
            server.set_addresses("api.test", TTL, &addresses(&[here, staying]));
            let (begun, so_far) = (here.requests().len(), staying.requests().len());
            wait_until("the other one answers, and who stays does, too", || {
                begun + 50 < here.requests().len() && so_far + 50 < staying.requests().len()
            });
            wait_until("who has left has ended what it had", || {
                metric(&gateway, "requests_total", &there.address().to_string()) == 0.0
            });
            let last = there.requests().len();
            let all = answered.load(Ordering::SeqCst);
            wait_until("many more are answered", || all + 100 < answered.load(Ordering::SeqCst));
            assert_eq!(there.requests().len(), last, "who has left gets nothing more");
        }
        is_over.store(true, Ordering::SeqCst);
    });
    assert!(staying.connections() <= 4, "one for each request at a time: {}", staying.connections());
    assert_eq!(staying.open_connections(), staying.connections(), "none of them was closed");
}

#[test]
fn a_request_at_a_server_that_leaves_comes_to_its_end_and_then_the_server_is_forgotten() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(2, &Answer::AfterStep(Box::new(Answer::Echo)));
    let [leaving, staying] = &backends[..] else { panic!("two") };
    server.set_addresses("api.test", TTL, &addresses(&[leaving]));
    let gateway = finding(&[&dns("api.test", leaving)], Some(&server)).start();
    let counted = |backend: &Backend| metric(&gateway, "requests_total", &backend.address().to_string());

    let mut begun = Connection::open(gateway.address());
    begun.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    leaving.after_requests(1);
    server.set_addresses("api.test", TTL, &addresses(&[staying]));
    wait_until("the other one is known", || metric(&gateway, "weight", &staying.address().to_string()) == 1.0);
    assert_eq!(metric(&gateway, "weight", &leaving.address().to_string()), 0.0, "it is not there any more");
    assert_eq!(counted(leaving), 1.0, "but it has a request");
    leaving.step();
    assert_eq!(begun.read_response("GET").unwrap().seen().backend, leaving.name());
    wait_until("nothing is told of it any more", || counted(leaving) == 0.0);
}

#[test]
fn srv_records_say_host_port_weight_and_who_is_a_backup() {
    let server = NameServer::start();
    let backends: Vec<_> = (0..3).map(|_| Backend::echo()).collect();
    let [large, small, backup] = &backends[..] else { panic!("three") };
    let srv = |priority, weight, backend: &Backend, target: &str| {
        Record::Srv(priority, weight, backend.address().port(), target.to_owned())
    };
    for name in ["large.test", "small.test", "backup.test"] {
        server.set_addresses(name, TTL, &[large.address()]);
    }
    let service = "_http._tcp.api.test";
    let backups = srv(20, 5, backup, "backup.test");
    server.set(service, TTL, &[backups.clone(), srv(10, 30, large, "large.test"), srv(10, 10, small, "small.test")]);
    let gateway = finding(&[&format!("{{ srv = \"{service}\" }}")], Some(&server)).start();
    let client = gateway.client();
    wait_for_shares("weights are exact", &client, &[(large, 6), (small, 2)]);
    assert_eq!(shares(&client, 40), shares(&client, 40), "over any period");
    let name = format!("large.test:{}", large.address().port());
    assert_eq!(metric(&gateway, "weight", &name), 30.0);

    server.set(service, TTL, &[backups.clone(), srv(10, 10, large, "large.test"), srv(10, 10, small, "small.test")]);
    wait_for_shares("new weights count", &client, &[(large, 4), (small, 4)]);
    large.kill();
    small.kill();
    wait_for_shares("the backup answers when nobody else does", &client, &[(backup, 4)]);
    server.set(service, TTL, &[backups]);
    wait_until("alone it is none", || metric(&gateway, "weight", &name) == 0.0);
    assert_eq!(shares(&client, 4).get(backup.name()), Some(&4));
}

#[test]
fn a_name_is_asked_for_again_when_its_time_is_over_and_not_before() {
    let server = NameServer::start();
    let backend = Backend::echo();
    let own = [backend.address()];
    server.set_addresses("short.test", 1, &own);
    server.set_addresses("long.test", 3600, &own);
    // An alias is valid as long as the record of it that is so for the shortest time.
    server.set("alias.test", 3600, &[Record::Cname("short.test".to_owned())]);
    let port = backend.address().port();
    let backends = ["short.test", "long.test"].map(|name| format!("{{ dns = \"{name}:{port}\" }}"));
    let named = format!("\"alias.test:{port}\"");
    let gateway = finding(&[&backends[0], &backends[1], &named], Some(&server)).start();
    wait_until("the short one is followed", || {
        8 <= server.questions("short.test", Kind::A) && 8 <= server.questions("alias.test", Kind::A)
    });
    assert!(server.questions("long.test", Kind::A) <= 3, "once, and again only where an answer got lost");
    assert_eq!(gateway.client().get("/").send().status, 200);
}

#[test]
fn a_name_server_that_is_in_trouble_costs_nobody_a_request() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(2, &Answer::Echo);
    let source = format!("dns:api.test:{}", backends[0].address().port());
    server.set_addresses("api.test", TTL, &addresses(&[&backends[0]]));
    let gateway = finding(&[&dns("api.test", &backends[0])], Some(&server)).start();
    let client = gateway.client();
    let troubles = [Trouble::ServerFailure, Trouble::NoSuchName, Trouble::Empty, Trouble::Refused, Trouble::Silence];
    for (round, trouble) in troubles.into_iter().enumerate() {
        let (now, next) = (&backends[round % 2], &backends[(round + 1) % 2]);
        wait_for_shares("it is found", &client, &[(now, 4)]);
        server.fail("api.test", trouble);
        wait_until(&format!("{trouble:?} is noticed"), || !is_up(&gateway, &source));
        assert_eq!(shares(&client, 4).get(now.name()), Some(&4), "{trouble:?}: the last good addresses count");
        server.set_addresses("api.test", TTL, &addresses(&[next]));
        wait_until(&format!("{trouble:?} is over"), || is_up(&gateway, &source));
    }
}

/// Firewalls that know no IPv6 drop the questions for it.
#[test]
fn a_family_that_nobody_answers_for_does_not_hold_up_the_other() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(2, &Answer::Echo);
    let port = backends[0].address().port();
    for place in [dns("api.test", &backends[0]), format!("\"api.test:{port}\"")] {
        server.set_addresses("api.test", TTL, &addresses(&[&backends[0]]));
        server.fail("api.test", Trouble::SilenceOn(Kind::Aaaa));
        let gateway = finding(&[&place], Some(&server)).start();
        let client = gateway.client();
        wait_until("it is found", || client.get("/").send().status == 200);
        assert_eq!(shares(&client, 3).get(backends[0].name()), Some(&3), "{place}");
        server.set_addresses("api.test", TTL, &addresses(&[&backends[1]]));
        server.fail("api.test", Trouble::SilenceOn(Kind::Aaaa));
        wait_for_shares("and followed", &client, &[(&backends[1], 3)]);
        let source = if place.starts_with('{') { "dns:api.test" } else { "api.test" };
        assert!(is_up(&gateway, &format!("{source}:{port}")), "{place}: it is no failure");
    }
}

/// As many as no datagram holds.
const MANY: u8 = 40;

#[test]
fn an_answer_that_no_datagram_holds_is_had_over_tcp_and_all_of_it_counts() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(MANY, &Answer::Echo);
    let all: Vec<_> = backends.iter().collect();
    let each: Vec<_> = all.iter().map(|backend| (*backend, 1)).collect();
    server.set_addresses("api.test", TTL, &addresses(&all));
    let gateway = finding(&[&dns("api.test", &backends[0])], Some(&server)).start();
    let client = gateway.client();
    let source = format!("dns:api.test:{}", backends[0].address().port());
    wait_until("they are found", || is_up(&gateway, &source));
    let expected: BTreeMap<_, _> = all.iter().map(|backend| (backend.name().to_owned(), 1)).collect();
    assert_eq!(shares(&client, all.len()), expected, "each of them has its turn");
    assert!(0 < server.questions_over_tcp(), "the answer was cut short");

    server.set_addresses("api.test", TTL, &addresses(&all[..2]));
    wait_for_shares("fewer fit again", &client, &each[..2]);
    let so_far = server.questions_over_tcp();
    let asked = server.questions("api.test", Kind::A);
    wait_until("it is asked again", || asked + 2 <= server.questions("api.test", Kind::A));
    assert_eq!(server.questions_over_tcp(), so_far, "by datagram, as before");

    let srv =
        |backend: &&Backend| Record::Srv(0, 1, backend.address().port(), format!("{}.test", backend.address().ip()));
    let service = "_http._tcp.api.test";
    for backend in &all {
        server.set_addresses(&format!("{}.test", backend.address().ip()), TTL, &[backend.address()]);
    }
    server.set(service, TTL, &all.iter().map(srv).collect::<Vec<_>>());
    let gateway = finding(&[&format!("{{ srv = \"{service}\" }}")], Some(&server)).start();
    let client = gateway.client();
    wait_for_shares("the servers of a service, too", &client, &each);
    assert!(so_far < server.questions_over_tcp());
}

#[test]
fn servers_of_both_families_are_found_and_get_requests() {
    let Some([four, six]) = Backend::of_both_families(&Answer::Echo) else {
        return tell("NOT TESTED, as this machine has no ::1: backends that are found at addresses of IPv6");
    };
    let server = NameServer::start();
    server.set_addresses("both.test", TTL, &addresses(&[&four, &six]));
    server.set_addresses("six.test", TTL, &addresses(&[&six]));
    // As an entry to be found, and as one backend that has a name.
    for (host, expected) in [("six.test", &[(&six, 4)][..]), ("both.test", &[(&four, 2), (&six, 2)])] {
        for place in [dns(host, &six), format!("\"{host}:{}\"", six.address().port())] {
            let gateway = finding(&[&place], Some(&server)).start();
            let client = gateway.client();
            wait_for_shares(&place, &client, expected);
            let answered: usize = shares(&client, 8).values().sum();
            assert_eq!(answered, 8, "{place}: none of them fails");
        }
    }

    let gateway = finding(&[&dns("both.test", &six)], Some(&server)).start();
    let client = gateway.client();
    for (now, share) in [(vec![&six], vec![(&six, 3)]), (vec![&four], vec![(&four, 3)])] {
        server.set_addresses("both.test", TTL, &addresses(&now));
        wait_for_shares("a family comes and goes as any address does", &client, &share);
    }
    let service = "_http._tcp.api.test";
    let srv = |name: &str| Record::Srv(0, 1, six.address().port(), name.to_owned());
    server.set_addresses("four.test", TTL, &addresses(&[&four]));
    server.set(service, TTL, &[srv("four.test"), srv("six.test")]);
    let gateway = finding(&[&format!("{{ srv = \"{service}\" }}")], Some(&server)).start();
    wait_for_shares("servers of a service, too", &gateway.client(), &[(&four, 2), (&six, 2)]);
}

#[test]
fn a_server_that_dns_adds_later_begins_slowly_and_those_of_the_start_do_not() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(3, &Answer::Echo);
    let [one, two, later] = &backends[..] else { panic!("three") };
    server.set_addresses("api.test", TTL, &addresses(&[one, two]));
    // Long enough that a tenth of its share stays a tenth, however long the test takes.
    let setup = Gateway::in_front_of(&[]).pool_found("app", &[&dns("api.test", one)], "slow_start = \"10d\"");
    let gateway = setup.route("/", PUBLIC).with(&server.table()).start();
    let client = gateway.client();
    let counts = |times| {
        let shares = shares(&client, times);
        [one, two, later].map(|backend| shares.get(backend.name()).copied().unwrap_or_default())
    };
    assert_eq!(counts(10), [5, 5, 0], "at the start all are new, and none is slow");

    server.set_addresses("api.test", TTL, &addresses(&[one, two, later]));
    wait_until("it is known", || metric(&gateway, "weight", &later.address().to_string()) == 1.0);
    assert_eq!(counts(210), [100, 100, 10], "a tenth of what the others get");

    server.set_addresses("api.test", TTL, &addresses(&[two, later]));
    wait_until("one has left", || metric(&gateway, "weight", &one.address().to_string()) == 0.0);
    assert_eq!(counts(110), [0, 100, 10], "that another one leaves makes it no faster");
    server.set_addresses("api.test", TTL, &addresses(&[one, two, later]));
    wait_until("it is back", || metric(&gateway, "weight", &one.address().to_string()) == 1.0);
    assert_eq!(counts(120), [10, 100, 10], "who comes back begins slowly, too");
}

/// What a TLS client says first (RFC 8446, section 4.1.2), with the name that it wants in the clear.
fn first_record(listener: &TcpListener) -> Vec<u8> {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    wait_until("somebody asks", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (mut stream, _) = accepted.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    let mut record = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
    stream.read_exact(&mut record).unwrap();
    record
}

#[test]
fn a_check_over_tls_wants_the_name_that_is_configured_of_servers_that_are_found() {
    let server = NameServer::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let service = "_https._tcp.api.test";
    server.set_addresses("api.test", TTL, &[address]);
    server.set_addresses("answer.test", TTL, &[address]);
    server.set(service, TTL, &[Record::Srv(0, 0, address.port(), "answer.test".to_owned())]);
    let contains = |record: &[u8], name: &str| record.windows(name.len()).any(|part| part == name.as_bytes());
    for place in [format!("{{ dns = \"api.test:{}\" }}", address.port()), format!("{{ srv = \"{service}\" }}")] {
        let check = "check.tls = true\ncheck.timeout = \"30s\"";
        let gateway = Gateway::in_front_of(&[]).pool_found("app", &[&place], check).route("/", PUBLIC);
        let _gateway = gateway.with(&server.table()).start();
        let record = first_record(&listener);
        assert!(contains(&record, "api.test") && !contains(&record, "answer.test"), "{place}");
    }
}

#[test]
fn a_name_that_nobody_knows_yet_is_503_until_it_is_known() {
    let server = NameServer::start();
    let backend = Backend::echo();
    let port = backend.address().port();
    let places = [
        ("api.test", format!("{{ dns = \"api.test:{port}\" }}")),
        ("api.test", format!("\"api.test:{port}\"")),
        ("_http._tcp.api.test", "{ srv = \"_http._tcp.api.test\" }".to_owned()),
    ];
    for (name, place) in places {
        server.fail("api.test", Trouble::NoSuchName);
        server.fail("_http._tcp.api.test", Trouble::NoSuchName);
        let gateway = finding(&[&place], Some(&server)).start();
        let response = gateway.client().get("/").send();
        assert_eq!((response.status, response.header("retry-after")), (503, Some("2")), "{place}");
        server.set_addresses("api.test", TTL, &[backend.address()]);
        if name != "api.test" {
            server.set(name, TTL, &[Record::Srv(0, 0, port, "api.test".to_owned())]);
        }
        wait_until("it is known", || gateway.client().get("/").send().status == 200);
    }
}

#[test]
fn one_backend_with_a_name_follows_its_addresses() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(2, &Answer::Echo);
    server.set_addresses("app.test", TTL, &addresses(&[&backends[0]]));
    let name = format!("app.test:{}", backends[0].address().port());
    let gateway = finding(&[&format!("\"{name}\"")], Some(&server)).start();
    let client = gateway.client();
    assert_eq!(shares(&client, 3).get(backends[0].name()), Some(&3));
    server.set_addresses("app.test", TTL, &addresses(&[&backends[1]]));
    wait_for_shares("it has moved", &client, &[(&backends[1], 3)]);
    assert_eq!(metric(&gateway, "weight", &name), 1.0, "it is one backend, wherever it is");
}

#[test]
fn a_reload_keeps_what_was_found_and_asks_whom_it_names() {
    let (old, new) = (NameServer::start(), NameServer::start());
    let backends = Backend::at_one_port(2, &Answer::Echo);
    // As an entry to be found, and as a backend that has a name.
    for place in [dns("api.test", &backends[0]), format!("\"api.test:{}\"", backends[0].address().port())] {
        // Valid for longer than a test may take: only the reload makes anybody ask again.
        old.set_addresses("api.test", 300, &addresses(&[&backends[0]]));
        let gateway = finding(&[&place], Some(&old)).start();
        let client = gateway.client();
        assert_eq!(shares(&client, 3).get(backends[0].name()), Some(&3), "{place}");

        old.fail("api.test", Trouble::ServerFailure);
        gateway.reload(|setup| setup.pool_found("app", &[&place], "read_timeout = \"50s\"")).unwrap();
        assert_eq!(shares(&client, 3).get(backends[0].name()), Some(&3), "{place}: though nobody says where it is now");

        new.set_addresses("api.test", TTL, &addresses(&[&backends[1]]));
        let other = |_| finding(&[&place], Some(&new));
        let changes =
            gateway.reload(|setup| other(setup).pool_found("app", &[&place], "read_timeout = \"50s\"")).unwrap();
        assert_eq!(changes.at_once, ["dns: servers"], "{place}");
        wait_for_shares(&format!("{place}: the other name server is asked"), &client, &[(&backends[1], 3)]);
    }
}

/// A file in place of another, as careful programs write it.
fn rename_over(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[test]
fn a_file_is_followed_however_it_is_written() {
    let [one, two, three] = [(); 3].map(|()| Backend::echo());
    let list = |backends: &[(&Backend, &str)]| {
        let entry =
            |(backend, keys): &(&Backend, &str)| format!("    {{ address = \"{}\"{keys} }},\n", backend.address());
        format!("backends = [\n{}]\n", backends.iter().map(entry).collect::<String>())
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("api.toml");
    std::fs::write(&file, list(&[(&one, "")])).unwrap();
    let place = format!("{{ file = {file:?} }}");
    let gateway = finding(&[&place], None).start();
    let source = format!("file:{}", file.display());
    let client = gateway.client();
    assert_eq!(shares(&client, 3).get(one.name()), Some(&3), "it is read before the first request");

    std::fs::write(&file, list(&[(&one, ""), (&two, "")])).unwrap();
    wait_for_shares("written in place", &client, &[(&one, 2), (&two, 2)]);
    rename_over(&file, &list(&[(&one, ", weight = 3"), (&two, ", max_requests = 7")]));
    wait_for_shares("another one renamed to it, with weights", &client, &[(&one, 6), (&two, 2)]);

    for broken in [
        "",
        "backends = [",
        "backends = []\n",
        "backends = [\"one\"]\n",
        "backend = []\n",
        "backends = [{ dns = \"a:1\" }]",
    ] {
        rename_over(&file, broken);
        wait_until(&format!("{broken:?} is noticed"), || !is_up(&gateway, &source));
        assert_eq!(shares(&client, 8).get(one.name()), Some(&6), "and changes nothing");
        rename_over(&file, &list(&[(&one, ", weight = 3"), (&two, ", max_requests = 7")]));
        wait_until("it is mended", || is_up(&gateway, &source));
    }
    std::fs::remove_file(&file).unwrap();
    wait_until("it is missed", || !is_up(&gateway, &source));
    assert_eq!(shares(&client, 8).get(two.name()), Some(&2));

    // As Kubernetes changes a ConfigMap: the file is a link into a folder that is itself a link.
    for (version, backend) in [("v1", &two), ("v2", &three)] {
        let data = folder.path().join(version);
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("api.toml"), list(&[(backend, "")])).unwrap();
        let (link, next) = (folder.path().join("data"), folder.path().join("data_next"));
        std::os::unix::fs::symlink(&data, &next).unwrap();
        std::fs::rename(next, &link).unwrap();
        if version == "v1" {
            std::os::unix::fs::symlink(link.join("api.toml"), &file).unwrap();
        }
        wait_for_shares("the link leads elsewhere", &client, &[(backend, 3)]);
    }
    assert_eq!(one.open_connections(), one.connections(), "connections to those that were there stay for their time");
}

#[test]
fn a_start_and_a_reload_want_the_files_of_backends_to_be_right() {
    let backend = Backend::echo();
    let good = format!("backends = [\"{}\"]\n", backend.address());
    let broken = "backends = [\n    \"10.0.0.7\",\n]\n";
    let expected = "api.toml:2:5: invalid backend \"10.0.0.7\": the port is missing";
    let setup = |text: &str| finding(&["{ file = \"api.toml\" }"], None).file("api.toml", text);
    let error = setup(broken).try_start().err().expect("it does not start");
    assert!(error.contains(expected), "{error}");
    let error = finding(&["{ file = \"nowhere.toml\" }"], None).try_start().err().expect("nor without it");
    assert!(error.contains("nowhere.toml: cannot be read"), "{error}");

    let gateway = setup(&good).start();
    let error = gateway.reload(|_| setup(broken)).expect_err("nor is it taken up");
    assert!(error.contains(expected), "{error}");
    assert_eq!(gateway.client().get("/").send().status, 200);
}

#[test]
fn servers_that_are_found_stand_beside_those_that_are_named() {
    let server = NameServer::start();
    let backends = Backend::at_one_port(2, &Answer::Echo);
    let spare = Backend::echo();
    server.set_addresses("api.test", TTL, &addresses(&[&backends[0], &backends[1]]));
    let place = format!("{{ dns = \"api.test:{}\", weight = 2, max_requests = 50 }}", backends[0].address().port());
    let named = format!("{{ address = \"{}\", backup = true }}", spare.address());
    let again = format!("\"{}\"", backends[0].address());
    let gateway = finding(&[&place, &named, &again], Some(&server)).start();
    let client = gateway.client();
    assert_eq!(shares(&client, 4).len(), 2, "the named one is a backup");
    assert_eq!(metric(&gateway, "weight", &backends[0].address().to_string()), 2.0, "named twice it is there once");
    backends.iter().for_each(Backend::kill);
    wait_for_shares("the backup answers", &client, &[(&spare, 3)]);
}

#[test]
fn the_check_says_where_backends_are_when_it_may_ask() {
    let server = NameServer::start();
    let backend = Backend::echo();
    server.set_addresses("api.test", TTL, &[backend.address()]);
    let port = backend.address().port();
    let found = format!("{{ dns = \"api.test:{port}\" }}");
    let gateway = finding(&[&found, &format!("\"nobody.test:{port}\"")], Some(&server)).start();
    let check = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cloakroom"));
        command.arg("check").arg(gateway.config_file()).args(arguments).output().unwrap()
    };
    let before = server.questions("api.test", Kind::A);
    let output = check(&["--online"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(before < server.questions("api.test", Kind::A));
    assert!(text.contains(&format!("[pool.app] dns:api.test:{port}: 127.0.0.1:{port}")), "{text}");
    assert!(text.contains(&format!("[pool.app] nobody.test:{port}: failed: it has no address")), "{text}");
    assert_ne!(output.status.code(), Some(0));
    assert!(!text.contains(": ok\n"), "the verdict is not that all is well: {text}");
    let output = check(&[]);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("dns:"), "it asks nobody by itself");
    assert_eq!(output.status.code(), Some(0));
}

/// Redis and providers are found by the system, and not as backends are; but a name that is nowhere is no worse there.
#[test]
fn a_store_and_a_provider_whose_names_lead_nowhere_are_an_outage_and_no_more() {
    let backend = Backend::echo();
    let provider = "[login]\norigins = [\"http://app.test\"]\n\
                    [login.oidc.any]\nissuer = \"https://login.nowhere.invalid\"\nclient_id = \"us\"\n\
                    client_secret = \"Zk3-a-secret-of-nobody-91Qp\"\n";
    let gateway = Gateway::in_front_of(&[&backend])
        .without_passwords()
        .store(Store::Redis("url = \"redis://redis.nowhere.invalid:6379\"".to_owned()))
        .route("/", "")
        .route("/public", PUBLIC)
        .with(provider)
        .start();
    let client = gateway.client().with_host("app.test").allowing("refresh");
    for round in 0..3 {
        assert_eq!(client.get("/public").send().status, 200, "round {round}: who needs neither is served");
        let known = client.get("/").header("cookie", &format!("session={}", "A".repeat(45))).send();
        assert_eq!(known.status, 503, "round {round}: nobody is logged out: {}", known.text());
        assert!(known.headers("set-cookie").is_empty());
        let refused = client.navigate("/.cloakroom/oidc/any/login").send();
        assert_eq!(refused.status, 503, "round {round}: {}", refused.text());
    }
    // The end of the test is the end of the gateway: nobody who still waits for a name holds it up.
}
