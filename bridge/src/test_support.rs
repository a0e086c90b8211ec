//! A store in a folder of its own, a runtime whose clock moves only by hand, and a broker that writes
//! down what it hears.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use edgehub_proto::{
    clock::ManualClock,
    hub::{CloudToDevice, Downstream, MethodCall},
    identity::Identity,
    message::Message,
    stored,
};
use edgehub_storage::{
    Append, AppendBatch, CommitProgress, CommitTicket, ConnectionStringWrap, Queue, QueueId, Store,
    StoreConfig, Target,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

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

/// Something that came from upstream.
#[derive(Debug)]
pub(crate) enum Heard {
    CloudToDevice(CloudToDevice),
    Desired(Bytes),
    Established,
    Method(MethodCall),
}

/// A broker that writes down what it hears, for whom, in order.
#[derive(Debug, Default)]
pub(crate) struct FakeDownstream {
    heard: Mutex<VecDeque<(Identity, Heard)>>,
    notify: Notify,
}

impl FakeDownstream {
    fn push(&self, identity: &Identity, heard: Heard) {
        self.heard.lock().push_back((identity.clone(), heard));
        self.notify.notify_one();
    }

    /// Takes what was heard so far.
    pub(crate) fn take(&self) -> VecDeque<(Identity, Heard)> {
        std::mem::take(&mut *self.heard.lock())
    }

    /// The next thing that is heard.
    pub(crate) async fn next(&self) -> (Identity, Heard) {
        loop {
            let notified = self.notify.notified();
            if let Some(next) = self.heard.lock().pop_front() {
                return next;
            }
            notified.await;
        }
    }

    pub(crate) async fn established(&self) -> Identity {
        match self.next().await {
            (identity, Heard::Established) => identity,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn method(&self) -> MethodCall {
        match self.next().await {
            (_, Heard::Method(call)) => call,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn desired(&self) -> Bytes {
        match self.next().await {
            (_, Heard::Desired(patch)) => patch,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn message(&self) -> CloudToDevice {
        match self.next().await {
            (_, Heard::CloudToDevice(message)) => message,
            other => panic!("{other:?}"),
        }
    }
}

impl Downstream for FakeDownstream {
    fn desired(&self, identity: &Identity, patch: Bytes) {
        self.push(identity, Heard::Desired(patch));
    }

    fn method(&self, identity: &Identity, call: MethodCall) {
        self.push(identity, Heard::Method(call));
    }

    fn cloud_to_device(&self, identity: &Identity, message: CloudToDevice) {
        self.push(identity, Heard::CloudToDevice(message));
    }

    fn established(&self, identity: &Identity) {
        self.push(identity, Heard::Established);
    }
}

/// A TLS configuration that trusts nobody.
pub(crate) fn no_tls() -> Arc<tokio_rustls::rustls::ClientConfig> {
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = tokio_rustls::rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(tokio_rustls::rustls::RootCertStore::empty())
        .with_no_client_auth();
    Arc::new(config)
}
