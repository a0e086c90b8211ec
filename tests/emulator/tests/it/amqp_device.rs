//! Twins, methods and cloud-to-device messages over AMQP.

use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::types::definitions::ReceiverSettleMode;
use fe2o3_amqp::types::messaging::{
    ApplicationProperties, Body, Message, MessageId, Modified, Properties,
};
use fe2o3_amqp::types::primitives::{OrderedMap, SimpleValue, Value};
use fe2o3_amqp::{Receiver, Sender};
use serde_json::{Value as Json, json};
use tokio::time::timeout;

use crate::common::amqp::{Amqp, Got, Whole, annotations, data_body, ended, next, send};
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;
use crate::common::{Bed, PATIENCE};

const NOTICES: &str = "/notifications/twin/properties/desired";

/// A twin request; C# sends a GET without any body.
fn request(id: &str, operation: &str, resource: Option<&str>, body: Option<&str>) -> Whole {
    let resource = resource.map(|resource| ("resource", Value::String(resource.to_owned())));
    let operation = ("operation", Value::String(operation.to_owned()));
    let properties = Properties::builder().correlation_id(MessageId::String(id.to_owned()));
    Message::builder()
        .message_annotations(annotations([operation].into_iter().chain(resource)))
        .properties(properties.build())
        .body(body.map_or(Body::Empty, |body| data_body([body.into()])))
        .build()
}

/// Sends a twin request; returns status and version, and the answer.
async fn ask(
    (sender, receiver): &mut (Sender, Receiver),
    message: Whole,
) -> (i32, Option<i64>, Got) {
    let id = message.properties.as_ref().unwrap().correlation_id.clone();
    assert_eq!(send(sender, message).await, Ok(()));
    let answer = next(receiver).await;
    assert_eq!(answer.properties.correlation_id, id);
    let Some(Value::Int(status)) = answer.annotations.get("status") else {
        panic!("no status: {answer:?}");
    };
    let version = answer
        .annotations
        .get("version")
        .map(|version| match version {
            Value::Long(version) => *version,
            other => panic!("version {other:?}"),
        });
    (*status, version, answer)
}

