//! A connection with its members against a parent in memory, for tests: `edgehub_amqp`'s server
//! engine with just enough of a hub behind it. No socket, no task; time moves by hand.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use edgehub_amqp::{
    cbs::{PutToken, cbs_response},
    connection::{
        Attach, CloseCause as ServerClose, Config, Connection, Event, LinkId, LinkTerms, Outgoing,
        Received, Sent,
    },
    message::{
        BATCH_MESSAGE_FORMAT, Body, MessageId, MessageView, MessageWriter, Properties, batch_items,
    },
    performative::{ErrorInfo, Outcome},
    value::Value,
};
use edgehub_auth::{
    sas_signer::TokenSource,
    scope_cache::{ScopeCache, ScopeChange},
    scope_tree::{Authentication, ServiceIdentity, Status},
};
use edgehub_proto::{clock::ManualClock, hub::Needs, message::Message, stored};

use super::{
    arrivals::{Awaited, Reply},
    multiplex::{Multiplex, Shared, Told},
};
use crate::{
    client_infos::ClientInfos,
    lanes::{CloseCause, Disposition, Entry, Outgoing as LaneMessage, RequestId, SessionId},
    test_support::{FakeDownstream, UNIX_MS, id},
    transport::{Command, SessionEvent, TwinAnswer, TwinAsk, TwinRequest},
};

/// What the parent does with telemetry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    /// Detaches the link.
    Detach(&'static str),
    /// Ends the session: not something that the server engine does, so the link goes with an error.
    Modify,
    Reject(&'static str),
    Release,
    Silent,
}

/// What the parent does with an identity.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    /// Status of a put-token; none: no answer.
    pub(super) token: Option<i32>,
    /// Condition with which links to an address that ends so are refused.
    pub(super) refuse: Option<(&'static str, &'static str)>,
    /// Verdicts for the next deliveries, then for all.
    pub(super) next: VecDeque<Verdict>,
    pub(super) always: Verdict,
    /// Bodies that make a delivery be rejected with this condition.
    pub(super) poison: Vec<(String, &'static str)>,
    /// Status of twin requests; none: no answer.
    pub(super) twin: Option<i32>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            token: Some(200),
            refuse: None,
            next: VecDeque::new(),
            always: Verdict::Accept,
            poison: Vec::new(),
            twin: Some(200),
        }
    }
}

/// A link as the parent sees it.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) attach: Attach,
    pub(super) identity: String,
    pub(super) tail: String,
    pub(super) peer_sends: bool,
}

/// The parent.
pub(super) struct Parent {
    pub(super) connection: Connection,
    pub(super) manners: HashMap<String, Manner>,
    /// Names under which tokens were put, in order, with the token.
    pub(super) tokens: Vec<(String, String)>,
    pub(super) links: Vec<Link>,
    /// Every attach: identity and tail.
    pub(super) attaches: Vec<(String, String)>,
    /// Bodies of accepted telemetry, by identity.
    pub(super) ledger: BTreeMap<String, Vec<String>>,
    /// Sizes of all telemetry deliveries, in messages, by identity.
    pub(super) deliveries: BTreeMap<String, Vec<usize>>,
    /// Telemetry without a word, by identity.
    pub(super) open: Vec<(String, Received)>,
    /// Twin operations, by identity.
    pub(super) twins: Vec<(String, String)>,
    /// Answers to methods: correlation, status, payload.
    pub(super) answers: Vec<(MessageId, i64, String)>,
    pub(super) settled: Vec<(Sent, Option<Outcome>, bool)>,
    pub(super) detached: Vec<String>,
    pub(super) closed: Option<ServerClose>,
    max_message_size: Option<u64>,
}

impl Parent {
    fn new(config: Config, now: Instant) -> Self {
        Self {
            connection: Connection::new(config, now),
            manners: HashMap::new(),
            tokens: Vec::new(),
            links: Vec::new(),
            attaches: Vec::new(),
            ledger: BTreeMap::new(),
            deliveries: BTreeMap::new(),
            open: Vec::new(),
            twins: Vec::new(),
            answers: Vec::new(),
            settled: Vec::new(),
            detached: Vec::new(),
            closed: None,
            max_message_size: None,
        }
    }

    pub(super) fn manner(&mut self, identity: &str) -> &mut Manner {
        self.manners.entry(identity.to_owned()).or_default()
    }

    pub(super) fn ledger(&self, identity: &str) -> Vec<String> {
        self.ledger.get(identity).cloned().unwrap_or_default()
    }

