//! What does DNS say? `/etc/hosts`, then the servers of `[dns]` or of `/etc/resolv.conf`; with the time that it says it for.
//!
//! The system's own resolver tells neither that time nor of services, so it is not asked.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::system_conf::parse_resolv_conf;
use hickory_resolver::{Hosts, TokioResolver};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::model::{Backend, Dns};

/// Of one look-up, with all that has to be asked for it. The last good answer counts meanwhile.
const LOOKUP_MAX: Duration = Duration::from_secs(5);

/// A server that has not answered after this long is asked once more, and given up after as long again: in time for
/// [`LOOKUP_MAX`].
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// `/etc/hosts` says nothing of how long it is valid.
const HOSTS_VALID: Duration = Duration::from_secs(10);

/// Of one answer: a choice among backends looks at each, and no answer may make that take without end.
const FOUND_MAX: usize = 256;

/// What was found, at least one, and how long it is valid.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found<T> {
    pub(super) all: Vec<T>,
    pub(super) valid: Duration,
    /// Beyond [`FOUND_MAX`].
    pub(super) left_out: usize,
}

/// Who is asked.
#[derive(Debug)]
pub(super) struct Names {
    config: Dns,
    /// Made of the `/etc/resolv.conf` that is beside it.
    current: Mutex<Option<(Vec<u8>, Arc<Asker>)>>,
}

struct Asker {
    resolver: TokioResolver,
    /// In which names are looked for that are not whole, in this order.
    search: Vec<Name>,
    /// A name with as many dots is first taken for a whole one.
    dots: usize,
}

impl std::fmt::Debug for Asker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asker").field("search", &self.search).field("dots", &self.dots).finish_non_exhaustive()
    }
}

/// Why there is no answer.
enum Nothing {
    /// There is no such name, or none with such records.
    Absent,
    /// Who knows? The text says why.
    Failed(String),
}

impl<T> Found<T> {
    pub(super) fn new(mut all: Vec<T>, valid: Duration) -> Self {
        let left_out = all.len().saturating_sub(FOUND_MAX);
        all.truncate(FOUND_MAX);
        Self { all, valid, left_out }
    }
}

impl Names {
    pub(super) fn new(config: Dns) -> Self {
        Self { config, current: Mutex::new(None) }
    }

    pub(super) fn config(&self) -> &Dns {
        &self.config
    }

    /// The addresses of a host, sorted. Where one family alone gets no answer, those of it that are `known` still count.
    /// `is_whole`: as names in answers are, it is looked for nowhere else.
    pub(super) async fn addresses(
        &self,
        host: &str,
        is_whole: bool,
        known: &[IpAddr],
    ) -> Result<Found<IpAddr>, String> {
        let until = Instant::now() + LOOKUP_MAX;
        let name = Name::from_utf8(host).map_err(|error| error.to_string())?;
        let hosts = addresses_in_hosts_file(&name);
        if !hosts.is_empty() {
            return Ok(Found::new(sorted(hosts), HOSTS_VALID));
        }
        let asker = self.asker()?;
        for name in asker.candidates(name, is_whole) {
            let ask = |kind| asker.ask(&name, kind, until);
            let (four, six) = tokio::join!(ask(RecordType::A), ask(RecordType::AAAA));
            let (mut all, mut valid) = (Vec::new(), Duration::MAX);
            let mut failure = None;
            for (answer, is_family) in [(four, IpAddr::is_ipv4 as fn(&IpAddr) -> bool), (six, IpAddr::is_ipv6)] {
                match answer {
                    Ok(lookup) => {
                        all.extend(
                            lookup.answers().iter().filter_map(|record| record.data.ip_addr()).filter(is_family),
                        );
                        valid = valid.min(valid_for(&lookup));
                    }
                    Err(Nothing::Absent) => {}
                    Err(Nothing::Failed(cause)) => {
                        all.extend(known.iter().copied().filter(is_family));
                        failure = Some(cause);
                    }
                }
            }
            match failure {
                // Neither family has answered.
                Some(cause) if valid == Duration::MAX => return Err(cause),
                _ if !all.is_empty() => {
                    let mut found = Found::new(sorted(all), valid);
                    found.all = with_a_route(found.all);
                    return Ok(found);
                }
                _ => {}
            }
        }
        Err("it has no address".to_owned())
    }

