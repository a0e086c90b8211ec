//! What has been sent and not acknowledged, what comes next, and what was acknowledged. No I/O but
//! the log.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::Result;
use bytes::{Bytes, BytesMut};
use mqttbytes::QoS;
use mqttbytes::v4::Publish;
use tokio::time::Instant;

use super::SenderOptions;
use crate::{Acknowledged, SenderLog};

/// One message on its way.
struct InFlight {
    packet_id: u16,
    sequence: u64,
    body: Bytes,
    /// Sent on an earlier connection.
    again: bool,
}

/// The sender's messages, in order.
pub(super) struct Outbox {
    id: String,
    topic: String,
    body_bytes: usize,
    window: usize,
    interval: Duration,
    count: Option<u64>,
    next_sequence: u64,
    next_packet_id: u16,
    next_due: Instant,
    in_flight: VecDeque<InFlight>,
    /// How many of `in_flight` have been written on this connection.
    written: usize,
    acknowledged: Vec<Acknowledged>,
    logged: usize,
    log: Option<SenderLog>,
    log_error: Option<anyhow::Error>,
}

impl Outbox {
    pub(super) fn new(options: &SenderOptions, id: &str, log: Option<SenderLog>) -> Self {
        let topic = match id.split_once('/') {
            Some((device, module)) => format!("devices/{device}/modules/{module}/messages/events/"),
            None => format!("devices/{id}/messages/events/"),
        };
        Self {
            id: id.to_owned(),
            // Each property in its encoded form, as the SDKs send it.
            topic: topic + "sender=edgehub-lab",
            body_bytes: options.body_bytes,
            window: usize::from(options.window.max(1)),
            interval: options.interval,
            count: options.count,
            next_sequence: 1,
            next_packet_id: 1,
            next_due: Instant::now(),
            in_flight: VecDeque::new(),
            written: 0,
            acknowledged: Vec::new(),
            logged: 0,
            log,
            log_error: None,
        }
    }

    /// On a new connection everything unacknowledged is written again, first and in order.
    pub(super) fn connected(&mut self) {
        for message in self.in_flight.iter_mut().take(self.written) {
            message.again = true;
        }
        self.written = 0;
    }

    /// Encodes what may be sent now: what is to be sent again, then new messages as far as window,
    /// pace and count allow.
    pub(super) fn fill(&mut self, out: &mut BytesMut, now: Instant, no_more: bool) -> Result<()> {
        loop {
            while let Some(message) = self.in_flight.get(self.written) {
                let body = message.body.clone();
                let mut publish = Publish::from_bytes(&*self.topic, QoS::AtLeastOnce, body);
                publish.pkid = message.packet_id;
                publish.dup = message.again;
                let written = publish.write(out);
                written.map_err(|error| anyhow::anyhow!("cannot encode a publish: {error:?}"))?;
                self.written += 1;
            }
            if !self.may_begin(now, no_more) {
                return Ok(());
            }
            self.begin(now);
        }
    }

    fn may_begin(&self, now: Instant, no_more: bool) -> bool {
        !no_more
            && self.in_flight.len() < self.window
            && self.count.is_none_or(|count| self.next_sequence <= count)
            && now >= self.next_due
    }

    fn begin(&mut self, now: Instant) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        // Unique among those in flight, because the window is far smaller than the id space.
        let packet_id = self.next_packet_id;
        self.next_packet_id = packet_id.checked_add(1).unwrap_or(1);
        self.next_due = if self.interval.is_zero() {
            now
        } else {
            now + self.interval
        };
        let body = body(&self.id, sequence, self.body_bytes);
        self.in_flight.push_back(InFlight {
            packet_id,
            sequence,
            body,
            again: false,
        });
    }

    /// When the next message is due by its interval; `None` when something else is awaited.
    pub(super) fn due(&self, no_more: bool) -> Option<Instant> {
        let due = self.next_due;
        self.may_begin(due, no_more).then_some(due)
    }

    /// Takes a PUBACK. One that is not awaited means that the hub invents acknowledgements.
    pub(super) fn acknowledge(&mut self, packet_id: u16) -> Result<()> {
        let position = self.in_flight.iter().position(|m| m.packet_id == packet_id);
        let written = position.filter(|position| *position < self.written);
        let Some(message) = written.and_then(|position| self.in_flight.remove(position)) else {
            anyhow::bail!("PUBACK for {packet_id}, which was not sent");
        };
        self.written -= 1;
        self.acknowledged
            .push(Acknowledged::new(message.sequence, &message.body));
        Ok(())
    }

    /// Writes what was acknowledged since the last call to the log file.
    pub(super) fn log(&mut self) {
        let new = self.acknowledged.get(self.logged..).unwrap_or_default();
        if let Some(log) = self.log.as_mut().filter(|_| !new.is_empty()) {
            self.log_error = log.append(new).err().or_else(|| self.log_error.take());
        }
        self.logged = self.acknowledged.len();
    }

    pub(super) fn log_error(&mut self) -> Option<anyhow::Error> {
        self.log_error.take()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub(super) fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// Whether everything that is to be sent has been acknowledged.
    pub(super) fn is_done(&self, no_more: bool) -> bool {
        let no_more = no_more || self.count.is_some_and(|count| self.next_sequence > count);
        no_more && self.in_flight.is_empty()
    }

    pub(super) fn into_acknowledged(self) -> Vec<Acknowledged> {
        self.acknowledged
    }
}

