use bytes::Bytes;
use fe2o3_amqp_types::messaging::message::__private::{Deserializable, Serializable};
use fe2o3_amqp_types::messaging::{self as oracle, AmqpValue, Data};
use fe2o3_amqp_types::messaging::{ApplicationProperties, MessageAnnotations};
use fe2o3_amqp_types::primitives::SimpleValue;
use proptest::prelude::*;
use serde_amqp::Value as OracleValue;
use serde_amqp::primitives::{Binary, Symbol, Timestamp, Uuid};

use super::*;
use crate::vectors::{self, bytes, described, string};

fn id() -> impl Strategy<Value = MessageId> {
    prop_oneof![
        any::<u64>().prop_map(MessageId::Ulong),
        any::<[u8; 16]>().prop_map(MessageId::Uuid),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(|id| MessageId::Binary(id.into())),
        "\\PC{0,20}".prop_map(|id| MessageId::Str(id.into())),
    ]
}

fn oracle_id(id: &MessageId) -> oracle::MessageId {
    match id {
        MessageId::Ulong(id) => oracle::MessageId::Ulong(*id),
        MessageId::Uuid(id) => oracle::MessageId::Uuid(Uuid::from(*id)),
        MessageId::Binary(id) => oracle::MessageId::Binary(Binary::from(id.to_vec())),
        MessageId::Str(id) => oracle::MessageId::String(id.to_string()),
    }
}

type Pairs = Vec<(String, String)>;

fn pairs(key: &'static str) -> impl Strategy<Value = Pairs> {
    prop::collection::btree_map(key, "\\PC{0,20}", 0..6).prop_map(|map| map.into_iter().collect())
}

