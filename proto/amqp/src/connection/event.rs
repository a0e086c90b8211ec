//! What a connection tells whoever drives it, and the names by which it is answered.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use fe2o3_amqp_types::definitions::{ReceiverSettleMode, SenderSettleMode};

use super::attach::Attach;
use crate::cbs::Secret;
use crate::performative::{ErrorInfo, Outcome};
use crate::sasl::Mechanism;

/// Names a link of one connection. A name of a link that is gone is ignored by every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId {
    pub(super) channel: u16,
    pub(super) handle: u32,
    /// Tells a link from an earlier one with the same handle.
    pub(super) generation: u64,
}

/// Names a delivery that arrived, until it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Received {
    pub(super) link: LinkId,
    pub(super) delivery_id: u32,
    /// It came settled: nothing is said about it any more.
    pub(super) settled: bool,
}

impl Received {
    /// The link that it arrived on.
    #[must_use]
    pub fn link(&self) -> LinkId {
        self.link
    }

    /// Whether its sender settled it already.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.settled
    }
}

/// Names a delivery that was sent: its delivery id, unique in its session for 2^32 deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sent(pub(super) u32);

/// What SASL PLAIN says (RFC 4616).
#[derive(Debug)]
pub struct SaslPlain {
    /// Identity to act as; mostly empty.
    pub authzid: String,
    /// Identity that authenticates.
    pub authcid: String,
    /// Its password.
    pub password: Secret<String>,
}

/// The connection is open on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The mechanism, when there was a SASL layer.
    pub sasl: Option<Mechanism>,
    /// The peer's container.
    pub container_id: String,
    /// The host that the peer means.
    pub hostname: Option<String>,
    /// After how much silence of ours the peer gives up.
    pub idle_time_out: Option<Duration>,
}

/// A complete delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The link.
    pub link: LinkId,
    /// What [`super::Connection::settle`] names it by; also for one that came settled, whose
    /// credit is given back by that call.
    pub received: Received,
    /// Its tag.
    pub tag: Bytes,
    /// The format of its message.
    pub message_format: u32,
    /// Whether it came settled.
    pub settled: bool,
    /// The encoded message; a slice of the bytes that were read, unless it came in several frames.
    pub payload: Bytes,
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseCause {
    /// The peer closed it, with its reason if it had one.
    #[error("the peer closed the connection{}", Reason(.0.as_ref()))]
    Peer(Option<ErrorInfo>),
    /// We closed it.
    #[error("the connection was closed")]
    Ours,
    /// The peer broke the protocol or a limit; it was told this error.
    #[error("the peer broke the protocol{}", Reason(Some(.0)))]
    Fault(ErrorInfo),
    /// The bytes at the beginning are no protocol that is served.
    #[error("the peer does not speak AMQP 1.0: {0}")]
    Header(String),
    /// SASL did not succeed.
    #[error("the peer did not authenticate by SASL")]
    Sasl,
    /// Nothing was heard for longer than the idle time-out.
    #[error("the peer has been silent for too long")]
    Idle,
    /// The connection was not opened in time.
    #[error("the peer did not open the connection in time")]
    OpenTimeOut,
}

struct Reason<'a>(Option<&'a ErrorInfo>);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(error) = self.0 else { return Ok(()) };
        write!(f, ": {}", error.condition)?;
        if let Some(description) = &error.description {
            write!(f, " ({description})")?;
        }
        Ok(())
    }
}

/// What happened on a connection.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// The peer authenticates by PLAIN; answer with [`super::Connection::sasl_outcome`].
    SaslPlain(SaslPlain),
    /// The peer relies on its TLS certificate; answer with [`super::Connection::sasl_outcome`].
    SaslExternal,
    /// The connection is open.
    Opened(Opened),
    /// The peer wants a link; answer with [`super::Connection::accept`] or
    /// [`super::Connection::refuse`], at any time.
    Attached {
        /// Its name.
        link: LinkId,
        /// What the peer says about it.
        attach: Attach,
    },
    /// A delivery arrived.
    Delivery(Incoming),
    /// The credit of a link that we send on has changed, or its session's window has room again.
    Credit {
        /// The link.
        link: LinkId,
        /// Deliveries that may be sent.
        credit: u32,
        /// The peer wants the credit used up: call [`super::Connection::drained`] when there is
        /// nothing more to send.
        drain: bool,
    },
    /// The peer said what became of a delivery that we sent unsettled.
    Settled {
        /// The link.
        link: LinkId,
        /// The delivery.
        sent: Sent,
        /// The outcome; none when it was settled without one.
        outcome: Option<Outcome>,
        /// False: the peer waits for [`super::Connection::settle_sent`].
        settled: bool,
    },
    /// The peer detached the link, ended its session or closed the connection. What was unsettled
    /// on it is forgotten.
    Detached {
        /// The link.
        link: LinkId,
        /// The peer's reason.
        error: Option<ErrorInfo>,
    },
    /// Nothing more will come.
    Closed(CloseCause),
}

/// On what terms a link is accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkTerms {
    /// Settle mode of the sender; none: the peer's.
    pub snd_settle_mode: Option<SenderSettleMode>,
    /// Settle mode of the receiver; none: the peer's.
    pub rcv_settle_mode: Option<ReceiverSettleMode>,
    /// Largest message, bytes, on a link that we receive on: said and enforced.
    pub max_message_size: Option<u64>,
    /// Credit, on a link that we receive on.
    pub credit: u32,
    /// On a link that we send on: deliveries that are larger than the peer says it takes are sent
    /// all the same, for peers that say less than they take.
    pub exceeds_max_message_size: bool,
}

/// A delivery to send.
#[derive(Clone, Debug)]
pub struct Outgoing<'a> {
    /// Its tag, at most 32 bytes.
    pub tag: &'a [u8],
    /// The format of its message.
    pub message_format: u32,
    /// Nobody will settle it.
    pub settled: bool,
    /// The encoded message.
    pub payload: Bytes,
}

/// Why a delivery was not sent. Nothing has happened then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The link has no credit, or the connection no room: wait for [`Event::Credit`] or until
    /// output was taken.
    #[error("the link has no credit or the connection no room")]
    NoCredit,
    /// The peer does not take messages of this size.
    #[error("the peer takes messages of at most {limit} bytes")]
    TooLarge {
        /// The peer's limit.
        limit: u64,
    },
    /// There is no such link that we send on.
    #[error("there is no such link to send on")]
    NotAttached,
    /// The tag has more than 32 bytes.
    #[error("a delivery tag has at most 32 bytes")]
    Tag,
}
