//! A group as one `WriteBatch`, without letting anybody see it.

use std::sync::Arc;

use rocksdb::WriteBatch;

use super::{Group, Outcomes, Writer, WriterQueue};
use crate::append::TakenAppend;
use crate::db::Open;
use crate::error::StoreError;
use crate::intake::{RawOp, SettleItem};
use crate::layout::{Cf, EntryRecord, META_SHARED, entry_key};
use crate::limits::SHARED_RESERVE;
use crate::queue::{Entry, Outcome, QueueState};

/// Bytes of a record and a batch beside the message; only a hint for the batch's first size.
const RECORD_BYTES: usize = 96;

impl Writer {
    /// Stages a group. An error leaves staged state behind, which [`Writer::fail`] removes.
    pub(super) fn stage(
        &mut self,
        open: &Open<'_>,
        group: &mut Group,
    ) -> Result<WriteBatch, StoreError> {
        let mut batch = WriteBatch::with_capacity_bytes(group.append_cost + RECORD_BYTES);
        // See `CommitProgress`: a later sequence must not be reported over a lost one.
        group
            .appends
            .retain(|appends| !appends.ticket.progress.failed());
        // All tickets before anything can fail.
        self.tickets
            .extend(group.appends.iter().map(|appends| appends.ticket.clone()));
        for append in std::mem::take(&mut group.appends)
            .into_iter()
            .flat_map(|a| a.appends)
        {
            if !append.targets.is_empty() {
                group.messages += 1;
                group.message_bytes += append.message.len() as u64;
                self.stage_append(open, &mut batch, append)?;
            }
        }
        for (item, _) in &group.settles {
            let news = self.stage_settles(open, item);
            group.news.push(news);
        }
        self.stage_checkpoints(open, &mut batch)?;
        self.stage_refs(open, &mut batch)?;
        for op in group.writes.iter().flat_map(|item| &item.ops) {
            stage_op(open, &mut batch, op)?;
        }
        Ok(batch)
    }

    fn stage_append(
        &mut self,
        open: &Open<'_>,
        batch: &mut WriteBatch,
        append: TakenAppend,
    ) -> Result<(), StoreError> {
        let TakenAppend {
            sender,
            message,
            enqueued_ms,
            targets,
        } = append;
        let shared = match targets.len() {
            0 | 1 => None,
            count => Some(self.stage_shared(open, batch, &message, count)?),
        };
        let queues_cf = open.cf(Cf::Queues)?;
        for (state, expires_at_ms) in targets {
            let number = state.number;
            let queue = queue_mut(&mut self.queues, &state)?;
            let record = EntryRecord {
                sender: sender.as_str(),
                expires_at_ms,
                enqueued_ms,
                shared,
                message: if shared.is_some() { &[] } else { &message },
            };
            record.encode(&mut self.scratch);
            let offset = queue.next + queue.entries.len() as u64;
            batch.put_cf(queues_cf, entry_key(number, offset), &self.scratch);
            let expiry = expires_at_ms.unwrap_or(u64::MAX);
            queue.earliest_expiry_ms = queue.earliest_expiry_ms.min(expiry);
            queue.entries.push(Entry {
                offset,
                sender: sender.clone(),
                message: message.clone(),
                enqueued_ms,
                expires_at_ms,
                shared,
            });
            touch(&mut self.touched, queue);
        }
        Ok(())
    }

    /// Stores a message that several queues refer to, once.
    fn stage_shared(
        &mut self,
        open: &Open<'_>,
        batch: &mut WriteBatch,
        message: &[u8],
        count: usize,
    ) -> Result<u64, StoreError> {
        let id = self.shared.next;
        self.shared.next += 1;
        if id >= self.shared.reserved {
            self.shared.reserved = id + SHARED_RESERVE;
            let reserved = self.shared.reserved.to_be_bytes();
            batch.put_cf(open.cf(Cf::Meta)?, META_SHARED, reserved);
        }
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        batch.put_cf(open.cf(Cf::Messages)?, id.to_be_bytes(), message);
        batch.put_cf(open.cf(Cf::Refs)?, id.to_be_bytes(), count.to_be_bytes());
        Ok(id)
    }

    /// Returns how many were unsettled.
    fn stage_settles(&mut self, open: &Open<'_>, item: &SettleItem) -> u64 {
        let Ok(queue) = queue_mut(&mut self.queues, &item.queue) else {
            return 0;
        };
        let number = item.queue.number;
        let set = queue
            .settled
            .get_or_insert_with(|| queue.state.settled.lock().clone());
        let before = queue.taken.len();
        for settled in &item.settled {
            let offset = settled.offset;
            let exists = || {
                open.exists(Cf::Queues, &entry_key(number, offset))
                    .unwrap_or(false)
            };
            if offset >= queue.next || !set.settle(offset, exists) {
                continue;
            }
            queue.taken.push(offset);
            queue.outcomes.count(settled.outcome);
            if let Some(id) = settled.shared {
                let left = self.refs.entry(id).or_insert_with(|| references(open, id));
                *left = left.saturating_sub(1);
            }
        }
        touch(&mut self.touched, queue);
        (queue.taken.len() - before) as u64
    }

    fn stage_refs(&mut self, open: &Open<'_>, batch: &mut WriteBatch) -> Result<(), StoreError> {
        let (messages, refs) = (open.cf(Cf::Messages)?, open.cf(Cf::Refs)?);
        for (id, left) in self.refs.drain() {
            let key = id.to_be_bytes();
            if left > 0 {
                batch.put_cf(refs, key, left.to_be_bytes());
            } else {
                batch.delete_cf(refs, key);
                self.deleted_messages.note(id);
                batch.delete_cf(messages, key);
            }
        }
        Ok(())
    }
}

/// Entries that refer to a shared message. What cannot be read counts as many: a message that
/// stays too long costs space, one that goes too early is lost.
fn references(open: &Open<'_>, id: u64) -> u32 {
    let stored = match open.get(Cf::Refs, &id.to_be_bytes()) {
        Ok(stored) => stored.unwrap_or_default(),
        Err(error) => {
            tracing::error!(%error, id, "a reference count cannot be read");
            return u32::MAX;
        }
    };
    // An absent count belongs to nothing.
    <[u8; 4]>::try_from(stored.as_slice()).map_or(0, u32::from_be_bytes)
}

fn stage_op(open: &Open<'_>, batch: &mut WriteBatch, op: &RawOp) -> Result<(), StoreError> {
    let cf = open.cf(op.cf)?;
    match &op.value {
        Some(value) => batch.put_cf(cf, &op.key, value),
        None => batch.delete_cf(cf, &op.key),
    }
    Ok(())
}

/// Fails for a queue of another store.
fn queue_mut<'a>(
    queues: &'a mut [WriterQueue],
    state: &Arc<QueueState>,
) -> Result<&'a mut WriterQueue, StoreError> {
    let queue = queues.get_mut(state.number as usize);
    let queue = queue.filter(|queue| Arc::ptr_eq(&queue.state, state));
    queue.ok_or(StoreError::Queue("it belongs to another store"))
}

fn touch(touched: &mut Vec<u32>, queue: &mut WriterQueue) {
    if !queue.touched {
        queue.touched = true;
        touched.push(queue.state.number);
    }
}

impl Outcomes {
    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Done => self.done += 1,
            Outcome::Expired => self.expired += 1,
            Outcome::Dropped => self.dropped += 1,
        }
    }
}
