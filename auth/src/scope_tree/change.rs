//! Applying a batch of changes to a tree: what is refused, what has changed, one new snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use edgehub_proto::identity::Identity;

use super::{Records, ScopeTree, ServiceIdentity, parents};
use crate::limits::SCOPE_IDENTITIES_MAX;

/// A change of the scope, applied as one step.
#[derive(Clone, Debug)]
pub enum ScopeChange {
    /// Removes these; unknown ones are ignored.
    Remove(Vec<Identity>),
    /// Makes exactly these the content of the tree.
    Replace(Vec<ServiceIdentity>),
    /// Inserts or replaces these. The last of several records of one identity counts.
    Upsert(Vec<ServiceIdentity>),
}

/// What happened to the record of one identity.
///
/// Only the identity whose record changed is named. When an edge device is moved, disabled or
/// removed, the chains of everything below it change too: who holds connections of descendants
/// must judge them again by the new tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityChange {
    /// It was not there before.
    Added(Identity),
    /// Some field differs now.
    Changed(Identity),
    /// It is gone.
    Removed(Identity),
}

impl IdentityChange {
    /// Whose record it is.
    pub fn identity(&self) -> &Identity {
        match self {
            Self::Added(identity) | Self::Changed(identity) | Self::Removed(identity) => identity,
        }
    }
}

/// The outcome of applying a [`ScopeChange`].
#[derive(Clone, Debug)]
pub struct Applied {
    /// The new snapshot.
    pub tree: ScopeTree,
    /// What differs from the old one, ordered by id. Empty: nothing does.
    pub changes: Vec<IdentityChange>,
    /// What was refused; the rest of the batch stands, and so does an older record of these.
    pub rejected: Vec<RejectedIdentity>,
}

/// An identity that was not inserted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectedIdentity {
    /// The refused identity.
    pub identity: Identity,
    /// Why.
    pub reason: RejectReason,
}

/// Why an identity was not inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RejectReason {
    /// With it the device would be its own ancestor.
    Cycle,
    /// The tree holds [`SCOPE_IDENTITIES_MAX`] already.
    TooMany,
}

impl fmt::Display for RejectReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Cycle => "the device would be its own ancestor",
            Self::TooMany => "the scope holds too many identities",
        })
    }
}

impl ScopeTree {
    /// Applies a whole batch and links the tree once.
    ///
    /// A record that would close a cycle is refused, and only that: the state *after the batch*
    /// decides, so that a batch may swap two devices in any order.
    pub fn apply(&self, change: ScopeChange) -> Applied {
        let old = self.records();
        let (mut records, inserted) = match change {
            ScopeChange::Remove(identities) => {
                let mut records = old.clone();
                for identity in &identities {
                    records.remove(identity);
                }
                (records, BTreeSet::new())
            }
            ScopeChange::Replace(identities) => merge(&old, Records::new(), identities),
            ScopeChange::Upsert(identities) => merge(&old, old.clone(), identities),
        };
        let mut rejected = drop_surplus(&old, &mut records, &inserted);
        rejected.extend(undo_cycles(self.own_device(), &old, &mut records, inserted));
        let changes = differences(&old, &records);
        let tree = if changes.is_empty() {
            self.clone()
        } else {
            Self::build(self.own_device(), records)
        };
        Applied {
            tree,
            changes,
            rejected,
        }
    }
}

/// Puts `identities` into `records`. An unchanged record keeps its node, so that snapshots share
/// what they have in common.
fn merge(
    old: &Records,
    mut records: Records,
    identities: Vec<ServiceIdentity>,
) -> (Records, BTreeSet<Identity>) {
    let mut inserted = BTreeSet::new();
    for record in identities {
        let identity = record.identity.clone();
        let node = match old.get(&identity) {
            Some(node) if **node == record => Arc::clone(node),
            _ => Arc::new(record),
        };
        records.insert(identity.clone(), node);
        inserted.insert(identity);
    }
    (records, inserted)
}

/// Keeps the tree within its limit at the cost of new identities, in reverse order of their ids.
fn drop_surplus(
    old: &Records,
    records: &mut Records,
    inserted: &BTreeSet<Identity>,
) -> Vec<RejectedIdentity> {
    let surplus = records.len().saturating_sub(SCOPE_IDENTITIES_MAX);
    let new = inserted
        .iter()
        .rev()
        .filter(|identity| !old.contains_key(identity));
    new.take(surplus)
        .map(|identity| {
            records.remove(identity);
            RejectedIdentity {
                identity: identity.clone(),
                reason: RejectReason::TooMany,
            }
        })
        .collect()
}

/// Takes back inserted records until no inserted one is on a cycle.
///
/// Taking one back can close another cycle (its old parent may be a new descendant), hence the
/// loop. It ends because each round takes back at least one, and each only once.
fn undo_cycles(
    own_device: &Identity,
    old: &Records,
    records: &mut Records,
    mut inserted: BTreeSet<Identity>,
) -> Vec<RejectedIdentity> {
    let mut rejected = Vec::new();
    while !inserted.is_empty() {
        let on_cycle = on_a_cycle(&parents(own_device, records));
        let taken_back: Vec<Identity> = on_cycle
            .into_iter()
            .filter(|identity| inserted.remove(identity))
            .collect();
        if taken_back.is_empty() {
            break;
        }
        for identity in taken_back {
            match old.get(&identity) {
                Some(node) => records.insert(identity.clone(), Arc::clone(node)),
                None => records.remove(&identity),
            };
            rejected.push(RejectedIdentity {
                identity,
                reason: RejectReason::Cycle,
            });
        }
    }
    rejected
}

/// Every identity that is its own ancestor. Visits each identity once.
fn on_a_cycle(parents: &BTreeMap<Identity, Identity>) -> Vec<Identity> {
    // Which walk has seen an identity first.
    let mut seen: BTreeMap<&Identity, usize> = BTreeMap::new();
    let mut on_cycle = Vec::new();
    for (walk, start) in parents.keys().enumerate() {
        let mut at = start;
        loop {
            match seen.get(at) {
                Some(earlier) if *earlier == walk => {
                    on_cycle.extend(cycle_from(at, parents));
                    break;
                }
                Some(_) => break,
                None => {}
            }
            seen.insert(at, walk);
            let Some(parent) = parents.get(at) else { break };
            at = parent;
        }
    }
    on_cycle
}

/// The cycle that `start` is on.
fn cycle_from<'a>(
    start: &'a Identity,
    parents: &'a BTreeMap<Identity, Identity>,
) -> impl Iterator<Item = Identity> + 'a {
    let after_start = std::iter::successors(parents.get(start), move |at| parents.get(*at));
    std::iter::once(start)
        .chain(after_start.take_while(move |at| *at != start))
        .cloned()
}

fn differences(old: &Records, new: &Records) -> Vec<IdentityChange> {
    let mut changes = Vec::new();
    for (identity, record) in new {
        match old.get(identity) {
            None => changes.push(IdentityChange::Added(identity.clone())),
            Some(before) if before != record => {
                changes.push(IdentityChange::Changed(identity.clone()));
            }
            Some(_) => {}
        }
    }
    let gone = old.keys().filter(|identity| !new.contains_key(identity));
    changes.extend(gone.cloned().map(IdentityChange::Removed));
    changes.sort_by(|a, b| a.identity().cmp(b.identity()));
    changes
}
