//! What a connection's machine asks of its driver, and why it ends.

use bytes::Bytes;

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
}

impl std::fmt::Debug for ConnectRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectRequest")
            .field("client_id", &self.client_id)
            .field("user_name", &self.user_name)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("clean_session", &self.clean_session)
            .finish()
    }
}

/// One publish of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Number of this publish on this connection, from 1. It is what [`Machine::committed`] and
    /// [`Machine::dropped`] are told.
    pub sequence: u64,
    /// Whether the client waits for a PUBACK.
    pub acknowledged: bool,
    /// DUP bit.
    pub duplicate: bool,
    /// RETAIN bit.
    pub retain: bool,
    /// Topic, without wildcards, not empty.
    pub topic: ntex_bytes::ByteString,
    /// Payload: a slice of the read buffer, to be copied once into what is stored.
    pub payload: Bytes,
}

/// What the driver has to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Authenticate, then [`Machine::accept`] or [`Machine::refuse`]. Nothing else comes until
    /// then.
    Connect(Box<ConnectRequest>),
    /// Store it and call [`Machine::committed`] then, or drop it and call [`Machine::dropped`].
    Publish(Incoming),
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
