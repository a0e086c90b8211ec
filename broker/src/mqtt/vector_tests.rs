//! Acceptance vectors of spec/mqtt.md section 11, by number, as far as a head in memory can play
//! them; the others (restart of the hub, WebSocket, TLS) need processes.

use std::time::Duration;

use mqttbytes::v4::{ConnectReturnCode, Packet};

use edgehub_proto::message::SystemProperty;

use super::connection::ConnectionEnd;
use super::machine::CloseReason;
use super::test_head::{Client, Head, TWIN, connect, telemetry};
use super::test_packets::{connect_with, field, packet, publish_with, publish1, subscribe};
use crate::test_support::token;

/// What a CONNECT is answered with; none when the connection is closed without an answer. A
/// refused one is closed then.
async fn connack(head: &Head, connect: &[u8]) -> Option<ConnectReturnCode> {
    let mut client = head.open();
    client.send(connect).await;
    let answer = client.next().await;
    let Some(Packet::ConnAck(ack)) = answer else {
        assert_eq!(answer, None);
        return None;
    };
    assert!(!ack.session_present);
    if ack.code != ConnectReturnCode::Success {
        assert_eq!(client.next().await, None);
    }
    Some(ack.code)
}

fn connect_as(client_id: &str, user_name: &str) -> Vec<u8> {
    let fields = [field(client_id), field(user_name), field(token("leaf0"))];
    connect_with(0xc0, 60, &fields)
}

async fn puback(client: &mut Client) -> u16 {
    match client.next().await {
        Some(Packet::PubAck(ack)) => ack.pkid,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn vectors_1_to_4_connect() {
    let head = Head::new();
    let user = "h/leaf0/?api-version=2021-04-12";
    let good = connack(&head, &connect_as("leaf0", user)).await;
    assert_eq!(good, Some(ConnectReturnCode::Success), "1");
    let other_id = connack(&head, &connect_as("LEAF0", user)).await;
    assert_eq!(other_id, Some(ConnectReturnCode::NotAuthorized), "2");
    let old = [field("MQIsdp"), vec![3, 2, 0, 60], field("d")].concat();
    assert_eq!(connack(&head, &packet(0x10, &old)).await, None, "3");
    let mut new = connect_as("leaf0", user);
    let level = new.iter().position(|byte| *byte == b'M').unwrap() + 4;
    new[level] = 5;
    let refused = Some(ConnectReturnCode::RefusedProtocolVersion);
    assert_eq!(connack(&head, &new).await, refused, "3");
    let malformed = connack(&head, &connect_as("leaf0", "h/leaf0")).await;
    assert_eq!(malformed, Some(ConnectReturnCode::BadUserNamePassword), "4");
}

#[tokio::test]
async fn vectors_5_and_7_subscribe_once_for_ever() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    client.send(&subscribe(1, &[(TWIN, 2)])).await;
    let granted = mqttbytes::v4::SubscribeReasonCode::Success(mqttbytes::QoS::AtLeastOnce);
    assert!(
        matches!(client.next().await, Some(Packet::SubAck(ack)) if ack.return_codes == [granted]),
        "5"
    );
    client.disconnect().await;
    let (client, session_present) = head.connect("leaf0", false).await;
    assert!(session_present, "7");
    client.disconnect().await;
}

#[tokio::test]
async fn vectors_9_and_11_properties() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    let topic = telemetry("leaf0") + "%24.ct=application%2Fjson&a=b%3Dc/";
    client.send(&publish1(&topic, 1, b"{}")).await;
    assert_eq!(puback(&mut client).await, 1);
    let topic = telemetry("leaf0") + "deviceId=leaf1";
    client.send(&publish1(&topic, 2, b"{}")).await;
    assert_eq!(puback(&mut client).await, 2);
    client.disconnect().await;
    let stored = head.stored().await;
    let (sender, message) = &stored[0];
    assert_eq!(sender.as_str(), "leaf0", "9");
    let content_type = message.system.get(SystemProperty::ContentType);
    assert_eq!(content_type, Some("application/json"), "9");
    let properties = |index: usize| {
        let pair = |p: &edgehub_proto::message::Property| (p.key.clone(), p.value.clone());
        stored[index]
            .1
            .properties
            .iter()
            .map(pair)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        properties(0),
        [("a".to_owned(), Some("b=c".to_owned()))],
        "9"
    );
    assert_eq!(stored[1].0.as_str(), "leaf0", "11");
    let expected = [("deviceId".to_owned(), Some("leaf1".to_owned()))];
    assert_eq!(properties(1), expected, "11");
}

