//! The service side over AMQP: messages to devices, feedback, and the reader of events.

use fe2o3_amqp::Receiver;
use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::types::messaging::{Body, Message, MessageId, Properties, Source};
use fe2o3_amqp::types::primitives::{SimpleValue, Symbol, Timestamp, Value};
use serde_amqp::described::Described;
use serde_amqp::descriptor::Descriptor;
use serde_json::{Value as Json, json};

use crate::common::amqp::{Amqp, Got, Whole, data, data_body, next, send, texts};
use crate::common::token::Token;
use crate::common::{Bed, HOST, now_secs};

const SEND: &str = "/messages/devicebound";
const FEEDBACK: &str = "/messages/serviceBound/feedback";
const ENTITY: &str = "hub-events";

fn message(to: &str, id: &str, ack: Option<&str>) -> Whole {
    let properties = Properties::builder()
        .to(format!("/devices/{to}/messages/devicebound"))
        .message_id(MessageId::String(id.to_owned()))
        .build();
    let ack: Vec<_> = ack.map(|ack| ("iothub-ack", ack)).into_iter().collect();
    Message::builder()
        .properties(properties)
        .application_properties(texts(&ack))
        .body(data_body([id.into()]))
        .build()
}

#[tokio::test]
async fn a_message_is_enqueued_or_rejected() {
    let bed = Bed::strict().await;
    let mut service = Amqp::of_policy(&bed, "service").await;
    let mut sender = service.sender(SEND, &[]).await.unwrap();
    assert_eq!(
        send(&mut sender, message("leaf1", "m1", Some("full"))).await,
        Ok(())
    );
    let overview = bed.control("GET", "/c2d/leaf1", Json::Null).await;
    assert_eq!(overview["queue"][0]["message_id"], "m1");
    let expiring = |seconds: u64| {
        let mut message = message("leaf1", "m2", None);
        let properties = message.properties.as_mut().unwrap();
        let ms = i64::try_from((now_secs() + seconds) * 1_000).unwrap();
        properties.absolute_expiry_time = Some(Timestamp::from_milliseconds(ms));
        message
    };
    assert_eq!(send(&mut sender, expiring(100)).await, Ok(()));
    let mut large = message("leaf1", "m3", None);
    large.body = data_body([vec![0; 65 * 1024]]);
    let mut module = message("leaf1", "m4", None);
    module.properties.as_mut().unwrap().to =
        Some("/devices/leaf1/modules/m1/messages/devicebound".to_owned());
    let mut odd = message("leaf1", "m5", None);
    odd.application_properties = Some(texts(&[("$x", "1")]));
    let argument = "com.microsoft:argument-error";
    for (message, condition) in [
        (message("nobody", "m", None), "amqp:not-found"),
        (large, "amqp:link:message-size-exceeded"),
        (module, argument),
        (odd, argument),
        (message("leaf1", "m", Some("odd")), argument),
        (expiring(3 * 24 * 3_600), argument),
        (data(b"to nobody"), argument),
    ] {
        let rejected = send(&mut sender, message).await;
        assert_eq!(rejected.unwrap_err(), condition);
    }
    for number in 2..50 {
        let id = number.to_string();
        assert_eq!(send(&mut sender, message("leaf1", &id, None)).await, Ok(()));
    }
    let full = send(&mut sender, message("leaf1", "51", None)).await;
    assert_eq!(full.unwrap_err(), "amqp:resource-limit-exceeded");
    // Only a policy for it may.
    for policy in ["device", "registryReadWrite"] {
        let mut other = Amqp::of_policy(&bed, policy).await;
        let refused = other.sender(SEND, &[]).await;
        assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access");
    }
    let mut device = Amqp::of(&bed, "leaf1").await;
    assert!(device.sender(SEND, &[]).await.is_err());
    let mut none = Amqp::open(&bed).await;
    assert!(none.receiver(FEEDBACK, &[]).await.is_err());
}

/// The records of a batch as `[message id, status]`.
fn records(got: &Got) -> Vec<Json> {
    let records = got.json();
    let records = records.as_array().unwrap().iter();
    records
        .map(|record| json!([record["originalMessageId"], record["statusCode"]]))
        .collect()
}

