//! Cases at the edges: what crosses on the wire, what comes before its time, what is too much.

use bytes::Bytes;
use fe2o3_amqp_types::performatives as wire;

use super::rig::{Rig, Written, attach, begin, credit, transfer};
use super::tests::{
    SECOND, credits, detach_frame, detached_with, ended_with, fault, out, received, receiving,
    sending,
};
use super::*;
use crate::limits::{ERROR_TEXT_BYTES_MAX, REFUSED_LINKS_MAX};
use crate::performative::{DeliveryState, Disposition, Performative, Transfer};

fn echo(handle: u32) -> Flow {
    Flow {
        echo: true,
        link_credit: None,
        ..credit(handle, 0, 0)
    }
}

#[test]
fn credit_that_was_given_is_not_taken_back_from_what_is_on_its_way() {
    let mut rig = Rig::begun();
    let link = receiving(&mut rig, 0, &credits(10));
    rig.connection.set_credit(link, 2);
    rig.send_flow(0, &echo(0));
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Flow(flow)] if flow.link_credit == Some(10)),
        "{written:?}"
    );
    for id in 0..10 {
        rig.send_transfer(0, &transfer(0, id), b"x");
    }
    assert_eq!(received(&rig.events()).len(), 10);
}

#[test]
fn credit_and_echo_before_the_verdict_are_told_behind_it() {
    let mut rig = Rig::begun();
    rig.send_frame(0, &attach(1, false, "q"));
    let link = rig.attached();
    let early = Flow {
        echo: true,
        ..credit(1, 0, 7)
    };
    rig.send_flow(0, &early);
    assert!(rig.events().is_empty() && rig.written().is_empty());
    assert!(!rig.connection.can_send(link));
    rig.connection.accept(link, &LinkTerms::default());
    let events = rig.events();
    assert!(
        matches!(events[..], [Event::Credit { credit: 7, drain: false, link: l }] if l == link),
        "{events:?}"
    );
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Attach(_), Performative::Flow(flow)]
            if flow.handle == Some(1) && flow.link_credit == Some(7)),
        "{written:?}"
    );
}

#[test]
fn links_hear_of_it_when_the_peers_window_has_room_again() {
    let mut rig = Rig::begun();
    let link = sending(&mut rig, 1, 100);
    let window = |seen, incoming_window| Flow {
        next_incoming_id: Some(seen),
        incoming_window,
        handle: None,
        ..credit(1, 0, 0)
    };
    rig.send_flow(0, &window(1, 1));
    assert!(rig.events().is_empty());
    assert!(rig.connection.send(link, out(true, b"x")).is_ok());
    assert!(!rig.connection.can_send(link));
    rig.send_flow(0, &window(2, 0));
    assert!(rig.events().is_empty());
    rig.send_flow(0, &window(2, 5));
    rig.send_flow(0, &window(2, 0));
    rig.send_flow(0, &window(2, 5));
    let events = rig.events();
    assert!(
        matches!(events[..], [Event::Credit { credit: 99, .. }]),
        "told once: {events:?}"
    );
    assert!(rig.connection.can_send(link));
}

#[test]
fn deliveries_that_wait_for_windows_count_as_output() {
    let config = Config {
        output_bytes_max: 5_000,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|open| open.max_frame_size = wire::MaxFrameSize(512));
    let mut links = Vec::new();
    for channel in 0..20 {
        let narrow = wire::Begin {
            incoming_window: 1,
            ..begin()
        };
        rig.send_frame(channel, &narrow);
        rig.events();
        rig.send_frame(channel, &attach(0, false, "q"));
        let link = rig.attached();
        rig.connection.accept(link, &LinkTerms::default());
        let grant = Flow {
            incoming_window: 1,
            ..credit(0, 0, 10)
        };
        rig.send_flow(channel, &grant);
        rig.written();
        links.push(link);
    }
    let send = |rig: &mut Rig, link| {
        let delivery = Outgoing {
            payload: Bytes::from(vec![0; 1_000]),
            ..out(true, b"")
        };
        let sent = rig.connection.send(link, delivery).is_ok();
        rig.written();
        sent
    };
    let sent = links.iter().filter(|link| send(&mut rig, **link)).count();
    assert!((5..12).contains(&sent), "{sent}");
    // A link that goes takes along what waited on it.
    for channel in 0..20 {
        rig.send_frame(channel, &detach_frame(0));
    }
    assert_eq!(rig.connection.waiting_bytes, 0);
}

