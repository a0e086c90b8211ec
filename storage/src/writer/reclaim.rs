//! Checkpoints, and giving space back.
//!
//! A settle writes its queue's checkpoint in the same batch. The entries themselves are deleted
//! later and together, behind the mark by ranges, because each tombstone costs every later seek
//! something (stack-measurements 1 section 5). Files of a large deleted backlog are given back by
//! a thread of their own, so that no commit waits for a compaction.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use edgehub_proto::records::Checkpoint;
use prost::Message as _;
use rocksdb::WriteBatch;

use super::Writer;
use crate::db::{Db, Open};
use crate::error::StoreError;
use crate::layout::{Cf, RECORD_VERSION, entry_key, entry_range};
use crate::limits::{
    COMPACT_CHECK_ENTRIES, RANGE_DELETE_MIN, RECLAIM_ENTRIES, RECLAIM_INTERVAL_MS,
    SPARSE_RANGES_MAX,
};
use crate::read;
use crate::settle::SettleSet;

impl Writer {
    /// Moves the marks of the queues in which the group settles something, stages their
    /// checkpoints, and deletes what was settled when it is time.
    pub(super) fn stage_checkpoints(
        &mut self,
        open: &Open<'_>,
        batch: &mut WriteBatch,
    ) -> Result<(), StoreError> {
        let now = self.clock.instant();
        for number in &self.touched {
            let Some(queue) = self.queues.get_mut(*number as usize) else {
                continue;
            };
            let Some(set) = &mut queue.settled else {
                continue;
            };
            let end = queue.next;
            set.advance(end, |from| first_entry(open, *number, from, end));
            let since = now.saturating_duration_since(queue.reclaimed_at);
            let settled = queue.unreclaimed + queue.taken.len() as u64;
            if settled >= RECLAIM_ENTRIES || since >= Duration::from_millis(RECLAIM_INTERVAL_MS) {
                queue.deleted = set.reclaim(RECLAIM_ENTRIES);
                stage_deletes(open, batch, *number, &queue.deleted)?;
            }
            let next = end + queue.entries.len() as u64;
            stage_checkpoint(open, batch, *number, set, next)?;
        }
        Ok(())
    }

    /// As [`Self::reclaim_all`], from time to time: a store that is never idle would otherwise keep
    /// what was settled in queues that have become quiet.
    pub(super) fn reclaim_on_time(&mut self) {
        let since = self
            .clock
            .instant()
            .saturating_duration_since(self.reclaimed_at);
        if self.reclaim_waits && since >= Duration::from_millis(RECLAIM_INTERVAL_MS) {
            self.reclaim_all();
        }
    }

    /// Deletes what was settled in any queue.
    pub(super) fn reclaim_all(&mut self) {
        self.reclaim_waits = false;
        self.reclaimed_at = self.clock.instant();
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues.get(index) else {
                continue;
            };
            if queue.unreclaimed == 0 && !queue.state.settled.lock().reclaimable() {
                continue;
            }
            let mut set = queue.state.settled.lock().clone();
            let deleted = set.reclaim(RECLAIM_ENTRIES);
            let number = queue.state.number;
            if !deleted.is_empty() {
                self.change_physically(number, set, &deleted);
            } else if let Some(queue) = self.queues.get_mut(index) {
                queue.unreclaimed = 0;
            }
        }
    }

    /// Forgets spans when a queue has too many. The deletes that this needs are committed apart
    /// and before anything else is staged, because a settle asks the database what exists.
    pub(super) fn shed(&mut self, number: u32) {
        let Some(queue) = self.queues.get(number as usize) else {
            return;
        };
        let mut set = {
            let settled = queue.state.settled.lock();
            if settled.spans().len() <= SPARSE_RANGES_MAX {
                return;
            }
            settled.clone()
        };
        let deleted = set.shed(SPARSE_RANGES_MAX);
        self.change_physically(number, set, &deleted);
    }

    /// Deletes entries that are settled already, with the checkpoint that goes with it. Never
    /// synced: what a power loss undoes is only done again.
    fn change_physically(&mut self, number: u32, set: SettleSet, deleted: &[Range<u64>]) {
        let Some(queue) = self.queues.get(number as usize) else {
            return;
        };
        let (next, state) = (queue.next, Arc::clone(&queue.state));
        let written = self.db.with(|open| {
            let mut batch = WriteBatch::default();
            stage_deletes(open, &mut batch, number, deleted)?;
            stage_checkpoint(open, &mut batch, number, &set, next)?;
            open.write(batch, false)
        });
        match written {
            Ok(()) => {
                *state.settled.lock() = set;
                self.deleted(number, deleted);
            }
            Err(error) => tracing::warn!(%error, queue = %state.id, "settled entries stay"),
        }
    }

    /// Notes what was deleted physically, and has the files below looked at from time to time.
    pub(super) fn deleted(&mut self, number: u32, deleted: &[Range<u64>]) {
        let now = self.clock.instant();
        let Some(queue) = self.queues.get_mut(number as usize) else {
            return;
        };
        queue.unreclaimed = 0;
        queue.reclaimed_at = now;
        queue.deleted_unchecked += deleted
            .iter()
            .map(|range| range.end - range.start)
            .sum::<u64>();
        if queue.deleted_unchecked >= COMPACT_CHECK_ENTRIES
            && let Some(largest) = deleted.iter().max_by_key(|range| range.end - range.start)
        {
            // Everything behind the mark goes as one; a span above it by itself.
            let mark = queue.state.settled.lock().mark();
            let request = if largest.end <= mark {
                Request::BehindMark(number, mark)
            } else {
                Request::Span(number, largest.clone())
            };
            if self.reclaimer.check(request) {
                queue.deleted_unchecked = 0;
            }
        }
    }
}

