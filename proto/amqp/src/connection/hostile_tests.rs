//! What a hostile peer may try (testing.md S2, S3, S7, S12), vectors and sequences at random: the
//! engine never panics, keeps its books, says only whole frames that fit, and nothing once it is
//! closed.

use std::collections::HashSet;

use bytes::Bytes;
use fe2o3_amqp_types::definitions::Role;
use fe2o3_amqp_types::performatives as wire;
use proptest::collection::vec;
use proptest::prelude::*;
use serde::Serialize;

use super::rig::{self, Rig, Written, attach, begin, framed, transfer};
use super::tests::{SECOND, credits, detach_frame, ended_with, fault, receiving};
use super::*;
use crate::frame::FRAMING_ERROR;
use crate::header::ProtocolHeader;
use crate::performative::{DeliveryState, Disposition, Performative, Transfer};

fn header(size: u32, doff: u8, kind: u8, channel: u16) -> Vec<u8> {
    let mut bytes = size.to_be_bytes().to_vec();
    bytes.extend([doff, kind]);
    bytes.extend(channel.to_be_bytes());
    bytes
}

/// Frame headers that no frame may have (S2).
fn broken_headers() -> Vec<Vec<u8>> {
    vec![
        header(u32::MAX, 2, 0, 0),
        header(65_537, 2, 0, 0),
        header(0, 2, 0, 0),
        header(7, 2, 0, 0),
        header(100, 0, 0, 0),
        header(100, 1, 0, 0),
        header(100, 255, 0, 0),
        header(8, 2, 2, 0),
        header(8, 2, 255, 0),
        header(8, 2, 0, u16::MAX),
        header(8, 2, 0, 8_192),
        header(8, 2, 1, 0),
    ]
}

#[test]
fn a_broken_frame_closes_an_open_connection_at_its_header() {
    for bytes in broken_headers() {
        let mut rig = Rig::begun();
        rig.bytes(&bytes);
        assert_eq!(fault(&rig.events()), FRAMING_ERROR, "{bytes:?}");
        let written = rig.performatives();
        assert!(
            matches!(&written[..], [Performative::Close(_)]),
            "{bytes:?}: {written:?}"
        );
        assert!(rig.connection.is_closed() && !rig.connection.wants_input());
        assert_eq!(rig.connection.deadline(), None);
    }
}

#[test]
fn a_broken_frame_before_the_open_is_told_behind_ours() {
    for bytes in broken_headers() {
        let mut rig = Rig::new(Config::new("hub"));
        rig.bytes(&ProtocolHeader::AMQP.encode());
        rig.bytes(&bytes);
        assert_eq!(fault(&rig.events()), FRAMING_ERROR, "{bytes:?}");
        let written = rig.performatives();
        assert!(
            matches!(
                &written[..],
                [Performative::Open(_), Performative::Close(_)]
            ),
            "{bytes:?}: {written:?}"
        );
    }
}

#[test]
fn a_broken_frame_within_sasl_is_an_outcome_and_the_end() {
    for mut bytes in broken_headers() {
        let mut rig = Rig::new(Config::new("hub"));
        rig.bytes(&ProtocolHeader::SASL.encode());
        rig.written();
        if bytes[5] < 2 {
            bytes[5] = 1 - bytes[5];
        }
        // An AMQP frame, or a SASL frame without content.
        rig.bytes(&bytes);
        let written = rig.written();
        let is_channel = bytes[6..] != [0, 0] && bytes[5] == 1;
        assert!(
            matches!(&written[..], [Written::Sasl(_)]),
            "{bytes:?} {is_channel}: {written:?}"
        );
        assert!(matches!(
            rig.events()[..],
            [Event::Closed(CloseCause::Sasl)]
        ));
    }
}

#[test]
fn a_frame_that_never_comes_takes_no_memory() {
    let mut rig = Rig::begun();
    rig.bytes(&header(65_536, 2, 0, 0));
    assert!(rig.connection.is_open() && rig.connection.out.is_empty());
    for _ in 0..100 {
        rig.bytes(&[0]);
        rig.advance(SECOND);
    }
    assert!(rig.events().is_empty() && rig.connection.is_open());
}