#[test]
fn an_aborted_delivery_of_one_frame_counts() {
    let mut rig = Rig::begun();
    receiving(&mut rig, 0, &credits(1));
    let aborted = Transfer {
        aborted: true,
        ..transfer(0, 0)
    };
    rig.send_transfer(0, &aborted, b"");
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Flow(flow)]
            if flow.delivery_count == Some(1) && flow.link_credit == Some(1)),
        "{written:?}"
    );
    assert!(rig.events().is_empty());
}

#[test]
fn a_name_stands_once_in_a_session_for_each_direction() {
    let mut rig = Rig::begun();
    let named = |handle, client_sends| wire::Attach {
        name: "same".to_owned(),
        ..attach(handle, client_sends, "q")
    };
    rig.send_frame(0, &named(0, true));
    let first = rig.attached();
    rig.connection.accept(first, &credits(1));
    rig.send_frame(0, &named(1, false));
    let second = rig.attached();
    rig.connection
        .refuse(second, &ErrorInfo::new("amqp:not-allowed", "no"));
    // A refused link does not stand, whether its peer has detached it or not.
    rig.send_frame(0, &named(2, false));
    rig.attached();
    rig.send_frame(0, &detach_frame(1));
    rig.send_frame(0, &detach_frame(0));
    rig.events();
    rig.send_frame(0, &named(0, true));
    rig.attached();
    rig.written();
    rig.send_frame(0, &named(3, false));
    assert_eq!(ended_with(&rig.performatives()), "amqp:resource-locked");
}

#[test]
fn a_detach_is_answered_as_closed() {
    let mut rig = Rig::begun();
    sending(&mut rig, 1, 1);
    let open = wire::Detach {
        closed: false,
        ..detach_frame(1)
    };
    rig.send_frame(0, &open);
    let written = rig.performatives();
    assert!(matches!(&written[..], [Performative::Detach(detach)] if detach.closed));
}

#[test]
fn what_is_settled_behind_a_detach_is_not_said() {
    let mut rig = Rig::begun();
    let link = receiving(&mut rig, 0, &credits(100));
    rig.send_transfer(0, &transfer(0, 0), b"x");
    rig.send_transfer(0, &transfer(0, 1), b"x");
    let received = received(&rig.events());
    rig.connection.settle(received[0], Outcome::Accepted);
    rig.connection.detach(link, None);
    rig.connection.settle(received[1], Outcome::Accepted);
    let written = rig.performatives();
    assert!(
        matches!(&written[..], [Performative::Disposition(d), Performative::Detach(_)]
            if (d.first, d.last) == (0, None)),
        "{written:?}"
    );
}

#[test]
fn nothing_is_said_behind_our_close() {
    let mut rig = Rig::begun();
    let sender = sending(&mut rig, 1, 5);
    let receiver = receiving(&mut rig, 2, &credits(5));
    rig.send_transfer(0, &transfer(2, 0), b"x");
    let received = received(&rig.events());
    rig.send_frame(0, &attach(3, true, "q"));
    let asked = rig.attached();
    rig.send_frame(0, &attach(4, true, "q"));
    let refused = rig.attached();
    rig.connection.close(None);
    assert!(matches!(rig.performatives()[..], [Performative::Close(_)]));
    rig.connection.accept(asked, &credits(1));
    rig.connection
        .refuse(refused, &ErrorInfo::new("amqp:not-found", "no"));
    rig.connection.settle(received[0], Outcome::Accepted);
    rig.connection.drained(sender);
    rig.connection.detach(receiver, None);
    assert_eq!(
        rig.connection.send(sender, out(true, b"x")),
        Err(SendError::NoCredit)
    );
    rig.bytes(&[0, 0, 0, 7, 2, 0, 0, 0]);
    assert!(rig.written().is_empty());
    let events = rig.events();
    assert!(
        matches!(events.last(), Some(Event::Closed(CloseCause::Ours))),
        "{events:?}"
    );
}

#[test]
fn links_that_were_refused_and_stay_are_bounded() {
    let config = Config {
        links_max: 3,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|_| {});
    rig.send_frame(0, &begin());
    rig.events();
    let last = 3 + u32::try_from(REFUSED_LINKS_MAX).unwrap();
    for handle in 0..last {
        rig.send_frame(0, &attach(handle, true, "q"));
    }
    assert_eq!(rig.events().len(), 3);
    assert!(rig.connection.is_open());
    rig.send_frame(0, &attach(last, true, "q"));
    assert_eq!(fault(&rig.events()), "amqp:resource-limit-exceeded");
}

