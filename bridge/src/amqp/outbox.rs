//! The telemetry of one identity on its way into deliveries, and what their outcomes mean.
//!
//! Pure. Messages leave in the order of their tokens, several of them in one delivery (message
//! format 0x80013700), several deliveries unsettled at once. A delivery is taken or refused as a
//! whole: what was refused goes again before everything that was not sent yet, halved when one of
//! its messages may be the reason, so that a single message is found in a logarithmic number of
//! steps and only it is given up.
//!
//! # Order
//!
//! After a refusal one delivery is under way at a time for a while: what is refused then is not
//! overtaken. Only deliveries that were under way beside the first refused one may come before it;
//! the upstream took them, and nothing can call them back.

use std::{collections::VecDeque, time::Duration, time::Instant};

use bytes::Bytes;
use edgehub_amqp::{
    message::{BATCH_MESSAGE_FORMAT, MessageWriter},
    performative::Outcome,
};
use rand::{Rng, RngExt};

use super::conditions::{Class, class};
use crate::{lanes::DropReason, limits};

/// How long after a refusal one delivery is under way at a time.
const CAREFUL_FOR: Duration = Duration::from_secs(60);

/// Waits after deliveries that are to be sent again: the first, and the longest.
const RETRY_BASE: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// The same when the upstream asks for patience.
const THROTTLED_BASE: Duration = Duration::from_secs(1);
const THROTTLED_MAX: Duration = Duration::from_secs(60);

/// How long a delivery's outcome may take before the session is given up.
const STALL: Duration = Duration::from_secs(300);

/// Bytes that an item of a batch takes beside its message: descriptor, constructor and size.
const SECTION_BYTES: usize = 8;

/// A message, encoded.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) token: u64,
    pub(super) bytes: Bytes,
    /// When its time to live is over, Unix milliseconds.
    pub(super) expires_at_ms: Option<u64>,
    /// Label of its counters.
    pub(super) output: String,
}

/// A message that is given up.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GivenUp {
    pub(super) token: u64,
    pub(super) reason: DropReason,
    pub(super) output: String,
}

impl GivenUp {
    fn new(item: &Item, reason: DropReason) -> Self {
        Self {
            token: item.token,
            reason,
            output: item.output.clone(),
        }
    }
}

/// A delivery that can be sent.
#[derive(Debug)]
pub(super) struct Batch {
    items: Vec<Item>,
}

/// What became of messages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Disposed {
    /// Tokens of those that the upstream has.
    pub(super) accepted: Vec<u64>,
    pub(super) given_up: Vec<GivenUp>,
    /// The session or the connection cannot go on.
    pub(super) fault: Option<Class>,
    /// The delivery is kept and sent again.
    pub(super) retried: bool,
}

#[derive(Debug)]
struct Flying {
    number: u32,
    sent_at: Instant,
    items: Vec<Item>,
}

/// The messages of one identity that have no disposition.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// What was sent and came back, in the groups in which it goes again.
    again: VecDeque<Vec<Item>>,
    waiting: VecDeque<Item>,
    flying: VecDeque<Flying>,
    careful_until: Option<Instant>,
    retry_at: Option<Instant>,
    /// Waits in a row.
    retries: u32,
}

impl Outbox {
    pub(super) fn push(&mut self, item: Item) {
        self.waiting.push_back(item);
    }

