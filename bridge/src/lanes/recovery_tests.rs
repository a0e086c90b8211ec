//! Stories about outages and recovery of lanes that listen, in the world of `model_tests`.

use std::time::Duration;

use super::model_tests::{Nature, World, sender, small_config};
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const METHODS: u8 = 2;

/// 201 listeners below a hub, as in acceptance 6 of the MQTT issue.
fn listeners() -> World {
    let config = LaneConfig {
        connections_max: 1024,
        seed: 7,
        ..LaneConfig::default()
    };
    let mut world = World::new(config, 1, &[Nature::Good; 201]);
    for who in 0..201 {
        world.need(who, METHODS);
    }
    world.run_until(Duration::from_secs(5), "all", |world| {
        world.deaf().is_empty()
    });
    world
}

/// Cuts the link for a minute. What breaks is noticed within a second.
fn cut_for_a_minute(world: &mut World) {
    world.link_up = false;
    while !world.sessions.is_empty() {
        world.lose(0);
    }
    let end = world.now_ms + 60_000;
    while world.now_ms < end {
        world.round();
        world.wait_a_little();
    }
    assert_eq!(world.scheduler.link(), Link::Down);
}

/// The link is cut for a minute: the first is back within five seconds, all others within five
/// more, each with one connect.
#[test]
fn two_hundred_listeners_are_back_within_five_seconds_of_the_first() {
    let mut world = listeners();
    let before = world.opens.len();
    cut_for_a_minute(&mut world);
    let probes = world.opens.len() - before;
    assert!(
        (60..=650).contains(&probes),
        "{probes} attempts in a minute"
    );
    world.link_up = true;
    let before = world.opens.len();
    let first = world.run_until(Duration::from_secs(5), "the first", |world| {
        world.deaf().len() < 201
    });
    let rest = world.run_until(Duration::from_secs(5), "all", |world| {
        world.deaf().is_empty()
    });
    println!("first after {first:?}, all {rest:?} later");
    let connects = world.opens.len() - before;
    assert!(connects <= 201, "{connects} connects for 201 listeners");
}

/// One listener alone: the back-off is the only probe. Also after an outage of some minutes it is
/// back within five seconds.
#[test]
fn a_single_listener_is_back_within_five_seconds() {
    for outage_secs in [1, 7, 60, 500] {
        let mut world = World::new(small_config(), 1, &[Nature::Good]);
        world.need(0, METHODS);
        world.run_until(SECOND, "connection", |world| world.listens(0));
        world.link_up = false;
        world.lose(0);
        world.run_for(Duration::from_secs(outage_secs));
        world.link_up = true;
        world.run_until(Duration::from_secs(5), "return", |world| world.listens(0));
    }
}

/// An outage that swallows packets: attempts hang. When one gets through, those that hang are given
/// up and made anew, instead of waiting for their time-out.
#[test]
fn attempts_that_hang_are_made_anew_when_the_link_is_back() {
    let mut world = World::new(small_config(), 1, &[Nature::Good; 4]);
    for who in 0..4 {
        world.need(who, METHODS);
    }
    world.run_until(SECOND, "all", |world| world.deaf().is_empty());
    // Packets vanish: sessions are found dead, and the attempts that follow say nothing.
    while !world.sessions.is_empty() {
        world.lose(0);
    }
    for _ in 0..100 {
        world.turn();
        world.now_ms += 100;
    }
    assert_eq!(world.sessions.len(), 4, "all of them hang");
    let hanging: Vec<SessionId> = world.sessions.keys().copied().collect();
    // One of them times out and tries again, which gets through.
    world.end(hanging[0], &CloseCause::Unreachable("time-out".into()));
    while world.sessions.len() < 4 {
        world.now_ms += 10;
        world.turn();
    }
    let newest = *world.sessions.keys().last().unwrap();
    world.sessions.get_mut(&newest).unwrap().opened = true;
    let now = world.now();
    world.scheduler.opened(newest, None, now);
    world.turn();
    let given_up = |world: &World| world.sessions.values().filter(|s| s.close_asked).count();
    assert_eq!(given_up(&world), 3);
    world.run_until(SECOND, "all", |world| world.deaf().is_empty());
    assert!(
        hanging
            .iter()
            .all(|session| !world.sessions.contains_key(session))
    );
}

