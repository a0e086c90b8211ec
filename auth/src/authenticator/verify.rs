//! The rules: a claim, a snapshot of the scope, a moment in time; no I/O, no waiting.
//!
//! # Ordering
//! What no refresh could change is checked first (the token's form, expiry and audience), so that
//! garbage never costs a call upstream. Then the credential, and only for a proven actor its
//! target: an unauthenticated client cannot make us ask about targets on behalf of others.
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 2.3-2.5, 3.1 and 5, with rows 3, 7, 19 and 25 of section 13.
//! Stricter than the reference: an identity without chain to us does not connect directly either;
//! modules of a disabled device, and disabled targets of an actor, are refused; `$edgeHub` never
//! falls back to its device's key; an actor must be an edge device.

use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::Identity;
use edgehub_proto::sas::{self, SasToken};

use super::claim::{
    AudienceHosts, Claim, Credential, Principal, ServiceClaim, ServicePrincipal, TokenProof,
};
use super::error::AuthnError;
use crate::limits::TOKEN_SKEW_MS;
use crate::sas_signer;
use crate::scope_tree::{NoChain, ScopeTree, ServiceIdentity};

/// What one snapshot of the scope says about a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<P = Principal> {
    /// It is true.
    Accepted(P),
    /// It is not, whatever upstream knows.
    Refused(AuthnError),
    /// It is not by this snapshot, but the snapshot may be out of date.
    Stale(Stale),
}

/// A refusal that newer knowledge could change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stale {
    /// The refusal by the snapshot at hand.
    pub error: AuthnError,
    /// Whose record decides.
    pub query: RefreshQuery,
}

/// Which record to fetch, and in whose name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefreshQuery {
    /// The identity that is asked about.
    pub identity: Identity,
    /// Device id of the edge device on whose behalf upstream is asked: ours, or a proven actor's.
    pub on_behalf_of: String,
}

/// Judges a client's claim by one snapshot.
pub fn verify(
    tree: &ScopeTree,
    audience_hosts: &AudienceHosts,
    claim: &Claim,
    now_ms: u64,
) -> Verdict {
    judge(
        Presented::new(tree, audience_hosts, &claim.credential, now_ms),
        |presented| {
            let target = &claim.identity;
            let actor = match &claim.chain {
                Some(chain) if chain.target() != target => {
                    let (target, identity) = (chain.target().clone(), target.clone());
                    return Err(AuthnError::ChainNotForIdentity { target, identity }.into());
                }
                Some(chain) => chain.actor(),
                None => None,
            };
            match actor {
                Some(actor) => presented.on_behalf_of(target, actor),
                None => {
                    let proof = presented.owner(target)?;
                    Ok(Principal::new(target.clone(), None, proof))
                }
            }
        },
    )
}

/// Judges the claim of a scope or registry call's caller by one snapshot: a `$edgeHub`, with its
/// own key and an audience that names it or its device, in whose device the chain ends (13 #3).
///
/// Whether the caller may have what it asks for is decided by [`crate::scope_server`].
pub fn verify_service(
    tree: &ScopeTree,
    audience_hosts: &AudienceHosts,
    claim: &ServiceClaim,
    now_ms: u64,
) -> Verdict<ServicePrincipal> {
    judge(
        Presented::new(tree, audience_hosts, &claim.credential, now_ms),
        |presented| {
            let caller = &claim.caller;
            let actor = claim
                .chain
                .elements()
                .last()
                .unwrap_or_else(|| claim.chain.target());
            if !caller.is_edge_hub() {
                return Err(AuthnError::NotEdgeHub {
                    caller: caller.clone(),
                }
                .into());
            }
            if *actor != caller.device_identity() {
                let (actor, caller) = (actor.clone(), caller.clone());
                return Err(AuthnError::ActorNotCaller { actor, caller }.into());
            }
            let proof = presented.owner(caller)?;
            if !tree.contains_ancestor(caller.device_id(), caller) {
                return Err(AuthnError::NotEdgeHub {
                    caller: caller.clone(),
                }
                .into());
            }
            Ok(ServicePrincipal::new(caller.clone(), proof))
        },
    )
}

