//! Messages as the lanes see them: where they are stored, whose they are, how long they live.

pub use edgehub_storage::{Entry, Outcome, Settled};

/// What an entry costs while it is in memory: its record and a flat rate for the rest.
pub(super) fn cost_of(entry: &Entry) -> usize {
    entry.message.len() + ENTRY_OVERHEAD_BYTES
}

pub(super) fn is_expired(entry: &Entry, unix_ms: u64) -> bool {
    entry.expires_at_ms.is_some_and(|at| at <= unix_ms)
}

/// Memory of an entry beside its record.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// A message on its way through an open lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Comes back with the message's [`Disposition`]. Counts up by one within a session.
    pub token: u64,
    /// Priority of the queue that it comes from.
    pub priority: u32,
    /// It may have been sent before.
    pub resend: bool,
    /// The message.
    pub entry: Entry,
}

/// What became of a message that was handed to an open lane. A message without a disposition when
/// its session ends is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The upstream has it.
    Accepted,
    /// It can never be sent, or its time is over.
    Unsendable(DropReason),
}

/// Named rules under which a message is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The stored record cannot be decoded.
    CorruptRecord,
    /// Its sender was removed or disabled, which our own completed view of the scope proves.
    DeviceInvalidState,
    /// Refused by the upstream for what it is, alone in its delivery.
    Rejected,
    /// Larger than the upstream protocol can carry.
    TooLarge,
    /// Its time to live was over before it could be sent.
    TtlExpiry,
}

impl DropReason {
    /// Label value of `edgehub_messages_dropped_total`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::CorruptRecord => "corrupt_record",
            Self::DeviceInvalidState => "device_invalid_state",
            Self::Rejected => "rejected",
            Self::TooLarge => "too_large",
            Self::TtlExpiry => "ttl_expiry",
        }
    }

    /// How the store counts it.
    pub(crate) fn outcome(self) -> Outcome {
        match self {
            Self::TtlExpiry => Outcome::Expired,
            Self::CorruptRecord | Self::DeviceInvalidState | Self::Rejected | Self::TooLarge => {
                Outcome::Dropped
            }
        }
    }
}

/// A message that a lane gave up without sending it, for the counters and the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discarded {
    /// Priority of its queue.
    pub priority: u32,
    /// Under which rule.
    pub reason: DropReason,
    /// The message.
    pub entry: Entry,
}
