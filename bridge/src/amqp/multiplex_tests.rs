//! Opening, telemetry, errors, renewal and the end of a connection, against a parent in memory.

use edgehub_amqp::connection::{CloseCause as ServerClose, Config};
use edgehub_proto::hub::ClientInfo;

use super::super::rig::{OWN, Verdict, World, bodies};
use super::*;
use crate::{
    lanes::{Disposition, DropReason},
    test_support::id,
};

const NOTHING: Needs = Needs {
    desired: false,
    methods: false,
    cloud_to_device: false,
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn the_own_token_comes_first_and_each_identity_has_its_own_before_its_link() {
    let mut world = World::new();
    assert_eq!(world.parent.tokens.len(), 1);
    let info = ClientInfo {
        product_info: Some("node 1".into()),
        model_id: Some("dtmi:x;1".into()),
    };
    world.infos.set(&id("leaf:1"), &info);
    let leaf = world.admit(1, "leaf:1", NOTHING);
    let own = world.admit(2, OWN, NOTHING);
    assert_eq!(world.opened, [leaf, own]);
    let names: Vec<&str> = world
        .parent
        .tokens
        .iter()
        .map(|(n, _)| n.as_str())
        .collect();
    let expected = [
        "parent.example/devices/edge2/modules/%24edgeHub",
        "parent.example/devices/leaf%3A1",
        "parent.example/devices/edge2/modules/%24edgeHub",
    ];
    assert_eq!(names, expected);
    for (_, token) in &world.parent.tokens {
        let sr = "SharedAccessSignature sr=hub.example%2Fdevices%2Fedge2%2Fmodules%2F%2524edgeHub&";
        assert!(token.starts_with(sr), "our own, for the hub's host");
    }
    let link = world
        .parent
        .link("leaf:1", "messages/events", true)
        .unwrap();
    let property = |key: &str| link.attach.property(key).map(str::to_owned);
    assert_eq!(
        link.attach.address(),
        Some("amqps://parent.example/devices/leaf%3A1/messages/events")
    );
    let client = property("com.microsoft:client-version");
    assert_eq!(client.as_deref(), Some("node 1 EdgeHub/1"));
    let version = property("com.microsoft:api-version");
    assert_eq!(version.as_deref(), Some("2020-09-30"));
    let chain = property("com.microsoft:auth-chain");
    assert_eq!(chain.as_deref(), Some("leaf:1;edge2"));
    let model = property("com.microsoft:model-id");
    assert_eq!(model.as_deref(), Some("dtmi:x;1"));
    let own = world.parent.link(OWN, "messages/events", true).unwrap();
    let chain = own.attach.property("com.microsoft:auth-chain");
    assert_eq!(chain, Some("edge2/$edgeHub;edge2"));
}

#[test]
fn messages_arrive_in_order_in_batches() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    world.send(leaf, &bodies(0..200));
    assert_eq!(world.parent.ledger("leaf1"), bodies(0..200));
    assert_eq!(world.accepted(leaf), (0..200).collect::<Vec<u64>>());
    let sizes = &world.parent.deliveries["leaf1"];
    assert_eq!(sizes, &[64, 64, 64, 8]);
    world.send(leaf, &bodies(200..201));
    assert_eq!(world.parent.deliveries["leaf1"].last(), Some(&1));
}

#[test]
fn several_batches_are_under_way_and_no_more_than_that() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    world.parent.manner("leaf1").always = Verdict::Silent;
    for round in 0..20 {
        world.send(leaf, &bodies(round..round + 1));
    }
    assert_eq!(world.parent.open.len(), limits::AMQP_BATCHES_MAX);
    for (_, received) in std::mem::take(&mut world.parent.open) {
        let accepted = edgehub_amqp::performative::Outcome::Accepted;
        world.parent.connection.settle(received, accepted);
    }
    world.drive();
    assert_eq!(world.accepted(leaf), (0..8).collect::<Vec<u64>>());
    // The rest went together.
    assert_eq!(world.parent.deliveries["leaf1"].last(), Some(&12));
}

#[test]
fn an_identity_without_a_chain_is_out_of_scope_and_others_are_not() {
    let mut world = World::new();
    let ghost = SessionId(9);
    let now = world.now;
    world.multiplex.admit(ghost, id("ghost"), NOTHING, now);
    world.drive();
    assert_eq!(world.closed[&ghost], CloseCause::OutOfScope);
    world.admit(1, "leaf1", NOTHING);
    assert_eq!(world.opened.len(), 1);
}

