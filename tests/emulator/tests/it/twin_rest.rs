//! Twins over REST.

use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;

async fn with_etag(bed: &Bed, method: &str, path: &str, etag: &str, body: Value) -> Answer {
    let headers = [
        ("authorization", Token::of_policy("service").text()),
        ("if-match", etag.to_owned()),
    ];
    let path = format!("{path}?api-version=2021-04-12");
    bed.https_with(method, &path, &headers, body).await
}

/// The twin without its times, which have to be there.
fn without_times(mut metadata: Value) -> Value {
    fn strip(value: &mut Value) {
        if let Some(object) = value.as_object_mut() {
            let time = object
                .remove("$lastUpdated")
                .expect("a time on every level");
            assert!(time.as_str().unwrap().ends_with('Z'));
            object
                .values_mut()
                .filter(|value| value.is_object())
                .for_each(strip);
        }
    }
    strip(&mut metadata);
    metadata
}

#[tokio::test]
async fn a_twin_is_shown_whole() {
    let bed = Bed::strict().await;
    let answer = bed.service("GET", "/twins/leaf1", Value::Null).await;
    assert_eq!(answer.status, 200);
    let twin = answer.json();
    assert_eq!(answer.headers["etag"], "\"AAAAAAAAAAE=\"");
    assert_eq!(twin["etag"], "AAAAAAAAAAE=");
    for (member, value) in [
        ("deviceId", json!("leaf1")),
        ("status", json!("enabled")),
        ("connectionState", json!("Disconnected")),
        ("authenticationType", json!("sas")),
        ("cloudToDeviceMessageCount", json!(0)),
        ("version", json!(1)),
        ("tags", json!({})),
        ("capabilities", json!({"iotEdge": false})),
    ] {
        assert_eq!(twin[member], value, "{member}");
    }
    assert_eq!(twin.get("moduleId"), None);
    assert_eq!(twin["parentScopes"], json!([twin["deviceScope"]]));
    let section = json!({"$version": 1, "$metadata": {"$lastUpdated": "0001-01-01T00:00:00Z"}});
    assert_eq!(
        twin["properties"],
        json!({"desired": section, "reported": section})
    );
    let _client = Client::admitted(&bed, &Hello::of("edge1/modA")).await;
    let twin = bed
        .served("GET", "/twins/edge1/modules/modA", Value::Null)
        .await;
    assert_eq!(
        (
            &twin["deviceId"],
            &twin["moduleId"],
            &twin["connectionState"]
        ),
        (&json!("edge1"), &json!("modA"), &json!("Connected"))
    );
    let system = bed
        .served("GET", "/twins/edge1/modules/$edgeHub", Value::Null)
        .await;
    assert_eq!(system["moduleId"], "$edgeHub");
}

#[tokio::test]
async fn a_patch_merges_and_a_put_replaces() {
    let bed = Bed::strict().await;
    let body = json!({"tags": {"site": "north", "floor": 1},
        "properties": {"desired": {"a": {"x": 1, "y": 2}, "b": [1]}}});
    let twin = bed.served("PATCH", "/twins/leaf1", body).await;
    assert_eq!(
        (&twin["version"], &twin["etag"]),
        (&json!(2), &json!("AAAAAAAAAAI="))
    );
    let body = json!({"tags": {"floor": null},
        "properties": {"desired": {"a": {"y": null, "z": 3}, "b": null}}});
    let twin = bed.served("PATCH", "/twins/leaf1", body).await;
    assert_eq!(twin["tags"], json!({"site": "north"}));
    let desired = &twin["properties"]["desired"];
    assert_eq!(desired["$version"], 3);
    assert_eq!(desired["a"], json!({"x": 1, "z": 3}));
    assert_eq!(desired.get("b"), None);
    let version = |n: u64| json!({"$lastUpdatedVersion": n});
    let mut a = version(3);
    a["x"] = version(2);
    a["z"] = version(3);
    let mut metadata = version(3);
    metadata["a"] = a;
    assert_eq!(without_times(desired["$metadata"].clone()), metadata);

    // Sent back as it was read, with one change: what the hub wrote is ignored.
    let mut whole = twin.clone();
    whole["properties"]["desired"]["a"] = json!(7);
    whole["tags"] = json!({"only": true});
    let replaced = bed.served("PUT", "/twins/leaf1", whole).await;
    assert_eq!(replaced["tags"], json!({"only": true}));
    assert_eq!(replaced["properties"]["desired"]["a"], 7);
    assert_eq!(replaced["properties"]["desired"]["$version"], 4);
    assert_eq!(
        replaced["properties"]["reported"],
        twin["properties"]["reported"]
    );
    let empty = bed.served("PUT", "/twins/leaf1", json!({})).await;
    assert_eq!(empty["tags"], json!({}));
    let desired = &empty["properties"]["desired"];
    assert_eq!(desired.as_object().unwrap().len(), 2, "{desired}");
    assert_eq!(
        (&empty["version"], &desired["$version"]),
        (&json!(5), &json!(5))
    );
}

