//! The machine against a model: random packets, cut anywhere, with commits at random moments; and
//! arbitrary bytes, which must neither panic nor pile up.

use std::collections::VecDeque;

use mqttbytes::v4::{Packet, SubscribeReasonCode};
use ntex_mqtt::v3::codec::SubscribeReturnCode;
use proptest::prelude::*;
use proptest::sample::Index;

use super::fuzz::{fuzz_bytes, fuzz_packets};
use super::limits::{PUBLISH_OVERHEAD_BYTES, UNCOMMITTED_BYTES_MAX};
use super::machine::Event;
use super::test_packets::*;

/// A packet of the client, and what the driver does with it.
#[derive(Clone, Debug)]
enum Sent {
    Ping,
    Publish {
        id: Option<u16>,
        size: usize,
        dropped: bool,
    },
    StrayAck(u16),
    Subscribe(u16, usize),
    Unsubscribe(u16),
}

impl Sent {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Ping => PINGREQ.to_vec(),
            Self::Publish { id: None, size, .. } => publish0("t", &vec![1; *size]),
            Self::Publish {
                id: Some(id), size, ..
            } => publish1("t", *id, &vec![1; *size]),
            Self::StrayAck(id) => ack(0x40, *id),
            Self::Subscribe(id, count) => subscribe(*id, &vec![("a/#", 1); *count]),
            Self::Unsubscribe(id) => unsubscribe(*id, &["a/#"]),
        }
    }
}

fn sent(size_max: usize) -> impl Strategy<Value = Sent> {
    let publish = (
        proptest::option::weighted(0.8, 1u16..20),
        0..size_max,
        any::<bool>(),
    );
    prop_oneof![
        6 => publish.prop_map(|(id, size, dropped)| Sent::Publish { id, size, dropped }),
        2 => Just(Sent::Ping),
        1 => (1u16..100).prop_map(Sent::StrayAck),
        1 => (1u16..100, 1usize..4).prop_map(|(id, count)| Sent::Subscribe(id, count)),
        1 => (1u16..100).prop_map(Sent::Unsubscribe),
    ]
}

/// What the driver does between two reads.
#[derive(Clone, Debug)]
struct Turn {
    /// Bytes of this read.
    read: usize,
    /// How far commits get: a share of what waits.
    commits: Option<Index>,
}

fn turns(read_max: usize) -> impl Strategy<Value = Vec<Turn>> {
    let turn = (1..read_max, proptest::option::of(any::<Index>()))
        .prop_map(|(read, commits)| Turn { read, commits });
    proptest::collection::vec(turn, 1..40)
}

/// A publish that the machine handed out.
#[derive(Debug)]
struct Handed {
    sequence: u64,
    id: Option<u16>,
    bytes: usize,
    dropped: bool,
}

/// The driver and the oracle in one: it knows what must have been answered by now.
struct Model {
    peer: Peer,
    /// Packets that were sent completely and not seen working yet, with their ends in the stream.
    sent: VecDeque<(usize, Sent)>,
    received: usize,
    /// Not acknowledged yet, oldest first.
    waiting: VecDeque<Handed>,
    committed: u64,
    next_sequence: u64,
}

impl Model {
    fn new(sent: &[Sent]) -> (Self, Vec<u8>) {
        let mut stream = Vec::new();
        let mut ends = VecDeque::new();
        for packet in sent {
            stream.extend(packet.bytes());
            ends.push_back((stream.len(), packet.clone()));
        }
        let model = Self {
            peer: Peer::connected(60),
            sent: ends,
            received: 0,
            waiting: VecDeque::new(),
            committed: 0,
            next_sequence: 1,
        };
        (model, stream)
    }

    fn waiting_bytes(&self) -> usize {
        self.waiting.iter().map(|handed| handed.bytes).sum()
    }

    /// The machine works; the model works off the same packets and compares. `commits` says how
    /// far the store gets afterwards.
    fn work(&mut self, commits: Option<&Index>) {
        let mut expected = Vec::new();
        let mut events = VecDeque::new();
        // As the driver does: each event is dealt with before the next is asked for.
        while let Some(event) = self.peer.machine.poll() {
            if let Event::Subscribe { .. } | Event::Unsubscribe { .. } = &event {
                self.packets_before_event(&mut expected);
                self.answer(&event, &mut expected);
                continue;
            }
            let Event::Publish(publish) = event else {
                panic!("{event:?}")
            };
            self.packets_before_event(&mut expected);
            let (_, packet) = self.sent.pop_front().expect("a publish that was sent");
            let Sent::Publish { id, size, dropped } = packet else {
                panic!("{packet:?}")
            };
            assert_eq!(
                (publish.sequence, publish.payload.len()),
                (self.next_sequence, size)
            );
            assert_eq!(publish.acknowledged, id.is_some());
            self.next_sequence += 1;
            let bytes = size + 1 + PUBLISH_OVERHEAD_BYTES;
            let sequence = publish.sequence;
            self.waiting.push_back(Handed {
                sequence,
                id,
                bytes,
                dropped,
            });
            if dropped {
                self.peer.machine.handled(sequence);
                self.acknowledge(&mut expected);
            }
            events.push_back(publish);
        }
        self.packets_before_event(&mut expected);
        let behind = self
            .sent
            .front()
            .is_some_and(|(end, _)| *end <= self.received);
        assert!(
            !behind || self.waiting_bytes() >= UNCOMMITTED_BYTES_MAX,
            "a whole packet waits though there is room: {:?}",
            self.sent.front()
        );
        assert_eq!(
            self.peer.machine.wants_input(),
            self.waiting_bytes() < UNCOMMITTED_BYTES_MAX
        );
        if let Some(share) = commits
            && self.next_sequence > self.committed + 1
        {
            let newest = self.next_sequence - 1;
            let span = usize::try_from(newest - self.committed).unwrap();
            self.committed += u64::try_from(share.index(span)).unwrap() + 1;
            self.peer.machine.committed(self.committed);
            self.acknowledge(&mut expected);
        }
        assert_eq!(self.peer.answers(), expected);
        assert_eq!(self.peer.machine.in_flight(), self.waiting.len());
    }

