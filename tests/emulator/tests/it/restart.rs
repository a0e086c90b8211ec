//! A killed emulator is the same hub afterwards: twins, sessions and messages are there.

use mqttbytes::QoS::{AtLeastOnce, AtMostOnce};
use serde_json::{Value, json};

use crate::common::Files;
use crate::common::mqtt::{Client, Hello, publish};
use crate::common::process::Process;

const FILTERS: [&str; 3] = [
    "$iothub/twin/res/#",
    "$iothub/twin/PATCH/properties/desired/#",
    "$iothub/methods/POST/#",
];

async fn connect(files: &Files, process: &Process, hello: &Hello) -> Client {
    let (client, code) = Client::connect_at(files, process.address("mqtt"), hello).await;
    assert_eq!(code, mqttbytes::v4::ConnectReturnCode::Success);
    client
}

/// Method, desired patch and twin answer for a client that has not subscribed since the kill.
async fn everything_arrives(files: &Files, process: &Process, client: &mut Client, path: &str) {
    let methods = format!("{path}/methods");
    let calling = process.served(files, "POST", &methods, json!({"methodName": "m"}));
    let answering = async {
        let request = client.delivery().await;
        let (_, rid) = request.topic.split_once("/?").unwrap();
        let topic = format!("$iothub/methods/res/200/?{rid}");
        client.publish(&topic, b"1", 3).await;
    };
    let (answer, ()) = tokio::join!(calling, answering);
    assert_eq!(answer, json!({"status": 200, "payload": 1}));
    let body = json!({"properties": {"desired": {"a": 1}}});
    let twin = process.served(files, "PATCH", path, body).await;
    let notice = client.delivery().await;
    let version = &twin["properties"]["desired"]["$version"];
    assert_eq!(
        notice.topic,
        format!("$iothub/twin/PATCH/properties/desired/?$version={version}")
    );
    let get = publish("$iothub/twin/GET/?$rid=1", AtMostOnce, 0, b" ");
    client.send(&get).await;
    let answer = client.delivery().await;
    assert_eq!(answer.topic, "$iothub/twin/res/200/?$rid=1");
    let twin: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(&twin["desired"]["$version"], version);
}

