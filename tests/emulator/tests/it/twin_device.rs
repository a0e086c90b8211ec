//! Twins, as a device or module sees them.

use std::sync::Arc;

use mqttbytes::QoS::{AtLeastOnce, AtMostOnce};
use mqttbytes::v4::Packet;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};

const RESPONSES: &str = "$iothub/twin/res/#";
const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";

fn json_of(body: &[u8]) -> Value {
    serde_json::from_slice(body).unwrap()
}

/// A twin request at QoS 0; the topic and body of the answer.
async fn ask(client: &mut Client, topic: &str, body: &str) -> (String, Vec<u8>) {
    client
        .send(&publish(topic, AtMostOnce, 0, body.as_bytes()))
        .await;
    let answer = client.delivery().await;
    assert_eq!(
        (answer.qos, answer.dup, answer.retain),
        (AtMostOnce, false, false)
    );
    (answer.topic, answer.payload.to_vec())
}

async fn get(client: &mut Client, rid: &str) -> Value {
    let (topic, body) = ask(client, &format!("$iothub/twin/GET/?$rid={rid}"), " ").await;
    assert_eq!(topic, format!("$iothub/twin/res/200/?$rid={rid}"));
    json_of(&body)
}

async fn patch(client: &mut Client, body: &str) -> (String, Vec<u8>) {
    let topic = "$iothub/twin/PATCH/properties/reported/?$rid=p%2F1";
    let (topic, body) = ask(client, topic, body).await;
    let rest = topic.strip_prefix("$iothub/twin/res/").unwrap();
    (rest.to_owned(), body)
}

async fn subscribed(bed: &Bed, hello: &Hello) -> Client {
    let mut client = Client::admitted(bed, hello).await;
    client.subscribe(&[RESPONSES], AtLeastOnce).await;
    client
}

