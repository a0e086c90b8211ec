//! Acceptance 7 of the MQTT side: what a client can say that it should not, S1, S3, S8, S10 and S13
//! of the security tests. S4 is in `mqtt_7_packets.rs`, what can be done in masses in
//! `mqtt_7_flood.rs`.
//!
//! In each test a bystander goes on working, and the hub has not panicked.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use std::sync::Arc;
use std::time::Duration;

use edgehub_lab::{DeviceSpec, Lab, LabBuilder};
use edgehub_tests::bystander::Bystander;
use edgehub_tests::mqtt::{Door, Hello, MqttClient, code, publish, telemetry};
use edgehub_tests::token::Token;
use edgehub_tests::{only_these_arrive, tls};
use mqttbytes::QoS;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Leaves that the tests speak as; the bystander is another one.
const LEAVES: [&str; 2] = ["leaf1", "leaf2"];
const BYSTANDER: &str = "bystander";
/// Longer than anything may take that waits for nothing.
const SOON: Duration = Duration::from_secs(5);

fn builder() -> LabBuilder {
    let lab = LabBuilder::new().layers(1).leaf(BYSTANDER, "edge1");
    let lab = LEAVES.iter().fold(lab, |lab, id| lab.leaf(*id, "edge1"));
    lab.module("edge1", "m")
}

/// S1: 2,000 strangers whose first packet claims 256 MB are closed at once, and cost nothing.
/// Others whose CONNECT claims what is allowed and never comes cost what TLS does, and are closed in
/// time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s01_lengths_that_lie_cost_no_memory() {
    const STRANGERS: usize = 1000;
    /// Not so many that the address is crowded, which would shorten their time.
    const OPEN: usize = 200;
    const CONNECT_MAX: Duration = Duration::from_secs(6);
    let lab = builder().env("edge1", "MqttSettings__ConnectArrivalTimeout", "00:00:06");
    let lab = lab.start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::direct(&lab, "edge1");
    // What the first connections cost once is not counted.
    strangers(&door, 100, &[0x10, 0xff, 0xff, 0xff, 0x7f], SOON).await;
    bystander.works().await;

    let before = resident(&lab);
    for first in [0x10, 0x30] {
        let bytes = [first, 0xff, 0xff, 0xff, 0x7f];
        strangers(&door, STRANGERS, &bytes, SOON).await;
    }
    assert_grown_at_most(&lab, before, STRANGERS / 100, "lengths over the limit");

    let open: JoinSet<MqttClient> = (0..OPEN)
        .map(|_| {
            let door = door.clone();
            async move {
                let mut client = door.open().await;
                client.send(&[0x10, 0xff, 0xff, 0x07]).await;
                client
            }
        })
        .collect();
    let open = open.join_all().await;
    let all_open = Instant::now();
    bystander.works().await;
    assert_grown_at_most(&lab, before, 2 * OPEN / 100, "lengths up to the limit");
    let closing: JoinSet<_> = open.into_iter().map(MqttClient::until_close).collect();
    for packets in closing.join_all().await {
        assert_eq!(packets, []);
    }
    let closed = all_open.elapsed();
    assert!(closed < CONNECT_MAX + SOON, "closed after {closed:?}");
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// So many connections that say this first; each is closed in time without a word.
async fn strangers(door: &Door, count: usize, bytes: &[u8], patience: Duration) {
    let at_once = Arc::new(Semaphore::new(64));
    let all: JoinSet<Duration> = (0..count)
        .map(|_| {
            let (door, at_once, bytes) = (door.clone(), Arc::clone(&at_once), bytes.to_vec());
            async move {
                let _permit = at_once.acquire().await.expect("it is open");
                let client = door.open().await;
                let begun = Instant::now();
                client.expect_close_after(&bytes).await;
                begun.elapsed()
            }
        })
        .collect();
    let longest = all.join_all().await.into_iter().max().unwrap_or_default();
    assert!(longest < patience, "closed after {longest:?}");
}

fn resident(lab: &Lab) -> u64 {
    lab.resident_bytes("edge1").expect("the hub runs")
}

fn assert_grown_at_most(lab: &Lab, before: u64, mebibytes: usize, what: &str) {
    let grown = resident(lab).saturating_sub(before);
    println!("{what}: grown by {} KiB", grown >> 10);
    assert!(
        grown < (mebibytes as u64) << 20,
        "{what}: grown by {grown} bytes"
    );
}

