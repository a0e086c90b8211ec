//! A queue: what one endpoint has to get at one priority.
//!
//! Offsets are contiguous from 0, given by the writer. A consumer keeps its own cursor, reads
//! from it and settles what is done, in any order. [`QueueState`] is what the writer and the
//! readers share; the writer changes it only after a commit.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::error::StoreError;
use crate::intake::SettleItem;
use crate::layout::{Cf, EntryRecord, entry_key};
use crate::limits::EXPIRE_STEP;
use crate::read::{self, ExpiredEntry, Remaining};
use crate::settle::SettleSet;
use crate::stats::{QueueCounters, QueueStats, add};
use crate::store::Core;
use crate::tail::Tail;

/// Priority of a route that names none.
pub const DEFAULT_PRIORITY: u32 = 2_000_000_000;

/// The endpoint `$upstream`.
pub const UPSTREAM_ENDPOINT: &str = "iothub";

/// Name of a queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId {
    /// `iothub` = `$upstream`, `<device>/<module>/<input>` = a module's input.
    pub endpoint: String,
    /// 0 is served first.
    pub priority: u32,
}

impl fmt::Display for QueueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (priority {})", self.endpoint, self.priority)
    }
}

/// A stored message in one queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the queue.
    pub offset: u64,
    /// Who sent it.
    pub sender: Identity,
    /// For `edgehub_proto::stored::decode_message`.
    pub message: Bytes,
    /// When it was accepted, Unix ms.
    pub enqueued_ms: u64,
    /// When it is worth nothing any more, Unix ms; `None` = never.
    pub expires_at_ms: Option<u64>,
    /// The message's id when several queues share it; to be given back in [`Settled`].
    pub shared: Option<u64>,
}

/// How an entry ended (design.md I4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint has it.
    Done,
    /// Its time was over.
    Expired,
    /// A named rule dropped it.
    Dropped,
}

/// An entry that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// [`Entry::offset`].
    pub offset: u64,
    /// [`Entry::shared`].
    pub shared: Option<u64>,
    /// How it ended.
    pub outcome: Outcome,
}

/// How much one read may return and look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadLimit {
    /// Entries returned.
    pub entries: usize,
    /// Bytes of messages returned; one larger message is still returned, alone.
    pub bytes: usize,
    /// Entries looked at, those that the filter refuses included.
    pub scan: usize,
}

/// What a read found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadBatch {
    /// Unsettled entries that pass the filter, ascending.
    pub entries: Vec<Entry>,
    /// Where the next read goes on: past everything looked at.
    pub next: u64,
}

/// Chooses entries by offset and sender. Runs with a lock held that the writer needs: it must be
/// quick and must not call the store.
pub type SenderFilter = Arc<dyn Fn(u64, &str) -> bool + Send + Sync>;

/// Handle of a queue; cheap to clone, equal by name.
#[derive(Clone)]
pub struct Queue {
    pub(crate) core: Arc<Core>,
    pub(crate) state: Arc<QueueState>,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Queue").field(&self.state.id).finish()
    }
}

impl PartialEq for Queue {
    fn eq(&self, other: &Self) -> bool {
        self.state.id == other.state.id
    }
}

impl Eq for Queue {}

impl Hash for Queue {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.state.id.hash(state);
    }
}

impl Queue {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> &QueueId {
        &self.state.id
    }

    /// Offset after the last committed entry.
    #[must_use]
    pub fn next_offset(&self) -> u64 {
        self.state.next()
    }

