//! Many identities on one AMQP connection.
//!
//! Pure: owns the protocol's state machine, the `$cbs` node, our own hub's token and the members;
//! the connection's task hands in what happened and carries out what comes of it. A member is looked
//! at only when something happened to it; those that wait for room in the output go in turn.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use edgehub_auth::{sas_signer::TokenSource, scope_cache::ScopeCache};
use edgehub_proto::{
    clock::Clock,
    hub::{Downstream, Needs},
    identity::Identity,
};
use rand::{SeedableRng, rngs::StdRng};
use tracing::{debug, info, warn};

use super::{
    arrivals::{Awaited, Reply},
    client::{Client, ClientConfig, ClientError, Direction, Event, LinkKey, LinkSpec, SessionKey},
    conditions,
    links::Labels,
    member::{Context, End, Member, Progress},
    renewal::Renewal,
    tokens::{self, Holder, Token, Tokens},
};
use crate::{
    client_infos::ClientInfos,
    lanes::{CloseCause, SessionId},
    limits,
    transport::{Command, SessionEvent},
};

/// How often tokens are looked at: their life is on the wall clock, which may jump.
const LOOK_AFTER_EVERY: Duration = Duration::from_secs(2);

/// What the connections of one bridge share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The upstream host.
    pub(super) host: String,
    /// Our own hub.
    pub(super) own_hub: Identity,
    pub(super) product_info: String,
    pub(super) tokens: Arc<TokenSource>,
    pub(super) scope: Arc<ScopeCache>,
    pub(super) infos: Arc<ClientInfos>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) downstream: Arc<dyn Downstream>,
    /// How long a put-token may take.
    pub(super) operation_timeout: Duration,
}

impl Shared {
    /// What an identity's links say about it; none if it has no usable auth chain.
    pub(super) fn labels(&self, identity: &Identity) -> Option<Labels> {
        let chain = self.scope.current().auth_chain(identity)?;
        Some(Labels {
            product_info: self.infos.product_info(identity, &self.product_info),
            auth_chain: chain.to_string(),
            model_id: self.infos.model_id(identity).map(|id| id.to_string()),
        })
    }

    fn token(&self) -> Token {
        let token = self.tokens.signed_device_token();
        Token {
            expires_at_ms: token.expires_at_ms(),
            text: token.into_text(),
        }
    }
}

/// What is to be done for a member.
#[derive(Debug)]
pub(super) enum Told {
    /// Wait for this answer and hand it in.
    Await(SessionId, Awaited),
    /// The member is over.
    Closed(SessionId, CloseCause),
    /// Tell its lane.
    Event(SessionId, SessionEvent),
}

/// The `$cbs` node's links.
#[derive(Debug, Default)]
struct Cbs {
    session: Option<SessionKey>,
    sender: Option<LinkKey>,
    receiver: Option<LinkKey>,
    attached: usize,
}

/// One connection and everybody on it.
pub(super) struct Multiplex {
    shared: Arc<Shared>,
    client: Client,
    rng: StdRng,
    tokens: Tokens,
    cbs: Cbs,
    /// Our own hub's token was taken: members can start.
    is_ready: bool,
    renewal: Renewal,
    members: HashMap<SessionId, Member>,
    by_key: HashMap<SessionKey, SessionId>,
    dirty: VecDeque<SessionId>,
    /// Members that wait until output was written, in their order.
    full: VecDeque<SessionId>,
    timers: BTreeSet<(Instant, SessionId)>,
    look_after_at: Instant,
    sessions_max: Option<usize>,
    was_open: bool,
    /// Why nobody is taken on any more.
    over: Option<CloseCause>,
    /// Nothing more will come.
    is_over: bool,
    told: Vec<Told>,
}

