//! Tokens over AMQP: what is taken, and which links it admits.

use std::time::Duration;

use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::types::messaging::MessageId;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::common::amqp::{Amqp, data, detached, path, put_token, resource, send, tls};
use crate::common::token::Token;
use crate::common::{Bed, HOST, PATIENCE, now_secs};
use crate::strict_chain::{DISABLED, REAL, UNKNOWN, UNREAL};

const CHAIN: &str = "com.microsoft:auth-chain";

/// Attaches the telemetry link of a chain's first element.
async fn attach(client: &mut Amqp, chain: &str) -> Result<(), String> {
    let target = chain.split(';').next().unwrap();
    let address = format!("{}/messages/events", path(target));
    client.sender(&address, &[(CHAIN, chain)]).await.map(|_| ())
}

/// A connection with the token of the hub of a chain's actor.
async fn with_actor(bed: &Bed, chain: &str) -> Amqp {
    let actor = chain.rsplit(';').next().unwrap();
    let target = chain.split(';').next().unwrap();
    let mut client = Amqp::open(bed).await;
    // Under the name of the target, as edgeHub does.
    let token = Token::of_hub(actor).text();
    client.put(&resource(target), &token).await;
    client
}

#[tokio::test]
async fn answers_have_the_requests_id_with_its_type() {
    let bed = Bed::strict().await;
    let mut client = Amqp::open(&bed).await;
    for id in [
        MessageId::Ulong(7),
        MessageId::Uuid([7; 16].into()),
        MessageId::Binary(vec![1, 2].into()),
        MessageId::String("id".to_owned()),
    ] {
        for kind in [
            "servicebus.windows.net:sastoken",
            "azure-devices.net:sastoken",
        ] {
            let token = Token::of("leaf1").text();
            let request = put_token(&resource("leaf1"), &token, id.clone(), kind);
            assert_eq!(client.request(request).await, (Some(id.clone()), 200));
        }
    }
    let counters = bed
        .control("GET", "/counters?client_id=leaf1", Value::Null)
        .await;
    assert_eq!(counters["amqp_put_tokens"], 8);
}

/// Every way in which a token can be wrong, with its status; after each the link is refused.
#[tokio::test]
async fn wrong_tokens_are_refused() {
    let bed = Bed::strict().await;
    let mut client = Amqp::open(&bed).await;
    let of = || Token::of("leaf1");
    for (token, status) in [
        (of().signed_by("lone"), 401),
        (of().for_path_of("lone"), 401),
        (
            Token {
                expires_at: now_secs() - 1,
                ..of()
            },
            401,
        ),
        (
            Token {
                host: "other.lab.example".to_owned(),
                ..of()
            },
            401,
        ),
        (Token::of("off"), 401),
        (Token::of("nobody"), 404),
        (Token::of("leaf1/nobody"), 404),
        (Token::of_policy("nobody"), 401),
        (Token::of_policy("service").signed_by("device"), 401),
    ] {
        let (_, got) = client.put(&resource("leaf1"), &token.text()).await;
        assert_eq!(got, status, "{token:?}");
    }
    for text in ["nonsense", "SharedAccessSignature sr=a&sig=b", "x"] {
        assert_eq!(client.put(&resource("leaf1"), text).await.1, 400, "{text}");
    }
    let id = || MessageId::Ulong(1);
    let token = of().text();
    let odd = [
        put_token(&resource("leaf1"), &token, id(), "jwt"),
        put_token("", &token, id(), "azure-devices.net:sastoken"),
        data(token.as_bytes()),
    ];
    for request in odd {
        assert_eq!(client.request(request).await.1, 400);
    }
    let refused = attach(&mut client, "leaf1").await;
    assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access");
    // The same connection goes on.
    client.admit("leaf1", &of()).await;
    attach(&mut client, "leaf1").await.unwrap();
}

/// A token is good for its identity alone, and a bad one does not push out a good one.
#[tokio::test]
async fn a_token_admits_its_identity_alone() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let bad = Token::of("leaf1").signed_by("lone").text();
    assert_eq!(client.put(&resource("leaf1"), &bad).await.1, 401);
    for other in ["leaf0", "leaf1/m1", "edge2"] {
        let refused = attach(&mut client, other).await;
        assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access", "{other}");
    }
    for unknown in ["nobody", "leaf1/nobody"] {
        let refused = attach(&mut client, unknown).await;
        assert_eq!(refused.unwrap_err(), "amqp:not-found", "{unknown}");
    }
    attach(&mut client, "leaf1").await.unwrap();
    let mut device = Amqp::of_policy(&bed, "device").await;
    for identity in ["leaf1", "leaf1/m1"] {
        attach(&mut device, identity).await.unwrap();
    }
    let mut service = Amqp::of_policy(&bed, "service").await;
    let refused = attach(&mut service, "leaf1").await;
    assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access");
}

