//! Values that cannot be wrong: each parses once, with a message that says what was expected.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Unexpected, Visitor};
use serde::{Serialize, Serializer};
use toml::Spanned;

use super::model::{Backend, BackendSource, HashBy, Place};

/// A span of time, written with its unit: `"250ms"`, `"30s"`, `"30m"`, `"12h"`, `"7d"`. Never zero, at most 400 days.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Duration(std::time::Duration);

/// A size in bytes, written `"8KiB"`, `"100MiB"`, `"1GiB"` or `"512B"`. Never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// A network, `"10.0.0.0/8"`, or a single address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cidr(pub ipnet::IpNet);

/// Statuses of responses, `"200"` or `"200-399"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(pub RangeInclusive<u16>);

/// A share: 0 to 100 percent, with two decimals at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(u16);

/// A text that never prints itself: a string, `{ file = "path" }` or `{ env = "NAME" }`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// Empty until a reference is resolved; `config::parse` lets no empty secret through.
    text: String,
    reference: Option<Reference>,
}

/// A header value with places for what is known of the user: `"{user}"`, `"team {claim.team}"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<TemplatePart>,
}

/// One piece of a [`Template`], in the order in which it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplatePart {
    /// Literal text, without control characters.
    Text(String),
    /// `{user}`
    User,
    /// `{name}`
    Name,
    /// `{email}`
    Email,
    /// `{groups}`
    Groups,
    /// `{claim.NAME}`
    Claim(String),
    /// `{attribute.NAME}`: of the session.
    Attribute(String),
    /// `{certificate.FIELD}`: of the client's certificate.
    Certificate(CertificateField),
}

/// What a client's certificate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateField {
    /// The whole subject (RFC 4514).
    Subject,
    /// Of the subject, the common name.
    CommonName,
    /// The alternative names of these kinds.
    Dns,
    Email,
    Uri,
    /// SHA-256 of the certificate, as 64 hexadecimal digits.
    Fingerprint,
}

#[derive(Clone, PartialEq, Eq)]
enum Reference {
    File(PathBuf),
    Environment(String),
}

/// Browsers keep no cookie for longer (RFC 6265bis, section 5.5), and a clock that far ahead cannot overflow.
const DURATION_MILLIS_MAX: u64 = 400 * 86_400_000;

/// Far more than any password or key; a reference to the wrong file ends early.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

const DURATION_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

const SIZE_UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Secrets that stand in documentation, in lower case and without separators: whoever guesses begins with these.
const SAMPLE_SECRETS: [&str; 24] = [
    "changeme",
    "changeit",
    "replaceme",
    "secret",
    "mysecret",
    "topsecret",
    "password",
    "passw0rd",
    "mypassword",
    "yourpassword",
    "pass",
    "example",
    "sample",
    "default",
    "cloakroom",
    "admin",
    "root",
    "redis",
    "test",
    "demo",
    "letmein",
    "123456",
    "12345678",
    "foobared",
];

impl Duration {
    /// For defaults.
    pub const fn from_millis(millis: u64) -> Self {
        Self(std::time::Duration::from_millis(millis))
    }

    pub const fn get(self) -> std::time::Duration {
        self.0
    }
}

impl Secret {
    pub fn new(text: String) -> Self {
        Self { text, reference: None }
    }

