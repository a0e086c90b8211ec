//! A running lab: its hosts, what can be done to them, and what can be asked.

mod hosts;
mod links;
mod questions;

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::sync::Mutex;

use crate::hosts_file::{HostsFile, Tag};
use crate::network::{NetworkLease, Ports};
use crate::pki::RootCa;
use crate::process::{self, Launch, Process, Reaper};
use crate::relay::Relay;
use crate::seed::Seed;
use crate::state_dir::StateDir;
use crate::topology::AtStart;

/// What does not change about a host while the lab lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// `hub` or the edge's name.
    pub name: String,
    /// The edge above; `None` for the hub and for edges below it.
    pub parent: Option<String>,
    /// Resolves to [`Self::address`], or is it.
    pub hostname: String,
    /// Public: the relay's.
    pub address: Ipv4Addr,
    /// The process's own; going there bypasses the relay and its faults.
    pub private_address: Ipv4Addr,
    /// Same on both addresses.
    pub ports: Ports,
    /// Everything that the host has on disk.
    pub folder: PathBuf,
    /// Standard output and error, all runs.
    pub log: PathBuf,
    /// `StorageFolder`; `None` for the hub.
    pub storage: Option<PathBuf>,
}

/// One host and its process, if it runs.
#[derive(Debug)]
pub(crate) struct HostSlot {
    pub(crate) host: Host,
    pub(crate) at_start: AtStart,
    launch: Launch,
    faults: Option<PathBuf>,
    process: Mutex<Option<Process>>,
    /// 0 while nothing runs; beside the lock, so that `lab.json` can be written at any time.
    pid: AtomicU32,
}

impl HostSlot {
    pub(crate) fn new(
        host: Host,
        launch: Launch,
        at_start: AtStart,
        faults: Option<PathBuf>,
    ) -> Self {
        let (process, pid) = (Mutex::new(None), AtomicU32::new(0));
        Self {
            host,
            at_start,
            launch,
            faults,
            process,
            pid,
        }
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }
}

/// How hosts are named.
#[derive(Debug)]
pub(crate) enum Names {
    /// In `/etc/hosts`, withdrawn when the lab ends.
    Published {
        names: Vec<String>,
        file: HostsFile,
        tag: Tag,
    },
    /// Addresses are the names.
    Addresses,
}

impl Names {
    pub(crate) fn of(&self, index: usize, address: Ipv4Addr) -> String {
        let name = match self {
            Self::Published { names, .. } => names.get(index).cloned(),
            Self::Addresses => None,
        };
        name.unwrap_or_else(|| address.to_string())
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        if let Self::Published { file, tag, .. } = self {
            // The next lab removes the lines otherwise.
            let _ = file.withdraw(tag);
        }
    }
}

/// A running lab. Dropping it kills every process that it started and gives everything back.
///
/// Every method takes `&self`: a nemesis can kill hosts while senders send. Names are `hub` and
/// the edges' names; an unknown one is an error.
#[derive(Debug)]
pub struct Lab {
    // In this order: processes end first, the network is given back last.
    slots: Vec<HostSlot>,
    relay: Relay,
    reaper: Arc<Reaper>,
    seed: Seed,
    root: RootCa,
    _names: Names,
    lease: NetworkLease,
    state: StateDir,
    patience: Duration,
    /// Whether there is a `lab.json`: from the end of the start on. Locked while it is written.
    announced: parking_lot::Mutex<bool>,
}

impl Lab {
    #[allow(clippy::too_many_arguments, reason = "called once, by the builder")]
    pub(crate) const fn new(
        slots: Vec<HostSlot>,
        relay: Relay,
        reaper: Arc<Reaper>,
        seed: Seed,
        root: RootCa,
        names: Names,
        lease: NetworkLease,
        state: StateDir,
        patience: Duration,
    ) -> Self {
        let announced = parking_lot::const_mutex(false);
        Self {
            slots,
            relay,
            reaper,
            seed,
            root,
            _names: names,
            lease,
            state,
            patience,
            announced,
        }
    }

    pub(crate) fn slots(&self) -> &[HostSlot] {
        &self.slots
    }

    /// Stops everything gracefully, children before parents, and ends the lab. (Dropping kills.)
    ///
    /// # Errors
    /// The first host that did not stop gracefully; everything is ended nevertheless.
    ///
    /// # Cancel safety
    /// What has not stopped yet is killed.
    pub async fn shutdown(self) -> Result<()> {
        let mut outcome = Ok(());
        for slot in self.slots.iter().rev().filter(|slot| slot.pid().is_some()) {
            // A paused process does not see SIGTERM.
            let _ = self.resume(&slot.host.name).await;
            let ended_before = self.ended(&slot.host.name).await?;
            if let Some(status) = ended_before {
                outcome = outcome.and(Err(anyhow::anyhow!(
                    "{} had ended by itself ({status}):\n{}",
                    slot.host.name,
                    log_tail_of(slot)
                )));
            } else if let Err(error) = self.stop(&slot.host.name).await {
                outcome = outcome.and(Err(error));
            }
        }
        let _ = fs::remove_file(self.lab_json_path());
        outcome
    }

    fn slot(&self, name: &str) -> Result<&HostSlot> {
        let slot = self.slots.iter().find(|slot| slot.host.name == name);
        slot.with_context(|| {
            let names: Vec<_> = self
                .slots
                .iter()
                .map(|slot| slot.host.name.as_str())
                .collect();
            format!("there is no host {name}; there are {}", names.join(", "))
        })
    }
}

fn log_tail_of(slot: &HostSlot) -> String {
    process::log_tail(&slot.host.log)
}
