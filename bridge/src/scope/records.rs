//! The scope on disk: every identity as one sealed record, so that a hub that restarts offline can
//! authenticate its children (auth-hierarchy-http.md 4.3).

use std::{collections::BTreeSet, sync::Arc};

use edgehub_auth::{
    scope_cache::{IdentityChange, ScopeCache, ScopeChange},
    scope_tree::ServiceIdentity,
};
use edgehub_proto::{identity::Identity, records::StoredIdentity};
use edgehub_storage::{Column, KvOp, Store, StoreError};
use prost::Message as _;
use tokio::sync::Mutex;
use tracing::warn;

/// Changes the cache and keeps the disk the same.
#[derive(Debug)]
pub(crate) struct ScopeRecords {
    cache: Arc<ScopeCache>,
    store: Store,
    /// Whose records on disk may differ from the cache, because a write failed. One writer at a
    /// time, so that a later state of an identity is never overwritten by an earlier one.
    unwritten: Mutex<BTreeSet<Identity>>,
}

impl ScopeRecords {
    pub(crate) fn new(cache: Arc<ScopeCache>, store: Store) -> Self {
        Self {
            cache,
            store,
            unwritten: Mutex::default(),
        }
    }

    pub(crate) fn cache(&self) -> &Arc<ScopeCache> {
        &self.cache
    }

    /// Fills the cache from the disk; gives the number of identities. Blocks: for the start only.
    ///
    /// A record that cannot be read is left out: the next walk brings it again.
    pub(crate) fn restore(&self) -> Result<usize, StoreError> {
        let mut records = Vec::new();
        for (key, value) in self.store.scan(Column::Scope)? {
            let stored =
                StoredIdentity::decode(value.as_slice()).map_err(|error| error.to_string());
            let record = stored.and_then(|stored| {
                ServiceIdentity::try_from(stored).map_err(|error| error.to_string())
            });
            match record {
                Ok(record) => records.push(record),
                Err(error) => {
                    let id = String::from_utf8_lossy(&key).into_owned();
                    warn!(%id, %error, "stored scope record ignored");
                }
            }
        }
        let count = records.len();
        if count > 0 {
            self.cache.apply(ScopeChange::Upsert(records));
            self.cache.set_initialised();
        }
        Ok(count)
    }

    /// Applies a change to the cache and writes what became different. The cache holds also if the
    /// disk does not: then the next call, also one that changes nothing, writes that too.
    ///
    /// # Cancel safety
    ///
    /// A cancelled call may leave the disk behind the cache, as a failed write does.
    pub(crate) async fn apply(&self, change: ScopeChange) -> Vec<IdentityChange> {
        let mut unwritten = self.unwritten.lock().await;
        let changes = self.cache.apply(change);
        unwritten.extend(changes.iter().map(|change| change.identity().clone()));
        if unwritten.is_empty() {
            return changes;
        }
        let tree = self.cache.current();
        let ops = unwritten.iter().map(|identity| {
            let key = key_of(identity);
            match tree.get(identity) {
                Some(record) => KvOp::Put {
                    column: Column::Scope,
                    key,
                    value: StoredIdentity::from(record.as_ref()).encode_to_vec(),
                    sealed: true,
                },
                None => KvOp::Delete {
                    column: Column::Scope,
                    key,
                },
            }
        });
        match self.store.write(ops.collect()).await {
            Ok(()) => unwritten.clear(),
            Err(error) => {
                warn!(%error, records = unwritten.len(), "scope records cannot be stored now");
            }
        }
        changes
    }
}

fn key_of(identity: &Identity) -> Vec<u8> {
    identity.as_str().as_bytes().to_vec()
}
