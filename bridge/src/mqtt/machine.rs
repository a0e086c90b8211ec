//! The client side of one MQTT 3.1.1 connection as a pure state machine.
//!
//! Bytes, commands and the time come in; bytes, acknowledged tokens, events and one connect verdict
//! come out. It owns no socket and no clock, so the same machine runs over TLS, over a WebSocket and in
//! a test that moves the time by hand.
//!
//! # Order of calls
//!
//! After each input ([`Machine::receive`], [`Machine::publish`], [`Machine::handle_timeout`],
//! [`Machine::disconnect`]) look at [`Machine::poll_connack`], [`Machine::poll_event`] and
//! [`Machine::drain_acked`], then write [`Machine::output`] and report what was taken with
//! [`Machine::written`]. Everything of one turn ends up in one output buffer, so that a turn costs
//! one socket write.
//!
//! # Window and acknowledgements
//!
//! At most [`MachineConfig::window`] publishes at QoS 1 are unacknowledged. Subscriptions change one
//! packet at a time: the next one waits for the answer to the one before.
//!
//! # What is accepted from the peer
//!
//! CONNACK once, PUBACK, PINGRESP, SUBACK and UNSUBACK for what was asked, and PUBLISH at any time
//! after CONNACK: a session that an identity left at the hub may still hold subscriptions. What a
//! PUBLISH means and whether it is acknowledged is its reader's affair. Everything else ends the
//! connection.
//!
//! Spec: upstream.md A3.4, A6.1 and A7, OASIS MQTT 3.1.1.

mod outgoing;

use std::{collections::VecDeque, num::NonZeroU16, time::Instant};

use bytes::{Buf, Bytes, BytesMut};
use ntex_bytes::{
    BytePageSize, BytePages, ByteString, Bytes as CodecBytes, BytesMut as CodecBuffer,
};
use ntex_codec::{Decoder, Encoder};
use ntex_mqtt::v3::codec::{
    Codec, Connect, ConnectAck, ConnectAckReason, Decoded, Encoded, Packet, Publish, QoS,
    SubscribeReturnCode,
};

