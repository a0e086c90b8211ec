//! What the driver asks for: sessions, links, deliveries, settlements.

use bytes::Bytes;
use edgehub_amqp::performative::{self, DeliveryState, Disposition, Flow, Outcome, Transfer};
use fe2o3_amqp_types::{
    definitions::{Fields, Handle, ReceiverSettleMode, Role, SenderSettleMode},
    messaging::{Source, Target, TargetArchetype},
    performatives::{Attach, Begin},
};
use serde_amqp::{Value, primitives::Symbol};

use super::{
    Client, State, frames,
    session::{First, Link, LinkState, Pending, Session, SessionState},
    terms::{Direction, LinkKey, LinkSpec, SendError, SessionKey},
};
use crate::limits;

impl Client {
    /// Begins a session; none when the peer takes no more of them, or the connection is not open.
    pub(crate) fn begin(&mut self) -> Option<SessionKey> {
        if self.state != State::Open {
            return None;
        }
        let free = self.sessions.iter().position(Option::is_none);
        let index = free.unwrap_or(self.sessions.len());
        if index >= self.sessions_max {
            return None;
        }
        let channel = u16::try_from(index).ok()?;
        self.generation += 1;
        let key = SessionKey {
            channel,
            generation: self.generation,
        };
        let begin = Begin {
            remote_channel: None,
            next_outgoing_id: 0,
            incoming_window: limits::AMQP_INCOMING_WINDOW,
            outgoing_window: limits::AMQP_INCOMING_WINDOW,
            handle_max: Handle(limits::AMQP_HANDLE_MAX),
            offered_capabilities: None,
            desired_capabilities: None,
            properties: None,
        };
        let _ = frames::frame(&mut self.output, channel, |out| {
            performative::encode_begin(&begin, out)
        });
        self.said = true;
        let session = Session::new(key, limits::AMQP_INCOMING_WINDOW);
        match self.sessions.get_mut(index) {
            Some(place) => *place = Some(session),
            None => self.sessions.push(Some(session)),
        }
        Some(key)
    }

    /// Ends a session and everything in it. Nothing more is told about it.
    pub(crate) fn end_session(&mut self, key: SessionKey) {
        let Some(session) = self.session_mut(key) else {
            return;
        };
        if session.state == SessionState::Ending {
            return;
        }
        session.state = SessionState::Ending;
        session.links.clear();
        session.remote_handles.clear();
        session.unsettled.clear();
        session.pending = None;
        frames::sure(&mut self.output, key.channel, |out| {
            performative::encode_end(None, out);
        });
        self.said = true;
    }

    /// Attaches a link in a session that has begun. `Event::Attached` or `Event::Detached` answers.
    pub(crate) fn attach(&mut self, key: SessionKey, spec: LinkSpec) -> Option<LinkKey> {
        self.generation += 1;
        let generation = self.generation;
        let session = self.session_mut(key)?;
        if session.state != SessionState::Mapped {
            return None;
        }
        let (is_up, credit_max, second) = match spec.direction {
            Direction::Up => (true, 0, false),
            Direction::Down { credit, second } => (false, credit, second),
        };
        let handle = session.insert(Link {
            generation,
            name: spec.name.clone(),
            is_up,
            state: LinkState::Attaching,
            remote_handle: None,
            delivery_count: 0,
            credit: 0,
            max_message_size: None,
            settled: spec.settled,
            second,
            credit_max,
            held: 0,
            partial: None,
        });
        let attach = performative_of(spec, handle, is_up, second);
        let written = frames::frame(&mut self.output, key.channel, |out| {
            performative::encode_attach(&attach, out)
        });
        self.said = true;
        written.ok()?;
        Some(LinkKey {
            session: key,
            handle,
            generation,
        })
    }