#[test]
fn one_byte_now_and_then_does_not_put_the_open_off() {
    let mut rig = Rig::new(Config::new("hub"));
    let mut bytes = ProtocolHeader::AMQP.encode().to_vec();
    bytes.extend(header(60_000, 2, 0, 0));
    for byte in bytes.iter().chain(std::iter::repeat(&0)).take(59) {
        rig.bytes(&[*byte]);
        rig.advance(SECOND);
        assert!(!rig.connection.is_closed());
    }
    rig.advance(SECOND);
    assert!(matches!(
        rig.events()[..],
        [Event::Closed(CloseCause::OpenTimeOut)]
    ));
    // The same within SASL, and while the driver does not judge.
    let mut rig = Rig::new(Config::new("hub"));
    rig.bytes(&ProtocolHeader::SASL.encode());
    rig.advance(60 * SECOND);
    assert!(rig.connection.is_closed());
}

/// Bodies that nest deeper than anybody needs (S3).
fn nested() -> Vec<Vec<u8>> {
    let attach = |properties: &[u8]| {
        // attach with thirteen fields before its properties, as a list32.
        let mut fields = b"\xa1\x01n\x43\x42".to_vec();
        fields.extend([0x40; 10]);
        fields.extend(properties);
        let mut body = b"\x00\x53\x12\xd0".to_vec();
        let size = u32::try_from(fields.len() + 4).unwrap();
        body.extend(size.to_be_bytes());
        body.extend(14_u32.to_be_bytes());
        body.extend(fields);
        body
    };
    let levels = 60_000;
    let mut lists = Vec::new();
    let mut left = 65_000_u32;
    while left > 20 {
        // list32, map32 by turns: each the only content of the one around it.
        left -= 9;
        lists.push(0xd0);
        lists.extend(left.to_be_bytes());
        lists.extend(1_u32.to_be_bytes());
    }
    vec![
        vec![0; levels],
        b"\x00\x40".repeat(levels / 2),
        lists.clone(),
        attach(&vec![0; levels]),
        attach(&lists),
        attach(&b"\xe0\xff\x01".repeat(levels / 3)),
    ]
}

#[test]
fn deep_nesting_is_refused_without_a_deep_stack() {
    // A stack that would not survive a recursion by level.
    let small = std::thread::Builder::new().stack_size(256 * 1024);
    let tried = small.spawn(|| {
        for body in nested() {
            let mut rig = Rig::begun();
            rig.bytes(&framed(0, &body));
            assert_eq!(fault(&rig.events()), "amqp:decode-error");
        }
    });
    tried.unwrap().join().unwrap();
}

#[test]
fn counts_that_promise_more_than_their_bytes_are_refused() {
    for body in [
        // lists, maps and arrays of thousands of millions of elements that take no bytes
        &b"\x00\x53\x12\xd0\x00\x00\x00\x04\xff\xff\xff\xff"[..],
        b"\x00\x53\x12\xc0\x0a\x01\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40",
        b"\x00\x53\x12\xc0\x09\x01\xd1\x00\x00\x00\x04\xff\xff\xff\xfe",
        b"\x00\x53\x12\xc0\x06\x01\xb1\xff\xff\xff\xff",
        b"\x00\x53\x12\xb0\xff\xff\xff\xff",
    ] {
        let mut rig = Rig::begun();
        rig.bytes(&framed(0, body));
        assert_eq!(fault(&rig.events()), "amqp:decode-error", "{body:?}");
    }
}

#[test]
fn ten_thousand_begins_and_attaches_are_bounded() {
    let mut rig = Rig::new(Config::new("hub"));
    rig.open(|_| {});
    rig.events();
    let mut refused = 0;
    for channel in 0..8_192 {
        rig.send_frame(channel, &begin());
        refused += rig
            .performatives()
            .iter()
            .filter(|written| matches!(written, Performative::End(_)))
            .count();
    }
    assert_eq!(refused, 8_192 - crate::limits::SESSIONS_MAX);
    assert!(rig.connection.sessions.len() <= 8_192);
    for handle in 0..10_000 {
        rig.send_frame(0, &attach(handle, true, "q"));
        for event in rig.events() {
            if let Event::Attached { link, .. } = event {
                rig.connection.accept(link, &credits(1));
            }
        }
        rig.written();
        if rig.connection.is_closed() {
            break;
        }
    }
    assert!(rig.connection.is_closed());
    assert_eq!(rig.connection.links, 0);
}