fn judge<'a, P>(
    presented: Result<Presented<'a>, AuthnError>,
    rules: impl FnOnce(&Presented<'a>) -> Result<P, Refusal>,
) -> Verdict<P> {
    match presented
        .map_err(Refusal::from)
        .and_then(|presented| rules(&presented))
    {
        Ok(proof) => Verdict::Accepted(proof),
        Err(Refusal::Final(error)) => Verdict::Refused(error),
        Err(Refusal::Stale(stale)) => Verdict::Stale(stale),
    }
}

/// A readable token that has not expired, and what it is judged by.
struct Presented<'a> {
    tree: &'a ScopeTree,
    hosts: &'a AudienceHosts,
    token: SasToken,
}

enum Refusal {
    Final(AuthnError),
    Stale(Stale),
}

impl From<AuthnError> for Refusal {
    fn from(error: AuthnError) -> Self {
        Self::Final(error)
    }
}

impl Refusal {
    fn stale(error: AuthnError, identity: &Identity, on_behalf_of: &str) -> Self {
        let query = RefreshQuery {
            identity: identity.clone(),
            on_behalf_of: on_behalf_of.to_owned(),
        };
        Self::Stale(Stale { error, query })
    }
}

impl<'a> Presented<'a> {
    fn new(
        tree: &'a ScopeTree,
        hosts: &'a AudienceHosts,
        credential: &Credential,
        now_ms: u64,
    ) -> Result<Self, AuthnError> {
        let token = match credential {
            Credential::Certificate(_) => return Err(AuthnError::CertificateNotSupported),
            Credential::None => return Err(AuthnError::NoCredential),
            // An empty password is how a client says that it has none (spec/mqtt.md 2.1).
            Credential::Sas(text) if text.is_empty() => return Err(AuthnError::NoCredential),
            Credential::Sas(text) => SasToken::parse(text)?,
        };
        // Valid while `se + skew >= now` (2.4).
        if token.expires_at_ms().saturating_add(TOKEN_SKEW_MS) < now_ms {
            return Err(AuthnError::TokenExpired {
                expired_at_ms: token.expires_at_ms(),
            });
        }
        Ok(Self { tree, hosts, token })
    }

    /// The `$edgeHub` of `actor` presents the token, for the session of `target` (section 5).
    ///
    /// Of the chain that was received nothing but these two counts; our own tree decides whether
    /// the one is above the other.
    fn on_behalf_of(&self, target: &Identity, actor: &Identity) -> Result<Principal, Refusal> {
        let hub = Identity::edge_hub(actor.device_id());
        let (Ok(hub), false) = (hub, actor.is_module()) else {
            return Err(AuthnError::ActorNotDevice {
                actor: actor.clone(),
            }
            .into());
        };
        let proof = self.owner(&hub)?;
        let chain = self.standing(target, actor.device_id())?;
        if !self.tree.names_actor(&chain, actor.device_id()) {
            let error = AuthnError::ActorNotAncestor {
                actor: actor.clone(),
                target: target.clone(),
            };
            return Err(Refusal::stale(error, target, actor.device_id()));
        }
        Ok(Principal::new(target.clone(), Some(actor.clone()), proof))
    }

    /// The token belongs to `owner`, who is in scope and enabled, and signed with its key.
    fn owner(&self, owner: &Identity) -> Result<TokenProof, Refusal> {
        let mut audiences = sas::audiences(self.token.resource_raw());
        if !audiences.any(|audience| self.names(&audience, owner)) {
            return Err(AuthnError::WrongAudience {
                identity: owner.clone(),
            }
            .into());
        }
        self.standing(owner, self.tree.own_device().device_id())?;
        self.signature(owner)
    }