    /// The secret itself; every caller is a place to review.
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// Reads what the secret refers to; a relative file is one of `directory`. The error names the source, never
    /// the content.
    pub(super) fn resolve(
        &mut self,
        directory: &Path,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<(), String> {
        match &self.reference {
            None => {}
            Some(Reference::File(path)) => self.text = read_secret(&directory.join(path))?,
            Some(Reference::Environment(name)) => {
                let value = environment(name).ok_or_else(|| format!("environment variable {name} is not set"))?;
                self.text = value.into_string().map_err(|_| format!("environment variable {name} is not UTF-8"))?;
            }
        }
        if self.text.is_empty() {
            return Err("the secret is empty".to_owned());
        }
        Ok(())
    }
}

impl Template {
    pub fn parts(&self) -> &[TemplatePart] {
        &self.parts
    }
}

/// Whether this is a secret of somebody's documentation, also in another spelling (`Change_Me`), or a gap to be
/// filled in (`<password>`, `xxxx`).
pub fn is_sample_secret(text: &str) -> bool {
    let plain = text.to_ascii_lowercase().replace(['-', '_', ' ', '.'], "");
    let is_gap = text.starts_with('<') && text.ends_with('>');
    let is_filler = !text.is_empty() && text.chars().all(|c| matches!(c, 'x' | 'X' | '*' | '.' | '?'));
    is_gap || is_filler || SAMPLE_SECRETS.contains(&plain.as_str())
}

/// `"127.0.0.1:8080"`, `"[::1]:8080"`: std's own message says only "invalid socket address syntax".
pub(super) fn socket_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Spanned<SocketAddr>, D::Error> {
    struct Address(SocketAddr);
    impl FromStr for Address {
        type Err = String;
        fn from_str(text: &str) -> Result<Self, String> {
            let expected = "expected an IP address and a port, e.g. \"127.0.0.1:8080\" or \"[::]:443\"";
            text.parse().map(Self).map_err(|_| format!("invalid address {text:?}: {expected}"))
        }
    }
    impl<'de> Deserialize<'de> for Address {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_str(Text::expecting("an address with its port in quotes, e.g. \"127.0.0.1:8080\""))
        }
    }
    let address = Spanned::<Address>::deserialize(deserializer)?;
    Ok(Spanned::new(address.span(), address.into_inner().0))
}

fn read_secret(path: &Path) -> Result<String, String> {
    let unreadable = |error: std::io::Error| format!("secret file {} cannot be read: {error}", path.display());
    let mut text = String::new();
    File::open(path).map_err(unreadable)?.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if SECRET_BYTES_MAX < text.len() as u64 {
        return Err(format!("secret file {} is larger than {}", path.display(), Bytes(SECRET_BYTES_MAX)));
    }
    // Editors and `echo` end a file with one newline that nobody means.
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
}

/// `"30m"` as 30 times the unit; none when it is no number, has no such unit, or overflows.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// The number in the largest unit that leaves no rest.
fn write_scaled(f: &mut fmt::Formatter<'_>, number: u64, units: &[(&str, u64)]) -> fmt::Result {
    let exact = units.iter().find(|(_, factor)| number != 0 && number.is_multiple_of(*factor));
    let Some((unit, factor)) = exact else { return write!(f, "{number}") };
    write!(f, "{}{unit}", number / factor)
}

impl FromStr for Duration {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match scaled(text, &DURATION_UNITS) {
            Some(0) => Err(format!("invalid duration {text:?}: must be longer than nothing")),
            Some(millis) if millis <= DURATION_MILLIS_MAX => Ok(Self::from_millis(millis)),
            Some(_) => Err(format!("invalid duration {text:?}: at most 400d")),
            None => {
                Err(format!("invalid duration {text:?}: expected a number and a unit, e.g. \"30m\" (ms, s, m, h, d)"))
            }
        }
    }
}

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match scaled(text, &SIZE_UNITS) {
            Some(0) => Err(format!("invalid size {text:?}: must be larger than nothing")),
            Some(bytes) => Ok(Self(bytes)),
            None => {
                Err(format!("invalid size {text:?}: expected a number and a unit, e.g. \"8KiB\" (B, KiB, MiB, GiB)"))
            }
        }
    }
}

impl FromStr for Cidr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let net = text.parse::<ipnet::IpNet>().or_else(|_| text.parse::<IpAddr>().map(Into::into));
        let net =
            net.map_err(|_| format!("invalid network {text:?}: expected e.g. \"10.0.0.0/8\" or \"192.0.2.7\""))?;
        // Trust is given by this value: a slip of the prefix length must not pass for a network.
        if net != net.trunc() {
            return Err(format!(
                "invalid network {text:?}: bits are set beyond its prefix; the network is {}",
                net.trunc()
            ));
        }
        Ok(Self(net))
    }
}

impl FromStr for Statuses {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let status = |text: &str| {
            let is_status = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|status| is_status && (200..=599).contains(status))
        };
        match (status(first), status(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self(first..=last)),
            _ => Err(format!("invalid statuses {text:?}: expected e.g. \"200\" or \"200-399\" (200 to 599)")),
        }
    }
}

impl Percent {
    /// Everything.
    pub const ALL: Self = Self(10_000);

    /// In hundredths of a percent: 0 to 10 000.
    pub const fn basis_points(self) -> u16 {
        self.0
    }

    /// At most [`Self::ALL`].
    pub const fn of_basis_points(basis_points: u16) -> Self {
        if basis_points < Self::ALL.0 { Self(basis_points) } else { Self::ALL }
    }

