//! CONNECT: identity, user name, token.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use mqttbytes::QoS;
use mqttbytes::v4::{Connect, ConnectReturnCode, LastWill, Packet, PingReq};

use crate::common::mqtt::{Client, Hello, publish};
use crate::common::token::{Token, key};
use crate::common::{Bed, PATIENCE, now_secs};

async fn refused(bed: &Bed, hello: &Hello, code: ConnectReturnCode) {
    let (mut client, got) = Client::connect(bed, hello).await;
    assert_eq!(got, code, "{} {}", hello.user_name, hello.token.text());
    assert_eq!(client.next().await, None, "closed after a refusal");
}

/// Devices and modules speak for themselves with either key and every encoding on the market.
#[tokio::test]
async fn own_tokens_are_admitted() {
    let bed = Bed::strict().await;
    for identity in [
        "leaf1",
        "lone",
        "leaf1/m1",
        "edge1",
        "edge1/modA",
        "edge1/$edgeHub",
    ] {
        for id_encodings in 0..=2 {
            let token = Token {
                id_encodings,
                ..Token::of(identity)
            };
            Client::admitted(&bed, &Hello::of(identity).with_token(token)).await;
        }
        let second = Token::of(identity).signed_by("second");
        Client::admitted(&bed, &Hello::of(identity).with_token(second)).await;
        let policy = Token::of_policy("device");
        Client::admitted(&bed, &Hello::of(identity).with_token(policy)).await;
    }
    let host = Token {
        host: "HUB.Lab.Example".to_owned(),
        ..Token::of("leaf1")
    };
    Client::admitted(&bed, &Hello::of("leaf1").with_token(host)).await;
    let mut old_form = Hello::of("leaf1");
    old_form.user_name = "hub.lab.example/leaf1/api-version=2016-11-14".to_owned();
    Client::admitted(&bed, &old_form).await;
}

/// A token that is not exactly the connecting identity's is refused with 5.
#[tokio::test]
async fn strict_tokens_of_others_are_refused() {
    let bed = Bed::strict().await;
    let of = Token::of;
    for (identity, token) in [
        ("leaf1", of("leaf1").signed_by("leaf3")),
        ("leaf1", of("leaf3")),
        ("leaf1", of("leaf1").for_path_of("leaf3")),
        ("leaf1", of("leaf1").for_path_of("Leaf1")),
        (
            "leaf1",
            Token {
                host: "other.hub".to_owned(),
                ..of("leaf1")
            },
        ),
        (
            "leaf1",
            Token {
                host: String::new(),
                ..of("leaf1")
            },
        ),
        (
            "leaf1",
            Token {
                path: vec![],
                ..of("leaf1")
            },
        ),
        (
            "leaf1",
            Token {
                path: vec!["x".to_owned(), "leaf1".to_owned()],
                ..of("leaf1")
            },
        ),
        ("leaf1", of("leaf1").for_path_of("leaf1/m1")),
        ("leaf1/m1", of("leaf1")),
        ("leaf1/m1", of("leaf1").for_path_of("leaf1/m1")),
        ("leaf1/m1", of("leaf1/m1").for_path_of("leaf1")),
        ("edge1/modA", of("edge3/modA")),
        ("edge1/modA", Token::of_hub("edge1")),
        (
            "edge1/$edgeHub",
            Token {
                id_encodings: 3,
                ..Token::of_hub("edge1")
            },
        ),
        ("leaf1", Token::of_policy("registryReadWrite")),
        ("leaf1", Token::of_policy("device").signed_by("iothubowner")),
        (
            "leaf1",
            Token {
                key: key("device"),
                ..Token::of_policy("nobody")
            },
        ),
        (
            "leaf1",
            Token {
                policy: Some("device".to_owned()),
                ..of("leaf1")
            },
        ),
    ] {
        let hello = Hello::of(identity).with_token(token);
        refused(&bed, &hello, ConnectReturnCode::NotAuthorized).await;
    }
    Client::admitted(&bed, &Hello::of("leaf1")).await;
}

#[tokio::test]
async fn strict_unknown_and_disabled_identities_are_refused() {
    let bed = Bed::strict().await;
    for identity in [
        "nobody",
        "leaf1/nobody",
        "off",
        "sleepy",
        "sleepy/$edgeHub",
        "Leaf1",
    ] {
        refused(&bed, &Hello::of(identity), ConnectReturnCode::NotAuthorized).await;
    }
}

