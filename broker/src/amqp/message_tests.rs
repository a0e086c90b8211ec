use edgehub_amqp::message::MessageId;

use super::*;

const TAG: [u8; 16] = *b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f";

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

#[test]
fn every_property_of_the_table_comes_in() {
    let mut writer = MessageWriter::new();
    writer.annotations([
        ("dt-subject", Value::Str("component")),
        ("iothub-interface-id", Value::Symbol("urn:x")),
        // Stamps that a client writes itself.
        ("iothub-connection-device-id", Value::Str("other")),
        ("x-opt-lock-token", Value::Str("x")),
    ]);
    writer.properties(&Properties {
        message_id: Some(MessageId::Uuid(*b"\xab\xcdefghijklmnopqr")),
        correlation_id: Some(MessageId::Ulong(7)),
        user_id: Some(b"user"),
        to: Some("somewhere"),
        content_type: Some("application/json"),
        content_encoding: Some("utf-8"),
        absolute_expiry_time: Some(1_767_225_600_000),
        subject: Some("ignored"),
        ..Properties::default()
    });
    writer.application_properties([
        (
            "iothub-creation-time-utc",
            Value::Str("2026-01-01T00:00:00Z"),
        ),
        ("iothub-message-schema", Value::Str("schema")),
        ("iothub-operation", Value::Str("op")),
        ("iothub-outputname", Value::Str("out")),
        ("iothub-ack", Value::Str("full")),
        ("plain", Value::Str("text")),
        ("number", Value::Int(-5)),
        ("big", Value::Ulong(u64::MAX)),
        ("flag", Value::Bool(true)),
        ("nothing", Value::Null),
        ("empty", Value::Str("")),
    ]);
    writer.data(b"body");
    let message = read(&writer.finish()).unwrap();
    let system: Vec<_> = message.system.iter().collect();
    use SystemProperty as S;
    for expected in [
        (S::MessageId, "abcd6566-6768-696a-6b6c-6d6e6f707172"),
        (S::CorrelationId, "7"),
        (S::UserId, "user"),
        (S::To, "somewhere"),
        (S::ContentType, "application/json"),
        (S::ContentEncoding, "utf-8"),
        (S::ExpiryTime, "2026-01-01T00:00:00.0000000Z"),
        (S::CreationTime, "2026-01-01T00:00:00Z"),
        (S::MessageSchema, "schema"),
        (S::Operation, "op"),
        (S::OutputName, "out"),
        (S::Subject, "component"),
        (S::InterfaceId, "urn:x"),
    ] {
        let found = system.iter().find(|(property, _)| *property == expected.0);
        let (_, value) = found.unwrap_or_else(|| panic!("{expected:?}"));
        assert_eq!(*value, expected.1);
    }
    assert_eq!(system.len(), 13);
    let properties: Vec<_> = message
        .properties
        .iter()
        .map(|p| (p.key.as_str(), p.value.as_deref()))
        .collect();
    assert_eq!(
        properties,
        [
            ("iothub-ack", Some("full")),
            ("plain", Some("text")),
            ("number", Some("-5")),
            ("big", Some("18446744073709551615")),
            ("flag", Some("true")),
            ("nothing", None),
            ("empty", Some("")),
        ]
    );
    assert_eq!(message.body, "body");
}

#[test]
fn bodies_of_data_texts_and_nothing_are_taken() {
    let body = |write: &dyn Fn(&mut MessageWriter)| {
        let mut writer = MessageWriter::new();
        write(&mut writer);
        read(&writer.finish()).map(|message| message.body)
    };
    assert_eq!(body(&|_| {}).unwrap(), "");
    assert_eq!(body(&|w| w.data(b"")).unwrap(), "");
    assert_eq!(
        body(&|w| {
            w.data(b"a");
            w.data(b"b");
        })
        .unwrap(),
        "ab"
    );
    assert_eq!(body(&|w| w.value(Value::Str("text"))).unwrap(), "text");
    assert_eq!(body(&|w| w.value(Value::Binary(b"bin"))).unwrap(), "bin");
    assert_eq!(body(&|w| w.value(Value::Null)).unwrap(), "");
    assert_eq!(body(&|w| w.value(Value::Int(1))), Err(MessageError::Body));
    assert!(matches!(
        read(&Bytes::from_static(b"\x00\x53\x75")),
        Err(MessageError::Decode(_))
    ));
}

