//! What the control API says about clients: long polls for sessions, counters.

use mqttbytes::QoS::AtLeastOnce;
use mqttbytes::v4::ConnectReturnCode;
use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};
use crate::common::token::Token;

const METHODS: &str = "$iothub/methods/POST/#";

#[tokio::test]
async fn sessions_are_awaited() {
    let bed = Bed::strict().await;
    let connected = "/sessions/wait?client_id=leaf1";
    let subscribed = "/sessions/wait?client_id=leaf1&filter=%24iothub%2Fmethods%2FPOST%2F%23";
    for path in [connected, subscribed] {
        let path = format!("{path}&timeout_ms=20");
        let waited = bed.control("GET", &path, Value::Null).await;
        assert_eq!(waited, json!({"reached": false}));
    }
    let waiting = bed.control("GET", connected, Value::Null);
    let hello = Hello::persistent("leaf1");
    let connecting = Client::admitted(&bed, &hello);
    let (waited, mut client) = tokio::join!(waiting, connecting);
    assert_eq!(waited, json!({"reached": true}));
    let waiting = bed.control("GET", subscribed, Value::Null);
    let subscribing = client.subscribe(&[METHODS], AtLeastOnce);
    let (waited, _) = tokio::join!(waiting, subscribing);
    assert_eq!(waited, json!({"reached": true}));
    client.disconnect().await;
    let path = format!("{subscribed}&timeout_ms=20");
    let waited = bed.control("GET", &path, Value::Null).await;
    assert_eq!(
        waited,
        json!({"reached": false}),
        "the session is there, its client is not"
    );
    for path in [
        "/sessions/wait",
        "/sessions/wait?client_id=a/b/c",
        "/sessions/wait?client_id=a&x=y",
    ] {
        let refused = bed.control_raw("GET", path, Value::Null).await;
        assert_eq!(refused.status, 400, "{path}");
    }
}

/// One of each: every counter counts its request, for its identity, and a DELETE begins a phase.
#[tokio::test]
async fn requests_are_counted_per_identity() {
    let bed = Bed::strict().await;
    let refused = Hello::of("leaf1").with_token(Token::of("leaf3"));
    let (_, code) = Client::connect(&bed, &refused).await;
    assert_eq!(code, ConnectReturnCode::NotAuthorized);
    bed.control("DELETE", "/counters", Value::Null).await;

    let mut other = Client::admitted(&bed, &Hello::of("leaf3")).await;
    other.expect_nothing().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let filters = [
        METHODS,
        "$iothub/twin/res/#",
        "$iothub/twin/PATCH/properties/desired/#",
        "devices/leaf1/messages/devicebound/#",
    ];
    client.subscribe(&filters, AtLeastOnce).await;
    client.subscribe(&filters[..1], AtLeastOnce).await;
    client.unsubscribe("foo").await;
    let telemetry = "devices/leaf1/messages/events/";
    client.publish(telemetry, b"1", 1).await;
    client.publish(telemetry, b"2", 2).await;
    let twin = "$iothub/twin/";
    for topic in ["GET/?$rid=1", "PATCH/properties/reported/?$rid=2"] {
        let topic = format!("{twin}{topic}");
        client
            .send(&publish(&topic, mqttbytes::QoS::AtMostOnce, 0, b"{}"))
            .await;
        client.delivery().await;
    }
    let body = json!({"properties": {"desired": {"a": 1}}});
    bed.served("PATCH", "/twins/leaf1", body).await;
    client.delivery().await;
    bed.control("POST", "/c2d/leaf1", json!({})).await;
    let message = client.delivery().await;
    client.acknowledge(message.pkid).await;
    let calling = bed.served("POST", "/twins/leaf1/methods", json!({"methodName": "m"}));
    let answering = async {
        let request = client.delivery().await;
        let (_, rid) = request.topic.split_once("/?").unwrap();
        let topic = format!("$iothub/methods/res/200/?{rid}");
        client.publish(&topic, b"", 3).await;
    };
    tokio::join!(calling, answering);
    let (path, owner) = (
        "/devices/leaf1?api-version=2021-04-12",
        Token::of_policy("iothubowner"),
    );
    bed.https("GET", path, &owner, Value::Null).await;
    let scope = "/devices/edge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope\
        ?api-version=2020-06-30-preview";
    let page = json!({"pageSize": 10, "authChain": "edge1"});
    bed.https("POST", scope, &Token::of_hub("edge1"), page)
        .await;

    let leaf1 = bed
        .control("GET", "/counters?client_id=leaf1", Value::Null)
        .await;
    let mut wanted = json!({
        "amqp_attaches": 0, "amqp_connections": 0, "amqp_handshakes": 0, "amqp_put_tokens": 0,
        "amqp_transfers": 0, "c2d_deliveries": 1, "connects": 1, "connects_refused": 0, "desired_notices": 1,
        "https_connections": 0, "method_requests": 1, "method_responses": 1,
        "mqtt_connections": 0, "pings": 0, "pubacks": 1, "registry_calls": 0, "scope_calls": 0,
        "service_calls": 0, "subscribes": 2, "telemetry": 2, "twin_gets": 1, "twin_patches": 1,
        "unsubscribes": 1,
    });
    assert_eq!(leaf1, wanted);
    let all = bed.control("GET", "/counters", Value::Null).await;
    wanted["connects"] = json!(2);
    wanted["pings"] = json!(1);
    wanted["mqtt_connections"] = json!(2);
    wanted["https_connections"] = json!(4);
    wanted["registry_calls"] = json!(1);
    wanted["scope_calls"] = json!(1);
    wanted["service_calls"] = json!(2);
    assert_eq!(all, wanted);

    let (_, code) = Client::connect(&bed, &refused).await;
    assert_eq!(code, ConnectReturnCode::NotAuthorized);
    let all = bed.control("GET", "/counters", Value::Null).await;
    assert_eq!(all["connects_refused"], 1);
    let cleared = bed.control("DELETE", "/counters", Value::Null).await;
    let zero = |value: &Value| value == 0;
    assert!(cleared.as_object().unwrap().values().all(zero), "{cleared}");
    let refused = bed
        .control_raw("GET", "/counters?client_id=a/b/c", Value::Null)
        .await;
    assert_eq!(refused.status, 400);
}
