//! One link: its credit, and a delivery that has arrived in part.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::attach::Attach;

/// Where a link stands.
#[derive(Debug)]
pub(super) enum Phase {
    /// The peer's attach was handed out and is not answered.
    Asked(Attach),
    /// Both sides are attached.
    Attached,
    /// We detached; the peer's detach is awaited, what it sends meanwhile counts for nothing.
    Detaching,
}

/// A link.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) generation: u64,
    pub(super) name: Arc<str>,
    /// It stands under its name: until it is detached by either side.
    pub(super) has_name: bool,
    pub(super) phase: Phase,
    pub(super) direction: Direction,
}

impl Link {
    /// What tells links of a session apart: each direction has names of its own (part 2, 2.6.1).
    pub(super) fn key(&self) -> (bool, Arc<str>) {
        let peer_sends = matches!(self.direction, Direction::Receiving(_));
        (peer_sends, Arc::clone(&self.name))
    }
}

/// What differs by who sends.
#[derive(Debug)]
pub(super) enum Direction {
    /// The peer sends.
    Receiving(Receiving),
    /// We send.
    Sending(Sending),
}

/// A link that we receive on.
#[derive(Debug, Default)]
pub(super) struct Receiving {
    pub(super) delivery_count: u32,
    /// Deliveries that the peer may still send.
    pub(super) credit: u32,
    /// What credit is topped up to, counting what is unsettled.
    pub(super) target: u32,
    /// Deliveries that arrived, or are arriving, and are not settled by us.
    pub(super) unsettled: u32,
    pub(super) max_message_size: Option<u64>,
    pub(super) partial: Option<Partial>,
    /// A flow is owed whatever the credit.
    pub(super) flow_due: bool,
    /// It is among the links of its session whose credit is looked at with the next output.
    pub(super) is_listed: bool,
}

/// A delivery of which not all frames have arrived.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) delivery_id: u32,
    pub(super) tag: Bytes,
    pub(super) message_format: u32,
    pub(super) settled: bool,
    pub(super) payload: BytesMut,
}

impl Receiving {
    /// The credit to say now, if it is time to say it: when a tenth of it is due, so that small
    /// windows are topped up at once and large ones not for each delivery.
    pub(super) fn top_up(&mut self) -> Option<u32> {
        let full = self.target.saturating_sub(self.unsettled);
        let due = full.saturating_sub(self.credit);
        if !self.flow_due && (due == 0 || due < (self.target / 10).max(1)) {
            return None;
        }
        self.flow_due = false;
        // Credit that was given is not taken back: deliveries that use it may be on their way.
        self.credit = full.max(self.credit);
        Some(self.credit)
    }

    /// A delivery is done with.
    pub(super) fn settled_one(&mut self) {
        self.unsettled = self.unsettled.saturating_sub(1);
    }
}

/// A link that we send on.
#[derive(Debug, Default)]
pub(super) struct Sending {
    pub(super) delivery_count: u32,
    pub(super) credit: u32,
    pub(super) drain: bool,
    /// The peer asked for a flow before the link was accepted.
    pub(super) echo: bool,
    pub(super) unsettled: u32,
    /// What the peer takes, bytes.
    pub(super) max_message_size: Option<u64>,
}

impl Sending {
    /// Takes the peer's view (part 2, 2.6.7). Whether credit or drain changed.
    pub(super) fn flow(&mut self, delivery_count: Option<u32>, credit: u32, drain: bool) -> bool {
        // A peer that has seen nothing of us leaves the count out: it means our initial one, 0.
        let seen = delivery_count.unwrap_or(0);
        let ahead = self.delivery_count.wrapping_sub(seen);
        let left = credit.saturating_sub(ahead);
        // A count that is ahead of ours is a lie; it would become thousands of millions of credit.
        let left = if ahead > u32::MAX / 2 { 0 } else { left };
        let changed = left != self.credit || drain != self.drain;
        self.credit = left;
        self.drain = drain;
        changed
    }
}
