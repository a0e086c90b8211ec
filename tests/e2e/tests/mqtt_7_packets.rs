//! Acceptance 7 of the MQTT side, S4 of the security tests: every packet in every state, and every
//! way in which a packet can be malformed.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::bystander::Bystander;
use edgehub_tests::mqtt::{
    Door, Hello, MqttClient, code, field, frame, ping, puback, publish, subscribe, telemetry,
    unsubscribe,
};
use edgehub_tests::only_these_arrive;
use mqttbytes::QoS;
use mqttbytes::v4::Packet;

/// What the hub does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It closes, and says nothing.
    Closes,
    /// It answers with a packet of this type.
    Answers(u8),
    /// It does nothing.
    Ignores,
}

/// S4: every type of packet, in every state, and every way in which a packet can be malformed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s04_every_packet_in_every_state() {
    let lab = LabBuilder::new().layers(1).leaf("bystander", "edge1");
    let lab = lab.leaf("leaf1", "edge1").leaf("leaf2", "edge1");
    let lab = lab.start().await.expect("the lab starts");
    let bystander = Bystander::connect(&lab, "bystander").await;
    let door = Door::of(&lab, "edge1");
    let hello = Hello::of(&lab, "leaf1");
    let types = every_type(&hello);
    let mut cases = malformed_packets();
    cases.extend(types.clone());

    // Nothing but CONNECT may come first.
    for (what, bytes, _) in cases.iter().filter(|(what, ..)| what != "CONNECT") {
        println!("first: {what}");
        door.open().await.expect_close_after(bytes).await;
    }
    for (what, bytes) in malformed_connects(&hello) {
        println!("first: CONNECT {what}");
        door.open().await.expect_close_after(&bytes).await;
    }
    // While CONNECT is judged, and connected: the same, behind CONNACK.
    for (what, bytes, then) in &cases {
        for with_connect in [true, false] {
            println!("{what}, together with CONNECT: {with_connect}");
            let mut client = door.open().await;
            if with_connect {
                client.send(&[hello.packet(), bytes.clone()].concat()).await;
                assert_eq!(client.connack().await, Some(code::ACCEPTED), "{what}");
            } else {
                client.send(&hello.packet()).await;
                assert_eq!(client.connack().await, Some(code::ACCEPTED), "{what}");
                client.send(bytes).await;
            }
            expect(client, *then, what).await;
        }
    }
    // `$` topics are topics that nobody has: acknowledged, dropped, counted; nobody hears of them.
    let mut other = door.admitted(&Hello::of(&lab, "leaf2")).await;
    assert_eq!(other.subscribe(1, &[("#", 1)]).await, [1]);
    let mut client = door.admitted(&hello).await;
    let nobodys = [
        "$SYS/broker/uptime",
        "$internal/x",
        "$edgehub/x",
        "$CONTROL/dynamic-security/v1",
        "$iothub/methods/POST/reboot/?$rid=1",
        "$iothub/methods/res/200/?$rid=1",
        "$iothub/methods/res/",
        "$iothub/twin",
        "$",
        "/",
        "devices/leaf2/messages/devicebound/x",
    ];
    let before = unknown_topics(&lab).await;
    for (packet_id, topic) in (1..).zip(nobodys) {
        client.publish(topic, "x", packet_id).await;
    }
    // The answer to a method that nobody called is no unknown topic.
    let counted = unknown_topics(&lab).await - before;
    assert_eq!(counted, nobodys.len() as f64 - 1.0);
    client.publish(&telemetry("leaf1"), "\u{feff}", 20).await;
    other.ping().await;
    let twins = [
        "$iothub/twin/get/?$rid=1",
        "$iothub/twin/GET/",
        "$iothub/twin/GET/x/?$rid=1",
    ];
    for topic in twins
        .into_iter()
        .chain(["$iothub/twin/", "$iothub/twin/PATCH/properties/desired/"])
    {
        let bytes = publish(topic, QoS::AtLeastOnce, 1, b"{}");
        println!("{topic}");
        door.admitted(&hello).await.expect_close_after(&bytes).await;
    }
    only_these_arrive(&lab, "leaf1", &["\u{feff}"]).await;
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

async fn unknown_topics(lab: &Lab) -> f64 {
    let metrics = lab.metrics("edge1").await.expect("metrics");
    let labels = [("reason", "unknown_topic"), ("from", "leaf1")];
    metrics.sum("edgehub_messages_dropped_total", &labels)
}

