//! Cloud-to-device messages: sent here, for as long as the emulator has no service side over AMQP.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use super::{Control, Refused, wait_until};
use crate::c2d::{C2dError, Message, MessageError, Queued, Settled};
use crate::clock::utc_text;
use crate::identity::Identity;
use crate::ids::uuid;
use crate::limits::C2D_TTL_MS_MAX;
use crate::registry::Devices;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SendRequest {
    body: Option<String>,
    body_base64: Option<String>,
    message_id: Option<String>,
    correlation_id: Option<String>,
    user_id: Option<String>,
    content_type: Option<String>,
    content_encoding: Option<String>,
    ack: Option<String>,
    ttl_ms: Option<u64>,
    #[serde(default)]
    properties: BTreeMap<String, String>,
}

impl SendRequest {
    fn into_message(self, now_ms: u64) -> Result<Message, Refused> {
        let body = match (self.body, self.body_base64) {
            (Some(_), Some(_)) => return Err(Refused::bad("body and body_base64 are both given")),
            (Some(text), None) => text.into_bytes(),
            (None, Some(text)) => {
                let body = STANDARD.decode(text);
                body.map_err(|_| Refused::bad("body_base64 is not base64"))?
            }
            (None, None) => Vec::new(),
        };
        let acks = ["none", "positive", "negative", "full"];
        if self.ack.as_ref().is_some_and(|ack| !acks.contains(&&**ack)) {
            return Err(Refused::bad("ack is unknown"));
        }
        if self.ttl_ms.is_some_and(|ttl_ms| ttl_ms > C2D_TTL_MS_MAX) {
            return Err(Refused::bad("ttl_ms is more than two days"));
        }
        Ok(Message {
            message_id: self.message_id.unwrap_or_else(uuid),
            correlation_id: self.correlation_id,
            user_id: self.user_id,
            content_type: self.content_type,
            content_encoding: self.content_encoding,
            ack: self.ack,
            expiry_ms: self.ttl_ms.map(|ttl_ms| now_ms.saturating_add(ttl_ms)),
            properties: self.properties.into_iter().collect(),
            body,
        })
    }
}

impl From<C2dError> for Refused {
    fn from(error: C2dError) -> Self {
        let status = match &error {
            C2dError::Full => StatusCode::FORBIDDEN,
            C2dError::Message(MessageError::Size(_)) => StatusCode::PAYLOAD_TOO_LARGE,
            C2dError::Message(_) => StatusCode::BAD_REQUEST,
            C2dError::Fenced
            | C2dError::Journal(_)
            | C2dError::LockLost
            | C2dError::PacketId(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

pub(super) async fn send(
    State(control): State<Control>,
    Path(device): Path<String>,
    request: Result<Json<SendRequest>, JsonRejection>,
) -> Result<Json<Value>, Refused> {
    let Json(request) = request?;
    let hub = &control.hub;
    let now_ms = hub.clock.now_ms();
    let message = request.into_message(now_ms)?;
    let message_id = message.message_id.clone();
    // Held over the step, so that nobody deletes the device in between.
    let devices = hub.devices();
    check_device(&devices, &device)?;
    let sequence = hub.c2d.send(&device, message, now_ms)?;
    drop(devices);
    hub.sessions.wake(&Identity {
        device: device.clone(),
        module: None,
    });
    info!(device, sequence, message_id, "c2d message enqueued");
    Ok(Json(
        json!({ "sequence": sequence, "message_id": message_id }),
    ))
}

pub(super) async fn overview(
    State(control): State<Control>,
    Path(device): Path<String>,
) -> Result<Json<Value>, Refused> {
    check_device(&control.hub.devices(), &device)?;
    let overview = control.hub.c2d.overview(&device);
    let queue: Vec<Value> = overview.queued.iter().map(queued_json).collect();
    let outcomes: Vec<Value> = overview.settled.iter().map(settled_json).collect();
    Ok(Json(json!({ "queue": queue, "outcomes": outcomes })))
}

pub(super) async fn purge(
    State(control): State<Control>,
    Path(device): Path<String>,
) -> Result<Json<Value>, Refused> {
    check_device(&control.hub.devices(), &device)?;
    let now_ms = control.hub.clock.now_ms();
    let purged = control.hub.c2d.purge(&device, now_ms)?;
    info!(device, purged, "c2d messages purged");
    Ok(Json(json!({ "purged": purged })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitQuery {
    sequence: u64,
    timeout_ms: Option<u64>,
}

pub(super) async fn wait(
    State(control): State<Control>,
    Path(device): Path<String>,
    query: Result<Query<WaitQuery>, QueryRejection>,
) -> Result<Json<Value>, Refused> {
    let Query(query) = query?;
    check_device(&control.hub.devices(), &device)?;
    let c2d = &control.hub.c2d;
    let find = || {
        let settled = c2d.overview(&device).settled;
        settled.into_iter().find(|(at, _)| *at == query.sequence)
    };
    wait_until(c2d.watch(), query.timeout_ms, || find().is_some()).await;
    Ok(Json(find().as_ref().map_or(Value::Null, settled_json)))
}

fn check_device(devices: &Devices, device: &str) -> Result<(), Refused> {
    match devices.find(device) {
        Ok(_) => Ok(()),
        Err(error) => Err(Refused(StatusCode::NOT_FOUND, error.to_string())),
    }
}

fn queued_json((sequence, queued): &(u64, Queued)) -> Value {
    json!({
        "sequence": sequence,
        "message_id": queued.message.message_id,
        "state": if queued.lock.is_some() { "invisible" } else { "enqueued" },
        "delivery_count": queued.deliveries,
        "packet_id": queued.packet_id,
        "enqueued_utc": utc_text(queued.enqueued_ms),
        "expires_utc": utc_text(queued.expires_ms),
        "locked_until_utc": queued.lock.map(|lock| utc_text(lock.until_ms)),
    })
}

fn settled_json((sequence, settled): &(u64, Settled)) -> Value {
    json!({
        "sequence": sequence,
        "message_id": settled.message_id,
        "outcome": settled.outcome,
        "delivery_count": settled.delivery_count,
        "enqueued_utc": utc_text(settled.enqueued_ms),
        "settled_utc": utc_text(settled.settled_ms),
    })
}
