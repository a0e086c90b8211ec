//! Frames of an open connection: what each performative does (part 2, 2.7).

use bytes::{Bytes, BytesMut};
use fe2o3_amqp_types::definitions::{Handle, Role};
use fe2o3_amqp_types::performatives::{Begin, Detach};

use super::attach::Attach;
use super::event::{CloseCause, Event, LinkId};
use super::link::{Direction, Link, Phase, Receiving, Sending};
use super::opening::body;
use super::session::Session;
use super::{Connection, State, condition};
use crate::frame::{FRAMING_ERROR, FrameHeader, FrameLimits, FrameType};
use crate::limits::{NAME_BYTES_MAX, REFUSED_LINKS_MAX};
use crate::performative::{self, AttachFrame, ErrorInfo, Flow, Performative};

impl Connection {
    /// Takes a frame. Whether there may be more to take.
    pub(super) fn take_frame(&mut self, input: &mut BytesMut) -> bool {
        let limits = FrameLimits {
            frame_bytes_max: self.config.frame_bytes_max,
            channel_max: self.config.channel_max,
        };
        let header = match FrameHeader::decode(input, limits) {
            Ok(None) => return false,
            Ok(Some(header)) => header,
            Err(error) => {
                self.fault(FRAMING_ERROR, error.to_string());
                return true;
            }
        };
        let size = header.size() as usize;
        if input.len() < size {
            return false;
        }
        let frame = input.split_to(size).freeze();
        let FrameType::Amqp { channel } = header.frame_type() else {
            self.fault(FRAMING_ERROR, "a SASL frame behind SASL");
            return true;
        };
        if header.is_heartbeat() {
            return true;
        }
        match performative::decode(&body(&frame, header)) {
            Ok((performative, payload)) => {
                let bytes = size.saturating_sub(payload.len());
                self.dispatch(channel, performative, payload, bytes);
            }
            Err(error) => self.fault(condition::DECODE_ERROR, error.to_string()),
        }
        true
    }

    /// `bytes` is the size of the frame without its payload.
    fn dispatch(&mut self, channel: u16, performative: Performative, payload: Bytes, bytes: usize) {
        match self.state {
            State::Open => {
                return match performative {
                    Performative::Open(open) => self.take_open(*open),
                    _ => self.fault(condition::ILLEGAL_STATE, "the first frame is an open"),
                };
            }
            State::Closing => {
                // Everything behind our close is void but the answer to it.
                if let Performative::Close(_) = performative {
                    self.end(CloseCause::Ours);
                }
                return;
            }
            _ => {}
        }
        match performative {
            Performative::Open(_) => self.fault(condition::ILLEGAL_STATE, "a second open"),
            Performative::Close(close) => {
                self.flush();
                self.close_frame(None);
                self.end(CloseCause::Peer(close.error.map(ErrorInfo::from)));
            }
            Performative::Begin(begin) => self.take_begin(channel, &begin),
            other => self.dispatch_session(channel, other, payload, bytes),
        }
    }

    fn dispatch_session(
        &mut self,
        channel: u16,
        performative: Performative,
        payload: Bytes,
        bytes: usize,
    ) {
        let Some(session) = self.sessions.get(&channel) else {
            return match performative {
                // Late, for what is gone on our side too (spec/amqp.md 2.2).
                Performative::End(_) | Performative::Detach(_) => {}
                _ => self.fault(
                    condition::NOT_FOUND,
                    format!("no session on channel {channel}"),
                ),
            };
        };
        if session.ending {
            if let Performative::End(_) = performative {
                self.sessions.remove(&channel);
            }
            return;
        }
        match performative {
            Performative::Attach(frame) => self.take_attach(channel, *frame, bytes),
            Performative::Flow(flow) => self.take_flow(channel, &flow),
            Performative::Transfer(transfer) => self.take_transfer(channel, transfer, payload),
            Performative::Disposition(disposition) => {
                // What the peer says as a sender about what we settle anyway needs no answer.
                if disposition.role == Role::Receiver
                    && let Some(session) = self.sessions.get_mut(&channel)
                {
                    let events = &mut self.events;
                    session.disposed(&disposition, |link, sent, outcome| {
                        events.push_back(Event::Settled {
                            link,
                            sent,
                            outcome,
                            settled: disposition.settled,
                        });
                    });
                }
            }
            Performative::Detach(detach) => self.take_detach(channel, detach),
            Performative::End(end) => {
                self.flush_session(channel);
                let error = end.error.map(ErrorInfo::from);
                self.drop_links(channel, error.as_ref());
                self.sessions.remove(&channel);
                self.frame(channel, |out| performative::encode_end(None, out));
            }
            Performative::Open(_) | Performative::Begin(_) | Performative::Close(_) => {}
        }
    }

