//! Sessions in Redis (or Valkey), shared by all instances of Cloakroom: the contract, told in commands.
//!
//! A read is plain commands, and whatever must happen in one step is a script. Under which names: see `keys`; how
//! commands get there: see `link`. What ends sessions in their user's list and in the registry of all is always the
//! same step that ends the session, for all of it is in one bucket and a bucket is in one slot.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::{Cmd, Value};
use tokio::task::JoinSet;

mod settings;
mod keys;
mod scripts;
mod link;
mod topology;
mod supervise;
mod dial;
mod read;
mod failure;
mod inspect;

pub use settings::SettingsError;

use super::{
    Activity, BOUND_MAX, Change, Count, Creation, EndEvent, Ending, Found, Listed, NewSession, Risk, SessionStore,
    StoreError, StoreOptions, Stored, Terms, changed, millis,
};
use crate::config::model::{self, Cache, Logout, WhenFull};
use crate::session::cache::{LeaseCache, Touched};
use crate::session::id::{BUCKETS, SessionKey, UserKey};
use crate::session::record::{Codec, LoginMethod, Record};
use failure::store_error;
use keys::Keys;
use link::{Batch, Links, Place, bucket_slot, key_slot};
use read::read_through;
use scripts::{Call, Durably, Script};

/// Sessions and counters under one prefix of one Redis.
pub struct RedisStore {
    links: Arc<Links>,
    keys: Arc<Keys>,
    options: StoreOptions,
    /// Copies that one instance keeps.
    copies_max: usize,
    logout: Logout,
    /// With [`Logout::Strict`]: after so long no instance has a copy.
    lease: Duration,
    /// With [`Logout::Durable`].
    durably: Durably,
    /// Who changes a record, among those of this process: else each would go round again for each of the others.
    turns: Box<[tokio::sync::Mutex<()>; TURNS]>,
}

/// What one script looks at, so that nobody waits long behind it: about a millisecond of the server's time.
const PAGE: u64 = 500;

/// As [`PAGE`], where whole records are read: everybody's requests wait behind them on the same connection.
const RECORDS_PAGE: u64 = 32;
/// Questions under way at once where all buckets are asked.
const ASKED_AT_ONCE: u16 = 64;
/// So many sessions can be changed at a time.
const TURNS: usize = 256;
/// Whoever waits longer to change a session does not get his turn.
const TURN_MAX: Duration = Duration::from_secs(5);
/// Of several instances that change the same session at the same time, one succeeds in each round.
const UPDATES_MAX: usize = 100;
/// What a tombstone begins with; the version of a record is never 0.
const TOMBSTONE: u8 = 0;

impl RedisStore {
    /// Checks the settings; connects to nothing and needs no runtime.
    pub fn new(settings: &model::RedisStore, options: StoreOptions) -> Result<Self, SettingsError> {
        let prefix = settings.prefix.get_ref().clone();
        settings::check_prefix(&prefix)?;
        Ok(Self {
            links: Arc::new(Links::new(settings, options.bridged)?),
            keys: Arc::new(Keys { prefix }),
            options,
            copies_max: match settings.cache {
                Cache::Coherent => settings.cache_sessions_max,
                Cache::Off => 0,
            },
            logout: settings.logout,
            lease: settings.lease.get_ref().get(),
            durably: Durably { replicas: settings.logout_replicas, time: settings.logout_timeout.get() },
            turns: Box::new(std::array::from_fn(|_| tokio::sync::Mutex::default())),
        })
    }

    /// Host and port or the socket's path: what may be shown.
    pub fn address(&self) -> String {
        self.links.address()
    }
}

#[async_trait]
impl SessionStore for RedisStore {
    fn kept(&self) -> usize {
        self.links.kept()
    }

    fn recall(&self, key: &SessionKey) -> Option<Stored> {
        self.search(key, |copies| copies.get(key))
    }

    fn recall_within(&self, grace: Duration, key: &SessionKey) -> Option<Stored> {
        self.search(key, |copies| copies.get_within(key, grace))
    }

    fn is_down(&self, key: &SessionKey) -> bool {
        self.links.is_down(bucket_slot(key.bucket()))
    }

    fn doubts(&self, key: &SessionKey) -> bool {
        self.search(key, |copies| copies.doubts(key).then_some(())).is_some()
    }

