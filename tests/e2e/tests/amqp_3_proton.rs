//! Acceptance 3 of the AMQP side, second half: Apache Qpid Proton, an AMQP client that has nothing to
//! do with Azure, against the head. (What Microsoft's service SDKs do is in `amqp_3_service.rs`.)

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use edgehub_lab::{HUB, Lab, LabBuilder};
use edgehub_tests::token::Token;
use edgehub_tests::{only_these_arrive, proton};
use serde_json::{Value, json};

const UNAUTHORIZED: &str = "amqp:unauthorized-access";

fn token(id: impl Into<Value>, token: &str) -> Value {
    json!({"id": id.into(), "name": "named as you like", "token": token})
}

fn telemetry(id: &str, bodies: &[&str]) -> Value {
    let path = match id.split_once('/') {
        Some((device, module)) => format!("{device}/modules/{module}"),
        None => id.to_owned(),
    };
    let messages: Vec<_> = bodies.iter().map(|body| json!({ "body": body })).collect();
    json!({"address": format!("/devices/{path}/messages/events"), "messages": messages})
}

fn refused() -> Value {
    json!({"refused": UNAUTHORIZED, "outcomes": []})
}

fn accepted(count: usize) -> Value {
    json!({"refused": null, "outcomes": vec!["ACCEPTED"; count]})
}

async fn at_edge1(lab: &Lab, case: Value) -> Value {
    let seen = proton::connection(lab, "edge1", case).await;
    assert_eq!(seen["connected"], json!(true), "{seen}");
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_proton_authenticates_by_cbs_and_sends_telemetry() {
    let lab = LabBuilder::new().layers(1).leaves(2, "edge1");
    let lab = lab.module("edge1", "m").start().await;
    let lab = lab.expect("the lab starts");
    let of = |id: &str| Token::of(&lab, id).text();

    // Two identities and a module share the connection, and each answer says whose it is.
    let mut own = telemetry("leaf1", &["first"]);
    own["messages"] = json!([
        {"id": "m1", "body": "first", "properties": {"room": "a b/c"}},
        {"body": "a text", "kind": "text"},
    ]);
    let case = json!({
        "tokens": [token(7, &of("leaf1")), token("eight", &of("leaf2")), token(9, &of("edge1/m"))],
        "links": [own, telemetry("leaf2", &["second"]), telemetry("edge1/m", &["third"])],
    });
    let seen = at_edge1(&lab, case).await;
    for (answer, id) in
        seen["tokens"]
            .as_array()
            .expect("answers")
            .iter()
            .zip([json!(7), json!("eight"), json!(9)])
    {
        assert_eq!(answer["status"], json!(200), "{seen}");
        assert_eq!(answer["correlation"], id, "{seen}");
    }
    assert_eq!(
        seen["links"],
        json!([accepted(2), accepted(1), accepted(1)])
    );
    only_these_arrive(&lab, "leaf1", &["first", "a text"]).await;
    only_these_arrive(&lab, "leaf2", &["second"]).await;
    only_these_arrive(&lab, "edge1/m", &["third"]).await;
    let first = lab.ledger().entries_of("leaf1").expect("the ledger");
    let first = first.first().expect("a message");
    assert_eq!(json!(first.properties), json!({"room": "a b/c"}));

    // SASL PLAIN is the identity's and nobody else's.
    let hub = &lab.host(HUB).expect("a hub").hostname;
    let name = hub.split('.').next().expect("a label");
    let plain = |password: &str| {
        json!({
            "user": format!("leaf1@sas.{name}"),
            "password": password,
            "links": [telemetry("leaf1", &["fourth"]), telemetry("leaf2", &["never"])],
        })
    };
    let seen = at_edge1(&lab, plain(&of("leaf1"))).await;
    assert_eq!(seen["links"], json!([accepted(1), refused()]));
    let wrong = Token::of(&lab, "leaf2").naming("leaf1").text();
    let seen = proton::connection(&lab, "edge1", plain(&wrong)).await;
    assert_ne!(seen["connected"], json!(true), "{seen}");
    only_these_arrive(&lab, "leaf1", &["first", "a text", "fourth"]).await;
    lab.shutdown().await.expect("the lab ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_proton_is_refused_what_its_tokens_do_not_cover() {
    let lab = LabBuilder::new().layers(1).leaves(2, "edge1");
    let lab = lab.module("edge1", "m").start().await;
    let lab = lab.expect("the lab starts");
    let leaf1 = || Token::of(&lab, "leaf1");
    let never = || telemetry("leaf1", &["never"]);

    for (what, bad) in [
        ("another's key", Token::of(&lab, "leaf2").naming("leaf1")),
        ("expired", leaf1().expired()),
        ("another hub", leaf1().for_host("another.example")),
    ] {
        let case = json!({"tokens": [token(1, &bad.text())], "links": [never()]});
        let seen = at_edge1(&lab, case).await;
        assert_eq!(seen["tokens"][0]["status"], json!(401), "{what}: {seen}");
        assert_eq!(seen["links"], json!([refused()]), "{what}: {seen}");
    }
    let case = json!({"tokens": [token(1, "no token at all")], "links": [never()]});
    let seen = at_edge1(&lab, case).await;
    assert_eq!(seen["tokens"][0]["status"], json!(400), "{seen}");
    let seen = at_edge1(&lab, json!({"links": [never()]})).await;
    assert_eq!(seen["links"], json!([refused()]), "no token: {seen}");

    // Foreign links, after each of which the own one works; no bad token replaces a good one.
    let case = json!({
        "tokens": [
            token(1, &leaf1().text()),
            token(2, &Token::of(&lab, "leaf2").naming("leaf1").text()),
        ],
        "links": [
            telemetry("leaf2", &["never"]),
            telemetry("leaf1", &["own 1"]),
            telemetry("edge1/m", &["never"]),
            telemetry("edge1", &["never"]),
            telemetry("leaf10", &["never"]),
            telemetry("leaf1", &["own 2"]),
        ],
    });
    let seen = at_edge1(&lab, case).await;
    assert_eq!(seen["tokens"][1]["status"], json!(401), "{seen}");
    let links = json!([
        refused(),
        accepted(1),
        refused(),
        refused(),
        refused(),
        accepted(1)
    ]);
    assert_eq!(seen["links"], links);

    // What is no address of a client.
    let case = json!({
        "tokens": [token(1, &leaf1().text())],
        "links": [json!({"address": "/devices/leaf1/inputs/in1", "messages": []}),
            json!({"address": "queue", "messages": []})],
    });
    let seen = at_edge1(&lab, case).await;
    for link in seen["links"].as_array().expect("links") {
        assert_eq!(link["refused"], json!("amqp:not-allowed"), "{seen}");
    }
    only_these_arrive(&lab, "leaf1", &["own 1", "own 2"]).await;
    let count = lab.ledger().count().expect("the ledger");
    assert_eq!(count, 2, "nothing else");
    lab.shutdown().await.expect("the lab ends");
}
