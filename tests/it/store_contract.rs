//! Every store keeps the same contract: one suite, run on memory and on Redis over every kind of connection.

use std::collections::HashSet;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cloakroom::config::model;
use cloakroom::identity::Identity;
use cloakroom::session::Lifetime;
use cloakroom::session::id::{SessionId, SessionKey};
use cloakroom::session::record::{ClientHints, LoginMethod, RECORD_BYTES_MAX};
use cloakroom::session::store::memory::MemoryStore;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{Ending, NewSession, SessionStore, StoreError, StoreOptions, Terms};
use toml::Spanned;

use crate::harness::eventually;
use crate::harness::redis::RedisServer;

pub(crate) const PREFIX: &str = "cloakroom:";

/// Generous, so that only a store that is really down meets them.
pub(crate) fn settings(url: &str) -> model::RedisStore {
    let text = format!("url = {url:?}\nprefix = {PREFIX:?}\nconnect_timeout = \"10s\"\nresponse_timeout = \"10s\"");
    toml::from_str(&text).unwrap()
}

pub(crate) fn session_of(user: &str) -> NewSession {
    NewSession {
        identity: Identity { user: user.to_owned(), groups: vec!["staff".to_owned()], ..Identity::default() },
        method: LoginMethod::Password,
        client: ClientHints { address: Some([192, 0, 2, 7].into()), user_agent: "Browser/1".to_owned() },
        secrets: None,
    }
}

pub(crate) fn terms(lifetime: Lifetime, replaces: Option<&SessionKey>) -> Terms {
    Terms { lifetime, limit: None, replaces: replaces.cloned() }
}

pub(crate) fn id_of(user: &str) -> SessionId {
    SessionId::generate(user).unwrap()
}

pub(crate) const LONG: Lifetime = Lifetime { idle: Duration::from_secs(600), absolute: Duration::from_secs(6_000) };

/// A store, and how to let its time pass until something is so.
struct World {
    store: Arc<dyn SessionStore>,
    memory_clock: Option<Arc<AtomicU64>>,
}

impl World {
    fn redis(settings: &model::RedisStore) -> Self {
        Self { store: Arc::new(RedisStore::new(settings, StoreOptions::default()).unwrap()), memory_clock: None }
    }

    fn memory() -> Self {
        let now = Arc::new(AtomicU64::new(1_800_000_000_000));
        let clock = Arc::clone(&now);
        let store = MemoryStore::with_clock(100_000, Box::new(move || clock.load(Ordering::Relaxed)));
        Self { store: Arc::new(store), memory_clock: Some(now) }
    }

    /// Redis has its own time, which passes while we look.
    async fn passing(&self) {
        if let Some(clock) = &self.memory_clock {
            clock.fetch_add(10, Ordering::Relaxed);
        }
    }

    async fn created(&self, user: &str, lifetime: Lifetime) -> SessionKey {
        let key = id_of(user).key();
        self.store.create(&key, session_of(user), &terms(lifetime, None)).await.unwrap();
        key
    }

    async fn user(&self, key: &SessionKey) -> Option<String> {
        self.store.load(key).await.unwrap().live().map(|stored| stored.record.identity.user.clone())
    }

    async fn time_to_live(&self, key: &SessionKey) -> Duration {
        self.store.load(key).await.unwrap().live().expect("it lives").time_to_live
    }

    async fn ends(&self, key: &SessionKey) -> u64 {
        self.store.load(key).await.unwrap().live().expect("it lives").record.ends
    }
}

async fn keeps_the_contract(world: World) {
    let world = &world;
    world.store.ping().await.unwrap();
    what_is_created_is_loaded_until_it_is_destroyed(world).await;
    a_session_ends_by_itself_and_stays_ended(world).await;
    a_touch_extends_life_up_to_the_absolute_end_and_never_shortens_it(world).await;
    a_touch_past_the_absolute_end_ends_the_session(world).await;
    the_absolute_end_is_sooner_than_the_idle_one(world).await;
    a_new_session_ends_the_one_that_it_replaces(world).await;
    counters_count_from_one_and_can_be_reset(world).await;
    a_counter_forgets_a_window_after_its_first_count(world).await;
    what_is_taken_back_was_never_counted(world).await;
    a_session_larger_than_a_record_may_be_is_refused(world).await;
    many_at_once_get_their_own(world).await;
}

