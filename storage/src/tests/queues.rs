//! Reading, settling, expiry, shared messages and recovery of queues.

use std::sync::Arc;
use std::time::Duration;

use rocksdb::IteratorMode;

use super::*;
use crate::SenderFilter;
use crate::layout::{Cf, entry_key};
use crate::limits::{RECLAIM_ENTRIES, RECLAIM_INTERVAL_MS, SPARSE_RANGES_MAX};

fn stored(store: &Store, cf: Cf) -> usize {
    let count = |open: &crate::db::Open<'_>| {
        Ok(open
            .db
            .iterator_cf(open.cf(cf)?, IteratorMode::Start)
            .count())
    };
    store.core.db.with(count).unwrap()
}

#[tokio::test]
async fn offsets_are_contiguous_and_entries_come_back_as_they_were() {
    let (_dir, store) = fresh();
    let (a, b) = (queue(&store, "iothub"), queue(&store, "edge/mod/in"));
    append(
        &store,
        vec![
            message("leaf", "one", &[(&a, Some(5))]),
            message("edge/mod", "two", &[(&b, None)]),
            message("leaf", "three", &[(&a, None)]),
        ],
    )
    .await;
    let entries = read_all(&a, 0).await;
    assert_eq!(offsets(&entries), vec![0, 1]);
    let first = &entries[0];
    assert_eq!(
        (first.sender.as_str(), &first.message[..]),
        ("leaf", &b"one"[..])
    );
    assert_eq!(
        (first.enqueued_ms, first.expires_at_ms, first.shared),
        (NOW_MS, Some(5), None)
    );
    assert_eq!(offsets(&read_all(&b, 0).await), vec![0]);
    assert_eq!((a.next_offset(), a.length(), a.mark()), (2, 2, 0));
    assert_eq!(store.queue(a.id()).unwrap(), a);
    assert_ne!(a, b);
}

#[tokio::test]
async fn watchers_hear_of_commits() {
    let (_dir, store) = fresh();
    let queue = queue(&store, "q");
    let mut watcher = queue.subscribe();
    assert_eq!(*watcher.borrow_and_update(), 0);
    fill(&store, &queue, 3).await;
    watcher.changed().await.unwrap();
    assert_eq!(*watcher.borrow_and_update(), 3);
}

#[tokio::test]
async fn a_message_that_matches_nothing_completes() {
    let (_dir, store) = fresh();
    append(&store, vec![message("dev", "x", &[])]).await;
    assert_eq!((store.stats().commits, store.stats().appends), (0, 0));
}

#[tokio::test]
async fn memory_and_disk_give_the_same_entries() {
    let dir = TempDir::new().unwrap();
    let mut config = StoreConfig::new(dir.path().join("edgeHub"));
    config.tail_bytes = 20_000;
    let store = try_open(config).unwrap().store;
    let queue = queue(&store, "q");
    for _ in 0..20 {
        fill(&store, &queue, 25).await;
    }
    let before = store.stats();
    let entries = read_all(&queue, 0).await;
    assert_eq!(offsets(&entries), (0..500).collect::<Vec<_>>());
    for entry in &entries {
        assert_eq!(entry.message, format!("m{}", entry.offset));
    }
    assert!(store.stats().cold_reads > before.cold_reads);
    assert!(store.stats().tail_bytes <= 20_000);
    let near_the_end = store.stats().cold_reads;
    assert_eq!(offsets(&read_all(&queue, 480).await).len(), 20);
    assert_eq!(
        store.stats().cold_reads,
        near_the_end,
        "the end is read from memory"
    );
    store.close().await.unwrap();

    let store = open_at(&dir.path().join("edgeHub"));
    assert_eq!(read_all(&store.queues()[0], 0).await, entries);
}

