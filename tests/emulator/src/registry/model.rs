//! What the registry knows about one identity.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};

/// How an identity proves itself. Only keys can authenticate here; the other kinds are kept and
/// answered, so that scope pages contain them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Authentication {
    CertificateAuthority,
    None,
    Sas {
        primary: String,
        secondary: String,
    },
    SelfSigned {
        primary: Option<String>,
        secondary: Option<String>,
    },
}

impl Authentication {
    /// The name of the kind in the JSON of IoT Hub.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::CertificateAuthority => "certificateAuthority",
            Self::None => "none",
            Self::Sas { .. } => "sas",
            Self::SelfSigned { .. } => "selfSigned",
        }
    }

    /// The base64 keys that may sign this identity's tokens.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let keys = match self {
            Self::Sas { primary, secondary } => [Some(primary.as_str()), Some(secondary.as_str())],
            _ => [None, None],
        };
        keys.into_iter().flatten()
    }
}

impl fmt::Debug for Authentication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CertificateAuthority => "CertificateAuthority",
            Self::None => "None",
            Self::Sas { .. } => "Sas(***)",
            Self::SelfSigned { .. } => "SelfSigned",
        })
    }
}

/// A device that a caller wants to create or to change into.
#[derive(Debug, Clone)]
pub(crate) struct DeviceSpec {
    pub(crate) id: String,
    pub(crate) iot_edge: bool,
    pub(crate) enabled: bool,
    pub(crate) status_reason: Option<String>,
    pub(crate) authentication: Authentication,
    /// The scope of the parent edge device.
    pub(crate) parent_scope: Option<String>,
}

/// A module that a caller wants to create or to change into.
#[derive(Debug, Clone)]
pub(crate) struct ModuleSpec {
    pub(crate) id: String,
    pub(crate) managed_by: Option<String>,
    pub(crate) authentication: Authentication,
}

/// A device of the registry.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) generation_id: String,
    pub(crate) etag: String,
    pub(crate) iot_edge: bool,
    pub(crate) enabled: bool,
    pub(crate) status_reason: Option<String>,
    pub(crate) status_updated_ms: u64,
    pub(crate) authentication: Authentication,
    /// An edge device's own scope; a leaf's mirror of its parent's.
    pub(crate) device_scope: Option<String>,
    /// Empty or one scope: IoT Hub knows one parent.
    pub(crate) parent_scopes: Vec<String>,
    pub(crate) modules: BTreeMap<String, Module>,
}

/// A module of a device.
#[derive(Debug, Clone)]
pub(crate) struct Module {
    pub(crate) id: String,
    pub(crate) generation_id: String,
    pub(crate) etag: String,
    pub(crate) managed_by: Option<String>,
    pub(crate) authentication: Authentication,
}

/// A module that the edge runtime manages, with fresh keys.
pub(crate) fn new_edge_module(id: &str) -> ModuleSpec {
    ModuleSpec {
        id: id.to_owned(),
        managed_by: Some("iotEdge".to_owned()),
        authentication: Authentication::Sas {
            primary: random_key(),
            secondary: random_key(),
        },
    }
}

/// A fresh key of 32 random bytes, base64.
pub(crate) fn random_key() -> String {
    let mut key = [0_u8; 32];
    // A system without randomness has no use for an emulator; a zero key would only fail tests.
    let _ = SystemRandom::new().fill(&mut key);
    STANDARD.encode(key)
}
