//! Whose connection is this, where a balancer passes bytes on? The header of the PROXY protocol, version 2, says it.
//!
//! A parser of our own: it is two dozen lines for one version and two address families, and what the crates at hand let
//! pass (version 1, lengths up to 64 KiB, addresses that are none) would have to be refused around them.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// How a header begins; no request and no TLS handshake does.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// Signature, version and command, family and transport, length of the rest.
const FIXED_BYTES: usize = 16;

/// Addresses and extensions together. Balancers write less than a quarter of this.
const REST_BYTES_MAX: usize = 2048;

/// Why a connection is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The peer is none of those that may announce connections.
    Stranger,
    /// There was no whole header in time.
    Late,
    Malformed,
}

impl Refused {
    /// For the log and the metrics.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Stranger => "stranger",
            Self::Late => "late",
            Self::Malformed => "malformed",
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Reads the header and not a byte more. Gives the client that it announces; none where the balancer speaks for itself
/// (command LOCAL: a health check).
pub(super) async fn read(
    stream: &mut (impl AsyncRead + Unpin),
    limit: Duration,
) -> Result<Option<SocketAddr>, Refused> {
    let header = async {
        let mut fixed = [0; FIXED_BYTES];
        stream.read_exact(&mut fixed).await?;
        let Some(rest_bytes) = rest_bytes(&fixed) else { return Ok(Err(Refused::Malformed)) };
        let mut rest = [0; REST_BYTES_MAX];
        let rest = &mut rest[..rest_bytes];
        stream.read_exact(rest).await?;
        io::Result::Ok(announced(&fixed, rest).ok_or(Refused::Malformed))
    };
    match timeout(limit, header).await {
        Ok(Ok(announced)) => announced,
        Ok(Err(_)) => Err(Refused::Malformed),
        Err(_) => Err(Refused::Late),
    }
}

/// What follows the fixed part; none where this is no header, or a larger one than we read.
fn rest_bytes(fixed: &[u8; FIXED_BYTES]) -> Option<usize> {
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    (fixed.starts_with(SIGNATURE) && length <= REST_BYTES_MAX).then_some(length)
}

/// The client that a whole header announces. Nothing where it breaks a rule, and where it announces somebody without
/// an address that a client of HTTP can have: the specification leaves that to the receiver, and the balancer's own
/// address would give a stranger the balancer's rights.
#[expect(clippy::option_option, reason = "no header; a header without a client; a client")]
fn announced(fixed: &[u8; FIXED_BYTES], rest: &[u8]) -> Option<Option<SocketAddr>> {
    const LOCAL: u8 = 0x20;
    const PROXY: u8 = 0x21;
    const TCP_OVER_IPV4: u8 = 0x11;
    const TCP_OVER_IPV6: u8 = 0x21;
    match (fixed[12], fixed[13]) {
        // What it says of addresses is to be discarded.
        (LOCAL, _) => Some(None),
        (PROXY, TCP_OVER_IPV4) => {
            let (addresses, extensions) = rest.split_first_chunk::<12>()?;
            let [a, b, c, d, _, _, _, _, high, low, _, _] = *addresses;
            let client = SocketAddr::from((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low])));
            are_whole(extensions).then_some(Some(client))
        }
        (PROXY, TCP_OVER_IPV6) => {
            let (addresses, extensions) = rest.split_first_chunk::<36>()?;
            let (source, ports) = (addresses.first_chunk::<16>()?, addresses.last_chunk::<4>()?);
            let client = SocketAddr::from((Ipv6Addr::from(*source), u16::from_be_bytes([ports[0], ports[1]])));
            are_whole(extensions).then_some(Some(client))
        }
        _ => None,
    }
}