#[test]
fn a_refused_token_or_link_ends_that_identity_alone() {
    for status in [400, 401, 404] {
        let mut world = World::new();
        world.parent.manner("leaf1").token = Some(status);
        let leaf = world.admit(1, "leaf1", NOTHING);
        assert!(
            matches!(world.closed[&leaf], CloseCause::Refused(_)),
            "{status}"
        );
        let other = world.admit(2, "leaf2", NOTHING);
        assert_eq!(world.opened, [other]);
        assert!(
            world
                .parent
                .attaches
                .iter()
                .all(|(identity, _)| identity != "leaf1")
        );
    }
    for (condition, is_refused) in [
        ("amqp:unauthorized-access", true),
        ("amqp:not-found", true),
        ("amqp:not-allowed", true),
        ("amqp:internal-error", false),
        ("com.microsoft:device-container-throttled", false),
    ] {
        let mut world = World::new();
        world.parent.manner("leaf1").refuse = Some(("messages/events", condition));
        let leaf = world.admit(1, "leaf1", NOTHING);
        let cause = &world.closed[&leaf];
        assert_eq!(
            matches!(cause, CloseCause::Refused(_)),
            is_refused,
            "{cause}"
        );
        assert_eq!(matches!(cause, CloseCause::Busy(_)), !is_refused, "{cause}");
        let other = world.admit(2, "leaf2", NOTHING);
        assert_eq!(world.opened, [other]);
        // The refused identity comes again on the same connection.
        world.parent.manner("leaf1").refuse = None;
        let again = world.admit(3, "leaf1", NOTHING);
        assert_eq!(world.opened, [other, again]);
    }
}

#[test]
fn a_throttled_identity_waits_and_its_neighbours_do_not() {
    let mut world = World::new();
    let slow = world.admit(1, "leaf1", NOTHING);
    let quick = world.admit(2, "leaf2", NOTHING);
    let throttled = Verdict::Reject("com.microsoft:device-container-throttled");
    world.parent.manner("leaf1").always = throttled;
    world.send(slow, &bodies(0..100));
    let refused = world.parent.deliveries["leaf1"].len();
    assert_eq!(refused, 2, "both batches that were under way");
    world.send(quick, &bodies(0..100));
    assert_eq!(world.parent.ledger("leaf2"), bodies(0..100));
    world.pass(Duration::from_secs(30));
    let tries = world.parent.deliveries["leaf1"].len();
    assert!((4..=7).contains(&tries), "{tries} deliveries in 30 s");
    world.parent.manner("leaf1").always = Verdict::Accept;
    world.send(quick, &bodies(100..101));
    world.pass(Duration::from_secs(90));
    assert_eq!(world.parent.ledger("leaf1"), bodies(0..100));
    assert!(world.closed.is_empty() && world.given_up(slow).is_empty());
}

#[test]
fn what_is_released_modified_or_fails_goes_again_in_order() {
    for verdict in [
        Verdict::Release,
        Verdict::Modify,
        Verdict::Reject("amqp:internal-error"),
        Verdict::Reject("com.microsoft:timeout"),
        Verdict::Reject("unheard:of"),
    ] {
        let mut world = World::new();
        let leaf = world.admit(1, "leaf1", NOTHING);
        world.parent.manner("leaf1").next = vec![verdict.clone(); 3].into();
        world.send(leaf, &bodies(0..10));
        world.send(leaf, &bodies(10..20));
        world.pass(Duration::from_secs(5));
        assert_eq!(world.parent.ledger("leaf1"), bodies(0..20), "{verdict:?}");
        assert_eq!(world.accepted(leaf), (0..20).collect::<Vec<u64>>());
    }
}

#[test]
fn a_poison_message_is_found_and_dropped_alone() {
    for (condition, reason) in [
        ("com.microsoft:argument-error", DropReason::Rejected),
        ("amqp:not-allowed", DropReason::Rejected),
        ("amqp:link:message-size-exceeded", DropReason::TooLarge),
    ] {
        let mut world = World::new();
        let leaf = world.admit(1, "leaf1", NOTHING);
        world.parent.manner("leaf1").poison = vec![("21".to_owned(), condition)];
        world.send(leaf, &bodies(0..64));
        world.send(leaf, &bodies(64..100));
        world.pass(SECOND);
        let mut expected = bodies(0..100);
        expected.remove(21);
        assert_eq!(world.parent.ledger("leaf1"), expected, "{condition}");
        let dropped = [(21, Disposition::Unsendable(reason))];
        assert_eq!(world.given_up(leaf), dropped);
        let tries = world.parent.deliveries["leaf1"].len();
        assert!(tries <= 2 * 7 + 2, "{tries} deliveries to find one of 64");
        assert!(world.closed.is_empty());
    }
}

