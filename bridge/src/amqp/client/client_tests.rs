//! The client against `edgehub_amqp`'s server engine, and against bytes that no server should send.

use std::collections::VecDeque;

use bytes::Bytes;
use edgehub_amqp::{
    connection::{Config, Connection, Event as ServerEvent, LinkId, LinkTerms, Outgoing},
    performative::{
        AttachFrame, DeliveryState, Disposition, Flow, Outcome, Performative, Transfer,
    },
};
use fe2o3_amqp_types::{
    definitions::{Handle, Role},
    performatives::Begin,
};
use proptest::prelude::*;

use super::*;

fn start() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn client(now: Instant) -> Client {
    Client::new(ClientConfig::new("us".to_owned(), "parent".to_owned()), now)
}

fn up(name: &str) -> LinkSpec {
    LinkSpec {
        name: name.to_owned(),
        direction: Direction::Up,
        settled: false,
        address: "node".to_owned(),
        own_address: "us".to_owned(),
        properties: vec![("key", "value".to_owned())],
    }
}

fn down(name: &str, credit: u32, second: bool) -> LinkSpec {
    LinkSpec {
        direction: Direction::Down { credit, second },
        ..up(name)
    }
}

/// A client and a server.
struct Pair {
    client: Client,
    server: Connection,
    now: Instant,
    events: VecDeque<Event>,
    server_events: VecDeque<ServerEvent>,
}

impl Pair {
    fn new(config: Config) -> Self {
        let now = start();
        let mut pair = Self {
            client: client(now),
            server: Connection::new(config, now),
            now,
            events: VecDeque::new(),
            server_events: VecDeque::new(),
        };
        pair.drive();
        pair
    }

    fn drive(&mut self) {
        loop {
            let mut moved = !self.client.output().is_empty();
            let mut input = BytesMut::from(self.client.output());
            self.client.written(input.len());
            self.server.receive(&mut input, self.now);
            while let Some(event) = self.server.poll() {
                self.server_events.push_back(event);
            }
            let mut input = BytesMut::new();
            while let Some(output) = self.server.output() {
                input.extend_from_slice(&output);
            }
            moved |= !input.is_empty();
            self.client.receive(&mut input, self.now);
            while let Some(event) = self.client.poll() {
                self.events.push_back(event);
            }
            if !moved {
                return;
            }
        }
    }

    fn session(&mut self) -> SessionKey {
        let key = self.client.begin().unwrap();
        self.drive();
        assert!(matches!(self.events.pop_back(), Some(Event::Begun(begun)) if begun == key));
        key
    }

    /// A link that the server accepts.
    fn link(
        &mut self,
        session: SessionKey,
        spec: LinkSpec,
        terms: &LinkTerms,
    ) -> (LinkKey, LinkId) {
        let link = self.client.attach(session, spec).unwrap();
        self.drive();
        let Some(ServerEvent::Attached { link: theirs, .. }) = self.server_events.pop_back() else {
            panic!("no attach")
        };
        self.server.accept(theirs, terms);
        self.drive();
        let attached =
            |event: &Event| matches!(event, Event::Attached { link: one, .. } if *one == link);
        assert!(self.events.iter().any(attached));
        self.events.clear();
        self.server_events.clear();
        (link, theirs)
    }
}

fn credit(credit: u32) -> LinkTerms {
    LinkTerms {
        credit,
        ..LinkTerms::default()
    }
}

#[test]
fn deliveries_of_any_size_cross_in_order_within_window_and_frame_size() {
    for (frame_bytes_max, incoming_window) in [(512, 3), (1000, 50), (65_536, 5000)] {
        let mut config = Config::new("parent");
        config.frame_bytes_max = frame_bytes_max;
        config.incoming_window = incoming_window;
        let mut pair = Pair::new(config);
        let session = pair.session();
        let (link, _) = pair.link(session, up("a"), &credit(1000));
        let mut sent = Vec::new();
        for size in [0, 1, 400, 450, 512, 5000, 70_000, 200_000] {
            let payload = Bytes::from(vec![size as u8; size]);
            while !pair.client.can_send(link) {
                pair.drive();
            }
            let number = pair.client.send(link, 7, payload.clone()).unwrap();
            sent.push((number, payload));
            pair.drive();
        }
        let mut arrived = Vec::new();
        for event in std::mem::take(&mut pair.server_events) {
            if let ServerEvent::Delivery(delivery) = event {
                assert_eq!(delivery.message_format, 7);
                assert!(!delivery.settled);
                arrived.push(delivery.payload);
                pair.server.settle(delivery.received, Outcome::Accepted);
            }
        }
        let expected: Vec<Bytes> = sent.iter().map(|(_, payload)| payload.clone()).collect();
        assert_eq!(arrived, expected);
        pair.drive();
        let settled: Vec<u32> = std::mem::take(&mut pair.events)
            .into_iter()
            .filter_map(|event| match event {
                Event::Settled {
                    number, outcome, ..
                } => {
                    assert_eq!(outcome, Some(Outcome::Accepted));
                    Some(number)
                }
                _ => None,
            })
            .collect();
        let numbers: Vec<u32> = sent.iter().map(|(number, _)| *number).collect();
        assert_eq!(settled, numbers);
    }
}

