//! Desired properties through the whole service, with a real store.

use edgehub_storage::Column;

use super::DesiredDocument;
use super::fakes::{Asked, OWN, SYNC_PERIOD, World, eventually, leaf, patch, twin};
use super::limits::SYNCS_MAX;
use crate::hub::{Features, OfferError};
use crate::test_support::id;

const DESIRED: Features = Features {
    desired: true,
    methods: false,
    cloud_to_device: false,
    twin_responses: false,
    inputs: false,
};

#[tokio::test]
async fn desired_changes_reach_a_client_that_listens_and_wait_for_one_that_does_not() {
    let world = World::new();
    let told = |version: u64, patch: &str| (version, patch.to_owned());
    world
        .upstream
        .set(&leaf(), r#"{"$version":7,"a":7}"#, r#"{"$version":1}"#);
    world.outlet.set(&leaf(), None);
    twin(&world.twins.get(&leaf()).await);
    for version in 8..12 {
        let text = format!(r#"{{"$version":{version},"a":{version}}}"#);
        world.twins.desired(&leaf(), patch(&text));
    }
    let all: Vec<_> = (8..12)
        .map(|n| told(n, &format!(r#"{{"$version":{n},"a":{n}}}"#)))
        .collect();
    eventually("all are told", || world.outlet.desired(&leaf()) == all).await;

    world.outlet.set(&leaf(), Some(OfferError::NotConnected));
    world
        .twins
        .desired(&leaf(), patch(r#"{"$version":12,"a":null,"b":1}"#));
    world
        .twins
        .desired(&leaf(), patch(r#"{"$version":13,"b":2}"#));
    eventually("they are taken", || world.is_at_rest()).await;
    let world = world.restart().await;
    world.twins.subscribed(&leaf(), Features::default());
    eventually("nothing happens", || world.is_at_rest()).await;
    world.outlet.set(&leaf(), None);
    world.twins.subscribed(&leaf(), DESIRED);
    let missed = told(13, r#"{"$version":13,"a":null,"b":2}"#);
    eventually("it is told", || {
        world.outlet.desired(&leaf()).last() == Some(&missed)
    })
    .await;
    world.twins.subscribed(&leaf(), DESIRED);
    eventually("all is done", || world.is_at_rest()).await;
    assert_eq!(world.outlet.desired(&leaf()).len(), 5, "told once");
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_gets_its_twin_has_missed_nothing() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":7}"#, r#"{"$version":1}"#);
    twin(&world.twins.get(&leaf()).await);
    world
        .twins
        .desired(&leaf(), patch(r#"{"$version":8,"a":8}"#));
    eventually("it is taken", || world.is_at_rest()).await;
    world.upstream.set_online(false);
    assert_eq!(twin(&world.twins.get(&leaf()).await)["desired"]["a"], 8);
    world.outlet.set(&leaf(), None);
    world.twins.subscribed(&leaf(), DESIRED);
    eventually("all is done", || world.is_at_rest()).await;
    assert_eq!(world.outlet.desired(&leaf()), []);
    world.stop().await;
}

/// As Python does after a reconnect, as long as its application has not asked itself.
#[tokio::test]
async fn a_client_that_does_not_hear_the_answer_is_told_what_it_missed() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":7}"#, r#"{"$version":1}"#);
    twin(&world.twins.get(&leaf()).await);
    world.outlet.set_deaf(&leaf());
    world
        .upstream
        .set(&leaf(), r#"{"$version":8,"a":8}"#, r#"{"$version":1}"#);
    twin(&world.twins.get(&leaf()).await);
    let told = vec![(8, r#"{"$version":8,"a":8}"#.to_owned())];
    eventually("it is told", || world.outlet.desired(&leaf()) == told).await;

    // Nor does one that takes no changes now have them: they wait until it does.
    world.outlet.set(&leaf(), Some(OfferError::NotSubscribed));
    world
        .upstream
        .set(&leaf(), r#"{"$version":9,"a":9}"#, r#"{"$version":1}"#);
    twin(&world.twins.get(&leaf()).await);
    world.outlet.set(&leaf(), None);
    world.twins.subscribed(&leaf(), DESIRED);
    let last = (9, r#"{"$version":9,"a":9}"#.to_owned());
    eventually("it is told again", || {
        world.outlet.desired(&leaf()).last() == Some(&last)
    })
    .await;
    world.stop().await;
}

#[tokio::test]
async fn a_client_with_a_full_outbox_is_told_when_it_reads_again() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":7}"#, r#"{"$version":1}"#);
    twin(&world.twins.get(&leaf()).await);
    world.outlet.set(&leaf(), Some(OfferError::Full));
    world
        .twins
        .desired(&leaf(), patch(r#"{"$version":8,"a":8}"#));
    eventually("it was offered", || {
        let stored = world.store.get(Column::Twins, b"leaf1").unwrap();
        stored.is_some_and(|record| String::from_utf8_lossy(&record).contains("\"a\":8"))
    })
    .await;
    world.outlet.set(&leaf(), None);
    let told = vec![(8, r#"{"$version":8,"a":8}"#.to_owned())];
    eventually("it is told", || world.outlet.desired(&leaf()) == told).await;
    world.stop().await;
}

#[tokio::test]
async fn a_gap_is_closed_by_the_whole_twin() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":7,"a":7}"#, r#"{"$version":1}"#);
    world.outlet.set(&leaf(), None);
    twin(&world.twins.get(&leaf()).await);
    world
        .upstream
        .set(&leaf(), r#"{"$version":9,"b":9}"#, r#"{"$version":1}"#);
    world
        .twins
        .desired(&leaf(), patch(r#"{"$version":9,"b":9}"#));
    let told = vec![(9, r#"{"$version":9,"a":null,"b":9}"#.to_owned())];
    eventually("the difference is told", || {
        world.outlet.desired(&leaf()) == told
    })
    .await;
    assert_eq!(world.upstream.fetch_times().len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn two_hundred_identities_are_synchronised_at_once_with_one_fetch_each() {
    let world = World::new();
    let all: Vec<_> = (0..200).map(|n| id(&format!("leaf{n}"))).collect();
    for identity in &all {
        world
            .twins
            .report(identity, patch(r#"{"a":1}"#))
            .await
            .unwrap();
    }
    eventually("the reports are there", || world.is_at_rest()).await;
    let before = world.upstream.asked().len();
    world.upstream.answer_only(0);
    for identity in &all {
        world.twins.established(identity);
        world.twins.established(identity);
    }
    eventually("as many as may ask", || {
        world.upstream.asked().len() == before + SYNCS_MAX
    })
    .await;
    // A client does not wait behind those who only synchronise.
    let get = world.twins.get(&id("hurried"));
    eventually("the client's turn", || {
        world.upstream.asked().contains(&Asked::Twin(id("hurried")))
    })
    .await;
    world.upstream.answer_all();
    twin(&get.await);
    eventually("all is done", || world.is_at_rest()).await;
    assert_eq!(world.upstream.fetch_times().len(), all.len() + 1);
    assert_eq!(world.upstream.under_way_max(), SYNCS_MAX + 1);
    world.stop().await;
}

#[tokio::test]
async fn new_sessions_do_not_fetch_too_often_but_do_fetch() {
    let world = World::new();
    world
        .upstream
        .set(&leaf(), r#"{"$version":7}"#, r#"{"$version":1}"#);
    world.outlet.set(&leaf(), None);
    world.twins.established(&leaf());
    eventually("the first fetch", || {
        world.upstream.fetch_times().len() == 1
    })
    .await;
    world
        .upstream
        .set(&leaf(), r#"{"$version":8,"a":8}"#, r#"{"$version":1}"#);
    world.twins.established(&leaf());
    let told = vec![(8, r#"{"$version":8,"a":8}"#.to_owned())];
    eventually("it is told", || world.outlet.desired(&leaf()) == told).await;
    let times = world.upstream.fetch_times();
    assert_eq!(times.len(), 2);
    assert!(times[1] - times[0] >= SYNC_PERIOD);
    world.stop().await;
}

#[tokio::test]
async fn the_hubs_own_desired_properties_can_be_watched_and_last() {
    let world = World::new();
    let document = |version, json: &str| {
        Some(DesiredDocument {
            version,
            json: patch(json),
        })
    };
    let own = id(OWN);
    let mut watch = world.twins.own_desired();
    assert_eq!(*watch.borrow_and_update(), None);
    world.upstream.set(
        &own,
        r#"{"$version":3,"routes":{"a":"x"}}"#,
        r#"{"$version":1}"#,
    );
    world.twins.established(&own);
    watch.changed().await.unwrap();
    let fetched = document(3, r#"{"$version":3,"routes":{"a":"x"}}"#);
    assert_eq!(*watch.borrow_and_update(), fetched);
    world
        .twins
        .desired(&own, patch(r#"{"$version":4,"routes":{"a":null,"b":"y"}}"#));
    watch.changed().await.unwrap();
    let patched = document(4, r#"{"$version":4,"routes":{"b":"y"}}"#);
    assert_eq!(*watch.borrow_and_update(), patched);
    // What a client of this name is told is nothing, and nothing is remembered for it.
    world.twins.removed(&own);
    world.upstream.set_online(false);
    let world = world.restart().await;
    assert_eq!(*world.twins.own_desired().borrow(), patched);
    world.stop().await;
}
