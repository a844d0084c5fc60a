//! What did the browser post? A small form, read strictly: every field once, in UTF-8.

use std::collections::BTreeMap;
use std::fmt;

use http::HeaderMap;
use http::header::CONTENT_TYPE;

/// The fields of one posted form. It may hold a password, so it does not print itself.
pub(super) struct Form(BTreeMap<String, String>);

/// Why a body is no form of ours: 400, or 413 for [`BadForm::TooLarge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadForm {
    /// The content type is not `application/x-www-form-urlencoded`, or its charset is not UTF-8.
    Type,
    TooLarge,
    /// A field twice, more fields than any form of ours has, or text that is not UTF-8.
    Fields,
}

impl Form {
    pub(super) const BYTES_MAX: usize = 8 * 1024;

    /// Ours have four; a browser extension may add some.
    const FIELDS_MAX: usize = 16;

    pub(super) fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Self, BadForm> {
        if !is_form(headers) {
            return Err(BadForm::Type);
        }
        if Self::BYTES_MAX < body.len() {
            return Err(BadForm::TooLarge);
        }
        let mut fields = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(body) {
            // The parser puts U+FFFD where bytes were not UTF-8: two passwords would become one.
            let is_text = !name.contains(char::REPLACEMENT_CHARACTER) && !value.contains(char::REPLACEMENT_CHARACTER);
            let is_first = fields.insert(name.into_owned(), value.into_owned()).is_none();
            if !is_text || !is_first || Self::FIELDS_MAX < fields.len() {
                return Err(BadForm::Fields);
            }
        }
        Ok(Self(fields))
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl fmt::Debug for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

fn is_form(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let Ok(text) = value.to_str() else { return false };
    let mut parts = text.split(';').map(str::trim);
    let is_urlencoded = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/x-www-form-urlencoded"));
    is_urlencoded
        && parts.all(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            name.eq_ignore_ascii_case("charset") && value.trim_matches('"').eq_ignore_ascii_case("utf-8")
        })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const URLENCODED: &str = "application/x-www-form-urlencoded";

    fn parse(content_type: &str, body: &[u8]) -> Result<Form, BadForm> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_str(content_type).unwrap());
        Form::parse(&headers, body)
    }

    #[test]
    fn fields_are_read_as_a_browser_writes_them() {
        let cases: [(&str, Option<&str>); 8] = [
            ("password=secret", Some("secret")),
            ("password=a+b%20c", Some("a b c")),
            ("password=%2B%26%3D", Some("+&=")),
            ("password=%C3%A9", Some("é")),
            ("password=+x+", Some(" x ")),
            ("password=", Some("")),
            ("password=a=b", Some("a=b")),
            ("username=alice", None),
        ];
        for (body, password) in cases {
            assert_eq!(parse(URLENCODED, body.as_bytes()).unwrap().get("password"), password, "{body:?}");
        }
    }

    #[test]
    fn what_is_not_one_plain_form_is_refused() {
        let many = (0..17).map(|n| format!("f{n}=")).collect::<Vec<_>>().join("&");
        let cases: &[(&[u8], BadForm)] = &[
            (b"password=a&password=b", BadForm::Fields),
            (b"password=a&password=a", BadForm::Fields),
            (b"password=a&%70assword=b", BadForm::Fields),
            (b"unknown=a&unknown=b", BadForm::Fields),
            (b"password=%ff", BadForm::Fields),
            (b"password=\xff", BadForm::Fields),
            (b"%c3=a", BadForm::Fields),
            (many.as_bytes(), BadForm::Fields),
            (&[b'a'; Form::BYTES_MAX + 1], BadForm::TooLarge),
        ];
        for (body, expected) in cases {
            assert_eq!(parse(URLENCODED, body).err(), Some(*expected), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn the_content_type_must_be_a_utf8_form() {
        let cases = [
            ("application/x-www-form-urlencoded", true),
            ("Application/X-WWW-Form-Urlencoded", true),
            ("application/x-www-form-urlencoded; charset=UTF-8", true),
            ("application/x-www-form-urlencoded;charset=\"utf-8\"", true),
            ("application/x-www-form-urlencoded; charset=iso-8859-1", false),
            ("application/x-www-form-urlencoded; charset=utf-16", false),
            ("application/x-www-form-urlencoded; boundary=x", false),
            ("application/x-www-form-urlencoded, text/plain", false),
            ("multipart/form-data; boundary=x", false),
            ("text/plain", false),
            ("application/json", false),
            ("", false),
        ];
        for (content_type, accepted) in cases {
            assert_eq!(parse(content_type, b"a=b").is_ok(), accepted, "{content_type:?}");
        }
        assert_eq!(Form::parse(&HeaderMap::new(), b"a=b").err(), Some(BadForm::Type), "no type at all");
        let mut twice = HeaderMap::new();
        twice.append(CONTENT_TYPE, HeaderValue::from_static(URLENCODED));
        twice.append(CONTENT_TYPE, HeaderValue::from_static(URLENCODED));
        assert_eq!(Form::parse(&twice, b"a=b").err(), Some(BadForm::Type), "two types");
    }

    #[test]
    fn no_bytes_make_it_panic_and_no_field_prints_its_value() {
        let mut random = StdRng::seed_from_u64(11);
        const BYTES: &[u8] = b"%&=+a0fF\xff\xc3\xa9\0;";
        for _ in 0..50_000 {
            let length = random.random_range(0..24);
            let body: Vec<u8> = (0..length).map(|_| BYTES[random.random_range(0..BYTES.len())]).collect();
            let _ = parse(URLENCODED, &body);
        }
        let form = parse(URLENCODED, b"password=hunter2").unwrap();
        assert!(!format!("{form:?}").contains("hunter2"));
    }
}
