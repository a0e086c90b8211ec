//! Telemetry over AMQP: single messages and batches, what is rejected, and whose connection it is.

use fe2o3_amqp::Sender;
use fe2o3_amqp::types::messaging::{
    AmqpValue, ApplicationProperties, Body, Message, MessageId, Properties,
};
use fe2o3_amqp::types::primitives::{SimpleValue, Timestamp, Value};
use serde_json::{Value as Json, json};
use tokio::time::timeout;

use crate::common::amqp::{Amqp, annotations, batch, data, data_body, detached, send, texts};
use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;
use crate::common::{Bed, PATIENCE};

const ADDRESS: &str = "/devices/leaf1/messages/events";

async fn leaf1(bed: &Bed) -> (Amqp, Sender) {
    let mut client = Amqp::of(bed, "leaf1").await;
    let sender = client.telemetry("leaf1").await;
    (client, sender)
}

async fn detach(sender: &mut Sender) -> String {
    detached(timeout(PATIENCE, sender.on_detach()).await.unwrap())
}

/// Every property arrives in the ledger under the name that IoT Hub gives it.
#[tokio::test]
async fn a_message_is_in_the_ledger_with_all_properties() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let model = [("com.microsoft:model-id", "dtmi:a;1")];
    let mut sender = client.sender(ADDRESS, &model).await.unwrap();
    let properties = Properties::builder()
        .message_id(MessageId::Uuid([0xab; 16].into()))
        .correlation_id(MessageId::Ulong(7))
        .user_id(b"user".to_vec())
        .to(ADDRESS)
        .content_type("application/json")
        .content_encoding("utf-8")
        .absolute_expiry_time(Timestamp::from_milliseconds(1_767_225_600_000))
        .build();
    let application = ApplicationProperties(
        [
            ("temp", SimpleValue::String("21".to_owned())),
            ("int", SimpleValue::Int(-3)),
            ("flag", SimpleValue::Bool(true)),
            ("null", SimpleValue::Null),
            ("iothub-ack", SimpleValue::String("full".to_owned())),
            ("iothub-outputname", SimpleValue::String("out".to_owned())),
            (
                "iothub-creation-time-utc",
                SimpleValue::String("2026-01-01T00:00:00Z".to_owned()),
            ),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect(),
    );
    let message = Message::builder()
        .message_annotations(annotations([
            ("dt-subject", Value::String("part".to_owned())),
            ("x-opt-other", Value::Int(1)),
        ]))
        .properties(properties)
        .application_properties(application)
        .body(data_body([b"{\"a\"".to_vec(), b":1}".to_vec()]))
        .build();
    assert_eq!(send(&mut sender, message).await, Ok(()));
    let line = bed.ledger().await.remove(0);
    let system = line["system"].as_object().unwrap();
    for (name, value) in [
        ("message-id", "abababab-abab-abab-abab-abababababab"),
        ("correlation-id", "7"),
        ("user-id", "user"),
        ("to", ADDRESS),
        ("content-type", "application/json"),
        ("content-encoding", "utf-8"),
        ("absolute-expiry-time", "2026-01-01T00:00:00.000Z"),
        ("dt-subject", "part"),
        ("dt-dataschema", "dtmi:a;1"),
        ("iothub-outputname", "out"),
        ("iothub-creation-time-utc", "2026-01-01T00:00:00Z"),
        ("iothub-connection-device-id", "leaf1"),
    ] {
        assert_eq!(system[name], value, "{name}");
    }
    let wanted = json!({
        "temp": "21", "int": "-3", "flag": "true", "null": null, "iothub-ack": "full",
    });
    assert_eq!(line["properties"], wanted);
    assert_eq!(line["body_base64"], "eyJhIjoxfQ==");
    // A text for a body, and none, which this crate writes as null.
    let text = Message::builder().body(Body::Value(AmqpValue(Value::String("hi".to_owned()))));
    assert_eq!(send(&mut sender, text.build()).await, Ok(()));
    let none: Message<Body<Value>> = Message::builder().body(Body::Empty).build();
    assert_eq!(send(&mut sender, none).await, Ok(()));
    let bodies: Vec<_> = bed.ledger().await;
    let bodies: Vec<_> = bodies
        .iter()
        .map(|line| line["body_base64"].clone())
        .collect();
    assert_eq!(bodies[1..], ["aGk=", ""]);
}

