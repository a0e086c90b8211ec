//! Metrics in the names, labels and text form of spec/operations.md A2.
//!
//! Handles are made once and kept by whoever counts: making one looks its labels up, adding to
//! one is a single atomic. Label order on the wire is `iothub`, `edge_device`,
//! `instance_number`, the metric's own, `ms_telemetry`.

use std::num::NonZeroU32;
use std::time::Duration;

use edgehub_proto::identity::Identity;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use super::outputs::BoundedOutputs;

/// The content type of `/metrics`.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The label of what comes from or goes to the upstream.
pub const UPSTREAM: &str = "upstream";

/// Quantiles of every summary; edgeAgent looks for 0.9 (spec/operations.md A2.4).
const QUANTILES: [f64; 4] = [0.1, 0.5, 0.9, 0.99];
/// A summary tells of ten minutes, in five parts.
const SUMMARY_PART: Duration = Duration::from_secs(120);
const SUMMARY_PARTS: NonZeroU32 = NonZeroU32::MIN.saturating_add(4);

/// The process's metrics; renders them on request.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// The recorder was installed before: a process has one.
#[derive(Debug, thiserror::Error)]
#[error("the metrics of this process were started twice")]
pub struct StartedTwice;

impl Metrics {
    /// Installs the recorder of this process with its three global labels.
    ///
    /// # Errors
    /// When the process already has one.
    pub fn start(hub_host: &str, own_device: &str, instance: &str) -> Result<Self, StartedTwice> {
        let recorder = builder()
            .add_global_label("iothub", hub_host)
            .add_global_label("edge_device", own_device)
            .add_global_label("instance_number", instance)
            .build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(BoundedOutputs::new(recorder)).map_err(|_| StartedTwice)?;
        Ok(Self { handle })
    }

    /// All samples as text.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds samples of summaries into their quantiles. To be called every few seconds: until
    /// then, or until somebody asks for [`Self::render`], each sample is kept in memory.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

fn builder() -> PrometheusBuilder {
    let summaries = PrometheusBuilder::new()
        .set_quantiles(&QUANTILES)
        .and_then(|builder| builder.set_bucket_duration(SUMMARY_PART));
    // Neither the list nor the duration is empty, which is all that could be wrong.
    summaries
        .unwrap_or_default()
        .set_bucket_count(SUMMARY_PARTS)
}

/// `edgehub_messages_received_total`: each device message accepted before routing.
pub fn messages_received(from: &Identity, output: &str) -> Counter {
    counter!(
        "edgehub_messages_received_total",
        "id" => from.as_str().to_owned(),
        "route_output" => output.to_owned(),
        "ms_telemetry" => "True"
    )
}

/// Why a message was dropped; the reference knows `no_route` and `ttl_expiry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The property bag of the topic is malformed (design.md D5).
    BadProperties,
    /// What is stored of it cannot be decoded.
    Damaged,
    /// It matched no route.
    NoRoute,
    /// The store did not take it.
    NotStored,
    /// The client at its endpoint rejected it (design.md D8).
    Rejected,
    /// The client at its endpoint gave it back too often (design.md D8).
    ReleasedTooOften,
    /// It is larger than 256 KiB (design.md D5).
    TooLarge,
    /// Its time to live was over before its endpoint had it.
    TtlExpiry,
    /// It cannot be sent to its endpoint over the protocol that this speaks.
    Undeliverable,
    /// Its topic is none that this hub takes (design.md D5).
    UnknownTopic,
}

impl DropReason {
    /// The value of the label `reason`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::BadProperties => "bad_properties",
            Self::Damaged => "damaged",
            Self::NoRoute => "no_route",
            Self::NotStored => "not_stored",
            Self::Rejected => "rejected",
            Self::ReleasedTooOften => "released_too_often",
            Self::TooLarge => "too_large",
            Self::TtlExpiry => "ttl_expiry",
            Self::Undeliverable => "undeliverable",
            Self::UnknownTopic => "unknown_topic",
        }
    }
}

