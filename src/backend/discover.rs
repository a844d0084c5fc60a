//! Where are the backends now? Names and files are looked at in the background, so that no request waits for them.
//!
//! An entry of `backends` is a source of servers: itself, what DNS says, or what a file lists. A server that has a name
//! is looked up, too. A look that fails, or that finds nothing, changes nothing: an empty answer is rather a mistake of who
//! answers than the wish that nobody be served.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::config;
use crate::config::error::ConfigError;
use crate::config::model::{self, BackendSource, Place};
use crate::metrics::Metrics;

use super::names::{Found, Names};
use super::{Backend, Pool};

/// An answer is valid as long as it says, but not for less: a name server is asked for a name at most so often.
const VALID_MIN: Duration = Duration::from_secs(1);

/// And not for longer: a time to live of a day, written by mistake, must not keep us at servers that are gone.
const VALID_MAX: Duration = Duration::from_secs(300);

/// Of the time, in percent: so much later is asked again, at most, so that instances do not keep step.
const JITTER: u32 = 10;

/// After a look that failed.
const RETRY: Duration = Duration::from_secs(2);

/// Files are read so often. They are small, and a look at their content misses nothing: neither a change within one tick of
/// a file system's clock, nor one behind a symbolic link, nor one on NFS.
const FILE_INTERVAL: Duration = Duration::from_secs(1);

/// Looks under way at a time.
const LOOKS_MAX: usize = 64;

/// A reload may have brought others.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// One entry of a pool's `backends`, with what was found there.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) entry: BackendSource,
    /// Shared with the same entry of the pool's earlier and later configurations.
    known: Arc<Known>,
}

#[derive(Debug, Default)]
struct Known {
    servers: ArcSwap<Vec<model::Backend>>,
    schedule: Schedule,
}

/// When to look next, and how it went.
#[derive(Debug, Default)]
pub(super) struct Schedule(Mutex<Course>);

#[derive(Debug, Default)]
struct Course {
    due: Option<Instant>,
    is_under_way: bool,
    /// Who is to be asked is another one since that began.
    is_outdated: bool,
    failure: Option<String>,
}

/// What is known of one place where backends are found.
#[derive(Clone, Debug)]
pub struct Discovery {
    /// `dns:host:port`, `srv:name`, `file:path`, or a backend's `host:port`.
    pub source: String,
    /// What it was last.
    pub found: Vec<String>,
    /// Why the last look brought nothing.
    pub failure: Option<String>,
}

/// One look, which ends with this value.
struct Look {
    pool: Arc<Pool>,
    subject: Subject,
}

enum Subject {
    Source(Arc<Source>),
    Address(Arc<Backend>),
}

impl Schedule {
    /// Whether it is due; who is told so has to say how it went, or to drop the [`Look`].
    fn begin(&self, now: Instant) -> bool {
        let mut course = self.0.lock();
        let is_due = course.due.is_none_or(|due| due <= now) && !course.is_under_way;
        course.is_under_way |= is_due;
        is_due
    }

    fn end(&self) {
        let mut course = self.0.lock();
        (course.is_under_way, course.is_outdated) = (false, false);
    }

    /// Due now, as there is another one to ask; again at its end, if a look is under way.
    fn begin_anew(&self) {
        let mut course = self.0.lock();
        (course.due, course.is_outdated) = (None, course.is_under_way);
    }

    /// The next look comes after this time; gives the failure of the one before.
    fn note(&self, next: Duration, failure: Option<&str>) -> Option<String> {
        let mut course = self.0.lock();
        course.due = (!course.is_outdated).then(|| Instant::now() + next);
        std::mem::replace(&mut course.failure, failure.map(str::to_owned))
    }

    fn failure(&self) -> Option<String> {
        self.0.lock().failure.clone()
    }
}

impl Source {
    /// With what `previous` knows of the same place.
    pub(super) fn new(entry: &BackendSource, previous: Option<&[Arc<Self>]>) -> Arc<Self> {
        let same = previous.into_iter().flatten().find(|source| source.entry.to_string() == entry.to_string());
        let known = same.map_or_else(Arc::default, |source| Arc::clone(&source.known));
        Arc::new(Self { entry: entry.clone(), known })
    }