fn message(
    properties: &Properties<'_>,
    annotations: &Pairs,
    application: &Pairs,
    body: &[u8],
) -> oracle::Message<Data> {
    let text = |text: Option<&str>| text.map(str::to_owned);
    let symbol = |text: Option<&str>| text.map(Symbol::from);
    let mut wanted = MessageAnnotations::default();
    for (key, value) in annotations {
        let key = oracle::annotations::OwnedKey::from(Symbol::from(key.as_str()));
        wanted.0.insert(key, OracleValue::String(value.clone()));
    }
    let mut map = ApplicationProperties::default();
    for (key, value) in application {
        map.0
            .insert(key.clone(), SimpleValue::String(value.clone()));
    }
    oracle::Message::<Data> {
        header: None,
        delivery_annotations: None,
        message_annotations: (!annotations.is_empty()).then_some(wanted),
        properties: Some(oracle::Properties {
            message_id: properties.message_id.as_ref().map(oracle_id),
            user_id: properties.user_id.map(|id| Binary::from(id.to_vec())),
            to: text(properties.to),
            subject: text(properties.subject),
            reply_to: text(properties.reply_to),
            correlation_id: properties.correlation_id.as_ref().map(oracle_id),
            content_type: symbol(properties.content_type),
            content_encoding: symbol(properties.content_encoding),
            absolute_expiry_time: properties
                .absolute_expiry_time
                .map(Timestamp::from_milliseconds),
            creation_time: properties.creation_time.map(Timestamp::from_milliseconds),
            group_id: text(properties.group_id),
            group_sequence: properties.group_sequence,
            reply_to_group_id: text(properties.reply_to_group_id),
        }),
        application_properties: (!application.is_empty()).then_some(map),
        body: Data(Binary::from(body.to_vec())),
        footer: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What this crate writes the oracle reads, and the other way round.
    #[test]
    fn agrees_with_the_oracle_both_ways(
        message_id in prop::option::of(id()),
        correlation_id in prop::option::of(id()),
        user_id in prop::option::of(prop::collection::vec(any::<u8>(), 0..9)),
        texts in prop::collection::vec(prop::option::of("\\PC{0,20}"), 5),
        symbols in prop::collection::vec(prop::option::of("[ -~]{0,20}"), 2),
        times in prop::collection::vec(prop::option::of(any::<i64>()), 2),
        group_sequence in prop::option::of(any::<u32>()),
        annotations in pairs("[!-~]{1,9}"),
        application in pairs("\\PC{0,9}"),
        body in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let properties = Properties {
            message_id,
            user_id: user_id.as_deref(),
            to: texts[0].as_deref(),
            subject: texts[1].as_deref(),
            reply_to: texts[2].as_deref(),
            correlation_id,
            content_type: symbols[0].as_deref(),
            content_encoding: symbols[1].as_deref(),
            absolute_expiry_time: times[0],
            creation_time: times[1],
            group_id: texts[3].as_deref(),
            group_sequence,
            reply_to_group_id: texts[4].as_deref(),
        };
        let expected = message(&properties, &annotations, &application, &body);
        let mut writer = MessageWriter::new();
        // In another order than they are to stand.
        writer.application_properties(application.iter().map(|(k, v)| (k.as_str(), Value::Str(v))));
        writer.annotations(annotations.iter().map(|(k, v)| (k.as_str(), Value::Str(v))));
        writer.properties(&properties);
        writer.data(&body);
        let ours = writer.finish();
        let read: Deserializable<oracle::Message<Data>> = serde_amqp::from_slice(&ours).unwrap();
        prop_assert_eq!(&read.0, &expected);

        let theirs = Bytes::from(serde_amqp::to_vec(&Serializable(expected)).unwrap());
        let view = MessageView::parse(&theirs).unwrap();
        prop_assert_eq!(view.properties.as_ref(), Some(&properties));
        let strings = |map: Option<Map<'_>>| -> Pairs {
            let map = map.unwrap_or_default();
            let pairs = map.iter().map(|(k, v)| (k.as_str().unwrap().to_owned(), v.as_str().unwrap().to_owned()));
            pairs.collect()
        };
        prop_assert_eq!(strings(view.message_annotations), annotations);
        prop_assert_eq!(strings(view.application_properties), application);
        match &view.body {
            Body::Data(sections) => prop_assert_eq!(&sections.concat(), &body),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}

#[test]
fn ids_are_shown_as_text() {
    let uuid = [
        0x1b, 0x4e, 0x28, 0xba, 0x2f, 0xa1, 0x11, 0xd2, 0x88, 0x3f, 0x00, 0x16, 0xd3, 0xcc, 0xa4,
        0x27,
    ];
    let texts = [
        (MessageId::Ulong(u64::MAX), "18446744073709551615"),
        (
            MessageId::Uuid(uuid),
            "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
        ),
        (MessageId::Binary(Bytes::from_static(b"\x00\xff")), "00ff"),
        (MessageId::Str("A b".into()), "A b"),
    ];
    for (id, text) in texts {
        assert_eq!(id.to_string(), text);
    }
}

#[test]
fn a_patch_has_a_version_that_is_null() {
    let payload = Bytes::from(vectors::patch());
    let message = MessageView::parse(&payload).unwrap();
    let annotations = message.message_annotations.unwrap();
    assert_eq!(annotations.get_symbol("version"), Some(Value::Null));
    assert_eq!(
        annotations.get_symbol("operation"),
        Some(Value::Str("PATCH"))
    );
    assert_eq!(annotations.get_symbol("missing"), None);
    let properties = message.properties.unwrap();
    let id = properties.correlation_id.unwrap();
    assert_eq!(id.to_string(), "Patch1b4e28ba-2fa1-11d2-883f-0016d3cca427");
}

#[test]
fn a_batch_is_split_without_copies() {
    let payload = Bytes::from(vectors::batch());
    let message = MessageView::parse(&payload).unwrap();
    let within = payload.as_ptr_range();
    let bodies: Vec<_> = batch_items(&message.body)
        .map(|item| {
            assert!(within.contains(&item.as_ptr()));
            let message = MessageView::parse(item).unwrap();
            let application = message.application_properties.unwrap();
            assert_eq!(application.get_str("temp"), Some(Value::Str("21")));
            match message.body {
                Body::Data(sections) => sections.concat(),
                other => panic!("{other:?}"),
            }
        })
        .collect();
    assert_eq!(bodies, [b"one", b"two"]);
    assert_eq!(batch_items(&Body::Empty).count(), 0);
    assert_eq!(batch_items(&Body::Value(Value::Null)).count(), 0);
}

#[test]
fn bodies_of_every_kind() {
    let parse = |bytes: Vec<u8>| -> String {
        let payload = Bytes::from(bytes);
        MessageView::parse(&payload).map_or_else(|e| e.to_string(), |m| format!("{:?}", m.body))
    };
    // A GET of the C# client has no body, not even a section.
    assert_eq!(parse(vec![]), "Empty");
    assert_eq!(parse(described(0x77, &string("x"))), "Value(Str(\"x\"))");
    let sequence = described(0x76, &vectors::list(&[string("x")]));
    assert!(parse(bytes(&[&sequence, &sequence])).starts_with("Sequence([List"));
    // The header is read, wherever it stands.
    let header = vectors::composite(0x70, &[vec![0x41], vec![0x50, 9], vec![0x52, 30]]);
    let payload = Bytes::from(bytes(&[&described(0x75, b"\xa0\x00"), &header]));
    let message = MessageView::parse(&payload).unwrap();
    assert_eq!(
        (message.durable, message.priority, message.ttl_ms),
        (true, 9, Some(30))
    );
    assert_eq!(
        message.body,
        Body::Data([Bytes::new()].into_iter().collect())
    );
}

#[test]
fn what_is_no_message_is_refused() {
    let data = described(0x75, b"\xa0\x01x");
    let annotations = described(0x72, b"\xc1\x01\x00");
    let wrong: Vec<Vec<u8>> = vec![
        b"\x40".to_vec(),
        string("text"),
        described(0x99, b"\x40"),
        described(0x75, &string("x")),
        described(0x72, b"\x45"),
        described(0x73, b"\xc1\x01\x00"),
        bytes(&[&annotations, &annotations]),
        bytes(&[&data, &described(0x77, b"\x40")]),
        bytes(&[&described(0x77, b"\x40"), &described(0x77, b"\x40")]),
        bytes(&[&data, &described(0x76, b"\x45")]),
        vectors::composite(0x73, &[vec![0x41]]),
        vectors::composite(0x73, &[vec![0x40], string("no binary")]),
    ];
    for bytes in wrong {
        let payload = Bytes::from(bytes);
        assert!(MessageView::parse(&payload).is_err(), "{payload:?}");
    }
    let many = Bytes::from(described(0x75, b"\xa0\x00").repeat(DATA_SECTIONS_MAX));
    assert!(MessageView::parse(&many).is_ok());
    let more = Bytes::from(described(0x75, b"\xa0\x00").repeat(DATA_SECTIONS_MAX + 1));
    let refused = MessageView::parse(&more);
    assert!(matches!(refused, Err(DecodeError::TooMany { .. })));
}

#[test]
fn a_value_body_is_read_by_the_oracle() {
    let mut writer = MessageWriter::new();
    writer.value(Value::Int(200));
    let read: Deserializable<oracle::Message<AmqpValue<i32>>> =
        serde_amqp::from_slice(&writer.finish()).unwrap();
    assert_eq!(read.0.body, AmqpValue(200));
}