    /// The live link of an identity.
    pub(super) fn link(&self, identity: &str, tail: &str, peer_sends: bool) -> Option<&Link> {
        self.links.iter().rev().find(|link| {
            link.identity == identity && link.tail == tail && link.peer_sends == peer_sends
        })
    }

    /// Names of the links that live, sorted.
    pub(super) fn tails(&self, identity: &str) -> Vec<String> {
        let links = self.links.iter().filter(|link| link.identity == identity);
        let mut tails: Vec<String> = links.map(|link| link.tail.clone()).collect();
        tails.sort();
        tails.dedup();
        tails
    }

    fn handle(&mut self) {
        while let Some(event) = self.connection.poll() {
            match event {
                Event::Attached { link, attach } => self.attach(link, attach),
                Event::Delivery(delivery) => {
                    let link = self.links.iter().find(|link| link.id == delivery.link);
                    let Some(link) = link.cloned() else { continue };
                    let (received, format) = (delivery.received, delivery.message_format);
                    self.delivery(&link, received, format, &delivery.payload);
                }
                Event::Detached { link, .. } => self.gone(link),
                Event::Settled {
                    link,
                    sent,
                    outcome,
                    settled,
                } => {
                    if !settled {
                        self.connection.settle_sent(link, sent);
                    }
                    self.settled.push((sent, outcome, settled));
                }
                Event::Closed(cause) => self.closed = Some(cause),
                _ => {}
            }
        }
    }

    fn gone(&mut self, id: LinkId) {
        if let Some(index) = self.links.iter().position(|link| link.id == id) {
            let link = self.links.remove(index);
            self.detached
                .push(format!("{} {}", link.identity, link.tail));
        }
    }

    fn attach(&mut self, id: LinkId, attach: Attach) {
        let address = attach.address().unwrap_or_default().to_owned();
        let (identity, tail) = split(&address);
        let peer_sends = attach.peer_sends();
        self.attaches.push((identity.clone(), tail.clone()));
        let refusal = self
            .manners
            .get(&identity)
            .and_then(|manner| manner.refuse)
            .filter(|(end, _)| tail.ends_with(end) && !tail.is_empty());
        let chain = attach.property("com.microsoft:auth-chain");
        let actor = chain.and_then(|chain| chain.rsplit(';').next());
        let has_token = tail == "$cbs"
            || actor.is_some_and(|actor| {
                let name = format!("/devices/{actor}/modules/%24edgeHub");
                self.tokens.iter().any(|(put, _)| put.ends_with(&name))
            });
        if let Some((_, condition)) = refusal {
            self.connection
                .refuse(id, ErrorInfo::new(condition, "refused by the test"));
            return;
        }
        if !has_token {
            let condition = "amqp:unauthorized-access";
            self.connection.refuse(id, ErrorInfo::new(condition, "no token"));
            return;
        }
        let terms = LinkTerms {
            max_message_size: self.max_message_size,
            credit: 100,
            ..LinkTerms::default()
        };
        self.connection.accept(id, terms);
        self.links.push(Link {
            id,
            attach,
            identity,
            tail,
            peer_sends,
        });
    }

    fn delivery(&mut self, link: &Link, received: Received, format: u32, payload: &Bytes) {
        match link.tail.as_str() {
            "$cbs" => self.token(received, payload),
            "messages/events" => self.telemetry(link, received, format, payload),
            "twin" => self.twin(link, received, payload),
            _ => {
                let view = MessageView::parse(payload).unwrap();
                let status = view.application_properties.unwrap().get_str("IoThub-status");
                let correlation = view.properties.unwrap().correlation_id.unwrap();
                let status = status.unwrap().as_i64().unwrap();
                self.answers.push((correlation, status, text(&view.body)));
                self.connection.settle(received, Outcome::Accepted);
            }
        }
    }

    fn token(&mut self, received: Received, payload: &Bytes) {
        let put = PutToken::parse(payload).unwrap();
        self.connection.settle(received, Outcome::Accepted);
        let (_, rest) = put.name.split_once("/devices/").unwrap();
        let identity = rest.replace("/modules/", "/").replace("%24", "$");
        self.tokens
            .push((put.name.clone(), put.token.expose().clone()));
        let status = self.manners.get(&identity).map_or(Some(200), |one| one.token);
        if let Some(status) = status {
            let answer = cbs_response(put.message_id.as_ref(), status, "by the test");
            let out = self.links.iter().find(|one| one.tail == "$cbs" && !one.peer_sends);
            let out = out.unwrap().id;
            self.send(out, &answer, false);
        }
    }

