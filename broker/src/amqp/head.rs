//! What one connection's links are for: the head behind the engine, without a socket.
//!
//! It owns the engine and the clients of the connection. Whoever drives it moves bytes, runs
//! [`Job`]s and hands their results back, and waits for events of clients.
//!
//! # Identities
//! A connection carries any number of them, and none of them can do more than another would on a
//! connection of its own: what ends one (another connection, a removal, an expired token) detaches
//! its links only. The connection is closed with it when it was the only one, which is what SDKs
//! with one identity expect (spec/amqp.md 11).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use edgehub_amqp::connection::{
    Attach, CloseCause, Config, Connection, Event, Incoming, LinkId, SaslPlain,
};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use edgehub_amqp::sasl::{Mechanism, SaslCode};
use edgehub_auth::authenticator::{AuthnError, Claim, Credential, Principal};
use edgehub_proto::amqp_address;
use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::Identity;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::cbs::{self, Answer, Asked, Cbs};
use super::client::{Client, ClientParts, Proof};
use super::condition;
use super::limits::{CREDENTIAL_MAX, JOBS_WAITING_MAX};
use super::links::{self, Kind, Wanted};
use super::telemetry::Telemetry;
use super::tokens::Tokens;
use crate::hub::{ConnectError, ConnectOptions, Connected, Hub, ToClient};
use crate::telemetry::metrics;

/// Something that takes time.
pub(super) enum Job {
    /// Let an identity in.
    Connect(Claim, Proof, ConnectOptions),
    /// Judge a token that was put.
    Judge(cbs::Request, String, Claim),
    /// Judge SASL PLAIN.
    Plain(Claim),
}

/// What came of a [`Job`].
pub(super) enum Done {
    /// An identity is let in, or not.
    Connect(Claim, Proof, Result<Connected, ConnectError>),
    /// A token holds, or not.
    Judge(cbs::Request, String, Result<Principal, AuthnError>),
    /// SASL PLAIN is right, or not.
    Plain(Claim, Result<Principal, AuthnError>),
}

/// A client whose events must be waited for.
pub(super) struct Watch {
    pub(super) identity: Identity,
    pub(super) generation: u64,
    pub(super) outbox: mpsc::Receiver<ToClient>,
}

/// A client that is new: when this fires it must go.
pub(super) struct Guard {
    pub(super) identity: Identity,
    pub(super) generation: u64,
    pub(super) closed: CancellationToken,
}

/// A link that waits until its identity is let in.
#[derive(Debug)]
struct Waiting {
    link: LinkId,
    kind: Kind,
    attach: Attach,
}

/// One connection's head.
pub(super) struct Head {
    pub(super) engine: Connection,
    hub: Arc<Hub>,
    /// The peer's, from TLS.
    certificate: Option<Vec<u8>>,
    /// Who the connection itself belongs to, by SASL PLAIN.
    plain: Option<(Claim, Option<u64>)>,
    tokens: Tokens,
    cbs: Cbs,
    clients: HashMap<Identity, Client>,
    owners: HashMap<LinkId, (Option<Identity>, Kind)>,
    /// Links of the node of tokens on which requests come.
    cbs_requests: BTreeSet<LinkId>,
    asked: HashMap<Identity, Vec<Waiting>>,
    pub(super) telemetry: Telemetry,
    jobs: VecDeque<Job>,
    jobs_running: usize,
    watches: Vec<Watch>,
    guards: Vec<Guard>,
    /// Clients that may have something to send.
    stirred: BTreeSet<Identity>,
    generation: u64,
    began_ms: u64,
    closed: Option<CloseCause>,
}

