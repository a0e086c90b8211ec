//! Named limits of direct methods.

use std::time::Duration;

/// Calls of one client that wait, for it or for its answers. The next one is refused (429).
pub const CALLS_PER_CLIENT_MAX: usize = 64;

/// Calls that wait, of all clients together. The next one is refused (503).
pub const CALLS_MAX: usize = 2_048;

/// Bytes of payloads that wait for clients that are not there. The next call that would have to
/// wait is refused (503).
pub const PARKED_BYTES_MAX: usize = 8 * 1024 * 1024;

/// UTF-16 units of a method's name.
pub const NAME_LENGTH_MAX: usize = 100;

/// Bytes of a payload, as UTF-8.
pub const PAYLOAD_BYTES_MAX: usize = 131_072;

/// Shortest time that a local caller may give the client to answer.
pub const RESPONSE_TIMEOUT_MIN: Duration = Duration::from_secs(5);

/// Longest time that a local caller may give the client to answer.
pub const RESPONSE_TIMEOUT_MAX: Duration = Duration::from_secs(300);

/// Time that the client has to answer when the caller names none.
pub const RESPONSE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// Longest time that a local caller may wait for the client to connect and subscribe.
pub const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(300);

/// Time that the client has to answer a call from upstream: IoT Hub's own limit of 300 s and a
/// margin, so that it is IoT Hub that gives up first.
pub const UPSTREAM_RESPONSE_TIMEOUT: Duration = Duration::from_secs(330);
