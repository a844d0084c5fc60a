//! Which primary has this slot? One server, the one that the sentinels name, or the nodes of a Cluster.
//!
//! All runtimes of a store share one answer. One task follows the changes, on the runtime of whoever asked first, and on
//! another one when that is gone. Nobody who asks for a slot ever waits here, but for the very first answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use redis::Value;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::dial::{Dialer, Live, Role};
use super::failure::{Failure, server_error};
use super::link::{Place, bucket_slot};
use crate::config::redis_url::{RedisAddress, RedisPlace};
use crate::session::id::BUCKETS;

pub(super) struct Topology {
    place: RedisPlace,
    pub(super) dialer: Dialer,
    map: ArcSwap<Map>,
    drawing: Mutex<()>,
    first_answer: watch::Sender<FirstAnswer>,
    /// Somebody has seen that the map is out of date.
    wanted: watch::Sender<u64>,
    /// Links that are down: as long as there are any, changes are looked for all the time.
    troubles: AtomicUsize,
    /// When a majority of the sentinels last named the primary.
    confirmed: Mutex<Instant>,
    /// The newest agreement that is known, and since when nobody has confirmed it.
    agreement: Mutex<(u64, Instant)>,
    follower: Mutex<Option<JoinHandle<()>>>,
}

/// Who has what.
struct Map {
    primaries: Vec<Arc<Primary>>,
    /// Of a Cluster: for each slot a place in `primaries`, or [`NOBODY`].
    slots: Option<Box<[u16]>>,
}

/// A server that was a primary when the map was drawn, or that one of them has sent us to.
pub(super) struct Primary {
    pub(super) address: RedisAddress,
    /// One runtime has reached it: the others need not wait out their backoff.
    pub(super) is_back: Notify,
    /// Runtimes that do not reach it.
    troubles: AtomicUsize,
    /// It is not on the map any more.
    retired: watch::Sender<bool>,
}

#[derive(Clone)]
enum FirstAnswer {
    Awaited,
    Here,
    /// Still awaited, but this is why.
    Failed(Failure),
}

/// Somebody does not reach a primary, for as long as this lives.
pub(super) struct Trouble {
    topology: Arc<Topology>,
    primary: Arc<Primary>,
}

const SLOTS: usize = 16384;
const NOBODY: u16 = u16::MAX;

/// Without a reason, a Cluster is asked this often, and sentinels, which push, that often.
const CLUSTER_INTERVAL: Duration = Duration::from_secs(10);
const SENTINEL_INTERVAL: Duration = Duration::from_secs(1);
/// With one.
const CLUSTER_INTERVAL_IN_TROUBLE: Duration = Duration::from_millis(100);
const SENTINEL_INTERVAL_IN_TROUBLE: Duration = Duration::from_millis(50);
/// What a sentinel said is believed for so long.
const REPORT_AGE_MAX: Duration = Duration::from_secs(3);
/// Sentinels that know only of an older agreement are not believed for so long; then they have been set up anew.
const AGREEMENT_AGE_MAX: Duration = Duration::from_secs(10);

impl Topology {
    pub(super) fn new(place: RedisPlace, dialer: Dialer) -> Self {
        let (primaries, first_answer) = match &place {
            RedisPlace::Server(address) => (vec![Primary::at(address.clone())], FirstAnswer::Here),
            RedisPlace::Sentinel { .. } | RedisPlace::Cluster(_) => (Vec::new(), FirstAnswer::Awaited),
        };
        Self {
            place,
            dialer,
            map: ArcSwap::from_pointee(Map { primaries, slots: None }),
            drawing: Mutex::default(),
            first_answer: watch::Sender::new(first_answer),
            wanted: watch::Sender::new(0),
            troubles: AtomicUsize::new(0),
            confirmed: Mutex::new(Instant::now()),
            agreement: Mutex::new((0, Instant::now())),
            follower: Mutex::default(),
        }
    }

    /// The hot path. Of [`Place::Anywhere`] one that is reached, if there is one.
    pub(super) fn primary(&self, place: Place) -> Option<Arc<Primary>> {
        self.with_primary(place, Arc::clone)
    }

