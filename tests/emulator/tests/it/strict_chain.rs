//! Auth chains: an edge device speaks for those below it, and for nobody else.

use mqttbytes::v4::ConnectReturnCode;
use serde_json::{Value, json};

use crate::common::mqtt::{Client, Hello};
use crate::common::token::Token;
use crate::common::{Bed, now_secs};

/// Chains of the registry.
pub(crate) const REAL: [&str; 9] = [
    "edge1/$edgeHub;edge1",
    "edge1/modA;edge1",
    "leaf0;edge1",
    "edge2;edge1",
    "leaf1;edge2;edge1",
    "leaf1/m1;leaf1;edge2;edge1",
    "leaf3;edge3;edge2;edge1",
    "edge3/modA;edge3;edge2;edge1",
    "leaf3;edge3;edge2",
];

/// Chains whose neighbours are not child and parent in the registry.
pub(crate) const UNREAL: [&str; 16] = [
    "leaf3;edge1",
    "leaf3;edge2;edge1",
    "leaf0;edge2;edge1",
    "leaf1;edge3;edge2;edge1",
    "leaf10;edge1",
    "leaf1;edge10",
    "edge1;edge2",
    "edge1/modA;edge2;edge1",
    "edge3/modA;edge2;edge1",
    "leaf1/m1;edge2;edge1",
    "lone;edge1",
    "leaf0;leaf0;edge1",
    "edge2;edge2;edge1",
    "leaf1;edge2;edge3;edge2;edge1",
    "leaf3;edge3/modA;edge3;edge2;edge1",
    "leaf0;edge1/$edgeHub;edge1",
];

/// Chains with somebody who is disabled.
pub(crate) const DISABLED: [&str; 3] = ["off;edge1", "leaf4;sleepy;edge1", "leaf4;sleepy"];

/// Chains with somebody who is not registered.
pub(crate) const UNKNOWN: [&str; 4] = [
    "nobody;edge1",
    "edge1/nobody;edge1",
    "leaf0;nobody",
    "leaf1;nobody;edge1",
];

async fn refused(bed: &Bed, hello: &Hello) {
    let (_, code) = Client::connect(bed, hello).await;
    assert_eq!(
        code,
        ConnectReturnCode::NotAuthorized,
        "{}",
        hello.user_name
    );
}

#[tokio::test]
async fn real_chains_are_admitted_and_stamped_as_the_target() {
    let bed = Bed::strict().await;
    for chain in REAL.into_iter().chain(["leaf1"]) {
        let mut hello = Hello::through(chain);
        if chain == "leaf1" {
            hello.token = Token::of("leaf1");
        }
        let mut client = Client::admitted(&bed, &hello).await;
        let target = chain.split(';').next().unwrap();
        let (device, module) = match target.split_once('/') {
            Some((device, module)) => (device, Some(module)),
            None => (target, None),
        };
        let topic = match module {
            Some(module) => format!("devices/{device}/modules/{module}/messages/events/"),
            None => format!("devices/{device}/messages/events/"),
        };
        client.publish(&topic, chain.as_bytes(), 1).await;
        let line = bed.ledger().await.pop().unwrap();
        assert_eq!(
            (&line["device_id"], &line["module_id"]),
            (&json!(device), &json!(module))
        );
        let system = &line["system"];
        assert_eq!(system["iothub-connection-device-id"], device);
        assert_eq!(
            system.get("iothub-connection-module-id"),
            module.map(|m| json!(m)).as_ref()
        );
        let list = bed.control("GET", "/connections", Value::Null).await;
        assert!(list.as_array().unwrap().iter().any(|connection| {
            connection["client_id"] == target && connection["auth_chain"] == chain
        }));
    }
}

#[tokio::test]
async fn strict_chains_are_compared_pairwise_with_the_registry() {
    let bed = Bed::strict().await;
    for chain in UNREAL {
        refused(&bed, &Hello::through(chain)).await;
    }
}

/// The target of the chain is the identity that connects.
#[tokio::test]
async fn strict_the_chain_starts_with_the_connecting_identity() {
    let bed = Bed::strict().await;
    let mut hello = Hello::through("leaf0;edge1");
    hello.user_name = hello.user_name.replace("/leaf0/", "/edge2/");
    hello.client_id = "edge2".to_owned();
    refused(&bed, &hello).await;
}

