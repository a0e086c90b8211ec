//! Fields of composites, read and written in their order.

use bytes::BytesMut;

use super::{
    ACCEPTED, ATTACH, BEGIN, CLOSE, COORDINATOR, DETACH, DISPOSITION, DeliveryState, END, ERROR,
    ErrorInfo, FLOW, MODIFIED, OPEN, Outcome, RECEIVED, REJECTED, RELEASED, TRANSFER, read_state,
};
use crate::limits::ERROR_TEXT_BYTES_MAX;
use crate::value::{DecodeError, Described, List, Value, write_compound};

/// Codes of descriptors and the symbols that may stand for them.
const SYMBOLS: [(&str, u64); 30] = [
    ("amqp:open:list", OPEN),
    ("amqp:begin:list", BEGIN),
    ("amqp:attach:list", ATTACH),
    ("amqp:flow:list", FLOW),
    ("amqp:transfer:list", TRANSFER),
    ("amqp:disposition:list", DISPOSITION),
    ("amqp:detach:list", DETACH),
    ("amqp:end:list", END),
    ("amqp:close:list", CLOSE),
    ("amqp:error:list", ERROR),
    ("amqp:received:list", RECEIVED),
    ("amqp:accepted:list", ACCEPTED),
    ("amqp:rejected:list", REJECTED),
    ("amqp:released:list", RELEASED),
    ("amqp:modified:list", MODIFIED),
    ("amqp:coordinator:list", COORDINATOR),
    ("amqp:header:list", 0x70),
    ("amqp:delivery-annotations:map", 0x71),
    ("amqp:message-annotations:map", 0x72),
    ("amqp:properties:list", 0x73),
    ("amqp:application-properties:map", 0x74),
    ("amqp:data:binary", 0x75),
    ("amqp:amqp-sequence:list", 0x76),
    ("amqp:amqp-value:*", 0x77),
    ("amqp:footer:map", 0x78),
    ("amqp:sasl-mechanisms:list", 0x40),
    ("amqp:sasl-init:list", 0x41),
    ("amqp:sasl-challenge:list", 0x42),
    ("amqp:sasl-response:list", 0x43),
    ("amqp:sasl-outcome:list", 0x44),
];

/// The beginning of a text that fits an error.
fn excerpt(text: &str) -> &str {
    let end = text.floor_char_boundary(ERROR_TEXT_BYTES_MAX);
    text.get(..end).unwrap_or_default()
}

pub(super) fn wrong(field: &'static str, expected: &'static str) -> DecodeError {
    DecodeError::Type { field, expected }
}

/// That a described value has no place where it stands.
pub(crate) fn unexpected(described: &Described<'_>) -> DecodeError {
    let descriptor = match described.descriptor() {
        Value::Ulong(code) => format!("{code:#x}"),
        // Others are the peer's own text, which may be anything.
        Value::Symbol(name) => match SYMBOLS.iter().find(|(symbol, _)| *symbol == name) {
            Some((symbol, _)) => (*symbol).to_owned(),
            None => "of an unknown symbol".to_owned(),
        },
        _ => "of a type that is no descriptor".to_owned(),
    };
    DecodeError::Descriptor { descriptor }
}

/// The code of a descriptor, also where its symbol was sent.
pub(crate) fn descriptor_code(described: &Described<'_>) -> Result<u64, DecodeError> {
    let code = match described.descriptor() {
        Value::Ulong(code) => Some(code),
        Value::Symbol(name) => SYMBOLS
            .iter()
            .find(|(s, _)| *s == name)
            .map(|(_, code)| *code),
        _ => None,
    };
    code.ok_or_else(|| unexpected(described))
}

pub(crate) fn list<'a>(described: &Described<'a>) -> Result<List<'a>, DecodeError> {
    match described.value() {
        Value::List(list) => Ok(list),
        _ => Err(wrong("composite", "a list")),
    }
}

/// Fields of a composite in their order. Those behind the last that was sent are null; those
/// that the standard does not have are not looked at.
pub(crate) struct Fields<I>(I);

impl<'a> Fields<()> {
    pub(crate) fn of(
        described: &Described<'a>,
    ) -> Result<Fields<impl Iterator<Item = Value<'a>> + use<'a>>, DecodeError> {
        Ok(Fields(list(described)?.iter()))
    }
}