    /// Hears of [`Self::next_offset`] after each commit that brought an entry.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.state.watch.subscribe()
    }

    /// Every entry below is settled.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.state.settled.lock().mark()
    }

    /// Whether the entry at `offset` is known to be settled; `false` is no proof of the opposite
    /// after very disorderly settling.
    #[must_use]
    pub fn is_settled(&self, offset: u64) -> bool {
        self.state.settled.lock().skip(offset) != offset
    }

    /// Unsettled entries; exact.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.state.length()
    }

    /// What went through the queue since the store was opened.
    #[must_use]
    pub fn stats(&self) -> QueueStats {
        self.state.counters.snapshot()
    }

    /// Reads committed, unsettled entries from `from` on. Served from memory when `from` is near
    /// the end, otherwise from RocksDB on a blocking thread (a few at a time). Fewer entries than
    /// asked for do not mean the end: that is `next == next_offset()`.
    ///
    /// An entry that cannot be decoded is dropped, counted and logged; it does not stop a queue.
    ///
    /// # Errors
    /// When the store is closed or cannot be read.
    ///
    /// # Cancel safety
    /// Safe: nothing is changed.
    pub async fn read(
        &self,
        from: u64,
        limit: ReadLimit,
        filter: Option<SenderFilter>,
    ) -> Result<ReadBatch, StoreError> {
        if *self.core.closed.borrow() {
            return Err(StoreError::Closed);
        }
        let end = self.state.next();
        let from = self.state.settled.lock().skip(from).min(end);
        let mut batch = ReadBatch {
            entries: Vec::new(),
            next: from,
        };
        let mut left = Remaining::new(limit);
        loop {
            let before = batch.next;
            let in_memory = self
                .state
                .tail
                .lock()
                .read(&mut batch, &mut left, filter.as_ref());
            if in_memory.is_none() && before == from {
                return self.read_cold(from, end, limit, filter).await;
            }
            if in_memory.is_none() || batch.next == before || left.is_used_up() {
                add(&self.core.counters.tail_reads, 1);
                return Ok(batch);
            }
        }
    }

    async fn read_cold(
        &self,
        from: u64,
        end: u64,
        limit: ReadLimit,
        filter: Option<SenderFilter>,
    ) -> Result<ReadBatch, StoreError> {
        add(&self.core.counters.cold_reads, 1);
        let state = Arc::clone(&self.state);
        let found = self
            .core
            .blocking(move |open| read::cold(open, &state, from, end, limit, filter.as_ref()))
            .await?;
        if !found.damaged.is_empty() {
            self.drop_damaged(&found.damaged).await?;
        }
        Ok(found.batch)
    }

    async fn drop_damaged(&self, offsets: &[u64]) -> Result<(), StoreError> {
        tracing::error!(
            queue = %self.state.id, ?offsets,
            "entries of the store cannot be decoded and are dropped"
        );
        let dropped = |offset: &u64| Settled {
            offset: *offset,
            shared: None,
            outcome: Outcome::Dropped,
        };
        add(&self.core.counters.damaged, offsets.len() as u64);
        self.settle(offsets.iter().map(dropped).collect()).await
    }

    /// Hands settled entries to the writer; durable with its next commit. Offsets that are
    /// settled already or were never given are ignored. Waits while very many settles wait.
    ///
    /// A settle survives a failed commit: the writer tries it again with the next.
    ///
    /// # Errors
    /// When the store is closed.
    ///
    /// # Cancel safety
    /// Safe: all of them are handed over, or none.
    pub async fn settle(&self, settled: Vec<Settled>) -> Result<(), StoreError> {
        if settled.is_empty() {
            return Ok(());
        }
        let queue = Arc::clone(&self.state);
        Ok(self
            .core
            .intake
            .settle(SettleItem {
                queue,
                settled,
                reply: None,
            })
            .await?)
    }

    /// As [`Self::settle`], and waits for the commit; returns how many were news.
    ///
    /// # Errors
    /// When the store is closed.
    ///
    /// # Cancel safety
    /// Once handed over the entries are settled, whether or not the call is waited for.
    pub async fn settle_committed(&self, settled: Vec<Settled>) -> Result<u64, StoreError> {
        let (reply, committed) = oneshot::channel();
        let queue = Arc::clone(&self.state);
        self.core
            .intake
            .settle(SettleItem {
                queue,
                settled,
                reply: Some(reply),
            })
            .await?;
        committed.await.map_err(|_| StoreError::Closed)
    }

    /// When the oldest unsettled entry was accepted, Unix ms; `None` when there is none.
    ///
    /// # Errors
    /// When the store is closed or cannot be read.
    ///
    /// # Cancel safety
    /// Safe: nothing is changed.
    pub async fn oldest_enqueued_ms(&self) -> Result<Option<u64>, StoreError> {
        let mark = self.mark();
        if mark >= self.next_offset() {
            return Ok(None);
        }
        if let Some((offset, at)) = *self.state.oldest.lock()
            && offset == mark
        {
            return Ok(Some(at));
        }
        let key = entry_key(self.state.number, mark);
        let found = self
            .core
            .blocking(move |open| {
                let stored = open.get(Cf::Queues, &key)?;
                stored
                    .map(|value| Ok(EntryRecord::decode(&value)?.enqueued_ms))
                    .transpose()
            })
            .await?;
        if let Some(at) = found {
            *self.state.oldest.lock() = Some((mark, at));
        }
        Ok(found)
    }

    /// Settles entries whose time is over at `now_ms`. Looks at up to `limit` unsettled entries,
    /// beginning at the head and going on where the last call stopped; costs nothing while no
    /// entry can have expired. Returns how many expired, after their commit.
    ///
    /// # Errors
    /// When the store is closed or cannot be read.
    ///
    /// # Cancel safety
    /// Safe: the same part is looked at again.
    pub async fn expire(&self, now_ms: u64, limit: usize) -> Result<u64, StoreError> {
        self.expire_each(now_ms, limit, |_, _| {}).await
    }

    /// As [`Self::expire`], and names the sender of each message that expired and the output that
    /// it came from (empty without one), so that it can be counted.
    ///
    /// # Errors
    /// When the store is closed or cannot be read.
    ///
    /// # Cancel safety
    /// Safe: the same part is looked at again; what was settled meanwhile is then not named.
    pub async fn expire_each(
        &self,
        now_ms: u64,
        limit: usize,
        mut each: impl FnMut(&Identity, &str) + Send,
    ) -> Result<u64, StoreError> {
        let mut sweep = self.state.sweep.lock().await;
        let mut expired = 0;
        let mut left = limit;
        let mut own_lap = false;
        while left > 0 {
            if sweep.cursor.is_none() {
                if self.state.earliest_expiry_ms.load(Ordering::Acquire) > now_ms {
                    break;
                }
                // From here on appends note their expiry for the next lap. A swap and not a store:
                // who overwrites an append's note has to see the append's entry below.
                self.state
                    .earliest_expiry_ms
                    .swap(u64::MAX, Ordering::AcqRel);
                *sweep = Sweep {
                    cursor: Some(self.mark()),
                    end: self.next_offset(),
                    earliest_ms: u64::MAX,
                };
                own_lap = true;
            }
            let from = sweep.cursor.unwrap_or(0).max(self.mark());
            let end = sweep.end.max(from);
            let state = Arc::clone(&self.state);
            let step = left.min(EXPIRE_STEP);
            let found = self
                .core
                .blocking(move |open| read::expired(open, &state, from, end, now_ms, step))
                .await?;
            let settled = |entry: &ExpiredEntry| Settled {
                offset: entry.offset,
                shared: entry.shared,
                outcome: Outcome::Expired,
            };
            if !found.entries.is_empty() {
                let settled = found.entries.iter().map(settled).collect();
                expired += self.settle_committed(settled).await?;
                for entry in &found.entries {
                    if let Some((sender, output)) = &entry.origin {
                        each(sender, output);
                    }
                }
            }
            left = left.saturating_sub(found.scanned);
            sweep.earliest_ms = sweep.earliest_ms.min(found.earliest_ms);
            sweep.cursor = Some(found.next);
            if found.next >= end {
                let earliest_ms = sweep.earliest_ms;
                self.state
                    .earliest_expiry_ms
                    .fetch_min(earliest_ms, Ordering::AcqRel);
                *sweep = Sweep::default();
                if own_lap {
                    break;
                }
            }
        }
        Ok(expired)
    }
}

