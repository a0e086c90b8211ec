//! Acceptance 1 of the AMQP side, checks 8 to 10: the acceptance checks of the AMQP contract (spec/amqp.md section 10),
//! by number, frame by frame through a real hub with real TLS.

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
    Amqp, Link, Message, Transfer, code, credit, described, disposition, list,
};
use edgehub_tests::service::Service;
use serde_amqp::Value;
use serde_json::json;

const ROUTE: &str =
    "FROM /messages/modules/modA/outputs/out1 INTO BrokeredEndpoint(\"/modules/modB/inputs/in1\")";

async fn lab() -> Lab {
    LabBuilder::new()
        .layers(1)
        .leaves(3, "edge1")
        .leaf("a:b", "edge1")
        .module("edge1", "modA")
        .module("edge1", "modB")
        // So that what is given back comes again at once, not after its lock.
        .upstream("Amqp")
        .env("edge1", "routes__in", ROUTE)
        .env("edge1", "routes__up", "FROM /messages/* INTO $upstream")
        .start()
        .await
        .expect("the lab starts")
}

fn events(id: &str) -> String {
    match id.split_once('/') {
        Some((device, module)) => format!("/devices/{device}/modules/{module}/messages/events"),
        None => format!("/devices/{id}/messages/events"),
    }
}

/// 8: a child hub speaks for three identities by auth chains; one of them leaves, the others stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_08_a_child_hub_speaks_for_its_identities() {
    let lab = LabBuilder::new()
        .layers(2)
        .leaves(3, "edge2")
        .leaf("other", "edge1")
        .start()
        .await
        .expect("the lab starts");
    // The real child would take its place back.
    lab.kill("edge2").await.expect("the child ends");
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    client.authenticate(&lab, "edge2/$edgeHub", 0).await;
    let chain = "com.microsoft:auth-chain";
    let link = |handle: u32, leaf: &str| {
        Link::sender(handle, &events(leaf)).with(chain, &format!("{leaf};edge2"))
    };
    for (handle, leaf) in [(0, "leaf1"), (1, "leaf2"), (2, "leaf3")] {
        client.attach(&link(handle, leaf)).await;
    }
    // On a connection of its own: whom this one knows needs no further proof (spec/amqp.md 3).
    let mut stranger = Amqp::session(&lab, "edge1").await;
    stranger.cbs().await;
    stranger.authenticate(&lab, "edge2/$edgeHub", 0).await;
    for (handle, leaf, chain_text) in [
        (3, "other", "other;edge2"),
        (4, "leaf1", "leaf2;edge2"),
        (5, "leaf1", "leaf1;edge1"),
        (6, "other", "other"),
    ] {
        let wrong = Link::sender(handle, &events(leaf)).with(chain, chain_text);
        assert_eq!(
            stranger.refused(&wrong).await,
            "amqp:unauthorized-access",
            "{chain_text}"
        );
    }
    client
        .say(&described(
            code::DETACH,
            &list(&[
                edgehub_tests::amqp::uint(1),
                edgehub_tests::amqp::boolean(true),
            ]),
        ))
        .await;
    client.expect(code::DETACH).await;
    for (handle, id) in [(0, 1), (2, 2)] {
        let transfer = Transfer {
            handle,
            id,
            ..Transfer::default()
        };
        let settled = client
            .deliver(&transfer, &Message::of(b"on behalf").encode())
            .await;
        assert_eq!(settled.outcome(), Some(code::ACCEPTED));
    }
    edgehub_tests::only_these_arrive(&lab, "leaf1", &[b"on behalf"]).await;
    edgehub_tests::only_these_arrive(&lab, "leaf3", &[b"on behalf"]).await;
    lab.shutdown().await.expect("the lab ends");
}

