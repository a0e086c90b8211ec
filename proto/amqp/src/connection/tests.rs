//! Sessions and links, frame by frame.

use std::time::Duration;

use bytes::Bytes;
use fe2o3_amqp_types::definitions::{Handle, Role};
use fe2o3_amqp_types::performatives as wire;

use super::rig::{Rig, Written, attach, begin, credit, framed, transfer};
use super::*;
use crate::performative::{DeliveryState, Disposition, Performative, Transfer};

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) fn receiving(rig: &mut Rig, handle: u32, terms: &LinkTerms) -> LinkId {
    rig.send_frame(0, &attach(handle, true, "q"));
    let link = rig.attached();
    rig.connection.accept(link, terms);
    rig.written();
    link
}

pub(super) fn sending(rig: &mut Rig, handle: u32, credits: u32) -> LinkId {
    rig.send_frame(0, &attach(handle, false, "q"));
    let link = rig.attached();
    rig.connection.accept(link, &LinkTerms::default());
    rig.send_flow(0, &credit(handle, 0, credits));
    rig.written();
    rig.events();
    link
}

pub(super) fn credits(count: u32) -> LinkTerms {
    LinkTerms {
        credit: count,
        ..LinkTerms::default()
    }
}

pub(super) fn out(settled: bool, payload: &'static [u8]) -> Outgoing<'static> {
    Outgoing {
        tag: b"0123456789abcdef",
        message_format: 0,
        settled,
        payload: Bytes::from_static(payload),
    }
}

pub(super) fn payloads(events: &[Event]) -> Vec<Bytes> {
    let deliveries = events.iter().filter_map(|event| match event {
        Event::Delivery(incoming) => Some(incoming.payload.clone()),
        _ => None,
    });
    deliveries.collect()
}

pub(super) fn received(events: &[Event]) -> Vec<Received> {
    let deliveries = events.iter().filter_map(|event| match event {
        Event::Delivery(incoming) => Some(incoming.received),
        _ => None,
    });
    deliveries.collect()
}

pub(super) fn fault(events: &[Event]) -> &str {
    match events.last() {
        Some(Event::Closed(CloseCause::Fault(error))) => &error.condition,
        other => panic!("{other:?}"),
    }
}

pub(super) fn ended_with(written: &[Performative]) -> String {
    match written.last() {
        Some(Performative::End(end)) => ErrorInfo::from(end.error.clone().unwrap())
            .condition
            .into_owned(),
        other => panic!("{other:?}"),
    }
}

pub(super) fn detached_with(written: &[Performative]) -> String {
    match written.last() {
        Some(Performative::Detach(detach)) => {
            assert!(detach.closed);
            ErrorInfo::from(detach.error.clone().unwrap())
                .condition
                .into_owned()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_accepted_link_is_echoed_and_gets_its_credit_with_a_delivery_count() {
    let mut rig = Rig::begun();
    rig.send_frame(0, &attach(7, true, "/devices/d/messages/events"));
    let link = rig.attached();
    assert!(
        rig.performatives().is_empty(),
        "it is not answered before the verdict"
    );
    let terms = LinkTerms {
        max_message_size: Some(1_048_576),
        rcv_settle_mode: Some(ReceiverSettleMode::First),
        ..credits(1000)
    };
    rig.connection.accept(link, &terms);
    let written = rig.performatives();
    let [Performative::Attach(reply), Performative::Flow(flow)] = &written[..] else {
        panic!("{written:?}");
    };
    let reply = Attach::new((**reply).clone(), 0);
    assert!(!reply.peer_sends() && reply.name() == "link7");
    assert_eq!(reply.other_address(), Some("/devices/d/messages/events"));
    assert_eq!(reply.max_message_size(), Some(1_048_576));
    assert_eq!(
        (flow.handle, flow.link_credit, flow.delivery_count),
        (Some(7), Some(1000), Some(0))
    );
    assert_eq!(
        (flow.next_incoming_id, flow.incoming_window),
        (Some(0), 5000)
    );
}

#[test]
fn a_refused_link_has_no_terminus_and_the_rest_goes_on() {
    let mut rig = Rig::begun();
    let other = sending(&mut rig, 1, 10);
    rig.send_frame(0, &attach(2, false, "forbidden"));
    let link = rig.attached();
    rig.connection
        .refuse(link, &ErrorInfo::new("amqp:unauthorized-access", "no"));
    let written = rig.performatives();
    let [Performative::Attach(reply), Performative::Detach(detach)] = &written[..] else {
        panic!("{written:?}");
    };
    assert!(reply.attach.source.is_none() && reply.attach.target.is_none());
    assert_eq!(reply.attach.initial_delivery_count, Some(0));
    assert!(detach.closed && detach.handle.0 == 2);
    // The peer's own detach needs no answer, and then the handle is free.
    rig.send_frame(0, &detach_frame(2));
    assert!(rig.performatives().is_empty() && rig.events().is_empty());
    rig.send_frame(0, &attach(2, false, "allowed"));
    rig.attached();
    assert!(rig.connection.send(other, out(true, b"x")).is_ok());
}

pub(super) fn detach_frame(handle: u32) -> wire::Detach {
    wire::Detach {
        handle: Handle(handle),
        closed: true,
        error: None,
    }
}

#[test]
fn deliveries_are_settled_in_ranges_and_credit_comes_back() {
    let mut rig = Rig::begun();
    let link = receiving(&mut rig, 0, &credits(100));
    let other = receiving(&mut rig, 1, &credits(100));
    for id in 0..6 {
        rig.send_transfer(0, &transfer(u32::from(id == 3), id), b"body");
    }
    let events = rig.events();
    assert_eq!(payloads(&events).len(), 6);
    let received = received(&events);
    assert_eq!(received[3].link(), other);
    for (index, received) in received.iter().enumerate() {
        let outcome = if index == 4 {
            Outcome::Released
        } else {
            Outcome::Accepted
        };
        rig.connection.settle(*received, outcome);
    }
    let written = rig.performatives();
    let ranges: Vec<_> = written
        .iter()
        .map(|written| match written {
            Performative::Disposition(d) => {
                assert!(d.settled && d.role == Role::Receiver);
                (d.first, d.last)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ranges, [(0, Some(3)), (4, None), (5, None)]);
    // A tenth of the credit has to be due before it is topped up.
    for id in 6..11 {
        rig.send_transfer(0, &transfer(0, id), b"body");
    }
    for received in self::received(&rig.events()) {
        rig.connection.settle(received, Outcome::Accepted);
    }
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Disposition(_), Performative::Flow(flow)]
            if flow.link_credit == Some(100) && flow.delivery_count == Some(10)),
        "{written:?}"
    );
    rig.connection.settle(received[0], Outcome::Accepted);
    rig.connection.detach(link, None);
    rig.connection.settle(received[0], Outcome::Accepted);
    rig.performatives();
}

#[test]
fn what_is_not_settled_holds_the_peer_back() {
    let mut rig = Rig::begun();
    let link = receiving(&mut rig, 0, &credits(10));
    for id in 0..10 {
        rig.send_transfer(0, &transfer(0, id), b"x");
    }
    let received = received(&rig.events());
    assert!(rig.performatives().is_empty());
    rig.connection.settle(received[0], Outcome::Accepted);
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [_, Performative::Flow(flow)] if flow.link_credit == Some(1)),
        "{written:?}"
    );
    rig.connection.set_credit(link, 0);
    for received in &received[1..] {
        rig.connection.settle(*received, Outcome::Accepted);
    }
    assert_eq!(
        rig.performatives().len(),
        1,
        "settled, and no credit for more"
    );
    rig.connection.set_credit(link, 10);
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Flow(flow)] if flow.link_credit == Some(10)),
        "{written:?}"
    );
    for id in 10..21 {
        rig.send_transfer(0, &transfer(0, id), b"x");
    }
    assert_eq!(
        detached_with(&rig.performatives()),
        "amqp:link:transfer-limit-exceeded"
    );
    assert_eq!(payloads(&rig.events()).len(), 10);
}

