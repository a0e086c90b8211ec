//! The scope tree: every identity at or below our own device, and who is below whom.
//!
//! A [`ScopeTree`] is an immutable snapshot. It answers chains and ancestry from its own records
//! alone; it knows no clock, no upstream and no tokens. [`crate::scope_cache`] publishes
//! snapshots.
//!
//! # Invariants
//! - The root is our own device, whatever its record says about a parent.
//! - A module's parent is its device. A device's parent is the edge device whose own scope is the
//!   first known of its parent scopes. So the order of insertion does not matter: a node without
//!   parent dangles (no chain) until the parent appears.
//! - Ids and scopes are compared whole, never as prefixes.
//! - The walk from a node to the root is bounded by [`EDGE_DEVICES_PER_CHAIN_MAX`], so not even a
//!   cycle in the records could make it endless.
//!
//! # Cost
//! Every change links the whole map again: for *n* identities about *n* reference counts, *n*
//! ordered insertions and one hash map of the edge devices' scopes (some 20 ms for
//! 10,000). A batch links once, however many identities it has; so callers hand over pages, not
//! single records, when they have them. A lookup is `O(log n)`, a chain at most seven of them.
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 4.2, with rows 1 and 2 of section 13.

mod change;
mod identity;
mod wire;

#[cfg(test)]
mod oracle_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::Identity;

pub use change::{Applied, IdentityChange, RejectReason, RejectedIdentity, ScopeChange};
pub use identity::{Authentication, KeyMaterial, ServiceIdentity, Status};
pub use wire::{ConvertError, WireIdentity};

use crate::limits::EDGE_DEVICES_PER_CHAIN_MAX;

/// Records by id: what a tree is built from.
type Records = BTreeMap<Identity, Arc<ServiceIdentity>>;

/// An immutable snapshot of our scope. See the module's documentation.
#[derive(Clone, Debug)]
pub struct ScopeTree {
    own_device: Identity,
    nodes: BTreeMap<Identity, Node>,
}

#[derive(Clone, Debug)]
struct Node {
    record: Arc<ServiceIdentity>,
    parent: Option<Identity>,
    /// Ordered, because nodes are linked in order.
    children: Vec<Identity>,
}

/// Why an identity has no chain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoChain {
    /// Its parent, or an ancestor's, is not in the tree.
    Dangling {
        /// The topmost identity that is known on the way up.
        highest: Identity,
    },
    /// This edge device of the chain (the identity itself, if it is one) is disabled.
    Disabled {
        /// The disabled one that is nearest to the identity.
        edge_device: Identity,
    },
    /// More than [`EDGE_DEVICES_PER_CHAIN_MAX`] edge devices, or a cycle.
    TooDeep,
    /// Not in the tree.
    Unknown,
}

impl ScopeTree {
    /// An empty tree of `own_device` (for a module: of its device).
    pub fn new(own_device: &Identity) -> Self {
        Self {
            own_device: own_device.device_identity(),
            nodes: BTreeMap::new(),
        }
    }

    /// The root: the device that this hub runs on.
    pub fn own_device(&self) -> &Identity {
        &self.own_device
    }

    /// Number of identities.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no identity at all.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The record of `identity`, whether it has a chain or not.
    pub fn get(&self, identity: &Identity) -> Option<&Arc<ServiceIdentity>> {
        self.nodes.get(identity).map(|node| &node.record)
    }

