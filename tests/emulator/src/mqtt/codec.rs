//! Packets out of bytes: the crate `mqttbytes`, and the checks of MQTT 3.1.1 that it leaves out.
//!
//! `mqttbytes` reads any flags in a fixed header, and an MQTT 5 CONNECT as if it were 3.1.1; the
//! first bytes are looked at here for that reason.

use bytes::BytesMut;
use mqttbytes::v4::{Connect, Packet};

use crate::limits::PACKET_BYTES_MAX;

/// Why bytes are not MQTT 3.1.1. The connection ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CodecError {
    #[error("a packet has flags that MQTT-2.2.2-2 forbids")]
    Flags,
    #[error("the first packet is no CONNECT")]
    NoConnect,
    #[error("malformed packet: {0:?}")]
    Packet(mqttbytes::Error),
    #[error("protocol level {0} is not 4")]
    Level(u8),
}

/// Takes the next whole packet out of `input`; none when more bytes are needed.
pub(crate) fn next_packet(input: &mut BytesMut) -> Result<Option<Packet>, CodecError> {
    let Some(first) = input.first() else {
        return Ok(None);
    };
    let (kind, flags) = (first >> 4, first & 0b1111);
    let flags_fit = match kind {
        // A first delivery at QoS 0 is no duplicate (MQTT-3.3.1-2). QoS 3 is refused below.
        3 => flags & 0b1110 != 0b1000,
        6 | 8 | 10 => flags == 0b0010,
        _ => flags == 0,
    };
    if !flags_fit {
        return Err(CodecError::Flags);
    }
    match mqttbytes::v4::read(input, PACKET_BYTES_MAX) {
        Ok(packet) => Ok(Some(packet)),
        Err(mqttbytes::Error::InsufficientBytes(_)) => Ok(None),
        Err(error) => Err(CodecError::Packet(error)),
    }
}

/// Takes the CONNECT that has to be the first packet.
pub(crate) fn first_packet(input: &mut BytesMut) -> Result<Option<Connect>, CodecError> {
    if input.first().is_some_and(|first| *first != 0b0001_0000) {
        return Err(CodecError::NoConnect);
    }
    if let Some((level, flags)) = level_and_flags(input) {
        if level != 4 {
            return Err(CodecError::Level(level));
        }
        if flags & 1 != 0 {
            return Err(CodecError::Flags);
        }
    }
    match next_packet(input)? {
        Some(Packet::Connect(connect)) => Ok(Some(connect)),
        Some(_) => Err(CodecError::NoConnect),
        None => Ok(None),
    }
}

/// Protocol level and connect flags of a CONNECT, as soon as they have arrived.
fn level_and_flags(input: &[u8]) -> Option<(u8, u8)> {
    let length_end = 2 + input
        .iter()
        .skip(1)
        .take(4)
        .position(|byte| byte & 0x80 == 0)?;
    let name_length = input.get(length_end..length_end + 2)?;
    let name_length = name_length
        .iter()
        .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let after_name = length_end + 2 + name_length;
    Some((*input.get(after_name)?, *input.get(after_name + 1)?))
}

#[cfg(test)]
mod tests {
    use mqttbytes::QoS;
    use mqttbytes::v4::{PubAck, Publish, Subscribe};

    use super::*;

    fn connect(level: u8) -> BytesMut {
        let mut bytes = BytesMut::new();
        Connect::new("leaf1").write(&mut bytes).unwrap();
        bytes[8] = level;
        bytes
    }

    #[test]
    fn pieces_are_put_together() {
        let mut all = BytesMut::new();
        let mut publish = Publish::new("t", QoS::AtLeastOnce, vec![7; 300]);
        publish.pkid = 1;
        publish.write(&mut all).unwrap();
        PubAck::new(9).write(&mut all).unwrap();
        let mut input = BytesMut::new();
        let mut packets = Vec::new();
        for byte in all {
            input.extend_from_slice(&[byte]);
            packets.extend(next_packet(&mut input).unwrap());
        }
        assert_eq!(
            packets,
            [Packet::Publish(publish), Packet::PubAck(PubAck::new(9))]
        );
    }

    #[test]
    fn other_protocol_levels_are_named() {
        assert!(first_packet(&mut connect(4)).unwrap().is_some());
        for level in [3, 5] {
            assert_eq!(
                first_packet(&mut connect(level)),
                Err(CodecError::Level(level))
            );
        }
        assert_eq!(
            first_packet(&mut BytesMut::from(&[0xc0_u8, 0][..])),
            Err(CodecError::NoConnect)
        );
        let mut reserved = connect(4);
        reserved[9] |= 1;
        assert_eq!(first_packet(&mut reserved), Err(CodecError::Flags));
    }

    #[test]
    fn wrong_flags_and_sizes_are_refused() {
        let mut subscribe = BytesMut::new();
        Subscribe::new("#", QoS::AtMostOnce)
            .write(&mut subscribe)
            .unwrap();
        subscribe[0] = 0x80;
        assert_eq!(next_packet(&mut subscribe), Err(CodecError::Flags));
        for bytes in [&[0x38_u8, 4, 0, 1, b't', 0][..], &[0xc1, 0]] {
            assert_eq!(
                next_packet(&mut BytesMut::from(bytes)),
                Err(CodecError::Flags)
            );
        }
        let huge = [0x30_u8, 0xff, 0xff, 0xff, 0x7f];
        assert!(matches!(
            next_packet(&mut BytesMut::from(&huge[..])),
            Err(CodecError::Packet(_))
        ));
    }
}
