//! What does each step cost that every request takes? The input is what a browser sends.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed, and says where")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use cloakroom::backend::Pool;
use cloakroom::backend::balance::{Tried, hash};
use cloakroom::config::model::{self, Access, Config};
use cloakroom::config::value::Bytes;
use cloakroom::identity::headers::IdentityHeaders;
use cloakroom::identity::{Identity, Known};
use cloakroom::login::csrf::login_cookie_name;
use cloakroom::proxy::admit::{Who, admit};
use cloakroom::proxy::guard::{self, HeadLimits};
use cloakroom::proxy::route::Routes;
use cloakroom::proxy::split::Split;
use cloakroom::session::cache::{Beat, LeaseCache, Limits};
use cloakroom::session::cookie::{ReservedCookies, SessionCookie};
use cloakroom::session::id::SessionId;
use cloakroom::session::record::{Attribute, ClientHints, LoginMethod, Record};
use cloakroom::session::store::Stored;
use criterion::{Criterion, criterion_group, criterion_main};
use http::HeaderMap;
use http::header::COOKIE;

/// The routes of a middling installation.
const ROUTES: usize = 200;
/// The backends of one pool, more than most have.
const BACKENDS: usize = 16;
/// Sessions in use, as many as a worker may well have.
const COPIES: usize = 10_000;

criterion_group!(
    hot_path, guarding, routing, splitting, balancing, cookies, ids, records, copies, admission, identities
);
criterion_main!(hot_path);

fn guarding(criterion: &mut Criterion) {
    let head = format!(
        "GET /orders/2041?sort=date&page=3 HTTP/1.1\r\nHost: shop.example.org\r\n{}Accept: text/html,application/xhtml+xml,\
         application/xml;q=0.9,*/*;q=0.8\r\nAccept-Language: de,en-US;q=0.7,en;q=0.3\r\nAccept-Encoding: gzip, deflate, br, \
         zstd\r\nReferer: https://shop.example.org/orders\r\nCookie: theme=dark; session={}; lang=de\r\n\
         Sec-Fetch-Dest: document\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\n\r\n",
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n",
        id().to_cookie_value(),
    )
    .into_bytes();
    let limits = HeadLimits { headers_max: 100, target_bytes: 8 * 1024 };
    assert!(guard::inspect(&head, &limits).is_ok(), "a browser's request passes");

    criterion.bench_function("guard/head_end", |bencher| bencher.iter(|| guard::head_end(black_box(&head), 0)));
    criterion.bench_function("guard/inspect", |bencher| bencher.iter(|| guard::inspect(black_box(&head), &limits)));
    criterion.bench_function("guard/path", |bencher| bencher.iter(|| guard::path(black_box("/orders/2041/caf%C3%A9"))));
}

fn routing(criterion: &mut Criterion) {
    let mut text = String::from("[pool.app]\nbackends = [\"127.0.0.1:9001\"]\n");
    for number in 0..ROUTES {
        let host =
            if number % 2 == 0 { format!("host = \"host-{}.example.org\"\n", number % 20) } else { String::new() };
        text.push_str(&format!("[[route]]\n{host}path = \"/area-{number}\"\npool = \"app\"\n"));
    }
    let config: Config = toml::from_str(&text).unwrap();
    let routes = Routes::build(&config.routes, &BTreeMap::new(), Bytes(1024));

    for (name, host, path, found) in [
        ("by host", "host-4.example.org", "/area-24/orders/2041", true),
        ("any host", "www.example.com", "/area-101/orders/2041", true),
        ("none", "www.example.com", "/elsewhere/orders/2041", false),
    ] {
        assert_eq!(routes.find(host, path).is_some(), found, "{name}");
        criterion.bench_function(&format!("route/find {name}"), |bencher| {
            bencher.iter(|| routes.find(black_box(host), black_box(path)));
        });
    }
}

/// Which pool is this user's? Of those who are in no group of it, and so in its share or not.
fn splitting(criterion: &mut Criterion) {
    let split = Split::new("next", &toml::from_str("groups = [\"beta\", \"staff\"]\npercent = 5").unwrap(), None);
    let ann = ann();
    criterion.bench_function("split/takes", |bencher| bencher.iter(|| split.takes(black_box(Some(&ann)))));
}

/// From the choice of a backend to the end of the request's place there.
fn balancing(criterion: &mut Criterion) {
    for (name, keys, weight) in [
        ("in turn", "", 1),
        ("by weight", "", 2),
        ("least requests", "balance = \"least_requests\"", 1),
        ("power of two", "balance = \"power_of_two\"", 1),
        ("by hash", "balance = \"hash\"", 1),
    ] {
        let backend = |port: usize| format!("{{ address = \"127.0.0.1:{port}\", weight = {} }}", 1 + port % weight);
        let backends = (1..=BACKENDS).map(backend).collect::<Vec<_>>().join(", ");
        let pool = Pool::new("app", &toml::from_str(&format!("backends = [{backends}]\n{keys}")).unwrap(), None);
        let key = hash(b"ann");
        criterion.bench_function(&format!("balance/{name}, 16 backends"), |bencher| {
            bencher.iter(|| pool.pick(black_box(key), &mut Tried::default()).map(drop));
        });
    }
}

