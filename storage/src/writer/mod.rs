//! The writer: one OS thread that makes every change of the database.
//!
//! It blocks for the first item, takes all that waits up to the limits of a group, stages the
//! group as one `WriteBatch` ([`stage`]), writes it once, and only then lets others see it
//! ([`publish`]): readers, watchers and each connection's progress, once per commit. What gives
//! space back is in [`reclaim`].
//!
//! # Ordering
//! Appends of one connection are committed in the order in which they were handed over. A
//! group that fails leaves no trace: offsets are given again, appends fail for good, settles are
//! tried again.

mod publish;
mod reclaim;
mod stage;

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use edgehub_proto::clock::Clock;
use edgehub_proto::records::QueueInfo;
use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use rocksdb::WriteBatch;
use tokio::sync::{Semaphore, oneshot, watch};

use self::reclaim::{DeletedMessages, Reclaimer};
use crate::append::{CommitTicket, TakenBatch};
use crate::config::{StoreConfig, SyncMode};
use crate::db::{Db, Open};
use crate::error::StoreError;
#[cfg(feature = "faults")]
use crate::faults::CommitFaults;
use crate::intake::{CreateItem, Intake, Item, SettleItem, Waited, WriteItem};
use crate::layout::{Cf, META_QUEUE, numbered};
use crate::limits::{COLD_READS_MAX, QUEUES_MAX, RECLAIM_INTERVAL_MS, RETRY_INTERVAL_MS};
use crate::open::Recovered;
use crate::queue::{Entry, QueueId, QueueState};
use crate::seal::Sealer;
use crate::settle::SettleSet;
use crate::stats::{Counters, add};
use crate::store::{Core, Registry, Store};
use crate::tail::TailBudget;

/// Starts the writer on an opened database.
pub(crate) fn start(
    config: &StoreConfig,
    clock: Arc<dyn Clock>,
    db: Db,
    sealer: Sealer,
    recovered: Recovered,
) -> Result<Store, StoreError> {
    let db = Arc::new(db);
    let (closed_sender, closed) = watch::channel(false);
    let mut core = Core {
        intake: Arc::new(Intake::new(config.intake_bytes)),
        counters: Arc::default(),
        registry: Arc::new(RwLock::new(recovered.queues.clone())),
        sealer,
        cold_reads: Arc::new(Semaphore::new(COLD_READS_MAX)),
        closed,
        close_error: Arc::default(),
        writer: None,
        #[cfg(feature = "faults")]
        faults: Arc::default(),
        db: Arc::clone(&db),
    };
    let now = clock.instant();
    let queues = recovered
        .queues
        .into_iter()
        .map(|state| WriterQueue::new(state, now))
        .collect();
    let writer = Writer {
        sync: config.sync == SyncMode::Disk,
        group_bytes: config.group_bytes,
        group_appends: config.group_appends,
        tails: TailBudget::new(config.tail_bytes),
        reclaimer: Reclaimer::start(Arc::clone(&db))?,
        clock,
        db,
        intake: Arc::clone(&core.intake),
        counters: Arc::clone(&core.counters),
        registry: Arc::clone(&core.registry),
        #[cfg(feature = "faults")]
        faults: Arc::clone(&core.faults),
        queues,
        touched: Vec::new(),
        backlog: VecDeque::new(),
        tickets: Vec::new(),
        carried: Vec::new(),
        shared: SharedIds {
            next: recovered.next_shared,
            reserved: recovered.next_shared,
        },
        refs: HashMap::new(),
        scratch: Vec::new(),
        commit: 0,
        deleted_messages: DeletedMessages::default(),
        reclaim_waits: false,
        reclaimed_at: now,
        failing: false,
    };
    let close_error = Arc::clone(&core.close_error);
    let thread = std::thread::Builder::new()
        .name("store-writer".to_owned())
        .spawn(move || writer.run_to_end(&close_error, &closed_sender))
        .map_err(StoreError::Thread)?;
    core.writer = Some(thread);
    Ok(Store {
        core: Arc::new(core),
    })
}

