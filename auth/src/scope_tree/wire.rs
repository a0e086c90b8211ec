//! Records to and from the JSON of the scope API and the sealed records of the store.
//!
//! Reading is lenient, one identity at a time, so that an odd one never stops a walk (D12): what
//! cannot be understood makes the identity unusable, not the page. Writing is what a C# child hub
//! can read (spec/auth-hierarchy-http.md 4.1 and 7).

use edgehub_proto::identity::{Identity, IdentityError};
use edgehub_proto::records::StoredIdentity;
use edgehub_proto::scope::{self, Capabilities, SymmetricKey, X509Thumbprint};
use thiserror::Error;

use super::{Authentication, KeyMaterial, ServiceIdentity, Status};

/// Version of [`StoredIdentity`] that is written and read.
const STORED_VERSION: u32 = 1;

/// Why a record cannot be taken over.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConvertError {
    /// Its id cannot be an id.
    #[error("{id:?} is not an identity: {source}")]
    InvalidId {
        /// What was sent as the id.
        id: String,
        /// What is wrong with it.
        source: IdentityError,
    },
    /// It was stored by a later version.
    #[error("version {version} of a stored identity is not supported")]
    StoredVersion {
        /// The version that was found.
        version: u32,
    },
}

/// A record in the form of the scope API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WireIdentity {
    /// For the list of devices.
    Device(scope::Device),
    /// For the list of modules.
    Module(scope::Module),
}

impl TryFrom<scope::Device> for ServiceIdentity {
    type Error = ConvertError;

    /// A device without a status, or with one that is not `enabled`, counts as disabled.
    fn try_from(device: scope::Device) -> Result<Self, ConvertError> {
        let identity =
            Identity::device(&device.device_id).map_err(|source| ConvertError::InvalidId {
                id: device.device_id,
                source,
            })?;
        let is_edge = device.capabilities.unwrap_or_default().iot_edge;
        let device_scope = device.device_scope.filter(|scope| !scope.is_empty());
        let parent_scopes = match device.parent_scopes {
            Some(scopes) => scopes,
            None if is_edge => Vec::new(),
            None => device_scope.iter().cloned().collect(),
        };
        let enabled = device.status.eq_ignore_ascii_case("enabled");
        Ok(Self {
            identity,
            generation_id: device.generation_id,
            status: if enabled {
                Status::Enabled
            } else {
                Status::Disabled
            },
            is_edge,
            device_scope,
            parent_scopes,
            authentication: device.authentication.unwrap_or_default().into(),
        })
    }
}

impl TryFrom<scope::Module> for ServiceIdentity {
    type Error = ConvertError;

    fn try_from(module: scope::Module) -> Result<Self, ConvertError> {
        let identity = module_identity(&module.device_id, &module.module_id)?;
        Ok(Self {
            identity,
            generation_id: module.generation_id,
            status: Status::Enabled,
            is_edge: false,
            device_scope: None,
            parent_scopes: Vec::new(),
            authentication: module.authentication.unwrap_or_default().into(),
        })
    }
}

impl TryFrom<StoredIdentity> for ServiceIdentity {
    type Error = ConvertError;

    fn try_from(stored: StoredIdentity) -> Result<Self, ConvertError> {
        if stored.version != STORED_VERSION {
            return Err(ConvertError::StoredVersion {
                version: stored.version,
            });
        }
        let identity = if stored.module_id.is_empty() {
            Identity::device(&stored.device_id).map_err(|source| ConvertError::InvalidId {
                id: stored.device_id,
                source,
            })?
        } else {
            module_identity(&stored.device_id, &stored.module_id)?
        };
        let authentication = scope::Authentication {
            symmetric_key: Some(SymmetricKey {
                primary_key: Some(stored.primary_key),
                secondary_key: Some(stored.secondary_key),
            }),
            x509_thumbprint: Some(X509Thumbprint {
                primary_thumbprint: Some(stored.primary_thumbprint),
                secondary_thumbprint: Some(stored.secondary_thumbprint),
            }),
            kind: stored.auth_kind,
        };
        let is_edge = stored.iot_edge && !identity.is_module();
        Ok(Self {
            identity,
            generation_id: stored.generation_id,
            status: if stored.enabled {
                Status::Enabled
            } else {
                Status::Disabled
            },
            is_edge,
            device_scope: not_blank(Some(stored.device_scope)),
            parent_scopes: stored.parent_scopes,
            authentication: authentication.into(),
        })
    }
}