#[tokio::test]
async fn etags_guard_twins() {
    let bed = Bed::strict().await;
    let body = || json!({"tags": {"a": 1}});
    let answer = with_etag(&bed, "PATCH", "/twins/leaf1", "\"AAAAAAAAAAI=\"", body()).await;
    assert_eq!(answer.status, 412);
    assert_eq!(answer.headers["iothub-errorcode"], "PreconditionFailed");
    for (etag, version) in [
        ("\"AAAAAAAAAAE=\"", 2),
        ("AAAAAAAAAAI=", 3),
        ("\"*\"", 4),
        ("*", 5),
    ] {
        for method in ["PATCH", "PUT"] {
            let stale = with_etag(&bed, method, "/twins/leaf1", "\"AAAAAAAAAAA=\"", body()).await;
            assert_eq!(stale.status, 412, "{method}");
        }
        let answer = with_etag(&bed, "PATCH", "/twins/leaf1", etag, body()).await;
        assert_eq!(answer.json()["version"], version, "{etag}");
    }
}

#[tokio::test]
async fn wrong_twin_calls_are_refused() {
    let bed = Bed::strict().await;
    for (path, name) in [
        ("/twins/nobody", "DeviceNotFound"),
        ("/twins/leaf1/modules/nobody", "ModuleNotFound"),
        ("/twins/nobody/modules/m1", "DeviceNotFound"),
    ] {
        for method in ["GET", "PATCH", "PUT"] {
            let answer = bed.service(method, path, json!({})).await;
            assert_eq!(answer.status, 404, "{method} {path}");
            assert_eq!(answer.headers["iothub-errorcode"], name);
        }
    }
    let desired = |value: Value| json!({"properties": {"desired": value}});
    for bad in [
        json!("x"),
        desired(json!(1)),
        desired(json!({"$a": 1})),
        desired(json!({"a.b": 1})),
        desired(json!({"a": {"$version": 1}})),
        desired(json!({"a": u64::MAX})),
        desired(json!({"a": [null]})),
        json!({"tags": {"a b": 1}}),
        json!({"tags": {"a": "x".repeat(4_097)}}),
        json!({"tags": (0..3).map(|n| (n.to_string(), "x".repeat(4_000))).collect::<std::collections::BTreeMap<_, _>>()}),
    ] {
        for method in ["PATCH", "PUT"] {
            let answer = bed.service(method, "/twins/leaf1", bad.clone()).await;
            assert_eq!(answer.status, 400, "{bad:.80}");
            assert_eq!(answer.headers["iothub-errorcode"], "ArgumentInvalid");
        }
    }
    for (method, path) in [
        ("DELETE", "/twins/leaf1"),
        ("POST", "/twins/leaf1"),
        ("GET", "/twins"),
        ("GET", "/twins/leaf1/x"),
        ("GET", "/twins/leaf1/modules"),
        ("GET", "/twins/leaf1/methods"),
    ] {
        let answer = bed.service(method, path, Value::Null).await;
        assert_eq!(answer.status, 501, "{method} {path}");
    }
    let twin = bed.served("GET", "/twins/leaf1", Value::Null).await;
    assert_eq!(twin["version"], 1, "nothing was changed");
}

