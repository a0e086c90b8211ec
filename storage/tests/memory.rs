//! Memory does not depend on the backlog, and a drained backlog gives its disk space back.
//!
//! A test binary of its own, because it looks at the memory of the whole process.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::clock::{Clock, SystemClock};
use edgehub_proto::identity::Identity;
use edgehub_storage::{
    Append, AppendBatch, CommitProgress, CommitTicket, ConnectionStringWrap, Outcome, Queue,
    QueueId, ReadLimit, Settled, Store, StoreConfig, Target,
};

const CONNECTIONS: u64 = 10;
const BATCH: u64 = 50;
const EARLY: u64 = 20_000;
const LATE: u64 = 200_000;
const SHARED: u64 = 150_000;
/// Acceptance 5 of the first issue.
const GROWTH_BYTES_MAX: i64 = 20_000_000;
/// While the backlog is read back and compacted away: 8 MiB of block cache fill, two compactions run.
const DRAIN_GROWTH_BYTES_MAX: i64 = 40_000_000;
const DISK_BYTES_MAX: u64 = 100_000_000;

fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib = line.split_ascii_whitespace().nth(1).unwrap();
    kib.parse::<i64>().unwrap() * 1024
}

fn disk_bytes(path: &Path) -> u64 {
    let files = std::fs::read_dir(path).unwrap();
    files
        .filter_map(|file| file.ok()?.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// 1 KiB that does not compress.
fn noise(state: &mut u64) -> Bytes {
    let mut body = Vec::with_capacity(1024);
    while body.len() < 1024 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        body.extend_from_slice(&state.to_le_bytes());
    }
    body.into()
}

struct Load {
    store: Store,
    queue: Queue,
    /// Gets the same messages, which are shared then.
    second: Option<Queue>,
    connections: Vec<(Identity, Arc<CommitProgress>, u64)>,
    noise: u64,
}

impl Load {
    /// Appends until so many entries are committed, every connection with one batch in flight.
    async fn append_until(&mut self, total: u64) {
        while self.queue.next_offset() < total {
            for (sender, progress, sequence) in &mut self.connections {
                let appends = (0..BATCH).map(|_| Append {
                    sender: sender.clone(),
                    message: noise(&mut self.noise),
                    enqueued_ms: 1,
                    targets: std::iter::once(&self.queue)
                        .chain(&self.second)
                        .map(|queue| Target {
                            queue: queue.clone(),
                            expires_at_ms: None,
                        })
                        .collect(),
                });
                *sequence += BATCH;
                let ticket = CommitTicket {
                    progress: Arc::clone(progress),
                    sequence: *sequence,
                };
                let batch = AppendBatch {
                    appends: appends.collect(),
                    ticket,
                };
                self.store.append(batch).await.unwrap();
            }
            for (_, progress, sequence) in &self.connections {
                while progress.committed() < *sequence {
                    assert!(!progress.failed());
                    progress.changed().await;
                }
            }
        }
    }

    /// Reads and settles everything, in order.
    async fn drain(&self, queue: &Queue) {
        let (mut next, mut count) = (queue.mark(), 0);
        let length = queue.length();
        while next < queue.next_offset() {
            let limit = ReadLimit {
                entries: 256,
                bytes: 1 << 18,
                scan: 256,
            };
            let batch = queue.read(next, limit, None).await.unwrap();
            next = batch.next;
            count += batch.entries.len();
            let settled = batch.entries.iter().map(|entry| Settled {
                offset: entry.offset,
                shared: entry.shared,
                outcome: Outcome::Done,
            });
            queue.settle(settled.collect()).await.unwrap();
        }
        self.store.flush().await.unwrap();
        assert_eq!((count as u64, queue.length()), (length, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_flat_and_disk_space_comes_back() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let clock = Arc::new(SystemClock::new());
    let started = clock.instant();
    let wrap = Arc::new(ConnectionStringWrap::new(b"key"));
    let opened = Store::open(StoreConfig::new(&path), Arc::clone(&clock) as _, wrap).unwrap();
    let store = opened.store;
    let queue = store
        .queue(&QueueId {
            endpoint: "iothub".into(),
            priority: 0,
        })
        .unwrap();
    let connections = (0..CONNECTIONS).map(|n| {
        (
            Identity::parse(&format!("leaf{n}")).unwrap(),
            CommitProgress::new(),
            0,
        )
    });
    let connections = connections.collect();
    let mut load = Load {
        store,
        queue,
        second: None,
        connections,
        noise: 88_172_645_463_325_252,
    };
    let idle = resident_bytes();
    load.append_until(EARLY).await;
    let early = resident_bytes();
    load.append_until(LATE).await;
    let late = resident_bytes();
    println!(
        "{:?}: idle {idle}, early {early}, late {late}",
        started.elapsed()
    );
    assert!(disk_bytes(&path) > 200_000_000);
    load.drain(&load.queue).await;
    let drained = resident_bytes();
    println!(
        "{:?}: drained {drained}, disk {}",
        started.elapsed(),
        disk_bytes(&path)
    );
    assert!(
        late - early < GROWTH_BYTES_MAX,
        "{early} bytes grew to {late}"
    );
    assert!(
        drained - early < DRAIN_GROWTH_BYTES_MAX,
        "{early} bytes grew to {drained}"
    );

    until_small(&path, clock.as_ref()).await;
    println!(
        "{:?}: disk {}, {:?}",
        started.elapsed(),
        disk_bytes(&path),
        load.store.stats()
    );
    // The same for messages that two queues share.
    let second = load
        .store
        .queue(&QueueId {
            endpoint: "a/b/c".into(),
            priority: 0,
        })
        .unwrap();
    load.second = Some(second.clone());
    load.append_until(LATE + SHARED).await;
    assert!(disk_bytes(&path) > SHARED * 1_024);
    load.drain(&load.queue).await;
    load.drain(&second).await;
    until_small(&path, clock.as_ref()).await;
    println!(
        "{:?}: disk {}, {:?}",
        started.elapsed(),
        disk_bytes(&path),
        load.store.stats()
    );
    load.store.close().await.unwrap();
}

/// Files go in the background.
async fn until_small(path: &Path, clock: &SystemClock) {
    let waiting = clock.instant();
    while disk_bytes(path) > DISK_BYTES_MAX {
        assert!(
            waiting.elapsed() < Duration::from_secs(60),
            "{} bytes on disk",
            disk_bytes(path)
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
