//! Acceptance 2 of the AMQP side: Microsoft's Node SDK, unmodified, over all of its transports, at every
//! layer and at the IoT Hub. (The Python SDK speaks MQTT alone.)

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use edgehub_tests::agent::{Protocol, Sdk};
use edgehub_tests::matrix::{self, Kinds, LAYERS};

const KINDS: Kinds = &[
    ("na", Sdk::Node, Protocol::Amqp),
    ("nx", Sdk::Node, Protocol::AmqpWs),
    ("nm", Sdk::Node, Protocol::Mqtt),
    ("nw", Sdk::Node, Protocol::MqttWs),
];

const TWO_KINDS: Kinds = &[
    ("na", Sdk::Node, Protocol::Amqp),
    ("nm", Sdk::Node, Protocol::Mqtt),
];

/// The whole matrix, with what each layer, top first, speaks upstream.
async fn with_upstream(kinds: Kinds, protocols: [&str; LAYERS.len()]) {
    let mut builder = matrix::hierarchy(kinds);
    for (layer, protocol) in LAYERS.into_iter().zip(protocols) {
        builder = builder.env(layer, "UpstreamProtocol", protocol);
    }
    matrix::everywhere(builder, kinds).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_mqtt_upstream() {
    with_upstream(KINDS, ["Mqtt", "Mqtt", "Mqtt"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_amqp_upstream() {
    with_upstream(KINDS, ["Amqp", "Amqp", "Amqp"]).await;
}

/// Three protocols in one hierarchy; the pairs that are left are in the next test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_mixed_upstreams() {
    with_upstream(KINDS, ["AmqpWs", "Mqtt", "Amqp"]).await;
}

/// Each of the four protocols below each of the others, a pair at the middle hub and one at the
/// lowest; with one client of each kind of protocol, which is what the hubs tell apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_every_upstream_protocol_works_below_every_other() {
    for protocols in [
        ["Amqp", "AmqpWs", "MqttWs"],
        ["MqttWs", "Mqtt", "AmqpWs"],
        ["AmqpWs", "Amqp", "Mqtt"],
        ["Mqtt", "MqttWs", "Amqp"],
        ["Amqp", "MqttWs", "AmqpWs"],
    ] {
        println!("{protocols:?}");
        with_upstream(TWO_KINDS, protocols).await;
    }
}

/// The same without a hub in between: the emulator's own proof.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_same_at_the_emulator_itself() {
    matrix::at_the_hub_itself(KINDS).await;
}