struct Writer {
    sync: bool,
    group_bytes: usize,
    group_appends: usize,
    clock: Arc<dyn Clock>,
    db: Arc<Db>,
    intake: Arc<Intake>,
    counters: Arc<Counters>,
    registry: Arc<Registry>,
    #[cfg(feature = "faults")]
    faults: Arc<CommitFaults>,
    /// By number.
    queues: Vec<WriterQueue>,
    /// Numbers of queues that the staged group changes.
    touched: Vec<u32>,
    tails: TailBudget,
    reclaimer: Reclaimer,
    /// Taken from the intake, not yet in a group; its permits are still held.
    backlog: VecDeque<Item>,
    /// Whom the staged group has to tell; here, so that they hear of a panic as well.
    tickets: Vec<CommitTicket>,
    /// Settles of failed commits, for the next one; their permits are still held.
    carried: Vec<(SettleItem, u32)>,
    shared: SharedIds,
    /// Reference counts that the staged group changes.
    refs: HashMap<u64, u32>,
    /// Encoded record, reused.
    scratch: Vec<u8>,
    /// Number of the current commit.
    commit: u64,
    /// Only a hint: deletes of a failed commit may be in it.
    deleted_messages: DeletedMessages,
    /// Settled entries wait for their physical deletion.
    reclaim_waits: bool,
    /// When all queues were last looked at for that.
    reclaimed_at: Instant,
    /// The last commit failed; so that a failing disk is logged twice, not for each message.
    failing: bool,
}

/// Ids of shared messages. They are reserved in blocks, so that recovery need not search.
#[derive(Clone, Copy)]
struct SharedIds {
    next: u64,
    reserved: u64,
}

/// What the writer knows of a queue beside its published state.
struct WriterQueue {
    state: Arc<QueueState>,
    /// After the last committed entry.
    next: u64,
    /// Entries of the staged group, from `next` on.
    entries: Vec<Entry>,
    /// Earliest expiry among them.
    earliest_expiry_ms: u64,
    /// What will be settled once the group is committed.
    settled: Option<SettleSet>,
    /// Offsets that the staged group settles, and how.
    taken: Vec<u64>,
    outcomes: Outcomes,
    touched: bool,
    /// Settled since the last physical deletion.
    unreclaimed: u64,
    reclaimed_at: Instant,
    /// Ranges that the staged group deletes physically.
    deleted: Vec<std::ops::Range<u64>>,
    /// Physically deleted since its files were looked at.
    deleted_unchecked: u64,
}

#[derive(Clone, Copy, Default)]
struct Outcomes {
    done: u64,
    expired: u64,
    dropped: u64,
}

impl WriterQueue {
    fn new(state: Arc<QueueState>, now: Instant) -> Self {
        Self {
            next: state.next(),
            state,
            entries: Vec::new(),
            earliest_expiry_ms: u64::MAX,
            settled: None,
            taken: Vec::new(),
            outcomes: Outcomes::default(),
            touched: false,
            unreclaimed: 0,
            reclaimed_at: now,
            deleted: Vec::new(),
            deleted_unchecked: 0,
        }
    }
}

/// What is committed together.
#[derive(Default)]
struct Group {
    appends: Vec<TakenBatch>,
    settles: Vec<(SettleItem, u32)>,
    /// How many of each settle were news; filled by staging.
    news: Vec<u64>,
    writes: Vec<WriteItem>,
    flushes: Vec<oneshot::Sender<Result<(), StoreError>>>,
    append_cost: usize,
    write_cost: usize,
    /// Messages and their bytes; counted by staging.
    messages: u64,
    message_bytes: u64,
}

impl Writer {
    fn run_to_end(mut self, close_error: &Mutex<Option<StoreError>>, closed: &watch::Sender<bool>) {
        if std::panic::catch_unwind(AssertUnwindSafe(|| self.run())).is_err() {
            tracing::error!("the store's writer has panicked; nothing more is stored");
        }
        self.abandon();
        let db = Arc::clone(&self.db);
        // Ends the maintenance thread and drops what was taken, before the database closes.
        drop(self);
        if let Err(error) = db.close() {
            tracing::error!(%error, "the store was closed with an error");
            *close_error.lock() = Some(error);
        }
        closed.send_replace(true);
    }

    fn run(&mut self) {
        loop {
            match self.wait() {
                Waited::Items => {}
                Waited::TimedOut => self.reclaim_all(),
                Waited::Closed => {
                    // A last try; what fails now is delivered again after the next start.
                    let group = self.gather();
                    self.commit(group);
                    break;
                }
            }
            while !self.backlog.is_empty() || !self.carried.is_empty() {
                self.intake.take_more(&mut self.backlog);
                self.reclaim_on_time();
                if let Some(Item::Create(_)) = self.backlog.front() {
                    if let Some(Item::Create(item)) = self.backlog.pop_front() {
                        self.create(&item);
                    }
                    continue;
                }
                let group = self.gather();
                if !self.commit(group) && self.backlog.is_empty() {
                    break;
                }
            }
        }
        self.reclaim_all();
    }

