//! Failures on order: of everybody or of one identity, counted or until they are cleared.

use mqttbytes::QoS;
use mqttbytes::v4::ConnectReturnCode;
use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};
use crate::common::token::Token;

const VERSION: &str = "?api-version=2021-04-12";

/// A throttled device stays throttled while others are served, until somebody lifts it.
#[tokio::test]
async fn a_standing_fault_of_one_device_spares_the_others() {
    let bed = Bed::strict().await;
    let order = json!({"kind": "twin", "client_id": "leaf1", "standing": true, "code": 429});
    let orders = bed.control("POST", "/faults", order.clone()).await;
    assert_eq!(orders, json!([order]));
    let mut leaf1 = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let mut leaf3 = Client::admitted(&bed, &Hello::of("leaf3")).await;
    for client in [&mut leaf1, &mut leaf3] {
        client
            .subscribe(&["$iothub/twin/res/#"], QoS::AtMostOnce)
            .await;
    }
    let get = publish("$iothub/twin/GET/?$rid=1", QoS::AtMostOnce, 0, b"");
    for _ in 0..3 {
        leaf1.send(&get).await;
        let topic = leaf1.delivery().await.topic;
        assert!(topic.starts_with("$iothub/twin/res/429/"), "{topic}");
    }
    leaf3.send(&get).await;
    let topic = leaf3.delivery().await.topic;
    assert!(topic.starts_with("$iothub/twin/res/200/"), "{topic}");
    let path = "/faults?kind=twin&client_id=leaf3";
    let left = bed.control("DELETE", path, Value::Null).await;
    assert_eq!(left, json!([order]), "that of another device stands");
    let path = "/faults?client_id=leaf1";
    let left = bed.control("DELETE", path, Value::Null).await;
    assert_eq!(left, json!([]));
    leaf1.send(&get).await;
    let topic = leaf1.delivery().await.topic;
    assert!(topic.starts_with("$iothub/twin/res/200/"), "{topic}");
}

#[tokio::test]
async fn connects_and_publishes_of_one_device_fail() {
    let bed = Bed::strict().await;
    for kind in ["connect", "publish"] {
        let order = json!({"kind": kind, "client_id": "leaf1", "count": 1});
        bed.control("POST", "/faults", order).await;
    }
    let mut leaf3 = Client::admitted(&bed, &Hello::of("leaf3")).await;
    let (_, code) = Client::connect(&bed, &Hello::of("leaf1")).await;
    assert_eq!(code, ConnectReturnCode::ServiceUnavailable);
    let leaf1 = Client::admitted(&bed, &Hello::of("leaf1")).await;
    leaf3
        .publish("devices/leaf3/messages/events/", b"x", 1)
        .await;
    let refused = publish("devices/leaf1/messages/events/", QoS::AtLeastOnce, 1, b"x");
    leaf1.expect_close_after(&refused).await;
    let none = bed.control("GET", "/faults", Value::Null).await;
    assert_eq!(none, json!([]));
}

/// HTTPS calls fail for the identity in their path; throttles and quotas as IoT Hub has them.
#[tokio::test]
async fn https_calls_about_one_identity_fail() {
    let bed = Bed::strict().await;
    for order in [
        json!({"kind": "registry", "client_id": "leaf1", "standing": true, "code": 429}),
        json!({"kind": "service", "client_id": "leaf1/m1", "standing": true, "code": 403}),
        json!({"kind": "scope", "client_id": "edge1/$edgeHub", "count": 1, "code": 503}),
    ] {
        bed.control("POST", "/faults", order).await;
    }
    let owner = Token::of_policy("iothubowner");
    let call = async |path: &str| {
        let path = format!("{path}{VERSION}");
        let answer = bed.https("GET", &path, &owner, Value::Null).await;
        let name = answer.headers.get("iothub-errorcode").cloned();
        let name = name.map(|name| name.to_str().unwrap().to_owned());
        (answer.status, name.unwrap_or_default())
    };
    for _ in 0..2 {
        let throttled = (429, "ThrottlingException".to_owned());
        assert_eq!(call("/devices/leaf1").await, throttled);
        assert_eq!(call("/devices/leaf1/modules").await, throttled);
        let quota = (403, "IotHubQuotaExceeded".to_owned());
        assert_eq!(call("/twins/leaf1/modules/m1").await, quota);
        for path in [
            "/devices/leaf3",
            "/devices",
            "/twins/leaf1",
            "/devices/leaf1/modules/m1",
        ] {
            assert_eq!(call(path).await.0, 200, "{path}");
        }
    }
    let path =
        format!("/devices/edge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope{VERSION}");
    for status in [503, 200] {
        let body = json!({"pageSize": 10, "authChain": "edge1"});
        let hub = Token::of_hub("edge1");
        assert_eq!(bed.https("POST", &path, &hub, body).await.status, status);
    }
}

#[tokio::test]
async fn odd_orders_are_refused() {
    let bed = Bed::strict().await;
    for bad in [
        json!({"kind": "twin"}),
        json!({"kind": "twin", "count": 1, "standing": true}),
        json!({"kind": "twin", "count": 1_000_001}),
        json!({"kind": "twin", "count": 1, "client_id": "a b"}),
        json!({"kind": "twin", "count": 1, "condition": "amqp:not-found"}),
        json!({"kind": "twin", "count": 1, "answer": "close"}),
        json!({"kind": "attach", "count": 1, "answer": "release"}),
        json!({"kind": "transfer", "count": 1, "answer": "explode"}),
        json!({"kind": "transfer", "count": 1, "condition": "with space"}),
        json!({"kind": "put_token", "count": 1, "code": 200}),
    ] {
        let answer = bed.control_raw("POST", "/faults", bad.clone()).await;
        assert_eq!(answer.status, 400, "{bad}");
    }
    for path in ["/faults?kind=odd", "/faults?client_id=a%20b", "/faults?x=y"] {
        let answer = bed.control_raw("DELETE", path, Value::Null).await;
        assert_eq!(answer.status, 400, "{path}");
    }
    for good in [
        json!({"kind": "attach", "count": 1, "condition": "amqp:link:stolen", "code": null}),
        json!({"kind": "transfer", "count": 0}),
        json!({"kind": "transfer", "standing": true, "code": 429, "answer": "detach"}),
        json!({"kind": "put_token", "count": 2, "code": 401, "answer": "silence"}),
    ] {
        bed.control("POST", "/faults", good).await;
    }
    let orders = bed.control("GET", "/faults", Value::Null).await;
    assert_eq!(orders.as_array().unwrap().len(), 3);
}
