//! What goes into the MQTT machine beside bytes, and what its verdicts are called.

use std::{num::NonZeroU16, time::Duration};

use bytes::Bytes;

/// What a [`Machine`](super::Machine) is allowed and how patient it is.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Largest packet in either direction, in bytes after the fixed header. The input buffer never
    /// holds more than this and one read.
    pub packet_bytes_max: usize,
    /// Unacknowledged publishes, 1 to 32,639.
    pub window: usize,
    /// How long the CONNACK may take.
    pub connack_timeout: Duration,
    /// Keep-alive that CONNECT promises to the server, in seconds.
    pub keep_alive_secs: u16,
    /// Silence after which an idle link is probed with PINGREQ.
    pub ping_interval: Duration,
    /// Silence after a probe that means a dead link.
    pub ping_timeout: Duration,
    /// With something unanswered, half of this is the silence before a probe and the other half the
    /// wait for its answer.
    pub ack_timeout: Duration,
    /// How long the answer to SUBSCRIBE or UNSUBSCRIBE may take.
    pub suback_timeout: Duration,
    /// Publishes in flight and no PUBACK for this long, although probes are answered: the
    /// connection is given up, because an acknowledgement that got lost never comes.
    pub ack_stall: Duration,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            packet_bytes_max: crate::limits::MQTT_PACKET_BYTES_MAX,
            window: crate::limits::WINDOW_DEFAULT,
            connack_timeout: Duration::from_secs(20),
            keep_alive_secs: 300,
            ping_interval: Duration::from_secs(40),
            ping_timeout: Duration::from_secs(20),
            ack_timeout: Duration::from_secs(20),
            suback_timeout: Duration::from_secs(20),
            ack_stall: Duration::from_secs(300),
        }
    }
}

/// Contents of the CONNECT packet that differ between connections.
#[derive(Clone)]
pub struct ConnectParams {
    /// Client identifier: the identity's id.
    pub client_id: String,
    /// User name, see [`edgehub_proto::username::format`].
    pub user_name: String,
    /// SAS token. Never printed.
    pub password: String,
}

impl std::fmt::Debug for ConnectParams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectParams")
            .field("client_id", &self.client_id)
            .field("user_name", &self.user_name)
            .field("password", &"***")
            .finish()
    }
}

/// The server's answer to CONNECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connack {
    /// Code 0.
    Accepted,
    /// Code 4: the server could not make sense of user name or password.
    BadCredentials,
    /// Code 2: the server does not take this client identifier.
    IdentifierRejected,
    /// Code 5: a definite no for this identity.
    NotAuthorized,
    /// Code 3: not now.
    ServerUnavailable,
    /// Code 1 (or the reserved 6): the server speaks another protocol.
    UnacceptableProtocol,
}

/// A PUBLISH from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Bytes,
    /// Its packet id, above QoS 0.
    pub packet_id: Option<NonZeroU16>,
    /// QoS 2, which nobody asked for.
    pub is_exactly_once: bool,
    /// It may have been sent before.
    pub dup: bool,
}

/// Why a connection cannot go on. Every variant ends it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// Publishes are in flight and no PUBACK came for [`MachineConfig::ack_stall`].
    #[error("no PUBACK for {0:?} although the server answers pings")]
    AckStall(Duration),
    /// SUBSCRIBE or UNSUBSCRIBE was called while the one before is unanswered, or not connected.
    #[error("subscriptions cannot be changed now")]
    Busy,
    /// CONNECT was not answered.
    #[error("no CONNACK within {0:?}")]
    ConnackTimeout(Duration),
    /// The probe was not answered.
    #[error("the server is silent: no answer to PINGREQ within {0:?}")]
    PingTimeout(Duration),
    /// A packet of this length is over [`MachineConfig::packet_bytes_max`].
    #[error("a packet of {bytes} bytes is over the limit of {max}")]
    PacketTooLarge {
        /// Remaining length that the peer announced.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Bytes that are not MQTT 3.1.1.
    #[error("malformed packet: {0}")]
    Malformed(String),
    /// SUBSCRIBE or UNSUBSCRIBE was not answered.
    #[error("no SUBACK within {0:?}")]
    SubackTimeout(Duration),
    /// A packet that has no business here.
    #[error("unexpected {packet} while {state}")]
    UnexpectedPacket {
        /// Name of the packet.
        packet: &'static str,
        /// What the machine was doing.
        state: &'static str,
    },
    /// A PUBACK for a packet id that is not in flight.
    #[error("PUBACK for packet id {0}, which is not in flight")]
    UnknownPacketId(u16),
    /// A SUBACK or UNSUBACK that fits nothing that was asked.
    #[error("SUBACK or UNSUBACK for packet id {0}, which does not fit what was asked")]
    UnknownSubscription(u16),
}

/// Why a message was not taken by [`Machine::publish`](super::Machine::publish).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// Not connected, or the window is full: the caller did not look at [`Machine::room`](super::Machine::room).
    #[error("the window is full or the connection is not open")]
    NoRoom,
    /// The packet does not fit [`MachineConfig::packet_bytes_max`].
    #[error("a publish of {bytes} bytes is over the packet limit of {max}")]
    TooLarge {
        /// Size of the variable header and the payload.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// MQTT counts a topic's bytes in 16 bits.
    #[error("a topic of {bytes} bytes is over the 65,535 that MQTT can carry")]
    TopicTooLong {
        /// Length of the topic in bytes.
        bytes: usize,
    },
}
