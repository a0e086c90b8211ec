//! The current scope: one snapshot that everybody reads, and one place that changes it.
//!
//! Readers take [`ScopeCache::current`] without a lock and keep the snapshot for one decision.
//! Writers (the walk, a single refresh, the restore at start) go through [`ScopeCache::apply`],
//! one at a time. The cache persists nothing and asks nobody: that is the bridge's part.
//!
//! # Ordering
//! A snapshot is visible in [`ScopeCache::current`] before its version is in
//! [`ScopeCache::subscribe`] and before [`ScopeCache::apply`] returns.
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 4.3 (initialised after a restore with at least one entry) and 4.6
//! (what follows from a change).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::warn;

use crate::scope_tree::ScopeTree;
pub use crate::scope_tree::{IdentityChange, ScopeChange};

/// The current [`ScopeTree`] and whether it can be trusted to be complete.
#[derive(Debug)]
pub struct ScopeCache {
    current: ArcSwap<ScopeTree>,
    /// Serialises writers: each builds its snapshot from the one before. Readers never take it.
    writer: Mutex<()>,
    initialised: AtomicBool,
    version: watch::Sender<u64>,
}

impl ScopeCache {
    /// An empty cache, not initialised, for the hub on `own_device`.
    pub fn new(own_device: &Identity) -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwap::from_pointee(ScopeTree::new(own_device)),
            writer: Mutex::new(()),
            initialised: AtomicBool::new(false),
            version: watch::Sender::new(0),
        })
    }

    /// The current snapshot. It never changes; a later call may return another one.
    pub fn current(&self) -> Arc<ScopeTree> {
        self.current.load_full()
    }

    /// Applies one batch and publishes the new snapshot, unless nothing differs.
    ///
    /// Returns whose records changed, ordered by id. Records that the tree refuses (a cycle, or
    /// more than [`SCOPE_IDENTITIES_MAX`](crate::limits::SCOPE_IDENTITIES_MAX)) are logged and
    /// left out; the rest of the batch stands. Costs one linking of the whole tree
    /// ([`crate::scope_tree`], "Cost"): hand over pages rather than single records.
    pub fn apply(&self, change: ScopeChange) -> Vec<IdentityChange> {
        let writer = self.writer.lock();
        let applied = self.current.load().apply(change);
        if !applied.changes.is_empty() {
            self.current.store(Arc::new(applied.tree));
            self.version.send_modify(|version| *version += 1);
        }
        drop(writer);
        for rejected in &applied.rejected {
            warn!(identity = %rejected.identity, reason = %rejected.reason, "scope record refused");
        }
        applied.changes
    }

    /// A receiver that changes whenever another snapshot is published, and when the cache
    /// becomes initialised. Its value is a version without meaning of its own.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Whether an absent identity means something: the scope was walked or restored once.
    pub fn is_initialised(&self) -> bool {
        self.initialised.load(Ordering::Acquire)
    }

    /// Declares the cache initialised: after the first complete walk, or after a restore that
    /// found at least one identity. There is no way back.
    pub fn set_initialised(&self) {
        if !self.initialised.swap(true, Ordering::AcqRel) {
            self.version.send_modify(|version| *version += 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope_tree::Status;
    use crate::test_support::{id, leaf, module, sample_scope};

    fn filled() -> Arc<ScopeCache> {
        let cache = ScopeCache::new(&id("edge1"));
        cache.apply(ScopeChange::Upsert(sample_scope()));
        cache
    }

    #[test]
    fn a_batch_reports_what_was_added_changed_and_removed() {
        let cache = filled();

        let mut leaf1 = leaf("leaf1", "edge2");
        leaf1.status = Status::Disabled;
        let changes = cache.apply(ScopeChange::Upsert(vec![leaf1, module("edge2/new")]));
        assert_eq!(
            changes,
            [
                IdentityChange::Added(id("edge2/new")),
                IdentityChange::Changed(id("leaf1"))
            ]
        );

        let changes = cache.apply(ScopeChange::Remove(vec![id("leaf1"), id("nobody")]));
        assert_eq!(changes, [IdentityChange::Removed(id("leaf1"))]);
    }

    #[test]
    fn replace_makes_exactly_the_given_content() {
        let cache = filled();
        let mut scope = sample_scope();
        scope.retain(|record| record.identity != id("leaf0"));
        scope.push(module("edge1/new"));

        let changes = cache.apply(ScopeChange::Replace(scope));

        assert_eq!(
            changes,
            [
                IdentityChange::Added(id("edge1/new")),
                IdentityChange::Removed(id("leaf0"))
            ]
        );
        assert!(cache.current().get(&id("leaf0")).is_none());
    }

    #[test]
    fn an_unchanged_batch_publishes_nothing() {
        let cache = filled();
        let before = cache.current();
        let version = cache.subscribe();

        assert!(cache.apply(ScopeChange::Upsert(sample_scope())).is_empty());
        assert!(cache.apply(ScopeChange::Replace(sample_scope())).is_empty());
        assert!(
            cache
                .apply(ScopeChange::Remove(vec![id("nobody")]))
                .is_empty()
        );

        assert!(Arc::ptr_eq(&before, &cache.current()));
        assert!(!version.has_changed().unwrap());
    }

    #[test]
    fn a_snapshot_in_use_stays_as_it_is() {
        let cache = filled();
        let snapshot = cache.current();
        cache.apply(ScopeChange::Remove(vec![id("edge2")]));
        assert!(snapshot.auth_chain(&id("leaf1")).is_some());
        assert!(cache.current().auth_chain(&id("leaf1")).is_none());
    }

    #[test]
    fn subscribers_see_each_snapshot_and_the_initialisation_once() {
        let cache = ScopeCache::new(&id("edge1"));
        let mut version = cache.subscribe();
        assert!(!cache.is_initialised());

        cache.apply(ScopeChange::Upsert(sample_scope()));
        assert!(version.has_changed().unwrap());
        version.mark_unchanged();

        cache.set_initialised();
        assert!(cache.is_initialised());
        assert!(version.has_changed().unwrap());
        version.mark_unchanged();

        cache.set_initialised();
        assert!(!version.has_changed().unwrap());
    }

    #[test]
    fn concurrent_writers_lose_nothing() {
        let cache = filled();
        std::thread::scope(|threads| {
            for writer in 0..4 {
                let cache = &cache;
                threads.spawn(move || {
                    for n in 0..25 {
                        let leaf = leaf(&format!("leaf-{writer}-{n}"), "edge2");
                        cache.apply(ScopeChange::Upsert(vec![leaf]));
                    }
                });
            }
        });
        assert_eq!(cache.current().len(), sample_scope().len() + 100);
    }
}
