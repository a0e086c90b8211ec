//! `edgehub-lab`: a lab on the command line (`scripts/lab.sh`). The README has its contract.

#![allow(
    clippy::print_stderr,
    reason = "a command line program speaks on standard error"
)]

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use edgehub_lab::control::{self, ControlSocket, Request};
use edgehub_lab::ledger::Ledger;
use edgehub_lab::seed::Seed;
use edgehub_lab::{HUB, Lab, LabBuilder, Profile, demo};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs whole Azure IoT Edge hierarchies on this machine and breaks them on purpose.
#[derive(Parser)]
#[command(name = "edgehub-lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a lab, write DIR/lab.json once all of it is ready, and stay until SIGTERM or Ctrl-C.
    Up(Up),
    /// Kill a host with SIGKILL.
    Kill(OneHost),
    /// Start a host and wait until it is ready.
    Start(OneHost),
    /// Stop a host's process with SIGSTOP; its connections stay open.
    Pause(OneHost),
    /// Let a paused host go on.
    Resume(OneHost),
    /// Reset the connections between two hosts and refuse new ones.
    Cut(TwoHosts),
    /// Let two hosts connect again.
    Heal(TwoHosts),
    /// Show a hierarchy at work, and judge at the end (`scripts/demo.sh`).
    Demo(Demo),
    /// Print what reached IoT Hub, oldest first, one JSON object per line.
    Ledger {
        /// The lab's folder.
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
    },
}

#[derive(Args)]
struct Up {
    /// Edge hubs, one below the other: edge1 is at the top. IoT Hub knows five levels.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=5))]
    layers: u8,
    /// Leaf devices below the bottom layer: leaf1, leaf2, …
    #[arg(long, default_value_t = 1)]
    leaves: usize,
    /// Modules on each layer: modA, modB, …
    #[arg(long, default_value_t = 0)]
    modules: usize,
    /// Where everything of the lab is kept; an earlier lab there is continued.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Further identities and fixed keys, in the emulator's seed format.
    #[arg(long, value_name = "FILE")]
    seed: Option<PathBuf>,
    /// Protocol towards the parent or IoT Hub: `Amqp`, `AmqpWs`, `Mqtt`, `MqttWs` or, as a hub
    /// without the setting, `unset`; for one hub alone `edge2=MqttWs`. May be repeated, the last
    /// word counts.
    #[arg(long, value_name = "[EDGE=]PROTOCOL", default_value = "Mqtt")]
    upstream: Vec<String>,
    /// How the hub and the emulator are built.
    #[arg(long, value_enum, default_value_t = Profile::Test)]
    profile: Profile,
}

#[derive(Args)]
struct Demo {
    /// Edge hubs, one below the other.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    layers: u8,
    /// Leaf devices below the bottom layer: up to ten azure-iot-device processes, then our own.
    #[arg(long, default_value_t = 10)]
    leaves: usize,
    /// End after so long; with 20 or more each hub is killed once. Without it, Ctrl-C ends.
    #[arg(long)]
    seconds: Option<u64>,
    /// How the hub and the emulator are built.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
}

#[derive(Args)]
struct OneHost {
    /// The lab's folder.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// hub, edge1, edge2, …
    name: String,
}

#[derive(Args)]
struct TwoHosts {
    /// The lab's folder.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// A host; or `client` for everybody who is no host, `*` for everybody.
    a: String,
    /// The host at the other end.
    b: String,
}

