//! One identity on a shared connection: its AMQP session, token, telemetry and what it hears.
//!
//! Pure: the connection hands in what happened and then calls [`Member::pursue`] once. The order is
//! begin and put-token at once, the telemetry link when both were answered, everything else when
//! that is attached (spec/upstream.md A3.4).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use edgehub_amqp::performative::{ErrorInfo, Outcome};
use edgehub_proto::{
    hub::{Downstream, Needs},
    identity::Identity,
    stored,
};
use rand::rngs::StdRng;
use tracing::{debug, warn};

use super::{
    arrivals::{Awaited, Reply},
    client::{Client, Delivery, Direction, LinkKey, LinkSpec, Reason, SendError, SessionKey},
    conditions::{self, Class},
    convert,
    hearing::Hearing,
    links::{Addresses, Labels},
    outbox::{Disposed, GivenUp, Item, Outbox},
    renewal::Renewal,
    tokens::{self, Holder, TokenAnswer, Tokens},
};
use crate::{
    counters::{self, SentCounters},
    lanes::{CloseCause, Disposition, DropReason, Outgoing, SessionId},
    limits,
    transport::{Command, SessionEvent},
};

/// From the moment at which the connection can be used to the telemetry link.
const OPEN_MAX: Duration = Duration::from_secs(30);

/// Deliveries in one turn: others have theirs too.
const BATCHES_PER_TURN: usize = 2;

/// Why something ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The whole connection: the hub itself is away.
    Connection(CloseCause),
    /// The identity's session.
    Session(CloseCause),
}

/// What a member works with.
pub(super) struct Context<'a> {
    pub(super) client: &'a mut Client,
    pub(super) tokens: &'a mut Tokens,
    pub(super) rng: &'a mut StdRng,
    /// The upstream host.
    pub(super) host: &'a str,
    pub(super) now: Instant,
    pub(super) unix_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The connection cannot be used yet.
    Waiting,
    /// begin and put-token are under way.
    Opening {
        deadline: Instant,
        has_begun: bool,
        has_token: bool,
    },
    /// The telemetry link is under way.
    Attaching {
        deadline: Instant,
    },
    Open,
}

/// One identity.
pub(super) struct Member {
    pub(super) session: SessionId,
    identity: Identity,
    labels: Labels,
    phase: Phase,
    key: Option<SessionKey>,
    telemetry: Option<LinkKey>,
    /// Largest message that the upstream takes on it.
    bytes_max: usize,
    renewal: Renewal,
    outbox: Outbox,
    counters: SentCounters,
    hearing: Hearing,
    /// Counts links, for their names.
    links: u64,
    /// The telemetry link was taken and that was not told.
    has_opened: bool,
    dispositions: Vec<(u64, Disposition)>,
    /// Already in the connection's list of members to look at.
    pub(super) is_dirty: bool,
    /// Key in the connection's timers.
    pub(super) timer: Option<Instant>,
}

/// Whether there is more to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing can be done before something happens.
    Idle,
    /// It had its turn, and could go on.
    More,
    /// The connection takes no more output now.
    Full,
}

impl Member {
    pub(super) fn new(
        session: SessionId,
        identity: Identity,
        labels: Labels,
        needs: Needs,
        downstream: Arc<dyn Downstream>,
    ) -> Self {
        let mut hearing = Hearing::new(identity.clone(), downstream);
        hearing.need(needs);
        Self {
            session,
            counters: SentCounters::new(identity.clone()),
            identity,
            labels,
            phase: Phase::Waiting,
            key: None,
            telemetry: None,
            bytes_max: usize::MAX,
            renewal: Renewal::default(),
            outbox: Outbox::default(),
            hearing,
            links: 0,
            has_opened: false,
            dispositions: Vec::new(),
            is_dirty: false,
            timer: None,
        }
    }

    pub(super) fn key(&self) -> Option<SessionKey> {
        self.key
    }