#[test]
fn credit_is_what_may_be_sent() {
    let mut pair = Pair::new(Config::new("parent"));
    let session = pair.session();
    let (link, theirs) = pair.link(session, up("a"), &credit(3));
    for _ in 0..3 {
        pair.client.send(link, 0, Bytes::new()).unwrap();
    }
    assert_eq!(
        pair.client.send(link, 0, Bytes::new()),
        Err(SendError::NoRoom)
    );
    pair.drive();
    assert!(!pair.client.can_send(link));
    pair.server.set_credit(theirs, 10);
    pair.drive();
    assert!(
        pair.events
            .iter()
            .any(|event| matches!(event, Event::Credit(_)))
    );
    assert!(pair.client.can_send(link));
}

#[test]
fn deliveries_come_within_credit_and_are_settled_in_either_mode() {
    for second in [false, true] {
        let mut pair = Pair::new(Config::new("parent"));
        let session = pair.session();
        let (link, theirs) = pair.link(session, down("a", 10, second), &LinkTerms::default());
        for round in 0..100_u32 {
            let outgoing = Outgoing {
                tag: &round.to_be_bytes(),
                message_format: 0,
                settled: false,
                payload: Bytes::from(vec![0; 100_000]),
            };
            let sent = pair.server.send(theirs, outgoing).unwrap();
            pair.drive();
            let Some(Event::Delivery(delivery)) = pair.events.pop_front() else {
                panic!("no delivery")
            };
            assert_eq!(delivery.tag, round.to_be_bytes()[..]);
            assert_eq!(delivery.payload.len(), 100_000);
            pair.client.settle(link, delivery.number, Outcome::Released);
            pair.client.release(link);
            pair.drive();
            let settled = pair.server_events.iter().find_map(|event| match event {
                ServerEvent::Settled {
                    sent: one, settled, ..
                } if *one == sent => Some(*settled),
                _ => None,
            });
            assert_eq!(settled, Some(!second));
            pair.server_events.clear();
            pair.server.settle_sent(theirs, sent);
            pair.drive();
        }
    }
}

#[test]
fn a_refused_link_a_detached_one_and_an_ended_session_leave_the_others_alone() {
    let mut pair = Pair::new(Config::new("parent"));
    let (session, other) = (pair.session(), pair.session());
    let (kept, _) = pair.link(other, up("kept"), &credit(5));
    let refused = pair.client.attach(session, up("refused")).unwrap();
    pair.drive();
    let Some(ServerEvent::Attached { link, .. }) = pair.server_events.pop_back() else {
        panic!("no attach")
    };
    let error = ErrorInfo::new("amqp:unauthorized-access", "no");
    pair.server.refuse(link, &error);
    pair.drive();
    let [
        Event::Detached {
            link,
            error: Some(told),
        },
    ] = pair.events.make_contiguous()
    else {
        panic!("{:?}", pair.events)
    };
    assert_eq!(
        (*link, &*told.condition),
        (refused, "amqp:unauthorized-access")
    );
    pair.events.clear();
    // The handle can be used again.
    let (link, theirs) = pair.link(session, up("again"), &credit(5));
    pair.client.send(link, 0, Bytes::new()).unwrap();
    pair.server.detach(theirs, Some(&error));
    pair.drive();
    let gone = |event: &Event| matches!(event, Event::Detached { link: one, .. } if *one == link);
    assert!(pair.events.iter().any(gone));
    assert_eq!(
        pair.client.send(link, 0, Bytes::new()),
        Err(SendError::NoRoom)
    );
    pair.client.end_session(session);
    pair.drive();
    assert!(pair.client.can_send(kept));
    let again = pair.session();
    assert_ne!(
        again, session,
        "the channel is the same, the session is not"
    );
    pair.client.detach(kept);
    pair.drive();
    assert!(
        pair.events
            .iter()
            .all(|event| !matches!(event, Event::Detached { .. }) || gone(event))
    );
}

