//! The machine packet by packet: acknowledgements, every packet in every state, CONNECT, packets in
//! pieces (testing.md S4, S5; spec/mqtt.md 2, 7, 8).

use mqttbytes::v4::{ConnectReturnCode, Packet, SubAck, SubscribeReasonCode, UnsubAck};
use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::{ConnectAckReason, SubscribeReturnCode};

use super::machine::{CloseReason, Event};
use super::test_packets::*;

const TOPIC: &str = "devices/d1/messages/events/";

fn connack(peer: &mut Peer) -> ConnectReturnCode {
    match &peer.answers()[..] {
        [Packet::ConnAck(ack)] => ack.code,
        other => panic!("{other:?}"),
    }
}

// Acknowledgements

#[test]
fn acks_wait_for_their_commit_and_keep_the_order_of_arrival() {
    let mut peer = Peer::connected(60);
    let stream: Vec<u8> = [7, 3, 9]
        .iter()
        .flat_map(|id| publish1(TOPIC, *id, b"x"))
        .collect();
    let publishes = peer.publishes(&stream);
    assert_eq!(
        publishes.iter().map(|p| p.sequence).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    assert!(peer.acked().is_empty());
    peer.machine.committed(2);
    assert_eq!(peer.acked(), [7, 3]);
    assert_eq!(peer.machine.take_acks_written(), 2);
    peer.machine.committed(2);
    assert!(peer.acked().is_empty(), "nothing is acknowledged twice");
    peer.machine.committed(3);
    assert_eq!(peer.acked(), [9]);
    assert_eq!(peer.machine.in_flight(), 0);
}

#[test]
fn a_dropped_publish_is_acknowledged_in_its_turn() {
    let mut peer = Peer::connected(60);
    let stream: Vec<u8> = (1..=4).flat_map(|id| publish1(TOPIC, id, b"x")).collect();
    peer.publishes(&stream);
    peer.machine.handled(1);
    assert_eq!(peer.acked(), [1], "nothing is in front of it");
    peer.machine.handled(3);
    assert!(peer.acked().is_empty(), "2 is not committed");
    peer.machine.committed(2);
    assert_eq!(peer.acked(), [2, 3]);
    peer.machine.handled(4);
    assert_eq!(peer.acked(), [4]);
}

#[test]
fn qos_0_is_not_acknowledged_and_the_bits_are_passed_on() {
    let mut peer = Peer::connected(60);
    let mut stream = publish0(TOPIC, b"");
    stream.extend(publish_with(0x3b, TOPIC, 5, b"again"));
    let publishes = peer.publishes(&stream);
    let bits = |index: usize| {
        let p = &publishes[index];
        (p.acknowledged, p.duplicate, p.retain, &p.payload[..])
    };
    assert_eq!(bits(0), (false, false, false, &b""[..]));
    assert_eq!(bits(1), (true, true, true, &b"again"[..]));
    assert_eq!(&publishes[1].topic[..], TOPIC);
    peer.machine.committed(2);
    assert_eq!(peer.acked(), [5]);
}

#[test]
fn a_resent_id_that_is_still_pending_is_its_own_publish() {
    // Old C SDKs resend on a live connection (spec/mqtt.md 13.3).
    let mut peer = Peer::connected(60);
    peer.publishes(&publish1(TOPIC, 5, b"x"));
    let again = peer.publishes(&publish_with(0x3a, TOPIC, 5, b"x"));
    assert!(again[0].duplicate);
    peer.machine.committed(2);
    assert_eq!(peer.acked(), [5, 5]);
}

#[test]
fn pings_and_subscriptions_never_wait_for_commits() {
    let mut peer = Peer::connected(60);
    let mut stream = publish1(TOPIC, 1, b"x");
    stream.extend(PINGREQ);
    stream.extend(subscribe(2, &[("$iothub/methods/POST/#", 0), ("#", 2)]));
    stream.extend(unsubscribe(3, &["a/+/b"]));
    stream.extend(publish1(TOPIC, 4, b"x"));
    let events = peer.feed(&stream);
    let [
        Event::Publish(_),
        subscribe @ Event::Subscribe { filters, .. },
        unsubscribe,
        Event::Publish(_),
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    let filters: Vec<_> = filters
        .iter()
        .map(|(filter, qos)| (&**filter, *qos))
        .collect();
    let expected = [
        ("$iothub/methods/POST/#", QoS::AtMostOnce),
        ("#", QoS::ExactlyOnce),
    ];
    assert_eq!(filters, expected);
    assert_eq!(peer.answers(), [Packet::PingResp]);
    let granted = SubscribeReturnCode::Success(QoS::AtLeastOnce);
    peer.answer(subscribe, &[granted, SubscribeReturnCode::Failure]);
    peer.answer(unsubscribe, &[]);
    let codes = vec![
        SubscribeReasonCode::Success(mqttbytes::QoS::AtLeastOnce),
        SubscribeReasonCode::Failure,
    ];
    let answers = [
        Packet::SubAck(SubAck::new(2, codes)),
        Packet::UnsubAck(UnsubAck::new(3)),
    ];
    assert_eq!(peer.answers(), answers);
    peer.machine.committed(2);
    assert_eq!(peer.acked(), [1, 4]);
}

#[test]
fn nothing_is_acknowledged_after_the_end() {
    let mut peer = Peer::connected(60);
    let mut stream = publish1(TOPIC, 1, b"x");
    stream.extend(DISCONNECT);
    stream.extend(publish1(TOPIC, 2, b"x"));
    let events = peer.feed(&stream);
    assert!(matches!(
        events[..],
        [Event::Publish(_), Event::Close(CloseReason::Disconnected)]
    ));
    assert!(
        peer.feed(&PINGREQ).is_empty(),
        "the rest of the stream is discarded"
    );
    peer.machine.committed(1);
    assert!(peer.answers().is_empty());
    assert!(!peer.machine.wants_input());
}

// Every packet in every state

/// Every packet type, well-formed, and what it does in a connected session.
fn every_packet() -> Vec<(&'static str, Vec<u8>, Option<CloseReason>)> {
    let unexpected = |name| Some(CloseReason::Unexpected(name));
    vec![
        ("CONNECT", connect(60), Some(CloseReason::SecondConnect)),
        ("CONNACK", packet(0x20, &[0, 0]), unexpected("CONNACK")),
        ("PUBLISH 0", publish0(TOPIC, b"x"), None),
        ("PUBLISH 1", publish1(TOPIC, 1, b"x"), None),
        (
            "PUBLISH 2",
            publish_with(0x34, TOPIC, 1, b"x"),
            Some(CloseReason::QoS2),
        ),
        ("PUBACK", ack(0x40, 1), None),
        ("PUBREC", ack(0x50, 1), unexpected("PUBREC")),
        ("PUBREL", ack(0x62, 1), unexpected("PUBREL")),
        ("PUBCOMP", ack(0x70, 1), unexpected("PUBCOMP")),
        ("SUBSCRIBE", subscribe(1, &[("a", 0)]), None),
        ("SUBACK", packet(0x90, &[0, 1, 0]), unexpected("SUBACK")),
        ("UNSUBSCRIBE", unsubscribe(1, &["a"]), None),
        ("UNSUBACK", ack(0xb0, 1), unexpected("UNSUBACK")),
        ("PINGREQ", PINGREQ.to_vec(), None),
        ("PINGRESP", vec![0xd0, 0], unexpected("PINGRESP")),
        (
            "DISCONNECT",
            DISCONNECT.to_vec(),
            Some(CloseReason::Disconnected),
        ),
    ]
}

fn closed(events: &[Event]) -> Option<CloseReason> {
    match events.last() {
        Some(Event::Close(reason)) => Some(*reason),
        _ => None,
    }
}

#[test]
fn before_connect_everything_else_closes_without_an_answer() {
    for (name, bytes, _) in every_packet() {
        let mut peer = Peer::new();
        let events = peer.feed(&bytes);
        match name {
            "CONNECT" => assert!(matches!(events[..], [Event::Connect(_)])),
            _ => assert_eq!(closed(&events), Some(CloseReason::FirstPacket), "{name}"),
        }
        assert!(peer.answers().is_empty(), "{name}");
    }
}

#[test]
fn while_connect_is_judged_packets_wait_and_reading_stops() {
    for (name, bytes, then) in every_packet() {
        let mut peer = Peer::deciding(60);
        assert!(peer.machine.wants_input());
        assert!(peer.feed(&bytes).is_empty(), "{name}");
        assert!(!peer.machine.wants_input(), "{name}");
        assert!(peer.answers().is_empty(), "{name}");
        peer.machine.accept(true, peer.now);
        let events = peer.events();
        assert_eq!(closed(&events), then, "{name}");
        assert!(matches!(
            &peer.answers()[0],
            Packet::ConnAck(ack) if ack.code == ConnectReturnCode::Success && ack.session_present
        ));
    }
}

#[test]
fn after_a_refusal_nothing_is_processed() {
    for (name, bytes, _) in every_packet() {
        let mut peer = Peer::deciding(60);
        peer.feed(&bytes);
        peer.machine.refuse(ConnectAckReason::NotAuthorized);
        assert!(peer.events().is_empty(), "{name}");
        assert_eq!(
            connack(&mut peer),
            ConnectReturnCode::NotAuthorized,
            "{name}"
        );
        assert!(!peer.machine.wants_input());
        peer.machine.accept(false, peer.now);
        assert!(peer.answers().is_empty(), "a refusal cannot be taken back");
    }
}

#[test]
fn every_packet_does_in_a_session_what_the_contract_says() {
    for (name, bytes, then) in every_packet() {
        let mut peer = Peer::connected(60);
        let events = peer.feed(&bytes);
        assert_eq!(closed(&events), then, "{name}");
        let handed_out = events.iter().any(|event| {
            matches!(
                event,
                Event::Publish(_) | Event::Subscribe { .. } | Event::Unsubscribe { .. }
            )
        });
        let expected = ["PUBLISH 0", "PUBLISH 1", "SUBSCRIBE", "UNSUBSCRIBE"];
        assert_eq!(handed_out, expected.contains(&name), "{name}");
        let answered = usize::from(name == "PINGREQ");
        assert_eq!(peer.answers().len(), answered, "{name}");
    }
}

#[test]
fn a_later_packet_of_a_closed_stream_has_no_effect() {
    for (_, bytes, then) in every_packet()
        .into_iter()
        .filter(|(.., then)| then.is_some())
    {
        let mut peer = Peer::connected(60);
        let stream = [bytes, publish1(TOPIC, 1, b"x"), PINGREQ.to_vec()].concat();
        assert_eq!(peer.feed(&stream), [Event::Close(then.unwrap())]);
        assert!(peer.answers().is_empty());
    }
}

// CONNECT, and packets in pieces

#[test]
fn connect_is_answered_or_closed_as_the_contract_says() {
    let mut level5 = connect(60);
    level5[8] = 5;
    let cases = [
        (
            level5,
            CloseReason::ProtocolLevel,
            ConnectReturnCode::RefusedProtocolVersion,
        ),
        (
            connect_with(0x02, 60, &[field("")]),
            CloseReason::Refused,
            ConnectReturnCode::BadClientId,
        ),
        (
            connect_with(0x00, 60, &[field("")]),
            CloseReason::Refused,
            ConnectReturnCode::BadClientId,
        ),
    ];
    for (bytes, reason, code) in cases {
        let mut peer = Peer::new();
        assert_eq!(peer.feed(&bytes), [Event::Close(reason)]);
        assert_eq!(connack(&mut peer), code);
    }
    let mut silent = vec![
        packet(
            0x10,
            &[field("MQIsdp"), vec![3, 2, 0, 60], field("d")].concat(),
        ),
        packet(
            0x10,
            &[field("mqtt"), vec![4, 2, 0, 60], field("d")].concat(),
        ),
        connect_with(0x02, 60, &[field("d"), vec![0]]),
        connect_with(0x02, 60, &[field("d\0")]),
        connect_with(0x02, 60, &[field(b"\xff")]),
        connect_with(0x06, 60, &[field("d"), field("a/+"), field("will")]),
        connect_with(0x06, 60, &[field("d"), field(""), field("will")]),
        connect_with(0xc0, 60, &[field("d"), field("u")]),
        packet(0x10, &[]),
        vec![0x1f, 0],
    ];
    for flags in [0x03, 0x42, 0x0a, 0x22, 0x1e] {
        let payload = [field("d"), field("t"), field("w"), field("u"), field("p")];
        silent.push(connect_with(flags, 60, &payload));
    }
    for bytes in silent {
        let mut peer = Peer::new();
        let events = peer.feed(&bytes);
        assert!(
            matches!(events[..], [Event::Close(CloseReason::Malformed(_))]),
            "{bytes:02x?}"
        );
        assert!(peer.answers().is_empty());
    }
}

#[test]
fn connect_hands_out_what_it_says() {
    let mut peer = Peer::new();
    let will = [
        field("d1"),
        field("t"),
        field([0u8; 300]),
        field("user"),
        field("token"),
    ];
    let events = peer.feed(&connect_with(0xee, 60, &will));
    let [Event::Connect(request)] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(request.client_id, "d1");
    assert_eq!(request.user_name.as_deref(), Some("user"));
    assert_eq!(request.password.as_deref(), Some("token"));
    assert!(request.clean_session);
    assert!(!format!("{request:?}").contains("token"));
    let will = request.will.as_ref().unwrap();
    assert_eq!((will.topic.as_str(), will.retain), ("t", true));
    assert_eq!(&will.payload[..], [0u8; 300]);

    let mut peer = Peer::new();
    let events = peer.feed(&connect_with(
        0xc0,
        60,
        &[field("d1"), field("u"), field("")],
    ));
    let [Event::Connect(request)] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(request.password, None, "an empty password is none");
    assert_eq!(request.will, None);
    assert!(!request.clean_session);
}

#[test]
fn one_byte_at_a_time_makes_no_difference() {
    let mut stream = connect(60);
    let after_connect = stream.len();
    for (_, bytes, then) in every_packet() {
        if then.is_none() {
            stream.extend(bytes);
        }
    }
    stream.extend(publish1(TOPIC, 9, &[5; 300]));
    stream.extend(DISCONNECT);
    let run = |parts: Vec<&[u8]>| {
        let mut peer = Peer::new();
        let mut seen = Vec::new();
        let mut answers = Vec::new();
        for part in parts {
            peer.machine.receive(part, peer.now);
            while let Some(event) = peer.machine.poll() {
                if let Event::Connect(_) = event {
                    peer.machine.accept(false, peer.now);
                }
                match &event {
                    Event::Publish(publish) => peer.machine.committed(publish.sequence),
                    Event::Subscribe { .. } | Event::Unsubscribe { .. } => {
                        peer.answer(&event, &[SubscribeReturnCode::Failure]);
                    }
                    _ => {}
                }
                seen.push(format!("{event:?}"));
            }
            answers.extend(peer.answers());
        }
        (seen, answers)
    };
    let whole = run(vec![&stream]);
    assert_eq!(whole.0.len(), 7, "{:?}", whole.0);
    assert_eq!(run(stream.chunks(1).collect()), whole);
    let (head, tail) = stream.split_at(after_connect + 1);
    assert_eq!(run(vec![head, tail]), whole);
}
