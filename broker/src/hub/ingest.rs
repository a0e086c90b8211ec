//! Telemetry on its way from a head into the store.
//!
//! One [`Gather`] belongs to one connection, and [`Ways`] to each client of it. It gathers the messages of a turn, so that the
//! store sees one batch (design.md section 4), and keeps what would otherwise be looked up for
//! each message: the plan and the counter of every output. [`Ingest`] is both for MQTT, where a
//! connection has one client.

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

/// The messages of one connection on their way into the store, whoever of its clients sent them.
#[derive(Debug)]
pub struct Gather {
    hub: Arc<Hub>,
    progress: Arc<CommitProgress>,
    batch: Vec<Append>,
    last_sequence: u64,
}

/// A sender, and where its messages go.
#[derive(Debug)]
pub struct Ways {
    sender: Identity,
    /// The routes that `ways` was made from.
    router: Arc<Router>,
    /// By the name of the output; empty for messages without one.
    ways: HashMap<String, Way>,
    /// The sender's model, a stamp of each message (spec/core.md 1.2).
    model_id: Option<Arc<str>>,
}

/// The way of the messages of a connection with one client into the store.
#[derive(Debug)]
pub struct Ingest {
    gather: Gather,
    ways: Ways,
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

impl Gather {
    /// Nothing gathered yet.
    #[must_use]
    pub fn new(hub: Arc<Hub>) -> Self {
        Self {
            hub,
            progress: CommitProgress::new(),
            batch: Vec::new(),
            last_sequence: 0,
        }
    }

    /// How far this connection's messages are committed.
    #[must_use]
    pub fn progress(&self) -> &Arc<CommitProgress> {
        &self.progress
    }

    /// Whose store they go to.
    #[must_use]
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Takes a message: routes it and adds it to the batch, or drops it.
    pub fn take(
        &mut self,
        ways: &mut Ways,
        sequence: u64,
        mut message: Message,
        now_ms: u64,
    ) -> Outcome {
        // What the client sent counts, without our stamps.
        let size = message.size();
        if let Some(model_id) = &ways.model_id {
            message.system.set(SystemProperty::ModelId, &**model_id);
        }
        let output = message.system.get(SystemProperty::OutputName);
        let output = output.unwrap_or_default();
        if size > MAX_MESSAGE_BYTES {
            let why = format_args!("{size} bytes are more than {MAX_MESSAGE_BYTES}");
            return self.dropped(&ways.sender, DropReason::TooLarge, output, &why);
        }
        let way = ways.way(&self.hub, output);
        let targets = way.map(|way| {
            way.received.increment(1);
            way.plan.targets(now_ms)
        });
        let Some(targets) = targets.filter(|targets| !targets.is_empty()) else {
            let why = "it matches no route";
            return self.dropped(&ways.sender, DropReason::NoRoute, output, &why);
        };
        self.batch.push(Append {
            sender: ways.sender.clone(),
            message: stored::encode_message(&message),
            enqueued_ms: now_ms,
            targets,
        });
        self.last_sequence = sequence;
        Outcome::Gathered
    }

    /// Counts a message that a head does not take.
    pub fn dropped(
        &self,
        sender: &Identity,
        reason: DropReason,
        output: &str,
        why: &dyn Display,
    ) -> Outcome {
        self.hub.dropped(sender, output, reason, why);
        Outcome::Dropped(reason)
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
}

impl Ways {
    /// The ways of messages of `sender`.
    #[must_use]
    pub fn new(hub: &Hub, sender: Identity) -> Self {
        Self {
            model_id: hub.client_info(&sender).model_id,
            sender,
            router: hub.router(),
            ways: HashMap::new(),
        }
    }

    /// The sender has another model from now on.
    pub fn set_model_id(&mut self, model_id: Option<Arc<str>>) {
        self.model_id = model_id;
    }

    /// Works out the way of an output. A client chooses the names, of up to 64 KiB each: what is
    /// kept of them is bounded.
    fn way(&mut self, hub: &Hub, output: &str) -> Option<&Way> {
        if !hub.is_router(&self.router) {
            // Plans of routes that are not in force any more.
            self.router = hub.router();
            self.ways.clear();
        }
        let is_known = self.ways.contains_key(output);
        if !is_known && (self.ways.len() >= PLANS_MAX || output.len() > PLAN_NAME_BYTES_MAX) {
            self.ways.clear();
        }
        if !is_known {
            let named = Some(output).filter(|output| !output.is_empty());
            let way = Way {
                plan: self.router.plan(&self.sender, named),
                received: metrics::messages_received(&self.sender, output),
            };
            self.ways.insert(output.to_owned(), way);
        }
        self.ways.get(output)
    }
}

impl Ingest {
    /// The way of messages of `sender`.
    #[must_use]
    pub fn new(hub: Arc<Hub>, sender: Identity) -> Self {
        Self {
            ways: Ways::new(&hub, sender),
            gather: Gather::new(hub),
        }
    }

    /// How far this connection's messages are committed.
    #[must_use]
    pub fn progress(&self) -> &Arc<CommitProgress> {
        self.gather.progress()
    }

    /// Takes a message as MQTT has it: routes it and adds it to the batch, or drops it.
    pub fn take(&mut self, telemetry: Telemetry<'_>, now_ms: u64) -> Outcome {
        let sender = &self.ways.sender;
        let PublishTopic::Telemetry {
            device_id,
            module_id,
            bag,
        } = telemetry.topic
        else {
            let why = "its topic is none that this hub takes";
            return self
                .gather
                .dropped(sender, DropReason::UnknownTopic, "", &why);
        };
        if device_id != sender.device_id() || module_id != sender.module_id() {
            return Outcome::Foreign;
        }
        let mut message = Message {
            body: telemetry.body,
            ..Message::default()
        };
        if let Err(error) = bag::decode_into(bag, &mut message) {
            return self
                .gather
                .dropped(sender, DropReason::BadProperties, "", &error);
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
        let Self { gather, ways } = self;
        gather.take(ways, telemetry.sequence, message, now_ms)
    }

    /// The batch gathered so far, if any, for the store.
    pub fn take_batch(&mut self) -> Option<AppendBatch> {
        self.gather.take_batch()
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
            let kept = ingest.ways.ways.keys().map(String::len).sum::<usize>();
            assert!(kept <= 60_000 + PLANS_MAX * PLAN_NAME_BYTES_MAX, "{kept}");
            assert!(ingest.ways.ways.len() <= PLANS_MAX);
        };
        for n in 0..200 {
            take(&mut ingest, &format!("short{n}"));
            take(&mut ingest, &format!("{n:060000}"));
        }
        for n in 0..1000 {
            take(&mut ingest, &format!("short{n}"));
        }
        take(&mut ingest, "");
        assert!(ingest.ways.ways.contains_key(""));
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
