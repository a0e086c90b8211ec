//! The names by which a client's driver and its connection speak of sessions, links and deliveries.

use std::{fmt, time::Duration};

use bytes::Bytes;
use edgehub_amqp::performative::{ErrorInfo, Outcome};

use crate::limits;

/// Names a session of one connection. A name of a session that is gone is ignored by every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionKey {
    pub(super) channel: u16,
    /// Tells a session from an earlier one on the same channel.
    pub(super) generation: u64,
}

/// Names a link. As [`SessionKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LinkKey {
    pub(super) session: SessionKey,
    pub(super) handle: u32,
    pub(super) generation: u64,
}

impl LinkKey {
    /// The session that it is in.
    pub(crate) fn session(self) -> SessionKey {
        self.session
    }
}

/// What a connection says of itself and how patient it is.
#[derive(Clone, Debug)]
pub(crate) struct ClientConfig {
    /// Our container: unique among the peer's connections.
    pub(crate) container_id: String,
    /// The host that was connected to.
    pub(crate) hostname: String,
    /// Largest frame that is taken, bytes.
    pub(crate) frame_bytes_max: u32,
    /// From the first byte to the peer's open.
    pub(crate) open_max: Duration,
    /// Silence of the peer after which it is given up; half of it is what the peer is told.
    pub(crate) idle: Duration,
}

impl ClientConfig {
    pub(crate) fn new(container_id: String, hostname: String) -> Self {
        Self {
            container_id,
            hostname,
            frame_bytes_max: limits::AMQP_FRAME_BYTES_MAX,
            open_max: Duration::from_secs(20),
            idle: Duration::from_secs(60),
        }
    }
}

/// Which way messages go on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From us to the peer.
    Up,
    /// From the peer to us.
    Down {
        /// Deliveries that may be with us at once.
        credit: u32,
        /// We say first what became of a delivery, and the peer settles (rcv-settle-mode second).
        second: bool,
    },
}

/// A link that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct LinkSpec {
    /// Unique within the connection.
    pub(crate) name: String,
    pub(crate) direction: Direction,
    /// Deliveries are settled by who sends them.
    pub(crate) settled: bool,
    /// The node at the peer.
    pub(crate) address: String,
    /// Our end.
    pub(crate) own_address: String,
    /// Link properties: symbols and strings.
    pub(crate) properties: Vec<(&'static str, String)>,
}

/// A delivery that arrived whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) link: LinkKey,
    /// Its number in the session, for [`super::Client::settle`].
    pub(crate) number: u32,
    pub(crate) tag: Bytes,
    pub(crate) settled: bool,
    /// The encoded message; may be a slice of a frame.
    pub(crate) payload: Bytes,
}

/// What happened on a connection.
#[derive(Debug)]
pub(crate) enum Event {
    /// The peer took the link.
    Attached {
        link: LinkKey,
        /// Largest message that the peer takes, bytes.
        max_message_size: Option<u64>,
    },
    /// The session can be used.
    Begun(SessionKey),
    /// The connection is over; nothing follows.
    Closed(ClientError),
    /// More may be sent on the link, or in its session.
    Credit(SessionKey),
    /// A delivery arrived.
    Delivery(Delivery),
    /// The peer refused or detached the link; nothing more is said about its deliveries.
    Detached {
        link: LinkKey,
        error: Option<ErrorInfo>,
    },
    /// The session ended, and all its links with it.
    Ended {
        session: SessionKey,
        error: Option<ErrorInfo>,
    },
    /// The connection can be used.
    Opened {
        /// Sessions at once.
        sessions_max: usize,
    },
    /// What became of a delivery that we sent; none when nothing was said.
    Settled {
        link: LinkKey,
        number: u32,
        outcome: Option<Outcome>,
    },
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClientError {
    /// The peer broke the protocol or a limit.
    #[error("the upstream broke the protocol: {0}")]
    Fault(String),
    /// Nothing was heard for the idle time-out.
    #[error("the upstream has been silent for {0:?}")]
    Idle(Duration),
    /// No open came.
    #[error("the upstream did not open the connection within {0:?}")]
    OpenTimeout(Duration),
    /// We closed it.
    #[error("the connection was closed")]
    Ours,
    /// The peer closed it.
    #[error("the upstream closed the connection{}", Reason(.0.as_ref()))]
    Peer(Option<ErrorInfo>),
}

/// An error of the peer in words.
pub(crate) struct Reason<'a>(pub(crate) Option<&'a ErrorInfo>);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(error) = self.0 else { return Ok(()) };
        write!(f, ": {}", error.condition)?;
        // A peer's text may be of any length and belongs into one line of a log.
        if let Some(text) = &error.description {
            let text: String = text.chars().take(200).map(plain).collect();
            write!(f, " ({text})")?;
        }
        Ok(())
    }
}

fn plain(character: char) -> char {
    if character.is_control() {
        ' '
    } else {
        character
    }
}

/// Why nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendError {
    /// No credit, window or room for output now: [`Event::Credit`] or taken output changes that.
    NoRoom,
    /// The peer takes no message of this size.
    TooLarge,
}
