//! PUBLISH and SUBSCRIBE: topics, sizes, QoS, filters.

use bytes::BytesMut;
use mqttbytes::QoS::{AtLeastOnce, AtMostOnce, ExactlyOnce};
use mqttbytes::v4::{Packet, Subscribe, SubscribeReasonCode as Granted, Unsubscribe};
use serde_json::json;

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};

const LIMIT: usize = 256 * 1024;

/// A fresh connection per case, because each one ends it.
async fn closes(bed: &Bed, identity: &str, topic: &str, body: &[u8]) {
    let client = Client::admitted(bed, &Hello::of(identity)).await;
    eprintln!("{identity}: {topic}");
    client
        .expect_close_after(&publish(topic, AtLeastOnce, 1, body))
        .await;
    assert_eq!(bed.ledger().await.len(), 0, "{topic}");
}

#[tokio::test]
async fn strict_unknown_topics_close() {
    let bed = Bed::strict().await;
    for topic in [
        "foo",
        "devices/leaf1/messages/eventsx",
        "devices/leaf1/messages/events/a=1/b=2",
        "devices/leaf1/messages/devicebound/",
        "devices/leaf1/messages/events/+",
        "/devices/leaf1/messages/events/",
        "foo/devices/leaf1/messages/events/",
    ] {
        closes(&bed, "leaf1", topic, b"x").await;
    }
}

#[tokio::test]
async fn strict_topics_of_others_close() {
    let bed = Bed::strict().await;
    for (identity, topic) in [
        ("leaf1", "devices/leaf3/messages/events/"),
        ("leaf1", "devices/Leaf1/messages/events/"),
        ("leaf1", "devices/leaf10/messages/events/"),
        ("leaf1", "devices/leaf1/modules/m1/messages/events/"),
        ("leaf1/m1", "devices/leaf1/messages/events/"),
        ("edge1/modA", "devices/edge3/modules/modA/messages/events/"),
        ("edge1/$edgeHub", "devices/leaf0/messages/events/"),
        (
            "edge1/$edgeHub",
            "devices/edge1/modules/%24edgeHub/messages/events/",
        ),
    ] {
        closes(&bed, identity, topic, b"x").await;
    }
}

#[tokio::test]
async fn strict_paths_are_not_normalised() {
    let bed = Bed::strict().await;
    for topic in [
        "devices/x/../leaf1/messages/events/",
        "devices/leaf1/x/../messages/events/",
        "devices/leaf3/../leaf1/messages/events/",
        "devices/./leaf1/messages/events/",
        "devices//leaf1/messages/events/",
        "devices/leaf1%2F..%2Fleaf3/messages/events/",
        "devices/leaf1/messages/events/../events/",
    ] {
        closes(&bed, "leaf1", topic, b"x").await;
    }
}

#[tokio::test]
async fn strict_qos_2_closes() {
    let bed = Bed::strict().await;
    let client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let topic = "devices/leaf1/messages/events/";
    client
        .expect_close_after(&publish(topic, ExactlyOnce, 1, b"x"))
        .await;
    assert_eq!(bed.ledger().await.len(), 0);
}

#[tokio::test]
async fn strict_malformed_bags_close() {
    let bed = Bed::strict().await;
    for bag in ["a=%zz", "a=%ff", "a=1&&b=2", "=1", "a=b=c"] {
        closes(
            &bed,
            "leaf1",
            &format!("devices/leaf1/messages/events/{bag}"),
            b"x",
        )
        .await;
    }
}

/// 256 KiB of body, property names and values are taken; one byte more is not.
#[tokio::test]
async fn strict_messages_over_the_limit_close() {
    let bed = Bed::strict().await;
    let topic = "devices/leaf1/messages/events/ab=cd";
    closes(&bed, "leaf1", topic, &vec![7; LIMIT - 3]).await;
    closes(&bed, "leaf1", topic, &vec![7; 2 * LIMIT]).await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.publish(topic, &vec![7; LIMIT - 4], 1).await;
    assert_eq!(bed.ledger().await.len(), 1);
}

/// What was sent before the offence is stored and acknowledged; what follows it is not.
#[tokio::test]
async fn an_offence_ends_the_stream_where_it_stands() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let topic = "devices/leaf1/messages/events/";
    let mut bytes = publish(topic, AtLeastOnce, 1, b"good");
    bytes.extend(publish("foo", AtLeastOnce, 2, b"bad"));
    bytes.extend(publish(topic, AtLeastOnce, 3, b"late"));
    client.send(&bytes).await;
    assert!(matches!(client.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 1));
    assert_eq!(client.next().await, None);
    let ledger = bed.ledger().await;
    assert_eq!(ledger.len(), 1);
    assert_eq!(ledger[0]["body_base64"], "Z29vZA==");
}

