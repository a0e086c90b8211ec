//! What one queue has out and waiting. Part of [`super::machine`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{Message, SystemProperty};
use edgehub_proto::stored;
use edgehub_storage::{Entry, Outcome, QueueId, ReadBatch, Settled};

use super::limits::{OFFSETS_OUT_MAX, SHARED_SLOT};

/// A queue as the configuration names it.
#[derive(Debug)]
pub(super) struct Source<Q> {
    pub(super) id: QueueId,
    /// The input's name.
    pub(super) input: Arc<str>,
    pub(super) slot: u16,
    /// Entries below may have been sent before this process began.
    pub(super) opened_end: u64,
    /// What the shell needs to know of it.
    pub(super) queue: Q,
}

/// The deliveries of one queue. Entries below the cursor are waiting, out, or settled.
#[derive(Debug)]
pub(super) struct Stream<Q> {
    pub(super) source: Source<Q>,
    /// Where the queue ends, as far as is known.
    pub(super) end: u64,
    /// Where reading goes on.
    pub(super) cursor: u64,
    /// Read and not sent, by offset.
    pub(super) waiting: VecDeque<Item>,
    /// With the client, by offset.
    pub(super) out: VecDeque<Item>,
    /// To be handed to the store.
    pub(super) settled: Vec<Settled>,
    /// It cannot be read now.
    pub(super) stalled: bool,
    /// It is not in the configuration any more: only what is out is waited for.
    pub(super) retired: bool,
    /// Unsettled entries below were sent to an earlier connection.
    sent_end: u64,
    /// So many more entries below [`Source::opened_end`] may have been sent.
    suspects: usize,
    /// Numbers of entries that were sent and not settled, by offset; in the shared slot only, where
    /// offsets of several queues meet.
    numbers: VecDeque<(u64, u64)>,
}

/// An entry on its way.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) offset: u64,
    pub(super) bytes: usize,
    pub(super) sender: Identity,
    /// The number of its token.
    pub(super) number: u64,
    pub(super) redelivered: bool,
    /// How often the client gave it back.
    pub(super) releases: u8,
    pub(super) read_at: Option<Instant>,
    /// When it was sent last.
    pub(super) sent_at: Option<Instant>,
    expires_at_ms: Option<u64>,
    shared: Option<u64>,
    content: Content,
}

/// A message is decoded when it is sent first.
#[derive(Debug)]
enum Content {
    Stored(Bytes),
    Decoded(Arc<Message>),
}

impl Item {
    pub(super) fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }

    /// The message; none when what is stored is none.
    pub(super) fn decode(&mut self) -> Option<Arc<Message>> {
        if let Content::Stored(bytes) = &self.content {
            let message = stored::decode_message(bytes.clone()).ok()?;
            self.content = Content::Decoded(Arc::new(message));
        }
        match &self.content {
            Content::Decoded(message) => Some(Arc::clone(message)),
            Content::Stored(_) => None,
        }
    }

    /// The output that the sender named, once it is decoded.
    pub(super) fn output(&self) -> &str {
        match &self.content {
            Content::Decoded(message) => message
                .system
                .get(SystemProperty::OutputName)
                .unwrap_or_default(),
            Content::Stored(_) => "",
        }
    }
}

impl<Q> Stream<Q> {
    /// Entries below `sent_end` were sent before, and the first `suspects` that were there when the
    /// store was opened perhaps.
    pub(super) fn new(source: Source<Q>, sent_end: u64, suspects: usize) -> Self {
        Self {
            source,
            end: 0,
            cursor: 0,
            waiting: VecDeque::new(),
            out: VecDeque::new(),
            settled: Vec::new(),
            stalled: false,
            retired: false,
            sent_end,
            suspects,
            numbers: VecDeque::new(),
        }
    }

    pub(super) fn is_shared(&self) -> bool {
        self.source.slot == SHARED_SLOT
    }

    /// Whether there is nothing to send, now.
    pub(super) fn is_drained(&self) -> bool {
        self.waiting.is_empty() && self.cursor >= self.end
    }

    /// Takes what a read brought.
    pub(super) fn fill(&mut self, batch: ReadBatch, now: Option<Instant>) {
        for entry in batch.entries {
            let redelivered = self.may_have_been_sent(entry.offset);
            self.waiting.push_back(item(entry, redelivered, now));
        }
        self.cursor = self.cursor.max(batch.next);
        // What was settled by others (its time was over) is not read again.
        let (cursor, waiting, out) = (self.cursor, &self.waiting, &self.out);
        self.numbers.retain(|(offset, _)| {
            let is_here = |items: &VecDeque<Item>| {
                items
                    .binary_search_by_key(offset, |item| item.offset)
                    .is_ok()
            };
            *offset >= cursor || is_here(waiting) || is_here(out)
        });
    }

