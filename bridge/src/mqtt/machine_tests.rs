//! Tests of the client machine: packets in, packets out, time moved by hand.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::mqtt::terms::PublishError;

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) fn start() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn params() -> ConnectParams {
    ConnectParams {
        client_id: "edge3/modA".to_owned(),
        user_name: "parent/edge3/modA/?api-version=2020-09-30".to_owned(),
        password: "SharedAccessSignature secret".to_owned(),
    }
}

fn connecting(config: MachineConfig, now: Instant) -> Machine {
    Machine::new(config, params(), now).unwrap()
}

pub(super) fn connected(config: MachineConfig, now: Instant) -> Machine {
    let mut machine = connecting(config, now);
    sent(&mut machine);
    machine.receive(now, &[0x20, 2, 0, 0]).unwrap();
    assert_eq!(machine.poll_connack(), Some(Connack::Accepted));
    machine
}

/// Takes the whole output and decodes it with the codec's own rules.
pub(super) fn sent(machine: &mut Machine) -> Vec<Decoded> {
    let mut bytes = CodecBuffer::new();
    bytes.extend_from_slice(machine.output());
    machine.written(bytes.len());
    let codec = Codec::new();
    let mut packets = Vec::new();
    while let Some(packet) = codec.decode(&mut bytes).unwrap() {
        packets.push(packet);
    }
    assert!(bytes.is_empty(), "half a packet in the output");
    packets
}

fn acked(machine: &mut Machine) -> Vec<u64> {
    machine.drain_acked().collect()
}

pub(super) fn puback(id: u16) -> [u8; 4] {
    let [high, low] = id.to_be_bytes();
    [0x40, 2, high, low]
}

#[test]
fn connect_says_who_and_debug_does_not_say_the_token() {
    let now = start();
    let mut machine = connecting(MachineConfig::default(), now);
    let packets = sent(&mut machine);
    let [Decoded::Packet(Packet::Connect(connect), _)] = packets.as_slice() else {
        panic!("{packets:?}")
    };
    assert_eq!(connect.client_id.as_str(), "edge3/modA");
    assert!(!connect.clean_session);
    assert_eq!(connect.keep_alive, 300);
    assert!(connect.last_will.is_none());
    assert_eq!(
        connect.password.as_deref(),
        Some(&b"SharedAccessSignature secret"[..])
    );
    assert!(!format!("{:?}", params()).contains("secret"));
    assert_eq!(machine.room(), 0, "nothing may be published before CONNACK");
}

#[test]
fn every_connack_code_is_told_apart() {
    for (code, expected) in [
        (0, Connack::Accepted),
        (1, Connack::UnacceptableProtocol),
        (2, Connack::IdentifierRejected),
        (3, Connack::ServerUnavailable),
        (4, Connack::BadCredentials),
        (5, Connack::NotAuthorized),
    ] {
        let now = start();
        let mut machine = connecting(MachineConfig::default(), now);
        machine.receive(now, &[0x20, 2, 0, code]).unwrap();
        assert_eq!(machine.poll_connack(), Some(expected));
        assert_eq!(machine.poll_connack(), None);
        assert_eq!(machine.room() > 0, code == 0);
    }
    let now = start();
    let mut machine = connecting(MachineConfig::default(), now);
    assert!(matches!(
        machine.receive(now, &[0x20, 2, 0, 9]),
        Err(MachineError::Malformed(_))
    ));
}

