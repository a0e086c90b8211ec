//! Telemetry on its way from a head into the store.
//!
//! One [`Ingest`] belongs to one connection. It gathers the messages of a turn, so that the
//! store sees one batch (design.md section 4), and keeps what would otherwise be looked up for
//! each message: the plan and the counter of every output.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::Arc;

use ::metrics::Counter;
use bytes::Bytes;
use edgehub_proto::bag;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{MAX_MESSAGE_BYTES, Message, Property, SystemProperty};
use edgehub_proto::stored;
use edgehub_proto::topic::PublishTopic;
use edgehub_storage::{Append, AppendBatch, CommitProgress, CommitTicket};

use super::Hub;
use crate::routing::{Plan, Router};
use crate::telemetry::metrics::{self, DropReason};

/// Outputs whose plan a connection keeps.
const PLANS_MAX: usize = 64;
/// Bytes of an output's name beside which others are kept; a longer one is kept alone.
const PLAN_NAME_BYTES_MAX: usize = 256;

/// A telemetry message as a head received it.
#[derive(Debug)]
pub struct Telemetry<'a> {
    /// The sender's number of this message on its connection.
    pub sequence: u64,
    /// MQTT's DUP bit.
    pub duplicate: bool,
    /// MQTT's RETAIN bit.
    pub retain: bool,
    /// What the topic says.
    pub topic: PublishTopic<'a>,
    /// The body.
    pub body: Bytes,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It waits in the batch; acknowledge it after the commit.
    Gathered,
    /// It is dropped and counted; acknowledge it in its turn.
    Dropped(DropReason),
    /// Its topic names another identity: close the connection (design.md D4).
    Foreign,
}

/// The way of one connection's messages into the store.
#[derive(Debug)]
pub struct Ingest {
    hub: Arc<Hub>,
    sender: Identity,
    progress: Arc<CommitProgress>,
    /// The routes that `ways` was made from.
    router: Arc<Router>,
    /// By the name of the output; empty for messages without one.
    ways: HashMap<String, Way>,
    batch: Vec<Append>,
    last_sequence: u64,
}

struct Way {
    plan: Plan,
    received: Counter,
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Way")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl Ingest {
    /// The way of messages of `sender`.
    #[must_use]
    pub fn new(hub: Arc<Hub>, sender: Identity) -> Self {
        let router = hub.router();
        Self {
            hub,
            sender,
            progress: CommitProgress::new(),
            router,
            ways: HashMap::new(),
            batch: Vec::new(),
            last_sequence: 0,
        }
    }

    /// How far this connection's messages are committed.
    #[must_use]
    pub fn progress(&self) -> &Arc<CommitProgress> {
        &self.progress
    }

    /// Takes a message: routes it and adds it to the batch, or drops it.
    pub fn take(&mut self, telemetry: Telemetry<'_>, now_ms: u64) -> Outcome {
        let PublishTopic::Telemetry {
            device_id,
            module_id,
            bag,
        } = telemetry.topic
        else {
            let why = "its topic is none that this hub takes";
            return self.dropped(DropReason::UnknownTopic, "", &why);
        };
        if device_id != self.sender.device_id() || module_id != self.sender.module_id() {
            return Outcome::Foreign;
        }
        let mut message = Message {
            body: telemetry.body,
            ..Message::default()
        };
        if let Err(error) = bag::decode_into(bag, &mut message) {
            return self.dropped(DropReason::BadProperties, "", &error);
        }
        for (set, key) in [
            (telemetry.retain, "mqtt-retain"),
            (telemetry.duplicate, "mqtt-dup"),
        ] {
            if set {
                let value = Some("true".to_owned());
                message.properties.push(Property {
                    key: key.to_owned(),
                    value,
                });
            }
        }
        let output = message.system.get(SystemProperty::OutputName);
        let output = output.unwrap_or_default();
        let size = message.size();
        if size > MAX_MESSAGE_BYTES {
            let why = format_args!("{size} bytes are more than {MAX_MESSAGE_BYTES}");
            return self.dropped(DropReason::TooLarge, output, &why);
        }
        if !self.hub.is_router(&self.router) {
            // Plans of routes that are not in force any more.
            self.router = self.hub.router();
            self.ways.clear();
        }
        let way = match self.ways.get(output) {
            Some(way) => way,
            None => Self::new_way(&mut self.ways, &self.router, &self.sender, output),
        };
        way.received.increment(1);
        if way.plan.is_empty() {
            return self.dropped(DropReason::NoRoute, output, &"it matches no route");
        }
        self.batch.push(Append {
            sender: self.sender.clone(),
            message: stored::encode_message(&message),
            enqueued_ms: now_ms,
            targets: way.plan.targets(now_ms),
        });
        self.last_sequence = telemetry.sequence;
        Outcome::Gathered
    }

