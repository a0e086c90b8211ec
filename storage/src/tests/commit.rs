//! Group commit, syncs, values and the end of a store.

use super::*;
use crate::{Column, KvOp, StoreClosed, SyncMode, TryAppendError};

fn with_statistics(sync: SyncMode) -> (TempDir, Store) {
    let dir = TempDir::new().unwrap();
    let mut config = StoreConfig::new(dir.path().join("edgeHub"));
    config.sync = sync;
    config.statistics = true;
    let store = try_open(config).unwrap().store;
    (dir, store)
}

/// Commits of every kind, one at a time; returns commits, syncs that we count, syncs that
/// RocksDB counts.
async fn syncs_of(sync: SyncMode) -> (u64, u64, u64) {
    let (_dir, store) = with_statistics(sync);
    let queue = queue(&store, "q");
    let before = (store.stats(), store.core.db.wal_files_synced());
    for _ in 0..10 {
        fill(&store, &queue, 3).await;
    }
    queue.settle_committed(vec![done(0)]).await.unwrap();
    let value = KvOp::Put {
        column: Column::Twins,
        key: b"k".into(),
        value: b"v".into(),
        sealed: false,
    };
    store.write(vec![value]).await.unwrap();
    let after = store.stats();
    (
        after.commits - before.0.commits,
        after.wal_syncs - before.0.wal_syncs,
        store.core.db.wal_files_synced() - before.1,
    )
}

#[tokio::test]
async fn disk_syncs_every_commit() {
    let (commits, ours, theirs) = syncs_of(SyncMode::Disk).await;
    assert_eq!((commits, ours), (12, 12));
    assert!(theirs >= commits, "RocksDB synced its log {theirs} times");
}

#[tokio::test]
async fn os_syncs_none() {
    assert_eq!(syncs_of(SyncMode::Os).await, (12, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_share_commits_and_each_gets_its_order() {
    const CONNECTIONS: u64 = 8;
    const BATCHES: u64 = 200;
    let (_dir, store) = fresh();
    let q = queue(&store, "q");
    let connections = (0..CONNECTIONS).map(|c| {
        let (store, q) = (store.clone(), q.clone());
        tokio::spawn(async move {
            let mut sender = Sender::new();
            for n in 0..BATCHES {
                let bodies = [format!("{}", 2 * n), format!("{}", 2 * n + 1)];
                let name = format!("c{c}");
                let appends = bodies
                    .iter()
                    .map(|body| message(&name, body, &[(&q, None)]));
                store.append(sender.batch(appends.collect())).await.unwrap();
            }
            assert!(sender.committed().await);
        })
    });
    for connection in connections.collect::<Vec<_>>() {
        connection.await.unwrap();
    }
    let entries = read_all(&q, 0).await;
    for c in 0..CONNECTIONS {
        let name = format!("c{c}");
        let of_one = entries.iter().filter(|entry| entry.sender.as_str() == name);
        let bodies = of_one.map(|e| String::from_utf8(e.message.to_vec()).unwrap());
        let expected = (0..2 * BATCHES).map(|n| n.to_string());
        assert!(bodies.eq(expected), "{name} is out of order");
    }
    let stats = store.stats();
    assert_eq!(
        (stats.appends, stats.intake_bytes),
        (CONNECTIONS * BATCHES * 2, 0)
    );
    assert!(
        stats.commits < CONNECTIONS * BATCHES,
        "{} commits",
        stats.commits
    );
}

#[tokio::test]
async fn a_batch_above_every_limit_still_passes() {
    let dir = TempDir::new().unwrap();
    let mut config = StoreConfig::new(dir.path().join("edgeHub"));
    (
        config.intake_bytes,
        config.group_bytes,
        config.group_appends,
    ) = (1_000, 100, 2);
    config.tail_bytes = 10;
    let store = try_open(config).unwrap().store;
    let q = queue(&store, "q");
    fill(&store, &q, 50).await;
    fill(&store, &q, 50).await;
    assert_eq!(read_all(&q, 0).await.len(), 100);
    assert_eq!(store.stats().intake_bytes, 0);
}

#[tokio::test]
async fn values_are_written_together_and_scanned_by_column() {
    let (dir, store) = fresh();
    let put = |column, key: &str, value: &str| KvOp::Put {
        column,
        key: key.into(),
        value: value.into(),
        sealed: false,
    };
    store
        .write(vec![
            put(Column::Twins, "b", "2"),
            put(Column::Twins, "a", "1"),
            put(Column::Meta, "format", "ours"),
            put(Column::Sessions, "gone", "x"),
            KvOp::Delete {
                column: Column::Sessions,
                key: b"gone".into(),
            },
        ])
        .await
        .unwrap();
    store.close().await.unwrap();
    let store = open_at(&dir.path().join("edgeHub"));
    assert_eq!(
        store.scan(Column::Twins).unwrap(),
        vec![
            (b"a".to_vec(), b"1".to_vec()),
            (b"b".to_vec(), b"2".to_vec())
        ]
    );
    assert_eq!(
        store.get(Column::Meta, b"format").unwrap(),
        Some(b"ours".to_vec())
    );
    assert_eq!(store.get(Column::Sessions, b"gone").unwrap(), None);
    assert!(store.scan(Column::Scope).unwrap().is_empty());
}

#[tokio::test]
async fn closing_commits_what_was_handed_over_and_refuses_the_rest() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    let mut sender = Sender::new();
    for n in 0..50 {
        let batch = sender.batch(vec![message("dev", &format!("m{n}"), &[(&q, None)])]);
        store.append(batch).await.unwrap();
    }
    store.clone().close().await.unwrap();
    assert_eq!(sender.progress.committed(), 50);
    let batch = sender.batch(vec![message("dev", "late", &[(&q, None)])]);
    assert_eq!(store.append(batch).await, Err(StoreClosed));
    let batch = sender.batch(vec![]);
    assert!(matches!(
        store.try_append(batch),
        Err(TryAppendError::Closed)
    ));
    assert!(matches!(
        q.settle(vec![done(0)]).await,
        Err(StoreError::Closed)
    ));
    assert!(matches!(store.write(vec![]).await, Err(StoreError::Closed)));
    assert!(matches!(
        store.get(Column::Twins, b"x"),
        Err(StoreError::Closed)
    ));
    store.close().await.unwrap();
    let store = open_at(&dir.path().join("edgeHub"));
    assert_eq!(read_all(&queue(&store, "q"), 0).await.len(), 50);
}

#[tokio::test]
async fn dropping_the_last_handle_commits_and_closes() {
    let (dir, store) = fresh();
    let q = queue(&store, "q");
    let mut sender = Sender::new();
    store
        .append(sender.batch(vec![message("dev", "m", &[(&q, None)])]))
        .await
        .unwrap();
    drop((store, q));
    assert!(sender.committed().await);
    let store = open_at(&dir.path().join("edgeHub"));
    assert_eq!(queue(&store, "q").length(), 1);
}

#[tokio::test]
async fn a_queue_of_another_store_fails_its_batch_and_nothing_else() {
    let ((_dir_a, a), (_dir_b, b)) = (fresh(), fresh());
    let (mine, theirs) = (queue(&a, "q"), queue(&b, "q"));
    let mut sender = Sender::new();
    a.append(sender.batch(vec![message("dev", "m", &[(&theirs, None)])]))
        .await
        .unwrap();
    assert!(!sender.committed().await);
    fill(&a, &mine, 2).await;
    assert_eq!((mine.length(), theirs.length()), (2, 0));
}