    /// There is something that is not under way.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty() || !self.again.is_empty()
    }

    /// When something has to be looked at: the end of a wait, or a delivery without an outcome.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let retry = self.retry_at.filter(|_| self.has_waiting());
        let stall = self.flying.front().map(|first| first.sent_at + STALL);
        retry.into_iter().chain(stall).min()
    }

    /// Whether the oldest delivery has waited too long for its outcome.
    pub(super) fn is_stalled(&self, now: Instant) -> bool {
        let first = self.flying.front();
        first.is_some_and(|first| now >= first.sent_at + STALL)
    }

    /// The next delivery, if one may be sent now: at most `bytes_max` bytes. Messages whose time is
    /// over, or that are larger than `alone_max` alone, go to `given_up`.
    pub(super) fn next(
        &mut self,
        now: Instant,
        unix_ms: u64,
        bytes_max: usize,
        alone_max: usize,
        given_up: &mut Vec<GivenUp>,
    ) -> Option<Batch> {
        if self.retry_at.is_some_and(|at| now < at) {
            return None;
        }
        if self.careful_until.is_some_and(|until| now >= until) && self.again.is_empty() {
            self.careful_until = None;
        }
        let under_way_max = match self.careful_until {
            Some(_) => 1,
            None => limits::AMQP_BATCHES_MAX,
        };
        if self.flying.len() >= under_way_max {
            return None;
        }
        let mut fits = |item: &Item| {
            let reason = if item.expires_at_ms.is_some_and(|at| at <= unix_ms) {
                DropReason::TtlExpiry
            } else if item.bytes.len() > alone_max {
                DropReason::TooLarge
            } else {
                return true;
            };
            given_up.push(GivenUp::new(item, reason));
            false
        };
        while let Some(mut items) = self.again.pop_front() {
            items.retain(&mut fits);
            if !items.is_empty() {
                return Some(Batch { items });
            }
        }
        let mut items: Vec<Item> = Vec::new();
        let mut bytes = 0;
        while let Some(item) = self.waiting.front() {
            if !fits(item) {
                self.waiting.pop_front();
                continue;
            }
            bytes += item.bytes.len() + SECTION_BYTES;
            let is_full = items.len() >= limits::AMQP_BATCH_MESSAGES_MAX || bytes > bytes_max;
            if is_full && !items.is_empty() {
                break;
            }
            items.extend(self.waiting.pop_front());
        }
        (!items.is_empty()).then_some(Batch { items })
    }

    /// The batch was sent under this number.
    pub(super) fn sent(&mut self, batch: Batch, number: u32, now: Instant) {
        self.flying.push_back(Flying {
            number,
            sent_at: now,
            items: batch.items,
        });
    }

    /// The batch could not be sent now.
    pub(super) fn unsent(&mut self, batch: Batch) {
        self.again.push_front(batch.items);
    }

    /// The upstream does not take a batch of this size.
    pub(super) fn too_large(&mut self, batch: Batch, now: Instant) -> Disposed {
        self.refused(batch.items, Class::TooLarge, now)
    }

    /// What became of a delivery.
    pub(super) fn settled(
        &mut self,
        number: u32,
        outcome: Option<&Outcome>,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Disposed {
        let index = self.flying.iter().position(|one| one.number == number);
        let Some(flying) = index.and_then(|index| self.flying.remove(index)) else {
            return Disposed::default();
        };
        let class = match outcome {
            Some(Outcome::Accepted) => {
                self.retries = 0;
                return accepted(&flying.items);
            }
            Some(Outcome::Rejected(error)) => class(error.as_ref()),
            Some(Outcome::Released | Outcome::Modified { .. }) | None => Class::Transient,
        };
        let mut disposed = self.refused(flying.items, class, now);
        if disposed.retried {
            self.wait(class, now, rng);
        }
        disposed.fault = matches!(class, Class::Away | Class::Refused).then_some(class);
        disposed
    }

    /// The link is gone, with an error about the message if there was one. Nothing that was under
    /// way has an outcome. Tells whether the error can be answered by going on with another link.
    pub(super) fn detached(&mut self, class: Class, now: Instant) -> Option<Disposed> {
        let is_about_one = self.flying.len() == 1;
        if class != Class::TooLarge {
            return None;
        }
        let mut disposed = Disposed::default();
        while let Some(flying) = self.flying.pop_back() {
            // Only when one delivery was under way is it known which one was meant.
            if is_about_one {
                disposed = self.refused(flying.items, class, now);
            } else {
                self.careful_until = Some(now + CAREFUL_FOR);
                self.put_back(flying.items);
            }
        }
        Some(disposed)
    }

    fn refused(&mut self, mut items: Vec<Item>, class: Class, now: Instant) -> Disposed {
        self.careful_until = Some(now + CAREFUL_FOR);
        let Some(reason) = class.drop_reason() else {
            self.put_back(items);
            return Disposed {
                retried: true,
                ..Disposed::default()
            };
        };
        if let [one] = &items[..] {
            return Disposed {
                given_up: vec![GivenUp::new(one, reason)],
                ..Disposed::default()
            };
        }
        let second = items.split_off(items.len().div_ceil(2));
        self.put_back(second);
        self.put_back(items);
        Disposed::default()
    }

    /// Puts a group back where its tokens belong.
    fn put_back(&mut self, items: Vec<Item>) {
        let first = |items: &[Item]| items.first().map_or(u64::MAX, |item| item.token);
        let token = first(&items);
        let place = self.again.partition_point(|group| first(group) < token);
        self.again.insert(place, items);
    }

    fn wait(&mut self, class: Class, now: Instant, rng: &mut impl Rng) {
        let (base, max) = match class {
            Class::Throttled => (THROTTLED_BASE, THROTTLED_MAX),
            _ => (RETRY_BASE, RETRY_MAX),
        };
        // Outcomes of deliveries that were under way together are one refusal.
        if self.retry_at.is_none_or(|at| at <= now) {
            let grown = base.saturating_mul(1 << self.retries.min(16)).min(max);
            self.retries = self.retries.saturating_add(1);
            self.retry_at = Some(now + grown.mul_f64(rng.random_range(0.8..=1.2)));
        }
    }
}

impl Batch {
    /// The delivery's message format and bytes.
    pub(super) fn encode(&self) -> (u32, Bytes) {
        if let [one] = &self.items[..] {
            return (0, one.bytes.clone());
        }
        let mut writer = MessageWriter::new();
        for item in &self.items {
            writer.data(&item.bytes);
        }
        (BATCH_MESSAGE_FORMAT, writer.finish())
    }
}

fn accepted(items: &[Item]) -> Disposed {
    Disposed {
        accepted: items.iter().map(|item| item.token).collect(),
        ..Disposed::default()
    }
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
