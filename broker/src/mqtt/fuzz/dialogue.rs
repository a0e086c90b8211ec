//! A dialogue of client, machine and hub, and the oracle that knows its outcome.
//!
//! The oracle is a second, naive telling of the same contract: it keeps lists, writes packets by
//! hand and never looks into the machine.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU16;
use std::time::Instant;

use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::SubscribeReturnCode;

use super::{CONNECT, TIMING, beginning};
use crate::hub::DeliveryToken;
use crate::mqtt::machine::{CloseReason, Event, Machine, Sent};

const TOPIC: &str = "devices/d1/messages/devicebound/a=1";

/// One step of a dialogue.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// The client sends a packet.
    Client(Packet),
    /// From now on so many bytes of what the client sent last are not received yet.
    HoldBack(usize),
    /// So many more of the waiting messages are committed.
    Commit(u64),
    /// The hub answers the oldest SUBSCRIBE or UNSUBSCRIBE.
    Answer,
    /// The hub sends a delivery.
    Deliver(DeliveryToken, bool),
    /// The hub sends something at QoS 0.
    Publish(u8),
}

/// A packet of the client.
#[derive(Clone, Copy, Debug)]
pub(super) enum Packet {
    Ping,
    /// QoS 0 without an id. `handled`: the driver needs no commit for it.
    Publish {
        id: u16,
        handled: bool,
    },
    Ack(u16),
    Subscribe {
        id: u16,
        count: u8,
    },
    Unsubscribe(u16),
    Disconnect,
    Connect,
    /// A packet that only a server sends.
    Illegal,
}

/// The next step of `data` and the rest: a byte that says which, and two of parameters.
pub(super) fn read_step(data: &[u8]) -> Option<(Step, &[u8])> {
    let (&[kind, one, two], rest) = data.split_first_chunk::<3>()?;
    let id = 1 + u16::from(one);
    let packet = match kind % 32 {
        0..=3 => Packet::Publish {
            id,
            handled: two & 1 == 0,
        },
        4 => Packet::Publish {
            id: 0,
            handled: two & 1 == 0,
        },
        5 | 6 => Packet::Ping,
        7 | 8 => Packet::Subscribe {
            id,
            count: 1 + two % 3,
        },
        9 => Packet::Unsubscribe(id),
        10..=13 => Packet::Ack(super::super::outgoing::packet_id(token(one, two)).get()),
        14 => Packet::Ack(id),
        // Rare, so that dialogues are long.
        15 if one == 7 => match two % 3 {
            0 => Packet::Disconnect,
            1 => Packet::Connect,
            _ => Packet::Illegal,
        },
        15 => Packet::Ping,
        16..=18 => return Some((Step::HoldBack(usize::from(one)), rest)),
        19..=22 => return Some((Step::Commit(u64::from(one % 8)), rest)),
        23 | 24 => return Some((Step::Answer, rest)),
        25..=30 => return Some((Step::Deliver(token(one, two), kind & 0x80 != 0), rest)),
        _ => return Some((Step::Publish(one), rest)),
    };
    Some((Step::Client(packet), rest))
}

/// Few different tokens, so that they meet: two numbers of one stream share each packet id.
fn token(one: u8, two: u8) -> DeliveryToken {
    DeliveryToken {
        stream: u16::from(one % 16),
        number: u64::from(two % 4)
            + u64::from(two >> 7) * if one % 16 == 15 { 4_095 } else { 4_096 },
    }
}

/// Codes of a SUBACK that grants everything.
pub(super) fn codes(count: usize) -> Vec<SubscribeReturnCode> {
    vec![SubscribeReturnCode::Success(QoS::AtLeastOnce); count]
}

/// The machine and what the oracle knows.
pub(super) struct Dialogue {
    machine: Machine,
    now: Instant,
    /// Sent by the client and not received, and how much of it stays so.
    wire: Vec<u8>,
    held: usize,
    /// Packets of the client with their ends in its stream, and how much of that was received.
    sent: VecDeque<(usize, Packet)>,
    sent_bytes: usize,
    received_bytes: usize,
    /// Publishes that are not acknowledged: number, packet id, handled.
    publishes: VecDeque<(u64, u16, bool)>,
    last_sequence: u64,
    committed: u64,
    /// SUBSCRIBEs (with their number of filters) and UNSUBSCRIBEs that are not answered.
    questions: VecDeque<(NonZeroU16, Option<u8>)>,
    outstanding: BTreeMap<u16, DeliveryToken>,
    closed: bool,
    /// What the client must be told next.
    expected: Vec<u8>,
}

