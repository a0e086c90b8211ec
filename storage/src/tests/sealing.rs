//! Sealed values through the whole store.

use std::sync::Arc;

use super::*;
use crate::{Column, KvOp, WrapError};

fn open_with(path: &Path, key: &[u8]) -> Opened {
    let clock = Arc::new(ManualClock::new(NOW_MS));
    Store::open(
        StoreConfig::new(path),
        clock,
        Arc::new(ConnectionStringWrap::new(key)),
    )
    .unwrap()
}

fn secret(key: &str, value: &str) -> KvOp {
    KvOp::Put {
        column: Column::Scope,
        key: key.into(),
        value: value.into(),
        sealed: true,
    }
}

#[tokio::test]
async fn secrets_come_back_and_lie_nowhere_in_the_clear() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let store = open_with(&path, b"key").store;
    store
        .write(vec![secret("leaf1", "very-secret-key")])
        .await
        .unwrap();
    let unmarked = KvOp::Put {
        column: Column::Scope,
        key: b"leaf2".into(),
        value: b"very-secret-key".into(),
        sealed: false,
    };
    store.write(vec![unmarked]).await.unwrap();
    store.close().await.unwrap();
    for file in std::fs::read_dir(&path).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        assert!(!bytes.windows(15).any(|window| window == b"very-secret-key"));
    }
    let opened = open_with(&path, b"key");
    assert_eq!(opened.seal_problem, None);
    let value = opened.store.get(Column::Scope, b"leaf1").unwrap();
    assert_eq!(value.as_deref(), Some(&b"very-secret-key"[..]));
    assert!(!format!("{:?}", secret("leaf1", "very-secret-key")).contains("very"));
}

#[tokio::test]
async fn with_another_key_secrets_are_missing_and_the_rest_works() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let store = open_with(&path, b"key").store;
    let plain = |key: &str| KvOp::Put {
        column: Column::Twins,
        key: key.into(),
        value: b"plain".into(),
        sealed: false,
    };
    store
        .write(vec![secret("a", "1"), plain("p")])
        .await
        .unwrap();
    fill(&store, &queue(&store, "q"), 3).await;
    store.close().await.unwrap();

    let opened = open_with(&path, b"rotated");
    assert_eq!(opened.seal_problem, Some(WrapError::WrongKey));
    let store = opened.store;
    assert_eq!(store.get(Column::Scope, b"a").unwrap(), None);
    assert_eq!(
        store.scan(Column::Twins).unwrap(),
        vec![(b"p".to_vec(), b"plain".to_vec())]
    );
    assert_eq!(store.scan(Column::Scope).unwrap(), vec![]);
    assert_eq!(store.stats().sealed_unreadable, 2);
    assert_eq!(queue(&store, "q").length(), 3);
    store.write(vec![secret("b", "2")]).await.unwrap();
    store.close().await.unwrap();

    let opened = open_with(&path, b"rotated");
    assert_eq!(opened.seal_problem, None, "the new key is in place");
    assert_eq!(
        opened.store.get(Column::Scope, b"b").unwrap().as_deref(),
        Some(&b"2"[..])
    );
    opened.store.close().await.unwrap();

    let opened = open_with(&path, b"key");
    assert_eq!(
        opened.store.get(Column::Scope, b"a").unwrap().as_deref(),
        Some(&b"1"[..])
    );
    assert_eq!(opened.store.get(Column::Scope, b"b").unwrap(), None);
}

#[tokio::test]
async fn many_key_changes_do_not_pile_up() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    for n in 0..crate::limits::DATA_KEYS_MAX as u8 + 4 {
        open_with(&path, &[n]).store.close().await.unwrap();
    }
    let store = open_with(&path, b"last").store;
    let keys = |open: &crate::db::Open<'_>| {
        open.scan(crate::layout::Cf::Meta, crate::layout::META_DATA_KEY)
    };
    assert_eq!(
        store.core.db.with(keys).unwrap().len(),
        crate::limits::DATA_KEYS_MAX
    );
}