/// A neighbour that flaps does not keep a slow attempt from ever ending.
#[test]
fn a_slow_attempt_is_given_up_once_only() {
    let mut world = World::new(small_config(), 1, &[Nature::Good; 2]);
    world.need(0, METHODS);
    world.run_until(SECOND, "the neighbour", |world| world.listens(0));
    world.need(1, METHODS);
    world.turn();
    let mut attempts = std::collections::BTreeSet::new();
    for _ in 0..10 {
        // The neighbour breaks and comes back; the slow one says nothing.
        world.lose(0);
        let slow = |world: &World| {
            let mut sessions = world.sessions.iter();
            sessions
                .find(|(_, one)| one.sender == sender(1))
                .map(|(id, _)| *id)
        };
        for _ in 0..20 {
            world.now_ms += 100;
            world.turn();
            world.honour_closes();
            attempts.extend(slow(&world));
            let fresh: Vec<SessionId> = world.sessions.keys().copied().collect();
            for session in fresh {
                if world.sessions[&session].sender == sender(0) && !world.sessions[&session].opened
                {
                    world.sessions.get_mut(&session).unwrap().opened = true;
                    let now = world.now();
                    world.scheduler.opened(session, None, now);
                }
            }
        }
    }
    assert_eq!(attempts.len(), 2, "twenty seconds, one renewed attempt");
}

/// Cloud-to-device messages that nobody settles end the session each time they come; the first time
/// it is back at once, then the pauses grow to seconds, whatever else is accepted meanwhile.
#[test]
fn handing_messages_back_again_and_again_does_not_spin() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.need(0, 4);
    world.run_until(SECOND, "connection", |world| world.listens(0));
    let mut pauses = Vec::new();
    for _ in 0..6 {
        let session = *world.sessions.keys().next().unwrap();
        world.end(session, &CloseCause::Unsettled("dropped".into()));
        pauses.push(world.run_until(Duration::from_secs(5), "return", |world| world.listens(0)));
        // Telemetry flows in between.
        world.append(0, 0, 10, None);
        world.run_until_good_are_settled(SECOND);
    }
    let millis: Vec<u128> = pauses.iter().map(Duration::as_millis).collect();
    assert!(millis[0] <= 250, "{millis:?}");
    assert!(millis[1] <= 750, "{millis:?}");
    assert!(
        millis[3..]
            .iter()
            .all(|pause| (3000..=5000).contains(pause)),
        "{millis:?}"
    );
    // After a minute without that it starts over.
    world.now_ms += 25_000;
    world.run_for(Duration::from_secs(1));
    let renewed = world.now_ms;
    while world
        .sessions
        .values()
        .any(|one| world.now_ms - one.since_ms < 61_000)
    {
        world.now_ms += 1000;
        assert!(world.now_ms - renewed < 120_000);
    }
    let session = *world.sessions.keys().next().unwrap();
    world.end(session, &CloseCause::Unsettled("dropped".into()));
    let pause = world.run_until(Duration::from_secs(5), "return", |world| world.listens(0));
    assert!(pause <= Duration::from_millis(250), "{pause:?}");
}

/// A server that takes the connection and drops it at once is not connected to more and more often;
/// one that held for a while starts with a short wait.
#[test]
fn a_session_has_to_last_before_its_failures_are_forgotten() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.need(0, METHODS);
    let end = world.now_ms + 60_000;
    while world.now_ms < end {
        world.round();
        world.lose(0);
        world.wait_a_little();
    }
    let opens = world.opens.len();
    assert!((12..=25).contains(&opens), "{opens} connects in a minute");
    world.run_until(Duration::from_secs(5), "connection", |world| {
        world.listens(0)
    });
    // Longer than half a minute, without a round that would renew it.
    world.now_ms += 31_000;
    world.lose(0);
    let pause = world.run_until(Duration::from_secs(5), "return", |world| world.listens(0));
    assert!(pause <= Duration::from_millis(250), "{pause:?}");
}

/// A long outage ends when the upstream takes a connection: if that breaks soon after, the lane is
/// at the quick end of its back-off, not at the slow one.
#[test]
fn a_short_return_ends_a_long_outage() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    world.link_up = false;
    world.need(0, METHODS);
    world.run_for(Duration::from_secs(7200));
    world.link_up = true;
    world.run_until(Duration::from_secs(145), "return", |world| world.listens(0));
    world.link_up = false;
    world.lose(0);
    world.run_for(Duration::from_secs(30));
    world.link_up = true;
    world.run_until(Duration::from_secs(5), "return", |world| world.listens(0));
}
