//! Messages: their sections, read without decoding or copying the body, and a writer (OASIS AMQP
//! 1.0 part 3 section 3.2; spec/amqp.md 5).

use std::fmt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use crate::limits::DATA_SECTIONS_MAX;
use crate::performative::{Fields, descriptor_code, unexpected, write_described};
use crate::value::{DecodeError, Described, List, Map, Value, write_compound};

const HEADER: u64 = 0x70;
const DELIVERY_ANNOTATIONS: u64 = 0x71;
const MESSAGE_ANNOTATIONS: u64 = 0x72;
const PROPERTIES: u64 = 0x73;
const APPLICATION_PROPERTIES: u64 = 0x74;
const DATA: u64 = 0x75;
const SEQUENCE: u64 = 0x76;
const VALUE: u64 = 0x77;
const FOOTER: u64 = 0x78;

/// Message format of a batch: each data section of the body is one encoded message.
pub const BATCH_MESSAGE_FORMAT: u32 = 0x8001_3700;

/// A message-id or correlation-id (part 3, 3.2.11). Its text is that of a uuid in lower case with
/// hyphens and of a binary in hex.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MessageId {
    /// ulong.
    Ulong(u64),
    /// uuid.
    Uuid([u8; 16]),
    /// binary.
    Binary(Bytes),
    /// string.
    Str(Arc<str>),
}

impl MessageId {
    /// Bytes of a text or binary, which the peer chooses; a number or uuid has a few.
    #[must_use]
    pub fn length(&self) -> usize {
        match self {
            Self::Ulong(_) => size_of::<u64>(),
            Self::Uuid(bytes) => bytes.len(),
            Self::Binary(bytes) => bytes.len(),
            Self::Str(text) => text.len(),
        }
    }

    fn read(
        value: Value<'_>,
        payload: &Bytes,
        field: &'static str,
    ) -> Result<Option<Self>, DecodeError> {
        Ok(Some(match value {
            Value::Null => return Ok(None),
            Value::Ulong(id) => Self::Ulong(id),
            Value::Uuid(id) => Self::Uuid(id),
            Value::Binary(id) => Self::Binary(payload.slice_ref(id)),
            Value::Str(id) => Self::Str(id.into()),
            _ => {
                let expected = "a ulong, uuid, binary or string";
                return Err(DecodeError::Type { field, expected });
            }
        }))
    }

    /// The id as a value of its own type.
    #[must_use]
    pub fn value(&self) -> Value<'_> {
        match self {
            Self::Ulong(id) => Value::Ulong(*id),
            Self::Uuid(id) => Value::Uuid(*id),
            Self::Binary(id) => Value::Binary(id),
            Self::Str(id) => Value::Str(id),
        }
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ulong(id) => id.fmt(f),
            Self::Uuid(id) => {
                for (index, byte) in id.iter().enumerate() {
                    if matches!(index, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
            Self::Binary(id) => id.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Self::Str(id) => f.write_str(id),
        }
    }
}

/// The properties section (part 3, 3.2.4).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Properties<'a> {
    /// Id of the message.
    pub message_id: Option<MessageId>,
    /// Bytes that name the user.
    pub user_id: Option<&'a [u8]>,
    /// Node that the message is for.
    pub to: Option<&'a str>,
    /// Subject.
    pub subject: Option<&'a str>,
    /// Node for replies.
    pub reply_to: Option<&'a str>,
    /// Id of what this is an answer to.
    pub correlation_id: Option<MessageId>,
    /// MIME type of the body.
    pub content_type: Option<&'a str>,
    /// Encoding of the body.
    pub content_encoding: Option<&'a str>,
    /// Expiry, milliseconds since 1970.
    pub absolute_expiry_time: Option<i64>,
    /// Creation, milliseconds since 1970.
    pub creation_time: Option<i64>,
    /// Group.
    pub group_id: Option<&'a str>,
    /// Number in the group.
    pub group_sequence: Option<u32>,
    /// Group for replies.
    pub reply_to_group_id: Option<&'a str>,
}

