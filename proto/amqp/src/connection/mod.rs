//! One AMQP 1.0 connection, the server's side, as a state machine: bytes and time in, events and
//! bytes out.
//!
//! It knows no socket and nothing of what its links are good for: whoever drives it decides about
//! SASL credentials and links, takes deliveries and settles them, and sends. Order of calls:
//! [`Connection::receive`], then [`Connection::poll`] until it returns nothing, then
//! [`Connection::output`] into the socket. [`Connection::deadline`] says when to call
//! [`Connection::expired`].
//!
//! # Back-pressure
//! The credit of a link counts down with each delivery and comes back with its settlement, so a
//! driver that settles late slows its peers down. Beyond `output_bytes_max` no input is wanted.
//! Settlements are gathered and leave as ranges when output is taken.
//!
//! # Errors of the peer
//! What breaks a link detaches it, what breaks a session ends it, anything else closes the
//! connection, each with the standard's condition (part 2, 2.8.15 to 2.8.18).
//!
//! Contract: OASIS AMQP 1.0 parts 2 and 5; spec/amqp.md sections 1, 2 and 4.3.

mod attach;
mod config;
mod event;
mod frames;
mod link;
mod opening;
mod sending;
mod session;
mod transfers;
mod verdict;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
pub use fe2o3_amqp_types::definitions::{ReceiverSettleMode, SenderSettleMode};
use smallvec::SmallVec;

pub use self::attach::Attach;
pub use self::config::Config;
pub use self::event::{
    CloseCause, Event, Incoming, LinkId, LinkTerms, Opened, Outgoing, Received, SaslPlain,
    SendError, Sent,
};
use self::link::{Direction, Link, Phase};
use self::session::Session;
use crate::frame::{FRAME_HEADER_BYTES, FrameHeader, FrameLimits, FrameType};
use crate::limits::{ASKED_BYTES_MAX, CLOSE_MAX_MS, SASL_FRAME_BYTES_MAX};
use crate::performative::{self, ErrorInfo, Flow, Outcome};
use crate::sasl::Mechanism;

/// Conditions of the standard that this engine says by itself.
mod condition {
    pub(super) const DECODE_ERROR: &str = "amqp:decode-error";
    pub(super) const FRAME_SIZE: &str = "amqp:frame-size-too-small";
    pub(super) const FORCED: &str = "amqp:connection:forced";
    pub(super) const HANDLE_IN_USE: &str = "amqp:session:handle-in-use";
    pub(super) const ILLEGAL_STATE: &str = "amqp:illegal-state";
    pub(super) const INVALID_FIELD: &str = "amqp:invalid-field";
    pub(super) const MESSAGE_SIZE: &str = "amqp:link:message-size-exceeded";
    pub(super) const NOT_ALLOWED: &str = "amqp:not-allowed";
    pub(super) const NOT_FOUND: &str = "amqp:not-found";
    pub(super) const NOT_IMPLEMENTED: &str = "amqp:not-implemented";
    pub(super) const RESOURCE_LIMIT: &str = "amqp:resource-limit-exceeded";
    pub(super) const RESOURCE_LOCKED: &str = "amqp:resource-locked";
    pub(super) const TRANSFER_LIMIT: &str = "amqp:link:transfer-limit-exceeded";
    pub(super) const UNATTACHED_HANDLE: &str = "amqp:session:unattached-handle";
    pub(super) const WINDOW_VIOLATION: &str = "amqp:session:window-violation";
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first protocol header is awaited.
    Header,
    /// SASL: the choice of the client is awaited.
    SaslInit,
    /// SASL: the driver judges.
    SaslDeciding(Mechanism),
    /// The header behind SASL is awaited.
    AmqpHeader,
    /// The peer's open is awaited.
    Open,
    /// Open on both sides.
    Opened,
    /// Our close has left, the peer's is awaited.
    Closing,
    Closed,
}