    /// The servers of a service (RFC 2782): each with its weight; who is not of the lowest priority is a backup. With the
    /// addresses that came along, which may be none or not all.
    pub(super) async fn servers(&self, service: &str) -> Result<(Found<Backend>, Vec<(String, SocketAddr)>), String> {
        let until = Instant::now() + LOOKUP_MAX;
        let asker = self.asker()?;
        let name = Name::from_utf8(service).map_err(|error| error.to_string())?;
        for name in asker.candidates(name, false) {
            match asker.ask(&name, RecordType::SRV, until).await {
                Ok(lookup) => {
                    let all = servers_in(&lookup, service);
                    if !all.is_empty() {
                        let addresses = additional_addresses(&lookup, &all);
                        return Ok((Found::new(all, valid_for(&lookup)), addresses));
                    }
                }
                Err(Nothing::Absent) => {}
                Err(Nothing::Failed(cause)) => return Err(cause),
            }
        }
        Err("it has no servers".to_owned())
    }

    /// Anew, when `/etc/resolv.conf` is another one.
    fn asker(&self) -> Result<Arc<Asker>, String> {
        let system = match std::fs::read("/etc/resolv.conf") {
            _ if !self.config.servers.is_empty() => Vec::new(),
            Ok(text) => text,
            // As the system's resolver does without it (resolv.conf(5)).
            Err(_) => b"nameserver 127.0.0.1".to_vec(),
        };
        let mut current = self.current.lock();
        if let Some((text, asker)) = &*current
            && *text == system
        {
            return Ok(Arc::clone(asker));
        }
        let (config, options) = if self.config.servers.is_empty() {
            parse_resolv_conf(&system).map_err(|error| format!("/etc/resolv.conf: {error}"))?
        } else {
            let servers = self.config.servers.iter().map(|server| name_server(*server)).collect();
            (ResolverConfig::from_parts(None, Vec::new(), servers), ResolverOpts::default())
        };
        let asker = Arc::new(Asker::new(config, options).map_err(|error| error.to_string())?);
        *current = Some((system, Arc::clone(&asker)));
        Ok(asker)
    }
}

fn name_server(address: SocketAddr) -> NameServerConfig {
    let at_port = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    let connections = vec![at_port(ConnectionConfig::udp()), at_port(ConnectionConfig::tcp())];
    NameServerConfig::new(address.ip(), true, connections)
}

impl Asker {
    fn new(config: ResolverConfig, mut options: ResolverOpts) -> Result<Self, NetError> {
        // The domain is the list where there is no other (resolv.conf(5)).
        let own = config.domain.iter().filter(|_| config.search.is_empty());
        let (search, dots) = (own.chain(&config.search).cloned().collect(), options.ndots);
        options.timeout = options.timeout.min(ANSWER_MAX);
        // Those after the first.
        options.attempts = options.attempts.min(1);
        // Who asks here keeps what was answered, and knows how long.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        Ok(Self { resolver: builder.build()?, search, dots })
    }

    /// The whole names that this may be short for, in order (resolv.conf(5)). Ours, because both families have to be of
    /// the same one.
    fn candidates(&self, mut name: Name, is_whole: bool) -> Vec<Name> {
        let is_whole = is_whole || name.is_fqdn();
        let dots = usize::from(name.num_labels()).saturating_sub(1);
        let searched = self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok());
        let mut all: Vec<_> = if is_whole { Vec::new() } else { searched.collect() };
        name.set_fqdn(true);
        all.insert(if self.dots <= dots { 0 } else { all.len() }, name);
        for name in &mut all {
            name.set_fqdn(true);
        }
        all
    }

    /// Each question ends by itself, so that what others have brought by then counts.
    async fn ask(&self, name: &Name, kind: RecordType, until: Instant) -> Result<Lookup, Nothing> {
        match tokio::time::timeout_at(until, self.resolver.lookup(name.clone(), kind)).await {
            Ok(Ok(lookup)) => Ok(lookup),
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(_)))) => Err(Nothing::Absent),
            Ok(Err(error)) => Err(Nothing::Failed(error.to_string())),
            Err(_) => Err(Nothing::Failed(format!("no answer within {} s", LOOKUP_MAX.as_secs()))),
        }
    }
}

/// As long as the record of it that is valid for the shortest time.
fn valid_for(lookup: &Lookup) -> Duration {
    Duration::from_secs(lookup.answers().iter().map(|record| record.ttl).min().unwrap_or(0).into())
}

fn sorted(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.sort();
    addresses.dedup();
    addresses
}

