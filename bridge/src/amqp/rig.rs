//! A connection with its members against a parent in memory, for tests. No socket, no task; time
//! moves by hand.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use edgehub_amqp::connection::Config;
use edgehub_auth::{
    sas_signer::TokenSource,
    scope_cache::{ScopeCache, ScopeChange},
    scope_tree::{Authentication, ServiceIdentity, Status},
};
use edgehub_proto::{clock::ManualClock, hub::Needs, message::Message, stored};

pub(crate) use super::rig_parent::{Link, Parent, Verdict};
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
    pub(super) answered: Vec<(
        RequestId,
        Result<TwinAnswer, edgehub_proto::hub::UpstreamError>,
    )>,
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

    /// Numbers the messages of a session that was not admitted by [`World::admit`].
    pub(super) fn number(&mut self, session: SessionId) {
        self.tokens.insert(session, 0);
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
            moved |= self.look();
            if !moved {
                return;
            }
        }
    }

    /// Tells whether anything was answered from below.
    fn look(&mut self) -> bool {
        for told in self.multiplex.told() {
            match told {
                Told::Await(session, awaited) => self.awaited.push((session, awaited)),
                Told::Closed(session, cause) => {
                    assert_eq!(self.closed.insert(session, cause), None, "closed once");
                }
                Told::Event(_, SessionEvent::Opened { session, .. }) => self.opened.push(session),
                Told::Event(
                    _,
                    SessionEvent::Disposed {
                        session,
                        dispositions,
                    },
                ) => {
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
        let is_news = !replies.is_empty();
        for (session, reply) in replies {
            self.multiplex.reply(session, reply, self.now);
        }
        is_news
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
