//! Acceptance 7 of the AMQP side: S2, S3, S5, S6, S7 and S12 of the security tests.
//!
//! In each test a bystander goes on working, and the hub has not panicked.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use std::time::Duration;

use edgehub_lab::{Lab, LabBuilder};
use edgehub_tests::amqp::{
    AMQP, Amqp, Link, Message, SASL, Transfer, begin, code, credit, described, frame, list, map,
    null, open, string, uint,
};
use edgehub_tests::bystander::Bystander;
use edgehub_tests::websocket;
use tokio::task::JoinSet;
use tokio::time::Instant;

const BYSTANDER: &str = "bystander";

fn builder() -> LabBuilder {
    let lab = LabBuilder::new().layers(1).leaf(BYSTANDER, "edge1");
    lab.leaves(2, "edge1").module("edge1", "m")
}

fn resident(lab: &Lab) -> u64 {
    lab.resident_bytes("edge1").expect("the hub runs")
}

/// S2: frames that break the framing close the connection with the standard's condition, and sessions
/// and links of one connection are bounded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_7_s02_what_breaks_the_framing_is_closed() {
    const MANY: u32 = 10_000;
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let framing = "amqp:connection:framing-error";
    let head = |size: u32, doff: u8, kind: u8, channel: u16| {
        let channel = channel.to_be_bytes();
        [&size.to_be_bytes()[..], &[doff, kind], &channel].concat()
    };
    let padded = |head: Vec<u8>| [head, vec![0; 64]].concat();
    for (what, bytes) in [
        ("length 0xffffffff", head(u32::MAX, 2, 0, 0)),
        ("length 0", head(0, 2, 0, 0)),
        ("length 7", head(7, 2, 0, 0)),
        ("data offset 0", padded(head(72, 0, 0, 0))),
        ("data offset 1", padded(head(72, 1, 0, 0))),
        ("data offset 255", padded(head(72, 255, 0, 0))),
        ("an unknown type", padded(head(72, 2, 9, 0))),
        ("channel 65535", frame(65_535, &begin())),
    ] {
        let mut client = Amqp::session(&lab, "edge1").await;
        client.send(&bytes).await;
        assert_eq!(
            client.until_closed().await.as_deref(),
            Some(framing),
            "{what}"
        );
    }
    let tiny = [string("raw"), null(), uint(1)];
    let mut client = Amqp::connect(&lab, "edge1").await;
    let tiny = frame(0, &described(code::OPEN, &list(&tiny)));
    client.send(&[AMQP.to_vec(), tiny].concat()).await;
    assert_eq!(client.header().await, AMQP);
    client.expect(code::OPEN).await;
    assert_eq!(
        client.until_closed().await.as_deref(),
        Some("amqp:invalid-field")
    );
    bystander.works().await;

    // Each begin beyond the limit is ended, and one beyond the channels closes the connection.
    let before = resident(&lab);
    let mut client = Amqp::session(&lab, "edge1").await;
    let begins = (1..MANY).map(|n| frame(u16::try_from(n).expect("small"), &begin()));
    let _ = client.try_send(&begins.collect::<Vec<_>>().concat()).await;
    let mut ended = 0;
    let condition = loop {
        match client.try_next().await {
            None => break None,
            Some(frame) if frame.code == code::CLOSE => break frame.condition(0),
            Some(frame) if frame.code == code::END => {
                assert_eq!(
                    frame.condition(0).as_deref(),
                    Some("amqp:resource-limit-exceeded")
                );
                ended += 1;
            }
            Some(frame) => assert_eq!(frame.code, code::BEGIN),
        }
    };
    assert_eq!(condition.as_deref(), Some(framing));
    assert_eq!(ended, 8_192 - 1_024, "sessions beyond the limit");

    // Links that are refused and never detached by the client are bounded as well.
    let mut client = Amqp::session(&lab, "edge1").await;
    let mut refused = 0;
    let condition = 'all: loop {
        assert!(refused <= MANY, "links without a bound");
        let attaches = (refused..refused + 1_000).map(|n| {
            let link = Link::sender(n, "/devices/leaf1/messages/events");
            frame(0, &link.attach())
        });
        let _ = client
            .try_send(&attaches.collect::<Vec<_>>().concat())
            .await;
        for _ in 0..1_000 {
            let attached = client.next().await;
            if attached.code == code::CLOSE {
                break 'all attached.condition(0);
            }
            assert_eq!(attached.code, code::ATTACH);
            let detach = client.expect(code::DETACH).await;
            let condition = detach.condition(2);
            let condition = condition.unwrap_or_default();
            // Nobody has shown a token; later it is the limit of links.
            let wanted = ["amqp:unauthorized-access", "amqp:resource-limit-exceeded"];
            assert!(wanted.contains(&&*condition), "{condition}");
            refused += 1;
        }
    };
    println!("closed after {refused} refused links");
    assert_eq!(condition.as_deref(), Some("amqp:resource-limit-exceeded"));
    let grown = resident(&lab).saturating_sub(before);
    println!("grown by {grown} bytes");
    assert!(grown < 64 << 20, "{grown} bytes");
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S3: depth is an error, wherever it comes: in performatives, in link properties, in messages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_7_s03_depth_is_an_error_and_not_a_crash() {
    const DEPTH: usize = 100_000;
    let lab = builder().start().await.expect("the lab starts");
    let bystander = Bystander::connect(&lab, BYSTANDER).await;
    // A described value of a described value; each level takes three bytes.
    let described_deep: Vec<u8> = [b"\x00\x53\x10".repeat(DEPTH / 10), vec![0x45]].concat();
    // A list in a list; as deep as a frame holds.
    let mut list_deep = vec![0x45];
    for _ in 0..6_000 {
        list_deep = list(&[list_deep]);
    }
    let mut map_deep = null();
    for _ in 0..3_000 {
        map_deep = map(&[(uint(0), map_deep)]);
    }
    for (what, body) in [
        ("described", described_deep.clone()),
        ("lists", described(code::OPEN, &list_deep)),
        (
            "maps",
            described(code::OPEN, &list(&[string("c"), map_deep.clone()])),
        ),
    ] {
        let mut client = Amqp::session(&lab, "edge1").await;
        client.say(&body).await;
        assert_eq!(
            client.until_closed().await.as_deref(),
            Some("amqp:decode-error"),
            "{what}"
        );
    }
    // In a message it costs the message alone.
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    client
        .attach(&Link::sender(0, "/devices/leaf1/messages/events"))
        .await;
    for (id, section) in [
        (1, described(0x72, &map_deep)),
        (2, described(0x77, &list_deep)),
        (3, described_deep),
    ] {
        let transfer = Transfer {
            handle: 0,
            id,
            ..Transfer::default()
        };
        let mut parts = section.chunks(60_000).peekable();
        while let Some(part) = parts.next() {
            let more = parts.peek().is_some();
            client
                .say(
                    &Transfer {
                        more,
                        ..transfer.clone()
                    }
                    .with(part),
                )
                .await;
        }
        let settled = client.expect(code::DISPOSITION).await;
        assert_eq!(settled.outcome(), Some(code::REJECTED), "{id}");
        assert_eq!(
            settled.rejection().as_deref(),
            Some("amqp:not-allowed"),
            "{id}"
        );
    }
    let transfer = Transfer {
        handle: 0,
        id: 4,
        ..Transfer::default()
    };
    let settled = client
        .deliver(&transfer, &Message::of(b"flat").encode())
        .await;
    assert_eq!(settled.outcome(), Some(code::ACCEPTED));
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S5: every byte in a TLS record of its own, and WebSockets that cut everything; what is no binary
/// message is closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_7_s05_pieces_are_put_together() {
    let lab = builder().start().await.expect("the lab starts");
    let bystander = Bystander::connect(&lab, BYSTANDER).await;
    let start = [AMQP.to_vec(), frame(0, &open(None)), frame(0, &begin())].concat();
    let mut client = Amqp::connect(&lab, "edge1").await;
    for byte in &start {
        client.send(&[*byte]).await;
    }
    assert_eq!(client.header().await, AMQP);
    client.expect(code::OPEN).await;
    client.expect(code::BEGIN).await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    client
        .attach(&Link::sender(0, "/devices/leaf1/messages/events"))
        .await;
    let transfer = Transfer {
        handle: 0,
        id: 1,
        ..Transfer::default()
    };
    for byte in frame(0, &transfer.with(&Message::of(b"in pieces").encode())) {
        client.send(&[byte]).await;
    }
    let settled = client.expect(code::DISPOSITION).await;
    assert_eq!(settled.outcome(), Some(code::ACCEPTED));

    for size in [1, 3, 1_000] {
        let upgrade = websocket::upgrade(&lab, "edge1", "/x", Some("AMQPWSB10")).await;
        assert_eq!(upgrade.status, 101, "{}", upgrade.head);
        let mut socket = upgrade.socket;
        for piece in start.chunks(size) {
            socket.send_binary(piece).await;
        }
        let mut bytes = Vec::new();
        while bytes.len() < 60 {
            let (opcode, payload) = socket.next_frame().await.expect("open");
            assert_eq!(opcode, 2, "binary messages alone");
            bytes.extend(payload);
        }
        assert!(bytes.starts_with(&AMQP));
    }
    let upgrade = websocket::upgrade(&lab, "edge1", "/x", Some("AMQPWSB10")).await;
    let mut socket = upgrade.socket;
    socket.send(&websocket::frame(true, 1, b"AMQP")).await;
    socket.expect_close("a text message").await;
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S6: who does not read is not read, and is closed in the end; connections that say nothing keep
/// nobody out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_7_s06_floods_are_held_back_and_others_go_on() {
    const SILENT: usize = 600;
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let before = resident(&lab);

    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(Amqp::connect(&lab, "edge1").await);
    }
    bystander.works().await;
    let mut others = Amqp::session(&lab, "edge1").await;
    others.cbs().await;
    others.authenticate(&lab, "leaf2", 0).await;

    // Each flow asks for an answer, and none is read.
    let mut flood = Amqp::session(&lab, "edge1").await;
    let echo = [
        uint(1),
        uint(2_048),
        uint(0),
        uint(2_048),
        null(),
        null(),
        null(),
        null(),
        null(),
        vec![0x41],
    ];
    let flows = frame(0, &described(code::FLOW, &list(&echo))).repeat(2_000);
    let begun = Instant::now();
    let stalled = loop {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the flood was never held back"
        );
        match tokio::time::timeout(Duration::from_secs(2), flood.try_send(&flows)).await {
            Err(_) => break true,
            Ok(Err(_)) => break false,
            Ok(Ok(())) => {}
        }
    };
    println!(
        "held back after {:?}, by not reading: {stalled}",
        begun.elapsed()
    );
    bystander.works().await;
    // It is closed for not reading.
    let closed = tokio::time::timeout(Duration::from_secs(60), async {
        while flood.try_send(&flows).await.is_ok() {}
    });
    closed.await.expect("it is closed");
    let grown = resident(&lab).saturating_sub(before);
    println!("grown by {grown} bytes");
    assert!(grown < 64 << 20, "{grown} bytes");
    drop(silent);
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S7: a module that settles nothing gets a window of messages and no more, whatever credit it gives;
/// deliveries that are never completed are bounded too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_7_s07_what_is_never_settled_is_bounded() {
    let route = "FROM /messages/* INTO BrokeredEndpoint(\"/modules/m/inputs/in1\")";
    let lab = builder()
        .env("edge1", "routes__m", route)
        .env("edge1", "routes__up", "FROM /messages/* INTO $upstream")
        .start()
        .await
        .expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let mut module = Amqp::session(&lab, "edge1").await;
    module.cbs().await;
    module.authenticate(&lab, "edge1/m", 0).await;
    let inputs = "/devices/edge1/modules/m/messages/events";
    module.attach(&Link::receiver(0, inputs)).await;
    module.say(&credit(0, 0, 1_000, false)).await;
    for _ in 0..40 {
        bystander.works().await;
    }
    for _ in 0..16 {
        module.expect(code::TRANSFER).await;
    }
    assert!(
        module.is_quiet(Duration::from_secs(1)).await,
        "more than the window"
    );

    // Deliveries that never end: each link holds up to a mebibyte, the connection some of them.
    let before = resident(&lab);
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "leaf1", 0).await;
    client
        .attach(&Link::sender(0, "/devices/leaf1/messages/events"))
        .await;
    let part = vec![0; 60_000];
    let transfer = Transfer {
        handle: 0,
        id: 1,
        more: true,
        ..Transfer::default()
    };
    for _ in 0..20 {
        if client
            .try_send(&frame(0, &transfer.with(&part)))
            .await
            .is_err()
        {
            break;
        }
    }
    let detach = client.expect(code::DETACH).await;
    assert_eq!(
        detach.condition(2).as_deref(),
        Some("amqp:link:message-size-exceeded")
    );

    // On many links, all of them together: nobody needs a token to attach to the node of tokens.
    let mut client = Amqp::session(&lab, "edge1").await;
    'links: for handle in 0..9 {
        client.attach(&Link::sender(handle, "$cbs")).await;
        for _ in 0..17 {
            let transfer = Transfer {
                handle,
                id: handle,
                more: true,
                ..Transfer::default()
            };
            let sent = client.try_send(&frame(0, &transfer.with(&part))).await;
            if sent.is_err() {
                break 'links;
            }
        }
    }
    let close = client.expect(code::CLOSE).await;
    assert_eq!(
        close.condition(0).as_deref(),
        Some("amqp:resource-limit-exceeded")
    );
    let grown = resident(&lab).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes");
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}