#[tokio::test]
async fn a_twin_is_read_and_reported() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "edge1/modA").await;
    let mut twin = client.pair("edge1/modA", "twin").await;
    let (status, _, answer) = ask(&mut twin, request("Get1", "GET", None, None)).await;
    let empty = json!({"desired": {"$version": 1}, "reported": {"$version": 1}});
    assert_eq!((status, answer.json()), (200, empty));
    let patch =
        |id: &str, body: &str| request(id, "PATCH", Some("/properties/reported"), Some(body));
    let (status, version, answer) = ask(&mut twin, patch("Patch1", r#"{"fw":2}"#)).await;
    assert_eq!(
        (status, version, answer.text()),
        (204, Some(2), String::new())
    );
    let (_, _, answer) = ask(&mut twin, request("Get2", "GET", None, Some(" "))).await;
    assert_eq!(answer.json()["reported"], json!({"fw": 2, "$version": 2}));
    // Errors have a body that Node can parse.
    for (body, wanted) in [("no json", 400), ("[]", 400), (r#"{"a.b":1}"#, 400)] {
        let (status, _, answer) = ask(&mut twin, patch("x", body)).await;
        assert_eq!(status, wanted, "{body}");
        assert!(answer.json()["message"].is_string());
    }
    for (operation, resource) in [("GETT", None), ("PATCH", None), ("PUT", Some("/x"))] {
        let (status, _, _) = ask(&mut twin, request("x", operation, resource, None)).await;
        assert_eq!(status, 400, "{operation}");
    }
    let mut versioned = patch("v", "{}");
    versioned.message_annotations = Some(annotations([
        ("operation", Value::String("PATCH".to_owned())),
        ("resource", Value::String("/properties/reported".to_owned())),
        ("version", Value::Long(7)),
    ]));
    assert_eq!(ask(&mut twin, versioned).await.0, 412);
    let fault = json!({"kind": "twin", "count": 1, "code": 429, "client_id": "edge1/modA"});
    bed.control("POST", "/faults", fault).await;
    assert_eq!(ask(&mut twin, request("g", "GET", None, None)).await.0, 429);
    assert_eq!(ask(&mut twin, request("g", "GET", None, None)).await.0, 200);
    let counters = bed
        .control("GET", "/counters?client_id=edge1/modA", Json::Null)
        .await;
    assert_eq!(
        (&counters["twin_gets"], &counters["twin_patches"]),
        (&json!(4), &json!(6))
    );
}

/// Desired patches come from PUT to DELETE, without a correlation-id.
#[tokio::test]
async fn desired_patches_are_subscribed_and_unsubscribed() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let mut twin = client.pair("leaf1", "twin").await;
    let change = async |value: u32| {
        let body = json!({"properties": {"desired": {"a": value}}});
        bed.served("PATCH", "/twins/leaf1", body).await;
    };
    change(1).await;
    assert_eq!(
        ask(&mut twin, request("Put1", "PUT", Some(NOTICES), Some(" ")))
            .await
            .0,
        200
    );
    change(2).await;
    let notice = next(&mut twin.1).await;
    assert_eq!(notice.json(), json!({"a": 2, "$version": 3}));
    assert_eq!(notice.properties.correlation_id, None);
    let filter = "$iothub/twin/PATCH/properties/desired/%23";
    let path = format!("/sessions/wait?client_id=leaf1&timeout_ms=0&filter={filter}");
    let waited = bed.control("GET", &path, Json::Null).await;
    assert_eq!(waited, json!({"reached": true}));
    assert_eq!(
        ask(&mut twin, request("Del1", "DELETE", Some(NOTICES), None))
            .await
            .0,
        200
    );
    change(3).await;
    // An answer would come after a notice.
    let (_, _, answer) = ask(&mut twin, request("Get1", "GET", None, None)).await;
    assert_eq!(answer.json()["desired"], json!({"a": 3, "$version": 4}));
    // Detaching the link of answers ends the subscription, too.
    ask(&mut twin, request("Put2", "PUT", Some(NOTICES), None)).await;
    twin.1.close().await.unwrap();
    let waited = bed.control("GET", &path, Json::Null).await;
    assert_eq!(waited, json!({"reached": false}));
}

/// The newest pair of an identity takes the place of the older one.
#[tokio::test]
async fn a_second_pair_replaces_the_first() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let (mut old, _) = client.pair("leaf1", "twin").await;
    let mut new = client.pair("leaf1", "twin").await;
    let detach = timeout(PATIENCE, old.on_detach()).await.unwrap();
    assert_eq!(crate::common::amqp::detached(detach), "ClosedByRemote");
    assert_eq!(
        ask(&mut new, request("Get1", "GET", None, None)).await.0,
        200
    );
}

#[tokio::test]
async fn methods_are_called_and_answered() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let body = json!({
        "methodName": "a b?c", "payload": {"x": 1}, "responseTimeoutInSeconds": 5,
        "connectTimeoutInSeconds": 20,
    });
    let calling = bed.service("POST", "/twins/leaf1/methods", body.clone());
    let answering = async {
        let (mut sender, mut receiver) = client.pair("leaf1", "methods").await;
        let request = next(&mut receiver).await;
        let name = SimpleValue::String("a b?c".to_owned());
        assert_eq!(request.application["IoThub-methodname"], name);
        assert_eq!(request.json(), json!({"x": 1}));
        let id = request.properties.correlation_id.unwrap();
        assert!(matches!(id, MessageId::Uuid(_)), "{id:?}");
        let answer = |status: Option<SimpleValue>| {
            let status = status.map(|status| ("IoThub-status".to_owned(), status));
            let properties = Properties::builder().correlation_id(id.clone()).build();
            Message::builder()
                .properties(properties)
                .application_properties(ApplicationProperties(
                    status.into_iter().collect::<OrderedMap<_, _>>(),
                ))
                .body(data_body([b"{\"ok\":true}".to_vec()]))
                .build()
        };
        let argument = "com.microsoft:argument-error";
        assert_eq!(send(&mut sender, answer(None)).await.unwrap_err(), argument);
        let status = SimpleValue::Int(207);
        assert_eq!(send(&mut sender, answer(Some(status))).await, Ok(()));
        (sender, receiver)
    };
    let (answer, links) = tokio::join!(calling, answering);
    assert_eq!(
        answer.json(),
        json!({"status": 207, "payload": {"ok": true}})
    );
    // Without its link of requests it is not online for methods.
    links.1.close().await.unwrap();
    let mut short = body;
    short["connectTimeoutInSeconds"] = json!(0);
    let answer = bed.service("POST", "/twins/leaf1/methods", short).await;
    assert_eq!(answer.status, 404);
}

