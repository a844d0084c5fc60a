//! Whatever happens to Redis: an error at once, never a wrong answer, and recovery without a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cloakroom::config::model::{self, WhenFull};
use cloakroom::config::value::Duration as ConfigDuration;
use cloakroom::session::id::SessionKey;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{Creation, Ending, Gravity, Limit, SessionStore, StoreError, StoreOptions, Terms};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use toml::Spanned;

use crate::harness::fault::{Fault, FaultProxy};
use crate::harness::redis::{KEEPS_ITS_DATA, RedisServer};
use crate::harness::{DEADLINE, eventually};
use crate::store_contract::{LONG, id_of, session_of, settings, terms};

/// Short, for a store that is going to be down.
fn impatient(url: &str) -> model::RedisStore {
    model::RedisStore {
        connect_timeout: ConfigDuration::from_millis(300),
        response_timeout: ConfigDuration::from_millis(200),
        ..settings(url)
    }
}

fn store(server: &RedisServer) -> Arc<RedisStore> {
    Arc::new(RedisStore::new(&impatient(&server.url()), StoreOptions::default()).unwrap())
}

fn patient_store(server: &RedisServer) -> Arc<RedisStore> {
    Arc::new(RedisStore::new(&settings(&server.url()), StoreOptions::default()).unwrap())
}

/// Tried again when the machine is too busy for an impatient store.
pub(crate) async fn create(store: &RedisStore, user: &str) -> SessionKey {
    eventually("a session is created", async || {
        let key = id_of(user).key();
        store.create(&key, session_of(user), &terms(LONG, None)).await.ok().map(|_| key)
    })
    .await
}

/// The user of a session, where an answer comes; that one comes in the end, good or bad, is part of every promise.
pub(crate) async fn load(store: &RedisStore, key: &SessionKey) -> Result<Option<String>, StoreError> {
    let answer = timeout(DEADLINE, store.load(key)).await.expect("nobody waits for ever");
    answer.map(|found| found.live().map(|stored| stored.record.identity.user.clone()))
}

pub(crate) async fn until_down(store: &RedisStore, key: &SessionKey) {
    eventually("the store is seen to be down", async || match load(store, key).await {
        Err(StoreError::Unavailable(_)) => Some(()),
        Err(StoreError::Refused(cause)) => panic!("being down is no refusal: {cause}"),
        Err(error @ (StoreError::Unreadable | StoreError::TooLarge)) => panic!("nothing was read: {error}"),
        Ok(user) => {
            assert!(user.is_some(), "a store that goes down logs nobody out");
            None
        }
    })
    .await;
}

async fn until_back(store: &RedisStore, key: &SessionKey) -> Option<String> {
    eventually("the store is back", async || load(store, key).await.ok()).await
}

/// Users who come all the time, as long as this lives; each answer that comes is his own or nothing.
pub(crate) struct Traffic {
    tasks: tokio::task::JoinSet<()>,
    answers: Arc<AtomicUsize>,
    failures: Arc<AtomicUsize>,
}

