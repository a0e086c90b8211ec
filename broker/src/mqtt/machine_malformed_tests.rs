//! Packets that are not MQTT 3.1.1, and topics that only look so (testing.md S3, S4;
//! spec/mqtt.md 9.2).

use super::machine::{CloseReason, Event};
use super::test_packets::*;

fn malformed(text: &'static str) -> CloseReason {
    CloseReason::Malformed(text)
}

#[test]
fn what_is_not_mqtt_closes_and_leaves_nothing_behind() {
    let cases: Vec<(Vec<u8>, CloseReason)> = vec![
        (publish1("", 1, b"x"), malformed("empty topic")),
        (
            publish1("a/+", 1, b"x"),
            malformed("wildcard or NUL in a topic"),
        ),
        (
            publish1("+a", 1, b"x"),
            malformed("wildcard or NUL in a topic"),
        ),
        (
            publish0("a/#", b"x"),
            malformed("wildcard or NUL in a topic"),
        ),
        (
            publish1("a\0b", 1, b"x"),
            malformed("wildcard or NUL in a topic"),
        ),
        (
            publish_with(0x32, b"a\xff", 1, b"x"),
            malformed("text is not UTF-8"),
        ),
        // A surrogate in UTF-8 (MQTT-1.5.3-1).
        (
            publish_with(0x32, b"a\xed\xa0\x80", 1, b"x"),
            malformed("text is not UTF-8"),
        ),
        (publish1("a", 0, b"x"), malformed("packet")),
        (
            publish_with(0x36, "a", 1, b"x"),
            malformed("fixed header flags"),
        ),
        (
            publish_with(0x38, "a", 0, b"x"),
            malformed("fixed header flags"),
        ),
        // The topic, and then the packet id, lie beyond the packet.
        (packet(0x30, &[0xff, 0xff, b'a']), malformed("length")),
        (packet(0x30, &[0, 2, b'a']), malformed("length")),
        (packet(0x30, &[0]), malformed("length")),
        (packet(0x30, &[]), malformed("length")),
        (packet(0x32, &[0, 1, b'a', 0]), malformed("length")),
        (subscribe(0, &[("a", 0)]), malformed("packet")),
        (subscribe(1, &[]), malformed("no topic filter")),
        (subscribe(1, &[("", 0)]), malformed("topic filter")),
        (
            subscribe(1, &[("a", 0), ("a#", 0)]),
            malformed("topic filter"),
        ),
        (subscribe(1, &[("a", 3)]), malformed("SUBSCRIBE options")),
        (subscribe(1, &[("a", 0x80)]), malformed("SUBSCRIBE options")),
        (
            packet(0x80, &[0, 1, 0, 1, b'a', 0]),
            malformed("fixed header flags"),
        ),
        (packet(0x82, &[0, 1, 0, 1, b'a']), malformed("length")),
        (packet(0x82, &[0]), malformed("length")),
        (unsubscribe(0, &["a"]), malformed("packet")),
        (unsubscribe(1, &[]), malformed("no topic filter")),
        (unsubscribe(1, &["#/a"]), malformed("topic filter")),
        (packet(0xa2, &[0, 1, 0, 9, b'a']), malformed("length")),
        (packet(0xc0, &[0]), malformed("bytes in an empty packet")),
        (packet(0xe0, &[0]), malformed("bytes in an empty packet")),
        (packet(0x40, &[0, 1, 0]), malformed("length")),
        (packet(0x40, &[0]), malformed("length")),
        (packet(0x40, &[0, 0]), malformed("packet")),
        (packet(0x00, &[]), malformed("packet type")),
        (packet(0xf0, &[]), malformed("packet type")),
        (
            vec![0x30, 0x80, 0x80, 0x80, 0x80, 0x01],
            malformed("remaining length"),
        ),
    ];
    for (bytes, reason) in cases {
        let mut peer = Peer::connected(60);
        assert_eq!(peer.feed(&bytes), [Event::Close(reason)], "{bytes:02x?}");
        assert!(peer.answers().is_empty(), "{bytes:02x?}");
        assert_eq!(peer.machine.in_flight(), 0);
    }
}

#[test]
fn topics_of_our_own_and_odd_ones_are_for_the_driver_to_judge() {
    for topic in [
        "$SYS/x",
        "$internal",
        "$edgehub/x",
        "/",
        "a//b",
        "\u{feff}a",
        &"/".repeat(65_535),
    ] {
        let mut peer = Peer::connected(60);
        let publishes = peer.publishes(&publish1(topic, 1, b"x"));
        assert_eq!(&publishes[0].topic[..], topic);
    }
}
