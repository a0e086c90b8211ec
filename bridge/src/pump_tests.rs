//! The pump and the store: what is stored arrives, in order, whatever happens to one sender.

use std::collections::HashSet;

use edgehub_auth::authenticator::RefreshOutcome;
use edgehub_auth::scope_tree::Status;
use edgehub_proto::hub::Connectivity::{Connected, Disconnected};
use edgehub_storage::QueueStats;

use super::test_world::{Manner, World, bodies, within};
use super::*;
use crate::counters::tests::Counters;
use crate::lanes::Link;
use crate::test_support::{UNIX_MS, eventually, id};

#[tokio::test(start_paused = true)]
async fn everything_arrives_in_order_and_is_settled_also_after_a_restart() {
    let world = World::new();
    let queue = world.store.queue(0);
    let senders = ["leaf0", "leaf1", "edge1/modA"];
    let backlog = bodies(0..700);
    let all = backlog
        .iter()
        .flat_map(|body| senders.map(|sender| (id(sender), body.clone())));
    world.store.append(&queue, all, None).await;
    let running = world.run(vec![queue.clone()]);
    eventually("backlog", || queue.length() == 0).await;
    let more = bodies(700..1000);
    let all = more
        .iter()
        .flat_map(|body| senders.map(|sender| (id(sender), body.clone())));
    world.store.append(&queue, all, None).await;
    eventually("new messages", || queue.length() == 0).await;
    running.stop().await;
    for sender in senders {
        assert_eq!(world.transport.ledger(sender), bodies(0..1000));
    }
    let QueueStats {
        entries, settled, ..
    } = queue.stats();
    assert_eq!((entries, settled), (3000, 3000));
    // Many messages per hand-over: the batch is the unit.
    assert!(
        world.transport.0.lock().batches < 3000 / 20,
        "{}",
        world.transport.0.lock().batches
    );

    let running = world.run(vec![queue.clone()]);
    world
        .store
        .append(&queue, [(id("leaf0"), "1000".to_owned())], None)
        .await;
    eventually("after the restart", || queue.length() == 0).await;
    running.stop().await;
    assert_eq!(
        world.transport.ledger("leaf0"),
        bodies(0..1001),
        "nothing is sent twice"
    );
}

#[tokio::test(start_paused = true)]
async fn a_backlog_larger_than_memory_is_caught_up_from_disk_in_order() {
    let world = World::new();
    let queue = world.store.queue(0);
    let large = "x".repeat(20_000);
    let body = |number: usize| format!("{number:05} {large}");
    for chunk in 0..20 {
        let messages = (0..60).map(|n| {
            let number = chunk * 60 + n;
            (id(["leaf0", "leaf1"][number % 2]), body(number))
        });
        world.store.append(&queue, messages, None).await;
    }
    let running = world.run(vec![queue.clone()]);
    eventually("24 MB", || queue.length() == 0).await;
    running.stop().await;
    for (index, sender) in ["leaf0", "leaf1"].into_iter().enumerate() {
        let expected: Vec<String> = (0..600).map(|n| body(2 * n + index)).collect();
        assert!(world.transport.ledger(sender) == expected, "{sender}");
    }
    assert!(world.store.store.stats().cold_reads > 0);
}

#[tokio::test(start_paused = true)]
async fn a_refused_or_withholding_sender_delays_nobody() {
    let world = World::new();
    world.transport.set("bad", Manner::Refuses);
    world.transport.set("slow", Manner::Withholds);
    let queue = world.store.queue(0);
    for sender in ["bad", "slow"] {
        let messages = bodies(0..2000).into_iter().map(|body| (id(sender), body));
        world.store.append(&queue, messages, None).await;
    }
    let running = world.run(vec![queue.clone()]);
    let messages = bodies(0..500).into_iter().map(|body| (id("good"), body));
    world.store.append(&queue, messages, None).await;
    within(Duration::from_secs(2), "delivery", || {
        queue.length() == 4000
    })
    .await;
    assert_eq!(world.transport.ledger("good"), bodies(0..500));
    assert_eq!(
        world.transport.ledger("slow"),
        bodies(0..64),
        "no more than the window"
    );
    // The bad one is served once it is let in.
    world.transport.set("bad", Manner::Accepts);
    within(Duration::from_secs(10), "return", || queue.length() == 2000).await;
    assert_eq!(world.transport.ledger("bad"), bodies(0..2000));
    running.stop().await;
    assert_eq!(queue.length(), 2000, "what was not acknowledged stays");
}

