//! The user name of a CONNECT: `{host}/{device}[/{module}]/?api-version=…&…`, or the old form
//! without `?` (spec/mqtt.md 2.2).

use percent_encoding::percent_decode_str;

use crate::identity::{AuthChain, Identity, NameError};

/// Why a user name is malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserNameError {
    #[error("the user name's auth-chain: {0}")]
    Chain(NameError),
    #[error("the user name's identity: {0}")]
    Identity(#[from] NameError),
    #[error("the user name is not host, identity and parameters")]
    Shape,
    #[error("a parameter of the user name is not UTF-8")]
    Text,
}

/// What a client says about itself. Nothing of it is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UserName {
    pub(crate) host: String,
    pub(crate) identity: Identity,
    pub(crate) api_version: Option<String>,
    pub(crate) auth_chain: Option<AuthChain>,
    pub(crate) model_id: Option<String>,
}

impl UserName {
    pub(crate) fn parse(text: &str) -> Result<Self, UserNameError> {
        let segments: Vec<&str> = text.split('/').collect();
        let (host, device, module, parameters) = match *segments.as_slice() {
            [host, device, parameters] => (host, device, None, parameters),
            [host, device, module, parameters] => (host, device, Some(module), parameters),
            _ => return Err(UserNameError::Shape),
        };
        let parameters = match parameters.strip_prefix('?') {
            Some(parameters) => parameters,
            None if parameters.starts_with("api-version=") => parameters,
            None => return Err(UserNameError::Shape),
        };
        let (mut api_version, mut auth_chain, mut model_id) = (None, None, None);
        for parameter in parameters.split('&') {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = percent_decode_str(value)
                .decode_utf8()
                .map_err(|_| UserNameError::Text)?;
            let slot = match name {
                "api-version" => &mut api_version,
                "auth-chain" => &mut auth_chain,
                "model-id" => &mut model_id,
                _ => continue,
            };
            slot.get_or_insert_with(|| value.into_owned());
        }
        let auth_chain = auth_chain.map(|chain| AuthChain::parse(&chain)).transpose();
        Ok(Self {
            host: host.to_owned(),
            identity: Identity::new(device, module)?,
            api_version: api_version.filter(|version| !version.is_empty()),
            auth_chain: auth_chain.map_err(UserNameError::Chain)?,
            model_id: model_id.filter(|model| !model.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sdks_and_hubs_send_is_read() {
        let node = UserName::parse(
            "hub1.azure-devices.net/leaf1/?api-version=2021-04-12&DeviceClientType=x%2F1%20(y)",
        )
        .unwrap();
        assert_eq!(node.host, "hub1.azure-devices.net");
        assert_eq!(node.identity.to_string(), "leaf1");
        assert_eq!(node.api_version.as_deref(), Some("2021-04-12"));
        assert_eq!(node.auth_chain, None);
        let bridge = UserName::parse(
            "h/L3/modA/?api-version=2020-09-30&auth-chain=L3%2FmodA%3BL3%3BL4&model-id=dtmi:a;1",
        )
        .unwrap();
        assert_eq!(bridge.identity.to_string(), "L3/modA");
        assert_eq!(bridge.auth_chain.unwrap().to_string(), "L3/modA;L3;L4");
        assert_eq!(bridge.model_id.as_deref(), Some("dtmi:a;1"));
        let old = UserName::parse("h/leaf1/api-version=2016-11-14").unwrap();
        assert_eq!(old.api_version.as_deref(), Some("2016-11-14"));
        assert_eq!(
            UserName::parse("h/d?1/?x=1").unwrap().identity.to_string(),
            "d?1"
        );
    }

    #[test]
    fn other_shapes_are_malformed() {
        for text in [
            "",
            "h/d",
            "h/d/fooBar",
            "h/d/m",
            "h//?api-version=1",
            "h/d?api-version=1",
            "h/d/m/?version=1/",
            "h/x/../d/?api-version=2020-09-30",
            "h/../?api-version=2020-09-30",
            "h/d/?auth-chain=d;;e",
            "h/d/?auth-chain=d;..",
            "h/d/?model-id=%ff",
        ] {
            assert!(UserName::parse(text).is_err(), "{text}");
        }
    }
}
