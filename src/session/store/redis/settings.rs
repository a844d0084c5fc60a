//! What does `[store.redis]` mean? A URL and files become what connections are made from.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::config::model;
use crate::config::redis_url::RedisUrl;

/// What is wrong with `[store.redis]`. Never holds the URL, which may hold a password.
#[derive(Debug)]
pub enum SettingsError {
    Url(String),
    Prefix(String),
    Ca(String),
    Cert(String),
    Key(String),
}

const PREFIX_BYTES_MAX: usize = 64;

pub(super) fn check_prefix(prefix: &str) -> Result<(), SettingsError> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'{' | b'}');
    if PREFIX_BYTES_MAX < prefix.len() || !prefix.bytes().all(is_plain) {
        let expected = format!("expected at most {PREFIX_BYTES_MAX} visible ASCII characters without braces");
        return Err(SettingsError::Prefix(expected));
    }
    Ok(())
}

pub(super) fn url(settings: &model::RedisStore) -> Result<RedisUrl, SettingsError> {
    RedisUrl::parse(settings.url.get_ref().expose()).map_err(|message| SettingsError::Url(message.to_owned()))
}

/// None where the URL speaks plainly. The system's authorities are read here, once, and not at each connection.
pub(super) fn tls(settings: &model::RedisStore, url: &RedisUrl) -> Result<Option<Arc<ClientConfig>>, SettingsError> {
    let path_of = |path: &Option<toml::Spanned<std::path::PathBuf>>| path.as_ref().map(|path| path.get_ref().clone());
    let (ca, cert, key) = (path_of(&settings.ca), path_of(&settings.cert), path_of(&settings.key));
    if !url.tls {
        let only_for_tls = || "it is for rediss:// only".to_owned();
        return match (ca, cert, key) {
            (Some(_), ..) => Err(SettingsError::Ca(only_for_tls())),
            (None, Some(_), _) => Err(SettingsError::Cert(only_for_tls())),
            (None, None, Some(_)) => Err(SettingsError::Key(only_for_tls())),
            (None, None, None) => Ok(None),
        };
    }
    let roots = match &ca {
        Some(path) => named_authorities(path)?,
        None => known_authorities()?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| SettingsError::Ca(error.to_string()))?
        .with_root_certificates(roots);
    let config = match (&cert, &key) {
        (None, None) => config.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let chain = certificates(cert).map_err(SettingsError::Cert)?;
            let private = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| SettingsError::Key(format!("cannot be read as a PEM private key: {error}")))?;
            config
                .with_client_auth_cert(chain, private)
                .map_err(|error| SettingsError::Key(format!("does not go with cert: {error}")))?
        }
        (Some(_), None) => return Err(SettingsError::Cert("it needs a key, too".to_owned())),
        (None, Some(_)) => return Err(SettingsError::Key("it needs a cert, too".to_owned())),
    };
    Ok(Some(Arc::new(config)))
}

fn named_authorities(path: &Path) -> Result<RootCertStore, SettingsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path).map_err(SettingsError::Ca)? {
        roots.add(certificate).map_err(|error| SettingsError::Ca(format!("is not an authority: {error}")))?;
    }
    Ok(roots)
}

fn known_authorities() -> Result<RootCertStore, SettingsError> {
    let mut roots = RootCertStore::empty();
    // Systems carry old ones that nobody can read any more; the others count.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let message = "this system knows no authority: name the one of Redis with ca = \"file.pem\"";
        return Err(SettingsError::Ca(message.to_owned()));
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err("there is no certificate in it".to_owned()),
        Err(error) => Err(format!("is not PEM: {error}")),
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, reason) = match self {
            Self::Url(reason) => ("url", reason),
            Self::Prefix(reason) => ("prefix", reason),
            Self::Ca(reason) => ("ca", reason),
            Self::Cert(reason) => ("cert", reason),
            Self::Key(reason) => ("key", reason),
        };
        write!(f, "invalid {key}: {reason}")
    }
}

impl Error for SettingsError {}
