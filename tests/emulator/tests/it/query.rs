//! Queries over twins.

use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;

const PATH: &str = "/devices/query?api-version=2021-04-12";

async fn page(bed: &Bed, query: &str, size: Option<&str>, after: Option<&str>) -> Answer {
    let mut headers = vec![("authorization", Token::of_policy("service").text())];
    headers.extend(size.map(|size| ("x-ms-max-item-count", size.to_owned())));
    headers.extend(after.map(|after| ("x-ms-continuation", after.to_owned())));
    bed.https_with("POST", PATH, &headers, json!({ "query": query }))
        .await
}

async fn all(bed: &Bed, query: &str) -> Value {
    let answer = page(bed, query, None, None).await;
    assert_eq!(answer.status, 200, "{query}: {}", answer.text());
    answer.json()
}

fn ids(items: &Value) -> Vec<String> {
    let id = |item: &Value| {
        let device = item["deviceId"].as_str().unwrap();
        match item["moduleId"].as_str() {
            Some(module) => format!("{device}/{module}"),
            None => device.to_owned(),
        }
    };
    items.as_array().unwrap().iter().map(id).collect()
}

#[tokio::test]
async fn twins_are_found_by_what_is_in_them() {
    let bed = Bed::strict().await;
    let change = json!({"tags": {"site": "A"}, "properties": {"desired": {"rate": 5}}});
    for path in ["/twins/leaf1", "/twins/edge2", "/twins/edge1/modules/modA"] {
        bed.served("PATCH", path, change.clone()).await;
    }
    let edge2 = bed.served("GET", "/twins/edge2", Value::Null).await;
    let scope = edge2["deviceScope"].as_str().unwrap();
    let client = Client::admitted(&bed, &Hello::of("leaf3")).await;
    for (condition, wanted) in [
        ("tags.site = 'A'".to_owned(), vec!["edge2", "leaf1"]),
        (
            "tags.site = 'A' AND capabilities.iotEdge = true".to_owned(),
            vec!["edge2"],
        ),
        ("status = 'disabled'".to_owned(), vec!["off", "sleepy"]),
        ("connectionState = 'Connected'".to_owned(), vec!["leaf3"]),
        (
            format!("deviceScope = '{scope}' AND capabilities.iotEdge = false"),
            vec!["leaf1", "leafx"],
        ),
        (
            format!("ARRAY_CONTAINS(parentScopes, '{scope}')"),
            vec!["edge3", "leaf1", "leafx"],
        ),
        (
            "is_defined(properties.desired.rate)".to_owned(),
            vec!["edge2", "leaf1"],
        ),
        (
            "STARTSWITH(deviceId, 'edge1')".to_owned(),
            vec!["edge1", "edge10"],
        ),
        (
            "deviceId IN ['lone', 'leaf4', 'nobody']".to_owned(),
            vec!["leaf4", "lone"],
        ),
        ("deviceId = 'nobody'".to_owned(), vec![]),
    ] {
        let query = format!("SELECT * FROM devices WHERE {condition}");
        assert_eq!(ids(&all(&bed, &query).await), wanted, "{query}");
    }
    drop(client);
    let found = page(
        &bed,
        "SELECT * FROM devices WHERE deviceId = 'leaf1'",
        None,
        None,
    )
    .await;
    assert_eq!(found.headers["x-ms-item-type"], "Twin");
    let twin = bed.served("GET", "/twins/leaf1", Value::Null).await;
    assert_eq!(found.json(), json!([twin]), "the whole twin");
    let modules = "SELECT * FROM devices.modules WHERE tags.site = 'A' OR moduleId = 'm1'";
    assert_eq!(
        ids(&all(&bed, modules).await),
        ["edge1/modA", "leaf1/m1", "leafx/m1"]
    );
}

#[tokio::test]
async fn columns_and_counts_are_raw() {
    let bed = Bed::strict().await;
    bed.served("PATCH", "/twins/leaf1", json!({"tags": {"site": "A"}}))
        .await;
    let query =
        "SELECT deviceId, tags.site AS place FROM devices WHERE STARTSWITH(deviceId, 'leaf')";
    let found = page(&bed, query, None, None).await;
    assert_eq!(found.headers["x-ms-item-type"], "Raw");
    let found = found.json();
    assert_eq!(found[0], json!({"deviceId": "leaf0"}));
    assert_eq!(found[1], json!({"deviceId": "leaf1", "place": "A"}));
    for (query, count) in [
        ("SELECT COUNT() AS n FROM devices", 13),
        (
            "SELECT COUNT() AS n FROM devices WHERE capabilities.iotEdge = true",
            5,
        ),
        (
            "SELECT COUNT() AS n FROM devices.modules WHERE moduleId = '$edgeHub'",
            6,
        ),
        (
            "SELECT COUNT() AS n FROM devices WHERE deviceId = 'nobody'",
            0,
        ),
    ] {
        let found = page(&bed, query, Some("1"), None).await;
        assert!(!found.headers.contains_key("x-ms-continuation"));
        assert_eq!(found.json(), json!([{ "n": count }]), "{query}");
    }
}

