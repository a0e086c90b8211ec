//! Named limits of the engine.

/// Smallest value that a peer may announce as its `max-frame-size`, bytes (part 2, 2.4.1).
pub const MIN_MAX_FRAME_BYTES: u32 = 512;

/// Largest frame that this hub announces and takes, bytes (spec/amqp.md 2.1). A connection never
/// buffers more than one such frame for a peer.
pub const FRAME_BYTES_MAX: u32 = 65_536;

/// Largest SASL frame, bytes. The standard's 512 are too few for the tokens that Azure clients
/// send with PLAIN (spec/amqp.md 1.4).
pub const SASL_FRAME_BYTES_MAX: u32 = 65_536;

/// Highest channel number, so 8192 channels of a connection (spec/amqp.md 2.1).
pub const CHANNEL_MAX: u16 = 8191;

/// Levels of lists, maps, arrays and described values within each other. Deeper ones are refused
/// as malformed before anything is decoded: a performative ends the connection, a message is
/// rejected.
pub const VALUE_DEPTH_MAX: usize = 16;

/// Elements of an array whose elements take no bytes (null, true, the empty list): their count is
/// bounded by nothing else, and arrays of such arrays would take a hundred times their bytes once
/// they are decoded. More are malformed.
pub const ARRAY_EMPTY_ELEMENTS_MAX: usize = 8;

/// Data sections of one message, so messages of one batch. More are malformed: 1 MiB holds as many
/// of 32 bytes, fewer than a message with one property takes.
pub const DATA_SECTIONS_MAX: usize = 32_768;

/// Bytes of the token in a put-token request; a longer one is answered 400.
pub const CBS_TOKEN_BYTES_MAX: usize = 16_384;

/// Bytes of `name`, of `type` and of `reply-to` in a put-token request; longer ones are answered
/// 400.
pub const CBS_TEXT_BYTES_MAX: usize = 2048;

/// Bytes of the id of a request that is repeated in its answer. A put-token with a longer one is
/// answered 400 without it, any other request is ignored.
pub const MESSAGE_ID_BYTES_MAX: usize = 1024;

/// Highest handle of a link in a session (spec/amqp.md 2.2). An attach above it ends the
/// connection.
pub const HANDLE_MAX: u32 = 262_143;

/// Sessions of one connection. A further one is begun and ended at once with
/// `amqp:resource-limit-exceeded`. A hub below us has one for each identity, up to 995.
pub const SESSIONS_MAX: usize = 1_024;

/// Links of one connection over all sessions. A further one is refused with
/// `amqp:resource-limit-exceeded`. Seven for each of 995 identities fit.
pub const LINKS_MAX: usize = 8_192;

/// Links beyond [`LINKS_MAX`] that were refused and that the peer has not detached yet. More close
/// the connection with `amqp:resource-limit-exceeded`.
pub const REFUSED_LINKS_MAX: usize = 1_024;

/// Bytes of attaches that are not answered yet. Beyond it nothing is read until some are.
pub const ASKED_BYTES_MAX: usize = 262_144;

/// Bytes of an error's description; it is cut there, so that an error fits the smallest frame.
pub const ERROR_TEXT_BYTES_MAX: usize = 384;

/// Transfers that a peer may send in a session before our next flow (spec/amqp.md 2.2). More end
/// the session.
pub const INCOMING_WINDOW: u32 = 5_000;

/// Largest delivery on a link that states no limit, bytes. A larger one detaches the link.
pub const DELIVERY_BYTES_MAX: u64 = 1_048_576;

/// Bytes of deliveries of one connection that have arrived in part. Beyond it the connection is
/// closed with `amqp:resource-limit-exceeded`.
pub const PARTIAL_BYTES_MAX: usize = 8_388_608;

/// Bytes that a peer has not taken yet. Beyond it nothing is sent to it and nothing read from it.
pub const OUTPUT_BYTES_MAX: usize = 524_288;

/// Deliveries of one link that the peer has not settled. Beyond it nothing is sent on the link.
pub const UNSETTLED_MAX: u32 = 5_000;

/// Longest delivery tag, bytes (part 2, 2.8.7). A longer one ends the session.
pub const TAG_BYTES_MAX: usize = 32;

/// Smallest idle time-out that a peer may ask for, milliseconds (spec/amqp.md 2.1).
pub const IDLE_TIME_OUT_MIN_MS: u32 = 5_000;

/// Empty frames are sent to a peer that names no idle time-out as if it had named this one,
/// milliseconds (spec/amqp.md 2.1).
pub const IDLE_TIME_OUT_UNNAMED_MS: u32 = 120_000;

/// How long our close waits for the peer's, milliseconds.
pub const CLOSE_MAX_MS: u64 = 5_000;

/// Bytes of a container id, host name, link name or SASL identity that are kept; longer ones end
/// the connection.
pub const NAME_BYTES_MAX: usize = 4_096;
