//! What the peer says.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use edgehub_amqp::performative::{
    self, DeliveryState, Disposition, ErrorInfo, Flow, Outcome, Performative, Transfer,
};
use fe2o3_amqp_types::{
    definitions::{ReceiverSettleMode, Role},
    performatives::{Attach, Begin, Detach, End, Open},
};

use super::{
    Client, State, frames,
    session::{LinkState, Partial, Session, SessionState, is_within},
    terms::{ClientError, Delivery, Event, LinkKey},
};
use crate::limits;

/// Smallest `max-frame-size` that the standard admits.
const FRAME_BYTES_MIN: u32 = 512;

/// A peer that gives up after less than twice this cannot be pleased.
const HEARTBEAT_MIN: Duration = Duration::from_millis(250);

/// What a frame of a session does to it, beyond what it says.
enum Fate {
    GoOn,
    /// The session is broken: it ends with this error.
    End(&'static str),
}

impl Client {
    pub(super) fn handle(
        &mut self,
        channel: u16,
        performative: Performative,
        payload: Bytes,
    ) -> Result<(), String> {
        match (self.state, performative) {
            (State::Opening, Performative::Open(open)) => self.opened(&open),
            (_, Performative::Close(close)) => {
                if self.state != State::Over {
                    if !matches!(self.state, State::Closing { .. }) {
                        frames::sure(&mut self.output, 0, |out| {
                            performative::encode_close(None, out);
                        });
                    }
                    let cause = match (self.state, close.error) {
                        (State::Closing { .. }, None) => ClientError::Ours,
                        (_, error) => ClientError::Peer(error.map(ErrorInfo::from)),
                    };
                    self.end(cause);
                }
                Ok(())
            }
            // What was under way when we closed.
            (State::Closing { .. }, _) => Ok(()),
            (State::Open, performative) => self.in_session(channel, performative, payload),
            (_, performative) => Err(format!("{} before open", name(&performative))),
        }
    }

    fn opened(&mut self, open: &Open) -> Result<(), String> {
        let bytes = open.max_frame_size.0;
        if bytes < FRAME_BYTES_MIN {
            return Err(format!("max-frame-size {bytes} is below {FRAME_BYTES_MIN}"));
        }
        let bytes = bytes.min(limits::AMQP_FRAME_BYTES_MAX);
        self.peer_frame_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.heartbeat = open
            .idle_time_out
            .filter(|ms| *ms > 0)
            .map(|ms| (Duration::from_millis(u64::from(ms)) / 2).max(HEARTBEAT_MIN));
        let channels = open.channel_max.0.min(limits::AMQP_CHANNEL_MAX);
        self.sessions_max = usize::from(channels) + 1;
        self.state = State::Open;
        self.events.push_back(Event::Opened {
            sessions_max: self.sessions_max,
        });
        Ok(())
    }

    fn in_session(
        &mut self,
        channel: u16,
        performative: Performative,
        payload: Bytes,
    ) -> Result<(), String> {
        if let Performative::Begin(begin) = performative {
            return self.begun(channel, &begin);
        }
        let Some(ours) = self.channels.get(&channel).copied() else {
            let name = name(&performative);
            return Err(format!("{name} on channel {channel}, which has no session"));
        };
        if let Performative::End(end) = performative {
            self.ended(channel, ours, end);
            return Ok(());
        }
        if self
            .at(ours)
            .is_none_or(|session| session.state == SessionState::Ending)
        {
            return Ok(());
        }
        let fate = match performative {
            Performative::Attach(attach) => self.attached(ours, &attach.attach),
            Performative::Flow(flow) => self.flowed(ours, &flow),
            Performative::Transfer(transfer) => self.transferred(ours, &transfer, payload)?,
            Performative::Disposition(disposition) => self.disposed(ours, &disposition),
            Performative::Detach(detach) => self.detached(ours, detach),
            other => return Err(format!("unexpected {}", name(&other))),
        };
        if let Fate::End(condition) = fate {
            self.break_session(ours, condition);
        }
        Ok(())
    }

