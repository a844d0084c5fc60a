//! What does a gateway meet that asks sentinels for its Redis? A primary and two replicas, and three who watch them.

use std::collections::HashMap;
use std::time::Instant;

use super::{Program, RedisServer, Tls, Turn, address_of};
use crate::harness::fault::{Fault, FaultProxy};
use crate::harness::wait_until;

const SERVERS: usize = 3;
const MAJORITY: usize = 2;

/// How the sentinels call the primary.
const NAME: &str = "mymaster";

/// Ends with its value. Only one such world runs at a time.
#[derive(Debug)]
pub(crate) struct Sentinels {
    /// The first is the primary at the start.
    pub(crate) servers: Vec<RedisServer>,
    pub(crate) sentinels: Vec<RedisServer>,
    /// In front of each server, where it can be isolated.
    proxies: Vec<FaultProxy>,
    _turn: Turn,
}

impl Sentinels {
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// `conf`: further lines of redis.conf for every server, such as `min-replicas-to-write 1`.
    pub(crate) fn with(conf: &str) -> Self {
        Self::begin(conf, false)
    }

    /// Everybody, gateways as well, knows the servers by proxies, so that one can be parted from the others: see
    /// [`Self::isolate`].
    pub(crate) fn that_can_be_parted(conf: &str) -> Self {
        Self::begin(conf, true)
    }

    fn begin(conf: &str, parted: bool) -> Self {
        let turn = Turn::take();
        let mut world = Self { servers: Vec::new(), sentinels: Vec::new(), proxies: Vec::new(), _turn: turn };
        for number in 0..SERVERS {
            world.add_server(number, conf, parted);
        }
        for number in 0..SERVERS {
            world.add_sentinel(number, parted);
        }
        world.hurry();
        world.until_settled();
        world
    }

    fn add_server(&mut self, number: usize, conf: &str, parted: bool) {
        // The sync begins at once; a link that says nothing is given up soon.
        let mut lines = format!("repl-diskless-sync-delay 0\nrepl-ping-replica-period 1\nrepl-timeout 5\n{conf}\n");
        if 0 < number {
            lines += &format!("replicaof 127.0.0.1 {}\n", self.known_port(0));
        }
        if parted {
            let proxy = FaultProxy::to_nobody();
            lines += &format!("replica-announce-ip 127.0.0.1\nreplica-announce-port {}\n", proxy.port());
            lines += &format!("bind-source-addr {}\n", address_of(number));
            self.proxies.push(proxy);
        }
        let server = RedisServer::begin(Program::Redis, &lines, Tls::Off);
        if let Some(proxy) = self.proxies.get(number) {
            proxy.lead_to(server.port());
        }
        self.servers.push(server);
    }

    fn add_sentinel(&mut self, number: usize, parted: bool) {
        let mut lines = format!(
            "sentinel monitor {NAME} 127.0.0.1 {} {MAJORITY}\nsentinel down-after-milliseconds {NAME} 800\n\
             sentinel failover-timeout {NAME} 3000\nsentinel parallel-syncs {NAME} 2\n",
            self.known_port(0)
        );
        if parted {
            let address = address_of(SERVERS + number);
            lines += &format!("sentinel announce-ip 127.0.0.1\nbind-source-addr {address}\n");
        }
        self.sentinels.push(RedisServer::begin(Program::Sentinel, &lines, Tls::Off));
    }

    /// Sentinels look and tell every few seconds unless they are told otherwise, which they forget with a restart. On a
    /// machine that has too much to do they shall not think that their clock is wrong.
    pub(crate) fn hurry(&self) {
        for sentinel in self.sentinels.iter().filter(|sentinel| sentinel.runs()) {
            let () = sentinel.ask(
                "SENTINEL DEBUG INFO-PERIOD 200 PING-PERIOD 200 PUBLISH-PERIOD 200 ASK-PERIOD 200 TILT-TRIGGER 20000",
            );
        }
    }

