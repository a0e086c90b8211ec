//! What a client's session keeps when its connection is gone: its subscriptions
//! (spec/mqtt.md section 6).
//!
//! A session is a record of the store, written whole whenever its subscriptions change. Memory
//! holds sessions only while their write is under way: one for each identity at most, the latest
//! state, and whoever asks meanwhile sees that state, not the older one of the store. So an
//! identity that reconnects while the disk is stuck finds what it was told, and what a SUBACK
//! promised becomes durable as soon as the store writes again, whoever is connected by then.
//!
//! Not here: what a filter means, and deliveries. An unsettled delivery stays in its queue, and
//! its packet id follows from its place there (`mqtt::outgoing`), so no session has a table of
//! them.
//!
//! # Crash safety
//! [`Saving::done`] returns when the session is committed. Who does not wait so long (the MQTT
//! head waits a second at most, because a SUBACK must not hang on a stuck disk) may lose the
//! change in a crash before the commit.

mod record;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::identity::Identity;
use edgehub_storage::{Column, KvOp, Store, StoreError};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Reads of sessions at once; each may wait for the disk on a thread of its own.
pub const READS_MAX: usize = 4;

/// How long a failed write waits until it is tried again.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What a session keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Its subscriptions, in the order in which they were made.
    pub subscriptions: Vec<StoredSubscription>,
}

/// A subscription of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSubscription {
    /// The topic filter.
    pub filter: String,
    /// The QoS that was granted: 0 or 1.
    pub qos: u8,
}

/// Why a session cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The store cannot.
    #[error("the session cannot be read: {0}")]
    Store(#[from] StoreError),
    /// The thread that read it panicked, or the program ends.
    #[error("the session cannot be read: the read was broken off")]
    BrokenOff,
}

/// The sessions of all identities. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    tasks: TaskTracker,
    stop: CancellationToken,
    reads: Semaphore,
    /// Sessions whose latest state is not committed yet. An entry has one task that writes it.
    unsaved: Mutex<HashMap<Identity, Unsaved>>,
}

#[derive(Debug)]
struct Unsaved {
    /// None: the session is to be removed.
    state: Option<Session>,
    /// Counts the states of this entry.
    version: u64,
    /// The version that is committed.
    saved: watch::Sender<u64>,
}

/// A change of a session on its way into the store.
#[derive(Debug)]
pub struct Saving {
    version: u64,
    saved: watch::Receiver<u64>,
}

impl Saving {
    /// Waits until the change is committed, or until it is known that this will not happen (the
    /// store is closed).
    ///
    /// # Cancel safety
    /// Safe: the change goes its way whoever waits.
    pub async fn done(&mut self) {
        // An error says that the entry is gone: everything is saved, or was given up.
        let _ = self.saved.wait_for(|saved| *saved >= self.version).await;
    }
}

