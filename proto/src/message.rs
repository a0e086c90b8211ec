//! A message: body, application properties and system properties (spec/core.md section 1).
//!
//! The sender is not part of it: it stands beside, bound to the connection (design.md D4).

use bytes::Bytes;

/// Largest message: body and the lengths of keys and values (spec/core.md 1.4), bytes.
pub const MAX_MESSAGE_BYTES: usize = 262_144;

/// One application property. Key lookup ignores case; an absent value is not an empty one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    /// Its name.
    pub key: String,
    /// Its value, if any.
    pub value: Option<String>,
}

/// A message as it is routed and stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The body.
    pub body: Bytes,
    /// Application properties, in the sender's order.
    pub properties: Vec<Property>,
    /// System properties.
    pub system: SystemProperties,
}

impl Message {
    /// Its size as [`MAX_MESSAGE_BYTES`] counts it: bytes of the body, UTF-16 units of all keys
    /// and values, system properties by their internal names (spec/core.md 1.4).
    #[must_use]
    pub fn size(&self) -> usize {
        let properties: usize = self
            .properties
            .iter()
            .map(|p| units(&p.key) + p.value.as_deref().map_or(0, units))
            .sum();
        let system: usize = self
            .system
            .iter()
            .map(|(property, value)| property.name().len() + units(value))
            .sum();
        self.body.len() + properties + system
    }
}

/// Length in UTF-16 units, which for ASCII is the length.
fn units(text: &str) -> usize {
    if text.is_ascii() {
        text.len()
    } else {
        text.encode_utf16().count()
    }
}

macro_rules! system_properties {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $key:expr, $in:literal, $out:literal, $up:literal;)*) => {
        /// The system properties of spec/core.md 1.2 and spec/mqtt.md 4.1.
        ///
        /// Numbers are part of the stored format: they are added, never changed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum SystemProperty {
            $($(#[$doc])* $variant,)*
        }

        impl SystemProperty {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The internal name, as conditions of routes write it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The number in stored records.
            #[must_use]
            pub fn number(self) -> u32 {
                match self { $(Self::$variant => $number,)* }
            }

            /// The property of a stored number.
            #[must_use]
            pub fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }

            /// The key in an MQTT property bag, if it has one.
            #[must_use]
            pub fn mqtt_key(self) -> Option<&'static str> {
                match self { $(Self::$variant => $key,)* }
            }

            /// Whether it is recognised on a PUBLISH of a client.
            #[must_use]
            pub fn mqtt_in(self) -> bool {
                match self { $(Self::$variant => $in,)* }
            }

            /// Whether it is written on a delivery over MQTT.
            #[must_use]
            pub fn mqtt_out(self) -> bool {
                match self { $(Self::$variant => $out,)* }
            }

            /// Whether it goes upstream.
            #[must_use]
            pub fn forwarded_upstream(self) -> bool {
                match self { $(Self::$variant => $up,)* }
            }
        }
    };
}

