//! The control API.

use std::io::ErrorKind;
use std::time::Duration;

use mqttbytes::QoS;
use mqttbytes::v4::{ConnectReturnCode, Packet};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::common::mqtt::{Client, Hello, publish};
use crate::common::token::Token;
use crate::common::{Bed, lines};

const TOPIC: &str = "devices/leaf1/messages/events/";

/// Long enough that an answer on loopback would have come.
const A_MOMENT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn health_and_readiness() {
    let bed = Bed::strict().await;
    assert_eq!(
        bed.control("GET", "/healthz", Value::Null).await,
        json!({"status": "ok"})
    );
    assert_eq!(
        bed.control("GET", "/readyz", Value::Null).await,
        json!({"ready": true})
    );
    bed.control("PUT", "/ports/https", json!({"state": "refused"}))
        .await;
    assert_eq!(
        bed.control_raw("GET", "/readyz", Value::Null).await.status,
        503
    );
    assert_eq!(
        bed.control_raw("GET", "/nothing", Value::Null).await.status,
        404
    );
}

#[tokio::test]
async fn the_ledger_is_dumped_counted_and_awaited() {
    let bed = Bed::strict().await;
    let none = bed
        .control("GET", "/ledger/wait?count=1&timeout_ms=50", Value::Null)
        .await;
    assert_eq!(none, json!({"count": 0, "reached": false}));
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let waiting = bed.control("GET", "/ledger/wait?count=3", Value::Null);
    let sending = async {
        for number in 1..=3_u8 {
            client.publish(TOPIC, &[number], number.into()).await;
        }
    };
    let (reached, ()) = tokio::join!(waiting, sending);
    assert_eq!(reached, json!({"count": 3, "reached": true}));
    assert_eq!(
        bed.control("GET", "/ledger/count", Value::Null).await,
        json!({"count": 3})
    );
    let answer = bed.control_raw("GET", "/ledger?from=1", Value::Null).await;
    assert_eq!(answer.headers["content-type"], "application/x-ndjson");
    assert_eq!(answer.headers["x-ledger-count"], "3");
    let sequences: Vec<_> = lines(&answer.text())
        .iter()
        .map(|l| l["sequence"].clone())
        .collect();
    assert_eq!(sequences, [1, 2]);
    assert_eq!(
        bed.control_raw("GET", "/ledger?from=3", Value::Null)
            .await
            .text(),
        ""
    );
    for path in [
        "/ledger?from=x",
        "/ledger?form=1",
        "/ledger/wait",
        "/ledger/wait?count=-1",
    ] {
        let refused = bed.control_raw("GET", path, Value::Null).await;
        assert_eq!(refused.status, 400, "{path}");
        assert!(refused.json()["error"].is_string());
    }
}

#[tokio::test]
async fn connections_are_listed_and_killed() {
    let bed = Bed::strict().await;
    let mut leaf1 = Client::admitted(&bed, &Hello::through("leaf1;edge2;edge1")).await;
    let mut leaf3 = Client::admitted(&bed, &Hello::of("leaf3")).await;
    let mut leaf0 = Client::admitted(&bed, &Hello::of("leaf0")).await;
    let list = bed.control("GET", "/connections", Value::Null).await;
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 3);
    let first = &list[0];
    assert_eq!(first["transport"], "mqtt");
    assert_eq!(first["client_id"], "leaf1");
    assert_eq!(first["auth_chain"], "leaf1;edge2;edge1");
    assert_eq!(list[1]["auth_chain"], Value::Null);
    assert!(first["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert!(
        first["connected_since_utc"]
            .as_str()
            .unwrap()
            .ends_with('Z')
    );

    let path = format!("/connections/{}", first["id"]);
    assert_eq!(
        bed.control("DELETE", &path, Value::Null).await,
        json!({"killed": 1})
    );
    assert_eq!(leaf1.next().await, None);
    assert_eq!(
        bed.control_raw("DELETE", &path, Value::Null).await.status,
        404
    );
    let by_name = bed
        .control("DELETE", "/connections?client_id=leaf3", Value::Null)
        .await;
    assert_eq!(by_name, json!({"killed": 1}));
    assert_eq!(leaf3.next().await, None);
    assert_eq!(
        bed.control("DELETE", "/connections", Value::Null).await,
        json!({"killed": 1})
    );
    assert_eq!(leaf0.next().await, None);
    assert_eq!(
        bed.control("GET", "/connections", Value::Null).await,
        json!([])
    );
}

