//! Single situations of the machine, in words.

use edgehub_proto::clock::{Clock as _, ManualClock};
use edgehub_proto::message::{Message, SystemProperty};
use edgehub_proto::stored;
use edgehub_storage::{Entry, Outcome, QueueId, ReadBatch};

use super::limits::{DELIVERIES_MAX, OFFSETS_OUT_MAX, SHARED_SLOT, WINDOW_BYTES_MAX};
use super::machine::{Ended, Machine};
use super::stream::Source;
use crate::hub::{C2D_STREAM, Delivery, DeliveryToken, OfferError, Settlement};
use crate::telemetry::metrics::DropReason;
use crate::test_support::id;

/// A machine whose queues are texts in memory.
struct World {
    machine: Machine<usize>,
    queues: Vec<Vec<Entry>>,
}

impl World {
    /// Queues by input, priority and slot.
    fn new(window: usize, queues: &[(&str, u32, u16)]) -> Self {
        let mut world = Self {
            machine: Machine::new(window),
            queues: vec![Vec::new(); queues.len()],
        };
        world.configure(queues);
        world.machine.connected(true);
        world.machine.subscribed();
        world
    }

    fn configure(&mut self, queues: &[(&str, u32, u16)]) {
        let sources = queues.iter().enumerate();
        let sources = sources.map(|(queue, (input, priority, slot))| Source {
            id: QueueId {
                endpoint: format!("edge1/modA/{input}"),
                priority: *priority,
            },
            input: (*input).into(),
            slot: *slot,
            opened_end: 0,
            queue,
        });
        self.machine.configure(sources.collect());
    }

    fn append(&mut self, queue: usize, bodies: &[&str]) {
        for body in bodies {
            self.append_from("leaf0", queue, None, body.as_bytes(), None);
        }
    }

    fn append_from(
        &mut self,
        sender: &str,
        queue: usize,
        output: Option<&str>,
        body: &[u8],
        expires_at_ms: Option<u64>,
    ) {
        let mut message = Message {
            body: body.to_vec().into(),
            ..Message::default()
        };
        if let Some(output) = output {
            message.system.set(SystemProperty::OutputName, output);
        }
        let entries = &mut self.queues[queue];
        entries.push(Entry {
            offset: entries.len() as u64,
            sender: id(sender),
            message: stored::encode_message(&message),
            enqueued_ms: 0,
            expires_at_ms,
            shared: None,
        });
    }

    fn read(&mut self) {
        for stream in self.machine.streams_mut() {
            stream.end = self.queues[stream.source.queue].len() as u64;
        }
        while let Some((index, from)) = self.machine.next_read() {
            let queue = self.machine.streams_mut()[index].source.queue;
            let entries = self.queues[queue]
                .iter()
                .skip(usize::try_from(from).unwrap());
            let batch = ReadBatch {
                entries: entries.cloned().collect(),
                next: self.queues[queue].len() as u64,
            };
            self.machine.filled(index, batch);
        }
    }

    fn batch(&mut self, now_ms: u64) -> Vec<Delivery> {
        self.read();
        let batch = self.machine.batch(now_ms);
        self.machine.check();
        batch
    }

    /// Sends what can be sent; as `slot:number body`, `+` marks a redelivery.
    fn send(&mut self) -> Vec<String> {
        let mut sent = self.batch(0);
        self.machine.offered();
        while self.machine.has_work() {
            sent.extend(self.batch(0));
            self.machine.offered();
        }
        let show = |delivery: Delivery| {
            let DeliveryToken { stream, number } = delivery.token;
            let body = String::from_utf8(delivery.message.body.to_vec()).unwrap();
            let mark = if delivery.redelivered { "+" } else { "" };
            format!("{stream}:{number}{mark} {body}")
        };
        sent.into_iter().map(show).collect()
    }

    fn settle(&mut self, stream: u16, number: u64, settlement: Settlement) {
        let token = DeliveryToken { stream, number };
        self.machine.settled(&[(token, settlement)]);
        self.machine.check();
    }

    fn done(&mut self, stream: u16, number: u64) {
        self.settle(stream, number, Settlement::Done);
    }

