//! Telemetry of a connection, from its deliveries to their settlement (spec/amqp.md 4.1).

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_amqp::connection::{Incoming, LinkId, Received};
use edgehub_amqp::message::{BATCH_MESSAGE_FORMAT, MessageView, batch_items};
use edgehub_amqp::performative::{ErrorInfo, Outcome as Settlement};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{MAX_MESSAGE_BYTES, Message, SystemProperty};

use super::condition::{self, rejection};
use super::limits::{BATCH_MESSAGES_MAX, MESSAGE_OVERHEAD_BYTES, UNCOMMITTED_BYTES_MAX};
use super::message;
use crate::hub::{Gather, Hub, Outcome, Ways};
use crate::telemetry::metrics::DropReason;

/// The telemetry of all clients of a connection.
#[derive(Debug)]
pub(super) struct Telemetry {
    pub(super) gather: Gather,
    sequence: u64,
    /// Deliveries that wait for a commit, in the order in which they arrived.
    uncommitted: VecDeque<Uncommitted>,
    uncommitted_bytes: usize,
}

#[derive(Debug)]
struct Uncommitted {
    sequence: u64,
    received: Received,
    bytes: usize,
}

impl Telemetry {
    pub(super) fn new(hub: Arc<Hub>) -> Self {
        Self {
            gather: Gather::new(hub),
            sequence: 0,
            uncommitted: VecDeque::new(),
            uncommitted_bytes: 0,
        }
    }

    /// Whether more may be read.
    pub(super) fn has_room(&self) -> bool {
        self.uncommitted_bytes < UNCOMMITTED_BYTES_MAX
    }

    /// Takes a delivery: all of its messages or none. What it is settled with at once; none when
    /// its commit is waited for.
    pub(super) fn take(
        &mut self,
        ways: &mut Ways,
        sender: &Identity,
        incoming: &Incoming,
        now_ms: u64,
    ) -> Option<Settlement> {
        let messages = match messages(incoming) {
            Ok(messages) => messages,
            Err(Refused {
                reason,
                output,
                error,
            }) => {
                let why = error.description.as_deref().unwrap_or_default();
                self.gather.dropped(sender, reason, &output, &why);
                return Some(Settlement::Rejected(Some(error)));
            }
        };
        self.sequence += 1;
        let mut gathered = false;
        let overhead = messages.len() * MESSAGE_OVERHEAD_BYTES;
        for message in messages {
            let outcome = self.gather.take(ways, self.sequence, message, now_ms);
            gathered |= outcome == Outcome::Gathered;
        }
        if !gathered {
            return Some(Settlement::Accepted);
        }
        let bytes = incoming.payload.len() + overhead;
        self.uncommitted_bytes += bytes;
        self.uncommitted.push_back(Uncommitted {
            sequence: self.sequence,
            received: incoming.received,
            bytes,
        });
        None
    }

    /// Forgets all that waits for a commit, which failed, and begins anew. The links it came on.
    pub(super) fn restart(&mut self) -> impl Iterator<Item = LinkId> + use<> {
        let hub = Arc::clone(self.gather.hub());
        let before = std::mem::replace(self, Self::new(hub));
        let links = before.uncommitted.into_iter();
        links.map(|delivery| delivery.received.link())
    }

    /// Everything up to this sequence number is stored: `settle` gets what is done.
    pub(super) fn committed(&mut self, sequence: u64, mut settle: impl FnMut(Received)) {
        while let Some(first) = self.uncommitted.front()
            && first.sequence <= sequence
        {
            self.uncommitted_bytes -= first.bytes;
            settle(first.received);
            self.uncommitted.pop_front();
        }
    }
}

/// Why a delivery is rejected.
struct Refused {
    reason: DropReason,
    output: String,
    error: ErrorInfo,
}

/// The messages of a delivery, if all of them can be taken.
fn messages(incoming: &Incoming) -> Result<Vec<Message>, Refused> {
    if incoming.message_format != BATCH_MESSAGE_FORMAT {
        return Ok(vec![one(&incoming.payload)?]);
    }
    let unreadable = |text: String| Refused {
        reason: DropReason::BadProperties,
        output: String::new(),
        error: rejection(condition::NOT_ALLOWED, &text),
    };
    // What stands beside the data sections of a batch does not count.
    let envelope = MessageView::parse(&incoming.payload);
    let envelope = envelope.map_err(|error| unreadable(error.to_string()))?;
    let items: Vec<&Bytes> = batch_items(&envelope.body).collect();
    if items.len() > BATCH_MESSAGES_MAX {
        let text = format!("a batch has at most {BATCH_MESSAGES_MAX} messages");
        return Err(unreadable(text));
    }
    items.into_iter().map(one).collect()
}

fn one(payload: &Bytes) -> Result<Message, Refused> {
    let message = message::read(payload).map_err(|error| Refused {
        reason: DropReason::BadProperties,
        output: String::new(),
        error: rejection(condition::NOT_ALLOWED, &error.to_string()),
    })?;
    let size = message.size();
    if size > MAX_MESSAGE_BYTES {
        let text = format!("a message of {size} bytes is larger than {MAX_MESSAGE_BYTES}");
        let output = message.system.get(SystemProperty::OutputName);
        return Err(Refused {
            reason: DropReason::TooLarge,
            output: output.unwrap_or_default().to_owned(),
            error: rejection(condition::MESSAGE_SIZE, &text),
        });
    }
    Ok(message)
}
