//! Microsoft's Python SDK, unmodified, in its own process.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use edgehub_lab::Lab;
use serde::Deserialize;
use tokio::process::Command;

use crate::program;

/// An interpreter with the SDK takes seconds to start on two busy cores.
const PATIENCE: Duration = Duration::from_secs(240);

/// A message whose PUBACK the SDK has seen, as it was given to the SDK.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SdkMessage {
    /// Number of the message, from 1.
    pub sequence: u64,
    body_base64: String,
    /// System properties by IoT Hub's names.
    pub system: BTreeMap<String, String>,
    /// Custom properties.
    pub properties: BTreeMap<String, String>,
}

impl SdkMessage {
    /// The body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        STANDARD
            .decode(&self.body_base64)
            .expect("send.py writes base64")
    }
}

/// Sends `count` messages with `IoTHubDeviceClient` or `IoTHubModuleClient` as this identity
/// through this edge (`sdk/python/send.py`) and returns those that were acknowledged.
pub async fn send(lab: &Lab, id: &str, gateway: &str, count: u64) -> Vec<SdkMessage> {
    let folder = crate::root().join("tests/e2e/sdk/python");
    let python = folder.join(".venv/bin/python");
    assert!(python.exists(), "no Python SDK: run scripts/lib/sdks.sh");
    let connection = lab
        .connection_string(id, Some(gateway))
        .expect("a registered identity");
    let mut command = Command::new(python);
    command
        .arg(folder.join("send.py"))
        .arg("--ca")
        .arg(lab.ca_file())
        .args(["--count", &count.to_string()])
        // Not on the command line: everybody on the machine could read the key there.
        .env("CONNECTION_STRING", connection.to_string());
    let outcome = program::run(command, PATIENCE).await;
    assert_eq!(
        outcome.code,
        Some(0),
        "{id}: {}\n{}",
        outcome.stdout,
        outcome.stderr
    );
    let lines = outcome.stdout.lines().map(serde_json::from_str);
    let messages: Result<_, _> = lines.collect();
    messages.unwrap_or_else(|error| panic!("{id}: {error}:\n{}", outcome.stdout))
}