    /// Offsets and outcomes that go to the store, of all queues.
    fn handed_over(&mut self) -> Vec<(u64, Outcome)> {
        let streams = self.machine.streams_mut().iter_mut();
        let settled = streams.flat_map(|stream| std::mem::take(&mut stream.settled));
        settled.map(|s| (s.offset, s.outcome)).collect()
    }
}

const NOTHING: [&str; 0] = [];

#[test]
fn inputs_take_turns_and_none_takes_the_whole_window() {
    let mut world = World::new(4, &[("a", 7, 0), ("b", 7, 1)]);
    world.append(0, &["a0", "a1", "a2", "a3", "a4"]);
    assert_eq!(world.send(), ["0:0 a0", "0:1 a1", "0:2 a2"]);
    world.append(1, &["b0", "b1"]);
    assert_eq!(
        world.send(),
        ["1:0 b0"],
        "the place that is kept for others"
    );
    world.done(0, 1);
    assert_eq!(world.send(), ["0:3 a3"]);
    world.done(0, 0);
    world.done(0, 2);
    assert_eq!(world.send(), ["1:1 b1", "0:4 a4"]);
}

#[test]
fn an_input_alone_has_the_whole_window() {
    let mut world = World::new(3, &[("a", 7, 0)]);
    world.append(0, &["0", "1", "2", "3"]);
    assert_eq!(world.send(), ["0:0 0", "0:1 1", "0:2 2"]);
    assert_eq!(world.send(), NOTHING);
    world.done(0, 2);
    assert_eq!(world.send(), ["0:3 3"]);
    world.done(0, 0);
    world.done(0, 3);
    let over = [0, 2, 3].map(|offset| (offset, Outcome::Done));
    let mut handed_over = world.handed_over();
    handed_over.sort_by_key(|(offset, _)| *offset);
    assert_eq!(handed_over, over);
}

#[test]
fn the_strict_mode_has_one_out() {
    let mut world = World::new(1, &[("a", 7, 0), ("b", 7, 1)]);
    world.append(0, &["a0", "a1"]);
    world.append(1, &["b0"]);
    assert_eq!(world.send(), ["0:0 a0"]);
    assert_eq!(world.send(), NOTHING);
    world.done(0, 0);
    assert_eq!(world.send(), ["1:0 b0"]);
    world.done(1, 0);
    assert_eq!(world.send(), ["0:1 a1"]);
}

#[test]
fn a_better_priority_goes_first_whenever_something_is_sent() {
    let mut world = World::new(2, &[("a", 9, 1), ("a", 0, 0)]);
    world.append(0, &["low0", "low1", "low2"]);
    assert_eq!(world.send(), ["1:0 low0", "1:1 low1"]);
    world.append(1, &["high0"]);
    world.done(1, 0);
    assert_eq!(world.send(), ["0:0 high0"]);
    world.done(1, 1);
    assert_eq!(world.send(), ["1:2 low2"]);
}

#[test]
fn what_expires_while_it_waits_is_not_sent() {
    let mut world = World::new(2, &[("a", 7, 0)]);
    for (body, expires) in [("0", 10), ("1", 20), ("2", 11), ("3", 30)] {
        world.append_from("leaf0", 0, Some("out"), body.as_bytes(), Some(expires));
    }
    let batch = world.batch(10);
    let numbers: Vec<_> = batch.iter().map(|d| d.token.number).collect();
    assert_eq!(numbers, [1, 2], "at its time it is over");
    world.machine.offered();
    world.done(0, 1);
    world.done(0, 2);
    assert!(world.batch(30).is_empty());
    assert_eq!(
        world.handed_over(),
        [
            (0, Outcome::Expired),
            (1, Outcome::Done),
            (2, Outcome::Done),
            (3, Outcome::Expired)
        ]
    );
    let ended: Vec<_> = world.machine.drain_ended().collect();
    let dropped = ended.iter().map(|e| (e.dropped, e.count, &*e.output));
    assert_eq!(
        dropped.collect::<Vec<_>>(),
        [
            // It was never decoded.
            (Some(DropReason::TtlExpiry), 1, ""),
            (None, 2, "out"),
            (Some(DropReason::TtlExpiry), 1, ""),
        ]
    );
}