async fn what_is_created_is_loaded_until_it_is_destroyed(world: &World) {
    let unknown = id_of("ann").key();
    assert!(world.store.load(&unknown).await.unwrap().live().is_none(), "an id that was never issued is nobody");
    assert!(!world.store.destroy(&unknown, None, Ending::LoggedOut).await.unwrap());

    let key = world.created("ann", LONG).await;
    let stored = world.store.load(&key).await.unwrap().live().unwrap();
    assert_eq!(stored.record.identity, session_of("ann").identity);
    assert_eq!(stored.record.client, session_of("ann").client);
    assert_eq!(stored.record.ends - stored.record.created, 6_000_000, "the absolute end counts from creation");
    assert!(stored.time_to_live <= LONG.idle && Duration::from_secs(500) < stored.time_to_live);

    assert!(world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap());
    assert!(world.store.load(&key).await.unwrap().live().is_none(), "ended is ended");
    assert!(!world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap(), "it ends once");
    assert!(!world.store.touch(&key, LONG.idle, stored.record.ends).await.unwrap());
    assert!(world.store.load(&key).await.unwrap().live().is_none(), "a touch never brings a session back");
}

async fn a_session_ends_by_itself_and_stays_ended(world: &World) {
    let short = Lifetime { idle: Duration::from_millis(100), absolute: Duration::from_secs(60) };
    let key = world.created("ann", short).await;
    eventually("an unused session ends", async || {
        world.passing().await;
        world.user(&key).await.is_none().then_some(())
    })
    .await;
    assert!(!world.store.touch(&key, LONG.idle, u64::MAX / 2_000_000).await.unwrap());
    assert!(world.user(&key).await.is_none(), "a touch never brings a session back");
    assert!(!world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap());
}

async fn a_touch_extends_life_up_to_the_absolute_end_and_never_shortens_it(world: &World) {
    let key = world.created("ann", LONG).await;
    let ends = world.ends(&key).await;

    assert!(world.store.touch(&key, Duration::from_secs(1_200), ends).await.unwrap());
    assert!(LONG.idle < world.time_to_live(&key).await, "a touch extends");
    assert!(world.store.touch(&key, Duration::from_secs(1), ends).await.unwrap());
    assert!(LONG.idle < world.time_to_live(&key).await, "a touch never shortens");
    assert!(world.store.touch(&key, Duration::from_secs(60_000), ends).await.unwrap());
    let time_to_live = world.time_to_live(&key).await;
    assert!(time_to_live <= LONG.absolute, "never past the absolute end: {time_to_live:?}");
    assert!(Duration::from_secs(5_000) < time_to_live, "but up to it: {time_to_live:?}");
    assert_eq!(world.ends(&key).await, ends, "the absolute end does not move");
}

async fn a_touch_past_the_absolute_end_ends_the_session(world: &World) {
    let key = world.created("ann", LONG).await;
    assert!(!world.store.touch(&key, LONG.idle, 1).await.unwrap());
    assert!(world.user(&key).await.is_none());
}

async fn the_absolute_end_is_sooner_than_the_idle_one(world: &World) {
    let short = Lifetime { idle: LONG.idle, absolute: Duration::from_millis(200) };
    let key = world.created("ann", short).await;
    eventually("a session ends, however long it may idle", async || {
        world.passing().await;
        let Some(stored) = world.store.load(&key).await.unwrap().live() else { return Some(()) };
        assert!(stored.time_to_live <= short.absolute);
        let _ = world.store.touch(&key, LONG.idle, stored.record.ends).await.unwrap();
        None
    })
    .await;
}

async fn a_new_session_ends_the_one_that_it_replaces(world: &World) {
    let (old, other) = (world.created("ann", LONG).await, world.created("ann", LONG).await);
    let new = id_of("bob").key();
    world.store.create(&new, session_of("bob"), &terms(LONG, Some(&old))).await.unwrap();
    assert_eq!(world.user(&old).await, None, "the id that the browser came with is worth nothing after login");
    assert_eq!(world.user(&new).await.as_deref(), Some("bob"));
    assert_eq!(world.user(&other).await.as_deref(), Some("ann"), "nobody else is logged out");

    let newer = id_of("bob").key();
    world
        .store
        .create(&newer, session_of("bob"), &terms(LONG, Some(&old)))
        .await
        .expect("what it replaces may be gone");
    assert!(world.user(&newer).await.is_some());
}

