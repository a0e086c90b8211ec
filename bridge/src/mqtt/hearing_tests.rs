//! The listening side of a session against the server of `session_support`: subscriptions, direct
//! methods, desired properties. The clock is the runtime's, paused.

use std::time::Duration;

use edgehub_proto::hub::{MethodResult, Needs};
use ntex_mqtt::v3::codec::{ConnectAckReason, Decoded, Packet, QoS};
use tokio::time::Instant;

use super::MachineConfig;
use super::session_support::{Client, needs, start_for};
use crate::lanes::CloseCause;
use crate::limits;
use crate::test_support::{id, settle_down};
use crate::transport::Command;

const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";
const METHODS: &str = "$iothub/methods/POST/#";
const TWIN_RESPONSES: &str = "$iothub/twin/res/#";
const DEVICE_BOUND: &str = "devices/leaf1/messages/devicebound/#";

#[tokio::test(start_paused = true)]
async fn everything_needed_is_subscribed_in_one_packet_and_then_announced() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(true, true, true));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let (packet_id, filters) = server.subscribe().await;
    let expected = [
        (TWIN_RESPONSES, 0),
        (DESIRED, 0),
        (METHODS, 0),
        (DEVICE_BOUND, 1),
    ];
    assert_eq!(
        filters,
        expected.map(|(filter, qos)| (filter.to_owned(), qos))
    );
    settle_down().await;
    assert!(client.downstream.take().is_empty(), "not before SUBACK");
    let granted = [
        QoS::AtMostOnce,
        QoS::AtMostOnce,
        QoS::AtMostOnce,
        QoS::AtLeastOnce,
    ];
    server.grant(packet_id, &granted.map(Some)).await;
    assert_eq!(client.downstream.established().await, id("leaf1"));
    server
        .publish(None, "$iothub/methods/POST/m/?$rid=1", b"")
        .await;
    client.downstream.method().await;
    settle_down().await;
    assert!(client.downstream.take().is_empty(), "once");
}

#[tokio::test(start_paused = true)]
async fn a_session_without_needs_subscribes_to_nothing() {
    let (mut client, mut server) = start_for("edge1/modA", MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    client.commands.send(Command::Close).await.unwrap();
    let last = server.receive().await;
    let is_goodbye = matches!(last, Some(Decoded::Packet(Packet::Disconnect, _)));
    assert!(is_goodbye, "{last:?}");
    assert!(client.downstream.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_living_session_changes_the_difference() {
    let (client, mut server) = Client::listening("leaf1", needs(false, true, false)).await;
    client.needs.send_replace(needs(true, true, true));
    let added = [TWIN_RESPONSES, DESIRED, DEVICE_BOUND];
    assert_eq!(server.grant_all().await, added);
    client.downstream.established().await;
    client.needs.send_replace(needs(false, false, true));
    assert_eq!(server.release().await, [TWIN_RESPONSES, DESIRED, METHODS]);
    client.needs.send_replace(needs(false, true, true));
    assert_eq!(server.grant_all().await, [METHODS]);
    server.nothing_but_a_response_to_a_method(&client).await;
    assert!(
        client.downstream.take().is_empty(),
        "no desired properties were missed"
    );
}

/// However often needs change while SUBACK is on its way, one packet follows.
#[tokio::test(start_paused = true)]
async fn flapping_needs_do_not_pile_up_packets() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(false, true, false));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let (packet_id, filters) = server.subscribe().await;
    assert_eq!(filters.len(), 1);
    for _ in 0..50 {
        client.needs.send_replace(needs(true, false, true));
        settle_down().await;
        client.needs.send_replace(needs(false, true, false));
        settle_down().await;
    }
    server.grant(packet_id, &[Some(QoS::AtMostOnce)]).await;
    client.downstream.established().await;
    server.nothing_but_a_response_to_a_method(&client).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_subscription_is_not_fatal() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(false, true, true));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let (packet_id, _) = server.subscribe().await;
    server
        .grant(packet_id, &[Some(QoS::AtMostOnce), None])
        .await;
    client.downstream.established().await;
    server.nothing_but_a_response_to_a_method(&client).await;
}

#[tokio::test(start_paused = true)]
async fn a_suback_that_never_comes_ends_the_session() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(false, true, false));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let begin = Instant::now();
    server.subscribe().await;
    let ping = server.receive().await;
    assert!(
        matches!(ping, Some(Decoded::Packet(Packet::PingRequest, _))),
        "{ping:?}"
    );
    server.send([Packet::PingResponse]).await;
    let cause = client.end().await;
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
    assert!(cause.to_string().contains("SUBACK"), "{cause}");
    assert_eq!(begin.elapsed(), Duration::from_secs(20));
}

