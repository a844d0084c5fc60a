//! How does a command get to Redis? To the primary of its slot, over the one connection that this runtime has to it.
//!
//! **No command is ever answered with another request's reply.** A connection answers in the order of its commands,
//! and its driver remembers every command that it sent, also one whose asker went away; the reply to that one is read
//! and dropped. After a response timeout, or a reply that makes no sense, nobody trusts the connection any more: it is
//! replaced.
//!
//! **Nobody waits for a server that is known to be down**, and nobody longer than the response timeout in total,
//! wherever he is sent on the way.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use redis::{Cmd, Pipeline, RedisResult, Value};
use tokio::runtime;
use tokio::time::{Instant, sleep, timeout_at};

use super::dial::{Dialer, Live, Role};
use super::failure::{Failure, ends_trust, reply_ends_trust, senseless, server_error, store_error};
use super::read::Flights;
use super::settings::{self, SettingsError};
use super::supervise::{Copies, Link, Rhythm};
use super::topology::{Primary, Topology, redirection};
use crate::config::model::{self, Cache};
use crate::session::cache::{LeaseCache, Limits};
use crate::session::id::{BUCKETS, bucket_text};
use crate::session::store::StoreError;

/// Commands for keys of one slot, answered in their order, one round trip. No transaction: a Cluster whose slots are
/// moving may answer one command here and the next one there.
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
    topology: Arc<Topology>,
    address: String,
    rhythm: Rhythm,
    cache_limits: Option<Limits>,
    /// By runtime: a connection lives and dies with the runtime that drives it.
    runtimes: ArcSwap<Vec<(runtime::Id, Arc<RuntimeLinks>)>>,
    linking: Mutex<()>,
}

type RuntimeLinks = ArcSwap<Vec<Arc<Link>>>;

/// A slot that has moved twice since we asked is a Cluster in turmoil.
const HOPS_MAX: usize = 3;
/// Keys of one command may be on two nodes for a moment while their slot moves.
const TRY_AGAIN_PAUSE: Duration = Duration::from_millis(20);
/// With no copies to keep true: a server that froze is found this much earlier than by the first user who comes.
const BEAT_MAX: Duration = Duration::from_secs(1);
/// So many signs of life within a lease: one may come late.
const BEATS_PER_LEASE: u32 = 4;
const ROLE_LEASE: Duration = Duration::from_secs(3);

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

/// The slot of everything in a bucket, whatever the prefix: its tag alone decides.
pub(super) fn bucket_slot(bucket: u16) -> u16 {
    static SLOTS: LazyLock<Vec<u16>> =
        LazyLock::new(|| (0..BUCKETS).map(|bucket| key_slot(bucket_text(bucket).as_bytes())).collect());
    SLOTS.get(usize::from(bucket)).copied().unwrap_or_default()
}

impl Links {
    /// Checks the settings; connects to nothing and needs no runtime. `bridged`: see [`super::super::StoreOptions`].
    pub(super) fn new(settings: &model::RedisStore, bridged: Duration) -> Result<Self, SettingsError> {
        let url = settings::url(settings)?;
        let dialer = Dialer::new(settings, &url)?;
        let lease = settings.lease.get_ref().get();
        let (cache_limits, beat) = match settings.cache {
            Cache::Off => (None, BEAT_MAX),
            Cache::Coherent => {
                let limits = Limits {
                    sessions_max: settings.cache_sessions_max,
                    bytes_max: settings.cache_bytes.0,
                    lease,
                    role_lease: ROLE_LEASE.max(lease),
                    doubt: Limits::default().doubt.max(bridged),
                    ..Limits::default()
                };
                (Some(limits), (lease / BEATS_PER_LEASE).min(BEAT_MAX))
            }
        };
        Ok(Self {
            address: url.to_string(),
            topology: Arc::new(Topology::new(url.place, dialer)),
            rhythm: Rhythm {
                prefix: settings.prefix.get_ref().as_str().into(),
                beat,
                patience: beat * BEATS_PER_LEASE / 2,
            },
            cache_limits,
            runtimes: ArcSwap::default(),
            linking: Mutex::default(),
        })
    }

    /// Hosts and ports or the socket's path: what may be shown.
    pub(super) fn address(&self) -> String {
        self.address.clone()
    }

