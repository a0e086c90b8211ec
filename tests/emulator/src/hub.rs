//! What all protocols of one emulator share.

use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard};
use tracing::info;

use crate::authorize::{self, Claim, Refusal};
use crate::clock::HubClock;
use crate::connections::Connections;
use crate::faults::Faults;
use crate::ledger::Ledger;
use crate::port::PortGate;
use crate::registry::seed::Policy;
use crate::registry::{Devices, RegistryError};

/// How much the emulator tolerates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Roughly what an edgeHub lets pass: chains are not compared with the registry, audiences not
    /// with the host, ids without case; odd publishes are acknowledged and dropped.
    Lenient,
    /// Anything undocumented is refused. All end-to-end tests run with this.
    Strict,
}

impl Mode {
    pub(crate) fn is_strict(self) -> bool {
        self == Self::Strict
    }
}

/// The shared state. Lives in an `Arc` from start to shutdown.
pub(crate) struct Hub {
    /// The name that clients connect to and that tokens are for.
    pub(crate) hostname: String,
    pub(crate) mode: Mode,
    pub(crate) clock: HubClock,
    pub(crate) policies: Vec<Policy>,
    pub(crate) ledger: Ledger,
    pub(crate) connections: Connections,
    pub(crate) faults: Faults,
    pub(crate) mqtt_port: PortGate,
    pub(crate) https_port: PortGate,
    devices: RwLock<Devices>,
}

impl Hub {
    pub(crate) fn new(
        hostname: String,
        mode: Mode,
        clock: HubClock,
        seed: crate::registry::seed::Seed,
        ledger: Ledger,
    ) -> Self {
        Self {
            hostname,
            mode,
            clock,
            policies: seed.policies,
            ledger,
            connections: Connections::default(),
            faults: Faults::default(),
            mqtt_port: PortGate::new(),
            https_port: PortGate::new(),
            devices: RwLock::new(seed.devices),
        }
    }

    /// The registry as it is now. Hold it shortly and never across an await.
    pub(crate) fn devices(&self) -> RwLockReadGuard<'_, Devices> {
        self.devices.read()
    }

    /// Changes the registry, then closes every connection that the new one would not admit: of
    /// deleted and disabled identities, and of chains that are no chains any more.
    pub(crate) fn change_devices<T>(
        &self,
        change: impl FnOnce(&mut Devices, u64) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let now_ms = self.clock.now_ms();
        let changed = change(&mut self.devices.write(), now_ms)?;
        let devices = self.devices();
        let closed = self
            .connections
            .close_where(|claim| authorize::check_membership(&devices, claim, self.mode).is_err());
        for id in closed {
            info!(
                connection = id,
                "closed: the registry does not admit it any more"
            );
        }
        Ok(changed)
    }

    /// Whether the registry, as it is now, admits a claim whose token was verified.
    pub(crate) fn admits(&self, claim: &Claim) -> Result<(), Refusal> {
        authorize::check_membership(&self.devices(), claim, self.mode)
    }

    /// Whether the identity has a live device connection.
    pub(crate) fn is_connected(&self, device: &str, module: Option<&str>) -> bool {
        self.connections.is_connected(device, module)
    }
}

/// A keep-alive of 0, or one above what IoT Hub honours, gets its maximum.
pub(crate) fn idle_limit(keep_alive_secs: u16) -> Duration {
    let max = crate::limits::KEEP_ALIVE_MAX_SECS;
    let honoured = if keep_alive_secs == 0 {
        max
    } else {
        keep_alive_secs.min(max)
    };
    Duration::from_millis(u64::from(honoured) * 1_500)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_connections_end_after_one_and_a_half_keep_alives() {
        assert_eq!(idle_limit(60), Duration::from_secs(90));
        assert_eq!(idle_limit(1), Duration::from_millis(1_500));
        assert_eq!(idle_limit(0), idle_limit(u16::MAX));
    }
}
