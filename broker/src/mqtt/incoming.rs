//! The client's publishes that are not acknowledged yet.
//!
//! PUBACKs leave in the order in which the publishes came (MQTT-4.6.0-2), each when its message
//! is committed or needs no commit.

use std::collections::VecDeque;
use std::num::NonZeroU16;

/// Publishes whose turn to be acknowledged has not come, oldest first.
#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    publishes: VecDeque<Publish>,
    bytes: usize,
    last_sequence: u64,
    committed: u64,
}

#[derive(Debug)]
struct Publish {
    sequence: u64,
    packet_id: Option<NonZeroU16>,
    bytes: usize,
    /// Needs no commit.
    handled: bool,
}

impl Unacknowledged {
    /// Takes a publish; QoS 0 has no packet id. Returns its sequence number.
    pub(super) fn push(&mut self, packet_id: Option<NonZeroU16>, bytes: usize) -> u64 {
        self.last_sequence += 1;
        self.bytes += bytes;
        self.publishes.push_back(Publish {
            sequence: self.last_sequence,
            packet_id,
            bytes,
            handled: false,
        });
        self.last_sequence
    }

    /// This publish needs no commit.
    pub(super) fn handled(&mut self, sequence: u64) {
        // The newest is the one that was just handed out, as a rule.
        if let Some(publish) = self
            .publishes
            .iter_mut()
            .rev()
            .find(|publish| publish.sequence == sequence)
        {
            publish.handled = true;
        }
    }

    /// Everything up to and including `sequence` is committed.
    pub(super) fn committed(&mut self, sequence: u64) {
        self.committed = self.committed.max(sequence);
    }

    /// The oldest publish, when its turn has come; `Some(None)` for one of QoS 0.
    pub(super) fn pop(&mut self) -> Option<Option<NonZeroU16>> {
        let committed = self.committed;
        let publish = self
            .publishes
            .pop_front_if(|front| front.handled || front.sequence <= committed)?;
        self.bytes -= publish.bytes;
        Some(publish.packet_id)
    }

    /// What they cost.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.publishes.len()
    }
}
