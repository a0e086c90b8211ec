//! Acceptance 4 of the MQTT side: modules in the loop, and nothing is lost.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use std::collections::HashMap;
use std::time::Duration;

use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::mqtt::{Door, Hello, MqttClient, puback, subscribe};
use edgehub_tests::packets::publish;
use mqttbytes::QoS;
use mqttbytes::v4::{ConnectReturnCode, Packet};
use tokio::task::JoinHandle;
use tokio::time::sleep;

const MESSAGES: u64 = 20_000;
const PATIENCE: Duration = Duration::from_secs(300);
/// Between attempts of a module to connect.
const RETRY: Duration = Duration::from_millis(100);

/// A module that sends on what comes to it, and acknowledges it when that is acknowledged.
struct Worker {
    door: Door,
    hello: Hello,
    /// What modules sent is only acknowledged: of a pattern that fits everybody, the leaf's.
    leaf_only: bool,
}

impl Worker {
    fn start(lab: &Lab, module: &str, leaf_only: bool) -> JoinHandle<()> {
        let worker = Self {
            door: Door::of(lab, "edge2"),
            hello: Hello::of(lab, &format!("edge2/{module}")).keep_alive(10),
            leaf_only,
        };
        tokio::spawn(async move {
            loop {
                if let Ok(client) = worker.door.try_open().await {
                    // The end of a connection is no news: hubs are killed.
                    let _ = worker.work(client).await;
                }
                sleep(RETRY).await;
            }
        })
    }

    /// One connection.
    async fn work(&self, mut client: MqttClient) -> std::io::Result<()> {
        let id = &self.hello.client_id;
        let (device, module) = id.split_once('/').expect("a module");
        let output = format!("devices/{device}/modules/{module}/messages/events/%24.on=out1");
        let filter = format!("devices/{device}/modules/{module}/inputs/#");
        client.try_send(&self.hello.packet()).await?;
        match client.receive().await {
            Some(Packet::ConnAck(ack)) if ack.code == ConnectReturnCode::Success => {}
            _ => return Ok(()),
        }
        client.try_send(&subscribe(1, &filter)).await?;
        // The packet ids of inputs by those of outputs.
        let mut waiting = HashMap::new();
        let mut last = 1;
        while let Some(packet) = client.receive().await {
            match packet {
                Packet::Publish(input) if self.leaf_only && input.topic.contains("%24.cmid=") => {
                    client.try_send(&puback(input.pkid)).await?;
                }
                Packet::Publish(input) => {
                    last = if last == u16::MAX { 2 } else { last + 1 };
                    waiting.insert(last, input.pkid);
                    let onward = publish(&output, QoS::AtLeastOnce, last, &input.payload);
                    client.try_send(&onward).await?;
                }
                Packet::PubAck(ack) => {
                    let input = waiting.remove(&ack.pkid).expect("one of its messages");
                    client.try_send(&puback(input)).await?;
                }
                Packet::SubAck(_) => {}
                other => unreachable!("{other:?} for a module"),
            }
        }
        Ok(())
    }
}

/// A leaf's messages go through module A and module B to the top, while their hub, its parent and
/// the modules themselves are killed: all that the leaf saw acknowledged arrives as B's, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_4_what_goes_through_two_modules_is_neither_lost_nor_overtaken() {
    let lab = LabBuilder::new()
        .layers(2)
        .leaf("leaf1", "edge2")
        .module("edge2", "a")
        .module("edge2", "b")
        .env(
            "edge2",
            "routes__upstream",
            "FROM /messages/modules/b/* INTO $upstream",
        )
        .env(
            "edge2",
            "routes__a",
            "FROM /messages/* INTO BrokeredEndpoint(\"/modules/a/inputs/in1\")",
        )
        .env(
            "edge2",
            "routes__b",
            "FROM /messages/modules/a/outputs/* INTO BrokeredEndpoint(\"/modules/b/inputs/in1\")",
        )
        .start()
        .await
        .expect("the lab starts");
    let mut a = Worker::start(&lab, "a", true);
    let mut b = Worker::start(&lab, "b", false);
    let connection = lab
        .connection_string("leaf1", Some("edge2"))
        .expect("a leaf");
    let port = lab.host("edge2").expect("the host").ports.mqtts;
    let mut options = SenderOptions::new(connection, lab.ca_file(), port);
    options.count = Some(MESSAGES);
    let leaf = MqttSender::start(options).expect("a sender starts");

    for (step, victim) in ["edge2", "a", "edge1", "edge2", "b"].iter().enumerate() {
        let wanted = MESSAGES * (step as u64 + 1) / 8;
        arrived(&lab, wanted).await;
        match *victim {
            "a" => {
                a.abort();
                a = Worker::start(&lab, "a", true);
            }
            "b" => {
                b.abort();
                b = Worker::start(&lab, "b", false);
            }
            host => {
                lab.kill(host).await.expect("it is killed");
                lab.start(host).await.expect("it starts again");
            }
        }
        println!("{victim} was killed after {wanted} messages");
    }
    leaf.wait_finished(PATIENCE).await.expect("the leaf sends");
    let (_, log) = leaf.finish(PATIENCE).await.expect("the leaf ends");
    assert_eq!(log.len() as u64, MESSAGES);
    let logs = [("edge2/b".to_owned(), log)];
    let verdict = lab.ledger().settle(PATIENCE, &logs).await;
    let verdict = verdict.expect("the ledger is readable");
    println!("{verdict}");
    assert!(verdict.passed(), "{verdict}");
    a.abort();
    b.abort();
    lab.shutdown().await.expect("the lab ends");
}

/// Waits for this many of B's messages.
async fn arrived(lab: &Lab, count: u64) {
    let ledger = lab.ledger();
    let there = ledger.wait_until(PATIENCE, |arrivals| arrivals.len() as u64 >= count);
    there.await.expect("messages arrive");
}
