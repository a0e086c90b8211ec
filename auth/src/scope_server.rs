//! Which records a child hub is given: the two scope calls, as pure functions.
//!
//! The answers contain keys. So both take the [`ServicePrincipal`], which proves that the
//! `$edgeHub` of the acting device called, and return only what is at or below that device in our
//! tree (section 5, invariant 5). HTTP, and asking upstream before the answer about one identity,
//! are the head's part.
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 7, with rows 4, 6 and 12 of section 13. Beyond the reference:
//! pages; modules of leaves come with the leaf; a disabled edge device is returned itself (so
//! that its parent learns of it), though nothing below it is; an unknown identity is answered
//! with an empty success when upstream has denied it (positive evidence for our child), and with
//! "not now" when upstream could not be asked.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use edgehub_proto::auth_chain::{AuthChain, AuthChainError};
use edgehub_proto::identity::{Identity, IdentityError};
use edgehub_proto::scope::{IdentityRequest, ScopeRequest, ScopeResponse};
use thiserror::Error;

use crate::authenticator::{RefreshOutcome, RefreshQuery, ServicePrincipal};
use crate::limits::{SCOPE_PAGE_SIZE_DEFAULT, SCOPE_PAGE_SIZE_MAX};
use crate::scope_tree::{ScopeTree, ServiceIdentity, WireIdentity};

/// Why a scope call is not answered. `Display` is the text for the caller: short, stable, and
/// without anything that the caller did not send itself.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScopeDenied {
    /// The chain does not end with the caller's device.
    #[error("the authChain does not end with the calling device")]
    ActorNotCaller,
    /// The continuation link is not one of ours.
    #[error("invalid continuationLink")]
    InvalidContinuation,
    /// The chain cannot be read.
    #[error("invalid authChain: {0}")]
    InvalidChain(#[from] AuthChainError),
    /// The ids of the identity that is asked for cannot be ids.
    #[error("invalid target: {0}")]
    InvalidTarget(#[from] IdentityError),
    /// What is asked for is not at or below the caller's device, as far as our tree knows.
    #[error("{identity} is not in the scope of the calling device")]
    NotInScope {
        /// The device or module that was asked for.
        identity: Identity,
    },
    /// The chain begins with a module; scopes belong to devices.
    #[error("the authChain does not begin with a device")]
    TargetNotDevice,
    /// The identity is unknown here, and upstream has not denied it.
    #[error("{identity} is not known now")]
    Undecided {
        /// The identity that was asked for.
        identity: Identity,
    },
}

impl ScopeDenied {
    /// The HTTP status to answer with.
    pub fn status(&self) -> u16 {
        match self {
            Self::InvalidChain(_)
            | Self::InvalidContinuation
            | Self::InvalidTarget(_)
            | Self::TargetNotDevice => 400,
            Self::ActorNotCaller | Self::NotInScope { .. } => 401,
            // A child hub keeps what it knows then; 401 would make it forget the identity.
            Self::Undecided { .. } => 503,
        }
    }
}

/// Answers `devicesAndModulesInTargetDeviceScope`: one page of the target device, its children
/// and the modules of its leaves. Devices come first, then modules, each ordered by id.
///
/// Our own tree is all that is asked. The page size is honoured between 1 and
/// [`SCOPE_PAGE_SIZE_MAX`], [`SCOPE_PAGE_SIZE_DEFAULT`] without one. The link to the next page
/// names the last identity of this one, so that changes in between neither repeat nor skip
/// others; it carries no rights.
///
/// # Errors
/// [`ScopeDenied`]: a request that makes no sense, or a target that is not at or below the
/// caller's device.
pub fn answer_scope(
    tree: &ScopeTree,
    caller: &ServicePrincipal,
    request: &ScopeRequest,
) -> Result<ScopeResponse, ScopeDenied> {
    let target = originator(tree, caller, &request.auth_chain)?;
    let after = match request.continuation_link.as_deref().map(str::trim) {
        None | Some("") => None,
        Some(link) => Some(Position::from_link(link)?),
    };
    let mut members = members(tree, &target)
        .into_iter()
        .filter(|(position, _)| after.as_ref().is_none_or(|after| position > after));
    let page: Vec<_> = members.by_ref().take(page_size(request)).collect();
    let mut response = ScopeResponse::default();
    if members.next().is_some() {
        response.continuation_link = page.last().map(|(position, _)| position.to_link());
    }
    for (_, record) in page {
        push(&mut response, record);
    }
    Ok(response)
}

/// A child hub's question about one identity, found permissible: its head first lets
/// [`Authenticator::refresh`](crate::authenticator::Authenticator::refresh) ask upstream
/// ([`Self::refresh_query`]), then calls [`Self::answer`] with a snapshot taken afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityQuery {
    query: RefreshQuery,
    originator: Identity,
    /// The caller's device.
    actor: Identity,
}

impl IdentityQuery {
    /// Reads a `getDeviceAndModuleOnBehalfOf` request of `caller`.
    ///
    /// # Errors
    /// [`ScopeDenied`]: a request that makes no sense, or an originator (first element of the
    /// chain) that is not at or below the caller's device. Then upstream must not be asked.
    pub fn new(
        tree: &ScopeTree,
        caller: &ServicePrincipal,
        request: &IdentityRequest,
    ) -> Result<Self, ScopeDenied> {
        let originator = originator(tree, caller, &request.auth_chain)?;
        let identity = match request.target_module_id.as_deref() {
            None | Some("") => Identity::device(&request.target_device_id)?,
            Some(module) => Identity::module(&request.target_device_id, module)?,
        };
        let on_behalf_of = originator.device_id().to_owned();
        Ok(Self {
            query: RefreshQuery {
                identity,
                on_behalf_of,
            },
            originator,
            actor: caller.caller().device_identity(),
        })
    }

