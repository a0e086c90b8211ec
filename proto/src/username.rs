//! The user name of an MQTT CONNECT (spec/mqtt.md 2.2):
//! `{host}/{device}[/{module}]/?api-version=…[&DeviceClientType=…][&auth-chain=…][&model-id=…]`.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::auth_chain::{AuthChain, AuthChainError};
use crate::identity::{Identity, IdentityError};
use crate::limits::USER_NAME_LENGTH_MAX;

/// The api-version that this hub names upstream.
pub const API_VERSION: &str = "2020-09-30";

const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// One legacy form that ends without `?` and has a slash in its parameters: an old container.
const LEGACY_TAIL: [&str; 3] = [
    "api-version=2017-06-30",
    "DeviceClientType=Microsoft.Azure.Devices.Client",
    "1.5.1-preview-003",
];

/// What [`LEGACY_TAIL`] says, in the form that is parsed.
const LEGACY_PARAMETERS: &str = "api-version=2017-06-30\
    &DeviceClientType=Microsoft.Azure.Devices.Client%2F1.5.1-preview-003";

/// What a user name says. The host is ignored: every client writes another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MqttUserName {
    /// For whom the connection is.
    pub identity: Identity,
    /// `api-version`, not blank, otherwise unchecked.
    pub api_version: String,
    /// `DeviceClientType`, the product information.
    pub client_type: Option<String>,
    /// `model-id`.
    pub model_id: Option<String>,
    /// `auth-chain`.
    pub auth_chain: Option<AuthChain>,
}

/// Why a text is no user name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UserNameError {
    /// Longer than [`USER_NAME_LENGTH_MAX`].
    #[error("the user name is too long")]
    TooLong,
    /// Not host, device, optional module and parameters.
    #[error("the user name does not have the form host/device[/module]/?api-version=…")]
    Form,
    /// The device or module id.
    #[error("the user name names no identity: {0}")]
    Identity(#[from] IdentityError),
    /// No `api-version`, or a blank one.
    #[error("the user name has no api-version")]
    NoApiVersion,
    /// `auth-chain` cannot be read.
    #[error("the auth-chain of the user name: {0}")]
    AuthChain(#[from] AuthChainError),
    /// A value is not UTF-8 once decoded.
    #[error("a parameter of the user name is not UTF-8")]
    NotUtf8,
}

impl MqttUserName {
    /// Reads a user name.
    ///
    /// # Errors
    /// Why the text is no user name.
    pub fn parse(text: &str) -> Result<Self, UserNameError> {
        if text.len() > USER_NAME_LENGTH_MAX {
            return Err(UserNameError::TooLong);
        }
        let segments: Vec<&str> = text.split('/').collect();
        let (ids, parameters) = match segments.as_slice() {
            [_host, ids @ .., last] if last.starts_with('?') => {
                (ids, last.strip_prefix('?').unwrap_or(last))
            }
            [_host, ids @ .., a, b, c] if ids.len() == 2 && [*a, *b, *c] == LEGACY_TAIL => {
                (ids, LEGACY_PARAMETERS)
            }
            [_host, ids @ .., last] if last.contains("?api-version=") => {
                // The form of an API sample, without a slash before the question mark: IoT Hub
                // takes it (spec/mqtt.md 2.2, note).
                return Self::without_slash(ids, last);
            }
            [_host, ids @ .., last] if last.contains("api-version=") => (ids, *last),
            _ => return Err(UserNameError::Form),
        };
        Self::build(ids, parameters)
    }

    fn without_slash(ids: &[&str], last: &str) -> Result<Self, UserNameError> {
        let (id, parameters) = last
            .split_once("?api-version=")
            .ok_or(UserNameError::Form)?;
        let mut all = ids.to_vec();
        all.push(id);
        Self::build(&all, &format!("api-version={parameters}"))
    }

    fn build(ids: &[&str], parameters: &str) -> Result<Self, UserNameError> {
        let identity = match ids {
            [device] => Identity::device(device.trim())?,
            [device, module] => Identity::module(device.trim(), module.trim())?,
            _ => return Err(UserNameError::Form),
        };
        let parameters = Parameters(parameters);
        let api_version = parameters
            .get("api-version")?
            .filter(|v| !v.trim().is_empty());
        let chain = parameters
            .get("auth-chain")?
            .filter(|chain| !chain.is_empty());
        Ok(Self {
            identity,
            api_version: api_version.ok_or(UserNameError::NoApiVersion)?,
            client_type: parameters.get("DeviceClientType")?,
            model_id: parameters.get("model-id")?,
            auth_chain: chain.map(|chain| AuthChain::parse(&chain)).transpose()?,
        })
    }
}

struct Parameters<'a>(&'a str);

impl Parameters<'_> {
    /// The first parameter of that name, decoded; names are not encoded.
    fn get(&self, name: &str) -> Result<Option<String>, UserNameError> {
        let mut pairs = self
            .0
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let Some((_, value)) = pairs.find(|(key, _)| *key == name) else {
            return Ok(None);
        };
        let decoded = percent_decode_str(value).decode_utf8();
        Ok(Some(
            decoded.map_err(|_| UserNameError::NotUtf8)?.into_owned(),
        ))
    }
}

