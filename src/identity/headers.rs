//! Under which headers does a backend learn who the user is, and which may a client therefore never send?
//!
//! Whoever forwards a request removes every name that is reserved, session or not, and only then adds what
//! [`IdentityHeaders::render`] gives. Names are compared as the most careless backend would: without case, and with
//! every character that is no letter or digit as a hyphen, because CGI, WSGI and PHP make one variable of
//! `X-Remote-User`, `x_remote_user` and `X.Remote.User`.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

use super::Identity;
use super::certificate::Certificate;
use super::presets::{self, Field, GroupList};
use crate::config::model;
use crate::config::value::{CertificateField, Template, TemplatePart};

/// The headers of one configuration.
#[derive(Clone, Debug)]
pub struct IdentityHeaders {
    headers: Vec<Header>,
    /// Those that say more than who the user is: what the session holds, or the certificate of the client.
    of_request: Vec<Header>,
    groups: GroupList,
    reserved: Names,
    /// Which of all that were compiled in this process.
    edition: u64,
}

/// Whether a header says how a request reached us (address, scheme, host, path or certificate of the client), which
/// the backend believes. All of these go; what a trusted proxy said of address, scheme, host and request id is read
/// before, and sent on in our words.
pub fn is_forwarding(name: &str) -> bool {
    static FORWARDING: LazyLock<Names> = LazyLock::new(|| Names::new(&FORWARDING_NAMES, &FORWARDING_PREFIXES));
    FORWARDING.contains(name)
}

impl IdentityHeaders {
    /// `config` is valid already. An own header of the same name as one of the preset takes its place.
    pub fn compile(config: &model::Identity) -> Self {
        let preset = presets::preset(config.preset);
        let own = config
            .headers
            .iter()
            .map(|(name, template)| Header { name: field_name(name.get_ref()), parts: parts(template.get_ref()) });
        let mut headers: Vec<Header> = own.collect();
        for (name, field) in preset.headers {
            if !headers.iter().any(|header| fold(header.name.as_str().as_bytes()).eq(fold(name.as_bytes()))) {
                headers.push(Header { name: field_name(name), parts: vec![Part::Field(*field)] });
            }
        }

        let (of_request, headers) = headers.into_iter().partition(Header::is_of_request);

        let mut reserved = Names::new(&RESERVED_NAMES, &RESERVED_PREFIXES);
        for preset in presets::ALL.map(presets::preset) {
            preset.headers.iter().for_each(|(name, _)| reserved.add(name));
        }
        config.headers.keys().chain(&config.strip).for_each(|name| reserved.add(name.get_ref()));
        static EDITIONS: AtomicU64 = AtomicU64::new(0);
        let edition = EDITIONS.fetch_add(1, Ordering::Relaxed);
        Self { headers, of_request, groups: preset.groups, reserved, edition }
    }

    /// Further names that a client may never send to a backend.
    pub fn reserving<'n>(mut self, names: impl IntoIterator<Item = &'n str>) -> Self {
        names.into_iter().for_each(|name| self.reserved.add(name));
        self
    }

    /// Whether a client may not send this to a backend: every name of every preset, the names that belong to the same
    /// families, the own headers, and what `identity.strip` names.
    pub fn is_reserved(&self, name: &str) -> bool {
        self.reserved.contains(name)
    }

    /// The reserved names that are known in full, in lower case and with hyphens.
    pub fn reserved_names(&self) -> impl Iterator<Item = &str> {
        self.reserved.exact.iter().map(String::as_str)
    }

    /// The header lines of this user: at most one of each name, and none whose value has a part that the user lacks.
    ///
    /// Values are visible ASCII and inner spaces. Every other byte of the UTF-8 text, `%` itself, and a space at the
    /// beginning or the end is written `%XX`, so that percent-decoding gives back the text exactly: `Alice Smith` stays
    /// as it is, `Zoë` becomes `Zo%C3%AB`. In a list of groups, the separator (and the quote, where there are some)
    /// inside a group is encoded too: split first, then decode.
    pub fn render(&self, identity: &Identity) -> HeaderLines {
        let mut text = String::with_capacity(VALUE_BYTES_USUAL);
        let mut values = Vec::with_capacity(self.headers.len());
        let facts = Facts { identity: Some(identity), ..Facts::default() };
        for (header, Header { parts, .. }) in self.headers.iter().enumerate() {
            let begin = text.len();
            let is_whole = parts.iter().all(|part| part.write(&facts, self.groups, &mut text).is_some());
            if is_whole && HeaderValue::from_str(&text[begin..]).is_ok() {
                values.push((header, begin..text.len()));
            } else {
                text.truncate(begin);
            }
        }
        HeaderLines { edition: self.edition, text: text.into(), values }
    }

    /// The header lines that say more than who the user is, by the rules of [`Self::render`]. `identity`: none of a session
    /// that nobody has logged in to.
    pub fn render_request(&self, facts: &Facts<'_>) -> Vec<(HeaderName, HeaderValue)> {
        let line = |header: &Header| {
            let mut text = String::with_capacity(VALUE_BYTES_USUAL);
            header.parts.iter().try_for_each(|part| part.write(facts, self.groups, &mut text))?;
            let mut value = HeaderValue::from_str(&text).ok()?;
            value.set_sensitive(true);
            Some((header.name.clone(), value))
        };
        self.of_request.iter().filter_map(line).collect()
    }
}

