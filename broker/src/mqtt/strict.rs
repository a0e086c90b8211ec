//! Checks that MQTT 3.1.1 demands and the packet codec does not make.
//!
//! Everything here looks at bytes that have arrived and allocates nothing. A packet reaches the
//! codec only when it is complete and these checks passed, so that the codec never waits in the
//! middle of one and never sees a header that points beyond it. Facts: spec/mqtt.md 2.1, 9.2,
//! 13.3; MQTT 3.1.1 sections 1.5.3, 2.2, 3.1, 3.3, 4.7.

use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::Publish;

use super::machine::CloseReason;

/// The next packet of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// More bytes are needed.
    Incomplete,
    /// A whole packet is there; its fixed header is legal.
    Complete {
        /// Type and flags.
        first: u8,
        /// Where its body begins.
        body: usize,
        /// Length of its body, bytes.
        length: usize,
    },
}

/// Judges the packet at the beginning of `input` by its fixed header.
pub(super) fn frame(input: &[u8], limit: usize) -> Result<Frame, CloseReason> {
    let Some((&first, rest)) = input.split_first() else {
        return Ok(Frame::Incomplete);
    };
    fixed_flags(first)?;
    let mut length = 0usize;
    let mut digits = 0;
    loop {
        let Some(&byte) = rest.get(digits) else {
            return Ok(Frame::Incomplete);
        };
        length |= usize::from(byte & 0x7f) << (7 * digits);
        digits += 1;
        if byte & 0x80 == 0 {
            break;
        }
        if digits == 4 {
            return Err(CloseReason::Malformed("remaining length"));
        }
    }
    if length > limit {
        return Err(CloseReason::TooLarge);
    }
    let body = 1 + digits;
    if input.len() < body + length {
        return Ok(Frame::Incomplete);
    }
    Ok(Frame::Complete {
        first,
        body,
        length,
    })
}

/// Flags of the fixed header (MQTT-2.2.2-2), and types that do not exist.
fn fixed_flags(first: u8) -> Result<(), CloseReason> {
    let flags = first & 0x0f;
    let legal = match first >> 4 {
        // PUBLISH: QoS 3 is malformed (MQTT-3.3.1-4), DUP with QoS 0 too (MQTT-3.3.1-2).
        3 => match (flags >> 1) & 3 {
            0 => flags & 8 == 0,
            1 | 2 => true,
            _ => false,
        },
        6 | 8 | 10 => flags == 2,
        0 | 15 => return Err(CloseReason::Malformed("packet type")),
        _ => flags == 0,
    };
    if legal {
        Ok(())
    } else {
        Err(CloseReason::Malformed("fixed header flags"))
    }
}

/// What the first packet turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstPacket {
    Incomplete,
    /// A CONNECT whose flags and layout are legal.
    Connect,
    /// Name `MQTT`, level other than 4: CONNACK 1.
    Level,
    /// An empty client id: CONNACK 2.
    EmptyClientId,
}

/// Judges the first packet of a connection (MQTT-3.1.0-1, 3.1.2-1 to -3, -11 to -22).
pub(super) fn first_packet(input: &[u8], limit: usize) -> Result<FirstPacket, CloseReason> {
    match input.first() {
        None => return Ok(FirstPacket::Incomplete),
        // Decided by the first byte: nothing more is gathered for a stranger.
        Some(first) if first >> 4 != 1 => return Err(CloseReason::FirstPacket),
        Some(_) => {}
    }
    let Frame::Complete { body, length, .. } = frame(input, limit)? else {
        return Ok(FirstPacket::Incomplete);
    };
    let mut fields = Fields(input.get(body..body + length).unwrap_or_default());
    if fields.text()? != "MQTT" {
        return Err(CloseReason::Malformed("protocol name"));
    }
    if fields.byte()? != 4 {
        return Ok(FirstPacket::Level);
    }
    let flags = fields.byte()?;
    connect_flags(flags)?;
    fields.bytes(2)?;
    let client_id = fields.text()?;
    let empty = client_id.is_empty();
    if flags & 0x04 != 0 {
        let topic = fields.text()?;
        publish_topic(topic)?;
        fields.sized()?;
    }
    if flags & 0x80 != 0 {
        fields.text()?;
    }
    if flags & 0x40 != 0 {
        fields.sized()?;
    }
    if !fields.0.is_empty() {
        return Err(CloseReason::Malformed("bytes after CONNECT's payload"));
    }
    Ok(if empty {
        FirstPacket::EmptyClientId
    } else {
        FirstPacket::Connect
    })
}

