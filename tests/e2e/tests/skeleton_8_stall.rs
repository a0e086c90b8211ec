//! Acceptance 8 of the walking skeleton: acknowledgements that wait for a slow store hold nobody
//! up and turn nothing round.
//!
//! An MQTT server whose publish path waits for each commit by itself stalls, closes or reorders
//! under just this load: many publishes in flight on each connection, bodies of some KiB, commits
//! that take now 150 us and now 50 ms.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use std::collections::VecDeque;
use std::time::Duration;

use edgehub_lab::metrics::Metrics;
use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::mqtt::{Door, Hello, MqttClient, ping, publish, subscribe, telemetry};
use edgehub_tests::only_these_arrive;
use mqttbytes::QoS;
use mqttbytes::v4::{Packet, SubscribeReasonCode};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How long each load lasts.
const LOAD: Duration = Duration::from_secs(10);
/// Connections of a load.
const CONNECTIONS: usize = 10;
/// Between two PINGREQs of a connection.
const PING_EVERY: Duration = Duration::from_millis(100);
/// A hundred times the slowest commit: a connection that waits longer for an answer stands still.
const STALL: Duration = Duration::from_secs(5);

/// What each connection does.
#[derive(Clone, Copy)]
struct Load {
    window: usize,
    body_bytes: usize,
}

/// What one connection saw.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    acknowledged: u64,
    pings: u64,
    longest_ack: Duration,
    longest_ping: Duration,
}

/// 10 connections keep 16 publishes of 4 KiB in flight while commits take 150 us to 50 ms, and
/// send PINGREQ in between. For 10 s no connection is closed, none stands still, and every
/// acknowledgement comes in its turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_8_sixteen_times_4_kib_in_flight_do_not_stall() {
    let load = Load {
        window: 16,
        body_bytes: 4096,
    };
    let lab = lab().await;
    let (seen, before, after) = run(&lab, load).await;
    report(&seen, &before, &after);
    lab.shutdown().await.expect("the lab ends");
}

/// The same with 50 publishes of 1 KiB in flight. Commits and socket writes are shared: the store
/// commits less than once for 8 messages, and less than one write carries 4 acknowledgements.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_8_fifty_times_1_kib_in_flight_share_commits_and_writes() {
    let load = Load {
        window: 50,
        body_bytes: 1024,
    };
    let lab = lab().await;
    let (seen, before, after) = run(&lab, load).await;
    let messages = report(&seen, &before, &after);
    let delta = |name| after.sum(name, &[]) - before.sum(name, &[]);
    let commits = delta("edgehub_store_commits_total");
    assert!(commits > 0.0, "commits are counted");
    assert!(commits < messages / 8.0, "{commits} commits");
    let acks = delta("edgehub_pubacks_total");
    assert_eq!(acks, messages, "each PUBACK is counted");
    let writes = delta("edgehub_puback_writes_total");
    assert!(writes > 0.0, "writes are counted");
    assert!(writes < acks / 4.0, "{writes} writes for {acks} PUBACKs");
    lab.shutdown().await.expect("the lab ends");
}

