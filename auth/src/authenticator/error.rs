//! Why somebody is not let in, and whether that is the last word.

use std::fmt;

use edgehub_proto::identity::Identity;
use edgehub_proto::sas::SasError;
use thiserror::Error;

/// Why a claim was not accepted. Each variant is a diagnosis; none contains a secret.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthnError {
    /// The acting device is not above the target in our tree: a sibling, a stranger.
    #[error("{actor} is not an edge device above {target}")]
    ActorNotAncestor {
        /// The device that wants to act.
        actor: Identity,
        /// On whose behalf.
        target: Identity,
    },
    /// The last element of the chain is a module: only devices act, through their `$edgeHub`.
    #[error("{actor} cannot act on behalf of others: it is not a device")]
    ActorNotDevice {
        /// The last element.
        actor: Identity,
    },
    /// The last element of the chain is not the device that calls (13 #3).
    #[error("the chain ends with {actor}, but {caller} calls")]
    ActorNotCaller {
        /// The last element.
        actor: Identity,
        /// Who calls, by the URL.
        caller: Identity,
    },
    /// Certificates do not authenticate yet.
    #[error("certificates are not supported yet")]
    CertificateNotSupported,
    /// The chain is about another identity than the session.
    #[error("the chain is for {target}, the session for {identity}")]
    ChainNotForIdentity {
        /// The first element.
        target: Identity,
        /// Whose session was asked for.
        identity: Identity,
    },
    /// The identity, or the device of the module, is disabled.
    #[error("{device} is disabled")]
    Disabled {
        /// The disabled device.
        device: Identity,
    },
    /// An edge device between us and the identity is disabled, so all below it is.
    #[error("{identity} is below the disabled edge device {edge_device}")]
    EdgeDeviceDisabled {
        /// Who wanted in.
        identity: Identity,
        /// The disabled edge device.
        edge_device: Identity,
    },
    /// The token cannot be read.
    #[error("malformed token: {0}")]
    MalformedToken(#[from] SasError),
    /// Neither a token nor a certificate was presented.
    #[error("no credential")]
    NoCredential,
    /// Only `$edgeHub` modules may make this call.
    #[error("{caller} is not an edge hub")]
    NotEdgeHub {
        /// Who calls, by the URL.
        caller: Identity,
    },
    /// The identity has no usable symmetric key: another kind of authentication, or none.
    #[error("{identity} has no usable symmetric key")]
    NoUsableKey {
        /// Whose key was needed.
        identity: Identity,
    },
    /// The identity is known, but nothing connects it to our device.
    #[error("{identity} is not connected to this device's scope")]
    OutOfScope {
        /// Who wanted in.
        identity: Identity,
    },
    /// More than five edge devices lead to it.
    #[error("{identity} is too deep in the hierarchy")]
    TooDeep {
        /// Who wanted in.
        identity: Identity,
    },
    /// The token's time is over, the clock skew included.
    #[error("the token expired at {expired_at_ms} ms")]
    TokenExpired {
        /// Its `se`, as Unix milliseconds.
        expired_at_ms: u64,
    },
    /// It cannot be decided now; [`Undecided`] says why. Trying again later makes sense.
    #[error("cannot decide about {identity} now: {cause}")]
    Undecided {
        /// Who would have to be known.
        identity: Identity,
        /// What keeps us from knowing.
        cause: Undecided,
    },
    /// Nobody knows this identity.
    #[error("{identity} is unknown")]
    UnknownIdentity {
        /// The identity.
        identity: Identity,
    },
    /// The token is for another identity or another hub.
    #[error("the token is not for {identity}")]
    WrongAudience {
        /// For whom it would have to be.
        identity: Identity,
    },
    /// No key of the identity made this signature.
    #[error("wrong signature for {identity}")]
    WrongSignature {
        /// Whose key was needed.
        identity: Identity,
    },
}

/// What keeps us from deciding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undecided {
    /// An edge device between the identity and us is not known yet.
    AncestorUnknown,
    /// The scope was never walked nor restored.
    NotInitialised,
    /// Upstream is not asked more often than its limit allows.
    RefreshLimited,
    /// Upstream did not answer in time.
    RefreshTimedOut,
    /// Upstream is not reachable.
    UpstreamUnavailable,
}

impl fmt::Display for Undecided {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::AncestorUnknown => "an edge device above it is not known yet",
            Self::NotInitialised => "the scope is not known yet",
            Self::RefreshLimited => "upstream was asked too often",
            Self::RefreshTimedOut => "upstream did not answer in time",
            Self::UpstreamUnavailable => "upstream is not reachable",
        })
    }
}

impl AuthnError {
    /// Whether this is a definite no (MQTT CONNACK 5, HTTP 401), or only not decidable now
    /// (CONNACK 3, HTTP 503). See design.md D6.
    pub fn is_definite(&self) -> bool {
        !matches!(self, Self::Undecided { .. })
    }

    /// A short stable name for metrics and log fields.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::ActorNotAncestor { .. } => "actor_not_ancestor",
            Self::ActorNotDevice { .. } => "actor_not_device",
            Self::ActorNotCaller { .. } => "actor_not_caller",
            Self::CertificateNotSupported => "certificate_not_supported",
            Self::ChainNotForIdentity { .. } => "chain_not_for_identity",
            Self::Disabled { .. } => "disabled",
            Self::EdgeDeviceDisabled { .. } => "edge_device_disabled",
            Self::MalformedToken(_) => "malformed_token",
            Self::NoCredential => "no_credential",
            Self::NotEdgeHub { .. } => "not_edge_hub",
            Self::NoUsableKey { .. } => "no_usable_key",
            Self::OutOfScope { .. } => "out_of_scope",
            Self::TooDeep { .. } => "too_deep",
            Self::TokenExpired { .. } => "token_expired",
            Self::Undecided { cause, .. } => match cause {
                Undecided::AncestorUnknown => "ancestor_unknown",
                Undecided::NotInitialised => "not_initialised",
                Undecided::RefreshLimited => "refresh_limited",
                Undecided::RefreshTimedOut => "refresh_timed_out",
                Undecided::UpstreamUnavailable => "upstream_unavailable",
            },
            Self::UnknownIdentity { .. } => "unknown_identity",
            Self::WrongAudience { .. } => "wrong_audience",
            Self::WrongSignature { .. } => "wrong_signature",
        }
    }
}
