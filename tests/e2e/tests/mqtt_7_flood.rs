//! Acceptance 7 of the MQTT side: what clients can do in masses, in pieces or never, S5, S6, S7 and
//! S12 of the security tests.
//!
//! In each test a bystander goes on working, and the hub has not panicked.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "these are the tests"
)]

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::bystander::Bystander;
use edgehub_tests::https::Request;
use edgehub_tests::mqtt::{
    Door, Hello, MqttClient, code, ping, puback, publish, subscribe, subscribe_all, telemetry,
};
use edgehub_tests::only_these_arrive;
use edgehub_tests::token::Token;
use edgehub_tests::websocket::{self, WebSocket, frame, header, opcode};
use mqttbytes::QoS;
use mqttbytes::v4::Packet;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

const BYSTANDER: &str = "bystander";
const MEBIBYTE: u64 = 1 << 20;

/// What module `sender` says on `out` comes to input `in1` of module `m`.
fn builder() -> LabBuilder {
    let route = r#"FROM /messages/modules/sender/outputs/out
        INTO BrokeredEndpoint("/modules/m/inputs/in1")"#;
    let lab = LabBuilder::new()
        .layers(1)
        .leaf(BYSTANDER, "edge1")
        .leaf("leaf1", "edge1");
    let lab = lab.module("edge1", "m").module("edge1", "sender");
    lab.env("edge1", "routes__m", route)
}

fn resident(lab: &Lab) -> u64 {
    lab.resident_bytes("edge1").expect("the hub runs")
}

fn assert_grown_below(lab: &Lab, before: u64, limit: u64, what: &str) {
    let grown = resident(lab).saturating_sub(before);
    println!("{what}: grown by {} KiB", grown >> 10);
    assert!(grown < limit, "{what}: grown by {grown} bytes");
}

/// S5: packets in pieces of one byte, cut anywhere, or all in one write are the same packets; over
/// WebSocket too, whatever the frames. What no WebSocket client may send ends the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s05_pieces_are_put_together_and_what_is_broken_is_closed() {
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::of(&lab, "edge1");
    let hello = Hello::of(&lab, "leaf1");
    let own = telemetry("leaf1");
    let work = [
        subscribe(1, "devices/leaf1/messages/devicebound/#"),
        publish(&own, QoS::AtLeastOnce, 2, b"piece"),
        ping(),
    ]
    .concat();
    let all = [hello.packet(), work.clone()].concat();
    let mut bodies = Vec::new();

    // A TLS record for every byte; all in one record; cut in two at every place.
    let mut client = door.open().await;
    for byte in &all {
        client.send(&[*byte]).await;
    }
    expect_work_done(&mut client, true).await;
    let mut client = door.open().await;
    client.send(&all).await;
    expect_work_done(&mut client, true).await;
    for cut in 1..work.len() {
        let (head, tail) = work.split_at(cut);
        client.send(head).await;
        client.send(tail).await;
        expect_work_done(&mut client, false).await;
    }
    bodies.resize(2 + work.len() - 1, "piece");
    bystander.works().await;

    // Frames of one byte, one frame for all, one message of many frames, with questions between.
    let single = |byte: &u8| frame(true, opcode::BINARY, &[*byte]);
    let one_by_one: Vec<u8> = all.iter().flat_map(single).collect();
    let at_once = frame(true, opcode::BINARY, &all);
    let mut parts = frame(false, opcode::BINARY, &[]);
    for (index, byte) in all.iter().enumerate() {
        parts.extend(frame(
            index == all.len() - 1,
            opcode::CONTINUATION,
            &[*byte],
        ));
    }
    for frames in [one_by_one, at_once, parts] {
        let mut socket = websocket::connect(&lab, "edge1").await;
        socket.send(&frames).await;
        expect_ws_work_done(&mut socket).await;
        bodies.push("piece");
        // A question in the middle of a message is answered, with what it asked.
        let question = [
            frame(false, opcode::BINARY, &ping()[..1]),
            frame(true, opcode::PING, b"are you there?"),
            frame(true, opcode::CONTINUATION, &ping()[1..]),
        ];
        socket.send(&question.concat()).await;
        let pong = socket.next_frame().await;
        assert_eq!(pong, Some((opcode::PONG, b"are you there?".to_vec())));
        assert_eq!(socket.next().await, Some(Packet::PingResp));
    }

    for (what, bytes) in [
        ("a text frame", frame(true, opcode::TEXT, &hello.packet())),
        (
            "a frame without mask",
            [&*header(true, opcode::BINARY, 2, false), &ping()].concat(),
        ),
        (
            "a frame of 2^63 bytes",
            header(true, opcode::BINARY, 1 << 63, true),
        ),
        (
            "a frame of 1 GiB",
            header(true, opcode::BINARY, 1 << 30, true),
        ),
        ("an unknown opcode", frame(true, 3, b"x")),
        ("a reserved bit", frame(true, opcode::BINARY | 0x40, b"x")),
        (
            "a continuation of nothing",
            frame(true, opcode::CONTINUATION, b"x"),
        ),
        (
            "a control frame in pieces",
            frame(false, opcode::PING, b"x"),
        ),
        (
            "a control frame of 126 bytes",
            frame(true, opcode::PING, &[0; 126]),
        ),
        (
            "a message within a message",
            [
                frame(false, opcode::BINARY, b"\x10"),
                frame(true, opcode::BINARY, b"\x10"),
            ]
            .concat(),
        ),
        (
            "no MQTT",
            frame(true, opcode::BINARY, b"GET / HTTP/1.1\r\n"),
        ),
        ("a close", frame(true, opcode::CLOSE, &[])),
    ] {
        println!("{what}");
        let mut socket = websocket::connect(&lab, "edge1").await;
        socket.send(&bytes).await;
        socket.expect_close(what).await;
    }
    bystander.works().await;

    // A message of a hundred thousand empty frames costs nothing, and ends somehow.
    let before = resident(&lab);
    let mut socket = websocket::connect(&lab, "edge1").await;
    let nothing = frame(false, opcode::CONTINUATION, &[]).repeat(1000);
    socket.send(&frame(false, opcode::BINARY, &[])).await;
    for _ in 0..100 {
        if socket.try_send(&nothing).await.is_err() {
            break;
        }
    }
    let end = [
        frame(true, opcode::CONTINUATION, &[]),
        frame(true, opcode::CLOSE, &[]),
    ];
    let _ = socket.try_send(&end.concat()).await;
    socket.expect_close("a flood of continuations").await;
    assert_grown_below(&lab, before, 8 * MEBIBYTE, "a flood of continuations");
    door.admitted(&hello).await.publish(&own, "last", 1).await;
    bodies.push("last");
    only_these_arrive(&lab, "leaf1", &bodies).await;
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

