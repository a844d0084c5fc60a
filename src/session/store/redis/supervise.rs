//! Is this connection still good? One task for each runtime and primary keeps one, and proves again and again that it
//! is alive and that what it leads to is the primary.
//!
//! The proof is a heartbeat, and it is a *write*. Its reply shows that all pushes which were sent before it are here, as
//! that of any command would; and that the server is the authority, which that of a `PING` would not: one that was
//! demoted, cut off from its replicas or left behind by its Cluster refuses writes while it goes on answering pings. The
//! write is a `PEXPIREAT` of a key that is never there: it changes nothing, goes into no file and to no replica, and works
//! when the memory is full.

use std::sync::Arc;
use std::time::Duration;

use redis::{Pipeline, PushInfo, PushKind, RedisError, Value};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, MissedTickBehavior, sleep, timeout};

use super::dial::{Live, Role};
use super::failure::{Failure, senseless};
use super::read::Flights;
use super::topology::{Primary, Topology, Trouble};
use crate::session::cache::{Beat, Connection, LeaseCache};
use crate::session::id::{SessionKey, bucket_text};

/// What one runtime has of one primary.
pub(super) struct Link {
    pub(super) primary: Arc<Primary>,
    state: watch::Receiver<State>,
    pub(super) copies: Option<Arc<Copies>>,
    /// For those who wait for replicas, for they let those behind them wait.
    pub(super) patient: Mutex<Option<Arc<Live>>>,
}

pub(super) enum State {
    /// The very first attempt is under way.
    Connecting,
    Up(Arc<Live>),
    Down(Failure),
}

/// The copies of one runtime towards one primary, and the reads that are under way for them.
pub(super) struct Copies {
    pub(super) cache: Arc<LeaseCache>,
    pub(super) flights: Flights,
}

/// How links of a store are kept.
#[derive(Clone)]
pub(super) struct Rhythm {
    /// What every key begins with.
    pub(super) prefix: Arc<str>,
    /// From one sign of life to the next.
    pub(super) beat: Duration,
    /// For one sign of life, at least.
    pub(super) patience: Duration,
}

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Whether the server still tracks what we read is looked at this often.
const TRACKING_CHECK: Duration = Duration::from_secs(30);

impl Link {
    /// Begins to connect, on this runtime.
    pub(super) fn start(
        runtime: &tokio::runtime::Handle,
        topology: &Arc<Topology>,
        primary: &Arc<Primary>,
        copies: Option<Arc<Copies>>,
        rhythm: Rhythm,
    ) -> Arc<Self> {
        let (sender, state) = watch::channel(State::Connecting);
        let supervisor = Supervisor {
            topology: Arc::clone(topology),
            primary: Arc::clone(primary),
            copies: copies.clone(),
            rhythm,
            trouble: None,
            heartbeat_is_permitted: true,
            demotion_is_told: false,
        };
        runtime.spawn(supervisor.run(sender));
        Arc::new(Self { primary: Arc::clone(primary), state, copies, patient: Mutex::default() })
    }

    /// Whether its supervisor lives.
    pub(super) fn is_kept(&self) -> bool {
        self.state.has_changed().is_ok()
    }

    /// The hot path. None when nothing is known yet.
    pub(super) fn known(&self) -> Option<Result<Arc<Live>, Failure>> {
        match &*self.state.borrow() {
            State::Up(live) => Some(Ok(Arc::clone(live))),
            State::Down(failure) => Some(Err(failure.clone())),
            State::Connecting => None,
        }
    }

    /// Waits for the first attempt to end, until then at most.
    pub(super) async fn live(&self, deadline: Instant) -> Result<Arc<Live>, Failure> {
        if let Some(known) = self.known() {
            return known;
        }
        let mut state = self.state.clone();
        let first_attempt = state.wait_for(|state| !matches!(state, State::Connecting));
        match tokio::time::timeout_at(deadline, first_attempt).await {
            Ok(Ok(state)) => match &*state {
                State::Up(live) => Ok(Arc::clone(live)),
                State::Down(failure) => Err(failure.clone()),
                State::Connecting => Err(Failure::not_now("still connecting")),
            },
            Ok(Err(_closed)) => {
                Err(Failure::not_now("the server is a primary no more, or the runtime is shutting down"))
            }
            Err(_elapsed) => Err(Failure::not_now("no connection yet")),
        }
    }
}

