//! Acceptance 5 of the walking skeleton: a backlog costs disk, not memory.

use std::time::Duration;

use edgehub_lab::LabBuilder;
use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};

const PATIENCE: Duration = Duration::from_secs(600);
const SENDERS: u64 = 4;
const MESSAGES: u64 = 200_000;
/// Where memory is measured first.
const EARLY: u64 = 20_000;
/// What it may grow by from there, bytes.
const GROWTH_MAX: u64 = 20 * 1000 * 1000;

/// The link of a bottom hub to its parent is cut. It accepts 200,000 messages of 1 KiB: all are
/// acknowledged before the link returns, no connection is closed, and its memory grows by less
/// than 20 MB after the first 20,000. Then the link returns and all arrive in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_5_a_backlog_of_200_000_messages_costs_disk_and_not_memory() {
    let lab = LabBuilder::new()
        .layers(2)
        .leaves(4, "edge2")
        .start()
        .await
        .expect("the lab starts");
    lab.cut("edge2", "edge1").await.expect("the link is cut");

    let port = lab.host("edge2").expect("the host").ports.mqtts;
    let senders: Vec<MqttSender> = lab
        .identities()
        .expect("identities")
        .iter()
        .map(|identity| {
            let text = &identity.connection_string;
            let connection = edgehub_lab::ConnectionString::parse(text).expect("a string");
            let mut options = SenderOptions::new(connection, lab.ca_file(), port);
            options.body_bytes = 1024;
            options.window = 100;
            options.count = Some(MESSAGES / SENDERS);
            MqttSender::start(options).expect("a sender starts")
        })
        .collect();
    assert_eq!(senders.len() as u64, SENDERS);

    let acknowledged = || senders.iter().map(MqttSender::acknowledged).sum::<u64>();
    reach(EARLY, acknowledged).await;
    let early = lab.resident_bytes("edge2").expect("it runs");
    reach(MESSAGES, acknowledged).await;
    let late = lab.resident_bytes("edge2").expect("it runs");
    println!("resident: {early} bytes at {EARLY}, {late} bytes at {MESSAGES}");
    for sender in &senders {
        assert_eq!(
            sender.connects(),
            1,
            "{}: {:?}",
            sender.id(),
            sender.last_error()
        );
    }
    assert_eq!(
        lab.ledger().count().expect("the ledger"),
        0,
        "the link is still cut"
    );
    assert!(
        late.saturating_sub(early) < GROWTH_MAX,
        "{early} grew to {late}"
    );

    lab.heal("edge2", "edge1").expect("the link returns");
    let mut logs = Vec::new();
    for sender in senders {
        logs.push(sender.finish(PATIENCE).await.expect("a sender ends"));
    }
    let verdict = lab
        .ledger()
        .settle(PATIENCE, &logs)
        .await
        .expect("the ledger is readable");
    println!("{verdict}");
    assert!(verdict.passed(), "{verdict}");
    assert_eq!(verdict.acknowledged, MESSAGES);
    lab.shutdown().await.expect("the lab ends");
}

async fn reach(count: u64, acknowledged: impl Fn() -> u64) {
    let poll = async {
        while acknowledged() < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let done = tokio::time::timeout(PATIENCE, poll).await;
    assert!(
        done.is_ok(),
        "{} of {count} acknowledged after {PATIENCE:?}",
        acknowledged()
    );
}
