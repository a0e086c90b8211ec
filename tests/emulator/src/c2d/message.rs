//! A cloud-to-device message and its form on MQTT (spec/upstream.md B4).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::queue::Outcome;
use crate::clock::utc_text;
use crate::limits::{C2D_BYTES_MAX, TOPIC_BYTES_MAX};

/// Everything but the unreserved characters of RFC 3986.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Why a message can not be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("a property has no name, or one that starts with `$`")]
    Property,
    #[error("body and properties have {0} bytes, {C2D_BYTES_MAX} are the most")]
    Size(usize),
    #[error("the properties make a topic that is too long for MQTT")]
    Topic,
}

/// What the service side sends to a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Message {
    pub(crate) message_id: String,
    pub(crate) correlation_id: Option<String>,
    pub(crate) user_id: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) content_encoding: Option<String>,
    /// `iothub-ack`: `none`, `positive`, `negative` or `full`.
    pub(crate) ack: Option<String>,
    /// The sender's own expiry, milliseconds since 1970.
    pub(crate) expiry_ms: Option<u64>,
    pub(crate) properties: Vec<(String, String)>,
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub(crate) body: Vec<u8>,
}

impl Message {
    /// Checks names and sizes, also that of the topic which `device` will see.
    pub(crate) fn check(&self, device: &str) -> Result<(), MessageError> {
        let is_bad = |(name, _): &(String, String)| name.is_empty() || name.starts_with('$');
        if self.properties.iter().any(is_bad) {
            return Err(MessageError::Property);
        }
        let properties = self.pairs(device);
        let size: usize = properties
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum::<usize>()
            + self.body.len();
        if size > C2D_BYTES_MAX {
            return Err(MessageError::Size(size));
        }
        if self.topic(device).len() > TOPIC_BYTES_MAX {
            return Err(MessageError::Topic);
        }
        Ok(())
    }

    /// Whether the sender wants to hear of this outcome (`iothub-ack`).
    pub(crate) fn wants_feedback(&self, outcome: Outcome) -> bool {
        match self.ack.as_deref() {
            Some("full") => true,
            Some("positive") => outcome == Outcome::Completed,
            Some("negative") => outcome != Outcome::Completed,
            _ => false,
        }
    }

    /// Topic with property bag. The bag is never empty: the C# and Node SDKs need a fifth level.
    pub(crate) fn topic(&self, device: &str) -> String {
        let encode = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
        let bag: Vec<String> = self
            .pairs(device)
            .iter()
            .map(|(name, value)| format!("{}={}", encode(name), encode(value)))
            .collect();
        format!("devices/{device}/messages/devicebound/{}", bag.join("&"))
    }

    fn pairs(&self, device: &str) -> Vec<(&str, String)> {
        // C# reads times with seven decimals only.
        let expiry = self.expiry_ms.map(|ms| utc_text(ms).replace('Z', "0000Z"));
        let system = [
            ("$.mid", Some(self.message_id.clone())),
            ("$.cid", self.correlation_id.clone()),
            ("$.uid", self.user_id.clone()),
            (
                "$.to",
                Some(format!("/devices/{device}/messages/devicebound")),
            ),
            ("$.exp", expiry),
            ("$.ct", self.content_type.clone()),
            ("$.ce", self.content_encoding.clone()),
            ("iothub-ack", self.ack.clone()),
        ];
        let system = system
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)));
        let own = self
            .properties
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone()));
        system.chain(own).collect()
    }
}

fn to_base64<S: Serializer>(body: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(body))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::c2d) fn message(id: &str) -> Message {
        Message {
            message_id: id.to_owned(),
            correlation_id: None,
            user_id: None,
            content_type: None,
            content_encoding: None,
            ack: None,
            expiry_ms: None,
            properties: Vec::new(),
            body: b"x".to_vec(),
        }
    }

    #[test]
    fn the_bag_has_system_properties_first() {
        let plain = "devices/leaf1/messages/devicebound/\
            %24.mid=m1&%24.to=%2Fdevices%2Fleaf1%2Fmessages%2Fdevicebound";
        assert_eq!(message("m1").topic("leaf1"), plain);
        let full = Message {
            correlation_id: Some("c".to_owned()),
            user_id: Some("u".to_owned()),
            content_type: Some("a/b".to_owned()),
            content_encoding: Some("utf-8".to_owned()),
            ack: Some("full".to_owned()),
            expiry_ms: Some(1_767_225_600_000),
            properties: vec![
                ("cmd".to_owned(), "go & stop".to_owned()),
                ("e".to_owned(), String::new()),
            ],
            ..message("m1")
        };
        assert_eq!(
            full.topic("leaf1"),
            "devices/leaf1/messages/devicebound/%24.mid=m1&%24.cid=c&%24.uid=u\
             &%24.to=%2Fdevices%2Fleaf1%2Fmessages%2Fdevicebound\
             &%24.exp=2026-01-01T00%3A00%3A00.0000000Z&%24.ct=a%2Fb&%24.ce=utf-8\
             &iothub-ack=full&cmd=go%20%26%20stop&e="
        );
        let text = serde_json::to_string(&full).unwrap();
        assert_eq!(serde_json::from_str::<Message>(&text).unwrap(), full);
    }

    #[test]
    fn sizes_and_names_are_checked() {
        let mut fits = message("m1");
        let properties = "$.mid".len() + 2 + "$.to".len() + "/devices/d/messages/devicebound".len();
        fits.body = vec![0; C2D_BYTES_MAX - properties];
        assert_eq!(fits.check("d"), Ok(()));
        fits.body.push(0);
        assert_eq!(fits.check("d"), Err(MessageError::Size(C2D_BYTES_MAX + 1)));
        for name in ["", "$.mid"] {
            let mut bad = message("m1");
            bad.properties.push((name.to_owned(), "x".to_owned()));
            assert_eq!(bad.check("d"), Err(MessageError::Property));
        }
        let mut long = message("m1");
        long.properties.push(("a".to_owned(), "&".repeat(30_000)));
        assert_eq!(long.check("d"), Err(MessageError::Topic));
    }
}