#[tokio::test]
async fn a_batch_is_stored_as_a_whole() {
    let bed = Bed::strict().await;
    let (_client, mut sender) = leaf1(&bed).await;
    let message = |number: usize| {
        Message::builder()
            .application_properties(texts(&[("n", &number.to_string())]))
            .body(data_body([vec![b'x'; 2_000]]))
            .build()
    };
    assert_eq!(send(&mut sender, batch([message(0)])).await, Ok(()));
    assert_eq!(
        send(&mut sender, batch((1..400).map(message))).await,
        Ok(())
    );
    let ledger = bed.ledger().await;
    let numbers: Vec<_> = ledger
        .iter()
        .map(|line| line["properties"]["n"].clone())
        .collect();
    let wanted: Vec<_> = (0..400)
        .map(|number: usize| json!(number.to_string()))
        .collect();
    assert_eq!(numbers, wanted);
    let counters = bed
        .control("GET", "/counters?client_id=leaf1", Json::Null)
        .await;
    assert_eq!(
        (&counters["amqp_transfers"], &counters["telemetry"]),
        (&json!(2), &json!(400))
    );
}

/// One bad message rejects its batch; nothing of it is stored, and the link goes on.
#[tokio::test]
async fn poison_is_rejected_with_its_batch() {
    let bed = Bed::strict().await;
    let (_client, mut sender) = leaf1(&bed).await;
    let large = || data(&vec![0; 256 * 1024 + 1]);
    let size = Err("amqp:link:message-size-exceeded".to_owned());
    let argument = Err("com.microsoft:argument-error".to_owned());
    assert_eq!(send(&mut sender, large()).await, size);
    assert_eq!(
        send(&mut sender, batch([data(b"good"), large()])).await,
        size
    );
    let sequence = Message::builder()
        .sequence::<Value>(vec![Value::Int(1)])
        .build()
        .map_body(|body| Body::Sequence(vec![body].into_iter().collect()));
    assert_eq!(send(&mut sender, sequence).await, argument);
    let garbage = fe2o3_amqp::Sendable::builder()
        .message(data(b"no message"))
        .message_format(0x8001_3700)
        .build();
    assert_eq!(send(&mut sender, garbage).await, argument);
    let format = fe2o3_amqp::Sendable::builder()
        .message(data(b"x"))
        .message_format(7)
        .build();
    assert_eq!(send(&mut sender, format).await, argument);
    assert_eq!(send(&mut sender, data(b"good")).await, Ok(()));
    assert_eq!(bed.ledger().await.len(), 1);
}

/// Two identities and two links of one of them on one connection, each with its own stamps.
#[tokio::test]
async fn identities_share_a_connection() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    client.admit("edge1/modA", &Token::of("edge1/modA")).await;
    let mut senders = [
        client.telemetry("leaf1").await,
        client.telemetry("edge1/modA").await,
        client.telemetry("leaf1").await,
    ];
    for sender in &mut senders {
        assert_eq!(send(sender, data(b"x")).await, Ok(()));
    }
    let ids: Vec<_> = bed.ledger().await;
    let ids: Vec<_> = ids
        .iter()
        .map(|line| (line["device_id"].clone(), line["module_id"].clone()))
        .collect();
    let leaf1 = (json!("leaf1"), Json::Null);
    assert_eq!(ids, [leaf1.clone(), (json!("edge1"), json!("modA")), leaf1]);
    let list = bed.control("GET", "/connections", Json::Null).await;
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 3, "{list:?}");
    assert!(list[0]["client_id"].is_null() && list[0]["carrier"].is_null());
    assert!(
        list[1..]
            .iter()
            .all(|entry| entry["carrier"] == list[0]["id"])
    );
    // Killing one detaches its links; killing the last takes the socket along.
    let kill = async |path| bed.control("DELETE", path, Json::Null).await;
    let killed = kill("/connections?client_id=leaf1").await;
    assert_eq!(killed, json!({"killed": 1}));
    for index in [0, 2] {
        assert_eq!(detach(&mut senders[index]).await, "amqp:link:detach-forced");
    }
    assert_eq!(send(&mut senders[1], data(b"y")).await, Ok(()));
    let killed = kill("/connections?client_id=edge1/modA").await;
    assert_eq!(killed, json!({"killed": 2}));
    assert!(client.ends().await);
}

