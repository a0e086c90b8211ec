//! Acceptance 1 of the AMQP side, checks 1 to 7: the acceptance checks of the AMQP contract (spec/amqp.md section 10),
//! by number, frame by frame through a real hub with real TLS.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::amqp::{
    Amqp, BATCH, Link, Message, SASL, TLS, Transfer, binary, boolean, code, credit, described,
    disposition, list, put_token, string, symbol, typed_frame, uint, ulong, uuid,
};
use edgehub_tests::service::{METHODS, Service};
use edgehub_tests::token::Token;
use edgehub_tests::{tls, websocket};
use serde_amqp::Value;
use serde_json::json;

const ROUTE: &str =
    "FROM /messages/modules/modA/outputs/out1 INTO BrokeredEndpoint(\"/modules/modB/inputs/in1\")";

async fn lab() -> Lab {
    LabBuilder::new()
        .layers(1)
        .leaves(3, "edge1")
        .leaf("a:b", "edge1")
        .module("edge1", "modA")
        .module("edge1", "modB")
        // So that what is given back comes again at once, not after its lock.
        .upstream("Amqp")
        .env("edge1", "routes__in", ROUTE)
        .env("edge1", "routes__up", "FROM /messages/* INTO $upstream")
        .start()
        .await
        .expect("the lab starts")
}

fn events(id: &str) -> String {
    match id.split_once('/') {
        Some((device, module)) => format!("/devices/{device}/modules/{module}/messages/events"),
        None => format!("/devices/{id}/messages/events"),
    }
}

/// A sasl-init frame.
fn sasl_init(mechanism: &str, response: &[u8]) -> Vec<u8> {
    let fields = [symbol(mechanism), binary(response)];
    typed_frame(1, 0, &described(0x41, &list(&fields)))
}

/// The outcome's code, after the mechanisms were offered.
async fn sasl_outcome(client: &mut Amqp, init: &[u8]) -> u8 {
    // Not EXTERNAL: clients that choose by themselves would take it, without a certificate in vain.
    assert_eq!(offered(client).await, ["ANONYMOUS", "MSSBCBS", "PLAIN"]);
    answer_to(client, init).await
}

/// The mechanisms that are offered.
async fn offered(client: &mut Amqp) -> Vec<&'static str> {
    client.send(&SASL).await;
    assert_eq!(client.header().await, SASL);
    let (kind, _, mechanisms) = client.raw_frame().await.expect("mechanisms");
    assert_eq!(kind, 1);
    let contains = |name: &&str| {
        let mut windows = mechanisms.windows(name.len());
        windows.any(|bytes| bytes == name.as_bytes())
    };
    let mut names = vec!["ANONYMOUS", "MSSBCBS", "PLAIN", "EXTERNAL"];
    names.retain(contains);
    names
}

/// The outcome's code.
async fn answer_to(client: &mut Amqp, init: &[u8]) -> u8 {
    client.send(init).await;
    let (kind, _, outcome) = client.raw_frame().await.expect("an outcome");
    assert_eq!(kind, 1);
    *outcome.last().expect("a code")
}

