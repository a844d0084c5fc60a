//! By which name may the admin listener be asked? By none that a stranger could have pointed at it.
//!
//! A web page may ask its own origin whatever it likes, and read the answers. Whose page it is can let its name lead to
//! 127.0.0.1, or to an address of this network, once the page is open in the browser of somebody who works here (DNS
//! rebinding): then the browser asks us for them. Only `Host` tells, where the page's own name still stands.

use crate::config::model;
use crate::proxy::route::canonical_host;

/// Names that the internet's DNS leads nowhere, so that nobody there can own one: RFC 6761 (section 6.3), RFC 6762 (section
/// 3), RFC 8375, and what ICANN reserved in July 2024. `svc` is reserved by nobody, and in no registry's hands; Kubernetes
/// has it for its services. Who runs the network that one is in can have all of them.
const NOBODY_ELSES: [&str; 5] = ["localhost", "local", "home.arpa", "internal", "svc"];

/// `admin.hosts`.
#[derive(Debug, Default)]
pub struct Hosts(Vec<String>);

impl Hosts {
    pub fn of(admin: &model::Admin) -> Self {
        Self(admin.hosts.iter().map(|host| host.get_ref().clone()).collect())
    }

    /// `host`: the field as it came, from which the guard has passed it. No case, no port, no final dot counts.
    pub(super) fn admit(&self, host: &str) -> bool {
        let host = canonical_host(host);
        // An address leads where it says.
        let is_address = host.starts_with('[') || host.parse::<std::net::Ipv4Addr>().is_ok();
        // Such as compose and `/etc/hosts` give them. Only a top-level domain is called so elsewhere.
        let is_one_word = !host.contains('.');
        let is_nobody_elses =
            NOBODY_ELSES.iter().any(|suffix| host.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.')));
        is_address || is_one_word || is_nobody_elses || self.0.iter().any(|listed| *listed == host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_that_somebody_could_register_is_admitted_but_the_listed() {
        let hosts = Hosts(vec!["gw1.example.org".to_owned()]);
        for (host, is_admitted) in [
            ("127.0.0.1", true),
            ("10.0.0.7:9900", true),
            ("[::1]", true),
            ("[fd00::7]:9900", true),
            ("localhost", true),
            ("LocalHost.:9900", true),
            ("cloakroom:9900", true),
            ("gw1.localhost", true),
            ("gw1.local", true),
            ("gw1.internal:9900", true),
            ("GW1.Internal", true),
            ("gw1.home.arpa.", true),
            ("cloakroom.prod.svc", true),
            ("cloakroom.prod.svc.cluster.local:9900", true),
            ("gw1.example.org", true),
            ("gw1.EXAMPLE.org:9900", true),
            ("gw1.example.org.", true),
            ("example.org", false),
            ("gw2.example.org", false),
            ("a.gw1.example.org", false),
            ("gw1.example.org.evil.test", false),
            ("evil-gw1.example.org", false),
            ("evil.test:9900", false),
            ("127.0.0.1.evil.test", false),
            ("127.0.0.1.5", false),
            ("1.2.3", false),
            ("localhost.evil.test", false),
            ("a.notlocal", false),
            ("a.notinternal", false),
            ("a.arpa", false),
            ("a.nothome.arpa", false),
            ("cloakroom.prod", false),
            ("", true), // the guard lets no such field pass
        ] {
            assert_eq!(hosts.admit(host), is_admitted, "{host:?}");
        }
        assert!(!Hosts::default().admit("gw1.example.org"), "it has to be listed");
    }
}
