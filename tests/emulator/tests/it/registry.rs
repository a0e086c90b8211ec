//! The registry over REST.

use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;

const VERSION: &str = "api-version=2021-04-12";

async fn owner(bed: &Bed, method: &str, path: &str, body: Value) -> Answer {
    let path = format!("{path}?{VERSION}");
    bed.https(method, &path, &Token::of_policy("iothubowner"), body)
        .await
}

async fn change(bed: &Bed, path: &str, etag: &str, body: Value) -> Answer {
    let headers = [
        ("authorization", Token::of_policy("iothubowner").text()),
        ("if-match", etag.to_owned()),
    ];
    bed.https_with("PUT", &format!("{path}?{VERSION}"), &headers, body)
        .await
}

#[tokio::test]
async fn an_edge_device_is_created_with_scope_and_modules() {
    let bed = Bed::strict().await;
    let body = json!({"deviceId": "new1", "capabilities": {"iotEdge": true},
        "authentication": {"type": "sas", "symmetricKey": {"primaryKey": "", "secondaryKey": ""}}});
    let answer = owner(&bed, "PUT", "/devices/new1", body.clone()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let device = answer.json();
    let generation = device["generationId"].as_str().unwrap();
    assert_eq!(
        device["deviceScope"],
        format!("ms-azure-iot-edge://new1-{generation}")
    );
    assert_eq!(device["parentScopes"], json!([]));
    assert_eq!(device["status"], "enabled");
    assert_eq!(
        answer.headers["etag"],
        format!("\"{}\"", device["etag"].as_str().unwrap())
    );
    let keys = &device["authentication"]["symmetricKey"];
    assert_eq!(keys["primaryKey"].as_str().unwrap().len(), 44);
    assert_ne!(keys["primaryKey"], keys["secondaryKey"]);
    let modules = owner(&bed, "GET", "/devices/new1/modules", Value::Null)
        .await
        .json();
    let ids: Vec<_> = modules
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["moduleId"])
        .collect();
    assert_eq!(ids, ["$edgeAgent", "$edgeHub"]);

    let again = owner(&bed, "PUT", "/devices/new1", body).await;
    assert_eq!(again.status, 409);
    assert_eq!(again.headers["iothub-errorcode"], "DeviceAlreadyExists");

    let leaf = json!({"deviceId": "new2", "deviceScope": device["deviceScope"]});
    let leaf = owner(&bed, "PUT", "/devices/new2", leaf).await.json();
    assert_eq!(leaf["parentScopes"], json!([device["deviceScope"]]));
    let hub_key = modules[1]["authentication"]["symmetricKey"]["primaryKey"]
        .as_str()
        .unwrap();
    let token = Token {
        key: hub_key.to_owned(),
        ..Token::of_hub("new1")
    };
    Client::admitted(&bed, &Hello::through("new2;new1").with_token(token)).await;
}

#[tokio::test]
async fn devices_move_to_another_parent() {
    let bed = Bed::strict().await;
    let scope = |device: Value| device["deviceScope"].clone();
    let edge1 = scope(
        owner(&bed, "GET", "/devices/edge1", Value::Null)
            .await
            .json(),
    );
    let lone = json!({"deviceId": "lone", "parentScopes": [edge1]});
    let moved = change(&bed, "/devices/lone", "\"*\"", lone.clone()).await;
    assert_eq!(moved.status, 200, "{}", moved.text());
    assert_eq!(moved.json()["deviceScope"], edge1);
    Client::admitted(&bed, &Hello::through("lone;edge1")).await;
    let stale = change(&bed, "/devices/lone", "\"bm8=\"", lone.clone()).await;
    assert_eq!(stale.status, 412);
    let etag = moved.headers["etag"].to_str().unwrap();
    let edge3 = scope(
        owner(&bed, "GET", "/devices/edge3", Value::Null)
            .await
            .json(),
    );
    let lone = json!({"deviceId": "lone", "parentScopes": [edge3]});
    assert_eq!(change(&bed, "/devices/lone", etag, lone).await.status, 200);
    let (_, code) = Client::connect(&bed, &Hello::through("lone;edge1")).await;
    assert_eq!(code, mqttbytes::v4::ConnectReturnCode::NotAuthorized);
    let own =
        json!({"deviceId": "edge1", "capabilities": {"iotEdge": true}, "parentScopes": [edge3]});
    assert_eq!(
        change(&bed, "/devices/edge1", "*", own).await.status,
        400,
        "a circle"
    );
}

