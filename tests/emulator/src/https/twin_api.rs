//! Twins over REST: get, merge (PATCH), replace (PUT).

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use crate::authorize::{self, Permission};
use crate::clock::utc_text;
use crate::hub::Hub;
use crate::identity::Identity;
use crate::registry::json::{NEVER, connection_text, status_text};
use crate::registry::{Authentication, Devices, RegistryError};
use crate::twin::{Object, ServiceChange, Twin};

/// A twin as a caller sends it. Who reads a twin and sends it back sends more; that is ignored,
/// the reported properties included.
#[derive(Deserialize)]
struct TwinRequest {
    tags: Option<Object>,
    properties: Option<PropertiesRequest>,
}

#[derive(Deserialize)]
struct PropertiesRequest {
    desired: Option<Object>,
}

pub(super) fn route(
    hub: &Hub,
    call: &Call,
    method: &Method,
    identity: &Identity,
) -> Result<Answer, ApiError> {
    authorize::service_call(
        hub,
        Permission::ServiceConnect,
        &call.path(),
        call.credential(),
    )?;
    // Held over the change, so that nobody deletes the identity in between.
    let devices = hub.devices();
    find(&devices, identity)?;
    let twin = match *method {
        Method::GET => hub.twins.get(identity),
        Method::PATCH | Method::PUT => {
            let change = change(call, *method == Method::PUT)?;
            let etag = call.if_match().flatten();
            hub.serve_twin(identity, &change, etag)?
        }
        _ => return Err(ApiError::not_supported()),
    };
    let etag = twin.etag();
    Answer::json(&rest_twin(hub, &devices, identity, &twin)?, Some(&etag))
}

fn change(call: &Call, replaces: bool) -> Result<ServiceChange, ApiError> {
    let request: TwinRequest = call.json()?;
    let desired = request.properties.and_then(|properties| properties.desired);
    // What a replacing twin does not have is gone.
    let nothing = || replaces.then(Object::new);
    Ok(ServiceChange {
        tags: request.tags.or_else(nothing),
        desired: desired.or_else(nothing),
        replaces,
    })
}

/// Whether the registry has the identity.
pub(super) fn find(devices: &Devices, identity: &Identity) -> Result<(), RegistryError> {
    match &identity.module {
        None => devices.find(&identity.device).map(|_| ()),
        Some(module) => devices.find_module(&identity.device, module).map(|_| ()),
    }
}

/// A twin as the service side gets it. The registry has to have the identity.
pub(super) fn rest_twin(
    hub: &Hub,
    devices: &Devices,
    identity: &Identity,
    twin: &Twin,
) -> Result<Value, ApiError> {
    let device = devices.find(&identity.device)?;
    let (etag, authentication) = match &identity.module {
        None => (&device.etag, &device.authentication),
        Some(module) => {
            let module = devices.find_module(&device.id, module)?;
            (&module.etag, &module.authentication)
        }
    };
    let (primary, secondary) = match authentication {
        Authentication::SelfSigned { primary, secondary } => (primary.clone(), secondary.clone()),
        _ => (None, None),
    };
    let connected = hub.is_connected(&device.id, identity.module.as_deref());
    let mut body = json!({
        "deviceId": device.id,
        "etag": twin.etag(),
        "deviceEtag": etag,
        "status": status_text(device.enabled),
        "statusReason": device.status_reason,
        "statusUpdateTime": utc_text(device.status_updated_ms),
        "connectionState": connection_text(connected),
        "lastActivityTime": NEVER,
        "cloudToDeviceMessageCount": 0,
        "authenticationType": authentication.kind(),
        "x509Thumbprint": { "primaryThumbprint": primary, "secondaryThumbprint": secondary },
        "version": twin.version(),
        "tags": twin.tags(),
        "properties": twin.properties(),
    });
    if let Some(body) = body.as_object_mut() {
        match &identity.module {
            None => {
                let count = hub.c2d.count(&device.id);
                body.insert("cloudToDeviceMessageCount".to_owned(), count.into());
                let capabilities = json!({ "iotEdge": device.iot_edge });
                body.insert("capabilities".to_owned(), capabilities);
                if let Some(scope) = &device.device_scope {
                    body.insert("deviceScope".to_owned(), scope.clone().into());
                }
                let parents = device.parent_scopes.clone();
                body.insert("parentScopes".to_owned(), parents.into());
            }
            Some(module) => {
                body.insert("moduleId".to_owned(), module.clone().into());
            }
        }
    }
    Ok(body)
}
