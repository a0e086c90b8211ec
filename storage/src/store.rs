//! The handle of a store.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use edgehub_proto::clock::Clock;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::append::AppendBatch;
use crate::config::StoreConfig;
use crate::db::{Db, Open};
use crate::error::{StoreClosed, StoreError, TryAppendError};
#[cfg(feature = "faults")]
use crate::faults::CommitFaults;
use crate::intake::{CreateItem, Intake, Item, RawOp, WriteItem};
use crate::kv::{Column, KvOp};
use crate::limits::ENDPOINT_BYTES_MAX;
use crate::open::{self, Opened};
use crate::queue::{Queue, QueueId, QueueState};
use crate::seal::{KeyWrap, Sealer};
use crate::stats::{Counters, StoreStats, add};

/// The store; cheap to clone. When the last handle (a [`Store`] or a [`Queue`]) goes without
/// [`Store::close`], that drop commits what was handed over and closes the database, and blocks
/// meanwhile: a process that ends while RocksDB is at work is aborted by it.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) core: Arc<Core>,
}

/// What all handles share. The writer thread holds its parts, never the whole: dropping the
/// last handle ends the writer.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) db: Arc<Db>,
    pub(crate) intake: Arc<Intake>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) sealer: Sealer,
    pub(crate) cold_reads: Arc<Semaphore>,
    /// True once the writer has closed the database.
    pub(crate) closed: watch::Receiver<bool>,
    /// What went wrong while closing.
    pub(crate) close_error: Arc<Mutex<Option<StoreError>>>,
    pub(crate) writer: Option<JoinHandle<()>>,
    #[cfg(feature = "faults")]
    pub(crate) faults: Arc<CommitFaults>,
}

/// The queues, by number.
pub(crate) type Registry = RwLock<Vec<Arc<QueueState>>>;

impl Drop for Core {
    fn drop(&mut self) {
        self.stop();
        // The writer holds no handle; should it ever drop one, it must not wait for itself.
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
        {
            // A panic of the writer has been logged.
            let _ = writer.join();
        }
    }
}

impl Core {
    /// Nothing more is taken.
    fn stop(&self) {
        self.intake.close();
        #[cfg(feature = "faults")]
        self.faults.close();
    }

    /// Runs a read on a blocking thread, a few at a time.
    pub(crate) async fn blocking<R: Send + 'static>(
        &self,
        operation: impl FnOnce(&Open<'_>) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let permit = Arc::clone(&self.cold_reads).acquire_owned().await;
        let permit = permit.map_err(|_| StoreError::Closed)?;
        let db = Arc::clone(&self.db);
        let task = tokio::task::spawn_blocking(move || {
            let result = db.with(operation);
            drop(permit);
            result
        });
        match task.await {
            Ok(result) => result,
            Err(stopped) if stopped.is_cancelled() => Err(StoreError::Closed),
            Err(panicked) => Err(StoreError::Database {
                action: "read",
                reason: panicked.to_string(),
            }),
        }
    }
}

