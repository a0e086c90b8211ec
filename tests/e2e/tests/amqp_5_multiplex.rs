//! Acceptance 5 of AMQP, second part: identities that share one upstream connection do not wait
//! for each other.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use std::time::Duration;

use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::amqp::{Amqp, Link, Message, Transfer, code, frame};
use edgehub_tests::registry;
use edgehub_tests::service::Service;
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

const IDENTITIES: usize = 500;
/// Of each of the 497.
const MESSAGES: u64 = 20;
/// In an administrator's hands.
const DISABLED: &str = "leaf1";
/// Over its share.
const THROTTLED: &str = "leaf2";
/// Has sent what the IoT Hub never takes.
const POISONED: &str = "leaf3";
/// Which of the messages of [`POISONED`], from 1 on.
const POISON: u32 = 5;
const OF_POISONED: u32 = 10;
/// For each phase: two cores, debug builds.
const PATIENCE: Duration = Duration::from_secs(120);

/// 500 leaves over one upstream connection. The IoT Hub disables one, throttles another, and a
/// third sends a message that it will never take. All messages of the other 497 arrive while the
/// throttle stands; the third loses that message and no other, and the throttled one nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_5_one_of_500_that_is_disabled_throttled_or_poisoned_holds_nobody_up() {
    let lab = LabBuilder::new()
        .layers(1)
        .upstream("Amqp")
        .leaves(IDENTITIES, "edge1")
        .env("edge1", "MaxConnectedClients", "1000")
        .start()
        .await
        .expect("the lab starts");
    let service = Service::of(&lab);
    let order = json!({
        "kind": "transfer",
        "client_id": THROTTLED,
        "standing": true,
        "code": 429,
        "condition": "com.microsoft:device-container-throttled",
    });
    let ordered = lab.control("POST", "/faults", Some(&order)).await;
    ordered.expect("the throttle");
    let poison = String::from_utf8(body(POISON)).expect("text");
    let order = json!({
        "kind": "transfer",
        "client_id": POISONED,
        "standing": true,
        "code": 400,
        "containing": poison,
    });
    let ordered = lab.control("POST", "/faults", Some(&order)).await;
    ordered.expect("the poison");

    let disabled = sender(&lab, DISABLED, None);
    wait_until("the one to be disabled sends", || {
        arrived(&lab, DISABLED).len() >= 5
    })
    .await;
    let started = Instant::now();
    let throttled = sender(&lab, THROTTLED, Some(MESSAGES));
    registry::set_status(&lab, DISABLED, "disabled").await;
    let before = arrived(&lab, DISABLED).len();
    let others: Vec<MqttSender> = (4..=IDENTITIES)
        .map(|number| sender(&lab, &format!("leaf{number}"), Some(MESSAGES)))
        .collect();
    send_poison(&lab).await;
    let mut logs = Vec::new();
    for other in others {
        logs.push(other.finish_all().await);
    }
    println!("everything is taken after {:.1?}", started.elapsed());
    let verdict = lab.ledger().settle(PATIENCE, &logs).await;
    let verdict = verdict.expect("the ledger is readable");
    println!("{verdict} after {:.1?}", started.elapsed());
    assert!(verdict.passed(), "{verdict}");
    assert_eq!(verdict.acknowledged, MESSAGES * (IDENTITIES as u64 - 3));

    // The throttle stands, and has let nothing through.
    let faults = lab.control("GET", "/faults", None).await.expect("faults");
    assert_eq!(faults.as_array().map(Vec::len), Some(2), "{faults}");
    assert_eq!(arrived(&lab, THROTTLED), Vec::<Vec<u8>>::new());
    assert_eq!(
        arrived(&lab, DISABLED).len(),
        before,
        "after it was disabled"
    );

    // Of the poisoned one everything but the poison.
    let wanted: Vec<_> = (1..=OF_POISONED)
        .filter(|number| *number != POISON)
        .map(body)
        .collect();
    wait_until("the last of the poisoned one arrives", || {
        arrived(&lab, POISONED).last() == wanted.last()
    })
    .await;
    assert_eq!(arrived(&lab, POISONED), wanted);
    let metrics = lab.metrics("edge1").await.expect("metrics");
    let rejected = [("reason", "rejected")];
    let dropped = metrics.sum("edgehub_messages_dropped_total", &rejected);
    assert!((dropped - 1.0).abs() < 0.1, "{dropped} dropped");

    let counters = lab.control("GET", "/counters", None).await;
    println!("{}", counters.expect("counters"));
    assert_eq!(service.counter("amqp_handshakes").await, 1);

    // Nothing of the throttled one is lost.
    lab.control("DELETE", "/faults", None)
        .await
        .expect("the throttle ends");
    let log = [throttled.finish_all().await];
    let verdict = lab.ledger().settle(PATIENCE, &log).await;
    let verdict = verdict.expect("the ledger is readable");
    println!("throttled: {verdict}");
    assert!(verdict.passed(), "{verdict}");
    assert_eq!(verdict.acknowledged, MESSAGES);
    assert_eq!(service.counter("amqp_handshakes").await, 1);
    drop(disabled);
    lab.shutdown().await.expect("the lab ends");
}