fn main() -> ExitCode {
    match command() {
        Ok(code) => code,
        Err(error) => {
            // Not by returning it: with RUST_BACKTRACE set that would bury the text.
            eprintln!("edgehub-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Result<ExitCode> {
    let host = |host: OneHost, request: fn(String) -> Request| {
        control::ask(&host.state, &request(host.name))
    };
    let link = |link: TwoHosts, request: fn(String, String) -> Request| {
        control::ask(&link.state, &request(link.a, link.b))
    };
    match Cli::parse().command {
        Command::Up(up) => tokio::runtime::Runtime::new()?.block_on(run(&up))?,
        Command::Kill(it) => host(it, |name| Request::Kill { name })?,
        Command::Start(it) => host(it, |name| Request::Start { name })?,
        Command::Pause(it) => host(it, |name| Request::Pause { name })?,
        Command::Resume(it) => host(it, |name| Request::Resume { name })?,
        Command::Cut(it) => link(it, |a, b| Request::Cut { a, b })?,
        Command::Heal(it) => link(it, |a, b| Request::Heal { a, b })?,
        Command::Demo(demo) => return tokio::runtime::Runtime::new()?.block_on(show(&demo)),
        Command::Ledger { state } => print_ledger(&state)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print_ledger(state: &Path) -> Result<()> {
    let folder = state.join(HUB);
    anyhow::ensure!(
        folder.is_dir(),
        "there was never a lab in {}",
        state.display()
    );
    match Ledger::at(&folder.join("ledger.jsonl")).print(&mut io::stdout().lock()) {
        // `… | head` is a usual way to look at it.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn run(up: &Up) -> Result<()> {
    let end = end_signal()?;
    let lab = tokio::select! {
        lab = builder(up)?.start_unannounced() => Arc::new(lab?),
        // What was started up to here is ended by dropping it.
        () = end.cancelled() => return Ok(()),
    };
    // Whoever sees `lab.json` may give a command at once.
    link_executable(lab.state_dir())?;
    let socket = ControlSocket::bind(&lab)?;
    lab.announce()?;
    say(&description(&lab)?);
    socket.serve(Arc::clone(&lab), end).await;
    say("ending\n");
    Arc::into_inner(lab)
        .context("the lab is still in use")?
        .shutdown()
        .await
}

async fn show(demo: &Demo) -> Result<ExitCode> {
    let end = end_signal()?;
    let options = demo::Options {
        layers: usize::from(demo.layers),
        leaves: demo.leaves,
        duration: demo.seconds.map(Duration::from_secs),
        profile: demo.profile,
    };
    Ok(match demo::run(&options, &end).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // In the form of a verdict, which is what a demo ends with.
            say(&format!("FAIL: {error:#}\n"));
            ExitCode::FAILURE
        }
    })
}

fn builder(up: &Up) -> Result<LabBuilder> {
    let mut builder = LabBuilder::new()
        .layers(usize::from(up.layers))
        .state_dir(&up.state)
        .profile(up.profile);
    if up.layers > 0 {
        builder = builder.leaves(up.leaves, &format!("edge{}", up.layers));
    }
    for layer in 1..=up.layers {
        for module in 0..up.modules {
            builder = builder.module(format!("edge{layer}"), module_name(module));
        }
    }
    for upstream in &up.upstream {
        // An empty value is as good as none.
        let named = |protocol: &str| match protocol {
            "unset" => String::new(),
            other => other.to_owned(),
        };
        builder = match upstream.split_once('=') {
            Some((edge, protocol)) => builder.env(edge, "UpstreamProtocol", &named(protocol)),
            None => builder.upstream(&named(upstream)),
        };
    }
    if let Some(seed) = &up.seed {
        builder = builder.seed(Seed::read(seed)?);
    }
    Ok(builder)
}

/// modA to modZ, then mod27 and so on.
fn module_name(index: usize) -> String {
    match u8::try_from(index) {
        Ok(letter @ 0..26) => format!("mod{}", char::from(b'A' + letter)),
        _ => format!("mod{}", index + 1),
    }
}

/// Later commands for this lab run exactly this program (`scripts/lab.sh`), without a build.
fn link_executable(state: &Path) -> Result<()> {
    let link = state.join("edgehub-lab");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(std::env::current_exe()?, &link)
        .with_context(|| format!("cannot make {}", link.display()))
}

fn description(lab: &Lab) -> Result<String> {
    let json = lab.lab_json()?;
    let host = |name: &str, hostname: &str, address: &dyn std::fmt::Display, log: &Path| {
        let (address, log) = (address.to_string(), log.display());
        format!("{name:<8} {hostname:<24} {address:<14} {log}\n")
    };
    let mut text = host("host", "name", &"address", Path::new("log"));
    let hub = &json.hub;
    text += &host(&hub.name, &hub.hostname, &hub.address, &hub.log);
    for layer in &json.layers {
        text += &host(&layer.name, &layer.hostname, &layer.address, &layer.log);
    }
    for identity in &json.identities {
        text += &format!("{}: {}\n", identity.id, identity.connection_string);
    }
    text += &format!("CA: {}\n", json.ca_file.display());
    text += &format!("ready: {}\n", lab.lab_json_path().display());
    Ok(text)
}

/// On standard output. A reader that has gone away is no reason to end.
fn say(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

/// Cancelled by SIGTERM, Ctrl-C or the end of the terminal (unless `nohup` said that this is none of
/// its business). Asked a second time the program ends at once, and the reaper ends what it had
/// started.
fn end_signal() -> Result<CancellationToken> {
    let end = CancellationToken::new();
    let mut kinds = vec![SignalKind::terminate(), SignalKind::interrupt()];
    let hangup = SignalKind::hangup();
    if !is_ignored(&std::fs::read_to_string("/proc/self/status")?, hangup) {
        kinds.push(hangup);
    }
    for kind in kinds {
        let (mut signal, end) = (signal(kind)?, end.clone());
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                if end.is_cancelled() {
                    std::process::exit(130);
                }
                end.cancel();
            }
        });
    }
    Ok(end)
}

/// Whether the process of this `/proc/<pid>/status` ignores a signal.
fn is_ignored(status: &str, signal: SignalKind) -> bool {
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw_value() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_seen_in_the_status() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\n";
        assert!(is_ignored(status, SignalKind::hangup()));
        assert!(!is_ignored(status, SignalKind::interrupt()));
        assert!(!is_ignored("", SignalKind::hangup()));
    }

    #[test]
    fn the_command_line_is_the_contract() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        for line in [
            "x up --layers 3 --leaves 2 --modules 1 --state DIR --seed FILE",
            "x up --state DIR --upstream Amqp --upstream edge2=MqttWs",
            "x kill --state DIR hub",
            "x start --state DIR edge1",
            "x pause --state DIR edge1",
            "x resume --state DIR edge1",
            "x cut --state DIR edge3 edge2",
            "x heal --state DIR edge3 edge2",
            "x ledger --state DIR",
            "x demo --layers 3 --leaves 10 --seconds 20",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in ["x up --state DIR --layers 6", "x demo --layers 0", "x up"] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn modules_are_lettered_then_numbered() {
        let names: Vec<_> = [0, 1, 25, 26].map(module_name).into();
        assert_eq!(names, ["modA", "modB", "modZ", "mod27"]);
    }
}