    /// None when it is no percentage, or has further decimals.
    fn of(percent: f64) -> Option<Self> {
        let hundredths = percent * 100.0;
        // 0.29 * 100.0 is 28.999999999999996: what is written has no third decimal all the same.
        let is_exact = (hundredths - hundredths.round()).abs() < 1e-6;
        let is_share = (0.0..=100.0).contains(&percent);
        (is_share && is_exact).then(|| Self(hundredths.round() as u16))
    }
}

impl FromStr for Percent {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let number = text.parse().ok().filter(|_| is_number);
        number.and_then(Self::of).ok_or_else(|| not_a_percentage(text))
    }
}

fn not_a_percentage(found: impl fmt::Display) -> String {
    format!("invalid percentage {found}: expected 0 to 100, with two decimals at most, e.g. 5 or 0.25")
}

impl Default for Statuses {
    fn default() -> Self {
        Self(200..=299)
    }
}

impl FromStr for HashBy {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "user" => Ok(Self::User),
            None if text == "client" => Ok(Self::Client),
            Some(("header", name)) => name.parse().map(Self::Header).map_err(|_| format!("invalid header {name:?}")),
            _ => Err(format!("unknown {text:?}: expected \"user\", \"client\" or \"header:NAME\"")),
        }
    }
}

impl FromStr for Template {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty template: expected e.g. \"{user}\"".to_owned());
        }
        if text.chars().any(char::is_control) {
            return Err(format!("invalid template {text:?}: a header value holds no control characters"));
        }
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from_brace) = rest.split_at(at);
            let (brace, after) = from_brace.split_at(1);
            literal.push_str(before);
            if let Some(after) = after.strip_prefix(brace) {
                literal.push_str(brace);
                rest = after;
                continue;
            }
            let placeholder = if brace == "{" { after.split_once('}') } else { None };
            let Some((name, after)) = placeholder else {
                return Err(format!(
                    "invalid template {text:?}: a lone `{brace}`; write `{brace}{brace}` for the character itself"
                ));
            };
            if !literal.is_empty() {
                parts.push(TemplatePart::Text(std::mem::take(&mut literal)));
            }
            parts.push(placeholder_part(name)?);
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(TemplatePart::Text(literal));
        }
        Ok(Self { parts })
    }
}

fn placeholder_part(name: &str) -> Result<TemplatePart, String> {
    Ok(match name {
        "user" => TemplatePart::User,
        "name" => TemplatePart::Name,
        "email" => TemplatePart::Email,
        "groups" => TemplatePart::Groups,
        _ => match name.split_once('.') {
            Some(("claim", claim)) if !claim.is_empty() && !claim.contains('{') => {
                TemplatePart::Claim(claim.to_owned())
            }
            Some(("attribute", attribute)) if !attribute.is_empty() && !attribute.contains('{') => {
                TemplatePart::Attribute(attribute.to_owned())
            }
            Some(("certificate", field)) => TemplatePart::Certificate(match field {
                "subject" => CertificateField::Subject,
                "cn" => CertificateField::CommonName,
                "dns" => CertificateField::Dns,
                "email" => CertificateField::Email,
                "uri" => CertificateField::Uri,
                "fingerprint" => CertificateField::Fingerprint,
                _ => {
                    return Err(format!(
                        "unknown placeholder `{{{name}}}`, expected one of `{{certificate.subject}}`, `.cn`, `.dns`, \
                         `.email`, `.uri`, `.fingerprint`"
                    ));
                }
            }),
            _ => {
                return Err(format!(
                    "unknown placeholder `{{{name}}}`, expected one of `{{user}}`, `{{name}}`, `{{email}}`, \
                     `{{groups}}`, `{{claim.NAME}}`, `{{attribute.NAME}}`, `{{certificate.FIELD}}`"
                ));
            }
        },
    })
}

/// Reads a string by its type's `FromStr`; anything else in its place is answered with `expected`.
struct Text<T> {
    expected: &'static str,
    value: PhantomData<T>,
}

impl<T> Text<T> {
    fn expecting(expected: &'static str) -> Self {
        Self { expected, value: PhantomData }
    }
}

impl<T: FromStr<Err = String>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

macro_rules! deserialize_from_text {
    ($($value:ty: $expected:literal,)*) => {$(
        impl<'de> Deserialize<'de> for $value {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(Text::expecting($expected))
            }
        }
    )*};
}