    /// As [`Self::primary`], without counting one more who has it: all workers would wait for that count.
    pub(super) fn with_primary<T>(&self, place: Place, look: impl FnOnce(&Arc<Primary>) -> T) -> Option<T> {
        let map = self.map.load();
        let primary = match (place, &map.slots) {
            (Place::Slot(slot), Some(slots)) => map.primaries.get(usize::from(*slots.get(usize::from(slot))?)),
            (Place::Slot(_) | Place::Anywhere, None) | (Place::Anywhere, Some(_)) => {
                map.primaries.iter().find(|primary| !primary.is_in_trouble()).or(map.primaries.first())
            }
        };
        primary.map(look)
    }

    pub(super) fn primaries(&self) -> Vec<Arc<Primary>> {
        self.map.load().primaries.clone()
    }

    /// As [`Self::primary`]; waits for the first answer to who is who, at most as long as a connection may take.
    pub(super) async fn find(self: &Arc<Self>, place: Place) -> Result<Arc<Primary>, Failure> {
        if let Some(primary) = self.primary(place) {
            return Ok(primary);
        }
        self.follow();
        let mut first_answer = self.first_answer.subscribe();
        let known = first_answer.wait_for(|answer| !matches!(answer, FirstAnswer::Awaited));
        match timeout(self.dialer.connect_timeout, known).await {
            Ok(Ok(answer)) => {
                if let FirstAnswer::Failed(failure) = &*answer {
                    return Err(failure.clone());
                }
            }
            Ok(Err(_)) => return Err(Failure::not_now("the store is closed")),
            Err(_elapsed) => return Err(Failure::no_answer_within(self.dialer.connect_timeout)),
        }
        self.primary(place).ok_or_else(|| {
            self.ask_again();
            Failure::not_now("no primary of the Cluster has this slot")
        })
    }

    /// Whether nothing is known of who is who, as was found before.
    pub(super) fn is_lost(&self) -> bool {
        matches!(&*self.first_answer.borrow(), FirstAnswer::Failed(_))
    }

    /// The map is out of date.
    pub(super) fn ask_again(&self) {
        self.wanted.send_modify(|times| *times = times.wrapping_add(1));
    }

    /// A node says that another one has this slot now.
    pub(super) fn moved(&self, slot: u16, address: &RedisAddress) -> Arc<Primary> {
        let primary = self.at(address);
        let _one_at_a_time = self.drawing.lock();
        let map = self.map.load();
        let mut slots = map.slots.clone();
        let index = map.primaries.iter().position(|known| Arc::ptr_eq(known, &primary));
        if let (Some(index), Some(slots)) = (index, &mut slots)
            && let Some(owner) = slots.get_mut(usize::from(slot))
        {
            *owner = u16::try_from(index).unwrap_or(NOBODY);
        }
        self.map.store(Arc::new(Map { primaries: map.primaries.clone(), slots }));
        self.ask_again();
        primary
    }

    /// The node at this address, whether or not it has slots.
    pub(super) fn at(&self, address: &RedisAddress) -> Arc<Primary> {
        let _one_at_a_time = self.drawing.lock();
        let map = self.map.load();
        if let Some(known) = map.primaries.iter().find(|known| known.address == *address) {
            return Arc::clone(known);
        }
        let new = Primary::at(address.clone());
        let mut primaries = map.primaries.clone();
        primaries.push(Arc::clone(&new));
        self.map.store(Arc::new(Map { primaries, slots: map.slots.clone() }));
        new
    }

    /// A bucket whose keys are on this primary.
    pub(super) fn bucket_of(&self, primary: &Arc<Primary>) -> Option<u16> {
        let map = self.map.load();
        let Some(slots) = &map.slots else { return Some(0) };
        let index = map.primaries.iter().position(|known| Arc::ptr_eq(known, primary))?;
        (0..BUCKETS).find(|bucket| usize::from(slots[usize::from(bucket_slot(*bucket))]) == index)
    }

    /// Whether this connection leads to a primary, where somebody else has named it as one.
    pub(super) async fn verify(&self, live: &Live) -> Result<(), Failure> {
        match &self.place {
            RedisPlace::Server(_) | RedisPlace::Cluster(_) => Ok(()),
            RedisPlace::Sentinel { .. } => {
                let [reply] = live.ask_within(self.dialer.response_timeout, redis::pipe().cmd("ROLE")).await?;
                match reply {
                    Value::Array(role) if text(role.first()).as_deref() == Some("master") => Ok(()),
                    Value::ServerError(error) => Err(Failure::of(&error.into())),
                    _ => Err(Failure::not_now("the sentinels' primary says that it is a replica")),
                }
            }
        }
    }

