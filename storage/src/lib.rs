//! What lasts: the RocksDB store with one writer thread and group commit.
//!
//! [`Store`] takes batches of messages for queues and values for columns; one OS thread owns all
//! writes and commits everything that waits as one batch ([`CommitProgress`] tells each
//! connection, once per commit). [`Queue`] is read from memory near its end and from RocksDB
//! behind, and settled in any order. Not here: what is in a message, who may send it, where it
//! goes, and when: time is a `Clock` that is passed in.
//!
//! # Invariants
//! - Nothing is reported as committed before it is: a connection's progress moves only after the
//!   batch with its messages is in RocksDB's log (fsynced with [`SyncMode::Disk`]).
//! - A message is stored for all its queues or for none.
//! - An entry is unsettled until [`Queue::settle`] names it, whatever crashes meanwhile; counts
//!   always equal what a scan would find.
//! - Memory does not depend on the backlog: every buffer here has a limit (`StoreConfig`,
//!   [`limits`]).
//!
//! Where it comes from: design.md sections 3 to 5; numbers: stack-measurements 1 section 5.

#![deny(missing_docs)]

#[cfg(all(feature = "faults", not(debug_assertions)))]
compile_error!("the feature `faults` is for tests: a release build must not have it");

pub mod limits;

mod append;
mod config;
mod db;
mod error;
#[cfg(feature = "faults")]
mod faults;
mod intake;
mod kv;
mod layout;
mod open;
mod queue;
mod read;
mod seal;
mod settle;
mod stats;
mod store;
mod tail;
#[cfg(test)]
mod tests;
mod writer;

pub use append::{Append, AppendBatch, CommitProgress, CommitTicket, Target};
pub use config::{StoreConfig, SyncMode};
pub use error::{StoreClosed, StoreError, TryAppendError, WrapError};
#[cfg(feature = "faults")]
pub use faults::CommitFaults;
pub use kv::{Column, KvOp};
pub use open::{MovedAside, Opened};
pub use queue::{
    DEFAULT_PRIORITY, Entry, Outcome, Queue, QueueId, ReadBatch, ReadLimit, SenderFilter, Settled,
    UPSTREAM_ENDPOINT,
};
pub use seal::{ConnectionStringWrap, KeyWrap};
pub use stats::{QueueStats, StoreStats};
pub use store::Store;
