//! Pumps on a real store, with clients that are lists.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::clock::{Clock, SystemClock};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;
use edgehub_proto::stored;
use edgehub_storage::{
    Append, AppendBatch, CommitProgress, CommitTicket, ConnectionStringWrap, Queue, QueueId, Store,
    StoreConfig, Target,
};
use parking_lot::Mutex;
use smallvec::smallvec;
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Deliveries, DeliveryParts};
use crate::hub::{Delivery, DeliveryToken, Features, OfferError, Outlet, Settlement, ToClient};
use crate::routing::InputQueue;
use crate::test_support::id;

const PATIENCE: Duration = Duration::from_secs(20);

/// Connected modules and what each one got.
#[derive(Debug, Default)]
struct Clients {
    state: Mutex<HashMap<Identity, Client>>,
    changed: Notify,
}

#[derive(Debug)]
struct Client {
    answer: Result<(), OfferError>,
    offers: usize,
    got: Vec<Delivery>,
}

impl Clients {
    fn answer(&self, client: &str, answer: Result<(), OfferError>) {
        let mut state = self.state.lock();
        let client = state.entry(id(client)).or_insert_with(|| Client {
            answer,
            offers: 0,
            got: Vec::new(),
        });
        client.answer = answer;
    }

    fn take(&self, client: &str) -> Vec<Delivery> {
        let mut state = self.state.lock();
        let client = state.get_mut(&id(client));
        client.map_or_else(Vec::new, |client| std::mem::take(&mut client.got))
    }

    fn offers(&self, client: &str) -> usize {
        self.state.lock().get(&id(client)).map_or(0, |c| c.offers)
    }

    /// Waits until a client was offered something so often.
    async fn offered(&self, client: &str, count: usize) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if self.offers(client) >= count {
                    return;
                }
                changed.await;
            }
        };
        timeout(PATIENCE, wait).await.expect("an offer");
    }

    /// Waits for so many deliveries and takes them.
    async fn got(&self, client: &str, count: usize) -> Vec<Delivery> {
        let mut got = Vec::new();
        let wait = async {
            loop {
                let changed = self.changed.notified();
                got.extend(self.take(client));
                if got.len() >= count {
                    return;
                }
                changed.await;
            }
        };
        let in_time = timeout(PATIENCE, wait).await;
        assert!(in_time.is_ok(), "{count} deliveries, got {}", got.len());
        assert_eq!(got.len(), count);
        got
    }
}

impl Outlet for Clients {
    fn offer(&self, to: &Identity, event: ToClient) -> Result<(), OfferError> {
        let ToClient::Inputs(batch) = event else {
            panic!("{event:?}");
        };
        let mut state = self.state.lock();
        let client = state.get_mut(to).ok_or(OfferError::NotConnected)?;
        client.offers += 1;
        if client.answer.is_ok() {
            client.got.extend(batch);
        }
        let answer = client.answer;
        drop(state);
        self.changed.notify_waiters();
        answer
    }

    fn features(&self, _of: &Identity) -> Option<Features> {
        None
    }
}

/// One run of a hub on a store.
struct Run {
    store: Store,
    clients: Arc<Clients>,
    deliveries: Arc<Deliveries>,
    tasks: TaskTracker,
    stop: CancellationToken,
    progress: Arc<CommitProgress>,
    sequence: u64,
}

const MODULE: &str = "edge1/modA";

