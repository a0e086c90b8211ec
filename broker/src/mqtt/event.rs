//! What a connection's machine asks of its driver, and why it ends.

use std::num::NonZeroU16;

use bytes::Bytes;
use ntex_bytes::ByteString;
use ntex_mqtt::QoS;
use ntex_mqtt::error::DecodeError;

use crate::hub::DeliveryToken;

#[cfg(doc)]
use super::machine::Machine;

/// What the client said about itself in CONNECT.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The client id, not empty.
    pub client_id: String,
    /// The user name, when there is one.
    pub user_name: Option<String>,
    /// The password, when there is one that is UTF-8; a token.
    pub password: Option<String>,
    /// Clean session.
    pub clean_session: bool,
    /// What is to be published when the connection ends without DISCONNECT.
    pub will: Option<Will>,
}

/// A will. Its QoS is not kept: it goes into the store like everything else.
#[derive(Clone, PartialEq, Eq)]
pub struct Will {
    /// Topic, without wildcards, not empty.
    pub topic: String,
    /// Payload.
    pub payload: Bytes,
    /// RETAIN bit.
    pub retain: bool,
}

impl std::fmt::Debug for Will {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Will")
            .field("topic", &self.topic)
            .field("payload_bytes", &self.payload.len())
            .field("retain", &self.retain)
            .finish()
    }
}

impl std::fmt::Debug for ConnectRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectRequest")
            .field("client_id", &self.client_id)
            .field("user_name", &self.user_name)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("clean_session", &self.clean_session)
            .field("will", &self.will)
            .finish()
    }
}

/// One publish of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Number of this publish on this connection, from 1. It is what [`Machine::committed`] and
    /// [`Machine::handled`] are told.
    pub sequence: u64,
    /// Whether the client waits for a PUBACK.
    pub acknowledged: bool,
    /// DUP bit.
    pub duplicate: bool,
    /// RETAIN bit.
    pub retain: bool,
    /// Topic, without wildcards, not empty.
    pub topic: ByteString,
    /// Payload: a slice of the read buffer, to be copied once into what is stored.
    pub payload: Bytes,
}

/// What the driver has to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Authenticate, then [`Machine::accept`] or [`Machine::refuse`]. Nothing else comes until
    /// then.
    Connect(Box<ConnectRequest>),
    /// Store it and call [`Machine::committed`] then, or do something else with it and call
    /// [`Machine::handled`].
    Publish(Incoming),
    /// The client acknowledged this delivery.
    Acknowledged(DeliveryToken),
    /// Subscribe to the filters, which are well-formed and at least one, and answer with
    /// [`Machine::subscribed`].
    Subscribe {
        /// What the answer names.
        packet_id: NonZeroU16,
        /// Filters and the QoS that is wished for.
        filters: Vec<(ByteString, QoS)>,
    },
    /// Unsubscribe the filters and answer with [`Machine::unsubscribed`].
    Unsubscribe {
        /// What the answer names.
        packet_id: NonZeroU16,
        /// Filters.
        filters: Vec<ByteString>,
    },
    /// Write what is in the output, then close the connection.
    Close(CloseReason),
}

/// Why a connection ends. A variant is a diagnosis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// DISCONNECT.
    #[error("the client disconnected")]
    Disconnected,
    /// CONNECT was answered with a code other than 0.
    #[error("the connection was refused")]
    Refused,
    /// No CONNECT in time.
    #[error("no CONNECT arrived in time")]
    ConnectTimeout,
    /// Nothing arrived for 1.5 times the keep-alive.
    #[error("the keep-alive time passed without a packet")]
    KeepAlive,
    /// The first packet was not CONNECT.
    #[error("the first packet is not CONNECT")]
    FirstPacket,
    /// A second CONNECT.
    #[error("a second CONNECT on one connection")]
    SecondConnect,
    /// A protocol level other than 4 (answered with CONNACK 1).
    #[error("the protocol level is not 4")]
    ProtocolLevel,
    /// The bytes are not MQTT 3.1.1.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// A packet over the limit.
    #[error("packet larger than the limit")]
    TooLarge,
    /// An answer could not be encoded: a fault of ours.
    #[error("an answer could not be encoded")]
    Unanswerable,
    /// A packet that only a server sends, or of QoS 2.
    #[error("a packet that a client must not send: {0}")]
    Unexpected(&'static str),
    /// QoS 2 (spec/mqtt.md 13.2).
    #[error("QoS 2 is not supported")]
    QoS2,
}

impl From<DecodeError> for CloseReason {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::MaxSizeExceeded { .. } => Self::TooLarge,
            DecodeError::InvalidProtocol => Self::Malformed("protocol name"),
            DecodeError::InvalidLength => Self::Malformed("length"),
            DecodeError::UnsupportedPacketType => Self::Malformed("packet type"),
            DecodeError::PacketIdRequired => Self::Malformed("packet id 0"),
            DecodeError::Utf8Error => Self::Malformed("text is not UTF-8"),
            _ => Self::Malformed("packet"),
        }
    }
}
