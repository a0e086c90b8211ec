//! `GET /statistics/devices`, `GET /statistics/service`: how many there are.

use serde_json::json;

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use crate::authorize::{self, Permission};
use crate::hub::Hub;

/// `what` is the path below `/statistics`.
pub(super) fn get(hub: &Hub, call: &Call, what: &str) -> Result<Answer, ApiError> {
    let path = call.path();
    authorize::registry_call(
        hub,
        Permission::RegistryRead,
        &path,
        None,
        call.credential(),
    )?;
    let devices = hub.devices();
    let body = match what {
        "devices" => {
            let total = devices.iter().count();
            let enabled = devices.iter().filter(|device| device.enabled).count();
            json!({
                "totalDeviceCount": total,
                "enabledDeviceCount": enabled,
                "disabledDeviceCount": total - enabled,
            })
        }
        "service" => {
            let connected = devices
                .iter()
                .filter(|device| hub.is_connected(&device.id, None));
            json!({ "connectedDeviceCount": connected.count() })
        }
        _ => return Err(ApiError::not_supported()),
    };
    Answer::json(&body, None)
}
