//! Direct methods over REST, and the purge of a device's messages.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use super::twin_api::find;
use crate::authorize::{self, Permission};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::limits::{
    METHOD_CONNECT_SECS, METHOD_PAYLOAD_BYTES_MAX, METHOD_RESPONSE_SECS,
    METHOD_RESPONSE_SECS_DEFAULT,
};
use crate::methods::{self, MethodCall, is_method_name};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MethodRequest {
    method_name: String,
    #[serde(default)]
    payload: Value,
    response_timeout_in_seconds: Option<u64>,
    connect_timeout_in_seconds: Option<u64>,
}

impl MethodRequest {
    fn into_call(self) -> Result<MethodCall, ApiError> {
        let response_secs = self
            .response_timeout_in_seconds
            .unwrap_or(METHOD_RESPONSE_SECS_DEFAULT);
        let connect_secs = self.connect_timeout_in_seconds.unwrap_or(0);
        let wrong = if !is_method_name(&self.method_name) {
            "methodName is empty, too long, or has a slash or a control character"
        } else if !METHOD_RESPONSE_SECS.contains(&response_secs) {
            "responseTimeoutInSeconds is not from 5 to 300"
        } else if !METHOD_CONNECT_SECS.contains(&connect_secs) {
            "connectTimeoutInSeconds is not from 0 to 300"
        } else if self.payload.to_string().len() > METHOD_PAYLOAD_BYTES_MAX {
            "the payload is larger than 128 KiB"
        } else {
            return Ok(MethodCall {
                name: self.method_name,
                payload: self.payload,
                connect_time: Duration::from_secs(connect_secs),
                response_time: Duration::from_secs(response_secs),
            });
        };
        Err(ApiError::bad_request(wrong))
    }
}

/// `POST /twins/{d}/methods`, `POST /twins/{d}/modules/{m}/methods`.
///
/// # Cancel safety
/// A caller that goes away is forgotten; the device may have got the call.
pub(super) async fn invoke(
    hub: &Hub,
    call: &Call,
    identity: &Identity,
) -> Result<Answer, ApiError> {
    authorize::service_call(
        hub,
        Permission::ServiceConnect,
        &call.path(),
        call.credential(),
    )?;
    find(&hub.devices(), identity)?;
    let method = call.json::<MethodRequest>()?.into_call()?;
    let answer = methods::invoke(hub, identity, &method).await?;
    let body = json!({ "status": answer.status, "payload": answer.payload });
    Answer::json(&body, None)
}

/// `DELETE /devices/{d}/commands`.
pub(super) fn purge(hub: &Hub, call: &Call, device: &str) -> Result<Answer, ApiError> {
    authorize::service_call(
        hub,
        Permission::ServiceConnect,
        &call.path(),
        call.credential(),
    )?;
    let devices = hub.devices();
    devices.find(device)?;
    let purged = hub
        .c2d
        .purge(device, hub.clock.now_ms())
        .map_err(|error| ApiError::internal(&error))?;
    let body = json!({
        "deviceId": device,
        "moduleId": null,
        "totalMessagesPurged": purged,
    });
    Answer::json(&body, None)
}