    /// The batch gathered so far, if any, for the store.
    pub fn take_batch(&mut self) -> Option<AppendBatch> {
        if self.batch.is_empty() {
            return None;
        }
        let ticket = CommitTicket {
            progress: Arc::clone(&self.progress),
            sequence: self.last_sequence,
        };
        Some(AppendBatch {
            appends: std::mem::take(&mut self.batch),
            ticket,
        })
    }

    /// Works out the way of an output. A client chooses the names, of up to 64 KiB each: what is
    /// kept of them is bounded.
    fn new_way<'a>(
        ways: &'a mut HashMap<String, Way>,
        router: &Router,
        sender: &Identity,
        output: &str,
    ) -> &'a Way {
        if ways.len() >= PLANS_MAX || output.len() > PLAN_NAME_BYTES_MAX {
            ways.clear();
        }
        ways.entry(output.to_owned()).or_insert_with(|| Way {
            plan: router.plan(sender, Some(output).filter(|output| !output.is_empty())),
            received: metrics::messages_received(sender, output),
        })
    }

    fn dropped(&self, reason: DropReason, output: &str, why: &dyn Display) -> Outcome {
        self.hub.dropped(&self.sender, output, reason, why);
        Outcome::Dropped(reason)
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::topic::parse_publish;
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::test_support::*;

    fn telemetry(topic: &str, bytes: usize) -> Telemetry<'_> {
        Telemetry {
            sequence: 1,
            duplicate: false,
            retain: false,
            topic: parse_publish(topic),
            body: vec![0; bytes].into(),
        }
    }

    #[tokio::test]
    async fn the_outputs_of_a_client_do_not_fill_the_memory() {
        let test = TestHub::new();
        let mut ingest = Ingest::new(Arc::clone(&test.hub), id("edge1/modA"));
        let take = |ingest: &mut Ingest, output: &str| {
            let topic = format!("devices/edge1/modules/modA/messages/events/%24.on={output}");
            assert_eq!(ingest.take(telemetry(&topic, 1), 0), Outcome::Gathered);
            let kept = ingest.ways.keys().map(String::len).sum::<usize>();
            assert!(kept <= 60_000 + PLANS_MAX * PLAN_NAME_BYTES_MAX, "{kept}");
            assert!(ingest.ways.len() <= PLANS_MAX);
        };
        for n in 0..200 {
            take(&mut ingest, &format!("short{n}"));
            take(&mut ingest, &format!("{n:060000}"));
        }
        for n in 0..1000 {
            take(&mut ingest, &format!("short{n}"));
        }
        take(&mut ingest, "");
        assert!(ingest.ways.contains_key(""));
    }

    #[tokio::test]
    async fn what_is_dropped_is_counted_each_time_and_said_once_in_a_while() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let _recording = ::metrics::set_default_local_recorder(&recorder);
        let log = LogSink::default();
        let _logging = log.start();
        let test = TestHub::new();
        let mut leaf0 = Ingest::new(Arc::clone(&test.hub), id("leaf0"));
        let drops = [
            ("foo/bar", 0, DropReason::UnknownTopic),
            (
                "devices/leaf0/messages/events/a=%ff",
                0,
                DropReason::BadProperties,
            ),
            (
                "devices/leaf0/messages/events/",
                MAX_MESSAGE_BYTES + 1,
                DropReason::TooLarge,
            ),
        ];
        for (topic, bytes, reason) in drops {
            for _ in 0..100 {
                let outcome = leaf0.take(telemetry(topic, bytes), 0);
                assert_eq!(outcome, Outcome::Dropped(reason));
            }
        }
        assert!(leaf0.take_batch().is_none());
        let metrics = handle.render();
        for (_, _, reason) in drops {
            let line = format!(
                "edgehub_messages_dropped_total{{reason=\"{}\",from=\"leaf0\",\
                 from_route_output=\"\",ms_telemetry=\"True\"}} 100",
                reason.label()
            );
            assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
        }
        assert!(
            !metrics.contains("edgehub_messages_received_total"),
            "{metrics}"
        );
        let lines = log.text();
        assert_eq!(
            lines.matches("Dropped a message of leaf0: ").count(),
            3,
            "{lines}"
        );
        assert_eq!(lines.matches(" WARN ").count(), 3, "{lines}");
        for why in [
            "its topic is none that this hub takes (unknown_topic, 1 since",
            "a property is not UTF-8 (bad_properties, 1 since",
            "262145 bytes are more than 262144 (too_large, 1 since",
        ] {
            assert!(lines.contains(why), "{why}\n{lines}");
        }
    }
}
