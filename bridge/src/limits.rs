//! Named limits of the bridge: everything that a peer or a backlog could fill has its bound here.
//!
//! Values that an operator or a test may want to move are defaults of a configuration field; the
//! field's documentation names the constant.

/// Largest MQTT packet in either direction, in bytes after the fixed header: the largest message
/// (256 KiB) and the longest topic (64 KiB) fit with room to spare.
pub const MQTT_PACKET_BYTES_MAX: usize = 384 * 1024;

/// Publishes in flight per lane.
pub const WINDOW_DEFAULT: usize = 64;

/// Output buffers larger than this are given back once they have been written.
pub const OUTPUT_KEEP_BYTES: usize = 64 * 1024;

/// Bytes read from an MQTT connection at once. What comes is mostly PUBACKs of four bytes.
pub const READ_CHUNK_BYTES: usize = 4 * 1024;

/// Messages waiting in one lane.
pub const LANE_ENTRIES_MAX: usize = 512;

/// Bytes waiting and in flight in one lane.
pub const LANE_BYTES_MAX: usize = 1024 * 1024;

/// Bytes waiting and in flight in all lanes together.
pub const LANES_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Lanes in memory, each some hundred bytes beside its messages.
pub const LANES_MAX: usize = 16_384;

/// Open and opening upstream connections.
pub const CONNECTIONS_MAX: usize = 1024;

/// New upstream connections per second in the long run: half of what one unit of IoT Hub admits.
pub const CONNECTS_PER_SECOND: f64 = 50.0;

/// New upstream connections at once.
pub const CONNECTS_BURST: u32 = 50;

/// Entries per read from a queue.
pub const READ_ENTRIES: usize = 512;

/// Bytes per read from a queue.
pub const READ_BYTES: usize = 1024 * 1024;

/// Entries looked at per read from a queue.
pub const READ_SCAN: usize = 16 * 1024;

/// Messages that were settled but whose settling the store has not confirmed.
pub const UNCONFIRMED_MAX: usize = 65_536;

/// A head message that ended this many sessions in a row is sent alone, without its followers.
pub const SUSPECT_ALONE_AFTER: u32 = 3;

/// A head message that ended this many sessions in a row is reported.
pub const SUSPECT_REPORT_AFTER: u32 = 10;

/// While the link is down, reading stops once this many lanes want to connect: they are probes
/// enough, and what lies behind them is read when one of them gets through.
pub const PROBE_LANES: usize = 8;

/// Bytes that a lane without an open connection holds, so that the connection starts with work.
pub const PREFETCH_BYTES: usize = 64 * 1024;

/// Body of an answer of the scope API.
pub const HTTP_BODY_BYTES_MAX: usize = edgehub_proto::limits::SCOPE_BODY_BYTES_MAX;

/// Connections to the scope API that are kept without a request under way.
pub const HTTP_IDLE_MAX: usize = 8;

/// Requests of a walk that are under way at once.
pub const SCOPE_PARALLEL_MAX: usize = 8;

/// Pages of one edge device's scope.
pub const SCOPE_PAGES_MAX: usize = 1000;

/// Identities that a walk left in doubt and that are asked about one by one.
pub const SCOPE_DOUBTFUL_MAX: usize = 100;

/// Identities whose last refresh is remembered.
pub const REFRESH_MEMORY_MAX: usize = 4096;

/// Refreshes of single identities that are under way at once.
pub const REFRESH_PARALLEL_MAX: usize = 64;

/// Refreshes of single identities per second in the long run ...
pub const REFRESH_PER_SECOND: f64 = 10.0;

/// ... and at once.
pub const REFRESH_BURST: u32 = 50;

/// Events of sessions that wait for the pump. A session that finds no room waits, which slows it
/// down.
pub const SESSION_EVENTS_MAX: usize = 1024;

/// Reads that memory answers at once within one turn of the pump.
pub const READS_PER_TURN: usize = 16;

/// While the link is down, attempts to connect per second in the long run. They find its return at
/// once and leave the rate of connects to the lanes that follow.
pub const PROBES_PER_SECOND: f64 = 10.0;

/// While the link is down, attempts to connect at once.
pub const PROBES_BURST: u32 = 8;

