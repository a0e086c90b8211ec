//! The protocol header: the eight bytes with which each layer of a connection begins.
//!
//! ```text
//!   4 bytes   1 byte        1 byte   1 byte   1 byte
//! +---------+-------------+--------+--------+----------+
//! | "AMQP"  | protocol id | major  | minor  | revision |
//! +---------+-------------+--------+--------+----------+
//! ```
//!
//! Which header a server takes in which state is the connection's business; here is only what a
//! header is, and what a peer is told whose header is none (OASIS AMQP 1.0 part 2 section 2.2;
//! spec/amqp.md 1.2).

use std::fmt;

/// Length of a protocol header, bytes.
pub const HEADER_BYTES: usize = 8;

const NAME: [u8; 4] = *b"AMQP";

/// The layer that a header opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProtocolId {
    /// AMQP itself.
    Amqp,
    /// TLS within the connection. Not offered, since TLS comes before the first byte here: who
    /// asks for it is answered [`ProtocolHeader::SASL`] and closed (spec/amqp.md 1.2).
    Tls,
    /// SASL.
    Sasl,
}

impl ProtocolId {
    /// The byte on the wire.
    #[must_use]
    pub fn byte(self) -> u8 {
        match self {
            Self::Amqp => 0,
            Self::Tls => 2,
            Self::Sasl => 3,
        }
    }

    /// The layer of a byte; the standard has no others.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Amqp),
            2 => Some(Self::Tls),
            3 => Some(Self::Sasl),
            _ => None,
        }
    }
}

/// A version of one of the protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major number.
    pub major: u8,
    /// Minor number.
    pub minor: u8,
    /// Revision.
    pub revision: u8,
}

impl Version {
    /// The only version of all three protocols.
    pub const V1_0_0: Self = Self {
        major: 1,
        minor: 0,
        revision: 0,
    };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.revision)
    }
}

/// A header of a protocol that exists, version 1.0.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProtocolHeader {
    /// The layer.
    pub id: ProtocolId,
}

/// Why the first bytes of a peer are no header that can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The peer does not speak AMQP at all.
    #[error("the connection does not begin with an AMQP protocol header")]
    NotAmqp,
    /// A protocol id that the standard does not know.
    #[error("the AMQP protocol id {id} is unknown")]
    UnknownId {
        /// The byte.
        id: u8,
    },
    /// A known protocol in another version, such as AMQP 0.9.1.
    #[error("{id:?} of AMQP version {version} is not supported")]
    UnsupportedVersion {
        /// The protocol.
        id: ProtocolId,
        /// What was asked for.
        version: Version,
    },
}

impl HeaderError {
    /// What the peer is answered before the connection is closed, so that it can see what would
    /// be served: the same protocol in our version where we have it, SASL for everything else.
    #[must_use]
    pub fn answer(self) -> ProtocolHeader {
        match self {
            Self::UnsupportedVersion {
                id: ProtocolId::Amqp,
                ..
            } => ProtocolHeader::AMQP,
            Self::NotAmqp | Self::UnknownId { .. } | Self::UnsupportedVersion { .. } => {
                ProtocolHeader::SASL
            }
        }
    }
}

impl ProtocolHeader {
    /// AMQP 1.0.0.
    pub const AMQP: Self = Self {
        id: ProtocolId::Amqp,
    };
    /// SASL 1.0.0.
    pub const SASL: Self = Self {
        id: ProtocolId::Sasl,
    };
    /// TLS 1.0.0.
    pub const TLS: Self = Self {
        id: ProtocolId::Tls,
    };

