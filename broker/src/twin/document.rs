//! One identity's twin as this hub knows it, and its stored form.

use bytes::Bytes;
use edgehub_proto::records::StoredTwin;
use prost::Message as _;

use super::json::{JsonError, Object, Value};
use super::limits::{DOCUMENT_BYTES_MAX, DOCUMENT_DEPTH_MAX};
use super::patch::{self, Unsynced};

const RECORD_VERSION: u32 = 1;
const VERSION: &str = "$version";

/// What is known of a twin. It is in memory only while something is done with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Twin {
    /// The desired properties as the upstream had them last; none = never fetched.
    pub(super) desired: Option<Object>,
    /// The reported properties: the upstream's with [`Twin::unsynced`] merged in. Of a twin that
    /// was never fetched only what was reported here.
    pub(super) reported: Object,
    /// What was reported and the upstream has not confirmed.
    pub(super) unsynced: Unsynced,
    /// The desired properties as the client knows them, while it is behind.
    pub(super) missed: Option<Object>,
}

/// A twin as the upstream sent it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fetched {
    pub(super) desired: Object,
    pub(super) reported: Object,
}

/// Why bytes are no twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DocumentError {
    /// More than [`DOCUMENT_BYTES_MAX`].
    #[error("it is too large")]
    TooLarge,
    /// It cannot be read.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// It has sections that are no objects.
    #[error("its desired or reported properties are no object")]
    Section,
    /// A later version of the record, or damaged.
    #[error("it is no record of this version")]
    Record,
}

impl Fetched {
    /// Reads `{"desired":{…,"$version":n},"reported":{…,"$version":m}}`.
    pub(super) fn parse(body: &[u8]) -> Result<Self, DocumentError> {
        let mut document = parse_object(body)?;
        let mut section = |name| match document.remove(name) {
            None | Some(Value::Null) => Ok(Object::default()),
            Some(Value::Object(object)) => Ok(patch::without_nulls(&object)),
            Some(_) => Err(DocumentError::Section),
        };
        Ok(Self {
            desired: section("desired")?,
            reported: section("reported")?,
        })
    }

    /// Whether the upstream knows the twin. A parent that is offline and never saw it answers an
    /// empty one, with version 0 or without (the cloud counts from 1): that is no news, and
    /// above all does not mean that everything was deleted.
    pub(super) fn is_known(&self) -> bool {
        version(&self.desired).is_some_and(|version| version > 0)
    }
}

impl Twin {
    /// What a client is answered. Every section has a `$version`, because Python needs one: 0
    /// where none is known, which the cloud never has and a hub below us recognises.
    pub(super) fn body(&self) -> Bytes {
        body(self.desired.as_ref(), &self.reported)
    }

    /// The version of the desired properties that are known here.
    pub(super) fn desired_version(&self) -> Option<u64> {
        self.desired.as_ref().and_then(version)
    }

    /// The upstream confirmed this version of the reported properties.
    pub(super) fn set_reported_version(&mut self, version: u64) {
        let number = Value::Number(version.to_string().into());
        self.reported.insert(VERSION, number);
    }

    /// Reads a stored twin.
    pub(super) fn decode(record: &[u8]) -> Result<Self, DocumentError> {
        let record = StoredTwin::decode(record).map_err(|_| DocumentError::Record)?;
        if record.version != RECORD_VERSION {
            return Err(DocumentError::Record);
        }
        let optional = |text: &Bytes| -> Result<Option<Object>, DocumentError> {
            let text = (!text.is_empty()).then_some(text);
            Ok(text
                .map(|text| Object::parse(text, DOCUMENT_DEPTH_MAX))
                .transpose()?)
        };
        let object = |text| optional(text).map(Option::unwrap_or_default);
        Ok(Self {
            desired: optional(&record.desired)?,
            reported: object(&record.reported)?,
            unsynced: Unsynced::from_parts(object(&record.erase)?, object(&record.set)?),
            missed: optional(&record.missed)?,
        })
    }