/// The server kept the session of an identity: it sends before we have subscribed, and what nobody
/// needs any more.
#[tokio::test(start_paused = true)]
async fn what_an_old_session_left_is_taken_if_needed_and_else_given_up_once() {
    let (mut client, mut server) = start_for("edge1/modA", MachineConfig::default());
    client.needs.send_replace(needs(true, false, false));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let desired = "$iothub/twin/PATCH/properties/desired/?$version=2";
    let method = "$iothub/methods/POST/m/?$rid=1";
    for _ in 0..3 {
        server.publish(None, method, b"").await;
    }
    server
        .publish(None, desired, br#"{"a":1,"$version":2}"#)
        .await;
    assert_eq!(client.downstream.desired().await, r#"{"a":1,"$version":2}"#);
    server.grant_all().await;
    client.downstream.established().await;
    assert_eq!(server.release().await, [METHODS]);
    server.publish(None, method, b"").await;
    settle_down().await;
    client.needs.send_replace(needs(true, true, false));
    assert_eq!(server.grant_all().await, [METHODS], "and nothing more");
    server.nothing_but_a_response_to_a_method(&client).await;
}

#[tokio::test(start_paused = true)]
async fn methods_are_answered_when_they_are_answered() {
    let (mut client, mut server) = Client::listening("leaf1", needs(false, true, false)).await;
    server
        .publish(
            None,
            "$iothub/methods/POST/first%20one/?$rid=a",
            b"{\"n\":1}",
        )
        .await;
    server
        .publish(None, "$iothub/methods/POST/second/?$rid=b", b"")
        .await;
    server
        .publish(None, "$iothub/methods/POST/third/?$rid=c", b"")
        .await;
    let first = client.downstream.method().await;
    assert_eq!(
        (first.name.as_str(), &first.payload[..]),
        ("first one", &b"{\"n\":1}"[..])
    );
    let second = client.downstream.method().await;
    assert_eq!((second.name.as_str(), second.payload.len()), ("second", 0));
    let third = client.downstream.method().await;
    assert!(client.engaged().await);
    // The first caller waits for nothing: its time runs out.
    drop(first.reply);
    let result = |status, payload: &'static str| MethodResult {
        status,
        payload: payload.into(),
    };
    third.reply.send(result(-5, "3")).unwrap();
    let answer = server.published().await;
    assert_eq!(
        answer,
        ("$iothub/methods/res/-5/?$rid=c".to_owned(), "3".to_owned())
    );
    second.reply.send(result(200, "{}")).unwrap();
    let answer = server.published().await;
    assert_eq!(
        answer,
        (
            "$iothub/methods/res/200/?$rid=b".to_owned(),
            "{}".to_owned()
        )
    );
    assert!(!client.engaged().await);
    server.nothing_but_a_response_to_a_method(&client).await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_after_the_end_of_the_session_goes_nowhere() {
    let (client, mut server) = Client::listening("leaf1", needs(false, true, false)).await;
    server
        .publish(None, "$iothub/methods/POST/m/?$rid=a", b"")
        .await;
    let call = client.downstream.method().await;
    drop(server);
    let cause = client.end().await;
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
    assert!(call.reply.is_closed(), "the one who answers can know");
}

#[tokio::test(start_paused = true)]
async fn calls_beyond_the_limit_are_answered_at_once() {
    let (client, mut server) = Client::listening("leaf1", needs(false, true, false)).await;
    let mut calls = Vec::new();
    for number in 0..limits::METHOD_CALLS_MAX {
        let topic = format!("$iothub/methods/POST/m/?$rid={number}");
        server.publish(None, &topic, b"").await;
        calls.push(client.downstream.method().await);
    }
    server
        .publish(None, "$iothub/methods/POST/m/?$rid=over", b"")
        .await;
    let (topic, payload) = server.published().await;
    assert_eq!(topic, "$iothub/methods/res/429/?$rid=over");
    let message: serde_json::Value = serde_json::from_str(&payload).unwrap();
    assert!(message["message"].is_string());
    assert!(client.downstream.take().is_empty());
    drop(calls.pop());
    settle_down().await;
    server.nothing_but_a_response_to_a_method(&client).await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_fits_no_packet_becomes_an_error() {
    let (client, mut server) = Client::listening("leaf1", needs(false, true, false)).await;
    server
        .publish(None, "$iothub/methods/POST/m/?$rid=a", b"")
        .await;
    let call = client.downstream.method().await;
    let payload = vec![b'x'; limits::MQTT_PACKET_BYTES_MAX].into();
    call.reply
        .send(MethodResult {
            status: 200,
            payload,
        })
        .unwrap();
    let (topic, payload) = server.published().await;
    assert_eq!(topic, "$iothub/methods/res/413/?$rid=a");
    assert!(payload.starts_with("{\"message\":"), "{payload}");
}

/// Requests of the service that come at QoS 1, as an older session may have asked for them, are
/// acknowledged: nobody sends them again.
#[tokio::test(start_paused = true)]
async fn what_is_not_for_keeps_is_acknowledged_at_any_qos() {
    let (client, mut server) = Client::listening("leaf1", needs(true, true, false)).await;
    server
        .publish(Some(7), "$iothub/methods/POST/m/?$rid=a", b"")
        .await;
    let _call = client.downstream.method().await;
    assert_eq!(server.acknowledged().await, 7);
    let desired = "$iothub/twin/PATCH/properties/desired/?$version=2";
    server.publish(Some(8), desired, b"{}").await;
    assert_eq!(server.acknowledged().await, 8);
    server
        .publish(Some(9), "$iothub/twin/res/200/?$rid=5", b"{}")
        .await;
    assert_eq!(server.acknowledged().await, 9);
}

#[tokio::test(start_paused = true)]
async fn garbage_is_ignored_and_not_acknowledged() {
    let (client, mut server) = Client::listening("leaf1", needs(true, true, true)).await;
    for topic in [
        "",
        "x",
        "$iothub/",
        "$iothub/methods/POST/",
        "$iothub/methods/POST/a/b/?$rid=1",
        "$iothub/methods/POST/a",
        "$iothub/twin/PATCH/properties/reported/?$rid=1",
        "devices/leaf2/messages/devicebound/a=b",
        "devices/leaf1/modules/m/inputs/in/",
    ] {
        server.publish(Some(5), topic, b"\xff").await;
        server.publish(None, topic, b"").await;
    }
    server
        .publish(None, "$iothub/twin/res/200/?$rid=77", b"{}")
        .await;
    server
        .publish(None, "$iothub/twin/res/200/?$rid=x", b"{}")
        .await;
    server.nothing_but_a_response_to_a_method(&client).await;
    assert!(client.downstream.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_packet_over_the_limit_ends_the_session() {
    let (client, mut server) = Client::listening("leaf1", needs(true, false, false)).await;
    let desired = "$iothub/twin/PATCH/properties/desired/?$version=2";
    let payload = vec![b' '; limits::MQTT_PACKET_BYTES_MAX];
    server.publish(None, desired, &payload).await;
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Protocol(_)), "{cause}");
    assert!(client.downstream.take().is_empty());
}

/// An upstream that calls methods and never reads the answers.
#[tokio::test(start_paused = true)]
async fn answers_that_are_not_read_end_the_session() {
    let (client, mut server) = Client::listening("leaf1", needs(false, true, false)).await;
    let payload: bytes::Bytes = vec![b'x'; 300_000].into();
    let mut answered = 0;
    let mut task = client.task;
    let cause = loop {
        let topic = format!("$iothub/methods/POST/m/?$rid={answered}");
        // The session may end any moment.
        let _ = server.try_publish(None, &topic, b"", false).await;
        let call = tokio::select! {
            biased;
            ended = &mut task => break ended.unwrap(),
            call = client.downstream.method() => call,
        };
        let payload = payload.clone();
        let status = 200;
        let _ = call.reply.send(MethodResult { status, payload });
        answered += 1;
        assert!(answered < 50, "it never ends");
    };
    let expected = "does not read its answers";
    assert!(cause.to_string().contains(expected), "{cause}");
    assert!(answered > 30, "{answered} answers");
}

/// Needs that were withdrawn before CONNACK are not subscribed to.
#[tokio::test(start_paused = true)]
async fn the_newest_needs_count_when_the_session_opens() {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    client.needs.send_replace(needs(true, true, true));
    settle_down().await;
    client.needs.send_replace(Needs::default());
    settle_down().await;
    client.needs.send_replace(needs(false, true, false));
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    assert_eq!(server.grant_all().await, [METHODS]);
}
