//! The machine's limits and times (testing.md S1, S6, S12; spec/mqtt.md 2.5, 2.8, 8.5).

use std::time::Duration;

use mqttbytes::v4::Packet;

use super::limits::{
    CONNECT_BYTES_MAX, FILTERS_MAX, PACKET_BYTES_MAX, PROGRESS_BYTES_MIN, UNCOMMITTED_BYTES_MAX,
};
use super::machine::{CloseReason, Event};
use super::test_packets::*;

const TOPIC: &str = "devices/d1/messages/events/";

// Limits

#[test]
fn a_packet_over_the_limit_closes_before_it_arrives() {
    let length = PACKET_BYTES_MAX + 1;
    let digits = |shift: u32| u8::try_from((length >> shift) & 0x7f).unwrap();
    let header = [0x32, digits(0) | 0x80, digits(7) | 0x80, digits(14)];
    assert_eq!(length >> 21, 0, "three digits hold the length");
    let mut peer = Peer::connected(60);
    assert_eq!(peer.feed(&header), [Event::Close(CloseReason::TooLarge)]);

    let mut peer = Peer::new();
    assert_eq!(
        peer.feed(&[0x10, 0xff, 0xff, 0xff, 0x7f]),
        [Event::Close(CloseReason::TooLarge)]
    );
    let over = field(vec![b'u'; 65_535]);
    let too_large = connect_with(0xc0, 60, &[field("d"), over.clone(), over]);
    assert!(too_large.len() > CONNECT_BYTES_MAX);
    let mut peer = Peer::new();
    assert_eq!(peer.feed(&too_large), [Event::Close(CloseReason::TooLarge)]);
}

#[test]
fn the_largest_packet_is_taken() {
    let topic = "t".repeat(65_535);
    let payload = vec![7; PACKET_BYTES_MAX as usize - 65_535 - 4];
    let bytes = publish1(&topic, 1, &payload);
    let mut peer = Peer::connected(60);
    let mut publishes = Vec::new();
    for part in bytes.chunks(65_536) {
        assert!(peer.machine.wants_input());
        publishes.extend(peer.publishes(part));
    }
    assert_eq!(publishes.len(), 1);
    assert_eq!(publishes[0].payload.len(), payload.len());
}

#[test]
fn filters_of_one_packet_are_counted() {
    let at_limit = vec![("a", 1); FILTERS_MAX];
    let mut peer = Peer::connected(60);
    let events = peer.feed(&subscribe(1, &at_limit));
    assert!(
        matches!(&events[..], [Event::Subscribe { filters, .. }] if filters.len() == FILTERS_MAX)
    );
    let over = vec![("a", 1); FILTERS_MAX + 1];
    let reason = CloseReason::Malformed("too many topic filters");
    assert_eq!(peer.feed(&subscribe(1, &over)), [Event::Close(reason)]);
}

#[test]
fn the_byte_limit_stops_reading_and_the_commit_starts_it_again() {
    let mut peer = Peer::connected(60);
    let payload = vec![1; 65_000];
    let mut id = 0;
    // What arrives together with the publish that reaches the limit waits behind it.
    while peer.machine.wants_input() {
        id += 1;
        let stream = [
            PINGREQ.to_vec(),
            publish1("t", id, &payload),
            PINGREQ.to_vec(),
        ]
        .concat();
        peer.publishes(&stream);
        let pings = if peer.machine.wants_input() { 2 } else { 1 };
        assert_eq!(peer.answers(), vec![Packet::PingResp; pings], "{id}");
        assert!(id < 100);
    }
    let bytes = usize::from(id) * payload.len();
    assert!((UNCOMMITTED_BYTES_MAX - 65_536..UNCOMMITTED_BYTES_MAX + 65_536).contains(&bytes));
    peer.machine.committed(1);
    assert!(peer.machine.wants_input());
    assert!(peer.events().is_empty());
    assert_eq!(
        peer.answers().len(),
        2,
        "the PUBACK and the ping that waited"
    );
    peer.machine.committed(u64::from(id));
    assert_eq!(peer.acked(), (2..=id).collect::<Vec<_>>());
}