    fn begun(&mut self, channel: u16, begin: &Begin) -> Result<(), String> {
        let Some(ours) = begin.remote_channel else {
            return Err("it begins a session".to_owned());
        };
        if self.channels.contains_key(&channel) {
            return Err(format!("begin on channel {channel}, which has a session"));
        }
        let Some(session) = self.at(ours).filter(|one| one.remote_channel.is_none()) else {
            return Err(format!("begin for channel {ours}, which waits for none"));
        };
        session.remote_channel = Some(channel);
        session.next_incoming_id = begin.next_outgoing_id;
        session.remote_window = begin.incoming_window;
        let key = session.key;
        let is_wanted = session.state == SessionState::Beginning;
        if is_wanted {
            session.state = SessionState::Mapped;
        }
        self.channels.insert(channel, ours);
        if is_wanted {
            self.events.push_back(Event::Begun(key));
        }
        Ok(())
    }

    fn ended(&mut self, channel: u16, ours: u16, end: End) {
        self.channels.remove(&channel);
        let place = self.sessions.get_mut(usize::from(ours));
        let Some(session) = place.and_then(Option::take) else {
            return;
        };
        if session.state == SessionState::Ending {
            return;
        }
        frames::sure(&mut self.output, ours, |out| {
            performative::encode_end(None, out);
        });
        self.said = true;
        self.events.push_back(Event::Ended {
            session: session.key,
            error: end.error.map(ErrorInfo::from),
        });
    }

    /// Ends a session because of what the peer did in it.
    fn break_session(&mut self, ours: u16, condition: &'static str) {
        let Some(session) = self.at(ours) else {
            return;
        };
        let key = session.key;
        session.state = SessionState::Ending;
        session.links.clear();
        session.remote_handles.clear();
        session.unsettled.clear();
        session.pending = None;
        let error = ErrorInfo {
            condition: condition.into(),
            description: None,
        };
        frames::sure(&mut self.output, ours, |out| {
            performative::encode_end(Some(&error), out);
        });
        self.said = true;
        self.events.push_back(Event::Ended {
            session: key,
            error: Some(ErrorInfo::new(condition, "we ended the session")),
        });
    }

    fn attached(&mut self, ours: u16, attach: &Attach) -> Fate {
        let Some(session) = self.at(ours) else {
            return Fate::GoOn;
        };
        let remote = attach.handle.0;
        let is_up = attach.role == Role::Receiver;
        let waiting = session.links.iter_mut().zip(0_u32..);
        let found = waiting
            .filter_map(|(link, handle)| Some((link.as_mut()?, handle)))
            .find(|(link, _)| {
                link.is_up == is_up && link.remote_handle.is_none() && link.name == attach.name
            });
        let Some((link, handle)) = found else {
            return Fate::End("amqp:not-allowed");
        };
        if session.remote_handles.contains_key(&remote) {
            return Fate::End("amqp:session:handle-in-use");
        }
        link.remote_handle = Some(remote);
        session.remote_handles.insert(remote, handle);
        if link.state != LinkState::Attaching {
            return Fate::GoOn;
        }
        let terminus = if is_up {
            attach.target.is_some()
        } else {
            attach.source.is_some()
        };
        if !terminus {
            link.state = LinkState::Refused;
            return Fate::GoOn;
        }
        link.state = LinkState::Attached;
        link.max_message_size = attach.max_message_size.filter(|_| is_up);
        if !is_up {
            link.second = attach.rcv_settle_mode == ReceiverSettleMode::Second;
            link.delivery_count = attach.initial_delivery_count.unwrap_or(0);
        }
        let max_message_size = link.max_message_size;
        let key = session.key_of(handle);
        if !is_up {
            self.grant(ours, handle);
        }
        self.events.extend(key.map(|link| Event::Attached {
            link,
            max_message_size,
        }));
        Fate::GoOn
    }

