//! Single stories about lanes, in the world of `model_tests`.

use std::time::Duration;

use super::model_tests::{Nature, World, sender, small_config};
use super::*;

/// Ten senders that never get through must not slow one that does.
#[test]
fn permanently_failing_senders_delay_no_other() {
    let natures: Vec<Nature> = (0..11)
        .map(|i| {
            if i == 0 {
                Nature::Good
            } else {
                Nature::Refused
            }
        })
        .collect();
    let mut world = World::new(small_config(), 1, &natures);
    for who in 1..11 {
        for _ in 0..50 {
            world.append(0, who, 100, None);
        }
    }
    for _ in 0..20 {
        world.round();
        world.now_ms += 1000;
    }
    for _ in 0..200 {
        world.append(0, 0, 100, None);
    }
    world.run_until_good_are_settled(Duration::from_secs(3));
    assert_eq!(world.unsettled(Nature::Refused), 500);
    assert_eq!(
        world.refreshes.len(),
        10,
        "one question to the upstream per row of failures"
    );
}

/// As many slow senders as there are connections: the lease makes room for the others.
#[test]
fn slow_senders_on_all_connections_give_way() {
    let natures = [
        Nature::Slow,
        Nature::Slow,
        Nature::Slow,
        Nature::Slow,
        Nature::Good,
    ];
    let mut world = World::new(small_config(), 1, &natures);
    for who in 0..4 {
        for _ in 0..20 {
            world.append(0, who, 500, None);
        }
    }
    while world.sessions.len() < 4 {
        world.round();
        world.now_ms += 100;
        assert!(world.now_ms < 10_000);
    }
    for _ in 0..30 {
        world.append(0, 4, 500, None);
    }
    world.run_until_good_are_settled(Duration::from_secs(30));
}

/// What waited during an outage flows at once when the link is back, however long the back-off.
#[test]
fn recovery_cuts_all_backoffs_short() {
    let mut world = World::new(small_config(), 1, &[Nature::Good; 6]);
    world.link_up = false;
    for who in 0..6 {
        for _ in 0..10 {
            world.append(0, who, 50, None);
        }
    }
    // Two hours without the upstream.
    while world.now_ms < 7_200_000 {
        world.round();
        let now = world.now();
        let next = world.scheduler.next_wakeup(now).unwrap_or(now.instant);
        world.now_ms += (next.saturating_duration_since(now.instant).as_millis() as u64).max(1);
    }
    assert_eq!(world.scheduler.link(), Link::Down);
    world.link_up = true;
    // The first probe comes within its back-off ...
    let unsettled = world.unsettled(Nature::Good);
    while world.unsettled(Nature::Good) == unsettled {
        world.round();
        world.now_ms += 100;
        assert!(world.now_ms < 7_200_000 + 145_000);
    }
    // ... and then everybody else at the connect rate.
    world.run_until_good_are_settled(Duration::from_millis(1500));
}

/// While the link is down the backlog is not read over and over.
#[test]
fn an_outage_does_not_read_the_backlog() {
    let mut world = World::new(small_config(), 1, &[Nature::Good; 30]);
    world.link_up = false;
    for index in 0..3000 {
        world.append(0, index % 30, 50, None);
    }
    let mut reads = 0;
    for _ in 0..600 {
        world.round();
        reads += world.reads.len();
        world.now_ms += 100;
    }
    assert!(reads < 10, "{reads} reads");
    assert!(world.scheduler.counts().lanes <= 12);
    world.link_up = true;
    world.run_until_good_are_settled(Duration::from_secs(120));
}

