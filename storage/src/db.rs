//! The RocksDB instance: its options, and a gate that lets `close` wait for readers.
//!
//! Options come from stack-measurements 1 section 5 and 2 section 3: what is bounded is the sum
//! of write buffers, the block cache (index blocks live in it, so that they do not grow with
//! the backlog), open files and the log.

use parking_lot::RwLock;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, LogLevel, Options, Range, ReadOptions, WriteBatch, WriteOptions,
};

use crate::config::StoreConfig;
use crate::error::StoreError;
use crate::layout::{Cf, entry_range};
use crate::limits::COMPACT_BYTES;

/// Bytes of a table file: the grain in which space of a drained backlog comes back.
const FILE_BYTES: u64 = 32 * 1024 * 1024;

/// Bytes of a log before column families that were not written for long are flushed for it.
const WAL_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Bytes of a block of messages: fewer index entries than the usual 4 KiB.
const BLOCK_BYTES: usize = 16 * 1024;

/// Bytes read ahead for each input of a compaction; the default of 2 MiB times ten inputs is
/// more than everything else here.
const COMPACTION_READAHEAD_BYTES: usize = 256 * 1024;

const OPEN_FILES_MAX: i32 = 256;

/// The database. Readers and the writer go in through [`Db::with`]; [`Db::close`] waits until
/// they are out.
pub(crate) struct Db {
    inner: RwLock<Option<DB>>,
    #[cfg(test)]
    options: Options,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db").finish_non_exhaustive()
    }
}

/// The open database, for the time of one operation.
pub(crate) struct Open<'a> {
    pub(crate) db: &'a DB,
}

impl Db {
    /// Opens or creates; `existing` are the column families that are there.
    pub(crate) fn open(config: &StoreConfig, existing: &[String]) -> Result<Self, rocksdb::Error> {
        let cache = Cache::new_lru_cache(config.block_cache_bytes);
        let options = database_options(config);
        let ours =
            Cf::ALL.map(|cf| ColumnFamilyDescriptor::new(cf.name(), table(config, cf, &cache)));
        // What a later version has added has to be opened too, or its version cannot be read.
        let others = existing.iter().filter(|name| {
            *name != "default" && Cf::ALL.iter().all(|cf| cf.name() != name.as_str())
        });
        let others = others.map(|name| ColumnFamilyDescriptor::new(name, Options::default()));
        let all = ours.into_iter().chain(others).collect::<Vec<_>>();
        let db = DB::open_cf_descriptors(&options, &config.path, all)?;
        Ok(Self {
            inner: RwLock::new(Some(db)),
            #[cfg(test)]
            options,
        })
    }

    /// Runs an operation on the open database. Not to be nested.
    pub(crate) fn with<R>(
        &self,
        operation: impl FnOnce(&Open<'_>) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let inner = self.inner.read();
        let db = inner.as_ref().ok_or(StoreError::Closed)?;
        operation(&Open { db })
    }

    /// Stops compactions, waits for operations under way, writes the log out and closes.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        let flushed = self.with(|open| {
            open.db.cancel_all_background_work(false);
            open.db
                .flush_wal(true)
                .map_err(|e| StoreError::database("sync its log", &e))
        });
        let db = self.inner.write().take();
        drop(db);
        flushed
    }

    /// RocksDB's own count of log syncs.
    #[cfg(test)]
    pub(crate) fn wal_files_synced(&self) -> u64 {
        self.options
            .get_ticker_count(rocksdb::statistics::Ticker::WalFileSynced)
    }
}