fn connect_flags(flags: u8) -> Result<(), CloseReason> {
    let will = flags & 0x04 != 0;
    let will_qos = (flags >> 3) & 3;
    let will_retain = flags & 0x20 != 0;
    let user = flags & 0x80 != 0;
    let password = flags & 0x40 != 0;
    let legal = flags & 1 == 0
        && will_qos != 3
        && (will || (will_qos == 0 && !will_retain))
        && (user || !password);
    if legal {
        Ok(())
    } else {
        Err(CloseReason::Malformed("CONNECT flags"))
    }
}

/// Judges the header of a complete PUBLISH before the codec sees it: the topic must lie within
/// the packet (the codec computes with both lengths unchecked).
pub(super) fn publish_layout(first: u8, body: &[u8]) -> Result<(), CloseReason> {
    let mut fields = Fields(body);
    fields.sized()?;
    if (first >> 1) & 3 != 0 {
        fields.bytes(2)?;
    }
    Ok(())
}

/// Judges a decoded PUBLISH.
pub(super) fn publish(publish: &Publish) -> Result<(), CloseReason> {
    if publish.qos == QoS::ExactlyOnce {
        return Err(CloseReason::QoS2);
    }
    publish_topic(&publish.topic)
}

fn publish_topic(topic: &str) -> Result<(), CloseReason> {
    if topic.is_empty() {
        return Err(CloseReason::Malformed("empty topic"));
    }
    if topic.bytes().any(|b| matches!(b, b'+' | b'#' | 0)) {
        return Err(CloseReason::Malformed("wildcard or NUL in a topic"));
    }
    Ok(())
}

/// Judges the filters of a SUBSCRIBE or UNSUBSCRIBE and counts them (MQTT-3.8.3-3, 4.7.1).
pub(super) fn filters<'a>(
    filters: impl Iterator<Item = &'a str>,
    limit: usize,
) -> Result<usize, CloseReason> {
    let mut count = 0;
    for filter in filters {
        count += 1;
        let mut levels = filter.split('/').peekable();
        let mut legal = !filter.is_empty() && !filter.contains('\0');
        while let Some(level) = levels.next() {
            legal &= match level {
                "#" => levels.peek().is_none(),
                "+" => true,
                _ => !level.contains(['#', '+']),
            };
        }
        if !legal {
            return Err(CloseReason::Malformed("topic filter"));
        }
    }
    match count {
        0 => Err(CloseReason::Malformed("no topic filter")),
        n if n > limit => Err(CloseReason::Malformed("too many topic filters")),
        n => Ok(n),
    }
}

/// The reserved bits of the option bytes of a complete SUBSCRIBE (MQTT-3-8.3-4): the codec
/// masks them away.
pub(super) fn subscribe_layout(body: &[u8]) -> Result<(), CloseReason> {
    let mut fields = Fields(body);
    fields.bytes(2)?;
    while !fields.0.is_empty() {
        fields.text()?;
        if fields.byte()? > 2 {
            return Err(CloseReason::Malformed("SUBSCRIBE options"));
        }
    }
    Ok(())
}

