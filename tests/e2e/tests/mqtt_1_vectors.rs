//! Acceptance 1 of the MQTT side: the acceptance vectors of the MQTT contract, by number, byte for
//! byte through a real hub with real TLS.
//!
//! Which vector is covered by which test is in the table of docs/compatibility.md, which
//! `tests/tidy.rs` holds against the tree.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "these are the tests"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use edgehub_lab::ledger::LedgerEntry;
use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::mqtt::{
    Door, Hello, MqttClient, code, field, frame, puback, publish, telemetry,
};
use edgehub_tests::{PATIENCE, only_these_arrive, tls, websocket};
use mqttbytes::QoS;
use mqttbytes::v4::{Packet, Publish};
use serde_json::Value;
use tokio::time::Instant;

const TWIN_RESPONSES: &str = "$iothub/twin/res/#";

/// Vectors 1 to 4, 18 and 20: who is let in over TLS and WebSocket, with and without a client
/// certificate, and who is refused by which code.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_vector_01_02_03_04_18_20_connections_are_let_in_or_refused() {
    let lab = LabBuilder::new().layers(1).leaf("d1", "edge1");
    let lab = lab.start().await.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    let d1 = || Hello::of(&lab, "d1");

    // 1: byte for byte, session present 0.
    let mut client = door.open().await;
    client.send(&d1().packet()).await;
    let ack = client.connack_packet().await.expect("CONNACK");
    assert_eq!(
        (ack.session_present, ack.code as u8),
        (false, code::ACCEPTED)
    );
    client.disconnect().await;

    // 2: ids are case-sensitive.
    let other_case = Hello {
        client_id: "D1".to_owned(),
        ..d1()
    };
    assert_eq!(door.refused(&other_case).await, code::NOT_AUTHORIZED);

    // 3: another protocol is closed without a word, another level is told so.
    let fields = [field(b"MQIsdp"), vec![3, 0x02, 0, 60], field(b"d1")];
    let old = frame(0x10, &fields.concat());
    door.open().await.expect_close_after(&old).await;
    for level in [3, 5] {
        let mut packet = d1().packet();
        let at = packet.windows(5).position(|bytes| bytes == b"MQTT\x04");
        packet[at.expect("a level") + 4] = level;
        let mut client = door.open().await;
        client.send(&packet).await;
        assert_eq!(
            client.connack().await,
            Some(code::PROTOCOL_LEVEL),
            "level {level}"
        );
        assert_eq!(client.until_close().await, []);
    }

    // 4: a user name that cannot be read.
    let unreadable = Hello {
        user_name: "h/d1".to_owned(),
        ..d1()
    };
    assert_eq!(door.refused(&unreadable).await, code::USER_NAME);

    // 20: a certificate is asked for and not required, and does not matter beside a token.
    let stranger = || tls::ClientCertificate::self_signed("somebody.example", []);
    for versions in [tls::BOTH, tls::ONLY_1_2, tls::ONLY_1_3] {
        for certificate in [None, Some(stranger())] {
            let door = door
                .clone()
                .tls(tls::connector(&lab, versions, certificate));
            door.admitted(&d1()).await.ping().await;
        }
    }
    let without_token = Hello {
        password: String::new(),
        ..d1()
    };
    let door = door.tls(tls::connector(&lab, tls::BOTH, Some(stranger())));
    assert_eq!(door.refused(&without_token).await, code::NOT_AUTHORIZED);

    // 18: no sub-protocol, no WebSocket; its name in any case, and the answer in lower case.
    for protocol in [None, Some("mqttv5")] {
        let refused = websocket::upgrade(&lab, "edge1", "/$iothub/websocket", protocol).await;
        assert_eq!(refused.status, 400, "{protocol:?}: {}", refused.head);
    }
    for path in ["/$iothub/websocket", "/", "/any/path?x=1"] {
        let upgrade = websocket::upgrade(&lab, "edge1", path, Some("MQTT")).await;
        assert_eq!(upgrade.status, 101, "{}", upgrade.head);
        let said = "sec-websocket-protocol: mqtt\r\n";
        assert!(upgrade.head.contains(said), "{}", upgrade.head);
        let mut socket = upgrade.socket;
        socket.send_binary(&d1().packet()).await;
        match socket.next().await {
            Some(Packet::ConnAck(ack)) => assert_eq!(ack.code as u8, code::ACCEPTED),
            other => panic!("{other:?} instead of CONNACK"),
        }
        let own = publish(&telemetry("d1"), QoS::AtLeastOnce, 1, path.as_bytes());
        socket.send_binary(&own).await;
        match socket.next().await {
            Some(Packet::PubAck(ack)) => assert_eq!(ack.pkid, 1),
            other => panic!("{other:?} instead of PUBACK"),
        }
    }
    only_these_arrive(&lab, "d1", &["/$iothub/websocket", "/", "/any/path?x=1"]).await;
    lab.shutdown().await.expect("the lab ends");
}

