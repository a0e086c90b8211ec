//! Acceptance 4 of the AMQP side: what the C# and C SDKs need and no SDK here does, frame by frame.
//!
//! Their settlement, tags, uuids, batches and headers are in `amqp_1_vectors.rs` (checks 1, 5 and 6);
//! here are the trace of spec/amqp.md 7.4 as it stands, C#'s two sessions, and what keeps a C client
//! alive.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use std::time::Duration;

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::amqp::{
    AMQP, Amqp, Link, Message, Transfer, begin, code, credit, described, disposition, frame, list,
    open, put_token, string,
};
use edgehub_tests::service::{METHODS, Service};
use edgehub_tests::token::Token;
use serde_amqp::Value;
use serde_json::json;
use tokio::time::Instant;

async fn lab() -> Lab {
    // Over MQTT upstream a message's time and count do not come along.
    let lab = LabBuilder::new().layers(1).upstream("Amqp");
    let lab = lab.leaves(2, "edge1");
    lab.start().await.expect("the lab starts")
}

/// The trace of a device with a SAS token, in Node's style, with C#'s settlement at its end
/// (spec/amqp.md 7.4, line by line).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_4_the_trace_of_a_device_with_a_token() {
    let lab = lab().await;
    let service = Service::of(&lab);
    let mut client = Amqp::connect(&lab, "edge1").await;

    // -> AMQP 0 1 0 0                                <- AMQP 0 1 0 0
    client.send(b"\x41\x4d\x51\x50\x00\x01\x00\x00").await;
    assert_eq!(client.header().await, AMQP);
    // -> open{container-id:"c0ffee", hostname:"gw"}: a frame of 0x1a bytes, data offset 2, type 0,
    //    channel 0; 00 53 10 open, c0 list of 0x0d bytes and 2 fields.
    let open = b"\x00\x00\x00\x1a\x02\x00\x00\x00\x00\x53\x10\xc0\x0d\x02\xa1\x06c0ffee\xa1\x02gw";
    client.send(open).await;
    let opened = client.expect(code::OPEN).await;
    let Value::String(container) = opened.field(0) else {
        panic!("{opened:?}")
    };
    let name = container
        .strip_prefix("DeviceGateway_")
        .expect("the reference's name");
    assert!(
        name.len() == 32 && name.bytes().all(|c| c.is_ascii_hexdigit()),
        "{name}"
    );
    assert_eq!(
        (opened.number(2), opened.number(3)),
        (Some(65_536), Some(8_191))
    );
    assert_eq!(opened.number(4), Some(120_000));
    // -> begin{next-outgoing-id:0, incoming-window:2048, outgoing-window:4294967295}
    let begin = b"\x00\x00\x00\x1a\x02\x00\x00\x00\x00\x53\x11\xc0\x0d\x04\x40\x43\x70\x00\x00\x08\x00\x70\xff\xff\xff\xff";
    client.send(begin).await;
    let begun = client.expect(code::BEGIN).await;
    assert_eq!((begun.number(0), begun.number(1)), (Some(0), Some(1)));
    assert_eq!(
        (begun.number(2), begun.number(3)),
        (Some(5_000), Some(5_000))
    );
    assert_eq!(begun.number(4), Some(262_143));

    // The pair of $cbs, and a token.
    let version = "com.microsoft:client-version";
    let sender = Link::sender(0, "$cbs").with(version, "azure-iot-device/1.18.4");
    let attached = client.attach(&sender).await;
    assert_eq!(*attached.field(2), Value::Bool(true), "the hub receives");
    assert_eq!(attached.number(10), Some(1_048_576));
    let attached = client.attach(&Link::receiver(1, "$cbs")).await;
    assert_eq!(
        (attached.field(2), attached.number(9)),
        (&Value::Bool(false), Some(0))
    );
    client.say(&credit(1, 0, 1_000, false)).await;
    let token = Token::of(&lab, "leaf1").text();
    let put = Transfer {
        handle: 0,
        tag: Some(b"0".to_vec()),
        ..Transfer::default()
    };
    let settled = client
        .deliver(&put, &put_token(string("7b0c"), &token).encode())
        .await;
    assert_eq!(
        (settled.field(0), settled.field(3)),
        (&Value::Bool(true), &Value::Bool(true))
    );
    assert_eq!(settled.outcome(), Some(code::ACCEPTED));
    let answer = client.expect(code::TRANSFER).await;
    assert_eq!(answer.property(5), Value::String("7b0c".into()));
    assert_eq!(answer.entry(0x74, "status-code"), Some(Value::Int(200)));
    assert_eq!(
        answer.entry(0x74, "status-description"),
        Some(Value::String("OK".into()))
    );
    client
        .say(&disposition(0, None, true, code::ACCEPTED))
        .await;

    // Telemetry.
    client
        .attach(&Link::sender(2, "/devices/leaf1/messages/events"))
        .await;
    let message = Message {
        application: vec![("temp", string("21"))],
        ..Message::of(br#"{"t":21}"#)
    };
    let transfer = Transfer {
        handle: 2,
        id: 1,
        ..Transfer::default()
    };
    let settled = client.deliver(&transfer, &message.encode()).await;
    assert_eq!(
        (settled.number(1), settled.outcome()),
        (Some(1), Some(code::ACCEPTED))
    );

    // Twin: GET, PATCH, and a desired change without anything asked for: attached is enough.
    let pair = "com.microsoft:channel-correlation-id";
    client
        .attach(&Link::sender(3, "/devices/leaf1/twin").with(pair, "twin:5f"))
        .await;
    client
        .attach(&Link::receiver(4, "/devices/leaf1/twin").with(pair, "twin:5f"))
        .await;
    client.say(&credit(4, 0, 100, false)).await;
    let get = Message {
        annotations: vec![("operation", string("GET"))],
        correlation_id: Some(string("9a")),
        ..Message::of(b" ")
    };
    let asked = Transfer {
        handle: 3,
        id: 2,
        settled: true,
        ..Transfer::default()
    };
    client.say(&asked.with(&get.encode())).await;
    let twin = client.expect(code::TRANSFER).await;
    assert_eq!(
        (twin.entry(0x72, "status"), twin.property(5)),
        (Some(Value::Int(200)), Value::String("9a".into()))
    );
    let twin: serde_json::Value = serde_json::from_slice(&twin.body()).expect("JSON");
    assert!(
        twin["desired"]["$version"].is_u64() && twin["reported"]["$version"].is_u64(),
        "{twin}"
    );
    let patch = Message {
        annotations: vec![
            ("operation", string("PATCH")),
            ("resource", string("/properties/reported")),
        ],
        correlation_id: Some(string("9b")),
        ..Message::of(br#"{"fw":"2"}"#)
    };
    let asked = Transfer {
        handle: 3,
        id: 3,
        settled: true,
        ..Transfer::default()
    };
    client.say(&asked.with(&patch.encode())).await;
    let patched = client.expect(code::TRANSFER).await;
    assert_eq!(patched.entry(0x72, "status"), Some(Value::Int(204)));
    let version = service.desire("leaf1", &json!({"interval": 5})).await;
    let desired = client.expect(code::TRANSFER).await;
    assert_eq!(
        (desired.property(5), desired.entry(0x72, "status")),
        (Value::Null, None)
    );
    let desired: serde_json::Value = serde_json::from_slice(&desired.body()).expect("JSON");
    assert_eq!(desired, json!({"interval": 5, "$version": version}));

    // A method: the call and its answer have the same uuid.
    let methods = "/devices/leaf1/methods/devicebound";
    client
        .attach(&Link::receiver(6, methods).with(pair, "methods:61"))
        .await;
    client
        .attach(&Link::sender(7, methods).with(pair, "methods:61"))
        .await;
    client.say(&credit(6, 0, 100, false)).await;
    service.subscribed("leaf1", METHODS).await;
    let answering = client.answer_reboot(7, 4, 200);
    let payload = json!({"delay": 3});
    let ((), result) = tokio::join!(answering, service.call("leaf1", "reboot", &payload, 30, 30));
    assert_eq!(
        result.expect("an answer"),
        json!({"status": 200, "payload": {"ok": true}})
    );

    // A cloud-to-device message, which C# settles by asking the hub to.
    let attached = client
        .attach(&Link::receiver(8, "/devices/leaf1/messages/devicebound"))
        .await;
    assert_eq!(attached.number(4), Some(1), "the receiver settles second");
    client.say(&credit(8, 0, 100, false)).await;
    let number = service.send("leaf1", &json!({"body": "hi"})).await;
    let message = client.expect(code::TRANSFER).await;
    assert_eq!(message.body(), b"hi");
    assert_eq!(message.property(2), Value::String("/devices/leaf1".into()));
    let Value::Binary(tag) = message.field(2) else {
        panic!("{message:?}")
    };
    assert_eq!(tag.len(), 16);
    for annotation in [
        "x-opt-lock-token",
        "iothub-enqueuedtime",
        "iothub-deliverycount",
    ] {
        assert!(message.entry(0x72, annotation).is_some(), "{annotation}");
    }
    let id = u32::try_from(message.number(1).expect("an id")).expect("small");
    client
        .say(&disposition(id, None, false, code::ACCEPTED))
        .await;
    let settled = client.expect(code::DISPOSITION).await;
    assert_eq!(
        (settled.field(0), settled.field(3)),
        (&Value::Bool(false), &Value::Bool(true)),
        "of the sender, settled"
    );
    assert_eq!(service.outcome("leaf1", number).await, json!("completed"));

    // A refusal on the same connection.
    let refused = client
        .refused(&Link::receiver(5, "/devices/leaf2/messages/devicebound"))
        .await;
    assert_eq!(refused, "amqp:unauthorized-access");
    // An orderly end.
    client.say(&described(code::CLOSE, &list(&[]))).await;
    assert_eq!(client.until_closed().await, None);
    lab.shutdown().await.expect("the lab ends");
}

/// C#: header and open in one write, the node of tokens in a session of its own with settled
/// requests, links as URLs with the same names in other sessions, twin links at the same time, a GET
/// without any body and a PATCH whose version is null.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_4_c_sharp_has_sessions_apart() {
    let lab = lab().await;
    let mut client = Amqp::connect(&lab, "edge1").await;
    let start = [
        AMQP.to_vec(),
        frame(0, &open(Some(60_000))),
        frame(0, &begin()),
        frame(1, &begin()),
    ];
    client.send(&start.concat()).await;
    assert_eq!(client.header().await, AMQP);
    client.expect(code::OPEN).await;
    for channel in 0..2 {
        let begun = client.expect(code::BEGIN).await;
        assert_eq!(
            (begun.channel, begun.number(0)),
            (channel, Some(channel.into()))
        );
    }
    for link in [Link::sender(0, "$cbs"), Link::receiver(1, "$cbs")] {
        client.send(&frame(1, &link.attach())).await;
        client.expect(code::ATTACH).await;
    }
    client.send(&frame(1, &credit(1, 0, 50, false))).await;
    let mut put = put_token(string("request1"), &Token::of(&lab, "leaf1").text());
    put.application[1].1 = string("azure-devices.net:sastoken");
    let settled = Transfer {
        handle: 0,
        settled: true,
        ..Transfer::default()
    };
    client.send(&frame(1, &settled.with(&put.encode()))).await;
    let answer = client.expect(code::TRANSFER).await;
    assert_eq!(
        (answer.channel, answer.property(5)),
        (1, Value::String("request1".into()))
    );
    assert_eq!(answer.entry(0x74, "status-code"), Some(Value::Int(200)));

    client
        .attach(&Link::sender(
            0,
            "amqps://edge1:5671/devices/leaf1/messages/events",
        ))
        .await;
    let guid = b"0123456789abcdef".to_vec();
    let transfer = Transfer {
        handle: 0,
        id: 0,
        tag: Some(guid),
        ..Transfer::default()
    };
    let settled = client
        .deliver(&transfer, &Message::of(b"c#").encode())
        .await;
    assert_eq!(
        (settled.channel, settled.outcome()),
        (0, Some(code::ACCEPTED))
    );

    let pair = "com.microsoft:channel-correlation-id";
    let address = "amqps://edge1:5671/devices/leaf1/twin";
    let both = [
        frame(0, &Link::receiver(1, address).with(pair, "twin:1").attach()),
        frame(0, &Link::sender(2, address).with(pair, "twin:1").attach()),
        frame(0, &credit(1, 0, 50, false)),
    ];
    client.send(&both.concat()).await;
    client.expect(code::ATTACH).await;
    client.expect(code::ATTACH).await;
    let resource = ("resource", string("/notifications/twin/properties/desired"));
    for (id, correlation, annotations, data, status) in [
        (
            1,
            "Put1",
            vec![("operation", string("PUT")), resource],
            vec![],
            200,
        ),
        (2, "Get1", vec![("operation", string("GET"))], vec![], 200),
        (
            3,
            "Patch1",
            vec![
                ("operation", string("PATCH")),
                ("resource", string("/properties/reported")),
                ("version", vec![0x40]),
            ],
            vec![br#"{"a":1}"#.to_vec()],
            204,
        ),
    ] {
        let message = Message {
            annotations,
            correlation_id: Some(string(correlation)),
            data,
            ..Message::default()
        };
        let transfer = Transfer {
            handle: 2,
            id,
            settled: true,
            ..Transfer::default()
        };
        client.say(&transfer.with(&message.encode())).await;
        let answer = client.expect(code::TRANSFER).await;
        assert_eq!(answer.property(5), Value::String(correlation.into()));
        assert_eq!(
            answer.entry(0x72, "status"),
            Some(Value::Int(status)),
            "{correlation}"
        );
        let sections = answer.sections();
        assert_eq!(
            sections.iter().filter(|(code, ..)| *code == 0x75).count(),
            1,
            "one data section"
        );
    }
    // The end of the session of tokens ends nobody's links.
    client
        .send(&frame(1, &described(code::END, &list(&[]))))
        .await;
    client.expect(code::END).await;
    let transfer = Transfer {
        handle: 0,
        id: 4,
        ..Transfer::default()
    };
    let settled = client
        .deliver(&transfer, &Message::of(b"still").encode())
        .await;
    assert_eq!(settled.outcome(), Some(code::ACCEPTED));
    lab.shutdown().await.expect("the lab ends");
}

/// C names an idle time-out without any slack and drops the connection when it passes: something
/// must come within half of it, also while nothing happens. A shorter one than five seconds is
/// refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_4_heartbeats_come_within_half_of_the_idle_time_out() {
    const IDLE_MS: u32 = 6_000;
    let lab = lab().await;
    let mut client = Amqp::connect(&lab, "edge1").await;
    client.start(Some(IDLE_MS)).await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    let begun = Instant::now();
    let mut last = begun;
    let mut beats = 0;
    while begun.elapsed() < Duration::from_secs(13) {
        let (kind, channel, body) = client.raw_frame().await.expect("the connection is open");
        assert_eq!((kind, channel), (0, 0));
        beats += u32::from(body.is_empty());
        let gap = last.elapsed();
        last = Instant::now();
        // Half of it, and what a busy machine takes.
        assert!(
            gap < Duration::from_millis(u64::from(IDLE_MS) / 2 + 1_500),
            "{gap:?}"
        );
    }
    assert!(beats >= 3, "{beats} heartbeats");

    let mut client = Amqp::connect(&lab, "edge1").await;
    client
        .send(&[AMQP.to_vec(), frame(0, &open(Some(4_999)))].concat())
        .await;
    assert_eq!(client.header().await, AMQP);
    client.expect(code::OPEN).await;
    assert_eq!(
        client.until_closed().await.as_deref(),
        Some("amqp:not-allowed")
    );
    lab.shutdown().await.expect("the lab ends");
}

/// C names a small max-message-size for its cloud-to-device link and takes what is larger all the same;
/// the reference does not keep to it, and a message must not be lost by it (spec/amqp.md 7.3).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_4_a_small_max_message_size_loses_nothing() {
    let lab = lab().await;
    let service = Service::of(&lab);
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    let link = Link {
        max_message_size: Some(2_000),
        ..Link::receiver(0, "amqps://edge1/devices/leaf1/messages/devicebound")
    };
    client.attach(&link).await;
    client.say(&credit(0, 0, 10, false)).await;
    let large = service
        .send("leaf1", &json!({"body": "x".repeat(4_000)}))
        .await;
    let small = service.send("leaf1", &json!({"body": "small"})).await;
    for (body, number) in [("x".repeat(4_000), large), ("small".to_owned(), small)] {
        let delivery = client.expect(code::TRANSFER).await;
        assert_eq!(delivery.body(), body.as_bytes());
        let id = u32::try_from(delivery.number(1).expect("an id")).expect("small");
        client
            .say(&disposition(id, None, true, code::ACCEPTED))
            .await;
        let outcome = service.outcome("leaf1", number).await;
        assert_eq!(outcome, json!("completed"));
    }
    lab.shutdown().await.expect("the lab ends");
}
