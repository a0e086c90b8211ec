//! Named limits of the twins.

use std::time::Duration;

/// Bytes of a patch of reported properties as JSON without spaces (spec/core.md 5.6).
pub const PATCH_BYTES_MAX: usize = 32 * 1024;

/// Bytes of a patch as the client wrote it, spaces and all: the largest message.
pub const PATCH_TEXT_BYTES_MAX: usize = 256 * 1024;

/// Weight of all reported properties of a twin, as IoT Hub counts it.
pub const REPORTED_WEIGHT_MAX: usize = 32 * 1024;

/// Objects and arrays of reported properties within one another, the root not counted.
pub const DEPTH_MAX: usize = 10;

/// Bytes of a property's name.
pub const NAME_BYTES_MAX: usize = 1024;

/// Bytes of a scalar value's text.
pub const VALUE_BYTES_MAX: usize = 4096;

/// Smallest integer.
pub const INTEGER_MIN: i64 = -4_503_599_627_370_496;

/// Largest integer.
pub const INTEGER_MAX: i64 = 4_503_599_627_370_495;

/// Bytes of a twin or a patch that comes from upstream, and of each part of a stored one.
pub const DOCUMENT_BYTES_MAX: usize = 256 * 1024;

/// Objects and arrays within one another in any JSON that is read here. Bounds every recursion.
pub const DOCUMENT_DEPTH_MAX: usize = 32;

/// Bytes of the names that reports deleted and that the upstream was not told yet. A client that
/// goes on making and deleting properties while the upstream is away is refused then.
pub const ERASED_BYTES_MAX: usize = 256 * 1024;

/// Requests of one identity that wait, and changes from upstream that wait for it.
pub const COMMANDS_MAX: usize = 64;

/// Bytes of patches of one identity that wait; a single larger one still waits.
pub const COMMAND_BYTES_MAX: usize = 512 * 1024;

/// Bytes of patches of all identities that wait.
pub const ALL_COMMAND_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Patches of desired properties that are held back while the whole twin is fetched. With more,
/// it is fetched once more instead.
pub const HELD_PATCHES_MAX: usize = 16;

/// Twins in memory at once; each some hundred KiB, a hostile one some MiB.
pub const TWINS_IN_MEMORY_MAX: usize = 16;

/// Identities whose twins are synchronised with the upstream at once.
pub const SYNCS_MAX: usize = 64;

/// Identities whose clients wait for a twin from upstream at once; others wait for their turn.
pub const GETS_MAX: usize = 256;

/// Longest wait for an answer of the upstream. It keeps a shorter time itself
/// (`CloudOperationTimeoutSecs`); this is for one that does not.
pub const UPSTREAM_ANSWER_MAX: Duration = Duration::from_secs(120);

/// Pause after the first failure of a request to the upstream that can be reached; it doubles ...
pub const RETRY_MIN: Duration = Duration::from_secs(1);

/// ... up to this.
pub const RETRY_MAX: Duration = Duration::from_secs(120);

/// Pause after the upstream refused an identity, not its request.
pub const REFUSED_RETRY: Duration = Duration::from_secs(600);

/// Longest period that an operator can set; a moment so far away can still be computed.
pub const PERIOD_MAX: Duration = Duration::from_secs(366 * 86_400);

/// How often what is not needed any more is looked for.
pub const SWEEP_PERIOD: Duration = Duration::from_secs(60);
