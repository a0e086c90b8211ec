//! The registry's state and its rules, without any protocol.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::model::{Authentication, Device, DeviceSpec, Module, ModuleSpec, random_key};
use crate::identity::{EDGE_AGENT, EDGE_HUB, Identity};
use crate::limits::{DEVICES_MAX, EDGE_LEVELS_MAX, MODULES_MAX};

/// Why the registry refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error("invalid argument: {0}")]
    Argument(&'static str),
    #[error("device {0} exists already")]
    DeviceExists(String),
    #[error("device {0} is not registered")]
    DeviceNotFound(String),
    #[error("the etag does not match")]
    Etag,
    #[error("module {0} exists already")]
    ModuleExists(Identity),
    #[error("module {0} is not registered")]
    ModuleNotFound(Identity),
    #[error("the registry has {DEVICES_MAX} devices, its limit")]
    TooManyDevices,
    #[error("the device has {MODULES_MAX} modules, its limit")]
    TooManyModules,
}

impl RegistryError {
    /// The number and the name that IoT Hub has for it (spec/upstream.md B9; the numbers of the
    /// two limits are inferred).
    pub(crate) fn code(&self) -> (u32, &'static str) {
        match self {
            Self::Argument(_) => (400_004, "ArgumentInvalid"),
            Self::DeviceExists(_) => (409_001, "DeviceAlreadyExists"),
            Self::DeviceNotFound(_) => (404_001, "DeviceNotFound"),
            Self::Etag => (412_001, "PreconditionFailed"),
            Self::ModuleExists(_) => (409_301, "ModuleAlreadyExistsOnDevice"),
            Self::ModuleNotFound(_) => (404_010, "ModuleNotFound"),
            Self::TooManyDevices => (403_000, "TooManyDevices"),
            Self::TooManyModules => (409_000, "TooManyModulesOnDevice"),
        }
    }
}

/// All devices, and the indexes that make scope pages cheap.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    devices: BTreeMap<String, Device>,
    /// Edge scope -> the edge device that owns it.
    owners: HashMap<String, String>,
    /// Edge scope -> ids of the devices below it.
    children: HashMap<String, BTreeSet<String>>,
    last_generation: u64,
    last_etag: u64,
    /// Deleted since somebody asked.
    removed: Vec<Identity>,
}

impl Devices {
    pub(crate) fn get(&self, id: &str) -> Option<&Device> {
        self.devices.get(id)
    }

    pub(crate) fn contains(&self, identity: &Identity) -> bool {
        self.get(&identity.device)
            .is_some_and(|device| match &identity.module {
                None => true,
                Some(module) => device.modules.contains_key(module),
            })
    }

    /// The device, or the error that says it is missing.
    pub(crate) fn find(&self, id: &str) -> Result<&Device, RegistryError> {
        self.get(id)
            .ok_or_else(|| RegistryError::DeviceNotFound(id.to_owned()))
    }

