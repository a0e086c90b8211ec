//! Both directions, against the tables of spec/upstream.md A6.1 and spec/amqp.md 5.

use proptest::prelude::*;

use super::*;

fn message() -> Message {
    let mut message = Message {
        body: Bytes::from_static(b"body"),
        properties: vec![
            Property {
                key: "a".to_owned(),
                value: Some("1".to_owned()),
            },
            Property {
                key: "none".to_owned(),
                value: None,
            },
        ],
        ..Message::default()
    };
    for property in SystemProperty::ALL {
        let value = match property {
            SystemProperty::CreationTime => "2026-01-01T00:00:00Z".to_owned(),
            other => format!("v-{}", other.name()),
        };
        message.system.set(*property, value);
    }
    message
}

#[test]
fn what_goes_up_is_what_the_reference_sends() {
    let bytes = encode(&message());
    let view = MessageView::parse(&bytes).unwrap();
    let properties = view.properties.unwrap();
    let expected = Properties {
        message_id: Some(MessageId::Str("v-messageId".into())),
        correlation_id: Some(MessageId::Str("v-cid".into())),
        user_id: Some(b"v-userId"),
        to: Some("v-to"),
        content_type: Some("v-contentType"),
        content_encoding: Some("v-contentEncoding"),
        ..Properties::default()
    };
    assert_eq!(properties, expected);
    let texts = |map: Map<'_>| -> Vec<(String, Option<String>)> {
        map.iter()
            .map(|(key, value)| (key.as_str().unwrap().to_owned(), text_of(&value)))
            .collect()
    };
    let pair = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
    let application = texts(view.application_properties.unwrap());
    let expected = [
        pair("a", "1"),
        ("none".to_owned(), None),
        pair("iothub-creation-time-utc", "2026-01-01T00:00:00Z"),
        pair("iothub-message-schema", "v-messageSchema"),
    ];
    assert_eq!(application, expected);
    let annotations = texts(view.message_annotations.unwrap());
    assert_eq!(annotations, [pair("dt-subject", "v-dt-subject")]);
    assert_eq!(body(&view.body), "body");
}

#[test]
fn only_a_security_message_names_its_interface() {
    let mut message = Message::default();
    let interface = SECURITY_INTERFACE.to_lowercase();
    message
        .system
        .set(SystemProperty::InterfaceId, interface.clone());
    let bytes = encode(&message);
    let view = MessageView::parse(&bytes).unwrap();
    let annotations = view.message_annotations.unwrap();
    let value = annotations.get_symbol("iothub-interface-id").unwrap();
    assert_eq!(value.as_str(), Some(interface.as_str()));
    assert_eq!(view.properties, None, "nothing to say");
    assert_eq!(view.application_properties, None);
}

#[test]
fn what_comes_down_has_its_system_properties() {
    let mut writer = MessageWriter::new();
    writer.annotations([
        ("x-opt-lock-token", Value::Str("the-token")),
        ("iothub-enqueuedtime", Value::Timestamp(0)),
        ("iothub-deliverycount", Value::Ubyte(3)),
        ("x-opt-sequence-number", Value::Ulong(1)),
        ("dt-subject", Value::Str("thermostat")),
        ("else", Value::Null),
    ]);
    writer.properties(&Properties {
        message_id: Some(MessageId::Uuid([1; 16])),
        correlation_id: Some(MessageId::Ulong(5)),
        user_id: Some(b"me"),
        to: Some("/devices/leaf1/messages/deviceBound"),
        content_type: Some("text/plain"),
        content_encoding: Some("utf-8"),
        absolute_expiry_time: Some(1_700_000_000_000),
        ..Properties::default()
    });
    writer.application_properties([
        ("iothub-ack", Value::Str("full")),
        ("iothub-creation-time-utc", Value::Str("t")),
        ("iothub-message-schema", Value::Str("s")),
        ("iothub-operation", Value::Str("o")),
        ("number", Value::Int(-4)),
        ("flag", Value::Bool(true)),
        ("nothing", Value::Null),
    ]);
    writer.data(b"hi");
    let (message, redelivered) = cloud_to_device(&writer.finish(), &[1; 4]).unwrap();
    assert!(redelivered);
    assert_eq!(message.body, "hi");
    let mut system: Vec<(&str, &str)> = message
        .system
        .iter()
        .map(|(property, value)| (property.name(), value))
        .collect();
    system.sort_unstable();
    let expected = [
        ("absolute-expiry-time", "2023-11-14T22:13:20.0000000Z"),
        ("cid", "5"),
        ("contentEncoding", "utf-8"),
        ("contentType", "text/plain"),
        ("creationTime", "t"),
        ("deliveryCount", "3"),
        ("dt-subject", "thermostat"),
        ("enqueuedTime", "1970-01-01T00:00:00.0000000Z"),
        ("lockToken", "the-token"),
        ("messageId", "01010101-0101-0101-0101-010101010101"),
        ("messageSchema", "s"),
        ("operation", "o"),
        ("sequenceNumber", "1"),
        ("to", "/devices/leaf1/messages/deviceBound"),
        ("userId", "me"),
    ];
    assert_eq!(system, expected);
    let properties: Vec<(&str, Option<&str>)> = message
        .properties
        .iter()
        .map(|property| (property.key.as_str(), property.value.as_deref()))
        .collect();
    let expected = [
        ("iothub-ack", Some("full")),
        ("number", Some("-4")),
        ("flag", Some("true")),
        ("nothing", None),
    ];
    assert_eq!(properties, expected);
}

