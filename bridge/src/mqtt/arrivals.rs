//! Publishes from upstream that are not acknowledged yet, in the order of their arrival.
//!
//! A cloud-to-device message is acknowledged when it is settled below, and acknowledgements leave in
//! the order of arrival (MQTT-4.6.0-2): one that is settled early waits for those before it. A
//! limited number is handed down at a time, a further one is held back, and with more the session
//! has to end: the upstream keeps what is not acknowledged.

use std::{collections::VecDeque, num::NonZeroU16};

use edgehub_proto::message::Message;

use crate::limits::{ARRIVALS_HELD_BYTES_MAX, ARRIVALS_HELD_MAX, CLOUD_TO_DEVICE_FORWARDED_MAX};

/// Names one arrival within its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Serial(u64);

/// A message to be handed down.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) serial: Serial,
    pub(super) message: Message,
    pub(super) redelivered: bool,
}

/// More came than is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overrun;

#[derive(Debug)]
struct Arrival {
    serial: Serial,
    /// None at QoS 0, where there is nothing to acknowledge.
    packet_id: Option<NonZeroU16>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Waits to be handed down.
    Held {
        message: Box<Message>,
        redelivered: bool,
        bytes: usize,
    },
    /// Handed down.
    Forwarded,
    /// Waits for those before it.
    Settled,
}

/// The arrivals of one session.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    queue: VecDeque<Arrival>,
    next: u64,
    held_bytes: usize,
    forwarded: usize,
}

impl Arrivals {
    /// A cloud-to-device message came. One that is sent again under a packet id that is here already
    /// is ignored. Without the DUP flag it is another one: the reference's hub numbers all its
    /// publishes 1 and takes acknowledgements in order (spec/mqtt.md 8.4).
    pub(super) fn message(
        &mut self,
        packet_id: Option<NonZeroU16>,
        message: Message,
        redelivered: bool,
    ) -> Result<(), Overrun> {
        let is_here = |one: &Arrival| packet_id.is_some() && one.packet_id == packet_id;
        if redelivered && self.queue.iter().any(is_here) {
            return Ok(());
        }
        let bytes = message.size();
        let state = State::Held {
            message: Box::new(message),
            redelivered,
            bytes,
        };
        self.push(packet_id, state)?;
        self.held_bytes += bytes;
        if self.held_bytes > ARRIVALS_HELD_BYTES_MAX {
            return Err(Overrun);
        }
        Ok(())
    }

    /// Something came that needs nothing but an acknowledgement in its turn.
    pub(super) fn nothing(&mut self, packet_id: NonZeroU16) -> Result<(), Overrun> {
        self.push(Some(packet_id), State::Settled)
    }

    fn push(&mut self, packet_id: Option<NonZeroU16>, state: State) -> Result<(), Overrun> {
        if self.queue.len() >= CLOUD_TO_DEVICE_FORWARDED_MAX + ARRIVALS_HELD_MAX {
            return Err(Overrun);
        }
        let serial = Serial(self.next);
        self.next += 1;
        self.queue.push_back(Arrival {
            serial,
            packet_id,
            state,
        });
        Ok(())
    }

    /// The next message to be handed down, if there may be one more.
    pub(super) fn forward(&mut self) -> Option<Forward> {
        if self.forwarded >= CLOUD_TO_DEVICE_FORWARDED_MAX {
            return None;
        }
        let is_held = |one: &&mut Arrival| matches!(one.state, State::Held { .. });
        let arrival = self.queue.iter_mut().find(is_held)?;
        let State::Held {
            message,
            redelivered,
            bytes,
        } = std::mem::replace(&mut arrival.state, State::Forwarded)
        else {
            return None;
        };
        self.forwarded += 1;
        self.held_bytes = self.held_bytes.saturating_sub(bytes);
        Some(Forward {
            serial: arrival.serial,
            message: *message,
            redelivered,
        })
    }

    /// A message that was handed down is settled.
    pub(super) fn settle(&mut self, serial: Serial) {
        let index = self.queue.binary_search_by_key(&serial, |one| one.serial);
        let arrival = index.ok().and_then(|index| self.queue.get_mut(index));
        if let Some(arrival) = arrival
            && matches!(arrival.state, State::Forwarded)
        {
            arrival.state = State::Settled;
            self.forwarded = self.forwarded.saturating_sub(1);
        }
    }

    /// The next packet id to acknowledge: everything that came before it has been.
    pub(super) fn acknowledge(&mut self) -> Option<NonZeroU16> {
        while let Some(front) = self.queue.front()
            && matches!(front.state, State::Settled)
        {
            if let Some(packet_id) = self.queue.pop_front().and_then(|one| one.packet_id) {
                return Some(packet_id);
            }
        }
        None
    }

