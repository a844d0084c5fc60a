//! How does a backend read what backends noted in a session? One field, a dictionary of texts (RFC 9651, section 3.2).

use std::collections::BTreeMap;

use http::HeaderValue;
use sfv::{DictSerializer, KeyRef, RefBareItem, StringRef};

/// `cart_id="5678", theme="dark"`; nothing where there are none. A text beyond ASCII is a display string
/// (RFC 9651, section 3.3.8): `name=%"Zo%c3%ab"`. What has no name that such a field can say is left out.
pub fn field(attributes: &BTreeMap<&str, &str>) -> Option<HeaderValue> {
    let mut dictionary = DictSerializer::new();
    for (name, value) in attributes {
        let Ok(name) = KeyRef::from_str(name) else { continue };
        let value: &str = value;
        let value = StringRef::from_str(value).map_or(RefBareItem::DisplayString(value), RefBareItem::String);
        dictionary.bare_item(name, value);
    }
    let mut value = HeaderValue::try_from(dictionary.finish()?).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_has_one_spelling_and_none_can_forge_another() {
        type Attributes = &'static [(&'static str, &'static str)];
        let cases: [(Attributes, Option<&str>); 7] = [
            (&[], None),
            (&[("cart_id", "5678"), ("theme", "dark")], Some("cart_id=\"5678\", theme=\"dark\"")),
            (&[("a", "x\", b=\"y")], Some("a=\"x\\\", b=\\\"y\"")),
            (&[("a", "\\")], Some("a=\"\\\\\"")),
            (&[("a", "Zo\u{eb} 100%")], Some("a=%\"Zo%c3%ab 100%25\"")),
            (&[("a", "x\r\nX-Admin: 1")], Some("a=%\"x%0d%0aX-Admin: 1\"")),
            (&[("Not A Key", "1"), ("b", "2")], Some("b=\"2\"")),
        ];
        for (attributes, expected) in cases {
            let value = field(&attributes.iter().copied().collect());
            assert_eq!(value.as_ref().map(|value| value.to_str().unwrap()), expected, "{attributes:?}");
        }
    }
}