    async fn load(&self, key: &SessionKey) -> Result<Found, StoreError> {
        let (links, codec, of) = (Arc::clone(&self.links), self.options.codec.clone(), key.clone());
        let decode = move |replies| found(replies, &of, &codec, &links);
        read_through(&self.links, key, self.keys.session(key), decode).await
    }

    async fn load_now(&self, key: &SessionKey) -> Result<Found, StoreError> {
        let decode = |replies| found(replies, key, &self.options.codec, &self.links);
        read::read_now(&self.links, key, self.keys.session(key), decode).await
    }

    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        let user = session.identity.user.clone();
        // Nobody wants to know that nobody left.
        let is_told = self.options.events && session.method != LoginMethod::Anonymous;
        let index = UserKey::of(&user);
        if index.bucket() != key.bucket() {
            return Err(StoreError::Refused("the id was not made for this user".into()));
        }
        if let Some(old) = &terms.replaces {
            self.forget(old);
        }
        let (replaced, elsewhere) = match &terms.replaces {
            Some(old) if old.bucket() == key.bucket() => (old.member(), None),
            old => (String::new(), old.as_ref()),
        };
        let record = session.into_record(self.now(key.bucket()).await?, terms.lifetime);
        let bytes = self.options.codec.encode(&record, key)?;
        let (limit, when_full) = match terms.limit {
            None => (0, WhenFull::EvictOldest),
            Some(limit) => (limit.sessions.max(1), limit.when_full),
        };
        let creating = self
            .on_bucket(&scripts::CREATE, key.bucket(), Some(self.keys.index(&index)))
            .with(key.member())
            .with(bytes)
            .with_number(millis(terms.lifetime.idle))
            .with_number(record.ends)
            .with(if is_told { user.clone() } else { String::new() })
            .with_number(limit.into())
            .with(match when_full {
                WhenFull::EvictOldest => "evict_oldest",
                WhenFull::Refuse => "refuse",
            })
            .with(replaced);
        let created = creating.run(&self.links, None).await;
        if let Some(old) = &terms.replaces {
            self.forget(old);
        }
        let displaced = match &created?[..] {
            [Value::Int(-1)] => return Ok(Creation::Full),
            displaced => {
                self.forget_members(key.bucket(), displaced, creating.place())?;
                u32::try_from(displaced.len()).unwrap_or(u32::MAX)
            }
        };
        if let Some(old) = elsewhere {
            // Only now, so that who is refused keeps what they came with. And then it has to end: no browser leaves with
            // two sessions, and of the new one nobody knows yet.
            let ended = self.destroying(old, None, Ending::Replaced).run(&self.links, None).await;
            self.forget(old);
            if let Err(error) = ended {
                let undoing = self.destroying(key, Some(&user), Ending::Replaced);
                let _: Result<Vec<Value>, StoreError> = undoing.run(&self.links, None).await;
                return Err(error);
            }
        }
        Ok(Creation::Begun { displaced })
    }

    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
        let touching = self
            .on_bucket(&scripts::TOUCH, key.bucket(), None)
            .with(key.member())
            .with_number(millis(idle))
            .with_number(ends);
        let mut noted = Vec::new();
        self.links
            .each_cache(bucket_slot(key.bucket()), |copies| noted.push((copies.begin_touch(key), Arc::clone(copies))));
        let touched = match touching.run(&self.links, None).await?[..] {
            [Value::Int(0)] => Touched::Gone,
            [Value::Int(1)] => Touched::Unchanged,
            [Value::Int(2)] => Touched::Extended,
            _ => return Err(self.links.senseless(touching.place())),
        };
        for (touch, copies) in noted {
            copies.finish_touch(&touch, touched);
        }
        Ok(touched != Touched::Gone)
    }

    async fn update(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
        let turns = &self.turns[key.spread() % TURNS];
        let Ok(_turn) = tokio::time::timeout(TURN_MAX, turns.lock()).await else {
            return Err(StoreError::Unavailable("others are changing the same session".into()));
        };
        self.forget(key);
        let updated = self.replace(key, change).await;
        self.forget(key);
        updated
    }

    async fn destroy(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Result<bool, StoreError> {
        self.forget(key);
        let lived = self.yes_or_no(&self.destroying(key, user, ending), self.durably()).await;
        self.forget(key);
        let lived = lived?;
        self.until_all_know().await;
        Ok(lived)
    }

    async fn list(&self, user: &str) -> Result<Vec<Listed>, StoreError> {
        let index = UserKey::of(user);
        let mut listed = self.listed(index.bucket(), self.keys.index(&index)).await?;
        listed.sort_by_key(|listed| listed.stored.record.created);
        Ok(listed)
    }

    async fn destroy_all(&self, user: &str, except: Option<&SessionKey>, ending: Ending) -> Result<u64, StoreError> {
        let index = UserKey::of(user);
        let ended = self.end_listed(index.bucket(), self.keys.index(&index), except, ending).await?;
        self.until_all_know().await;
        Ok(ended)
    }

    fn parts(&self) -> u16 {
        BUCKETS
    }

    async fn list_part(&self, part: u16) -> Result<Vec<Listed>, StoreError> {
        self.listed(part, self.keys.registry(part)).await
    }

    async fn destroy_part(&self, part: u16, ending: Ending) -> Result<u64, StoreError> {
        let ended = self.end_listed(part, self.keys.registry(part), None, ending).await?;
        // Who goes through all parts waits once, and not for an hour.
        if part + 1 == self.parts() {
            self.until_all_know().await;
        }
        Ok(ended)
    }

    async fn total(&self) -> Result<u64, StoreError> {
        let mut asking = JoinSet::new();
        for first in 0..ASKED_AT_ONCE {
            let (links, keys) = (Arc::clone(&self.links), Arc::clone(&self.keys));
            asking.spawn(async move {
                let mut total = 0;
                for bucket in (first..BUCKETS).step_by(ASKED_AT_ONCE.into()) {
                    total += count_members(&links, &keys.registry(bucket)).await?;
                }
                Ok::<_, StoreError>(total)
            });
        }
        let mut total = 0;
        while let Some(counted) = asking.join_next().await {
            total += counted.map_err(|error| StoreError::Unavailable(error.into()))??;
        }
        Ok(total)
    }

    async fn sweep(&self, part: u16) -> Result<Vec<EndEvent>, StoreError> {
        let sweeping = self.on_bucket(&scripts::SWEEP, part, None).with_number(PAGE);
        let replies = sweeping.run(&self.links, None).await?;
        let Some((Value::Int(lost), entries)) = replies.split_first() else {
            return Err(self.links.senseless(sweeping.place()));
        };
        if 0 < *lost {
            tracing::error!(lost, "ends of sessions were forgotten: nobody was told of them for too long");
        }
        let mut events = Vec::new();
        let mut malformed = Vec::new();
        for entry in entries {
            let Value::BulkString(entry) = entry else { return Err(self.links.senseless(sweeping.place())) };
            match end_event(part, entry) {
                Some(event) => events.push(event),
                None => malformed.push(entry.as_slice()),
            }
        }
        if !malformed.is_empty() {
            tracing::error!(count = malformed.len(), "ends of sessions cannot be read, and are forgotten");
            self.leave_outbox(part, &malformed).await?;
        }
        Ok(events)
    }

    async fn forget_events(&self, part: u16, events: &[EndEvent]) -> Result<(), StoreError> {
        let entries: Vec<_> = events.iter().map(|event| event.token.as_slice()).collect();
        self.leave_outbox(part, &entries).await
    }

    async fn lead(&self, instance: &str, time: Duration) -> Result<bool, StoreError> {
        let leading = scripts::LEAD.on(vec![self.keys.lead()]).with(instance).with_number(millis(time));
        self.yes_or_no(&leading, None).await
    }

    async fn add_activity(&self, key: &SessionKey, seen: &[Activity], keep: u16) -> Result<(), StoreError> {
        let latest = &seen[seen.len().saturating_sub(keep.into())..];
        if latest.is_empty() {
            return Ok(());
        }
        let mut adding =
            self.on_bucket(&scripts::ADD_ACTIVITY, key.bucket(), None).with(key.member()).with_number(keep.into());
        for activity in latest {
            let bytes = rmp_serde::to_vec(activity).map_err(|error| StoreError::Refused(error.into()))?;
            adding = adding.with(bytes);
        }
        self.yes_or_no(&adding, None).await.map(|_lives| ())
    }

    async fn activity(&self, key: &SessionKey) -> Result<Vec<Activity>, StoreError> {
        let name = self.keys.trail(key);
        let place = Place::Slot(key_slot(name.as_bytes()));
        let mut asked = command("LRANGE", &name);
        asked.arg(0).arg(-1);
        let Value::Array(entries) = self.one(place, asked).await? else { return Err(self.links.senseless(place)) };
        // What another version wrote is left out.
        let activity = entries.iter().rev().filter_map(|entry| match entry {
            Value::BulkString(bytes) => rmp_serde::from_slice(bytes).ok(),
            _ => None,
        });
        Ok(activity.collect())
    }

    async fn claim(&self, name: &str, holder: &str, time: Duration) -> Result<bool, StoreError> {
        let name = self.keys.claim(name);
        let place = Place::Slot(key_slot(name.as_bytes()));
        let mut claiming = command("SET", &name);
        claiming.arg(holder).arg("NX").arg("PX").arg(millis(time));
        match self.one(place, claiming).await? {
            Value::Okay => Ok(true),
            Value::Nil => Ok(false),
            _ => Err(self.links.senseless(place)),
        }
    }

    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        let releasing = scripts::RELEASE.on(vec![self.keys.claim(name)]).with(holder);
        self.yes_or_no(&releasing, None).await.map(|_had_it| ())
    }

    async fn bind(&self, handle: &str, key: &SessionKey, time: Duration) -> Result<Vec<SessionKey>, StoreError> {
        let binding = scripts::BIND
            .on(vec![self.keys.bindings(handle)])
            .with(bound_text(key))
            .with_number(millis(time))
            .with_number(BOUND_MAX as u64);
        let surplus = binding.run(&self.links, None).await?;
        bound_keys(&surplus).ok_or_else(|| self.links.senseless(binding.place()))
    }

    async fn bound(&self, handle: &str) -> Result<Vec<SessionKey>, StoreError> {
        let name = self.keys.bindings(handle);
        let place = Place::Slot(key_slot(name.as_bytes()));
        let mut asked = command("ZRANGE", &name);
        asked.arg(0).arg(-1);
        match self.one(place, asked).await? {
            Value::Array(sessions) => bound_keys(&sessions).ok_or_else(|| self.links.senseless(place)),
            _ => Err(self.links.senseless(place)),
        }
    }

    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        let counting = scripts::INCREMENT.on(vec![self.keys.counter(counter)]).with_number(millis(window));
        match counting.run(&self.links, None).await?[..] {
            [Value::Int(value), Value::Int(left @ 0..)] => {
                Ok(Count { value: at_least_zero(value), resets_in: Duration::from_millis(at_least_zero(left)) })
            }
            _ => Err(self.links.senseless(counting.place())),
        }
    }

    async fn decrement(&self, counter: &str) -> Result<(), StoreError> {
        let counting = scripts::DECREMENT.on(vec![self.keys.counter(counter)]);
        counting.run(&self.links, None).await.map(|_count| ())
    }

    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        let name = self.keys.counter(counter);
        let place = Place::Slot(key_slot(name.as_bytes()));
        let text = match self.one(place, command("GET", &name)).await? {
            Value::Nil => return Ok(0),
            Value::BulkString(text) => text,
            _ => return Err(self.links.senseless(place)),
        };
        let number = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
        number.map(at_least_zero).ok_or_else(|| StoreError::Refused("a counter holds no number".into()))
    }

    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        let name = self.keys.counter(counter);
        let place = Place::Slot(key_slot(name.as_bytes()));
        match self.one(place, command("DEL", &name)).await? {
            Value::Int(0..) => Ok(()),
            _ => Err(self.links.senseless(place)),
        }
    }

    async fn inspect(&self) -> Vec<Risk> {
        inspect::inspect(&self.links, self.copies_max).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let commands = vec![redis::cmd("PING")];
        match self.links.ask(Batch { place: Place::Anywhere, commands }).await?.pop() {
            Some(Value::SimpleString(_)) => Ok(()),
            // Who lacks the permission to ask has been answered.
            Some(Value::ServerError(error)) if error.code() == "NOPERM" => Ok(()),
            Some(Value::ServerError(error)) => Err(store_error(&error.into())),
            Some(_) | None => Err(self.links.senseless(Place::Anywhere)),
        }
    }
}

