//! The form of a composite in which serde_amqp reads every value where it ends.
//!
//! It does not for some that the standard has: an empty array with a constructor, and arrays of
//! lists, maps, arrays and described values, in which its counts run below zero. Arrays of values
//! that take no bytes it does not write as it reads them.

use bytes::{BufMut, BytesMut};

use super::fields::write_described;
use crate::value::{Array, List, Value, write_compound};

/// Appends a composite with its fields in the plain form; those at `without` are null.
pub(super) fn write_plain(code: u64, fields: List<'_>, without: &[usize], out: &mut BytesMut) {
    write_described(out, code, |out| {
        for (index, field) in fields.iter().enumerate() {
            if without.contains(&index) {
                out.push(Value::Null);
            } else {
                out.write(|out| plain(field, out));
            }
        }
    });
}

/// Recursion ends at the levels that reading allowed.
fn plain(value: Value<'_>, out: &mut BytesMut) {
    match value {
        Value::List(list) => list_of(list.len(), list.iter(), out),
        Value::Map(map) => write_compound(out, 0xc1, |out| {
            for (key, value) in map.iter() {
                plain(key, out);
                plain(value, out);
            }
            count(map.len().saturating_mul(2))
        }),
        // As good as none where a field may have several values; written back, it would make a list
        // behind it an array.
        Value::Array(array) if array.is_empty() => Value::Null.write(out),
        Value::Array(array) if compound(&array) => list_of(array.len(), array.iter(), out),
        Value::Described(described) => {
            out.put_u8(0x00);
            plain(described.descriptor(), out);
            plain(described.value(), out);
        }
        simple => simple.write(out),
    }
}

fn list_of<'a>(length: usize, values: impl Iterator<Item = Value<'a>>, out: &mut BytesMut) {
    if length == 0 {
        return Value::List(List::default()).write(out);
    }
    write_compound(out, 0xc0, |out| {
        values.for_each(|value| plain(value, out));
        count(length)
    });
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Whether the elements are no simple values of some bytes; such an array is handed on as a list.
fn compound(array: &Array<'_>) -> bool {
    !matches!(array.constructor(), [code] if !matches!(code, 0x40..=0x45 | 0xc0..))
}
