//! The packets of an admitted client, one turn at a time: what they change, what is answered.

use bytes::BytesMut;
use mqttbytes::QoS;
use mqttbytes::v4::{
    Packet, PingResp, PubAck, Publish, SubAck, Subscribe, SubscribeReasonCode, UnsubAck,
    Unsubscribe,
};
use tracing::warn;

use super::CloseReason;
use super::codec::{self, CodecError};
use super::requests;
use super::session::{Session, Turn};
use super::topic::{PublishTopic, is_filter};
use crate::c2d::C2dError;
use crate::counters::Counter;
use crate::faults::FaultKind;
use crate::hub::Hub;
use crate::limits::REPLIES_BYTES_MAX;
use crate::sessions::{Actor, Feature};

/// One turn of one connection.
pub(crate) struct Handler<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) session: &'a Session,
    pub(crate) actor: Actor<'a>,
    pub(crate) now_ms: u64,
    pub(crate) now_utc: &'a str,
}

impl Handler<'_> {
    /// Handles the whole packets of `input`: all of them, unless their answers become too many to
    /// hold; says whether it did all. After an error, what was added to the turn before it still
    /// counts.
    ///
    /// # Errors
    /// The reason to close the connection, a DISCONNECT included.
    pub(crate) fn handle(
        &self,
        input: &mut BytesMut,
        turn: &mut Turn,
    ) -> Result<bool, CloseReason> {
        while let Some(packet) = codec::next_packet(input)? {
            let written = match packet {
                Packet::Publish(publish) => {
                    self.publish(&publish, turn)?;
                    Ok(0)
                }
                Packet::PingReq => {
                    self.count(Counter::Pings);
                    PingResp.write(&mut turn.replies)
                }
                Packet::PubAck(ack) => {
                    self.acknowledged(ack.pkid)?;
                    Ok(0)
                }
                Packet::Subscribe(subscribe) => {
                    self.subscribe(&subscribe)?.write(&mut turn.replies)
                }
                Packet::Unsubscribe(unsubscribe) => {
                    self.unsubscribe(&unsubscribe)?.write(&mut turn.replies)
                }
                Packet::Disconnect => return Err(CloseReason::Disconnect),
                Packet::Connect(_) => return Err(CloseReason::SecondConnect),
                Packet::PubRec(_) | Packet::PubRel(_) | Packet::PubComp(_) => {
                    return Err(CloseReason::Qos2);
                }
                Packet::ConnAck(_) | Packet::SubAck(_) | Packet::UnsubAck(_) | Packet::PingResp => {
                    return Err(CloseReason::Unexpected("a server's packet"));
                }
            };
            written.map_err(CodecError::Packet)?;
            // A request of thirty bytes may have an answer of sixty thousand.
            if turn.replies.len() > REPLIES_BYTES_MAX {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn count(&self, counter: Counter) {
        self.hub.counters.add(self.session.identity(), counter);
    }

    fn publish(&self, publish: &Publish, turn: &mut Turn) -> Result<(), CloseReason> {
        if publish.qos == QoS::ExactlyOnce {
            return Err(CloseReason::Qos2);
        }
        if let PublishTopic::IotHub(topic) = PublishTopic::parse(&publish.topic) {
            requests::handle(self, &topic, &publish.payload, turn)?;
        } else {
            self.telemetry(publish, turn)?;
        }
        if publish.qos == QoS::AtLeastOnce {
            PubAck::new(publish.pkid)
                .write(&mut turn.replies)
                .map_err(CodecError::Packet)?;
        }
        Ok(())
    }

    fn telemetry(&self, publish: &Publish, turn: &mut Turn) -> Result<(), CloseReason> {
        self.count(Counter::Telemetry);
        let read = self
            .session
            .read_telemetry(&publish.topic, &publish.payload, publish.retain);
        match read {
            Ok(bag) => {
                let who = self.session.identity();
                if self
                    .hub
                    .faults
                    .take(FaultKind::Publish, Some(who))
                    .is_some()
                {
                    return Err(CloseReason::Fault);
                }
                self.session.push(bag, &publish.payload, self.now_utc, turn);
                Ok(())
            }
            Err(reason) if self.session.is_strict() => Err(reason),
            Err(reason) => {
                warn!(client = %self.session.identity(), %reason, "publish dropped");
                Ok(())
            }
        }
    }

    /// A client acknowledges what it was sent, and nothing else.
    fn acknowledged(&self, packet_id: u16) -> Result<(), CloseReason> {
        self.count(Counter::Pubacks);
        let identity = self.session.identity();
        let result = match &identity.module {
            None => self
                .hub
                .c2d
                .acknowledge(&identity.device, self.actor, packet_id, self.now_ms),
            Some(_) => Err(C2dError::PacketId(packet_id)),
        };
        match result {
            Err(error @ C2dError::PacketId(_)) if !self.session.is_strict() => {
                warn!(client = %identity, %error, "PUBACK ignored");
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Known filters are granted, at QoS 1 at most; in strict mode others are not.
    fn subscribe(&self, subscribe: &Subscribe) -> Result<SubAck, CloseReason> {
        self.count(Counter::Subscribes);
        if subscribe.filters.is_empty() || subscribe.pkid == 0 {
            return Err(CloseReason::Unexpected(
                "SUBSCRIBE without filter or packet id",
            ));
        }
        let identity = self.session.identity();
        let (mut granted, mut codes) = (Vec::new(), Vec::with_capacity(subscribe.filters.len()));
        let mut has_c2d = false;
        for filter in &subscribe.filters {
            if !is_filter(&filter.path) {
                return Err(CloseReason::Filter(filter.path.chars().take(200).collect()));
            }
            let qos = match filter.qos {
                QoS::AtMostOnce => QoS::AtMostOnce,
                QoS::AtLeastOnce | QoS::ExactlyOnce => QoS::AtLeastOnce,
            };
            let feature = Feature::of(&filter.path, identity);
            has_c2d |= feature == Some(Feature::CloudToDevice);
            if feature.is_some() {
                granted.push((filter.path.as_str(), qos));
            } else if self.session.is_strict() {
                warn!(client = %identity, filter = filter.path, "unknown filter, 0x80");
                codes.push(SubscribeReasonCode::Failure);
                continue;
            }
            codes.push(SubscribeReasonCode::Success(qos));
        }
        self.hub
            .sessions
            .subscribe(identity, self.actor, &granted)?;
        if has_c2d {
            self.hub.sessions.wake(identity);
        }
        Ok(SubAck::new(subscribe.pkid, codes))
    }

    fn unsubscribe(&self, unsubscribe: &Unsubscribe) -> Result<UnsubAck, CloseReason> {
        self.count(Counter::Unsubscribes);
        if unsubscribe.topics.is_empty() || unsubscribe.pkid == 0 {
            return Err(CloseReason::Unexpected(
                "UNSUBSCRIBE without filter or packet id",
            ));
        }
        if let Some(bad) = unsubscribe.topics.iter().find(|topic| !is_filter(topic)) {
            return Err(CloseReason::Filter(bad.chars().take(200).collect()));
        }
        self.hub
            .sessions
            .unsubscribe(self.session.identity(), self.actor, &unsubscribe.topics)?;
        Ok(UnsubAck::new(unsubscribe.pkid))
    }
}
