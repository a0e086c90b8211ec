//! Stories about lanes that listen, in the world of `model_tests`.

use std::time::Duration;

use super::model_tests::{Nature, World, sender, small_config};
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const METHODS: u8 = 2;

/// A need opens a connection, which stays for days, is renewed and comes back after every loss,
/// without anything being sent.
#[test]
fn a_need_keeps_a_connection_for_days() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    assert_eq!(world.opens.len(), 1);
    for _ in 0..300 {
        world.run_for(Duration::from_secs(100));
        // At most a renewal is under way.
        world.run_until(SECOND, "connection", |world| world.listens(0));
    }
    let renewals = world.opens.len();
    world.lose(0);
    assert!(!world.listens(0));
    world.run_until(SECOND, "reconnect", |world| world.listens(0));
    assert_eq!(world.opens.len(), renewals + 1);
}

/// Another need is told to the living session; the last one that goes closes it a minute later, not
/// after the hour that an idle sender's connection is kept.
#[test]
fn changed_needs_are_told_and_a_released_connection_is_closed_soon() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.credential_ms = None;
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    world.need(0, 7);
    world.round();
    assert!(world.listens(0), "the session knows");
    world.run_for(Duration::from_secs(4000));
    world.need(0, 0);
    world.run_for(Duration::from_secs(59));
    assert_eq!(world.sessions.len(), 1, "kept for a client that comes back");
    world.need(0, METHODS);
    world.run_for(Duration::from_secs(100));
    assert_eq!(world.opens.len(), 1, "it is the same one");
    world.need(0, 0);
    world.run_for(Duration::from_secs(61));
    assert_eq!(world.sessions.len(), 0);
    assert_eq!(world.scheduler.counts().lanes, 0);
}

/// A client that comes and goes while its lane backs off does not make it try more often.
#[test]
fn flapping_needs_do_not_cut_a_back_off_short() {
    let mut world = World::new(small_config(), 1, &[Nature::Refused]);
    world.need(0, METHODS);
    world.run_for(Duration::from_secs(20));
    let opens = world.opens.len();
    for _ in 0..500 {
        world.need(0, 0);
        world.round();
        world.need(0, METHODS);
        world.round();
        world.now_ms += 20;
    }
    let more = world.opens.len() - opens;
    assert!((2..=5).contains(&more), "{more} attempts in ten seconds");
    // Without needs it is forgotten some time after its wait is over.
    world.need(0, 0);
    world.run_for(Duration::from_secs(36));
    assert_eq!(world.scheduler.counts().lanes, 0);
}

/// Needs that flap while no connection is to be had leave nothing behind.
#[test]
fn flapping_needs_do_not_fill_the_row() {
    let natures = [
        Nature::Slow,
        Nature::Slow,
        Nature::Slow,
        Nature::Slow,
        Nature::Good,
    ];
    let mut world = World::new(small_config(), 1, &natures);
    for who in 0..4 {
        world.need(who, METHODS);
    }
    world.run_until(SECOND, "all connections", |world| world.sessions.len() == 4);
    for _ in 0..1000 {
        world.need(4, METHODS);
        world.turn();
        world.need(4, 0);
        world.turn();
    }
    assert_eq!(world.scheduler.counts().lanes, 4);
}

/// With all connections in use, those go first that are idle and that nobody needs.
#[test]
fn a_needed_connection_goes_last() {
    let natures = [Nature::Good; 6];
    let mut world = World::new(small_config(), 1, &natures);
    world.need(0, METHODS);
    world.need(1, METHODS);
    for who in [2, 3] {
        world.append(0, who, 10, None);
    }
    world.run_until_good_are_settled(Duration::from_secs(2));
    world.run_for(Duration::from_secs(3));
    assert_eq!(world.sessions.len(), 4);
    for who in [4, 5] {
        world.append(0, who, 10, None);
    }
    world.run_until_good_are_settled(Duration::from_secs(2));
    assert!(world.listens(0) && world.listens(1));
    // Four lanes with needs and one with work: each has its turn.
    for who in [2, 3] {
        world.need(who, METHODS);
    }
    world.run_until(Duration::from_secs(10), "all with needs", |world| {
        world.deaf().is_empty()
    });
    world.append(0, 4, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(10));
    world.run_until(Duration::from_secs(10), "the one that gave way", |world| {
        world.deaf().is_empty()
    });
}

/// A connection that somebody listens on stays as long as there is a busy one that has had its turn,
/// although it is the older one.
#[test]
fn a_busy_connection_goes_before_one_that_is_needed() {
    let natures = [
        Nature::Good,
        Nature::Good,
        Nature::Slow,
        Nature::Slow,
        Nature::Good,
    ];
    let mut world = World::new(small_config(), 1, &natures);
    for who in [0, 1] {
        world.need(who, METHODS);
    }
    world.run_until(SECOND, "listeners", |world| world.deaf().is_empty());
    let listening: Vec<SessionId> = world.sessions.keys().copied().collect();
    for who in [2, 3] {
        world.append(0, who, 10, None);
    }
    world.run_until(SECOND, "senders", |world| world.sessions.len() == 4);
    // Longer than the lease.
    world.run_for(Duration::from_secs(3));
    world.append(0, 4, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(5));
    let kept = |session: &SessionId| world.sessions.contains_key(session);
    assert!(listening.iter().all(kept));
}