/// Feedback comes for those who asked, stays until it is completed, and its lock runs out.
#[tokio::test]
async fn feedback_comes_for_who_asked() {
    let bed = Bed::strict().await;
    let mut service = Amqp::of_policy(&bed, "service").await;
    let mut sender = service.sender(SEND, &[]).await.unwrap();
    let mut device = Amqp::of(&bed, "leaf1").await;
    let address = "/devices/leaf1/messages/deviceBound";
    let mut receiver = device.receiver(address, &[]).await.unwrap();
    for (id, ack, completes) in [
        ("none", None, true),
        ("full", Some("full"), true),
        ("negative", Some("negative"), true),
        ("positive", Some("positive"), false),
        ("rejected", Some("negative"), false),
    ] {
        assert_eq!(send(&mut sender, message("leaf1", id, ack)).await, Ok(()));
        let got = next(&mut receiver).await;
        match completes {
            true => receiver.accept(got.info.clone()).await.unwrap(),
            false => receiver.reject(got.info.clone(), None).await.unwrap(),
        }
    }
    receiver.close().await.unwrap();
    assert_eq!(
        send(&mut sender, message("leaf1", "purged", Some("full"))).await,
        Ok(())
    );
    bed.control("GET", "/c2d/leaf1/wait?sequence=5", Json::Null)
        .await;
    bed.control("DELETE", "/c2d/leaf1", Json::Null).await;
    let wanted = [
        json!(["full", "Success"]),
        json!(["rejected", "Rejected"]),
        json!(["purged", "Purged"]),
    ];
    let mut feedback = service.receiver(FEEDBACK, &[]).await.unwrap();
    let got = next(&mut feedback).await;
    assert_eq!(records(&got), wanted);
    let record = &got.json()[0];
    assert_eq!(record["deviceId"], "leaf1");
    assert!(record["deviceGenerationId"].is_string() && record["enqueuedTimeUtc"].is_string());
    let content_type = got.properties.content_type.as_ref().unwrap().as_str();
    assert_eq!(
        content_type,
        "application/vnd.microsoft.iothub.feedback.json"
    );
    assert_eq!(
        got.properties.user_id.as_ref().unwrap().as_slice(),
        HOST.as_bytes()
    );
    feedback.release(got.info.clone()).await.unwrap();
    let again = next(&mut feedback).await;
    assert_eq!(records(&again), wanted);
    // The lock runs out, whether its connection is there or not.
    bed.clock(61).await;
    let again = next(&mut feedback).await;
    assert_eq!(records(&again), wanted);
    feedback.accept(again.info.clone()).await.unwrap();
    assert_eq!(
        send(&mut sender, message("leaf1", "late", Some("full"))).await,
        Ok(())
    );
    bed.control("DELETE", "/c2d/leaf1", Json::Null).await;
    let got = next(&mut feedback).await;
    assert_eq!(records(&got), [json!(["late", "Purged"])]);
    service
        .receiver("/messages/serviceBound/filenotifications", &[])
        .await
        .unwrap();
}

/// The token of an Event Hubs client: its resource is a URL, its key the text.
fn events_token(entity: &str) -> String {
    use base64::Engine;
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let resource = encode(&format!("sb://{HOST}/{entity}"));
    let expires_at = now_secs() + 3_600;
    let key = crate::common::token::key("service");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key.as_bytes());
    let signature = ring::hmac::sign(&key, format!("{resource}\n{expires_at}").as_bytes());
    let signature = base64::engine::general_purpose::STANDARD.encode(signature);
    format!(
        "SharedAccessSignature sr={resource}&sig={}&se={expires_at}&skn=service",
        encode(&signature)
    )
}

fn partition(entity: &str, selector: Option<&str>) -> Source {
    let address = format!("{entity}/ConsumerGroups/$Default/Partitions/0");
    let mut source = Source::builder().address(address);
    if let Some(selector) = selector {
        let filter = Described {
            descriptor: Descriptor::Code(0x0000_468c_0000_0004),
            value: Value::String(format!("amqp.annotation.x-opt-{selector}")),
        };
        source = source.filter(
            [(
                Symbol::from("apache.org:selector-filter:string"),
                Value::Described(Box::new(filter)),
            )]
            .into_iter()
            .collect(),
        );
    }
    source.build()
}

