//! Every store keeps the same contract: one suite, run on memory and on Redis over every kind of connection.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cloakroom::config::model;
use cloakroom::config::model::WhenFull;
use cloakroom::identity::Identity;
use cloakroom::session::Lifetime;
use cloakroom::session::id::{BUCKETS, SessionId, SessionKey, bucket_text};
use cloakroom::session::record::{Attribute, ClientHints, LoginMethod, RECORD_BYTES_MAX, Record};
use cloakroom::session::store::memory::MemoryStore;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{
    Activity, BOUND_MAX, Creation, EndEvent, Ending, Found, Limit, NewSession, SessionStore, StoreError, StoreOptions,
    Terms,
};
use toml::Spanned;

use crate::harness::redis::RedisServer;
use crate::harness::redis::cluster::Cluster;
use crate::harness::redis::sentinels::Sentinels;
use crate::harness::{DEADLINE, eventually};

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
        attributes: BTreeMap::new(),
        login: None,
    }
}

pub(crate) fn terms(lifetime: Lifetime, replaces: Option<&SessionKey>) -> Terms {
    Terms { lifetime, limit: None, replaces: replaces.cloned() }
}

pub(crate) fn id_of(user: &str) -> SessionId {
    SessionId::generate(user).unwrap()
}

pub(crate) const LONG: Lifetime = Lifetime { idle: Duration::from_secs(600), absolute: Duration::from_secs(6_000) };

/// Instances that share their sessions, and how to let their time pass until something is so.
struct World {
    store: Arc<dyn SessionStore>,
    other: Arc<dyn SessionStore>,
    memory_clock: Option<Arc<AtomicU64>>,
}

const WITH_EVENTS: fn() -> StoreOptions = || StoreOptions { events: true, ..StoreOptions::default() };

impl World {
    fn redis(settings: &model::RedisStore) -> Self {
        let instance = || Arc::new(RedisStore::new(settings, WITH_EVENTS()).unwrap());
        Self { store: instance(), other: instance(), memory_clock: None }
    }

