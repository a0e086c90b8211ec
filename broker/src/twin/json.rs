//! JSON objects as twins need them.
//!
//! Not `serde_json::Value`, for two reasons. A number keeps its text: a twin only passes through
//! here, and 17 digits or an integer beyond 64 bits must come out as they went in. And the depth
//! is limited while reading, so that every function that walks a document is bounded.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde_json::value::RawValue;

/// A JSON value.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// As it was written.
    Number(Box<str>),
    Text(String),
    Array(Vec<Self>),
    Object(Object),
}

/// A JSON object. Of two members of one name the last counts.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Object(BTreeMap<String, Value>);

/// Why bytes are no JSON object for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum JsonError {
    #[error("it is no JSON")]
    Syntax,
    #[error("it is no JSON object")]
    NotAnObject,
    #[error("it is nested too deep")]
    TooDeep,
}

impl Object {
    /// Reads an object in which at most `depth_max` objects and arrays lie within one another
    /// below the root.
    pub(super) fn parse(text: &[u8], depth_max: usize) -> Result<Self, JsonError> {
        // serde_json skips over a raw value without recursion, whatever its depth.
        let raw: &RawValue = serde_json::from_slice(text).map_err(|_| JsonError::Syntax)?;
        if !raw.get().starts_with('{') {
            return Err(JsonError::NotAnObject);
        }
        Self::read(raw, depth_max)
    }

