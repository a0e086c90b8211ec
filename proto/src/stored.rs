//! Messages as bytes of the store.
//!
//! A stored message is never rewritten: what a later version adds to the record stays in its
//! bytes, whatever reads it.

use bytes::Bytes;
use prost::Message as _;

use crate::message::{Message, Property, SystemProperties, SystemProperty};
use crate::records::StoredMessage;

/// Why bytes of the store are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoredError {
    /// The bytes are no record.
    #[error("a stored message cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// Its lists do not fit together.
    #[error("a stored message is inconsistent")]
    Inconsistent,
}

/// Encodes a message as a [`StoredMessage`], with one allocation.
///
/// Written by hand because prost encodes owned lists only: every key and value would be copied
/// once more. A test compares the bytes with prost's.
#[must_use]
pub fn encode_message(message: &Message) -> Bytes {
    let Message {
        body,
        properties,
        system,
    } = message;
    let all_present = properties.iter().all(|p| p.value.is_some());
    let present_length = if all_present { 0 } else { properties.len() };
    let numbers_length: usize = system.iter().map(|(p, _)| varint_length(p.number())).sum();
    let mut length = length_of(present_length, false) + length_of(numbers_length, false);
    for property in properties {
        length += length_of(property.key.len(), true);
        length += length_of(property.value.as_deref().unwrap_or("").len(), true);
    }
    length += system
        .iter()
        .map(|(_, value)| length_of(value.len(), true))
        .sum::<usize>();
    length += length_of(body.len(), false);

    let mut record = Vec::with_capacity(length);
    for property in properties {
        put(field::KEYS, property.key.as_bytes(), &mut record);
    }
    for property in properties {
        put(
            field::VALUES,
            property.value.as_deref().unwrap_or("").as_bytes(),
            &mut record,
        );
    }
    if present_length > 0 {
        put_head(field::PRESENT, present_length, &mut record);
        record.extend(properties.iter().map(|p| u8::from(p.value.is_some())));
    }
    if numbers_length > 0 {
        put_head(field::SYSTEM, numbers_length, &mut record);
        for (property, _) in system.iter() {
            put_varint(u64::from(property.number()), &mut record);
        }
    }
    for (_, value) in system.iter() {
        put(field::SYSTEM_VALUES, value.as_bytes(), &mut record);
    }
    if !body.is_empty() {
        put(field::BODY, body, &mut record);
    }
    debug_assert_eq!(record.len(), length, "the record was allocated once");
    record.into()
}

/// Field numbers of `records.proto`: all below 16, so that a key is one byte, and all
/// length-delimited.
mod field {
    pub(super) const KEYS: u8 = 1;
    pub(super) const VALUES: u8 = 2;
    pub(super) const PRESENT: u8 = 3;
    pub(super) const SYSTEM: u8 = 4;
    pub(super) const SYSTEM_VALUES: u8 = 5;
    pub(super) const BODY: u8 = 15;
}

/// Length of a length-delimited field; protobuf leaves an empty one out unless it is `repeated`.
fn length_of(content: usize, repeated: bool) -> usize {
    if content == 0 && !repeated {
        return 0;
    }
    1 + prost::length_delimiter_len(content) + content
}

fn varint_length(number: u32) -> usize {
    usize::try_from(number).map_or(5, prost::length_delimiter_len)
}

fn put(field: u8, content: &[u8], record: &mut Vec<u8>) {
    put_head(field, content.len(), record);
    record.extend_from_slice(content);
}

fn put_head(field: u8, length: usize, record: &mut Vec<u8>) {
    const LENGTH_DELIMITED: u8 = 2;
    record.push(field << 3 | LENGTH_DELIMITED);
    put_varint(length as u64, record);
}

