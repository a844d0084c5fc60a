//! What did a query ask for? Known names, each at most once, with one meaning, or nothing at all.

use std::fmt;

use percent_encoding::percent_decode_str;

/// The parameters of a request, decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Query<'n>(Vec<(&'n str, String)>);

/// Why a query cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BadQuery {
    Unknown { known: String },
    Twice,
    Ambiguous,
    NotText,
    TooLong,
    Empty,
}

const VALUE_BYTES_MAX: usize = 256;

impl<'n> Query<'n> {
    /// `query`: what stands behind the `?`.
    pub(super) fn parse(query: Option<&str>, known: &[&'n str]) -> Result<Self, BadQuery> {
        let mut parameters = Vec::new();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = known.iter().find(|known| **known == name).copied();
            let name = name.ok_or_else(|| BadQuery::Unknown { known: known.join(", ") })?;
            if parameters.iter().any(|(other, _)| *other == name) {
                return Err(BadQuery::Twice);
            }
            parameters.push((name, decode(value)?));
        }
        Ok(Self(parameters))
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| *other == name).map(|(_, value)| value.as_str())
    }

    /// The names that are there, in the order of the query.
    pub(super) fn names(&self) -> Vec<&'n str> {
        self.0.iter().map(|(name, _)| *name).collect()
    }
}

/// A `+` is a plus sign in a URL (RFC 3986) and a space in a form: somebody's session must not hang on who is right.
fn decode(text: &str) -> Result<String, BadQuery> {
    let is_encoding = |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|byte| byte.is_ascii_hexdigit());
    if text.contains('+') {
        return Err(BadQuery::Ambiguous);
    }
    if !text.split('%').skip(1).all(is_encoding) {
        return Err(BadQuery::NotText);
    }
    let value = percent_decode_str(text).decode_utf8().map_err(|_| BadQuery::NotText)?.into_owned();
    match value.len() {
        0 => Err(BadQuery::Empty),
        1..=VALUE_BYTES_MAX => Ok(value),
        _ => Err(BadQuery::TooLong),
    }
}

impl fmt::Display for BadQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { known } if known.is_empty() => f.write_str("no parameter is known here"),
            Self::Unknown { known } => write!(f, "unknown parameter: known here are {known}"),
            Self::Twice => f.write_str("a parameter is there twice"),
            Self::Ambiguous => f.write_str("a plus sign is written %2B, and a space %20"),
            Self::NotText => f.write_str("a value is not percent-encoded UTF-8"),
            Self::TooLong => write!(f, "a value is longer than {VALUE_BYTES_MAX} bytes"),
            Self::Empty => f.write_str("a parameter has no value"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_in_one_way_or_not_at_all() {
        let unknown = || BadQuery::Unknown { known: "user, part".into() };
        let long = format!("user={}", "a".repeat(257));
        type Fields = &'static [(&'static str, &'static str)];
        let cases: &[(&str, Result<Fields, BadQuery>)] = &[
            ("", Ok(&[])),
            ("user=ann", Ok(&[("user", "ann")])),
            ("part=7&user=ann%20%2B%c3%a9", Ok(&[("part", "7"), ("user", "ann +\u{e9}")])),
            ("user=a%3Db&", Ok(&[("user", "a=b")])),
            ("user=ann+archer", Err(BadQuery::Ambiguous)),
            ("user=ann&user=bob", Err(BadQuery::Twice)),
            ("User=ann", Err(unknown())),
            ("us%65r=ann", Err(unknown())),
            ("everyone=true", Err(unknown())),
            ("user", Err(BadQuery::Empty)),
            ("user=", Err(BadQuery::Empty)),
            ("user=%", Err(BadQuery::NotText)),
            ("user=%4", Err(BadQuery::NotText)),
            ("user=%zz", Err(BadQuery::NotText)),
            ("user=%ff", Err(BadQuery::NotText)),
            (&long, Err(BadQuery::TooLong)),
        ];
        for (text, expected) in cases {
            let query = Query::parse(Some(text), &["user", "part"]);
            let expected = expected.clone().map(|pairs| Query(pairs.iter().map(|(n, v)| (*n, (*v).into())).collect()));
            assert_eq!(query, expected, "{text}");
        }
    }
}
