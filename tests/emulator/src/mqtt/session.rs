//! The telemetry that an admitted client may send. No socket, no clock, no file.

use bytes::BytesMut;
use mqttbytes::v4::LastWill;

use super::CloseReason;
use super::bag::Bag;
use super::topic::PublishTopic;
use crate::hub::Mode;
use crate::identity::Identity;
use crate::ledger::{Batch, Stamps};
use crate::limits::MESSAGE_BYTES_MAX;

/// What one turn produces: messages to store, then answers to send.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    pub(crate) batch: Batch,
    /// In order of arrival. Sent only after `batch` is in the ledger.
    pub(crate) replies: BytesMut,
}

/// Who speaks on a connection, after CONNACK.
#[derive(Debug)]
pub(crate) struct Session {
    identity: Identity,
    stamps: Stamps,
    mode: Mode,
}

impl Session {
    pub(crate) fn new(identity: Identity, stamps: Stamps, mode: Mode) -> Self {
        Self {
            identity,
            stamps,
            mode,
        }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.mode.is_strict()
    }

    /// Adds a message of this client to the turn's batch.
    pub(crate) fn push(&self, bag: Bag, body: &[u8], now_utc: &str, turn: &mut Turn) {
        let Bag {
            system,
            application,
            ..
        } = bag;
        turn.batch
            .push(&self.stamps, now_utc, &system, &application, body);
    }

    /// Reads a message that this client may send.
    pub(crate) fn read_telemetry(
        &self,
        topic: &str,
        body: &[u8],
        retain: bool,
    ) -> Result<Bag, CloseReason> {
        let (device, module, bag) = match PublishTopic::parse(topic) {
            PublishTopic::Telemetry {
                device,
                module,
                bag,
            } => (device, module, bag),
            PublishTopic::IotHub(_) | PublishTopic::Unknown => {
                return Err(CloseReason::TopicUnknown(shortened(topic)));
            }
        };
        if device != self.identity.device || module != self.identity.module.as_deref() {
            return Err(CloseReason::TopicWrongId(shortened(topic)));
        }
        let mut bag = Bag::parse(bag).map_err(CloseReason::Bag)?;
        let size = body.len() + bag.size;
        if size > MESSAGE_BYTES_MAX {
            return Err(CloseReason::MessageSize(size));
        }
        if retain {
            bag.application
                .push(("x-opt-retain".to_owned(), Some("true".to_owned())));
        }
        Ok(bag)
    }

    /// The turn that stores a will (spec/upstream.md B4).
    pub(crate) fn will(&self, will: &LastWill, now_utc: &str) -> Turn {
        let mut turn = Turn::default();
        if let Ok(mut bag) = self.read_telemetry(&will.topic, &will.message, will.retain) {
            bag.application
                .push(("iothub-MessageType".to_owned(), Some("Will".to_owned())));
            self.push(bag, &will.message, now_utc, &mut turn);
        }
        turn
    }
}

/// Enough of a topic to recognise it in a log line.
fn shortened(topic: &str) -> String {
    const CHARS_MAX: usize = 200;
    topic.chars().take(CHARS_MAX).collect()
}