/// What the hub does on a connection that it has accepted.
async fn expect(mut client: MqttClient, then: Then, what: &str) {
    match then {
        Then::Closes => assert_eq!(client.until_close().await, [], "{what}"),
        Then::Ignores => client.ping().await,
        Then::Answers(packet_type) => {
            let answer = client.next().await;
            let found = match &answer {
                Some(Packet::PubAck(_)) => 4,
                Some(Packet::SubAck(_)) => 9,
                Some(Packet::UnsubAck(_)) => 11,
                Some(Packet::PingResp) => 13,
                _ => 0,
            };
            assert_eq!(found, packet_type, "{what}: {answer:?}");
            client.ping().await;
        }
    }
}

type Case = (String, Vec<u8>, Then);

/// One well-formed packet of every type.
fn every_type(hello: &Hello) -> Vec<Case> {
    let case = |what: &str, bytes: &[u8], then| (what.to_owned(), bytes.to_vec(), then);
    let q0 = publish("foo/bar", QoS::AtMostOnce, 0, b"x");
    let q1 = publish("foo/bar", QoS::AtLeastOnce, 7, b"x");
    let q2 = publish("foo/bar", QoS::ExactlyOnce, 7, b"x");
    vec![
        case("type 0", &[0x00, 0], Then::Closes),
        case("CONNECT", &hello.packet(), Then::Closes),
        case("CONNACK", &[0x20, 2, 0, 0], Then::Closes),
        case("PUBLISH q0", &q0, Then::Ignores),
        case("PUBLISH q1", &q1, Then::Answers(4)),
        case("PUBLISH q2", &q2, Then::Closes),
        case("PUBACK", &puback(9), Then::Ignores),
        case("PUBREC", &[0x50, 2, 0, 9], Then::Closes),
        case("PUBREL", &[0x62, 2, 0, 9], Then::Closes),
        case("PUBCOMP", &[0x70, 2, 0, 9], Then::Closes),
        case("SUBSCRIBE", &subscribe(3, "foo/bar"), Then::Answers(9)),
        case("SUBACK", &[0x90, 3, 0, 9, 0], Then::Closes),
        case(
            "UNSUBSCRIBE",
            &unsubscribe(4, &["foo/bar"]),
            Then::Answers(11),
        ),
        case("UNSUBACK", &[0xb0, 2, 0, 9], Then::Closes),
        case("PINGREQ", &ping(), Then::Answers(13)),
        case("PINGRESP", &[0xd0, 0], Then::Closes),
        case("DISCONNECT", &[0xe0, 0], Then::Closes),
        case("type 15", &[0xf0, 0], Then::Closes),
    ]
}