/// While the store holds a commit, a connection whose publishes wait for it still gets PINGRESP
/// and SUBACK at once, other clients are let in, and nothing is acknowledged. When the commit
/// happens all acknowledgements come, in order, also that of a message which needed no commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_8_pingresp_does_not_wait_for_a_commit_that_is_held() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let mut client = door.admitted(&Hello::of(&lab, "leaf1")).await;
    client.publish(&telemetry("leaf1"), "0", 1).await;
    let acks_before = pubacks(&lab).await;

    lab.faults("edge1", "hold-commits")
        .await
        .expect("the hub obeys");
    client.send(&numbered(1..=20)).await;
    client
        .send(&publish("foo/bar", QoS::AtLeastOnce, 100, b"dropped"))
        .await;
    client.send(&ping()).await;
    assert_eq!(client.next().await, Some(Packet::PingResp));
    client.send(&numbered(21..=40)).await;
    client
        .send(&subscribe(7, "devices/leaf1/messages/devicebound/#"))
        .await;
    match client.next().await {
        Some(Packet::SubAck(ack)) => {
            assert_eq!(
                (ack.pkid, ack.return_codes),
                (7, vec![SubscribeReasonCode::Success(QoS::AtLeastOnce)])
            );
        }
        other => panic!("{other:?} instead of SUBACK"),
    }
    let mut other = door.admitted(&Hello::of(&lab, "leaf2")).await;
    for waiting in [&mut client, &mut other] {
        waiting.send(&ping()).await;
        assert_eq!(waiting.next().await, Some(Packet::PingResp));
    }
    // The hub has taken all of it, and has acknowledged none of it.
    let metrics = lab.metrics("edge1").await.expect("metrics");
    assert_eq!(
        metrics.sum("edgehub_messages_received_total", &[("id", "leaf1")]),
        41.0
    );
    assert_eq!(pubacks(&lab).await, acks_before);

    lab.faults("edge1", "release-commits")
        .await
        .expect("the hub obeys");
    client
        .expect_pubacks((1..=20).chain([100]).chain(21..=40))
        .await;
    let bodies: Vec<String> = (0..=40).map(|number: u16| number.to_string()).collect();
    only_these_arrive(&lab, "leaf1", &bodies).await;
    lab.shutdown().await.expect("the lab ends");
}

/// The load itself: it notices a hub that stops to acknowledge although it still answers PINGREQ,
/// and one that closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_8_the_load_notices_a_standstill_and_a_close() {
    let load = Load {
        window: 16,
        body_bytes: 1024,
    };
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    for (fault, noticed) in [
        ("hold", "leaf1 stands still: 16 in flight"),
        ("kill", "the hub closed leaf1"),
    ] {
        let client = door.admitted(&Hello::of(&lab, "leaf1")).await;
        let driver = tokio::spawn(drive(
            client,
            "leaf1".to_owned(),
            load,
            Instant::now() + LOAD,
        ));
        match fault {
            "hold" => lab
                .faults("edge1", "hold-commits")
                .await
                .expect("the hub obeys"),
            _ => lab.kill("edge1").await.expect("the hub is killed"),
        }
        let panic = driver.await.expect_err("the load goes on").into_panic();
        let text = panic.downcast::<String>().expect("a text");
        assert!(text.contains(noticed), "{text}");
        if fault == "hold" {
            lab.faults("edge1", "release-commits")
                .await
                .expect("the hub obeys");
        }
    }
}

async fn lab() -> Lab {
    let lab = LabBuilder::new().layers(1).leaves(CONNECTIONS, "edge1");
    lab.start().await.expect("the lab starts")
}

async fn pubacks(lab: &Lab) -> f64 {
    let metrics = lab.metrics("edge1").await.expect("metrics");
    metrics.sum("edgehub_pubacks_total", &[])
}

/// Publishes of leaf1 whose packet ids and bodies are these numbers, for one write.
fn numbered(numbers: impl Iterator<Item = u16>) -> Vec<u8> {
    let topic = telemetry("leaf1");
    let one = |id: u16| publish(&topic, QoS::AtLeastOnce, id, id.to_string().as_bytes());
    numbers.flat_map(one).collect()
}

/// Runs a load on all connections; what they saw, and the hub's metrics around it.
async fn run(lab: &Lab, load: Load) -> (Vec<Seen>, Metrics, Metrics) {
    let delays = lab.faults("edge1", "delay-commits 150 50000").await;
    delays.expect("the hub obeys");
    let door = Door::of(lab, "edge1");
    let mut clients = Vec::new();
    for number in 1..=CONNECTIONS {
        let id = format!("leaf{number}");
        clients.push((door.admitted(&Hello::of(lab, &id)).await, id));
    }
    let before = lab.metrics("edge1").await.expect("metrics");
    let until = Instant::now() + LOAD;
    let drivers: JoinSet<Seen> = clients
        .into_iter()
        .map(|(client, id)| drive(client, id, load, until))
        .collect();
    let seen = drivers.join_all().await;
    (seen, before, lab.metrics("edge1").await.expect("metrics"))
}