    fn may_have_been_sent(&mut self, offset: u64) -> bool {
        if offset < self.sent_end {
            return true;
        }
        let suspect = self.suspects > 0 && offset < self.source.opened_end;
        self.suspects -= usize::from(suspect);
        suspect
    }

    /// Whether the first one that waits is near enough to the first one that is out.
    pub(super) fn is_in_reach(&self) -> bool {
        match (self.out.front(), self.waiting.front()) {
            (Some(lowest), Some(next)) => {
                next.offset < lowest.offset.saturating_add(OFFSETS_OUT_MAX)
            }
            _ => true,
        }
    }

    /// Puts an item among those that are out.
    pub(super) fn push_out(&mut self, item: Item) {
        insert(&mut self.out, item);
    }

    /// Takes the item with this token out of those that are out.
    pub(super) fn take_out(&mut self, number: u64) -> Option<Item> {
        let index = if self.is_shared() {
            self.out.iter().position(|item| item.number == number)
        } else {
            // By offset, which is the number.
            self.out
                .binary_search_by_key(&number, |item| item.offset)
                .ok()
        };
        self.out.remove(index?)
    }

    /// Puts an item back among those that wait, in its place.
    pub(super) fn put_back(&mut self, item: Item) {
        insert(&mut self.waiting, item);
    }

    /// The entry is over.
    pub(super) fn settle(&mut self, item: &Item, outcome: Outcome) {
        if self.is_shared()
            && let Ok(index) = self
                .numbers
                .binary_search_by_key(&item.offset, |(offset, _)| *offset)
        {
            self.numbers.remove(index);
        }
        self.settled.push(Settled {
            offset: item.offset,
            shared: item.shared,
            outcome,
        });
    }

    /// The number of an entry's token: the one that it had before, or a new one of the shared slot.
    pub(super) fn number(&mut self, offset: u64, next_shared: &mut u64) -> u64 {
        if !self.is_shared() {
            return offset;
        }
        match self.numbers.binary_search_by_key(&offset, |(o, _)| *o) {
            Ok(index) => self.numbers.get(index).map_or(0, |(_, number)| *number),
            Err(index) => {
                let number = *next_shared;
                *next_shared += 1;
                self.numbers.insert(index, (offset, number));
                number
            }
        }
    }

    /// The lowest number that an unsettled entry of the shared slot has.
    pub(super) fn lowest_number(&self) -> Option<u64> {
        self.numbers.iter().map(|(_, number)| *number).min()
    }

    /// Back to the first unsettled entry: what is out and waiting will be read again. What was out
    /// may have been received.
    pub(super) fn rewind(&mut self) {
        let sent = |item: &Item| item.offset + 1;
        let again = self.waiting.iter().filter(|item| item.redelivered);
        let sent_end = self.out.iter().map(sent).chain(again.map(sent)).max();
        self.sent_end = sent_end.max(self.sent_end()).unwrap_or(0);
        let first = self.out.front().into_iter().chain(self.waiting.front());
        self.cursor = first.map(|item| item.offset).min().unwrap_or(self.cursor);
        self.out.clear();
        self.waiting.clear();
    }

    /// Below which offset entries were sent to an earlier connection and have not been read again.
    pub(super) fn sent_end(&self) -> Option<u64> {
        (self.cursor < self.sent_end).then_some(self.sent_end)
    }

    /// Nothing was sent, as far as the next connection is concerned.
    pub(super) fn forget_sent(&mut self) {
        self.sent_end = 0;
        self.suspects = 0;
        self.numbers.clear();
    }
}

fn insert(items: &mut VecDeque<Item>, item: Item) {
    // Nearly always at the end.
    if items.back().is_none_or(|last| last.offset < item.offset) {
        items.push_back(item);
        return;
    }
    let index = items.partition_point(|other| other.offset < item.offset);
    items.insert(index, item);
}

fn item(entry: Entry, redelivered: bool, read_at: Option<Instant>) -> Item {
    Item {
        offset: entry.offset,
        bytes: entry.message.len(),
        sender: entry.sender,
        number: entry.offset,
        redelivered,
        releases: 0,
        read_at,
        sent_at: None,
        expires_at_ms: entry.expires_at_ms,
        shared: entry.shared,
        content: Content::Stored(entry.message),
    }
}
