//! What [`TwinSync`](super::sync::TwinSync) has others do.

use std::time::Instant;

use bytes::Bytes;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Fetch the twin.
    Fetch {
        /// Whether a client waits for it.
        for_client: bool,
    },
    /// Send reports.
    Report,
    /// Offer the client once more what it missed.
    Forward,
    /// Nothing before this.
    At(Instant),
    /// Nothing before the next event.
    Idle,
}

/// A patch of desired properties for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) version: u64,
    pub(super) patch: Bytes,
}

/// What clients that asked for the twin are answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Twin(Bytes),
    Refused { status: u16 },
}

/// What a fetch led to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FetchOutcome {
    pub(super) answer: Answer,
    /// Whether the client is to be told what changed.
    pub(super) forward: bool,
}

/// What sending reports led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ReportOutcome {
    /// Send this, too.
    Continue(Bytes),
    Confirmed,
    /// They are refused for good and dropped.
    Dropped {
        status: u16,
    },
    /// They are sent again later.
    Failed,
}