/// The newest connection of an identity wins, over either protocol; the other identities of the
/// older one stay.
#[tokio::test]
async fn a_newer_connection_takes_the_identity() {
    let bed = Bed::strict().await;
    let (mut first, mut old) = leaf1(&bed).await;
    first.admit("lone", &Token::of("lone")).await;
    let mut lone = first.telemetry("lone").await;
    let (_second, mut new) = leaf1(&bed).await;
    assert_eq!(detach(&mut old).await, "amqp:link:stolen");
    assert_eq!(send(&mut new, data(b"new")).await, Ok(()));
    assert_eq!(send(&mut lone, data(b"lone")).await, Ok(()));
    let mut mqtt = Client::admitted(&bed, &Hello::of("leaf1")).await;
    assert_eq!(detach(&mut new).await, "amqp:link:stolen");
    let mut third = Amqp::of(&bed, "leaf1").await;
    let mut newest = third.telemetry("leaf1").await;
    assert_eq!(mqtt.next().await, None);
    assert_eq!(send(&mut newest, data(b"newest")).await, Ok(()));
}

/// A registry change ends whom it does not admit any more, and nobody else.
#[tokio::test]
async fn registry_changes_detach_links() {
    let bed = Bed::strict().await;
    let (mut client, mut leaf1) = leaf1(&bed).await;
    client.admit("lone", &Token::of("lone")).await;
    let mut lone = client.telemetry("lone").await;
    let owner = Token::of_policy("iothubowner");
    let path = "/devices/leaf1?api-version=2021-04-12";
    let mut device = bed.https("GET", path, &owner, Json::Null).await.json();
    device["status"] = json!("disabled");
    let headers = [
        ("authorization", owner.text()),
        ("if-match", "\"*\"".to_owned()),
    ];
    bed.https_with("PUT", path, &headers, device).await;
    assert_eq!(detach(&mut leaf1).await, "amqp:unauthorized-access");
    let refused = client.sender(ADDRESS, &[]).await;
    assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access");
    assert_eq!(send(&mut lone, data(b"still here")).await, Ok(()));
    let path = "/devices/lone?api-version=2021-04-12";
    bed.https("DELETE", path, &owner, Json::Null).await;
    assert_eq!(detach(&mut lone).await, "amqp:not-found");
}

