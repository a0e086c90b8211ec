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

/// The whole matrix, with what each layer, top first, speaks upstream.
async fn with_upstream(protocols: [&str; LAYERS.len()]) {
    let mut builder = matrix::hierarchy(KINDS);
    for (layer, protocol) in LAYERS.into_iter().zip(protocols) {
        builder = builder.env(layer, "UpstreamProtocol", protocol);
    }
    matrix::everywhere(builder, KINDS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_mqtt_upstream() {
    with_upstream(["Mqtt", "Mqtt", "Mqtt"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_amqp_upstream() {
    with_upstream(["Amqp", "Amqp", "Amqp"]).await;
}

/// Each of the four protocols is below or above another one here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_mixed_upstreams() {
    with_upstream(["AmqpWs", "Mqtt", "Amqp"]).await;
}

/// The same without a hub in between: the emulator's own proof.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_same_at_the_emulator_itself() {
    matrix::at_the_hub_itself(KINDS).await;
}
