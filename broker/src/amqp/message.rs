//! Messages between AMQP's sections and the hub's form (spec/amqp.md 5, spec/core.md 1.2).
//!
//! The sender is the link's identity and never read from a message (design.md D4): stamps that a
//! client writes itself count for nothing.

use std::collections::HashSet;

use bytes::Bytes;
use edgehub_amqp::message::{Body, MessageView, MessageWriter, Properties};
use edgehub_amqp::value::{DecodeError, Value};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{Message, Property, SystemProperty};
use edgehub_proto::timestamp::Timestamp;

/// Application properties that are system properties inside (spec/amqp.md 5).
const APPLICATION: [(&str, SystemProperty); 4] = [
    ("iothub-creation-time-utc", SystemProperty::CreationTime),
    ("iothub-message-schema", SystemProperty::MessageSchema),
    ("iothub-operation", SystemProperty::Operation),
    ("iothub-outputname", SystemProperty::OutputName),
];

/// Annotations that clients may set (spec/amqp.md 5).
const ANNOTATIONS: [(&str, SystemProperty); 2] = [
    ("dt-subject", SystemProperty::Subject),
    ("iothub-interface-id", SystemProperty::InterfaceId),
];

/// Why bytes are no message that this hub takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    /// The sections cannot be read.
    #[error("the message cannot be read: {0}")]
    Decode(#[from] DecodeError),
    /// The body is of a kind that has no bytes.
    #[error("the body is neither data nor a text or binary value")]
    Body,
    /// IoT Hub takes no such message: it would be lost on its way.
    #[error("an application property has no name")]
    NoName,
    /// Two names of properties differ in their case alone.
    #[error("two application properties have the same name")]
    Repeated,
    /// A time that is none.
    #[error("a time is not between the years 1970 and 9999")]
    Time,
}

/// Reads a message of a client.
pub(super) fn read(payload: &Bytes) -> Result<Message, MessageError> {
    from_view(&MessageView::parse(payload)?)
}

/// Takes what counts of a message that was read.
pub(super) fn from_view(view: &MessageView<'_>) -> Result<Message, MessageError> {
    let mut message = Message {
        body: body(&view.body)?,
        ..Message::default()
    };
    if let Some(properties) = &view.properties {
        take_properties(properties, &mut message)?;
    }
    if let Some(annotations) = view.message_annotations {
        for (key, property) in ANNOTATIONS {
            let value = annotations.get_symbol(key).and_then(|value| text(value));
            set(&mut message, property, value);
        }
    }
    if let Some(application) = view.application_properties {
        let mut names = HashSet::with_capacity(application.len());
        for (key, value) in application.iter() {
            // Keys are strings by the standard; others are read as text.
            let Some(key) = text(key) else { continue };
            if key.is_empty() {
                return Err(MessageError::NoName);
            }
            if !names.insert(key.to_ascii_lowercase()) {
                return Err(MessageError::Repeated);
            }
            let value = text(value);
            match APPLICATION.iter().find(|(name, _)| **name == *key) {
                Some((_, property)) => set(&mut message, *property, value),
                None => message.properties.push(Property { key, value }),
            }
        }
    }
    Ok(message)
}

fn take_properties(properties: &Properties<'_>, message: &mut Message) -> Result<(), MessageError> {
    let user = properties.user_id.map(String::from_utf8_lossy);
    let owned = |text: Option<&str>| text.map(str::to_owned);
    for (property, value) in [
        (
            SystemProperty::MessageId,
            properties.message_id.as_ref().map(ToString::to_string),
        ),
        (
            SystemProperty::CorrelationId,
            properties.correlation_id.as_ref().map(ToString::to_string),
        ),
        (
            SystemProperty::UserId,
            user.map(std::borrow::Cow::into_owned),
        ),
        (SystemProperty::To, owned(properties.to)),
        (SystemProperty::ContentType, owned(properties.content_type)),
        (
            SystemProperty::ContentEncoding,
            owned(properties.content_encoding),
        ),
    ] {
        set(message, property, value);
    }
    if let Some(expiry) = properties.absolute_expiry_time {
        let time = time(expiry).ok_or(MessageError::Time)?;
        set(message, SystemProperty::ExpiryTime, Some(time));
    }
    Ok(())
}

/// Empty values are as good as none (spec/core.md 1.2).
fn set(message: &mut Message, property: SystemProperty, value: Option<String>) {
    if let Some(value) = value.filter(|value| !value.is_empty()) {
        message.system.set(property, value);
    }
}

fn time(unix_ms: i64) -> Option<String> {
    /// The last millisecond of 9999, which is .NET's largest.
    const LAST_MS: u64 = 253_402_300_799_999;
    let unix_ms = u64::try_from(unix_ms).ok().filter(|ms| *ms <= LAST_MS)?;
    Some(Timestamp::from_unix_ms(unix_ms).to_string())
}

