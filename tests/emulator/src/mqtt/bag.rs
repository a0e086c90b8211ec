//! The property bag at the end of a telemetry topic: `name=value` pairs, percent-encoded.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

/// Why a bag is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BagError {
    #[error("a pair is empty or has no name")]
    Empty,
    #[error("a raw `=` in a value")]
    Equals,
    #[error("a `%` that is not followed by two hexadecimal digits, or text that is not UTF-8")]
    Escape,
}

/// A message's properties.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Bag {
    /// System properties by the name that IoT Hub gives them.
    pub(crate) system: Vec<(&'static str, String)>,
    /// Application properties in order; none for a name without `=`.
    pub(crate) application: Vec<(String, Option<String>)>,
    /// Length of all decoded names and values.
    pub(crate) size: usize,
}

impl Bag {
    /// Reads a bag. When a name occurs twice the last one counts.
    pub(crate) fn parse(text: &str) -> Result<Self, BagError> {
        let mut bag = Self::default();
        if text.is_empty() {
            return Ok(bag);
        }
        for pair in text.split('&') {
            let (name, value) = match pair.split_once('=') {
                Some((_, value)) if value.contains('=') => return Err(BagError::Equals),
                Some((name, value)) => (name, Some(decode(value)?)),
                None => (pair, None),
            };
            let name = decode(name)?;
            if name.is_empty() {
                return Err(BagError::Empty);
            }
            bag.size += name.len() + value.as_ref().map_or(0, |value| value.len());
            match system_name(&name) {
                Some(name) => set(
                    &mut bag.system,
                    name,
                    value.unwrap_or_default().into_owned(),
                ),
                None => set(
                    &mut bag.application,
                    name.into_owned(),
                    value.map(Cow::into_owned),
                ),
            }
        }
        Ok(bag)
    }
}

fn set<K: PartialEq, V>(properties: &mut Vec<(K, V)>, name: K, value: V) {
    match properties.iter_mut().find(|(known, _)| *known == name) {
        Some(property) => property.1 = value,
        None => properties.push((name, value)),
    }
}

/// The keys that IoT Hub takes from devices (spec/mqtt.md 4.1, column "In").
fn system_name(key: &str) -> Option<&'static str> {
    Some(match key.strip_prefix("$.")? {
        "ce" => "content-encoding",
        "cid" => "correlation-id",
        "ct" => "content-type",
        "ctime" => "iothub-creation-time-utc",
        "exp" => "absolute-expiry-time",
        "ifid" => "iothub-interface-id",
        "mid" => "message-id",
        "on" => "iothub-outputname",
        "schema" => "iothub-message-schema",
        "sub" => "dt-subject",
        "to" => "to",
        "uid" => "user-id",
        _ => return None,
    })
}

fn decode(text: &str) -> Result<Cow<'_, str>, BagError> {
    let Some(first) = text.find('%') else {
        return Ok(Cow::Borrowed(text));
    };
    let mut rest = text.get(first..).unwrap_or_default().bytes();
    while let Some(byte) = rest.next() {
        let hex = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_hexdigit());
        if byte == b'%' && !(hex(rest.next()) && hex(rest.next())) {
            return Err(BagError::Escape);
        }
    }
    percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| BagError::Escape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_and_application_properties_are_told_apart() {
        let bag =
            Bag::parse("%24.mid=m%2F1&$.ct=a&temp=21&empty=&none&$.cdid=x&a%20b=c+d").unwrap();
        assert_eq!(
            bag.system,
            [
                ("message-id", "m/1".to_owned()),
                ("content-type", "a".to_owned())
            ]
        );
        let wanted = [
            ("temp", Some("21")),
            ("empty", Some("")),
            ("none", None),
            ("$.cdid", Some("x")),
            ("a b", Some("c+d")),
        ];
        let wanted = wanted.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(bag.application, wanted);
        assert_eq!(Bag::parse("").unwrap(), Bag::default());
        assert_eq!(
            Bag::parse("a=1&a=2").unwrap().application[0].1.as_deref(),
            Some("2")
        );
    }

    #[test]
    fn malformed_bags_are_refused() {
        for (bag, error) in [
            ("&", BagError::Empty),
            ("a=1&", BagError::Empty),
            ("=1", BagError::Empty),
            ("a=1=2", BagError::Equals),
            ("a=%zz", BagError::Escape),
            ("a=%4", BagError::Escape),
            ("a=%ff", BagError::Escape),
        ] {
            assert_eq!(Bag::parse(bag), Err(error), "{bag}");
        }
    }

    #[test]
    fn the_size_counts_decoded_text() {
        assert_eq!(
            Bag::parse("%24.mid=%41&b=12&c").unwrap().size,
            5 + 1 + 1 + 2 + 1
        );
    }
}
