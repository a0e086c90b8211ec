//! All twins of this hub: who does what when, and what is shared.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use edgehub_proto::clock::Clock;
use edgehub_proto::hub::{Connectivity, Upstream};
use edgehub_proto::identity::Identity;
use edgehub_proto::timestamp::Timestamp;
use edgehub_storage::{Store, StoreError};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::drafts::{stored_own_desired, stored_unsynced};
use super::inbox::{Budget, Command, Inbox, Report, Signal};
use super::limits::{GETS_MAX, PERIOD_MAX, SWEEP_PERIOD, SYNCS_MAX, TWINS_IN_MEMORY_MAX};
use super::sync::{Timing, TwinSync};
use super::worker::Worker;
use super::{DesiredDocument, TwinChanges, TwinConfig, TwinError, TwinParts, TwinReply, metrics};
use crate::hub::{Features, Outlet};

/// The twins. One per process; every method returns at once, with the caller's place in the
/// order of its identity taken, or a future for the rest.
#[derive(Debug)]
pub struct TwinService {
    pub(super) upstream: Arc<dyn Upstream>,
    pub(super) outlet: Arc<dyn Outlet>,
    pub(super) changes: Arc<dyn TwinChanges>,
    pub(super) store: Store,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) own_identity: Identity,
    pub(super) config: TwinConfig,
    pub(super) stop: CancellationToken,
    pub(super) runtime: Handle,
    tasks: TaskTracker,
    pub(super) slots: Mutex<HashMap<Identity, Slot>>,
    budget: Budget,
    /// Permits to have a twin in memory.
    pub(super) desks: Arc<Semaphore>,
    /// Permits to synchronise with the upstream.
    pub(super) syncs: Arc<Semaphore>,
    /// The same, when a client waits.
    pub(super) gets: Arc<Semaphore>,
    /// Identities with reports for the upstream, as in the store.
    pub(super) unsynced: Mutex<BTreeSet<Identity>>,
    pub(super) own_desired: watch::Sender<Option<DesiredDocument>>,
    refusals: AtomicU64,
}

/// One identity. There only while something is to be done or to be remembered.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) inbox: Inbox,
    pub(super) wake: Arc<Notify>,
    /// Whether it has a worker.
    pub(super) running: bool,
    /// What the last worker left for the next.
    pub(super) rest: Option<TwinSync>,
}

