//! The steps of a device's queue.

use super::*;
use crate::c2d::message::tests::message;

const HOUR_MS: u64 = 3_600_000;

/// A queue with the messages m1, m2, … enqueued at 0.
fn queue(count: usize) -> Queue {
    let mut queue = Queue::default();
    for number in 1..=count {
        let message = message(&format!("m{number}"));
        queue.enqueue(message, 0, &mut Effects::default()).unwrap();
    }
    queue
}

/// Sequence, packet id, DUP of everything that goes out.
fn deliver(queue: &mut Queue, connection: u64, now_ms: u64) -> Vec<(u64, Option<u16>, bool)> {
    let mut effects = Effects::default();
    let out = queue.deliver(connection, true, now_ms, &mut effects);
    out.iter()
        .map(|one| (one.sequence, one.packet_id, one.is_duplicate))
        .collect()
}

fn outcomes(effects: &Effects) -> Vec<(u64, Outcome, u32)> {
    effects
        .settled
        .iter()
        .map(|(sequence, settled)| (*sequence, settled.outcome, settled.delivery_count))
        .collect()
}

#[test]
fn a_puback_completes() {
    let mut queue = queue(2);
    assert_eq!(
        deliver(&mut queue, 1, 0),
        [(1, Some(1), false), (2, Some(2), false)]
    );
    assert_eq!(deliver(&mut queue, 1, 0), [], "both are invisible");
    let mut effects = Effects::default();
    assert!(queue.acknowledge(2, 5, &mut effects));
    assert!(!queue.acknowledge(2, 5, &mut effects));
    assert!(!queue.acknowledge(9, 5, &mut effects));
    assert_eq!(outcomes(&effects), [(2, Outcome::Completed, 1)]);
    assert_eq!(effects.settled[0].1.settled_ms, 5);
    assert_eq!(queue.messages().keys().collect::<Vec<_>>(), [&1]);
}

#[test]
fn fifty_are_the_most() {
    let mut queue = queue(C2D_QUEUE_MAX);
    let mut effects = Effects::default();
    assert_eq!(queue.enqueue(message("x"), 0, &mut effects), None);
    deliver(&mut queue, 1, 0);
    assert_eq!(queue.enqueue(message("x"), 0, &mut effects), None);
    queue.acknowledge(1, 0, &mut effects);
    assert_eq!(queue.enqueue(message("x"), 0, &mut effects), Some(51));
}

/// The same session: the same id with DUP, before what is new. Another session: fresh ids.
#[test]
fn what_a_connection_left_is_delivered_again() {
    let mut queue = queue(2);
    let mut effects = Effects::default();
    deliver(&mut queue, 1, 0);
    queue.acknowledge(1, 0, &mut effects);
    queue.disconnect(1, 0, &mut effects);
    queue.enqueue(message("m3"), 0, &mut effects).unwrap();
    queue.connect(true, 0, &mut effects);
    assert_eq!(
        deliver(&mut queue, 2, 0),
        [(2, Some(2), true), (3, Some(3), false)]
    );
    queue.disconnect(1, 0, &mut effects);
    assert_eq!(
        deliver(&mut queue, 2, 0),
        [],
        "the end of an older connection frees nothing"
    );
    queue.connect(false, 0, &mut effects);
    assert_eq!(
        deliver(&mut queue, 3, 0),
        [(2, Some(4), false), (3, Some(5), false)]
    );
    let mut effects = Effects::default();
    queue.acknowledge(4, 0, &mut effects);
    assert_eq!(outcomes(&effects), [(2, Outcome::Completed, 3)]);
}

#[test]
fn ten_deliveries_are_the_most() {
    let mut queue = queue(1);
    for connection in 1..=u64::from(C2D_DELIVERIES_MAX) {
        assert_eq!(deliver(&mut queue, connection, 0).len(), 1);
        let mut effects = Effects::default();
        queue.disconnect(connection, 7, &mut effects);
        let wanted: &[_] = if connection == 10 {
            &[(1, Outcome::DeadLettered, 10)]
        } else {
            &[]
        };
        assert_eq!(outcomes(&effects), wanted, "{connection}");
    }
    assert!(queue.messages().is_empty());
}

