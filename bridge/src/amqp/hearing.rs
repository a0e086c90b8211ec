//! The listening side of an identity's session: twin, direct methods, cloud-to-device messages.
//!
//! Pure but for the calls on the broker, which return at once. Links are there while they are
//! needed; losing one of them costs nothing but its group.

use std::{sync::Arc, time::Instant};

use edgehub_amqp::performative::{ErrorInfo, Outcome as Settlement};
use edgehub_proto::{
    hub::{CloudToDevice, Downstream, MethodCall, MethodResult, Needs},
    identity::Identity,
};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::{
    arrivals::{Awaited, Calls, Messages, Reply},
    client::{Client, Delivery, LinkKey, Reason, SessionKey},
    conditions::{self, Class},
    convert,
    links::Addresses,
    ports::{Group, Ports},
    twin::{News, Outcome, Twin},
};
use crate::{counters, lanes::CloseCause, transport::TwinRequest};

/// Answer to a call beyond the limit.
const TOO_MANY_CALLS: (i32, &[u8]) = (429, br#"{"message":"Too many method calls at once"}"#);

/// Answer instead of one that is too large for the upstream.
const ANSWER_TOO_LARGE: (i32, &[u8]) = (413, br#"{"message":"The method's answer is too large"}"#);

pub(super) struct Hearing {
    identity: Identity,
    downstream: Arc<dyn Downstream>,
    needs: Needs,
    twin_ports: Ports,
    method_ports: Ports,
    message_ports: Ports,
    twin: Twin,
    calls: Calls,
    messages: Messages,
    /// What is needed is to be announced once it is there.
    to_announce: bool,
    was_announced: bool,
    outcomes: Vec<Outcome>,
    awaited: Vec<Awaited>,
}

impl Hearing {
    pub(super) fn new(identity: Identity, downstream: Arc<dyn Downstream>) -> Self {
        Self {
            identity,
            downstream,
            needs: Needs::default(),
            twin_ports: Ports::default(),
            method_ports: Ports::default(),
            message_ports: Ports::default(),
            twin: Twin::default(),
            calls: Calls::default(),
            messages: Messages::default(),
            to_announce: false,
            was_announced: false,
            outcomes: Vec::new(),
            awaited: Vec::new(),
        }
    }

    /// The identity needs this from now on.
    pub(super) fn need(&mut self, needs: Needs) {
        let before = std::mem::replace(&mut self.needs, needs);
        if !needs.any() {
            self.to_announce = false;
        } else if !self.was_announced || (needs.desired && !before.desired) {
            self.to_announce = true;
        }
    }

    pub(super) fn request(&mut self, requests: Vec<TwinRequest>) {
        self.twin.push(requests);
    }

    /// Requests that are over since the last call.
    pub(super) fn take_outcomes(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    /// Answers that are to be waited for since the last call.
    pub(super) fn take_awaited(&mut self) -> Vec<Awaited> {
        std::mem::take(&mut self.awaited)
    }

    pub(super) fn has(&self, link: LinkKey) -> bool {
        let ports = [&self.twin_ports, &self.method_ports, &self.message_ports];
        ports.iter().any(|ports| ports.has(link))
    }

    fn ports(&mut self, group: Group) -> &mut Ports {
        match group {
            Group::Twin => &mut self.twin_ports,
            Group::Methods => &mut self.method_ports,
            Group::CloudToDevice => &mut self.message_ports,
        }
    }

    pub(super) fn attached(&mut self, link: LinkKey) {
        for group in Group::ALL {
            self.ports(group).attached(link);
        }
    }

    /// A link is gone.
    ///
    /// # Errors
    ///
    /// The whole session cannot go on: the upstream does not want the identity.
    pub(super) fn detached(
        &mut self,
        client: &mut Client,
        link: LinkKey,
        error: Option<&ErrorInfo>,
        now: Instant,
    ) -> Result<(), CloseCause> {
        for group in Group::ALL {
            let Some(gone) = self.ports(group).detached(link, client, now) else {
                continue;
            };
            let label = group.label();
            warn!(identity = %self.identity, link = label, was_attached = gone.was_attached,
                "link is gone{}", Reason(error));
            if !gone.was_attached {
                counters::refused_subscription(label);
            }
            self.lost(group, gone.was_attached);
            if matches!(conditions::class(error), Class::Refused) {
                return Err(conditions::loss(label, error));
            }
        }
        Ok(())
    }

    fn lost(&mut self, group: Group, was_attached: bool) {
        match group {
            Group::Twin if was_attached => self.twin.lost(&mut self.outcomes),
            Group::Twin => self.twin.refused(&mut self.outcomes),
            Group::Methods => self.calls.lost(),
            // The upstream has them again.
            Group::CloudToDevice => drop(self.messages.give_up()),
        }
    }

    /// A delivery on one of our links.
    pub(super) fn delivered(&mut self, client: &mut Client, delivery: &Delivery, now: Instant) {
        let link = delivery.link;
        if self.twin_ports.has(link) {
            self.twin_news(delivery, now);
            self.done(client, delivery);
        } else if self.method_ports.has(link) {
            self.call(delivery, now);
            self.done(client, delivery);
        } else {
            self.cloud_to_device(client, delivery);
        }
    }

    /// The delivery needs nothing more.
    fn done(&self, client: &mut Client, delivery: &Delivery) {
        if !delivery.settled {
            client.settle(delivery.link, delivery.number, Settlement::Accepted);
        }
        client.release(delivery.link);
    }

    fn twin_news(&mut self, delivery: &Delivery, now: Instant) {
        let news = match convert::twin_news(&delivery.payload) {
            Ok(news) => news,
            Err(error) => {
                warn!(identity = %self.identity, %error, "a twin's message cannot be read");
                counters::ignored_publish("malformed");
                return;
            }
        };
        match self.twin.take(news, now) {
            News::Answered(outcome) => self.outcomes.push(outcome),
            News::Desired(patch) if self.needs.desired => {
                self.downstream.desired(&self.identity, patch);
            }
            News::Desired(_) => counters::ignored_publish("not_needed"),
            News::Nothing => counters::ignored_publish("no_request"),
            News::Refused => {
                warn!(identity = %self.identity, "desired properties cannot be subscribed to now");
                counters::refused_subscription("desired");
            }
            // What was missed meanwhile is to be fetched.
            News::Subscribed => self.to_announce |= self.was_announced,
        }
    }

    fn call(&mut self, delivery: &Delivery, now: Instant) {
        let Some(call) = convert::call(&delivery.payload) else {
            warn!(identity = %self.identity, "a method without a name or an id is not called");
            counters::ignored_publish("malformed");
            return;
        };
        if !self.calls.has_room() {
            warn!(identity = %self.identity, name = call.name, "too many method calls at once");
            let (status, payload) = TOO_MANY_CALLS;
            self.answer(convert::answer(call.correlation, status, payload));
            return;
        }
        let (sender, reply) = oneshot::channel();
        let number = self.calls.call(call.correlation, now);
        self.awaited.push(Awaited::Method {
            call: number,
            reply,
        });
        let call = MethodCall {
            name: call.name,
            payload: call.payload,
            reply: sender,
        };
        self.downstream.method(&self.identity, call);
    }

    fn answer(&mut self, answer: bytes::Bytes) {
        if !self.calls.push(answer) {
            warn!(identity = %self.identity, "the upstream does not take methods' answers");
        }
    }

    fn cloud_to_device(&mut self, client: &mut Client, delivery: &Delivery) {
        let (link, number) = (delivery.link, delivery.number);
        match convert::cloud_to_device(&delivery.payload, &delivery.tag) {
            Ok((message, redelivered)) => {
                if self.messages.push(number, message, redelivered) {
                    return;
                }
                client.settle(link, number, Settlement::Released);
            }
            Err(error) => {
                // It would be the same the next time.
                warn!(identity = %self.identity, %error, "a cloud-to-device message cannot be read");
                counters::ignored_publish("bad_properties");
                let error = ErrorInfo::new("amqp:decode-error", "the message cannot be read");
                client.settle(link, number, Settlement::Rejected(Some(error)));
            }
        }
        client.release(link);
    }

    /// Takes an answer from below.
    pub(super) fn take_reply(&mut self, client: &mut Client, reply: Reply, now: Instant) {
        match reply {
            Reply::CloudToDevice { number, outcome } => {
                let settlement = self.messages.settle(number, outcome, now);
                if let Some(settlement) = settlement {
                    self.give_back(client, number, settlement);
                }
            }
            Reply::Method { call, result } => {
                let Some((correlation, took)) = self.calls.answered(call, now) else {
                    return;
                };
                let Some(MethodResult { status, payload }) = result else {
                    debug!(identity = %self.identity, %correlation, "method is not answered");
                    return;
                };
                counters::method_answered(&self.identity, took);
                let mut answer = convert::answer(correlation.clone(), status, &payload);
                if answer.len() > crate::limits::AMQP_BATCH_BYTES_MAX {
                    warn!(identity = %self.identity, "a method's answer is too large");
                    let (status, payload) = ANSWER_TOO_LARGE;
                    answer = convert::answer(correlation, status, payload);
                }
                self.answer(answer);
            }
        }
    }

    fn give_back(&self, client: &mut Client, number: u32, settlement: Settlement) {
        if let Some(link) = self.message_ports.down() {
            client.settle(link, number, settlement);
            client.release(link);
        }
    }

    /// Does everything that has become possible.
    pub(super) fn pursue(
        &mut self,
        client: &mut Client,
        session: SessionKey,
        addresses: &mut Addresses<'_>,
        now: Instant,
    ) {
        self.twin.handle_timeout(now);
        for number in self.messages.due(now) {
            self.give_back(client, number, Settlement::Released);
        }
        if !self.needs.cloud_to_device {
            for number in self.messages.give_up() {
                self.give_back(client, number, Settlement::Released);
            }
        }
        for group in Group::ALL {
            let asked = group == Group::Twin && self.twin.was_asked();
            let is_wanted = group.is_needed(self.needs) || asked;
            let has_links = self.ports(group).is_attached();
            if has_links && !is_wanted {
                match group {
                    Group::Twin => {
                        // Says that it is no longer listened for, before the links go.
                        if let Some(up) = self.twin_ports.up() {
                            self.twin.send(client, up, false, now, &mut self.outcomes);
                        }
                        self.twin.lost(&mut self.outcomes);
                    }
                    Group::Methods => self.calls.lost(),
                    Group::CloudToDevice => {}
                }
            }
            let ports = self.ports(group);
            ports.handle_timeout(client, now);
            ports.pursue(group, is_wanted, client, session, addresses, now);
        }
        if self.twin_ports.is_refused() {
            self.twin.refused(&mut self.outcomes);
        }
        if let Some(up) = self.twin_ports.up() {
            let wants_desired = self.needs.desired;
            self.twin
                .send(client, up, wants_desired, now, &mut self.outcomes);
        }
        if let Some(up) = self.method_ports.up() {
            while self.calls.has_answers() && client.can_send(up) {
                if let Some(answer) = self.calls.pop()
                    && client.send(up, 0, answer).is_err()
                {
                    warn!(identity = %self.identity, "a method's answer cannot be sent");
                }
            }
        }
        while let Some(forward) = self.messages.forward() {
            let (settle, reply) = oneshot::channel();
            self.awaited.push(Awaited::CloudToDevice {
                number: forward.number,
                reply,
            });
            let message = CloudToDevice {
                message: forward.message,
                redelivered: forward.redelivered,
                settle,
            };
            self.downstream.cloud_to_device(&self.identity, message);
        }
        self.announce();
    }

    /// Tells the broker once everything that is needed is there, or known not to come now.
    fn announce(&mut self) {
        let needs = self.needs;
        let is_settled = |ports: &Ports| ports.is_attached() || ports.is_refused();
        let twin_is_settled =
            self.twin_ports.is_refused() || self.twin.is_subscribed() || self.twin.is_refused();
        let is_due = self.to_announce
            && (!needs.desired || twin_is_settled)
            && (!needs.methods || is_settled(&self.method_ports))
            && (!needs.cloud_to_device || is_settled(&self.message_ports));
        if is_due {
            self.to_announce = false;
            self.was_announced = true;
            debug!(identity = %self.identity, ?needs, "session is established");
            self.downstream.established(&self.identity);
        }
    }

    /// When [`Hearing::pursue`] has something to do next.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let ports = [&self.twin_ports, &self.method_ports, &self.message_ports];
        let ports = ports.iter().filter_map(|ports| ports.next_timeout());
        let others = [self.twin.next_timeout(), self.messages.next_timeout()];
        ports.chain(others.into_iter().flatten()).min()
    }
}