#[tokio::test]
async fn a_connection_has_999_tokens() {
    let bed = Bed::strict().await;
    let mut client = Amqp::open(&bed).await;
    let token = Token::of("leaf1").text();
    for number in 0..999 {
        let (_, status) = client.put(&format!("{HOST}/{number}"), &token).await;
        assert_eq!(status, 200);
    }
    assert_eq!(client.put(&resource("leaf1"), &token).await.1, 403);
    assert_eq!(client.put(&format!("{HOST}/7"), &token).await.1, 200);
}

#[tokio::test]
async fn real_chains_are_admitted_and_stamped_as_the_target() {
    let bed = Bed::strict().await;
    for chain in REAL {
        let mut client = with_actor(&bed, chain).await;
        let target = chain.split(';').next().unwrap();
        let address = format!("{}/messages/events", path(target));
        let properties = [(CHAIN, chain), ("com.microsoft:client-version", "hub/1")];
        let mut sender = client.sender(&address, &properties).await.unwrap();
        assert_eq!(send(&mut sender, data(chain.as_bytes())).await, Ok(()));
        let line = bed.ledger().await.pop().unwrap();
        let (device, module) = match target.split_once('/') {
            Some((device, module)) => (json!(device), json!(module)),
            None => (json!(target), Value::Null),
        };
        assert_eq!((&line["device_id"], &line["module_id"]), (&device, &module));
        assert_eq!(line["system"]["iothub-connection-device-id"], device);
        let list = bed.control("GET", "/connections", Value::Null).await;
        let is_it = |entry: &&Value| entry["client_id"] == target;
        let entry = list.as_array().unwrap().iter().find(is_it).unwrap();
        assert_eq!(entry["auth_chain"], chain);
        assert_eq!(entry["transport"], "amqp");
        assert_eq!(entry["client_version"], "hub/1");
    }
}

#[tokio::test]
async fn strict_wrong_chains_are_refused() {
    let bed = Bed::strict().await;
    for (chains, condition) in [
        (&UNREAL[..], "amqp:unauthorized-access"),
        (&DISABLED[..], "amqp:unauthorized-access"),
        (&UNKNOWN[..], "amqp:not-found"),
        (
            &["leaf1;;edge1", "leaf1;edge2;edge1;", "leaf1;..;edge1"][..],
            "com.microsoft:argument-error",
        ),
        // `leafx` has a module with the right name, but is no edge device.
        (&["leafx/m1;leafx"][..], "amqp:unauthorized-access"),
    ] {
        for chain in chains {
            let mut client = with_actor(&bed, chain).await;
            let refused = attach(&mut client, chain).await;
            assert_eq!(refused.unwrap_err(), condition, "{chain}");
        }
    }
}

/// The actor's own `$edgeHub` token is the only one that counts, and the chain starts with the
/// link's identity.
#[tokio::test]
async fn strict_the_actor_signs_as_its_edge_hub() {
    let bed = Bed::strict().await;
    let chain = "leaf1;edge2;edge1";
    for other in [
        "leaf1",
        "edge1",
        "edge1/modA",
        "edge2/$edgeHub",
        "edge10/$edgeHub",
    ] {
        let mut client = Amqp::of(&bed, other).await;
        let refused = attach(&mut client, chain).await;
        assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access", "{other}");
    }
    let mut policy = Amqp::of_policy(&bed, "iothubowner").await;
    assert!(attach(&mut policy, chain).await.is_err());
    let mut client = with_actor(&bed, chain).await;
    let leaf0 = "/devices/leaf0/messages/events";
    let refused = client.sender(leaf0, &[(CHAIN, chain)]).await;
    assert_eq!(refused.unwrap_err(), "amqp:unauthorized-access");
    attach(&mut client, chain).await.unwrap();
    // Without a chain it speaks for itself alone.
    assert!(attach(&mut client, "leaf0").await.is_err());
    attach(&mut client, "edge1/$edgeHub").await.unwrap();
}

/// When a token runs out, its identity's links are detached; a renewal in time prevents it.
#[tokio::test]
async fn an_expired_token_ends_its_identity_alone() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    let until = |seconds| Token {
        expires_at: now_secs() + seconds,
        ..Token::of("lone")
    };
    client.admit("lone", &until(1_000)).await;
    let mut leaf1 = client.telemetry("leaf1").await;
    let mut lone = client.telemetry("lone").await;
    client.admit("lone", &until(2_000)).await;
    bed.clock(1_500).await;
    assert_eq!(send(&mut lone, data(b"renewed")).await, Ok(()));
    bed.clock(2_500).await;
    let detach = timeout(PATIENCE, lone.on_detach()).await.unwrap();
    assert_eq!(detached(detach), "amqp:unauthorized-access");
    assert_eq!(send(&mut leaf1, data(b"still here")).await, Ok(()));
    assert!(attach(&mut client, "lone").await.is_err());
}

