//! Acceptance 2 of the walking skeleton: Debian's MQTT clients, and what is refused how.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "these are the tests"
)]

use edgehub_lab::{ConnectionString, DeviceSpec, Lab, LabBuilder};
use edgehub_tests::mqtt::{Door, Hello, code, ping, publish, telemetry};
use edgehub_tests::program::{self, Outcome};
use edgehub_tests::token::Token;
use edgehub_tests::{PATIENCE, only_these_arrive, registry, root};
use mqttbytes::QoS;
use mqttbytes::v4::Packet;
use tokio::process::Command;

/// One hub with a few leaves, a module and a disabled device.
async fn lab() -> Lab {
    let disabled = DeviceSpec {
        enabled: false,
        ..DeviceSpec::new("leaf-off", Some("edge1"))
    };
    let lab = LabBuilder::new()
        .layers(1)
        .leaf("leaf1", "edge1")
        .leaf("leaf2", "edge1")
        .module("edge1", "modA")
        .device(disabled)
        // A device that was just enabled is asked about again at once.
        .env("edge1", "DeviceScopeCacheRefreshDelaySecs", "0");
    lab.start().await.expect("the lab starts")
}

/// A person follows the README: the line there sends a message as `leaf1`, which arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_2_the_line_of_the_readme_sends_a_message() {
    let lab = lab().await;
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let block = readme
        .split("```")
        .find(|block| block.starts_with("sh\n") && block.contains("\nmosquitto_pub "))
        .expect("a block with mosquitto_pub");
    let state = lab.state_dir().to_string_lossy();
    let script = block
        .trim_start_matches("sh\n")
        .replace("--state DIR", &format!("--state {state}"));
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", &script])
        .current_dir(root());
    let outcome = program::run(bash, PATIENCE).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    only_these_arrive(&lab, "leaf1", &["hello"]).await;
    lab.shutdown().await.expect("the lab ends");
}

/// `mosquitto_pub` with what `lab.json` says sends properties and bodies as a leaf and as a
/// module; with a wrong key it is refused in its own words. `mosquitto_sub` is told that its
/// subscription was denied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_2_mosquitto_publishes_and_may_not_subscribe() {
    let lab = lab().await;
    let token = |id: &str| Token::of(&lab, id);

    let topic = telemetry("leaf1") + "temperature=21.5&%24.ct=text%2Fplain&%24.mid=m-1";
    let one = ["-t", &topic, "-m", "one"];
    let sent = mosquitto(&lab, "mosquitto_pub", "leaf1", &token("leaf1"), &one).await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    let topic = telemetry("edge1/modA");
    let two = ["-t", &topic, "-m", "two"];
    let sent = mosquitto(
        &lab,
        "mosquitto_pub",
        "edge1/modA",
        &token("edge1/modA"),
        &two,
    )
    .await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    only_these_arrive(&lab, "leaf1", &["one"]).await;
    only_these_arrive(&lab, "edge1/modA", &["two"]).await;
    let entry = &lab.ledger().entries_of("leaf1").expect("the ledger")[0];
    assert_eq!(entry.properties["temperature"].as_deref(), Some("21.5"));
    assert_eq!(entry.system["content-type"].as_deref(), Some("text/plain"));
    assert_eq!(entry.system["message-id"].as_deref(), Some("m-1"));

    // What another identity would hear.
    for filter in [
        "devices/leaf1/messages/devicebound/#",
        "devices/leaf20/messages/devicebound/#",
        "devices/edge3/modules/modA/#",
    ] {
        let subscribe = ["-t", filter, "-d"];
        let denied = mosquitto(&lab, "mosquitto_sub", "leaf2", &token("leaf2"), &subscribe).await;
        assert_eq!(
            denied.stderr, "All subscription requests were denied.\n",
            "{denied:?}"
        );
        assert!(
            denied.stdout.contains("Subscribed (mid: 1): 128"),
            "0x80 in {denied:?}"
        );
    }

    let topic = telemetry("leaf2");
    let never = ["-t", &topic, "-m", "never"];
    let wrong = token("leaf2").signed_with(NOBODYS_KEY);
    let refused = mosquitto(&lab, "mosquitto_pub", "leaf2", &wrong, &never).await;
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.stderr.contains("not authorised"), "{refused:?}");
    lab.shutdown().await.expect("the lab ends");
}

/// A key that was never registered.
const NOBODYS_KEY: &str = "bm9ib2R5cy1rZXktbm9ib2R5cy1rZXktbm9ib2R5cy0=";

