//! Who proves what to whom? Certificates of ours by name, replaced under way; of clients; and of backends.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ClientConfig;

use crate::harness::backend::Backend;
use crate::harness::client::{Client, Connection, Response};
use crate::harness::dns::{NameServer, Record};
use crate::harness::gateway::{Gateway, Setup};
use crate::harness::http2::{Http2Backend, Http2Client};
use crate::harness::tls::{Authority, Party};

const KEYS: &str = "cert = \"own.pem\"\nkey = \"own.key\"";

fn with_files(setup: Setup, name: &str, (chain, key): &(String, String)) -> Setup {
    setup.file(&format!("{name}.pem"), chain.as_str()).file(&format!("{name}.key"), key.as_str())
}

fn public(backends: &[&Backend]) -> Setup {
    Gateway::in_front_of(backends).route("/", "access = \"public\"")
}

/// One request on a new connection, for which the server must prove to be `name`.
fn ask(address: SocketAddr, name: &str, trust: &Arc<ClientConfig>) -> io::Result<Response> {
    let mut connection = Connection::open_as(address, name, trust)?;
    connection.try_write(format!("GET / HTTP/1.1\r\nHost: {name}\r\nX-Cert: forged\r\nX_Cert: forged\r\n\r\n"))?;
    connection.read_response("GET")
}

#[test]
fn the_name_that_is_asked_for_chooses_the_certificate() {
    let (authority, backend) = (Authority::new(), Backend::echo());
    let further = "certificates = [{ cert = \"a.pem\", key = \"a.key\" }, { cert = \"b.pem\", key = \"b.key\" }]";
    let mut setup = public(&[&backend]).listener(KEYS).listener(further);
    setup = with_files(setup, "own", &authority.server(&["localhost"], Party::Server));
    setup = with_files(setup, "a", &authority.server(&["a.example.org", "www.a.example.org"], Party::Server));
    setup = with_files(setup, "b", &authority.server(&["*.b.example.org"], Party::Server));
    let gateway = setup.start();
    let trust = authority.trust(None);
    for name in ["localhost", "a.example.org", "WWW.a.example.org", "x.b.example.org"] {
        assert_eq!(ask(gateway.address(), name, &trust).unwrap().status, 200, "{name}");
    }
    for name in ["c.example.org", "x.y.b.example.org", "b.example.org"] {
        let error = ask(gateway.address(), name, &trust).expect_err(name).to_string();
        assert!(error.contains("not valid for name"), "{name}: the first one, which is for another: {error}");
    }
}

#[test]
fn a_certificate_is_replaced_under_the_open_socket_and_never_by_a_worse_one() {
    let (old, new, backend) = (Authority::new(), Authority::new(), Backend::echo());
    let gateway =
        with_files(public(&[&backend]).listener(KEYS), "own", &old.server(&["localhost"], Party::Server)).start();
    let is_served = |authority: &Authority| ask(gateway.address(), "localhost", &authority.trust(None)).is_ok();
    assert!(is_served(&old) && !is_served(&new));
    let mut kept = Connection::open_as(gateway.address(), "localhost", &old.trust(None)).unwrap();

    let other = new.server(&["localhost"], Party::Server);
    let mismatched = (other.0.clone(), new.server(&["localhost"], Party::Server).1);
    let worse: [(&str, (String, String), &str); 5] = [
        ("unreadable", ("noise".into(), other.1.clone()), "is not a PEM certificate chain"),
        ("without a key", (other.0.clone(), "noise".into()), "is not a PEM private key"),
        ("mismatched", mismatched, "does not fit the certificate"),
        ("expired", new.server(&["localhost"], Party::ExpiredServer), "has expired"),
        ("empty", (String::new(), String::new()), "is not a PEM certificate chain"),
    ];
    for (what, files, says) in worse {
        let refused = gateway.reload(|setup| with_files(setup, "own", &files)).expect_err(what);
        assert!(refused.contains(says), "{what}: {refused}");
        assert!(is_served(&old) && !is_served(&new), "{what}: the old one stays");
    }

    assert!(
        gateway.reload(|setup| with_files(setup, "own", &other)).unwrap().at_restart.is_empty(),
        "no restart is needed"
    );
    assert!(is_served(&new) && !is_served(&old));
    kept.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(kept.read_response("GET").unwrap().status, 200, "open connections go on");
    let expires = gateway.admin("/metrics").text();
    assert!(expires.lines().any(|line| line.starts_with("cloakroom_certificate_expires_seconds{file=")), "{expires}");
}

