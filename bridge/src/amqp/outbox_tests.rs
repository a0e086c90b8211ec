//! Every row of the error table for a delivery, and random outcomes against what must hold.

use std::collections::BTreeMap;

use edgehub_amqp::performative::ErrorInfo;
use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng};

use super::*;

fn start() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn item(token: u64, size: usize) -> Item {
    Item {
        token,
        bytes: vec![0; size].into(),
        expires_at_ms: None,
        output: String::new(),
    }
}

fn rejected(condition: &'static str) -> Outcome {
    Outcome::Rejected(Some(ErrorInfo::new(condition, "")))
}

struct Sender {
    outbox: Outbox,
    now: Instant,
    number: u32,
    rng: StdRng,
}

impl Sender {
    fn new(messages: u64) -> Self {
        let mut outbox = Outbox::default();
        for token in 0..messages {
            outbox.push(item(token, 10));
        }
        Self {
            outbox,
            now: start(),
            number: 0,
            rng: StdRng::seed_from_u64(1),
        }
    }

    /// Sends one delivery if it may; gives its tokens.
    fn send(&mut self) -> Option<Vec<u64>> {
        let mut given_up = Vec::new();
        let batch = self
            .outbox
            .next(self.now, 0, 100_000, usize::MAX, &mut given_up)?;
        let tokens = batch.items.iter().map(|item| item.token).collect();
        self.outbox.sent(batch, self.number, self.now);
        self.number += 1;
        Some(tokens)
    }

    fn settle(&mut self, number: u32, outcome: &Outcome) -> Disposed {
        let outcome = Some(outcome);
        self.outbox
            .settled(number, outcome, self.now, &mut self.rng)
    }
}

#[test]
fn every_row_for_a_single_message() {
    let fault = |class| Disposed {
        fault: Some(class),
        retried: true,
        ..Disposed::default()
    };
    let retried = || Disposed {
        retried: true,
        ..Disposed::default()
    };
    let dropped = |reason| Disposed {
        given_up: vec![GivenUp::new(&item(0, 10), reason)],
        ..Disposed::default()
    };
    let done = || Disposed {
        accepted: vec![0],
        ..Disposed::default()
    };
    for (outcome, expected, wait) in [
        (Outcome::Accepted, done(), None),
        (Outcome::Released, retried(), Some(RETRY_BASE)),
        (
            Outcome::Modified {
                delivery_failed: true,
                undeliverable_here: true,
            },
            retried(),
            Some(RETRY_BASE),
        ),
        (Outcome::Rejected(None), retried(), Some(RETRY_BASE)),
        (rejected("amqp:internal-error"), retried(), Some(RETRY_BASE)),
        (
            rejected("com.microsoft:device-container-throttled"),
            retried(),
            Some(THROTTLED_BASE),
        ),
        (
            rejected("amqp:resource-limit-exceeded"),
            retried(),
            Some(THROTTLED_BASE),
        ),
        (
            rejected("amqp:unauthorized-access"),
            fault(Class::Refused),
            Some(RETRY_BASE),
        ),
        (
            rejected("com.microsoft:iot-hub-not-found-error"),
            fault(Class::Away),
            Some(RETRY_BASE),
        ),
        (
            rejected("com.microsoft:argument-error"),
            dropped(DropReason::Rejected),
            None,
        ),
        (
            rejected("amqp:not-allowed"),
            dropped(DropReason::Rejected),
            None,
        ),
        (
            rejected("amqp:link:message-size-exceeded"),
            dropped(DropReason::TooLarge),
            None,
        ),
    ] {
        let mut sender = Sender::new(1);
        sender.send().unwrap();
        assert_eq!(sender.settle(0, &outcome), expected, "{outcome:?}");
        assert_eq!(sender.settle(0, &outcome), Disposed::default(), "once");
        let due = sender.outbox.next_timeout();
        let waited = due.map(|at| at.saturating_duration_since(sender.now));
        match (waited, wait) {
            (None, None) => {}
            (Some(waited), Some(base)) => {
                assert!(waited >= base.mul_f64(0.79) && waited <= base.mul_f64(1.21));
                assert_eq!(sender.send(), None, "it waits");
                sender.now += waited;
                assert_eq!(sender.send(), Some(vec![0]));
            }
            other => panic!("{other:?} for {outcome:?}"),
        }
    }
}

