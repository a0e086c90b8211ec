//! MQTT packets as bytes, well-formed and not. The codec is not the hub's.

use bytes::BytesMut;
use mqttbytes::v4::{PingReq, PubAck, Publish, Subscribe, SubscribeFilter, Unsubscribe};
use mqttbytes::{Error, QoS};

/// The bytes of a PUBLISH; the packet id does not matter at QoS 0.
#[must_use]
pub fn publish(topic: &str, qos: QoS, packet_id: u16, body: &[u8]) -> Vec<u8> {
    let mut publish = Publish::new(topic, qos, body);
    publish.pkid = packet_id;
    encoded(|bytes| publish.write(bytes))
}

/// The bytes of a SUBSCRIBE with one filter.
#[must_use]
pub fn subscribe(packet_id: u16, filter: &str) -> Vec<u8> {
    subscribe_all(packet_id, &[(filter, 1)])
}

/// The bytes of a SUBSCRIBE with filters and the QoS that each wishes for.
#[must_use]
pub fn subscribe_all(packet_id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    let filters = filters.iter().map(|(filter, qos)| {
        let qos = mqttbytes::qos(*qos).expect("QoS 0 to 2");
        SubscribeFilter::new((*filter).to_owned(), qos)
    });
    let mut subscribe = Subscribe::new_many(filters);
    subscribe.pkid = packet_id;
    encoded(|bytes| subscribe.write(bytes))
}

/// The bytes of an UNSUBSCRIBE.
#[must_use]
pub fn unsubscribe(packet_id: u16, filters: &[&str]) -> Vec<u8> {
    let mut unsubscribe = Unsubscribe::new(String::new());
    unsubscribe.topics = filters.iter().map(|filter| (*filter).to_owned()).collect();
    unsubscribe.pkid = packet_id;
    encoded(|bytes| unsubscribe.write(bytes))
}

/// The bytes of a PUBACK.
#[must_use]
pub fn puback(packet_id: u16) -> Vec<u8> {
    encoded(|bytes| PubAck::new(packet_id).write(bytes))
}

/// Any bytes as a packet: the first byte, the length of the rest, the rest.
#[must_use]
pub fn frame(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let mut length = body.len();
    loop {
        let digit = u8::try_from(length % 128).expect("below 128");
        length /= 128;
        bytes.push(if length == 0 { digit } else { digit | 0x80 });
        if length == 0 {
            break;
        }
    }
    bytes.extend_from_slice(body);
    bytes
}

/// A string or binary field: its length in two bytes, and itself.
#[must_use]
pub fn field(content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).expect("a field has at most 65,535 bytes");
    [&length.to_be_bytes(), content].concat()
}

/// The bytes of a PINGREQ.
#[must_use]
pub fn ping() -> Vec<u8> {
    encoded(|bytes| PingReq.write(bytes))
}

/// The telemetry topic of `device` or `device/module`, up to its property bag.
#[must_use]
pub fn telemetry(id: &str) -> String {
    match id.split_once('/') {
        Some((device, module)) => format!("devices/{device}/modules/{module}/messages/events/"),
        None => format!("devices/{id}/messages/events/"),
    }
}

pub(crate) fn encoded(write: impl FnOnce(&mut BytesMut) -> Result<usize, Error>) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    write(&mut bytes).expect("a packet that can be encoded");
    bytes.to_vec()
}