/// One connection. Owned by whoever drives it.
#[derive(Debug)]
pub struct Connection {
    config: Config,
    state: State,
    sasl: Option<Mechanism>,
    sessions: HashMap<u16, Session>,
    /// Links of all sessions that are not gone.
    links: usize,
    generation: u64,
    partial_bytes: usize,
    /// Bytes of deliveries that wait for windows of the peer.
    waiting_bytes: usize,
    /// Bytes of attaches that are not answered.
    asked_bytes: usize,
    events: VecDeque<Event>,
    out: BytesMut,
    /// Sessions that owe dispositions or flows, or have frames that wait.
    stirred: Vec<u16>,
    /// Sessions whose links are to be told that the peer's window has room again.
    reopened: Vec<u16>,
    peer_frame_bytes_max: u32,
    opened_by: Instant,
    /// When bytes arrived last.
    heard_at: Instant,
    /// Bytes of the input that were there before and are no whole frame.
    left_over: usize,
    /// How often it is looked whether anything was sent: twice as long is half of the peer's
    /// idle time-out.
    heartbeat: Option<Duration>,
    heartbeat_at: Option<Instant>,
    /// Something was sent since the last look.
    has_sent: bool,
    closing_until: Option<Instant>,
    /// What the last call with a time said.
    now: Instant,
}

impl Connection {
    /// A connection that begins at `now`.
    #[must_use]
    pub fn new(config: Config, now: Instant) -> Self {
        let opened_by = now + config.open_max;
        Self {
            config,
            state: State::Header,
            sasl: None,
            sessions: HashMap::new(),
            links: 0,
            generation: 0,
            partial_bytes: 0,
            waiting_bytes: 0,
            asked_bytes: 0,
            events: VecDeque::new(),
            out: BytesMut::new(),
            stirred: Vec::new(),
            reopened: Vec::new(),
            peer_frame_bytes_max: crate::limits::MIN_MAX_FRAME_BYTES,
            opened_by,
            heard_at: now,
            left_over: 0,
            heartbeat: None,
            heartbeat_at: None,
            has_sent: false,
            closing_until: None,
            now,
        }
    }

    /// Takes headers and whole frames out of `input`; what stays is the beginning of one, or what
    /// must wait for [`Connection::sasl_outcome`]: call again after that, with whatever is there.
    pub fn receive(&mut self, input: &mut BytesMut, now: Instant) {
        self.now = now;
        let is_fresh = input.len() > self.left_over;
        if is_fresh && !matches!(self.state, State::Closing | State::Closed) {
            self.heard_at = now;
        }
        loop {
            let more = match self.state {
                State::Header | State::AmqpHeader => self.take_header(input),
                State::SaslInit => self.take_sasl(input),
                State::SaslDeciding(_) => false,
                State::Open | State::Opened | State::Closing => self.take_frame(input),
                State::Closed => {
                    input.clear();
                    false
                }
            };
            if !more {
                self.left_over = input.len();
                return;
            }
        }
    }