#[test]
fn a_gateway_starts_with_an_expired_certificate_and_not_without_one() {
    let (authority, backend) = (Authority::new(), Backend::echo());
    let setup = public(&[&backend]).listener(KEYS);
    let expired = authority.server(&["localhost"], Party::ExpiredServer);
    let gateway = with_files(setup.clone(), "own", &expired).start();
    let error = ask(gateway.address(), "localhost", &authority.trust(None)).expect_err("clients decide").to_string();
    assert!(error.contains("expired"), "{error}");
    assert!(gateway.reload(|setup| setup).is_ok(), "what is served already holds up nothing");
    assert!(setup.try_start().is_err_and(|error| error.contains("cannot be read")));
}

/// What backends learn of a client's certificate.
const TOLD: &str =
    "[identity.headers]\nX-Cert = \"{certificate.subject}\"\nX-Name = \"{certificate.cn} {certificate.dns}\"";

#[test]
fn clients_show_who_they_are_and_backends_are_told() {
    let (authority, clients, strangers, backend) =
        (Authority::new(), Authority::new(), Authority::new(), Backend::echo());
    for (demand, lets_in_without) in [("required", false), ("optional", true)] {
        let keys = format!("{KEYS}\nclient_ca = \"clients.pem\"\nclient_certificates = \"{demand}\"");
        let setup = public(&[&backend]).listener(&keys).file("clients.pem", clients.pem()).with(TOLD);
        let gateway = with_files(setup, "own", &authority.server(&["localhost"], Party::Server)).start();
        let ask = |own: Option<&(String, String)>| ask(gateway.address(), "localhost", &authority.trust(own));

        let seen = ask(Some(&clients.client("ann, OU=admins"))).unwrap().seen();
        assert_eq!(seen.headers("x-cert"), ["CN=ann\\, OU=admins"], "{demand}: one part, whatever is in it");
        assert_eq!(seen.headers("x_cert"), [""; 0], "{demand}");
        let ann = clients.client("ann");
        assert_eq!(ask(Some(&ann)).unwrap().seen().headers("x-name"), ["ann ann.clients.example.org"]);
        let http2 = Http2Client::connect(gateway.address(), &authority.trust(Some(&ann)));
        assert_eq!(http2.get("/", &[("x-cert", "forged")]).seen().headers("x-cert"), ["CN=ann"], "in HTTP/2, too");

        assert!(ask(Some(&strangers.client("ann"))).is_err(), "{demand}: of another authority");
        assert!(ask(Some(&clients.server(&["localhost"], Party::Server))).is_err(), "{demand}: not of a client");
        match ask(None) {
            Ok(response) => {
                assert!(lets_in_without, "{demand}: not without one");
                assert_eq!(response.seen().headers("x-cert"), [""; 0], "what the client says itself is nothing");
            }
            Err(error) => assert!(!lets_in_without, "{demand}: {error}"),
        }
        // Another authority counts from the next handshake on, also for who has been here before.
        let changes = gateway.reload(|setup| setup.file("clients.pem", strangers.pem())).unwrap();
        assert!(changes.at_restart.is_empty());
        let [line] = &changes.at_once[..] else { panic!("{changes:?}") };
        assert!(line.starts_with("client_ca ") && line.ends_with("clients.pem: content"), "{line}");
        assert!(ask(Some(&ann)).is_err(), "{demand}");
        assert!(ask(Some(&strangers.client("ann"))).is_ok(), "{demand}");
    }
}

#[test]
fn plain_requests_are_led_to_tls_and_told_to_stay_there() {
    let backend = Backend::echo();
    let gateway = Gateway::in_front_of(&[&backend])
        .tls()
        .listener("hsts = { max_age = \"30d\", subdomains = true }")
        .with("[[listener]]\naddress = \"127.0.0.1:0\"\nredirect_to_port = 443")
        .with("[[listener]]\naddress = \"127.0.0.1:0\"\nredirect_to_port = 8443")
        .route("/", "")
        .route("/public", "access = \"public\"")
        .start();
    for (index, port) in [(1, ""), (2, ":8443")] {
        let address = gateway.further_address(index);
        for (host, name) in [("example.org", "example.org"), ("example.org:80", "example.org"), ("[::1]:80", "[::1]")] {
            for method in ["GET", "POST"] {
                let client = Client::of(address).with_host(host);
                let response = client.request(method, "/public?a=b").body("x").send();
                let expected = format!("https://{name}{port}/public?a=b");
                assert_eq!((response.status, response.header("location")), (308, Some(expected.as_str())));
            }
        }
        assert_eq!(Client::of(address).get("/.cloakroom/login").send().status, 308, "nothing else is served there");
    }
    assert!(backend.requests().is_empty());

    let (client, hsts) = (gateway.client(), Some("max-age=2592000; includeSubDomains"));
    for (path, status) in [("/public", 200), ("/", 401), ("/.cloakroom/login", 200)] {
        let response = client.get(path).send();
        assert_eq!((response.status, response.header("strict-transport-security")), (status, hsts), "{path}");
    }
    backend.kill();
    assert_eq!(client.get("/public").send().header("strict-transport-security"), hsts, "also of a failure");
}