#[tokio::test]
async fn limits_and_filters_hold_on_both_ways() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let store = open_at(&path);
    let queue = queue(&store, "q");
    let sender = |n: u64| {
        if n.is_multiple_of(3) {
            "third"
        } else {
            "other"
        }
    };
    let body = "b".repeat(100);
    let appends = (0..90).map(|n| message(sender(n), &body, &[(&queue, None)]));
    append(&store, appends.collect()).await;
    store.close().await.unwrap();

    // Once from RocksDB, then again from memory, at other offsets.
    let store = open_at(&path);
    let queue = store.queues().remove(0);
    for (base, cold) in [(0, true), (90, false)] {
        let filter: SenderFilter = Arc::new(|_, sender| sender == "third");
        let limit = ReadLimit {
            entries: 4,
            bytes: 10_000,
            scan: 1_000,
        };
        let read = queue
            .read(base, limit, Some(Arc::clone(&filter)))
            .await
            .unwrap();
        assert_eq!(
            offsets(&read.entries),
            vec![base, base + 3, base + 6, base + 9]
        );
        assert_eq!(read.next, base + 10);
        let limit = ReadLimit {
            entries: 100,
            bytes: 250,
            scan: 1_000,
        };
        let read = queue
            .read(base + 1, limit, Some(Arc::clone(&filter)))
            .await
            .unwrap();
        assert_eq!(offsets(&read.entries), vec![base + 3, base + 6]);
        let limit = ReadLimit {
            entries: 100,
            bytes: 1,
            scan: 1_000,
        };
        let read = queue.read(base + 3, limit, None).await.unwrap();
        assert_eq!(
            (read.entries.len(), read.next),
            (1, base + 4),
            "one is never too large"
        );
        let limit = ReadLimit {
            entries: 100,
            bytes: 10_000,
            scan: 7,
        };
        let read = queue.read(base + 1, limit, Some(filter)).await.unwrap();
        assert_eq!(
            (offsets(&read.entries), read.next),
            (vec![base + 3, base + 6], base + 8)
        );
        assert_eq!(store.stats().cold_reads, 4);
        if cold {
            let appends = (90..180).map(|n| message(sender(n), &body, &[(&queue, None)]));
            append(&store, appends.collect()).await;
        }
    }
}

#[tokio::test]
async fn settled_entries_are_gone_for_readers_and_counted_once() {
    let (_dir, store) = fresh();
    let queue = queue(&store, "q");
    fill(&store, &queue, 10).await;
    let entries = read_all(&queue, 0).await;
    let batch = vec![
        settled(&entries[3], Outcome::Done),
        settled(&entries[4], Outcome::Dropped),
        settled(&entries[0], Outcome::Expired),
    ];
    assert_eq!(queue.settle_committed(batch.clone()).await.unwrap(), 3);
    assert_eq!(queue.settle_committed(batch).await.unwrap(), 0);
    assert_eq!(
        queue
            .settle_committed(vec![done(10), done(u64::MAX)])
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        offsets(&read_all(&queue, 0).await),
        vec![1, 2, 5, 6, 7, 8, 9]
    );
    assert_eq!((queue.mark(), queue.length()), (1, 7));
    let stats = queue.stats();
    assert_eq!(
        (stats.entries, stats.settled, stats.expired, stats.dropped),
        (10, 1, 1, 1)
    );
    let stats = store.stats();
    assert_eq!(
        (stats.settled, stats.expired, stats.dropped, stats.queued),
        (1, 1, 1, 7)
    );
}

#[tokio::test]
async fn a_restart_finds_marks_gaps_lengths_and_offsets() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let store = open_at(&path);
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    fill(&store, &a, 20).await;
    fill(&store, &b, 5).await;
    a.settle_committed((0..4).chain(7..9).map(done).collect())
        .await
        .unwrap();
    b.settle_committed((0..5).map(done).collect())
        .await
        .unwrap();
    fill(&store, &a, 2).await;
    store.close().await.unwrap();
    assert!(matches!(
        a.read(0, EVERYTHING, None).await,
        Err(StoreError::Closed)
    ));

    let store = open_at(&path);
    let queues = store.queues();
    assert_eq!(queues, vec![a, b]);
    let (a, b) = (&queues[0], &queues[1]);
    assert_eq!((a.mark(), a.length(), a.next_offset()), (4, 16, 22));
    let expected = (4..7).chain(9..22).collect::<Vec<_>>();
    assert_eq!(offsets(&read_all(a, 0).await), expected);
    assert_eq!((b.mark(), b.length(), b.next_offset()), (5, 0, 5));
    fill(&store, b, 1).await;
    assert_eq!(offsets(&read_all(b, 0).await), vec![5]);
}