#[test]
fn publishes_are_pipelined_up_to_the_window_and_carry_topic_body_and_dup() {
    let now = start();
    let mut machine = connected(
        MachineConfig {
            window: 3,
            ..MachineConfig::default()
        },
        now,
    );
    for token in 10..13 {
        machine
            .publish(now, token, token == 11, format!("t/{token}"), b"body")
            .unwrap();
    }
    assert_eq!(machine.room(), 0);
    assert_eq!(
        machine.publish(now, 13, false, "t".into(), b""),
        Err(PublishError::NoRoom)
    );
    let packets = sent(&mut machine);
    assert_eq!(packets.len(), 3);
    for (index, packet) in packets.iter().enumerate() {
        let Decoded::Publish(publish, body, _) = packet else {
            panic!("{packet:?}")
        };
        assert_eq!(publish.topic.as_str(), format!("t/{}", index + 10));
        assert_eq!(publish.packet_id.unwrap().get(), index as u16 + 1);
        assert_eq!(publish.qos, QoS::AtLeastOnce);
        assert_eq!(publish.dup, index == 1);
        assert!(!publish.retain);
        assert_eq!(body.as_ref(), b"body");
    }
}

#[test]
fn pubacks_come_in_any_order_and_the_window_slides_with_the_oldest() {
    let now = start();
    let mut machine = connected(
        MachineConfig {
            window: 3,
            ..MachineConfig::default()
        },
        now,
    );
    for token in 0..3 {
        machine.publish(now, token, false, "t".into(), b"").unwrap();
    }
    machine.receive(now, &puback(3)).unwrap();
    machine.receive(now, &puback(2)).unwrap();
    assert_eq!(acked(&mut machine), [2, 1]);
    assert_eq!((machine.room(), machine.in_flight()), (0, 1));
    machine.receive(now, &puback(1)).unwrap();
    assert_eq!(acked(&mut machine), [0]);
    assert_eq!((machine.room(), machine.in_flight()), (3, 0));
    assert_eq!(
        machine.receive(now, &puback(1)),
        Err(MachineError::UnknownPacketId(1))
    );
}

#[test]
fn a_second_puback_for_the_same_publish_ends_the_connection() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    machine.publish(now, 0, false, "t".into(), b"").unwrap();
    machine.publish(now, 1, false, "t".into(), b"").unwrap();
    machine.receive(now, &puback(2)).unwrap();
    assert_eq!(
        machine.receive(now, &puback(2)),
        Err(MachineError::UnknownPacketId(2))
    );
    assert_eq!(
        acked(&mut machine),
        [1],
        "what came before the fault still counts"
    );
}

#[test]
fn packet_ids_wrap_around_without_zero() {
    let now = start();
    let mut machine = connected(
        MachineConfig {
            window: 2,
            ..MachineConfig::default()
        },
        now,
    );
    let mut expected_id = 0_u16;
    for token in 0..70_000_u64 {
        machine.publish(now, token, false, "t".into(), b"").unwrap();
        let packets = sent(&mut machine);
        let [Decoded::Publish(publish, _, _)] = packets.as_slice() else {
            panic!("{packets:?}")
        };
        let id = publish.packet_id.unwrap().get();
        // What is above is for subscriptions.
        expected_id = if expected_id == 65_279 {
            1
        } else {
            expected_id + 1
        };
        assert_eq!(id, expected_id);
        machine.receive(now, &puback(id)).unwrap();
        assert_eq!(acked(&mut machine), [token]);
    }
}

#[test]
fn a_message_that_does_not_fit_is_refused_and_leaves_no_bytes() {
    let now = start();
    let config = MachineConfig {
        packet_bytes_max: 100,
        ..MachineConfig::default()
    };
    let mut machine = connected(config, now);
    let over = machine.publish(now, 0, false, "t".into(), &[0; 96]);
    assert_eq!(
        over,
        Err(PublishError::TooLarge {
            bytes: 101,
            max: 100
        })
    );
    let mut machine = connected(MachineConfig::default(), now);
    let long = machine.publish(now, 0, false, "t".repeat(65_536), b"");
    assert_eq!(long, Err(PublishError::TopicTooLong { bytes: 65_536 }));
    assert!(machine.output().is_empty());
    machine
        .publish(now, 1, false, "t".repeat(65_535), b"")
        .unwrap();
    assert_eq!(sent(&mut machine).len(), 1);
}

