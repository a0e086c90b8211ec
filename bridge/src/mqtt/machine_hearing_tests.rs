//! Tests of the client machine: what the server sends unasked, subscriptions, publishes at QoS 0.

use super::tests::{SECOND, connected, puback, sent, start};
use super::*;
use crate::mqtt::terms::PublishError;

#[test]
fn publishes_from_the_hub_are_handed_out_and_acknowledged_only_when_told() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    machine
        .receive(now, &[0x3a, 6, 0, 1, b't', 0, 9, b'x'])
        .unwrap();
    machine.receive(now, &[0x30, 3, 0, 1, b'u']).unwrap();
    machine.receive(now, &[0x34, 5, 0, 1, b'v', 0, 10]).unwrap();
    assert!(machine.output().is_empty());
    let received = |topic: &str, payload: &'static [u8], id, is_exactly_once, dup| {
        Some(MachineEvent::Publish(Received {
            topic: topic.to_owned(),
            payload: Bytes::from_static(payload),
            packet_id: NonZeroU16::new(id),
            is_exactly_once,
            dup,
        }))
    };
    assert_eq!(machine.poll_event(), received("t", b"x", 9, false, true));
    assert_eq!(machine.poll_event(), received("u", b"", 0, false, false));
    assert_eq!(machine.poll_event(), received("v", b"", 10, true, false));
    assert_eq!(machine.poll_event(), None);
    machine.acknowledge(now, NonZeroU16::new(9).unwrap());
    assert_eq!(machine.output(), puback(9));
}

fn filters(names: &[(&str, bool)]) -> Vec<(String, bool)> {
    names
        .iter()
        .map(|(name, qos)| ((*name).to_owned(), *qos))
        .collect()
}

/// Answers the only packet in the output, which has to be SUBSCRIBE or UNSUBSCRIBE.
fn answer_change(machine: &mut Machine, now: Instant, codes: &[u8]) -> Result<(), MachineError> {
    let packets = sent(machine);
    let (packet_id, first) = match packets.as_slice() {
        [Decoded::Packet(Packet::Subscribe { packet_id, .. }, _)] => (packet_id, 0x90),
        [Decoded::Packet(Packet::Unsubscribe { packet_id, .. }, _)] => (packet_id, 0xb0),
        other => panic!("{other:?}"),
    };
    let mut packet = vec![first, u8::try_from(codes.len() + 2).unwrap()];
    packet.extend_from_slice(&packet_id.get().to_be_bytes());
    packet.extend_from_slice(codes);
    machine.receive(now, &packet)
}

#[test]
fn subscriptions_change_one_packet_at_a_time() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    let wanted = filters(&[("a/#", true), ("b/#", false)]);
    machine.subscribe(now, wanted.clone()).unwrap();
    assert!(!machine.can_change_subscriptions());
    assert_eq!(machine.subscribe(now, wanted), Err(MachineError::Busy));
    assert_eq!(
        machine.unsubscribe(now, ["a/#".to_owned()]),
        Err(MachineError::Busy)
    );
    let mut peeked = CodecBuffer::new();
    peeked.extend_from_slice(machine.output());
    let Some(Decoded::Packet(Packet::Subscribe { topic_filters, .. }, _)) =
        Codec::new().decode(&mut peeked).unwrap()
    else {
        panic!("no SUBSCRIBE")
    };
    let expected = [("a/#", QoS::AtLeastOnce), ("b/#", QoS::AtMostOnce)];
    assert_eq!(
        topic_filters,
        expected.map(|(name, qos)| (name.into(), qos))
    );
    answer_change(&mut machine, now, &[1, 0x80]).unwrap();
    let subscribed = MachineEvent::Subscribed(vec![true, false]);
    assert_eq!(machine.poll_event(), Some(subscribed));
    machine.unsubscribe(now, ["a/#".to_owned()]).unwrap();
    answer_change(&mut machine, now, &[]).unwrap();
    assert_eq!(machine.poll_event(), Some(MachineEvent::Unsubscribed));
    assert!(machine.can_change_subscriptions());
}