/// The continuation is absent on the last page, also when that one is full.
#[tokio::test]
async fn results_come_in_pages() {
    let bed = Bed::strict().await;
    for (query, total) in [
        ("SELECT * FROM devices", 13),
        (
            "SELECT * FROM devices WHERE STARTSWITH(deviceId, 'edge')",
            4,
        ),
        ("SELECT * FROM devices.modules", 15),
    ] {
        let everything = ids(&all(&bed, query).await);
        assert_eq!(everything.len(), total, "{query}");
        for size in ["1", "2", "4", "13", "1000"] {
            let (mut found, mut after) = (Vec::new(), None::<String>);
            loop {
                let answer = page(&bed, query, Some(size), after.as_deref()).await;
                let items = ids(&answer.json());
                assert!(!items.is_empty() && items.len() <= size.parse().unwrap());
                found.extend(items);
                let next = answer.headers.get("x-ms-continuation");
                after = next.map(|next| next.to_str().unwrap().to_owned());
                if after.is_none() {
                    break;
                }
            }
            assert_eq!(found, everything, "{query} by {size}");
        }
    }
    let mut many: Vec<Value> = Vec::new();
    many.extend((0..100).map(|n| json!({"id": format!("x{n:03}"), "importMode": "create"})));
    let path = "/devices?api-version=2021-04-12";
    let owner = Token::of_policy("iothubowner");
    let created = bed.https("POST", path, &owner, many.into()).await;
    assert_eq!(created.status, 200);
    let first = page(&bed, "SELECT deviceId FROM devices", None, None).await;
    assert_eq!(first.json().as_array().unwrap().len(), 100);
    assert!(first.headers.contains_key("x-ms-continuation"));
}

/// What a page ended with may be gone: the next one goes on behind where it stood.
#[tokio::test]
async fn a_page_goes_on_behind_a_deleted_device() {
    let bed = Bed::strict().await;
    let query = "SELECT * FROM devices WHERE STARTSWITH(deviceId, 'leaf')";
    let first = page(&bed, query, Some("2"), None).await;
    assert_eq!(ids(&first.json()), ["leaf0", "leaf1"]);
    let after = first.headers["x-ms-continuation"].to_str().unwrap();
    let path = "/devices/leaf1?api-version=2021-04-12";
    let owner = Token::of_policy("iothubowner");
    let gone = bed.https("DELETE", path, &owner, Value::Null).await;
    assert_eq!(gone.status, 204);
    let second = page(&bed, query, Some("2"), Some(after)).await;
    assert_eq!(ids(&second.json()), ["leaf10", "leaf3"]);
    let other = page(&bed, "SELECT * FROM devices", Some("2"), Some(after)).await;
    assert_eq!(other.status, 400, "of another query");
    for bad in ["x", "%%", "YQ"] {
        assert_eq!(
            page(&bed, query, None, Some(bad)).await.status,
            400,
            "{bad}"
        );
    }
    for bad in ["0", "1001", "-1", "x"] {
        assert_eq!(
            page(&bed, query, Some(bad), None).await.status,
            400,
            "{bad}"
        );
    }
}

#[tokio::test]
async fn strict_a_query_that_is_not_understood_is_refused() {
    let bed = Bed::strict().await;
    for bad in [
        "",
        "SELECT * FROM devices.jobs",
        "SELECT * FROM devices WHERE tags.floor > 3",
        "SELECT * FROM devices GROUP BY tags.floor",
        "SELECT TOP 3 * FROM devices",
        "SELECT * FROM devices WHERE deviceId = 'x",
    ] {
        let refused = page(&bed, bad, None, None).await;
        assert_eq!(refused.status, 400, "{bad}");
        let message = refused.json()["Message"].as_str().unwrap().to_owned();
        assert!(
            message.starts_with("ErrorCode:ArgumentInvalid;at byte "),
            "{message}"
        );
    }
    let owner = Token::of_policy("iothubowner");
    for bad in [json!({}), json!({"query": 1}), json!("SELECT"), Value::Null] {
        assert_eq!(bed.https("POST", PATH, &owner, bad).await.status, 400);
    }
    let query = || json!({"query": "SELECT * FROM devices"});
    for (name, status) in [
        ("registryReadWrite", 401),
        ("device", 401),
        ("service", 200),
        ("iothubowner", 200),
    ] {
        let token = Token::of_policy(name);
        let answer = bed.https("POST", PATH, &token, query()).await;
        assert_eq!(answer.status, status, "{name}");
    }
}
