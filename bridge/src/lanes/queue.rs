//! One queue of the endpoint as the lanes see it: how far it has been read, who has fallen behind,
//! what is to be settled.

use std::{
    borrow::Borrow,
    collections::{BTreeSet, HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use edgehub_proto::identity::Identity;

use super::{intake::Participant, message::Settled, table::LaneKey};

/// Reads, scans and settles of one queue.
///
/// At most one read is under way per queue. That is what makes catching up exact: while a scan
/// runs the main reader stands still, so a lane that the scan brought up to the main reader's
/// position has missed nothing.
#[derive(Debug)]
pub(super) struct QueueState {
    pub(super) priority: u32,
    /// The store's next offset as far as known.
    pub(super) tail: u64,
    /// Where the main reader goes on.
    pub(super) next: u64,
    pub(super) reading: Option<Reading>,
    /// After an error from the store: when to read again.
    pub(super) read_retry_at: Option<Instant>,
    /// The last read was a scan: the main reader's turn.
    pub(super) main_turn: bool,
    /// Lanes that want a scan, in the order in which they asked.
    pub(super) wants: BTreeSet<(u64, LaneKey)>,
    /// Senders that the main reader leaves out; none when it has to be built again.
    pub(super) skip: Option<Arc<HashSet<SenderKey>>>,
    /// Settled by us, not yet confirmed by the store: must not be taken in again by a read.
    pub(super) unconfirmed: HashSet<u64>,
    /// Of those, what the store confirmed while a read was under way: it may have looked before.
    pub(super) confirmed_late: Vec<u64>,
    pub(super) to_settle: Vec<Settled>,
    pub(super) settling: bool,
    /// After an error from the store: when to settle again.
    pub(super) settle_retry_at: Option<Instant>,
}

/// The read that is under way.
#[derive(Debug)]
pub(super) enum Reading {
    Main,
    /// Lanes that the scan serves.
    Scan(HashMap<Identity, Participant>),
}

impl QueueState {
    pub(super) fn new(priority: u32, from: u64, tail: u64) -> Self {
        Self {
            priority,
            tail,
            next: from,
            reading: None,
            read_retry_at: None,
            main_turn: true,
            wants: BTreeSet::new(),
            skip: None,
            unconfirmed: HashSet::new(),
            confirmed_late: Vec::new(),
            to_settle: Vec::new(),
            settling: false,
            settle_retry_at: None,
        }
    }

    pub(super) fn settle(&mut self, settled: Settled) {
        self.unconfirmed.insert(settled.offset);
        self.to_settle.push(settled);
    }

    /// The store has settled these.
    pub(super) fn confirm(&mut self, settled: &[Settled]) {
        self.confirmed_late
            .extend(settled.iter().map(|one| one.offset));
        if self.reading.is_none() {
            self.read_ended();
        }
    }

    /// No read is under way any more, and what the last one brought was looked at.
    pub(super) fn read_ended(&mut self) {
        for offset in self.confirmed_late.drain(..) {
            self.unconfirmed.remove(&offset);
        }
    }

    /// Everything that is stored has been read (by the main reader).
    pub(super) fn is_read(&self) -> bool {
        self.next >= self.tail
    }
}

/// A sender's id that can be looked up by text.
#[derive(Clone, Debug)]
pub(super) struct SenderKey(pub(super) Identity);

impl PartialEq for SenderKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for SenderKey {}

impl Hash for SenderKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_str().hash(state);
    }
}

impl Borrow<str> for SenderKey {
    fn borrow(&self) -> &str {
        self.0.as_str()
    }
}

/// Which entries a read has to bring. Anything else that it brings is ignored.
#[derive(Clone, Debug)]
pub struct ReadFilter(Kind);

#[derive(Clone, Debug)]
enum Kind {
    AllBut(Arc<HashSet<SenderKey>>),
    Only {
        wanted: Arc<HashMap<SenderKey, u64>>,
        below: u64,
    },
}

impl ReadFilter {
    pub(super) fn all_but(senders: Arc<HashSet<SenderKey>>) -> Self {
        Self(Kind::AllBut(senders))
    }

    pub(super) fn only(wanted: HashMap<SenderKey, u64>, below: u64) -> Self {
        Self(Kind::Only {
            wanted: Arc::new(wanted),
            below,
        })
    }

    /// Whether every entry is wanted: the read needs no filter.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(&self.0, Kind::AllBut(senders) if senders.is_empty())
    }

    /// Whether the entry at `offset` of `sender` is wanted.
    #[must_use]
    pub fn admits(&self, offset: u64, sender: &str) -> bool {
        match &self.0 {
            Kind::AllBut(senders) => !senders.contains(sender),
            Kind::Only { wanted, below } => {
                offset < *below && wanted.get(sender).is_some_and(|from| offset >= *from)
            }
        }
    }
}