/// What is known when a request is sent on. Each may be missing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    pub identity: Option<&'a Identity>,
    pub attributes: Option<&'a BTreeMap<&'a str, &'a str>>,
    pub certificate: Option<&'a Certificate>,
}

/// The header lines of one user, in one piece of memory: that of a user who was away for a while is in no cache of the
/// processor, and each piece would be waited for.
#[derive(Clone)]
pub struct HeaderLines {
    edition: u64,
    text: Bytes,
    /// Which header, and where its value is in `text`.
    values: Vec<(usize, Range<usize>)>,
}

impl HeaderLines {
    /// Whether they say what these headers would say.
    pub fn are_of(&self, headers: &IdentityHeaders) -> bool {
        self.edition == headers.edition
    }

    /// Name and value of each; none if they are not [of](Self::are_of) these headers.
    pub fn iter(&self, headers: &IdentityHeaders) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let values = if self.are_of(headers) { self.values.as_slice() } else { &[] };
        values.iter().filter_map(|(header, place)| {
            let mut value = HeaderValue::from_maybe_shared(self.text.slice(place.clone())).ok()?;
            value.set_sensitive(true); // personal data: keeps it out of every `Debug`
            Some((headers.headers.get(*header)?.name.clone(), value))
        })
    }
}

impl fmt::Debug for HeaderLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderLines").field("count", &self.values.len()).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug)]
struct Header {
    name: HeaderName,
    /// Written one after the other.
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(Field),
    Claim(String),
    Attribute(String),
    Certificate(CertificateField),
}

impl Header {
    fn is_of_request(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Attribute(_) | Part::Certificate(_)))
    }
}

impl Part {
    /// Nothing when nobody has such a thing.
    fn write(&self, facts: &Facts<'_>, groups: GroupList, to: &mut String) -> Option<()> {
        let text = match self {
            Self::Text(text) => {
                to.push_str(text);
                return Some(());
            }
            Self::Field(Field::Groups) => return write_list(&facts.identity?.groups, groups, to),
            Self::Certificate(field) => {
                let texts = facts.certificate?.texts(*field);
                match field {
                    CertificateField::Dns | CertificateField::Email | CertificateField::Uri => {
                        return write_list(texts, groups, to);
                    }
                    CertificateField::Subject | CertificateField::CommonName | CertificateField::Fingerprint => {
                        texts.first().map(String::as_str)
                    }
                }
            }
            Self::Field(Field::User) => Some(facts.identity?.user.as_str()),
            Self::Field(Field::Name) => facts.identity?.name.as_deref(),
            Self::Field(Field::Email) => facts.identity?.email.as_deref(),
            Self::Claim(name) => facts.identity?.claims.get(name).map(String::as_str),
            Self::Attribute(name) => facts.attributes?.get(name.as_str()).copied(),
        };
        let text = text.filter(|text| !text.is_empty())?;
        encode(text, &[], to);
        Some(())
    }
}

fn write_list(members: &[String], list: GroupList, to: &mut String) -> Option<()> {
    let mut members = members.iter().filter(|member| !member.is_empty()).peekable();
    members.peek()?;
    let quote = if list.quoted { "\"" } else { "" };
    let special = [list.separator, if list.quoted { '"' } else { list.separator }];
    while let Some(member) = members.next() {
        to.push_str(quote);
        encode(member, &special, to);
        to.push_str(quote);
        if members.peek().is_some() {
            to.push(list.separator);
        }
    }
    Some(())
}

