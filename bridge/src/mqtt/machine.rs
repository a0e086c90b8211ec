//! The client side of one MQTT 3.1.1 connection as a pure state machine.
//!
//! Bytes, commands and the time come in; bytes, acknowledged tokens and one connect verdict come
//! out. It owns no socket and no clock, so the same machine runs over TLS, over a WebSocket and in
//! a test that moves the time by hand.
//!
//! # Order of calls
//!
//! After each input ([`Machine::receive`], [`Machine::publish`], [`Machine::handle_timeout`],
//! [`Machine::disconnect`]) look at [`Machine::poll_connack`] and [`Machine::drain_acked`], then
//! write [`Machine::output`] and report what was taken with [`Machine::written`]. All publishes of
//! one turn end up in one output buffer, so that a turn costs one socket write.
//!
//! # Window and acknowledgements
//!
//! At most [`MachineConfig::window`] publishes are unacknowledged. PUBACKs may come in any order;
//! an early one is reported at once but keeps its place in the window until all before it came,
//! which makes packet ids in use one contiguous range.
//!
//! # What is accepted from the peer
//!
//! CONNACK once, PUBACK, PINGRESP. A PUBLISH is counted and ignored without an acknowledgement: a
//! session that an identity left at the hub may still hold subscriptions, and a cloud-to-device
//! message that nobody took must stay there. Everything else ends the connection.
//!
//! Spec: upstream.md A3.4 and A6.1, OASIS MQTT 3.1.1.

use std::{
    collections::VecDeque,
    num::NonZeroU16,
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use ntex_bytes::{
    BytePageSize, BytePages, ByteString, Bytes as CodecBytes, BytesMut as CodecBuffer,
};
use ntex_codec::{Decoder, Encoder};
use ntex_mqtt::v3::codec::{
    Codec, Connect, ConnectAck, ConnectAckReason, Decoded, Encoded, Packet, Publish, QoS,
};

use super::{
    frame::{self, FrameError},
    terms::{Connack, ConnectParams, MachineConfig, MachineError, PublishError},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitingConnack {
        since: Instant,
    },
    Connected,
    /// Refused, or DISCONNECT was written: nothing more is sent and nothing more is expected.
    Over,
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::AwaitingConnack { .. } => "waiting for CONNACK",
            Self::Connected => "connected",
            Self::Over => "disconnected",
        }
    }
}

/// One publish in the window.
#[derive(Debug)]
struct Slot {
    token: u64,
    acked: bool,
}

/// The state machine. Owned by one connection task.
pub struct Machine {
    config: MachineConfig,
    codec: Codec,
    state: State,
    connack: Option<Connack>,
    input: CodecBuffer,
    output: BytesMut,
    scratch: BytePages,
    /// Publishes from the oldest unacknowledged on. The packet id of the slot at index `i` is
    /// `front_id + i`, counted in 1..=65535.
    slots: VecDeque<Slot>,
    front_id: u16,
    acked: Vec<u64>,
    ignored_publishes: u64,
    last_inbound: Instant,
    last_outbound: Instant,
    /// Last PUBACK, or the publish that ended an empty window.
    last_progress: Instant,
    /// When the unanswered PINGREQ was written.
    ping_sent: Option<Instant>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("state", &self.state)
            .field("in_flight", &self.slots.len())
            .field("output", &self.output.len())
            .finish_non_exhaustive()
    }
}

/// Packet ids count 1..=65535.
const PACKET_IDS: u32 = 65_535;

