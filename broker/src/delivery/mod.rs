//! Module inputs: from the queues of a module's inputs to the connected module.
//!
//! [`Deliveries`] knows the modules of this device and gives each a task of its own, a *pump*
//! (`pump`), around a state machine (`machine`) that decides. It speaks no protocol: heads get
//! batches of deliveries and say what became of them.
//!
//! # Invariants
//! - A message leaves its queue only when the module has settled it, its time is over, or a named
//!   rule drops it; each is counted.
//! - Per queue messages are delivered in order, also again; strict priority between the queues of
//!   one input; a window of unsettled deliveries for each module.
//! - What may have been sent before comes with `redelivered`, unless the session is clean; under
//!   the same token, also after a restart of the hub.
//!
//! # Ordering
//! Whoever changes a client's live connection or its subscriptions does that first and tells
//! afterwards, without a lock that the outlet needs. A connection is announced by
//! [`Deliveries::connected`] before it is subscribed to anything; [`Deliveries::disconnected`] is
//! for the end of the live connection only: one that was taken over has ended with the other's
//! `connected`.
//!
//! # Where this behaviour comes from
//! design.md D8, D9, D17 and section 3; spec/mqtt.md 5.6, 8.4; spec/core.md 4.6 and 10 items 8, 9,
//! 11 and 12.

pub mod limits;
mod machine;
mod mailbox;
mod pump;
mod slots;
mod stream;

#[cfg(test)]
mod machine_model_tests;
#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod store_tests;

use std::collections::HashMap;
use std::sync::Arc;

use edgehub_proto::clock::Clock;
use edgehub_proto::identity::Identity;
use edgehub_storage::{Queue, Store};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use mailbox::Mailbox;
use pump::{Pump, PumpParts};

use crate::hub::{DeliveryToken, Outlet, Settlement};
use crate::routing::InputQueue;

/// Parts [`Deliveries`] are made of.
#[derive(Debug)]
pub struct DeliveryParts {
    /// This device: only its modules have inputs.
    pub own_device: Identity,
    /// Deliveries that a module may have unsettled ([`limits::WINDOW_DEFAULT`]); 1 is the strict
    /// mode.
    pub window: usize,
    /// The way to clients.
    pub outlet: Arc<dyn Outlet>,
    /// Where messages and slots last.
    pub store: Store,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Owns the pumps.
    pub tasks: TaskTracker,
    /// Ends them, after what is acknowledged was handed to the store.
    pub stop: CancellationToken,
}

/// Delivers to module inputs. One per hub, shared.
#[derive(Debug)]
pub struct Deliveries {
    parts: DeliveryParts,
    modules: Mutex<HashMap<Identity, Module>>,
}

/// A module that is connected or has queues.
#[derive(Debug, Default)]
struct Module {
    mailbox: Arc<Mailbox>,
    queues: Option<Arc<[Configured]>>,
    is_connected: bool,
    is_running: bool,
}

/// A queue of a module's input.
#[derive(Clone, Debug)]
struct Configured {
    input: Arc<str>,
    queue: Queue,
    /// Where the queue ended when the store was opened: what is below may have been sent before.
    opened_end: u64,
}

impl Configured {
    fn new(input: &str, queue: Queue) -> Self {
        // In this order: what is stored meanwhile makes it more, not less.
        let stored = queue.stats().entries;
        Self {
            input: input.into(),
            opened_end: queue.next_offset().saturating_sub(stored),
            queue,
        }
    }
}

impl Deliveries {
    /// Puts the parts together; without queues.
    #[must_use]
    pub fn new(parts: DeliveryParts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            modules: Mutex::default(),
        })
    }

    /// States all queues of all inputs, for example [`crate::routing::Router::inputs`]; replaces
    /// what was said before.
    pub fn set_queues(&self, queues: impl IntoIterator<Item = InputQueue>) {
        let mut modules = self.modules.lock();
        let mut by_module: HashMap<Identity, Vec<Configured>> = HashMap::new();
        for InputQueue {
            module,
            input,
            queue,
        } in queues
        {
            let Ok(identity) = Identity::module(self.parts.own_device.device_id(), &module) else {
                tracing::warn!("A route leads to {module}, which cannot be a module");
                continue;
            };
            let queues = by_module.entry(identity).or_default();
            queues.push(Configured::new(&input, queue));
        }
        for (identity, module) in modules.iter_mut() {
            if module.queues.is_some() && !by_module.contains_key(identity) {
                module.queues = None;
                module.mailbox.configured(Arc::from([]));
            }
        }
        for (identity, queues) in by_module {
            let module = modules.entry(identity.clone()).or_default();
            let queues: Arc<[Configured]> = queues.into();
            module.mailbox.configured(Arc::clone(&queues));
            module.queues = Some(queues);
            if module.is_connected {
                self.run(&identity, module);
            }
        }
        modules.retain(|_, module| !module.is_idle());
    }

    /// A client connected. With a clean session nothing counts as sent before. Nothing is sent
    /// until the client is subscribed.
    pub fn connected(&self, client: &Identity, clean_session: bool) {
        if !self.is_own_module(client) {
            return;
        }
        let mut modules = self.modules.lock();
        let module = modules.entry(client.clone()).or_default();
        module.is_connected = true;
        module.mailbox.connected(clean_session);
        self.run(client, module);
    }

    /// The client is subscribed to inputs, or its subscriptions changed; idempotent.
    pub fn subscribed(&self, client: &Identity) {
        if let Some(mailbox) = self.mailbox(client) {
            mailbox.subscribed();
        }
    }

    /// The client's live connection ended.
    pub fn disconnected(&self, client: &Identity) {
        let mut modules = self.modules.lock();
        if let Some(module) = modules.get_mut(client) {
            module.is_connected = false;
            module.mailbox.disconnected();
            if module.is_idle() {
                modules.remove(client);
            }
        }
    }

    /// Deliveries were dealt with; those of cloud-to-device messages are not looked at.
    pub fn settled(&self, from: &Identity, settled: &[(DeliveryToken, Settlement)]) {
        if let Some(mailbox) = self.mailbox(from) {
            mailbox.settled(settled);
        }
    }

    fn mailbox(&self, client: &Identity) -> Option<Arc<Mailbox>> {
        let modules = self.modules.lock();
        let module = modules.get(client)?;
        Some(Arc::clone(&module.mailbox))
    }

    fn is_own_module(&self, client: &Identity) -> bool {
        client.is_module() && client.device_id() == self.parts.own_device.device_id()
    }

    /// Starts the module's pump when there is something for it to do and it does not run yet. Once
    /// started it stays: a module that was here comes again.
    fn run(&self, identity: &Identity, module: &mut Module) {
        if module.is_running || module.queues.is_none() {
            return;
        }
        module.is_running = true;
        let pump = Pump::new(PumpParts {
            module: identity.clone(),
            mailbox: Arc::clone(&module.mailbox),
            window: self.parts.window,
            outlet: Arc::clone(&self.parts.outlet),
            store: self.parts.store.clone(),
            clock: Arc::clone(&self.parts.clock),
        });
        self.parts.tasks.spawn(pump.run(self.parts.stop.clone()));
    }
}

impl Module {
    fn is_idle(&self) -> bool {
        !self.is_connected && !self.is_running && self.queues.is_none()
    }
}
