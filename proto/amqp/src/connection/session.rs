//! One session: its windows, its links, and what is unsettled in it (part 2, 2.5).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use fe2o3_amqp_types::definitions::Role;
use smallvec::SmallVec;

use super::event::{LinkId, Sent};
use super::link::{Direction, Link, Phase, Receiving, Sending};
use crate::performative::{DeliveryState, Disposition, Outcome};

/// A session.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) links: HashMap<u32, Link>,
    /// Names of the links that stand, each with whether the peer sends.
    names: HashSet<(bool, Arc<str>)>,
    /// Links whose credit is looked at with the next output.
    pub(super) due: Vec<u32>,
    /// Transfers that the peer may send before our next flow.
    pub(super) incoming_window: u32,
    pub(super) next_incoming_id: u32,
    pub(super) next_outgoing_id: u32,
    /// Transfers that the peer takes.
    pub(super) remote_incoming_window: u32,
    next_delivery_id: u32,
    /// Deliveries that we sent and that are not settled.
    sent: BTreeMap<u32, SentRecord>,
    /// Deliveries whose frames wait for the peer's window.
    pub(super) waiting: VecDeque<Waiting>,
    /// Dispositions that are owed, as runs of deliveries with one outcome.
    received_runs: Vec<Run>,
    sent_runs: Vec<Run>,
    /// It is among those that leave something with the next output.
    pub(super) is_stirred: bool,
    /// The peer's window has room again, and its links are not told yet.
    pub(super) is_reopened: bool,
    /// We ended it and wait for the peer's end.
    pub(super) ending: bool,
}

#[derive(Debug)]
struct SentRecord {
    link: LinkId,
    /// The peer said an outcome and waits for our settlement.
    answered: bool,
}

/// The rest of a delivery that waits for room at the peer.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) link: LinkId,
    pub(super) delivery_id: u32,
    pub(super) tag: Bytes,
    pub(super) message_format: u32,
    pub(super) settled: bool,
    pub(super) payload: Bytes,
    /// The first frame has left.
    pub(super) begun: bool,
}

/// Deliveries in a row that share an outcome.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    last: u32,
    outcome: Outcome,
}

impl Session {
    pub(super) fn new(next_incoming_id: u32, remote_incoming_window: u32, window: u32) -> Self {
        Self {
            links: HashMap::new(),
            names: HashSet::new(),
            due: Vec::new(),
            incoming_window: window,
            next_incoming_id,
            // As the reference does (spec/amqp.md 2.2).
            next_outgoing_id: 1,
            remote_incoming_window,
            next_delivery_id: 0,
            sent: BTreeMap::new(),
            waiting: VecDeque::new(),
            received_runs: Vec::new(),
            sent_runs: Vec::new(),
            is_stirred: false,
            is_reopened: false,
            ending: false,
        }
    }

    pub(super) fn link(&mut self, id: LinkId) -> Option<&mut Link> {
        self.links
            .get_mut(&id.handle)
            .filter(|link| link.generation == id.generation)
    }

    /// The link's receiving half, while it is attached.
    pub(super) fn receiving(&mut self, id: LinkId) -> Option<&mut Receiving> {
        let link = self.link(id)?;
        match (&link.phase, &mut link.direction) {
            (Phase::Attached, Direction::Receiving(receiving)) => Some(receiving),
            _ => None,
        }
    }

    /// The link's sending half, while it is attached.
    pub(super) fn sending(&mut self, id: LinkId) -> Option<&mut Sending> {
        let link = self.link(id)?;
        match (&link.phase, &mut link.direction) {
            (Phase::Attached, Direction::Sending(sending)) => Some(sending),
            _ => None,
        }
    }

    /// Whether a link of this name stands.
    pub(super) fn has_name(&self, peer_sends: bool, name: &str) -> bool {
        self.names.contains(&(peer_sends, Arc::from(name)))
    }

    /// Adds a link whose name is free.
    pub(super) fn add_link(&mut self, handle: u32, link: Link) {
        self.names.insert(link.key());
        self.links.insert(handle, link);
    }

    /// The name of a link that stands no more is free.
    pub(super) fn free_name(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(&id.handle)
            && std::mem::replace(&mut link.has_name, false)
        {
            self.names.remove(&link.key());
        }
    }

    /// Forgets a link with everything that is unsettled on it. The bytes that waited come along.
    pub(super) fn remove_link(&mut self, id: LinkId) -> Option<(Link, usize)> {
        self.free_name(id);
        let link = self.links.remove(&id.handle)?;
        let waited = self.forget_unsettled(id);
        Some((link, waited))
    }

    /// What was sent on a link that is going counts for nothing any more. A delivery whose first
    /// frame has left is dropped with its link, which is what the peer does too. Returns the bytes
    /// that waited.
    pub(super) fn forget_unsettled(&mut self, id: LinkId) -> usize {
        self.sent.retain(|_, record| record.link != id);
        let mut waited = 0;
        self.waiting.retain(|waiting| {
            if waiting.link == id {
                waited += waiting.payload.len();
            }
            waiting.link != id
        });
        waited
    }

    /// The credit of a link is to be looked at.
    pub(super) fn list(&mut self, handle: u32) {
        if let Some(link) = self.links.get_mut(&handle)
            && let Direction::Receiving(receiving) = &mut link.direction
            && !std::mem::replace(&mut receiving.is_listed, true)
        {
            self.due.push(handle);
        }
    }

