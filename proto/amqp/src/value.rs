//! The AMQP type system, borrowed from the bytes it stands in (OASIS AMQP 1.0 part 1).
//!
//! [`Value::read`] judges one whole value first ([`check`]'s rules: nesting, counts against sizes,
//! texts) and then hands out slices: lists, maps, arrays and described values are walked when
//! they are asked for, and nothing is allocated. What was read from a value was judged with it,
//! so walking it cannot fail.

use bytes::{BufMut, BytesMut};

use crate::limits::{ARRAY_EMPTY_ELEMENTS_MAX, VALUE_DEPTH_MAX};

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

/// Judges everything in `input`, value after value, without allocating: nesting of at most
/// [`VALUE_DEPTH_MAX`] levels, known constructors, counts that fit their sizes, strings that are
/// UTF-8 and symbols that are ASCII. To be called before a decoder that trusts counts.
///
/// # Errors
/// The first violation.
pub fn check(input: &[u8]) -> Result<(), DecodeError> {
    let mut rest = input;
    while !rest.is_empty() {
        skip(&mut rest, VALUE_DEPTH_MAX)?;
    }
    Ok(())
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

    /// Appends the value in its smallest encoding. Elements of lists, maps and arrays and
    /// described values are copied as they were read.
    pub fn write(&self, out: &mut BytesMut) {
        match *self {
            Self::Null => out.put_u8(0x40),
            Self::Bool(true) => out.put_u8(0x41),
            Self::Bool(false) => out.put_u8(0x42),
            Self::Ubyte(value) => out.put_slice(&[0x50, value]),
            Self::Ushort(value) => {
                out.put_u8(0x60);
                out.put_u16(value);
            }
            Self::Uint(0) => out.put_u8(0x43),
            Self::Uint(value) => match u8::try_from(value) {
                Ok(small) => out.put_slice(&[0x52, small]),
                Err(_) => {
                    out.put_u8(0x70);
                    out.put_u32(value);
                }
            },
            Self::Ulong(0) => out.put_u8(0x44),
            Self::Ulong(value) => match u8::try_from(value) {
                Ok(small) => out.put_slice(&[0x53, small]),
                Err(_) => {
                    out.put_u8(0x80);
                    out.put_u64(value);
                }
            },
            Self::Byte(value) => {
                out.put_u8(0x51);
                out.put_i8(value);
            }
            Self::Short(value) => {
                out.put_u8(0x61);
                out.put_i16(value);
            }
            Self::Int(value) => match i8::try_from(value) {
                Ok(small) => {
                    out.put_u8(0x54);
                    out.put_i8(small);
                }
                Err(_) => {
                    out.put_u8(0x71);
                    out.put_i32(value);
                }
            },
            Self::Long(value) => match i8::try_from(value) {
                Ok(small) => {
                    out.put_u8(0x55);
                    out.put_i8(small);
                }
                Err(_) => {
                    out.put_u8(0x81);
                    out.put_i64(value);
                }
            },
            Self::Float(value) => {
                out.put_u8(0x72);
                out.put_f32(value);
            }
            Self::Double(value) => {
                out.put_u8(0x82);
                out.put_f64(value);
            }
            Self::Char(value) => {
                out.put_u8(0x73);
                out.put_u32(value);
            }
            Self::Timestamp(value) => {
                out.put_u8(0x83);
                out.put_i64(value);
            }
            Self::Uuid(value) => {
                out.put_u8(0x98);
                out.put_slice(&value);
            }
            Self::Binary(bytes) => write_variable(out, 0xa0, bytes),
            Self::Str(text) => write_variable(out, 0xa1, text.as_bytes()),
            Self::Symbol(text) => write_variable(out, 0xa3, text.as_bytes()),
            Self::List(List { count: 0, .. }) => out.put_u8(0x45),
            Self::List(list) => write_compound(out, 0xc0, |out| {
                out.put_slice(list.items);
                list.count
            }),
            Self::Map(map) => write_compound(out, 0xc1, |out| {
                out.put_slice(map.items.items);
                map.items.count
            }),
            Self::Array(array) => write_compound(out, 0xe0, |out| {
                out.put_slice(array.constructor);
                out.put_slice(array.items);
                array.count
            }),
            Self::Described(described) => {
                out.put_u8(0x00);
                out.put_slice(described.inner);
            }
            Self::Decimal(bytes) => {
                match bytes.len() {
                    4 => out.put_u8(0x74),
                    8 => out.put_u8(0x84),
                    16 => out.put_u8(0x94),
                    _ => return out.put_u8(0x40),
                }
                out.put_slice(bytes);
            }
        }
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

/// Appends a list (0xc0), map (0xc1) or array (0xe0) in the smaller form that holds it. `content`
/// appends the elements and says how many there are.
pub(crate) fn write_compound(
    out: &mut BytesMut,
    short: u8,
    content: impl FnOnce(&mut BytesMut) -> u32,
) {
    let start = out.len();
    out.put_slice(&[short, 0, 0]);
    let count = content(out);
    let size = out.len().saturating_sub(start).saturating_sub(2);
    match (u8::try_from(size), u8::try_from(count)) {
        (Ok(size), Ok(count)) => {
            if let Some(header) = out.get_mut(start..).and_then(<[u8]>::first_chunk_mut::<3>) {
                *header = [short, size, count];
            }
        }
        _ => {
            let items = out.split_off(start.saturating_add(3));
            out.truncate(start);
            out.put_u8(short | 0x10);
            out.put_u32(u32::try_from(items.len().saturating_add(4)).unwrap_or(u32::MAX));
            out.put_u32(count);
            out.put_slice(&items);
        }
    }
}

fn write_variable(out: &mut BytesMut, short: u8, bytes: &[u8]) {
    match u8::try_from(bytes.len()) {
        Ok(length) => out.put_slice(&[short, length]),
        Err(_) => {
            out.put_u8(short | 0x10);
            out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        }
    }
    out.put_slice(bytes);
}

fn take<'a>(input: &mut &'a [u8], bytes: usize) -> Result<&'a [u8], DecodeError> {
    let (taken, rest) = input
        .split_at_checked(bytes)
        .ok_or(DecodeError::Truncated)?;
    *input = rest;
    Ok(taken)
}

