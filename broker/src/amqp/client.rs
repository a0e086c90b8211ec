//! One identity of a connection: its place in the hub, its links, and what is on its way to it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use edgehub_amqp::connection::{Attach, Connection, LinkId, Outgoing, SendError, Sent};
use edgehub_amqp::message::MessageId;
use edgehub_amqp::performative::Outcome;
use edgehub_auth::authenticator::Claim;
use edgehub_proto::hub::ClientInfo;
use edgehub_proto::identity::Identity;
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;

use super::limits::{TWIN_IDS_MAX, WAITING_MAX};
use super::links::{CLIENT_VERSION, Kind, Links, MODEL_ID};
use super::{message, twin};
use crate::hub::{
    Delivery, DeliveryToken, Features, Hub, OUTBOX_EVENTS_MAX, Registration, Settlement, ToClient,
    TwinResponse, Ways,
};

/// What a client's credential is, so that a renewed one reaches those that live by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// The token of this owner.
    Token(Identity),
    /// What the connection itself was opened with: SASL PLAIN, or a certificate.
    Connection,
}

/// An identity that may speak.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) identity: Identity,
    /// Tells it from an earlier client of the same identity on this connection.
    pub(super) generation: u64,
    pub(super) registration: Registration,
    pub(super) claim: Claim,
    pub(super) proof: Proof,
    /// Unix milliseconds.
    pub(super) expires_at_ms: Option<u64>,
    pub(super) links: Links,
    pub(super) ways: Ways,
    /// Desired properties are not given up.
    wants_desired: bool,
    announced: Option<Features>,
    /// Its events; none while they are waited for elsewhere.
    pub(super) outbox: Option<mpsc::Receiver<ToClient>>,
    informs: VecDeque<Inform>,
    methods: VecDeque<(Arc<str>, Arc<str>, bytes::Bytes)>,
    deliveries: VecDeque<Delivery>,
    sent: HashMap<(LinkId, Sent), DeliveryToken>,
    /// What clients call their twin requests, by our numbers.
    twin_ids: BTreeMap<u64, MessageId>,
    next_twin_id: u64,
    settled: Vec<(DeliveryToken, Settlement)>,
    /// Deliveries were given back: nothing more comes until the hub hears of subscriptions.
    gave_back: bool,
    logged: bool,
    /// Ends the wait of this client's guard.
    _gone: DropGuard,
}

/// What goes out on the link of twin responses.
#[derive(Debug)]
enum Inform {
    Response(MessageId, TwinResponse),
    Desired(u64, bytes::Bytes),
}

/// What a client is made of.
pub(super) struct ClientParts {
    pub(super) generation: u64,
    pub(super) registration: Registration,
    pub(super) gone: DropGuard,
    pub(super) claim: Claim,
    pub(super) proof: Proof,
    pub(super) expires_at_ms: Option<u64>,
    pub(super) outbox: mpsc::Receiver<ToClient>,
}

impl Client {
    pub(super) fn new(hub: &Hub, parts: ClientParts) -> Self {
        let identity = parts.registration.identity().clone();
        Self {
            ways: Ways::new(hub, identity.clone()),
            identity,
            generation: parts.generation,
            registration: parts.registration,
            claim: parts.claim,
            proof: parts.proof,
            expires_at_ms: parts.expires_at_ms,
            links: Links::default(),
            wants_desired: true,
            announced: None,
            outbox: Some(parts.outbox),
            informs: VecDeque::new(),
            methods: VecDeque::new(),
            deliveries: VecDeque::new(),
            sent: HashMap::new(),
            twin_ids: BTreeMap::new(),
            next_twin_id: 0,
            settled: Vec::new(),
            gave_back: false,
            logged: false,
            _gone: parts.gone,
        }
    }

    /// Tells the hub what is subscribed, when that has changed or deliveries were given back.
    pub(super) fn announce(&mut self, hub: &Arc<Hub>) {
        let features = self.links.features(self.wants_desired);
        if self.announced != Some(features) || std::mem::take(&mut self.gave_back) {
            // Deliveries that were given back come before what follows from it.
            self.report(hub);
            self.announced = Some(features);
            hub.subscribed(&self.registration, features);
        }
    }

    /// Tells the hub what became of deliveries.
    pub(super) fn report(&mut self, hub: &Hub) {
        if !self.settled.is_empty() {
            let settled = std::mem::take(&mut self.settled);
            hub.settled(&self.registration, &settled);
        }
    }

    /// A link is new or attached anew.
    pub(super) fn attached(&mut self, kind: Kind, attach: &Attach, hub: &Hub) {
        match kind {
            Kind::TwinResponses => self.wants_desired = true,
            Kind::Telemetry => {
                // SDKs say it here; other links leave it out, which means nothing.
                let text = |key| attach.property(key).map(Arc::from);
                let known = hub.client_info(&self.identity);
                let info = ClientInfo {
                    product_info: text(CLIENT_VERSION).or(known.product_info),
                    model_id: text(MODEL_ID).or(known.model_id),
                };
                hub.describe(&self.identity, info);
                let model_id = hub.client_info(&self.identity).model_id;
                self.ways.set_model_id(model_id);
            }
            _ => {}
        }
    }