#[test]
fn a_delivery_in_several_frames_is_one() {
    let mut rig = Rig::begun();
    receiving(&mut rig, 0, &credits(10));
    // As rhea does, with id, tag and format on each.
    for (part, more) in [(&b"one "[..], true), (b"two ", true), (b"three", false)] {
        let frame = Transfer {
            more,
            ..transfer(0, 0)
        };
        rig.send_transfer(0, &frame, part);
    }
    // As the standard asks at least.
    rig.send_transfer(
        0,
        &Transfer {
            more: true,
            ..transfer(0, 1)
        },
        b"a",
    );
    let rest = Transfer {
        handle: 0,
        ..Transfer::default()
    };
    rig.send_transfer(0, &rest, b"b");
    let events = rig.events();
    assert_eq!(payloads(&events), [&b"one two three"[..], b"ab"]);
    // An aborted one leaves nothing behind, and its credit comes back.
    rig.send_transfer(
        0,
        &Transfer {
            more: true,
            ..transfer(0, 2)
        },
        b"a",
    );
    rig.send_transfer(
        0,
        &Transfer {
            aborted: true,
            ..transfer(0, 2)
        },
        b"",
    );
    assert!(rig.events().is_empty());
    assert_eq!(rig.connection.partial_bytes, 0);
    for received in received(&events) {
        rig.connection.settle(received, Outcome::Accepted);
    }
    let written = rig.performatives();
    assert!(
        matches!(written.last(), Some(Performative::Flow(flow)) if flow.link_credit == Some(10))
    );
}