    /// Those that are known now.
    pub(super) fn servers(&self) -> Vec<model::Backend> {
        let each = &self.entry.each;
        if self.entry.place == Place::Address {
            return vec![each.clone()];
        }
        let with_ours = |server: &model::Backend| model::Backend {
            // Either says more than nothing, never both.
            weight: server.weight * each.weight,
            max_requests: server.max_requests.max(each.max_requests),
            backup: server.backup || each.backup,
            drain: server.drain || each.drain,
            ..server.clone()
        };
        self.known.servers.load().iter().map(with_ours).collect()
    }

    async fn look(&self, pool: &Pool, names: &Names) {
        let known = self.known.servers.load_full();
        let (found, addresses) = match &self.entry.place {
            Place::Address => return,
            Place::Dns(host) => (servers_at(host, &known, names).await, Vec::new()),
            Place::Srv(name) => match names.servers(name).await {
                Ok((found, addresses)) => (Ok(Found { valid: in_time(found.valid), ..found }), addresses),
                Err(cause) => (Err(cause), Vec::new()),
            },
            Place::File(path) => {
                let path = path.get_ref().clone();
                let read = tokio::task::spawn_blocking(move || config::load_backends(&path)).await;
                let read =
                    read.map_err(|error| error.to_string()).and_then(|read| read.map_err(|error| format!("{error:#}")));
                (read.map(listed_in_file), Vec::new())
            }
        };
        self.note(pool, &known, found);
        pool.place();
        for backend in pool.backends().iter().filter(|backend| backend.addresses.load().is_empty()) {
            // What came along need not be all; but it is what there is at once.
            let own = addresses.iter().filter(|(name, _)| name == backend.name()).map(|(_, address)| *address);
            backend.learn(Found::new(own.collect(), Duration::ZERO));
        }
    }

    fn note(&self, pool: &Pool, known: &[model::Backend], found: Result<Found<model::Backend>, String>) {
        let (pool, source) = (pool.name(), self.entry.to_string());
        let schedule = &self.known.schedule;
        match found {
            Ok(Found { all, valid, left_out }) => {
                let is_back = schedule.note(valid, None).is_some();
                if all != known {
                    let backends: Vec<_> = all.iter().map(|server| server.address.as_str()).collect();
                    tracing::info!(pool, source, ?backends, left_out, "backends found");
                    self.known.servers.store(Arc::new(all));
                } else if is_back {
                    tracing::info!(pool, source, "backends are found again, and are the same");
                }
            }
            Err(cause) => {
                let before = schedule.note(RETRY, Some(&cause));
                // What is wrong with a file changes when somebody works at it, and not by itself.
                let is_file = matches!(self.entry.place, Place::File(_));
                if before.is_none() || is_file && before.as_ref() != Some(&cause) {
                    tracing::warn!(
                        pool,
                        source,
                        cause,
                        kept = known.len(),
                        "backends are not found: those known last stay"
                    );
                }
            }
        }
    }
}

async fn servers_at(host: &str, known: &[model::Backend], names: &Names) -> Result<Found<model::Backend>, String> {
    let (host, port) = split(host)?;
    let address = |server: &model::Backend| server.address.parse().ok().map(|address: SocketAddr| address.ip());
    let known: Vec<_> = known.iter().filter_map(address).collect();
    let Found { all, valid, left_out } = names.addresses(host, false, &known).await?;
    let server = |ip| model::Backend {
        host: Some(host.trim_end_matches('.').to_owned()),
        ..model::Backend::at(SocketAddr::new(ip, port).to_string())
    };
    Ok(Found { all: all.into_iter().map(server).collect(), valid: in_time(valid), left_out })
}

fn listed_in_file(all: Vec<model::Backend>) -> Found<model::Backend> {
    Found { all, valid: FILE_INTERVAL, left_out: 0 }
}

/// When to ask again for what is valid so long.
fn in_time(valid: Duration) -> Duration {
    let valid = valid.clamp(VALID_MIN, VALID_MAX);
    valid + valid.mul_f64(rand::random::<f64>() * f64::from(JITTER) / 100.0)
}

fn split(address: &str) -> Result<(&str, u16), String> {
    let (host, port) = address.rsplit_once(':').ok_or("it has no port")?;
    Ok((host, port.parse().map_err(|_| "its port is no number")?))
}

impl Backend {
    fn is_named(&self) -> bool {
        self.name.parse::<SocketAddr>().is_err()
    }

