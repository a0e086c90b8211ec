//! The two calls with which an edgeHub learns who is below it (spec/upstream.md A9, B7).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use crate::authorize::{self, Refusal};
use crate::hub::Hub;
use crate::identity::{AuthChain, EDGE_HUB, Identity};
use crate::limits::PAGE_ITEMS_MAX;
use crate::registry::json::{ScopeDevice, ScopeModule};
use crate::registry::{Device, Devices, Module};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PageRequest {
    page_size: usize,
    continuation_link: Option<String>,
    auth_chain: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct IdentityRequest {
    target_device_id: String,
    target_module_id: Option<String>,
    auth_chain: String,
}

/// All three properties are always there, null if need be.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct ScopeAnswer {
    devices: Vec<ScopeDevice>,
    modules: Vec<ScopeModule>,
    continuation_link: Option<String>,
}

impl ScopeAnswer {
    fn push(&mut self, item: &Item<'_>) {
        match item.module {
            None => self.devices.push(item.device.into()),
            Some(module) => self.modules.push(ScopeModule::new(item.device, module)),
        }
    }
}

/// An entry of a scope: a device, or a module of one.
#[derive(Clone, Copy)]
struct Item<'a> {
    device: &'a Device,
    module: Option<&'a Module>,
}

impl Item<'_> {
    fn identity(&self) -> Identity {
        let module = self.module.map(|module| module.id.clone());
        Identity {
            device: self.device.id.clone(),
            module,
        }
    }
}

/// `devicesAndModulesInTargetDeviceScope`: a page of what stands right below the chain's target.
pub(super) fn page(hub: &Hub, call: &Call, actor: &str, module: &str) -> Result<Answer, ApiError> {
    authenticate(hub, call, actor, module)?;
    let request: PageRequest = call.json()?;
    if !(1..=PAGE_ITEMS_MAX).contains(&request.page_size) {
        return Err(ApiError::bad_request(
            "pageSize is not a number from 1 to 1000",
        ));
    }
    let devices = hub.devices();
    let target = authorize_chain(hub, &devices, actor, &request.auth_chain)?;
    let link = request.continuation_link.filter(|link| !link.is_empty());
    let after = link.map(|link| read_link(&link, target)).transpose()?;
    let mut items = scope_of(&devices, target);
    if let Some(after) = after {
        // The item may have been deleted since: go on where it stood.
        let after = rank(target, after);
        items.retain(|item| rank(target, item.identity()) > after);
    }
    let mut answer = ScopeAnswer::default();
    items
        .iter()
        .take(request.page_size)
        .for_each(|item| answer.push(item));
    if let Some(last) = items
        .get(request.page_size - 1)
        .filter(|_| items.len() > request.page_size)
    {
        answer.continuation_link = Some(write_link(target, last));
    }
    Answer::json(&answer, None)
}

/// `getDeviceAndModuleOnBehalfOf`: one identity below the chain's target.
pub(super) fn identity(
    hub: &Hub,
    call: &Call,
    actor: &str,
    module: &str,
) -> Result<Answer, ApiError> {
    authenticate(hub, call, actor, module)?;
    let request: IdentityRequest = call.json()?;
    let devices = hub.devices();
    let originator = authorize_chain(hub, &devices, actor, &request.auth_chain)?;
    let device = devices.find(&request.target_device_id)?;
    let mut above = Some(device);
    while above.is_some_and(|device| device.id != originator.id) {
        above = above.and_then(|device| devices.parent(device));
    }
    if above.is_none() {
        return Err(ApiError::unauthorized(
            "the target is not in the originator's scope",
        ));
    }
    let mut answer = ScopeAnswer::default();
    answer.push(&Item {
        device,
        module: None,
    });
    if let Some(id) = request.target_module_id.filter(|id| !id.is_empty()) {
        let module = Some(devices.find_module(&device.id, &id)?);
        answer.push(&Item { device, module });
    }
    Answer::json(&answer, None)
}

fn authenticate(hub: &Hub, call: &Call, actor: &str, module: &str) -> Result<(), ApiError> {
    if module != EDGE_HUB {
        return Err(ApiError::unauthorized("only $edgeHub may ask"));
    }
    Ok(authorize::edge_hub_call(hub, actor, call.credential())?)
}

/// Verifies the chain of a call: it leads from an edge device up to the caller. Returns the edge
/// device at its start.
fn authorize_chain<'a>(
    hub: &Hub,
    devices: &'a Devices,
    actor: &str,
    chain: &str,
) -> Result<&'a Device, ApiError> {
    let chain = AuthChain::parse(chain)?;
    let target = chain.target();
    if target.module.is_some() {
        return Err(ApiError::bad_request("the chain starts with a module"));
    }
    let last = chain.actor().unwrap_or(target);
    if last.device != actor || last.module.is_some() {
        return Err(ApiError::unauthorized(
            "the chain does not end with the caller",
        ));
    }
    authorize::check_chain(devices, &chain, hub.mode)?;
    let unknown = || Refusal::Unknown(target.clone());
    let device = devices.get(&target.device).ok_or_else(unknown)?;
    if !device.iot_edge {
        return Err(ApiError::bad_request(
            "the chain does not start with an edge device",
        ));
    }
    Ok(device)
}

/// The target and its modules, then each child device; a leaf with its modules, an edge device
/// without, because they come with its own scope.
fn scope_of<'a>(devices: &'a Devices, target: &'a Device) -> Vec<Item<'a>> {
    let mut items = Vec::new();
    let mut add = |device: &'a Device, with_modules: bool| {
        items.push(Item {
            device,
            module: None,
        });
        let modules = device.modules.values().filter(|_| with_modules);
        items.extend(modules.map(|module| Item {
            device,
            module: Some(module),
        }));
    };
    add(target, true);
    for child in devices.children(target) {
        add(child, !child.iot_edge);
    }
    items
}

/// Where an identity stands in [`scope_of`], also one that is gone.
fn rank(target: &Device, identity: Identity) -> (bool, Identity) {
    (identity.device != target.id, identity)
}

/// Opaque to clients: the target and the last item of the page.
fn write_link(target: &Device, last: &Item<'_>) -> String {
    URL_SAFE_NO_PAD.encode(format!("{};{}", target.id, last.identity()))
}

fn read_link(link: &str, target: &Device) -> Result<Identity, ApiError> {
    let bad = || ApiError::bad_request("the continuationLink is not one for this scope");
    let text = URL_SAFE_NO_PAD
        .decode(link)
        .ok()
        .and_then(|text| String::from_utf8(text).ok());
    let text = text.ok_or_else(bad)?;
    let (scope, last) = text.split_once(';').ok_or_else(bad)?;
    if scope != target.id {
        return Err(bad());
    }
    Identity::parse(last).map_err(|_| bad())
}