impl Machine {
    /// Makes a machine whose output starts with CONNECT (clean session 0, no will).
    ///
    /// # Errors
    ///
    /// [`MachineError::Malformed`] if an id, user name or token is over 65,535 bytes.
    pub fn new(
        mut config: MachineConfig,
        params: ConnectParams,
        now: Instant,
    ) -> Result<Self, MachineError> {
        // Half of the packet ids, so that an id in flight is never reused.
        config.window = config.window.clamp(1, PACKET_IDS as usize / 2);
        let codec = Codec::new();
        let max = u32::try_from(config.packet_bytes_max).unwrap_or(u32::MAX);
        codec.set_max_size(max);
        // Frames reach the codec whole (see `receive`), so a PUBLISH is always one item.
        codec.set_min_chunk_size(max);
        let connect = Connect {
            clean_session: false,
            keep_alive: config.keep_alive_secs,
            last_will: None,
            client_id: ByteString::from(params.client_id),
            username: Some(ByteString::from(params.user_name)),
            password: Some(CodecBytes::from(params.password)),
        };
        let mut machine = Self {
            config,
            codec,
            state: State::AwaitingConnack { since: now },
            connack: None,
            input: CodecBuffer::new(),
            output: BytesMut::new(),
            scratch: BytePages::new(BytePageSize::Size4),
            slots: VecDeque::new(),
            front_id: 1,
            acked: Vec::new(),
            ignored_publishes: 0,
            last_inbound: now,
            last_outbound: now,
            last_progress: now,
            ping_sent: None,
        };
        machine.encode(Encoded::Packet(Packet::Connect(Box::new(connect))), now)?;
        Ok(machine)
    }

