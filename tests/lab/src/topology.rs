//! What a lab consists of, and the registry content (seed) that follows from it.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::HUB;
use crate::seed::{Seed, SeedDevice, SeedPolicy, Status};

/// When a host is there, seen from the end of [`LabBuilder::start`](crate::LabBuilder::start).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtStart {
    /// Started, and waited for until it is ready.
    #[default]
    Ready,
    /// Started and not waited for: a hub that cannot become ready, because upstream is missing.
    Started,
    /// Not started.
    Off,
}

/// `StorageSync` of a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageSync {
    /// A commit survives the process.
    Os,
    /// A commit survives power loss.
    Disk,
}

impl StorageSync {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Os => "os",
            Self::Disk => "disk",
        }
    }
}

/// One edgeHub. Its device id is its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeSpec {
    /// Host name within the lab and device id.
    pub name: String,
    /// The edge above it; `None` for one that talks to the IoT Hub.
    pub parent: Option<String>,
    /// `StorageSync`; unset leaves it to the hub's default.
    pub storage_sync: Option<StorageSync>,
    /// Added to (and winning over) the environment that the lab makes.
    pub environment: Vec<(String, String)>,
    /// Whether it runs at the end of the start.
    pub at_start: AtStart,
}

impl EdgeSpec {
    /// An edge below `parent` with nothing special about it.
    #[must_use]
    pub fn new(name: impl Into<String>, parent: Option<&str>) -> Self {
        Self {
            name: name.into(),
            parent: parent.map(str::to_owned),
            storage_sync: None,
            environment: Vec::new(),
            at_start: AtStart::Ready,
        }
    }
}

/// A leaf device that connects to an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafSpec {
    /// Device id.
    pub id: String,
    /// The edge that is its parent and gateway.
    pub parent: String,
}

/// A module of an edge, connecting to that edge's own hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Module id.
    pub id: String,
    /// The edge whose module it is.
    pub edge: String,
}

/// A further registered identity without a process: a sibling, a disabled device, `edge10`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Device id.
    pub id: String,
    /// The edge device in whose scope it is.
    pub parent: Option<String>,
    /// Whether it is an edge device itself; then it also gets a `$edgeHub` module.
    pub iot_edge: bool,
    /// `enabled` or `disabled`.
    pub enabled: bool,
    /// Its modules.
    pub modules: Vec<String>,
}

impl DeviceSpec {
    /// An enabled device without modules in the scope of `parent`.
    #[must_use]
    pub fn new(id: impl Into<String>, parent: Option<&str>) -> Self {
        Self {
            id: id.into(),
            parent: parent.map(str::to_owned),
            iot_edge: false,
            enabled: true,
            modules: Vec::new(),
        }
    }
}

/// Everything that a lab consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Parents before their children.
    pub edges: Vec<EdgeSpec>,
    /// Leaf devices.
    pub leaves: Vec<LeafSpec>,
    /// Modules besides `$edgeHub`.
    pub modules: Vec<ModuleSpec>,
    /// Identities without a process.
    pub devices: Vec<DeviceSpec>,
}