#[test]
fn deliveries_that_are_never_settled_stop_by_credit() {
    let mut rig = Rig::begun();
    receiving(&mut rig, 0, &credits(100));
    for id in 0..100 {
        rig.send_transfer(0, &transfer(0, id), b"x");
    }
    assert_eq!(rig.events().len(), 100);
    assert!(rig.written().is_empty());
    // A reader that answers nothing, and a window that is gone: the peer has no right to more.
    rig.send_transfer(0, &transfer(0, 100), b"x");
    let written = rig.performatives();
    assert!(matches!(&written[..], [Performative::Detach(_)]));
}

#[test]
fn a_flood_of_transfers_on_a_detached_link_ends_with_its_window() {
    let config = Config {
        incoming_window: 100,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|_| {});
    rig.send_frame(0, &begin());
    rig.events();
    let link = receiving(&mut rig, 0, &credits(1_000));
    rig.connection.detach(link, None);
    for id in 0..=100 {
        rig.send_transfer(0, &transfer(0, id), b"x");
    }
    assert_eq!(
        ended_with(&rig.performatives()),
        "amqp:session:window-violation"
    );
}

/// A step of a peer, or of whoever drives the engine.
#[derive(Clone, Debug)]
enum Step {
    Frame(u16, Vec<u8>),
    /// A frame of which a byte is another.
    Bent(u16, Vec<u8>, usize, u8),
    Raw(Vec<u8>),
    Later(u32),
    Drive(u8),
}

fn bytes_of(performative: &impl Serialize) -> Vec<u8> {
    serde_amqp::to_vec(performative).unwrap()
}

fn written_by(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut body = BytesMut::new();
    write(&mut body);
    body.to_vec()
}

/// Small numbers, and those at the ends.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0..6_u32, 2 => 0..60_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)]
}

fn outcome() -> impl Strategy<Value = Option<DeliveryState>> {
    prop_oneof![
        Just(None),
        Just(Some(DeliveryState::Received)),
        Just(Some(DeliveryState::Outcome(Outcome::Accepted))),
        Just(Some(DeliveryState::Outcome(Outcome::Released))),
        Just(Some(DeliveryState::Outcome(Outcome::Rejected(None)))),
    ]
}