    /// How many publishes may be handed in now.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.state == State::Connected {
            self.config.window.saturating_sub(self.slots.len())
        } else {
            0
        }
    }

    /// CONNECT has not been answered.
    #[must_use]
    pub fn is_connecting(&self) -> bool {
        matches!(self.state, State::AwaitingConnack { .. })
    }

    /// Publishes that the server has not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.iter().filter(|slot| !slot.acked).count()
    }

    /// PUBLISH packets that the server sent and this machine ignored.
    #[must_use]
    pub fn ignored_publishes(&self) -> u64 {
        self.ignored_publishes
    }

    /// Bytes to write to the socket.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// Takes `n` bytes off the output: they were written.
    pub fn written(&mut self, n: usize) {
        self.output.advance(n.min(self.output.len()));
        if self.output.is_empty() && self.output.capacity() > crate::limits::OUTPUT_KEEP_BYTES {
            // A burst of large messages must not stay allocated on an idle connection.
            self.output = BytesMut::new();
        }
    }

    /// The server's answer to CONNECT, once.
    pub fn poll_connack(&mut self) -> Option<Connack> {
        self.connack.take()
    }

    /// Tokens acknowledged since the last call, in the order of their PUBACKs.
    pub fn drain_acked(&mut self) -> std::vec::Drain<'_, u64> {
        self.acked.drain(..)
    }

    /// Puts one QoS 1 publish into the output. `token` comes back from [`Machine::drain_acked`].
    /// `resend` sets the DUP flag (MQTT-3.3.1-1).
    ///
    /// # Errors
    ///
    /// See [`PublishError`]; nothing was written then and the connection goes on.
    pub fn publish(
        &mut self,
        now: Instant,
        token: u64,
        resend: bool,
        topic: String,
        payload: &[u8],
    ) -> Result<(), PublishError> {
        if self.room() == 0 {
            return Err(PublishError::NoRoom);
        }
        if topic.len() > usize::from(u16::MAX) {
            return Err(PublishError::TopicTooLong { bytes: topic.len() });
        }
        let bytes = topic.len() + payload.len() + 4;
        let too_large = PublishError::TooLarge {
            bytes,
            max: self.config.packet_bytes_max,
        };
        if bytes > self.config.packet_bytes_max {
            return Err(too_large);
        }
        let publish = Publish {
            dup: resend,
            retain: false,
            qos: QoS::AtLeastOnce,
            topic: ByteString::from(topic),
            packet_id: NonZeroU16::new(packet_id_at(self.front_id, self.slots.len())),
            payload_size: u32::try_from(payload.len()).map_err(|_| too_large)?,
        };
        // The codec writes the header only; the payload goes straight into the output, copied once.
        self.encode(Encoded::Publish(publish, None), now)
            .map_err(|_| too_large)?;
        self.output.extend_from_slice(payload);
        if self.slots.is_empty() {
            self.last_progress = now;
        }
        self.slots.push_back(Slot {
            token,
            acked: false,
        });
        Ok(())
    }

    /// Writes DISCONNECT and ends the machine. Nothing is written when it is over already.
    pub fn disconnect(&mut self, now: Instant) {
        if self.state == State::Connected {
            // A packet without contents always fits.
            let _ = self.encode(Encoded::Packet(Packet::Disconnect), now);
        }
        self.state = State::Over;
    }

    /// Takes bytes from the socket.
    ///
    /// # Errors
    ///
    /// The connection must be closed. Acknowledgements that came before the fault are still in
    /// [`Machine::drain_acked`].
    pub fn receive(&mut self, now: Instant, data: &[u8]) -> Result<(), MachineError> {
        self.input.extend_from_slice(data);
        loop {
            // Frames are cut here, not in the codec: it subtracts a PUBLISH's topic length from the
            // packet length without looking, and it would hand out split payloads.
            match frame::check(&self.input, self.config.packet_bytes_max) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(FrameError::TooLarge { bytes }) => {
                    let max = self.config.packet_bytes_max;
                    return Err(MachineError::PacketTooLarge { bytes, max });
                }
                Err(error) => return Err(MachineError::Malformed(error.to_string())),
            }
            let decoded = self
                .codec
                .decode(&mut self.input)
                .map_err(|error| MachineError::Malformed(format!("{error:?}")))?;
            let Some(decoded) = decoded else {
                return Ok(());
            };
            self.last_inbound = now;
            self.handle(now, decoded)?;
        }
    }

    /// Does what is due at `now`: sends a probe or gives the connection up.
    ///
    /// # Errors
    ///
    /// A time-out that ends the connection.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), MachineError> {
        match self.state {
            State::Over => Ok(()),
            State::AwaitingConnack { since } => {
                if now >= since + self.config.connack_timeout {
                    return Err(MachineError::ConnackTimeout(self.config.connack_timeout));
                }
                Ok(())
            }
            State::Connected => {
                if now >= self.stall_at().unwrap_or(now + Duration::from_secs(1)) {
                    return Err(MachineError::AckStall(self.config.ack_stall));
                }
                if let Some(sent) = self.ping_sent {
                    if now >= self.dead_at(sent) {
                        return Err(MachineError::PingTimeout(self.probe_patience()));
                    }
                } else if now >= self.probe_at() {
                    self.ping_sent = Some(now);
                    self.encode(Encoded::Packet(Packet::PingRequest), now)?;
                }
                Ok(())
            }
        }
    }

    /// When [`Machine::handle_timeout`] has something to do next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Over => None,
            State::AwaitingConnack { since } => Some(since + self.config.connack_timeout),
            State::Connected => {
                let probe = self
                    .ping_sent
                    .map_or_else(|| self.probe_at(), |at| self.dead_at(at));
                Some(self.stall_at().map_or(probe, |stall| stall.min(probe)))
            }
        }
    }

    fn probe_at(&self) -> Instant {
        let silence = if self.slots.is_empty() {
            self.config.ping_interval
        } else {
            self.config.ack_timeout / 2
        };
        // The server closes after 1.5 keep-alives without a packet from us, whatever it sends.
        let half_keep_alive = Duration::from_secs(u64::from(self.config.keep_alive_secs)) / 2;
        let by_silence = self.last_inbound.max(self.sent_since_silence()) + silence;
        if self.config.keep_alive_secs == 0 {
            by_silence
        } else {
            by_silence.min(self.last_outbound + half_keep_alive)
        }
    }

    /// With publishes in flight the silence that counts starts with the first of them.
    fn sent_since_silence(&self) -> Instant {
        if self.slots.is_empty() {
            self.last_inbound
        } else {
            self.last_progress
        }
    }

    fn probe_patience(&self) -> Duration {
        if self.slots.is_empty() {
            self.config.ping_timeout
        } else {
            self.config.ping_timeout.min(self.config.ack_timeout / 2)
        }
    }

    fn dead_at(&self, ping_sent: Instant) -> Instant {
        ping_sent.max(self.last_inbound) + self.probe_patience()
    }

    fn stall_at(&self) -> Option<Instant> {
        (!self.slots.is_empty()).then(|| self.last_progress + self.config.ack_stall)
    }

    fn handle(&mut self, now: Instant, decoded: Decoded) -> Result<(), MachineError> {
        match (self.state, decoded) {
            (State::AwaitingConnack { .. }, Decoded::Packet(Packet::ConnectAck(ack), _)) => {
                self.handle_connack(ack);
                Ok(())
            }
            (State::Connected, Decoded::Packet(Packet::PublishAck { packet_id }, _)) => {
                self.handle_puback(now, packet_id.get())
            }
            (State::Connected, Decoded::Packet(Packet::PingResponse, _)) => {
                self.ping_sent = None;
                Ok(())
            }
            (State::Connected, Decoded::Publish(..) | Decoded::PayloadChunk(..)) => {
                self.ignored_publishes = self.ignored_publishes.saturating_add(1);
                Ok(())
            }
            // After DISCONNECT the peer may still send what was on the way.
            (State::Over, _) => Ok(()),
            (state, unexpected) => Err(MachineError::UnexpectedPacket {
                packet: decoded_name(&unexpected),
                state: state.name(),
            }),
        }
    }

    fn handle_connack(&mut self, ack: ConnectAck) {
        let connack = match ack.return_code {
            ConnectAckReason::ConnectionAccepted => Connack::Accepted,
            ConnectAckReason::UnacceptableProtocolVersion | ConnectAckReason::Reserved => {
                Connack::UnacceptableProtocol
            }
            ConnectAckReason::IdentifierRejected => Connack::IdentifierRejected,
            ConnectAckReason::ServiceUnavailable => Connack::ServerUnavailable,
            ConnectAckReason::BadUserNameOrPassword => Connack::BadCredentials,
            ConnectAckReason::NotAuthorized => Connack::NotAuthorized,
        };
        let accepted = connack == Connack::Accepted;
        self.state = if accepted {
            State::Connected
        } else {
            State::Over
        };
        self.connack = Some(connack);
    }

    fn handle_puback(&mut self, now: Instant, packet_id: u16) -> Result<(), MachineError> {
        let unknown = MachineError::UnknownPacketId(packet_id);
        let index = index_of(self.front_id, packet_id);
        let Some(slot) = self.slots.get_mut(index) else {
            return Err(unknown);
        };
        if slot.acked {
            return Err(unknown);
        }
        slot.acked = true;
        self.acked.push(slot.token);
        self.last_progress = now;
        while self.slots.front().is_some_and(|slot| slot.acked) {
            self.slots.pop_front();
            self.front_id = packet_id_at(self.front_id, 1);
        }
        Ok(())
    }

    fn encode(&mut self, item: Encoded, now: Instant) -> Result<(), MachineError> {
        let result = self.codec.encodev(item, &mut self.scratch);
        if result.is_ok() {
            for page in self.scratch.iter() {
                self.output.extend_from_slice(page);
            }
            self.last_outbound = now;
        }
        // Also after an error: half a packet must not precede the next one.
        self.scratch.clear();
        result.map_err(|error| MachineError::Malformed(format!("{error:?}")))
    }
}