#[test]
fn several_poison_messages_are_found_and_the_order_holds() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    let bad = [3, 4, 40, 63];
    let condition = "com.microsoft:argument-error";
    world.parent.manner("leaf1").poison = bad
        .map(|number: usize| (number.to_string(), condition))
        .to_vec();
    world.send(leaf, &bodies(0..64));
    world.pass(SECOND);
    let mut expected = bodies(0..64);
    expected.retain(|body| !bad.map(|number| number.to_string()).contains(body));
    assert_eq!(world.parent.ledger("leaf1"), expected);
    let mut dropped: Vec<u64> = world
        .given_up(leaf)
        .iter()
        .map(|(token, _)| *token)
        .collect();
    dropped.sort_unstable();
    assert_eq!(dropped, [3, 4, 40, 63]);
}

#[test]
fn telemetry_that_is_unauthorized_ends_the_session_so_that_the_scope_is_asked() {
    for condition in ["amqp:unauthorized-access", "amqp:not-found"] {
        let mut world = World::new();
        let leaf = world.admit(1, "leaf1", NOTHING);
        let other = world.admit(2, "leaf2", NOTHING);
        world.parent.manner("leaf1").always = Verdict::Reject(condition);
        world.send(leaf, &bodies(0..10));
        assert!(matches!(world.closed[&leaf], CloseCause::Refused(_)));
        world.send(other, &bodies(0..10));
        assert_eq!(world.parent.ledger("leaf2"), bodies(0..10));
        assert!(!world.closed.contains_key(&other));
    }
}

#[test]
fn a_hub_that_is_away_ends_the_connection_for_all() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    let other = world.admit(2, "leaf2", NOTHING);
    let away = "com.microsoft:iot-hub-not-found-error";
    world.parent.manner("leaf1").always = Verdict::Reject(away);
    world.send(leaf, &bodies(0..10));
    for session in [leaf, other] {
        assert!(matches!(world.closed[&session], CloseCause::Busy(_)));
    }
    assert!(world.multiplex.is_over());
    assert_eq!(world.parent.closed, Some(ServerClose::Peer(None)));
}

#[test]
fn a_lost_telemetry_link_ends_that_identitys_session_alone() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    let other = world.admit(2, "leaf2", NOTHING);
    let stolen = Verdict::Detach("amqp:link:stolen");
    world.parent.manner("leaf1").next = [stolen].into();
    world.send(leaf, &bodies(0..10));
    assert!(matches!(world.closed[&leaf], CloseCause::Detached(_)));
    assert_eq!(
        world.accepted(leaf),
        [] as [u64; 0],
        "sent again by the next"
    );
    world.send(other, &bodies(0..10));
    assert_eq!(world.parent.ledger("leaf2"), bodies(0..10));
    let again = world.admit(3, "leaf1", NOTHING);
    world.send(again, &bodies(0..10));
    assert_eq!(world.parent.ledger("leaf1"), bodies(0..10));
}

#[test]
fn a_link_that_was_detached_for_one_large_message_goes_on_without_it() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    let too_large = Verdict::Detach("amqp:link:message-size-exceeded");
    // The batch, its first half, and then the one message.
    world.parent.manner("leaf1").next = vec![too_large; 3].into();
    world.send(leaf, &bodies(0..4));
    world.pass(SECOND);
    assert!(world.closed.is_empty());
    let dropped = [(0, Disposition::Unsendable(DropReason::TooLarge))];
    assert_eq!(world.given_up(leaf), dropped);
    assert_eq!(world.parent.ledger("leaf1"), bodies(1..4));
}

#[test]
fn what_is_larger_than_the_upstream_takes_is_dropped_without_being_sent() {
    let mut world = World::new();
    world.parent.max_message_size(2000);
    let leaf = world.admit(1, "leaf1", NOTHING);
    let large = "x".repeat(3000);
    let medium = "y".repeat(900);
    let texts = [
        "a".to_owned(),
        large,
        medium.clone(),
        medium.clone(),
        medium.clone(),
        "b".to_owned(),
    ];
    world.send(leaf, &texts);
    let dropped = [(1, Disposition::Unsendable(DropReason::TooLarge))];
    assert_eq!(world.given_up(leaf), dropped);
    let expected = [
        "a".to_owned(),
        medium.clone(),
        medium.clone(),
        medium,
        "b".to_owned(),
    ];
    assert_eq!(world.parent.ledger("leaf1"), expected);
    assert!(
        world.parent.deliveries["leaf1"].len() >= 2,
        "no batch over 2000 bytes"
    );
}