    fn flowed(&mut self, ours: u16, flow: &Flow) -> Fate {
        let Some(session) = self.at(ours) else {
            return Fate::GoOn;
        };
        session.window(flow.next_incoming_id, flow.incoming_window);
        let key = session.key;
        let mut answer = flow.echo.then_some(None);
        if let Some(remote) = flow.handle {
            let Some(handle) = session.remote_handles.get(&remote).copied() else {
                return Fate::End("amqp:session:unattached-handle");
            };
            if let Some(link) = session.link_mut(handle) {
                if link.is_up {
                    let end = flow
                        .delivery_count
                        .unwrap_or(0)
                        .wrapping_add(flow.link_credit.unwrap_or(0));
                    let credit = end.wrapping_sub(link.delivery_count);
                    // Deliveries under way may have used up more than the peer knew of.
                    link.credit = if credit > u32::MAX / 2 { 0 } else { credit };
                    if flow.drain {
                        // We have nothing that has to leave now.
                        link.delivery_count = link.delivery_count.wrapping_add(link.credit);
                        link.credit = 0;
                        answer = Some(Some(handle));
                    }
                } else if let Some(count) = flow.delivery_count {
                    link.delivery_count = count;
                }
                if flow.echo {
                    answer = Some(Some(handle));
                }
            }
        }
        if let Some(handle) = answer {
            self.flow(ours, handle);
        }
        self.push_pending(ours);
        self.events.push_back(Event::Credit(key));
        Fate::GoOn
    }

    fn transferred(
        &mut self,
        ours: u16,
        transfer: &Transfer,
        payload: Bytes,
    ) -> Result<Fate, String> {
        let Some(session) = self.at(ours) else {
            return Ok(Fate::GoOn);
        };
        if session.incoming_left == 0 {
            return Ok(Fate::End("amqp:session:window-violation"));
        }
        session.incoming_left -= 1;
        session.next_incoming_id = session.next_incoming_id.wrapping_add(1);
        let is_low = session.incoming_left < limits::AMQP_INCOMING_WINDOW / 2;
        let Some(handle) = session.remote_handles.get(&transfer.handle).copied() else {
            return Ok(Fate::End("amqp:session:unattached-handle"));
        };
        let taken = take_transfer(session, handle, transfer, payload);
        if is_low {
            self.flow(ours, None);
        }
        match taken {
            Taken::Nothing => {}
            Taken::Aborted(link) => self.release(link),
            Taken::Whole(delivery) => self.events.push_back(Event::Delivery(delivery)),
            Taken::Broken(condition) => self.refuse_link(ours, handle, condition),
        }
        Ok(Fate::GoOn)
    }

    /// Detaches a link because of what the peer did on it.
    fn refuse_link(&mut self, ours: u16, handle: u32, condition: &'static str) {
        let Some(session) = self.at(ours) else {
            return;
        };
        let key = session.key_of(handle);
        session.forget_deliveries(handle);
        if let Some(link) = session.link_mut(handle) {
            link.state = LinkState::Detaching;
        }
        let error = ErrorInfo::new(condition, "the transfer is not taken");
        frames::sure(&mut self.output, ours, |out| {
            performative::encode_detach(handle, true, Some(&error), out);
        });
        self.said = true;
        self.events.extend(key.map(|link| Event::Detached {
            link,
            error: Some(error),
        }));
    }

    fn disposed(&mut self, ours: u16, disposition: &Disposition) -> Fate {
        let first = disposition.first;
        let last = disposition.last.unwrap_or(first);
        let Some(session) = self.at(ours) else {
            return Fate::GoOn;
        };
        if disposition.role == Role::Sender {
            // It settles what we have settled: there is nothing that we would wait for.
            return Fate::GoOn;
        }
        let outcome = match &disposition.state {
            Some(DeliveryState::Outcome(outcome)) => Some(outcome.clone()),
            Some(_) | None => None,
        };
        if !disposition.settled && outcome.is_none() {
            // How far a delivery came, perhaps: of no meaning here.
            return Fate::GoOn;
        }
        // Our own list is walked, never the range that the peer names.
        let mut settled = Vec::new();
        session.unsettled.retain(|(number, handle)| {
            let is_meant = is_within(*number, first, last);
            if is_meant {
                settled.push((*number, *handle));
            }
            !is_meant
        });
        let events: Vec<Event> = settled
            .iter()
            .filter_map(|(number, handle)| {
                Some(Event::Settled {
                    link: session.key_of(*handle)?,
                    number: *number,
                    outcome: outcome.clone(),
                })
            })
            .collect();
        self.events.extend(events);
        if !disposition.settled {
            // The peer waits for us to settle.
            for (number, _) in settled {
                self.settled(ours, number);
            }
        }
        Fate::GoOn
    }

