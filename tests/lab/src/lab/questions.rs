//! What can be asked of a running lab.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Host, HostSlot, Lab};
use crate::lab_json::{HubJson, Identity, IdentityKind, LabJson, LayerJson};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::seed::{Seed, Status};
use crate::{ConnectionString, HUB, http, network, process};

/// The policy with every right, as connection strings name it.
const OWNER: &str = "SharedAccessKeyName=iothubowner";

impl Lab {
    /// A host's addresses, names and files.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.slot(name).map(|slot| &slot.host)
    }

    /// The edges, parents before children.
    pub fn edges(&self) -> impl Iterator<Item = &Host> {
        self.slots
            .iter()
            .map(|slot| &slot.host)
            .filter(|host| host.name != HUB)
    }

    /// The process id of a host.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self, name: &str) -> Result<u32> {
        self.slot(name)?
            .pid()
            .with_context(|| format!("{name} does not run"))
    }

    /// The resident memory of a host in bytes.
    ///
    /// # Errors
    /// When it does not run.
    pub fn resident_bytes(&self, name: &str) -> Result<u64> {
        process::resident_bytes(self.pid(name)?)
    }

    /// What a host has logged since its first start.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub fn log(&self, name: &str) -> Result<String> {
        let path = &self.slot(name)?.host.log;
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A scrape of a hub's metrics; faults of the network do not touch it.
    ///
    /// # Errors
    /// When the hub does not answer.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn metrics(&self, name: &str) -> Result<Metrics> {
        let host = self.host(name)?;
        Metrics::fetch(network::socket(host.private_address, host.ports.metrics)).await
    }

    /// What reached IoT Hub.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        Ledger::at(&self.state.path().join(HUB).join("ledger.jsonl"))
    }

    /// Where the emulator's control API listens.
    #[must_use]
    pub fn control_address(&self) -> SocketAddr {
        let ports = self.lease.ports();
        network::socket(self.lease.private(0), ports.control)
    }

    /// A call on the emulator's control API, which the network's faults do not touch: `GET
    /// /connections`, `PUT /ports/mqtt` with `{"state":"black_hole"}`, `POST /faults`, …
    ///
    /// # Errors
    /// When it does not answer with 2xx and JSON.
    ///
    /// # Cancel safety
    /// The call may or may not have taken effect.
    pub async fn control(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let method = method.parse().context("no HTTP method")?;
        let answer = http::call(self.control_address(), method, path, body).await?;
        serde_json::from_slice(&answer).with_context(|| format!("{path}: no JSON"))
    }

    /// PEM of the root CA that clients trust.
    #[must_use]
    pub fn ca_file(&self) -> &Path {
        self.root.certificate()
    }

    /// The state folder.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// Registered identities and their keys.
    #[must_use]
    pub const fn seed(&self) -> &Seed {
        &self.seed
    }

    /// The connection string of any registered identity, through the edge `gateway` if given.
    ///
    /// # Errors
    /// When there is no such identity or edge.
    pub fn connection_string(&self, id: &str, gateway: Option<&str>) -> Result<ConnectionString> {
        let gateway = gateway.map(|name| self.host(name)).transpose()?;
        self.seed
            .connection_string(id, gateway.map(|host| host.hostname.as_str()))
    }

    /// Every enabled leaf and module below the lab's edges, `$edgeHub` excepted.
    ///
    /// # Errors
    /// When a key is missing.
    pub fn identities(&self) -> Result<Vec<Identity>> {
        let (mut leaves, mut modules) = (Vec::new(), Vec::new());
        for device in self
            .seed
            .devices
            .iter()
            .filter(|d| d.status == Status::Enabled)
        {
            let hosted = self.edges().any(|edge| edge.name == device.device_id);
            if hosted {
                for module in &device.modules {
                    if !module.module_id.starts_with('$') {
                        let id = format!("{}/{}", device.device_id, module.module_id);
                        let edge = device.device_id.clone();
                        modules.push(self.identity(id, IdentityKind::Module, edge)?);
                    }
                }
            } else if !device.iot_edge
                && let Some(parent) = &device.parent
                && self.edges().any(|edge| edge.name == *parent)
            {
                let id = device.device_id.clone();
                leaves.push(self.identity(id, IdentityKind::Leaf, parent.clone())?);
            }
        }
        leaves.append(&mut modules);
        Ok(leaves)
    }

    fn identity(&self, id: String, kind: IdentityKind, parent: String) -> Result<Identity> {
        let connection_string = self.connection_string(&id, Some(&parent))?.to_string();
        Ok(Identity {
            id,
            kind,
            parent,
            connection_string,
        })
    }

    /// What `lab.json` says now.
    ///
    /// # Errors
    /// When a key is missing.
    pub fn lab_json(&self) -> Result<LabJson> {
        let hub = self.slot(HUB)?;
        let Host {
            ports,
            hostname,
            address,
            log,
            ..
        } = &hub.host;
        let owner = self
            .seed
            .policies
            .iter()
            .find(|policy| policy.name == "iothubowner");
        let owner = owner.and_then(|policy| policy.key.as_ref());
        Ok(LabJson {
            ca_file: self.ca_file().to_owned(),
            hub: HubJson {
                name: HUB.to_owned(),
                hostname: hostname.clone(),
                address: *address,
                mqtts: Some(ports.mqtts),
                amqps: Some(ports.amqps),
                https: Some(ports.https),
                control: format!("http://{address}:{}", ports.control),
                service_connection_string: owner
                    .map(|key| format!("HostName={hostname};{OWNER};SharedAccessKey={key}")),
                eventhub_connection_string: owner.map(|key| {
                    // The emulator's event hub is named after the IoT Hub.
                    let name = hostname.split('.').next().unwrap_or(hostname);
                    let endpoint = format!("Endpoint=sb://{hostname}/;{OWNER}");
                    format!("{endpoint};SharedAccessKey={key};EntityPath={name}-events")
                }),
                pid: hub.pid(),
                log: log.clone(),
            },
            layers: self.slots.iter().filter_map(layer_json).collect(),
            identities: self.identities()?,
        })
    }

    /// Where `lab.json` is.
    #[must_use]
    pub fn lab_json_path(&self) -> PathBuf {
        self.state.path().join("lab.json")
    }

    /// Writes `lab.json` for the first time: everything is ready. Later starts and kills replace
    /// it.
    ///
    /// # Errors
    /// When the state folder cannot be written.
    pub fn announce(&self) -> Result<()> {
        *self.announced.lock() = true;
        self.update_lab_json()
    }

    pub(super) fn update_lab_json(&self) -> Result<()> {
        let announced = self.announced.lock();
        if *announced {
            self.lab_json()?.write(&self.lab_json_path())
        } else {
            Ok(())
        }
    }
}

/// The entry of an edge; nothing for the hub.
fn layer_json(slot: &HostSlot) -> Option<LayerJson> {
    let host = &slot.host;
    Some(LayerJson {
        storage: host.storage.clone()?,
        name: host.name.clone(),
        device_id: host.name.clone(),
        parent: host.parent.clone(),
        hostname: host.hostname.clone(),
        address: host.address,
        mqtts: Some(host.ports.mqtts),
        amqps: Some(host.ports.amqps),
        https: Some(host.ports.https),
        metrics: Some(host.ports.metrics),
        pid: slot.pid(),
        log: host.log.clone(),
    })
}
