//! What do these files hold? Certificates and private keys in PEM, or what is wrong with them.

use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, sign};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::error::ConfigError;

/// All certificates of the file, at least one, each of them readable; a chain begins with one's own.
pub fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let bytes = read(file)?;
    let all = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>().unwrap_or_default();
    if all.is_empty() || !all.iter().all(|der| X509Certificate::from_der(der).is_ok()) {
        return Err(ConfigError::of_file(
            file,
            "is not a PEM certificate chain",
            "expected -----BEGIN CERTIFICATE----- blocks; in a chain one's own comes first",
        ));
    }
    Ok(all)
}

/// The first private key of the file.
pub fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, ConfigError> {
    PrivateKeyDer::from_pem_slice(&read(file)?)
        .map_err(|_| ConfigError::of_file(file, "is not a PEM private key", "expected PKCS#8, PKCS#1 or SEC1"))
}

/// A chain and its key, which belong together.
pub fn certified(cert: &Path, key: &Path) -> Result<sign::CertifiedKey, ConfigError> {
    let (chain, private) = (certificates(cert)?, private_key(key)?);
    sign::CertifiedKey::from_der(chain, private, &rustls::crypto::ring::default_provider()).map_err(|error| {
        ConfigError::of_file(
            key,
            &format!("does not fit the certificate: {error}"),
            "check that both files belong together",
        )
    })
}

/// Authorities that count, and no others.
pub fn authorities(file: &Path) -> Result<RootCertStore, ConfigError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots.add(certificate).map_err(|error| {
            ConfigError::of_file(file, &format!("holds no authority: {error}"), "expected certificates of authorities")
        })?;
    }
    Ok(roots)
}

fn read(file: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(file).map_err(|error| ConfigError::unreadable(file, &error))
}