fn performative() -> impl Strategy<Value = Vec<u8>> {
    let flow = (
        (number(), number(), number(), number()),
        proptest::option::of(number()),
        proptest::option::of(number()),
        any::<(bool, bool, bool)>(),
    );
    let flow = flow.prop_map(|((seen, window, next, credit), handle, count, flags)| {
        let flow = Flow {
            next_incoming_id: flags.0.then_some(seen),
            incoming_window: window,
            next_outgoing_id: next,
            outgoing_window: window,
            handle,
            delivery_count: count,
            link_credit: Some(credit),
            available: None,
            drain: flags.1,
            echo: flags.2,
        };
        written_by(|out| performative::encode_flow(&flow, out))
    });
    let transfer = (
        0..4_u32,
        proptest::option::of(number()),
        vec(any::<u8>(), 0..100),
        any::<[bool; 4]>(),
        0..2_usize,
    );
    let transfer = transfer.prop_map(|(handle, id, payload, flags, tags)| {
        let transfer = Transfer {
            handle,
            delivery_id: id,
            delivery_tag: (tags > 0).then(|| Bytes::from_static(b"tag")),
            settled: Some(flags[0]),
            more: flags[1],
            aborted: flags[2] && flags[3],
            ..Transfer::default()
        };
        let mut body = written_by(|out| performative::encode_transfer(&transfer, out));
        body.extend(payload);
        body
    });
    let disposition = (
        number(),
        proptest::option::of(number()),
        any::<(bool, bool)>(),
        outcome(),
    );
    let disposition = disposition.prop_map(|(first, last, flags, state)| {
        let role = if flags.0 {
            Role::Receiver
        } else {
            Role::Sender
        };
        let disposition = Disposition {
            role,
            first,
            last,
            settled: flags.1,
            state,
            batchable: false,
        };
        written_by(|out| performative::encode_disposition(&disposition, out))
    });
    prop_oneof![
        1 => Just(bytes_of(&rig::open())),
        3 => (0..5_u32).prop_map(|incoming_window| {
            bytes_of(&wire::Begin { incoming_window, ..begin() })
        }),
        6 => (0..4_u32, any::<bool>(), 0..3_u64).prop_map(|(handle, sends, size)| {
            let max_message_size = (size > 0).then_some(size * 100);
            bytes_of(&wire::Attach { max_message_size, ..attach(handle, sends, "q") })
        }),
        8 => flow,
        12 => transfer,
        6 => disposition,
        3 => (0..4_u32).prop_map(|handle| bytes_of(&detach_frame(handle))),
        1 => Just(bytes_of(&wire::End { error: None })),
        1 => Just(Vec::new()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => (0..3_u16, performative()).prop_map(|(channel, body)| Step::Frame(channel, body)),
        1 => (0..3_u16, performative(), any::<usize>(), 1..=255_u8)
            .prop_map(|(channel, body, at, by)| Step::Bent(channel, body, at, by)),
        1 => vec(any::<u8>(), 0..40).prop_map(Step::Raw),
        2 => (0..90_u32).prop_map(Step::Later),
        20 => any::<u8>().prop_map(Step::Drive),
    ]
}

/// Whoever drives, without a plan.
#[derive(Default)]
struct Driver {
    asked: Vec<LinkId>,
    live: HashSet<LinkId>,
    links: Vec<LinkId>,
    received: Vec<Received>,
    sent: Vec<(LinkId, Sent)>,
    closed: bool,
}

impl Driver {
    fn listen(&mut self, rig: &mut Rig) {
        for event in rig.events() {
            assert!(!self.closed, "{event:?} behind the last");
            match event {
                Event::Attached { link, .. } => {
                    assert!(self.live.insert(link));
                    self.asked.push(link);
                    self.links.push(link);
                }
                Event::Delivery(incoming) => {
                    assert!(self.live.contains(&incoming.link));
                    self.received.push(incoming.received);
                }
                Event::Credit { link, .. } | Event::Settled { link, .. } => {
                    assert!(self.live.contains(&link));
                }
                Event::Detached { link, .. } => assert!(self.live.remove(&link)),
                Event::Closed(_) => self.closed = true,
                Event::Opened(_) | Event::SaslPlain(_) | Event::SaslExternal => {}
            }
        }
    }

    fn act(&mut self, rig: &mut Rig, choice: u8) {
        let pick = usize::from(choice / 8);
        let engine = &mut rig.connection;
        let link = self.links.get(pick % self.links.len().max(1)).copied();
        match (choice % 8, link) {
            (0 | 1, _) => {
                if let Some(link) = self.asked.pop() {
                    let terms = LinkTerms {
                        credit: (pick % 8) as u32,
                        max_message_size: (pick % 3 == 0).then_some(150),
                        ..LinkTerms::default()
                    };
                    engine.accept(link, &terms);
                }
            }
            (2, _) if pick < 6 => {
                if let Some(link) = self.asked.pop() {
                    engine.refuse(link, &ErrorInfo::new("amqp:not-allowed", "no"));
                    self.live.remove(&link);
                }
            }
            (2 | 3, _) => {
                if let Some(received) = self.received.pop() {
                    engine.settle(received, Outcome::Accepted);
                }
            }
            (4 | 5, Some(link)) => {
                let delivery = Outgoing {
                    tag: b"tag",
                    message_format: 0,
                    settled: pick % 2 == 0,
                    payload: Bytes::from(vec![0; pick * 50]),
                };
                let can_send = engine.can_send(link);
                match engine.send(link, delivery) {
                    Ok(sent) => {
                        assert!(can_send);
                        self.sent.push((link, sent));
                    }
                    Err(SendError::NoCredit) => assert!(!can_send),
                    Err(_) => {}
                }
            }
            (6, Some(link)) => {
                if let Some((link, sent)) = self.sent.pop() {
                    engine.settle_sent(link, sent);
                }
                engine.drained(link);
            }
            (7, Some(link)) if pick == 0 => {
                let was_asked = self.asked.contains(&link);
                engine.detach(link, None);
                if !was_asked {
                    self.live.remove(&link);
                }
            }
            (7, Some(link)) => engine.set_credit(link, (pick % 8) as u32),
            _ => {}
        }
    }
}

/// What the engine keeps count of is what there is.
fn audit(connection: &Connection) {
    let (mut links, mut partial, mut waiting, mut asked) = (0, 0, 0, 0);
    for session in connection.sessions.values() {
        links += session.links.len();
        waiting += session
            .waiting
            .iter()
            .map(|waiting| waiting.payload.len())
            .sum::<usize>();
        assert!(session.waiting.len() <= 1);
        for link in session.links.values() {
            if let Phase::Asked(attach) = &link.phase {
                asked += attach.bytes();
            }
            if let Direction::Receiving(receiving) = &link.direction {
                partial += receiving.partial.as_ref().map_or(0, |p| p.payload.len());
            }
        }
    }
    assert_eq!(connection.links, links);
    assert_eq!(connection.partial_bytes, partial);
    assert_eq!(connection.waiting_bytes, waiting);
    assert_eq!(connection.asked_bytes, asked);
}

/// What the engine says is well formed; its reader has a limit of 512 bytes.
fn look(rig: &mut Rig, closing: &mut bool) {
    for written in rig.written() {
        assert!(!*closing, "{written:?} behind the close");
        if let Written::Frame(_, performative, payload) = &written {
            *closing = matches!(performative, Performative::Close(_));
            if let Performative::Transfer(_) = performative {
                assert!(payload.len() < 512);
            }
        }
    }
}

fn run(steps: &[Step]) {
    let config = Config {
        sessions_max: 2,
        links_max: 5,
        incoming_window: 20,
        delivery_bytes_max: 300,
        partial_bytes_max: 500,
        output_bytes_max: 3_000,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|open| open.max_frame_size = wire::MaxFrameSize(512));
    let mut driver = Driver::default();
    let mut closing = false;
    for step in steps {
        match step {
            Step::Frame(channel, body) => rig.bytes(&framed(*channel, body)),
            Step::Bent(channel, body, at, by) => {
                let mut frame = framed(*channel, body);
                let at = at % frame.len();
                frame[at] ^= by;
                rig.bytes(&frame);
            }
            Step::Raw(bytes) => rig.bytes(bytes),
            Step::Later(seconds) => rig.advance(*seconds * SECOND),
            Step::Drive(choice) => driver.act(&mut rig, *choice),
        }
        driver.listen(&mut rig);
        if !matches!(step, Step::Drive(choice) if choice % 2 == 0) {
            look(&mut rig, &mut closing);
        }
        audit(&rig.connection);
        assert_eq!(rig.connection.is_closed(), driver.closed);
    }
    if driver.closed {
        assert!(driver.live.is_empty(), "each link's end is told");
    }
}

/// Any bytes, whole and in pieces: the same is said and told.
fn run_bytes(start: &[u8], bytes: &[u8], piece: usize) {
    let mut outputs = Vec::new();
    for piece in [usize::MAX, piece.max(1)] {
        let mut rig = Rig::new(Config::new("hub"));
        for piece in start.chunks(piece).chain(bytes.chunks(piece)) {
            rig.bytes(piece);
        }
        let events = format!("{:?}", rig.events());
        outputs.push((events, format!("{:?}", rig.written())));
    }
    assert_eq!(outputs[0], outputs[1]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_frames_leaves_the_books_in_order(steps in vec(step(), 0..120)) {
        run(&steps);
    }

    #[test]
    fn any_bytes_mean_the_same_in_pieces(
        sasl in any::<bool>(),
        frames in vec((0..2_u16, performative()), 0..8),
        bytes in vec(any::<u8>(), 0..60),
        piece in 1..50_usize,
    ) {
        let mut start = Vec::new();
        if sasl {
            start.extend(ProtocolHeader::SASL.encode());
        } else {
            start.extend(ProtocolHeader::AMQP.encode());
            start.extend(framed(0, &bytes_of(&rig::open())));
            for (channel, body) in frames {
                start.extend(framed(channel, &body));
            }
        }
        run_bytes(&start, &bytes, piece);
    }

    #[test]
    fn bent_performatives_are_read_or_refused(body in performative(), bends in vec((any::<usize>(), any::<u8>()), 1..4)) {
        let mut body = body;
        prop_assume!(!body.is_empty());
        for (at, by) in bends {
            let at = at % body.len();
            body[at] ^= by;
        }
        let mut rig = Rig::begun();
        rig.bytes(&framed(0, &body));
        audit(&rig.connection);
    }
}
