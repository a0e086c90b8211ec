//! Packet ids of deliveries on their way to the client.
//!
//! The id of a delivery is computed from its [`DeliveryToken`], which stays the same until it is
//! settled. So a redelivery has the id of the first attempt (MQTT-4.4.0-1) after a reconnect and
//! after a restart of the hub, and nothing has to be stored for that:
//!
//! | Stream | Packet ids |
//! |---|---|
//! | input slot `s`, 0 to 14 | `1 + s * 4096 + number % 4096` |
//! | cloud-to-device | `61441 + number % 4095` |
//!
//! Two tokens can have one id: numbers that lie 4,096 apart while the older one is still not
//! acknowledged, or queues that share the last slot. Then the later delivery waits
//! (MQTT-2.3.1-4). That is rare: a queue's window is a handful.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU16;

use super::limits::{CLIENT_PACKET_BYTES_MAX, OUTSTANDING_MAX};
use crate::hub::{C2D_STREAM, DeliveryToken};

/// Packet ids of one input slot.
const IDS_PER_SLOT: u64 = 4_096;
/// First packet id of cloud-to-device messages: the input slots have those below.
const C2D_FIRST: u64 = 1 + C2D_STREAM as u64 * IDS_PER_SLOT;
/// Packet ids of cloud-to-device messages: what is left.
const C2D_IDS: u64 = u16::MAX as u64 + 1 - C2D_FIRST;

/// The packet id of a delivery.
pub(super) fn packet_id(token: DeliveryToken) -> NonZeroU16 {
    let id = if token.stream < C2D_STREAM {
        1 + u64::from(token.stream) * IDS_PER_SLOT + token.number % IDS_PER_SLOT
    } else {
        C2D_FIRST + token.number % C2D_IDS
    };
    // Both ranges lie within 1 to 65,535.
    u16::try_from(id)
        .ok()
        .and_then(NonZeroU16::new)
        .unwrap_or(NonZeroU16::MIN)
}

/// Whether a PUBLISH of QoS 1 with this topic and payload is one that a client takes
/// ([`CLIENT_PACKET_BYTES_MAX`]; QoS 0 is two bytes shorter, which is not worth a second limit).
pub(super) fn fits(topic: &str, payload: &[u8]) -> bool {
    // Five bytes of fixed header, two of the topic's length, two of the packet id.
    const HEADER: usize = 9;
    topic.len() <= usize::from(u16::MAX)
        && HEADER + topic.len() + payload.len() <= CLIENT_PACKET_BYTES_MAX
}

/// Whether a delivery can be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// With this packet id, which is now taken.
    Taken(NonZeroU16),
    /// Not before another one is acknowledged.
    Busy,
    /// It is on its way already.
    Repeated,
}

/// Deliveries that were sent and are not acknowledged.
#[derive(Debug, Default)]
pub(super) struct Outstanding {
    tokens: HashMap<NonZeroU16, DeliveryToken>,
}

impl Outstanding {
    /// Takes a packet id for a delivery.
    pub(super) fn take(&mut self, token: DeliveryToken) -> Place {
        let full = self.tokens.len() >= OUTSTANDING_MAX;
        let id = packet_id(token);
        match self.tokens.entry(id) {
            Entry::Occupied(entry) if *entry.get() == token => Place::Repeated,
            Entry::Occupied(_) => Place::Busy,
            Entry::Vacant(_) if full => Place::Busy,
            Entry::Vacant(entry) => {
                entry.insert(token);
                Place::Taken(id)
            }
        }
    }

    /// The client acknowledged a packet id; none when no delivery has it.
    pub(super) fn acknowledged(&mut self, id: NonZeroU16) -> Option<DeliveryToken> {
        self.tokens.remove(&id)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hub::INPUT_SLOTS_MAX;

    fn token(stream: u16, number: u64) -> DeliveryToken {
        DeliveryToken { stream, number }
    }

    fn id(stream: u16, number: u64) -> u16 {
        packet_id(token(stream, number)).get()
    }

    #[test]
    fn ids_are_those_of_the_table() {
        assert_eq!((id(0, 0), id(0, 4_095), id(0, 4_096)), (1, 4_096, 1));
        assert_eq!(
            (id(1, 0), id(14, 0), id(14, 4_095)),
            (4_097, 57_345, 61_440)
        );
        assert_eq!((id(C2D_STREAM, 0), id(C2D_STREAM, 4_094)), (61_441, 65_535));
        assert_eq!(id(C2D_STREAM, 4_095), 61_441);
        assert_eq!(INPUT_SLOTS_MAX, C2D_STREAM);
    }

    #[test]
    fn an_id_in_use_waits_for_its_acknowledgement() {
        let mut outstanding = Outstanding::default();
        let (old, new) = (token(2, 5), token(2, 5 + 4_096));
        let place = outstanding.take(old);
        let Place::Taken(id) = place else {
            panic!("{place:?}")
        };
        assert_eq!(outstanding.take(old), Place::Repeated);
        assert_eq!(outstanding.take(new), Place::Busy);
        assert_eq!(outstanding.acknowledged(id), Some(old));
        assert_eq!(outstanding.acknowledged(id), None, "only once");
        assert_eq!(outstanding.take(new), Place::Taken(id));
        assert_eq!(outstanding.len(), 1);
    }

    #[test]
    fn the_number_of_outstanding_deliveries_is_bounded() {
        let mut outstanding = Outstanding::default();
        for number in 0..OUTSTANDING_MAX as u64 {
            let token = token(u16::try_from(number % 15).unwrap(), number);
            assert!(matches!(outstanding.take(token), Place::Taken(_)));
        }
        assert_eq!(outstanding.take(token(C2D_STREAM, 0)), Place::Busy);
        assert!(outstanding.acknowledged(packet_id(token(0, 0))).is_some());
        assert!(matches!(
            outstanding.take(token(C2D_STREAM, 0)),
            Place::Taken(_)
        ));
    }

    #[test]
    fn the_largest_packet_fits_and_no_larger_one() {
        let topic = "t".repeat(100);
        let payload = vec![0; CLIENT_PACKET_BYTES_MAX - 109];
        assert!(fits(&topic, &payload));
        assert!(!fits(&"t".repeat(101), &payload));
        assert!(fits(&"t".repeat(65_535), &[]));
        assert!(!fits(&"t".repeat(65_536), &[]));
    }

    proptest! {
        #[test]
        fn streams_never_share_an_id(
            streams in (0..=C2D_STREAM, 0..=C2D_STREAM),
            numbers in any::<(u64, u64)>(),
        ) {
            let (one, other) = (id(streams.0, numbers.0), id(streams.1, numbers.1));
            prop_assert!(one != 0 && other != 0);
            if streams.0 != streams.1 {
                prop_assert_ne!(one, other);
            }
        }

        #[test]
        fn neighbours_in_a_queue_never_share_an_id(
            stream in 0..=C2D_STREAM, number in 0..u64::MAX - 4_095, distance in 1u64..4_095,
        ) {
            prop_assert_ne!(id(stream, number), id(stream, number + distance));
        }
    }
}