    /// Reads the header at the beginning of `input`; what follows it is not looked at. `None`
    /// when more bytes are needed. A peer that cannot become right is refused at its first wrong
    /// byte of the name, not when eight have arrived.
    ///
    /// # Errors
    /// When it is no header that can be served.
    pub fn decode(input: &[u8]) -> Result<Option<Self>, HeaderError> {
        if input.iter().zip(NAME).any(|(got, wanted)| *got != wanted) {
            return Err(HeaderError::NotAmqp);
        }
        let Some(&[_, _, _, _, id, major, minor, revision]) = input.first_chunk::<HEADER_BYTES>()
        else {
            return Ok(None);
        };
        let id = ProtocolId::from_byte(id).ok_or(HeaderError::UnknownId { id })?;
        let version = Version {
            major,
            minor,
            revision,
        };
        if version != Version::V1_0_0 {
            return Err(HeaderError::UnsupportedVersion { id, version });
        }
        Ok(Some(Self { id }))
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let Version {
            major,
            minor,
            revision,
        } = Version::V1_0_0;
        let [a, m, q, p] = NAME;
        [a, m, q, p, self.id.byte(), major, minor, revision]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_three_headers_are_those_of_the_standard() {
        for (header, bytes) in [
            (ProtocolHeader::AMQP, *b"AMQP\x00\x01\x00\x00"),
            (ProtocolHeader::TLS, *b"AMQP\x02\x01\x00\x00"),
            (ProtocolHeader::SASL, *b"AMQP\x03\x01\x00\x00"),
        ] {
            assert_eq!(header.encode(), bytes);
            assert_eq!(ProtocolHeader::decode(&bytes), Ok(Some(header)));
        }
    }

    #[test]
    fn every_row_of_the_negotiation_table_has_its_answer() {
        let refused = |bytes: &[u8]| ProtocolHeader::decode(bytes).unwrap_err().answer();
        assert_eq!(refused(b"AMQP\x00\x00\x09\x01"), ProtocolHeader::AMQP);
        assert_eq!(refused(b"AMQP\x03\x02\x00\x00"), ProtocolHeader::SASL);
        assert_eq!(refused(b"AMQP\x02\x01\x01\x00"), ProtocolHeader::SASL);
        assert_eq!(refused(b"AMQP\x01\x01\x00\x00"), ProtocolHeader::SASL);
        assert_eq!(refused(b"GET / HTTP/1.1\r\n"), ProtocolHeader::SASL);
    }

    #[test]
    fn errors_name_what_was_wrong() {
        let version = Version {
            major: 0,
            minor: 9,
            revision: 1,
        };
        assert_eq!(
            ProtocolHeader::decode(b"AMQP\x00\x00\x09\x01"),
            Err(HeaderError::UnsupportedVersion {
                id: ProtocolId::Amqp,
                version
            })
        );
        assert_eq!(
            ProtocolHeader::decode(b"AMQP\x01\x01\x00\x00"),
            Err(HeaderError::UnknownId { id: 1 })
        );
        for start in [
            &b"\x16"[..],
            b"amqp",
            b"AMQX",
            b"A\x10",
            b"AMQ\x10AMQP\x00\x01\x00\x00",
        ] {
            assert_eq!(
                ProtocolHeader::decode(start),
                Err(HeaderError::NotAmqp),
                "{start:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_header_survives_in_pieces_and_with_what_follows(
            id in prop_oneof![Just(ProtocolId::Amqp), Just(ProtocolId::Tls), Just(ProtocolId::Sasl)],
            next in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let header = ProtocolHeader { id };
            let mut bytes = header.encode().to_vec();
            for cut in 0..bytes.len() {
                prop_assert_eq!(ProtocolHeader::decode(&bytes[..cut]), Ok(None));
            }
            bytes.extend(next);
            prop_assert_eq!(ProtocolHeader::decode(&bytes), Ok(Some(header)));
        }

        #[test]
        fn only_the_three_headers_are_taken(mut bytes in any::<[u8; 8]>(), named in any::<bool>()) {
            if named {
                bytes[..4].copy_from_slice(b"AMQP");
            }
            match ProtocolHeader::decode(&bytes) {
                Ok(Some(header)) => prop_assert_eq!(header.encode(), bytes),
                Ok(None) => prop_assert!(false, "eight bytes are enough"),
                Err(error) => {
                    let answer = error.answer();
                    prop_assert_ne!(answer.encode(), bytes, "a refused header is not echoed");
                    prop_assert_ne!(answer, ProtocolHeader::TLS);
                }
            }
        }

        #[test]
        fn one_changed_byte_makes_it_another_header_or_none(
            at in 0..HEADER_BYTES,
            by in 1..=255u8,
        ) {
            let mut bytes = ProtocolHeader::AMQP.encode();
            bytes[at] ^= by;
            prop_assert_ne!(ProtocolHeader::decode(&bytes), Ok(Some(ProtocolHeader::AMQP)));
        }
    }
}
