//! What happens on the links of devices and modules (spec/upstream.md B5).

use bytes::Bytes;
use edgehub_amqp::connection::{Incoming, LinkId};
use edgehub_amqp::message::{MessageId, MessageView, MessageWriter, Properties};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use edgehub_amqp::value::Value;
use serde_json::json;
use tracing::{info, warn};

use super::client::{Client, Role};
use super::error::{self, ARGUMENT};
use super::message::{annotation, answer, body, dotnet_order, text, timestamp};
use super::telemetry;
use crate::c2d::{C2dError, Disposal, LockToken, LockedDelivery};
use crate::counters::Counter;
use crate::faults::{FaultAnswer, FaultKind};
use crate::identity::Identity;
use crate::ids::{uuid, uuid_text};
use crate::sessions::{Feature, Push};
use crate::twin::{Object, TwinError};

/// What a twin request is answered with.
struct TwinAnswer {
    status: u16,
    version: Option<u64>,
    body: String,
}

impl TwinAnswer {
    fn empty(status: u16) -> Self {
        Self {
            status,
            version: None,
            body: String::new(),
        }
    }

    /// A body that Node can parse (spec/amqp.md 4.5).
    fn failure(status: u16, message: &str) -> Self {
        let body = json!({
            "errorCode": u32::from(status) * 1_000 + 1,
            "trackingId": uuid(),
            "message": message,
        });
        Self {
            body: body.to_string(),
            ..Self::empty(status)
        }
    }
}

