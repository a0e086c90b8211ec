//! JSON of the scope APIs (spec/auth-hierarchy-http.md 6.1, 7; spec/upstream.md A9).
//!
//! Inside `authentication`, `type` is written last: the reference's setters change the type as
//! properties arrive. Answers always carry all three of their properties.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The api-version of both calls.
pub const API_VERSION: &str = "2020-06-30-preview";

/// Body of `devicesAndModulesInTargetDeviceScope`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScopeRequest {
    /// Identities wanted on one page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<i64>,
    /// The link of the page before; absent on the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continuation_link: Option<String>,
    /// Chain of the edge device whose children are asked for.
    pub auth_chain: String,
}

/// Body of `getDeviceAndModuleOnBehalfOf`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityRequest {
    /// The device asked for, or the device of the module asked for.
    pub target_device_id: String,
    /// The module asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_module_id: Option<String>,
    /// Chain of the edge device on whose behalf it is asked.
    pub auth_chain: String,
}

/// Answer of both calls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScopeResponse {
    /// Devices of this page.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub devices: Vec<Device>,
    /// Modules of this page.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub modules: Vec<Module>,
    /// To be sent back for the next page; null on the last.
    #[serde(default)]
    pub continuation_link: Option<String>,
}

/// A device as the scope API describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Its id.
    pub device_id: String,
    /// Opaque digits.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub generation_id: String,
    /// `enabled` or `disabled`.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub status: String,
    /// Its credential.
    #[serde(default)]
    pub authentication: Option<Authentication>,
    /// What it is.
    #[serde(default)]
    pub capabilities: Option<Capabilities>,
    /// Own scope of an edge device, else its parent's.
    #[serde(default)]
    pub device_scope: Option<String>,
    /// Scopes of its parent. Null falls back to `device_scope` for a leaf; a C# child reads a
    /// missing array as empty, so it is always written (4.1).
    #[serde(default)]
    pub parent_scopes: Option<Vec<String>>,
}

/// A module as the scope API describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Module {
    /// Its id.
    pub module_id: String,
    /// Its device.
    pub device_id: String,
    /// Opaque digits.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub generation_id: String,
    /// `IotEdge` for modules of the runtime.
    #[serde(default)]
    pub managed_by: Option<String>,
    /// Its credential.
    #[serde(default)]
    pub authentication: Option<Authentication>,
}

/// What a device can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    /// Whether it is an edge device.
    #[serde(default)]
    pub iot_edge: bool,
}

/// A credential. The order of the fields is the order on the wire: `type` last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Authentication {
    /// Both keys, for `sas`.
    #[serde(default)]
    pub symmetric_key: Option<SymmetricKey>,
    /// Both thumbprints, for `selfSigned`.
    #[serde(default, rename = "x509Thumbprint")]
    pub x509_thumbprint: Option<X509Thumbprint>,
    /// `sas`, `selfSigned`, `certificateAuthority` or `none`.
    #[serde(default, rename = "type", deserialize_with = "null_as_empty")]
    pub kind: String,
}

/// Keys in base64. `Debug` prints `***`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SymmetricKey {
    /// Tried first.
    #[serde(default)]
    pub primary_key: Option<String>,
    /// Tried second.
    #[serde(default)]
    pub secondary_key: Option<String>,
}

impl fmt::Debug for SymmetricKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SymmetricKey(***)")
    }
}

/// Thumbprints in hex.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct X509Thumbprint {
    /// Either matches.
    #[serde(default)]
    pub primary_thumbprint: Option<String>,
    /// Either matches.
    #[serde(default)]
    pub secondary_thumbprint: Option<String>,
}

/// Body of an error of the scope APIs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For a person.
    #[serde(rename = "ErrorMessage")]
    pub error_message: String,
}