fn take_chunk<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], DecodeError> {
    let (taken, rest) = input
        .split_first_chunk::<N>()
        .ok_or(DecodeError::Truncated)?;
    *input = rest;
    Ok(*taken)
}

fn take_u8(input: &mut &[u8]) -> Result<u8, DecodeError> {
    take_chunk::<1>(input).map(|[byte]| byte)
}

/// A length or count: one byte, or four of them in the long forms (bit 0x10 of the constructor).
fn take_number(code: u8, input: &mut &[u8]) -> Result<u32, DecodeError> {
    if code & 0x10 == 0 {
        take_u8(input).map(u32::from)
    } else {
        take_chunk(input).map(u32::from_be_bytes)
    }
}

/// Content of a variable width value, list, map or array, whose size stands before it.
fn take_sized<'a>(code: u8, input: &mut &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let size = take_number(code, input)?;
    take(input, size as usize)
}

/// Bytes of a value of fixed width; `None` for the others.
fn fixed_width(code: u8) -> Result<Option<usize>, DecodeError> {
    Ok(Some(match code {
        0x40..=0x45 => 0,
        0x50..=0x56 => 1,
        0x60 | 0x61 => 2,
        0x70..=0x74 => 4,
        0x80..=0x84 => 8,
        0x94 | 0x98 => 16,
        0xa0 | 0xa1 | 0xa3 | 0xb0 | 0xb1 | 0xb3 | 0xc0 | 0xc1 | 0xd0 | 0xd1 | 0xe0 | 0xf0 => {
            return Ok(None);
        }
        _ => return Err(DecodeError::Constructor { code }),
    }))
}

/// Moves behind one value and judges it. Recursion ends at `depth` levels.
fn skip(input: &mut &[u8], depth: usize) -> Result<(), DecodeError> {
    let code = take_u8(input)?;
    if code == 0x00 {
        let depth = depth.checked_sub(1).ok_or(DecodeError::TooDeep)?;
        skip(input, depth)?;
        return skip(input, depth);
    }
    skip_body(code, input, depth)
}

fn skip_body(code: u8, input: &mut &[u8], depth: usize) -> Result<(), DecodeError> {
    if let Some(width) = fixed_width(code)? {
        let bytes = take(input, width)?;
        if code == 0x56 && bytes.iter().any(|byte| *byte > 1) {
            return Err(DecodeError::Invalid {
                expected: "boolean",
            });
        }
        return Ok(());
    }
    let mut content = take_sized(code, input)?;
    match code {
        0xa0 | 0xb0 => return Ok(()),
        0xa1 | 0xb1 => return text(content).map(drop),
        0xa3 | 0xb3 => return symbol(content).map(drop),
        _ => {}
    }
    let depth = depth.checked_sub(1).ok_or(DecodeError::TooDeep)?;
    let count = take_number(code, &mut content)?;
    let size = content.len();
    let mismatch = DecodeError::Count { count, size };
    if matches!(code, 0xe0 | 0xf0) {
        return skip_elements(count, content, depth, mismatch);
    }
    // Each element has at least its constructor; a map has pairs.
    let pairs = matches!(code, 0xc1 | 0xd1);
    if count as usize > size || (pairs && count % 2 != 0) {
        return Err(mismatch);
    }
    for _ in 0..count {
        skip(&mut content, depth)?;
    }
    if content.is_empty() {
        Ok(())
    } else {
        Err(mismatch)
    }
}

