//! The MQTT side's parts 7 and 9: the hub's own twin as the source of its routes, and MQTT over
//! WebSocket through a proxy upstream.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "these are the tests"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use edgehub_lab::{AtStart, HUB, Lab, LabBuilder};
use edgehub_tests::mqtt::{Door, Hello, MqttClient};
use edgehub_tests::only_these_arrive;
use edgehub_tests::packets::publish;
use edgehub_tests::service::{METHODS, Service};
use mqttbytes::QoS;
use mqttbytes::v4::Packet;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

const OWN: &str = "edge1/$edgeHub";
const TELEMETRY: &str = "devices/leaf1/messages/events/";

async fn publish_one(lab: &Lab, body: &str) -> MqttClient {
    let door = Door::of(lab, "edge1");
    let mut leaf = door.admitted(&Hello::of(lab, "leaf1")).await;
    leaf.publish(TELEMETRY, body, 1).await;
    leaf
}

fn status_of(twin: &Value) -> (&Value, &Value) {
    let reported = &twin["properties"]["reported"];
    (
        &reported["lastDesiredVersion"],
        &reported["lastDesiredStatus"],
    )
}

/// A hub without a configuration waits for one. Then its routes are those of its twin; one bad
/// route is reported with its place and loses only itself; connected clients are reported; its own
/// method works; and a restart without the cloud finds the last configuration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hubs_own_twin_is_where_its_routes_come_from() {
    let lab = LabBuilder::new()
        .layers(1)
        .leaf("leaf1", "edge1")
        .env("edge1", "ConfigSource", "twin")
        .at_start("edge1", AtStart::Started)
        .start()
        .await
        .expect("the lab starts");
    let service = Service::of(&lab);
    let upstream = "FROM /messages/* INTO $upstream";
    let version = service
        .desire(
            OWN,
            &json!({
                "schemaVersion": "1.1",
                "routes": { "up": { "route": upstream, "priority": 3 } },
                "storeAndForwardConfiguration": { "timeToLiveSecs": 7200 } }),
        )
        .await;
    lab.wait_ready("edge1").await.expect("configured");
    service
        .twin_that(OWN, "good status", |twin| {
            let (at, status) = status_of(twin);
            *at == version && status["code"] == 200
        })
        .await;
    let leaf = publish_one(&lab, "one").await;
    only_these_arrive(&lab, "leaf1", &["one"]).await;
    service
        .twin_that(OWN, "connected leaf", |twin| {
            twin["properties"]["reported"]["clients"]["leaf1"]["status"] == "Connected"
        })
        .await;

    let bad = json!({ "routes": { "bad": "FROM /messages/* INTO nowhere" } });
    let version = service.desire(OWN, &bad).await;
    service
        .twin_that(OWN, "bad status", |twin| {
            let (at, status) = status_of(twin);
            let text = status["description"].as_str().unwrap_or_default();
            *at == version
                && status["code"] == 400
                && text.contains("route bad")
                && text.contains("column")
        })
        .await;
    let name = "RefreshDeviceScopeIdentityCache";
    let called = service
        .call(OWN, name, &json!({ "deviceIds": ["leaf1"] }), 30, 30)
        .await;
    assert_eq!(called.expect("an answer")["status"], 200);
    leaf.disconnect().await;
    service
        .twin_that(OWN, "leaf that is gone", |twin| {
            let clients = &twin["properties"]["reported"]["clients"];
            clients.is_object() && clients["leaf1"].is_null()
        })
        .await;

    lab.kill(HUB).await.expect("no cloud");
    lab.kill("edge1").await.expect("no hub");
    lab.start("edge1").await.expect("ready without the cloud");
    publish_one(&lab, "two").await.disconnect().await;
    lab.start(HUB).await.expect("the cloud is back");
    only_these_arrive(&lab, "leaf1", &["one", "two"]).await;
    lab.shutdown().await.expect("the lab ends");
}

/// Opens tunnels for whoever knows the password, and counts them.
async fn proxy(listener: TcpListener, tunnels: Arc<AtomicUsize>) {
    while let Ok((mut client, _)) = listener.accept().await {
        let tunnels = Arc::clone(&tunnels);
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await?);
            }
            let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
            // "user:pass" in base64, in lower case as the head.
            let knows = head.contains("proxy-authorization: basic dxnlcjpwyxnz");
            let target = head
                .strip_prefix("connect ")
                .and_then(|rest| rest.split(' ').next())
                .filter(|_| knows);
            let Some(target) = target else {
                let refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n";
                return client.write_all(refusal).await;
            };
            let mut server = TcpStream::connect(target).await?;
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
            tunnels.fetch_add(1, Ordering::Relaxed);
            copy_bidirectional(&mut client, &mut server)
                .await
                .map(|_| ())
        });
    }
}

/// Two layers, both MQTT over WebSocket upstream, the lower one through a proxy with a password:
/// telemetry goes up and a method comes down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_upstream_carry_everything_also_through_a_proxy() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let tunnels = Arc::new(AtomicUsize::new(0));
    let proxy = tokio::spawn(proxy(listener, Arc::clone(&tunnels)));
    let lab = LabBuilder::new()
        .layers(2)
        .leaf("leaf1", "edge2")
        .env("edge1", "UpstreamProtocol", "MqttWs")
        .env("edge2", "UpstreamProtocol", "MqttWs")
        .env(
            "edge2",
            "https_proxy",
            &format!("http://user:pass@{address}"),
        )
        .start()
        .await
        .expect("the lab starts");
    let door = Door::of(&lab, "edge2");
    let mut leaf = door.admitted(&Hello::of(&lab, "leaf1")).await;
    assert_eq!(leaf.subscribe(1, &[(METHODS, 0)]).await, [0]);
    leaf.publish(TELEMETRY, "up", 2).await;
    only_these_arrive(&lab, "leaf1", &["up"]).await;

    let service = Service::of(&lab);
    service.subscribed("leaf1", METHODS).await;
    let answering = async {
        loop {
            let packet = leaf.receive().await.expect("a connection");
            let Packet::Publish(packet) = packet else {
                continue;
            };
            let (_, query) = packet.topic.split_once("/?").expect("a request id");
            let topic = format!("$iothub/methods/res/201/?{query}");
            let answer = publish(&topic, QoS::AtMostOnce, 0, br#"{"down":true}"#);
            leaf.send(&answer).await;
            return;
        }
    };
    let payload = json!({ "n": 1 });
    let calling = service.call("leaf1", "m", &payload, 30, 30);
    let ((), called) = tokio::join!(answering, calling);
    let expected = json!({ "status": 201, "payload": { "down": true } });
    assert_eq!(called.expect("an answer"), expected);
    assert!(tunnels.load(Ordering::Relaxed) >= 2, "scope and leaf");
    let log = lab.log("edge2").expect("a log");
    assert!(log.contains("over MQTT over WebSocket") && !log.contains("user:pass"));
    lab.shutdown().await.expect("the lab ends");
    proxy.abort();
}
