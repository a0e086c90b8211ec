//! Judging and reading.

use super::{Array, DecodeError, Described, List, Map, Value};
use crate::limits::{ARRAY_EMPTY_ELEMENTS_MAX, VALUE_DEPTH_MAX};

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
pub(super) fn skip(input: &mut &[u8], depth: usize) -> Result<(), DecodeError> {
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

pub(super) fn read_body<'a>(code: u8, input: &mut &'a [u8]) -> Result<Value<'a>, DecodeError> {
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
