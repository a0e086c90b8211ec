//! What the machine is told to send.

use std::{num::NonZeroU16, time::Instant};

use ntex_bytes::ByteString;
use ntex_mqtt::v3::codec::{Encoded, Packet, Publish, QoS};

use super::{Change, Machine, State};
use crate::mqtt::terms::{MachineError, PublishError};

impl Machine {
    /// Puts one QoS 1 publish into the output. `token` comes back from [`Machine::drain_acked`].
    /// `resend` sets the DUP flag (MQTT-3.3.1-1).
    ///
    /// # Errors
    ///
    /// See [`PublishError`]; nothing was written then and the connection goes on.
    pub fn publish(
        &mut self,
        now: Instant,
        token: u64,
        resend: bool,
        topic: String,
        payload: &[u8],
    ) -> Result<(), PublishError> {
        if self.room() == 0 {
            return Err(PublishError::NoRoom);
        }
        let publish = Publish {
            dup: resend,
            retain: false,
            qos: QoS::AtLeastOnce,
            topic: ByteString::from(topic),
            packet_id: self.window.next_id(),
            payload_size: 0,
        };
        self.write_publish(now, publish, payload)?;
        if self.window.is_empty() {
            self.liveness.progress(now);
        }
        self.window.push(token);
        self.note_awaiting(now);
        Ok(())
    }

    /// Puts one QoS 0 publish into the output.
    ///
    /// # Errors
    ///
    /// See [`PublishError`]; nothing was written then and the connection goes on.
    pub fn publish_unacknowledged(
        &mut self,
        now: Instant,
        topic: String,
        payload: &[u8],
    ) -> Result<(), PublishError> {
        if self.state != State::Connected {
            return Err(PublishError::NoRoom);
        }
        let publish = Publish {
            dup: false,
            retain: false,
            qos: QoS::AtMostOnce,
            topic: ByteString::from(topic),
            packet_id: None,
            payload_size: 0,
        };
        self.write_publish(now, publish, payload)
    }

    fn write_publish(
        &mut self,
        now: Instant,
        publish: Publish,
        payload: &[u8],
    ) -> Result<(), PublishError> {
        let topic_bytes = publish.topic.len();
        if topic_bytes > usize::from(u16::MAX) {
            return Err(PublishError::TopicTooLong { bytes: topic_bytes });
        }
        let bytes = topic_bytes + payload.len() + 4;
        let max = self.config.packet_bytes_max;
        let too_large = PublishError::TooLarge { bytes, max };
        if bytes > max {
            return Err(too_large);
        }
        let payload_size = u32::try_from(payload.len()).map_err(|_| too_large)?;
        let publish = Publish {
            payload_size,
            ..publish
        };
        // The codec writes the header only; the payload goes straight into the output, copied once.
        self.encode(Encoded::Publish(publish, None), now)
            .map_err(|_| too_large)?;
        self.output.extend_from_slice(payload);
        Ok(())
    }

    /// Whether [`Machine::subscribe`] and [`Machine::unsubscribe`] may be called now.
    #[must_use]
    pub fn can_change_subscriptions(&self) -> bool {
        self.state == State::Connected && self.change.is_none()
    }

    /// Subscribes to filters, each at QoS 1 or 0. The answer comes as
    /// `MachineEvent::Subscribed`; without one in `MachineConfig::suback_timeout` the connection
    /// is given up.
    ///
    /// # Errors
    ///
    /// [`MachineError::Busy`] if it is not the time for that, and what the codec refuses.
    pub fn subscribe(
        &mut self,
        now: Instant,
        filters: impl IntoIterator<Item = (String, bool)>,
    ) -> Result<(), MachineError> {
        let qos = |at_least_once| match at_least_once {
            true => QoS::AtLeastOnce,
            false => QoS::AtMostOnce,
        };
        let topic_filters: Vec<(ByteString, QoS)> = filters
            .into_iter()
            .map(|(filter, at_least_once)| (ByteString::from(filter), qos(at_least_once)))
            .collect();
        let packet_id = self.begin_change(now, Some(topic_filters.len()))?;
        let packet = Packet::Subscribe {
            packet_id,
            topic_filters,
        };
        self.encode(Encoded::Packet(packet), now)
    }

    /// Gives filters up. The answer comes as `MachineEvent::Unsubscribed`.
    ///
    /// # Errors
    ///
    /// As [`Machine::subscribe`].
    pub fn unsubscribe(
        &mut self,
        now: Instant,
        filters: impl IntoIterator<Item = String>,
    ) -> Result<(), MachineError> {
        let packet_id = self.begin_change(now, None)?;
        let packet = Packet::Unsubscribe {
            packet_id,
            topic_filters: filters.into_iter().map(ByteString::from).collect(),
        };
        self.encode(Encoded::Packet(packet), now)
    }

    fn begin_change(
        &mut self,
        now: Instant,
        subscribed: Option<usize>,
    ) -> Result<NonZeroU16, MachineError> {
        if !self.can_change_subscriptions() {
            return Err(MachineError::Busy);
        }
        let packet_id = self.change_ids.next();
        self.change = Some(Change {
            packet_id,
            subscribed,
            sent_at: now,
        });
        self.note_awaiting(now);
        Ok(packet_id)
    }

    /// Acknowledges a PUBLISH of the server.
    pub fn acknowledge(&mut self, now: Instant, packet_id: NonZeroU16) {
        if self.state == State::Connected {
            // A packet of two bytes always fits.
            let _ = self.encode(Encoded::Packet(Packet::PublishAck { packet_id }), now);
        }
    }

    /// Says whether answers to publishes at QoS 0 are awaited: the link is then watched as closely
    /// as with publishes in flight.
    pub fn await_answers(&mut self, now: Instant, awaited: bool) {
        self.answers_awaited = awaited;
        self.note_awaiting(now);
    }

    /// Writes DISCONNECT and ends the machine. Nothing is written when it is over already.
    pub fn disconnect(&mut self, now: Instant) {
        if self.state == State::Connected {
            // A packet without contents always fits.
            let _ = self.encode(Encoded::Packet(Packet::Disconnect), now);
        }
        self.state = State::Over;
    }
}