#[test]
fn heartbeats_go_out_at_half_the_peers_time_and_a_silent_peer_is_given_up() {
    let mut config = Config::new("parent");
    config.idle_advertised = Duration::from_secs(20);
    let mut pair = Pair::new(config);
    pair.client.note_said(pair.now);
    let due = pair.client.next_timeout().unwrap();
    assert_eq!(due, pair.now + Duration::from_secs(10));
    pair.client.handle_timeout(due);
    assert_eq!(pair.client.output(), [0, 0, 0, 8, 2, 0, 0, 0]);
    let late = pair.now + Duration::from_secs(60);
    pair.client.handle_timeout(late);
    let idle = ClientError::Idle(Duration::from_secs(60));
    assert!(matches!(pair.client.poll(), Some(Event::Closed(error)) if error == idle));
    assert_eq!(pair.client.next_timeout(), None);
}

#[test]
fn a_close_waits_for_the_other_side_and_not_for_ever() {
    let mut pair = Pair::new(Config::new("parent"));
    pair.client.close(pair.now);
    pair.drive();
    assert!(matches!(
        pair.events.back(),
        Some(Event::Closed(ClientError::Ours))
    ));
    let mut pair = Pair::new(Config::new("parent"));
    pair.client.close(pair.now);
    let due = pair.client.next_timeout().unwrap();
    pair.client.handle_timeout(due);
    assert!(matches!(
        pair.client.poll(),
        Some(Event::Opened { .. } | Event::Closed(ClientError::Ours))
    ));
}

#[test]
fn what_comes_first_must_be_the_same_protocol() {
    for (bytes, text) in [
        (&b"AMQP\x03\x01\x00\x00"[..], "Sasl"),
        (b"AMQP\x00\x00\x09\x01", "version"),
        (b"HTTP/1.1 400", "AMQP"),
    ] {
        let now = start();
        let mut client = client(now);
        client.receive(&mut BytesMut::from(bytes), now);
        let Some(Event::Closed(ClientError::Fault(fault))) = client.poll() else {
            panic!("{bytes:?}")
        };
        assert!(fault.contains(text), "{fault}");
    }
    let now = start();
    let mut silent = client(now);
    let due = silent.next_timeout().unwrap();
    silent.handle_timeout(due);
    let late = ClientError::OpenTimeout(Duration::from_secs(20));
    assert!(matches!(silent.poll(), Some(Event::Closed(error)) if error == late));
}

/// A server that says what the test wants.
struct Script {
    client: Client,
    now: Instant,
}

impl Script {
    /// A client with a session on channel 0, begun as 5, and a link that it sends on (handle 0 as 9)
    /// and one that it receives on (1 as 8).
    fn new() -> (Self, LinkKey, LinkKey) {
        let mut pair = Pair::new(Config::new("parent"));
        let session = pair.session();
        let (up, _) = pair.link(session, up("up"), &credit(100));
        let (down, _) = pair.link(session, down("down", 10, true), &LinkTerms::default());
        let now = pair.now;
        let script = Self {
            client: pair.client,
            now,
        };
        (script, up, down)
    }

    fn say(&mut self, channel: u16, write: impl FnOnce(&mut BytesMut)) -> Vec<Event> {
        let mut bytes = BytesMut::new();
        frames::sure(&mut bytes, channel, write);
        self.client.receive(&mut bytes, self.now);
        std::iter::from_fn(|| self.client.poll()).collect()
    }
}

fn disposition(first: u32, last: u32, settled: bool) -> Disposition {
    Disposition {
        role: Role::Receiver,
        first,
        last: Some(last),
        settled,
        state: Some(DeliveryState::Outcome(Outcome::Accepted)),
        batchable: false,
    }
}