#[tokio::test]
async fn strict_expired_tokens_are_refused() {
    let bed = Bed::strict().await;
    let hello = Hello::of("leaf1").with_token(Token {
        expires_at: now_secs() - 600,
        ..Token::of("leaf1")
    });
    refused(&bed, &hello, ConnectReturnCode::NotAuthorized).await;
    bed.clock(-1_200).await;
    Client::admitted(&bed, &hello).await;
}

#[tokio::test]
async fn strict_the_client_id_is_the_identity() {
    let bed = Bed::strict().await;
    for client_id in ["leaf3", "Leaf1", "leaf1/m1", "leaf10", ""] {
        let mut hello = Hello::of("leaf1");
        hello.client_id = client_id.to_owned();
        refused(&bed, &hello, ConnectReturnCode::BadClientId).await;
    }
}

#[tokio::test]
async fn strict_the_api_version_is_required() {
    let bed = Bed::strict().await;
    for parameters in [
        "DeviceClientType=x",
        "api-version=",
        "api-version=1",
        "api-version",
    ] {
        let mut hello = Hello::of("leaf1");
        hello.user_name = format!("hub.lab.example/leaf1/?{parameters}");
        refused(&bed, &hello, ConnectReturnCode::BadUserNamePassword).await;
    }
}

#[tokio::test]
async fn strict_user_names_with_tricks_are_malformed() {
    let bed = Bed::strict().await;
    for user_name in [
        "hub.lab.example/x/../leaf1/?api-version=2020-09-30",
        "hub.lab.example/leaf1/../leaf1/?api-version=2020-09-30",
        "hub.lab.example/../leaf1?api-version=2020-09-30",
        "hub.lab.example//?api-version=2020-09-30",
        "leaf1",
        "",
    ] {
        let mut hello = Hello::of("leaf1");
        hello.user_name = user_name.to_owned();
        refused(&bed, &hello, ConnectReturnCode::BadUserNamePassword).await;
    }
    let mut other_host = Hello::of("leaf1");
    other_host.user_name = "other.hub/leaf1/?api-version=2020-09-30".to_owned();
    refused(&bed, &other_host, ConnectReturnCode::NotAuthorized).await;
}

/// What an edgeHub would let pass, lenient mode lets pass: so the refusals above are these rules.
#[tokio::test]
async fn lenient_mode_tolerates() {
    let bed = Bed::lenient().await;
    let other_host = Token {
        host: "other.hub".to_owned(),
        ..Token::of("leaf1")
    };
    Client::admitted(&bed, &Hello::of("leaf1").with_token(other_host)).await;
    let case = Token::of("leaf1").for_path_of("Leaf1");
    Client::admitted(&bed, &Hello::of("leaf1").with_token(case)).await;
    let mut hello = Hello::of("leaf1");
    hello.user_name = "other.hub/leaf1/?DeviceClientType=x".to_owned();
    Client::admitted(&bed, &hello).await;
    Client::admitted(&bed, &Hello::through("leaf3;edge1")).await;
    let stranger = Hello::of("leaf1").with_token(Token::of("leaf3"));
    refused(&bed, &stranger, ConnectReturnCode::NotAuthorized).await;
}

#[tokio::test]
async fn other_protocol_levels_get_connack_1() {
    let bed = Bed::strict().await;
    for level in [3, 5] {
        let mut bytes = Hello::of("leaf1").packet();
        let at = bytes.windows(4).position(|name| name == b"MQTT").unwrap();
        bytes[at + 4] = level;
        let mut client = Client::open(&bed.files, bed.mqtt()).await;
        client.send(&bytes).await;
        let Some(Packet::ConnAck(ack)) = client.next().await else {
            panic!("no CONNACK")
        };
        assert_eq!(ack.code, ConnectReturnCode::RefusedProtocolVersion);
        assert_eq!(client.next().await, None);
    }
}

#[tokio::test]
async fn the_first_packet_has_to_be_a_connect() {
    let bed = Bed::strict().await;
    let client = Client::open(&bed.files, bed.mqtt()).await;
    client
        .expect_close_after(&publish("t", QoS::AtLeastOnce, 1, b""))
        .await;
    let client = Client::admitted(&bed, &Hello::of("leaf1")).await;
    client
        .expect_close_after(&Hello::of("leaf1").packet())
        .await;
}