/// Runs one of mosquitto's clients as an identity of `lab.json`, with the options of the README.
async fn mosquitto(
    lab: &Lab,
    program: &str,
    id: &str,
    token: &Token,
    arguments: &[&str],
) -> Outcome {
    let json = lab.lab_json().expect("lab.json");
    let identity = json.identities.iter().find(|identity| identity.id == id);
    let identity = identity.expect("it is in lab.json");
    let layer = json
        .layers
        .iter()
        .find(|layer| layer.name == identity.parent);
    let port = layer
        .and_then(|layer| layer.mqtts)
        .expect("its hub speaks MQTT");
    let string = ConnectionString::parse(&identity.connection_string).expect("a string");
    let mut command = Command::new(program);
    command
        .args([
            "-V",
            "mqttv311",
            "-q",
            "1",
            "-p",
            &port.to_string(),
            "-i",
            id,
        ])
        .args([
            "-h",
            string.gateway_host_name.as_deref().expect("a gateway"),
        ])
        .args([
            "-u",
            &format!("{}/{id}/?api-version=2021-04-12", string.host_name),
        ])
        .args(["-P", &token.text()])
        .arg("--cafile")
        .arg(&json.ca_file)
        .args(arguments);
    program::run(command, PATIENCE).await
}

/// Whoever has the wrong key, a token for another hub, an expired token, no token, a name that
/// nobody knows or is disabled gets CONNACK 5; what cannot be read gets 4, 2 or 1. In each case
/// the same client without that one fault is let in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_2_connect_is_refused_with_the_right_code() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let right = || Token::of(&lab, "leaf1");
    let leaf1 = |token: Token| Hello::of(&lab, "leaf1").with(&token);
    let edge_key = lab.seed().primary_key("edge1").expect("a key");

    for good in [
        leaf1(right()),
        leaf1(right().by_secondary_key_of(&lab, "leaf1")),
        leaf1(right().for_host(&lab.host("edge1").expect("a host").hostname)),
        leaf1(right().just_expired()),
        Hello::of(&lab, "edge1/modA"),
    ] {
        door.admitted(&good).await;
    }

    let no_password = Hello {
        password: String::new(),
        ..leaf1(right())
    };
    let other_id = Hello {
        client_id: "leaf2".to_owned(),
        ..leaf1(right())
    };
    let other_case = Hello {
        client_id: "Leaf1".to_owned(),
        ..leaf1(right())
    };
    let unknown = Hello::claiming(&lab, "nobody").with(&right().naming("nobody"));
    let unknown_module = Hello::claiming(&lab, "edge1/nothing")
        .with(&right().naming("edge1/nothing").signed_with(edge_key));
    for (what, hello) in [
        ("wrong key", leaf1(right().signed_with(NOBODYS_KEY))),
        (
            "another's key",
            leaf1(Token::of(&lab, "leaf2").naming("leaf1")),
        ),
        ("the parent's key", leaf1(right().signed_with(edge_key))),
        ("another's token", leaf1(Token::of(&lab, "leaf2"))),
        (
            "a token for another hub",
            leaf1(right().for_host("other.example")),
        ),
        (
            "a token for a hub whose name begins alike",
            leaf1(right().for_host("hub")),
        ),
        ("expired", leaf1(right().expired())),
        ("no password", no_password),
        ("another client id", other_id),
        ("client id in another case", other_case),
        ("unknown device", unknown),
        ("unknown module", unknown_module),
        ("disabled device", Hello::of(&lab, "leaf-off")),
    ] {
        assert_eq!(door.refused(&hello).await, code::NOT_AUTHORIZED, "{what}");
    }

    registry::set_status(&lab, "leaf-off", "enabled").await;
    door.admitted(&Hello::of(&lab, "leaf-off")).await;

    let named = |user_name: &str| Hello {
        user_name: user_name.to_owned(),
        ..leaf1(right())
    };
    for user_name in [
        "",
        "leaf1",
        "hub.example/leaf1",
        "hub.example/leaf1/",
        "hub.example/leaf1/?api-version=",
        "hub.example//?api-version=2021-04-12",
        "hub.example/leaf1/a/b/?api-version=2021-04-12",
    ] {
        assert_eq!(
            door.refused(&named(user_name)).await,
            code::USER_NAME,
            "'{user_name}'"
        );
    }
    let garbage = Hello {
        password: "secret".to_owned(),
        ..leaf1(right())
    };
    assert_eq!(
        door.refused(&garbage).await,
        code::USER_NAME,
        "a password that is no token"
    );
    let empty = Hello {
        client_id: String::new(),
        ..leaf1(right())
    };
    assert_eq!(
        door.refused(&empty).await,
        code::CLIENT_ID,
        "an empty client id"
    );

    let mut five = leaf1(right()).packet();
    let level = five
        .windows(5)
        .position(|bytes| bytes == b"MQTT\x04")
        .expect("a level")
        + 4;
    five[level] = 5;
    let mut client = door.open().await;
    client.send(&five).await;
    assert_eq!(client.connack().await, Some(code::PROTOCOL_LEVEL), "MQTT 5");
    assert_eq!(client.until_close().await, []);

    // MQTT 3.1 has another name: closed without a word, as is anything that is not CONNECT.
    let old = [
        b"\x10\x12\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x04",
        b"abcd".as_slice(),
    ]
    .concat();
    door.open().await.expect_close_after(&old).await;
    door.open().await.expect_close_after(&ping()).await;
    lab.shutdown().await.expect("the lab ends");
}

