//! Addresses of AMQP links (spec/amqp.md 2.3).
//!
//! Clients write the same node in many forms: with or without a slash in front, as an URL of a host
//! that is not looked at, with two slashes behind it, in any letter case, with ids that are
//! percent-encoded. All of them are read; one form is written.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::identity::Identity;

/// Longest address that is looked at, bytes: two ids of 128 characters of up to 12 bytes each, and
/// a host, fit.
pub const ADDRESS_BYTES_MAX: usize = 4_096;

/// Characters of ids that stand in an address as they are.
const ID: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The node of requests with tokens.
pub const CBS: &str = "$cbs";

/// What a link is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AmqpAddress {
    /// Requests with tokens, and their answers.
    Cbs,
    /// A node of an identity.
    Node {
        /// Whose.
        identity: Identity,
        /// Which.
        node: Node,
    },
}

/// The nodes that an identity has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    /// `messages/events`: telemetry of a client, and for modules as a source their inputs.
    Events,
    /// `messages/deviceBound`: cloud-to-device messages.
    DeviceBound,
    /// `methods/deviceBound`: direct methods and their answers.
    Methods,
    /// `twin`: twin requests, their answers, and desired properties.
    Twin,
}

impl Node {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Events, Self::DeviceBound, Self::Methods, Self::Twin];

    /// Its path below the identity's.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Events => "messages/events",
            Self::DeviceBound => "messages/deviceBound",
            Self::Methods => "methods/deviceBound",
            Self::Twin => "twin",
        }
    }
}

impl AmqpAddress {
    /// Reads an address; none when it is another one. The whole of it counts: an address that only
    /// ends like a known one is not it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > ADDRESS_BYTES_MAX {
            return None;
        }
        let path = match text.split_once("://") {
            Some((scheme, rest)) => {
                if !scheme.eq_ignore_ascii_case("amqps") && !scheme.eq_ignore_ascii_case("amqp") {
                    return None;
                }
                rest.split_once('/')?.1
            }
            None => text,
        };
        // At most one slash of the address itself, and one more behind a host.
        let path = path.strip_prefix('/').unwrap_or(path);
        if path.eq_ignore_ascii_case(CBS) {
            return Some(Self::Cbs);
        }
        let mut levels = path.split('/');
        let mut level = |name: &str| {
            levels
                .next()
                .filter(|found| found.eq_ignore_ascii_case(name))
        };
        level("devices")?;
        let device = decode(levels.next()?)?;
        let rest: Vec<&str> = levels.collect();
        let (module, node) = match &rest[..] {
            [modules, module, node @ ..] if modules.eq_ignore_ascii_case("modules") => {
                (Some(decode(module)?), node)
            }
            node => (None, node),
        };
        let node = Node::ALL.into_iter().find(|known| {
            let mut path = known.path().split('/');
            node.iter().all(|found| {
                path.next()
                    .is_some_and(|name| found.eq_ignore_ascii_case(name))
            }) && path.next().is_none()
        })?;
        let identity = match module {
            Some(module) => Identity::module(&device, &module).ok()?,
            None => Identity::device(&device).ok()?,
        };
        Some(Self::Node { identity, node })
    }

    /// The address of a node of an identity.
    #[must_use]
    pub fn node(identity: &Identity, node: Node) -> Self {
        Self::Node {
            identity: identity.clone(),
            node,
        }
    }
}

/// `/devices/{d}[/modules/{m}]`, with the ids percent-encoded: what the addresses of its nodes begin
/// with.
#[must_use]
pub fn identity_path(identity: &Identity) -> String {
    let encode = |id| utf8_percent_encode(id, ID);
    let device = encode(identity.device_id());
    match identity.module_id() {
        Some(module) => format!("/devices/{device}/modules/{}", encode(module)),
        None => format!("/devices/{device}"),
    }
}

/// The identity that a user name of SASL PLAIN means: `<device>[/modules/<module>]@[sas.]<hub>`
/// (spec/amqp.md 1.4). The hub is not looked at: its token names it too.
#[must_use]
pub fn sasl_identity(authcid: &str) -> Option<Identity> {
    let (id, _) = authcid.rsplit_once('@')?;
    match id.split_once('/') {
        None => Identity::device(&decode(id)?).ok(),
        Some((device, rest)) => {
            let (modules, module) = rest.split_once('/')?;
            if !modules.eq_ignore_ascii_case("modules") {
                return None;
            }
            Identity::module(&decode(device)?, &decode(module)?).ok()
        }
    }
}

