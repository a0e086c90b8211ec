//! AMQP 1.0 from the client's side as a state machine: bytes in, bytes and events out, time passed
//! in.
//!
//! The protocol's layouts are [`edgehub_amqp`]'s; what links are good for is not known here. The
//! protocol header is the bare one, without SASL, as the C# and Node SDKs send it (spec/amqp.md
//! 1.2). Only we begin sessions and attach links.
//!
//! # Bounds
//!
//! A session has at most a window of deliveries under way and one that is sent in part; a link
//! holds at most one message in part. Nothing of the peer's makes this grow beyond that, loop over
//! a range that it names, or panic.

mod frames;
mod incoming;
mod outgoing;
mod session;
mod terms;

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use edgehub_amqp::{
    frame::{FrameHeader, FrameLimits, FrameType},
    header::ProtocolHeader,
    performative::{self, ErrorInfo},
};
use fe2o3_amqp_types::performatives::{ChannelMax, MaxFrameSize, Open};

use self::session::Session;
pub(crate) use self::terms::{
    ClientConfig, ClientError, Delivery, Direction, Event, LinkKey, LinkSpec, Reason, SendError,
    SessionKey,
};
use crate::limits;

/// How long our close waits for the peer's.
const CLOSE_MAX: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Header and open are written; the peer's header is awaited.
    Header,
    /// The peer's open is awaited.
    Opening,
    Open,
    /// Our close is written.
    Closing {
        since: Instant,
    },
    Over,
}

/// The state machine of one connection.
pub(crate) struct Client {
    config: ClientConfig,
    state: State,
    /// Largest frame that the peer takes.
    peer_frame_bytes: usize,
    /// How often something has to be said.
    heartbeat: Option<Duration>,
    sessions_max: usize,
    /// By our channel.
    sessions: Vec<Option<Session>>,
    /// From the peer's channel to ours.
    channels: HashMap<u16, u16>,
    generation: u64,
    events: VecDeque<Event>,
    output: BytesMut,
    /// Something was written since [`Client::said_at`] was set.
    said: bool,
    began_at: Instant,
    heard_at: Instant,
    said_at: Instant,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("state", &self.state)
            .field("sessions", &self.sessions.iter().flatten().count())
            .field("output", &self.output.len())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client whose output starts with the protocol header and open.
    pub(crate) fn new(config: ClientConfig, now: Instant) -> Self {
        let mut output = BytesMut::new();
        output.extend_from_slice(&ProtocolHeader::AMQP.encode());
        let told = config.idle / 2;
        let open = Open {
            container_id: config.container_id.clone(),
            hostname: Some(config.hostname.clone()),
            max_frame_size: MaxFrameSize(config.frame_bytes_max),
            channel_max: ChannelMax(limits::AMQP_CHANNEL_MAX),
            idle_time_out: Some(u32::try_from(told.as_millis()).unwrap_or(u32::MAX)),
            outgoing_locales: None,
            incoming_locales: None,
            offered_capabilities: None,
            desired_capabilities: None,
            properties: None,
        };
        // Texts and numbers: there is nothing that the encoder could refuse.
        let _ = frames::frame(&mut output, 0, |out| performative::encode_open(&open, out));
        Self {
            config,
            state: State::Header,
            peer_frame_bytes: 512,
            heartbeat: None,
            sessions_max: 0,
            sessions: Vec::new(),
            channels: HashMap::new(),
            generation: 0,
            events: VecDeque::new(),
            output,
            said: true,
            began_at: now,
            heard_at: now,
            said_at: now,
        }
    }

    /// The bytes have a way: times count from now.
    pub(crate) fn connected(&mut self, now: Instant) {
        self.began_at = now;
        self.heard_at = now;
        self.said_at = now;
    }

    /// The connection can be used.
    pub(crate) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// The next thing that happened.
    pub(crate) fn poll(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Bytes to write.
    pub(crate) fn output(&self) -> &[u8] {
        &self.output
    }

    /// Takes `n` bytes off the output: they were written.
    pub(crate) fn written(&mut self, n: usize) {
        self.output.advance(n.min(self.output.len()));
        if self.output.is_empty() && self.output.capacity() > limits::OUTPUT_KEEP_BYTES {
            // A burst must not stay allocated on an idle connection.
            self.output = BytesMut::new();
        }
    }

    /// Whether deliveries may be added to the output.
    pub(crate) fn has_room(&self) -> bool {
        self.state == State::Open && self.output.len() < limits::AMQP_OUTPUT_BYTES_MAX
    }

    /// Takes whole frames out of `input`. A fault is told as [`Event::Closed`].
    pub(crate) fn receive(&mut self, input: &mut BytesMut, now: Instant) {
        if let Err(fault) = self.take(input, now) {
            input.clear();
            self.fail(fault);
        }
        self.note_said(now);
    }

    /// When [`Client::handle_timeout`] has something to do next.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let idle = self.heard_at + self.config.idle;
        match self.state {
            State::Over => None,
            State::Header | State::Opening => Some(self.began_at + self.config.open_max),
            State::Closing { since } => Some(since + CLOSE_MAX),
            State::Open => {
                let heartbeat = self.heartbeat.map(|every| self.said_at + every);
                Some(heartbeat.map_or(idle, |at| at.min(idle)))
            }
        }
    }