    /// Whether a delivery could leave, as far as the peer's window goes.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.is_empty() && self.remote_incoming_window > 0
    }

    /// The number of a delivery that is about to be sent.
    pub(super) fn new_delivery(&mut self, link: LinkId, settled: bool) -> u32 {
        let id = self.next_delivery_id;
        self.next_delivery_id = id.wrapping_add(1);
        if !settled {
            let answered = false;
            self.sent.insert(id, SentRecord { link, answered });
        }
        id
    }

    /// Notes that a delivery which arrived is settled with an outcome.
    pub(super) fn settle_received(&mut self, delivery_id: u32, outcome: Outcome) {
        extend(&mut self.received_runs, delivery_id, outcome);
    }

    /// Notes that a delivery which was sent is settled. Whether the peer waits for that.
    pub(super) fn settle_sent(&mut self, sent: Sent) -> bool {
        if self.sent.remove(&sent.0).is_none() {
            return false;
        }
        // Accepted whatever the outcome: C# throws at any other (spec/amqp.md 4.3).
        extend(&mut self.sent_runs, sent.0, Outcome::Accepted);
        true
    }

    /// The dispositions that are owed.
    pub(super) fn take_dispositions(&mut self, mut give: impl FnMut(Disposition)) {
        for (role, runs) in [
            (Role::Receiver, &mut self.received_runs),
            (Role::Sender, &mut self.sent_runs),
        ] {
            for run in runs.drain(..) {
                give(Disposition {
                    role: role.clone(),
                    first: run.first,
                    last: (run.last != run.first).then_some(run.last),
                    settled: true,
                    state: Some(DeliveryState::Outcome(run.outcome)),
                    batchable: false,
                });
            }
        }
    }

    /// Takes what the peer, as a receiver, says about deliveries that we sent; `tell` hears of each
    /// one that is news. Ids that are unknown or were named before are nobody's.
    pub(super) fn disposed(
        &mut self,
        disposition: &Disposition,
        mut tell: impl FnMut(LinkId, Sent, Option<Outcome>),
    ) {
        let first = disposition.first;
        let last = disposition.last.unwrap_or(first);
        let outcome = match &disposition.state {
            Some(DeliveryState::Outcome(outcome)) => Some(outcome.clone()),
            _ => None,
        };
        if outcome.is_none() && !disposition.settled {
            // "received" and states of others promise nothing.
            return;
        }
        // A range may pass the end of the numbers.
        let ranges = if first <= last {
            [Some(first..=last), None]
        } else {
            [Some(first..=u32::MAX), Some(0..=last)]
        };
        for range in ranges.into_iter().flatten() {
            // The ids that are there, not those of the range: that may span 2^32.
            let ids: SmallVec<[u32; 16]> = self
                .sent
                .range_mut(range)
                .filter_map(|(id, record)| {
                    let news = disposition.settled || !record.answered;
                    record.answered = true;
                    news.then_some(*id)
                })
                .collect();
            for id in ids {
                let link = if disposition.settled {
                    self.sent.remove(&id).map(|record| record.link)
                } else {
                    self.sent.get(&id).map(|record| record.link)
                };
                let Some(link) = link else { continue };
                if disposition.settled
                    && let Some(sending) = self.sending(link)
                {
                    sending.unsettled = sending.unsettled.saturating_sub(1);
                }
                tell(link, Sent(id), outcome.clone());
            }
        }
    }

    /// Whether anything is owed to the peer beside flows.
    pub(super) fn owes_dispositions(&self) -> bool {
        !self.received_runs.is_empty() || !self.sent_runs.is_empty()
    }
}

/// Settlements mostly come in order, link after link: then one run takes them all.
fn extend(runs: &mut Vec<Run>, delivery_id: u32, outcome: Outcome) {
    if let Some(run) = runs.last_mut()
        && run.last.wrapping_add(1) == delivery_id
        && run.outcome == outcome
    {
        run.last = delivery_id;
        return;
    }
    runs.push(Run {
        first: delivery_id,
        last: delivery_id,
        outcome,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkId = LinkId {
        channel: 0,
        handle: 1,
        generation: 1,
    };

    fn disposition(first: u32, last: Option<u32>, settled: bool) -> Disposition {
        Disposition {
            role: Role::Receiver,
            first,
            last,
            settled,
            state: Some(DeliveryState::Outcome(Outcome::Accepted)),
            batchable: false,
        }
    }

    fn disposed(session: &mut Session, disposition: &Disposition) -> Vec<u32> {
        let mut told = Vec::new();
        session.disposed(disposition, |_, sent, _| told.push(sent.0));
        told
    }

    #[test]
    fn settlements_in_a_row_are_one_disposition() {
        let mut session = Session::new(0, 10, 10);
        for id in [u32::MAX, 0, 1, 3] {
            session.settle_received(id, Outcome::Accepted);
        }
        session.settle_received(4, Outcome::Released);
        let mut ranges = Vec::new();
        session.take_dispositions(|d| ranges.push((d.first, d.last)));
        assert_eq!(ranges, [(u32::MAX, Some(1)), (3, None), (4, None)]);
        assert!(!session.owes_dispositions());
    }

    #[test]
    fn a_range_names_what_is_there_and_each_only_once() {
        let mut session = Session::new(0, 10, 10);
        for settled in [false, true, false, false] {
            session.new_delivery(LINK, settled);
        }
        assert_eq!(
            disposed(&mut session, &disposition(1, Some(u32::MAX), false)),
            [2, 3]
        );
        assert_eq!(disposed(&mut session, &disposition(2, None, false)), []);
        assert!(session.settle_sent(Sent(2)) && !session.settle_sent(Sent(2)));
        assert_eq!(
            disposed(&mut session, &disposition(3, Some(0), true)),
            [3, 0]
        );
        assert_eq!(
            disposed(&mut session, &disposition(0, Some(u32::MAX), true)),
            []
        );
    }
}
