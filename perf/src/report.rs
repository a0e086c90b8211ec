//! The table, on standard output as figures come in, and as JSON at the end.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::LoadOptions;
use crate::hub::AtRest;
use crate::load::Outcome;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    target: String,
    body_bytes: usize,
    messages_per_second: f64,
    server_cpu_us_per_message: f64,
    server_cores_busy: f64,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
    /// Of the server, right after the load.
    pub(crate) resident_bytes: u64,
}

/// One hub before any load.
#[derive(Clone, Debug, Serialize)]
struct Rest {
    target: String,
    first_start_ms: f64,
    second_start_ms: f64,
    idle_resident_bytes: u64,
}

/// Everything of one run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    machine: String,
    connections: u16,
    window: u16,
    seconds: u64,
    forwarding: bool,
    at_rest: Vec<Rest>,
    rows: Vec<Row>,
}

impl Row {
    pub(crate) fn new(target: &str, body_bytes: usize, outcome: &Outcome) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        Self {
            target: target.to_owned(),
            body_bytes,
            messages_per_second: outcome.rate.messages_per_second,
            server_cpu_us_per_message: outcome.rate.cpu_us_per_message,
            server_cores_busy: outcome.rate.cores_busy,
            latency_p50_ms: ms(outcome.latency_p50),
            latency_p99_ms: ms(outcome.latency_p99),
            resident_bytes: 0,
        }
    }

    fn line(&self) -> String {
        format!(
            "{:<42} {:>6} {:>9.0} {:>8.2} {:>6.2} {:>8.1} {:>8.1} {:>8.1}",
            self.target,
            self.body_bytes,
            self.messages_per_second,
            self.server_cpu_us_per_message,
            self.server_cores_busy,
            self.latency_p50_ms,
            self.latency_p99_ms,
            mebibytes(self.resident_bytes),
        )
    }
}

impl Report {
    pub(crate) fn new(machine: String, options: &LoadOptions) -> Self {
        let link = if options.forward { "open" } else { "cut" };
        println!("{machine}; the load shares it with the servers");
        println!(
            "{} connections, {} in flight each, {} s after {} s of warm-up; upstream {link}",
            options.connections, options.window, options.seconds, options.warm_up,
        );
        println!(
            "{:<42} {:>6} {:>9} {:>8} {:>6} {:>8} {:>8} {:>8}",
            "server", "bytes", "msg/s", "CPU us", "cores", "p50 ms", "p99 ms", "RSS MiB",
        );
        Self {
            machine,
            connections: options.connections,
            window: options.window,
            seconds: options.seconds,
            forwarding: options.forward,
            at_rest: Vec::new(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, row: Row) {
        println!("{}", row.line());
        self.rows.push(row);
    }

    pub(crate) fn add_at_rest(&mut self, target: &str, at_rest: AtRest) {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        self.at_rest.push(Rest {
            target: target.to_owned(),
            first_start_ms: ms(at_rest.first_start),
            second_start_ms: ms(at_rest.second_start),
            idle_resident_bytes: at_rest.idle_bytes,
        });
    }

    /// Prints what concerns hubs at rest and writes the file, if one is wanted.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn finish(&self, json: Option<&Path>) -> Result<()> {
        for rest in &self.at_rest {
            println!(
                "{}: listens after {:.0} ms (empty store), {:.0} ms (restart); idle RSS {:.1} MiB",
                rest.target,
                rest.first_start_ms,
                rest.second_start_ms,
                mebibytes(rest.idle_resident_bytes),
            );
        }
        let Some(path) = json else { return Ok(()) };
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "memory sizes stay far below 2^52"
)]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
