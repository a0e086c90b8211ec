//! What a client claims, and the proof that its claim was found true.

use std::fmt;

use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::Identity;

use crate::limits::TOKEN_SKEW_MS;

/// What a client says about itself when it connects.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Whose session it wants to open: the target.
    pub identity: Identity,
    /// The auth chain it sent. With two or more elements the last one acts on behalf of
    /// [`Self::identity`], which must then be the first.
    pub chain: Option<AuthChain>,
    /// What it presents as proof.
    pub credential: Credential,
}

/// What the caller of a scope or registry call says about itself.
#[derive(Clone, Debug)]
pub struct ServiceClaim {
    /// Device and module of the URL: who calls. Only a `$edgeHub` may.
    pub caller: Identity,
    /// `authChain` of the body: for whom it calls first, the caller's device last.
    pub chain: AuthChain,
    /// The `Authorization` header.
    pub credential: Credential,
}

/// What is presented as proof. `Debug` prints `***` instead of a token.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// The end entity certificate of the TLS session (DER). Refused until the identity issue.
    Certificate(Vec<u8>),
    /// Nothing.
    None,
    /// A SAS token, as it came.
    Sas(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(der) => write!(formatter, "Certificate({} bytes)", der.len()),
            Self::None => formatter.write_str("None"),
            Self::Sas(_) => formatter.write_str("Sas(***)"),
        }
    }
}

/// Host names that a token's audience may name: the IoT Hub and ourselves (2.3).
#[derive(Clone, Debug)]
pub struct AudienceHosts(Vec<String>);

impl AudienceHosts {
    /// The IoT Hub's host name and our own (`EdgeDeviceHostName`). A blank one never matches.
    pub fn new(iot_hub_host: &str, own_host: &str) -> Self {
        let hosts = [iot_hub_host, own_host].map(str::trim);
        Self(
            hosts
                .into_iter()
                .filter(|host| !host.is_empty())
                .map(str::to_owned)
                .collect(),
        )
    }

    /// Whether `host` is one of them, whatever its case.
    pub fn contains(&self, host: &str) -> bool {
        self.0.iter().any(|known| known.eq_ignore_ascii_case(host))
    }
}

/// Proof that a client is who it claims to be. Only [`super::verify()`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    identity: Identity,
    actor: Option<Identity>,
    expires_at_ms: Option<u64>,
    by_device_key: bool,
}

impl Principal {
    pub(super) fn new(identity: Identity, actor: Option<Identity>, proof: TokenProof) -> Self {
        let TokenProof {
            expires_at_ms,
            by_device_key,
        } = proof;
        Self {
            identity,
            actor,
            expires_at_ms: Some(expires_at_ms),
            by_device_key,
        }
    }

    /// Whose session it is: everything received on it comes from this identity.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The edge device whose `$edgeHub` acts on behalf of [`Self::identity`], if one does.
    pub fn actor(&self) -> Option<&Identity> {
        self.actor.as_ref()
    }

    /// When the credential stops to count, as Unix milliseconds: the token's `se` plus the clock
    /// skew of 5 minutes that is granted when it is presented. The connection must end then.
    /// None: never.
    pub fn expires_at_ms(&self) -> Option<u64> {
        self.expires_at_ms
    }

    /// Whether a module used its device's key. Kept for compatibility (13 #25), worth a count.
    pub fn used_device_key(&self) -> bool {
        self.by_device_key
    }
}

/// Proof that the `$edgeHub` of an edge device below us makes a call, with its own key. Only
/// [`super::verify_service`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePrincipal {
    caller: Identity,
    expires_at_ms: u64,
}

impl ServicePrincipal {
    pub(super) fn new(caller: Identity, proof: TokenProof) -> Self {
        Self {
            caller,
            expires_at_ms: proof.expires_at_ms,
        }
    }

    /// The calling `$edgeHub`.
    pub fn caller(&self) -> &Identity {
        &self.caller
    }

    /// The device that the caller runs on: the actor.
    pub fn actor_device(&self) -> &str {
        self.caller.device_id()
    }

    /// When the credential stops to count; see [`Principal::expires_at_ms`].
    pub fn expires_at_ms(&self) -> u64 {
        self.expires_at_ms
    }
}

/// What is known of a token once its signature, audience and expiry were found good.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenProof {
    expires_at_ms: u64,
    by_device_key: bool,
}

impl TokenProof {
    pub(super) fn new(token_expires_at_ms: u64, by_device_key: bool) -> Self {
        let expires_at_ms = token_expires_at_ms.saturating_add(TOKEN_SKEW_MS);
        Self {
            expires_at_ms,
            by_device_key,
        }
    }
}