/// A JSON body that names sender and number, padded to `bytes`.
fn body(id: &str, sequence: u64, bytes: usize) -> Bytes {
    let start = format!(r#"{{"sender":"{id}","sequence":{sequence},"padding":""#);
    let padding = bytes.saturating_sub(start.len() + 2);
    Bytes::from(start + &"x".repeat(padding) + "\"}")
}

#[cfg(test)]
mod tests {
    use mqttbytes::v4::{Packet, read};

    use super::*;
    use crate::ConnectionString;

    fn outbox(window: u16, count: Option<u64>) -> Outbox {
        let string = ConnectionString::parse("HostName=h;DeviceId=leaf1;SharedAccessKey=a2V5");
        let mut options = SenderOptions::new(string.unwrap(), std::path::Path::new("/ca"), 8883);
        (options.window, options.count) = (window, count);
        Outbox::new(&options, "leaf1", None)
    }

    fn sent(outbox: &mut Outbox) -> Vec<(u16, bool)> {
        let mut bytes = BytesMut::new();
        outbox.fill(&mut bytes, Instant::now(), false).unwrap();
        let mut packets = Vec::new();
        while !bytes.is_empty() {
            let Packet::Publish(publish) = read(&mut bytes, 10_000).unwrap() else {
                panic!("only publishes")
            };
            assert_eq!(
                publish.topic,
                "devices/leaf1/messages/events/sender=edgehub-lab"
            );
            assert_eq!(publish.payload.len(), 256);
            packets.push((publish.pkid, publish.dup));
        }
        packets
    }

    #[test]
    fn the_window_is_filled_and_what_was_lost_is_sent_again_in_order() {
        let mut outbox = outbox(3, Some(5));
        assert_eq!(sent(&mut outbox), [(1, false), (2, false), (3, false)]);
        assert_eq!(sent(&mut outbox), []);
        outbox.acknowledge(1).unwrap();
        assert_eq!(sent(&mut outbox), [(4, false)]);
        outbox.connected();
        assert_eq!(sent(&mut outbox), [(2, true), (3, true), (4, true)]);
        for id in 2..=4 {
            assert!(!outbox.is_done(false));
            outbox.acknowledge(id).unwrap();
        }
        assert_eq!(sent(&mut outbox), [(5, false)]);
        outbox.acknowledge(5).unwrap();
        assert!(outbox.is_done(false));
        let log = outbox.into_acknowledged();
        assert_eq!(
            log.iter().map(|entry| entry.sequence).collect::<Vec<_>>(),
            [1, 2, 3, 4, 5]
        );
        assert_eq!(log[0], Acknowledged::new(1, &body("leaf1", 1, 256)));
    }

    #[test]
    fn an_acknowledgement_of_nothing_is_an_error() {
        let mut outbox = outbox(2, None);
        assert!(outbox.acknowledge(1).is_err());
        sent(&mut outbox);
        outbox.connected();
        assert!(
            outbox.acknowledge(1).is_err(),
            "not written on this connection yet"
        );
    }

    #[test]
    fn nothing_is_begun_after_the_end_was_asked_for() {
        let mut outbox = outbox(1, None);
        sent(&mut outbox);
        outbox.acknowledge(1).unwrap();
        let mut bytes = BytesMut::new();
        outbox.fill(&mut bytes, Instant::now(), true).unwrap();
        assert!(bytes.is_empty() && outbox.is_done(true) && !outbox.is_done(false));
    }
}