#[test]
fn connack_time_out() {
    let now = start();
    let mut machine = connecting(MachineConfig::default(), now);
    assert_eq!(machine.next_timeout(), Some(now + 20 * SECOND));
    machine.handle_timeout(now + 19 * SECOND).unwrap();
    let error = machine.handle_timeout(now + 20 * SECOND).unwrap_err();
    assert_eq!(error, MachineError::ConnackTimeout(20 * SECOND));
}

#[test]
fn an_idle_dead_link_is_found_within_a_minute() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    assert_eq!(machine.next_timeout(), Some(now + 40 * SECOND));
    machine.handle_timeout(now + 40 * SECOND).unwrap();
    assert_eq!(
        sent(&mut machine),
        [Decoded::Packet(Packet::PingRequest, 0)]
    );
    assert_eq!(machine.next_timeout(), Some(now + 60 * SECOND));
    machine.handle_timeout(now + 59 * SECOND).unwrap();
    assert!(sent(&mut machine).is_empty(), "one probe is enough");
    let error = machine.handle_timeout(now + 60 * SECOND).unwrap_err();
    assert_eq!(error, MachineError::PingTimeout(20 * SECOND));
}

#[test]
fn an_answered_ping_starts_the_next_interval() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    machine.handle_timeout(now + 40 * SECOND).unwrap();
    machine.receive(now + 41 * SECOND, &[0xd0, 0]).unwrap();
    assert_eq!(machine.next_timeout(), Some(now + 81 * SECOND));
    machine.handle_timeout(now + 80 * SECOND).unwrap();
    assert_eq!(sent(&mut machine).len(), 1);
}

#[test]
fn with_publishes_in_flight_a_dead_link_is_found_within_the_ack_time_out() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    let sent_at = now + 30 * SECOND;
    machine.publish(sent_at, 0, false, "t".into(), b"").unwrap();
    sent(&mut machine);
    assert_eq!(machine.next_timeout(), Some(sent_at + 10 * SECOND));
    machine.handle_timeout(sent_at + 10 * SECOND).unwrap();
    assert_eq!(
        sent(&mut machine),
        [Decoded::Packet(Packet::PingRequest, 0)]
    );
    machine.handle_timeout(sent_at + 19 * SECOND).unwrap();
    let error = machine.handle_timeout(sent_at + 20 * SECOND).unwrap_err();
    assert_eq!(error, MachineError::PingTimeout(10 * SECOND));
}

#[test]
fn a_server_that_withholds_acks_but_answers_pings_is_waited_for_until_the_stall_limit() {
    let mut now = start();
    let mut machine = connected(MachineConfig::default(), now);
    let begin = now;
    machine.publish(now, 0, false, "t".into(), b"").unwrap();
    sent(&mut machine);
    let error = loop {
        now = machine.next_timeout().unwrap();
        if let Err(error) = machine.handle_timeout(now) {
            break error;
        }
        assert_eq!(sent(&mut machine).len(), 1);
        machine.receive(now, &[0xd0, 0]).unwrap();
    };
    assert_eq!(error, MachineError::AckStall(300 * SECOND));
    assert_eq!(now, begin + 300 * SECOND);
}

#[test]
fn something_is_written_within_half_the_keep_alive_even_when_the_server_talks() {
    let now = start();
    let config = MachineConfig {
        keep_alive_secs: 60,
        ..MachineConfig::default()
    };
    let mut machine = connected(config, now);
    machine.receive(now + 29 * SECOND, &[0xd0, 0]).unwrap();
    assert_eq!(machine.next_timeout(), Some(now + 30 * SECOND));
    machine.handle_timeout(now + 30 * SECOND).unwrap();
    assert_eq!(
        sent(&mut machine),
        [Decoded::Packet(Packet::PingRequest, 0)]
    );
}