    /// Tells the peer that a delivery of ours is settled.
    fn settled(&mut self, ours: u16, number: u32) {
        let disposition = Disposition {
            role: Role::Sender,
            first: number,
            last: None,
            settled: true,
            state: Some(DeliveryState::Outcome(Outcome::Accepted)),
            batchable: false,
        };
        frames::sure(&mut self.output, ours, |out| {
            performative::encode_disposition(&disposition, out);
        });
        self.said = true;
    }

    fn detached(&mut self, ours: u16, detach: Detach) -> Fate {
        let remote = detach.handle.0;
        let Some(session) = self.at(ours) else {
            return Fate::GoOn;
        };
        let Some(handle) = session.remote_handles.get(&remote).copied() else {
            return Fate::End("amqp:session:unattached-handle");
        };
        let key = session.key_of(handle);
        let Some(link) = session.remove(handle) else {
            return Fate::GoOn;
        };
        if link.state == LinkState::Detaching {
            return Fate::GoOn;
        }
        frames::sure(&mut self.output, ours, |out| {
            performative::encode_detach(handle, true, None, out);
        });
        self.said = true;
        self.events.extend(key.map(|link| Event::Detached {
            link,
            error: detach.error.map(ErrorInfo::from),
        }));
        Fate::GoOn
    }
}

enum Taken {
    /// The peer gave the delivery up.
    Aborted(LinkKey),
    Nothing,
    Whole(Delivery),
    Broken(&'static str),
}

/// One transfer of a delivery to us.
fn take_transfer(session: &mut Session, handle: u32, transfer: &Transfer, payload: Bytes) -> Taken {
    let Some(key) = session.key_of(handle) else {
        return Taken::Nothing;
    };
    let Some(link) = session.link_mut(handle) else {
        return Taken::Nothing;
    };
    match link.state {
        LinkState::Attached if !link.is_up => {}
        LinkState::Detaching => return Taken::Nothing,
        _ => return Taken::Broken("amqp:not-allowed"),
    }
    let is_first = link.partial.is_none();
    if is_first {
        let Some(number) = transfer.delivery_id else {
            return Taken::Broken("amqp:invalid-field");
        };
        if link.credit == 0 {
            return Taken::Broken("amqp:link:transfer-limit-exceeded");
        }
        link.credit -= 1;
        link.held += 1;
        link.delivery_count = link.delivery_count.wrapping_add(1);
        link.partial = Some(Partial {
            number,
            tag: transfer.delivery_tag.clone().unwrap_or_default(),
            settled: false,
            payload: BytesMut::new(),
        });
    }
    let Some(mut partial) = link.partial.take() else {
        return Taken::Nothing;
    };
    partial.settled |= transfer.settled.unwrap_or(false);
    if transfer.aborted {
        return Taken::Aborted(key);
    }
    let bytes = (partial.payload.len() as u64).saturating_add(payload.len() as u64);
    if bytes > limits::AMQP_DELIVERY_BYTES_MAX {
        return Taken::Broken("amqp:link:message-size-exceeded");
    }
    if transfer.more {
        partial.payload.extend_from_slice(&payload);
        link.partial = Some(partial);
        return Taken::Nothing;
    }
    let payload = if partial.payload.is_empty() {
        payload
    } else {
        partial.payload.extend_from_slice(&payload);
        partial.payload.freeze()
    };
    Taken::Whole(Delivery {
        link: key,
        number: partial.number,
        tag: partial.tag,
        settled: partial.settled,
        payload,
    })
}

fn name(performative: &Performative) -> &'static str {
    match performative {
        Performative::Open(_) => "open",
        Performative::Begin(_) => "begin",
        Performative::Attach(_) => "attach",
        Performative::Flow(_) => "flow",
        Performative::Transfer(_) => "transfer",
        Performative::Disposition(_) => "disposition",
        Performative::Detach(_) => "detach",
        Performative::End(_) => "end",
        Performative::Close(_) => "close",
        _ => "a performative of no known kind",
    }
}
