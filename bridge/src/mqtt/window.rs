//! Our publishes that the server has not acknowledged, and the packet ids of everything we send.
//!
//! PUBACKs may come in any order; an early one is reported at once but keeps its place until all
//! before it came, which makes packet ids in use one contiguous range.

use std::{collections::VecDeque, num::NonZeroU16};

/// Publishes have the ids 1 to this; what is above is for subscriptions, so that the two never meet.
const PUBLISH_IDS: u16 = 65_279;

/// Most publishes in the window: half of the ids, so that an id in flight is never reused.
pub(super) const WINDOW_MAX: usize = PUBLISH_IDS as usize / 2;

/// One publish in the window.
#[derive(Debug)]
struct Slot {
    token: u64,
    acked: bool,
}

/// The window of one connection.
#[derive(Debug)]
pub(super) struct Window {
    limit: usize,
    /// Publishes from the oldest unacknowledged on. The packet id of the slot at index `i` is `i`
    /// steps after `front_id`.
    slots: VecDeque<Slot>,
    front_id: u16,
    acked: Vec<u64>,
}

/// A PUBACK for a packet id that is not in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotInFlight;

impl Window {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: limit.clamp(1, WINDOW_MAX),
            slots: VecDeque::new(),
            front_id: 1,
            acked: Vec::new(),
        }
    }

    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.slots.len())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.iter().filter(|slot| !slot.acked).count()
    }

    /// The packet id of the next publish.
    pub(super) fn next_id(&self) -> Option<NonZeroU16> {
        NonZeroU16::new(id_at(self.front_id, self.slots.len()))
    }

    /// The publish with [`Window::next_id`] was written.
    pub(super) fn push(&mut self, token: u64) {
        self.slots.push_back(Slot {
            token,
            acked: false,
        });
    }

    /// Takes a PUBACK.
    pub(super) fn ack(&mut self, packet_id: u16) -> Result<(), NotInFlight> {
        let index = index_of(self.front_id, packet_id).ok_or(NotInFlight)?;
        let slot = self.slots.get_mut(index).ok_or(NotInFlight)?;
        if std::mem::replace(&mut slot.acked, true) {
            return Err(NotInFlight);
        }
        self.acked.push(slot.token);
        while self.slots.front().is_some_and(|slot| slot.acked) {
            self.slots.pop_front();
            self.front_id = id_at(self.front_id, 1);
        }
        Ok(())
    }

    /// Tokens acknowledged since the last call, in the order of their PUBACKs.
    pub(super) fn drain_acked(&mut self) -> std::vec::Drain<'_, u64> {
        self.acked.drain(..)
    }
}

/// The id `steps` after `front`, counted in 1..=[`PUBLISH_IDS`].
fn id_at(front: u16, steps: usize) -> u16 {
    let ids = u32::from(PUBLISH_IDS);
    let steps = u32::try_from(steps % usize::from(PUBLISH_IDS)).unwrap_or(0);
    let zero_based = (u32::from(front).saturating_sub(1) + steps) % ids;
    u16::try_from(zero_based + 1).unwrap_or(1)
}

/// How many steps `packet_id` is after `front`; none if it is not a publish's.
fn index_of(front: u16, packet_id: u16) -> Option<usize> {
    if !(1..=PUBLISH_IDS).contains(&packet_id) {
        return None;
    }
    let ids = u32::from(PUBLISH_IDS);
    Some(((u32::from(packet_id) + ids - u32::from(front)) % ids) as usize)
}

/// The ids of SUBSCRIBE and UNSUBSCRIBE packets, of which one at a time is unanswered.
#[derive(Debug, Default)]
pub(super) struct SubscriptionIds(u8);

impl SubscriptionIds {
    pub(super) fn next(&mut self) -> NonZeroU16 {
        let id = u16::from(self.0) + PUBLISH_IDS + 1;
        self.0 = self.0.wrapping_add(1);
        NonZeroU16::new(id).unwrap_or(NonZeroU16::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_publishes_and_subscriptions_never_meet() {
        let mut window = Window::new(2);
        let mut publishes = std::collections::HashSet::new();
        for token in 0..70_000 {
            let id = window.next_id().unwrap().get();
            publishes.insert(id);
            window.push(token);
            window.ack(id).unwrap();
        }
        assert_eq!(publishes.len(), usize::from(PUBLISH_IDS));
        let mut ids = SubscriptionIds::default();
        let first = ids.next();
        let mut subscriptions: Vec<u16> = (0..255).map(|_| ids.next().get()).collect();
        subscriptions.push(first.get());
        subscriptions.sort_unstable();
        assert_eq!(
            subscriptions,
            (PUBLISH_IDS + 1..=u16::MAX).collect::<Vec<_>>()
        );
        assert!(subscriptions.iter().all(|id| !publishes.contains(id)));
        assert_eq!(ids.next(), first);
        assert_eq!(window.ack(first.get()), Err(NotInFlight));
    }

    #[test]
    fn a_window_that_is_too_large_for_the_ids_is_made_smaller() {
        assert_eq!(Window::new(usize::MAX).room(), WINDOW_MAX);
        assert_eq!(Window::new(0).room(), 1);
    }
}
