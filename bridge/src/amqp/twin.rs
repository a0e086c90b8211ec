//! The twin of one identity over its two links: requests, their answers, the subscription to desired
//! properties (spec/upstream.md A7).

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use edgehub_proto::hub::UpstreamError;

use super::{
    client::{Client, LinkKey},
    convert::{self, TwinNews},
};
use crate::{
    lanes::RequestId,
    transport::{TwinAnswer, TwinAsk, TwinRequest},
};

/// What became of a request.
pub(super) type Outcome = (RequestId, Result<TwinAnswer, UpstreamError>);

const REPORTED: &str = "/properties/reported";
const DESIRED: &str = "/notifications/twin/properties/desired";

/// Waits before the subscription is tried again: the first, and the longest.
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// How long the answer to the subscription may take.
const SUBSCRIBE_MAX: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug)]
struct Sent {
    request: RequestId,
    is_get: bool,
    deadline: Instant,
}

/// The subscription to desired properties.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Subscription {
    Held,
    #[default]
    None,
    /// PUT was sent.
    Asked {
        correlation: String,
        deadline: Instant,
    },
    Waits {
        until: Instant,
    },
}

/// What an arrival on the twin's link was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    Answered(Outcome),
    Desired(Bytes),
    /// Answered nothing that is awaited.
    Nothing,
    /// The subscription was refused.
    Refused,
    Subscribed,
}

/// The twin's requests of one session.
#[derive(Debug, Default)]
pub(super) struct Twin {
    waiting: VecDeque<TwinRequest>,
    sent: HashMap<String, Sent>,
    subscription: Subscription,
    refusals: u32,
    next: u64,
    /// A request was made in this session: the links stay from then on.
    asked: bool,
}

impl Twin {
    pub(super) fn push(&mut self, requests: Vec<TwinRequest>) {
        self.asked |= !requests.is_empty();
        self.waiting.extend(requests);
    }

    pub(super) fn was_asked(&self) -> bool {
        self.asked
    }

    pub(super) fn is_subscribed(&self) -> bool {
        self.subscription == Subscription::Held
    }

    pub(super) fn is_refused(&self) -> bool {
        matches!(self.subscription, Subscription::Waits { .. })
    }

    /// Sends what can be sent on the attached links: the subscription first.
    pub(super) fn send(
        &mut self,
        client: &mut Client,
        up: LinkKey,
        wants_desired: bool,
        now: Instant,
        outcomes: &mut Vec<Outcome>,
    ) {
        self.sent.retain(|_, sent| now < sent.deadline);
        self.subscribe(client, up, wants_desired, now);
        while let Some(request) = self.waiting.front() {
            if request.deadline > now && !client.can_send(up) {
                return;
            }
            let Some(request) = self.waiting.pop_front() else {
                return;
            };
            if request.deadline > now {
                self.ask(client, up, &request, outcomes);
            }
        }
    }

    fn ask(
        &mut self,
        client: &mut Client,
        up: LinkKey,
        request: &TwinRequest,
        outcomes: &mut Vec<Outcome>,
    ) {
        let (operation, name, resource, body) = match &request.ask {
            TwinAsk::Get => ("GET", "Get", None, Bytes::new()),
            TwinAsk::Report(patch) => ("PATCH", "Patch", Some(REPORTED), patch.clone()),
        };
        let correlation = self.correlation(name);
        let message = convert::twin_request(operation, resource, &correlation, &body);
        if client.send(up, 0, message).is_err() {
            // There was room: the upstream takes no message of this size.
            let refused = Err(UpstreamError::Refused { status: 413 });
            outcomes.push((request.request, refused));
            return;
        }
        self.sent.insert(
            correlation,
            Sent {
                request: request.request,
                is_get: request.ask == TwinAsk::Get,
                deadline: request.deadline,
            },
        );
    }