#[test]
fn a_record_that_is_no_message_is_dropped_and_stops_nothing() {
    let mut world = World::new(2, &[("a", 7, 0)]);
    world.append(0, &["0", "1"]);
    world.queues[0][0].message = vec![0xff; 9].into();
    assert_eq!(world.send(), ["0:1 1"]);
    assert_eq!(world.handed_over(), [(0, Outcome::Dropped)]);
    let ended: Vec<_> = world.machine.drain_ended().collect();
    assert_eq!(ended[0].dropped, Some(DropReason::Damaged));
}

#[test]
fn an_input_without_a_subscription_pauses_and_the_others_do_not() {
    let mut world = World::new(8, &[("a", 7, 0), ("b", 7, 1)]);
    world.append(0, &["a0", "a1", "a2"]);
    world.append(1, &["b0"]);
    assert_eq!(world.send(), ["0:0 a0", "1:0 b0", "0:1 a1", "0:2 a2"]);
    world.done(0, 0);
    world.settle(0, 1, Settlement::NotSubscribed);
    world.settle(0, 2, Settlement::NotSubscribed);
    world.append(0, &["a3"]);
    world.append(1, &["b1"]);
    assert_eq!(world.send(), ["1:1 b1"]);
    world.machine.subscribed();
    assert_eq!(world.send(), ["0:1 a1", "0:2 a2", "0:3 a3"], "not marked");
    assert_eq!(world.handed_over(), [(0, Outcome::Done)]);
}

#[test]
fn what_cannot_be_sent_over_this_protocol_is_dropped_and_counted() {
    let mut world = World::new(2, &[("a", 7, 0)]);
    world.append_from("edge1/modB", 0, Some("out"), b"x", None);
    world.send();
    world.settle(0, 0, Settlement::Undeliverable);
    assert_eq!(world.handed_over(), [(0, Outcome::Dropped)]);
    let ended: Vec<_> = world.machine.drain_ended().collect();
    let expected = Ended {
        input: "a".into(),
        priority: 7,
        sender: id("edge1/modB"),
        output: "out".to_owned(),
        dropped: Some(DropReason::Undeliverable),
        count: 1,
        since_read: None,
        since_sent: None,
    };
    assert_eq!(ended, [expected]);
}

#[test]
fn a_reconnect_sends_again_in_order_what_is_not_settled_and_marks_what_was_out() {
    let mut world = World::new(3, &[("a", 7, 0)]);
    world.append(0, &["0", "1", "2", "3"]);
    world.send();
    world.done(0, 1);
    assert_eq!(world.handed_over(), [(1, Outcome::Done)]);
    world.machine.handed_over();
    world.machine.connected(false);
    assert!(world.machine.wants_barrier(), "1 must not be read again");
    world.queues[0][1].expires_at_ms = Some(0);
    world.machine.barrier();
    assert_eq!(world.send(), NOTHING, "it is not subscribed yet");
    world.machine.subscribed();
    assert_eq!(world.send(), ["0:0+ 0", "0:2+ 2", "0:3 3"]);
    // A clean session knows nothing of it.
    world.machine.disconnected();
    world.machine.connected(true);
    world.machine.subscribed();
    assert_eq!(world.send(), ["0:0 0", "0:2 2", "0:3 3"]);
}

#[test]
fn after_a_restart_the_first_windows_worth_may_have_been_sent() {
    let mut world = World::new(20, &[]);
    world.queues = vec![Vec::new()];
    let bodies: Vec<_> = (0..18).map(|n| n.to_string()).collect();
    let bodies: Vec<_> = bodies.iter().map(String::as_str).collect();
    world.append(0, &bodies);
    world.machine.configure(vec![Source {
        id: QueueId {
            endpoint: "edge1/modA/a".to_owned(),
            priority: 7,
        },
        input: "a".into(),
        slot: 0,
        opened_end: 17,
        queue: 0,
    }]);
    world.machine.connected(false);
    world.machine.subscribed();
    let sent = world.send();
    assert!(sent[..17].iter().all(|text| text.contains('+')), "{sent:?}");
    assert_eq!(sent[17], "0:17 17", "it came later");
}