impl Dialogue {
    /// A client that was accepted.
    pub(super) fn begin() -> Self {
        let now = beginning();
        let mut machine = Machine::new(TIMING, now);
        machine.receive(CONNECT, now);
        assert!(matches!(machine.poll(), Some(Event::Connect(_))));
        machine.accept(true, now);
        let mut dialogue = Self {
            machine,
            now,
            wire: Vec::new(),
            held: 0,
            sent: VecDeque::new(),
            sent_bytes: 0,
            received_bytes: 0,
            publishes: VecDeque::new(),
            last_sequence: 0,
            committed: 0,
            questions: VecDeque::new(),
            outstanding: BTreeMap::new(),
            closed: false,
            expected: vec![0x20, 2, 1, 0],
        };
        dialogue.compare();
        dialogue
    }

    /// Plays a step and compares.
    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Client(packet) => {
                let bytes = encode(packet);
                self.sent_bytes += bytes.len();
                self.sent.push_back((self.sent_bytes, packet));
                self.wire.extend(bytes);
                self.receive(self.held);
            }
            Step::HoldBack(bytes) => {
                self.held = bytes;
                self.receive(bytes);
            }
            Step::Commit(more) => {
                self.committed = (self.committed + more).min(self.last_sequence);
                self.machine.committed(self.committed);
                self.acknowledge();
            }
            Step::Answer => self.answer(),
            Step::Deliver(token, redelivered) => self.deliver(token, redelivered),
            Step::Publish(size) => {
                let payload = vec![b'q'; usize::from(size)];
                let sent = self.machine.publish(TOPIC.to_owned(), &payload);
                if self.closed {
                    assert_eq!(sent, Sent::Waits);
                } else {
                    assert_eq!(sent, Sent::Written);
                    self.expect_publish(0x30, None, &payload);
                }
            }
        }
        self.compare();
    }

    /// Everything is received, committed and answered: nothing may be left.
    pub(super) fn end(mut self) {
        self.receive(0);
        self.committed = self.last_sequence;
        self.machine.committed(self.committed);
        self.acknowledge();
        while !self.questions.is_empty() {
            self.answer();
        }
        self.compare();
        assert_eq!(self.machine.in_flight(), 0);
        assert_eq!(self.machine.outstanding(), self.outstanding.len());
        assert!(self.closed || self.sent.is_empty());
    }

    /// The client's bytes arrive, but for the last `held` ones.
    fn receive(&mut self, held: usize) {
        let count = self.wire.len().saturating_sub(held);
        if count == 0 || !self.machine.wants_input() {
            return;
        }
        let arrived: Vec<u8> = self.wire.drain(..count).collect();
        self.received_bytes += arrived.len();
        self.machine.receive(&arrived, self.now);
        // As a driver does: each event is dealt with before the next is asked for.
        loop {
            let expected = self.next_event();
            let event = self.machine.poll();
            match (event, expected) {
                (None, None) => return,
                (Some(Event::Publish(publish)), Some((Packet::Publish { id, handled }, _))) => {
                    assert_eq!(publish.sequence, self.last_sequence);
                    assert_eq!(publish.acknowledged, id != 0);
                    if handled {
                        self.machine.handled(publish.sequence);
                        self.acknowledge();
                    }
                }
                (
                    Some(Event::Subscribe { packet_id, filters }),
                    Some((Packet::Subscribe { id, count }, _)),
                ) => {
                    assert_eq!((packet_id.get(), filters.len()), (id, usize::from(count)));
                    self.questions.push_back((packet_id, Some(count)));
                }
                (
                    Some(Event::Unsubscribe { packet_id, filters }),
                    Some((Packet::Unsubscribe(id), _)),
                ) => {
                    assert_eq!((packet_id.get(), filters.len()), (id, 1));
                    self.questions.push_back((packet_id, None));
                }
                (Some(Event::Acknowledged(token)), Some((Packet::Ack(_), acknowledged))) => {
                    assert_eq!(Some(token), acknowledged);
                }
                (Some(Event::Close(reason)), Some((packet, _))) => {
                    let legal = match packet {
                        Packet::Disconnect => reason == CloseReason::Disconnected,
                        Packet::Connect => reason == CloseReason::SecondConnect,
                        Packet::Illegal => matches!(reason, CloseReason::Unexpected(_)),
                        _ => false,
                    };
                    assert!(legal, "{reason} for {packet:?}");
                    self.closed = true;
                }
                (event, expected) => {
                    assert_eq!(
                        format!("{event:?}"),
                        format!("{expected:?}"),
                        "another event"
                    );
                }
            }
        }
    }

    /// Works off packets that arrived whole, up to the first that the driver hears of; for an
    /// acknowledgement with what it acknowledges.
    fn next_event(&mut self) -> Option<(Packet, Option<DeliveryToken>)> {
        while !self.closed {
            let received = self.received_bytes;
            let (_, packet) = self.sent.pop_front_if(|(end, _)| *end <= received)?;
            match packet {
                Packet::Ping => self.expected.extend([0xd0, 0]),
                Packet::Ack(id) => {
                    if let Some(token) = self.outstanding.remove(&id) {
                        return Some((packet, Some(token)));
                    }
                }
                Packet::Publish { id, handled } => {
                    self.last_sequence += 1;
                    self.publishes.push_back((self.last_sequence, id, handled));
                    return Some((packet, None));
                }
                _ => return Some((packet, None)),
            }
        }
        None
    }

    /// Everything at the head that needs no commit, or has it, is acknowledged; nothing else.
    fn acknowledge(&mut self) {
        let committed = self.committed;
        while let Some((_, id, _)) = self
            .publishes
            .pop_front_if(|(sequence, _, handled)| *handled || *sequence <= committed)
        {
            if id != 0 && !self.closed {
                self.expected.extend([0x40, 2]);
                self.expected.extend(id.to_be_bytes());
            }
        }
    }

    fn answer(&mut self) {
        let Some((id, count)) = self.questions.pop_front() else {
            return;
        };
        let id_bytes = id.get().to_be_bytes();
        match count {
            Some(count) => {
                self.machine.subscribed(id, codes(usize::from(count)));
                if !self.closed {
                    self.expected.extend([0x90, 2 + count]);
                    self.expected.extend(id_bytes);
                    self.expected.extend(vec![1; usize::from(count)]);
                }
            }
            None => {
                self.machine.unsubscribed(id);
                if !self.closed {
                    self.expected.extend([0xb0, 2]);
                    self.expected.extend(id_bytes);
                }
            }
        }
    }

    fn deliver(&mut self, token: DeliveryToken, redelivered: bool) {
        let payload = token.number.to_be_bytes();
        let topic = TOPIC.to_owned();
        let sent = self.machine.deliver(token, redelivered, topic, &payload);
        // Written out once more, not taken from `outgoing`.
        let id = match token.stream {
            15 => 61_441 + token.number % 4_095,
            stream => 1 + u64::from(stream) * 4_096 + token.number % 4_096,
        };
        let id = u16::try_from(id).unwrap_or(0);
        let expected = match self.outstanding.get(&id) {
            _ if self.closed => Sent::Waits,
            Some(other) if *other == token => Sent::Repeated,
            Some(_) => Sent::Waits,
            None => {
                self.outstanding.insert(id, token);
                let first = if redelivered { 0x3a } else { 0x32 };
                self.expect_publish(first, Some(id), &payload);
                Sent::Written
            }
        };
        assert_eq!(sent, expected);
    }

    fn expect_publish(&mut self, first: u8, id: Option<u16>, payload: &[u8]) {
        let mut body = field(TOPIC);
        body.extend(id.map(u16::to_be_bytes).into_iter().flatten());
        body.extend_from_slice(payload);
        self.expected.extend(packet(first, &body));
    }

    fn compare(&mut self) {
        let output = self.machine.output().unwrap_or_default();
        self.machine.written(output.len());
        assert_eq!(output.as_ref(), self.expected.as_slice());
        self.expected.clear();
    }
}