#[tokio::test]
async fn modules_come_and_go() {
    let bed = Bed::strict().await;
    let path = "/devices/leaf1/modules/m2";
    let module = json!({"deviceId": "leaf1", "moduleId": "m2"});
    let created = owner(&bed, "PUT", path, module.clone()).await;
    assert_eq!(created.status, 200, "{}", created.text());
    assert_eq!(created.json()["authentication"]["type"], "sas");
    let again = owner(&bed, "PUT", path, module.clone()).await;
    assert_eq!(
        again.headers["iothub-errorcode"],
        "ModuleAlreadyExistsOnDevice"
    );
    // The device itself may do this too, under its own id only.
    let of_leaf = Token::of("leaf1");
    let own = format!("{path}?{VERSION}");
    assert_eq!(
        bed.https("GET", &own, &of_leaf, Value::Null).await.status,
        200
    );
    assert_eq!(
        bed.https("DELETE", &own, &of_leaf, Value::Null)
            .await
            .status,
        204
    );
    assert_eq!(
        bed.https("GET", &own, &of_leaf, Value::Null).await.status,
        404
    );
    let other = format!("/devices/leafx/modules/m1?{VERSION}");
    assert_eq!(
        bed.https("DELETE", &other, &of_leaf, Value::Null)
            .await
            .status,
        401
    );
    let device = format!("/devices/leaf1?{VERSION}");
    assert_eq!(
        bed.https("GET", &device, &of_leaf, Value::Null)
            .await
            .status,
        401
    );
}

#[tokio::test]
async fn lists_and_missing_things() {
    let bed = Bed::strict().await;
    let owner_token = Token::of_policy("iothubowner");
    for path in ["/devices", "/devices/"] {
        let all = owner(&bed, "GET", path, Value::Null).await.json();
        assert_eq!(all.as_array().unwrap().len(), 13);
    }
    let path = format!("/devices/?top=2&{VERSION}");
    let two = bed
        .https("GET", &path, &owner_token, Value::Null)
        .await
        .json();
    assert_eq!(two[0]["deviceId"], "edge1");
    assert_eq!(two.as_array().unwrap().len(), 2);
    let missing = owner(&bed, "GET", "/devices/nobody", Value::Null).await;
    assert_eq!(missing.status, 404);
    let message = missing.json()["Message"].as_str().unwrap().to_owned();
    assert!(
        message.starts_with("ErrorCode:DeviceNotFound;"),
        "{message}"
    );
    assert_eq!(
        owner(&bed, "DELETE", "/devices/nobody", Value::Null)
            .await
            .status,
        404
    );
    assert_eq!(
        owner(&bed, "GET", "/configurations/c1", Value::Null)
            .await
            .status,
        501
    );
    let client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let leaf = owner(&bed, "GET", "/devices/leaf1", Value::Null)
        .await
        .json();
    assert_eq!(leaf["connectionState"], "Connected");
    drop(client);
}

