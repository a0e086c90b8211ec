//! Acceptance 3 of the MQTT side: subscriptions stand, whatever is killed below, beside or above
//! them, and when tokens are renewed.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use std::time::Duration;

use edgehub_lab::{HUB, Lab, LabBuilder};
use edgehub_tests::PATIENCE;
use edgehub_tests::agent::{Agent, Protocol, Sdk};
use edgehub_tests::mqtt::{Door, Hello, MqttClient, puback};
use edgehub_tests::packets::publish;
use edgehub_tests::service::{DESIRED, METHODS, Service};
use mqttbytes::QoS;
use mqttbytes::v4::Packet;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// A method that comes while something is down is called again.
const RETRY: Duration = Duration::from_millis(500);
/// Who is at the bottom of three layers.
const CLIENTS: [(&str, Sdk, Protocol); 4] = [
    ("leaf-pm", Sdk::Python, Protocol::Mqtt),
    ("leaf-nw", Sdk::Node, Protocol::MqttWs),
    ("edge3/nm", Sdk::Node, Protocol::Mqtt),
    ("edge3/pw", Sdk::Python, Protocol::MqttWs),
];

/// Python renews 120 s before the end of a token, so it does after 10 s.
const PYTHON_TTL_SECS: u64 = 130;
/// The agent has Node renew after half of the time.
const NODE_TTL_SECS: u64 = 20;
/// How often each SDK renews while the test looks.
const RENEWALS: usize = 2;

async fn start() -> Lab {
    let mut builder = LabBuilder::new().layers(3).leaf("raw", "edge3");
    for edge in ["edge1", "edge2", "edge3"] {
        // A patch that was missed comes with the next synchronisation: two minutes after the last
        // one, unless told otherwise. No test waits for that.
        builder = builder.env(edge, "MinTwinSyncPeriodSecs", "1");
    }
    for (id, ..) in CLIENTS {
        builder = match id.split_once('/') {
            Some((edge, module)) => builder.module(edge, module),
            None => builder.leaf(id, "edge3"),
        };
    }
    builder.start().await.expect("the lab starts")
}

/// Connects a client and subscribes to everything that it can; once and for all.
async fn settle(lab: &Lab, agent: &Agent, id: &str) {
    agent.must("connect", Value::Null).await;
    agent.must("watch_desired", Value::Null).await;
    agent.must("answer_methods", Value::Null).await;
    if !id.contains('/') {
        agent.must("watch_c2d", Value::Null).await;
    }
    let service = Service::of(lab);
    service.subscribed(id, DESIRED).await;
    service.subscribed(id, METHODS).await;
}

/// The method works again, however long that takes within the patience. Until then the answer is
/// that the client is not there: from the IoT Hub, or from a hub in between.
async fn method_arrives(lab: &Lab, id: &str, payload: &Value) {
    let begun = Instant::now();
    let wanted = json!({"status": 200, "payload": {"echo": payload}});
    loop {
        let service = Service::of(lab);
        let answer = service.call(id, "echo", payload, 30, 10).await;
        let status = match &answer {
            Ok(answer) if *answer == wanted => return,
            Ok(answer) => answer["status"].as_u64(),
            Err((status, _)) => Some(u64::from(*status)),
        };
        assert!(matches!(status, Some(404 | 504)), "{id}: {answer:?}");
        assert!(
            begun.elapsed() < PATIENCE,
            "{id}: no method works: {answer:?}"
        );
        sleep(RETRY).await;
    }
}

/// A method call, a desired patch and a C2D message arrive at a client that does nothing.
async fn all_arrives(lab: &Lab, agent: &Agent, id: &str, round: &str) {
    let begun = Instant::now();
    let service = Service::of(lab);
    service.desire(id, &json!({"round": round})).await;
    let number = if id.contains('/') {
        None
    } else {
        Some(service.send(id, &json!({"body": round})).await)
    };
    method_arrives(lab, id, &json!({ "round": round })).await;
    agent
        .event("desired", |event| event["patch"]["round"] == json!(round))
        .await;
    if let Some(number) = number {
        agent
            .event("c2d", |event| event["body"] == json!(round))
            .await;
        assert_eq!(
            service.outcome(id, number).await,
            json!("completed"),
            "{id}"
        );
    }
    println!("{id} after {round}: {:?}", begun.elapsed());
}

/// Each of what is above a client is killed and started again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_3_subscriptions_of_both_sdks_outlive_every_restart() {
    let lab = start().await;
    let agents = CLIENTS
        .map(|(id, sdk, protocol)| Agent::start(&lab, sdk, protocol, id, Some("edge3"), None));
    for (agent, (id, ..)) in agents.iter().zip(CLIENTS) {
        settle(&lab, agent, id).await;
    }
    for host in ["edge3", "edge2", "edge1", HUB] {
        lab.kill(host).await.expect("it is killed");
        lab.start(host).await.expect("it starts again");
        let [a, b, c, d] = [0, 1, 2, 3]
            .map(|index: usize| all_arrives(&lab, &agents[index], CLIENTS[index].0, host));
        tokio::join!(a, b, c, d);
    }
    lab.shutdown().await.expect("the lab ends");
}