    /// Does what is due at `now`: says that we are alive, or gives the peer up.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.note_said(now);
        match self.state {
            State::Over => {}
            State::Header | State::Opening => {
                if now >= self.began_at + self.config.open_max {
                    self.end(ClientError::OpenTimeout(self.config.open_max));
                }
            }
            State::Closing { since } => {
                if now >= since + CLOSE_MAX {
                    self.end(ClientError::Ours);
                }
            }
            State::Open => {
                if now >= self.heard_at + self.config.idle {
                    self.end(ClientError::Idle(self.config.idle));
                } else if self
                    .heartbeat
                    .is_some_and(|every| now >= self.said_at + every)
                {
                    frames::sure(&mut self.output, 0, |_| {});
                    self.said_at = now;
                }
            }
        }
    }

    /// Writes close; [`Event::Closed`] follows when the peer has answered or its time is over.
    pub(crate) fn close(&mut self, now: Instant) {
        match self.state {
            State::Open => {
                frames::sure(&mut self.output, 0, |out| {
                    performative::encode_close(None, out);
                });
                self.state = State::Closing { since: now };
            }
            State::Header | State::Opening => self.end(ClientError::Ours),
            State::Closing { .. } | State::Over => {}
        }
    }

    /// Remembers when something was last said: to be called after whatever may have written.
    pub(crate) fn note_said(&mut self, now: Instant) {
        if std::mem::take(&mut self.said) {
            self.said_at = now;
        }
    }

    fn take(&mut self, input: &mut BytesMut, now: Instant) -> Result<(), String> {
        while self.state != State::Over {
            if self.state == State::Header {
                match ProtocolHeader::decode(input) {
                    Ok(None) => return Ok(()),
                    Ok(Some(ProtocolHeader::AMQP)) => {
                        input.advance(edgehub_amqp::header::HEADER_BYTES);
                        self.heard_at = now;
                        self.state = State::Opening;
                        continue;
                    }
                    Ok(Some(other)) => return Err(format!("it asks for {:?} first", other.id)),
                    Err(error) => return Err(error.to_string()),
                }
            }
            let limits = FrameLimits {
                frame_bytes_max: self.config.frame_bytes_max,
                channel_max: limits::AMQP_CHANNEL_MAX,
            };
            let header = FrameHeader::decode(input, limits).map_err(|error| error.to_string())?;
            let Some(header) = header else {
                return Ok(());
            };
            let size = usize::try_from(header.size()).unwrap_or(usize::MAX);
            if input.len() < size {
                return Ok(());
            }
            let frame = input.split_to(size).freeze();
            self.heard_at = now;
            let FrameType::Amqp { channel } = header.frame_type() else {
                return Err("a SASL frame".to_owned());
            };
            if header.is_heartbeat() {
                continue;
            }
            let offset = usize::try_from(header.body_offset()).unwrap_or(usize::MAX);
            let body = frame.slice(offset.min(size)..);
            let (performative, payload) =
                performative::decode(&body).map_err(|error| error.to_string())?;
            self.handle(channel, performative, payload)?;
        }
        input.clear();
        Ok(())
    }

    /// The peer cannot be understood: it is told so, and that is the end.
    fn fail(&mut self, fault: String) {
        if matches!(self.state, State::Open | State::Opening) {
            let error = ErrorInfo::new("amqp:not-allowed", fault.clone());
            frames::sure(&mut self.output, 0, |out| {
                performative::encode_close(Some(&error), out);
            });
        }
        self.end(ClientError::Fault(fault));
    }

    fn end(&mut self, cause: ClientError) {
        if self.state != State::Over {
            self.state = State::Over;
            self.sessions.clear();
            self.channels.clear();
            self.events.push_back(Event::Closed(cause));
        }
    }

    fn session_mut(&mut self, key: SessionKey) -> Option<&mut Session> {
        let session = self.sessions.get_mut(usize::from(key.channel))?.as_mut()?;
        (session.key == key).then_some(session)
    }

    fn session(&self, key: SessionKey) -> Option<&Session> {
        let session = self.sessions.get(usize::from(key.channel))?.as_ref()?;
        (session.key == key).then_some(session)
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