#[tokio::test]
async fn sasl_plain_brings_one_token() {
    let bed = Bed::strict().await;
    let plain = |user: &str, token: &Token| {
        Some(SaslProfile::Plain {
            username: user.to_owned(),
            password: token.text(),
        })
    };
    let label = HOST.split('.').next().unwrap();
    let open = async |sasl| Amqp::over(tls(&bed.files, bed.amqp()).await, sasl).await;
    for user in [format!("leaf1@sas.{label}"), format!("leaf1@{label}")] {
        let mut client = open(plain(&user, &Token::of("leaf1"))).await.unwrap();
        attach(&mut client, "leaf1").await.unwrap();
        assert!(attach(&mut client, "lone").await.is_err());
    }
    let module = format!("edge1/modules/modA@sas.{label}");
    let mut client = open(plain(&module, &Token::of("edge1/modA")))
        .await
        .unwrap();
    attach(&mut client, "edge1/modA").await.unwrap();
    let policy = format!("service@sas.root.{label}");
    let mut service = open(plain(&policy, &Token::of_policy("service")))
        .await
        .unwrap();
    service.sender("/messages/devicebound", &[]).await.unwrap();
    for (user, token) in [
        (format!("lone@sas.{label}"), Token::of("leaf1")),
        (
            format!("leaf1@sas.{label}"),
            Token::of("leaf1").signed_by("lone"),
        ),
        ("leaf1@sas.other".to_owned(), Token::of("leaf1")),
        (
            format!("device@sas.root.{label}"),
            Token::of_policy("service"),
        ),
        (format!("service@sas.{label}"), Token::of_policy("service")),
        ("leaf1".to_owned(), Token::of("leaf1")),
    ] {
        assert!(open(plain(&user, &token)).await.is_err(), "{user}");
    }
    let mut anonymous = open(Some(SaslProfile::Anonymous)).await.unwrap();
    anonymous.admit("leaf1", &Token::of("leaf1")).await;
    attach(&mut anonymous, "leaf1").await.unwrap();
}

/// Addresses that the hub does not have, and links of the wrong direction.
#[tokio::test]
async fn odd_addresses_are_refused() {
    let bed = Bed::strict().await;
    let mut client = Amqp::of(&bed, "leaf1").await;
    client.admit("leaf1/m1", &Token::of("leaf1/m1")).await;
    for address in ["", "/devices/leaf1", "/devices/leaf1/inputs", "queue"] {
        let refused = client.sender(address, &[]).await;
        assert_eq!(refused.unwrap_err(), "amqp:not-found", "{address}");
    }
    let c2d = "/devices/leaf1/messages/devicebound";
    let refused = client.sender(c2d, &[]).await;
    assert_eq!(refused.unwrap_err(), "amqp:not-allowed");
    for address in [
        "/devices/leaf1/messages/events",
        "/devices/leaf1/modules/m1/messages/devicebound",
    ] {
        let refused = client.receiver(address, &[]).await;
        assert_eq!(refused.unwrap_err(), "amqp:not-allowed", "{address}");
    }
    // A pair has an id, and says which version of the API it means.
    let version = ("com.microsoft:api-version", "2020-09-30");
    let pair = |text| ("com.microsoft:channel-correlation-id", text);
    for properties in [
        &[][..],
        &[version],
        &[version, pair("x")],
        &[version, pair("methods:1")],
        &[pair("twin:1")],
        &[("com.microsoft:api-version", "latest"), pair("twin:1")],
    ] {
        let refused = client.sender("/devices/leaf1/twin", properties).await;
        assert_eq!(refused.unwrap_err(), "com.microsoft:argument-error");
    }
    let mut inputs = client
        .receiver("/devices/leaf1/modules/m1/messages/events", &[])
        .await
        .unwrap();
    let silent = timeout(
        Duration::from_millis(50),
        inputs.recv::<fe2o3_amqp::types::messaging::Body<fe2o3_amqp::types::primitives::Value>>(),
    );
    assert!(silent.await.is_err(), "a hub sends nothing to inputs");
    for address in [
        "amqps://hub.lab.example:5671/devices/leaf1/messages/deviceBound",
        "amqps://hub.lab.example//Devices/leaf1/messages/DEVICEBOUND",
        "devices/leaf1/messages/devicebound",
    ] {
        client.receiver(address, &[]).await.unwrap();
    }
}