#[tokio::test]
async fn a_shared_message_is_stored_once_and_leaves_with_its_last_entry() {
    let (dir, store) = fresh();
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    append(
        &store,
        vec![
            message("dev", "both", &[(&a, Some(9)), (&b, None)]),
            message("dev", "alone", &[(&a, None)]),
        ],
    )
    .await;
    assert_eq!(
        (stored(&store, Cf::Messages), stored(&store, Cf::Refs)),
        (1, 1)
    );
    assert_eq!((store.stats().appends, store.stats().entries), (2, 3));
    store.close().await.unwrap();

    let store = open_at(&dir.path().join("edgeHub"));
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    let (in_a, in_b) = (read_all(&a, 0).await, read_all(&b, 0).await);
    assert_eq!(
        (&in_a[0].message[..], &in_b[0].message[..]),
        (&b"both"[..], &b"both"[..])
    );
    assert_eq!(in_a[0].expires_at_ms, Some(9));
    assert!(in_a[0].shared.is_some() && in_a[1].shared.is_none());
    let settle = vec![settled(&in_a[0], Outcome::Done)];
    a.settle_committed(settle.clone()).await.unwrap();
    // Settling twice must not take the other queue's reference.
    a.settle_committed(settle).await.unwrap();
    assert_eq!(stored(&store, Cf::Messages), 1);
    assert_eq!(read_all(&b, 0).await, in_b);
    b.settle_committed(vec![settled(&in_b[0], Outcome::Done)])
        .await
        .unwrap();
    assert_eq!(
        (stored(&store, Cf::Messages), stored(&store, Cf::Refs)),
        (0, 0)
    );
    // An id is not given twice, after a restart either.
    append(
        &store,
        vec![message("dev", "next", &[(&a, None), (&b, None)])],
    )
    .await;
    assert!(read_all(&b, 0).await[0].shared > in_a[0].shared);
}

#[tokio::test]
async fn entries_expire_wherever_they_are() {
    let (_dir, store) = fresh();
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    assert_eq!(a.expire(u64::MAX, 10).await.unwrap(), 0);
    let at = |n: u64| (n % 2 == 1).then_some(NOW_MS + n);
    let appends = (0..20).map(|n| message("dev", "x", &[(&a, at(n)), (&b, None)]));
    append(&store, appends.collect()).await;
    assert_eq!(a.expire(NOW_MS, 100).await.unwrap(), 0);
    assert_eq!(a.expire(NOW_MS + 1, 100).await.unwrap(), 1);
    // A sweep goes on where the last one stopped.
    assert_eq!(a.expire(NOW_MS + 9, 5).await.unwrap(), 2);
    assert_eq!(a.expire(NOW_MS + 9, 100).await.unwrap(), 2);
    assert_eq!(
        offsets(&read_all(&a, 0).await),
        vec![0, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    );
    append(&store, vec![message("dev", "x", &[(&a, Some(NOW_MS + 9))])]).await;
    assert_eq!(a.expire(NOW_MS + 9, 100).await.unwrap(), 1);
    assert_eq!(a.expire(u64::MAX, 100).await.unwrap(), 5);
    assert_eq!(
        (a.length(), a.stats().expired, store.stats().expired),
        (10, 11, 11)
    );
    assert_eq!(
        (b.expire(u64::MAX, 100).await.unwrap(), b.length()),
        (0, 20)
    );
}

#[tokio::test]
async fn entries_of_an_earlier_run_expire() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    append(&store, vec![message("dev", "x", &[(&q, Some(NOW_MS + 1))])]).await;
    store.close().await.unwrap();
    let store = open_at(&dir.path().join("edgeHub"));
    let q = queue(&store, "q");
    assert_eq!(q.expire(NOW_MS, 10).await.unwrap(), 0);
    assert_eq!(q.expire(NOW_MS + 1, 10).await.unwrap(), 1);
    assert_eq!((q.length(), q.mark()), (0, 1));
}

#[tokio::test]
async fn the_oldest_is_the_first_that_is_not_settled() {
    let (_dir, store) = fresh();
    let queue = queue(&store, "q");
    assert_eq!(queue.oldest_enqueued_ms().await.unwrap(), None);
    let mut appends = (0..4)
        .map(|_| message("dev", "x", &[(&queue, None)]))
        .collect::<Vec<_>>();
    for (n, append) in appends.iter_mut().enumerate() {
        append.enqueued_ms = 1_000 + n as u64;
    }
    append(&store, appends).await;
    assert_eq!(queue.oldest_enqueued_ms().await.unwrap(), Some(1_000));
    queue
        .settle_committed(vec![done(1), done(2)])
        .await
        .unwrap();
    assert_eq!(queue.oldest_enqueued_ms().await.unwrap(), Some(1_000));
    queue.settle_committed(vec![done(0)]).await.unwrap();
    assert_eq!(queue.oldest_enqueued_ms().await.unwrap(), Some(1_003));
    queue.settle_committed(vec![done(3)]).await.unwrap();
    assert_eq!(queue.oldest_enqueued_ms().await.unwrap(), None);
}

