//! Where a link goes: a path, alone or in a URL (spec/upstream.md B5, B8). Ids are decoded once,
//! everything else is compared without case.

use percent_encoding::percent_decode_str;

use crate::identity::Identity;

/// What a link is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Cbs,
    Device(Identity, Node),
    Service(ServiceNode),
}

/// What a device or module has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    DeviceBound,
    Events,
    Methods,
    Twin,
}

/// What a service has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ServiceNode {
    DeviceBound,
    /// A partition of the events, under the name of the path's event hub.
    Events {
        partition: String,
    },
    Feedback,
    FileNotifications,
    Management,
}

impl Address {
    /// Reads an address of the hub whose event hub is `entity`; none for what it does not have.
    pub(super) fn parse(text: &str, entity: &str) -> Option<Self> {
        let path = path_of(text)?;
        let parts: Vec<&str> = path.split('/').collect();
        let lower: Vec<String> = parts.iter().map(|part| part.to_ascii_lowercase()).collect();
        let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
        let service = match *lower.as_slice() {
            ["$cbs"] => return Some(Self::Cbs),
            ["messages", "devicebound"] => ServiceNode::DeviceBound,
            ["messages", "servicebound", "feedback"] => ServiceNode::Feedback,
            ["messages", "servicebound", "filenotifications"] => ServiceNode::FileNotifications,
            ["$management"] | ["messages", "events", "$management"] => ServiceNode::Management,
            [
                "messages",
                "events",
                "consumergroups",
                _,
                "partitions",
                partition,
            ] => ServiceNode::Events {
                partition: partition.to_owned(),
            },
            [name, "$management"] if name.eq_ignore_ascii_case(entity) => ServiceNode::Management,
            [name, "consumergroups", _, "partitions", partition]
                if name.eq_ignore_ascii_case(entity) =>
            {
                ServiceNode::Events {
                    partition: partition.to_owned(),
                }
            }
            ["devices", ..] => return Self::device(&parts, &lower),
            _ => return None,
        };
        Some(Self::Service(service))
    }

    fn device(parts: &[&str], lower: &[&str]) -> Option<Self> {
        let (module, node) = match lower.get(2..)? {
            ["modules", _, node @ ..] => (Some(*parts.get(3)?), node),
            node => (None, node),
        };
        let node = match node {
            ["messages", "events"] => Node::Events,
            ["messages", "devicebound"] => Node::DeviceBound,
            ["methods", "devicebound"] => Node::Methods,
            ["twin"] => Node::Twin,
            _ => return None,
        };
        Some(Self::Device(identity(parts.get(1)?, module)?, node))
    }
}

/// The identity of a device's or module's resource `{host}/devices/{d}[/modules/{m}]`, with encoded
/// ids; Node encodes the whole once more.
pub(super) fn resource(text: &str) -> Option<Identity> {
    let decoded = percent_decode_str(text).decode_utf8().ok()?;
    let text = if text.contains('/') { text } else { &decoded };
    let (_, path) = text.split_once('/')?;
    match *path.split('/').collect::<Vec<_>>().as_slice() {
        ["devices", device] => identity(device, None),
        ["devices", device, "modules", module] => identity(device, Some(module)),
        _ => None,
    }
}

/// The device that a service's message is for: `/devices/{d}/messages/devicebound`.
pub(super) fn device_of(to: &str) -> Option<String> {
    match Address::parse(to, "")? {
        Address::Device(
            Identity {
                device,
                module: None,
            },
            Node::DeviceBound,
        ) => Some(device),
        _ => None,
    }
}

/// The path's segments, decoded, as tokens name them.
pub(super) fn segments(text: &str) -> Vec<String> {
    let path = path_of(text).unwrap_or_default();
    let decode = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    path.split('/').map(decode).collect()
}

/// Without scheme, host and the slashes before it.
fn path_of(text: &str) -> Option<&str> {
    let path = match text.split_once("://") {
        Some((_, rest)) => rest.split_once('/')?.1,
        None => text,
    };
    let path = path.trim_start_matches('/');
    (!path.is_empty()).then_some(path)
}

fn identity(device: &str, module: Option<&str>) -> Option<Identity> {
    let decode = |id: &str| {
        percent_decode_str(id)
            .decode_utf8()
            .map(Into::<String>::into)
    };
    let device = decode(device).ok()?;
    let module = module.map(decode).transpose().ok()?;
    Identity::new(&device, module.as_deref()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Address> {
        Address::parse(text, "hub-events")
    }

    #[test]
    fn addresses_of_all_sdks_are_read() {
        let leaf = || Identity::parse("a=b").unwrap();
        let module = || Identity::parse("edge1/$edgeHub").unwrap();
        for text in [
            "/devices/a%3Db/messages/devicebound",
            "devices/a=b/messages/deviceBound",
            "amqps://gw/devices/a%3db/messages/deviceBound",
            "amqps://gw:5671/Devices/a=b/Messages/DEVICEBOUND",
            "amqps://gw:5671//devices/a=b/messages/devicebound",
        ] {
            let wanted = Address::Device(leaf(), Node::DeviceBound);
            assert_eq!(parse(text), Some(wanted), "{text}");
        }
        for (text, node) in [
            (
                "/devices/edge1/modules/%24edgeHub/messages/events",
                Node::Events,
            ),
            (
                "/devices/edge1/modules/$edgeHub/methods/deviceBound",
                Node::Methods,
            ),
            ("/devices/edge1/modules/$edgeHub/twin", Node::Twin),
        ] {
            assert_eq!(parse(text), Some(Address::Device(module(), node)));
        }
        for (text, node) in [
            ("/messages/deviceBound", ServiceNode::DeviceBound),
            ("/messages/serviceBound/feedback", ServiceNode::Feedback),
            (
                "/messages/serviceBound/filenotifications",
                ServiceNode::FileNotifications,
            ),
            ("$management", ServiceNode::Management),
            ("hub-events/$management", ServiceNode::Management),
        ] {
            assert_eq!(parse(text), Some(Address::Service(node)), "{text}");
        }
        for text in [
            "hub-events/ConsumerGroups/$Default/Partitions/0",
            "messages/events/ConsumerGroups/cg/Partitions/0",
        ] {
            let partition = "0".to_owned();
            let wanted = Address::Service(ServiceNode::Events { partition });
            assert_eq!(parse(text), Some(wanted), "{text}");
        }
        assert_eq!(parse("$cbs"), Some(Address::Cbs));
        for text in [
            "h/devices/edge1/modules/%24edgeHub",
            "h/devices/edge1/modules/$edgeHub",
            "h%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
            "h%2fdevices%2fedge1%2fmodules%2f%24edgeHub",
        ] {
            assert_eq!(resource(text), Some(module()), "{text}");
        }
        assert_eq!(
            device_of("/devices/a%3Db/messages/devicebound").unwrap(),
            "a=b"
        );
    }

    #[test]
    fn other_addresses_are_unknown() {
        for text in [
            "",
            "/",
            "amqps://gw",
            "/devices/d",
            "/devices/d/messages",
            "/devices/d/messages/events/x",
            "/devices/d/inputs",
            "/devices/a%2Fb/messages/events",
            "/devices//messages/events",
            "/devices/../messages/events",
            "/devices/d/modules/m/inputs",
            "x/devices/d/twin",
            "other/$management",
            "other/ConsumerGroups/$Default/Partitions/0",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(device_of("/devices/d/modules/m/messages/devicebound"), None);
        assert_eq!(resource("h/devices/d/x"), None);
    }
}