/// S3: a topic or filter that is all separators, JSON as deep or as full of keys as a packet can
/// hold: an error, and the connection goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s03_depth_is_an_error_and_not_a_crash() {
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let mut client = Door::of(&lab, "edge1")
        .admitted(&Hello::of(&lab, "leaf1"))
        .await;
    assert_eq!(client.subscribe(1, &[("$iothub/twin/res/#", 0)]).await, [0]);
    let before = resident(&lab);

    client.publish(&"/".repeat(65_535), "", 2).await;
    let own = telemetry("leaf1");
    let slashes = "/".repeat(65_535 - own.len());
    client.publish(&(own.clone() + &slashes), "", 3).await;
    let deep = "+/".repeat(32_767);
    let filters =
        [&*"/".repeat(65_535), &*(deep.clone() + "+"), &*(deep + "#")].map(|f| (f.to_owned(), 1));
    for (filter, qos) in &filters {
        assert_eq!(client.subscribe(4, &[(filter, *qos)]).await, [0x80]);
    }

    // As deep, and as full of keys, as a packet can hold (327,695 bytes).
    let objects = r#"{"a":"#.repeat(54_000) + "1" + &"}".repeat(54_000);
    let lists = format!(r#"{{"a":{}{}}}"#, "[".repeat(160_000), "]".repeat(160_000));
    let open = r#"{"a":"#.repeat(65_000);
    let keys: Vec<String> = (0..25_000)
        .map(|number| format!("\"{number:x}\":1"))
        .collect();
    let keys = format!("{{{}}}", keys.join(","));
    for (what, patch) in [
        ("objects", objects),
        ("lists", lists),
        ("open", open),
        ("keys", keys),
    ] {
        let begun = Instant::now();
        let topic = format!("$iothub/twin/PATCH/properties/reported/?$rid={what}");
        client
            .send(&publish(&topic, QoS::AtMostOnce, 0, patch.as_bytes()))
            .await;
        let answer = client.expect_publish().await;
        assert_eq!(answer.topic, format!("$iothub/twin/res/400/?$rid={what}"));
        assert!(begun.elapsed() < SOON, "{what}: {:?}", begun.elapsed());
    }
    bystander.works().await;
    assert_grown_at_most(&lab, before, 32, "deep JSON");
    client.ping().await;
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S8: ids that look like wildcards, paths, escapes or beginnings of others are nothing but ids,
/// or none at all: everybody reaches exactly its own topics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s08_ids_are_compared_whole_and_are_no_patterns() {
    let long = "x".repeat(128);
    let ids = [
        "leaf", "leaf1", "leaf10", "leaf%2f1", "leaf*", "leaf..1", "$SYS", "a:b@c=d!", &long,
    ];
    let mut lab = LabBuilder::new().layers(1).leaf(BYSTANDER, "edge1");
    for id in ids {
        lab = lab.device(DeviceSpec::new(id, Some("edge1")));
    }
    let lab = lab.module("edge1", "mod1").module("edge1", "mod10");
    let lab = lab.start().await.expect("the lab starts");
    let bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::of(&lab, "edge1");

    let devicebound = |id: &str| format!("devices/{id}/messages/devicebound/#");
    for id in ids {
        let hello = Hello::of(&lab, id);
        let mut client = door.admitted(&hello).await;
        client.publish(&telemetry(id), id, 1).await;
        for other in ids {
            let expected = if other == id { 1 } else { 0x80 };
            let codes = client.subscribe(2, &[(&devicebound(other), 1)]).await;
            assert_eq!(codes, [expected], "{id} subscribes for {other}");
        }
        for other in ids.into_iter().filter(|other| *other != id) {
            let bytes = publish(&telemetry(other), QoS::AtLeastOnce, 3, b"forged");
            door.admitted(&hello).await.expect_close_after(&bytes).await;
        }
    }
    let inputs = |module: &str| format!("devices/edge1/modules/{module}/inputs/#");
    for (own, other) in [("mod1", "mod10"), ("mod10", "mod1")] {
        let hello = Hello::of(&lab, &format!("edge1/{own}"));
        let mut client = door.admitted(&hello).await;
        let filters = [
            inputs(own),
            inputs(other),
            "devices/edge1/messages/devicebound/#".to_owned(),
        ];
        let filters = filters.each_ref().map(|filter| (filter.as_str(), 1));
        assert_eq!(
            client.subscribe(1, &filters).await,
            [1, 0x80, 0x80],
            "{own}"
        );
        for other in [format!("edge1/{other}"), "edge1".to_owned()] {
            let bytes = publish(&telemetry(&other), QoS::AtLeastOnce, 1, b"forged");
            door.admitted(&hello).await.expect_close_after(&bytes).await;
        }
    }

    // What is no id is nobody, whatever it could be taken for.
    let token = Token::of(&lab, "leaf1");
    let too_long = "x".repeat(129);
    for id in [
        "#",
        "+",
        "leaf1#",
        "leaf+",
        "leaf1/#",
        "leaf1/+",
        "leaf1/a/b",
        "leaf1/../leaf2",
        "/leaf1",
        "leaf1/",
        "leaf1 ",
        " ",
        "le af1",
        "l\u{e9}af1",
        "leaf\u{ff11}",
        "{{iot:identity}}",
        "leaf1;edge1",
        "leaf1\u{1}",
        "leaf%31",
        "..",
        "LEAF1",
        &too_long,
    ] {
        let claims = Hello::claiming(&lab, id);
        for hello in [
            claims.clone().with(&token),
            claims.with(&token.clone().naming(id)),
        ] {
            let refusal = door.refused(&hello).await;
            let definite = [code::USER_NAME, code::NOT_AUTHORIZED].contains(&refusal);
            assert!(definite, "'{id}' is answered with {refusal}");
        }
    }
    for id in ids {
        only_these_arrive(&lab, id, &[id]).await;
    }
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S10: a will on anybody else's topic is refused at CONNECT, and nothing of it is ever published;
/// one on the own topic is, with RETAIN as a property, however the connection ends but by
/// DISCONNECT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s10_a_will_is_authorised_like_a_publish() {
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::of(&lab, "edge1");
    let (leaf1, own) = (Hello::of(&lab, "leaf1"), telemetry("leaf1"));
    for topic in [
        &telemetry("leaf2"),
        &telemetry("leaf10"),
        &telemetry("edge1"),
        &telemetry("edge1/m"),
        &telemetry("leaf1/m"),
        &telemetry("edge1/$edgeHub"),
        "devices/leaf1/messages/devicebound/",
        "devices/leaf2/messages/devicebound/",
        "$internal/x",
        "$SYS/x",
        "$CONTROL/x",
        "$iothub/twin/PATCH/properties/reported/?$rid=1",
        "$iothub/methods/res/200/?$rid=1",
        "foo/bar",
    ] {
        let hello = leaf1.clone().will(topic, "forged", false);
        assert_eq!(door.refused(&hello).await, code::NOT_AUTHORIZED, "{topic}");
    }
    bystander.works().await;

    // Every end but DISCONNECT; the next connection comes when the last one has ended.
    let with_will = |body: &str, retain| leaf1.clone().will(&own, body, retain);
    let lost = door.admitted(&with_will("lost", true)).await;
    drop(lost);
    ended(&lab, 1).await;
    let broken = door.admitted(&with_will("broken", false)).await;
    broken.expect_close_after(&[0xf0, 0]).await;
    ended(&lab, 2).await;
    let foreign = door.admitted(&with_will("foreign", false)).await;
    let forged = publish(&telemetry("leaf2"), QoS::AtLeastOnce, 1, b"forged");
    foreign.expect_close_after(&forged).await;
    ended(&lab, 3).await;
    door.admitted(&with_will("taken back", false))
        .await
        .disconnect()
        .await;
    ended(&lab, 4).await;
    let taken_over = door.admitted(&with_will("taken over", false)).await;
    let mut last = door.admitted(&leaf1).await;
    assert_eq!(taken_over.until_close().await, []);
    ended(&lab, 5).await;
    last.publish(&own, "last", 1).await;

    let bodies = ["lost", "broken", "foreign", "taken over", "last"];
    only_these_arrive(&lab, "leaf1", &bodies).await;
    for entry in lab.ledger().entries_of("leaf1").expect("the ledger") {
        let body = String::from_utf8(entry.body().expect("a body")).expect("text");
        let value = |name: &str| entry.properties.get(name).cloned().flatten();
        let will = (body != "last").then(|| "Will".to_owned());
        assert_eq!(value("iothub-MessageType"), will, "{body}");
        assert_eq!(value("MessageType"), will, "{body}");
        let retain = (body == "lost").then(|| "true".to_owned());
        assert_eq!(value("mqtt-retain"), retain, "{body}");
    }
    for id in ["leaf2", "edge1/m"] {
        let mut client = door.admitted(&Hello::of(&lab, id)).await;
        client.publish(&telemetry(id), "own", 1).await;
        only_these_arrive(&lab, id, &["own"]).await;
    }
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// Waits until so many connections of leaf1 have ended, as its log says.
async fn ended(lab: &Lab, connections: usize) {
    let deadline = Instant::now() + SOON;
    loop {
        let log = lab.log("edge1").expect("a log");
        let ends = log.matches("Connection of leaf1 closed").count();
        if ends >= connections {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{ends} of {connections} have ended"
        );
        sleep(Duration::from_millis(10)).await;
    }
}

/// S13: thousands of properties, escapes within escapes, user names and tokens of 64 KiB, long
/// chains and huge certificates: all in linear time, within limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s13_much_of_everything_takes_linear_time() {
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::of(&lab, "edge1");
    let leaf1 = Hello::of(&lab, "leaf1");
    let own = telemetry("leaf1");
    let room = 65_535 - own.len();
    let mut client = door.admitted(&leaf1).await;
    let before = resident(&lab);
    let filled = |unit: &str| unit.repeat(room / unit.len());
    let numbered: String = (0..10_000).map(|number| format!("{number}&")).collect();
    let bags = [
        ("10,000 properties", numbered),
        ("one property again and again", filled("a=1&")),
        ("the same in two cases", filled("a=1&A=2&")),
        ("properties without a name", filled("=1&")),
        ("nothing but separators", filled("&")),
        ("one value", format!("a={}", "b".repeat(room - 2))),
        ("escapes", filled("%41")),
        ("escapes of escapes", filled("%2525")),
        ("half escapes", filled("%")),
        ("letters that are none", filled("%ff")),
        ("escapes of NUL", filled("%00")),
        ("equals signs", filled("=")),
    ];
    for (what, bag) in bags {
        let begun = Instant::now();
        client.publish(&format!("{own}{bag}"), what, 1).await;
        assert!(begun.elapsed() < SOON, "{what} took {:?}", begun.elapsed());
    }
    bystander.works().await;

    // CONNECT as large as fields allow.
    let huge = "x".repeat(65_535);
    let with = |user_name: &str, password: &str| Hello {
        user_name: user_name.to_owned(),
        password: password.to_owned(),
        ..leaf1.clone()
    };
    let chain = format!(
        "{}&auth-chain={}",
        leaf1.user_name,
        "leaf1%3B".repeat(8_000)
    );
    let parameters = format!("{}{}", leaf1.user_name, "&a=b".repeat(15_000));
    for (what, hello) in [
        ("user name", with(&huge, &leaf1.password)),
        ("token", with(&leaf1.user_name, &huge)),
        ("chain", with(&chain, &leaf1.password)),
        ("parameters", with(&parameters, &leaf1.password)),
        (
            "fields of a token",
            with(
                &leaf1.user_name,
                &format!("{}{}", leaf1.password, "&se=1".repeat(12_000)),
            ),
        ),
    ] {
        let begun = Instant::now();
        assert_eq!(door.refused(&hello).await, code::USER_NAME, "{what}");
        assert!(begun.elapsed() < SOON, "{what} took {:?}", begun.elapsed());
    }
    bystander.works().await;

    // A certificate matters to nobody beside a token, long chains neither; one that is larger than
    // TLS allows ends the handshake and nothing else.
    let certificate = || tls::ClientCertificate::self_signed("somebody.example", []);
    let chain = certificate().followed_by((1..20).map(|_| certificate()));
    let chained = door
        .clone()
        .tls(tls::connector(&lab, tls::BOTH, Some(chain)));
    chained.admitted(&leaf1).await.ping().await;
    let names = (0..10_000).map(|number| format!("name{number}.somebody.example"));
    let huge = tls::ClientCertificate::self_signed("somebody.example", names);
    let refused = door
        .clone()
        .tls(tls::connector(&lab, tls::BOTH, Some(huge)));
    // TLS 1.3 tells the client only after its own part is done: the first answer says it.
    if let Ok(mut client) = refused.try_open().await {
        let _ = client.try_send(&leaf1.packet()).await;
        assert_eq!(client.connack().await, None, "a certificate of 250 KB");
    }
    bystander.works().await;
    assert_grown_at_most(&lab, before, 48, "much of everything");
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}
