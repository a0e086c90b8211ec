//! Telemetry, twins, methods and deliveries through whole connections in memory, with all services
//! behind them and the upstream away (spec/amqp.md 4, 10.5, 10.6).

use edgehub_amqp::message::MessageWriter;
use edgehub_proto::hub::{CloudToDevice, CloudToDeviceOutcome, Downstream, MethodCall};
use edgehub_proto::message::{MAX_MESSAGE_BYTES, Message as Stored, SystemProperty};
use fe2o3_amqp::Sendable;
use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::types::messaging::{
    Body, Data, Message, MessageAnnotations, MessageId, Properties,
};
use fe2o3_amqp::types::primitives::{SimpleValue, Symbol, Value};
use tokio::sync::oneshot;

use super::limits::TWIN_IDS_MAX;
use super::test_head::{Head, Whole, address, body, data, next, send, texts};
use crate::hub::OUTBOX_EVENTS_MAX;
use crate::test_support::id;

fn annotations(pairs: &[(&str, Value)]) -> MessageAnnotations {
    let mut builder = MessageAnnotations::builder();
    for (key, value) in pairs {
        builder = builder.insert(Symbol::from(*key), value.clone());
    }
    builder.build()
}

fn annotation(message: &Whole, key: &str) -> Option<Value> {
    let annotations = message.message_annotations.as_ref()?;
    let mut all = annotations.0.iter();
    all.find(|(name, _)| format!("{name:?}").contains(key))
        .map(|(_, value)| value.clone())
}

// Telemetry

fn batch(bodies: &[Vec<u8>]) -> Sendable<Body<Value>> {
    let encoded = |body: &Vec<u8>| {
        let mut writer = MessageWriter::new();
        writer.data(body);
        Data(writer.finish().to_vec().into())
    };
    let body = Body::Data(bodies.iter().map(encoded).collect());
    Sendable::builder()
        .message(Message::builder().body(body).build())
        .message_format(0x8001_3700)
        .build()
}

#[tokio::test]
async fn telemetry_is_accepted_once_it_is_stored_under_the_identity_of_its_link() {
    let head = Head::new();
    let mut client = head.client(&["leaf0"]).await;
    let mut link = client.telemetry("leaf0").await.unwrap();
    let properties = Properties::builder()
        .message_id(7_u64)
        .content_type("application/json")
        .build();
    let application = [
        ("a", "b"),
        ("iothub-connection-device-id", "leaf1"),
        ("iothub-creation-time-utc", "2026-01-01T00:00:00.0000000Z"),
    ];
    let message: Whole = Message::builder()
        .properties(properties)
        .application_properties(texts(&application))
        .body(Body::Data(
            [Data(b"{}".to_vec().into())].into_iter().collect(),
        ))
        .build();
    assert_eq!(send(&mut link, message).await, Ok(()));
    let stored = head.stored().await;
    let [(sender, message)] = &stored[..] else {
        panic!("{stored:?}")
    };
    assert_eq!((sender.as_str(), &message.body[..]), ("leaf0", &b"{}"[..]));
    let system = |property| message.system.get(property);
    assert_eq!(system(SystemProperty::MessageId), Some("7"));
    assert_eq!(
        system(SystemProperty::ContentType),
        Some("application/json")
    );
    assert!(system(SystemProperty::CreationTime).is_some());
    assert_eq!(message.properties.len(), 2, "{:?}", message.properties);
}

