//! The scenario `drain`: what an outage has queued goes upstream, to the IoT Hub emulator.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{Acknowledged, Binaries, ConnectionString, HUB, Lab, LabBuilder, Profile};
use serde::Serialize;
use serde_json::Value;

use crate::gauge::Reading;
use crate::{DrainOptions, gauge};

/// The one edge of the lab.
const EDGE: &str = "edge1";

/// For each phase.
const PHASE_MAX: Duration = Duration::from_secs(600);

/// For each call that waits.
const CALL_MAX: Duration = Duration::from_secs(10);

/// One measurement.
#[derive(Clone, Debug, Serialize)]
struct Row {
    upstream: String,
    added_round_trip_ms: u64,
    first_arrival_ms: f64,
    /// From the first arrival to the last.
    messages_per_second: f64,
    hub_cpu_us_per_message: f64,
    duplicates: u64,
}

/// Measures every upstream protocol at every distance and prints the table.
///
/// # Errors
/// When anything cannot be started, or a message is lost or out of order.
pub(crate) async fn run(options: &DrainOptions) -> Result<()> {
    println!("{}; the IoT Hub emulator shares it", gauge::machine());
    println!(
        "{} messages of {} bytes from {} senders, queued while upstream was cut",
        options.messages, options.size, options.senders
    );
    println!(
        "{:<8} {:>8} {:>10} {:>9} {:>8} {:>6}",
        "upstream", "RTT ms", "first ms", "msg/s", "CPU us", "twice"
    );
    let binaries = Binaries::build(Profile::Release).await?;
    let mut rows = Vec::new();
    for &round_trip_ms in &options.round_trips_ms {
        for upstream in &options.upstreams {
            let row = drain(options, &binaries, upstream, round_trip_ms).await;
            let row = row.with_context(|| format!("{upstream}, {round_trip_ms} ms"))?;
            println!(
                "{:<8} {:>8} {:>10.0} {:>9.0} {:>8.2} {:>6}",
                row.upstream,
                row.added_round_trip_ms,
                row.first_arrival_ms,
                row.messages_per_second,
                row.hub_cpu_us_per_message,
                row.duplicates,
            );
            rows.push(row);
        }
    }
    let Some(path) = &options.json else {
        return Ok(());
    };
    let text = serde_json::to_string_pretty(&rows)?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

async fn drain(
    options: &DrainOptions,
    binaries: &Binaries,
    upstream: &str,
    round_trip_ms: u64,
) -> Result<Row> {
    let lab = LabBuilder::new()
        .layers(1)
        .upstream(upstream)
        .leaves(usize::from(options.senders), EDGE)
        .log_level("warning")
        .binaries(binaries.clone())
        .start()
        .await?;
    // Under names of its own, so that the end of the outage does not take it back.
    lab.delay("*", HUB, Duration::from_millis(round_trip_ms) / 2)?;
    lab.cut(EDGE, HUB).await?;
    let logs = queue(&lab, options).await?;
    ensure!(lab.ledger().count()? == 0, "the link was not cut");

    let messages: u64 = logs.iter().map(|(_, log)| log.len() as u64).sum();
    let pid = lab.pid(EDGE)?;
    let before = Reading::take(pid, 0)?;
    let back = Instant::now();
    lab.heal(EDGE, HUB)?;
    let arrived = arrivals(&lab, 1).await?;
    let first_arrival = back.elapsed();
    let first = Reading::take(pid, arrived)?;
    let arrived = arrivals(&lab, messages).await?;
    let last = Reading::take(pid, arrived)?;
    let verdict = lab.ledger().settle(PHASE_MAX, &logs).await?;
    ensure!(verdict.passed(), "{verdict}");
    ensure!(verdict.acknowledged == messages, "{verdict}");
    lab.shutdown().await?;
    Ok(Row {
        upstream: upstream.to_owned(),
        added_round_trip_ms: round_trip_ms,
        first_arrival_ms: first_arrival.as_secs_f64() * 1e3,
        messages_per_second: last.rate_since(first).messages_per_second,
        hub_cpu_us_per_message: last.rate_since(before).cpu_us_per_message,
        duplicates: verdict.duplicates,
    })
}

/// Lets all leaves send their share, and returns what was acknowledged.
async fn queue(lab: &Lab, options: &DrainOptions) -> Result<Vec<(String, Vec<Acknowledged>)>> {
    let port = lab.host(EDGE)?.ports.mqtts;
    let mut senders = Vec::new();
    for identity in lab.identities()? {
        let connection = ConnectionString::parse(&identity.connection_string)?;
        let mut sender = SenderOptions::new(connection, lab.ca_file(), port);
        sender.body_bytes = options.size;
        sender.count = Some(options.messages / u64::from(options.senders));
        senders.push(MqttSender::start(sender)?);
    }
    let mut logs = Vec::new();
    for sender in senders {
        sender.wait_finished(PHASE_MAX).await?;
        logs.push(sender.finish(PHASE_MAX).await?);
    }
    Ok(logs)
}

/// Waits until the IoT Hub has so many messages; how many it has then.
async fn arrivals(lab: &Lab, wanted: u64) -> Result<u64> {
    let from = Instant::now();
    let millis = CALL_MAX.as_millis();
    let path = format!("/ledger/wait?count={wanted}&timeout_ms={millis}");
    loop {
        let answer = lab.control("GET", &path, None).await?;
        let count = answer.get("count").and_then(Value::as_u64);
        let count = count.context("an answer without a count")?;
        if count >= wanted {
            return Ok(count);
        }
        ensure!(from.elapsed() < PHASE_MAX, "{count} of {wanted} arrived");
    }
}
