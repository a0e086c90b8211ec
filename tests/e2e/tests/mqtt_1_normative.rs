//! Acceptance 1 of the MQTT side, the rest of it: normative statements of MQTT 3.1.1 that no
//! acceptance vector and no hostile client covers. The table of docs/compatibility.md says which
//! test covers which statement.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "these are the tests"
)]

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::mqtt::{
    Door, Hello, MqttClient, code, field, frame, ping, puback, publish, telemetry,
};
use edgehub_tests::only_these_arrive;
use edgehub_tests::token::Token;
use mqttbytes::QoS;
use mqttbytes::v4::{Packet, Publish};

const INPUT_1: &str = "devices/edge1/modules/m/inputs/in1/#";
const INPUT_2: &str = "devices/edge1/modules/m/inputs/in2/#";

/// What module `sender` says on `out1` and `out2` comes to `in1` and `in2` of module `m`.
async fn lab() -> Lab {
    let route = |output: &str, input: &str| {
        format!(
            "FROM /messages/modules/sender/outputs/{output} \
             INTO BrokeredEndpoint(\"/modules/m/inputs/{input}\")"
        )
    };
    let lab = LabBuilder::new().layers(1).leaf("d1", "edge1");
    let lab = lab
        .module("edge1", "m")
        .module("edge1", "sender")
        .env("edge1", "routes__one", &route("out1", "in1"))
        .env("edge1", "routes__two", &route("out2", "in2"));
    lab.start().await.expect("the lab starts")
}

/// The sender's topic for an output.
fn output(name: &str) -> String {
    telemetry("edge1/sender") + "%24.on=" + name
}

/// One SUBACK has a code for each filter; of overlapping subscriptions one copy comes, at the
/// highest QoS; the same filter again replaces its QoS; a leading wildcard hides no `$` topics;
/// what is unsubscribed does not come, and is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_normative_subscriptions_follow_the_standard() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let mut source = door.admitted(&Hello::of(&lab, "edge1/sender")).await;
    let mut client = door.admitted(&Hello::of(&lab, "edge1/m")).await;

    // MQTT-3.8.4-1, -4, -5, 3.9.3-1: refused is what can never match anything of this client.
    let filters = [
        ("#", 0),
        (INPUT_1, 1),
        ("devices/edge1/modules/m/inputs/+/#", 0),
        ("devices/edge1/modules/other/#", 1),
        ("devices/d1/messages/devicebound/#", 1),
        ("$SYS/#", 1),
        ("foo/bar", 1),
    ];
    let codes = client.subscribe(1, &filters).await;
    assert_eq!(codes, [0, 1, 0, 0x80, 0x80, 0x80, 0x80]);

    // MQTT-3.3.5-1: one copy each, at the QoS of the best filter.
    source.publish(&output("out1"), "one", 1).await;
    let one = expect_input(&mut client, "in1", "one", QoS::AtLeastOnce).await;
    client.send(&puback(one.pkid)).await;
    source.publish(&output("out2"), "two", 2).await;
    expect_input(&mut client, "in2", "two", QoS::AtMostOnce).await;

    // MQTT-4.7.2-1: `#` is subscribed and does not match the first answer; a filter for the second
    // one alone does not either.
    let only_seen = "$iothub/twin/res/+/?$rid=seen";
    assert_eq!(client.subscribe(2, &[(only_seen, 0)]).await, [0]);
    for request in ["hidden", "seen"] {
        let topic = format!("$iothub/twin/GET/?$rid={request}");
        client
            .send(&publish(&topic, QoS::AtMostOnce, 0, b" "))
            .await;
    }
    let twin = client.expect_publish().await;
    assert_eq!(twin.topic, "$iothub/twin/res/200/?$rid=seen");

    // MQTT-3.8.4-3: replaced, not added.
    assert_eq!(client.subscribe(5, &[(INPUT_1, 0)]).await, [0]);
    source.publish(&output("out1"), "three", 3).await;
    expect_input(&mut client, "in1", "three", QoS::AtMostOnce).await;

    // MQTT-3.10.4-1, -2, -4, -5, -6: gone when UNSUBACK is there, also of a filter that never was.
    client
        .unsubscribe(6, &["#", INPUT_1, "devices/edge1/modules/m/inputs/+/#"])
        .await;
    client.unsubscribe(7, &["never/was", INPUT_1]).await;
    source.publish(&output("out1"), "four", 4).await;
    source.publish(&output("out2"), "five", 5).await;
    assert_eq!(client.subscribe(8, &[(INPUT_2, 1)]).await, [1]);
    let five = expect_input(&mut client, "in2", "five", QoS::AtLeastOnce).await;
    client.send(&puback(five.pkid)).await;
    client.ping().await;
    assert_eq!(client.subscribe(9, &[(INPUT_1, 1)]).await, [1]);
    let four = expect_input(&mut client, "in1", "four", QoS::AtLeastOnce).await;
    client.send(&puback(four.pkid)).await;
    client.ping().await;
    lab.shutdown().await.expect("the lab ends");
}