async fn counters_count_from_one_and_can_be_reset(world: &World) {
    let window = Duration::from_secs(600);
    let name = format!("account {} \u{e9}\n", id_of("x").to_cookie_value());
    assert_eq!(world.store.count(&name).await.unwrap(), 0);
    for expected in 1..=3 {
        let count = world.store.increment(&name, window).await.unwrap();
        assert_eq!(count.value, expected);
        assert!(count.resets_in <= window && Duration::from_secs(500) < count.resets_in);
    }
    assert_eq!(world.store.count(&name).await.unwrap(), 3);
    assert_eq!(world.store.count("another").await.unwrap(), 0, "counters are apart");
    let later = world.store.increment(&name, Duration::from_secs(60_000)).await.unwrap();
    assert!(later.resets_in <= window, "the window is that of the first count");
    world.store.reset(&name).await.unwrap();
    assert_eq!(world.store.count(&name).await.unwrap(), 0);
    world.store.reset(&name).await.expect("there may be nothing to reset");
    assert_eq!(world.store.increment(&name, window).await.unwrap().value, 1);
}

async fn a_counter_forgets_a_window_after_its_first_count(world: &World) {
    let window = Duration::from_millis(100);
    world.store.increment("short", window).await.unwrap();
    eventually("the counter forgets", async || {
        world.passing().await;
        (world.store.count("short").await.unwrap() == 0).then_some(())
    })
    .await;
    assert_eq!(world.store.increment("short", window).await.unwrap().value, 1, "and begins again");
}

async fn what_is_taken_back_was_never_counted(world: &World) {
    let window = Duration::from_secs(600);
    let name = format!("taken back {}", id_of("x").to_cookie_value());
    world.store.increment(&name, window).await.unwrap();
    world.store.increment(&name, window).await.unwrap();
    world.store.decrement(&name).await.unwrap();
    assert_eq!(world.store.count(&name).await.unwrap(), 1);
    let count = world.store.increment(&name, window).await.unwrap();
    assert_eq!(count.value, 2);
    assert!(Duration::from_secs(500) < count.resets_in, "the window goes on");

    let unknown = format!("never counted {}", id_of("x").to_cookie_value());
    world.store.decrement(&unknown).await.expect("there may be nothing to take back");
    assert_eq!(world.store.count(&unknown).await.unwrap(), 0, "no count is below zero");
    let first = eventually("nothing is left of it", async || {
        world.passing().await;
        let count = world.store.increment(&unknown, window).await.unwrap();
        (Duration::from_secs(500) < count.resets_in).then_some(count.value)
    })
    .await;
    assert_eq!(first, 1, "nor of the next");
}

async fn a_session_larger_than_a_record_may_be_is_refused(world: &World) {
    let mut session = session_of("ann");
    session.identity.groups = vec!["g".repeat(RECORD_BYTES_MAX)];
    let key = id_of("ann").key();
    let refused = world.store.create(&key, session, &terms(LONG, None)).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert!(world.user(&key).await.is_none());
}

