//! The frame header: eight bytes before each frame's extended header and body.
//!
//! ```text
//!   4 bytes            1 byte   1 byte   2 bytes
//! +------------------+--------+--------+-------------------+----------+------+
//! | size, whole frame| doff   | type   | channel (AMQP)    | extended | body |
//! +------------------+--------+--------+-------------------+----------+------+
//! |<----------------- doff x 4 bytes --------------------------------->|
//! ```
//!
//! An extended header is skipped, whatever it holds; the last two bytes of a SASL frame's header
//! mean nothing (OASIS AMQP 1.0 part 2 section 2.3, part 5 section 5.3.1). The performative in
//! the body is not looked at here. Every [`FrameError`] of a peer ends the connection with
//! [`FRAMING_ERROR`], a channel above `channel-max` too (part 2, 2.7.1).

/// Length of a frame header, bytes.
pub const FRAME_HEADER_BYTES: usize = 8;

/// Condition with which a connection is closed whose peer breaks the framing.
pub const FRAMING_ERROR: &str = "amqp:connection:framing-error";

/// Smallest data offset, words of four bytes: the header itself.
const DOFF_MIN: u8 = 2;

const TYPE_AMQP: u8 = 0;
const TYPE_SASL: u8 = 1;

/// What a peer may send at this moment of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// Largest whole frame, bytes. Bounds what is buffered for one peer.
    pub frame_bytes_max: u32,
    /// Highest channel.
    pub channel_max: u16,
}

/// What kind of frame it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameType {
    /// An AMQP frame.
    Amqp {
        /// The sender's number of the session.
        channel: u16,
    },
    /// A SASL frame; it has no channel.
    Sasl,
}

impl FrameType {
    fn bytes(self) -> (u8, u16) {
        match self {
            Self::Amqp { channel } => (TYPE_AMQP, channel),
            Self::Sasl => (TYPE_SASL, 0),
        }
    }
}

/// A checked frame header: `doff` is at least 2 and lies within `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameHeader {
    size: u32,
    doff: u8,
    frame_type: FrameType,
}

/// Why bytes are no frame that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Smaller than a frame header.
    #[error("a frame of {size} bytes is smaller than its header")]
    TooSmall {
        /// The size that was announced.
        size: u32,
    },
    /// Larger than agreed.
    #[error("a frame of {size} bytes is larger than {limit}")]
    TooLarge {
        /// The size that was announced, or would have to be.
        size: u64,
        /// The limit.
        limit: u32,
    },
    /// The data offset points into the frame header or behind the frame.
    #[error("the data offset {doff} does not fit a frame of {size} bytes")]
    DataOffset {
        /// The offset, words of four bytes.
        doff: u8,
        /// The size that was announced.
        size: u32,
    },
    /// Neither AMQP nor SASL.
    #[error("the frame type {frame_type} is unknown")]
    UnknownType {
        /// The byte.
        frame_type: u8,
    },
    /// A channel above what was agreed.
    #[error("channel {channel} is above {limit}")]
    Channel {
        /// The channel.
        channel: u16,
        /// The limit.
        limit: u16,
    },
}

impl FrameHeader {
    /// The header of a frame with a body of `body_bytes` and no extended header.
    ///
    /// # Errors
    /// When the frame or its channel would be beyond what the peer takes.
    pub fn new(
        frame_type: FrameType,
        body_bytes: usize,
        limits: FrameLimits,
    ) -> Result<Self, FrameError> {
        let size = (FRAME_HEADER_BYTES as u64).saturating_add(body_bytes as u64);
        let limit = limits.frame_bytes_max;
        let fitting = u32::try_from(size).ok().filter(|size| *size <= limit);
        let size = fitting.ok_or(FrameError::TooLarge { size, limit })?;
        check_channel(frame_type, limits)?;
        Ok(Self {
            size,
            doff: DOFF_MIN,
            frame_type,
        })
    }

