//! Reading of what has left the memory tail, from RocksDB.
//!
//! An iterator lives as long as one call, so it pins no block and no memtable between calls; it
//! has both bounds and starts at the known position, because a walk from the queue's start would
//! step over every tombstone of what was deleted.

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::SystemProperty;
use edgehub_proto::stored;
use rocksdb::{DBRawIterator, ReadOptions};

use crate::db::Open;
use crate::error::StoreError;
use crate::layout::{Cf, EntryRecord, entry_key, entry_offset, entry_range};
use crate::queue::{Entry, QueueState, ReadBatch, ReadLimit, SenderFilter};
use crate::settle::SettleSet;

/// Settled entries that still exist are stepped over one by one up to here; beyond it a seek
/// is cheaper.
const SEEK_INSTEAD_OF_STEPS: u64 = 32;

/// What is left of a [`ReadLimit`].
#[derive(Debug)]
pub(crate) struct Remaining {
    entries: usize,
    bytes: usize,
    scan: usize,
    taken: bool,
}

impl Remaining {
    pub(crate) fn new(limit: ReadLimit) -> Self {
        let ReadLimit {
            entries,
            bytes,
            scan,
        } = limit;
        Self {
            entries,
            bytes,
            scan,
            taken: false,
        }
    }

    pub(crate) fn is_used_up(&self) -> bool {
        self.entries == 0 || self.scan == 0
    }

    /// Takes an entry of so many bytes; the first one always fits.
    pub(crate) fn fits(&mut self, bytes: usize) -> bool {
        if self.taken && bytes > self.bytes {
            return false;
        }
        self.taken = true;
        self.bytes = self.bytes.saturating_sub(bytes);
        self.entries = self.entries.saturating_sub(1);
        true
    }

    pub(crate) fn scanned(&mut self) {
        self.scan = self.scan.saturating_sub(1);
    }
}

/// An iterator over entries `from..to` of a queue, at the first one.
pub(crate) fn entries<'a>(
    open: &Open<'a>,
    number: u32,
    from: u64,
    to: u64,
) -> Result<DBRawIterator<'a>, StoreError> {
    let (lower, upper) = entry_range(number, &(from..to));
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(lower);
    options.set_iterate_upper_bound(upper);
    let mut iterator = open.db.raw_iterator_cf_opt(open.cf(Cf::Queues)?, options);
    iterator.seek(lower);
    Ok(iterator)
}

/// The offset that the iterator is at; `None` at the end.
pub(crate) fn offset_at(iterator: &DBRawIterator<'_>) -> Result<Option<u64>, StoreError> {
    let Some(key) = iterator.key() else {
        return match iterator.status() {
            Ok(()) => Ok(None),
            Err(error) => Err(StoreError::database("read a queue", &error)),
        };
    };
    entry_offset(key)
        .map(Some)
        .ok_or(StoreError::Record { what: "queue key" })
}

/// A cold read and what it could not make sense of.
#[derive(Debug)]
pub(crate) struct ColdRead {
    pub(crate) batch: ReadBatch,
    /// Entries that are no record, or whose shared message is gone.
    pub(crate) damaged: Vec<u64>,
}

/// Reads committed entries `from..to`.
pub(crate) fn cold(
    open: &Open<'_>,
    queue: &QueueState,
    from: u64,
    to: u64,
    limit: ReadLimit,
    filter: Option<&SenderFilter>,
) -> Result<ColdRead, StoreError> {
    let settled = queue.settled.lock().clone();
    let mut left = Remaining::new(limit);
    let mut senders = SenderCache::default();
    let mut damaged = Vec::new();
    let mut batch = ReadBatch {
        entries: Vec::new(),
        next: from,
    };
    let mut iterator = entries(open, queue.number, from, to)?;
    while !left.is_used_up() {
        let Some(offset) = next_unsettled(&mut iterator, &settled, queue.number)? else {
            batch.next = to;
            break;
        };
        match decode(open, &iterator, offset, filter, &mut senders)? {
            Decoded::Entry(entry) => {
                if !left.fits(entry.message.len()) {
                    break;
                }
                batch.entries.push(entry);
            }
            Decoded::NotWanted => {}
            Decoded::Damaged => {
                // What is settled meanwhile may have lost its shared message; that is no damage.
                if queue.settled.lock().skip(offset) == offset {
                    damaged.push(offset);
                }
            }
        }
        left.scanned();
        batch.next = offset + 1;
        iterator.next();
    }
    Ok(ColdRead { batch, damaged })
}