    pub(super) fn send(&mut self, link: LinkId, payload: &Bytes, settled: bool) -> Sent {
        let outgoing = Outgoing {
            tag: &[7; 16],
            message_format: 0,
            settled,
            payload: payload.clone(),
        };
        self.connection.send(link, outgoing).unwrap()
    }

    fn telemetry(&mut self, link: &Link, received: Received, format: u32, payload: &Bytes) {
        let bodies: Vec<String> = if format == BATCH_MESSAGE_FORMAT {
            let view = MessageView::parse(payload).unwrap();
            batch_items(&view.body).map(body_of).collect()
        } else {
            vec![body_of(payload)]
        };
        let identity = link.identity.clone();
        let sizes = self.deliveries.entry(identity.clone()).or_default();
        sizes.push(bodies.len());
        let manner = self.manners.entry(identity.clone()).or_default();
        let poison = manner.poison.iter().find(|(body, _)| bodies.contains(body));
        let verdict = match poison {
            Some((_, condition)) => Verdict::Reject(condition),
            None => manner.next.pop_front().unwrap_or(manner.always.clone()),
        };
        let outcome = match verdict {
            Verdict::Accept => {
                self.ledger.entry(identity).or_default().extend(bodies);
                Outcome::Accepted
            }
            Verdict::Detach(condition) => {
                let error = ErrorInfo::new(condition, "detached by the test");
                self.connection.detach(link.id, Some(error));
                self.gone(link.id);
                return;
            }
            Verdict::Modify => Outcome::Modified {
                delivery_failed: true,
                undeliverable_here: false,
            },
            Verdict::Reject(condition) => {
                Outcome::Rejected(Some(ErrorInfo::new(condition, "by the test")))
            }
            Verdict::Release => Outcome::Released,
            Verdict::Silent => {
                self.open.push((identity, received));
                return;
            }
        };
        self.connection.settle(received, outcome);
    }

    fn twin(&mut self, link: &Link, received: Received, payload: &Bytes) {
        self.connection.settle(received, Outcome::Accepted);
        let view = MessageView::parse(payload).unwrap();
        let annotations = view.message_annotations.unwrap();
        let operation = annotations.get_symbol("operation").unwrap();
        let operation = operation.as_str().unwrap().to_owned();
        let identity = link.identity.clone();
        self.twins.push((identity.clone(), operation.clone()));
        let status = self.manners.get(&identity).map_or(Some(200), |one| one.twin);
        let Some(mut status) = status else { return };
        if status == 200 && operation == "PATCH" {
            status = 204;
        }
        let mut writer = MessageWriter::new();
        let version = Value::Long(text(&view.body).len() as i64);
        writer.annotations([("status", Value::Int(status)), ("version", version)]);
        writer.properties(&Properties {
            correlation_id: view.properties.unwrap().correlation_id,
            ..Properties::default()
        });
        writer.data(if operation == "GET" { b"{\"desired\":{}}" } else { b"" });
        let out = self.link(&identity, "twin", false).unwrap().id;
        self.send(out, &writer.finish(), true);
    }
}

/// Identity and what follows of an address.
fn split(address: &str) -> (String, String) {
    let Some((_, rest)) = address.split_once("/devices/") else {
        return (String::new(), address.to_owned());
    };
    let mut parts = rest.split('/');
    let device = parts.next().unwrap().replace("%20", " ");
    let rest: Vec<&str> = parts.collect();
    match rest.as_slice() {
        ["modules", module, tail @ ..] => {
            let module = module.replace("%24", "$");
            (format!("{device}/{module}"), tail.join("/"))
        }
        tail => (device, tail.join("/")),
    }
}