    fn memory() -> Self {
        let now = Arc::new(AtomicU64::new(1_800_000_000_000));
        let clock = Arc::clone(&now);
        let store = MemoryStore::with_clock(100_000, Box::new(move || clock.load(Ordering::Relaxed)));
        let store = Arc::new(store.with_options(WITH_EVENTS()));
        Self { store: Arc::clone(&store) as _, other: store, memory_clock: Some(now) }
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

    /// Its clock shows another millisecond than that of the last session: it is the younger one.
    async fn created_later(&self, user: &str) -> SessionKey {
        let before = self.created("clock", LONG).await;
        let before = self.store.load(&before).await.unwrap().live().unwrap().record.created;
        eventually("the next millisecond", async || {
            self.passing().await;
            let probe = self.created("clock", LONG).await;
            (before < self.store.load(&probe).await.unwrap().live().unwrap().record.created).then_some(())
        })
        .await;
        self.created(user, LONG).await
    }

    async fn logged_in(&self, user: &str, limit: Limit, replaces: Option<&SessionKey>) -> (SessionKey, Creation) {
        let key = id_of(user).key();
        let terms = Terms { limit: Some(limit), ..terms(LONG, replaces) };
        let creation = self.store.create(&key, session_of(user), &terms).await.unwrap();
        (key, creation)
    }

    async fn user(&self, key: &SessionKey) -> Option<String> {
        self.store.load(key).await.unwrap().live().map(|stored| stored.record.identity.user.clone())
    }

    async fn lives(&self, key: &SessionKey) -> bool {
        self.user(key).await.is_some()
    }

    /// Why it is not live; none if nothing is known of it.
    async fn ended(&self, key: &SessionKey) -> Option<Ending> {
        match self.store.load(key).await.unwrap() {
            Found::Live(_) => panic!("it lives"),
            Found::Ended(ending) => Some(ending),
            Found::Nothing => None,
        }
    }

    async fn listed(&self, user: &str) -> Vec<SessionKey> {
        self.other.list(user).await.unwrap().into_iter().map(|listed| listed.key).collect()
    }

    async fn time_to_live(&self, key: &SessionKey) -> Duration {
        self.store.load(key).await.unwrap().live().expect("it lives").time_to_live
    }

    async fn ends(&self, key: &SessionKey) -> u64 {
        self.store.load(key).await.unwrap().live().expect("it lives").record.ends
    }

    /// Where a session may be: one part of many, or any.
    fn parts_of(&self, key: &SessionKey) -> Vec<u16> {
        if self.store.parts() == BUCKETS { vec![key.bucket()] } else { (0..self.store.parts()).collect() }
    }

    /// What is to be told, of sessions near this one.
    async fn sweep(&self, near: &SessionKey) -> Vec<EndEvent> {
        let mut events = Vec::new();
        for part in self.parts_of(near) {
            events.extend(self.store.sweep(part).await.unwrap());
        }
        events
    }

    async fn forget(&self, near: &SessionKey, events: &[EndEvent]) {
        for part in self.parts_of(near) {
            self.other.forget_events(part, events).await.unwrap();
        }
    }
}

/// A user whom no other promise knows.
fn somebody() -> String {
    static USERS: AtomicU64 = AtomicU64::new(0);
    format!("somebody {}", USERS.fetch_add(1, Ordering::Relaxed))
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
    a_record_is_changed_for_all_and_lives_as_long_as_before(world).await;
    changes_at_the_same_time_all_stay(world).await;
    what_is_no_change_is_none(world).await;
    a_name_is_claimed_once_until_it_is_released_or_forgotten(world).await;
    sessions_are_found_by_what_they_are_bound_to(world).await;
    many_at_once_get_their_own(world).await;
}

/// What is promised of users, ends and all sessions.
async fn keeps_the_whole_contract(world: World) {
    let per_user = &world;
    fifty_logins_at_once_leave_exactly_as_many_as_are_allowed(per_user).await;
    who_may_have_no_more_is_refused_and_nothing_changes(per_user).await;
    the_oldest_makes_room(per_user).await;
    who_was_displaced_or_revoked_is_told_why_and_nobody_else(per_user).await;
    a_tombstone_is_no_session(per_user).await;
    a_session_that_is_replaced_leaves_its_place(per_user).await;
    who_idled_out_takes_no_place(per_user).await;
    a_list_has_the_live_sessions_of_a_user_the_oldest_first(per_user).await;
    a_user_with_very_many_sessions_is_listed_and_logged_out_whole(per_user).await;
    all_sessions_of_a_user_end_or_all_but_one(per_user).await;
    nobody_is_listed_who_never_logged_in(per_user).await;
    no_load_after_a_logout_finds_the_session(per_user).await;
    a_part_is_listed_and_ended(per_user).await;
    the_total_is_right_when_the_expired_have_been_swept(per_user).await;
    every_end_is_told_once_with_its_reason(per_user).await;
    // Sessions in memory have one instance, which always leads.
    if world.memory_clock.is_none() {
        one_instance_leads_until_its_time_is_over(per_user).await;
    }
    a_trail_is_bounded_and_goes_with_its_session(per_user).await;
    keeps_the_contract(world).await;
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
    assert!(matches!(refused, Err(StoreError::TooLarge)), "{refused:?}");
    assert!(world.user(&key).await.is_none());
}

fn noting(name: &str, value: &str) -> impl Fn(&Record) -> Option<Record> + Send + Sync {
    move |record| {
        let mut record = record.clone();
        record.attributes.insert(name.to_owned(), Attribute { value: value.to_owned(), ends: None });
        Some(record)
    }
}

async fn a_record_is_changed_for_all_and_lives_as_long_as_before(world: &World) {
    let unknown = id_of("ann").key();
    assert!(world.store.update(&unknown, &noting("a", "1")).await.unwrap().is_none(), "nothing is begun by it");
    assert!(!world.lives(&unknown).await);

    let key = world.created("ann", LONG).await;
    let before = world.store.load(&key).await.unwrap().live().unwrap();
    let told = world.store.update(&key, &noting("a", "1")).await.unwrap().expect("it lives");
    assert_eq!(told.attributes["a"].value, "1");
    let after = world.store.load(&key).await.unwrap().live().unwrap();
    assert_eq!(after.record, told, "the writer sees it at once");
    assert_eq!((after.record.created, after.record.ends), (before.record.created, before.record.ends));
    assert!(after.time_to_live <= before.time_to_live, "it is no use of the session");
    assert!(LONG.idle / 2 < after.time_to_live);
    eventually("every instance sees it", async || {
        let stored = world.other.load(&key).await.unwrap().live()?;
        stored.record.attributes.contains_key("a").then_some(())
    })
    .await;
    assert_eq!(world.listed("ann").await.iter().filter(|listed| **listed == key).count(), 1, "still in its list");

    world.store.destroy(&key, None, Ending::Revoked).await.unwrap();
    assert!(world.store.update(&key, &noting("a", "2")).await.unwrap().is_none(), "a tombstone is no session");
    assert_eq!(world.ended(&key).await, Some(Ending::Revoked));
}

async fn changes_at_the_same_time_all_stay(world: &World) {
    let key = world.created("ann", LONG).await;
    let tasks: Vec<_> = (0..60)
        .map(|n| {
            let store = Arc::clone(if n % 2 == 0 { &world.store } else { &world.other });
            let key = key.clone();
            tokio::spawn(async move { store.update(&key, &noting(&format!("name {n}"), "x")).await.unwrap().unwrap() })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let record = world.store.update(&key, &|_| None).await.unwrap().unwrap();
    assert_eq!(record.attributes.len(), 60, "none is lost");
}

async fn what_is_no_change_is_none(world: &World) {
    let key = world.created("ann", LONG).await;
    let before = world.store.update(&key, &|_| None).await.unwrap().expect("it lives, and is told");
    let same = world.store.update(&key, &|record| Some(record.clone())).await.unwrap().unwrap();
    assert_eq!(same, before);
    let renamed = |record: &Record| {
        let identity = Identity { user: "bob".to_owned(), ..record.identity.clone() };
        Some(Record { identity, ..record.clone() })
    };
    let refused = world.store.update(&key, &renamed).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "it is in ann's list: {refused:?}");
    let large = world.store.update(&key, &noting("a", &"x".repeat(RECORD_BYTES_MAX))).await;
    assert!(matches!(large, Err(StoreError::TooLarge)), "nobody could read it: {large:?}");
    let stored = world.store.load(&key).await.unwrap().live().unwrap();
    assert_eq!(stored.record, before, "what was refused has changed nothing");
}

async fn a_name_is_claimed_once_until_it_is_released_or_forgotten(world: &World) {
    let name = somebody();
    assert!(world.store.claim(&name, "a", LONG.idle).await.unwrap());
    assert!(!world.other.claim(&name, "b", LONG.idle).await.unwrap(), "it is taken");
    assert!(!world.store.claim(&name, "a", LONG.idle).await.unwrap(), "a message that comes twice is a replay");
    world.other.release(&name, "b").await.unwrap();
    assert!(!world.other.claim(&name, "b", LONG.idle).await.unwrap(), "nobody gives back what another one has");
    world.store.release(&name, "a").await.unwrap();
    world.store.release(&name, "a").await.expect("there may be nothing to give back");
    assert!(world.other.claim(&name, "b", Duration::from_millis(100)).await.unwrap());
    eventually("a claim is forgotten", async || {
        world.passing().await;
        world.store.claim(&name, "a", LONG.idle).await.unwrap().then_some(())
    })
    .await;

    let name = somebody();
    let tasks: Vec<_> = (0..30)
        .map(|n| {
            let store = Arc::clone(if n % 2 == 0 { &world.store } else { &world.other });
            let name = name.clone();
            tokio::spawn(async move { store.claim(&name, &n.to_string(), LONG.idle).await.unwrap() })
        })
        .collect();
    let mut claimed = 0;
    for task in tasks {
        claimed += usize::from(task.await.unwrap());
    }
    assert_eq!(claimed, 1, "of all who come at once one has it");
}

async fn sessions_are_found_by_what_they_are_bound_to(world: &World) {
    let (handle, other) = (somebody(), somebody());
    assert_eq!(world.store.bound(&handle).await.unwrap(), []);
    let (first, second) = (id_of("ann").key(), id_of("bob").key());
    assert_eq!(world.store.bind(&handle, &first, LONG.absolute).await.unwrap(), []);
    assert_eq!(world.other.bind(&handle, &second, LONG.absolute * 2).await.unwrap(), []);
    assert_eq!(world.store.bind(&other, &first, LONG.absolute).await.unwrap(), []);
    assert_eq!(world.store.bind(&handle, &first, LONG.absolute * 3).await.unwrap(), [], "it is there once");
    assert_eq!(world.other.bound(&handle).await.unwrap(), [second.clone(), first.clone()]);
    assert_eq!(world.other.bound(&other).await.unwrap(), [first]);

    let short = somebody();
    world.store.bind(&short, &second, Duration::from_millis(100)).await.unwrap();
    eventually("a binding is forgotten", async || {
        world.passing().await;
        world.store.bound(&short).await.unwrap().is_empty().then_some(())
    })
    .await;

    let crowd = somebody();
    for n in 0..BOUND_MAX as u64 {
        let time = LONG.absolute + Duration::from_secs(n);
        assert_eq!(world.store.bind(&crowd, &id_of("ann").key(), time).await.unwrap(), []);
    }
    let bound = world.store.bound(&crowd).await.unwrap();
    let surplus = world.store.bind(&crowd, &second, LONG.absolute * 4).await.unwrap();
    assert_eq!(surplus, bound[..1], "the one that would have been forgotten first makes room, and is named");
    assert_eq!(world.store.bound(&crowd).await.unwrap().len(), BOUND_MAX);
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

const THREE: Limit = Limit { sessions: 3, when_full: WhenFull::EvictOldest };
const THREE_AND_NO_MORE: Limit = Limit { sessions: 3, when_full: WhenFull::Refuse };

async fn fifty_at_once(world: &World, user: &str, limit: Limit) -> Vec<(SessionKey, Creation)> {
    let tasks = (0..50).map(|n| {
        let store = Arc::clone(if n % 2 == 0 { &world.store } else { &world.other });
        let user = user.to_owned();
        tokio::spawn(async move {
            let key = id_of(&user).key();
            let terms = Terms { limit: Some(limit), ..terms(LONG, None) };
            let creation = store.create(&key, session_of(&user), &terms).await.unwrap();
            (key, creation)
        })
    });
    let mut created = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        created.push(task.await.unwrap());
    }
    created
}

async fn fifty_logins_at_once_leave_exactly_as_many_as_are_allowed(world: &World) {
    let user = somebody();
    let mut displaced = 0;
    let mut live = 0;
    for (key, creation) in fifty_at_once(world, &user, THREE).await {
        let Creation::Begun { displaced: room } = creation else { panic!("nobody is refused") };
        displaced += room;
        live += u32::from(world.lives(&key).await);
    }
    assert_eq!((live, displaced), (3, 47));
    assert_eq!(world.listed(&user).await.len(), 3);

    let user = somebody();
    let created = fifty_at_once(world, &user, THREE_AND_NO_MORE).await;
    let begun: Vec<_> = created.iter().filter(|(_, creation)| *creation != Creation::Full).collect();
    assert_eq!(begun.len(), 3, "the others are refused");
    for (key, creation) in &created {
        assert_eq!(world.lives(key).await, *creation != Creation::Full, "who is told that he is in is in");
    }
}

async fn who_may_have_no_more_is_refused_and_nothing_changes(world: &World) {
    let user = somebody();
    for _ in 0..3 {
        assert_eq!(world.logged_in(&user, THREE_AND_NO_MORE, None).await.1, Creation::Begun { displaced: 0 });
    }
    let before = world.listed(&user).await;
    let (refused, creation) = world.logged_in(&user, THREE_AND_NO_MORE, None).await;
    assert_eq!(creation, Creation::Full);
    assert_eq!(world.ended(&refused).await, None, "it never began");
    assert_eq!(world.listed(&user).await, before);
    // The browser may have come with somebody else's session, in another place.
    let theirs = world.created(&somebody(), LONG).await;
    assert_eq!(world.logged_in(&user, THREE_AND_NO_MORE, Some(&theirs)).await.1, Creation::Full);
    assert!(world.lives(&theirs).await, "who is refused keeps what they came with");
    assert_eq!(world.listed(&user).await, before);

    world.store.destroy(&before[0], Some(&user), Ending::LoggedOut).await.unwrap();
    assert_eq!(world.logged_in(&user, THREE_AND_NO_MORE, None).await.1, Creation::Begun { displaced: 0 });
}

async fn the_oldest_makes_room(world: &World) {
    let user = somebody();
    let mut keys = Vec::new();
    for _ in 0..5 {
        keys.push(world.created_later(&user).await);
    }
    let other = world.created("ann", LONG).await;
    let (newest, creation) = world.logged_in(&user, THREE, None).await;
    assert_eq!(creation, Creation::Begun { displaced: 3 }, "also when the limit came later than the sessions");
    assert_eq!(world.listed(&user).await, [keys[3].clone(), keys[4].clone(), newest]);
    assert!(world.lives(&other).await, "nobody else makes room");
}

async fn who_was_displaced_or_revoked_is_told_why_and_nobody_else(world: &World) {
    let user = somebody();
    let one = Limit { sessions: 1, when_full: WhenFull::EvictOldest };
    let (displaced, _) = world.logged_in(&user, one, None).await;
    let (replaced, _) = world.logged_in(&user, one, None).await;
    let (revoked, _) = world.logged_in(&user, one, Some(&replaced)).await;
    assert!(world.store.destroy(&revoked, None, Ending::Revoked).await.unwrap());
    let (logged_out, _) = world.logged_in(&user, one, None).await;
    assert!(world.store.destroy(&logged_out, Some(&user), Ending::LoggedOut).await.unwrap());

    assert_eq!(world.ended(&displaced).await, Some(Ending::Displaced));
    assert_eq!(world.ended(&revoked).await, Some(Ending::Revoked));
    assert_eq!(world.ended(&replaced).await, Some(Ending::Replaced), "what was under way with it is nobody's logout");
    assert_eq!(world.ended(&logged_out).await, None, "the user knows");
    assert_eq!(world.listed(&user).await, [], "none of them is a session");
}

async fn a_tombstone_is_no_session(world: &World) {
    let user = somebody();
    let key = world.created(&user, LONG).await;
    let ends = world.ends(&key).await;
    assert!(world.store.destroy(&key, None, Ending::Revoked).await.unwrap());
    assert!(!world.store.touch(&key, LONG.idle, ends).await.unwrap());
    assert!(!world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap(), "it has ended before");
    assert_eq!(world.store.destroy_all(&user, None, Ending::Revoked).await.unwrap(), 0);
    assert_eq!(world.ended(&key).await, Some(Ending::Revoked), "and its user is still told why");
    assert_eq!(world.logged_in(&user, THREE, Some(&key)).await.1, Creation::Begun { displaced: 0 });

    // Its user was not named when it ended, so the index may have it: it takes no place.
    let user = somebody();
    for _ in 0..3 {
        let key = world.created(&user, LONG).await;
        world.store.destroy(&key, None, Ending::Revoked).await.unwrap();
    }
    assert_eq!(world.logged_in(&user, THREE_AND_NO_MORE, None).await.1, Creation::Begun { displaced: 0 });
}

async fn a_session_that_is_replaced_leaves_its_place(world: &World) {
    let user = somebody();
    let mut old = world.logged_in(&user, THREE_AND_NO_MORE, None).await.0;
    let others = [
        world.logged_in(&user, THREE_AND_NO_MORE, None).await.0,
        world.logged_in(&user, THREE_AND_NO_MORE, None).await.0,
    ];
    for limit in [THREE, THREE_AND_NO_MORE] {
        let (new, creation) = world.logged_in(&user, limit, Some(&old)).await;
        assert_eq!(creation, Creation::Begun { displaced: 0 }, "who logs in again has no more sessions than before");
        assert!(!world.lives(&old).await && world.lives(&others[0]).await && world.lives(&others[1]).await);
        old = new;
    }
}

async fn who_idled_out_takes_no_place(world: &World) {
    let user = somebody();
    let short = Lifetime { idle: Duration::from_millis(100), ..LONG };
    let keys =
        [world.created(&user, short).await, world.created(&user, short).await, world.created(&user, short).await];
    eventually("they idle out", async || {
        world.passing().await;
        (!world.lives(&keys[0]).await && !world.lives(&keys[1]).await && !world.lives(&keys[2]).await).then_some(())
    })
    .await;
    assert_eq!(world.listed(&user).await, []);
    for _ in 0..3 {
        assert_eq!(world.logged_in(&user, THREE_AND_NO_MORE, None).await.1, Creation::Begun { displaced: 0 });
    }
}

async fn a_list_has_the_live_sessions_of_a_user_the_oldest_first(world: &World) {
    let user = somebody();
    assert_eq!(world.listed(&user).await, []);
    let mut keys = Vec::new();
    for _ in 0..4 {
        keys.push(world.created_later(&user).await);
    }
    world.store.touch(&keys[0], Duration::from_secs(1_200), world.ends(&keys[0]).await).await.unwrap();
    assert!(world.store.destroy(&keys[2], None, Ending::LoggedOut).await.unwrap());
    assert_eq!(world.listed(&user).await, [keys[0].clone(), keys[1].clone(), keys[3].clone()]);

    let listed = &world.store.list(&user).await.unwrap()[0].stored;
    let loaded = world.store.load(&keys[0]).await.unwrap().live().unwrap();
    assert_eq!(listed.record, loaded.record);
    assert!(LONG.idle < listed.time_to_live && listed.time_to_live <= Duration::from_secs(1_200));
}

async fn a_user_with_very_many_sessions_is_listed_and_logged_out_whole(world: &World) {
    const MANY: usize = 1_203;
    let user = somebody();
    let mut keys = HashSet::new();
    for _ in 0..MANY {
        keys.insert(world.created(&user, LONG).await);
    }
    let gone: Vec<_> = keys.iter().take(100).cloned().collect();
    for key in gone {
        world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap();
        keys.remove(&key);
    }
    for _ in 0..2 {
        let listed = world.listed(&user).await;
        assert_eq!(listed.len(), keys.len(), "nobody twice");
        assert_eq!(listed.into_iter().collect::<HashSet<_>>(), keys);
    }
    let kept = keys.iter().next().unwrap().clone();
    let ended = world.store.destroy_all(&user, Some(&kept), Ending::Revoked).await.unwrap();
    assert_eq!(ended, 1_102);
    assert_eq!(world.listed(&user).await, [kept]);
}

async fn all_sessions_of_a_user_end_or_all_but_one(world: &World) {
    let user = somebody();
    let keys = [world.created(&user, LONG).await, world.created(&user, LONG).await, world.created(&user, LONG).await];
    let other = world.created(&somebody(), LONG).await;
    assert_eq!(world.store.destroy_all(&user, Some(&keys[1]), Ending::Revoked).await.unwrap(), 2);
    assert_eq!(world.ended(&keys[0]).await, Some(Ending::Revoked));
    assert!(world.lives(&keys[1]).await, "the one that is kept");
    assert_eq!(world.store.destroy_all(&user, Some(&other), Ending::LoggedOut).await.unwrap(), 1);
    assert_eq!(world.listed(&user).await, []);
    assert_eq!(world.store.destroy_all(&user, None, Ending::Revoked).await.unwrap(), 0, "there is none");
    assert!(world.lives(&other).await, "that of another user");
}

async fn nobody_is_listed_who_never_logged_in(world: &World) {
    let user = somebody();
    let issued = Arc::new(Mutex::new(HashSet::new()));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (store, user, issued) = (Arc::clone(&world.store), user.clone(), Arc::clone(&issued));
            tokio::spawn(async move {
                for _ in 0..20 {
                    let key = id_of(&user).key();
                    issued.lock().unwrap().insert(key.clone());
                    let terms = Terms { limit: Some(THREE), ..terms(LONG, None) };
                    store.create(&key, session_of(&user), &terms).await.unwrap();
                    store.destroy(&key, Some(&user), Ending::LoggedOut).await.unwrap();
                }
            })
        })
        .collect();
    while tasks.iter().any(|task| !task.is_finished()) {
        let listed = world.other.list(&user).await.unwrap();
        assert!(listed.len() <= 3, "never more than are allowed");
        for listed in listed {
            assert!(issued.lock().unwrap().contains(&listed.key) && listed.stored.record.identity.user == user);
        }
        tokio::task::yield_now().await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(world.listed(&user).await, []);
}

async fn no_load_after_a_logout_finds_the_session(world: &World) {
    let user = somebody();
    for ending in [Ending::LoggedOut, Ending::Revoked].into_iter().cycle().take(20) {
        let key = world.created(&user, LONG).await;
        let ends = world.ends(&key).await;
        let has_ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let (store, key, has_ended) = (Arc::clone(&world.store), key.clone(), Arc::clone(&has_ended));
                tokio::spawn(async move {
                    loop {
                        let ended_before = has_ended.load(Ordering::SeqCst);
                        let found = store.load(&key).await.unwrap().live();
                        let touched = store.touch(&key, LONG.idle, ends).await.unwrap();
                        if ended_before {
                            assert!(found.is_none() && !touched, "nobody comes in after a logout");
                            return;
                        }
                        // Memory is always ready, and would let nobody else run.
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(world.store.destroy(&key, Some(&user), ending).await.unwrap());
        has_ended.store(true, Ordering::SeqCst);
        for reader in readers {
            reader.await.unwrap();
        }
    }
}

async fn a_part_is_listed_and_ended(world: &World) {
    let user = somebody();
    let keys = [world.created(&user, LONG).await, world.created(&user, LONG).await];
    let mut listed = Vec::new();
    for part in world.parts_of(&keys[0]) {
        listed.extend(world.store.list_part(part).await.unwrap());
    }
    for key in &keys {
        let found = listed.iter().find(|listed| listed.key == *key).expect("all that live are in their part");
        assert_eq!(found.stored.record.identity.user, user);
    }
    if world.store.parts() == BUCKETS {
        let other = std::iter::repeat_with(somebody).find(|user| id_of(user).key().bucket() != keys[0].bucket());
        let other = world.created(&other.unwrap(), LONG).await;
        assert!(2 <= world.store.destroy_part(keys[0].bucket(), Ending::Revoked).await.unwrap());
        assert!(world.lives(&other).await, "other parts go on");
    } else {
        let mut ended = 0;
        for part in 0..world.store.parts() {
            ended += world.store.destroy_part(part, Ending::Revoked).await.unwrap();
        }
        assert!(2 <= ended);
    }
    for key in &keys {
        assert_eq!(world.ended(key).await, Some(Ending::Revoked));
    }
    assert_eq!(world.listed(&user).await, []);
}

async fn the_total_is_right_when_the_expired_have_been_swept(world: &World) {
    let user = somebody();
    let short = Lifetime { idle: Duration::from_millis(100), ..LONG };
    // What others left behind and has expired is not ours to count.
    for part in 0..world.store.parts() {
        let events = world.store.sweep(part).await.unwrap();
        world.store.forget_events(part, &events).await.unwrap();
    }
    let before = world.store.total().await.unwrap();
    let lasting = world.created(&user, LONG).await;
    let expiring = world.created(&user, short).await;
    let ended = world.created(&user, LONG).await;
    world.store.destroy(&ended, None, Ending::Revoked).await.unwrap();
    assert!([1, 2].contains(&(world.other.total().await.unwrap() - before)), "who has ended does not count");
    eventually("it expires, and is swept", async || {
        world.passing().await;
        world.sweep(&expiring).await;
        (world.store.total().await.unwrap() == before + 1).then_some(())
    })
    .await;
    assert!(world.lives(&lasting).await && !world.lives(&expiring).await);
    world.store.destroy_all(&user, None, Ending::LoggedOut).await.unwrap();
    assert_eq!(world.store.total().await.unwrap(), before);
}

async fn every_end_is_told_once_with_its_reason(world: &World) {
    let user = somebody();
    let short = Lifetime { idle: Duration::from_millis(100), ..LONG };
    let one = Limit { sessions: 1, when_full: WhenFull::EvictOldest };
    let (displaced, _) = world.logged_in(&user, one, None).await;
    let (replaced, _) = world.logged_in(&user, one, None).await;
    let (revoked, _) = world.logged_in(&user, one, Some(&replaced)).await;
    world.store.destroy(&revoked, None, Ending::Revoked).await.unwrap();
    world.store.destroy(&revoked, None, Ending::Revoked).await.unwrap();
    let logged_out = world.created(&user, LONG).await;
    world.store.destroy(&logged_out, Some(&user), Ending::LoggedOut).await.unwrap();
    let all = world.created(&user, LONG).await;
    world.store.destroy_all(&user, None, Ending::Revoked).await.unwrap();
    let expired = world.created(&user, short).await;
    let late = world.created(&user, short).await;
    let outlived = world.created(&user, LONG).await;
    assert!(!world.store.touch(&outlived, LONG.idle, 1).await.unwrap());
    eventually("they expire", async || {
        world.passing().await;
        (!world.lives(&expired).await && !world.lives(&late).await).then_some(())
    })
    .await;
    // Too late: it had ended by itself.
    assert!(!world.store.destroy(&late, Some(&user), Ending::LoggedOut).await.unwrap());

    let expected = [
        (&displaced, Ending::Displaced),
        (&replaced, Ending::Replaced),
        (&revoked, Ending::Revoked),
        (&logged_out, Ending::LoggedOut),
        (&all, Ending::Revoked),
        (&outlived, Ending::Expired),
        (&late, Ending::Expired),
        (&expired, Ending::Expired),
    ];
    let of_user = |events: Vec<EndEvent>| events.into_iter().filter(|event| event.user == user).collect::<Vec<_>>();
    let told = eventually("the sweep has seen all of them", async || {
        world.passing().await;
        let told = of_user(world.sweep(&expired).await);
        (told.len() == expected.len()).then_some(told)
    })
    .await;
    for (key, ending) in expected {
        let of_key: Vec<_> = told.iter().filter(|event| event.session == key.log_hash()).collect();
        assert_eq!(of_key.len(), 1, "{ending:?}: once each");
        assert_eq!(of_key[0].ending, ending);
        assert!(1_500_000_000_000 < of_key[0].at, "when it ended, or was seen to have");
    }
    assert!(told.windows(2).all(|pair| pair[0].at <= pair[1].at), "the oldest first");

    assert_eq!(of_user(world.sweep(&expired).await), told, "whoever died while he told of them tells again");
    world.forget(&expired, &told[..3]).await;
    assert_eq!(of_user(world.sweep(&expired).await), told[3..], "the others are still to be told of");
    world.forget(&expired, &told).await;
    assert_eq!(of_user(world.sweep(&expired).await), []);
}

async fn one_instance_leads_until_its_time_is_over(world: &World) {
    let time = Duration::from_millis(300);
    let long = Duration::from_secs(600);
    eventually("somebody leads", async || {
        world.passing().await;
        world.store.lead("a", time).await.unwrap().then_some(())
    })
    .await;
    assert!(world.store.lead("a", long).await.unwrap(), "who leads goes on");
    assert!(!world.other.lead("b", long).await.unwrap(), "one leads");
    assert!(world.store.lead("a", time).await.unwrap());
    eventually("another leads, when the first does not go on", async || {
        world.passing().await;
        world.other.lead("b", time).await.unwrap().then_some(())
    })
    .await;
}

async fn a_trail_is_bounded_and_goes_with_its_session(world: &World) {
    let seen = |n: u64| Activity {
        at: 1_800_000_000_000 + n,
        address: if n.is_multiple_of(2) { [192, 0, 2, 7].into() } else { [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into() },
        route: format!("/r\u{e9} {n}"),
    };
    let user = somebody();
    let key = world.created(&user, LONG).await;
    assert_eq!(world.store.activity(&key).await.unwrap(), []);
    world.store.add_activity(&key, &[seen(1), seen(2)], 3).await.unwrap();
    world.other.add_activity(&key, &[seen(3)], 3).await.unwrap();
    world.store.add_activity(&key, &[], 3).await.unwrap();
    assert_eq!(world.other.activity(&key).await.unwrap(), [seen(3), seen(2), seen(1)]);
    world.store.add_activity(&key, &[seen(4)], 3).await.unwrap();
    assert_eq!(world.other.activity(&key).await.unwrap(), [seen(4), seen(3), seen(2)], "the latest first");
    world.store.add_activity(&key, &(10..20).map(seen).collect::<Vec<_>>(), 2).await.unwrap();
    assert_eq!(world.other.activity(&key).await.unwrap(), [seen(19), seen(18)]);

    world.store.destroy(&key, None, Ending::Revoked).await.unwrap();
    assert_eq!(world.store.activity(&key).await.unwrap(), []);
    world.store.add_activity(&key, &[seen(20)], 3).await.unwrap();
    assert_eq!(world.store.activity(&key).await.unwrap(), [], "who has ended does nothing any more");

    let short = Lifetime { idle: Duration::from_millis(200), ..LONG };
    let (expiring, touched) = (world.created(&user, short).await, world.created(&user, short).await);
    world.store.add_activity(&expiring, &[seen(1)], 3).await.unwrap();
    world.store.add_activity(&touched, &[seen(1)], 3).await.unwrap();
    let is_touched = world.store.touch(&touched, LONG.idle, u64::MAX / 2_000_000).await.unwrap();
    eventually("it goes with its session", async || {
        world.passing().await;
        let is_gone = world.store.activity(&expiring).await.unwrap().is_empty();
        (is_gone && !world.lives(&expiring).await).then_some(())
    })
    .await;
    if is_touched {
        assert_eq!(world.store.activity(&touched).await.unwrap(), [seen(1)], "and stays with it");
    }
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    keeps_the_whole_contract(World::memory()).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_tcp() {
    let server = RedisServer::start();
    keeps_the_whole_contract(World::redis(&settings(&server.url()))).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_a_unix_socket() {
    let server = RedisServer::start();
    for scheme in ["unix", "redis+unix"] {
        let url = format!("{scheme}://{}", server.socket().display());
        keeps_the_whole_contract(World::redis(&settings(&url))).await;
        let _: () = redis::cmd("FLUSHALL").query(&mut server.client()).unwrap();
    }
}

/// `conf/redis-acl.conf`, and somebody who can change it.
fn least_permissions(more: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/redis-acl.conf");
    let shipped = std::fs::read_to_string(path).unwrap().replace(">PASSWORD", ">s3cr%t");
    format!("user admin on nopass ~* &* +@all\n{}{more}", shipped.trim_end())
}

#[tokio::test]
async fn redis_keeps_the_contract_for_a_user_with_the_least_permissions() {
    let server = RedisServer::with(&least_permissions(""));
    keeps_the_whole_contract(World::redis(&settings(&format!(
        "redis://cloakroom:s3cr%25t@127.0.0.1:{}",
        server.port()
    ))))
    .await;

    let server = RedisServer::with(&least_permissions(" +select"));
    let url = format!("unix://{}?user=cloakroom&pass=s3cr%25t&db=4", server.socket().display());
    keeps_the_contract(World::redis(&settings(&url))).await;
}

#[tokio::test]
async fn no_permission_that_is_asked_for_can_be_spared() {
    let server = RedisServer::with(&least_permissions(""));
    let mut admin = redis::Client::open(format!("redis://admin:x@127.0.0.1:{}", server.port())).unwrap();
    let change = |admin: &mut redis::Client, change: &str| {
        let _: () = redis::cmd("ACL").arg("SETUSER").arg("cloakroom").arg(change).query(admin).unwrap();
        // A server that knows the scripts hides that they cannot be sent.
        let _: () = redis::cmd("SCRIPT").arg("FLUSH").query(admin).unwrap();
    };
    let store = || {
        let settings = settings(&format!("redis://cloakroom:s3cr%25t@127.0.0.1:{}", server.port()));
        RedisStore::new(&settings, WITH_EVENTS()).unwrap()
    };
    let conf = least_permissions("");
    let permissions: Vec<_> = conf.lines().last().unwrap().split(' ').filter(|word| word.starts_with('+')).collect();
    assert!(15 < permissions.len(), "{permissions:?}");
    let denied = |admin: &mut redis::Client| -> usize {
        let denied: Vec<redis::Value> = redis::cmd("ACL").arg("LOG").query(admin).unwrap();
        let _: () = redis::cmd("ACL").arg("LOG").arg("RESET").query(admin).unwrap();
        denied.len()
    };
    let whole = store();
    a_short_life(&whole).await.expect("together they suffice");
    assert_eq!(denied(&mut admin), 0, "nothing else is tried");
    for permission in permissions.into_iter().filter(|permission| *permission != "+client|trackinginfo") {
        change(&mut admin, &permission.replace('+', "-"));
        let life = a_short_life(&store()).await;
        let heartbeat = eventually("a denial", async || (life.is_err() || 0 < denied(&mut admin)).then_some(()));
        tokio::time::timeout(DEADLINE, heartbeat).await.unwrap_or_else(|_| panic!("{permission} is not needed"));
        change(&mut admin, permission);
        // Who was denied makes a new connection first, when it may try again.
        eventually("all is as before", async || a_short_life(&whole).await.ok()).await;
    }
}

/// Whether a copy of a session is kept: as soon as the first heartbeat has been answered, a few reads later.
async fn is_kept(store: &RedisStore, key: &SessionKey) -> Result<bool, StoreError> {
    for _ in 0..1_000 {
        if store.recall(key).is_some() {
            return Ok(true);
        }
        store.load(key).await?;
        // The pace of a user.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(false)
}

/// Something of everything that a store does.
async fn a_short_life(store: &RedisStore) -> Result<(), StoreError> {
    fn must(is_so: bool) -> Result<(), StoreError> {
        is_so.then_some(()).ok_or(StoreError::Unreadable)
    }
    let user = somebody();
    let key = id_of(&user).key();
    store.create(&key, session_of(&user), &terms(LONG, None)).await?;
    let stored = store.load(&key).await?.live().ok_or(StoreError::Unreadable)?;
    must(is_kept(store, &key).await?)?;
    must(store.touch(&key, Duration::from_secs(1_200), stored.record.ends).await?)?;
    must(LONG.idle < store.load(&key).await?.live().ok_or(StoreError::Unreadable)?.time_to_live)?;
    must(store.update(&key, &noting("a", "1")).await?.is_some())?;
    let seen = Activity { at: 1, address: [192, 0, 2, 7].into(), route: "/".to_owned() };
    store.add_activity(&key, &[seen.clone(), seen], 1).await?;
    must(store.activity(&key).await?.len() == 1)?;
    let newer = id_of(&user).key();
    let one = Limit { sessions: 1, when_full: WhenFull::EvictOldest };
    store.create(&newer, session_of(&user), &Terms { limit: Some(one), ..terms(LONG, None) }).await?;
    must(matches!(store.load(&key).await?, Found::Ended(Ending::Displaced)))?;
    must(store.list(&user).await?.len() == 1)?;
    must(store.destroy(&newer, None, Ending::LoggedOut).await?)?;
    must(store.load(&newer).await?.live().is_none())?;
    let events = store.sweep(key.bucket()).await?;
    must(2 <= events.len())?;
    store.forget_events(key.bucket(), &events).await?;
    must(store.sweep(key.bucket()).await?.is_empty())?;
    must(store.lead("instance", LONG.idle).await?)?;
    must(store.claim(&user, "a", LONG.idle).await?)?;
    store.release(&user, "a").await?;
    store.bind(&user, &key, LONG.idle).await?;
    must(store.bound(&user).await? == [key.clone()])?;
    store.increment(&user, LONG.idle).await?;
    store.decrement(&user).await?;
    must(store.count(&user).await? == 0)?;
    store.reset(&user).await?;
    store.ping().await
}

#[tokio::test]
async fn redis_keeps_the_contract_with_a_password_alone() {
    let server = RedisServer::with("requirepass s3cret");
    let url = format!("redis://:s3cret@127.0.0.1:{}", server.port());
    keeps_the_whole_contract(World::redis(&settings(&url))).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_tls() {
    // Another test may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = RedisServer::with_tls();
    let trusting =
        model::RedisStore { ca: Some(Spanned::new(0..0, server.authority())), ..settings(&server.tls_url()) };
    keeps_the_whole_contract(World::redis(&trusting)).await;

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
async fn redis_keeps_the_contract_for_those_who_show_a_certificate() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = RedisServer::with_mutual_tls();
    let (cert, key) = server.client_certificate();
    let stranger =
        model::RedisStore { ca: Some(Spanned::new(0..0, server.authority())), ..settings(&server.tls_url()) };
    let refused = RedisStore::new(&stranger, StoreOptions::default()).unwrap().ping().await;
    assert!(refused.is_err(), "who shows none is not let in");
    let known = model::RedisStore {
        ca: Some(Spanned::new(0..0, server.authority())),
        cert: Some(Spanned::new(0..0, cert)),
        key: Some(Spanned::new(0..0, key)),
        ..settings(&server.tls_url())
    };
    keeps_the_whole_contract(World::redis(&known)).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_without_copies() {
    let server = RedisServer::start();
    let without = model::RedisStore { cache: model::Cache::Off, ..settings(&server.url()) };
    keeps_the_whole_contract(World::redis(&without)).await;
}

#[tokio::test]
async fn valkey_keeps_the_contract() {
    let server = RedisServer::valkey();
    keeps_the_whole_contract(World::redis(&settings(&server.url()))).await;
}

#[tokio::test]
async fn sentinels_and_their_servers_keep_the_contract() {
    let world = Sentinels::start();
    keeps_the_whole_contract(World::redis(&settings(&world.url()))).await;
}

#[tokio::test]
async fn a_cluster_keeps_the_contract() {
    let world = Cluster::start();
    keeps_the_whole_contract(World::redis(&settings(&world.url()))).await;
}

#[tokio::test]
async fn a_cluster_keeps_the_contract_for_a_user_with_the_least_permissions() {
    // The nodes of the test's Cluster know each other without a password: the default user stays.
    let conf = least_permissions(" +cluster|slots +cluster|info +asking").replace("user default off\n", "");
    let world = Cluster::with(&conf);
    let url = world.url().replace("redis+cluster://", "redis+cluster://cloakroom:s3cr%25t@");
    keeps_the_whole_contract(World::redis(&settings(&url))).await;
    for node in &world.nodes {
        let denied: Vec<redis::Value> = node.ask("ACL LOG");
        assert!(denied.is_empty(), "nothing else is tried: {denied:?}");
    }
}

#[tokio::test]
async fn nothing_happens_to_half_of_a_bucket_whose_slot_is_moving() {
    let world = Cluster::start();
    let stores = World::redis(&settings(&world.url()));
    let user = somebody();
    let keys = [stores.created(&user, LONG).await, stores.created(&user, LONG).await];
    // Everything that a script names is there, so that nothing but the rule keeps it from running.
    stores.store.destroy(&stores.created(&user, LONG).await, Some(&user), Ending::LoggedOut).await.unwrap();
    let name = keys[0].to_store_key(PREFIX);
    let (slot, from) = (world.slot_of(&name), world.owner_of(&name));
    let migration = world.begin_migration(slot, (from + 1) % 3);
    migration.move_key(&name);
    for what in ["begun", "half"] {
        let ended = stores.store.destroy_all(&user, None, Ending::Revoked).await;
        assert!(matches!(ended, Err(StoreError::Unavailable(_))), "{what}: not now, rather than no: {ended:?}");
        let limit = Limit { sessions: 1, when_full: WhenFull::EvictOldest };
        let refused = stores
            .store
            .create(&id_of(&user).key(), session_of(&user), &Terms { limit: Some(limit), ..terms(LONG, None) })
            .await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{what}: {refused:?}");
        assert!(stores.lives(&keys[0]).await && stores.lives(&keys[1]).await, "{what}: who is in stays in");
        if what == "begun" {
            migration.move_key(&keys[1].to_store_key(PREFIX));
        }
    }
    migration.move_all();
    migration.finish();
    eventually("the slot has moved", async || {
        (stores.store.destroy_all(&user, Some(&keys[0]), Ending::Revoked).await.ok()? == 1).then_some(())
    })
    .await;
    assert_eq!(stores.listed(&user).await, [keys[0].clone()]);
}

#[tokio::test]
async fn what_redis_holds_cannot_make_a_cookie_and_goes_by_itself() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let ids: Vec<_> = (0..20).map(|n| (id_of(&format!("user{n}")), format!("user{n}"))).collect();
    let seen = [Activity { at: 1, address: [192, 0, 2, 7].into(), route: "/".to_owned() }];
    for (id, user) in &ids {
        world.store.create(&id.key(), session_of(user), &terms(LONG, None)).await.unwrap();
        world.store.add_activity(&id.key(), &seen, 5).await.unwrap();
    }
    world.store.destroy(&ids[0].0.key(), None, Ending::Revoked).await.unwrap();
    world.store.increment("account:hunter2", LONG.idle).await.unwrap();
    world.store.lead("instance", LONG.idle).await.unwrap();
    world.store.claim("jti hunter2", "a", LONG.idle).await.unwrap();
    world.store.bind("sub hunter2", &ids[1].0.key(), LONG.idle).await.unwrap();

    let mut client = server.client();
    let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut client).unwrap();
    assert!(20 * 4 + 5 <= names.len(), "{}", names.len());
    let mut held = names.concat();
    for name in &names {
        assert!(name.starts_with(PREFIX.as_bytes()), "all of ours is under the prefix");
        let time_to_live: i64 = redis::cmd("PTTL").arg(name).query(&mut client).unwrap();
        assert!(0 < time_to_live, "nothing stays for ever: {}", String::from_utf8_lossy(name));
        held.extend(redis::cmd("DUMP").arg(name).query::<Vec<u8>>(&mut client).unwrap());
    }
    let holds = |part: &[u8]| held.windows(part.len()).any(|window| window == part);
    assert!(holds(b"Browser/1"), "the search must find what is there");
    for (id, _) in &ids {
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
    let others = [world.created("ann", LONG).await, world.created("ann", LONG).await, world.created("ann", LONG).await];
    let _: () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).query(&mut server.client()).unwrap();
    let refused = world.store.create(&id_of("ann").key(), session_of("ann"), &terms(LONG, Some(&key))).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert_eq!(world.user(&key).await.as_deref(), Some("ann"), "a login that failed ends nothing");
    assert!(world.store.touch(&key, Duration::from_secs(1_200), world.ends(&key).await).await.unwrap());
    assert!(LONG.idle < world.time_to_live(&key).await, "who is in stays in");
    assert_eq!(world.listed("ann").await.len(), 4);
    assert!(world.store.destroy(&others[0], Some("ann"), Ending::Revoked).await.unwrap());
    assert_eq!(world.ended(&others[0]).await, Some(Ending::Revoked), "there is always room to say why");
    assert_eq!(world.store.destroy_all("ann", Some(&key), Ending::Revoked).await.unwrap(), 2);
    assert!(world.store.lead("instance", LONG.idle).await.unwrap());
    assert_eq!(world.sweep(&key).await.len(), 3);
    assert!(world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap(), "a logout works always");
}

#[tokio::test]
async fn a_server_that_has_forgotten_the_scripts_is_told_again() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let key = world.created("ann", LONG).await;
    let _: () = redis::cmd("SCRIPT").arg("FLUSH").query(&mut server.client()).unwrap();
    assert!(world.store.destroy(&key, Some("ann"), Ending::LoggedOut).await.unwrap());
    let _: () = redis::cmd("SCRIPT").arg("FLUSH").query(&mut server.client()).unwrap();
    assert!(world.lives(&world.created("ann", LONG).await).await);
}

#[tokio::test]
async fn sessions_that_are_gone_do_not_pile_up_in_an_index_without_a_limit() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let mut client = server.client();
    for _ in 0..50 {
        let key = world.created("ann", LONG).await;
        // Its user is not named, as with a cookie of somebody who is unknown by now.
        world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap();
    }
    let index: Vec<String> = redis::cmd("KEYS").arg("cloakroom:u:*").query(&mut client).unwrap();
    let members: usize = redis::cmd("ZCARD").arg(&index[0]).query(&mut client).unwrap();
    assert!(members <= 2, "{members} are left of fifty");
}

#[tokio::test]
async fn ends_that_nobody_asks_for_are_forgotten_in_the_end_and_counted() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let key = world.created("ann", LONG).await;
    let name = format!("cloakroom:e:{{{}}}", bucket_text(key.bucket()));
    let mut filling = redis::cmd("RPUSH");
    filling.arg(&name);
    let member = key.member();
    for n in 0..10_000 {
        filling.arg(format!("logged_out {} {member} old", 1_700_000_000_000_u64 + n));
    }
    let mut client = server.client();
    let _: () = filling.query(&mut client).unwrap();
    world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap();
    let length: usize = redis::cmd("LLEN").arg(&name).query(&mut client).unwrap();
    assert_eq!(length, 10_000);
    let last: Vec<String> = redis::cmd("LRANGE").arg(&name).arg(-1).arg(-1).query(&mut client).unwrap();
    assert!(last[0].ends_with(" ann"), "the latest stays: {last:?}");

    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    let logging = tracing::subscriber::set_default(subscriber);
    let first = world.sweep(&key).await;
    assert_eq!(first[0].at, 1_700_000_000_001, "the oldest made room");
    assert!((1..10_000).contains(&first.len()), "not all in one answer");
    world.forget(&key, &first).await;
    assert_eq!(world.sweep(&key).await[0].at, first.last().unwrap().at + 1, "the next ones");
    drop(logging);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.matches("lost=1").count(), 1, "said once: {text}");
}

#[tokio::test]
async fn what_is_no_end_in_the_outbox_holds_nothing_up() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let key = world.created("ann", LONG).await;
    let name = format!("cloakroom:e:{{{}}}", bucket_text(key.bucket()));
    let mut client = server.client();
    let _: () = redis::cmd("RPUSH").arg(&name).arg("").arg("tired 1 x y").arg(b"\xff").query(&mut client).unwrap();
    world.store.destroy(&key, None, Ending::LoggedOut).await.unwrap();
    let events = world.sweep(&key).await;
    assert_eq!(events.len(), 1);
    let length: usize = redis::cmd("LLEN").arg(&name).query(&mut client).unwrap();
    assert_eq!(length, 1, "and is gone");
}

#[tokio::test]
async fn without_anybody_to_tell_ends_are_not_collected() {
    let server = RedisServer::start();
    let store = RedisStore::new(&settings(&server.url()), StoreOptions::default()).unwrap();
    let key = id_of("ann").key();
    store.create(&key, session_of("ann"), &terms(LONG, None)).await.unwrap();
    store.destroy(&key, Some("ann"), Ending::Revoked).await.unwrap();
    assert_eq!(store.sweep(key.bucket()).await.unwrap(), []);
    let names: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut server.client()).unwrap();
    assert_eq!(names, [key.to_store_key(PREFIX)], "nothing is left but why it ended");
}

#[tokio::test]
async fn a_session_of_before_there_was_a_registry_counts_from_its_next_use_on() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let key = world.created("ann", LONG).await;
    let name = format!("cloakroom:x:{{{}}}", bucket_text(key.bucket()));
    let _: () = redis::cmd("DEL").arg(&name).query(&mut server.client()).unwrap();
    assert_eq!(world.store.total().await.unwrap(), 0);
    assert!(world.store.touch(&key, LONG.idle, world.ends(&key).await).await.unwrap());
    assert_eq!(world.store.total().await.unwrap(), 1);
    assert_eq!(world.store.list_part(key.bucket()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_strict_logout_is_answered_when_no_copy_can_be_left() {
    let server = RedisServer::start();
    let lease = Duration::from_millis(300);
    let strict = model::RedisStore {
        logout: model::Logout::Strict,
        lease: Spanned::new(0..0, cloakroom::config::value::Duration::from_millis(300)),
        ..settings(&server.url())
    };
    let world = World::redis(&strict);
    let key = world.created("ann", LONG).await;
    let started = std::time::Instant::now();
    assert!(world.store.destroy(&key, Some("ann"), Ending::LoggedOut).await.unwrap());
    assert!(lease <= started.elapsed(), "a copy may be used for as long as its lease");
    let key = world.created("ann", LONG).await;
    let started = std::time::Instant::now();
    assert_eq!(world.store.destroy_all("ann", None, Ending::Revoked).await.unwrap(), 1);
    assert!(lease <= started.elapsed());
    assert!(!world.lives(&key).await);
}

#[tokio::test]
async fn an_id_that_was_made_for_another_user_begins_no_session() {
    let server = RedisServer::start();
    let world = World::redis(&settings(&server.url()));
    let key = id_of("ann").key();
    let refused = world.store.create(&key, session_of("bob"), &terms(LONG, None)).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "bob's sessions are looked for elsewhere: {refused:?}");
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
