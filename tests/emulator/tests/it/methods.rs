//! Direct methods: called over REST, answered over MQTT.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mqttbytes::QoS::{AtLeastOnce, AtMostOnce};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::common::Bed;
use crate::common::http::Answer;
use crate::common::mqtt::{Client, Hello, publish};

const METHODS: &str = "$iothub/methods/POST/#";

async fn subscribed(bed: &Bed, hello: &Hello) -> Client {
    let mut client = Client::admitted(bed, hello).await;
    client.subscribe(&[METHODS], AtLeastOnce).await;
    client
}

fn call(bed: &Arc<Bed>, path: &str, body: Value) -> JoinHandle<Answer> {
    let (bed, path) = (bed.clone(), format!("{path}/methods"));
    tokio::spawn(async move { bed.service("POST", &path, body).await })
}

/// Receives a request: its name, its id, its body.
async fn request(client: &mut Client) -> (String, String, Value) {
    let request = client.delivery().await;
    assert_eq!((request.qos, request.retain), (AtMostOnce, false));
    let rest = request.topic.strip_prefix("$iothub/methods/POST/").unwrap();
    let (name, rid) = rest.split_once("/?$rid=").unwrap();
    let body = serde_json::from_slice(&request.payload).unwrap();
    (name.to_owned(), rid.to_owned(), body)
}

async fn answer(client: &mut Client, status: &str, rid: &str, body: &str) {
    let topic = format!("$iothub/methods/res/{status}/?$rid={rid}");
    client
        .send(&publish(&topic, AtMostOnce, 0, body.as_bytes()))
        .await;
}

/// The JSON that a method's error carries in its message.
fn error_of(answer: &Answer) -> Value {
    let message = answer.json()["Message"].as_str().unwrap().to_owned();
    serde_json::from_str(&message).unwrap_or_else(|_| panic!("no JSON: {message}"))
}

/// Devices, modules, and both through an edge device that acts for them.
#[tokio::test]
async fn a_method_reaches_its_target_and_the_answer_its_caller() {
    let bed = Arc::new(Bed::strict().await);
    for (hello, path) in [
        (Hello::of("leaf1"), "/twins/leaf1"),
        (Hello::of("edge1/modA"), "/twins/edge1/modules/modA"),
        (
            Hello::of("edge1/$edgeHub"),
            "/twins/edge1/modules/%24edgeHub",
        ),
        (Hello::through("leaf3;edge3;edge2;edge1"), "/twins/leaf3"),
        (
            Hello::through("edge3/modA;edge3;edge2;edge1"),
            "/twins/edge3/modules/modA",
        ),
    ] {
        let mut client = subscribed(&bed, &hello).await;
        let body = json!({"methodName": "reboot", "payload": {"delay": [1, "x"]},
            "responseTimeoutInSeconds": 60, "connectTimeoutInSeconds": 0});
        let caller = call(&bed, path, body);
        let (name, rid, payload) = request(&mut client).await;
        assert_eq!(
            (name.as_str(), &payload),
            ("reboot", &json!({"delay": [1, "x"]}))
        );
        answer(&mut client, "-7", &rid, r#"{"done":true}"#).await;
        let answered = caller.await.unwrap();
        assert_eq!(answered.status, 200, "{}", answered.text());
        assert_eq!(
            answered.json(),
            json!({"status": -7, "payload": {"done": true}})
        );
    }
}

/// No payload is `null` in both directions, and a name is encoded where SDKs would misread it.
#[tokio::test]
async fn empty_payloads_and_odd_names() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let caller = call(&bed, "/twins/leaf1", json!({"methodName": "a b?c#d%"}));
    let (name, rid, payload) = request(&mut client).await;
    assert_eq!((name.as_str(), payload), ("a%20b%3Fc%23d%25", Value::Null));
    let topic = format!("$iothub/methods/res/200/?$rid={rid}");
    client.publish(&topic, b"", 3).await;
    assert_eq!(
        caller.await.unwrap().json(),
        json!({"status": 200, "payload": null})
    );
}

/// Answers in another order, twice, late, from somebody else, and to nobody.
#[tokio::test]
async fn concurrent_calls_get_their_own_answers() {
    let bed = Arc::new(Bed::strict().await);
    let mut leaf1 = subscribed(&bed, &Hello::of("leaf1")).await;
    let mut leaf3 = subscribed(&bed, &Hello::of("leaf3")).await;
    let mut waiting = Vec::new();
    for number in 0..10 {
        let body = json!({"methodName": "m", "payload": number});
        let caller = call(&bed, "/twins/leaf1", body);
        let (_, rid, payload) = request(&mut leaf1).await;
        assert_eq!(payload, number);
        waiting.push((caller, rid, number));
    }
    for (_, rid, _) in &waiting {
        answer(&mut leaf3, "200", rid, "\"not mine\"").await;
    }
    leaf3.expect_nothing().await;
    answer(&mut leaf1, "200", "unknown", "1").await;
    for (caller, rid, number) in waiting.into_iter().rev() {
        answer(&mut leaf1, "200", &rid, &number.to_string()).await;
        answer(&mut leaf1, "500", &rid, "\"twice\"").await;
        let answered = caller.await.unwrap().json();
        assert_eq!(answered, json!({"status": 200, "payload": number}));
    }
    leaf1.expect_nothing().await;
}

