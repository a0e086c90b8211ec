//! The service side: messages to devices, and feedback on them (spec/upstream.md B8).

use bytes::Bytes;
use edgehub_amqp::connection::{Incoming, LinkId};
use edgehub_amqp::message::{MessageId, MessageView, MessageWriter, Properties};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use serde_json::{Value as Json, json};
use tracing::{info, warn};

use super::address;
use super::client::Client;
use super::error::{ARGUMENT, INTERNAL, MESSAGE_SIZE, NOT_FOUND, RESOURCE_LIMIT};
use super::message::{body, dotnet_order, text, timestamp};
use crate::c2d::{C2dError, FeedbackRecord, LockToken, Message, MessageError};
use crate::clock::utc_text;
use crate::hub::Hub;
use crate::identity::Identity;
use crate::ids::{uuid, uuid_bytes, uuid_text};
use crate::limits::C2D_TTL_MS_MAX;

const FEEDBACK_TYPE: &str = "application/vnd.microsoft.iothub.feedback.json";

impl Client<'_> {
    /// A message to a device: enqueued and accepted, or rejected.
    pub(super) fn service_message(&mut self, incoming: &Incoming) {
        let outcome = match self.enqueue(&incoming.payload) {
            Ok(()) => Outcome::Accepted,
            Err(error) => {
                let reason = error.description.as_deref().unwrap_or_default();
                info!(
                    connection = self.socket.id(),
                    reason, "c2d message rejected"
                );
                Outcome::Rejected(Some(error))
            }
        };
        self.engine.settle(incoming.received, outcome);
    }

    fn enqueue(&self, payload: &Bytes) -> Result<(), ErrorInfo> {
        let (hub, now_ms) = (self.hub, self.now_ms);
        let (device, message) = read(payload, now_ms)?;
        let message_id = message.message_id.clone();
        // Held over the step, so that nobody deletes the device in between.
        let devices = hub.devices();
        let known = devices.find(&device);
        known.map_err(|error| ErrorInfo::new(NOT_FOUND, error.to_string()))?;
        let sequence = hub
            .c2d
            .send(&device, message, now_ms)
            .map_err(|error| rejection(&error))?;
        drop(devices);
        info!(device, sequence, message_id, "c2d message enqueued");
        hub.sessions.wake(&Identity {
            device,
            module: None,
        });
        Ok(())
    }

    /// Feedback, as far as credit goes.
    pub(super) fn pump_feedback(&mut self, id: LinkId) -> bool {
        while self.engine.can_send(id) {
            let token = uuid_bytes();
            let records = self.hub.c2d.feedback.take(token, self.now_ms);
            if records.is_empty() {
                return false;
            }
            let message = feedback_message(self.hub, token, &records, self.now_ms);
            let sent = self.send(id, &dotnet_order(token), false, message);
            if let (Some(sent), Some(link)) = (sent, self.links.get_mut(&id)) {
                link.locked.insert(sent, token);
            }
        }
        true
    }

    /// What the receiver did with a batch of feedback.
    pub(super) fn feedback_settled(&mut self, token: LockToken, outcome: Option<&Outcome>) {
        let is_done = match outcome {
            Some(Outcome::Accepted | Outcome::Rejected(_)) => true,
            Some(Outcome::Released | Outcome::Modified { .. }) => false,
            // Its lock runs out.
            None => return,
        };
        match self.hub.c2d.feedback.settle(token, is_done, self.now_ms) {
            Ok(true) => {}
            Ok(false) => warn!("the lock of a feedback batch was lost"),
            Err(error) => warn!(%error, "feedback not settled"),
        }
    }
}

/// A message of the service, and the device that it is for.
fn read(payload: &Bytes, now_ms: u64) -> Result<(String, Message), ErrorInfo> {
    let argument = |text: String| ErrorInfo::new(ARGUMENT, text);
    let message = MessageView::parse(payload).map_err(|error| argument(error.to_string()))?;
    let body =
        body(&message).ok_or_else(|| argument("the body is neither data nor text".into()))?;
    let properties = message.properties.clone().unwrap_or_default();
    let device = properties.to.and_then(address::device_of);
    let device = device.ok_or_else(|| argument("`to` names no device".into()))?;
    let expiry_ms = properties.absolute_expiry_time;
    let expiry_ms = expiry_ms.map(|ms| u64::try_from(ms).unwrap_or(0));
    if expiry_ms.is_some_and(|ms| ms > now_ms.saturating_add(C2D_TTL_MS_MAX)) {
        return Err(argument("the expiry is more than two days away".into()));
    }
    let (mut ack, mut own) = (None, Vec::new());
    for (name, value) in message.application_properties.unwrap_or_default().iter() {
        let name = name.as_str().unwrap_or_default();
        let value = text(&value).unwrap_or_default();
        if name != "iothub-ack" {
            own.push((name.to_owned(), value));
        } else if ["none", "positive", "negative", "full"].contains(&value.as_str()) {
            ack = Some(value);
        } else {
            return Err(argument("iothub-ack is unknown".into()));
        }
    }
    let id = |id: MessageId| id.to_string();
    let user_id = properties.user_id.map(String::from_utf8_lossy);
    let message = Message {
        message_id: properties.message_id.map_or_else(uuid, id),
        correlation_id: properties.correlation_id.map(id),
        user_id: user_id.map(Into::into),
        content_type: properties.content_type.map(str::to_owned),
        content_encoding: properties.content_encoding.map(str::to_owned),
        ack,
        expiry_ms,
        properties: own,
        body: body.into(),
    };
    Ok((device, message))
}

fn rejection(error: &C2dError) -> ErrorInfo {
    let condition = match error {
        C2dError::Full => RESOURCE_LIMIT,
        C2dError::Message(MessageError::Size(_)) => MESSAGE_SIZE,
        C2dError::Message(_) => ARGUMENT,
        C2dError::Fenced | C2dError::Journal(_) | C2dError::LockLost | C2dError::PacketId(_) => {
            INTERNAL
        }
    };
    ErrorInfo::new(condition, error.to_string())
}

fn feedback_message(hub: &Hub, token: LockToken, records: &[FeedbackRecord], now_ms: u64) -> Bytes {
    let devices = hub.devices();
    let records: Vec<Json> = records
        .iter()
        .map(|record| {
            let (status_code, description) = record.status();
            let generation = devices.get(&record.device);
            json!({
                "originalMessageId": record.message_id,
                "enqueuedTimeUtc": utc_text(record.settled_ms),
                "statusCode": status_code,
                "description": description,
                "deviceId": record.device,
                "deviceGenerationId": generation.map(|device| &device.generation_id),
            })
        })
        .collect();
    let lock_token = uuid_text(token);
    let mut writer = MessageWriter::new();
    writer.annotations([
        ("iothub-enqueuedtime", timestamp(now_ms)),
        (
            "x-opt-lock-token",
            edgehub_amqp::value::Value::Str(&lock_token),
        ),
    ]);
    writer.properties(&Properties {
        message_id: Some(MessageId::Str(uuid().into())),
        user_id: Some(hub.hostname.as_bytes()),
        to: Some("/messages/serviceBound/feedback"),
        content_type: Some(FEEDBACK_TYPE),
        content_encoding: Some("utf-8"),
        ..Properties::default()
    });
    writer.data(Json::Array(records).to_string().as_bytes());
    writer.finish()
}
