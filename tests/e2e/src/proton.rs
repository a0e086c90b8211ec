//! Apache Qpid Proton for Python, in its own process: an AMQP client that knows nothing of Azure
//! (`sdk/python/proton_agent.py`).

use std::time::Duration;

use edgehub_lab::Lab;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::program;

/// An interpreter takes seconds to start on two busy cores, and it may wait for every answer.
const PATIENCE: Duration = Duration::from_secs(240);

/// One connection to the AMQP port of a host of the lab, with what the agent is to do there: the
/// members `tokens` and `links`, and with SASL PLAIN `user` and `password`. What came of it.
pub async fn connection(lab: &Lab, host: &str, mut case: Value) -> Value {
    let host = lab.host(host).expect("a host of the lab");
    let members = case.as_object_mut().expect("an object");
    for (name, value) in [
        ("host", json!(host.hostname)),
        ("port", json!(host.ports.amqps)),
        ("ca", json!(lab.ca_file())),
    ] {
        members.insert(name.to_owned(), value);
    }
    for name in ["tokens", "links"] {
        members.entry(name).or_insert(json!([]));
    }
    let folder = crate::root().join("tests/e2e/sdk/python");
    let python = folder.join(".venv-proton/bin/python");
    assert!(python.exists(), "no Qpid Proton: run scripts/lib/sdks.sh");
    let mut command = Command::new(python);
    command
        .arg(folder.join("proton_agent.py"))
        // Not on the command line: everybody on the machine could read the tokens there.
        .env("PROTON_CASE", case.to_string());
    let outcome = program::run(command, PATIENCE).await;
    assert_eq!(
        outcome.code,
        Some(0),
        "{}\n{}",
        outcome.stdout,
        outcome.stderr
    );
    let seen = serde_json::from_str(&outcome.stdout);
    seen.unwrap_or_else(|error| panic!("{error}: {}", outcome.stdout))
}