/// Read every time: it is small, and somebody may have changed it.
fn addresses_in_hosts_file(name: &Name) -> Vec<IpAddr> {
    std::fs::read("/etc/hosts").map_or_else(|_| Vec::new(), |text| addresses_in_hosts(&text, name))
}

/// What is not UTF-8, as a comment may be, voids no other line.
fn addresses_in_hosts(text: &[u8], name: &Name) -> Vec<IpAddr> {
    let mut hosts = Hosts::default();
    if hosts.read_hosts_conf(String::from_utf8_lossy(text).as_bytes()).is_err() {
        return Vec::new();
    }
    let of = |kind| hosts.lookup_static_host(&Query::query(name.clone(), kind));
    let lookups = [of(RecordType::A), of(RecordType::AAAA)].into_iter().flatten();
    lookups.flat_map(|lookup| lookup.answers().iter().filter_map(|a| a.data.ip_addr()).collect::<Vec<_>>()).collect()
}

/// Without those of a family that this machine has no route for, as machines without IPv6; all, when that leaves none.
fn with_a_route(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    // Connecting a socket for datagrams sends nothing, and fails without a route.
    let has_route = |address: &IpAddr| {
        let own: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { [0_u16; 8].into() };
        UdpSocket::bind((own, 0)).and_then(|socket| socket.connect((*address, 9))).is_ok()
    };
    let with: Vec<_> = addresses.iter().copied().filter(has_route).collect();
    if with.is_empty() { addresses } else { with }
}

/// Those of the lowest priority first, and in the order of their names. The name of the service is whom a certificate has
/// to be for.
fn servers_in(lookup: &Lookup, service: &str) -> Vec<Backend> {
    let mut records: Vec<_> = lookup
        .answers()
        .iter()
        .filter_map(|record| match &record.data {
            // "." is "decidedly not available" (RFC 2782).
            RData::SRV(srv) if !srv.target.is_root() => Some(srv),
            _ => None,
        })
        .collect();
    records.sort_by_key(|srv| (srv.priority, address_of(&srv.target, srv.port)));
    let lowest = records.first().map_or(0, |srv| srv.priority);
    let host = service.splitn(3, '.').nth(2).unwrap_or(service).trim_end_matches('.');
    let servers = records.into_iter().map(|srv| Backend {
        host: Some(host.to_owned()),
        // 0 is "very seldom" beside others (RFC 2782), and all alike alone: the least that there is.
        weight: u32::from(srv.weight.max(1)),
        backup: srv.priority != lowest,
        ..Backend::at(address_of(&srv.target, srv.port))
    });
    servers.filter(|server| crate::config::is_backend_address(&server.address)).collect()
}

fn address_of(target: &Name, port: u16) -> String {
    format!("{}:{port}", target.to_lowercase().to_utf8().trim_end_matches('.'))
}

