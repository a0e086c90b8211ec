//! What a client says about itself (spec/mqtt.md 2.2): its model is stamped on what it sent, also
//! when neither the client nor the hub that took the messages has been up since.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "these are the tests"
)]

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::agent::{Agent, Protocol, Sdk};
use edgehub_tests::only_these_arrive;
use serde_json::{Value, json};

const MODEL: &str = "dtmi:com:example:Thermostat;1";
const SUCCESSOR: &str = "dtmi:com:example:Thermostat;2";

/// Python's leaf is `thermo-p`.
const LEAVES: [&str; 3] = ["thermo-p", "thermo-n", "plain"];

/// A leaf below `edge2`, connected.
async fn leaf(lab: &Lab, id: &str, model: Option<&str>) -> Agent {
    let sdk = match id {
        "thermo-n" => Sdk::Node,
        _ => Sdk::Python,
    };
    let about: Vec<_> = model
        .map(|model| ("--model-id", model))
        .into_iter()
        .collect();
    let (protocol, gateway) = (Protocol::Mqtt, Some("edge2"));
    let agent = Agent::start_with(lab, sdk, protocol, id, gateway, None, &about);
    agent.must("connect", Value::Null).await;
    agent
}

async fn send(agent: &Agent, body: &str) {
    agent.must("send", json!({ "body": body })).await;
}

/// The model that the IoT Hub has stamped on each message of a sender, in order.
fn models(lab: &Lab, id: &str) -> Vec<Option<String>> {
    let entries = lab.ledger().entries_of(id).expect("a ledger");
    let model = |system: &std::collections::BTreeMap<String, Option<String>>| {
        system.get("dt-dataschema").cloned().flatten()
    };
    entries.iter().map(|entry| model(&entry.system)).collect()
}

/// Through two layers, and again after both hubs were killed with a message of each leaf in the
/// lower one's store, while the leaves stay away. A leaf beside them without a model has none.
async fn models_count(upstream: &str) {
    let mut builder = LabBuilder::new().layers(2).upstream(upstream);
    for id in LEAVES {
        builder = builder.leaf(id, "edge2");
    }
    let lab = builder.start().await.expect("the lab starts");
    let model_of = |id: &str| id.starts_with("thermo").then_some(MODEL);
    let mut leaves = Vec::new();
    for id in LEAVES {
        let leaf = leaf(&lab, id, model_of(id)).await;
        send(&leaf, "one").await;
        only_these_arrive(&lab, id, &["one"]).await;
        leaves.push(leaf);
    }

    lab.kill("edge1").await.expect("no way up");
    for leaf in &leaves {
        send(leaf, "two").await;
    }
    drop(leaves);
    lab.kill("edge2").await.expect("no hub");
    lab.start("edge2").await.expect("ready without a way up");
    lab.start("edge1").await.expect("a way up");
    for id in LEAVES {
        only_these_arrive(&lab, id, &["one", "two"]).await;
        let model = model_of(id).map(str::to_owned);
        assert_eq!(models(&lab, id), vec![model; 2], "{id}");
    }

    // Another model of a leaf counts as well, although its way up stands.
    let thermo = leaf(&lab, "thermo-p", Some(SUCCESSOR)).await;
    send(&thermo, "three").await;
    only_these_arrive(&lab, "thermo-p", &["one", "two", "three"]).await;
    let three = models(&lab, "thermo-p").pop().flatten();
    assert_eq!(three.as_deref(), Some(SUCCESSOR));
    lab.shutdown().await.expect("the lab ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_9_a_model_id_counts_also_while_its_client_is_away() {
    models_count("Mqtt").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_9_a_model_id_counts_also_with_amqp_upstream() {
    models_count("Amqp").await;
}