#[test]
fn nothing_is_lost_when_the_outbox_is_full_or_the_client_is_gone() {
    let mut world = World::new(4, &[("a", 7, 0), ("b", 7, 1)]);
    world.append(0, &["a0", "a1"]);
    world.append(1, &["b0"]);
    assert_eq!(world.batch(0).len(), 3);
    world.machine.refused(OfferError::Full);
    world.machine.check();
    assert!(world.machine.wants_retry() && !world.machine.has_work());
    assert!(world.batch(0).is_empty());
    world.machine.retry();
    assert_eq!(world.send().len(), 3);
    world.append(0, &["a2"]);
    assert_eq!(world.batch(0).len(), 1);
    world.machine.refused(OfferError::Full);
    // A settlement shows that the client reads.
    world.done(1, 0);
    assert_eq!(world.batch(0).len(), 1);
    world.machine.refused(OfferError::NotSubscribed);
    world.machine.retry();
    assert!(world.batch(0).is_empty() && !world.machine.wants_retry());
    world.machine.subscribed();
    assert_eq!(world.send(), ["0:2 a2"]);
}

#[test]
fn a_settlement_that_names_nothing_that_is_out_is_counted_and_ignored() {
    let mut world = World::new(4, &[("a", 7, 0), ("b", 7, 1)]);
    world.append(0, &["0"]);
    world.send();
    world.done(1, 0);
    world.done(0, 1);
    world.done(9, 0);
    assert_eq!(world.machine.take_ignored(), 3);
    world.done(C2D_STREAM, 0);
    assert_eq!(world.machine.take_ignored(), 0, "that is another service's");
    world.done(0, 0);
    world.done(0, 0);
    assert_eq!(world.machine.take_ignored(), 1);
    assert_eq!(world.handed_over(), [(0, Outcome::Done)]);
}

#[test]
fn the_bytes_that_are_out_are_bounded_and_a_large_message_goes_alone() {
    let mut world = World::new(16, &[("a", 7, 0)]);
    let large = vec![b'x'; WINDOW_BYTES_MAX];
    world.append_from("leaf0", 0, None, &large, None);
    world.append(0, &["small"]);
    assert_eq!(world.batch(0).len(), 1);
    world.machine.offered();
    assert!(world.batch(0).is_empty());
    world.done(0, 0);
    assert_eq!(world.send(), ["0:1 small"]);
}

#[test]
fn a_message_that_is_never_acknowledged_holds_up_its_queue_before_numbers_meet() {
    for slot in [0, SHARED_SLOT] {
        let mut world = World::new(16, &[("a", 7, slot)]);
        let count = OFFSETS_OUT_MAX + 10;
        for _ in 0..count {
            world.append(0, &["x"]);
        }
        let mut sent = 0;
        loop {
            let batch = world.batch(0);
            world.machine.offered();
            if batch.is_empty() {
                break;
            }
            sent += batch.len() as u64;
            for delivery in batch {
                if delivery.token.number > 0 {
                    world.done(slot, delivery.token.number);
                }
            }
        }
        assert_eq!(sent, OFFSETS_OUT_MAX, "slot {slot}");
        world.done(slot, 0);
        assert_eq!(world.batch(0).len(), 10);
    }
}

#[test]
fn queues_that_share_a_slot_have_numbers_that_do_not_meet() {
    let mut world = World::new(16, &[("a", 7, SHARED_SLOT), ("b", 7, SHARED_SLOT)]);
    world.append(0, &["a0", "a1"]);
    world.append(1, &["b0", "b1"]);
    assert_eq!(world.send(), ["14:0 a0", "14:1 b0", "14:2 a1", "14:3 b1"]);
    world.done(14, 1);
    world.machine.connected(false);
    world.machine.barrier();
    world.queues[1][0].expires_at_ms = Some(0);
    world.machine.subscribed();
    world.append(0, &["a2"]);
    // The same numbers as before, in order per queue.
    assert_eq!(
        world.send(),
        ["14:0+ a0", "14:3+ b1", "14:2+ a1", "14:4 a2"]
    );
    world.done(14, 3);
    world.done(14, 2);
    let mut over = world.handed_over();
    over.retain(|(_, outcome)| *outcome == Outcome::Done);
    assert_eq!(
        over,
        [(1, Outcome::Done), (0, Outcome::Done), (1, Outcome::Done)]
    );
}