#[test]
fn large_messages_cross_in_many_frames() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    let texts = [b'a', b'b', b'c'].map(|letter| char::from(letter).to_string().repeat(250_000));
    world.send(leaf, &texts);
    assert_eq!(world.parent.ledger("leaf1"), texts);
    assert_eq!(world.parent.deliveries["leaf1"], [1, 1, 1]);
}

#[test]
fn tokens_are_renewed_on_the_open_connection_each_at_its_own_time() {
    let mut world = World::new();
    for number in 0..20 {
        world.admit(number, &format!("leaf{number}"), NOTHING);
    }
    let before = world.parent.tokens.len();
    assert_eq!(before, 21);
    // A token lives an hour and is handed out for half of that.
    world.pass(HOUR / 4);
    assert_eq!(world.parent.tokens.len(), before);
    world.pass(HOUR / 2);
    let renewed = world.parent.tokens.len() - before;
    assert!((1..40).contains(&renewed), "{renewed}");
    world.pass(HOUR / 2);
    let mut names: Vec<String> = world.parent.tokens[before..]
        .iter()
        .map(|(name, _)| name.clone())
        .collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 21, "everybody's");
    world.pass(HOUR * 10);
    assert!(world.closed.is_empty());
    let total = world.parent.tokens.len();
    assert!((21 * 12..21 * 30).contains(&total), "{total} in 11 hours");
}

#[test]
fn a_renewal_that_fails_is_tried_again_without_haste_and_a_refused_one_ends_the_session() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    world.parent.manner("leaf1").token = Some(500);
    world.pass(HOUR);
    assert!(world.closed.is_empty());
    let tries = world.parent.tokens.len();
    assert!((4..70).contains(&tries), "{tries}");
    world.parent.manner("leaf1").token = Some(401);
    world.pass(HOUR);
    assert!(matches!(world.closed[&leaf], CloseCause::Refused(_)));
}

#[test]
fn an_upstream_that_does_not_answer_keeps_nobody_waiting_for_ever() {
    let mut world = World::new();
    world.parent.manner("leaf1").token = None;
    let leaf = world.admit(1, "leaf1", NOTHING);
    let other = world.admit(2, "leaf2", NOTHING);
    assert_eq!(world.opened, [other]);
    world.pass(Duration::from_secs(21));
    assert!(matches!(world.closed[&leaf], CloseCause::Busy(_)));
    world.parent.manner("leaf2").always = Verdict::Silent;
    world.send(other, &bodies(0..1));
    world.pass(Duration::from_secs(299));
    assert!(!world.closed.contains_key(&other));
    world.pass(Duration::from_secs(2));
    assert!(matches!(world.closed[&other], CloseCause::Lost(_)));
}

#[test]
fn the_own_token_that_is_refused_ends_the_connection() {
    let mut world = World::unopened(Config::new("parent"));
    world.parent.manner(OWN).token = Some(401);
    let leaf = world.admit(1, "leaf1", NOTHING);
    assert!(matches!(world.closed[&leaf], CloseCause::Busy(_)));
    let late = world.admit(2, "leaf2", NOTHING);
    assert!(matches!(world.closed[&late], CloseCause::Busy(_)));
    assert!(world.multiplex.is_over());
}

#[test]
fn a_silent_peer_is_given_up_after_the_idle_time_out_and_heartbeats_keep_one_alive() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    world.pass(Duration::from_secs(600));
    assert!(world.closed.is_empty(), "heartbeats both ways");
    world.is_cut = true;
    world.pass(Duration::from_secs(59));
    assert!(world.closed.is_empty());
    world.pass(Duration::from_secs(2));
    assert!(matches!(world.closed[&leaf], CloseCause::Lost(_)));
    assert!(world.multiplex.is_over());
}

