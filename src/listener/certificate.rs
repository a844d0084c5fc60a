//! With which certificate does a listener answer? One read from two files, and exchanged under the open socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::config::error::ConfigError;
use crate::config::model;

/// A certificate with its key, which a reload replaces under the open socket.
#[derive(Debug)]
pub struct Certificate {
    current: ArcSwap<CertifiedKey>,
    cert: PathBuf,
    key: PathBuf,
}

impl Certificate {
    /// The listener's certificate; none when it speaks plain HTTP.
    pub fn of(listener: &model::Listener) -> Result<Option<Arc<Self>>, ConfigError> {
        let (Some(cert), Some(key)) = (&listener.cert, &listener.key) else { return Ok(None) };
        let (cert, key) = (cert.get_ref().clone(), key.get_ref().clone());
        let current = ArcSwap::from_pointee(read_certificate(&cert, &key)?);
        Ok(Some(Arc::new(Self { current, cert, key })))
    }

    /// Whether it is of the same files.
    pub fn is_same(&self, other: &Self) -> bool {
        (&self.cert, &self.key) == (&other.cert, &other.key)
    }

    /// From the next handshake on, this is `other`.
    pub fn replace(&self, other: &Self) {
        self.current.store(other.current.load_full());
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

fn read_certificate(cert: &Path, key: &Path) -> Result<CertifiedKey, ConfigError> {
    let pem = |file: &Path| std::fs::read(file).map_err(|error| ConfigError::unreadable(file, &error));
    let chain = CertificateDer::pem_slice_iter(&pem(cert)?)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| {
            ConfigError::of_file(cert, "is not a PEM certificate chain", "the server's certificate comes first")
        })?;
    let private = PrivateKeyDer::from_pem_slice(&pem(key)?)
        .map_err(|_| ConfigError::of_file(key, "is not a PEM private key", "expected PKCS#8, PKCS#1 or SEC1"))?;
    CertifiedKey::from_der(chain, private, &rustls::crypto::ring::default_provider()).map_err(|error| {
        ConfigError::of_file(
            key,
            &format!("does not fit the certificate: {error}"),
            "check that both files belong together",
        )
    })
}
