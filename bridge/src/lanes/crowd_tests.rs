//! Stories about many senders at once, who must not stand in each other's way.

use std::time::Duration;

use super::model_tests::{Nature, World, small_config};
use super::*;
use crate::limits;

/// Senders whose identity has no way up do not count as probes of the link: whoever comes behind
/// them is served, also when none of them has ever reached the upstream.
#[test]
fn senders_without_a_chain_do_not_hide_the_others() {
    let count = limits::PROBE_LANES + 2;
    let mut natures = vec![Nature::OutOfScope; count];
    natures.push(Nature::Good);
    let mut world = World::new(small_config(), 1, &natures);
    for who in 0..count {
        world.append(0, who, 10, None);
    }
    // Read apart, as a restarted hub finds them in different parts of its queue.
    for _ in 0..20 {
        world.round();
        world.now_ms += 1000;
    }
    assert_eq!(world.scheduler.link(), Link::Unknown);
    world.append(0, count, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(5));
}

/// As many senders as there may be lanes, with a higher priority that has not been read: they go
/// on, because nothing else would ever make room for reading it.
#[test]
fn too_many_senders_do_not_block_each_other_over_priorities() {
    let config = LaneConfig {
        lanes_max: 2,
        connections_max: 1,
        ..small_config()
    };
    let mut world = World::new(config, 2, &[Nature::Good; 3]);
    for who in [0, 1, 0, 1] {
        world.append(1, who, 10, None);
    }
    world.announce(1);
    world.turn();
    world.answer_read(0);
    assert_eq!(world.scheduler.counts().lanes, 2);
    world.append(0, 2, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(30));
}

/// The same when the sender waited already while the others came.
#[test]
fn a_sender_that_waits_for_a_higher_priority_goes_on_when_nothing_more_is_read() {
    let mut natures = vec![Nature::Refused; 9];
    natures[0] = Nature::Good;
    let config = LaneConfig {
        lanes_max: 4,
        ..small_config()
    };
    let mut world = World::new(config, 2, &natures);
    world.append(1, 0, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(1));
    world.append(1, 0, 10, None);
    for who in 1..9 {
        world.append(0, who, 10, None);
    }
    for queue in [0, 1] {
        world.announce(queue);
    }
    world.turn();
    assert_eq!(world.reads.len(), 2);
    world.answer_read(1);
    world.turn();
    world.answer_read(0);
    world.run_until_good_are_settled(Duration::from_secs(5));
}