async fn many_at_once_get_their_own(world: &World) {
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let store = Arc::clone(&world.store);
            tokio::spawn(async move {
                let user = format!("user{n}");
                let mut counts = Vec::new();
                let mut last: Option<SessionKey> = None;
                for _ in 0..10 {
                    let key = id_of(&user).key();
                    store.create(&key, session_of(&user), &terms(LONG, last.as_ref())).await.unwrap();
                    let stored = store.load(&key).await.unwrap().live().expect("just created");
                    assert_eq!(stored.record.identity.user, user, "everybody gets his own session");
                    counts.push(store.increment("shared", LONG.idle).await.unwrap().value);
                    last = Some(key);
                }
                assert!(store.destroy(&last.unwrap(), None, Ending::LoggedOut).await.unwrap());
                counts
            })
        })
        .collect();
    let mut seen = HashSet::new();
    for task in tasks {
        seen.extend(task.await.unwrap());
    }
    assert_eq!(seen, (1..=640).collect(), "no count is lost or told twice");
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    keeps_the_contract(World::memory()).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_tcp() {
    let server = RedisServer::start();
    keeps_the_contract(World::redis(&settings(&server.url()))).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_a_unix_socket() {
    let server = RedisServer::start();
    for scheme in ["unix", "redis+unix"] {
        let url = format!("{scheme}://{}", server.socket().display());
        keeps_the_contract(World::redis(&settings(&url))).await;
        let _: () = redis::cmd("FLUSHALL").query(&mut server.client()).unwrap();
    }
}

/// The user of this test may do exactly what the documentation of the store says that it needs.
#[tokio::test]
async fn redis_keeps_the_contract_for_a_user_with_the_least_permissions() {
    let server = RedisServer::with(
        "user default off\nuser proxy on >s3cr%t resetkeys ~cloakroom:* resetchannels -@all +hello +auth +select \
         +ping +get +set +del +incr +decr +pttl +pexpire +pexpireat +time +multi +exec",
    );
    keeps_the_contract(World::redis(&settings(&format!("redis://proxy:s3cr%25t@127.0.0.1:{}/3", server.port())))).await;
    let socket = server.socket();
    let url = format!("unix://{}?user=proxy&pass=s3cr%25t&db=4", socket.display());
    keeps_the_contract(World::redis(&settings(&url))).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_with_a_password_alone() {
    let server = RedisServer::with("requirepass s3cret");
    let url = format!("redis://:s3cret@127.0.0.1:{}", server.port());
    keeps_the_contract(World::redis(&settings(&url))).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_tls() {
    // Another test may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = RedisServer::with_tls();
    let trusting =
        model::RedisStore { ca: Some(Spanned::new(0..0, server.authority())), ..settings(&server.tls_url()) };
    keeps_the_contract(World::redis(&trusting)).await;

    let stranger = RedisServer::with_tls();
    let distrusting =
        model::RedisStore { ca: Some(Spanned::new(0..0, stranger.authority())), ..settings(&server.tls_url()) };
    let refused = RedisStore::new(&distrusting, StoreOptions::default()).unwrap().ping().await;
    assert!(
        matches!(refused, Err(StoreError::Unavailable(_))),
        "a server of another authority is not ours: {refused:?}"
    );
}

#[tokio::test]
async fn what_redis_holds_cannot_make_a_cookie() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let ids: Vec<_> = (0..20).map(|n| id_of(&format!("user{n}"))).collect();
    for id in &ids {
        world.store.create(&id.key(), session_of("ann"), &terms(LONG, None)).await.unwrap();
    }
    world.store.increment("account:hunter2", LONG.idle).await.unwrap();

    let mut client = server.client();
    let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut client).unwrap();
    assert_eq!(names.len(), 21, "one key for each session and counter");
    let mut held = names.concat();
    for name in &names {
        assert!(name.starts_with(PREFIX.as_bytes()), "all of ours is under the prefix");
        let time_to_live: i64 = redis::cmd("PTTL").arg(name).query(&mut client).unwrap();
        assert!(0 < time_to_live, "nothing stays for ever");
        held.extend(redis::cmd("GET").arg(name).query::<Vec<u8>>(&mut client).unwrap());
    }
    let holds = |part: &[u8]| held.windows(part.len()).any(|window| window == part);
    assert!(holds(b"Browser/1"), "the search must find what is there");
    for id in &ids {
        let cookie = id.to_cookie_value();
        let secret = URL_SAFE_NO_PAD.decode(&cookie[2..]).unwrap();
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        for part in cookie.as_bytes()[2..].windows(12).chain(secret.windows(8)).chain(hex.as_bytes().windows(16)) {
            assert!(!holds(part), "a part of a secret is in Redis");
        }
    }
    assert!(!holds(b"hunter2"), "what somebody typed as a user may be a password");
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_neither_a_session_nor_the_lack_of_one_and_one_line_in_the_log() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let mut client = server.client();
    let good = world.created("ann", LONG).await;
    let bytes: Vec<u8> = redis::cmd("GET").arg(good.to_store_key(PREFIX)).query(&mut client).unwrap();

    let mut newer = bytes.clone();
    newer[0] = 2;
    let values = [
        ("empty", Vec::new()),
        ("text", b"hello".to_vec()),
        ("cut", bytes[..bytes.len() - 1].to_vec()),
        ("trailing", [&bytes[..], b"\0"].concat()),
        ("newer version", newer),
        ("oversize", vec![1; RECORD_BYTES_MAX + 1]),
    ];
    let mut planted: Vec<(&str, SessionId)> = Vec::new();
    for (what, value) in values {
        let id = id_of("ann");
        let name = id.key().to_store_key(PREFIX);
        let _: () = redis::cmd("SET").arg(name).arg(value).arg("PX").arg(600_000).query(&mut client).unwrap();
        planted.push((what, id));
    }
    let immortal = id_of("ann");
    let _: () = redis::cmd("SET").arg(immortal.key().to_store_key(PREFIX)).arg(&bytes).query(&mut client).unwrap();
    planted.push(("no time to live", immortal));
    let list = id_of("ann");
    let _: () = redis::cmd("RPUSH").arg(list.key().to_store_key(PREFIX)).arg("x").query(&mut client).unwrap();
    planted.push(("wrong type", list));

    for (what, id) in planted {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let found = {
            let _logging = tracing::subscriber::set_default(subscriber);
            world.store.load(&id.key()).await
        };
        assert!(matches!(found, Err(StoreError::Unreadable)), "{what} says nothing of its session: {found:?}");
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{what}: {text}");
        assert!(text.contains("ERROR") && text.contains(&id.key().log_hash()), "{what}: {text}");
        assert!(!text.contains(&id.to_cookie_value()[2..]), "a log tells no secret");
        assert!(!text.contains(&id.key().to_store_key(PREFIX)), "nor where to find one");
        assert!(world.store.destroy(&id.key(), None, Ending::LoggedOut).await.unwrap(), "{what} can be ended");
        assert!(world.store.load(&id.key()).await.unwrap().live().is_none(), "{what}: ended is ended");
    }
    assert_eq!(world.user(&good).await.as_deref(), Some("ann"), "the others are not concerned");
}

#[tokio::test]
async fn a_full_redis_refuses_logins_and_still_knows_and_ends_sessions() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let key = world.created("ann", LONG).await;
    let _: () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).query(&mut server.client()).unwrap();
    let refused = world.store.create(&id_of("bob").key(), session_of("bob"), &terms(LONG, Some(&key))).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert_eq!(world.user(&key).await.as_deref(), Some("ann"), "a login that failed ends nothing");
    assert!(world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap(), "a logout works always");
}

