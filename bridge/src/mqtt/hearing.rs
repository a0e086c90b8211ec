//! The listening side of a session: subscriptions, desired properties, direct methods,
//! cloud-to-device messages, and twin requests with their answers.
//!
//! Owns no socket. The session's task hands in what happened, then calls [`Hearing::pursue`] once,
//! which does everything that has become possible. What arrives goes to the broker at once; nothing
//! here waits for it.
//!
//! # Promises
//!
//! - A cloud-to-device message is acknowledged when the broker has settled it, in the order of
//!   arrival. One that the broker drops or gives back ends the session, so that the upstream
//!   delivers it again; one that nobody needs is left there.
//! - Every method call is answered once, or not at all when the broker drops it.
//! - Nothing that the upstream sends makes this grow without bound, panic or spin.

use std::{num::NonZeroU16, sync::Arc, time::Instant};

use bytes::Bytes;
use edgehub_proto::{
    bag,
    hub::{
        CloudToDevice, CloudToDeviceOutcome, Downstream, MethodCall, MethodResult, Needs,
        UpstreamError,
    },
    identity::Identity,
    message::Message,
};
use tracing::{debug, warn};

use super::{
    arrivals::{Arrivals, Overrun},
    inbound::{self, Inbound},
    machine::{Machine, MachineEvent},
    replies::{Replies, Reply},
    requests::{Outcome, Requests},
    subscriptions::{Change, Filter, Subscriptions},
    terms::{PublishError, Received},
};
use crate::{counters, lanes::CloseCause, limits, transport::TwinRequest};

