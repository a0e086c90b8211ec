//! Bounds the one kind of label value that clients choose: the names of their outputs.
//!
//! A series lives as long as the process, and a client may name another output with each
//! message. So each sender gets [`OUTPUT_LABELS_MAX`] of them, and what comes later is counted
//! under [`OTHER_OUTPUT`] together. This stands before the recorder, so that it holds for whoever
//! counts: the heads and the bridge. Ids are bounded by the device scope.

use std::collections::{HashMap, HashSet};

use edgehub_proto::limits::ID_LENGTH_MAX;
use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit,
};
use parking_lot::Mutex;

/// Outputs of one sender that get series of their own.
pub const OUTPUT_LABELS_MAX: usize = 64;
/// Bytes of an output's name that gets series of its own.
pub const OUTPUT_LABEL_BYTES_MAX: usize = ID_LENGTH_MAX;
/// The label of all other outputs of a sender.
pub const OTHER_OUTPUT: &str = "(other)";

/// A recorder whose series are bounded.
#[derive(Debug)]
pub(super) struct BoundedOutputs<R> {
    recorder: R,
    /// The outputs of each sender that have series.
    known: Mutex<HashMap<String, HashSet<String>>>,
}

impl<R> BoundedOutputs<R> {
    pub(super) fn new(recorder: R) -> Self {
        Self {
            recorder,
            known: Mutex::default(),
        }
    }

    /// The key to count under, when it is another one.
    fn replacement(&self, key: &Key) -> Option<Key> {
        let value_of = |names: [&str; 2]| {
            let mut labels = key.labels();
            labels.find(|label| names.contains(&label.key()))
        };
        let output = value_of(["route_output", "from_route_output"])?;
        let sender = value_of(["id", "from"]).map_or("", Label::value);
        if output.value().is_empty() || self.is_known(sender, output.value()) {
            return None;
        }
        let labels = key.labels().map(|label| {
            if label.key() == output.key() {
                Label::new(label.key().to_owned(), OTHER_OUTPUT)
            } else {
                label.clone()
            }
        });
        let labels: Vec<Label> = labels.collect();
        Some(Key::from_parts(key.name().to_owned(), labels))
    }

    /// Whether the output has series, now or from now on.
    fn is_known(&self, sender: &str, output: &str) -> bool {
        if output.len() > OUTPUT_LABEL_BYTES_MAX {
            return false;
        }
        let mut known = self.known.lock();
        let Some(outputs) = known.get_mut(sender) else {
            let outputs = HashSet::from([output.to_owned()]);
            known.insert(sender.to_owned(), outputs);
            return true;
        };
        if outputs.contains(output) {
            return true;
        }
        let room = outputs.len() < OUTPUT_LABELS_MAX;
        if room {
            outputs.insert(output.to_owned());
        }
        room
    }
}

impl<R: Recorder> Recorder for BoundedOutputs<R> {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_counter(key, unit, description);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_gauge(key, unit, description);
    }

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_histogram(key, unit, description);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        let replaced = self.replacement(key);
        self.recorder
            .register_counter(replaced.as_ref().unwrap_or(key), metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        let replaced = self.replacement(key);
        self.recorder
            .register_gauge(replaced.as_ref().unwrap_or(key), metadata)
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        let replaced = self.replacement(key);
        self.recorder
            .register_histogram(replaced.as_ref().unwrap_or(key), metadata)
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::identity::Identity;
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::telemetry::metrics::{DropReason, messages_dropped, messages_received};

    #[test]
    fn a_client_cannot_make_series_without_end() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let bounded = BoundedOutputs::new(recorder);
        let (greedy, modest) = (
            Identity::parse("edge1/greedy").unwrap(),
            Identity::parse("edge1/greedy2").unwrap(),
        );
        let long = "x".repeat(OUTPUT_LABEL_BYTES_MAX + 1);
        let longest = "y".repeat(OUTPUT_LABEL_BYTES_MAX);
        metrics::with_local_recorder(&bounded, || {
            messages_received(&greedy, &long).increment(1);
            messages_received(&greedy, &longest).increment(1);
            for n in 0..1000 {
                messages_received(&greedy, &format!("out{n}")).increment(1);
                // The same outputs in another metric, as the bridge counts what it sent.
                messages_dropped(DropReason::NoRoute, &greedy, &format!("out{n}")).increment(1);
            }
            messages_received(&greedy, "").increment(7);
            messages_received(&greedy, "out3").increment(1);
            messages_received(&modest, "out999").increment(1);
        });
        let text = handle.render();
        let value = |line: &str| -> u64 { line.rsplit(' ').next().unwrap().parse().unwrap() };
        let of_greedy = |name: &str, sender: &str| -> Vec<&str> {
            let sender = format!("{sender}=\"edge1/greedy\"");
            text.lines()
                .filter(|line| line.starts_with(name) && line.contains(&sender))
                .collect()
        };
        let received = of_greedy("edgehub_messages_received_total", "id");
        // Those with a name of their own, the other ones, and messages without an output.
        assert_eq!(received.len(), OUTPUT_LABELS_MAX + 2);
        assert_eq!(received.iter().map(|line| value(line)).sum::<u64>(), 1010);
        assert!(received.iter().all(|line| !line.contains(&long)));
        assert!(received.iter().any(|line| line.contains(&longest)));
        let line = |part: &str| text.lines().find(|line| line.contains(part)).unwrap();
        let other = received.len() as u64 - 2;
        assert_eq!(
            line(r#"total{id="edge1/greedy",route_output="(other)",ms_telemetry="True"}"#),
            format!(
                "edgehub_messages_received_total{{id=\"edge1/greedy\",route_output=\"(other)\",\
                 ms_telemetry=\"True\"}} {}",
                1 + 1 + 1000 - other
            )
        );
        assert!(line(r#"id="edge1/greedy",route_output="out3""#).ends_with(" 2"));
        assert!(line(r#"id="edge1/greedy2",route_output="out999""#).ends_with(" 1"));
        let dropped = of_greedy("edgehub_messages_dropped_total", "from");
        assert_eq!(
            dropped.len(),
            OUTPUT_LABELS_MAX,
            "63 outputs and the others"
        );
        assert_eq!(dropped.iter().map(|line| value(line)).sum::<u64>(), 1000);
    }
}