/// Steps to the next entry that is not settled; `None` at the end.
fn next_unsettled(
    iterator: &mut DBRawIterator<'_>,
    settled: &SettleSet,
    number: u32,
) -> Result<Option<u64>, StoreError> {
    while let Some(offset) = offset_at(iterator)? {
        let wanted = settled.skip(offset);
        if wanted == offset {
            return Ok(Some(offset));
        }
        if wanted - offset > SEEK_INSTEAD_OF_STEPS {
            iterator.seek(entry_key(number, wanted));
        } else {
            iterator.next();
        }
    }
    Ok(None)
}

enum Decoded {
    Entry(Entry),
    NotWanted,
    Damaged,
}

fn decode(
    open: &Open<'_>,
    iterator: &DBRawIterator<'_>,
    offset: u64,
    filter: Option<&SenderFilter>,
    senders: &mut SenderCache,
) -> Result<Decoded, StoreError> {
    let Ok(record) = EntryRecord::decode(iterator.value().unwrap_or_default()) else {
        return Ok(Decoded::Damaged);
    };
    if filter.is_some_and(|wants| !wants(offset, record.sender)) {
        return Ok(Decoded::NotWanted);
    }
    let Some(sender) = senders.parse(record.sender) else {
        return Ok(Decoded::Damaged);
    };
    let message = match record.shared {
        None => Some(Bytes::copy_from_slice(record.message)),
        Some(id) => open.get(Cf::Messages, &id.to_be_bytes())?.map(Bytes::from),
    };
    let Some(message) = message else {
        return Ok(Decoded::Damaged);
    };
    Ok(Decoded::Entry(Entry {
        offset,
        sender,
        message,
        enqueued_ms: record.enqueued_ms,
        expires_at_ms: record.expires_at_ms,
        shared: record.shared,
    }))
}

/// The last sender: runs of messages of one sender are the rule.
#[derive(Default)]
struct SenderCache(Option<Identity>);

impl SenderCache {
    fn parse(&mut self, sender: &str) -> Option<Identity> {
        if self.0.as_ref().is_none_or(|last| last.as_str() != sender) {
            self.0 = Identity::parse(sender).ok();
        }
        self.0.clone()
    }
}

/// What a look at a part of a queue found for the expiry sweep.
#[derive(Debug, Default)]
pub(crate) struct Expired {
    /// What has expired.
    pub(crate) entries: Vec<ExpiredEntry>,
    /// Earliest expiry among the others, Unix ms; `u64::MAX` = none.
    pub(crate) earliest_ms: u64,
    /// Entries looked at.
    pub(crate) scanned: usize,
    /// Where to go on; `to` when the end was reached.
    pub(crate) next: u64,
}

/// An entry whose time is over.
#[derive(Debug)]
pub(crate) struct ExpiredEntry {
    pub(crate) offset: u64,
    pub(crate) shared: Option<u64>,
    /// Who sent it, and from which output; `None` when the record does not say.
    pub(crate) origin: Option<(Identity, String)>,
}

/// Looks at up to `limit` unsettled entries of `from..to` for what has expired.
pub(crate) fn expired(
    open: &Open<'_>,
    queue: &QueueState,
    from: u64,
    to: u64,
    now_ms: u64,
    limit: usize,
) -> Result<Expired, StoreError> {
    let settled = queue.settled.lock().clone();
    let mut found = Expired {
        earliest_ms: u64::MAX,
        next: from,
        ..Expired::default()
    };
    let mut senders = SenderCache::default();
    let mut iterator = entries(open, queue.number, from, to)?;
    while found.scanned < limit {
        let Some(offset) = next_unsettled(&mut iterator, &settled, queue.number)? else {
            found.next = to;
            break;
        };
        if let Ok(record) = EntryRecord::decode(iterator.value().unwrap_or_default())
            && let Some(at) = record.expires_at_ms
        {
            if at <= now_ms {
                let shared = record.shared;
                let origin = match decode(open, &iterator, offset, None, &mut senders)? {
                    Decoded::Entry(entry) => Some((entry.sender, output_of(entry.message))),
                    // Without its message the record still says who sent it.
                    Decoded::NotWanted | Decoded::Damaged => {
                        let sender = senders.parse(record.sender);
                        sender.map(|sender| (sender, String::new()))
                    }
                };
                found.entries.push(ExpiredEntry {
                    offset,
                    shared,
                    origin,
                });
            } else {
                found.earliest_ms = found.earliest_ms.min(at);
            }
        }
        found.scanned += 1;
        found.next = offset + 1;
        iterator.next();
    }
    Ok(found)
}

/// The output that a message was sent from; empty without one.
fn output_of(message: Bytes) -> String {
    let message = stored::decode_message(message).unwrap_or_default();
    let output = message.system.get(SystemProperty::OutputName);
    output.unwrap_or_default().to_owned()
}
