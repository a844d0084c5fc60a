//! Sentinels replace the primary, and nobody is logged out: the store follows, and never to a server that is none.

use std::sync::Arc;
use std::time::Instant;

use cloakroom::config::model;
use cloakroom::config::value::Duration as ConfigDuration;
use cloakroom::session::id::SessionKey;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{Ending, SessionStore, StoreError, StoreOptions};

use crate::harness::eventually;
use crate::harness::redis::RedisServer;
use crate::harness::redis::sentinels::Sentinels;
use crate::store_contract::{LONG, id_of, session_of, settings, terms};
use crate::store_redis_faults::{Traffic, create, load, until_down};

fn store(world: &Sentinels) -> Arc<RedisStore> {
    let settings = model::RedisStore {
        connect_timeout: ConfigDuration::from_millis(500),
        response_timeout: ConfigDuration::from_millis(300),
        ..settings(&world.url())
    };
    Arc::new(RedisStore::new(&settings, StoreOptions::default()).unwrap())
}

/// Somebody logs in, and all replicas know it.
async fn known_to_all(world: &Sentinels, store: &RedisStore, user: &str) -> SessionKey {
    let key = create(store, user).await;
    let primary = world.named_primary().expect("there is one");
    world.servers[primary].ask_with_replicas("SET test:synced 1", 2);
    key
}

/// The time from the promotion, as the test sees it, to the first answer.
async fn until_followed(world: &Sentinels, store: &RedisStore, key: &SessionKey, lost: usize) {
    let asked = async {
        eventually("the store follows", async || match load(store, key).await {
            Ok(user) => {
                assert_eq!(user.as_deref(), Some("ann"), "still logged in");
                Some(Instant::now())
            }
            Err(_) => None,
        })
        .await
    };
    let promoted = async {
        eventually("another server is promoted", async || {
            let other = world.primaries().into_iter().find(|number| *number != lost);
            other.map(|_| Instant::now())
        })
        .await
    };
    let (followed, promoted) = tokio::join!(asked, promoted);
    tell_delay(promoted, followed);
}

#[expect(clippy::print_stdout, reason = "a figure for the book, with --nocapture")]
pub(crate) fn tell_delay(promoted: Instant, followed: Instant) {
    println!("followed {} ms after the promotion", followed.saturating_duration_since(promoted).as_millis());
}

#[tokio::test]
async fn a_killed_primary_is_replaced_under_traffic_and_nobody_is_logged_out() {
    let mut world = Sentinels::start();
    let store = store(&world);
    let key = known_to_all(&world, &store, "ann").await;
    let traffic = Traffic::on(&store).await;
    for _ in 0..2 {
        traffic.flows().await;
        let lost = world.until_settled();
        world.servers[lost].kill();
        until_followed(&world, &store, &key, lost).await;
        let bob = create(&store, "bob").await;
        assert_eq!(load(&store, &bob).await.unwrap().as_deref(), Some("bob"), "logins work again");
        traffic.flows().await;
        world.servers[lost].restart();
        world.hurry();
        world.until_settled();
    }
    assert!(0 < traffic.stop().await);
}

#[tokio::test]
async fn a_frozen_primary_is_replaced_and_is_not_believed_when_it_wakes_up() {
    let world = Sentinels::start();
    let store = store(&world);
    let key = known_to_all(&world, &store, "ann").await;
    let lost = world.until_settled();
    world.servers[lost].pause();
    until_followed(&world, &store, &key, lost).await;
    assert!(store.destroy(&key, None, Ending::LoggedOut).await.unwrap());

    world.servers[lost].resume();
    world.until_settled();
    for _ in 0..20 {
        let found = eventually("the store answers", async || load(&store, &key).await.ok()).await;
        assert_eq!(found, None, "a logout is not undone by a server that slept through it");
    }
}

#[tokio::test]
async fn an_isolated_primary_is_left_alone() {
    let world = Sentinels::that_can_be_parted("min-replicas-to-write 1\nmin-replicas-max-lag 1");
    let store = store(&world);
    let key = known_to_all(&world, &store, "ann").await;
    let lost = world.until_settled();
    world.isolate(lost);
    eventually("the new primary takes the logout", async || {
        let elsewhere = world.primaries().into_iter().any(|number| number != lost);
        (elsewhere && store.destroy(&key, None, Ending::LoggedOut).await.is_ok()).then_some(())
    })
    .await;
    assert_eq!(load(&store, &key).await.unwrap(), None);
    assert!(world.primaries().contains(&lost), "the isolated one still thinks that it is one");
}

#[tokio::test]
async fn a_sentinel_or_two_may_be_gone() {
    let mut world = Sentinels::start();
    world.sentinels[0].kill();
    world.sentinels[1].pause();
    let store = store(&world);
    let key = create(&store, "ann").await;
    assert_eq!(load(&store, &key).await.unwrap().as_deref(), Some("ann"));
    world.sentinels[2].kill();
    for _ in 0..100 {
        assert_eq!(load(&store, &key).await.unwrap().as_deref(), Some("ann"), "who is connected needs no sentinel");
    }
    drop(store);

    let late = self::store(&world);
    until_down(&late, &key).await;
    world.sentinels[0].restart();
    world.sentinels[1].resume();
    let found = eventually("the store is found", async || load(&late, &key).await.ok()).await;
    assert_eq!(found.as_deref(), Some("ann"));
}

#[tokio::test]
async fn an_unknown_name_is_said() {
    let world = Sentinels::start();
    let url = world.url().replace("/mymaster", "/other");
    let store = RedisStore::new(&settings(&url), StoreOptions::default()).unwrap();
    let refused = store.create(&id_of("ann").key(), session_of("ann"), &terms(LONG, None)).await.unwrap_err();
    let StoreError::Unavailable(cause) = refused else { panic!("{refused:?}") };
    assert!(cause.to_string().contains("\"other\"") || cause.to_string().contains("No such master"), "{cause}");
}

#[tokio::test]
async fn with_the_shipped_settings_a_sentinel_leads_to_its_primary() {
    let server = RedisServer::start();
    let shipped = include_str!("../../conf/sentinel.conf");
    assert!(shipped.contains("sentinel monitor sessions 127.0.0.1 6379 2") && shipped.contains("port 26379"));
    let here = shipped.replace("127.0.0.1 6379 2", &format!("127.0.0.1 {} 1", server.port())).replace("port 26379", "");
    let sentinel = RedisServer::sentinel(&here);
    let url = format!("redis+sentinel://127.0.0.1:{}/sessions", sentinel.port());
    let store = RedisStore::new(&settings(&url), StoreOptions::default()).unwrap();
    let key = create(&store, "ann").await;
    assert_eq!(load(&store, &key).await.unwrap().as_deref(), Some("ann"));
}
