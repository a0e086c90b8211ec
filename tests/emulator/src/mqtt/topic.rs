//! The topics that clients may name (spec/upstream.md B4).

use crate::identity::Identity;

/// What a client publishes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PublishTopic<'a> {
    /// Twins and methods, which come later.
    Later,
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
        if ["$iothub/twin/", "$iothub/methods/"]
            .iter()
            .any(|prefix| topic.starts_with(prefix))
        {
            return Self::Later;
        }
        Self::telemetry(topic).unwrap_or(Self::Unknown)
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

/// Whether the hub has something to send for this filter to this identity.
pub(crate) fn is_known_filter(filter: &str, identity: &Identity) -> bool {
    let for_all = [
        "$iothub/methods/POST/#",
        "$iothub/twin/PATCH/properties/desired/#",
        "$iothub/twin/res/#",
    ];
    if for_all.contains(&filter) {
        return true;
    }
    let own = filter
        .strip_prefix("devices/")
        .and_then(|rest| rest.strip_prefix(&identity.device));
    match (own, &identity.module) {
        (Some(rest), None) => rest == "/messages/devicebound/#",
        (Some(rest), Some(module)) => {
            let rest = rest
                .strip_prefix("/modules/")
                .and_then(|rest| rest.strip_prefix(module));
            rest.is_some_and(|rest| rest == "/#" || rest == "/inputs/#")
        }
        (None, _) => false,
    }
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
            ("$iothub/twin/GET/?$rid=1", PublishTopic::Later),
            ("$iothub/methods/res/200/?$rid=1", PublishTopic::Later),
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
            "$iothub",
        ] {
            assert_eq!(PublishTopic::parse(topic), PublishTopic::Unknown, "{topic}");
        }
    }

    #[test]
    fn filters_are_known_for_the_own_identity() {
        let leaf = Identity::parse("leaf1").unwrap();
        let module = Identity::parse("edge1/modA").unwrap();
        for filter in [
            "$iothub/methods/POST/#",
            "$iothub/twin/PATCH/properties/desired/#",
            "$iothub/twin/res/#",
        ] {
            assert!(is_known_filter(filter, &leaf) && is_known_filter(filter, &module));
        }
        assert!(is_known_filter(
            "devices/leaf1/messages/devicebound/#",
            &leaf
        ));
        assert!(is_known_filter("devices/edge1/modules/modA/#", &module));
        assert!(is_known_filter(
            "devices/edge1/modules/modA/inputs/#",
            &module
        ));
        for filter in [
            "#",
            "devices/leaf10/messages/devicebound/#",
            "devices/leaf2/messages/devicebound/#",
            "devices/leaf1/#",
            "devices/edge1/modules/modA/#",
        ] {
            assert!(!is_known_filter(filter, &leaf), "{filter}");
        }
        assert!(!is_known_filter("devices/edge1/modules/modAB/#", &module));
        assert!(!is_known_filter(
            "devices/edge1/messages/devicebound/#",
            &module
        ));
    }
}