impl RedisStore {
    /// In all copies of this process, of the primary that has this session.
    fn search<T>(&self, key: &SessionKey, look: impl FnMut(&Arc<LeaseCache>) -> Option<T>) -> Option<T> {
        self.links.search(bucket_slot(key.bucket()), look)
    }

    /// This process ends or changes a session: before the command and after it, no worker's copy of it is used.
    fn forget(&self, key: &SessionKey) {
        self.links.each_cache(bucket_slot(key.bucket()), |copies| copies.forget_own(key));
    }

    /// Reads, changes and writes, until nobody came between.
    async fn replace(&self, key: &SessionKey, change: Change<'_>) -> Result<Option<Arc<Record>>, StoreError> {
        let place = Place::Slot(bucket_slot(key.bucket()));
        let mut value = match self.one(place, command("GET", &self.keys.session(key))).await? {
            Value::BulkString(value) => value,
            Value::Nil => return Ok(None),
            _ => return Err(self.links.senseless(place)),
        };
        for _ in 0..UPDATES_MAX {
            if tombstone(&value).is_some() {
                return Ok(None);
            }
            let codec = &self.options.codec;
            let record = codec.decode(&value, key).map_err(|error| codec.unreadable(key, error))?;
            let Some(new) = changed(&record, change)? else { return Ok(Some(Arc::new(record))) };
            let bytes = codec.encode(&new, key)?;
            let updating =
                self.on_bucket(&scripts::UPDATE, key.bucket(), None).with(key.member()).with(&value).with(bytes);
            match &mut updating.run(&self.links, None).await?[..] {
                [Value::Int(0)] => return Ok(None),
                [Value::Int(1)] => return Ok(Some(Arc::new(new))),
                [Value::Int(2), Value::BulkString(current)] => value = std::mem::take(current),
                _ => return Err(self.links.senseless(place)),
            }
        }
        Err(StoreError::Unavailable("other instances are changing the same session".into()))
    }

