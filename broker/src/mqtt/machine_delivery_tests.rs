//! The machine's other direction: deliveries, their packet ids and acknowledgements, and a client
//! that does not read (spec/mqtt.md 8.3 to 8.5, 12.5; testing.md S6, S7, R7).

use mqttbytes::v4::{Packet, Publish};
use ntex_mqtt::v3::codec::SubscribeReturnCode;

use super::limits::{CLIENT_PACKET_BYTES_MAX, OUTPUT_BYTES_MAX};
use super::machine::{CloseReason, Event, Sent};
use super::test_packets::*;
use crate::hub::{C2D_STREAM, DeliveryToken};

const TOPIC: &str = "devices/d1/messages/devicebound/a=1";

fn token(stream: u16, number: u64) -> DeliveryToken {
    DeliveryToken { stream, number }
}

fn deliver(peer: &mut Peer, token: DeliveryToken, redelivered: bool) -> Sent {
    peer.machine
        .deliver(token, redelivered, TOPIC.to_owned(), b"body")
}

/// Tokens that the client's bytes acknowledged; anything else is a failure.
fn acknowledged(peer: &mut Peer, bytes: &[u8]) -> Vec<DeliveryToken> {
    let only = |event| match event {
        Event::Acknowledged(token) => token,
        other => panic!("{other:?}"),
    };
    peer.feed(bytes).into_iter().map(only).collect()
}

fn bits(publish: &Publish) -> (u8, bool, bool, u16) {
    let Publish {
        qos,
        dup,
        retain,
        pkid,
        ..
    } = publish;
    (*qos as u8, *dup, *retain, *pkid)
}

#[test]
fn deliveries_have_their_own_ids_and_are_acknowledged_in_any_order() {
    let mut peer = Peer::connected(60);
    let tokens = [token(0, 0), token(0, 1), token(14, 7), token(C2D_STREAM, 3)];
    for token in tokens {
        assert_eq!(deliver(&mut peer, token, false), Sent::Written);
    }
    let sent = peer.delivered();
    let ids: Vec<_> = sent.iter().map(|publish| publish.pkid).collect();
    assert_eq!(ids, [1, 2, 57_352, 61_444]);
    assert!(
        sent.iter()
            .all(|p| p.topic == TOPIC && &p.payload[..] == b"body")
    );
    assert_eq!(bits(&sent[0]), (1, false, false, 1));

    let acks = [ack(0x40, 57_352), ack(0x40, 1)].concat();
    assert_eq!(acknowledged(&mut peer, &acks), [tokens[2], tokens[0]]);
    // Unknown, and repeated: ignored, and no reason to close.
    let acks = [ack(0x40, 1), ack(0x40, 9), ack(0x40, 65_535)].concat();
    assert!(acknowledged(&mut peer, &acks).is_empty());
    let acks = [ack(0x40, 61_444), ack(0x40, 2)].concat();
    assert_eq!(acknowledged(&mut peer, &acks), [tokens[3], tokens[1]]);
    assert_eq!(peer.machine.outstanding(), 0);
}

#[test]
fn a_redelivery_has_the_same_id_and_dup() {
    for token in [token(3, 70_000), token(C2D_STREAM, 5_000)] {
        let mut first = Peer::connected(60);
        deliver(&mut first, token, false);
        let id = first.delivered()[0].pkid;
        // The client reconnects, perhaps to a hub that was restarted.
        let mut second = Peer::connected(60);
        deliver(&mut second, token, true);
        let again = second.delivered();
        assert_eq!(bits(&again[0]), (1, true, false, id));
        assert_eq!(acknowledged(&mut second, &ack(0x40, id)), [token]);
    }
}

#[test]
fn an_id_in_use_waits_and_a_delivery_is_not_sent_twice() {
    let mut peer = Peer::connected(60);
    let (old, new) = (token(0, 5), token(0, 4_101));
    assert_eq!(deliver(&mut peer, old, false), Sent::Written);
    assert_eq!(deliver(&mut peer, old, true), Sent::Repeated);
    assert_eq!(deliver(&mut peer, new, false), Sent::Waits);
    assert_eq!(peer.delivered().len(), 1);
    assert_eq!(acknowledged(&mut peer, &ack(0x40, 6)), [old]);
    assert_eq!(deliver(&mut peer, new, false), Sent::Written);
    assert_eq!(peer.delivered()[0].pkid, 6);
}

