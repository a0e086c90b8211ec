//! Devices and modules over REST: create, get, list, change, delete.

use hyper::Method;

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use crate::authorize::{self, Permission};
use crate::hub::Hub;
use crate::limits::PAGE_ITEMS_MAX;
use crate::registry::Device;
use crate::registry::json::{DeviceRequest, ModuleRequest, RestDevice, RestModule};

/// `rest` is the path below `/devices`.
pub(super) fn route(
    hub: &Hub,
    call: &Call,
    method: &Method,
    rest: &[&str],
) -> Result<Answer, ApiError> {
    let permission = if method == Method::GET {
        Permission::RegistryRead
    } else {
        Permission::RegistryWrite
    };
    // A device may manage its own modules with its own token.
    let own_device = match rest {
        [device, "modules", ..] => Some(*device),
        _ => None,
    };
    let path = call.path();
    authorize::registry_call(hub, permission, &path, own_device, call.credential())?;
    match (method, rest) {
        (&Method::GET, []) => list_devices(hub, call),
        (&Method::GET, [device]) => get_device(hub, device),
        (&Method::PUT, [device]) => put_device(hub, call, device),
        (&Method::DELETE, [device]) => delete_device(hub, call, device),
        (&Method::GET, [device, "modules"]) => list_modules(hub, device),
        (&Method::GET, [device, "modules", module]) => get_module(hub, device, module),
        (&Method::PUT, [device, "modules", module]) => put_module(hub, call, device, module),
        (&Method::DELETE, [device, "modules", module]) => delete_module(hub, call, device, module),
        _ => Err(ApiError::not_supported()),
    }
}

fn list_devices(hub: &Hub, call: &Call) -> Result<Answer, ApiError> {
    let top = match call.query("top") {
        None => PAGE_ITEMS_MAX,
        Some(text) => {
            let top = text
                .parse()
                .ok()
                .filter(|top| (1..=PAGE_ITEMS_MAX).contains(top));
            top.ok_or_else(|| ApiError::bad_request("top is not a number from 1 to 1000"))?
        }
    };
    let devices = hub.devices();
    let list: Vec<RestDevice> = devices
        .iter()
        .take(top)
        .map(|device| rest_device(hub, device))
        .collect();
    Answer::json(&list, None)
}

fn get_device(hub: &Hub, id: &str) -> Result<Answer, ApiError> {
    let devices = hub.devices();
    let device = devices.find(id)?;
    Answer::json(&rest_device(hub, device), Some(&device.etag))
}

fn rest_device(hub: &Hub, device: &Device) -> RestDevice {
    let connected = hub.is_connected(&device.id, None);
    RestDevice::new(device, connected, hub.c2d.count(&device.id))
}

/// Without `If-Match` this creates, with it this changes.
fn put_device(hub: &Hub, call: &Call, id: &str) -> Result<Answer, ApiError> {
    let spec = call.json::<DeviceRequest>()?.into_spec(id)?;
    hub.change_devices(|devices, now_ms| match call.if_match() {
        None => devices.create(spec, now_ms),
        Some(etag) => devices.update(spec, etag, now_ms),
    })?;
    get_device(hub, id)
}

fn delete_device(hub: &Hub, call: &Call, id: &str) -> Result<Answer, ApiError> {
    let etag = call.if_match().flatten();
    hub.change_devices(|devices, _| devices.delete(id, etag))?;
    Ok(Answer::Empty)
}

fn list_modules(hub: &Hub, id: &str) -> Result<Answer, ApiError> {
    let devices = hub.devices();
    let device = devices.find(id)?;
    let list: Vec<RestModule> = device
        .modules
        .values()
        .map(|module| RestModule::new(device, module, hub.is_connected(id, Some(&module.id))))
        .collect();
    Answer::json(&list, None)
}

fn get_module(hub: &Hub, device: &str, id: &str) -> Result<Answer, ApiError> {
    let devices = hub.devices();
    let module = devices.find_module(device, id)?;
    let connected = hub.is_connected(device, Some(id));
    let body = RestModule::new(devices.find(device)?, module, connected);
    Answer::json(&body, Some(&module.etag))
}

fn put_module(hub: &Hub, call: &Call, device: &str, id: &str) -> Result<Answer, ApiError> {
    let spec = call.json::<ModuleRequest>()?.into_spec(device, id)?;
    hub.change_devices(|devices, now_ms| match call.if_match() {
        None => devices.create_module(device, spec, now_ms),
        Some(etag) => devices.update_module(device, spec, etag),
    })?;
    get_module(hub, device, id)
}

fn delete_module(hub: &Hub, call: &Call, device: &str, id: &str) -> Result<Answer, ApiError> {
    let etag = call.if_match().flatten();
    hub.change_devices(|devices, _| devices.delete_module(device, id, etag))?;
    Ok(Answer::Empty)
}