    /// The replies, one for each command; what the server says against a single command is among them, but where
    /// another node has the slot, that one was asked.
    pub(super) async fn ask(&self, batch: Batch) -> Result<Vec<Value>, StoreError> {
        Ok(self.answer(batch, None).await?.replies)
    }

    /// As [`Self::ask`], and whether all of it was read on the connection of these copies. What was read elsewhere, of
    /// a slot on its way from one node to another, must not be among them: they are not told when it changes.
    pub(super) async fn read_for(&self, copies: &Copies, batch: Batch) -> Result<(Vec<Value>, bool), StoreError> {
        let Answer { replies, read_on } = self.answer(batch, None).await?;
        let link = read_on.and_then(|primary| self.known_link(&primary));
        let is_tracked = link.and_then(|link| link.copies.clone()).is_some_and(|of| std::ptr::eq(&*of, copies));
        Ok((replies, is_tracked))
    }

    /// As [`Self::ask`], and then so many replicas have it, or the answer is an error. On a connection of its own, for
    /// whoever waits for replicas lets those behind him wait.
    pub(super) async fn ask_durably(
        &self,
        batch: Batch,
        replicas: u16,
        time: Duration,
    ) -> Result<Vec<Value>, StoreError> {
        Ok(self.answer(batch, Some(Patience { replicas, time })).await?.replies)
    }

    /// The first that `look` finds in what this process keeps of the sessions in this slot: this runtime's copies, then
    /// those of the others.
    pub(super) fn search<T>(&self, slot: u16, mut look: impl FnMut(&Arc<LeaseCache>) -> Option<T>) -> Option<T> {
        let own = runtime::Handle::try_current().ok().map(|handle| handle.id());
        let runtimes = self.runtimes.load();
        let is_own = |(id, _): &&(runtime::Id, _)| Some(*id) == own;
        let own_first = runtimes.iter().filter(is_own).chain(runtimes.iter().filter(|runtime| !is_own(runtime)));
        let look_at = |primary: &Arc<Primary>| {
            own_first.into_iter().find_map(|(_, links)| {
                let links = links.load();
                let link = links.iter().find(|link| Arc::ptr_eq(&link.primary, primary) && link.is_kept())?;
                look(&link.copies.as_ref()?.cache)
            })
        };
        self.topology.with_primary(Place::Slot(slot), look_at)?
    }

    /// Whatever this process keeps of the sessions in this slot.
    pub(super) fn each_cache(&self, slot: u16, mut tell: impl FnMut(&Arc<LeaseCache>)) {
        self.search(slot, |cache| {
            tell(cache);
            None::<()>
        });
    }

    /// Copies that this process keeps.
    pub(super) fn kept(&self) -> usize {
        let kept_on = |link: &Arc<Link>| link.copies.as_ref().map_or(0, |copies| copies.cache.sessions());
        self.runtimes.load().iter().map(|(_, links)| links.load().iter().map(kept_on).sum::<usize>()).sum()
    }

    /// What this runtime keeps, with the reads that are under way; begins to connect where there is no link yet. Who comes
    /// while the server is known to be down is told so at once.
    pub(super) async fn copies(&self, slot: u16) -> Result<Option<Arc<Copies>>, StoreError> {
        let primary = self.topology.find(Place::Slot(slot)).await?;
        let link = self.link(&primary)?;
        match link.known() {
            Some(Err(failure)) => Err(failure.into()),
            Some(Ok(_)) | None => Ok(link.copies.clone()),
        }
    }

    /// Whether the primary of this slot is known not to be reached.
    pub(super) fn is_down(&self, slot: u16) -> bool {
        match self.topology.primary(Place::Slot(slot)) {
            Some(primary) => {
                self.known_link(&primary).is_some_and(|link| link.known().is_some_and(|known| known.is_err()))
            }
            None => self.topology.is_lost(),
        }
    }

    /// The replies of each primary, with its address.
    pub(super) async fn ask_each<const N: usize>(
        &self,
        commands: &Pipeline,
    ) -> Result<Vec<(String, Result<[Value; N], StoreError>)>, StoreError> {
        let dialer = &self.topology.dialer;
        self.topology.find(Place::Anywhere).await?;
        let mut answers = Vec::new();
        for primary in self.topology.primaries() {
            let answer = async {
                let live = self.live(&primary, None, Instant::now() + dialer.connect_timeout).await?;
                live.ask_within(dialer.response_timeout, commands).await
            };
            answers.push((primary.address.to_string(), answer.await.map_err(StoreError::from)));
        }
        Ok(answers)
    }

