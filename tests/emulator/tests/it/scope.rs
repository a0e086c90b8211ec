//! The two scope calls: who may ask, what comes back, pages.

use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::token::Token;

const VERSION: &str = "api-version=2020-06-30-preview";

fn page_path(actor: &str) -> String {
    format!("/devices/{actor}/modules/$edgeHub/devicesAndModulesInTargetDeviceScope?{VERSION}")
}

fn identity_path(actor: &str) -> String {
    format!("/devices/{actor}/modules/$edgeHub/getDeviceAndModuleOnBehalfOf?{VERSION}")
}

async fn page(bed: &Bed, actor: &str, body: Value) -> Answer {
    bed.https("POST", &page_path(actor), &Token::of_hub(actor), body)
        .await
}

async fn identity(bed: &Bed, actor: &str, body: Value) -> Answer {
    bed.https("POST", &identity_path(actor), &Token::of_hub(actor), body)
        .await
}

/// Walks all pages; returns ids as `device` and `device/module` in order of arrival per list.
async fn walk(bed: &Bed, actor: &str, chain: &str, page_size: usize) -> (Vec<String>, Vec<String>) {
    let (mut devices, mut modules) = (vec![], vec![]);
    let mut link = None;
    loop {
        let mut body = json!({"pageSize": page_size, "authChain": chain});
        if let Some(link) = link {
            body["continuationLink"] = link;
        }
        let answer = page(bed, actor, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let answer = answer.json();
        assert_eq!(answer.as_object().unwrap().len(), 3);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let page = (
            answer["devices"].as_array().unwrap(),
            answer["modules"].as_array().unwrap(),
        );
        assert!(page.0.len() + page.1.len() <= page_size);
        devices.extend(page.0.iter().map(|device| text(&device["deviceId"])));
        modules.extend(
            page.1
                .iter()
                .map(|m| format!("{}/{}", text(&m["deviceId"]), text(&m["moduleId"]))),
        );
        if answer["continuationLink"].is_null() {
            return (devices, modules);
        }
        link = Some(answer["continuationLink"].clone());
    }
}

#[tokio::test]
async fn a_scope_is_the_device_its_modules_and_its_children() {
    let bed = Bed::strict().await;
    for page_size in [1, 2, 3, 7, 10, 100] {
        let (devices, modules) = walk(&bed, "edge1", "edge2;edge1", page_size).await;
        assert_eq!(devices, ["edge2", "edge3", "leaf1", "leafx"], "{page_size}");
        let wanted = [
            "edge2/$edgeAgent",
            "edge2/$edgeHub",
            "leaf1/m1",
            "leafx/$edgeHub",
            "leafx/m1",
        ];
        assert_eq!(modules, wanted, "{page_size}");
    }
    let (devices, modules) = walk(&bed, "edge1", "edge1", 10).await;
    assert_eq!(devices, ["edge1", "edge2", "leaf0", "off", "sleepy"]);
    assert_eq!(
        modules,
        ["edge1/$edgeAgent", "edge1/$edgeHub", "edge1/modA"]
    );
    let (devices, _) = walk(&bed, "edge1", "edge3;edge2;edge1", 10).await;
    assert_eq!(devices, ["edge3", "leaf3"]);
}

/// The shapes of spec/auth-hierarchy-http.md 6.1, to the letter and in order.
#[tokio::test]
async fn identities_have_the_documented_json() {
    let bed = Bed::strict().await;
    let body =
        json!({"targetDeviceId": "leaf1", "targetModuleId": "m1", "authChain": "edge2;edge1"});
    let answer = identity(&bed, "edge1", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    assert!(
        text.starts_with(r#"{"devices":[{"deviceId":"leaf1","generationId":"6375"#),
        "{text}"
    );
    assert!(text.ends_with(r#"}],"continuationLink":null}"#), "{text}");
    for authentication in text.split(r#""authentication":"#).skip(1) {
        let place = |name: &str| authentication.find(name).unwrap();
        assert!(place("symmetricKey") < place("x509Thumbprint"));
        assert!(place("x509Thumbprint") < place(r#""type":"sas"}"#));
    }
    let device = &answer.json()["devices"][0];
    assert_eq!(device["status"], "enabled");
    assert_eq!(device["capabilities"], json!({"iotEdge": false}));
    assert_eq!(device["parentScopes"], json!([device["deviceScope"]]));
    assert!(
        device["deviceScope"]
            .as_str()
            .unwrap()
            .starts_with("ms-azure-iot-edge://edge2-6375")
    );
    let thumbprints = json!({"primaryThumbprint": null, "secondaryThumbprint": null});
    assert_eq!(device["authentication"]["x509Thumbprint"], thumbprints);
    let module = &answer.json()["modules"][0];
    assert_eq!(module["moduleId"], "m1");
    assert_eq!(module.as_object().unwrap().len(), 5);

    let body = json!({"targetDeviceId": "edge2", "authChain": "edge1"});
    let edge = identity(&bed, "edge1", body).await.json();
    assert_eq!(edge["modules"], json!([]));
    assert_eq!(edge["devices"][0]["capabilities"], json!({"iotEdge": true}));
    let body = json!({"targetDeviceId": "edge1", "authChain": "edge1"});
    let top = identity(&bed, "edge1", body).await.json();
    assert_eq!(top["devices"][0]["parentScopes"], json!([]));
    let body = json!({"targetDeviceId": "off", "authChain": "edge1"});
    assert_eq!(
        identity(&bed, "edge1", body).await.json()["devices"][0]["status"],
        "disabled"
    );
}

#[tokio::test]
async fn strict_only_the_edge_hub_itself_may_ask() {
    let bed = Bed::strict().await;
    let ask = |path: String, token: Token| {
        let bed = &bed;
        async move {
            let body = json!({"pageSize": 10, "authChain": "edge1"});
            bed.https("POST", &path, &token, body).await.status
        }
    };
    for token in [
        Token::of("edge1"),
        Token::of("edge1/modA"),
        Token::of("edge1/$edgeAgent"),
        Token::of_hub("edge2"),
        Token::of_hub("edge10"),
        Token::of_hub("edge1").signed_by("edge1"),
        Token::of_hub("edge1").for_path_of("edge1"),
        Token::of_policy("iothubowner"),
        Token {
            host: "other.hub".to_owned(),
            ..Token::of_hub("edge1")
        },
        Token {
            expires_at: 1,
            ..Token::of_hub("edge1")
        },
    ] {
        assert_eq!(
            ask(page_path("edge1"), token.clone()).await,
            401,
            "{token:?}"
        );
    }
    for id_encodings in 0..=2 {
        let token = Token {
            id_encodings,
            ..Token::of_hub("edge1")
        };
        assert_eq!(ask(page_path("edge1"), token).await, 200);
    }
    let other_module = page_path("edge1").replace("$edgeHub", "modA");
    for token in [Token::of("edge1/modA"), Token::of_hub("edge1")] {
        assert_eq!(ask(other_module.clone(), token).await, 401);
    }
    let encoded = page_path("edge1").replace('$', "%24");
    assert_eq!(ask(encoded, Token::of_hub("edge1")).await, 200);
    let no_version = page_path("edge1").replace(VERSION, "");
    assert_eq!(ask(no_version, Token::of_hub("edge1")).await, 400);
}

#[tokio::test]
async fn strict_a_scope_is_asked_through_a_real_chain() {
    let bed = Bed::strict().await;
    for (actor, chain, status) in [
        ("edge1", "edge3;edge2;edge1", 200),
        ("edge2", "edge3;edge2", 200),
        ("edge1", "edge3;edge1", 401),
        ("edge1", "edge2", 401),
        ("edge2", "edge2;edge1", 401),
        ("edge1", "edge10;edge1", 401),
        ("edge1", "edge10", 401),
        ("edge2", "edge1;edge2", 401),
        ("edge1", "sleepy;edge1", 401),
        ("edge1", "nobody;edge1", 401),
        ("edge1", "leaf0;edge1", 400),
        ("edge1", "edge1/modA;edge1", 400),
        ("edge1", "", 400),
        ("edge1", ";edge1", 400),
        ("edge1", "../edge1", 400),
    ] {
        let body = json!({"pageSize": 10, "authChain": chain});
        assert_eq!(
            page(&bed, actor, body).await.status,
            status,
            "{actor}: {chain}"
        );
    }
}

#[tokio::test]
async fn strict_identities_outside_the_scope_are_not_given() {
    let bed = Bed::strict().await;
    for (chain, device, module, status) in [
        ("edge1", "leaf3", None, 200),
        ("edge2;edge1", "leaf3", None, 200),
        ("edge2;edge1", "edge3", Some("modA"), 200),
        ("edge2;edge1", "leaf0", None, 401),
        ("edge2;edge1", "edge1", None, 401),
        ("edge2;edge1", "edge1", Some("modA"), 401),
        ("edge1", "edge10", None, 401),
        ("edge1", "leaf10", None, 401),
        ("edge1", "lone", None, 401),
        ("edge1", "nobody", None, 404),
        ("edge1", "leaf0", Some("nobody"), 404),
        ("edge3;edge1", "leaf3", None, 401),
    ] {
        let body = json!({"targetDeviceId": device, "targetModuleId": module, "authChain": chain});
        let answer = identity(&bed, "edge1", body).await;
        assert_eq!(
            answer.status,
            status,
            "{chain}: {device}/{module:?} {}",
            answer.text()
        );
        if status != 200 {
            assert!(
                answer.json()["Message"]
                    .as_str()
                    .unwrap()
                    .starts_with("ErrorCode:")
            );
            assert!(answer.headers.contains_key("iothub-errorcode"));
        }
    }
}

#[tokio::test]
async fn strict_paths_with_tricks_are_refused() {
    let bed = Bed::strict().await;
    for path in [
        "/devices/x/../edge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope",
        "/devices/edge1/modules/modA/../$edgeHub/devicesAndModulesInTargetDeviceScope",
        "/devices/edge1%2F..%2Fedge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope",
        "/devices/%2e%2e/edge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope",
        "/devices//edge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope",
    ] {
        let body = json!({"pageSize": 10, "authChain": "edge1"});
        let token = Token::of_hub("edge1");
        let answer = bed
            .https("POST", &format!("{path}?{VERSION}"), &token, body)
            .await;
        assert_eq!(answer.status, 400, "{path}");
    }
}

#[tokio::test]
async fn malformed_scope_requests_are_refused() {
    let bed = Bed::strict().await;
    for body in [
        Value::Null,
        json!({}),
        json!({"pageSize": 10}),
        json!({"authChain": "edge1"}),
        json!({"pageSize": 0, "authChain": "edge1"}),
        json!({"pageSize": 1001, "authChain": "edge1"}),
        json!({"pageSize": 10, "authChain": "edge1", "continuationLink": "nonsense"}),
        json!({"pageSize": 10, "authChain": "edge1", "pagesize": 10}),
    ] {
        assert_eq!(
            page(&bed, "edge1", body.clone()).await.status,
            400,
            "{body}"
        );
    }
    let first = page(&bed, "edge1", json!({"pageSize": 1, "authChain": "edge1"}))
        .await
        .json();
    let link = &first["continuationLink"];
    let body = json!({"pageSize": 1, "authChain": "edge2;edge1", "continuationLink": link});
    assert_eq!(
        page(&bed, "edge1", body).await.status,
        400,
        "a link of another scope"
    );
}

/// A walk that goes on while the registry changes loses nobody who stays.
#[tokio::test]
async fn a_page_may_vanish_under_the_walk() {
    let bed = Bed::strict().await;
    let first = page(&bed, "edge1", json!({"pageSize": 6, "authChain": "edge1"}))
        .await
        .json();
    assert_eq!(first["devices"][2]["deviceId"], "leaf0");
    let owner = Token::of_policy("iothubowner");
    let gone = bed
        .https(
            "DELETE",
            &format!("/devices/leaf0?{VERSION}"),
            &owner,
            Value::Null,
        )
        .await;
    assert_eq!(gone.status, 204);
    let link = &first["continuationLink"];
    let body = json!({"pageSize": 6, "authChain": "edge1", "continuationLink": link});
    let rest = page(&bed, "edge1", body).await.json();
    let ids: Vec<_> = rest["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| &d["deviceId"])
        .collect();
    assert_eq!(ids, ["off", "sleepy"]);
}
