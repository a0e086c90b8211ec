//! Telemetry on its way from a head into the store.
//!
//! One [`Ingest`] belongs to one connection. It gathers the messages of a turn, so that the
//! store sees one batch (design.md section 4), and keeps what would otherwise be looked up for
//! each message: the plan and the counter of every output.

use std::collections::HashMap;
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
    ways: HashMap<Option<String>, Way>,
    batch: Vec<Append>,
    last_sequence: u64,
}

struct Way {
    plan: Plan,
    received: Counter,
    label: String,
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
            return self.dropped(DropReason::UnknownTopic, "");
        };
        if device_id != self.sender.device_id() || module_id != self.sender.module_id() {
            return Outcome::Foreign;
        }
        let mut message = Message {
            body: telemetry.body,
            ..Message::default()
        };
        if bag::decode_into(bag, &mut message).is_err() {
            return self.dropped(DropReason::BadProperties, "");
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
        let output = message
            .system
            .get(SystemProperty::OutputName)
            .map(str::to_owned);
        self.follow_routes();
        let way = Self::way(
            &mut self.ways,
            &self.hub,
            &self.router,
            &self.sender,
            output,
        );
        if message.size() > MAX_MESSAGE_BYTES {
            let label = way.label.clone();
            return self.dropped(DropReason::TooLarge, &label);
        }
        way.received.increment(1);
        if way.plan.is_empty() {
            let label = way.label.clone();
            return self.dropped(DropReason::NoRoute, &label);
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

    /// Forgets plans of routes that are not in force any more.
    fn follow_routes(&mut self) {
        if !self.hub.is_router(&self.router) {
            self.router = self.hub.router();
            self.ways.clear();
        }
    }

    fn way<'a>(
        ways: &'a mut HashMap<Option<String>, Way>,
        hub: &Hub,
        router: &Router,
        sender: &Identity,
        output: Option<String>,
    ) -> &'a Way {
        if ways.len() >= PLANS_MAX && !ways.contains_key(&output) {
            ways.clear();
        }
        ways.entry(output).or_insert_with_key(|output| {
            let label = hub.output_label(sender, output.as_deref());
            Way {
                plan: router.plan(sender, output.as_deref()),
                received: metrics::messages_received(sender, &label),
                label,
            }
        })
    }

    fn dropped(&self, reason: DropReason, label: &str) -> Outcome {
        let counter = metrics::messages_dropped(reason, &self.sender, label);
        counter.increment(1);
        tracing::debug!("Dropped a message of {}: {}", self.sender, reason.label());
        Outcome::Dropped(reason)
    }
}