/// Vectors 5 to 8: a twin request is answered to whoever subscribed once, after a reconnect
/// without SUBSCRIBE and after a restart of the hub too; for a leaf and for a module.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_vector_05_06_07_08_twin_requests_survive_reconnect_and_restart() {
    let ids = ["d1", "edge1/m"];
    let lab = LabBuilder::new().layers(1).leaf("d1", "edge1");
    let lab = lab.module("edge1", "m").start().await;
    let lab = lab.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    for id in ids {
        let hello = Hello::of(&lab, id);
        let (mut client, present) = door.resumed(&hello).await;
        assert!(!present, "{id}: a new session");
        // 5: QoS 2 is granted as 1.
        assert_eq!(
            client.subscribe(1, &[(TWIN_RESPONSES, 2)]).await,
            [1],
            "{id}"
        );
        // 6, 7.
        get_twin(&mut client, "7").await;
        client.disconnect().await;
        let (mut client, present) = door.resumed(&hello).await;
        assert!(present, "{id}: the session is known after DISCONNECT");
        get_twin(&mut client, "7").await;
        drop(client);
        let (mut client, present) = door.resumed(&hello).await;
        assert!(present, "{id}: and after a lost connection");
        get_twin(&mut client, "8").await;
    }

    // 8: killed, not stopped: the SUBACK was sent after the write.
    lab.kill("edge1").await.expect("the hub is killed");
    lab.start("edge1").await.expect("the hub starts");
    for id in ids {
        let hello = Hello::of(&lab, id);
        let (mut client, present) = door.resumed(&hello).await;
        assert!(present, "{id}: the session is known after a restart");
        get_twin(&mut client, "7").await;

        // What was unsubscribed is not answered any more: PUBACK, and nothing else.
        client.unsubscribe(2, &[TWIN_RESPONSES]).await;
        client.publish("$iothub/twin/GET/?$rid=9", " ", 3).await;
        client.publish(&telemetry(id), "after it", 4).await;
        client.ping().await;
        client.disconnect().await;

        // A clean session has no past and leaves none (MQTT-3.1.2-6).
        let (mut client, present) = door.resumed(&hello.clone().clean()).await;
        assert!(!present, "{id}: clean");
        assert_eq!(
            client.subscribe(1, &[(TWIN_RESPONSES, 0)]).await,
            [0],
            "{id}"
        );
        get_twin(&mut client, "10").await;
        client.disconnect().await;
        let (client, present) = door.resumed(&hello).await;
        assert!(!present, "{id}: nothing is left of a clean session");
        client.disconnect().await;
    }
    lab.shutdown().await.expect("the lab ends");
}

/// Asks for the twin at QoS 1: PUBACK and the twin come, in either order.
async fn get_twin(client: &mut MqttClient, request: &str) {
    let topic = format!("$iothub/twin/GET/?$rid={request}");
    client
        .send(&publish(&topic, QoS::AtLeastOnce, 40, b" "))
        .await;
    let (mut acknowledged, mut answer) = (false, None);
    while !acknowledged || answer.is_none() {
        match client.next().await {
            Some(Packet::PubAck(ack)) if ack.pkid == 40 && !acknowledged => acknowledged = true,
            Some(Packet::Publish(publish)) if answer.is_none() => answer = Some(publish),
            other => panic!("{other:?} instead of PUBACK and the twin"),
        }
    }
    let answer = answer.expect("it came");
    assert_eq!(
        answer.topic,
        format!("$iothub/twin/res/200/?$rid={request}")
    );
    assert_eq!(
        (answer.qos, answer.retain, answer.dup),
        (QoS::AtMostOnce, false, false)
    );
    let twin: Value = serde_json::from_slice(&answer.payload).expect("JSON");
    for part in ["desired", "reported"] {
        assert!(twin[part]["$version"].is_u64(), "{part} of {twin}");
    }
}

