//! A killed emulator keeps what it answered over AMQP.

use fe2o3_amqp::types::messaging::{Message, MessageId, Properties};
use fe2o3_amqp::types::primitives::Value;
use serde_json::{Value as Json, json};

use crate::common::Files;
use crate::common::amqp::{Amqp, annotations, data, data_body, next, send};
use crate::common::process::Process;
use crate::common::token::Token;

async fn client(files: &Files, process: &Process, identity: &str) -> Amqp {
    let mut client = Amqp::open_at(files, process.address("amqp")).await;
    client.admit(identity, &Token::of(identity)).await;
    client
}

#[tokio::test]
async fn sigkill_keeps_ledger_twin_messages_and_feedback() {
    let files = Files::new();
    let mut process = Process::start(&files);
    let mut leaf1 = client(&files, &process, "leaf1").await;
    let mut sender = leaf1.telemetry("leaf1").await;
    for number in 0..100_u8 {
        assert_eq!(send(&mut sender, data(&[number])).await, Ok(()));
    }
    let (mut requests, mut answers) = leaf1.pair("leaf1", "twin").await;
    let patch = Message::builder()
        .message_annotations(annotations([
            ("operation", Value::String("PATCH".to_owned())),
            ("resource", Value::String("/properties/reported".to_owned())),
        ]))
        .properties(
            Properties::builder()
                .correlation_id(MessageId::String("p".to_owned()))
                .build(),
        )
        .body(data_body([b"{\"fw\":3}".to_vec()]))
        .build();
    assert_eq!(send(&mut requests, patch).await, Ok(()));
    next(&mut answers).await;
    for id in ["settled", "locked", "waits"] {
        let body = json!({"message_id": id, "ack": "full"});
        process.control("POST", "/c2d/leaf1", body).await;
    }
    let address = "/devices/leaf1/messages/devicebound";
    let mut c2d = leaf1.receiver(address, &[]).await.unwrap();
    let settled = next(&mut c2d).await;
    c2d.accept(settled.info.clone()).await.unwrap();
    next(&mut c2d).await;
    next(&mut c2d).await;
    let path = "/c2d/leaf1/wait?sequence=1";
    process.control("GET", path, Json::Null).await;
    process.kill();

    let process = Process::start(&files);
    assert_eq!(process.ledger().await.len(), 100);
    let twin = process
        .served(&files, "GET", "/twins/leaf1", Json::Null)
        .await;
    assert_eq!(twin["properties"]["reported"]["fw"], 3);
    let mut leaf1 = client(&files, &process, "leaf1").await;
    let mut c2d = leaf1.receiver(address, &[]).await.unwrap();
    for id in ["locked", "waits"] {
        let got = next(&mut c2d).await;
        let message_id = got.properties.message_id.clone();
        assert_eq!(message_id, Some(MessageId::String(id.to_owned())));
        c2d.accept(got.info.clone()).await.unwrap();
    }
    let mut service = Amqp::open_at(&files, process.address("amqp")).await;
    service.put("x", &Token::of_policy("service").text()).await;
    let address = "/messages/serviceBound/feedback";
    let mut feedback = service.receiver(address, &[]).await.unwrap();
    let mut ids = Vec::new();
    while ids.len() < 3 {
        let got = next(&mut feedback).await;
        let records = got.json();
        let records = records.as_array().unwrap().iter();
        ids.extend(records.map(|record| record["originalMessageId"].clone()));
        feedback.accept(got.info.clone()).await.unwrap();
    }
    assert_eq!(ids, ["settled", "locked", "waits"]);
    let reader = "hub-events/ConsumerGroups/$Default/Partitions/0";
    let mut events = service.receiver(reader, &[]).await.unwrap();
    for number in 0..100_u8 {
        assert_eq!(next(&mut events).await.body, [number]);
    }
}