    fn wait(&mut self) -> Waited {
        let timeout = match (self.carried.is_empty(), self.reclaim_waits) {
            (false, _) => Some(Duration::from_millis(RETRY_INTERVAL_MS)),
            (true, true) => Some(Duration::from_millis(RECLAIM_INTERVAL_MS)),
            (true, false) => None,
        };
        self.intake.wait(&mut self.backlog, timeout)
    }

    /// Takes items until a limit of the group is reached; at least one.
    fn gather(&mut self) -> Group {
        let mut group = Group {
            settles: std::mem::take(&mut self.carried),
            ..Group::default()
        };
        let mut appends = 0;
        while let Some(item) = self.backlog.pop_front() {
            match item {
                Item::Append(batch, cost) => {
                    let bytes = group.append_cost.saturating_add(cost as usize);
                    let count = appends + batch.appends.len();
                    let full = bytes > self.group_bytes || count > self.group_appends;
                    if full && !group.appends.is_empty() {
                        self.backlog.push_front(Item::Append(batch, cost));
                        break;
                    }
                    (group.append_cost, appends) = (bytes, count);
                    group.appends.push(batch);
                }
                Item::Settle(item, cost) => group.settles.push((item, cost)),
                Item::Write(item, cost) => {
                    group.write_cost += cost as usize;
                    group.writes.push(item);
                }
                Item::Flush(reply) => group.flushes.push(reply),
                Item::Create(item) => {
                    self.backlog.push_front(Item::Create(item));
                    break;
                }
            }
        }
        group
    }

    /// Whether it succeeded.
    fn commit(&mut self, mut group: Group) -> bool {
        self.commit += 1;
        let db = Arc::clone(&self.db);
        let written = db.with(|open| {
            let batch = self.stage(open, &mut group)?;
            if batch.is_empty() {
                Ok(())
            } else {
                self.write(open, batch)
            }
        });
        match written {
            Ok(()) => self.publish(group),
            Err(error) => {
                self.fail(group, &error);
                return false;
            }
        }
        true
    }

    fn write(&mut self, open: &Open<'_>, batch: WriteBatch) -> Result<(), StoreError> {
        #[cfg(feature = "faults")]
        self.faults
            .before_commit()
            .map_err(|reason| StoreError::CommitFailed { reason })?;
        open.write(batch, self.sync)?;
        add(&self.counters.commits, 1);
        add(&self.counters.wal_syncs, u64::from(self.sync));
        Ok(())
    }

    /// Makes a queue, in a commit of its own.
    fn create(&mut self, item: &CreateItem) {
        let made = self.create_queue(&item.id);
        // Who asked may have gone; the queue stays.
        let _ = item.reply.send(made);
    }

    fn create_queue(&mut self, id: &QueueId) -> Result<Arc<QueueState>, StoreError> {
        if let Some(queue) = self.queues.iter().find(|queue| queue.state.id == *id) {
            return Ok(Arc::clone(&queue.state));
        }
        let number = u32::try_from(self.queues.len())
            .ok()
            .filter(|n| (*n as usize) < QUEUES_MAX);
        let number = number.ok_or(StoreError::Queue("there are too many"))?;
        let info = QueueInfo {
            number,
            endpoint: id.endpoint.clone(),
            priority: id.priority,
        };
        let db = Arc::clone(&self.db);
        db.with(|open| {
            let mut batch = WriteBatch::default();
            let key = numbered(META_QUEUE, number);
            batch.put_cf(open.cf(Cf::Meta)?, key, info.encode_to_vec());
            self.write(open, batch)
        })?;
        let state = Arc::new(QueueState::new(id.clone(), number));
        self.queues
            .push(WriterQueue::new(Arc::clone(&state), self.clock.instant()));
        self.registry.write().push(Arc::clone(&state));
        Ok(state)
    }

    /// The end, also after a panic: nobody is left waiting for a commit that will not come.
    fn abandon(&mut self) {
        self.intake.close();
        self.intake.take_more(&mut self.backlog);
        let waiting = self.backlog.drain(..).filter_map(|item| match item {
            Item::Append(batch, _) => Some(batch.ticket),
            _ => None,
        });
        self.commit += 1;
        for ticket in self.tickets.drain(..).chain(waiting) {
            ticket.progress.fail();
            ticket.progress.wake_once(self.commit);
        }
    }
}
