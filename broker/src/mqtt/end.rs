//! Why a connection's task ended, and what that means for the will.

use std::io;

use super::machine::CloseReason;

/// Why a connection's task ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionEnd {
    /// The protocol ended it.
    #[error(transparent)]
    Protocol(#[from] CloseReason),
    /// The transport failed.
    #[error("the transport failed: {0}")]
    Transport(#[from] io::Error),
    /// The peer closed the transport without DISCONNECT.
    #[error("the client closed the connection without DISCONNECT")]
    PeerGone,
    /// CONNECT was refused.
    #[error("CONNECT was refused: {0}")]
    Refused(String),
    /// A topic named another identity (design.md D4).
    #[error("a topic names another identity")]
    ForeignTopic,
    /// A twin topic that is no request, or whose request id cannot be read (spec/mqtt.md 5.1).
    #[error("a twin topic cannot be read")]
    TwinTopic,
    /// Another connection of the identity took over, or its right was revoked.
    #[error("taken over by another connection, or revoked")]
    Revoked,
    /// Its token expired.
    #[error("the token expired")]
    TokenExpired,
    /// A message could not be stored: nothing of it was acknowledged.
    #[error("a message could not be stored")]
    NotStored,
    /// The client does not read what is written.
    #[error("the client does not read")]
    NotReading,
    /// The hub stops.
    #[error("the hub stops")]
    Stopping,
}

impl ConnectionEnd {
    /// Whether the client's will is published: on every end but the client's own DISCONNECT and
    /// the end of the hub, after which the client finds its session again (spec/mqtt.md 2.6).
    #[must_use]
    pub fn publishes_will(&self) -> bool {
        match self {
            Self::Protocol(reason) => *reason != CloseReason::Disconnected,
            Self::Refused(_) | Self::Stopping => false,
            Self::Transport(_)
            | Self::PeerGone
            | Self::ForeignTopic
            | Self::TwinTopic
            | Self::Revoked
            | Self::TokenExpired
            | Self::NotStored
            | Self::NotReading => true,
        }
    }
}