    /// Detaches a link for good. Nothing more is told about it.
    pub(crate) fn detach(&mut self, link: LinkKey) {
        let Some(session) = self.session_of(link) else {
            return;
        };
        session.forget_deliveries(link.handle);
        let Some(found) = session.link_mut(link.handle) else {
            return;
        };
        if found.state == LinkState::Detaching {
            return;
        }
        found.state = LinkState::Detaching;
        frames::sure(&mut self.output, link.session.channel, |out| {
            performative::encode_detach(link.handle, true, None, out);
        });
        self.said = true;
    }

    /// Whether [`Client::send`] would send now.
    pub(crate) fn can_send(&self, link: LinkKey) -> bool {
        let Some(session) = self.session(link.session) else {
            return false;
        };
        let has_credit = session.link(link.handle).is_some_and(|found| {
            found.generation == link.generation
                && found.is_up
                && found.state == LinkState::Attached
                && found.credit > 0
        });
        has_credit
            && self.has_room()
            && session.state == SessionState::Mapped
            && session.pending.is_none()
            && session.remote_window > 0
    }

    /// Sends a delivery; gives its number, by which `Event::Settled` names it.
    pub(crate) fn send(
        &mut self,
        link: LinkKey,
        message_format: u32,
        payload: Bytes,
    ) -> Result<u32, SendError> {
        if !self.can_send(link) {
            return Err(SendError::NoRoom);
        }
        let Some(session) = self.session_of(link) else {
            return Err(SendError::NoRoom);
        };
        let number = session.next_delivery;
        let Some(found) = session.link_mut(link.handle) else {
            return Err(SendError::NoRoom);
        };
        let too_large = |max: u64| max > 0 && payload.len() as u64 > max;
        if found.max_message_size.is_some_and(too_large) {
            return Err(SendError::TooLarge);
        }
        found.credit -= 1;
        found.delivery_count = found.delivery_count.wrapping_add(1);
        let settled = found.settled;
        session.next_delivery = number.wrapping_add(1);
        if !settled {
            session.unsettled.push_back((number, link.handle));
        }
        session.pending = Some(Pending {
            handle: link.handle,
            first: Some(First {
                number,
                message_format,
                settled,
            }),
            rest: payload,
        });
        self.push_pending(link.session.channel);
        Ok(number)
    }

    /// Says what becomes of a delivery that arrived; it is forgotten then. Not for one that came
    /// settled.
    pub(crate) fn settle(&mut self, link: LinkKey, number: u32, outcome: Outcome) {
        let Some(session) = self.session_of(link) else {
            return;
        };
        let Some(found) = session.link(link.handle) else {
            return;
        };
        if found.state != LinkState::Attached {
            return;
        }
        let disposition = Disposition {
            role: Role::Receiver,
            first: number,
            last: None,
            settled: !found.second,
            state: Some(DeliveryState::Outcome(outcome)),
            batchable: false,
        };
        frames::sure(&mut self.output, link.session.channel, |out| {
            performative::encode_disposition(&disposition, out);
        });
        self.said = true;
    }

    /// One of the deliveries that are with us is done with: the peer may send another.
    pub(crate) fn release(&mut self, link: LinkKey) {
        let Some(session) = self.session_of(link) else {
            return;
        };
        let Some(found) = session.link_mut(link.handle) else {
            return;
        };
        found.held = found.held.saturating_sub(1);
        if found.state != LinkState::Attached || found.credit > found.credit_max / 2 {
            return;
        }
        let credit = found.credit_max.saturating_sub(found.held);
        if credit > found.credit {
            self.grant(link.session.channel, link.handle);
        }
    }

    /// Gives a link that we receive on its full credit.
    pub(super) fn grant(&mut self, channel: u16, handle: u32) {
        let Some(session) = self.at(channel) else {
            return;
        };
        if let Some(link) = session.link_mut(handle) {
            link.credit = link.credit_max.saturating_sub(link.held);
        }
        self.flow(channel, Some(handle));
    }

