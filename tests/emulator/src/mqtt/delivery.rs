//! What the hub sends to a client on its own account: methods and desired patches from the
//! outbox, and C2D messages from the queue.

use std::sync::Arc;

use bytes::BytesMut;
use mqttbytes::QoS;
use mqttbytes::v4::Publish;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::CloseReason;
use super::codec::CodecError;
use crate::c2d::Delivery;
use crate::connections::Connection;
use crate::counters::Counter;
use crate::hub::Hub;
use crate::identity::Identity;
use crate::sessions::{Actor, Feature, Outbox, Push};

/// What a method's name may not have in a topic: SDKs read it as a part of a URL.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'#').add(b'%').add(b'+').add(b'?');

/// An identity's session while its connection lives. When it is dropped, the connection has let
/// go of everything.
pub(crate) struct OpenSession<'a> {
    hub: &'a Hub,
    identity: &'a Identity,
    connection: &'a Connection,
    outbox: Arc<Outbox>,
    /// Whether a session was there that this connection goes on with.
    pub(crate) is_present: bool,
}

/// Bytes to write, and what is complete once they are written.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    pub(crate) bytes: BytesMut,
    at_most_once: Vec<u64>,
}

impl<'a> OpenSession<'a> {
    /// Opens the session for a connection that has its identity already.
    ///
    /// # Errors
    /// A newer connection has it.
    pub(crate) fn open(
        hub: &'a Hub,
        identity: &'a Identity,
        connection: &'a Connection,
        clean: bool,
    ) -> Result<Self, CloseReason> {
        let outbox = Arc::<Outbox>::default();
        let actor = connection.actor();
        let is_present = hub
            .sessions
            .connect(identity, actor, clean, outbox.clone())?;
        let opened = Self {
            hub,
            identity,
            connection,
            outbox,
            is_present,
        };
        if identity.module.is_none() {
            let now_ms = hub.clock.now_ms();
            hub.c2d
                .connect(&identity.device, actor, is_present, now_ms)?;
        }
        hub.counters.add(identity, Counter::Connects);
        // There may be C2D messages, and a subscription of before.
        opened.outbox.wake();
        Ok(opened)
    }

    /// Returns when there may be something to send.
    ///
    /// # Cancel safety
    /// A wake-up is not lost.
    pub(crate) async fn ready(&self) {
        self.outbox.ready().await;
    }

    /// Returns when the client reads too slowly to get everything.
    ///
    /// # Cancel safety
    /// Holds no state: dropping it loses nothing.
    pub(crate) async fn overflowed(&self) {
        self.outbox.overflowed().await;
    }

    /// Whether there may be something to send.
    pub(crate) fn is_woken(&self) -> bool {
        self.outbox.is_woken()
    }

    /// Takes what is there.
    ///
    /// # Errors
    /// The connection is fenced.
    pub(crate) fn take(&self) -> Result<Outgoing, CloseReason> {
        let mut outgoing = Outgoing::default();
        for push in self.outbox.take() {
            write_push(&push, &mut outgoing.bytes)?;
        }
        let (sessions, identity) = (&self.hub.sessions, self.identity);
        let Some(qos) = sessions.granted(identity, Feature::CloudToDevice) else {
            return Ok(outgoing);
        };
        let deliveries = self.hub.c2d.deliver(
            &identity.device,
            self.actor(),
            qos == QoS::AtLeastOnce,
            self.hub.clock.now_ms(),
        )?;
        let count = deliveries.len() as u64;
        for delivery in deliveries {
            self.write(&delivery, &mut outgoing)?;
        }
        let counters = &self.hub.counters;
        counters.add_many(identity, Counter::C2dDeliveries, count);
        Ok(outgoing)
    }

    /// What was taken is written.
    ///
    /// # Errors
    /// The connection is fenced.
    pub(crate) fn written(&self, outgoing: &Outgoing) -> Result<(), CloseReason> {
        if outgoing.at_most_once.is_empty() {
            return Ok(());
        }
        Ok(self.hub.c2d.complete(
            &self.identity.device,
            self.actor(),
            &outgoing.at_most_once,
            self.hub.clock.now_ms(),
        )?)
    }

    pub(crate) fn actor(&self) -> Actor<'_> {
        self.connection.actor()
    }

    fn write(&self, delivery: &Delivery, outgoing: &mut Outgoing) -> Result<(), CloseReason> {
        let message = &delivery.message;
        let topic = message.topic(&self.identity.device);
        let mut publish = Publish::new(topic, QoS::AtMostOnce, message.body.clone());
        match delivery.packet_id {
            Some(packet_id) => {
                publish.qos = QoS::AtLeastOnce;
                publish.pkid = packet_id;
                publish.dup = delivery.is_duplicate;
            }
            None => outgoing.at_most_once.push(delivery.sequence),
        }
        publish
            .write(&mut outgoing.bytes)
            .map_err(CodecError::Packet)?;
        Ok(())
    }
}

impl Drop for OpenSession<'_> {
    fn drop(&mut self) {
        let (identity, connection) = (self.identity, self.connection.id());
        self.hub.sessions.disconnect(identity, connection);
        if identity.module.is_none() {
            let now_ms = self.hub.clock.now_ms();
            let c2d = &self.hub.c2d;
            c2d.disconnect(&identity.device, connection, now_ms);
        }
    }
}

/// The PUBLISH of a push, at QoS 0 as all `$iothub` traffic. The limits of names, payloads and
/// twins keep it far below that of MQTT.
fn write_push(push: &Push, bytes: &mut BytesMut) -> Result<(), CodecError> {
    let (topic, body) = match push {
        Push::Desired { version, body } => (
            format!("$iothub/twin/PATCH/properties/desired/?$version={version}"),
            body,
        ),
        Push::Method { rid, name, payload } => {
            let name = utf8_percent_encode(name, ENCODED);
            (format!("$iothub/methods/POST/{name}/?$rid={rid}"), payload)
        }
    };
    let publish = Publish::new(topic, QoS::AtMostOnce, body.as_str());
    publish.write(bytes).map_err(CodecError::Packet)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_methods_name_is_one_level_of_a_topic() {
        let push = Push::Method {
            rid: "r1".to_owned(),
            name: "a b?c".to_owned(),
            payload: "null".to_owned(),
        };
        let mut packet = BytesMut::new();
        write_push(&push, &mut packet).unwrap();
        let text = String::from_utf8_lossy(&packet);
        assert!(
            text.ends_with("$iothub/methods/POST/a%20b%3Fc/?$rid=r1null"),
            "{text}"
        );
    }
}
