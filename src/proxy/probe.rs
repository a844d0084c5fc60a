//! How is a backend asked whether it is well? By pingora's own client, as its requests are, on a connection of its own.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use http::{HeaderValue, header};
use memchr::memmem;
use pingora::connectors::TransportConnector;
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;

use crate::backend::health::Probe;
use crate::config::model::Check;

/// So much of a response is read for the text that shall be in it.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Asks over TCP, TLS and HTTP/1.1.
pub struct PingoraProbe {
    http: Connector,
    transport: TransportConnector,
}

impl PingoraProbe {
    pub fn new() -> Self {
        Self { http: Connector::new(None), transport: TransportConnector::new(None) }
    }
}

impl Default for PingoraProbe {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for PingoraProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PingoraProbe")
    }
}

#[async_trait]
impl Probe for PingoraProbe {
    async fn ask(&self, address: SocketAddr, name: &str, check: &Check) -> Result<(), String> {
        let said = |error: Box<pingora::Error>| error.to_string();
        let host = check.host.as_ref().map_or(name, |host| host.get_ref().as_str());
        let peer = peer(address, host, check);
        let Some(path) = &check.path else {
            return self.transport.new_stream(&peer).await.map(drop).map_err(said);
        };
        // Never given back, so that each check sees what a new connection does.
        let (mut upstream, _) = self.http.get_http_session(&peer).await.map_err(said)?;
        upstream.write_request_header(Box::new(request(path.get_ref(), host)?)).await.map_err(said)?;
        upstream.finish_request_body().await.map_err(said)?;
        upstream.read_response_header().await.map_err(said)?;
        let status = upstream.response_header().map_or(0, |response| response.status.as_u16());
        if !check.statuses.0.contains(&status) {
            return Err(format!("status {status}"));
        }
        let Some(wanted) = &check.body else { return Ok(()) };
        let mut body = Vec::new();
        while body.len() < BODY_BYTES_MAX
            && let Some(bytes) = upstream.read_response_body().await.map_err(said)?
        {
            body.extend_from_slice(&bytes);
            if memmem::find(&body, wanted.as_bytes()).is_some() {
                return Ok(());
            }
        }
        Err("the body is another".to_owned())
    }
}

fn peer(address: SocketAddr, host: &str, check: &Check) -> HttpPeer {
    let of_host = || {
        let name = host.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')).map_or(host, |(name, _)| name);
        name.trim_start_matches('[').trim_end_matches(']').to_owned()
    };
    let server_name = check.server_name.as_ref().map_or_else(of_host, |name| name.get_ref().clone());
    let mut peer = HttpPeer::new(address, check.tls, server_name);
    let options = &mut peer.options;
    options.verify_cert = check.verify;
    options.verify_hostname = check.verify;
    // The whole check has one limit; none of its parts is left without.
    let timeout = Some(check.timeout.get());
    options.connection_timeout = timeout;
    options.total_connection_timeout = timeout;
    options.read_timeout = timeout;
    options.write_timeout = timeout;
    options.idle_timeout = Some(Duration::ZERO);
    peer
}

fn request(path: &str, host: &str) -> Result<RequestHeader, String> {
    let said = |error: Box<pingora::Error>| error.to_string();
    let mut request = RequestHeader::build("GET", path.as_bytes(), Some(3)).map_err(said)?;
    request.insert_header(header::HOST, host).map_err(said)?;
    let agent = HeaderValue::from_static(concat!("cloakroom/", env!("CARGO_PKG_VERSION"), " (health check)"));
    request.insert_header(header::USER_AGENT, agent).map_err(said)?;
    request.insert_header(header::CONNECTION, HeaderValue::from_static("close")).map_err(said)?;
    Ok(request)
}
