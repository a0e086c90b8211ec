//! Acceptance 2 of the AMQP side: Microsoft's Node SDK, unmodified, over all of its transports, at every
//! layer and at the IoT Hub. (The Python SDK speaks MQTT alone.)

use edgehub_tests::agent::{Protocol, Sdk};
use edgehub_tests::matrix::{self, Kinds};

const KINDS: Kinds = &[
    ("na", Sdk::Node, Protocol::Amqp),
    ("nx", Sdk::Node, Protocol::AmqpWs),
    ("nm", Sdk::Node, Protocol::Mqtt),
    ("nw", Sdk::Node, Protocol::MqttWs),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_2_the_node_sdk_does_everything_with_mqtt_upstream() {
    matrix::everywhere(matrix::hierarchy(KINDS), KINDS).await;
}
