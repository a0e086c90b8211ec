//! Twins, direct methods and cloud-to-device messages, against a parent in memory.

use bytes::Bytes;
use edgehub_amqp::{
    message::{MessageId, MessageWriter, Properties},
    performative::{ErrorInfo, Outcome},
    value::Value,
};
use edgehub_proto::{
    hub::{CloudToDevice, CloudToDeviceOutcome, MethodCall, MethodResult, UpstreamError},
    message::SystemProperty,
};

use super::super::rig::{Link, World, bodies};
use super::*;
use crate::{
    lanes::RequestId,
    test_support::Heard,
    transport::{TwinAnswer, TwinAsk},
};

const NOTHING: Needs = Needs {
    desired: false,
    methods: false,
    cloud_to_device: false,
};
const DESIRED: Needs = Needs {
    desired: true,
    ..NOTHING
};
const METHODS: Needs = Needs {
    methods: true,
    ..NOTHING
};
const MESSAGES: Needs = Needs {
    cloud_to_device: true,
    ..NOTHING
};

fn heard(world: &World) -> Vec<Heard> {
    let heard = world.downstream.take().into_iter();
    heard.map(|(_, heard)| heard).collect()
}

fn is_established(heard: &[Heard]) -> bool {
    matches!(heard, [Heard::Established])
}

fn link(world: &World, tail: &str, peer_sends: bool) -> Link {
    let link = world.parent.link("leaf1", tail, peer_sends);
    link.unwrap().clone()
}

#[test]
fn links_come_when_they_are_needed_and_go_when_they_are_not() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    assert_eq!(world.parent.tails("leaf1"), ["messages/events"]);
    assert!(heard(&world).is_empty(), "nothing to hear");
    let all = Needs {
        desired: true,
        methods: true,
        cloud_to_device: true,
    };
    world.need(leaf, all);
    let tails = [
        "messages/deviceBound",
        "messages/events",
        "methods/deviceBound",
        "twin",
    ];
    assert_eq!(world.parent.tails("leaf1"), tails);
    assert!(is_established(&heard(&world)));
    assert_eq!(world.parent.twins, [("leaf1".to_owned(), "PUT".to_owned())]);
    // Pairs have one correlation id, and their properties say who it is.
    for (tail, kind) in [("twin", "twin:"), ("methods/deviceBound", "methods:")] {
        let key = "com.microsoft:channel-correlation-id";
        let ids = [true, false].map(|peer_sends| {
            let link = link(&world, tail, peer_sends);
            let chain = link.attach.property("com.microsoft:auth-chain");
            assert_eq!(chain, Some("leaf1;edge2"));
            link.attach.property(key).unwrap().to_owned()
        });
        assert_eq!(ids[0], ids[1]);
        assert!(ids[0].starts_with(kind));
    }
    use fe2o3_amqp_types::definitions::ReceiverSettleMode;
    let mode = link(&world, "messages/deviceBound", false)
        .attach
        .rcv_settle_mode();
    assert_eq!(mode, ReceiverSettleMode::Second);
    world.need(leaf, NOTHING);
    assert_eq!(world.parent.tails("leaf1"), ["messages/events"]);
    let operations: Vec<&str> = world
        .parent
        .twins
        .iter()
        .map(|(_, op)| op.as_str())
        .collect();
    assert_eq!(operations, ["PUT", "DELETE"]);
    world.need(leaf, METHODS);
    assert_eq!(
        world.parent.tails("leaf1"),
        ["messages/events", "methods/deviceBound"]
    );
    assert!(world.closed.is_empty());
}

#[test]
fn twin_requests_are_answered_by_their_correlation() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    world.ask(leaf, 7, TwinAsk::Get);
    world.ask(leaf, 8, TwinAsk::Report(Bytes::from_static(b"{\"a\":1}")));
    let twin = TwinAnswer {
        body: Bytes::from_static(b"{\"desired\":{}}"),
        version: None,
    };
    let reported = TwinAnswer {
        body: Bytes::new(),
        version: Some(7),
    };
    let expected = [(RequestId(7), Ok(twin)), (RequestId(8), Ok(reported))];
    assert_eq!(world.answered, expected);
    let operations: Vec<&str> = world
        .parent
        .twins
        .iter()
        .map(|(_, op)| op.as_str())
        .collect();
    assert_eq!(operations, ["GET", "PATCH"], "nobody hears of changes");
    world.parent.manner("leaf1").twin = Some(429);
    world.ask(leaf, 9, TwinAsk::Get);
    let busy = Err(UpstreamError::Busy { status: 429 });
    assert_eq!(world.answered[2], (RequestId(9), busy));
}

