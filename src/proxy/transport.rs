//! How are backends spoken to? In plain or over TLS, in HTTP/1 or HTTP/2; the same for all backends of a pool.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;

use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{CertKey, WrappedX509, parse_x509};
use rustix::io::Errno;

use crate::backend::Backend;
use crate::config::error::ConfigError;
use crate::config::model::{self, Protocol};
use crate::pem;

/// Requests at a time on one HTTP/2 connection to a backend.
const STREAMS_MAX: usize = 100;
/// What is taken of one response before its client has taken it.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// All streams may be full at the same time: a client that takes nothing holds up nobody else's response.
const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES * STREAMS_MAX as u32;

/// What a connection to a backend is made with.
#[derive(Clone)]
pub struct Transport {
    protocol: Protocol,
    tls: Option<Tls>,
    /// Of all the above: connections are kept apart by it, because pingora keeps those of different authorities together.
    fingerprint: u64,
}

#[derive(Clone)]
struct Tls {
    server_name: Option<String>,
    authorities: Option<Arc<[WrappedX509]>>,
    own: Option<Arc<CertKey>>,
    verify: bool,
}

impl Transport {
    /// Reads the files that the pool names.
    pub fn load(pool: &model::Pool) -> Result<Self, ConfigError> {
        let protocol = *pool.protocol.get_ref();
        let mut hasher = DefaultHasher::new();
        (protocol as u8).hash(&mut hasher);
        let Some(tls) = &pool.tls else {
            return Ok(Self { protocol, tls: None, fingerprint: hasher.finish() });
        };
        let verify = *tls.verify.get_ref();
        let server_name = tls.server_name.as_ref().map(|name| name.get_ref().clone());
        (verify, &server_name).hash(&mut hasher);
        let mut authorities = None;
        if let Some(file) = &tls.ca {
            pem::authorities(file.get_ref())?; // each of them can be one
            let all: Vec<_> = pem::certificates(file.get_ref())?.iter().map(|der| der.to_vec()).collect();
            all.hash(&mut hasher);
            authorities = Some(all.into_iter().map(|der| WrappedX509::new(der, parse_x509)).collect());
        }
        let mut own = None;
        if let (Some(cert), Some(key)) = (&tls.cert, &tls.key) {
            pem::certified(cert.get_ref(), key.get_ref())?; // they belong together
            let chain: Vec<_> = pem::certificates(cert.get_ref())?.iter().map(|der| der.to_vec()).collect();
            let key = pem::private_key(key.get_ref())?.secret_der().to_vec();
            (&chain, &key).hash(&mut hasher);
            own = Some(Arc::new(CertKey::new(chain, key)));
        }
        let tls = Some(Tls { server_name, authorities, own, verify });
        Ok(Self { protocol, tls, fingerprint: hasher.finish() })
    }

    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether connections are made alike.
    pub fn is_same(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }

    /// This backend, which is at `address`. `is_upgrade`: a WebSocket, which begins in HTTP/1 whatever the protocol.
    pub fn peer(&self, backend: &Backend, address: SocketAddr, is_upgrade: bool) -> HttpPeer {
        self.peer_of(backend.host().unwrap_or_else(|| host_of(backend.name())), address, is_upgrade)
    }

    /// The one whose certificate must be for `host`, unless the pool has a `server_name`.
    fn peer_of(&self, host: &str, address: SocketAddr, is_upgrade: bool) -> HttpPeer {
        let mut peer = match &self.tls {
            None => HttpPeer::new(address, false, String::new()),
            Some(tls) => {
                let server_name = tls.server_name.clone().unwrap_or_else(|| host.to_owned());
                let mut peer = HttpPeer::new(address, true, server_name);
                peer.client_cert_key = tls.own.clone();
                peer.options.ca = tls.authorities.clone();
                peer.options.verify_cert = tls.verify;
                peer.options.verify_hostname = tls.verify;
                peer
            }
        };
        peer.group_key = self.fingerprint;
        if is_upgrade {
            // A connection in HTTP/2 must not be taken for it.
            peer.group_key = !self.fingerprint;
            return peer;
        }
        match self.protocol {
            Protocol::Http1 => return peer,
            Protocol::Http2 => peer.options.set_http_version(2, 2),
            Protocol::Auto => peer.options.set_http_version(2, 1),
        }
        peer.options.max_h2_streams = STREAMS_MAX;
        peer.options.h2_stream_window_size = Some(STREAM_WINDOW_BYTES);
        peer.options.h2_connection_window_size = Some(CONNECTION_WINDOW_BYTES);
        peer
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("protocol", &self.protocol).field("tls", &self.tls.is_some()).finish()
    }
}

