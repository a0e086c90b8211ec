//! MQTT packets as bytes, written by hand, and answers read by another codec than the machine's:
//! a fault of that codec cannot hide itself.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use edgehub_proto::clock::{Clock, ManualClock};
use mqttbytes::v4::{self, Packet, Publish};
use ntex_mqtt::v3::codec::SubscribeReturnCode;

use super::machine::{Event, Incoming, Machine, Timing};

pub(super) const KEEP_ALIVE_CAP: Duration = Duration::from_secs(1767);
pub(super) const CONNECT_MAX: Duration = Duration::from_secs(60);
pub(super) const TIMING: Timing = Timing {
    connect_max: CONNECT_MAX,
    keep_alive_max: KEEP_ALIVE_CAP,
};

/// A packet: its fixed header's first byte, the remaining length, the body.
pub(super) fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut rest = body.len();
    loop {
        let digit = u8::try_from(rest % 128).unwrap();
        rest /= 128;
        bytes.push(if rest > 0 { digit | 0x80 } else { digit });
        if rest == 0 {
            break;
        }
    }
    bytes.extend_from_slice(body);
    bytes
}

/// A text or binary field with its length in front.
pub(super) fn field(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    let mut bytes = u16::try_from(data.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes
}

pub(super) fn connect_with(flags: u8, keep_alive: u16, payload: &[Vec<u8>]) -> Vec<u8> {
    let mut body = field("MQTT");
    body.extend([4, flags]);
    body.extend(keep_alive.to_be_bytes());
    body.extend(payload.concat());
    packet(0x10, &body)
}

/// What an SDK sends: client id, user name and password, persistent session.
pub(super) fn connect(keep_alive: u16) -> Vec<u8> {
    connect_with(
        0xc0,
        keep_alive,
        &[field("d1"), field("h/d1/?api-version=1"), field("token")],
    )
}

pub(super) fn publish_with(first: u8, topic: impl AsRef<[u8]>, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = field(topic);
    if first & 0x06 != 0 {
        body.extend(id.to_be_bytes());
    }
    body.extend_from_slice(payload);
    packet(first, &body)
}

pub(super) fn publish0(topic: &str, payload: &[u8]) -> Vec<u8> {
    publish_with(0x30, topic, 0, payload)
}

pub(super) fn publish1(topic: &str, id: u16, payload: &[u8]) -> Vec<u8> {
    publish_with(0x32, topic, id, payload)
}

pub(super) fn ack(first: u8, id: u16) -> Vec<u8> {
    packet(first, &id.to_be_bytes())
}

pub(super) fn subscribe(id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    for (filter, options) in filters {
        body.extend(field(filter));
        body.push(*options);
    }
    packet(0x82, &body)
}

pub(super) fn unsubscribe(id: u16, filters: &[&str]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    for filter in filters {
        body.extend(field(filter));
    }
    packet(0xa2, &body)
}

pub(super) const PINGREQ: [u8; 2] = [0xc0, 0];
pub(super) const DISCONNECT: [u8; 2] = [0xe0, 0];

/// A machine at some moment.
pub(super) struct Peer {
    pub(super) machine: Machine,
    pub(super) now: Instant,
}

impl Peer {
    /// Before CONNECT.
    pub(super) fn new() -> Self {
        let now = ManualClock::new(0).instant();
        Self {
            machine: Machine::new(TIMING, now),
            now,
        }
    }

    /// CONNECT was sent and is being judged.
    pub(super) fn deciding(keep_alive: u16) -> Self {
        let mut peer = Self::new();
        let events = peer.feed(&connect(keep_alive));
        assert!(matches!(events[..], [Event::Connect(_)]), "{events:?}");
        peer
    }

    /// Accepted; the CONNACK was taken.
    pub(super) fn connected(keep_alive: u16) -> Self {
        let mut peer = Self::deciding(keep_alive);
        peer.machine.accept(false, peer.now);
        assert_eq!(peer.answers().len(), 1);
        peer
    }

    /// Bytes from the client, and what the driver has to do then.
    pub(super) fn feed(&mut self, data: &[u8]) -> Vec<Event> {
        self.machine.receive(data, self.now);
        self.events()
    }

    pub(super) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.machine.poll()).collect()
    }

    /// The publishes among the events; anything else is a failure.
    pub(super) fn publishes(&mut self, data: &[u8]) -> Vec<Incoming> {
        let only = |event| match event {
            Event::Publish(publish) => publish,
            other => panic!("{other:?}"),
        };
        self.feed(data).into_iter().map(only).collect()
    }

    /// What the client reads, decoded.
    pub(super) fn answers(&mut self) -> Vec<Packet> {
        let Some(bytes) = self.machine.output() else {
            return Vec::new();
        };
        self.machine.written(bytes.len());
        decode(&bytes)
    }

    /// What the client reads, when that is PUBLISHes only.
    pub(super) fn delivered(&mut self) -> Vec<Publish> {
        let only = |packet| match packet {
            Packet::Publish(publish) => publish,
            other => panic!("{other:?}"),
        };
        self.answers().into_iter().map(only).collect()
    }

    /// Grants a SUBSCRIBE with these codes, or answers an UNSUBSCRIBE.
    pub(super) fn answer(&mut self, event: &Event, codes: &[SubscribeReturnCode]) {
        match event {
            Event::Subscribe { packet_id, filters } => {
                assert_eq!(filters.len(), codes.len());
                self.machine.subscribed(*packet_id, codes.to_vec());
            }
            Event::Unsubscribe { packet_id, .. } => self.machine.unsubscribed(*packet_id),
            other => panic!("{other:?}"),
        }
    }

    /// Packet ids of the PUBACKs that the client reads; anything else is a failure.
    pub(super) fn acked(&mut self) -> Vec<u16> {
        let only = |packet| match packet {
            Packet::PubAck(ack) => ack.pkid,
            other => panic!("{other:?}"),
        };
        self.answers().into_iter().map(only).collect()
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
    }
}

fn decode(bytes: &[u8]) -> Vec<Packet> {
    let mut input = BytesMut::from(bytes);
    let mut packets = Vec::new();
    while !input.is_empty() {
        packets.push(v4::read(&mut input, 1 << 20).expect("the output is whole packets"));
    }
    packets
}
