//! How the two binaries are called: the emulator's command line and a hub's environment
//! (spec/operations.md A1; the development form of the identity).

use std::path::Path;

use anyhow::Result;

use crate::builder::ready_file;
use crate::lab::Host;
use crate::process::Launch;
use crate::seed::Seed;
use crate::topology::EdgeSpec;

/// Above this many identities the hub's default of 100 connected clients does not do any more:
/// a parent has a connection for each identity below it.
const CLIENTS_WITHOUT_SETTING: usize = 90;

/// The emulator's command line.
pub(crate) fn emulator(program: &Path, host: &Host, strict: bool) -> Launch {
    let file = |name: &str| host.folder.join(name).to_string_lossy().into_owned();
    let mut arguments: Vec<String> = [
        ("--hostname", host.hostname.clone()),
        ("--address", host.private_address.to_string()),
        ("--amqp-port", host.ports.amqps.to_string()),
        ("--mqtt-port", host.ports.mqtts.to_string()),
        ("--https-port", host.ports.https.to_string()),
        ("--control-port", host.ports.control.to_string()),
        ("--cert", file("server-chain.pem")),
        ("--key", file("server-key.pem")),
        ("--seed", file("seed.json")),
        ("--ledger", file("ledger.jsonl")),
        (
            "--ready-file",
            ready_file(&host.folder).to_string_lossy().into_owned(),
        ),
    ]
    .into_iter()
    .flat_map(|(name, value)| [name.to_owned(), value])
    .collect();
    if strict {
        arguments.push("--strict".to_owned());
    }
    Launch {
        program: program.to_owned(),
        arguments,
        environment: Vec::new(),
        log: host.log.clone(),
        with_stdin: false,
    }
}

/// What a hub's environment is made of.
pub(crate) struct Hub<'a> {
    pub(crate) host: &'a Host,
    pub(crate) parent: Option<&'a Host>,
    pub(crate) edge: &'a EdgeSpec,
    pub(crate) seed: &'a Seed,
    pub(crate) trust_bundle: &'a Path,
    pub(crate) log_level: &'a str,
    pub(crate) faults: Option<&'a Path>,
    pub(crate) clients: usize,
}