deserialize_from_text! {
    Duration: "a number and a unit in quotes, e.g. \"30s\" (ms, s, m, h, d)",
    Bytes: "a number and a unit in quotes, e.g. \"8KiB\" (B, KiB, MiB, GiB)",
    Cidr: "a network in quotes, e.g. \"10.0.0.0/8\"",
    Template: "a header value in quotes, e.g. \"{user}\"",
    Statuses: "a status or a range in quotes, e.g. \"200-399\"",
    HashBy: "\"user\", \"client\" or \"header:NAME\"",
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PercentVisitor)
    }
}

struct PercentVisitor;

impl Visitor<'_> for PercentVisitor {
    type Value = Percent;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a percentage without quotes, e.g. 5 or 0.25")
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Percent, E> {
        Percent::of(number).ok_or_else(|| E::custom(not_a_percentage(number)))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Percent, E> {
        self.visit_f64(number as f64)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Percent, E> {
        self.visit_f64(number as f64)
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => serializer.serialize_u16(whole),
            _ => serializer.serialize_f64(f64::from(self.0) / 100.0),
        }
    }
}

impl<'de> Deserialize<'de> for BackendSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BackendVisitor)
    }
}

struct BackendVisitor;

const NO_PLACE: &str = "nothing says where it is: add address = \"host:port\", or dns, srv or file";

/// The long form.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BackendTable {
    address: Option<String>,
    dns: Option<String>,
    srv: Option<String>,
    file: Option<Spanned<PathBuf>>,
    weight: Option<u32>,
    max_requests: Option<u32>,
    backup: Option<bool>,
    drain: Option<bool>,
}

impl<'de> Visitor<'de> for BackendVisitor {
    type Value = BackendSource;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"host:port\" or { address = \"host:port\", weight = 2, ... }")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<BackendSource, E> {
        Ok(BackendSource { place: Place::Address, each: Backend::at(text.to_owned()) })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<BackendSource, A::Error> {
        let table = BackendTable::deserialize(MapAccessDeserializer::new(map))?;
        let BackendTable { address, dns, srv, file, weight, max_requests, backup, drain } = table;
        let (place, address) = match (address, dns, srv, file) {
            (Some(address), None, None, None) => (Place::Address, address),
            (None, Some(host), None, None) => (Place::Dns(host), String::new()),
            (None, None, Some(name), None) => (Place::Srv(name), String::new()),
            (None, None, None, Some(path)) => (Place::File(path), String::new()),
            (None, None, None, None) => return Err(de::Error::custom(NO_PLACE)),
            _ => return Err(de::Error::custom("a backend is at one place: either address, dns, srv or file")),
        };
        match place {
            Place::Srv(_) if weight.is_some() => {
                return Err(de::Error::custom("SRV records have weights of their own: leave weight out"));
            }
            Place::File(_) if weight.is_some() || max_requests.is_some() || backup.is_some() || drain.is_some() => {
                return Err(de::Error::custom("what is said of a backend stands in the file itself"));
            }
            Place::Address | Place::Dns(_) | Place::Srv(_) | Place::File(_) => {}
        }
        let each = Backend {
            weight: weight.unwrap_or(1),
            max_requests: max_requests.unwrap_or(0),
            backup: backup.unwrap_or(false),
            drain: drain.unwrap_or(false),
            ..Backend::at(address)
        };
        Ok(BackendSource { place, each })
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SecretVisitor)
    }
}

struct SecretVisitor;

impl<'de> Visitor<'de> for SecretVisitor {
    type Value = Secret;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, { file = \"path\" } or { env = \"NAME\" }")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Secret, E> {
        Ok(Secret::new(text.to_owned()))
    }