#[test]
fn deliveries_are_bounded_each_and_together() {
    let mut rig = Rig::begun();
    let terms = LinkTerms {
        max_message_size: Some(5),
        ..credits(10)
    };
    receiving(&mut rig, 0, &terms);
    rig.send_transfer(
        0,
        &Transfer {
            more: true,
            ..transfer(0, 0)
        },
        b"123",
    );
    rig.send_transfer(0, &transfer(0, 0), b"456");
    assert_eq!(
        detached_with(&rig.performatives()),
        "amqp:link:message-size-exceeded"
    );
    assert!(matches!(rig.events()[..], [Event::Detached { .. }]));
    assert_eq!(rig.connection.partial_bytes, 0);

    let config = Config {
        partial_bytes_max: 100,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|_| {});
    rig.send_frame(0, &begin());
    rig.events();
    for handle in 0..3 {
        receiving(&mut rig, handle, &credits(10));
        let first = Transfer {
            more: true,
            ..transfer(handle, handle)
        };
        rig.send_transfer(0, &first, &[0; 40]);
    }
    assert_eq!(fault(&rig.events()), "amqp:resource-limit-exceeded");
}

#[test]
fn sending_needs_credit_and_fits_frames_and_window() {
    let mut rig = Rig::new(Config::new("hub"));
    rig.open(|open| open.max_frame_size = wire::MaxFrameSize(512));
    let narrow = wire::Begin {
        incoming_window: 2,
        ..begin()
    };
    rig.send_frame(0, &narrow);
    rig.events();
    rig.send_frame(0, &attach(1, false, "q"));
    let link = rig.attached();
    rig.connection.accept(link, &LinkTerms::default());
    rig.written();
    assert_eq!(
        rig.connection.send(link, out(false, b"x")),
        Err(SendError::NoCredit)
    );
    let grant = Flow {
        incoming_window: 2,
        ..credit(1, 0, 2)
    };
    rig.send_flow(0, &grant);
    assert!(matches!(
        rig.events()[..],
        [Event::Credit {
            credit: 2,
            drain: false,
            ..
        }]
    ));
    let body = Bytes::from(vec![7; 1500]);
    let delivery = Outgoing {
        payload: body.clone(),
        ..out(false, b"")
    };
    let sent = rig.connection.send(link, delivery).unwrap();
    assert!(
        !rig.connection.can_send(link),
        "the rest of the first waits for the window"
    );
    let mut arrived = Vec::new();
    let mut take = |rig: &mut Rig| {
        for written in rig.written() {
            if let Written::Frame(_, Performative::Transfer(t), payload) = written {
                assert!(payload.len() + 8 < 512);
                arrived.push(t);
            }
        }
        arrived.len()
    };
    assert_eq!(take(&mut rig), 2);
    let more = Flow {
        next_incoming_id: Some(3),
        incoming_window: 100,
        ..credit(1, 1, 1)
    };
    rig.send_flow(0, &more);
    assert_eq!(take(&mut rig), 4);
    assert_eq!(
        arrived[0].delivery_tag.as_deref(),
        Some(&b"0123456789abcdef"[..])
    );
    assert_eq!(
        arrived.iter().map(|t| t.more).collect::<Vec<_>>(),
        [true, true, true, false]
    );
    let second = rig.connection.send(link, out(false, b"x")).unwrap();
    assert_eq!((sent.0, second.0), (0, 1));
    assert_eq!(
        rig.connection.send(link, out(false, b"x")),
        Err(SendError::NoCredit)
    );
}

