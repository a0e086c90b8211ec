//! Stories about twin requests, in the world of `model_tests`.

use std::time::Duration;

use super::model_tests::{Nature, World, small_config};
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const METHODS: u8 = 2;

/// A request is reason enough to connect, and an idle connection stays for the next one.
#[test]
fn a_request_opens_a_connection() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    let first = world.request(0, 20_000);
    world.run_until(SECOND, "answer", |world| {
        world.end_of(first) == Some(Ok(()))
    });
    world.now_ms += 5000;
    let second = world.request(0, 20_000);
    world.run_until(SECOND, "answer", |world| {
        world.end_of(second) == Some(Ok(()))
    });
    assert_eq!(world.opens.len(), 1);
}

/// While the upstream is away a request fails at once, unless it is the one that finds that out.
#[test]
fn requests_fail_at_once_while_the_upstream_is_away() {
    let unreachable = Some(Err(RequestFault::Unreachable));
    let mut world = World::new(small_config(), 1, &[Nature::Good; 3]);
    world.link_up = false;
    let first = world.request(0, 20_000);
    world.turn();
    assert_eq!(world.end_of(first), None, "it is tried");
    world.run_until(SECOND, "failure", |world| world.end_of(first).is_some());
    assert_eq!(world.end_of(first), unreachable);
    assert_eq!(world.opens.len(), 1);
    for who in [0, 1] {
        let next = world.request(who, 20_000);
        world.turn();
        assert_eq!(
            world.end_of(next),
            unreachable,
            "that the upstream is away is known"
        );
    }
    assert_eq!(world.opens.len(), 1);
    // When nobody tries any more, the next request does.
    world.run_for(SECOND);
    let next = world.request(1, 20_000);
    world.turn();
    assert_eq!(world.end_of(next), None);
    world.link_up = true;
    world.run_until(SECOND, "answer", |world| world.end_of(next) == Some(Ok(())));
}

/// While the upstream is away and many lanes wait for their turn to probe it, a request does not
/// wait for that turn.
#[test]
fn requests_fail_at_once_behind_a_long_row_of_probes() {
    let config = LaneConfig {
        connections_max: 64,
        connects_burst: 64,
        ..small_config()
    };
    let mut world = World::new(config, 1, &[Nature::Good; 40]);
    world.link_up = false;
    for who in 0..40 {
        world.need(who, METHODS);
    }
    world.run_for(Duration::from_secs(6));
    let answers: Vec<usize> = (0..40).map(|who| world.request(who, 20_000)).collect();
    world.turn();
    let ends = answers.iter().filter_map(|one| world.end_of(*one));
    assert_eq!(ends.clone().count(), 40);
    assert!(
        ends.into_iter()
            .all(|end| end == Err(RequestFault::Unreachable))
    );
}

/// Who asks without end while the upstream is away makes one attempt per back-off.
#[test]
fn an_impatient_asker_does_not_connect_more_often() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.link_up = false;
    world.need(0, METHODS);
    for _ in 0..3000 {
        world.request(0, 20_000);
        world.round();
        world.now_ms += 10;
    }
    // Thirty seconds: 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 and then every four.
    let opens = world.opens.len();
    assert!((8..=16).contains(&opens), "{opens} attempts");
    assert!(
        world
            .asks
            .requests
            .iter()
            .rev()
            .skip(1)
            .all(|asked| asked.end.is_some())
    );
}

/// The link goes down while requests wait for a lane whose own trouble was another one.
#[test]
fn requests_of_a_backing_off_lane_fail_when_the_link_goes_down() {
    let mut world = World::new(small_config(), 1, &[Nature::Refused, Nature::Good]);
    world.need(0, METHODS);
    world.need(1, METHODS);
    world.run_for(Duration::from_secs(8));
    // Refused, with the link up: it may be let in any moment.
    let waiting = world.request(0, 20_000);
    world.turn();
    assert_eq!(world.end_of(waiting), None);
    world.link_up = false;
    world.lose(0);
    world.turn();
    assert_eq!(world.scheduler.link(), Link::Down);
    assert_eq!(world.end_of(waiting), Some(Err(RequestFault::Unreachable)));
}

/// A request that the lane cannot serve before its deadline fails at once, also with the link up.
#[test]
fn a_request_fails_at_once_when_the_back_off_is_longer_than_its_patience() {
    let mut world = World::new(small_config(), 1, &[Nature::Refused, Nature::Good]);
    world.need(0, METHODS);
    world.need(1, METHODS);
    world.run_for(Duration::from_secs(8));
    world.run_until(Duration::from_secs(6), "failure", |world| {
        world.sessions.len() == 1
    });
    let waiting = world.request(0, 1);
    world.turn();
    assert_eq!(world.end_of(waiting), Some(Err(RequestFault::Unreachable)));
}