    // A secret of digits whose quotes were forgotten: the message must not quote it, as that of serde would.
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Secret, E> {
        Err(E::invalid_type(Unexpected::Other("a number"), &self))
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Secret, E> {
        Err(E::invalid_type(Unexpected::Other("a number"), &self))
    }

    fn visit_i128<E: de::Error>(self, _: i128) -> Result<Secret, E> {
        Err(E::invalid_type(Unexpected::Other("a number"), &self))
    }

    fn visit_u128<E: de::Error>(self, _: u128) -> Result<Secret, E> {
        Err(E::invalid_type(Unexpected::Other("a number"), &self))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Secret, E> {
        Err(E::invalid_type(Unexpected::Other("a number"), &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Secret, A::Error> {
        let mut reference = None;
        while let Some(key) = map.next_key::<String>()? {
            let named = match key.as_str() {
                "file" => Reference::File(map.next_value()?),
                "env" => Reference::Environment(map.next_value()?),
                _ => return Err(de::Error::unknown_field(&key, &["file", "env"])),
            };
            if reference.replace(named).is_some() {
                return Err(de::Error::custom("a secret comes from one place: either `file` or `env`"));
            }
        }
        match &reference {
            None => Err(de::Error::custom("expected { file = \"path\" } or { env = \"NAME\" }")),
            Some(Reference::Environment(name)) if name.is_empty() || name.contains(['=', '\0']) => {
                Err(de::Error::custom(format!("invalid name of an environment variable {name:?}")))
            }
            Some(_) => Ok(Secret { text: String::new(), reference }),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("****")
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0.as_millis().try_into().unwrap_or(u64::MAX), &DURATION_UNITS)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => write!(f, "{whole}"),
            (whole, tenths) if tenths % 10 == 0 => write!(f, "{whole}.{}", tenths / 10),
            (whole, hundredths) => write!(f, "{whole}.{hundredths:02}"),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0, &SIZE_UNITS)
    }
}

impl fmt::Debug for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_number_and_its_unit() {
        let cases = [
            ("250ms", Some(250)),
            ("30s", Some(30_000)),
            ("30m", Some(1_800_000)),
            ("12h", Some(43_200_000)),
            ("400d", Some(DURATION_MILLIS_MAX)),
            ("401d", None),
            ("0s", None),
            ("30", None),
            ("", None),
            ("s", None),
            ("+3s", None),
            ("-3s", None),
            ("1.5h", None),
            ("3 s", None),
            ("3S", None),
            ("٣s", None),
            ("99999999999999999999s", None),
            ("18446744073709551615d", None),
        ];
        for (text, millis) in cases {
            let parsed = text.parse::<Duration>().ok();
            assert_eq!(parsed, millis.map(Duration::from_millis), "{text:?}");
        }
    }

    #[test]
    fn a_size_is_a_number_and_its_unit() {
        let cases = [
            ("512B", Some(512)),
            ("8KiB", Some(8 << 10)),
            ("100MiB", Some(100 << 20)),
            ("1GiB", Some(1 << 30)),
            ("0B", None),
            ("8", None),
            ("8KB", None),
            ("8k", None),
            ("17179869184GiB", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse::<Bytes>().ok(), bytes.map(Bytes), "{text:?}");
        }
    }

    #[test]
    fn durations_and_sizes_print_as_they_are_written() {
        for text in ["250ms", "90s", "30m", "12h", "7d"] {
            assert_eq!(text.parse::<Duration>().unwrap().to_string(), text);
        }
        for text in ["1000B", "8KiB", "100MiB", "1GiB"] {
            assert_eq!(text.parse::<Bytes>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn statuses_are_one_or_a_range() {
        for (text, statuses) in [("200", Some(200..=200)), ("200-399", Some(200..=399)), ("599", Some(599..=599))] {
            assert_eq!(text.parse::<Statuses>().ok(), statuses.map(Statuses), "{text}");
        }
        for text in ["", "2xx", "0200", "399-200", "100", "600", "+20", "200-", "200 - 299", "200-299-300"] {
            assert!(text.parse::<Statuses>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_percentage_has_two_decimals_at_most() {
        #[derive(Deserialize)]
        struct Holder {
            percent: Percent,
        }
        for (text, expected) in [
            ("0", Some(0)),
            ("5", Some(500)),
            ("5.0", Some(500)),
            ("0.01", Some(1)),
            ("0.29", Some(29)),
            ("33.33", Some(3_333)),
            ("99.99", Some(9_999)),
            ("100", Some(10_000)),
            ("100.01", None),
            ("101", None),
            ("0.001", None),
            ("33.333", None),
            ("-1", None),
            ("-0.5", None),
            ("+5", None),
            ("1e1", None),
            ("nan", None),
            ("inf", None),
            ("", None),
        ] {
            assert_eq!(text.parse().ok(), expected.map(Percent), "{text}");
        }
        for basis_points in 0..=10_000 {
            let percent = Percent(basis_points);
            let written = percent.to_string();
            assert_eq!(written.parse(), Ok(percent), "as a word");
            assert_eq!(toml::from_str::<Holder>(&format!("percent = {written}")).unwrap().percent, percent);
            let json = serde_json::to_string(&percent).unwrap();
            assert_eq!((&json, serde_json::from_str(&json).unwrap()), (&written, percent));
        }
        for wrong in ["'5'", "100.5", "-1", "0.005", "nan", "inf", "true", "9223372036854775807"] {
            assert!(toml::from_str::<Holder>(&format!("percent = {wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_backend_is_an_address_or_a_table() {
        #[derive(Deserialize)]
        struct Holder {
            backend: BackendSource,
        }
        let plain = Backend::at("a:1".to_owned());
        for (toml, expected) in [
            ("backend = 'a:1'", plain.clone()),
            ("backend = { address = 'a:1' }", plain.clone()),
            ("[backend]\naddress = 'a:1'\nweight = 3", Backend { weight: 3, ..plain.clone() }),
            (
                "backend = { address = 'a:1', max_requests = 9, backup = true, drain = true }",
                Backend { max_requests: 9, backup: true, drain: true, ..plain },
            ),
        ] {
            let expected = BackendSource { place: Place::Address, each: expected };
            assert_eq!(toml::from_str::<Holder>(toml).unwrap().backend, expected, "{toml}");
        }
        for (toml, printed, max_requests) in [
            ("backend = { dns = 'a:1', weight = 2, max_requests = 9 }", "dns:a:1", 9),
            ("backend = { srv = '_http._tcp.a', max_requests = 9, backup = true }", "srv:_http._tcp.a", 9),
            ("backend = { file = 'a.toml' }", "file:a.toml", 0),
        ] {
            let backend = toml::from_str::<Holder>(toml).unwrap().backend;
            assert_eq!((backend.to_string().as_str(), backend.each.max_requests), (printed, max_requests), "{toml}");
        }
        for (toml, message) in [
            ("backend = 17", "expected \"host:port\" or { address"),
            ("backend = { weight = 2 }", "add address = \"host:port\", or dns, srv or file"),
            ("backend = { address = 'a:1', wait = 2 }", "unknown field `wait`, expected one of `address`, `dns`"),
            ("backend = { address = 'a:1', dns = 'b:1' }", "a backend is at one place"),
            ("backend = { srv = '_http._tcp.a', weight = 2 }", "weights of their own"),
            ("backend = { file = 'a.toml', drain = false }", "stands in the file itself"),
            ("backend = { address = 'a:1', weight = -1 }", "invalid value"),
        ] {
            let error = toml::from_str::<Holder>(toml).err().map(|error| error.message().to_owned());
            assert!(error.as_ref().is_some_and(|error| error.contains(message)), "{toml} gave {error:?}");
        }
    }

    #[test]
    fn what_is_hashed_is_named() {
        assert_eq!("user".parse(), Ok(HashBy::User));
        assert_eq!("client".parse(), Ok(HashBy::Client));
        assert_eq!("header:X-Tenant".parse(), Ok(HashBy::Header(http::HeaderName::from_static("x-tenant"))));
        for text in ["", "users", "header", "header:", "header:a b", "cookie:x"] {
            assert!(text.parse::<HashBy>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_with_stray_bits_is_refused() {
        for text in ["10.0.0.0/8", "192.0.2.7", "fd00::/8", "::1", "0.0.0.0/0"] {
            assert!(text.parse::<Cidr>().is_ok(), "{text}");
        }
        for text in ["10.0.0.1/8", "10.0.0.0/33", "10.0.0/8", "localhost", "", "10.0.0.0/8 "] {
            assert!(text.parse::<Cidr>().is_err(), "{text} must not become a trusted network");
        }
    }

    #[test]
    fn a_template_is_text_and_placeholders() {
        use TemplatePart::{Attribute, Claim, Email, Groups, Name, User};
        let literal = |text: &str| TemplatePart::Text(text.to_owned());
        let cases = [
            ("{user}", vec![User]),
            ("{name} <{email}>", vec![Name, literal(" <"), Email, literal(">")]),
            ("{groups}{claim.team}", vec![Groups, Claim("team".to_owned())]),
            ("{claim.https://example.org/team}", vec![Claim("https://example.org/team".to_owned())]),
            ("{attribute.cart_id}!", vec![Attribute("cart_id".to_owned()), literal("!")]),
            ("fixed", vec![literal("fixed")]),
            ("{{user}}", vec![literal("{user}")]),
            ("{{{user}}}", vec![literal("{"), User, literal("}")]),
            ("é{user}", vec![literal("é"), User]),
        ];
        for (text, parts) in cases {
            assert_eq!(text.parse::<Template>().unwrap().parts(), parts, "{text}");
        }
    }

    #[test]
    fn a_template_that_is_wrong_says_why() {
        let cases = [
            ("", "an empty template"),
            ("{users}", "unknown placeholder `{users}`, expected one of `{user}`"),
            ("{}", "unknown placeholder `{}`"),
            ("{claim.}", "unknown placeholder"),
            ("{attribute.}", "unknown placeholder"),
            ("{claim.{user}", "unknown placeholder"),
            ("{User}", "unknown placeholder"),
            ("{user", "a lone `{`"),
            ("user}", "a lone `}`"),
            ("{user}\r\nX-Admin: 1", "no control characters"),
        ];
        for (text, message) in cases {
            let error = text.parse::<Template>().unwrap_err();
            assert!(error.contains(message), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn a_sample_secret_is_known_in_any_spelling() {
        for text in ["changeme", "Change-Me", "CHANGE_ME", "secret", "Password", "<your password>", "xxxx", "foobared"]
        {
            assert!(is_sample_secret(text), "{text}");
        }
        for text in ["", "correct horse", "mBq0x7yBv1", "passwords-are-hard"] {
            assert!(!is_sample_secret(text), "{text}");
        }
    }

    #[derive(Debug, Deserialize)]
    struct Holder {
        secret: Secret,
    }

    fn resolved(toml: &str, directory: &Path) -> Result<String, String> {
        let mut holder = toml::from_str::<Holder>(toml).map_err(|error| error.message().to_owned())?;
        let environment = |name: &str| (name == "SET").then(|| OsString::from("from the environment"));
        holder.secret.resolve(directory, environment)?;
        assert_eq!(format!("{holder:?}"), "Holder { secret: **** }", "a secret never prints itself");
        Ok(holder.secret.expose().to_owned())
    }

    #[test]
    fn a_secret_comes_as_text_or_from_a_file_or_from_the_environment() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("unix"), "from a file\n").unwrap();
        std::fs::write(directory.path().join("dos"), "from a file\r\n").unwrap();
        std::fs::write(directory.path().join("two"), "from a file\n\n").unwrap();
        std::fs::write(directory.path().join("empty"), "\n").unwrap();
        std::fs::write(directory.path().join("huge"), "x".repeat(70_000)).unwrap();
        std::fs::write(directory.path().join("binary"), b"\xff\xfe").unwrap();
        let cases = [
            (r#"secret = "text""#, Ok("text")),
            (r#"secret = { file = "unix" }"#, Ok("from a file")),
            (r#"secret = { file = "dos" }"#, Ok("from a file")),
            (r#"secret = { file = "two" }"#, Ok("from a file\n")),
            (r#"secret = { env = "SET" }"#, Ok("from the environment")),
            ("[secret]\nenv = \"SET\"", Ok("from the environment")),
            (r#"secret = """#, Err("the secret is empty")),
            (r#"secret = { file = "empty" }"#, Err("the secret is empty")),
            (r#"secret = { file = "absent" }"#, Err("absent cannot be read")),
            (r#"secret = { file = "huge" }"#, Err("is larger than 64KiB")),
            (r#"secret = { file = "binary" }"#, Err("cannot be read")),
            (r#"secret = { env = "UNSET" }"#, Err("environment variable UNSET is not set")),
            (r#"secret = { env = "" }"#, Err("invalid name of an environment variable")),
            (r#"secret = { env = "SET", file = "unix" }"#, Err("comes from one place")),
            (r#"secret = { }"#, Err("expected { file")),
            (r#"secret = { files = "unix" }"#, Err("unknown field `files`, expected `file` or `env`")),
            (r#"secret = 17"#, Err("invalid type: a number, expected a string, { file")),
            (r#"secret = 9223372036854775808"#, Err("invalid type: a number, expected a string, { file")),
            (r#"secret = 1.7"#, Err("invalid type: a number, expected a string, { file")),
        ];
        for (toml, expected) in cases {
            match (resolved(toml, directory.path()), expected) {
                (Ok(text), Ok(expected)) => assert_eq!(text, expected, "{toml}"),
                (Err(message), Err(expected)) => assert!(message.contains(expected), "{toml} gave {message}"),
                (other, _) => panic!("{toml} gave {other:?}"),
            }
        }
    }
}
