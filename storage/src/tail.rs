//! The newest entries of a queue, in memory.
//!
//! A reader that keeps up is served from here and never touches RocksDB. The tail always ends at
//! the queue's next offset; the writer appends what it committed, removes what was settled and
//! evicts the oldest when all tails together exceed their budget ([`TailBudget`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::limits::{TAIL_CHUNKS_MAX, TAIL_ENTRY_OVERHEAD_BYTES, TAIL_SCAN_PER_LOCK};
use crate::queue::{Entry, QueueState, ReadBatch, SenderFilter};
use crate::read::Remaining;
use crate::stats::Counters;

/// Entries `base..base + entries.len()` of one queue; `None` = settled.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    base: u64,
    entries: VecDeque<Option<Entry>>,
}

/// What an entry costs. A settled one gives its message back at once and the rest when its slot
/// goes: one stuck entry at the front keeps the slots of all that were settled behind it.
fn cost(entry: &Entry) -> usize {
    entry.message.len() + TAIL_ENTRY_OVERHEAD_BYTES
}

impl Tail {
    /// Nothing in memory of a queue that ends at `next`.
    pub(crate) fn starting_at(next: u64) -> Self {
        Self {
            base: next,
            entries: VecDeque::new(),
        }
    }

    /// Takes over what was committed, which continues the tail; returns its cost.
    fn extend(&mut self, entries: &mut Vec<Entry>) -> usize {
        entries.drain(..).map(|entry| self.push(entry)).sum()
    }

    fn push(&mut self, entry: Entry) -> usize {
        debug_assert_eq!(entry.offset, self.base + self.entries.len() as u64);
        let cost = cost(&entry);
        self.entries.push_back(Some(entry));
        cost
    }

    /// Forgets a settled entry; returns what that gives back.
    fn remove(&mut self, offset: u64) -> usize {
        let index = offset
            .checked_sub(self.base)
            .and_then(|index| usize::try_from(index).ok());
        let slot = index.and_then(|index| self.entries.get_mut(index));
        let entry = slot.and_then(Option::take);
        let mut freed = entry.map_or(0, |entry| entry.message.len());
        while let Some(None) = self.entries.front() {
            self.entries.pop_front();
            self.base += 1;
            freed += TAIL_ENTRY_OVERHEAD_BYTES;
        }
        self.shrink();
        freed
    }

    /// Forgets everything below `end`; returns what that gives back.
    fn evict(&mut self, end: u64) -> usize {
        let mut freed = 0;
        while self.base < end
            && let Some(entry) = self.entries.pop_front()
        {
            self.base += 1;
            freed += entry.map_or(TAIL_ENTRY_OVERHEAD_BYTES, |entry| cost(&entry));
        }
        self.shrink();
        freed
    }

    /// Gives back the space of a burst that is over.
    fn shrink(&mut self) {
        if self.entries.is_empty() && self.entries.capacity() > 1024 {
            self.entries = VecDeque::new();
        }
    }

    /// Reads on from `out.next`, at most so many entries that the writer does not wait long.
    /// `None` when that position is not in memory.
    pub(crate) fn read(
        &self,
        out: &mut ReadBatch,
        left: &mut Remaining,
        filter: Option<&SenderFilter>,
    ) -> Option<()> {
        let start = usize::try_from(out.next.checked_sub(self.base)?).ok()?;
        for entry in self.entries.iter().skip(start).take(TAIL_SCAN_PER_LOCK) {
            if left.is_used_up() {
                break;
            }
            if let Some(entry) = entry
                && filter.is_none_or(|wants| wants(entry.offset, entry.sender.as_str()))
            {
                if !left.fits(entry.message.len()) {
                    break;
                }
                out.entries.push(entry.clone());
            }
            left.scanned();
            out.next += 1;
        }
        Some(())
    }
}

/// What all tails together hold; owned by the writer.
#[derive(Debug)]
pub(crate) struct TailBudget {
    bytes: usize,
    bytes_max: usize,
    /// What was committed, oldest first: the queue, and where the chunk ends.
    chunks: VecDeque<(Arc<QueueState>, u64)>,
}