fn cookies(criterion: &mut Criterion) {
    let cookie = SessionCookie::new("__Host-session", true, cookie::SameSite::Lax);
    let reserved = ReservedCookies::new(["__Host-session", &login_cookie_name("__Host-session")]);
    let mut headers = HeaderMap::new();
    let field = format!("theme=dark; __Host-session={}; lang=de; seen=1,2,3", id().to_cookie_value());
    headers.insert(COOKIE, field.parse().unwrap());
    assert!(cookie.find(&headers).is_some(), "there is a session");

    criterion.bench_function("cookie/find", |bencher| bencher.iter(|| cookie.find(black_box(&headers))));
    criterion.bench_function("cookie/strip", |bencher| bencher.iter(|| reserved.strip(black_box(&headers))));
}

fn ids(criterion: &mut Criterion) {
    let id = id();
    let text = id.to_cookie_value();
    criterion.bench_function("id/generate", |bencher| bencher.iter(|| SessionId::generate(black_box("ann"))));
    criterion.bench_function("id/parse", |bencher| bencher.iter(|| SessionId::parse(black_box(&text))));
    criterion.bench_function("id/key", |bencher| bencher.iter(|| black_box(&id).key()));
}

fn records(criterion: &mut Criterion) {
    let record = record();
    let bytes = record.encode().unwrap();
    criterion.bench_function("record/encode", |bencher| bencher.iter(|| black_box(&record).encode()));
    criterion.bench_function("record/decode", |bencher| bencher.iter(|| Record::decode(black_box(&bytes))));
}

fn copies(criterion: &mut Criterion) {
    // A lease that outlasts the measurement: the server's part is not measured here.
    let long = Duration::from_secs(3600);
    let cache = LeaseCache::new(Limits { lease: long, role_lease: long, age_max: long, ..Limits::default() });
    assert!(cache.connected(cache.connecting()));
    cache.finish_heartbeat(&cache.begin_heartbeat(Beat::Write));
    let keys: Vec<_> = (0..COPIES).map(|_| id().key()).collect();
    for key in &keys {
        let stored = Stored { record: Arc::new(record()), time_to_live: long };
        cache.finish_read(&cache.begin_read(key), Some(&stored));
    }
    assert!(keys.iter().all(|key| cache.get(key).is_some()), "all are hits");
    let stranger = id().key();

    let mut next = keys.iter().cycle();
    criterion.bench_function("cache/hit", |bencher| bencher.iter(|| cache.get(black_box(next.next().unwrap()))));
    criterion.bench_function("cache/miss", |bencher| bencher.iter(|| cache.get(black_box(&stranger))));
}

fn admission(criterion: &mut Criterion) {
    let (ann, groups) = (Arc::new(Known::new(ann())), ["admins".to_owned(), "editors".to_owned()]);
    criterion.bench_function("admit, one of two groups", |bencher| {
        bencher.iter(|| admit(Access::Required, black_box(&groups), Who::User(Arc::clone(&ann)), true));
    });
}

fn identities(criterion: &mut Criterion) {
    let headers = IdentityHeaders::compile(&model::Identity::default());
    let identity = ann();
    let known = Known::new(ann());
    let sent = ["host", "user-agent", "accept", "accept-language", "accept-encoding", "referer", "cookie", "x-team"];

    criterion.bench_function("identity/render", |bencher| {
        bencher.iter(|| drop(black_box(headers.render(black_box(&identity)))));
    });
    criterion.bench_function("identity/lines of a known user", |bencher| {
        bencher.iter(|| black_box(&known).lines(&headers).iter(&headers).for_each(|header| drop(black_box(header))));
    });
    criterion.bench_function("identity/is_reserved, 8 fields", |bencher| {
        bencher.iter(|| black_box(&sent).iter().filter(|name| headers.is_reserved(name)).count());
    });
}

fn record() -> Record {
    Record {
        identity: ann(),
        attributes: [("cart".to_owned(), Attribute { value: "3 things".to_owned(), ends: None })].into(),
        created: 1_760_000_000_000,
        ends: 1_760_043_200_000,
        method: LoginMethod::Password,
        client: ClientHints { address: Some([192, 0, 2, 7].into()), user_agent: "Mozilla/5.0 (X11; Linux)".into() },
        secrets: None,
        login: None,
        known: Default::default(),
    }
}

fn ann() -> Identity {
    Identity {
        user: "ann".into(),
        name: Some("Ann Archer".into()),
        email: Some("ann@example.org".into()),
        groups: vec!["staff".into(), "editors".into()],
        ..Identity::default()
    }
}

fn id() -> SessionId {
    SessionId::generate("ann").unwrap()
}
