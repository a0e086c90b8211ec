//! Text of AMQP values, and messages that the hub builds.

use bytes::{Bytes, BytesMut};
use edgehub_amqp::message::{MessageId, MessageView, MessageWriter, Properties};
use edgehub_amqp::value::Value;

/// A value as text: how a property that is no string is kept. None for null and for what has no
/// text.
pub(super) fn text(value: &Value<'_>) -> Option<String> {
    Some(match value {
        Value::Str(text) | Value::Symbol(text) => (*text).to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Ubyte(value) => value.to_string(),
        Value::Ushort(value) => value.to_string(),
        Value::Uint(value) => value.to_string(),
        Value::Ulong(value) => value.to_string(),
        Value::Byte(value) => value.to_string(),
        Value::Short(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Long(value) | Value::Timestamp(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Double(value) => value.to_string(),
        Value::Uuid(value) => MessageId::Uuid(*value).to_string(),
        _ => return None,
    })
}

/// An annotation.
pub(super) fn annotation<'a>(message: &MessageView<'a>, name: &str) -> Option<Value<'a>> {
    message.message_annotations.as_ref()?.get_symbol(name)
}

/// The body's bytes; none when it is neither data nor a text.
pub(super) fn body(message: &MessageView<'_>) -> Option<Bytes> {
    use edgehub_amqp::message::Body;
    Some(match &message.body {
        Body::Empty | Body::Value(Value::Null) => Bytes::new(),
        Body::Data(sections) => match sections.as_slice() {
            [one] => one.clone(),
            many => many.concat().into(),
        },
        Body::Value(value) => {
            let bytes = value.as_str().map(str::as_bytes).or(value.as_binary())?;
            Bytes::copy_from_slice(bytes)
        }
        Body::Sequence(_) => return None,
    })
}

/// A message of one data section that answers another.
pub(super) fn answer<'k>(
    correlation: Option<&MessageId>,
    annotations: impl IntoIterator<Item = (&'k str, Value<'k>)>,
    data: &[u8],
) -> Bytes {
    let mut writer = MessageWriter::new();
    writer.annotations(annotations);
    if let Some(id) = correlation {
        writer.properties(&Properties {
            correlation_id: Some(id.clone()),
            ..Properties::default()
        });
    }
    writer.data(data);
    writer.finish()
}

/// An encoded map with string keys (AMQP 1.0 part 1, 1.6.23), to be read as a value.
pub(super) fn map<'k>(pairs: impl IntoIterator<Item = (&'k str, MapValue<'k>)>) -> Vec<u8> {
    let mut items = BytesMut::new();
    let mut count = 0_u32;
    for (key, value) in pairs {
        Value::Str(key).write(&mut items);
        match value {
            MapValue::One(value) => value.write(&mut items),
            MapValue::Strings(texts) => write_list(texts, &mut items),
        }
        count += 2;
    }
    compound(0xd1, count, &items)
}

/// What a map may hold.
pub(super) enum MapValue<'a> {
    One(Value<'a>),
    Strings(&'a [&'a str]),
}

fn write_list(texts: &[&str], out: &mut BytesMut) {
    let mut items = BytesMut::new();
    for text in texts {
        Value::Str(text).write(&mut items);
    }
    let count = u32::try_from(texts.len()).unwrap_or_default();
    out.extend_from_slice(&compound(0xd0, count, &items));
}

/// A compound value with sizes of four bytes.
fn compound(constructor: u8, count: u32, items: &[u8]) -> Vec<u8> {
    let size = u32::try_from(items.len() + 4).unwrap_or_default();
    let mut out = vec![constructor];
    out.extend_from_slice(&size.to_be_bytes());
    out.extend_from_slice(&count.to_be_bytes());
    out.extend_from_slice(items);
    out
}

/// A uuid between the order of its text and that of .NET, whose first three fields are little
/// endian: the tag of a delivery and its lock token (spec/amqp.md 4.2).
pub(super) fn dotnet_order(uuid: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// Milliseconds since 1970 as AMQP has them.
pub(super) fn timestamp(unix_ms: u64) -> Value<'static> {
    Value::Timestamp(i64::try_from(unix_ms).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read_back() {
        let bytes = map([
            ("n", MapValue::One(Value::Int(3))),
            ("ids", MapValue::Strings(&["0", "1"])),
        ]);
        let mut input = bytes.as_slice();
        let Value::Map(map) = Value::read(&mut input).unwrap() else {
            panic!("no map");
        };
        assert_eq!(map.get_str("n"), Some(Value::Int(3)));
        let Some(Value::List(ids)) = map.get_str("ids") else {
            panic!("no list");
        };
        assert_eq!(ids.iter().nth(1), Some(Value::Str("1")));
        assert!(input.is_empty());
    }

    #[test]
    fn dotnet_order_swaps_the_first_three_fields() {
        let uuid = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let wanted = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(dotnet_order(uuid), wanted);
        assert_eq!(dotnet_order(wanted), uuid);
    }
}
