//! What the hub tells a client, on its way into packets.
//!
//! Events come through the connection's outbox and leave as PUBLISHes: at QoS 0 what is on
//! `$iothub` topics (design.md D3), at the QoS that was granted what must be acknowledged. Nothing
//! is taken from the outbox while the client does not read, and deliveries that were taken wait
//! here, bounded, until their packet id is free and there is room.
//!
//! # Order
//! Deliveries of one stream leave in the order in which they came: while one waits, the later ones
//! of its stream wait behind it. When one is refused because the client is not subscribed, so are
//! all later ones for the same input until the hub was told of other subscriptions
//! ([`Outbox::settle_refused`]); otherwise a later one, taken before the hub heard of the refusal,
//! could overtake it.

use std::collections::VecDeque;
use std::sync::Arc;

use edgehub_proto::bag;
use edgehub_proto::identity::Identity;
use edgehub_proto::limits::MQTT_TOPIC_BYTES_MAX;
use edgehub_proto::message::Message;
use edgehub_proto::topic;
use ntex_mqtt::QoS;
use smallvec::SmallVec;
use tokio::sync::mpsc;

use super::filters::Subscriptions;
use super::limits::WAITING_MAX;
use super::machine::{Machine, Sent};
use crate::hub::{Delivery, DeliveryToken, OUTBOX_EVENTS_MAX, Settlement, ToClient};

/// The application property that steers the QoS of a delivery (spec/mqtt.md 8.3).
const QOS_PROPERTY: &str = "mqtt-qos";

/// The hub has given the connection's place to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Replaced;

/// What a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Input,
    CloudToDevice,
}

/// The events of one connection.
#[derive(Debug)]
pub(super) struct Outbox {
    identity: Identity,
    events: mpsc::Receiver<ToClient>,
    /// Taken from `events` and not looked at yet.
    taken: VecDeque<ToClient>,
    /// Deliveries that could not be sent yet.
    waiting: VecDeque<(Kind, Delivery)>,
    /// Inputs that the client is not subscribed to, with their streams.
    refused: Vec<(u16, Arc<str>)>,
    /// Deliveries of QoS 0 in the output, and those of them that are being written.
    encoded: Vec<DeliveryToken>,
    writing: Vec<DeliveryToken>,
    settled: Vec<(DeliveryToken, Settlement)>,
    /// An undeliverable message was logged. Each is counted; the first of a connection says why.
    logged: bool,
}

impl Outbox {
    pub(super) fn new(identity: Identity, events: mpsc::Receiver<ToClient>) -> Self {
        Self {
            identity,
            events,
            taken: VecDeque::new(),
            waiting: VecDeque::new(),
            refused: Vec::new(),
            encoded: Vec::new(),
            writing: Vec::new(),
            settled: Vec::new(),
            logged: false,
        }
    }

    /// Waits for an event. For as long as [`Outbox::wants_events`].
    ///
    /// # Cancel safety
    /// Safe: an event that was received is kept.
    pub(super) async fn next(&mut self) -> Result<(), Replaced> {
        if self.taken.is_empty() {
            let event = self.events.recv().await.ok_or(Replaced)?;
            self.taken.push_back(event);
        }
        Ok(())
    }

    /// Whether events may be taken. (Whether the client has room is the machine's to say.)
    pub(super) fn wants_events(&self) -> bool {
        self.waiting.len() < WAITING_MAX
    }

    /// The connection has ended: the hub can offer nothing more to it.
    pub(super) fn close(&mut self) {
        self.events.close();
    }

    /// Turns what has come into packets, as far as there is room.
    pub(super) fn pump(&mut self, machine: &mut Machine, subscriptions: &Subscriptions) {
        self.send_waiting(machine, subscriptions);
        for _ in 0..OUTBOX_EVENTS_MAX {
            if !machine.has_room() || self.waiting.len() >= WAITING_MAX {
                return;
            }
            let event = self.taken.pop_front();
            let Some(event) = event.or_else(|| self.events.try_recv().ok()) else {
                return;
            };
            match event {
                ToClient::TwinResponse(response) => {
                    let (status, id) = (response.status, &response.request_id);
                    let topic = topic::twin_response(status, id, response.version);
                    self.inform(topic, &response.body, machine, subscriptions);
                }
                ToClient::Desired { version, patch } => {
                    self.inform(topic::desired(version), &patch, machine, subscriptions);
                }
                ToClient::Method {
                    request_id,
                    name,
                    payload,
                } => {
                    let topic = topic::method_request(&name, &request_id);
                    self.inform(topic, &payload, machine, subscriptions);
                }
                ToClient::CloudToDevice(deliveries) => {
                    self.enqueue(Kind::CloudToDevice, deliveries);
                    self.send_waiting(machine, subscriptions);
                }
                ToClient::Inputs(deliveries) => {
                    self.enqueue(Kind::Input, deliveries);
                    self.send_waiting(machine, subscriptions);
                }
            }
        }
    }

    /// The client has a delivery.
    pub(super) fn acknowledged(&mut self, token: DeliveryToken) {
        self.settled.push((token, Settlement::Done));
    }

    /// The output was taken to be written.
    pub(super) fn output_taken(&mut self) {
        self.writing.append(&mut self.encoded);
    }

    /// The output that was taken is written: deliveries of QoS 0 are done.
    pub(super) fn output_written(&mut self) {
        let done = |token| (token, Settlement::Done);
        self.settled.extend(self.writing.drain(..).map(done));
    }

    /// What became of deliveries since the last call.
    pub(super) fn take_settled(&mut self) -> Vec<(DeliveryToken, Settlement)> {
        std::mem::take(&mut self.settled)
    }

