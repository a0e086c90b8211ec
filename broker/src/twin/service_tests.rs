//! The whole service with a real store, against fakes of everything else.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::hub::UpstreamError;
use edgehub_storage::Column;
use serde_json::Value;

use super::TwinError;
use super::fakes::{Asked, Failure, OWN, World, eventually, leaf, patch, report, twin};
use super::limits::COMMANDS_MAX;
use super::test_support::json;
use crate::test_support::id;

#[tokio::test]
async fn a_report_made_offline_outlives_a_restart_and_reaches_the_upstream() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":1}"#, r#"{"$version":4,"old":1}"#);
    world.upstream.set_online(false);
    world
        .twins
        .report(&leaf(), patch(r#"{"a":1,"old":null}"#))
        .await
        .unwrap();
    world
        .twins
        .report(&leaf(), patch(r#"{"a":2}"#))
        .await
        .unwrap();
    eventually("it was tried", || !world.upstream.asked().is_empty()).await;
    let world = world.restart().await;
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(reply["reported"]["a"], 2);
    eventually("nothing can be done", || world.is_at_rest()).await;
    // The client is not connected, and no session of it comes: the hub itself remembers, also
    // that of one about whom it heard nothing since it began.
    let world = world.restart().await;
    assert!(world.is_at_rest());
    world.upstream.set_online(true);
    let expected = json(r#"{"$version":5,"a":2}"#);
    eventually("it arrived", || {
        world.upstream.reported(&leaf()) == expected
    })
    .await;
    eventually("it is over", || world.is_at_rest()).await;
    let world = world.restart().await;
    assert_eq!(world.twins.unsynced.lock().len(), 0);
    assert_eq!(world.store.scan(Column::Meta).unwrap(), []);
    world.stop().await;
}

#[tokio::test]
async fn reports_are_merged_while_one_is_on_its_way() {
    let world = World::new();
    world.upstream.answer_only(0);
    for text in [
        r#"{"a":1}"#,
        r#"{"b":1}"#,
        r#"{"a":2}"#,
        r#"{"c":{"d":null}}"#,
    ] {
        world.twins.report(&leaf(), patch(text)).await.unwrap();
        eventually("the first is sent", || !world.upstream.asked().is_empty()).await;
    }
    assert_eq!(world.upstream.asked(), [report(&leaf(), r#"{"a":1}"#)]);
    world.upstream.answer_all();
    eventually("all is sent", || world.twins.unsynced.lock().is_empty()).await;
    let rest = report(&leaf(), r#"{"a":2,"b":1,"c":{"d":null}}"#);
    assert_eq!(
        world.upstream.asked(),
        [report(&leaf(), r#"{"a":1}"#), rest]
    );
    assert_eq!(
        world.upstream.reported(&leaf()),
        json(r#"{"$version":3,"a":2,"b":1,"c":{}}"#)
    );
    world.stop().await;
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_and_changes_nothing() {
    let world = World::new();
    let lost = UpstreamError::Unavailable("lost".to_owned());
    world.upstream.fail_next(Failure::Unanswered(lost.clone()));
    world.upstream.fail_next(Failure::Unheard(lost));
    world
        .twins
        .report(&leaf(), patch(r#"{"a":1}"#))
        .await
        .unwrap();
    eventually("it is confirmed", || world.twins.unsynced.lock().is_empty()).await;
    assert_eq!(world.upstream.asked().len(), 3);
    assert_eq!(
        world.upstream.reported(&leaf()),
        json(r#"{"$version":3,"a":1}"#)
    );
    world.stop().await;
}

#[tokio::test]
async fn calls_count_in_the_order_in_which_they_are_made() {
    let world = World::new();
    world.upstream.set_online(false);
    let reports: Vec<_> = (0..COMMANDS_MAX)
        .map(|n| {
            let text = patch(&format!(r#"{{"n":{n}}}"#));
            world.twins.report(&leaf(), text)
        })
        .collect();
    let last = format!(r#"{{"n":{}}}"#, COMMANDS_MAX - 1);
    // Nobody waits for the first before the last.
    for report in reports.into_iter().rev() {
        report.await.unwrap();
    }
    let told = world.changes.bodies();
    assert_eq!(told.len(), COMMANDS_MAX);
    assert_eq!(told.last(), Some(&("leaf1".to_owned(), last)));
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(reply["reported"]["n"], COMMANDS_MAX - 1);
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_asks_too_much_at_once_is_told_so() {
    let world = World::new();
    world.upstream.answer_only(0);
    // The worker has no turn before the first await.
    let gets: Vec<_> = (0..COMMANDS_MAX + 2)
        .map(|_| world.twins.get(&leaf()))
        .collect();
    let other = world.twins.get(&id("leaf2"));
    world.upstream.answer_all();
    let mut statuses = Vec::new();
    for get in gets {
        statuses.push(get.await.status);
    }
    let (good, bad) = statuses.split_at(COMMANDS_MAX);
    assert!(good.iter().all(|status| *status == 200));
    assert_eq!(bad, [429, 429]);
    assert_eq!(other.await.status, 200, "others are not concerned");
    let fetches = world.upstream.fetch_times().len();
    assert!(fetches <= 3, "one fetch for all who wait, not {fetches}");
    world.stop().await;
}

#[tokio::test]
async fn clients_that_wait_for_an_upstream_are_bounded() {
    let world = World::new();
    world.upstream.answer_only(0);
    let taken = || {
        let slots = world.twins.slots.lock();
        slots[&leaf()].inbox.is_empty()
    };
    let mut gets = Vec::new();
    for _ in 0..2 {
        for _ in 0..COMMANDS_MAX {
            gets.push(world.twins.get(&leaf()));
        }
        eventually("they are taken", taken).await;
    }
    assert_eq!(world.twins.get(&leaf()).await.status, 429);
    world.upstream.answer_all();
    for get in gets {
        assert_eq!(get.await.status, 200);
    }
    assert_eq!(world.upstream.fetch_times().len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn a_client_gets_what_the_upstream_has_and_without_it_the_copy() {
    let world = World::new();
    world.upstream.set(
        &leaf(),
        r#"{"$version":7,"x":1}"#,
        r#"{"$version":3,"y":2}"#,
    );
    let online = world.twins.get(&leaf()).await;
    assert_eq!(twin(&online)["desired"]["x"], 1);
    world.upstream.set_online(false);
    assert_eq!(world.twins.get(&leaf()).await, online);
    let world = world.restart().await;
    assert_eq!(world.twins.get(&leaf()).await, online);
    let unknown = world.twins.get(&id("leaf2")).await;
    let nothing = r#"{"desired":{"$version":0},"reported":{"$version":0}}"#;
    assert_eq!((unknown.status, unknown.body), (200, nothing.into()));
    world.stop().await;
}

#[tokio::test]
async fn refusals_have_a_body_that_node_understands() {
    let world = World::new();
    for (error, status, code) in [
        (UpstreamError::Refused { status: 404 }, 404, 404_000),
        (UpstreamError::Busy { status: 429 }, 429, 429_000),
    ] {
        world.upstream.fail_next(Failure::Unheard(error));
        let reply = world.twins.get(&leaf()).await;
        assert_eq!(reply.status, status);
        let body: Value = serde_json::from_slice(&reply.body).unwrap();
        assert_eq!(body["errorCode"], code);
        assert!(body["message"].is_string() && body["trackingId"].is_string());
        let at = body["timestampUtc"].as_str().unwrap();
        assert!(at.ends_with('Z') && at.len() == 28, "{at}");
    }
    world.stop().await;
}

#[tokio::test]
async fn bad_reports_are_refused_and_nobody_hears_of_them() {
    let world = World::new();
    let deep = format!(r#"{{"a":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let million_keys: String = (0..30_000).map(|n| format!("\"k{n}\":1,")).collect();
    for bad in [
        "",
        "{",
        "[1]",
        r#"{"a.b":1}"#,
        &deep,
        &format!("{{{million_keys}\"a\":1}}"),
    ] {
        let error = world.twins.report(&leaf(), patch(bad)).await.unwrap_err();
        assert_eq!(error.status(), 400);
        let refusal = world.twins.refusal(&error);
        let body: Value = serde_json::from_slice(&refusal.body).unwrap();
        assert_eq!((refusal.status, &body["errorCode"]), (400, &400_000.into()));
    }
    assert_eq!(world.changes.bodies(), []);
    eventually("all is done", || world.is_at_rest()).await;
    assert_eq!(world.upstream.asked(), []);
    assert_eq!(world.store.scan(Column::Twins).unwrap(), []);
    world.stop().await;
}

#[tokio::test]
async fn routing_hears_of_reports_but_not_of_the_hubs_own_and_of_empty_ones() {
    let world = World::new();
    let module = id("edge1/modA");
    world
        .twins
        .report(&leaf(), patch(r#"{ "a": 1 }"#))
        .await
        .unwrap();
    world
        .twins
        .report(&module, patch(r#"{"b":null}"#))
        .await
        .unwrap();
    world.twins.report(&module, patch("{}")).await.unwrap();
    world
        .twins
        .report_own(patch(r#"{"clients":{}}"#))
        .await
        .unwrap();
    let told = |who: &str, what: &str| (who.to_owned(), what.to_owned());
    assert_eq!(
        world.changes.bodies(),
        [
            told("leaf1", r#"{ "a": 1 }"#),
            told("edge1/modA", r#"{"b":null}"#)
        ]
    );
    let expected = json(r#"{"$version":2,"clients":{}}"#);
    eventually("the hub's own is sent", || {
        world
            .upstream
            .asked()
            .contains(&report(&id(OWN), r#"{"clients":{}}"#))
    })
    .await;
    eventually("and taken", || {
        world.upstream.reported(&id(OWN)) == expected
    })
    .await;
    world.stop().await;
}

#[tokio::test]
async fn nothing_stays_of_an_identity_that_left() {
    let world = World::new();
    world.upstream.set_online(false);
    world
        .twins
        .report(&leaf(), patch(r#"{"a":1}"#))
        .await
        .unwrap();
    world
        .twins
        .report(&id("leaf2"), patch(r#"{"a":1}"#))
        .await
        .unwrap();
    eventually("they were tried", || world.is_at_rest()).await;
    world.upstream.answer_only(0);
    let waiting = world.twins.get(&leaf());
    eventually("it waits", || {
        world.upstream.asked().contains(&Asked::Twin(leaf()))
    })
    .await;
    world.twins.removed(&leaf());
    assert_eq!(waiting.await.status, 404);
    eventually("it is over", || {
        world.store.get(Column::Twins, b"leaf1").unwrap().is_none()
    })
    .await;
    world.upstream.answer_all();
    let world = world.restart().await;
    assert!(world.store.get(Column::Twins, b"leaf1").unwrap().is_none());
    let unsynced: Vec<_> = world.twins.unsynced.lock().iter().cloned().collect();
    assert_eq!(unsynced, [id("leaf2")]);
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(reply["reported"]["a"], Value::Null);
    world.stop().await;
}

#[tokio::test]
async fn nothing_is_kept_in_memory_of_those_who_rest() {
    let world = World::new();
    for n in 0..50 {
        let identity = id(&format!("leaf{n}"));
        twin(&world.twins.get(&identity).await);
        world
            .twins
            .report(&identity, patch(r#"{"a":1}"#))
            .await
            .unwrap();
    }
    eventually("all is done", || world.is_at_rest()).await;
    let later = tokio::time::Instant::now().into_std() + Duration::from_secs(121);
    world.twins.sweep(later);
    assert_eq!(world.twins.slots.lock().len(), 0);
    world.stop().await;
}

#[tokio::test]
async fn twins_are_sealed() {
    let secret = "a-secret-of-the-twin";
    let world = World::new();
    world.upstream.set_online(false);
    let text = format!(r#"{{"key":"{secret}"}}"#);
    world.twins.report(&leaf(), patch(&text)).await.unwrap();
    let record = world.store.get(Column::Twins, b"leaf1").unwrap().unwrap();
    assert!(contains(&record, secret), "it is what was stored");
    let (folder, ..) = world.stop().await;
    for file in files(folder.path()) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!contains(&bytes, secret), "{}", file.display());
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes
        .windows(text.len())
        .any(|part| part == text.as_bytes())
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[tokio::test]
async fn a_damaged_record_is_fetched_anew() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":7,"x":1}"#, r#"{"$version":3}"#);
    let put = edgehub_storage::KvOp::Put {
        column: Column::Twins,
        key: b"leaf1".to_vec(),
        value: b"\xff\xff no record".to_vec(),
        sealed: false,
    };
    world.store.write(vec![put]).await.unwrap();
    world
        .twins
        .report(&leaf(), patch(r#"{"a":1}"#))
        .await
        .unwrap();
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(
        (&reply["desired"]["x"], &reply["reported"]["a"]),
        (&1.into(), &1.into())
    );
    world.stop().await;
}

/// Time passes by itself while everybody waits.
#[tokio::test(start_paused = true)]
async fn an_upstream_that_never_answers_keeps_nobody_waiting_for_ever() {
    let world = World::new();
    world.upstream.answer_only(0);
    world
        .twins
        .report(&leaf(), patch(r#"{"a":1}"#))
        .await
        .unwrap();
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(reply["reported"]["a"], 1);
    world.stop().await;
}

#[tokio::test]
async fn a_hub_that_stops_answers_who_waits() {
    let world = World::new();
    world.upstream.answer_only(0);
    let get = world.twins.get(&leaf());
    eventually("it waits", || !world.upstream.asked().is_empty()).await;
    let twins = Arc::clone(&world.twins);
    let stopping = tokio::spawn(async move { get.await.status });
    world.stop().await;
    assert_eq!(stopping.await.unwrap(), 503);
    let late = twins.report(&leaf(), patch(r#"{"a":1}"#)).await;
    assert_eq!(late, Err(TwinError::Stopping));
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn a_report_that_cannot_be_stored_is_not_taken() {
    let world = World::new();
    world.upstream.set_online(false);
    world
        .twins
        .report(&leaf(), patch(r#"{"a":1}"#))
        .await
        .unwrap();
    eventually("it was tried", || world.is_at_rest()).await;
    world.store.faults().fail_next(1);
    let refused = world.twins.report(&leaf(), patch(r#"{"a":2}"#)).await;
    assert_eq!(refused, Err(TwinError::NotStored));
    assert_eq!(world.changes.bodies().len(), 1);
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(reply["reported"]["a"], 1);
    world
        .twins
        .report(&leaf(), patch(r#"{"a":3}"#))
        .await
        .unwrap();
    let reply = twin(&world.twins.get(&leaf()).await);
    assert_eq!(reply["reported"]["a"], 3);
    world.stop().await;
}