async fn expect_work_done(client: &mut MqttClient, with_connack: bool) {
    if with_connack {
        assert_eq!(client.connack().await, Some(code::ACCEPTED));
    }
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(client.next().await.expect("an answer"));
    }
    assert_work_done(&answers);
}

async fn expect_ws_work_done(socket: &mut WebSocket) {
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(socket.next().await.expect("an answer"));
    }
    let connack = answers.remove(0);
    assert!(matches!(&connack, Packet::ConnAck(_)), "{connack:?}");
    assert_work_done(&answers);
}

/// The three answers are those to the work; PINGRESP and SUBACK wait for no commit.
fn assert_work_done(answers: &[Packet]) {
    let mut kinds: Vec<String> = answers
        .iter()
        .map(|packet| match packet {
            Packet::SubAck(ack) => format!("SUBACK {}", ack.pkid),
            Packet::PubAck(ack) => format!("PUBACK {}", ack.pkid),
            other => format!("{other:?}"),
        })
        .collect();
    kinds.sort();
    assert_eq!(kinds, ["PUBACK 2", "PingResp", "SUBACK 1"]);
}

/// S6: clients that send and do not read, a client that takes its messages slowly or not at all,
/// hundreds of idle clients, thousands of handshakes that never end: memory stays bounded, the
/// others hardly notice, and nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s06_floods_are_held_back_and_others_go_on() {
    const IDLE: usize = 300;
    let lab = (1..=IDLE).fold(builder(), |lab, number| {
        lab.leaf(format!("idle{number}"), "edge1")
    });
    let lab = lab.start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let quiet = slowest(&mut bystander, 50).await;

    // Idle clients.
    let before = resident(&lab);
    let door = Door::direct(&lab, "edge1");
    let mut idle = Vec::new();
    for number in 1..=IDLE {
        idle.push(
            door.admitted(&Hello::of(&lab, &format!("idle{number}")))
                .await,
        );
    }
    assert_grown_below(&lab, before, IDLE as u64 * 64 * 1024, "idle clients");

    // A module that does not read its input, while 10 MB come for it.
    let narrow = door.clone().receive_buffer(8192);
    let mut slow = narrow.admitted(&Hello::of(&lab, "edge1/m")).await;
    assert_eq!(
        slow.subscribe(1, &[("devices/edge1/modules/m/inputs/#", 1)])
            .await,
        [1]
    );
    let mut source = door.admitted(&Hello::of(&lab, "edge1/sender")).await;
    let output = telemetry("edge1/sender") + "%24.on=out";
    let body = |number: u16| format!("{number:>32768}");
    for number in 1..=300 {
        source.publish(&output, body(number), number).await;
    }

    // Leaves that publish, ping and ask for their twin as fast as they can and read nothing.
    let before = resident(&lab);
    let until = Instant::now() + Duration::from_secs(6);
    let mut floods = JoinSet::new();
    for number in 1..=4_u16 {
        let id = format!("idle{number}");
        let hello = Hello::of(&lab, &id);
        let mut client = narrow.admitted(&hello).await;
        assert_eq!(client.subscribe(1, &[("$iothub/twin/res/#", 0)]).await, [0]);
        let bytes = match number {
            1 => publish(&telemetry(&id), QoS::AtLeastOnce, 1, &[b'x'; 1024]).repeat(16),
            2 => publish("foo/bar", QoS::AtLeastOnce, 1, b"").repeat(1000),
            3 => ping().repeat(8192),
            _ => publish("$iothub/twin/GET/?$rid=1", QoS::AtMostOnce, 0, b" ").repeat(100),
        };
        floods.spawn(async move {
            let times = client.flood(&bytes, until).await;
            (client, times * bytes.len() as u64)
        });
    }
    let noisy = slowest(&mut bystander, 50).await;
    let floods = floods.join_all().await;
    let sent: Vec<u64> = floods.iter().map(|(_, bytes)| *bytes >> 10).collect();
    println!("slowest round trip: {quiet:?} alone, {noisy:?} under floods of {sent:?} KiB");
    assert_grown_below(&lab, before, 64 * MEBIBYTE, "floods");
    // The clients' half of the floods runs on the same two cores. A bystander that waits for a
    // flood, and not for its turn, waits for as long as the flood lasts.
    assert!(noisy < 2 * quiet + Duration::from_secs(2), "{noisy:?}");
    drop(floods);

    // The slow one takes all of it, in order, as it acknowledges.
    for number in 1..=300 {
        let input = slow.expect_publish().await;
        assert_eq!(input.payload, body(number).as_bytes(), "{number}");
        slow.send(&puback(input.pkid)).await;
    }
    slow.ping().await;
    for client in &mut idle[4..] {
        client.ping().await;
    }
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// The slowest of so many round trips.
async fn slowest(bystander: &mut Bystander, rounds: usize) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        slowest = slowest.max(bystander.work().await);
    }
    slowest
}

