//! One walk through the scope, breadth first, without a network: which pages to ask for, what to
//! take over, and in the end what is gone.
//!
//! # What counts as gone
//!
//! An identity is removed only if the list of the edge device that it belongs to came completely
//! and nothing in the whole walk named it, or if what it hangs on was removed. Where a list did not
//! come (an error, a disabled or too deep edge device) everything below stays. Modules of leaf
//! devices are not part of every upstream's list: those are named as doubtful instead, to be asked
//! about one by one.
//!
//! Spec: auth-hierarchy-http.md 4.4 and 13 #1, #2, #6.

use std::collections::{HashMap, HashSet, VecDeque};

use edgehub_auth::scope_tree::{ScopeTree, ServiceIdentity};
use edgehub_proto::{identity::Identity, scope::ScopeResponse};
use tracing::warn;

use crate::limits;

/// A page that is to be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Visit {
    /// The edge device whose scope it is.
    pub(crate) device: Identity,
    /// Link of the page before.
    pub(crate) continuation: Option<String>,
    /// Pages of this device before this one.
    page: usize,
}

/// How an edge device's list ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    /// All pages came.
    Complete,
    /// Some page did not.
    Failed,
    /// It was not asked for: disabled, too deep.
    Skipped,
    /// Pages are still to come.
    UnderWay,
}

/// The walk.
#[derive(Debug)]
pub(crate) struct Walk {
    own: Identity,
    pending: VecDeque<Visit>,
    under_way: usize,
    listings: HashMap<Identity, Listing>,
    seen: HashSet<Identity>,
}

/// What a walk found out beside the records themselves.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WalkResult {
    /// In the tree, and proven not to be in the scope any more.
    pub(crate) gone: Vec<Identity>,
    /// In the tree and not named, but that proves nothing.
    pub(crate) doubtful: Vec<Identity>,
    /// Edge devices whose list did not come.
    pub(crate) failed: Vec<Identity>,
}

impl Walk {
    /// Starts at our own device.
    pub(crate) fn new(own_device: Identity) -> Self {
        let mut walk = Self {
            own: own_device.clone(),
            pending: VecDeque::new(),
            under_way: 0,
            listings: HashMap::new(),
            seen: HashSet::new(),
        };
        walk.enqueue(own_device);
        walk
    }

    /// The next page to ask for. [`Walk::page`], [`Walk::failed`] or [`Walk::skipped`] answers it.
    pub(crate) fn next(&mut self) -> Option<Visit> {
        let visit = self.pending.pop_front()?;
        self.under_way += 1;
        Some(visit)
    }

    /// Nothing is left to ask for and nothing under way.
    pub(crate) fn is_done(&self) -> bool {
        self.pending.is_empty() && self.under_way == 0
    }

    /// A page came. Gives the records to take over; identities that make no sense are left out.
    pub(crate) fn page(&mut self, visit: Visit, page: ScopeResponse) -> Vec<ServiceIdentity> {
        self.under_way = self.under_way.saturating_sub(1);
        let mut records = Vec::with_capacity(page.devices.len() + page.modules.len());
        let devices = page.devices.into_iter().map(ServiceIdentity::try_from);
        let modules = page.modules.into_iter().map(ServiceIdentity::try_from);
        for converted in devices.chain(modules) {
            match converted {
                Ok(record) => records.push(record),
                Err(error) => warn!(scope_of = %visit.device, %error, "scope record ignored"),
            }
        }
        for record in &records {
            self.seen.insert(record.identity.clone());
            if record.is_edge && !self.listings.contains_key(&record.identity) {
                self.enqueue(record.identity.clone());
            }
        }
        let next = page
            .continuation_link
            .filter(|link| !link.trim().is_empty());
        let state = match next {
            None => Listing::Complete,
            Some(link)
                if visit.page + 1 < limits::SCOPE_PAGES_MAX
                    && visit.continuation.as_ref() != Some(&link) =>
            {
                let device = visit.device.clone();
                let page = visit.page + 1;
                self.pending.push_back(Visit {
                    device,
                    continuation: Some(link),
                    page,
                });
                Listing::UnderWay
            }
            Some(_) => {
                warn!(scope_of = %visit.device, "scope list does not end");
                Listing::Failed
            }
        };
        self.listings.insert(visit.device, state);
        records
    }

    /// A page did not come. What hangs on other edge devices goes on.
    pub(crate) fn failed(&mut self, visit: Visit) {
        self.under_way = self.under_way.saturating_sub(1);
        self.listings.insert(visit.device, Listing::Failed);
    }

    /// The edge device has no chain, so its scope cannot be asked for.
    pub(crate) fn skipped(&mut self, visit: Visit) {
        self.under_way = self.under_way.saturating_sub(1);
        self.listings.insert(visit.device, Listing::Skipped);
    }

    /// The upstream has named these apart from the pages.
    pub(crate) fn named(&mut self, identities: impl IntoIterator<Item = Identity>) {
        self.seen.extend(identities);
    }

    /// What follows from the walk for `tree`, which already has the walk's records.
    pub(crate) fn finish(self, tree: &ScopeTree) -> WalkResult {
        let mut result = WalkResult::default();
        let of_state = |state: Listing| {
            self.listings
                .iter()
                .filter(move |(_, is)| **is == state)
                .map(|(id, _)| id.clone())
        };
        result.failed = of_state(Listing::Failed)
            .chain(of_state(Listing::UnderWay))
            .collect();
        result.failed.sort();
        // From the root down: each device with whether it was removed itself.
        let mut devices = vec![(self.own.clone(), false)];
        let mut visited = HashSet::new();
        while let Some((device, is_gone)) = devices.pop() {
            if !visited.insert(device.clone()) {
                continue;
            }
            let is_listed = self.listings.get(&device) == Some(&Listing::Complete);
            for child in tree.children_of(device.device_id()) {
                let child_id = &child.identity;
                let named = self.seen.contains(child_id) || self.is_ours(child_id);
                let child_is_gone = !named && (is_gone || is_listed);
                if child_is_gone {
                    result.gone.push(child_id.clone());
                } else if !named && !self.listings.contains_key(&device) {
                    // Below a leaf, which has no list of its own.
                    result.doubtful.push(child_id.clone());
                }
                if !child_id.is_module() {
                    devices.push((child_id.clone(), child_is_gone));
                }
            }
        }
        if result.failed.is_empty() {
            result.gone.extend(self.dangling(tree, &visited));
        }
        result.gone.sort();
        result.doubtful.sort();
        result
    }

    /// After a walk without a failure, records that hang on nothing and that nobody named are gone
    /// too.
    fn dangling(&self, tree: &ScopeTree, visited: &HashSet<Identity>) -> Vec<Identity> {
        let hangs = |identity: &Identity| {
            if identity.is_module() {
                visited.contains(&identity.device_identity())
            } else {
                visited.contains(identity)
            }
        };
        tree.iter()
            .map(|record| &record.identity)
            .filter(|id| !hangs(id) && !self.seen.contains(*id) && !self.is_ours(id))
            .cloned()
            .collect()
    }

    fn is_ours(&self, identity: &Identity) -> bool {
        *identity == self.own
            || (identity.is_edge_hub() && identity.device_id() == self.own.device_id())
    }

    fn enqueue(&mut self, device: Identity) {
        self.listings.insert(device.clone(), Listing::UnderWay);
        self.pending.push_back(Visit {
            device,
            continuation: None,
            page: 0,
        });
    }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