/// `edgehub_messages_dropped_total`.
pub fn messages_dropped(reason: DropReason, from: &Identity, output: &str) -> Counter {
    counter!(
        "edgehub_messages_dropped_total",
        "reason" => reason.label(),
        "from" => from.as_str().to_owned(),
        "from_route_output" => output.to_owned(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_message_send_duration_seconds`: from the offer of a message to a module until it is
/// acknowledged.
pub fn message_send_duration(
    from: &Identity,
    output: &str,
    to: &Identity,
    input: &str,
) -> Histogram {
    histogram!(
        "edgehub_message_send_duration_seconds",
        "from" => from.as_str().to_owned(),
        "to" => to.as_str().to_owned(),
        "from_route_output" => output.to_owned(),
        "to_route_input" => input.to_owned()
    )
}

/// `edgehub_message_process_duration_seconds`: from its queue's read until a module has
/// acknowledged the message.
pub fn message_process_duration(from: &Identity, to: &Identity, priority: u32) -> Histogram {
    histogram!(
        "edgehub_message_process_duration_seconds",
        "from" => from.as_str().to_owned(),
        "to" => to.as_str().to_owned(),
        "priority" => priority.to_string(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_messages_sent_total`: messages handed to a module's input.
pub fn messages_sent(
    from: &Identity,
    output: &str,
    to: &Identity,
    input: &str,
    priority: u32,
) -> Counter {
    counter!(
        "edgehub_messages_sent_total",
        "from" => from.as_str().to_owned(),
        "to" => to.as_str().to_owned(),
        "from_route_output" => output.to_owned(),
        "to_route_input" => input.to_owned(),
        "priority" => priority.to_string(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_settlements_ignored_total`, ours: acknowledgements of deliveries that nobody made.
pub fn settlements_ignored() -> Counter {
    counter!("edgehub_settlements_ignored_total")
}

/// `edgehub_twin_responses_dropped_total`, ours: answers to twin requests for clients that were gone
/// or whose outbox was full.
pub fn twin_responses_dropped() -> Counter {
    counter!("edgehub_twin_responses_dropped_total")
}

/// `edgehub_direct_methods_total`: methods that modules called through the HTTPS API.
pub fn direct_methods(from: &Identity, to: &str) -> Counter {
    counter!(
        "edgehub_direct_methods_total",
        "from" => from.as_str().to_owned(),
        "to" => to.to_owned(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_direct_method_duration_seconds`; `from` is a module or [`UPSTREAM`].
pub fn direct_method_duration(from: &str, to: &Identity) -> Histogram {
    histogram!(
        "edgehub_direct_method_duration_seconds",
        "from" => from.to_owned(),
        "to" => to.as_str().to_owned()
    )
}

/// `edgehub_cloud_to_device_total`, ours: what became of cloud-to-device messages.
pub fn cloud_to_device(outcome: &'static str) -> Counter {
    counter!("edgehub_cloud_to_device_total", "outcome" => outcome)
}

/// `edgehub_messages_unack_total{reason="storage_failure"}`.
pub fn messages_unacknowledged(from: &Identity) -> Counter {
    counter!(
        "edgehub_messages_unack_total",
        "reason" => "storage_failure",
        "from" => from.as_str().to_owned(),
        "from_route_output" => "",
        "ms_telemetry" => "True"
    )
}

/// `edgehub_amqp_links_refused_total`, by condition. Those that this hub says are few; it says none
/// that a peer made up.
pub fn links_refused(condition: &str) -> Counter {
    counter!("edgehub_amqp_links_refused_total", "condition" => condition.to_owned())
}

/// `edgehub_queue_length`, unsettled messages of one queue.
pub fn queue_length(endpoint: &str, priority: u32) -> Gauge {
    gauge!(
        "edgehub_queue_length",
        "endpoint" => endpoint.to_owned(),
        "priority" => priority.to_string(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_store_oldest_message_age_seconds`, ours; 0 when the queue is empty.
pub fn oldest_message_age(endpoint: &str, priority: u32) -> Gauge {
    gauge!(
        "edgehub_store_oldest_message_age_seconds",
        "endpoint" => endpoint.to_owned(),
        "priority" => priority.to_string()
    )
}

/// `edgehub_connected_clients`, this hub itself not counted.
pub fn connected_clients() -> Gauge {
    gauge!("edgehub_connected_clients")
}

/// `edgehub_client_connect_failed_total{reason="not_authenticated"}`.
pub fn connect_failed(id: &str) -> Counter {
    counter!(
        "edgehub_client_connect_failed_total",
        "id" => id.to_owned(),
        "reason" => "not_authenticated",
        "ms_telemetry" => "True"
    )
}

/// `edgehub_client_connect_success_total`; its `id` is a sentence that tools parse
/// (spec/operations.md A2.3, A2.4).
pub fn connect_succeeded(identity: &Identity, hub_host: &str) -> Counter {
    counter!("edgehub_client_connect_success_total", "id" => sentence(identity, hub_host))
}

/// `edgehub_client_disconnect_total`, same `id`.
pub fn disconnected(identity: &Identity, hub_host: &str) -> Counter {
    counter!("edgehub_client_disconnect_total", "id" => sentence(identity, hub_host))
}

fn sentence(identity: &Identity, hub_host: &str) -> String {
    let device = identity.device_id();
    match identity.module_id() {
        Some(module) => {
            format!("DeviceId: {device}; ModuleId: {module} [IotHubHostName: {hub_host}]")
        }
        None => format!("DeviceId: {device} [IotHubHostName: {hub_host}]"),
    }
}

/// `edgehub_store_commits_total` and `edgehub_store_wal_syncs_total`, ours.
pub fn set_store_counters(commits: u64, wal_syncs: u64) {
    counter!("edgehub_store_commits_total").absolute(commits);
    counter!("edgehub_store_wal_syncs_total").absolute(wal_syncs);
}

/// Counts of PUBACKs and of the socket writes that carried them, ours.
#[derive(Clone)]
pub struct AckCounters {
    /// `edgehub_pubacks_total`.
    pub acks: Counter,
    /// `edgehub_puback_writes_total`.
    pub writes: Counter,
}

impl AckCounters {
    /// The two counters of this process.
    #[must_use]
    pub fn new() -> Self {
        Self {
            acks: counter!("edgehub_pubacks_total"),
            writes: counter!("edgehub_puback_writes_total"),
        }
    }
}

impl Default for AckCounters {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for AckCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AckCounters").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_the_exact_form_of_the_contract() {
        let recorder = builder()
            .add_global_label("iothub", "h.azure-devices.net")
            .add_global_label("edge_device", "gw1")
            .add_global_label("instance_number", "0f6c")
            .build_recorder();
        let handle = recorder.handle();
        let sensor = Identity::parse("gw1/sensor").unwrap();
        metrics::with_local_recorder(&recorder, || {
            messages_received(&sensor, "out1").increment(42);
            messages_dropped(DropReason::NoRoute, &sensor, "").increment(1);
            queue_length("iothub", 2_000_000_000).set(7.0);
            connected_clients().set(3.0);
            connect_succeeded(&sensor, "h.azure-devices.net").increment(1);
            messages_sent(&sensor, "out1", &sensor, "in1", 9).increment(5);
            direct_method_duration(UPSTREAM, &sensor).record(Duration::from_secs(2));
            message_send_duration(&sensor, "out1", &sensor, "in1").record_many(0.5, 3);
            message_process_duration(&sensor, &sensor, 9).record(0.75);
        });
        let text = handle.render();
        let common = r#"iothub="h.azure-devices.net",edge_device="gw1",instance_number="0f6c""#;
        for line in [
            format!(
                r#"edgehub_messages_received_total{{{common},id="gw1/sensor",route_output="out1",ms_telemetry="True"}} 42"#
            ),
            format!(
                r#"edgehub_messages_dropped_total{{{common},reason="no_route",from="gw1/sensor",from_route_output="",ms_telemetry="True"}} 1"#
            ),
            format!(
                r#"edgehub_queue_length{{{common},endpoint="iothub",priority="2000000000",ms_telemetry="True"}} 7"#
            ),
            format!("edgehub_connected_clients{{{common}}} 3"),
            format!(
                r#"edgehub_messages_sent_total{{{common},from="gw1/sensor",to="gw1/sensor",from_route_output="out1",to_route_input="in1",priority="9",ms_telemetry="True"}} 5"#
            ),
            format!(
                r#"edgehub_message_send_duration_seconds_count{{{common},from="gw1/sensor",to="gw1/sensor",from_route_output="out1",to_route_input="in1"}} 3"#
            ),
            format!(
                r#"edgehub_message_process_duration_seconds_sum{{{common},from="gw1/sensor",to="gw1/sensor",priority="9",ms_telemetry="True"}} 0.75"#
            ),
            format!(
                r#"edgehub_direct_method_duration_seconds_sum{{{common},from="upstream",to="gw1/sensor"}} 2"#
            ),
            format!(
                r#"edgehub_client_connect_success_total{{{common},id="DeviceId: gw1; ModuleId: sensor [IotHubHostName: h.azure-devices.net]"}} 1"#
            ),
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "missing {line}\nin\n{text}"
            );
        }
        let quantiles: Vec<_> = text
            .lines()
            .filter_map(|line| line.split_once(r#"quantile=""#)?.1.split_once('"'))
            .map(|(quantile, _)| quantile)
            .collect();
        assert_eq!(quantiles, ["0.1", "0.5", "0.9", "0.99"].repeat(3));
    }
}
