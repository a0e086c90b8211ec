//! One MQTT 3.1.1 connection as a state machine: bytes and time in, events and bytes out.
//!
//! It knows no socket, no TLS and no WebSocket, and it knows nothing of stores or identities:
//! whoever drives it authenticates, stores, routes and subscribes, and says with
//! [`Machine::committed`] how far. It acknowledges publishes in the order in which they arrived
//! (MQTT-4.6.0-2), and only when they need no commit or theirs has happened; PINGRESP never waits
//! for that, and a SUBACK only for its own session.
//!
//! Order of calls: [`Machine::receive`], then [`Machine::poll`] until it returns nothing, then
//! [`Machine::output`] into the socket and [`Machine::written`] as it goes out.
//! [`Machine::deadline`] says when to call [`Machine::expired`]. After an [`Event::Close`]
//! nothing is added to the output.
//!
//! # What is bounded
//! Publishes that wait for a commit ([`UNCOMMITTED_BYTES_MAX`]) and bytes that the client has not
//! read ([`OUTPUT_BYTES_MAX`]): beyond either, no input is worked off and none is wanted.
//! Deliveries are sent by [`Machine::deliver`] while [`Machine::has_room`]; the acknowledgements
//! that come back are worked off at once, so they need no window.
//!
//! Contract: spec/mqtt.md sections 2, 7, 8 and 9; the packet codec is ntex-mqtt's, whose gaps
//! (CONNECT flags, wildcards, lengths that lie) are checked in `strict` first.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ntex_bytes::BytesMut;
use ntex_codec::Decoder;
use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::{
    Codec, ConnectAck, ConnectAckReason, Decoded, Packet, Publish, SubscribeReturnCode,
};

pub use super::event::{CloseReason, ConnectRequest, Event, Incoming, Will};
use super::incoming::Unacknowledged;
#[cfg(doc)]
use super::limits::OUTPUT_BYTES_MAX;
use super::limits::{
    CONNECT_BYTES_MAX, FILTERS_MAX, PACKET_BYTES_MAX, PROGRESS_BYTES_MIN, PUBLISH_OVERHEAD_BYTES,
    UNCOMMITTED_BYTES_MAX,
};
use super::outgoing::{self, Outstanding, Place};
use super::output::Output;
use super::strict;
use crate::hub::DeliveryToken;

/// Times that bound a connection.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// From the beginning to a complete CONNECT.
    pub connect_max: Duration,
    /// Upper bound of the idle time; also that of keep-alive 0 (design.md D16).
    pub keep_alive_max: Duration,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Bytes of the first packet are gathered; nothing is allocated before they arrive.
    AwaitingConnect,
    /// CONNECT was handed out; later packets wait in the input.
    Deciding,
    Connected,
    Closed,
}

/// What became of a message for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is in the output.
    Written,
    /// A client does not take packets of this size, or the topic is too long.
    TooLarge,
    /// Not now: its packet id is in use, or nobody is connected.
    Waits,
    /// The same delivery is on its way already: nothing was written.
    Repeated,
}

/// One connection. Owned by its task.
#[derive(Debug)]
pub struct Machine {
    state: State,
    codec: Codec,
    timing: Timing,
    input: BytesMut,
    output: Output,
    incoming: Unacknowledged,
    outstanding: Outstanding,
    keep_alive: Duration,
    /// When the connection began, and once it is accepted the moment from which the client's
    /// silence is counted.
    heard_at: Instant,
    /// When the latest bytes arrived; they may be a part of a packet.
    received_at: Instant,
}

impl Machine {
    /// A connection that begins at `now`.
    #[must_use]
    pub fn new(timing: Timing, now: Instant) -> Self {
        let codec = Codec::new();
        codec.set_max_size(PACKET_BYTES_MAX);
        Self {
            state: State::AwaitingConnect,
            codec,
            timing,
            input: BytesMut::new(),
            output: Output::default(),
            incoming: Unacknowledged::default(),
            outstanding: Outstanding::default(),
            keep_alive: timing.keep_alive_max,
            heard_at: now,
            received_at: now,
        }
    }

