//! The AMQP type system, borrowed from the bytes it stands in (OASIS AMQP 1.0 part 1).
//!
//! [`Value::read`] judges one whole value first ([`check`]'s rules: nesting, counts against sizes,
//! texts) and then hands out slices: lists, maps, arrays and described values are walked when
//! they are asked for, and nothing is allocated. What was read from a value was judged with it,
//! so walking it cannot fail.

mod read;
mod write;

use crate::limits::VALUE_DEPTH_MAX;

pub use read::check;

pub(crate) use read::read_checked;
pub(crate) use write::write_compound;

use read::{read_body, skip};

/// Why bytes of a peer are not the AMQP value, section or performative they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end within a value.
    #[error("the bytes end within an AMQP value")]
    Truncated,
    /// A constructor that the standard does not know.
    #[error("the AMQP constructor {code:#04x} is unknown")]
    Constructor {
        /// The byte.
        code: u8,
    },
    /// More levels of lists, maps, arrays and described values than are taken.
    #[error("AMQP values are nested deeper than {VALUE_DEPTH_MAX} levels")]
    TooDeep,
    /// The count of a list, map or array does not fit its size.
    #[error("the count {count} of an AMQP list, map or array does not fit its {size} bytes")]
    Count {
        /// The count that was announced.
        count: u32,
        /// Bytes that are there for the elements.
        size: usize,
    },
    /// A boolean, string or symbol whose bytes are none.
    #[error("the bytes are no AMQP {expected}")]
    Invalid {
        /// The type.
        expected: &'static str,
    },
    /// A value of another type than its place asks for.
    #[error("{field} must be {expected}")]
    Type {
        /// The field or section.
        field: &'static str,
        /// What belongs there.
        expected: &'static str,
    },
    /// A mandatory field is absent or null.
    #[error("the mandatory field {field} is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A descriptor that has no meaning in this place.
    #[error("the described type {descriptor} has no place here")]
    Descriptor {
        /// The descriptor's code, or its symbol.
        descriptor: String,
    },
    /// A section of a message stands twice, or bodies of several kinds.
    #[error("the message section {section} stands twice or beside another body")]
    Section {
        /// The section.
        section: &'static str,
    },
    /// More of something than a named limit allows.
    #[error("more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A performative whose structure is sound and whose fields are not.
    #[error("the performative {performative} cannot be read: {reason}")]
    Performative {
        /// Its name.
        performative: &'static str,
        /// What the decoder says; names fields and types, not their values.
        reason: String,
    },
}

