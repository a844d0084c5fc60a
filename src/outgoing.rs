//! How do we ask a server that is not ours? Over verified TLS, without following it anywhere, for a limited time.

use std::sync::Arc;
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Blocks whoever asks with it for up to `limit`, from the look-up of the name to the end of the answer.
///
/// `is_confidential`: some of what is asked goes over TLS; else no authorities are read.
pub fn agent(is_confidential: bool, limit: Duration) -> Agent {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let authorities = if is_confidential { authorities() } else { RootCerts::WebPki };
    let trust = TlsConfig::builder().root_certs(authorities).unversioned_rustls_crypto_provider(provider);
    let config = Agent::config_builder()
        .tls_config(trust.build())
        .timeout_connect(Some(limit / 2))
        .timeout_global(Some(limit))
        // A redirect could carry a secret to somebody else.
        .max_redirects(0)
        .http_status_as_error(false)
        // Where things go is said by our own file alone, not by HTTP_PROXY.
        .proxy(None)
        .user_agent(concat!("cloakroom/", env!("CARGO_PKG_VERSION")))
        .max_idle_age(Duration::from_secs(10));
    config.build().new_agent()
}

/// The system's, so that a company's own counts; Mozilla's, which are built in, where the system has none.
fn authorities() -> RootCerts {
    let system = rustls_native_certs::load_native_certs().certs;
    if system.is_empty() {
        return RootCerts::WebPki;
    }
    RootCerts::new_with_certs(&system.iter().map(|der| Certificate::from_der(der).to_owned()).collect::<Vec<_>>())
}
