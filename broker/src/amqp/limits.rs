//! Named limits of one AMQP connection, beside those of the engine (`edgehub_amqp::limits`).

use std::time::Duration;

/// Credit of every link that is received on (spec/amqp.md 2.3). It comes back with the commit.
pub const CREDIT: u32 = 1_000;

/// Largest message that a link takes, bytes; a batch counts as one (spec/amqp.md 2.3). The C SDK
/// makes its batches as large as this. A larger one detaches the link.
pub const MESSAGE_BYTES_MAX: u64 = 1_048_576;

/// Bytes of telemetry that a connection may have waiting for a commit. Beyond it the socket is not
/// read.
pub const UNCOMMITTED_BYTES_MAX: usize = 4_194_304;

/// What one message costs beside its bytes, for [`UNCOMMITTED_BYTES_MAX`].
pub const MESSAGE_OVERHEAD_BYTES: usize = 256;

/// How long the TLS handshake may take, beside the overall time for the open.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// From the first byte until the peer has presented a credential that is found good. Then the
/// connection is closed with `amqp:unauthorized-access`.
pub const CREDENTIAL_MAX: Duration = Duration::from_secs(60);

/// How much longer a peer may stay that is without a good credential when a verdict is awaited just
/// then.
pub const VERDICT_MAX: Duration = Duration::from_secs(30);

/// How long one write may wait for a peer that does not read.
pub const WRITE_MAX: Duration = Duration::from_secs(30);

/// How long each last courtesy of a closing connection may take: frames that are due, messages that
/// were read, the end of TLS.
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Bytes read from the socket in one turn.
pub const READ_BYTES_MAX: usize = 65_536;

/// Connections that may be without a credential at once.
pub const STRANGERS_MAX: usize = 2_048;

/// Those of one address (of IPv6: of one /64).
pub const STRANGERS_PER_ADDRESS_MAX: usize = 512;

/// Connections that wait for such a place. Further ones are closed.
pub const STRANGERS_WAITING_MAX: usize = 8_192;

/// Those of one address.
pub const STRANGERS_WAITING_PER_ADDRESS_MAX: usize = 4_096;

/// Tokens that one connection holds. A put-token beyond it is answered 403: IoT Hub takes 999.
pub const TOKENS_MAX: usize = 1_024;

/// Verdicts on credentials that one connection waits for at once. Further ones wait their turn.
pub const JOBS_MAX: usize = 64;

/// Links that wait for a verdict, and put-tokens that do. Beyond it the socket is not read.
pub const JOBS_WAITING_MAX: usize = 2_048;

/// Events of one identity that wait for credit, of each kind. Beyond it none is taken for it.
pub const WAITING_MAX: usize = 64;

/// Answers to put-tokens that wait for credit. Further ones are dropped: the peer asks again.
pub const CBS_ANSWERS_MAX: usize = 1_024;

/// Twin requests of one identity whose answers are due. With a further one the oldest of them is
/// answered 429.
pub const TWIN_IDS_MAX: usize = 256;

/// Messages of one batch. A larger batch is rejected. The C SDK fills 1 MiB, if need be with the
/// smallest of messages.
pub const BATCH_MESSAGES_MAX: usize = 32_768;

/// Bytes of what a peer wrote that an error or a log line repeats.
pub const ECHO_BYTES_MAX: usize = 256;