#[test]
fn many_small_publishes_reach_the_byte_limit_too() {
    let mut peer = Peer::connected(60);
    let mut count = 0;
    while peer.machine.wants_input() {
        count += peer.publishes(&publish0("t", b"")).len();
        assert!(count < 10_000);
    }
    assert_eq!(count, peer.machine.in_flight());
}

// Times

#[test]
fn connect_must_be_complete_in_time_however_it_dribbles() {
    let mut peer = Peer::new();
    let connect = connect(60);
    for byte in &connect[..6] {
        peer.pass(Duration::from_secs(9));
        assert_eq!(peer.machine.expired(peer.now), None);
        assert!(peer.feed(&[*byte]).is_empty());
    }
    assert_eq!(peer.machine.deadline(), peer.now + Duration::from_secs(6));
    peer.pass(Duration::from_secs(6));
    assert_eq!(
        peer.machine.expired(peer.now),
        Some(CloseReason::ConnectTimeout)
    );
}

#[test]
fn silence_ends_at_one_and_a_half_keep_alives() {
    for (keep_alive, limit_ms) in [
        (1, 1_500),
        (60, 90_000),
        (1_178, 1_767_000),
        (1_179, 1_767_000),
        (65_535, 1_767_000),
        (0, 1_767_000),
    ] {
        let mut peer = Peer::connected(keep_alive);
        let limit = Duration::from_millis(limit_ms);
        assert_eq!(peer.machine.deadline(), peer.now + limit, "{keep_alive}");
        peer.pass(limit - Duration::from_millis(1));
        assert_eq!(peer.machine.expired(peer.now), None, "{keep_alive}");
        peer.feed(&PINGREQ);
        peer.pass(limit - Duration::from_millis(1));
        assert_eq!(
            peer.machine.expired(peer.now),
            None,
            "a packet starts it again"
        );
        peer.pass(Duration::from_millis(1));
        assert_eq!(
            peer.machine.expired(peer.now),
            Some(CloseReason::KeepAlive),
            "{keep_alive}"
        );
    }
}

#[test]
fn what_we_send_is_no_sign_of_the_clients_life() {
    let mut peer = Peer::connected(60);
    peer.publishes(&publish1(TOPIC, 1, b"x"));
    peer.pass(Duration::from_secs(80));
    peer.machine.committed(1);
    assert_eq!(peer.acked(), [1]);
    peer.pass(Duration::from_secs(10));
    assert_eq!(peer.machine.expired(peer.now), Some(CloseReason::KeepAlive));
}

#[test]
fn a_dribble_of_bytes_is_no_packet_but_a_large_one_on_its_way_counts() {
    let bytes = publish1(TOPIC, 1, &[1; 4_000]);
    let survives = |part: usize| {
        let mut peer = Peer::connected(10);
        for part in bytes.chunks(part).take(20) {
            peer.pass(Duration::from_secs(10));
            if peer.machine.expired(peer.now).is_some() {
                return false;
            }
            peer.feed(part);
        }
        true
    };
    assert!(survives(PROGRESS_BYTES_MIN));
    assert!(!survives(1));
}

#[test]
fn while_we_do_not_read_the_client_is_not_silent() {
    let mut peer = Peer::connected(60);
    let mut id = 0;
    while peer.machine.wants_input() {
        id += 1;
        peer.publishes(&publish1("t", id, &[1; 65_000]));
    }
    // A stuck disk, for longer than the client's keep-alive.
    for _ in 0..10 {
        peer.now = peer.machine.deadline();
        assert_eq!(peer.machine.expired(peer.now), None);
        assert!(
            peer.machine.deadline() > peer.now,
            "the driver must not spin"
        );
    }
    peer.machine.committed(u64::from(id));
    peer.now = peer.machine.deadline();
    assert_eq!(peer.machine.expired(peer.now), Some(CloseReason::KeepAlive));
}

#[test]
fn the_time_of_a_judgement_is_not_the_clients() {
    let mut peer = Peer::deciding(10);
    peer.pass(Duration::from_secs(3600));
    assert_eq!(peer.machine.expired(peer.now), None);
    peer.machine.accept(false, peer.now);
    assert_eq!(peer.machine.deadline(), peer.now + Duration::from_secs(15));
}