    /// The error for a reply that makes no sense; nobody trusts the connection any more that gave it.
    pub(super) fn senseless(&self, place: Place) -> StoreError {
        let link = self.topology.primary(place).and_then(|primary| self.known_link(&primary));
        if let Some(Ok(live)) = link.and_then(|link| link.known()) {
            live.give_up();
        }
        store_error(&senseless())
    }

    /// Follows a batch to wherever it is answered.
    async fn answer(&self, batch: Batch, patience: Option<Patience>) -> Result<Answer, Failure> {
        let dialer = &self.topology.dialer;
        let first_connection = Instant::now() + dialer.connect_timeout;
        let mut primary = self.topology.find(batch.place).await?;
        let mut live = self.live(&primary, patience, first_connection).await?;
        let limit = dialer.response_timeout + patience.map_or(Duration::ZERO, |patience| patience.time);
        let deadline = Instant::now() + limit;
        let mut answers: Vec<Option<Value>> = batch.commands.iter().map(|_| None).collect();
        let mut is_asking = false;
        let mut was_led_on = false;
        let mut tried_again = false;
        for hop in 0..=HOPS_MAX {
            let open: Vec<usize> = (0..answers.len()).filter(|index| answers[*index].is_none()).collect();
            let commands = open.iter().map(|index| &batch.commands[*index]);
            let asked = send(&live, commands, is_asking, patience);
            let replies = match timeout_at(deadline, asked).await {
                Ok(Ok(replies)) => replies,
                Ok(Err(error)) => {
                    if ends_trust(&error) {
                        live.give_up();
                    }
                    return Err(Failure::of(&error));
                }
                Err(_elapsed) => {
                    live.give_up();
                    return Err(Failure::no_answer_within(limit));
                }
            };
            let mut elsewhere = None;
            for (index, reply) in open.iter().zip(replies.answers) {
                if reply_ends_trust(&reply) {
                    live.give_up();
                    self.topology.ask_again();
                }
                let next = server_error(&reply).and_then(|error| Next::of(error, &primary));
                match next {
                    // Of several the first: they are all of one slot.
                    Some(next) if hop < HOPS_MAX => {
                        elsewhere.get_or_insert(next);
                    }
                    Some(_) | None => answers[*index] = Some(reply),
                }
            }
            let was_asking = std::mem::take(&mut is_asking);
            match elsewhere {
                None => {
                    replies
                        .replicated
                        .map_or(Ok(()), |count| patience.map_or(Ok(()), |patience| patience.judge(count)))?;
                    break;
                }
                Some(Next::Moved(slot, address)) => {
                    was_led_on = true;
                    primary = self.topology.moved(slot, &address);
                }
                Some(Next::Asked(address)) => {
                    (is_asking, was_led_on) = (true, true);
                    primary = self.topology.at(&address);
                }
                Some(Next::Later) if tried_again => {
                    return Err(Failure::not_now("the slot of these keys is moving to another node"));
                }
                Some(Next::Later) => {
                    (tried_again, is_asking) = (true, was_asking);
                    sleep(TRY_AGAIN_PAUSE).await;
                    continue;
                }
            }
            live = self.live(&primary, patience, deadline).await?;
        }
        let replies = answers.into_iter().map(|answer| answer.ok_or_else(|| Failure::of(&senseless())));
        Ok(Answer { replies: replies.collect::<Result<_, _>>()?, read_on: (!was_led_on).then_some(primary) })
    }

    async fn live(
        &self,
        primary: &Arc<Primary>,
        patience: Option<Patience>,
        deadline: Instant,
    ) -> Result<Arc<Live>, Failure> {
        let link = self.link(primary)?;
        let live = link.live(deadline).await?;
        match patience {
            None => Ok(live),
            // Boxed, because it is long and rare: what every read would carry along otherwise is 4 KiB.
            Some(_) => Box::pin(self.patient(&link, deadline)).await,
        }
    }