/// RETAIN and DUP of a publish become properties; nothing is retained; what the hub sends has
/// RETAIN 0. QoS 0 is stored like the rest and not acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_normative_retain_dup_and_qos_0_are_handled() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let mut source = door.admitted(&Hello::of(&lab, "edge1/sender")).await;
    let mut client = door.admitted(&Hello::of(&lab, "edge1/m")).await;
    assert_eq!(client.subscribe(1, &[(INPUT_1, 1)]).await, [1]);

    // PUBLISH with DUP, QoS 1 and RETAIN, then one of QoS 0, then nothing of either.
    let out = output("out1");
    let fields = [field(out.as_bytes()), vec![0, 1], b"flags".to_vec()];
    source.send(&frame(0x3b, &fields.concat())).await;
    source.expect_pubacks([1]).await;
    source
        .send(&publish(&out, QoS::AtMostOnce, 0, b"unacknowledged"))
        .await;
    source.ping().await;
    source.publish(&out, "", 2).await;
    let flags = expect_input(&mut client, "in1", "flags", QoS::AtLeastOnce).await;
    for property in ["mqtt-retain=true", "mqtt-dup=true"] {
        assert!(flags.topic.contains(property), "{}", flags.topic);
    }
    for body in ["unacknowledged", ""] {
        let plain = expect_input(&mut client, "in1", body, QoS::AtLeastOnce).await;
        assert!(!plain.topic.contains("mqtt-"), "{}", plain.topic);
        client.send(&puback(plain.pkid)).await;
    }
    client.send(&puback(flags.pkid)).await;
    client.ping().await;

    // A new subscription, and a new session: nothing was retained for them.
    assert_eq!(client.subscribe(2, &[(INPUT_1, 1)]).await, [1]);
    client.ping().await;
    let mut client = door.admitted(&Hello::of(&lab, "edge1/m").clean()).await;
    assert_eq!(client.subscribe(1, &[(INPUT_1, 1)]).await, [1]);
    source.publish(&out, "next", 3).await;
    expect_input(&mut client, "in1", "next", QoS::AtLeastOnce).await;
    lab.shutdown().await.expect("the lab ends");
}

/// Nothing that follows DISCONNECT, or a CONNECT that was refused, counts; DISCONNECT takes the
/// will back; what follows a CONNECT that is accepted does count, in its order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_1_normative_what_counts_begins_with_connack_and_ends_with_disconnect() {
    let lab = LabBuilder::new().layers(1).leaf("d1", "edge1");
    let lab = lab.start().await.expect("the lab starts");
    let door = Door::of(&lab, "edge1");
    let (d1, own) = (Hello::of(&lab, "d1"), telemetry("d1"));
    let numbered = |id: u16, body: &str| publish(&own, QoS::AtLeastOnce, id, body.as_bytes());

    // MQTT-3.1.4-4, -5: all in one write.
    let wrong_key = Token::of(&lab, "d1").signed_with("bm9ib2R5cy1rZXk=");
    let refused = d1.clone().with(&wrong_key).will(&own, "never had", false);
    let mut client = door.open().await;
    client
        .send(&[refused.packet(), numbered(1, "never in")].concat())
        .await;
    assert_eq!(client.connack().await, Some(code::NOT_AUTHORIZED));
    assert_eq!(client.until_close().await, []);

    // MQTT-3.1.2-10, 3.14.4-1, -2, -3: the same, let in, with DISCONNECT in the middle.
    let hello = d1.clone().will(&own, "taken back", false);
    let bytes = [
        hello.packet(),
        numbered(1, "first"),
        ping(),
        numbered(2, "second"),
        frame(0xe0, &[]),
        numbered(3, "after the end"),
    ];
    let mut client = door.open().await;
    client.send(&bytes.concat()).await;
    // MQTT-3.2.0-1: CONNACK is the first packet.
    assert_eq!(client.connack().await, Some(code::ACCEPTED));
    let answers = client.until_close().await;
    let acks = answers.iter().filter_map(|packet| match packet {
        Packet::PubAck(ack) => Some(ack.pkid),
        Packet::PingResp => None,
        other => panic!("{other:?}"),
    });
    // After DISCONNECT nothing is owed.
    assert!(
        acks.zip(1..=2).all(|(ack, expected)| ack == expected),
        "{answers:?}"
    );

    door.admitted(&d1).await.publish(&own, "last", 4).await;
    only_these_arrive(&lab, "d1", &["first", "second", "last"]).await;
    lab.shutdown().await.expect("the lab ends");
}

/// The next packet is this message for this input.
async fn expect_input(client: &mut MqttClient, input: &str, body: &str, qos: QoS) -> Publish {
    let publish = client.expect_publish().await;
    let prefix = format!("devices/edge1/modules/m/inputs/{input}/%24.cdid=edge1");
    let bag = publish
        .topic
        .strip_prefix(&format!("devices/edge1/modules/m/inputs/{input}/"));
    assert!(
        bag.is_some_and(|bag| bag.contains("%24.cdid=edge1")),
        "{prefix}: {publish:?}"
    );
    assert_eq!(publish.payload, body.as_bytes(), "{publish:?}");
    assert_eq!(
        (publish.qos, publish.dup, publish.retain),
        (qos, false, false),
        "{body}"
    );
    publish
}
