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

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, ProtocolVersion,
    PushInfo, PushKind, RedisError, RedisResult, TlsCertificates, Value,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::runtime;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::{Count, Creation, Ending, NewSession, SessionStore, StoreError, Stored, Terms, counter_hash, millis};
use crate::config::model;
use crate::session::id::SessionKey;
use crate::session::record::Record;

/// Sessions and counters under one prefix of one Redis.
pub struct RedisStore {
    server: Arc<Server>,
    prefix: String,
    response_timeout: Duration,
    /// By runtime: a connection lives and dies with the runtime that drives it.
    links: ArcSwap<Vec<(runtime::Id, Link)>>,
    linking: Mutex<()>,
}

/// What is wrong with `[store.redis]`. Never holds the URL, which may hold a password.
#[derive(Debug)]
pub enum SettingsError {
    Url(String),
    Prefix(String),
    Ca(String),
}

/// Where the server is and how to get in.
struct Server {
    client: Client,
    /// One runtime has reached it: the others need not wait out their backoff.
    is_back: Notify,
    connect_timeout: Duration,
    response_timeout: Duration,
}

/// What one runtime knows of its connection.
type Link = watch::Receiver<State>;

enum State {
    /// The very first attempt is under way.
    Connecting,
    Up(Arc<Live>),
    Down(Failure),
}

struct Live {
    connection: MultiplexedConnection,
    /// Somebody has seen that this connection is not to be used any more.
    lost: Arc<Notify>,
}

/// Why the store is down, told to everybody who asks.
#[derive(Clone)]
struct Failure {
    is_refusal: bool,
    cause: Arc<str>,
}

/// Room for that many requests between two turns of the driver; the client's default of 50 makes askers wait.
const REQUESTS_QUEUED_MAX: usize = 1000;
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A server that froze is found this much earlier than by the first user who comes.
const HEARTBEAT: Duration = Duration::from_secs(1);
const PREFIX_BYTES_MAX: usize = 64;

impl RedisStore {
    /// Checks the settings; connects to nothing and needs no runtime.
    pub fn new(settings: &model::RedisStore) -> Result<Self, SettingsError> {
        let prefix = settings.prefix.get_ref().clone();
        check_prefix(&prefix)?;
        let response_timeout = settings.response_timeout.get();
        let server = Server {
            client: client(settings)?,
            is_back: Notify::new(),
            connect_timeout: settings.connect_timeout.get(),
            response_timeout,
        };
        Ok(Self {
            server: Arc::new(server),
            prefix,
            response_timeout,
            links: ArcSwap::default(),
            linking: Mutex::default(),
        })
    }

    /// Host and port or the socket's path: what may be shown.
    pub fn address(&self) -> String {
        self.server.address()
    }