/// Not there: 404 with the number that SDKs know, and at once without a connect time.
#[tokio::test]
async fn a_target_that_is_not_online_is_not_found() {
    let bed = Arc::new(Bed::strict().await);
    let mut connected = Client::admitted(&bed, &Hello::of("leaf3")).await;
    let mut unsubscribed = subscribed(&bed, &Hello::of("leaf0")).await;
    unsubscribed.unsubscribe(METHODS).await;
    for path in ["/twins/leaf1", "/twins/leaf3", "/twins/leaf0"] {
        let refused = call(&bed, path, json!({"methodName": "m"})).await.unwrap();
        assert_eq!(refused.status, 404, "{path}");
        assert_eq!(refused.headers["iothub-errorcode"], "DeviceNotOnline");
        let error = error_of(&refused);
        assert_eq!(error["errorCode"], 404_103);
        assert!(error["trackingId"].is_string() && error["timestampUtc"].is_string());
    }
    connected.expect_nothing().await;
    for (path, name) in [
        ("/twins/nobody", "DeviceNotFound"),
        ("/twins/leaf1/modules/nobody", "ModuleNotFound"),
    ] {
        let refused = call(&bed, path, json!({"methodName": "m"})).await.unwrap();
        assert_eq!(refused.status, 404, "{path}");
        assert_eq!(refused.headers["iothub-errorcode"], name);
    }
}

/// A call with a connect time waits for the target: to come, and to subscribe.
#[tokio::test]
async fn a_call_waits_for_its_target() {
    let bed = Arc::new(Bed::strict().await);
    let body = json!({"methodName": "m", "connectTimeoutInSeconds": 60});
    let first = call(&bed, "/twins/leaf1", body.clone());
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.expect_nothing().await;
    assert!(!first.is_finished());
    client.subscribe(&[METHODS], AtMostOnce).await;
    let (_, rid, _) = request(&mut client).await;
    answer(&mut client, "200", &rid, "1").await;
    assert_eq!(first.await.unwrap().json()["payload"], 1);

    let short = json!({"methodName": "m", "connectTimeoutInSeconds": 1});
    let started = Instant::now();
    let refused = call(&bed, "/twins/leaf3", short).await.unwrap();
    assert_eq!(error_of(&refused)["errorCode"], 404_103);
    assert!(started.elapsed() >= Duration::from_secs(1));

    // A persistent session is subscribed as soon as it is connected.
    let hello = Hello::persistent("leaf0");
    let mut once = subscribed(&bed, &hello).await;
    once.expect_nothing().await;
    once.disconnect().await;
    let second = call(&bed, "/twins/leaf0", body);
    let mut again = Client::admitted(&bed, &hello).await;
    let (_, rid, _) = request(&mut again).await;
    answer(&mut again, "200", &rid, "2").await;
    assert_eq!(second.await.unwrap().json()["payload"], 2);
}

/// No answer within the response time: 504, and a late one is ignored.
#[tokio::test]
async fn a_silent_target_times_out() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let body = json!({"methodName": "m", "responseTimeoutInSeconds": 5});
    let started = Instant::now();
    let caller = call(&bed, "/twins/leaf1", body);
    let (_, rid, _) = request(&mut client).await;
    let late = caller.await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(5));
    assert_eq!(late.status, 504);
    assert_eq!(late.headers["iothub-errorcode"], "GatewayTimeout");
    assert_eq!(error_of(&late)["errorCode"], 504_101);
    answer(&mut client, "200", &rid, "1").await;
    client.expect_nothing().await;
}

/// The connection may end between request and answer; the answer counts over the next one too.
#[tokio::test]
async fn an_answer_may_come_over_the_next_connection() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = subscribed(&bed, &Hello::persistent("leaf1")).await;
    let caller = call(&bed, "/twins/leaf1", json!({"methodName": "m"}));
    let (_, rid, _) = request(&mut client).await;
    drop(client);
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    client.expect_nothing().await;
    answer(&mut client, "200", &rid, "1").await;
    assert_eq!(caller.await.unwrap().json()["payload"], 1);
}

#[tokio::test]
async fn an_answer_that_is_no_json_is_the_targets_fault() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let large = format!("\"{}\"", "x".repeat(128 * 1024));
    for body in ["no json", large.as_str()] {
        let caller = call(&bed, "/twins/leaf1", json!({"methodName": "m"}));
        let (_, rid, _) = request(&mut client).await;
        answer(&mut client, "200", &rid, body).await;
        let failed = caller.await.unwrap();
        assert_eq!(failed.status, 502);
        assert_eq!(error_of(&failed)["errorCode"], 502_001);
    }
}

#[tokio::test]
async fn wrong_calls_are_refused() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let with = |name: &str, value: Value| {
        let mut body = json!({"methodName": "m"});
        body[name] = value;
        body
    };
    for bad in [
        Value::Null,
        json!({}),
        json!([]),
        with("methodName", json!("")),
        with("methodName", json!("a/b")),
        with("methodName", json!("x".repeat(101))),
        with("methodName", json!(7)),
        with("responseTimeoutInSeconds", json!(4)),
        with("responseTimeoutInSeconds", json!(301)),
        with("connectTimeoutInSeconds", json!(-1)),
        with("connectTimeoutInSeconds", json!(301)),
        with("payload", json!("x".repeat(128 * 1024))),
    ] {
        let refused = call(&bed, "/twins/leaf1", bad.clone()).await.unwrap();
        assert_eq!(refused.status, 400, "{bad:.80}");
        assert_eq!(refused.headers["iothub-errorcode"], "ArgumentInvalid");
    }
    client.expect_nothing().await;
}

/// In a black hole the request is lost, and the caller learns it by the time.
#[tokio::test]
async fn a_black_holed_target_times_out() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    bed.control("PUT", "/ports/mqtt", json!({"state": "black_hole"}))
        .await;
    let body = json!({"methodName": "m", "responseTimeoutInSeconds": 5});
    let late = call(&bed, "/twins/leaf1", body).await.unwrap();
    assert_eq!(late.status, 504);
    bed.control("PUT", "/ports/mqtt", json!({"state": "open"}))
        .await;
    request(&mut client).await;
}
