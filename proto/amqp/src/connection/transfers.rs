//! Deliveries that arrive, in one frame or several (part 2, 2.6.14).

use bytes::{Bytes, BytesMut};

use super::event::{Event, Incoming, LinkId, Received};
use super::link::{Direction, Partial, Phase};
use super::{Connection, condition};
use crate::limits::TAG_BYTES_MAX;
use crate::performative::Transfer;

impl Connection {
    pub(super) fn take_transfer(&mut self, channel: u16, transfer: Transfer, payload: Bytes) {
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let Some(window) = session.incoming_window.checked_sub(1) else {
            let text = "more transfers than the session's window";
            return self.fail_session(channel, condition::WINDOW_VIOLATION, text);
        };
        session.incoming_window = window;
        session.next_incoming_id = session.next_incoming_id.wrapping_add(1);
        if window <= self.config.incoming_window / 3 {
            self.stir(channel);
        }
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let handle = transfer.handle;
        let Some(link) = session.links.get_mut(&handle) else {
            let text = format!("handle {handle} has no link");
            return self.fail_session(channel, condition::UNATTACHED_HANDLE, &text);
        };
        let id = LinkId {
            channel,
            handle,
            generation: link.generation,
        };
        match link.phase {
            // What was on its way when we detached.
            Phase::Detaching => return,
            Phase::Asked(_) => {
                let text = "a transfer before the link was attached";
                return self.fail_session(channel, condition::ILLEGAL_STATE, text);
            }
            Phase::Attached => {}
        }
        let Direction::Receiving(receiving) = &mut link.direction else {
            return self.fail_link(id, condition::NOT_ALLOWED, "a transfer against the link");
        };
        // One that is aborted in its first frame counts, too: its sender has counted it.
        if receiving.partial.is_none() {
            let Some(credit) = receiving.credit.checked_sub(1) else {
                let text = "more deliveries than the link's credit";
                return self.fail_link(id, condition::TRANSFER_LIMIT, text);
            };
            receiving.credit = credit;
            receiving.delivery_count = receiving.delivery_count.wrapping_add(1);
            receiving.unsettled += 1;
        }
        let max = receiving.max_message_size;
        let max = max.unwrap_or(self.config.delivery_bytes_max);
        let before = receiving.partial.as_ref();
        let before = before.map_or(0, |partial| partial.payload.len());
        if before as u64 + payload.len() as u64 > max {
            receiving.settled_one();
            let text = format!("a message has at most {max} bytes here");
            return self.fail_link(id, condition::MESSAGE_SIZE, &text);
        }
        if transfer.aborted {
            receiving.partial = None;
            receiving.settled_one();
            session.list(handle);
            self.partial_bytes = self.partial_bytes.saturating_sub(before);
            self.stir(channel);
            return;
        }
        self.gather(id, transfer, payload);
    }

    /// Adds a frame to its delivery, and hands that out when it is complete.
    fn gather(&mut self, id: LinkId, transfer: Transfer, payload: Bytes) {
        let channel = id.channel;
        let Some(session) = self.sessions.get_mut(&channel) else {
            return;
        };
        let Some(receiving) = session.receiving(id) else {
            return;
        };
        let Some(mut partial) = receiving.partial.take() else {
            let (Some(delivery_id), Some(tag)) = (transfer.delivery_id, transfer.delivery_tag)
            else {
                let text = "the first transfer of a delivery has an id and a tag";
                return self.fail_session(channel, condition::INVALID_FIELD, text);
            };
            if tag.len() > TAG_BYTES_MAX {
                let text = format!("a delivery tag has at most {TAG_BYTES_MAX} bytes");
                return self.fail_session(channel, condition::INVALID_FIELD, &text);
            }
            let message_format = transfer.message_format.unwrap_or(0);
            let settled = transfer.settled.unwrap_or(false);
            if !transfer.more {
                return self.deliver(id, delivery_id, tag, message_format, settled, payload);
            }
            self.partial_bytes += payload.len();
            receiving.partial = Some(Partial {
                delivery_id,
                // Not a slice of a frame that would be kept for it.
                tag: Bytes::copy_from_slice(&tag),
                message_format,
                settled,
                payload: BytesMut::from(&payload[..]),
            });
            return self.bound_partials();
        };
        if transfer
            .delivery_id
            .is_some_and(|delivery_id| delivery_id != partial.delivery_id)
        {
            self.partial_bytes = self.partial_bytes.saturating_sub(partial.payload.len());
            let text = "a delivery begins before the one before it is complete";
            return self.fail_session(channel, condition::INVALID_FIELD, text);
        }
        partial.payload.extend_from_slice(&payload);
        partial.settled |= transfer.settled.unwrap_or(false);
        if transfer.more {
            receiving.partial = Some(partial);
            self.partial_bytes += payload.len();
            return self.bound_partials();
        }
        let gathered = partial.payload.len() - payload.len();
        self.partial_bytes = self.partial_bytes.saturating_sub(gathered);
        let Partial {
            delivery_id,
            tag,
            message_format,
            settled,
            payload,
        } = partial;
        self.deliver(
            id,
            delivery_id,
            tag,
            message_format,
            settled,
            payload.freeze(),
        );
    }

    fn bound_partials(&mut self) {
        let max = self.config.partial_bytes_max;
        if self.partial_bytes > max {
            let text = format!("more than {max} bytes of deliveries that are not complete");
            self.fault(condition::RESOURCE_LIMIT, text);
        }
    }

    fn deliver(
        &mut self,
        link: LinkId,
        delivery_id: u32,
        tag: Bytes,
        message_format: u32,
        settled: bool,
        payload: Bytes,
    ) {
        let received = Received {
            link,
            delivery_id,
            settled,
        };
        self.events.push_back(Event::Delivery(Incoming {
            link,
            received,
            tag,
            message_format,
            settled,
            payload,
        }));
    }
}
