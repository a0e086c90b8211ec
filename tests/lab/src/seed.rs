//! The emulator's seed: registered identities and their keys.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use crate::ConnectionString;

/// The emulator's seed file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seed {
    /// The hub's host name, as SAS audiences name it.
    #[serde(default)]
    pub hostname: String,
    /// Service policies.
    #[serde(default)]
    pub policies: Vec<SeedPolicy>,
    /// Devices, parents before children.
    #[serde(default)]
    pub devices: Vec<SeedDevice>,
}

/// A shared access policy of the service side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeedPolicy {
    /// Such as `iothubowner`.
    pub name: String,
    /// Base64.
    #[serde(default)]
    pub key: Option<String>,
}

/// `enabled` or `disabled`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// May connect.
    #[default]
    Enabled,
    /// May not.
    Disabled,
}

/// A registered device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SeedDevice {
    /// Its id.
    pub device_id: String,
    /// Whether it has the capability of an edge device.
    #[serde(default)]
    pub iot_edge: bool,
    /// The edge device in whose scope it is.
    #[serde(default)]
    pub parent: Option<String>,
    /// Whether it may connect.
    #[serde(default)]
    pub status: Status,
    /// Base64; made up when a user's file leaves it out.
    #[serde(default)]
    pub primary_key: Option<String>,
    /// Base64; made up when a user's file leaves it out.
    #[serde(default)]
    pub secondary_key: Option<String>,
    /// Its modules.
    #[serde(default)]
    pub modules: Vec<SeedModule>,
}

/// A registered module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SeedModule {
    /// Its id.
    pub module_id: String,
    /// Base64.
    #[serde(default)]
    pub primary_key: Option<String>,
    /// Base64.
    #[serde(default)]
    pub secondary_key: Option<String>,
}

impl SeedDevice {
    pub(crate) fn new(id: &str, parent: Option<&str>) -> Self {
        Self {
            device_id: id.to_owned(),
            parent: parent.map(str::to_owned),
            ..Self::default()
        }
    }

    pub(crate) fn add_modules<'a>(&mut self, ids: impl IntoIterator<Item = &'a str>) {
        for id in ids {
            if !self.modules.iter().any(|module| module.module_id == id) {
                self.modules.push(SeedModule {
                    module_id: id.to_owned(),
                    ..SeedModule::default()
                });
            }
        }
    }
}

