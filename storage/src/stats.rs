//! What the store has done since it was opened.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the store was opened, and levels now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStats {
    /// Groups that were committed.
    pub commits: u64,
    /// Groups that failed.
    pub commits_failed: u64,
    /// Commits that ended with an fsync of the log.
    pub wal_syncs: u64,
    /// Messages stored.
    pub appends: u64,
    /// Queue entries stored: one for each message and target.
    pub entries: u64,
    /// Bytes of messages stored; one that several queues share counts once.
    pub append_bytes: u64,
    /// Entries settled as done.
    pub settled: u64,
    /// Entries settled as expired.
    pub expired: u64,
    /// Entries settled as dropped.
    pub dropped: u64,
    /// Entries that could not be decoded; they are among `dropped`.
    pub damaged: u64,
    /// Reads that the memory tail answered.
    pub tail_reads: u64,
    /// Reads that went to RocksDB.
    pub cold_reads: u64,
    /// Sealed values that no data key at hand opens.
    pub sealed_unreadable: u64,
    /// Bytes that wait for the writer now.
    pub intake_bytes: u64,
    /// Bytes in the memory tail now.
    pub tail_bytes: u64,
    /// Unsettled entries of all queues now.
    pub queued: u64,
}

/// Counters of one queue since the store was opened: I4 balances on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStats {
    /// Entries stored.
    pub entries: u64,
    /// Entries settled as done.
    pub settled: u64,
    /// Entries settled as expired.
    pub expired: u64,
    /// Entries settled as dropped.
    pub dropped: u64,
}

macro_rules! counters {
    ($(#[$doc:meta])* $name:ident => $snapshot:ident { $($field:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name { $(pub(crate) $field: AtomicU64),* }
        impl $name {
            pub(crate) fn snapshot(&self) -> $snapshot {
                $snapshot {
                    $($field: self.$field.load(Ordering::Relaxed),)*
                    ..$snapshot::default()
                }
            }
        }
    };
}

counters! {
    /// The counters behind [`StoreStats`].
    Counters => StoreStats {
        commits, commits_failed, wal_syncs, appends, entries, append_bytes, settled, expired,
        dropped, damaged, tail_reads, cold_reads, sealed_unreadable, tail_bytes,
    }
}

counters! {
    /// The counters behind [`QueueStats`].
    QueueCounters => QueueStats { entries, settled, expired, dropped }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
