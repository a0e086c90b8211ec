//! Order and speed of what goes into the ledger.

use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mqttbytes::QoS;
use mqttbytes::v4::Packet;
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};

/// Four pipelining senders: every PUBACK in order, every message in the ledger once, in order per
/// sender, with its hash. Prints the rate; asserts none, because the machine is shared.
#[tokio::test(flavor = "multi_thread")]
async fn pipelined_publishes_are_stored_in_order() {
    const PER_SENDER: u16 = 10_000;
    const WINDOW: u16 = 200;
    let bed = Bed::strict().await;
    let senders = ["leaf1", "leaf3", "leaf0", "lone"];
    let started = Instant::now();
    let mut tasks = Vec::new();
    for id in senders {
        let mut client = Client::admitted(&bed, &Hello::of(id)).await;
        let topic = format!("devices/{id}/messages/events/%24.ct=text%2Fplain&sender={id}");
        tasks.push(tokio::spawn(async move {
            let mut body = vec![b'x'; 1024];
            let (mut sent, mut acknowledged) = (0, 0);
            while acknowledged < PER_SENDER {
                let mut bytes = Vec::new();
                while sent < PER_SENDER && sent - acknowledged < WINDOW {
                    sent += 1;
                    body[..2].copy_from_slice(&sent.to_be_bytes());
                    bytes.extend(publish(&topic, QoS::AtLeastOnce, sent, &body));
                }
                if !bytes.is_empty() {
                    client.send(&bytes).await;
                }
                for _ in 0..(sent - acknowledged).min(WINDOW / 2) {
                    match client.next().await {
                        Some(Packet::PubAck(ack)) => assert_eq!(ack.pkid, acknowledged + 1),
                        other => panic!("{other:?}"),
                    }
                    acknowledged += 1;
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let total = usize::from(PER_SENDER) * senders.len();
    let rate = total as f64 / started.elapsed().as_secs_f64();
    eprintln!("{total} messages of 1 KiB, {rate:.0} per second with this client on the same cores");

    let ledger = bed.ledger().await;
    assert_eq!(ledger.len(), total);
    for (at, line) in ledger.iter().enumerate() {
        assert_eq!(line["sequence"], at);
    }
    for id in senders {
        let own: Vec<&Value> = ledger
            .iter()
            .filter(|line| line["device_id"] == id)
            .collect();
        assert_eq!(own.len(), usize::from(PER_SENDER));
        for (line, number) in own.iter().zip(1_u16..) {
            let body = STANDARD
                .decode(line["body_base64"].as_str().unwrap())
                .unwrap();
            assert_eq!(body[..2], number.to_be_bytes());
            assert_eq!(line["properties"]["sender"], id);
            let hash: String = digest(&SHA256, &body)
                .as_ref()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(line["sha256"], hash);
        }
    }
}
