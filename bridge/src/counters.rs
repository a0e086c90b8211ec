//! The public counters of messages on their way upstream (operations.md A2.3).

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use edgehub_proto::{
    identity::Identity,
    message::{Message, SystemProperty},
    stored,
};
use edgehub_storage::Queue;
use metrics::Counter;
use tracing::debug;

use crate::lanes::{Discarded, DropReason, Entry};

/// Label values per session that are kept with their counters; others are looked up each time.
const HANDLES_MAX: usize = 64;

/// Counts `edgehub_messages_sent_total` of one session: when a message is accepted, with handles
/// that are looked up once per (output, priority).
#[derive(Debug)]
pub(crate) struct SentCounters {
    from: Identity,
    handles: HashMap<(String, u32), Counter>,
    /// The last one used: nearly always the next one too.
    last: Option<(String, u32, Counter)>,
    /// Counters of messages in flight, from token `front` on.
    in_flight: VecDeque<Option<Counter>>,
    front: u64,
}

impl SentCounters {
    pub(crate) fn new(from: Identity) -> Self {
        Self {
            from,
            handles: HashMap::new(),
            last: None,
            in_flight: VecDeque::new(),
            front: 0,
        }
    }

    /// A message was handed to the connection. Tokens count up by one.
    pub(crate) fn sent(&mut self, token: u64, output: &str, priority: u32) {
        let counter = self.handle(output, priority);
        if self.in_flight.is_empty() {
            self.front = token;
        }
        // Tokens of messages that were not sent leave a gap.
        while self.front + (self.in_flight.len() as u64) < token {
            self.in_flight.push_back(None);
        }
        self.in_flight.push_back(Some(counter));
    }

    /// A message was accepted.
    pub(crate) fn accepted(&mut self, token: u64) {
        let index = token
            .checked_sub(self.front)
            .and_then(|index| usize::try_from(index).ok());
        if let Some(counter) = index
            .and_then(|index| self.in_flight.get_mut(index))
            .and_then(Option::take)
        {
            counter.increment(1);
        }
        while self.in_flight.front().is_some_and(Option::is_none) {
            self.in_flight.pop_front();
            self.front += 1;
        }
    }

    fn handle(&mut self, output: &str, priority: u32) -> Counter {
        if let Some((last_output, last_priority, counter)) = &self.last
            && *last_priority == priority
            && last_output == output
        {
            return counter.clone();
        }
        let key = (output.to_owned(), priority);
        let counter = self.handles.get(&key).cloned().unwrap_or_else(|| {
            metrics::counter!(
                "edgehub_messages_sent_total",
                "from" => self.from.as_str().to_owned(),
                "to" => "upstream",
                "from_route_output" => output.to_owned(),
                "to_route_input" => "",
                "priority" => priority.to_string(),
                "ms_telemetry" => "True",
            )
        });
        if self.handles.len() < HANDLES_MAX {
            self.handles.insert(key, counter.clone());
        }
        self.last = Some((output.to_owned(), priority, counter.clone()));
        counter
    }
}

/// The output that a message was sent to, as a label.
pub(crate) fn output_of(message: &Message) -> &str {
    message
        .system
        .get(SystemProperty::OutputName)
        .unwrap_or_default()
}

/// What was asked about a twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TwinOperation {
    Get,
    Report,
}

/// Counts a twin request that the upstream answered.
pub(crate) fn twin_operation(id: &Identity, operation: TwinOperation, took: Duration) {
    let (total, seconds, site) = match operation {
        TwinOperation::Get => (
            "edgehub_gettwin_total",
            "edgehub_gettwin_duration_seconds",
            "source",
        ),
        TwinOperation::Report => (
            "edgehub_reported_properties_total",
            "edgehub_reported_properties_update_duration_seconds",
            "target",
        ),
    };
    let id = id.as_str();
    metrics::counter!(
        total, site => "upstream", "id" => id.to_owned(), "ms_telemetry" => "True"
    )
    .increment(1);
    metrics::histogram!(seconds, site => "upstream", "id" => id.to_owned()).record(took);
}

/// Counts publishes from upstream that were not taken, by the reason.
pub(crate) fn ignored_publish(reason: &'static str) {
    metrics::counter!("edgehub_upstream_publishes_ignored_total", "reason" => reason).increment(1);
}

/// Counts subscriptions that the upstream refused.
pub(crate) fn refused_subscription(filter: &'static str) {
    metrics::counter!("edgehub_upstream_subscriptions_refused_total", "filter" => filter)
        .increment(1);
}

/// Counts deliveries that the upstream did not take, by the class of its error.
pub(crate) fn refused_delivery(class: &'static str) {
    metrics::counter!("edgehub_upstream_deliveries_refused_total", "class" => class).increment(1);
}

