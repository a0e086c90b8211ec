//! The `iothub-emulator` process: one IoT Hub for a lab.

use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use iothub_emulator::{Emulator, Options};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::info;
use tracing_subscriber::EnvFilter;

/// An IoT Hub in one process, for tests. Logs one line per event to standard output.
#[derive(Debug, Parser)]
struct Arguments {
    /// The hub's name: what clients connect to and what tokens are for.
    #[arg(long)]
    hostname: String,
    /// The address of all ports.
    #[arg(long)]
    address: IpAddr,
    /// Port of AMQP over TLS; 0 takes a free one.
    #[arg(long, default_value_t = 5671)]
    amqp_port: u16,
    /// Port of MQTT over TLS; 0 takes a free one.
    #[arg(long, default_value_t = 8883)]
    mqtt_port: u16,
    /// Port of HTTPS; 0 takes a free one.
    #[arg(long, default_value_t = 443)]
    https_port: u16,
    /// Port of the control API (plain HTTP); 0 takes a free one.
    #[arg(long, default_value_t = 9090)]
    control_port: u16,
    /// PEM file with the server certificate chain.
    #[arg(long)]
    cert: PathBuf,
    /// PEM file with the private key.
    #[arg(long)]
    key: PathBuf,
    /// JSON file with policies and devices.
    #[arg(long)]
    seed: PathBuf,
    /// File that keeps the ledger over restarts; twins, sessions and C2D messages are beside it,
    /// in a file with `.state` after its name.
    #[arg(long)]
    ledger: Option<PathBuf>,
    /// Refuse everything that is not documented for IoT Hub.
    #[arg(long)]
    strict: bool,
    /// File that is written, with the ports in it, once all ports accept.
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Also end when standard input is closed, so that no orphan survives its parent.
    #[arg(long)]
    exit_with_stdin: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        .init();
    let arguments = Arguments::parse();
    if let Some(path) = &arguments.ready_file {
        // One that an earlier process left would tell the parent too early.
        let _ = std::fs::remove_file(path);
    }
    // Before the start, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let emulator = Emulator::start(Options {
        hostname: arguments.hostname,
        address: arguments.address,
        amqp_port: arguments.amqp_port,
        mqtt_port: arguments.mqtt_port,
        https_port: arguments.https_port,
        control_port: arguments.control_port,
        certificate: arguments.cert,
        key: arguments.key,
        seed: arguments.seed,
        ledger: arguments.ledger,
        strict: arguments.strict,
    })
    .await?;
    if let Some(path) = &arguments.ready_file {
        write_ready_file(path, &emulator)
            .with_context(|| format!("ready file {}", path.display()))?;
    }
    let why = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        () = stdin_closed(arguments.exit_with_stdin) => "standard input was closed",
    };
    info!(why, "stopping");
    emulator.shutdown().await;
    Ok(())
}

/// Completes when standard input ends; never when nobody asked for that.
async fn stdin_closed(wanted: bool) {
    let (closed, watch) = oneshot::channel::<()>();
    // A thread of its own: one of the runtime's would keep the runtime from ending.
    let reader = move || {
        let mut rest = [0; 1024];
        while std::io::stdin()
            .read(&mut rest)
            .is_ok_and(|length| length > 0)
        {}
        let _ = closed.send(());
    };
    if wanted
        && std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(reader)
            .is_ok()
    {
        let _ = watch.await;
    } else {
        std::future::pending::<()>().await;
    }
}

/// Written aside and renamed, so that a reader never sees half of it.
fn write_ready_file(path: &Path, emulator: &Emulator) -> std::io::Result<()> {
    let text = format!(
        "{{\"pid\":{},\"amqp\":{},\"mqtt\":{},\"https\":{},\"control\":{}}}\n",
        std::process::id(),
        emulator.amqp_address().port(),
        emulator.mqtt_address().port(),
        emulator.https_address().port(),
        emulator.control_address().port(),
    );
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    std::fs::write(&aside, text)?;
    std::fs::rename(&aside, path)
}