    /// Whether a primary that takes no writes may at least be read: not if it may be alone with us, while others have
    /// promoted another one.
    pub(super) fn is_confirmed(&self) -> bool {
        match &self.place {
            RedisPlace::Server(_) | RedisPlace::Cluster(_) => true,
            RedisPlace::Sentinel { .. } => self.confirmed.lock().elapsed() < REPORT_AGE_MAX,
        }
    }

    /// Whether another server may take the place of a primary.
    pub(super) fn is_fixed(&self) -> bool {
        matches!(self.place, RedisPlace::Server(_))
    }

    /// Sees to it that somebody follows the changes.
    pub(super) fn follow(self: &Arc<Self>) {
        if self.is_fixed() {
            return;
        }
        let mut follower = self.follower.lock();
        if follower.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let topology = Arc::clone(self);
        *follower = Some(runtime.spawn(async move {
            match &topology.place {
                RedisPlace::Server(_) => {}
                RedisPlace::Sentinel { sentinels, primary, .. } => topology.follow_sentinels(sentinels, primary).await,
                RedisPlace::Cluster(seeds) => topology.follow_cluster(seeds).await,
            }
        }));
    }

    /// Nobody asks any more.
    pub(super) fn close(&self) {
        if let Some(task) = self.follower.lock().take() {
            task.abort();
        }
    }

    pub(super) fn trouble(self: &Arc<Self>, primary: &Arc<Primary>) -> Trouble {
        primary.troubles.fetch_add(1, Ordering::Relaxed);
        self.troubles.fetch_add(1, Ordering::Relaxed);
        self.ask_again();
        Trouble { topology: Arc::clone(self), primary: Arc::clone(primary) }
    }

    fn is_in_trouble(&self) -> bool {
        0 < self.troubles.load(Ordering::Relaxed) || !matches!(&*self.first_answer.borrow(), FirstAnswer::Here)
    }

    fn known(&self) {
        self.first_answer.send_if_modified(|answer| {
            let is_news = !matches!(answer, FirstAnswer::Here);
            *answer = FirstAnswer::Here;
            is_news
        });
    }

    fn unknown(&self, failure: Failure) {
        self.first_answer.send_if_modified(|answer| match answer {
            FirstAnswer::Here => false,
            FirstAnswer::Awaited | FirstAnswer::Failed(_) => {
                if matches!(answer, FirstAnswer::Awaited) {
                    tracing::warn!(cause = &*failure.cause, "nobody says which redis is the primary");
                }
                *answer = FirstAnswer::Failed(failure);
                true
            }
        });
    }

    /// A new map; primaries that stay keep their connections, those that are gone lose them.
    fn publish(&self, owners: &[(RedisAddress, Vec<(u16, u16)>)], has_slots: bool) {
        let one_at_a_time = self.drawing.lock();
        let before = self.map.load_full();
        let known = |address: &RedisAddress| before.primaries.iter().find(|known| known.address == *address).cloned();
        let primaries: Vec<_> =
            owners.iter().map(|(address, _)| known(address).unwrap_or_else(|| Primary::at(address.clone()))).collect();
        let slots = has_slots.then(|| {
            let mut slots = vec![NOBODY; SLOTS].into_boxed_slice();
            for (index, (_, ranges)) in owners.iter().enumerate() {
                let index = u16::try_from(index).unwrap_or(NOBODY);
                for (first, last) in ranges {
                    slots[usize::from(*first)..=usize::from(*last)].fill(index);
                }
            }
            slots
        });
        let is_kept = |primary: &Arc<Primary>| primaries.iter().any(|kept| Arc::ptr_eq(kept, primary));
        let gone: Vec<_> = before.primaries.iter().filter(|primary| !is_kept(primary)).cloned().collect();
        let is_news = primaries.len() != before.primaries.len() || !gone.is_empty();
        let addresses: Vec<_> = primaries.iter().map(|primary| primary.address.to_string()).collect();
        self.map.store(Arc::new(Map { primaries, slots }));
        drop(one_at_a_time);
        self.known();
        for primary in gone {
            primary.retired.send_replace(true);
        }
        if is_news {
            tracing::info!(primaries = addresses.join(" "), "redis primaries");
        }
    }
}