/// Keeps the window of one connection full until the time is over, then waits for what is left.
/// Panics when the hub closes, stands still, or answers out of order.
async fn drive(mut client: MqttClient, id: String, load: Load, until: Instant) -> Seen {
    let topic = telemetry(&id);
    let body = vec![b'x'; load.body_bytes];
    let mut seen = Seen::default();
    let mut in_flight: VecDeque<(u16, Instant)> = VecDeque::new();
    let mut asked: Option<Instant> = None;
    let mut next_ping = Instant::now();
    let mut packet_id = 0_u16;
    loop {
        let now = Instant::now();
        let mut out = Vec::new();
        while now < until && in_flight.len() < load.window {
            packet_id = packet_id.checked_add(1).unwrap_or(1);
            out.extend(publish(&topic, QoS::AtLeastOnce, packet_id, &body));
            in_flight.push_back((packet_id, now));
        }
        if now < until && now >= next_ping && asked.is_none() {
            out.extend(ping());
            asked = Some(now);
            next_ping = now + PING_EVERY;
        }
        if !out.is_empty() {
            client.send(&out).await;
        }
        let oldest = in_flight
            .front()
            .map(|(_, sent)| *sent)
            .into_iter()
            .chain(asked)
            .min();
        let Some(oldest) = oldest else { return seen };
        tokio::select! {
            packet = client.receive() => {
                let first = packet.unwrap_or_else(|| panic!("the hub closed {id}"));
                let now = Instant::now();
                let mut arrived = Some(first);
                while let Some(packet) = arrived {
                    match packet {
                        Packet::PubAck(ack) => {
                            let (awaited, sent) = in_flight.pop_front().expect("one in flight");
                            assert_eq!(ack.pkid, awaited, "{id}: order of PUBACKs");
                            seen.acknowledged += 1;
                            seen.longest_ack = seen.longest_ack.max(now - sent);
                        }
                        Packet::PingResp => {
                            let sent = asked.take().expect("PINGRESP answers PINGREQ");
                            seen.pings += 1;
                            seen.longest_ping = seen.longest_ping.max(now - sent);
                        }
                        other => panic!("{id}: unexpected {other:?}"),
                    }
                    arrived = client.received();
                }
            }
            () = sleep_until(next_ping), if asked.is_none() && next_ping < until => {}
            () = sleep_until(oldest + STALL) => {
                panic!("{id} stands still: {} in flight, PINGREQ {asked:?}", in_flight.len());
            }
        }
    }
}

/// Prints what was seen, checks that every connection got on, and returns how many messages were
/// acknowledged.
fn report(seen: &[Seen], before: &Metrics, after: &Metrics) -> f64 {
    assert_eq!(seen.len(), CONNECTIONS);
    let messages: u64 = seen.iter().map(|seen| seen.acknowledged).sum();
    let fewest = seen
        .iter()
        .map(|seen| seen.acknowledged)
        .min()
        .unwrap_or_default();
    let fewest_pings = seen.iter().map(|seen| seen.pings).min().unwrap_or_default();
    let longest_ack = seen
        .iter()
        .map(|seen| seen.longest_ack)
        .max()
        .unwrap_or_default();
    let longest_ping = seen
        .iter()
        .map(|seen| seen.longest_ping)
        .max()
        .unwrap_or_default();
    println!(
        "{messages} acknowledged, {fewest} by the slowest connection; longest wait for PUBACK \
         {longest_ack:?}, for PINGRESP {longest_ping:?}; at least {fewest_pings} PINGRESP each"
    );
    let names = ["store_commits", "pubacks", "puback_writes"];
    for name in names.map(|name| format!("edgehub_{name}_total")) {
        println!("{name}: {}", after.sum(&name, &[]) - before.sum(&name, &[]));
    }
    // Ten a second were asked for; each window turns round at least once within the slowest
    // commits: far below what any working hub does, far above a standstill.
    assert!(fewest_pings >= 20, "only {fewest_pings} PINGRESP");
    assert!(
        fewest >= 200,
        "only {fewest} acknowledged on one connection"
    );
    messages as f64
}
