//! MQTT in a WebSocket on the port of HTTPS: the same sessions as on the port of MQTT.

use mqttbytes::QoS::AtLeastOnce;
use mqttbytes::v4::ConnectReturnCode;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;
use crate::common::{Bed, HOST, PATIENCE};

const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";

async fn tls(bed: &Bed) -> TlsStream<TcpStream> {
    let socket = TcpStream::connect(bed.emulator.https_address());
    let connector = TlsConnector::from(bed.files.tls.clone());
    let name = ServerName::try_from(HOST).unwrap();
    connector
        .connect(name, socket.await.unwrap())
        .await
        .unwrap()
}

async fn connect(bed: &Bed, hello: &Hello) -> (Client, ConnectReturnCode) {
    let stream = tls(bed).await;
    let socket = edgehub_ws::connect(stream, HOST, "mqtt").await.unwrap();
    Client::over(socket).hello(hello).await
}

/// A session of one port goes on at the other one: telemetry, subscriptions, a desired patch, the
/// list of connections, the will of the control API to end it.
#[tokio::test]
async fn a_session_goes_on_over_a_websocket() {
    let bed = Bed::strict().await;
    let persistent = Hello::persistent("leaf1");
    let mut client = Client::admitted(&bed, &persistent).await;
    client.subscribe(&[DESIRED], AtLeastOnce).await;
    let (mut over_ws, code) = connect(&bed, &persistent).await;
    assert_eq!(code, ConnectReturnCode::Success);
    assert!(over_ws.session_present);
    assert_eq!(
        client.next().await,
        None,
        "the older connection is replaced"
    );

    over_ws
        .publish("devices/leaf1/messages/events/", b"in a frame", 5)
        .await;
    let ledger = bed.ledger().await;
    assert_eq!(ledger.len(), 1);
    assert_eq!(ledger[0]["device_id"], "leaf1");
    bed.served(
        "PATCH",
        "/twins/leaf1",
        json!({"properties": {"desired": {"a": 1}}}),
    )
    .await;
    let patch = over_ws.delivery().await;
    assert_eq!(
        patch.topic,
        "$iothub/twin/PATCH/properties/desired/?$version=2"
    );

    // No ping of the server's own: it would not be MQTT.
    over_ws.expect_nothing().await;
    let connections = bed.control("GET", "/connections", Value::Null).await;
    let own = &connections.as_array().unwrap()[0];
    assert_eq!(
        (&own["transport"], &own["client_id"]),
        (&json!("mqtt_ws"), &json!("leaf1"))
    );
    bed.control("DELETE", "/connections?client_id=leaf1", Value::Null)
        .await;
    assert_eq!(over_ws.next().await, None);
}

/// Refusals are MQTT's own, and a switched-off port is for WebSockets, too.
#[tokio::test]
async fn it_is_refused_as_on_the_port_of_mqtt() {
    let bed = Bed::strict().await;
    let wrong = Hello::of("leaf1").with_token(Token::of("leaf3"));
    let (mut client, code) = connect(&bed, &wrong).await;
    assert_eq!(code, ConnectReturnCode::NotAuthorized);
    assert_eq!(client.next().await, None);

    let (mut client, _) = connect(&bed, &Hello::of("leaf1")).await;
    bed.control("PUT", "/ports/https", json!({"state": "black_hole"}))
        .await;
    client.send(&[0xc0, 0]).await;
    let mut mqtt = Client::admitted(&bed, &Hello::of("leaf3")).await;
    mqtt.expect_nothing().await;
    assert!(client.is_silent(), "a black hole answered");
    bed.control("PUT", "/ports/https", json!({"state": "open"}))
        .await;
    assert_eq!(client.next().await, Some(mqttbytes::v4::Packet::PingResp));
}

/// Only a whole request for MQTT or AMQP is upgraded; everything else gets 400 and no body.
#[tokio::test]
async fn what_is_no_request_for_mqtt_or_amqp_is_refused() {
    let bed = Bed::strict().await;
    let good = [
        ("Connection", "keep-alive, Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", "other, MQTT"),
    ];
    let accepted = request(&bed, &good).await;
    assert!(accepted.starts_with("HTTP/1.1 101 "), "{accepted}");
    assert!(
        accepted.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "{accepted}"
    );
    assert!(
        accepted.contains("sec-websocket-protocol: mqtt\r\n"),
        "{accepted}"
    );
    for (index, (name, _)) in good.iter().enumerate() {
        let mut headers = good.to_vec();
        headers.remove(index);
        let answer = request(&bed, &headers).await;
        assert!(
            answer.starts_with("HTTP/1.1 400 "),
            "without {name}: {answer}"
        );
    }
    let mut other = good;
    other[4].1 = "amqpwsb10";
    let answer = request(&bed, &other).await;
    assert!(
        answer.contains("sec-websocket-protocol: AMQPWSB10\r\n"),
        "{answer}"
    );
    other[4].1 = "amqp";
    let answer = request(&bed, &other).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

/// The head of the answer.
async fn request(bed: &Bed, headers: &[(&str, &str)]) -> String {
    let mut stream = tls(bed).await;
    let mut text = format!("GET /$iothub/websocket HTTP/1.1\r\nHost: {HOST}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = timeout(PATIENCE, stream.read_u8()).await.unwrap();
        answer.push(byte.unwrap());
    }
    String::from_utf8(answer).unwrap()
}