#[tokio::test]
async fn lenient_mode_acknowledges_and_drops() {
    let bed = Bed::lenient().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.publish("foo", b"x", 1).await;
    client
        .publish("devices/leaf3/messages/events/", b"x", 2)
        .await;
    client
        .publish("devices/leaf1/messages/events/a=%zz", b"x", 3)
        .await;
    client
        .publish("devices/leaf1/messages/events/", &vec![7; LIMIT + 1], 4)
        .await;
    assert_eq!(bed.ledger().await.len(), 0);
    assert_eq!(
        client.subscribe(&["foo"], ExactlyOnce).await,
        [Granted::Success(AtLeastOnce)]
    );
}

#[tokio::test]
async fn strict_unknown_filters_get_0x80() {
    let bed = Bed::strict().await;
    let (yes, no) = (Granted::Success(AtLeastOnce), Granted::Failure);
    let mut leaf = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let filters = [
        "$iothub/twin/res/#",
        "$iothub/methods/POST/#",
        "$iothub/twin/PATCH/properties/desired/#",
        "devices/leaf1/messages/devicebound/#",
        "devices/leaf10/messages/devicebound/#",
        "devices/+/messages/devicebound/#",
        "#",
        "foo",
    ];
    assert_eq!(
        leaf.subscribe(&filters, ExactlyOnce).await,
        [yes, yes, yes, yes, no, no, no, no]
    );
    let mut module = Client::admitted(&bed, &Hello::through("edge3/modA;edge3;edge2;edge1")).await;
    let filters = [
        "devices/edge3/modules/modA/inputs/#",
        "devices/edge3/modules/modA/#",
        "devices/edge1/modules/modA/inputs/#",
        "devices/edge3/messages/devicebound/#",
    ];
    assert_eq!(
        module.subscribe(&filters, ExactlyOnce).await,
        [yes, yes, no, no]
    );
    leaf.unsubscribe("foo").await;
}

/// `a#` and the like are no filters: the connection ends, in either packet.
#[tokio::test]
async fn strict_malformed_filters_close() {
    let bed = Bed::strict().await;
    for filter in ["a#", "#/a", "a+/b", "$iothub/twin/#/res", ""] {
        let mut subscribe = Subscribe::new(filter, AtLeastOnce);
        subscribe.pkid = 1;
        let mut unsubscribe = Unsubscribe::new(filter);
        unsubscribe.pkid = 1;
        let (mut one, mut other) = (BytesMut::new(), BytesMut::new());
        subscribe.write(&mut one).unwrap();
        unsubscribe.write(&mut other).unwrap();
        for bytes in [one, other] {
            let client = Client::admitted(&bed, &Hello::of("leaf1")).await;
            client.expect_close_after(&bytes).await;
        }
    }
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let refused = client.subscribe(&["a/#", "+/b"], AtLeastOnce).await;
    assert_eq!(refused, [Granted::Failure, Granted::Failure]);
}

/// System properties by IoT Hub's names, application properties as they are, QoS 0 and retain.
#[tokio::test]
async fn messages_are_stamped() {
    let bed = Bed::strict().await;
    let mut hello = Hello::of("leaf1");
    hello.user_name.push_str("&model-id=dtmi%3Aa%3B1");
    let mut client = Client::admitted(&bed, &hello).await;
    let bag = "%24.mid=m1&%24.cid=c1&%24.ct=application%2Fjson&%24.ce=utf-8\
        &temp=21&empty=&none&%C3%A9=%26";
    client
        .send(&publish(
            "devices/leaf1/messages/events/",
            AtMostOnce,
            0,
            b"at most once",
        ))
        .await;
    let mut retained = publish(
        &format!("devices/leaf1/messages/events/{bag}/"),
        AtLeastOnce,
        1,
        b"{}",
    );
    retained[0] |= 1;
    client.send(&retained).await;
    assert!(matches!(client.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 1));
    let ledger = bed.ledger().await;
    assert_eq!(ledger.len(), 2);
    assert_eq!(ledger[0]["body_base64"], "YXQgbW9zdCBvbmNl");
    assert_eq!(ledger[0]["sequence"], 0);
    let line = &ledger[1];
    let properties =
        json!({"temp": "21", "empty": "", "none": null, "é": "&", "x-opt-retain": "true"});
    assert_eq!(line["properties"], properties);
    let system = &line["system"];
    assert_eq!(system["message-id"], "m1");
    assert_eq!(system["correlation-id"], "c1");
    assert_eq!(system["content-type"], "application/json");
    assert_eq!(system["content-encoding"], "utf-8");
    assert_eq!(system["dt-dataschema"], "dtmi:a;1");
    assert_eq!(system["iothub-message-source"], "Telemetry");
    assert_eq!(system["iothub-enqueuedtime"], line["enqueued_utc"]);
    assert!(
        !system["iothub-connection-auth-generation-id"]
            .as_str()
            .unwrap()
            .is_empty()
    );
    let method = system["iothub-connection-auth-method"].as_str().unwrap();
    assert!(
        method.contains(r#""scope":"device","type":"sas""#),
        "{method}"
    );
}