    /// A link is gone, or has given way to another: what was sent on it goes back to the hub, and
    /// what waits behind that too, so that it comes again in order.
    pub(super) fn detached(&mut self, link: LinkId) {
        self.links.remove(link);
        let settled = &mut self.settled;
        let before = settled.len();
        self.sent.retain(|(sent_on, _), token| {
            if *sent_on == link {
                settled.push((*token, Settlement::NotSubscribed));
            }
            *sent_on != link
        });
        let unsettled = settled.len() > before;
        if unsettled || self.delivery_link().is_none() {
            while let Some(outbox) = &mut self.outbox
                && let Ok(event) = outbox.try_recv()
            {
                self.take(event);
            }
            self.give_back();
        }
        self.gave_back |= unsettled;
    }

    /// Gives back deliveries that wait.
    fn give_back(&mut self) {
        self.gave_back |= !self.deliveries.is_empty();
        let waiting = self.deliveries.drain(..);
        let given = waiting.map(|delivery| (delivery.token, Settlement::NotSubscribed));
        self.settled.extend(given);
    }

    fn delivery_kind(&self) -> Kind {
        if self.identity.is_module() {
            Kind::Inputs
        } else {
            Kind::CloudToDevice
        }
    }

    fn delivery_link(&self) -> Option<LinkId> {
        self.links.get(self.delivery_kind())
    }

    /// Whether anything waits for credit or room.
    pub(super) fn is_waiting(&self) -> bool {
        !(self.informs.is_empty() && self.methods.is_empty() && self.deliveries.is_empty())
    }

    fn wants_events(&self) -> bool {
        let lengths = [
            self.informs.len(),
            self.methods.len(),
            self.deliveries.len(),
        ];
        lengths.into_iter().all(|length| length < WAITING_MAX)
    }

    /// Takes an event of the hub's.
    pub(super) fn take(&mut self, event: ToClient) {
        match event {
            ToClient::TwinResponse(response) => {
                let number = response.request_id.parse().ok();
                if let Some(id) = number.and_then(|number: u64| self.twin_ids.remove(&number)) {
                    self.informs.push_back(Inform::Response(id, response));
                }
            }
            ToClient::Desired { version, patch } => {
                self.informs.push_back(Inform::Desired(version, patch));
            }
            ToClient::Method {
                request_id,
                name,
                payload,
            } => self.methods.push_back((request_id, name, payload)),
            ToClient::CloudToDevice(deliveries) | ToClient::Inputs(deliveries) => {
                self.deliveries.extend(deliveries);
            }
        }
    }

    /// Sends what there is credit for, and takes more. Whether events should be waited for.
    pub(super) fn pump(&mut self, engine: &mut Connection) -> bool {
        for _ in 0..=OUTBOX_EVENTS_MAX {
            self.send_informs(engine);
            self.send_methods(engine);
            self.send_deliveries(engine);
            if !self.wants_events() {
                return false;
            }
            let Some(outbox) = &mut self.outbox else {
                return false;
            };
            match outbox.try_recv() {
                Ok(event) => self.take(event),
                // A place that was lost is told by the registration.
                Err(_) => return true,
            }
        }
        true
    }

    fn send_informs(&mut self, engine: &mut Connection) {
        let Some(link) = self.links.get(Kind::TwinResponses) else {
            self.informs.clear();
            return;
        };
        while engine.can_send(link)
            && let Some(inform) = self.informs.pop_front()
        {
            let payload = match inform {
                Inform::Response(id, response) => {
                    twin::twin_response(&id, response.status, response.version, &response.body)
                }
                Inform::Desired(version, patch) => twin::desired(version, &patch),
            };
            self.inform(engine, link, payload);
        }
    }

    fn send_methods(&mut self, engine: &mut Connection) {
        let Some(link) = self.links.get(Kind::MethodRequests) else {
            // The call's time runs out, or it finds the next link.
            self.methods.clear();
            return;
        };
        while engine.can_send(link)
            && let Some((request_id, name, payload)) = self.methods.pop_front()
        {
            let payload = twin::method_request(&request_id, &name, &payload);
            self.inform(engine, link, payload);
        }
    }

    /// Sends what nobody settles.
    fn inform(&self, engine: &mut Connection, link: LinkId, payload: bytes::Bytes) {
        let bytes = payload.len();
        let delivery = Outgoing {
            tag: &[0],
            message_format: 0,
            settled: true,
            payload,
        };
        if let Err(error) = engine.send(link, delivery) {
            let identity = &self.identity;
            tracing::warn!("A message of {bytes} bytes was not sent to {identity}: {error}");
        }
    }