fn put_varint(mut number: u64, record: &mut Vec<u8>) {
    while number > 0x7f {
        record.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    record.push(number as u8);
}

/// Decodes a message; the body is a slice of `bytes`. System properties of a later version are
/// left out.
///
/// # Errors
/// When the bytes are no message.
pub fn decode_message(bytes: Bytes) -> Result<Message, StoredError> {
    let record = StoredMessage::decode(bytes)?;
    let consistent = record.keys.len() == record.values.len()
        && record.system.len() == record.system_values.len()
        && (record.present.is_empty() || record.present.len() == record.keys.len());
    if !consistent {
        return Err(StoredError::Inconsistent);
    }
    let mut present = record.present.into_iter();
    let properties = record
        .keys
        .into_iter()
        .zip(record.values)
        .map(|(key, value)| Property {
            key,
            value: present.next().unwrap_or(true).then_some(value),
        })
        .collect();
    let system: SystemProperties = record
        .system
        .into_iter()
        .zip(record.system_values)
        .filter_map(|(number, value)| Some((SystemProperty::from_number(number)?, value)))
        .collect();
    Ok(Message {
        body: record.body,
        properties,
        system,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The record as prost writes it.
    fn record(message: &Message) -> StoredMessage {
        let properties = &message.properties;
        let absent = properties.iter().any(|p| p.value.is_none());
        let present = properties.iter().map(|p| p.value.is_some());
        StoredMessage {
            keys: properties.iter().map(|p| p.key.clone()).collect(),
            values: properties
                .iter()
                .map(|p| p.value.clone().unwrap_or_default())
                .collect(),
            present: if absent {
                present.collect()
            } else {
                Vec::new()
            },
            system: message
                .system
                .iter()
                .map(|(property, _)| property.number())
                .collect(),
            system_values: message
                .system
                .iter()
                .map(|(_, value)| value.to_owned())
                .collect(),
            body: message.body.clone(),
        }
    }

    #[test]
    fn the_body_is_a_slice_of_what_was_read() {
        let message = Message {
            body: vec![7; 1000].into(),
            ..Message::default()
        };
        let bytes = encode_message(&message);
        let range = bytes.as_ptr_range();
        let body = decode_message(bytes).unwrap().body;
        assert!(range.contains(&body.as_ptr()));
        assert_eq!(encode_message(&Message::default()).len(), 0);
    }

    #[test]
    fn a_system_property_of_a_later_version_is_left_out() {
        let record = StoredMessage {
            system: vec![1, 9999],
            system_values: vec!["m".into(), "?".into()],
            ..StoredMessage::default()
        };
        let message = decode_message(record.encode_to_vec().into()).unwrap();
        assert_eq!(message.system.len(), 1);
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        let texts = |count| vec![String::from("a"); count];
        for record in [
            StoredMessage {
                keys: texts(1),
                ..StoredMessage::default()
            },
            StoredMessage {
                values: texts(1),
                ..StoredMessage::default()
            },
            StoredMessage {
                system: vec![1],
                ..StoredMessage::default()
            },
            StoredMessage {
                system_values: texts(1),
                ..StoredMessage::default()
            },
            StoredMessage {
                present: vec![true],
                ..StoredMessage::default()
            },
            StoredMessage {
                keys: texts(2),
                values: texts(2),
                present: vec![true],
                ..StoredMessage::default()
            },
        ] {
            let bytes = Bytes::from(record.encode_to_vec());
            assert_eq!(
                decode_message(bytes),
                Err(StoredError::Inconsistent),
                "{record:?}"
            );
        }
    }

    fn message() -> impl Strategy<Value = Message> {
        let body = proptest::collection::vec(any::<u8>(), 0..300);
        let text = || prop_oneof![any::<String>(), ".{120,140}"];
        let properties = proptest::collection::vec((text(), proptest::option::of(text())), 0..6);
        let system = proptest::collection::vec((0..SystemProperty::ALL.len(), text()), 0..6);
        (body, properties, system).prop_map(|(body, properties, system)| Message {
            body: body.into(),
            properties: properties
                .into_iter()
                .map(|(key, value)| Property { key, value })
                .collect(),
            system: system
                .into_iter()
                .map(|(i, v)| (SystemProperty::ALL[i], v))
                .collect(),
        })
    }

    proptest! {
        #[test]
        fn a_message_survives(message in message()) {
            prop_assert_eq!(decode_message(encode_message(&message)).unwrap(), message);
        }

        #[test]
        fn the_bytes_are_those_of_prost(message in message()) {
            prop_assert_eq!(encode_message(&message), record(&message).encode_to_vec());
        }

        #[test]
        fn varints_are_those_of_prost(number in any::<u32>()) {
            let mut ours = Vec::new();
            put_varint(u64::from(number), &mut ours);
            let mut theirs = Vec::new();
            prost::encode_length_delimiter(number as usize, &mut theirs).unwrap();
            prop_assert_eq!(varint_length(number), ours.len());
            prop_assert_eq!(ours, theirs);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_message(bytes.into());
        }

        #[test]
        fn no_cut_makes_the_decoder_panic(message in message(), at in any::<prop::sample::Index>()) {
            let bytes = encode_message(&message);
            let _ = decode_message(bytes.slice(..at.index(bytes.len() + 1)));
        }
    }
}
