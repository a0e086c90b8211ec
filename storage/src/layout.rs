//! How things lie in RocksDB: column families, keys and the entry record.
//!
//! | Column family | Key | Value |
//! |---|---|---|
//! | `meta` | `format`, `shared`, `queue/` + number, `datakey/` + number | version; reserved id; `QueueInfo`; wrapped key |
//! | `queues` | queue number u32 BE, offset u64 BE | `QueueEntry`, with the message when it has one target |
//! | `messages` | id u64 BE | message that several queues share |
//! | `refs` | id u64 BE | u32 BE: unsettled entries that refer to it |
//! | `checkpoints` | queue number u32 BE | `Checkpoint` |
//! | `twins`, `sessions`, `scope`, `settings` | the caller's | see [`crate::seal`] |
//!
//! An entry that is physically absent below its queue's next offset is settled.
//!
//! The entry record is protobuf (`QueueEntry` of `edgehub_proto::records`), written and read by
//! hand: a reader has to look at the sender before it copies a message, and prost copies first.

use std::ops::Range;

use crate::error::StoreError;

/// Version of the entry and checkpoint records that this build writes.
pub(crate) const RECORD_VERSION: u32 = 1;

pub(crate) const META_FORMAT: &[u8] = b"format";
pub(crate) const META_SHARED: &[u8] = b"shared";
pub(crate) const META_QUEUE: &[u8] = b"queue/";
pub(crate) const META_DATA_KEY: &[u8] = b"datakey/";

/// Our column families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cf {
    Meta,
    Queues,
    Messages,
    Refs,
    Checkpoints,
    Twins,
    Sessions,
    Scope,
    Settings,
}

impl Cf {
    /// In the order in which they are created. `meta` is the mark of ours and comes first, so
    /// that a creation cut short is never taken for somebody else's folder.
    pub(crate) const ALL: [Self; 9] = [
        Self::Meta,
        Self::Queues,
        Self::Messages,
        Self::Refs,
        Self::Checkpoints,
        Self::Twins,
        Self::Sessions,
        Self::Scope,
        Self::Settings,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Queues => "queues",
            Self::Messages => "messages",
            Self::Refs => "refs",
            Self::Checkpoints => "checkpoints",
            Self::Twins => "twins",
            Self::Sessions => "sessions",
            Self::Scope => "scope",
            Self::Settings => "settings",
        }
    }
}

/// Key of a queue entry.
pub(crate) fn entry_key(number: u32, offset: u64) -> [u8; 12] {
    let mut key = [0; 12];
    let (head, tail) = key.split_at_mut(4);
    head.copy_from_slice(&number.to_be_bytes());
    tail.copy_from_slice(&offset.to_be_bytes());
    key
}

/// Offset of an entry's key.
pub(crate) fn entry_offset(key: &[u8]) -> Option<u64> {
    let offset = key.get(4..12)?;
    (key.len() == 12).then(|| offset.try_into().map(u64::from_be_bytes).ok())?
}

/// `prefix` followed by a number.
pub(crate) fn numbered(prefix: &[u8], number: u32) -> Vec<u8> {
    [prefix, &number.to_be_bytes()].concat()
}

pub(crate) fn read_u32(bytes: &[u8], what: &'static str) -> Result<u32, StoreError> {
    bytes
        .try_into()
        .map(u32::from_be_bytes)
        .map_err(|_| StoreError::Record { what })
}

pub(crate) fn read_u64(bytes: &[u8], what: &'static str) -> Result<u64, StoreError> {
    bytes
        .try_into()
        .map(u64::from_be_bytes)
        .map_err(|_| StoreError::Record { what })
}

/// A queue entry's record, borrowed from its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EntryRecord<'a> {
    pub(crate) sender: &'a str,
    pub(crate) expires_at_ms: Option<u64>,
    pub(crate) enqueued_ms: u64,
    pub(crate) shared: Option<u64>,
    pub(crate) message: &'a [u8],
}

const VERSION: u32 = 1;
const SENDER: u32 = 2;
const EXPIRES: u32 = 3;
const ENQUEUED: u32 = 4;
const SHARED: u32 = 5;
const MESSAGE: u32 = 15;

const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const BYTES: u32 = 2;
const FIXED32: u32 = 5;