#[test]
fn names_that_are_empty_or_differ_in_case_and_times_that_are_none_are_refused() {
    let mut writer = MessageWriter::new();
    writer.application_properties([("Key", Value::Str("a")), ("kEY", Value::Str("b"))]);
    assert_eq!(read(&writer.finish()), Err(MessageError::Repeated));
    let mut writer = MessageWriter::new();
    writer.application_properties([("", Value::Str("a"))]);
    assert_eq!(read(&writer.finish()), Err(MessageError::NoName));
    for time in [-1, i64::MAX] {
        let mut writer = MessageWriter::new();
        writer.properties(&Properties {
            absolute_expiry_time: Some(time),
            ..Properties::default()
        });
        assert_eq!(read(&writer.finish()), Err(MessageError::Time));
    }
}

#[test]
fn an_input_message_has_what_clients_read() {
    let mut message = Message {
        body: "body".into(),
        ..Message::default()
    };
    message.system.set(SystemProperty::MessageId, "m");
    message.system.set(SystemProperty::OutputName, "out");
    message
        .system
        .set(SystemProperty::CreationTime, "2026-01-01T00:00:00Z");
    message.system.set(SystemProperty::Subject, "component");
    message.properties.push(Property {
        key: "k".to_owned(),
        value: Some("v".to_owned()),
    });
    let bytes = write(
        &message,
        Kind::Input("in1"),
        &id("e1/modA"),
        &id("e1/modB"),
        TAG,
    );
    let view = MessageView::parse(&bytes).unwrap();
    let annotations = view.message_annotations.unwrap();
    for (key, value) in [
        ("x-opt-input-name", "in1"),
        ("x-opt-lock-token", "03020100-0504-0706-0809-0a0b0c0d0e0f"),
        ("iothub-connection-device-id", "e1"),
        ("iothub-connection-module-id", "modA"),
        ("dt-subject", "component"),
    ] {
        assert_eq!(
            annotations.get_symbol(key).unwrap().as_str(),
            Some(value),
            "{key}"
        );
    }
    let application = view.application_properties.unwrap();
    assert_eq!(application.len(), 2, "the output is routing's");
    assert_eq!(application.get_str("k").unwrap().as_str(), Some("v"));
    let properties = view.properties.unwrap();
    assert_eq!(
        (properties.message_id, properties.to),
        (Some(MessageId::Str("m".into())), None)
    );
    assert!(matches!(&view.body, Body::Data(data) if data.len() == 1 && data[0] == "body"));
}

#[test]
fn a_cloud_to_device_message_has_its_stamps_with_their_types() {
    let mut message = Message::default();
    message
        .system
        .set(SystemProperty::EnqueuedTime, "2026-01-01T00:00:00.0000000Z");
    message.system.set(SystemProperty::DeliveryCount, "2");
    message.system.set(SystemProperty::SequenceNumber, "9");
    message.system.set(SystemProperty::Ack, "full");
    message
        .system
        .set(SystemProperty::ExpiryTime, "2026-01-01T00:00:00Z");
    message.system.set(SystemProperty::To, "elsewhere");
    let bytes = write(
        &message,
        Kind::CloudToDevice,
        &id("leaf1"),
        &id("leaf1"),
        TAG,
    );
    let view = MessageView::parse(&bytes).unwrap();
    let annotations = view.message_annotations.unwrap();
    let time = Value::Timestamp(1_767_225_600_000);
    assert_eq!(annotations.get_symbol("iothub-enqueuedtime"), Some(time));
    assert_eq!(
        annotations.get_symbol("iothub-deliverycount"),
        Some(Value::Ubyte(2))
    );
    assert_eq!(
        annotations.get_symbol("x-opt-sequence-number"),
        Some(Value::Ulong(9))
    );
    assert_eq!(annotations.get_symbol("x-opt-input-name"), None);
    assert_eq!(annotations.get_symbol("iothub-connection-device-id"), None);
    let properties = view.properties.unwrap();
    assert_eq!(properties.to, Some("/devices/leaf1"));
    assert_eq!(properties.absolute_expiry_time, Some(1_767_225_600_000));
    let application = view.application_properties.unwrap();
    assert_eq!(
        application.get_str("iothub-ack").unwrap().as_str(),
        Some("full")
    );
}

#[test]
fn guids_are_written_and_read() {
    let text = "00112233-4455-6677-8899-aabbccddeeff";
    let bytes = guid_bytes(text).unwrap();
    assert_eq!(guid_text(bytes), text);
    assert_eq!(guid_bytes("no guid"), None);
}
