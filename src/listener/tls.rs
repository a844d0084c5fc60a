//! With which certificate does a listener answer, and whom does it ask for one? Read from files, and exchanged under the
//! open socket.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use pingora::listeners::tls::Acceptor;
use pingora::protocols::IO;
use pingora::protocols::tls::TlsStream;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::error::ConfigError;
use crate::config::model::{self, ClientCertificates};
use crate::metrics::Metrics;
use crate::pem;

/// The TLS side of one listener.
#[derive(Debug)]
pub struct Tls {
    address: SocketAddr,
    current: ArcSwap<Terms>,
}

/// What one handshake is held by. Replaced as a whole, so that nobody resumes what was agreed under other terms.
struct Terms {
    acceptor: Acceptor,
    certificates: Vec<Expiring>,
    /// Those of clients: the file and what it holds.
    authorities: Option<(PathBuf, Vec<CertificateDer<'static>>)>,
}

/// A certificate of ours, and how long it is good for.
#[derive(Debug)]
struct Expiring {
    file: PathBuf,
    der: Vec<u8>,
    /// Seconds since 1970.
    not_after: i64,
}

impl Tls {
    /// Reads what the listener names; none when it speaks plain HTTP.
    pub fn of(listener: &model::Listener) -> Result<Option<Arc<Self>>, ConfigError> {
        let (Some(cert), Some(key)) = (&listener.cert, &listener.key) else { return Ok(None) };
        let mut names = Names::new(pem::certified(cert.get_ref(), key.get_ref())?);
        let mut certificates = vec![Expiring::of(cert.get_ref(), &names.default)];
        for files in &listener.certificates {
            let certified = Arc::new(pem::certified(files.cert.get_ref(), files.key.get_ref())?);
            certificates.push(Expiring::of(files.cert.get_ref(), &certified));
            names.add(&certified);
        }

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(cert.get_ref(), &error))?;
        let mut authorities = None;
        let builder = match &listener.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                authorities = Some((file.get_ref().clone(), pem::certificates(file.get_ref())?));
                let roots = Arc::new(pem::authorities(file.get_ref())?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                let verifier = match listener.client_certificates {
                    ClientCertificates::Optional => verifier.allow_unauthenticated(),
                    ClientCertificates::Required => verifier,
                };
                builder.with_client_cert_verifier(verifier.build().map_err(|error| unusable(file.get_ref(), &error))?)
            }
        };
        let mut config = builder.with_cert_resolver(Arc::new(names));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if listener.http2 {
            config.alpn_protocols.insert(0, b"h2".to_vec());
        }
        let acceptor = Acceptor::from_server_config(Arc::new(config));
        let current = ArcSwap::from_pointee(Terms { acceptor, certificates, authorities });
        Ok(Some(Arc::new(Self { address: *listener.address.get_ref(), current })))
    }

    /// Whether it is of the same listener.
    pub fn is_same(&self, other: &Self) -> bool {
        self.address == other.address
    }

    /// Whether `new` may take the place of this: a certificate that has expired does not replace anything.
    pub fn accepts(&self, new: &Self, now: i64) -> Result<(), ConfigError> {
        let (current, new) = (self.current.load(), new.current.load());
        let is_served = |der: &[u8]| current.certificates.iter().any(|served| served.der == der);
        match new.certificates.iter().find(|new| new.not_after < now && !is_served(&new.der)) {
            None => Ok(()),
            Some(expired) => Err(ConfigError::of_file(
                &expired.file,
                "has expired",
                "the certificate that is served stays: renew this one, and reload again",
            )),
        }
    }

    /// The files that hold something else than in `previous`, a line each.
    pub fn renewed_since(&self, previous: &Self) -> Vec<String> {
        let (current, previous) = (self.current.load(), previous.current.load());
        let is_renewed =
            |new: &&Expiring| previous.certificates.iter().any(|old| old.file == new.file && old.der != new.der);
        let certificates = current.certificates.iter().filter(is_renewed).map(|new| ("certificate", &new.file));
        let authorities = match (&current.authorities, &previous.authorities) {
            (Some((file, now)), Some((same, before))) if file == same && now != before => Some(("client_ca", file)),
            (Some(_) | None, _) => None,
        };
        let files = certificates.chain(authorities);
        files.map(|(what, file)| format!("{what} {}: content", file.display())).collect()
    }

    /// From the next handshake on, this is `other`.
    pub fn replace(&self, other: &Self) {
        self.current.store(other.current.load_full());
    }

    /// Says until when its certificates are good.
    pub fn report(&self, metrics: &Metrics, now: i64) {
        for certificate in &self.current.load().certificates {
            let file = certificate.file.display().to_string();
            metrics.certificate_expires.with_label_values(&[&file]).set(certificate.not_after);
            if certificate.not_after < now {
                tracing::error!(file, "this certificate has expired: browsers turn away from it");
            } else if certificate.not_after - now < WARN_SECONDS {
                tracing::warn!(file, days = (certificate.not_after - now) / DAY_SECONDS, "this certificate ends soon");
            }
        }
    }

    pub(super) async fn handshake<S: IO + 'static>(&self, stream: S) -> pingora::Result<TlsStream<S>> {
        let terms = self.current.load_full();
        terms.acceptor.tls_handshake(stream).await
    }
}

