//! `lab.json`: what a running lab tells its users. A public contract; see the README.
//!
//! It is replaced as a whole (written beside and renamed): a reader sees the old or the new one.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabJson {
    /// PEM of the root CA that clients trust.
    pub ca_file: PathBuf,
    /// The IoT Hub emulator.
    pub hub: HubJson,
    /// The edgeHubs, parents before children.
    pub layers: Vec<LayerJson>,
    /// What can connect.
    pub identities: Vec<Identity>,
}

/// The IoT Hub emulator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubJson {
    /// Always `hub`.
    pub name: String,
    /// Resolves on this machine; the address itself where no host names can be made.
    pub hostname: String,
    /// Public address.
    pub address: Ipv4Addr,
    /// Port of MQTT over TLS.
    pub mqtts: Option<u16>,
    /// Port of AMQP over TLS.
    pub amqps: Option<u16>,
    /// Port of HTTPS.
    pub https: Option<u16>,
    /// Base URL of the emulator's control API.
    pub control: String,
    /// For service SDKs.
    pub service_connection_string: Option<String>,
    /// For event hub readers.
    pub eventhub_connection_string: Option<String>,
    /// Null while it does not run.
    pub pid: Option<u32>,
    /// Log file.
    pub log: PathBuf,
}

/// One edgeHub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerJson {
    /// Name for the lab's commands.
    pub name: String,
    /// Device id of the edge device.
    pub device_id: String,
    /// Name of the layer above; null at the top.
    pub parent: Option<String>,
    /// Resolves on this machine.
    pub hostname: String,
    /// Public address.
    pub address: Ipv4Addr,
    /// Port of MQTT over TLS.
    pub mqtts: Option<u16>,
    /// Port of AMQP over TLS.
    pub amqps: Option<u16>,
    /// Port of HTTPS.
    pub https: Option<u16>,
    /// Port of `/metrics`, `/healthz`, `/readyz` (plain HTTP).
    pub metrics: Option<u16>,
    /// `StorageFolder`.
    pub storage: PathBuf,
    /// Null while it does not run.
    pub pid: Option<u32>,
    /// Log file.
    pub log: PathBuf,
}

/// Something that can connect to a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// `leaf1` or `edge3/modA`.
    pub id: String,
    /// What it is.
    pub kind: IdentityKind,
    /// Name of the layer that it connects to.
    pub parent: String,
    /// Complete, with `GatewayHostName`.
    pub connection_string: String,
}

/// Leaf or module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdentityKind {
    /// A device of its own in the scope of an edge device.
    Leaf,
    /// A module of the edge device.
    Module,
}

impl LabJson {
    /// Reads the file of a running lab.
    ///
    /// # Errors
    /// When there is none, or it is not one.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let text =
            fs::read(path).with_context(|| format!("cannot read {shown}: does the lab run?"))?;
        serde_json::from_slice(&text).with_context(|| format!("{shown} is no lab.json"))
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// When its folder cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        let beside = path.with_extension("json.new");
        fs::write(&beside, text).with_context(|| format!("cannot write {}", beside.display()))?;
        fs::rename(&beside, path).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field for field the example of the contract.
    const GOLDEN: &str = r#"{
  "ca_file": "/state/root-ca.pem",
  "hub": {
    "name": "hub",
    "hostname": "hub.lab40.example",
    "address": "127.0.40.1",
    "mqtts": 8883,
    "amqps": 5671,
    "https": 443,
    "control": "http://127.0.40.1:9090",
    "service_connection_string": "HostName=hub.lab40.example;SharedAccessKeyName=iothubowner;SharedAccessKey=a2V5",
    "eventhub_connection_string": "Endpoint=sb://hub.lab40.example/;SharedAccessKeyName=iothubowner;SharedAccessKey=a2V5;EntityPath=hub-events",
    "pid": 1,
    "log": "/state/hub/log"
  },
  "layers": [
    {
      "name": "edge1",
      "device_id": "edge1",
      "parent": null,
      "hostname": "edge1.lab40.example",
      "address": "127.0.40.2",
      "mqtts": 8883,
      "amqps": 5671,
      "https": 443,
      "metrics": 9600,
      "storage": "/state/edge1/storage",
      "pid": null,
      "log": "/state/edge1/log"
    }
  ],
  "identities": [
    {
      "id": "leaf1",
      "kind": "leaf",
      "parent": "edge1",
      "connection_string": "HostName=hub.lab40.example;DeviceId=leaf1;SharedAccessKey=a2V5;GatewayHostName=edge1.lab40.example"
    },
    {
      "id": "edge1/modA",
      "kind": "module",
      "parent": "edge1",
      "connection_string": "HostName=hub.lab40.example;DeviceId=edge1;ModuleId=modA;SharedAccessKey=a2V5;GatewayHostName=edge1.lab40.example"
    }
  ]
}
"#;

    #[test]
    fn the_shape_is_the_contract() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lab.json");
        fs::write(&path, GOLDEN).unwrap();
        let read = LabJson::read(&path).unwrap();
        assert_eq!(read.identities[1].kind, IdentityKind::Module);
        read.write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), GOLDEN);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }
}
