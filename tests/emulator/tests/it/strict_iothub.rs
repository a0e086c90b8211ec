//! Strict mode on `$iothub` topics, twins, methods and deliveries: each rule is tripped.

use mqttbytes::QoS::{AtLeastOnce, AtMostOnce, ExactlyOnce};
use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};

const RESPONSES: &str = "$iothub/twin/res/#";

/// Topics that a documented one is a letter away from.
const UNDOCUMENTED: [&str; 22] = [
    "$iothub",
    "$iothub/",
    "$iothub/twin/GET/",
    "$iothub/twin/GET/?",
    "$iothub/twin/GET/?$rid=",
    "$iothub/twin/GET/?rid=1",
    "$iothub/twin/GET/?$rid=1&$version=1",
    "$iothub/twin/GET/x/?$rid=1",
    "$iothub/twin/get/?$rid=1",
    "$iothub/twin/res/200/?$rid=1",
    "$iothub/twin/PATCH/properties/reported/",
    "$iothub/twin/PATCH/properties/reported/?$version=1",
    "$iothub/twin/PATCH/properties/reported/?$rid=1&$version=x",
    "$iothub/twin/PATCH/properties/reported/?$rid=1&other=1",
    "$iothub/twin/PATCH/properties/reported/x/?$rid=1",
    "$iothub/twin/PATCH/properties/desired/?$rid=1",
    "$iothub/methods/POST/reboot/?$rid=1",
    "$iothub/methods/res/ok/?$rid=1",
    "$iothub/methods/res/200/",
    "$iothub/methods/res/200/?$rid=",
    "$iothub/methods/res/200/x/?$rid=1",
    "$iothub/x",
];

async fn subscribed(bed: &Bed, id: &str) -> Client {
    let mut client = Client::admitted(bed, &Hello::of(id)).await;
    client.subscribe(&[RESPONSES], AtLeastOnce).await;
    client
}

async fn version(bed: &Bed) -> Value {
    let twin = bed.served("GET", "/twins/leaf1", Value::Null).await;
    twin["version"].clone()
}

#[tokio::test]
async fn strict_undocumented_iothub_topics_close() {
    let bed = Bed::strict().await;
    for topic in UNDOCUMENTED {
        eprintln!("{topic}");
        let client = subscribed(&bed, "leaf1").await;
        client
            .expect_close_after(&publish(topic, AtLeastOnce, 1, b"{}"))
            .await;
    }
    assert_eq!(version(&bed).await, 1);
}

/// The same topics in lenient mode: acknowledged and dropped, but for a patch without a rid,
/// which is carried out and not answered.
#[tokio::test]
async fn lenient_mode_drops_undocumented_iothub_topics() {
    let bed = Bed::lenient().await;
    let mut client = subscribed(&bed, "leaf1").await;
    for topic in UNDOCUMENTED {
        client.publish(topic, b"{}", 1).await;
    }
    client.expect_nothing().await;
    assert_eq!(version(&bed).await, 2);
}

/// QoS 2 closes before anything happens.
#[tokio::test]
async fn strict_twin_requests_at_qos_2_close() {
    let bed = Bed::strict().await;
    let client = subscribed(&bed, "leaf1").await;
    let topic = "$iothub/twin/PATCH/properties/reported/?$rid=1";
    client
        .expect_close_after(&publish(topic, ExactlyOnce, 1, b"{}"))
        .await;
    assert_eq!(version(&bed).await, 1);
}

/// A PUBACK is for a delivery that waits for one: not for nothing, not twice, not from a module.
#[tokio::test]
async fn strict_pubacks_for_nothing_close() {
    let bed = Bed::strict().await;
    let puback = |id: u8| [0x40, 2, 0, id];
    for id in ["leaf1", "edge1/modA"] {
        let client = Client::admitted(&bed, &Hello::of(id)).await;
        client.expect_close_after(&puback(1)).await;
    }
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let filter = "devices/leaf1/messages/devicebound/#";
    client.subscribe(&[filter], AtLeastOnce).await;
    bed.control("POST", "/c2d/leaf1", json!({})).await;
    assert_eq!(client.delivery().await.pkid, 1);
    client.acknowledge(1).await;
    client.expect_nothing().await;
    client.expect_close_after(&puback(1)).await;

    let bed = Bed::lenient().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.acknowledge(1).await;
    client.expect_nothing().await;
}

/// A client is subscribed to what is its own; the filters of others are refused, and nothing of
/// theirs arrives.
#[tokio::test]
async fn strict_foreign_filters_get_nothing() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf3")).await;
    let foreign = [
        "devices/leaf1/messages/devicebound/#",
        "devices/+/messages/devicebound/#",
        "devices/#",
        "$iothub/#",
        "$iothub/twin/#",
        "$iothub/methods/POST/+",
        "$iothub/twin/PATCH/properties/desired/",
        "#",
    ];
    let granted = client.subscribe(&foreign, AtLeastOnce).await;
    let refused = mqttbytes::v4::SubscribeReasonCode::Failure;
    assert_eq!(granted, [refused; 8]);
    bed.control("POST", "/c2d/leaf1", json!({})).await;
    bed.control("POST", "/c2d/leaf3", json!({})).await;
    let body = json!({"properties": {"desired": {"a": 1}}});
    bed.served("PATCH", "/twins/leaf3", body).await;
    let request = publish("$iothub/twin/GET/?$rid=1", AtMostOnce, 0, b"");
    client.send(&request).await;
    client.expect_nothing().await;
}

/// Modules subscribe to their inputs, as on an edgeHub, and the hub never sends anything there.
#[tokio::test]
async fn inputs_are_granted_and_silent() {
    let bed = Bed::strict().await;
    let mut module = Client::admitted(&bed, &Hello::of("edge1/modA")).await;
    let filters = [
        "devices/edge1/modules/modA/#",
        "devices/edge1/modules/modA/inputs/#",
    ];
    let granted = module.subscribe(&filters, AtLeastOnce).await;
    let yes = mqttbytes::v4::SubscribeReasonCode::Success(AtLeastOnce);
    assert_eq!(granted, [yes, yes]);
    bed.control("POST", "/c2d/edge1", json!({})).await;
    let body = json!({"properties": {"desired": {"a": 1}}});
    bed.served("PATCH", "/twins/edge1/modules/modA", body).await;
    module.expect_nothing().await;
}