#[test]
fn disconnect_is_written_once_and_ends_everything() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    machine.disconnect(now);
    machine.disconnect(now);
    assert_eq!(sent(&mut machine), [Decoded::Packet(Packet::Disconnect, 0)]);
    assert_eq!((machine.room(), machine.next_timeout()), (0, None));
}

#[test]
fn packets_that_have_no_business_here_end_the_connection() {
    let now = start();
    for (bytes, packet) in [
        (&[0x20, 2, 0, 0][..], "CONNACK"),
        (&[0x50, 2, 0, 1], "PUBREC"),
        (&[0xc0, 0], "PINGREQ"),
        (&[0xe0, 0], "DISCONNECT"),
    ] {
        let mut machine = connected(MachineConfig::default(), now);
        let error = machine.receive(now, bytes).unwrap_err();
        assert_eq!(
            error,
            MachineError::UnexpectedPacket {
                packet,
                state: "connected"
            }
        );
    }
    let mut machine = connecting(MachineConfig::default(), now);
    let error = machine.receive(now, &puback(1)).unwrap_err();
    let state = "waiting for CONNACK";
    assert_eq!(
        error,
        MachineError::UnexpectedPacket {
            packet: "PUBACK",
            state
        }
    );
}

#[test]
fn lengths_that_lie_are_refused_before_the_codec_sees_them() {
    let now = start();
    let mut machine = connected(MachineConfig::default(), now);
    let error = machine.receive(now, &[0x30, 3, 0xff, 0xff, 0]).unwrap_err();
    assert!(matches!(error, MachineError::Malformed(_)), "{error}");
    let config = MachineConfig {
        packet_bytes_max: 1000,
        ..MachineConfig::default()
    };
    let mut machine = connected(config, now);
    let error = machine.receive(now, &[0x30, 0xff, 0xff, 0x7f]).unwrap_err();
    assert_eq!(
        error,
        MachineError::PacketTooLarge {
            bytes: 2_097_151,
            max: 1000
        }
    );
}

proptest! {
    /// However the stream is cut into reads, the same acknowledgements come out.
    #[test]
    fn any_cut_of_the_stream_gives_the_same_acknowledgements(
        order in Just((1..=40_u16).collect::<Vec<_>>()).prop_shuffle(),
        cuts in proptest::collection::vec(1..9_usize, 1..20),
    ) {
        let now = start();
        let mut machine = connected(MachineConfig::default(), now);
        let mut stream = Vec::new();
        for id in &order {
            machine.publish(now, u64::from(*id), false, "t".into(), b"").unwrap();
            stream.extend_from_slice(&[0x32, 6, 0, 1, b't', 0, 9, b'x']);
            stream.extend_from_slice(&puback(*id));
            stream.extend_from_slice(&[0xd0, 0]);
        }
        // Tokens were handed out in publish order, so token of packet id n is order[n - 1].
        let mut cut = cuts.iter().cycle();
        let mut rest = stream.as_slice();
        while !rest.is_empty() {
            let (read, after) = rest.split_at(rest.len().min(*cut.next().unwrap()));
            machine.receive(now, read).unwrap();
            rest = after;
        }
        let expected: Vec<u64> =
            order.iter().map(|id| u64::from(order[usize::from(*id) - 1])).collect();
        prop_assert_eq!(acked(&mut machine), expected);
        let publishes = std::iter::from_fn(|| machine.poll_event()).count();
        prop_assert_eq!(publishes, 40);
        prop_assert_eq!(machine.in_flight(), 0);
    }

    /// No input panics, in any state.
    #[test]
    fn arbitrary_bytes_never_panic(
        open in any::<bool>(),
        reads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
    ) {
        let now = start();
        let config = MachineConfig { packet_bytes_max: 64, ..MachineConfig::default() };
        let mut machine = if open { connected(config, now) } else { connecting(config, now) };
        for read in reads {
            if machine.receive(now, &read).is_err() {
                break;
            }
        }
    }
}