    /// A script of this process has ended them.
    fn forget_members(&self, bucket: u16, members: &[Value], place: Place) -> Result<(), StoreError> {
        for member in members {
            let Value::BulkString(member) = member else { return Err(self.links.senseless(place)) };
            if let Some(key) = SessionKey::of_member(bucket, member) {
                self.forget(&key);
            }
        }
        Ok(())
    }

    /// What every script of a bucket is told; `of`: the fifth key.
    fn on_bucket(&self, script: &'static Script, bucket: u16, of: Option<String>) -> Call {
        let keys = &self.keys;
        let mut named = vec![keys.registry(bucket), keys.users(bucket), keys.outbox(bucket), keys.heartbeat(bucket)];
        named.extend(of);
        script.on(named).with(keys.sessions(bucket)).with(keys.trails(bucket))
    }

    fn destroying(&self, key: &SessionKey, user: Option<&str>, ending: Ending) -> Call {
        let index = user.map(UserKey::of).filter(|index| index.bucket() == key.bucket());
        let index = index.map(|index| self.keys.index(&index));
        self.on_bucket(&scripts::DESTROY, key.bucket(), index).with(key.member()).with(ending.label())
    }

    /// Ends the sessions in an index or a registry, page by page; how many lived.
    async fn end_listed(
        &self,
        bucket: u16,
        list: String,
        except: Option<&SessionKey>,
        ending: Ending,
    ) -> Result<u64, StoreError> {
        let ending = self
            .on_bucket(&scripts::DESTROY_ALL, bucket, Some(list))
            .with_number(PAGE)
            .with(ending.label())
            .with(except.map(SessionKey::member).unwrap_or_default());
        let mut ended = 0;
        loop {
            match &ending.run(&self.links, self.durably()).await?[..] {
                [Value::Int(seen), members @ ..] => {
                    self.forget_members(bucket, members, ending.place())?;
                    ended += members.len() as u64;
                    if at_least_zero(*seen) < PAGE {
                        return Ok(ended);
                    }
                }
                _ => return Err(self.links.senseless(ending.place())),
            }
        }
    }

