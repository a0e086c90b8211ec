//! Sessions over restarts of the store, stuck disks and failing commits.

use edgehub_proto::clock::ManualClock;
use edgehub_storage::{ConnectionStringWrap, StoreConfig};
use tempfile::TempDir;

use super::*;

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn session(filters: &[(&str, u8)]) -> Session {
    Session {
        subscriptions: filters
            .iter()
            .map(|(filter, qos)| StoredSubscription {
                filter: (*filter).to_owned(),
                qos: *qos,
            })
            .collect(),
    }
}

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn open(&self) -> (Store, SessionStore) {
        let config = StoreConfig::new(self.folder.path().join("edgeHub"));
        let wrap = Arc::new(ConnectionStringWrap::new(b"a key of a test"));
        let clock = Arc::new(ManualClock::new(1_000));
        let store = Store::open(config, clock, wrap).unwrap().store;
        let sessions =
            SessionStore::new(store.clone(), TaskTracker::new(), CancellationToken::new());
        (store, sessions)
    }
}

#[tokio::test]
async fn a_session_is_there_after_a_restart_and_gone_when_it_was_removed() {
    let place = Place::new();
    let (store, sessions) = place.open();
    assert_eq!(sessions.load(&id("d1")).await.unwrap(), None);
    let kept = session(&[("$iothub/twin/res/#", 0), ("devices/d1/#", 1)]);
    sessions.save(&id("d1"), kept.clone()).done().await;
    sessions.save(&id("d10"), session(&[("a", 1)])).done().await;
    sessions.save(&id("d1/m"), session(&[])).done().await;
    assert_eq!(sessions.unsaved(), 0, "memory holds nothing that is saved");
    assert_eq!(sessions.load(&id("d1")).await.unwrap(), Some(kept.clone()));
    drop(sessions);
    store.close().await.unwrap();

    let (store, sessions) = place.open();
    assert_eq!(sessions.load(&id("d1")).await.unwrap(), Some(kept));
    assert_eq!(
        sessions.load(&id("d1/m")).await.unwrap(),
        Some(session(&[])),
        "a session without subscriptions is one"
    );
    sessions.remove(&id("d1")).done().await;
    assert_eq!(sessions.load(&id("d1")).await.unwrap(), None);
    drop(sessions);
    store.close().await.unwrap();

    let (store, sessions) = place.open();
    assert_eq!(sessions.load(&id("d1")).await.unwrap(), None);
    assert!(sessions.load(&id("d10")).await.unwrap().is_some());
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_sweep_removes_who_left_and_nothing_else_of_the_column() {
    let place = Place::new();
    let (store, sessions) = place.open();
    for identity in ["d1", "d2", "d2/m"] {
        sessions
            .save(&id(identity), session(&[("a", 1)]))
            .done()
            .await;
    }
    let other = KvOp::Put {
        column: Column::Sessions,
        key: b"slots/d2/m".to_vec(),
        value: vec![1],
        sealed: false,
    };
    store.write(vec![other]).await.unwrap();
    sessions
        .sweep(|identity| identity.device_id() == "d1")
        .await
        .unwrap();
    // The sweep has begun the removals: one more change of each is behind them.
    for identity in ["d2", "d2/m"] {
        assert_eq!(sessions.load(&id(identity)).await.unwrap(), None);
        sessions.remove(&id(identity)).done().await;
    }
    let keys: Vec<_> = store.scan(Column::Sessions).unwrap();
    let keys: Vec<_> = keys.iter().map(|(key, _)| key.as_slice()).collect();
    assert_eq!(keys, [&b"mqtt/d1"[..], b"slots/d2/m"]);
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_damaged_record_is_no_session() {
    let place = Place::new();
    let (store, sessions) = place.open();
    let damaged = KvOp::Put {
        column: Column::Sessions,
        key: b"mqtt/d1".to_vec(),
        value: vec![0xff],
        sealed: false,
    };
    store.write(vec![damaged]).await.unwrap();
    assert_eq!(sessions.load(&id("d1")).await.unwrap(), None);
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_closed_store_keeps_nobody_waiting() {
    let place = Place::new();
    let (store, sessions) = place.open();
    store.close().await.unwrap();
    sessions.save(&id("d1"), session(&[("a", 0)])).done().await;
    assert!(matches!(
        sessions.load(&id("d1")).await,
        Err(SessionError::Store(StoreError::Closed))
    ));
}

#[cfg(feature = "faults")]
mod with_faults {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn is_pending(future: impl Future<Output = ()>) -> bool {
        let mut task = Context::from_waker(Waker::noop());
        matches!(pin!(future).poll(&mut task), Poll::Pending)
    }

    #[tokio::test]
    async fn while_the_disk_is_stuck_the_latest_state_counts_and_one_is_held() {
        let place = Place::new();
        let (store, sessions) = place.open();
        sessions
            .save(&id("d1"), session(&[("old", 0)]))
            .done()
            .await;
        store.faults().hold(true);
        let mut savings = Vec::new();
        for round in 0..100 {
            let state = session(&[(&format!("filter {round}"), 1)]);
            savings.push(sessions.save(&id("d1"), state.clone()));
            assert_eq!(sessions.load(&id("d1")).await.unwrap(), Some(state));
            // The first of them is on its way when the second comes.
            tokio::task::yield_now().await;
        }
        assert!(is_pending(savings[0].done()), "nothing is committed");
        assert_eq!(sessions.unsaved(), 1);
        // The connection that made the changes is gone; they go their way.
        let mut last = savings.pop().unwrap();
        drop(savings);
        let before = store.stats().commits;
        store.faults().hold(false);
        last.done().await;
        assert!(store.stats().commits - before <= 3, "changes are gathered");
        assert_eq!(sessions.unsaved(), 0);
        let expected = Some(session(&[("filter 99", 1)]));
        assert_eq!(sessions.load(&id("d1")).await.unwrap(), expected);
        store.close().await.unwrap();
    }

    #[tokio::test]
    async fn a_removal_counts_before_it_is_committed() {
        let place = Place::new();
        let (store, sessions) = place.open();
        sessions.save(&id("d1"), session(&[("a", 0)])).done().await;
        store.faults().hold(true);
        let mut removing = sessions.remove(&id("d1"));
        assert_eq!(sessions.load(&id("d1")).await.unwrap(), None);
        store.faults().hold(false);
        removing.done().await;
        assert_eq!(sessions.load(&id("d1")).await.unwrap(), None);
        store.close().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_commit_is_tried_again() {
        let place = Place::new();
        let (store, sessions) = place.open();
        store.faults().fail_next(2);
        let state = session(&[("a", 1)]);
        sessions.save(&id("d1"), state.clone()).done().await;
        assert_eq!(sessions.unsaved(), 0);
        let stored = store.get(Column::Sessions, b"mqtt/d1").unwrap().unwrap();
        assert_eq!(record::decode(&stored), Some(state));
        store.close().await.unwrap();
    }
}
