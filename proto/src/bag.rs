//! Property bags: the tail of a telemetry, C2D or input topic (spec/mqtt.md section 4).
//!
//! Reading is lenient where every SDK's output must pass (a leading `?`, empty pairs, raw `=` and
//! `/` in values, broken escapes kept as they are); what cannot be read as UTF-8 is an error.
//! Writing encodes everything but RFC 3986 unreserved characters, as the reference does. What is
//! written may be longer than [`MQTT_TOPIC_BYTES_MAX`](crate::limits::MQTT_TOPIC_BYTES_MAX): who
//! sends it looks.

use std::borrow::Cow;
use std::collections::HashSet;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::identity::Identity;
use crate::limits::PROPERTIES_MAX;
use crate::message::{Message, Property, SECURITY_INTERFACE, SystemProperty};
use crate::timestamp::Timestamp;

/// All but the unreserved characters of RFC 3986.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Why a bag cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BagError {
    /// A decoded key or value is not UTF-8.
    #[error("a property is not UTF-8")]
    NotUtf8,
    /// A pair without a key.
    #[error("a property has no name")]
    NoName,
    /// More than [`PROPERTIES_MAX`].
    #[error("too many properties")]
    TooMany,
}

/// Adds the properties of `bag` to `message`.
///
/// `a` and `a=` differ: absent and empty value; an absent value of a system property is that
/// property not set. Of two pairs with one key the last wins. Keys are percent-decoded before
/// they are looked up; a key that the hub takes from no client (`$.cdid`, `deviceId`, …) is an
/// ordinary property (design.md D4). Allocates only for the properties that it finds.
///
/// # Errors
/// When the bag is malformed; `message` may then hold a part of it.
pub fn decode_into(bag: &str, message: &mut Message) -> Result<(), BagError> {
    let first = message.properties.len();
    let bag = bag.strip_prefix('?').unwrap_or(bag);
    for pair in bag.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) => (key, Some(decode_component(value)?)),
            None => (pair, None),
        };
        if key.is_empty() {
            return Err(BagError::NoName);
        }
        let key = decode_component(key)?;
        if let Some(property) = SystemProperty::from_mqtt_key(&key) {
            match value {
                Some(value) => message.system.set(property, value),
                None => drop(message.system.remove(property)),
            }
            continue;
        }
        if message.properties.len() >= PROPERTIES_MAX {
            return Err(BagError::TooMany);
        }
        message.properties.push(Property {
            key: key.into_owned(),
            value: value.map(Cow::into_owned),
        });
    }
    keep_last_of_each_key(&mut message.properties, first);
    Ok(())
}

/// Pairwise for the usual handful; hashed for many, so that no bag costs quadratic time.
fn keep_last_of_each_key(properties: &mut Vec<Property>, first: usize) {
    const FEW: usize = 16;
    let Some(added) = properties.get(first..) else {
        return;
    };
    if added.len() < 2 {
        return;
    }
    if added.len() <= FEW {
        let repeated = added.iter().enumerate().any(|(index, property)| {
            added
                .iter()
                .skip(index + 1)
                .any(|later| later.key == property.key)
        });
        if !repeated {
            return;
        }
    }
    let mut later = HashSet::with_capacity(added.len());
    let mut keep: Vec<bool> = added
        .iter()
        .rev()
        .map(|p| later.insert(p.key.as_str()))
        .collect();
    let mut index = 0;
    properties.retain(|_| {
        index += 1;
        // `keep` is in reverse order: its end is the first of those that were added.
        index <= first || keep.pop().unwrap_or(true)
    });
}

/// The bag of a telemetry message on its way upstream: application properties, then the system
/// properties that are forwarded (spec/upstream.md A6.1).
#[must_use]
pub fn encode_upstream(message: &Message) -> String {
    let mut bag = String::new();
    for property in &message.properties {
        pair(&property.key, property.value.as_deref(), &mut bag);
    }
    for (property, value) in message.system.iter() {
        let wanted = property.forwarded_upstream()
            && (property != SystemProperty::InterfaceId
                || value.eq_ignore_ascii_case(SECURITY_INTERFACE));
        if let Some(key) = property.mqtt_key().filter(|_| wanted) {
            pair(key, Some(value), &mut bag);
        }
    }
    bag
}

