//! Cloud-to-device messages: sending, form, settlement, expiry, limits.

use mqttbytes::QoS::{AtLeastOnce, AtMostOnce};
use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello};

pub(crate) const LEAF1: &str = "devices/leaf1/messages/devicebound/#";

pub(crate) async fn send(bed: &Bed, id: &str) -> u64 {
    let body = json!({"body": format!("body of {id}"), "message_id": id});
    let sent = bed.control("POST", "/c2d/leaf1", body).await;
    assert_eq!(sent["message_id"], id);
    sent["sequence"].as_u64().unwrap()
}

/// What became of a message, once it is settled.
pub(crate) async fn outcome(bed: &Bed, sequence: u64) -> (Value, Value) {
    let path = format!("/c2d/leaf1/wait?sequence={sequence}");
    let settled = bed.control("GET", &path, Value::Null).await;
    assert_eq!(settled["sequence"], sequence, "{settled}");
    (
        settled["outcome"].clone(),
        settled["delivery_count"].clone(),
    )
}

/// State and delivery count of all that is not settled.
pub(crate) async fn queue(bed: &Bed) -> Vec<(Value, Value)> {
    let overview = bed.control("GET", "/c2d/leaf1", Value::Null).await;
    let queue = overview["queue"].as_array().unwrap().iter();
    queue
        .map(|one| (one["state"].clone(), one["delivery_count"].clone()))
        .collect()
}

#[tokio::test]
async fn a_message_arrives_with_its_properties_and_a_puback_completes_it() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    let body = json!({"body_base64": "AP8=", "message_id": "m 1", "correlation_id": "c",
        "user_id": "u", "content_type": "application/json", "content_encoding": "utf-8",
        "ack": "full", "ttl_ms": 3_600_000, "properties": {"cmd": "a=b&c/d", "empty": ""}});
    let sent = bed.control("POST", "/c2d/leaf1", body).await;
    assert_eq!(sent, json!({"sequence": 1, "message_id": "m 1"}));
    let delivery = client.delivery().await;
    let bag = delivery
        .topic
        .strip_prefix("devices/leaf1/messages/devicebound/")
        .unwrap();
    let mut pairs: Vec<&str> = bag.split('&').collect();
    let expiry = pairs.remove(4);
    assert_eq!(
        pairs,
        [
            "%24.mid=m%201",
            "%24.cid=c",
            "%24.uid=u",
            "%24.to=%2Fdevices%2Fleaf1%2Fmessages%2Fdevicebound",
            "%24.ct=application%2Fjson",
            "%24.ce=utf-8",
            "iothub-ack=full",
            "cmd=a%3Db%26c%2Fd",
            "empty=",
        ]
    );
    // 2026-11-24T03%3A26%3A26.1230000Z: the C# SDK takes seven decimals only.
    assert!(
        expiry.starts_with("%24.exp=") && expiry.ends_with("0000Z"),
        "{expiry}"
    );
    assert_eq!(
        expiry.len(),
        "%24.exp=2026-11-24T03%3A26%3A26.1230000Z".len()
    );
    assert_eq!(&delivery.payload[..], [0, 0xff]);
    assert_eq!(
        (delivery.qos, delivery.dup, delivery.retain, delivery.pkid),
        (AtLeastOnce, false, false, 1)
    );
    let overview = bed.control("GET", "/c2d/leaf1", Value::Null).await;
    let queued = &overview["queue"][0];
    for (member, value) in [
        ("sequence", json!(1)),
        ("message_id", json!("m 1")),
        ("state", json!("invisible")),
        ("delivery_count", json!(1)),
        ("packet_id", json!(1)),
    ] {
        assert_eq!(queued[member], value, "{member}");
    }
    assert!(queued["locked_until_utc"].is_string());
    let twin = bed.service("GET", "/twins/leaf1", Value::Null).await.json();
    assert_eq!(twin["cloudToDeviceMessageCount"], 1);
    client.acknowledge(1).await;
    assert_eq!(outcome(&bed, 1).await, (json!("completed"), json!(1)));
    assert!(queue(&bed).await.is_empty());
    client.expect_nothing().await;
}