fn null_as_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: &str = r#"{"devices":[{"deviceId":"leaf1","generationId":"637500000000000003","status":"enabled","authentication":{"symmetricKey":{"primaryKey":"cA==","secondaryKey":"cw=="},"x509Thumbprint":{"primaryThumbprint":null,"secondaryThumbprint":null},"type":"sas"},"capabilities":{"iotEdge":false},"deviceScope":"ms-azure-iot-edge://edge2-637500000000000002","parentScopes":["ms-azure-iot-edge://edge2-637500000000000002"]}],"modules":[{"moduleId":"$edgeHub","deviceId":"edge2","generationId":"637500000000000004","managedBy":"IotEdge","authentication":{"symmetricKey":null,"x509Thumbprint":null,"type":"none"}}],"continuationLink":null}"#;

    #[test]
    fn the_page_of_the_specification_survives_byte_for_byte() {
        let page: ScopeResponse = serde_json::from_str(PAGE).unwrap();
        assert_eq!(serde_json::to_string(&page).unwrap(), PAGE);
        assert!(!format!("{page:?}").contains("cA=="));
    }

    #[test]
    fn type_is_the_last_property_of_a_credential() {
        let text = serde_json::to_string(&Authentication::default()).unwrap();
        assert_eq!(
            text,
            r#"{"symmetricKey":null,"x509Thumbprint":null,"type":""}"#
        );
    }

    #[test]
    fn null_and_absent_are_read() {
        let text = r#"{"devices":null,"modules":[{"moduleId":"m","deviceId":"d"}]}"#;
        let page: ScopeResponse = serde_json::from_str(text).unwrap();
        assert!(page.devices.is_empty());
        assert_eq!(page.modules[0].generation_id, "");
        assert_eq!(page.continuation_link, None);
        let device: Device = serde_json::from_str(
            r#"{"deviceId":"d","status":null,"parentScopes":null,"etag":"x","unknown":{"a":1}}"#,
        )
        .unwrap();
        assert_eq!(device.parent_scopes, None);
    }

    #[test]
    fn the_first_request_has_no_link() {
        let request = ScopeRequest {
            page_size: Some(10),
            continuation_link: None,
            auth_chain: "e".into(),
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(text, r#"{"pageSize":10,"authChain":"e"}"#);
        assert!(serde_json::from_str::<ScopeRequest>("{}").is_err());
    }

    fn maybe(pattern: &'static str) -> impl Strategy<Value = Option<String>> {
        proptest::option::of(pattern)
    }

    fn authentication() -> impl Strategy<Value = Option<Authentication>> {
        let key = (maybe(".{0,8}"), maybe(".{0,8}")).prop_map(|(primary_key, secondary_key)| {
            SymmetricKey {
                primary_key,
                secondary_key,
            }
        });
        let thumbprint = (maybe("[0-9A-F]{0,8}"), maybe("[0-9A-F]{0,8}")).prop_map(
            |(primary_thumbprint, secondary_thumbprint)| X509Thumbprint {
                primary_thumbprint,
                secondary_thumbprint,
            },
        );
        let parts = (
            proptest::option::of(key),
            proptest::option::of(thumbprint),
            ".{0,8}",
        );
        proptest::option::of(parts.prop_map(|(symmetric_key, x509_thumbprint, kind)| {
            Authentication {
                symmetric_key,
                x509_thumbprint,
                kind,
            }
        }))
    }

    fn device() -> impl Strategy<Value = Device> {
        let capabilities = any::<bool>().prop_map(|iot_edge| Capabilities { iot_edge });
        (
            ".{0,8}",
            "[0-9]{0,8}",
            "(enabled|disabled)?",
            authentication(),
            proptest::option::of(capabilities),
            maybe(".{0,8}"),
            proptest::option::of(proptest::collection::vec(".{0,8}", 0..3)),
        )
            .prop_map(|parts| Device {
                device_id: parts.0,
                generation_id: parts.1,
                status: parts.2,
                authentication: parts.3,
                capabilities: parts.4,
                device_scope: parts.5,
                parent_scopes: parts.6,
            })
    }

    fn module() -> impl Strategy<Value = Module> {
        (
            ".{0,8}",
            ".{0,8}",
            "[0-9]{0,8}",
            maybe(".{0,8}"),
            authentication(),
        )
            .prop_map(|parts| Module {
                module_id: parts.0,
                device_id: parts.1,
                generation_id: parts.2,
                managed_by: parts.3,
                authentication: parts.4,
            })
    }

    /// Takes every null out of a document, at every depth.
    fn without_nulls(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(map) => {
                map.retain(|_, value| !value.is_null());
                map.values_mut().for_each(without_nulls);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(without_nulls),
            _ => {}
        }
    }

    proptest! {
        #[test]
        fn a_page_survives_and_absent_reads_as_null(
            devices in proptest::collection::vec(device(), 0..3),
            modules in proptest::collection::vec(module(), 0..3),
            continuation_link in maybe(".{0,8}"),
        ) {
            let page = ScopeResponse { devices, modules, continuation_link };
            let text = serde_json::to_string(&page).unwrap();
            prop_assert_eq!(&serde_json::from_str::<ScopeResponse>(&text).unwrap(), &page);
            let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
            without_nulls(&mut value);
            prop_assert_eq!(&serde_json::from_value::<ScopeResponse>(value).unwrap(), &page);
        }

        #[test]
        fn type_stays_last_whatever_the_credential_holds(authentication in authentication()) {
            let Some(authentication) = authentication else { return Ok(()) };
            let text = serde_json::to_string(&authentication).unwrap();
            let kind = serde_json::to_string(&authentication.kind).unwrap();
            prop_assert!(text.starts_with("{\"symmetricKey\":"), "{}", text);
            let tail = format!(",\"type\":{kind}}}");
            prop_assert!(text.ends_with(&tail));
        }

        #[test]
        fn requests_survive(
            size in proptest::option::of(any::<i64>()),
            link in proptest::option::of(".{0,20}"),
            chain in ".{0,20}",
            module in proptest::option::of(".{0,20}"),
        ) {
            let scope = ScopeRequest { page_size: size, continuation_link: link, auth_chain: chain.clone() };
            let text = serde_json::to_string(&scope).unwrap();
            prop_assert_eq!(serde_json::from_str::<ScopeRequest>(&text).unwrap(), scope);
            let identity = IdentityRequest { target_device_id: chain.clone(), target_module_id: module, auth_chain: chain };
            let text = serde_json::to_string(&identity).unwrap();
            prop_assert_eq!(serde_json::from_str::<IdentityRequest>(&text).unwrap(), identity);
        }
    }
}