impl SessionStore {
    /// The sessions in `store`. Writes run in `tasks`; once `stop` fires, a write that fails is
    /// not tried again.
    #[must_use]
    pub fn new(store: Store, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                tasks,
                stop,
                reads: Semaphore::new(READS_MAX),
                unsaved: Mutex::default(),
            }),
        }
    }

    /// The identity's session, if it has one. A record that cannot be read counts as none.
    ///
    /// # Errors
    /// When the store cannot be read.
    ///
    /// # Cancel safety
    /// Safe: nothing is changed.
    pub async fn load(&self, identity: &Identity) -> Result<Option<Session>, SessionError> {
        if let Some(unsaved) = self.shared.unsaved.lock().get(identity) {
            return Ok(unsaved.state.clone());
        }
        let key = record::key(identity);
        let stored = self
            .read(move |store| store.get(Column::Sessions, &key))
            .await?;
        let Some(stored) = stored else {
            return Ok(None);
        };
        let session = record::decode(&stored);
        if session.is_none() {
            tracing::error!("The stored session of {identity} is damaged: it begins anew");
        }
        Ok(session)
    }

    /// Makes this the identity's session. The change counts from now on, here; see [`Saving`] for
    /// when it lasts.
    pub fn save(&self, identity: &Identity, session: Session) -> Saving {
        self.put(identity, Some(session))
    }

    /// Ends the identity's session: it began a clean one, or left the device scope.
    pub fn remove(&self, identity: &Identity) -> Saving {
        self.put(identity, None)
    }

    /// Removes the sessions of all identities that are not to be kept. For the start, when the
    /// scope is known: an identity may have left while the hub was down.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn sweep(&self, keep: impl Fn(&Identity) -> bool) -> Result<(), SessionError> {
        let stored = self.read(|store| store.scan(Column::Sessions)).await?;
        for (key, _) in stored {
            if let Some(identity) = record::identity(&key)
                && !keep(&identity)
            {
                self.remove(&identity);
            }
        }
        Ok(())
    }

    /// Sessions that are held in memory because their write is under way.
    #[cfg(test)]
    pub(crate) fn unsaved(&self) -> usize {
        self.shared.unsaved.lock().len()
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, SessionError> {
        let permit = self.shared.reads.acquire().await;
        let _permit = permit.map_err(|_| SessionError::BrokenOff)?;
        let store = self.shared.store.clone();
        tokio::task::spawn_blocking(move || read(&store))
            .await
            .map_err(|_| SessionError::BrokenOff)?
            .map_err(SessionError::Store)
    }

    fn put(&self, identity: &Identity, state: Option<Session>) -> Saving {
        let mut unsaved = self.shared.unsaved.lock();
        match unsaved.entry(identity.clone()) {
            Entry::Occupied(mut entry) => {
                let entry = entry.get_mut();
                entry.state = state;
                entry.version += 1;
                Saving {
                    version: entry.version,
                    saved: entry.saved.subscribe(),
                }
            }
            Entry::Vacant(entry) => {
                let (saved, receiver) = watch::channel(0);
                entry.insert(Unsaved {
                    state,
                    version: 1,
                    saved,
                });
                let write = Arc::clone(&self.shared).write(identity.clone());
                self.shared.tasks.spawn(write);
                Saving {
                    version: 1,
                    saved: receiver,
                }
            }
        }
    }
}

impl Shared {
    /// Writes an entry's state until the latest one is committed; changes that come while a
    /// commit is under way are written as one.
    async fn write(self: Arc<Self>, identity: Identity) {
        loop {
            let Some((operation, version)) = self.next(&identity) else {
                return;
            };
            match self.store.write(vec![operation]).await {
                Ok(()) => {
                    if self.saved(&identity, version) {
                        return;
                    }
                }
                Err(error) if error.is_transient() && !self.stop.is_cancelled() => {
                    tracing::warn!("The session of {identity} could not be stored: {error}");
                    tokio::select! {
                        () = tokio::time::sleep(RETRY_AFTER) => {}
                        () = self.stop.cancelled() => {}
                    }
                }
                Err(error) => {
                    tracing::warn!("The session of {identity} is not stored: {error}");
                    self.unsaved.lock().remove(&identity);
                    return;
                }
            }
        }
    }

    fn next(&self, identity: &Identity) -> Option<(KvOp, u64)> {
        let unsaved = self.unsaved.lock();
        let entry = unsaved.get(identity)?;
        let column = Column::Sessions;
        let key = record::key(identity);
        let operation = match &entry.state {
            Some(session) => KvOp::Put {
                column,
                key,
                value: record::encode(session),
                sealed: false,
            },
            None => KvOp::Delete { column, key },
        };
        Some((operation, entry.version))
    }

    /// Notes that `version` is committed; whether that is all.
    fn saved(&self, identity: &Identity, version: u64) -> bool {
        let mut unsaved = self.unsaved.lock();
        match unsaved.get(identity) {
            Some(entry) if entry.version > version => {
                entry.saved.send_replace(version);
                false
            }
            _ => {
                unsaved.remove(identity);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests;
