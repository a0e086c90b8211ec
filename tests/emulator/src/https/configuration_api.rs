//! `POST /devices/{d}/applyConfigurationContent`: a deployment for one edge device.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use crate::authorize::{self, Permission};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::registry::{Devices, RegistryError, new_edge_module};
use crate::twin::{Object, ServiceChange};

/// The one section of a module that a deployment sets.
const DESIRED: &str = "properties.desired";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ContentRequest {
    modules_content: BTreeMap<String, BTreeMap<String, Object>>,
    /// SDKs send these two as well; a deployment has nothing in them.
    device_content: Option<Object>,
    module_content: Option<Object>,
}

impl ContentRequest {
    /// The desired properties of each module.
    fn into_changes(self, device: &str) -> Result<Vec<(Identity, ServiceChange)>, ApiError> {
        let others = [&self.device_content, &self.module_content];
        if others.into_iter().flatten().any(|other| !other.is_empty()) {
            let text = "only modulesContent can be applied";
            return Err(ApiError::bad_request(text));
        }
        let mut changes = Vec::with_capacity(self.modules_content.len());
        for (module, mut content) in self.modules_content {
            let desired = content.remove(DESIRED);
            if desired.is_none() || !content.is_empty() {
                let text = format!("the content of {module} is not its properties.desired alone");
                return Err(ApiError::bad_request(text));
            }
            let change = ServiceChange {
                tags: None,
                desired,
                replaces: true,
            };
            changes.push((Identity::new(device, Some(&module))?, change));
        }
        Ok(changes)
    }
}

/// Creates the modules that are missing, and replaces the desired properties of all that are
/// named. Nothing is changed when anything of it does not fit.
pub(super) fn apply(hub: &Hub, call: &Call, device: &str) -> Result<Answer, ApiError> {
    authorize::service_call(
        hub,
        Permission::RegistryWrite,
        &call.path(),
        call.credential(),
    )?;
    check_edge(&hub.devices(), device)?;
    let changes = call.json::<ContentRequest>()?.into_changes(device)?;
    for (identity, change) in &changes {
        hub.twins.check(identity, change)?;
    }
    hub.change_devices(|devices, now_ms| {
        check_edge(devices, device)?;
        let missing: Vec<&str> = changes
            .iter()
            .filter(|(identity, _)| !devices.contains(identity))
            .filter_map(|(identity, _)| identity.module.as_deref())
            .collect();
        devices.check_room(device, missing.len())?;
        for module in missing {
            devices.create_module(device, new_edge_module(module), now_ms)?;
        }
        Ok(())
    })?;
    let devices = hub.devices();
    for (identity, change) in &changes {
        super::twin_api::find(&devices, identity)?;
        hub.serve_twin(identity, change, None)?;
    }
    Ok(Answer::Empty)
}

fn check_edge(devices: &Devices, device: &str) -> Result<(), RegistryError> {
    if devices.find(device)?.iot_edge {
        return Ok(());
    }
    Err(RegistryError::Argument(
        "a configuration is for edge devices",
    ))
}