/// Devices, modules, and both through an edge device that acts for them.
#[tokio::test]
async fn everybody_gets_and_patches_the_own_twin() {
    let bed = Bed::strict().await;
    for hello in [
        Hello::of("leaf1"),
        Hello::of("edge1/modA"),
        Hello::of("edge1/$edgeHub"),
        Hello::through("edge2/$edgeHub;edge2;edge1"),
        Hello::through("leaf3;edge3;edge2;edge1"),
        Hello::through("edge3/modA;edge3;edge2;edge1"),
    ] {
        let id = hello.client_id.clone();
        let mut client = subscribed(&bed, &hello).await;
        let fresh = json!({"desired": {"$version": 1}, "reported": {"$version": 1}});
        assert_eq!(get(&mut client, "1").await, fresh, "{id}");
        let answer = patch(&mut client, &json!({"id": id, "gone": 1}).to_string()).await;
        assert_eq!(answer, ("204/?$rid=p%2F1&$version=2".to_owned(), vec![]));
        let answer = patch(&mut client, r#"{"gone":null,"in":{"x":[1]}}"#).await;
        assert_eq!(answer.0, "204/?$rid=p%2F1&$version=3");
        assert_eq!(
            get(&mut client, "a-b").await,
            json!({"desired": {"$version": 1},
                "reported": {"id": id, "in": {"x": [1]}, "$version": 3}})
        );
    }
}

/// The device's own connection and one on its behalf have one twin.
#[tokio::test]
async fn an_actor_sees_the_twin_of_its_target() {
    let bed = Bed::strict().await;
    let mut own = subscribed(&bed, &Hello::of("leaf1")).await;
    patch(&mut own, r#"{"fw":"1.2"}"#).await;
    let mut through = subscribed(&bed, &Hello::through("leaf1;edge2;edge1")).await;
    assert_eq!(
        get(&mut through, "1").await["reported"],
        json!({"fw": "1.2", "$version": 2})
    );
    let mut other = subscribed(&bed, &Hello::through("leaf1/m1;leaf1;edge2;edge1")).await;
    assert_eq!(
        get(&mut other, "1").await["reported"],
        json!({"$version": 1})
    );
}

/// Requests at QoS 1 are acknowledged, and the answer is at QoS 0 all the same.
#[tokio::test]
async fn requests_at_qos_1_get_a_puback_too() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let request = publish("$iothub/twin/GET/?$rid=7", AtLeastOnce, 5, b" ");
    client.send(&request).await;
    let (mut answers, mut acks) = (0, 0);
    for _ in 0..2 {
        match client.next().await {
            Some(Packet::PubAck(ack)) if ack.pkid == 5 => acks += 1,
            Some(Packet::Publish(answer)) => {
                assert_eq!(answer.topic, "$iothub/twin/res/200/?$rid=7");
                assert_eq!(answer.qos, AtMostOnce);
                answers += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((answers, acks), (1, 1));
}

/// Far more answers than the hub holds at a time: 2,000 small requests in one write for a twin of
/// 20 KB, with a message in between. All are answered, in order.
#[tokio::test]
async fn many_requests_at_once_are_answered_in_order() {
    const REQUESTS: usize = 2_000;
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let texts: Value = (0..5)
        .map(|n| (format!("k{n}"), json!("x".repeat(4_000))))
        .collect();
    patch(&mut client, &texts.to_string()).await;
    let mut bytes = Vec::new();
    for rid in 0..REQUESTS {
        let topic = format!("$iothub/twin/GET/?$rid={rid}");
        bytes.extend(publish(&topic, AtMostOnce, 0, b""));
    }
    bytes.extend(publish(
        "devices/leaf1/messages/events/",
        AtLeastOnce,
        9,
        b"last",
    ));
    client.send(&bytes).await;
    for rid in 0..REQUESTS {
        let answer = client.delivery().await;
        assert_eq!(answer.topic, format!("$iothub/twin/res/200/?$rid={rid}"));
        assert!(answer.payload.len() > 20_000);
    }
    assert!(matches!(client.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 9));
    assert_eq!(bed.ledger().await.len(), 1);
}

#[tokio::test]
async fn bad_patches_are_refused_and_change_nothing() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let deep = (0..11).fold("1".to_owned(), |inner, _| format!(r#"{{"a":{inner}}}"#));
    let deep = format!(r#"{{"a":{deep}}}"#);
    let long = json!({"a": "x".repeat(4_097)}).to_string();
    let texts: Vec<String> = (0..9).map(|_| "x".repeat(4_000)).collect();
    let large: Value = (0..9).map(|n| (format!("k{n}"), json!(texts[n]))).collect();
    let large = large.to_string();
    for bad in [
        "",
        "x",
        "[1]",
        "null",
        r#"{"a":1"#,
        r#"{"$a":1}"#,
        r#"{"$version":9}"#,
        r#"{"a.b":1}"#,
        r#"{"a b":1}"#,
        r#"{"a":{"":1}}"#,
        r#"{"a":4503599627370496}"#,
        r#"{"a":[null]}"#,
        &deep,
        &long,
        &large,
    ] {
        let (topic, body) = patch(&mut client, bad).await;
        assert_eq!(topic, "400/?$rid=p%2F1", "{bad:.80}");
        let error = json_of(&body);
        assert_eq!(error["errorCode"], 400_004, "{error}");
        for member in ["trackingId", "message", "timestampUtc"] {
            assert!(!error[member].as_str().unwrap().is_empty(), "{error}");
        }
    }
    assert_eq!(
        get(&mut client, "1").await["reported"],
        json!({"$version": 1})
    );
}

/// Many small patches reach the limit of the merged document.
#[tokio::test]
async fn the_whole_section_has_a_limit() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let text = "x".repeat(4_000);
    let mut accepted = 0;
    loop {
        let body = json!({format!("k{accepted}"): text}).to_string();
        let (topic, _) = patch(&mut client, &body).await;
        if topic.starts_with("400") {
            break;
        }
        accepted += 1;
    }
    assert_eq!(
        accepted, 8,
        "8 x 4,000 bytes and their keys fit into 32 KiB"
    );
    let (topic, _) = patch(&mut client, r#"{"k0":null}"#).await;
    assert!(topic.starts_with("204"), "{topic}");
}

#[tokio::test]
async fn a_version_guards_a_patch() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    for (version, status) in [(2, 412), (0, 412), (1, 204), (1, 412), (2, 204)] {
        let topic = format!("$iothub/twin/PATCH/properties/reported/?$rid=1&$version={version}");
        let (topic, body) = ask(&mut client, &topic, "{}").await;
        let wanted = format!("$iothub/twin/res/{status}/?$rid=1");
        assert!(topic.starts_with(&wanted), "{version}: {topic}");
        if status == 412 {
            assert_eq!(json_of(&body)["errorCode"], 412_001);
        }
    }
}

/// An empty patch counts: versions grow even if nothing changes.
#[tokio::test]
async fn an_empty_patch_grows_the_version() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let (topic, _) = patch(&mut client, "{}").await;
    assert_eq!(topic, "204/?$rid=p%2F1&$version=2");
}

#[tokio::test]
async fn answers_go_to_subscribers_only() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let request = publish("$iothub/twin/GET/?$rid=1", AtMostOnce, 0, b"");
    client.send(&request).await;
    client.expect_nothing().await;
    client.subscribe(&[RESPONSES], AtMostOnce).await;
    get(&mut client, "2").await;
    client.unsubscribe(RESPONSES).await;
    client.send(&request).await;
    client.expect_nothing().await;
}

/// The next twin requests fail on order, with the body that Node reads.
#[tokio::test]
async fn twin_requests_fail_on_order() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::of("leaf1")).await;
    let order = json!({"kind": "twin", "count": 2, "code": 429});
    bed.control("POST", "/faults", order).await;
    let (topic, body) = ask(&mut client, "$iothub/twin/GET/?$rid=1", "").await;
    assert_eq!(topic, "$iothub/twin/res/429/?$rid=1");
    assert_eq!(json_of(&body)["errorCode"], 429_001);
    let (topic, _) = patch(&mut client, r#"{"a":1}"#).await;
    assert_eq!(topic, "429/?$rid=p%2F1");
    assert_eq!(
        get(&mut client, "1").await["reported"],
        json!({"$version": 1})
    );
}

/// Patches of the service side, to who is subscribed, in order, with `$version` in topic and
/// body; nothing is kept for later.
#[tokio::test]
async fn desired_patches_are_pushed() {
    let bed = Bed::strict().await;
    let desired = |patch: Value| json!({"properties": {"desired": patch}});
    for (hello, path) in [
        (Hello::of("leaf1"), "/twins/leaf1"),
        (
            Hello::through("edge3/modA;edge3;edge2;edge1"),
            "/twins/edge3/modules/modA",
        ),
    ] {
        let mut client = Client::admitted(&bed, &hello).await;
        bed.served("PATCH", path, desired(json!({"early": 1})))
            .await;
        client.expect_nothing().await;
        client.subscribe(&[DESIRED], AtLeastOnce).await;
        let body = json!({"a": {"b": 1}, "early": null});
        bed.served("PATCH", path, desired(body)).await;
        bed.served("PUT", path, desired(json!({"c": 2}))).await;
        bed.served("PATCH", path, json!({"tags": {"t": 1}})).await;
        let notice = client.delivery().await;
        assert_eq!(
            notice.topic,
            "$iothub/twin/PATCH/properties/desired/?$version=3"
        );
        assert_eq!((notice.qos, notice.retain), (AtMostOnce, false));
        assert_eq!(
            json_of(&notice.payload),
            json!({"a": {"b": 1}, "early": null, "$version": 3})
        );
        let notice = client.delivery().await;
        assert_eq!(
            notice.topic,
            "$iothub/twin/PATCH/properties/desired/?$version=4"
        );
        assert_eq!(json_of(&notice.payload), json!({"c": 2, "$version": 4}));
        client.expect_nothing().await;
        client.unsubscribe(DESIRED).await;
        bed.served("PATCH", path, desired(json!({"late": 1}))).await;
        client.expect_nothing().await;
    }
}

/// Whoever patches at the same time: the device sees the versions in order.
#[tokio::test]
async fn desired_patches_keep_their_order() {
    let bed = Arc::new(Bed::strict().await);
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.subscribe(&[DESIRED], AtMostOnce).await;
    let mut callers = JoinSet::new();
    for number in 0..20 {
        let bed = bed.clone();
        callers.spawn(async move {
            let body = json!({"properties": {"desired": {"n": number}}});
            bed.served("PATCH", "/twins/leaf1", body).await
        });
    }
    for version in 2..=21 {
        let topic = client.delivery().await.topic;
        assert!(topic.ends_with(&format!("?$version={version}")), "{topic}");
    }
    callers.join_all().await;
}