/// A gateway in front of another one, which stands for a backend with TLS.
struct Chain {
    authority: Authority,
    clients: Authority,
    backend: Backend,
    second: Gateway,
}

impl Chain {
    fn new(keys: &str) -> Self {
        let (authority, clients, backend) = (Authority::new(), Authority::new(), Backend::echo());
        let setup = public(&[&backend]).listener(KEYS).listener(keys).file("clients.pem", clients.pem()).with(TOLD);
        let second = with_files(setup, "own", &authority.server(&["app.internal"], Party::Server)).start();
        Self { authority, clients, backend, second }
    }

    fn first(&self, tls: &str, files: &[(&str, String)]) -> Result<Gateway, String> {
        let pool = format!("[pool.app]\nbackends = [\"{}\"]\n{tls}", self.second.address());
        let mut setup = Gateway::in_front_of(&[]).without_pools().route("/", "access = \"public\"").with(&pool);
        for (name, text) in files {
            setup = setup.file(name, text.as_str());
        }
        setup.try_start()
    }
}

#[test]
fn a_backend_proves_who_it_is() {
    let chain = Chain::new("");
    let ca = ("ca.pem", chain.authority.pem());
    let cases = [
        ("tls = {}", 503, "nobody known has signed it"),
        ("tls = { ca = \"ca.pem\" }", 503, "it is not for 127.0.0.1"),
        ("tls = { ca = \"ca.pem\", server_name = \"other.internal\" }", 503, "nor for this"),
        ("tls = { ca = \"other.pem\", server_name = \"app.internal\" }", 503, "another authority"),
        ("tls = { ca = \"ca.pem\", server_name = \"app.internal\" }", 200, "signed, and for this name"),
        ("", 400, "in plain it understands nothing"),
    ];
    let files = [ca, ("other.pem", Authority::new().pem())];
    for (tls, expected, why) in cases {
        let before = chain.backend.requests().len();
        let gateway = chain.first(tls, &files).unwrap();
        let status = gateway.client().get("/").send().status;
        if tls.is_empty() {
            assert!([400, 502].contains(&status), "{why}: {status}");
        } else {
            assert_eq!(status, expected, "{why}");
        }
        assert_eq!(chain.backend.requests().len() - before, usize::from(expected == 200), "{why}");
    }
    let broken = chain.first("tls = { ca = \"ca.pem\" }", &[("ca.pem", "noise".into())]);
    assert!(broken.is_err_and(|error| error.contains("is not a PEM certificate chain")));
}

#[test]
fn a_backend_that_dns_found_proves_to_be_whom_the_operator_named() {
    let chain = Chain::new("");
    let server = NameServer::start();
    let port = chain.second.address().port();
    for name in ["app.internal", "forged.test", "other.internal"] {
        server.set_addresses(name, 60, &[chain.second.address()]);
    }
    server.set("_https._tcp.app.internal", 60, &[Record::Srv(0, 0, port, "forged.test".to_owned())]);
    server.set("_https._tcp.other.internal", 60, &[Record::Srv(0, 0, port, "app.internal".to_owned())]);
    for (place, expected, why) in [
        (format!("{{ dns = \"app.internal:{port}\" }}"), 200, "it is for the name, and not for the address"),
        (format!("{{ dns = \"other.internal:{port}\" }}"), 503, "it is not for this one"),
        (format!("\"app.internal:{port}\""), 200, "as where it is one backend"),
        ("{ srv = \"_https._tcp.app.internal\" }".to_owned(), 200, "it is for the service, whatever the answer named"),
        ("{ srv = \"_https._tcp.other.internal\" }".to_owned(), 503, "an answer's name proves nothing"),
    ] {
        let gateway = Gateway::in_front_of(&[])
            .pool_found("app", &[&place], "tls = { ca = \"ca.pem\" }")
            .file("ca.pem", chain.authority.pem())
            .route("/", "access = \"public\"")
            .with(&server.table())
            .start();
        assert_eq!(gateway.client().get("/").send().status, expected, "{place}: {why}");
    }
}

#[test]
fn a_changed_authority_counts_from_the_reload_on() {
    let chain = Chain::new("");
    let keys = "tls = { ca = \"ca.pem\", server_name = \"app.internal\" }";
    let gateway = chain.first(keys, &[("ca.pem", chain.authority.pem())]).unwrap();
    assert_eq!(gateway.client().get("/").send().status, 200);
    let changes = gateway.reload(|setup| setup.file("ca.pem", Authority::new().pem())).unwrap();
    assert_eq!(changes.at_once, ["pool.app.tls: content"]);
    assert_eq!(gateway.client().get("/").send().status, 503, "also not on a connection that was kept");
    gateway.reload(|setup| setup.file("ca.pem", "noise")).expect_err("the other one stays");
    gateway.reload(|setup| setup.file("ca.pem", chain.authority.pem())).unwrap();
    assert_eq!(gateway.client().get("/").send().status, 200);
}

