//! Random interleavings in the world of `model_tests`.

use std::time::Duration;

use proptest::prelude::*;

use super::model_tests::{Nature, World, sender, small_config};
use super::*;

#[derive(Clone, Copy, Debug)]
enum Op {
    Append {
        queue: usize,
        who: usize,
        size: usize,
        ttl_ms: Option<u64>,
    },
    Announce(usize),
    Advance(u64),
    AnswerRead(usize),
    FailRead,
    AnswerSettle(bool),
    AnswerOpen(usize),
    Acknowledge {
        index: usize,
        count: usize,
        reversed: bool,
    },
    Lose(usize),
    Link(bool),
    HandBack(usize),
    Need(usize, u8),
    Renew(usize),
    Request(usize, u64),
    AnswerRequests,
    HonourCloses,
    Judge(usize, Verdict),
}

fn op() -> impl Strategy<Value = Op> {
    let ttl = prop_oneof![4 => Just(None), 1 => (1..4000_u64).prop_map(Some)];
    prop_oneof![
        8 => (0..2_usize, 0..7_usize, 0..900_usize, ttl)
            .prop_map(|(queue, who, size, ttl_ms)| Op::Append { queue, who, size, ttl_ms }),
        4 => (0..2_usize).prop_map(Op::Announce),
        3 => (1..3000_u64).prop_map(Op::Advance),
        1 => (0..900_000_u64).prop_map(Op::Advance),
        6 => (0..2_usize).prop_map(Op::AnswerRead),
        1 => Just(Op::FailRead),
        3 => prop::bool::weighted(0.9).prop_map(Op::AnswerSettle),
        4 => (0..4_usize).prop_map(Op::AnswerOpen),
        8 => (0..4_usize, 1..5_usize, any::<bool>())
            .prop_map(|(index, count, reversed)| Op::Acknowledge { index, count, reversed }),
        2 => (0..4_usize).prop_map(Op::Lose),
        1 => any::<bool>().prop_map(Op::Link),
        1 => (0..4_usize).prop_map(Op::HandBack),
        2 => (0..7_usize, 0..8_u8).prop_map(|(who, bits)| Op::Need(who, bits)),
        1 => (0..7_usize).prop_map(Op::Renew),
        2 => (0..7_usize, 1..30_000_u64).prop_map(|(who, ms)| Op::Request(who, ms)),
        1 => Just(Op::AnswerRequests),
        3 => Just(Op::HonourCloses),
        1 => (0..7_usize, prop_oneof![Just(Verdict::Retry), Just(Verdict::Unknown)])
            .prop_map(|(who, verdict)| Op::Judge(who, verdict)),
    ]
}

fn apply(world: &mut World, op: Op) {
    match op {
        Op::Append {
            queue,
            who,
            size,
            ttl_ms,
        } => world.append(queue, who, size, ttl_ms),
        Op::Announce(queue) => world.announce(queue),
        Op::Advance(ms) => world.now_ms += ms,
        Op::AnswerRead(index) => world.answer_read(index),
        Op::FailRead => world.fail_read(),
        Op::AnswerSettle(ok) => world.answer_settle(ok),
        Op::AnswerOpen(index) => world.answer_open(index),
        Op::Acknowledge {
            index,
            count,
            reversed,
        } => world.acknowledge(index, count, reversed),
        Op::Lose(index) => world.lose(index),
        Op::Link(up) => world.link_up = up,
        Op::HandBack(index) => {
            if let Some(session) = world.pick(index, true) {
                world.end(session, &CloseCause::Unsettled("dropped".into()));
            }
        }
        Op::Need(who, bits) => world.need(who, bits),
        Op::Renew(who) => world.renew(who),
        Op::Request(who, ms) => {
            world.request(who, ms);
        }
        Op::AnswerRequests => world.answer_requests(),
        Op::HonourCloses => world.honour_closes(),
        Op::Judge(who, verdict) => {
            world.scheduler.identity_checked(&sender(who), verdict);
        }
    }
    world.turn();
}

const NATURES: [Nature; 7] = [
    Nature::Good,
    Nature::Good,
    Nature::Good,
    Nature::Good,
    Nature::Refused,
    Nature::Slow,
    Nature::Poison,
];

proptest! {
    /// Every step keeps the promises (see `check_send`, `check_bounds`), and in the end every good
    /// sender's messages have arrived, although others are refused, slow or poisonous for ever.
    #[test]
    fn any_interleaving_keeps_order_loses_nothing_and_stays_bounded(
        ops in prop::collection::vec(op(), 1..250),
    ) {
        let mut world = World::new(small_config(), 2, &NATURES);
        for op in ops {
            apply(&mut world, op);
        }
        world.link_up = true;
        world.run_until_good_are_settled(Duration::from_secs(400));
        for stored in world.stored.iter().flatten() {
            if world.nature(&stored.sender) == Nature::Good && stored.expires_at_ms.is_none() {
                prop_assert_eq!(stored.settled, Some(Outcome::Done));
            }
        }
        // No request is left over, and who needs something is connected sooner or later, although
        // there are fewer connections than identities.
        world.run_for(Duration::from_secs(31));
        prop_assert!(world.asks.requests.iter().all(|asked| asked.end.is_some()));
        for who in 0..4 {
            if world.deaf().contains(&who) {
                let patience = Duration::from_secs(200);
                world.run_until(patience, "connection", |world| world.listens(who));
            }
        }
    }

    /// With connections for all, everybody with needs is connected at the same time, soon after the
    /// link is good, and stays so.
    #[test]
    fn whatever_happened_all_needs_are_met_when_the_link_is_good(
        ops in prop::collection::vec(op(), 1..250),
    ) {
        let config = LaneConfig { connections_max: 8, ..small_config() };
        let mut world = World::new(config, 2, &NATURES);
        for op in ops {
            apply(&mut world, op);
        }
        world.link_up = true;
        // The longest wait of one lane: after hours of failures.
        let long = Duration::from_secs(150);
        world.run_until(long, "all of them", |world| world.deaf().is_empty());
        let opens = world.opens.len();
        for _ in 0..100 {
            // A renewal takes a moment.
            let moment = Duration::from_secs(1);
            world.run_until(moment, "all of them", |world| world.deaf().is_empty());
            world.now_ms += 250;
        }
        // Renewals of five good lanes, retries of the two bad ones.
        prop_assert!(world.opens.len() - opens < 200, "{} opens", world.opens.len() - opens);
    }
}