#[test]
fn a_range_over_everything_is_walked_by_what_there_is() {
    let (mut script, up, _) = Script::new();
    for _ in 0..3 {
        script.client.send(up, 0, Bytes::new()).unwrap();
    }
    let all = disposition(0, u32::MAX, true);
    let events = script.say(0, |out| performative::encode_disposition(&all, out));
    assert_eq!(events.len(), 3);
    let events = script.say(0, |out| performative::encode_disposition(&all, out));
    assert!(events.is_empty(), "once");
}

#[test]
fn a_receiver_that_waits_for_our_settlement_is_answered() {
    let (mut script, up, _) = Script::new();
    let number = script.client.send(up, 0, Bytes::new()).unwrap();
    let written = script.client.output().len();
    script.client.written(written);
    let first = disposition(number, number, false);
    script.say(0, |out| performative::encode_disposition(&first, out));
    let output = Bytes::copy_from_slice(&script.client.output()[8..]);
    let (answer, _) = performative::decode(&output).unwrap();
    let Performative::Disposition(answer) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!((answer.role, answer.settled), (Role::Sender, true));
}

#[test]
fn what_breaks_a_session_ends_it_and_what_breaks_the_connection_ends_that() {
    type Write = fn(&mut BytesMut);
    let in_session: [(&str, Write); 4] = [
        ("unattached-handle", |out| {
            let flow = Flow {
                handle: Some(77),
                ..Flow::default()
            };
            performative::encode_flow(&flow, out);
        }),
        ("unattached-handle", |out| {
            let transfer = Transfer {
                handle: 77,
                ..Transfer::default()
            };
            performative::encode_transfer(&transfer, out);
        }),
        ("unattached-handle", |out| {
            performative::encode_detach(77, true, None, out);
        }),
        ("not-allowed", |out| {
            let attach = attach_of("nobody asked");
            performative::encode_attach(&attach.attach, out).unwrap();
        }),
    ];
    for (condition, write) in in_session {
        let (mut script, ..) = Script::new();
        let events = script.say(0, write);
        let [
            Event::Ended {
                error: Some(error), ..
            },
        ] = &events[..]
        else {
            panic!("{events:?}")
        };
        assert!(error.condition.ends_with(condition), "{error:?}");
        assert!(script.client.is_open());
    }
    let of_all: [(u16, Write); 3] = [
        (4711, |out| performative::encode_end(None, out)),
        (9, |out| {
            let begin = begin_of(None);
            performative::encode_begin(&begin, out).unwrap();
        }),
        (9, |out| {
            let begin = begin_of(Some(0));
            performative::encode_begin(&begin, out).unwrap();
        }),
    ];
    for (channel, write) in of_all {
        let (mut script, ..) = Script::new();
        let events = script.say(channel, write);
        assert!(matches!(
            &events[..],
            [Event::Closed(ClientError::Fault(_))]
        ));
    }
}

fn begin_of(remote_channel: Option<u16>) -> Begin {
    Begin {
        remote_channel,
        next_outgoing_id: 0,
        incoming_window: 1,
        outgoing_window: 1,
        handle_max: Handle(1),
        offered_capabilities: None,
        desired_capabilities: None,
        properties: None,
    }
}

