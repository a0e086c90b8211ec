//! Whole connections over a byte stream in memory, with a real hub and a real store: sessions,
//! wills, twin topics, a stuck disk (spec/mqtt.md 2.6, 2.7, 5, 6, 9.1).

use std::sync::Arc;

use edgehub_auth::scope_cache::ScopeChange;
#[cfg(feature = "faults")]
use edgehub_storage::Column;
use mqttbytes::v4::{ConnectReturnCode, Packet, SubscribeReasonCode};
use tokio_util::sync::CancellationToken;

use super::connection::ConnectionEnd;
use super::machine::CloseReason;
use super::test_head::{Head, TWIN, connect, telemetry};
#[cfg(feature = "faults")]
use super::test_packets::PINGREQ;
use super::test_packets::{ack, publish_with, publish1, subscribe, unsubscribe};
use crate::test_support::{id, leaf};

// Sessions

#[tokio::test]
async fn a_session_outlives_its_connection_until_a_clean_one_ends_it() {
    let head = Head::new();
    let (mut client, present) = head.connect("leaf0", false).await;
    assert!(!present);
    client
        .send(&subscribe(
            1,
            &[(TWIN, 2), ("devices/leaf1/#", 1), ("foo/bar", 0)],
        ))
        .await;
    let Some(Packet::SubAck(suback)) = client.next().await else {
        panic!("no SUBACK")
    };
    let granted = SubscribeReasonCode::Success(mqttbytes::QoS::AtLeastOnce);
    let refused = SubscribeReasonCode::Failure;
    assert_eq!(suback.return_codes, [granted, refused, refused]);
    client.disconnect().await;

    let (client, present) = head.connect("leaf0", false).await;
    assert!(present);
    let session = head
        .hub
        .hub
        .sessions()
        .load(&id("leaf0"))
        .await
        .unwrap()
        .unwrap();
    let filters: Vec<_> = session
        .subscriptions
        .iter()
        .map(|s| s.filter.as_str())
        .collect();
    assert_eq!(filters, [TWIN]);
    client.vanish().await;

    let (mut client, present) = head.connect("leaf0", true).await;
    assert!(!present);
    assert!(client.subscribe(TWIN).await);
    client.disconnect().await;
    let (client, present) = head.connect("leaf0", false).await;
    assert!(!present, "a clean session leaves nothing");
    client.disconnect().await;
}

#[tokio::test]
async fn what_was_unsubscribed_does_not_come_back() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    assert!(client.subscribe(TWIN).await);
    client.send(&unsubscribe(2, &[TWIN, "unknown"])).await;
    assert!(matches!(client.next().await, Some(Packet::UnsubAck(ack)) if ack.pkid == 2));
    client.disconnect().await;
    let (client, present) = head.connect("leaf0", false).await;
    assert!(present, "an empty session is one");
    let session = head.hub.hub.sessions().load(&id("leaf0")).await.unwrap();
    assert!(session.unwrap().subscriptions.is_empty());
    client.disconnect().await;
}

// Wills

#[tokio::test]
async fn a_will_is_published_on_every_abnormal_end() {
    let head = Head::new();
    let own = telemetry("leaf0") + "a=1";

    let client = head.with_will("leaf0", &own).await;
    assert!(matches!(client.vanish().await, ConnectionEnd::PeerGone));
    assert_eq!(head.wills().await.len(), 1, "the client vanished");

    let mut client = head.with_will("leaf0", &own).await;
    client.send(&publish_with(0x34, "t", 1, b"x")).await;
    let end = client.ends().await;
    assert!(matches!(end, ConnectionEnd::Protocol(CloseReason::QoS2)));
    assert_eq!(head.wills().await.len(), 2, "a protocol error");

    let client = head.with_will("leaf0", &own).await;
    let (successor, _) = head.connect("leaf0", false).await;
    assert!(matches!(client.ends().await, ConnectionEnd::Revoked));
    assert_eq!(head.wills().await.len(), 3, "a take-over");
    successor.disconnect().await;

    let mut client = head.with_will("leaf0", &own).await;
    client
        .send(&publish1("devices/leaf1/messages/events/", 1, b"x"))
        .await;
    assert!(matches!(client.ends().await, ConnectionEnd::ForeignTopic));
    let wills = head.wills().await;
    assert_eq!(wills.len(), 4, "a topic of somebody else");
    assert!(
        wills
            .iter()
            .all(|will| *will == ("leaf0".to_owned(), "gone".to_owned()))
    );
    let (_, message) = head.stored().await.pop().unwrap();
    let keys: Vec<_> = message.properties.iter().map(|p| p.key.as_str()).collect();
    assert_eq!(keys, ["a", "MessageType", "iothub-MessageType"]);
}

