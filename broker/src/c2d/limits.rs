//! Named limits of cloud-to-device messages.

use std::time::Duration;

/// Messages that a client may have unacknowledged (design.md D17).
pub const WINDOW_DEFAULT: usize = 16;

/// Messages of one client that wait behind its window. The next one is not settled, so that
/// upstream keeps it and delivers it later.
pub const WAITING_MAX: usize = 64;

/// Bytes of messages that are held for all clients together. The next one is not settled.
pub const HELD_BYTES_MAX: usize = 32 * 1024 * 1024;

/// How long messages are held for a client that went away: a token renewal is a DISCONNECT and a
/// CONNECT (spec/mqtt.md 12).
pub const GRACE: Duration = Duration::from_secs(10);

/// After how long a client is tried again whose outbox was full, when nothing else happens.
pub const FULL_RETRY: Duration = Duration::from_millis(100);

/// Times that upstream may deliver a message again while the client still has it.
pub const COPIES_MAX: usize = 8;