/// Acceptance 3 of the MQTT issue, from the hub's side: subscriptions stand, the hub is killed,
/// and everything arrives without the client doing anything but connecting.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_emulator_keeps_sessions() {
    let files = Files::new();
    let mut process = Process::start(&files);
    let hellos = [
        ("/twins/leaf1", Hello::persistent("leaf1")),
        (
            "/twins/edge3/modules/modA",
            Hello {
                clean: false,
                ..Hello::through("edge3/modA;edge3;edge2;edge1")
            },
        ),
    ];
    let mut clients = Vec::new();
    for (_, hello) in &hellos {
        let mut client = connect(&files, &process, hello).await;
        client.subscribe(&FILTERS, AtLeastOnce).await;
        clients.push(client);
    }
    let mut clean = connect(&files, &process, &Hello::of("leaf3")).await;
    clean.subscribe(&FILTERS, AtLeastOnce).await;
    for _ in 0..2 {
        process.kill();
        for mut client in clients.drain(..) {
            assert_eq!(client.next().await, None);
        }
        process = Process::start(&files);
        let sessions = process.control("GET", "/sessions", Value::Null).await;
        let sessions = sessions.as_array().unwrap();
        let ids: Vec<_> = sessions.iter().map(|one| &one["client_id"]).collect();
        assert_eq!(ids, ["edge3/modA", "leaf1"], "the clean one is gone");
        for (path, hello) in &hellos {
            let mut client = connect(&files, &process, hello).await;
            assert!(client.session_present);
            everything_arrives(&files, &process, &mut client, path).await;
            clients.push(client);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_emulator_keeps_twins() {
    let files = Files::new();
    let mut process = Process::start(&files);
    let body = json!({"tags": {"t": 1}, "properties": {"desired": {"d": {"x": [1, {"y": "z"}]}}}});
    process.served(&files, "PATCH", "/twins/leaf1", body).await;
    let mut client = connect(&files, &process, &Hello::of("leaf1")).await;
    client.subscribe(&FILTERS, AtLeastOnce).await;
    let topic = "$iothub/twin/PATCH/properties/reported/?$rid=1";
    client
        .send(&publish(topic, AtMostOnce, 0, br#"{"r":1.5}"#))
        .await;
    let answer = client.delivery().await;
    assert_eq!(answer.topic, "$iothub/twin/res/204/?$rid=1&$version=2");
    process.kill();
    let process = Process::start(&files);
    let mut after = process
        .served(&files, "GET", "/twins/leaf1", Value::Null)
        .await;
    let properties = &mut after["properties"];
    assert_eq!(properties["desired"]["d"], json!({"x": [1, {"y": "z"}]}));
    assert_eq!(properties["reported"]["r"], json!(1.5));
    assert_eq!(
        (
            &properties["desired"]["$version"],
            &properties["reported"]["$version"]
        ),
        (&json!(2), &json!(2))
    );
    assert!(properties["desired"]["$metadata"]["d"]["x"]["$lastUpdated"].is_string());
    assert_eq!(
        (&after["version"], &after["tags"]),
        (&json!(3), &json!({"t": 1}))
    );
    assert_eq!(after["etag"], "AAAAAAAAAAM=");
}

/// Queued, unacknowledged, acknowledged, counted: all as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_emulator_keeps_messages() {
    let files = Files::new();
    let mut process = Process::start(&files);
    let filter = "devices/leaf1/messages/devicebound/#";
    let mut client = connect(&files, &process, &Hello::persistent("leaf1")).await;
    client.subscribe(&[filter], AtLeastOnce).await;
    for number in 1..=3 {
        let body = json!({"message_id": format!("m{number}"), "body": "x"});
        process.control("POST", "/c2d/leaf1", body).await;
        assert_eq!(client.delivery().await.pkid, number);
    }
    client.acknowledge(2).await;
    let wait = |sequence| format!("/c2d/leaf1/wait?sequence={sequence}");
    process.control("GET", &wait(2), Value::Null).await;
    process.kill();
    process = Process::start(&files);
    let body = json!({"message_id": "m4"});
    let sent = process.control("POST", "/c2d/leaf1", body).await;
    assert_eq!(sent["sequence"], 4);
    let overview = process.control("GET", "/c2d/leaf1", Value::Null).await;
    let queue = overview["queue"].as_array().unwrap();
    let states: Vec<_> = queue
        .iter()
        .map(|one| (&one["sequence"], &one["state"], &one["delivery_count"]))
        .map(|(a, b, c)| (a.as_u64(), b.as_str(), c.as_u64()))
        .collect();
    let enqueued = Some("enqueued");
    assert_eq!(
        states,
        [
            (Some(1), enqueued, Some(1)),
            (Some(3), enqueued, Some(1)),
            (Some(4), enqueued, Some(0)),
        ]
    );
    assert_eq!(overview["outcomes"][0]["outcome"], "completed");
    let mut client = connect(&files, &process, &Hello::persistent("leaf1")).await;
    for (packet_id, dup, sequence, deliveries) in
        [(1, true, 1, 2), (3, true, 3, 2), (4, false, 4, 1)]
    {
        let delivery = client.delivery().await;
        assert_eq!((delivery.pkid, delivery.dup), (packet_id, dup));
        client.acknowledge(packet_id).await;
        let settled = process.control("GET", &wait(sequence), Value::Null).await;
        assert_eq!(settled["outcome"], "completed");
        assert_eq!(settled["delivery_count"], deliveries);
    }
}

/// Deliveries of a hub that is killed each time count: the tenth is the last.
#[tokio::test(flavor = "multi_thread")]
async fn deliveries_before_a_kill_count() {
    let files = Files::new();
    let mut process = Process::start(&files);
    let filter = "devices/leaf1/messages/devicebound/#";
    let body = json!({"message_id": "poison"});
    process.control("POST", "/c2d/leaf1", body).await;
    for delivery in 1..=10 {
        let mut client = connect(&files, &process, &Hello::persistent("leaf1")).await;
        if delivery == 1 {
            client.subscribe(&[filter], AtLeastOnce).await;
        }
        assert_eq!(client.delivery().await.dup, delivery > 1);
        process.kill();
        process = Process::start(&files);
    }
    let mut client = connect(&files, &process, &Hello::persistent("leaf1")).await;
    client.expect_nothing().await;
    let overview = process.control("GET", "/c2d/leaf1", Value::Null).await;
    assert_eq!(overview["outcomes"][0]["outcome"], "dead_lettered");
    assert_eq!(overview["outcomes"][0]["delivery_count"], 10);
}
