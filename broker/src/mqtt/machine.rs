//! One MQTT 3.1.1 connection as a state machine: bytes and time in, events and bytes out.
//!
//! It knows no socket, no TLS and no WebSocket, and it knows nothing of stores or identities:
//! whoever drives it authenticates, stores and routes, and says with [`Machine::committed`] how
//! far. It acknowledges publishes in the order in which they arrived (MQTT-4.6.0-2), and only
//! when they need no commit or theirs has happened; PINGRESP and SUBACK never wait for that.
//!
//! Order of calls: [`Machine::receive`], then [`Machine::poll`] until it returns nothing, then
//! [`Machine::output`] into the socket. [`Machine::deadline`] says when to call
//! [`Machine::expired`]. After an [`Event::Close`] nothing is added to the output.
//!
//! Contract: spec/mqtt.md sections 2, 7, 8 and 9; the packet codec is ntex-mqtt's, whose gaps
//! (CONNECT flags, wildcards, lengths that lie) are checked in `strict` first.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ntex_bytes::{BytePages, BytesMut};
use ntex_codec::{Decoder, Encoder};
use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::{
    Codec, ConnectAck, ConnectAckReason, Decoded, Encoded, Packet, Publish, SubscribeReturnCode,
};

pub use super::event::{CloseReason, ConnectRequest, Event, Incoming};
use super::limits::{
    CONNECT_BYTES_MAX, FILTERS_MAX, PACKET_BYTES_MAX, PROGRESS_BYTES_MIN, PUBLISH_OVERHEAD_BYTES,
    UNCOMMITTED_BYTES_MAX,
};
use super::strict;

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

/// A publish whose turn to be acknowledged has not come.
#[derive(Debug)]
struct Pending {
    sequence: u64,
    packet_id: Option<std::num::NonZeroU16>,
    bytes: usize,
    /// Needs no commit, or it is known to be dropped.
    ready: bool,
}

