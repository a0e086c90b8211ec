//! What [`TwinSync`] decides about desired properties, event by event.

use std::time::Duration;

use edgehub_proto::clock::Clock;

use super::document::{Fetched, Twin};
use super::limits::HELD_PATCHES_MAX;
use super::outcome::Next;
use super::sync::TwinSync;
use super::sync_rig::{FETCH_PERIOD, Rig, TIMING, answered, forward, twin, unavailable};
use super::test_support::json;
use crate::hub::OfferError;

#[test]
fn the_next_desired_patch_is_merged_and_forwarded_as_it_came() {
    let mut rig = Rig::fetched(r#"{"$version":7,"a":1,"b":{"c":1}}"#, r#"{"$version":1}"#);
    let patch = r#"{ "b":{"c":null,"d":2}, "$version":8 }"#;
    assert_eq!(rig.desired(patch), forward(8, patch));
    rig.forwarded(Ok(()));
    let expected = json(r#"{"$version":8,"a":1,"b":{"d":2}}"#);
    assert_eq!(*rig.stored_desired(), expected);
    assert_eq!(rig.next(), Next::Idle);
    assert_eq!(rig.forward(), None);
}

/// spec/core.md 5.4, with the reference's example for the gap.
#[test]
fn a_gap_a_duplicate_or_a_lower_version_fetches_the_twin_and_forwards_the_difference() {
    for version in [2, 0, 9] {
        let mut rig = Rig::new();
        // By hand: an upstream that says version 0 means that it does not know.
        rig.twin.desired = Some(json(r#"{"$version":0,"p0":"vp0"}"#));
        let patch = format!(r#"{{"p1":"vp1","$version":{version}}}"#);
        assert_eq!(rig.desired(&patch), None);
        assert_eq!(rig.next(), Next::Fetch { for_client: false }, "at once");
        let new = r#"{"$version":2,"p1":"vp1","p2":"vp2","p3":"vp3"}"#;
        assert!(rig.fetch(Ok(twin(new, r#"{"$version":1}"#))).forward);
        let diff = r#"{"$version":2,"p0":null,"p1":"vp1","p2":"vp2","p3":"vp3"}"#;
        assert_eq!(rig.forward(), forward(2, diff));
        rig.forwarded(Ok(()));
        assert_eq!(rig.next(), Next::Idle);
    }
}

/// The way from the client to the upstream has two subscriptions: what changes between them is
/// not told to anybody.
#[test]
fn after_a_client_subscribed_the_session_fetches_at_once_and_later_ones_in_their_time() {
    let mut rig = Rig::fetched(r#"{"$version":2,"a":1}"#, r#"{"$version":1}"#);
    rig.sync.subscribed();
    assert_eq!(rig.next(), Next::Idle);
    rig.sync.established();
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
    let new = twin(r#"{"$version":3,"a":2}"#, r#"{"$version":1}"#);
    assert!(rig.fetch(Ok(new)).forward);
    assert_eq!(rig.forward(), forward(3, r#"{"$version":3,"a":2}"#));
    rig.forwarded(Ok(()));
    rig.sync.established();
    assert_eq!(rig.pause(), FETCH_PERIOD);
}

#[test]
fn a_difference_of_nothing_is_not_forwarded() {
    let mut rig = Rig::fetched(r#"{"$version":7,"a":1}"#, r#"{"$version":1}"#);
    assert_eq!(rig.desired(r#"{"a":1,"$version":7}"#), None);
    rig.fetch(Ok(twin(r#"{"$version":7,"a":1}"#, r#"{"$version":1}"#)));
    assert_eq!(rig.forward(), None);
    assert_eq!(rig.twin.missed, None);
}

#[test]
fn a_twin_made_anew_counts_from_one_again() {
    let mut rig = Rig::fetched(r#"{"$version":7,"a":1}"#, r#"{"$version":5,"r":1}"#);
    rig.sync.lost();
    rig.fetch(Ok(twin(r#"{"$version":1}"#, r#"{"$version":1}"#)));
    assert_eq!(rig.forward(), forward(1, r#"{"$version":1,"a":null}"#));
    assert_eq!(rig.twin.reported, json(r#"{"$version":1}"#));
}

#[test]
fn without_a_stored_twin_a_patch_is_forwarded_and_not_stored() {
    let mut rig = Rig::new();
    let patch = r#"{"a":1,"$version":8}"#;
    assert_eq!(rig.desired(patch), forward(8, patch));
    rig.forwarded(Ok(()));
    assert_eq!(rig.twin, Twin::default());
    // Also while the twin is fetched: nobody could tell the difference afterwards.
    rig.sync.begin_fetch();
    let patch = r#"{"a":2,"$version":9}"#;
    assert_eq!(rig.desired(patch), forward(9, patch));
}

#[test]
fn what_is_no_patch_is_not_forwarded_but_the_twin_fetched() {
    for bad in [
        "",
        "[]",
        "{",
        r#"{"a":1}"#,
        r#"{"a":1,"$version":"8"}"#,
        r#"{"$version":1.5}"#,
    ] {
        let mut rig = Rig::fetched(r#"{"$version":7}"#, r#"{"$version":1}"#);
        assert_eq!(rig.desired(bad), None);
        assert_eq!(rig.next(), Next::Fetch { for_client: false }, "{bad}");
        let mut rig = Rig::new();
        assert_eq!(rig.desired(bad), None);
        assert_eq!(rig.next(), Next::Fetch { for_client: false }, "{bad}");
    }
}

#[test]
fn patches_that_come_during_a_fetch_wait_for_it() {
    let mut rig = Rig::fetched(r#"{"$version":7,"a":7}"#, r#"{"$version":1}"#);
    rig.sync.ask();
    rig.sync.begin_fetch();
    for version in [8, 9, 10] {
        let patch = format!(r#"{{"a":{version},"$version":{version}}}"#);
        assert_eq!(rig.desired(&patch), None);
    }
    // The answer was made between the second and the third.
    let outcome = rig.answer(Ok(twin(r#"{"$version":9,"a":9}"#, r#"{"$version":1}"#)));
    let newest = answered(r#"{"$version":10,"a":10}"#, r#"{"$version":1}"#);
    assert_eq!(outcome.answer, newest);
    assert!(outcome.forward);
    assert_eq!(rig.forward(), forward(10, r#"{"$version":10,"a":10}"#));
    rig.forwarded(Ok(()));
    assert_eq!(rig.next(), Next::Idle);
}

#[test]
fn patches_that_waited_for_a_fetch_that_failed_count_as_if_it_had_not_been() {
    let mut rig = Rig::fetched(r#"{"$version":7,"a":7}"#, r#"{"$version":1}"#);
    rig.sync.begin_fetch();
    rig.desired(r#"{"a":8,"$version":8}"#);
    rig.desired(r#"{"a":10,"$version":10}"#);
    let outcome = rig.answer(Err(unavailable()));
    assert!(outcome.forward);
    assert_eq!(rig.forward(), forward(8, r#"{"$version":8,"a":8}"#));
    rig.forwarded(Ok(()));
    assert_eq!(
        rig.pause(),
        Duration::from_secs(1),
        "the gap is still there"
    );
}

#[test]
fn too_many_patches_during_a_fetch_are_one_more_fetch() {
    let mut rig = Rig::fetched(r#"{"$version":1}"#, r#"{"$version":1}"#);
    rig.sync.begin_fetch();
    for version in 2..3 + HELD_PATCHES_MAX {
        rig.desired(&format!(r#"{{"$version":{version}}}"#));
    }
    rig.answer(Ok(twin(r#"{"$version":2}"#, r#"{"$version":1}"#)));
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
}

#[test]
fn what_a_client_missed_it_is_told_when_it_subscribes() {
    for refusal in [OfferError::NotConnected, OfferError::NotSubscribed] {
        let mut rig = Rig::fetched(r#"{"$version":7,"a":7,"b":7}"#, r#"{"$version":1}"#);
        for patch in [
            r#"{"a":8,"$version":8}"#,
            r#"{"b":null,"c":{"d":9},"$version":9}"#,
            r#"{"a":7,"$version":10}"#,
        ] {
            assert!(rig.desired(patch).is_some());
            rig.forwarded(Err(refusal));
            assert_eq!(rig.next(), Next::Idle);
        }
        // Also after a restart of the hub.
        rig.twin = Twin::decode(&rig.twin.encode().unwrap()).unwrap();
        rig.sync = TwinSync::new(TIMING, false, false);
        let missed = r#"{"$version":10,"b":null,"c":{"d":9}}"#;
        assert_eq!(rig.forward(), forward(10, missed));
        rig.forwarded(Ok(()));
        assert_eq!(rig.forward(), None, "once");
    }
}

#[test]
fn a_client_that_gets_its_twin_has_missed_nothing() {
    let mut rig = Rig::fetched(r#"{"$version":7}"#, r#"{"$version":1}"#);
    rig.desired(r#"{"a":8,"$version":8}"#);
    rig.forwarded(Err(OfferError::NotSubscribed));
    rig.get(Err(unavailable()));
    assert_eq!(rig.forward(), None);
    rig.get(Ok(twin(r#"{"$version":9}"#, r#"{"$version":1}"#)));
    assert_eq!(rig.forward(), None);
}

#[test]
fn a_client_that_does_not_take_its_events_is_offered_them_again() {
    let mut rig = Rig::fetched(r#"{"$version":7}"#, r#"{"$version":1}"#);
    assert!(rig.desired(r#"{"a":8,"$version":8}"#).is_some());
    rig.forwarded(Err(OfferError::Full));
    for seconds in [1, 2, 4] {
        assert_eq!(rig.pause(), Duration::from_secs(seconds));
        rig.clock.advance(rig.pause());
        assert_eq!(rig.next(), Next::Forward);
        assert_eq!(rig.forward(), forward(8, r#"{"$version":8,"a":8}"#));
        rig.forwarded(Err(OfferError::Full));
    }
    assert_eq!(
        rig.desired(r#"{"b":9,"$version":9}"#),
        forward(9, r#"{"$version":9,"a":8,"b":9}"#),
        "with what it missed"
    );
    rig.forwarded(Ok(()));
    assert_eq!(rig.next(), Next::Idle);
    // A patch that the client could not take before its twin was ever fetched.
    let mut rig = Rig::new();
    rig.desired(r#"{"a":8,"$version":8}"#);
    rig.forwarded(Err(OfferError::Full));
    rig.sync.established();
    rig.fetch(Ok(twin(r#"{"$version":8,"a":8}"#, r#"{"$version":1}"#)));
    assert_eq!(rig.forward(), forward(8, r#"{"$version":8,"a":8}"#));
}

#[test]
fn a_new_session_sends_reports_first_and_fetches_not_too_often() {
    let mut rig = Rig::new();
    rig.report(r#"{"a":1}"#);
    rig.sync.established();
    rig.send();
    rig.sent(Ok(Some(2)));
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
    rig.fetch(Ok(twin(
        r#"{"$version":7,"a":1}"#,
        r#"{"$version":2,"a":1}"#,
    )));
    assert_eq!(rig.forward(), None, "nobody knows what the client knows");
    rig.clock.advance(Duration::from_secs(20));
    rig.sync.established();
    // Later, not never: something may have changed in between.
    assert_eq!(rig.pause(), FETCH_PERIOD - Duration::from_secs(20));
    assert!(!rig.sync.is_stale(rig.clock.instant()));
    // A gap does not wait.
    rig.desired(r#"{"$version":9}"#);
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
    rig.fetch(Ok(twin(r#"{"$version":9}"#, r#"{"$version":2,"a":1}"#)));
    assert_eq!(rig.forward(), forward(9, r#"{"$version":9,"a":null}"#));
    rig.forwarded(Ok(()));
    assert_eq!(rig.next(), Next::Idle);
    rig.clock.advance(FETCH_PERIOD);
    assert!(rig.sync.is_stale(rig.clock.instant()));
}

#[test]
fn the_hubs_own_twin_has_no_client() {
    let mut rig = Rig::new();
    rig.sync = TwinSync::new(TIMING, true, false);
    rig.sync.ask();
    rig.fetch(Ok(twin(r#"{"$version":1}"#, r#"{"$version":1}"#)));
    rig.sync.answered(&mut rig.twin);
    assert_eq!(rig.desired(r#"{"a":1,"$version":2}"#), None);
    assert_eq!(*rig.stored_desired(), json(r#"{"$version":2,"a":1}"#));
    assert_eq!(rig.desired(r#"{"$version":9}"#), None);
    rig.fetch(Ok(twin(r#"{"$version":9}"#, r#"{"$version":1}"#)));
    assert_eq!(rig.forward(), None);
    assert_eq!(rig.twin.missed, None);
}

#[test]
fn what_could_not_be_stored_is_fetched_again_but_not_at_once() {
    let mut rig = Rig::fetched(r#"{"$version":7}"#, r#"{"$version":1}"#);
    let before = rig.twin.clone();
    rig.desired(r#"{"a":8,"$version":8}"#);
    rig.forwarded(Ok(()));
    rig.twin = before;
    let now = rig.now();
    rig.sync.not_stored(now);
    assert_eq!(rig.pause(), Duration::from_secs(120));
    rig.clock.advance(rig.pause());
    assert_eq!(rig.sync.begin_report(&rig.twin), None);
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
    let fetched = rig.fetch(Ok(twin(r#"{"$version":8,"a":8}"#, r#"{"$version":1}"#)));
    assert!(fetched.forward);
    assert!(Fetched::parse(&rig.twin.body()).unwrap().is_known());
}