impl Multiplex {
    /// A connection whose output starts with the protocol header. `container_id` is unique among the
    /// upstream's connections.
    pub(super) fn new(shared: Arc<Shared>, container_id: String, seed: u64, now: Instant) -> Self {
        let config = ClientConfig::new(container_id, shared.host.clone());
        Self {
            client: Client::new(config, now),
            shared,
            rng: StdRng::seed_from_u64(seed),
            tokens: Tokens::default(),
            cbs: Cbs::default(),
            is_ready: false,
            renewal: Renewal::default(),
            members: HashMap::new(),
            by_key: HashMap::new(),
            dirty: VecDeque::new(),
            full: VecDeque::new(),
            timers: BTreeSet::new(),
            look_after_at: now,
            sessions_max: None,
            was_open: false,
            over: None,
            is_over: false,
            told: Vec::new(),
        }
    }

    /// The connection was dialled: times count from now.
    pub(super) fn connected(&mut self, now: Instant) {
        self.client.connected(now);
        self.look_after_at = now;
    }

    pub(super) fn members(&self) -> usize {
        self.members.len()
    }

    /// Identities that fit, once the upstream has said how many.
    pub(super) fn members_max(&self) -> Option<usize> {
        // One session is `$cbs`'s.
        self.sessions_max.map(|max| max.saturating_sub(1))
    }

    pub(super) fn output(&self) -> &[u8] {
        self.client.output()
    }