impl Primary {
    fn at(address: RedisAddress) -> Arc<Self> {
        Arc::new(Self {
            address,
            is_back: Notify::new(),
            troubles: AtomicUsize::new(0),
            retired: watch::Sender::new(false),
        })
    }

    fn is_in_trouble(&self) -> bool {
        0 < self.troubles.load(Ordering::Relaxed)
    }

    pub(super) fn is_retired(&self) -> bool {
        *self.retired.borrow()
    }

    /// Returns when it is not on the map any more.
    pub(super) async fn retirement(&self) {
        let _ = self.retired.subscribe().wait_for(|is_retired| *is_retired).await;
    }
}

impl Drop for Trouble {
    fn drop(&mut self) {
        self.primary.troubles.fetch_sub(1, Ordering::Relaxed);
        self.topology.troubles.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one sentinel says.
struct Report {
    sentinel: usize,
    at: Instant,
    said: Result<Named, Failure>,
}

/// The primary, by one sentinel's knowledge.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    address: RedisAddress,
    /// Of the agreement that made it one: of two sentinels, who has the higher one knows better.
    epoch: u64,
    /// In a failover that this sentinel leads: the replica that it has told to take over.
    promoted: Option<RedisAddress>,
}

impl Topology {
    /// Each sentinel has a connection, which brings its news and is asked besides: a message can be lost.
    async fn follow_sentinels(self: &Arc<Self>, sentinels: &[RedisAddress], primary: &str) {
        let (reports, mut reported) = mpsc::channel(sentinels.len());
        // Ends with this task.
        let mut watchers = tokio::task::JoinSet::new();
        for (index, address) in sentinels.iter().enumerate() {
            let (topology, address, primary) = (Arc::clone(self), address.clone(), primary.to_owned());
            let reports = reports.clone();
            watchers.spawn(async move { topology.watch_sentinel(index, &address, &primary, &reports).await });
        }
        let mut latest: Vec<Option<Report>> = sentinels.iter().map(|_| None).collect();
        while let Some(report) = reported.recv().await {
            let index = report.sentinel;
            latest[index] = Some(report);
            self.judge(&latest).await;
        }
    }

    /// Whom do the sentinels name, and is it one?
    async fn judge(self: &Arc<Self>, latest: &[Option<Report>]) {
        let recent = || latest.iter().flatten().filter(|report| report.at.elapsed() < REPORT_AGE_MAX);
        let named: Vec<&Named> = recent().filter_map(|report| report.said.as_ref().ok()).collect();
        let current = self.primary(Place::Anywhere).map(|primary| primary.address.clone());
        let votes = named.iter().filter(|named| Some(&named.address) == current.as_ref()).count();
        if latest.len() / 2 < votes {
            *self.confirmed.lock() = Instant::now();
        }
        let Some(best) = named.iter().max_by_key(|named| named.epoch).copied() else {
            // Each had its chance to say something.
            if latest.iter().all(Option::is_some) {
                let failure = latest.iter().flatten().find_map(|report| report.said.as_ref().err());
                self.unknown(failure.cloned().unwrap_or_else(|| Failure::not_now("no sentinel answers")));
            }
            return;
        };
        // Who has not heard of the last failover yet would send us back, and the old primary may not know better either.
        let is_stale = {
            let mut agreement = self.agreement.lock();
            if agreement.0 <= best.epoch || AGREEMENT_AGE_MAX < agreement.1.elapsed() {
                *agreement = (best.epoch, Instant::now());
            }
            best.epoch < agreement.0
        };
        if !is_stale && current.as_ref() != Some(&best.address) && self.appoint(&best.address).await {
            return;
        }
        // The leader of a failover has told a replica to take over; when that one says itself that it has, the leader
        // will say so, too, but only after its next look, up to a second later.
        let promoted = named.iter().find_map(|named| named.promoted.as_ref());
        if let Some(promoted) = promoted.filter(|promoted| current.as_ref() != Some(promoted))
            && self.appoint(promoted).await
        {
            *self.agreement.lock() = (best.epoch + 1, Instant::now());
        }
    }