    fn subscribe(&mut self, client: &mut Client, up: LinkKey, wanted: bool, now: Instant) {
        let (operation, name) = match (&self.subscription, wanted) {
            (Subscription::None, true) => ("PUT", "Put"),
            (Subscription::Waits { until }, true) if now >= *until => ("PUT", "Put"),
            (Subscription::Held | Subscription::Asked { .. }, false) => ("DELETE", "Delete"),
            (Subscription::Waits { .. }, false) => {
                self.subscription = Subscription::None;
                return;
            }
            _ => return,
        };
        if !client.can_send(up) {
            return;
        }
        let correlation = self.correlation(name);
        let message = convert::twin_request(operation, Some(DESIRED), &correlation, &[]);
        if client.send(up, 0, message).is_ok() {
            self.subscription = if wanted {
                Subscription::Asked {
                    correlation,
                    deadline: now + SUBSCRIBE_MAX,
                }
            } else {
                Subscription::None
            };
        }
    }

    /// Unique within the links, and with the beginning that the reference's clients look at.
    fn correlation(&mut self, name: &str) -> String {
        self.next += 1;
        format!("{name}{}", self.next)
    }

    /// Takes what came on the link.
    pub(super) fn take(&mut self, news: TwinNews, now: Instant) -> News {
        let TwinNews {
            correlation,
            status,
            version,
            body,
        } = news;
        let Some(correlation) = correlation else {
            return News::Desired(body);
        };
        let status = status.and_then(|status| u16::try_from(status).ok());
        if matches!(&self.subscription, Subscription::Asked { correlation: asked, .. }
            if *asked == correlation)
        {
            return match status {
                Some(200..=299) => {
                    self.subscription = Subscription::Held;
                    self.refusals = 0;
                    News::Subscribed
                }
                _ => {
                    self.wait(now);
                    News::Refused
                }
            };
        }
        match self.sent.remove(&correlation) {
            Some(sent) => {
                let answer = answer_of(sent.is_get, status, version, body);
                News::Answered((sent.request, answer))
            }
            None => News::Nothing,
        }
    }

    fn wait(&mut self, now: Instant) {
        let wait = RETRY_BASE.saturating_mul(1 << self.refusals.min(10));
        self.refusals = self.refusals.saturating_add(1);
        self.subscription = Subscription::Waits {
            until: now + wait.min(RETRY_MAX),
        };
    }

    /// The links are gone: what was sent has no answer, and nothing is subscribed.
    pub(super) fn lost(&mut self, outcomes: &mut Vec<Outcome>) {
        self.subscription = Subscription::None;
        for (_, sent) in self.sent.drain() {
            let text = "the twin's links are gone".to_owned();
            outcomes.push((sent.request, Err(UpstreamError::Unavailable(text))));
        }
    }

    /// The links were refused: nobody waits for them.
    pub(super) fn refused(&mut self, outcomes: &mut Vec<Outcome>) {
        self.lost(outcomes);
        for request in self.waiting.drain(..) {
            let text = "the upstream refuses the twin's links".to_owned();
            outcomes.push((request.request, Err(UpstreamError::Unavailable(text))));
        }
    }

    /// When the subscription has to be looked at.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        match &self.subscription {
            Subscription::Asked { deadline, .. } => Some(*deadline),
            Subscription::Waits { until } => Some(*until),
            Subscription::Held | Subscription::None => None,
        }
    }

    /// Gives a subscription up whose answer is overdue.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if matches!(self.subscription, Subscription::Asked { deadline, .. } if now >= deadline) {
            self.wait(now);
        }
    }
}