#[test]
fn what_needs_no_acknowledgement_has_no_id() {
    let mut peer = Peer::connected(60);
    let topic = "$iothub/twin/res/200/?$rid=7";
    assert_eq!(peer.machine.publish(topic.to_owned(), b"{}"), Sent::Written);
    assert_eq!(peer.machine.publish(topic.to_owned(), b""), Sent::Written);
    let sent = peer.delivered();
    assert_eq!(bits(&sent[0]), (0, false, false, 0));
    assert_eq!(
        (sent[0].topic.as_str(), &sent[0].payload[..]),
        (topic, &b"{}"[..])
    );
    assert!(sent[1].payload.is_empty());
}

#[test]
fn a_packet_that_a_client_does_not_take_is_not_sent() {
    let mut peer = Peer::connected(60);
    let long = "t".repeat(65_536);
    let sent = peer.machine.deliver(token(0, 0), false, long.clone(), b"");
    assert_eq!(sent, Sent::TooLarge);
    assert_eq!(peer.machine.publish(long, b""), Sent::TooLarge);
    let body = vec![1; CLIENT_PACKET_BYTES_MAX];
    let sent = peer
        .machine
        .deliver(token(0, 0), false, TOPIC.to_owned(), &body);
    assert_eq!(sent, Sent::TooLarge);
    assert_eq!(peer.machine.outstanding(), 0, "its id is free");
    let fits = &body[..CLIENT_PACKET_BYTES_MAX - TOPIC.len() - 9];
    let sent = peer
        .machine
        .deliver(token(0, 0), false, TOPIC.to_owned(), fits);
    assert_eq!(sent, Sent::Written);
    let output = peer.machine.output().unwrap();
    assert!(output.len() <= CLIENT_PACKET_BYTES_MAX && output.len() + 5 > CLIENT_PACKET_BYTES_MAX);
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let mut peer = Peer::connected(60);
    let body = vec![1; 100_000];
    let mut number = 0;
    while peer.machine.has_room() {
        assert!(peer.machine.wants_input());
        peer.machine
            .deliver(token(0, number), false, TOPIC.to_owned(), &body);
        number += 1;
        assert!(number < 100);
    }
    assert_eq!(number, 6, "the limit, passed by one packet");
    assert!(!peer.machine.wants_input());
    // Packets that came before the limit was reached wait, too: their answers have no room.
    assert!(peer.feed(&publish1("t", 1, b"x")).is_empty());
    let taken = peer.machine.output().unwrap();
    assert!(taken.len() > OUTPUT_BYTES_MAX);
    assert!(!peer.machine.has_room(), "taken is not read");
    assert!(peer.events().is_empty());
    peer.machine.written(100_000);
    assert!(peer.machine.has_room() && peer.machine.wants_input());
    assert!(matches!(peer.events()[..], [Event::Publish(_)]));
    peer.machine.written(taken.len());
    assert!(peer.machine.has_room());
}

#[test]
fn silence_is_not_the_clients_while_its_answers_have_no_room() {
    let mut peer = Peer::connected(60);
    let body = vec![1; 200_000];
    for number in 0..3 {
        peer.machine
            .deliver(token(0, number), false, TOPIC.to_owned(), &body);
    }
    let taken = peer.machine.output().unwrap().len();
    peer.now = peer.machine.deadline();
    assert_eq!(peer.machine.expired(peer.now), None);
    peer.machine.written(taken);
    peer.now = peer.machine.deadline();
    assert_eq!(peer.machine.expired(peer.now), Some(CloseReason::KeepAlive));
}

#[test]
fn nothing_is_sent_before_the_client_is_accepted_or_after_its_end() {
    let mut ended = Peer::connected(60);
    deliver(&mut ended, token(0, 0), false);
    assert_eq!(ended.delivered().len(), 1);
    let events = ended.feed(&subscribe(7, &[("a", 1)]));
    ended.feed(&DISCONNECT);
    for mut peer in [Peer::new(), Peer::deciding(60), ended] {
        assert_eq!(deliver(&mut peer, token(0, 1), false), Sent::Waits);
        let sent = peer.machine.publish(TOPIC.to_owned(), b"x");
        assert_eq!(sent, Sent::Waits);
        peer.answer(&events[0], &[SubscribeReturnCode::Failure]);
        assert_eq!(peer.answers(), Vec::<Packet>::new());
    }
}