impl<'a> Open<'a> {
    pub(crate) fn cf(&self, cf: Cf) -> Result<&'a ColumnFamily, StoreError> {
        self.db.cf_handle(cf.name()).ok_or(StoreError::Record {
            what: "column families",
        })
    }

    pub(crate) fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.db.get_cf(self.cf(cf)?, key);
        found.map_err(|e| StoreError::database("read a value", &e))
    }

    pub(crate) fn exists(&self, cf: Cf, key: &[u8]) -> Result<bool, StoreError> {
        let found = self.db.get_pinned_cf(self.cf(cf)?, key);
        Ok(found
            .map_err(|e| StoreError::database("read a value", &e))?
            .is_some())
    }

    /// All pairs (key, value) of a small column family whose keys begin with `prefix`, in order.
    #[expect(clippy::type_complexity, reason = "pairs of key and value")]
    pub(crate) fn scan(
        &self,
        cf: Cf,
        prefix: &[u8],
    ) -> Result<Vec<(Box<[u8]>, Box<[u8]>)>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_range(rocksdb::PrefixRange(prefix));
        let mode = rocksdb::IteratorMode::Start;
        let pairs = self.db.iterator_cf_opt(self.cf(cf)?, options, mode);
        let pairs = pairs.collect::<Result<Vec<_>, _>>();
        pairs.map_err(|e| StoreError::database("read values", &e))
    }

    pub(crate) fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        let written = self.db.write_opt(batch, &options);
        written.map_err(|e| StoreError::CommitFailed {
            reason: e.to_string(),
        })
    }

    /// Gives the files of deleted entries back when that is worth it. Takes seconds for a
    /// large backlog; for the maintenance thread only. Whether it was worth it.
    ///
    /// `whole_files` drops files in the range unread, which is quick but also drops deletions
    /// that older files at its edge still need: an entry there may exist again. Only below a mark
    /// does nobody ask whether an entry exists.
    pub(crate) fn compact_entries(
        &self,
        number: u32,
        offsets: &std::ops::Range<u64>,
        whole_files: bool,
    ) -> Result<bool, StoreError> {
        let (from, to) = entry_range(number, offsets);
        let queues = self.cf(Cf::Queues)?;
        if self.file_bytes(queues, &from, &to) < COMPACT_BYTES {
            return Ok(false);
        }
        if whole_files {
            let (_, last) = entry_range(number, &(offsets.start..offsets.end.saturating_sub(1)));
            self.db
                .delete_file_in_range_cf(queues, from, last)
                .map_err(|e| StoreError::database("delete files", &e))?;
        }
        self.compact(queues, &from, &to);
        Ok(true)
    }

    /// The same for shared messages; some in the range may be alive.
    pub(crate) fn compact_messages(&self, ids: &std::ops::Range<u64>) -> Result<bool, StoreError> {
        let (from, to) = (ids.start.to_be_bytes(), ids.end.to_be_bytes());
        let messages = self.cf(Cf::Messages)?;
        if self.file_bytes(messages, &from, &to) < COMPACT_BYTES {
            return Ok(false);
        }
        self.compact(messages, &from, &to);
        Ok(true)
    }

    fn file_bytes(&self, cf: &ColumnFamily, from: &[u8], to: &[u8]) -> u64 {
        self.db
            .get_approximate_sizes_cf(cf, &[Range::new(from, to)])
            .iter()
            .sum()
    }

    fn compact(&self, cf: &ColumnFamily, from: &[u8], to: &[u8]) {
        let mut options = CompactOptions::default();
        // Otherwise ordinary compactions stop meanwhile, and with them, in time, the writer.
        options.set_exclusive_manual_compaction(false);
        self.db
            .compact_range_cf_opt(cf, Some(from), Some(to), &options);
    }
}

fn database_options(config: &StoreConfig) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_db_write_buffer_size(config.memtable_bytes);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_file_opening_threads(2);
    options.set_max_background_jobs(2);
    options.set_compaction_readahead_size(COMPACTION_READAHEAD_BYTES);
    options.set_allow_mmap_reads(false);
    options.set_allow_mmap_writes(false);
    // One writer: nothing to share a memtable insert or a write group with.
    options.set_allow_concurrent_memtable_write(false);
    options.set_enable_write_thread_adaptive_yield(false);
    options.set_skip_stats_update_on_db_open(true);
    options.set_log_level(LogLevel::Error);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1024 * 1024);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    if config.statistics {
        options.enable_statistics();
    }
    options
}

fn table(config: &StoreConfig, cf: Cf, cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_size(BLOCK_BYTES);
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    // Two of the large kind fill the budget of all write buffers, one being flushed.
    let buffer = match cf {
        Cf::Queues | Cf::Messages => config.memtable_bytes / 2,
        _ => config.memtable_bytes / 8,
    };
    options.set_write_buffer_size(buffer.max(64 * 1024));
    options.set_max_write_buffer_number(2);
    options.set_target_file_size_base(FILE_BYTES);
    options.set_compression_per_level(&[
        DBCompressionType::None,
        DBCompressionType::None,
        DBCompressionType::Lz4,
        DBCompressionType::Lz4,
        DBCompressionType::Lz4,
        DBCompressionType::Lz4,
        DBCompressionType::Lz4,
    ]);
    options
}