/// Vectors 9 to 13, 17 and 19: what becomes of a publish, by its topic, QoS and size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_vector_09_10_11_12_13_17_19_publishes_are_taken_dropped_or_close() {
    let lab = LabBuilder::new().layers(1).leaf("d1", "edge1");
    let lab = lab.leaf("d2", "edge1").start().await;
    let lab = lab.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    let d1 = Hello::of(&lab, "d1");
    let own = telemetry("d1");
    let mut client = door.admitted(&d1).await;

    // 17: in one write; acknowledged in their order.
    let both = [1, 2].map(|id| publish(&own, QoS::AtLeastOnce, id, &[b'0' + id as u8]));
    client.send(&both.concat()).await;
    client.expect_pubacks([1, 2]).await;
    // 9, 11.
    let escaped = format!("{own}%24.ct=application%2Fjson&a=b%3Dc/");
    client.publish(&escaped, "9", 3).await;
    client.publish(&format!("{own}deviceId=d2"), "11", 4).await;
    // 13.
    client.publish("foo/bar", "13", 5).await;
    // 19: over 256 KiB with its properties it is dropped; up to that it is stored, also when its
    // packet is over 262,144 bytes (letters of two bytes take six in a topic and count as one).
    let body = vec![b'x'; 262_100];
    client
        .publish(&format!("{own}p={}", "y".repeat(2048)), &body, 6)
        .await;
    let large = "z".repeat(261_900);
    let topic = format!("{own}p={}", "%C3%A9".repeat(40));
    assert!(publish(&topic, QoS::AtLeastOnce, 7, large.as_bytes()).len() > 262_144);
    client.publish(&topic, &large, 7).await;
    client.publish(&own, "still here", 8).await;

    // 12: closed and not stored; what came before in the same write is.
    let forbidden = [
        publish(&own, QoS::AtLeastOnce, 9, b"before"),
        publish(&own, QoS::ExactlyOnce, 10, b"twice"),
        publish(&own, QoS::AtLeastOnce, 11, b"after"),
    ];
    client.send(&forbidden.concat()).await;
    for packet in client.until_close().await {
        assert!(
            matches!(&packet, Packet::PubAck(ack) if ack.pkid == 9),
            "{packet:?}"
        );
    }
    // 10.
    let foreign = publish(&telemetry("d2"), QoS::AtLeastOnce, 1, b"forged");
    door.admitted(&d1).await.expect_close_after(&foreign).await;

    door.admitted(&d1).await.publish(&own, "last", 1).await;
    let d2 = Hello::of(&lab, "d2");
    door.admitted(&d2)
        .await
        .publish(&telemetry("d2"), "own", 1)
        .await;
    let bodies = ["1", "2", "9", "11", &large, "still here", "before", "last"];
    only_these_arrive(&lab, "d1", &bodies).await;
    only_these_arrive(&lab, "d2", &["own"]).await;
    let entries = lab.ledger().entries().expect("the ledger");
    assert_eq!(
        entries.len(),
        bodies.len() + 1,
        "and nothing as anybody else"
    );
    let nine = with_body(&entries, "9");
    assert_eq!(
        nine.system["content-type"].as_deref(),
        Some("application/json")
    );
    let properties = BTreeMap::from([("a".to_owned(), Some("b=c".to_owned()))]);
    assert_eq!(nine.properties, properties);
    let eleven = with_body(&entries, "11");
    assert_eq!(eleven.properties["deviceId"].as_deref(), Some("d2"));

    let metrics = lab.metrics("edge1").await.expect("metrics");
    for reason in ["unknown_topic", "too_large"] {
        let labels = [("reason", reason), ("from", "d1")];
        let dropped = metrics.sum("edgehub_messages_dropped_total", &labels);
        assert_eq!(dropped, 1.0, "{reason}");
    }
    lab.shutdown().await.expect("the lab ends");
}