/// A message that always breaks its session is sent alone after a while, and reported, not dropped.
#[test]
fn a_poison_message_is_isolated_reported_and_kept() {
    let mut world = World::new(small_config(), 1, &[Nature::Good, Nature::Poison]);
    for _ in 0..5 {
        world.append(0, 1, 10, None);
    }
    let mut reports = Vec::new();
    for _ in 0..2000 {
        world.append(0, 0, 10, None);
        world.announce(0);
        let mut actions = Vec::new();
        world.scheduler.turn(world.now(), &mut actions);
        for action in actions {
            match action {
                Action::Read {
                    queue,
                    from,
                    filter,
                } => world.start_read(queue, from, filter),
                Action::Settle { queue, settled } => world.settles.push((queue, settled)),
                Action::Open {
                    session,
                    identity,
                    needs,
                } => world.open(session, identity, needs),
                Action::Close { session } => world.end(session, &CloseCause::Requested),
                Action::Send { session, batch } => {
                    if batch[0].entry.sender == sender(1) && reports.len() == 1 {
                        assert_eq!(batch.len(), 1, "sent alone");
                    }
                    world.check_send(session, batch);
                }
                Action::Report(report @ Report::SuspectMessage { .. }) => reports.push(report),
                Action::Report(_) | Action::Discarded(_) | Action::Refresh { .. } => {}
                action => panic!("{action:?}"),
            }
        }
        world.answer_read(0);
        world.answer_open(0);
        world.answer_open(0);
        world.acknowledge(0, 10, false);
        world.acknowledge(1, 10, false);
        world.answer_settle(true);
        world.now_ms += 50;
    }
    let expected = |times| Report::SuspectMessage {
        identity: sender(1),
        priority: 0,
        offset: 0,
        times,
    };
    assert!(reports.len() >= 2, "{reports:?}");
    assert_eq!(reports[..2], [expected(10), expected(20)]);
    assert_eq!(world.unsettled(Nature::Poison), 5);
}

/// A sender that is proven gone: everything of it is dropped, old and new, and counted; a sender
/// that comes back is served again.
#[test]
fn messages_of_a_sender_that_is_gone_are_dropped_and_a_return_is_served() {
    let mut world = World::new(small_config(), 2, &[Nature::Refused]);
    for queue in [0, 1] {
        for _ in 0..20 {
            world.append(queue, 0, 10, None);
        }
    }
    for _ in 0..10 {
        world.round();
        world.now_ms += 100;
    }
    assert_eq!(world.refreshes, [sender(0)]);
    assert_eq!(
        world.unsettled(Nature::Refused),
        40,
        "nothing is dropped without proof"
    );
    world
        .scheduler
        .identity_checked(&sender(0), Verdict::Unknown);
    world.round();
    assert_eq!(world.unsettled(Nature::Refused), 40);
    assert_eq!(world.scheduler.doubtful(), [sender(0)]);
    while world.unsettled(Nature::Refused) > 0 {
        world.scheduler.identity_checked(&sender(0), Verdict::Gone);
        world.round();
        world.now_ms += 50;
        assert!(world.now_ms < 60_000);
    }
    let all = world.stored.iter().flatten();
    assert!(
        all.into_iter()
            .all(|stored| stored.settled == Some(Outcome::Dropped))
    );
    world.round();
    assert_eq!(
        world.scheduler.counts().lanes,
        0,
        "nothing is left of the lane"
    );
    world.natures[0].1 = Nature::Good;
    world.append(0, 0, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(1));
    assert_eq!(world.stored[0][20].settled, Some(Outcome::Done));
}

/// A credential that runs out: the session is replaced in time, without a failure or a resend.
#[test]
fn sessions_are_renewed_before_their_credential_expires() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    for _ in 0..600 {
        world.append(0, 0, 10, None);
        world.round();
        world.now_ms += 500;
    }
    world.run_until_good_are_settled(Duration::from_secs(5));
    // The world's credentials live 60 s: 300 s need six to eleven sessions.
    assert!(
        (6..=11).contains(&world.opens.len()),
        "{} sessions",
        world.opens.len()
    );
    let gaps = world.opens.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(
        gaps.clone().all(|ms| (28_000..=55_000).contains(&ms)),
        "{:?}",
        gaps.collect::<Vec<_>>()
    );
}