/// S6, S12: thousands of handshakes that never end, from one address: who comes from another one is
/// let in meanwhile, and the half-open ones are closed in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s06_half_open_handshakes_keep_nobody_out() {
    const HALF_OPEN: usize = 2000;
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let before = resident(&lab);
    let attacker = Door::direct(&lab, "edge1").from(IpAddr::V4(Ipv4Addr::new(127, 66, 6, 6)));
    let mut half_open = Vec::new();
    for _ in 0..HALF_OPEN {
        let Ok(mut tcp) = attacker.tcp().await else {
            break;
        };
        // The beginning of a ClientHello.
        let _ = tcp.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00]).await;
        half_open.push(tcp);
    }
    println!("{} half-open connections", half_open.len());
    let door = Door::of(&lab, "edge1");
    for _ in 0..5 {
        let begun = Instant::now();
        door.admitted(&Hello::of(&lab, "leaf1")).await.ping().await;
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "let in after {took:?}");
    }
    bystander.works().await;
    assert_grown_below(&lab, before, 32 * MEBIBYTE, "half-open handshakes");
    let begun = Instant::now();
    for tcp in &mut half_open {
        let _ = tcp.read(&mut [0; 16]).await;
    }
    println!("the last one was closed after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(30), "closed in time");
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S7: what is begun and never completed is bounded for each session: subscriptions, deliveries
/// without PUBACK, methods without answer, QoS 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s07_what_is_never_completed_is_bounded() {
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::of(&lab, "edge1");
    let m = Hello::of(&lab, "edge1/m");
    let mut client = door.admitted(&m).await;

    // 100,000 filters: the first hundred are granted, the others refused; the session works on.
    let before = resident(&lab);
    let mut granted = 0;
    for packet in 0..2_000_u32 {
        let filters: Vec<String> = (0..50)
            .map(|number| {
                format!(
                    "devices/edge1/modules/m/inputs/in{}/#",
                    packet * 50 + number
                )
            })
            .collect();
        let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), 1)).collect();
        client.send(&subscribe_all(1, &filters)).await;
        let codes = client.expect_suback(1).await;
        granted += codes.iter().filter(|code| **code == 1).count();
    }
    assert_eq!(granted, 100, "filters of one session");
    assert_grown_below(&lab, before, 16 * MEBIBYTE, "100,000 filters");
    let (client, present) = {
        client.disconnect().await;
        door.resumed(&m).await
    };
    assert!(present);
    client.disconnect().await;
    door.admitted(&m.clone().clean()).await.disconnect().await;
    bystander.works().await;

    // Deliveries: a window of sixteen, and the next one for each that is acknowledged.
    let mut client = door.admitted(&m).await;
    let filters = [
        ("devices/edge1/modules/m/inputs/in1/#", 1),
        ("$iothub/methods/POST/#", 1),
    ];
    assert_eq!(client.subscribe(1, &filters).await, [1, 1]);
    let mut source = door.admitted(&Hello::of(&lab, "edge1/sender")).await;
    let output = telemetry("edge1/sender") + "%24.on=out";
    for number in 1..=100_u16 {
        source.publish(&output, number.to_string(), number).await;
    }
    let mut unacknowledged = Vec::new();
    for number in 1..=16 {
        let input = client.expect_publish().await;
        assert_eq!(input.payload, number.to_string().as_bytes());
        unacknowledged.push(input.pkid);
    }
    client.ping().await;
    for number in 17..=100 {
        client.send(&puback(unacknowledged.remove(0))).await;
        let input = client.expect_publish().await;
        assert_eq!(input.payload, number.to_string().as_bytes());
        unacknowledged.push(input.pkid);
    }
    client.ping().await;
    for packet_id in unacknowledged {
        client.send(&puback(packet_id)).await;
    }
    client.ping().await;

    unanswered_methods(&lab, &mut client).await;
    client.ping().await;

    // QoS 2 leaves nothing to complete.
    let twice = publish(&telemetry("edge1/m"), QoS::ExactlyOnce, 1, b"x");
    client.expect_close_after(&twice).await;
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// 80 calls of a method that nobody answers: as many as may wait time out, the others are refused at
/// once. Each caller has its answer.
async fn unanswered_methods(lab: &Lab, client: &mut MqttClient) {
    let body = json!({ "methodName": "stall", "responseTimeoutInSeconds": 5, "payload": null });
    let path = "/twins/edge1/modules/m/methods?api-version=2018-06-30";
    let call = Request::json("POST", path, &body)
        .with("Authorization", Token::of(lab, "edge1/sender").text())
        .with("x-ms-edge-moduleId", "edge1/sender");
    let begun = Instant::now();
    let calls = (0..80).map(|_| call.send(lab, "edge1"));
    let answers = statuses_of(calls).await;
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    let count = |status: u16| answers.iter().filter(|answer| **answer == status).count();
    assert_eq!((count(504), count(429)), (64, 16), "{answers:?}");
    for _ in 0..64 {
        let request = client.expect_publish().await;
        let prefix = "$iothub/methods/POST/stall/?$rid=";
        assert!(request.topic.starts_with(prefix), "{}", request.topic);
        assert_eq!(request.qos, QoS::AtMostOnce);
    }
}

