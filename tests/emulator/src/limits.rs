//! Every bound of the emulator, by name. IoT Hub's own limits come from spec/upstream.md Part B;
//! the others keep a misbehaving client from growing this process.

use std::time::Duration;

/// Largest D2C message: body plus names and values of its properties (spec/upstream.md B4).
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// Largest MQTT remaining length that is read at all: a whole message, the longest topic that
/// MQTT can carry, and the packet id. Anything above is refused before its bytes are read.
pub(crate) const PACKET_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 65_535 + 16;

/// Bytes that one turn of a connection reads before it handles them: the batch of one ledger write.
pub(crate) const READ_BATCH_BYTES: usize = 256 * 1024;

/// Time from TCP accept to a complete CONNECT, TLS handshake included.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// IoT Hub closes after 1.5 times the keep-alive, of which it honours at most 1,177 s.
pub(crate) const KEEP_ALIVE_MAX_SECS: u16 = 1_177;

/// How long a connection that we close may take to read our last packet.
pub(crate) const LINGER: Duration = Duration::from_millis(500);

/// Open sockets per port; above this, accepting waits.
pub(crate) const CONNECTIONS_MAX: usize = 10_000;

/// Characters in a device or module id.
pub(crate) const ID_CHARS_MAX: usize = 128;

/// Elements of an auth chain that are parsed at all.
pub(crate) const CHAIN_ELEMENTS_MAX: usize = 16;

/// Edge devices on the way from the top layer to the lowest one (public documentation: five).
pub(crate) const EDGE_LEVELS_MAX: usize = 5;

/// Modules per device (public documentation).
pub(crate) const MODULES_MAX: usize = 50;

/// Devices in the registry.
pub(crate) const DEVICES_MAX: usize = 100_000;

/// Identities of one scope page, and devices of one registry list.
pub(crate) const PAGE_ITEMS_MAX: usize = 1_000;

/// Body of an HTTPS or control request.
pub(crate) const REQUEST_BYTES_MAX: usize = 256 * 1024;

/// Bytes of the ledger that a dump reads, and holds, at a time.
pub(crate) const DUMP_CHUNK_BYTES: usize = 256 * 1024;

/// Longest long poll of the control API.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(600);

/// How long the control API waits until killed connections are gone or a port has changed.
pub(crate) const SETTLE_MAX: Duration = Duration::from_secs(10);

/// Requests that one `faults` call may make fail.
pub(crate) const FAULT_COUNT_MAX: u32 = 1_000_000;