    /// One whole exchange with the server, however many round trips it takes, within the response timeout.
    async fn exchange<T, F>(&self, commands: impl FnOnce(MultiplexedConnection) -> F + Send) -> Result<T, StoreError>
    where
        F: Future<Output = RedisResult<T>> + Send,
    {
        let live = self.live().await?;
        match timeout(self.response_timeout, commands(live.connection.clone())).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                if ends_trust(&error) {
                    live.lost.notify_one();
                }
                Err(store_error(&error))
            }
            Err(_elapsed) => {
                live.lost.notify_one();
                Err(StoreError::Unavailable(no_answer_within(self.response_timeout).into()))
            }
        }
    }

    async fn live(&self) -> Result<Arc<Live>, StoreError> {
        let mut link = match self.known() {
            Some(Ok(live)) => return Ok(live),
            Some(Err(failure)) => return Err(failure.into()),
            None => self.link()?,
        };
        let first_attempt =
            timeout(self.server.connect_timeout, link.wait_for(|state| !matches!(state, State::Connecting)));
        match first_attempt.await {
            Ok(Ok(state)) => match &*state {
                State::Up(live) => Ok(Arc::clone(live)),
                State::Down(failure) => Err(failure.clone().into()),
                State::Connecting => Err(StoreError::Unavailable("still connecting".into())),
            },
            Ok(Err(_closed)) => Err(StoreError::Unavailable("the runtime is shutting down".into())),
            Err(_elapsed) => Err(StoreError::Unavailable(no_answer_within(self.server.connect_timeout).into())),
        }
    }

    /// The hot path: what this runtime's link says now. None when there is no link, or none that knows yet.
    fn known(&self) -> Option<Result<Arc<Live>, Failure>> {
        let id = runtime::Handle::try_current().ok()?.id();
        let links = self.links.load();
        let (_, link) = links.iter().find(|(runtime, link)| *runtime == id && is_kept(link))?;
        match &*link.borrow() {
            State::Up(live) => Some(Ok(Arc::clone(live))),
            State::Down(failure) => Some(Err(failure.clone())),
            State::Connecting => None,
        }
    }

    /// This runtime's link, made when there is none.
    fn link(&self) -> Result<Link, StoreError> {
        let handle = runtime::Handle::try_current().map_err(|error| StoreError::Unavailable(error.into()))?;
        let _one_at_a_time = self.linking.lock();
        let links = self.links.load();
        // Ids of runtimes that are gone are used again, so their links go first.
        let mut kept: Vec<_> = links.iter().filter(|(_, link)| is_kept(link)).cloned().collect();
        if let Some((_, link)) = kept.iter().find(|(runtime, _)| *runtime == handle.id()) {
            return Ok(link.clone());
        }
        let (state, link) = watch::channel(State::Connecting);
        handle.spawn(supervise(Arc::clone(&self.server), state));
        kept.push((handle.id(), link.clone()));
        self.links.store(Arc::new(kept));
        Ok(link)
    }

    fn session_name(&self, key: &SessionKey) -> String {
        key.to_store_key(&self.prefix)
    }

    fn counter_name(&self, counter: &str) -> String {
        format!("{}c:{}", self.prefix, URL_SAFE_NO_PAD.encode(counter_hash(counter)))
    }
}

/// Whether its supervisor lives.
fn is_kept(link: &Link) -> bool {
    link.has_changed().is_ok()
}

/// Keeps one connection for one runtime, for as long as the store and the runtime live.
async fn supervise(server: Arc<Server>, state: watch::Sender<State>) {
    let keep_connected = async {
        let mut backoff = BACKOFF_MIN;
        let mut is_told = false;
        loop {
            let live = match server.connect().await {
                Ok(live) => live,
                Err(failure) => {
                    if !is_told {
                        is_told = true;
                        tracing::warn!(address = server.address(), cause = &*failure.cause, "redis is down");
                    }
                    state.send_replace(State::Down(failure));
                    server.pause(&mut backoff).await;
                    continue;
                }
            };
            tracing::info!(address = server.address(), "redis is connected");
            is_told = true;
            let since = tokio::time::Instant::now();
            state.send_replace(State::Up(Arc::clone(&live)));
            server.is_back.notify_waiters();
            let failure = server.watch(&live).await;
            tracing::warn!(address = server.address(), cause = &*failure.cause, "redis is down");
            state.send_replace(State::Down(failure));
            // A connection that did not last is no reason to hurry.
            if BACKOFF_MAX < since.elapsed() {
                backoff = BACKOFF_MIN;
            }
            server.pause(&mut backoff).await;
        }
    };
    tokio::select! {
        () = keep_connected => {}
        () = state.closed() => {}
    }
}

impl Server {
    fn address(&self) -> String {
        self.client.get_connection_info().addr().to_string()
    }

    /// Waits for half to all of the backoff, so that instances do not come back in step, and doubles it; not longer than
    /// until another runtime has found the server.
    async fn pause(&self, backoff: &mut Duration) {
        let _ = timeout(backoff.mul_f64(rand::random_range(0.5..=1.0)), self.is_back.notified()).await;
        *backoff = (*backoff * 2).min(BACKOFF_MAX);
    }

