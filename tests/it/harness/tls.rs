//! Whom does a test trust? One certificate for `localhost` and 127.0.0.1, made for this process.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::{ClientConfig, RootCertStore};

static CERTIFIED: LazyLock<CertifiedKey<KeyPair>> =
    LazyLock::new(|| generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap());

/// Writes the certificate chain and its key as PEM files into `folder`.
pub(crate) fn write_files(folder: &Path) -> (PathBuf, PathBuf) {
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    std::fs::write(&cert, CERTIFIED.cert.pem()).unwrap();
    std::fs::write(&key, CERTIFIED.signing_key.serialize_pem()).unwrap();
    (cert, key)
}

/// A client that trusts that certificate and no other.
pub(crate) fn trust() -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CERTIFIED.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(versions.with_root_certificates(roots).with_no_client_auth())
}