#[test]
fn attaches_that_nobody_answers_hold_the_input_back() {
    let mut rig = Rig::begun();
    let mut asked = Vec::new();
    for handle in 0..200 {
        let large = "x".repeat(2_000);
        rig.send_frame(0, &attach(handle, handle % 2 == 0, &large));
        asked.push(rig.attached());
        if !rig.connection.wants_input() {
            break;
        }
    }
    assert!((100..200).contains(&asked.len()), "{}", asked.len());
    for (index, link) in asked.iter().enumerate() {
        match index % 3 {
            0 => rig.connection.accept(*link, &credits(1)),
            1 => {
                let error = ErrorInfo::new("amqp:not-allowed", "no");
                rig.connection.refuse(*link, &error);
            }
            _ => rig.send_frame(0, &detach_frame(u32::try_from(index).unwrap())),
        }
    }
    rig.written();
    assert_eq!(rig.connection.asked_bytes, 0);
    assert!(rig.connection.wants_input());
}

#[test]
fn what_does_not_fit_the_peers_frames_is_cut_or_closes_the_connection() {
    let mut rig = Rig::new(Config::new("hub"));
    rig.open(|open| open.max_frame_size = wire::MaxFrameSize(512));
    rig.send_frame(0, &begin());
    rig.events();
    rig.written();
    let link = receiving(&mut rig, 0, &credits(5));
    rig.send_transfer(0, &transfer(0, 0), b"x");
    let received = received(&rig.events());
    let error = ErrorInfo::new("com.microsoft:device-container-throttled", "ä".repeat(500));
    rig.connection
        .settle(received[0], Outcome::Rejected(Some(error.clone())));
    rig.connection.detach(link, Some(&error));
    let output = rig.connection.output().unwrap();
    assert!(output.len() < 2 * 512, "{}", output.len());
    rig.send_frame(0, &detach_frame(0));
    let long = "x".repeat(600);
    rig.send_frame(0, &attach(1, true, &long));
    let link = rig.attached();
    rig.connection.accept(link, &credits(1));
    assert_eq!(fault(&rig.events()), "amqp:frame-size-too-small");
    let written = rig.written();
    assert!(
        matches!(
            written.last(),
            Some(Written::Frame(0, Performative::Close(_), _))
        ),
        "{written:?}"
    );
}

#[test]
fn a_long_description_is_cut_between_characters() {
    let mut rig = Rig::begun();
    let link = receiving(&mut rig, 0, &credits(5));
    let error = ErrorInfo::new("amqp:internal-error", "€".repeat(1_000));
    rig.connection.detach(link, Some(&error));
    let written = rig.performatives();
    let [Performative::Detach(detach)] = &written[..] else {
        panic!("{written:?}");
    };
    let text = detach.error.clone().unwrap().description.unwrap();
    assert_eq!(text, "€".repeat(ERROR_TEXT_BYTES_MAX / 3));
}

#[test]
fn a_delivery_that_begins_within_another_leaves_nothing_behind() {
    let mut rig = Rig::begun();
    receiving(&mut rig, 0, &credits(5));
    for id in 0..2 {
        let part = Transfer {
            more: true,
            ..transfer(0, id)
        };
        rig.send_transfer(0, &part, b"abc");
    }
    assert_eq!(ended_with(&rig.performatives()), "amqp:invalid-field");
    assert_eq!(rig.connection.partial_bytes, 0);
}

#[test]
fn a_transfer_against_the_direction_detaches_the_link() {
    let mut rig = Rig::begun();
    sending(&mut rig, 1, 5);
    rig.send_transfer(0, &transfer(1, 0), b"x");
    assert_eq!(detached_with(&rig.performatives()), "amqp:not-allowed");
    assert!(rig.connection.is_open());
}

#[test]
fn a_large_max_message_size_of_the_peer_is_kept_unless_told_otherwise() {
    for exceeds_max_message_size in [false, true] {
        let mut rig = Rig::begun();
        let small = wire::Attach {
            max_message_size: Some(10),
            ..attach(1, false, "q")
        };
        rig.send_frame(0, &small);
        let link = rig.attached();
        let terms = LinkTerms {
            exceeds_max_message_size,
            ..LinkTerms::default()
        };
        rig.connection.accept(link, &terms);
        rig.send_flow(0, &credit(1, 0, 5));
        let sent = rig.connection.send(link, out(true, b"eleven byte"));
        assert_eq!(sent.is_ok(), exceeds_max_message_size, "{sent:?}");
    }
}

