//! The engine judged by clients in other languages, rhea for Node and Qpid Proton for Python, which
//! share no code with it: what they do with the queues of `queues` is in their scripts.
//!
//! `scripts/lib/sdks.sh` installs them; `scripts/test.sh --quick` leaves this out.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests; clippy.toml covers the tests themselves"
)]

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::task::LocalSet;
use tokio::time::timeout;

mod queues;

/// An interpreter takes seconds to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

fn sdk() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.join("../../tests/e2e/sdk")
}

/// What the client says of the server, which it is given the port of.
async fn judgement(mut client: Command) -> Value {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    client
        .arg(port.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let tasks = LocalSet::new();
    let output = tokio::select! {
        error = tasks.run_until(queues::serve(listener)) => panic!("{error}"),
        output = timeout(PATIENCE, client.output()) => output.expect("it ends"),
    };
    let output = output.expect("the client starts: scripts/lib/sdks.sh installs it");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).expect("an object")
}

/// What every client has to see.
fn good() -> Value {
    json!({
        // All of what it sent.
        "accepted": 100,
        // Bodies of many small frames, each way.
        "large": true,
        // Released, a message comes again, in its place; rejected, it is kept elsewhere.
        "again": true,
        "in_order": true,
        "dead": ["message 1"],
        "outcomes": ["rejected", "released", "modified"],
        // A link on which it sends, and one on which it receives.
        "refused": ["amqp:unauthorized-access", "amqp:unauthorized-access"],
        "detached": "amqp:resource-deleted",
        "ended": "amqp:resource-deleted",
        // As many come as there is credit for.
        "credit": [10, 15, 25],
        "still_works": "accepted",
        "closed": true,
        "plain": true,
        "wrong": false,
        "settled": true,
        "many": true,
        "idle": true,
    })
}

#[tokio::test]
async fn rhea_finds_nothing_wrong() {
    let mut node = Command::new("node");
    node.arg(sdk().join("node/queues.js"));
    assert_eq!(judgement(node).await, good());
}

#[tokio::test]
async fn qpid_proton_finds_nothing_wrong() {
    let folder = sdk().join("python");
    let mut python = Command::new(folder.join(".venv-proton/bin/python"));
    python.arg(folder.join("proton_queues.py"));
    assert_eq!(judgement(python).await, good());
}