    pub(crate) fn url(&self) -> String {
        let hosts: Vec<_> = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port())).collect();
        format!("redis+sentinel://{}/{NAME}", hosts.join(","))
    }

    /// The number of the server that a majority of all sentinels names.
    pub(crate) fn named_primary(&self) -> Option<usize> {
        let mut votes = [0; SERVERS];
        for sentinel in self.sentinels.iter().filter(|sentinel| sentinel.runs()) {
            let named = sentinel.try_ask::<(String, u16)>(&format!("SENTINEL GET-MASTER-ADDR-BY-NAME {NAME}"));
            let number = named.ok().and_then(|(_, port)| (0..SERVERS).find(|at| self.known_port(*at) == port));
            if let Some(number) = number {
                votes[number] += 1;
            }
        }
        votes.iter().position(|votes| MAJORITY <= *votes)
    }

    /// The numbers of those that run and say that they are primaries: two, while one of them does not know better.
    pub(crate) fn primaries(&self) -> Vec<usize> {
        (0..SERVERS).filter(|number| self.servers[*number].is_primary()).collect()
    }

    /// Waits until another server than `lost` is a primary: which one, and since when (at the latest).
    #[track_caller]
    pub(crate) fn until_promoted(&self, lost: usize) -> (usize, Instant) {
        let mut promoted = None;
        wait_until("another server is promoted", || {
            promoted = self.primaries().into_iter().find(|number| *number != lost);
            promoted.is_some()
        });
        (promoted.expect("waited for"), Instant::now())
    }

    /// Waits until all who run agree on one primary, and all replicas that run have its data.
    #[track_caller]
    pub(crate) fn until_settled(&self) -> usize {
        wait_until("the sentinels agree and the replicas follow", || self.is_settled());
        self.named_primary().expect("it was agreed")
    }

    fn is_settled(&self) -> bool {
        let Some(primary) = self.named_primary() else { return false };
        let running = |servers: &[RedisServer]| servers.iter().filter(|server| server.runs()).count();
        let replicas = running(&self.servers) - 1;
        let others = running(&self.sentinels) - 1;
        self.primaries() == [primary]
            && (0..SERVERS)
                .filter(|number| *number != primary && self.servers[*number].runs())
                .all(|number| self.servers[number].follows(self.known_port(primary)))
            && self
                .sentinels
                .iter()
                .filter(|sentinel| sentinel.runs())
                .all(|sentinel| self.is_content(sentinel, primary, replicas, others))
    }

    /// Whether it sees a primary that is up, so many good replicas and so many other good sentinels.
    fn is_content(&self, sentinel: &RedisServer, primary: usize, replicas: usize, others: usize) -> bool {
        type Facts = HashMap<String, String>;
        let good = |facts: &&Facts, flags: &str| facts.get("flags").is_some_and(|found| found == flags);
        let Ok(seen) = sentinel.try_ask::<Facts>(&format!("SENTINEL MASTER {NAME}")) else { return false };
        let Ok(servers) = sentinel.try_ask::<Vec<Facts>>(&format!("SENTINEL REPLICAS {NAME}")) else { return false };
        let Ok(sentinels) = sentinel.try_ask::<Vec<Facts>>(&format!("SENTINEL SENTINELS {NAME}")) else { return false };
        good(&&seen, "master")
            && seen.get("port") == Some(&self.known_port(primary).to_string())
            && replicas == servers.iter().filter(|facts| good(facts, "slave")).count()
            && others == sentinels.iter().filter(|facts| good(facts, "sentinel")).count()
    }

    /// Parts a server from the other servers and from all sentinels, silently; the test and its gateways still reach it.
    pub(crate) fn isolate(&self, number: usize) {
        assert!(!self.proxies.is_empty(), "only a world that can be parted can be parted");
        for (other, proxy) in self.proxies.iter().enumerate().filter(|(other, _)| *other != number) {
            self.proxies[number].set_for(address_of(other), Fault::SILENT);
            proxy.set_for(address_of(number), Fault::SILENT);
        }
        for sentinel in SERVERS..SERVERS + self.sentinels.len() {
            self.proxies[number].set_for(address_of(sentinel), Fault::SILENT);
        }
    }

    /// Ends every [`Self::isolate`].
    pub(crate) fn rejoin(&self) {
        self.proxies.iter().for_each(FaultProxy::heal);
    }

    /// Under which a server is known to all.
    fn known_port(&self, number: usize) -> u16 {
        self.proxies.get(number).map_or_else(|| self.servers[number].port(), FaultProxy::port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_primary_is_followed_by_a_replica_and_comes_back_as_one() {
        let mut world = Sentinels::start();
        assert_eq!(world.named_primary(), Some(0));
        world.servers[0].ask_with_replicas("SET a 1", 2);

        world.servers[0].kill();
        let (promoted, _) = world.until_promoted(0);
        assert_ne!(promoted, 0);
        assert_eq!(world.until_settled(), promoted);
        assert_eq!(world.servers[promoted].ask::<String>("GET a"), "1");

        world.servers[0].restart();
        wait_until("the old primary follows the new one", || world.servers[0].follows(world.servers[promoted].port()));
        assert_eq!(world.until_settled(), promoted);
    }

    #[test]
    fn an_isolated_primary_takes_no_writes_is_reached_by_us_and_follows_when_it_is_back() {
        let world = Sentinels::that_can_be_parted("min-replicas-to-write 1\nmin-replicas-max-lag 1");
        let () = world.servers[0].ask("SET a 1");
        world.isolate(0);
        let (promoted, _) = world.until_promoted(0);
        assert_eq!(world.primaries(), [0, promoted], "the isolated one knows nothing of it");
        wait_until("the isolated one sees that no replica listens", || {
            let refused = world.servers[0].try_ask::<()>("SET a 2").map_err(|error| error.to_string());
            refused.is_err_and(|error| error.contains("NOREPLICAS"))
        });
        wait_until("the new primary has a replica and takes writes", || {
            world.servers[promoted].try_ask::<()>("SET a 3").is_ok()
        });
        world.rejoin();
        assert_eq!(world.until_settled(), promoted);
        assert_eq!(world.servers[0].ask::<String>("GET a"), "3", "what was written aside is gone");
    }

    #[test]
    fn two_paused_sentinels_are_no_majority() {
        let world = Sentinels::start();
        assert!(world.sentinels.iter().all(|sentinel| world.url().contains(&format!("127.0.0.1:{}", sentinel.port()))));
        world.sentinels[0].pause();
        assert_eq!(world.named_primary(), Some(0), "two are one");
        world.sentinels[1].pause();
        assert_eq!(world.named_primary(), None);
        world.sentinels[0].resume();
        assert_eq!(world.named_primary(), Some(0));
    }
}