#[test]
fn a_lock_that_runs_out_brings_an_uncounted_redelivery() {
    let mut queue = queue(1);
    deliver(&mut queue, 1, 0);
    let mut effects = Effects::default();
    assert_eq!(queue.next_tick_ms(), Some(C2D_LOCK_MS));
    assert!(!queue.tick(C2D_LOCK_MS - 1, &mut effects));
    assert!(queue.tick(C2D_LOCK_MS, &mut effects));
    assert_eq!(
        deliver(&mut queue, 1, C2D_LOCK_MS),
        [(1, Some(1), true)],
        "on the same connection, as a duplicate"
    );
    queue.acknowledge(1, C2D_LOCK_MS, &mut effects);
    assert_eq!(outcomes(&effects), [(1, Outcome::Completed, 1)]);
}

#[test]
fn messages_expire_unless_they_are_invisible() {
    let mut queue = queue(2);
    let mut effects = Effects::default();
    let mut short = message("m3");
    short.expiry_ms = Some(100);
    queue.enqueue(short, 0, &mut effects).unwrap();
    assert_eq!(queue.next_tick_ms(), Some(100));
    deliver(&mut queue, 1, HOUR_MS - 1);
    let mut effects = Effects::default();
    queue.tick(HOUR_MS, &mut effects);
    assert_eq!(outcomes(&effects), [], "locked");
    queue.acknowledge(1, HOUR_MS, &mut effects);
    queue.disconnect(1, HOUR_MS, &mut effects);
    assert_eq!(
        outcomes(&effects),
        [(1, Outcome::Completed, 1), (2, Outcome::Expired, 1)]
    );
    assert!(queue.acknowledge(2, HOUR_MS, &mut effects), "a late PUBACK");
    assert!(!queue.acknowledge(2, HOUR_MS, &mut effects));
}

#[test]
fn an_expired_message_never_goes_out() {
    let mut queue = queue(1);
    let mut effects = Effects::default();
    assert!(queue.deliver(1, true, HOUR_MS, &mut effects).is_empty());
    assert_eq!(outcomes(&effects), [(1, Outcome::Expired, 0)]);
}

#[test]
fn at_most_once_is_complete_once_it_is_written() {
    let mut queue = queue(2);
    let mut effects = Effects::default();
    let out = queue.deliver(1, false, 0, &mut effects);
    assert!(out.iter().all(|one| one.packet_id.is_none()));
    queue.complete(&[1], 1, 0, &mut effects);
    queue.complete(&[2], 9, 0, &mut effects);
    assert_eq!(outcomes(&effects), [(1, Outcome::Completed, 1)]);
    queue.disconnect(1, 0, &mut effects);
    assert_eq!(deliver(&mut queue, 2, 0), [(2, Some(1), false)]);
}

#[test]
fn packet_ids_wrap_around_what_is_outstanding() {
    let mut queue = queue(1);
    deliver(&mut queue, 1, 0);
    for _ in 0..u16::MAX {
        let mut effects = Effects::default();
        queue.enqueue(message("x"), 0, &mut effects).unwrap();
        let out = deliver(&mut queue, 1, 0);
        let id = out[0].1.unwrap();
        assert!(id > 1, "0 is no id and 1 is outstanding");
        assert!(queue.acknowledge(id, 0, &mut effects));
    }
}

#[test]
fn a_purged_queue_is_empty() {
    let mut queue = queue(2);
    let mut effects = Effects::default();
    deliver(&mut queue, 1, 0);
    assert_eq!(queue.purge(3, &mut effects), 2);
    assert_eq!(
        outcomes(&effects),
        [(1, Outcome::Purged, 1), (2, Outcome::Purged, 1)]
    );
    assert!(effects.touched.is_empty());
    assert!(queue.acknowledge(1, 0, &mut effects), "a late PUBACK");
}

#[test]
fn a_restored_queue_goes_on_with_ids_and_counts() {
    let mut queue = queue(2);
    deliver(&mut queue, 1, 0);
    let text = serde_json::to_string(queue.messages()).unwrap();
    let mut queue = Queue::restore(serde_json::from_str(&text).unwrap(), 7);
    let mut effects = Effects::default();
    assert_eq!(queue.enqueue(message("x"), 0, &mut effects), Some(8));
    queue.connect(true, 0, &mut effects);
    assert_eq!(
        deliver(&mut queue, 1, 0),
        [(1, Some(1), true), (2, Some(2), true), (8, Some(3), false)]
    );
    assert_eq!(queue.messages()[&1].deliveries, 2);
}

