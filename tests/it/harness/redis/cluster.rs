//! What does a gateway meet in a Redis Cluster? Three primaries that share the slots, and a replica of each.

use std::time::Instant;

use super::{Program, RedisServer, Tls, Turn, address_of};
use crate::harness::fault::{Fault, FaultProxy};
use crate::harness::{Port, wait_until};

const PRIMARIES: usize = 3;
const SLOTS: usize = 16_384;

/// Ends with its value. Only one such world runs at a time.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// At the start, 0 to 2 are primaries, each with a third of the slots, and 3 to 5 are their replicas.
    pub(crate) nodes: Vec<RedisServer>,
    /// How the nodes call each other.
    names: Vec<String>,
    /// On which they call each other.
    bus: Vec<Port>,
    /// In front of each bus, where nodes can be isolated.
    proxies: Vec<FaultProxy>,
    _turn: Turn,
}

/// A slot on its way: see [`Cluster::begin_migration`].
#[derive(Debug)]
pub(crate) struct Migration<'a> {
    cluster: &'a Cluster,
    slot: u16,
    from: usize,
    to: usize,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// `conf`: further lines of redis.conf for every node.
    pub(crate) fn with(conf: &str) -> Self {
        Self::begin(conf, false)
    }

    /// Nodes know each other by proxies, so that one can be parted from the others: see [`Self::isolate`].
    pub(crate) fn that_can_be_parted(conf: &str) -> Self {
        Self::begin(conf, true)
    }

    fn begin(conf: &str, parted: bool) -> Self {
        let (turn, nodes) = (Turn::take(), Vec::new());
        let mut world = Self { nodes, names: Vec::new(), bus: Vec::new(), proxies: Vec::new(), _turn: turn };
        for number in 0..2 * PRIMARIES {
            world.add_node(number, conf, parted);
        }
        world.join();
        world
    }

    fn add_node(&mut self, number: usize, conf: &str, parted: bool) {
        let bus = Port::reserve();
        // A replica is a candidate however long its link was down, and does not move to another primary.
        let mut lines = format!(
            "cluster-enabled yes\ncluster-port {}\ncluster-node-timeout 1500\ncluster-require-full-coverage no\n\
             cluster-replica-validity-factor 0\ncluster-allow-replica-migration no\nrepl-diskless-sync-delay 0\n\
             repl-ping-replica-period 1\n{conf}\n",
            bus.number()
        );
        if parted {
            let (proxy, address) = (FaultProxy::to(bus.number()), address_of(number));
            lines += &format!("cluster-announce-ip 127.0.0.1\ncluster-announce-bus-port {}\n", proxy.port());
            // Protected are those servers that let everybody in, from all whose address is not 127.0.0.1.
            lines += &format!("bind-source-addr {address}\nprotected-mode no\n");
            self.proxies.push(proxy);
        }
        let node = RedisServer::begin(Program::Redis, &lines, Tls::Off);
        self.names.push(node.ask("CLUSTER MYID"));
        self.nodes.push(node);
        self.bus.push(bus);
    }

    fn join(&self) {
        for (number, node) in self.nodes.iter().enumerate() {
            // Each with an epoch of its own, or they would have to agree on that first.
            let () = node.ask(&format!("CLUSTER SET-CONFIG-EPOCH {}", number + 1));
            if number < PRIMARIES {
                let (first, next) = (number * SLOTS / PRIMARIES, (number + 1) * SLOTS / PRIMARIES);
                let () = node.ask(&format!("CLUSTER ADDSLOTSRANGE {first} {}", next - 1));
            }
            for other in 0..number {
                let bus = self.proxies.get(other).map_or_else(|| self.bus[other].number(), FaultProxy::port);
                let () = node.ask(&format!("CLUSTER MEET 127.0.0.1 {} {bus}", self.nodes[other].port()));
            }
        }
        wait_until("all nodes know each other", || {
            self.nodes.iter().all(|node| {
                let seen: String = node.ask("CLUSTER NODES");
                self.names.iter().all(|name| seen.contains(name.as_str())) && !seen.contains("handshake")
            })
        });
        for (replica, primary) in self.nodes[PRIMARIES..].iter().zip(&self.names) {
            let () = replica.ask(&format!("CLUSTER REPLICATE {primary}"));
        }
        self.until_settled();
    }

    pub(crate) fn url(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    pub(crate) fn slot_of(&self, key: &str) -> u16 {
        self.running().next().expect("one runs").1.ask(&format!("CLUSTER KEYSLOT {key}"))
    }

    /// The number of the node that runs, and says that it is the primary of this slot.
    pub(crate) fn owner_of_slot(&self, slot: u16) -> Option<usize> {
        self.find(|_, myself| myself.owns(slot))
    }

    #[track_caller]
    pub(crate) fn owner_of(&self, key: &str) -> usize {
        self.owner_of_slot(self.slot_of(key)).unwrap_or_else(|| panic!("nobody has the slot of {key}"))
    }

    /// The number of the node that runs, and says that it copies `primary`.
    pub(crate) fn replica_of(&self, primary: usize) -> Option<usize> {
        self.find(|_, myself| myself.primary == self.names[primary])
    }

    /// Moves a slot with all its keys; all primaries know it at once.
    pub(crate) fn migrate_slot(&self, slot: u16, to: usize) {
        let migration = self.begin_migration(slot, to);
        migration.move_all();
        migration.finish();
    }

    /// From now on the owner answers ASK for keys of the slot that it does not have.
    #[track_caller]
    pub(crate) fn begin_migration(&self, slot: u16, to: usize) -> Migration<'_> {
        let from = self.owner_of_slot(slot).expect("somebody has the slot");
        assert_ne!(from, to, "it is there already");
        let () = self.nodes[to].ask(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", self.names[from]));
        let () = self.nodes[from].ask(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", self.names[to]));
        Migration { cluster: self, slot, from, to }
    }

    /// A failover that was asked for: the replica takes over from a primary that is well. Gives the replica's number.
    pub(crate) fn hand_over(&self, primary: usize) -> usize {
        let replica = self.replica_of(primary).expect("it has a replica");
        let () = self.nodes[replica].ask("CLUSTER FAILOVER");
        wait_until("the replica took over", || self.nodes[replica].is_primary() && !self.nodes[primary].is_primary());
        replica
    }

    /// Parts a node from the others, silently; the test and its gateways still reach it.
    pub(crate) fn isolate(&self, number: usize) {
        assert!(!self.proxies.is_empty(), "only a world that can be parted can be parted");
        for (other, proxy) in self.proxies.iter().enumerate().filter(|(other, _)| *other != number) {
            self.proxies[number].set_for(address_of(other), Fault::SILENT);
            proxy.set_for(address_of(number), Fault::SILENT);
        }
    }

    /// Ends every [`Self::isolate`].
    pub(crate) fn rejoin(&self) {
        self.proxies.iter().for_each(FaultProxy::heal);
    }

    /// Waits until another node than `lost` says that it has the slot of `key`: which one, and since when (at the latest).
    #[track_caller]
    pub(crate) fn until_promoted(&self, key: &str, lost: usize) -> (usize, Instant) {
        let slot = self.slot_of(key);
        let mut promoted = None;
        wait_until("another node is promoted", || {
            promoted = self.find(|number, myself| number != lost && myself.owns(slot));
            promoted.is_some()
        });
        (promoted.expect("waited for"), Instant::now())
    }

    /// Waits until all that run say that all is well, agree on who has which slots, and replicas have their data.
    #[track_caller]
    pub(crate) fn until_settled(&self) {
        wait_until("the cluster is well", || self.is_settled());
    }

    fn is_settled(&self) -> bool {
        let mut views = Vec::new();
        for (number, node) in self.running() {
            let is_well = node.try_ask::<String>("CLUSTER INFO").is_ok_and(|state| {
                state.contains("cluster_state:ok") && state.contains(&format!("cluster_slots_ok:{SLOTS}"))
            });
            let view = Seen::by(node);
            let is_heard = view.iter().all(|seen| seen.is_connected || seen.flags.contains("fail"));
            let primary = view.iter().find(|seen| seen.name == self.names[number]).map(|myself| &myself.primary);
            let follows = match self.names.iter().position(|name| Some(name) == primary) {
                Some(primary) => node.follows(self.nodes[primary].port()),
                None => node.is_primary(),
            };
            if !is_well || !is_heard || !follows {
                return false;
            }
            views.push(view);
        }
        views.windows(2).all(|pair| pair[0] == pair[1])
    }

    /// The first that is so by its own word.
    fn find(&self, is_so: impl Fn(usize, &Seen) -> bool) -> Option<usize> {
        let says_so = |number: usize, node| {
            Seen::by(node).iter().any(|myself| myself.name == self.names[number] && is_so(number, myself))
        };
        self.running().find(|(number, node)| says_so(*number, node)).map(|(number, _)| number)
    }

    /// With their numbers.
    fn running(&self) -> impl Iterator<Item = (usize, &RedisServer)> {
        self.nodes.iter().enumerate().filter(|(_, node)| node.runs())
    }
}

impl Migration<'_> {
    /// Keys that the owner has and that are still to be moved.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.cluster.nodes[self.from].ask(&format!("CLUSTER GETKEYSINSLOT {} 1000000", self.slot))
    }

    pub(crate) fn move_key(&self, key: &str) {
        let to = self.cluster.nodes[self.to].port();
        let moved: String = self.cluster.nodes[self.from].ask(&format!("MIGRATE 127.0.0.1 {to} {key} 0 10000"));
        assert_eq!(moved, "OK", "{key} is not there to be moved");
    }

    /// Those, too, that come while others are moved.
    pub(crate) fn move_all(&self) {
        loop {
            let keys = self.keys();
            if keys.is_empty() {
                return;
            }
            // Where one key would be named, an empty word says that many are.
            let () = self.cluster.nodes[self.from].ask(&format!(
                "MIGRATE 127.0.0.1 {}  0 10000 KEYS {}",
                self.cluster.nodes[self.to].port(),
                keys.join(" ")
            ));
        }
    }

    /// From now on the old owner answers MOVED.
    pub(crate) fn finish(self) {
        let told = format!("CLUSTER SETSLOT {} NODE {}", self.slot, self.cluster.names[self.to]);
        // The new owner first: nobody shall point to a node that does not know that it has the slot.
        let () = self.cluster.nodes[self.to].ask(&told);
        for (_, node) in self.cluster.running().filter(|(number, node)| *number != self.to && node.is_primary()) {
            let () = node.ask(&told);
        }
    }
}