/// Elements of an array with the constructor before them.
fn skip_elements(
    count: u32,
    mut content: &[u8],
    depth: usize,
    mismatch: DecodeError,
) -> Result<(), DecodeError> {
    if count == 0 && content.is_empty() {
        return Ok(());
    }
    let mut code = take_u8(&mut content)?;
    if code == 0x00 {
        skip(
            &mut content,
            depth.checked_sub(1).ok_or(DecodeError::TooDeep)?,
        )?;
        code = take_u8(&mut content)?;
    }
    let count = count as usize;
    match fixed_width(code)? {
        Some(0) if count > ARRAY_EMPTY_ELEMENTS_MAX => Err(mismatch),
        Some(width) if count.checked_mul(width) != Some(content.len()) => Err(mismatch),
        Some(_) if code != 0x56 => Ok(()),
        None if count > content.len() => Err(mismatch),
        _ => {
            for _ in 0..count {
                skip_body(code, &mut content, depth)?;
            }
            if content.is_empty() {
                Ok(())
            } else {
                Err(mismatch)
            }
        }
    }
}

fn text(bytes: &[u8]) -> Result<&str, DecodeError> {
    std::str::from_utf8(bytes).map_err(|_| DecodeError::Invalid { expected: "string" })
}

fn symbol(bytes: &[u8]) -> Result<&str, DecodeError> {
    let invalid = DecodeError::Invalid { expected: "symbol" };
    if bytes.is_ascii() {
        text(bytes)
    } else {
        Err(invalid)
    }
}

/// One value of bytes that were judged; nothing within it is looked at.
pub(crate) fn read_checked<'a>(input: &mut &'a [u8]) -> Result<Value<'a>, DecodeError> {
    let mut rest = *input;
    let code = take_u8(&mut rest)?;
    let value = if code == 0x00 {
        let inner = rest;
        skip(&mut rest, VALUE_DEPTH_MAX)?;
        skip(&mut rest, VALUE_DEPTH_MAX)?;
        let length = inner.len().saturating_sub(rest.len());
        let inner = inner.get(..length).unwrap_or_default();
        Value::Described(Described { inner })
    } else {
        read_body(code, &mut rest)?
    };
    *input = rest;
    Ok(value)
}

fn read_body<'a>(code: u8, input: &mut &'a [u8]) -> Result<Value<'a>, DecodeError> {
    Ok(match code {
        0x40 => Value::Null,
        0x41 => Value::Bool(true),
        0x42 => Value::Bool(false),
        0x43 => Value::Uint(0),
        0x44 => Value::Ulong(0),
        0x45 => Value::List(List::default()),
        0x50 => Value::Ubyte(take_u8(input)?),
        0x51 => Value::Byte(i8::from_be_bytes(take_chunk(input)?)),
        0x52 => Value::Uint(take_u8(input)?.into()),
        0x53 => Value::Ulong(take_u8(input)?.into()),
        0x54 => Value::Int(i8::from_be_bytes(take_chunk(input)?).into()),
        0x55 => Value::Long(i8::from_be_bytes(take_chunk(input)?).into()),
        0x56 => Value::Bool(take_u8(input)? != 0),
        0x60 => Value::Ushort(u16::from_be_bytes(take_chunk(input)?)),
        0x61 => Value::Short(i16::from_be_bytes(take_chunk(input)?)),
        0x70 => Value::Uint(u32::from_be_bytes(take_chunk(input)?)),
        0x71 => Value::Int(i32::from_be_bytes(take_chunk(input)?)),
        0x72 => Value::Float(f32::from_be_bytes(take_chunk(input)?)),
        0x73 => Value::Char(u32::from_be_bytes(take_chunk(input)?)),
        0x74 => Value::Decimal(take(input, 4)?),
        0x80 => Value::Ulong(u64::from_be_bytes(take_chunk(input)?)),
        0x81 => Value::Long(i64::from_be_bytes(take_chunk(input)?)),
        0x82 => Value::Double(f64::from_be_bytes(take_chunk(input)?)),
        0x83 => Value::Timestamp(i64::from_be_bytes(take_chunk(input)?)),
        0x84 => Value::Decimal(take(input, 8)?),
        0x94 => Value::Decimal(take(input, 16)?),
        0x98 => Value::Uuid(take_chunk(input)?),
        0xa0 | 0xb0 => Value::Binary(take_sized(code, input)?),
        0xa1 | 0xb1 => Value::Str(text(take_sized(code, input)?)?),
        0xa3 | 0xb3 => Value::Symbol(symbol(take_sized(code, input)?)?),
        0xc0 | 0xd0 => Value::List(read_list(code, input)?),
        0xc1 | 0xd1 => Value::Map(Map {
            items: read_list(code, input)?,
        }),
        0xe0 | 0xf0 => {
            let List { count, items } = read_list(code, input)?;
            let mut rest = items;
            if !items.is_empty() && take_u8(&mut rest)? == 0x00 {
                skip(&mut rest, VALUE_DEPTH_MAX)?;
                take_u8(&mut rest)?;
            }
            let length = items.len().saturating_sub(rest.len());
            Value::Array(Array {
                count,
                constructor: items.get(..length).unwrap_or_default(),
                items: rest,
            })
        }
        _ => return Err(DecodeError::Constructor { code }),
    })
}

fn read_list<'a>(code: u8, input: &mut &'a [u8]) -> Result<List<'a>, DecodeError> {
    let mut items = take_sized(code, input)?;
    let count = take_number(code, &mut items)?;
    Ok(List { count, items })
}

#[cfg(test)]
#[path = "value_tests.rs"]
mod tests;
