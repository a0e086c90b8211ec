//! Looks at the head of an MQTT packet before the codec sees it.
//!
//! The codec trusts two lengths that a peer chooses (a PUBLISH's topic against the packet, and a
//! buffer that it reserves for a packet that has not come); both are judged here first, and only
//! whole packets go on.

/// Why the bytes cannot be a packet that is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    /// The remaining length is written with more than four bytes (MQTT-2.2.3).
    #[error("the remaining length has more than four bytes")]
    LengthTooLong,
    /// A topic or packet id reaches beyond its packet.
    #[error("the topic reaches beyond the packet")]
    TopicBeyondPacket,
    /// The packet is over the limit.
    #[error("a packet of {bytes} bytes is over the limit")]
    TooLarge {
        /// Announced remaining length.
        bytes: usize,
    },
}

/// Whether `input` starts with one whole packet of at most `max` bytes after the fixed header.
pub(super) fn check(input: &[u8], max: usize) -> Result<bool, FrameError> {
    let Some((first, rest)) = input.split_first() else {
        return Ok(false);
    };
    let Some((length, body)) = remaining_length(rest)? else {
        return Ok(false);
    };
    if length > max {
        return Err(FrameError::TooLarge { bytes: length });
    }
    let is_publish = first >> 4 == 3;
    if is_publish && length < publish_header_min(*first) {
        return Err(FrameError::TopicBeyondPacket);
    }
    let Some(packet) = body.get(..length) else {
        return Ok(false);
    };
    if is_publish && let Some((topic_length, _)) = packet.split_first_chunk::<2>() {
        let topic_length = usize::from(u16::from_be_bytes(*topic_length));
        if topic_length + publish_header_min(*first) > length {
            return Err(FrameError::TopicBeyondPacket);
        }
    }
    Ok(true)
}

/// Topic length and, above QoS 0, packet id.
fn publish_header_min(first_byte: u8) -> usize {
    if first_byte & 0b0110 == 0 { 2 } else { 4 }
}

/// The variable-length integer at the start of `bytes` and what follows; none when incomplete.
fn remaining_length(bytes: &[u8]) -> Result<Option<(usize, &[u8])>, FrameError> {
    let mut length = 0;
    let mut rest = bytes;
    for shift in [0, 7, 14, 21] {
        let Some((byte, after)) = rest.split_first() else {
            return Ok(None);
        };
        length |= usize::from(byte & 0x7f) << shift;
        rest = after;
        if byte & 0x80 == 0 {
            return Ok(Some((length, rest)));
        }
    }
    Err(FrameError::LengthTooLong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_and_partial_packets() {
        for (input, expected) in [
            (&[][..], Ok(false)),
            (&[0xd0], Ok(false)),
            (&[0xd0, 0], Ok(true)),
            (&[0x40, 2, 0], Ok(false)),
            (&[0x40, 2, 0, 1], Ok(true)),
            (&[0x40, 2, 0, 1, 0x40], Ok(true)),
            (&[0x30, 0x80], Ok(false)),
            (
                &[0x30, 0x80, 0x80, 0x80, 0x80],
                Err(FrameError::LengthTooLong),
            ),
            (&[0x40, 100], Ok(false)),
            (&[0x40, 101], Err(FrameError::TooLarge { bytes: 101 })),
            // PUBLISH: topic longer than the packet, exactly fitting, packet id cut off.
            (&[0x30, 1], Err(FrameError::TopicBeyondPacket)),
            (&[0x30, 3, 0, 2, b'a'], Err(FrameError::TopicBeyondPacket)),
            (&[0x30, 4, 0, 2, b'a', b'b'], Ok(true)),
            (
                &[0x32, 4, 0, 2, b'a', b'b'],
                Err(FrameError::TopicBeyondPacket),
            ),
            (&[0x32, 6, 0, 2, b'a', b'b', 0, 1], Ok(true)),
        ] {
            assert_eq!(check(input, 100), expected, "{input:?}");
        }
    }
}