/// 1: bare AMQP with and without a client certificate, SASL MSSBCBS and PLAIN, and the header of TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_01_headers_and_sasl() {
    let lab = lab().await;
    let stranger = tls::ClientCertificate::self_signed("somebody.example", []);
    let connector = tls::connector(&lab, tls::BOTH, Some(stranger.clone()));
    let mut client = Amqp::connect_with(&lab, "edge1", &connector).await;
    assert_eq!(offered(&mut client).await.last(), Some(&"EXTERNAL"));
    assert_eq!(answer_to(&mut client, &sasl_init("EXTERNAL", b"")).await, 0);
    for certificate in [None, Some(stranger)] {
        let connector = tls::connector(&lab, tls::BOTH, certificate);
        let mut client = Amqp::connect_with(&lab, "edge1", &connector).await;
        client.start(None).await;
        client.cbs().await;
        client.authenticate(&lab, "leaf1", 0).await;
        client.attach(&Link::sender(0, &events("leaf1"))).await;
    }

    for mechanism in ["MSSBCBS", "ANONYMOUS"] {
        let mut client = Amqp::connect(&lab, "edge1").await;
        assert_eq!(
            sasl_outcome(&mut client, &sasl_init(mechanism, b"")).await,
            0
        );
        client.start(None).await;
        client.cbs().await;
        client.authenticate(&lab, "leaf1", 0).await;
    }

    let plain =
        |id: &str, token: &str| sasl_init("PLAIN", format!("\0{id}@sas.hub\0{token}").as_bytes());
    let mut client = Amqp::connect(&lab, "edge1").await;
    let token = Token::of(&lab, "leaf1").text();
    assert_eq!(sasl_outcome(&mut client, &plain("leaf1", &token)).await, 0);
    client.start(None).await;
    client.attach(&Link::sender(0, &events("leaf1"))).await;
    // Only that identity, and no node of tokens.
    let foreign = client.refused(&Link::sender(1, &events("leaf2"))).await;
    assert_eq!(foreign, "amqp:unauthorized-access");
    assert_eq!(
        client.refused(&Link::sender(2, "$cbs")).await,
        "amqp:not-allowed"
    );
    let wrong = Token::of(&lab, "leaf1").signed_with("d3Jvbmc=").text();
    let mut client = Amqp::connect(&lab, "edge1").await;
    assert_eq!(sasl_outcome(&mut client, &plain("leaf1", &wrong)).await, 1);
    assert!(client.raw_frame().await.is_none(), "closed");
    let mut client = Amqp::connect(&lab, "edge1").await;
    assert_eq!(
        sasl_outcome(&mut client, &sasl_init("SCRAM-SHA-1", b"")).await,
        2
    );

    for header in [TLS, *b"GET / HT"] {
        let mut client = Amqp::connect(&lab, "edge1").await;
        client.send(&header).await;
        assert_eq!(client.header().await, SASL);
        assert!(client.raw_frame().await.is_none(), "closed");
    }
    let upgrade = websocket::upgrade(&lab, "edge1", "/$iothub/websocket", Some("amqpwsb10")).await;
    assert_eq!(upgrade.status, 101);
    // The helper has made it lower case.
    let said = "sec-websocket-protocol: amqpwsb10\r\n";
    assert!(upgrade.head.contains(said), "{}", upgrade.head);
    lab.shutdown().await.expect("the lab ends");
}

/// 2: the answer to put-token has the type of its message id, and its status is an int.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_02_put_token_answers_with_the_types_of_the_request() {
    let lab = lab().await;
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    let good = Token::of(&lab, "leaf1").text();
    let bad = Token::of(&lab, "leaf1").signed_with("d3Jvbmc=").text();
    let expired = Token::of(&lab, "leaf1").expired().text();
    let guid = *b"0123456789abcdef";
    let mut id = 0;
    for (token, status) in [(&good, 200), (&bad, 401), (&expired, 401)] {
        for message_id in [string("request1"), ulong(7), uuid(guid)] {
            let answer = client.put(id, message_id.clone(), token).await;
            id += 1;
            let wanted: Value = serde_amqp::from_slice(&message_id).expect("a value");
            assert_eq!(answer.property(5), wanted);
            assert_eq!(answer.entry(0x74, "status-code"), Some(Value::Int(status)));
            let description = answer.entry(0x74, "status-description");
            assert!(
                matches!(description, Some(Value::String(_))),
                "{description:?}"
            );
        }
    }
    // A good token is not replaced by one that was refused.
    client.attach(&Link::sender(0, &events("leaf1"))).await;
    // What cannot be read is 400, with the request's id.
    for (key, value) in [("operation", "take-token"), ("type", "x509")] {
        let mut message = put_token(ulong(9), &good);
        for (name, encoded) in &mut message.application {
            if *name == key {
                *encoded = string(value);
            }
        }
        let transfer = Transfer {
            handle: 100,
            id,
            ..Transfer::default()
        };
        id += 1;
        client.deliver(&transfer, &message.encode()).await;
        let answer = client.expect(code::TRANSFER).await;
        assert_eq!(
            answer.entry(0x74, "status-code"),
            Some(Value::Int(400)),
            "{key}"
        );
        assert_eq!(answer.property(5), Value::Ulong(9));
    }
    lab.shutdown().await.expect("the lab ends");
}