/// A property's value as text; what is no text is written as one.
fn text(value: Value<'_>) -> Option<String> {
    Some(match value {
        Value::Str(text) | Value::Symbol(text) => text.to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Double(value) => value.to_string(),
        Value::Char(code) => char::from_u32(code)?.to_string(),
        Value::Timestamp(unix_ms) => time(unix_ms)?,
        Value::Uuid(bytes) => guid_text(bytes),
        Value::Binary(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        other => match other.as_i64() {
            Some(number) => number.to_string(),
            None => other.as_u64()?.to_string(),
        },
    })
}

fn body(body: &Body<'_>) -> Result<Bytes, MessageError> {
    match body {
        Body::Empty => Ok(Bytes::new()),
        Body::Data(sections) => Ok(match &sections[..] {
            [one] => one.clone(),
            several => several.concat().into(),
        }),
        Body::Value(Value::Str(text)) => Ok(Bytes::copy_from_slice(text.as_bytes())),
        Body::Value(Value::Binary(bytes)) => Ok(Bytes::copy_from_slice(bytes)),
        Body::Value(Value::Null) => Ok(Bytes::new()),
        Body::Value(_) | Body::Sequence(_) => Err(MessageError::Body),
    }
}

/// A uuid in the order of RFC 4122, as lower-case text.
pub(super) fn guid_text(bytes: [u8; 16]) -> String {
    let number = format!("{:032x}", u128::from_be_bytes(bytes));
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    parts
        .map(|part| number.get(part).unwrap_or_default())
        .join("-")
}

/// The uuid of a text, in the order of RFC 4122.
pub(super) fn guid_bytes(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 {
        return None;
    }
    let number = u128::from_str_radix(&digits, 16).ok()?;
    Some(number.to_be_bytes())
}

/// The text of the GUID whose bytes a delivery tag is: .NET writes the first three fields with
/// their lowest byte first (spec/amqp.md 4.2).
pub(super) fn lock_token(tag: [u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = tag;
    let mut ordered = [d, c, b, a, f, e, h, g, 0, 0, 0, 0, 0, 0, 0, 0];
    for (to, from) in ordered.iter_mut().skip(8).zip(rest) {
        *to = from;
    }
    guid_text(ordered)
}

/// What a delivery is to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    /// A message for a module's input.
    Input(&'a str),
    /// A cloud-to-device message.
    CloudToDevice,
}

/// Writes a message for a client.
pub(super) fn write(
    message: &Message,
    kind: Kind<'_>,
    sender: &Identity,
    target: &Identity,
    tag: [u8; 16],
) -> Bytes {
    let system = |property| message.system.get(property);
    let mut writer = MessageWriter::new();
    let lock_token = lock_token(tag);
    let enqueued = system(SystemProperty::EnqueuedTime).and_then(timestamp);
    let count = system(SystemProperty::DeliveryCount).and_then(|count| count.parse().ok());
    let sequence = system(SystemProperty::SequenceNumber).and_then(|number| number.parse().ok());
    let mut annotations = vec![("x-opt-lock-token", Value::Str(&lock_token))];
    annotations.extend(enqueued.map(|time| ("iothub-enqueuedtime", time)));
    annotations.extend(count.map(|count| ("iothub-deliverycount", Value::Ubyte(count))));
    annotations.extend(
        sequence
            .filter(|number| *number > 0)
            .map(|number| ("x-opt-sequence-number", Value::Ulong(number))),
    );
    let subject = system(SystemProperty::Subject);
    annotations.extend(subject.map(|subject| ("dt-subject", Value::Str(subject))));
    if let Kind::Input(input) = kind {
        annotations.push(("x-opt-input-name", Value::Str(input)));
        let reported = system(SystemProperty::ReportedSenderDeviceId);
        let (device, module) = match reported {
            Some(device) => (device, system(SystemProperty::ReportedSenderModuleId)),
            None => (sender.device_id(), sender.module_id()),
        };
        annotations.push(("iothub-connection-device-id", Value::Str(device)));
        annotations.extend(module.map(|id| ("iothub-connection-module-id", Value::Str(id))));
    }
    writer.annotations(annotations);

    let own_address = edgehub_proto::amqp_address::identity_path(target);
    let id = |property| {
        let text = system(property)?;
        Some(edgehub_amqp::message::MessageId::Str(text.into()))
    };
    writer.properties(&Properties {
        message_id: id(SystemProperty::MessageId),
        correlation_id: id(SystemProperty::CorrelationId),
        user_id: system(SystemProperty::UserId).map(str::as_bytes),
        to: match kind {
            Kind::CloudToDevice => Some(&own_address),
            Kind::Input(_) => system(SystemProperty::To),
        },
        content_type: system(SystemProperty::ContentType),
        content_encoding: system(SystemProperty::ContentEncoding),
        absolute_expiry_time: system(SystemProperty::ExpiryTime)
            .and_then(Timestamp::parse)
            .and_then(|time| i64::try_from(time.unix_ms()).ok()),
        ..Properties::default()
    });

    let own = APPLICATION
        .iter()
        .filter(|(_, property)| *property != SystemProperty::OutputName)
        .filter_map(|(key, property)| Some((*key, Value::Str(system(*property)?))));
    let ack = system(SystemProperty::Ack).map(|ack| ("iothub-ack", Value::Str(ack)));
    let others = message.properties.iter().map(|property| {
        let value = property.value.as_deref();
        (property.key.as_str(), Value::Str(value.unwrap_or_default()))
    });
    writer.application_properties(own.chain(ack).chain(others));
    writer.data(&message.body);
    writer.finish()
}

fn timestamp(text: &str) -> Option<Value<'static>> {
    let time = Timestamp::parse(text)?;
    i64::try_from(time.unix_ms()).ok().map(Value::Timestamp)
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
