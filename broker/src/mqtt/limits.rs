//! Named limits of one MQTT connection.

use std::time::Duration;

/// Largest CONNECT: two ids, a user name, a token and a will of 64 KiB fit.
pub const CONNECT_BYTES_MAX: usize = 131_072;

/// Largest packet once connected: a 256 KiB message and a topic of 65,535 bytes
/// (spec/mqtt.md 8.5 REC). What is too large as a message is acknowledged and dropped.
pub const PACKET_BYTES_MAX: u32 = 262_144 + 65_535 + 16;

/// Bytes of publishes that a connection may have waiting for a commit. Beyond it the socket is
/// not read: the client's own window fills long before.
pub const UNCOMMITTED_BYTES_MAX: usize = 1_048_576;

/// What one publish costs beside its bytes, for [`UNCOMMITTED_BYTES_MAX`].
pub const PUBLISH_OVERHEAD_BYTES: usize = 256;

/// Bytes read from the socket in one turn.
pub const READ_BYTES_MAX: usize = 65_536;

/// Bytes that must arrive at once to count as a sign of life while their packet is incomplete.
pub const PROGRESS_BYTES_MIN: usize = 256;

/// Bytes of a refused client's id that are logged: any id that can be one fits.
pub const LOGGED_ID_BYTES_MAX: usize = 2 * edgehub_proto::limits::ID_LENGTH_MAX + 1;

/// How long the TLS handshake and then the CONNECT may take, each, beside the overall
/// `ConnectArrivalTimeout`.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// How long one write may wait for a client that does not read.
pub const WRITE_MAX: Duration = Duration::from_secs(30);

/// How long each last courtesy of a closing connection may take: answers that are due, messages
/// that were read, the end of TLS.
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Connections that may be without an accepted CONNECT at once. Each costs some 15 KiB, most of it
/// TLS's.
pub const STRANGERS_MAX: usize = 2_048;

/// Those of one address (of IPv6: of one /64), so that a flood keeps nobody else out.
pub const STRANGERS_PER_ADDRESS_MAX: usize = 512;

/// Connections that wait for such a place. Further ones are closed.
pub const STRANGERS_WAITING_MAX: usize = 8_192;

/// Those of one address: a thousand clients that come back at once after an outage, and more.
pub const STRANGERS_WAITING_PER_ADDRESS_MAX: usize = 4_096;

/// Filters of one SUBSCRIBE or UNSUBSCRIBE.
pub const FILTERS_MAX: usize = 50;

/// Filters of one session. Further ones are refused with 0x80.
pub const SESSION_FILTERS_MAX: usize = 100;

/// Bytes of all filters of one session. Further ones are refused with 0x80.
pub const SESSION_FILTER_BYTES_MAX: usize = 16_384;

/// How long a SUBACK or UNSUBACK waits for the session to be stored, and CONNACK for an old one
/// to be removed. A stuck disk must not stop a client that subscribes: it is answered then, and
/// the session is stored when the disk works again.
pub const SESSION_WRITE_MAX: Duration = Duration::from_secs(1);

/// Answers to SUBSCRIBE and UNSUBSCRIBE that wait for their session to be stored. The oldest
/// leaves at once when one more comes.
pub const SESSION_ANSWERS_MAX: usize = 64;

/// Bytes that a client has not read yet. Beyond it nothing more is read from it and no event is
/// taken for it. One packet may pass the limit.
pub const OUTPUT_BYTES_MAX: usize = 524_288;

/// Largest packet that a client is sent: C# clients end the connection on a larger one
/// (spec/mqtt.md 8.5).
pub const CLIENT_PACKET_BYTES_MAX: usize = 262_144;

/// Deliveries that a client may have unacknowledged, over all its queues. Their windows
/// (design.md D17) are far below; it bounds what a fault there could cost.
pub const OUTSTANDING_MAX: usize = 4_096;

/// Deliveries that were taken from the outbox and wait for their packet id, or for room. Beyond it
/// no event is taken.
pub const WAITING_MAX: usize = 256;