/// The body of a message.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Body<'a> {
    /// No body section.
    #[default]
    Empty,
    /// Data sections: slices of the payload.
    Data(SmallVec<[Bytes; 1]>),
    /// An amqp-value.
    Value(Value<'a>),
    /// amqp-sequence sections.
    Sequence(SmallVec<[List<'a>; 1]>),
}

/// A message, borrowed from its payload.
#[derive(Clone, Debug, PartialEq)]
pub struct MessageView<'a> {
    /// header: to be stored.
    pub durable: bool,
    /// header: 0 to 9, 4 where nothing is said.
    pub priority: u8,
    /// header: time to live, milliseconds.
    pub ttl_ms: Option<u32>,
    /// header: nobody had it before.
    pub first_acquirer: bool,
    /// header: earlier deliveries that failed.
    pub delivery_count: u32,
    /// delivery-annotations.
    pub delivery_annotations: Option<Map<'a>>,
    /// message-annotations.
    pub message_annotations: Option<Map<'a>>,
    /// properties.
    pub properties: Option<Properties<'a>>,
    /// application-properties.
    pub application_properties: Option<Map<'a>>,
    /// The body.
    pub body: Body<'a>,
    /// footer.
    pub footer: Option<Map<'a>>,
}

impl<'a> MessageView<'a> {
    /// Reads the sections of a message in any order. No section at all is a message without a
    /// body.
    ///
    /// # Errors
    /// When the bytes are no message: the delivery is to be rejected, the link may live on.
    pub fn parse(payload: &'a Bytes) -> Result<Self, DecodeError> {
        let mut message = MessageView {
            durable: false,
            priority: 4,
            ttl_ms: None,
            first_acquirer: false,
            delivery_count: 0,
            delivery_annotations: None,
            message_annotations: None,
            properties: None,
            application_properties: None,
            body: Body::Empty,
            footer: None,
        };
        let mut header = None;
        let mut rest: &[u8] = payload;
        while !rest.is_empty() {
            let Value::Described(section) = Value::read(&mut rest)? else {
                return Err(DecodeError::Type {
                    field: "message",
                    expected: "described sections",
                });
            };
            match descriptor_code(&section)? {
                HEADER => {
                    once(&mut header, "header", ())?;
                    message.read_header(&section)?;
                }
                DELIVERY_ANNOTATIONS => {
                    let name = "delivery-annotations";
                    once(
                        &mut message.delivery_annotations,
                        name,
                        map(&section, name)?,
                    )?;
                }
                MESSAGE_ANNOTATIONS => {
                    let name = "message-annotations";
                    once(&mut message.message_annotations, name, map(&section, name)?)?;
                }
                PROPERTIES => {
                    let properties = read_properties(&section, payload)?;
                    once(&mut message.properties, "properties", properties)?;
                }
                APPLICATION_PROPERTIES => {
                    let name = "application-properties";
                    once(
                        &mut message.application_properties,
                        name,
                        map(&section, name)?,
                    )?;
                }
                FOOTER => once(&mut message.footer, "footer", map(&section, "footer")?)?,
                DATA => message.read_data(&section, payload)?,
                SEQUENCE => message.read_sequence(&section)?,
                VALUE => match message.body {
                    Body::Empty => message.body = Body::Value(section.value()),
                    _ => {
                        return Err(DecodeError::Section {
                            section: "amqp-value",
                        });
                    }
                },
                _ => return Err(unexpected(&section)),
            }
        }
        Ok(message)
    }

    fn read_header(&mut self, section: &Described<'a>) -> Result<(), DecodeError> {
        let mut fields = Fields::of(section)?;
        self.durable = fields.flag("durable")?;
        self.priority = fields.ubyte("priority")?.unwrap_or(4);
        self.ttl_ms = fields.uint("ttl")?;
        self.first_acquirer = fields.flag("first-acquirer")?;
        self.delivery_count = fields.uint("delivery-count")?.unwrap_or(0);
        Ok(())
    }

    fn read_data(&mut self, section: &Described<'a>, payload: &Bytes) -> Result<(), DecodeError> {
        let Value::Binary(data) = section.value() else {
            return Err(DecodeError::Type {
                field: "data",
                expected: "a binary",
            });
        };
        let data = payload.slice_ref(data);
        match &mut self.body {
            Body::Data(sections) if sections.len() >= DATA_SECTIONS_MAX => {
                return Err(DecodeError::TooMany {
                    what: "data sections",
                    limit: DATA_SECTIONS_MAX,
                });
            }
            Body::Data(sections) => sections.push(data),
            Body::Empty => self.body = Body::Data(SmallVec::from_iter([data])),
            _ => return Err(DecodeError::Section { section: "data" }),
        }
        Ok(())
    }

    fn read_sequence(&mut self, section: &Described<'a>) -> Result<(), DecodeError> {
        let list = crate::performative::list(section)?;
        match &mut self.body {
            Body::Sequence(lists) if lists.len() >= DATA_SECTIONS_MAX => {
                return Err(DecodeError::TooMany {
                    what: "amqp-sequence sections",
                    limit: DATA_SECTIONS_MAX,
                });
            }
            Body::Sequence(lists) => lists.push(list),
            Body::Empty => self.body = Body::Sequence(SmallVec::from_iter([list])),
            _ => {
                let section = "amqp-sequence";
                return Err(DecodeError::Section { section });
            }
        }
        Ok(())
    }
}

fn once<T>(place: &mut Option<T>, section: &'static str, value: T) -> Result<(), DecodeError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(DecodeError::Section { section }),
    }
}

