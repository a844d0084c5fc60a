//! How is a backend asked whether it is well? By pingora's own client, as its requests are, on a connection of its own.

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use http::{HeaderValue, Uri, header};
use memchr::memmem;
use pingora::connectors::TransportConnector;
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;

use crate::backend::health::{CheckError, Probe};
use crate::backend::{Backend, Pool};
use crate::config::model::Check;

use super::rules::Rules;
use super::transport::{host_of, is_our_own_want};

/// So much of a response is read for the text that shall be in it.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Asks over TCP, TLS, HTTP/1 and HTTP/2, as the rules of the moment say.
pub struct PingoraProbe {
    rules: Arc<ArcSwap<Rules>>,
    http: Connector,
    transport: TransportConnector,
}

impl PingoraProbe {
    pub fn new(rules: Arc<ArcSwap<Rules>>) -> Self {
        Self { rules, http: Connector::new(None), transport: TransportConnector::new(None) }
    }

    /// Who is asked: by the same transport as the requests, unless the check has its own.
    fn peer(&self, pool: &str, backend: &Backend, address: SocketAddr, check: &Check) -> Option<HttpPeer> {
        let mut peer = match &check.tls {
            None => self.rules.load().transports.get(pool)?.peer(backend, address, false),
            Some(tls) => {
                let server_name = server_name(check, backend.host(), backend.name());
                let mut peer = HttpPeer::new(address, *tls.get_ref(), server_name.to_owned());
                peer.options.verify_cert = *check.verify.get_ref();
                peer.options.verify_hostname = *check.verify.get_ref();
                peer
            }
        };
        let options = &mut peer.options;
        // The whole check has one limit; none of its parts is left without.
        let timeout = Some(check.timeout.get());
        options.connection_timeout = timeout;
        options.total_connection_timeout = timeout;
        options.read_timeout = timeout;
        options.write_timeout = timeout;
        // A connection that takes no further request is not kept for one.
        options.max_h2_streams = 1;
        Some(peer)
    }
}

/// Whom the certificate must name: whom the check names, or else as with requests, `host` before what an answer named.
fn server_name<'a>(check: &'a Check, host: Option<&'a str>, name: &'a str) -> &'a str {
    match (&check.server_name, &check.host) {
        (Some(server_name), _) => server_name.get_ref(),
        (None, Some(host)) => host_of(host.get_ref()),
        (None, None) => host.unwrap_or_else(|| host_of(name)),
    }
}

impl std::fmt::Debug for PingoraProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PingoraProbe")
    }
}

#[async_trait]
impl Probe for PingoraProbe {
    async fn ask(&self, pool: &Pool, backend: &Backend, address: SocketAddr, check: &Check) -> Result<(), CheckError> {
        let host = check.host.as_ref().map_or(backend.name(), |host| host.get_ref());
        let peer = self.peer(pool.name(), backend, address, check).ok_or_else(|| "its pool is gone".to_owned())?;
        let Some(path) = &check.path else {
            return self.transport.new_stream(&peer).await.map(drop).map_err(unconnected);
        };
        // Never given back, so that each check sees what a new connection does.
        let (mut upstream, _) = self.http.get_http_session(&peer).await.map_err(unconnected)?;
        let request = if upstream.as_http2().is_some() {
            let scheme = if peer.is_tls() { "https" } else { "http" };
            request_in_http2(scheme, host, path.get_ref())?
        } else {
            request_in_http1(host, path.get_ref()).map_err(said)?
        };
        upstream.write_request_header(Box::new(request)).await.map_err(said)?;
        upstream.finish_request_body().await.map_err(said)?;
        upstream.read_response_header().await.map_err(said)?;
        let status = upstream.response_header().map_or(0, |response| response.status.as_u16());
        if !check.statuses.0.contains(&status) {
            return Err(format!("status {status}").into());
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
        Err("the body is another".to_owned().into())
    }
}

/// Names itself, so that logs of backends can leave it out.
const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("cloakroom/", env!("CARGO_PKG_VERSION"), " (health check)"));

fn request_in_http1(host: &str, path: &str) -> pingora::Result<RequestHeader> {
    let mut request = RequestHeader::build("GET", path.as_bytes(), Some(3))?;
    request.insert_header(header::HOST, host)?;
    request.insert_header(header::USER_AGENT, AGENT)?;
    request.insert_header(header::CONNECTION, HeaderValue::from_static("close"))?;
    Ok(request)
}

/// The host is part of the target, and fields of the connection are not allowed (RFC 9113, sections 8.2.2 and 8.3.1).
fn request_in_http2(scheme: &str, host: &str, path: &str) -> Result<RequestHeader, String> {
    let uri = Uri::builder().scheme(scheme).authority(host).path_and_query(path).build();
    let mut request = RequestHeader::build("GET", b"/", Some(1)).map_err(said)?;
    request.set_uri(uri.map_err(|error| error.to_string())?);
    request.insert_header(header::USER_AGENT, AGENT).map_err(said)?;
    Ok(request)
}

fn unconnected(error: Box<pingora::Error>) -> CheckError {
    if is_our_own_want(&error) { CheckError::Unasked(said(error)) } else { CheckError::Failed(said(error)) }
}

/// What it is, and what it comes from; what stands between says the same again.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn said(error: Box<pingora::Error>) -> String {
    let mut innermost = &error;
    while let Some(cause) = innermost.cause.as_ref().and_then(|cause| cause.downcast_ref::<Box<pingora::Error>>()) {
        innermost = cause;
    }
    let kind = error.etype.as_str();
    match (&innermost.cause, &innermost.context) {
        (Some(cause), _) => format!("{kind}: {cause}"),
        (None, Some(context)) => format!("{kind}: {}", context.as_str()),
        (None, None) => kind.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_over_tls_wants_the_name_that_is_configured_and_never_one_that_only_an_answer_named() {
        for (keys, host, expected) in [
            ("server_name = \"own.test\"\nhost = \"host.test\"", Some("api.test"), "own.test"),
            ("host = \"host.test:8443\"", Some("api.test"), "host.test"),
            ("", Some("api.test"), "api.test"),
            ("", None, "answer.test"),
        ] {
            let check: Check = toml::from_str(keys).unwrap();
            assert_eq!(server_name(&check, host, "answer.test:443"), expected, "{keys:?} {host:?}");
        }
    }
}