#[test]
fn an_answer_that_fits_no_change_ends_the_connection() {
    let now = start();
    // Another id, too few codes, UNSUBACK for SUBSCRIBE, and nothing asked at all.
    for (asks, packet) in [
        (true, &[0x90, 3, 0, 1, 0][..]),
        (true, &[0x90, 2, 0xff, 0]),
        (true, &[0xb0, 2, 0xff, 0]),
        (false, &[0x90, 3, 0xff, 0, 0]),
        (false, &[0xb0, 2, 0xff, 0]),
    ] {
        let mut machine = connected(MachineConfig::default(), now);
        if asks {
            machine.subscribe(now, filters(&[("a/#", true)])).unwrap();
        }
        let error = machine.receive(now, packet).unwrap_err();
        let is_unknown = matches!(error, MachineError::UnknownSubscription(_));
        assert!(is_unknown, "{packet:?}: {error}");
    }
}

#[test]
fn a_suback_that_never_comes_ends_the_connection_although_pings_are_answered() {
    let mut now = start();
    let begin = now;
    let mut machine = connected(MachineConfig::default(), now);
    machine.subscribe(now, filters(&[("a/#", true)])).unwrap();
    sent(&mut machine);
    let error = loop {
        now = machine.next_timeout().unwrap();
        if let Err(error) = machine.handle_timeout(now) {
            break error;
        }
        machine.receive(now, &[0xd0, 0]).unwrap();
        assert!(now < begin + 60 * SECOND, "it is waited for without end");
    };
    assert_eq!(error, MachineError::SubackTimeout(20 * SECOND));
    assert_eq!(now, begin + 20 * SECOND);
}

#[test]
fn a_link_that_owes_answers_is_watched_as_closely_as_one_with_publishes() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    let topic = "$iothub/twin/GET/?$rid=1".to_owned();
    machine.publish_unacknowledged(now, topic, b"").unwrap();
    assert_eq!(machine.next_timeout(), Some(now + 40 * SECOND));
    machine.await_answers(now, true);
    assert_eq!(machine.next_timeout(), Some(now + 10 * SECOND));
    machine.await_answers(now + SECOND, true);
    assert_eq!(
        machine.next_timeout(),
        Some(now + 10 * SECOND),
        "since the first"
    );
    machine.await_answers(now + 2 * SECOND, false);
    assert_eq!(machine.next_timeout(), Some(now + 40 * SECOND));
}

#[test]
fn publishes_at_qos_0_take_no_place_in_the_window() {
    let now = start();
    let config = MachineConfig {
        window: 1,
        ..MachineConfig::default()
    };
    let mut machine = connected(config, now);
    machine.publish(now, 5, false, "t".into(), b"").unwrap();
    machine
        .publish_unacknowledged(now, "u".into(), b"body")
        .unwrap();
    let packets = sent(&mut machine);
    let Decoded::Publish(publish, body, _) = &packets[1] else {
        panic!("{packets:?}")
    };
    assert_eq!(
        (
            publish.topic.as_str(),
            body.as_ref(),
            publish.packet_id,
            publish.qos
        ),
        ("u", &b"body"[..], None, QoS::AtMostOnce)
    );
    let too_long = machine.publish_unacknowledged(now, "t".repeat(65_536), b"");
    assert_eq!(too_long, Err(PublishError::TopicTooLong { bytes: 65_536 }));
    let too_large = machine.publish_unacknowledged(now, "t".into(), &[0; 400_000]);
    assert!(matches!(too_large, Err(PublishError::TooLarge { .. })));
    assert!(machine.output().is_empty());
    machine.disconnect(now);
    let over = machine.publish_unacknowledged(now, "t".into(), b"");
    assert_eq!(over, Err(PublishError::NoRoom));
}