    /// The stored form; none for a twin of which nothing is known. The same twin has the same
    /// bytes.
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        if *self == Self::default() {
            return None;
        }
        let optional =
            |object: &Option<Object>| object.as_ref().map_or_else(Bytes::new, Object::to_bytes);
        let object = |object: &Object| {
            if object.is_empty() {
                return Bytes::new();
            }
            object.to_bytes()
        };
        let record = StoredTwin {
            version: RECORD_VERSION,
            desired: optional(&self.desired),
            reported: object(&self.reported),
            erase: object(self.unsynced.erase()),
            set: object(self.unsynced.set()),
            missed: optional(&self.missed),
        };
        Some(record.encode_to_vec())
    }
}

/// A patch or a document of the upstream.
pub(super) fn parse_object(text: &[u8]) -> Result<Object, DocumentError> {
    if text.len() > DOCUMENT_BYTES_MAX {
        return Err(DocumentError::TooLarge);
    }
    Ok(Object::parse(text, DOCUMENT_DEPTH_MAX)?)
}

/// The `$version` of a section or a patch.
pub(super) fn version(section: &Object) -> Option<u64> {
    match section.get(VERSION) {
        Some(Value::Number(text)) => text.parse().ok(),
        _ => None,
    }
}

/// A twin's body of these sections.
pub(super) fn body(desired: Option<&Object>, reported: &Object) -> Bytes {
    let section = |properties: Option<&Object>| {
        let mut properties = properties.cloned().unwrap_or_default();
        if version(&properties).is_none() {
            properties.insert(VERSION, Value::Number("0".into()));
        }
        Value::Object(properties)
    };
    let mut document = Object::default();
    document.insert("desired", section(desired));
    document.insert("reported", section(Some(reported)));
    document.to_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::twin::test_support::{document, json, patch};

    #[test]
    fn a_twin_of_which_nothing_is_known_has_versions_that_say_so() {
        let nothing = Twin::default();
        assert_eq!(
            nothing.body(),
            r#"{"desired":{"$version":0},"reported":{"$version":0}}"#
        );
        assert!(!Fetched::parse(&nothing.body()).unwrap().is_known());
        for unknown in [
            "{}",
            r#"{"desired":{},"reported":{}}"#,
            r#"{"desired":null}"#,
        ] {
            assert!(!Fetched::parse(unknown.as_bytes()).unwrap().is_known());
        }
        let known = Fetched::parse(br#"{"desired":{"$version":1,"a":null},"reported":{}}"#);
        let known = known.unwrap();
        assert!(known.is_known());
        assert_eq!(known.desired, json(r#"{"$version":1}"#), "null is absent");
    }

    #[test]
    fn what_is_no_twin_is_refused() {
        for bad in ["", "[]", "{", r#"{"desired":[]}"#, r#"{"reported":"x"}"#] {
            assert!(Fetched::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        let large = format!(
            r#"{{"desired":{{"a":"{}"}}}}"#,
            "x".repeat(DOCUMENT_BYTES_MAX)
        );
        assert_eq!(
            Fetched::parse(large.as_bytes()),
            Err(DocumentError::TooLarge)
        );
        let later = StoredTwin {
            version: 2,
            ..StoredTwin::default()
        };
        assert_eq!(
            Twin::decode(&later.encode_to_vec()),
            Err(DocumentError::Record)
        );
    }

    proptest! {
        #[test]
        fn a_stored_twin_is_read_as_it_was(
            desired in proptest::option::of(document()),
            reported in document(),
            patches in proptest::collection::vec(patch(), 0..4),
            missed in proptest::option::of(document()),
        ) {
            let mut unsynced = Unsynced::default();
            patches.iter().for_each(|patch| unsynced.add(patch));
            let twin = Twin { desired, reported, unsynced, missed };
            match twin.encode() {
                None => prop_assert_eq!(twin, Twin::default()),
                Some(record) => {
                    let read = Twin::decode(&record).unwrap();
                    prop_assert_eq!(&read, &twin);
                    prop_assert_eq!(read.encode(), Some(record));
                }
            }
        }

        #[test]
        fn no_record_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Twin::decode(&bytes);
        }
    }
}
