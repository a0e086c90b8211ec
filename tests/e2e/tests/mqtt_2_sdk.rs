//! Acceptance 2 of the MQTT side: Microsoft's SDKs, unmodified, at every layer and at the IoT Hub.

use edgehub_tests::agent::{Protocol, Sdk};
use edgehub_tests::matrix::{self, Kinds};

const KINDS: Kinds = &[
    ("pm", Sdk::Python, Protocol::Mqtt),
    ("pw", Sdk::Python, Protocol::MqttWs),
    ("nm", Sdk::Node, Protocol::Mqtt),
    ("nw", Sdk::Node, Protocol::MqttWs),
];

/// The whole matrix of SDK, protocol, kind of client and layer, in one hierarchy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_2_both_sdks_do_everything_at_every_layer() {
    matrix::everywhere(matrix::hierarchy(KINDS), KINDS).await;
}

/// The same without a hub in between: the emulator's own proof.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_2_the_same_at_the_emulator_itself() {
    matrix::at_the_hub_itself(KINDS).await;
}
