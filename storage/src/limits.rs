//! Limits of the store. Each bounds something that a client, a peer or time can make grow.

/// Format version that this build writes and the newest that it opens.
pub const FORMAT_VERSION: u32 = 1;

/// Queues of one store: endpoints times priorities.
pub const QUEUES_MAX: usize = 65_536;

/// Bytes of an endpoint's name.
pub const ENDPOINT_BYTES_MAX: usize = 1_024;

/// Settled ranges above the mark that one queue remembers. Above it half of them are deleted
/// physically and forgotten, so neither memory nor a checkpoint grows with the disorder of
/// acknowledgements.
pub const SPARSE_RANGES_MAX: usize = 1_024;

/// Bytes that one waiting append costs beside its message, so that the intake's byte limit
/// bounds the number of waiting appends as well.
pub const APPEND_OVERHEAD_BYTES: usize = 256;

/// Bytes that one entry of the memory tail costs beside its message.
pub const TAIL_ENTRY_OVERHEAD_BYTES: usize = 160;

/// Groups of entries that the memory tail keeps; older ones leave it, even when they are small.
pub const TAIL_CHUNKS_MAX: usize = 4_096;

/// Entries that a reader looks at in the memory tail before it lets the writer in.
pub const TAIL_SCAN_PER_LOCK: usize = 256;

/// Settled entries and KiB of key-value writes that wait for the writer. Apart from the intake
/// of appends, so that a full intake never holds back what gives space back.
pub const CONTROL_INTAKE: usize = 65_536;

/// Cold reads at a time; each occupies a blocking thread and an iterator.
pub const COLD_READS_MAX: usize = 4;

/// Settled entries of a queue after which they are deleted physically.
pub const RECLAIM_ENTRIES: u64 = 1_000;

/// Milliseconds after which settled entries are deleted physically, however few they are.
pub const RECLAIM_INTERVAL_MS: u64 = 1_000;

/// Consecutive settled entries from which a range delete is cheaper than point deletes. Each
/// range tombstone of a memtable costs every later read a little.
pub const RANGE_DELETE_MIN: u64 = 64;

/// Deleted entries of a queue after which the files below them are looked at.
pub const COMPACT_CHECK_ENTRIES: u64 = 16_384;

/// Bytes in files of deleted entries that are worth a compaction.
pub const COMPACT_BYTES: u64 = 32 * 1024 * 1024;

/// Milliseconds after which settles of a failed commit are tried again.
pub const RETRY_INTERVAL_MS: u64 = 1_000;

/// Ids of shared bodies that are reserved at a time.
pub const SHARED_RESERVE: u64 = 1 << 20;

/// Data keys that are kept, so that a wrap key that comes back finds what it sealed.
pub const DATA_KEYS_MAX: usize = 16;

/// Entries that a sweep for expired messages reads and settles at once, however many it may look
/// at in all; their outputs' names, of up to 64 KiB each, are in memory meanwhile.
pub const EXPIRE_STEP: usize = 256;
