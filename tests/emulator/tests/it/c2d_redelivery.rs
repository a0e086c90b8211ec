//! Cloud-to-device messages whose connection ends before the PUBACK.

use mqttbytes::QoS::AtLeastOnce;
use serde_json::json;

use crate::c2d::{LEAF1, outcome, queue, send};
use crate::common::Bed;
use crate::common::mqtt::{Client, Hello};

async fn subscribed(bed: &Bed, hello: &Hello) -> Client {
    let mut client = Client::admitted(bed, hello).await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    client
}

/// The persistent session: unacknowledged ones first, with their ids and DUP (MQTT-4.4.0-1), then
/// what has come meanwhile; without a SUBSCRIBE.
#[tokio::test]
async fn a_session_that_goes_on_gets_its_unacknowledged_messages() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::persistent("leaf1")).await;
    for id in ["m1", "m2", "m3"] {
        send(&bed, id).await;
        client.delivery().await;
    }
    client.acknowledge(2).await;
    assert_eq!(outcome(&bed, 2).await, (json!("completed"), json!(1)));
    client.disconnect().await;
    send(&bed, "m4").await;
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    assert!(client.session_present);
    for (id, packet_id, dup) in [("m1", 1, true), ("m3", 3, true), ("m4", 4, false)] {
        let delivery = client.delivery().await;
        assert_eq!(delivery.payload, format!("body of {id}"));
        assert_eq!((delivery.pkid, delivery.dup), (packet_id, dup), "{id}");
        client.acknowledge(packet_id).await;
    }
    for (sequence, deliveries) in [(1, 2), (3, 2), (4, 1)] {
        let settled = outcome(&bed, sequence).await;
        assert_eq!(settled, (json!("completed"), json!(deliveries)));
    }
}

/// A new session: the messages come again, as new deliveries.
#[tokio::test]
async fn a_clean_session_gets_them_as_new() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::persistent("leaf1")).await;
    let sequence = send(&bed, "m1").await;
    client.delivery().await;
    drop(client);
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    assert!(!client.session_present);
    client.expect_nothing().await;
    client.subscribe(&[LEAF1], AtLeastOnce).await;
    let delivery = client.delivery().await;
    assert_eq!((delivery.pkid, delivery.dup), (2, false));
    client.acknowledge(delivery.pkid).await;
    assert_eq!(
        outcome(&bed, sequence).await,
        (json!("completed"), json!(2))
    );
}

/// A takeover is an end as well: the new connection gets what the old one has not acknowledged,
/// and a PUBACK of the old one does not count any more.
#[tokio::test]
async fn a_newer_connection_gets_them_at_once() {
    let bed = Bed::strict().await;
    let mut old = subscribed(&bed, &Hello::persistent("leaf1")).await;
    let sequence = send(&bed, "m1").await;
    old.delivery().await;
    let mut new = Client::admitted(
        &bed,
        &Hello {
            clean: false,
            ..Hello::through("leaf1;edge2;edge1")
        },
    )
    .await;
    assert!(new.session_present);
    let delivery = new.delivery().await;
    assert_eq!((delivery.pkid, delivery.dup), (1, true));
    assert_eq!(old.next().await, None);
    assert_eq!(queue(&bed).await, [(json!("invisible"), json!(2))]);
    new.acknowledge(1).await;
    assert_eq!(
        outcome(&bed, sequence).await,
        (json!("completed"), json!(2))
    );
}

/// Ten deliveries without a PUBACK: dead-lettered, and whoever comes then gets nothing.
#[tokio::test]
async fn ten_deliveries_are_the_most() {
    let bed = Bed::strict().await;
    let sequence = send(&bed, "poison").await;
    for delivery in 1..=10_u32 {
        let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
        if delivery == 1 {
            client.subscribe(&[LEAF1], AtLeastOnce).await;
        }
        let received = client.delivery().await;
        assert_eq!((received.pkid, received.dup), (1, delivery > 1));
        assert_eq!(queue(&bed).await, [(json!("invisible"), json!(delivery))]);
        client.disconnect().await;
    }
    assert_eq!(
        outcome(&bed, sequence).await,
        (json!("dead_lettered"), json!(10))
    );
    assert!(queue(&bed).await.is_empty());
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    client.expect_nothing().await;
}

/// A message that expires between two connections is not redelivered.
#[tokio::test]
async fn an_unacknowledged_message_expires_too() {
    let bed = Bed::strict().await;
    let mut client = subscribed(&bed, &Hello::persistent("leaf1")).await;
    let body = json!({"message_id": "short", "ttl_ms": 30_000});
    bed.control("POST", "/c2d/leaf1", body).await;
    client.delivery().await;
    client.disconnect().await;
    bed.clock(31).await;
    assert_eq!(outcome(&bed, 1).await, (json!("expired"), json!(1)));
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    client.expect_nothing().await;
}

/// A deleted device takes its messages along.
#[tokio::test]
async fn messages_end_with_their_device() {
    let bed = Bed::strict().await;
    send(&bed, "m1").await;
    let owner = crate::common::token::Token::of_policy("iothubowner");
    let path = "/devices/leaf1?api-version=2021-04-12";
    bed.https("DELETE", path, &owner, json!(null)).await;
    let gone = bed.control_raw("GET", "/c2d/leaf1", json!(null)).await;
    assert_eq!(gone.status, 404);
    let put = bed.https("PUT", path, &owner, json!({"deviceId": "leaf1"}));
    assert_eq!(put.await.status, 200);
    let overview = bed.control("GET", "/c2d/leaf1", json!(null)).await;
    assert_eq!(overview, json!({"queue": [], "outcomes": []}));
    assert_eq!(send(&bed, "m2").await, 1);
}