system_properties! {
    /// `messageId`.
    MessageId = 1, "messageId", Some("$.mid"), true, true, true;
    /// `cid`, the message's correlation id.
    CorrelationId = 2, "cid", Some("$.cid"), true, true, true;
    /// `userId`.
    UserId = 3, "userId", Some("$.uid"), true, true, true;
    /// `to`.
    To = 4, "to", Some("$.to"), true, true, true;
    /// `absolute-expiry-time`, ISO 8601.
    ExpiryTime = 5, "absolute-expiry-time", Some("$.exp"), true, true, false;
    /// `ack`.
    Ack = 6, "ack", Some("ack"), true, true, false;
    /// `contentType`.
    ContentType = 7, "contentType", Some("$.ct"), true, true, true;
    /// `contentEncoding`.
    ContentEncoding = 8, "contentEncoding", Some("$.ce"), true, true, true;
    /// `messageSchema`.
    MessageSchema = 9, "messageSchema", Some("$.schema"), true, true, true;
    /// `creationTime`, ISO 8601.
    CreationTime = 10, "creationTime", Some("$.ctime"), true, true, true;
    /// `operation`.
    Operation = 11, "operation", Some("iothub-operation"), true, true, false;
    /// `outputName`, consumed by routing.
    OutputName = 12, "outputName", Some("$.on"), true, false, false;
    /// `inputName`, a topic level over MQTT.
    InputName = 13, "inputName", None, false, false, false;
    /// `connectionDeviceId`.
    ConnectionDeviceId = 14, "connectionDeviceId", Some("$.cdid"), false, true, false;
    /// `connectionModuleId`.
    ConnectionModuleId = 15, "connectionModuleId", Some("$.cmid"), false, true, false;
    /// `rpSenderDeviceId`.
    ReportedSenderDeviceId = 16, "rpSenderDeviceId", None, false, false, false;
    /// `rpSenderModuleId`.
    ReportedSenderModuleId = 17, "rpSenderModuleId", None, false, false, false;
    /// `iothub-interface-id`; upstream only when it marks a security message.
    InterfaceId = 18, "iothub-interface-id", Some("$.ifid"), true, false, true;
    /// `dt-subject`, the component.
    Subject = 19, "dt-subject", Some("$.sub"), true, true, true;
    /// `enqueuedTime`, ISO 8601.
    EnqueuedTime = 20, "enqueuedTime", None, false, false, false;
    /// `lockToken`.
    LockToken = 21, "lockToken", None, false, false, false;
    /// `deliveryCount`.
    DeliveryCount = 22, "deliveryCount", None, false, false, false;
    /// `sequenceNumber`.
    SequenceNumber = 23, "sequenceNumber", None, false, false, false;
    /// `modelId`, set by the hub from the connection.
    ModelId = 24, "modelId", None, false, false, false;
    /// `edgeMessageId`.
    EdgeMessageId = 25, "edgeMessageId", None, false, false, false;
    /// `edgeHubOriginInterface`.
    OriginInterface = 26, "edgeHubOriginInterface", None, false, false, false;
    /// `messageType`.
    MessageType = 27, "messageType", None, false, false, false;
    /// `statusCode`.
    StatusCode = 28, "statusCode", None, false, false, false;
    /// `correlationId`, of requests, not of messages.
    RequestCorrelationId = 29, "correlationId", None, false, false, false;
    /// `version`.
    Version = 30, "version", None, false, false, false;
    /// `outBoundURI`.
    OutboundUri = 31, "outBoundURI", None, false, false, false;
    /// `connectionDeviceGenerationId`; the name exists, nothing sets it.
    ConnectionGenerationId = 32, "connectionDeviceGenerationId", None, false, false, false;
    /// `connectionAuthMethod`; the name exists, nothing sets it.
    ConnectionAuthMethod = 33, "connectionAuthMethod", None, false, false, false;
}

/// The only interface id that goes upstream (spec/core.md 1.2).
pub const SECURITY_INTERFACE: &str = "urn:azureiot:Security:SecurityAgent:1";

impl SystemProperty {
    /// The property that a client's bag key names, if the hub takes it from clients.
    #[must_use]
    pub fn from_mqtt_key(key: &str) -> Option<Self> {
        // All but two keys begin with `$.`: most application keys are decided here.
        if !key.starts_with("$.") && key != "ack" && key != "iothub-operation" {
            return None;
        }
        Self::ALL
            .iter()
            .copied()
            .find(|p| p.mqtt_in() && p.mqtt_key() == Some(key))
    }

    /// The property of an internal name, in any case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|p| p.name().eq_ignore_ascii_case(name))
    }
}

/// A message's system properties: few, so a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemProperties(Vec<(SystemProperty, String)>);

impl SystemProperties {
    /// The value of a property.
    #[must_use]
    pub fn get(&self, property: SystemProperty) -> Option<&str> {
        self.0
            .iter()
            .find(|(p, _)| *p == property)
            .map(|(_, value)| value.as_str())
    }

    /// Sets a property; a value that was there is replaced.
    pub fn set(&mut self, property: SystemProperty, value: impl Into<String>) {
        let value = value.into();
        match self.0.iter_mut().find(|(p, _)| *p == property) {
            Some((_, old)) => *old = value,
            None => self.0.push((property, value)),
        }
    }

    /// Removes a property.
    pub fn remove(&mut self, property: SystemProperty) -> Option<String> {
        let index = self.0.iter().position(|(p, _)| *p == property)?;
        Some(self.0.remove(index).1)
    }