/// Twin requests of one identity that wait to be sent or answered.
pub const LANE_REQUESTS_MAX: usize = 16;

/// Twin requests of all identities that wait to be sent or answered, and those on their way to the
/// pump.
pub const REQUESTS_MAX: usize = 2048;

/// Direct methods of one session that wait for their answer. Further ones are answered with 429.
pub const METHOD_CALLS_MAX: usize = 64;

/// Cloud-to-device messages of one session that were handed down and not settled.
pub const CLOUD_TO_DEVICE_FORWARDED_MAX: usize = 16;

/// Publishes of one session that were not acknowledged, beyond those that were handed down. With
/// more the session ends, and the upstream keeps them.
pub const ARRIVALS_HELD_MAX: usize = 64;

/// Bytes of the messages among these.
pub const ARRIVALS_HELD_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of answers and acknowledgements that the upstream has not read: the largest answers to all
/// [`METHOD_CALLS_MAX`] calls. With more the session ends.
pub const ANSWERS_BYTES_MAX: usize = 9 * 1024 * 1024;

/// Identities of one AMQP connection: IoT Hub admits 999 tokens (spec/upstream.md A3).
pub const AMQP_IDENTITIES_MAX: usize = 900;

/// Sessions over AMQP, opening ones included: that many share ten connections.
pub const AMQP_SESSIONS_MAX: usize = 9_000;

/// Messages in flight per lane over AMQP, where several of them are one delivery.
pub const AMQP_WINDOW_DEFAULT: usize = 256;

/// Messages of one batch.
pub const AMQP_BATCH_MESSAGES_MAX: usize = 64;

/// Bytes of one batch: what IoT Hub takes.
pub const AMQP_BATCH_BYTES_MAX: usize = 262_144;

/// Bytes of one encoded message that is sent alone. A larger one is dropped as too large.
pub const AMQP_SINGLE_BYTES_MAX: usize = 1_048_576;

/// Batches of one identity that are unsettled.
pub const AMQP_BATCHES_MAX: usize = 8;

/// Largest AMQP frame in either direction, bytes.
pub const AMQP_FRAME_BYTES_MAX: u32 = 65_536;

/// Highest channel that the upstream may use.
pub const AMQP_CHANNEL_MAX: u16 = 8_191;

/// Highest handle that the upstream may use in a session.
pub const AMQP_HANDLE_MAX: u32 = 255;

/// Transfers that the upstream may send in a session before it hears of us.
pub const AMQP_INCOMING_WINDOW: u32 = 2_048;

/// Largest delivery from upstream, bytes.
pub const AMQP_DELIVERY_BYTES_MAX: u64 = 1_048_576;

/// Bytes of output that the upstream has not taken. Beyond it no deliveries are added.
pub const AMQP_OUTPUT_BYTES_MAX: usize = 524_288;

/// Cloud-to-device messages of one identity that the upstream may have under way to us.
pub const AMQP_CLOUD_TO_DEVICE_CREDIT: u32 = 50;

/// Direct methods and twin answers of one identity that the upstream may have under way to us.
pub const AMQP_REPLY_CREDIT: u32 = 50;

/// Put-tokens of one connection that are not answered.
pub const AMQP_TOKENS_UNDER_WAY_MAX: usize = 50;

/// Answers to them that the upstream may send: more than there are questions, because credit is
/// renewed when half of it is used.
pub const AMQP_TOKEN_ANSWERS_CREDIT: u32 = 100;

/// What sessions tell one AMQP connection and it has not taken. Who finds no room waits.
pub const AMQP_INPUTS_MAX: usize = 1_024;

/// Bytes of methods' answers of one identity that the upstream gives no credit for. Further answers
/// are dropped: their callers' time runs out.
pub const AMQP_ANSWERS_BYTES_MAX: usize = 1_048_576;

/// Bytes of cloud-to-device messages of one identity that are with us. Further ones are released.
pub const AMQP_CLOUD_TO_DEVICE_BYTES_MAX: usize = 4_194_304;

/// Bytes read from an AMQP connection at once.
pub const AMQP_READ_CHUNK_BYTES: usize = 16 * 1024;

/// Attempts to connect that one AMQP connection has under way at once.
pub const AMQP_DIALS_MAX: usize = 4;