/// Packets that break a rule each; every one closes the connection.
fn malformed_packets() -> Vec<Case> {
    let topic = field(b"foo/bar");
    let id = [0, 7].as_slice();
    let publish = |first: u8, topic: &[u8]| frame(first, &[&field(topic), id, b"x"].concat());
    let subscribe =
        |filter: &[u8], options: u8| frame(0x82, &[id, &field(filter), &[options]].concat());
    let unsubscribe = |filter: &[u8]| frame(0xa2, &[id, &field(filter)].concat());
    let mut cases = vec![
        ("PUBLISH with QoS 3", publish(0x36, b"foo/bar")),
        ("PUBLISH with DUP at QoS 0", publish(0x38, b"foo/bar")),
        (
            "PUBLISH with packet id 0",
            frame(0x32, &[&topic, [0, 0].as_slice()].concat()),
        ),
        ("PUBLISH without packet id", frame(0x32, &topic)),
        ("PUBLISH without topic", frame(0x30, &[])),
        ("PUBLISH with an empty topic", publish(0x32, b"")),
        (
            "PUBLISH with a topic beyond its end",
            frame(0x32, &[0xff, 0xff, b'a']),
        ),
        ("PUBLISH to +", publish(0x32, b"devices/+/messages/events/")),
        ("PUBLISH to #", publish(0x32, b"#")),
        ("PUBLISH with NUL", publish(0x32, b"foo\0bar")),
        ("PUBLISH with broken UTF-8", publish(0x32, b"foo\xc3(")),
        (
            "PUBLISH with a surrogate",
            publish(0x32, b"foo\xed\xa0\x80"),
        ),
        (
            "PUBLISH with an overlong form",
            publish(0x32, b"foo\xc0\xaf"),
        ),
        ("PUBACK with packet id 0", vec![0x40, 2, 0, 0]),
        ("PUBACK that is short", vec![0x40, 1, 9]),
        ("PUBACK that is long", vec![0x40, 3, 0, 9, 0]),
        (
            "SUBSCRIBE with packet id 0",
            frame(0x82, &[&[0, 0], &*topic, &[1]].concat()),
        ),
        ("SUBSCRIBE without filter", frame(0x82, id)),
        (
            "SUBSCRIBE without options",
            frame(0x82, &[id, &topic].concat()),
        ),
        ("SUBSCRIBE with QoS 3", subscribe(b"foo/bar", 3)),
        (
            "SUBSCRIBE with reserved options",
            subscribe(b"foo/bar", 0x81),
        ),
        ("SUBSCRIBE to an empty filter", subscribe(b"", 1)),
        ("SUBSCRIBE with NUL", subscribe(b"foo\0", 1)),
        ("SUBSCRIBE with broken UTF-8", subscribe(b"foo\xff", 1)),
        ("SUBSCRIBE to 51 filters", {
            let filter = [&*topic, &[1]].concat();
            frame(0x82, &[id, &filter.repeat(51)].concat())
        }),
        (
            "UNSUBSCRIBE with packet id 0",
            frame(0xa2, &[&[0, 0], &*topic].concat()),
        ),
        ("UNSUBSCRIBE without filter", frame(0xa2, id)),
        ("UNSUBSCRIBE of a#", unsubscribe(b"a#")),
        ("UNSUBSCRIBE of an empty filter", unsubscribe(b"")),
        ("PINGREQ with a body", vec![0xc0, 1, 0]),
        ("DISCONNECT with a body", vec![0xe0, 1, 0]),
        (
            "a length of five bytes",
            vec![0x30, 0x80, 0x80, 0x80, 0x80, 0x01],
        ),
        (
            "a length over the limit",
            vec![0x30, 0xff, 0xff, 0xff, 0x7f],
        ),
    ];
    for filter in ["a+/b", "a#", "#/a", "a/#/b", "+a", "a/b#"] {
        cases.push((
            "SUBSCRIBE to a malformed filter",
            subscribe(filter.as_bytes(), 1),
        ));
    }
    // Flags of the fixed header that the type does not have (MQTT-2.2.2-2).
    for (first, body) in [
        (0x41, &[0, 9][..]),
        (0x80, &subscribe(b"foo/bar", 1)[2..]),
        (0x83, &subscribe(b"foo/bar", 1)[2..]),
        (0xa0, &unsubscribe(b"foo/bar")[2..]),
        (0xc1, &[]),
        (0xe8, &[]),
        (0x60, &[0, 9]),
    ] {
        cases.push(("reserved flags", frame(first, body)));
    }
    let closes = |(what, bytes): (&str, _)| (what.to_owned(), bytes, Then::Closes);
    cases.into_iter().map(closes).collect()
}

/// CONNECT packets that break a rule each; no CONNACK is sent for them.
fn malformed_connects(hello: &Hello) -> Vec<(&'static str, Vec<u8>)> {
    let head = |flags: u8| [field(b"MQTT"), vec![4, flags, 0, 60]].concat();
    let id = field(b"leaf1");
    let user = field(hello.user_name.as_bytes());
    let password = field(hello.password.as_bytes());
    let packet = |parts: &[&[u8]]| frame(0x10, &parts.concat());
    let will = [field(b"devices/leaf1/messages/events/"), field(b"gone")].concat();
    vec![
        (
            "with the reserved flag",
            packet(&[&head(0xc1), &id, &user, &password]),
        ),
        (
            "with a password and no user name",
            packet(&[&head(0x40), &id, &password]),
        ),
        (
            "with the will's QoS and no will",
            packet(&[&head(0xc8), &id, &user, &password]),
        ),
        (
            "with the will's RETAIN and no will",
            packet(&[&head(0xe0), &id, &user, &password]),
        ),
        (
            "with a will of QoS 3",
            packet(&[&head(0xdc), &id, &will, &user, &password]),
        ),
        ("with a will to +", {
            let will = [field(b"devices/leaf1/+"), field(b"gone")].concat();
            packet(&[&head(0xcc), &id, &will, &user, &password])
        }),
        (
            "with bytes behind",
            packet(&[&head(0xc0), &id, &user, &password, b"x"]),
        ),
        (
            "without the password it promises",
            packet(&[&head(0xc0), &id, &user]),
        ),
        ("without client id", packet(&[&head(0x02)])),
        (
            "with broken UTF-8",
            packet(&[&head(0xc0), &field(b"leaf\xff"), &user, &password]),
        ),
        (
            "with NUL",
            packet(&[&head(0xc0), &field(b"leaf1\0"), &user, &password]),
        ),
        (
            "of another protocol",
            packet(&[&field(b"mqtt"), &[4, 0xc0, 0, 60], &id, &user, &password]),
        ),
        (
            "with flags in its first byte",
            frame(0x11, &[&*head(0xc0), &id, &user, &password].concat()),
        ),
    ]
}
