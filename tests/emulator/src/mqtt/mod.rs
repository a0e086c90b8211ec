//! The MQTT 3.1.1 device side (spec/upstream.md B4).
//!
//! A connection works in turns: read what is there, decode all of it, write one batch to the
//! ledger, send all answers with one write. So PUBACKs follow storage, in order of arrival, and
//! the cost of a turn is shared by its messages. What the hub sends on its own account goes out
//! between turns, so that it never overtakes an answer that was given before it.

mod bag;
mod codec;
mod connect;
mod delivery;
mod handler;
mod iothub_topic;
mod requests;
mod server;
mod session;
mod topic;
mod user_name;

pub(crate) use server::{serve, serve_over};

use crate::c2d::C2dError;
use crate::sessions::SessionError;
use codec::CodecError;

/// Why a connection ended. The text is what the log says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CloseReason {
    #[error("the property bag is malformed: {0}")]
    Bag(bag::BagError),
    #[error(transparent)]
    C2d(C2dError),
    #[error("closed by the control API, the registry, or a newer connection of the same id")]
    Closed,
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("the client disconnected")]
    Disconnect,
    #[error("the client closed the socket")]
    End,
    #[error("a publish was made to fail through the control API")]
    Fault,
    #[error("{0:?} is no topic filter")]
    Filter(String),
    #[error("the socket failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("nothing arrived for 1.5 times the keep-alive")]
    KeepAlive,
    #[error(transparent)]
    Ledger(#[from] crate::ledger::LedgerError),
    #[error("a message of {0} bytes is too large")]
    MessageSize(usize),
    #[error("the client does not read what it is sent")]
    Overflow,
    #[error("QoS 2 is not supported")]
    Qos2,
    #[error("refused with CONNACK {0:?}")]
    Refused(mqttbytes::v4::ConnectReturnCode),
    #[error("a second CONNECT")]
    SecondConnect,
    #[error("no CONNECT in time")]
    Silence,
    #[error(transparent)]
    Session(SessionError),
    #[error("the token has expired")]
    TokenExpired,
    #[error("unknown topic {0:?}")]
    TopicUnknown(String),
    #[error("topic {0:?} is another identity's")]
    TopicWrongId(String),
    #[error("a packet that the hub does not expect here: {0}")]
    Unexpected(&'static str),
}

impl From<C2dError> for CloseReason {
    fn from(error: C2dError) -> Self {
        match error {
            C2dError::Fenced => Self::Closed,
            error => Self::C2d(error),
        }
    }
}

impl From<SessionError> for CloseReason {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Fenced => Self::Closed,
            error => Self::Session(error),
        }
    }
}
