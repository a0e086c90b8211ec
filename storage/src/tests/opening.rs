//! Whose folder it is, and what happens to one that cannot be used.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rocksdb::{DB, Options};

use super::*;
use crate::layout::{Cf, META_FORMAT, META_QUEUE, numbered};
use crate::limits::FORMAT_VERSION;

/// Writes into a closed store behind its back.
fn tamper(path: &Path, cf: Cf, key: &[u8], value: &[u8]) {
    let db = DB::open_cf(&Options::default(), path, Cf::ALL.map(Cf::name)).unwrap();
    db.put_cf(db.cf_handle(cf.name()).unwrap(), key, value)
        .unwrap();
}

async fn filled(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.path().join("edgeHub");
    let store = open_at(&path);
    let queue = queue(&store, "q");
    fill(&store, &queue, 5).await;
    store.close().await.unwrap();
    path
}

fn names(dir: &TempDir) -> Vec<String> {
    let names = fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().file_name());
    let mut names = names
        .map(|name| name.into_string().unwrap())
        .collect::<Vec<_>>();
    names.sort();
    names
}

/// Opens, expects that the folder was moved to `edgeHub.<kind>-…`, and that the fresh store works.
async fn expect_moved(dir: &TempDir, kind: &str) -> crate::MovedAside {
    let opened = try_open(StoreConfig::new(dir.path().join("edgeHub"))).unwrap();
    let moved = opened.moved_aside.unwrap();
    let name = format!("edgeHub.{kind}-20260821T100005Z");
    assert_eq!(moved.path, dir.path().join(&name));
    assert_eq!(names(dir), vec!["edgeHub".to_owned(), name]);
    assert!(opened.store.queues().is_empty());
    let queue = queue(&opened.store, "q");
    fill(&opened.store, &queue, 1).await;
    moved
}

