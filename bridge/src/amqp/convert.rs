//! Messages between their stored form and AMQP (spec/upstream.md A6.1, spec/amqp.md 5).

use bytes::Bytes;
use edgehub_amqp::{
    message::{Body, MessageId, MessageView, MessageWriter, Properties},
    value::{DecodeError, Map, Value},
};
use edgehub_proto::{
    message::{Message, Property, SECURITY_INTERFACE, SystemProperty},
    timestamp::Timestamp,
};

/// A message on its way up, encoded. What upstream stamps itself, and what only this hub's routes
/// read, is left out.
pub(super) fn encode(message: &Message) -> Bytes {
    let system = |property| message.system.get(property);
    let text = |property| system(property).filter(|text| !text.is_empty());
    let mut writer = MessageWriter::new();
    let interface = system(SystemProperty::InterfaceId)
        .filter(|value| value.eq_ignore_ascii_case(SECURITY_INTERFACE));
    let annotations = [
        (
            SystemProperty::Subject.name(),
            text(SystemProperty::Subject),
        ),
        (SystemProperty::InterfaceId.name(), interface),
    ];
    let annotations = annotations.into_iter();
    writer.annotations(annotations.filter_map(|(key, text)| Some((key, Value::Str(text?)))));
    let id = |property| text(property).map(|text| MessageId::Str(text.into()));
    let properties = Properties {
        message_id: id(SystemProperty::MessageId),
        correlation_id: id(SystemProperty::CorrelationId),
        user_id: text(SystemProperty::UserId).map(str::as_bytes),
        to: text(SystemProperty::To),
        content_type: text(SystemProperty::ContentType),
        content_encoding: text(SystemProperty::ContentEncoding),
        ..Properties::default()
    };
    if properties != Properties::default() {
        writer.properties(&properties);
    }
    let named = [
        (CREATION_TIME, text(SystemProperty::CreationTime)),
        (MESSAGE_SCHEMA, text(SystemProperty::MessageSchema)),
    ];
    let named = named.into_iter();
    let named = named.filter_map(|(key, text)| Some((key, Value::Str(text?))));
    let own = message.properties.iter().map(|property| {
        let value = property.value.as_deref().map_or(Value::Null, Value::Str);
        (property.key.as_str(), value)
    });
    writer.application_properties(own.chain(named));
    writer.data(&message.body);
    writer.finish()
}

const CREATION_TIME: &str = "iothub-creation-time-utc";
const MESSAGE_SCHEMA: &str = "iothub-message-schema";
const OPERATION: &str = "iothub-operation";

/// A cloud-to-device message that came, and whether it was delivered before.
pub(super) fn cloud_to_device(payload: &Bytes, tag: &[u8]) -> Result<(Message, bool), DecodeError> {
    let view = MessageView::parse(payload)?;
    let mut message = Message {
        body: body(&view.body),
        ..Message::default()
    };
    let mut set = |property, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            message.system.set(property, value);
        }
    };
    if let Some(properties) = &view.properties {
        let text = |text: Option<&str>| text.map(str::to_owned);
        let id = |id: &Option<MessageId>| id.as_ref().map(ToString::to_string);
        set(SystemProperty::MessageId, id(&properties.message_id));
        set(
            SystemProperty::CorrelationId,
            id(&properties.correlation_id),
        );
        let user = properties.user_id;
        let user = user.map(|user| String::from_utf8_lossy(user).into_owned());
        set(SystemProperty::UserId, user);
        set(SystemProperty::To, text(properties.to));
        set(SystemProperty::ContentType, text(properties.content_type));
        set(
            SystemProperty::ContentEncoding,
            text(properties.content_encoding),
        );
        let expiry = properties.absolute_expiry_time.map(time);
        set(SystemProperty::ExpiryTime, expiry);
    }
    let mut deliveries = u64::from(view.delivery_count);
    let mut lock_token = uuid_of_tag(tag);
    for (key, value) in view.message_annotations.iter().flat_map(Map::iter) {
        match key.as_str() {
            Some("iothub-enqueuedtime") => {
                set(SystemProperty::EnqueuedTime, value.as_timestamp().map(time));
            }
            Some("iothub-deliverycount") => {
                if let Some(count) = value.as_u64() {
                    deliveries = deliveries.max(count);
                    set(SystemProperty::DeliveryCount, Some(count.to_string()));
                }
            }
            Some("x-opt-sequence-number") => {
                let number = value.as_u64().map(|number| number.to_string());
                set(SystemProperty::SequenceNumber, number);
            }
            Some("x-opt-lock-token") => lock_token = text_of(&value).or(lock_token),
            Some("dt-subject") => set(SystemProperty::Subject, text_of(&value)),
            _ => {}
        }
    }
    set(SystemProperty::LockToken, lock_token);
    let application = view.application_properties.iter();
    for (key, value) in application.flat_map(Map::iter) {
        let Some(key) = key.as_str() else { continue };
        match key {
            CREATION_TIME => message.set_system(SystemProperty::CreationTime, &value),
            MESSAGE_SCHEMA => message.set_system(SystemProperty::MessageSchema, &value),
            OPERATION => message.set_system(SystemProperty::Operation, &value),
            _ => message.properties.push(Property {
                key: key.to_owned(),
                value: text_of(&value),
            }),
        }
    }
    Ok((message, deliveries > 0))
}

