//! One of many changes that a caller sends at once (spec/upstream.md B7, `POST /devices`).

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::devices::{Devices, RegistryError};
use super::json::{AuthenticationJson, CapabilitiesJson, DeviceRequest, ModuleRequest};

/// A device or module, and what is to be done with it. SDKs send more; that is ignored.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BulkItem {
    id: String,
    module_id: Option<String>,
    import_mode: Option<String>,
    #[serde(alias = "eTag")]
    etag: Option<String>,
    managed_by: Option<String>,
    status: Option<String>,
    status_reason: Option<String>,
    authentication: Option<AuthenticationJson>,
    capabilities: Option<CapabilitiesJson>,
    device_scope: Option<String>,
    parent_scopes: Option<Vec<String>>,
    tags: Option<IgnoredAny>,
    properties: Option<IgnoredAny>,
}

/// What is to be done. The etag is one that has to match.
enum Mode {
    Create,
    Update(Option<String>),
    Delete(Option<String>),
}

/// What became of an item.
#[derive(Debug)]
pub(crate) struct BulkOutcome {
    pub(crate) device: String,
    pub(crate) module: Option<String>,
    pub(crate) result: Result<(), RegistryError>,
}

impl BulkItem {
    /// Does it, or says why it can not be done; then nothing of it is.
    pub(crate) fn carry_out(self, devices: &mut Devices, now_ms: u64) -> BulkOutcome {
        let (device, module) = (self.id.clone(), self.module_id.clone());
        BulkOutcome {
            result: self.apply(devices, now_ms),
            device,
            module,
        }
    }

    fn apply(self, devices: &mut Devices, now_ms: u64) -> Result<(), RegistryError> {
        let mode = self.mode()?;
        if self.tags.is_some() || self.properties.is_some() {
            let text = "a bulk operation of this emulator carries no tags and properties";
            return Err(RegistryError::Argument(text));
        }
        if let Some(module) = self.module_id {
            let request = ModuleRequest {
                device_id: self.id.clone(),
                module_id: module.clone(),
                managed_by: self.managed_by,
                authentication: self.authentication,
            };
            let spec = || request.into_spec(&self.id, &module);
            return match mode {
                Mode::Create => devices.create_module(&self.id, spec()?, now_ms),
                Mode::Update(etag) => devices.update_module(&self.id, spec()?, etag.as_deref()),
                Mode::Delete(etag) => devices.delete_module(&self.id, &module, etag.as_deref()),
            };
        }
        let request = DeviceRequest {
            device_id: self.id.clone(),
            status: self.status,
            status_reason: self.status_reason,
            authentication: self.authentication,
            capabilities: self.capabilities,
            device_scope: self.device_scope,
            parent_scopes: self.parent_scopes,
        };
        let spec = || request.into_spec(&self.id);
        match mode {
            Mode::Create => devices.create(spec()?, now_ms),
            Mode::Update(etag) => devices.update(spec()?, etag.as_deref(), now_ms),
            Mode::Delete(etag) => devices.delete(&self.id, etag.as_deref()),
        }
    }

    /// SDKs differ in the letter case of the modes.
    fn mode(&self) -> Result<Mode, RegistryError> {
        let mode = self.import_mode.as_deref().unwrap_or_default();
        let etag = || {
            let etag = self.etag.as_deref().map(|etag| etag.trim_matches('"'));
            let etag = etag.filter(|etag| !etag.is_empty());
            let missing = RegistryError::Argument("an import mode with IfMatchETag needs an etag");
            etag.map(|etag| Some(etag.to_owned()).filter(|etag| etag != "*"))
                .ok_or(missing)
        };
        match mode.to_ascii_lowercase().as_str() {
            "create" => Ok(Mode::Create),
            "update" => Ok(Mode::Update(None)),
            "updateifmatchetag" => Ok(Mode::Update(etag()?)),
            "delete" => Ok(Mode::Delete(None)),
            "deleteifmatchetag" => Ok(Mode::Delete(etag()?)),
            _ => Err(RegistryError::Argument("importMode is missing or unknown")),
        }
    }
}