fn sequence(got: &Got) -> i64 {
    match got.annotations["x-opt-sequence-number"] {
        Value::Long(sequence) => sequence,
        ref other => panic!("{other:?}"),
    }
}

async fn sequences(receiver: &mut Receiver, count: usize) -> Vec<i64> {
    let mut sequences = Vec::new();
    for _ in 0..count {
        sequences.push(sequence(&next(receiver).await));
    }
    sequences
}

/// A hub with five messages of leaf1, each a minute after the one before.
async fn with_events(bed: &Bed) -> (Amqp, fe2o3_amqp::Sender) {
    let mut device = Amqp::of(bed, "leaf1").await;
    device
        .admit(
            "leaf1",
            &Token {
                expires_at: now_secs() + 100_000,
                ..Token::of("leaf1")
            },
        )
        .await;
    let mut sender = device.telemetry("leaf1").await;
    for number in 0..5 {
        bed.clock(60 * number).await;
        let properties = Properties::builder()
            .message_id(MessageId::String(format!("m{number}")))
            .content_type("text/plain")
            .build();
        let message = Message::builder()
            .properties(properties)
            .application_properties(texts(&[("a", "1")]))
            .body(data_body([b"body".to_vec()]))
            .build();
        assert_eq!(send(&mut sender, message).await, Ok(()));
    }
    (device, sender)
}

