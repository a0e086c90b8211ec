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