/// A line of CLUSTER NODES.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    name: String,
    flags: String,
    /// The name of its primary; `-` where it is one.
    primary: String,
    is_connected: bool,
    slots: Vec<(u16, u16)>,
}

impl Seen {
    /// All that a node knows, itself among them, in the order of their names; nothing where it does not answer.
    fn by(node: &RedisServer) -> Vec<Self> {
        let lines = node.try_ask::<String>("CLUSTER NODES").unwrap_or_default();
        let mut seen: Vec<_> = lines.lines().filter_map(Self::parse).collect();
        seen.sort();
        seen
    }

    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [name, _, flags, primary, _, _, _, link, slots @ ..] = words.as_slice() else { return None };
        let slots = slots.iter().filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            // What is migrating is in brackets, and in a range as well.
            Some((first.parse().ok()?, last.parse().ok()?))
        });
        Some(Self {
            name: (*name).to_owned(),
            flags: flags.replace("myself,", ""),
            primary: (*primary).to_owned(),
            is_connected: *link == "connected",
            slots: slots.collect(),
        })
    }

    fn owns(&self, slot: u16) -> bool {
        self.primary == "-" && self.slots.iter().any(|(first, last)| (*first..=*last).contains(&slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(node: &RedisServer, command: &str) -> String {
        let refused = node.try_ask::<redis::Value>(command).expect_err("it is refused");
        format!("{} {}", refused.code().unwrap_or_default(), refused.detail().unwrap_or_default())
    }

    #[test]
    fn a_slot_moves_by_ask_and_then_by_moved_and_loses_no_key() {
        let world = Cluster::start();
        assert!(world.nodes.iter().all(|node| world.url().contains(&format!("127.0.0.1:{}", node.port()))));
        let (here, there) = ("{tag}here", "{tag}there");
        let slot = world.slot_of(here);
        let from = world.owner_of(here);
        let to = (from + 1) % PRIMARIES;
        let () = world.nodes[from].ask(&format!("SET {here} 1"));
        let () = world.nodes[from].ask(&format!("SET {there} 1"));
        assert!(refusal(&world.nodes[to], &format!("GET {here}")).contains("MOVED"));

        let migration = world.begin_migration(slot, to);
        migration.move_key(there);
        assert_eq!(world.nodes[from].ask::<u8>(&format!("GET {here}")), 1, "it is not on its way yet");
        let asked = refusal(&world.nodes[from], &format!("GET {there}"));
        assert_eq!(asked, format!("ASK {slot} 127.0.0.1:{}", world.nodes[to].port()));
        migration.move_all();
        migration.finish();
        let moved = refusal(&world.nodes[from], &format!("GET {here}"));
        assert_eq!(moved, format!("MOVED {slot} 127.0.0.1:{}", world.nodes[to].port()));
        assert_eq!(world.owner_of(here), to);
        assert_eq!(world.nodes[to].ask::<(u8, u8)>(&format!("MGET {here} {there}")), (1, 1));

        world.migrate_slot(slot, from);
        assert_eq!(world.nodes[from].ask::<(u8, u8)>(&format!("MGET {here} {there}")), (1, 1));
        world.until_settled();
    }

    #[test]
    fn the_replica_of_a_killed_primary_takes_its_slots() {
        let mut world = Cluster::start();
        let owner = world.owner_of("a");
        assert_eq!(world.replica_of(owner), Some(owner + PRIMARIES));
        world.nodes[owner].ask_with_replicas("SET a 1", 1);

        world.nodes[owner].kill();
        let (promoted, _) = world.until_promoted("a", owner);
        assert_eq!(promoted, owner + PRIMARIES);
        assert_eq!(world.nodes[promoted].ask::<u8>("GET a"), 1);
        world.until_settled();

        world.nodes[owner].restart();
        wait_until("the old primary follows", || world.nodes[owner].follows(world.nodes[promoted].port()));
        world.until_settled();
        assert_eq!(world.hand_over(promoted), owner);
        assert_eq!(world.owner_of("a"), owner);
    }

    #[test]
    fn an_isolated_primary_gives_up_its_slots_to_its_replica_and_follows_when_it_is_back() {
        let world = Cluster::that_can_be_parted("");
        let owner = world.owner_of("a");
        world.isolate(owner);
        let (promoted, _) = world.until_promoted("a", owner);
        wait_until("the isolated one is reached by us, and knows that it is alone", || {
            world.nodes[owner].try_ask::<()>("SET a 1").is_err_and(|error| error.code() == Some("CLUSTERDOWN"))
        });
        wait_until("the new one serves", || world.nodes[promoted].try_ask::<()>("SET a 2").is_ok());
        world.rejoin();
        world.until_settled();
        assert_eq!(world.owner_of("a"), promoted);
        assert_eq!(world.replica_of(promoted), Some(owner));
    }

    #[test]
    fn a_primary_without_a_majority_serves_nobody() {
        let mut world = Cluster::start();
        let owner = world.owner_of("a");
        for number in (0..2 * PRIMARIES).filter(|number| *number != owner) {
            world.nodes[number].kill();
        }
        wait_until("the last one is alone", || {
            world.nodes[owner].try_ask::<()>("SET a 1").is_err_and(|error| error.code() == Some("CLUSTERDOWN"))
        });
    }
}