/// One connection. Owned by its task.
#[derive(Debug)]
pub struct Machine {
    state: State,
    codec: Codec,
    timing: Timing,
    input: BytesMut,
    output: BytePages,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    next_sequence: u64,
    keep_alive: Duration,
    /// When the connection began, and once it is accepted the moment from which the client's
    /// silence is counted.
    heard_at: Instant,
    /// When the latest bytes arrived; they may be a part of a packet.
    received_at: Instant,
    acks_written: u64,
    /// An answer could not be encoded; the next [`Machine::poll`] closes.
    unanswerable: bool,
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
            output: BytePages::default(),
            pending: VecDeque::new(),
            pending_bytes: 0,
            next_sequence: 1,
            keep_alive: timing.keep_alive_max,
            heard_at: now,
            received_at: now,
            acks_written: 0,
            unanswerable: false,
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
            State::AwaitingConnect | State::Connected => self.pending_bytes < UNCOMMITTED_BYTES_MAX,
            // What arrives while CONNECT is decided waits, up to one read.
            State::Deciding => self.input.is_empty(),
            State::Closed => false,
        }
    }

    /// The next thing to do, if any.
    pub fn poll(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.unanswerable) {
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
            self.encode(Packet::ConnectAck(ConnectAck {
                return_code: ConnectAckReason::ConnectionAccepted,
                session_present,
            }));
        }
    }

    /// Answers CONNECT with another code; the connection is to be closed after the output.
    pub fn refuse(&mut self, code: ConnectAckReason) {
        self.encode(Packet::ConnectAck(ConnectAck {
            return_code: code,
            session_present: false,
        }));
        self.state = State::Closed;
    }

    /// A publish needs no commit; its PUBACK leaves when its turn comes.
    pub fn dropped(&mut self, sequence: u64) {
        // The newest is the one that was just handed out, as a rule.
        if let Some(entry) = self
            .pending
            .iter_mut()
            .rev()
            .find(|p| p.sequence == sequence)
        {
            entry.ready = true;
        }
        self.release(0);
    }

    /// Everything up to and including `sequence` is committed.
    pub fn committed(&mut self, sequence: u64) {
        self.release(sequence);
    }

    /// Takes the bytes to write.
    pub fn output(&mut self) -> Option<ntex_bytes::Bytes> {
        if self.output.is_empty() {
            None
        } else {
            Some(self.output.freeze())
        }
    }

    /// Whether there are bytes to write.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// PUBACKs put into the output since the last call.
    pub fn take_acks_written(&mut self) -> u64 {
        std::mem::take(&mut self.acks_written)
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
        self.pending.len()
    }

    /// Bytes that were received and not worked off.
    #[cfg(test)]
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
                }))))
            }
            Ok(_) => Err(CloseReason::FirstPacket),
            Err(error) => Err(malformed(&error)),
        }
    }

    fn poll_connected(&mut self) -> Result<Step, CloseReason> {
        if self.pending_bytes >= UNCOMMITTED_BYTES_MAX {
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
        match self
            .codec
            .decode(&mut self.input)
            .map_err(|e| malformed(&e))?
        {
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
                self.encode(Packet::PingResponse);
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
                let count = strict::filters(filters, FILTERS_MAX)?;
                // Sessions and deliveries come with the MQTT issue: until then nothing may
                // believe that it will receive something.
                let status = vec![SubscribeReturnCode::Failure; count];
                self.encode(Packet::SubscribeAck { packet_id, status });
            }
            Packet::Unsubscribe {
                packet_id,
                topic_filters,
            } => {
                strict::filters(topic_filters.iter().map(AsRef::as_ref), FILTERS_MAX)?;
                self.encode(Packet::UnsubscribeAck { packet_id });
            }
            // Nothing was sent that it could acknowledge: ignored (spec/mqtt.md 8.4).
            Packet::PublishAck { .. } => {}
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
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let bytes = payload.len() + publish.topic.len() + PUBLISH_OVERHEAD_BYTES;
        self.pending_bytes += bytes;
        let packet_id = if publish.qos == QoS::AtMostOnce {
            None
        } else {
            publish.packet_id
        };
        self.pending.push_back(Pending {
            sequence,
            packet_id,
            bytes,
            ready: false,
        });
        Event::Publish(Incoming {
            sequence,
            acknowledged: packet_id.is_some(),
            duplicate: publish.dup,
            retain: publish.retain,
            topic: publish.topic,
            payload: Bytes::from_owner(payload),
        })
    }

    fn release(&mut self, committed: u64) {
        while let Some(front) = self.pending.front() {
            if !front.ready && front.sequence > committed {
                return;
            }
            self.pending_bytes -= front.bytes;
            let packet_id = front.packet_id;
            self.pending.pop_front();
            if let Some(packet_id) = packet_id
                && self.state == State::Connected
            {
                self.acks_written += 1;
                self.encode(Packet::PublishAck { packet_id });
            }
        }
    }

    fn encode(&mut self, packet: Packet) {
        // Packets of this size and shape cannot fail to encode. A failure would be a bug of the
        // codec; the connection ends then, because the peer would wait in vain.
        if let Err(error) = self
            .codec
            .encodev(Encoded::Packet(packet), &mut self.output)
        {
            tracing::error!("an MQTT packet could not be encoded: {error:?}");
            self.unanswerable = true;
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

fn malformed(error: &ntex_mqtt::error::DecodeError) -> CloseReason {
    use ntex_mqtt::error::DecodeError;
    match error {
        DecodeError::MaxSizeExceeded { .. } => CloseReason::TooLarge,
        DecodeError::InvalidProtocol => CloseReason::Malformed("protocol name"),
        DecodeError::InvalidLength => CloseReason::Malformed("length"),
        DecodeError::MalformedPacket => CloseReason::Malformed("packet"),
        DecodeError::UnsupportedPacketType => CloseReason::Malformed("packet type"),
        DecodeError::PacketIdRequired => CloseReason::Malformed("packet id 0"),
        DecodeError::Utf8Error => CloseReason::Malformed("text is not UTF-8"),
        _ => CloseReason::Malformed("packet"),
    }
}
