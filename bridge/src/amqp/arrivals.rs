//! What came from upstream for one identity and waits for an answer from below: direct methods and
//! cloud-to-device messages.
//!
//! Pure. Each message is settled upstream by its own outcome, in any order.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use edgehub_amqp::{message::MessageId, performative::Outcome};
use edgehub_proto::{
    hub::{CloudToDeviceOutcome, MethodResult},
    message::Message,
};
use tokio::sync::oneshot;

use crate::limits::{
    AMQP_ANSWERS_BYTES_MAX, AMQP_CLOUD_TO_DEVICE_BYTES_MAX, CLOUD_TO_DEVICE_FORWARDED_MAX,
    METHOD_CALLS_MAX,
};

/// Waits before a message that nobody settled is given back: the first, and the longest. Shorter
/// than the upstream's lock on it, so that it is given back and not lost to a time-out.
const PARK_BASE: Duration = Duration::from_secs(1);
const PARK_MAX: Duration = Duration::from_secs(30);

/// An answer that is waited for.
#[derive(Debug)]
pub(super) enum Awaited {
    CloudToDevice {
        number: u32,
        reply: oneshot::Receiver<CloudToDeviceOutcome>,
    },
    Method {
        call: u64,
        reply: oneshot::Receiver<MethodResult>,
    },
}

/// An answer, or the news that there will be none.
#[derive(Debug)]
pub(super) enum Reply {
    CloudToDevice {
        number: u32,
        outcome: Option<CloudToDeviceOutcome>,
    },
    Method {
        call: u64,
        result: Option<MethodResult>,
    },
}

/// A message to be handed down.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) number: u32,
    pub(super) message: Message,
    pub(super) redelivered: bool,
}

/// Cloud-to-device messages of one identity, by the number of their delivery.
#[derive(Debug, Default)]
pub(super) struct Messages {
    held: VecDeque<Forward>,
    /// Handed down, with their size.
    forwarded: BTreeMap<u32, usize>,
    /// Not settled below: when they are given back.
    parked: Vec<(Instant, u32)>,
    bytes: usize,
    /// Messages in a row that nobody settled.
    unsettled: u32,
}

impl Messages {
    /// A message came. False: there is no room, and it goes back.
    pub(super) fn push(&mut self, number: u32, message: Message, redelivered: bool) -> bool {
        let size = message.size();
        if self.bytes.saturating_add(size) > AMQP_CLOUD_TO_DEVICE_BYTES_MAX {
            return false;
        }
        self.bytes += size;
        self.held.push_back(Forward {
            number,
            message,
            redelivered,
        });
        true
    }

    /// The next message to be handed down, if there may be one more.
    pub(super) fn forward(&mut self) -> Option<Forward> {
        if self.forwarded.len() >= CLOUD_TO_DEVICE_FORWARDED_MAX {
            return None;
        }
        let forward = self.held.pop_front()?;
        self.forwarded
            .insert(forward.number, forward.message.size());
        Some(forward)
    }

    /// What the upstream is told about a message that was handed down; none if it is not known any
    /// more, or is given back later.
    pub(super) fn settle(
        &mut self,
        number: u32,
        outcome: Option<CloudToDeviceOutcome>,
        now: Instant,
    ) -> Option<Outcome> {
        let size = self.forwarded.remove(&number)?;
        self.bytes = self.bytes.saturating_sub(size);
        let Some(outcome) = outcome else {
            // At once it would come again at once, and be lost after some rounds.
            let wait = PARK_BASE.saturating_mul(1 << self.unsettled.min(10));
            self.unsettled = self.unsettled.saturating_add(1);
            self.parked.push((now + wait.min(PARK_MAX), number));
            return None;
        };
        self.unsettled = 0;
        Some(match outcome {
            CloudToDeviceOutcome::Completed => Outcome::Accepted,
            CloudToDeviceOutcome::Rejected => Outcome::Rejected(None),
            _ => Outcome::Released,
        })
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.parked.iter().map(|(at, _)| *at).min()
    }

    /// Messages that are to be given back now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<u32> {
        let mut due = Vec::new();
        self.parked.retain(|(at, number)| {
            let is_due = now >= *at;
            if is_due {
                due.push(*number);
            }
            !is_due
        });
        due
    }

    /// Nobody needs them any more: all that are with us, to be given back.
    pub(super) fn give_up(&mut self) -> Vec<u32> {
        let mut all: Vec<u32> = self.held.drain(..).map(|one| one.number).collect();
        all.extend(std::mem::take(&mut self.forwarded).into_keys());
        all.extend(self.parked.drain(..).map(|(_, number)| number));
        self.bytes = 0;
        all
    }
}

/// A call that was handed down.
#[derive(Debug)]
struct Called {
    correlation: MessageId,
    called_at: Instant,
}

/// Direct methods of one identity.
#[derive(Debug, Default)]
pub(super) struct Calls {
    called: BTreeMap<u64, Called>,
    /// Answers that wait for credit.
    answers: VecDeque<Bytes>,
    bytes: usize,
    next: u64,
}