trait SetSystem {
    fn set_system(&mut self, property: SystemProperty, value: &Value<'_>);
}

impl SetSystem for Message {
    fn set_system(&mut self, property: SystemProperty, value: &Value<'_>) {
        if let Some(text) = text_of(value).filter(|text| !text.is_empty()) {
            self.system.set(property, text);
        }
    }
}

/// A direct method that came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) name: String,
    /// Goes into the answer with its type.
    pub(super) correlation: MessageId,
    pub(super) payload: Bytes,
}

/// Reads a direct method; none when it has no name or nothing to answer by.
pub(super) fn call(payload: &Bytes) -> Option<Call> {
    let view = MessageView::parse(payload).ok()?;
    let name = view
        .application_properties?
        .get_str("IoThub-methodname")
        .and_then(|name| name.as_str())
        .filter(|name| !name.is_empty())?;
    Some(Call {
        name: name.to_owned(),
        correlation: own(view.properties?.correlation_id?),
        payload: body(&view.body),
    })
}

/// The answer to a direct method.
pub(super) fn answer(correlation: MessageId, status: i32, payload: &[u8]) -> Bytes {
    let mut writer = MessageWriter::new();
    writer.properties(&Properties {
        correlation_id: Some(correlation),
        ..Properties::default()
    });
    writer.application_properties([("IoThub-status", Value::Int(status))]);
    writer.data(payload);
    writer.finish()
}

/// A request to the twin.
pub(super) fn twin_request(
    operation: &str,
    resource: Option<&str>,
    correlation: &str,
    payload: &[u8],
) -> Bytes {
    let mut writer = MessageWriter::new();
    let resource = resource.map(|resource| ("resource", Value::Str(resource)));
    let version = (operation == "PATCH").then_some(("version", Value::Null));
    let operation = [("operation", Value::Str(operation))];
    writer.annotations(operation.into_iter().chain(resource).chain(version));
    writer.properties(&Properties {
        correlation_id: Some(MessageId::Str(correlation.into())),
        ..Properties::default()
    });
    writer.data(payload);
    writer.finish()
}

/// What came on a twin's link.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TwinNews {
    /// Of the request that it answers; none: desired properties have changed.
    pub(super) correlation: Option<String>,
    pub(super) status: Option<i64>,
    pub(super) version: Option<u64>,
    pub(super) body: Bytes,
}

/// Reads an answer or a change of the twin.
pub(super) fn twin_news(payload: &Bytes) -> Result<TwinNews, DecodeError> {
    let view = MessageView::parse(payload)?;
    let annotation = |name| {
        let map = view.message_annotations.as_ref()?;
        map.get_symbol(name).or_else(|| map.get_str(name))
    };
    let properties = view.properties.as_ref();
    Ok(TwinNews {
        correlation: properties
            .and_then(|properties| properties.correlation_id.as_ref())
            .map(ToString::to_string)
            .filter(|text| !text.is_empty()),
        status: annotation("status").and_then(|status| status.as_i64()),
        version: annotation("version").and_then(|version| version.as_u64()),
        body: body(&view.body),
    })
}

/// The bytes of a body, in a buffer of their own: a slice would keep whole frames in memory.
fn body(body: &Body<'_>) -> Bytes {
    match body {
        Body::Data(sections) => match &sections[..] {
            [one] => Bytes::copy_from_slice(one),
            many => Bytes::from(many.concat()),
        },
        Body::Value(Value::Str(text)) => Bytes::copy_from_slice(text.as_bytes()),
        Body::Value(Value::Binary(bytes)) => Bytes::copy_from_slice(bytes),
        Body::Value(_) | Body::Empty | Body::Sequence(_) => Bytes::new(),
    }
}

fn own(id: MessageId) -> MessageId {
    match id {
        MessageId::Binary(bytes) => MessageId::Binary(Bytes::copy_from_slice(&bytes)),
        other => other,
    }
}

/// A value as text; none for null and for what is no single value.
fn text_of(value: &Value<'_>) -> Option<String> {
    Some(match value {
        Value::Str(text) | Value::Symbol(text) => (*text).to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Uuid(id) => MessageId::Uuid(*id).to_string(),
        Value::Timestamp(at) => time(*at),
        Value::Float(value) => value.to_string(),
        Value::Double(value) => value.to_string(),
        other => match (other.as_u64(), other.as_i64()) {
            (Some(number), _) => number.to_string(),
            (None, Some(number)) => number.to_string(),
            (None, None) => return None,
        },
    })
}

fn time(unix_ms: i64) -> String {
    Timestamp::from_unix_ms(u64::try_from(unix_ms).unwrap_or(0)).to_string()
}

/// A lock token is the tag's GUID, whose first three fields .NET writes little-endian.
fn uuid_of_tag(tag: &[u8]) -> Option<String> {
    let [a, b, c, d, e, f, g, h, rest @ ..] = tag.first_chunk::<16>()?;
    let mut id = [0; 16];
    let (head, tail) = id.split_at_mut(8);
    head.copy_from_slice(&[*d, *c, *b, *a, *f, *e, *h, *g]);
    tail.copy_from_slice(rest);
    (tag.len() == 16).then(|| MessageId::Uuid(id).to_string())
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
