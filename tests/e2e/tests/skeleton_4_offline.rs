//! Acceptance 4 of the walking skeleton: hubs work without the cloud from the start.

#![allow(clippy::expect_used, reason = "these are the tests")]

use std::time::Duration;

use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{Acknowledged, AtStart, HUB, Lab, LabBuilder};

const PATIENCE: Duration = Duration::from_secs(120);
/// Messages of each sender while there is no cloud.
const MESSAGES: u64 = 300;

fn hierarchy(state: &std::path::Path) -> LabBuilder {
    LabBuilder::new()
        .layers(3)
        .leaf("leaf1", "edge3")
        .module("edge2", "modB")
        .module("edge1", "modC")
        .state_dir(state)
}

/// Three hubs learn their scope once. Then everything is stopped and started again without the
/// emulator: the hubs authenticate their children from what they stored and accept messages;
/// nothing reaches the hub meanwhile, and everything arrives in order once it is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_4_children_are_served_although_the_cloud_was_never_there() {
    let state = tempfile::tempdir().expect("a folder");
    let first = hierarchy(state.path())
        .start()
        .await
        .expect("the lab starts");
    first.shutdown().await.expect("the lab ends");

    let lab = hierarchy(state.path())
        .at_start(HUB, AtStart::Off)
        .start()
        .await
        .expect("the hubs become ready without the emulator");
    let mut logs = Vec::new();
    for id in ["leaf1", "edge2/modB", "edge1/modC"] {
        logs.push(send(&lab, id).await);
    }
    assert_eq!(
        lab.ledger().count().expect("the ledger"),
        0,
        "nothing can have arrived"
    );
    for (id, log) in &logs {
        assert_eq!(log.len() as u64, MESSAGES, "{id}");
    }

    lab.start(HUB).await.expect("the emulator starts");
    let verdict = lab
        .ledger()
        .settle(PATIENCE, &logs)
        .await
        .expect("the ledger is readable");
    println!("{verdict}");
    assert!(verdict.passed(), "{verdict}");
    assert_eq!(verdict.acknowledged, 3 * MESSAGES);
    lab.shutdown().await.expect("the lab ends");
}

async fn send(lab: &Lab, id: &str) -> (String, Vec<Acknowledged>) {
    let identities = lab.identities().expect("identities");
    let identity = identities
        .iter()
        .find(|identity| identity.id == id)
        .expect("the identity");
    let text = &identity.connection_string;
    let connection = edgehub_lab::ConnectionString::parse(text).expect("a string");
    let port = lab.host(&identity.parent).expect("its host").ports.mqtts;
    let mut options = SenderOptions::new(connection, lab.ca_file(), port);
    options.count = Some(MESSAGES);
    let sender = MqttSender::start(options).expect("a sender starts");
    sender
        .wait_finished(PATIENCE)
        .await
        .expect("all messages are acknowledged");
    assert_eq!(sender.connects(), 1, "{id}: {:?}", sender.last_error());
    sender.finish(PATIENCE).await.expect("the sender ends")
}