#[test]
fn a_backend_is_shown_who_asks() {
    let chain = Chain::new("client_ca = \"clients.pem\"");
    let (cert, key) = chain.clients.client("gateway");
    let files = [("ca.pem", chain.authority.pem()), ("us.pem", cert), ("us.key", key)];
    let with = "tls = { ca = \"ca.pem\", server_name = \"app.internal\", cert = \"us.pem\", key = \"us.key\" }";
    let without = "tls = { ca = \"ca.pem\", server_name = \"app.internal\" }";
    for protocol in ["http1", "http2", "auto"] {
        let gateway = chain.first(&format!("protocol = \"{protocol}\"\n{with}"), &files).unwrap();
        for _ in 0..3 {
            let seen = gateway.client().get("/").send().seen();
            assert_eq!(seen.headers("x-cert"), ["CN=gateway"], "{protocol}");
        }
        let gateway = chain.first(&format!("protocol = \"{protocol}\"\n{without}"), &files).unwrap();
        assert!([502, 503].contains(&gateway.client().get("/").send().status), "{protocol}: not without");
    }
}

#[test]
fn what_is_spoken_over_tls_the_backend_may_choose() {
    let tls = "tls = { ca = \"ca.pem\", server_name = \"app.internal\" }";
    for (keys, protocol, works) in [
        ("http2 = true", "http2", true),
        ("http2 = true", "auto", true),
        ("http2 = true", "http1", true),
        ("http2 = false", "auto", true),
        ("http2 = false", "http1", true),
    ] {
        let chain = Chain::new(keys);
        let files = [("ca.pem", chain.authority.pem())];
        let gateway = chain.first(&format!("protocol = \"{protocol}\"\n{tls}"), &files).unwrap();
        for _ in 0..3 {
            let sent = gateway.client().request("POST", "/").body("hello").send();
            assert_eq!(sent.status == 200, works, "{keys} {protocol}");
            assert_eq!(sent.seen().body_bytes, 5);
        }
        let mut socket = gateway.client().web_socket("/", &[]).unwrap();
        socket.write("hello");
        assert_eq!(socket.read_exactly(5).unwrap(), b"hello", "{keys} {protocol}: WebSockets in HTTP/1");
    }
}

#[test]
fn who_does_not_want_proof_has_to_say_so() {
    let chain = Chain::new("");
    let gateway = chain.first("tls = { verify = false }", &[]).unwrap();
    assert_eq!(gateway.client().get("/").send().status, 200);
    for (wrong, says) in [
        ("tls = { verify = false, ca = \"ca.pem\" }", "nothing is verified by it"),
        ("tls = { cert = \"us.pem\" }", "cert without key"),
        ("tls = { server_name = \"not a name\" }", "invalid server_name"),
        ("protocol = \"auto\"", "without tls"),
        ("protocol = \"h3\"", "unknown"),
    ] {
        assert!(chain.first(wrong, &[]).is_err_and(|error| error.contains(says)), "{wrong}");
    }
    let plain = Http2Backend::start();
    let gateway = Gateway::in_front_of(&[])
        .without_pools()
        .route("/", "access = \"public\"")
        .with(&format!("[pool.app]\nbackends = [\"{}\"]\nprotocol = \"http2\"", plain.address()))
        .start();
    assert_eq!(gateway.client().get("/echo").send().seen().backend, "http2", "h2c, where it is said");
}

#[test]
fn keys_that_mean_nothing_here_are_refused() {
    let (authority, backend) = (Authority::new(), Backend::echo());
    let own = authority.server(&["localhost"], Party::Server);
    let with_tls = |keys: &str| with_files(public(&[&backend]).listener(KEYS).listener(keys), "own", &own).try_start();
    let plain = |keys: &str| public(&[&backend]).listener(keys).try_start();
    for (started, says) in [
        (with_tls("redirect_to_port = 443"), "on a listener that is https itself"),
        (with_tls("hsts = { max_age = \"1d\", preload = true }"), "preload asks for"),
        (with_tls("client_ca = \"missing.pem\""), "cannot be read"),
        (with_tls("certificates = [{ cert = \"own.pem\" }]"), "missing key"),
        (plain("hsts = { max_age = \"1d\" }"), "browsers ignore it there"),
        (plain("client_ca = \"own.pem\""), "without TLS"),
        (plain("certificates = [{ cert = \"own.pem\", key = \"own.key\" }]"), "without cert and key"),
        (plain("redirect_to_port = 0"), "redirect_to_port is 0"),
    ] {
        let error = started.err().unwrap_or_else(|| panic!("accepted, and should say {says}"));
        assert!(error.contains(says), "{says}: {error}");
    }
}