impl Hub<'_> {
    /// The whole environment.
    pub(crate) fn variables(&self) -> Result<Vec<(String, String)>> {
        let Host { folder, ports, .. } = self.host;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let identity = format!("{}/$edgeHub", self.edge.name);
        let mut variables = vec![
            (
                "IotHubConnectionString",
                self.seed.connection_string(&identity, None)?.to_string(),
            ),
            (
                "EdgeHubDevServerCertificateFile",
                text(&folder.join("server-chain.pem")),
            ),
            (
                "EdgeHubDevServerPrivateKeyFile",
                text(&folder.join("server-key.pem")),
            ),
            ("EdgeHubDevTrustBundleFile", text(self.trust_bundle)),
            ("EdgeDeviceHostName", self.host.hostname.clone()),
            ("UpstreamProtocol", "Mqtt".to_owned()),
            ("ConfigSource", "local".to_owned()),
            (
                "routes__upstream",
                "FROM /messages/* INTO $upstream".to_owned(),
            ),
            ("StorageFolder", text(&folder.join("storage"))),
            ("ListenAddress", self.host.private_address.to_string()),
            ("MqttSettings__Port", ports.mqtts.to_string()),
            ("AmqpSettings__Port", ports.amqps.to_string()),
            ("HttpSettings__Port", ports.https.to_string()),
            ("HttpSettings__metrics_port", ports.metrics.to_string()),
            ("UpstreamMqttPort", ports.mqtts.to_string()),
            ("UpstreamAmqpPort", ports.amqps.to_string()),
            ("UpstreamHttpsPort", ports.https.to_string()),
            ("RuntimeLogLevel", self.log_level.to_owned()),
        ];
        if let Some(parent) = self.parent {
            variables.push(("IOTEDGE_GATEWAYHOSTNAME", parent.hostname.clone()));
        }
        if let Some(sync) = self.edge.storage_sync {
            variables.push(("StorageSync", sync.as_str().to_owned()));
        }
        if self.clients > CLIENTS_WITHOUT_SETTING {
            variables.push(("MaxConnectedClients", (2 * self.clients).to_string()));
        }
        if let Some(faults) = self.faults {
            variables.push(("EDGEHUB_FAULTS", text(faults)));
        }
        let mut variables: Vec<(String, String)> = variables
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        for (name, value) in &self.edge.environment {
            // The hub compares names without case; two spellings of one name are a conflict.
            variables.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
            variables.push((name.clone(), value.clone()));
        }
        Ok(variables)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::path::PathBuf;

    use super::*;
    use crate::network::Ports;
    use crate::topology::Topology;

    fn host(name: &str, octet: u8) -> Host {
        Host {
            name: name.to_owned(),
            parent: None,
            hostname: format!("{name}.lab40.example"),
            address: Ipv4Addr::new(127, 0, 40, octet),
            private_address: Ipv4Addr::new(127, 0, 40, 100 + octet),
            ports: Ports::UNPRIVILEGED,
            folder: PathBuf::from("/state").join(name),
            log: PathBuf::from("/state").join(name).join("log"),
            storage: None,
        }
    }

    #[test]
    fn a_nested_hub_gets_its_identity_its_parent_and_every_port() {
        let mut edge = EdgeSpec::new("edge2", Some("edge1"));
        edge.environment
            .push(("runtimeloglevel".to_owned(), "debug".to_owned()));
        let topology = Topology {
            edges: vec![EdgeSpec::new("edge1", None), edge.clone()],
            ..Topology::default()
        };
        let seed = topology.seed("hub.lab40.example", None, None);
        let (own, parent) = (host("edge2", 3), host("edge1", 2));
        let mut hub = Hub {
            host: &own,
            parent: Some(&parent),
            edge: &edge,
            seed: &seed,
            trust_bundle: Path::new("/state/root-ca.pem"),
            log_level: "info",
            faults: Some(Path::new("/tmp/f")),
            clients: 91,
        };
        let variables = hub.variables().unwrap();
        let find = |name: &str| {
            let mut found = variables
                .iter()
                .filter(|(known, _)| known.eq_ignore_ascii_case(name));
            let value = found.next().map(|(_, value)| value.as_str());
            assert!(found.next().is_none(), "{name} is there twice");
            value
        };
        let connection_string = find("IotHubConnectionString").unwrap();
        let start = "HostName=hub.lab40.example;DeviceId=edge2;ModuleId=$edgeHub;SharedAccessKey=";
        assert!(connection_string.starts_with(start));
        assert_eq!(find("IOTEDGE_GATEWAYHOSTNAME"), Some("edge1.lab40.example"));
        assert_eq!(find("ListenAddress"), Some("127.0.40.103"));
        assert_eq!(find("HttpSettings__Port"), Some("8443"));
        assert_eq!(find("UpstreamHttpsPort"), Some("8443"));
        assert_eq!(find("MaxConnectedClients"), Some("182"));
        assert_eq!(find("RuntimeLogLevel"), Some("debug"));
        assert_eq!(find("EDGEHUB_FAULTS"), Some("/tmp/f"));
        assert_eq!(find("StorageSync"), None);
        hub.parent = None;
        let variables = hub.variables().unwrap();
        assert!(
            !variables
                .iter()
                .any(|(name, _)| name == "IOTEDGE_GATEWAYHOSTNAME")
        );
    }

    #[test]
    fn the_emulator_is_told_everything_on_its_command_line() {
        let launch = emulator(Path::new("/bin/emulator"), &host("hub", 1), true);
        let line = launch.arguments.join(" ");
        assert!(line.starts_with("--hostname hub.lab40.example --address 127.0.40.101 "));
        assert!(line.contains("--https-port 8443 --control-port 9090 "));
        assert!(line.ends_with("--ready-file /state/hub/ready --strict"));
    }
}
