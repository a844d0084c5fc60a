//! Sessions in Redis (or Valkey), shared by all instances of Cloakroom. The only file that knows Redis.
//!
//! Each tokio runtime has one multiplexed connection of its own, made at first use and kept by a task of ours: see
//! `supervise`. Who asks while the store is down is told so at once, and nobody waits longer than the response
//! timeout in total.
//!
//! **No command is ever answered with another request's reply.** A connection answers in the order of its commands,
//! and its driver remembers every command that it sent, also one whose asker went away; the reply to that one is read
//! and dropped. After a response timeout, or a reply that makes no sense, nobody trusts the connection any more: it is
//! replaced.
//!
//! What needs to be permitted to the user: `HELLO AUTH SELECT PING GET SET DEL INCR DECR PTTL PEXPIRE PEXPIREAT TIME
//! MULTI EXEC` on keys `<prefix>*`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Value};

mod settings;
mod link;

pub use settings::SettingsError;

use super::{
    Count, Creation, Ending, NewSession, SessionStore, StoreError, StoreOptions, Stored, Terms, counter_hash, millis,
};
use crate::config::model;
use crate::session::id::SessionKey;
use link::{Links, probe, senseless};

/// Sessions and counters under one prefix of one Redis.
pub struct RedisStore {
    links: Links,
    prefix: String,
    options: StoreOptions,
}

impl RedisStore {
    /// Checks the settings; connects to nothing and needs no runtime.
    pub fn new(settings: &model::RedisStore, options: StoreOptions) -> Result<Self, SettingsError> {
        let prefix = settings.prefix.get_ref().clone();
        settings::check_prefix(&prefix)?;
        Ok(Self { links: Links::new(settings)?, prefix, options })
    }

    /// Host and port or the socket's path: what may be shown.
    pub fn address(&self) -> String {
        self.links.address()
    }

    fn session_name(&self, key: &SessionKey) -> String {
        key.to_store_key(&self.prefix)
    }

    fn counter_name(&self, counter: &str) -> String {
        format!("{}c:{}", self.prefix, URL_SAFE_NO_PAD.encode(counter_hash(counter)))
    }
}

#[async_trait]
impl SessionStore for RedisStore {
    async fn load(&self, key: &SessionKey) -> Result<super::Found, StoreError> {
        let name = self.session_name(key);
        let found = self.links.exchange(|connection| read(connection, name)).await?;
        let problem: &dyn fmt::Display = match &found {
            Found::Nothing => return Ok(super::Found::Nothing),
            Found::Session(bytes, time_to_live) => match self.options.codec.decode(bytes, key) {
                Ok(record) => {
                    let stored = Stored { record: Arc::new(record), time_to_live: *time_to_live };
                    return Ok(super::Found::Live(stored));
                }
                Err(error) => return Err(self.options.codec.unreadable(key, error)),
            },
            Found::Immortal => &"it has no time to live",
            Found::WrongType => &"it is not a string",
        };
        tracing::error!(session = key.log_hash(), cause = %problem, "stored session cannot be used");
        Err(StoreError::Unreadable)
    }

    async fn create(&self, key: &SessionKey, session: NewSession, terms: &Terms) -> Result<Creation, StoreError> {
        let lifetime = terms.lifetime;
        let name = self.session_name(key);
        let replaces = terms.replaces.as_ref().map(|old| self.session_name(old));
        let written = self.links.exchange(|mut connection| async move {
            let record = session.into_record(now(&mut connection).await?, lifetime);
            let bytes = match self.options.codec.encode(&record, key) {
                Ok(bytes) => bytes,
                Err(error) => return Ok(Err(error)),
            };
            let mut commands = redis::pipe();
            commands
                .atomic()
                .cmd("SET")
                .arg(name)
                .arg(bytes)
                .arg("PX")
                .arg(millis(lifetime.idle.min(lifetime.absolute)));
            if let Some(old) = replaces {
                commands.cmd("DEL").arg(old);
            }
            commands.exec_async(&mut connection).await.map(Ok)
        });
        written.await?.map_err(|error| StoreError::Refused(error.into()))?;
        Ok(Creation::Begun { displaced: 0 })
    }

    async fn touch(&self, key: &SessionKey, idle: Duration, ends: u64) -> Result<bool, StoreError> {
        let name = self.session_name(key);
        let touched = self.links.exchange(|mut connection| async move {
            let now = now(&mut connection).await?;
            if ends <= now {
                redis::cmd("DEL").arg(name).exec_async(&mut connection).await?;
                return Ok(false);
            }
            let expires = now.saturating_add(millis(idle)).min(ends);
            // GT: of two instances the one that touched last wins, whichever command comes first.
            let mut commands = redis::pipe();
            commands.cmd("PEXPIREAT").arg(&name).arg(expires).arg("GT").ignore().cmd("PTTL").arg(&name);
            let (time_to_live,): (i64,) = commands.query_async(&mut connection).await?;
            // In its last millisecond it has 0 left, and lives.
            Ok(0 <= time_to_live)
        });
        touched.await
    }