#[tokio::test]
async fn events_are_read_from_a_position_on() {
    let bed = Bed::strict().await;
    let (_device, mut sender) = with_events(&bed).await;
    let mut service = Amqp::open(&bed).await;
    let token = events_token(ENTITY);
    assert_eq!(
        service
            .put(&format!("sb://{HOST}/{ENTITY}"), &token)
            .await
            .1,
        200
    );
    let mut all = service
        .receiver(partition(ENTITY, None), &[])
        .await
        .unwrap();
    let mut times = Vec::new();
    for _ in 0..5 {
        match &next(&mut all).await.annotations["x-opt-enqueued-time"] {
            Value::Timestamp(time) => times.push(time.milliseconds()),
            other => panic!("{other:?}"),
        }
    }
    let enqueued = |operator: &str, at: usize| format!("enqueued-time {operator} '{}'", times[at]);
    for (selector, first) in [
        (None, 0),
        (Some("offset > '-1'".to_owned()), 0),
        (Some("offset > '2'".to_owned()), 3),
        (Some("offset >= '2'".to_owned()), 2),
        (Some("sequence-number > '2'".to_owned()), 3),
        (Some("sequence-number >= 2".to_owned()), 2),
        (Some(enqueued(">", 1)), 2),
        (Some(enqueued(">=", 1)), 1),
    ] {
        let source = partition(ENTITY, selector.as_deref());
        let mut reader = service.receiver(source, &[]).await.unwrap();
        let wanted: Vec<i64> = (first..5).collect();
        let got = sequences(&mut reader, wanted.len()).await;
        assert_eq!(got, wanted, "{selector:?}");
    }
    // By the hub's own path, and only as far as credit goes.
    let mut reader = service
        .receiver_with(partition("messages/events", None), &[], CreditMode::Manual)
        .await
        .unwrap();
    reader.set_credit(1).await.unwrap();
    let event = next(&mut reader).await;
    assert_eq!(event.text(), "body");
    let text = |text: &str| Value::String(text.to_owned());
    assert_eq!(event.annotations["x-opt-offset"], text("0"));
    assert_eq!(event.annotations["x-opt-partition-key"], text("leaf1"));
    assert_eq!(
        event.annotations["iothub-connection-device-id"],
        text("leaf1")
    );
    assert_eq!(
        event.annotations["iothub-message-source"],
        text("Telemetry")
    );
    assert!(matches!(
        event.annotations["x-opt-enqueued-time"],
        Value::Timestamp(_)
    ));
    assert_eq!(event.application["a"], SimpleValue::String("1".to_owned()));
    assert_eq!(
        event.properties.message_id,
        Some(MessageId::String("m0".to_owned()))
    );
    assert_eq!(
        event.properties.content_type.as_ref().unwrap().as_str(),
        "text/plain"
    );
    // What comes later is read as it comes.
    let source = partition(ENTITY, Some("offset > '@latest'"));
    let mut latest = service.receiver(source, &[]).await.unwrap();
    assert_eq!(send(&mut sender, data(b"live")).await, Ok(()));
    assert_eq!(sequences(&mut latest, 1).await, [5]);
    reader.set_credit(10).await.unwrap();
    assert_eq!(sequences(&mut reader, 5).await, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn what_is_no_partition_is_refused() {
    let bed = Bed::strict().await;
    let mut service = Amqp::of_policy(&bed, "service").await;
    let other = format!("{ENTITY}/ConsumerGroups/$Default/Partitions/1");
    for (source, condition) in [
        (Source::from(other.as_str()), "amqp:not-found"),
        (partition("other-events", None), "amqp:not-found"),
        (
            partition(ENTITY, Some("offset < '1'")),
            "com.microsoft:argument-error",
        ),
    ] {
        let refused = service.receiver(source, &[]).await;
        assert_eq!(refused.unwrap_err(), condition);
    }
    let mut device = Amqp::of(&bed, "leaf1").await;
    assert!(device.receiver(partition(ENTITY, None), &[]).await.is_err());
}

#[tokio::test]
async fn the_event_hub_describes_itself() {
    let bed = Bed::strict().await;
    let mut service = Amqp::open(&bed).await;
    let token = events_token(&format!("{ENTITY}/$management"));
    service.put("management", &token).await;
    let mut requests = service.sender("$management", &[]).await.unwrap();
    let mut answers = service.receiver("$management", &[]).await.unwrap();
    let mut ask = async |pairs: &[(&str, &str)]| -> (i32, Value) {
        let properties = Properties::builder()
            .message_id(MessageId::String("q".to_owned()))
            .reply_to("reply");
        let request: Whole = Message::builder()
            .properties(properties.build())
            .application_properties(texts(pairs))
            .body(Body::Empty)
            .build();
        assert_eq!(send(&mut requests, request).await, Ok(()));
        let answer = next(&mut answers).await;
        let id = answer.properties.correlation_id;
        assert_eq!(id, Some(MessageId::String("q".to_owned())));
        let SimpleValue::Int(status) = answer.application["status-code"] else {
            panic!("{:?}", answer.application);
        };
        (status, answer.value.unwrap())
    };
    let get = |body: &Value, key: &str| {
        let Value::Map(map) = body else {
            panic!("{body:?}");
        };
        map.get(&Value::String(key.to_owned())).cloned().unwrap()
    };
    let hub = [
        ("operation", "READ"),
        ("name", ENTITY),
        ("type", "com.microsoft:eventhub"),
    ];
    let (status, body) = ask(&hub).await;
    assert_eq!(
        (status, get(&body, "partition_count")),
        (200, Value::Int(1))
    );
    let ids = Value::List(vec![Value::String("0".to_owned())]);
    assert_eq!(get(&body, "partition_ids"), ids);
    let partition = |partition| {
        let kind = ("type", "com.microsoft:partition");
        [hub[0], hub[1], kind, ("partition", partition)]
    };
    let (_, body) = ask(&partition("0")).await;
    assert_eq!(get(&body, "is_partition_empty"), Value::Bool(true));
    assert_eq!(get(&body, "last_enqueued_sequence_number"), Value::Long(-1));
    let _device = with_events(&bed).await;
    let (_, body) = ask(&partition("0")).await;
    assert_eq!(get(&body, "last_enqueued_sequence_number"), Value::Long(4));
    assert_eq!(
        get(&body, "last_enqueued_offset"),
        Value::String("4".to_owned())
    );
    for (pairs, status) in [
        (&partition("1")[..], 404),
        (&[hub[0], ("name", "other"), hub[2]][..], 404),
        (&[("operation", "WRITE"), hub[1], hub[2]][..], 400),
        (&[hub[0], hub[1], ("type", "x")][..], 400),
    ] {
        assert_eq!(ask(pairs).await.0, status, "{pairs:?}");
    }
}
