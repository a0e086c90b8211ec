//! The MQTT topics of IoT Hub (spec/mqtt.md section 3).
//!
//! Topics are matched exactly, segment by segment: the reference's template matching is
//! anchored at the end only and takes empty ids; neither is needed by any client
//! (spec/mqtt.md 4.3). Ids stand in a topic as they are, not percent-encoded.

use crate::identity::Identity;

/// What the topic of a client's PUBLISH asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishTopic<'a> {
    /// `devices/{d}[/modules/{m}]/messages/events[/{bag}][/]`.
    Telemetry {
        /// The device that the topic names.
        device_id: &'a str,
        /// The module that the topic names.
        module_id: Option<&'a str>,
        /// The property bag, as it stands, without one trailing `/`; may be empty, may contain
        /// `/`. [`bag::decode_into`](crate::bag::decode_into) reads it.
        bag: &'a str,
    },
    /// `$iothub/twin/GET/?$rid={rid}`.
    TwinGet {
        /// What follows `?`.
        query: &'a str,
    },
    /// `$iothub/twin/PATCH/properties/reported/?$rid={rid}[&$version={v}]`.
    TwinPatch {
        /// What follows `?`.
        query: &'a str,
    },
    /// `$iothub/methods/res/{status}/?$rid={rid}`.
    MethodResponse {
        /// The status level, unparsed.
        status: &'a str,
        /// What follows `?`.
        query: &'a str,
    },
    /// Nothing that this hub takes.
    Unknown,
}

/// Classifies the topic of a PUBLISH.
#[must_use]
pub fn parse_publish(topic: &str) -> PublishTopic<'_> {
    if let Some(rest) = topic.strip_prefix("devices/") {
        return telemetry_parts(rest).unwrap_or(PublishTopic::Unknown);
    }
    let Some(rest) = topic.strip_prefix("$iothub/") else {
        return PublishTopic::Unknown;
    };
    if let Some(query) = rest.strip_prefix("twin/GET/?") {
        return PublishTopic::TwinGet { query };
    }
    if let Some(query) = rest.strip_prefix("twin/PATCH/properties/reported/?") {
        return PublishTopic::TwinPatch { query };
    }
    match rest
        .strip_prefix("methods/res/")
        .and_then(|rest| rest.split_once("/?"))
    {
        Some((status, query)) if !status.contains('/') => {
            PublishTopic::MethodResponse { status, query }
        }
        _ => PublishTopic::Unknown,
    }
}

fn telemetry_parts(rest: &str) -> Option<PublishTopic<'_>> {
    let (device_id, rest) = rest.split_once('/')?;
    let (module_id, rest) = match rest.strip_prefix("modules/") {
        Some(rest) => {
            let (module_id, rest) = rest.split_once('/')?;
            (Some(module_id), rest)
        }
        None => (None, rest),
    };
    let tail = rest.strip_prefix("messages/events")?;
    let bag = match tail.strip_prefix('/') {
        Some(bag) => bag,
        None if tail.is_empty() => "",
        None => return None,
    };
    let bag = bag.strip_suffix('/').unwrap_or(bag);
    if device_id.is_empty() || module_id.is_some_and(str::is_empty) {
        return None;
    }
    Some(PublishTopic::Telemetry {
        device_id,
        module_id,
        bag,
    })
}