    /// Whether the message can come again: the upstream waits for its acknowledgement.
    pub(super) fn is_kept_upstream(&self, serial: Serial) -> bool {
        let index = self.queue.binary_search_by_key(&serial, |one| one.serial);
        let arrival = index.ok().and_then(|index| self.queue.get(index));
        arrival.is_some_and(|arrival| arrival.packet_id.is_some())
    }

    /// Messages that are handed down and not settled.
    #[cfg(test)]
    pub(super) fn forwarded(&self) -> usize {
        self.forwarded
    }

    /// Whether some message is not settled that the upstream would deliver again.
    pub(super) fn has_unsettled(&self) -> bool {
        self.queue
            .iter()
            .any(|one| one.packet_id.is_some() && !matches!(one.state, State::Settled))
    }

    /// Drops the messages that are not handed down. Those that the upstream keeps stay there.
    pub(super) fn drop_held(&mut self) {
        self.queue
            .retain(|one| !matches!(one.state, State::Held { .. }));
        self.held_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn id(number: u16) -> Option<NonZeroU16> {
        Some(NonZeroU16::new(number).unwrap())
    }

    fn message(size: usize) -> Message {
        Message {
            body: Bytes::from(vec![0; size]),
            ..Message::default()
        }
    }

    fn acks(arrivals: &mut Arrivals) -> Vec<u16> {
        std::iter::from_fn(|| arrivals.acknowledge())
            .map(NonZeroU16::get)
            .collect()
    }

    #[test]
    fn acknowledgements_leave_in_the_order_of_arrival() {
        let mut arrivals = Arrivals::default();
        for number in [7, 3, 9] {
            arrivals.message(id(number), message(1), false).unwrap();
        }
        arrivals.nothing(id(4).unwrap()).unwrap();
        let serials: Vec<Serial> = std::iter::from_fn(|| arrivals.forward())
            .map(|forward| forward.serial)
            .collect();
        assert_eq!((serials.len(), arrivals.forwarded()), (3, 3));
        arrivals.settle(serials[1]);
        arrivals.settle(serials[2]);
        assert_eq!(acks(&mut arrivals), [] as [u16; 0]);
        arrivals.settle(serials[0]);
        arrivals.settle(serials[0]);
        assert_eq!(acks(&mut arrivals), [7, 3, 9, 4]);
        assert_eq!(arrivals.forwarded(), 0);
    }

    #[test]
    fn a_limited_number_is_handed_down_a_limited_number_is_held_and_then_it_is_too_much() {
        let mut arrivals = Arrivals::default();
        let room = CLOUD_TO_DEVICE_FORWARDED_MAX + ARRIVALS_HELD_MAX;
        for number in 1..=room {
            let number = u16::try_from(number).unwrap();
            arrivals.message(id(number), message(1), false).unwrap();
        }
        let forwards: Vec<Forward> = std::iter::from_fn(|| arrivals.forward()).collect();
        assert_eq!(forwards.len(), CLOUD_TO_DEVICE_FORWARDED_MAX);
        let known = arrivals.message(id(1), message(1), true);
        assert_eq!(known, Ok(()));
        assert_eq!(arrivals.message(id(999), message(1), false), Err(Overrun));
        arrivals.settle(forwards[0].serial);
        assert_eq!(acks(&mut arrivals), [1]);
        assert!(arrivals.forward().is_some());
        assert_eq!(arrivals.message(id(999), message(1), false), Ok(()));
    }

    #[test]
    fn the_bytes_that_are_held_are_limited() {
        let mut arrivals = Arrivals::default();
        let half = ARRIVALS_HELD_BYTES_MAX / 2;
        arrivals.message(id(1), message(half), false).unwrap();
        arrivals.message(id(2), message(half), false).unwrap();
        assert!(arrivals.forward().is_some());
        arrivals.message(id(3), message(half), false).unwrap();
        assert_eq!(arrivals.message(id(4), message(1), false), Err(Overrun));
    }

    #[test]
    fn at_qos_0_there_is_nothing_to_acknowledge_and_nothing_comes_again() {
        let mut arrivals = Arrivals::default();
        arrivals.message(None, message(1), false).unwrap();
        arrivals.message(None, message(1), false).unwrap();
        arrivals.message(id(5), message(1), true).unwrap();
        let forwards: Vec<Forward> = std::iter::from_fn(|| arrivals.forward()).collect();
        let flags: Vec<bool> = forwards.iter().map(|one| one.redelivered).collect();
        assert_eq!(flags, [false, false, true]);
        assert!(!arrivals.is_kept_upstream(forwards[0].serial));
        assert!(arrivals.is_kept_upstream(forwards[2].serial));
        assert!(arrivals.has_unsettled());
        arrivals.settle(forwards[2].serial);
        assert!(!arrivals.has_unsettled());
        arrivals.settle(forwards[0].serial);
        arrivals.settle(forwards[1].serial);
        assert_eq!(acks(&mut arrivals), [5]);
    }

    #[test]
    fn held_messages_can_be_dropped() {
        let mut arrivals = Arrivals::default();
        arrivals.message(None, message(10), false).unwrap();
        assert!(!arrivals.has_unsettled());
        arrivals.drop_held();
        assert_eq!(arrivals.forward(), None);
        assert_eq!(arrivals.held_bytes, 0);
    }

    /// The reference's hub: every publish has packet id 1.
    #[test]
    fn messages_under_one_packet_id_are_different_ones_unless_marked_as_sent_again() {
        let mut arrivals = Arrivals::default();
        arrivals.message(id(1), message(1), false).unwrap();
        arrivals.message(id(1), message(2), false).unwrap();
        arrivals.message(id(1), message(1), true).unwrap();
        let forwards: Vec<Forward> = std::iter::from_fn(|| arrivals.forward()).collect();
        let sizes: Vec<usize> = forwards.iter().map(|one| one.message.size()).collect();
        assert_eq!(sizes, [1, 2]);
        arrivals.settle(forwards[1].serial);
        assert_eq!(acks(&mut arrivals), [] as [u16; 0]);
        arrivals.settle(forwards[0].serial);
        assert_eq!(acks(&mut arrivals), [1, 1]);
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Message(u16, bool),
        Nothing(u16),
        Forward,
        Settle(usize),
        Acknowledge,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (1..200_u16, any::<bool>()).prop_map(|(id, dup)| Op::Message(id, dup)),
            1 => (1..200_u16).prop_map(Op::Nothing),
            3 => Just(Op::Forward),
            3 => (0..20_usize).prop_map(Op::Settle),
            2 => Just(Op::Acknowledge),
        ]
    }

