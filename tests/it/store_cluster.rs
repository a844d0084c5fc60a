//! Slots move and primaries die, and nobody is logged out: the store finds every session, and one dead node stops nobody
//! else.

use std::sync::Arc;
use std::time::Instant;

use cloakroom::config::model;
use cloakroom::config::value::Duration as ConfigDuration;
use cloakroom::session::id::SessionKey;
use cloakroom::session::store::redis::RedisStore;
use cloakroom::session::store::{Ending, SessionStore, StoreError, StoreOptions};

use crate::harness::eventually;
use crate::harness::redis::cluster::Cluster;
use crate::store_contract::{LONG, PREFIX, id_of, session_of, settings, terms};
use crate::store_redis_faults::{create, load};
use crate::store_sentinel::tell_delay;

fn store(world: &Cluster) -> Arc<RedisStore> {
    let settings = model::RedisStore {
        connect_timeout: ConfigDuration::from_millis(500),
        response_timeout: ConfigDuration::from_millis(300),
        ..settings(&world.url())
    };
    Arc::new(RedisStore::new(&settings, StoreOptions::default()).unwrap())
}

/// Users enough that every primary has some.
async fn many(store: &RedisStore) -> Vec<(String, SessionKey)> {
    let mut sessions = Vec::new();
    for number in 0..30 {
        let user = format!("user{number}");
        let key = create(store, &user).await;
        sessions.push((user, key));
    }
    sessions
}

async fn assert_all_live(store: &RedisStore, sessions: &[(String, SessionKey)]) {
    for (user, key) in sessions {
        let found = eventually("a session is found", async || load(store, key).await.ok()).await;
        assert_eq!(found.as_ref(), Some(user), "still logged in");
    }
}

#[tokio::test]
async fn sessions_are_on_all_primaries_and_found_wherever_one_begins_to_ask() {
    let world = Cluster::start();
    let sessions = many(&store(&world)).await;
    for node in &world.nodes {
        let settings = settings(&format!("redis+cluster://127.0.0.1:{}", node.port()));
        let store = RedisStore::new(&settings, StoreOptions::default()).unwrap();
        assert_all_live(&store, &sessions).await;
    }
    let owners: std::collections::HashSet<_> =
        sessions.iter().map(|(_, key)| world.owner_of(&key.to_store_key(PREFIX))).collect();
    assert_eq!(owners.len(), 3, "all have some");
}

#[tokio::test]
async fn a_slot_on_its_way_and_a_slot_that_has_gone_lose_nobody() {
    let world = Cluster::start();
    let store = store(&world);
    let sessions = many(&store).await;
    let (user, key) = &sessions[0];
    let name = key.to_store_key(PREFIX);
    let slot = world.slot_of(&name);
    let from = world.owner_of_slot(slot).unwrap();
    let to = (0..3).find(|number| *number != from).unwrap();

    let migration = world.begin_migration(slot, to);
    for key_name in migration.keys() {
        migration.move_key(&key_name);
        let found = eventually("it is found", async || load(&store, key).await.ok()).await;
        assert_eq!(found.as_ref(), Some(user), "ASK is followed");
    }
    // What touches several keys of a slot must wait until they are together again: not now, and never by half.
    let half = store.create(&id_of(user).key(), session_of(user), &terms(LONG, None)).await;
    assert!(matches!(half, Err(StoreError::Unavailable(_))), "{half:?}");
    assert_eq!(load(&store, key).await.unwrap().as_ref(), Some(user));
    migration.move_all();
    migration.finish();
    assert_eq!(world.owner_of(&name), to);
    assert_all_live(&store, &sessions).await;
    let again = create(&store, user).await;
    assert!(store.destroy(&again, Some(user), Ending::LoggedOut).await.unwrap(), "MOVED is followed");
    assert_eq!(load(&store, &again).await.unwrap(), None);
    assert_eq!(load(&store, key).await.unwrap().as_ref(), Some(user));
}

#[tokio::test]
async fn a_primary_that_hands_over_is_followed_at_once() {
    let world = Cluster::start();
    let store = store(&world);
    let sessions = many(&store).await;
    world.until_settled();
    for primary in 0..3 {
        world.hand_over(primary);
        assert_all_live(&store, &sessions).await;
    }
}

#[tokio::test]
async fn a_killed_primary_stops_only_its_own_users_until_its_replica_takes_over() {
    let mut world = Cluster::start();
    let store = store(&world);
    let sessions = many(&store).await;
    world.until_settled();
    let (_, lost_key) = &sessions[0];
    let name = lost_key.to_store_key(PREFIX);
    let lost = world.owner_of(&name);
    let (mut theirs, mut others) = (Vec::new(), Vec::new());
    for (user, key) in &sessions {
        let owner = world.owner_of(&key.to_store_key(PREFIX));
        if owner == lost { theirs.push((user.clone(), key.clone())) } else { others.push((user.clone(), key.clone())) }
    }
    assert!(!others.is_empty());
    let slot = world.slot_of(&name);
    world.nodes[lost].kill();
    let followed = async {
        eventually("the replica is followed", async || {
            for (user, key) in &others {
                match load(&store, key).await {
                    Ok(found) => assert_eq!(found.as_ref(), Some(user)),
                    Err(error) => panic!("{user} is on another primary: {error:?}"),
                }
            }
            load(&store, lost_key).await.ok().map(|found| (found, Instant::now()))
        })
        .await
    };
    let promoted = async {
        eventually("the replica takes over", async || {
            (world.owner_of_slot(slot).is_some_and(|owner| owner != lost)).then(Instant::now)
        })
        .await
    };
    let ((found, followed), promoted) = tokio::join!(followed, promoted);
    tell_delay(promoted, followed);
    assert_eq!(found.as_deref(), Some("user0"), "still logged in");
    assert_all_live(&store, &theirs).await;
    let again = create(&store, "user0").await;
    assert_eq!(load(&store, &again).await.unwrap().as_deref(), Some("user0"));
}

#[tokio::test]
async fn a_frozen_primary_is_left_when_its_replica_takes_over() {
    let world = Cluster::start();
    let store = store(&world);
    let sessions = many(&store).await;
    world.until_settled();
    let (user, key) = &sessions[0];
    let lost = world.owner_of(&key.to_store_key(PREFIX));
    world.nodes[lost].pause();
    let found = eventually("the replica is followed", async || load(&store, key).await.ok()).await;
    assert_eq!(found.as_ref(), Some(user));
    assert!(store.destroy(key, Some(user), Ending::LoggedOut).await.unwrap());
    world.nodes[lost].resume();
    world.until_settled();
    for _ in 0..20 {
        let found = eventually("the store answers", async || load(&store, key).await.ok()).await;
        assert_eq!(found, None, "a logout is not undone by a server that slept through it");
    }
}

#[tokio::test]
async fn a_cluster_that_is_not_there_is_unavailable() {
    let mut world = Cluster::start();
    let store = store(&world);
    let key = create(&store, "ann").await;
    for node in &mut world.nodes {
        node.kill();
    }
    eventually("it is seen to be down", async || match load(&store, &key).await {
        Err(StoreError::Unavailable(_)) => Some(()),
        Err(error) => panic!("being down is no refusal: {error:?}"),
        Ok(found) => {
            assert!(found.is_some(), "a store that goes down logs nobody out");
            None
        }
    })
    .await;
    assert!(store.is_down(&key));
}
