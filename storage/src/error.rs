//! Why the store cannot do something.

use std::path::PathBuf;

use crate::append::AppendBatch;

/// Why an operation of the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store is closed or closing.
    #[error("the store is closed")]
    Closed,
    /// The store was written by a later version of this program and stays untouched.
    #[error(
        "the store {} has format version {found}, this program knows up to {supported}: \
         it was written by a newer version; start that version, or move the folder away", path.display()
    )]
    NewerFormat {
        /// The store's folder.
        path: PathBuf,
        /// Version that was found.
        found: u32,
        /// Newest version that this program opens.
        supported: u32,
    },
    /// Another process has the store open.
    #[error("the store {} is in use by another process", path.display())]
    Locked {
        /// The store's folder.
        path: PathBuf,
    },
    /// A folder of the store cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Folder {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The writer thread cannot be started.
    #[error("cannot start a thread of the store: {0}")]
    Thread(std::io::Error),
    /// The database refused an operation.
    #[error("the database cannot {action}: {reason}")]
    Database {
        /// What was tried.
        action: &'static str,
        /// The database's own words.
        reason: String,
    },
    /// What was read is no record of ours.
    #[error("a record of the store is damaged ({what})")]
    Record {
        /// Which record.
        what: &'static str,
    },
    /// The commit that held this write failed; nothing of it is stored.
    #[error("a commit failed: {reason}")]
    CommitFailed {
        /// The database's own words.
        reason: String,
    },
    /// A value cannot be sealed because no data key could be wrapped.
    #[error("no key to seal values with: {0}")]
    NoDataKey(#[from] WrapError),
    /// A name is empty or too long, or there are too many queues.
    #[error("a queue cannot be made: {0}")]
    Queue(&'static str),
}

impl StoreError {
    pub(crate) fn database(action: &'static str, error: &rocksdb::Error) -> Self {
        Self::Database {
            action,
            reason: error.to_string(),
        }
    }

    /// Whether the same call may succeed later without anybody's help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Database { .. } | Self::CommitFailed { .. } | Self::Locked { .. }
        )
    }
}

/// The store is closed: what was to be appended is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store is closed")]
pub struct StoreClosed;

impl From<StoreClosed> for StoreError {
    fn from(_: StoreClosed) -> Self {
        Self::Closed
    }
}

/// Why a batch was not taken at once.
#[derive(Debug, thiserror::Error)]
pub enum TryAppendError {
    /// The intake is full; the batch comes back unchanged.
    #[error("the store's intake is full")]
    Full(AppendBatch),
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
}

/// Why a data key cannot be wrapped or unwrapped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WrapError {
    /// The wrap key does not fit: what was sealed with the data key cannot be read.
    #[error("the wrap key does not fit the stored data key")]
    WrongKey,
    /// What is stored is no wrapped key.
    #[error("the stored data key is damaged")]
    Damaged,
    /// Who wraps keys cannot be reached now.
    #[error("the key service cannot be used now: {0}")]
    Unavailable(String),
}