    /// Reads the header at the beginning of `input`. `None` when more bytes are needed. A size
    /// is judged as soon as its four bytes are there: nothing is buffered for a frame that will
    /// not be taken.
    ///
    /// # Errors
    /// When such a frame is not taken.
    pub fn decode(input: &[u8], limits: FrameLimits) -> Result<Option<Self>, FrameError> {
        let Some(size) = input.first_chunk::<4>() else {
            return Ok(None);
        };
        let size = u32::from_be_bytes(*size);
        if size < FRAME_HEADER_BYTES as u32 {
            return Err(FrameError::TooSmall { size });
        }
        let limit = limits.frame_bytes_max;
        if size > limit {
            return Err(FrameError::TooLarge {
                size: size.into(),
                limit,
            });
        }
        let Some(&[_, _, _, _, doff, frame_type, high, low]) =
            input.first_chunk::<FRAME_HEADER_BYTES>()
        else {
            return Ok(None);
        };
        if doff < DOFF_MIN || u32::from(doff) * 4 > size {
            return Err(FrameError::DataOffset { doff, size });
        }
        let frame_type = match frame_type {
            TYPE_AMQP => FrameType::Amqp {
                channel: u16::from_be_bytes([high, low]),
            },
            TYPE_SASL => FrameType::Sasl,
            _ => return Err(FrameError::UnknownType { frame_type }),
        };
        check_channel(frame_type, limits)?;
        Ok(Some(Self {
            size,
            doff,
            frame_type,
        }))
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; FRAME_HEADER_BYTES] {
        let [a, b, c, d] = self.size.to_be_bytes();
        let (frame_type, channel) = self.frame_type.bytes();
        let [high, low] = channel.to_be_bytes();
        [a, b, c, d, self.doff, frame_type, high, low]
    }

    /// Length of the whole frame, this header included, bytes.
    #[must_use]
    pub fn size(self) -> u32 {
        self.size
    }

    /// Where the body begins, bytes from the frame's first.
    #[must_use]
    pub fn body_offset(self) -> u32 {
        u32::from(self.doff) * 4
    }

    /// Length of the body, bytes. An AMQP frame without one is a heartbeat.
    #[must_use]
    pub fn body_bytes(self) -> u32 {
        self.size.saturating_sub(self.body_offset())
    }

    /// What kind of frame it is.
    #[must_use]
    pub fn frame_type(self) -> FrameType {
        self.frame_type
    }

    /// Whether the frame says nothing but that its sender is alive (part 2, 2.4.5).
    #[must_use]
    pub fn is_heartbeat(self) -> bool {
        matches!(self.frame_type, FrameType::Amqp { .. }) && self.body_bytes() == 0
    }
}

fn check_channel(frame_type: FrameType, limits: FrameLimits) -> Result<(), FrameError> {
    match frame_type {
        FrameType::Amqp { channel } if channel > limits.channel_max => Err(FrameError::Channel {
            channel,
            limit: limits.channel_max,
        }),
        FrameType::Amqp { .. } | FrameType::Sasl => Ok(()),
    }
}

/// A whole frame within the bytes that were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header; [`FrameHeader::size`] bytes of the input are used up.
    pub header: FrameHeader,
    /// Its body, without the extended header.
    pub body: &'a [u8],
}