/// A lap of the expiry sweep.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    /// Where it goes on; `None` between laps.
    cursor: Option<u64>,
    /// Where it ends. What was appended since is for the next lap: a lap that followed the end of
    /// a busy queue would not come to its own.
    end: u64,
    /// Earliest expiry that this lap has left behind.
    earliest_ms: u64,
}

/// What the writer and the readers of one queue share. Changed by the writer, after a commit.
#[derive(Debug)]
pub(crate) struct QueueState {
    pub(crate) id: QueueId,
    pub(crate) number: u32,
    next: AtomicU64,
    watch: watch::Sender<u64>,
    pub(crate) settled: Mutex<SettleSet>,
    pub(crate) tail: Mutex<Tail>,
    pub(crate) counters: QueueCounters,
    /// No entry expires before, Unix ms. 0 after recovery: not known.
    earliest_expiry_ms: AtomicU64,
    sweep: tokio::sync::Mutex<Sweep>,
    /// Offset and time of the entry at the mark, once it was looked up.
    oldest: Mutex<Option<(u64, u64)>>,
}

impl QueueState {
    /// A new, empty queue.
    pub(crate) fn new(id: QueueId, number: u32) -> Self {
        let state = Self::recovered(id, number, 0, SettleSet::default());
        state.earliest_expiry_ms.store(u64::MAX, Ordering::Relaxed);
        state
    }

    /// A queue as it was found.
    pub(crate) fn recovered(id: QueueId, number: u32, next: u64, settled: SettleSet) -> Self {
        Self {
            id,
            number,
            next: AtomicU64::new(next),
            watch: watch::Sender::new(next),
            settled: Mutex::new(settled),
            tail: Mutex::new(Tail::starting_at(next)),
            counters: QueueCounters::default(),
            earliest_expiry_ms: AtomicU64::new(0),
            sweep: tokio::sync::Mutex::default(),
            oldest: Mutex::new(None),
        }
    }

    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    pub(crate) fn length(&self) -> u64 {
        // In this order: an entry is published before it can be settled.
        let settled = self.settled.lock();
        settled.length(self.next())
    }

    /// Lets readers see what was committed; the tail has it already.
    pub(crate) fn publish(&self, next: u64, earliest_expiry_ms: u64) {
        self.next.store(next, Ordering::Release);
        // In this order: a sweep that has missed the expiry sees the entry.
        self.earliest_expiry_ms
            .fetch_min(earliest_expiry_ms, Ordering::AcqRel);
        self.watch.send_replace(next);
    }
}