impl<'a> EntryRecord<'a> {
    /// Replaces the contents of `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        put_number(out, VERSION, u64::from(RECORD_VERSION));
        put_bytes(out, SENDER, self.sender.as_bytes());
        put_number(out, EXPIRES, self.expires_at_ms.map_or(0, |at| at.max(1)));
        put_number(out, ENQUEUED, self.enqueued_ms);
        put_number(out, SHARED, self.shared.unwrap_or(0));
        put_bytes(out, MESSAGE, self.message);
    }

    /// Fields of a later version are skipped; a later record version is an error.
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self, StoreError> {
        Self::parse(bytes).ok_or(StoreError::Record {
            what: "queue entry",
        })
    }

    fn parse(mut rest: &'a [u8]) -> Option<Self> {
        let mut record = Self::default();
        let mut version = 0;
        while !rest.is_empty() {
            let tag = u32::try_from(take_varint(&mut rest)?).ok()?;
            match (tag >> 3, tag & 7) {
                (VERSION, VARINT) => version = take_varint(&mut rest)?,
                (SENDER, BYTES) => {
                    record.sender = std::str::from_utf8(take_bytes(&mut rest)?).ok()?;
                }
                (EXPIRES, VARINT) => {
                    record.expires_at_ms = Some(take_varint(&mut rest)?).filter(|at| *at != 0);
                }
                (ENQUEUED, VARINT) => record.enqueued_ms = take_varint(&mut rest)?,
                (SHARED, VARINT) => {
                    record.shared = Some(take_varint(&mut rest)?).filter(|id| *id != 0);
                }
                (MESSAGE, BYTES) => record.message = take_bytes(&mut rest)?,
                (1.., VARINT) => drop(take_varint(&mut rest)?),
                (1.., FIXED64) => rest = rest.get(8..)?,
                (1.., BYTES) => drop(take_bytes(&mut rest)?),
                (1.., FIXED32) => rest = rest.get(4..)?,
                _ => return None,
            }
        }
        (version == u64::from(RECORD_VERSION)).then_some(record)
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

fn put_number(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(field << 3 | VARINT));
        put_varint(out, value);
    }
}

fn put_bytes(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    if !value.is_empty() {
        put_varint(out, u64::from(field << 3 | BYTES));
        put_varint(out, value.len() as u64);
        out.extend_from_slice(value);
    }
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_varint(rest)?).ok()?;
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(bytes)
}

/// First and one past the last key of a queue's offsets.
pub(crate) fn entry_range(number: u32, offsets: &Range<u64>) -> ([u8; 12], [u8; 12]) {
    (
        entry_key(number, offsets.start),
        entry_key(number, offsets.end),
    )
}

#[cfg(test)]
mod tests {
    use edgehub_proto::records::QueueEntry;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn record() -> impl Strategy<Value = (String, Option<u64>, u64, Option<u64>, Vec<u8>)> {
        (
            "[a-z/]{0,20}",
            proptest::option::of(1..=u64::MAX),
            any::<u64>(),
            proptest::option::of(1..=u64::MAX),
            proptest::collection::vec(any::<u8>(), 0..300),
        )
    }

    proptest! {
        #[test]
        fn an_entry_is_the_protobuf_record(
            (sender, expires_at_ms, enqueued_ms, shared, message) in record(),
        ) {
            let ours = EntryRecord {
                sender: &sender, expires_at_ms, enqueued_ms, shared, message: &message,
            };
            let theirs = QueueEntry {
                version: RECORD_VERSION,
                sender: sender.clone(),
                expires_at_ms: expires_at_ms.unwrap_or(0),
                enqueued_ms,
                shared: shared.unwrap_or(0),
                message: message.clone().into(),
            };
            let mut bytes = Vec::new();
            ours.encode(&mut bytes);
            prop_assert_eq!(&bytes, &theirs.encode_to_vec());
            prop_assert_eq!(EntryRecord::decode(&bytes).unwrap(), ours);
        }

        #[test]
        fn fields_of_a_later_version_are_skipped(
            field in 16u32..1000, number in any::<u64>(), text in "[a-z]{1,9}",
        ) {
            let mut bytes = Vec::new();
            EntryRecord { sender: "d", message: b"m", ..EntryRecord::default() }.encode(&mut bytes);
            put_number(&mut bytes, field, number);
            put_bytes(&mut bytes, field + 1, text.as_bytes());
            put_varint(&mut bytes, u64::from((field + 2) << 3 | FIXED64));
            bytes.extend_from_slice(&[7; 8]);
            put_varint(&mut bytes, u64::from((field + 3) << 3 | FIXED32));
            bytes.extend_from_slice(&[7; 4]);
            let read = EntryRecord::decode(&bytes).unwrap();
            prop_assert_eq!((read.sender, read.message), ("d", &b"m"[..]));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = EntryRecord::decode(&bytes);
        }

        #[test]
        fn keys_sort_like_their_numbers(a in any::<(u32, u64)>(), b in any::<(u32, u64)>()) {
            prop_assert_eq!(entry_key(a.0, a.1).cmp(&entry_key(b.0, b.1)), a.cmp(&b));
            prop_assert_eq!(entry_offset(&entry_key(a.0, a.1)), Some(a.1));
        }
    }

    #[test]
    fn a_later_record_version_is_refused() {
        let later = QueueEntry {
            version: 2,
            sender: "d".into(),
            ..QueueEntry::default()
        };
        assert!(EntryRecord::decode(&later.encode_to_vec()).is_err());
        assert!(entry_offset(b"short").is_none());
    }
}