/// The user name of a connection towards upstream (spec/upstream.md A3.4).
#[must_use]
pub fn format(
    host: &str,
    identity: &Identity,
    client_type: &str,
    auth_chain: &AuthChain,
    model_id: Option<&str>,
) -> String {
    let encode = |text: &str| utf8_percent_encode(text, RESERVED).to_string();
    let mut name = format!(
        "{host}/{identity}/?api-version={API_VERSION}&DeviceClientType={}&auth-chain={}",
        encode(client_type),
        encode(&auth_chain.to_string()),
    );
    if let Some(model_id) = model_id {
        name.push_str("&model-id=");
        name.push_str(&encode(model_id));
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_forms_of_all_sdks_parse() {
        for (text, identity) in [
            (
                "h/leaf1/?api-version=2021-04-12&DeviceClientType=azure-iot-device%2F1.18.4%20(node%20v20)",
                "leaf1",
            ),
            (
                "gw.local/edge1/filter/?api-version=2020-09-30&DeviceClientType=.NET%2F1.42.0&model-id=dtmi%3Acom%3Aex%3BT1",
                "edge1/filter",
            ),
            (
                "parent.local/leaf1/?api-version=2020-09-30&DeviceClientType=x&auth-chain=leaf1%3Bedge-low",
                "leaf1",
            ),
            ("h/dev1/api-version=2016-11-14", "dev1"),
            ("h/dev1/mod1/api-version=2016-11-14&x", "dev1/mod1"),
            ("h/ dev1 /?api-version=1", "dev1"),
            ("h/dev1?api-version=1", "dev1"),
            ("h/dev1/mod1?api-version=1", "dev1/mod1"),
            ("hub/dev?1/?api-version=2019-10-01", "dev?1"),
            ("h/edge10/?api-version=1", "edge10"),
            (
                "h/d/m/api-version=2017-06-30/DeviceClientType=Microsoft.Azure.Devices.Client/1.5.1-preview-003",
                "d/m",
            ),
        ] {
            let name = MqttUserName::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(name.identity.as_str(), identity, "{text}");
        }
    }

    #[test]
    fn parameters_are_decoded_and_the_first_of_a_name_wins() {
        let text =
            "h/leaf1/?api-version=1&auth-chain=leaf1%3Bedge2&api-version=2&model-id=dtmi%3Aa";
        let name = MqttUserName::parse(text).unwrap();
        assert_eq!(name.api_version, "1");
        assert_eq!(name.auth_chain.unwrap().to_string(), "leaf1;edge2");
        assert_eq!(name.model_id.as_deref(), Some("dtmi:a"));
        assert_eq!(name.client_type, None);
    }

    #[test]
    fn the_legacy_form_keeps_its_client_type() {
        let text = format!("h/d/m/{}", LEGACY_TAIL.join("/"));
        let name = MqttUserName::parse(&text).unwrap();
        assert_eq!(name.api_version, "2017-06-30");
        let client = "Microsoft.Azure.Devices.Client/1.5.1-preview-003";
        assert_eq!(name.client_type.as_deref(), Some(client));
    }

    #[test]
    fn what_is_no_user_name_is_refused() {
        for text in [
            "",
            "hub1/dev1",
            "hub1/dev1/fooBar",
            "hub1/dev1/mod1",
            "hub1//?api-version=1",
            "hub1/dev1/mod1/?version=1",
            "hub1/dev1/mod1/?api-version=",
            "hub1/d/m/api-version=1/x",
            "hub1/d/m/x/?api-version=1",
            "hub1/d/?api-version=1&auth-chain=a%20b",
            "hub1/d/?api-version=1&auth-chain=%3B",
            "hub1/d/?api-version=%20",
            "hub1/d/?api-version=%ff",
            "hub1/d/??api-version=1",
            "hub1/d+/?api-version=1",
            "hub1/?api-version=1",
            "hub1/dev1/?api-version=1&DeviceClientType=a/b",
            "hub1/d/m/api-version=2017-06-30/DeviceClientType=Microsoft.Azure.Devices.Client/1.5.1",
        ] {
            assert!(MqttUserName::parse(text).is_err(), "{text}");
        }
        let long = format!("h/d/?api-version=1&x={}", "x".repeat(9000));
        assert_eq!(MqttUserName::parse(&long), Err(UserNameError::TooLong));
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read(
            id in "[a-z0-9]{1,8}(/[$a-zA-Z]{1,8})?",
            product in ".{0,30}",
            model in proptest::option::of("dtmi:[a-z:;0-9]{1,20}"),
        ) {
            let identity = Identity::parse(&id).unwrap();
            let actor = Identity::parse("edge1").unwrap();
            let chain = AuthChain::new(vec![identity.clone(), actor]).unwrap();
            let text = format("h.example", &identity, &product, &chain, model.as_deref());
            let name = MqttUserName::parse(&text).unwrap();
            prop_assert_eq!(name.identity, identity);
            prop_assert_eq!(name.client_type, Some(product));
            prop_assert_eq!(name.auth_chain, Some(chain));
            prop_assert_eq!(name.model_id, model);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,60}") {
            let _ = MqttUserName::parse(&text);
            let _ = MqttUserName::parse(&format!("h/d/{text}?api-version=1"));
        }
    }
}
