//! Connection strings as Azure's tools and SDKs write them.

use std::fmt;

use anyhow::{Context as _, Result};

/// The parts that the lab uses, in the order in which they are written.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ConnectionString {
    /// The IoT Hub's host name.
    pub host_name: String,
    /// The device.
    pub device_id: Option<String>,
    /// The module of that device.
    pub module_id: Option<String>,
    /// The policy, in a service connection string.
    pub shared_access_key_name: Option<String>,
    /// Base64.
    pub shared_access_key: String,
    /// The edge device to connect to instead of the IoT Hub.
    pub gateway_host_name: Option<String>,
}

impl ConnectionString {
    /// Parses `Key=value;Key=value`; unknown keys are ignored, as the SDKs do.
    ///
    /// # Errors
    /// When a part has no `=`, or `HostName` or `SharedAccessKey` is missing.
    pub fn parse(text: &str) -> Result<Self> {
        let mut parsed = Self::default();
        for part in text.split(';').filter(|part| !part.trim().is_empty()) {
            let (key, value) = part.split_once('=').context("a part without '='")?;
            let value = value.to_owned();
            match key.trim().to_ascii_lowercase().as_str() {
                "hostname" => parsed.host_name = value,
                "deviceid" => parsed.device_id = Some(value),
                "moduleid" => parsed.module_id = Some(value),
                "sharedaccesskeyname" => parsed.shared_access_key_name = Some(value),
                "sharedaccesskey" => parsed.shared_access_key = value,
                "gatewayhostname" => parsed.gateway_host_name = Some(value),
                _ => {}
            }
        }
        anyhow::ensure!(!parsed.host_name.is_empty(), "HostName is missing");
        anyhow::ensure!(
            !parsed.shared_access_key.is_empty(),
            "SharedAccessKey is missing"
        );
        Ok(parsed)
    }
}

impl fmt::Display for ConnectionString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostName={}", self.host_name)?;
        let optional = [
            ("DeviceId", &self.device_id),
            ("ModuleId", &self.module_id),
            ("SharedAccessKeyName", &self.shared_access_key_name),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                write!(f, ";{key}={value}")?;
            }
        }
        write!(f, ";SharedAccessKey={}", self.shared_access_key)?;
        if let Some(gateway) = &self.gateway_host_name {
            write!(f, ";GatewayHostName={gateway}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ConnectionString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let masked = Self {
            shared_access_key: "***".to_owned(),
            ..self.clone()
        };
        write!(f, "{masked}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "HostName=h;DeviceId=leaf1;SharedAccessKey=a2V5==;GatewayHostName=edge3",
            "HostName=h;DeviceId=edge1;ModuleId=$edgeHub;SharedAccessKey=a2V5",
            "HostName=h;SharedAccessKeyName=iothubowner;SharedAccessKey=a2V5",
        ] {
            assert_eq!(ConnectionString::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_incomplete_is_refused_and_keys_are_not_shown() {
        for text in ["", "HostName=h", "DeviceId=d;SharedAccessKey=k", "HostName"] {
            assert!(ConnectionString::parse(text).is_err(), "{text}");
        }
        let parsed = ConnectionString::parse("HostName=h;SharedAccessKey=c2VjcmV0").unwrap();
        assert!(!format!("{parsed:?}").contains("c2VjcmV0"));
    }
}