/// Without any property the bag still has something in it, and ids are made up.
#[tokio::test]
async fn a_bare_message_has_an_id_and_an_address() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    let sent = bed.control("POST", "/c2d/leaf1", json!({})).await;
    let id = sent["message_id"].as_str().unwrap();
    let delivery = client.delivery().await;
    assert_eq!(
        delivery.topic,
        format!(
            "devices/leaf1/messages/devicebound/%24.mid={id}\
             &%24.to=%2Fdevices%2Fleaf1%2Fmessages%2Fdevicebound"
        )
    );
    assert!(delivery.payload.is_empty());
}

/// Messages wait for their device: in order, for the subscription, and for nobody else.
#[tokio::test]
async fn messages_wait_for_the_subscription() {
    let bed = Bed::strict().await;
    for id in ["m1", "m2", "m3"] {
        send(&bed, id).await;
    }
    assert_eq!(queue(&bed).await, vec![(json!("enqueued"), json!(0)); 3]);
    let mut other = Client::admitted(&bed, &Hello::of("leaf3")).await;
    let filter = "devices/leaf3/messages/devicebound/#";
    other.subscribe(&[filter], AtLeastOnce).await;
    let mut client = Client::admitted(&bed, &Hello::through("leaf1;edge2;edge1")).await;
    client.expect_nothing().await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    for (id, packet_id) in [("m1", 1), ("m2", 2), ("m3", 3)] {
        let delivery = client.delivery().await;
        assert_eq!(delivery.payload, format!("body of {id}"));
        assert_eq!(delivery.pkid, packet_id);
    }
    // Acknowledged in any order.
    for packet_id in [2, 3, 1] {
        client.acknowledge(packet_id).await;
        let settled = outcome(&bed, packet_id.into()).await;
        assert_eq!(settled, (json!("completed"), json!(1)));
    }
    client.unsubscribe(LEAF1).await;
    send(&bed, "m4").await;
    client.expect_nothing().await;
    other.expect_nothing().await;
}

/// At QoS 0 there is no PUBACK: written is completed.
#[tokio::test]
async fn at_qos_0_a_written_message_is_completed() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.subscribe(&[LEAF1], AtMostOnce).await;
    let sequence = send(&bed, "m1").await;
    let delivery = client.delivery().await;
    assert_eq!((delivery.qos, delivery.pkid), (AtMostOnce, 0));
    assert_eq!(
        outcome(&bed, sequence).await,
        (json!("completed"), json!(1))
    );
}

#[tokio::test]
async fn messages_expire_by_the_hubs_clock() {
    let bed = Bed::strict().await;
    let short = json!({"message_id": "short", "ttl_ms": 60_000});
    bed.control("POST", "/c2d/leaf1", short).await;
    send(&bed, "an hour").await;
    let long = json!({"message_id": "long", "ttl_ms": 7_200_000});
    bed.control("POST", "/c2d/leaf1", long).await;
    bed.clock(61).await;
    assert_eq!(outcome(&bed, 1).await, (json!("expired"), json!(0)));
    assert_eq!(queue(&bed).await.len(), 2);
    bed.clock(3_601).await;
    assert_eq!(outcome(&bed, 2).await, (json!("expired"), json!(0)));
    let mut client = Client::admitted(&bed, &Hello::of("leaf1").with_token(far())).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    let delivery = client.delivery().await;
    assert!(
        delivery.topic.contains("%24.mid=long&"),
        "{}",
        delivery.topic
    );
}

fn far() -> crate::common::token::Token {
    crate::common::token::Token {
        expires_at: crate::common::now_secs() + 90_000,
        ..crate::common::token::Token::of("leaf1")
    }
}