#[test]
fn a_twin_link_that_is_refused_fails_its_requests_and_is_tried_again() {
    let mut world = World::new();
    world.parent.manner("leaf1").refuse = Some(("twin", "amqp:internal-error"));
    let leaf = world.admit(1, "leaf1", DESIRED);
    assert!(is_established(&heard(&world)), "what there is");
    world.ask(leaf, 7, TwinAsk::Get);
    let [(RequestId(7), Err(UpstreamError::Unavailable(_)))] = &world.answered[..] else {
        panic!("{:?}", world.answered)
    };
    world.pass(Duration::from_secs(60));
    let attaches = world
        .parent
        .attaches
        .iter()
        .filter(|(_, tail)| tail == "twin");
    let count = attaches.count();
    assert!((6..=16).contains(&count), "{count} attaches in a minute");
    world.parent.manner("leaf1").refuse = None;
    world.pass(Duration::from_secs(60));
    assert!(
        world
            .parent
            .twins
            .contains(&("leaf1".to_owned(), "PUT".to_owned()))
    );
    assert!(is_established(&heard(&world)), "what was missed is fetched");
    assert!(world.closed.is_empty());
}

#[test]
fn an_identity_that_the_upstream_disowns_is_refused_as_a_whole() {
    let mut world = World::new();
    world.parent.manner("leaf1").refuse = Some(("twin", "amqp:unauthorized-access"));
    let leaf = world.admit(1, "leaf1", DESIRED);
    assert!(matches!(world.closed[&leaf], CloseCause::Refused(_)));
}

#[test]
fn changes_of_desired_properties_reach_the_broker() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", DESIRED);
    assert!(is_established(&heard(&world)));
    let change = |version: u32| {
        let mut writer = MessageWriter::new();
        writer.data(format!("{{\"$version\":{version}}}").as_bytes());
        writer.finish()
    };
    let out = link(&world, "twin", false).id;
    for version in 0..200 {
        world.parent.send(out, &change(version), true);
        world.drive();
    }
    let patches = heard(&world);
    assert_eq!(patches.len(), 200, "credit is given back");
    let Heard::Desired(last) = &patches[199] else {
        panic!("{:?}", patches[199])
    };
    assert_eq!(&last[..], b"{\"$version\":199}");
    // A link that is lost comes back, and the broker hears of it.
    let detached = ErrorInfo::new("amqp:link:detach-forced", "maintenance");
    world.parent.connection.detach(out, Some(&detached));
    world.parent.links.retain(|link| link.id != out);
    world.drive();
    assert!(heard(&world).is_empty());
    world.pass(Duration::from_secs(2));
    assert!(is_established(&heard(&world)));
    world.send(leaf, &bodies(0..3));
    assert_eq!(world.parent.ledger("leaf1"), bodies(0..3));
}

fn method(correlation: MessageId, name: &str) -> Bytes {
    let mut writer = MessageWriter::new();
    writer.properties(&Properties {
        correlation_id: Some(correlation),
        ..Properties::default()
    });
    writer.application_properties([("IoThub-methodname", Value::Str(name))]);
    writer.data(b"{\"delay\":3}");
    writer.finish()
}

fn calls(world: &World) -> Vec<MethodCall> {
    let heard = heard(world).into_iter();
    heard
        .filter_map(|heard| match heard {
            Heard::Method(call) => Some(call),
            _ => None,
        })
        .collect()
}

#[test]
fn methods_are_called_and_answered_under_the_id_of_their_type() {
    let mut world = World::new();
    world.admit(1, "leaf1", METHODS);
    let out = link(&world, "methods/deviceBound", false).id;
    let ids = [
        MessageId::Uuid([9; 16]),
        MessageId::Str("a".into()),
        MessageId::Ulong(4),
    ];
    for id in ids.clone() {
        world.parent.send(out, &method(id, "reboot"), true);
    }
    // Not a method.
    world.parent.send(out, &Bytes::from_static(b"junk"), true);
    world.drive();
    let mut called = calls(&world);
    assert_eq!(called.len(), 3);
    assert_eq!(called[0].name, "reboot");
    assert_eq!(&called[0].payload[..], b"{\"delay\":3}");
    // In another order, and one not at all.
    let result = |status| MethodResult {
        status,
        payload: Bytes::from_static(b"{}"),
    };
    called.pop().unwrap().reply.send(result(404)).unwrap();
    drop(called.pop());
    called.pop().unwrap().reply.send(result(200)).unwrap();
    world.drive();
    let answers = &world.parent.answers;
    let mut seen: Vec<(String, i64)> = answers
        .iter()
        .map(|(id, status, _)| (id.to_string(), *status))
        .collect();
    seen.sort();
    let uuid = "09090909-0909-0909-0909-090909090909".to_owned();
    assert_eq!(seen, [(uuid, 200), ("4".to_owned(), 404)]);
    assert!(answers.iter().all(|(id, ..)| ids.contains(id)), "typed");
    for round in 0..200 {
        world
            .parent
            .send(out, &method(MessageId::Ulong(round), "x"), true);
        world.drive();
        for call in calls(&world) {
            call.reply.send(result(200)).unwrap();
        }
        world.drive();
    }
    assert_eq!(world.parent.answers.len(), 202);
}