/// 9: an identity that connects a second time loses its links on the first connection, and nobody
/// else there does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_09_a_duplicate_closes_its_own_links_alone() {
    let lab = lab().await;
    let mut first = Amqp::session(&lab, "edge1").await;
    first.cbs().await;
    for (id, leaf) in [(0, "leaf1"), (1, "leaf2")] {
        first.authenticate(&lab, leaf, id).await;
        first.attach(&Link::sender(id, &events(leaf))).await;
    }
    let mut second = Amqp::session(&lab, "edge1").await;
    second.cbs().await;
    second.authenticate(&lab, "leaf1", 0).await;
    second.attach(&Link::sender(0, &events("leaf1"))).await;
    let detach = first.expect(code::DETACH).await;
    assert_eq!(
        (detach.number(0), detach.condition(2).as_deref()),
        (Some(0), Some("amqp:link:stolen"))
    );
    let transfer = Transfer {
        handle: 1,
        id: 2,
        ..Transfer::default()
    };
    let settled = first
        .deliver(&transfer, &Message::of(b"mine").encode())
        .await;
    assert_eq!(settled.outcome(), Some(code::ACCEPTED));

    // The only identity of a connection: then the connection is closed with it.
    let mut third = Amqp::session(&lab, "edge1").await;
    third.cbs().await;
    third.authenticate(&lab, "leaf1", 0).await;
    third.attach(&Link::sender(0, &events("leaf1"))).await;
    assert_eq!(
        second.until_closed().await.as_deref(),
        Some("amqp:link:stolen")
    );
    lab.shutdown().await.expect("the lab ends");
}

/// 10: a receiver with one credit, draining, dispositions over several links, and every combination
/// of settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_1_check_10_credit_drain_and_ranges() {
    let lab = lab().await;
    let service = Service::of(&lab);
    let mut client = Amqp::session(&lab, "edge1").await;
    client.cbs().await;
    for (id, leaf) in [(0, "leaf1"), (1, "leaf2")] {
        client.authenticate(&lab, leaf, id).await;
        let address = format!("/devices/{leaf}/messages/deviceBound");
        client.attach(&Link::receiver(id, &address)).await;
    }
    // Draining with nothing to send uses the credit up.
    client.say(&credit(0, 0, 5, true)).await;
    let flow = loop {
        let frame = client.next().await;
        assert_eq!(frame.code, code::FLOW, "{frame:?}");
        if frame.number(4) == Some(0) {
            break frame;
        }
    };
    assert_eq!(
        (flow.number(5), flow.number(6), flow.field(8)),
        (Some(5), Some(0), &Value::Bool(true))
    );

    // One credit, one message, although there are two.
    let mut numbers = Vec::new();
    for body in ["one", "two"] {
        numbers.push(service.send("leaf1", &json!({ "body": body })).await);
    }
    client.say(&credit(0, 5, 1, false)).await;
    let first = client.expect(code::TRANSFER).await;
    assert_eq!(first.body(), b"one");
    assert!(
        client.is_quiet(Duration::from_millis(500)).await,
        "no credit, no delivery"
    );
    client.say(&credit(0, 6, 1, false)).await;
    let second = client.expect(code::TRANSFER).await;
    assert_eq!(second.body(), b"two");
    client.say(&credit(1, 0, 1, false)).await;
    let third = service.send("leaf2", &json!({"body": "three"})).await;
    let last = client.expect(code::TRANSFER).await;
    assert_eq!(last.body(), b"three");
    // A range over both links, with ids beyond what is there; then again, which changes nothing.
    let id = |frame: &edgehub_tests::amqp::Frame| {
        u32::try_from(frame.number(1).expect("an id")).expect("small")
    };
    for _ in 0..2 {
        client
            .say(&disposition(
                id(&first),
                Some(id(&last) + 100),
                true,
                code::ACCEPTED,
            ))
            .await;
    }
    for (leaf, number) in [
        ("leaf1", numbers[0]),
        ("leaf1", numbers[1]),
        ("leaf2", third),
    ] {
        assert_eq!(
            service.outcome(leaf, number).await,
            json!("completed"),
            "{leaf} {number}"
        );
    }
    // Telemetry that is settled by its sender gets no disposition, the next one does.
    client.attach(&Link::sender(3, &events("leaf1"))).await;
    let settled = Transfer {
        handle: 3,
        id: 2,
        settled: true,
        ..Transfer::default()
    };
    client
        .say(&settled.with(&Message::of(b"settled").encode()))
        .await;
    let unsettled = Transfer {
        handle: 3,
        id: 3,
        ..Transfer::default()
    };
    let answer = client
        .deliver(&unsettled, &Message::of(b"unsettled").encode())
        .await;
    assert_eq!((answer.number(1), answer.field(2)), (Some(3), &Value::Null));
    edgehub_tests::only_these_arrive(&lab, "leaf1", &[&b"settled"[..], b"unsettled"]).await;
    lab.shutdown().await.expect("the lab ends");
}