/// Both SDKs renew short-lived tokens, again and again; nobody subscribes anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_3_subscriptions_of_both_sdks_outlive_renewals_of_tokens() {
    let lab = start().await;
    let agents = CLIENTS.map(|(id, sdk, protocol)| {
        let seconds = match sdk {
            Sdk::Python => PYTHON_TTL_SECS,
            Sdk::Node => NODE_TTL_SECS,
        };
        Agent::start(&lab, sdk, protocol, id, Some("edge3"), Some(seconds))
    });
    for (agent, (id, ..)) in agents.iter().zip(CLIENTS) {
        settle(&lab, agent, id).await;
    }
    for renewal in 1..=RENEWALS {
        for (_, (id, ..)) in agents.iter().zip(CLIENTS) {
            connected_again(&lab, id, 1 + renewal).await;
        }
        let round = format!("renewal {renewal}");
        let [a, b, c, d] = [0, 1, 2, 3]
            .map(|index: usize| all_arrives(&lab, &agents[index], CLIENTS[index].0, &round));
        tokio::join!(a, b, c, d);
    }
    lab.shutdown().await.expect("the lab ends");
}

/// Waits until the hub has accepted the client this often.
async fn connected_again(lab: &Lab, id: &str, times: usize) {
    let host = &lab.host(HUB).expect("a lab has a hub").hostname;
    let who = match id.split_once('/') {
        Some((device, module)) => format!("DeviceId: {device}; ModuleId: {module}"),
        None => format!("DeviceId: {id}"),
    };
    let label = format!("{who} [IotHubHostName: {host}]");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = lab.metrics("edge3").await.expect("metrics");
        let name = "edgehub_client_connect_success_total";
        let connects = metrics.sum(name, &[("id", &label)]);
        if connects >= times as f64 {
            return;
        }
        assert!(Instant::now() < deadline, "{label}: {connects} connects");
        sleep(RETRY).await;
    }
}

/// A client that dies and comes back says CONNECT and nothing else: what was meant for it while it
/// was away, and what comes then, arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_3_a_client_that_was_killed_finds_its_subscriptions() {
    let lab = start().await;
    let service = Service::of(&lab);
    let door = Door::of(&lab, "edge3");
    let mut client = door.admitted(&Hello::of(&lab, "raw")).await;
    let c2d = "devices/raw/messages/devicebound/#";
    let granted = client
        .subscribe(1, &[(DESIRED, 0), (METHODS, 0), (c2d, 1)])
        .await;
    assert_eq!(granted, [0, 0, 1]);
    service.subscribed("raw", DESIRED).await;
    service.subscribed("raw", METHODS).await;
    // Without a word, as when its process is killed.
    drop(client);
    let number = service.send("raw", &json!({"body": "while away"})).await;

    let (client, present) = door.resumed(&Hello::of(&lab, "raw")).await;
    assert!(present);
    let seen = tokio::spawn(answer_until_all_came(client));
    service.desire("raw", &json!({"round": "back"})).await;
    method_arrives(&lab, "raw", &json!({"round": "back"})).await;
    let outcome = service.outcome("raw", number).await;
    assert_eq!(outcome, json!("completed"));
    seen.await.expect("everything came");
    lab.shutdown().await.expect("the lab ends");
}

/// Acknowledges messages and answers methods like the SDKs' agents, until a desired patch, a
/// method and a message have come.
async fn answer_until_all_came(mut client: MqttClient) {
    let (mut desired, mut method, mut message) = (false, false, false);
    while !(desired && method && message) {
        let Some(Packet::Publish(packet)) = client.next().await else {
            panic!("no PUBLISH, or a close");
        };
        if let Some(rest) = packet.topic.strip_prefix("$iothub/methods/POST/echo/?") {
            let body: Value = serde_json::from_slice(&packet.payload).expect("JSON");
            let answer = json!({ "echo": body }).to_string();
            let topic = format!("$iothub/methods/res/200/?{rest}");
            client
                .send(&publish(&topic, QoS::AtMostOnce, 0, answer.as_bytes()))
                .await;
            method = true;
        } else if packet.topic.starts_with("$iothub/twin/PATCH/") {
            let patch: Value = serde_json::from_slice(&packet.payload).expect("JSON");
            desired |= patch["round"] == json!("back");
        } else {
            assert_eq!(&packet.payload[..], b"while away", "{}", packet.topic);
            client.send(&puback(packet.pkid)).await;
            message = true;
        }
    }
    // Its last answer is on its way: nothing may be lost by a reset.
    client.ping().await;
}
