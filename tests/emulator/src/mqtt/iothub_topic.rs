//! The `$iothub` topics that clients publish to: twin requests and method answers
//! (spec/upstream.md B4).

/// A request on a `$iothub` topic.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum IotHubTopic<'a> {
    TwinGet {
        rid: &'a str,
    },
    /// Without a rid there is no answer.
    TwinPatch {
        rid: Option<&'a str>,
        /// The version that the reported properties have to have.
        version: Option<u64>,
    },
    MethodAnswer {
        status: i32,
        rid: &'a str,
    },
}

impl<'a> IotHubTopic<'a> {
    /// Matches the whole topic, letter by letter; none for everything that is not documented.
    pub(crate) fn parse(topic: &'a str) -> Option<Self> {
        if topic.contains(['+', '#']) {
            return None;
        }
        if let Some(parameters) = topic.strip_prefix("$iothub/twin/GET/?") {
            let Parameters {
                rid: Some(rid),
                version: None,
            } = Parameters::parse(parameters)?
            else {
                return None;
            };
            return Some(Self::TwinGet { rid });
        }
        if let Some(parameters) = topic.strip_prefix("$iothub/twin/PATCH/properties/reported/?") {
            let Parameters { rid, version } = Parameters::parse(parameters)?;
            return Some(Self::TwinPatch { rid, version });
        }
        let rest = topic.strip_prefix("$iothub/methods/res/")?;
        let (status, parameters) = rest.split_once("/?")?;
        let digits = status.strip_prefix('-').unwrap_or(status);
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let Parameters {
            rid: Some(rid),
            version: None,
        } = Parameters::parse(parameters)?
        else {
            return None;
        };
        let status = status.parse().ok()?;
        Some(Self::MethodAnswer { status, rid })
    }
}

/// `$rid=…` and `$version=…`, each at most once, in any order.
struct Parameters<'a> {
    rid: Option<&'a str>,
    version: Option<u64>,
}

impl<'a> Parameters<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (mut rid, mut version) = (None, None);
        for parameter in text.split('&') {
            match parameter.split_once('=')? {
                ("$rid", value) if rid.is_none() && !value.is_empty() && !value.contains('/') => {
                    rid = Some(value);
                }
                ("$version", value) if version.is_none() => version = Some(value.parse().ok()?),
                _ => return None,
            }
        }
        Some(Self { rid, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documented_topics_are_read() {
        let patch = |rid, version| IotHubTopic::TwinPatch { rid, version };
        for (topic, wanted) in [
            (
                "$iothub/twin/GET/?$rid=1",
                IotHubTopic::TwinGet { rid: "1" },
            ),
            (
                "$iothub/twin/PATCH/properties/reported/?$rid=a-b%2F",
                patch(Some("a-b%2F"), None),
            ),
            (
                "$iothub/twin/PATCH/properties/reported/?$rid=1&$version=7",
                patch(Some("1"), Some(7)),
            ),
            (
                "$iothub/twin/PATCH/properties/reported/?$version=7",
                patch(None, Some(7)),
            ),
            (
                "$iothub/methods/res/200/?$rid=1",
                IotHubTopic::MethodAnswer {
                    status: 200,
                    rid: "1",
                },
            ),
            (
                "$iothub/methods/res/-1/?$rid=x",
                IotHubTopic::MethodAnswer {
                    status: -1,
                    rid: "x",
                },
            ),
        ] {
            assert_eq!(IotHubTopic::parse(topic), Some(wanted), "{topic}");
        }
    }

    #[test]
    fn everything_else_is_not() {
        for topic in [
            "$iothub",
            "$iothub/twin/GET/",
            "$iothub/twin/GET/?",
            "$iothub/twin/GET/?$rid=",
            "$iothub/twin/GET/?rid=1",
            "$iothub/twin/GET/?$rid=1/",
            "$iothub/twin/GET/?$rid=1&$rid=2",
            "$iothub/twin/GET/?$rid=1&$version=1",
            "$iothub/twin/GET/?$rid=1&x=y",
            "$iothub/twin/GET/x/?$rid=1",
            "$iothub/twin/GET?$rid=1",
            "$iothub/twin/get/?$rid=1",
            "$iothub/twin/GET/?$rid=+",
            "$iothub/twin/res/200/?$rid=1",
            "$iothub/twin/PATCH/properties/reported/",
            "$iothub/twin/PATCH/properties/reported/?",
            "$iothub/twin/PATCH/properties/reported/x/?$rid=1",
            "$iothub/twin/PATCH/properties/reported/?$rid=1&$version=x",
            "$iothub/twin/PATCH/properties/desired/?$rid=1",
            "$iothub/methods/POST/reboot/?$rid=1",
            "$iothub/methods/res/200/",
            "$iothub/methods/res//?$rid=1",
            "$iothub/methods/res/ok/?$rid=1",
            "$iothub/methods/res/+1/?$rid=1",
            "$iothub/methods/res/99999999999/?$rid=1",
            "$iothub/methods/res/200/x/?$rid=1",
        ] {
            assert_eq!(IotHubTopic::parse(topic), None, "{topic}");
        }
    }
}