/// S12: whoever says nothing, or too slowly, or opens and shows no token, is closed in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_7_s12_silence_and_dribble_end_in_time() {
    /// A minute for each, and what a busy machine takes.
    const LONGEST: Duration = Duration::from_secs(75);
    let lab = builder().start().await.expect("the lab starts");
    let mut bystander = Bystander::connect(&lab, BYSTANDER).await;
    let opened = [AMQP.to_vec(), frame(0, &open(None))].concat();
    let begun = [opened.clone(), frame(0, &begin())].concat();
    // What is said at once, and what comes then, a byte every five seconds. Behind an open those
    // are empty frames: being alive is not being somebody.
    let open_frame = frame(0, &open(None));
    let starts: [(&str, Vec<u8>, Vec<u8>); 8] = [
        ("nothing", Vec::new(), Vec::new()),
        ("a header, slowly", Vec::new(), AMQP.to_vec()),
        ("half a header", AMQP[..4].to_vec(), Vec::new()),
        ("a header", AMQP.to_vec(), Vec::new()),
        (
            "a header and an open, slowly",
            AMQP.to_vec(),
            open_frame.clone(),
        ),
        (
            "a header of SASL and more, slowly",
            SASL.to_vec(),
            open_frame,
        ),
        ("an open", opened, Vec::new()),
        ("a begin", begun, Vec::new()),
    ];
    let mut waiting = JoinSet::new();
    for (what, bytes, slowly) in starts {
        let mut client = Amqp::connect(&lab, "edge1").await;
        client.send(&bytes).await;
        waiting.spawn(async move {
            let from = Instant::now();
            let ended = tokio::time::timeout(LONGEST, async {
                let mut slowly = slowly.into_iter();
                let mut beat = tokio::time::interval(Duration::from_secs(5));
                loop {
                    beat.tick().await;
                    let alive = if what == "a begin" || what == "an open" {
                        frame(0, b"")
                    } else {
                        slowly.next().into_iter().collect()
                    };
                    if client.try_send(&alive).await.is_err() || client.is_closed().await {
                        return;
                    }
                }
            });
            assert!(ended.await.is_ok(), "{what}: open after {LONGEST:?}");
            (what, from.elapsed())
        });
    }
    bystander.works().await;
    while let Some(ended) = waiting.join_next().await {
        let (what, after) = ended.expect("a task");
        println!("{what}: closed after {after:?}");
    }
    bystander.ends_well(&lab).await;
    lab.shutdown().await.expect("the lab ends");
}