/// 3: attaches without an initial delivery count, and every form of an address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_03_every_form_of_an_address() {
    let lab = lab().await;
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    client.authenticate(&lab, "a:b", 1).await;
    for (handle, address) in [
        "/devices/leaf1/messages/events",
        "devices/leaf1/messages/events",
        "amqps://edge1:5671/devices/leaf1/messages/events",
        "amqps://edge1//devices/leaf1/messages/events",
        "/Devices/leaf1/Messages/EVENTS",
        "/devices/a%3Ab/messages/events",
    ]
    .into_iter()
    .enumerate()
    {
        let handle = u32::try_from(handle).expect("small");
        let attached = client.attach(&Link::sender(handle, address)).await;
        assert_eq!(attached.number(10), Some(1_048_576), "max-message-size");
        // A second one of its kind would push it out.
        let detach = list(&[uint(handle), boolean(true)]);
        client.say(&described(code::DETACH, &detach)).await;
        client.expect(code::DETACH).await;
    }
    for address in [
        "/devices/leaf1",
        "/devices/leaf1/messages/events/x",
        "queue",
        "",
    ] {
        let condition = client.refused(&Link::sender(50, address)).await;
        let wanted = if address.is_empty() {
            "amqp:invalid-field"
        } else {
            "amqp:not-allowed"
        };
        assert_eq!(condition, wanted, "{address}");
    }
    lab.shutdown().await.expect("the lab ends");
}

/// 4: a link that is not allowed is refused within the connection, and the others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_04_a_refused_link_leaves_the_others_alone() {
    let lab = lab().await;
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    client.attach(&Link::sender(0, &events("leaf1"))).await;
    for address in [events("leaf2"), events("edge1/modA"), events("nobody")] {
        let condition = client.refused(&Link::sender(1, &address)).await;
        assert_eq!(condition, "amqp:unauthorized-access", "{address}");
    }
    let transfer = Transfer {
        handle: 0,
        id: 1,
        ..Transfer::default()
    };
    let settled = client
        .deliver(&transfer, &Message::of(b"still here").encode())
        .await;
    assert_eq!(settled.outcome(), Some(code::ACCEPTED));
    assert_eq!(
        (settled.field(3), settled.number(1)),
        (&Value::Bool(true), Some(1))
    );
    lab.shutdown().await.expect("the lab ends");
}