/// The topic of telemetry of `identity`, for sending upstream.
#[must_use]
pub fn telemetry(identity: &Identity, bag: &str) -> String {
    let device = identity.device_id();
    match identity.module_id() {
        Some(module) => format!("devices/{device}/modules/{module}/messages/events/{bag}"),
        None => format!("devices/{device}/messages/events/{bag}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(topic: &str) -> Option<(&str, Option<&str>, &str)> {
        match parse_publish(topic) {
            PublishTopic::Telemetry {
                device_id,
                module_id,
                bag,
            } => Some((device_id, module_id, bag)),
            _ => None,
        }
    }

    #[test]
    fn telemetry_topics_of_all_sdks_parse() {
        for (topic, expected) in [
            ("devices/d/messages/events", ("d", None, "")),
            ("devices/d/messages/events/", ("d", None, "")),
            ("devices/d/messages/events/a=b", ("d", None, "a=b")),
            ("devices/d/messages/events/a=b/", ("d", None, "a=b")),
            ("devices/d/messages/events/?a=b", ("d", None, "?a=b")),
            (
                "devices/d/messages/events/$.ct=application/json",
                ("d", None, "$.ct=application/json"),
            ),
            (
                "devices/d/modules/m/messages/events/%24.on=o/",
                ("d", Some("m"), "%24.on=o"),
            ),
        ] {
            assert_eq!(parts(topic), Some(expected), "{topic}");
        }
    }

    #[test]
    fn a_prefix_of_an_id_is_another_id() {
        let edge1 = Identity::parse("edge1").unwrap();
        let names = |topic, identity: &Identity| {
            parts(topic).is_some_and(|(device, module, _)| {
                device == identity.device_id() && module == identity.module_id()
            })
        };
        assert!(names("devices/edge1/messages/events/", &edge1));
        assert!(!names("devices/edge10/messages/events/", &edge1));
        assert!(!names("devices/edge/messages/events/", &edge1));
        assert!(!names("devices/edge1/modules/m/messages/events/", &edge1));
        let module = Identity::parse("edge1/mod1").unwrap();
        assert!(names(
            "devices/edge1/modules/mod1/messages/events/",
            &module
        ));
        assert!(!names(
            "devices/edge1/modules/mod10/messages/events/",
            &module
        ));
        assert!(!names(
            "devices/edge10/modules/mod1/messages/events/",
            &module
        ));
        assert!(!names(
            "devices/edge1%2Fmodules%2Fmod1/messages/events/",
            &module
        ));
    }

    #[test]
    fn other_topics_are_no_telemetry() {
        for topic in [
            "",
            "devices",
            "devices/d",
            "devices//messages/events/",
            "devices/d/modules//messages/events/",
            "devices/d/modules/m/x/messages/events/",
            "devices/d/messages/eventsX",
            "foo/devices/d/messages/events/",
            "/devices/d/messages/events/",
            "Devices/d/messages/events/",
            "devices/d/messages/devicebound/",
            "$iothub/twin/get/?$rid=1",
            "$iothub/methods/POST/x/?$rid=1",
            "$iothub/methods/res/200/x/?$rid=1",
            "$iothub/methods/res/200",
            "$iothub/twin/GET/x/?$rid=1",
            "$SYS/broker",
        ] {
            assert_eq!(parse_publish(topic), PublishTopic::Unknown, "{topic}");
        }
    }

    #[test]
    fn requests_keep_their_query() {
        let query = "$rid=7";
        assert_eq!(
            parse_publish("$iothub/twin/GET/?$rid=7"),
            PublishTopic::TwinGet { query }
        );
        assert_eq!(
            parse_publish("$iothub/twin/PATCH/properties/reported/?$rid=7"),
            PublishTopic::TwinPatch { query }
        );
        assert_eq!(
            parse_publish("$iothub/methods/res/200/?$rid=7"),
            PublishTopic::MethodResponse {
                status: "200",
                query
            }
        );
    }

    proptest! {
        #[test]
        fn a_telemetry_topic_survives(
            id in "[A-Za-z0-9$._-]{1,12}(/[A-Za-z0-9$._-]{1,12})?",
            bag in "([a-z]{1,4}=[a-z%0-9]{0,6}(&[a-z]{1,4}=[a-z]{0,6}){0,3})?",
        ) {
            let identity = Identity::parse(&id).unwrap();
            let topic = telemetry(&identity, &bag);
            prop_assert_eq!(
                parts(&topic),
                Some((identity.device_id(), identity.module_id(), bag.as_str()))
            );
        }
    }
}
