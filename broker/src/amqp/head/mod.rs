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

mod attaching;
mod credentials;
mod ends;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use edgehub_amqp::connection::{Attach, CloseCause, Config, Connection, Event, Incoming, LinkId};
use edgehub_amqp::performative::Outcome;
use edgehub_amqp::sasl::Mechanism;
use edgehub_auth::authenticator::{AuthnError, Claim, Principal};
use edgehub_proto::identity::Identity;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::cbs::{self, Cbs};
use super::client::{Client, Proof};
use super::condition;
use super::limits::JOBS_WAITING_MAX;
use super::links::Kind;
use super::telemetry::Telemetry;
use super::tokens::Tokens;
use crate::hub::{ConnectError, ConnectOptions, Connected, Hub, ToClient};

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

/// A client that is new: when this fires it must go, or has gone.
pub(super) struct Guard {
    pub(super) identity: Identity,
    pub(super) generation: u64,
    pub(super) closed: CancellationToken,
}

/// A link that waits for a verdict.
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
    /// Who the connection itself belongs to, by SASL PLAIN, and until when.
    plain: Option<(Claim, Option<u64>)>,
    tokens: Tokens,
    cbs: Cbs,
    clients: HashMap<Identity, Client>,
    owners: HashMap<LinkId, (Identity, Kind)>,
    /// Links of the node of tokens on which requests come.
    cbs_requests: BTreeSet<LinkId>,
    /// Links of identities that are being let in.
    asked: HashMap<Identity, Vec<Waiting>>,
    /// Verdicts on tokens that are awaited, by whom the tokens are made out to.
    verifying: HashMap<Identity, usize>,
    /// Links whose credential is among them (design.md D7).
    parked: Vec<(Identity, Waiting)>,
    pub(super) telemetry: Telemetry,
    jobs: VecDeque<Job>,
    jobs_running: usize,
    watches: Vec<Watch>,
    guards: Vec<Guard>,
    /// Clients that may have something to send.
    stirred: BTreeSet<Identity>,
    generation: u64,
    began: Instant,
    refusals: u64,
    closed: Option<CloseCause>,
}

impl Head {
    pub(super) fn new(hub: Arc<Hub>, certificate: Option<Vec<u8>>) -> Self {
        let mut config = Config::new(format!("DeviceGateway_{:032x}", rand::random::<u128>()));
        config.hostname = Some("localhost".to_owned());
        if certificate.is_none() {
            // Clients that choose by themselves take it before anything else, and would fail.
            let offered = &mut config.mechanisms;
            offered.retain(|mechanism| *mechanism != Mechanism::External);
        }
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
            verifying: HashMap::new(),
            parked: Vec::new(),
            telemetry: Telemetry::new(Arc::clone(&hub)),
            jobs: VecDeque::new(),
            jobs_running: 0,
            watches: Vec::new(),
            guards: Vec::new(),
            stirred: BTreeSet::new(),
            generation: 0,
            began: now,
            refusals: 0,
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
            Event::SaslExternal => self.sasl_external(),
            Event::Opened(opened) => {
                let sasl = opened.sasl.map_or("no SASL", Mechanism::name);
                let container = condition::excerpt(&opened.container_id);
                tracing::debug!("An AMQP connection of container {container:?} opened, {sasl}");
            }
            // Not once we have closed: an identity would be taken from where it is, for nothing.
            Event::Attached { link, attach } if self.engine.is_open() => {
                self.attached(link, attach);
            }
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
        self.clients.get_mut(identity)
    }

    fn credit(&mut self, link: LinkId, drain: bool) {
        match self.owners.get(&link) {
            Some((identity, _)) => {
                let identity = identity.clone();
                self.stirred.insert(identity);
            }
            None => self.cbs.pump(&mut self.engine),
        }
        if drain {
            // What waits is sent first.
            self.pump();
            self.engine.drained(link);
        }
    }

    fn delivered(&mut self, incoming: &Incoming, now_ms: u64) {
        let link = incoming.link;
        if self.cbs_requests.contains(&link) {
            return self.put_token(incoming, now_ms);
        }
        let Some((identity, kind)) = self.owners.get(&link) else {
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

    /// Everything up to this sequence number is stored. How many deliveries that settled.
    pub(super) fn committed(&mut self, sequence: u64) -> u64 {
        let mut count = 0;
        let engine = &mut self.engine;
        self.telemetry.committed(sequence, |received| {
            count += 1;
            engine.settle(received, Outcome::Accepted);
        });
        count
    }

    /// Takes what came of a job.
    pub(super) fn done(&mut self, done: Done) {
        self.jobs_running = self.jobs_running.saturating_sub(1);
        match done {
            Done::Connect(claim, proof, connected) => self.connected(claim, proof, connected),
            Done::Judge(request, text, verdict) => self.judged(request, &text, &verdict),
            Done::Plain(claim, verdict) => self.plain_judged(claim, verdict),
        }
    }

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

    /// Whether a refusal is worth a line: a peer without any right could fill the log.
    fn is_told(&mut self) -> bool {
        self.refusals += 1;
        self.refusals.is_power_of_two()
    }
}
