//! Links and tokens: who may attach what (spec/upstream.md B3, B5, B8).

use std::sync::Arc;

use edgehub_amqp::cbs::{PutToken, cbs_response};
use edgehub_amqp::connection::{Attach, Incoming, LinkId, LinkTerms};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use tracing::info;

use super::address::{self, Address, Node, ServiceNode};
use super::client::{Client, Link, Role};
use super::error::{self, ARGUMENT, NOT_ALLOWED, NOT_FOUND, STOLEN, UNAUTHORIZED};
use super::presence::Presence;
use super::tokens::Token;
use crate::api_version::is_api_version;
use crate::authorize::{self, Claim, Permission, Refusal, Signer};
use crate::counters::Counter;
use crate::faults::{FaultAnswer, FaultKind};
use crate::identity::{AuthChain, Identity};
use crate::limits::{AMQP_MESSAGE_BYTES_MAX, LINK_CREDIT};
use crate::sessions::{Feature, Outbox};

const API_VERSION: &str = "com.microsoft:api-version";
const AUTH_CHAIN: &str = "com.microsoft:auth-chain";
const CLIENT_VERSION: &str = "com.microsoft:client-version";
const CORRELATION: &str = "com.microsoft:channel-correlation-id";
const MODEL_ID: &str = "com.microsoft:model-id";

/// The two names that a put-token's type may have (spec/upstream.md A3.4).
const TOKEN_TYPES: [&str; 2] = [
    "azure-devices.net:sastoken",
    "servicebus.windows.net:sastoken",
];

