//! The Event-Hubs-compatible end point: what it says of itself, and readers of the ledger
//! (spec/upstream.md B8.2). There is one partition, `0`; an offset is a sequence number.

use std::collections::VecDeque;

use bytes::Bytes;
use edgehub_amqp::connection::{Attach, Incoming, LinkId};
use edgehub_amqp::message::{MessageId, MessageView, MessageWriter, Properties};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use edgehub_amqp::value::Value;
use serde::Deserialize;
use serde_json::Value as Json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::warn;

use super::client::{Client, Role};
use super::error::{ARGUMENT, INTERNAL, NOT_FOUND};
use super::message::{MapValue, map, text, timestamp};
use super::selector::{SELECTOR, Start};
use crate::clock::utc_text;
use crate::limits::EVENTS_READ_BYTES;

const PARTITION: &str = "0";

/// Where a reader stands.
pub(super) struct Reader {
    next: u64,
    /// Lines that were read and not sent, the first of them is `next`.
    lines: VecDeque<String>,
}

/// A ledger line, as far as a reader hands it on.
#[derive(Deserialize)]
struct Line {
    sequence: u64,
    enqueued_utc: String,
    device_id: String,
    system: serde_json::Map<String, Json>,
    properties: serde_json::Map<String, Json>,
    body_base64: String,
}

impl Client<'_> {
    /// A reader that begins where the source's selector says, without one at the beginning.
    pub(super) fn reader(&self, attach: &Attach, partition: &str) -> Result<Reader, ErrorInfo> {
        if partition != PARTITION {
            return Err(ErrorInfo::new(NOT_FOUND, "there is no such partition"));
        }
        let ledger = &self.hub.ledger;
        let start = match attach.filter(SELECTOR) {
            None => Start::Sequence(0),
            Some(selector) => Start::parse(&selector).ok_or_else(|| {
                let text = format!("the selector {selector:?} is not supported");
                ErrorInfo::new(ARGUMENT, text)
            })?,
        };
        let next = match start {
            Start::Latest => ledger.count(),
            Start::Sequence(next) => next,
            Start::Time(ms) => ledger
                .first_at(&utc_text(ms))
                .map_err(|error| ErrorInfo::new(INTERNAL, error.to_string()))?,
        };
        Ok(Reader {
            next,
            lines: VecDeque::new(),
        })
    }

    /// Events, as far as credit goes.
    pub(super) fn pump_events(&mut self, id: LinkId) -> bool {
        while self.engine.can_send(id) {
            let Some(link) = self.links.get_mut(&id) else {
                return false;
            };
            let Role::Events(reader) = &mut link.role else {
                return false;
            };
            if reader.lines.is_empty() {
                match self.hub.ledger.lines(reader.next, EVENTS_READ_BYTES) {
                    Ok(lines) => reader.lines.extend(lines),
                    Err(error) => {
                        warn!(%error, "the ledger is not readable");
                        let error = ErrorInfo::new(INTERNAL, "the events are not readable");
                        self.detach(id, Some(&error));
                        return false;
                    }
                }
            }
            let Some(line) = reader.lines.pop_front() else {
                return false;
            };
            reader.next += 1;
            let tag = link.next_tag();
            match serde_json::from_str::<Line>(&line) {
                Ok(line) => {
                    let message = line.message();
                    self.send(id, &tag, true, message);
                }
                Err(error) => warn!(%error, "a ledger line is unreadable"),
            }
        }
        true
    }

    /// A request about the event hub or its partition.
    pub(super) fn management(&mut self, incoming: &Incoming) {
        let request = match MessageView::parse(&incoming.payload) {
            Ok(request) => request,
            Err(error) => {
                let error = ErrorInfo::new(ARGUMENT, error.to_string());
                let outcome = Outcome::Rejected(Some(error));
                return self.engine.settle(incoming.received, outcome);
            }
        };
        let properties = request.properties.clone().unwrap_or_default();
        let (status, description, body) = self.describe(&request);
        let mut writer = MessageWriter::new();
        writer.properties(&Properties {
            correlation_id: properties.message_id.clone(),
            to: properties.reply_to,
            ..Properties::default()
        });
        writer.application_properties([
            ("status-code", Value::Int(status)),
            ("status-description", Value::Str(description)),
        ]);
        let mut encoded = body.as_slice();
        writer.value(Value::read(&mut encoded).unwrap_or(Value::Null));
        let message = writer.finish();
        let responses = self.links.iter().filter_map(|(id, link)| match &link.role {
            Role::ManagementResponses(address) => Some((*id, address.as_deref())),
            _ => None,
        });
        let responses: Vec<_> = responses.collect();
        let named = responses
            .iter()
            .find(|(_, address)| address.is_some() && *address == properties.reply_to);
        let link = named.or_else(|| responses.iter().max_by_key(|(id, _)| *id));
        let link = link.map(|(id, _)| *id);
        self.engine.settle(incoming.received, Outcome::Accepted);
        if let Some(link) = link {
            self.answer(link, message);
        }
    }

    /// Status, its text and the encoded body of an answer.
    fn describe(&self, request: &MessageView<'_>) -> (i32, &'static str, Vec<u8>) {
        let properties = request.application_properties.unwrap_or_default();
        let get = |name| properties.get_str(name).as_ref().and_then(text);
        let entity = self.hub.event_hub();
        let operation = get("operation").unwrap_or_default();
        let kind = get("type").unwrap_or_default();
        if !operation.eq_ignore_ascii_case("READ") {
            return (400, "the operation is unknown", Vec::new());
        }
        let name = get("name").unwrap_or_default();
        if !name.eq_ignore_ascii_case(&entity) {
            return (404, "there is no such event hub", Vec::new());
        }
        let str = |text| MapValue::One(Value::Str(text));
        match kind.as_str() {
            "com.microsoft:eventhub" => {
                let body = map([
                    ("name", str(&entity)),
                    ("type", str(&kind)),
                    ("created_at", MapValue::One(timestamp(0))),
                    ("partition_count", MapValue::One(Value::Int(1))),
                    ("partition_ids", MapValue::Strings(&[PARTITION])),
                ]);
                (200, "OK", body)
            }
            "com.microsoft:partition" if get("partition").as_deref() == Some(PARTITION) => {
                (200, "OK", self.describe_partition(&entity, &kind))
            }
            "com.microsoft:partition" => (404, "there is no such partition", Vec::new()),
            _ => (400, "the type is unknown", Vec::new()),
        }
    }

    fn describe_partition(&self, entity: &str, kind: &str) -> Vec<u8> {
        let count = self.hub.ledger.count();
        let last = i64::try_from(count).unwrap_or(i64::MAX) - 1;
        let lines = self.hub.ledger.lines(count.saturating_sub(1), 0);
        let line = lines.ok().and_then(|mut lines| lines.pop());
        let line = line.and_then(|line| serde_json::from_str::<Line>(&line).ok());
        let enqueued_ms = line.map_or(0, |line| unix_ms(&line.enqueued_utc));
        let offset = last.to_string();
        let one = MapValue::One;
        map([
            ("name", one(Value::Str(entity))),
            ("type", one(Value::Str(kind))),
            ("partition", one(Value::Str(PARTITION))),
            ("begin_sequence_number", one(Value::Long(0))),
            ("last_enqueued_sequence_number", one(Value::Long(last))),
            ("last_enqueued_offset", one(Value::Str(&offset))),
            ("last_enqueued_time_utc", one(timestamp(enqueued_ms))),
            ("is_partition_empty", one(Value::Bool(count == 0))),
        ])
    }
}

