//! What [`TwinSync`] decides about reports and requests for a twin, event by event.

use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::UpstreamError;

use super::TwinError;
use super::limits::ERASED_BYTES_MAX;
use super::outcome::{Answer, Next, ReportOutcome};
use super::sync_rig::{FETCH_PERIOD, REPORT_PERIOD, Rig, answered, forward, twin, unavailable};
use super::test_support::json;

#[test]
fn a_report_counts_here_at_once_and_its_nulls_reach_the_upstream() {
    let mut rig = Rig::fetched(r#"{"$version":3}"#, r#"{"$version":2,"old":1,"keep":1}"#);
    rig.report(r#"{"old":null,"new":{"a":1,"b":null}}"#);
    let expected = json(r#"{"$version":2,"keep":1,"new":{"a":1}}"#);
    assert_eq!(rig.twin.reported, expected);
    assert_eq!(rig.send(), r#"{"new":{"a":1,"b":null},"old":null}"#);
    assert_eq!(rig.sent(Ok(Some(3))), ReportOutcome::Confirmed);
    assert!(rig.twin.unsynced.is_empty());
    let expected = json(r#"{"$version":3,"keep":1,"new":{"a":1}}"#);
    assert_eq!(rig.twin.reported, expected);
    assert_eq!(rig.next(), Next::Idle);
}

#[test]
fn what_comes_while_reports_are_sent_adds_up_and_goes_next() {
    let mut rig = Rig::new();
    rig.report(r#"{"a":1,"b":1}"#);
    rig.report(r#"{"b":2}"#);
    assert_eq!(rig.send(), r#"{"a":1,"b":2}"#);
    rig.report(r#"{"b":3}"#);
    rig.report(r#"{"a":null}"#);
    assert_eq!(rig.next(), Next::Idle, "one request at a time");
    assert_eq!(rig.sent(Ok(None)), ReportOutcome::Confirmed);
    assert_eq!(rig.pause(), REPORT_PERIOD);
    rig.clock.advance(REPORT_PERIOD);
    assert_eq!(rig.send(), r#"{"a":null,"b":3}"#);
    rig.report(r#"{"c":1}"#);
    assert_eq!(rig.sent(Err(unavailable())), ReportOutcome::Failed);
    rig.clock.advance(rig.pause());
    assert_eq!(rig.send(), r#"{"a":null,"b":3,"c":1}"#, "all of it again");
}

#[test]
fn reports_that_fail_are_sent_again_with_growing_pauses_and_at_once_on_a_new_session() {
    let mut rig = Rig::new();
    rig.report(r#"{"a":1}"#);
    for seconds in [1, 2, 4, 8] {
        rig.send();
        rig.sent(Err(UpstreamError::Busy { status: 429 }));
        assert_eq!(rig.pause(), Duration::from_secs(seconds));
        rig.clock.advance(rig.pause());
    }
    rig.send();
    rig.sent(Err(unavailable()));
    rig.sync.established();
    assert_eq!(rig.send(), r#"{"a":1}"#);
    rig.online = false;
    rig.sent(Err(unavailable()));
    assert_eq!(
        rig.next(),
        Next::Fetch { for_client: false },
        "established wants it"
    );
    rig.fetch(Err(unavailable()));
    rig.clock.advance(Duration::from_secs(86_400));
    assert_eq!(rig.next(), Next::Idle, "nothing is tried without a link");
    assert!(rig.sync.waits_for_upstream());
    rig.sync.online();
    assert_eq!(rig.send(), r#"{"a":1}"#);
}

#[test]
fn reports_refused_for_good_are_dropped_and_the_upstream_is_believed() {
    let mut rig = Rig::fetched(r#"{"$version":1}"#, r#"{"$version":1}"#);
    rig.report(r#"{"bad":1}"#);
    rig.send();
    rig.report(r#"{"good":2}"#);
    let refused = UpstreamError::Refused { status: 400 };
    let dropped = ReportOutcome::Dropped { status: 400 };
    assert_eq!(rig.sent(Err(refused)), dropped);
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
    rig.fetch(Ok(twin(r#"{"$version":1}"#, r#"{"$version":1}"#)));
    let expected = json(r#"{"$version":1,"good":2}"#);
    assert_eq!(rig.twin.reported, expected);
    rig.clock.advance(REPORT_PERIOD);
    assert_eq!(rig.send(), r#"{"good":2}"#);
}

#[test]
fn a_refused_identity_keeps_its_reports() {
    for status in [401, 403, 404] {
        let mut rig = Rig::new();
        rig.report(r#"{"a":1}"#);
        rig.send();
        let refused = UpstreamError::Refused { status };
        assert_eq!(rig.sent(Err(refused)), ReportOutcome::Failed);
        assert_eq!(rig.pause(), Duration::from_secs(600));
        rig.sync.established();
        assert_eq!(rig.send(), r#"{"a":1}"#);
    }
}

#[test]
fn what_cannot_be_said_in_one_patch_is_sent_in_two() {
    let mut rig = Rig::new();
    rig.report(r#"{"a":null}"#);
    rig.report(r#"{"a":{"x":1}}"#);
    assert_eq!(rig.send(), r#"{"a":null}"#);
    rig.report(r#"{"b":1}"#);
    let rest = Bytes::from_static(br#"{"a":{"x":1}}"#);
    assert_eq!(rig.sent(Ok(Some(2))), ReportOutcome::Continue(rest.clone()));
    // Half of it arrived: all of it is sent again.
    assert_eq!(rig.sent(Err(unavailable())), ReportOutcome::Failed);
    rig.clock.advance(rig.pause());
    assert_eq!(rig.send(), r#"{"a":null}"#);
    let rest = Bytes::from_static(br#"{"a":{"x":1},"b":1}"#);
    assert_eq!(rig.sent(Ok(Some(3))), ReportOutcome::Continue(rest));
    assert_eq!(rig.sent(Ok(Some(4))), ReportOutcome::Confirmed);
    assert!(rig.twin.unsynced.is_empty());
}

#[test]
fn a_twin_may_not_outgrow_its_limit_by_many_patches() {
    let mut rig = Rig::new();
    let part = "x".repeat(4000);
    for n in 0..8 {
        rig.report(&format!(r#"{{"k{n}":"{part}"}}"#));
    }
    let before = rig.twin.clone();
    let patch = json(&format!(r#"{{"k8":"{part}"}}"#));
    let refused = rig.sync.report(&mut rig.twin, &patch).unwrap_err();
    assert_eq!(refused.status(), 400);
    assert_eq!(
        refused.to_string(),
        "Twin properties size 36018 exceeds maximum 32768"
    );
    assert_eq!(rig.twin, before, "nothing of it counts");
    rig.report(r#"{"k0":null}"#);
    rig.sync.report(&mut rig.twin, &patch).unwrap();
}

#[test]
fn deletions_that_wait_for_the_upstream_are_bounded() {
    let mut rig = Rig::new();
    let name = "n".repeat(1000);
    let refused = (0..1000).find_map(|n| {
        rig.report(&format!(r#"{{"{name}{n}":1}}"#));
        let patch = json(&format!(r#"{{"{name}{n}":null}}"#));
        rig.sync.report(&mut rig.twin, &patch).err()
    });
    assert_eq!(refused, Some(TwinError::TooMuchUnsynced));
    assert!(rig.twin.unsynced.erase().text_length() <= ERASED_BYTES_MAX);
    assert_eq!(refused.unwrap().status(), 429);
}

#[test]
fn a_client_gets_the_upstreams_twin_as_it_came() {
    let mut rig = Rig::new();
    let came = Bytes::from_static(
        br#"{ "reported":{"$version":3,"x":1.50},"desired":{"$version":7,"b":2,"a":1} }"#,
    );
    assert_eq!(rig.get(Ok(came.clone())), Answer::Twin(came));
    assert_eq!(*rig.stored_desired(), json(r#"{"$version":7,"a":1,"b":2}"#));
    // Without a link the copy.
    let copy = answered(
        r#"{"$version":7,"a":1,"b":2}"#,
        r#"{"$version":3,"x":1.50}"#,
    );
    assert_eq!(rig.get(Err(unavailable())), copy);
    assert_eq!(rig.get(Err(UpstreamError::Busy { status: 503 })), copy);
    assert_eq!(rig.get(Ok("no twin".into())), copy);
}

#[test]
fn reports_on_their_way_are_laid_over_what_the_upstream_has() {
    let mut rig = Rig::new();
    rig.report(r#"{"a":null,"b":2}"#);
    rig.send();
    rig.report(r#"{"c":3}"#);
    rig.sent(Err(unavailable()));
    let fetched = twin(r#"{"$version":7}"#, r#"{"$version":3,"a":1,"b":1}"#);
    let expected = answered(r#"{"$version":7}"#, r#"{"$version":3,"b":2,"c":3}"#);
    assert_eq!(rig.get(Ok(fetched)), expected);
    assert_eq!(rig.get(Err(unavailable())), expected);
}

#[test]
fn a_twin_that_was_never_fetched_is_what_was_reported_here() {
    let mut rig = Rig::new();
    let nothing = answered(r#"{"$version":0}"#, r#"{"$version":0}"#);
    assert_eq!(rig.get(Err(unavailable())), nothing);
    rig.report(r#"{"a":1}"#);
    let reported = answered(r#"{"$version":0}"#, r#"{"$version":0,"a":1}"#);
    assert_eq!(rig.get(Err(unavailable())), reported);
    // The client was told that nothing is desired: it hears when more is known.
    rig.sync.established();
    rig.send();
    rig.sent(Ok(Some(2)));
    assert_eq!(rig.next(), Next::Fetch { for_client: false });
    let outcome = rig.fetch(Ok(twin(
        r#"{"$version":4,"x":1}"#,
        r#"{"$version":2,"a":1}"#,
    )));
    assert!(outcome.forward);
    assert_eq!(rig.forward(), forward(4, r#"{"$version":4,"x":1}"#));
}

#[test]
fn a_parent_that_does_not_know_the_twin_deletes_nothing() {
    for unknown in [
        r#"{"desired":{},"reported":{}}"#,
        r#"{"desired":{"$version":0},"reported":{"$version":0}}"#,
    ] {
        let mut rig = Rig::fetched(r#"{"$version":7,"a":1}"#, r#"{"$version":3,"r":1}"#);
        let before = rig.twin.clone();
        let copy = answered(r#"{"$version":7,"a":1}"#, r#"{"$version":3,"r":1}"#);
        assert_eq!(rig.get(Ok(unknown.into())), copy);
        assert_eq!(rig.twin, before);
        rig.sync.established();
        rig.clock.advance(FETCH_PERIOD);
        assert!(!rig.fetch(Ok(unknown.into())).forward);
        assert_eq!(rig.twin, before);
        assert_eq!(rig.pause(), Duration::from_secs(1), "it is asked again");
    }
}

#[test]
fn a_definite_no_and_a_429_are_passed_on() {
    let mut rig = Rig::fetched(r#"{"$version":7}"#, r#"{"$version":3}"#);
    for (error, status) in [
        (UpstreamError::Refused { status: 404 }, 404),
        (UpstreamError::Busy { status: 429 }, 429),
    ] {
        assert_eq!(rig.get(Err(error)), Answer::Refused { status });
    }
    rig.sync.established();
    rig.clock.advance(FETCH_PERIOD);
    rig.fetch(Err(UpstreamError::Refused { status: 404 }));
    assert_eq!(rig.next(), Next::Idle, "nobody asks again by himself");
}

#[test]
fn a_get_is_answered_with_what_was_fetched_after_it() {
    let mut rig = Rig::new();
    rig.sync.ask();
    rig.sync.begin_fetch();
    rig.sync.ask();
    rig.sync.ask();
    assert_eq!(rig.next(), Next::Idle);
    rig.answer(Ok(twin(r#"{"$version":7}"#, r#"{"$version":3}"#)));
    assert_eq!(rig.next(), Next::Fetch { for_client: true });
    rig.fetch(Err(unavailable()));
    assert_eq!(rig.next(), Next::Idle, "one fetch for both");
}