fn attach_of(name: &str) -> AttachFrame {
    let now = start();
    let mut other = Pair::new(Config::new("parent"));
    let session = other.session();
    other.client.attach(session, up(name)).unwrap();
    let output = Bytes::copy_from_slice(&other.client.output()[8..]);
    let _ = now;
    match performative::decode(&output).unwrap().0 {
        Performative::Attach(attach) => *attach,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_breaks_a_link_detaches_it_alone() {
    let transfer = |more: bool| Transfer {
        handle: 1,
        delivery_id: Some(0),
        delivery_tag: Some(Bytes::from_static(b"t")),
        more,
        ..Transfer::default()
    };
    // More than the credit of ten.
    let (mut script, up, down) = Script::new();
    let mut last = Vec::new();
    for _ in 0..11 {
        last = script.say(0, |out| {
            performative::encode_transfer(&transfer(false), out);
        });
    }
    let [
        Event::Detached {
            link,
            error: Some(error),
        },
    ] = &last[..]
    else {
        panic!("{last:?}")
    };
    assert_eq!(*link, down);
    assert_eq!(error.condition, "amqp:link:transfer-limit-exceeded");
    assert!(script.client.can_send(up));
    // More than a message may have.
    let (mut script, ..) = Script::new();
    let mut last = Vec::new();
    for _ in 0..30 {
        last = script.say(0, |out| {
            performative::encode_transfer(&transfer(true), out);
            out.extend_from_slice(&[0; 60_000]);
        });
        if !last.is_empty() {
            break;
        }
    }
    let [
        Event::Detached {
            error: Some(error), ..
        },
    ] = &last[..]
    else {
        panic!("{last:?}")
    };
    assert_eq!(error.condition, "amqp:link:message-size-exceeded");
    // One that is given up leaves nothing behind.
    let (mut script, ..) = Script::new();
    for _ in 0..100 {
        let events = script.say(0, |out| performative::encode_transfer(&transfer(true), out));
        assert!(events.is_empty());
        let aborted = Transfer {
            aborted: true,
            ..transfer(false)
        };
        let events = script.say(0, |out| performative::encode_transfer(&aborted, out));
        assert!(events.is_empty(), "{events:?}");
    }
}

#[test]
fn numbers_wrap() {
    let (mut script, up, _) = Script::new();
    let session = script.client.session_mut(up.session).unwrap();
    session.next_outgoing_id = u32::MAX - 1;
    session.next_delivery = u32::MAX - 1;
    session.link_mut(up.handle).unwrap().delivery_count = u32::MAX - 1;
    for _ in 0..4 {
        script.client.send(up, 0, Bytes::new()).unwrap();
    }
    let all = disposition(u32::MAX - 1, 1, true);
    let events = script.say(0, |out| performative::encode_disposition(&all, out));
    let numbers: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            Event::Settled { number, .. } => Some(*number),
            _ => None,
        })
        .collect();
    assert_eq!(numbers, [u32::MAX - 1, u32::MAX, 0, 1]);
    let flow = Flow {
        next_incoming_id: Some(2),
        incoming_window: 5,
        handle: Some(0),
        delivery_count: Some(2),
        link_credit: Some(4),
        ..Flow::default()
    };
    script.say(0, |out| performative::encode_flow(&flow, out));
    let session = script.client.session_mut(up.session).unwrap();
    assert_eq!(session.remote_window, 5);
    assert_eq!(session.link(up.handle).unwrap().credit, 4);
}

proptest! {
    /// Frames of any kind and content, in any order, neither panic nor let anything grow.
    #[test]
    fn no_sequence_of_frames_panics(
        frames in proptest::collection::vec(
            (0..3_u16, 0..9_u8, 0..4_u32, any::<u32>(), any::<u32>(), any::<bool>()),
            0..60,
        ),
    ) {
        let (mut script, up, down) = Script::new();
        for (channel, kind, handle, a, b, flag) in frames {
            script.say(channel, |out| match kind {
                0 => performative::encode_flow(&Flow {
                    next_incoming_id: flag.then_some(a),
                    incoming_window: b,
                    handle: (handle < 3).then_some(handle),
                    delivery_count: Some(b),
                    link_credit: Some(a),
                    drain: flag,
                    echo: !flag,
                    ..Flow::default()
                }, out),
                1 | 2 => performative::encode_transfer(&Transfer {
                    handle,
                    delivery_id: flag.then_some(a),
                    more: kind == 1,
                    aborted: b % 5 == 0,
                    ..Transfer::default()
                }, out),
                3 | 4 => {
                    let role = if kind == 3 { Role::Receiver } else { Role::Sender };
                    let disposition = Disposition { role, ..disposition(a, b, flag) };
                    performative::encode_disposition(&disposition, out);
                }
                5 => performative::encode_detach(handle, flag, None, out),
                6 => performative::encode_end(None, out),
                7 => performative::encode_begin(&begin_of(flag.then_some(0)), out).unwrap(),
                _ => out.extend_from_slice(&a.to_be_bytes()),
            });
            let _ = script.client.send(up, 0, Bytes::from_static(b"x"));
            script.client.settle(down, a, Outcome::Accepted);
            script.client.release(down);
        }
        for session in script.client.sessions.iter().flatten() {
            prop_assert!(session.unsettled.len() <= 60);
        }
    }

    /// Any bytes.
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (mut script, ..) = Script::new();
        script.client.receive(&mut BytesMut::from(&bytes[..]), script.now);
        let mut fresh = client(start());
        fresh.receive(&mut BytesMut::from(&bytes[..]), start());
    }
}