    /// Whole packets in front of the next event were answered at once, unless the byte limit
    /// holds them back.
    fn packets_before_event(&mut self, expected: &mut Vec<Packet>) {
        while self.waiting_bytes() < UNCOMMITTED_BYTES_MAX
            && self.sent.front().is_some_and(|(end, packet)| {
                *end <= self.received && matches!(packet, Sent::Ping | Sent::StrayAck(_))
            })
        {
            if let (_, Sent::Ping) = self.sent.pop_front().unwrap() {
                expected.push(Packet::PingResp);
            }
        }
    }

    /// The driver refuses every filter, at once.
    fn answer(&mut self, event: &Event, expected: &mut Vec<Packet>) {
        let (_, packet) = self.sent.pop_front().expect("a packet that was sent");
        let count = match packet {
            Sent::Subscribe(id, count) => {
                let codes = vec![SubscribeReasonCode::Failure; count];
                expected.push(Packet::SubAck(mqttbytes::v4::SubAck::new(id, codes)));
                count
            }
            Sent::Unsubscribe(id) => {
                expected.push(Packet::UnsubAck(mqttbytes::v4::UnsubAck::new(id)));
                0
            }
            other => panic!("{other:?}"),
        };
        self.peer
            .answer(event, &vec![SubscribeReturnCode::Failure; count]);
    }

    /// Everything at the head that needs no commit, or has it, is acknowledged; nothing else.
    fn acknowledge(&mut self, expected: &mut Vec<Packet>) {
        while let Some(handed) = self
            .waiting
            .pop_front_if(|h| h.dropped || h.sequence <= self.committed)
        {
            if let Some(id) = handed.id {
                expected.push(Packet::PubAck(mqttbytes::v4::PubAck::new(id)));
            }
        }
    }

    /// Reads the whole stream in the given turns, then without pause, then commits the rest.
    fn run(mut self, stream: &[u8], turns: &[Turn]) {
        let mut rest = stream;
        let endless = Turn {
            read: 65_536,
            commits: None,
        };
        let last = std::iter::repeat(&endless);
        for turn in turns.iter().chain(last) {
            if rest.is_empty() {
                break;
            }
            if self.peer.machine.wants_input() {
                let (now, later) = rest.split_at(turn.read.min(rest.len()));
                rest = later;
                self.received += now.len();
                self.peer.machine.receive(now, self.peer.now);
            } else if turn.commits.is_none() {
                // Reading stopped: only a commit goes on.
                self.commit_all();
            }
            self.work(turn.commits.as_ref());
        }
        while !self.sent.is_empty() || !self.waiting.is_empty() {
            self.commit_all();
            self.work(None);
        }
    }

    fn commit_all(&mut self) {
        let mut expected = Vec::new();
        self.committed = self.next_sequence - 1;
        self.peer.machine.committed(self.committed);
        self.acknowledge(&mut expected);
        assert_eq!(self.peer.answers(), expected);
    }
}

proptest! {
    #[test]
    fn any_dialogue_is_answered_as_the_model_says(
        packets in proptest::collection::vec(sent(200), 1..40),
        turns in turns(300),
    ) {
        let (model, stream) = Model::new(&packets);
        model.run(&stream, &turns);
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        fuzz_bytes(&bytes);
    }

    #[test]
    fn damaged_packets_are_survived(
        packets in proptest::collection::vec(sent(40), 1..12),
        damage in proptest::collection::vec((any::<Index>(), any::<u8>()), 0..6),
        cuts in proptest::collection::vec((any::<Index>(), any::<Index>()), 0..3),
        how in any::<u8>(),
    ) {
        let mut stream = vec![how | 0x80];
        for packet in &packets {
            stream.extend(packet.bytes());
        }
        for (at, value) in damage {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        for (from, to) in cuts {
            if stream.is_empty() {
                break;
            }
            let (from, to) = (from.index(stream.len()), to.index(stream.len()));
            stream.drain(from.min(to)..from.max(to));
        }
        fuzz_bytes(&stream);
    }

    /// The oracle of the fuzz target, on dialogues that are random from their first step.
    #[test]
    fn any_dialogue_with_deliveries_goes_as_the_oracle_says(
        steps in proptest::collection::vec(any::<u8>(), 0..1_500),
    ) {
        fuzz_packets(&steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_byte_limit_holds_back_and_loses_nothing(
        packets in proptest::collection::vec(sent(150_000), 20..40),
        turns in turns(65_536),
    ) {
        let (model, stream) = Model::new(&packets);
        model.run(&stream, &turns);
    }
}