#[test]
fn a_broken_connection_is_told_to_all_and_what_was_not_accepted_goes_again_on_the_next() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    world.parent.manner("leaf1").always = Verdict::Silent;
    world.send(leaf, &bodies(0..10));
    world.multiplex.broken("reset");
    world.drive();
    assert!(matches!(world.closed[&leaf], CloseCause::Lost(_)));
    assert!(world.disposed.is_empty());
    world.parent.manner("leaf1").always = Verdict::Accept;
    world.reconnect();
    let again = world.admit(2, "leaf1", NOTHING);
    world.send(again, &bodies(0..10));
    assert_eq!(world.parent.ledger("leaf1"), bodies(0..10));
}

#[test]
fn an_upstream_that_closes_before_it_is_open_is_unreachable() {
    let mut world = World::unopened(Config::new("parent"));
    let (now, leaf) = (world.now, SessionId(1));
    world.know("leaf1");
    world.multiplex.admit(leaf, id("leaf1"), NOTHING, now);
    world.multiplex.broken("reset");
    world.drive();
    assert!(matches!(world.closed[&leaf], CloseCause::Unreachable(_)));
    let mut world = World::unopened(Config::new("parent"));
    world.is_cut = true;
    world.multiplex.admit(leaf, id("leaf1"), NOTHING, world.now);
    world.know("leaf1");
    world.multiplex.admit(leaf, id("leaf1"), NOTHING, world.now);
    world.closed.clear();
    world.multiplex.told();
    world.pass(Duration::from_secs(21));
    assert!(matches!(world.closed[&leaf], CloseCause::Unreachable(_)));
}

#[test]
fn garbage_from_the_upstream_is_a_protocol_error_of_the_connection() {
    let mut world = World::new();
    let leaf = world.admit(1, "leaf1", NOTHING);
    let now = world.now;
    let mut garbage = BytesMut::from(&[0, 0, 0, 20, 2, 0, 0, 9, 0, 0x53, 0x99][..]);
    garbage.extend_from_slice(&[0; 20]);
    world.multiplex.receive(&mut garbage, now);
    world.drive();
    assert!(matches!(world.closed[&leaf], CloseCause::Protocol(_)));
}

#[test]
fn a_session_that_is_closed_gives_its_channel_back() {
    let mut world = World::new();
    for round in 0..3000 {
        let leaf = world.admit(round, "leaf1", NOTHING);
        world.command(leaf, Command::Close);
        world.drive();
        assert_eq!(world.closed[&leaf], CloseCause::Requested);
    }
    assert_eq!(world.multiplex.members(), 0);
    assert_eq!(world.opened.len(), 3000);
}

#[test]
fn an_upstream_with_few_channels_says_how_many_fit() {
    let mut config = Config::new("parent");
    config.channel_max = 3;
    let mut world = World::unopened(config);
    world.drive();
    assert_eq!(world.multiplex.members_max(), Some(3));
    for number in 0..4 {
        world.admit(number, &format!("leaf{number}"), NOTHING);
    }
    assert_eq!(world.opened.len(), 3);
    assert!(matches!(world.closed[&SessionId(3)], CloseCause::Busy(_)));
}

#[test]
fn nine_hundred_identities_share_a_connection_and_three_odd_ones_disturb_nobody() {
    let mut world = World::new();
    let count = limits::AMQP_IDENTITIES_MAX as u64;
    for number in 0..count {
        let name = format!("leaf{number}");
        world.know(&name);
    }
    world.parent.manner("leaf1").token = Some(401);
    world.parent.manner("leaf2").always =
        Verdict::Reject("com.microsoft:device-container-throttled");
    let condition = "com.microsoft:argument-error";
    world.parent.manner("leaf3").poison = vec![("7".to_owned(), condition)];
    for number in 0..count {
        let identity = id(&format!("leaf{number}"));
        let now = world.now;
        world
            .multiplex
            .admit(SessionId(number), identity, NOTHING, now);
    }
    world.drive();
    assert_eq!(world.opened.len() as u64, count - 1);
    for number in (0..count).filter(|number| *number != 1) {
        world.number(SessionId(number));
        world.push(SessionId(number), &bodies(0..20));
    }
    world.pass(SECOND * 2);
    for number in (0..count).filter(|number| ![1, 2].contains(number)) {
        let mut expected = bodies(0..20);
        expected.retain(|body| number != 3 || body != "7");
        assert_eq!(
            world.parent.ledger(&format!("leaf{number}")),
            expected,
            "{number}"
        );
    }
    assert_eq!(world.parent.ledger("leaf2"), [] as [String; 0]);
    assert_eq!(world.closed.len(), 1);
}