    fn take_begin(&mut self, channel: u16, begin: &Begin) {
        if self.sessions.contains_key(&channel) {
            let text = format!("channel {channel} has a session already");
            return self.fault(condition::ILLEGAL_STATE, text);
        }
        let window = self.config.incoming_window;
        let mut session = Session::new(begin.next_outgoing_id, begin.incoming_window, window);
        let reply = Begin {
            remote_channel: Some(channel),
            next_outgoing_id: session.next_outgoing_id,
            incoming_window: window,
            outgoing_window: window,
            handle_max: Handle(self.config.handle_max),
            offered_capabilities: None,
            desired_capabilities: None,
            properties: None,
        };
        // Sessions that were refused and not ended by the peer count too, so that there are never
        // more entries than channels.
        let full = self.sessions.len() >= self.config.sessions_max;
        session.ending = full;
        self.sessions.insert(channel, session);
        let begun = self.performative(channel, |out| performative::encode_begin(&reply, out));
        if full && begun {
            let limit = self.config.sessions_max;
            let text = format!("a connection has at most {limit} sessions");
            let error = ErrorInfo::new(condition::RESOURCE_LIMIT, text);
            self.frame(channel, |out| performative::encode_end(Some(&error), out));
        }
    }

    fn take_attach(&mut self, channel: u16, frame: AttachFrame, bytes: usize) {
        let attach = Attach::new(frame, bytes);
        let handle = attach.handle();
        if handle > self.config.handle_max {
            let text = format!("handle {handle} is above {}", self.config.handle_max);
            return self.fault(FRAMING_ERROR, text);
        }
        if attach.name().len() > NAME_BYTES_MAX {
            let text = format!("a link's name has at most {NAME_BYTES_MAX} bytes");
            return self.fail_session(channel, condition::INVALID_FIELD, &text);
        }
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        if session.links.contains_key(&handle) {
            let text = format!("handle {handle} is in use");
            return self.fail_session(channel, condition::HANDLE_IN_USE, &text);
        }
        if session.has_name(attach.peer_sends(), attach.name()) {
            // As the reference does (spec/amqp.md 2.4).
            let text = "the session has a link of this name";
            return self.fail_session(channel, condition::RESOURCE_LOCKED, text);
        }
        if self.links >= self.config.links_max.saturating_add(REFUSED_LINKS_MAX) {
            let text = "too many links were refused and are not detached";
            return self.fault(condition::RESOURCE_LIMIT, text);
        }
        self.generation += 1;
        let id = LinkId {
            channel,
            handle,
            generation: self.generation,
        };
        let direction = if attach.peer_sends() {
            Direction::Receiving(Receiving {
                delivery_count: attach.initial_delivery_count(),
                ..Receiving::default()
            })
        } else {
            Direction::Sending(Sending {
                max_message_size: attach.max_message_size(),
                ..Sending::default()
            })
        };
        session.add_link(
            handle,
            Link {
                generation: self.generation,
                name: attach.name().into(),
                has_name: true,
                phase: Phase::Asked(attach.clone()),
                direction,
            },
        );
        self.links += 1;
        self.asked_bytes += bytes;
        if self.links > self.config.links_max {
            let text = format!("a connection has at most {} links", self.config.links_max);
            return self.refuse(id, &ErrorInfo::new(condition::RESOURCE_LIMIT, text));
        }
        if attach.is_coordinator() {
            let text = "transactions are not served";
            return self.refuse(id, &ErrorInfo::new(condition::NOT_IMPLEMENTED, text));
        }
        self.events.push_back(Event::Attached { link: id, attach });
    }

    fn take_detach(&mut self, channel: u16, detach: Detach) {
        let handle = detach.handle.0;
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let Some(link) = session.links.get(&handle) else {
            // The answer to a detach that crossed with ours.
            return;
        };
        let id = LinkId {
            channel,
            handle,
            generation: link.generation,
        };
        let refusal = match &link.phase {
            Phase::Asked(attach) => Some(attach.refusal()),
            _ => None,
        };
        let answered = matches!(link.phase, Phase::Detaching);
        self.flush_session(channel);
        if let Some(refusal) = refusal {
            // It is attached on paper, so that it can be detached.
            if !self.performative(channel, |out| performative::encode_attach(&refusal, out)) {
                return;
            }
        }
        self.remove_link(id, detach.error.map(ErrorInfo::from));
        if !answered {
            // Closed whatever the peer said: nothing is kept to come back to (spec/amqp.md 2.5).
            self.frame(channel, |out| {
                performative::encode_detach(handle, true, None, out);
            });
        }
    }