    /// Takes bytes from the peer.
    pub fn receive(&mut self, data: &[u8], now: Instant) {
        self.received_at = now;
        // Whole packets count (MQTT-3.1.2-24), and so does a large one on its way over a slow
        // link, which the client cannot interrupt for a PINGREQ. A dribble of bytes does not.
        if self.state == State::Connected && data.len() >= PROGRESS_BYTES_MIN {
            self.heard_at = now;
        }
        self.input.extend_from_slice(data);
    }

    /// Whether more bytes are wanted now. When not, stop reading: TCP holds the peer back.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        match self.state {
            State::AwaitingConnect => true,
            State::Connected => self.takes_packets(),
            // What arrives while CONNECT is decided waits, up to one read.
            State::Deciding => self.input.is_empty(),
            State::Closed => false,
        }
    }

    /// The next thing to do, if any.
    pub fn poll(&mut self) -> Option<Event> {
        if self.output.take_failed() {
            self.state = State::Closed;
            return Some(Event::Close(CloseReason::Unanswerable));
        }
        loop {
            let event = match self.state {
                State::AwaitingConnect => self.poll_connect(),
                State::Connected => self.poll_connected(),
                State::Deciding | State::Closed => return None,
            };
            match event {
                Ok(Step::Event(event)) => {
                    if matches!(event, Event::Close(_)) {
                        self.state = State::Closed;
                    }
                    return Some(event);
                }
                Ok(Step::Handled) => {}
                Ok(Step::Starved) => {
                    if self.input.is_empty() {
                        // An idle connection holds no read block.
                        self.input = BytesMut::new();
                    }
                    return None;
                }
                Err(reason) => {
                    self.state = State::Closed;
                    return Some(Event::Close(reason));
                }
            }
        }
    }

    /// Answers CONNECT with code 0.
    pub fn accept(&mut self, session_present: bool, now: Instant) {
        if self.state == State::Deciding {
            self.state = State::Connected;
            self.heard_at = now;
            self.output.packet(Packet::ConnectAck(ConnectAck {
                return_code: ConnectAckReason::ConnectionAccepted,
                session_present,
            }));
        }
    }

    /// Answers CONNECT with another code; the connection is to be closed after the output.
    pub fn refuse(&mut self, code: ConnectAckReason) {
        self.output.packet(Packet::ConnectAck(ConnectAck {
            return_code: code,
            session_present: false,
        }));
        self.state = State::Closed;
    }

    /// A publish needs no commit; its PUBACK leaves when its turn comes.
    pub fn handled(&mut self, sequence: u64) {
        self.incoming.handled(sequence);
        self.acknowledge();
    }

    /// Everything up to and including `sequence` is committed.
    pub fn committed(&mut self, sequence: u64) {
        self.incoming.committed(sequence);
        self.acknowledge();
    }

    /// Answers a SUBSCRIBE: one code for each of its filters, in their order.
    pub fn subscribed(&mut self, packet_id: NonZeroU16, status: Vec<SubscribeReturnCode>) {
        if self.state == State::Connected {
            self.output
                .packet(Packet::SubscribeAck { packet_id, status });
        }
    }

    /// Answers an UNSUBSCRIBE.
    pub fn unsubscribed(&mut self, packet_id: NonZeroU16) {
        if self.state == State::Connected {
            self.output.packet(Packet::UnsubscribeAck { packet_id });
        }
    }

    /// Sends a message at QoS 0.
    pub fn publish(&mut self, topic: String, payload: &[u8]) -> Sent {
        if self.state != State::Connected {
            return Sent::Waits;
        }
        if !outgoing::fits(&topic, payload) {
            return Sent::TooLarge;
        }
        self.output.publish(topic, payload, None);
        Sent::Written
    }

    /// Sends a delivery at QoS 1: its packet id follows from its token, and
    /// [`Event::Acknowledged`] comes when the client has it. `redelivered` sets DUP.
    pub fn deliver(
        &mut self,
        token: DeliveryToken,
        redelivered: bool,
        topic: String,
        payload: &[u8],
    ) -> Sent {
        if self.state != State::Connected {
            return Sent::Waits;
        }
        if !outgoing::fits(&topic, payload) {
            return Sent::TooLarge;
        }
        match self.outstanding.take(token) {
            Place::Busy => Sent::Waits,
            Place::Repeated => Sent::Repeated,
            Place::Taken(packet_id) => {
                let acknowledged_by = Some((packet_id, redelivered));
                self.output.publish(topic, payload, acknowledged_by);
                Sent::Written
            }
        }
    }

    /// Whether the client has read enough to be sent more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.output.has_room()
    }

    /// Takes the bytes to write. They count as not read until [`Machine::written`] says so.
    pub fn output(&mut self) -> Option<ntex_bytes::Bytes> {
        self.output.take()
    }

    /// So many bytes of what was taken went out.
    pub fn written(&mut self, bytes: usize) {
        self.output.written(bytes);
    }

    /// PUBACKs put into the output since the last call.
    pub fn take_acks_written(&mut self) -> u64 {
        self.output.take_acks()
    }

    /// When [`Machine::expired`] must be asked, at the latest.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        match self.state {
            State::AwaitingConnect => self.heard_at + self.timing.connect_max,
            _ => self.heard_at + self.keep_alive,
        }
    }

    /// Whether the connection's time is over at `now`. Not while nothing is read from it: then
    /// the silence is ours.
    #[must_use]
    pub fn expired(&mut self, now: Instant) -> Option<CloseReason> {
        if now < self.deadline() {
            return None;
        }
        match self.state {
            State::Connected if !self.wants_input() => {
                self.heard_at = now;
                None
            }
            State::AwaitingConnect => Some(CloseReason::ConnectTimeout),
            State::Connected => Some(CloseReason::KeepAlive),
            // The authenticator has its own bound.
            State::Deciding | State::Closed => None,
        }
    }

    /// Publishes that were handed out and not acknowledged yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.incoming.len()
    }

    /// Deliveries that the client has not acknowledged.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Whether the bounds allow to work off another packet.
    fn takes_packets(&self) -> bool {
        self.incoming.bytes() < UNCOMMITTED_BYTES_MAX && self.has_room()
    }

    /// Bytes that were received and not worked off.
    pub(super) fn buffered(&self) -> usize {
        self.input.len()
    }

    fn poll_connect(&mut self) -> Result<Step, CloseReason> {
        match strict::first_packet(self.input.as_ref(), CONNECT_BYTES_MAX)? {
            strict::FirstPacket::Incomplete => return Ok(Step::Starved),
            strict::FirstPacket::Level => {
                self.refuse(ConnectAckReason::UnacceptableProtocolVersion);
                return Err(CloseReason::ProtocolLevel);
            }
            strict::FirstPacket::EmptyClientId => {
                self.refuse(ConnectAckReason::IdentifierRejected);
                return Err(CloseReason::Refused);
            }
            strict::FirstPacket::Connect => {}
        }
        match self.codec.decode(&mut self.input) {
            Ok(Some(Decoded::Packet(Packet::Connect(connect), _))) => {
                self.keep_alive = idle_limit(connect.keep_alive, self.timing.keep_alive_max);
                self.state = State::Deciding;
                // A token is ASCII: what is not UTF-8 cannot be one, and is judged as such.
                let password = connect
                    .password
                    .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
                Ok(Step::Event(Event::Connect(Box::new(ConnectRequest {
                    client_id: connect.client_id.to_string(),
                    user_name: connect.username.map(|name| name.to_string()),
                    password: password.filter(|text| !text.is_empty()),
                    clean_session: connect.clean_session,
                    will: connect.last_will.map(|will| Will {
                        topic: will.topic.to_string(),
                        // Copied: it is kept for the life of the connection, the read block not.
                        payload: Bytes::copy_from_slice(&will.message),
                        retain: will.retain,
                    }),
                }))))
            }
            Ok(_) => Err(CloseReason::FirstPacket),
            Err(error) => Err(error.into()),
        }
    }

    fn poll_connected(&mut self) -> Result<Step, CloseReason> {
        if !self.takes_packets() {
            return Ok(Step::Starved);
        }
        let input = self.input.as_ref();
        let strict::Frame::Complete {
            first,
            body,
            length,
        } = strict::frame(input, PACKET_BYTES_MAX as usize)?
        else {
            return Ok(Step::Starved);
        };
        self.heard_at = self.heard_at.max(self.received_at);
        let body = input.get(body..body + length).unwrap_or_default();
        match first >> 4 {
            3 => strict::publish_layout(first, body)?,
            8 => strict::subscribe_layout(body)?,
            _ => {}
        }
        // The packet is complete, so the codec hands it out whole.
        match self.codec.decode(&mut self.input)? {
            Some(Decoded::Publish(publish, payload, _)) => {
                strict::publish(&publish)?;
                Ok(Step::Event(self.incoming(publish, payload)))
            }
            Some(Decoded::Packet(packet, size)) => self.control(packet, size),
            Some(Decoded::PayloadChunk(..)) | None => Err(CloseReason::Malformed("packet")),
        }
    }

    fn control(&mut self, packet: Packet, size: u32) -> Result<Step, CloseReason> {
        match packet {
            Packet::PingRequest => {
                strict::no_body(size)?;
                self.output.packet(Packet::PingResponse);
            }
            Packet::Disconnect => {
                strict::no_body(size)?;
                return Ok(Step::Event(Event::Close(CloseReason::Disconnected)));
            }
            Packet::Subscribe {
                packet_id,
                topic_filters,
            } => {
                let filters = topic_filters.iter().map(|(filter, _)| filter.as_ref());
                strict::filters(filters, FILTERS_MAX)?;
                return Ok(Step::Event(Event::Subscribe {
                    packet_id,
                    filters: topic_filters,
                }));
            }
            Packet::Unsubscribe {
                packet_id,
                topic_filters,
            } => {
                strict::filters(topic_filters.iter().map(AsRef::as_ref), FILTERS_MAX)?;
                return Ok(Step::Event(Event::Unsubscribe {
                    packet_id,
                    filters: topic_filters,
                }));
            }
            // In any order; one that no delivery waits for is ignored (spec/mqtt.md 8.4).
            Packet::PublishAck { packet_id } => {
                if let Some(token) = self.outstanding.acknowledged(packet_id) {
                    return Ok(Step::Event(Event::Acknowledged(token)));
                }
            }
            Packet::Connect(_) => return Err(CloseReason::SecondConnect),
            Packet::PublishReceived { .. } => return Err(CloseReason::Unexpected("PUBREC")),
            Packet::PublishRelease { .. } => return Err(CloseReason::Unexpected("PUBREL")),
            Packet::PublishComplete { .. } => return Err(CloseReason::Unexpected("PUBCOMP")),
            Packet::ConnectAck(_) => return Err(CloseReason::Unexpected("CONNACK")),
            Packet::SubscribeAck { .. } => return Err(CloseReason::Unexpected("SUBACK")),
            Packet::UnsubscribeAck { .. } => return Err(CloseReason::Unexpected("UNSUBACK")),
            Packet::PingResponse => return Err(CloseReason::Unexpected("PINGRESP")),
        }
        Ok(Step::Handled)
    }

    fn incoming(&mut self, publish: Publish, payload: ntex_bytes::Bytes) -> Event {
        let bytes = payload.len() + publish.topic.len() + PUBLISH_OVERHEAD_BYTES;
        let packet_id = match publish.qos {
            QoS::AtMostOnce => None,
            _ => publish.packet_id,
        };
        Event::Publish(Incoming {
            sequence: self.incoming.push(packet_id, bytes),
            acknowledged: packet_id.is_some(),
            duplicate: publish.dup,
            retain: publish.retain,
            topic: publish.topic,
            payload: Bytes::from_owner(payload),
        })
    }

    /// Writes the PUBACKs whose turn has come.
    fn acknowledge(&mut self) {
        while let Some(packet_id) = self.incoming.pop() {
            if let Some(packet_id) = packet_id
                && self.state == State::Connected
            {
                self.output.packet(Packet::PublishAck { packet_id });
            }
        }
    }
}

enum Step {
    Event(Event),
    Handled,
    Starved,
}

/// 1.5 times the keep-alive, capped; 0 means the cap (design.md D16).
fn idle_limit(keep_alive_secs: u16, cap: Duration) -> Duration {
    match keep_alive_secs {
        0 => cap,
        seconds => (Duration::from_secs(u64::from(seconds)) * 3 / 2).min(cap),
    }
}
