//! What the scheduler wants to be done, and the words that it shares with its caller.

use std::time::Duration;

use edgehub_proto::{hub::Needs, identity::Identity};

#[cfg(doc)]
use super::scheduler::Scheduler;
use super::{
    cause::CloseCause,
    message::{Discarded, Outgoing, Settled},
    queue::ReadFilter,
    requests::{RequestFault, RequestId},
    session::SessionId,
};

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Ask the session to end. Its close event follows.
    Close {
        /// Which session.
        session: SessionId,
    },
    /// These messages were given up and will be settled: count them.
    Discarded(Vec<Discarded>),
    /// A request is over without an answer.
    Fail {
        /// Which one.
        request: RequestId,
        /// Why.
        fault: RequestFault,
    },
    /// The identity of a session wants to hear something else from now on.
    Needs {
        /// Which session.
        session: SessionId,
        /// What it wants to hear.
        needs: Needs,
    },
    /// Open a session. [`Scheduler::opened`] or [`Scheduler::closed`] answers.
    Open {
        /// Number of the new session.
        session: SessionId,
        /// For whom.
        identity: Identity,
        /// What it wants to hear.
        needs: Needs,
    },
    /// Read from a queue. [`Scheduler::read_done`] or [`Scheduler::read_failed`] answers.
    Read {
        /// Index of the queue.
        queue: usize,
        /// First offset.
        from: u64,
        /// Which entries are wanted.
        filter: ReadFilter,
    },
    /// Ask the upstream about an identity. [`Scheduler::identity_checked`] answers.
    Refresh {
        /// Whose existence is in doubt.
        identity: Identity,
    },
    /// Something that a person may want to know.
    Report(Report),
    /// Make requests over an open session. [`Scheduler::answered`] or the session's end answers.
    Request {
        /// Which session.
        session: SessionId,
        /// In this order.
        requests: Vec<RequestId>,
    },
    /// Hand messages to an open session.
    Send {
        /// Which session.
        session: SessionId,
        /// In order of tokens.
        batch: Vec<Outgoing>,
    },
    /// Settle messages. [`Scheduler::settled`] or [`Scheduler::settle_failed`] answers.
    Settle {
        /// Index of the queue.
        queue: usize,
        /// What and how.
        settled: Vec<Settled>,
    },
}

/// News for log and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A lane failed and will try again.
    Failed {
        /// Whose lane.
        identity: Identity,
        /// Why.
        cause: CloseCause,
        /// Failures in a row.
        failures: u32,
        /// When it tries again at the latest.
        retry_in: Duration,
    },
    /// The same message has been at the head of a session that broke many times in a row, while
    /// other senders' messages passed.
    SuspectMessage {
        /// Whose message.
        identity: Identity,
        /// Priority of its queue.
        priority: u32,
        /// Its offset.
        offset: u64,
        /// How often in a row.
        times: u32,
    },
}

/// What our own view of the scope says about a doubtful identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Proven to be removed or disabled: its messages are dropped.
    Gone,
    /// It is there: try again now.
    Retry,
    /// Not known: keep trying with back-off.
    Unknown,
}

/// Whether the upstream can be reached, as far as the lanes know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Nothing was tried yet.
    Unknown,
    /// It answered last.
    Up,
    /// The last attempts were not answered and no session is open.
    Down,
}

/// Numbers for status and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneCounts {
    /// Lanes in memory.
    pub lanes: usize,
    /// Open sessions.
    pub ready: usize,
    /// Sessions in all, opening and closing ones included.
    pub sessions: usize,
    /// Bytes of messages in memory.
    pub bytes: usize,
}