/// 5: what C# does with inputs and cloud-to-device messages: outcomes that are not settled are
/// answered at once, with accepted whatever they were; tags have 16 bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_05_c_sharp_settles_by_asking() {
    let lab = lab().await;
    let service = Service::of(&lab);
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "edge1/modB", 0).await;
    client.authenticate(&lab, "edge1/modA", 1).await;
    client.authenticate(&lab, "leaf1", 2).await;
    client
        .attach(&Link::receiver(0, &events("edge1/modB")))
        .await;
    client.say(&credit(0, 0, 1, false)).await;
    client.attach(&Link::sender(1, &events("edge1/modA"))).await;
    let message = Message {
        application: vec![("iothub-outputname", string("out1"))],
        ..Message::of(b"to modB")
    };
    let transfer = Transfer {
        handle: 1,
        id: 3,
        ..Transfer::default()
    };
    client.say(&transfer.with(&message.encode())).await;
    // The message may be there before its sender hears that it is stored.
    let mut delivery = client.next_of_two(code::TRANSFER, code::DISPOSITION).await;
    let mut count = 0;
    for (outcome, again) in [
        (code::RELEASED, true),
        (code::MODIFIED, true),
        (code::ACCEPTED, false),
    ] {
        assert_eq!(delivery.body(), b"to modB");
        let Value::Binary(tag) = delivery.field(2) else {
            panic!("{delivery:?}")
        };
        assert_eq!(tag.len(), 16);
        assert_eq!(
            delivery.entry(0x72, "x-opt-input-name"),
            Some(Value::String("in1".into()))
        );
        let id = u32::try_from(delivery.number(1).expect("an id")).expect("small");
        client.say(&disposition(id, None, false, outcome)).await;
        let answer = client.expect(code::DISPOSITION).await;
        assert_eq!(*answer.field(0), Value::Bool(false), "of the sender");
        assert_eq!(
            (answer.number(1), answer.field(3)),
            (Some(id.into()), &Value::Bool(true))
        );
        assert_eq!(answer.outcome(), Some(code::ACCEPTED));
        if again {
            count += 1;
            client.say(&credit(0, count, 1, false)).await;
            delivery = client.expect(code::TRANSFER).await;
        }
    }

    // A cloud-to-device message that is abandoned comes again; then it is completed.
    let link = Link {
        rcv_settle_mode: Some(1),
        ..Link::receiver(2, "/devices/leaf1/messages/deviceBound")
    };
    let attached = client.attach(&link).await;
    assert_eq!(attached.number(4), Some(1), "the receiver settles second");
    client.say(&credit(2, 0, 10, false)).await;
    let number = service
        .send("leaf1", &json!({"body": "hi", "message_id": "m"}))
        .await;
    let mut last = None;
    for outcome in [code::RELEASED, code::ACCEPTED] {
        let delivery = client.expect(code::TRANSFER).await;
        assert_eq!(delivery.body(), b"hi");
        let Value::Binary(tag) = delivery.field(2) else {
            panic!("{delivery:?}")
        };
        assert_eq!(tag.len(), 16);
        assert_eq!(delivery.property(2), Value::String("/devices/leaf1".into()));
        let id = u32::try_from(delivery.number(1).expect("an id")).expect("small");
        assert_ne!(last, Some(id));
        last = Some(id);
        client.say(&disposition(id, None, false, outcome)).await;
        let answer = client.expect(code::DISPOSITION).await;
        assert_eq!(answer.outcome(), Some(code::ACCEPTED));
    }
    assert_eq!(service.outcome("leaf1", number).await, json!("completed"));
    lab.shutdown().await.expect("the lab ends");
}

/// 6: what C does: methods by uuid, and telemetry in batches of one and of nearly 1 MiB. (Its long
/// silence is `accept_amqp_4_…`.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_06_c_calls_by_uuid_and_sends_batches() {
    let lab = lab().await;
    let service = Service::of(&lab);
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    let pair = "com.microsoft:channel-correlation-id";
    let methods = "amqps://edge1/devices/leaf1/methods/devicebound";
    client
        .attach(&Link::receiver(0, methods).with(pair, "methods:1"))
        .await;
    client
        .attach(&Link::sender(1, methods).with(pair, "methods:1"))
        .await;
    client.say(&credit(0, 0, 10, false)).await;
    service.subscribed("leaf1", METHODS).await;
    let answering = client.answer_reboot(1, 1, 207);
    let payload = json!({"delay": 3});
    let ((), result) = tokio::join!(answering, service.call("leaf1", "reboot", &payload, 30, 30));
    assert_eq!(
        result.expect("an answer"),
        json!({"status": 207, "payload": {"ok": true}})
    );

    client
        .attach(&Link::sender(
            2,
            "amqps://edge1/devices/leaf1/messages/events",
        ))
        .await;
    let one = Message::of(b"alone").encode();
    let many: Vec<Vec<u8>> = (0..5)
        .map(|n| Message::of(&[b'a' + n; 200_000]).encode())
        .collect();
    let mut id = 2;
    for messages in [vec![one], many] {
        let batch = Message {
            data: messages,
            ..Message::default()
        }
        .encode();
        // In frames of what both sides take.
        let mut parts = batch.chunks(60_000).peekable();
        while let Some(part) = parts.next() {
            let more = parts.peek().is_some();
            let transfer = Transfer {
                handle: 2,
                id,
                format: BATCH,
                more,
                ..Transfer::default()
            };
            client.say(&transfer.with(part)).await;
        }
        let settled = client.expect(code::DISPOSITION).await;
        assert_eq!(
            (settled.number(1), settled.outcome()),
            (Some(id.into()), Some(code::ACCEPTED))
        );
        id += 1;
    }
    let mut bodies = vec![b"alone".to_vec()];
    bodies.extend((0..5).map(|n| vec![b'a' + n; 200_000]));
    edgehub_tests::only_these_arrive(&lab, "leaf1", &bodies).await;

    // One message of a batch that is too large: none of it is taken.
    let batch = Message {
        data: vec![
            Message::of(b"good").encode(),
            Message::of(&[0; 262_145]).encode(),
        ],
        ..Message::default()
    }
    .encode();
    let mut parts = batch.chunks(60_000).peekable();
    while let Some(part) = parts.next() {
        let more = parts.peek().is_some();
        let transfer = Transfer {
            handle: 2,
            id,
            format: BATCH,
            more,
            ..Transfer::default()
        };
        client.say(&transfer.with(part)).await;
    }
    let settled = client.expect(code::DISPOSITION).await;
    assert_eq!(settled.outcome(), Some(code::REJECTED));
    assert_eq!(
        settled.rejection().as_deref(),
        Some("amqp:link:message-size-exceeded")
    );
    lab.shutdown().await.expect("the lab ends");
}