impl Client<'_> {
    /// Accepts a link, or refuses it with what is wrong.
    pub(super) fn attached(&mut self, id: LinkId, attach: &Attach) {
        let address = attach.address().unwrap_or_default();
        let parsed = match attach.is_coordinator() || attach.is_dynamic() {
            true => None,
            false => Address::parse(address, &self.hub.event_hub()),
        };
        let who = match &parsed {
            Some(Address::Device(identity, _)) => Some(identity),
            _ => None,
        };
        match who.filter(|who| self.hub.devices().contains(who)) {
            Some(who) => self.hub.counters.add(who, Counter::AmqpAttaches),
            None => self.hub.counters.add_other(Counter::AmqpAttaches),
        }
        let ordered = match &parsed {
            Some(Address::Device(who, _)) => self.hub.faults.take(FaultKind::Attach, Some(who)),
            _ => None,
        };
        if let Some(failure) = ordered {
            let error = error::ordered(&failure);
            match failure.answer {
                FaultAnswer::Silence => {}
                FaultAnswer::Close => self.engine.close(Some(error)),
                _ => self.engine.refuse(id, &error),
            }
            return;
        }
        let opened = match parsed {
            None => Err(ErrorInfo::new(NOT_FOUND, "the hub has no such address")),
            Some(Address::Cbs) if attach.peer_sends() => {
                Ok(Link::new(Role::CbsRequests, None, None))
            }
            Some(Address::Cbs) => Ok(Link::new(Role::CbsResponses, None, None)),
            Some(Address::Device(identity, node)) => self.device_link(id, attach, identity, node),
            Some(Address::Service(node)) => self.service_link(attach, address, &node),
        };
        match opened {
            Ok(link) => {
                match link.role {
                    Role::Events(_) => self.readers += 1,
                    Role::Feedback => self.feedbacks += 1,
                    _ => {}
                }
                self.links.insert(id, link);
                self.engine.accept(
                    id,
                    &LinkTerms {
                        max_message_size: Some(AMQP_MESSAGE_BYTES_MAX),
                        credit: LINK_CREDIT,
                        ..LinkTerms::default()
                    },
                );
                self.subscribe(id);
            }
            Err(error) => {
                let reason = error.description.as_deref().unwrap_or_default();
                let condition = &error.condition;
                info!(
                    connection = self.socket.id(),
                    address, %condition, reason, "attach refused"
                );
                self.engine.refuse(id, &error);
            }
        }
    }

    fn device_link(
        &mut self,
        id: LinkId,
        attach: &Attach,
        identity: Identity,
        node: Node,
    ) -> Result<Link, ErrorInfo> {
        let argument = |text: String| ErrorInfo::new(ARGUMENT, text);
        let version = attach.property(API_VERSION);
        let needs_version = self.hub.mode.is_strict() && matches!(node, Node::Methods | Node::Twin);
        if !version.map_or(!needs_version, is_api_version) {
            return Err(argument(format!("{API_VERSION} is missing or malformed")));
        }
        let chain = attach.property(AUTH_CHAIN).map(AuthChain::parse);
        let chain = chain
            .transpose()
            .map_err(|error| argument(error.to_string()))?;
        let claim = Claim { identity, chain };
        let signer = self
            .authorized(&claim)
            .map_err(|refusal| error::refused(&refusal))?;
        let pair = |kind: &str| {
            let id = attach.property(CORRELATION).unwrap_or_default();
            match id.strip_prefix(kind) {
                Some(pair) => Ok(pair.to_owned()),
                None => Err(argument(format!("{CORRELATION} is not `{kind}` and an id"))),
            }
        };
        let is_module = claim.identity.module.is_some();
        let role = match (node, attach.peer_sends()) {
            (Node::Events, true) => {
                let model_id = attach.property(MODEL_ID).filter(|id| !id.is_empty());
                let by_policy = matches!(signer, Signer::Policy(_));
                let stamps = self.hub.stamps(&claim.identity, model_id, by_policy);
                Role::Telemetry(stamps.map_err(|refusal| error::refused(&refusal))?)
            }
            (Node::Events, false) if is_module => Role::Inputs,
            (Node::DeviceBound, false) if !is_module => Role::DeviceBound,
            (Node::Methods, true) => {
                pair("methods:")?;
                Role::MethodResponses
            }
            (Node::Methods, false) => {
                pair("methods:")?;
                Role::MethodRequests
            }
            (Node::Twin, true) => Role::TwinRequests(pair("twin:")?),
            (Node::Twin, false) => Role::TwinResponses(pair("twin:")?),
            (Node::Events | Node::DeviceBound, _) => {
                let text = "the address has no link of this direction";
                return Err(ErrorInfo::new(NOT_ALLOWED, text));
            }
        };
        let identity = claim.identity.clone();
        self.ensure_presence(claim, &signer)?;
        self.replace(&identity, &role);
        if let Some(presence) = self.presences.get_mut(&identity) {
            presence.links.push(id);
            if let Some(version) = attach.property(CLIENT_VERSION) {
                presence.member.describe(version);
            }
        }
        Ok(Link::new(role, Some(identity), Some(signer)))
    }

    /// Whose token admits a claim, of those that were put on this connection.
    fn authorized(&self, claim: &Claim) -> Result<Signer, Refusal> {
        self.hub.admits(claim)?;
        let signer = Signer::Identity(claim.signer());
        let own = self.tokens.of(&signer).map(|token| (&signer, token));
        // A policy speaks for devices, not for edge devices that act for others.
        let policies = self.tokens.of_policies();
        let policies = policies.filter(|_| claim.actor().is_none());
        let mut refusal = Refusal::NoToken(claim.signer());
        for (signer, token) in own.into_iter().chain(policies) {
            match authorize::connect(self.hub, claim, &token.text) {
                Ok(_) => return Ok(signer.clone()),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    /// Makes this connection the one of the identity, if it is not yet.
    fn ensure_presence(&mut self, claim: Claim, signer: &Signer) -> Result<(), ErrorInfo> {
        let identity = claim.identity.clone();
        if let Some(presence) = self.presences.get_mut(&identity) {
            if !presence.member.fence().is_closed() {
                presence.signer = signer.clone();
                return Ok(());
            }
            // It was ended a moment ago, and the links do not know yet.
            self.woken();
        }
        let wake = self.wake.clone();
        let (member, old) = self.socket.member(&claim, self.now_ms, wake.clone());
        if let Some(old) = old {
            info!(connection = old, client = %identity, "closed: replaced by a newer connection");
        }
        // The registry may have changed since it was asked.
        self.hub
            .admits(&claim)
            .map_err(|refusal| error::refused(&refusal))?;
        let chain = claim
            .chain
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let outbox = Arc::new(Outbox::of_many(wake));
        let opened = Presence::open(self.hub, claim, signer.clone(), member, outbox);
        let presence = opened.map_err(|error| ErrorInfo::new(STOLEN, error.to_string()))?;
        info!(
            connection = presence.member.id(), carrier = self.socket.id(), client = %identity,
            chain, "connected"
        );
        self.presences.insert(identity, presence);
        Ok(())
    }

    /// A link of which an identity has one takes the place of an older one. Telemetry may have
    /// several.
    fn replace(&mut self, identity: &Identity, role: &Role) {
        if matches!(role, Role::Telemetry(_)) {
            return;
        }
        let Some(presence) = self.presences.get(identity) else {
            return;
        };
        let kind = std::mem::discriminant(role);
        let old = presence.links.iter().copied().find(|id| {
            let link = self.links.get(id);
            link.is_some_and(|link| std::mem::discriminant(&link.role) == kind)
        });
        let Some(old) = old else { return };
        self.engine.detach(old, None);
        if let Some(link) = self.links.remove(&old) {
            self.unsubscribe(identity, &link.role);
        }
        if let Some(presence) = self.presences.get_mut(identity) {
            presence.links.retain(|id| *id != old);
        }
    }

    /// What a link stands for is subscribed under the MQTT filter of the same meaning.
    fn subscribe(&mut self, id: LinkId) {
        let Some(link) = self.links.get(&id) else {
            return;
        };
        let (Some(identity), Some(filter)) = (&link.identity, filter(link)) else {
            return;
        };
        if let Some(presence) = self.presences.get(identity) {
            let filters = [(filter.as_str(), mqttbytes::QoS::AtLeastOnce)];
            let actor = presence.member.actor();
            // Fails when the identity is being taken over, and then its links go.
            let _ = self.hub.sessions.subscribe(identity, actor, &filters);
        }
        self.stirred.insert(id);
    }

    /// The end of what a link stands for.
    pub(super) fn unsubscribe(&mut self, identity: &Identity, role: &Role) {
        let filter = match role {
            // Its desired patches go with it.
            Role::TwinResponses(_) => Some(Feature::DESIRED.to_owned()),
            role => filter_of(identity, role),
        };
        let Some(presence) = self.presences.get_mut(identity) else {
            return;
        };
        match role {
            Role::MethodRequests => presence.methods.clear(),
            Role::TwinResponses(_) => presence.desired.clear(),
            _ => {}
        }
        if let Some(filter) = filter {
            let actor = presence.member.actor();
            let _ = self.hub.sessions.unsubscribe(identity, actor, &[filter]);
        }
    }

    fn service_link(
        &mut self,
        attach: &Attach,
        address: &str,
        node: &ServiceNode,
    ) -> Result<Link, ErrorInfo> {
        let mut path = address::segments(address);
        if matches!(node, ServiceNode::Events { .. } | ServiceNode::Management) {
            // Tokens name the event hub, also where the address does not.
            path = path.split_off(path.len().saturating_sub(match node {
                ServiceNode::Management => 1,
                _ => 4,
            }));
            path.insert(0, self.hub.event_hub());
        }
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let mut refusal = None;
        let signer = self.tokens.of_policies().find_map(|(signer, token)| {
            let permission = Permission::ServiceConnect;
            match authorize::service_call(self.hub, permission, &path, &token.text) {
                Ok(()) => Some(signer.clone()),
                Err(error) => {
                    refusal = Some(error);
                    None
                }
            }
        });
        let signer = signer.ok_or_else(|| match refusal {
            Some(refusal) => error::refused(&refusal),
            None => ErrorInfo::new(UNAUTHORIZED, "no token of a policy came before the link"),
        })?;
        let role = match (node, attach.peer_sends()) {
            (ServiceNode::DeviceBound, true) => Role::ServiceSender,
            (ServiceNode::Events { partition }, false) => {
                Role::Events(self.reader(attach, partition)?)
            }
            (ServiceNode::Feedback, false) => Role::Feedback,
            (ServiceNode::FileNotifications, false) => Role::Silent,
            (ServiceNode::Management, true) => Role::ManagementRequests,
            (ServiceNode::Management, false) => {
                Role::ManagementResponses(attach.other_address().map(str::to_owned))
            }
            _ => {
                let text = "the address has no link of this direction";
                return Err(ErrorInfo::new(NOT_ALLOWED, text));
            }
        };
        Ok(Link::new(role, None, Some(signer)))
    }

    /// A put-token request: verified at once, and answered.
    pub(super) fn put_token(&mut self, incoming: &Incoming) {
        let request = PutToken::parse(&incoming.payload);
        let named = request.as_ref().ok();
        let named = named.and_then(|request| address::resource(&request.name));
        let named = named.filter(|named| self.hub.devices().contains(named));
        match &named {
            Some(named) => self.hub.counters.add(named, Counter::AmqpPutTokens),
            None => self.hub.counters.add_other(Counter::AmqpPutTokens),
        }
        let ordered = self.hub.faults.take(FaultKind::PutToken, named.as_ref());
        if let Some(failure) = &ordered {
            match failure.answer {
                FaultAnswer::Silence => return,
                FaultAnswer::Close => {
                    self.engine.close(Some(error::ordered(failure)));
                    return;
                }
                _ => {}
            }
        }
        self.engine.settle(incoming.received, Outcome::Accepted);
        let (id, status, text) = match request {
            Err((id, error)) => (id, 400, error.to_string()),
            Ok(request) => {
                let (status, text) = match ordered {
                    Some(failure) => {
                        let text = "made to fail through the control API".to_owned();
                        (i32::from(failure.code), text)
                    }
                    None => self.take_token(&request),
                };
                (request.message_id, status, text)
            }
        };
        if status != 200 {
            let client = named.map(|named| named.to_string()).unwrap_or_default();
            info!(
                connection = self.socket.id(),
                client, status, text, "put-token refused"
            );
        }
        // The newest receiver of answers gets it.
        let responses = self.links.iter();
        let responses = responses.filter(|(_, link)| matches!(link.role, Role::CbsResponses));
        if let Some(link) = responses.map(|(id, _)| *id).max() {
            self.answer(link, cbs_response(id.as_ref(), status, &text));
        }
    }

    fn take_token(&mut self, request: &PutToken) -> (i32, String) {
        let is_known = |known: &str| known.eq_ignore_ascii_case(&request.token_type);
        if !TOKEN_TYPES.iter().any(|known| is_known(known)) {
            return (400, "the token's type is unknown".to_owned());
        }
        let text = request.token.expose().clone();
        match authorize::token(self.hub, &text) {
            Err(refusal) => (error::token_status(&refusal), refusal.to_string()),
            Ok((signer, expires_ms)) => {
                let token = Token { text, expires_ms };
                match self.tokens.put(&request.name, signer, token) {
                    Ok(()) => (200, "OK".to_owned()),
                    Err(error) => (403, error.to_string()),
                }
            }
        }
    }
}

/// What a link subscribes to by being attached.
fn filter(link: &Link) -> Option<String> {
    filter_of(link.identity.as_ref()?, &link.role)
}

fn filter_of(identity: &Identity, role: &Role) -> Option<String> {
    match role {
        Role::DeviceBound => Some(Feature::device_bound(identity)),
        Role::Inputs => Feature::inputs(identity),
        Role::MethodRequests => Some(Feature::METHODS.to_owned()),
        _ => None,
    }
}