impl Line {
    /// The event: what its sender said in properties, what the hub says in annotations.
    fn message(&self) -> Bytes {
        use base64::Engine;
        let sequence = i64::try_from(self.sequence).unwrap_or(i64::MAX);
        let offset = sequence.to_string();
        let enqueued = timestamp(unix_ms(&self.enqueued_utc));
        let own = |name: &str| self.system.get(name).and_then(Json::as_str);
        let hub = [
            ("x-opt-sequence-number", Value::Long(sequence)),
            ("x-opt-offset", Value::Str(&offset)),
            ("x-opt-enqueued-time", enqueued),
            ("x-opt-partition-key", Value::Str(&self.device_id)),
            ("iothub-enqueuedtime", enqueued),
        ];
        let stamps = self.system.iter().filter(|(name, _)| !is_property(name));
        let stamps =
            stamps.filter_map(|(name, value)| Some((name.as_str(), Value::Str(value.as_str()?))));
        let id = |name| own(name).map(|id| MessageId::Str(id.into()));
        let expiry = own("absolute-expiry-time").map(unix_ms);
        let mut writer = MessageWriter::new();
        writer.annotations(hub.into_iter().chain(stamps));
        writer.properties(&Properties {
            message_id: id("message-id"),
            correlation_id: id("correlation-id"),
            user_id: own("user-id").map(str::as_bytes),
            to: own("to"),
            content_type: own("content-type"),
            content_encoding: own("content-encoding"),
            absolute_expiry_time: expiry.and_then(|ms| i64::try_from(ms).ok()),
            ..Properties::default()
        });
        let properties = self.properties.iter().map(|(name, value)| {
            let value = value.as_str().map_or(Value::Null, Value::Str);
            (name.as_str(), value)
        });
        writer.application_properties(properties);
        let body = base64::engine::general_purpose::STANDARD.decode(&self.body_base64);
        writer.data(&body.unwrap_or_default());
        writer.finish()
    }
}

/// System properties that travel in the properties section, and the time, which is no text.
fn is_property(name: &str) -> bool {
    matches!(
        name,
        "message-id"
            | "correlation-id"
            | "user-id"
            | "to"
            | "content-type"
            | "content-encoding"
            | "absolute-expiry-time"
            | "iothub-enqueuedtime"
    )
}

/// A time of the ledger; 0 for what is none.
fn unix_ms(utc: &str) -> u64 {
    let moment = OffsetDateTime::parse(utc, &Rfc3339);
    let ms = moment.map(|moment| moment.unix_timestamp_nanos() / 1_000_000);
    ms.ok().and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0)
}