#[tokio::test]
async fn a_batch_is_stored_as_its_messages_or_not_at_all() {
    let head = Head::new();
    let mut client = head.client(&["leaf0"]).await;
    let mut link = client.telemetry("leaf0").await.unwrap();
    // Far more than 600 KiB, which the reference refuses (spec/amqp.md 11).
    let large: Vec<Vec<u8>> = (0..4).map(|n| vec![n; 250_000]).collect();
    assert_eq!(send(&mut link, batch(&large)).await, Ok(()));
    let small: Vec<Vec<u8>> = (0..10_000_u32).map(|n| n.to_be_bytes().to_vec()).collect();
    assert_eq!(send(&mut link, batch(&small)).await, Ok(()));
    let stored = head.stored().await;
    assert_eq!(stored.len(), 10_004);
    assert_eq!(stored[3].1.body, large[3]);
    assert!(stored[4..].iter().zip(&small).all(|(m, s)| m.1.body == *s));

    let bad = [vec![1], vec![0; MAX_MESSAGE_BYTES + 1]];
    assert_eq!(
        send(&mut link, batch(&bad)).await,
        Err("amqp:link:message-size-exceeded".to_owned())
    );
    assert_eq!(send(&mut link, batch(&[vec![1]])).await, Ok(()));
    assert_eq!(head.stored().await.len(), 10_005);
}

#[tokio::test]
async fn what_cannot_be_taken_is_rejected_and_the_link_goes_on() {
    let head = Head::new();
    let mut client = head.client(&["leaf0"]).await;
    let mut link = client.telemetry("leaf0").await.unwrap();
    let most = vec![7; MAX_MESSAGE_BYTES];
    assert_eq!(send(&mut link, data(&most)).await, Ok(()));
    let more = vec![7; MAX_MESSAGE_BYTES + 1];
    assert_eq!(
        send(&mut link, data(&more)).await,
        Err("amqp:link:message-size-exceeded".to_owned())
    );
    let list: Whole = Message::builder()
        .body(Body::Value(fe2o3_amqp::types::messaging::AmqpValue(
            Value::Int(1),
        )))
        .build();
    assert_eq!(
        send(&mut link, list).await,
        Err("amqp:not-allowed".to_owned())
    );
    assert_eq!(send(&mut link, data(b"")).await, Ok(()));
    let stored = head.stored().await;
    let sizes: Vec<usize> = stored.iter().map(|(_, m)| m.body.len()).collect();
    assert_eq!(sizes, [MAX_MESSAGE_BYTES, 0]);
}

// Twins

fn twin_request(operation: &str, id: Option<&str>, body: &[u8]) -> Whole {
    let annotations = annotations(&[
        ("operation", Value::String(operation.to_owned())),
        ("resource", Value::String("/properties/reported".to_owned())),
    ]);
    let mut message = data(body);
    message.message_annotations = Some(annotations);
    message.properties = id.map(|id| Properties::builder().correlation_id(id.to_owned()).build());
    message
}