    /// Whether it says itself that it is a primary; then it is ours.
    async fn appoint(&self, candidate: &RedisAddress) -> bool {
        let verified = async {
            let live = self.dialer.dial(candidate, Role::Server, |_| {}).await?;
            self.verify(&live).await
        };
        match verified.await {
            Ok(()) => {
                self.publish(&[(candidate.clone(), Vec::new())], false);
                *self.confirmed.lock() = Instant::now();
                true
            }
            Err(failure) => {
                self.unknown(failure);
                false
            }
        }
    }

    async fn watch_sentinel(
        &self,
        sentinel: usize,
        address: &RedisAddress,
        primary: &str,
        reports: &mpsc::Sender<Report>,
    ) {
        let mut wanted = self.wanted.subscribe();
        loop {
            let failure = match self.listen_to_sentinel(sentinel, address, primary, reports, &mut wanted).await {
                Ok(()) => return,
                Err(failure) => failure,
            };
            if reports.send(Report { sentinel, at: Instant::now(), said: Err(failure) }).await.is_err() {
                return;
            }
            self.pause(SENTINEL_INTERVAL_IN_TROUBLE * 2, SENTINEL_INTERVAL, &mut wanted).await;
        }
    }

    async fn listen_to_sentinel(
        &self,
        sentinel: usize,
        address: &RedisAddress,
        primary: &str,
        reports: &mpsc::Sender<Report>,
        wanted: &mut watch::Receiver<u64>,
    ) -> Result<(), Failure> {
        let news = Arc::new(Notify::new());
        let on_push = {
            let news = Arc::clone(&news);
            move |_: &redis::PushInfo| news.notify_one()
        };
        let limit = self.dialer.response_timeout;
        let live = self.dialer.dial(address, Role::Sentinel, on_push).await?;
        for channel in ["+switch-master", "+promoted-slave"] {
            let [_confirmation] = live.ask_within(limit, redis::pipe().cmd("SUBSCRIBE").arg(channel)).await?;
        }
        loop {
            let mut questions = redis::pipe();
            questions.cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(primary);
            questions.cmd("SENTINEL").arg("MASTER").arg(primary);
            questions.cmd("SENTINEL").arg("REPLICAS").arg(primary);
            let said = Named::read(&live.ask_within(limit, &questions).await?, primary);
            if reports.send(Report { sentinel, at: Instant::now(), said }).await.is_err() {
                return Ok(());
            }
            tokio::select! {
                () = news.notified() => {}
                () = live.lost.notified() => return Err(Failure::not_now("the connection to the sentinel was lost")),
                () = self.pause(SENTINEL_INTERVAL_IN_TROUBLE, SENTINEL_INTERVAL, wanted) => {}
            }
        }
    }