impl Run {
    fn begin(folder: &Path, window: usize) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let wrap = Arc::new(ConnectionStringWrap::new(b"a key of a test"));
        let config = StoreConfig::new(folder.join("edgeHub"));
        let store = Store::open(config, Arc::clone(&clock), wrap).unwrap().store;
        let clients = Arc::new(Clients::default());
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let deliveries = Deliveries::new(DeliveryParts {
            own_device: id("edge1"),
            window,
            outlet: Arc::clone(&clients) as _,
            store: store.clone(),
            clock,
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        Self {
            store,
            clients,
            deliveries,
            tasks,
            stop,
            progress: CommitProgress::new(),
            sequence: 0,
        }
    }

    fn queue(&self, input: &str, priority: u32) -> Queue {
        let id = QueueId {
            endpoint: format!("{MODULE}/{input}"),
            priority,
        };
        self.store.queue(&id).unwrap()
    }

    /// Puts queues of `edge1/modA` into force, each named by its input.
    fn set_queues(&self, queues: &[&Queue]) {
        let input = |queue: &&Queue| InputQueue {
            module: "modA".to_owned(),
            input: queue.id().endpoint.rsplit('/').next().unwrap().to_owned(),
            queue: (*queue).clone(),
        };
        self.deliveries.set_queues(queues.iter().map(input));
    }

    async fn append(&mut self, queue: &Queue, bodies: impl IntoIterator<Item = String>) {
        self.append_until(queue, bodies, None).await;
    }

    async fn append_until(
        &mut self,
        queue: &Queue,
        bodies: impl IntoIterator<Item = String>,
        expires_at_ms: Option<u64>,
    ) {
        let append = |body: String| Append {
            sender: id("leaf0"),
            message: stored::encode_message(&Message {
                body: body.into(),
                ..Message::default()
            }),
            enqueued_ms: 0,
            targets: smallvec![Target {
                queue: queue.clone(),
                expires_at_ms,
            }],
        };
        let appends: Vec<_> = bodies.into_iter().map(append).collect();
        self.sequence += appends.len() as u64;
        let ticket = CommitTicket {
            progress: Arc::clone(&self.progress),
            sequence: self.sequence,
        };
        let batch = AppendBatch { appends, ticket };
        self.store.append(batch).await.unwrap();
        while self.progress.committed() < self.sequence {
            self.progress.changed().await;
        }
    }

    fn connect(&self, clean: bool) {
        self.clients.answer(MODULE, Ok(()));
        self.deliveries.connected(&id(MODULE), clean);
        self.deliveries.subscribed(&id(MODULE));
    }

    fn disconnect(&self) {
        self.clients.answer(MODULE, Err(OfferError::NotConnected));
        self.deliveries.disconnected(&id(MODULE));
        self.clients.take(MODULE);
    }

    fn settle(&self, deliveries: &[Delivery], settlement: Settlement) {
        let settled: Vec<_> = deliveries.iter().map(|d| (d.token, settlement)).collect();
        self.deliveries.settled(&id(MODULE), &settled);
    }

    /// Waits until so many messages are left in a queue.
    async fn left(&self, queue: &Queue, count: u64) {
        let wait = async {
            while queue.length() != count {
                self.store.flush().await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let in_time = timeout(PATIENCE, wait).await;
        assert!(in_time.is_ok(), "{} are left", queue.length());
        // Counters follow a moment later, before the commit is reported.
        self.store.flush().await.unwrap();
    }

    /// Stops as a hub stops.
    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.store.close().await.unwrap();
    }
}

fn texts(deliveries: &[Delivery]) -> Vec<String> {
    let text = |delivery: &Delivery| {
        let body = std::str::from_utf8(&delivery.message.body).unwrap();
        let mark = if delivery.redelivered { "+" } else { "" };
        format!("{}{mark} {body}", delivery.input)
    };
    deliveries.iter().map(text).collect()
}

fn numbers(range: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    range.map(|number| number.to_string())
}

#[tokio::test]
async fn a_backlog_flows_in_order_within_the_window_and_is_settled() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 16);
    let queue = run.queue("in1", 7);
    run.set_queues(&[&queue]);
    run.append(&queue, numbers(0..3_000)).await;
    run.connect(false);
    let first = run.clients.got(MODULE, 16).await;
    assert_eq!(first[0].sender, id("leaf0"));
    let mut next = 0;
    let mut out = first;
    while !out.is_empty() {
        for delivery in &out {
            assert_eq!(delivery.message.body, next.to_string().as_bytes());
            next += 1;
        }
        run.settle(&out, Settlement::Done);
        let more = (3_000 - next).min(16);
        out = run.clients.got(MODULE, more).await;
    }
    run.left(&queue, 0).await;
    assert_eq!(queue.stats().settled, 3_000);
    run.end().await;
}