    /// The module, or the error that says what is missing.
    pub(crate) fn find_module(&self, device: &str, module: &str) -> Result<&Module, RegistryError> {
        self.find(device)?
            .modules
            .get(module)
            .ok_or_else(|| module_not_found(device, module))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Device> {
        self.devices.values()
    }

    /// The edge device right above `device`.
    pub(crate) fn parent(&self, device: &Device) -> Option<&Device> {
        self.get(self.owners.get(device.parent_scopes.first()?)?)
    }

    /// The devices right below an edge device, by id.
    pub(crate) fn children(&self, edge: &Device) -> impl Iterator<Item = &Device> {
        let scope = edge.device_scope.as_ref().filter(|_| edge.iot_edge);
        let ids = scope.and_then(|scope| self.children.get(scope));
        ids.into_iter().flatten().filter_map(|id| self.get(id))
    }

    /// Adds a device; for an edge device also its scope and its two system modules.
    ///
    /// # Errors
    /// The id is taken, the parent does not fit, or the registry is full.
    pub(crate) fn create(&mut self, spec: DeviceSpec, now_ms: u64) -> Result<(), RegistryError> {
        let generation = self.next_generation(now_ms);
        self.create_generation(spec, generation, now_ms)
    }

    /// [`Self::create`] with a given generation id.
    pub(crate) fn create_generation(
        &mut self,
        spec: DeviceSpec,
        generation_id: String,
        now_ms: u64,
    ) -> Result<(), RegistryError> {
        if self.devices.contains_key(&spec.id) {
            return Err(RegistryError::DeviceExists(spec.id));
        }
        if self.devices.len() >= DEVICES_MAX {
            return Err(RegistryError::TooManyDevices);
        }
        self.check_parent(&spec)?;
        let own_scope = format!("ms-azure-iot-edge://{}-{generation_id}", spec.id);
        if spec.iot_edge {
            self.owners.insert(own_scope.clone(), spec.id.clone());
        }
        self.link(&spec.id, spec.parent_scope.as_deref());
        let mut device = Device {
            device_scope: if spec.iot_edge {
                Some(own_scope)
            } else {
                spec.parent_scope.clone()
            },
            parent_scopes: spec.parent_scope.into_iter().collect(),
            etag: self.next_etag(),
            id: spec.id,
            generation_id,
            iot_edge: spec.iot_edge,
            enabled: spec.enabled,
            status_reason: spec.status_reason,
            status_updated_ms: now_ms,
            authentication: spec.authentication,
            modules: BTreeMap::new(),
        };
        for id in [EDGE_AGENT, EDGE_HUB]
            .into_iter()
            .filter(|_| device.iot_edge)
        {
            let (primary, secondary) = (random_key(), random_key());
            let module = Module {
                id: id.to_owned(),
                generation_id: device.generation_id.clone(),
                etag: self.next_etag(),
                managed_by: Some("iotEdge".to_owned()),
                authentication: Authentication::Sas { primary, secondary },
            };
            device.modules.insert(id.to_owned(), module);
        }
        self.devices.insert(device.id.clone(), device);
        Ok(())
    }

    /// Changes a device: status, credential, parent. An edge device keeps its scope.
    ///
    /// # Errors
    /// It is missing, `etag` is not its etag, the parent does not fit, or a leaf would become an
    /// edge device or the other way round.
    pub(crate) fn update(
        &mut self,
        spec: DeviceSpec,
        etag: Option<&str>,
        now_ms: u64,
    ) -> Result<(), RegistryError> {
        let old = self.find(&spec.id)?;
        check_etag(&old.etag, etag)?;
        if old.iot_edge != spec.iot_edge {
            return Err(RegistryError::Argument(
                "capabilities.iotEdge can not be changed",
            ));
        }
        let old_parent = old.parent_scopes.first().cloned();
        self.check_parent(&spec)?;
        self.unlink(&spec.id, old_parent.as_deref());
        self.link(&spec.id, spec.parent_scope.as_deref());
        let etag = self.next_etag();
        let Some(device) = self.devices.get_mut(&spec.id) else {
            return Err(RegistryError::DeviceNotFound(spec.id));
        };
        if device.enabled != spec.enabled {
            device.status_updated_ms = now_ms;
        }
        if !device.iot_edge {
            device.device_scope.clone_from(&spec.parent_scope);
        }
        device.parent_scopes = spec.parent_scope.into_iter().collect();
        device.etag = etag;
        device.enabled = spec.enabled;
        device.status_reason = spec.status_reason;
        device.authentication = spec.authentication;
        Ok(())
    }

    /// Removes a device with its modules. Children of an edge device lose their parent.
    pub(crate) fn delete(&mut self, id: &str, etag: Option<&str>) -> Result<(), RegistryError> {
        let device = self.find(id)?;
        check_etag(&device.etag, etag)?;
        let parent = device.parent_scopes.first().cloned();
        let own_scope = device.device_scope.clone().filter(|_| device.iot_edge);
        self.unlink(id, parent.as_deref());
        if let Some(scope) = own_scope {
            self.owners.remove(&scope);
            for child in self.children.remove(&scope).unwrap_or_default() {
                if let Some(child) = self.devices.get_mut(&child) {
                    child.parent_scopes.clear();
                    child.device_scope = child.device_scope.take().filter(|_| child.iot_edge);
                }
            }
        }
        if let Some(device) = self.devices.remove(id) {
            let of = |module| Identity {
                device: id.to_owned(),
                module,
            };
            let modules = device.modules.into_keys().map(|module| of(Some(module)));
            self.removed.extend(modules);
            self.removed.push(of(None));
        }
        Ok(())
    }

    /// The identities that were deleted since the last call.
    pub(crate) fn take_removed(&mut self) -> Vec<Identity> {
        std::mem::take(&mut self.removed)
    }

    /// Whether a device can get so many more modules.
    pub(crate) fn check_room(&self, device: &str, count: usize) -> Result<(), RegistryError> {
        if self.find(device)?.modules.len() + count > MODULES_MAX {
            return Err(RegistryError::TooManyModules);
        }
        Ok(())
    }

    /// Adds a module to a device.
    pub(crate) fn create_module(
        &mut self,
        device: &str,
        spec: ModuleSpec,
        now_ms: u64,
    ) -> Result<(), RegistryError> {
        let generation = self.next_generation(now_ms);
        self.create_module_generation(device, spec, generation)
    }

    /// [`Self::create_module`] with a given generation id.
    pub(crate) fn create_module_generation(
        &mut self,
        device: &str,
        spec: ModuleSpec,
        generation_id: String,
    ) -> Result<(), RegistryError> {
        let etag = self.next_etag();
        let owner = self.find_mut(device)?;
        if owner.modules.contains_key(&spec.id) {
            let module = Some(spec.id);
            let identity = Identity {
                device: device.to_owned(),
                module,
            };
            return Err(RegistryError::ModuleExists(identity));
        }
        if owner.modules.len() >= MODULES_MAX {
            return Err(RegistryError::TooManyModules);
        }
        let module = Module {
            id: spec.id.clone(),
            generation_id,
            etag,
            managed_by: spec.managed_by,
            authentication: spec.authentication,
        };
        owner.modules.insert(spec.id, module);
        Ok(())
    }

    /// Changes a module's credential.
    pub(crate) fn update_module(
        &mut self,
        device: &str,
        spec: ModuleSpec,
        etag: Option<&str>,
    ) -> Result<(), RegistryError> {
        let new_etag = self.next_etag();
        let module = self
            .find_mut(device)?
            .modules
            .get_mut(&spec.id)
            .ok_or_else(|| module_not_found(device, &spec.id))?;
        check_etag(&module.etag, etag)?;
        module.etag = new_etag;
        module.managed_by = spec.managed_by;
        module.authentication = spec.authentication;
        Ok(())
    }

    /// Removes a module.
    pub(crate) fn delete_module(
        &mut self,
        device: &str,
        module: &str,
        etag: Option<&str>,
    ) -> Result<(), RegistryError> {
        check_etag(&self.find_module(device, module)?.etag, etag)?;
        self.find_mut(device)?.modules.remove(module);
        self.removed.push(Identity {
            device: device.to_owned(),
            module: Some(module.to_owned()),
        });
        Ok(())
    }

    fn find_mut(&mut self, id: &str) -> Result<&mut Device, RegistryError> {
        self.devices
            .get_mut(id)
            .ok_or_else(|| RegistryError::DeviceNotFound(id.to_owned()))
    }

    /// A parent is an edge device, not the device itself or something below it, and leaves room
    /// for another level.
    fn check_parent(&self, spec: &DeviceSpec) -> Result<(), RegistryError> {
        let Some(scope) = &spec.parent_scope else {
            return Ok(());
        };
        let mut above = self.owners.get(scope).and_then(|id| self.get(id));
        if above.is_none() {
            return Err(RegistryError::Argument(
                "the parent scope belongs to no edge device",
            ));
        }
        let mut levels = usize::from(spec.iot_edge);
        while let Some(device) = above {
            levels += 1;
            if device.id == spec.id {
                return Err(RegistryError::Argument("a device can not be above itself"));
            }
            if levels > EDGE_LEVELS_MAX {
                return Err(RegistryError::Argument(
                    "the hierarchy would have too many levels",
                ));
            }
            above = self.parent(device);
        }
        Ok(())
    }

    fn link(&mut self, id: &str, parent_scope: Option<&str>) {
        if let Some(scope) = parent_scope {
            self.children
                .entry(scope.to_owned())
                .or_default()
                .insert(id.to_owned());
        }
    }

    fn unlink(&mut self, id: &str, parent_scope: Option<&str>) {
        if let Some(siblings) = parent_scope.and_then(|scope| self.children.get_mut(scope)) {
            siblings.remove(id);
        }
    }

    /// Ticks of 100 ns since the year 1, as IoT Hub seems to use; never the same twice.
    fn next_generation(&mut self, now_ms: u64) -> String {
        const UNIX_EPOCH_TICKS: u64 = 621_355_968_000_000_000;
        let ticks = UNIX_EPOCH_TICKS.saturating_add(now_ms.saturating_mul(10_000));
        self.last_generation = ticks.max(self.last_generation.saturating_add(1));
        self.last_generation.to_string()
    }

    fn next_etag(&mut self) -> String {
        self.last_etag += 1;
        STANDARD.encode(self.last_etag.to_string())
    }
}

fn check_etag(current: &str, wanted: Option<&str>) -> Result<(), RegistryError> {
    if wanted.is_none_or(|wanted| wanted == current) {
        Ok(())
    } else {
        Err(RegistryError::Etag)
    }
}

fn module_not_found(device: &str, module: &str) -> RegistryError {
    let module = Some(module.to_owned());
    RegistryError::ModuleNotFound(Identity {
        device: device.to_owned(),
        module,
    })
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
