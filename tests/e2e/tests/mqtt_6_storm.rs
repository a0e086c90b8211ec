//! Acceptance 6 of the MQTT side: after an outage everybody's methods are there again at once, and
//! the way there does not cost the upstream much.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use std::sync::Arc;
use std::time::Duration;

use edgehub_lab::{HUB, LabBuilder};
use edgehub_tests::PATIENCE;
use edgehub_tests::mqtt::{Door, Hello, MqttClient};
use edgehub_tests::packets::publish;
use edgehub_tests::service::{METHODS, Service};
use mqttbytes::QoS;
use mqttbytes::v4::Packet;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

const LEAVES: usize = 160;
/// A device has at most 50.
const MODULES: usize = 40;
/// How long the link is down.
const OUTAGE: Duration = Duration::from_secs(60);
/// Before the end of the outage: time for the calls to be made, which then wait.
const CALLS_AHEAD: Duration = Duration::from_secs(10);
/// From the link's return to the first upstream CONNECT.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// From there to the answer of the last method.
const METHODS_MAX: Duration = Duration::from_secs(5);
/// Upstream requests of each identity until then: CONNECT and one SUBSCRIBE.
const REQUESTS_EACH: u64 = 2;
/// And those of the hub itself: its scope, its twin, its own subscriptions.
const REQUESTS_OF_HUB: u64 = 40;

/// Answers every method.
async fn answer(mut client: MqttClient) {
    while let Some(packet) = client.receive().await {
        let Packet::Publish(packet) = packet else {
            continue;
        };
        let Some((_, query)) = packet.topic.split_once("/?") else {
            continue;
        };
        let topic = format!("$iothub/methods/res/200/?{query}");
        let answer = publish(&topic, QoS::AtMostOnce, 0, &packet.payload);
        client.send(&answer).await;
    }
}

/// 200 modules and leaves have subscribed to methods when the upstream link is cut for a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_6_all_methods_work_at_once_after_an_outage() {
    let mut builder = LabBuilder::new().layers(1).leaves(LEAVES, "edge1").env(
        "edge1",
        "MaxConnectedClients",
        "1000",
    );
    for number in 1..=MODULES {
        builder = builder.module("edge1", format!("m{number}"));
    }
    let lab = Arc::new(builder.start().await.expect("the lab starts"));
    let identities = lab.identities().expect("identities");
    assert_eq!(identities.len(), LEAVES + MODULES);
    let service = Service::of(&lab);
    let door = Door::of(&lab, "edge1");
    let mut clients = JoinSet::new();
    for identity in &identities {
        let hello = Hello::of(&lab, &identity.id).keep_alive(1_000);
        let mut client = door.admitted(&hello).await;
        assert_eq!(client.subscribe(1, &[(METHODS, 0)]).await, [0]);
        clients.spawn(answer(client));
    }
    for identity in &identities {
        service.subscribed(&identity.id, METHODS).await;
    }

    lab.cut("edge1", HUB).await.expect("the link is cut");
    // A wait for time itself: the length of the outage.
    sleep(OUTAGE - CALLS_AHEAD).await;
    let until_return = Instant::now() + CALLS_AHEAD;
    let mut calls = JoinSet::new();
    for identity in &identities {
        let (lab, id) = (Arc::clone(&lab), identity.id.clone());
        calls.spawn(async move {
            let payload = json!({ "to": id });
            let patience = PATIENCE.as_secs();
            let service = Service::of(&lab);
            let answer = service.call(&id, "m", &payload, patience, 30).await;
            assert_eq!(
                answer,
                Ok(json!({"status": 200, "payload": payload})),
                "{id}"
            );
            Instant::now()
        });
    }
    // And the rest of it.
    sleep_until(until_return).await;
    assert!(
        calls.try_join_next().is_none(),
        "an answer through a link that is cut"
    );
    service.forget_counters().await;
    lab.heal("edge1", HUB).expect("the link is back");
    let back = Instant::now();
    while service.counter("connects").await == 0 {
        assert!(back.elapsed() < PATIENCE, "the hub does not come back");
        sleep(Duration::from_millis(10)).await;
    }
    let connected = Instant::now();
    let answered = calls.join_all().await;
    let counters = lab
        .control("GET", "/counters", None)
        .await
        .expect("counters");
    let last = answered.into_iter().max().expect("answers");
    let (connecting, answering) = (connected - back, last.saturating_duration_since(connected));
    println!("connected after {connecting:?}, all methods {answering:?} later: {counters}");
    assert!(connecting <= CONNECT_MAX, "{connecting:?}");
    assert!(answering <= METHODS_MAX, "{answering:?}");

    let asked = [
        "connects",
        "connects_refused",
        "subscribes",
        "unsubscribes",
        "twin_gets",
        "twin_patches",
        "scope_calls",
        "registry_calls",
    ];
    let asked: u64 = asked
        .iter()
        .map(|name| {
            counters
                .get(*name)
                .and_then(Value::as_u64)
                .expect("a counter")
        })
        .sum();
    let bound = REQUESTS_EACH * identities.len() as u64 + REQUESTS_OF_HUB;
    assert!(
        asked <= bound,
        "{asked} requests, at most {bound}: {counters}"
    );
    clients.shutdown().await;
    let lab = Arc::into_inner(lab).expect("nobody uses the lab any more");
    lab.shutdown().await.expect("the lab ends");
}