#[test]
fn a_range_names_deliveries_of_several_links() {
    let mut rig = Rig::begun();
    let links = [sending(&mut rig, 1, 5), sending(&mut rig, 2, 5)];
    let sent: Vec<Sent> = (0..6)
        .map(|n| rig.connection.send(links[n % 2], out(false, b"x")).unwrap())
        .collect();
    rig.written();
    let disposition = Disposition {
        role: fe2o3_amqp_types::definitions::Role::Receiver,
        first: sent[1].0,
        last: Some(1_000),
        settled: true,
        state: Some(DeliveryState::Outcome(Outcome::Accepted)),
        batchable: false,
    };
    rig.send_disposition(0, &disposition);
    rig.send_disposition(0, &disposition);
    let told: Vec<_> = rig
        .events()
        .into_iter()
        .map(|event| match event {
            Event::Settled {
                link,
                sent,
                settled: true,
                ..
            } => (link, sent),
            other => panic!("{other:?}"),
        })
        .collect();
    let wanted: Vec<_> = (1..6).map(|n| (links[n % 2], sent[n])).collect();
    assert_eq!(told, wanted);
}

#[test]
fn sessions_and_links_are_bounded() {
    let config = Config {
        sessions_max: 2,
        links_max: 2,
        ..Config::new("hub")
    };
    let mut rig = Rig::new(config);
    rig.open(|_| {});
    for channel in 0..3 {
        rig.send_frame(channel, &begin());
    }
    assert_eq!(
        ended_with(&rig.performatives()),
        "amqp:resource-limit-exceeded"
    );
    rig.events();
    for handle in 0..3 {
        rig.send_frame(0, &attach(handle, true, "q"));
    }
    assert_eq!(rig.events().len(), 2);
    assert_eq!(
        detached_with(&rig.performatives()),
        "amqp:resource-limit-exceeded"
    );
    // Gone links make room, refused ones too.
    for handle in 0..3 {
        rig.send_frame(0, &detach_frame(handle));
    }
    rig.events();
    rig.send_frame(0, &attach(5, true, "q"));
    rig.attached();
    assert_eq!(rig.connection.links, 1);
}

#[test]
fn both_sides_can_close() {
    let mut rig = Rig::begun();
    let link = sending(&mut rig, 1, 1);
    rig.connection
        .close(Some(ErrorInfo::new("amqp:connection:forced", "bye")));
    assert!(
        matches!(&rig.performatives()[..], [Performative::Close(close)] if close.error.is_some())
    );
    rig.send_transfer(0, &transfer(1, 0), b"ignored");
    rig.send_frame(0, &wire::Close { error: None });
    let events = rig.events();
    assert!(
        matches!(&events[..], [Event::Detached { link: l, .. }, Event::Closed(CloseCause::Ours)] if *l == link),
        "{events:?}"
    );

    let mut rig = Rig::begun();
    rig.connection.close(None);
    rig.advance(5 * SECOND);
    assert!(matches!(
        rig.events()[..],
        [Event::Closed(CloseCause::Ours)]
    ));

    let mut rig = Rig::begun();
    rig.send_frame(0, &wire::Close { error: None });
    assert!(matches!(
        rig.events()[..],
        [Event::Closed(CloseCause::Peer(None))]
    ));
    assert!(matches!(rig.performatives()[..], [Performative::Close(_)]));
}

#[test]
fn a_detach_of_the_peer_before_the_verdict_is_answered_properly() {
    let mut rig = Rig::begun();
    rig.send_frame(0, &attach(1, true, "q"));
    let link = rig.attached();
    rig.send_frame(0, &detach_frame(1));
    assert!(matches!(
        rig.performatives()[..],
        [Performative::Attach(_), Performative::Detach(_)]
    ));
    assert!(matches!(rig.events()[..], [Event::Detached { link: l, .. }] if l == link));
    rig.connection.accept(link, &credits(1));
    rig.connection
        .refuse(link, &ErrorInfo::new("amqp:not-found", "late"));
    assert!(rig.written().is_empty());
}
