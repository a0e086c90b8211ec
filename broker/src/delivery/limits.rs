//! Named limits of deliveries to module inputs.

use std::time::Duration;

use crate::hub::INPUT_SLOTS_MAX;

/// Deliveries that a module may have unsettled (design.md D17).
pub const WINDOW_DEFAULT: usize = 16;

/// Largest window that can be configured.
pub const WINDOW_MAX: usize = 1_024;

/// Bytes of deliveries that a module may have unsettled; a single larger message still goes, alone.
pub const WINDOW_BYTES_MAX: usize = 1024 * 1024;

/// How far apart the offsets of one queue may be that are out at once. It makes packet ids that
/// are derived from offsets unique.
pub const OFFSETS_OUT_MAX: u64 = 4_096;

/// Entries that one read of a queue brings.
pub const READ_ENTRIES: usize = 64;

/// Bytes that one read of a queue brings; a single larger message still comes, alone.
pub const READ_BYTES: usize = 64 * 1024;

/// Entries that one read looks at.
pub const READ_SCAN: usize = 4_096;

/// Settlements of one module that wait for its pump. Far above any window: what lies beyond was
/// never sent.
pub const SETTLED_WAITING_MAX: usize = 8 * WINDOW_MAX;

/// After how long a client is tried again whose outbox was full, when nothing else happens.
pub const FULL_RETRY: Duration = Duration::from_millis(50);

/// After how long a queue is read again that could not be read.
pub const READ_RETRY: Duration = Duration::from_secs(1);

/// Senders and outputs of one queue whose counter is kept at hand.
pub const COUNTERS_MAX: usize = 64;

/// Queues that left the configuration of which it is remembered what was sent. When there are more
/// all are forgotten: a message that comes again is then not marked so.
pub const GONE_MAX: usize = 256;

/// The slot that all queues share for which no own one is left.
pub const SHARED_SLOT: u16 = INPUT_SLOTS_MAX - 1;

/// How often a message is sent to a client that gives it back each time. Then it is dropped and
/// counted (design.md D8). A new connection begins to count anew.
pub const DELIVERIES_MAX: u8 = 10;
