//! The topics that clients may publish to, and the filters that MQTT knows (spec/upstream.md B4).

use super::iothub_topic::IotHubTopic;

/// What a client publishes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PublishTopic<'a> {
    /// A twin request or a method's answer.
    IotHub(IotHubTopic<'a>),
    /// A D2C message of this device or module, with the undecoded property bag.
    Telemetry {
        device: &'a str,
        module: Option<&'a str>,
        bag: &'a str,
    },
    Unknown,
}

impl<'a> PublishTopic<'a> {
    /// Matches the whole topic; ids are compared as they stand, nothing is decoded or normalised.
    pub(crate) fn parse(topic: &'a str) -> Self {
        let iothub = IotHubTopic::parse(topic).map(Self::IotHub);
        iothub
            .or_else(|| Self::telemetry(topic))
            .unwrap_or(Self::Unknown)
    }

    fn telemetry(topic: &'a str) -> Option<Self> {
        if topic.contains(['+', '#']) {
            return None;
        }
        let (device, mut rest) = topic.strip_prefix("devices/")?.split_once('/')?;
        let mut module = None;
        if let Some(of_module) = rest.strip_prefix("modules/") {
            let (id, events) = of_module.split_once('/')?;
            (module, rest) = (Some(id), events);
        }
        let bag = match rest.strip_prefix("messages/events")? {
            "" => "",
            bag => bag.strip_prefix('/')?,
        };
        let bag = bag
            .strip_suffix('/')
            .filter(|bag| !bag.is_empty())
            .unwrap_or(bag);
        (!bag.contains('/')).then_some(Self::Telemetry {
            device,
            module,
            bag,
        })
    }
}

/// Whether a filter is one at all (MQTT-4.7.1-1 to -3, MQTT-4.7.3-1): `#` stands alone and last,
/// `+` stands alone.
pub(crate) fn is_filter(filter: &str) -> bool {
    let mut levels = filter.split('/').rev();
    let last = levels.next().unwrap_or_default();
    let fits = |level: &str| level == "+" || !level.contains(['+', '#']);
    !filter.is_empty() && (last == "#" || fits(last)) && levels.all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn telemetry_topics_match_whole() {
        let device = |bag| PublishTopic::Telemetry {
            device: "d",
            module: None,
            bag,
        };
        for (topic, wanted) in [
            ("devices/d/messages/events", device("")),
            ("devices/d/messages/events/", device("")),
            ("devices/d/messages/events/a=1&b", device("a=1&b")),
            ("devices/d/messages/events/a=1/", device("a=1")),
            (
                "devices/d/modules/$edgeHub/messages/events/a=1",
                PublishTopic::Telemetry {
                    device: "d",
                    module: Some("$edgeHub"),
                    bag: "a=1",
                },
            ),
            (
                "$iothub/twin/GET/?$rid=1",
                PublishTopic::IotHub(IotHubTopic::TwinGet { rid: "1" }),
            ),
        ] {
            assert_eq!(PublishTopic::parse(topic), wanted, "{topic}");
        }
        for topic in [
            "",
            "foo",
            "/devices/d/messages/events/",
            "devices/d/messages/eventsx",
            "devices/d/messages/events/a/b",
            "devices/d/messages/events//",
            "devices/d/messages/events/+",
            "devices/x/../d/messages/events/",
            "devices/d/modules/m/../n/messages/events/",
            "devices/d/messages/devicebound/",
            "Devices/d/messages/events/",
            "$iothub/twin/GET/",
        ] {
            assert_eq!(PublishTopic::parse(topic), PublishTopic::Unknown, "{topic}");
        }
    }

    #[test]
    fn wildcards_stand_alone() {
        for good in ["a", "/", "#", "+", "a/#", "+/a/+", "/+/#", "$iothub/x/#"] {
            assert!(is_filter(good), "{good}");
        }
        for bad in ["", "a#", "a/#/b", "#/", "a+", "+a/b", "a/b+/c", "a/#b"] {
            assert!(!is_filter(bad), "{bad}");
        }
    }
}
