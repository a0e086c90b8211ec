//! Carries out what [`Machine`] decides for one module: reads and settles its queues, offers
//! batches, sleeps until something happens.
//!
//! One task for each module that has been subscribed. A turn takes everything that was told,
//! reads what is needed, offers one batch and hands over what is settled; nothing here happens once
//! per message but the decoding. It wakes when it is told something, when a queue grows that
//! matters, and after a failure; never for its own sake.

use std::sync::Arc;
use std::task::{Context, Poll};

use ::metrics::{Counter, Histogram};
use edgehub_proto::clock::Clock;
use edgehub_proto::identity::Identity;
use edgehub_storage::{Column, KvOp, Queue, QueueId, ReadLimit, Store, StoreError};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, ReusableBoxFuture};

use super::Configured;
use super::limits::{COUNTERS_MAX, FULL_RETRY, READ_BYTES, READ_ENTRIES, READ_RETRY, READ_SCAN};
use super::machine::{Ended, Machine};
use super::mailbox::{Mail, Mailbox};
use super::slots::SlotTable;
use super::stream::{Source, Stream};
use crate::hub::{DeliveryToken, OfferError, Outlet, Settlement};
use crate::telemetry::metrics::{self, DropReason};

const READ_LIMIT: ReadLimit = ReadLimit {
    entries: READ_ENTRIES,
    bytes: READ_BYTES,
    scan: READ_SCAN,
};

/// A queue and the wait for its growth.
struct Fed {
    queue: Queue,
    growth: ReusableBoxFuture<'static, watch::Receiver<u64>>,
}

impl Fed {
    fn new(queue: Queue) -> Self {
        let growth = ReusableBoxFuture::new(growth(queue.subscribe()));
        Self { queue, growth }
    }

    /// Whether the queue has grown since this was asked last; wakes the task when it does.
    fn poll_growth(&mut self, context: &mut Context<'_>) -> bool {
        let mut has_grown = false;
        while let Poll::Ready(receiver) = self.growth.poll(context) {
            if receiver.has_changed().is_err() {
                // The store is gone; a read will say so.
                return true;
            }
            self.growth.set(growth(receiver));
            has_grown = true;
        }
        has_grown
    }
}

async fn growth(mut receiver: watch::Receiver<u64>) -> watch::Receiver<u64> {
    // An error means that the store is gone, which whoever waits finds out.
    let _ = receiver.changed().await;
    receiver
}

/// What a pump is made of.
pub(super) struct PumpParts {
    pub(super) module: Identity,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) window: usize,
    pub(super) outlet: Arc<dyn Outlet>,
    pub(super) store: Store,
    pub(super) clock: Arc<dyn Clock>,
}

/// Delivers to one module.
pub(super) struct Pump {
    parts: PumpParts,
    machine: Machine<Fed>,
    slots: SlotTable,
    /// Of the connection that the machine knows of.
    epoch: u64,
    retry_at: Option<Instant>,
    /// The empty list for the mailbox.
    settled: Vec<(DeliveryToken, Settlement)>,
    counters: Counters,
}

impl Pump {
    pub(super) fn new(parts: PumpParts) -> Self {
        Self {
            machine: Machine::new(parts.window),
            slots: SlotTable::default(),
            epoch: 0,
            retry_at: None,
            settled: Vec::new(),
            counters: Counters::new(parts.module.clone()),
            parts,
        }
    }