    /// The connection can be used.
    pub(super) fn start(&mut self, cx: &mut Context<'_>) -> Result<SessionKey, End> {
        let Some(key) = cx.client.begin() else {
            let text = "the upstream takes no more sessions on this connection";
            return Err(End::Session(CloseCause::Busy(text.into())));
        };
        self.key = Some(key);
        self.put_token(cx);
        self.phase = Phase::Opening {
            deadline: cx.now + OPEN_MAX,
            has_begun: false,
            has_token: false,
        };
        Ok(key)
    }

    fn put_token(&self, cx: &mut Context<'_>) {
        let name = tokens::name(cx.host, &self.identity);
        cx.tokens.put(Holder::Member(self.session), name);
    }

    /// Takes a command. True: the session is to end.
    pub(super) fn command(&mut self, command: Command) -> bool {
        match command {
            Command::Close => return true,
            Command::Request(requests) => self.hearing.request(requests),
            Command::Send(batch) => {
                for outgoing in batch {
                    self.take(outgoing);
                }
            }
        }
        false
    }

    fn take(&mut self, outgoing: Outgoing) {
        let Outgoing {
            token,
            priority,
            resend: _,
            entry,
        } = outgoing;
        match stored::decode_message(entry.message) {
            Ok(message) => {
                let output = counters::output_of(&message).to_owned();
                self.counters.sent(token, &output, priority);
                self.outbox.push(Item {
                    token,
                    bytes: convert::encode(&message),
                    expires_at_ms: entry.expires_at_ms,
                    output,
                });
            }
            Err(error) => {
                let (identity, offset) = (&self.identity, entry.offset);
                warn!(%identity, offset, %error, "stored message is damaged");
                counters::dropped(identity, String::new(), DropReason::CorruptRecord);
                let unsendable = Disposition::Unsendable(DropReason::CorruptRecord);
                self.dispositions.push((token, unsendable));
            }
        }
    }

    pub(super) fn need(&mut self, needs: Needs) {
        self.hearing.need(needs);
    }

    pub(super) fn reply(&mut self, reply: Reply, cx: &mut Context<'_>) {
        self.hearing.take_reply(cx.client, reply, cx.now);
    }

    pub(super) fn begun(&mut self, cx: &mut Context<'_>) {
        if let Phase::Opening { has_begun, .. } = &mut self.phase {
            *has_begun = true;
        }
        self.attach(cx);
    }

    /// The upstream answered our token.
    pub(super) fn token(&mut self, answer: &TokenAnswer, cx: &mut Context<'_>) -> Result<(), End> {
        let refusal = conditions::token_refusal(answer.status, &answer.description);
        match (refusal, &mut self.phase) {
            (None, phase) => {
                self.renewal
                    .renewed(cx.unix_ms, answer.expires_at_ms, cx.rng);
                if let Phase::Opening { has_token, .. } = phase {
                    *has_token = true;
                }
                self.attach(cx);
                Ok(())
            }
            (Some(cause @ CloseCause::Refused(_)), _) => Err(End::Session(cause)),
            (Some(cause), Phase::Opening { .. }) => Err(End::Session(cause)),
            // The old token holds for a while.
            (Some(cause), _) => {
                debug!(identity = %self.identity, %cause, "token is not renewed");
                self.renewal.failed(cx.unix_ms, cx.rng);
                Ok(())
            }
        }
    }

    /// The upstream did not answer our token in time.
    pub(super) fn token_overdue(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if matches!(self.phase, Phase::Opening { .. }) {
            let text = "put-token is not answered";
            return Err(End::Session(CloseCause::Busy(text.into())));
        }
        self.renewal.failed(cx.unix_ms, cx.rng);
        Ok(())
    }

    /// Puts a fresh token when the old one nears its end.
    pub(super) fn renew(&mut self, cx: &mut Context<'_>) {
        if self.renewal.take_due(cx.unix_ms) {
            self.put_token(cx);
        }
    }

    /// Attaches the telemetry link once session and token are there.
    fn attach(&mut self, cx: &mut Context<'_>) {
        let Phase::Opening {
            deadline,
            has_begun: true,
            has_token: true,
        } = self.phase
        else {
            return;
        };
        self.attach_telemetry(cx);
        self.phase = Phase::Attaching { deadline };
    }