/// 7: what Node does: a message of 200 KB in frames that repeat id and tag, twin requests that fail,
/// a renewed token in the midst of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_07_node_sends_in_frames_and_renews() {
    let lab = lab().await;
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    client.attach(&Link::sender(0, &events("leaf1"))).await;
    let body = vec![b'n'; 200_000];
    let message = Message::of(&body).encode();
    let mut parts = message.chunks(60_000).enumerate().peekable();
    while let Some((index, part)) = parts.next() {
        let more = parts.peek().is_some();
        let transfer = Transfer {
            handle: 0,
            id: 1,
            more,
            ..Transfer::default()
        };
        client.say(&transfer.with(part)).await;
        if index == 1 {
            // In between: another link's delivery.
            let token = Token::of(&lab, "leaf1")
                .by_secondary_key_of(&lab, "leaf1")
                .text();
            let answer = client.put(2, string("renewed"), &token).await;
            assert_eq!(answer.entry(0x74, "status-code"), Some(Value::Int(200)));
        }
    }
    let settled = client.expect(code::DISPOSITION).await;
    assert_eq!(
        (settled.number(1), settled.outcome()),
        (Some(1), Some(code::ACCEPTED))
    );
    edgehub_tests::only_these_arrive(&lab, "leaf1", &[body]).await;

    let pair = "com.microsoft:channel-correlation-id";
    client
        .attach(&Link::sender(1, "/devices/leaf1/twin").with(pair, "twin:1"))
        .await;
    client
        .attach(&Link::receiver(2, "/devices/leaf1/twin").with(pair, "twin:1"))
        .await;
    client.say(&credit(2, 0, 100, false)).await;
    let ask = |operation: &str, body: &[u8]| Message {
        annotations: vec![
            ("operation", string(operation)),
            ("resource", string("/properties/reported")),
        ],
        correlation_id: Some(string("ask")),
        ..Message::of(body)
    };
    for (id, operation, body, statuses) in [
        (3, "GET", &b" "[..], 200..=200),
        (4, "PATCH", br#"{"fw":"2"}"#, 204..=204),
        (5, "PATCH", br#"{"fw":"#, 400..=499),
        (6, "PUT", b" ", 200..=200),
    ] {
        let transfer = Transfer {
            handle: 1,
            id,
            settled: true,
            ..Transfer::default()
        };
        client
            .say(&transfer.with(&ask(operation, body).encode()))
            .await;
        let answer = client.expect(code::TRANSFER).await;
        assert_eq!(*answer.field(4), Value::Bool(true), "settled");
        assert_eq!(answer.property(5), Value::String("ask".into()));
        let Some(Value::Int(status)) = answer.entry(0x72, "status") else {
            panic!("{answer:?}")
        };
        assert!(statuses.contains(&status), "{operation}: {status}");
        if status >= 300 {
            let error: serde_json::Value =
                serde_json::from_slice(&answer.body()).expect("Node parses it");
            assert!(error.is_object(), "{error}");
        }
    }
    lab.shutdown().await.expect("the lab ends");
}