    /// All of them, in the order in which they were set.
    pub fn iter(&self) -> impl Iterator<Item = (SystemProperty, &str)> {
        self.0
            .iter()
            .map(|(property, value)| (*property, value.as_str()))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(SystemProperty, String)> for SystemProperties {
    fn from_iter<I: IntoIterator<Item = (SystemProperty, String)>>(properties: I) -> Self {
        let mut all = Self::default();
        for (property, value) in properties {
            all.set(property, value);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_names_and_keys_are_unique_and_lead_back() {
        let mut numbers = HashSet::new();
        let mut keys = HashSet::new();
        for property in SystemProperty::ALL.iter().copied() {
            assert!(numbers.insert(property.number()));
            assert_eq!(
                SystemProperty::from_number(property.number()),
                Some(property)
            );
            assert_eq!(SystemProperty::from_name(property.name()), Some(property));
            if let Some(key) = property.mqtt_key() {
                assert!(keys.insert(key));
                assert_eq!(
                    SystemProperty::from_mqtt_key(key).is_some(),
                    property.mqtt_in()
                );
            }
        }
    }

    #[test]
    fn the_table_is_that_of_the_specification() {
        // spec/mqtt.md 4.1: key, name, in, out; spec/core.md 1.2: forwarded upstream.
        let rows = [
            ("$.mid", "messageId", true, true, true),
            ("$.cid", "cid", true, true, true),
            ("$.uid", "userId", true, true, true),
            ("$.to", "to", true, true, true),
            ("$.exp", "absolute-expiry-time", true, true, false),
            ("$.ct", "contentType", true, true, true),
            ("$.ce", "contentEncoding", true, true, true),
            ("$.ctime", "creationTime", true, true, true),
            ("$.schema", "messageSchema", true, true, true),
            ("$.sub", "dt-subject", true, true, true),
            ("$.ifid", "iothub-interface-id", true, false, true),
            ("$.on", "outputName", true, false, false),
            ("$.cdid", "connectionDeviceId", false, true, false),
            ("$.cmid", "connectionModuleId", false, true, false),
            ("ack", "ack", true, true, false),
            ("iothub-operation", "operation", true, true, false),
        ];
        for (key, name, taken, written, up) in rows {
            let property = SystemProperty::from_name(name).unwrap();
            assert_eq!(property.mqtt_key(), Some(key));
            assert_eq!(property.mqtt_in(), taken, "{key}");
            assert_eq!(property.mqtt_out(), written, "{key}");
            assert_eq!(property.forwarded_upstream(), up, "{key}");
        }
        let with_key = SystemProperty::ALL
            .iter()
            .filter(|p| p.mqtt_key().is_some())
            .count();
        assert_eq!(with_key, rows.len());
        let hidden = SystemProperty::ALL
            .iter()
            .filter(|p| p.mqtt_key().is_none());
        for property in hidden {
            assert!(!property.mqtt_in() && !property.mqtt_out() && !property.forwarded_upstream());
        }
    }

    #[test]
    fn identity_keys_are_never_taken_from_a_client() {
        assert_eq!(SystemProperty::from_mqtt_key("$.cdid"), None);
        assert_eq!(SystemProperty::from_mqtt_key("$.cmid"), None);
        assert_eq!(
            SystemProperty::from_mqtt_key("$.mid"),
            Some(SystemProperty::MessageId)
        );
    }

    #[test]
    fn size_counts_body_keys_and_values() {
        let mut message = Message {
            body: Bytes::from_static(b"12345"),
            ..Message::default()
        };
        message.properties.push(Property {
            key: "ab".into(),
            value: Some("c".into()),
        });
        message.properties.push(Property {
            key: "n".into(),
            value: None,
        });
        message.system.set(SystemProperty::To, "x");
        assert_eq!(message.size(), 5 + 3 + 1 + 2 + 1);
        // As the reference counts: one unit for a letter of two bytes, two for an emoji of four.
        message.properties.push(Property {
            key: "ä".into(),
            value: Some("😀".into()),
        });
        assert_eq!(message.size(), 12 + 1 + 2);
    }

    #[test]
    fn setting_replaces() {
        let mut system = SystemProperties::default();
        system.set(SystemProperty::To, "a");
        system.set(SystemProperty::To, "b");
        assert_eq!(system.get(SystemProperty::To), Some("b"));
        assert_eq!(system.len(), 1);
        assert_eq!(system.remove(SystemProperty::To).as_deref(), Some("b"));
        assert!(system.is_empty());
    }
}
