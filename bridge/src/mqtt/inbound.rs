//! What the topic of a PUBLISH from upstream says (spec/upstream.md B4, spec/mqtt.md 3.3).
//!
//! Read exactly, segment by segment. A topic that is none of these is nothing that this hub asked
//! for, whoever sent it.

use std::borrow::Cow;

use edgehub_proto::{bag, identity::Identity};

/// What a PUBLISH is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Inbound<'a> {
    /// A cloud-to-device message of the session's own device.
    CloudToDevice {
        /// Its property bag, as it stands, without one trailing `/`.
        bag: &'a str,
    },
    /// A change of desired properties.
    Desired,
    /// A direct method.
    Method {
        /// Its name, decoded.
        name: Cow<'a, str>,
        /// Goes into the answer as it is.
        request_id: &'a str,
    },
    /// The answer to a twin request.
    TwinResponse {
        /// None if it is no number of three digits.
        status: Option<u16>,
        /// Of our request.
        request_id: &'a str,
        /// The new version of the reported properties.
        version: Option<u64>,
    },
    /// Nothing that is taken here.
    Unknown,
}

/// Classifies a topic that came over the session of `identity`.
pub(super) fn parse<'a>(topic: &'a str, identity: &Identity) -> Inbound<'a> {
    let parsed = match topic.strip_prefix("$iothub/") {
        Some(rest) => parse_service(rest),
        None => cloud_to_device(topic, identity),
    };
    parsed.unwrap_or(Inbound::Unknown)
}

fn parse_service(rest: &str) -> Option<Inbound<'_>> {
    if let Some(rest) = rest.strip_prefix("twin/res/") {
        let (status, query) = rest.split_once("/?")?;
        let digits = status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit());
        return Some(Inbound::TwinResponse {
            status: status.parse().ok().filter(|_| digits),
            request_id: value_of(query, "$rid")?,
            version: value_of(query, "$version").and_then(|version| version.parse().ok()),
        });
    }
    if let Some(rest) = rest.strip_prefix("twin/PATCH/properties/desired/") {
        // The version stands in the body too.
        return (rest.is_empty() || rest.starts_with('?')).then_some(Inbound::Desired);
    }
    let (name, query) = rest.strip_prefix("methods/POST/")?.split_once("/?")?;
    let request_id = value_of(query, "$rid")?;
    // It becomes part of a topic that we publish to (MQTT-4.7.1-1).
    let is_unusable = request_id.contains(['+', '#', '\0']);
    if name.is_empty() || name.contains('/') || is_unusable {
        return None;
    }
    // A parent encodes what SDKs would misread; IoT Hub's names have nothing to decode.
    let name = bag::decode_component(name).unwrap_or(Cow::Borrowed(name));
    Some(Inbound::Method { name, request_id })
}

fn cloud_to_device<'a>(topic: &'a str, identity: &Identity) -> Option<Inbound<'a>> {
    let (device, rest) = topic.strip_prefix("devices/")?.split_once('/')?;
    if device != identity.device_id() || identity.is_module() {
        return None;
    }
    let tail = rest.strip_prefix("messages/devicebound")?;
    let bag = match tail.strip_prefix('/') {
        Some(bag) => bag.strip_suffix('/').unwrap_or(bag),
        None if tail.is_empty() => "",
        None => return None,
    };
    Some(Inbound::CloudToDevice { bag })
}