/// Why a connection is not watched any more.
enum End {
    Lost(Failure),
    /// It is alive, but leads to a server that is no primary now.
    Demoted(Failure),
}

struct Supervisor {
    topology: Arc<Topology>,
    primary: Arc<Primary>,
    copies: Option<Arc<Copies>>,
    rhythm: Rhythm,
    /// As long as it is not reached.
    trouble: Option<Trouble>,
    heartbeat_is_permitted: bool,
    demotion_is_told: bool,
}

/// A connection and the name by which the cache knows it; to the cache it is lost when this goes.
struct Tracked {
    live: Arc<Live>,
    copies: Option<(Arc<Copies>, Connection)>,
}

impl Tracked {
    fn forsake_copies(&mut self) {
        if let Some((copies, connection)) = self.copies.take() {
            copies.cache.disconnected(connection);
        }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.forsake_copies();
    }
}

impl Supervisor {
    /// For as long as the store, the runtime and the primary's office last.
    async fn run(mut self, state: watch::Sender<State>) {
        let primary = Arc::clone(&self.primary);
        tokio::select! {
            () = self.keep_connected(&state) => {}
            () = state.closed() => {}
            () = primary.retirement() => {}
        }
    }

    async fn keep_connected(&mut self, state: &watch::Sender<State>) {
        let address = self.primary.address.to_string();
        let mut backoff = BACKOFF_MIN;
        let mut is_told = false;
        loop {
            self.topology.follow();
            let mut connection = match self.connect().await {
                Ok(connection) => connection,
                Err(failure) => {
                    if !is_told {
                        is_told = true;
                        tracing::warn!(address, cause = &*failure.cause, "redis is down");
                    }
                    self.is_down(state, failure);
                    self.pause(&mut backoff).await;
                    continue;
                }
            };
            tracing::info!(address, "redis is connected");
            is_told = true;
            let failure = loop {
                let since = Instant::now();
                state.send_replace(State::Up(Arc::clone(&connection.live)));
                self.trouble = None;
                let end = self.watch(&connection).await;
                // A connection that did not last is no reason to hurry.
                if BACKOFF_MAX < since.elapsed() {
                    backoff = BACKOFF_MIN;
                }
                match end {
                    End::Lost(failure) => break failure,
                    // A name may lead elsewhere by now. Until it does, this one can at least be read.
                    End::Demoted(failure) if self.topology.is_fixed() => {
                        if !std::mem::replace(&mut self.demotion_is_told, true) {
                            tracing::warn!(address, cause = &*failure.cause, "redis is no primary");
                        }
                        connection.forsake_copies();
                        tokio::select! {
                            () = sleep(next_pause(&mut backoff)) => {}
                            () = connection.live.lost.notified() => break failure,
                        }
                        match self.connect().await {
                            Ok(successor) => connection = successor,
                            Err(failure) => break failure,
                        }
                    }
                    End::Demoted(failure) => break failure,
                }
            };
            tracing::warn!(address, cause = &*failure.cause, "redis is down");
            drop(connection);
            self.is_down(state, failure);
            self.pause(&mut backoff).await;
        }
    }

    fn is_down(&mut self, state: &watch::Sender<State>, failure: Failure) {
        state.send_replace(State::Down(failure));
        if self.trouble.is_none() {
            self.trouble = Some(self.topology.trouble(&self.primary));
        }
    }

    /// Not longer than until another runtime has found the server.
    async fn pause(&self, backoff: &mut Duration) {
        let _ = timeout(next_pause(backoff), self.primary.is_back.notified()).await;
    }