/// The token of the only message that goes out over AMQP, and how often it was delivered before.
fn lock(queue: &mut Queue, connection: u64, now_ms: u64) -> Option<(LockToken, u32)> {
    let token = || [u8::try_from(now_ms % 251).unwrap(); 16];
    let mut effects = Effects::default();
    let mut out = queue.lock(connection, 1, now_ms, token, &mut effects);
    out.pop().map(|one| (one.token, one.earlier))
}

#[test]
fn a_lock_token_names_one_delivery() {
    let mut queue = queue(1);
    let mut effects = Effects::default();
    let (first, earlier) = lock(&mut queue, 1, 1).unwrap();
    assert_eq!((earlier, lock(&mut queue, 1, 2)), (0, None));
    assert!(queue.dispose(first, Disposal::Abandon, 3, &mut effects));
    assert!(!queue.dispose(first, Disposal::Complete, 3, &mut effects));
    let (second, earlier) = lock(&mut queue, 1, 4).unwrap();
    assert_eq!(earlier, 1);
    assert!(!queue.dispose(first, Disposal::Complete, 5, &mut effects));
    assert!(queue.dispose(second, Disposal::Reject, 5, &mut effects));
    assert_eq!(outcomes(&effects), [(1, Outcome::Rejected, 2)]);
}

/// Neither the end of its connection nor a newer one frees it, of either protocol.
#[test]
fn a_lock_of_amqp_stays_until_it_runs_out() {
    let mut queue = queue(1);
    let mut effects = Effects::default();
    let (token, _) = lock(&mut queue, 1, 1).unwrap();
    queue.disconnect(1, 2, &mut effects);
    queue.connect(true, 2, &mut effects);
    assert_eq!(deliver(&mut queue, 2, 2), []);
    assert_eq!(lock(&mut queue, 2, C2D_LOCK_MS), None);
    let (again, earlier) = lock(&mut queue, 2, 1 + C2D_LOCK_MS).unwrap();
    assert_eq!(earlier, 0, "a lock that ran out does not count");
    assert!(!queue.dispose(token, Disposal::Complete, 2 + C2D_LOCK_MS, &mut effects));
    assert!(queue.dispose(again, Disposal::Complete, 2 + C2D_LOCK_MS, &mut effects));
    assert_eq!(outcomes(&effects), [(1, Outcome::Completed, 1)]);
}

/// What MQTT had not acknowledged goes out over AMQP once it is free; its PUBACK is void then.
#[test]
fn a_delivery_of_mqtt_goes_out_over_amqp() {
    let mut queue = queue(1);
    let mut effects = Effects::default();
    assert_eq!(deliver(&mut queue, 1, 0), [(1, Some(1), false)]);
    assert_eq!(lock(&mut queue, 2, 0), None);
    queue.disconnect(1, 0, &mut effects);
    let (token, earlier) = lock(&mut queue, 2, 0).unwrap();
    assert_eq!(earlier, 1);
    assert!(queue.acknowledge(1, 0, &mut effects), "void");
    assert!(queue.dispose(token, Disposal::Complete, 0, &mut effects));
}

#[test]
fn ten_deliveries_over_amqp_are_the_most() {
    let mut queue = queue(1);
    let mut effects = Effects::default();
    for now_ms in 0..10 {
        let (token, earlier) = lock(&mut queue, 1, now_ms).unwrap();
        assert_eq!(u64::from(earlier), now_ms);
        assert!(queue.dispose(token, Disposal::Abandon, now_ms, &mut effects));
    }
    assert_eq!(outcomes(&effects), [(1, Outcome::DeadLettered, 10)]);
}

/// `iothub-ack` says of which outcomes the sender hears.
#[test]
fn who_asked_is_told() {
    for (ack, completed, rejected) in [
        (None, false, false),
        (Some("none"), false, false),
        (Some("positive"), true, false),
        (Some("negative"), false, true),
        (Some("full"), true, true),
    ] {
        for (disposal, told) in [
            (Disposal::Complete, completed),
            (Disposal::Reject, rejected),
        ] {
            let mut queue = Queue::default();
            let mut effects = Effects::default();
            let message = Message {
                ack: ack.map(str::to_owned),
                ..message("m")
            };
            queue.enqueue(message, 0, &mut effects).unwrap();
            let (token, _) = lock(&mut queue, 1, 0).unwrap();
            assert!(queue.dispose(token, disposal, 0, &mut effects));
            assert_eq!(!effects.told.is_empty(), told, "{ack:?} {disposal:?}");
        }
    }
}
