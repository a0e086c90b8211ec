//! The MQTT topics of IoT Hub (spec/mqtt.md section 3): those that clients publish to are read,
//! those that the hub publishes to are written.
//!
//! Topics are matched exactly, segment by segment: the reference's template matching is
//! anchored at the end only and takes empty ids; neither is needed by any client
//! (spec/mqtt.md 4.3). Ids stand in a topic as they are, not percent-encoded.

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::bag;
use crate::identity::Identity;
use crate::limits::REQUEST_ID_BYTES_MAX;

/// Everything about twins; a topic below it that is none of the two requests ends the connection
/// (spec/mqtt.md 9.1).
pub const TWIN_PREFIX: &str = "$iothub/twin/";

/// What a method's name may not hold as it is: Node reads the topic as a URL, Python decodes
/// percent escapes, and wildcards are not allowed in topics (spec/mqtt.md 5.4).
const METHOD_NAME: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'%')
    .add(b'?')
    .add(b'#')
    .add(b'+')
    .add(b'/')
    .add(b'\\');

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
        /// `/`. [`bag::decode_into`] reads it.
        bag: &'a str,
    },
    /// `$iothub/twin/GET/?$rid={rid}`.
    TwinGet {
        /// What follows `?`.
        query: &'a str,
    },
    /// `$iothub/twin/PATCH/properties/reported/[?$rid={rid}[&$version={v}]]`.
    TwinPatch {
        /// What follows `?`, if that is there.
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
    match rest.strip_prefix("twin/PATCH/properties/reported/") {
        Some("") => return PublishTopic::TwinPatch { query: "" },
        Some(rest) => {
            return rest
                .strip_prefix('?')
                .map_or(PublishTopic::Unknown, |query| PublishTopic::TwinPatch {
                    query,
                });
        }
        None => {}
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

/// A request's id cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request id is longer than 1,024 bytes or contains a slash")]
pub struct RequestIdError;

/// The value of `$rid` in the query of a request or response, as it stands there; none when it is
/// missing or empty.
///
/// # Errors
/// When it could not be copied into the topic of an answer (spec/mqtt.md 5.1).
pub fn request_id(query: &str) -> Result<Option<&str>, RequestIdError> {
    let id = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("$rid="))
        .filter(|id| !id.is_empty());
    match id {
        Some(id) if id.len() > REQUEST_ID_BYTES_MAX || id.contains('/') => Err(RequestIdError),
        id => Ok(id),
    }
}

/// The topic of the answer to a twin request. The request id stands there byte for byte; nothing
/// follows it but a version that is known.
#[must_use]
pub fn twin_response(status: u16, request_id: &str, version: Option<u64>) -> String {
    match version {
        Some(version) => {
            format!("$iothub/twin/res/{status}/?$rid={request_id}&$version={version}")
        }
        None => format!("$iothub/twin/res/{status}/?$rid={request_id}"),
    }
}

/// The topic of a change of desired properties.
#[must_use]
pub fn desired(version: u64) -> String {
    format!("$iothub/twin/PATCH/properties/desired/?$version={version}")
}

/// The topic of a direct method. Nothing follows the request id: C# takes all that does for a
/// part of it.
#[must_use]
pub fn method_request(name: &str, request_id: &str) -> String {
    let name = utf8_percent_encode(name, METHOD_NAME);
    format!("$iothub/methods/POST/{name}/?$rid={request_id}")
}

/// The topic of a cloud-to-device message.
#[must_use]
pub fn cloud_to_device(device: &Identity, bag: &str) -> String {
    format!("devices/{}/messages/devicebound/{bag}", device.device_id())
}

/// The topic of a message for an input of a module; none when `target` is a device.
#[must_use]
pub fn input(target: &Identity, input: &str, bag: &str) -> Option<String> {
    let (device, module) = (target.device_id(), target.module_id()?);
    let mut topic = format!("devices/{device}/modules/{module}/inputs/");
    topic.reserve(input.len() + 1 + bag.len());
    bag::encode_component(input, &mut topic);
    topic.push('/');
    topic.push_str(bag);
    Some(topic)
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
            "$iothub/twin/PATCH/properties/reported",
            "$iothub/twin/PATCH/properties/reported/x/?$rid=1",
            "$iothub/twin/PATCH/properties/reportedx",
            "$iothub/twin/PATCH/properties/desired/?$rid=1",
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
        for bare in ["", "?"] {
            let topic = format!("$iothub/twin/PATCH/properties/reported/{bare}");
            let query = "";
            assert_eq!(parse_publish(&topic), PublishTopic::TwinPatch { query });
        }
        assert_eq!(
            parse_publish("$iothub/methods/res/200/?$rid=7"),
            PublishTopic::MethodResponse {
                status: "200",
                query
            }
        );
    }

    #[test]
    fn a_request_id_is_taken_as_it_stands() {
        for (query, id) in [
            ("$rid=7", Some("7")),
            ("$rid=7&$version=4", Some("7")),
            ("$version=4&$rid=a%20b=?$", Some("a%20b=?$")),
            ("$rid=", None),
            ("", None),
            ("rid=7", None),
            ("%24rid=7", None),
        ] {
            assert_eq!(request_id(query), Ok(id), "{query}");
        }
        assert_eq!(request_id("$rid=a/b"), Err(RequestIdError));
        let longest = "x".repeat(REQUEST_ID_BYTES_MAX);
        assert_eq!(request_id(&format!("$rid={longest}")), Ok(Some(&*longest)));
        assert_eq!(request_id(&format!("$rid={longest}x")), Err(RequestIdError));
    }

    #[test]
    fn topics_of_the_hub_are_those_of_the_specification() {
        assert_eq!(
            twin_response(200, "7", None),
            "$iothub/twin/res/200/?$rid=7"
        );
        assert_eq!(
            twin_response(204, "a%2F", Some(4)),
            "$iothub/twin/res/204/?$rid=a%2F&$version=4"
        );
        assert_eq!(
            desired(8),
            "$iothub/twin/PATCH/properties/desired/?$version=8"
        );
        assert_eq!(
            method_request("reboot", "0e5c"),
            "$iothub/methods/POST/reboot/?$rid=0e5c"
        );
        assert_eq!(
            method_request("a b%c?d#e+f\\g-ä.(h)", "1"),
            "$iothub/methods/POST/a%20b%25c%3Fd%23e%2Bf%5Cg-%C3%A4.(h)/?$rid=1"
        );
        let device = Identity::parse("d").unwrap();
        assert_eq!(
            cloud_to_device(&device, "cmd=go"),
            "devices/d/messages/devicebound/cmd=go"
        );
        assert_eq!(input(&device, "in", "a=1"), None);
        let module = Identity::parse("edge1/filter").unwrap();
        assert_eq!(
            input(&module, "in1", "%24.cdid=edge1").as_deref(),
            Some("devices/edge1/modules/filter/inputs/in1/%24.cdid=edge1")
        );
        assert_eq!(
            input(&module, "in/+ #", "a=").as_deref(),
            Some("devices/edge1/modules/filter/inputs/in%2F%2B%20%23/a=")
        );
    }

    proptest! {
        #[test]
        fn a_name_never_makes_a_level_or_a_wildcard(name in any::<String>()) {
            let topic = method_request(&name, "1");
            prop_assert_eq!(topic.split('/').count(), 5);
            let module = Identity::parse("d/m").unwrap();
            let input = input(&module, &name, "a=").unwrap();
            prop_assert_eq!(input.split('/').count(), 7);
            for topic in [topic, input] {
                prop_assert!(!topic.contains(['+', '#', '\0']));
                let level = topic.split('/').rev().nth(1).unwrap();
                prop_assert_eq!(bag::decode_component(level).unwrap(), name.as_str());
            }
        }

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