/// See [`IdentityHeaders::render`]. Spaces at either end are encoded because receivers trim them, also around the
/// members of a list, and ` admins` must not become `admins`.
fn encode(text: &str, also: &[char], to: &mut String) {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b'%' && !also.contains(&char::from(byte));
    if text.bytes().all(is_plain) {
        to.push_str(text); // almost always
        return;
    }
    let last = text.len().saturating_sub(1);
    for (index, byte) in text.bytes().enumerate() {
        let inner_space = byte == b' ' && 0 < index && index < last;
        if inner_space || is_plain(byte) {
            to.push(char::from(byte));
        } else {
            to.push_str(percent_encoding::percent_encode_byte(byte));
        }
    }
}

/// In lower case, as HTTP/2 writes names: the case of a name means nothing.
fn field_name(name: &str) -> HeaderName {
    HeaderName::from_bytes(name.as_bytes()).expect("names of presets are names, and validation has checked the others")
}

/// Spaces at either end are trimmed by every receiver, and so are not sent at all.
fn parts(template: &Template) -> Vec<Part> {
    let last = template.parts().len().saturating_sub(1);
    let parts = template.parts().iter().enumerate();
    parts
        .map(|(index, part)| match part {
            TemplatePart::Text(text) => {
                let text = if index == 0 { text.trim_start() } else { text };
                Part::Text(literal_text(if index == last { text.trim_end() } else { text }))
            }
            TemplatePart::User => Part::Field(Field::User),
            TemplatePart::Name => Part::Field(Field::Name),
            TemplatePart::Email => Part::Field(Field::Email),
            TemplatePart::Groups => Part::Field(Field::Groups),
            TemplatePart::Claim(name) => Part::Claim(name.clone()),
            TemplatePart::Attribute(name) => Part::Attribute(name.clone()),
            TemplatePart::Certificate(field) => Part::Certificate(*field),
        })
        .collect()
}

/// As the operator wrote it, `%` and spaces included; only what no value may hold is encoded.
fn literal_text(text: &str) -> String {
    let mut value = String::new();
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' => value.push(char::from(byte)),
            _ => value.push_str(percent_encoding::percent_encode_byte(byte)),
        }
    }
    value
}

/// A set of names and of beginnings of names, compared folded.
#[derive(Clone, Debug)]
struct Names {
    exact: Vec<String>,
    prefixes: Vec<String>,
    /// Which first two characters occur at all: most headers of a request are told apart by these.
    starts: [bool; 256],
}

impl Names {
    fn new(exact: &[&str], prefixes: &[&str]) -> Self {
        let mut names = Self { exact: Vec::new(), prefixes: Vec::new(), starts: [false; 256] };
        for prefix in prefixes {
            names.starts[start(prefix.as_bytes())] = true;
            names.prefixes.push((*prefix).to_owned());
        }
        exact.iter().for_each(|name| names.add(name));
        names
    }

    fn add(&mut self, name: &str) {
        let folded: String = fold(name.as_bytes()).map(char::from).collect();
        self.starts[start(name.as_bytes())] = true;
        if !self.exact.contains(&folded) {
            self.exact.push(folded);
        }
    }

    fn contains(&self, name: &str) -> bool {
        let name = name.as_bytes();
        let is = |name: &[u8], folded: &String| name.len() == folded.len() && fold(name).eq(folded.bytes());
        self.starts[start(name)]
            && (self.exact.iter().any(|exact| is(name, exact))
                || self.prefixes.iter().any(|prefix| name.get(..prefix.len()).is_some_and(|name| is(name, prefix))))
    }
}

/// A small number from the first two characters, folded.
fn start(name: &[u8]) -> usize {
    let number = fold(name).take(2).fold(0_u8, |number, byte| number.wrapping_mul(37).wrapping_add(byte));
    usize::from(number)
}