    /// Whether more bytes are wanted now. When not, stop reading: TCP holds the peer back. Not
    /// while much is written and not taken, or much is asked and not answered.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        !matches!(self.state, State::SaslDeciding(_) | State::Closed)
            && self.asked_bytes < ASKED_BYTES_MAX
            && self.out.len() < self.config.output_bytes_max
    }

    /// The next event, if any.
    pub fn poll(&mut self) -> Option<Event> {
        if self.events.is_empty() {
            self.tell_reopened();
        }
        self.events.pop_front()
    }

    /// What is to be written: whole frames. Dispositions and flows that are owed are among them.
    pub fn output(&mut self) -> Option<Bytes> {
        self.flush();
        if self.out.is_empty() {
            return None;
        }
        self.has_sent = true;
        Some(self.out.split().freeze())
    }

    /// Bytes that wait for [`Connection::output`]; what is owed in dispositions comes on top.
    #[must_use]
    pub fn output_bytes(&self) -> usize {
        self.out.len()
    }

    /// Whether [`Event::Closed`] was told: flush the output and end the stream.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether both sides have opened it and neither has closed it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == State::Opened
    }

    /// When to call [`Connection::expired`]. May be in the past.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Closed => None,
            State::Closing => self.closing_until,
            State::Opened => {
                let idle = self.heard_at + self.config.idle_enforced;
                Some(self.heartbeat_at.map_or(idle, |at| at.min(idle)))
            }
            _ => Some(self.opened_by),
        }
    }

    /// Does what is due by `now`.
    pub fn expired(&mut self, now: Instant) {
        self.now = now;
        match self.state {
            State::Closed => {}
            State::Closing => {
                if self.closing_until.is_some_and(|until| until <= now) {
                    self.end(CloseCause::Ours);
                }
            }
            State::Opened => {
                if self.heard_at + self.config.idle_enforced <= now {
                    let text = "nothing was heard within the idle time-out";
                    self.close_frame(Some(&ErrorInfo::new(condition::FORCED, text)));
                    self.end(CloseCause::Idle);
                    return;
                }
                self.heartbeat_due(now);
            }
            _ => {
                if self.opened_by <= now {
                    self.end(CloseCause::OpenTimeOut);
                }
            }
        }
    }

    fn heartbeat_due(&mut self, now: Instant) {
        let (Some(at), Some(period)) = (self.heartbeat_at, self.heartbeat) else {
            return;
        };
        if now < at {
            return;
        }
        self.heartbeat_at = Some(now + period);
        if !self.has_sent && self.out.is_empty() {
            self.frame(0, |_| {});
        }
        self.has_sent = false;
    }

    /// Closes the connection; [`Event::Closed`] follows when the peer has answered, or after a
    /// while. Before it is open it ends at once.
    pub fn close(&mut self, error: Option<ErrorInfo>) {
        match self.state {
            State::Opened => {
                self.flush();
                match error {
                    Some(error) => self.close_frame(Some(&error)),
                    None => self.close_frame(None),
                }
                self.state = State::Closing;
                self.closing_until = Some(self.now + Duration::from_millis(CLOSE_MAX_MS));
            }
            State::Closing | State::Closed => {}
            _ => self.end(CloseCause::Ours),
        }
    }

    /// Settles a delivery that arrived: its outcome leaves with the next output, and its credit
    /// comes back.
    pub fn settle(&mut self, received: Received, outcome: Outcome) {
        let id = received.link;
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        let Some(receiving) = session.receiving(id) else {
            return;
        };
        receiving.settled_one();
        if !received.settled {
            session.settle_received(received.delivery_id, outcome);
        }
        self.list(id);
    }

    /// What is owed in the link's session goes before what is sent next: for a node whose peers
    /// expect a request to be settled before it is answered. Otherwise it leaves with the output.
    pub fn settle_first(&mut self, id: LinkId) {
        self.flush_session(id.channel);
    }

    /// What the credit of a link is topped up to, counting deliveries that are not settled. Zero
    /// holds the peer back once it has used what it has.
    pub fn set_credit(&mut self, id: LinkId, credit: u32) {
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        let Some(receiving) = session.receiving(id) else {
            return;
        };
        if receiving.target != credit {
            receiving.target = credit;
            self.list(id);
        }
    }

    /// A link of an open connection: behind our close nothing is said any more.
    fn link(&mut self, id: LinkId) -> Option<&mut Link> {
        if self.state != State::Opened {
            return None;
        }
        self.sessions.get_mut(&id.channel)?.link(id)
    }

    /// The credit of a link is looked at with the next output.
    fn list(&mut self, id: LinkId) {
        if let Some(session) = self.sessions.get_mut(&id.channel) {
            session.list(id.handle);
        }
        self.stir(id.channel);
    }

    /// The session has something that leaves with the next output.
    fn stir(&mut self, channel: u16) {
        if let Some(session) = self.sessions.get_mut(&channel)
            && !std::mem::replace(&mut session.is_stirred, true)
        {
            self.stirred.push(channel);
        }
    }

    /// What was told about a link counts for nothing any more; the peer's detach is awaited.
    fn give_up(&mut self, id: LinkId) {
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        let waited = session.forget_unsettled(id);
        session.free_name(id);
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waited);
        if let Some(link) = session.link(id) {
            link.phase = Phase::Detaching;
            if let Direction::Receiving(receiving) = &mut link.direction {
                let partial = receiving.partial.take();
                let bytes = partial.map_or(0, |partial| partial.payload.len());
                self.partial_bytes = self.partial_bytes.saturating_sub(bytes);
            }
        }
    }

    /// Everything that is owed becomes output.
    fn flush(&mut self) {
        for channel in std::mem::take(&mut self.stirred) {
            if let Some(session) = self.sessions.get_mut(&channel) {
                session.is_stirred = false;
            }
            self.flush_session(channel);
        }
    }

    fn flush_session(&mut self, channel: u16) {
        if self.state != State::Opened {
            return;
        }
        let Some(session) = self.sessions.get(&channel) else {
            return;
        };
        if session.ending {
            return;
        }
        if session.owes_dispositions() {
            let mut dispositions = Vec::new();
            if let Some(session) = self.sessions.get_mut(&channel) {
                session.take_dispositions(|disposition| dispositions.push(disposition));
            }
            for disposition in dispositions {
                self.frame(channel, |out| {
                    performative::encode_disposition(&disposition, out);
                });
            }
        }
        self.flush_flows(channel);
        self.flush_waiting(channel);
    }

    /// Flows that are owed: credit of links, else the session's window.
    fn flush_flows(&mut self, channel: u16) {
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let mut due = SmallVec::<[_; 4]>::new();
        for handle in session.due.drain(..) {
            if let Some(link) = session.links.get_mut(&handle)
                && let Direction::Receiving(receiving) = &mut link.direction
            {
                receiving.is_listed = false;
                if matches!(link.phase, Phase::Attached)
                    && let Some(credit) = receiving.top_up()
                {
                    due.push((handle, receiving.delivery_count, credit));
                }
            }
        }
        if due.is_empty() {
            // A third of the window is left (spec/amqp.md 2.2).
            if session.incoming_window <= self.config.incoming_window / 3 {
                self.session_flow(channel, false);
            }
            return;
        }
        for (handle, delivery_count, credit) in due {
            let flow = Flow {
                handle: Some(handle),
                delivery_count: Some(delivery_count),
                link_credit: Some(credit),
                ..self.session_terms(channel)
            };
            self.frame(channel, |out| performative::encode_flow(&flow, out));
        }
    }

    /// A flow of the session alone.
    fn session_flow(&mut self, channel: u16, echo: bool) {
        let flow = Flow {
            echo,
            ..self.session_terms(channel)
        };
        self.frame(channel, |out| performative::encode_flow(&flow, out));
    }

    /// The part of a flow that each one carries; the peer's window is full again after it.
    fn session_terms(&mut self, channel: u16) -> Flow {
        let window = self.config.incoming_window;
        let Some(session) = self.sessions.get_mut(&channel) else {
            return Flow::default();
        };
        session.incoming_window = window;
        Flow {
            next_incoming_id: Some(session.next_incoming_id),
            incoming_window: window,
            next_outgoing_id: session.next_outgoing_id,
            outgoing_window: window,
            ..Flow::default()
        }
    }

    /// Closes the connection because of what the peer did.
    fn fault(&mut self, condition: &'static str, description: impl Into<String>) {
        match self.state {
            State::Closed => return,
            // The close has left already.
            State::Closing => return self.end(CloseCause::Ours),
            _ => {}
        }
        let error = ErrorInfo::new(condition, description);
        if self.state == State::Open {
            // A close is preceded by an open (part 2, 2.4.1).
            self.open_frame();
        }
        self.close_frame(Some(&error));
        self.end(CloseCause::Fault(error));
    }

    /// Ends a session because of what the peer did in it.
    fn fail_session(&mut self, channel: u16, condition: &'static str, description: &str) {
        let error = ErrorInfo::new(condition, description);
        self.frame(channel, |out| performative::encode_end(Some(&error), out));
        self.drop_links(channel, Some(&error));
        if let Some(session) = self.sessions.get_mut(&channel) {
            session.ending = true;
        }
    }

    /// Detaches a link because of what the peer did on it.
    fn fail_link(&mut self, id: LinkId, condition: &'static str, description: &str) {
        let error = ErrorInfo::new(condition, description);
        self.flush_session(id.channel);
        self.give_up(id);
        self.frame(id.channel, |out| {
            performative::encode_detach(id.handle, true, Some(&error), out);
        });
        self.events.push_back(Event::Detached {
            link: id,
            error: Some(error),
        });
    }

    /// Removes all links of a session and says so.
    fn drop_links(&mut self, channel: u16, error: Option<&ErrorInfo>) {
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let mut ids: Vec<LinkId> = session
            .links
            .iter()
            .map(|(handle, link)| LinkId {
                channel,
                handle: *handle,
                generation: link.generation,
            })
            .collect();
        ids.sort_unstable();
        for id in ids {
            self.remove_link(id, error.cloned());
        }
    }

    /// Removes a link; says so unless the driver detached or refused it itself.
    fn remove_link(&mut self, id: LinkId, error: Option<ErrorInfo>) {
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        let Some((link, waited)) = session.remove_link(id) else {
            return;
        };
        self.links = self.links.saturating_sub(1);
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waited);
        if let Phase::Asked(attach) = &link.phase {
            self.asked_bytes = self.asked_bytes.saturating_sub(attach.bytes());
        }
        if let Direction::Receiving(receiving) = link.direction
            && let Some(partial) = receiving.partial
        {
            self.partial_bytes = self.partial_bytes.saturating_sub(partial.payload.len());
        }
        if !matches!(link.phase, Phase::Detaching) {
            self.events.push_back(Event::Detached { link: id, error });
        }
    }

    /// Nothing more is taken or said.
    fn end(&mut self, cause: CloseCause) {
        if self.state == State::Closed {
            return;
        }
        let mut channels: Vec<u16> = self.sessions.keys().copied().collect();
        channels.sort_unstable();
        let error = match &cause {
            CloseCause::Peer(error) => error.clone(),
            _ => None,
        };
        for channel in channels {
            self.drop_links(channel, error.as_ref());
        }
        self.sessions.clear();
        self.stirred.clear();
        self.state = State::Closed;
        self.events.push_back(Event::Closed(cause));
    }

    fn close_frame(&mut self, error: Option<&ErrorInfo>) {
        self.frame(0, |out| performative::encode_close(error, out));
    }

    /// Appends an AMQP frame; without a body it is a heartbeat.
    fn frame(&mut self, channel: u16, body: impl FnOnce(&mut BytesMut)) {
        append(&mut self.out, FrameType::Amqp { channel }, body);
    }

    /// Appends an AMQP frame whose performative a library writes. Whether the connection goes on.
    fn performative(
        &mut self,
        channel: u16,
        write: impl FnOnce(&mut BytesMut) -> Result<(), performative::EncodeError>,
    ) -> bool {
        let mut body = BytesMut::new();
        if let Err(error) = write(&mut body) {
            // What came in can be written again: it takes a fault of the library to get here.
            let error = ErrorInfo::new(condition::NOT_IMPLEMENTED, error.to_string());
            self.end(CloseCause::Fault(error));
            return false;
        }
        let max = self.peer_frame_bytes_max;
        if self.state == State::Opened && body.len() + FRAME_HEADER_BYTES > max as usize {
            let text = format!("the answer does not fit a frame of {max} bytes");
            self.fault(condition::FRAME_SIZE, text);
            return false;
        }
        self.frame(channel, |out| out.extend_from_slice(&body));
        true
    }
}

/// Appends a frame and puts its size right afterwards.
fn append(out: &mut BytesMut, frame_type: FrameType, body: impl FnOnce(&mut BytesMut)) {
    const NO_LIMITS: FrameLimits = FrameLimits {
        frame_bytes_max: u32::MAX,
        channel_max: u16::MAX,
    };
    let start = out.len();
    out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
    body(out);
    let body_bytes = out.len() - start - FRAME_HEADER_BYTES;
    // Frames of this side are far below the limits of the format.
    if let Ok(header) = FrameHeader::new(frame_type, body_bytes, NO_LIMITS)
        && let Some(head) = out.get_mut(start..start + FRAME_HEADER_BYTES)
    {
        head.copy_from_slice(&header.encode());
    }
}

#[cfg(test)]
mod edge_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod opening_tests;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod tests;