/// The bag of a message for a module's input: application properties, then the system properties
/// that clients see (spec/mqtt.md 4.2), then the stamps. It is never empty.
///
/// `$.cdid` and `$.cmid` name `sender`, for a reported-property change the one that reported
/// (4.1). Application properties of these two names are left out, so that no sender can write
/// another's stamp, not even where it has none itself (design.md D4).
#[must_use]
pub fn encode_input(message: &Message, sender: &Identity) -> String {
    use SystemProperty::{
        ConnectionDeviceId, ConnectionModuleId, ReportedSenderDeviceId, ReportedSenderModuleId,
    };
    let (device, module) = match message.system.get(ReportedSenderDeviceId) {
        Some(device) => (device, message.system.get(ReportedSenderModuleId)),
        None => (sender.device_id(), sender.module_id()),
    };
    let mut bag = encode_visible(message);
    for (stamp, value) in [
        (ConnectionDeviceId, Some(device)),
        (ConnectionModuleId, module),
    ] {
        if let Some(key) = stamp.mqtt_key().filter(|_| value.is_some()) {
            pair(key, value, &mut bag);
        }
    }
    bag
}

/// The bag of a cloud-to-device message for `target`: as [`encode_input`], without stamps. Where
/// there is nothing to say it says `$.to`: without a bag C# and Node clients take the topic for
/// another one (spec/mqtt.md 12.5).
#[must_use]
pub fn encode_cloud_to_device(message: &Message, target: &Identity) -> String {
    let mut bag = encode_visible(message);
    if let Some(key) = SystemProperty::To.mqtt_key().filter(|_| bag.is_empty()) {
        let to = format!("/devices/{}/messages/deviceBound", target.device_id());
        pair(key, Some(&to), &mut bag);
    }
    bag
}

/// What of a message every receiver sees. Times are written as C# clients read them; a time that
/// is none would make them drop the connection and is left out (spec/mqtt.md 4.4). So is a
/// property without a name, which no bag can carry.
fn encode_visible(message: &Message) -> String {
    use SystemProperty::{ConnectionDeviceId, ConnectionModuleId, CreationTime, ExpiryTime};
    let stamps = [ConnectionDeviceId, ConnectionModuleId].map(SystemProperty::mqtt_key);
    let mut bag = String::new();
    for property in &message.properties {
        let key = property.key.as_str();
        if !key.is_empty() && !stamps.contains(&Some(key)) {
            pair(key, property.value.as_deref(), &mut bag);
        }
    }
    for (property, value) in message.system.iter() {
        let Some(key) = property.mqtt_key().filter(|_| property.mqtt_out()) else {
            continue;
        };
        match property {
            ConnectionDeviceId | ConnectionModuleId => {}
            CreationTime | ExpiryTime => {
                if let Some(time) = Timestamp::parse(value) {
                    pair(key, Some(&time.to_string()), &mut bag);
                }
            }
            _ => pair(key, Some(value), &mut bag),
        }
    }
    bag
}

/// `key=` also for an absent value: Node reads a bare key as the text "undefined".
fn pair(key: &str, value: Option<&str>, bag: &mut String) {
    if !bag.is_empty() {
        bag.push('&');
    }
    encode_component(key, bag);
    bag.push('=');
    encode_component(value.unwrap_or(""), bag);
}

/// Appends `text` percent-encoded.
pub fn encode_component(text: &str, bag: &mut String) {
    for part in utf8_percent_encode(text, RESERVED) {
        bag.push_str(part);
    }
}

