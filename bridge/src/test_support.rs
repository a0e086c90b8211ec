//! A store in a folder of its own, and a runtime whose clock moves only by hand.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use edgehub_proto::{clock::ManualClock, identity::Identity, message::Message, stored};
use edgehub_storage::{
    Append, AppendBatch, CommitProgress, CommitTicket, ConnectionStringWrap, Queue, QueueId, Store,
    StoreConfig, Target,
};

pub(crate) const UNIX_MS: u64 = 1_800_000_000_000;

pub(crate) fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

/// A store in a folder of its own.
pub(crate) struct TestStore {
    _folder: tempfile::TempDir,
    pub(crate) store: Store,
}

impl TestStore {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::new(UNIX_MS));
        let wrap = Arc::new(ConnectionStringWrap::new(b"test"));
        let config = StoreConfig::new(folder.path().join("edgeHub"));
        let store = Store::open(config, clock, wrap).unwrap().store;
        Self {
            _folder: folder,
            store,
        }
    }

    pub(crate) fn queue(&self, priority: u32) -> Queue {
        let endpoint = edgehub_storage::UPSTREAM_ENDPOINT.to_owned();
        self.store.queue(&QueueId { endpoint, priority }).unwrap()
    }

    /// Appends one message per (sender, body) and waits for the commit.
    pub(crate) async fn append(
        &self,
        queue: &Queue,
        messages: impl IntoIterator<Item = (Identity, String)>,
        ttl_ms: Option<u64>,
    ) {
        let appends: Vec<Append> = messages
            .into_iter()
            .map(|(sender, body)| {
                let message = Message {
                    body: Bytes::from(body),
                    ..Message::default()
                };
                let target = Target {
                    queue: queue.clone(),
                    expires_at_ms: ttl_ms.map(|ttl| UNIX_MS + ttl),
                };
                Append {
                    sender,
                    message: stored::encode_message(&message),
                    enqueued_ms: UNIX_MS,
                    targets: [target].into_iter().collect(),
                }
            })
            .collect();
        let progress = CommitProgress::new();
        let sequence = appends.len() as u64;
        let ticket = CommitTicket {
            progress: Arc::clone(&progress),
            sequence,
        };
        self.store
            .append(AppendBatch { appends, ticket })
            .await
            .unwrap();
        while progress.committed() < sequence {
            progress.changed().await;
        }
    }
}

/// Keeps a paused clock from jumping ahead while the runtime waits for the store's thread: the time
/// moves only by `tokio::time::advance`.
pub(crate) struct HeldClock(
    #[expect(dead_code, reason = "dropping it ends the hold")] std::sync::mpsc::Sender<()>,
);

impl HeldClock {
    pub(crate) fn new() -> Self {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || receiver.recv());
        Self(sender)
    }
}

/// Waits for something that other threads bring about, without moving the clock.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if condition() {
            return;
        }
        tokio::task::yield_now().await;
        tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(1)))
            .await
            .unwrap();
    }
    panic!("{what} did not come about");
}

/// Lets everything that is ready run.
pub(crate) async fn settle_down() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}