fn with_body<'a>(entries: &'a [LedgerEntry], body: &str) -> &'a LedgerEntry {
    let is_it = |entry: &&LedgerEntry| entry.body().expect("a body") == body.as_bytes();
    entries.iter().find(is_it).expect("it arrived")
}

/// Vector 14: a message for a module's input comes at QoS 1; while it is not acknowledged it comes
/// again after a reconnect and after a restart of the hub, in order, with DUP and the same packet
/// id; acknowledged, in whatever order, it does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_vector_14_an_input_is_delivered_again_until_it_is_acknowledged() {
    let route = r#"FROM /messages/modules/sender/outputs/out
        INTO BrokeredEndpoint("/modules/m/inputs/in1")"#;
    let lab = LabBuilder::new().layers(1).module("edge1", "m");
    let lab = lab
        .module("edge1", "sender")
        .env("edge1", "routes__m", route);
    let lab = lab.start().await.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    let (m, sender) = (Hello::of(&lab, "edge1/m"), Hello::of(&lab, "edge1/sender"));
    let mut client = door.admitted(&m).await;
    let filter = "devices/edge1/modules/m/#";
    assert_eq!(client.subscribe(1, &[(filter, 1)]).await, [1]);

    let mut source = door.admitted(&sender).await;
    let output = telemetry("edge1/sender") + "%24.on=out&%24.ct=text%2Fplain&temp=21";
    for (packet_id, body) in [(1, "one"), (2, "two"), (3, "three")] {
        source.publish(&output, body, packet_id).await;
    }
    let first = expect_inputs(&mut client, &["one", "two", "three"], false).await;
    let topic = &first[0].topic;
    let bag = topic.strip_prefix("devices/edge1/modules/m/inputs/in1/");
    let mut pairs: Vec<_> = bag.expect(topic).split('&').collect();
    pairs.sort_unstable();
    let expected = [
        "%24.cdid=edge1",
        "%24.cmid=sender",
        "%24.ct=text%2Fplain",
        "temp=21",
    ];
    assert_eq!(pairs, expected);
    let mut ids: Vec<u16> = first.iter().map(|publish| publish.pkid).collect();
    ids.dedup();
    assert!(ids.len() == 3 && !ids.contains(&0), "packet ids {ids:?}");
    drop(client);

    // Again, with nothing subscribed on this connection.
    let again: Vec<Publish> = first.iter().map(Publish::clone).map(duplicate).collect();
    let (mut client, present) = door.resumed(&m).await;
    assert!(present);
    assert_eq!(
        expect_inputs(&mut client, &["one", "two", "three"], true).await,
        again
    );
    lab.kill("edge1").await.expect("the hub is killed");
    assert_eq!(client.until_close().await, []);
    lab.start("edge1").await.expect("the hub starts");
    let (mut client, present) = door.resumed(&m).await;
    assert!(present);
    assert_eq!(
        expect_inputs(&mut client, &["one", "two", "three"], true).await,
        again
    );

    // Acknowledged from the last to the first, and one that nobody waits for. Then a new one, at
    // its first attempt.
    let unknown = if ids.contains(&60_000) {
        60_001
    } else {
        60_000
    };
    let acks = [unknown, ids[2], ids[1], ids[0]].map(puback);
    client.send(&acks.concat()).await;
    client.ping().await;
    let mut source = door.admitted(&sender).await;
    source.publish(&output, "four", 4).await;
    let fourth = expect_inputs(&mut client, &["four"], false).await.remove(0);
    client.send(&puback(fourth.pkid)).await;
    client.ping().await;
    client.disconnect().await;
    let (mut client, _) = door.resumed(&m).await;
    source.publish(&output, "five", 5).await;
    expect_inputs(&mut client, &["five"], false).await;
    lab.shutdown().await.expect("the lab ends");
}

/// The next packets are these messages for an input, at QoS 1, first attempts or not.
async fn expect_inputs(client: &mut MqttClient, bodies: &[&str], dup: bool) -> Vec<Publish> {
    let mut inputs = Vec::new();
    for body in bodies {
        let publish = client.expect_publish().await;
        assert_eq!(publish.payload, body.as_bytes(), "{publish:?}");
        let flags = (publish.qos, publish.dup, publish.retain);
        assert_eq!(flags, (QoS::AtLeastOnce, dup, false), "{body}");
        inputs.push(publish);
    }
    inputs
}