    /// The connection for those who wait for replicas, made when the first of them comes.
    async fn patient(&self, link: &Link, deadline: Instant) -> Result<Arc<Live>, Failure> {
        let attempt = async {
            let mut patient = link.patient.lock().await;
            if let Some(live) = &*patient
                && !live.is_lost()
            {
                return Ok(Arc::clone(live));
            }
            let live = Arc::new(self.topology.dialer.dial(&link.primary.address, Role::Server, |_| {}).await?);
            self.topology.verify(&live).await?;
            *patient = Some(Arc::clone(&live));
            Ok(live)
        };
        match timeout_at(deadline, attempt).await {
            Ok(live) => live,
            Err(_elapsed) => Err(Failure::not_now("no connection yet")),
        }
    }

    /// The hot path: this runtime's link to a primary, if it has one.
    fn known_link(&self, primary: &Primary) -> Option<Arc<Link>> {
        let id = runtime::Handle::try_current().ok()?.id();
        let runtimes = self.runtimes.load();
        let (_, links) = runtimes.iter().find(|(runtime, _)| *runtime == id)?;
        let links = links.load();
        let link = links.iter().find(|link| std::ptr::eq(&*link.primary, primary) && link.is_kept())?;
        Some(Arc::clone(link))
    }

    /// This runtime's link, made when there is none.
    fn link(&self, primary: &Arc<Primary>) -> Result<Arc<Link>, Failure> {
        if let Some(link) = self.known_link(primary) {
            return Ok(link);
        }
        let handle = runtime::Handle::try_current().map_err(Failure::not_now)?;
        if primary.is_retired() {
            return Err(Failure::not_now("the server is a primary no more"));
        }
        let _one_at_a_time = self.linking.lock();
        // Ids of runtimes that are gone are used again, and links end with their primary: those go first.
        let mut runtimes: Vec<_> = (**self.runtimes.load()).clone();
        runtimes.retain(|(id, links)| *id == handle.id() || links.load().iter().any(|link| link.is_kept()));
        let own = match runtimes.iter().find(|(id, _)| *id == handle.id()) {
            Some((_, links)) => Arc::clone(links),
            None => {
                let links = Arc::new(RuntimeLinks::default());
                runtimes.push((handle.id(), Arc::clone(&links)));
                links
            }
        };
        let mut links: Vec<_> = own.load().iter().filter(|link| link.is_kept()).cloned().collect();
        let link = match links.iter().find(|link| Arc::ptr_eq(&link.primary, primary)) {
            Some(link) => Arc::clone(link),
            None => {
                let copies = self.cache_limits.map(|limits| Arc::new(self.new_copies(limits)));
                let link = Link::start(&handle, &self.topology, primary, copies, self.rhythm.clone());
                links.push(Arc::clone(&link));
                link
            }
        };
        own.store(Arc::new(links));
        self.runtimes.store(Arc::new(runtimes));
        Ok(link)
    }

    /// The limits are an instance's, and shared out evenly: to its workers, one per core, and to the primaries.
    fn new_copies(&self, limits: Limits) -> Copies {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let shares = workers * self.topology.primaries().len().max(1);
        let limits = Limits {
            sessions_max: (limits.sessions_max / shares).max(1),
            bytes_max: (limits.bytes_max / shares as u64).max(1),
            ..limits
        };
        Copies { cache: Arc::new(LeaseCache::new(limits)), flights: Flights::new(limits.lease) }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.topology.close();
    }
}

/// How long who asks is ready to wait, and for how many replicas.
#[derive(Clone, Copy)]
struct Patience {
    replicas: u16,
    time: Duration,
}

impl Patience {
    fn judge(self, replicated: u64) -> Result<(), Failure> {
        if u64::from(self.replicas) <= replicated {
            return Ok(());
        }
        let Self { replicas, time } = self;
        Err(Failure::not_now(format_args!("done, but after {time:?} {replicated} of {replicas} replicas had it")))
    }
}

/// To a whole batch.
struct Answer {
    replies: Vec<Value>,
    /// The one that gave all of them, and was the first to be asked.
    read_on: Option<Arc<Primary>>,
}

/// From one server.
struct Replies {
    answers: Vec<Value>,
    /// The replicas that have it.
    replicated: Option<u64>,
}

