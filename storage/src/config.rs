//! How a store is opened and how much memory it may use.

use std::path::PathBuf;

/// When a commit counts as durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncMode {
    /// Survives the process: the operating system has the data. `StorageSync=os`.
    #[default]
    Os,
    /// Survives a power loss: each commit is one fsync of the log. `StorageSync=disk`.
    Disk,
}

/// Place and limits of a store. [`StoreConfig::new`] has the defaults.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoreConfig {
    /// The store's own folder, `<StorageFolder>/edgeHub`; made with mode 0700.
    pub path: PathBuf,
    /// When a commit counts as durable.
    pub sync: SyncMode,
    /// Bytes of RocksDB's write buffers, all column families together. Default 16 MiB.
    pub memtable_bytes: usize,
    /// Bytes of RocksDB's block cache, with index blocks. Default 8 MiB.
    pub block_cache_bytes: usize,
    /// Bytes of the newest messages kept in memory for readers, all queues together.
    /// Default 4 MiB.
    pub tail_bytes: usize,
    /// Bytes of appends that wait for the writer; beyond it [`crate::Store::append`] waits.
    /// Default 16 MiB.
    pub intake_bytes: usize,
    /// Bytes of messages in one commit; a single larger batch still goes, alone.
    /// Default 1 MiB.
    pub group_bytes: usize,
    /// Messages in one commit; a single larger batch still goes, alone. Default 1,024.
    pub group_appends: usize,
    /// RocksDB's own counters; they cost CPU, so only tests turn them on.
    pub(crate) statistics: bool,
}

impl StoreConfig {
    /// The defaults, in the folder `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            sync: SyncMode::Os,
            memtable_bytes: 16 * 1024 * 1024,
            block_cache_bytes: 8 * 1024 * 1024,
            tail_bytes: 4 * 1024 * 1024,
            intake_bytes: 16 * 1024 * 1024,
            group_bytes: 1024 * 1024,
            group_appends: 1_024,
            statistics: false,
        }
    }
}