    /// The live sessions in an index or a registry, page by page. What cannot be read is left out, and is one line in
    /// the log.
    async fn listed(&self, bucket: u16, list: String) -> Result<Vec<Listed>, StoreError> {
        let mut listed = Vec::new();
        let (mut rank, mut unreadable) = (0, 0_u64);
        loop {
            let listing =
                self.on_bucket(&scripts::LIST, bucket, Some(list.clone())).with_number(rank).with_number(RECORDS_PAGE);
            let replies = listing.run(&self.links, None).await?;
            let [Value::Int(seen), Value::Int(gone), sessions @ ..] = &replies[..] else {
                return Err(self.links.senseless(listing.place()));
            };
            for session in sessions.chunks(3) {
                let [Value::BulkString(member), Value::BulkString(value), Value::Int(left @ 0..)] = session else {
                    return Err(self.links.senseless(listing.place()));
                };
                let Some(key) = SessionKey::of_member(bucket, member) else { continue };
                match self.options.codec.decode(value, &key) {
                    Ok(record) => listed.push(Listed { key, stored: stored(record, *left) }),
                    Err(_) => unreadable += 1,
                }
            }
            if at_least_zero(*seen) < RECORDS_PAGE {
                break;
            }
            rank += at_least_zero(seen - gone);
        }
        if 0 < unreadable {
            tracing::error!(count = unreadable, "stored sessions cannot be used, and are not in a list");
        }
        Ok(listed)
    }

