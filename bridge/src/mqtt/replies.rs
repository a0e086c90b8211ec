//! Answers from below that a session waits for: of direct methods and of cloud-to-device messages.
//!
//! A few dozen at most, so each wake-up looks at all of them; no task per call.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use edgehub_proto::hub::{CloudToDeviceOutcome, MethodResult};
use tokio::sync::oneshot;

use super::arrivals::Serial;
use crate::limits::METHOD_CALLS_MAX;

/// How long a method's answer is waited for: the longest that IoT Hub lets a caller wait, 300 s,
/// and the reference's slack (spec/core.md 6).
const METHOD_TIMEOUT: Duration = Duration::from_secs(330);

/// An answer, or the news that there will be none.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    CloudToDevice {
        serial: Serial,
        outcome: Option<CloudToDeviceOutcome>,
    },
    Method {
        request_id: String,
        result: Option<MethodResult>,
        /// Since the call.
        took: Duration,
    },
}

#[derive(Debug)]
struct Method {
    request_id: String,
    called_at: Instant,
    reply: oneshot::Receiver<MethodResult>,
}

/// Everything that one session waits for.
#[derive(Debug, Default)]
pub(super) struct Replies {
    methods: Vec<Method>,
    settles: Vec<(Serial, oneshot::Receiver<CloudToDeviceOutcome>)>,
}

impl Replies {
    /// Whether one more method may be called.
    pub(super) fn has_room(&self) -> bool {
        self.methods.len() < METHOD_CALLS_MAX
    }

    /// Whether something is waited for whose loss somebody would notice.
    pub(super) fn is_empty(&self) -> bool {
        self.methods.is_empty() && self.settles.is_empty()
    }

    /// A method is called. Gives the end for the answer.
    pub(super) fn call(
        &mut self,
        request_id: String,
        now: Instant,
    ) -> oneshot::Sender<MethodResult> {
        let (sender, reply) = oneshot::channel();
        self.methods.push(Method {
            request_id,
            called_at: now,
            reply,
        });
        sender
    }

    /// A message is handed down. Gives the end for its settlement.
    pub(super) fn hand_down(&mut self, serial: Serial) -> oneshot::Sender<CloudToDeviceOutcome> {
        let (sender, reply) = oneshot::channel();
        self.settles.push((serial, reply));
        sender
    }

    /// Waits for the next answer; for ever if none is due.
    ///
    /// # Cancel safety
    ///
    /// An answer that was not returned is returned by the next call.
    pub(super) async fn next(&mut self, now: impl Fn() -> Instant) -> Reply {
        poll_fn(|context| self.poll_next(context, now())).await
    }

    /// Forgets methods whose callers have stopped waiting.
    pub(super) fn expire(&mut self, now: Instant) {
        self.methods
            .retain(|method| now < method.called_at + METHOD_TIMEOUT);
    }

    /// When [`Replies::expire`] has something to do next.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        let first = self.methods.iter().map(|method| method.called_at).min()?;
        Some(first + METHOD_TIMEOUT)
    }

    fn poll_next(&mut self, context: &mut Context<'_>, now: Instant) -> Poll<Reply> {
        for index in 0..self.settles.len() {
            let Some((serial, reply)) = self.settles.get_mut(index) else {
                break;
            };
            if let Poll::Ready(outcome) = Pin::new(reply).poll(context) {
                let serial = *serial;
                self.settles.remove(index);
                let outcome = outcome.ok();
                return Poll::Ready(Reply::CloudToDevice { serial, outcome });
            }
        }
        for index in 0..self.methods.len() {
            let Some(method) = self.methods.get_mut(index) else {
                break;
            };
            if let Poll::Ready(result) = Pin::new(&mut method.reply).poll(context) {
                let method = self.methods.remove(index);
                return Poll::Ready(Reply::Method {
                    request_id: method.request_id,
                    result: result.ok(),
                    took: now.saturating_duration_since(method.called_at),
                });
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::arrivals::Arrivals;

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn serial() -> Serial {
        let mut arrivals = Arrivals::default();
        arrivals
            .message(None, edgehub_proto::message::Message::default(), false)
            .unwrap();
        arrivals.forward().unwrap().serial
    }

    #[tokio::test(start_paused = true)]
    async fn answers_come_as_they_are_given_and_a_dropped_end_is_told() {
        let mut replies = Replies::default();
        let first = replies.call("1".to_owned(), now());
        let second = replies.call("2".to_owned(), now());
        let settle = replies.hand_down(serial());
        let waited = tokio::time::timeout(Duration::from_secs(1), replies.next(now)).await;
        assert!(waited.is_err(), "nothing yet");
        let result = MethodResult {
            status: 200,
            payload: "{}".into(),
        };
        second.send(result.clone()).unwrap();
        let expected = Reply::Method {
            request_id: "2".to_owned(),
            result: Some(result),
            took: Duration::from_secs(1),
        };
        assert_eq!(replies.next(now).await, expected);
        drop(first);
        drop(settle);
        let dropped = Reply::CloudToDevice {
            serial: serial(),
            outcome: None,
        };
        assert_eq!(replies.next(now).await, dropped);
        let Reply::Method { result: None, .. } = replies.next(now).await else {
            panic!("an answer out of nothing")
        };
        assert!(replies.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_comes_while_somebody_waits_wakes_him() {
        let mut replies = Replies::default();
        let settle = replies.hand_down(serial());
        let sending = tokio::spawn(async move {
            tokio::task::yield_now().await;
            settle.send(CloudToDeviceOutcome::Completed).unwrap();
        });
        let Reply::CloudToDevice { outcome, .. } = replies.next(now).await else {
            panic!("no method was called")
        };
        assert_eq!(outcome, Some(CloudToDeviceOutcome::Completed));
        sending.await.unwrap();
    }

    #[test]
    fn a_method_is_forgotten_when_no_caller_can_wait_any_more() {
        let begin = now();
        let mut replies = Replies::default();
        let late = replies.call("1".to_owned(), begin);
        assert_eq!(replies.next_expiry(), Some(begin + METHOD_TIMEOUT));
        replies.expire(begin + METHOD_TIMEOUT - Duration::from_millis(1));
        assert!(!replies.is_empty());
        replies.expire(begin + METHOD_TIMEOUT);
        assert!(replies.is_empty());
        assert!(late.is_closed());
    }

    #[test]
    fn calls_are_limited() {
        let mut replies = Replies::default();
        let mut ends = Vec::new();
        while replies.has_room() {
            ends.push(replies.call("x".to_owned(), now()));
        }
        assert_eq!(ends.len(), METHOD_CALLS_MAX);
    }
}
