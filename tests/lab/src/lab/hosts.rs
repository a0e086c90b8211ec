//! Starting, killing, pausing hosts.

use std::fs;
use std::io;
use std::process::ExitStatus;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{HostSlot, Lab, log_tail_of};
use crate::builder::ready_file;
use crate::process::Process;
use crate::{HUB, http, network};

/// How often readiness is looked at.
const READY_POLL: Duration = Duration::from_millis(20);

/// A graceful stop may take this long; the hub itself promises 8 s.
const STOP_MAX: Duration = Duration::from_secs(20);

impl Lab {
    /// Starts a host and waits until it is ready.
    ///
    /// # Errors
    /// When it runs already, ends by itself or is not ready in time (with the end of its log).
    ///
    /// # Cancel safety
    /// The process stays started.
    pub async fn start(&self, name: &str) -> Result<()> {
        self.spawn(name).await?;
        self.wait_ready(name).await
    }

    /// Starts a host and does not wait.
    ///
    /// # Errors
    /// When it runs already or cannot be started.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn spawn(&self, name: &str) -> Result<()> {
        let slot = self.slot(name)?;
        let mut process = slot.process.lock().await;
        if let Some(process) = process.as_mut() {
            ensure!(process.ended()?.is_some(), "{name} runs already");
        }
        for stale in slot
            .faults
            .iter()
            .cloned()
            .chain([ready_file(&slot.host.folder)])
        {
            match fs::remove_file(&stale) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("cannot remove {}", stale.display()));
                }
                _ => {}
            }
        }
        // The old handle first: its drop must not come after the new process's registration.
        *process = None;
        let started = Process::start(&slot.launch, &self.reaper)?;
        slot.pid.store(started.pid(), Ordering::Relaxed);
        *process = Some(started);
        drop(process);
        self.update_lab_json()
    }

    /// Waits until a started host says that it is ready: a hub by `/readyz`, the emulator by its
    /// ready file.
    ///
    /// # Errors
    /// When it does not run, ends, or is not ready after the lab's patience.
    ///
    /// # Cancel safety
    /// Cancel safe: it only looks.
    pub async fn wait_ready(&self, name: &str) -> Result<()> {
        let slot = self.slot(name)?;
        let deadline = Instant::now() + self.patience;
        let mut last = String::from("no answer");
        loop {
            match Self::ask_ready(slot).await {
                Ok(None) => return Ok(()),
                Ok(Some(reason)) => last = reason,
                Err(_) => {}
            }
            if let Some(status) = self.ended(name).await? {
                bail!(
                    "{name} ended while it started ({status}):\n{}",
                    log_tail_of(slot)
                );
            }
            ensure!(slot.pid().is_some(), "{name} does not run");
            if Instant::now() >= deadline {
                let (patience, log) = (self.patience, log_tail_of(slot));
                bail!("{name} is not ready after {patience:?} ({last}):\n{log}");
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// `Ok(None)` when it is ready, otherwise why not.
    async fn ask_ready(slot: &HostSlot) -> Result<Option<String>> {
        if slot.host.name == HUB {
            let ready = ready_file(&slot.host.folder).exists();
            return Ok((!ready).then(|| "no ready file".to_owned()));
        }
        let address = network::socket(slot.host.private_address, slot.host.ports.metrics);
        let (status, body) = http::get(address, "/readyz").await?;
        let reason = || {
            format!(
                "/readyz: {status} {}",
                String::from_utf8_lossy(&body).trim()
            )
        };
        Ok((!status.is_success()).then(reason))
    }

    /// SIGKILL. Returns when the process is gone; a host that does not run is left so.
    ///
    /// # Errors
    /// When it cannot be killed.
    ///
    /// # Cancel safety
    /// The process is killed in any case.
    pub async fn kill(&self, name: &str) -> Result<()> {
        let slot = self.slot(name)?;
        let mut process = slot.process.lock().await;
        if let Some(mut running) = process.take() {
            slot.pid.store(0, Ordering::Relaxed);
            running.kill().await?;
        }
        drop(process);
        self.update_lab_json()
    }

    /// SIGTERM. Returns when the process has ended.
    ///
    /// # Errors
    /// When it does not run, or has not ended after 20 s (it is then killed).
    ///
    /// # Cancel safety
    /// The process is killed if it has not ended by then.
    pub async fn stop(&self, name: &str) -> Result<ExitStatus> {
        let slot = self.slot(name)?;
        let mut process = slot.process.lock().await;
        let mut running = process
            .take()
            .with_context(|| format!("{name} does not run"))?;
        slot.pid.store(0, Ordering::Relaxed);
        let status = running.terminate(STOP_MAX).await;
        let status =
            status.with_context(|| format!("{name} does not stop:\n{}", running.log_tail()))?;
        drop(process);
        self.update_lab_json()?;
        Ok(status)
    }

    /// SIGSTOP. Returns when the process has stopped; connections to it stay open.
    ///
    /// # Errors
    /// When it does not run.
    ///
    /// # Cancel safety
    /// The signal is sent at the first poll.
    pub async fn pause(&self, name: &str) -> Result<()> {
        let mut process = self.slot(name)?.process.lock().await;
        process
            .as_mut()
            .with_context(|| format!("{name} does not run"))?
            .pause()
            .await
    }

    /// SIGCONT. Returns when the process runs again.
    ///
    /// # Errors
    /// When it does not run.
    ///
    /// # Cancel safety
    /// The signal is sent at the first poll.
    pub async fn resume(&self, name: &str) -> Result<()> {
        let mut process = self.slot(name)?.process.lock().await;
        process
            .as_mut()
            .with_context(|| format!("{name} does not run"))?
            .resume()
            .await
    }

    /// How a host ended by itself: `None` while it runs, and when the lab ended it.
    ///
    /// # Errors
    /// When there is no such host.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ended(&self, name: &str) -> Result<Option<ExitStatus>> {
        let mut process = self.slot(name)?.process.lock().await;
        process.as_mut().map_or(Ok(None), Process::ended)
    }
}