fn encode(sent: Packet) -> Vec<u8> {
    let with_id = |first: u8, id: u16, rest: &[u8]| {
        let mut body = id.to_be_bytes().to_vec();
        body.extend_from_slice(rest);
        packet(first, &body)
    };
    match sent {
        Packet::Ping => vec![0xc0, 0],
        Packet::Publish { id: 0, .. } => packet(0x30, b"\0\x01tx"),
        Packet::Publish { id, .. } => {
            let mut body = field("t");
            body.extend(id.to_be_bytes());
            body.push(b'x');
            packet(0x32, &body)
        }
        Packet::Ack(id) => with_id(0x40, id, &[]),
        Packet::Subscribe { id, count } => {
            with_id(0x82, id, &b"\0\x03a/#\x01".repeat(usize::from(count)))
        }
        Packet::Unsubscribe(id) => with_id(0xa2, id, b"\0\x03a/#"),
        Packet::Disconnect => vec![0xe0, 0],
        Packet::Connect => CONNECT.to_vec(),
        Packet::Illegal => vec![0xd0, 0],
    }
}

fn field(text: &str) -> Vec<u8> {
    let mut bytes = u16::try_from(text.len())
        .unwrap_or(0)
        .to_be_bytes()
        .to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut rest = body.len();
    loop {
        let digit = u8::try_from(rest % 128).unwrap_or(0);
        rest /= 128;
        bytes.push(if rest > 0 { digit | 0x80 } else { digit });
        if rest == 0 {
            break;
        }
    }
    bytes.extend_from_slice(body);
    bytes
}