/// A connection without work is closed after the idle time, and opened again by the next message.
#[test]
fn idle_sessions_close_and_come_back_on_demand() {
    let mut config = small_config();
    config.idle_close = Duration::from_secs(5);
    let mut world = World::new(config, 1, &[Nature::Good]);
    world.append(0, 0, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(1));
    world.now_ms += 4500;
    world.round();
    assert_eq!(world.sessions.len(), 1);
    world.now_ms += 1000;
    world.round();
    assert_eq!(
        (world.sessions.len(), world.scheduler.counts().lanes),
        (0, 0)
    );
    world.append(0, 0, 10, None);
    world.run_until_good_are_settled(Duration::from_secs(1));
    assert_eq!(world.opens.len(), 2);
}

/// Stopping waits for what is in flight, up to the deadline, and settles what was acknowledged.
#[test]
fn stop_settles_what_was_acknowledged_and_abandons_the_rest() {
    let mut world = World::new(small_config(), 1, &[Nature::Good, Nature::Slow]);
    for who in [0, 1] {
        for _ in 0..3 {
            world.append(0, who, 10, None);
        }
    }
    world.announce(0);
    for _ in 0..3 {
        world.turn();
        world.answer_read(0);
        world.answer_open(0);
        world.answer_open(0);
    }
    world.turn();
    let deadline = world.now().instant + Duration::from_secs(2);
    world.scheduler.stop(deadline);
    world.turn();
    for index in [0, 1] {
        world.acknowledge(index, 10, false);
    }
    world.turn();
    world.honour_closes();
    assert_eq!(world.sessions.len(), 1, "the slow one is waited for");
    world.now_ms += 2000;
    world.turn();
    world.honour_closes();
    assert!(!world.scheduler.is_stopped(), "a settle is under way");
    world.turn();
    world.answer_settle(true);
    world.turn();
    assert!(world.scheduler.is_stopped());
    assert_eq!(
        (world.unsettled(Nature::Good), world.unsettled(Nature::Slow)),
        (0, 3)
    );
}

/// Slow lanes that came early hold no more than all lanes together may.
#[test]
fn all_lanes_together_stay_below_their_limit() {
    let config = LaneConfig {
        window: 64,
        lane_entries_max: 64,
        bytes_max: 4000,
        lane_bytes_max: 4000,
        connections_max: 8,
        ..small_config()
    };
    let mut world = World::new(config, 1, &[Nature::Slow; 8]);
    for who in 0..8 {
        for _ in 0..40 {
            world.append(0, who, 100, None);
        }
        for _ in 0..40 {
            world.round();
            world.now_ms += 100;
        }
        // One message of each further lane is always let in.
        let bytes = world.scheduler.counts().bytes;
        assert!(
            (3500..=4000 + 228 * who).contains(&bytes),
            "{bytes} with {} lanes",
            who + 1
        );
    }
    assert_eq!(world.sessions.len(), 8);
}

/// An answer that comes twice settles once.
#[test]
fn a_repeated_disposition_is_ignored() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    for _ in 0..3 {
        world.append(0, 0, 10, None);
    }
    world.announce(0);
    for _ in 0..3 {
        world.turn();
        world.answer_read(0);
        world.answer_open(0);
    }
    world.turn();
    let session = *world.sessions.keys().next().unwrap();
    let accepted = [(1, Disposition::Accepted), (1, Disposition::Accepted)];
    world.scheduler.disposed(session, &accepted);
    world.scheduler.disposed(
        session,
        &[(1, Disposition::Accepted), (99, Disposition::Accepted)],
    );
    world.turn();
    let settled: Vec<u64> = world
        .settles
        .iter()
        .flat_map(|(_, list)| list)
        .map(|one| one.offset)
        .collect();
    assert_eq!(settled, [1]);
}

/// A store that does not confirm holds the sending up, and its confirmation sets it going again.
#[test]
fn unconfirmed_settles_are_bounded() {
    let config = LaneConfig {
        unconfirmed_max: 4,
        ..small_config()
    };
    let mut world = World::new(config, 1, &[Nature::Good]);
    for _ in 0..6 {
        world.append(0, 0, 10, None);
    }
    world.announce(0);
    let sent = |world: &World| {
        world
            .sessions
            .values()
            .map(|one| one.sent.len())
            .sum::<usize>()
    };
    for _ in 0..5 {
        world.turn();
        world.answer_read(0);
        world.answer_open(0);
        world.acknowledge(0, 4, false);
    }
    world.turn();
    assert_eq!(sent(&world), 4, "four unconfirmed, nothing more goes out");
    world.answer_settle(true);
    world.turn();
    world.answer_settle(true);
    world.turn();
    world.answer_read(0);
    world.turn();
    assert_eq!(sent(&world), 6);
}

