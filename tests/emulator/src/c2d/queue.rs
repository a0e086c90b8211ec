//! The queue of one device: no clock, no file, no socket.
//!
//! A message is enqueued, becomes invisible when it is delivered, and leaves by its PUBACK
//! (completed), by its expiry, by having been delivered too often (dead-lettered), or purged.
//! When the connection ends before the PUBACK it is enqueued again; when the lock runs out as
//! well, but that redelivery does not count (spec/upstream.md B6).
//!
//! The packet id of an unacknowledged delivery belongs to the session: while the session lasts,
//! the message goes out again with the same id and DUP (MQTT-4.4.0-1).
//!
//! Over AMQP a delivery has a lock token, by which it is completed, abandoned or rejected. Such a
//! lock stays when its connection ends, until it runs out (spec/upstream.md B5).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::message::Message;
use crate::limits::{C2D_DELIVERIES_MAX, C2D_LOCK_MS, C2D_QUEUE_MAX, C2D_TTL_MS_DEFAULT};

/// A message that is not settled yet. This is also its form in the journal; what only a living
/// connection knows is left out.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Queued {
    #[serde(with = "arc")]
    pub(crate) message: Arc<Message>,
    pub(crate) enqueued_ms: u64,
    pub(crate) expires_ms: u64,
    /// Deliveries that count.
    pub(crate) deliveries: u32,
    /// Of the delivery that the session has not acknowledged.
    pub(crate) packet_id: Option<u16>,
    /// While it is invisible.
    #[serde(skip)]
    pub(crate) lock: Option<Lock>,
    /// The lock ran out: the next delivery does not count.
    #[serde(skip)]
    uncounted: bool,
}

/// Why a message is invisible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) until_ms: u64,
    connection: u64,
    /// Of a delivery over AMQP.
    token: Option<LockToken>,
}

/// Names a delivery over AMQP: a uuid, and the delivery's tag.
pub(crate) type LockToken = [u8; 16];

/// How a message ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Completed,
    /// It was delivered as often as IoT Hub delivers a message.
    DeadLettered,
    Expired,
    Purged,
    Rejected,
}

/// What is remembered of a settled message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settled {
    pub(crate) message_id: String,
    pub(crate) outcome: Outcome,
    pub(crate) delivery_count: u32,
    pub(crate) enqueued_ms: u64,
    pub(crate) settled_ms: u64,
}

/// A message on its way out.
#[derive(Debug)]
pub(crate) struct Delivery {
    pub(crate) sequence: u64,
    /// None at QoS 0.
    pub(crate) packet_id: Option<u16>,
    pub(crate) is_duplicate: bool,
    pub(crate) message: Arc<Message>,
}

/// A message on its way out over AMQP.
#[derive(Debug)]
pub(crate) struct LockedDelivery {
    pub(crate) sequence: u64,
    pub(crate) token: LockToken,
    pub(crate) enqueued_ms: u64,
    /// Deliveries before this one that count.
    pub(crate) earlier: u32,
    pub(crate) message: Arc<Message>,
}

/// What a client does with a delivery over AMQP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disposal {
    Abandon,
    Complete,
    Reject,
}

/// What a step has changed: to be written before the step counts.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Messages that are still there and not as they were.
    pub(crate) touched: BTreeSet<u64>,
    pub(crate) settled: Vec<(u64, Settled)>,
    /// Of those, the messages whose senders want to hear of it.
    pub(crate) told: Vec<Settled>,
}

/// The messages of one device, by sequence number.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queue {
    messages: BTreeMap<u64, Queued>,
    last_sequence: u64,
    last_packet_id: u16,
    /// Ids of deliveries that ended without a PUBACK, which may still come.
    void_ids: BTreeSet<u16>,
}

impl Queue {
    /// The queue as an earlier process left it. No connection is left of it.
    pub(crate) fn restore(messages: BTreeMap<u64, Queued>, last_sequence: u64) -> Self {
        let ids = messages.values().filter_map(|queued| queued.packet_id);
        Self {
            last_packet_id: ids.max().unwrap_or(0),
            messages,
            last_sequence,
            void_ids: BTreeSet::new(),
        }
    }

    pub(crate) fn messages(&self) -> &BTreeMap<u64, Queued> {
        &self.messages
    }

    /// Adds a message; none when the queue is full.
    pub(crate) fn enqueue(
        &mut self,
        message: Message,
        now_ms: u64,
        effects: &mut Effects,
    ) -> Option<u64> {
        if self.messages.len() >= C2D_QUEUE_MAX {
            return None;
        }
        self.last_sequence += 1;
        let queued = Queued {
            enqueued_ms: now_ms,
            expires_ms: message
                .expiry_ms
                .unwrap_or_else(|| now_ms.saturating_add(C2D_TTL_MS_DEFAULT)),
            message: Arc::new(message),
            deliveries: 0,
            packet_id: None,
            lock: None,
            uncounted: false,
        };
        self.messages.insert(self.last_sequence, queued);
        effects.touched.insert(self.last_sequence);
        Some(self.last_sequence)
    }