impl Store {
    /// Opens the store of `config`, or makes it. Blocks for as long as RocksDB replays its log.
    ///
    /// A folder that RocksDB cannot read is moved aside (`edgeHub.corrupt-<utc>`), the C# hub's
    /// too (`edgeHub.csharp-<utc>`), and a fresh store is opened; [`Opened`] says so. When the
    /// wrap key does not fit, the store opens and what was sealed with it reads as missing;
    /// [`Opened::seal_problem`] says so.
    ///
    /// # Errors
    /// When a newer version wrote the store, another process has it open, or the folder cannot
    /// be used: nothing is moved then.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers share the wrap as they share the clock"
    )]
    pub fn open(
        config: StoreConfig,
        clock: Arc<dyn Clock>,
        wrap: Arc<dyn KeyWrap>,
    ) -> Result<Opened, StoreError> {
        open::open(&config, clock, wrap.as_ref())
    }

    /// The queue with this name; made when it is not there. Blocks until it is committed: for
    /// start-up and configuration changes.
    ///
    /// # Errors
    /// When the name is empty or longer than [`ENDPOINT_BYTES_MAX`], there are too many queues,
    /// the commit fails, or the store is closed.
    pub fn queue(&self, id: &QueueId) -> Result<Queue, StoreError> {
        if let Some(state) = self
            .core
            .registry
            .read()
            .iter()
            .find(|state| state.id == *id)
        {
            return Ok(self.handle(state));
        }
        if id.endpoint.is_empty() || id.endpoint.len() > ENDPOINT_BYTES_MAX {
            return Err(StoreError::Queue(
                "its endpoint's name is empty or too long",
            ));
        }
        let (reply, made) = sync_channel(1);
        self.core.intake.push(Item::Create(CreateItem {
            id: id.clone(),
            reply,
        }))?;
        let state = made.recv().map_err(|_| StoreError::Closed)??;
        Ok(self.handle(&state))
    }

    /// Every queue, those of earlier runs included.
    #[must_use]
    pub fn queues(&self) -> Vec<Queue> {
        self.core
            .registry
            .read()
            .iter()
            .map(|state| self.handle(state))
            .collect()
    }

    fn handle(&self, state: &Arc<QueueState>) -> Queue {
        Queue {
            core: Arc::clone(&self.core),
            state: Arc::clone(state),
        }
    }

    /// Hands a batch to the writer, which commits it whole or not at all and then moves the
    /// ticket's progress. Waits while the intake is full. Batches of one connection have to be
    /// handed over in order of their sequences.
    ///
    /// # Errors
    /// When the store is closed; nothing of the batch is stored.
    ///
    /// # Cancel safety
    /// A call that is dropped before it returns has handed nothing over; its batch is gone with
    /// it. Once it returned the batch is committed or its progress fails, whatever the caller does.
    pub async fn append(&self, batch: AppendBatch) -> Result<(), StoreClosed> {
        self.core.intake.append(batch).await
    }

    /// As [`Self::append`], without waiting.
    ///
    /// # Errors
    /// When the intake is full (the batch comes back) or the store is closed.
    pub fn try_append(&self, batch: AppendBatch) -> Result<(), TryAppendError> {
        self.core.intake.try_append(batch)
    }

    /// Writes values, all or none; returns after the commit.
    ///
    /// # Errors
    /// When the commit fails, a value cannot be sealed, or the store is closed.
    ///
    /// # Cancel safety
    /// A call that is dropped while it waits may or may not have written; all or none.
    pub async fn write(&self, ops: Vec<KvOp>) -> Result<(), StoreError> {
        let ops = ops
            .into_iter()
            .map(|op| self.raw(op))
            .collect::<Result<Vec<_>, _>>()?;
        let (reply, committed) = oneshot::channel();
        self.core.intake.write(WriteItem { ops, reply }).await?;
        committed.await.map_err(|_| StoreError::Closed)?
    }

    fn raw(&self, op: KvOp) -> Result<RawOp, StoreError> {
        Ok(match op {
            KvOp::Put {
                column,
                key,
                value,
                sealed,
            } => {
                let sealed = sealed || column.is_secret();
                let value = self.core.sealer.seal(column.cf(), &key, value, sealed)?;
                RawOp {
                    cf: column.cf(),
                    key,
                    value: Some(value),
                }
            }
            KvOp::Delete { column, key } => RawOp {
                cf: column.cf(),
                key,
                value: None,
            },
        })
    }

    /// A value. `None` also when it is sealed and cannot be opened. One point read: microseconds
    /// from memory, a disk access otherwise.
    ///
    /// # Errors
    /// When the store is closed or cannot be read.
    pub fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let stored = self.core.db.with(|open| open.get(column.cf(), key))?;
        match stored {
            None => Ok(None),
            Some(stored) => self.unseal(column, key, &stored),
        }
    }

    /// All values of a column, by key; without those that are sealed and cannot be opened. Reads
    /// the whole column into memory: for start-up.
    ///
    /// # Errors
    /// When the store is closed or cannot be read.
    #[expect(clippy::type_complexity, reason = "pairs of key and value")]
    pub fn scan(&self, column: Column) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let stored = self.core.db.with(|open| open.scan(column.cf(), &[]))?;
        let mut values = Vec::with_capacity(stored.len());
        for (key, stored) in stored {
            if let Some(value) = self.unseal(column, &key, &stored)? {
                values.push((key.into_vec(), value));
            }
        }
        Ok(values)
    }

    fn unseal(
        &self,
        column: Column,
        key: &[u8],
        stored: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let value = self.core.sealer.open_value(column.cf(), key, stored)?;
        if value.is_none() {
            add(&self.core.counters.sealed_unreadable, 1);
        }
        Ok(value)
    }

    /// Waits until everything that was handed over before is committed.
    ///
    /// # Errors
    /// When the last commit failed or the store is closed.
    ///
    /// # Cancel safety
    /// Safe: nothing is changed.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let (reply, committed) = oneshot::channel();
        self.core.intake.push(Item::Flush(reply))?;
        committed.await.map_err(|_| StoreError::Closed)?
    }

    /// What the store has done and holds.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let mut stats = self.core.counters.snapshot();
        stats.intake_bytes = self.core.intake.append_bytes() as u64;
        stats.queued = self
            .core
            .registry
            .read()
            .iter()
            .map(|queue| queue.length())
            .sum();
        stats
    }

    /// Whether the writer still works: false once the store is closed or the writer has panicked,
    /// and then for ever.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        let closed = &self.core.closed;
        // The writer holds the other end.
        closed.has_changed().is_ok() && !*closed.borrow()
    }

    /// Faults on the commit path.
    #[cfg(feature = "faults")]
    #[must_use]
    pub fn faults(&self) -> &CommitFaults {
        &self.core.faults
    }

    /// Takes nothing more, commits what was handed over, syncs the log and closes the database.
    /// Other handles stay, every operation on them says that the store is closed. A held commit
    /// is released.
    ///
    /// # Errors
    /// When the log could not be synced.
    ///
    /// # Cancel safety
    /// Closing goes on in the background.
    pub async fn close(self) -> Result<(), StoreError> {
        self.core.stop();
        let mut closed = self.core.closed.clone();
        // An error means that the writer is gone, and it goes last.
        let _ = closed.wait_for(|closed| *closed).await;
        match self.core.close_error.lock().take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// Copies what a crash would leave at this moment into the empty folder `to`.
#[cfg(test)]
pub(crate) fn copy_crash_image(store: &Store, to: &std::path::Path) {
    store
        .core
        .db
        .with(|open| {
            // The manifest first: what it names may not be deleted, what comes later is surplus.
            open.db.disable_file_deletions().unwrap();
            let from = open.db.path();
            let current = std::fs::read_to_string(from.join("CURRENT")).unwrap();
            let manifest = current.trim();
            std::fs::copy(from.join(manifest), to.join(manifest)).unwrap();
            std::fs::write(to.join("CURRENT"), &current).unwrap();
            for file in std::fs::read_dir(from).unwrap() {
                let file = file.unwrap();
                let name = file.file_name().into_string().unwrap();
                if name.ends_with(".log") || name.ends_with(".sst") {
                    match std::fs::copy(file.path(), to.join(name)) {
                        // It was obsolete already when deletions were stopped.
                        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                        copied => drop(copied.unwrap()),
                    }
                }
            }
            open.db.enable_file_deletions().unwrap();
            Ok(())
        })
        .unwrap();
}