/// Shared messages that were deleted since their files were looked at.
#[derive(Default)]
pub(super) struct DeletedMessages {
    count: u64,
    /// Their ids lie in here.
    ids: Option<Range<u64>>,
}

impl DeletedMessages {
    pub(super) fn note(&mut self, id: u64) {
        self.count += 1;
        self.ids = Some(hull(self.ids.take(), id..id.saturating_add(1)));
    }
}

/// The smallest range that contains both.
fn hull(a: Option<Range<u64>>, b: Range<u64>) -> Range<u64> {
    let Some(a) = a else { return b };
    a.start.min(b.start)..a.end.max(b.end)
}

impl Writer {
    /// Has the files of shared messages looked at from time to time.
    pub(super) fn check_messages(&mut self) {
        if self.deleted_messages.count >= COMPACT_CHECK_ENTRIES
            && let Some(ids) = self.deleted_messages.ids.clone()
            && self.reclaimer.check(Request::Messages(ids))
        {
            self.deleted_messages = DeletedMessages::default();
        }
    }
}

/// The first entry from `from` below `end` that exists. What cannot be read counts as existing:
/// the mark then stays, which is always right.
fn first_entry(open: &Open<'_>, number: u32, from: u64, end: u64) -> Option<u64> {
    let found = read::entries(open, number, from, end).and_then(|at| read::offset_at(&at));
    found.unwrap_or(Some(from))
}

fn stage_deletes(
    open: &Open<'_>,
    batch: &mut WriteBatch,
    number: u32,
    ranges: &[Range<u64>],
) -> Result<(), StoreError> {
    let queues = open.cf(Cf::Queues)?;
    for range in ranges {
        if range.end - range.start >= RANGE_DELETE_MIN {
            let (from, to) = entry_range(number, range);
            batch.delete_range_cf(queues, from, to);
        } else {
            for offset in range.clone() {
                batch.delete_cf(queues, entry_key(number, offset));
            }
        }
    }
    Ok(())
}

fn stage_checkpoint(
    open: &Open<'_>,
    batch: &mut WriteBatch,
    number: u32,
    set: &SettleSet,
    next: u64,
) -> Result<(), StoreError> {
    let checkpoint = Checkpoint {
        version: RECORD_VERSION,
        mark: set.mark(),
        next_offset: next,
        length: set.length(next),
        sparse_start: set.spans().map(|span| span.start).collect(),
        sparse_length: set.spans().map(|span| span.end - span.start).collect(),
    };
    let value = checkpoint.encode_to_vec();
    batch.put_cf(open.cf(Cf::Checkpoints)?, number.to_be_bytes(), value);
    Ok(())
}

/// What the maintenance thread is to look at.
enum Request {
    /// Entries of a queue below its mark.
    BehindMark(u32, u64),
    /// Deleted entries of a queue above its mark.
    Span(u32, Range<u64>),
    /// Ids among which shared messages were deleted.
    Messages(Range<u64>),
}

/// The thread that gives files back. At most a few requests wait: one that finds no room is
/// made again later.
pub(super) struct Reclaimer {
    requests: SyncSender<Request>,
}

impl Reclaimer {
    pub(super) fn start(db: Arc<Db>) -> Result<Self, StoreError> {
        let (requests, waiting) = sync_channel(4);
        std::thread::Builder::new()
            .name("store-reclaim".to_owned())
            .spawn(move || serve(&db, waiting))
            .map_err(StoreError::Thread)?;
        Ok(Self { requests })
    }

    /// Whether the request was taken.
    fn check(&self, request: Request) -> bool {
        !matches!(self.requests.try_send(request), Err(TrySendError::Full(_)))
    }
}

fn serve(db: &Db, waiting: Receiver<Request>) {
    // Shared messages deleted since the last compaction; kept until they are worth one.
    let mut ids = None;
    for request in waiting {
        let looked = match request {
            Request::BehindMark(number, mark) => {
                db.with(|open| open.compact_entries(number, &(0..mark), true))
            }
            Request::Span(number, range) => {
                db.with(|open| open.compact_entries(number, &range, false))
            }
            Request::Messages(range) => {
                let range = hull(ids.take(), range);
                let looked = db.with(|open| open.compact_messages(&range));
                if !matches!(looked, Ok(true)) {
                    ids = Some(range);
                }
                looked
            }
        };
        match looked {
            Ok(_) => {}
            Err(StoreError::Closed) => break,
            Err(error) => tracing::warn!(%error, "files of the store stay"),
        }
    }
}