#[test]
fn an_unsettled_outcome_is_answered_with_accepted_once() {
    let mut rig = Rig::begun();
    let link = sending(&mut rig, 1, 10);
    let sent: Vec<Sent> = (0..3)
        .map(|_| rig.connection.send(link, out(false, b"x")).unwrap())
        .collect();
    rig.written();
    let say = |settled, state| Disposition {
        role: Role::Receiver,
        first: 0,
        last: Some(2),
        settled,
        state,
        batchable: true,
    };
    rig.send_disposition(0, &say(false, Some(DeliveryState::Received)));
    assert!(rig.events().is_empty());
    let released = Some(DeliveryState::Outcome(Outcome::Released));
    rig.send_disposition(0, &say(false, released));
    let events = rig.events();
    assert_eq!(events.len(), 3);
    for (event, wanted) in events.iter().zip(&sent) {
        assert!(
            matches!(event, Event::Settled { sent, outcome: Some(Outcome::Released), settled: false, .. } if sent == wanted),
            "{event:?}"
        );
    }
    for sent in &sent {
        rig.connection.settle_sent(link, *sent);
        rig.connection.settle_sent(link, *sent);
    }
    let written = rig.performatives();
    let accepted = DeliveryState::Outcome(Outcome::Accepted);
    assert!(
        matches!(&written[..], [Performative::Disposition(d)]
            if d.role == Role::Sender && d.settled && (d.first, d.last) == (0, Some(2)) && d.state.as_ref() == Some(&accepted)),
        "{written:?}"
    );
    rig.send_disposition(0, &say(true, None));
    assert!(rig.events().is_empty());
}

#[test]
fn a_draining_receiver_gets_its_credit_used_up() {
    let mut rig = Rig::begun();
    let link = sending(&mut rig, 1, 10);
    rig.connection.send(link, out(true, b"x")).unwrap();
    rig.written();
    rig.send_flow(
        0,
        &Flow {
            drain: true,
            ..credit(1, 0, 10)
        },
    );
    assert!(matches!(
        rig.events()[..],
        [Event::Credit {
            credit: 9,
            drain: true,
            ..
        }]
    ));
    rig.connection.drained(link);
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Flow(flow)]
            if flow.link_credit == Some(0) && flow.delivery_count == Some(10) && flow.drain),
        "{written:?}"
    );
    assert_eq!(
        rig.connection.send(link, out(true, b"x")),
        Err(SendError::NoCredit)
    );
    rig.send_flow(0, &credit(1, 10, 1));
    assert!(rig.connection.can_send(link));
}

#[test]
fn an_echo_is_answered() {
    let mut rig = Rig::begun();
    sending(&mut rig, 1, 10);
    receiving(&mut rig, 2, &credits(5));
    for (flow, handle) in [
        (
            Flow {
                echo: true,
                ..credit(1, 0, 10)
            },
            Some(1),
        ),
        (
            Flow {
                echo: true,
                handle: None,
                ..credit(1, 0, 10)
            },
            None,
        ),
        (
            Flow {
                echo: true,
                link_credit: None,
                ..credit(2, 0, 0)
            },
            Some(2),
        ),
    ] {
        rig.send_flow(0, &flow);
        let written = rig.performatives();
        assert!(
            matches!(&written[..], [Performative::Flow(flow)] if flow.handle == handle),
            "{written:?}"
        );
    }
}

#[test]
fn the_end_of_a_session_ends_its_links_and_no_others() {
    let mut rig = Rig::begun();
    let first = sending(&mut rig, 1, 10);
    rig.send_frame(1, &begin());
    rig.send_frame(1, &attach(1, true, "q"));
    let second = rig.attached();
    rig.connection.accept(second, &credits(1));
    rig.written();
    rig.send_frame(1, &wire::End { error: None });
    assert!(matches!(rig.events()[..], [Event::Detached { link, .. }] if link == second));
    assert!(matches!(rig.performatives()[..], [Performative::End(_)]));
    assert!(rig.connection.send(first, out(true, b"x")).is_ok());
    rig.send_frame(1, &begin());
    assert!(matches!(
        rig.performatives()[..],
        [_, Performative::Begin(_)]
    ));
}

