//! Writing.

use bytes::{BufMut, BytesMut};

use super::{List, Value};

impl Value<'_> {
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
