//! `applyConfigurationContent`: a deployment for one edge device.

use mqttbytes::QoS::AtLeastOnce;
use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;

async fn apply(bed: &Bed, device: &str, body: Value) -> Answer {
    let path = format!("/devices/{device}/applyConfigurationContent?api-version=2021-04-12");
    let token = Token::of_policy("iothubowner");
    bed.https("POST", &path, &token, body).await
}

fn content(modules: &Value) -> Value {
    json!({ "modulesContent": modules })
}

/// The desired properties of all named modules are replaced, who is subscribed hears of it, and
/// missing modules come into being, with keys that work.
#[tokio::test]
async fn a_deployment_sets_desired_properties_and_creates_modules() {
    let bed = Bed::strict().await;
    let before = json!({"tags": {"kept": 1}, "properties": {"desired": {"gone": 1}}});
    bed.served("PATCH", "/twins/edge1/modules/$edgeHub", before)
        .await;
    let mut hub = Client::admitted(&bed, &Hello::of("edge1/$edgeHub")).await;
    let desired = "$iothub/twin/PATCH/properties/desired/#";
    hub.subscribe(&[desired], AtLeastOnce).await;
    let routes = json!({"schemaVersion": "1.1", "routes": {"all": "FROM /* INTO $upstream"}});
    let agent = json!({"schemaVersion": "1.1", "modules": {}});
    let answer = apply(
        &bed,
        "edge1",
        content(&json!({
            "$edgeAgent": {"properties.desired": agent},
            "$edgeHub": {"properties.desired": routes},
            "fresh": {"properties.desired": {"interval": 5}},
        })),
    )
    .await;
    assert_eq!((answer.status, answer.text().as_str()), (204, ""));
    let notice = hub.delivery().await;
    assert_eq!(
        notice.topic,
        "$iothub/twin/PATCH/properties/desired/?$version=3"
    );
    let mut wanted = routes.clone();
    wanted["$version"] = json!(3);
    assert_eq!(
        serde_json::from_slice::<Value>(&notice.payload).unwrap(),
        wanted
    );
    for (module, desired) in [
        ("$edgeHub", &routes),
        ("$edgeAgent", &agent),
        ("fresh", &json!({"interval": 5})),
    ] {
        let path = format!("/twins/edge1/modules/{module}");
        let twin = bed.served("GET", &path, Value::Null).await;
        let mut properties = twin["properties"]["desired"].clone();
        let object = properties.as_object_mut().unwrap();
        assert!(object.remove("$version").is_some() && object.remove("$metadata").is_some());
        assert_eq!(&properties, desired, "{module}");
        if module == "$edgeHub" {
            assert_eq!(twin["tags"], json!({"kept": 1}));
        }
    }
    let path = "/devices/edge1/modules/fresh?api-version=2021-04-12";
    let owner = Token::of_policy("iothubowner");
    let module = bed.https("GET", path, &owner, Value::Null).await.json();
    assert_eq!(module["managedBy"], "iotEdge");
    let key = module["authentication"]["symmetricKey"]["primaryKey"]
        .as_str()
        .unwrap();
    let token = Token {
        key: key.to_owned(),
        ..Token::of("edge1/fresh")
    };
    Client::admitted(&bed, &Hello::of("edge1/fresh").with_token(token)).await;
}

/// All or nothing.
#[tokio::test]
async fn wrong_deployments_change_nothing() {
    let bed = Bed::strict().await;
    let good = json!({"properties.desired": {"a": 1}});
    let too_large: Value = (0..9)
        .map(|n| (format!("k{n}"), json!("x".repeat(4_000))))
        .collect();
    for bad in [
        Value::Null,
        json!({}),
        json!({"modules": {}}),
        json!({"modulesContent": {"fresh": good}, "deviceContent": {"properties.desired": {}}}),
        content(&json!({"fresh": good, "$edgeHub": {}})),
        content(&json!({"fresh": good, "$edgeHub": {"properties.desired.routes": {}}})),
        content(&json!({"fresh": good, "$edgeHub": {"properties.desired": 1}})),
        content(&json!({"fresh": good, "$edgeHub": {"properties.desired": {"a.b": 1}}})),
        content(&json!({"fresh": good, "$edgeHub": {"properties.desired": too_large}})),
        content(&json!({"fresh": good, "a/b": good})),
    ] {
        let refused = apply(&bed, "edge1", bad.clone()).await;
        assert_eq!(refused.status, 400, "{bad:.200}: {}", refused.text());
    }
    let many: Value = (0..48).map(|n| (format!("m{n}"), good.clone())).collect();
    let refused = apply(&bed, "edge1", content(&many)).await;
    assert_eq!(refused.status, 409, "{}", refused.text());
    for (device, status) in [("leaf1", 400), ("nobody", 404)] {
        let refused = apply(&bed, device, content(&json!({"fresh": good}))).await;
        assert_eq!(refused.status, status, "{device}");
    }
    let missing = bed
        .service("GET", "/twins/edge1/modules/fresh", Value::Null)
        .await;
    assert_eq!(missing.status, 404);
    let hub = bed
        .served("GET", "/twins/edge1/modules/$edgeHub", Value::Null)
        .await;
    assert_eq!(hub["version"], 1);
    let others = json!({"modulesContent": {"$edgeHub": good}, "deviceContent": {},
        "moduleContent": null});
    assert_eq!(apply(&bed, "edge1", others).await.status, 204);
}

#[tokio::test]
async fn strict_a_deployment_needs_the_right_to_write() {
    let bed = Bed::strict().await;
    let path = "/devices/edge1/applyConfigurationContent?api-version=2021-04-12";
    let body = content(&json!({"$edgeHub": {"properties.desired": {}}}));
    for (name, status) in [
        ("service", 401),
        ("registryRead", 401),
        ("device", 401),
        ("registryReadWrite", 204),
    ] {
        let token = Token::of_policy(name);
        let answer = bed.https("POST", path, &token, body.clone()).await;
        assert_eq!(answer.status, status, "{name}");
    }
    let own = bed.https("POST", path, &Token::of("edge1"), body).await;
    assert_eq!(own.status, 401);
}
