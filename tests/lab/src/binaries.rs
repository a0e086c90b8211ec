//! The executables that a lab starts, brought up to date by cargo each time.
//!
//! Asking cargo is the point: it knows whether anything changed, and the paths that it reports are
//! the ones that are started. An up-to-date build takes well under a second.

use std::ffi::OsString;
use std::fs::TryLockError;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::process::Command;

use crate::network;
use crate::process_group::GroupGuard;

/// How often the build lock is tried; the kernel offers no asynchronous wait.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// What is built: the two that a lab starts, and the lab itself, because cargo chooses features for
/// all packages of one call together and the scripts build these three (`build_programs`). With
/// another selection everything below a feature that differs would be built twice.
const PROGRAMS: [&str; 7] = [
    "-p",
    "edgehub",
    "-p",
    "iothub-emulator",
    "-p",
    "edgehub-lab",
    "--bins",
];

/// How the binaries are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// The test profile, with the `faults` feature: what every test runs.
    Test,
    /// Optimised, without faults: what the demo shows.
    Release,
}

/// Paths of the executables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    /// The hub.
    pub edgehub: PathBuf,
    /// The IoT Hub emulator.
    pub emulator: PathBuf,
    /// Whether the hub understands `EDGEHUB_FAULTS`.
    pub with_faults: bool,
}

impl Binaries {
    /// Builds what is out of date and returns what cargo reports. Compiler messages go to standard
    /// error. One build at a time on this machine, so that an up-to-date answer is not mixed up
    /// with a build under way.
    ///
    /// # Errors
    /// When the build fails or a binary is not among its results.
    ///
    /// # Cancel safety
    /// Cargo and its compilers are killed; what they have built by then is kept.
    pub async fn build(profile: Profile) -> Result<Self> {
        let options: &[&str] = match profile {
            Profile::Test => &["--features", "edgehub/faults"],
            Profile::Release => &["--release"],
        };
        let messages = build(&[&PROGRAMS[..], options].concat()).await?;
        Ok(Self {
            edgehub: executable(&messages, "edgehub")?,
            emulator: executable(&messages, "iothub-emulator")?,
            with_faults: profile == Profile::Test,
        })
    }
}

/// Runs `cargo build` with these arguments and returns its messages.
async fn build(arguments: &[&str]) -> Result<String> {
    let lock = network::machine_lock_file("build")?;
    loop {
        match lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
            Err(TryLockError::Error(error)) => return Err(error).context("the build lock"),
        }
    }
    let workspace = workspace();
    let mut command = Command::new(cargo());
    command
        .args(["build", "--message-format=json-render-diagnostics"])
        // A person sees the progress of a build that takes minutes; a log does not need it.
        .args((!std::io::stderr().is_terminal()).then_some("--quiet"))
        .args(arguments)
        .current_dir(&workspace)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        // Cargo's compilers do not end with it.
        .process_group(0)
        .kill_on_drop(true);
    forget_outer_cargo(&mut command, &workspace);
    let cargo = command.spawn().context("cannot start cargo")?;
    let group = GroupGuard::of(cargo.id());
    let output = cargo.wait_with_output().await.context("cargo is lost")?;
    group.release();
    if !output.status.success() {
        bail!(
            "cargo could not build {} ({})",
            arguments.join(" "),
            output.status
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The checkout that this crate was built from.
#[must_use]
pub fn workspace() -> PathBuf {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.ancestors().nth(2).unwrap_or(lab).to_owned()
}

fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"))
}

/// Removes what an outer `cargo test` or nextest put into the environment: build scripts that look
/// at those variables would be run again for every caller, and everything above them rebuilt.
fn forget_outer_cargo(command: &mut Command, workspace: &Path) {
    const KEEP: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_TARGET_DIR",
        "CARGO_INCREMENTAL",
        "CARGO_BUILD_",
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_PROFILE_",
        "CARGO_TERM_",
    ];
    for (name, _) in std::env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let from_cargo = name.starts_with("CARGO") && !KEEP.iter().any(|k| name.starts_with(k));
        if from_cargo || name.starts_with("NEXTEST") || name == "OUT_DIR" {
            command.env_remove(name);
        }
    }
    // Cargo puts its own folders in front; what the user had stays.
    if let Some(paths) = std::env::var_os("LD_LIBRARY_PATH") {
        let outer = |path: &PathBuf| {
            path.starts_with(workspace)
                || path.components().any(|c| c.as_os_str() == "rustlib")
                || path.components().any(|c| c.as_os_str() == "toolchains")
        };
        let kept: Vec<PathBuf> = std::env::split_paths(&paths)
            .filter(|p| !outer(p))
            .collect();
        match std::env::join_paths(&kept) {
            Ok(paths) if !kept.is_empty() => command.env("LD_LIBRARY_PATH", paths),
            _ => command.env_remove("LD_LIBRARY_PATH"),
        };
    }
}

/// The executable of the binary target `name` in cargo's JSON messages.
fn executable(messages: &str, name: &str) -> Result<PathBuf> {
    let mut found = None;
    for line in messages.lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let is_bin = message.pointer("/target/kind/0").and_then(Value::as_str) == Some("bin");
        let is_it = message.pointer("/target/name").and_then(Value::as_str) == Some(name);
        let is_artifact = message
            .get("reason")
            .is_some_and(|r| r == "compiler-artifact");
        if is_bin && is_it && is_artifact {
            found = message
                .pointer("/executable")
                .and_then(Value::as_str)
                .map(PathBuf::from);
        }
    }
    found.with_context(|| format!("cargo reported no executable {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_the_one_that_cargo_reports() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"edgehub"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"edgehub"},"executable":"/t/edgehub"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(
            executable(messages, "edgehub").unwrap(),
            Path::new("/t/edgehub")
        );
        assert!(executable(messages, "iothub-emulator").is_err());
    }

    #[test]
    fn the_workspace_is_the_checkout() {
        assert!(workspace().join("Cargo.lock").is_file());
    }
}