impl TwinService {
    /// Restores what an earlier run left and begins. Call it on the runtime that shall do the
    /// work. It reads from the store, once.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn start(parts: TwinParts) -> Result<Arc<Self>, StoreError> {
        let unsynced = stored_unsynced(&parts.store)?;
        let own = stored_own_desired(&parts.store, &parts.own_identity)?;
        let service = Arc::new(Self {
            upstream: parts.upstream,
            outlet: parts.outlet,
            changes: parts.changes,
            store: parts.store,
            clock: parts.clock,
            own_identity: parts.own_identity,
            config: parts.config,
            stop: parts.stop,
            runtime: Handle::current(),
            tasks: parts.tasks,
            slots: Mutex::default(),
            budget: Budget::default(),
            desks: Arc::new(Semaphore::new(TWINS_IN_MEMORY_MAX)),
            syncs: Arc::new(Semaphore::new(SYNCS_MAX)),
            gets: Arc::new(Semaphore::new(GETS_MAX)),
            unsynced: Mutex::new(unsynced),
            own_desired: watch::Sender::new(own),
            refusals: AtomicU64::new(0),
        });
        let watching = Arc::clone(&service).watch_upstream();
        service.tasks.spawn_on(watching, &service.runtime);
        Ok(service)
    }

    /// A client asks for its twin: the upstream's with the reports on top that it does not have
    /// yet; while it cannot be reached, the copy. A copy that was never fetched has versions 0.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the request where it is; nobody hears of its end.
    pub fn get(
        self: &Arc<Self>,
        identity: &Identity,
    ) -> impl Future<Output = TwinReply> + Send + use<> {
        metrics::get_twin("edge_hub", identity).increment(1);
        let (reply, answer) = oneshot::channel();
        let posted = self.post(identity, Command::Get(reply));
        let service = Arc::clone(self);
        async move {
            let answer = match posted {
                Ok(()) => answer.await.map_err(|_| service.given_up()),
                Err(error) => Err(error),
            };
            answer.unwrap_or_else(|error| service.refusal(&error))
        }
    }

    /// A client reports properties. Done when they are in the store and routing has the message
    /// that tells of them; the upstream gets them when it can.
    ///
    /// # Errors
    /// Why they are not taken; [`TwinService::refusal`] has the answer for the client.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the report where it is: it is taken, or not.
    pub fn report(
        self: &Arc<Self>,
        identity: &Identity,
        patch: Bytes,
    ) -> impl Future<Output = Result<(), TwinError>> + Send + use<> {
        self.report_as(identity, patch, true)
    }

    /// As [`TwinService::report`], of the hub itself and without a message for routing.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// As there.
    pub fn report_own(
        self: &Arc<Self>,
        patch: Bytes,
    ) -> impl Future<Output = Result<(), TwinError>> + Send + use<> {
        let own = self.own_identity.clone();
        self.report_as(&own, patch, false)
    }

    fn report_as(
        self: &Arc<Self>,
        identity: &Identity,
        patch: Bytes,
        notify: bool,
    ) -> impl Future<Output = Result<(), TwinError>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let report = Report {
            patch,
            notify,
            reply,
        };
        let posted = self.post(identity, Command::Report(report));
        let service = Arc::clone(self);
        async move {
            posted?;
            answer.await.unwrap_or_else(|_| Err(service.given_up()))
        }
    }

    /// The upstream says that the identity's desired properties changed.
    pub fn desired(self: &Arc<Self>, identity: &Identity, patch: Bytes) {
        self.tell(identity, Command::Desired(patch));
    }

    /// The identity's upstream session stands.
    pub fn established(self: &Arc<Self>, identity: &Identity) {
        self.tell(identity, Command::Signal(Signal::Established));
    }

    /// The client's subscriptions changed, or came back with its session. It is told what it
    /// missed.
    pub fn subscribed(self: &Arc<Self>, identity: &Identity, features: Features) {
        if features.desired {
            self.tell(identity, Command::Signal(Signal::Subscribed));
        }
    }

    /// The identity left this hub's scope: nothing of its twin stays.
    pub fn removed(self: &Arc<Self>, identity: &Identity) {
        if *identity != self.own_identity {
            self.tell(identity, Command::Signal(Signal::Removed));
        }
    }

    /// The desired properties of `$edgeHub`'s own twin; at first the copy of an earlier run.
    #[must_use]
    pub fn own_desired(&self) -> watch::Receiver<Option<DesiredDocument>> {
        self.own_desired.subscribe()
    }

    /// The answer to a request that was not taken.
    #[must_use]
    pub fn refusal(&self, error: &TwinError) -> TwinReply {
        self.refused(error.status(), &error.to_string())
    }

    /// An answer that Node, which looks for `errorCode` in the body and nowhere else, understands
    /// (spec/mqtt.md 5.1).
    pub(super) fn refused(&self, status: u16, message: &str) -> TwinReply {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Refusal<'a> {
            error_code: u32,
            tracking_id: &'a str,
            message: &'a str,
            timestamp_utc: String,
        }
        let now_ms = self.clock.unix_ms();
        let number = self.refusals.fetch_add(1, Ordering::Relaxed);
        // It leads from a client's log to the line here.
        let tracking_id = format!("{now_ms:x}-{number:x}");
        tracing::debug!("Twin request refused with status {status} ({tracking_id}): {message:?}");
        let refusal = Refusal {
            error_code: u32::from(status) * 1000,
            tracking_id: &tracking_id,
            message,
            timestamp_utc: Timestamp::from_unix_ms(now_ms).to_string(),
        };
        TwinReply {
            status,
            body: serde_json::to_vec(&refusal).unwrap_or_default().into(),
        }
    }

    /// Why a request was given up without an answer.
    fn given_up(&self) -> TwinError {
        if self.stop.is_cancelled() {
            TwinError::Stopping
        } else {
            TwinError::Gone
        }
    }

    /// For commands that always find room.
    fn tell(self: &Arc<Self>, identity: &Identity, command: Command) {
        if let Err(error) = self.post(identity, command) {
            tracing::debug!("An event of the twin of {identity} is not taken: {error}");
        }
    }

    /// Gives a command its place in the order of `identity`, and sees to it that somebody works.
    fn post(self: &Arc<Self>, identity: &Identity, command: Command) -> Result<(), TwinError> {
        if self.stop.is_cancelled() {
            return Err(TwinError::Stopping);
        }
        let mut slots = self.slots.lock();
        let slot = slots.entry(identity.clone()).or_default();
        slot.inbox.push(command, &self.budget)?;
        if slot.running {
            slot.wake.notify_one();
            return Ok(());
        }
        slot.running = true;
        let sync = slot.rest.take();
        let wake = Arc::clone(&slot.wake);
        drop(slots);
        let sync = sync.unwrap_or_else(|| self.new_sync(identity));
        let worker = Worker::new(Arc::clone(self), identity.clone(), sync, wake);
        self.tasks.spawn_on(worker.run(), &self.runtime);
        Ok(())
    }

    pub(super) fn new_sync(&self, identity: &Identity) -> TwinSync {
        let timing = Timing {
            fetch_period: self.config.sync_period.min(PERIOD_MAX),
            report_period: self.config.report_period.min(PERIOD_MAX),
        };
        let own = *identity == self.own_identity;
        let unsynced = self.unsynced.lock().contains(identity);
        TwinSync::new(timing, own, unsynced)
    }

    pub(super) fn is_online(&self) -> bool {
        *self.upstream.connectivity().borrow() == Connectivity::Connected
    }

    /// Wakes whoever waits for the upstream when it can be reached again.
    async fn watch_upstream(self: Arc<Self>) {
        let mut connectivity = self.upstream.connectivity();
        let mut sweep = interval(SWEEP_PERIOD);
        loop {
            if *connectivity.borrow_and_update() == Connectivity::Connected {
                for identity in self.waiting_for_upstream() {
                    self.tell(&identity, Command::Signal(Signal::Online));
                }
            }
            loop {
                tokio::select! {
                    () = self.stop.cancelled() => return,
                    changed = connectivity.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        break;
                    }
                    _ = sweep.tick() => self.sweep(self.clock.instant()),
                }
            }
        }
    }

    fn waiting_for_upstream(&self) -> BTreeSet<Identity> {
        let mut waiting = self.unsynced.lock().clone();
        let slots = self.slots.lock();
        let waits = |slot: &Slot| {
            let rest = slot.rest.as_ref();
            slot.running || rest.is_some_and(TwinSync::waits_for_upstream)
        };
        let of_slots = slots.iter().filter(|(_, slot)| waits(slot));
        waiting.extend(of_slots.map(|(identity, _)| identity.clone()));
        waiting
    }

    /// Forgets what nobody needs any more.
    pub(super) fn sweep(&self, now: Instant) {
        self.slots.lock().retain(|_, slot| {
            let needed = |rest: &TwinSync| !rest.is_stale(now);
            slot.running || slot.rest.as_ref().is_some_and(needed)
        });
    }
}
