//! Reading and writing one twin: in memory only between the two.

use std::collections::BTreeSet;
use std::sync::Arc;

use edgehub_proto::identity::Identity;
use edgehub_storage::{Column, KvOp, Store, StoreError};
use tokio::sync::OwnedSemaphorePermit;

use super::document::{Twin, version};
use super::service::TwinService;
use super::{DesiredDocument, TwinError};

/// Keys of [`Column::Meta`] that name the identities with reports for the upstream, so that a
/// start need not read all twins to find them.
const UNSYNCED_PREFIX: &str = "twin/unsynced/";

/// A twin in memory.
pub(super) struct Draft {
    pub(super) twin: Twin,
    /// The record goes, even if it could not be read.
    pub(super) removed: bool,
    /// Its record in the store.
    before: Option<Vec<u8>>,
    _desk: OwnedSemaphorePermit,
}

impl TwinService {
    /// Reads a twin; waits while too many are in memory.
    pub(super) async fn read(&self, identity: &Identity) -> Result<Draft, TwinError> {
        let desk = Arc::clone(&self.desks).acquire_owned().await;
        let desk = desk.map_err(|_| TwinError::Stopping)?;
        let store = self.store.clone();
        let key = identity.as_str().as_bytes().to_vec();
        // A disk access at worst, which on a small gateway can take long.
        let read = move || store.get(Column::Twins, &key);
        let before = match self.runtime.spawn_blocking(read).await {
            Ok(Ok(record)) => record,
            Ok(Err(error)) => {
                tracing::error!("The twin of {identity} cannot be read: {error}");
                return Err(error.into());
            }
            Err(_) => return Err(TwinError::Stopping),
        };
        let twin = before.as_deref().map(Twin::decode).transpose();
        let twin = twin.unwrap_or_else(|error| {
            // The next fetch brings it back, but for reports that were on their way.
            tracing::error!("The stored twin of {identity} is damaged: {error}");
            None
        });
        Ok(Draft {
            twin: twin.unwrap_or_default(),
            removed: false,
            before,
            _desk: desk,
        })
    }

    /// Writes a twin if it changed.
    ///
    /// # Cancel safety
    /// A call that is dropped may or may not have written.
    pub(super) async fn write(&self, identity: &Identity, draft: Draft) -> Result<(), TwinError> {
        let unsynced = !draft.twin.unsynced.is_empty();
        let own = if *identity == self.own_identity {
            desired_document(&draft.twin)
        } else {
            None
        };
        let after = draft.twin.encode();
        let changed = draft.removed || after != draft.before;
        drop(draft);
        if changed {
            let ops = self.writes(identity, after, unsynced);
            if let Err(error) = self.store.write(ops).await {
                tracing::error!("The twin of {identity} cannot be stored: {error}");
                return Err(error.into());
            }
        }
        let mut all = self.unsynced.lock();
        if unsynced {
            all.insert(identity.clone());
        } else {
            all.remove(identity);
        }
        drop(all);
        if own.is_some() {
            self.own_desired.send_if_modified(|known| {
                let news = *known != own;
                *known = own;
                news
            });
        }
        Ok(())
    }

    fn writes(&self, identity: &Identity, record: Option<Vec<u8>>, unsynced: bool) -> Vec<KvOp> {
        let put = |column, key, value, sealed| KvOp::Put {
            column,
            key,
            value,
            sealed,
        };
        let key = identity.as_str().as_bytes().to_vec();
        let twin = match record {
            Some(record) => put(Column::Twins, key, record, self.config.sealed),
            None => KvOp::Delete {
                column: Column::Twins,
                key,
            },
        };
        let key = format!("{UNSYNCED_PREFIX}{identity}").into_bytes();
        let mark = if unsynced {
            put(Column::Meta, key, Vec::new(), false)
        } else {
            KvOp::Delete {
                column: Column::Meta,
                key,
            }
        };
        vec![twin, mark]
    }
}

/// The identities that had reports for the upstream when the last run ended.
pub(super) fn stored_unsynced(store: &Store) -> Result<BTreeSet<Identity>, StoreError> {
    let notes = store.scan(Column::Meta)?;
    let identities = notes.iter().filter_map(|(key, _)| {
        let key = std::str::from_utf8(key).ok()?;
        Identity::parse(key.strip_prefix(UNSYNCED_PREFIX)?).ok()
    });
    Ok(identities.collect())
}

/// The desired properties that the last run knew of the hub's own twin.
pub(super) fn stored_own_desired(
    store: &Store,
    own: &Identity,
) -> Result<Option<DesiredDocument>, StoreError> {
    let record = store.get(Column::Twins, own.as_str().as_bytes())?;
    let twin = record.and_then(|record| Twin::decode(&record).ok());
    Ok(twin.as_ref().and_then(desired_document))
}

/// The desired properties of the hub's own twin for whoever watches them.
fn desired_document(twin: &Twin) -> Option<DesiredDocument> {
    let desired = twin.desired.as_ref()?;
    Some(DesiredDocument {
        version: version(desired)?,
        json: desired.to_bytes(),
    })
}