#[test]
fn what_breaks_a_session_ends_it_alone() {
    let unattached = |rig: &mut Rig| rig.send_transfer(0, &transfer(9, 0), b"x");
    let in_use = |rig: &mut Rig| {
        rig.send_frame(0, &attach(1, true, "q"));
        rig.send_frame(0, &attach(1, true, "q"));
    };
    let early = |rig: &mut Rig| {
        rig.send_frame(0, &attach(1, true, "q"));
        rig.send_transfer(0, &transfer(1, 0), b"x");
    };
    let long_tag = |rig: &mut Rig| {
        receiving(rig, 1, &credits(1));
        let delivery_tag = Some(Bytes::from_static(&[0; 33]));
        rig.send_transfer(
            0,
            &Transfer {
                delivery_tag,
                ..transfer(1, 0)
            },
            b"x",
        );
    };
    type Break = dyn Fn(&mut Rig);
    for (break_it, condition) in [
        (&unattached as &Break, "amqp:session:unattached-handle"),
        (&in_use, "amqp:session:handle-in-use"),
        (&early, "amqp:illegal-state"),
        (&long_tag, "amqp:invalid-field"),
    ] {
        let mut rig = Rig::begun();
        break_it(&mut rig);
        assert_eq!(ended_with(&rig.performatives()), condition);
        assert!(rig.connection.is_open());
        rig.events();
        // What was on its way counts for nothing, and the channel is free once the peer has ended.
        rig.send_transfer(0, &transfer(1, 5), b"x");
        rig.send_frame(0, &wire::End { error: None });
        rig.send_frame(0, &begin());
        assert!(matches!(rig.performatives()[..], [Performative::Begin(_)]));
        assert!(rig.events().is_empty());
    }
}

#[test]
fn more_transfers_than_the_window_end_the_session() {
    let config = Config {
        incoming_window: 3,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|_| {});
    rig.send_frame(0, &begin());
    rig.events();
    receiving(&mut rig, 0, &credits(100));
    for id in 0..4 {
        rig.send_transfer(0, &transfer(0, id), b"x");
    }
    assert_eq!(
        ended_with(&rig.performatives()),
        "amqp:session:window-violation"
    );
    let mut rig = Rig::begun();
    receiving(&mut rig, 0, &credits(10_000));
    for id in 0..10_000 {
        rig.send_transfer(0, &transfer(0, id), b"x");
        for event in rig.events() {
            if let Event::Delivery(incoming) = event {
                rig.connection.settle(incoming.received, Outcome::Accepted);
            }
        }
        rig.written();
    }
    assert!(rig.connection.is_open());
}

#[test]
fn what_breaks_the_connection_closes_it() {
    let beyond = |rig: &mut Rig| rig.send_frame(9, &attach(0, true, "q"));
    let handle = |rig: &mut Rig| rig.send_frame(0, &attach(262_144, true, "q"));
    let again = |rig: &mut Rig| rig.send_frame(0, &begin());
    let channel = |rig: &mut Rig| rig.send_frame(8192, &begin());
    let garbage = |rig: &mut Rig| rig.bytes(&framed(0, b"\x00\x53\x99\x45"));
    type Break = dyn Fn(&mut Rig);
    for (break_it, condition) in [
        (&beyond as &Break, "amqp:not-found"),
        (&handle, "amqp:connection:framing-error"),
        (&again, "amqp:illegal-state"),
        (&channel, "amqp:connection:framing-error"),
        (&garbage, "amqp:decode-error"),
    ] {
        let mut rig = Rig::begun();
        break_it(&mut rig);
        assert_eq!(fault(&rig.events()), condition);
        assert!(matches!(
            rig.performatives().last(),
            Some(Performative::Close(_))
        ));
        rig.bytes(b"whatever comes now");
        assert!(rig.events().is_empty() && rig.written().is_empty());
    }
}
