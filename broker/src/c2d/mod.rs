//! Cloud-to-device messages: from upstream to the device, and its acknowledgement back up.
//!
//! [`CloudToDeviceService`] is a thin shell around `clients`, which decides. Nothing is stored
//! here: a message stays upstream until the device has acknowledged it, and what is not settled
//! comes again.
//!
//! # Ordering
//! Messages reach a client in the order in which they arrived. Whoever changes a client's live
//! connection or its subscriptions does that first and tells the service afterwards, without a lock
//! that the outlet needs; a connection is announced by [`CloudToDeviceService::connected`] before
//! it is subscribed to anything. [`CloudToDeviceService::disconnected`] is for the end of the live
//! connection only: one that was taken over has ended with the other's `connected`.
//!
//! # Where this behaviour comes from
//! spec/core.md 7 and 10 item 18, spec/mqtt.md 5.5, spec/upstream.md A7, design.md D17.

mod clients;
pub mod limits;

#[cfg(test)]
mod clients_model_tests;
#[cfg(test)]
mod clients_tests;
#[cfg(test)]
mod service_tests;

use std::fmt;
use std::sync::Arc;

use edgehub_proto::clock::Clock;
use edgehub_proto::hub::{CloudToDevice, CloudToDeviceOutcome};
use edgehub_proto::identity::Identity;
use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use clients::Config;
use clients::{Arrival, Clients, Now, Offer, SettleHandle, Tally};

use crate::hub::{Delivery, DeliveryToken, OfferError, Outlet, Settlement, ToClient};
use crate::telemetry::metrics as names;

/// Delivery numbers of one run are above those of an earlier one: they begin at its start's Unix
/// milliseconds, shifted by so much.
const NUMBERS_PER_MS_BITS: u32 = 16;

impl SettleHandle for oneshot::Sender<CloudToDeviceOutcome> {
    fn is_dead(&self) -> bool {
        self.is_closed()
    }

    fn settle(self, outcome: CloudToDeviceOutcome) {
        // The bridge may have gone: upstream then delivers the message again.
        let _ = self.send(outcome);
    }
}

/// Delivers cloud-to-device messages. One per hub, shared.
#[derive(Debug)]
pub struct CloudToDeviceService {
    clients: Mutex<Clients<oneshot::Sender<CloudToDeviceOutcome>>>,
    outlet: Arc<dyn Outlet>,
    clock: Arc<dyn Clock>,
    timer: Notify,
    counters: Counters,
}

struct Counters {
    completed: Counter,
    expired: Counter,
    undeliverable: Counter,
    rejected: Counter,
    returned: Counter,
    ignored: Counter,
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counters").finish_non_exhaustive()
    }
}

impl Counters {
    fn new() -> Self {
        Self {
            completed: names::cloud_to_device("completed"),
            expired: names::cloud_to_device("expired"),
            undeliverable: names::cloud_to_device("undeliverable"),
            rejected: names::cloud_to_device("rejected"),
            returned: names::cloud_to_device("returned"),
            ignored: names::settlements_ignored(),
        }
    }

    fn add(&self, tally: Tally) {
        for (counter, count) in [
            (&self.completed, tally.completed),
            (&self.expired, tally.expired),
            (&self.undeliverable, tally.undeliverable),
            (&self.rejected, tally.rejected),
            (&self.returned, tally.returned),
            (&self.ignored, tally.ignored),
        ] {
            if count > 0 {
                counter.increment(count);
            }
        }
    }
}

impl CloudToDeviceService {
    /// A service whose timers run in `tasks` until `stop`.
    #[must_use]
    pub fn new(
        config: Config,
        outlet: Arc<dyn Outlet>,
        clock: Arc<dyn Clock>,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Arc<Self> {
        // No run delivers as many in each millisecond that it lives.
        let first_number = clock.unix_ms() << NUMBERS_PER_MS_BITS;
        let service = Arc::new(Self {
            clients: Mutex::new(Clients::new(config, first_number)),
            outlet,
            clock,
            timer: Notify::new(),
            counters: Counters::new(),
        });
        tasks.spawn(Arc::clone(&service).run_timers(stop));
        service
    }

    /// Takes a message from upstream. It is settled once the client has it; otherwise its handle is
    /// dropped and upstream delivers it again.
    pub fn arrived(&self, to: &Identity, message: CloudToDevice) {
        let arrival = Arrival {
            message: message.message,
            redelivered: message.redelivered,
            handle: message.settle,
        };
        self.with(|clients, now, offer| clients.arrived(to, arrival, now, offer));
    }

    /// A client connected. With a clean session what an earlier one has not acknowledged goes back
    /// to upstream; otherwise it is sent again once the client is subscribed.
    pub fn connected(&self, client: &Identity, clean_session: bool) {
        self.with(|clients, now, _| clients.connected(client, clean_session, now));
    }

    /// The client is subscribed to cloud-to-device messages; idempotent.
    pub fn subscribed(&self, client: &Identity) {
        self.with(|clients, now, offer| clients.subscribed(client, now, offer));
    }

    /// The client's live connection ended. What it has not acknowledged is held for
    /// [`limits::GRACE`] if its session is not clean.
    pub fn disconnected(&self, client: &Identity, clean_session: bool) {
        self.with(|clients, now, _| clients.disconnected(client, !clean_session, now));
    }

    /// Deliveries were dealt with; those of other streams are not looked at.
    pub fn settled(&self, from: &Identity, settled: &[(DeliveryToken, Settlement)]) {
        self.with(|clients, now, offer| clients.settled(from, settled, now, offer));
    }

    /// The client's session upstream was made again.
    pub fn established(&self, client: &Identity) {
        self.with(|clients, _, _| clients.established(client));
    }

    fn with(
        &self,
        act: impl FnOnce(&mut Clients<oneshot::Sender<CloudToDeviceOutcome>>, Now, Offer<'_>),
    ) {
        let now = Now {
            instant: self.clock.instant(),
            unix_ms: self.clock.unix_ms(),
        };
        let mut offer = |to: &Identity, batch: Vec<Delivery>| -> Result<(), OfferError> {
            self.outlet.offer(to, ToClient::CloudToDevice(batch))
        };
        let mut clients = self.clients.lock();
        act(&mut clients, now, &mut offer);
        let (tally, timer_set) = (clients.take_tally(), clients.timer_set());
        drop(clients);
        self.counters.add(tally);
        if timer_set {
            self.timer.notify_one();
        }
    }

    async fn run_timers(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let deadline = self.clients.lock().deadline();
            let due = async {
                match deadline {
                    Some(at) => sleep_until(Instant::from_std(at)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.timer.notified() => {}
                () = due => self.with(|clients, now, offer| clients.tick(now, offer)),
            }
        }
    }
}