    /// Nothing more will come: the output is to be written, and the socket closed.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// What is to be done since the last call.
    pub(super) fn told(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.told)
    }

    /// An identity joins.
    pub(super) fn admit(
        &mut self,
        session: SessionId,
        identity: Identity,
        needs: Needs,
        now: Instant,
    ) {
        if let Some(cause) = self.over.clone() {
            self.told.push(Told::Closed(session, cause));
            return;
        }
        let Some(labels) = self.shared.labels(&identity) else {
            let cause = CloseCause::OutOfScope;
            self.told.push(Told::Closed(session, cause));
            return;
        };
        let downstream = Arc::clone(&self.shared.downstream);
        let member = Member::new(session, identity, labels, needs, downstream);
        self.members.insert(session, member);
        if self.is_ready {
            self.start(session, now);
        }
        self.pursue(now);
    }

    /// A member's lane says something. None: it is gone, which is as if it wished to close.
    pub(super) fn command(&mut self, session: SessionId, command: Option<Command>, now: Instant) {
        let command = command.unwrap_or(Command::Close);
        let Some(member) = self.members.get_mut(&session) else {
            return;
        };
        if member.command(command) {
            self.remove(session, CloseCause::Requested);
        } else {
            self.touch(session);
        }
        self.pursue(now);
    }

    /// A member needs something else.
    pub(super) fn need(&mut self, session: SessionId, needs: Needs, now: Instant) {
        if let Some(member) = self.members.get_mut(&session) {
            member.need(needs);
            self.touch(session);
            self.pursue(now);
        }
    }

    /// An answer from below.
    pub(super) fn reply(&mut self, session: SessionId, reply: Reply, now: Instant) {
        self.with(session, now, |member, cx| {
            member.reply(reply, cx);
            Ok(())
        });
        self.pursue(now);
    }

    /// Takes whole frames out of what was read.
    pub(super) fn receive(&mut self, input: &mut BytesMut, now: Instant) {
        self.client.receive(input, now);
        self.pursue(now);
    }

    /// Output was written.
    pub(super) fn written(&mut self, n: usize, now: Instant) {
        self.client.written(n);
        if self.client.has_room() && !self.full.is_empty() {
            for session in std::mem::take(&mut self.full) {
                self.touch(session);
            }
            self.pursue(now);
        }
    }

    /// Asks the upstream for an end in order.
    pub(super) fn close(&mut self, now: Instant) {
        self.over.get_or_insert(CloseCause::Requested);
        self.client.close(now);
        self.pursue(now);
    }

    /// When [`Multiplex::handle_timeout`] has something to do next.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let timer = self.timers.first().map(|(at, _)| *at);
        let times = [
            self.client.next_timeout(),
            self.tokens.next_timeout(),
            timer,
            self.client.is_open().then_some(self.look_after_at),
        ];
        times.into_iter().flatten().min()
    }

    /// Does what is due.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.client.handle_timeout(now);
        for holder in self.tokens.overdue(now) {
            match holder {
                Holder::Actor if !self.is_ready => {
                    let text = "put-token of the own hub is not answered";
                    self.end(CloseCause::Busy(text.into()), now);
                }
                Holder::Actor => self
                    .renewal
                    .failed(self.shared.clock.unix_ms(), &mut self.rng),
                Holder::Member(session) => self.with(session, now, Member::token_overdue),
            }
        }
        while let Some((at, session)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.set_timer(session, None);
            self.touch(session);
        }
        if now >= self.look_after_at && self.client.is_open() {
            self.look_after_at = now + LOOK_AFTER_EVERY;
            self.renew(now);
        }
        self.pursue(now);
    }

    fn renew(&mut self, now: Instant) {
        if self.renewal.take_due(self.shared.clock.unix_ms()) {
            self.put_own_token();
        }
        let sessions: Vec<SessionId> = self.members.keys().copied().collect();
        for session in sessions {
            self.with_clean(session, now, |member, cx| {
                member.renew(cx);
                Ok(())
            });
        }
    }

    fn put_own_token(&mut self) {
        let name = tokens::name(&self.shared.host, &self.shared.own_hub);
        self.tokens.put(Holder::Actor, name);
    }

    /// Takes all events, then lets everybody whom something happened to do what they can.
    fn pursue(&mut self, now: Instant) {
        loop {
            while let Some(event) = self.client.poll() {
                self.take(event, now);
            }
            let Some(session) = self.dirty.pop_front() else {
                break;
            };
            self.look_at(session, now);
        }
        let (shared, timeout) = (&self.shared, self.shared.operation_timeout);
        self.tokens
            .send(&mut self.client, || shared.token(), now, timeout);
        self.client.note_said(now);
    }

    fn look_at(&mut self, session: SessionId, now: Instant) {
        let unix_ms = self.shared.clock.unix_ms();
        let Some(member) = self.members.get_mut(&session) else {
            return;
        };
        member.is_dirty = false;
        let progress = member.pursue(&mut Context {
            client: &mut self.client,
            tokens: &mut self.tokens,
            rng: &mut self.rng,
            host: &self.shared.host,
            now,
            unix_ms,
        });
        let events = member.events();
        let awaited = member.awaited();
        let timer = member.next_timeout();
        let told = events.into_iter().map(|event| Told::Event(session, event));
        self.told.extend(told);
        let awaited = awaited.into_iter();
        self.told
            .extend(awaited.map(|one| Told::Await(session, one)));
        self.set_timer(session, timer);
        match progress {
            Ok(Progress::Idle) => {}
            Ok(Progress::More) => self.touch(session),
            Ok(Progress::Full) => self.full.push_back(session),
            Err(end) => self.finish(session, end, now),
        }
    }

    fn take(&mut self, event: Event, now: Instant) {
        match event {
            Event::Opened { sessions_max } => {
                self.was_open = true;
                self.sessions_max = Some(sessions_max);
                self.cbs.session = self.client.begin();
            }
            Event::Begun(key) if self.cbs.session == Some(key) => self.attach_cbs(key),
            Event::Begun(key) => self.by_key(key, now, |member, cx| {
                member.begun(cx);
                Ok(())
            }),
            Event::Attached { link, .. } if self.is_cbs(link) => {
                self.cbs.attached += 1;
                if let (2, Some(sender)) = (self.cbs.attached, self.cbs.sender) {
                    self.tokens.attached(sender);
                    self.put_own_token();
                }
            }
            Event::Attached {
                link,
                max_message_size,
            } => self.by_key(link.session(), now, |member, _| {
                member.attached(link, max_message_size);
                Ok(())
            }),
            Event::Credit(key) => self.touch_key(key),
            Event::Delivery(delivery) if self.is_cbs(delivery.link) => {
                if !delivery.settled {
                    let outcome = edgehub_amqp::performative::Outcome::Accepted;
                    self.client.settle(delivery.link, delivery.number, outcome);
                }
                self.client.release(delivery.link);
                self.token_answered(&delivery.payload, now);
            }
            Event::Delivery(delivery) => self.by_key(delivery.link.session(), now, |member, cx| {
                member.delivered(&delivery, cx);
                Ok(())
            }),
            Event::Settled {
                link,
                number,
                outcome,
            } => {
                if !self.is_cbs(link) {
                    self.by_key(link.session(), now, |member, cx| {
                        member.settled(number, outcome.as_ref(), cx)
                    });
                }
            }
            Event::Detached { link, error } if self.is_cbs(link) => {
                self.end(conditions::refusal("$cbs link", error.as_ref()), now);
            }
            Event::Detached { link, error } => self.by_key(link.session(), now, |member, cx| {
                member.detached(link, error.as_ref(), cx)
            }),
            Event::Ended { session, error } if self.cbs.session == Some(session) => {
                self.end(conditions::refusal("$cbs session", error.as_ref()), now);
            }
            Event::Ended { session, error } => {
                if let Some(id) = self.by_key.remove(&session) {
                    self.with(id, now, |member, _| Err(member.ended(error.as_ref())));
                }
            }
            Event::Closed(error) => self.closed(&error),
        }
    }

    fn is_cbs(&self, link: LinkKey) -> bool {
        self.cbs.session == Some(link.session())
    }

    fn attach_cbs(&mut self, key: SessionKey) {
        let spec = |name: &str, direction| LinkSpec {
            name: name.to_owned(),
            direction,
            settled: false,
            address: "$cbs".to_owned(),
            own_address: "cbs".to_owned(),
            properties: Vec::new(),
        };
        self.cbs.sender = self.client.attach(key, spec("cbs-sender", Direction::Up));
        let down = Direction::Down {
            credit: limits::AMQP_TOKEN_ANSWERS_CREDIT,
            second: false,
        };
        self.cbs.receiver = self.client.attach(key, spec("cbs-receiver", down));
    }

    fn token_answered(&mut self, payload: &bytes::Bytes, now: Instant) {
        let Some(answer) = self.tokens.answered(payload) else {
            debug!("an answer to no put-token");
            return;
        };
        match answer.holder {
            Holder::Member(session) => {
                self.with(session, now, |member, cx| member.token(&answer, cx));
            }
            Holder::Actor => {
                let unix_ms = self.shared.clock.unix_ms();
                let refusal = conditions::token_refusal(answer.status, &answer.description);
                match refusal {
                    None => {
                        let expires_at_ms = answer.expires_at_ms;
                        self.renewal.renewed(unix_ms, expires_at_ms, &mut self.rng);
                        if !std::mem::replace(&mut self.is_ready, true) {
                            let waiting: Vec<SessionId> = self.members.keys().copied().collect();
                            for session in waiting {
                                self.start(session, now);
                            }
                        }
                    }
                    Some(cause) if self.is_ready => {
                        warn!(%cause, "the own hub's token is not renewed");
                        self.renewal.failed(unix_ms, &mut self.rng);
                    }
                    // Nobody's identity is in doubt but our own.
                    Some(cause) => {
                        let text = format!("the own hub's token is refused: {cause}");
                        self.end(CloseCause::Busy(text.into()), now);
                    }
                }
            }
        }
    }

    fn start(&mut self, session: SessionId, now: Instant) {
        let mut started = None;
        self.with(session, now, |member, cx| {
            started = Some(member.start(cx)?);
            Ok(())
        });
        if let Some(key) = started {
            self.by_key.insert(key, session);
        }
    }

    fn by_key(
        &mut self,
        key: SessionKey,
        now: Instant,
        change: impl FnOnce(&mut Member, &mut Context<'_>) -> Result<(), End>,
    ) {
        if let Some(session) = self.by_key.get(&key).copied() {
            self.with(session, now, change);
        }
    }

    fn touch_key(&mut self, key: SessionKey) {
        if let Some(session) = self.by_key.get(&key).copied() {
            self.touch(session);
        }
    }

    fn with(
        &mut self,
        session: SessionId,
        now: Instant,
        change: impl FnOnce(&mut Member, &mut Context<'_>) -> Result<(), End>,
    ) {
        self.with_clean(session, now, change);
        self.touch(session);
    }

    fn with_clean(
        &mut self,
        session: SessionId,
        now: Instant,
        change: impl FnOnce(&mut Member, &mut Context<'_>) -> Result<(), End>,
    ) {
        let unix_ms = self.shared.clock.unix_ms();
        let Some(member) = self.members.get_mut(&session) else {
            return;
        };
        let result = change(
            member,
            &mut Context {
                client: &mut self.client,
                tokens: &mut self.tokens,
                rng: &mut self.rng,
                host: &self.shared.host,
                now,
                unix_ms,
            },
        );
        if let Err(end) = result {
            self.finish(session, end, now);
        }
    }

    fn touch(&mut self, session: SessionId) {
        if let Some(member) = self.members.get_mut(&session)
            && !member.is_dirty
        {
            member.is_dirty = true;
            self.dirty.push_back(session);
        }
    }

    fn set_timer(&mut self, session: SessionId, at: Option<Instant>) {
        let Some(member) = self.members.get_mut(&session) else {
            return;
        };
        if member.timer == at {
            return;
        }
        if let Some(old) = std::mem::replace(&mut member.timer, at) {
            self.timers.remove(&(old, session));
        }
        self.timers.extend(at.map(|at| (at, session)));
    }

    fn finish(&mut self, session: SessionId, end: End, now: Instant) {
        match end {
            End::Session(cause) => self.remove(session, cause),
            End::Connection(cause) => self.end(cause, now),
        }
    }

    /// A member leaves; what it told before comes first.
    fn remove(&mut self, session: SessionId, cause: CloseCause) {
        self.set_timer(session, None);
        let Some(mut member) = self.members.remove(&session) else {
            return;
        };
        if let Some(key) = member.key() {
            self.by_key.remove(&key);
            self.client.end_session(key);
        }
        self.tokens.forget(Holder::Member(session));
        let events = member.events().into_iter();
        self.told
            .extend(events.map(|event| Told::Event(session, event)));
        self.told.push(Told::Closed(session, cause));
    }

    /// The connection cannot go on, for a reason of everybody's.
    fn end(&mut self, cause: CloseCause, now: Instant) {
        info!(%cause, "upstream connection ends");
        self.remove_all(&cause);
        self.over = Some(cause);
        self.client.close(now);
    }

    fn closed(&mut self, error: &ClientError) {
        let text = error.to_string();
        if self.over.is_none() {
            info!(error = text, "upstream connection ended");
        }
        let cause = self.loss(&text, Some(error));
        self.remove_all(&cause);
        self.over.get_or_insert(cause);
        self.is_over = true;
    }

    /// No connection came about.
    pub(super) fn unreachable(&mut self, text: &str) {
        let cause = CloseCause::Unreachable(text.into());
        self.remove_all(&cause);
        self.over.get_or_insert(cause);
        self.is_over = true;
    }

    /// The socket broke.
    pub(super) fn broken(&mut self, text: &str) {
        let cause = self.loss(text, None);
        self.remove_all(&cause);
        self.over.get_or_insert(cause);
        self.is_over = true;
    }

    /// What the end of the connection is called.
    fn loss(&self, text: &str, error: Option<&ClientError>) -> CloseCause {
        match error {
            Some(ClientError::Ours) => CloseCause::Requested,
            Some(ClientError::Fault(_)) => CloseCause::Protocol(text.into()),
            _ if self.was_open => CloseCause::Lost(text.into()),
            _ => CloseCause::Unreachable(format!("{text} before it was open").into()),
        }
    }

    fn remove_all(&mut self, cause: &CloseCause) {
        let sessions: Vec<SessionId> = self.members.keys().copied().collect();
        for session in sessions {
            self.remove(session, cause.clone());
        }
    }
}

#[cfg(test)]
#[path = "multiplex_hearing_tests.rs"]
mod hearing_tests;
#[cfg(test)]
#[path = "multiplex_tests.rs"]
mod tests;