impl<'a, I: Iterator<Item = Value<'a>>> Fields<I> {
    pub(crate) fn next(&mut self) -> Value<'a> {
        self.0.next().unwrap_or(Value::Null)
    }

    pub(crate) fn uint(&mut self, field: &'static str) -> Result<Option<u32>, DecodeError> {
        match self.next() {
            Value::Uint(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a uint")),
        }
    }

    pub(super) fn mandatory_uint(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.uint(field)?.ok_or(DecodeError::Missing { field })
    }

    pub(crate) fn ubyte(&mut self, field: &'static str) -> Result<Option<u8>, DecodeError> {
        match self.next() {
            Value::Ubyte(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a ubyte")),
        }
    }

    pub(super) fn bool(&mut self, field: &'static str) -> Result<Option<bool>, DecodeError> {
        match self.next() {
            Value::Bool(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a boolean")),
        }
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        Ok(self.bool(field)?.unwrap_or(false))
    }

    pub(crate) fn binary(&mut self, field: &'static str) -> Result<Option<&'a [u8]>, DecodeError> {
        match self.next() {
            Value::Binary(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a binary")),
        }
    }

    /// A string or symbol: clients mix them up, and nothing depends on which it is.
    pub(crate) fn text(&mut self, field: &'static str) -> Result<Option<&'a str>, DecodeError> {
        match self.next() {
            Value::Str(value) | Value::Symbol(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a string or symbol")),
        }
    }

    pub(super) fn state(&mut self) -> Result<Option<DeliveryState>, DecodeError> {
        match self.next() {
            Value::Described(state) => read_state(&state).map(Some),
            Value::Null => Ok(None),
            _ => Err(wrong("state", "a delivery state")),
        }
    }
}

/// Writes the fields of a composite; nulls behind the last value are left out.
pub(crate) struct FieldWriter<'o> {
    out: &'o mut BytesMut,
    count: u32,
    nulls: u32,
}

/// Appends a composite.
pub(crate) fn write_described(
    out: &mut BytesMut,
    code: u64,
    fields: impl FnOnce(&mut FieldWriter<'_>),
) {
    out.extend_from_slice(&[0x00]);
    Value::Ulong(code).write(out);
    write_compound(out, 0xc0, |out| {
        let mut writer = FieldWriter {
            out,
            count: 0,
            nulls: 0,
        };
        fields(&mut writer);
        writer.count
    });
}

impl FieldWriter<'_> {
    /// Nulls that were held back, and the field that comes.
    fn begin(&mut self) -> &mut BytesMut {
        for _ in 0..self.nulls {
            Value::Null.write(self.out);
        }
        self.count = self.count.saturating_add(self.nulls).saturating_add(1);
        self.nulls = 0;
        self.out
    }

    pub(crate) fn push(&mut self, value: Value<'_>) {
        if value.is_null() {
            self.nulls = self.nulls.saturating_add(1);
        } else {
            value.write(self.begin());
        }
    }

    /// A field that `write` appends.
    pub(super) fn write(&mut self, write: impl FnOnce(&mut BytesMut)) {
        write(self.begin());
    }

    pub(crate) fn optional(&mut self, value: Option<Value<'_>>) {
        self.push(value.unwrap_or(Value::Null));
    }

    pub(crate) fn uint(&mut self, value: Option<u32>) {
        self.optional(value.map(Value::Uint));
    }

    /// A boolean whose default is false.
    pub(crate) fn flag(&mut self, value: bool) {
        self.optional(value.then_some(Value::Bool(true)));
    }

    pub(super) fn error(&mut self, error: Option<&ErrorInfo>) {
        match error {
            None => self.push(Value::Null),
            Some(error) => write_described(self.begin(), ERROR, |out| {
                out.push(Value::Symbol(&error.condition));
                let text = error.description.as_deref();
                out.optional(text.map(|text| Value::Str(excerpt(text))));
            }),
        }
    }

    /// States that are not an outcome are none of this engine's to send.
    pub(super) fn state(&mut self, state: Option<&DeliveryState>) {
        let Some(DeliveryState::Outcome(outcome)) = state else {
            return self.push(Value::Null);
        };
        let (code, empty) = match outcome {
            Outcome::Accepted => (ACCEPTED, true),
            Outcome::Released => (RELEASED, true),
            Outcome::Rejected(_) => (REJECTED, false),
            Outcome::Modified { .. } => (MODIFIED, false),
        };
        let out = self.begin();
        if empty {
            out.extend_from_slice(&[0x00]);
            Value::Ulong(code).write(out);
            Value::List(List::default()).write(out);
            return;
        }
        write_described(out, code, |out| match outcome {
            Outcome::Rejected(error) => out.error(error.as_ref()),
            Outcome::Modified {
                delivery_failed,
                undeliverable_here,
            } => {
                out.flag(*delivery_failed);
                out.flag(*undeliverable_here);
            }
            Outcome::Accepted | Outcome::Released => {}
        });
    }
}