    fn send_deliveries(&mut self, engine: &mut Connection) {
        let Some(link) = self.delivery_link() else {
            // Sent before the hub heard that the link is gone.
            self.give_back();
            return;
        };
        while engine.can_send(link)
            && let Some(delivery) = self.deliveries.pop_front()
        {
            let tag = tag(delivery.token);
            let kind = if self.identity.is_module() {
                message::Kind::Input(&delivery.input)
            } else {
                message::Kind::CloudToDevice
            };
            let payload = message::write(
                &delivery.message,
                kind,
                &delivery.sender,
                &self.identity,
                tag,
            );
            let outgoing = Outgoing {
                tag: &tag,
                message_format: 0,
                settled: false,
                payload,
            };
            match engine.send(link, outgoing) {
                Ok(sent) => {
                    self.sent.insert((link, sent), delivery.token);
                }
                Err(SendError::NoCredit) => {
                    self.deliveries.push_front(delivery);
                    return;
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.logged, true) {
                        let identity = &self.identity;
                        tracing::warn!("A message for {identity} cannot be delivered: {error}");
                    }
                    self.settled
                        .push((delivery.token, Settlement::Undeliverable));
                }
            }
        }
    }

    /// The peer said what became of a delivery.
    pub(super) fn disposed(&mut self, link: LinkId, sent: Sent, outcome: Option<&Outcome>) {
        let Some(token) = self.sent.remove(&(link, sent)) else {
            return;
        };
        let settlement = match outcome {
            None | Some(Outcome::Accepted) => Settlement::Done,
            Some(Outcome::Rejected(_)) => Settlement::Rejected,
            Some(Outcome::Released | Outcome::Modified { .. }) => Settlement::Released,
        };
        self.settled.push((token, settlement));
    }

    /// Takes a twin request.
    pub(super) fn twin(&mut self, hub: &Arc<Hub>, payload: &bytes::Bytes) {
        let Some(request) = twin::twin_request(payload) else {
            let identity = &self.identity;
            tracing::debug!("Ignored a message of {identity} that is no twin request");
            return;
        };
        match (request.operation, request.correlation) {
            (twin::Operation::Get, None) => {}
            (twin::Operation::Get, Some(id)) => {
                let request_id = self.twin_id(id);
                hub.twin_get(&self.registration, request_id);
            }
            (twin::Operation::Patch, None) => {
                hub.twin_report(&self.registration, None, request.body);
            }
            (twin::Operation::Patch, Some(id)) => {
                let request_id = self.twin_id(id);
                hub.twin_report(&self.registration, Some(request_id), request.body);
            }
            (operation @ (twin::Operation::Put | twin::Operation::Delete), id) => {
                self.wants_desired = operation == twin::Operation::Put;
                self.announce(hub);
                if let Some(id) = id {
                    self.respond(id, 200);
                }
            }
        }
    }

    /// The hub's name of a request that has this one. When too many are under way the oldest gives
    /// way: its answer may have been lost, which happens when this client does not take its events.
    fn twin_id(&mut self, id: MessageId) -> Arc<str> {
        if self.twin_ids.len() >= TWIN_IDS_MAX
            && let Some((_, oldest)) = self.twin_ids.pop_first()
        {
            self.respond(oldest, 429);
        }
        self.next_twin_id += 1;
        self.twin_ids.insert(self.next_twin_id, id);
        self.next_twin_id.to_string().into()
    }

    fn respond(&mut self, id: MessageId, status: u16) {
        let response = TwinResponse {
            request_id: "".into(),
            status,
            version: None,
            body: bytes::Bytes::new(),
        };
        if self.informs.len() < TWIN_IDS_MAX {
            self.informs.push_back(Inform::Response(id, response));
        }
    }

    /// Takes the answer to a direct method.
    pub(super) fn method_response(&self, hub: &Hub, payload: &bytes::Bytes) {
        let Some(response) = twin::method_response(payload) else {
            let identity = &self.identity;
            tracing::debug!("Ignored a message of {identity} that answers no method");
            return;
        };
        hub.method_response(
            &self.registration,
            &response.request_id,
            response.status,
            response.payload,
        );
    }
}

/// The tag of a delivery: 16 bytes, which C# clients take for a GUID (spec/amqp.md 4.2). Stable
/// while the delivery is not settled.
fn tag(token: DeliveryToken) -> [u8; 16] {
    let mut tag = [0; 16];
    let (stream, number) = tag.split_at_mut(8);
    // Not all zeros for the first message of all: that is .NET's "no GUID".
    let marked = u64::from(token.stream) | 0xED << 56;
    stream.copy_from_slice(&marked.to_be_bytes());
    number.copy_from_slice(&token.number.to_be_bytes());
    tag
}