#[tokio::test]
async fn the_folder_is_private() {
    let (dir, _store) = fresh();
    let mode = fs::metadata(dir.path().join("edgeHub"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test]
async fn a_newer_format_is_refused_and_stays() {
    let dir = TempDir::new().unwrap();
    let path = filled(&dir).await;
    tamper(
        &path,
        Cf::Meta,
        META_FORMAT,
        &(FORMAT_VERSION + 1).to_be_bytes(),
    );
    for _ in 0..2 {
        let error = try_open(StoreConfig::new(&path)).unwrap_err();
        assert!(matches!(
            error,
            StoreError::NewerFormat {
                found: 2,
                supported: 1,
                ..
            }
        ));
        let text = error.to_string();
        assert!(
            text.contains("format version 2") && text.contains("up to 1"),
            "{text}"
        );
        assert!(
            text.contains("newer version") && text.contains("edgeHub"),
            "{text}"
        );
        assert_eq!(names(&dir), vec!["edgeHub"]);
    }
    tamper(&path, Cf::Meta, META_FORMAT, &FORMAT_VERSION.to_be_bytes());
    assert_eq!(queue(&open_at(&path), "q").length(), 5, "nothing was lost");
}

#[tokio::test]
async fn a_newer_format_with_more_column_families_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = filled(&dir).await;
    tamper(&path, Cf::Meta, META_FORMAT, &7u32.to_be_bytes());
    {
        let mut db = DB::open_cf(&Options::default(), &path, Cf::ALL.map(Cf::name)).unwrap();
        db.create_cf("of-the-future", &Options::default()).unwrap();
    }
    let error = try_open(StoreConfig::new(&path)).unwrap_err();
    assert!(
        matches!(error, StoreError::NewerFormat { found: 7, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_store_in_use_is_left_alone() {
    let (dir, store) = fresh();
    let error = try_open(StoreConfig::new(dir.path().join("edgeHub"))).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert_eq!(names(&dir), vec!["edgeHub"]);
    fill(&store, &queue(&store, "q"), 1).await;
}

#[tokio::test]
async fn a_store_that_does_not_open_is_moved_aside() {
    let dir = TempDir::new().unwrap();
    let path = filled(&dir).await;
    fs::write(path.join("CURRENT"), "MANIFEST-nonsense").unwrap();
    let moved = expect_moved(&dir, "corrupt").await;
    assert_eq!(
        fs::read(moved.path.join("CURRENT")).unwrap(),
        b"MANIFEST-nonsense"
    );
}

#[tokio::test]
async fn a_store_without_its_files_is_moved_aside() {
    for missing in ["CURRENT", "MANIFEST"] {
        let dir = TempDir::new().unwrap();
        let path = filled(&dir).await;
        for file in fs::read_dir(&path).unwrap() {
            let file = file.unwrap();
            if file.file_name().to_string_lossy().starts_with(missing) {
                fs::remove_file(file.path()).unwrap();
            }
        }
        expect_moved(&dir, "corrupt").await;
    }
}

#[tokio::test]
async fn a_store_with_damaged_records_is_moved_aside() {
    for (cf, key, value) in [
        (Cf::Meta, META_FORMAT.to_vec(), vec![1]),
        (Cf::Meta, META_FORMAT.to_vec(), vec![0; 4]),
        (Cf::Meta, numbered(META_QUEUE, 9), vec![8, 9]),
        (Cf::Checkpoints, 0u32.to_be_bytes().to_vec(), vec![0xff; 9]),
        (
            Cf::Queues,
            [&0u32.to_be_bytes()[..], b"odd"].concat(),
            vec![],
        ),
    ] {
        let dir = TempDir::new().unwrap();
        let path = filled(&dir).await;
        tamper(&path, cf, &key, &value);
        expect_moved(&dir, "corrupt").await;
    }
}

#[tokio::test]
async fn a_file_in_the_folders_place_is_moved_aside() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("edgeHub"), "a file").unwrap();
    expect_moved(&dir, "corrupt").await;
}

#[tokio::test]
async fn the_csharp_hubs_folder_is_moved_aside_untouched() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    let theirs = [
        "default",
        "messages",
        "twins",
        "checkpoints",
        "sessions",
        "iothub_Pri2000000000",
    ];
    {
        let db = DB::open_cf(&options, &path, theirs).unwrap();
        db.put_cf(db.cf_handle("twins").unwrap(), "edge/mod", "{}")
            .unwrap();
    }
    let contents = |path: &Path| {
        let files = fs::read_dir(path).unwrap().map(|f| f.unwrap().path());
        let mut files = files.map(|p| (p.file_name().unwrap().to_owned(), fs::read(p).unwrap()));
        let mut files = files.by_ref().collect::<Vec<_>>();
        files.sort();
        files
    };
    let before = contents(&path);
    let moved = expect_moved(&dir, "csharp").await;
    assert!(moved.reason.contains("C# hub"), "{}", moved.reason);
    assert_eq!(contents(&moved.path), before);
    let db = DB::open_cf(&Options::default(), &moved.path, theirs).unwrap();
    let twin = db
        .get_cf(db.cf_handle("twins").unwrap(), "edge/mod")
        .unwrap();
    assert_eq!(twin.as_deref(), Some(&b"{}"[..]));
}

#[tokio::test]
async fn a_taken_name_gets_a_number() {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("edgeHub.corrupt-20260821T100005Z")).unwrap();
    fs::write(dir.path().join("edgeHub"), "a file").unwrap();
    let opened = try_open(StoreConfig::new(dir.path().join("edgeHub"))).unwrap();
    let name = "edgeHub.corrupt-20260821T100005Z-2";
    assert_eq!(opened.moved_aside.unwrap().path, dir.path().join(name));
}

#[tokio::test]
async fn a_creation_that_was_cut_short_is_finished() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("edgeHub");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("IDENTITY"), "x").unwrap();
    open_at(&path).close().await.unwrap();

    let path = dir.path().join("other");
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    drop(DB::open_cf(&options, &path, ["default", "meta", "queues"]).unwrap());
    open_at(&path).close().await.unwrap();
}

#[tokio::test]
async fn queue_names_have_limits() {
    let (_dir, store) = fresh();
    for endpoint in [
        String::new(),
        "x".repeat(crate::limits::ENDPOINT_BYTES_MAX + 1),
    ] {
        let id = QueueId {
            endpoint,
            priority: 0,
        };
        assert!(matches!(store.queue(&id), Err(StoreError::Queue(_))));
    }
    let id = QueueId {
        endpoint: "x".repeat(crate::limits::ENDPOINT_BYTES_MAX),
        priority: 0,
    };
    assert_eq!(store.queue(&id).unwrap(), store.queue(&id).unwrap());
    assert_eq!(store.queues().len(), 1);
}
