//! What tests ask of a lab, asked of one with real hubs: faults inside a hub, cut links, and a
//! second life of the same stores while the IoT Hub is away.

#![allow(clippy::unwrap_used, reason = "these are the tests")]

use std::time::Duration;

use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::network::Ports;
use edgehub_lab::{AtStart, HUB, Lab, LabBuilder, StorageSync};

const PATIENCE: Duration = Duration::from_secs(60);

fn sender(lab: &Lab, count: Option<u64>) -> MqttSender {
    let string = lab.connection_string("leaf1", Some("edge2")).unwrap();
    let port = lab.host("edge2").unwrap().ports.mqtts;
    let options = SenderOptions::new(string, lab.ca_file(), port);
    MqttSender::start(SenderOptions {
        count,
        window: 20,
        ..options
    })
    .unwrap()
}

async fn until(what: &str, reached: impl AsyncFn() -> bool) {
    let wait = async {
        while !reached().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, wait).await.is_ok(),
        "never: {what}"
    );
}

#[tokio::test]
async fn hubs_are_disturbed_from_inside_and_outside_and_live_a_second_time() {
    let folder = tempfile::tempdir().unwrap();
    let describe = || {
        LabBuilder::new()
            .state_dir(folder.path())
            .layers(2)
            .leaf("leaf1", "edge2")
            .storage_sync("edge2", StorageSync::Disk)
            .env("edge1", "RuntimeLogLevel", "debug")
    };
    let lab = describe().start().await.unwrap();
    assert!(lab.resident_bytes("edge2").unwrap() > 1_000_000);
    let running = sender(&lab, None);
    until("first messages", async || running.acknowledged() > 100).await;

    // A commit that does not come holds every acknowledgement back.
    lab.faults("edge2", "hold-commits").await.unwrap();
    until("a full window", async || running.in_flight() == 20).await;
    let held = running.acknowledged();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(running.acknowledged() <= held + 20);
    lab.faults("edge2", "release-commits").await.unwrap();
    until("messages after the hold", async || {
        running.acknowledged() > held + 100
    })
    .await;
    let refused = lab
        .faults("edge2", "no-such-command")
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("error"), "{refused}");

    // Cut off, the lower hub keeps what it accepts.
    lab.cut("edge2", "edge1").await.unwrap();
    let queued = async || {
        lab.metrics("edge2")
            .await
            .unwrap()
            .sum("edgehub_queue_length", &[])
    };
    until("a queue", async || queued().await > 500.0).await;
    assert_eq!(lab.connections("edge2", "edge1").unwrap(), 0);
    let (id, first_life) = running.finish(PATIENCE).await.unwrap();
    let name = lab.host("edge2").unwrap().hostname.clone();
    lab.shutdown().await.unwrap();

    // The same stores again, without an IoT Hub: children are known and served.
    let lab = describe()
        .at_start(HUB, AtStart::Off)
        .start()
        .await
        .unwrap();
    assert_eq!(lab.host("edge2").unwrap().hostname, name);
    for edge in lab.edges() {
        let stores = std::fs::read_dir(edge.storage.as_ref().unwrap()).unwrap();
        let stores: Vec<_> = stores.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(stores, ["edgeHub"], "{}'s store was not opened", edge.name);
    }
    let again = sender(&lab, Some(300));
    again.wait_finished(PATIENCE).await.unwrap();
    // This sender counts from 1 again, so its bodies are those of the first life.
    let (_, second_life) = again.finish(PATIENCE).await.unwrap();
    assert_eq!(second_life.len(), 300);
    assert_eq!(second_life, first_life[..300]);
    lab.start(HUB).await.unwrap();
    let verdict = lab
        .ledger()
        .settle(PATIENCE, &[(id, first_life.clone())])
        .await
        .unwrap();
    assert!(verdict.passed(), "{verdict}");
    let both = u64::try_from(first_life.len() + 300).unwrap();
    until("the second life's messages", async || {
        lab.ledger().count().unwrap() >= both
    })
    .await;
    lab.shutdown().await.unwrap();
}

/// What a user without root gets: no `/etc/hosts`, no port 443.
#[tokio::test]
async fn addresses_do_as_names_and_unprivileged_ports_as_ports() {
    let lab = LabBuilder::new()
        .layers(2)
        .leaf("leaf1", "edge2")
        .host_names(false)
        .ports(Ports::UNPRIVILEGED)
        .start()
        .await
        .unwrap();
    let json = lab.lab_json().unwrap();
    assert_eq!(json.layers[1].https, Some(8443));
    assert_eq!(json.layers[1].hostname, json.layers[1].address.to_string());
    let sender = sender(&lab, Some(50));
    sender.wait_finished(PATIENCE).await.unwrap();
    let logs = [sender.finish(PATIENCE).await.unwrap()];
    let verdict = lab.ledger().settle(PATIENCE, &logs).await.unwrap();
    assert!(verdict.passed(), "{verdict}");
}