    /// Settles every delivery that has come for an input that was refused: to be called, and its
    /// outcome reported, before the hub is told of subscriptions. What comes after that is judged
    /// by the subscriptions of then.
    pub(super) fn settle_refused(&mut self) {
        if self.refused.is_empty() {
            return;
        }
        for _ in 0..OUTBOX_EVENTS_MAX {
            let Ok(event) = self.events.try_recv() else {
                break;
            };
            self.taken.push_back(event);
        }
        let Self {
            taken,
            waiting,
            refused,
            settled,
            ..
        } = self;
        let mut stays = |delivery: &Delivery| {
            let is_refused = is_refused(refused, delivery);
            if is_refused {
                settled.push((delivery.token, Settlement::NotSubscribed));
            }
            !is_refused
        };
        waiting.retain(|(_, delivery)| stays(delivery));
        for event in taken {
            if let ToClient::Inputs(deliveries) | ToClient::CloudToDevice(deliveries) = event {
                deliveries.retain(&mut stays);
            }
        }
        refused.clear();
    }

    fn enqueue(&mut self, kind: Kind, deliveries: Vec<Delivery>) {
        let deliveries = deliveries.into_iter().map(|delivery| (kind, delivery));
        self.waiting.extend(deliveries);
    }

    /// Sends what nobody acknowledges, if the client is subscribed to it.
    fn inform(
        &self,
        topic: String,
        payload: &[u8],
        machine: &mut Machine,
        subscriptions: &Subscriptions,
    ) {
        let identity = &self.identity;
        if subscriptions.granted(&topic).is_none() {
            tracing::debug!("{identity} is not subscribed to {topic}: nothing is sent");
            return;
        }
        if machine.publish(topic, payload) == Sent::TooLarge {
            let bytes = payload.len();
            tracing::warn!("A message of {bytes} bytes is too large for {identity}: not sent");
        }
    }

    fn send_waiting(&mut self, machine: &mut Machine, subscriptions: &Subscriptions) {
        let mut held = SmallVec::<[u16; 4]>::new();
        let mut at = 0;
        while machine.has_room() {
            let Some((kind, delivery)) = self.waiting.get(at) else {
                return;
            };
            let token = delivery.token;
            if held.contains(&token.stream) {
                at += 1;
                continue;
            }
            let verdict = if is_refused(&self.refused, delivery) {
                Verdict::NotSubscribed
            } else {
                self.send(*kind, delivery, machine, subscriptions)
            };
            let settlement = match verdict {
                Verdict::Waits => {
                    held.push(token.stream);
                    at += 1;
                    continue;
                }
                Verdict::OnItsWay => None,
                Verdict::Encoded => {
                    self.encoded.push(token);
                    None
                }
                Verdict::NotSubscribed => {
                    if !is_refused(&self.refused, delivery) {
                        let input = Arc::clone(&delivery.input);
                        self.refused.push((token.stream, input));
                    }
                    Some(Settlement::NotSubscribed)
                }
                Verdict::Undeliverable(why) => {
                    self.log_undeliverable(why);
                    Some(Settlement::Undeliverable)
                }
            };
            self.waiting.remove(at);
            self.settled
                .extend(settlement.map(|outcome| (token, outcome)));
        }
    }

    fn send(
        &self,
        kind: Kind,
        delivery: &Delivery,
        machine: &mut Machine,
        subscriptions: &Subscriptions,
    ) -> Verdict {
        let Delivery {
            token,
            input,
            redelivered,
            sender,
            message,
        } = delivery;
        let target = &self.identity;
        let topic = match kind {
            Kind::CloudToDevice => {
                let bag = bag::encode_cloud_to_device(message, target);
                Some(topic::cloud_to_device(target, &bag))
            }
            Kind::Input => topic::input(target, input, &bag::encode_input(message, sender)),
        };
        let Some(topic) = topic.filter(|topic| topic.len() <= MQTT_TOPIC_BYTES_MAX) else {
            return Verdict::Undeliverable("its properties do not fit into a topic");
        };
        let Some(granted) = subscriptions.granted(&topic) else {
            return Verdict::NotSubscribed;
        };
        let (sent, then) = if granted == QoS::AtMostOnce || wants_qos_0(message) {
            (machine.publish(topic, &message.body), Verdict::Encoded)
        } else {
            let sent = machine.deliver(*token, *redelivered, topic, &message.body);
            (sent, Verdict::OnItsWay)
        };
        match sent {
            Sent::Written => then,
            Sent::Repeated => Verdict::OnItsWay,
            Sent::Waits => Verdict::Waits,
            Sent::TooLarge => Verdict::Undeliverable("it is too large for a packet"),
        }
    }

    fn log_undeliverable(&mut self, why: &str) {
        if !std::mem::replace(&mut self.logged, true) {
            tracing::warn!("A message cannot be delivered to {}: {why}", self.identity);
        }
    }
}

/// What became of an attempt to send a delivery.
enum Verdict {
    /// Later.
    Waits,
    /// The client will acknowledge it.
    OnItsWay,
    /// It is done when it is written.
    Encoded,
    NotSubscribed,
    /// Never over MQTT, and why.
    Undeliverable(&'static str),
}

fn is_refused(refused: &[(u16, Arc<str>)], delivery: &Delivery) -> bool {
    refused
        .iter()
        .any(|(stream, input)| *stream == delivery.token.stream && *input == delivery.input)
}

/// Whether the sender asks for QoS 0. Of two properties with names that differ in case only the
/// first counts.
fn wants_qos_0(message: &Message) -> bool {
    let mut properties = message.properties.iter();
    properties
        .find(|property| property.key.eq_ignore_ascii_case(QOS_PROPERTY))
        .is_some_and(|property| property.value.as_deref() == Some("0"))
}