/// Takes the first whole frame of `input`. `None` when more bytes are needed.
///
/// # Errors
/// When such a frame is not taken.
pub fn first_frame(input: &[u8], limits: FrameLimits) -> Result<Option<Frame<'_>>, FrameError> {
    let Some(header) = FrameHeader::decode(input, limits)? else {
        return Ok(None);
    };
    let range = header.body_offset() as usize..header.size() as usize;
    Ok(input.get(range).map(|body| Frame { header, body }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::{CHANNEL_MAX, FRAME_BYTES_MAX, MIN_MAX_FRAME_BYTES};

    const LIMITS: FrameLimits = FrameLimits {
        frame_bytes_max: FRAME_BYTES_MAX,
        channel_max: CHANNEL_MAX,
    };
    const OPEN: FrameLimits = FrameLimits {
        frame_bytes_max: u32::MAX,
        channel_max: u16::MAX,
    };

    fn frame_type() -> impl Strategy<Value = FrameType> {
        prop_oneof![
            (0..=CHANNEL_MAX).prop_map(|channel| FrameType::Amqp { channel }),
            Just(FrameType::Sasl)
        ]
    }

    #[test]
    fn a_heartbeat_is_eight_bytes() {
        let header = FrameHeader::new(FrameType::Amqp { channel: 0 }, 0, LIMITS).unwrap();
        assert_eq!(header.encode(), [0, 0, 0, 8, 2, 0, 0, 0]);
        assert!(header.is_heartbeat());
        assert!(
            !FrameHeader::new(FrameType::Sasl, 0, LIMITS)
                .unwrap()
                .is_heartbeat()
        );
        let full = FrameHeader::new(FrameType::Amqp { channel: 0 }, 1, LIMITS).unwrap();
        assert!(!full.is_heartbeat());
        // An extended header is no body.
        let extended = FrameHeader::decode(&[0, 0, 0, 12, 3, 0, 0, 0], LIMITS)
            .unwrap()
            .unwrap();
        assert!(extended.is_heartbeat());
    }

    #[test]
    fn what_breaks_the_framing_is_named() {
        let decode = |bytes: &[u8]| FrameHeader::decode(bytes, LIMITS);
        for size in [0, 1, 7] {
            assert_eq!(
                decode(&[0, 0, 0, size]),
                Err(FrameError::TooSmall { size: size.into() })
            );
        }
        let limit = FRAME_BYTES_MAX;
        assert_eq!(
            decode(&[0xff; 4]),
            Err(FrameError::TooLarge {
                size: u32::MAX.into(),
                limit
            }),
            "before the rest of the header has arrived"
        );
        assert_eq!(
            decode(&[0, 1, 0, 1]),
            Err(FrameError::TooLarge {
                size: 65_537,
                limit
            })
        );
        assert_eq!(decode(&[0, 1, 0, 0]), Ok(None));
        for (doff, size) in [(0, 8), (1, 8), (3, 8), (255, 16), (255, 254)] {
            assert_eq!(
                decode(&[0, 0, 0, size, doff, 0, 0, 0]),
                Err(FrameError::DataOffset {
                    doff,
                    size: size.into()
                })
            );
        }
        for frame_type in 2..=255 {
            assert_eq!(
                decode(&[0, 0, 0, 8, 2, frame_type, 0, 0]),
                Err(FrameError::UnknownType { frame_type })
            );
        }
        let channel = FrameError::Channel {
            channel: 8192,
            limit: CHANNEL_MAX,
        };
        assert_eq!(decode(&[0, 0, 0, 8, 2, 0, 0x20, 0]), Err(channel));
        assert!(decode(&[0, 0, 0, 8, 2, 0, 0x1f, 0xff]).is_ok());
        assert!(
            decode(&[0, 0, 0, 8, 2, 1, 0xff, 0xff]).is_ok(),
            "SASL frames have no channel"
        );
    }

    #[test]
    fn the_longest_extended_header_is_skipped() {
        let mut bytes = vec![0xee; 255 * 4 + 2];
        bytes[..8].copy_from_slice(&[0, 0, 0x03, 0xfe, 255, 0, 0, 1]);
        bytes[255 * 4..].copy_from_slice(b"ab");
        let frame = first_frame(&bytes, LIMITS).unwrap().unwrap();
        assert_eq!(frame.body, b"ab");
        assert_eq!(frame.header.frame_type(), FrameType::Amqp { channel: 1 });
    }

    #[test]
    fn a_frame_of_exactly_the_limit_fits() {
        let limits = FrameLimits {
            frame_bytes_max: MIN_MAX_FRAME_BYTES,
            channel_max: 1,
        };
        let new = |body, channel| FrameHeader::new(FrameType::Amqp { channel }, body, limits);
        assert_eq!(new(504, 1).unwrap().size(), 512);
        assert_eq!(
            new(505, 1),
            Err(FrameError::TooLarge {
                size: 513,
                limit: 512
            })
        );
        assert_eq!(
            new(0, 2),
            Err(FrameError::Channel {
                channel: 2,
                limit: 1
            })
        );
        let huge = FrameHeader::new(FrameType::Sasl, usize::MAX, OPEN);
        assert!(matches!(huge, Err(FrameError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn a_frame_survives_in_pieces_and_with_what_follows(
            frame_type in frame_type(),
            body in proptest::collection::vec(any::<u8>(), 0..100),
            next in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let header = FrameHeader::new(frame_type, body.len(), LIMITS).unwrap();
            let mut bytes = header.encode().to_vec();
            bytes.extend(&body);
            for cut in 0..bytes.len() {
                prop_assert_eq!(first_frame(&bytes[..cut], LIMITS), Ok(None));
            }
            let size = bytes.len();
            bytes.extend(next);
            let frame = first_frame(&bytes, LIMITS).unwrap().unwrap();
            prop_assert_eq!(frame.header, header);
            prop_assert_eq!(frame.header.size() as usize, size);
            prop_assert_eq!(frame.body, &body[..]);
        }

        #[test]
        fn several_frames_in_one_buffer_come_out_in_order(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
        ) {
            let mut bytes = Vec::new();
            for (channel, body) in (0u16..).zip(&bodies) {
                let frame_type = FrameType::Amqp { channel };
                bytes.extend(FrameHeader::new(frame_type, body.len(), LIMITS).unwrap().encode());
                bytes.extend(body);
            }
            let mut rest = &bytes[..];
            for (channel, body) in (0u16..).zip(&bodies) {
                let frame = first_frame(rest, LIMITS).unwrap().unwrap();
                prop_assert_eq!(frame.header.frame_type(), FrameType::Amqp { channel });
                prop_assert_eq!(frame.body, &body[..]);
                rest = &rest[frame.header.size() as usize..];
            }
            prop_assert_eq!(first_frame(rest, LIMITS), Ok(None));
        }

        #[test]
        fn whatever_is_taken_keeps_the_limits(
            size in prop_oneof![0..300u32, any::<u32>()],
            doff in prop_oneof![0..6u8, any::<u8>()],
            kind in prop_oneof![0..3u8, any::<u8>()],
            channel in any::<u16>(),
            frame_bytes_max in prop_oneof![8..300u32, any::<u32>()],
            channel_max in any::<u16>(),
            body in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let limits = FrameLimits { frame_bytes_max, channel_max };
            let mut bytes = size.to_be_bytes().to_vec();
            bytes.extend([doff, kind]);
            bytes.extend(channel.to_be_bytes());
            bytes.extend(body);
            match FrameHeader::decode(&bytes, limits) {
                Ok(None) => prop_assert!(false, "a whole header is there"),
                Ok(Some(header)) => {
                    prop_assert_eq!(header.size(), size);
                    prop_assert!(size >= 8 && size <= frame_bytes_max);
                    prop_assert!((8..=size).contains(&header.body_offset()));
                    prop_assert_eq!(header.body_offset() + header.body_bytes(), size);
                    if let FrameType::Amqp { channel: got } = header.frame_type() {
                        prop_assert!(kind == 0 && got == channel && got <= channel_max);
                        prop_assert_eq!(&header.encode(), &bytes[..8]);
                    } else {
                        prop_assert_eq!(kind, 1);
                        prop_assert_eq!(&header.encode()[..6], &bytes[..6]);
                    }
                    let whole = bytes.len() >= size as usize;
                    let frame = first_frame(&bytes, limits).unwrap();
                    prop_assert_eq!(frame.is_some(), whole);
                    if let Some(frame) = frame {
                        prop_assert_eq!(frame.body.len(), header.body_bytes() as usize);
                    }
                }
                Err(error) => {
                    let broken = match error {
                        FrameError::TooSmall { .. } => size < 8,
                        FrameError::TooLarge { .. } => size > frame_bytes_max,
                        FrameError::DataOffset { .. } => doff < 2 || u32::from(doff) * 4 > size,
                        FrameError::UnknownType { .. } => kind > 1,
                        FrameError::Channel { .. } => kind == 0 && channel > channel_max,
                    };
                    prop_assert!(broken, "{}", error);
                }
            }
        }
    }
}
