//! One connection: what its links are, and what happens on them. No socket.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use edgehub_amqp::connection::{
    CloseCause, Config, Connection as Engine, Event, Incoming, LinkId, Outgoing, SaslPlain, Sent,
};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use edgehub_amqp::sasl::SaslCode;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::error::{self, DETACH_FORCED, INTERNAL, RESOURCE_LIMIT, STOLEN, UNAUTHORIZED};
use super::events::Reader;
use super::presence::Presence;
use super::tokens::{Token, Tokens};
use crate::authorize::{self, Signer};
use crate::c2d::LockToken;
use crate::clock::utc_text;
use crate::connections::{Connection, Ending};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::ledger::{LedgerError, Stamps};
use crate::limits::{ANSWERS_MAX, IDLE_ADVERTISED};

/// What a link is for.
pub(super) enum Role {
    CbsRequests,
    CbsResponses,
    /// Of a device, to it.
    DeviceBound,
    Events(Reader),
    Feedback,
    Inputs,
    ManagementRequests,
    /// Under the client's own address.
    ManagementResponses(Option<String>),
    MethodRequests,
    MethodResponses,
    /// Of the service: messages to devices.
    ServiceSender,
    /// Nothing ever comes: notifications of uploaded files.
    Silent,
    Telemetry(Stamps),
    /// Each with the id that pairs the two.
    TwinRequests(String),
    TwinResponses(String),
}

/// An attached link.
pub(super) struct Link {
    pub(super) role: Role,
    /// Of a device's link.
    pub(super) identity: Option<Identity>,
    /// Whose token admitted it.
    pub(super) signer: Option<Signer>,
    /// Messages that wait to be sent, settled.
    pub(super) answers: VecDeque<Bytes>,
    last_tag: u32,
    /// Deliveries under a lock, until their receiver settles them.
    pub(super) locked: HashMap<Sent, LockToken>,
    /// The receiver wants its credit used up.
    drains: bool,
}

impl Link {
    pub(super) fn new(role: Role, identity: Option<Identity>, signer: Option<Signer>) -> Self {
        Self {
            role,
            identity,
            signer,
            answers: VecDeque::new(),
            last_tag: 0,
            locked: HashMap::new(),
            drains: false,
        }
    }

    /// The tag of the next settled delivery.
    pub(super) fn next_tag(&mut self) -> [u8; 4] {
        self.last_tag = self.last_tag.wrapping_add(1);
        self.last_tag.to_be_bytes()
    }
}

