//! What a filter is for: the classes of topics that the hub publishes to, seen from one client
//! (spec/mqtt.md 3.3).
//!
//! A filter that can match a topic of a class switches the class's feature on. One that can match
//! none is refused: it names another identity, or a topic that does not exist here. Other kinds
//! of topics would be further classes.

use edgehub_proto::identity::Identity;

use crate::hub::Features;

/// What the filters of a client switch on.
pub(super) fn features<'a>(
    identity: &Identity,
    filters: impl Iterator<Item = &'a str>,
) -> Features {
    let mut features = Features::default();
    for filter in filters {
        let on = one(identity, filter);
        features.desired |= on.desired;
        features.methods |= on.methods;
        features.cloud_to_device |= on.cloud_to_device;
        features.twin_responses |= on.twin_responses;
        features.inputs |= on.inputs;
    }
    features
}

/// Whether the filter can match any topic that the hub publishes to for this client.
pub(super) fn is_of_use(identity: &Identity, filter: &str) -> bool {
    one(identity, filter) != Features::default()
}

fn one(identity: &Identity, filter: &str) -> Features {
    use Level::{Is, NonEmpty, Starts};
    let device = identity.device_id();
    let can_match = |class: &[Level<'_>]| can_match(filter, class);
    let (cloud_to_device, inputs) = match identity.module_id() {
        None => (
            can_match(&[
                Is("devices"),
                Is(device),
                Is("messages"),
                Is("devicebound"),
                NonEmpty,
            ]),
            false,
        ),
        Some(module) => (
            false,
            can_match(&[
                Is("devices"),
                Is(device),
                Is("modules"),
                Is(module),
                Is("inputs"),
                NonEmpty,
                NonEmpty,
            ]),
        ),
    };
    let twin = |rest: &[Level<'_>]| {
        let mut class = vec![Is("$iothub"), Is("twin")];
        class.extend_from_slice(rest);
        can_match(&class)
    };
    Features {
        desired: twin(&[
            Is("PATCH"),
            Is("properties"),
            Is("desired"),
            Starts("?$version="),
        ]),
        methods: can_match(&[
            Is("$iothub"),
            Is("methods"),
            Is("POST"),
            NonEmpty,
            Starts("?$rid="),
        ]),
        cloud_to_device,
        twin_responses: twin(&[Is("res"), NonEmpty, Starts("?$rid=")]),
        inputs,
    }
}

/// A level of a class of topics.
#[derive(Clone, Copy, Debug)]
enum Level<'a> {
    /// This text.
    Is(&'a str),
    /// Any text but the empty one.
    NonEmpty,
    /// Any text that begins so.
    Starts(&'static str),
}

impl Level<'_> {
    fn admits(self, text: &str) -> bool {
        match self {
            Self::Is(level) => level == text,
            Self::NonEmpty => !text.is_empty(),
            Self::Starts(prefix) => text.starts_with(prefix),
        }
    }
}

/// Whether a well-formed filter matches some topic of the class; wildcards as in
/// [`filters::matches`](super::filters::matches).
fn can_match(filter: &str, class: &[Level<'_>]) -> bool {
    let hidden = matches!(class.first(), Some(Level::Is(first)) if first.starts_with('$'));
    if hidden && filter.starts_with(['#', '+']) {
        return false;
    }
    let mut filter = filter.split('/');
    let mut class = class.iter();
    loop {
        match (filter.next(), class.next()) {
            (Some("#"), _) => return true,
            (Some("+"), Some(_)) => {}
            (Some(text), Some(level)) if level.admits(text) => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::topic;
    use proptest::prelude::*;

    use super::super::filters::matches;
    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    /// The names of the features that are on.
    fn on(identity: &str, filters: &[&str]) -> Vec<&'static str> {
        let features = features(&id(identity), filters.iter().copied());
        let Features {
            desired,
            methods,
            cloud_to_device,
            twin_responses,
            inputs,
        } = features;
        [
            (desired, "desired"),
            (methods, "methods"),
            (cloud_to_device, "c2d"),
            (twin_responses, "twin"),
            (inputs, "inputs"),
        ]
        .into_iter()
        .filter_map(|(on, name)| on.then_some(name))
        .collect()
    }

    #[test]
    fn the_filters_of_all_sdks_switch_their_feature_on() {
        for (identity, filter, feature) in [
            ("d", "$iothub/methods/POST/#", "methods"),
            ("d", "$iothub/twin/PATCH/properties/desired/#", "desired"),
            ("d", "$iothub/twin/res/#", "twin"),
            ("d", "devices/d/messages/devicebound/#", "c2d"),
            ("d/m", "$iothub/methods/POST/#", "methods"),
            ("d/m", "$iothub/twin/PATCH/properties/desired/#", "desired"),
            ("d/m", "$iothub/twin/res/#", "twin"),
            ("d/m", "devices/d/modules/m/#", "inputs"),
            ("d/m", "devices/d/modules/m/inputs/#", "inputs"),
            ("d/m", "devices/d/modules/m/inputs/in1/#", "inputs"),
            ("d/m", "devices/d/modules/m/inputs/in1/+", "inputs"),
        ] {
            assert_eq!(on(identity, &[filter]), [feature], "{filter}");
        }
    }

    #[test]
    fn wildcards_switch_on_what_they_match() {
        assert_eq!(on("d", &["#"]), ["c2d"]);
        assert_eq!(on("d", &["+/+/#"]), ["c2d"]);
        assert_eq!(on("d/m", &["devices/#"]), ["inputs"]);
        assert_eq!(on("d", &["$iothub/#"]), ["desired", "methods", "twin"]);
        assert_eq!(on("d", &["$iothub/twin/#"]), ["desired", "twin"]);
        assert_eq!(on("d", &["$iothub/+/POST/reboot/#"]), ["methods"]);
        assert_eq!(on("d", &["$iothub/twin/res/+/?$rid=1"]), ["twin"]);
        assert!(on("d", &[]).is_empty());
        let both = ["$iothub/twin/res/#", "devices/d/messages/devicebound/#"];
        assert_eq!(on("d", &both), ["c2d", "twin"]);
    }

    #[test]
    fn what_can_never_match_is_of_no_use() {
        for (identity, filter) in [
            // Another identity, or one that begins alike.
            ("d", "devices/d2/messages/devicebound/#"),
            ("d", "devices/d/modules/m/#"),
            ("edge1", "devices/edge10/messages/devicebound/#"),
            ("edge10", "devices/edge1/messages/devicebound/#"),
            ("d/m", "devices/d/modules/m2/#"),
            ("d/m", "devices/d/modules/m2/inputs/in1/#"),
            ("d/m", "devices/d/messages/devicebound/#"),
            ("d/m", "devices/d2/modules/m/#"),
            // Topics that clients publish to, that do not exist, or too few or many levels.
            ("d", "devices/d/messages/events/#"),
            ("d", "$iothub/methods/res/#"),
            ("d", "$iothub/methods/POST"),
            ("d", "$iothub/methods/POST/+"),
            ("d", "$iothub/twin/GET/#"),
            ("d", "$iothub/twin/res/200/x"),
            ("d", "$iothub/twin/PATCH/properties/reported/#"),
            ("d", "$iothub/Twin/res/#"),
            ("d", "$SYS/#"),
            ("d", "$internal/#"),
            ("d", "+"),
            ("d", "/#"),
            ("d", "+/twin/res/#"),
            ("d", "foo/bar"),
            ("d/m", "devices/d/modules/m/inputs//+"),
            ("d/m", "devices/d/modules/m/outputs/#"),
        ] {
            assert!(!is_of_use(&id(identity), filter), "{identity} {filter}");
        }
    }

    fn filter() -> impl Strategy<Value = String> {
        let level = prop_oneof![
            4 => Just("+"),
            4 => Just("devices"),
            4 => Just("$iothub"),
            2 => Just("d"),
            2 => Just("m"),
            2 => Just("modules"),
            2 => Just("messages"),
            2 => Just("devicebound"),
            2 => Just("inputs"),
            2 => Just("twin"),
            2 => Just("methods"),
            1 => Just("POST"),
            1 => Just("res"),
            1 => Just("200"),
            1 => Just("in1"),
            1 => Just(""),
        ];
        let levels = proptest::collection::vec(level, 0..7);
        (levels, any::<bool>())
            .prop_map(|(mut levels, hash)| {
                if hash || levels.is_empty() {
                    levels.push("#");
                }
                levels.join("/")
            })
            .prop_filter("a filter is not empty", |filter| !filter.is_empty())
    }

    proptest! {
        /// No feature is off while a topic of its class would be matched.
        #[test]
        fn whatever_matches_a_topic_has_its_feature_on(filter in filter(), is_module in any::<bool>()) {
            let identity = id(if is_module { "d/m" } else { "d" });
            let features = features(&identity, std::iter::once(filter.as_str()));
            let hits = |topic: &str| matches(&filter, topic);
            if hits(&topic::twin_response(200, "1", None)) {
                prop_assert!(features.twin_responses);
            }
            if hits(&topic::desired(3)) {
                prop_assert!(features.desired);
            }
            if hits(&topic::method_request("in1", "1")) {
                prop_assert!(features.methods);
            }
            if is_module && hits(&topic::input(&identity, "in1", "a=").unwrap()) {
                prop_assert!(features.inputs);
            }
            if !is_module && hits(&topic::cloud_to_device(&identity, "a=")) {
                prop_assert!(features.cloud_to_device);
            }
            prop_assert!(!(is_module && features.cloud_to_device));
            prop_assert!(is_module || !features.inputs);
        }
    }
}
