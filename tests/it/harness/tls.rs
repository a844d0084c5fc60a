//! Whom does a test trust? One certificate for `localhost` and 127.0.0.1, made for this process; and authorities of
//! servers that are certified in every way.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CertifiedKey, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd, generate_simple_self_signed,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
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

/// A client of HTTP/2 that trusts whom `trust` does.
pub(crate) fn http2(trust: &Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(trust);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
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

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A server of these names: its chain and its key, PEM.
    pub(crate) fn server(&self, names: &[&str], party: Party) -> (String, String) {
        self.sign(names.iter().map(|&name| name.to_owned()).collect(), names.first().unwrap_or(&"nobody"), party)
    }

    /// A client of this common name: its chain and its key, PEM.
    pub(crate) fn client(&self, name: &str) -> (String, String) {
        self.sign(vec![format!("{name}.clients.example.org")], name, Party::Client)
    }

    /// A client that trusts this authority, and shows `own` if there is any.
    pub(crate) fn trust(&self, own: Option<&(String, String)>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = versions.with_root_certificates(roots);
        Arc::new(match own {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap).collect();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        })
    }

    fn sign(&self, names: Vec<String>, common_name: &str, party: Party) -> (String, String) {
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![match party {
            Party::Server | Party::ExpiredServer => ExtendedKeyUsagePurpose::ServerAuth,
            Party::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if party == Party::ExpiredServer {
            params.not_before = date_time_ymd(2000, 1, 1);
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
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
        let (chain, key) = self.sign(names, name, party);
        std::fs::write(folder.join(format!("{name}.pem")), chain).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key).unwrap();
    }
}