    async fn destroy(&self, key: &SessionKey, _user: Option<&str>, _ending: Ending) -> Result<bool, StoreError> {
        let name = self.session_name(key);
        let deleted = self.links.exchange(|mut connection| async move {
            redis::cmd("DEL").arg(name).query_async::<u64>(&mut connection).await
        });
        Ok(0 < deleted.await?)
    }

    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        let name = self.counter_name(counter);
        let window = millis(window);
        let counted = self.links.exchange(|mut connection| async move {
            // In one transaction, for which time stands still: else the count could expire before INCR, and INCR
            // make one that never does.
            let mut commands = redis::pipe();
            commands.atomic().cmd("SET").arg(&name).arg(0).arg("PX").arg(window).arg("NX").ignore();
            commands.cmd("INCR").arg(&name).cmd("PTTL").arg(&name);
            let (value, resets_in): (i64, i64) = commands.query_async(&mut connection).await?;
            let resets_in = match u64::try_from(resets_in) {
                Ok(resets_in) => resets_in,
                Err(_no_expiry) => {
                    redis::cmd("PEXPIRE").arg(&name).arg(window).exec_async(&mut connection).await?;
                    window
                }
            };
            Ok(Count { value: at_least_zero(value), resets_in: Duration::from_millis(resets_in) })
        });
        counted.await
    }

    async fn decrement(&self, counter: &str) -> Result<(), StoreError> {
        let name = self.counter_name(counter);
        let taken_back = self.links.exchange(|mut connection| async move {
            // One that has forgotten becomes a zero of a millisecond: DECR alone would make a -1 that never goes.
            let mut commands = redis::pipe();
            commands.atomic().cmd("SET").arg(&name).arg(1).arg("PX").arg(1).arg("NX").cmd("DECR").arg(&name);
            commands.exec_async(&mut connection).await
        });
        taken_back.await
    }

    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        let name = self.counter_name(counter);
        let value = self.links.exchange(|mut connection| async move {
            redis::cmd("GET").arg(name).query_async::<Option<Vec<u8>>>(&mut connection).await
        });
        let Some(text) = value.await? else { return Ok(0) };
        let number = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
        number.map(at_least_zero).ok_or_else(|| StoreError::Refused("a counter holds no number".into()))
    }

    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        let name = self.counter_name(counter);
        let deleted = self
            .links
            .exchange(|mut connection| async move { redis::cmd("DEL").arg(name).exec_async(&mut connection).await });
        deleted.await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.links.exchange(probe).await
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("address", &self.address())
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// What is at a session's key.
enum Found {
    Nothing,
    Session(Vec<u8>, Duration),
    /// Without expiry: not written by us, and no session ends never.
    Immortal,
    WrongType,
}

/// One round trip.
async fn read(mut connection: MultiplexedConnection, name: String) -> RedisResult<Found> {
    let mut commands = redis::pipe();
    commands.cmd("GET").arg(&name).cmd("PTTL").arg(&name);
    let replies = connection.send_packed_commands(&commands, 0, 2).await?;
    match <[Value; 2]>::try_from(replies) {
        Ok([Value::Nil, Value::Int(-2..)] | [Value::BulkString(_), Value::Int(-2)]) => Ok(Found::Nothing),
        Ok([Value::BulkString(_), Value::Int(-1)]) => Ok(Found::Immortal),
        Ok([Value::BulkString(bytes), Value::Int(time_to_live)]) => match u64::try_from(time_to_live) {
            Ok(time_to_live) => Ok(Found::Session(bytes, Duration::from_millis(time_to_live))),
            Err(_negative) => Err(senseless()),
        },
        Ok([Value::ServerError(error), _]) if error.code() == "WRONGTYPE" => Ok(Found::WrongType),
        Ok([Value::ServerError(error), _] | [_, Value::ServerError(error)]) => Err(error.into()),
        Ok(_) | Err(_) => Err(senseless()),
    }
}

/// A count that was reset while some of it was still to be taken back is below zero for a while.
fn at_least_zero(count: i64) -> u64 {
    u64::try_from(count).unwrap_or_default()
}

/// The server's Unix time in ms: all instances live by it.
async fn now(connection: &mut MultiplexedConnection) -> RedisResult<u64> {
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query_async(connection).await?;
    Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000))
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
    fn every_kind_of_url_is_understood_without_a_runtime_and_without_a_server() {
        let cases = [
            ("redis://127.0.0.1", "127.0.0.1:6379"),
            ("redis://redis.example:7000/3", "redis.example:7000"),
            ("redis://:hunter2@redis.example", "redis.example:6379"),
            ("redis://proxy:hunter2@redis.example/1", "redis.example:6379"),
            ("redis://[::1]:6380", "::1:6380"),
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
