//! The emulator as a child process: start, kill, restart, end.

use std::process::Command;

use mqttbytes::QoS;
use mqttbytes::v4::Packet;

use crate::common::mqtt::{Client, Hello, publish};
use crate::common::process::Process;
use crate::common::{Files, HOST};

/// Killed in the middle of a stream, it has every acknowledged message after a restart, goes on
/// with the next sequence, and its hub is the same hub.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_emulator_keeps_what_it_acknowledged() {
    let files = Files::new();
    let mut acknowledged = Vec::new();
    for round in 0..3_u8 {
        let mut process = Process::start(&files);
        let address = process.address("mqtt");
        let (mut client, _) =
            Client::connect_at(&files, address, &Hello::through("leaf1;edge2;edge1")).await;
        let topic = "devices/leaf1/messages/events/";
        let burst: Vec<u8> = (1..=2_000_u16)
            .flat_map(|id| {
                publish(
                    topic,
                    QoS::AtLeastOnce,
                    id,
                    &[round, (id >> 8) as u8, id as u8],
                )
            })
            .collect();
        client.send(&burst).await;
        for _ in 0..100 {
            let Some(Packet::PubAck(ack)) = client.next().await else {
                panic!("no PUBACK")
            };
            acknowledged.push([round, (ack.pkid >> 8) as u8, ack.pkid as u8]);
        }
        process.kill();
        while let Some(Packet::PubAck(ack)) = client.next().await {
            acknowledged.push([round, (ack.pkid >> 8) as u8, ack.pkid as u8]);
        }
    }
    let process = Process::start(&files);
    let ledger = process.ledger().await;
    let stored: Vec<Vec<u8>> = ledger
        .iter()
        .map(|line| {
            use base64::Engine;
            let body = line["body_base64"].as_str().unwrap();
            base64::engine::general_purpose::STANDARD
                .decode(body)
                .unwrap()
        })
        .collect();
    assert!(stored.is_sorted(), "in order over all rounds");
    for body in &acknowledged {
        assert!(
            stored.iter().any(|stored| stored == body),
            "{body:?} was acknowledged and is lost"
        );
    }
    for (at, line) in ledger.iter().enumerate() {
        assert_eq!(line["sequence"], at);
    }
}

#[tokio::test]
async fn sigterm_ends_it_cleanly() {
    let files = Files::new();
    let mut process = Process::start(&files);
    let address = process.address("mqtt");
    let (mut client, _) = Client::connect_at(&files, address, &Hello::of("leaf1")).await;
    let pid = process.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(process.ended().success());
    assert_eq!(client.next().await, None);
}

#[tokio::test]
async fn it_ends_with_its_parents_pipe() {
    let files = Files::new();
    let mut process = Process::start(&files);
    drop(process.child.stdin.take());
    assert!(process.ended().success());
}

#[test]
fn a_bad_seed_is_said_in_one_place() {
    let files = Files::new();
    std::fs::write(files.path("seed.json"), "{").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_iothub-emulator"))
        .args([
            "--hostname",
            HOST,
            "--address",
            "127.0.0.1",
            "--control-port",
            "0",
        ])
        .args(["--mqtt-port", "0", "--https-port", "0"])
        .arg("--cert")
        .arg(files.path("cert.pem"))
        .arg("--key")
        .arg(files.path("key.pem"))
        .arg("--seed")
        .arg(files.path("seed.json"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("seed.json") && text.contains("expected JSON"),
        "{text}"
    );
}
