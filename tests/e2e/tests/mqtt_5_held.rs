//! Acceptance 5 of the MQTT side: a disk that stands still for ten seconds drops no client.

#![allow(clippy::expect_used, clippy::panic, reason = "these are the tests")]

use std::time::Duration;

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::mqtt::{Door, Hello, MqttClient, publish, telemetry};
use edgehub_tests::only_these_arrive;
use mqttbytes::QoS;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How long no commit happens.
const HELD: Duration = Duration::from_secs(10);
/// Between two signs of life of a client.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Longer than any answer may take that waits for no commit: a SUBACK gives the disk a second.
const SOON: Duration = Duration::from_secs(4);
/// Leaves with messages in flight.
const BUSY: usize = 10;
/// Messages that each has in flight.
const IN_FLIGHT: u16 = 50;

/// While no commit happens for ten seconds, ten leaves with messages in flight and a keep-alive of
/// four seconds get PINGRESP every second, SUBACK and UNSUBACK; others connect, subscribe and find
/// their session again. No connection ends. Then every acknowledgement comes, in order, everything
/// arrives, and what was subscribed meanwhile outlives the hub.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_5_a_commit_held_for_ten_seconds_drops_no_client() {
    let lab = LabBuilder::new().layers(1).leaves(BUSY, "edge1");
    let lab = lab.leaf("late", "edge1").module("edge1", "m").start().await;
    let lab = lab.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    let mut clients = Vec::new();
    for number in 1..=BUSY {
        let id = format!("leaf{number}");
        let hello = Hello::of(&lab, &id).keep_alive(4);
        clients.push((door.admitted(&hello).await, id));
    }

    lab.faults("edge1", "hold-commits")
        .await
        .expect("the hub obeys");
    let until = Instant::now() + HELD;
    let busy: JoinSet<_> = clients
        .into_iter()
        .map(|(client, id)| wait_for_commit(client, id, until))
        .collect();
    come_and_go(&lab, &door, "late", "devices/late/messages/devicebound/#").await;
    come_and_go(&lab, &door, "edge1/m", "devices/edge1/modules/m/inputs/#").await;
    assert!(
        Instant::now() < until,
        "all of that while nothing is committed"
    );
    let clients = busy.join_all().await;
    // Not one message was acknowledged: each client has seen all packets that came.
    lab.faults("edge1", "release-commits")
        .await
        .expect("the hub obeys");
    let mut acknowledged = JoinSet::new();
    for (mut client, id) in clients {
        acknowledged.spawn(async move {
            client.expect_pubacks(1..=IN_FLIGHT).await;
            client.ping().await;
            id
        });
    }
    let bodies: Vec<String> = (1..=IN_FLIGHT).map(|number| number.to_string()).collect();
    for id in acknowledged.join_all().await {
        only_these_arrive(&lab, &id, &bodies).await;
    }

    // What a SUBACK promised while it could not be written is written now.
    lab.kill("edge1").await.expect("the hub is killed");
    lab.start("edge1").await.expect("the hub starts");
    for id in ["leaf1", "leaf10", "late", "edge1/m"] {
        let (_, present) = door.resumed(&Hello::of(&lab, id)).await;
        assert!(present, "the session of {id}");
    }
    lab.shutdown().await.expect("the lab ends");
}

/// Puts messages in flight and lives on until they may be committed.
async fn wait_for_commit(
    mut client: MqttClient,
    id: String,
    until: Instant,
) -> (MqttClient, String) {
    let topic = telemetry(&id);
    let one = |number: u16| {
        publish(
            &topic,
            QoS::AtLeastOnce,
            number,
            number.to_string().as_bytes(),
        )
    };
    client
        .send(&(1..=IN_FLIGHT).flat_map(one).collect::<Vec<_>>())
        .await;
    let own = format!("devices/{id}/messages/devicebound/#");
    let filters = [(own.as_str(), 1), ("$iothub/methods/POST/#", 0)];
    let codes = soon("SUBACK", client.subscribe(1, &filters)).await;
    assert_eq!(codes, [1, 0], "{id}");
    soon(
        "UNSUBACK",
        client.unsubscribe(2, &["$iothub/methods/POST/#"]),
    )
    .await;
    let mut next = Instant::now();
    while next < until {
        soon("PINGRESP", client.ping()).await;
        next += PING_EVERY;
        sleep_until(next.min(until)).await;
    }
    (client, id)
}

/// Connects, subscribes, and does it again: the session is there.
async fn come_and_go(lab: &Lab, door: &Door, id: &str, filter: &str) {
    let hello = Hello::of(lab, id);
    let (mut client, present) = soon("CONNACK", door.resumed(&hello)).await;
    assert!(!present, "{id}");
    assert_eq!(
        soon("SUBACK", client.subscribe(1, &[(filter, 1)])).await,
        [1],
        "{id}"
    );
    soon("the close", client.disconnect()).await;
    let (mut client, present) = soon("CONNACK", door.resumed(&hello)).await;
    assert!(present, "{id}: what SUBACK said counts, committed or not");
    soon("PINGRESP", client.ping()).await;
}

async fn soon<T>(what: &str, answer: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let answer = answer.await;
    let took = begun.elapsed();
    assert!(took < SOON, "{what} took {took:?}");
    answer
}