#[tokio::test]
async fn a_message_wakes_its_module_and_nothing_else_does() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 2);
    let queue = run.queue("in1", 7);
    run.set_queues(&[&queue]);
    run.connect(false);
    let mut out = Vec::new();
    for body in ["a", "b"] {
        run.append(&queue, [body.to_owned()]).await;
        let got = run.clients.got(MODULE, 1).await;
        assert_eq!(texts(&got), [format!("in1 {body}")]);
        out.extend(got);
    }
    // The window is full: what is stored now concerns nobody.
    let reads = || {
        let stats = run.store.stats();
        stats.tail_reads + stats.cold_reads
    };
    let before = reads();
    let store = run.store.clone();
    for body in numbers(0..50) {
        run.append(&queue, [body]).await;
        store.flush().await.unwrap();
    }
    let stats = run.store.stats();
    assert!(
        stats.tail_reads + stats.cold_reads <= before + 1,
        "{stats:?}"
    );
    assert_eq!(run.clients.offers(MODULE), 2);
    run.settle(&out[..1], Settlement::Done);
    assert_eq!(texts(&run.clients.got(MODULE, 1).await), ["in1 0"]);
    run.end().await;
}

#[tokio::test]
async fn a_reconnect_gets_what_was_not_acknowledged_in_order_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 4);
    let queue = run.queue("in1", 7);
    run.set_queues(&[&queue]);
    run.append(&queue, numbers(0..6)).await;
    run.connect(false);
    let out = run.clients.got(MODULE, 4).await;
    // Acknowledged and gone in one moment, before the store has committed it.
    run.settle(&out[1..2], Settlement::Done);
    run.disconnect();
    run.connect(false);
    let out = run.clients.got(MODULE, 4).await;
    assert_eq!(texts(&out), ["in1+ 0", "in1+ 2", "in1+ 3", "in1 4"]);
    // A take-over: the older connection's end is not told.
    run.connect(false);
    let again = run.clients.got(MODULE, 4).await;
    assert_eq!(texts(&again), ["in1+ 0", "in1+ 2", "in1+ 3", "in1+ 4"]);
    let tokens = |deliveries: &[Delivery]| -> Vec<DeliveryToken> {
        deliveries.iter().map(|delivery| delivery.token).collect()
    };
    assert_eq!(tokens(&again), tokens(&out));
    run.settle(&again, Settlement::Done);
    run.left(&queue, 1).await;
    run.end().await;
}

#[tokio::test]
async fn after_a_restart_the_same_comes_again_under_the_same_tokens() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 16);
    // In another order than by name: the slots are those of the first use.
    let (b, a) = (run.queue("b", 7), run.queue("a", 7));
    run.set_queues(&[&b]);
    run.connect(false);
    run.append(&b, numbers(0..3)).await;
    let first = run.clients.got(MODULE, 3).await;
    run.set_queues(&[&b, &a]);
    run.append(&a, numbers(0..2)).await;
    let second = run.clients.got(MODULE, 2).await;
    run.settle(&first[..1], Settlement::Done);
    run.end().await;

    let mut run = Run::begin(folder.path(), 16);
    let (b, a) = (run.queue("b", 7), run.queue("a", 7));
    assert_eq!(
        (b.length(), a.length()),
        (2, 2),
        "acknowledged before the end"
    );
    run.set_queues(&[&a, &b]);
    run.append(&b, numbers(3..4)).await;
    run.connect(false);
    let mut again = run.clients.got(MODULE, 5).await;
    again.sort_by_key(|delivery| delivery.token);
    assert_eq!(texts(&again), ["b+ 1", "b+ 2", "b 3", "a+ 0", "a+ 1"]);
    let mut expected: Vec<_> = first[1..].iter().chain(&second).collect();
    expected.sort_by_key(|delivery| delivery.token);
    let tokens: Vec<_> = again.iter().map(|delivery| delivery.token).collect();
    let expected: Vec<_> = expected.iter().map(|delivery| delivery.token).collect();
    assert_eq!(
        (&tokens[..2], &tokens[3..]),
        (&expected[..2], &expected[2..])
    );
    run.end().await;
}

