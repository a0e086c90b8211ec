//! From the first byte to the open, and what keeps an open connection alive.

use bytes::Bytes;
use fe2o3_amqp_types::performatives as wire;

use super::rig::{self, Rig, Written, begin, framed};
use super::tests::{SECOND, fault, out, sending};
use super::*;
use crate::header::ProtocolHeader;
use crate::performative::Performative;
use crate::sasl::{SaslCode, SaslFrame, SaslInit};

#[test]
fn header_open_and_begin_in_one_write_are_answered_in_order() {
    let mut rig = Rig::new(Config::new("hub"));
    let mut bytes = ProtocolHeader::AMQP.encode().to_vec();
    bytes.extend(framed(0, &serde_amqp::to_vec(&rig::open()).unwrap()));
    bytes.extend(framed(3, &serde_amqp::to_vec(&begin()).unwrap()));
    rig.bytes(&bytes);
    let written = rig.written();
    let [
        Written::Header(header),
        Written::Frame(0, Performative::Open(open), _),
        Written::Frame(3, Performative::Begin(begin), _),
    ] = &written[..]
    else {
        panic!("{written:?}");
    };
    assert_eq!(*header, ProtocolHeader::AMQP.encode());
    assert_eq!(
        (open.container_id.as_str(), open.max_frame_size.0),
        ("hub", 65_536)
    );
    assert_eq!(
        (open.channel_max.0, open.idle_time_out),
        (8191, Some(120_000))
    );
    assert_eq!((begin.remote_channel, begin.next_outgoing_id), (Some(3), 1));
    assert_eq!((begin.incoming_window, begin.handle_max.0), (5000, 262_143));
    let events = rig.events();
    assert!(
        matches!(&events[..], [Event::Opened(opened)] if opened.sasl.is_none()),
        "{events:?}"
    );
}

#[test]
fn other_headers_get_what_is_served_and_the_end() {
    for (first, second, answer) in [
        (*b"AMQP\x02\x01\x00\x00", None, ProtocolHeader::SASL),
        (*b"GET / HT", None, ProtocolHeader::SASL),
        (*b"AMQP\x00\x00\x09\x01", None, ProtocolHeader::AMQP),
        (*b"AMQP\x03\x01\x00\x00", Some(()), ProtocolHeader::AMQP),
    ] {
        let mut rig = Rig::new(Config::new("hub"));
        rig.bytes(&first);
        if second.is_some() {
            sasl_init(&mut rig, "ANONYMOUS", b"");
            rig.written();
            rig.bytes(&first);
        }
        let written = rig.written();
        assert!(
            matches!(&written[..], [Written::Header(header)] if *header == answer.encode()),
            "{written:?}"
        );
        assert!(matches!(
            rig.events()[..],
            [Event::Closed(CloseCause::Header(_))]
        ));
        assert!(rig.connection.is_closed() && !rig.connection.wants_input());
    }
}

fn sasl_init(rig: &mut Rig, mechanism: &str, response: &'static [u8]) {
    let init = SaslInit {
        mechanism: mechanism.to_owned(),
        initial_response: Some(Bytes::from_static(response)),
        hostname: None,
    };
    let mut body = BytesMut::new();
    crate::sasl::encode_init(&init, &mut body);
    let mut frame = framed(0, &body);
    frame[5] = 1;
    rig.bytes(&frame);
}

fn sasl_frames(rig: &mut Rig) -> Vec<SaslFrame> {
    let written = rig.written().into_iter();
    let frames = written.filter_map(|written| match written {
        Written::Sasl(body) => Some(crate::sasl::decode(&body).unwrap()),
        _ => None,
    });
    frames.collect()
}

#[test]
fn sasl_offers_its_mechanisms_and_anonymous_ones_succeed_at_once() {
    for (name, mechanism) in [
        ("ANONYMOUS", Mechanism::Anonymous),
        ("MSSBCBS", Mechanism::Mssbcbs),
    ] {
        let mut rig = Rig::new(Config::new("hub"));
        rig.bytes(&ProtocolHeader::SASL.encode());
        let offered = ["ANONYMOUS", "MSSBCBS", "PLAIN", "EXTERNAL"].map(str::to_owned);
        assert!(
            matches!(&sasl_frames(&mut rig)[..], [SaslFrame::Mechanisms(names)] if *names == offered)
        );
        sasl_init(&mut rig, name, b"ignored");
        assert!(matches!(
            sasl_frames(&mut rig)[..],
            [SaslFrame::Outcome(SaslCode::Ok)]
        ));
        rig.open(|_| {});
        let events = rig.events();
        assert!(matches!(&events[..], [Event::Opened(opened)] if opened.sasl == Some(mechanism)));
    }
}