    /// A connection that has answered, leads to a primary, and tracks what is read on it.
    async fn connect(&self) -> Result<Tracked, Failure> {
        let copies = self.copies.as_ref().map(|copies| (Arc::clone(copies), copies.cache.connecting()));
        let on_push = {
            let (copies, prefix) = (copies.clone(), Arc::clone(&self.rhythm.prefix));
            move |push: &PushInfo| {
                if let Some((copies, connection)) = &copies {
                    heed(&copies.cache, *connection, &prefix, push);
                }
            }
        };
        let dialer = &self.topology.dialer;
        let live = Arc::new(dialer.dial(&self.primary.address, Role::Server, on_push).await?);
        self.topology.verify(&live).await?;
        if !self.topology.is_confirmed() {
            self.verify_authority(&live).await?;
        }
        let Some((copies, connection)) = copies else { return Ok(Tracked { live, copies: None }) };
        // Default mode, and no NOLOOP: that would hide others' changes after one of ours.
        let mut tracking = redis::pipe();
        tracking.cmd("CLIENT").arg("TRACKING").arg("ON");
        match live.ask_within(dialer.response_timeout, &tracking).await? {
            [Value::Okay] => {
                copies.cache.connected(connection);
                Ok(Tracked { live, copies: Some((copies, connection)) })
            }
            [Value::ServerError(error)] => {
                tracing::warn!(%error, "redis does not track what is read: every request asks it");
                Ok(Tracked { live, copies: None })
            }
            [_] => Err(Failure::of(&senseless())),
        }
    }

    /// No sentinel tells us who is the primary now: it may be alone with us. Before anything is read from it, it must
    /// show that it takes writes.
    async fn verify_authority(&self, live: &Live) -> Result<(), Failure> {
        let bucket = self.topology.bucket_of(&self.primary).unwrap_or_default();
        match live.ask_within(self.topology.dialer.response_timeout, &self.heartbeat(bucket)).await? {
            [Value::Int(_)] => Ok(()),
            [Value::ServerError(error)] => Err(Failure::not_now(RedisError::from(error))),
            [_] => Err(Failure::of(&senseless())),
        }
    }

    fn heartbeat(&self, bucket: u16) -> Pipeline {
        let mut write = redis::pipe();
        let name = format!("{}hb:{{{}}}", self.rhythm.prefix, bucket_text(bucket));
        write.cmd("PEXPIREAT").arg(name).arg(1);
        write
    }

