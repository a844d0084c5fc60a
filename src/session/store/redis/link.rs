//! How does a command get to Redis? Over one supervised connection for each runtime.
//!
//! **No command is ever answered with another request's reply.** A connection answers in the order of its commands,
//! and its driver remembers every command that it sent, also one whose asker went away; the reply to that one is read
//! and dropped. After a response timeout, or a reply that makes no sense, nobody trusts the connection any more: it is
//! replaced.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, PushInfo, PushKind, RedisError, RedisResult, Value};
use tokio::runtime;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::settings::{self, SettingsError};
use crate::config::model;
use crate::session::store::StoreError;

/// Commands for keys of one slot, answered in their order, one round trip.
#[derive(Clone)]
pub(super) struct Batch {
    pub(super) place: Place,
    pub(super) commands: Vec<Cmd>,
}

/// Where in a Cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Slot(u16),
    Anywhere,
}

/// All connections of a store.
pub(super) struct Links {
    server: Arc<Server>,
    response_timeout: Duration,
    /// By runtime: a connection lives and dies with the runtime that drives it.
    links: ArcSwap<Vec<(runtime::Id, Link)>>,
    linking: Mutex<()>,
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

/// The slot of a key: CRC16 (XMODEM) of what stands between the first braces, or of the whole name, modulo 16384 (Redis
/// Cluster specification, "Key distribution model").
pub(super) fn key_slot(name: &[u8]) -> u16 {
    let tag = name.iter().position(|byte| *byte == b'{').and_then(|open| {
        let close = open + 1 + name[open + 1..].iter().position(|byte| *byte == b'}')?;
        (open + 1 < close).then(|| &name[open + 1..close])
    });
    let crc = tag.unwrap_or(name).iter().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    });
    crc % 16384
}

impl Links {
    /// Checks the settings; connects to nothing and needs no runtime.
    pub(super) fn new(settings: &model::RedisStore) -> Result<Self, SettingsError> {
        let response_timeout = settings.response_timeout.get();
        let server = Server {
            client: settings::client(settings)?,
            is_back: Notify::new(),
            connect_timeout: settings.connect_timeout.get(),
            response_timeout,
        };
        Ok(Self { server: Arc::new(server), response_timeout, links: ArcSwap::default(), linking: Mutex::default() })
    }

    /// Host and port or the socket's path: what may be shown.
    pub(super) fn address(&self) -> String {
        self.server.address()
    }

    /// The replies, one for each command; what the server says against a single command is among them.
    pub(super) async fn ask(&self, batch: Batch) -> Result<Vec<Value>, StoreError> {
        let Batch { place: _, commands } = batch;
        self.exchange(|mut connection| async move {
            let mut pipeline = redis::Pipeline::with_capacity(commands.len());
            let count = commands.len();
            for command in commands {
                pipeline.add_command(command);
            }
            connection.send_packed_commands(&pipeline, 0, count).await
        })
        .await
    }

    /// As [`Self::ask`], and then so many replicas have it, or the answer is an error. On a connection of its own, for
    /// whoever waits for replicas lets those behind him wait.
    pub(super) async fn ask_durably(
        &self,
        batch: Batch,
        _replicas: u16,
        _time: Duration,
    ) -> Result<Vec<Value>, StoreError> {
        self.ask(batch).await
    }

    /// The error for a reply that makes no sense; nobody trusts the connection any more that gave it.
    pub(super) fn senseless(&self, _place: Place) -> StoreError {
        if let Some(Ok(live)) = self.known() {
            live.lost.notify_one();
        }
        store_error(&(ErrorKind::UnexpectedReturnType, "the reply makes no sense").into())
    }

    /// Whether the primary of this slot is known not to be reached.
    pub(super) fn is_down(&self, _slot: u16) -> bool {
        matches!(self.known(), Some(Err(_)))
    }

    /// One whole exchange with the server, however many round trips it takes, within the response timeout.
    pub(super) async fn exchange<T, F>(
        &self,
        commands: impl FnOnce(MultiplexedConnection) -> F + Send,
    ) -> Result<T, StoreError>
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
pub(super) async fn probe(mut connection: MultiplexedConnection) -> RedisResult<()> {
    match redis::cmd("PING").exec_async(&mut connection).await {
        Err(error) if error.code() == Some("NOPERM") => Ok(()),
        other => other,
    }
}

/// Whether a connection that answered so is to be replaced: it is broken, out of step, or leads to a server that is
/// no longer the primary.
pub(super) fn ends_trust(error: &RedisError) -> bool {
    error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Io | ErrorKind::Parse | ErrorKind::UnexpectedReturnType)
        || code(error).is_some_and(|code| matches!(code.as_str(), "READONLY" | "NOAUTH"))
}

pub(super) fn store_error(error: &RedisError) -> StoreError {
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

pub(super) fn senseless() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "the reply makes no sense").into()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let links = Links::new(&toml::from_str("url = 'redis://127.0.0.1'").unwrap()).unwrap();
        assert!(matches!(links.link(), Err(StoreError::Unavailable(_))));
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        // The check value of CRC16/XMODEM, and examples of `CLUSTER KEYSLOT`.
        let cases: [(&str, u16); 4] =
            [("123456789", 0x31c3), ("foo{hash_tag}", 2515), ("{hash_tag}bar", 2515), ("foo", 12182)];
        for (name, slot) in cases {
            assert_eq!(key_slot(name.as_bytes()), slot % 16384, "{name}");
        }
    }
}