impl TailBudget {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            bytes: 0,
            bytes_max,
            chunks: VecDeque::new(),
        }
    }

    /// Takes over what one commit brought for one queue.
    pub(crate) fn extend(&mut self, queue: &Arc<QueueState>, entries: &mut Vec<Entry>) {
        let mut tail = queue.tail.lock();
        self.bytes += tail.extend(entries);
        let end = tail.base + tail.entries.len() as u64;
        drop(tail);
        self.chunks.push_back((Arc::clone(queue), end));
    }

    /// Forgets what was settled.
    pub(crate) fn remove(&mut self, queue: &QueueState, settled: &[u64]) {
        let mut tail = queue.tail.lock();
        for offset in settled {
            self.bytes = self.bytes.saturating_sub(tail.remove(*offset));
        }
    }

    /// Evicts the oldest chunks until the budget is kept.
    pub(crate) fn trim(&mut self, counters: &Counters) {
        while self.bytes > self.bytes_max || self.chunks.len() > TAIL_CHUNKS_MAX {
            let Some((queue, end)) = self.chunks.pop_front() else {
                break;
            };
            let freed = queue.tail.lock().evict(end);
            self.bytes = self.bytes.saturating_sub(freed);
        }
        counters
            .tail_bytes
            .store(self.bytes as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use edgehub_proto::identity::Identity;

    use super::*;
    use crate::queue::{QueueId, ReadLimit};

    fn entry(offset: u64, bytes: usize) -> Entry {
        Entry {
            offset,
            sender: Identity::parse(if offset.is_multiple_of(2) {
                "even"
            } else {
                "odd"
            })
            .unwrap(),
            message: Bytes::from(vec![0; bytes]),
            enqueued_ms: 0,
            expires_at_ms: None,
            shared: None,
        }
    }

    fn queue(number: u32) -> Arc<QueueState> {
        let id = QueueId {
            endpoint: format!("q{number}"),
            priority: 0,
        };
        Arc::new(QueueState::new(id, number))
    }

    fn offsets(queue: &QueueState, from: u64, limit: ReadLimit) -> Option<(Vec<u64>, u64)> {
        let mut out = ReadBatch {
            entries: Vec::new(),
            next: from,
        };
        queue
            .tail
            .lock()
            .read(&mut out, &mut Remaining::new(limit), None)?;
        Some((
            out.entries.iter().map(|entry| entry.offset).collect(),
            out.next,
        ))
    }

    fn limit(entries: usize, bytes: usize, scan: usize) -> ReadLimit {
        ReadLimit {
            entries,
            bytes,
            scan,
        }
    }

    #[test]
    fn the_budget_holds_across_queues_and_the_oldest_goes_first() {
        let (a, b) = (queue(0), queue(1));
        let counters = Counters::default();
        let mut budget = TailBudget::new(10 * (100 + TAIL_ENTRY_OVERHEAD_BYTES));
        budget.extend(&a, &mut (0..6).map(|o| entry(o, 100)).collect());
        budget.extend(&b, &mut (0..4).map(|o| entry(o, 100)).collect());
        budget.trim(&counters);
        assert_eq!(offsets(&a, 0, limit(10, 10_000, 10)).unwrap().0.len(), 6);
        budget.extend(&b, &mut (4..6).map(|o| entry(o, 100)).collect());
        budget.trim(&counters);
        assert_eq!(offsets(&a, 0, limit(10, 10_000, 10)), None);
        assert_eq!(offsets(&a, 6, limit(10, 10_000, 10)), Some((vec![], 6)));
        assert_eq!(offsets(&b, 0, limit(10, 10_000, 10)).unwrap().0.len(), 6);
        assert_eq!(budget.bytes, 6 * (100 + TAIL_ENTRY_OVERHEAD_BYTES));
    }

    #[test]
    fn settled_entries_leave_and_small_chunks_do_not_pile_up() {
        let a = queue(0);
        let counters = Counters::default();
        let mut budget = TailBudget::new(1 << 20);
        for offset in 0..3 * TAIL_CHUNKS_MAX as u64 {
            budget.extend(&a, &mut vec![entry(offset, 1)]);
            budget.remove(&a, &[offset]);
            budget.trim(&counters);
        }
        assert_eq!(budget.bytes, 0);
        assert!(budget.chunks.len() <= TAIL_CHUNKS_MAX);
    }

    #[test]
    fn one_stuck_entry_does_not_keep_the_slots_of_all_behind_it() {
        let a = queue(0);
        let counters = Counters::default();
        let mut budget = TailBudget::new(100 * TAIL_ENTRY_OVERHEAD_BYTES);
        budget.extend(&a, &mut vec![entry(0, 1)]);
        for chunk in 0..50u64 {
            let offsets = (1 + 20 * chunk)..(21 + 20 * chunk);
            budget.extend(&a, &mut offsets.clone().map(|o| entry(o, 1)).collect());
            budget.remove(&a, &offsets.collect::<Vec<_>>());
            budget.trim(&counters);
            assert!(a.tail.lock().entries.len() <= 100);
        }
        assert_eq!(
            offsets(&a, 1001, limit(1, 1, 1)),
            Some((vec![], 1001)),
            "the tail ends where the queue does"
        );
        let slots = a.tail.lock().entries.len();
        assert_eq!(budget.bytes, slots * TAIL_ENTRY_OVERHEAD_BYTES);
    }

    #[test]
    fn reads_skip_settled_entries_and_keep_their_limits() {
        let a = queue(0);
        let mut budget = TailBudget::new(1 << 20);
        budget.extend(&a, &mut (0..10).map(|o| entry(o, 100)).collect());
        budget.remove(&a, &[2, 3]);
        assert_eq!(
            offsets(&a, 1, limit(3, 10_000, 10)),
            Some((vec![1, 4, 5], 6))
        );
        assert_eq!(offsets(&a, 1, limit(9, 250, 10)), Some((vec![1, 4], 5)));
        assert_eq!(
            offsets(&a, 4, limit(9, 10, 10)),
            Some((vec![4], 5)),
            "at least one"
        );
        assert_eq!(offsets(&a, 1, limit(9, 10_000, 3)), Some((vec![1], 4)));
    }
}