    /// Returns when the connection is not to be used any more, and why.
    async fn watch(&mut self, connection: &Tracked) -> End {
        let live = &connection.live;
        let mut beats = tokio::time::interval_at(Instant::now() + self.rhythm.beat, self.rhythm.beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tracking_checked = Instant::now();
        let mut is_proven = false;
        loop {
            if let Err(end) = self.beat(connection).await {
                return end;
            }
            // Not before: runtimes that a bad server lets in, and loses at once, would call each other without a pause.
            if !std::mem::replace(&mut is_proven, true) {
                self.primary.is_back.notify_waiters();
            }
            // Whoever followed may have been on a runtime that has ended.
            self.topology.follow();
            if connection.copies.is_some() && TRACKING_CHECK < tracking_checked.elapsed() {
                tracking_checked = Instant::now();
                if let Err(failure) = self.check_tracking(live).await {
                    return End::Lost(failure);
                }
            }
            tokio::select! {
                () = live.lost.notified() => {
                    return End::Lost(Failure::not_now("the connection was lost or stopped answering"));
                }
                _ = beats.tick() => {}
            }
        }
    }

    async fn beat(&mut self, connection: &Tracked) -> Result<(), End> {
        let bucket = if self.heartbeat_is_permitted { self.topology.bucket_of(&self.primary) } else { None };
        let command = match bucket {
            Some(bucket) => self.heartbeat(bucket),
            None => redis::pipe().cmd("PING").clone(),
        };
        let proof = if bucket.is_some() { Beat::Write } else { Beat::Ping };
        let pulse =
            |beat| connection.copies.as_ref().map(|(copies, _)| (&copies.cache, copies.cache.begin_heartbeat(beat)));
        // What is answered with a refusal is still a sign of life.
        let (sign_of_life, authority) = (pulse(Beat::Ping), pulse(proof));
        let finish = |heartbeat: &Option<(&Arc<LeaseCache>, crate::session::cache::Heartbeat)>| {
            if let Some((cache, heartbeat)) = heartbeat {
                cache.finish_heartbeat(heartbeat);
            }
        };
        // On a machine that has too much to do a beat comes late; before the lease ends nothing depends on it.
        let limit = self.topology.dialer.response_timeout.max(self.rhythm.patience);
        let answered = tokio::select! {
            () = connection.live.lost.notified() => {
                return Err(End::Lost(Failure::not_now("the connection was lost or stopped answering")));
            }
            answered = connection.live.ask_within(limit, &command) => answered,
        };
        let [reply] = answered.map_err(End::Lost)?;
        match reply {
            Value::Int(0 | 1) if bucket.is_some() => {
                self.demotion_is_told = false;
                finish(&authority);
            }
            Value::SimpleString(pong) if bucket.is_none() && pong == "PONG" => finish(&authority),
            Value::ServerError(error) => {
                let failure = Failure::of(&error.clone().into());
                match error.code() {
                    // The slot is leaving, and is still its own.
                    "ASK" => finish(&authority),
                    "NOPERM" if bucket.is_some() => {
                        self.heartbeat_is_permitted = false;
                        tracing::warn!(%error, "redis does not permit the heartbeat: every request asks it");
                        finish(&sign_of_life);
                    }
                    "NOPERM" => finish(&sign_of_life),
                    "MOVED" | "CLUSTERDOWN" => {
                        self.topology.ask_again();
                        finish(&sign_of_life);
                    }
                    "READONLY" => return Err(End::Demoted(failure)),
                    "NOAUTH" | "LOADING" | "MASTERDOWN" => return Err(End::Lost(failure)),
                    _ if self.topology.is_confirmed() => finish(&sign_of_life),
                    _ => return Err(End::Lost(failure)),
                }
            }
            _ => return Err(End::Lost(Failure::of(&senseless()))),
        }
        Ok(())
    }

    /// `RESET` or `CLIENT TRACKING OFF` on our connection would leave us with copies that nobody takes back.
    async fn check_tracking(&self, live: &Live) -> Result<(), Failure> {
        let limit = self.topology.dialer.response_timeout;
        match live.ask_within(limit, redis::pipe().cmd("CLIENT").arg("TRACKINGINFO")).await? {
            // Not permitted to look.
            [Value::ServerError(_)] => Ok(()),
            [reply] if tracks(&reply) => Ok(()),
            [_] => Err(Failure::not_now("redis had stopped tracking what is read")),
        }
    }
}

/// Half to all of the backoff, so that instances do not come back in step; the next one is twice as long.
fn next_pause(backoff: &mut Duration) -> Duration {
    let pause = backoff.mul_f64(rand::random_range(0.5..=1.0));
    *backoff = (*backoff * 2).min(BACKOFF_MAX);
    pause
}

/// The flags of `CLIENT TRACKINGINFO` say that everything read is tracked.
fn tracks(reply: &Value) -> bool {
    let text = |value: &Value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::SimpleString(text) => text.clone(),
        _ => String::new(),
    };
    let Value::Map(pairs) = reply else { return false };
    let flags = pairs.iter().find(|(name, _)| text(name) == "flags").map(|(_, flags)| flags);
    let Some(Value::Set(flags) | Value::Array(flags)) = flags else { return false };
    let flags: Vec<_> = flags.iter().map(text).collect();
    flags == ["on"]
}

/// Called by the driver of a connection, in the order of the stream: before any reply that came later is seen (I7).
fn heed(cache: &LeaseCache, connection: Connection, prefix: &str, push: &PushInfo) {
    match push.kind {
        PushKind::Invalidate => match push.data.first() {
            Some(Value::Array(names)) => {
                for name in names {
                    if let Value::BulkString(name) = name
                        && let Some(key) = SessionKey::of_store_key(prefix, name)
                    {
                        cache.invalidate(&key);
                    }
                }
            }
            // FLUSHALL and FLUSHDB name nothing.
            Some(_) | None => cache.flush(),
        },
        PushKind::Disconnection => cache.disconnected(connection),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracking_is_on_only_when_nothing_else_is_said_of_it() {
        let flags = |flags: &str| {
            let reply = format!("%3\r\n$5\r\nflags\r\n{flags}$8\r\nredirect\r\n:0\r\n$8\r\nprefixes\r\n*0\r\n");
            redis::parse_redis_value(reply.as_bytes()).unwrap()
        };
        for (reply, expected) in [
            ("~1\r\n$2\r\non\r\n", true),
            ("~1\r\n$3\r\noff\r\n", false),
            ("~2\r\n$2\r\non\r\n$6\r\nnoloop\r\n", false),
            ("~2\r\n$2\r\non\r\n$5\r\nbcast\r\n", false),
            ("~0\r\n", false),
        ] {
            assert_eq!(tracks(&flags(reply)), expected, "{reply:?}");
        }
        assert!(!tracks(&Value::Nil));
    }
}
