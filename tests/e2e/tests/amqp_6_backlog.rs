//! Acceptance 6 of AMQP: what an outage has queued arrives whole, in order, and soon.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use std::time::Duration;

use edgehub_lab::ledger::Tail;
use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{HUB, Lab, LabBuilder};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long the link to the IoT Hub is down.
const OUTAGE: Duration = Duration::from_secs(60);
const SENDERS: u32 = 50;
const MESSAGES: u32 = 100_000;
const BODY_BYTES: usize = 256;
/// For each phase.
const PATIENCE: Duration = Duration::from_secs(120);

/// The upstream link of a hub is cut for a minute, in which 50 senders queue 100,000 messages.
/// All of them arrive, those of each sender in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_6_a_backlog_of_100_000_messages_drains_in_order_over_amqp() {
    drain_over("Amqp").await;
}

/// The same upstream of MQTT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_6_a_backlog_of_100_000_messages_drains_in_order_over_mqtt() {
    drain_over("Mqtt").await;
}

/// `EDGEHUB_RTT_MS` adds a round trip between the hub and the IoT Hub.
async fn drain_over(protocol: &str) {
    let rtt = std::env::var("EDGEHUB_RTT_MS").ok();
    let rtt_ms: u64 = rtt.map_or(0, |text| text.parse().expect("milliseconds"));
    let leaves = usize::try_from(SENDERS).expect("few");
    let lab = LabBuilder::new()
        .layers(1)
        .upstream(protocol)
        .leaves(leaves, "edge1")
        .start()
        .await
        .expect("the lab starts");
    // Under names of its own, so that the end of the outage does not take it back.
    let each_way = Duration::from_millis(rtt_ms) / 2;
    lab.delay("*", HUB, each_way).expect("a delay");

    lab.cut("edge1", HUB).await.expect("the link is cut");
    let back_at = Instant::now() + OUTAGE;
    let started = Instant::now();
    let senders = start_senders(&lab);
    let mut logs = Vec::new();
    for sender in senders {
        let in_time = sender.wait_finished(PATIENCE).await;
        in_time.expect("everything is taken while the link is cut");
        let log = sender.finish(PATIENCE).await;
        logs.push(log.expect("a sender ends"));
    }
    let taken = started.elapsed();
    let mut arrivals = Arrivals::of(&lab);
    assert_eq!(arrivals.count(), 0, "the link is cut");
    // A wait for time itself: the rest of the outage.
    sleep_until(back_at).await;

    lab.heal("edge1", HUB).expect("the link returns");
    let back = Instant::now();
    arrivals.reach(1).await;
    let first = back.elapsed();
    arrivals.reach(MESSAGES.into()).await;
    let all = back.elapsed();
    let drain = all.saturating_sub(first);
    println!(
        "{protocol}, {rtt_ms} ms added: {MESSAGES} taken in {taken:.1?}; the first arrived \
         {first:.1?} after the link's return, the rest in {drain:.1?}: {:.0} messages/s",
        f64::from(MESSAGES) / drain.as_secs_f64()
    );
    let verdict = lab.ledger().settle(PATIENCE, &logs).await;
    let verdict = verdict.expect("the ledger is readable");
    println!("{verdict}");
    assert!(verdict.passed(), "{verdict}");
    assert_eq!(verdict.acknowledged, u64::from(MESSAGES));
    lab.shutdown().await.expect("the lab ends");
}

fn start_senders(lab: &Lab) -> Vec<MqttSender> {
    let port = lab.host("edge1").expect("the host").ports.mqtts;
    let identities = lab.identities().expect("identities");
    let senders = identities.iter().map(|identity| {
        let text = &identity.connection_string;
        let connection = edgehub_lab::ConnectionString::parse(text).expect("a string");
        let mut options = SenderOptions::new(connection, lab.ca_file(), port);
        options.body_bytes = BODY_BYTES;
        options.count = Some(u64::from(MESSAGES / SENDERS));
        MqttSender::start(options).expect("a sender starts")
    });
    senders.collect()
}

/// Counts what is in the ledger, reading each entry once.
struct Arrivals {
    tail: Tail,
    count: u64,
}

impl Arrivals {
    fn of(lab: &Lab) -> Self {
        Self {
            tail: Tail::of(&lab.ledger()),
            count: 0,
        }
    }

    fn count(&mut self) -> u64 {
        self.count += self.tail.count_new().expect("the ledger is readable");
        self.count
    }

    async fn reach(&mut self, wanted: u64) {
        let poll = async {
            while self.count() < wanted {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let done = timeout(PATIENCE, poll).await;
        let count = self.count;
        assert!(
            done.is_ok(),
            "{count} of {wanted} at the IoT Hub after {PATIENCE:?}"
        );
    }
}