/// One AMQP value.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value<'a> {
    /// null.
    Null,
    /// boolean.
    Bool(bool),
    /// ubyte.
    Ubyte(u8),
    /// ushort.
    Ushort(u16),
    /// uint.
    Uint(u32),
    /// ulong.
    Ulong(u64),
    /// byte.
    Byte(i8),
    /// short.
    Short(i16),
    /// int.
    Int(i32),
    /// long.
    Long(i64),
    /// float.
    Float(f32),
    /// double.
    Double(f64),
    /// char: a UTF-32 code point as it stood in the bytes.
    Char(u32),
    /// timestamp: milliseconds since 1970.
    Timestamp(i64),
    /// uuid, in the order of RFC 4122.
    Uuid([u8; 16]),
    /// binary.
    Binary(&'a [u8]),
    /// string.
    Str(&'a str),
    /// symbol; ASCII.
    Symbol(&'a str),
    /// list.
    List(List<'a>),
    /// map.
    Map(Map<'a>),
    /// array.
    Array(Array<'a>),
    /// A described value.
    Described(Described<'a>),
    /// decimal32, decimal64 or decimal128: its 4, 8 or 16 bytes. Another length is written as null.
    Decimal(&'a [u8]),
}

/// Elements of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct List<'a> {
    count: u32,
    items: &'a [u8],
}

/// Pairs of a map, in the order of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Map<'a> {
    items: List<'a>,
}

/// Elements of an array; all have one constructor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array<'a> {
    count: u32,
    /// The constructor as it stands, with a descriptor where there is one.
    constructor: &'a [u8],
    items: &'a [u8],
}

/// A value with a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described<'a> {
    /// Descriptor and value behind the byte 0x00.
    inner: &'a [u8],
}

impl<'a> Value<'a> {
    /// Reads the value at the beginning of `input` and moves `input` behind it.
    ///
    /// # Errors
    /// When the bytes are no value, or one that breaks a limit; `input` is then where it was.
    pub fn read(input: &mut &'a [u8]) -> Result<Self, DecodeError> {
        let mut end = *input;
        skip(&mut end, VALUE_DEPTH_MAX)?;
        read_checked(input)
    }

    /// The text of a string or symbol.
    #[must_use]
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Self::Str(text) | Self::Symbol(text) => Some(text),
            _ => None,
        }
    }

    /// The bytes of a binary.
    #[must_use]
    pub fn as_binary(&self) -> Option<&'a [u8]> {
        match *self {
            Self::Binary(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// A boolean.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// An integer of any width that is not negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Ulong(value) => Some(value),
            other => other.as_i64().and_then(|value| u64::try_from(value).ok()),
        }
    }

    /// An integer of any width that fits.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        Some(match *self {
            Self::Ubyte(value) => value.into(),
            Self::Ushort(value) => value.into(),
            Self::Uint(value) => value.into(),
            Self::Ulong(value) => return i64::try_from(value).ok(),
            Self::Byte(value) => value.into(),
            Self::Short(value) => value.into(),
            Self::Int(value) => value.into(),
            Self::Long(value) => value,
            _ => return None,
        })
    }

    /// A timestamp, milliseconds since 1970.
    #[must_use]
    pub fn as_timestamp(&self) -> Option<i64> {
        match *self {
            Self::Timestamp(value) => Some(value),
            _ => None,
        }
    }

    /// Whether it is null.
    #[must_use]
    pub fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }
}

impl<'a> List<'a> {
    /// How many elements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut rest = self.items;
        (0..self.count).map_while(move |_| read_checked(&mut rest).ok())
    }
}

impl<'a> Map<'a> {
    /// How many pairs there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len() / 2
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The pairs of key and value.
    pub fn iter(&self) -> impl Iterator<Item = (Value<'a>, Value<'a>)> + use<'a> {
        let mut items = self.items.iter();
        std::iter::from_fn(move || Some((items.next()?, items.next()?)))
    }

    /// The first value whose key is this symbol.
    #[must_use]
    pub fn get_symbol(&self, key: &str) -> Option<Value<'a>> {
        self.find(|candidate| matches!(candidate, Value::Symbol(text) if text == key))
    }

    /// The first value whose key is this text, as a string or as a symbol.
    #[must_use]
    pub fn get_str(&self, key: &str) -> Option<Value<'a>> {
        self.find(|candidate| candidate.as_str() == Some(key))
    }

    fn find(&self, wanted: impl Fn(Value<'a>) -> bool) -> Option<Value<'a>> {
        let mut pairs = self.iter();
        pairs.find_map(|(key, value)| wanted(key).then_some(value))
    }
}

impl<'a> Array<'a> {
    /// How many elements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The constructor of the elements: one byte, behind a descriptor where there is one.
    pub(crate) fn constructor(&self) -> &'a [u8] {
        self.constructor
    }

    /// The elements; of an array of described values the values without their descriptor.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut rest = self.items;
        let code = self.constructor.last().copied().unwrap_or(0x40);
        (0..self.count).map_while(move |_| read_body(code, &mut rest).ok())
    }
}

impl<'a> Described<'a> {
    /// The descriptor: a ulong or a symbol where the standard is kept.
    #[must_use]
    pub fn descriptor(&self) -> Value<'a> {
        let mut rest = self.inner;
        read_checked(&mut rest).unwrap_or(Value::Null)
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> Value<'a> {
        let mut rest = self.inner;
        let behind = read_checked(&mut rest).and_then(|_| read_checked(&mut rest));
        behind.unwrap_or(Value::Null)
    }
}

#[cfg(test)]
mod tests;
