//! What operators see of a running hub: log lines and metrics, in the reference's exact form.

pub mod logs;
pub mod metrics;
pub mod outputs;