    fn attach_telemetry(&mut self, cx: &mut Context<'_>) {
        let Some(key) = self.key else { return };
        let mut addresses = Addresses {
            host: cx.host,
            identity: &self.identity,
            labels: &self.labels,
            session: self.session,
            links: &mut self.links,
        };
        let spec = LinkSpec {
            name: addresses.name("TelemetrySenderLink"),
            direction: Direction::Up,
            settled: false,
            address: addresses.telemetry(),
            own_address: self.identity.as_str().to_owned(),
            properties: addresses.telemetry_properties(),
        };
        self.telemetry = cx.client.attach(key, spec);
    }

    pub(super) fn attached(&mut self, link: LinkKey, max_message_size: Option<u64>) {
        if self.telemetry != Some(link) {
            self.hearing.attached(link);
            return;
        }
        let max = max_message_size.filter(|max| *max > 0);
        let max = max.and_then(|max| usize::try_from(max).ok());
        self.bytes_max = max.unwrap_or(usize::MAX);
        if matches!(self.phase, Phase::Attaching { .. }) {
            self.phase = Phase::Open;
            self.has_opened = true;
        }
    }

    pub(super) fn detached(
        &mut self,
        link: LinkKey,
        error: Option<&ErrorInfo>,
        cx: &mut Context<'_>,
    ) -> Result<(), End> {
        if self.hearing.has(link) {
            let result = self.hearing.detached(cx.client, link, error, cx.now);
            return result.map_err(End::Session);
        }
        if self.telemetry != Some(link) {
            return Ok(());
        }
        self.telemetry = None;
        let class = conditions::class(error);
        if class == Class::Away {
            let cause = conditions::loss("the hub", error);
            return Err(End::Connection(cause));
        }
        if matches!(self.phase, Phase::Attaching { .. }) {
            return Err(End::Session(conditions::refusal("telemetry link", error)));
        }
        // Some peers answer a link that they refuse with an attach and then the detach: it is the
        // same at this place.
        let Some(disposed) = self.outbox.detached(class, cx.now) else {
            return Err(End::Session(conditions::loss("telemetry link", error)));
        };
        warn!(identity = %self.identity, "telemetry link is gone{}", Reason(error));
        self.disposed(disposed);
        self.attach_telemetry(cx);
        Ok(())
    }

    pub(super) fn ended(&mut self, error: Option<&ErrorInfo>) -> End {
        self.key = None;
        let class = conditions::class(error);
        match (class, self.phase) {
            (Class::Away, _) => End::Connection(conditions::loss("the hub", error)),
            (_, Phase::Open) => End::Session(conditions::loss("session", error)),
            _ => End::Session(conditions::refusal("session", error)),
        }
    }

    /// What became of a delivery of ours.
    pub(super) fn settled(
        &mut self,
        number: u32,
        outcome: Option<&Outcome>,
        cx: &mut Context<'_>,
    ) -> Result<(), End> {
        let disposed = self.outbox.settled(number, outcome, cx.now, cx.rng);
        let fault = disposed.fault;
        if !matches!(outcome, Some(Outcome::Accepted)) {
            let error = match outcome {
                Some(Outcome::Rejected(error)) => error.as_ref(),
                _ => None,
            };
            debug!(identity = %self.identity, retried = disposed.retried,
                "a delivery is not taken{}", Reason(error));
            counters::refused_delivery(conditions::class(error).label());
            if fault.is_some() {
                let cause = conditions::loss("telemetry", error);
                self.disposed(disposed);
                return Err(match fault {
                    Some(Class::Away) => End::Connection(cause),
                    _ => End::Session(cause),
                });
            }
        }
        self.disposed(disposed);
        Ok(())
    }

    fn disposed(&mut self, disposed: Disposed) {
        for token in disposed.accepted {
            self.counters.accepted(token);
            self.dispositions.push((token, Disposition::Accepted));
        }
        for GivenUp {
            token,
            reason,
            output,
        } in disposed.given_up
        {
            warn!(identity = %self.identity, reason = reason.label(), "a message is given up");
            counters::dropped(&self.identity, output, reason);
            self.dispositions
                .push((token, Disposition::Unsendable(reason)));
        }
    }