    async fn look(&self, pool: &Pool, names: &Names) {
        let known = self.addresses.load_full();
        let found = async {
            let (host, port) = split(&self.name)?;
            let known: Vec<_> = known.iter().map(|address| address.ip()).collect();
            let found = names.addresses(host, self.host.is_some(), &known).await?;
            Ok::<_, String>((found, port))
        };
        let (pool, backend) = (pool.name(), &self.name);
        match found.await {
            Ok((Found { all, valid, left_out }, port)) => {
                let is_back = self.schedule.note(in_time(valid), None).is_some();
                let all = all.into_iter().map(|ip: IpAddr| SocketAddr::new(ip, port)).collect();
                let is_new = self.learn(Found { all, valid, left_out });
                if is_back && !is_new {
                    tracing::info!(pool, backend, "backend resolves again, and is where it was");
                }
            }
            Err(cause) => {
                if self.schedule.note(RETRY, Some(&cause)).is_none() {
                    tracing::warn!(pool, backend, cause, ?known, "backend does not resolve: the last addresses stay");
                }
            }
        }
    }

    /// It is there from now on; whether that is new. No address changes nothing.
    fn learn(&self, found: Found<SocketAddr>) -> bool {
        let Found { all: addresses, left_out, valid: _ } = found;
        let is_new = !addresses.is_empty() && addresses != **self.addresses.load();
        if is_new {
            tracing::info!(backend = self.name, ?addresses, left_out, "backend resolved");
            self.addresses.store(Arc::new(addresses));
            self.has_address.store(true, Ordering::Release);
            self.ongoing.queue.look_again();
        }
        is_new
    }
}

impl Look {
    /// Those of this pool that are due; `is_first`: only of what was never found.
    fn due(pool: &Arc<Pool>, is_first: bool) -> Vec<Self> {
        let now = Instant::now();
        let mut due = Vec::new();
        for source in pool.sources.iter().filter(|source| source.entry.place != Place::Address) {
            let is_wanted = !is_first || source.known.servers.load().is_empty();
            if is_wanted && source.known.schedule.begin(now) {
                due.push(Subject::Source(Arc::clone(source)));
            }
        }
        for backend in pool.backends().iter().filter(|backend| backend.is_named()) {
            let is_wanted = !is_first || backend.addresses.load().is_empty();
            if is_wanted && backend.schedule.begin(now) {
                due.push(Subject::Address(Arc::clone(backend)));
            }
        }
        due.into_iter().map(|subject| Self { pool: Arc::clone(pool), subject }).collect()
    }

    async fn run(self, names: Arc<Names>, places: Arc<Semaphore>) {
        let Ok(_place) = places.acquire().await else { return };
        match &self.subject {
            Subject::Source(source) => source.look(&self.pool, &names).await,
            Subject::Address(backend) => backend.look(&self.pool, &names).await,
        }
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        match &self.subject {
            Subject::Source(source) => source.known.schedule.end(),
            Subject::Address(backend) => backend.schedule.end(),
        }
    }
}

impl Pool {
    /// Reads the files that list its backends: as with every file that a configuration names, a start and a reload want
    /// them to be there and right. Later a broken one changes nothing.
    pub fn read_files(&self) -> Result<(), ConfigError> {
        for source in &self.sources {
            if let Place::File(path) = &source.entry.place {
                let all = config::load_backends(path.get_ref())?;
                source.note(self, &source.known.servers.load_full(), Ok(listed_in_file(all)));
            }
        }
        self.place();
        Ok(())
    }

    /// Has everything looked at again, whatever the answers that there are say; until then they count.
    fn begin_anew(&self) {
        self.sources.iter().for_each(|source| source.known.schedule.begin_anew());
        self.backends().iter().for_each(|backend| backend.schedule.begin_anew());
    }

    /// Every place where its backends are found, and every one that has a name.
    pub fn discoveries(&self) -> Vec<Discovery> {
        let mut all = Vec::new();
        for source in self.sources.iter().filter(|source| source.entry.place != Place::Address) {
            all.push(Discovery {
                source: source.entry.to_string(),
                found: source.known.servers.load().iter().map(|server| server.address.clone()).collect(),
                failure: source.known.schedule.failure(),
            });
        }
        for backend in self.backends().iter().filter(|backend| backend.is_named()) {
            all.push(Discovery {
                source: backend.name.clone(),
                found: backend.addresses.load().iter().map(SocketAddr::to_string).collect(),
                failure: backend.schedule.failure(),
            });
        }
        all
    }
}