fn message(text: &str, count: u8) -> Bytes {
    let mut writer = MessageWriter::new();
    writer.annotations([
        ("iothub-enqueuedtime", Value::Timestamp(1_700_000_000_000)),
        ("iothub-deliverycount", Value::Ubyte(count)),
        ("x-opt-sequence-number", Value::Ulong(77)),
    ]);
    writer.properties(&Properties {
        message_id: Some(MessageId::Str("m1".into())),
        to: Some("/devices/leaf1/messages/deviceBound"),
        ..Properties::default()
    });
    writer.data(text.as_bytes());
    writer.finish()
}

fn messages(world: &World) -> Vec<CloudToDevice> {
    let heard = heard(world).into_iter();
    heard
        .filter_map(|heard| match heard {
            Heard::CloudToDevice(message) => Some(message),
            _ => None,
        })
        .collect()
}

#[test]
fn each_cloud_to_device_message_is_settled_by_what_became_of_it() {
    let mut world = World::new();
    world.admit(1, "leaf1", MESSAGES);
    let out = link(&world, "messages/deviceBound", false).id;
    for (text, count) in [("a", 0), ("b", 1), ("c", 0)] {
        world.parent.send(out, &message(text, count), false);
    }
    world.parent.send(out, &Bytes::from_static(b"junk"), false);
    world.drive();
    let mut down = messages(&world);
    assert_eq!(down.len(), 3);
    let redelivered: Vec<bool> = down.iter().map(|one| one.redelivered).collect();
    assert_eq!(redelivered, [false, true, false]);
    let system = &down[0].message.system;
    for (property, expected) in [
        (SystemProperty::MessageId, "m1"),
        (SystemProperty::To, "/devices/leaf1/messages/deviceBound"),
        (SystemProperty::EnqueuedTime, "2023-11-14T22:13:20.0000000Z"),
        (SystemProperty::DeliveryCount, "0"),
        (SystemProperty::SequenceNumber, "77"),
        (
            SystemProperty::LockToken,
            "07070707-0707-0707-0707-070707070707",
        ),
    ] {
        assert_eq!(system.get(property), Some(expected), "{property:?}");
    }
    let settle = |one: CloudToDevice, outcome| one.settle.send(outcome).unwrap();
    settle(down.pop().unwrap(), CloudToDeviceOutcome::Abandoned);
    settle(down.pop().unwrap(), CloudToDeviceOutcome::Rejected);
    settle(down.pop().unwrap(), CloudToDeviceOutcome::Completed);
    world.drive();
    let outcomes: Vec<Outcome> = world
        .parent
        .settled
        .iter()
        .filter_map(|(_, outcome, settled)| {
            assert!(!settled, "the upstream settles (rcv-settle-mode second)");
            outcome.clone()
        })
        .collect();
    assert_eq!(outcomes.len(), 4);
    for expected in [
        Outcome::Accepted,
        Outcome::Released,
        Outcome::Rejected(None),
    ] {
        assert!(outcomes.contains(&expected), "{expected:?} in {outcomes:?}");
    }
}

#[test]
fn a_message_that_nobody_settles_is_given_back_after_a_while() {
    let mut world = World::new();
    world.admit(1, "leaf1", MESSAGES);
    let out = link(&world, "messages/deviceBound", false).id;
    world.parent.send(out, &message("a", 0), false);
    world.drive();
    drop(messages(&world));
    world.drive();
    assert!(world.parent.settled.is_empty(), "not at once");
    world.pass(Duration::from_secs(2));
    let [(_, Some(Outcome::Released), false)] = &world.parent.settled[..] else {
        panic!("{:?}", world.parent.settled)
    };
}

#[test]
fn messages_that_are_not_needed_any_more_are_given_back_with_their_link() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", MESSAGES);
    let out = link(&world, "messages/deviceBound", false).id;
    for _ in 0..30 {
        world.parent.send(out, &message("a", 0), false);
    }
    world.drive();
    let down = messages(&world);
    assert_eq!(down.len(), limits::CLOUD_TO_DEVICE_FORWARDED_MAX);
    world.need(leaf, NOTHING);
    assert_eq!(world.parent.tails("leaf1"), ["messages/events"]);
    let released =
        |(_, outcome, _): &&(_, Option<Outcome>, bool)| *outcome == Some(Outcome::Released);
    assert_eq!(world.parent.settled.iter().filter(released).count(), 30);
    for one in down {
        // Too late, and of no effect.
        let _ = one.settle.send(CloudToDeviceOutcome::Completed);
    }
    world.drive();
    assert!(world.closed.is_empty());
}

#[test]
fn credit_for_messages_is_given_back_as_they_are_settled() {
    let mut world = World::new();
    world.admit(1, "leaf1", MESSAGES);
    let out = link(&world, "messages/deviceBound", false).id;
    for round in 0..300 {
        world
            .parent
            .send(out, &message(&round.to_string(), 0), false);
        world.drive();
        for one in messages(&world) {
            one.settle.send(CloudToDeviceOutcome::Completed).unwrap();
        }
        world.drive();
    }
    assert_eq!(world.parent.settled.len(), 300);
}