/// The id as C# and Node write it.
#[tokio::test]
async fn a_method_is_answered_with_a_text_for_an_id() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let (mut sender, mut receiver) = client.pair("leaf1", "methods").await;
    let calling = bed.served("POST", "/twins/leaf1/methods", json!({"methodName": "m"}));
    let answering = async {
        let id = next(&mut receiver).await.properties.correlation_id.unwrap();
        let MessageId::Uuid(id) = id else {
            panic!("{id:?}");
        };
        let id: String = id
            .as_inner()
            .iter()
            .map(|byte| format!("{byte:02X}"))
            .collect();
        let id = [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-");
        let properties = Properties::builder().correlation_id(MessageId::String(id));
        let status = [("IoThub-status".to_owned(), SimpleValue::Int(200))];
        let message = Message::builder()
            .properties(properties.build())
            .application_properties(ApplicationProperties(status.into_iter().collect()))
            .body(data_body([vec![]]))
            .build();
        assert_eq!(send(&mut sender, message).await, Ok(()));
    };
    let (answer, ()) = tokio::join!(calling, answering);
    assert_eq!(answer, json!({"status": 200, "payload": null}));
}

/// A device with its C2D link.
async fn leaf1(bed: &Bed, credit: CreditMode) -> (Amqp, Receiver) {
    let mut client = Amqp::of(bed, "leaf1").await;
    let address = "/devices/leaf1/messages/deviceBound";
    let receiver = client.receiver_with(address, &[], credit).await.unwrap();
    (client, receiver)
}

async fn outcome(bed: &Bed, sequence: u64) -> Json {
    let path = format!("/c2d/leaf1/wait?sequence={sequence}");
    let settled = bed.control("GET", &path, Json::Null).await;
    json!([settled["outcome"], settled["delivery_count"]])
}