#[tokio::test]
async fn vectors_10_12_and_13_what_is_not_stored() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    client.send(&publish1(&telemetry("leaf1"), 1, b"x")).await;
    assert_eq!(client.next().await, None, "10");
    assert!(
        matches!(client.ends().await, ConnectionEnd::ForeignTopic),
        "10"
    );

    let (mut client, _) = head.connect("leaf0", false).await;
    client
        .send(&publish_with(0x34, telemetry("leaf0"), 1, b"x"))
        .await;
    assert_eq!(client.next().await, None, "12");
    let end = client.ends().await;
    assert!(
        matches!(end, ConnectionEnd::Protocol(CloseReason::QoS2)),
        "12"
    );

    let (mut client, _) = head.connect("leaf0", false).await;
    client.send(&publish1("foo/bar", 1, b"x")).await;
    assert_eq!(puback(&mut client).await, 1, "13");
    client.disconnect().await;
    assert!(head.stored().await.is_empty());
}

#[tokio::test]
async fn vector_15_the_second_connection_of_an_identity() {
    let head = Head::new();
    let mut first = head.with_will("leaf0", &telemetry("leaf0")).await;
    let (mut second, _) = head.connect("leaf0", false).await;
    assert_eq!(first.next().await, None);
    assert!(matches!(first.ends().await, ConnectionEnd::Revoked));
    second
        .send(&publish1(&telemetry("leaf0"), 1, b"second"))
        .await;
    assert_eq!(puback(&mut second).await, 1);
    let bodies: Vec<_> = head
        .stored()
        .await
        .into_iter()
        .map(|(_, m)| m.body)
        .collect();
    assert_eq!(bodies, ["gone", "second"]);
    second.disconnect().await;
}

#[tokio::test(start_paused = true)]
async fn vector_16_silence() {
    let head = Head::new();
    let mut client = head.open();
    let mut bytes = connect("leaf0", false, Some(&telemetry("leaf0")));
    // Keep-alive 10: the two bytes behind the flags.
    let level = bytes.iter().position(|byte| *byte == b'M').unwrap() + 4;
    bytes[level + 2..level + 4].copy_from_slice(&[0, 10]);
    client.send(&bytes).await;
    client.accepted().await;
    head.hub.clock.advance(Duration::from_millis(14_999));
    client.ping().await;
    head.hub.clock.advance(Duration::from_millis(14_999));
    client.ping().await;
    head.hub.clock.advance(Duration::from_secs(15));
    let end = client.task.await.unwrap();
    assert!(matches!(
        end,
        ConnectionEnd::Protocol(CloseReason::KeepAlive)
    ));
    assert_eq!(head.wills().await.len(), 1);
}

#[tokio::test]
async fn vectors_17_and_19_acknowledgements() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    let topic = telemetry("leaf0");
    let two: Vec<u8> = (1..=2).flat_map(|id| publish1(&topic, id, b"x")).collect();
    client.send(&two).await;
    assert_eq!(
        (puback(&mut client).await, puback(&mut client).await),
        (1, 2),
        "17"
    );
    let topic = format!("{topic}k={}", "v".repeat(2_048));
    client.send(&publish1(&topic, 3, &vec![0; 262_100])).await;
    assert_eq!(puback(&mut client).await, 3, "19");
    client.disconnect().await;
    assert_eq!(head.stored().await.len(), 2, "the third is too large");
}
