//! What a slow, stuck or failing disk does to the ones who wait for it.

use std::time::Duration;

use super::*;
use crate::{Column, KvOp};

fn value() -> KvOp {
    KvOp::Put {
        column: Column::Twins,
        key: b"k".into(),
        value: b"v".into(),
        sealed: false,
    }
}

#[tokio::test]
async fn nothing_is_visible_or_reported_while_a_commit_is_held() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    fill(&store, &q, 1).await;
    let image = TempDir::new().unwrap();
    store.faults().hold(true);
    let mut sender = Sender::new();
    store
        .append(sender.batch(vec![message("dev", "held", &[(&q, None)])]))
        .await
        .unwrap();
    q.settle(vec![done(0)]).await.unwrap();
    // Whatever the writer does, it does it before it answers a flush.
    let flushed = tokio::time::timeout(Duration::from_millis(50), store.flush()).await;
    assert!(flushed.is_err());
    assert_eq!(
        (sender.progress.committed(), q.next_offset(), q.length()),
        (0, 1, 1)
    );
    crate::store::copy_crash_image(&store, image.path());
    store.faults().hold(false);
    assert!(sender.committed().await);
    store.flush().await.unwrap();
    assert_eq!((q.next_offset(), q.mark()), (2, 1));
    store.close().await.unwrap();
    drop(dir);

    let crashed = open_at(image.path());
    assert_eq!(offsets(&read_all(&crashed.queues()[0], 0).await), vec![0]);
}

#[tokio::test]
async fn closing_releases_a_held_commit() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    store.faults().hold(true);
    let mut sender = Sender::new();
    store
        .append(sender.batch(vec![message("dev", "m", &[(&q, None)])]))
        .await
        .unwrap();
    store.close().await.unwrap();
    assert_eq!(sender.progress.committed(), 1);
    assert_eq!(
        queue(&open_at(&dir.path().join("edgeHub")), "q").length(),
        1
    );
}

/// Also on the only thread of a runtime: the writer needs nobody to come to its end.
#[tokio::test(flavor = "current_thread")]
async fn dropping_the_last_handle_releases_a_held_commit() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    store.faults().hold(true);
    let mut sender = Sender::new();
    let batch = sender.batch(vec![message("dev", "m", &[(&q, None)])]);
    store.append(batch).await.unwrap();
    drop((store, q));
    assert_eq!(sender.progress.committed(), 1, "the drop has waited");
    let store = open_at(&dir.path().join("edgeHub"));
    assert_eq!(queue(&store, "q").length(), 1);
}

#[tokio::test]
async fn a_failed_commit_acknowledges_nothing_and_leaves_no_trace() {
    let (dir, store) = fresh();
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    fill(&store, &a, 2).await;
    store.faults().fail_next(1);
    let mut sender = Sender::new();
    store
        .append(sender.batch(vec![
            message("dev", "lost", &[(&a, None), (&b, None)]),
            message("dev", "lost too", &[(&a, None)]),
        ]))
        .await
        .unwrap();
    assert!(!sender.committed().await);
    assert_eq!(sender.progress.committed(), 0);
    assert_eq!((a.next_offset(), b.next_offset()), (2, 0));
    assert_eq!(
        (store.stats().commits_failed, store.stats().appends),
        (1, 2)
    );
    // The same connection can never again report anything.
    store
        .append(sender.batch(vec![message("dev", "later", &[(&a, None)])]))
        .await
        .unwrap();
    store.flush().await.unwrap();
    assert_eq!((sender.progress.committed(), a.next_offset()), (0, 2));
    // Others go on with the same offsets.
    append(
        &store,
        vec![message("dev", "next", &[(&a, None), (&b, None)])],
    )
    .await;
    assert_eq!(
        (a.next_offset(), b.next_offset(), store.stats().intake_bytes),
        (3, 1, 0)
    );
    store.close().await.unwrap();
    let store = open_at(&dir.path().join("edgeHub"));
    let entries = read_all(&queue(&store, "a"), 0).await;
    assert_eq!((entries.len(), &entries[2].message[..]), (3, &b"next"[..]));
}

