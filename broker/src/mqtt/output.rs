//! What a client is to read: packets in the order in which they leave, and how much of it has not
//! gone out yet.

use std::num::NonZeroU16;

use ntex_bytes::{BytePages, ByteString};
use ntex_codec::Encoder;
use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::{Codec, Encoded, Packet, Publish};

use super::limits::OUTPUT_BYTES_MAX;

/// The output of one connection.
#[derive(Debug, Default)]
pub(super) struct Output {
    codec: Codec,
    pages: BytePages,
    /// Bytes that were taken and are not written yet.
    writing: usize,
    acks: u64,
    failed: bool,
}

impl Output {
    /// Adds a packet.
    pub(super) fn packet(&mut self, packet: Packet) {
        if matches!(packet, Packet::PublishAck { .. }) {
            self.acks += 1;
        }
        self.put(Encoded::Packet(packet));
    }

    /// Adds a PUBLISH: at QoS 0, or at QoS 1 with a packet id and DUP. RETAIN is 0 on everything
    /// that the hub sends (MQTT-3.3.1-9).
    pub(super) fn publish(
        &mut self,
        topic: String,
        payload: &[u8],
        acknowledged_by: Option<(NonZeroU16, bool)>,
    ) {
        let (qos, packet_id, dup) = match acknowledged_by {
            Some((packet_id, dup)) => (QoS::AtLeastOnce, Some(packet_id), dup),
            None => (QoS::AtMostOnce, None, false),
        };
        let publish = Publish {
            dup,
            retain: false,
            qos,
            topic: ByteString::from(topic),
            packet_id,
            payload_size: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        };
        // The payload follows as it is: through the codec it would be copied once more.
        self.put(Encoded::Publish(publish, None));
        self.pages.extend_from_slice(payload);
    }

    /// Takes the bytes to write. They count as not read until [`Output::written`] says so.
    pub(super) fn take(&mut self) -> Option<ntex_bytes::Bytes> {
        if self.pages.is_empty() {
            return None;
        }
        self.writing += self.pages.len();
        Some(self.pages.freeze())
    }

    /// So many bytes of what was taken went out.
    pub(super) fn written(&mut self, bytes: usize) {
        self.writing = self.writing.saturating_sub(bytes);
    }

    /// Whether the client has read enough to be sent more.
    pub(super) fn has_room(&self) -> bool {
        self.pages.len() + self.writing < OUTPUT_BYTES_MAX
    }

    /// PUBACKs added since the last call.
    pub(super) fn take_acks(&mut self) -> u64 {
        std::mem::take(&mut self.acks)
    }

    /// Whether something could not be encoded since the last call.
    pub(super) fn take_failed(&mut self) -> bool {
        std::mem::take(&mut self.failed)
    }

    fn put(&mut self, item: Encoded) {
        // Packets of this size and shape cannot fail to encode. A failure would be a bug of the
        // codec; the connection ends then, because the peer would wait in vain.
        if let Err(error) = self.codec.encodev(item, &mut self.pages) {
            tracing::error!("an MQTT packet could not be encoded: {error:?}");
            self.failed = true;
        }
    }
}