/// The map of a section; null, which some clients send for an empty one, is one.
fn map<'a>(section: &Described<'a>, field: &'static str) -> Result<Map<'a>, DecodeError> {
    match section.value() {
        Value::Map(map) => Ok(map),
        Value::Null => Ok(Map::default()),
        _ => Err(DecodeError::Type {
            field,
            expected: "a map",
        }),
    }
}

fn timestamp(value: Value<'_>, field: &'static str) -> Result<Option<i64>, DecodeError> {
    match value {
        Value::Null => Ok(None),
        Value::Timestamp(time) => Ok(Some(time)),
        _ => Err(DecodeError::Type {
            field,
            expected: "a timestamp",
        }),
    }
}

fn read_properties<'a>(
    section: &Described<'a>,
    payload: &Bytes,
) -> Result<Properties<'a>, DecodeError> {
    let mut fields = Fields::of(section)?;
    Ok(Properties {
        message_id: MessageId::read(fields.next(), payload, "message-id")?,
        user_id: fields.binary("user-id")?,
        to: fields.text("to")?,
        subject: fields.text("subject")?,
        reply_to: fields.text("reply-to")?,
        correlation_id: MessageId::read(fields.next(), payload, "correlation-id")?,
        content_type: fields.text("content-type")?,
        content_encoding: fields.text("content-encoding")?,
        absolute_expiry_time: timestamp(fields.next(), "absolute-expiry-time")?,
        creation_time: timestamp(fields.next(), "creation-time")?,
        group_id: fields.text("group-id")?,
        group_sequence: fields.uint("group-sequence")?,
        reply_to_group_id: fields.text("reply-to-group-id")?,
    })
}

/// The messages of a batch ([`BATCH_MESSAGE_FORMAT`]): none where the body is no data.
pub fn batch_items<'b>(body: &'b Body<'_>) -> impl Iterator<Item = &'b Bytes> {
    let sections: &[Bytes] = match body {
        Body::Data(sections) => sections,
        _ => &[],
    };
    sections.iter()
}

/// Builds one message. Sections leave in the standard's order, whatever the order of the calls;
/// each but `data` is to be given once.
#[derive(Debug, Default)]
pub struct MessageWriter {
    out: BytesMut,
    /// Where the sections of each rank end: annotations, properties, application properties.
    ends: [usize; 3],
}

