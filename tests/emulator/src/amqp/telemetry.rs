//! Telemetry of devices: from AMQP messages to ledger lines (spec/amqp.md 5, spec/upstream.md
//! A6.1, B5).

use bytes::Bytes;
use edgehub_amqp::message::{BATCH_MESSAGE_FORMAT, Body, MessageView, batch_items};
use edgehub_amqp::performative::ErrorInfo;

use super::error::{ARGUMENT, MESSAGE_SIZE};
use super::message::{annotation, body, text};
use crate::clock::utc_text;
use crate::ledger::{Batch, Stamps};
use crate::limits::MESSAGE_BYTES_MAX;

/// One message with its properties by the names that IoT Hub gives them.
struct Telemetry {
    system: Vec<(&'static str, String)>,
    application: Vec<(String, Option<String>)>,
    body: Bytes,
}

/// Adds all messages of a delivery to the batch; returns how many they are.
///
/// # Errors
/// One of them is none that the hub takes: the delivery is to be rejected, and nothing was added.
pub(super) fn read(
    payload: &Bytes,
    message_format: u32,
    stamps: &Stamps,
    now_utc: &str,
    batch: &mut Batch,
) -> Result<u64, ErrorInfo> {
    let messages = match message_format {
        0 => vec![Telemetry::read(payload)?],
        BATCH_MESSAGE_FORMAT => {
            let envelope = parse(payload)?;
            if !matches!(envelope.body, Body::Data(_)) {
                return Err(argument("a batch has no data sections"));
            }
            let items = batch_items(&envelope.body);
            items.map(Telemetry::read).collect::<Result<_, _>>()?
        }
        _ => return Err(argument("the message format is unknown")),
    };
    let count = messages.len() as u64;
    for message in messages {
        let Telemetry {
            system,
            application,
            body,
        } = message;
        batch.push(stamps, now_utc, &system, &application, &body);
    }
    Ok(count)
}

impl Telemetry {
    fn read(payload: &Bytes) -> Result<Self, ErrorInfo> {
        let message = parse(payload)?;
        let body = body(&message).ok_or_else(|| argument("the body is neither data nor text"))?;
        let mut telemetry = Self {
            system: Vec::new(),
            application: Vec::new(),
            body,
        };
        telemetry.read_properties(&message);
        telemetry.read_application_properties(&message)?;
        let lengths = telemetry.system.iter().map(|(_, value)| value.len());
        let size = lengths.sum::<usize>() + telemetry.application_size() + telemetry.body.len();
        if size > MESSAGE_BYTES_MAX {
            let text = format!("a message of {size} bytes, {MESSAGE_BYTES_MAX} are the most");
            return Err(ErrorInfo::new(MESSAGE_SIZE, text));
        }
        Ok(telemetry)
    }

    fn read_properties(&mut self, message: &MessageView<'_>) {
        let properties = message.properties.clone().unwrap_or_default();
        let user_id = properties.user_id.map(String::from_utf8_lossy);
        let expiry = properties.absolute_expiry_time;
        let expiry = expiry.map(|ms| utc_text(u64::try_from(ms).unwrap_or(0)));
        let id = |id: Option<edgehub_amqp::message::MessageId>| id.map(|id| id.to_string());
        let named = |name| annotation(message, name).as_ref().and_then(text);
        let pairs = [
            ("message-id", id(properties.message_id)),
            ("correlation-id", id(properties.correlation_id)),
            ("user-id", user_id.map(Into::into)),
            ("to", properties.to.map(str::to_owned)),
            ("content-type", properties.content_type.map(str::to_owned)),
            (
                "content-encoding",
                properties.content_encoding.map(str::to_owned),
            ),
            ("absolute-expiry-time", expiry),
            ("dt-subject", named("dt-subject")),
            ("iothub-interface-id", named("iothub-interface-id")),
        ];
        let given = pairs.into_iter();
        let given = given.filter_map(|(name, value)| Some((name, value?)));
        // An empty text is as good as none.
        self.system
            .extend(given.filter(|(_, value)| !value.is_empty()));
    }

    fn read_application_properties(&mut self, message: &MessageView<'_>) -> Result<(), ErrorInfo> {
        let properties = message.application_properties.unwrap_or_default();
        for (key, value) in properties.iter() {
            let key = key.as_str().filter(|key| !key.is_empty());
            let key = key.ok_or_else(|| argument("an application property has no name"))?;
            if let (Some(name), Some(value)) = (system_name(key), text(&value)) {
                self.system.push((name, value));
            } else {
                self.application.push((key.to_owned(), text(&value)));
            }
        }
        Ok(())
    }

    fn application_size(&self) -> usize {
        let lengths = self.application.iter();
        let lengths =
            lengths.map(|(name, value)| name.len() + value.as_ref().map_or(0, String::len));
        lengths.sum()
    }
}

/// System properties that travel as application properties.
fn system_name(key: &str) -> Option<&'static str> {
    Some(match key {
        "iothub-creation-time-utc" => "iothub-creation-time-utc",
        "iothub-message-schema" => "iothub-message-schema",
        "iothub-outputname" => "iothub-outputname",
        _ => return None,
    })
}

fn parse(payload: &Bytes) -> Result<MessageView<'_>, ErrorInfo> {
    MessageView::parse(payload).map_err(|error| argument(&error.to_string()))
}

fn argument(text: &str) -> ErrorInfo {
    ErrorInfo::new(ARGUMENT, text)
}
