//! The JSON of registry and scope answers.
//!
//! Two forms of a device: REST has everything, a scope page what spec/auth-hierarchy-http.md 6.1
//! lists. In both, `type` is written last inside `authentication` (a C# reader changes the type
//! as properties arrive), and an edge child always gets `capabilities` and `parentScopes`.

use serde::{Deserialize, Serialize};

use super::devices::RegistryError;
use super::model::{Authentication, Device, DeviceSpec, Module, ModuleSpec, random_key};
use crate::clock::utc_text;
use crate::identity::is_id;

/// What the emulator does not follow.
pub(crate) const NEVER: &str = "0001-01-01T00:00:00Z";

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct KeysJson {
    primary_key: Option<String>,
    secondary_key: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ThumbprintsJson {
    primary_thumbprint: Option<String>,
    secondary_thumbprint: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct AuthenticationJson {
    symmetric_key: Option<KeysJson>,
    x509_thumbprint: Option<ThumbprintsJson>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl From<&Authentication> for AuthenticationJson {
    fn from(authentication: &Authentication) -> Self {
        let mut keys = KeysJson::default();
        let mut thumbprints = ThumbprintsJson::default();
        match authentication {
            Authentication::CertificateAuthority | Authentication::None => {}
            Authentication::Sas { primary, secondary } => {
                keys.primary_key = Some(primary.clone());
                keys.secondary_key = Some(secondary.clone());
            }
            Authentication::SelfSigned { primary, secondary } => {
                thumbprints.primary_thumbprint.clone_from(primary);
                thumbprints.secondary_thumbprint.clone_from(secondary);
            }
        }
        Self {
            symmetric_key: Some(keys),
            x509_thumbprint: Some(thumbprints),
            kind: Some(authentication.kind().to_owned()),
        }
    }
}

impl AuthenticationJson {
    /// Missing keys are generated, as IoT Hub does (Node sends empty ones).
    fn into_model(self) -> Result<Authentication, RegistryError> {
        let keys = self.symmetric_key.unwrap_or_default();
        let thumbprints = self.x509_thumbprint.unwrap_or_default();
        let key =
            |key: Option<String>| key.filter(|key| !key.is_empty()).unwrap_or_else(random_key);
        match self.kind.as_deref().unwrap_or("sas") {
            "sas" => Ok(Authentication::Sas {
                primary: key(keys.primary_key),
                secondary: key(keys.secondary_key),
            }),
            "selfSigned" => Ok(Authentication::SelfSigned {
                primary: thumbprints.primary_thumbprint,
                secondary: thumbprints.secondary_thumbprint,
            }),
            "certificateAuthority" => Ok(Authentication::CertificateAuthority),
            "none" => Ok(Authentication::None),
            _ => Err(RegistryError::Argument("authentication.type is unknown")),
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CapabilitiesJson {
    iot_edge: bool,
}

/// A device as a scope page has it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ScopeDevice {
    device_id: String,
    generation_id: String,
    status: &'static str,
    authentication: AuthenticationJson,
    capabilities: CapabilitiesJson,
    device_scope: Option<String>,
    parent_scopes: Vec<String>,
}

impl From<&Device> for ScopeDevice {
    fn from(device: &Device) -> Self {
        Self {
            device_id: device.id.clone(),
            generation_id: device.generation_id.clone(),
            status: status_text(device.enabled),
            authentication: (&device.authentication).into(),
            capabilities: CapabilitiesJson {
                iot_edge: device.iot_edge,
            },
            device_scope: device.device_scope.clone(),
            parent_scopes: device.parent_scopes.clone(),
        }
    }
}

/// A module as a scope page has it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ScopeModule {
    module_id: String,
    device_id: String,
    generation_id: String,
    managed_by: Option<String>,
    authentication: AuthenticationJson,
}

impl ScopeModule {
    pub(crate) fn new(device: &Device, module: &Module) -> Self {
        Self {
            module_id: module.id.clone(),
            device_id: device.id.clone(),
            generation_id: module.generation_id.clone(),
            managed_by: module.managed_by.clone(),
            authentication: (&module.authentication).into(),
        }
    }
}

/// A device as the registry's REST calls have it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RestDevice {
    device_id: String,
    generation_id: String,
    etag: String,
    connection_state: &'static str,
    connection_state_updated_time: &'static str,
    status: &'static str,
    status_reason: Option<String>,
    status_updated_time: String,
    last_activity_time: &'static str,
    cloud_to_device_message_count: usize,
    authentication: AuthenticationJson,
    capabilities: CapabilitiesJson,
    device_scope: Option<String>,
    parent_scopes: Vec<String>,
}

impl RestDevice {
    /// `messages`: C2D messages that wait for the device.
    pub(crate) fn new(device: &Device, connected: bool, messages: usize) -> Self {
        Self {
            device_id: device.id.clone(),
            generation_id: device.generation_id.clone(),
            etag: device.etag.clone(),
            connection_state: connection_text(connected),
            connection_state_updated_time: NEVER,
            status: status_text(device.enabled),
            status_reason: device.status_reason.clone(),
            status_updated_time: utc_text(device.status_updated_ms),
            last_activity_time: NEVER,
            cloud_to_device_message_count: messages,
            authentication: (&device.authentication).into(),
            capabilities: CapabilitiesJson {
                iot_edge: device.iot_edge,
            },
            device_scope: device.device_scope.clone(),
            parent_scopes: device.parent_scopes.clone(),
        }
    }
}

/// A module as the registry's REST calls have it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RestModule {
    module_id: String,
    managed_by: Option<String>,
    device_id: String,
    generation_id: String,
    etag: String,
    connection_state: &'static str,
    connection_state_updated_time: &'static str,
    last_activity_time: &'static str,
    cloud_to_device_message_count: u32,
    authentication: AuthenticationJson,
}

impl RestModule {
    pub(crate) fn new(device: &Device, module: &Module, connected: bool) -> Self {
        Self {
            module_id: module.id.clone(),
            managed_by: module.managed_by.clone(),
            device_id: device.id.clone(),
            generation_id: module.generation_id.clone(),
            etag: module.etag.clone(),
            connection_state: connection_text(connected),
            connection_state_updated_time: NEVER,
            last_activity_time: NEVER,
            cloud_to_device_message_count: 0,
            authentication: (&module.authentication).into(),
        }
    }
}

/// A device as a caller describes it. SDKs send more; that is ignored.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeviceRequest {
    pub(super) device_id: String,
    #[serde(default)]
    pub(super) status: Option<String>,
    #[serde(default)]
    pub(super) status_reason: Option<String>,
    #[serde(default)]
    pub(super) authentication: Option<AuthenticationJson>,
    #[serde(default)]
    pub(super) capabilities: Option<CapabilitiesJson>,
    #[serde(default)]
    pub(super) device_scope: Option<String>,
    #[serde(default)]
    pub(super) parent_scopes: Option<Vec<String>>,
}

impl DeviceRequest {
    /// Checks everything that can be said without the registry.
    ///
    /// A leaf's parent may stand in `deviceScope` or in `parentScopes`; an edge device's only in
    /// `parentScopes`, its `deviceScope` is assigned by the hub and ignored here.
    pub(crate) fn into_spec(self, id: &str) -> Result<DeviceSpec, RegistryError> {
        if self.device_id != id || !is_id(id) {
            return Err(RegistryError::Argument(
                "deviceId differs from the path or is no id",
            ));
        }
        let iot_edge = self.capabilities.unwrap_or_default().iot_edge;
        let leaf_scope = self
            .device_scope
            .filter(|scope| !scope.is_empty() && !iot_edge);
        let mut scopes = self.parent_scopes.unwrap_or_default();
        let first = scopes.pop();
        if !scopes.is_empty() {
            return Err(RegistryError::Argument("a device has one parent"));
        }
        if first.is_some() && leaf_scope.is_some() && first != leaf_scope {
            return Err(RegistryError::Argument(
                "deviceScope and parentScopes differ",
            ));
        }
        let enabled = match self.status.as_deref() {
            None | Some("enabled") => true,
            Some("disabled") => false,
            Some(_) => return Err(RegistryError::Argument("status is unknown")),
        };
        Ok(DeviceSpec {
            id: self.device_id,
            iot_edge,
            enabled,
            status_reason: self.status_reason,
            authentication: self.authentication.unwrap_or_default().into_model()?,
            parent_scope: first.or(leaf_scope),
        })
    }
}

/// A module as a caller describes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ModuleRequest {
    pub(super) device_id: String,
    pub(super) module_id: String,
    #[serde(default)]
    pub(super) managed_by: Option<String>,
    #[serde(default)]
    pub(super) authentication: Option<AuthenticationJson>,
}

impl ModuleRequest {
    pub(crate) fn into_spec(self, device: &str, id: &str) -> Result<ModuleSpec, RegistryError> {
        if self.device_id != device || self.module_id != id || !is_id(id) {
            return Err(RegistryError::Argument(
                "ids differ from the path or are no ids",
            ));
        }
        Ok(ModuleSpec {
            id: self.module_id,
            managed_by: self.managed_by,
            authentication: self.authentication.unwrap_or_default().into_model()?,
        })
    }
}

/// The value of `status`.
pub(crate) fn status_text(enabled: bool) -> &'static str {
    if enabled { "enabled" } else { "disabled" }
}

/// The value of `connectionState`.
pub(crate) fn connection_text(connected: bool) -> &'static str {
    if connected {
        "Connected"
    } else {
        "Disconnected"
    }
}
