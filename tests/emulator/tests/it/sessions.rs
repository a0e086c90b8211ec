//! MQTT sessions: session-present, what outlives a connection, what does not.

use mqttbytes::QoS::{AtLeastOnce, AtMostOnce};
use mqttbytes::v4::SubscribeReasonCode::{Failure, Success};
use serde_json::{Value, json};

use crate::common::Bed;
use crate::common::mqtt::{Client, Hello, publish};
use crate::common::token::Token;

const RESPONSES: &str = "$iothub/twin/res/#";
const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";

async fn subscriptions(bed: &Bed, id: &str) -> Value {
    let sessions = bed.control("GET", "/sessions", Value::Null).await;
    let sessions = sessions.as_array().unwrap();
    let found = sessions.iter().find(|session| session["client_id"] == id);
    found.map_or(Value::Null, |session| session["subscriptions"].clone())
}

/// Rows: whether the connections before were persistent, whether this one is, what its CONNACK
/// says.
#[tokio::test]
async fn session_present_is_right() {
    let bed = Bed::strict().await;
    for (id, connects) in [
        ("leaf1", &[(false, false), (false, true), (false, true)][..]),
        ("leaf0", &[(true, false), (true, false), (false, false)]),
        (
            "leaf3",
            &[
                (false, false),
                (true, false),
                (false, false),
                (false, true),
                (true, false),
                (true, false),
            ],
        ),
        ("edge1/modA", &[(false, false), (false, true)]),
    ] {
        for (at, (clean, present)) in connects.iter().enumerate() {
            let hello = Hello {
                clean: *clean,
                ..Hello::of(id)
            };
            let client = Client::admitted(&bed, &hello).await;
            assert_eq!(client.session_present, *present, "{id} {at}");
            client.disconnect().await;
        }
    }
    // With a refusal it is never set.
    let (client, _) = Client::connect(
        &bed,
        &Hello::persistent("leaf1").with_token(Token::of("leaf3")),
    )
    .await;
    assert!(!client.session_present);
}

/// What Python and Node rely on: the subscriptions are there before the first packet, after a
/// polite end, a dropped socket and a takeover; also when a hub takes over for its leaf.
#[tokio::test]
async fn subscriptions_outlive_the_connection() {
    let bed = Bed::strict().await;
    let persistent = Hello::persistent("leaf1");
    let through = Hello {
        clean: false,
        ..Hello::through("leaf1;edge2;edge1")
    };
    let mut client = Client::admitted(&bed, &persistent).await;
    client.subscribe(&[RESPONSES], AtMostOnce).await;
    client.subscribe(&[DESIRED], AtLeastOnce).await;
    let mut previous = None;
    for (at, hello) in [&persistent, &through, &through, &persistent]
        .into_iter()
        .enumerate()
    {
        match at % 3 {
            0 => client.disconnect().await,
            1 => drop(client),
            _ => previous = Some(client),
        }
        client = Client::admitted(&bed, hello).await;
        assert!(client.session_present, "{at}");
        let body = json!({"properties": {"desired": {"at": at}}});
        bed.served("PATCH", "/twins/leaf1", body).await;
        let notice = client.delivery().await;
        assert!(
            notice
                .topic
                .starts_with("$iothub/twin/PATCH/properties/desired/")
        );
        let request = publish("$iothub/twin/GET/?$rid=1", AtMostOnce, 0, b" ");
        client.send(&request).await;
        assert_eq!(
            client.delivery().await.topic,
            "$iothub/twin/res/200/?$rid=1"
        );
        if let Some(mut previous) = previous.take() {
            assert_eq!(previous.next().await, None);
        }
    }
    // An UNSUBSCRIBE outlives it too.
    client.unsubscribe(DESIRED).await;
    client.disconnect().await;
    let mut client = Client::admitted(&bed, &persistent).await;
    let body = json!({"properties": {"desired": {"late": 1}}});
    bed.served("PATCH", "/twins/leaf1", body).await;
    client.expect_nothing().await;
}

#[tokio::test]
async fn a_clean_session_ends_what_was_there() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    client.subscribe(&[RESPONSES, DESIRED], AtLeastOnce).await;
    client.disconnect().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    assert_eq!(subscriptions(&bed, "leaf1").await, json!([]));
    client.subscribe(&[DESIRED], AtLeastOnce).await;
    client.disconnect().await;
    assert_eq!(
        subscriptions(&bed, "leaf1").await,
        Value::Null,
        "it ends with its connection"
    );
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    let body = json!({"properties": {"desired": {"a": 1}}});
    bed.served("PATCH", "/twins/leaf1", body).await;
    client.expect_nothing().await;
}

/// A SUBSCRIBE for the same filter replaces the QoS; what was refused is not kept.
#[tokio::test]
async fn subscriptions_are_replaced_and_listed() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::persistent("leaf1")).await;
    let c2d = "devices/leaf1/messages/devicebound/#";
    let granted = client.subscribe(&[c2d, "foo", DESIRED], AtLeastOnce).await;
    assert_eq!(
        granted,
        [Success(AtLeastOnce), Failure, Success(AtLeastOnce)]
    );
    client.subscribe(&[c2d], AtMostOnce).await;
    let wanted = json!([
        {"filter": DESIRED, "qos": 1},
        {"filter": c2d, "qos": 0},
    ]);
    assert_eq!(subscriptions(&bed, "leaf1").await, wanted);
    let connections = bed.control("GET", "/connections", Value::Null).await;
    assert_eq!(connections[0]["subscriptions"], wanted);
    let sessions = bed.control("GET", "/sessions", Value::Null).await;
    assert_eq!(
        sessions,
        json!([{"client_id": "leaf1", "persistent": true,
            "connection": connections[0]["id"], "subscriptions": wanted}])
    );
    client.disconnect().await;
    let sessions = bed.control("GET", "/sessions", Value::Null).await;
    assert_eq!(sessions[0]["connection"], Value::Null);
    assert_eq!(sessions[0]["subscriptions"], wanted);
}

/// A deleted identity takes its session along.
#[tokio::test]
async fn a_session_ends_with_its_identity() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::persistent("edge1/modA")).await;
    client.subscribe(&[DESIRED], AtLeastOnce).await;
    let owner = Token::of_policy("iothubowner");
    let path = "/devices/edge1/modules/modA?api-version=2021-04-12";
    bed.https("DELETE", path, &owner, Value::Null).await;
    assert_eq!(client.next().await, None);
    assert_eq!(subscriptions(&bed, "edge1/modA").await, Value::Null);
}

/// A client that subscribes and never reads does not grow the hub without bound: its connection
/// ends, and the others go on.
#[tokio::test]
async fn a_client_that_does_not_read_is_closed() {
    let bed = Bed::strict().await;
    let mut deaf = Client::admitted(&bed, &Hello::of("leaf1")).await;
    deaf.subscribe(&[DESIRED], AtLeastOnce).await;
    let text = "x".repeat(4_000);
    let members: Value = (0..7).map(|n| (format!("k{n}"), json!(text))).collect();
    let body = json!({"properties": {"desired": members}});
    let gone = |list: &Value| {
        let list = list.as_array().unwrap();
        list.iter().all(|one| one["client_id"] != "leaf1")
    };
    for sent in 0.. {
        assert!(sent < 2_000, "{sent} patches of 28 KB wait somewhere");
        bed.served("PATCH", "/twins/leaf1", body.clone()).await;
        if sent % 20 == 0 && gone(&bed.control("GET", "/connections", Value::Null).await) {
            break;
        }
    }
    let mut client = Client::admitted(&bed, &Hello::of("leaf3")).await;
    client.expect_nothing().await;
}