/// A connection's state.
pub(super) struct Client<'a> {
    pub(super) hub: &'a Hub,
    /// Its entry among the connections, which carries those of its identities.
    pub(super) socket: &'a Connection,
    pub(super) wake: Arc<Notify>,
    pub(super) engine: Engine,
    pub(super) tokens: Tokens,
    pub(super) links: HashMap<LinkId, Link>,
    pub(super) presences: HashMap<Identity, Presence<'a>>,
    /// Links that may have something to send.
    pub(super) stirred: BTreeSet<LinkId>,
    /// Identities with telemetry of this turn.
    pub(super) with_telemetry: Vec<Identity>,
    pub(super) now_ms: u64,
    pub(super) now_utc: String,
    /// Links with [`Role::Events`].
    pub(super) readers: usize,
    /// Links with [`Role::Feedback`].
    pub(super) feedbacks: usize,
    /// Set once nothing more will come.
    pub(super) closed: Option<CloseCause>,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub, socket: &'a Connection, wake: Arc<Notify>) -> Self {
        let mut config = Config::new(format!("iothub-{}", socket.id()));
        config.hostname = Some(hub.hostname.clone());
        // IoT Hub's, and twice as long before it gives up (spec/upstream.md B5).
        config.idle_advertised = IDLE_ADVERTISED;
        config.idle_enforced = 2 * IDLE_ADVERTISED;
        Self {
            hub,
            socket,
            wake,
            engine: Engine::new(config, Instant::now()),
            tokens: Tokens::default(),
            links: HashMap::new(),
            presences: HashMap::new(),
            stirred: BTreeSet::new(),
            with_telemetry: Vec::new(),
            now_ms: 0,
            now_utc: String::new(),
            readers: 0,
            feedbacks: 0,
            closed: None,
        }
    }

    /// Handles what has happened, stores, settles and sends. `input` is what was read.
    pub(super) fn turn(&mut self, input: &mut BytesMut, now: Instant) {
        self.now_ms = self.hub.clock.now_ms();
        self.now_utc = utc_text(self.now_ms);
        loop {
            let mut authenticated = false;
            while let Some(event) = self.engine.poll() {
                authenticated |= matches!(event, Event::SaslPlain(_) | Event::SaslExternal);
                self.handle(event);
            }
            // What follows SASL waits in the input.
            if !authenticated || input.is_empty() {
                break;
            }
            self.engine.receive(input, now);
        }
        self.store_telemetry();
        for link in std::mem::take(&mut self.stirred) {
            self.pump(link);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::SaslPlain(plain) => self.sasl_plain(&plain),
            // Certificates are not asked for.
            Event::SaslExternal => self.engine.sasl_outcome(SaslCode::Auth),
            Event::Opened(opened) => {
                let (container, host) = (opened.container_id, opened.hostname);
                info!(
                    connection = self.socket.id(),
                    container, host, "amqp opened"
                );
            }
            Event::Attached { link, attach } => self.attached(link, &attach),
            Event::Delivery(incoming) => self.delivery(&incoming),
            Event::Credit { link, drain, .. } => {
                if let Some(known) = self.links.get_mut(&link) {
                    known.drains = drain;
                    self.stirred.insert(link);
                }
            }
            Event::Settled {
                link,
                sent,
                outcome,
                settled,
            } => self.settled(link, sent, outcome.as_ref(), settled),
            Event::Detached { link, .. } => {
                // Telemetry that came settled just before counts.
                self.store_telemetry();
                self.forget(link);
            }
            Event::Closed(cause) => self.closed = Some(cause),
            _ => {}
        }
    }

    fn delivery(&mut self, incoming: &Incoming) {
        let id = incoming.link;
        let Some(link) = self.links.get(&id) else {
            return;
        };
        match &link.role {
            Role::CbsRequests => self.put_token(incoming),
            Role::ManagementRequests => self.management(incoming),
            Role::MethodResponses => self.method_answer(incoming),
            Role::ServiceSender => self.service_message(incoming),
            Role::Telemetry(_) => self.telemetry(incoming),
            Role::TwinRequests(_) => self.twin_request(incoming),
            // The engine takes nothing on links that it sends on.
            _ => {}
        }
    }

    fn settled(&mut self, id: LinkId, sent: Sent, outcome: Option<&Outcome>, settled: bool) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        if let Some(token) = link.locked.remove(&sent) {
            match link.role {
                Role::DeviceBound => self.c2d_settled(id, token, outcome),
                Role::Feedback => self.feedback_settled(token, outcome),
                _ => {}
            }
        }
        if !settled {
            self.engine.settle_sent(id, sent);
        }
    }

    /// SASL PLAIN: `{device}[/modules/{module}]@sas.{hub}` or `{policy}@sas.root.{hub}`, with a
    /// token for a password (spec/amqp.md 1.4).
    fn sasl_plain(&mut self, plain: &SaslPlain) {
        let verified = self.verify_plain(&plain.authcid, plain.password.expose());
        let code = if verified.is_some() {
            SaslCode::Ok
        } else {
            info!(user = plain.authcid, "sasl plain refused");
            SaslCode::Auth
        };
        self.engine.sasl_outcome(code);
    }

    fn verify_plain(&mut self, user: &str, password: &str) -> Option<()> {
        let (name, host) = user.split_once('@')?;
        let label = self.hub.hostname.split('.').next().unwrap_or_default();
        let (signer, expires_ms) = authorize::token(self.hub, password).ok()?;
        let host = host.strip_prefix("sas.").unwrap_or(host);
        let (fits, hub) = match (host.strip_prefix("root."), &signer) {
            (Some(hub), Signer::Policy(policy)) => (policy == name, hub),
            (None, Signer::Identity(identity)) => {
                let wanted = match &identity.module {
                    None => identity.device.clone(),
                    Some(module) => format!("{}/modules/{module}", identity.device),
                };
                (wanted == name, host)
            }
            _ => return None,
        };
        if !fits || !(hub.eq_ignore_ascii_case(label) || hub == self.hub.hostname) {
            return None;
        }
        let text = password.to_owned();
        self.tokens
            .put(user, signer, Token { text, expires_ms })
            .ok()
    }

    /// Writes the telemetry of this turn and accepts its deliveries.
    fn store_telemetry(&mut self) {
        for identity in std::mem::take(&mut self.with_telemetry) {
            let Some(presence) = self.presences.get_mut(&identity) else {
                continue;
            };
            let batch = std::mem::take(&mut presence.batch);
            let received = std::mem::take(&mut presence.received);
            let fence = Some(presence.member.fence());
            let outcome = match self.hub.ledger.append(&batch, &self.now_utc, fence) {
                Ok(()) => Outcome::Accepted,
                // Its links are about to be detached.
                Err(LedgerError::Fenced) => continue,
                Err(error) => {
                    warn!(client = %identity, %error, "telemetry not stored");
                    Outcome::Rejected(Some(ErrorInfo::new(INTERNAL, "the message is not stored")))
                }
            };
            for received in received {
                self.engine.settle(received, outcome.clone());
            }
        }
    }

    /// Queues a message for a link.
    pub(super) fn answer(&mut self, id: LinkId, message: Bytes) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        if link.answers.len() >= ANSWERS_MAX {
            let error = ErrorInfo::new(RESOURCE_LIMIT, "answers are not read");
            self.detach(id, Some(&error));
            return;
        }
        link.answers.push_back(message);
        self.stirred.insert(id);
    }

    /// Sends what a link has, as far as its credit goes; what does not go now is tried again with
    /// the next turn.
    fn pump(&mut self, id: LinkId) {
        let more = self.pump_answers(id) || self.pump_role(id);
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        if more {
            self.stirred.insert(id);
        } else if std::mem::take(&mut link.drains) {
            self.engine.drained(id);
        }
    }

    /// Whether something waits that could not be sent.
    fn pump_answers(&mut self, id: LinkId) -> bool {
        let Some(link) = self.links.get_mut(&id) else {
            return false;
        };
        while let Some(message) = link.answers.front() {
            if !self.engine.can_send(id) {
                return true;
            }
            let payload = message.clone();
            let delivery = Outgoing {
                tag: &link.next_tag(),
                message_format: 0,
                settled: true,
                payload,
            };
            if let Err(error) = self.engine.send(id, delivery) {
                warn!(connection = self.socket.id(), %error, "message dropped");
            }
            link.answers.pop_front();
        }
        false
    }

    fn pump_role(&mut self, id: LinkId) -> bool {
        let Some(link) = self.links.get(&id) else {
            return false;
        };
        match &link.role {
            Role::DeviceBound => self.pump_c2d(id),
            Role::Events(_) => self.pump_events(id),
            Role::Feedback => self.pump_feedback(id),
            Role::MethodRequests | Role::TwinResponses(_) => self.pump_pushes(id),
            _ => false,
        }
    }

    /// Sends one message; none when it can not be sent now.
    pub(super) fn send(
        &mut self,
        id: LinkId,
        tag: &[u8],
        settled: bool,
        payload: Bytes,
    ) -> Option<Sent> {
        let delivery = Outgoing {
            tag,
            message_format: 0,
            settled,
            payload,
        };
        let sent = self.engine.send(id, delivery);
        sent.inspect_err(|error| warn!(connection = self.socket.id(), %error, "not sent"))
            .ok()
    }

    /// Somebody has something for an identity of this connection, or has ended it.
    pub(super) fn woken(&mut self) {
        let mut ended = Vec::new();
        for (identity, presence) in &self.presences {
            if presence.member.fence().is_closed() || presence.outbox.is_overflowed() {
                ended.push(identity.clone());
            } else if presence.outbox.is_woken() {
                let links = presence.links.iter();
                self.stirred.extend(links.filter(|id| {
                    let role = self.links.get(id).map(|link| &link.role);
                    matches!(
                        role,
                        Some(Role::DeviceBound | Role::MethodRequests | Role::TwinResponses(_))
                    )
                }));
            }
        }
        for identity in ended {
            let error = self.reason(&identity);
            self.end(&identity, &error);
        }
        // Taken once, whatever links there are: what nobody wants is dropped.
        for presence in self.presences.values_mut() {
            if presence.outbox.is_woken() {
                presence.take_pushes();
            }
        }
    }

    /// What the links of an identity are detached with.
    fn reason(&self, identity: &Identity) -> ErrorInfo {
        let presence = self.presences.get(identity);
        match presence.and_then(|presence| presence.member.ending()) {
            Some(Ending::Replaced) => ErrorInfo::new(STOLEN, "a newer connection has the identity"),
            Some(Ending::NotAdmitted) => {
                let admitted = presence.map(|presence| self.hub.admits(&presence.claim));
                match admitted {
                    Some(Err(refusal)) => error::refused(&refusal),
                    _ => ErrorInfo::new(UNAUTHORIZED, "the registry has changed"),
                }
            }
            Some(Ending::Killed) => ErrorInfo::new(DETACH_FORCED, "ended by the control API"),
            None => ErrorInfo::new(RESOURCE_LIMIT, "the client does not read what it is sent"),
        }
    }

    /// Ends an identity of this connection; the others stay.
    pub(super) fn end(&mut self, identity: &Identity, error: &ErrorInfo) {
        let Some(presence) = self.presences.remove(identity) else {
            return;
        };
        info!(
            connection = self.socket.id(), client = %identity, reason = %error.condition,
            "links detached"
        );
        for id in &presence.links {
            self.engine.detach(*id, Some(error));
            self.links.remove(id);
        }
    }

    /// Lets tokens run out.
    pub(super) fn expire(&mut self) {
        let gone: HashSet<Signer> = self
            .tokens
            .expire(self.hub.clock.now_ms())
            .into_iter()
            .collect();
        if gone.is_empty() {
            return;
        }
        let error = ErrorInfo::new(UNAUTHORIZED, "the token has expired");
        let presences = self.presences.iter();
        let presences = presences.filter(|(_, presence)| gone.contains(&presence.signer));
        let identities: Vec<Identity> = presences.map(|(identity, _)| identity.clone()).collect();
        for identity in identities {
            self.end(&identity, &error);
        }
        let links = self.links.iter();
        let links = links.filter(|(_, link)| {
            let signer = link.signer.as_ref();
            link.identity.is_none() && signer.is_some_and(|signer| gone.contains(signer))
        });
        let links: Vec<LinkId> = links.map(|(id, _)| *id).collect();
        for id in links {
            self.detach(id, Some(&error));
        }
    }

    /// Detaches a link.
    pub(super) fn detach(&mut self, id: LinkId, error: Option<&ErrorInfo>) {
        self.engine.detach(id, error);
        self.forget(id);
    }

    /// A link is gone; with its last link, so is an identity.
    fn forget(&mut self, id: LinkId) {
        let Some(link) = self.links.remove(&id) else {
            return;
        };
        match link.role {
            Role::Events(_) => self.readers -= 1,
            Role::Feedback => self.feedbacks -= 1,
            _ => {}
        }
        let Some(identity) = link.identity else {
            return;
        };
        self.unsubscribe(&identity, &link.role);
        let Some(presence) = self.presences.get_mut(&identity) else {
            return;
        };
        presence.links.retain(|known| *known != id);
        if presence.links.is_empty() {
            info!(connection = self.socket.id(), client = %identity, "last link detached");
            self.presences.remove(&identity);
        }
    }

    /// The links with this kind of role.
    pub(super) fn stir_all(&mut self, is_one: impl Fn(&Role) -> bool) {
        let links = self.links.iter().filter(|(_, link)| is_one(&link.role));
        self.stirred.extend(links.map(|(id, _)| *id));
    }
}
