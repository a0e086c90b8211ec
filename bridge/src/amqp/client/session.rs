//! One session and its links: windows, credit, what is unsettled.

use std::collections::{HashMap, VecDeque};

use bytes::{Bytes, BytesMut};

use super::terms::{LinkKey, SessionKey};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionState {
    /// begin was sent.
    Beginning,
    Mapped,
    /// end was sent: the channel is free when the peer's comes.
    Ending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    Attached,
    /// attach was sent.
    Attaching,
    /// detach was sent: the handle is free when the peer's comes.
    Detaching,
    /// The peer answered without a terminus: its detach says why (part 2, 2.6.3).
    Refused,
}

/// A delivery that was sent in part, because the session's window is used up.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) handle: u32,
    /// Of the first frame; none when that was sent.
    pub(super) first: Option<First>,
    pub(super) rest: Bytes,
}

/// What the first frame of a delivery carries.
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    pub(super) number: u32,
    pub(super) message_format: u32,
    pub(super) settled: bool,
}

/// A delivery of which not all frames have arrived.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) number: u32,
    pub(super) tag: Bytes,
    pub(super) settled: bool,
    pub(super) payload: BytesMut,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) generation: u64,
    pub(super) name: String,
    /// We send.
    pub(super) is_up: bool,
    pub(super) state: LinkState,
    pub(super) remote_handle: Option<u32>,
    pub(super) delivery_count: u32,
    pub(super) credit: u32,
    /// The largest message that the peer takes.
    pub(super) max_message_size: Option<u64>,
    pub(super) settled: bool,
    /// rcv-settle-mode second.
    pub(super) second: bool,
    /// Receiving: most deliveries with us at once, and how many there are.
    pub(super) credit_max: u32,
    pub(super) held: u32,
    pub(super) partial: Option<Partial>,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) key: SessionKey,
    pub(super) state: SessionState,
    pub(super) remote_channel: Option<u16>,
    /// Number of our next transfer and of our next delivery.
    pub(super) next_outgoing_id: u32,
    pub(super) next_delivery: u32,
    /// Transfers that the peer takes now.
    pub(super) remote_window: u32,
    pub(super) next_incoming_id: u32,
    /// Transfers that the peer may send before our next flow.
    pub(super) incoming_left: u32,
    /// By our handle.
    pub(super) links: Vec<Option<Link>>,
    pub(super) remote_handles: HashMap<u32, u32>,
    /// Sent and not settled, with the link's handle, in order.
    pub(super) unsettled: VecDeque<(u32, u32)>,
    pub(super) pending: Option<Pending>,
}

impl Session {
    pub(super) fn new(key: SessionKey, incoming_window: u32) -> Self {
        Self {
            key,
            state: SessionState::Beginning,
            remote_channel: None,
            next_outgoing_id: 0,
            next_delivery: 0,
            remote_window: 0,
            next_incoming_id: 0,
            incoming_left: incoming_window,
            links: Vec::new(),
            remote_handles: HashMap::new(),
            unsettled: VecDeque::new(),
            pending: None,
        }
    }

    pub(super) fn link(&self, handle: u32) -> Option<&Link> {
        self.links.get(usize::try_from(handle).ok()?)?.as_ref()
    }

    pub(super) fn link_mut(&mut self, handle: u32) -> Option<&mut Link> {
        self.links.get_mut(usize::try_from(handle).ok()?)?.as_mut()
    }

    pub(super) fn key_of(&self, handle: u32) -> Option<LinkKey> {
        let generation = self.link(handle)?.generation;
        Some(LinkKey {
            session: self.key,
            handle,
            generation,
        })
    }

    /// Puts a link at the first free handle.
    pub(super) fn insert(&mut self, link: Link) -> u32 {
        let free = self.links.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.links.push(None);
            self.links.len().saturating_sub(1)
        });
        if let Some(place) = self.links.get_mut(index) {
            *place = Some(link);
        }
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// Forgets a link and everything about its deliveries.
    pub(super) fn remove(&mut self, handle: u32) -> Option<Link> {
        self.forget_deliveries(handle);
        let index = usize::try_from(handle).ok()?;
        let link = self.links.get_mut(index)?.take()?;
        if let Some(remote) = link.remote_handle {
            self.remote_handles.remove(&remote);
        }
        Some(link)
    }

    pub(super) fn forget_deliveries(&mut self, handle: u32) {
        self.unsettled.retain(|(_, of)| *of != handle);
        if self
            .pending
            .as_ref()
            .is_some_and(|one| one.handle == handle)
        {
            self.pending = None;
        }
        if let Some(link) = self.link_mut(handle) {
            link.partial = None;
        }
    }

    /// What a flow says of the session (part 2, 2.5.6).
    pub(super) fn window(&mut self, next_incoming_id: Option<u32>, incoming_window: u32) {
        // Before the peer saw our begin it counts from our first transfer.
        let from = next_incoming_id.unwrap_or(0);
        let under_way = self.next_outgoing_id.wrapping_sub(from);
        self.remote_window = incoming_window.saturating_sub(under_way);
    }
}

/// Whether `number` lies in `first..=last`, in the arithmetic of serial numbers (RFC 1982).
pub(super) fn is_within(number: u32, first: u32, last: u32) -> bool {
    number.wrapping_sub(first) <= last.wrapping_sub(first)
}