impl Seed {
    /// Reads a seed file.
    ///
    /// # Errors
    /// When it cannot be read or is not a seed.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let text = std::fs::read(path).with_context(|| format!("cannot read {shown}"))?;
        serde_json::from_slice(&text).with_context(|| format!("{shown} is no seed file"))
    }

    fn adopt(&mut self, other: &Self, what: Adopt) {
        for known in &other.policies {
            match self
                .policies
                .iter_mut()
                .find(|policy| policy.name == known.name)
            {
                Some(policy) => what.key(&mut policy.key, known.key.as_ref()),
                None if what == Adopt::Everything => self.policies.push(known.clone()),
                None => {}
            }
        }
        for known in &other.devices {
            match self
                .devices
                .iter_mut()
                .find(|device| device.device_id == known.device_id)
            {
                Some(device) => device.adopt(known, what),
                None if what == Adopt::Everything => self.devices.push(known.clone()),
                None => {}
            }
        }
    }

    /// Takes what a user gave, then keys of an earlier start, then random ones.
    pub(crate) fn complete(&mut self, earlier: Option<&Self>, users: Option<&Self>) {
        if let Some(users) = users {
            self.adopt(users, Adopt::Everything);
        }
        if let Some(earlier) = earlier {
            self.adopt(earlier, Adopt::MissingKeys);
        }
        for policy in &mut self.policies {
            policy.key.get_or_insert_with(random_key);
        }
        for device in &mut self.devices {
            device.primary_key.get_or_insert_with(random_key);
            device.secondary_key.get_or_insert_with(random_key);
            for module in &mut device.modules {
                module.primary_key.get_or_insert_with(random_key);
                module.secondary_key.get_or_insert_with(random_key);
            }
        }
    }

    /// The primary key of `device` or `device/module`.
    ///
    /// # Errors
    /// When there is no such identity.
    pub fn primary_key(&self, id: &str) -> Result<&str> {
        self.keys(id).map(|(primary, _)| primary)
    }

    /// The secondary key of `device` or `device/module`.
    ///
    /// # Errors
    /// When there is no such identity.
    pub fn secondary_key(&self, id: &str) -> Result<&str> {
        self.keys(id).map(|(_, secondary)| secondary)
    }

    fn keys(&self, id: &str) -> Result<(&str, &str)> {
        let (device_id, module_id) = split_id(id);
        let device = self
            .devices
            .iter()
            .find(|device| device.device_id == device_id);
        let device = device.with_context(|| format!("no device {device_id}"))?;
        let keys = match module_id {
            None => (&device.primary_key, &device.secondary_key),
            Some(module_id) => {
                let module = device
                    .modules
                    .iter()
                    .find(|module| module.module_id == module_id);
                let module = module.with_context(|| format!("no module {id}"))?;
                (&module.primary_key, &module.secondary_key)
            }
        };
        match keys {
            (Some(primary), Some(secondary)) => Ok((primary, secondary)),
            _ => bail!("{id} has no key"),
        }
    }

    /// The connection string of `device` or `device/module`, through `gateway` if one is given.
    ///
    /// # Errors
    /// When there is no such identity.
    pub fn connection_string(&self, id: &str, gateway: Option<&str>) -> Result<ConnectionString> {
        let (device_id, module_id) = split_id(id);
        Ok(ConnectionString {
            host_name: self.hostname.clone(),
            device_id: Some(device_id.to_owned()),
            module_id: module_id.map(str::to_owned),
            shared_access_key_name: None,
            shared_access_key: self.primary_key(id)?.to_owned(),
            gateway_host_name: gateway.map(str::to_owned),
        })
    }
}

impl SeedDevice {
    fn adopt(&mut self, known: &Self, what: Adopt) {
        what.key(&mut self.primary_key, known.primary_key.as_ref());
        what.key(&mut self.secondary_key, known.secondary_key.as_ref());
        for known in &known.modules {
            match self
                .modules
                .iter_mut()
                .find(|module| module.module_id == known.module_id)
            {
                Some(module) => {
                    what.key(&mut module.primary_key, known.primary_key.as_ref());
                    what.key(&mut module.secondary_key, known.secondary_key.as_ref());
                }
                None if what == Adopt::Everything => self.modules.push(known.clone()),
                None => {}
            }
        }
    }
}

/// What is taken from another seed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Adopt {
    /// Keys and identities.
    Everything,
    /// Keys that are not there yet, of identities that are.
    MissingKeys,
}

impl Adopt {
    fn key(self, own: &mut Option<String>, known: Option<&String>) {
        if own.is_none() || self == Self::Everything {
            *own = known.cloned().or_else(|| own.take());
        }
    }
}

/// `device` or `device/module`.
pub(crate) fn split_id(id: &str) -> (&str, Option<&str>) {
    match id.split_once('/') {
        Some((device_id, module_id)) => (device_id, Some(module_id)),
        None => (id, None),
    }
}

fn random_key() -> String {
    let mut key = [0_u8; 32];
    rand::rng().fill(&mut key);
    STANDARD.encode(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelled_field_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("seed.json");
        for (text, field) in [
            (r#"{"device":[]}"#, "device"),
            (
                r#"{"devices":[{"deviceId":"a","primarykey":"a2V5"}]}"#,
                "primarykey",
            ),
            (
                r#"{"devices":[{"deviceId":"a","modules":[{"moduleID":"m"}]}]}"#,
                "moduleID",
            ),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = format!("{:#}", Seed::read(&file).unwrap_err());
            assert!(
                error.contains("is no seed file") && error.contains(field),
                "{error}"
            );
        }
    }
}