/// Extensions (TLVs: a type, two bytes of length, a value) are skipped, but they must fill the header.
fn are_whole(mut extensions: &[u8]) -> bool {
    while let Some((&[_, high, low], rest)) = extensions.split_first_chunk::<3>() {
        let Some(rest) = rest.get(usize::from(u16::from_be_bytes([high, low]))..) else { return false };
        extensions = rest;
    }
    extensions.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);
    const V4: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0, 80];

    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        [SIGNATURE, &[command, family][..], &(rest.len() as u16).to_be_bytes(), rest].concat()
    }

    fn v6() -> Vec<u8> {
        let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        [&address("2001:db8::7")[..], &address("::1"), &[0x30, 0x39, 0, 80]].concat()
    }

    #[tokio::test]
    async fn a_header_announces_a_client_and_takes_not_a_byte_of_what_follows() {
        let tlv = [&V4[..], &[0x01, 0, 2, b'h', b'2', 0x04, 0, 0]].concat();
        let v4: SocketAddr = "192.0.2.7:12345".parse().unwrap();
        let full = [&V4[..], &[0x04, 0x07, 0xf1], &[0; 0x7f1][..]].concat();
        assert_eq!(full.len(), REST_BYTES_MAX);
        for (what, bytes, expected) in [
            ("IPv4", header(0x21, 0x11, &V4), Some(v4)),
            ("IPv6", header(0x21, 0x21, &v6()), Some("[2001:db8::7]:12345".parse().unwrap())),
            ("extensions", header(0x21, 0x11, &tlv), Some(v4)),
            ("as long as may be", header(0x21, 0x11, &full), Some(v4)),
            ("LOCAL", header(0x20, 0x00, b""), None),
            ("LOCAL with addresses, which count for nothing", header(0x20, 0x11, &V4), None),
            ("LOCAL with what is no address", header(0x20, 0xff, b"abc"), None),
        ] {
            let bytes = [&bytes[..], b"GET /"].concat();
            let mut stream = &bytes[..];
            assert_eq!(read(&mut stream, LIMIT).await, Ok(expected), "{what}");
            assert_eq!(stream, b"GET /", "{what}");
        }
    }

    #[tokio::test]
    async fn what_breaks_a_rule_is_refused() {
        let with = |extensions: &[u8]| header(0x21, 0x11, &[&V4[..], extensions].concat());
        let mut long = header(0x21, 0x11, &[0; REST_BYTES_MAX]);
        long[14..16].copy_from_slice(&(REST_BYTES_MAX as u16 + 1).to_be_bytes());
        let mut wrong = header(0x21, 0x11, &V4);
        wrong[5] = b'\n';
        for (what, bytes) in [
            ("nothing", Vec::new()),
            ("a request", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
            ("version 1", b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 80\r\n".to_vec()),
            ("a wrong signature", wrong),
            ("version 1 in the form of 2", header(0x11, 0x11, &V4)),
            ("version 3", header(0x31, 0x11, &V4)),
            ("an unknown command", header(0x22, 0x11, &V4)),
            ("somebody without an address", header(0x21, 0x00, b"")),
            ("somebody without an address, with one", header(0x21, 0x00, &V4)),
            ("UDP", header(0x21, 0x12, &V4)),
            ("UDP over IPv6", header(0x21, 0x22, &v6())),
            ("a unix socket", header(0x21, 0x31, &[0; 216])),
            ("an unknown family", header(0x21, 0x41, &[0; 216])),
            ("an unknown transport", header(0x21, 0x13, &V4)),
            ("addresses cut short", header(0x21, 0x11, &V4[..11])),
            ("an IPv4 address for IPv6", header(0x21, 0x21, &V4)),
            ("half an extension", with(&[0x01])),
            ("an extension without its value", with(&[0x01, 0, 2, b'h'])),
            ("an extension longer than the header", with(&[0x01, 0xff, 0xff])),
            ("one extension and half of another", with(&[0x01, 0, 1, b'h', 0x02, 0])),
            ("more than we read", long),
            ("the fixed part cut short", header(0x21, 0x11, &V4)[..15].to_vec()),
            ("the rest cut short", header(0x21, 0x11, &V4)[..27].to_vec()),
        ] {
            assert_eq!(read(&mut &bytes[..], LIMIT).await, Err(Refused::Malformed), "{what}");
        }
    }

    #[tokio::test]
    async fn a_header_has_a_deadline() {
        let (mut stream, _open) = tokio::io::duplex(16);
        assert_eq!(read(&mut stream, Duration::from_millis(10)).await, Err(Refused::Late));
    }
}