    /// All records, ordered by id, whether they have a chain or not.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ServiceIdentity>> {
        self.nodes.values().map(|node| &node.record)
    }

    /// The immediate children of `device`, ordered by id: edge devices, leaves and modules.
    /// Empty for an unknown device.
    pub fn children_of(&self, device: &str) -> impl Iterator<Item = &Arc<ServiceIdentity>> {
        Identity::device(device)
            .ok()
            .and_then(|device| self.nodes.get(&device))
            .into_iter()
            .flat_map(|node| &node.children)
            .filter_map(|child| self.get(child))
    }

    /// The chain from `target` up to our own device, as it is sent upstream; none if the target
    /// is unknown, dangles or is too deep, or if any edge device of the chain (the target
    /// included) is disabled. A disabled *leaf* has a chain: its own authentication fails.
    ///
    /// Our own device and its `$edgeHub` always have one, even in an empty tree.
    pub fn auth_chain(&self, target: &Identity) -> Option<AuthChain> {
        self.resolve_auth_chain(target).ok()
    }

    /// As [`Self::auth_chain`], with the reason when there is none.
    ///
    /// # Errors
    /// [`NoChain`] says which rule hides the chain.
    pub fn resolve_auth_chain(&self, target: &Identity) -> Result<AuthChain, NoChain> {
        let path = self.path_to_root(target)?;
        let disabled = path.iter().find(|id| {
            // Ourselves we cannot hide from ourselves: with an own device that upstream disabled
            // our hub still has to be able to ask whether that has changed.
            !self.is_ours(target)
                && self
                    .get(id)
                    .is_some_and(|it| it.is_edge && !it.is_enabled())
        });
        if let Some(edge_device) = disabled {
            return Err(NoChain::Disabled {
                edge_device: edge_device.clone(),
            });
        }
        // The path is neither empty nor longer than the codec's limit.
        AuthChain::new(path).map_err(|_| NoChain::TooDeep)
    }

    /// As [`Self::auth_chain`], but disabled edge devices do not hide the chain. For diagnosis
    /// and for scope answers about a disabled device; never a reason to let anybody in.
    pub fn try_auth_chain(&self, target: &Identity) -> Option<AuthChain> {
        self.path_to_root(target)
            .ok()
            .and_then(|path| AuthChain::new(path).ok())
    }

    /// Whether `target` has a chain and the *edge device* `actor_device` is in it: an ancestor,
    /// or the target itself. This is the whole test of OnBehalfOf (section 5, invariant 3).
    pub fn contains_ancestor(&self, actor_device: &str, target: &Identity) -> bool {
        self.auth_chain(target)
            .is_some_and(|chain| self.names_actor(&chain, actor_device))
    }

    /// Whether `chain`, made by this tree, contains the edge device `actor_device`.
    pub(crate) fn names_actor(&self, chain: &AuthChain, actor_device: &str) -> bool {
        chain.elements().iter().any(|element| {
            element.as_str() == actor_device
                && (*element == self.own_device || self.get(element).is_some_and(|it| it.is_edge))
        })
    }

    /// A tree with `identities` inserted or replaced; linked once for all of them.
    pub fn with(&self, identities: Vec<ServiceIdentity>) -> Applied {
        self.apply(ScopeChange::Upsert(identities))
    }

    /// A tree without `identities`; unknown ones are ignored. What was below them dangles.
    pub fn without(&self, identities: Vec<Identity>) -> Applied {
        self.apply(ScopeChange::Remove(identities))
    }

    fn is_ours(&self, identity: &Identity) -> bool {
        *identity == self.own_device || self.is_own_hub(identity)
    }

    fn is_own_hub(&self, identity: &Identity) -> bool {
        identity.is_edge_hub() && identity.device_id() == self.own_device.device_id()
    }

    /// `target` first, our own device last.
    fn path_to_root(&self, target: &Identity) -> Result<Vec<Identity>, NoChain> {
        if *target == self.own_device {
            return Ok(vec![target.clone()]);
        }
        if self.is_own_hub(target) {
            return Ok(vec![target.clone(), self.own_device.clone()]);
        }
        let mut node = self.nodes.get(target).ok_or(NoChain::Unknown)?;
        let mut path = Vec::with_capacity(EDGE_DEVICES_PER_CHAIN_MAX + 2);
        let mut edge_devices = 0;
        loop {
            let identity = &node.record.identity;
            if node.record.is_edge || *identity == self.own_device {
                edge_devices += 1;
            }
            if edge_devices > EDGE_DEVICES_PER_CHAIN_MAX {
                return Err(NoChain::TooDeep);
            }
            path.push(identity.clone());
            if *identity == self.own_device {
                return Ok(path);
            }
            // Every parent but the device of a module is an edge device, so the count above ends
            // this loop.
            let parent = node
                .parent
                .as_ref()
                .and_then(|parent| self.nodes.get(parent));
            node = parent.ok_or_else(|| NoChain::Dangling {
                highest: identity.clone(),
            })?;
        }
    }

    /// Links `records` into a tree.
    fn build(own_device: &Identity, records: Records) -> Self {
        let parents = parents(own_device, &records);
        let mut nodes: BTreeMap<Identity, Node> = records
            .into_iter()
            .map(|(identity, record)| {
                let parent = parents.get(&identity).cloned();
                (
                    identity,
                    Node {
                        record,
                        parent,
                        children: Vec::new(),
                    },
                )
            })
            .collect();
        for (child, parent) in parents {
            if let Some(node) = nodes.get_mut(&parent) {
                node.children.push(child);
            }
        }
        Self {
            own_device: own_device.clone(),
            nodes,
        }
    }

    fn records(&self) -> Records {
        self.nodes
            .iter()
            .map(|(id, node)| (id.clone(), Arc::clone(&node.record)))
            .collect()
    }
}

/// Child to parent, ordered by child, for every record whose parent is known.
fn parents(own_device: &Identity, records: &Records) -> BTreeMap<Identity, Identity> {
    let scopes = edge_devices_by_scope(own_device, records);
    records
        .values()
        .filter(|record| record.identity != *own_device)
        .filter_map(|record| {
            let parent = if record.identity.is_module() {
                let device = record.identity.device_identity();
                records.contains_key(&device).then_some(device)
            } else {
                let mut known = record
                    .parent_scopes
                    .iter()
                    .map(|scope| scopes.get(scope.as_str()));
                known.find_map(|parent| parent.copied().cloned())
            };
            parent.map(|parent| (record.identity.clone(), parent))
        })
        .collect()
}

/// IoT Hub gives every edge device its own scope. Should two records claim the same one, our own
/// device has it, otherwise the smallest id: the result never depends on the order of insertion.
fn edge_devices_by_scope<'a>(
    own_device: &'a Identity,
    records: &'a Records,
) -> HashMap<&'a str, &'a Identity> {
    let own = records.get(own_device);
    let mut scopes = HashMap::new();
    for record in own.into_iter().chain(records.values()) {
        if let Some(scope) = record.own_scope() {
            scopes.entry(scope).or_insert(&record.identity);
        }
    }
    scopes
}
