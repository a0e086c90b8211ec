use fe2o3_amqp_types::messaging::message::__private::Deserializable;
use fe2o3_amqp_types::messaging::{AmqpValue, Message, MessageId as OracleId};
use fe2o3_amqp_types::primitives::SimpleValue;

use super::*;
use crate::vectors::{self, bytes, composite, described, map, string};

fn parse(bytes: Vec<u8>) -> Result<PutToken, (Option<MessageId>, CbsRequestError)> {
    PutToken::parse(&Bytes::from(bytes))
}

/// A request with these application properties and body.
fn request(application: &[Vec<u8>], body: &[u8]) -> Vec<u8> {
    bytes(&[
        &composite(0x73, &[vec![0x53, 7]]),
        &described(0x74, &map(application)),
        body,
    ])
}

fn application(operation: &str, kind: &str, name: &str) -> Vec<Vec<u8>> {
    ["operation", operation, "type", kind, "name", name]
        .map(string)
        .to_vec()
}

/// What an answer repeats waits in memory until it is read.
#[test]
fn what_would_be_repeated_or_kept_is_bounded() {
    for (length, taken) in [
        (MESSAGE_ID_BYTES_MAX, true),
        (MESSAGE_ID_BYTES_MAX + 1, false),
    ] {
        let id = "x".repeat(length);
        let read = parse(vectors::put_token(&string(&id), true));
        assert_eq!(read.is_ok(), taken, "{length}");
        if let Err((id, error)) = read {
            assert_eq!(id, None, "{error}");
        }
    }
    for (length, taken) in [(CBS_TEXT_BYTES_MAX, true), (CBS_TEXT_BYTES_MAX + 1, false)] {
        let reply_to = string(&"x".repeat(length));
        let null = || vec![0x40];
        let properties = [vec![0x53, 7], null(), null(), null(), reply_to];
        let request = bytes(&[
            &composite(0x73, &properties),
            &described(0x74, &map(&application("put-token", "t", "n"))),
            &described(0x77, &string("token")),
        ]);
        assert_eq!(parse(request).is_ok(), taken, "{length}");
    }
}

#[test]
fn ids_of_the_clients_come_back_with_their_types() {
    let uuid = [&[0x98][..], &[7; 16]].concat();
    let ids = [
        (string("7b0c"), MessageId::Str("7b0c".into())),
        (vec![0x44], MessageId::Ulong(0)),
        (vec![0x53, 1], MessageId::Ulong(1)),
        (uuid, MessageId::Uuid([7; 16])),
    ];
    for (encoded, id) in ids {
        let read = parse(vectors::put_token(&encoded, true)).unwrap();
        assert_eq!(read.message_id.as_ref(), Some(&id));
        assert_eq!(read.reply_to.as_deref(), Some("cbs"));
        assert_eq!(read.token_type, "servicebus.windows.net:sastoken");
        assert_eq!(read.name, "hub.azure-devices.net/devices/leaf1");
        assert!(read.token.expose().starts_with("SharedAccessSignature sr="));
        assert_eq!(read.expiration, Some(0x0190_0000_0000));
        assert!(!format!("{read:?}").contains("SharedAccess"));

        let response = cbs_response(Some(&id), 200, "OK");
        let oracle: Deserializable<Message<AmqpValue<()>>> =
            serde_amqp::from_slice(&response).unwrap();
        let correlation = oracle.0.properties.unwrap().correlation_id.unwrap();
        let expected = match id {
            MessageId::Ulong(id) => OracleId::Ulong(id),
            MessageId::Uuid(id) => OracleId::Uuid(id.into()),
            MessageId::Binary(_) => panic!(),
            MessageId::Str(id) => OracleId::String(id.to_string()),
        };
        assert_eq!(correlation, expected);
        let properties = oracle.0.application_properties.unwrap();
        assert_eq!(
            properties.0.get("status-code"),
            Some(&SimpleValue::Int(200))
        );
        assert_eq!(
            properties.0.get("status-description"),
            Some(&SimpleValue::String("OK".to_owned()))
        );
        // An AMQP int, whatever its size (spec/amqp.md 10.2).
        let code = vectors::hex(&response);
        assert!(code.contains("7374617475732d636f646571000000c8"), "{code}");
    }
}

#[test]
fn tokens_may_be_strings_binaries_and_data() {
    let properties = application("Put-Token", "t", "n");
    let bodies = [
        described(0x77, &string("token")),
        described(0x77, &vectors::binary(b"token")),
        described(0x75, &vectors::binary(b"token")),
        bytes(&[
            &described(0x75, &vectors::binary(b"tok")),
            &described(0x75, &vectors::binary(b"en")),
        ]),
    ];
    for body in bodies {
        let read = parse(request(&properties, &body)).unwrap();
        assert_eq!(read.token.expose(), "token");
        assert_eq!(read.message_id, Some(MessageId::Ulong(7)));
    }
}

#[test]
fn what_is_wrong_is_said_without_the_token() {
    let body = described(0x77, &string("SECRET"));
    let long = "x".repeat(CBS_TEXT_BYTES_MAX + 1);
    let huge = described(0x77, &string(&"S".repeat(CBS_TOKEN_BYTES_MAX + 1)));
    let ok = application("put-token", "t", "n");
    let too_long = |what, limit| CbsRequestError::TooLong { what, limit };
    let cases = [
        (vec![], body.clone(), CbsRequestError::Missing("operation")),
        (
            application("SECRET", "t", "n"),
            body.clone(),
            CbsRequestError::Operation,
        ),
        (
            application("put-token", " ", "n"),
            body.clone(),
            CbsRequestError::Missing("type"),
        ),
        (
            application("put-token", "t", ""),
            body.clone(),
            CbsRequestError::Missing("name"),
        ),
        (
            application("put-token", &long, "n"),
            body.clone(),
            too_long("type", CBS_TEXT_BYTES_MAX),
        ),
        (
            application("put-token", "t", &long),
            body,
            too_long("name", CBS_TEXT_BYTES_MAX),
        ),
        (ok.clone(), huge, too_long("token", CBS_TOKEN_BYTES_MAX)),
        (ok.clone(), vec![], CbsRequestError::Token),
        (
            ok.clone(),
            described(0x77, &string("  ")),
            CbsRequestError::Token,
        ),
        (
            ok.clone(),
            described(0x77, &[0x54, 1]),
            CbsRequestError::Token,
        ),
        (
            ok.clone(),
            described(0x75, &vectors::binary(b"\xff")),
            CbsRequestError::Token,
        ),
        (ok, described(0x76, &[0x45]), CbsRequestError::Token),
    ];
    for (properties, body, expected) in cases {
        let (id, error) = parse(request(&properties, &body)).unwrap_err();
        assert_eq!((id, &error), (Some(MessageId::Ulong(7)), &expected));
        assert!(!format!("{error} {error:?}").contains("SECRET"));
    }
}

#[test]
fn a_request_cut_anywhere_is_refused_or_whole() {
    let whole = vectors::put_token(&[0x44], true);
    for end in 0..whole.len() {
        assert!(parse(whole[..end].to_vec()).is_err(), "{end}");
    }
    // A token in the place of a descriptor is not repeated.
    let strange = bytes(&[
        &[0x00],
        &vectors::symbol("SharedAccessSignature-secret"),
        &[0x40],
    ]);
    let (_, error) = parse(strange).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("secret"));
}