    /// A connection that has answered: a frozen server accepts, too.
    async fn connect(&self) -> Result<Arc<Live>, Failure> {
        let lost = Arc::new(Notify::new());
        let on_push = {
            let lost = Arc::clone(&lost);
            move |push: PushInfo| -> Result<(), redis::aio::SendError> {
                if push.kind == PushKind::Disconnection {
                    lost.notify_one();
                }
                Ok(())
            }
        };
        // All waiting is ours, so that there is one place that says how long.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(REQUESTS_QUEUED_MAX)
            .set_push_sender(on_push);
        let attempt = async {
            let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            probe(connection.clone()).await?;
            Ok(connection)
        };
        match timeout(self.connect_timeout, attempt).await {
            Ok(Ok(connection)) => Ok(Arc::new(Live { connection, lost })),
            Ok(Err(error)) => Err(self.failure(&error)),
            Err(_elapsed) => {
                let cause = no_answer_within(self.connect_timeout).into();
                Err(Failure { is_refusal: false, cause })
            }
        }
    }

    /// Returns when the connection is not to be used any more, and why.
    async fn watch(&self, live: &Live) -> Failure {
        let down = |cause: &str| Failure { is_refusal: false, cause: cause.into() };
        loop {
            tokio::select! {
                () = live.lost.notified() => return down("the connection was lost or stopped answering"),
                () = tokio::time::sleep(HEARTBEAT) => {}
            }
            match timeout(self.response_timeout, probe(live.connection.clone())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return self.failure(&error),
                Err(_elapsed) => return down(&no_answer_within(self.response_timeout)),
            }
        }
    }

    fn failure(&self, error: &RedisError) -> Failure {
        let text = error.to_string();
        let password = self.client.get_connection_info().redis_settings().password();
        // Servers that do not know a command send its arguments back.
        let cause = match password {
            Some(password) if text.contains(password) => "the server refused to authenticate us".into(),
            Some(_) | None => text.into(),
        };
        Failure { is_refusal: is_refusal(error), cause }
    }
}

/// Whether the server answers and is ready. One that lacks the permission to ask is.
async fn probe(mut connection: MultiplexedConnection) -> RedisResult<()> {
    match redis::cmd("PING").exec_async(&mut connection).await {
        Err(error) if error.code() == Some("NOPERM") => Ok(()),
        other => other,
    }
}

