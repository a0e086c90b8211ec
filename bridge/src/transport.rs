//! The seam between lanes and upstream protocols.
//!
//! The pump opens a session per lane through a [`Transport`], hands it batches of messages and twin
//! requests and is told what became of them. A transport decides nothing about retries, order or
//! windows: it keeps the order of the batches, answers each message and request at most once, and
//! says why a session ended.
//!
//! What the session's identity needs to hear is state that the transport keeps true while the
//! session is open; what arrives goes to the broker directly (`edgehub_proto::hub::Downstream`).

use std::time::Instant;

use bytes::Bytes;
use edgehub_proto::{
    hub::{Needs, UpstreamError},
    identity::Identity,
};
use tokio::sync::{mpsc, watch};

use crate::lanes::{CloseCause, Disposition, Outgoing, RequestId, SessionId};

/// An upstream protocol.
pub trait Transport: Send + Sync + 'static {
    /// Starts to open a session and returns at once. Whatever happens then is told through the
    /// request's events: at most one [`SessionEvent::Opened`], then dispositions and answers, and
    /// exactly one [`SessionEvent::Closed`] at the end.
    fn open(&self, request: OpenRequest);
}

/// A session that is wanted.
#[derive(Debug)]
pub struct OpenRequest {
    /// Its number, repeated in every event.
    pub session: SessionId,
    /// For whom.
    pub identity: Identity,
    /// What the identity needs to hear, now and from now on.
    pub needs: watch::Receiver<Needs>,
    /// What the session is told. Closed when nobody wants the session any more.
    pub commands: mpsc::Receiver<Command>,
    /// Where events go. The transport waits when it is full, which slows the session down.
    pub events: mpsc::Sender<SessionEvent>,
}

/// What a session is told.
#[derive(Debug)]
pub enum Command {
    /// End in order: nothing more will be sent.
    Close,
    /// Make these requests, in this order.
    Request(Vec<TwinRequest>),
    /// Send these, in this order. Never more unanswered messages than the lane's window.
    Send(Vec<Outgoing>),
}

/// A request about the twin of the session's identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinRequest {
    /// Comes back with the answer.
    pub request: RequestId,
    /// What is asked.
    pub ask: TwinAsk,
    /// After that nobody waits for the answer.
    pub deadline: Instant,
}

/// What is asked about a twin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TwinAsk {
    /// The whole twin.
    Get,
    /// A patch of the reported properties.
    Report(Bytes),
}

/// The answer to a [`TwinRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinAnswer {
    /// The twin; empty after a report.
    pub body: Bytes,
    /// The new version of the reported properties, when told.
    pub version: Option<u64>,
}

/// What a session tells.
#[derive(Debug)]
pub enum SessionEvent {
    /// A request was answered, or can have no answer.
    Answered {
        /// Which one.
        request: RequestId,
        /// The answer.
        answer: Result<TwinAnswer, UpstreamError>,
    },
    /// It ended.
    Closed {
        /// Which session.
        session: SessionId,
        /// Why.
        cause: CloseCause,
    },
    /// What became of messages, in any order.
    Disposed {
        /// Which session.
        session: SessionId,
        /// By token.
        dispositions: Vec<(u64, Disposition)>,
    },
    /// The session has handed something down whose answer it waits for (a direct method, a
    /// cloud-to-device message), or does so no more.
    Engaged {
        /// Which session.
        session: SessionId,
        /// Whether it does.
        engaged: bool,
    },
    /// Messages can be sent.
    Opened {
        /// Which session.
        session: SessionId,
        /// End of the credential's life, Unix milliseconds; none if it never ends.
        expires_at_ms: Option<u64>,
    },
}