use super::{
    frame::{self, FrameError},
    liveness::Liveness,
    terms::{Connack, ConnectParams, MachineConfig, MachineError, Received},
    window::{NotInFlight, SubscriptionIds, Window},
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

/// A SUBSCRIBE or UNSUBSCRIBE without an answer.
#[derive(Clone, Copy, Debug)]
struct Change {
    packet_id: NonZeroU16,
    /// Filters of a SUBSCRIBE; none for UNSUBSCRIBE.
    subscribed: Option<usize>,
    sent_at: Instant,
}

/// What the server did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// It sent a PUBLISH.
    Publish(Received),
    /// It answered our SUBSCRIBE: granted or not, in the order of the filters.
    Subscribed(Vec<bool>),
    /// It answered our UNSUBSCRIBE.
    Unsubscribed,
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
    window: Window,
    change: Option<Change>,
    change_ids: SubscriptionIds,
    events: VecDeque<MachineEvent>,
    /// Answers to publishes at QoS 0 are awaited.
    answers_awaited: bool,
    liveness: Liveness,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("state", &self.state)
            .field("in_flight", &self.window.in_flight())
            .field("output", &self.output.len())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes a machine whose output starts with CONNECT (clean session 0, no will).
    ///
    /// # Errors
    ///
    /// [`MachineError::Malformed`] if an id, user name or token is over 65,535 bytes.
    pub fn new(
        config: MachineConfig,
        params: ConnectParams,
        now: Instant,
    ) -> Result<Self, MachineError> {
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
            window: Window::new(config.window),
            config,
            codec,
            state: State::AwaitingConnack { since: now },
            connack: None,
            input: CodecBuffer::new(),
            output: BytesMut::new(),
            scratch: BytePages::new(BytePageSize::Size4),
            change: None,
            change_ids: SubscriptionIds::default(),
            events: VecDeque::new(),
            answers_awaited: false,
            liveness: Liveness::new(now),
        };
        machine.encode(Encoded::Packet(Packet::Connect(Box::new(connect))), now)?;
        Ok(machine)
    }

    /// How many publishes may be handed in now.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.state == State::Connected {
            self.window.room()
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
        self.window.in_flight()
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

    /// The next thing that the server did. A read brings a bounded number of them.
    pub fn poll_event(&mut self) -> Option<MachineEvent> {
        self.events.pop_front()
    }

    /// Tokens acknowledged since the last call, in the order of their PUBACKs.
    pub fn drain_acked(&mut self) -> std::vec::Drain<'_, u64> {
        self.window.drain_acked()
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
            self.liveness.heard(now);
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
                if self.liveness.check(&self.config, now)? {
                    self.encode(Encoded::Packet(Packet::PingRequest), now)?;
                }
                if self.stall_at().is_some_and(|at| now >= at) {
                    return Err(MachineError::AckStall(self.config.ack_stall));
                }
                if self.change_due_at().is_some_and(|at| now >= at) {
                    return Err(MachineError::SubackTimeout(self.config.suback_timeout));
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
                let liveness = self.liveness.next_check(&self.config);
                let others = [self.stall_at(), self.change_due_at()];
                others.into_iter().flatten().chain([liveness]).min()
            }
        }
    }

    fn stall_at(&self) -> Option<Instant> {
        let since = self.liveness.last_progress();
        (!self.window.is_empty()).then(|| since + self.config.ack_stall)
    }

    fn change_due_at(&self) -> Option<Instant> {
        let change = self.change?;
        Some(change.sent_at + self.config.suback_timeout)
    }

    fn note_awaiting(&mut self, now: Instant) {
        let awaits = !self.window.is_empty() || self.change.is_some() || self.answers_awaited;
        self.liveness.awaits(now, awaits);
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
                self.liveness.pong();
                Ok(())
            }
            (State::Connected, Decoded::Publish(publish, payload, _)) => {
                self.handle_publish(&publish, &payload);
                Ok(())
            }
            (State::Connected, Decoded::Packet(Packet::SubscribeAck { packet_id, status }, _)) => {
                self.handle_suback(now, packet_id, &status)
            }
            (State::Connected, Decoded::Packet(Packet::UnsubscribeAck { packet_id }, _)) => {
                self.end_change(now, packet_id, None)?;
                self.events.push_back(MachineEvent::Unsubscribed);
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
        let result = self.window.ack(packet_id);
        result.map_err(|NotInFlight| MachineError::UnknownPacketId(packet_id))?;
        self.liveness.progress(now);
        self.note_awaiting(now);
        Ok(())
    }

    fn handle_publish(&mut self, publish: &Publish, payload: &[u8]) {
        let received = Received {
            topic: publish.topic.to_string(),
            // A copy, so that a small message does not keep the whole input buffer alive.
            payload: Bytes::copy_from_slice(payload),
            packet_id: publish.packet_id,
            is_exactly_once: publish.qos == QoS::ExactlyOnce,
            dup: publish.dup,
        };
        self.events.push_back(MachineEvent::Publish(received));
    }

    fn handle_suback(
        &mut self,
        now: Instant,
        packet_id: NonZeroU16,
        status: &[SubscribeReturnCode],
    ) -> Result<(), MachineError> {
        self.end_change(now, packet_id, Some(status.len()))?;
        let granted = status
            .iter()
            .map(|code| matches!(code, SubscribeReturnCode::Success(_)))
            .collect();
        self.events.push_back(MachineEvent::Subscribed(granted));
        Ok(())
    }

    /// Takes the answer to the change that is under way: as many codes as filters, in the same
    /// order (MQTT-3.9.3-1).
    fn end_change(
        &mut self,
        now: Instant,
        packet_id: NonZeroU16,
        codes: Option<usize>,
    ) -> Result<(), MachineError> {
        let fits = self
            .change
            .is_some_and(|change| change.packet_id == packet_id && change.subscribed == codes);
        if !fits {
            return Err(MachineError::UnknownSubscription(packet_id.get()));
        }
        self.change = None;
        self.note_awaiting(now);
        Ok(())
    }

    fn encode(&mut self, item: Encoded, now: Instant) -> Result<(), MachineError> {
        let result = self.codec.encodev(item, &mut self.scratch);
        if result.is_ok() {
            for page in self.scratch.iter() {
                self.output.extend_from_slice(page);
            }
            self.liveness.said(now);
        }
        // Also after an error: half a packet must not precede the next one.
        self.scratch.clear();
        result.map_err(|error| MachineError::Malformed(format!("{error:?}")))
    }
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
#[path = "machine_hearing_tests.rs"]
mod hearing_tests;
#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