/// Percent-decodes; `+` stays a plus, a broken escape stays as it is.
///
/// # Errors
/// When the result is not UTF-8.
pub fn decode_component(text: &str) -> Result<Cow<'_, str>, BagError> {
    percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| BagError::NotUtf8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topic::{PublishTopic, parse_publish};

    fn read(bag: &str) -> Result<Message, BagError> {
        let mut message = Message::default();
        decode_into(bag, &mut message).map(|()| message)
    }

    fn properties(bag: &str) -> Vec<(String, Option<String>)> {
        read(bag)
            .unwrap()
            .properties
            .into_iter()
            .map(|p| (p.key, p.value))
            .collect()
    }

    fn some(key: &str, value: &str) -> (String, Option<String>) {
        (key.to_owned(), Some(value.to_owned()))
    }

    #[test]
    fn every_row_of_the_syntax_table() {
        assert_eq!(properties("a=1&b=2"), [some("a", "1"), some("b", "2")]);
        assert_eq!(properties("?a=1&b=?2"), [some("a", "1"), some("b", "?2")]);
        assert_eq!(properties("??a=1"), [some("?a", "1")]);
        assert_eq!(properties("a"), [("a".to_owned(), None)]);
        assert_eq!(properties("a="), [some("a", "")]);
        assert_eq!(properties("a=1&a=2"), [some("a", "2")]);
        assert_eq!(
            properties("a=1&b=&%61"),
            [some("b", ""), ("a".to_owned(), None)]
        );
        assert_eq!(properties("a%20b=c%2Fd"), [some("a b", "c/d")]);
        assert_eq!(properties("a=1+2"), [some("a", "1+2")]);
        assert_eq!(
            properties("a=%zz&b=%4&c=%"),
            [some("a", "%zz"), some("b", "%4"), some("c", "%")]
        );
        assert_eq!(properties("&a=1&&b=2&"), [some("a", "1"), some("b", "2")]);
        assert_eq!(properties("a=b=c/"), [some("a", "b=c/")]);
        assert_eq!(properties(""), []);
        assert_eq!(read("=x"), Err(BagError::NoName));
        assert_eq!(read("a=%ff"), Err(BagError::NotUtf8));
        assert_eq!(read("%c3=a"), Err(BagError::NotUtf8));
    }

    #[test]
    fn rows_about_slashes_and_question_marks_hold_for_whole_topics() {
        for (tail, expected) in [
            ("", vec![]),
            ("/", vec![]),
            ("/?", vec![]),
            ("/?a=1", vec![some("a", "1")]),
            ("/a=1/", vec![some("a", "1")]),
            (
                "/a=text/plain&b=/",
                vec![some("a", "text/plain"), some("b", "")],
            ),
            ("/a=1//", vec![some("a", "1/")]),
        ] {
            let topic = format!("devices/d/messages/events{tail}");
            let PublishTopic::Telemetry { bag, .. } = parse_publish(&topic) else {
                panic!("{topic}");
            };
            assert_eq!(properties(bag), expected, "{topic}");
        }
    }

    #[test]
    fn a_system_property_without_a_value_is_not_set() {
        assert!(read("$.mid").unwrap().system.is_empty());
        assert!(read("$.mid=a&$.mid").unwrap().system.is_empty());
        let message = read("$.mid=a&$.mid=").unwrap();
        assert_eq!(message.system.get(SystemProperty::MessageId), Some(""));
    }

    #[test]
    fn properties_that_were_there_stay() {
        let mut message = read("a=1").unwrap();
        decode_into("b=2&a=3&b=4", &mut message).unwrap();
        let keys: Vec<_> = message.properties.iter().map(|p| p.key.as_str()).collect();
        assert_eq!(keys, ["a", "a", "b"]);
        assert_eq!(message.properties[0].value.as_deref(), Some("1"));
    }

    #[test]
    fn system_keys_are_recognised_encoded_and_raw() {
        for bag in [
            "%24.mid=x&%24.ct=application%2Fjson",
            "$.mid=x&$.ct=application/json",
        ] {
            let message = read(bag).unwrap();
            assert_eq!(message.system.get(SystemProperty::MessageId), Some("x"));
            assert_eq!(
                message.system.get(SystemProperty::ContentType),
                Some("application/json")
            );
            assert!(message.properties.is_empty());
        }
    }

    #[test]
    fn keys_that_would_name_an_identity_are_ordinary() {
        let bag = "deviceId=d2&moduleId=m&%24.cdid=d2&%24.cmid=m&iothub-ack=full";
        let message = read(bag).unwrap();
        assert!(message.system.is_empty());
        assert_eq!(message.properties.len(), 5);
    }

    #[test]
    fn the_upstream_bag_leaves_out_what_stays_here() {
        let message =
            read("a=b%3D&%24.mid=1&%24.on=out&%24.exp=2030&%24.ifid=urn%3Ax&ack=full").unwrap();
        assert_eq!(encode_upstream(&message), "a=b%3D&%24.mid=1");
        let security = format!("$.ifid={SECURITY_INTERFACE}");
        let message = read(&security).unwrap();
        assert!(encode_upstream(&message).starts_with("%24.ifid=urn%3A"));
    }

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    #[test]
    fn a_delivery_writes_an_equals_sign_for_every_key() {
        let message = read("a&b=").unwrap();
        assert_eq!(encode_input(&message, &id("d")), "a=&b=&%24.cdid=d");
        assert_eq!(encode_cloud_to_device(&message, &id("d")), "a=&b=");
    }

    #[test]
    fn a_bag_is_never_empty() {
        let message = Message::default();
        assert_eq!(encode_input(&message, &id("d/m")), "%24.cdid=d&%24.cmid=m");
        assert_eq!(
            encode_cloud_to_device(&message, &id("d")),
            "%24.to=%2Fdevices%2Fd%2Fmessages%2FdeviceBound"
        );
        let with_to = read("$.to=/devices/d/messages/deviceBound&cmd=go&$.mid=42").unwrap();
        assert_eq!(
            encode_cloud_to_device(&with_to, &id("d")),
            "cmd=go&%24.to=%2Fdevices%2Fd%2Fmessages%2FdeviceBound&%24.mid=42"
        );
    }

    #[test]
    fn times_are_written_as_csharp_reads_them_or_not_at_all() {
        let bag = "$.exp=2030-01-31T12:00:00.123Z&$.ctime=2030-01-31T14:00:00%2B02:00";
        assert_eq!(
            encode_cloud_to_device(&read(bag).unwrap(), &id("d")),
            "%24.exp=2030-01-31T12%3A00%3A00.1230000Z&%24.ctime=2030-01-31T12%3A00%3A00.0000000Z"
        );
        let odd = read("$.exp=soon&$.ctime=&$.mid=1").unwrap();
        assert_eq!(encode_cloud_to_device(&odd, &id("d")), "%24.mid=1");
    }

    #[test]
    fn a_property_without_a_name_is_left_out() {
        let mut message = read("a=1").unwrap();
        message.properties.push(Property {
            key: String::new(),
            value: Some("x".to_owned()),
        });
        assert_eq!(encode_cloud_to_device(&message, &id("d")), "a=1");
    }

    #[test]
    fn the_example_of_the_specification_is_written() {
        let mut message = read("temp=21&$.ct=application/json&$.ce=utf-8&$.on=out").unwrap();
        // What the message says of its sender is not what counts.
        message
            .system
            .set(SystemProperty::ConnectionDeviceId, "other");
        let bag = "temp=21&%24.ct=application%2Fjson&%24.ce=utf-8&%24.cdid=edge1&%24.cmid=sensor";
        assert_eq!(encode_input(&message, &id("edge1/sensor")), bag);
        assert!(!encode_upstream(&message).contains("cdid"));
    }

    #[test]
    fn no_client_writes_the_stamp_of_a_sender() {
        let message = read("$.cdid=other&$.cmid=m&a=1").unwrap();
        assert_eq!(encode_cloud_to_device(&message, &id("d")), "a=1");
        assert_eq!(encode_input(&message, &id("leaf1")), "a=1&%24.cdid=leaf1");
    }

    #[test]
    fn a_reported_change_is_stamped_with_who_reported() {
        let hub = id("edge1/$edgeHub");
        let mut message = Message::default();
        message
            .system
            .set(SystemProperty::ReportedSenderDeviceId, "leaf1");
        assert_eq!(encode_input(&message, &hub), "%24.cdid=leaf1");
        message
            .system
            .set(SystemProperty::ReportedSenderModuleId, "m");
        assert_eq!(encode_input(&message, &hub), "%24.cdid=leaf1&%24.cmid=m");
    }

    #[test]
    fn many_repeated_keys_cost_linear_time() {
        let bag: Vec<String> = (0..10_000).map(|i| format!("k{}={i}", i % 100)).collect();
        let message = read(&bag.join("&")).unwrap();
        assert_eq!(message.properties.len(), 100);
        assert_eq!(message.properties[0].value.as_deref(), Some("9900"));
        assert_eq!(message.properties[99].value.as_deref(), Some("9999"));
        let many: Vec<String> = (0..=PROPERTIES_MAX).map(|i| format!("k{i}=")).collect();
        assert_eq!(read(&many.join("&")), Err(BagError::TooMany));
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![any::<String>(), "[$.a-z%&=+?/ ä😀]{0,10}"]
    }

    fn message() -> impl Strategy<Value = Message> {
        let value = proptest::option::of(text());
        let properties = proptest::collection::btree_map(text(), value, 0..24);
        let system = proptest::collection::vec((0..SystemProperty::ALL.len(), text()), 0..6);
        (properties, system).prop_map(|(properties, system)| Message {
            properties: properties
                .into_iter()
                // What a client could not have sent as an application property.
                .filter(|(key, _)| !key.is_empty() && SystemProperty::from_mqtt_key(key).is_none())
                .map(|(key, value)| Property { key, value })
                .collect(),
            system: system
                .into_iter()
                .map(|(i, v)| (SystemProperty::ALL[i], v))
                .collect(),
            ..Message::default()
        })
    }

    proptest! {
        #[test]
        fn what_goes_upstream_is_read_there(mut message in message()) {
            let again = read(&encode_upstream(&message)).unwrap();
            for property in &mut message.properties {
                property.value.get_or_insert_default();
            }
            message.system = message
                .system
                .iter()
                .filter(|(p, _)| p.forwarded_upstream() && *p != SystemProperty::InterfaceId)
                .map(|(p, v)| (p, v.to_owned()))
                .collect();
            prop_assert_eq!(again, message);
        }

        #[test]
        fn what_is_delivered_is_read_there(mut message in message(), sender in "[a-z]{1,5}(/[a-z$]{1,5})?") {
            let sender = id(&sender);
            let input = read(&encode_input(&message, &sender)).unwrap();
            let cloud = read(&encode_cloud_to_device(&message, &sender)).unwrap();
            for property in &mut message.properties {
                property.value.get_or_insert_default();
            }
            let stamps = ["$.cdid", "$.cmid"];
            message.properties.retain(|p| !stamps.contains(&p.key.as_str()));
            prop_assert_eq!(&cloud.properties, &message.properties);
            let (sent, stamped) = input.properties.split_at(message.properties.len());
            prop_assert_eq!(sent, message.properties);
            let stamped: Vec<_> = stamped.iter().map(|p| (p.key.as_str(), p.value.as_deref())).collect();
            let reported = message.system.get(SystemProperty::ReportedSenderDeviceId);
            let expected = match reported {
                Some(device) => (device, message.system.get(SystemProperty::ReportedSenderModuleId)),
                None => (sender.device_id(), sender.module_id()),
            };
            let mut expected_stamps = vec![("$.cdid", Some(expected.0))];
            expected_stamps.extend(expected.1.map(|module| ("$.cmid", Some(module))));
            prop_assert_eq!(stamped, expected_stamps);
            for (property, value) in message.system.iter() {
                let is_time = matches!(property, SystemProperty::ExpiryTime | SystemProperty::CreationTime);
                let value = match is_time {
                    true => Timestamp::parse(value).map(|time| time.to_string()),
                    false => Some(value.to_owned()),
                };
                let expected = value.filter(|_| property.mqtt_in() && property.mqtt_out());
                prop_assert_eq!(input.system.get(property), expected.as_deref());
                if property != SystemProperty::To {
                    prop_assert_eq!(cloud.system.get(property), expected.as_deref());
                }
            }
        }

        #[test]
        fn a_component_survives(text in text()) {
            let mut encoded = String::new();
            encode_component(&text, &mut encoded);
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-._~%".contains(c);
            prop_assert!(encoded.chars().all(allowed));
            prop_assert_eq!(decode_component(&encoded).unwrap(), text);
        }

        #[test]
        fn of_one_key_the_last_value_wins(keys in proptest::collection::vec(0..12u8, 0..40)) {
            let pairs: Vec<String> =
                keys.iter().enumerate().map(|(i, k)| format!("k{k}={i}")).collect();
            let mut expected: Vec<(u8, usize)> = Vec::new();
            for (index, key) in keys.iter().enumerate() {
                expected.retain(|(other, _)| other != key);
                expected.push((*key, index));
            }
            let expected: Vec<_> =
                expected.iter().map(|(k, i)| some(&format!("k{k}"), &i.to_string())).collect();
            prop_assert_eq!(properties(&pairs.join("&")), expected);
        }
    }
}
