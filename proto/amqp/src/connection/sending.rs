//! Deliveries that are sent: credit, the peer's window and frame size (part 2, 2.5.6 and 2.6.14).

use bytes::{Bytes, BytesMut};

use super::event::{LinkId, Outgoing, SendError, Sent};
use super::session::Waiting;
use super::{Connection, State};
use crate::frame::FRAME_HEADER_BYTES;
use crate::limits::{TAG_BYTES_MAX, UNSETTLED_MAX};
use crate::performative::{self, Flow, Transfer};

/// Room for a transfer's fields beside its payload, bytes.
const TRANSFER_BYTES: usize = 96;

impl Connection {
    /// Whether a delivery can be sent on the link now.
    #[must_use]
    pub fn can_send(&self, id: LinkId) -> bool {
        self.state == State::Opened
            && self.out.len() + self.waiting_bytes < self.config.output_bytes_max
            && self
                .sessions
                .get(&id.channel)
                .is_some_and(|session| session.can_send(id))
    }

    /// Sends a delivery. What the peer's window does not take waits here: not more than one
    /// delivery of a session.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(&mut self, id: LinkId, delivery: Outgoing<'_>) -> Result<Sent, SendError> {
        if delivery.tag.len() > TAG_BYTES_MAX {
            return Err(SendError::Tag);
        }
        let can_send = self.can_send(id);
        let session = self.sessions.get_mut(&id.channel);
        let session = session.ok_or(SendError::NotAttached)?;
        let sending = session.sending(id).ok_or(SendError::NotAttached)?;
        if let Some(limit) = sending.max_message_size
            && delivery.payload.len() as u64 > limit
        {
            return Err(SendError::TooLarge { limit });
        }
        if !can_send {
            return Err(SendError::NoCredit);
        }
        sending.credit = sending.credit.saturating_sub(1);
        sending.delivery_count = sending.delivery_count.wrapping_add(1);
        if !delivery.settled {
            sending.unsettled += 1;
        }
        let delivery_id = session.new_delivery(id, delivery.settled);
        self.waiting_bytes += delivery.payload.len();
        session.waiting.push_back(Waiting {
            link: id,
            delivery_id,
            tag: Bytes::copy_from_slice(delivery.tag),
            message_format: delivery.message_format,
            settled: delivery.settled,
            payload: delivery.payload,
            begun: false,
        });
        self.flush_waiting(id.channel);
        Ok(Sent(delivery_id))
    }

    /// Settles a delivery that was sent and whose peer said an outcome without settling. Nothing
    /// for others.
    pub fn settle_sent(&mut self, id: LinkId, sent: Sent) {
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        if session.link(id).is_none() || !session.settle_sent(sent) {
            return;
        }
        if let Some(sending) = session.sending(id) {
            sending.unsettled = sending.unsettled.saturating_sub(1);
        }
        self.stir(id.channel);
    }

    /// There is nothing more to send on a link whose peer drains it: its credit is used up, and the
    /// peer is told so. Nothing when it does not drain.
    pub fn drained(&mut self, id: LinkId) {
        if self.state != State::Opened {
            return;
        }
        let Some(session) = self.sessions.get_mut(&id.channel) else {
            return;
        };
        let Some(sending) = session.sending(id) else {
            return;
        };
        if !sending.drain {
            return;
        }
        sending.delivery_count = sending.delivery_count.wrapping_add(sending.credit);
        sending.credit = 0;
        sending.drain = false;
        let delivery_count = sending.delivery_count;
        self.flush_waiting(id.channel);
        let flow = Flow {
            handle: Some(id.handle),
            delivery_count: Some(delivery_count),
            link_credit: Some(0),
            available: Some(0),
            drain: true,
            ..self.session_terms(id.channel)
        };
        self.frame(id.channel, |out| performative::encode_flow(&flow, out));
    }

    /// Writes what the peer's window takes.
    pub(super) fn flush_waiting(&mut self, channel: u16) {
        if self.state != State::Opened {
            return;
        }
        let room = (self.peer_frame_bytes_max as usize)
            .saturating_sub(FRAME_HEADER_BYTES + TRANSFER_BYTES)
            .max(1);
        loop {
            let Some(session) = self.sessions.get_mut(&channel) else {
                return;
            };
            if session.remote_incoming_window == 0 {
                return;
            }
            let Some(waiting) = session.waiting.front_mut() else {
                return;
            };
            session.remote_incoming_window -= 1;
            session.next_outgoing_id = session.next_outgoing_id.wrapping_add(1);
            let part = waiting.payload.split_to(room.min(waiting.payload.len()));
            self.waiting_bytes = self.waiting_bytes.saturating_sub(part.len());
            let more = !waiting.payload.is_empty();
            let first = !std::mem::replace(&mut waiting.begun, true);
            let transfer = Transfer {
                handle: waiting.link.handle,
                // Once is enough, and saves bytes; rhea repeats them (spec/amqp.md 2.2).
                delivery_id: first.then_some(waiting.delivery_id),
                delivery_tag: first.then(|| waiting.tag.clone()),
                message_format: first.then_some(waiting.message_format),
                settled: first.then_some(waiting.settled),
                more,
                ..Transfer::default()
            };
            if !more {
                session.waiting.pop_front();
            }
            self.frame(channel, |out: &mut BytesMut| {
                performative::encode_transfer(&transfer, out);
                out.extend_from_slice(&part);
            });
        }
    }
}

impl super::session::Session {
    /// Whether a link has credit, and nothing of the session waits for the peer's window.
    fn can_send(&self, id: LinkId) -> bool {
        let Some(link) = self.links.get(&id.handle) else {
            return false;
        };
        let attached = link.generation == id.generation
            && matches!(link.phase, super::link::Phase::Attached)
            && !self.ending;
        let super::link::Direction::Sending(sending) = &link.direction else {
            return false;
        };
        attached && sending.credit > 0 && sending.unsettled < UNSETTLED_MAX && self.has_room()
    }
}