    fn take_flow(&mut self, channel: u16, flow: &Flow) {
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        // Part 2, 2.5.6. A peer that has not seen our begin counts from its beginning.
        let seen = flow.next_incoming_id.unwrap_or(1);
        let ahead = session.next_outgoing_id.wrapping_sub(seen);
        let was_full = !session.has_room();
        session.remote_incoming_window = flow.incoming_window.saturating_sub(ahead);
        session.next_incoming_id = flow.next_outgoing_id;
        if was_full {
            self.flush_waiting(channel);
            self.reopen(channel);
        }
        let Some(handle) = flow.handle else {
            if flow.echo {
                self.session_flow(channel, false);
            }
            return;
        };
        self.take_link_flow(channel, handle, flow);
    }

    fn take_link_flow(&mut self, channel: u16, handle: u32, flow: &Flow) {
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let Some(link) = session.links.get_mut(&handle) else {
            let text = format!("handle {handle} has no link");
            return self.fail_session(channel, condition::UNATTACHED_HANDLE, &text);
        };
        let id = LinkId {
            channel,
            handle,
            generation: link.generation,
        };
        if matches!(link.phase, Phase::Detaching) {
            return;
        }
        let is_attached = matches!(link.phase, Phase::Attached);
        let echo = match &mut link.direction {
            Direction::Sending(sending) => {
                let credit = flow.link_credit.unwrap_or(0);
                let changed = sending.flow(flow.delivery_count, credit, flow.drain);
                if !is_attached {
                    // Told, and answered, when it is accepted.
                    sending.echo |= flow.echo;
                    return;
                }
                if changed || flow.drain {
                    self.events.push_back(Event::Credit {
                        link: id,
                        credit: sending.credit,
                        drain: flow.drain,
                    });
                }
                flow.echo
            }
            Direction::Receiving(receiving) => {
                // The sender has used credit up without sending (drain).
                if let Some(count) = flow.delivery_count {
                    let ahead = count.wrapping_sub(receiving.delivery_count);
                    if ahead <= receiving.credit {
                        receiving.delivery_count = count;
                        receiving.credit -= ahead;
                    }
                }
                receiving.flow_due |= flow.echo;
                session.list(handle);
                self.stir(channel);
                false
            }
        };
        if echo {
            self.sender_flow(id);
        }
    }

    /// Tells the peer where a link that we send on stands.
    pub(super) fn sender_flow(&mut self, id: LinkId) {
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        let Some(sending) = session.sending(id) else {
            return;
        };
        let (delivery_count, credit) = (sending.delivery_count, sending.credit);
        let drain = sending.drain;
        let flow = Flow {
            handle: Some(id.handle),
            delivery_count: Some(delivery_count),
            link_credit: Some(credit),
            available: Some(0),
            drain,
            ..self.session_terms(id.channel)
        };
        self.frame(id.channel, |out| performative::encode_flow(&flow, out));
    }

    /// The peer's window may have room again: its links can go on, which they are told once all
    /// that arrived is worked off.
    fn reopen(&mut self, channel: u16) {
        if let Some(session) = self.sessions.get_mut(&channel)
            && session.has_room()
            && !std::mem::replace(&mut session.is_reopened, true)
        {
            self.reopened.push(channel);
        }
    }

    /// Tells the links of sessions whose windows have room again.
    pub(super) fn tell_reopened(&mut self) {
        for channel in std::mem::take(&mut self.reopened) {
            let Some(session) = self.sessions.get_mut(&channel) else {
                continue;
            };
            session.is_reopened = false;
            let mut open: Vec<_> = session
                .links
                .iter()
                .filter_map(|(handle, link)| match (&link.phase, &link.direction) {
                    (Phase::Attached, Direction::Sending(sending)) if sending.credit > 0 => {
                        let generation = link.generation;
                        Some((*handle, generation, sending.credit, sending.drain))
                    }
                    _ => None,
                })
                .collect();
            open.sort_unstable();
            for (handle, generation, credit, drain) in open {
                let link = LinkId {
                    channel,
                    handle,
                    generation,
                };
                self.events.push_back(Event::Credit {
                    link,
                    credit,
                    drain,
                });
            }
        }
    }
}
