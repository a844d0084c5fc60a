//! How long is a session served from a copy that has ended elsewhere? Less than a lease, whatever fails.
//!
//! Each way to fail is a test with real servers: one instance ends a session of which another one has a copy. Of each
//! look at the copy the time *before* it counts, so that a slow machine breaks no promise: who looks when the lease is
//! over must find nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cloakroom::config::model;
use cloakroom::session::id::SessionKey;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{Ending, SessionStore, StoreError, StoreOptions};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, yield_now};

use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::harness::fault::{Fault, FaultProxy};
use crate::harness::gateway::{Gateway, Store};
use crate::harness::redis::cluster::Cluster;
use crate::harness::redis::sentinels::Sentinels;
use crate::harness::redis::{KEEPS_ITS_DATA, RedisServer};
use crate::harness::{DEADLINE, Over, distribution, eventually, tell};
use crate::store_contract::{LONG, PREFIX, id_of, session_of, settings, terms};

/// A copy is used for so long at most after its session has ended.
const LEASE: Duration = Duration::from_secs(1);
/// A primary is believed to be one for so long after its last sign.
const ROLE_LEASE: Duration = Duration::from_secs(3);
/// A copy is used for so long, even if the server does not say any more what changes.
const AGE_MAX: Duration = Duration::from_secs(60);

/// As with the defaults, for servers that are going to fail.
fn instance(url: &str) -> RedisStore {
    let settings: model::RedisStore = toml::from_str(&format!("url = {url:?}\nprefix = {PREFIX:?}")).unwrap();
    assert_eq!(settings.lease.get_ref().get(), LEASE);
    RedisStore::new(&settings, StoreOptions::default()).unwrap()
}

/// Two instances with the same store.
fn neighbours(url: &str) -> (RedisStore, RedisStore) {
    (instance(url), instance(url))
}

/// Of a server that does not fail, however slow the machine may be.
fn patient(url: &str) -> Arc<RedisStore> {
    Arc::new(RedisStore::new(&settings(url), StoreOptions::default()).unwrap())
}

async fn begin(store: &RedisStore, user: &str) -> SessionKey {
    eventually("somebody logs in", async || {
        let key = id_of(user).key();
        store.create(&key, session_of(user), &terms(LONG, None)).await.ok().map(|_| key)
    })
    .await
}

async fn keeps_a_copy(store: &RedisStore, key: &SessionKey) {
    eventually("a copy is kept", async || {
        let found = store.load(key).await.ok()?;
        assert!(found.live().is_some(), "it lives");
        store.recall(key).map(drop)
    })
    .await;
}

/// One of whose session the other instance has a copy.
async fn copied(one: &RedisStore, other: &RedisStore, user: &str) -> SessionKey {
    let key = begin(one, user).await;
    keeps_a_copy(other, &key).await;
    key
}

/// Asks until it is answered; when that was.
async fn end(store: &RedisStore, key: &SessionKey, user: &str) -> Instant {
    eventually("a logout is answered", async || {
        let answer = store.destroy(key, Some(user), Ending::LoggedOut).await;
        answer.ok().map(|_| Instant::now())
    })
    .await
}

/// As [`end`], where another server has become the primary: what the old one answered does not count.
async fn end_on(primary: &RedisServer, store: &RedisStore, key: &SessionKey, user: &str) -> Instant {
    eventually("a logout is done where it counts", async || {
        let ended = end(store, key, user).await;
        let left: usize = primary.try_ask(&format!("EXISTS {}", key.to_store_key(PREFIX))).ok()?;
        (left == 0).then_some(ended)
    })
    .await
}

/// Looks at the copy until there is none; how long after `ended` that was.
async fn until_forgotten(store: &RedisStore, key: &SessionKey, ended: Instant, bound: Duration) -> Duration {
    loop {
        let asked = Instant::now();
        if store.recall(key).is_none() {
            return asked.saturating_duration_since(ended);
        }
        let late = asked.saturating_duration_since(ended);
        assert!(late < bound, "a copy is used {late:?} after its session has ended");
        yield_now().await;
    }
}