impl From<&ServiceIdentity> for StoredIdentity {
    fn from(record: &ServiceIdentity) -> Self {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let reveal = |key: &Option<KeyMaterial>| {
            key.as_ref()
                .map_or_else(String::new, |key| key.reveal().to_owned())
        };
        let mut stored = Self {
            version: STORED_VERSION,
            device_id: record.identity.device_id().to_owned(),
            module_id: record.identity.module_id().unwrap_or_default().to_owned(),
            generation_id: record.generation_id.clone(),
            enabled: record.is_enabled(),
            device_scope: text(&record.device_scope),
            parent_scopes: record.parent_scopes.clone(),
            iot_edge: record.is_edge,
            auth_kind: record.authentication.kind().to_owned(),
            ..Self::default()
        };
        match &record.authentication {
            Authentication::CertificateAuthority | Authentication::None => {}
            Authentication::SymmetricKey { primary, secondary } => {
                stored.primary_key = reveal(primary);
                stored.secondary_key = reveal(secondary);
            }
            Authentication::Thumbprint { primary, secondary } => {
                stored.primary_thumbprint = text(primary);
                stored.secondary_thumbprint = text(secondary);
            }
        }
        stored
    }
}

impl ServiceIdentity {
    /// The record for a scope answer, keys included.
    pub fn to_wire(&self) -> WireIdentity {
        let device_id = self.identity.device_id().to_owned();
        let generation_id = self.generation_id.clone();
        let authentication = Some(scope::Authentication::from(&self.authentication));
        match self.identity.module_id() {
            Some(module_id) => WireIdentity::Module(scope::Module {
                module_id: module_id.to_owned(),
                device_id,
                generation_id,
                managed_by: None,
                authentication,
            }),
            None => WireIdentity::Device(scope::Device {
                device_id,
                generation_id,
                status: if self.is_enabled() {
                    "enabled"
                } else {
                    "disabled"
                }
                .to_owned(),
                authentication,
                capabilities: Some(Capabilities {
                    iot_edge: self.is_edge,
                }),
                device_scope: self.device_scope.clone(),
                parent_scopes: Some(self.parent_scopes.clone()),
            }),
        }
    }
}

impl From<scope::Authentication> for Authentication {
    /// An unknown kind counts as none: whoever uses it cannot authenticate here. Without any kind
    /// the keys decide.
    fn from(wire: scope::Authentication) -> Self {
        let keys = wire.symmetric_key.unwrap_or_default();
        let key = |text: Option<String>| text.as_deref().and_then(KeyMaterial::new);
        let (primary, secondary) = (key(keys.primary_key), key(keys.secondary_key));
        let kind = wire.kind.to_ascii_lowercase();
        match kind.as_str() {
            "" if primary.is_some() || secondary.is_some() => {
                Self::SymmetricKey { primary, secondary }
            }
            "sas" => Self::SymmetricKey { primary, secondary },
            "selfsigned" => {
                let thumbprints = wire.x509_thumbprint.unwrap_or_default();
                Self::Thumbprint {
                    primary: not_blank(thumbprints.primary_thumbprint),
                    secondary: not_blank(thumbprints.secondary_thumbprint),
                }
            }
            "certificateauthority" => Self::CertificateAuthority,
            _ => Self::None,
        }
    }
}

impl From<&Authentication> for scope::Authentication {
    /// A C# child hub fails over a key or thumbprint that is absent, and gives up its whole walk
    /// (13 #2). So the one that is there is written twice, which authenticates the same clients;
    /// without any, the kind is `none`.
    fn from(authentication: &Authentication) -> Self {
        let none = Self {
            symmetric_key: None,
            x509_thumbprint: None,
            kind: "none".to_owned(),
        };
        let kind = authentication.kind().to_owned();
        match authentication {
            Authentication::CertificateAuthority | Authentication::None => Self { kind, ..none },
            Authentication::SymmetricKey { primary, secondary } => {
                let reveal = |key: &KeyMaterial| key.reveal().to_owned();
                let Some((primary_key, secondary_key)) = both(primary, secondary, reveal) else {
                    return none;
                };
                Self {
                    symmetric_key: Some(SymmetricKey {
                        primary_key,
                        secondary_key,
                    }),
                    kind,
                    ..none
                }
            }
            Authentication::Thumbprint { primary, secondary } => {
                let both = both(primary, secondary, String::clone);
                let Some((primary_thumbprint, secondary_thumbprint)) = both else {
                    return none;
                };
                let thumbprint = X509Thumbprint {
                    primary_thumbprint,
                    secondary_thumbprint,
                };
                Self {
                    x509_thumbprint: Some(thumbprint),
                    kind,
                    ..none
                }
            }
        }
    }
}