#[test]
fn a_lock_token_is_the_tags_guid_in_the_order_of_dotnet() {
    let tag: Vec<u8> = (0..16).collect();
    let expected = "03020100-0504-0706-0809-0a0b0c0d0e0f";
    assert_eq!(uuid_of_tag(&tag).as_deref(), Some(expected));
    assert_eq!(uuid_of_tag(&tag[..15]), None);
    assert_eq!(uuid_of_tag(&[0; 17]), None);
}

#[test]
fn methods_need_a_name_and_an_id() {
    let written = |name: Option<&str>, id: Option<MessageId>| {
        let mut writer = MessageWriter::new();
        writer.properties(&Properties {
            correlation_id: id,
            ..Properties::default()
        });
        let name = name.map(|name| ("IoThub-methodname", Value::Str(name)));
        writer.application_properties(name);
        writer.finish()
    };
    let id = || Some(MessageId::Uuid([7; 16]));
    let expected = Call {
        name: "reboot".to_owned(),
        correlation: MessageId::Uuid([7; 16]),
        payload: Bytes::new(),
    };
    assert_eq!(call(&written(Some("reboot"), id())), Some(expected));
    assert_eq!(call(&written(None, id())), None);
    assert_eq!(call(&written(Some(""), id())), None);
    assert_eq!(call(&written(Some("reboot"), None)), None);
    let bytes = answer(MessageId::Uuid([7; 16]), -3, b"{}");
    let view = MessageView::parse(&bytes).unwrap();
    let status = view.application_properties.unwrap();
    assert_eq!(status.get_str("IoThub-status"), Some(Value::Int(-3)));
}

#[test]
fn twin_requests_say_what_the_reference_says() {
    let bytes = twin_request("PATCH", Some("/properties/reported"), "Patch1", b"{}");
    let view = MessageView::parse(&bytes).unwrap();
    let annotations = view.message_annotations.unwrap();
    let symbol = |key| annotations.get_symbol(key);
    assert_eq!(symbol("operation"), Some(Value::Str("PATCH")));
    assert_eq!(symbol("resource"), Some(Value::Str("/properties/reported")));
    assert_eq!(symbol("version"), Some(Value::Null));
    let id = view.properties.unwrap().correlation_id;
    assert_eq!(id, Some(MessageId::Str("Patch1".into())));
    let bytes = twin_request("GET", None, "Get1", b"");
    let view = MessageView::parse(&bytes).unwrap();
    assert_eq!(view.message_annotations.unwrap().len(), 1);
}

proptest! {
    #[test]
    fn nothing_that_comes_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in proptest::collection::vec(any::<u8>(), 0..40)) {
        let bytes = Bytes::from(bytes);
        let _ = cloud_to_device(&bytes, &tag);
        let _ = call(&bytes);
        let _ = twin_news(&bytes);
    }

    #[test]
    fn user_properties_and_bodies_arrive_as_they_were(
        properties in proptest::collection::vec(("\\PC{1,20}", proptest::option::of("\\PC{0,20}")), 0..10),
        content in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let properties: Vec<Property> = properties
            .into_iter()
            .map(|(key, value)| Property { key, value })
            .collect();
        let message = Message { body: content.into(), properties, ..Message::default() };
        let (back, redelivered) = cloud_to_device(&encode(&message), &[]).unwrap();
        prop_assert!(!redelivered);
        prop_assert_eq!(back.body, message.body);
        let own = |property: &&Property| !property.key.starts_with("iothub-");
        let sent: Vec<&Property> = message.properties.iter().filter(own).collect();
        let came: Vec<&Property> = back.properties.iter().filter(own).collect();
        prop_assert_eq!(came, sent);
    }
}