/// What an answer means: at 400 and above its body is a text for humans.
fn answer_of(
    is_get: bool,
    status: Option<u16>,
    version: Option<u64>,
    body: Bytes,
) -> Result<TwinAnswer, UpstreamError> {
    let unavailable = |text: String| Err(UpstreamError::Unavailable(text));
    match status {
        None => unavailable("the answer has no status".to_owned()),
        Some(200..=299) if is_get && body.is_empty() => {
            unavailable("the answer has no twin".to_owned())
        }
        Some(200..=299) if is_get => Ok(TwinAnswer {
            body,
            version: None,
        }),
        Some(200..=299) => Ok(TwinAnswer {
            body: Bytes::new(),
            version,
        }),
        Some(status @ (429 | 503)) => Err(UpstreamError::Busy { status }),
        Some(status @ 400..=499) if status != 408 => Err(UpstreamError::Refused { status }),
        Some(status) => unavailable(format!("status {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn news(correlation: &str, status: i64) -> TwinNews {
        TwinNews {
            correlation: Some(correlation.to_owned()),
            status: Some(status),
            version: None,
            body: Bytes::new(),
        }
    }

    fn asked() -> Twin {
        Twin {
            subscription: Subscription::Asked {
                correlation: "Put1".to_owned(),
                deadline: now() + SUBSCRIBE_MAX,
            },
            ..Twin::default()
        }
    }

    #[test]
    fn a_subscription_that_is_refused_waits_longer_each_time() {
        let now = now();
        let mut twin = asked();
        assert_eq!(twin.take(news("Put1", 500), now), News::Refused);
        assert_eq!(twin.next_timeout(), Some(now + RETRY_BASE));
        twin.subscription = asked().subscription;
        assert_eq!(twin.take(news("Put1", 429), now), News::Refused);
        assert_eq!(twin.next_timeout(), Some(now + RETRY_BASE * 2));
        twin.subscription = asked().subscription;
        assert_eq!(twin.take(news("Put1", 200), now), News::Subscribed);
        assert!(twin.is_subscribed());
        assert_eq!(twin.refusals, 0);
    }

    #[test]
    fn a_subscription_without_an_answer_is_tried_again() {
        let mut twin = asked();
        let due = twin.next_timeout().unwrap();
        twin.handle_timeout(due);
        assert_eq!(twin.next_timeout(), Some(due + RETRY_BASE));
        assert!(twin.is_refused());
    }

    #[test]
    fn what_has_no_correlation_is_a_change_and_a_wrong_one_is_nothing() {
        let mut twin = Twin::default();
        let change = TwinNews {
            correlation: None,
            status: None,
            version: None,
            body: Bytes::from_static(b"{}"),
        };
        let desired = News::Desired(Bytes::from_static(b"{}"));
        assert_eq!(twin.take(change, now()), desired);
        assert_eq!(twin.take(news("Get1", 200), now()), News::Nothing);
    }

    #[test]
    fn every_kind_of_answer() {
        let unavailable = |text: &str| Err(UpstreamError::Unavailable(text.to_owned()));
        for (status, expected) in [
            (Some(429), Err(UpstreamError::Busy { status: 429 })),
            (Some(503), Err(UpstreamError::Busy { status: 503 })),
            (Some(400), Err(UpstreamError::Refused { status: 400 })),
            (Some(404), Err(UpstreamError::Refused { status: 404 })),
            (Some(408), unavailable("status 408")),
            (Some(500), unavailable("status 500")),
            (Some(302), unavailable("status 302")),
            (None, unavailable("the answer has no status")),
            (Some(200), unavailable("the answer has no twin")),
        ] {
            assert_eq!(answer_of(true, status, None, Bytes::new()), expected);
        }
        let twin = Bytes::from_static(b"{}");
        let got = TwinAnswer {
            body: twin.clone(),
            version: None,
        };
        assert_eq!(answer_of(true, Some(200), Some(4), twin), Ok(got));
        let reported = TwinAnswer {
            body: Bytes::new(),
            version: Some(4),
        };
        assert_eq!(
            answer_of(false, Some(204), Some(4), Bytes::new()),
            Ok(reported)
        );
    }

    #[test]
    fn what_was_sent_fails_with_its_links() {
        let now = now();
        let mut twin = Twin::default();
        let sent = Sent {
            request: RequestId(4),
            is_get: true,
            deadline: now,
        };
        twin.sent.insert("Get1".to_owned(), sent);
        twin.push(vec![TwinRequest {
            request: RequestId(5),
            ask: TwinAsk::Get,
            deadline: now,
        }]);
        let mut outcomes = Vec::new();
        twin.lost(&mut outcomes);
        assert_eq!(outcomes.len(), 1);
        assert_eq!(outcomes[0].0, RequestId(4));
        twin.refused(&mut outcomes);
        assert_eq!(outcomes[1].0, RequestId(5));
        assert!(twin.was_asked());
    }
}