    async fn leave_outbox(&self, bucket: u16, entries: &[&[u8]]) -> Result<(), StoreError> {
        if entries.is_empty() {
            return Ok(());
        }
        let name = self.keys.outbox(bucket);
        let place = Place::Slot(key_slot(name.as_bytes()));
        let commands = entries.iter().map(|entry| {
            let mut leaving = command("LREM", &name);
            leaving.arg(1).arg(*entry);
            leaving
        });
        for reply in self.links.ask(Batch { place, commands: commands.collect() }).await? {
            match reply {
                Value::Int(0..) => {}
                Value::ServerError(error) => return Err(store_error(&error.into())),
                _ => return Err(self.links.senseless(place)),
            }
        }
        Ok(())
    }

    /// The server's Unix time in ms: all instances live by it.
    async fn now(&self, bucket: u16) -> Result<u64, StoreError> {
        let place = Place::Slot(bucket_slot(bucket));
        let time = self.one(place, redis::cmd("TIME")).await?;
        let Ok((seconds, micros)) = redis::from_redis_value::<(u64, u64)>(time) else {
            return Err(self.links.senseless(place));
        };
        Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000))
    }

    async fn yes_or_no(&self, call: &Call, durably: Option<Durably>) -> Result<bool, StoreError> {
        match call.run(&self.links, durably).await?[..] {
            [Value::Int(answer @ 0..=1)] => Ok(answer == 1),
            _ => Err(self.links.senseless(call.place())),
        }
    }

    /// One command that the server has not refused.
    async fn one(&self, place: Place, command: Cmd) -> Result<Value, StoreError> {
        match self.links.ask(Batch { place, commands: vec![command] }).await?.pop() {
            Some(Value::ServerError(error)) => Err(store_error(&error.into())),
            Some(reply) => Ok(reply),
            None => Err(self.links.senseless(place)),
        }
    }

    fn durably(&self) -> Option<Durably> {
        match self.logout {
            Logout::Durable => Some(self.durably),
            Logout::Fast | Logout::Strict => None,
        }
    }

    /// With `logout = "strict"` the answer comes when no instance can have a copy any more.
    async fn until_all_know(&self) {
        match self.logout {
            Logout::Strict => tokio::time::sleep(self.lease).await,
            Logout::Fast | Logout::Durable => {}
        }
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("address", &self.address())
            .field("prefix", &self.keys.prefix)
            .finish_non_exhaustive()
    }
}