impl Client<'_> {
    /// A delivery of telemetry; accepted once the turn's messages are stored.
    pub(super) fn telemetry(&mut self, incoming: &Incoming) {
        let Some(link) = self.links.get(&incoming.link) else {
            return;
        };
        let (Role::Telemetry(stamps), Some(identity)) = (&link.role, &link.identity) else {
            return;
        };
        let Some(presence) = self.presences.get_mut(identity) else {
            return;
        };
        let counters = &self.hub.counters;
        counters.add(identity, Counter::AmqpTransfers);
        let bytes = &incoming.payload;
        if let Some(failure) = self.hub.faults.take_transfer(identity, bytes) {
            let error = error::ordered(&failure);
            let id = incoming.link;
            let outcome = match failure.answer {
                FaultAnswer::Refuse => Outcome::Rejected(Some(error)),
                FaultAnswer::Release => Outcome::Released,
                FaultAnswer::Modify => Outcome::Modified {
                    delivery_failed: true,
                    undeliverable_here: false,
                },
                FaultAnswer::Detach => return self.detach(id, Some(&error)),
                FaultAnswer::Close => return self.engine.close(Some(error)),
                FaultAnswer::Silence => return,
            };
            return self.engine.settle(incoming.received, outcome);
        }
        let (format, batch) = (incoming.message_format, &mut presence.batch);
        match telemetry::read(&incoming.payload, format, stamps, &self.now_utc, batch) {
            Ok(count) => {
                counters.add_many(identity, Counter::Telemetry, count);
                if presence.received.is_empty() {
                    self.with_telemetry.push(identity.clone());
                }
                presence.received.push(incoming.received);
            }
            Err(error) => {
                counters.add(identity, Counter::Telemetry);
                let reason = error.description.as_deref().unwrap_or_default();
                info!(client = %identity, reason, "telemetry rejected");
                let outcome = Outcome::Rejected(Some(error));
                self.engine.settle(incoming.received, outcome);
            }
        }
    }

    /// A twin request.
    pub(super) fn twin_request(&mut self, incoming: &Incoming) {
        let Some(link) = self.links.get(&incoming.link) else {
            return;
        };
        let (Role::TwinRequests(pair), Some(identity)) = (&link.role, link.identity.clone()) else {
            return;
        };
        let responses = self.twin_responses(&identity, pair);
        let message = match MessageView::parse(&incoming.payload) {
            Ok(message) => message,
            Err(error) => {
                let error = ErrorInfo::new(ARGUMENT, error.to_string());
                let outcome = Outcome::Rejected(Some(error));
                return self.engine.settle(incoming.received, outcome);
            }
        };
        let properties = message.properties.as_ref();
        let correlation = properties.and_then(|properties| properties.correlation_id.clone());
        let answered = self.serve_twin(&identity, &message);
        self.engine.settle(incoming.received, Outcome::Accepted);
        let Some(TwinAnswer {
            status,
            version,
            body,
        }) = answered
        else {
            return;
        };
        let (Some(correlation), Some(responses)) = (correlation, responses) else {
            warn!(client = %identity, "no answer: no correlation-id, or no link for it");
            return;
        };
        let status = ("status", Value::Int(i32::from(status)));
        let version = version.map(|version| i64::try_from(version).unwrap_or(i64::MAX));
        let version = version.map(|version| ("version", Value::Long(version)));
        let annotations = [Some(status), version].into_iter().flatten();
        let message = answer(Some(&correlation), annotations, body.as_bytes());
        self.answer(responses, message);
    }

    /// The link of answers that belongs to one of requests.
    fn twin_responses(&self, identity: &Identity, pair: &str) -> Option<LinkId> {
        let links = &self.presences.get(identity)?.links;
        let is_it = |id: &&LinkId| {
            let role = self.links.get(id).map(|link| &link.role);
            matches!(role, Some(Role::TwinResponses(other)) if other == pair)
        };
        links.iter().find(is_it).copied()
    }

    /// Carries out a twin request; none when the identity is being taken over.
    fn serve_twin(&self, identity: &Identity, message: &MessageView<'_>) -> Option<TwinAnswer> {
        let (hub, actor) = (self.hub, self.presences.get(identity)?.member.actor());
        let operation = annotation(message, "operation").as_ref().and_then(text);
        let resource = annotation(message, "resource").as_ref().and_then(text);
        let (operation, resource) = (
            operation.unwrap_or_default(),
            resource.unwrap_or_default().to_ascii_lowercase(),
        );
        match operation.as_str() {
            "GET" => hub.counters.add(identity, Counter::TwinGets),
            "PATCH" => hub.counters.add(identity, Counter::TwinPatches),
            _ => {}
        }
        if let Some(ordered) = hub.faults.take(FaultKind::Twin, Some(identity)) {
            let text = "made to fail through the control API";
            return Some(TwinAnswer::failure(ordered.code, text));
        }
        const NOTICES: &str = "/notifications/twin/properties/desired";
        let filters = [(Feature::DESIRED, mqttbytes::QoS::AtLeastOnce)];
        Some(match (operation.as_str(), resource.as_str()) {
            ("GET", _) => TwinAnswer {
                body: hub.twins.get(identity).for_device().to_string(),
                ..TwinAnswer::empty(200)
            },
            ("PATCH", "/properties/reported") => self.report(identity, message)?,
            ("PUT", NOTICES) => {
                hub.counters.add(identity, Counter::Subscribes);
                hub.sessions.subscribe(identity, actor, &filters).ok()?;
                TwinAnswer::empty(200)
            }
            ("DELETE", NOTICES) => {
                hub.counters.add(identity, Counter::Unsubscribes);
                let filters = [Feature::DESIRED.to_owned()];
                hub.sessions.unsubscribe(identity, actor, &filters).ok()?;
                TwinAnswer::empty(200)
            }
            _ => TwinAnswer::failure(400, "the operation or its resource is unknown"),
        })
    }

    fn report(&self, identity: &Identity, message: &MessageView<'_>) -> Option<TwinAnswer> {
        let patch = body(message).unwrap_or_default();
        let Ok(patch) = serde_json::from_slice::<Object>(&patch) else {
            return Some(TwinAnswer::failure(400, "the patch is no JSON object"));
        };
        let wanted = annotation(message, "version").and_then(|version| version.as_u64());
        let fence = self.presences.get(identity)?.member.fence();
        let reported = self
            .hub
            .twins
            .report(identity, fence, &patch, wanted, self.now_ms);
        Some(match reported {
            Ok(version) => TwinAnswer {
                version: Some(version),
                ..TwinAnswer::empty(204)
            },
            Err(TwinError::Fenced) => return None,
            Err(error) => {
                info!(client = %identity, %error, "reported patch refused");
                TwinAnswer::failure(error.status(), &error.to_string())
            }
        })
    }

    /// The answer to a method.
    pub(super) fn method_answer(&mut self, incoming: &Incoming) {
        let link = self.links.get(&incoming.link);
        let Some(identity) = link.and_then(|link| link.identity.clone()) else {
            return;
        };
        self.hub.counters.add(&identity, Counter::MethodResponses);
        let read = || {
            let message = MessageView::parse(&incoming.payload).ok()?;
            let id = message.properties.as_ref()?.correlation_id.as_ref()?;
            let id = id.to_string().to_ascii_lowercase();
            let status = message.application_properties?.get_str("IoThub-status")?;
            let status = i32::try_from(status.as_i64()?).ok()?;
            Some((id, status, body(&message)?))
        };
        let outcome = match read() {
            Some((id, status, body)) => {
                self.hub.methods.answer(&identity, &id, status, &body);
                Outcome::Accepted
            }
            None => {
                let text = "an answer needs a correlation-id, IoThub-status and a body";
                warn!(client = %identity, text);
                Outcome::Rejected(Some(ErrorInfo::new(ARGUMENT, text)))
            }
        };
        self.engine.settle(incoming.received, outcome);
    }

    /// Methods, or desired patches, as far as they go; whether some are left.
    pub(super) fn pump_pushes(&mut self, id: LinkId) -> bool {
        let Some(link) = self.links.get(&id) else {
            return false;
        };
        let is_methods = matches!(link.role, Role::MethodRequests);
        let Some(identity) = link.identity.clone() else {
            return false;
        };
        loop {
            let Some(presence) = self.presences.get_mut(&identity) else {
                return false;
            };
            let queue = match is_methods {
                true => &mut presence.methods,
                false => &mut presence.desired,
            };
            if queue.is_empty() {
                return false;
            }
            if !self.engine.can_send(id) {
                return true;
            }
            let Some(push) = queue.pop_front() else {
                return false;
            };
            self.answer_now(id, push_message(&push));
        }
    }

    /// Sends an answer that has credit already.
    fn answer_now(&mut self, id: LinkId, message: Bytes) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        let tag = link.next_tag();
        self.send(id, &tag, true, message);
    }

    /// C2D messages, as far as credit goes.
    pub(super) fn pump_c2d(&mut self, id: LinkId) -> bool {
        while self.engine.can_send(id) {
            let Some(identity) = self.links.get(&id).and_then(|link| link.identity.clone()) else {
                return false;
            };
            let Some(presence) = self.presences.get(&identity) else {
                return false;
            };
            let (c2d, actor) = (&self.hub.c2d, presence.member.actor());
            let delivery = match c2d.lock(&identity.device, actor, 1, self.now_ms) {
                Ok(mut deliveries) => deliveries.pop(),
                Err(error) => {
                    warn!(client = %identity, %error, "no c2d messages");
                    None
                }
            };
            let Some(delivery) = delivery else {
                return false;
            };
            self.hub.counters.add(&identity, Counter::C2dDeliveries);
            let message = c2d_message(&identity.device, &delivery);
            let tag = dotnet_order(delivery.token);
            let sent = self.send(id, &tag, false, message);
            if let (Some(sent), Some(link)) = (sent, self.links.get_mut(&id)) {
                link.locked.insert(sent, delivery.token);
            }
        }
        // It is looked again when there may be credit or room.
        true
    }

    /// What the device did with a C2D message.
    pub(super) fn c2d_settled(&mut self, id: LinkId, token: LockToken, outcome: Option<&Outcome>) {
        let disposal = match outcome {
            Some(Outcome::Accepted) => Disposal::Complete,
            Some(Outcome::Rejected(_)) => Disposal::Reject,
            Some(Outcome::Released | Outcome::Modified { .. }) => Disposal::Abandon,
            // Its lock runs out.
            None => return,
        };
        let Some(identity) = self.links.get(&id).and_then(|link| link.identity.clone()) else {
            return;
        };
        let Some(presence) = self.presences.get(&identity) else {
            return;
        };
        let (c2d, actor) = (&self.hub.c2d, presence.member.actor());
        match c2d.dispose(&identity.device, actor, token, disposal, self.now_ms) {
            Ok(()) | Err(C2dError::Fenced) => {}
            Err(error) => warn!(client = %identity, ?disposal, %error, "disposition ignored"),
        }
        self.stirred.insert(id);
    }
}