    /// A connection begins: what others had locked is free. Without the session of before its
    /// packet ids are free as well.
    pub(crate) fn connect(&mut self, goes_on: bool, now_ms: u64, effects: &mut Effects) {
        self.release(|lock| lock.token.is_none(), now_ms, effects);
        self.void_ids.clear();
        if goes_on {
            return;
        }
        for (sequence, queued) in &mut self.messages {
            if queued.packet_id.take().is_some() {
                effects.touched.insert(*sequence);
            }
        }
    }

    /// A connection is over: what it had not acknowledged is enqueued again.
    pub(crate) fn disconnect(&mut self, connection: u64, now_ms: u64, effects: &mut Effects) {
        let ends = |lock: &Lock| lock.connection == connection && lock.token.is_none();
        self.release(ends, now_ms, effects);
    }

    fn release(&mut self, ends: impl Fn(&Lock) -> bool, now_ms: u64, effects: &mut Effects) {
        for queued in self.messages.values_mut() {
            queued.lock = queued.lock.filter(|lock| !ends(lock));
        }
        self.sweep(now_ms, effects);
    }

    /// Everything that is enqueued goes out, oldest first.
    pub(crate) fn deliver(
        &mut self,
        connection: u64,
        at_least_once: bool,
        now_ms: u64,
        effects: &mut Effects,
    ) -> Vec<Delivery> {
        self.tick(now_ms, effects);
        let sequences: Vec<u64> = self
            .messages
            .iter()
            .filter(|(_, queued)| queued.lock.is_none())
            .map(|(sequence, _)| *sequence)
            .collect();
        let mut deliveries = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let fresh_id = self.free_packet_id();
            let Some(queued) = self.messages.get_mut(&sequence) else {
                continue;
            };
            let is_duplicate = at_least_once && queued.packet_id.is_some();
            queued.packet_id = at_least_once.then(|| queued.packet_id.unwrap_or(fresh_id));
            queued.deliveries += u32::from(!std::mem::take(&mut queued.uncounted));
            queued.lock = Some(Lock {
                until_ms: now_ms.saturating_add(C2D_LOCK_MS),
                connection,
                token: None,
            });
            deliveries.push(Delivery {
                sequence,
                packet_id: queued.packet_id,
                is_duplicate,
                message: queued.message.clone(),
            });
            if queued.packet_id == Some(fresh_id) {
                self.last_packet_id = fresh_id;
            }
            effects.touched.insert(sequence);
        }
        deliveries
    }

    /// Up to `count` enqueued messages go out over AMQP, oldest first; `token` makes up their
    /// names.
    pub(crate) fn lock(
        &mut self,
        connection: u64,
        count: usize,
        now_ms: u64,
        mut token: impl FnMut() -> LockToken,
        effects: &mut Effects,
    ) -> Vec<LockedDelivery> {
        self.tick(now_ms, effects);
        let enqueued = self.messages.iter_mut();
        let enqueued = enqueued.filter(|(_, queued)| queued.lock.is_none());
        let mut deliveries = Vec::new();
        for (sequence, queued) in enqueued.take(count) {
            queued.deliveries += u32::from(!std::mem::take(&mut queued.uncounted));
            // An MQTT session that waits has let go of it.
            self.void_ids.extend(queued.packet_id.take());
            let token = token();
            queued.lock = Some(Lock {
                until_ms: now_ms.saturating_add(C2D_LOCK_MS),
                connection,
                token: Some(token),
            });
            deliveries.push(LockedDelivery {
                sequence: *sequence,
                token,
                enqueued_ms: queued.enqueued_ms,
                earlier: queued.deliveries.saturating_sub(1),
                message: queued.message.clone(),
            });
            effects.touched.insert(*sequence);
        }
        deliveries
    }

    /// A disposition. False when nothing is locked under this token any more.
    pub(crate) fn dispose(
        &mut self,
        token: LockToken,
        disposal: Disposal,
        now_ms: u64,
        effects: &mut Effects,
    ) -> bool {
        self.tick(now_ms, effects);
        let mut messages = self.messages.iter_mut();
        let found = messages.find(|(_, queued)| {
            let lock = queued.lock.as_ref();
            lock.is_some_and(|lock| lock.token == Some(token))
        });
        let Some((&sequence, queued)) = found else {
            return false;
        };
        match disposal {
            Disposal::Abandon => {
                queued.lock = None;
                self.sweep(now_ms, effects);
            }
            Disposal::Complete => self.settle(sequence, Outcome::Completed, now_ms, effects),
            Disposal::Reject => self.settle(sequence, Outcome::Rejected, now_ms, effects),
        }
        true
    }

    /// A PUBACK. False when nothing with this id waits for one.
    pub(crate) fn acknowledge(
        &mut self,
        packet_id: u16,
        now_ms: u64,
        effects: &mut Effects,
    ) -> bool {
        let found = self
            .messages
            .iter()
            .find(|(_, queued)| queued.packet_id == Some(packet_id));
        match found.map(|(sequence, _)| *sequence) {
            Some(sequence) => {
                self.settle(sequence, Outcome::Completed, now_ms, effects);
                self.void_ids.remove(&packet_id);
                true
            }
            None => self.void_ids.remove(&packet_id),
        }
    }

    /// QoS 0 deliveries are complete once they are written.
    pub(crate) fn complete(
        &mut self,
        sequences: &[u64],
        connection: u64,
        now_ms: u64,
        effects: &mut Effects,
    ) {
        for sequence in sequences {
            let lock = self.messages.get(sequence).and_then(|queued| queued.lock);
            if lock.is_some_and(|lock| lock.connection == connection) {
                self.settle(*sequence, Outcome::Completed, now_ms, effects);
            }
        }
    }

    /// Removes everything; returns how many messages that were.
    pub(crate) fn purge(&mut self, now_ms: u64, effects: &mut Effects) -> usize {
        let sequences: Vec<u64> = self.messages.keys().copied().collect();
        for sequence in &sequences {
            self.settle(*sequence, Outcome::Purged, now_ms, effects);
        }
        sequences.len()
    }

    /// Locks and lives that have run out. Returns whether something is enqueued again.
    pub(crate) fn tick(&mut self, now_ms: u64, effects: &mut Effects) -> bool {
        let mut is_back = false;
        for queued in self.messages.values_mut() {
            if queued.lock.is_some_and(|lock| lock.until_ms <= now_ms) {
                queued.lock = None;
                queued.uncounted = true;
                is_back = true;
            }
        }
        self.sweep(now_ms, effects);
        is_back
    }

    /// Settles what is enqueued and must not go out any more.
    fn sweep(&mut self, now_ms: u64, effects: &mut Effects) {
        let enqueued = self.messages.iter();
        let enqueued = enqueued.filter(|(_, queued)| queued.lock.is_none());
        let ends: Vec<(u64, Outcome)> = enqueued
            .filter_map(|(sequence, queued)| {
                if queued.deliveries >= C2D_DELIVERIES_MAX && !queued.uncounted {
                    Some((*sequence, Outcome::DeadLettered))
                } else if queued.expires_ms <= now_ms {
                    Some((*sequence, Outcome::Expired))
                } else {
                    None
                }
            })
            .collect();
        for (sequence, outcome) in ends {
            self.settle(sequence, outcome, now_ms, effects);
        }
    }

    /// When [`Self::tick`] has something to do next.
    pub(crate) fn next_tick_ms(&self) -> Option<u64> {
        let times = self
            .messages
            .values()
            .map(|queued| queued.lock.map_or(queued.expires_ms, |lock| lock.until_ms));
        times.min()
    }

    fn settle(&mut self, sequence: u64, outcome: Outcome, now_ms: u64, effects: &mut Effects) {
        let Some(queued) = self.messages.remove(&sequence) else {
            return;
        };
        self.void_ids.extend(queued.packet_id);
        effects.touched.remove(&sequence);
        let settled = Settled {
            message_id: queued.message.message_id.clone(),
            outcome,
            delivery_count: queued.deliveries,
            enqueued_ms: queued.enqueued_ms,
            settled_ms: now_ms,
        };
        if queued.message.wants_feedback(outcome) {
            effects.told.push(settled.clone());
        }
        effects.settled.push((sequence, settled));
    }

    /// An id that no delivery has. There are far fewer deliveries than ids.
    fn free_packet_id(&self) -> u16 {
        let taken = |id: &u16| {
            self.void_ids.contains(id)
                || self
                    .messages
                    .values()
                    .any(|queued| queued.packet_id == Some(*id))
        };
        let mut ids = (1..=u16::MAX).map(|step| self.last_packet_id.wrapping_add(step));
        ids.find(|id| *id != 0 && !taken(id)).unwrap_or(1)
    }
}

/// A shared message in the journal is the message.
mod arc {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Message;

    pub(super) fn serialize<S: Serializer>(
        message: &Arc<Message>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        message.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<Message>, D::Error> {
        Message::deserialize(deserializer).map(Arc::new)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