/// Counts a direct method from upstream that was answered, with the time that it took.
pub(crate) fn method_answered(to: &Identity, took: Duration) {
    let to = to.as_str().to_owned();
    metrics::histogram!(
        "edgehub_direct_method_duration_seconds", "from" => "upstream", "to" => to
    )
    .record(took);
}

/// Counts a message that a lane gave up, unless the store's sweep for expired messages was quicker
/// and has counted it. `queues` are those of the endpoint.
pub(crate) fn count_discarded(queues: &[Queue], discarded: &Discarded) {
    let Discarded {
        priority,
        reason,
        entry,
    } = discarded;
    let queue = queues.iter().find(|queue| queue.id().priority == *priority);
    if queue.is_none_or(|queue| !queue.is_settled(entry.offset)) {
        debug!(identity = %entry.sender, reason = reason.label(), "message dropped");
        count_dropped(entry, *reason);
    }
}

/// Counts a message that was given up.
pub(crate) fn count_dropped(entry: &Entry, reason: DropReason) {
    let message = stored::decode_message(entry.message.clone());
    let output = message
        .as_ref()
        .map(output_of)
        .unwrap_or_default()
        .to_owned();
    dropped(&entry.sender, output, reason);
}

/// Counts a message that was given up, whose output is known.
pub(crate) fn dropped(from: &Identity, output: String, reason: DropReason) {
    metrics::counter!(
        "edgehub_messages_dropped_total",
        "reason" => reason.label(),
        "from" => from.as_str().to_owned(),
        "from_route_output" => output,
        "ms_telemetry" => "True",
    )
    .increment(1);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use edgehub_proto::message::Property;
    use metrics::{Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
    use parking_lot::Mutex;

    use super::*;
    use crate::test_support::id;

    /// Keeps counters, and how often a counter was asked for.
    #[derive(Debug, Default)]
    pub(crate) struct Counters {
        values: Mutex<HashMap<String, Arc<AtomicU64>>>,
        lookups: AtomicU64,
    }

    impl Recorder for Counters {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            self.lookups.fetch_add(1, Ordering::Relaxed);
            let labels: Vec<String> = key
                .labels()
                .map(|label| format!("{}={}", label.key(), label.value()))
                .collect();
            let name = format!("{}{{{}}}", key.name(), labels.join(","));
            Counter::from_arc(Arc::clone(self.values.lock().entry(name).or_default()))
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::noop()
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    pub(crate) fn values(recorder: &Counters) -> Vec<(String, u64)> {
        let values = recorder.values.lock();
        let mut list: Vec<(String, u64)> = values
            .iter()
            .map(|(name, value)| (name.clone(), value.load(Ordering::Relaxed)))
            .collect();
        list.sort();
        list
    }

    #[test]
    fn accepted_messages_are_counted_by_output_and_priority_without_a_lookup_each() {
        let recorder = Counters::default();
        metrics::with_local_recorder(&recorder, || {
            let mut counters = SentCounters::new(id("edge1/modA"));
            for token in 0..100 {
                counters.sent(token, if token % 2 == 0 { "a" } else { "b" }, 3);
            }
            // Token 100 could not be sent.
            counters.sent(101, "a", 4);
            for token in (50..102).rev().chain(0..40) {
                counters.accepted(token);
                counters.accepted(token);
            }
        });
        let name = |output: &str, priority| {
            format!(
                "edgehub_messages_sent_total{{from=edge1/modA,to=upstream,\
                 from_route_output={output},to_route_input=,priority={priority},\
                 ms_telemetry=True}}"
            )
        };
        let expected = [(name("a", 3), 45), (name("a", 4), 1), (name("b", 3), 45)];
        assert_eq!(values(&recorder), expected);
        assert_eq!(recorder.lookups.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn dropped_messages_are_counted_with_reason_and_output() {
        let mut message = Message::default();
        message.properties.push(Property {
            key: "k".to_owned(),
            value: None,
        });
        message.system.set(SystemProperty::OutputName, "out");
        let entry = Entry {
            offset: 0,
            sender: id("edge1/modA"),
            message: stored::encode_message(&message),
            enqueued_ms: 0,
            expires_at_ms: None,
            shared: None,
        };
        let recorder = Counters::default();
        metrics::with_local_recorder(&recorder, || {
            count_dropped(&entry, DropReason::TtlExpiry);
            count_dropped(&entry, DropReason::DeviceInvalidState);
        });
        let name = |reason| {
            format!(
                "edgehub_messages_dropped_total{{reason={reason},from=edge1/modA,\
                 from_route_output=out,ms_telemetry=True}}"
            )
        };
        assert_eq!(
            values(&recorder),
            [(name("device_invalid_state"), 1), (name("ttl_expiry"), 1)]
        );
    }
}