fn delivery_count(got: &Got) -> u8 {
    match got.annotations["iothub-deliverycount"] {
        Value::Ubyte(count) => count,
        ref other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_c2d_message_has_all_properties_and_a_lock() {
    let bed = Bed::strict().await;
    let (_client, mut receiver) = leaf1(&bed, CreditMode::Auto(10)).await;
    let message = json!({
        "body": "hello", "message_id": "m1", "correlation_id": "c1", "user_id": "u1",
        "content_type": "text/plain", "content_encoding": "utf-8", "ack": "full",
        "ttl_ms": 600_000, "properties": {"a": "1"},
    });
    bed.control("POST", "/c2d/leaf1", message).await;
    let got = next(&mut receiver).await;
    assert_eq!(got.text(), "hello");
    let properties = &got.properties;
    assert_eq!(
        properties.message_id,
        Some(MessageId::String("m1".to_owned()))
    );
    assert_eq!(
        properties.correlation_id,
        Some(MessageId::String("c1".to_owned()))
    );
    assert_eq!(properties.user_id.as_ref().unwrap().as_slice(), b"u1");
    assert_eq!(
        properties.to.as_deref(),
        Some("/devices/leaf1/messages/devicebound")
    );
    assert_eq!(
        properties.content_type.as_ref().unwrap().as_str(),
        "text/plain"
    );
    assert_eq!(
        properties.content_encoding.as_ref().unwrap().as_str(),
        "utf-8"
    );
    assert!(properties.absolute_expiry_time.is_some());
    let text = |text: &str| SimpleValue::String(text.to_owned());
    assert_eq!(got.application["iothub-ack"], text("full"));
    assert_eq!(got.application["a"], text("1"));
    assert_eq!(got.annotations["x-opt-sequence-number"], Value::Ulong(1));
    assert!(matches!(
        got.annotations["iothub-enqueuedtime"],
        Value::Timestamp(_)
    ));
    assert_eq!(delivery_count(&got), 0);
    // The tag is the lock token as .NET writes it.
    let Value::String(token) = &got.annotations["x-opt-lock-token"] else {
        panic!("{got:?}");
    };
    let tag = got.tag();
    assert_eq!(tag.len(), 16);
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let reversed =
        |from: usize, to: usize| -> Vec<u8> { tag[from..to].iter().rev().copied().collect() };
    let wanted = [
        hex(&reversed(0, 4)),
        hex(&reversed(4, 6)),
        hex(&reversed(6, 8)),
        hex(&tag[8..10]),
        hex(&tag[10..]),
    ];
    assert_eq!(token, &wanted.join("-"));
    receiver.accept(got.info.clone()).await.unwrap();
    assert_eq!(outcome(&bed, 1).await, json!(["completed", 1]));
}

/// What each outcome does: completed, rejected, and enqueued again with a count.
#[tokio::test]
async fn a_c2d_message_is_settled_in_every_way() {
    let bed = Bed::strict().await;
    let (_client, mut receiver) = leaf1(&bed, CreditMode::Auto(10)).await;
    let push = async || bed.control("POST", "/c2d/leaf1", json!({})).await;
    push().await;
    let got = next(&mut receiver).await;
    receiver.reject(got.info.clone(), None).await.unwrap();
    assert_eq!(outcome(&bed, 1).await, json!(["rejected", 1]));
    push().await;
    let got = next(&mut receiver).await;
    receiver.release(got.info.clone()).await.unwrap();
    let again = next(&mut receiver).await;
    assert_eq!((delivery_count(&got), delivery_count(&again)), (0, 1));
    assert_ne!(got.tag(), again.tag());
    let modified = Modified {
        delivery_failed: Some(true),
        undeliverable_here: None,
        message_annotations: None,
    };
    receiver.modify(again.info.clone(), modified).await.unwrap();
    let again = next(&mut receiver).await;
    assert_eq!(delivery_count(&again), 2);
    receiver.accept(again.info.clone()).await.unwrap();
    assert_eq!(outcome(&bed, 2).await, json!(["completed", 3]));
    // Ten deliveries are the most.
    push().await;
    for count in 0..10 {
        let got = next(&mut receiver).await;
        assert_eq!(delivery_count(&got), count);
        receiver.release(got.info.clone()).await.unwrap();
    }
    assert_eq!(outcome(&bed, 3).await, json!(["dead_lettered", 10]));
}

/// C# settles second and waits for the hub: the hub answers whatever the outcome is.
#[tokio::test]
async fn a_receiver_that_settles_second_is_answered() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let attaching = Receiver::builder()
        .name("TelemetryReceiverLink")
        .source("/devices/leaf1/messages/deviceBound")
        .target("reply")
        .receiver_settle_mode(ReceiverSettleMode::Second)
        .attach(&mut client.session);
    let mut receiver = timeout(PATIENCE, attaching).await.unwrap().unwrap();
    bed.control("POST", "/c2d/leaf1", json!({})).await;
    let got = next(&mut receiver).await;
    receiver.release(got.info.clone()).await.unwrap();
    let again = next(&mut receiver).await;
    assert_eq!(delivery_count(&again), 1);
    receiver.accept(again.info.clone()).await.unwrap();
    assert_eq!(outcome(&bed, 1).await, json!(["completed", 2]));
}

/// Messages go out with the credit that there is, in order.
#[tokio::test]
async fn c2d_messages_wait_for_credit() {
    let bed = Bed::strict().await;
    let (_client, mut receiver) = leaf1(&bed, CreditMode::Manual).await;
    for number in 1..=3 {
        let body = json!({"message_id": number.to_string()});
        bed.control("POST", "/c2d/leaf1", body).await;
    }
    let states = async || -> Vec<Json> {
        let overview = bed.control("GET", "/c2d/leaf1", Json::Null).await;
        let queue = overview["queue"].as_array().unwrap().iter();
        queue.map(|message| message["state"].clone()).collect()
    };
    assert_eq!(states().await, ["enqueued"; 3]);
    receiver.set_credit(1).await.unwrap();
    let got = next(&mut receiver).await;
    assert_eq!(
        got.properties.message_id,
        Some(MessageId::String("1".to_owned()))
    );
    assert_eq!(states().await, ["invisible", "enqueued", "enqueued"]);
    receiver.set_credit(5).await.unwrap();
    for id in ["2", "3"] {
        let got = next(&mut receiver).await;
        assert_eq!(
            got.properties.message_id,
            Some(MessageId::String(id.to_owned()))
        );
    }
}

/// A lock stays when its connection ends; after a minute the message comes again, without a
/// count. What the old holder of a lost lock says does not matter.
#[tokio::test]
async fn a_lock_outlives_its_connection_and_runs_out() {
    let bed = Bed::strict().await;
    let (first, mut receiver) = leaf1(&bed, CreditMode::Auto(10)).await;
    bed.control("POST", "/c2d/leaf1", json!({})).await;
    next(&mut receiver).await;
    let (_second, mut receiver) = leaf1(&bed, CreditMode::Auto(10)).await;
    drop(first);
    bed.control("POST", "/c2d/leaf1", json!({})).await;
    let second = next(&mut receiver).await;
    assert_eq!(second.annotations["x-opt-sequence-number"], Value::Ulong(2));
    receiver.accept(second.info.clone()).await.unwrap();
    outcome(&bed, 2).await;
    bed.clock(61).await;
    let again = next(&mut receiver).await;
    assert_eq!(again.annotations["x-opt-sequence-number"], Value::Ulong(1));
    assert_eq!(delivery_count(&again), 0);
    bed.clock(122).await;
    let third = next(&mut receiver).await;
    receiver.accept(again.info.clone()).await.unwrap();
    receiver.accept(third.info.clone()).await.unwrap();
    assert_eq!(outcome(&bed, 1).await, json!(["completed", 1]));
}

/// The queue is one, whatever protocol the device speaks.
#[tokio::test]
async fn a_c2d_message_changes_the_protocol() {
    let bed = Bed::strict().await;
    let filter = "devices/leaf1/messages/devicebound/#";
    let mut mqtt = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    mqtt.subscribe(&[filter], mqttbytes::QoS::AtLeastOnce).await;
    bed.control("POST", "/c2d/leaf1", json!({"body": "x"}))
        .await;
    mqtt.delivery().await;
    let (mut client, mut receiver) = leaf1(&bed, CreditMode::Auto(10)).await;
    assert_eq!(mqtt.next().await, None);
    let got = next(&mut receiver).await;
    assert_eq!((delivery_count(&got), got.text().as_str()), (1, "x"));
    receiver.release(got.info.clone()).await.unwrap();
    next(&mut receiver).await;
    // The lock of AMQP stands, the next message does not wait for it.
    bed.control("POST", "/c2d/leaf1", json!({"body": "y"}))
        .await;
    let second = next(&mut receiver).await;
    receiver.accept(second.info.clone()).await.unwrap();
    outcome(&bed, 2).await;
    let mut mqtt = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    assert!(mqtt.session_present, "the session waited");
    assert_eq!(ended(&mut receiver).await, "amqp:link:stolen");
    bed.clock(61).await;
    assert_eq!(mqtt.delivery().await.payload, b"x"[..]);
    assert!(client.receiver("/devices/leaf1/twin", &[]).await.is_err());
    client.admit("lone", &Token::of("lone")).await;
}