fn fold(name: &[u8]) -> impl Iterator<Item = u8> {
    name.iter().map(|byte| if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' })
}

/// Room for a usual value, so that it is written without growing.
const VALUE_BYTES_USUAL: usize = 64;

/// Names of identity beyond those of the presets.
const RESERVED_NAMES: [&str; 5] = [
    "x-forwarded-access-token",
    "auth-user", // LemonLDAP::NG
    "gap-auth",  // oauth2-proxy, to its upstream
    "gap-signature",
    "proxy", // not identity, but never honest: CGI makes HTTP_PROXY of it, which many libraries obey
];

/// Families whose members nobody can list: claims, attributes, versions to come.
const RESERVED_PREFIXES: [&str; 17] = [
    "session-", // what Cloakroom tells backends of a session, and they tell it
    "x-auth-request-",
    "x-authentik-",
    "x-webauth-",
    "x-remote-", // Kubernetes
    "x-pomerium-",
    "x-vouch-",
    "remote-",
    "oidc-",
    "iv-",
    "am-eai-", // WebSEAL
    // What other gates tell their backends: one that trusted such a gate before must not trust a client now.
    "cf-access-",
    "tailscale-user-",
    "x-amzn-oidc-",
    "x-goog-authenticated-user-",
    "x-goog-iap-",
    "x-ms-client-principal",
];

const FORWARDING_NAMES: [&str; 28] = [
    "forwarded",
    "forwarded-for",
    "x-forwarded",
    "x-request-id", // ours, or a trusted proxy's that we took over
    "client-ip",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "fastly-client-ip",
    "proxy-client-ip",
    "wl-proxy-client-ip",
    "x-envoy-external-address",
    "x-scheme",
    "x-url-scheme",
    "front-end-https",
    "x-host",
    "x-original-url",
    "x-original-uri",
    "x-original-host",
    "x-original-method",
    "x-original-forwarded-for",
    "x-rewrite-url",
    "x-envoy-original-path",
    "client-cert", // RFC 9440
    "client-cert-chain",
];

const FORWARDING_PREFIXES: [&str; 3] = ["x-forwarded-", "x-ssl-client-", "ssl-client-"];

#[cfg(test)]
mod tests {
    use percent_encoding::percent_decode_str;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use toml::Spanned;

    use super::*;

    fn config(preset: model::Preset, headers: &[(&str, &str)], strip: &[&str]) -> model::Identity {
        let spanned = |text: &str| Spanned::new(0..0, text.to_owned());
        model::Identity {
            preset,
            headers: headers
                .iter()
                .map(|(name, template)| (spanned(name), Spanned::new(0..0, template.parse().unwrap())))
                .collect(),
            strip: strip.iter().map(|name| spanned(name)).collect(),
        }
    }

    fn compiled(preset: model::Preset) -> IdentityHeaders {
        IdentityHeaders::compile(&config(preset, &[("X-Team", "{claim.team}")], &["X-Legacy.User"]))
    }

    fn alice() -> Identity {
        Identity {
            user: "alice".to_owned(),
            name: Some("Alice Smith".to_owned()),
            email: Some("alice@example.org".to_owned()),
            groups: vec!["staff".to_owned(), "admins".to_owned()],
            claims: BTreeMap::from([("team".to_owned(), "blue".to_owned())]),
        }
    }

    fn rendered(headers: &IdentityHeaders, identity: &Identity) -> Vec<(String, String)> {
        let text = |name: HeaderName| name.as_str().to_owned();
        headers
            .render(identity)
            .iter(headers)
            .map(|(name, value)| (text(name), value.to_str().unwrap().to_owned()))
            .collect()
    }

    #[test]
    fn a_preset_sends_the_names_that_applications_expect() {
        #[rustfmt::skip]
        let cases: [(model::Preset, &[(&str, &str)]); 8] = [
            (model::Preset::None, &[]),
            (model::Preset::XForwarded, &[
                ("X-Forwarded-User", "alice"), ("X-Forwarded-Preferred-Username", "alice"),
                ("X-Forwarded-Email", "alice@example.org"), ("X-Forwarded-Groups", "staff,admins"),
            ]),
            (model::Preset::Remote, &[
                ("Remote-User", "alice"), ("Remote-Name", "Alice Smith"),
                ("Remote-Email", "alice@example.org"), ("Remote-Groups", "staff,admins"),
            ]),
            (model::Preset::XAuthRequest, &[
                ("X-Auth-Request-User", "alice"), ("X-Auth-Request-Preferred-Username", "alice"),
                ("X-Auth-Request-Email", "alice@example.org"), ("X-Auth-Request-Groups", "staff,admins"),
            ]),
            (model::Preset::Webseal, &[("iv-user", "alice"), ("iv-groups", "\"staff\",\"admins\"")]),
            (model::Preset::OidcClaim, &[
                ("OIDC_CLAIM_sub", "alice"), ("OIDC_CLAIM_preferred_username", "alice"),
                ("OIDC_CLAIM_name", "Alice Smith"), ("OIDC_CLAIM_email", "alice@example.org"),
                ("OIDC_CLAIM_groups", "staff,admins"),
            ]),
            (model::Preset::Authentik, &[
                ("X-authentik-username", "alice"), ("X-authentik-name", "Alice Smith"),
                ("X-authentik-email", "alice@example.org"), ("X-authentik-groups", "staff|admins"),
            ]),
            (model::Preset::Webauth, &[
                ("X-WEBAUTH-USER", "alice"), ("X-WEBAUTH-NAME", "Alice Smith"), ("X-WEBAUTH-FULLNAME", "Alice Smith"),
                ("X-WEBAUTH-EMAIL", "alice@example.org"), ("X-WEBAUTH-GROUPS", "staff,admins"),
            ]),
        ];
        for (preset, expected) in cases {
            let headers = IdentityHeaders::compile(&config(preset, &[], &[]));
            let line = |(name, value): &(&str, &str)| (name.to_ascii_lowercase(), (*value).to_owned());
            let expected: Vec<_> = expected.iter().map(line).collect();
            assert_eq!(rendered(&headers, &alice()), expected, "{preset:?}");
        }
    }

    #[test]
    fn what_the_user_lacks_gives_no_header() {
        let nobody_else = Identity { user: "bob".to_owned(), email: Some(String::new()), ..Identity::default() };
        for preset in presets::ALL {
            for (name, value) in rendered(&compiled(preset), &nobody_else) {
                assert_eq!(value, "bob", "{preset:?}: {name} has nothing to say");
            }
        }
    }

    #[test]
    fn own_headers_are_filled_in_and_go_before_those_of_the_preset() {
        #[rustfmt::skip]
        let cases: [(&str, &str, Option<&str>); 13] = [
            ("X-Team", "{claim.team}", Some("blue")),
            ("X-Who", "{user}", Some("alice")),
            ("X-Who", "{name} <{email}>", Some("Alice Smith <alice@example.org>")),
            ("X-Who", "user={user}; groups={groups}", Some("user=alice; groups=staff,admins")),
            ("X-Who", "constant", Some("constant")),
            ("X-Who", "  {user}  ", Some("alice")),
            ("X-Who", "{{{user}}}", Some("{alice}")),
            ("X-Who", "100% {user}", Some("100% alice")),
            ("X-Who", "caf\u{e9} {user}", Some("caf%C3%A9 alice")),
            ("X-Who", "{claim.absent}", None),
            ("X-Who", "{user}/{claim.absent}", None),
            ("X_forwarded_USER", "{email}", Some("alice@example.org")),
            ("x-forwarded-groups", "none", Some("none")),
        ];
        for (name, template, expected) in cases {
            let headers = IdentityHeaders::compile(&config(model::Preset::XForwarded, &[(name, template)], &[]));
            let lines = rendered(&headers, &alice());
            let same_name = lines.iter().filter(|(line, _)| folded(line) == folded(name));
            let values: Vec<_> = same_name.map(|(_, value)| value.as_str()).collect();
            assert_eq!(values, Vec::from_iter(expected), "{name} = {template:?}");
        }
    }

    #[test]
    fn a_value_is_readable_where_it_can_be_and_encoded_where_it_must() {
        #[rustfmt::skip]
        let cases = [
            ("Alice Smith", "Alice Smith"),
            ("Smith, Alice (HR) <a@b>; x=\"y\"", "Smith, Alice (HR) <a@b>; x=\"y\""),
            ("Zo\u{eb}", "Zo%C3%AB"),
            ("\u{674e}", "%E6%9D%8E"),
            ("100%", "100%25"),
            ("%41", "%2541"),
            (" a  b ", "%20a  b%20"),
            (" ", "%20"),
            ("  ", "%20%20"),
            ("a\tb", "a%09b"),
            ("a\r\nX-Admin: 1", "a%0D%0AX-Admin: 1"),
            ("a\0b\u{7f}", "a%00b%7F"),
            ("\u{85}\u{2028}", "%C2%85%E2%80%A8"),
        ];
        let headers = IdentityHeaders::compile(&config(model::Preset::None, &[("X-Name", "{name}")], &[]));
        for (name, expected) in cases {
            let identity = Identity { name: Some(name.to_owned()), ..alice() };
            assert_eq!(rendered(&headers, &identity), [("x-name".to_owned(), expected.to_owned())], "{name:?}");
        }
    }

    #[test]
    fn groups_cannot_be_forged_by_their_names() {
        let identity = |groups: &[&str]| Identity { groups: groups.iter().map(|&g| g.into()).collect(), ..alice() };
        #[rustfmt::skip]
        let cases: [(model::Preset, &[&str], &str); 6] = [
            (model::Preset::Remote, &["a,admins", " admins", "b "], "a%2Cadmins,%20admins,b%20"),
            (model::Preset::Remote, &["a|b", "", "c"], "a|b,c"),
            (model::Preset::Authentik, &["a|admins", "a,b"], "a%7Cadmins|a,b"),
            (model::Preset::Webseal, &["a\",\"admins"], "\"a%22%2C%22admins\""),
            (model::Preset::Webseal, &["a b"], "\"a b\""),
            (model::Preset::OidcClaim, &["\u{e9}%2C"], "%C3%A9%252C"),
        ];
        for (preset, groups, expected) in cases {
            let headers = IdentityHeaders::compile(&config(preset, &[("X-Groups", "{groups}")], &[]));
            let lines = rendered(&headers, &identity(groups));
            let value = lines.iter().find(|(name, _)| name == "x-groups").map(|(_, value)| value.as_str());
            assert_eq!(value, Some(expected), "{preset:?} {groups:?}");
        }
    }

    #[test]
    fn every_value_is_plain_text_and_decodes_to_what_it_was() {
        let mut rng = StdRng::seed_from_u64(97);
        let mut text = |longest: usize| -> String {
            let length = rng.random_range(1..=longest);
            let pool = ['a', ' ', '%', ',', '|', '"', '\r', '\n', '\0', '\u{e9}', '\u{1f600}', '2', 'C', '\u{7f}'];
            (0..length).map(|_| pool[rng.random_range(0..pool.len())]).collect()
        };
        let decode = |value: &str| percent_decode_str(value).decode_utf8().unwrap().into_owned();
        let own = [("X-Name", "{name}"), ("X-Claim", "{claim.team}"), ("X-Groups", "{groups}")];
        let presets = presets::ALL.map(|preset| (preset, IdentityHeaders::compile(&config(preset, &own, &[]))));
        for round in 0..10_000 {
            let identity = Identity {
                user: text(8),
                name: Some(text(8)),
                email: Some(text(8)),
                groups: vec![text(8), text(8), text(8)],
                claims: BTreeMap::from([("team".to_owned(), text(8))]),
            };
            let (preset, headers) = &presets[round % presets.len()];
            for (name, value) in headers.render(&identity).iter(headers) {
                let value = value.to_str().expect("visible ASCII");
                assert!(value.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{value:?}: no byte to stumble over");
                assert_eq!(value.trim(), value, "{value:?}: nothing that a receiver would trim");
                let list = presets::preset(*preset).groups;
                match name.as_str() {
                    "x-name" => assert_eq!(Some(decode(value)), identity.name),
                    "x-claim" => assert_eq!(Some(decode(value)), identity.claims.get("team").cloned()),
                    "x-groups" => {
                        let unquoted = |group: &str| group.strip_prefix('"')?.strip_suffix('"').map(str::to_owned);
                        let member = |group: &str| if list.quoted { unquoted(group) } else { Some(group.to_owned()) };
                        let groups = value.split(list.separator).map(|group| decode(member(group).unwrap().trim()));
                        assert_eq!(groups.collect::<Vec<_>>(), identity.groups, "{value:?}");
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn a_value_never_prints_itself() {
        let headers = compiled(model::Preset::XForwarded);
        let printed = format!("{:?}", headers.render(&alice()).iter(&headers).collect::<Vec<_>>());
        assert!(!printed.contains("alice"), "{printed}");
    }

    /// As a careless backend would; written down a second time, so that the first can be wrong.
    fn folded(name: &str) -> String {
        name.to_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
    }

    /// Twelve ways to write a name that end in one variable of some backend.
    fn spellings(name: &str) -> Vec<String> {
        let mut word_start = true;
        let title: String = name
            .chars()
            .map(|c| {
                let c = if word_start { c.to_ascii_uppercase() } else { c };
                word_start = !c.is_ascii_alphanumeric();
                c
            })
            .collect();
        let alternating =
            name.chars().enumerate().map(|(i, c)| if i % 2 == 0 { c.to_ascii_uppercase() } else { c }).collect();
        vec![
            name.to_owned(),
            name.to_uppercase(),
            title.clone(),
            alternating,
            name.replace('-', "_"),
            name.to_uppercase().replace('-', "_"),
            title.replace('-', "_"),
            name.replacen('-', "_", 1),
            name.replace('-', "."),
            title.replacen('-', ".", 1),
            name.replace('-', "~"),
            name.replace('-', "!"),
        ]
    }

    #[test]
    fn a_reserved_name_is_known_in_every_spelling() {
        for preset in presets::ALL {
            let headers = compiled(preset);
            let families = RESERVED_PREFIXES.iter().map(|prefix| format!("{prefix}anything"));
            let names: Vec<_> = headers.reserved_names().map(str::to_owned).chain(families).collect();
            assert!(40 < names.len(), "all presets count, whichever is chosen: {names:?}");
            for name in &names {
                for spelling in spellings(name) {
                    assert!(headers.is_reserved(&spelling), "{preset:?}: {spelling} is {name} to some backend");
                }
            }
        }
        let forwarding = FORWARDING_NAMES.iter().map(|&name| name.to_owned());
        for name in forwarding.chain(FORWARDING_PREFIXES.iter().map(|prefix| format!("{prefix}for"))) {
            for spelling in spellings(&name) {
                assert!(is_forwarding(&spelling), "{spelling} is {name} to some backend");
            }
        }
    }

    #[test]
    fn ordinary_headers_pass() {
        #[rustfmt::skip]
        let ordinary = [
            "Host", "User-Agent", "Accept", "Accept-Language", "Accept-Encoding", "Connection", "Cookie", "Referer",
            "Content-Type", "Content-Length", "Transfer-Encoding", "Cache-Control", "Pragma", "Origin", "Range",
            "If-None-Match", "If-Modified-Since", "If-Range", "Authorization", "Upgrade", "Upgrade-Insecure-Requests",
            "Sec-Fetch-Mode", "Sec-WebSocket-Key", "X-Requested-With", "X-CSRF-Token", "X-Auth-Token", "X-Api-Key",
            "X-HTTP-Method-Override", "X-Amz-Date", "Traceparent", "TE", "DNT", "Priority", "Via",
            "Proxy-Authorization", "Remote", "Iv", "X", "", "-", "X-Userinfo", "X-Teams", "Clientip",
        ];
        let headers = compiled(model::Preset::XForwarded);
        for name in ordinary {
            assert!(!headers.is_reserved(name), "{name} is the client's");
            assert!(!is_forwarding(name), "{name} is the client's");
        }
        for name in ["X-Forwarded-For", "x_forwarded_proto", "Forwarded", "X-Real-IP"] {
            assert!(!headers.is_reserved(name) && is_forwarding(name), "{name} is for trusted proxies");
        }
    }

    #[test]
    fn after_the_removal_no_header_folds_to_an_identity_name() {
        let mut rng = StdRng::seed_from_u64(94);
        let headers = compiled(model::Preset::Remote);
        let mut identity_names: Vec<String> = vec![folded("X-Team"), folded("X-Legacy-User")];
        for preset in presets::ALL.map(presets::preset) {
            identity_names.extend(preset.headers.iter().map(|(name, _)| folded(name)));
        }
        let marks = ['-', '_', '.', '!', '~', '+', '\''];
        let mut removed = 0;
        for _ in 0..10_000 {
            let request: Vec<String> = (0..rng.random_range(1..20))
                .map(|_| {
                    let name = &identity_names[rng.random_range(0..identity_names.len())];
                    let mut spelled: Vec<char> = name
                        .chars()
                        .map(|c| match c {
                            '_' => marks[rng.random_range(0..marks.len())],
                            c if rng.random_bool(0.5) => c.to_ascii_lowercase(),
                            c => c,
                        })
                        .collect();
                    if rng.random_bool(0.5) {
                        let at = rng.random_range(0..spelled.len());
                        spelled[at] = ['x', '-', '1', 'U'][rng.random_range(0..4)];
                    }
                    spelled.into_iter().collect()
                })
                .collect();
            let kept: Vec<_> = request.iter().filter(|name| !headers.is_reserved(name)).collect();
            removed += request.len() - kept.len();
            for name in kept {
                assert!(!identity_names.contains(&folded(name)), "{name} would pass for identity");
            }
        }
        assert!(10_000 < removed, "there was something to remove: {removed}");
    }
}