fn duplicate(publish: Publish) -> Publish {
    Publish {
        dup: true,
        ..publish
    }
}

/// Vectors 15 and 16: a connection ends because another one of the same identity begins, or
/// because the client is silent. Its will is routed, nothing acknowledged is lost, and the next
/// connection works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_vector_15_16_takeover_and_silence_close_and_route_the_will() {
    let lab = LabBuilder::new().layers(1).leaf("d1", "edge1");
    let lab = lab.leaf("d2", "edge1").start().await;
    let lab = lab.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    tokio::join!(takeover(&lab, &door), silence(&lab, &door));
    lab.shutdown().await.expect("the lab ends");
}

/// 15.
async fn takeover(lab: &Lab, door: &Door) {
    let own = telemetry("d1");
    let hello = Hello::of(lab, "d1");
    let mut first = door
        .admitted(&hello.clone().will(&own, "gone", false))
        .await;
    let numbered = |id: u16| publish(&own, QoS::AtLeastOnce, id, id.to_string().as_bytes());
    let in_flight: Vec<u8> = (1..=200).flat_map(numbered).collect();
    first.send(&in_flight).await;
    // In the middle of it.
    let mut second = door.admitted(&hello).await;
    let mut acknowledged = 0;
    for packet in first.until_close().await {
        match packet {
            Packet::PubAck(ack) if ack.pkid == acknowledged + 1 => acknowledged = ack.pkid,
            other => panic!("{other:?} instead of PUBACK {}", acknowledged + 1),
        }
    }
    // As a client does it: what was not acknowledged again, in order.
    for id in acknowledged + 1..=200 {
        second.publish(&own, id.to_string(), id).await;
    }
    second.publish(&own, "second", 201).await;
    second.ping().await;

    let entries = arrived(lab, "d1", "second").await;
    assert_will(&entries, "gone");
    let mut next = 1;
    for entry in &entries {
        let body = String::from_utf8(entry.body().expect("a body")).expect("text");
        if let Ok(number) = body.parse::<u16>() {
            assert!(number <= next, "{next} was overtaken by {number}");
            next = next.max(number + 1);
        }
    }
    assert_eq!(next, 201, "none is missing");
}

/// 16.
async fn silence(lab: &Lab, door: &Door) {
    let own = telemetry("d2");
    let hello = Hello::of(lab, "d2").keep_alive(10);
    let mut client = door
        .admitted(&hello.clone().will(&own, "silent", false))
        .await;
    // Counted from here on: what the client says, and not what it hears.
    client.ping().await;
    let begun = Instant::now();
    assert_eq!(client.until_close().await, []);
    let silent = begun.elapsed();
    let closed = Duration::from_millis(14_900)..Duration::from_secs(20);
    assert!(closed.contains(&silent), "closed after {silent:?}");
    door.admitted(&hello).await.publish(&own, "back", 1).await;
    let entries = arrived(lab, "d2", "back").await;
    assert_eq!(entries.len(), 2);
    assert_will(&entries, "silent");
}

/// What came from `id`, once the message with this body is there.
async fn arrived(lab: &Lab, id: &str, last: &str) -> Vec<LedgerEntry> {
    let ledger = lab.ledger();
    let last = edgehub_lab::Acknowledged::new(1, last.as_bytes()).sha256;
    let there = ledger.wait_until(PATIENCE, |arrivals| {
        let is_it = |arrival: &edgehub_lab::ledger::Arrival| arrival.is_from(id);
        arrivals
            .iter()
            .any(|arrival| is_it(arrival) && arrival.sha256 == last)
    });
    there.await.expect("it arrives");
    ledger.entries_of(id).expect("the ledger")
}

/// Exactly one is the will, marked as IoT Hub marks it and as the C# edgeHub does.
fn assert_will(entries: &[LedgerEntry], body: &str) {
    let is_will = |entry: &&LedgerEntry| entry.body().expect("a body") == body.as_bytes();
    let wills: Vec<_> = entries.iter().filter(is_will).collect();
    assert_eq!(wills.len(), 1, "wills");
    for mark in ["MessageType", "iothub-MessageType"] {
        assert_eq!(wills[0].properties[mark].as_deref(), Some("Will"), "{mark}");
    }
}
