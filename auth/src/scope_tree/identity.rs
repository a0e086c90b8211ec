//! What IoT Hub knows about one identity of our scope: the record behind a node of the tree.

use std::fmt;
use std::sync::Arc;

use edgehub_proto::identity::Identity;

/// A device or module as IoT Hub (or the parent's hub) describes it.
///
/// Equality covers every field and drives [`IdentityChange`](crate::scope_cache::IdentityChange)
/// (spec/auth-hierarchy-http.md 4.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceIdentity {
    /// Who it is.
    pub identity: Identity,
    /// IoT Hub's generation of the id: differs after delete and create. Opaque digits.
    pub generation_id: String,
    /// Whether it may be used. Modules are always enabled.
    pub status: Status,
    /// Whether the device has the capability `iotEdge`. Never set for modules.
    pub is_edge: bool,
    /// An edge device's own scope, or the scope of a leaf's parent.
    pub device_scope: Option<String>,
    /// Scopes of the parent; IoT Hub writes at most one. The first that names an edge device of
    /// the tree is the parent. Empty for modules.
    pub parent_scopes: Vec<String>,
    /// How it proves who it is.
    pub authentication: Authentication,
}

impl ServiceIdentity {
    /// The scope under which children find this device, if it is an edge device.
    pub(crate) fn own_scope(&self) -> Option<&str> {
        if !self.is_edge {
            return None;
        }
        self.device_scope
            .as_deref()
            .filter(|scope| !scope.is_empty())
    }

    /// Whether IoT Hub has the identity enabled.
    pub fn is_enabled(&self) -> bool {
        self.status == Status::Enabled
    }
}

/// Whether an identity may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It may not connect; below a disabled edge device nothing may.
    Disabled,
    /// It may connect.
    Enabled,
}

/// How an identity proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authentication {
    /// A certificate whose common name is the device id, issued below the trust bundle.
    CertificateAuthority,
    /// No credential is set: nothing authenticates.
    None,
    /// Tokens signed with one of two keys. Either may be absent (13 #2).
    SymmetricKey {
        /// Tried first.
        primary: Option<KeyMaterial>,
        /// Tried when the primary key does not match.
        secondary: Option<KeyMaterial>,
    },
    /// A certificate with one of two thumbprints (hex SHA-1 or SHA-256). Either may be absent.
    Thumbprint {
        /// The first of the two.
        primary: Option<String>,
        /// The second of the two.
        secondary: Option<String>,
    },
}

impl Authentication {
    /// The symmetric keys, primary first; empty for every other kind.
    pub(crate) fn symmetric_keys(&self) -> impl Iterator<Item = &KeyMaterial> {
        let (primary, secondary) = match self {
            Self::SymmetricKey { primary, secondary } => (primary.as_ref(), secondary.as_ref()),
            Self::CertificateAuthority | Self::None | Self::Thumbprint { .. } => (None, None),
        };
        primary.into_iter().chain(secondary)
    }
}

/// A symmetric key in the base64 text of IoT Hub. `Debug` prints `***`; there is no `Display`.
///
/// The text is kept as it came, because child hubs receive it unchanged; whether it is usable
/// shows when a token is checked with it.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyMaterial(Arc<str>);

impl KeyMaterial {
    /// Keeps `base64`; none for blank text, which is how an absent key is written.
    pub fn new(base64: &str) -> Option<Self> {
        let base64 = base64.trim();
        (!base64.is_empty()).then(|| Self(base64.into()))
    }

    /// The key itself. Only for signatures, sealed records and scope answers: never log it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("KeyMaterial(***)")
    }
}