/// PINGREQ and DISCONNECT have no body.
pub(super) fn no_body(size: u32) -> Result<(), CloseReason> {
    if size == 0 {
        Ok(())
    } else {
        Err(CloseReason::Malformed("bytes in an empty packet"))
    }
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], CloseReason> {
        let (head, tail) = self
            .0
            .split_at_checked(count)
            .ok_or(CloseReason::Malformed("length"))?;
        self.0 = tail;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8, CloseReason> {
        self.bytes(1)?
            .first()
            .copied()
            .ok_or(CloseReason::Malformed("length"))
    }

    fn sized(&mut self) -> Result<&'a [u8], CloseReason> {
        let length = self.bytes(2)?;
        let length = length
            .iter()
            .fold(0usize, |sum, byte| sum << 8 | usize::from(*byte));
        self.bytes(length)
    }

    fn text(&mut self) -> Result<&'a str, CloseReason> {
        let text = std::str::from_utf8(self.sized()?)
            .map_err(|_| CloseReason::Malformed("text is not UTF-8"))?;
        if text.contains('\0') {
            return Err(CloseReason::Malformed("NUL in a text"));
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(flags: u8, rest: &[u8]) -> Vec<u8> {
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, flags, 0, 60];
        body.extend_from_slice(rest);
        let mut packet = vec![0x10, u8::try_from(body.len()).unwrap()];
        packet.extend(body);
        packet
    }

    #[test]
    fn a_stranger_is_refused_by_its_first_byte() {
        assert_eq!(first_packet(&[0x30], 100), Err(CloseReason::FirstPacket));
        assert_eq!(
            first_packet(b"GET / HTTP", 100),
            Err(CloseReason::FirstPacket)
        );
        assert_eq!(first_packet(&[], 100), Ok(FirstPacket::Incomplete));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        let input = [0x10, 0xff, 0xff, 0xff, 0x7f];
        assert_eq!(first_packet(&input, 1000), Err(CloseReason::TooLarge));
        let five = [0x10, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(
            frame(&five, usize::MAX),
            Err(CloseReason::Malformed("remaining length"))
        );
    }

    #[test]
    fn connect_is_judged_field_by_field() {
        let ok = connect(0x02, &[0, 1, b'd']);
        assert_eq!(first_packet(&ok, 100), Ok(FirstPacket::Connect));
        for cut in 0..ok.len() {
            assert_eq!(
                first_packet(&ok[..cut], 100),
                Ok(FirstPacket::Incomplete),
                "{cut}"
            );
        }
        let empty = connect(0x00, &[0, 0]);
        assert_eq!(first_packet(&empty, 100), Ok(FirstPacket::EmptyClientId));
        let mut level5 = ok.clone();
        level5[8] = 5;
        assert_eq!(first_packet(&level5, 100), Ok(FirstPacket::Level));
        let old = [
            0x10, 12, 0, 6, b'M', b'Q', b'I', b's', b'd', b'p', 3, 2, 0, 60,
        ];
        assert_eq!(
            first_packet(&old, 100),
            Err(CloseReason::Malformed("protocol name"))
        );
        // Reserved bit; password without user; will bits without will; will QoS 3.
        for flags in [0x01, 0x40, 0x08, 0x20, 0x1c] {
            let packet = connect(flags, &[0, 1, b'd', 0, 1, b't', 0, 0, 0, 0]);
            let fault = Err(CloseReason::Malformed("CONNECT flags"));
            assert_eq!(first_packet(&packet, 100), fault, "{flags:#x}");
        }
        let trailing = connect(0x02, &[0, 1, b'd', 9]);
        assert!(first_packet(&trailing, 100).is_err());
        let short = connect(0x82, &[0, 1, b'd', 0, 9, b'u']);
        assert_eq!(
            first_packet(&short, 100),
            Err(CloseReason::Malformed("length"))
        );
    }

    #[test]
    fn filters_follow_the_rules_of_wildcards() {
        for good in ["a", "/", "a/+/b", "#", "a/#", "+", "$iothub/twin/res/#"] {
            assert_eq!(filters([good].into_iter(), 5), Ok(1), "{good}");
        }
        for bad in ["", "a+/b", "a#", "#/a", "a/#/b", "+a", "a\0"] {
            assert!(filters([bad].into_iter(), 5).is_err(), "{bad:?}");
        }
        assert!(filters(std::iter::empty(), 5).is_err());
        assert!(filters(["a"; 6].into_iter(), 5).is_err());
    }

    #[test]
    fn flags_of_the_fixed_header_are_checked() {
        for legal in [
            0x10, 0x30, 0x32, 0x3a, 0x33, 0x40, 0x62, 0x82, 0xa2, 0xc0, 0xe0,
        ] {
            assert_eq!(fixed_flags(legal), Ok(()), "{legal:#x}");
        }
        for illegal in [
            0x11, 0x36, 0x38, 0x41, 0x60, 0x80, 0xa0, 0xc1, 0xe2, 0x00, 0xf0,
        ] {
            assert!(fixed_flags(illegal).is_err(), "{illegal:#x}");
        }
    }
}