impl Head {
    pub(super) fn new(hub: Arc<Hub>, certificate: Option<Vec<u8>>) -> Self {
        let mut config = Config::new(format!("DeviceGateway_{:032x}", rand::random::<u128>()));
        config.hostname = Some("localhost".to_owned());
        let now = hub.clock().instant();
        Self {
            engine: Connection::new(config, now),
            certificate,
            plain: None,
            tokens: Tokens::default(),
            cbs: Cbs::default(),
            clients: HashMap::new(),
            owners: HashMap::new(),
            cbs_requests: BTreeSet::new(),
            asked: HashMap::new(),
            telemetry: Telemetry::new(Arc::clone(&hub)),
            jobs: VecDeque::new(),
            jobs_running: 0,
            watches: Vec::new(),
            guards: Vec::new(),
            stirred: BTreeSet::new(),
            generation: 0,
            began_ms: hub.clock().unix_ms(),
            closed: None,
            hub,
        }
    }

    /// Whether more bytes may be read.
    pub(super) fn wants_input(&self) -> bool {
        self.engine.wants_input()
            && self.telemetry.has_room()
            && self.jobs.len() + self.jobs_running < JOBS_WAITING_MAX
    }

    /// The next job, if there is one.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        let job = self.jobs.pop_front()?;
        self.jobs_running += 1;
        Some(job)
    }

    /// Clients whose events must be waited for from now on.
    pub(super) fn take_watches(&mut self) -> Vec<Watch> {
        std::mem::take(&mut self.watches)
    }

    /// Clients that are new.
    pub(super) fn take_guards(&mut self) -> Vec<Guard> {
        std::mem::take(&mut self.guards)
    }

    /// Why the connection is over, once it is.
    pub(super) fn closed(&self) -> Option<&CloseCause> {
        self.closed.as_ref()
    }

    /// Whether the peer has presented something that counts: it is no stranger any more.
    pub(super) fn is_known(&self) -> bool {
        !self.clients.is_empty()
            || self.plain.is_some()
            || self.tokens.any(self.hub.clock().unix_ms())
    }

    /// Works off what the engine has to say, and sends what can be sent.
    pub(super) fn turn(&mut self) {
        let now_ms = self.hub.clock().unix_ms();
        while let Some(event) = self.engine.poll() {
            self.event(event, now_ms);
        }
        self.cbs.pump(&mut self.engine);
        self.pump();
    }

    /// Lets clients send; those that still have something stay among the stirred.
    fn pump(&mut self) {
        let stirred = std::mem::take(&mut self.stirred);
        for identity in stirred {
            let Some(client) = self.clients.get_mut(&identity) else {
                continue;
            };
            let watch = client.pump(&mut self.engine);
            client.report(&self.hub);
            if client.is_waiting() {
                self.stirred.insert(identity.clone());
            }
            if watch && let Some(outbox) = client.outbox.take() {
                self.watches.push(Watch {
                    generation: client.generation,
                    identity,
                    outbox,
                });
            }
        }
    }

    fn event(&mut self, event: Event, now_ms: u64) {
        match event {
            Event::SaslPlain(plain) => self.sasl_plain(&plain),
            Event::SaslExternal => {
                let code = if self.certificate.is_some() {
                    SaslCode::Ok
                } else {
                    SaslCode::Auth
                };
                self.engine.sasl_outcome(code);
            }
            Event::Opened(opened) => {
                let sasl = opened.sasl.map_or("no SASL", Mechanism::name);
                let container = condition::excerpt(&opened.container_id);
                tracing::debug!("An AMQP connection of container {container:?} opened, {sasl}");
            }
            Event::Attached { link, attach } => self.attached(link, attach),
            Event::Delivery(incoming) => self.delivered(&incoming, now_ms),
            Event::Credit { link, drain, .. } => self.credit(link, drain),
            Event::Settled {
                link,
                sent,
                outcome,
                settled,
            } => {
                if let Some(client) = self.client_of(link) {
                    client.disposed(link, sent, outcome.as_ref());
                    let identity = client.identity.clone();
                    self.stirred.insert(identity);
                }
                if !settled {
                    self.engine.settle_sent(link, sent);
                }
            }
            Event::Detached { link, error } => self.detached(link, error.as_ref()),
            Event::Closed(cause) => self.closed = Some(cause),
            // The engine may learn more; nothing else concerns links.
            _ => {}
        }
    }

    fn client_of(&mut self, link: LinkId) -> Option<&mut Client> {
        let (identity, _) = self.owners.get(&link)?;
        self.clients.get_mut(identity.as_ref()?)
    }

    fn credit(&mut self, link: LinkId, drain: bool) {
        match self.owners.get(&link) {
            Some((Some(identity), _)) => {
                let identity = identity.clone();
                self.stirred.insert(identity);
            }
            _ => self.cbs.pump(&mut self.engine),
        }
        if drain {
            // What waits is sent first.
            self.pump();
            self.engine.drained(link);
        }
    }

    // Links.

    fn attached(&mut self, link: LinkId, attach: Attach) {
        match links::wanted(&attach) {
            Err(error) => self.refuse(link, &attach, None, &error),
            Ok(Wanted::Cbs) if self.plain.is_some() => {
                let text = "this connection was authenticated by SASL";
                let error = condition::error(condition::NOT_ALLOWED, text);
                self.refuse(link, &attach, None, &error);
            }
            Ok(Wanted::Cbs) => {
                self.engine.accept(link, &links::cbs_terms(&attach));
                if attach.peer_sends() {
                    self.cbs_requests.insert(link);
                } else {
                    self.cbs.attached(link, attach.other_address());
                }
            }
            Ok(Wanted::Identity(identity, kind)) => self.wanted(link, attach, identity, kind),
        }
    }

    /// A link of an identity, which may have to be let in first.
    fn wanted(&mut self, link: LinkId, attach: Attach, identity: Identity, kind: Kind) {
        if let Some(client) = self.clients.get(&identity) {
            if client.registration.is_live() {
                return self.open(&identity, link, kind, &attach);
            }
            // Its place is taken already; the guard's word is on its way.
            self.drop_client(&identity, &stolen());
        }
        let waiting = Waiting { link, kind, attach };
        if let Some(others) = self.asked.get_mut(&identity) {
            others.push(waiting);
            return;
        }
        match self.claim(&identity, &waiting.attach) {
            Ok((claim, proof)) => {
                self.asked.insert(identity, vec![waiting]);
                let options = ConnectOptions {
                    info: None,
                    clean_session: false,
                };
                self.jobs.push_back(Job::Connect(claim, proof, options));
            }
            Err(error) => self.refuse(link, &waiting.attach, Some(&identity), &error),
        }
    }

    /// By what the identity can be let in.
    fn claim(&self, identity: &Identity, attach: &Attach) -> Result<(Claim, Proof), ErrorInfo> {
        if let Some((claim, _)) = &self.plain {
            if claim.identity != *identity {
                let text = "SASL PLAIN authenticated another identity";
                return Err(condition::error(condition::UNAUTHORIZED, text));
            }
            return Ok((claim.clone(), Proof::Connection));
        }
        let chain = match attach.property(links::AUTH_CHAIN) {
            None => None,
            Some(text) => Some(AuthChain::parse(text).map_err(|error| {
                condition::error(condition::UNAUTHORIZED, format!("the auth chain: {error}"))
            })?),
        };
        if let Some((owner, claim)) = self.tokens.claim(identity, chain.as_ref()) {
            return Ok((claim, Proof::Token(owner)));
        }
        let Some(certificate) = &self.certificate else {
            let text = "no token was put for this identity";
            return Err(condition::error(condition::UNAUTHORIZED, text));
        };
        let claim = Claim {
            identity: identity.clone(),
            chain,
            credential: Credential::Certificate(certificate.clone()),
        };
        Ok((claim, Proof::Connection))
    }

    fn open(&mut self, identity: &Identity, link: LinkId, kind: Kind, attach: &Attach) {
        let Some(client) = self.clients.get_mut(identity) else {
            return;
        };
        for older in client.links.put(kind, link, attach) {
            client.detached(older);
            self.owners.remove(&older);
            self.engine.detach(older, None);
        }
        client.attached(kind, attach, &self.hub);
        self.owners.insert(link, (Some(identity.clone()), kind));
        self.engine.accept(link, &links::terms(kind, attach));
        client.announce(&self.hub);
        self.stirred.insert(identity.clone());
    }

    fn refuse(
        &mut self,
        link: LinkId,
        attach: &Attach,
        identity: Option<&Identity>,
        error: &ErrorInfo,
    ) {
        let address = condition::excerpt(attach.address().unwrap_or_default());
        let who = identity.map_or("(unknown)", Identity::as_str);
        let why = error.description.as_deref().unwrap_or_default();
        metrics::links_refused(&error.condition).increment(1);
        tracing::info!(
            "Refused a link of {who} to {address:?}: {} ({why})",
            error.condition
        );
        self.engine.refuse(link, error);
    }

    fn detached(&mut self, link: LinkId, error: Option<&ErrorInfo>) {
        if self.cbs_requests.remove(&link) {
            return;
        }
        let Some((identity, _)) = self.owners.remove(&link) else {
            self.cbs.detached(link);
            // Or one that waited for a verdict.
            for waiting in self.asked.values_mut() {
                waiting.retain(|waiting| waiting.link != link);
            }
            return;
        };
        let Some(identity) = identity else { return };
        let Some(client) = self.clients.get_mut(&identity) else {
            return;
        };
        if let Some(error) = error {
            tracing::info!("{identity} detached a link: {}", error.condition);
        }
        client.detached(link);
        if client.links.is_empty() {
            self.forget(&identity);
        } else {
            client.announce(&self.hub);
        }
    }

    // Deliveries.

    fn delivered(&mut self, incoming: &Incoming, now_ms: u64) {
        let link = incoming.link;
        if self.cbs_requests.contains(&link) {
            return self.put_token(incoming, now_ms);
        }
        let Some((Some(identity), kind)) = self.owners.get(&link) else {
            return;
        };
        let Some(client) = self.clients.get_mut(identity) else {
            return;
        };
        let outcome = match kind {
            Kind::Telemetry => {
                let ways = &mut client.ways;
                self.telemetry.take(ways, identity, incoming, now_ms)
            }
            Kind::TwinRequests => {
                client.twin(&self.hub, &incoming.payload);
                self.stirred.insert(identity.clone());
                Some(Outcome::Accepted)
            }
            Kind::MethodResponses => {
                client.method_response(&self.hub, &incoming.payload);
                Some(Outcome::Accepted)
            }
            // The engine has no deliveries of links that we send on.
            _ => None,
        };
        if let Some(outcome) = outcome {
            self.engine.settle(incoming.received, outcome);
        }
    }

    /// Everything up to this sequence number is stored.
    pub(super) fn committed(&mut self, sequence: u64) -> u64 {
        let mut count = 0;
        let engine = &mut self.engine;
        self.telemetry.committed(sequence, |received| {
            count += 1;
            engine.settle(received, Outcome::Accepted);
        });
        count
    }

    // Credentials.

    fn put_token(&mut self, incoming: &Incoming, now_ms: u64) {
        let scope = self.hub.scope().current();
        let is_known = |identity: &Identity| scope.get(identity).is_some();
        match cbs::read(incoming.received, &incoming.payload, is_known) {
            Asked::Judge(request, text, claim) => {
                if self.tokens.holds(&request.owner, &text, now_ms) {
                    // A hub below us puts its one token for each of its identities.
                    return self.answer(request, &Answer::ok());
                }
                self.jobs.push_back(Job::Judge(request, text, claim));
            }
            Asked::Answered(received, message_id, reply_to, answer) => {
                self.engine.settle(received, Outcome::Accepted);
                tracing::info!("Refused a token: {} ({})", answer.text, answer.status);
                self.cbs.say(message_id.as_ref(), reply_to, &answer);
            }
        }
    }

    fn answer(&mut self, request: cbs::Request, answer: &Answer) {
        self.engine.settle(request.received, Outcome::Accepted);
        self.cbs.answer(request, answer);
    }

    fn sasl_plain(&mut self, plain: &SaslPlain) {
        let Some(identity) = amqp_address::sasl_identity(&plain.authcid) else {
            self.engine.sasl_outcome(SaslCode::Auth);
            return;
        };
        let claim = Claim {
            identity,
            chain: None,
            credential: Credential::Sas(plain.password.expose().clone()),
        };
        self.jobs.push_back(Job::Plain(claim));
    }

    /// Takes what came of a job.
    pub(super) fn done(&mut self, done: Done) {
        self.jobs_running = self.jobs_running.saturating_sub(1);
        match done {
            Done::Connect(claim, proof, connected) => self.connected(claim, proof, connected),
            Done::Judge(request, text, verdict) => self.judged(request, text, &verdict),
            Done::Plain(claim, verdict) => match verdict {
                Ok(principal) => {
                    self.plain = Some((claim, principal.expires_at_ms()));
                    self.engine.sasl_outcome(SaslCode::Ok);
                }
                Err(error) => {
                    tracing::info!("Refused SASL PLAIN of {}: {error}", claim.identity);
                    let code = if error.is_definite() {
                        SaslCode::Auth
                    } else {
                        SaslCode::SysTemp
                    };
                    self.engine.sasl_outcome(code);
                }
            },
        }
    }

    fn judged(
        &mut self,
        request: cbs::Request,
        text: String,
        verdict: &Result<Principal, AuthnError>,
    ) {
        let now_ms = self.hub.clock().unix_ms();
        let owner = request.owner.clone();
        let answer = match request.concluded(verdict.as_ref()) {
            Err(answer) => {
                tracing::info!("Refused a token of {owner}: {}", answer.text);
                answer
            }
            Ok(expires_at_ms) => {
                if self
                    .tokens
                    .keep(&owner, text.clone(), expires_at_ms, now_ms)
                {
                    self.renew(&owner, &text, expires_at_ms);
                    Answer::ok()
                } else {
                    Answer::new(403, "this connection has too many tokens")
                }
            }
        };
        self.answer(request, &answer);
    }

    /// A newer token of this owner: those that live by the older one live longer.
    fn renew(&mut self, owner: &Identity, text: &str, expires_at_ms: u64) {
        for client in self.clients.values_mut() {
            if client.proof == Proof::Token(owner.clone()) {
                client.claim.credential = Credential::Sas(text.to_owned());
                client.expires_at_ms = Some(expires_at_ms);
                client.registration.renew(client.claim.clone());
            }
        }
    }

    fn connected(
        &mut self,
        claim: Claim,
        proof: Proof,
        connected: Result<Connected, ConnectError>,
    ) {
        let identity = claim.identity.clone();
        let waiting = self.asked.remove(&identity).unwrap_or_default();
        let connected = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let error = condition::not_connected(&error);
                for waiting in waiting {
                    self.refuse(waiting.link, &waiting.attach, Some(&identity), &error);
                }
                return;
            }
        };
        if waiting.is_empty() || self.closed.is_some() {
            // Nobody wants it any more. It was never announced, so nobody is told.
            drop(connected);
            return;
        }
        self.generation += 1;
        self.guards.push(Guard {
            identity: identity.clone(),
            generation: self.generation,
            closed: connected.registration.closed().clone(),
        });
        let client = Client::new(
            &self.hub,
            ClientParts {
                generation: self.generation,
                registration: connected.registration,
                claim,
                proof,
                expires_at_ms: connected.principal.expires_at_ms(),
                outbox: connected.outbox,
            },
        );
        self.clients.insert(identity.clone(), client);
        for Waiting { link, kind, attach } in waiting {
            self.open(&identity, link, kind, &attach);
        }
    }

    // Ends.

    /// An event of a client has come, or its outbox is closed.
    pub(super) fn woken(&mut self, watch: Watch, event: Option<ToClient>) {
        let Some(client) = self.clients.get_mut(&watch.identity) else {
            return;
        };
        if client.generation != watch.generation {
            return;
        }
        // A closed outbox belongs to a place that is lost: the guard says so.
        let Some(event) = event else { return };
        client.take(event);
        client.outbox = Some(watch.outbox);
        self.stirred.insert(watch.identity);
    }

    /// A client's place was taken by another connection, or its right was revoked.
    pub(super) fn dismissed(&mut self, identity: &Identity, generation: u64) {
        let is_it = |client: &Client| client.generation == generation;
        if !self.clients.get(identity).is_some_and(is_it) {
            return;
        }
        // Its place is empty when it was revoked: nobody else has it.
        let error = match self.clients.get(identity) {
            Some(client) if client.registration.is_live() => {
                let text = "the identity may not connect any more";
                condition::error(condition::UNAUTHORIZED, text)
            }
            _ => stolen(),
        };
        self.drop_client(identity, &error);
    }

    /// Looks at what can expire.
    pub(super) fn expire(&mut self) {
        let now_ms = self.hub.clock().unix_ms();
        let expired: Vec<Identity> = self
            .clients
            .values()
            .filter(|client| client.expires_at_ms.is_some_and(|at| at <= now_ms))
            .map(|client| client.identity.clone())
            .collect();
        let text = "the token expired";
        let error = condition::error(condition::UNAUTHORIZED, text);
        for identity in expired {
            tracing::info!("The token of {identity} expired");
            self.drop_client(&identity, &error);
        }
        if let Some((_, Some(at))) = self.plain
            && at <= now_ms
        {
            self.engine.close(Some(error));
            return;
        }
        let patience = u64::try_from(CREDENTIAL_MAX.as_millis()).unwrap_or(u64::MAX);
        let is_asking = !self.asked.is_empty() || !self.jobs.is_empty() || self.jobs_running > 0;
        if self.began_ms + patience <= now_ms && !self.is_known() && !is_asking {
            let text = "no valid credential is presented";
            self.engine
                .close(Some(condition::error(condition::UNAUTHORIZED, text)));
        }
    }

    /// When [`Head::expire`] must be called, Unix milliseconds.
    pub(super) fn expires_at_ms(&self) -> u64 {
        let patience = u64::try_from(CREDENTIAL_MAX.as_millis()).unwrap_or(u64::MAX);
        let now_ms = self.hub.clock().unix_ms();
        // Clocks can move, and tokens without clients are looked at now and then.
        let regular = now_ms + patience;
        let first = self
            .clients
            .values()
            .filter_map(|client| client.expires_at_ms);
        let first = first.chain(self.plain.iter().filter_map(|(_, at)| *at));
        let first = first.min().unwrap_or(u64::MAX).min(regular);
        if self.began_ms + patience > now_ms {
            first.min(self.began_ms + patience)
        } else {
            first
        }
    }

    /// Ends a client against its will; the connection with it when it carries no other.
    fn drop_client(&mut self, identity: &Identity, error: &ErrorInfo) {
        let Some(client) = self.clients.get(identity) else {
            return;
        };
        let links: Vec<LinkId> = client.links.all().collect();
        for link in links {
            self.owners.remove(&link);
            self.engine.detach(link, Some(error));
        }
        self.forget(identity);
        if self.clients.is_empty() && self.asked.is_empty() {
            self.engine.close(Some(error.clone()));
        }
    }

    /// A client has no link any more.
    fn forget(&mut self, identity: &Identity) {
        let Some(mut client) = self.clients.remove(identity) else {
            return;
        };
        let links: Vec<LinkId> = client.links.all().collect();
        for link in links {
            client.detached(link);
        }
        client.report(&self.hub);
        drop(client);
        self.hub.disconnected(identity, false);
        tracing::info!("Connection of {identity} closed");
    }

    /// The connection is over: its clients leave.
    pub(super) fn finish(&mut self) {
        let identities: Vec<Identity> = self.clients.keys().cloned().collect();
        for identity in identities {
            self.forget(&identity);
        }
    }

    /// The hub stops, or cannot store.
    pub(super) fn close(&mut self, error: ErrorInfo) {
        self.engine.close(Some(error));
    }

    /// Senders whose telemetry waits for a commit.
    pub(super) fn uncommitted_senders(&self) -> BTreeSet<&Identity> {
        self.telemetry
            .uncommitted_links()
            .filter_map(|link| self.owners.get(&link)?.0.as_ref())
            .collect()
    }
}

fn stolen() -> ErrorInfo {
    let text = "another connection of the identity took over";
    condition::error(condition::STOLEN, text)
}