/// The lock is a minute: then the message goes out once more, as a duplicate, and that delivery
/// does not count.
#[tokio::test]
async fn a_lock_runs_out_by_the_hubs_clock() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1").with_token(far())).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    let sequence = send(&bed, "m1").await;
    let first = client.delivery().await;
    bed.clock(59).await;
    client.expect_nothing().await;
    bed.clock(61).await;
    let second = client.delivery().await;
    assert_eq!((second.pkid, second.dup), (first.pkid, true));
    assert_eq!((second.topic, second.payload), (first.topic, first.payload));
    client.acknowledge(second.pkid).await;
    assert_eq!(
        outcome(&bed, sequence).await,
        (json!("completed"), json!(1))
    );
}

#[tokio::test]
async fn fifty_messages_wait_and_no_more() {
    let bed = Bed::strict().await;
    for number in 1..=50 {
        assert_eq!(send(&bed, &format!("m{number}")).await, number);
    }
    let full = bed.control_raw("POST", "/c2d/leaf1", json!({})).await;
    assert_eq!(full.status, 403, "{}", full.text());
    bed.control("POST", "/c2d/leaf3", json!({})).await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    for _ in 0..50 {
        client.delivery().await;
    }
    let full = bed.control_raw("POST", "/c2d/leaf1", json!({})).await;
    assert_eq!(full.status, 403, "invisible ones count");
    client.acknowledge(17).await;
    outcome(&bed, 17).await;
    assert_eq!(send(&bed, "m51").await, 51);
    assert_eq!(client.delivery().await.payload, "body of m51");
}

#[tokio::test]
async fn wrong_messages_are_refused() {
    let bed = Bed::strict().await;
    for (bad, status) in [
        (json!({"body": "x", "body_base64": "eA=="}), 400),
        (json!({"body_base64": "?"}), 400),
        (json!({"ack": "maybe"}), 400),
        (json!({"ttl_ms": 172_800_001_u64}), 400),
        (json!({"properties": {"$.mid": "x"}}), 400),
        (json!({"properties": {"": "x"}}), 400),
        (json!({"properties": {"a": 1}}), 400),
        (json!({"propertys": {}}), 400),
        (json!({"properties": {"a": "&".repeat(30_000)}}), 400),
        (json!({"body": "x".repeat(65_536)}), 413),
    ] {
        let refused = bed.control_raw("POST", "/c2d/leaf1", bad.clone()).await;
        assert_eq!(refused.status, status, "{bad:.80}: {}", refused.text());
        assert!(refused.json()["error"].is_string());
    }
    for (method, path) in [
        ("POST", "/c2d/nobody"),
        ("GET", "/c2d/nobody"),
        ("DELETE", "/c2d/nobody"),
        ("GET", "/c2d/nobody/wait?sequence=1"),
    ] {
        let refused = bed.control_raw(method, path, json!({})).await;
        assert_eq!(refused.status, 404, "{method} {path}");
    }
    let path = "/c2d/leaf1/wait?sequence=1&timeout_ms=20";
    assert_eq!(bed.control("GET", path, Value::Null).await, Value::Null);
    assert!(queue(&bed).await.is_empty());
}

/// Over REST and over the control API; a PUBACK that was under way does no harm.
#[tokio::test]
async fn a_queue_is_purged() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    send(&bed, "m1").await;
    let delivery = client.delivery().await;
    let purged = bed
        .served("DELETE", "/devices/leaf1/commands", Value::Null)
        .await;
    assert_eq!(
        purged,
        json!({"deviceId": "leaf1", "moduleId": null, "totalMessagesPurged": 1})
    );
    assert_eq!(outcome(&bed, 1).await, (json!("purged"), json!(1)));
    client.acknowledge(delivery.pkid).await;
    client.expect_nothing().await;
    client.disconnect().await;
    send(&bed, "m2").await;
    let purged = bed.control("DELETE", "/c2d/leaf1", Value::Null).await;
    assert_eq!(purged, json!({"purged": 1}));
    assert_eq!(outcome(&bed, 2).await, (json!("purged"), json!(0)));
    let unknown = bed
        .service("DELETE", "/devices/nobody/commands", Value::Null)
        .await;
    assert_eq!(unknown.status, 404);
}
