//! The seam between lanes and upstream protocols.
//!
//! The pump opens a session per lane through a [`Transport`], hands it batches of messages and is
//! told what became of them. A transport decides nothing about retries, order or windows: it keeps
//! the order of the batches, answers each message at most once, and says why a session ended.

use edgehub_proto::identity::Identity;
use tokio::sync::mpsc;

use crate::lanes::{CloseCause, Disposition, Outgoing, SessionId};

/// An upstream protocol.
pub trait Transport: Send + Sync + 'static {
    /// Starts to open a session and returns at once. Whatever happens then is told through the
    /// request's events: at most one [`SessionEvent::Opened`], dispositions, and exactly one
    /// [`SessionEvent::Closed`] at the end.
    fn open(&self, request: OpenRequest);
}

/// A session that is wanted.
#[derive(Debug)]
pub struct OpenRequest {
    /// Its number, repeated in every event.
    pub session: SessionId,
    /// For whom.
    pub identity: Identity,
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
    /// Send these, in this order. Never more unanswered messages than the lane's window.
    Send(Vec<Outgoing>),
}

/// What a session tells.
#[derive(Debug)]
pub enum SessionEvent {
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
    /// Messages can be sent.
    Opened {
        /// Which session.
        session: SessionId,
        /// End of the credential's life, Unix milliseconds; none if it never ends.
        expires_at_ms: Option<u64>,
    },
}
