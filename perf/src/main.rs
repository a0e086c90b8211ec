//! Throughput of our hub beside a peer, measured on this machine in one run: see `scripts/perf.sh`.
//!
//! `mqtt-ingest` sends QoS 1 publishes in a closed loop to one hub (release build, TLS, each way of
//! `StorageSync`) and to Debian's mosquitto without persistence, with the same certificates. What
//! it prints to compare is server CPU per message: messages per second depend on the load
//! generator, which shares the machine's cores with the servers. `amqp-ingest` sends unsettled AMQP
//! transfers, and beside them the same load over MQTT. `drain` lets a hub send on what an outage has
//! queued, over each of the upstream protocols.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a measuring program reads the real clock and prints its table"
)]

mod amqp;
mod drain;
mod gauge;
mod hub;
mod ingest;
mod load;
mod mosquitto;
mod mqtt;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Measures throughput.
#[derive(Debug, Parser)]
#[command(name = "edgehub-perf", version)]
struct Arguments {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// Durable QoS 1 publishes into one hub, beside mosquitto.
    MqttIngest(IngestOptions),
    /// Durable AMQP transfers into one hub, beside MQTT.
    AmqpIngest(LoadOptions),
    /// What an outage has queued, upstream.
    Drain(DrainOptions),
}

/// Load, and what stands beside the hub.
#[derive(Clone, Debug, clap::Args)]
struct IngestOptions {
    #[command(flatten)]
    load: LoadOptions,
    /// Measure mosquitto without TLS too.
    #[arg(long)]
    plain: bool,
    /// Leave mosquitto out.
    #[arg(long)]
    no_peer: bool,
}

/// How much load, for how long.
#[derive(Clone, Debug, clap::Args)]
struct LoadOptions {
    /// Connections, each a device of its own.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    connections: u16,
    /// Unacknowledged messages per connection.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    window: u16,
    /// Body size in bytes; may be given several times.
    #[arg(long = "size", default_values_t = [256, 1024])]
    sizes: Vec<usize>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Seconds of load before each measurement.
    #[arg(long, default_value_t = 3)]
    warm_up: u64,
    /// Let the hub send on to the IoT Hub emulator meanwhile. Otherwise that link is cut, so that
    /// the hub's CPU time is that of taking and storing messages alone.
    #[arg(long)]
    forward: bool,
    /// Also write the figures to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// How much is queued, and how far away the IoT Hub is.
#[derive(Clone, Debug, clap::Args)]
struct DrainOptions {
    /// Devices that send.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    senders: u16,
    /// Messages of all of them together.
    #[arg(long, default_value_t = 200_000)]
    messages: u64,
    /// Body size in bytes.
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// Milliseconds that a round trip takes longer; may be given several times.
    #[arg(long = "rtt", default_values_t = [0, 50])]
    round_trips_ms: Vec<u64>,
    /// Upstream protocol; may be given several times.
    #[arg(long = "upstream", default_values_t = ["Amqp".to_owned(), "Mqtt".to_owned()])]
    upstreams: Vec<String>,
    /// Also write the figures to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl LoadOptions {
    const fn warm_up(&self) -> Duration {
        Duration::from_secs(self.warm_up)
    }

    const fn measured(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match measure().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by returning it: with RUST_BACKTRACE set that would bury the text.
            eprintln!("edgehub-perf: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn measure() -> Result<()> {
    let scenario = async {
        match Arguments::parse().scenario {
            Scenario::MqttIngest(options) => ingest::mqtt(&options).await,
            Scenario::AmqpIngest(options) => ingest::amqp(&options).await,
            Scenario::Drain(options) => drain::run(&options).await,
        }
    };
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    // Giving up drops the scenario, and with it every process, name and folder that it made.
    tokio::select! {
        done = scenario => done,
        _ = terminate.recv() => bail!("ended by SIGTERM"),
        _ = interrupt.recv() => bail!("ended by Ctrl-C"),
    }
}
