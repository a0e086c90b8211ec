//! Which entries of a queue are settled: a mark, and settled ranges above it.
//!
//! A pure state machine: it knows offsets and nothing of RocksDB. The writer changes a copy,
//! writes the copy's checkpoint and publishes the copy once that is committed.
//!
//! # Invariants
//! - The mark is the first unsettled offset, or the queue's end.
//! - Memory is bounded: when there are too many ranges, [`SettleSet::shed`] names the entries
//!   to delete physically and *forgets* them. A forgotten entry is settled although no range
//!   says so: its absence says it. The caller therefore answers "does this entry exist?" when
//!   it matters.
//! - The number of settled offsets is exact at any time, forgotten ones included.

use std::collections::VecDeque;
use std::ops::Range;

/// Settled offsets of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SettleSet {
    mark: u64,
    spans: VecDeque<Span>,
    /// Settled offsets: below the mark, in spans, and forgotten.
    settled: u64,
    /// Settled offsets in spans.
    spanned: u64,
    /// Entries below this offset are physically deleted.
    cleaned: u64,
}

/// Settled offsets `start..end` above the mark; never empty, never touching another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: u64,
    end: u64,
    /// Entries `start..cleaned` are physically deleted.
    cleaned: u64,
}

impl SettleSet {
    /// What a checkpoint says: every offset below `mark` is settled, so are `spans`, and
    /// `length` of the first `next` offsets are not.
    ///
    /// # Errors
    /// With a reason when that is contradictory.
    pub(crate) fn recover(
        mark: u64,
        next: u64,
        length: u64,
        spans: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<Self, &'static str> {
        let settled = next.checked_sub(length).ok_or("length above next offset")?;
        let mut set = Self {
            mark,
            settled,
            ..Self::default()
        };
        let mut floor = mark;
        for span in spans {
            if span.start < floor || span.is_empty() || span.end > next {
                return Err("settled ranges out of order");
            }
            floor = span.end;
            set.spanned += span.end - span.start;
            set.spans.push_back(Span {
                start: span.start,
                end: span.end,
                cleaned: span.start,
            });
        }
        match mark.checked_add(set.spanned) {
            Some(known) if mark <= next && known <= settled => Ok(set),
            _ => Err("more settled than counted"),
        }
    }

    /// Every offset below is settled.
    pub(crate) fn mark(&self) -> u64 {
        self.mark
    }

    /// Unsettled offsets of a queue that ends at `next`.
    pub(crate) fn length(&self, next: u64) -> u64 {
        next.saturating_sub(self.settled)
    }

    /// Settled ranges above the mark, ascending.
    pub(crate) fn spans(&self) -> impl ExactSizeIterator<Item = Range<u64>> {
        self.spans.iter().map(|span| span.start..span.end)
    }

    /// First offset from `offset` that is not known to be settled.
    pub(crate) fn skip(&self, offset: u64) -> u64 {
        let offset = offset.max(self.mark);
        match self.span_before(offset) {
            Some(span) if span.end > offset => span.end,
            _ => offset,
        }
    }

    /// Settles an offset below the queue's end; tells whether that is news. `exists` is asked
    /// when the offset may have been forgotten.
    pub(crate) fn settle(&mut self, offset: u64, exists: impl FnOnce() -> bool) -> bool {
        if self.skip(offset) != offset || (self.forgotten() > 0 && !exists()) {
            return false;
        }
        self.settled += 1;
        if offset == self.mark {
            self.mark += 1;
        } else {
            self.spanned += 1;
            self.insert(offset);
        }
        true
    }

    /// Moves the mark over everything settled. `first_from(offset)` finds the first entry that
    /// physically exists from `offset`, `None` when there is none below `next`; it is asked
    /// only when something was forgotten.
    pub(crate) fn advance(&mut self, next: u64, mut first_from: impl FnMut(u64) -> Option<u64>) {
        if self.settled >= next {
            self.mark = next;
            self.spans.clear();
            self.spanned = 0;
            return;
        }
        loop {
            while let Some(span) = self.spans.front().copied().filter(|s| s.start <= self.mark) {
                self.spans.pop_front();
                self.spanned -= span.end - span.start;
                if self.cleaned == span.start {
                    self.cleaned = span.cleaned;
                }
                self.mark = span.end;
            }
            if self.forgotten() == 0 {
                return;
            }
            let gap_end = self.spans.front().map_or(next, |span| span.start);
            let first = first_from(self.mark).map_or(gap_end, |first| first.min(gap_end));
            if first <= self.mark {
                return;
            }
            self.mark = first;
        }
    }

