//! Counters of twins (spec/operations.md A2.3).

use edgehub_proto::identity::Identity;
use metrics::{Counter, counter};

/// `edgehub_gettwin_total`; `source` is who was asked: `edge_hub` or `upstream`.
pub(super) fn get_twin(source: &'static str, of: &Identity) -> Counter {
    counter!(
        "edgehub_gettwin_total",
        "source" => source,
        "id" => of.as_str().to_owned(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_reported_properties_total`; `target` is who took them: `edge_hub` or `upstream`.
pub(super) fn reported_properties(target: &'static str, of: &Identity) -> Counter {
    counter!(
        "edgehub_reported_properties_total",
        "target" => target,
        "id" => of.as_str().to_owned(),
        "ms_telemetry" => "True"
    )
}

/// `edgehub_reported_properties_dropped_total`, ours: reports that the upstream refused for good.
pub(super) fn reported_properties_dropped(of: &Identity) -> Counter {
    counter!(
        "edgehub_reported_properties_dropped_total",
        "id" => of.as_str().to_owned()
    )
}