impl Traffic {
    pub(crate) async fn on(store: &Arc<RedisStore>) -> Self {
        let (answers, failures) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..16 {
            let user = format!("user{n}");
            let key = create(store, &user).await;
            let (store, answers, failures) = (Arc::clone(store), Arc::clone(&answers), Arc::clone(&failures));
            tasks.spawn(async move {
                loop {
                    match load(&store, &key).await {
                        Ok(found) => {
                            assert!(found.is_none_or(|found| found == user), "an answer for somebody else");
                            answers.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => {
                            failures.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    // The pace of a user, and nothing that a test waits for.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        }
        Self { tasks, answers, failures }
    }

    /// Every one of them goes on to be answered.
    pub(crate) async fn flows(&self) {
        let before = self.answers.load(Ordering::Relaxed);
        eventually("traffic flows", async || (before + 200 < self.answers.load(Ordering::Relaxed)).then_some(())).await;
    }

    pub(crate) async fn stop(mut self) -> usize {
        self.tasks.abort_all();
        while let Some(ended) = self.tasks.join_next().await {
            assert!(ended.is_err_and(|error| error.is_cancelled()), "a user met a panic");
        }
        self.failures.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn a_killed_redis_is_unavailable_and_its_sessions_come_back_with_its_data() {
    let mut server = RedisServer::with(KEEPS_ITS_DATA);
    let store = store(&server);
    let key = create(&store, "ann").await;
    let traffic = Traffic::on(&store).await;
    for _ in 0..3 {
        traffic.flows().await;
        server.kill();
        until_down(&store, &key).await;
        assert!(matches!(store.ping().await, Err(StoreError::Unavailable(_))), "readiness tells");
        assert!(
            store.destroy(&key, None, Ending::LoggedOut).await.is_err(),
            "a logout that did not happen is not told as one"
        );
        server.restart();
        assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"), "still logged in");
        traffic.flows().await;
    }
    assert!(0 < traffic.stop().await);
}

#[tokio::test]
async fn an_outage_spares_whom_this_instance_touched_and_not_whom_another_ended() {
    const GRACE: Duration = Duration::from_secs(60);
    let server = RedisServer::start();
    let (here, elsewhere) = (patient_store(&server), patient_store(&server));
    for round in 0..50 {
        let (kept, ended) = (create(&here, "ann").await, create(&here, "bob").await);
        for key in [&kept, &ended] {
            eventually("it is a copy", async || {
                let stored = here.load(key).await.ok()?.live()?;
                here.recall(key).map(|_| stored)
            })
            .await;
        }
        let ends = here.recall(&kept).map_or(u64::MAX, |stored| stored.record.ends);
        assert!(here.touch(&kept, LONG.idle * 2, ends).await.unwrap());
        assert!(elsewhere.destroy(&ended, None, Ending::LoggedOut).await.unwrap());
        for key in [&kept, &ended] {
            eventually("the copy is taken back", async || here.recall(key).is_none().then_some(())).await;
        }
        assert!(here.recall_within(GRACE, &kept).is_some(), "round {round}: our touch found it alive");
        assert!(!here.doubts(&kept), "round {round}: what took the copy back was our own touch");
        assert!(here.recall_within(GRACE, &ended).is_none() && here.doubts(&ended), "round {round}: a known end");
    }
}

#[tokio::test]
async fn a_redis_that_comes_back_empty_knows_nobody() {
    let mut server = RedisServer::with(KEEPS_ITS_DATA);
    let store = store(&server);
    let key = create(&store, "ann").await;
    server.kill();
    until_down(&store, &key).await;
    server.restart_empty();
    assert_eq!(until_back(&store, &key).await, None, "now the store says that there is no such session");
    let again = create(&store, "ann").await;
    assert_eq!(load(&store, &again).await.unwrap().as_deref(), Some("ann"));
}

#[tokio::test]
async fn a_frozen_redis_is_unavailable_and_answers_nobody_late() {
    let server = RedisServer::start();
    let store = store(&server);
    let key = create(&store, "ann").await;
    let traffic = Traffic::on(&store).await;
    for _ in 0..3 {
        traffic.flows().await;
        server.pause();
        until_down(&store, &key).await;
        // Polled once: who comes while the store is known to be down does not wait at all.
        eventually("everybody is told at once", async || {
            tokio::select! {
                biased;
                answer = load(&store, &key) => answer.is_err().then_some(()),
                () = std::future::ready(()) => None,
            }
        })
        .await;
        server.resume();
        assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"));
    }
    traffic.flows().await;
    assert!(0 < traffic.stop().await);
}

#[tokio::test]
async fn a_redis_that_froze_while_nobody_came_is_found_by_the_heartbeat() {
    let server = RedisServer::start();
    let store = store(&server);
    let key = create(&store, "ann").await;
    server.pause();
    eventually("the first who comes is told at once", async || {
        tokio::select! {
            biased;
            answer = store.ping() => answer.is_err().then_some(()),
            () = std::future::ready(()) => None,
        }
    })
    .await;
    server.resume();
    assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"));
}

#[tokio::test]
async fn a_redis_that_is_not_there_yet_is_awaited_in_the_background() {
    let mut server = RedisServer::start();
    let store = store(&server);
    let key = id_of("ann").key();
    server.kill();
    until_down(&store, &key).await;
    server.restart();
    assert_eq!(until_back(&store, &key).await, None);
}

#[tokio::test]
async fn a_connection_that_the_server_closes_is_replaced() {
    let server = RedisServer::start();
    let store = store(&server);
    let key = create(&store, "ann").await;
    for _ in 0..10 {
        let closed: usize =
            redis::cmd("CLIENT").arg("KILL").arg("TYPE").arg("normal").query(&mut server.client()).unwrap();
        assert!(0 < closed);
        assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"));
    }
}

#[tokio::test]
async fn a_wrong_password_is_a_refusal_that_can_be_put_right_without_a_restart() {
    let server = RedisServer::start();
    let mut client = server.client();
    let _: () = redis::cmd("ACL")
        .arg("SETUSER")
        .arg("proxy")
        .arg("on")
        .arg(">other")
        .arg("~*")
        .arg("+@all")
        .query(&mut client)
        .unwrap();
    let url = format!("redis://proxy:hunter2@127.0.0.1:{}", server.port());
    let store = RedisStore::new(&settings(&url), StoreOptions::default()).unwrap();
    let key = id_of("ann").key();
    let error = store.load(&key).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(!format!("{error:?} {store:?}").contains("hunter2"), "a password is in an error");

    let _: () = redis::cmd("ACL").arg("SETUSER").arg("proxy").arg(">hunter2").query(&mut client).unwrap();
    assert_eq!(until_back(&store, &key).await, None);
}

#[tokio::test]
async fn without_its_password_a_redis_refuses() {
    let server = RedisServer::with("requirepass hunter2");
    let error = patient_store(&server).load(&id_of("ann").key()).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
}

#[tokio::test]
async fn a_missing_permission_is_a_refusal_and_costs_no_connection() {
    let server = RedisServer::with("user default on nopass ~* +@all -set -ping");
    let store = patient_store(&server);
    let refused = store.create(&id_of("ann").key(), session_of("ann"), &terms(LONG, None)).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert!(store.load(&id_of("ann").key()).await.unwrap().live().is_none());
}

#[tokio::test]
async fn a_replica_takes_no_logins_until_it_is_a_primary_again() {
    let server = RedisServer::start();
    let store = store(&server);
    let key = create(&store, "ann").await;
    let mut client = server.client();
    // A primary that is not there: the replica keeps its data and waits.
    let _: () = redis::cmd("REPLICAOF").arg("127.0.0.1").arg(1).query(&mut client).unwrap();
    let refused = store.create(&id_of("bob").key(), session_of("bob"), &terms(LONG, Some(&key))).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "not now, rather than no: {refused:?}");
    assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"), "who is in stays in");
    let _: () = redis::cmd("REPLICAOF").arg("NO").arg("ONE").query(&mut client).unwrap();
    eventually("logins work again", async || {
        store.create(&id_of("bob").key(), session_of("bob"), &terms(LONG, Some(&key))).await.ok()
    })
    .await;
    assert_eq!(until_back(&store, &key).await, None);
}

#[tokio::test]
async fn a_name_that_leads_to_a_replica_is_looked_at_again_without_a_storm_of_connections() {
    let server = RedisServer::start();
    let store = store(&server);
    let key = create(&store, "ann").await;
    let mut client = server.client();
    let mut connections = || -> u64 {
        let report: String = redis::cmd("INFO").arg("stats").query(&mut client).unwrap();
        let count = report.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
        count.unwrap().parse().unwrap()
    };
    let () = server.ask("REPLICAOF 127.0.0.1 1");
    let before = connections();
    eventually("it is seen to be a replica", async || (before + 1 < connections()).then_some(())).await;
    let seen = connections();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let attempts = connections() - seen;
    assert!(attempts <= 20, "{attempts} connections in a second");
    assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"), "who is in stays in");
}

/// What a liar says to the connection's greeting, to its first PING, and to everything after.
#[derive(Clone, Copy)]
enum Lie {
    Silence,
    HangUp,
    /// To everything.
    Always(&'static [u8]),
    /// After a good greeting.
    Later(&'static [u8]),
}

async fn lie(listener: TcpListener, lie: Lie) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        tokio::spawn(async move {
            let mut request = [0; 4096];
            let mut requests = 0;
            while let Ok(1..) = stream.read(&mut request).await {
                requests += 1;
                let reply: &[u8] = match (lie, requests) {
                    (Lie::Silence, _) => continue,
                    (Lie::HangUp, _) => return,
                    (Lie::Always(reply), _) => reply,
                    (Lie::Later(_), 1) => b"%1\r\n$5\r\nproto\r\n:3\r\n",
                    (Lie::Later(_), 2) => b"+PONG\r\n",
                    (Lie::Later(reply), _) => reply,
                };
                if stream.write_all(reply).await.is_err() {
                    return;
                }
            }
        });
    }
}

#[tokio::test]
async fn nonsense_is_never_a_session_and_never_a_panic() {
    let lies = [
        ("silence", Lie::Silence),
        ("hangs up", Lie::HangUp),
        ("another protocol", Lie::Always(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")),
        ("noise", Lie::Always(b"\x00\xff\xfe\r\n\x01\r\n")),
        ("an endless length", Lie::Always(b"$99999999999999999999\r\n")),
        ("noise later", Lie::Later(b"\x00\xff\xfe\r\n")),
        ("a huge length", Lie::Later(b"*2\r\n$536870912\r\nab")),
        ("a negative array", Lie::Later(b"*-7\r\n:-7\r\n")),
        ("numbers for strings", Lie::Later(b":1\r\n:1\r\n:1\r\n:1\r\n")),
        ("strings for numbers", Lie::Later(b"+a\r\n+b\r\n+c\r\n+d\r\n")),
        ("arrays for strings", Lie::Later(b"*1\r\n+a\r\n*0\r\n*0\r\n*0\r\n")),
        ("half an answer", Lie::Later(b"$3\r\nab")),
        ("a value without its expiry", Lie::Later(b"$1\r\na\r\n$-1\r\n")),
        ("a negative life", Lie::Later(b"$1\r\na\r\n:-9\r\n")),
    ];
    for (what, kind) in lies {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://{}", listener.local_addr().unwrap());
        let liar = tokio::spawn(lie(listener, kind));
        let store = RedisStore::new(&impatient(&url), StoreOptions::default()).unwrap();
        let key = id_of("ann").key();
        for _ in 0..3 {
            let answer = load(&store, &key).await;
            assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{what}: {answer:?}");
            let answers = async {
                (
                    store.create(&key, session_of("ann"), &terms(LONG, None)).await.is_err(),
                    store.touch(&key, LONG.idle, 1).await.is_err(),
                    store.increment("x", LONG.idle).await.is_err(),
                )
            };
            let refused = timeout(DEADLINE, answers).await.expect("nobody waits for ever");
            assert_eq!(refused, (true, true, true), "{what}: nonsense must not be told as success");
        }
        liar.abort();
    }
}

/// Callers that go away at any point leave no reply behind that another could take for his own.
#[tokio::test]
async fn ten_thousand_cancelled_loads_never_give_a_user_the_session_of_another() {
    let server = RedisServer::start();
    let store = patient_store(&server);
    let mut sessions = Vec::new();
    for n in 0..100 {
        let user = format!("user{n}");
        sessions.push((create(&store, &user).await, user));
    }
    let sessions = Arc::new(sessions);

    let mut tasks = tokio::task::JoinSet::new();
    for seed in 0..50 {
        let (store, sessions) = (Arc::clone(&store), Arc::clone(&sessions));
        tasks.spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut completed, mut cancelled) = (0, 0);
            while cancelled < 200 {
                let (key, user) = &sessions[rng.random_range(0..sessions.len())];
                let patience = if rng.random_ratio(1, 4) { usize::MAX } else { rng.random_range(0..60) };
                let gives_up = async {
                    for _ in 0..patience {
                        tokio::task::yield_now().await;
                    }
                };
                tokio::select! {
                    biased;
                    stored = store.load(key) => {
                        let stored = stored.unwrap().live().expect("it lives");
                        assert_eq!(&stored.record.identity.user, user, "the session of another");
                        completed += 1;
                    }
                    () = gives_up => cancelled += 1,
                }
            }
            completed
        });
    }
    let completed: usize = tasks.join_all().await.into_iter().sum();
    assert!(1_000 < completed, "those who wait are answered, too: {completed}");
    for (key, user) in sessions.iter() {
        assert_eq!(load(&store, key).await.unwrap().as_ref(), Some(user), "the connection is in step");
    }
    let list: String = redis::cmd("CLIENT").arg("LIST").query(&mut server.client()).unwrap();
    assert_eq!(list.lines().count(), 2, "cancelling costs no connection");
}

#[tokio::test]
async fn what_was_read_is_answered_from_here_and_taken_back_at_once() {
    let server = RedisServer::start();
    let store = store(&server);
    let key = create(&store, "ann").await;
    let recalled = async |key: &SessionKey| {
        eventually("a copy is kept", async || {
            load(&store, key).await.ok()?;
            store.recall(key)
        })
        .await
    };
    assert_eq!(recalled(&key).await.record.identity.user, "ann");
    let elsewhere = self::store(&server);
    assert!(
        eventually("it ends elsewhere", async || elsewhere.destroy(&key, None, Ending::LoggedOut).await.ok()).await
    );
    eventually("the copy is taken back", async || store.recall(&key).is_none().then_some(())).await;

    let again = create(&store, "ann").await;
    recalled(&again).await;
    let () = server.ask("FLUSHALL");
    eventually("all copies are taken back", async || store.recall(&again).is_none().then_some(())).await;

    let own = create(&store, "ann").await;
    recalled(&own).await;
    store.destroy(&own, None, Ending::LoggedOut).await.unwrap();
    assert!(store.recall(&own).is_none(), "who logs somebody out knows it first");
}

/// Another worker of the process, which has a copy of a session and then sees no push: its runtime gets no turn.
struct Sibling {
    may_look: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

impl Sibling {
    async fn with_copy(store: &Arc<RedisStore>, key: &SessionKey) -> Self {
        let (may_look, look) = std::sync::mpsc::channel();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let (store, key) = (Arc::clone(store), key.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                eventually("a copy is kept", async || {
                    load(&store, &key).await.ok()?;
                    store.recall(&key)
                })
                .await;
                ready.send(()).unwrap();
                look.recv().unwrap();
                store.recall(&key).is_some()
            })
        });
        is_ready.await.unwrap();
        Self { may_look, thread }
    }

    /// Whether it would use its copy now.
    async fn recalls(self) -> bool {
        self.may_look.send(()).unwrap();
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn a_logout_on_one_worker_is_known_to_all_of_the_process_before_it_is_asked_for() {
    let server = RedisServer::start();
    let proxy = FaultProxy::to(server.port());
    let lasting =
        model::RedisStore { lease: Spanned::new(0..0, ConfigDuration::from_millis(60_000)), ..settings(&proxy.url()) };
    let store = Arc::new(RedisStore::new(&lasting, StoreOptions::default()).unwrap());
    let key = create(&store, "ann").await;
    let sibling = Sibling::with_copy(&store, &key).await;
    // From here on no push comes through.
    proxy.set(Fault::SILENT);
    assert!(timeout(Duration::from_millis(1), store.destroy(&key, None, Ending::LoggedOut)).await.is_err());
    assert!(!sibling.recalls().await, "a worker of the process that ends it used its copy");
}

#[tokio::test]
async fn what_one_worker_has_read_no_other_worker_of_the_process_reads_again() {
    let server = RedisServer::start();
    let store = Arc::new(RedisStore::new(&settings(&server.url()), StoreOptions::default()).unwrap());
    let key = create(&store, "ann").await;
    eventually("a copy is kept", async || {
        load(&store, &key).await.ok()?;
        store.recall(&key)
    })
    .await;
    let (logged_out, is_logged_out) = tokio::sync::oneshot::channel();
    let (known, is_known) = tokio::sync::oneshot::channel();
    let other_worker = std::thread::spawn({
        let (store, key) = (Arc::clone(&store), key.clone());
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                // It has no connection yet.
                known.send(store.recall(&key).is_some()).unwrap();
                is_logged_out.await.unwrap();
                eventually("a logout elsewhere takes the copy from all", async || {
                    store.recall(&key).is_none().then_some(())
                })
                .await;
            });
        }
    });
    assert!(is_known.await.unwrap());
    let elsewhere = RedisStore::new(&settings(&server.url()), StoreOptions::default()).unwrap();
    assert!(elsewhere.destroy(&key, None, Ending::LoggedOut).await.unwrap());
    logged_out.send(()).unwrap();
    tokio::task::spawn_blocking(|| other_worker.join().unwrap()).await.unwrap();
}

#[tokio::test]
async fn who_ends_sessions_by_their_user_has_told_all_workers_of_the_process() {
    let server = RedisServer::start();
    let lasting =
        model::RedisStore { lease: Spanned::new(0..0, ConfigDuration::from_millis(60_000)), ..settings(&server.url()) };
    let store = Arc::new(RedisStore::new(&lasting, StoreOptions::default()).unwrap());
    for way in ["all of the user", "all of the part", "displaced"] {
        let key = create(&store, "ann").await;
        let sibling = Sibling::with_copy(&store, &key).await;
        match way {
            "all of the user" => assert_eq!(store.destroy_all("ann", None, Ending::Revoked).await.unwrap(), 1),
            "all of the part" => assert_eq!(store.destroy_part(key.bucket(), Ending::Revoked).await.unwrap(), 1),
            _ => {
                let limit = Some(Limit { sessions: 1, when_full: WhenFull::EvictOldest });
                let terms = Terms { limit, ..terms(LONG, None) };
                let created = store.create(&id_of("ann").key(), session_of("ann"), &terms).await.unwrap();
                assert_eq!(created, Creation::Begun { displaced: 1 });
            }
        }
        assert!(!sibling.recalls().await, "{way}: a worker of the process that ended it used its copy");
    }
}

#[tokio::test]
async fn no_copy_is_used_when_the_connection_is_lost_or_the_server_freezes_or_is_demoted() {
    let mut server = RedisServer::with(KEEPS_ITS_DATA);
    let store = store(&server);
    let key = create(&store, "ann").await;
    let kept = async || {
        eventually("a copy is kept", async || {
            load(&store, &key).await.ok()?;
            store.recall(&key)
        })
        .await;
    };
    let gone = async |why: &str| eventually(why, async || store.recall(&key).is_none().then_some(())).await;
    kept().await;
    server.pause();
    gone("a frozen server's lease ends").await;
    server.resume();
    kept().await;
    let () = server.ask("REPLICAOF 127.0.0.1 1");
    gone("a replica is no authority").await;
    let () = server.ask("REPLICAOF NO ONE");
    kept().await;
    server.kill();
    gone("nobody is there").await;
    server.restart();
    kept().await;
}

#[tokio::test]
async fn with_the_cache_off_nothing_is_kept() {
    let server = RedisServer::start();
    let settings = model::RedisStore { cache: model::Cache::Off, ..settings(&server.url()) };
    let store = RedisStore::new(&settings, StoreOptions::default()).unwrap();
    let key = create(&store, "ann").await;
    for _ in 0..20 {
        assert_eq!(load(&store, &key).await.unwrap().as_deref(), Some("ann"));
        assert!(store.recall(&key).is_none());
    }
}

#[tokio::test]
async fn a_durable_logout_needs_its_replica_and_is_not_told_as_done_without() {
    let server = RedisServer::start();
    let durable = model::RedisStore {
        logout: model::Logout::Durable,
        logout_replicas: 1,
        logout_timeout: ConfigDuration::from_millis(100),
        ..settings(&server.url())
    };
    let store = RedisStore::new(&durable, StoreOptions::default()).unwrap();
    let key = create(&store, "ann").await;
    let error = store.destroy(&key, None, Ending::LoggedOut).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Unavailable(cause) if cause.to_string().contains("0 of 1 replicas")),
        "{error:?}"
    );

    let replica = RedisServer::with(&format!("replicaof 127.0.0.1 {}\nrepl-diskless-sync-delay 0", server.port()));
    server.ask_with_replicas("SET test:synced 1", 1);
    let key = create(&store, "ann").await;
    eventually("the replica has it", async || store.destroy(&key, None, Ending::LoggedOut).await.ok()).await;
    drop(replica);
}

#[tokio::test]
async fn durable_logouts_go_where_the_name_leads_after_a_failover() {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = FaultProxy::to(old.port());
    let durable = model::RedisStore { logout: model::Logout::Durable, logout_replicas: 0, ..settings(&proxy.url()) };
    let store = RedisStore::new(&durable, StoreOptions::default()).unwrap();
    let key = create(&store, "ann").await;
    eventually("it ends", async || store.destroy(&key, None, Ending::LoggedOut).await.ok()).await;
    proxy.lead_to(new.port());
    let () = old.ask("REPLICAOF 127.0.0.1 1");
    let key = create(&store, "ann").await;
    let ended = eventually("it ends there", async || store.destroy(&key, None, Ending::LoggedOut).await.ok()).await;
    assert!(ended);
}

#[tokio::test]
async fn with_the_shipped_settings_a_server_starts_and_people_log_in() {
    let shipped = include_str!("../../conf/redis.conf");
    let server = RedisServer::with(shipped);
    let store = patient_store(&server);
    let key = create(&store, "ann").await;
    assert_eq!(load(&store, &key).await.unwrap().as_deref(), Some("ann"));
    let risks: Vec<_> = store.inspect().await.into_iter().filter(|risk| risk.gravity != Gravity::Hint).collect();
    assert!(risks.is_empty(), "what we ship is not risky: {risks:?}");

    let bare = RedisServer::with("maxmemory-policy allkeys-lru\nappendonly no");
    let risks = patient_store(&bare).inspect().await;
    for word in ["maxmemory-policy is allkeys-lru", "a restart loses the sessions"] {
        assert!(risks.iter().any(|risk| risk.what.contains(word)), "{word}: {risks:?}");
    }
}

#[tokio::test]
async fn a_server_that_wants_a_certificate_gets_ours_and_an_expired_one_is_refused() {
    let server = RedisServer::with_mutual_tls();
    let (cert, key) = server.client_certificate();
    let spanned = |path: std::path::PathBuf| Some(toml::Spanned::new(0..0, path));
    let trusting = model::RedisStore { ca: spanned(server.authority()), ..settings(&server.tls_url()) };
    let unknown = RedisStore::new(&trusting, StoreOptions::default()).unwrap();
    assert!(unknown.ping().await.is_err(), "without a certificate nobody gets in");
    let trusting = model::RedisStore {
        ca: spanned(server.authority()),
        cert: spanned(cert),
        key: spanned(key),
        ..settings(&server.tls_url())
    };
    let store = RedisStore::new(&trusting, StoreOptions::default()).unwrap();
    let key = create(&store, "ann").await;
    assert_eq!(load(&store, &key).await.unwrap().as_deref(), Some("ann"));

    let expired = RedisServer::with_expired_tls();
    let trusting = model::RedisStore { ca: spanned(expired.authority()), ..settings(&expired.tls_url()) };
    let refused = RedisStore::new(&trusting, StoreOptions::default()).unwrap().ping().await.unwrap_err();
    assert!(matches!(&refused, StoreError::Unavailable(cause) if cause.to_string().contains("xpired")), "{refused:?}");
}

#[tokio::test]
async fn a_host_that_vanishes_is_down_and_found_again() {
    let server = RedisServer::start();
    let proxy = FaultProxy::to(server.port());
    let store = Arc::new(RedisStore::new(&impatient(&proxy.url()), StoreOptions::default()).unwrap());
    let key = create(&store, "ann").await;
    proxy.vanish();
    until_down(&store, &key).await;
    assert!(store.recall(&key).is_none());
    proxy.heal();
    assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"));
    for _ in 0..5 {
        proxy.cut();
        assert_eq!(until_back(&store, &key).await.as_deref(), Some("ann"));
    }
}