/// What the replies to `GET` and `PTTL` say.
fn found(replies: [Value; 2], key: &SessionKey, codec: &Codec, links: &Links) -> Result<Found, StoreError> {
    let problem: &dyn fmt::Display = match replies {
        [Value::Nil, Value::Int(-2..)] | [Value::BulkString(_), Value::Int(-2)] => return Ok(Found::Nothing),
        [Value::BulkString(_), Value::Int(-1)] => &"it has no time to live",
        [Value::BulkString(value), Value::Int(left @ 0..)] => {
            if let Some(found) = tombstone(&value) {
                return Ok(found);
            }
            match codec.decode(&value, key) {
                Ok(record) => return Ok(Found::Live(stored(record, left))),
                Err(error) => return Err(codec.unreadable(key, error)),
            }
        }
        [Value::ServerError(error), _] if error.code() == "WRONGTYPE" => &"it is not a string",
        [Value::ServerError(error), _] | [_, Value::ServerError(error)] => return Err(store_error(&error.into())),
        [_, _] => return Err(links.senseless(Place::Slot(bucket_slot(key.bucket())))),
    };
    tracing::error!(session = key.log_hash(), cause = %problem, "stored session cannot be used");
    Err(StoreError::Unreadable)
}

async fn count_members(links: &Links, registry: &str) -> Result<u64, StoreError> {
    let place = Place::Slot(key_slot(registry.as_bytes()));
    match links.ask(Batch { place, commands: vec![command("ZCARD", registry)] }).await?.pop() {
        Some(Value::Int(members)) => Ok(at_least_zero(members)),
        Some(Value::ServerError(error)) => Err(store_error(&error.into())),
        Some(_) | None => Err(links.senseless(place)),
    }
}

/// A session as a binding names it: its bucket and its member.
fn bound_text(key: &SessionKey) -> String {
    format!("{}:{}", key.bucket(), key.member())
}

/// What [`bound_text`] wrote; what somebody else wrote there is left out.
fn bound_keys(texts: &[Value]) -> Option<Vec<SessionKey>> {
    let key = |text: &[u8]| {
        let (bucket, member) = std::str::from_utf8(text).ok()?.split_once(':')?;
        SessionKey::of_member(bucket.parse().ok()?, member.as_bytes())
    };
    let mut keys = Vec::new();
    for text in texts {
        let Value::BulkString(text) = text else { return None };
        keys.extend(key(text));
    }
    Some(keys)
}

fn command(name: &str, key: &str) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(key);
    command
}

fn stored(record: Record, left: i64) -> Stored {
    Stored { record: Arc::new(record), time_to_live: Duration::from_millis(at_least_zero(left)) }
}

/// What a tombstone says; nothing, if a later version wrote an ending that we do not know.
fn tombstone(value: &[u8]) -> Option<Found> {
    let label = value.strip_prefix(&[TOMBSTONE])?;
    let ending = std::str::from_utf8(label).ok().and_then(Ending::of_label);
    Some(ending.map_or(Found::Nothing, Found::Ended))
}

/// Reads what the scripts write into the outbox: ending, time, member and user, with spaces between them.
fn end_event(bucket: u16, entry: &[u8]) -> Option<EndEvent> {
    let text = std::str::from_utf8(entry).ok()?;
    let mut parts = text.splitn(4, ' ');
    let ending = Ending::of_label(parts.next()?)?;
    let at = parts.next()?.parse().ok()?;
    let session = SessionKey::of_member(bucket, parts.next()?.as_bytes())?.log_hash();
    let user = parts.next()?.to_owned();
    Some(EndEvent { token: entry.to_vec(), session, user, ending, at })
}