/// Only ServiceConnect opens the service side, and the api-version is required.
#[tokio::test]
async fn strict_the_service_side_is_for_its_policies() {
    let bed = Bed::strict().await;
    let version = "?api-version=2021-04-12";
    let calls = [
        ("GET", "/twins/leaf1", 200),
        ("PATCH", "/twins/leaf1", 200),
        ("POST", "/twins/leaf1/methods", 400),
        ("DELETE", "/devices/leaf1/commands", 200),
    ];
    for (method, path, admitted) in calls {
        for token in [
            Token::of("leaf1"),
            Token::of_hub("edge1"),
            Token::of_policy("registryReadWrite"),
            Token::of_policy("registryRead"),
            Token::of_policy("device"),
            Token::of_policy("service").signed_by("device"),
            Token {
                host: "other.hub".to_owned(),
                ..Token::of_policy("service")
            },
            Token {
                expires_at: 1,
                ..Token::of_policy("service")
            },
        ] {
            let answer = bed
                .https(method, &format!("{path}{version}"), &token, json!({}))
                .await;
            assert_eq!(answer.status, 401, "{method} {path} {token:?}");
            assert_eq!(
                answer.headers["iothub-errorcode"],
                "IotHubUnauthorizedAccess"
            );
        }
        for name in ["service", "iothubowner"] {
            let token = Token::of_policy(name);
            let path = format!("{path}{version}");
            let answer = bed.https(method, &path, &token, json!({})).await;
            assert_eq!(
                answer.status,
                admitted,
                "{method} {path}: {}",
                answer.text()
            );
        }
        let token = Token::of_policy("service");
        let answer = bed.https(method, path, &token, json!({})).await;
        assert_eq!(answer.status, 400, "{method} {path}");
        assert_eq!(answer.headers["iothub-errorcode"], "InvalidProtocolVersion");
    }
    let registry = bed.service("GET", "/devices/leaf1", Value::Null).await;
    assert_eq!(registry.status, 401, "ServiceConnect is not RegistryRead");
}

/// A deleted identity takes its twin along; the next one of that name begins anew.
#[tokio::test]
async fn a_twin_ends_with_its_identity() {
    let bed = Bed::strict().await;
    let owner = Token::of_policy("iothubowner");
    let version = "?api-version=2021-04-12";
    let body = || json!({"tags": {"old": 1}});
    bed.served("PATCH", "/twins/leaf1", body()).await;
    bed.served("PATCH", "/twins/leaf1/modules/m1", body()).await;
    bed.served("PATCH", "/twins/edge1/modules/modA", body())
        .await;
    for path in ["/devices/leaf1", "/devices/edge1/modules/modA"] {
        let path = format!("{path}{version}");
        let gone = bed.https("DELETE", &path, &owner, Value::Null).await;
        assert_eq!(gone.status, 204);
    }
    for (path, body) in [
        ("/devices/leaf1", json!({"deviceId": "leaf1"})),
        (
            "/devices/leaf1/modules/m1",
            json!({"deviceId": "leaf1", "moduleId": "m1"}),
        ),
        (
            "/devices/edge1/modules/modA",
            json!({"deviceId": "edge1", "moduleId": "modA"}),
        ),
    ] {
        let versioned = format!("{path}{version}");
        let put = bed.https("PUT", &versioned, &owner, body).await;
        assert_eq!(put.status, 200, "{path}");
        let path = path.replace("/devices/", "/twins/");
        let twin = bed.served("GET", &path, Value::Null).await;
        assert_eq!((&twin["version"], &twin["tags"]), (&json!(1), &json!({})));
    }
}

#[tokio::test]
async fn service_calls_fail_on_order() {
    let bed = Bed::strict().await;
    let order = json!({"kind": "service", "count": 1, "code": 503});
    bed.control("POST", "/faults", order).await;
    let failed = bed.service("GET", "/twins/leaf1", Value::Null).await;
    assert_eq!(failed.status, 503);
    bed.served("GET", "/twins/leaf1", Value::Null).await;
}