    /// Until the next look is due: the first of these in trouble, else the second, or as soon as there is trouble.
    async fn pause(&self, in_trouble: Duration, else_: Duration, wanted: &mut watch::Receiver<u64>) {
        // Also the least between two looks, whatever happens. All instances are in trouble at the same time, and shall not
        // ask in step.
        sleep(in_trouble.mul_f64(rand::random_range(0.75..1.25))).await;
        if !self.is_in_trouble() {
            let rest = else_.saturating_sub(in_trouble);
            let _ = timeout(rest, wanted.changed()).await;
        }
        wanted.borrow_and_update();
    }
}

impl Named {
    fn read(replies: &[Value; 3], primary: &str) -> Result<Self, Failure> {
        if let Some(error) = replies.iter().find_map(server_error) {
            return Err(Failure::not_now(format_args!("a sentinel says: {error}")));
        }
        let [address, about, replicas] = replies;
        let unknown = || Failure::not_now(format_args!("the sentinels know no primary {primary:?}"));
        let Value::Array(parts) = address else { return Err(unknown()) };
        let address = address_of(parts.first(), parts.get(1)).ok_or_else(unknown)?;
        let epoch = field(about, "config-epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or_default();
        let is_in_failover = has_flag(about, "failover_in_progress");
        let replicas = match replicas {
            Value::Array(replicas) if is_in_failover => replicas.as_slice(),
            _ => &[],
        };
        let promoted = replicas.iter().find(|replica| has_flag(replica, "promoted"));
        let promoted = promoted.and_then(|replica| {
            let port = field(replica, "port")?.parse().ok()?;
            Some(RedisAddress::Tcp { host: field(replica, "ip")?, port })
        });
        Ok(Self { address, epoch, promoted })
    }
}

fn has_flag(about: &Value, flag: &str) -> bool {
    field(about, "flags").is_some_and(|flags| flags.split(',').any(|known| known == flag))
}

/// Of a reply of names and values, as a map or, before RESP3, as an array.
fn field(reply: &Value, name: &str) -> Option<String> {
    match reply {
        Value::Map(pairs) => {
            let (_, value) = pairs.iter().find(|(key, _)| text(Some(key)).as_deref() == Some(name))?;
            text(Some(value))
        }
        Value::Array(items) => {
            let [_, value] =
                items.as_chunks::<2>().0.iter().find(|[key, _]| text(Some(key)).as_deref() == Some(name))?;
            text(Some(value))
        }
        _ => None,
    }
}

fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::BulkString(bytes) => String::from_utf8(bytes.clone()).ok(),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

fn address_of(host: Option<&Value>, port: Option<&Value>) -> Option<RedisAddress> {
    let port = match port? {
        Value::Int(port) => u16::try_from(*port).ok()?,
        other => text(Some(other))?.parse().ok()?,
    };
    let host = text(host).filter(|host| !host.is_empty())?;
    (port != 0).then_some(RedisAddress::Tcp { host, port })
}

impl Topology {
    /// One node after the other is asked, for one alone may be cut off and not know it.
    async fn follow_cluster(self: &Arc<Self>, seeds: &[RedisAddress]) {
        let mut wanted = self.wanted.subscribe();
        let mut nodes: Vec<RedisAddress> = Vec::new();
        let mut turn: usize = rand::random_range(0..=SLOTS);
        loop {
            // Those that are known to be in trouble come last, and the others in turn.
            let in_trouble: Vec<_> = self.primaries().into_iter().filter(|primary| primary.is_in_trouble()).collect();
            let mut candidates: Vec<_> =
                nodes.iter().chain(seeds.iter().filter(|seed| !nodes.contains(seed))).collect();
            turn = turn.wrapping_add(1);
            let count = candidates.len().max(1);
            candidates.rotate_left(turn % count);
            candidates.sort_by_key(|address| in_trouble.iter().any(|primary| primary.address == **address));
            let mut second_best = None;
            let mut failure = Failure::not_now("no node of the Cluster answers");
            let mut best = None;
            for address in candidates {
                match self.ask_node(address).await {
                    Ok(view) if view.is_whole => {
                        best = Some(view);
                        break;
                    }
                    Ok(view) => second_best = second_best.or(Some(view)),
                    Err(reason) => failure = reason,
                }
            }
            match best.or(second_best) {
                Some(view) => {
                    self.publish(&view.owners, true);
                    nodes = view.nodes;
                }
                None => self.unknown(failure),
            }
            self.pause(CLUSTER_INTERVAL_IN_TROUBLE, CLUSTER_INTERVAL, &mut wanted).await;
        }
    }

