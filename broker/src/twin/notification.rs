//! The message that tells of reported properties (spec/core.md 1.3).

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{Message, SystemProperty};
use edgehub_proto::timestamp::Timestamp;

const SCHEMA: &str = "twinChangeNotification";

/// The notification of `patch`, reported by `reporter`, of the hub `own`. Content type and
/// encoding, which the reference leaves out, make conditions on the body work
/// (spec/core.md 10 item 3).
pub(super) fn twin_change(
    own: &Identity,
    reporter: &Identity,
    patch: Bytes,
    now_ms: u64,
) -> Message {
    let mut message = Message {
        body: patch,
        ..Message::default()
    };
    let mut set = |property, value: &str| message.system.set(property, value);
    set(SystemProperty::ContentType, "application/json");
    set(SystemProperty::ContentEncoding, "utf-8");
    set(SystemProperty::MessageSchema, SCHEMA);
    set(SystemProperty::MessageType, SCHEMA);
    set(
        SystemProperty::EnqueuedTime,
        &Timestamp::from_unix_ms(now_ms).to_string(),
    );
    set(SystemProperty::ReportedSenderDeviceId, reporter.device_id());
    if let Some(module) = reporter.module_id() {
        set(SystemProperty::ReportedSenderModuleId, module);
    }
    set(SystemProperty::ConnectionDeviceId, own.device_id());
    if let Some(module) = own.module_id() {
        set(SystemProperty::ConnectionModuleId, module);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_says_who_reported_and_goes_as_the_hub() {
        let own = Identity::parse("edge1/$edgeHub").unwrap();
        let patch = Bytes::from_static(br#"{"fw":"1.2"}"#);
        let of = |reporter: &str| {
            let reporter = Identity::parse(reporter).unwrap();
            twin_change(&own, &reporter, patch.clone(), 1_787_306_405_120)
        };
        let message = of("edge1/modA");
        let expected = [
            (SystemProperty::ContentType, "application/json"),
            (SystemProperty::ContentEncoding, "utf-8"),
            (SystemProperty::MessageSchema, "twinChangeNotification"),
            (SystemProperty::MessageType, "twinChangeNotification"),
            (SystemProperty::EnqueuedTime, "2026-08-21T10:00:05.1200000Z"),
            (SystemProperty::ReportedSenderDeviceId, "edge1"),
            (SystemProperty::ReportedSenderModuleId, "modA"),
            (SystemProperty::ConnectionDeviceId, "edge1"),
            (SystemProperty::ConnectionModuleId, "$edgeHub"),
        ];
        let set: Vec<_> = message.system.iter().collect();
        assert_eq!(set, expected);
        assert_eq!(message.body, patch);
        let leaf = of("leaf1");
        let module = leaf.system.get(SystemProperty::ReportedSenderModuleId);
        assert_eq!(module, None);
    }
}