#[async_trait]
impl SessionStore for RedisStore {
    async fn load(&self, key: &SessionKey) -> Result<super::Found, StoreError> {
        let name = self.session_name(key);
        let found = self.exchange(|connection| read(connection, name)).await?;
        let problem: &dyn fmt::Display = match &found {
            Found::Nothing => return Ok(super::Found::Nothing),
            Found::Session(bytes, time_to_live) => match Record::decode(bytes) {
                Ok(record) => {
                    let stored = Stored { record: Arc::new(record), time_to_live: *time_to_live };
                    return Ok(super::Found::Live(stored));
                }
                Err(error) => &error.clone(),
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
        let written = self.exchange(|mut connection| async move {
            let record = session.into_record(now(&mut connection).await?, lifetime);
            let bytes = match record.encode() {
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
        let touched = self.exchange(|mut connection| async move {
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
        let deleted = self.exchange(|mut connection| async move {
            redis::cmd("DEL").arg(name).query_async::<u64>(&mut connection).await
        });
        Ok(0 < deleted.await?)
    }

    async fn increment(&self, counter: &str, window: Duration) -> Result<Count, StoreError> {
        let name = self.counter_name(counter);
        let window = millis(window);
        let counted = self.exchange(|mut connection| async move {
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
        let taken_back = self.exchange(|mut connection| async move {
            // One that has forgotten becomes a zero of a millisecond: DECR alone would make a -1 that never goes.
            let mut commands = redis::pipe();
            commands.atomic().cmd("SET").arg(&name).arg(1).arg("PX").arg(1).arg("NX").cmd("DECR").arg(&name);
            commands.exec_async(&mut connection).await
        });
        taken_back.await
    }

    async fn count(&self, counter: &str) -> Result<u64, StoreError> {
        let name = self.counter_name(counter);
        let value = self.exchange(|mut connection| async move {
            redis::cmd("GET").arg(name).query_async::<Option<Vec<u8>>>(&mut connection).await
        });
        let Some(text) = value.await? else { return Ok(0) };
        let number = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
        number.map(at_least_zero).ok_or_else(|| StoreError::Refused("a counter holds no number".into()))
    }

    async fn reset(&self, counter: &str) -> Result<(), StoreError> {
        let name = self.counter_name(counter);
        let deleted = self
            .exchange(|mut connection| async move { redis::cmd("DEL").arg(name).exec_async(&mut connection).await });
        deleted.await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.exchange(probe).await
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

fn senseless() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "the reply makes no sense").into()
}

/// The server's Unix time in ms: all instances live by it.
async fn now(connection: &mut MultiplexedConnection) -> RedisResult<u64> {
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query_async(connection).await?;
    Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000))
}

/// Whether a connection that answered so is to be replaced: it is broken, out of step, or leads to a server that is
/// no longer the primary.
fn ends_trust(error: &RedisError) -> bool {
    error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Io | ErrorKind::Parse | ErrorKind::UnexpectedReturnType)
        || code(error).is_some_and(|code| matches!(code.as_str(), "READONLY" | "NOAUTH"))
}

fn store_error(error: &RedisError) -> StoreError {
    let cause = error.to_string().into();
    if is_refusal(error) { StoreError::Refused(cause) } else { StoreError::Unavailable(cause) }
}

/// Whether the server said no, rather than not now.
fn is_refusal(error: &RedisError) -> bool {
    const NOT_NOW: [&str; 9] =
        ["LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "MOVED", "ASK"];
    match code(error) {
        Some(code) => !NOT_NOW.contains(&code.as_str()),
        None => error.kind() == ErrorKind::AuthenticationFailed,
    }
}

/// The server's own code; of several errors the first.
fn code(error: &RedisError) -> Option<String> {
    let errors = error.clone().into_server_errors()?;
    errors.first().map(|(_, error)| error.code().to_owned())
}

fn no_answer_within(limit: Duration) -> String {
    format!("no answer within {limit:?}")
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        let cause = failure.cause.to_string().into();
        if failure.is_refusal { Self::Refused(cause) } else { Self::Unavailable(cause) }
    }
}

fn check_prefix(prefix: &str) -> Result<(), SettingsError> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'{' | b'}');
    if PREFIX_BYTES_MAX < prefix.len() || !prefix.bytes().all(is_plain) {
        let expected = format!("expected at most {PREFIX_BYTES_MAX} visible ASCII characters without braces");
        return Err(SettingsError::Prefix(expected));
    }
    Ok(())
}

fn client(settings: &model::RedisStore) -> Result<Client, SettingsError> {
    let invalid = |reason: &str| SettingsError::Url(reason.to_owned());
    let url = settings.url.get_ref().expose();
    let known = ["redis://", "rediss://", "unix://", "redis+unix://"];
    if !known.iter().any(|scheme| url.starts_with(scheme)) {
        return Err(invalid("expected redis://, rediss:// or unix://"));
    }
    if url.contains('#') {
        return Err(invalid("a fragment has no meaning here (and TLS is never unchecked)"));
    }
    // The client's message says which part is wrong and holds none of it, but for the protocol's number.
    let info: ConnectionInfo = url.into_connection_info().map_err(|error| invalid(&error.to_string()))?;
    let login = info.redis_settings();
    if login.username().is_some() && login.password().is_none() {
        return Err(invalid("there is a user, but no password"));
    }
    if login.db() < 0 {
        return Err(invalid("the database number is negative"));
    }
    let is_tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
    // RESP3 tells at once when a connection ends; CLIENT SETINFO would need a permission of its own.
    let login = login.clone().set_protocol(ProtocolVersion::RESP3).set_skip_set_lib_name();
    let info = info.set_redis_settings(login).set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let root_cert = settings.ca.as_ref().map(|path| read_authorities(path.get_ref())).transpose()?;
    match (is_tls, root_cert) {
        (true, root_cert) => Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert })
            .map_err(|error| SettingsError::Ca(error.to_string())),
        (false, None) => Client::open(info).map_err(|error| invalid(&error.to_string())),
        (false, Some(_)) => Err(SettingsError::Ca("it is for rediss:// only".into())),
    }
}

fn read_authorities(path: &std::path::Path) -> Result<Vec<u8>, SettingsError> {
    let pem = std::fs::read(path).map_err(|error| SettingsError::Ca(format!("cannot be read: {error}")))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(pem),
        Ok(_) => Err(SettingsError::Ca("there is no certificate in it".into())),
        Err(error) => Err(SettingsError::Ca(format!("is not PEM: {error}"))),
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(reason) => write!(f, "invalid url: {reason}"),
            Self::Prefix(reason) => write!(f, "invalid prefix: {reason}"),
            Self::Ca(reason) => write!(f, "invalid ca: {reason}"),
        }
    }
}