#[tokio::test]
async fn twin_requests_are_answered_with_their_ids_and_errors_have_a_body() {
    let head = Head::serving(&[]);
    let mut client = head.client(&["leaf0"]).await;
    let (mut requests, mut responses) = client.pair("leaf0", "twin", "twin:1").await;
    for (request, id, status) in [
        (twin_request("PUT", Some("Put1"), b" "), "Put1", 200),
        // Nobody is told.
        (twin_request("PATCH", None, b"{\"b\":2}"), "", 0),
        (twin_request("GET", None, b" "), "", 0),
        (twin_request("X", Some("no"), b" "), "", 0),
        (
            twin_request("PATCH", Some("Patch1"), b"{\"fw\":1}"),
            "Patch1",
            204,
        ),
        (twin_request("GET", Some("Get1"), b" "), "Get1", 200),
        (twin_request("PATCH", Some("Patch2"), b"[1]"), "Patch2", 400),
    ] {
        assert_eq!(send(&mut requests, request).await, Ok(()));
        if status == 0 {
            continue;
        }
        let (delivery, response) = next(&mut responses).await;
        responses.accept(&delivery).await.unwrap();
        let correlation = response.properties.as_ref().unwrap().correlation_id.clone();
        assert_eq!(correlation, Some(MessageId::String(id.to_owned())));
        assert_eq!(annotation(&response, "status"), Some(Value::Int(status)));
        match status {
            204 => assert!(body(&response).is_empty()),
            400 => assert!(serde_json::from_slice::<serde_json::Value>(&body(&response)).is_ok()),
            _ if id == "Get1" => {
                let twin: serde_json::Value = serde_json::from_slice(&body(&response)).unwrap();
                assert_eq!(twin["reported"]["fw"], 1);
                assert_eq!(twin["reported"]["b"], 2);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_client_that_takes_no_answers_for_a_while_is_answered_afterwards() {
    let head = Head::serving(&[]);
    let mut client = head.client(&["leaf0"]).await;
    let twin = address("leaf0", "twin");
    let mut requests = client.sender(&twin, &[]).await.unwrap();
    let mut responses = client
        .receiver_with(&twin, &[], CreditMode::Manual)
        .await
        .unwrap();
    // More than there is room for: some answers are lost.
    for n in 0..OUTBOX_EVENTS_MAX + 2 * TWIN_IDS_MAX {
        let request = twin_request("GET", Some(&n.to_string()), b" ");
        assert_eq!(send(&mut requests, request).await, Ok(()));
    }
    responses.set_credit(10_000).await.unwrap();
    let request = twin_request("GET", Some("last"), b" ");
    assert_eq!(send(&mut requests, request).await, Ok(()));
    loop {
        let (_, response) = next(&mut responses).await;
        let correlation = response.properties.as_ref().unwrap().correlation_id.clone();
        if correlation == Some(MessageId::String("last".to_owned())) {
            assert_eq!(annotation(&response, "status"), Some(Value::Int(200)));
            return;
        }
    }
}

// Methods

#[tokio::test]
async fn a_method_is_called_with_a_uuid_and_its_answer_reaches_the_caller() {
    let head = Head::serving(&[]);
    let mut client = head.client(&["leaf0"]).await;
    let (mut responses, mut requests) = client
        .pair("leaf0", "methods/devicebound", "methods:1")
        .await;
    for as_text in [false, true] {
        let (reply, answer) = oneshot::channel();
        let call = MethodCall {
            name: "reboot".to_owned(),
            payload: "{\"delay\":3}".into(),
            reply,
        };
        head.below.method(&id("leaf0"), call);
        let (_, request) = next(&mut requests).await;
        let Some(MessageId::Uuid(uuid)) =
            request.properties.as_ref().unwrap().correlation_id.clone()
        else {
            panic!("{request:?}")
        };
        let application = request.application_properties.as_ref().unwrap();
        assert_eq!(
            application.0.get("IoThub-methodname"),
            Some(&SimpleValue::String("reboot".to_owned()))
        );
        assert_eq!(body(&request), b"{\"delay\":3}");
        let correlation = if as_text {
            let number = u128::from_be_bytes(*uuid.as_inner());
            let digits = format!("{number:032X}");
            let text = format!(
                "{}-{}-{}-{}-{}",
                &digits[..8],
                &digits[8..12],
                &digits[12..16],
                &digits[16..20],
                &digits[20..]
            );
            MessageId::String(text)
        } else {
            MessageId::Uuid(uuid)
        };
        let mut response = data(b"{\"ok\":true}");
        response.properties = Some(Properties::builder().correlation_id(correlation).build());
        let mut application = texts(&[]);
        let status = SimpleValue::Int(201);
        application.0.insert("IoThub-status".to_owned(), status);
        response.application_properties = Some(application);
        assert_eq!(send(&mut responses, response).await, Ok(()));
        let answer = answer.await.unwrap();
        assert_eq!(
            (answer.status, &answer.payload[..]),
            (201, &b"{\"ok\":true}"[..])
        );
    }
}

// Deliveries

/// A leaf sends messages with these bodies.
async fn feed(head: &Head, bodies: &[&str]) {
    let mut leaf = head.client(&["leaf0"]).await;
    let mut link = leaf.telemetry("leaf0").await.unwrap();
    for body in bodies {
        assert_eq!(send(&mut link, data(body.as_bytes())).await, Ok(()));
    }
    leaf.close().await;
}

#[tokio::test]
async fn inputs_are_settled_by_what_the_module_says() {
    let head = Head::serving(&["in1"]);
    let mut client = head.client(&["edge1/modA"]).await;
    let events = address("edge1/modA", "messages/events");
    let mut inputs = client.receiver(&events, &[]).await.unwrap();
    feed(&head, &["one", "two", "three"]).await;
    let (one, message) = next(&mut inputs).await;
    assert_eq!(one.delivery_tag().len(), 16, "C# takes it for a GUID");
    assert_eq!(body(&message), b"one");
    let text = |text: &str| Some(Value::String(text.to_owned()));
    assert_eq!(annotation(&message, "x-opt-input-name"), text("in1"));
    assert_eq!(annotation(&message, "connection-device-id"), text("leaf0"));
    let Some(Value::String(lock)) = annotation(&message, "x-opt-lock-token") else {
        panic!("{message:?}")
    };
    assert_eq!(lock.len(), 36);
    let (two, _) = next(&mut inputs).await;
    let (three, _) = next(&mut inputs).await;
    inputs.accept(&one).await.unwrap();
    inputs.reject(&two, None).await.unwrap();
    head.queued(1).await;
    inputs.release(&three).await.unwrap();
    let (again, message) = next(&mut inputs).await;
    assert_eq!(body(&message), b"three");
    inputs.accept(&again).await.unwrap();
    head.queued(0).await;
}

#[tokio::test]
async fn what_is_unsettled_on_a_link_comes_again_on_the_next_one() {
    let head = Head::serving(&["in1"]);
    let mut client = head.client(&["edge1/modA"]).await;
    // One more link, so that the identity stays.
    let _telemetry = client.telemetry("edge1/modA").await.unwrap();
    let events = address("edge1/modA", "messages/events");
    let mut inputs = client.receiver(&events, &[]).await.unwrap();
    feed(&head, &["one", "two", "three"]).await;
    for wanted in ["one", "two", "three"] {
        let (_, message) = next(&mut inputs).await;
        assert_eq!(body(&message), wanted.as_bytes());
    }
    // The newer link takes the older one's place, which ends with what is unsettled on it.
    let mut newer = client.receiver(&events, &[]).await.unwrap();
    for wanted in ["one", "two", "three"] {
        let (_, message) = next(&mut newer).await;
        assert_eq!(body(&message), wanted.as_bytes());
    }
    newer.close().await.unwrap();
    let mut last = client.receiver(&events, &[]).await.unwrap();
    for wanted in ["one", "two", "three"] {
        let (delivery, message) = next(&mut last).await;
        assert_eq!(body(&message), wanted.as_bytes());
        last.accept(&delivery).await.unwrap();
    }
    head.queued(0).await;
}

#[tokio::test]
async fn cloud_to_device_messages_end_as_the_device_says() {
    let head = Head::serving(&[]);
    let mut client = head.client(&["leaf0"]).await;
    let bound = address("leaf0", "messages/devicebound");
    let mut link = client.receiver(&bound, &[]).await.unwrap();
    for outcome in [
        CloudToDeviceOutcome::Completed,
        CloudToDeviceOutcome::Abandoned,
        CloudToDeviceOutcome::Rejected,
    ] {
        let mut message = Stored {
            body: "hi".into(),
            ..Stored::default()
        };
        message.system.set(SystemProperty::MessageId, "m1");
        message.system.set(SystemProperty::SequenceNumber, "9");
        let (settle, settled) = oneshot::channel();
        let message = CloudToDevice {
            message,
            redelivered: false,
            settle,
        };
        head.below.cloud_to_device(&id("leaf0"), message);
        let (delivery, message) = next(&mut link).await;
        assert_eq!(delivery.delivery_tag().len(), 16);
        let properties = message.properties.as_ref().unwrap();
        assert_eq!(
            properties.message_id,
            Some(MessageId::String("m1".to_owned()))
        );
        assert_eq!(properties.to.as_deref(), Some("/devices/leaf0"));
        match outcome {
            CloudToDeviceOutcome::Completed => link.accept(&delivery).await.unwrap(),
            CloudToDeviceOutcome::Abandoned => link.release(&delivery).await.unwrap(),
            CloudToDeviceOutcome::Rejected => link.reject(&delivery, None).await.unwrap(),
        }
        assert_eq!(settled.await, Ok(outcome));
    }
}