#[test]
fn waits_grow_to_their_longest_and_shrink_with_success() {
    let throttled = rejected("com.microsoft:device-container-throttled");
    let mut sender = Sender::new(1);
    let mut waits = Vec::new();
    for number in 0..10 {
        sender.send().unwrap();
        sender.settle(number, &throttled);
        let due = sender.outbox.next_timeout().unwrap();
        waits.push(due.saturating_duration_since(sender.now));
        sender.now = due;
    }
    assert!(waits[0] < Duration::from_millis(1201));
    assert!(waits[9] > Duration::from_secs(47) && waits[9] < Duration::from_secs(73));
    sender.send().unwrap();
    sender.settle(10, &Outcome::Accepted);
    sender.outbox.push(item(1, 10));
    sender.send().unwrap();
    sender.settle(11, &throttled);
    let due = sender.outbox.next_timeout().unwrap();
    assert!(due.saturating_duration_since(sender.now) < Duration::from_millis(1201));
}

#[test]
fn batches_keep_within_their_limits() {
    let mut outbox = Outbox::default();
    for token in 0..10 {
        outbox.push(item(token, 100));
    }
    outbox.push(item(10, 2000));
    outbox.push(item(11, 600));
    let mut given_up = Vec::new();
    let mut sizes = Vec::new();
    let now = start();
    while let Some(batch) = outbox.next(now, 0, 500, 1000, &mut given_up) {
        let (format, bytes) = batch.encode();
        assert_eq!(format == 0, batch.items.len() == 1);
        assert!(bytes.len() <= 500 || batch.items.len() == 1);
        sizes.push(batch.items.len());
        outbox.sent(batch, sizes.len() as u32, now);
    }
    // One may be larger than a batch when it is alone; one that is too large for that is dropped.
    assert_eq!(sizes, [4, 4, 2, 1]);
    let dropped = [GivenUp::new(&item(10, 2000), DropReason::TooLarge)];
    assert_eq!(given_up, dropped);
}

#[test]
fn what_has_expired_meanwhile_is_not_sent_again() {
    let mut outbox = Outbox::default();
    for token in 0..3 {
        outbox.push(Item {
            expires_at_ms: (token == 1).then_some(1000),
            ..item(token, 10)
        });
    }
    let (now, mut given_up) = (start(), Vec::new());
    let batch = outbox.next(now, 999, 1000, 1000, &mut given_up).unwrap();
    outbox.sent(batch, 0, now);
    let mut rng = StdRng::seed_from_u64(1);
    outbox.settled(0, Some(&Outcome::Released), now, &mut rng);
    let later = now + Duration::from_secs(1);
    let batch = outbox.next(later, 1000, 1000, 1000, &mut given_up);
    let tokens: Vec<u64> = batch.unwrap().items.iter().map(|item| item.token).collect();
    assert_eq!(tokens, [0, 2]);
    assert_eq!(
        given_up,
        [GivenUp::new(&item(1, 10), DropReason::TtlExpiry)]
    );
}

#[test]
fn after_a_refusal_nothing_overtakes_for_a_while() {
    let mut sender = Sender::new(0);
    for token in 0..200 {
        sender.outbox.push(item(token, 10));
    }
    let first = sender.send().unwrap();
    sender.settle(0, &Outcome::Released);
    sender.now += Duration::from_secs(1);
    assert_eq!(sender.send(), Some(first));
    assert_eq!(sender.send(), None, "one at a time");
    sender.settle(1, &Outcome::Accepted);
    sender.send().unwrap();
    assert_eq!(sender.send(), None);
    sender.settle(2, &Outcome::Accepted);
    sender.now += CAREFUL_FOR;
    sender.send().unwrap();
    assert!(sender.send().is_some(), "several again");
}