impl Error for SettingsError {}

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
            let store = RedisStore::new(&settings(url)).unwrap();
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
            let error = RedisStore::new(&settings(url)).expect_err(url);
            assert!(matches!(error, SettingsError::Url(_)), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{url}: {error}");
        }
    }

    #[test]
    fn a_prefix_cannot_break_the_hash_tag() {
        for prefix in ["a{b", "a}", "a b", "a\n", "é", &"x".repeat(65)] {
            let settings = model::RedisStore { prefix: Spanned::new(0..0, prefix.into()), ..settings("redis://h") };
            assert!(matches!(RedisStore::new(&settings), Err(SettingsError::Prefix(_))), "{prefix:?}");
        }
        let settings = model::RedisStore { prefix: Spanned::new(0..0, String::new()), ..settings("redis://h") };
        assert!(RedisStore::new(&settings).is_ok());
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
            let error = RedisStore::new(&settings).expect_err(url);
            assert!(matches!(error, SettingsError::Ca(_)), "{}: {error}", path.display());
        }
        let path = file("good.pem", &authority());
        let settings = model::RedisStore { ca: Some(Spanned::new(0..0, path)), ..settings("rediss://h") };
        assert!(RedisStore::new(&settings).is_ok());
    }

    fn authority() -> String {
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem()
    }

    #[test]
    fn no_is_told_from_not_now() {
        let cases = [
            ("-LOADING Redis is loading", false),
            ("-READONLY You can't write", false),
            ("-CLUSTERDOWN down", false),
            ("-MASTERDOWN Link with MASTER is down", false),
            ("-TRYAGAIN Multiple keys", false),
            ("-NOREPLICAS Not enough", false),
            ("-BUSY Redis is busy", false),
            ("-OOM command not allowed", true),
            ("-NOPERM no permissions", true),
            ("-WRONGTYPE Operation", true),
            ("-NOAUTH Authentication required.", true),
            ("-WRONGPASS invalid", true),
            ("-MISCONF Redis is configured", true),
            ("-ERR anything", true),
        ];
        for (reply, refused) in cases {
            let reply = redis::parse_redis_value(format!("{reply}\r\n").as_bytes()).unwrap();
            let error = reply.extract_error().unwrap_err();
            assert_eq!(matches!(store_error(&error), StoreError::Refused(_)), refused, "{error}");
        }
        let io = RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        assert!(matches!(store_error(&io), StoreError::Unavailable(_)));
        assert!(matches!(store_error(&senseless()), StoreError::Unavailable(_)) && ends_trust(&senseless()));
    }

    #[test]
    fn without_a_runtime_the_store_is_unavailable_and_nothing_panics() {
        let store = RedisStore::new(&settings("redis://127.0.0.1")).unwrap();
        assert!(matches!(store.link(), Err(StoreError::Unavailable(_))));
    }
}
