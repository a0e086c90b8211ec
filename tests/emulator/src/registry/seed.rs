//! The seed file: hub name, shared access policies, devices with their parents by device id.
//!
//! Generation ids, and keys that the file leaves out, are derived from the ids. So a restarted
//! emulator is the same hub, and two labs with the same seed are equal. Nothing here is secret.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, digest};
use serde::Deserialize;

use super::devices::{Devices, RegistryError};
use super::model::{Authentication, DeviceSpec, ModuleSpec};
use crate::identity::is_id;

/// Why a seed file is not usable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeedError {
    #[error("it is not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("its hostname {seed:?} is not the emulator's {hostname:?}")]
    Hostname { seed: String, hostname: String },
    #[error("{0:?} is no device, module or policy name, or its key is not base64")]
    Name(String),
    #[error("device {device:?}: {error}")]
    Registry {
        device: String,
        error: RegistryError,
    },
    #[error("the parents of these devices are missing, no edge devices, or form a circle: {0}")]
    Parents(String),
}

/// A shared access policy with its key.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Policy {
    pub(crate) name: String,
    pub(crate) key: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedFile {
    hostname: Option<String>,
    #[serde(default)]
    policies: Vec<Policy>,
    #[serde(default)]
    devices: Vec<SeedDevice>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SeedDevice {
    device_id: String,
    #[serde(default)]
    iot_edge: bool,
    parent: Option<String>,
    status: Option<String>,
    primary_key: Option<String>,
    secondary_key: Option<String>,
    #[serde(default)]
    modules: Vec<SeedModule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SeedModule {
    module_id: String,
    primary_key: Option<String>,
    secondary_key: Option<String>,
}

/// What the file describes.
pub(crate) struct Seed {
    pub(crate) policies: Vec<Policy>,
    pub(crate) devices: Devices,
}

/// Reads a seed file for the hub `hostname`.
pub(crate) fn read(text: &str, hostname: &str, now_ms: u64) -> Result<Seed, SeedError> {
    let file: SeedFile = serde_json::from_str(text)?;
    if let Some(seed) = file
        .hostname
        .filter(|seed| !seed.eq_ignore_ascii_case(hostname))
    {
        return Err(SeedError::Hostname {
            seed,
            hostname: hostname.to_owned(),
        });
    }
    for policy in &file.policies {
        check_name(&policy.name, Some(&policy.key))?;
    }
    let mut devices = Devices::default();
    let mut waiting = file.devices;
    // Parents first, whatever the order in the file: each round adds those whose parent is there.
    while !waiting.is_empty() {
        let before = waiting.len();
        let (ready, later) = waiting.into_iter().partition(|device| {
            device
                .parent
                .as_ref()
                .is_none_or(|parent| devices.get(parent).is_some_and(|parent| parent.iot_edge))
        });
        waiting = later;
        let ready: Vec<SeedDevice> = ready;
        for device in ready {
            add(&mut devices, device, now_ms)?;
        }
        if waiting.len() == before {
            let ids: Vec<String> = waiting.into_iter().map(|device| device.device_id).collect();
            return Err(SeedError::Parents(ids.join(", ")));
        }
    }
    Ok(Seed {
        policies: file.policies,
        devices,
    })
}

fn add(devices: &mut Devices, seed: SeedDevice, now_ms: u64) -> Result<(), SeedError> {
    let id = seed.device_id;
    check_name(&id, None)?;
    let enabled = match seed.status.as_deref() {
        None | Some("enabled") => true,
        Some("disabled") => false,
        Some(_) => return Err(SeedError::Name(format!("status of {id}"))),
    };
    let parent = seed.parent.as_ref().and_then(|parent| devices.get(parent));
    let spec = DeviceSpec {
        authentication: keys(&id, seed.primary_key, seed.secondary_key)?,
        parent_scope: parent.and_then(|parent| parent.device_scope.clone()),
        id: id.clone(),
        iot_edge: seed.iot_edge,
        enabled,
        status_reason: None,
    };
    let failed = |error| SeedError::Registry {
        device: id.clone(),
        error,
    };
    devices
        .create_generation(spec, generation(&id), now_ms)
        .map_err(failed)?;

    let system = devices
        .get(&id)
        .map(|device| device.modules.keys().cloned().collect::<Vec<_>>());
    for module in system.unwrap_or_default() {
        let authentication = keys(&format!("{id}/{module}"), None, None)?;
        let spec = ModuleSpec {
            id: module,
            managed_by: Some("iotEdge".to_owned()),
            authentication,
        };
        devices.update_module(&id, spec, None).map_err(failed)?;
    }
    for module in seed.modules {
        let name = format!("{id}/{}", module.module_id);
        check_name(&module.module_id, None)?;
        let authentication = keys(&name, module.primary_key, module.secondary_key)?;
        let managed_by = seed.iot_edge.then(|| "iotEdge".to_owned());
        let spec = ModuleSpec {
            id: module.module_id,
            managed_by,
            authentication,
        };
        if devices.find_module(&id, &spec.id).is_ok() {
            devices.update_module(&id, spec, None).map_err(failed)?;
        } else {
            devices
                .create_module_generation(&id, spec, generation(&name))
                .map_err(failed)?;
        }
    }
    Ok(())
}

fn check_name(name: &str, key: Option<&str>) -> Result<(), SeedError> {
    if is_id(name) && key.is_none_or(|key| STANDARD.decode(key).is_ok()) {
        return Ok(());
    }
    Err(SeedError::Name(name.to_owned()))
}

fn keys(
    name: &str,
    primary: Option<String>,
    secondary: Option<String>,
) -> Result<Authentication, SeedError> {
    let derived =
        |which: &str| STANDARD.encode(digest(&SHA256, format!("{which} {name}").as_bytes()));
    let primary = primary.unwrap_or_else(|| derived("primary"));
    let secondary = secondary.unwrap_or_else(|| derived("secondary"));
    if [&primary, &secondary]
        .iter()
        .any(|key| STANDARD.decode(key.as_str()).is_err())
    {
        return Err(SeedError::Name(name.to_owned()));
    }
    Ok(Authentication::Sas { primary, secondary })
}

/// 18 digits that depend on the name alone.
fn generation(name: &str) -> String {
    let hash = digest(&SHA256, format!("generation {name}").as_bytes());
    let number = hash
        .as_ref()
        .iter()
        .take(8)
        .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    format!("6375{:014}", number % 100_000_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: &str = r#"{
        "hostname":"hub.lab.example",
        "policies":[{"name":"iothubowner","key":"b3duZXI="}],
        "devices":[
          {"deviceId":"leaf1","iotEdge":false,"parent":"edge2","status":"disabled"},
          {"deviceId":"edge2","iotEdge":true,"parent":"edge1","modules":[{"moduleId":"modA"}]},
          {"deviceId":"edge1","iotEdge":true,"parent":null,
           "primaryKey":"cA==","secondaryKey":"cw==",
           "modules":[{"moduleId":"$edgeHub","primaryKey":"aHA=","secondaryKey":"aHM="}]}]}"#;

    #[test]
    fn parents_may_come_after_their_children_and_twice_is_the_same() {
        let [one, two] = [0, 1].map(|_| read(SEED, "HUB.lab.example", 0).unwrap());
        assert_eq!(one.policies[0].name, "iothubowner");
        let leaf = one.devices.get("leaf1").unwrap();
        let edge2 = one.devices.get("edge2").unwrap();
        assert!(!leaf.enabled);
        assert_eq!(leaf.device_scope, edge2.device_scope);
        assert_eq!(one.devices.parent(edge2).unwrap().id, "edge1");
        let hub = one.devices.find_module("edge1", "$edgeHub").unwrap();
        assert_eq!(
            hub.authentication.keys().collect::<Vec<_>>(),
            ["aHA=", "aHM="]
        );
        for device in one.devices.iter() {
            let other = two.devices.get(&device.id).unwrap();
            assert_eq!(device.generation_id, other.generation_id);
            assert!(device.authentication == other.authentication);
            for (module, other) in device.modules.values().zip(other.modules.values()) {
                assert!(module.authentication == other.authentication);
            }
        }
    }

    #[test]
    fn unusable_seeds_are_refused() {
        let bad = |text: &str| read(text, "h.example", 0).err().unwrap();
        assert!(matches!(
            bad(r#"{"hostname":"other"}"#),
            SeedError::Hostname { .. }
        ));
        assert!(matches!(bad(r#"{"device":[]}"#), SeedError::Json(_)));
        assert!(matches!(
            bad(r#"{"devices":[{"deviceId":"a/b"}]}"#),
            SeedError::Name(_)
        ));
        let key = r#"{"devices":[{"deviceId":"a","primaryKey":"?"}]}"#;
        assert!(matches!(bad(key), SeedError::Name(_)));
        let circle = r#"{"devices":[{"deviceId":"a","iotEdge":true,"parent":"b"},
            {"deviceId":"b","iotEdge":true,"parent":"a"}]}"#;
        assert!(matches!(bad(circle), SeedError::Parents(_)));
        let leaf = r#"{"devices":[{"deviceId":"a","parent":"b"},{"deviceId":"b"}]}"#;
        assert!(matches!(bad(leaf), SeedError::Parents(_)));
        let twice = r#"{"devices":[{"deviceId":"a"},{"deviceId":"a"}]}"#;
        assert!(matches!(bad(twice), SeedError::Registry { .. }));
    }
}