#[test]
fn plain_is_judged_by_the_driver_and_what_came_early_waits() {
    for code in [SaslCode::Ok, SaslCode::Auth] {
        let mut rig = Rig::new(Config::new("hub"));
        rig.bytes(&ProtocolHeader::SASL.encode());
        sasl_init(&mut rig, "PLAIN", b"\0leaf1@sas.hub\0token");
        rig.open(|_| {});
        let events = rig.events();
        let [Event::SaslPlain(plain)] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(
            (plain.authcid.as_str(), plain.password.expose().as_str()),
            ("leaf1@sas.hub", "token")
        );
        assert!(!format!("{events:?}").contains("token\""), "{events:?}");
        assert!(!rig.connection.wants_input());
        rig.connection.sasl_outcome(code);
        rig.bytes(b"");
        let events = rig.events();
        if code == SaslCode::Ok {
            assert!(matches!(&events[..], [Event::Opened(_)]), "{events:?}");
        } else {
            assert!(
                matches!(&events[..], [Event::Closed(CloseCause::Sasl)]),
                "{events:?}"
            );
        }
    }
}

#[test]
fn a_wrong_mechanism_or_response_ends_the_connection() {
    for (mechanism, response, code) in [
        ("SCRAM-SHA-1", &b""[..], SaslCode::Sys),
        ("PLAIN", b"no parts", SaslCode::Auth),
    ] {
        let mut rig = Rig::new(Config::new("hub"));
        rig.bytes(&ProtocolHeader::SASL.encode());
        rig.written();
        sasl_init(&mut rig, mechanism, response);
        assert!(matches!(sasl_frames(&mut rig)[..], [SaslFrame::Outcome(c)] if c == code));
        assert!(matches!(
            rig.events()[..],
            [Event::Closed(CloseCause::Sasl)]
        ));
    }
}

#[test]
fn the_terms_of_an_open_are_judged() {
    for (change, condition) in [
        (
            (|open: &mut wire::Open| open.max_frame_size = wire::MaxFrameSize(1))
                as fn(&mut wire::Open),
            "amqp:invalid-field",
        ),
        (|open| open.idle_time_out = Some(4999), "amqp:not-allowed"),
        (
            |open| open.container_id = "x".repeat(5000),
            "amqp:invalid-field",
        ),
    ] {
        let mut rig = Rig::new(Config::new("hub"));
        rig.open(change);
        let written = rig.performatives();
        assert!(
            matches!(
                &written[..],
                [Performative::Open(_), Performative::Close(_)]
            ),
            "{written:?}"
        );
        assert_eq!(fault(&rig.events()), condition);
    }
}

#[test]
fn heartbeats_leave_within_half_of_the_peers_time_out() {
    for (named, half) in [
        (Some(240_000), 120),
        (None, 60),
        (Some(0), 60),
        (Some(60_000), 30),
    ] {
        let mut rig = Rig::new(Config::new("hub"));
        rig.open(|open| open.idle_time_out = named);
        rig.written();
        let mut silent = 0;
        for _ in 0..200 {
            rig.advance(SECOND);
            silent += 1;
            if !rig.written().is_empty() {
                silent = 0;
            }
            assert!(silent <= half, "{named:?}: {silent} s of silence");
        }
    }
}

#[test]
fn output_counts_as_a_heartbeat() {
    let mut rig = Rig::begun();
    let link = sending(&mut rig, 1, 1000);
    let mut heartbeats = 0;
    for _ in 0..100 {
        rig.advance(SECOND);
        rig.connection.send(link, out(true, b"x")).unwrap();
        let written = rig.written();
        heartbeats += written
            .iter()
            .filter(|w| matches!(w, Written::Heartbeat))
            .count();
    }
    assert_eq!(heartbeats, 0);
}

#[test]
fn silence_closes_the_connection_and_heartbeats_of_the_peer_do_not_let_it() {
    let mut rig = Rig::begun();
    for _ in 0..10 {
        rig.advance(239 * SECOND);
        rig.bytes(&framed(0, b""));
    }
    assert!(rig.connection.is_open());
    rig.written();
    rig.advance(239 * SECOND);
    assert!(rig.connection.is_open());
    rig.advance(SECOND);
    assert!(matches!(
        rig.events()[..],
        [Event::Closed(CloseCause::Idle)]
    ));
    assert!(matches!(
        rig.performatives().last(),
        Some(Performative::Close(_))
    ));
}

/// Whoever drives the engine looks at it again and again, with what was there before.
#[test]
fn half_a_frame_is_heard_once() {
    let mut rig = Rig::begun();
    rig.bytes(b"\0\0\0");
    for _ in 0..8 {
        assert!(rig.connection.is_open());
        rig.bytes(b"");
        rig.advance(30 * SECOND);
    }
    assert!(matches!(
        rig.events()[..],
        [Event::Closed(CloseCause::Idle)]
    ));
}

#[test]
fn a_connection_that_is_not_opened_in_time_ends() {
    let mut rig = Rig::new(Config::new("hub"));
    rig.bytes(b"AMQ");
    rig.advance(59 * SECOND);
    assert!(!rig.connection.is_closed());
    rig.advance(SECOND);
    assert!(matches!(
        rig.events()[..],
        [Event::Closed(CloseCause::OpenTimeOut)]
    ));
}
