//! Answers to SUBSCRIBE and UNSUBSCRIBE while the disk is stuck (spec/mqtt.md 6, 7).

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::clock::ManualClock;
use edgehub_proto::identity::Identity;
use edgehub_storage::{ConnectionStringWrap, Store, StoreConfig};
use mqttbytes::v4::Packet;
use ntex_bytes::ByteString;
use ntex_mqtt::QoS;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::limits::{SESSION_ANSWERS_MAX, SESSION_FILTERS_MAX, SESSION_WRITE_MAX};
use super::subscriber::Subscriber;
use super::test_packets::Peer;
use crate::session::{Session, SessionStore, StoredSubscription};

struct Stuck {
    store: Store,
    subscriber: Subscriber,
    peer: Peer,
    _folder: TempDir,
}

impl Stuck {
    /// A session that lasts, in a store that commits nothing.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig::new(folder.path().join("edgeHub"));
        let wrap = Arc::new(ConnectionStringWrap::new(b"a key of a test"));
        let store = Store::open(config, Arc::new(ManualClock::new(1)), wrap)
            .unwrap()
            .store;
        store.faults().hold(true);
        let sessions =
            SessionStore::new(store.clone(), TaskTracker::new(), CancellationToken::new());
        let identity = Identity::parse("d/m").unwrap();
        Self {
            store,
            subscriber: Subscriber::new(identity, Some(sessions), None),
            peer: Peer::connected(60),
            _folder: folder,
        }
    }

    fn subscribe(&mut self, id: u16, filter: &str, live: bool) {
        let filters = [(ByteString::from(filter), QoS::AtLeastOnce)];
        self.subscriber
            .subscribe(NonZeroU16::new(id).unwrap(), &filters, live);
    }

    /// Packet ids of the answers that left, and whether the hub has to hear of a change.
    fn release(&mut self) -> (Vec<u16>, bool) {
        let changed = self.subscriber.release(&mut self.peer.machine);
        let id = |packet| match packet {
            Packet::SubAck(ack) => ack.pkid,
            Packet::UnsubAck(ack) => ack.pkid,
            other => panic!("{other:?}"),
        };
        (self.peer.answers().into_iter().map(id).collect(), changed)
    }

    async fn close(self) {
        self.store.close().await.unwrap();
    }
}

fn input(number: usize) -> String {
    format!("devices/d/modules/m/inputs/in{number}/#")
}

#[tokio::test(start_paused = true)]
async fn an_answer_waits_for_a_stuck_disk_for_its_limit_and_no_longer() {
    let mut stuck = Stuck::new();
    stuck.subscribe(1, &input(1), true);
    stuck.subscriber.unsubscribe(
        NonZeroU16::new(2).unwrap(),
        &[ByteString::from(input(1))],
        true,
    );
    assert_eq!(stuck.release(), (vec![], false));
    let begin = tokio::time::Instant::now();
    stuck.subscriber.due().await;
    assert!(begin.elapsed() >= SESSION_WRITE_MAX);
    assert!(begin.elapsed() < SESSION_WRITE_MAX + Duration::from_millis(10));
    assert_eq!(stuck.release(), (vec![1], true));
    stuck.subscriber.due().await;
    assert_eq!(stuck.release(), (vec![2], true));
    assert!(begin.elapsed() < SESSION_WRITE_MAX + Duration::from_millis(10));
    stuck.close().await;
}

#[tokio::test]
async fn what_changes_nothing_waits_for_nothing_but_its_turn() {
    let mut stuck = Stuck::new();
    stuck.subscribe(1, "foo/bar", true);
    assert_eq!(stuck.release(), (vec![1], false), "refused");
    stuck.subscribe(2, &input(1), true);
    stuck.subscribe(3, &input(1), true);
    assert_eq!(stuck.release(), (vec![], false), "answers keep their order");
    stuck.store.faults().hold(false);
    stuck.subscriber.due().await;
    assert_eq!(stuck.release(), (vec![2, 3], true));
    // Taken over: the session is the successor's.
    stuck.store.faults().hold(true);
    stuck.subscribe(4, &input(2), false);
    assert_eq!(stuck.release(), (vec![4], true));
    stuck.close().await;
}

#[tokio::test]
async fn the_number_of_waiting_answers_is_bounded() {
    let mut stuck = Stuck::new();
    for id in 1..=SESSION_ANSWERS_MAX as u16 {
        stuck.subscribe(id, &input(usize::from(id)), true);
    }
    assert_eq!(stuck.release(), (vec![], false));
    let next = SESSION_ANSWERS_MAX as u16 + 1;
    stuck.subscribe(next, &input(usize::from(next)), true);
    assert_eq!(stuck.release(), (vec![1], true));
    stuck.close().await;
}

#[tokio::test]
async fn filters_beyond_the_limit_of_a_session_are_refused_one_by_one() {
    let mut stuck = Stuck::new();
    let filters: Vec<_> = (0..SESSION_FILTERS_MAX + 2)
        .map(|number| (ByteString::from(input(number)), QoS::AtLeastOnce))
        .collect();
    stuck.subscriber.subscribe(NonZeroU16::MIN, &filters, false);
    stuck.subscriber.release(&mut stuck.peer.machine);
    let answers = stuck.peer.answers();
    let [Packet::SubAck(ack)] = &answers[..] else {
        panic!("{answers:?}")
    };
    let refused = mqttbytes::v4::SubscribeReasonCode::Failure;
    let granted = ack.return_codes.iter().filter(|code| **code != refused);
    assert_eq!(granted.count(), SESSION_FILTERS_MAX);
    assert_eq!(ack.return_codes[SESSION_FILTERS_MAX..], [refused, refused]);
    stuck.close().await;
}

#[tokio::test]
async fn of_a_stored_session_only_what_may_be_granted_comes_back() {
    let stored = |filter: &str| StoredSubscription {
        filter: filter.to_owned(),
        qos: 1,
    };
    let session = Session {
        subscriptions: vec![stored(&input(1)), stored("devices/other/#")],
    };
    let identity = Identity::parse("d/m").unwrap();
    let subscriber = Subscriber::new(identity, None, Some(&session));
    let filters: Vec<_> = subscriber.subscriptions().filters().collect();
    assert_eq!(filters, [input(1)]);
    assert!(subscriber.features().inputs);
}