    /// The audience is a known host and `identity`, or the device of a module (2.3). Ids are
    /// compared whole; their case does not matter, because the daemon's identity service writes
    /// the whole audience in lower case. The signature tells `Leaf1` and `leaf1` apart.
    fn names(&self, audience: &sas::Audience, identity: &Identity) -> bool {
        let module = audience.module_id.as_deref();
        self.hosts.contains(&audience.host)
            && audience
                .device_id
                .eq_ignore_ascii_case(identity.device_id())
            && module.is_none_or(|module| {
                identity
                    .module_id()
                    .is_some_and(|known| module.eq_ignore_ascii_case(known))
            })
    }

    /// `identity` is known, connected to us, and neither it nor an edge device above is disabled.
    fn standing(&self, identity: &Identity, on_behalf_of: &str) -> Result<AuthChain, Refusal> {
        let own_device = self.tree.own_device().device_id();
        let who = || identity.clone();
        let no_chain = match self.tree.resolve_auth_chain(identity) {
            Ok(chain) => {
                let device = identity.device_identity();
                if self
                    .tree
                    .get(&device)
                    .is_none_or(|device| device.is_enabled())
                {
                    return Ok(chain);
                }
                NoChain::Disabled {
                    edge_device: device,
                }
            }
            Err(no_chain) => no_chain,
        };
        let error = match no_chain {
            NoChain::Dangling { .. } => AuthnError::OutOfScope { identity: who() },
            NoChain::Disabled { edge_device } => {
                let error = if edge_device == identity.device_identity() {
                    AuthnError::Disabled {
                        device: edge_device.clone(),
                    }
                } else {
                    let edge_device = edge_device.clone();
                    AuthnError::EdgeDeviceDisabled {
                        identity: who(),
                        edge_device,
                    }
                };
                return Err(Refusal::stale(error, &edge_device, own_device));
            }
            NoChain::TooDeep => AuthnError::TooDeep { identity: who() },
            NoChain::Unknown => AuthnError::UnknownIdentity { identity: who() },
        };
        Err(Refusal::stale(error, identity, on_behalf_of))
    }

    /// A key of `owner` made the signature: its primary, its secondary, and for a module those of
    /// its device (2.5). Never so for `$edgeHub`: a device's key must not act for others.
    fn signature(&self, owner: &Identity) -> Result<TokenProof, Refusal> {
        let device = owner.device_identity();
        let own_device = self.tree.own_device().device_id();
        let Some(record) = self.tree.get(owner) else {
            // Only ourselves we know without a record.
            let error = AuthnError::UnknownIdentity {
                identity: owner.clone(),
            };
            return Err(Refusal::stale(error, owner, own_device));
        };
        let fallback = if owner.is_module() && !owner.is_edge_hub() {
            self.tree.get(&device)
        } else {
            None
        };
        let signed = self.string_to_sign();
        let by_own_key = self.matches(record, &signed);
        if by_own_key == Some(true) {
            return Ok(TokenProof::new(self.token.expires_at_ms(), false));
        }
        let by_device_key = fallback.and_then(|device| self.matches(device, &signed));
        if by_device_key == Some(true) {
            return Ok(TokenProof::new(self.token.expires_at_ms(), true));
        }
        let identity = owner.clone();
        let error = match by_own_key.or(by_device_key) {
            Some(_) => AuthnError::WrongSignature { identity },
            None => AuthnError::NoUsableKey { identity },
        };
        Err(Refusal::stale(error, owner, own_device))
    }

    /// Whether one of the record's keys made the signature; none without any usable key.
    fn matches(&self, record: &ServiceIdentity, signed: &str) -> Option<bool> {
        let keys = record.authentication.symmetric_keys();
        keys.filter_map(|key| sas_signer::verify(key.reveal(), signed, self.token.signature()).ok())
            .reduce(|one, other| one || other)
    }

    fn string_to_sign(&self) -> String {
        self.token.string_to_sign()
    }
}
