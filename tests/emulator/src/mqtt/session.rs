//! What an admitted client may send, and what it gets back. No socket, no clock, no file.

use bytes::BytesMut;
use mqttbytes::QoS;
use mqttbytes::v4::{
    Packet, PingResp, PubAck, Publish, SubAck, Subscribe, SubscribeReasonCode, UnsubAck,
    Unsubscribe,
};
use tracing::warn;

use super::CloseReason;
use super::bag::Bag;
use super::codec::{self, CodecError};
use super::topic::{PublishTopic, is_known_filter};
use crate::faults::{FaultKind, Faults};
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

/// The protocol state of one connection after CONNACK.
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

    /// Handles all whole packets of `input`. After an error, what was added to the turn before it
    /// still counts.
    ///
    /// # Errors
    /// The reason to close the connection, a DISCONNECT included.
    pub(crate) fn handle(
        &self,
        input: &mut BytesMut,
        faults: &Faults,
        now_utc: &str,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        while let Some(packet) = codec::next_packet(input)? {
            let written = match packet {
                Packet::Publish(publish) => {
                    self.publish(&publish, faults, now_utc, turn)?;
                    Ok(0)
                }
                Packet::PingReq => PingResp.write(&mut turn.replies),
                Packet::Subscribe(subscribe) => {
                    self.subscribe(&subscribe)?.write(&mut turn.replies)
                }
                Packet::Unsubscribe(unsubscribe) => {
                    unsubscribed(&unsubscribe)?.write(&mut turn.replies)
                }
                Packet::Disconnect => return Err(CloseReason::Disconnect),
                Packet::Connect(_) => return Err(CloseReason::SecondConnect),
                Packet::PubAck(_) => return Err(CloseReason::Unexpected("PUBACK")),
                Packet::PubRec(_) | Packet::PubRel(_) | Packet::PubComp(_) => {
                    return Err(CloseReason::Qos2);
                }
                Packet::ConnAck(_) | Packet::SubAck(_) | Packet::UnsubAck(_) | Packet::PingResp => {
                    return Err(CloseReason::Unexpected("a server's packet"));
                }
            };
            written.map_err(CodecError::Packet)?;
        }
        Ok(())
    }

    fn publish(
        &self,
        publish: &Publish,
        faults: &Faults,
        now_utc: &str,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        if publish.qos == QoS::ExactlyOnce {
            return Err(CloseReason::Qos2);
        }
        match self.read_telemetry(&publish.topic, &publish.payload, publish.retain) {
            Ok(bag) => {
                if faults.take(FaultKind::Publish).is_some() {
                    return Err(CloseReason::Fault);
                }
                let Bag {
                    system,
                    application,
                    ..
                } = bag;
                turn.batch.push(
                    &self.stamps,
                    now_utc,
                    &system,
                    &application,
                    &publish.payload,
                );
            }
            Err(reason) if self.mode.is_strict() => return Err(reason),
            Err(reason) => warn!(client = %self.identity, %reason, "publish dropped"),
        }
        if publish.qos == QoS::AtLeastOnce {
            PubAck::new(publish.pkid)
                .write(&mut turn.replies)
                .map_err(CodecError::Packet)?;
        }
        Ok(())
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
            PublishTopic::Later => return Err(CloseReason::TopicLater(shortened(topic))),
            PublishTopic::Unknown => return Err(CloseReason::TopicUnknown(shortened(topic))),
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
    pub(crate) fn will(&self, will: &mqttbytes::v4::LastWill, now_utc: &str) -> Turn {
        let mut turn = Turn::default();
        if let Ok(mut bag) = self.read_telemetry(&will.topic, &will.message, will.retain) {
            bag.application
                .push(("iothub-MessageType".to_owned(), Some("Will".to_owned())));
            let Bag {
                system,
                application,
                ..
            } = bag;
            turn.batch
                .push(&self.stamps, now_utc, &system, &application, &will.message);
        }
        turn
    }

    /// Known filters are granted, at QoS 1 at most; in strict mode others are not.
    fn subscribe(&self, subscribe: &Subscribe) -> Result<SubAck, CloseReason> {
        if subscribe.filters.is_empty() || subscribe.pkid == 0 {
            return Err(CloseReason::Unexpected(
                "SUBSCRIBE without filter or packet id",
            ));
        }
        let granted = subscribe.filters.iter().map(|filter| {
            if self.mode.is_strict() && !is_known_filter(&filter.path, &self.identity) {
                warn!(client = %self.identity, filter = filter.path, "unknown filter, 0x80");
                return SubscribeReasonCode::Failure;
            }
            SubscribeReasonCode::Success(match filter.qos {
                QoS::AtMostOnce => QoS::AtMostOnce,
                QoS::AtLeastOnce | QoS::ExactlyOnce => QoS::AtLeastOnce,
            })
        });
        Ok(SubAck::new(subscribe.pkid, granted.collect()))
    }
}

fn unsubscribed(unsubscribe: &Unsubscribe) -> Result<UnsubAck, CloseReason> {
    if unsubscribe.topics.is_empty() || unsubscribe.pkid == 0 {
        return Err(CloseReason::Unexpected(
            "UNSUBSCRIBE without filter or packet id",
        ));
    }
    Ok(UnsubAck::new(unsubscribe.pkid))
}

/// Enough of a topic to recognise it in a log line.
fn shortened(topic: &str) -> String {
    const CHARS_MAX: usize = 200;
    topic.chars().take(CHARS_MAX).collect()
}