#[tokio::test]
async fn priorities_are_strict_and_queues_come_and_go() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 1);
    let (low, high) = (run.queue("in1", 9), run.queue("in1", 0));
    run.set_queues(&[&low]);
    run.append(&low, numbers(0..3)).await;
    run.connect(false);
    let out = run.clients.got(MODULE, 1).await;
    assert_eq!(texts(&out), ["in1 0"]);
    run.append(&high, ["urgent".to_owned()]).await;
    run.set_queues(&[&high, &low]);
    run.settle(&out, Settlement::Done);
    let out = run.clients.got(MODULE, 1).await;
    assert_eq!(texts(&out), ["in1 urgent"]);
    run.settle(&out, Settlement::Done);
    let out = run.clients.got(MODULE, 1).await;
    assert_eq!(texts(&out), ["in1 1"]);
    // Without its route it waits; what is out is settled nevertheless.
    run.set_queues(&[]);
    run.settle(&out, Settlement::Done);
    run.left(&low, 1).await;
    run.left(&high, 0).await;
    assert!(run.clients.take(MODULE).is_empty());
    run.set_queues(&[&low]);
    assert_eq!(texts(&run.clients.got(MODULE, 1).await), ["in1 2"]);
    run.end().await;
}

#[tokio::test]
async fn a_full_outbox_is_tried_again_and_one_without_subscription_is_not() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 16);
    let queue = run.queue("in1", 7);
    run.set_queues(&[&queue]);
    run.connect(false);
    run.clients.answer(MODULE, Err(OfferError::Full));
    run.append(&queue, numbers(0..2)).await;
    run.clients.offered(MODULE, 3).await;
    run.clients.answer(MODULE, Ok(()));
    let out = run.clients.got(MODULE, 2).await;
    assert_eq!(texts(&out), ["in1 0", "in1 1"], "it never had them");
    run.settle(&out, Settlement::Done);
    run.left(&queue, 0).await;

    run.clients.answer(MODULE, Err(OfferError::NotSubscribed));
    let offers = run.clients.offers(MODULE);
    run.append(&queue, numbers(2..3)).await;
    run.clients.offered(MODULE, offers + 1).await;
    run.append(&queue, numbers(3..4)).await;
    run.store.flush().await.unwrap();
    assert_eq!(run.clients.offers(MODULE), offers + 1);
    run.connect(false);
    assert_eq!(texts(&run.clients.got(MODULE, 2).await), ["in1 2", "in1 3"]);
    run.end().await;
}

#[tokio::test]
async fn expired_and_undeliverable_messages_leave_with_their_reason() {
    let folder = TempDir::new().unwrap();
    let mut run = Run::begin(folder.path(), 16);
    let queue = run.queue("in1", 7);
    run.set_queues(&[&queue]);
    run.append_until(&queue, numbers(0..500), Some(1)).await;
    run.append(&queue, numbers(500..502)).await;
    run.connect(false);
    let out = run.clients.got(MODULE, 2).await;
    assert_eq!(texts(&out), ["in1 500", "in1 501"]);
    run.settle(&out[..1], Settlement::Undeliverable);
    run.settle(&out[1..], Settlement::Done);
    run.left(&queue, 0).await;
    let stats = queue.stats();
    assert_eq!((stats.expired, stats.dropped, stats.settled), (500, 1, 1));
    run.end().await;
}

#[tokio::test]
async fn leaves_and_modules_of_other_devices_have_no_inputs() {
    let folder = TempDir::new().unwrap();
    let run = Run::begin(folder.path(), 16);
    for other in ["leaf0", "edge2/modA", "edge10/modA"] {
        run.deliveries.connected(&id(other), false);
        run.deliveries.subscribed(&id(other));
    }
    assert!(run.deliveries.modules.lock().is_empty());
    run.connect(false);
    assert_eq!(run.deliveries.modules.lock().len(), 1);
    run.disconnect();
    assert!(run.deliveries.modules.lock().is_empty());
    assert!(run.tasks.is_empty(), "no pump without queues");
    run.end().await;
}