/// The actor's own `$edgeHub` key is the only one that counts, and its token names `$edgeHub`.
#[tokio::test]
async fn strict_the_actor_signs_as_its_edge_hub() {
    let bed = Bed::strict().await;
    let chain = "leaf1;edge2;edge1";
    for token in [
        Token::of("leaf1"),
        Token::of("edge1"),
        Token::of("edge1/modA"),
        Token::of("edge1/$edgeAgent"),
        Token::of_hub("edge2"),
        Token::of_hub("edge10"),
        Token::of_hub("edge1").signed_by("edge1"),
        Token::of_hub("edge1").for_path_of("edge1"),
        Token::of_hub("edge1").for_path_of("leaf1"),
        Token::of_hub("edge1").for_path_of("edge10/$edgeHub"),
        Token::of_hub("edge1").for_path_of("edge1/$edgehub"),
        Token {
            host: "edge1.lab.example".to_owned(),
            ..Token::of_hub("edge1")
        },
        Token {
            expires_at: now_secs() - 1,
            ..Token::of_hub("edge1")
        },
        Token::of_policy("iothubowner"),
    ] {
        refused(&bed, &Hello::through(chain).with_token(token)).await;
    }
    Client::admitted(&bed, &Hello::through(chain)).await;
}

/// `leafx` has a module with the right name and a valid token, but is no edge device.
#[tokio::test]
async fn strict_the_actor_is_an_edge_device() {
    let bed = Bed::strict().await;
    refused(&bed, &Hello::through("leafx/m1;leafx")).await;
    Client::admitted(&bed, &Hello::through("leafx/m1;leafx;edge2")).await;
}

#[tokio::test]
async fn strict_everyone_in_the_chain_is_known_and_enabled() {
    let bed = Bed::strict().await;
    for chain in DISABLED.into_iter().chain(UNKNOWN) {
        refused(&bed, &Hello::through(chain)).await;
    }
}

#[tokio::test]
async fn strict_malformed_chains_are_malformed_user_names() {
    let bed = Bed::strict().await;
    for chain in [
        "leaf1;;edge1",
        "leaf1;edge2;edge1;",
        "leaf1;../edge2;edge1",
        "leaf1;..;edge1",
    ] {
        let (_, code) = Client::connect(&bed, &Hello::through(chain)).await;
        assert_eq!(code, ConnectReturnCode::BadUserNamePassword, "{chain}");
    }
}

/// A token of `$edgeHub` without a chain is good for `$edgeHub` alone.
#[tokio::test]
async fn strict_nobody_is_spoken_for_without_a_chain() {
    let bed = Bed::strict().await;
    for identity in ["leaf0", "edge1/modA", "edge1", "edge2"] {
        refused(
            &bed,
            &Hello::of(identity).with_token(Token::of_hub("edge1")),
        )
        .await;
    }
}

/// A live connection ends when the registry stops admitting it.
#[tokio::test]
async fn registry_changes_end_connections() {
    let bed = Bed::strict().await;
    let owner = Token::of_policy("iothubowner");
    let mut through_edge3 =
        Client::admitted(&bed, &Hello::through("leaf3;edge3;edge2;edge1")).await;
    let mut leaf1 = Client::admitted(&bed, &Hello::through("leaf1;edge2;edge1")).await;
    let path = "/devices/edge3?api-version=2021-04-12";
    let mut edge3 = bed.https("GET", path, &owner, Value::Null).await.json();
    edge3["status"] = json!("disabled");
    let headers = [
        ("authorization", owner.text()),
        ("if-match", "\"*\"".to_owned()),
    ];
    assert_eq!(
        bed.https_with("PUT", path, &headers, edge3.clone())
            .await
            .status,
        200
    );
    assert_eq!(through_edge3.next().await, None);
    refused(&bed, &Hello::through("leaf3;edge3;edge2;edge1")).await;
    leaf1
        .publish("devices/leaf1/messages/events/", b"still here", 1)
        .await;

    edge3["status"] = json!("enabled");
    assert_eq!(
        bed.https_with("PUT", path, &headers, edge3).await.status,
        200
    );
    Client::admitted(&bed, &Hello::through("leaf3;edge3;edge2;edge1")).await;

    let path = "/devices/leaf1?api-version=2021-04-12";
    assert_eq!(
        bed.https("DELETE", path, &owner, Value::Null).await.status,
        204
    );
    assert_eq!(leaf1.next().await, None);
}
