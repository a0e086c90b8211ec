//! Many devices at once, and how many there are.

use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;

async fn owner(bed: &Bed, method: &str, path: &str, body: Value) -> Answer {
    let path = format!("{path}?api-version=2021-04-12");
    bed.https(method, &path, &Token::of_policy("iothubowner"), body)
        .await
}

async fn bulk(bed: &Bed, items: Value) -> Answer {
    owner(bed, "POST", "/devices", items).await
}

fn success() -> Value {
    json!({"isSuccessful": true, "errors": [], "warnings": []})
}

/// Create, change, delete, in the forms that SDKs send; a deleted device is disconnected.
#[tokio::test]
async fn devices_are_created_changed_and_deleted_in_bulk() {
    let bed = Bed::strict().await;
    let sas = json!({"type": "sas", "symmetricKey": {"primaryKey": "", "secondaryKey": ""}});
    let items: Vec<Value> = (0..100)
        .map(|n| json!({"id": format!("b{n}"), "importMode": "create", "authentication": sas}))
        .collect();
    let created = bulk(&bed, items.into()).await;
    assert_eq!(created.status, 200, "{}", created.text());
    assert_eq!(created.json(), success());
    let b7 = owner(&bed, "GET", "/devices/b7", Value::Null).await.json();
    assert_eq!(b7["status"], "enabled");

    let changed = bulk(
        &bed,
        json!([
            {"id": "b1", "importMode": "Update", "status": "disabled", "statusReason": "x"},
            {"id": "b7", "importMode": "UpdateIfMatchETag", "etag": b7["etag"],
                "status": "disabled"},
        ]),
    )
    .await;
    assert_eq!(changed.json(), success());
    for id in ["b1", "b7"] {
        let path = format!("/devices/{id}");
        let device = owner(&bed, "GET", &path, Value::Null).await.json();
        assert_eq!(device["status"], "disabled", "{id}");
    }

    let mut leaf = Client::admitted(&bed, &Hello::of("leaf0")).await;
    let leaf0 = owner(&bed, "GET", "/devices/leaf0", Value::Null).await;
    let deleted = bulk(
        &bed,
        json!([
            {"id": "b1", "importMode": "Delete"},
            {"id": "leaf0", "importMode": "DeleteIfMatchETag", "eTag": leaf0.json()["etag"]},
            {"id": "leaf1", "moduleId": "m1", "importMode": "delete"},
            {"id": "leaf1", "moduleId": "m9", "importMode": "create"},
        ]),
    )
    .await;
    assert_eq!(deleted.json(), success());
    assert_eq!(leaf.next().await, None);
    for (path, status) in [
        ("/devices/b1", 404),
        ("/devices/leaf0", 404),
        ("/devices/leaf1/modules/m1", 404),
        ("/devices/leaf1/modules/m9", 200),
    ] {
        let answer = owner(&bed, "GET", path, Value::Null).await;
        assert_eq!(answer.status, status, "{path}");
    }
}

/// What can be done is done, and the answer says what was not.
#[tokio::test]
async fn a_bulk_call_says_what_could_not_be_done() {
    let bed = Bed::strict().await;
    let answer = bulk(
        &bed,
        json!([
            {"id": "good", "importMode": "create"},
            {"id": "leaf1", "importMode": "create"},
            {"id": "nobody", "importMode": "Update"},
            {"id": "leaf3", "importMode": "UpdateIfMatchETag", "etag": "bm8="},
            {"id": "leaf3", "importMode": "UpdateIfMatchETag"},
            {"id": "leaf3", "importMode": "export"},
            {"id": "leaf3"},
            {"id": "a/b", "importMode": "create"},
            {"id": "tagged", "importMode": "create", "tags": {"a": 1}},
            {"id": "leaf1", "moduleId": "m1", "importMode": "create"},
        ]),
    )
    .await;
    assert_eq!(answer.status, 400);
    let body = answer.json();
    assert_eq!(body["isSuccessful"], false);
    let errors = body["errors"].as_array().unwrap();
    let codes: Vec<(&str, &Value)> = errors
        .iter()
        .map(|error| (error["deviceId"].as_str().unwrap(), &error["errorCode"]))
        .collect();
    assert_eq!(
        codes,
        [
            ("leaf1", &json!(409_001)),
            ("nobody", &json!(404_001)),
            ("leaf3", &json!(412_001)),
            ("leaf3", &json!(400_004)),
            ("leaf3", &json!(400_004)),
            ("leaf3", &json!(400_004)),
            ("a/b", &json!(400_004)),
            ("tagged", &json!(400_004)),
            ("leaf1", &json!(409_301)),
        ]
    );
    assert_eq!(errors[8]["moduleId"], "m1");
    let status = errors[0]["errorStatus"].as_str().unwrap();
    assert!(status.starts_with("DeviceAlreadyExists"), "{status}");
    let good = owner(&bed, "GET", "/devices/good", Value::Null).await;
    assert_eq!(good.status, 200);
}

#[tokio::test]
async fn bulk_calls_have_limits_and_need_a_right() {
    let bed = Bed::strict().await;
    let item = json!({"id": "b", "importMode": "create"});
    for bad in [
        json!([]),
        vec![item.clone(); 101].into(),
        json!({"id": "b"}),
        json!([{"importMode": "create"}]),
        json!([1]),
    ] {
        let refused = bulk(&bed, bad).await;
        assert_eq!(refused.status, 400);
        assert_eq!(refused.headers["iothub-errorcode"], "ArgumentInvalid");
    }
    let path = "/devices?api-version=2021-04-12";
    for (name, status) in [
        ("service", 401),
        ("registryRead", 401),
        ("device", 401),
        ("registryReadWrite", 200),
    ] {
        let token = Token::of_policy(name);
        let answer = bed.https("POST", path, &token, json!([item])).await;
        assert_eq!(answer.status, status, "{name}");
    }
}

#[tokio::test]
async fn the_registry_counts_its_devices() {
    let bed = Bed::strict().await;
    let counts = owner(&bed, "GET", "/statistics/devices", Value::Null).await;
    let wanted = json!({"totalDeviceCount": 13, "enabledDeviceCount": 11,
        "disabledDeviceCount": 2});
    assert_eq!(counts.json(), wanted);
    let client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let module = Client::admitted(&bed, &Hello::of("leaf1/m1")).await;
    let counts = owner(&bed, "GET", "/statistics/service", Value::Null).await;
    assert_eq!(counts.json(), json!({"connectedDeviceCount": 1}));
    drop((client, module));
    let unknown = owner(&bed, "GET", "/statistics/jobs", Value::Null).await;
    assert_eq!(unknown.status, 501);
    let path = "/statistics/devices?api-version=2021-04-12";
    let service = Token::of_policy("service");
    let refused = bed.https("GET", path, &service, Value::Null).await;
    assert_eq!(refused.status, 401);
}

/// Calls that IoT Hub has and the emulator has not.
#[tokio::test]
async fn calls_that_are_not_here_say_so() {
    let bed = Bed::strict().await;
    for (method, path) in [
        ("GET", "/configurations"),
        ("PUT", "/configurations/c1"),
        ("POST", "/configurations/testQueries"),
        ("POST", "/jobs/create"),
        ("GET", "/jobs/v2/query"),
        ("GET", "/digitaltwins/leaf1"),
        ("POST", "/devices/leaf1/files"),
        ("PUT", "/devices/query/modules"),
    ] {
        let answer = owner(&bed, method, path, json!({})).await;
        assert_eq!(answer.status, 501, "{method} {path}");
        assert_eq!(answer.headers["iothub-errorcode"], "NotImplemented");
    }
}