#[tokio::test]
async fn a_will_is_published_when_the_identity_is_revoked() {
    let head = Head::new();
    let stop = CancellationToken::new();
    let watch = tokio::spawn(Arc::clone(&head.hub.hub).watch_scope(stop.clone()));
    let client = head.with_will("leaf0", &telemetry("leaf0")).await;
    let mut disabled = leaf("leaf0", "edge1");
    disabled.status = edgehub_auth::scope_tree::Status::Disabled;
    head.hub.scope.apply(ScopeChange::Upsert(vec![disabled]));
    assert!(matches!(client.ends().await, ConnectionEnd::Revoked));
    assert_eq!(head.wills().await.len(), 1);
    stop.cancel();
    watch.await.unwrap();
}

#[tokio::test]
async fn a_will_is_not_published_on_disconnect_or_when_the_hub_stops() {
    let head = Head::new();
    let client = head.with_will("leaf0", &telemetry("leaf0")).await;
    client.disconnect().await;
    let client = head.with_will("leaf0", &telemetry("leaf0")).await;
    head.stop.cancel();
    assert!(matches!(client.ends().await, ConnectionEnd::Stopping));
    assert!(head.stored().await.is_empty());
}

#[tokio::test]
async fn a_will_follows_what_was_read_before_and_a_bad_one_is_dropped() {
    let head = Head::new();
    let mut client = head.with_will("leaf0", &telemetry("leaf0")).await;
    let mut stream = publish1(&telemetry("leaf0"), 1, b"before");
    stream.extend(publish_with(0x34, "t", 2, b"x"));
    client.send(&stream).await;
    client.ends().await;
    let bodies: Vec<_> = head
        .stored()
        .await
        .into_iter()
        .map(|(_, m)| m.body)
        .collect();
    assert_eq!(bodies, ["before", "gone"]);

    let client = head
        .with_will("leaf0", &(telemetry("leaf0") + "a=%ff"))
        .await;
    client.vanish().await;
    assert_eq!(head.stored().await.len(), 2, "its properties are no UTF-8");
}

#[tokio::test]
async fn a_will_to_somebody_else_is_refused_and_takes_nobodys_place() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    for topic in ["devices/leaf1/messages/events/", "$internal/x", "foo"] {
        let mut other = head.open();
        other.send(&connect("leaf0", false, Some(topic))).await;
        let answer = other.next().await;
        assert!(
            matches!(&answer, Some(Packet::ConnAck(ack)) if ack.code == ConnectReturnCode::NotAuthorized),
            "{answer:?}"
        );
        assert_eq!(other.next().await, None);
        assert!(matches!(other.ends().await, ConnectionEnd::Refused(_)));
    }
    client.ping().await;
    client.disconnect().await;
    assert!(head.stored().await.is_empty());
}

// Requests of the client

#[tokio::test]
async fn a_twin_topic_that_cannot_be_read_closes() {
    let head = Head::new();
    for topic in [
        "$iothub/twin/GET/",
        "$iothub/twin/GET/?",
        "$iothub/twin/GET/?$rid=",
        "$iothub/twin/GET/x/?$rid=1",
        "$iothub/twin/get/?$rid=1",
        "$iothub/twin/PATCH/properties/reported/x/?$rid=1",
        "$iothub/twin/PATCH/properties/desired/?$rid=1",
        "$iothub/twin/POST/?$rid=1",
        "$iothub/twin/",
    ] {
        let (mut client, _) = head.connect("leaf0", false).await;
        client.send(&publish1(topic, 1, b"{}")).await;
        assert_eq!(client.next().await, None, "{topic}");
        assert!(
            matches!(client.ends().await, ConnectionEnd::TwinTopic),
            "{topic}"
        );
    }
}

