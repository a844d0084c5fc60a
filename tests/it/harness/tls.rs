//! Whom does a test trust? One certificate for `localhost` and 127.0.0.1, made for this process; and authorities of
//! servers that are certified in every way.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CertifiedKey, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd, generate_simple_self_signed,
};
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

/// Certifies parties of its own, beside the one certificate above.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Whom an [`Authority`] certifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Party {
    /// As `localhost` and 127.0.0.1.
    Server,
    /// The same, until the year 2001.
    ExpiredServer,
    Client,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "the authority of a test");
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    /// Writes `authority.pem` into `folder`.
    pub(crate) fn write(&self, folder: &Path) {
        std::fs::write(folder.join("authority.pem"), self.issuer.pem()).unwrap();
    }

    /// Writes `<name>.pem` and `<name>.key` into `folder`.
    pub(crate) fn certify(&self, party: Party, folder: &Path, name: &str) {
        let names = match party {
            Party::Server | Party::ExpiredServer => vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
            Party::Client => Vec::new(),
        };
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![match party {
            Party::Server | Party::ExpiredServer => ExtendedKeyUsagePurpose::ServerAuth,
            Party::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if party == Party::ExpiredServer {
            params.not_before = date_time_ymd(2000, 1, 1);
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}