impl fmt::Debug for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terms").field("certificates", &self.certificates.len()).finish_non_exhaustive()
    }
}

impl Expiring {
    fn of(file: &Path, certified: &CertifiedKey) -> Self {
        let der = certified.cert.first().map(|leaf| leaf.to_vec()).unwrap_or_default();
        let not_after = X509Certificate::from_der(&der).map_or(0, |(_, leaf)| leaf.validity().not_after.timestamp());
        Self { file: file.to_owned(), der, not_after }
    }
}

/// Which certificate for which name (RFC 6066, section 3). The names are those that the certificates have.
#[derive(Debug)]
struct Names {
    /// For who asks for no name, or for one that none has.
    default: Arc<CertifiedKey>,
    /// In lower case; `*.` for all names of one level below. The first certificate that has a name keeps it.
    by_name: HashMap<String, Arc<CertifiedKey>>,
}

impl Names {
    fn new(default: CertifiedKey) -> Self {
        let default = Arc::new(default);
        let mut names = Self { default: Arc::clone(&default), by_name: HashMap::new() };
        names.add(&default);
        names
    }

    fn add(&mut self, certified: &Arc<CertifiedKey>) {
        let Some(leaf) = certified.cert.first() else { return };
        let Ok((_, leaf)) = X509Certificate::from_der(leaf) else { return };
        let Ok(Some(alternatives)) = leaf.subject_alternative_name() else { return };
        for name in &alternatives.value.general_names {
            if let GeneralName::DNSName(name) = name {
                self.by_name.entry(name.to_ascii_lowercase()).or_insert_with(|| Arc::clone(certified));
            }
        }
    }

    fn find(&self, name: &str) -> &Arc<CertifiedKey> {
        let name = name.to_ascii_lowercase();
        let wildcard = || name.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        let found = self.by_name.get(&name).or_else(|| self.by_name.get(&wildcard()?));
        found.unwrap_or(&self.default)
    }
}

impl ResolvesServerCert for Names {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(hello.server_name().map_or(&self.default, |name| self.find(name))))
    }
}

fn unusable(file: &Path, error: &dyn std::error::Error) -> ConfigError {
    ConfigError::of_file(file, &format!("cannot be used: {error}"), "see the certificates that it holds")
}

const DAY_SECONDS: i64 = 24 * 60 * 60;
/// Certificates of ninety days are renewed thirty days before they end: something does not renew them.
const WARN_SECONDS: i64 = 14 * DAY_SECONDS;