#[tokio::test]
async fn settles_of_a_failed_commit_are_tried_again() {
    let (_dir, store) = fresh();
    let q = queue(&store, "q");
    fill(&store, &q, 3).await;
    store.faults().fail_next(1);
    assert_eq!(q.settle_committed(vec![done(0), done(2)]).await.unwrap(), 2);
    assert_eq!(
        (q.mark(), q.length(), store.stats().commits_failed),
        (1, 1, 1)
    );
    assert_eq!(offsets(&read_all(&q, 0).await), vec![1]);
}

#[tokio::test]
async fn shared_messages_survive_a_failed_settle() {
    let (_dir, store) = fresh();
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    append(
        &store,
        vec![message("dev", "both", &[(&a, None), (&b, None)])],
    )
    .await;
    let entry = read_all(&a, 0).await.remove(0);
    store.faults().fail_next(2);
    assert_eq!(
        a.settle_committed(vec![settled(&entry, Outcome::Done)])
            .await
            .unwrap(),
        1
    );
    assert_eq!(&read_all(&b, 0).await[0].message[..], b"both");
    assert_eq!(
        b.settle_committed(vec![settled(&entry, Outcome::Done)])
            .await
            .unwrap(),
        1
    );
    assert_eq!(store.stats().queued, 0);
}

#[tokio::test]
async fn values_and_queues_hear_of_a_failed_commit() {
    let (_dir, store) = fresh();
    store.faults().fail_next(1);
    let error = store.write(vec![value()]).await.unwrap_err();
    assert!(matches!(error, StoreError::CommitFailed { .. }) && error.is_transient());
    assert_eq!(store.get(Column::Twins, b"k").unwrap(), None);
    store.faults().fail_next(1);
    let id = QueueId {
        endpoint: "q".into(),
        priority: 0,
    };
    assert!(matches!(
        store.queue(&id),
        Err(StoreError::CommitFailed { .. })
    ));
    assert!(store.queues().is_empty());
    store.queue(&id).unwrap();
    store.write(vec![value()]).await.unwrap();
}

#[tokio::test]
async fn a_slow_disk_makes_larger_groups() {
    let (_dir, store) = fresh();
    let q = queue(&store, "q");
    store
        .faults()
        .set_delay_range(Duration::from_millis(2), Duration::from_millis(4));
    let mut sender = Sender::new();
    for n in 0..300 {
        let batch = sender.batch(vec![message("dev", &format!("m{n}"), &[(&q, None)])]);
        store.append(batch).await.unwrap();
    }
    assert!(sender.committed().await);
    let commits = store.stats().commits;
    assert!(commits < 300 / 8, "{commits} commits for 300 messages");
}

#[tokio::test]
async fn a_panic_of_the_writer_leaves_nobody_waiting() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    fill(&store, &q, 2).await;
    store.faults().hold(true);
    store.faults().panic_next();
    assert!(store.is_writing());
    let (mut first, mut second) = (Sender::new(), Sender::new());
    for sender in [&mut first, &mut second] {
        let batch = sender.batch(vec![message("dev", "m", &[(&q, None)])]);
        store.append(batch).await.unwrap();
    }
    let settle = tokio::spawn({
        let q = q.clone();
        async move { q.settle_committed(vec![done(0)]).await }
    });
    tokio::task::yield_now().await;
    store.faults().hold(false);
    assert!(!first.committed().await && !second.committed().await);
    assert!(matches!(settle.await.unwrap(), Err(StoreError::Closed)));
    let late = second.batch(vec![]);
    assert!(store.append(late).await.is_err());
    let handle = store.clone();
    store.close().await.unwrap();
    assert!(!handle.is_writing());
    drop(handle);
    assert_eq!(
        queue(&open_at(&dir.path().join("edgeHub")), "q").length(),
        2
    );
}
