//! What does a client's certificate say? Its subject and its alternative names, in the form that headers can carry.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::X509Name;

use crate::config::value::CertificateField;

/// A certificate that was verified. Each text is empty when the certificate has no such thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Certificate {
    subject: String,
    common_name: String,
    dns: Vec<String>,
    email: Vec<String>,
    uri: Vec<String>,
    fingerprint: String,
}

impl Certificate {
    /// None when it cannot be read.
    pub fn parse(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let common_name = subject.iter_common_name().last().and_then(|name| name.as_str().ok());
        let mut parsed = Self {
            subject: distinguished_name(subject)?,
            common_name: common_name.unwrap_or_default().to_owned(),
            fingerprint: Sha256::digest(der).iter().fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            }),
            ..Self::default()
        };
        if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
            for name in &alternatives.value.general_names {
                match name {
                    GeneralName::DNSName(name) => parsed.dns.push((*name).to_owned()),
                    GeneralName::RFC822Name(name) => parsed.email.push((*name).to_owned()),
                    GeneralName::URI(name) => parsed.uri.push((*name).to_owned()),
                    _ => {}
                }
            }
        }
        Some(parsed)
    }

    /// The texts of this kind, in the order of the certificate.
    pub fn texts(&self, field: CertificateField) -> &[String] {
        match field {
            CertificateField::Subject => std::slice::from_ref(&self.subject),
            CertificateField::CommonName => std::slice::from_ref(&self.common_name),
            CertificateField::Fingerprint => std::slice::from_ref(&self.fingerprint),
            CertificateField::Dns => &self.dns,
            CertificateField::Email => &self.email,
            CertificateField::Uri => &self.uri,
        }
    }
}

/// As RFC 4514 writes it: the last part first, and what has a meaning escaped, so that no name can pretend to have
/// another part. None when a part is no text.
fn distinguished_name(name: &X509Name<'_>) -> Option<String> {
    let mut text = String::new();
    let parts: Vec<_> = name.iter_rdn().collect();
    for (index, part) in parts.iter().rev().enumerate() {
        for (place, attribute) in part.iter().enumerate() {
            match (index, place) {
                (0, 0) => {}
                (_, 0) => text.push(','),
                _ => text.push('+'),
            }
            let oid = attribute.attr_type().to_id_string();
            let keyword = KEYWORDS.iter().find(|(known, _)| *known == oid).map_or(oid.as_str(), |(_, keyword)| keyword);
            text.push_str(keyword);
            text.push('=');
            escape(attribute.as_str().ok()?, &mut text);
        }
    }
    Some(text)
}

/// RFC 4514, section 2.4.
fn escape(value: &str, to: &mut String) {
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        let is_special = matches!(character, '"' | '+' | ',' | ';' | '<' | '>' | '\\');
        let is_edge = (character == ' ' && (index == 0 || index == last)) || (character == '#' && index == 0);
        match character {
            '\0' => to.push_str("\\00"),
            _ if is_special || is_edge => to.extend(['\\', character]),
            _ => to.push(character),
        }
    }
}

/// RFC 4514, section 3; others are written by their number.
const KEYWORDS: [(&str, &str); 9] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.6", "C"),
    ("2.5.4.9", "STREET"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("0.9.2342.19200300.100.1.1", "UID"),
];

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(fill: impl FnOnce(&mut CertificateParams)) -> Certificate {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        fill(&mut params);
        let signed = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Certificate::parse(signed.der()).unwrap()
    }

    #[test]
    fn a_subject_cannot_pretend_to_have_another_part() {
        let cases = [
            ("ann", "CN=ann,O=Acme"),
            ("ann,OU=admins", "CN=ann\\,OU=admins,O=Acme"),
            ("a+b;c<d>\"e\\", "CN=a\\+b\\;c\\<d\\>\\\"e\\\\,O=Acme"),
            ("#ann ", "CN=\\#ann\\ ,O=Acme"),
        ];
        for (name, expected) in cases {
            let parsed = certificate(|params| {
                params.distinguished_name.push(DnType::OrganizationName, "Acme");
                params.distinguished_name.push(DnType::CommonName, name);
            });
            assert_eq!(parsed.texts(CertificateField::Subject), [expected]);
            assert_eq!(parsed.texts(CertificateField::CommonName), [name]);
        }
    }

    #[test]
    fn alternative_names_are_told_by_their_kind() {
        let parsed = certificate(|params| {
            params.subject_alt_names = vec![
                SanType::DnsName("a.example.org".try_into().unwrap()),
                SanType::Rfc822Name("ann@example.org".try_into().unwrap()),
                SanType::URI("spiffe://example.org/ann".try_into().unwrap()),
                SanType::DnsName("b.example.org".try_into().unwrap()),
            ];
        });
        assert_eq!(parsed.texts(CertificateField::Dns), ["a.example.org", "b.example.org"]);
        assert_eq!(parsed.texts(CertificateField::Email), ["ann@example.org"]);
        assert_eq!(parsed.texts(CertificateField::Uri), ["spiffe://example.org/ann"]);
        assert_eq!(parsed.texts(CertificateField::Fingerprint)[0].len(), 64);
        assert_eq!(parsed.texts(CertificateField::CommonName), [""]);
    }

    #[test]
    fn noise_is_no_certificate() {
        assert_eq!(Certificate::parse(b"noise"), None);
        assert_eq!(Certificate::parse(b""), None);
    }
}
