//! The connection string of the development form: who this hub is and the key it signs with.

use std::fmt;

use edgehub_proto::identity::{EDGE_HUB_MODULE, Identity};

/// `HostName=…;DeviceId=…;ModuleId=$edgeHub;SharedAccessKey=…`, parsed.
///
/// A `GatewayHostName` inside it is ignored, as in the reference: only the environment decides
/// what is upstream (spec/upstream.md A1).
#[derive(Clone)]
pub struct ConnectionString {
    /// IoT Hub's host name.
    pub host: String,
    /// `{device}/$edgeHub`.
    pub identity: Identity,
    key: String,
}

/// What is wrong with a connection string. Never contains any part of it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionStringError {
    /// A required part is absent or blank.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The ids are not ids.
    #[error("DeviceId is not a valid id")]
    DeviceId,
    /// Some other module's string.
    #[error("ModuleId must be $edgeHub")]
    NotEdgeHub,
}

impl ConnectionString {
    /// Parses the text; names are case-insensitive, order is free, a value may contain `=`.
    ///
    /// # Errors
    /// Names the part that is missing or wrong.
    pub fn parse(text: &str) -> Result<Self, ConnectionStringError> {
        let part = |name: &'static str| {
            text.split(';')
                .filter_map(|pair| pair.split_once('='))
                .find(|(key, _)| key.trim().eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim())
                .filter(|value| !value.is_empty())
                .ok_or(ConnectionStringError::Missing(name))
        };
        let host = part("HostName")?.to_owned();
        let device = part("DeviceId")?;
        if part("ModuleId")? != EDGE_HUB_MODULE {
            return Err(ConnectionStringError::NotEdgeHub);
        }
        let identity = Identity::edge_hub(device).map_err(|_| ConnectionStringError::DeviceId)?;
        Ok(Self {
            host,
            identity,
            key: part("SharedAccessKey")?.to_owned(),
        })
    }

    /// The base64 text of the key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Debug for ConnectionString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionString")
            .field("host", &self.host)
            .field("identity", &self.identity)
            .field("key", &"***")
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_in_any_order_and_case() {
        let parsed = ConnectionString::parse(
            "sharedaccesskey=c2VjcmV0LWtleQ==;ModuleId=$edgeHub;deviceid=edge1;HostName=h.x",
        )
        .unwrap();
        assert_eq!(parsed.host, "h.x");
        assert_eq!(parsed.identity.as_str(), "edge1/$edgeHub");
        assert_eq!(parsed.key(), "c2VjcmV0LWtleQ==");
        assert!(!format!("{parsed:?}").contains("c2VjcmV0"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = ConnectionString::parse("HostName=h;ModuleId=$edgeHub").unwrap_err();
        assert_eq!(error, ConnectionStringError::Missing("DeviceId"));
        let other = "HostName=h;DeviceId=d;ModuleId=m;SharedAccessKey=k";
        let error = ConnectionString::parse(other).unwrap_err();
        assert_eq!(error, ConnectionStringError::NotEdgeHub);
    }
}
