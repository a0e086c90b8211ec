//! Acceptance 1 of the walking skeleton: Microsoft's Python SDK, unmodified.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "these are the tests"
)]

use std::collections::BTreeMap;

use edgehub_lab::{HUB, Lab, LabBuilder};
use edgehub_tests::PATIENCE;
use edgehub_tests::python::{self, SdkMessage};
use serde_json::Value;

/// Messages of each sender.
const MESSAGES: u64 = 200;

/// Who sends, at which hub, and along which chain its messages arrive at the IoT Hub.
const SENDERS: [(&str, &str, &str); 3] = [
    ("leaf1", "edge3", "leaf1;edge3;edge2;edge1"),
    ("edge3/modA", "edge3", "edge3/modA;edge3;edge2;edge1"),
    ("edge2/modB", "edge2", "edge2/modB;edge2;edge1"),
];

/// A leaf and a module at the bottom of three layers and a module of the middle layer, each an
/// `azure-iot-device` process that knows nothing but its connection string and our CA, send 200
/// messages with everything that the SDK lets them set. All are acknowledged, and the IoT Hub has
/// each of them once, in order, unchanged, under the sender's name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_1_the_python_sdk_sends_as_leaf_and_as_module_through_three_layers() {
    let lab = LabBuilder::new()
        .layers(3)
        .leaf("leaf1", "edge3")
        .module("edge3", "modA")
        .module("edge2", "modB")
        .start()
        .await
        .expect("the lab starts");

    let [leaf, bottom, middle] =
        SENDERS.map(|(id, gateway, _)| python::send(&lab, id, gateway, MESSAGES));
    let (leaf, bottom, middle) = tokio::join!(leaf, bottom, middle);

    let all = SENDERS.len() * usize::try_from(MESSAGES).expect("a small number");
    let arrived = lab
        .ledger()
        .wait_until(PATIENCE, |arrivals| arrivals.len() >= all)
        .await;
    arrived.expect("everything arrives");
    for ((id, _, chain), sent) in SENDERS.iter().zip([leaf, bottom, middle]) {
        assert_eq!(sent.len() as u64, MESSAGES, "{id}: acknowledged");
        compare(&lab, id, &sent);
        came_through_every_layer(&lab, id, chain).await;
    }
    assert_eq!(lab.ledger().count().expect("the ledger"), all as u64);
    lab.shutdown().await.expect("the lab ends");
}

/// Exactly the acknowledged messages are in the ledger, in order, equal in every part.
fn compare(lab: &Lab, id: &str, sent: &[SdkMessage]) {
    let entries = lab.ledger().entries_of(id).expect("the ledger is readable");
    assert_eq!(entries.len(), sent.len(), "{id}: at the hub");
    let (device, module) = match id.split_once('/') {
        Some((device, module)) => (device, Some(module)),
        None => (id, None),
    };
    for (entry, message) in entries.iter().zip(sent) {
        let number = message.sequence;
        assert_eq!(
            entry.body().expect("a body"),
            message.body(),
            "{id}: body {number}"
        );
        assert_eq!(
            entry.properties,
            values(&message.properties),
            "{id}: properties {number}"
        );
        assert_eq!(entry.device_id, device);
        assert_eq!(entry.module_id.as_deref(), module);
        // The hub adds its stamps; everything else is the sender's.
        let (stamps, own): (BTreeMap<_, _>, BTreeMap<_, _>) = entry
            .system
            .clone()
            .into_iter()
            .partition(|(name, _)| name.starts_with("iothub-"));
        assert_eq!(
            own,
            values(&message.system),
            "{id}: system properties {number}"
        );
        let stamp = |name: &str| stamps.get(name).cloned().flatten();
        assert_eq!(
            stamp("iothub-connection-device-id").as_deref(),
            Some(device)
        );
        assert_eq!(stamp("iothub-connection-module-id").as_deref(), module);
    }
}

fn values(map: &BTreeMap<String, String>) -> BTreeMap<String, Option<String>> {
    map.iter()
        .map(|(name, value)| (name.clone(), Some(value.clone())))
        .collect()
}

/// Each hub of the chain has received all messages from this identity, and the IoT Hub has them
/// from the top hub, which named the whole chain.
async fn came_through_every_layer(lab: &Lab, id: &str, chain: &str) {
    for hub in chain.split(';').skip(1) {
        let metrics = lab.metrics(hub).await.expect("metrics");
        let received = metrics.sum("edgehub_messages_received_total", &[("id", id)]);
        assert_eq!(received, MESSAGES as f64, "{id} at {hub}");
    }
    let connections = lab
        .control("GET", "/connections", None)
        .await
        .expect("the control API");
    let connections = connections.as_array().expect("a list").clone();
    let own = connections
        .iter()
        .find(|connection| connection["client_id"] == id);
    let chain = Value::from(chain);
    assert_eq!(
        own.expect("the top hub's connection")["auth_chain"],
        chain,
        "{id} at {HUB}"
    );
}
