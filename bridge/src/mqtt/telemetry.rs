//! The sending side of a session: stored messages become publishes, PUBACKs become dispositions.

use edgehub_proto::{bag, identity::Identity, stored, topic};
use tracing::warn;

use super::{machine::Machine, session::monotonic_now, terms::PublishError};
use crate::{
    counters::{self, SentCounters},
    lanes::{Disposition, DropReason, Outgoing},
};

/// The lane sent more than its window. Without an end of the session what has no room would wait
/// for an answer that never comes.
#[derive(Debug)]
pub(super) struct NoRoom;

/// Messages of one session on their way.
#[derive(Debug)]
pub(super) struct Telemetry {
    identity: Identity,
    counters: SentCounters,
    /// Messages that cannot be sent, to be reported with the next acknowledgements.
    refused: Vec<(u64, Disposition)>,
}

impl Telemetry {
    pub(super) fn new(identity: Identity) -> Self {
        Self {
            counters: SentCounters::new(identity.clone()),
            identity,
            refused: Vec::new(),
        }
    }

    pub(super) fn send(
        &mut self,
        machine: &mut Machine,
        batch: Vec<Outgoing>,
    ) -> Result<(), NoRoom> {
        for outgoing in batch {
            let token = outgoing.token;
            if let Some(reason) = self.publish(machine, outgoing)? {
                self.refused.push((token, Disposition::Unsendable(reason)));
            }
        }
        Ok(())
    }

    /// What became of messages since the last call.
    pub(super) fn dispositions(&mut self, machine: &mut Machine) -> Vec<(u64, Disposition)> {
        let mut dispositions = std::mem::take(&mut self.refused);
        for token in machine.drain_acked() {
            self.counters.accepted(token);
            dispositions.push((token, Disposition::Accepted));
        }
        dispositions
    }

    /// Puts a message into the output, or says why it can never be sent.
    fn publish(
        &mut self,
        machine: &mut Machine,
        outgoing: Outgoing,
    ) -> Result<Option<DropReason>, NoRoom> {
        let Outgoing {
            token,
            priority,
            resend,
            entry,
        } = outgoing;
        let identity = &self.identity;
        let message = match stored::decode_message(entry.message) {
            Ok(message) => message,
            Err(error) => {
                warn!(%identity, offset = entry.offset, %error, "stored message is damaged");
                counters::dropped(identity, String::new(), DropReason::CorruptRecord);
                return Ok(Some(DropReason::CorruptRecord));
            }
        };
        let topic = topic::telemetry(identity, &bag::encode_upstream(&message));
        let output = counters::output_of(&message);
        match machine.publish(monotonic_now(), token, resend, topic, &message.body) {
            Ok(()) => {
                self.counters.sent(token, output, priority);
                Ok(None)
            }
            Err(error @ (PublishError::TooLarge { .. } | PublishError::TopicTooLong { .. })) => {
                warn!(%identity, offset = entry.offset, %error, "message cannot be sent over MQTT");
                counters::dropped(identity, output.to_owned(), DropReason::TooLarge);
                Ok(Some(DropReason::TooLarge))
            }
            Err(PublishError::NoRoom) => Err(NoRoom),
        }
    }
}