#[test]
fn a_delivery_without_an_outcome_is_noticed() {
    let mut sender = Sender::new(1);
    assert_eq!(sender.outbox.next_timeout(), None);
    sender.send().unwrap();
    assert_eq!(sender.outbox.next_timeout(), Some(sender.now + STALL));
    assert!(!sender.outbox.is_stalled(sender.now));
    assert!(sender.outbox.is_stalled(sender.now + STALL));
}

#[derive(Clone, Debug)]
enum Op {
    Push(u8),
    Send,
    /// Which of those under way, and what becomes of it.
    Settle(usize, u8),
    Pass(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (1..20_u8).prop_map(Op::Push),
        4 => Just(Op::Send),
        4 => (0..8_usize, 0..10_u8).prop_map(|(index, kind)| Op::Settle(index, kind)),
        3 => (0..3000_u16).prop_map(Op::Pass),
    ]
}

proptest! {
    /// Every message ends once, only poison is given up, and without a refusal all leave in order.
    #[test]
    fn every_message_ends_once_and_the_order_holds(
        ops in proptest::collection::vec(op(), 0..150),
        poison in proptest::collection::hash_set(0..200_u64, 0..5),
    ) {
        let mut sender = Sender::new(0);
        let mut next = 0;
        let mut under_way: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        let mut ended: BTreeMap<u64, bool> = BTreeMap::new();
        let mut refusals = 0;
        let mut arrived: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        let mut finish = |disposed: &Disposed, sure: bool| {
            for token in &disposed.accepted {
                assert_eq!(ended.insert(*token, true), None);
            }
            for one in &disposed.given_up {
                assert!(sure, "{one:?}");
                assert_eq!(ended.insert(one.token, false), None);
            }
        };
        let mut settle = |sender: &mut Sender, number, tokens: &[u64], kind| {
            let has_poison = tokens.iter().any(|token| poison.contains(token));
            let outcome = match kind {
                _ if has_poison => rejected("com.microsoft:argument-error"),
                0 => Outcome::Released,
                1 => rejected("amqp:internal-error"),
                2 => rejected("com.microsoft:device-container-throttled"),
                _ => Outcome::Accepted,
            };
            if outcome == Outcome::Accepted {
                arrived.insert(number, tokens.to_vec());
            } else {
                refusals += 1;
            }
            let disposed = sender.settle(number, &outcome);
            finish(&disposed, has_poison && tokens.len() == 1);
        };
        for op in ops {
            match op {
                Op::Push(count) => {
                    for _ in 0..count {
                        sender.outbox.push(item(next, 10));
                        next += 1;
                    }
                }
                Op::Send => {
                    let number = sender.number;
                    if let Some(tokens) = sender.send() {
                        prop_assert!(tokens.is_sorted());
                        under_way.insert(number, tokens);
                    }
                }
                Op::Settle(index, kind) => {
                    let number = under_way.keys().nth(index % 8).copied();
                    if let Some(number) = number {
                        let tokens = under_way.remove(&number).unwrap();
                        settle(&mut sender, number, &tokens, kind);
                    }
                }
                Op::Pass(ms) => sender.now += Duration::from_millis(ms.into()),
            }
        }
        // Everything that is left goes through.
        for _ in 0..5000 {
            for (number, tokens) in std::mem::take(&mut under_way) {
                settle(&mut sender, number, &tokens, 9);
            }
            let number = sender.number;
            match sender.send() {
                Some(tokens) => {
                    under_way.insert(number, tokens);
                }
                None if !sender.outbox.has_waiting() => break,
                None => sender.now += Duration::from_millis(500),
            }
        }
        prop_assert_eq!(ended.len() as u64, next);
        for (token, taken) in &ended {
            prop_assert_eq!(*taken, !poison.contains(token));
        }
        if refusals == 0 {
            prop_assert!(arrived.into_values().flatten().is_sorted());
        }
    }
}