impl Calls {
    /// Whether one more method may be called.
    pub(super) fn has_room(&self) -> bool {
        self.called.len() < METHOD_CALLS_MAX
    }

    /// A method is called.
    pub(super) fn call(&mut self, correlation: MessageId, now: Instant) -> u64 {
        let call = self.next;
        self.next += 1;
        self.called.insert(
            call,
            Called {
                correlation,
                called_at: now,
            },
        );
        call
    }

    /// The call is over: by what its answer is named, and how long it took.
    pub(super) fn answered(&mut self, call: u64, now: Instant) -> Option<(MessageId, Duration)> {
        let called = self.called.remove(&call)?;
        let took = now.saturating_duration_since(called.called_at);
        Some((called.correlation, took))
    }

    /// An answer is to be sent. False: too much waits already.
    pub(super) fn push(&mut self, answer: Bytes) -> bool {
        if self.bytes > AMQP_ANSWERS_BYTES_MAX {
            return false;
        }
        self.bytes += answer.len();
        self.answers.push_back(answer);
        true
    }

    /// The next answer to send.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let answer = self.answers.pop_front()?;
        self.bytes = self.bytes.saturating_sub(answer.len());
        Some(answer)
    }

    pub(super) fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// The links are gone, and with them everybody who could be answered.
    pub(super) fn lost(&mut self) {
        self.called.clear();
        self.answers.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn message(size: usize) -> Message {
        Message {
            body: vec![0; size].into(),
            ..Message::default()
        }
    }

    #[test]
    fn each_message_is_settled_by_its_own_outcome() {
        let now = now();
        let mut messages = Messages::default();
        for number in 0..4 {
            assert!(messages.push(number, message(1), number == 3));
            assert_eq!(messages.forward().unwrap().redelivered, number == 3);
        }
        let mut settle = |number, outcome| messages.settle(number, outcome, now);
        let completed = Some(CloudToDeviceOutcome::Completed);
        let rejected = Some(CloudToDeviceOutcome::Rejected);
        let abandoned = Some(CloudToDeviceOutcome::Abandoned);
        assert_eq!(settle(2, completed), Some(Outcome::Accepted));
        assert_eq!(settle(2, completed), None, "once");
        assert_eq!(settle(0, rejected), Some(Outcome::Rejected(None)));
        assert_eq!(settle(3, abandoned), Some(Outcome::Released));
        assert_eq!(settle(1, None), None);
        assert_eq!(messages.next_timeout(), Some(now + PARK_BASE));
        assert!(messages.due(now).is_empty());
        assert_eq!(messages.due(now + PARK_BASE), [1]);
        assert_eq!(messages.bytes, 0);
    }

    #[test]
    fn what_is_never_settled_comes_back_ever_more_slowly() {
        let now = now();
        let mut messages = Messages::default();
        for round in 0..20_u32 {
            messages.push(round, message(1), false);
            messages.forward();
            messages.settle(round, None, now);
            let due = messages.next_timeout().unwrap();
            let wait = PARK_BASE.saturating_mul(1 << round.min(10)).min(PARK_MAX);
            assert_eq!(due, now + wait);
            assert_eq!(messages.due(due), [round]);
        }
    }

    #[test]
    fn few_are_down_at_a_time_and_the_bytes_are_limited() {
        let mut messages = Messages::default();
        for number in 0..20 {
            messages.push(number, message(1), false);
        }
        let down = std::iter::from_fn(|| messages.forward()).count();
        assert_eq!(down, CLOUD_TO_DEVICE_FORWARDED_MAX);
        assert!(!messages.push(30, message(AMQP_CLOUD_TO_DEVICE_BYTES_MAX), false));
        let mut all = messages.give_up();
        all.sort_unstable();
        assert_eq!(all, (0..20).collect::<Vec<u32>>());
        let completed = Some(CloudToDeviceOutcome::Completed);
        assert_eq!(messages.settle(0, completed, now()), None, "given back");
        assert!(messages.push(31, message(AMQP_CLOUD_TO_DEVICE_BYTES_MAX), false));
    }

    #[test]
    fn calls_and_their_answers_are_limited() {
        let now = now();
        let mut calls = Calls::default();
        let mut last = 0;
        while calls.has_room() {
            last = calls.call(MessageId::Ulong(1), now);
        }
        assert_eq!(last, METHOD_CALLS_MAX as u64 - 1);
        let later = now + PARK_BASE;
        let answered = calls.answered(last, later);
        assert_eq!(answered, Some((MessageId::Ulong(1), PARK_BASE)));
        assert_eq!(calls.answered(last, later), None);
        assert!(calls.push(vec![0; AMQP_ANSWERS_BYTES_MAX + 1].into()));
        assert!(!calls.push(Bytes::from_static(b"x")));
        assert!(calls.has_answers() && calls.pop().is_some());
        assert!(calls.push(Bytes::from_static(b"x")));
        calls.lost();
        assert!(calls.has_room() && !calls.has_answers());
    }
}