/// Every order of `transfer`, `attach` and `put_token`, for one identity.
#[tokio::test]
async fn failures_are_ordered_per_identity() {
    let bed = Bed::strict().await;
    let (mut client, mut leaf1) = leaf1(&bed).await;
    client.admit("lone", &Token::of("lone")).await;
    let mut lone = client.telemetry("lone").await;
    let order = async |fault: Json| {
        let mut fault = fault;
        fault["client_id"] = json!("leaf1");
        if fault.get("standing").is_none() {
            fault["count"] = json!(1);
        }
        bed.control("POST", "/faults", fault).await;
    };
    let transfer = |code: u16| json!({"kind": "transfer", "code": code});
    for (code, condition) in [
        (400, "com.microsoft:argument-error"),
        (401, "amqp:unauthorized-access"),
        (403, "amqp:resource-limit-exceeded"),
        (404, "amqp:not-found"),
        (413, "amqp:link:message-size-exceeded"),
        (429, "com.microsoft:device-container-throttled"),
        (500, "amqp:internal-error"),
    ] {
        order(transfer(code)).await;
        assert_eq!(send(&mut lone, data(b"x")).await, Ok(()));
        assert_eq!(send(&mut leaf1, data(b"x")).await.unwrap_err(), condition);
        assert_eq!(send(&mut leaf1, data(b"x")).await, Ok(()));
    }
    for (answer, outcome) in [("release", "released"), ("modify", "modified")] {
        let mut fault = transfer(503);
        fault["answer"] = json!(answer);
        order(fault).await;
        assert_eq!(send(&mut leaf1, data(b"x")).await.unwrap_err(), outcome);
    }
    let mut fault = transfer(429);
    fault["standing"] = json!(true);
    fault["condition"] = json!("com.microsoft:quota-exceeded");
    order(fault).await;
    for _ in 0..3 {
        let refused = send(&mut leaf1, data(b"x")).await;
        assert_eq!(refused.unwrap_err(), "com.microsoft:quota-exceeded");
    }
    bed.control("DELETE", "/faults", Json::Null).await;
    assert_eq!(bed.ledger().await.len(), 14, "what failed is not stored");
    let mut fault = transfer(503);
    fault["answer"] = json!("detach");
    order(fault).await;
    let _pending = leaf1.send_batchable(data(b"x")).await.unwrap();
    assert_eq!(detach(&mut leaf1).await, "amqp:link:detach-forced");

    order(json!({"kind": "attach", "code": 404})).await;
    let refused = client.sender(ADDRESS, &[]).await;
    assert_eq!(refused.unwrap_err(), "amqp:not-found");
    let mut leaf1 = client.sender(ADDRESS, &[]).await.unwrap();
    order(json!({"kind": "put_token", "code": 429})).await;
    let (name, token) = (
        crate::common::amqp::resource("leaf1"),
        Token::of("leaf1").text(),
    );
    assert_eq!(client.put(&name, &token).await.1, 429);
    assert_eq!(client.put(&name, &token).await.1, 200);

    let mut fault = transfer(500);
    fault["answer"] = json!("close");
    order(fault).await;
    let _pending = leaf1.send_batchable(data(b"x")).await.unwrap();
    assert!(client.ends().await);
}

/// Over a WebSocket it is the same.
#[tokio::test]
async fn a_websocket_carries_amqp() {
    let bed = Bed::strict().await;
    let stream = crate::common::amqp::tls(&bed.files, bed.emulator.https_address()).await;
    let stream = edgehub_ws::connect(stream, crate::common::HOST, edgehub_ws::AMQP).await;
    let mut client = Amqp::over(stream.unwrap(), None).await.unwrap();
    client.admit("leaf1", &Token::of("leaf1")).await;
    let mut sender = client.telemetry("leaf1").await;
    assert_eq!(send(&mut sender, data(&vec![7; 200_000])).await, Ok(()));
    let list = bed.control("GET", "/connections", Json::Null).await;
    let is_leaf1 = |entry: &&Json| entry["client_id"] == "leaf1";
    let entry = list.as_array().unwrap().iter().find(is_leaf1).unwrap();
    assert_eq!(entry["transport"], "amqp_ws");
}

/// While the port is a black hole nothing is answered; then everything goes on where it was.
#[tokio::test]
async fn a_black_hole_swallows_nothing() {
    let bed = Bed::strict().await;
    let (_client, mut sender) = leaf1(&bed).await;
    let port = async |state| {
        bed.control("PUT", "/ports/amqp", json!({"state": state}))
            .await;
    };
    port("black_hole").await;
    let sending = send(&mut sender, data(b"during"));
    let healing = async {
        // The control API answers, the hub does not.
        for _ in 0..20 {
            let count = bed.control("GET", "/ledger/count", Json::Null).await;
            assert_eq!(count["count"], 0);
        }
        port("open").await;
    };
    let (sent, ()) = tokio::join!(sending, healing);
    assert_eq!(sent, Ok(()));
    port("refused").await;
    let refused = tokio::net::TcpStream::connect(bed.amqp()).await;
    assert!(refused.is_err());
    assert_eq!(send(&mut sender, data(b"goes on")).await, Ok(()));
    let counters = bed.control("GET", "/counters", Json::Null).await;
    assert_eq!(counters["amqp_handshakes"], 1);
}