    /// What to ask upstream before the answer.
    pub fn refresh_query(&self) -> &RefreshQuery {
        &self.query
    }

    /// The answer by `tree`, after upstream said `refreshed`: the identity, for a module also its
    /// device. Empty if upstream has denied it: our child forgets it then, so nothing less counts.
    ///
    /// # Errors
    /// [`ScopeDenied::NotInScope`] for an identity that is not at or below the originator, and for
    /// an originator that has left the caller's scope since the question was found permissible;
    /// [`ScopeDenied::Undecided`] for one that is unknown here though upstream did not deny it.
    pub fn answer(
        &self,
        tree: &ScopeTree,
        refreshed: RefreshOutcome,
    ) -> Result<ScopeResponse, ScopeDenied> {
        let identity = &self.query.identity;
        let mut response = ScopeResponse::default();
        // Upstream took its time, and the tree may be another one since the question came.
        if !tree.contains_ancestor(self.actor.device_id(), &self.originator) {
            return Err(ScopeDenied::NotInScope {
                identity: self.originator.clone(),
            });
        }
        let Some(record) = tree.get(identity) else {
            return match refreshed {
                RefreshOutcome::NotFound => Ok(response),
                // `Refreshed` too: upstream knows it, our tree refused it or lost it again.
                RefreshOutcome::Limited
                | RefreshOutcome::Refreshed
                | RefreshOutcome::Unavailable => Err(ScopeDenied::Undecided {
                    identity: identity.clone(),
                }),
            };
        };
        if !self.may_be_told(tree, identity) {
            return Err(ScopeDenied::NotInScope {
                identity: identity.clone(),
            });
        }
        if identity.is_module()
            && let Some(device) = tree.get(&identity.device_identity())
        {
            push(&mut response, device);
        }
        push(&mut response, record);
        Ok(response)
    }

    /// The originator is an ancestor of `identity`, or the identity itself. When `identity` is a
    /// disabled edge device its own state does not count, that of those above does.
    fn may_be_told(&self, tree: &ScopeTree, identity: &Identity) -> bool {
        let originator = self.originator.device_id();
        if tree.contains_ancestor(originator, identity) {
            return true;
        }
        let chain = tree.try_auth_chain(identity);
        let parent = chain.as_ref().and_then(|chain| chain.elements().get(1));
        !identity.is_module()
            && parent.is_some_and(|parent| tree.contains_ancestor(originator, parent))
    }
}

/// The device on whose behalf `caller` asks: the first element of its chain.
fn originator(
    tree: &ScopeTree,
    caller: &ServicePrincipal,
    auth_chain: &str,
) -> Result<Identity, ScopeDenied> {
    let chain = AuthChain::parse(auth_chain)?;
    let originator = chain.target();
    if originator.is_module() {
        return Err(ScopeDenied::TargetNotDevice);
    }
    // The caller was authenticated with a chain; nothing but this check says that it was this.
    if chain.elements().last() != Some(&caller.caller().device_identity()) {
        return Err(ScopeDenied::ActorNotCaller);
    }
    if !tree.contains_ancestor(caller.actor_device(), originator) {
        return Err(ScopeDenied::NotInScope {
            identity: originator.clone(),
        });
    }
    Ok(originator.clone())
}

/// The target, its children and the modules of its leaves, in the order of their positions.
fn members<'a>(tree: &'a ScopeTree, target: &Identity) -> Vec<(Position, &'a ServiceIdentity)> {
    let children = || tree.children_of(target.device_id());
    let leaves = children().filter(|child| !child.is_edge && !child.identity.is_module());
    let modules_of_leaves = leaves.flat_map(|leaf| tree.children_of(leaf.identity.device_id()));
    let mut members: Vec<_> = tree
        .get(target)
        .into_iter()
        .chain(children())
        .chain(modules_of_leaves)
        .map(|record| (Position::of(&record.identity), &**record))
        .collect();
    members.sort_by(|(a, _), (b, _)| a.cmp(b));
    members
}

fn page_size(request: &ScopeRequest) -> usize {
    let asked = request
        .page_size
        .and_then(|size| usize::try_from(size).ok());
    match asked {
        None | Some(0) => SCOPE_PAGE_SIZE_DEFAULT,
        Some(size) => size.min(SCOPE_PAGE_SIZE_MAX),
    }
}

fn push(response: &mut ScopeResponse, record: &ServiceIdentity) {
    match record.to_wire() {
        WireIdentity::Device(device) => response.devices.push(device),
        WireIdentity::Module(module) => response.modules.push(module),
    }
}

/// Where an identity stands in an answer: devices before modules, then by id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    is_module: bool,
    identity: Identity,
}

impl Position {
    fn of(identity: &Identity) -> Self {
        Self {
            is_module: identity.is_module(),
            identity: identity.clone(),
        }
    }

    /// Opaque to the caller. An id alone says whether it is a module's.
    fn to_link(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.identity.as_str())
    }

    fn from_link(link: &str) -> Result<Self, ScopeDenied> {
        let bytes = URL_SAFE_NO_PAD
            .decode(link)
            .map_err(|_| ScopeDenied::InvalidContinuation)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| ScopeDenied::InvalidContinuation)?;
        let identity = Identity::parse(text).map_err(|_| ScopeDenied::InvalidContinuation)?;
        Ok(Self::of(&identity))
    }
}

#[cfg(test)]
mod tests;