    pub(super) fn delivered(&mut self, delivery: &Delivery, cx: &mut Context<'_>) {
        self.hearing.delivered(cx.client, delivery, cx.now);
    }

    /// Does everything that has become possible.
    pub(super) fn pursue(&mut self, cx: &mut Context<'_>) -> Result<Progress, End> {
        match self.phase {
            Phase::Waiting => return Ok(Progress::Idle),
            Phase::Opening { deadline, .. } | Phase::Attaching { deadline } => {
                if cx.now >= deadline {
                    let text = "the upstream does not answer begin or attach";
                    return Err(End::Session(CloseCause::Busy(text.into())));
                }
                return Ok(Progress::Idle);
            }
            Phase::Open => {}
        }
        if self.outbox.is_stalled(cx.now) {
            let text = "the upstream does not say what became of a delivery";
            return Err(End::Session(CloseCause::Lost(text.into())));
        }
        if let Some(key) = self.key {
            let mut addresses = Addresses {
                host: cx.host,
                identity: &self.identity,
                labels: &self.labels,
                session: self.session,
                links: &mut self.links,
            };
            self.hearing.pursue(cx.client, key, &mut addresses, cx.now);
        }
        Ok(self.send(cx))
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Progress {
        let Some(link) = self.telemetry else {
            return Progress::Idle;
        };
        let bytes_max = self.bytes_max.min(limits::AMQP_BATCH_BYTES_MAX);
        let alone_max = self.bytes_max.min(limits::AMQP_SINGLE_BYTES_MAX);
        for _ in 0..BATCHES_PER_TURN {
            if !self.outbox.has_waiting() {
                return Progress::Idle;
            }
            if !cx.client.can_send(link) {
                return if cx.client.has_room() {
                    Progress::Idle
                } else {
                    Progress::Full
                };
            }
            let mut given_up = Vec::new();
            let batch = self
                .outbox
                .next(cx.now, cx.unix_ms, bytes_max, alone_max, &mut given_up);
            self.disposed(Disposed {
                given_up,
                ..Disposed::default()
            });
            let Some(batch) = batch else {
                return Progress::Idle;
            };
            let (message_format, payload) = batch.encode();
            match cx.client.send(link, message_format, payload) {
                Ok(number) => self.outbox.sent(batch, number, cx.now),
                Err(SendError::NoRoom) => {
                    self.outbox.unsent(batch);
                    return Progress::Idle;
                }
                Err(SendError::TooLarge) => {
                    let disposed = self.outbox.too_large(batch, cx.now);
                    self.disposed(disposed);
                }
            }
        }
        Progress::More
    }

    /// What happened since the last call, for the lane.
    pub(super) fn events(&mut self) -> Vec<SessionEvent> {
        let session = self.session;
        let mut events = Vec::new();
        if std::mem::take(&mut self.has_opened) {
            // The token is renewed on the open session, so that the lane need not.
            events.push(SessionEvent::Opened {
                session,
                expires_at_ms: None,
            });
        }
        if !self.dispositions.is_empty() {
            events.push(SessionEvent::Disposed {
                session,
                dispositions: std::mem::take(&mut self.dispositions),
            });
        }
        let outcomes = self.hearing.take_outcomes().into_iter();
        events.extend(outcomes.map(|(request, answer)| SessionEvent::Answered { request, answer }));
        events
    }

    /// Answers that are to be waited for since the last call.
    pub(super) fn awaited(&mut self) -> Vec<Awaited> {
        self.hearing.take_awaited()
    }

    /// When [`Member::pursue`] has something to do next.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting => None,
            Phase::Opening { deadline, .. } | Phase::Attaching { deadline } => Some(deadline),
            Phase::Open => {
                let times = [self.outbox.next_timeout(), self.hearing.next_timeout()];
                times.into_iter().flatten().min()
            }
        }
    }
}