    /// Writes a flow: the session's windows, and a link's credit.
    pub(super) fn flow(&mut self, channel: u16, handle: Option<u32>) {
        let Some(session) = self.at(channel) else {
            return;
        };
        session.incoming_left = limits::AMQP_INCOMING_WINDOW;
        let link = handle.and_then(|handle| session.link(handle));
        let flow = Flow {
            next_incoming_id: Some(session.next_incoming_id),
            incoming_window: session.incoming_left,
            next_outgoing_id: session.next_outgoing_id,
            outgoing_window: limits::AMQP_INCOMING_WINDOW,
            handle: link.and(handle),
            delivery_count: link.map(|link| link.delivery_count),
            link_credit: link.map(|link| link.credit),
            available: link.filter(|link| link.is_up).map(|_| 0),
            drain: false,
            echo: false,
        };
        frames::sure(&mut self.output, channel, |out| {
            performative::encode_flow(&flow, out);
        });
        self.said = true;
    }

    /// Sends as much of the delivery under way as the session's window takes.
    pub(super) fn push_pending(&mut self, channel: u16) {
        let place = self.sessions.get_mut(usize::from(channel));
        let Some(session) = place.and_then(Option::as_mut) else {
            return;
        };
        while session.remote_window > 0 {
            let Some(pending) = &mut session.pending else {
                return;
            };
            let mut transfer = Transfer {
                handle: pending.handle,
                ..Transfer::default()
            };
            if let Some(first) = pending.first.take() {
                transfer.delivery_id = Some(first.number);
                transfer.delivery_tag = Some(Bytes::copy_from_slice(&first.number.to_be_bytes()));
                transfer.message_format = Some(first.message_format);
                transfer.settled = Some(first.settled);
                transfer.batchable = !first.settled;
            }
            let (out, rest) = (&mut self.output, &mut pending.rest);
            frames::transfer(out, channel, self.peer_frame_bytes, transfer, rest);
            let is_done = pending.rest.is_empty();
            if is_done {
                session.pending = None;
            }
            session.remote_window -= 1;
            session.next_outgoing_id = session.next_outgoing_id.wrapping_add(1);
            self.said = true;
        }
    }

    pub(super) fn at(&mut self, channel: u16) -> Option<&mut Session> {
        self.sessions.get_mut(usize::from(channel))?.as_mut()
    }

    /// The session of a link that is still the one that is meant.
    fn session_of(&mut self, link: LinkKey) -> Option<&mut Session> {
        let session = self.session_mut(link.session)?;
        let found = session.link(link.handle)?;
        (found.generation == link.generation).then_some(session)
    }
}

fn performative_of(spec: LinkSpec, handle: u32, is_up: bool, second: bool) -> Attach {
    let (source, target) = if is_up {
        (spec.own_address, spec.address)
    } else {
        (spec.address, spec.own_address)
    };
    let properties: Fields = spec
        .properties
        .into_iter()
        .map(|(key, value)| (Symbol::from(key), Value::String(value)))
        .collect();
    Attach {
        name: spec.name,
        handle: Handle(handle),
        role: if is_up { Role::Sender } else { Role::Receiver },
        snd_settle_mode: match (spec.settled, is_up) {
            (true, _) => SenderSettleMode::Settled,
            (false, true) => SenderSettleMode::Unsettled,
            (false, false) => SenderSettleMode::Mixed,
        },
        rcv_settle_mode: if second {
            ReceiverSettleMode::Second
        } else {
            ReceiverSettleMode::First
        },
        source: Some(Box::new(Source {
            address: Some(source),
            ..Source::default()
        })),
        target: Some(Box::new(TargetArchetype::Target(Target {
            address: Some(target),
            ..Target::default()
        }))),
        unsettled: None,
        incomplete_unsettled: false,
        initial_delivery_count: is_up.then_some(0),
        max_message_size: (!is_up).then_some(limits::AMQP_DELIVERY_BYTES_MAX),
        offered_capabilities: None,
        desired_capabilities: None,
        properties: (!properties.is_empty()).then_some(properties),
    }
}