/// Nobody waits longer than the deadline, whether the request was sent or not.
#[test]
fn requests_end_with_their_deadline() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    let waiting = world.request(0, 300);
    world.turn();
    world.now_ms += 299;
    world.turn();
    assert_eq!(world.end_of(waiting), None);
    world.now_ms += 1;
    world.turn();
    assert_eq!(world.end_of(waiting), Some(Err(RequestFault::TimedOut)));
    world.answer_open(0);
    let sent = world.request(0, 300);
    world.turn();
    world.now_ms += 300;
    let now = world.now();
    assert!(
        world.scheduler.next_wakeup(now).unwrap() <= now.instant,
        "it wakes up for that"
    );
    world.turn();
    assert_eq!(world.end_of(sent), Some(Err(RequestFault::TimedOut)));
    assert_eq!(world.scheduler.counts().ready, 1, "the session goes on");
}

/// What was sent is lost with the session; what was not waits for the next one.
#[test]
fn requests_are_sent_once() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    let sent = world.request(0, 20_000);
    world.turn();
    world.lose(0);
    let waiting = world.request(0, 20_000);
    world.turn();
    assert_eq!(world.end_of(sent), Some(Err(RequestFault::Lost)));
    // The only lane, and it is lost: as far as known the upstream is away.
    assert_eq!(world.end_of(waiting), Some(Err(RequestFault::Unreachable)));
}

/// A renewal waits for what was asked, and what is asked meanwhile goes over the next session.
#[test]
fn requests_survive_a_renewal() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    let session = *world.sessions.keys().next().unwrap();
    let asked = world.request(0, 20_000);
    world.turn();
    // The world's credentials live 60 s.
    while world.now_ms < 52_000 {
        world.now_ms += 500;
        world.turn();
        if world.now_ms < 30_000 {
            world.answer_requests();
        }
    }
    assert_eq!(world.end_of(asked), Some(Ok(())));
    assert!(world.sessions[&session].close_asked, "the renewal is due");
    let meanwhile = world.request(0, 20_000);
    world.turn();
    assert_eq!(world.end_of(meanwhile), None);
    world.run_until(SECOND, "answer", |world| {
        world.end_of(meanwhile) == Some(Ok(()))
    });
    assert!(!world.sessions.contains_key(&session));
}

/// A drain does not cut off a request that was sent.
#[test]
fn a_renewal_waits_for_answers() {
    let config = LaneConfig {
        drain_timeout: Duration::from_secs(60),
        ..small_config()
    };
    let mut world = World::new(config, 1, &[Nature::Good]);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    let session = *world.sessions.keys().next().unwrap();
    // The world's credentials live 60 s: the renewal is due after 30 s to 51 s.
    let asked = world.request(0, 55_000);
    while world.now_ms < 52_000 {
        world.now_ms += 500;
        world.turn();
        assert!(!world.sessions[&session].close_asked);
    }
    world.answer_requests();
    world.turn();
    assert_eq!(world.end_of(asked), Some(Ok(())));
    assert!(world.sessions[&session].close_asked);
}

/// The number of requests is limited, for each identity and for all.
#[test]
fn requests_are_limited() {
    let too_many = Some(Err(RequestFault::TooMany));
    let config = LaneConfig {
        lane_requests_max: 3,
        requests_max: 5,
        ..small_config()
    };
    let mut world = World::new(config, 1, &[Nature::Good; 3]);
    let first: Vec<usize> = (0..4).map(|_| world.request(0, 20_000)).collect();
    let second: Vec<usize> = (0..3).map(|_| world.request(1, 20_000)).collect();
    world.turn();
    let ends = |world: &World, asked: &[usize]| -> Vec<_> {
        asked.iter().map(|one| world.end_of(*one)).collect()
    };
    assert_eq!(ends(&world, &first), [None, None, None, too_many]);
    assert_eq!(ends(&world, &second), [None, None, too_many]);
    world.run_until(SECOND, "answers", |world| {
        let mut asked = first[..3].iter().chain(&second[..2]);
        asked.all(|one| world.end_of(*one) == Some(Ok(())))
    });
    let next = world.request(2, 20_000);
    world.run_until(SECOND, "answer", |world| world.end_of(next) == Some(Ok(())));
}

/// A hub that stops answers everybody.
#[test]
fn stopping_ends_all_requests() {
    let mut world = World::new(small_config(), 1, &[Nature::Good; 2]);
    world.need(0, METHODS);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    let sent = world.request(0, 20_000);
    world.turn();
    let waiting = world.request(1, 20_000);
    let deadline = world.now().instant + Duration::from_secs(2);
    world.scheduler.stop(deadline);
    let late = world.request(0, 20_000);
    world.turn();
    assert_eq!(world.end_of(waiting), Some(Err(RequestFault::Stopping)));
    assert_eq!(world.end_of(late), Some(Err(RequestFault::Stopping)));
    world.answer_requests();
    assert_eq!(world.end_of(sent), Some(Ok(())), "it is waited for");
    world.turn();
    world.honour_closes();
    world.turn();
    assert!(world.scheduler.is_stopped(), "needs do not hold a stop up");
}