trait FinishAll {
    /// Its log, when it has sent all of it.
    async fn finish_all(self) -> (String, Vec<edgehub_lab::Acknowledged>);
}

impl FinishAll for MqttSender {
    async fn finish_all(self) -> (String, Vec<edgehub_lab::Acknowledged>) {
        self.wait_finished(PATIENCE).await.expect("all is taken");
        self.finish(PATIENCE).await.expect("a sender ends")
    }
}

fn sender(lab: &Lab, id: &str, count: Option<u64>) -> MqttSender {
    let connection = lab.connection_string(id, Some("edge1"));
    let port = lab.host("edge1").expect("the host").ports.mqtts;
    let connection = connection.expect("a connection string");
    let mut options = SenderOptions::new(connection, lab.ca_file(), port);
    options.interval = Duration::from_millis(100);
    options.count = count;
    MqttSender::start(options).expect("a sender starts")
}

/// All in one write, so that they go up in batches.
async fn send_poison(lab: &Lab) {
    let mut client = Amqp::session(lab, "edge1").await;
    client.cbs().await;
    client.authenticate(lab, POISONED, 0).await;
    let address = format!("/devices/{POISONED}/messages/events");
    client.attach(&Link::sender(0, &address)).await;
    let mut bytes = Vec::new();
    for number in 1..=OF_POISONED {
        let message = Message::of(&body(number));
        let transfer = Transfer {
            id: number,
            ..Transfer::default()
        };
        bytes.extend(frame(0, &transfer.with(&message.encode())));
    }
    client.send(&bytes).await;
    let mut accepted = 0;
    while accepted < u64::from(OF_POISONED) {
        let settled = client.expect(code::DISPOSITION).await;
        assert_eq!(settled.outcome(), Some(code::ACCEPTED), "{settled:?}");
        let first = settled.number(1).expect("the first");
        accepted += settled.number(2).unwrap_or(first) - first + 1;
    }
}

fn body(number: u32) -> Vec<u8> {
    json!({"sender": POISONED, "sequence": number})
        .to_string()
        .into_bytes()
}

/// Bodies at the IoT Hub.
fn arrived(lab: &Lab, id: &str) -> Vec<Vec<u8>> {
    let entries = lab.ledger().entries_of(id);
    let entries = entries.expect("the ledger is readable");
    let bodies = entries.iter().map(|entry| entry.body().expect("a body"));
    bodies.collect()
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let poll = async {
        while !condition() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    let done = timeout(PATIENCE, poll).await;
    assert!(done.is_ok(), "not within {PATIENCE:?}: {what}");
}