/// Awaits all of them at the same time; the statuses.
async fn statuses_of(
    calls: impl Iterator<Item = impl Future<Output = edgehub_tests::https::Answer>>,
) -> Vec<u16> {
    let mut calls: Vec<_> = calls.map(Box::pin).collect();
    let mut statuses = Vec::new();
    std::future::poll_fn(|task| {
        calls.retain_mut(|call| match call.as_mut().poll(task) {
            std::task::Poll::Ready(answer) => {
                statuses.push(answer.status);
                false
            }
            std::task::Poll::Pending => true,
        });
        if calls.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    statuses
}

/// S12: whoever says nothing, or one byte now and then, is closed in time, at whatever stage: TCP,
/// TLS, CONNECT, MQTT, HTTP, WebSocket. Keep-alive 0 and 65,535 are no way around it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_mqtt_7_s12_silence_and_dribble_end_in_time() {
    let lab = builder()
        .env("edge1", "MqttSettings__ConnectArrivalTimeout", "00:00:08")
        .env("edge1", "MqttSettings__MaxKeepAliveTimeout", "00:00:08");
    let lab = lab.start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let door = Door::of(&lab, "edge1");
    let https = lab.host("edge1").expect("a host");
    let https = (https.hostname.clone(), https.ports.https);
    let hello = |number: u16| Hello::of(&lab, "leaf1").keep_alive(number);

    // Silence or a byte a second, before anything, in TLS, in HTTP.
    let mut ends = JoinSet::new();
    for sends in [
        Vec::new(),
        vec![
            0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03,
        ],
    ] {
        let tcp = door.tcp().await.expect("TCP");
        ends.spawn(until_end("TLS at 8883", Dribbled::Tcp(tcp), sends.clone()));
        let tcp = tokio::net::TcpStream::connect((https.0.as_str(), https.1)).await;
        ends.spawn(until_end(
            "TLS at 443",
            Dribbled::Tcp(tcp.expect("TCP")),
            sends,
        ));
    }
    let connect = hello(60).packet();
    for sends in [Vec::new(), connect] {
        ends.spawn(until_end(
            "CONNECT",
            Dribbled::Mqtt(door.open().await),
            sends,
        ));
    }
    let head = b"GET /$iothub/websocket HTTP/1.1\r\nUpgrade: websocket\r\n".to_vec();
    for sends in [Vec::new(), head] {
        let socket = WebSocket::open(&lab, "edge1").await;
        ends.spawn(until_end("HTTP", Dribbled::Web(socket), sends));
    }
    let socket = websocket::connect(&lab, "edge1").await;
    ends.spawn(until_end(
        "CONNECT over WebSocket",
        Dribbled::Web(socket),
        Vec::new(),
    ));

    // Connected, silent, or in the middle of a packet that never ends.
    let part = publish(&telemetry("leaf1"), QoS::AtLeastOnce, 1, &[b'x'; 200]);
    for (id, keep_alive, sends) in [
        ("leaf1", 65_535, Vec::new()),
        ("edge1/m", 0, Vec::new()),
        ("edge1/sender", 0, part),
    ] {
        let hello = Hello::of(&lab, id).keep_alive(keep_alive);
        let client = door.admitted(&hello).await;
        ends.spawn(until_end("connected", Dribbled::Mqtt(client), sends));
    }
    loop {
        let end = tokio::select! {
            end = ends.join_next() => end,
            () = sleep(Duration::from_secs(1)) => {
                bystander.works().await;
                continue;
            }
        };
        let Some(end) = end else { break };
        let (what, dribbles, took) = end.expect("it was watched to its end");
        println!("{what}, dribbling: {dribbles}: closed after {took:?}");
        assert!(
            took < Duration::from_secs(14),
            "{what}, dribbling: {dribbles}: {took:?}"
        );
        if what == "connected" {
            assert!(took > Duration::from_secs(7), "{what}: {took:?}");
        }
    }

    // A head of more than 16 KiB is refused before it ends.
    let mut socket = WebSocket::open(&lab, "edge1").await;
    let line = format!("x: {}\r\n", "y".repeat(1000));
    let begun = Instant::now();
    let _ = socket
        .try_send(b"GET /$iothub/websocket HTTP/1.1\r\n")
        .await;
    for _ in 0..64 {
        if socket.try_send(line.as_bytes()).await.is_err() {
            break;
        }
    }
    socket.end().await;
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// Something that is written to byte by byte.
enum Dribbled {
    Tcp(tokio::net::TcpStream),
    Mqtt(MqttClient),
    Web(WebSocket),
}

/// Writes these bytes, one a second, until the hub closes; whether there were any, and how long that
/// took.
async fn until_end(
    what: &'static str,
    mut stream: Dribbled,
    bytes: Vec<u8>,
) -> (&'static str, bool, Duration) {
    let begun = Instant::now();
    let dribbles = !bytes.is_empty();
    let mut bytes = bytes.into_iter();
    let mut next = begun;
    loop {
        let closed = async {
            match &mut stream {
                Dribbled::Tcp(tcp) => {
                    let mut buffer = [0; 1024];
                    while matches!(tcp.read(&mut buffer).await, Ok(1..)) {}
                }
                Dribbled::Mqtt(client) => assert_eq!(client.receive().await, None, "{what}"),
                Dribbled::Web(socket) => socket.end().await,
            }
        };
        tokio::select! {
            () = closed => return (what, dribbles, begun.elapsed()),
            () = sleep_until(next), if bytes.len() > 0 => {}
        }
        next += Duration::from_secs(1);
        let byte = [bytes.next().unwrap_or_default()];
        // A write to a closed connection fails; the read says so next.
        let _ = match &mut stream {
            Dribbled::Tcp(tcp) => tcp.write_all(&byte).await,
            Dribbled::Mqtt(client) => client.try_send(&byte).await,
            Dribbled::Web(socket) => socket.try_send(&byte).await,
        };
    }
}
