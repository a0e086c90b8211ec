//! What all protocols of one emulator share.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard};
use tracing::{info, warn};

use crate::authorize::{self, Claim, Refusal};
use crate::c2d::C2d;
use crate::clock::HubClock;
use crate::connections::Connections;
use crate::counters::{Counter, Counters};
use crate::faults::Faults;
use crate::identity::Identity;
use crate::journal::{Journal, JournalError};
use crate::ledger::{Ledger, Sender, Stamps};
use crate::methods::Methods;
use crate::port::PortGate;
use crate::registry::seed::{Policy, Seed};
use crate::registry::{Devices, RegistryError};
use crate::sessions::{Feature, Push, Sessions};
use crate::twin::{Notice, ServiceChange, Twin, TwinError, Twins};

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
    pub(crate) twins: Twins,
    pub(crate) sessions: Sessions,
    pub(crate) methods: Methods,
    pub(crate) c2d: C2d,
    pub(crate) counters: Counters,
    pub(crate) connections: Connections,
    pub(crate) faults: Faults,
    pub(crate) amqp_port: PortGate,
    pub(crate) mqtt_port: PortGate,
    pub(crate) https_port: PortGate,
    devices: RwLock<Devices>,
}

impl Hub {
    /// A hub with what the seed says, and what an earlier process left in the journal for the
    /// identities that the seed has.
    ///
    /// # Errors
    /// The journal has a record that is none of ours.
    pub(crate) fn new(
        hostname: String,
        mode: Mode,
        clock: HubClock,
        seed: Seed,
        ledger: Ledger,
        journal: Journal,
    ) -> Result<Self, JournalError> {
        let journal = Arc::new(journal);
        let devices = seed.devices;
        let exists = |identity: &Identity| devices.contains(identity);
        Ok(Self {
            hostname,
            mode,
            clock,
            policies: seed.policies,
            ledger,
            twins: Twins::open(journal.clone(), exists)?,
            sessions: Sessions::open(journal.clone(), exists)?,
            methods: Methods::default(),
            c2d: C2d::open(journal, |device| devices.get(device).is_some())?,
            counters: Counters::default(),
            connections: Connections::default(),
            faults: Faults::default(),
            amqp_port: PortGate::new(),
            mqtt_port: PortGate::new(),
            https_port: PortGate::new(),
            devices: RwLock::new(devices),
        })
    }

    /// The registry as it is now. Hold it shortly and never across an await.
    pub(crate) fn devices(&self) -> RwLockReadGuard<'_, Devices> {
        self.devices.read()
    }

    /// Changes the registry, then closes every connection that the new one would not admit: of
    /// deleted and disabled identities, and of chains that are no chains any more. A deleted
    /// identity takes its twin, session and messages along.
    pub(crate) fn change_devices<T>(
        &self,
        change: impl FnOnce(&mut Devices, u64) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let now_ms = self.clock.now_ms();
        let mut devices = self.devices.write();
        let changed = change(&mut devices, now_ms)?;
        // Nobody can create the same identity again before its past is gone.
        let closed = self
            .connections
            .close_where(|claim| authorize::check_membership(&devices, claim, self.mode).is_err());
        for id in closed {
            info!(
                connection = id,
                "closed: the registry does not admit it any more"
            );
        }
        for identity in devices.take_removed() {
            self.forget(&identity);
        }
        Ok(changed)
    }

    /// Drops twin, session and messages of an identity that the registry does not have any more.
    fn forget(&self, identity: &Identity) {
        let messages = match &identity.module {
            None => self.c2d.forget(&identity.device),
            Some(_) => Ok(()),
        };
        let forgotten = [
            self.twins.forget(identity),
            self.sessions.forget(identity),
            messages,
        ];
        for error in forgotten.into_iter().filter_map(Result::err) {
            // It is gone from memory; the file may bring it back.
            warn!(%identity, %error, "not removed from the journal");
        }
    }

    /// Carries out a twin change of the service side and tells the subscribed device. The caller
    /// holds the registry, so that the identity stays.
    pub(crate) fn serve_twin(
        &self,
        identity: &Identity,
        change: &ServiceChange,
        etag: Option<&str>,
    ) -> Result<Twin, TwinError> {
        let notify = |notice: &Notice| {
            let push = Push::Desired {
                version: notice.version,
                body: notice.body.clone(),
            };
            if self.sessions.push(identity, Feature::Desired, &push) {
                self.counters.add(identity, Counter::DesiredNotices);
            }
        };
        let now_ms = self.clock.now_ms();
        self.twins.serve(identity, change, etag, now_ms, notify)
    }

    /// The stamps of an identity's messages: always its own, also when an edge device acts for it.
    pub(crate) fn stamps(
        &self,
        identity: &Identity,
        model_id: Option<&str>,
        by_policy: bool,
    ) -> Result<Stamps, Refusal> {
        let devices = self.devices();
        let unknown = |_| Refusal::Unknown(identity.clone());
        let device = devices.find(&identity.device).map_err(unknown)?;
        let generation_id = match &identity.module {
            None => &device.generation_id,
            Some(module) => {
                let module = devices.find_module(&identity.device, module);
                &module.map_err(unknown)?.generation_id
            }
        };
        Ok(Stamps::new(&Sender {
            device: &identity.device,
            module: identity.module.as_deref(),
            generation_id,
            model_id,
            by_policy,
        }))
    }

    /// The name of the Event-Hubs-compatible end point: `{first label of the host name}-events`.
    pub(crate) fn event_hub(&self) -> String {
        let label = self.hostname.split('.').next().unwrap_or_default();
        format!("{label}-events")
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