fn text(body: &Body<'_>) -> String {
    match body {
        Body::Data(sections) => String::from_utf8(sections.concat()).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn body_of(payload: &Bytes) -> String {
    text(&MessageView::parse(payload).unwrap().body)
}

/// A connection, its parent and the time of their world.
pub(super) struct World {
    pub(super) multiplex: Multiplex,
    pub(super) parent: Parent,
    pub(super) downstream: Arc<FakeDownstream>,
    pub(super) clock: Arc<ManualClock>,
    pub(super) scope: Arc<ScopeCache>,
    pub(super) infos: Arc<ClientInfos>,
    pub(super) now: Instant,
    shared: Arc<Shared>,
    /// What was told and not looked at.
    pub(super) opened: Vec<SessionId>,
    pub(super) closed: BTreeMap<SessionId, CloseCause>,
    pub(super) disposed: BTreeMap<SessionId, Vec<(u64, Disposition)>>,
    pub(super) answered: Vec<(RequestId, Result<TwinAnswer, edgehub_proto::hub::UpstreamError>)>,
    pub(super) awaited: Vec<(SessionId, Awaited)>,
    to_parent: BytesMut,
    to_us: BytesMut,
    /// Nothing passes.
    pub(super) is_cut: bool,
    tokens: BTreeMap<SessionId, u64>,
}

pub(super) const OWN: &str = "edge2/$edgeHub";

impl World {
    /// edge2 with some leaves; connected, `$cbs` attached and the own token taken.
    pub(super) fn new() -> Self {
        let mut world = Self::unopened(Config::new("parent"));
        world.drive();
        world
    }

    pub(super) fn unopened(config: Config) -> Self {
        let now = tokio::time::Instant::now().into_std();
        let clock = Arc::new(ManualClock::new(UNIX_MS));
        let tokens = TokenSource::new(
            "a2V5",
            "hub.example",
            "edge2",
            "$edgeHub",
            Arc::clone(&clock) as _,
        );
        let downstream = Arc::new(FakeDownstream::default());
        let scope = ScopeCache::new(&id("edge2"));
        scope.apply(ScopeChange::Upsert(vec![record("edge2", true)]));
        let infos = Arc::new(ClientInfos::default());
        let shared = Arc::new(Shared {
            host: "parent.example".to_owned(),
            own_hub: id(OWN),
            product_info: "EdgeHub/1".to_owned(),
            tokens: Arc::new(tokens.unwrap()),
            scope: Arc::clone(&scope),
            infos: Arc::clone(&infos),
            clock: Arc::clone(&clock) as _,
            downstream: Arc::clone(&downstream) as _,
            operation_timeout: Duration::from_secs(20),
        });
        Self {
            multiplex: Multiplex::new(Arc::clone(&shared), "edge2_1".to_owned(), 5, now),
            parent: Parent::new(config, now),
            downstream,
            clock,
            scope,
            infos,
            now,
            shared,
            opened: Vec::new(),
            closed: BTreeMap::new(),
            disposed: BTreeMap::new(),
            answered: Vec::new(),
            awaited: Vec::new(),
            to_parent: BytesMut::new(),
            to_us: BytesMut::new(),
            is_cut: false,
            tokens: BTreeMap::new(),
        }
    }

    /// Another connection, to another parent.
    pub(super) fn reconnect(&mut self) {
        let shared = Arc::clone(&self.shared);
        let manners = std::mem::take(&mut self.parent.manners);
        let ledger = std::mem::take(&mut self.parent.ledger);
        self.multiplex = Multiplex::new(shared, "edge2_2".to_owned(), 6, self.now);
        self.parent = Parent::new(Config::new("parent"), self.now);
        self.parent.manners = manners;
        self.parent.ledger = ledger;
        self.to_parent.clear();
        self.to_us.clear();
        self.is_cut = false;
        self.drive();
    }

    pub(super) fn know(&self, identity: &str) {
        let change = ScopeChange::Upsert(vec![record(identity, false)]);
        self.scope.apply(change);
    }

    /// Admits an identity under a session's number.
    pub(super) fn admit(&mut self, session: u64, identity: &str, needs: Needs) -> SessionId {
        let session = SessionId(session);
        if identity != OWN {
            self.know(identity);
        }
        self.tokens.insert(session, 0);
        self.multiplex.admit(session, id(identity), needs, self.now);
        self.drive();
        session
    }

    /// Hands messages to a session; their bodies are the texts.
    pub(super) fn send(&mut self, session: SessionId, bodies: &[String]) {
        self.push(session, bodies);
        self.drive();
    }

    /// The same, without letting anything move.
    pub(super) fn push(&mut self, session: SessionId, bodies: &[String]) {
        let first = self.tokens.get_mut(&session).unwrap();
        let batch = bodies.iter().zip(*first..).map(|(body, token)| {
            let message = Message {
                body: Bytes::copy_from_slice(body.as_bytes()),
                ..Message::default()
            };
            LaneMessage {
                token,
                priority: 0,
                resend: false,
                entry: Entry {
                    offset: token,
                    sender: id("x"),
                    message: stored::encode_message(&message),
                    enqueued_ms: 0,
                    expires_at_ms: None,
                    shared: None,
                },
            }
        });
        let batch: Vec<LaneMessage> = batch.collect();
        *first += batch.len() as u64;
        self.command(session, Command::Send(batch));
    }

    pub(super) fn command(&mut self, session: SessionId, command: Command) {
        self.multiplex.command(session, Some(command), self.now);
    }

    pub(super) fn ask(&mut self, session: SessionId, request: u64, ask: TwinAsk) {
        let twin = TwinRequest {
            request: RequestId(request),
            ask,
            deadline: self.now + Duration::from_secs(20),
        };
        self.command(session, Command::Request(vec![twin]));
        self.drive();
    }

    pub(super) fn need(&mut self, session: SessionId, needs: Needs) {
        self.multiplex.need(session, needs, self.now);
        self.drive();
    }

    /// Moves bytes until nothing moves any more.
    pub(super) fn drive(&mut self) {
        loop {
            let mut moved = false;
            let output = self.multiplex.output();
            if !output.is_empty() && !self.is_cut {
                moved = true;
                self.to_parent.extend_from_slice(output);
                let written = output.len();
                self.multiplex.written(written, self.now);
                self.parent
                    .connection
                    .receive(&mut self.to_parent, self.now);
            }
            self.parent.handle();
            while let Some(output) = self.parent.connection.output() {
                if !self.is_cut {
                    moved = true;
                    self.to_us.extend_from_slice(&output);
                }
            }
            if !self.to_us.is_empty() {
                self.multiplex.receive(&mut self.to_us, self.now);
            }
            self.look();
            if !moved {
                return;
            }
        }
    }

    fn look(&mut self) {
        for told in self.multiplex.told() {
            match told {
                Told::Await(session, awaited) => self.awaited.push((session, awaited)),
                Told::Closed(session, cause) => {
                    assert_eq!(self.closed.insert(session, cause), None, "closed once");
                }
                Told::Event(_, SessionEvent::Opened { session, .. }) => self.opened.push(session),
                Told::Event(_, SessionEvent::Disposed { session, dispositions }) => {
                    let all = self.disposed.entry(session).or_default();
                    all.extend(dispositions);
                }
                Told::Event(_, SessionEvent::Answered { request, answer }) => {
                    self.answered.push((request, answer));
                }
                Told::Event(_, other) => panic!("{other:?}"),
            }
        }
        // What was answered below.
        let mut replies = Vec::new();
        self.awaited.retain_mut(|(session, awaited)| {
            let reply = match awaited {
                Awaited::CloudToDevice { number, reply } => match reply.try_recv() {
                    Err(tokio::sync::oneshot::error::TryRecvError::Empty) => return true,
                    outcome => Reply::CloudToDevice {
                        number: *number,
                        outcome: outcome.ok(),
                    },
                },
                Awaited::Method { call, reply } => match reply.try_recv() {
                    Err(tokio::sync::oneshot::error::TryRecvError::Empty) => return true,
                    result => Reply::Method {
                        call: *call,
                        result: result.ok(),
                    },
                },
            };
            replies.push((*session, reply));
            false
        });
        for (session, reply) in replies {
            self.multiplex.reply(session, reply, self.now);
        }
    }

    /// Lets time pass, stopping at everything that is due on either side.
    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let ours = self.multiplex.next_timeout();
            let theirs = self.parent.connection.deadline();
            let theirs = theirs.filter(|_| !self.is_cut);
            let next = ours.into_iter().chain(theirs).min();
            let next = next.map_or(end, |at| at.max(self.now)).min(end);
            let passed = next.saturating_duration_since(self.now);
            self.clock.advance(passed);
            self.now = next;
            self.multiplex.handle_timeout(next);
            if !self.is_cut {
                self.parent.connection.expired(next);
            }
            self.drive();
            if next >= end {
                return;
            }
        }
    }

    pub(super) fn accepted(&self, session: SessionId) -> Vec<u64> {
        let all = self.disposed.get(&session).into_iter().flatten();
        all.filter(|(_, disposition)| *disposition == Disposition::Accepted)
            .map(|(token, _)| *token)
            .collect()
    }

    pub(super) fn given_up(&self, session: SessionId) -> Vec<(u64, Disposition)> {
        let all = self.disposed.get(&session).into_iter().flatten();
        all.filter(|(_, disposition)| *disposition != Disposition::Accepted)
            .copied()
            .collect()
    }
}

pub(super) fn bodies(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

fn record(name: &str, is_edge: bool) -> ServiceIdentity {
    let scope = "ms-azure-iot-edge://edge2-1".to_owned();
    ServiceIdentity {
        identity: id(name),
        generation_id: "1".to_owned(),
        status: Status::Enabled,
        is_edge,
        device_scope: Some(scope.clone()),
        parent_scopes: if is_edge { Vec::new() } else { vec![scope] },
        authentication: Authentication::None,
    }
}
