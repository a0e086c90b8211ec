//! Wills: telemetry that a client leaves behind for the case that it vanishes
//! (spec/mqtt.md 2.6).
//!
//! A will is judged twice: at CONNECT, so that a client hears at once that it may not publish
//! there, and again when it is published, on the same way as every message of that client.

use edgehub_proto::identity::Identity;
use edgehub_proto::topic::{PublishTopic, parse_publish};

/// What marks a will: IoT Hub's key, and that of the C# edgeHub.
const MARKS: &str = "MessageType=Will&iothub-MessageType=Will";

/// Whether the identity may have its will published to the topic: to its own telemetry only. A
/// publish to an unknown topic is acknowledged and dropped, but nobody would learn of a will that
/// is dropped.
pub(super) fn is_allowed(identity: &Identity, topic: &str) -> bool {
    match parse_publish(topic) {
        PublishTopic::Telemetry {
            device_id,
            module_id,
            ..
        } => device_id == identity.device_id() && module_id == identity.module_id(),
        _ => false,
    }
}

/// The property bag of a will: what the client wrote, with the marks behind, where they win.
pub(super) fn marked(bag: &str) -> String {
    if bag.is_empty() {
        MARKS.to_owned()
    } else {
        format!("{bag}&{MARKS}")
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::bag;
    use edgehub_proto::message::Message;

    use super::*;

    #[test]
    fn a_will_goes_to_ones_own_telemetry_only() {
        let device = Identity::parse("d1").unwrap();
        let module = Identity::parse("d1/m").unwrap();
        for topic in [
            "devices/d1/messages/events/",
            "devices/d1/messages/events/a=1/",
        ] {
            assert!(is_allowed(&device, topic) && !is_allowed(&module, topic));
        }
        let topic = "devices/d1/modules/m/messages/events/%24.on=out";
        assert!(is_allowed(&module, topic) && !is_allowed(&device, topic));
        for topic in [
            "devices/d2/messages/events/",
            "devices/d10/messages/events/",
            "devices/d1/messages/devicebound/",
            "$iothub/twin/PATCH/properties/reported/?$rid=1",
            "$iothub/twin/GET/?$rid=1",
            "$iothub/methods/res/200/?$rid=1",
            "$internal/x",
            "$CONTROL/x",
            "foo/bar",
        ] {
            assert!(!is_allowed(&device, topic), "{topic}");
        }
    }

    #[test]
    fn the_marks_win_over_what_the_client_wrote() {
        for (bag, others) in [("", 0), ("a=1", 1), ("?MessageType=x&b", 1), ("a=1&", 1)] {
            let mut message = Message::default();
            bag::decode_into(&marked(bag), &mut message).unwrap();
            let value = |key: &str| {
                let mut found = message.properties.iter().filter(|p| p.key == key);
                let value = found.next().and_then(|p| p.value.clone());
                assert!(found.next().is_none());
                value
            };
            assert_eq!(value("MessageType").as_deref(), Some("Will"), "{bag}");
            assert_eq!(
                value("iothub-MessageType").as_deref(),
                Some("Will"),
                "{bag}"
            );
            assert_eq!(message.properties.len(), 2 + others, "{bag}");
        }
    }
}