impl Authentication {
    /// The name of the kind in the scope API.
    fn kind(&self) -> &'static str {
        match self {
            Self::CertificateAuthority => "certificateAuthority",
            Self::None => "none",
            Self::SymmetricKey { .. } => "sas",
            Self::Thumbprint { .. } => "selfSigned",
        }
    }
}

fn both<T>(
    primary: &Option<T>,
    secondary: &Option<T>,
    text: impl Fn(&T) -> String,
) -> Option<(Option<String>, Option<String>)> {
    let first = primary.as_ref().or(secondary.as_ref())?;
    let second = secondary.as_ref().unwrap_or(first);
    Some((Some(text(first)), Some(text(second))))
}

fn not_blank(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.trim().is_empty())
}

fn module_identity(device_id: &str, module_id: &str) -> Result<Identity, ConvertError> {
    Identity::module(device_id, module_id).map_err(|source| ConvertError::InvalidId {
        id: format!("{device_id}/{module_id}"),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::*;

    fn device_json(authentication: scope::Authentication) -> scope::Device {
        scope::Device {
            device_id: "leaf1".to_owned(),
            generation_id: "637".to_owned(),
            status: "enabled".to_owned(),
            authentication: Some(authentication),
            capabilities: Some(Capabilities { iot_edge: false }),
            device_scope: Some(scope_of("edge2")),
            parent_scopes: Some(vec![scope_of("edge2")]),
        }
    }

    fn keys(primary: Option<&str>, secondary: Option<&str>, kind: &str) -> scope::Authentication {
        scope::Authentication {
            symmetric_key: Some(SymmetricKey {
                primary_key: primary.map(str::to_owned),
                secondary_key: secondary.map(str::to_owned),
            }),
            x509_thumbprint: None,
            kind: kind.to_owned(),
        }
    }

    #[test]
    fn every_record_survives_the_wire_and_the_store() {
        let thumbprint = Authentication::Thumbprint {
            primary: Some("AB".to_owned()),
            secondary: Some("CD".to_owned()),
        };
        let mut records = sample_scope();
        for authentication in [
            Authentication::None,
            Authentication::CertificateAuthority,
            thumbprint,
        ] {
            records.push(ServiceIdentity {
                authentication,
                ..leaf("leaf9", "edge2")
            });
        }
        records.push(disabled(edge("edge9", Some("edge2"))));
        for record in records {
            let back = match record.to_wire() {
                WireIdentity::Device(device) => {
                    assert!(device.parent_scopes.is_some() && device.capabilities.is_some());
                    ServiceIdentity::try_from(device)
                }
                WireIdentity::Module(module) => ServiceIdentity::try_from(module),
            };
            assert_eq!(back.as_ref(), Ok(&record));
            let stored = StoredIdentity::from(&record);
            assert_eq!(ServiceIdentity::try_from(stored).as_ref(), Ok(&record));
        }
    }

    #[test]
    fn the_store_keeps_an_absent_key_absent() {
        for (primary, secondary) in [("", "c2Vj"), ("cHJp", ""), ("", "")] {
            let authentication = symmetric(primary, secondary);
            let record = ServiceIdentity {
                authentication,
                ..leaf("leaf1", "edge2")
            };
            let stored = StoredIdentity::from(&record);
            assert_eq!(ServiceIdentity::try_from(stored), Ok(record));
        }
    }

    #[test]
    fn a_csharp_child_never_sees_half_a_credential() {
        let wire = |primary, secondary| scope::Authentication::from(&symmetric(primary, secondary));
        assert_eq!(wire("cHJp", ""), keys(Some("cHJp"), Some("cHJp"), "sas"));
        assert_eq!(wire("", "c2Vj"), keys(Some("c2Vj"), Some("c2Vj"), "sas"));
        assert_eq!(
            wire("cHJp", "c2Vj"),
            keys(Some("cHJp"), Some("c2Vj"), "sas")
        );
        assert_eq!(wire("", "").kind, "none");
        assert_eq!(wire("", "").symmetric_key, None);

        let one = Authentication::Thumbprint {
            primary: None,
            secondary: Some("AB".to_owned()),
        };
        let thumbprint = scope::Authentication::from(&one).x509_thumbprint.unwrap();
        assert_eq!(thumbprint.primary_thumbprint.as_deref(), Some("AB"));
        assert_eq!(thumbprint.secondary_thumbprint.as_deref(), Some("AB"));
    }

    #[test]
    fn odd_credentials_are_read_as_far_as_they_make_sense() {
        let read = |wire: scope::Authentication| Authentication::from(wire);
        let both = symmetric("cHJp", "c2Vj");
        assert_eq!(read(keys(Some("cHJp"), Some("c2Vj"), "sas")), both);
        assert_eq!(read(keys(Some("cHJp"), Some("c2Vj"), "SAS")), both);
        assert_eq!(read(keys(Some("cHJp"), Some("c2Vj"), "")), both);
        assert_eq!(read(keys(Some("cHJp"), None, "sas")), symmetric("cHJp", ""));
        assert_eq!(read(keys(None, Some(" "), "sas")), symmetric("", ""));
        assert_eq!(
            read(keys(Some("cHJp"), Some("c2Vj"), "none")),
            Authentication::None
        );
        assert_eq!(
            read(keys(Some("cHJp"), Some("c2Vj"), "quantum")),
            Authentication::None
        );
        assert_eq!(read(keys(None, None, "")), Authentication::None);
        let ca = keys(None, None, "certificateAuthority");
        assert_eq!(read(ca), Authentication::CertificateAuthority);
        let nothing = Authentication::Thumbprint {
            primary: None,
            secondary: None,
        };
        assert_eq!(read(keys(None, None, "selfSigned")), nothing);
    }

    #[test]
    fn anything_but_enabled_is_disabled() {
        for (status, expected) in [
            ("enabled", Status::Enabled),
            ("Enabled", Status::Enabled),
            ("disabled", Status::Disabled),
            ("", Status::Disabled),
            ("paused", Status::Disabled),
        ] {
            let mut device = device_json(keys(None, None, "none"));
            device.status = status.to_owned();
            assert_eq!(
                ServiceIdentity::try_from(device).unwrap().status,
                expected,
                "{status}"
            );
        }
    }

    #[test]
    fn a_leaf_without_parents_falls_back_to_its_scope_and_an_edge_device_does_not() {
        let mut device = device_json(keys(None, None, "none"));
        device.parent_scopes = None;
        let record = ServiceIdentity::try_from(device.clone()).unwrap();
        assert_eq!(record.parent_scopes, [scope_of("edge2")]);

        device.parent_scopes = Some(Vec::new());
        let record = ServiceIdentity::try_from(device.clone()).unwrap();
        assert_eq!(record.parent_scopes, [""; 0]);

        device.parent_scopes = None;
        device.capabilities = Some(Capabilities { iot_edge: true });
        let record = ServiceIdentity::try_from(device.clone()).unwrap();
        assert_eq!(record.parent_scopes, [""; 0]);

        device.capabilities = None;
        assert!(!ServiceIdentity::try_from(device).unwrap().is_edge);
    }

    #[test]
    fn what_is_no_identity_is_refused_alone() {
        let mut device = device_json(keys(None, None, "none"));
        device.device_id = "leaf1/modA".to_owned();
        assert!(matches!(
            ServiceIdentity::try_from(device),
            Err(ConvertError::InvalidId { id, .. }) if id == "leaf1/modA"
        ));
        let module = scope::Module {
            module_id: "a#".to_owned(),
            device_id: "edge1".to_owned(),
            generation_id: String::new(),
            managed_by: None,
            authentication: None,
        };
        assert!(ServiceIdentity::try_from(module).is_err());

        let record = leaf("leaf1", "edge2");
        for version in [0, 2, 77] {
            let stored = StoredIdentity {
                version,
                ..StoredIdentity::from(&record)
            };
            assert_eq!(
                ServiceIdentity::try_from(stored),
                Err(ConvertError::StoredVersion { version })
            );
        }
    }
}