/// The packet id `steps` after `front`, counted in 1..=65535.
fn packet_id_at(front: u16, steps: usize) -> u16 {
    let steps = u32::try_from(steps % PACKET_IDS as usize).unwrap_or(0);
    let zero_based = (u32::from(front).saturating_sub(1) + steps) % PACKET_IDS;
    u16::try_from(zero_based + 1).unwrap_or(1)
}

/// How many steps `packet_id` is after `front`.
fn index_of(front: u16, packet_id: u16) -> usize {
    ((u32::from(packet_id) + PACKET_IDS - u32::from(front)) % PACKET_IDS) as usize
}

fn decoded_name(decoded: &Decoded) -> &'static str {
    match decoded {
        Decoded::Publish(..) | Decoded::PayloadChunk(..) => "PUBLISH",
        Decoded::Packet(packet, _) => match packet {
            Packet::Connect(_) => "CONNECT",
            Packet::ConnectAck(_) => "CONNACK",
            Packet::PublishAck { .. } => "PUBACK",
            Packet::PublishReceived { .. } => "PUBREC",
            Packet::PublishRelease { .. } => "PUBREL",
            Packet::PublishComplete { .. } => "PUBCOMP",
            Packet::Subscribe { .. } => "SUBSCRIBE",
            Packet::SubscribeAck { .. } => "SUBACK",
            Packet::Unsubscribe { .. } => "UNSUBSCRIBE",
            Packet::UnsubscribeAck { .. } => "UNSUBACK",
            Packet::PingRequest => "PINGREQ",
            Packet::PingResponse => "PINGRESP",
            Packet::Disconnect => "DISCONNECT",
        },
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