#[tokio::test]
async fn requests_and_odd_topics_are_acknowledged_in_their_turn() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    let topics = [
        "$iothub/twin/GET/?$rid=1",
        "$iothub/twin/PATCH/properties/reported/?$rid=2",
        "$iothub/methods/res/200/?$rid=1",
        "$iothub/methods/res/ok/?$rid=1",
        "$iothub/methods/res/200/",
        "$iothub/methods/res/200/?x=1",
        "$iothub/methods/POST/x/?$rid=1",
        "foo/bar",
        "devices/leaf0/messages/events/%ff=1",
        "devices/leaf0/messages/events/a=1",
    ];
    let ids = 1..=u16::try_from(topics.len()).unwrap();
    let publish = |(topic, id): (&&str, u16)| publish1(topic, id, b"{}");
    let stream: Vec<u8> = topics.iter().zip(ids.clone()).flat_map(publish).collect();
    client.send(&stream).await;
    for id in ids {
        let answer = client.next().await;
        assert!(
            matches!(&answer, Some(Packet::PubAck(ack)) if ack.pkid == id),
            "{id}: {answer:?}"
        );
    }
    client.disconnect().await;
    assert_eq!(head.stored().await.len(), 1, "only telemetry is stored");
}

#[tokio::test]
async fn acknowledgements_of_nothing_are_ignored() {
    let head = Head::new();
    let (mut client, _) = head.connect("edge1/modA", false).await;
    client
        .send(&[ack(0x40, 1), ack(0x40, 65_535)].concat())
        .await;
    client.ping().await;
    client.disconnect().await;
}

// A stuck disk: acceptance 5 of the MQTT issue

#[cfg(feature = "faults")]
#[tokio::test]
async fn a_subscription_is_answered_when_its_session_is_stored() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    let store = head.hub.hub.store().clone();
    store.faults().hold(true);
    client.send(&subscribe(1, &[(TWIN, 1)])).await;
    client.send(&PINGREQ).await;
    assert_eq!(
        client.next().await,
        Some(Packet::PingResp),
        "the SUBACK waits"
    );
    store.faults().hold(false);
    assert!(matches!(client.next().await, Some(Packet::SubAck(ack)) if ack.pkid == 1));
    let record = store.get(Column::Sessions, b"mqtt/leaf0").unwrap();
    assert!(record.is_some(), "answered means stored");
    // The same again changes nothing and waits for nothing.
    store.faults().hold(true);
    assert!(client.subscribe(TWIN).await);
    assert_eq!(head.hub.hub.sessions().unsaved(), 0);
    store.faults().hold(false);
    client.disconnect().await;
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn while_a_commit_is_held_pings_and_subscriptions_are_answered() {
    let head = Head::new();
    let (mut client, _) = head.connect("leaf0", false).await;
    let store = head.hub.hub.store().clone();
    store.faults().hold(true);
    let own = telemetry("leaf0");
    let stream: Vec<u8> = (1..=3).flat_map(|id| publish1(&own, id, b"x")).collect();
    client.send(&stream).await;
    client.ping().await;
    // Its write waits behind the commit: the answer does not wait for it beyond its limit.
    assert!(client.subscribe(TWIN).await);
    client.ping().await;

    // The client comes back meanwhile and finds what it was told.
    client.vanish().await;
    let (mut client, present) = head.connect("leaf0", false).await;
    assert!(present);
    client.send(&stream).await;
    client.ping().await;
    store.faults().hold(false);
    for id in 1..=3 {
        let answer = client.next().await;
        assert!(
            matches!(&answer, Some(Packet::PubAck(ack)) if ack.pkid == id),
            "{id}: {answer:?}"
        );
    }
    client.disconnect().await;
    assert_eq!(
        head.stored().await.len(),
        6,
        "what was read is stored, twice sent twice"
    );
    let session = head.hub.hub.sessions().load(&id("leaf0")).await.unwrap();
    assert_eq!(session.unwrap().subscriptions.len(), 1);
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn a_message_that_cannot_be_stored_closes_without_an_acknowledgement_and_the_will_follows() {
    let head = Head::new();
    let mut client = head.with_will("leaf0", &telemetry("leaf0")).await;
    head.hub.hub.store().faults().fail_next(1);
    client.send(&publish1(&telemetry("leaf0"), 1, b"x")).await;
    assert_eq!(client.next().await, None);
    assert!(matches!(client.ends().await, ConnectionEnd::NotStored));
    assert_eq!(head.wills().await.len(), 1);
}