/// Policies have their permissions, and no other credential opens the registry.
#[tokio::test]
async fn the_registry_is_guarded() {
    let bed = Bed::strict().await;
    let get = format!("/devices/leaf1?{VERSION}");
    for (token, status) in [
        (Token::of_policy("iothubowner"), 200),
        (Token::of_policy("registryRead"), 200),
        (Token::of_policy("registryReadWrite"), 200),
        (Token::of_policy("device"), 401),
        (Token::of_policy("iothubowner").signed_by("device"), 401),
        (
            Token {
                host: "other.hub".to_owned(),
                ..Token::of_policy("iothubowner")
            },
            401,
        ),
        (
            Token {
                expires_at: 1,
                ..Token::of_policy("iothubowner")
            },
            401,
        ),
        (
            Token {
                policy: None,
                ..Token::of_policy("iothubowner")
            },
            401,
        ),
        (Token::of_policy("iothubowner").for_path_of("leaf1"), 200),
        (Token::of_policy("iothubowner").for_path_of("leaf1/m1"), 401),
        (Token::of_policy("iothubowner").for_path_of("leaf3"), 401),
        (Token::of("leaf1"), 401),
        (Token::of_hub("edge1"), 401),
    ] {
        assert_eq!(
            bed.https("GET", &get, &token, Value::Null).await.status,
            status,
            "{token:?}"
        );
    }
    let read = Token::of_policy("registryRead");
    assert_eq!(
        bed.https("DELETE", &get, &read, Value::Null).await.status,
        401
    );
    let headers = [
        ("authorization", "Bearer x".to_owned()),
        ("request-id", "r7".to_owned()),
    ];
    let refused = bed.https_with("GET", &get, &headers, Value::Null).await;
    assert_eq!(
        (
            refused.status,
            refused.headers["x-ms-request-id"].as_bytes()
        ),
        (401, &b"r7"[..])
    );
    let path = "/devices/leaf1";
    let owner_token = Token::of_policy("iothubowner");
    let unversioned = bed.https("GET", path, &owner_token, Value::Null).await;
    assert_eq!(
        unversioned.headers["iothub-errorcode"],
        "InvalidProtocolVersion"
    );
}

/// A disabled device is disconnected, its modules too, and refused; what waits for it waits on, and
/// it is found as what it is. Enabled again, it is admitted.
#[tokio::test]
async fn a_disabled_device_is_out_and_keeps_what_it_has() {
    let bed = Bed::strict().await;
    bed.served("PATCH", "/twins/leaf1", json!({"tags": {"kept": 1}}))
        .await;
    bed.control("POST", "/c2d/leaf1", json!({"body": "kept"}))
        .await;
    let mut clients = Vec::new();
    for hello in [Hello::of("leaf1/m1"), Hello::through("leaf1;edge2;edge1")] {
        clients.push(Client::admitted(&bed, &hello).await);
    }
    let mut device = owner(&bed, "GET", "/devices/leaf1", Value::Null)
        .await
        .json();
    device["status"] = json!("disabled");
    device["statusReason"] = json!("lost");
    let disabled = change(&bed, "/devices/leaf1", "*", device.clone()).await;
    assert_eq!(disabled.status, 200, "{}", disabled.text());
    for mut client in clients {
        assert_eq!(client.next().await, None);
    }
    for hello in [Hello::of("leaf1"), Hello::through("leaf1;edge2;edge1")] {
        let (_, code) = Client::connect(&bed, &hello).await;
        assert_eq!(code, mqttbytes::v4::ConnectReturnCode::NotAuthorized);
    }
    let path = format!("/devices/leaf1/modules?{VERSION}");
    let own = bed
        .https("GET", &path, &Token::of("leaf1"), Value::Null)
        .await;
    assert_eq!(own.status, 401, "its own token opens nothing");
    let twin = bed.served("GET", "/twins/leaf1", Value::Null).await;
    for (name, value) in [
        ("status", json!("disabled")),
        ("statusReason", json!("lost")),
        ("connectionState", json!("Disconnected")),
        ("cloudToDeviceMessageCount", json!(1)),
        ("tags", json!({"kept": 1})),
    ] {
        assert_eq!(twin[name], value, "{name}");
    }
    device["status"] = json!("enabled");
    let enabled = change(&bed, "/devices/leaf1", "*", device).await;
    assert_eq!(enabled.status, 200);
    let mut leaf = Client::admitted(&bed, &Hello::of("leaf1")).await;
    leaf.subscribe(
        &["devices/leaf1/messages/devicebound/#"],
        mqttbytes::QoS::AtLeastOnce,
    )
    .await;
    assert_eq!(&leaf.delivery().await.payload[..], b"kept");
}