/// The value of a key in `a=1&b=2`; none if it is absent or empty.
fn value_of<'a>(query: &'a str, key: &str) -> Option<&'a str> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find_map(|(name, value)| (name == key && !value.is_empty()).then_some(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of<'a>(topic: &'a str, identity: &str) -> Inbound<'a> {
        parse(topic, &Identity::parse(identity).unwrap())
    }

    fn method<'a>(name: &'a str, request_id: &'a str) -> Inbound<'a> {
        Inbound::Method {
            name: name.into(),
            request_id,
        }
    }

    #[test]
    fn methods() {
        for (topic, expected) in [
            ("$iothub/methods/POST/reboot/?$rid=7", method("reboot", "7")),
            (
                "$iothub/methods/POST/a%20b%3F/?$rid=a-b/c",
                method("a b?", "a-b/c"),
            ),
            ("$iothub/methods/POST/x%ff/?$rid=1", method("x%ff", "1")),
            ("$iothub/methods/POST/x/?a=b&$rid=1&c", method("x", "1")),
            ("$iothub/methods/POST/x/?$rid=", Inbound::Unknown),
            ("$iothub/methods/POST/x/?rid=1", Inbound::Unknown),
            ("$iothub/methods/POST/x/y/?$rid=1", Inbound::Unknown),
            ("$iothub/methods/POST//?$rid=1", Inbound::Unknown),
            ("$iothub/methods/POST/x", Inbound::Unknown),
            ("$iothub/methods/POST/x/?$rid=a#", Inbound::Unknown),
            ("$iothub/methods/res/200/?$rid=1", Inbound::Unknown),
        ] {
            assert_eq!(of(topic, "edge1/modA"), expected, "{topic}");
        }
    }

    #[test]
    fn twins() {
        let response = |status, request_id, version| Inbound::TwinResponse {
            status,
            request_id,
            version,
        };
        for (topic, expected) in [
            (
                "$iothub/twin/res/200/?$rid=4",
                response(Some(200), "4", None),
            ),
            (
                "$iothub/twin/res/204/?$rid=4&$version=12",
                response(Some(204), "4", Some(12)),
            ),
            (
                "$iothub/twin/res/204/?$version=x&$rid=4",
                response(Some(204), "4", None),
            ),
            ("$iothub/twin/res/abc/?$rid=4", response(None, "4", None)),
            ("$iothub/twin/res/+20/?$rid=4", response(None, "4", None)),
            ("$iothub/twin/res/200/", Inbound::Unknown),
            ("$iothub/twin/res/200/?$version=1", Inbound::Unknown),
            (
                "$iothub/twin/PATCH/properties/desired/?$version=3",
                Inbound::Desired,
            ),
            ("$iothub/twin/PATCH/properties/desired/", Inbound::Desired),
            (
                "$iothub/twin/PATCH/properties/desired/x?$version=3",
                Inbound::Unknown,
            ),
            (
                "$iothub/twin/PATCH/properties/reported/?$rid=1",
                Inbound::Unknown,
            ),
        ] {
            assert_eq!(of(topic, "leaf1"), expected, "{topic}");
        }
    }

    #[test]
    fn cloud_to_device_messages_are_for_the_sessions_own_device_only() {
        let c2d = |bag| Inbound::CloudToDevice { bag };
        for (topic, identity, expected) in [
            (
                "devices/leaf1/messages/devicebound/a=1",
                "leaf1",
                c2d("a=1"),
            ),
            (
                "devices/leaf1/messages/devicebound/a=1/",
                "leaf1",
                c2d("a=1"),
            ),
            (
                "devices/leaf1/messages/devicebound/$.to=/devices/leaf1",
                "leaf1",
                c2d("$.to=/devices/leaf1"),
            ),
            ("devices/leaf1/messages/devicebound/", "leaf1", c2d("")),
            ("devices/leaf1/messages/devicebound", "leaf1", c2d("")),
            (
                "devices/leaf1/messages/deviceboundX",
                "leaf1",
                Inbound::Unknown,
            ),
            (
                "devices/leaf10/messages/devicebound/",
                "leaf1",
                Inbound::Unknown,
            ),
            ("devices/leaf1/messages/events/", "leaf1", Inbound::Unknown),
            (
                "devices/edge1/messages/devicebound/",
                "edge1/modA",
                Inbound::Unknown,
            ),
            (
                "devices/edge1/modules/modA/inputs/in/",
                "edge1/modA",
                Inbound::Unknown,
            ),
            ("", "leaf1", Inbound::Unknown),
        ] {
            assert_eq!(of(topic, identity), expected, "{topic}");
        }
    }

    proptest! {
        #[test]
        fn no_topic_panics(
            topic in "(\\$iothub/|devices/leaf1/)?(twin/res/|methods/POST/|messages/devicebound)?\\PC{0,30}",
        ) {
            let _ = of(&topic, "leaf1");
        }
    }
}