/// A method as a request with a uuid, or a desired patch without a correlation-id.
fn push_message(push: &Push) -> Bytes {
    match push {
        Push::Desired { body, .. } => answer(None, [], body.as_bytes()),
        Push::Method { rid, name, payload } => {
            let hex: String = rid.chars().filter(|c| *c != '-').collect();
            let id = match u128::from_str_radix(&hex, 16) {
                Ok(number) => MessageId::Uuid(number.to_be_bytes()),
                Err(_) => MessageId::Str(rid.as_str().into()),
            };
            let mut writer = MessageWriter::new();
            writer.properties(&Properties {
                correlation_id: Some(id),
                ..Properties::default()
            });
            writer.application_properties([("IoThub-methodname", Value::Str(name))]);
            writer.data(payload.as_bytes());
            writer.finish()
        }
    }
}

fn c2d_message(device: &str, delivery: &LockedDelivery) -> Bytes {
    let message = &delivery.message;
    // The tag is what the client makes the token's text of.
    let lock_token = uuid_text(delivery.token);
    let to = format!("/devices/{device}/messages/devicebound");
    let mut writer = MessageWriter::new();
    let earlier = u8::try_from(delivery.earlier).unwrap_or(u8::MAX);
    writer.annotations([
        ("iothub-enqueuedtime", timestamp(delivery.enqueued_ms)),
        ("iothub-deliverycount", Value::Ubyte(earlier)),
        ("x-opt-sequence-number", Value::Ulong(delivery.sequence)),
        ("x-opt-lock-token", Value::Str(&lock_token)),
    ]);
    let id = |text: &String| MessageId::Str(text.as_str().into());
    let expiry = message
        .expiry_ms
        .map(|ms| i64::try_from(ms).unwrap_or(i64::MAX));
    writer.properties(&Properties {
        message_id: Some(id(&message.message_id)),
        correlation_id: message.correlation_id.as_ref().map(id),
        user_id: message.user_id.as_ref().map(String::as_bytes),
        to: Some(&to),
        content_type: message.content_type.as_deref(),
        content_encoding: message.content_encoding.as_deref(),
        absolute_expiry_time: expiry,
        ..Properties::default()
    });
    let ack = message
        .ack
        .as_deref()
        .map(|ack| ("iothub-ack", Value::Str(ack)));
    let own = message.properties.iter();
    let own = own.map(|(name, value)| (name.as_str(), Value::Str(value)));
    writer.application_properties(ack.into_iter().chain(own));
    writer.data(&message.body);
    writer.finish()
}