    async fn ask_node(&self, address: &RedisAddress) -> Result<View, Failure> {
        let live = self.dialer.dial(address, Role::Server, |_| {}).await?;
        let mut questions = redis::pipe();
        questions.cmd("CLUSTER").arg("INFO").cmd("CLUSTER").arg("SLOTS");
        View::read(&live.ask_within(self.dialer.response_timeout, &questions).await?, address)
    }
}

/// A Cluster as one node sees it.
#[derive(Debug, PartialEq, Eq)]
struct View {
    /// This node thinks that all is well. Else it may be one that the others have left behind.
    is_whole: bool,
    owners: Vec<(RedisAddress, Vec<(u16, u16)>)>,
    /// Replicas, too: for asking.
    nodes: Vec<RedisAddress>,
}

impl View {
    fn read([about, slots]: &[Value; 2], asked: &RedisAddress) -> Result<Self, Failure> {
        let senseless = || Failure::not_now("a node of the Cluster makes no sense");
        let ranges = match slots {
            Value::Array(ranges) => ranges,
            Value::ServerError(error) => return Err(Failure::of(&error.clone().into())),
            _ => return Err(senseless()),
        };
        let is_whole = match about {
            Value::BulkString(bytes) => bytes.windows(16).any(|part| part == b"cluster_state:ok"),
            Value::VerbatimString { text, .. } => text.contains("cluster_state:ok"),
            // Without the permission to ask, it is believed.
            _ => true,
        };
        let mut view = Self { is_whole, owners: Vec::new(), nodes: Vec::new() };
        for range in ranges {
            let Value::Array(range) = range else { return Err(senseless()) };
            let [Value::Int(first), Value::Int(last), nodes @ ..] = range.as_slice() else { return Err(senseless()) };
            let slot = |number: i64| u16::try_from(number).ok().filter(|slot| usize::from(*slot) < SLOTS);
            let (Some(first), Some(last)) = (slot(*first), slot(*last)) else { return Err(senseless()) };
            if last < first {
                return Err(senseless());
            }
            let nodes: Vec<_> = nodes.iter().map(|node| node_address(node, asked)).collect();
            for address in nodes.iter().flatten() {
                if !view.nodes.contains(address) {
                    view.nodes.push(address.clone());
                }
            }
            // One whose name is not known yet has its slots for itself, until it is.
            let Some(Some(owner)) = nodes.into_iter().next() else { continue };
            match view.owners.iter_mut().find(|(address, _)| *address == owner) {
                Some((_, ranges)) => ranges.push((first, last)),
                None => view.owners.push((owner, vec![(first, last)])),
            }
        }
        if view.owners.is_empty() {
            return Err(Failure::not_now("the Cluster has no slots yet"));
        }
        Ok(view)
    }
}

/// `[host, port, id, ...]`; where the host is left out it is the one that was asked.
fn node_address(node: &Value, asked: &RedisAddress) -> Option<RedisAddress> {
    let Value::Array(parts) = node else { return None };
    let host = match parts.first()? {
        Value::Nil => String::new(),
        host => text(Some(host))?,
    };
    let port = parts.get(1)?;
    beside(asked, &host, port)
}

fn beside(asked: &RedisAddress, host: &str, port: &Value) -> Option<RedisAddress> {
    let host = match (host, asked) {
        // Its name is not known.
        ("?", _) => return None,
        ("", RedisAddress::Tcp { host, .. }) => host.as_str(),
        (host, _) => host,
    };
    address_of(Some(&Value::SimpleString(host.to_owned())), Some(port))
}

/// Where a redirection leads: `MOVED slot host:port` or `ASK slot host:port` (Redis Cluster specification, "MOVED
/// redirection").
pub(super) fn redirection(details: &str, asked: &RedisAddress) -> Option<(u16, RedisAddress)> {
    let (slot, place) = details.trim().split_once(' ')?;
    let (host, port) = place.rsplit_once(':')?;
    let slot = slot.parse().ok().filter(|slot| usize::from(*slot) < SLOTS)?;
    Some((slot, beside(asked, host, &Value::SimpleString(port.to_owned()))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> RedisAddress {
        RedisAddress::Tcp { host: host.to_owned(), port }
    }

    fn value(resp: &str) -> Value {
        redis::parse_redis_value(resp.replace(' ', "\r\n").as_bytes()).unwrap()
    }

    #[test]
    fn a_redirection_leads_to_a_named_node_or_stays_at_the_host_that_was_asked() {
        let asked = tcp("asked", 7000);
        let cases = [
            ("3999 127.0.0.1:6381", Some((3999, tcp("127.0.0.1", 6381)))),
            ("0 node.example:6381", Some((0, tcp("node.example", 6381)))),
            ("1 ::1:6381", Some((1, tcp("::1", 6381)))),
            ("1 :6381", Some((1, tcp("asked", 6381)))),
            ("1 ?:6381", None),
            ("16384 127.0.0.1:6381", None),
            ("-1 127.0.0.1:6381", None),
            ("1 127.0.0.1:0", None),
            ("1 127.0.0.1:65536", None),
            ("1 127.0.0.1", None),
            ("1", None),
            ("", None),
        ];
        for (details, expected) in cases {
            assert_eq!(redirection(details, &asked), expected, "{details:?}");
        }
    }

    #[test]
    fn a_cluster_is_read_as_a_node_sees_it() {
        let asked = tcp("asked", 7000);
        let about = value("$16 cluster_state:ok ");
        let slots = value(
            "*3 *4 :0 :99 *3 $1 a :1 $1 x *3 $1 b :2 $1 y *3 :100 :100 *3 $-1 :1 $1 z *3 :101 :16383 *3 $1 a :1 $1 x ",
        );
        let view = View::read(&[about.clone(), slots.clone()], &asked).unwrap();
        assert!(view.is_whole);
        assert_eq!(view.owners, [(tcp("a", 1), vec![(0, 99), (101, 16383)]), (tcp("asked", 1), vec![(100, 100)])]);
        assert_eq!(view.nodes, [tcp("a", 1), tcp("b", 2), tcp("asked", 1)]);
        assert!(!View::read(&[value("$18 cluster_state:fail "), slots.clone()], &asked).unwrap().is_whole);
        assert!(View::read(&[value("-NOPERM "), slots], &asked).unwrap().is_whole, "who may not ask believes");
        for wrong in [
            "*0 ",
            "-ERR ",
            ":1 ",
            "*1 :1 ",
            "*1 *1 :1 ",
            "*1 *3 :5 :4 *2 $1 a :1 ",
            "*1 *3 :0 :16384 *2 $1 a :1 ",
            "*1 *3 :-1 :1 *2 $1 a :1 ",
            "*1 *3 :0 :1 *2 $1 ? :1 ",
            "*1 *3 :0 :1 *2 $1 a :0 ",
            "*1 *3 :0 :1 *1 $1 a ",
        ] {
            assert!(View::read(&[about.clone(), value(wrong)], &asked).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_sentinel_names_a_primary_and_in_a_failover_whom_it_has_promoted() {
        let address = "*2 $1 a $1 1 ";
        let about = |flags: &str| format!("%2 $5 flags ${} {flags} $12 config-epoch $1 7 ", flags.len());
        let replicas =
            "*2 %3 $2 ip $1 b $4 port $1 2 $5 flags $5 slave %3 $2 ip $1 c $4 port $1 3 $5 flags $14 slave,promoted ";
        let read = |address: &str, about: &str| Named::read(&[value(address), value(about), value(replicas)], "m");
        let named = read(address, &about("master")).unwrap();
        assert_eq!(named, Named { address: tcp("a", 1), epoch: 7, promoted: None }, "there is no failover");
        let named = read(address, &about("master,o_down,failover_in_progress")).unwrap();
        assert_eq!(named.promoted, Some(tcp("c", 3)));
        for (address, about) in [("*-1 ", "-ERR "), ("$-1 ", "%0 "), ("*0 ", "%0 "), ("*2 $1 a $1 0 ", "%0 ")] {
            assert!(read(address, about).is_err(), "{address}{about}");
        }
    }

    #[test]
    fn a_map_keeps_the_primaries_that_stay_and_retires_the_others() {
        let settings = toml::from_str("url = 'redis+cluster://h'").unwrap();
        let url = super::super::settings::url(&settings).unwrap();
        let topology = Topology::new(url.place.clone(), Dialer::new(&settings, &url).unwrap());
        assert!(topology.primary(Place::Slot(0)).is_none() && topology.primary(Place::Anywhere).is_none());
        let (a, b) = (tcp("a", 1), tcp("b", 1));
        topology.publish(&[(a.clone(), vec![(0, 8191)]), (b.clone(), vec![(8192, 16382)])], true);
        let at = |slot| topology.primary(Place::Slot(slot)).map(|primary| primary.address.clone());
        assert_eq!([at(0), at(8191), at(8192), at(16383)], [Some(a.clone()), Some(a.clone()), Some(b.clone()), None]);

        let (first, second) = (topology.primary(Place::Slot(0)).unwrap(), topology.primary(Place::Slot(8192)).unwrap());
        let moved = topology.moved(0, &b);
        assert!(Arc::ptr_eq(&moved, &second) && at(0) == Some(b.clone()) && at(1) == Some(a.clone()));
        let new = topology.moved(1, &tcp("c", 1));
        assert_eq!(at(1), Some(tcp("c", 1)));
        for primary in [&first, &second] {
            let bucket = topology.bucket_of(primary).unwrap();
            assert!(Arc::ptr_eq(&topology.primary(Place::Slot(bucket_slot(bucket))).unwrap(), primary));
        }

        topology.publish(&[(b.clone(), vec![(0, 16383)])], true);
        assert!(first.is_retired() && new.is_retired() && !second.is_retired());
        assert!(topology.bucket_of(&first).is_none());
        assert!(Arc::ptr_eq(&topology.primary(Place::Slot(1)).unwrap(), &second), "its connections are kept");
    }
}