impl fmt::Display for AmqpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cbs => f.write_str(CBS),
            Self::Node { identity, node } => {
                write!(f, "{}/{}", identity_path(identity), node.path())
            }
        }
    }
}

/// An id, decoded once.
fn decode(id: &str) -> Option<String> {
    let decoded = percent_decode_str(id).decode_utf8().ok()?;
    Some(decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(identity: &str, node: Node) -> Option<AmqpAddress> {
        let identity = Identity::parse(identity).unwrap();
        Some(AmqpAddress::Node { identity, node })
    }

    #[test]
    fn every_form_that_clients_write_is_read() {
        for (text, identity, wanted) in [
            ("/devices/leaf1/messages/events", "leaf1", Node::Events),
            ("devices/leaf1/messages/events", "leaf1", Node::Events),
            (
                "amqps://gw:5671/devices/leaf1/messages/deviceBound",
                "leaf1",
                Node::DeviceBound,
            ),
            (
                "amqps://gw//devices/leaf1/messages/devicebound",
                "leaf1",
                Node::DeviceBound,
            ),
            (
                "AMQPS://GW/Devices/leaf1/Methods/DEVICEBOUND",
                "leaf1",
                Node::Methods,
            ),
            (
                "/devices/e1/modules/modA/messages/events",
                "e1/modA",
                Node::Events,
            ),
            (
                "/devices/e1/modules/%24edgeHub/twin",
                "e1/$edgeHub",
                Node::Twin,
            ),
            ("/devices/a%3Ab%2525/twin", "a:b%25", Node::Twin),
            ("/devices/a=b/twin", "a=b", Node::Twin),
        ] {
            assert_eq!(AmqpAddress::parse(text), node(identity, wanted), "{text}");
        }
        for text in ["$cbs", "/$cbs", "amqps://gw:5671/$cbs", "$CBS"] {
            assert_eq!(AmqpAddress::parse(text), Some(AmqpAddress::Cbs), "{text}");
        }
    }

    #[test]
    fn anything_else_is_none() {
        for text in [
            "",
            "/",
            "$cbs/x",
            "/devices/leaf1",
            "/devices//twin",
            "/devices/leaf1/twin/",
            "/x/devices/leaf1/twin",
            "///devices/leaf1/twin",
            "/devices/leaf1/modules/twin",
            "/devices/leaf1/modules//twin",
            "/devices/leaf1/modules/m/inputs/i",
            "/devices/leaf1/messages",
            "/devices/leaf1/messages/events/x",
            "https://gw/devices/leaf1/twin",
            "amqps://gw",
            "/devices/a%ff/twin",
            "/devices/a%2Fb/twin",
            // IoT Hub has no such ids (spec/upstream.md B6).
            "/devices/a%2Bb/twin",
            "/devices/a+b/twin",
        ] {
            assert_eq!(AmqpAddress::parse(text), None, "{text}");
        }
        assert_eq!(AmqpAddress::parse(&"x".repeat(ADDRESS_BYTES_MAX + 1)), None);
    }

    #[test]
    fn user_names_of_sasl_name_an_identity() {
        for (text, identity) in [
            ("leaf1@sas.contoso-hub", Some("leaf1")),
            ("leaf1@contoso-hub", Some("leaf1")),
            ("leaf1/modules/cam@sas.contoso-hub", Some("leaf1/cam")),
            ("e1/MODULES/%24edgeHub@h", Some("e1/$edgeHub")),
            ("leaf1", None),
            ("@sas.h", None),
            ("leaf1/x/cam@h", None),
            ("leaf1/modules@h", None),
        ] {
            let found = sasl_identity(text);
            assert_eq!(found.as_ref().map(Identity::as_str), identity, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            device in "[A-Za-z0-9:.%_*?!(),=@$'-]{1,20}",
            module in proptest::option::of("[A-Za-z0-9:.%_*?!(),=@$'-]{1,20}"),
            which in 0usize..4,
        ) {
            let identity = match &module {
                Some(module) => Identity::module(&device, module),
                None => Identity::device(&device),
            };
            prop_assume!(identity.is_ok());
            let address = AmqpAddress::node(&identity.unwrap(), Node::ALL[which]);
            prop_assert_eq!(AmqpAddress::parse(&address.to_string()), Some(address.clone()));
            let url = format!("amqps://gw:5671{address}");
            prop_assert_eq!(AmqpAddress::parse(&url), Some(address));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,80}") {
            let _ = AmqpAddress::parse(&text);
        }
    }
}
