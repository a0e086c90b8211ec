//! Tests of the whole store.

mod commit;
mod expiry;
#[cfg(feature = "faults")]
mod faults;
mod model;
mod opening;
mod queues;
mod sealing;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_proto::clock::{Clock, ManualClock};
use edgehub_proto::identity::Identity;
use tempfile::TempDir;

use crate::{
    Append, AppendBatch, CommitProgress, CommitTicket, ConnectionStringWrap, Entry, Opened,
    Outcome, Queue, QueueId, ReadLimit, Settled, Store, StoreConfig, StoreError, Target,
};

/// 2026-08-21 10:00:05.120 UTC.
const NOW_MS: u64 = 1_787_306_405_120;

const EVERYTHING: ReadLimit = ReadLimit {
    entries: usize::MAX,
    bytes: usize::MAX,
    scan: usize::MAX,
};

fn try_open(config: StoreConfig) -> Result<Opened, StoreError> {
    let clock = Arc::new(ManualClock::new(NOW_MS));
    Store::open(config, clock, Arc::new(ConnectionStringWrap::new(b"key")))
}

fn open_at(path: &Path) -> Store {
    let opened = try_open(StoreConfig::new(path)).unwrap();
    assert_eq!((opened.moved_aside, opened.seal_problem), (None, None));
    opened.store
}

/// A fresh store and its folder, which goes with the first value.
fn fresh() -> (TempDir, Store) {
    let dir = TempDir::new().unwrap();
    let store = open_at(&dir.path().join("edgeHub"));
    (dir, store)
}

fn queue(store: &Store, endpoint: &str) -> Queue {
    store
        .queue(&QueueId {
            endpoint: endpoint.to_owned(),
            priority: 7,
        })
        .unwrap()
}

fn message(sender: &str, body: &str, targets: &[(&Queue, Option<u64>)]) -> Append {
    Append {
        sender: Identity::parse(sender).unwrap(),
        message: Bytes::copy_from_slice(body.as_bytes()),
        enqueued_ms: ManualClock::new(NOW_MS).unix_ms(),
        targets: targets
            .iter()
            .map(|(queue, expires_at_ms)| Target {
                queue: (*queue).clone(),
                expires_at_ms: *expires_at_ms,
            })
            .collect(),
    }
}

/// A connection: hands over batches and waits for their commits.
struct Sender {
    progress: Arc<CommitProgress>,
    sequence: u64,
}

impl Sender {
    fn new() -> Self {
        Self {
            progress: CommitProgress::new(),
            sequence: 0,
        }
    }

    fn batch(&mut self, appends: Vec<Append>) -> AppendBatch {
        self.sequence += appends.len() as u64;
        let ticket = CommitTicket {
            progress: Arc::clone(&self.progress),
            sequence: self.sequence,
        };
        AppendBatch { appends, ticket }
    }

    /// Whether everything is committed; false once it failed.
    async fn committed(&self) -> bool {
        while self.progress.committed() < self.sequence && !self.progress.failed() {
            self.progress.changed().await;
        }
        !self.progress.failed()
    }
}

async fn append(store: &Store, appends: Vec<Append>) {
    let mut sender = Sender::new();
    store.append(sender.batch(appends)).await.unwrap();
    assert!(sender.committed().await);
}

/// `count` messages `m<offset>` of sender `dev` for one queue.
async fn fill(store: &Store, queue: &Queue, count: u64) {
    let first = queue.next_offset();
    let appends =
        (first..first + count).map(|n| message("dev", &format!("m{n}"), &[(queue, None)]));
    append(store, appends.collect()).await;
}

/// All unsettled entries from `from` on, read in steps.
async fn read_all(queue: &Queue, from: u64) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut next = from;
    while next < queue.next_offset() {
        let batch = queue.read(next, EVERYTHING, None).await.unwrap();
        assert!(batch.next > next, "no progress at {next}");
        next = batch.next;
        entries.extend(batch.entries);
    }
    entries
}

fn offsets(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.offset).collect()
}

fn settled(entry: &Entry, outcome: Outcome) -> Settled {
    Settled {
        offset: entry.offset,
        shared: entry.shared,
        outcome,
    }
}

fn done(offset: u64) -> Settled {
    Settled {
        offset,
        shared: None,
        outcome: Outcome::Done,
    }
}
