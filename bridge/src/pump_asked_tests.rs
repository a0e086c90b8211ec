//! The pump and the broker: needs and twin requests, on their way through lanes and sessions.

use edgehub_proto::hub::{Connectivity, Upstream, UpstreamError};

use super::test_world::{Manner, Running, World, within};
use super::*;
use crate::test_support::{eventually, id, settle_down};

const METHODS: Needs = Needs {
    desired: false,
    methods: true,
    cloud_to_device: false,
};
const ALL: Needs = Needs {
    desired: true,
    methods: true,
    cloud_to_device: true,
};

fn told(world: &World, identity: &str) -> Vec<Needs> {
    let seen = world.transport.0.lock();
    seen.needs.get(identity).cloned().unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn needs_open_a_session_that_learns_of_every_change() {
    let world = World::new();
    let running = world.run(Vec::new());
    running.upstream.need(&id("leaf0"), METHODS);
    eventually("session", || told(&world, "leaf0") == [METHODS]).await;
    running.upstream.need(&id("leaf0"), ALL);
    eventually("change", || told(&world, "leaf0") == [METHODS, ALL]).await;
    // Modules have no cloud-to-device messages.
    running.upstream.need(&id("edge1/modA"), ALL);
    let of_a_module = Needs {
        cloud_to_device: false,
        ..ALL
    };
    eventually("session", || told(&world, "edge1/modA") == [of_a_module]).await;
    running.upstream.need(&id("leaf0"), Needs::default());
    let all = [METHODS, ALL, Needs::default()];
    eventually("change", || told(&world, "leaf0") == all).await;
    assert_eq!(world.transport.opened("leaf0"), 1);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_session_comes_back_by_itself() {
    let world = World::new();
    world.transport.set("leaf0", Manner::Dies);
    let running = world.run(Vec::new());
    running.upstream.need(&id("leaf0"), METHODS);
    eventually("attempt", || world.transport.opened("leaf0") == 1).await;
    world.transport.set("leaf0", Manner::Accepts);
    within(Duration::from_secs(16), "session", || {
        told(&world, "leaf0") == [METHODS]
    })
    .await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn requests_are_answered_each_with_its_own() {
    let world = World::new();
    let running = world.run(Vec::new());
    let upstream = &running.upstream;
    let twins = ["leaf0", "leaf1", "edge1/$edgeHub"].map(|name| (name, upstream.twin(&id(name))));
    let patch = bytes::Bytes::from_static(b"1234567");
    let report = upstream.report(&id("leaf0"), patch);
    for (name, twin) in twins {
        assert_eq!(twin.await.unwrap(), name);
    }
    assert_eq!(report.await, Ok(Some(7)));
    assert_eq!(
        world.transport.opened("leaf0"),
        1,
        "one connection for all of it"
    );
    running.stop().await;
}

/// One connection per identity carries messages, needs and requests.
#[tokio::test(start_paused = true)]
async fn an_identity_has_one_connection_for_everything() {
    let world = World::new();
    let queue = world.store.queue(0);
    let running = world.run(vec![queue.clone()]);
    let messages = (0..50).map(|number| (id("leaf0"), number.to_string()));
    world.store.append(&queue, messages, None).await;
    running.upstream.need(&id("leaf0"), ALL);
    assert_eq!(running.upstream.twin(&id("leaf0")).await.unwrap(), "leaf0");
    eventually("messages", || queue.length() == 0).await;
    eventually("needs", || told(&world, "leaf0").last() == Some(&ALL)).await;
    assert_eq!(world.transport.opened("leaf0"), 1);
    running.stop().await;
}

async fn fails_at_once(running: &Running) -> UpstreamError {
    let begin = Instant::now();
    let error = running.upstream.twin(&id("leaf0")).await.unwrap_err();
    assert_eq!(begin.elapsed(), Duration::ZERO);
    error
}

#[tokio::test(start_paused = true)]
async fn while_the_upstream_is_away_requests_fail_at_once() {
    let world = World::new();
    world.transport.set("leaf0", Manner::Unreachable);
    let running = world.run(Vec::new());
    running.upstream.need(&id("leaf0"), METHODS);
    within(Duration::from_secs(1), "failures", || {
        world.transport.opened("leaf0") > 1
    })
    .await;
    let error = fails_at_once(&running).await;
    assert!(matches!(error, UpstreamError::Unavailable(_)), "{error}");
    let connectivity = running.upstream.connectivity();
    assert_eq!(*connectivity.borrow(), Connectivity::Disconnected);
    world.transport.set("leaf0", Manner::Accepts);
    within(Duration::from_secs(6), "return", || {
        *connectivity.borrow() == Connectivity::Connected
    })
    .await;
    assert_eq!(running.upstream.twin(&id("leaf0")).await.unwrap(), "leaf0");
    running.stop().await;
    assert!(matches!(
        fails_at_once_after_stop(&world).await,
        UpstreamError::Unavailable(_)
    ));
}

/// A hub that has stopped says so.
async fn fails_at_once_after_stop(world: &World) -> UpstreamError {
    let running = world.run(Vec::new());
    running.cancel.cancel();
    within(Duration::from_secs(5), "stop", || running.is_stopped()).await;
    fails_at_once(&running).await
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_ends_in_time() {
    let world = World::new();
    world.transport.set("leaf0", Manner::Withholds);
    let running = world.run(Vec::new());
    let asked = tokio::spawn(running.upstream.twin(&id("leaf0")));
    eventually("session", || world.transport.opened("leaf0") == 1).await;
    settle_down().await;
    within(Duration::from_secs(21), "time-out", || asked.is_finished()).await;
    let error = asked.await.unwrap().unwrap_err();
    assert!(matches!(error, UpstreamError::Unavailable(_)), "{error}");
    running.stop().await;
}

/// Askers that have gone before their request could be sent: it is not sent, and takes no room.
#[tokio::test(start_paused = true)]
async fn an_asker_that_goes_away_costs_nothing() {
    let world = World::new();
    world.transport.set("leaf0", Manner::Hangs);
    let running = world.run(Vec::new());
    let as_many_as_may_wait = 0..limits::LANE_REQUESTS_MAX;
    let asked: Vec<_> = as_many_as_may_wait
        .map(|_| running.upstream.twin(&id("leaf0")))
        .collect();
    eventually("attempt", || world.transport.opened("leaf0") == 1).await;
    let one_more = running.upstream.twin(&id("leaf0")).await;
    assert_eq!(one_more, Err(UpstreamError::Busy { status: 429 }));
    drop(asked);
    world.transport.set("leaf0", Manner::Accepts);
    let connectivity = running.upstream.connectivity();
    eventually("session", || {
        *connectivity.borrow() == Connectivity::Connected
    })
    .await;
    let twin = running.upstream.twin(&id("leaf0")).await;
    assert_eq!(twin.unwrap(), "leaf0");
    running.stop().await;
}