    /// When there are more than `max` spans: forgets all but the lower half of `max` and returns
    /// what has to be deleted physically for that, before anything else is asked.
    pub(crate) fn shed(&mut self, max: usize) -> Vec<Range<u64>> {
        if self.spans.len() <= max {
            return Vec::new();
        }
        let shed = self.spans.split_off(max / 2);
        for span in &shed {
            self.spanned -= span.end - span.start;
        }
        shed.iter()
            .map(|span| span.cleaned..span.end)
            .filter(|range| !range.is_empty())
            .collect()
    }

    /// Settled entries that are not physically deleted yet, behind the mark and in spans with
    /// at least `span_min` of them; from now on they count as deleted.
    pub(crate) fn reclaim(&mut self, span_min: u64) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        if self.cleaned < self.mark {
            ranges.push(self.cleaned..self.mark);
            self.cleaned = self.mark;
        }
        for span in &mut self.spans {
            if span.end - span.cleaned >= span_min {
                ranges.push(span.cleaned..span.end);
                span.cleaned = span.end;
            }
        }
        ranges
    }

    /// Whether [`Self::reclaim`] would find something behind the mark.
    pub(crate) fn reclaimable(&self) -> bool {
        self.cleaned < self.mark
    }

    /// Settled offsets above the mark that no span tells of.
    fn forgotten(&self) -> u64 {
        self.settled
            .saturating_sub(self.mark)
            .saturating_sub(self.spanned)
    }

    fn span_before(&self, offset: u64) -> Option<&Span> {
        let after = self.spans.partition_point(|span| span.start <= offset);
        self.spans.get(after.checked_sub(1)?)
    }

    /// Adds an offset that no span contains.
    fn insert(&mut self, offset: u64) {
        let after = self.spans.partition_point(|span| span.start <= offset);
        let touches_next = self
            .spans
            .get(after)
            .is_some_and(|next| next.start == offset + 1);
        let before = after.checked_sub(1);
        let before = before.filter(|i| self.spans.get(*i).is_some_and(|s| s.end == offset));
        match (before, touches_next) {
            (Some(i), true) => {
                let next = self.spans.remove(after);
                if let (Some(span), Some(next)) = (self.spans.get_mut(i), next) {
                    span.end = next.end;
                }
            }
            (Some(i), false) => {
                if let Some(span) = self.spans.get_mut(i) {
                    span.end += 1;
                }
            }
            (None, true) => {
                if let Some(next) = self.spans.get_mut(after) {
                    next.start = offset;
                    next.cleaned = offset;
                }
            }
            (None, false) => {
                let span = Span {
                    start: offset,
                    end: offset + 1,
                    cleaned: offset,
                };
                self.spans.insert(after, span);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// A queue as slow as it is obvious.
    #[derive(Default)]
    struct Oracle {
        next: u64,
        unsettled: BTreeSet<u64>,
        /// What lies in the database.
        physical: BTreeSet<u64>,
    }

    impl Oracle {
        fn delete(&mut self, ranges: Vec<Range<u64>>) {
            for range in ranges {
                assert!(range.end <= self.next);
                assert_eq!(
                    self.unsettled.range(range.clone()).next(),
                    None,
                    "{range:?}"
                );
                self.physical.retain(|offset| !range.contains(offset));
            }
        }

        fn check(&self, set: &SettleSet) {
            let mark = self.unsettled.first().copied().unwrap_or(self.next);
            assert_eq!(set.mark(), mark);
            assert_eq!(set.length(self.next), self.unsettled.len() as u64);
            let mut found = BTreeSet::new();
            let mut offset = 0;
            while set.skip(offset) < self.next {
                offset = set.skip(offset);
                if self.physical.contains(&offset) {
                    found.insert(offset);
                }
                offset += 1;
            }
            assert_eq!(found, self.unsettled);
            assert!(self.unsettled.is_subset(&self.physical));
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Append(u8),
        /// Offsets, as a part of the queue's length.
        Settle(Vec<u16>),
        SettleRun(u16, u8),
        Shed(u8),
        Reclaim(u8),
        Reopen,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (1u8..60).prop_map(Op::Append),
            4 => proptest::collection::vec(any::<u16>(), 1..20).prop_map(Op::Settle),
            2 => (any::<u16>(), 1u8..40).prop_map(|(at, n)| Op::SettleRun(at, n)),
            1 => (2u8..8).prop_map(Op::Shed),
            1 => (1u8..20).prop_map(Op::Reclaim),
            1 => Just(Op::Reopen),
        ]
    }

    fn settle(set: &mut SettleSet, oracle: &mut Oracle, offset: u64) {
        if offset >= oracle.next {
            return;
        }
        let news = set.settle(offset, || oracle.physical.contains(&offset));
        assert_eq!(news, oracle.unsettled.remove(&offset), "offset {offset}");
    }

    fn advance(set: &mut SettleSet, oracle: &Oracle) {
        let next = oracle.next;
        set.advance(next, |from| {
            oracle.physical.range(from..next).next().copied()
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn it_agrees_with_a_set(ops in proptest::collection::vec(op(), 1..60)) {
            let mut set = SettleSet::default();
            let mut oracle = Oracle::default();
            for op in ops {
                match op {
                    Op::Append(n) => for _ in 0..n {
                        oracle.unsettled.insert(oracle.next);
                        oracle.physical.insert(oracle.next);
                        oracle.next += 1;
                    },
                    Op::Settle(at) => for at in at {
                        let offset = u64::from(at) * (oracle.next + 1) / 65_536;
                        settle(&mut set, &mut oracle, offset);
                    },
                    Op::SettleRun(at, n) => {
                        let start = u64::from(at) * (oracle.next + 1) / 65_536;
                        for offset in start..start + u64::from(n) {
                            settle(&mut set, &mut oracle, offset);
                        }
                    }
                    Op::Shed(max) => {
                        let ranges = set.shed(usize::from(max));
                        prop_assert!(set.spans().len() <= usize::from(max));
                        oracle.delete(ranges);
                    }
                    Op::Reclaim(min) => oracle.delete(set.reclaim(u64::from(min))),
                    Op::Reopen => {
                        let length = set.length(oracle.next);
                        set = SettleSet::recover(
                            set.mark(), oracle.next, length, set.spans().collect::<Vec<_>>(),
                        ).unwrap();
                    }
                }
                advance(&mut set, &oracle);
                oracle.check(&set);
            }
        }
    }

    #[test]
    fn in_order_settling_needs_no_spans() {
        let mut set = SettleSet::default();
        for offset in 0..1000 {
            assert!(set.settle(offset, || true));
            assert!(!set.settle(offset, || true));
        }
        assert_eq!(
            (set.mark(), set.spans().len(), set.length(1500)),
            (1000, 0, 500)
        );
        assert_eq!(set.reclaim(1), vec![0..1000]);
        assert!(set.reclaim(1).is_empty() && !set.reclaimable());
    }

    #[test]
    fn a_long_span_above_a_stuck_mark_is_reclaimed_once() {
        let mut set = SettleSet::default();
        for offset in 1..=500 {
            set.settle(offset, || true);
        }
        assert_eq!(set.reclaim(100), vec![1..501]);
        for offset in 501..=550 {
            set.settle(offset, || true);
        }
        assert!(set.reclaim(100).is_empty());
        assert_eq!((set.mark(), set.spans().len()), (0, 1));
    }

    #[test]
    fn contradictory_checkpoints_are_refused() {
        let one = |span: Range<u64>| std::iter::once(span);
        assert!(SettleSet::recover(0, 5, 6, []).is_err());
        assert!(SettleSet::recover(6, 5, 0, []).is_err());
        assert!(SettleSet::recover(1, 9, 3, [3..5, 4..6]).is_err());
        assert!(SettleSet::recover(1, 9, 3, one(3..3)).is_err());
        assert!(SettleSet::recover(1, 9, 3, one(3..10)).is_err());
        assert!(SettleSet::recover(1, 9, 8, one(3..5)).is_err());
        assert!(SettleSet::recover(1, 9, 6, one(3..5)).is_ok());
    }
}
