//! Named limits of the HTTP listeners.

use std::time::Duration;

/// Connections to the HTTPS head at once. A child hub needs one. At most half of them are of one
/// address; as many again wait until others end, which [`HEADER_READ_MAX`] and [`CONNECTION_MAX`]
/// see to. A WebSocket counts until it has presented a credential.
pub const CONNECTIONS_MAX: usize = 512;

/// Connections to the metrics port at once: a few scrapers.
pub const ADMIN_CONNECTIONS_MAX: usize = 64;

/// How long a TLS handshake may take.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// How long the head of a request may take to arrive; also how long a connection may be idle.
pub const HEADER_READ_MAX: Duration = Duration::from_secs(10);

/// Bytes of a request's head, and of what is buffered of its body (testing.md S12).
pub const HEADER_BYTES_MAX: usize = 16 * 1024;

/// Bytes of a request's body. The largest legal one has a chain of 16 ids of modules.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// Bytes of the body of a method call: the largest payload, and what is around it.
pub const METHOD_BODY_BYTES_MAX: usize = 144 * 1024;

/// How long the body of a request may take to arrive.
pub const BODY_READ_MAX: Duration = Duration::from_secs(10);

/// How long a connection may live in all, so that a client that does not read its answers ends. A
/// method call that is under way then may still finish: it has time-outs of its own.
pub const CONNECTION_MAX: Duration = Duration::from_secs(300);

/// How long a connection may finish its request once it is to end.
pub const FINISH_MAX: Duration = Duration::from_secs(3);

/// How long a WebSocket upgrade may take once it was granted.
pub const UPGRADE_MAX: Duration = Duration::from_secs(10);
