//! What does `[store.redis]` mean? A URL and files become what a connection is made from.

use std::error::Error;
use std::fmt;

use redis::io::tcp::TcpSettings;
use redis::{Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, TlsCertificates};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::config::model;

/// What is wrong with `[store.redis]`. Never holds the URL, which may hold a password.
#[derive(Debug)]
pub enum SettingsError {
    Url(String),
    Prefix(String),
    Ca(String),
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

pub(super) fn client(settings: &model::RedisStore) -> Result<Client, SettingsError> {
    let invalid = |reason: &str| SettingsError::Url(reason.to_owned());
    let url = settings.url.get_ref().expose();
    let known = ["redis://", "rediss://", "unix://", "redis+unix://"];
    if !known.iter().any(|scheme| url.starts_with(scheme)) {
        return Err(invalid("expected redis://, rediss:// or unix://"));
    }
    if url.contains('#') {
        return Err(invalid("a fragment has no meaning here (and TLS is never unchecked)"));
    }
    // The client's message says which part is wrong and holds none of it, but for the protocol's number.
    let info: ConnectionInfo = url.into_connection_info().map_err(|error| invalid(&error.to_string()))?;
    let login = info.redis_settings();
    if login.username().is_some() && login.password().is_none() {
        return Err(invalid("there is a user, but no password"));
    }
    if login.db() < 0 {
        return Err(invalid("the database number is negative"));
    }
    let is_tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
    // RESP3 tells at once when a connection ends; CLIENT SETINFO would need a permission of its own.
    let login = login.clone().set_protocol(ProtocolVersion::RESP3).set_skip_set_lib_name();
    let info = info.set_redis_settings(login).set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let root_cert = settings.ca.as_ref().map(|path| read_authorities(path.get_ref())).transpose()?;
    match (is_tls, root_cert) {
        (true, root_cert) => Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert })
            .map_err(|error| SettingsError::Ca(error.to_string())),
        (false, None) => Client::open(info).map_err(|error| invalid(&error.to_string())),
        (false, Some(_)) => Err(SettingsError::Ca("it is for rediss:// only".into())),
    }
}

fn read_authorities(path: &std::path::Path) -> Result<Vec<u8>, SettingsError> {
    let pem = std::fs::read(path).map_err(|error| SettingsError::Ca(format!("cannot be read: {error}")))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(pem),
        Ok(_) => Err(SettingsError::Ca("there is no certificate in it".into())),
        Err(error) => Err(SettingsError::Ca(format!("is not PEM: {error}"))),
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(reason) => write!(f, "invalid url: {reason}"),
            Self::Prefix(reason) => write!(f, "invalid prefix: {reason}"),
            Self::Ca(reason) => write!(f, "invalid ca: {reason}"),
        }
    }
}

impl Error for SettingsError {}