#[test]
fn a_queue_that_goes_sends_no_more_and_what_is_out_of_it_is_still_settled() {
    let mut world = World::new(2, &[("a", 7, 0), ("b", 7, 1)]);
    world.append(0, &["a0", "a1", "a2"]);
    assert_eq!(world.send(), ["0:0 a0", "0:1 a1"]);
    world.configure(&[]);
    world.done(0, 0);
    assert_eq!(world.send(), NOTHING);
    assert_eq!(world.handed_over(), [(0, Outcome::Done)]);
    world.machine.handed_over();
    // It comes back before the last one is settled: nothing is sent twice.
    world.configure(&[("a", 7, 0)]);
    assert_eq!(world.send(), ["0:2 a2"]);
    world.done(0, 1);
    world.done(0, 2);
    assert_eq!(
        world.handed_over(),
        [(1, Outcome::Done), (2, Outcome::Done)]
    );
    world.machine.handed_over();
    world.configure(&[]);
    assert!(world.machine.streams_mut().is_empty());
}

#[test]
fn what_is_given_back_comes_again_in_its_place_ten_times_in_all() {
    let mut world = World::new(2, &[("in", 0, 0)]);
    world.append(0, &["a", "b", "c"]);
    assert_eq!(world.send(), ["0:0 a", "0:1 b"]);
    for _ in 1..DELIVERIES_MAX {
        world.settle(0, 0, Settlement::Released);
        assert_eq!(world.send(), ["0:0+ a"], "before c");
        assert_eq!(world.handed_over(), []);
    }
    world.settle(0, 0, Settlement::Released);
    assert_eq!(world.handed_over(), [(0, Outcome::Dropped)]);
    let dropped: Vec<_> = world.machine.drain_ended().map(|e| e.dropped).collect();
    assert_eq!(dropped, [Some(DropReason::ReleasedTooOften)]);
    assert_eq!(world.send(), ["0:2 c"]);
}

#[test]
fn it_is_told_how_long_messages_took() {
    let second = std::time::Duration::from_secs(1);
    let begin = ManualClock::new(0).instant();
    let mut world = World::new(2, &[("in", 0, 0)]);
    world.append(0, &["a", "b", "c"]);
    world.machine.at(begin);
    world.send();
    world.machine.at(begin + second);
    world.done(0, 0);
    world.done(0, 1);
    world.send();
    world.machine.at(begin + 3 * second);
    world.done(0, 2);
    let ended: Vec<_> = world.machine.drain_ended().collect();
    let took = ended.iter().map(|e| (e.count, e.since_read, e.since_sent));
    let expected = [
        (2, Some(second), Some(second)),
        (1, Some(3 * second), Some(2 * second)),
    ];
    assert_eq!(took.collect::<Vec<_>>(), expected);
}

#[test]
fn what_is_rejected_is_dropped() {
    let mut world = World::new(4, &[("in", 0, 0)]);
    world.append(0, &["a", "b"]);
    assert_eq!(world.send(), ["0:0 a", "0:1 b"]);
    world.settle(0, 1, Settlement::Rejected);
    assert_eq!(world.handed_over(), [(1, Outcome::Dropped)]);
    let dropped: Vec<_> = world.machine.drain_ended().map(|e| e.dropped).collect();
    assert_eq!(dropped, [Some(DropReason::Rejected)]);
}

#[test]
fn what_is_given_back_is_counted_anew_on_a_new_connection() {
    let mut world = World::new(4, &[("in", 0, 0)]);
    world.append(0, &["a"]);
    world.send();
    for _ in 1..DELIVERIES_MAX {
        world.settle(0, 0, Settlement::Released);
        world.send();
    }
    world.machine.connected(false);
    world.machine.subscribed();
    assert_eq!(world.send(), ["0:0+ a"]);
    world.settle(0, 0, Settlement::Released);
    assert_eq!(world.send(), ["0:0+ a"]);
    assert_eq!(world.handed_over(), []);
}
