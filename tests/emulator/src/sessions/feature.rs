//! What a client can subscribe to (spec/upstream.md B4).

use crate::identity::Identity;

/// What a subscription switches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feature {
    CloudToDevice,
    Desired,
    /// Inputs exist on an edgeHub only: the hub grants the filter and never sends anything.
    Inputs,
    Methods,
    TwinResponses,
}

impl Feature {
    /// The filter of [`Self::Desired`].
    pub(crate) const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";
    /// The filter of [`Self::Methods`].
    pub(crate) const METHODS: &str = "$iothub/methods/POST/#";

    /// The filter of [`Self::CloudToDevice`].
    pub(crate) fn device_bound(identity: &Identity) -> String {
        format!("devices/{}/messages/devicebound/#", identity.device)
    }

    /// The filter of [`Self::Inputs`]; a device has none.
    pub(crate) fn inputs(identity: &Identity) -> Option<String> {
        let module = identity.module.as_ref()?;
        Some(format!(
            "devices/{}/modules/{module}/inputs/#",
            identity.device
        ))
    }

    /// The feature of a filter that this identity may use; none for every other filter. Ids are
    /// compared as they stand.
    pub(crate) fn of(filter: &str, identity: &Identity) -> Option<Self> {
        match filter {
            Self::METHODS => return Some(Self::Methods),
            Self::DESIRED => return Some(Self::Desired),
            "$iothub/twin/res/#" => return Some(Self::TwinResponses),
            _ => {}
        }
        let own = filter
            .strip_prefix("devices/")?
            .strip_prefix(&identity.device)?;
        match &identity.module {
            None => (own == "/messages/devicebound/#").then_some(Self::CloudToDevice),
            Some(module) => {
                let rest = own.strip_prefix("/modules/")?.strip_prefix(module)?;
                (rest == "/#" || rest == "/inputs/#").then_some(Self::Inputs)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_known_for_the_own_identity() {
        let leaf = Identity::parse("leaf1").unwrap();
        let module = Identity::parse("edge1/modA").unwrap();
        for (filter, feature) in [
            ("$iothub/methods/POST/#", Feature::Methods),
            ("$iothub/twin/PATCH/properties/desired/#", Feature::Desired),
            ("$iothub/twin/res/#", Feature::TwinResponses),
        ] {
            assert_eq!(Feature::of(filter, &leaf), Some(feature));
            assert_eq!(Feature::of(filter, &module), Some(feature));
        }
        for (filter, identity, feature) in [
            (
                "devices/leaf1/messages/devicebound/#",
                &leaf,
                Feature::CloudToDevice,
            ),
            ("devices/edge1/modules/modA/#", &module, Feature::Inputs),
            (
                "devices/edge1/modules/modA/inputs/#",
                &module,
                Feature::Inputs,
            ),
        ] {
            assert_eq!(Feature::of(filter, identity), Some(feature));
        }
        for filter in [
            "#",
            "$iothub/#",
            "$iothub/twin/res/+",
            "devices/leaf10/messages/devicebound/#",
            "devices/leaf2/messages/devicebound/#",
            "devices/leaf1/#",
            "devices/edge1/modules/modA/#",
        ] {
            assert_eq!(Feature::of(filter, &leaf), None, "{filter}");
        }
        for filter in [
            "devices/edge1/modules/modAB/#",
            "devices/edge1/messages/devicebound/#",
            "devices/edge1/modules/modA/messages/devicebound/#",
        ] {
            assert_eq!(Feature::of(filter, &module), None, "{filter}");
        }
    }
}