fn additional_addresses(lookup: &Lookup, servers: &[Backend]) -> Vec<(String, SocketAddr)> {
    let mut addresses = Vec::new();
    for record in lookup.additionals() {
        let Some(ip) = record.data.ip_addr() else { continue };
        for server in servers {
            let Some((_, port)) = server.address.rsplit_once(':') else { continue };
            let Ok(port) = port.parse() else { continue };
            if address_of(&record.name, port) == server.address {
                addresses.push((server.address.clone(), SocketAddr::new(ip, port)));
            }
        }
    }
    addresses
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::rr::Record;
    use hickory_resolver::proto::rr::rdata::{A, SRV};

    use super::*;

    const SERVICE: &str = "_http._tcp.api.test";

    fn name(text: &str) -> Name {
        Name::from_utf8(text).unwrap()
    }

    fn srv(priority: u16, weight: u16, port: u16, target: &str) -> Record {
        // Also what no resolver of ours would write.
        let target = Name::from_labels(target.split('.').filter(|label| !label.is_empty()).map(str::as_bytes)).unwrap();
        Record::from_rdata(name(SERVICE), 60, RData::SRV(SRV::new(priority, weight, port, target)))
    }

    fn answer(records: impl IntoIterator<Item = Record>) -> Lookup {
        Lookup::new_with_max_ttl(Query::query(name(SERVICE), RecordType::SRV), records)
    }

    #[test]
    fn a_service_is_its_servers_with_their_weights_and_its_name_is_whom_they_must_prove_to_be() {
        let records = [
            srv(20, 7, 1, "far.test."),
            srv(10, 0, 3, "Near.test."),
            srv(10, 65535, 2, "near.test."),
            srv(10, 5, 4, "."),
            srv(10, 5, 0, "port.test."),
            srv(10, 5, 5, "a b.test."),
        ];
        let found = servers_in(&answer(records), SERVICE);
        let seen: Vec<_> = found.iter().map(|server| (server.address.as_str(), server.weight, server.backup)).collect();
        assert_eq!(seen, [("near.test:2", 65535, false), ("near.test:3", 1, false), ("far.test:1", 7, true)]);
        assert!(found.iter().all(|server| server.host.as_deref() == Some("api.test")));
        assert!(servers_in(&answer([srv(0, 0, 80, ".")]), SERVICE).is_empty(), "decidedly not available (RFC 2782)");
    }

    #[test]
    fn addresses_that_come_along_are_those_of_the_servers() {
        let mut lookup = answer([srv(0, 0, 80, "one.test."), srv(0, 0, 81, "two.test.")]);
        let address = |owner: &str, last| Record::from_rdata(name(owner), 60, RData::A(A::new(10, 0, 0, last)));
        lookup.extend_additionals([address("one.test.", 1), address("one.test.", 2), address("three.test.", 3)]);
        let servers = servers_in(&lookup, SERVICE);
        let one = |text: &str| ("one.test:80".to_owned(), text.parse().unwrap());
        assert_eq!(additional_addresses(&lookup, &servers), [one("10.0.0.1:80"), one("10.0.0.2:80")]);
    }

    #[test]
    fn no_answer_makes_a_pool_without_end() {
        let many: Vec<IpAddr> = (0..=u8::MAX).flat_map(|a| [[10, 0, 0, a].into(), [10, 0, 1, a].into()]).collect();
        let found = Found::new(many, Duration::ZERO);
        assert_eq!((found.all.len(), found.left_out), (FOUND_MAX, 512 - FOUND_MAX));
    }

    #[tokio::test]
    async fn short_names_are_looked_for_as_resolv_conf_says() {
        let asker = |search: &[&str], dots| {
            let search = search.iter().map(|domain| name(domain)).collect();
            let config = ResolverConfig::from_parts(None, search, vec![name_server(([127, 0, 0, 1], 9).into())]);
            let mut options = ResolverOpts::default();
            options.ndots = dots;
            Asker::new(config, options).unwrap()
        };
        let candidates = |asker: &Asker, text: &str, is_whole| {
            asker.candidates(name(text), is_whole).iter().map(Name::to_utf8).collect::<Vec<_>>()
        };
        let usual = asker(&["a.test", "b.test"], 1);
        assert_eq!(candidates(&usual, "app", false), ["app.a.test.", "app.b.test.", "app."]);
        assert_eq!(candidates(&usual, "app.c", false), ["app.c.", "app.c.a.test.", "app.c.b.test."]);
        assert_eq!(candidates(&usual, "app.c.", false), ["app.c."]);
        assert_eq!(candidates(&usual, "app", true), ["app."], "as names in answers are");
        let lines = |text: &str| {
            let (config, options) = parse_resolv_conf(format!("nameserver 127.0.0.1\n{text}")).unwrap();
            candidates(&Asker::new(config, options).unwrap(), "app", false)
        };
        assert_eq!(lines("domain a.test\n"), ["app.a.test.", "app."]);
        assert_eq!(lines("domain a.test\nsearch b.test\n"), ["app.b.test.", "app."], "the last one counts");
        let kubernetes = asker(&["svc.cluster.local"], 5);
        assert_eq!(candidates(&kubernetes, "app.shop", false), ["app.shop.svc.cluster.local.", "app.shop."]);
    }

    #[test]
    fn one_line_of_etc_hosts_that_is_no_text_voids_no_other() {
        let text = b"10.0.0.1 one.test # caf\xe9\n\xff\xfe\n10.0.0.2 tw\xe9.test two.test\n10.0.0.3 three.test\n";
        for (host, last) in [("one.test", 1), ("two.test", 2), ("three.test", 3)] {
            assert_eq!(addresses_in_hosts(text, &name(host)), [IpAddr::from([10, 0, 0, last])], "{host}");
        }
    }

    #[test]
    fn an_address_without_a_route_is_left_out_unless_it_is_all_there_is() {
        let (near, nowhere): (IpAddr, IpAddr) = ([127, 0, 0, 1].into(), [255, 255, 255, 255].into());
        assert_eq!(with_a_route(vec![near, nowhere]), [near]);
        assert_eq!(with_a_route(vec![nowhere]), [nowhere]);
    }
}
