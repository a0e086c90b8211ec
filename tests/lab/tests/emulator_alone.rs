//! Relay, sender, ledger and verdict against the real emulator, without a hub in between: what the
//! end-to-end tests rely on works by itself.

#![allow(clippy::unwrap_used, reason = "these are the tests")]

use std::time::Duration;

use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{DeviceSpec, HUB, Lab, LabBuilder};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// The emulator, two devices and a module.
async fn lab() -> Lab {
    let with_module = DeviceSpec {
        modules: vec!["modA".to_owned()],
        ..DeviceSpec::new("leaf2", None)
    };
    LabBuilder::new()
        .device(DeviceSpec::new("leaf1", None))
        .device(with_module)
        .start()
        .await
        .unwrap()
}

fn options(lab: &Lab, id: &str) -> SenderOptions {
    let port = lab.host(HUB).unwrap().ports.mqtts;
    SenderOptions::new(
        lab.connection_string(id, None).unwrap(),
        lab.ca_file(),
        port,
    )
}

async fn until(what: &str, reached: impl Fn() -> bool) {
    let wait = async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, wait).await.is_ok(),
        "never: {what}"
    );
}

#[tokio::test]
async fn every_acknowledged_message_is_in_the_ledger_whatever_happens_to_the_hub() {
    let lab = lab().await;
    let senders = ["leaf1", "leaf2/modA"].map(|id| {
        MqttSender::start(SenderOptions {
            window: 16,
            ..options(&lab, id)
        })
        .unwrap()
    });
    let progress = || senders.iter().map(MqttSender::acknowledged).min().unwrap();
    until("first messages", || progress() > 50).await;

    lab.kill(HUB).await.unwrap();
    assert!(
        senders.iter().all(|sender| sender.in_flight() > 0),
        "the kill lands in traffic"
    );
    let before = progress();
    lab.start(HUB).await.unwrap();
    until("messages after the kill", || progress() > before + 50).await;

    lab.reset("client", HUB).await.unwrap();
    let before = progress();
    until("messages after the reset", || progress() > before + 50).await;

    lab.black_hole("client", HUB).await.unwrap();
    let silent = progress();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        progress() <= silent + 16,
        "at most what was under way arrives"
    );
    lab.heal("client", HUB).unwrap();
    until("messages after the black hole", || progress() > silent + 50).await;

    lab.pause(HUB).await.unwrap();
    lab.resume(HUB).await.unwrap();
    lab.control("DELETE", "/connections", None).await.unwrap();
    let before = progress();
    until("messages after the hub closed everything", || {
        progress() > before + 50
    })
    .await;

    let mut logs = Vec::new();
    for sender in senders {
        assert!(sender.connects() >= 3, "{:?}", sender.last_error());
        logs.push(sender.finish(PATIENCE).await.unwrap());
    }
    let verdict = lab.ledger().settle(PATIENCE, &logs).await.unwrap();
    assert!(verdict.passed(), "{verdict}");
    assert!(verdict.acknowledged > 400, "{verdict}");
    lab.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_sender_with_a_count_ends_and_the_ledger_has_its_messages_with_the_right_stamp() {
    let lab = lab().await;
    let log = lab.state_dir().join("leaf2-modA.jsonl");
    let sender = MqttSender::start(SenderOptions {
        count: Some(500),
        log: Some(log.clone()),
        ..options(&lab, "leaf2/modA")
    });
    let sender = sender.unwrap();
    sender.wait_finished(PATIENCE).await.unwrap();
    let (id, acknowledged) = sender.finish(PATIENCE).await.unwrap();
    assert_eq!(acknowledged.len(), 500);
    assert_eq!(edgehub_lab::SenderLog::read(&log).unwrap(), acknowledged);
    let entries = lab.ledger().entries_of(&id).unwrap();
    assert_eq!(entries.len(), 500);
    assert_eq!(
        entries[0].system["iothub-connection-module-id"].as_deref(),
        Some("modA")
    );
    assert_eq!(
        entries[0].properties["sender"].as_deref(),
        Some("edgehub-lab")
    );
    let verdict = lab.ledger().judge(&[(id, acknowledged)]).unwrap();
    let text = "PASS: 500 acknowledged, 500 at the hub, 0 lost, 0 out of order, 0 duplicates";
    assert_eq!(verdict.to_string(), text);
}

#[tokio::test]
async fn a_refused_connection_is_seen_and_tried_again() {
    let lab = lab().await;
    let order = json!({ "kind": "connect", "count": 2 });
    lab.control("POST", "/faults", Some(&order)).await.unwrap();
    let sender = MqttSender::start(SenderOptions {
        count: Some(3),
        ..options(&lab, "leaf1")
    })
    .unwrap();
    sender.wait_finished(PATIENCE).await.unwrap();
    assert_eq!(sender.connects(), 1);
    assert!(
        sender.last_error().unwrap().contains("CONNACK"),
        "{:?}",
        sender.last_error()
    );
}