/// Answer to a call beyond the limit.
const TOO_MANY_CALLS: (i32, &[u8]) = (429, br#"{"message":"Too many method calls at once"}"#);

/// Answer instead of one that fits no packet.
const ANSWER_TOO_LARGE: (i32, &[u8]) = (413, br#"{"message":"The method's answer is too large"}"#);

/// Bytes of a PUBACK.
const PUBACK_BYTES: usize = 4;

pub(super) struct Hearing {
    identity: Identity,
    downstream: Arc<dyn Downstream>,
    needs: Needs,
    subscriptions: Subscriptions,
    arrivals: Arrivals,
    replies: Replies,
    requests: Requests,
    /// Cloud-to-device messages came that nobody needed. The upstream holds them for this session
    /// until it ends.
    left_upstream: bool,
    /// Requests that are over and not reported.
    outcomes: Vec<Outcome>,
    /// Bytes of answers that were written since all was read.
    unread: usize,
}

impl Hearing {
    pub(super) fn new(identity: Identity, downstream: Arc<dyn Downstream>) -> Self {
        Self {
            identity,
            downstream,
            needs: Needs::default(),
            subscriptions: Subscriptions::default(),
            arrivals: Arrivals::default(),
            replies: Replies::default(),
            requests: Requests::default(),
            left_upstream: false,
            outcomes: Vec::new(),
            unread: 0,
        }
    }

    /// The identity needs this from now on.
    pub(super) fn need(&mut self, needs: Needs) -> Result<(), CloseCause> {
        let before = std::mem::replace(&mut self.needs, needs);
        if before.cloud_to_device && !needs.cloud_to_device {
            if self.arrivals.has_unsettled() {
                return Err(unsettled(
                    "cloud-to-device messages are not needed any more",
                ));
            }
            self.arrivals.drop_held();
        }
        if needs.cloud_to_device && self.left_upstream {
            return Err(unsettled(
                "cloud-to-device messages came before they were needed",
            ));
        }
        self.subscriptions.need(needs);
        Ok(())
    }

    pub(super) fn request(&mut self, requests: Vec<TwinRequest>) {
        self.subscriptions.ask();
        self.requests.push(requests);
    }

    /// Requests that are over since the last call.
    pub(super) fn take_outcomes(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    /// Whether something was handed down whose answer would be lost with the session.
    pub(super) fn is_engaged(&self) -> bool {
        !self.replies.is_empty()
    }

    /// Everything that was written has been read.
    pub(super) fn is_read(&mut self) {
        self.unread = 0;
    }

    /// When [`Hearing::handle_timeout`] has something to do next.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.replies.next_expiry()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.replies.expire(now);
    }

    /// Waits for the next answer from below.
    ///
    /// # Cancel safety
    ///
    /// As [`Replies::next`].
    pub(super) async fn next_reply(&mut self, now: impl Fn() -> Instant) -> Reply {
        self.replies.next(now).await
    }

    /// Takes an answer from below.
    pub(super) fn take_reply(
        &mut self,
        machine: &mut Machine,
        now: Instant,
        reply: Reply,
    ) -> Result<(), CloseCause> {
        match reply {
            Reply::CloudToDevice { serial, outcome } => {
                // MQTT cannot give one message back: it comes again with the next session.
                let comes_again = matches!(outcome, None | Some(CloudToDeviceOutcome::Abandoned));
                if comes_again && self.arrivals.is_kept_upstream(serial) {
                    return Err(unsettled("a cloud-to-device message was not settled"));
                }
                // MQTT has no rejection: what can never be delivered is complete.
                self.arrivals.settle(serial);
            }
            Reply::Method {
                request_id,
                result: Some(result),
                took,
            } => {
                counters::method_answered(&self.identity, took);
                let MethodResult { status, payload } = result;
                let answer = (status, payload.as_ref());
                let written = self.answer(machine, now, &request_id, answer);
                if let Err(error @ PublishError::TooLarge { .. }) = written {
                    warn!(identity = %self.identity, %error, "a method's answer cannot be sent");
                    let _ = self.answer(machine, now, &request_id, ANSWER_TOO_LARGE);
                }
            }
            Reply::Method {
                request_id,
                result: None,
                ..
            } => debug!(identity = %self.identity, request_id, "method is not answered"),
        }
        Ok(())
    }

    /// Takes what the server did.
    pub(super) fn take_event(
        &mut self,
        machine: &mut Machine,
        now: Instant,
        event: MachineEvent,
    ) -> Result<(), CloseCause> {
        match event {
            MachineEvent::Publish(received) => return self.publish(machine, now, received),
            MachineEvent::Subscribed(granted) => {
                for filter in self.subscriptions.subscribed(&granted).iter() {
                    let label = filter.label();
                    warn!(identity = %self.identity, filter = label, "subscription refused");
                    counters::refused_subscription(label);
                }
            }
            MachineEvent::Unsubscribed => self.subscriptions.unsubscribed(),
        }
        Ok(())
    }

    /// Does everything that has become possible.
    pub(super) fn pursue(&mut self, machine: &mut Machine, now: Instant) -> Result<(), CloseCause> {
        self.change_subscriptions(machine, now)?;
        self.send_requests(machine, now);
        while let Some(forward) = self.arrivals.forward() {
            let settle = self.replies.hand_down(forward.serial);
            let message = CloudToDevice {
                message: forward.message,
                redelivered: forward.redelivered,
                settle,
            };
            self.downstream.cloud_to_device(&self.identity, message);
        }
        while let Some(packet_id) = self.arrivals.acknowledge() {
            machine.acknowledge(now, packet_id);
            self.unread += PUBACK_BYTES;
        }
        if self.subscriptions.take_announcement() {
            debug!(identity = %self.identity, needs = ?self.needs, "session is established");
            self.downstream.established(&self.identity);
        }
        if self.unread > limits::ANSWERS_BYTES_MAX {
            let text = "the upstream does not read its answers";
            return Err(CloseCause::Protocol(text.into()));
        }
        Ok(())
    }

    fn change_subscriptions(
        &mut self,
        machine: &mut Machine,
        now: Instant,
    ) -> Result<(), CloseCause> {
        if !machine.can_change_subscriptions() {
            return Ok(());
        }
        let identity = &self.identity;
        let result = match self.subscriptions.begin_change() {
            None => Ok(()),
            Some(Change::Subscribe(filters)) => {
                let filters = filters
                    .iter()
                    .map(|filter| (filter.topic(identity), filter.is_at_least_once()));
                machine.subscribe(now, filters)
            }
            Some(Change::Unsubscribe(filters)) => {
                machine.unsubscribe(now, filters.iter().map(|filter| filter.topic(identity)))
            }
        };
        result.map_err(|error| CloseCause::Local(error.to_string().into()))
    }

    fn send_requests(&mut self, machine: &mut Machine, now: Instant) {
        if self.subscriptions.is_refused(Filter::TwinResponses) {
            for request in self.requests.take_waiting() {
                let text = "the upstream refuses twin answers".to_owned();
                self.outcomes
                    .push((request, Err(UpstreamError::Unavailable(text))));
            }
        }
        if !self.subscriptions.holds(Filter::TwinResponses) {
            return;
        }
        while let Some(outgoing) = self.requests.send(now) {
            let written = machine.publish_unacknowledged(now, outgoing.topic, &outgoing.payload);
            if let Err(error) = written {
                debug!(identity = %self.identity, %error, "twin request cannot be sent");
                self.requests.forget(outgoing.request);
                let status = 413;
                self.outcomes
                    .push((outgoing.request, Err(UpstreamError::Refused { status })));
            }
        }
        machine.await_answers(now, self.requests.awaits_answers(now));
    }

    fn publish(
        &mut self,
        machine: &mut Machine,
        now: Instant,
        received: Received,
    ) -> Result<(), CloseCause> {
        let Received {
            topic,
            payload,
            packet_id,
            is_exactly_once,
            dup,
        } = received;
        if is_exactly_once {
            self.ignore("exactly_once", &topic);
            return Ok(());
        }
        let identity = self.identity.clone();
        match inbound::parse(&topic, &identity) {
            Inbound::CloudToDevice { bag } => {
                return self.cloud_to_device(&topic, bag, payload, packet_id, dup);
            }
            // Perhaps a message for somebody: it stays upstream.
            Inbound::Unknown => {
                self.ignore("unknown", &topic);
                return Ok(());
            }
            Inbound::Desired if self.needs.desired => {
                self.downstream.desired(&identity, payload);
            }
            Inbound::Desired => self.refuse(Filter::Desired, &topic),
            Inbound::Method { name, request_id } if self.needs.methods => {
                self.method(machine, now, &name, request_id, payload);
            }
            Inbound::Method { .. } => self.refuse(Filter::Methods, &topic),
            Inbound::TwinResponse {
                status,
                request_id,
                version,
            } => match self.requests.answer(request_id, status, version, payload) {
                Some(outcome) => self.outcomes.push(outcome),
                None => self.ignore("no_request", &topic),
            },
        }
        // Asked for at QoS 0, and of no use later: whatever became of it, it is done.
        let Some(packet_id) = packet_id else {
            return Ok(());
        };
        self.arrivals.nothing(packet_id).map_err(overrun)
    }

    fn method(
        &mut self,
        machine: &mut Machine,
        now: Instant,
        name: &str,
        request_id: &str,
        payload: Bytes,
    ) {
        if !self.replies.has_room() {
            warn!(identity = %self.identity, name, "too many method calls at once");
            // It fits.
            let _ = self.answer(machine, now, request_id, TOO_MANY_CALLS);
            return;
        }
        let call = MethodCall {
            name: name.to_owned(),
            payload,
            reply: self.replies.call(request_id.to_owned(), now),
        };
        self.downstream.method(&self.identity, call);
    }

    fn answer(
        &mut self,
        machine: &mut Machine,
        now: Instant,
        request_id: &str,
        (status, payload): (i32, &[u8]),
    ) -> Result<(), PublishError> {
        let topic = format!("$iothub/methods/res/{status}/?$rid={request_id}");
        let bytes = topic.len() + payload.len();
        machine.publish_unacknowledged(now, topic, payload)?;
        self.unread += bytes;
        Ok(())
    }

    fn cloud_to_device(
        &mut self,
        topic: &str,
        bag: &str,
        body: Bytes,
        packet_id: Option<NonZeroU16>,
        redelivered: bool,
    ) -> Result<(), CloseCause> {
        if !self.needs.cloud_to_device {
            self.left_upstream |= packet_id.is_some();
            self.refuse(Filter::CloudToDevice, topic);
            return Ok(());
        }
        let mut message = Message {
            body,
            ..Message::default()
        };
        if let Err(error) = bag::decode_into(bag, &mut message) {
            // As if rejected: it would be the same the next time.
            warn!(identity = %self.identity, %error, "a cloud-to-device message cannot be read");
            counters::ignored_publish("bad_properties");
            return packet_id.map_or(Ok(()), |id| self.arrivals.nothing(id).map_err(overrun));
        }
        self.arrivals
            .message(packet_id, message, redelivered)
            .map_err(overrun)
    }

    /// Something arrived that nobody needs: an older session's subscription, or one that is being
    /// given up.
    fn refuse(&mut self, filter: Filter, topic: &str) {
        self.ignore("not_needed", topic);
        self.subscriptions.unwanted(filter);
    }

    fn ignore(&self, reason: &'static str, topic: &str) {
        // What follows may be somebody's properties, which belong in no log.
        let topic = topic
            .split_once("/messages/")
            .map_or(topic, |(owner, _)| owner);
        debug!(identity = %self.identity, reason, topic, "publish from upstream ignored");
        counters::ignored_publish(reason);
    }
}

fn overrun(Overrun: Overrun) -> CloseCause {
    unsettled("more messages came than are held")
}

fn unsettled(text: &str) -> CloseCause {
    CloseCause::Unsettled(text.into())
}
