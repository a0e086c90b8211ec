//! Limits that several crates share.

/// Longest device or module id, characters (IoT Hub).
pub const ID_LENGTH_MAX: usize = 128;

/// Elements of an auth chain: five edge devices, a leaf and a module fit well.
pub const MAX_AUTH_CHAIN_ELEMENTS: usize = 16;

/// Characters of a SAS token.
pub const SAS_LENGTH_MAX: usize = 4096;

/// Characters of an MQTT user name.
pub const USER_NAME_LENGTH_MAX: usize = 8192;

/// Bytes of an MQTT topic (MQTT-1.5.3: a two-byte length). A bag that was written longer cannot be
/// sent over MQTT; who sends it drops it by name.
pub const MQTT_TOPIC_BYTES_MAX: usize = 65_535;

/// Bytes of a request id (`$rid`), which the hub copies into the topic of its answer. SDKs write
/// a GUID.
pub const REQUEST_ID_BYTES_MAX: usize = 1_024;

/// Properties of one message; the 256 KiB limit of the message holds beside it.
pub const PROPERTIES_MAX: usize = 16_384;

/// Bytes of a request or answer of the scope API.
pub const SCOPE_BODY_BYTES_MAX: usize = 16 * 1024 * 1024;