    proptest! {
        /// Against a plain list: every id is acknowledged once, in the order of arrival, and only
        /// after its message was settled.
        #[test]
        fn acknowledged_once_in_order_and_only_when_settled(
            ops in proptest::collection::vec(op(), 0..200),
        ) {
            let mut arrivals = Arrivals::default();
            // Number, and the settled ones' flag; what is down is told by the place of arrival.
            let mut open: VecDeque<(u16, u64, bool)> = VecDeque::new();
            let mut down: Vec<(u64, Serial)> = Vec::new();
            let mut order = Vec::new();
            let mut place = 0;
            for op in ops {
                match op {
                    Op::Message(number, _) | Op::Nothing(number) => {
                        let known = open.iter().any(|(id, ..)| *id == number);
                        let (result, again) = match op {
                            Op::Message(_, dup) => {
                                let result = arrivals.message(id(number), message(1), dup);
                                (result, dup && known)
                            }
                            _ => (arrivals.nothing(id(number).unwrap()), false),
                        };
                        let is_full =
                            open.len() >= CLOUD_TO_DEVICE_FORWARDED_MAX + ARRIVALS_HELD_MAX;
                        prop_assert_eq!(result.is_err(), is_full && !again);
                        if !again && !is_full {
                            let is_message = matches!(op, Op::Message(..));
                            open.push_back((number, place, !is_message));
                            order.extend(is_message.then_some(place));
                            place += 1;
                        }
                    }
                    Op::Forward => {
                        if let Some(forward) = arrivals.forward() {
                            down.push((order.remove(0), forward.serial));
                        } else {
                            let limit = CLOUD_TO_DEVICE_FORWARDED_MAX;
                            prop_assert!(down.len() == limit || order.is_empty());
                        }
                    }
                    Op::Settle(index) => {
                        if !down.is_empty() {
                            let (settled, serial) = down.remove(index % down.len());
                            arrivals.settle(serial);
                            let entry = open.iter_mut().find(|(_, place, _)| *place == settled);
                            entry.unwrap().2 = true;
                        }
                    }
                    Op::Acknowledge => {
                        let expected = match open.front() {
                            Some((number, _, true)) => Some(*number),
                            _ => None,
                        };
                        let acked = arrivals.acknowledge().map(NonZeroU16::get);
                        prop_assert_eq!(acked, expected);
                        if acked.is_some() {
                            open.pop_front();
                        }
                    }
                }
                prop_assert_eq!(arrivals.forwarded(), down.len());
            }
        }
    }
}