/// However full memory is and however large the message, a lane may have one under way.
#[test]
fn one_message_per_lane_is_always_let_in() {
    let config = LaneConfig {
        bytes_max: 3000,
        connections_max: 5,
        ..small_config()
    };
    let natures = [
        Nature::Slow,
        Nature::Slow,
        Nature::Slow,
        Nature::Slow,
        Nature::Good,
    ];
    let mut world = World::new(config, 1, &natures);
    for who in 0..4 {
        for _ in 0..20 {
            world.append(0, who, 500, None);
        }
    }
    for _ in 0..40 {
        world.round();
        world.now_ms += 100;
    }
    assert!(world.scheduler.counts().bytes > 2500, "memory is full");
    for _ in 0..5 {
        world.append(0, 4, 5000, None);
    }
    world.run_until_good_are_settled(Duration::from_secs(5));
}

/// A verdict that comes when the sender has got through meanwhile drops nothing.
#[test]
fn a_late_verdict_does_not_touch_a_lane_that_works() {
    let mut world = World::new(small_config(), 1, &[Nature::Slow]);
    world.append(0, 0, 10, None);
    for _ in 0..3 {
        world.round();
    }
    assert_eq!(world.scheduler.counts().ready, 1);
    world.scheduler.identity_checked(&sender(0), Verdict::Gone);
    world.append(0, 0, 10, None);
    for _ in 0..3 {
        world.round();
    }
    assert_eq!(world.unsettled(Nature::Slow), 2);
    assert_eq!(world.scheduler.counts().ready, 1);
}

/// A read that began before the store had settled something brings it afterwards: it is not sent
/// again.
#[test]
fn what_is_settled_while_a_read_is_under_way_is_not_sent_again() {
    let mut world = World::new(small_config(), 1, &[Nature::Good]);
    for _ in 0..3 {
        world.append(0, 0, 10, None);
    }
    world.announce(0);
    for _ in 0..3 {
        world.turn();
        world.answer_read(0);
        world.answer_open(0);
    }
    world.turn();
    // The newest is acknowledged, then the connection breaks: the lane goes back to the first.
    world.acknowledge(0, 1, true);
    world.lose(0);
    while world.reads.is_empty() {
        world.now_ms += 100;
        world.turn();
        world.answer_open(0);
        assert!(world.now_ms < 10_000);
    }
    world.answer_settle(true);
    world.answer_read(0);
    world.turn();
    let sent: Vec<_> = world.sessions.values().flat_map(|one| &one.sent).collect();
    assert_eq!(sent.len(), 2, "{sent:?}");
    world.run_until_good_are_settled(Duration::from_secs(1));
}

/// A verdict that comes while the lane tries again decides nothing; the next refusal asks again.
#[test]
fn a_verdict_that_comes_during_a_retry_is_asked_for_again() {
    let mut world = World::new(small_config(), 1, &[Nature::Refused]);
    world.append(0, 0, 10, None);
    world.announce(0);
    world.turn();
    world.answer_read(0);
    world.turn();
    world.answer_open(0);
    world.turn();
    assert_eq!(world.refreshes.len(), 1);
    while world.sessions.is_empty() {
        world.now_ms += 50;
        world.turn();
        assert!(world.now_ms < 1000);
    }
    world.scheduler.identity_checked(&sender(0), Verdict::Gone);
    world.answer_open(0);
    world.turn();
    assert_eq!(world.refreshes.len(), 2);
    world.scheduler.identity_checked(&sender(0), Verdict::Gone);
    for _ in 0..3 {
        world.round();
    }
    assert_eq!(world.stored[0][0].settled, Some(Outcome::Dropped));
}