/// A negative number has no business where we count.
fn at_least_zero(count: i64) -> u64 {
    u64::try_from(count).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use toml::Spanned;

    use super::*;

    fn settings(url: &str) -> model::RedisStore {
        toml::from_str(&format!("url = {url:?}")).unwrap()
    }

    #[test]
    fn a_tombstone_says_why_and_is_never_a_record() {
        let cases: [(&[u8], Option<Option<Ending>>); 6] = [
            (b"\0displaced", Some(Some(Ending::Displaced))),
            (b"\0revoked", Some(Some(Ending::Revoked))),
            (b"\0of a later version", Some(None)),
            (b"\0", Some(None)),
            (b"\x01revoked", None),
            (b"", None),
        ];
        for (value, expected) in cases {
            let read = tombstone(value).map(|found| match found {
                Found::Ended(ending) => Some(ending),
                Found::Nothing => None,
                Found::Live(_) => panic!("a tombstone lives"),
            });
            assert_eq!(read, expected, "{value:?}");
        }
    }

    #[test]
    fn an_end_is_read_as_it_was_written_and_nothing_else_is_one() {
        let key = crate::session::id::SessionId::generate("a b").unwrap().key();
        let entry = format!("expired 1800000000000 {} a b", key.member());
        let event = end_event(key.bucket(), entry.as_bytes()).unwrap();
        assert_eq!((event.user.as_str(), event.ending, event.at), ("a b", Ending::Expired, 1_800_000_000_000));
        assert_eq!(event.session, key.log_hash());
        for wrong in ["", "expired", "expired 1", "tired 1 x y", "expired x y z", "expired 1 x y"] {
            assert_eq!(end_event(key.bucket(), wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    #[test]
    fn every_kind_of_url_is_understood_without_a_runtime_and_without_a_server() {
        let cases = [
            ("redis://127.0.0.1", "127.0.0.1:6379"),
            ("redis://redis.example:7000/3", "redis.example:7000"),
            ("redis://:hunter2@redis.example", "redis.example:6379"),
            ("redis://proxy:hunter2@redis.example/1", "redis.example:6379"),
            ("redis://[::1]:6380", "[::1]:6380"),
            ("rediss://redis.example", "redis.example:6379"),
            ("unix:///run/redis.sock", "/run/redis.sock"),
            ("redis+unix:///run/redis.sock?db=2&user=proxy&pass=hunter2", "/run/redis.sock"),
        ];
        for (url, address) in cases {
            let store = RedisStore::new(&settings(url), StoreOptions::default()).unwrap();
            assert_eq!(store.address(), address, "{url}");
            assert!(!format!("{store:?}").contains("hunter2"), "a password does not print itself");
        }
    }

    #[test]
    fn what_is_wrong_with_the_settings_is_said_without_the_password() {
        let cases = [
            "",
            "localhost:6379",
            "http://:hunter2@redis.example",
            "REDIS://:hunter2@redis.example",
            "redis://",
            "redis://:hunter2@",
            "redis://:hunter2@0.0.0.0",
            "redis://:hunter2@redis.example:port",
            "redis://:hunter2@redis.example/first",
            "redis://:hunter2@redis.example/-1",
            "redis://proxy@redis.example",
            "redis://:hunter2@redis.example?protocol=4",
            "redis://:hunter2#3@redis.example",
            "rediss://:hunter2@redis.example#insecure",
            "unix://:hunter2@host/run/redis.sock",
            "unix:///run/redis.sock?db=first&pass=hunter2",
        ];
        for url in cases {
            let error = RedisStore::new(&settings(url), StoreOptions::default()).expect_err(url);
            assert!(matches!(error, SettingsError::Url(_)), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{url}: {error}");
        }
    }

    #[test]
    fn a_prefix_cannot_break_the_hash_tag() {
        for prefix in ["a{b", "a}", "a b", "a\n", "é", &"x".repeat(65)] {
            let settings = model::RedisStore { prefix: Spanned::new(0..0, prefix.into()), ..settings("redis://h") };
            assert!(
                matches!(RedisStore::new(&settings, StoreOptions::default()), Err(SettingsError::Prefix(_))),
                "{prefix:?}"
            );
        }
        let settings = model::RedisStore { prefix: Spanned::new(0..0, String::new()), ..settings("redis://h") };
        assert!(RedisStore::new(&settings, StoreOptions::default()).is_ok());
    }

    #[test]
    fn an_authority_must_be_a_certificate_and_have_a_use() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let cases: [(&str, PathBuf); 4] = [
            ("rediss://h", directory.path().join("missing.pem")),
            ("rediss://h", file("empty.pem", "")),
            ("rediss://h", file("broken.pem", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")),
            ("redis://h", file("unused.pem", &authority())),
        ];
        for (url, path) in cases {
            let settings = model::RedisStore { ca: Some(Spanned::new(0..0, path.clone())), ..settings(url) };
            let error = RedisStore::new(&settings, StoreOptions::default()).expect_err(url);
            assert!(matches!(error, SettingsError::Ca(_)), "{}: {error}", path.display());
        }
        let path = file("good.pem", &authority());
        let settings = model::RedisStore { ca: Some(Spanned::new(0..0, path)), ..settings("rediss://h") };
        assert!(RedisStore::new(&settings, StoreOptions::default()).is_ok());
    }

    fn authority() -> String {
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem()
    }
}