/// Looks at all places of all pools, each when it is due; never ends. `pools` gives those of today, `dns` who is asked.
pub async fn watch(pools: impl Fn() -> Vec<Arc<Pool>>, dns: impl Fn() -> model::Dns, metrics: Metrics) {
    let places = Arc::new(Semaphore::new(LOOKS_MAX));
    // Nobody yet: a reload may have been faster than this, and what the start found may be what another one said.
    let mut last: Option<Arc<Names>> = None;
    loop {
        let dns = dns();
        let same = last.filter(|names| *names.config() == dns);
        let is_another = same.is_none();
        let names = same.unwrap_or_else(|| Arc::new(Names::new(dns)));
        for pool in pools() {
            // What was found for the pool before a reload counts for the one after it.
            pool.place();
            pool.forget_gone(&metrics);
            if is_another {
                pool.begin_anew();
            }
            for look in Look::due(&pool, false) {
                tokio::spawn(look.run(Arc::clone(&names), Arc::clone(&places)));
            }
        }
        last = Some(names);
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Looks at what was never found, before a start or a reload lets requests in; gives up waiting after `limit`, and leaves
/// the rest to the background. Blocks, also within a runtime.
pub fn find_unknown(pools: &[Arc<Pool>], dns: &model::Dns, limit: Duration) {
    let (pools, names) = (pools.to_vec(), Arc::new(Names::new(dns.clone())));
    let search = async move {
        let places = Arc::new(Semaphore::new(LOOKS_MAX));
        let mut looks = JoinSet::new();
        loop {
            // Who was found may have a name that is to be looked up in turn.
            for look in pools.iter().flat_map(|pool| Look::due(pool, true)) {
                looks.spawn(look.run(Arc::clone(&names), Arc::clone(&places)));
            }
            if looks.join_next().await.is_none() {
                return;
            }
        }
    };
    let on_own_runtime = move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            if runtime.block_on(async { tokio::time::timeout(limit, search).await }).is_err() {
                tracing::warn!(?limit, "backends are not found in time; the background looks on");
            }
            // A file that cannot be read must not hold up anybody.
            runtime.shutdown_background();
        }
        Err(error) => tracing::error!(%error, "cannot start a runtime"),
    };
    // Without a thread the background finds them a little later.
    if let Ok(thread) = std::thread::Builder::new().name("discover".into()).spawn(on_own_runtime) {
        let _ = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_as_long_as_it_says_within_bounds_and_nobody_keeps_step() {
        for (valid, least) in [(0, 1), (1, 1), (60, 60), (300, 300), (86_400, 300)] {
            let times: Vec<_> = (0..100).map(|_| in_time(Duration::from_secs(valid))).collect();
            let least = Duration::from_secs(least);
            assert!(times.iter().all(|time| (least..=least.mul_f64(1.1)).contains(time)), "{valid}: {times:?}");
            assert!(times.iter().any(|time| *time != times[0]), "{valid}");
        }
    }

    #[test]
    fn one_looks_at_a_time_and_who_gives_up_leaves_it_to_the_next() {
        let pool = Arc::new(Pool::new("app", &toml::from_str("backends = [\"app.test:1\"]").unwrap(), None));
        let first = Look::due(&pool, true);
        assert_eq!((first.len(), Look::due(&pool, true).len()), (1, 0));
        drop(first);
        let again = Look::due(&pool, false);
        assert_eq!(again.len(), 1);
        pool.backends()[0].schedule.note(RETRY, Some("away"));
        drop(again);
        assert!(Look::due(&pool, false).is_empty(), "not before its time");
    }

    fn found(pool: &Pool, addresses: &[&str]) {
        let all = addresses.iter().map(|address| model::Backend::at((*address).to_owned())).collect();
        let source = &pool.sources[0];
        source.note(pool, &source.known.servers.load_full(), Ok(Found { all, valid: VALID_MAX, left_out: 0 }));
        pool.place();
    }

    fn config(keys: &str) -> model::Pool {
        toml::from_str(&format!("backends = [{{ dns = \"api.test:1\"{keys} }}, \"10.0.0.9:1\"]\nslow_start = \"1h\""))
            .unwrap()
    }

    fn names(pool: &Pool) -> Vec<String> {
        pool.backends().iter().map(|backend| backend.name().to_owned()).collect()
    }

    #[test]
    fn what_was_found_outlives_a_reload_and_is_what_the_new_file_says() {
        let old = Pool::new("app", &config(""), None);
        found(&old, &["10.0.0.1:1", "10.0.0.2:1"]);
        assert_eq!(names(&old), ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.9:1"]);
        let kept = old.backends()[0].id;
        let new = Pool::new("app", &config(", weight = 3"), Some(&old));
        // For the old one, while the new one is being made.
        found(&old, &["10.0.0.1:1", "10.0.0.9:1"]);
        new.settle();
        assert_eq!(names(&new), ["10.0.0.1:1", "10.0.0.9:1"], "what is there twice counts once");
        assert_eq!((new.backends()[0].id, new.backends()[0].weight()), (kept, 3));
    }

    /// With the server 10.0.0.9 as these keys say.
    fn named(keys: &str) -> model::Pool {
        toml::from_str(&format!("backends = [{{ dns = \"api.test:1\" }}, {{ address = \"10.0.0.9:1\"{keys} }}]"))
            .unwrap()
    }

    #[test]
    fn only_the_pool_that_counts_says_what_its_backends_do() {
        use crate::backend::AdminState::{Active, Draining};
        let old = Pool::new("app", &named(""), None);
        found(&old, &["10.0.0.1:1"]);
        let server = Arc::clone(&old.backends()[1]);
        let as_is = || (server.admin_state(), server.weight());
        let new = Pool::new("app", &named(", drain = true, weight = 7"), Some(&old));
        found(&new, &["10.0.0.2:1"]);
        assert_eq!(names(&new), ["10.0.0.2:1", "10.0.0.9:1"]);
        assert_eq!(as_is(), (Active, 1), "a reload that waits for names, or is refused in the end, changes nothing");
        found(&old, &["10.0.0.3:1"]);
        assert_eq!(names(&old), ["10.0.0.3:1", "10.0.0.9:1"], "and the old pool goes on");
        new.settle();
        assert_eq!((names(&new), as_is()), (names(&old), (Draining, 7)), "found for one is found for the other");
        found(&old, &["10.0.0.4:1"]);
        assert_eq!(as_is(), (Draining, 7), "a look that ends late says nothing any more");
        new.place();
        assert_eq!(names(&new), ["10.0.0.4:1", "10.0.0.9:1"], "but what it found counts");
    }

    #[test]
    fn who_comes_back_has_the_requests_that_it_had_and_is_still_drained() {
        let (old, metrics) = (Pool::new("app", &config(""), None), Metrics::new());
        found(&old, &["10.0.0.1:1", "10.0.0.2:1"]);
        let lease = old.backends()[0].try_lease().unwrap();
        old.backends()[0].drain();
        found(&old, &["10.0.0.2:1"]);
        let new = Pool::new("app", &config(""), Some(&old));
        new.settle();
        new.forget_gone(&metrics);
        found(&new, &["10.0.0.1:1", "10.0.0.2:1"]);
        let back = &new.backends()[0];
        assert_eq!((back.name(), back.in_flight()), ("10.0.0.1:1", 1), "who waits for its end waits on");
        assert_eq!(back.admin_state(), crate::backend::AdminState::Draining);
        drop(lease);
        found(&new, &["10.0.0.2:1"]);
        new.forget_gone(&metrics);
        found(&new, &["10.0.0.1:1", "10.0.0.2:1"]);
        assert_eq!(
            new.backends()[0].admin_state(),
            crate::backend::AdminState::Draining,
            "restarted, and not undrained"
        );
    }

    #[test]
    fn a_name_that_goes_leaves_no_trace_when_its_requests_have_ended() {
        let (pool, metrics) = (Pool::new("app", &config(""), None), Metrics::new());
        found(&pool, &["10.0.0.1:1"]);
        let lease = pool.backends()[0].try_lease().unwrap();
        metrics.backend_requests.with_label_values(&["app", "10.0.0.1:1"]).inc();
        let is_told = || String::from_utf8(metrics.render()).unwrap().contains("10.0.0.1:1");
        found(&pool, &["10.0.0.2:1"]);
        pool.forget_gone(&metrics);
        assert!(is_told(), "it has a request");
        drop(lease);
        pool.forget_gone(&metrics);
        assert!(!is_told());
    }
}