impl Topology {
    /// Checks that names are unique and every parent is there, parents before children.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub fn check(&self) -> Result<()> {
        let mut edges = BTreeSet::new();
        for edge in &self.edges {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            ensure!(
                !edge.name.is_empty() && edge.name.chars().all(plain),
                "'{}' cannot be part of a host name (a-z, 0-9, -)",
                edge.name
            );
            ensure!(
                !["client", "clients", HUB].contains(&edge.name.as_str()),
                "reserved name"
            );
            if let Some(parent) = &edge.parent {
                ensure!(
                    edges.contains(parent),
                    "{}: no edge {parent} before it",
                    edge.name
                );
            }
            ensure!(
                edges.insert(edge.name.clone()),
                "edge {} is there twice",
                edge.name
            );
        }
        let mut devices = edges.clone();
        for leaf in &self.leaves {
            ensure!(
                edges.contains(&leaf.parent),
                "{}: no edge {}",
                leaf.id,
                leaf.parent
            );
            ensure!(
                devices.insert(leaf.id.clone()),
                "device {} is there twice",
                leaf.id
            );
        }
        for device in &self.devices {
            ensure!(
                devices.insert(device.id.clone()),
                "device {} is there twice",
                device.id
            );
        }
        let mut modules = BTreeSet::new();
        for module in &self.modules {
            ensure!(
                edges.contains(&module.edge),
                "{}: no edge {}",
                module.id,
                module.edge
            );
            ensure!(
                modules.insert((&module.edge, &module.id)),
                "{} is there twice",
                module.id
            );
        }
        Ok(())
    }

    /// The registry that this topology needs, with everything in the seed that a user gave. Keys
    /// are the user's, else those of `earlier` (the last start with the same state folder), else
    /// random. The topology decides where its own devices are and whether they are enabled.
    #[must_use]
    pub fn seed(&self, hub_host: &str, earlier: Option<&Seed>, users: Option<&Seed>) -> Seed {
        let mut seed = Seed {
            hostname: hub_host.to_owned(),
            ..Seed::default()
        };
        seed.policies.push(SeedPolicy {
            name: "iothubowner".to_owned(),
            key: None,
        });
        for edge in &self.edges {
            let mut device = SeedDevice::new(&edge.name, edge.parent.as_deref());
            device.iot_edge = true;
            device.add_modules(["$edgeHub"]);
            let own = self
                .modules
                .iter()
                .filter(|module| module.edge == edge.name);
            device.add_modules(own.map(|module| module.id.as_str()));
            seed.devices.push(device);
        }
        for leaf in &self.leaves {
            seed.devices
                .push(SeedDevice::new(&leaf.id, Some(&leaf.parent)));
        }
        for spec in &self.devices {
            let mut device = SeedDevice::new(&spec.id, spec.parent.as_deref());
            device.iot_edge = spec.iot_edge;
            device.status = if spec.enabled {
                Status::Enabled
            } else {
                Status::Disabled
            };
            if spec.iot_edge {
                device.add_modules(["$edgeHub"]);
            }
            device.add_modules(spec.modules.iter().map(String::as_str));
            seed.devices.push(device);
        }
        seed.complete(earlier, users);
        seed
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    fn topology() -> Topology {
        Topology {
            edges: vec![
                EdgeSpec::new("edge1", None),
                EdgeSpec::new("edge2", Some("edge1")),
            ],
            leaves: vec![LeafSpec {
                id: "leaf1".to_owned(),
                parent: "edge2".to_owned(),
            }],
            modules: vec![ModuleSpec {
                id: "modA".to_owned(),
                edge: "edge1".to_owned(),
            }],
            devices: vec![DeviceSpec {
                enabled: false,
                ..DeviceSpec::new("edge10", Some("edge1"))
            }],
        }
    }

    #[test]
    fn the_seed_is_what_the_emulator_reads() {
        let seed = topology().seed("hub.example", None, None);
        let json = serde_json::to_value(&seed).unwrap();
        assert_eq!(json["hostname"], "hub.example");
        assert_eq!(json["policies"][0]["name"], "iothubowner");
        let ids: Vec<_> = json["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d["deviceId"].clone())
            .collect();
        assert_eq!(ids, ["edge1", "edge2", "leaf1", "edge10"]);
        let edge1 = &json["devices"][0];
        assert_eq!(edge1["iotEdge"], true);
        assert_eq!(edge1["parent"], serde_json::Value::Null);
        assert_eq!(edge1["modules"][0]["moduleId"], "$edgeHub");
        assert_eq!(edge1["modules"][1]["moduleId"], "modA");
        assert_eq!(
            STANDARD
                .decode(edge1["primaryKey"].as_str().unwrap())
                .unwrap()
                .len(),
            32
        );
        assert_eq!(json["devices"][2]["parent"], "edge2");
        assert_eq!(json["devices"][3]["status"], "disabled");
    }

    #[test]
    fn keys_and_further_identities_come_from_earlier_seeds() {
        let first = topology().seed("hub.example", None, None);
        let users: Seed = serde_json::from_str(
            r#"{"devices":[{"deviceId":"leaf1","primaryKey":"dXNlcnM="},
                {"deviceId":"mine","parent":"edge1","modules":[{"moduleId":"m"}]}]}"#,
        )
        .unwrap();
        let second = topology().seed("hub2.example", Some(&first), Some(&users));
        assert_eq!(second.hostname, "hub2.example");
        assert_eq!(second.policies, first.policies);
        for id in ["edge1", "edge1/$edgeHub", "edge1/modA", "edge10"] {
            assert_eq!(
                second.primary_key(id).unwrap(),
                first.primary_key(id).unwrap(),
                "{id}"
            );
        }
        assert_eq!(second.primary_key("leaf1").unwrap(), "dXNlcnM=");
        assert_eq!(
            second.secondary_key("leaf1").unwrap(),
            first.secondary_key("leaf1").unwrap()
        );
        assert!(second.primary_key("mine/m").is_ok());
        assert!(second.primary_key("nobody").is_err());
        let third = topology().seed("hub2.example", Some(&second), None);
        assert!(
            third.primary_key("mine").is_err(),
            "the user's file is not given any more"
        );
        assert_eq!(third.primary_key("leaf1").unwrap(), "dXNlcnM=");
        let text = second
            .connection_string("edge1/modA", Some("gw"))
            .unwrap()
            .to_string();
        assert!(text.starts_with("HostName=hub2.example;DeviceId=edge1;ModuleId=modA;"));
        assert!(text.ends_with(";GatewayHostName=gw"));
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        topology().check().unwrap();
        let mut orphan = topology();
        orphan.edges[1].parent = Some("edge7".to_owned());
        assert!(orphan.check().unwrap_err().to_string().contains("edge7"));
        let mut twice = topology();
        twice.devices.push(DeviceSpec::new("leaf1", None));
        assert!(twice.check().unwrap_err().to_string().contains("leaf1"));
        let mut odd = topology();
        odd.edges[0].name = "Edge 1".to_owned();
        assert!(odd.check().is_err());
    }
}