/// A session that waits for an answer from below is renewed only when there is no time left.
#[test]
fn a_renewal_waits_for_answers_from_below() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    let session = *world.sessions.keys().next().unwrap();
    world.scheduler.engaged(session, true);
    // The credential lives 60 s: renewed after 30 s to 51 s, with something open after 57 s.
    while world.now_ms < 56_500 {
        world.round();
        world.now_ms += 100;
        assert!(world.sessions.contains_key(&session), "at {}", world.now_ms);
    }
    world.run_for(Duration::from_secs(3));
    assert!(!world.sessions.contains_key(&session));
    assert!(world.listens(0));
    // Its successor is not engaged.
    let session = *world.sessions.keys().next().unwrap();
    world.run_for(Duration::from_secs(53));
    assert!(!world.sessions.contains_key(&session));
}

/// A session that says what is not so any more is replaced at once, then not again for a while; when
/// it waits for an answer from below, after half a minute.
#[test]
fn a_session_is_replaced_when_what_it_says_is_old() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.credential_ms = None;
    world.renew(0);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    assert_eq!(world.opens.len(), 1, "it was opened later");
    world.renew(0);
    world.renew(0);
    world.run_for(SECOND);
    assert!(world.listens(0));
    assert_eq!(world.opens.len(), 2);
    world.renew(0);
    world.run_for(Duration::from_secs(28));
    assert_eq!(world.opens.len(), 2, "a client cannot make it spin");
    world.run_for(Duration::from_secs(3));
    assert_eq!(world.opens.len(), 3);

    world.run_for(Duration::from_secs(60));
    let session = *world.sessions.keys().next().unwrap();
    world.scheduler.engaged(session, true);
    world.renew(0);
    world.run_for(Duration::from_secs(29));
    assert!(world.sessions.contains_key(&session));
    world.run_for(Duration::from_secs(3));
    assert!(!world.sessions.contains_key(&session));
    assert_eq!(world.opens.len(), 4);
}

/// Nothing is tried for an identity that is gone, and its needs are met when it comes back.
#[test]
fn needs_of_a_gone_identity_rest_until_it_returns() {
    let mut world = World::new(small_config(), 1, &[Nature::Refused]);
    world.need(0, METHODS);
    world.run_for(SECOND);
    assert_eq!(world.refreshes, [sender(0)]);
    assert!(world.scheduler.identity_checked(&sender(0), Verdict::Gone));
    assert!(
        !world.scheduler.identity_checked(&sender(0), Verdict::Gone),
        "no news"
    );
    let opens = world.opens.len();
    world.append(0, 0, 10, None);
    world.run_for(Duration::from_secs(600));
    assert_eq!(world.opens.len(), opens);
    assert_eq!(
        world.unsettled(Nature::Refused),
        0,
        "messages are dropped meanwhile"
    );
    assert_eq!(world.scheduler.doubtful(), [sender(0)]);
    let request = world.request(0, 1000);
    world.turn();
    assert_eq!(world.end_of(request), Some(Err(RequestFault::Gone)));

    world.natures[0].1 = Nature::Good;
    world.scheduler.identity_checked(&sender(0), Verdict::Retry);
    world.run_until(SECOND, "return", |world| world.listens(0));

    world.need(0, 0);
    world.round();
    world.lose(0);
    world.run_for(Duration::from_secs(36));
    assert_eq!(world.scheduler.counts().lanes, 0);
}

/// Lanes that only listen do not keep others from being read.
#[test]
fn listeners_do_not_count_against_the_limit_of_lanes() {
    let config = LaneConfig {
        lanes_max: 3,
        connections_max: 8,
        ..small_config()
    };
    let mut world = World::new(config, 1, &[Nature::Good; 7]);
    for who in 0..5 {
        world.need(who, METHODS);
    }
    for who in [5, 6] {
        world.append(0, who, 10, None);
    }
    world.run_until_good_are_settled(Duration::from_secs(2));
}

/// Listeners that the scope took away do not keep the others from being read while the link is
/// down: they probe nothing.
#[test]
fn gone_listeners_are_no_probes() {
    let mut natures = vec![Nature::Refused; 10];
    natures.extend([Nature::Good; 2]);
    let mut world = World::new(small_config(), 1, &natures);
    for who in 0..10 {
        world.need(who, METHODS);
    }
    world.run_for(Duration::from_secs(3));
    for who in 0..10 {
        world
            .scheduler
            .identity_checked(&sender(who), Verdict::Gone);
    }
    // Somebody finds the link down and leaves.
    world.link_up = false;
    world.need(10, METHODS);
    world.run_for(Duration::from_secs(5));
    world.need(10, 0);
    world.run_for(Duration::from_secs(40));
    assert_eq!(world.scheduler.link(), Link::Down);
    assert_eq!(world.scheduler.counts().lanes, 10);
    world.append(0, 11, 10, None);
    world.run_for(Duration::from_secs(1));
    world.link_up = true;
    world.run_until_good_are_settled(Duration::from_secs(6));
}