/// Without the port, if there is one, and without the brackets of an IPv6 address.
pub(super) fn host_of(name: &str) -> &str {
    let host = name.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')).map_or(name, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// Whether no connection was made because we have no descriptor or no memory left. What else the kernel says is of the way to
/// this one backend, or of its address.
pub fn is_our_own_want(error: &pingora::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error.root_cause());
    while let Some(of) = cause {
        if let Some(said) = of.downcast_ref::<std::io::Error>().and_then(Errno::from_io_error) {
            return [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].contains(&said);
        }
        cause = of.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io;

    use pingora::{Error, ErrorType};

    use super::*;

    #[test]
    fn a_backend_is_asked_for_by_the_name_that_it_is_configured_with() {
        let cases = [("app.internal:443", "app.internal"), ("10.0.0.7:443", "10.0.0.7"), ("[fd00::7]:443", "fd00::7")];
        let transport = |text: &str| Transport::load(&toml::from_str(text).unwrap()).unwrap();
        let usual = transport("backends = []\ntls = {}");
        let named = transport("backends = []\ntls = { server_name = \"other.internal\" }");
        let address = SocketAddr::from(([127, 0, 0, 1], 443));
        for (name, expected) in cases {
            let peer = usual.peer_of(host_of(name), address, false);
            assert_eq!((peer.sni.as_str(), peer.options.verify_cert), (expected, true), "never empty: verified");
            assert_eq!(named.peer_of(host_of(name), address, false).sni, "other.internal");
        }
    }

    #[test]
    fn pools_that_trust_differently_share_no_connection() {
        let texts = [
            "",
            "protocol = \"http2\"",
            "tls = {}",
            "tls = {}\nprotocol = \"auto\"",
            "tls = { verify = false }",
            "tls = { server_name = \"a\" }",
            "tls = { server_name = \"b\" }",
        ];
        let transports = texts.map(|text| Transport::load(&toml::from_str(&format!("backends = []\n{text}")).unwrap()));
        let transports = transports.map(Result::unwrap);
        for (index, transport) in transports.iter().enumerate() {
            for (other_index, other) in transports.iter().enumerate() {
                assert_eq!(
                    transport.fingerprint == other.fingerprint,
                    index == other_index,
                    "{:?} {:?}",
                    texts[index],
                    texts[other_index]
                );
            }
        }
    }

    #[test]
    fn only_what_we_lack_is_our_own_want() {
        let of_connect = |errno: Errno| {
            let cause = io::Error::from_raw_os_error(errno.raw_os_error());
            let inner = Error::because(ErrorType::InternalError, "as pingora wraps it", cause);
            Error::because(ErrorType::InternalError, "and again", inner)
        };
        for ours in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
            assert!(is_our_own_want(&of_connect(ours)), "{ours}");
        }
        // A route that is prohibited, an address that is not there, nobody there.
        for theirs in [Errno::ACCESS, Errno::ADDRNOTAVAIL, Errno::ADDRINUSE, Errno::CONNREFUSED, Errno::TIMEDOUT] {
            assert!(!is_our_own_want(&of_connect(theirs)), "{theirs}");
        }
        assert!(!is_our_own_want(&Error::explain(ErrorType::InternalError, "no cause at all")));
    }
}