#[tokio::test(start_paused = true)]
async fn priorities_are_strict() {
    let world = World::new();
    let (high, low) = (world.store.queue(0), world.store.queue(7));
    let names = |prefix: &str| -> Vec<(Identity, String)> {
        (0..300)
            .map(|number| (id("leaf0"), format!("{prefix}{number}")))
            .collect()
    };
    world.store.append(&low, names("low"), None).await;
    world.store.append(&high, names("high"), None).await;
    let running = world.run(vec![low.clone(), high.clone()]);
    eventually("both", || low.length() + high.length() == 0).await;
    running.stop().await;
    let ledger = world.transport.ledger("leaf0");
    let expected: Vec<String> = names("high")
        .into_iter()
        .chain(names("low"))
        .map(|(_, body)| body)
        .collect();
    assert_eq!(ledger, expected);
}

#[tokio::test(start_paused = true)]
async fn expired_messages_are_settled_and_not_sent() {
    let world = World::new();
    let queue = world.store.queue(0);
    world
        .store
        .append(&queue, [(id("leaf0"), "dead".to_owned())], Some(0))
        .await;
    world
        .store
        .append(&queue, [(id("leaf0"), "alive".to_owned())], Some(1))
        .await;
    let running = world.run(vec![queue.clone()]);
    eventually("both", || queue.length() == 0).await;
    running.stop().await;
    assert_eq!(world.transport.ledger("leaf0"), ["alive"]);
    let stats = queue.stats();
    assert_eq!((stats.settled, stats.expired, stats.dropped), (1, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn what_the_sweep_has_counted_as_expired_is_not_counted_again() {
    let recorder = Counters::default();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let dropped = || {
        let values = counters::tests::values(&recorder).into_iter();
        let dropped = values.filter(|(name, _)| name.contains("messages_dropped"));
        dropped.map(|(_, value)| value).sum::<u64>()
    };
    for (is_swept, count) in [(true, 0), (false, 1)] {
        let world = World::new();
        world.transport.set("leaf0", Manner::Waits);
        let queue = world.store.queue(0);
        let window = bodies(0..64).into_iter().map(|body| (id("leaf0"), body));
        world.store.append(&queue, window, None).await;
        let message = [(id("leaf0"), "dead".to_owned())];
        world.store.append(&queue, message, Some(0)).await;
        let running = world.run(vec![queue.clone()]);
        // It waits in its lane for a place in the window.
        within(Duration::from_secs(5), "window", || {
            world.transport.ledger("leaf0").len() == 64
        })
        .await;
        if is_swept {
            assert_eq!(queue.expire(UNIX_MS, 100).await.unwrap(), 1);
        }
        world.transport.set("leaf0", Manner::Accepts);
        let behind = [(id("leaf0"), "alive".to_owned())];
        world.store.append(&queue, behind, None).await;
        within(Duration::from_secs(10), "all", || queue.length() == 0).await;
        assert_eq!(world.transport.ledger("leaf0").len(), 65);
        running.stop().await;
        assert_eq!(dropped(), count, "swept: {is_swept}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_task_died_is_replaced() {
    let world = World::new();
    world.transport.set("leaf0", Manner::Dies);
    let queue = world.store.queue(0);
    world
        .store
        .append(&queue, [(id("leaf0"), "0".to_owned())], None)
        .await;
    let running = world.run(vec![queue.clone()]);
    eventually("open", || world.transport.opened("leaf0") == 1).await;
    world.transport.set("leaf0", Manner::Accepts);
    within(Duration::from_secs(16), "replacement", || {
        queue.length() == 0
    })
    .await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn messages_are_dropped_only_with_proof_and_only_when_tracking() {
    // refresh outcome, what the scope knows, tracking -> dropped
    let cases = [
        (RefreshOutcome::Unavailable, None, true, false),
        (RefreshOutcome::Limited, None, true, false),
        (RefreshOutcome::NotFound, None, true, true),
        (RefreshOutcome::NotFound, None, false, false),
        (
            RefreshOutcome::Refreshed,
            Some(Status::Enabled),
            true,
            false,
        ),
        (RefreshOutcome::Limited, Some(Status::Disabled), true, true),
        (
            RefreshOutcome::Limited,
            Some(Status::Disabled),
            false,
            false,
        ),
    ];
    for (refresh, status, track, dropped) in cases {
        let world = World {
            refresh,
            track,
            ..World::new()
        };
        world.transport.set("leaf0", Manner::Refuses);
        world.know("edge1", Status::Enabled);
        if let Some(status) = status {
            world.know("leaf0", status);
        }
        let queue = world.store.queue(0);
        let messages = bodies(0..30).into_iter().map(|body| (id("leaf0"), body));
        world.store.append(&queue, messages, None).await;
        let running = world.run(vec![queue.clone()]);
        within(Duration::from_secs(60), "retries", || {
            world.transport.opened("leaf0") > 3 || queue.length() == 0
        })
        .await;
        assert_eq!(
            queue.stats().dropped,
            if dropped { 30 } else { 0 },
            "{refresh:?} {status:?}"
        );
        running.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_scope_change_decides_about_waiting_identities_at_once() {
    let world = World::new();
    world.know("edge1", Status::Enabled);
    world.know("leaf0", Status::Enabled);
    world.transport.set("leaf0", Manner::Refuses);
    let queue = world.store.queue(0);
    world
        .store
        .append(&queue, [(id("leaf0"), "0".to_owned())], None)
        .await;
    let running = world.run(vec![queue.clone()]);
    // Fail until the back-off is at seconds.
    within(Duration::from_secs(30), "retries", || {
        world.transport.opened("leaf0") > 6
    })
    .await;
    world.transport.set("leaf0", Manner::Accepts);
    world.know("leaf7", Status::Enabled);
    eventually("delivery without a further wait", || queue.length() == 0).await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn connectivity_follows_the_lanes() {
    let world = World::new();
    world.transport.set("leaf0", Manner::Unreachable);
    let queue = world.store.queue(0);
    world
        .store
        .append(&queue, [(id("leaf0"), "0".to_owned())], None)
        .await;
    let running = world.run(vec![queue.clone()]);
    let state = running.monitor.subscribe();
    running.monitor.lanes(Link::Up, 1);
    within(Duration::from_secs(2), "offline", || {
        *state.borrow() == Disconnected
    })
    .await;
    world.transport.set("leaf0", Manner::Accepts);
    within(Duration::from_secs(6), "online", || {
        *state.borrow() == Connected
    })
    .await;
    running.stop().await;
}

/// Sessions are told apart, and messages of different senders never mix.
#[tokio::test(start_paused = true)]
async fn a_hundred_senders_keep_apart() {
    let world = World::new();
    let queue = world.store.queue(0);
    let names: Vec<String> = (0..100).map(|number| format!("leaf{number}")).collect();
    let messages: Vec<(Identity, String)> = (0..20)
        .flat_map(|n| {
            names
                .iter()
                .map(move |name| (id(name), format!("{name}-{n}")))
        })
        .collect();
    world.store.append(&queue, messages, None).await;
    let running = world.run(vec![queue.clone()]);
    // Fifty connections at once, then fifty per second.
    within(Duration::from_secs(3), "delivery", || queue.length() == 0).await;
    running.stop().await;
    let mut seen = HashSet::new();
    for name in &names {
        let expected: Vec<String> = (0..20).map(|n| format!("{name}-{n}")).collect();
        assert_eq!(world.transport.ledger(name), expected);
        assert_eq!(world.transport.opened(name), 1);
        seen.insert(name);
    }
    assert_eq!(seen.len(), 100);
}