async fn send(
    live: &Live,
    commands: impl Iterator<Item = &Cmd>,
    is_asking: bool,
    patience: Option<Patience>,
) -> RedisResult<Replies> {
    let mut pipeline = Pipeline::new();
    let mut count = 0;
    for command in commands {
        // Holds for the one command that follows it.
        if is_asking {
            pipeline.cmd("ASKING");
        }
        pipeline.add_command(command.clone());
        count += if is_asking { 2 } else { 1 };
    }
    if let Some(Patience { replicas, time }) = patience {
        // 0 would wait for ever.
        pipeline.cmd("WAIT").arg(replicas).arg(u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1));
        count += 1;
    }
    let mut answers = live.ask(&pipeline, count).await?;
    let replicated = match patience.and_then(|_| answers.pop()) {
        None => None,
        // What was not done has no replicas to wait for: the reason says more than what became of the wait.
        Some(_) if answers.iter().any(|answer| server_error(answer).is_some()) => None,
        Some(Value::Int(replicas)) => Some(u64::try_from(replicas).unwrap_or_default()),
        Some(Value::ServerError(error)) => return Err(error.into()),
        Some(_) => return Err(senseless()),
    };
    if is_asking {
        answers = answers.into_iter().skip(1).step_by(2).collect();
    }
    Ok(Replies { answers, replicated })
}

/// Where to ask next, when the answer is not to be had here.
enum Next {
    Moved(u16, crate::config::redis_url::RedisAddress),
    Asked(crate::config::redis_url::RedisAddress),
    /// Here, in a moment.
    Later,
}

impl Next {
    fn of(error: &redis::ServerError, asked: &Primary) -> Option<Self> {
        let led = || redirection(error.details()?, &asked.address);
        match error.code() {
            "MOVED" => led().map(|(slot, address)| Self::Moved(slot, address)),
            "ASK" => led().map(|(_, address)| Self::Asked(address)),
            "TRYAGAIN" => Some(Self::Later),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_runtime_the_store_is_unavailable_and_nothing_panics() {
        let links = Links::new(&toml::from_str("url = 'redis://127.0.0.1'").unwrap(), Duration::ZERO).unwrap();
        let primary = links.topology.primary(Place::Anywhere).unwrap();
        assert!(links.link(&primary).is_err_and(|failure| !failure.is_refusal));
        assert!(links.search(0, |_| Some(())).is_none() && !links.is_down(0));
        for url in ["redis+sentinel://127.0.0.1/m", "redis+cluster://127.0.0.1"] {
            let links = Links::new(&toml::from_str(&format!("url = '{url}'")).unwrap(), Duration::ZERO).unwrap();
            assert!(links.search(0, |_| Some(())).is_none() && !links.is_down(0));
            links.topology.follow();
        }
    }

    #[test]
    fn what_every_read_carries_along_is_small() {
        let links = Links::new(&toml::from_str("url = 'redis://127.0.0.1'").unwrap(), Duration::ZERO).unwrap();
        let bytes = size_of_val(&links.ask(Batch { place: Place::Anywhere, commands: Vec::new() }));
        assert!(bytes < 3 * 1024, "{bytes} bytes are moved and allocated for each");
    }

    #[test]
    fn an_ending_is_remembered_for_as_long_as_anybody_may_be_served_without_the_store() {
        let settings: model::RedisStore = toml::from_str("url = 'redis://127.0.0.1'").unwrap();
        for minutes in [0, 5, 60] {
            let bridged = Duration::from_secs(minutes * 60);
            let limits = Links::new(&settings, bridged).unwrap().cache_limits.unwrap();
            assert!(bridged <= limits.doubt, "{minutes} min");
        }
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        // The check value of CRC16/XMODEM, and examples of `CLUSTER KEYSLOT`.
        let cases: [(&str, u16); 4] =
            [("123456789", 0x31c3), ("foo{hash_tag}", 2515), ("{hash_tag}bar", 2515), ("foo", 12182)];
        for (name, slot) in cases {
            assert_eq!(key_slot(name.as_bytes()), slot % 16384, "{name}");
        }
        for bucket in [0, 1, 63, 64, BUCKETS - 1] {
            let name = format!("cloakroom:s:{{{}}}:x", bucket_text(bucket));
            assert_eq!(bucket_slot(bucket), key_slot(name.as_bytes()), "{name}");
        }
    }
}