    fn read(raw: &RawValue, depth_left: usize) -> Result<Self, JsonError> {
        let members: BTreeMap<String, &RawValue> =
            serde_json::from_str(raw.get()).map_err(|_| JsonError::Syntax)?;
        let members = members.into_iter();
        let members =
            members.map(|(name, raw)| Value::read(raw, depth_left).map(|value| (name, value)));
        members.collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn to_bytes(&self) -> Bytes {
        let mut text = Vec::new();
        self.write(&mut text);
        text.into()
    }

    /// Length of [`Self::to_bytes`].
    pub(super) fn text_length(&self) -> usize {
        self.to_bytes().len()
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        for (index, (name, value)) in self.0.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            write_text(name, out);
            out.push(b':');
            value.write(out);
        }
        out.push(b'}');
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Value> {
        self.0.get_mut(name)
    }

    pub(super) fn insert(&mut self, name: &str, value: Value) {
        match self.0.get_mut(name) {
            Some(old) => *old = value,
            None => drop(self.0.insert(name.to_owned(), value)),
        }
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }
}

impl Value {
    fn read(raw: &RawValue, depth_left: usize) -> Result<Self, JsonError> {
        let text = raw.get();
        let deeper = || depth_left.checked_sub(1).ok_or(JsonError::TooDeep);
        Ok(match text.as_bytes().first() {
            Some(b'{') => Self::Object(Object::read(raw, deeper()?)?),
            Some(b'[') => {
                let depth_left = deeper()?;
                let items: Vec<&RawValue> =
                    serde_json::from_str(text).map_err(|_| JsonError::Syntax)?;
                let items = items.into_iter().map(|item| Self::read(item, depth_left));
                Self::Array(items.collect::<Result<_, _>>()?)
            }
            Some(b'"') => Self::Text(serde_json::from_str(text).map_err(|_| JsonError::Syntax)?),
            Some(b't') => Self::Bool(true),
            Some(b'f') => Self::Bool(false),
            Some(b'n') => Self::Null,
            _ => Self::Number(text.into()),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Null => out.extend_from_slice(b"null"),
            Self::Bool(true) => out.extend_from_slice(b"true"),
            Self::Bool(false) => out.extend_from_slice(b"false"),
            Self::Number(text) => out.extend_from_slice(text.as_bytes()),
            Self::Text(text) => write_text(text, out),
            Self::Array(items) => {
                out.push(b'[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    item.write(out);
                }
                out.push(b']');
            }
            Self::Object(object) => object.write(out),
        }
    }
}

/// Writing into memory cannot fail, and a text has no key that is no text.
fn write_text(text: &str, out: &mut Vec<u8>) {
    let written = serde_json::to_writer(out, text);
    debug_assert!(written.is_ok(), "a text is always JSON");
}

impl FromIterator<(String, Value)> for Object {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(members: I) -> Self {
        Self(members.into_iter().collect())
    }
}

impl fmt::Debug for Object {
    /// Outside of tests without contents: twins may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if cfg!(test) {
            return f.write_str(&String::from_utf8_lossy(&self.to_bytes()));
        }
        write!(f, "Object({} members)", self.0.len())
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if cfg!(test) {
            let mut text = Vec::new();
            self.write(&mut text);
            return f.write_str(&String::from_utf8_lossy(&text));
        }
        f.write_str("Value(***)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::twin::test_support::{object, value};

    fn parse(text: &str) -> Result<Object, JsonError> {
        Object::parse(text.as_bytes(), 10)
    }

    #[test]
    fn numbers_keep_their_digits() {
        let text = r#"{"a":0.30000000000000004,"b":1.0,"c":123456789012345678901234567890,"d":1E+2,"e":-0}"#;
        let object = parse(text).unwrap();
        assert_eq!(object.to_bytes(), text);
        assert_eq!(
            parse(" {\"b\" : 1.0 }").unwrap().get("b"),
            object.get("b"),
            "spaces do not count"
        );
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in [
            "",
            " ",
            "{",
            "{}x",
            "{\"a\":}",
            "{\"a\":01}",
            "{'a':1}",
            "{\"a\":\"\\ud800\"}",
            "\u{feff}{}",
        ] {
            assert_eq!(parse(text), Err(JsonError::Syntax), "{text:?}");
        }
        for text in ["null", "1", "\"{}\"", "[]", " [{}]"] {
            assert_eq!(parse(text), Err(JsonError::NotAnObject), "{text:?}");
        }
        assert_eq!(
            Object::parse(b"{\"a\":\"\xff\"}", 10),
            Err(JsonError::Syntax)
        );
        assert_eq!(parse(r#"{"a":1,"a":2}"#), parse(r#"{"a":2}"#));
    }

    #[test]
    fn depth_is_limited_however_deep_the_text_is() {
        let nested = |open: &str, close: &str, depth: usize| {
            format!("{{\"a\":{}0{}}}", open.repeat(depth), close.repeat(depth))
        };
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            assert!(parse(&nested(open, close, 10)).is_ok());
            for depth in [11, 200, 100_000] {
                let deep = parse(&nested(open, close, depth));
                assert_eq!(deep, Err(JsonError::TooDeep), "{open} {depth}");
            }
            let broken = nested(open, "", 100_000);
            assert_eq!(parse(&broken), Err(JsonError::Syntax));
        }
    }

    fn as_serde(value: &Value) -> serde_json::Value {
        let mut text = Vec::new();
        value.write(&mut text);
        serde_json::from_slice(&text).unwrap()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(object in object()) {
            prop_assert_eq!(&Object::parse(&object.to_bytes(), 10).unwrap(), &object);
        }

        #[test]
        fn it_is_what_serde_json_reads(value in value()) {
            // The oracle writes it, with another order of members and other spaces.
            let oracle = serde_json::json!({ "z": as_serde(&value), "a": [as_serde(&value)] });
            let text = serde_json::to_string_pretty(&oracle).unwrap();
            let object = Object::parse(text.as_bytes(), 12).unwrap();
            prop_assert_eq!(as_serde(&Value::Object(object)), oracle);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Object::parse(&bytes, 10);
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in r#"[\[\]{}",:0-9a\\un -]{0,60}"#) {
            if let Ok(object) = Object::parse(text.as_bytes(), 10) {
                prop_assert_eq!(Object::parse(&object.to_bytes(), 10).unwrap(), object);
            }
        }
    }
}