    /// Runs until `stop`, or until the store is closed.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        match self.parts.store.get(Column::Sessions, &self.slots_key()) {
            Ok(record) => self.slots = SlotTable::decode(&record.unwrap_or_default()),
            Err(error) => self.warn("Its slots cannot be read", &error),
        }
        loop {
            match self.turn().await {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => self.warn("The store fails", &error),
            }
            if stop.is_cancelled() {
                return;
            }
            // A turn may have found everything in memory.
            tokio::task::consume_budget().await;
            if !self.machine.has_work() {
                self.wait(&stop).await;
            }
        }
    }

    /// Sleeps until there may be something to do.
    async fn wait(&mut self, stop: &CancellationToken) {
        let Self {
            machine,
            parts,
            retry_at,
            ..
        } = self;
        let grown = std::future::poll_fn(|context| {
            // All are asked: each one that does not grow must know whom to wake.
            let hungry = machine.hungry_mut();
            let grown =
                hungry.filter_map(|stream| stream.source.queue.poll_growth(context).then_some(()));
            if grown.count() > 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        let retry = async {
            match *retry_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let is_time = tokio::select! {
            biased;
            () = stop.cancelled() => false,
            () = parts.mailbox.wake.notified() => false,
            () = retry => true,
            () = grown => false,
        };
        if is_time {
            self.retry_at = None;
            self.machine.retry();
        }
    }

    async fn turn(&mut self) -> Result<(), StoreError> {
        self.machine.at(self.parts.clock.instant());
        self.take_mail().await?;
        if self.machine.wants_barrier() {
            self.hand_over().await?;
            // What the client has acknowledged must not be read again.
            if let Err(error) = self.parts.store.flush().await {
                if let StoreError::Closed = error {
                    return Err(error);
                }
                // The commit is tried again; until then it may come twice, which is allowed.
                self.warn("What was acknowledged is not committed yet", &error);
            }
            self.machine.barrier();
        }
        for stream in self.machine.streams_mut() {
            stream.end = stream.source.queue.queue.next_offset();
        }
        while let Some((index, from)) = self.machine.next_read() {
            self.read(index, from).await?;
        }
        let batch = self.machine.batch(self.parts.clock.unix_ms());
        if !batch.is_empty() {
            let PumpParts {
                mailbox,
                outlet,
                module,
                ..
            } = &self.parts;
            match mailbox.offer(self.epoch, outlet.as_ref(), module, batch) {
                Ok(()) => self.machine.offered(),
                Err(error) => {
                    tracing::trace!("Inputs of {module} wait: {error}");
                    self.machine.refused(error);
                    if error == OfferError::Full {
                        self.retry_in(FULL_RETRY);
                    }
                }
            }
        }
        self.hand_over().await
    }

    async fn take_mail(&mut self) -> Result<(), StoreError> {
        let Mail {
            epoch,
            connection,
            subscribed,
            settled,
            overflowed,
            queues,
        } = self.parts.mailbox.take(&mut self.settled);
        self.epoch = epoch;
        // Before the connection's end: it is what happened first.
        self.machine.settled(&settled);
        self.settled = settled;
        let ignored = self.machine.take_ignored() + overflowed;
        if ignored > 0 {
            metrics::settlements_ignored().increment(ignored);
        }
        if let Some(queues) = queues {
            self.configure(&queues).await?;
        }
        if let Some(connection) = connection {
            if connection.online {
                self.machine.connected(connection.clean_session);
            } else {
                self.machine.disconnected();
            }
        }
        if subscribed {
            self.machine.subscribed();
        }
        Ok(())
    }

    async fn configure(&mut self, queues: &[Configured]) -> Result<(), StoreError> {
        let ids = queues.iter().map(|configured| configured.queue.id());
        let in_use: Vec<QueueId> = ids.chain(self.machine.ids_out()).cloned().collect();
        let mut has_changed = false;
        let mut sources = Vec::with_capacity(queues.len());
        for configured in queues {
            let id = configured.queue.id();
            let (slot, is_new) = self.slots.assign(id, &in_use);
            has_changed |= is_new;
            sources.push(Source {
                id: id.clone(),
                input: Arc::clone(&configured.input),
                slot,
                opened_end: configured.opened_end,
                queue: Fed::new(configured.queue.clone()),
            });
        }
        self.machine.configure(sources);
        if !has_changed {
            return Ok(());
        }
        // Before the first use.
        let put = KvOp::Put {
            column: Column::Sessions,
            key: self.slots_key(),
            value: self.slots.encode(),
            sealed: false,
        };
        match self.parts.store.write(vec![put]).await {
            Err(StoreError::Closed) => Err(StoreError::Closed),
            Err(error) => {
                self.warn("Its slots cannot be written", &error);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn slots_key(&self) -> Vec<u8> {
        format!("slots/{}", self.parts.module).into_bytes()
    }

    async fn read(&mut self, index: usize, from: u64) -> Result<(), StoreError> {
        let Some(stream) = self.machine.streams_mut().get(index) else {
            return Ok(());
        };
        let queue = stream.source.queue.queue.clone();
        match queue.read(from, READ_LIMIT, None).await {
            Ok(batch) => self.machine.filled(index, batch),
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            Err(error) => {
                self.warn("One of its queues cannot be read", &error);
                self.machine.stalled(index);
            }
        }
        if self.machine.wants_retry() {
            self.retry_in(READ_RETRY);
        }
        Ok(())
    }

    /// Hands what is settled to the store, each queue's at once.
    async fn hand_over(&mut self) -> Result<(), StoreError> {
        let mut handed_over = false;
        for Stream {
            source, settled, ..
        } in self.machine.streams_mut()
        {
            if !settled.is_empty() {
                let settled = std::mem::take(settled);
                source.queue.queue.settle(settled).await?;
                handed_over = true;
            }
        }
        if handed_over {
            self.machine.handed_over();
            for ended in self.machine.drain_ended() {
                self.counters.count(&ended);
            }
        }
        Ok(())
    }

    fn retry_in(&mut self, delay: std::time::Duration) {
        let at = Instant::from_std(self.parts.clock.instant() + delay);
        self.retry_at = Some(self.retry_at.map_or(at, |other| other.min(at)));
    }

    fn warn(&self, what: &str, error: &StoreError) {
        tracing::warn!("Inputs of {}: {what}: {error}", self.parts.module);
    }
}

/// How long messages took that the module has.
struct Durations(Option<(Histogram, Histogram)>);

impl Durations {
    /// None for messages that were dropped.
    fn new(module: &Identity, ended: &Ended) -> Self {
        let made = || {
            let Ended {
                sender,
                output,
                input,
                priority,
                ..
            } = ended;
            (
                metrics::message_send_duration(sender, output, module, input),
                metrics::message_process_duration(sender, module, *priority),
            )
        };
        Self(ended.dropped.is_none().then(made))
    }

    fn record(&self, ended: &Ended) {
        let Some((send, process)) = &self.0 else {
            return;
        };
        // Messages that were read, sent and settled together took as long.
        let count = usize::try_from(ended.count).unwrap_or(usize::MAX);
        for (histogram, took) in [(send, ended.since_sent), (process, ended.since_read)] {
            if let Some(took) = took {
                histogram.record_many(took.as_secs_f64(), count);
            }
        }
    }
}

/// Counters of what has ended, kept at hand. How many outputs have a series is bounded by the
/// recorder.
struct Counters {
    module: Identity,
    sent: Vec<(Ended, Counter, Durations)>,
    /// Messages that could not be sent to the module, which the log tells of.
    undeliverable: u64,
}

impl Counters {
    fn new(module: Identity) -> Self {
        Self {
            module,
            sent: Vec::new(),
            undeliverable: 0,
        }
    }

    fn count(&mut self, ended: &Ended) {
        if ended.dropped == Some(DropReason::Undeliverable) {
            self.explain(ended);
        }
        let is_same = |known: &Ended| {
            known.dropped == ended.dropped
                && known.priority == ended.priority
                && known.sender == ended.sender
                && known.output == ended.output
                && known.input == ended.input
        };
        let mut known = self.sent.iter();
        if let Some((_, counter, durations)) = known.find(|(known, ..)| is_same(known)) {
            counter.increment(ended.count);
            durations.record(ended);
            return;
        }
        let counter = match ended.dropped {
            Some(reason) => metrics::messages_dropped(reason, &ended.sender, &ended.output),
            None => metrics::messages_sent(
                &ended.sender,
                &ended.output,
                &self.module,
                &ended.input,
                ended.priority,
            ),
        };
        counter.increment(ended.count);
        let durations = Durations::new(&self.module, ended);
        durations.record(ended);
        if self.sent.len() >= COUNTERS_MAX {
            self.sent.clear();
        }
        self.sent.push((ended.clone(), counter, durations));
    }

    /// Says why messages are dropped; less and less often, or a sender could fill the log.
    fn explain(&mut self, ended: &Ended) {
        let before = self.undeliverable;
        self.undeliverable += ended.count;
        if before.checked_ilog2() != self.undeliverable.checked_ilog2() {
            tracing::warn!(
                "Dropped a message of {} for input {} of {}: it is too large for the module's \
                 protocol ({} so far)",
                ended.sender,
                ended.input,
                self.module,
                self.undeliverable
            );
        }
    }
}
