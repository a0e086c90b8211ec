//! Every bound of the emulator, by name. IoT Hub's own limits come from spec/upstream.md Part B;
//! the others keep a misbehaving client from growing this process.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Largest D2C message: body plus names and values of its properties (spec/upstream.md B4).
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// Largest MQTT remaining length that is read at all: a whole message, the longest topic that
/// MQTT can carry, and the packet id. Anything above is refused before its bytes are read.
pub(crate) const PACKET_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 65_535 + 16;

/// Bytes that one turn of a connection reads before it handles them: the batch of one ledger write.
pub(crate) const READ_BATCH_BYTES: usize = 256 * 1024;

/// Bytes of answers above which a turn sends what it has before it handles the next packet.
pub(crate) const REPLIES_BYTES_MAX: usize = 256 * 1024;

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

/// Orders to fail that stand at the same time.
pub(crate) const FAULT_ORDERS_MAX: usize = 1_000;

/// Bytes of the text that makes a transfer fail by order.
pub(crate) const FAULT_CONTENT_BYTES_MAX: usize = 256;

/// Characters of the AMQP error condition of an ordered failure.
pub(crate) const CONDITION_CHARS_MAX: usize = 128;

/// Devices of one bulk call of the registry (spec/upstream.md B7).
pub(crate) const BULK_ITEMS_MAX: usize = 100;

/// Text of a query.
pub(crate) const QUERY_BYTES_MAX: usize = 16 * 1024;

/// Parentheses and negations of a query inside each other.
pub(crate) const QUERY_DEPTH_MAX: usize = 32;

/// Items of a page of a query's result when the caller does not say.
pub(crate) const QUERY_ITEMS_DEFAULT: usize = 100;

/// JSON text of the desired or the reported properties of a twin, metadata not counted.
pub(crate) const TWIN_SECTION_BYTES_MAX: usize = 32 * 1024;

/// JSON text of a twin's tags.
pub(crate) const TWIN_TAGS_BYTES_MAX: usize = 8 * 1024;

/// Objects and arrays inside each other below the root of a twin's section.
pub(crate) const TWIN_DEPTH_MAX: usize = 10;

/// A key of a twin, in UTF-8 bytes.
pub(crate) const TWIN_KEY_BYTES_MAX: usize = 1024;

/// A text in a twin, in UTF-8 bytes.
pub(crate) const TWIN_STRING_BYTES_MAX: usize = 4 * 1024;

/// The integers that a twin can hold.
pub(crate) const TWIN_INTEGERS: RangeInclusive<i64> =
    -4_503_599_627_370_496..=4_503_599_627_370_495;

/// Payload of a direct method, and of its answer.
pub(crate) const METHOD_PAYLOAD_BYTES_MAX: usize = 128 * 1024;

/// Characters of a direct method's name.
pub(crate) const METHOD_NAME_CHARS_MAX: usize = 100;

/// How long a caller may let a direct method wait for the answer, and what counts when it says
/// nothing.
pub(crate) const METHOD_RESPONSE_SECS: RangeInclusive<u64> = 5..=300;
pub(crate) const METHOD_RESPONSE_SECS_DEFAULT: u64 = 30;

/// How long a caller may let a direct method wait for the target to be there.
pub(crate) const METHOD_CONNECT_SECS: RangeInclusive<u64> = 0..=300;

/// Direct methods that wait for an answer at the same time.
pub(crate) const METHODS_MAX: usize = 10_000;

/// C2D messages of a device that are enqueued or invisible.
pub(crate) const C2D_QUEUE_MAX: usize = 50;

/// How often a C2D message is delivered before it is dead-lettered.
pub(crate) const C2D_DELIVERIES_MAX: u32 = 10;

/// Largest C2D message: body plus names and values of its properties.
pub(crate) const C2D_BYTES_MAX: usize = 64 * 1024;

/// How long a C2D message lives when its sender says nothing, and at most.
pub(crate) const C2D_TTL_MS_DEFAULT: u64 = 3_600_000;
pub(crate) const C2D_TTL_MS_MAX: u64 = 2 * 24 * 3_600_000;

/// How long a delivered C2D message waits for its PUBACK before it is enqueued again.
pub(crate) const C2D_LOCK_MS: u64 = 60_000;

/// What became of a device's C2D messages: so many of the newest are remembered.
pub(crate) const C2D_OUTCOMES_MAX: usize = 1_000;

/// Feedback records that wait for the service side; of more the oldest are dropped.
pub(crate) const FEEDBACK_MAX: usize = 10_000;

/// Feedback records of one message (spec/upstream.md B6).
pub(crate) const FEEDBACK_BATCH_MAX: usize = 64;

/// Tokens of one AMQP connection, by name; one more is answered 403 (spec/upstream.md B5).
pub(crate) const TOKENS_MAX: usize = 999;

/// The idle time-out that AMQP clients are told (spec/upstream.md B5).
pub(crate) const IDLE_ADVERTISED: Duration = Duration::from_secs(240);

/// Answers that wait for the credit of one AMQP link; one more detaches the link.
pub(crate) const ANSWERS_MAX: usize = 2_000;

/// Credit of a link that a client sends on.
pub(crate) const LINK_CREDIT: u32 = 1_000;

/// Largest AMQP message that a link announces. A batch is one message here.
pub(crate) const AMQP_MESSAGE_BYTES_MAX: u64 = 1024 * 1024;

/// Ledger lines that an event hub reader takes at a time.
pub(crate) const EVENTS_READ_BYTES: u64 = 256 * 1024;

/// Pause before a step of a C2D queue that could not be written is tried again.
pub(crate) const C2D_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Bytes that wait for a client that does not read; above this the connection ends.
pub(crate) const OUTBOX_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Longest topic that MQTT can carry.
pub(crate) const TOPIC_BYTES_MAX: usize = 65_535;

/// Outdated bytes of the journal, beyond as many as there are live ones, before it is compacted.
pub(crate) const JOURNAL_SLACK_BYTES: u64 = 4 * 1024 * 1024;