#[tokio::test]
async fn settled_entries_are_deleted_in_bulk() {
    let (_dir, store) = fresh();
    let queue = queue(&store, "q");
    let count = 2 * RECLAIM_ENTRIES;
    fill(&store, &queue, count).await;
    queue
        .settle_committed((0..RECLAIM_ENTRIES / 2).map(done).collect())
        .await
        .unwrap();
    assert_eq!(
        stored(&store, Cf::Queues) as u64,
        count,
        "too few to bother"
    );
    queue
        .settle_committed((RECLAIM_ENTRIES / 2..RECLAIM_ENTRIES).map(done).collect())
        .await
        .unwrap();
    assert_eq!(stored(&store, Cf::Queues) as u64, count - RECLAIM_ENTRIES);
    assert_eq!(queue.length(), count - RECLAIM_ENTRIES);
}

#[tokio::test]
async fn a_busy_store_deletes_what_was_settled_in_a_quiet_queue() {
    let dir = TempDir::new().unwrap();
    let clock = Arc::new(ManualClock::new(NOW_MS));
    let config = StoreConfig::new(dir.path().join("edgeHub"));
    let wrap = Arc::new(ConnectionStringWrap::new(b"key"));
    let opened = Store::open(config, Arc::clone(&clock) as _, wrap).unwrap();
    let store = opened.store;
    let (quiet, busy) = (queue(&store, "quiet"), queue(&store, "busy"));
    fill(&store, &quiet, 10).await;
    quiet
        .settle_committed((0..10).map(done).collect())
        .await
        .unwrap();
    clock.advance(Duration::from_millis(RECLAIM_INTERVAL_MS));
    fill(&store, &busy, 1).await;
    assert_eq!(stored(&store, Cf::Queues), 1);
}

#[tokio::test]
async fn a_stuck_head_does_not_keep_the_space_behind_it() {
    let (_dir, store) = fresh();
    let queue = queue(&store, "q");
    let count = 2 * RECLAIM_ENTRIES + 1;
    fill(&store, &queue, count).await;
    queue
        .settle_committed((1..count).map(done).collect())
        .await
        .unwrap();
    assert_eq!(
        (queue.mark(), queue.length(), stored(&store, Cf::Queues)),
        (0, 1, 1)
    );
}

#[tokio::test]
async fn wild_acknowledgements_stay_bounded_and_exact() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let store = open_at(&path);
    let q = queue(&store, "q");
    let count = 5 * SPARSE_RANGES_MAX as u64;
    fill(&store, &q, count).await;
    let odd = |n: &u64| n % 2 == 1;
    let all = (0..count).filter(odd).collect::<Vec<_>>();
    for part in all.chunks(900) {
        assert_eq!(
            q.settle_committed(part.iter().copied().map(done).collect())
                .await
                .unwrap(),
            part.len() as u64
        );
    }
    store.flush().await.unwrap();
    assert!(q.state.settled.lock().spans().len() <= SPARSE_RANGES_MAX);
    assert_eq!((q.length(), q.mark()), (count - all.len() as u64, 0));
    let even = (0..count).filter(|n| !odd(n)).collect::<Vec<_>>();
    assert_eq!(offsets(&read_all(&q, 0).await), even);
    // What was forgotten is not settled again.
    assert_eq!(
        q.settle_committed(all.iter().copied().map(done).collect())
            .await
            .unwrap(),
        0
    );
    store.close().await.unwrap();

    let store = open_at(&path);
    let q = queue(&store, "q");
    assert_eq!((q.length(), q.mark()), (even.len() as u64, 0));
    assert_eq!(offsets(&read_all(&q, 0).await), even);
    assert_eq!(
        q.settle_committed(all.iter().copied().map(done).collect())
            .await
            .unwrap(),
        0
    );
    let half = even.len() / 2;
    q.settle_committed(even[..half].iter().copied().map(done).collect())
        .await
        .unwrap();
    assert_eq!(
        q.mark(),
        even[half],
        "the mark steps over what was forgotten"
    );
    q.settle_committed(even[half..].iter().copied().map(done).collect())
        .await
        .unwrap();
    assert_eq!((q.mark(), q.length()), (count, 0));
}

#[tokio::test]
async fn an_entry_that_is_no_record_is_dropped_and_stops_nothing() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    fill(&store, &q, 3).await;
    let number = q.state.number;
    store
        .core
        .db
        .with(|open| {
            let damaged = open
                .db
                .put_cf(open.cf(Cf::Queues)?, entry_key(number, 1), b"\xff\xff");
            damaged.map_err(|error| StoreError::database("put", &error))
        })
        .unwrap();
    store.close().await.unwrap();
    let store = open_at(&dir.path().join("edgeHub"));
    let q = queue(&store, "q");
    assert_eq!(offsets(&read_all(&q, 0).await), vec![0, 2]);
    store.flush().await.unwrap();
    assert_eq!(
        (q.length(), store.stats().damaged, store.stats().dropped),
        (2, 1, 1)
    );
}