/// Runtimes come and go, each with its own connection; one store serves them all.
#[test]
fn each_runtime_has_its_own_connection_for_as_long_as_it_lives() {
    let server = RedisServer::start();
    let store = Arc::new(RedisStore::new(&settings(&server.url()), StoreOptions::default()).unwrap());
    let connections = || -> usize {
        let list: String = redis::cmd("CLIENT").arg("LIST").query(&mut server.client()).unwrap();
        list.lines().count() - 1
    };
    for _ in 0..5 {
        let barrier = Arc::new(std::sync::Barrier::new(5));
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let (store, barrier) = (Arc::clone(&store), Arc::clone(&barrier));
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    runtime.block_on(async {
                        let user = format!("user{n}");
                        for _ in 0..50 {
                            let key = id_of(&user).key();
                            store.create(&key, session_of(&user), &terms(LONG, None)).await.unwrap();
                            assert_eq!(store.load(&key).await.unwrap().live().unwrap().record.identity.user, user);
                        }
                        barrier.wait();
                        barrier.wait();
                    });
                })
            })
            .collect();
        barrier.wait();
        let alive = connections();
        barrier.wait();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(alive, 4, "one connection for each runtime");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        store.ping().await.unwrap();
        eventually("the connections of runtimes that ended are closed", async || (connections() == 1).then_some(()))
            .await;
        drop(store);
        eventually("a store that is gone leaves no connection", async || (connections() == 0).then_some(())).await;
    });
}