/// The second connection of an id is the one that lives.
#[tokio::test]
async fn strict_a_second_connection_closes_the_first() {
    let bed = Bed::strict().await;
    let mut first = Client::admitted(&bed, &Hello::of("leaf1")).await;
    let mut second = Client::admitted(&bed, &Hello::through("leaf1;edge2;edge1")).await;
    assert_eq!(first.next().await, None);
    second
        .publish("devices/leaf1/messages/events/", b"x", 1)
        .await;
    let list = bed
        .control("GET", "/connections", serde_json::Value::Null)
        .await;
    let list: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .filter(|c| c["client_id"] == "leaf1")
        .collect();
    assert_eq!(list.len(), 1);
}

/// Silence of 1.5 times the keep-alive ends a connection; a PINGREQ in time keeps it.
#[tokio::test]
async fn strict_keep_alive_is_enforced() {
    let bed = Bed::strict().await;
    let started = Instant::now();
    let silent = Hello {
        keep_alive: 2,
        ..Hello::of("leaf1")
    };
    let mut silent = Client::admitted(&bed, &silent).await;
    let pinging = Hello {
        keep_alive: 2,
        ..Hello::of("leaf3")
    };
    let mut pinging = Client::admitted(&bed, &pinging).await;
    let mut ping = BytesMut::new();
    PingReq.write(&mut ping).unwrap();
    let closed = tokio::spawn(async move {
        assert_eq!(silent.next().await, None);
        started.elapsed()
    });
    while !closed.is_finished() {
        pinging.send(&ping).await;
        assert_eq!(pinging.next().await, Some(Packet::PingResp));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(started.elapsed() < PATIENCE);
    }
    assert!(closed.await.unwrap() >= Duration::from_millis(2_900));
    pinging
        .publish("devices/leaf3/messages/events/", b"x", 1)
        .await;
}

/// A connection ends with its token, also when it is the clock that moves.
#[tokio::test]
async fn strict_connections_end_with_their_token() {
    let bed = Bed::strict().await;
    let soon = Token {
        expires_at: now_secs() + 2,
        ..Token::of("leaf1")
    };
    let mut soon = Client::admitted(&bed, &Hello::of("leaf1").with_token(soon)).await;
    assert_eq!(soon.next().await, None);
    let mut later = Client::admitted(&bed, &Hello::through("leaf3;edge3;edge2;edge1")).await;
    let far = Token {
        expires_at: now_secs() + 90_000,
        ..Token::of("leaf0")
    };
    let mut far = Client::admitted(&bed, &Hello::of("leaf0").with_token(far)).await;
    bed.clock(3_700).await;
    assert_eq!(later.next().await, None);
    far.publish("devices/leaf0/messages/events/", b"x", 1).await;
}

/// A will is a message of the same identity, sent unless the client says goodbye.
#[tokio::test]
async fn wills_are_stored_and_checked() {
    let bed = Bed::strict().await;
    let will = |topic: &str| Some(LastWill::new(topic, "gone", QoS::AtLeastOnce, false));
    let topic = "devices/leaf1/messages/events/a=1";
    let hello = Hello {
        will: will(topic),
        ..Hello::of("leaf1")
    };
    let polite = Client::admitted(&bed, &hello).await;
    polite.expect_close_after(&[0xe0, 0]).await;
    assert_eq!(bed.ledger().await.len(), 0);
    drop(Client::admitted(&bed, &hello).await);
    bed.control("GET", "/ledger/wait?count=1", serde_json::Value::Null)
        .await;
    let ledger = bed.ledger().await;
    assert_eq!(
        ledger[0]["properties"],
        serde_json::json!({"a": "1", "iothub-MessageType": "Will"})
    );
    let other = Hello {
        will: will("devices/leaf3/messages/events/"),
        ..Hello::of("leaf1")
    };
    refused(&bed, &other, ConnectReturnCode::NotAuthorized).await;
}

/// Credentials that are no tokens are refused, and the hub lives on.
#[tokio::test]
async fn passwords_that_are_no_tokens_are_refused() {
    let bed = Bed::strict().await;
    for password in [
        "",
        "x",
        "SharedAccessSignature sr=&sig=&se=",
        "SharedAccessSignature ",
    ] {
        let hello = Hello::of("leaf1");
        let mut connect = Connect::new(&hello.client_id);
        connect.set_login(hello.user_name, password.to_owned());
        let mut bytes = BytesMut::new();
        connect.write(&mut bytes).unwrap();
        let mut client = Client::open(&bed.files, bed.mqtt()).await;
        client.send(&bytes).await;
        let Some(Packet::ConnAck(ack)) = client.next().await else {
            panic!("no CONNACK")
        };
        assert_eq!(ack.code, ConnectReturnCode::NotAuthorized, "{password}");
    }
}