/// A leaf that publishes to another's topic, or at QoS 2, is disconnected, and nothing of it is
/// stored, neither as the other nor as itself. What came before is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_2_foreign_topics_and_qos_2_close_the_connection() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let leaf1 = Hello::of(&lab, "leaf1");
    let own = telemetry("leaf1");

    let mut client = door.admitted(&leaf1).await;
    client.publish(&own, "before", 1).await;
    let at_least_once = |topic: &str| publish(topic, QoS::AtLeastOnce, 2, b"forged");
    client
        .expect_close_after(&at_least_once(&telemetry("leaf2")))
        .await;
    for bytes in [
        at_least_once(&telemetry("edge1/modA")),
        at_least_once(&telemetry("edge1")),
        at_least_once(&telemetry("leaf1/modA")),
        publish(&telemetry("leaf2"), QoS::AtMostOnce, 0, b"forged"),
        publish(&own, QoS::ExactlyOnce, 2, b"twice"),
    ] {
        door.admitted(&leaf1).await.expect_close_after(&bytes).await;
    }
    // In one write with what is allowed: the forged one ends it, and nothing after it counts.
    let mut client = door.admitted(&leaf1).await;
    let mixed = [
        publish(&own, QoS::AtLeastOnce, 1, b"with it"),
        at_least_once(&telemetry("leaf2")),
        publish(&own, QoS::AtLeastOnce, 3, b"after it"),
    ];
    client.send(&mixed.concat()).await;
    for packet in client.until_close().await {
        let Packet::PubAck(ack) = packet else {
            panic!("{packet:?}")
        };
        assert_eq!(ack.pkid, 1);
    }

    // Bag keys that look like an identity are ordinary properties.
    let mut client = door.admitted(&leaf1).await;
    client
        .publish(&(own + "deviceId=leaf2&%24.cdid=leaf2"), "last", 1)
        .await;
    only_these_arrive(&lab, "leaf1", &["before", "with it", "last"]).await;
    let entries = lab.ledger().entries_of("leaf1").expect("the ledger");
    assert_eq!(entries[2].properties["deviceId"].as_deref(), Some("leaf2"));
    for id in ["leaf2", "edge1/modA"] {
        door.admitted(&Hello::of(&lab, id))
            .await
            .publish(&telemetry(id), "own", 1)
            .await;
        only_these_arrive(&lab, id, &["own"]).await;
    }
    assert_eq!(
        lab.ledger().count().expect("the ledger"),
        5,
        "and nothing as anybody else"
    );
    lab.shutdown().await.expect("the lab ends");
}

/// A topic that is none of ours, or whose properties cannot be read, is acknowledged in its turn
/// and dropped, counted with its reason: a client that is refused would send it for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_2_unknown_topics_are_acknowledged_dropped_and_counted() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let mut client = door.admitted(&Hello::of(&lab, "leaf1")).await;
    let own = telemetry("leaf1");
    let unknown = [
        "foo/bar",
        "devices/leaf1/messages/event/",
        "$iothub/methods/POST/x",
        "http://x",
    ];
    let malformed = own.clone() + "a=%ff";

    let mut bytes = Vec::new();
    let topics = [own.as_str()]
        .into_iter()
        .chain(unknown)
        .chain([malformed.as_str(), own.as_str()]);
    for (packet_id, topic) in (1..).zip(topics) {
        let body = format!("message {packet_id}");
        bytes.extend(publish(topic, QoS::AtLeastOnce, packet_id, body.as_bytes()));
    }
    client.send(&bytes).await;
    client.expect_pubacks(1..=7).await;

    only_these_arrive(&lab, "leaf1", &["message 1", "message 7"]).await;
    let metrics = lab.metrics("edge1").await.expect("metrics");
    for (reason, count) in [
        ("unknown_topic", unknown.len() as f64),
        ("bad_properties", 1.0),
    ] {
        let labels = [("reason", reason), ("from", "leaf1")];
        assert_eq!(
            metrics.sum("edgehub_messages_dropped_total", &labels),
            count,
            "{reason}"
        );
    }
    lab.shutdown().await.expect("the lab ends");
}