/// For the time of another lease, and then the store says the same.
async fn is_gone_for_good(store: &RedisStore, key: &SessionKey) {
    let since = Instant::now();
    while since.elapsed() < LEASE {
        assert!(store.recall(key).is_none(), "a copy is back");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let found = eventually("the store answers", async || store.load(key).await.ok()).await;
    assert!(found.live().is_none(), "ended is ended");
    assert!(store.recall(key).is_none());
}

/// A request: served from the copy, or by the store's word.
async fn is_served(store: &RedisStore, key: &SessionKey) -> bool {
    store.recall(key).is_some() || store.load(key).await.unwrap().live().is_some()
}

/// Users who come and go on this instance as long as this lives.
async fn background(store: &Arc<RedisStore>) -> JoinSet<()> {
    let mut users = JoinSet::new();
    for number in 0..8 {
        let user = format!("user{number}");
        let key = begin(store, &user).await;
        let store = Arc::clone(store);
        users.spawn(async move {
            for turn in 0_u64.. {
                assert!(is_served(&store, &key).await, "nobody else is logged out");
                // Each touch is a write, and takes copies back.
                if turn % 20 == 0 {
                    assert!(store.touch(&key, LONG.idle + Duration::from_millis(turn), u64::MAX).await.unwrap());
                }
                // The pace of a user, and nothing that a test waits for.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
    }
    users
}

/// What one instance asks of the other, which looks at the session as fast as it can until it is refused.
struct Round {
    key: SessionKey,
    is_copied: oneshot::Sender<()>,
    answered: oneshot::Receiver<Instant>,
}

/// In each round of a test of delays.
#[derive(Default)]
struct Delays {
    refused_after: Vec<Duration>,
    /// Rounds in which somebody came after the answer and was served, and the latest of these.
    served_after: usize,
    latest: Duration,
}

impl Delays {
    /// `served`: the start of the last request that was served; `refused`: of the first that was not.
    fn add(&mut self, answered: Instant, served: Option<Instant>, refused: Instant, bound: Duration) {
        self.refused_after.push(refused.saturating_duration_since(answered));
        let late = served.map(|served| served.saturating_duration_since(answered)).unwrap_or_default();
        self.served_after += usize::from(!late.is_zero());
        self.latest = self.latest.max(late);
        assert!(late < bound, "somebody is served {late:?} after the answer to the logout");
    }

    fn tell(self, what: &str) {
        let Self { refused_after, served_after, latest } = self;
        let delays = distribution(refused_after);
        tell(&format!("{what}: {delays}; served after the answer: {served_after}, the latest {latest:?} after it"));
    }
}

/// So many where nothing else is said. 10,000 take a minute or two.
const LOGOUTS: usize = 2_000;
const LOGOUTS_OVER_HTTP: usize = 300;

#[test]
fn logouts_under_load_are_seen_by_the_neighbour_within_a_lease() {
    let logouts = std::env::var("CLOAKROOM_LOGOUTS").map_or(LOGOUTS, |number| number.parse().unwrap());
    let server = RedisServer::start();
    let (rounds, mut next) = mpsc::unbounded_channel::<Round>();
    let one = on_its_own(&server, async move |store: Arc<RedisStore>| {
        let _load = background(&store).await;
        for number in 0..logouts {
            let user = format!("ann{}", number % 100);
            let key = begin(&store, &user).await;
            let ((is_copied, copied), (answer, answered)) = (oneshot::channel(), oneshot::channel());
            rounds
                .send(Round { key: key.clone(), is_copied, answered })
                .unwrap_or_else(|_| panic!("the neighbour left"));
            copied.await.unwrap();
            assert!(store.destroy(&key, Some(&user), Ending::LoggedOut).await.unwrap());
            answer.send(Instant::now()).unwrap();
        }
    });
    let other = on_its_own(&server, async move |store: Arc<RedisStore>| {
        let _load = background(&store).await;
        let mut delays = Delays::default();
        while let Some(Round { key, is_copied, answered }) = next.recv().await {
            keeps_a_copy(&store, &key).await;
            is_copied.send(()).unwrap();
            let mut served = None;
            let refused = loop {
                let asked = Instant::now();
                if !is_served(&store, &key).await {
                    break asked;
                }
                served = Some(asked);
                yield_now().await;
            };
            delays.add(answered.await.unwrap(), served, refused, LEASE);
            assert!(store.recall(&key).is_none());
        }
        assert_eq!(delays.refused_after.len(), logouts);
        delays.tell("logout on one store, refused on the other");
    });
    one.join().unwrap();
    other.join().unwrap();
}

/// A store with a thread, a runtime and a connection of its own, as each worker has them.
fn on_its_own(
    server: &RedisServer,
    test: impl AsyncFnOnce(Arc<RedisStore>) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    let store = patient(&server.url());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(store));
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn all_sessions_of_a_user_and_of_everybody_end_for_the_neighbour_within_a_lease() {
    const SESSIONS: usize = 50;
    let server = RedisServer::start();
    let (one, other) = (patient(&server.url()), patient(&server.url()));
    for everybody in [false, true] {
        let mut keys = Vec::new();
        for _ in 0..SESSIONS {
            keys.push(copied(&one, &other, "ann").await);
        }
        let looking: JoinSet<_> = keys
            .into_iter()
            .map(|key| {
                let other = Arc::clone(&other);
                async move {
                    let mut served = None;
                    loop {
                        let asked = Instant::now();
                        if !is_served(&other, &key).await {
                            return (key, served, asked);
                        }
                        served = Some(asked);
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            })
            .collect();
        if everybody {
            for part in 0..one.parts() {
                one.destroy_part(part, Ending::Revoked).await.unwrap();
            }
        } else {
            assert_eq!(one.destroy_all("ann", None, Ending::Revoked).await.unwrap(), SESSIONS as u64);
        }
        let answered = Instant::now();
        let mut delays = Delays::default();
        for (key, served, refused) in looking.join_all().await {
            delays.add(answered, served, refused, LEASE);
            assert!(other.recall(&key).is_none());
        }
        delays.tell(if everybody { "all sessions ended" } else { "all sessions of a user ended" });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_closed_takes_its_copies_with_it() {
    let server = RedisServer::start();
    let (one, other) = neighbours(&server.url());
    for _ in 0..10 {
        let key = copied(&one, &other, "ann").await;
        let _: usize = server.ask("CLIENT KILL TYPE normal");
        let ended = end(&one, &key, "ann").await;
        until_forgotten(&other, &key, ended, LEASE).await;
        is_gone_for_good(&other, &key).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_silent_is_believed_for_a_lease() {
    let server = RedisServer::start();
    let proxy = FaultProxy::to(server.port());
    // Who waits for answers for so long finds by the lease alone that nobody speaks.
    let (one, other) = (patient(&server.url()), patient(&proxy.url()));
    let key = copied(&one, &other, "ann").await;
    proxy.set(Fault::SILENT);
    let ended = end(&one, &key, "ann").await;
    until_forgotten(&other, &key, ended, LEASE).await;
    let since = Instant::now();
    while since.elapsed() < LEASE {
        assert!(other.recall(&key).is_none());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    proxy.heal();
    is_gone_for_good(&other, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_with_its_data_is_another_one() {
    let mut server = RedisServer::with(KEEPS_ITS_DATA);
    let (one, other) = neighbours(&server.url());
    let key = copied(&one, &other, "ann").await;
    server.kill();
    until_forgotten(&other, &key, Instant::now(), LEASE).await;
    server.restart();
    keeps_a_copy(&other, &key).await;
    let ended = end(&one, &key, "ann").await;
    until_forgotten(&other, &key, ended, LEASE).await;
    is_gone_for_good(&other, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_server_is_believed_for_a_lease() {
    let server = RedisServer::start();
    let (one, other) = neighbours(&server.url());
    let key = copied(&one, &other, "ann").await;
    server.pause();
    until_forgotten(&other, &key, Instant::now(), LEASE).await;
    assert!(one.destroy(&key, Some("ann"), Ending::LoggedOut).await.is_err(), "nothing can be ended meanwhile");
    server.resume();
    let ended = end(&one, &key, "ann").await;
    until_forgotten(&other, &key, ended, LEASE).await;
    is_gone_for_good(&other, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_remembers_few_readers_takes_the_other_copies_back() {
    const SESSIONS: usize = 300;
    let server = RedisServer::with("tracking-table-max-keys 100");
    let (one, other) = neighbours(&server.url());
    let mut keys = Vec::new();
    for _ in 0..SESSIONS {
        let key = begin(&one, "ann").await;
        assert!(other.load(&key).await.unwrap().live().is_some());
        keys.push(key);
    }
    eventually("the table is not larger than it may be", async || {
        let stats: String = server.ask("INFO stats");
        let tracked = stats.lines().find_map(|line| line.trim().strip_prefix("tracking_total_keys:"))?;
        (tracked.parse::<usize>().unwrap() <= 100).then_some(())
    })
    .await;
    for key in &keys {
        let ended = end(&one, key, "ann").await;
        until_forgotten(&other, key, ended, LEASE).await;
    }
    for key in &keys {
        assert!(other.recall(key).is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_flushed_takes_all_copies_back() {
    let server = RedisServer::start();
    let (one, other) = neighbours(&server.url());
    for command in ["FLUSHALL", "FLUSHDB", "FLUSHALL ASYNC"] {
        let key = copied(&one, &other, "ann").await;
        let () = server.ask(command);
        until_forgotten(&other, &key, Instant::now(), LEASE).await;
        is_gone_for_good(&other, &key).await;
    }
}

/// What nobody is told of, and no ACL can forbid: `RESET`. It is looked for now and then, and no copy is older than
/// [`AGE_MAX`].
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_made_to_stop_telling_is_found_out() {
    let server = RedisServer::start();
    let proxies = [FaultProxy::to(server.port()), FaultProxy::to(server.port())];
    let one = instance(&server.url());
    let others = proxies.each_ref().map(|proxy| instance(&proxy.url()));
    let mut keys = Vec::new();
    for other in &others {
        keys.push(copied(&one, other, "ann").await);
    }
    let copied = Instant::now();
    // The answers are left out, so that the client behind the proxy notices nothing.
    for (proxy, command) in proxies.iter().zip(["CLIENT TRACKING OFF", "RESET"]) {
        proxy.inject_there(format!("CLIENT REPLY SKIP\r\n{command}\r\n").as_bytes());
    }
    eventually("nobody is tracked any more", async || {
        let stats: String = server.ask("INFO clients");
        stats.contains("tracking_clients:1\r").then_some(())
    })
    .await;
    for (other, key) in others.iter().zip(&keys) {
        let ended = end(&one, key, "ann").await;
        let late = until_forgotten(other, key, ended, AGE_MAX.saturating_sub(ended - copied)).await;
        tell(&format!("a server that does not tell any more: found out after {late:?}"));
        is_gone_for_good(other, key).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_let_in_any_more_has_no_copies() {
    let server = RedisServer::with_user("proxy on >hunter2 ~* &* +@all");
    let (one, other) = (instance(&server.url()), instance(&server.url_as("proxy", "hunter2")));
    let key = copied(&one, &other, "ann").await;
    let _: usize = server.ask("ACL DELUSER proxy");
    let ended = end(&one, &key, "ann").await;
    until_forgotten(&other, &key, ended, LEASE).await;
    eventually("nobody is let in", async || match other.load(&key).await {
        Err(StoreError::Refused(_)) => Some(()),
        Err(StoreError::Unavailable(_)) => None,
        answer => panic!("{answer:?}"),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_was_replaced_is_believed_for_a_lease() {
    let mut world = Sentinels::start();
    let (one, other) = neighbours(&world.url());
    for is_killed in [false, true] {
        let key = copied(&one, &other, "ann").await;
        let primary = world.until_settled();
        world.servers[primary].ask_with_replicas("SET everything-before-this-is-there 1", 2);
        if is_killed {
            world.servers[primary].kill();
        } else {
            let () = world.sentinels[0].ask("SENTINEL FAILOVER mymaster");
        }
        let (promoted, _) = world.until_promoted(primary);
        let ended = end_on(&world.servers[promoted], &one, &key, "ann").await;
        until_forgotten(&other, &key, ended, LEASE).await;
        is_gone_for_good(&other, &key).await;
        world.until_settled();
    }
}

/// The one case in which a lease is not enough: this instance is on the side of a primary that does not know that it
/// was replaced. It refuses writes when its replicas have been silent for long enough, and without
/// `min-replicas-to-write` it never does.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_is_alone_with_us_is_not_believed_for_long() {
    let world = Sentinels::that_can_be_parted("min-replicas-to-write 1\nmin-replicas-max-lag 1");
    let proxies: Vec<_> = world.sentinels.iter().map(|sentinel| FaultProxy::to(sentinel.port())).collect();
    let hosts: Vec<_> = proxies.iter().map(|proxy| format!("127.0.0.1:{}", proxy.port())).collect();
    let (one, other) = (instance(&world.url()), instance(&format!("redis+sentinel://{}/mymaster", hosts.join(","))));
    let primary = world.until_settled();
    let key = copied(&one, &other, "ann").await;
    world.servers[primary].ask_with_replicas("SET everything-before-this-is-there 1", 2);

    world.isolate(primary);
    proxies.iter().for_each(FaultProxy::vanish);
    let parted = Instant::now();
    let (promoted, _) = world.until_promoted(primary);
    let ended = end_on(&world.servers[promoted], &one, &key, "ann").await;
    let late = until_forgotten(&other, &key, ended, DEADLINE).await;
    let in_all = ended + late - parted;
    let bound = Duration::from_secs(1 + 1) + ROLE_LEASE;
    tell(&format!(
        "split brain: copies used until {in_all:?} after the cut, {late:?} after the logout (bound {bound:?})"
    ));
    eventually("nor is that primary read", async || match other.load(&key).await {
        Err(StoreError::Unavailable(_)) => Some(()),
        Err(error) => panic!("{error:?}"),
        Ok(_) => None,
    })
    .await;
    tell(&format!("split brain: the old primary is read until {:?} after the cut", parted.elapsed()));
    let since = Instant::now();
    while since.elapsed() < LEASE {
        assert!(other.recall(&key).is_none());
        assert!(other.load(&key).await.is_err(), "who is alone with it knows nothing");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    proxies.iter().for_each(FaultProxy::heal);
    world.rejoin();
    is_gone_for_good(&other, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_its_cluster_left_behind_is_not_believed_for_long() {
    let world = Cluster::that_can_be_parted("");
    let (one, other) = neighbours(&world.url());
    let key = copied(&one, &other, "ann").await;
    let name = key.to_store_key(PREFIX);
    let owner = world.owner_of(&name);
    world.nodes[owner].ask_with_replicas(&format!("PEXPIRE {name} 600000"), 1);
    keeps_a_copy(&other, &key).await;

    world.isolate(owner);
    let parted = Instant::now();
    let (promoted, _) = world.until_promoted(&name, owner);
    let ended = end_on(&world.nodes[promoted], &one, &key, "ann").await;
    let late = until_forgotten(&other, &key, ended, DEADLINE).await;
    let bound = Duration::from_millis(1500) + ROLE_LEASE;
    tell(&format!(
        "a node left behind: copies used until {:?} after the cut, {late:?} after the logout (bound {bound:?})",
        ended + late - parted
    ));
    is_gone_for_good(&other, &key).await;
    world.rejoin();
    is_gone_for_good(&other, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_moves_takes_its_copies_with_it() {
    let world = Cluster::start();
    let (one, other) = neighbours(&world.url());
    let key = copied(&one, &other, "ann").await;
    let slot = world.slot_of(&key.to_store_key(PREFIX));
    let from = world.owner_of_slot(slot).unwrap();
    let to = (from + 1) % 3;

    // A session that moved while its slot has not: it is asked for at its new place, and ended there.
    let migration = world.begin_migration(slot, to);
    migration.move_all();
    for look in ["at the new place", "once more"] {
        let found = eventually("it is found", async || other.load(&key).await.ok()).await;
        assert!(found.live().is_some(), "{look}");
    }
    let undone = one.destroy(&key, Some("ann"), Ending::LoggedOut).await;
    assert!(matches!(undone, Err(StoreError::Unavailable(_))), "nothing is done to half a bucket: {undone:?}");
    let mut asking = redis::pipe();
    asking.cmd("ASKING").ignore().cmd("DEL").arg(key.to_store_key(PREFIX));
    let (deleted,): (usize,) = asking.query(&mut world.nodes[to].client()).unwrap();
    assert_eq!(deleted, 1);
    until_forgotten(&other, &key, Instant::now(), LEASE).await;
    is_gone_for_good(&other, &key).await;

    // The slot has moved, and this instance hears of it with the answer.
    migration.finish();
    let key = begin(&one, "ann").await;
    keeps_a_copy(&other, &key).await;
    let ended = end(&one, &key, "ann").await;
    until_forgotten(&other, &key, ended, LEASE).await;
    is_gone_for_good(&other, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_on_the_way_to_another_node_is_not_kept_when_the_slot_comes_back() {
    let world = Cluster::start();
    let (one, other) = neighbours(&world.url());
    let first = copied(&one, &other, "ann").await;
    let slot = world.slot_of(&first.to_store_key(PREFIX));
    let from = world.owner_of_slot(slot).unwrap();
    let to = (from + 1) % 3;
    world.migrate_slot(slot, to);
    let key = begin(&one, "ann").await;
    // Sent to the old place, answered by the new one.
    assert!(other.load(&key).await.unwrap().live().is_some());
    world.migrate_slot(slot, from);
    eventually("this instance knows that it is back", async || {
        assert!(other.load(&first).await.ok()?.live().is_some());
        other.recall(&first).map(drop)
    })
    .await;
    let ended = end(&one, &key, "ann").await;
    until_forgotten(&other, &key, ended, LEASE).await;
    is_gone_for_good(&other, &key).await;
}

#[test]
fn a_logout_on_one_gateway_under_load_is_seen_by_the_other_within_a_lease() {
    let logouts = std::env::var("CLOAKROOM_LOGOUTS").map_or(LOGOUTS_OVER_HTTP, |number| number.parse().unwrap());
    let (backend, server) = (Backend::echo(), RedisServer::start());
    let keys = format!("url = \"{}\"\nresponse_timeout = \"10s\"", server.url());
    // So many ended sessions of one network would be guesses: everybody comes from another one.
    let everywhere = "[server]\nthreads = 2\ntrusted_proxies = [\"127.0.0.1/32\"]";
    let setup = Gateway::in_front_of(&[&backend]).route("/", "").store(Store::Redis(keys)).with(everywhere);
    let (one, other) = (setup.clone().start(), setup.start());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = patient(&server.url());
    let log_in = |user: &str| {
        let id = id_of(user);
        runtime.block_on(store.create(&id.key(), session_of(user), &terms(LONG, None))).unwrap();
        id.to_cookie_value()
    };
    let with = |gateway: &Gateway, cookie: &str| {
        let client = gateway.client();
        client.set_cookie("session", cookie);
        client
    };
    let is_over = AtomicBool::new(false);
    let mut delays = Delays::default();
    std::thread::scope(|scope| {
        let _over = Over(&is_over);
        for (number, gateway) in [&one, &other, &one, &other].into_iter().enumerate() {
            let (user, is_over) = (["ann", "bob"][number / 2], &is_over);
            let client = with(gateway, &log_in(user));
            scope.spawn(move || {
                while !is_over.load(Ordering::SeqCst) {
                    assert_eq!(client.get("/").send().seen().headers("x-forwarded-user"), [user]);
                    // The pace of a user, and nothing that a test waits for.
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            });
        }
        for number in 0..logouts {
            let from = format!("10.0.{}.{}", number / 256, number % 256);
            let cookie = log_in("ann");
            let (here, there) = (with(&one, &cookie), with(&other, &cookie));
            let fields = one.log_out_form(&here);
            assert_eq!(there.get("/").header("X-Forwarded-For", &from).send().status, 200);
            let looking = scope.spawn(move || until_refused(&there, &from));
            let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            assert_eq!(here.post_form("/.cloakroom/logout", &fields).send().status, 303);
            let answered = Instant::now();
            let (served, refused) = looking.join().unwrap();
            delays.add(answered, served, refused, LEASE);
        }
    });
    delays.tell("logout on one gateway, refused by the other");
}

/// Asks back to back: when the last request that was served was sent, and the first that was not.
fn until_refused(client: &Client, from: &str) -> (Option<Instant>, Instant) {
    let mut served = None;
    loop {
        let asked = Instant::now();
        match client.get("/").header("X-Forwarded-For", from).send().status {
            200 => served = Some(asked),
            401 => return (served, asked),
            status => panic!("nothing is wrong, and yet: {status}"),
        }
    }
}