/// A black hole: old connections stall and go on, new ones are accepted and not answered.
#[tokio::test]
async fn a_black_holed_port_answers_nobody_until_it_is_healed() {
    let bed = Bed::strict().await;
    let mut old = Client::admitted(
        &bed,
        &Hello {
            keep_alive: 1,
            ..Hello::of("leaf1")
        },
    )
    .await;
    let state = bed
        .control("PUT", "/ports/mqtt", json!({"state": "black_hole"}))
        .await;
    assert_eq!(state["mqtt"]["state"], "black_hole");
    assert_eq!(state["https"]["state"], "open");
    old.send(&publish(TOPIC, QoS::AtLeastOnce, 1, b"through the hole"))
        .await;
    assert!(timeout(A_MOMENT, old.next()).await.is_err());
    let new = tokio::spawn({
        let (address, tls) = (bed.mqtt(), bed.files.tls.clone());
        async move {
            let socket = TcpStream::connect(address).await.unwrap();
            let name = rustls_pki_types::ServerName::try_from("hub.lab.example").unwrap();
            tokio_rustls::TlsConnector::from(tls)
                .connect(name, socket)
                .await
        }
    });
    // Longer than 1.5 times the keep-alive: the hub must not send a FIN through the hole either.
    assert!(
        timeout(Duration::from_millis(2_000), old.next())
            .await
            .is_err()
    );
    assert!(!new.is_finished(), "accepted, but no TLS");
    assert_eq!(
        bed.control("GET", "/ledger/count", Value::Null).await,
        json!({"count": 0})
    );
    let (path, token) = ("/devices?api-version=2021-04-12", Token::of("x"));
    let get = bed.https("GET", path, &token, Value::Null);
    assert_eq!(get.await.status, 401, "the other port works");

    bed.control("PUT", "/ports/mqtt", json!({"state": "open"}))
        .await;
    assert!(matches!(old.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 1));
    new.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_in_a_black_hole_can_be_killed() {
    let bed = Bed::strict().await;
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    bed.control("PUT", "/ports/mqtt", json!({"state": "black_hole"}))
        .await;
    client
        .send(&publish(TOPIC, QoS::AtLeastOnce, 1, b"lost"))
        .await;
    assert_eq!(
        bed.control("DELETE", "/connections", Value::Null).await,
        json!({"killed": 1})
    );
    assert_eq!(client.next().await, None);
    bed.control("PUT", "/ports/mqtt", json!({"state": "open"}))
        .await;
    assert_eq!(
        bed.control("GET", "/ledger/count", Value::Null).await,
        json!({"count": 0})
    );
}

#[tokio::test]
async fn a_refused_port_has_no_listener_until_it_is_healed() {
    let bed = Bed::strict().await;
    let mut old = Client::admitted(&bed, &Hello::of("leaf1")).await;
    for _ in 0..3 {
        bed.control("PUT", "/ports/mqtt", json!({"state": "refused"}))
            .await;
        let refused = TcpStream::connect(bed.mqtt()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        old.publish(TOPIC, b"existing connections go on", 1).await;
        bed.control("PUT", "/ports/mqtt", json!({"state": "open"}))
            .await;
        Client::admitted(&bed, &Hello::of("leaf3")).await;
    }
    assert_eq!(
        bed.control_raw("PUT", "/ports/coap", json!({"state": "open"}))
            .await
            .status,
        404
    );
    assert_eq!(
        bed.control_raw("PUT", "/ports/mqtt", json!({"state": "odd"}))
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn the_next_connects_and_publishes_fail_on_order() {
    let bed = Bed::strict().await;
    bed.control("POST", "/faults", json!({"kind": "connect", "count": 2}))
        .await;
    for _ in 0..2 {
        let (_, code) = Client::connect(&bed, &Hello::of("leaf1")).await;
        assert_eq!(code, ConnectReturnCode::ServiceUnavailable);
    }
    bed.control(
        "POST",
        "/faults",
        json!({"kind": "connect", "count": 1, "code": 5}),
    )
    .await;
    let (_, code) = Client::connect(&bed, &Hello::of("leaf1")).await;
    assert_eq!(code, ConnectReturnCode::NotAuthorized);
    let client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    bed.control("POST", "/faults", json!({"kind": "publish", "count": 1}))
        .await;
    client
        .expect_close_after(&publish(TOPIC, QoS::AtLeastOnce, 1, b"x"))
        .await;
    assert_eq!(
        bed.control("GET", "/ledger/count", Value::Null).await,
        json!({"count": 0})
    );
    let mut client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client.publish(TOPIC, b"x", 1).await;
}

#[tokio::test]
async fn the_next_https_calls_fail_on_order() {
    let bed = Bed::strict().await;
    let registry = json!({"kind": "registry", "count": 1, "code": 429});
    bed.control("POST", "/faults", registry.clone()).await;
    let orders = bed
        .control("POST", "/faults", json!({"kind": "scope", "count": 2}))
        .await;
    assert_eq!(
        orders,
        json!([registry, {"kind": "scope", "count": 2, "code": null}])
    );
    let list = "/devices?api-version=2021-04-12";
    let owner = Token::of_policy("iothubowner");
    let failed = bed.https("GET", list, &owner, Value::Null).await;
    assert_eq!(
        (failed.status, failed.headers["retry-after"].as_bytes()),
        (429, &b"1"[..])
    );
    assert_eq!(
        bed.https("GET", list, &owner, Value::Null).await.status,
        200
    );
    let scope = "/devices/edge1/modules/$edgeHub/devicesAndModulesInTargetDeviceScope\
        ?api-version=2020-06-30-preview";
    let body = json!({"pageSize": 10, "authChain": "edge1"});
    let hub = Token::of_hub("edge1");
    assert_eq!(
        bed.https("POST", scope, &hub, body.clone()).await.status,
        500
    );
    assert_eq!(
        bed.control("DELETE", "/faults", Value::Null).await,
        json!([])
    );
    assert_eq!(bed.https("POST", scope, &hub, body).await.status, 200);
    for bad in [
        json!({"kind": "connect", "count": 1, "code": 6}),
        json!({"kind": "publish", "count": 1, "code": 5}),
        json!({"kind": "scope", "count": 1, "code": 200}),
        json!({"kind": "amqp", "count": 1}),
        json!({"kind": "twin", "count": 1, "code": 204}),
        json!({"kind": "scope"}),
    ] {
        assert_eq!(
            bed.control_raw("POST", "/faults", bad.clone()).await.status,
            400,
            "{bad}"
        );
    }
}

#[tokio::test]
async fn the_clock_moves() {
    let bed = Bed::strict().await;
    bed.clock(86_400).await;
    let clock = bed.control("GET", "/clock", Value::Null).await;
    assert_eq!(clock["offset_ms"], 86_400_000);
    let token = Token {
        expires_at: crate::common::now_secs() + 90_000,
        ..Token::of("leaf1")
    };
    let mut client = Client::admitted(&bed, &Hello::of("leaf1").with_token(token)).await;
    client.publish(TOPIC, b"tomorrow", 1).await;
    let line = bed.ledger().await.remove(0);
    assert!(
        line["enqueued_utc"].as_str() >= clock["utc"].as_str(),
        "{line} {clock}"
    );
}
