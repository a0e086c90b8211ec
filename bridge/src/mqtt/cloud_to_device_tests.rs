//! Cloud-to-device messages of a session against the server of `session_support`. The clock is the
//! runtime's, paused.

use bytes::Bytes;
use edgehub_proto::hub::CloudToDeviceOutcome::{Abandoned, Completed, Rejected};
use edgehub_proto::message::SystemProperty;
use ntex_mqtt::v3::codec::{ConnectAckReason, Decoded, Packet, QoS};

use super::MachineConfig;
use super::session_support::{Client, Server, needs, start_for};
use crate::lanes::CloseCause;
use crate::limits::{ARRIVALS_HELD_MAX, CLOUD_TO_DEVICE_FORWARDED_MAX};
use crate::test_support::settle_down;

const TOPIC: &str = "devices/leaf1/messages/devicebound/";

async fn listening() -> (Client, Server) {
    Client::listening("leaf1", needs(false, true, true)).await
}

async fn ends_unsettled(client: Client) {
    let cause = client.end().await;
    assert!(matches!(cause, CloseCause::Unsettled(_)), "{cause}");
}

/// The server sees an orderly end after `acknowledged`, so it delivers the rest again.
async fn sees_the_end(server: &mut Server) {
    let last = server.receive().await;
    let is_goodbye = matches!(last, Some(Decoded::Packet(Packet::Disconnect, _)));
    assert!(is_goodbye, "{last:?}");
    assert!(server.receive().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_message_comes_with_its_properties_and_is_acknowledged_when_settled() {
    let (mut client, mut server) = listening().await;
    let bag = "cmd=go%20on&%24.mid=42&%24.to=%2Fdevices%2Fleaf1%2Fmessages%2FdeviceBound\
               &%24.exp=2030-01-31T12:00:00Z&iothub-ack=full&%24.cdid=other";
    server
        .publish_again(Some(11), &format!("{TOPIC}{bag}"), b"body", true)
        .await;
    let delivery = client.downstream.message().await;
    assert!(client.engaged().await);
    assert!(delivery.redelivered);
    let message = delivery.message;
    assert_eq!(message.body, Bytes::from_static(b"body"));
    let system = |property| message.system.get(property);
    assert_eq!(system(SystemProperty::MessageId), Some("42"));
    let to = "/devices/leaf1/messages/deviceBound";
    assert_eq!(system(SystemProperty::To), Some(to));
    assert_eq!(
        system(SystemProperty::ExpiryTime),
        Some("2030-01-31T12:00:00Z")
    );
    assert_eq!(
        system(SystemProperty::ConnectionDeviceId),
        None,
        "no stamp from a bag"
    );
    let properties: Vec<(&str, Option<&str>)> = message
        .properties
        .iter()
        .map(|property| (property.key.as_str(), property.value.as_deref()))
        .collect();
    let expected = [
        ("cmd", "go on"),
        ("iothub-ack", "full"),
        ("$.cdid", "other"),
    ];
    assert_eq!(properties, expected.map(|(key, value)| (key, Some(value))));
    server.nothing_but_a_response_to_a_method(&client).await;
    delivery.settle.send(Completed).unwrap();
    assert_eq!(server.acknowledged().await, 11);
}

#[tokio::test(start_paused = true)]
async fn acknowledgements_leave_in_the_order_of_arrival() {
    let (client, mut server) = listening().await;
    let mut deliveries = Vec::new();
    for packet_id in [5, 4, 9] {
        server.publish(Some(packet_id), TOPIC, b"").await;
        let delivery = client.downstream.message().await;
        assert!(!delivery.redelivered);
        deliveries.push(delivery);
    }
    let mut deliveries = deliveries.into_iter();
    let (first, second, third) = (
        deliveries.next().unwrap(),
        deliveries.next().unwrap(),
        deliveries.next().unwrap(),
    );
    third.settle.send(Completed).unwrap();
    // What can never be delivered is complete: MQTT knows nothing else.
    second.settle.send(Rejected).unwrap();
    server.nothing_but_a_response_to_a_method(&client).await;
    first.settle.send(Completed).unwrap();
    for packet_id in [5, 4, 9] {
        assert_eq!(server.acknowledged().await, packet_id);
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_dropped_ends_the_session_so_that_it_comes_again() {
    let (client, mut server) = listening().await;
    server.publish(Some(1), TOPIC, b"first").await;
    server.publish(Some(2), TOPIC, b"second").await;
    let first = client.downstream.message().await;
    let second = client.downstream.message().await;
    first.settle.send(Completed).unwrap();
    drop(second.settle);
    ends_unsettled(client).await;
    assert_eq!(
        server.acknowledged().await,
        1,
        "what was settled is not delivered again"
    );
    sees_the_end(&mut server).await;

    // The next session gets it again, marked as such.
    let (client, mut server) = listening().await;
    server.publish_again(Some(2), TOPIC, b"second", true).await;
    let again = client.downstream.message().await;
    assert!(again.redelivered);
    again.settle.send(Completed).unwrap();
    assert_eq!(server.acknowledged().await, 2);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_given_back_ends_the_session_so_that_it_comes_again() {
    let (client, mut server) = listening().await;
    server.publish(Some(1), TOPIC, b"first").await;
    server.publish(Some(2), TOPIC, b"second").await;
    let first = client.downstream.message().await;
    let second = client.downstream.message().await;
    first.settle.send(Completed).unwrap();
    second.settle.send(Abandoned).unwrap();
    ends_unsettled(client).await;
    assert_eq!(server.acknowledged().await, 1);
    sees_the_end(&mut server).await;
}

#[tokio::test(start_paused = true)]
async fn needs_that_are_withdrawn_hand_back_what_is_not_settled() {
    let (client, mut server) = listening().await;
    server.publish(Some(1), TOPIC, b"").await;
    let delivery = client.downstream.message().await;
    client.needs.send_replace(needs(false, true, false));
    ends_unsettled(client).await;
    assert!(delivery.settle.is_closed());
    sees_the_end(&mut server).await;

    // With everything settled it is only unsubscribed.
    let (client, mut server) = listening().await;
    server.publish(Some(1), TOPIC, b"").await;
    let delivery = client.downstream.message().await;
    delivery.settle.send(Completed).unwrap();
    assert_eq!(server.acknowledged().await, 1);
    client.needs.send_replace(needs(false, true, false));
    assert_eq!(server.release().await, [format!("{TOPIC}#")]);
    server.nothing_but_a_response_to_a_method(&client).await;
}

/// A session that the server kept: a message comes although nobody needs it. It stays upstream, and
/// when somebody does need it, a new session gets it.
#[tokio::test(start_paused = true)]
async fn a_message_that_nobody_needs_stays_upstream() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(false, true, false));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    server.publish(Some(1), TOPIC, b"").await;
    server.grant_all().await;
    client.downstream.established().await;
    assert_eq!(server.release().await, [format!("{TOPIC}#")]);
    server.publish(Some(2), TOPIC, b"").await;
    server.nothing_but_a_response_to_a_method(&client).await;
    assert!(client.downstream.take().is_empty());
    client.needs.send_replace(needs(false, true, true));
    ends_unsettled(client).await;
    sees_the_end(&mut server).await;
}

/// A limited number is handed down, the others wait here in order, and telemetry's acknowledgements
/// and everything else are still read.
#[tokio::test(start_paused = true)]
async fn a_flood_is_handed_down_bit_by_bit() {
    let (client, mut server) = listening().await;
    let flood = CLOUD_TO_DEVICE_FORWARDED_MAX + ARRIVALS_HELD_MAX;
    for number in 1..=flood {
        let packet_id = u16::try_from(number).unwrap();
        server
            .publish(Some(packet_id), TOPIC, number.to_string().as_bytes())
            .await;
    }
    let mut waiting = std::collections::VecDeque::new();
    for _ in 0..CLOUD_TO_DEVICE_FORWARDED_MAX {
        waiting.push_back(client.downstream.message().await);
    }
    server.nothing_but_a_response_to_a_method(&client).await;
    assert!(client.downstream.take().is_empty(), "no more for now");
    for number in 1..=flood {
        let delivery = waiting.pop_front().unwrap();
        assert_eq!(delivery.message.body, number.to_string());
        delivery.settle.send(Completed).unwrap();
        assert_eq!(usize::from(server.acknowledged().await), number);
        if number + CLOUD_TO_DEVICE_FORWARDED_MAX <= flood {
            waiting.push_back(client.downstream.message().await);
        }
    }
    settle_down().await;
    assert!(client.downstream.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn more_than_is_held_ends_the_session() {
    let (client, mut server) = listening().await;
    for number in 1..=CLOUD_TO_DEVICE_FORWARDED_MAX + ARRIVALS_HELD_MAX + 1 {
        let packet_id = u16::try_from(number).unwrap();
        server.publish(Some(packet_id), TOPIC, b"").await;
    }
    ends_unsettled(client).await;
}

#[tokio::test(start_paused = true)]
async fn a_message_that_cannot_be_read_is_done_with() {
    let (client, mut server) = listening().await;
    server.publish(Some(1), &format!("{TOPIC}a=%ff"), b"").await;
    assert_eq!(server.acknowledged().await, 1);
    server.publish(None, &format!("{TOPIC}=x"), b"").await;
    server.nothing_but_a_response_to_a_method(&client).await;
    assert!(client.downstream.take().is_empty());
}

/// A server that grants QoS 0 only: nothing to acknowledge, and nothing that comes again.
#[tokio::test(start_paused = true)]
async fn at_qos_0_an_unsettled_message_is_no_reason_to_end_the_session() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(false, true, true));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let (packet_id, _) = server.subscribe().await;
    server.grant(packet_id, &[Some(QoS::AtMostOnce); 2]).await;
    client.downstream.established().await;
    server.publish(None, TOPIC, b"").await;
    drop(client.downstream.message().await);
    server.publish(None, TOPIC, b"").await;
    let delivery = client.downstream.message().await;
    delivery.settle.send(Completed).unwrap();
    server.nothing_but_a_response_to_a_method(&client).await;
}