impl MessageWriter {
    /// A message without sections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Message annotations; keys are written as symbols. Without any there is no section.
    pub fn annotations<'k>(&mut self, pairs: impl IntoIterator<Item = (&'k str, Value<'k>)>) {
        self.section(0, |out| {
            write_map(out, MESSAGE_ANNOTATIONS, Value::Symbol, pairs);
        });
    }

    /// The properties section; ids keep their types.
    pub fn properties(&mut self, properties: &Properties<'_>) {
        self.section(1, |out| write_properties(out, properties));
    }

    /// Application properties; keys are written as strings. Without any there is no section.
    pub fn application_properties<'k>(
        &mut self,
        pairs: impl IntoIterator<Item = (&'k str, Value<'k>)>,
    ) {
        self.section(2, |out| {
            write_map(out, APPLICATION_PROPERTIES, Value::Str, pairs);
        });
    }

    /// A data section, which may be empty.
    pub fn data(&mut self, data: &[u8]) {
        write_descriptor(&mut self.out, DATA);
        Value::Binary(data).write(&mut self.out);
    }

    /// An amqp-value body.
    pub fn value(&mut self, value: Value<'_>) {
        write_descriptor(&mut self.out, VALUE);
        value.write(&mut self.out);
    }

    /// The encoded message.
    #[must_use]
    pub fn finish(self) -> Bytes {
        self.out.freeze()
    }

    /// Writes a section behind those of its rank, and moves later ones that were written already.
    fn section(&mut self, rank: usize, write: impl FnOnce(&mut BytesMut)) {
        let before = self.out.len();
        write(&mut self.out);
        let written = self.out.len().saturating_sub(before);
        let place = self.ends.get(rank).copied().unwrap_or(before);
        if let Some(moved) = self.out.get_mut(place..) {
            moved.rotate_right(written);
        }
        for end in self.ends.iter_mut().skip(rank) {
            *end = end.saturating_add(written);
        }
    }
}

fn write_descriptor(out: &mut BytesMut, code: u64) {
    out.extend_from_slice(&[0x00]);
    Value::Ulong(code).write(out);
}

fn write_map<'k>(
    out: &mut BytesMut,
    code: u64,
    key_type: fn(&'k str) -> Value<'k>,
    pairs: impl IntoIterator<Item = (&'k str, Value<'k>)>,
) {
    let mut pairs = pairs.into_iter().peekable();
    if pairs.peek().is_none() {
        return;
    }
    write_descriptor(out, code);
    write_compound(out, 0xc1, |out| {
        let mut count = 0u32;
        for (key, value) in pairs {
            key_type(key).write(out);
            value.write(out);
            count = count.saturating_add(2);
        }
        count
    });
}

fn write_properties(out: &mut BytesMut, properties: &Properties<'_>) {
    write_described(out, PROPERTIES, |out| {
        out.optional(properties.message_id.as_ref().map(MessageId::value));
        out.optional(properties.user_id.map(Value::Binary));
        out.optional(properties.to.map(Value::Str));
        out.optional(properties.subject.map(Value::Str));
        out.optional(properties.reply_to.map(Value::Str));
        out.optional(properties.correlation_id.as_ref().map(MessageId::value));
        // Symbols are ASCII: a type that is not is of no use to its reader.
        out.optional(
            properties
                .content_type
                .filter(|t| t.is_ascii())
                .map(Value::Symbol),
        );
        out.optional(
            properties
                .content_encoding
                .filter(|t| t.is_ascii())
                .map(Value::Symbol),
        );
        out.optional(properties.absolute_expiry_time.map(Value::Timestamp));
        out.optional(properties.creation_time.map(Value::Timestamp));
        out.optional(properties.group_id.map(Value::Str));
        out.uint(properties.group_sequence);
        out.optional(properties.reply_to_group_id.map(Value::Str));
    });
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
